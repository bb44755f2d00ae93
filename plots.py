"""
Pictures of a run, drawn from its metrics.jsonl alone, and comparisons of several.

    python plots.py runs/dpo                                 # its pictures again
    python plots.py compare runs/adamw-s* runs/lion-s* --x samples --baseline adamw --out results

compare groups the runs that differ in their seed alone, draws mean and range over seeds against samples, updates, flops or
seconds, and prints and saves each group's speedup over the baseline: compare.png, compare.json, and compare-variance.png where
runs were probed (--variance-every).

Training is thin, held-out data solid, a baseline dashed with its number in the legend; an optimizer has one colour everywhere.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

TRAIN, HELD_OUT, CHOSEN, REJECTED, BASELINE = "#9aa5b1", "#1f5fa8", "#2a8f5b", "#c8553d", "#555555"
COLORS = {
    "sgd": "#8c8c8c", "momentum": "#8a5a3b", "nesterov": "#c49a6c", "adam": "#7fb2e5", "adamw": "#1f5fa8",
    "adamw-noaccum": "#6a3d9a", "adamw-pma-schedule": "#b39ddb", "adamw-pma": "#d62728", "adamw-pma-norescale": "#f4a6a0",
    "agma": "#e8890c", "agma-linear": "#f2b866", "agma-sgd": "#b8860b", "agma-decay": "#d9c36a", "agma-perturb": "#a65e2e",
    "lion": "#2a8f5b", "lion-pma": "#86c440"}


def draw(folder):
    """The pictures of the run in `folder`: loss.png, accuracy.png; variance.png and variance-time.png where it was probed."""
    folder = Path(folder)
    config, events = read(folder)
    if any("val_dpo_loss" in e for e in events):
        dpo_loss(events, config, folder / "loss.png")
    else:
        sft_loss(events, config, folder / "loss.png")
    accuracy(events, config, folder / "accuracy.png")
    if any("update_variance" in e for e in events):
        optimizer = config["flags"]["optimizer"]
        for name, x in (("variance.png", "probe_loss"), ("variance-time.png", "seconds")):
            variance([(optimizer, COLORS[optimizer], ".", [events])], folder / name, x)


def read(folder):
    """(config, events) of a run."""
    config = json.loads((Path(folder) / "config.json").read_text())
    events = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    if "optimizer" not in config.get("flags", {}) or not any("val_logp_accuracy" in e for e in events):
        raise ValueError(f"{folder} is not a training run with an evaluation")
    return config, events


def series(events, key):
    found = [(e["samples"], e[key]) for e in events if key in e]
    return zip(*found) if found else ((), ())


def canvas(columns=1, rows=1, height=4):
    figure = Figure(figsize=(6.4 if columns == 1 else 4.6 * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def finish(axis, x, y, legend=True, **where):
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8, **where)


def title(flags):
    if "beta" in flags:
        name = f"CDPO (gamma {flags['gamma']:g})" if flags["loss"] == "cdpo" else "DPO"
        name = f"{name}, beta {flags['beta']:g},"
    else:
        name = f"SFT of {Path(flags['init']).name}"
    adapters = f", LoRA rank {flags['lora_rank']}, bias {flags['lora_bias']}" if flags.get("lora_rank") else ""
    return f"{name} on {Path(flags['data']).name}{adapters}"


def baseline(axis, y, name, style="--"):
    if y is not None:
        axis.axhline(y, color=BASELINE, linestyle=style, linewidth=1, label=f"{name} {y:.3f}")


def sft_loss(events, config, path):
    figure, (axis,) = canvas()
    axis.plot(*series(events, "train_loss"), color=TRAIN, linewidth=0.8, label="training, per step")
    axis.plot(*series(events, "train_eval_loss"), color=CHOSEN, marker=".", label="training, 200 examples in evaluation mode")
    axis.plot(*series(events, "val_loss"), color=HELD_OUT, marker=".", label=f"held out, n = {config['val_pairs']}")
    low, high = axis.get_ylim()
    unigram = config["baseline_unigram_loss"]
    far = unigram is not None and unigram > high   # of a model that was trained before: it would press the curves flat
    baseline(axis, unigram, "unigram frequencies, above:" if far else "unigram frequencies")
    axis.set_ylim(0 if low < high / 2 else low, high)
    scored = "the response" if config["flags"]["loss_on"] == "response" else "all tokens"
    finish(axis, "dialogues seen", f"nats per token of {scored}")
    axis.set_title(title(config["flags"]), fontsize=10)
    figure.savefig(path, dpi=110)


def dpo_loss(events, config, path):
    flags = config["flags"]
    figure, (axis,) = canvas()
    if flags["loss"] == "dpo":   # a CDPO step's loss holds gamma R besides and would not compare
        axis.plot(*series(events, "train_loss"), color=TRAIN, linewidth=0.8, label="training, per step (labels as they come)")
    axis.plot(*series(events, "val_dpo_loss"), color=HELD_OUT, marker=".", label=f"held out, n = {config['val_pairs']}")
    baseline(axis, 0.6931, "policy = reference: log 2 =")
    axis.set_ylim(bottom=0)
    finish(axis, "pairs seen", "DPO loss")
    axis.set_title(title(flags), fontsize=10)
    figure.savefig(path, dpi=110)


def accuracy(events, config, path):
    """Accuracy, rewards and log-probabilities side by side. An SFT run has no reference and so no rewards."""
    has_rewards = any("val_chosen_reward" in e for e in events)
    figure, axes = canvas(3 if has_rewards else 2)
    axis, unit = axes[0], "pairs seen" if has_rewards else "dialogues seen"
    if has_rewards:
        axis.plot(*series(events, "train_reward_accuracy"), color=TRAIN, linewidth=0.8,
                  label="reward, training (labels as they come)")
        axis.plot(*series(events, "val_reward_accuracy"), color=HELD_OUT, marker=".",
                  label=f"reward, held out, n = {config['val_pairs']}")
        baseline(axis, next((e["baseline_sft_logps"] for e in events if "baseline_sft_logps" in e), None), "the start's log-prob")
    axis.plot(*series(events, "val_logp_accuracy"), color=CHOSEN, marker=".", label="log-prob: chosen likelier than rejected")
    baseline(axis, config["baseline_longer_wins"], "longer wins", ":")
    axis.set_ylim(0, 1)
    finish(axis, unit, "share of pairs that are ranked right", loc="lower right")
    if has_rewards:
        axes[1].plot(*series(events, "val_chosen_reward"), color=CHOSEN, marker=".", label="chosen")
        axes[1].plot(*series(events, "val_rejected_reward"), color=REJECTED, marker=".", label="rejected")
        axes[1].axhline(0, color=BASELINE, linewidth=0.8)
        finish(axes[1], unit, "reward: beta (log pi - log ref), held out")
    axes[-1].plot(*series(events, "val_chosen_logps"), color=CHOSEN, marker=".", label="chosen")
    axes[-1].plot(*series(events, "val_rejected_logps"), color=REJECTED, marker=".", label="rejected")
    finish(axes[-1], unit, "log-probability of a response, held out")
    for axis in axes:
        axis.locator_params(axis="x", nbins=5)   # or numbers of five digits run into each other
    figure.suptitle(title(config["flags"]), fontsize=10)
    if has_rewards:
        figure.supxlabel("Two negative rewards are no bug: only the gap between them enters the loss, and both fall when the "
                         "policy moves probability to other answers.", fontsize=8)
    figure.savefig(path, dpi=110)


def variance(groups, path, x="probe_loss", title=""):
    """What the probes found: groups of (label, colour, marker, list of runs' events), against the training loss or the seconds.

    Above raw, below divided by the mean square, log axes; of several runs the mean. Left the gradient of one step(). Middle the
    update, mean and range over the taus of a period. Right the displacement of a whole period, which compares fairly where it is
    relative: at a single tau, PMA and AGMA give the newest gradient a small weight by construction.
    """
    figure, axes = canvas(3, 2, height=6.5)
    for label, color, marker, runs in groups:
        probes = [average(same) for same in zip(*([e for e in events if "update_variance" in e] for events in runs))]
        xs = [p[x] for p in probes]
        for row, form in enumerate(("", "_relative")):
            for axis, what in zip(axes[3 * row:], ("grad", "update", "displacement")):
                found = [p[f"{what}_variance{form}"] for p in probes]
                found = [y if isinstance(y, list) else [y] for y in found]
                middle = [statistics.fmean(y) for y in found]
                reach = [[m - min(y) for m, y in zip(middle, found)], [max(y) - m for m, y in zip(middle, found)]]
                line = "-" if x == "seconds" else ""   # the loss of a probe is a draw too: points, in no order
                axis.errorbar(xs, middle, reach, fmt=marker + line, color=color, markersize=6, linewidth=0.8, label=label)
    names = ("gradient of one step", "update u: mean and range over tau", "displacement of a period", "", "", "(compares fairly)")
    for i, axis in enumerate(axes):
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        if high < 10 * low:   # a decade at least, or scatter of one per cent would fill the panel
            axis.set_ylim(low / 3, high * 3)
        axis.set_title(names[i], fontsize=10)
        if x == "probe_loss":
            axis.set_xscale("log")
            axis.invert_xaxis()   # training goes to the right
            axis.xaxis.set_major_locator(FixedLocator([10, 7, 5, 3, 2, 1.5, 1, 0.7, 0.5, 0.4, 0.3, 0.2]))
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.xaxis.set_minor_formatter(NullFormatter())
        finish(axis, ("training loss (log axis)" if x == "probe_loss" else "seconds of training") if i > 2 else "",
               ("variance", "variance / mean square")[i // 3] if i % 3 == 0 else "", legend=False)
    figure.suptitle(f"{title}noise in the last block, n = {max(len(runs) for *_, runs in groups)} per optimizer", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def average(events):
    """Of the same step's probe in several runs: the mean of every number, tau by tau."""
    return {key: [statistics.fmean(v) for v in zip(*(e[key] for e in events))] if isinstance(value, list)
            else statistics.fmean(e[key] for e in events) for key, value in events[0].items()}

# ----------------------------------------------------------------------------------------------------------------------
# several runs

IMMATERIAL = ("seed", "out", "overwrite", "resume", "stop_at", "device", "variance_every", "eval_answers", "log_every",
              "save_every")   # flags that do not change a curve, but for the seed
COSTS = {"samples": "examples seen", "updates": "updates of the weights", "flops": "FLOPs", "seconds": "seconds of training"}


def grouped(runs):
    """[(config, events), ...] -> {label: {seed: (config, events)}}. A label is the optimizer, what differs among its runs (their
    --init may go with the seed), and K where it is not the same for all optimizers."""
    labels, all_flags = {}, [config["flags"] for config, _ in runs]
    for config, events in runs:
        flags = config["flags"]
        same = [other for other in all_flags if other["optimizer"] == flags["optimizer"]]
        rivals = {"accumulate": all_flags, "init": [other for other in same if other["seed"] == flags["seed"]]}
        differ = [key for key in flags if key not in IMMATERIAL
                  and any(other.get(key) != flags[key] for other in rivals.get(key, same))]
        label = ", ".join([flags["optimizer"], *(f"{key.replace('_', ' ')} {flags[key]}" for key in differ)])
        group = labels.setdefault(label, {})
        if flags["seed"] in group:
            raise ValueError(f"two runs of {label} with seed {flags['seed']}, in {flags['out']} the second")
        group[flags["seed"]] = config, events
    return labels


def curve(events, x, key):
    """[(cost, lowest value so far), ...] over a run's evaluations."""
    points, lowest = [], float("inf")
    for e in events:
        if key in e:
            lowest = min(lowest, e[key])
            points.append((e[x], lowest))
    return points


def cost_to_reach(points, level):
    """The cost at which a curve is first at `level`, on the straight line between evaluations; None if it never is."""
    for (x, y), (next_x, next_y) in zip(points, points[1:]):
        if y <= level:
            return x
        if next_y <= level:
            return x + (next_x - x) * (y - level) / (y - next_y)
    return points[-1][0] if points[-1][1] <= level else None


def speedup(baseline, candidate, share=1.0):
    """(cost of the baseline / cost of the candidate) to the loss that is `share` of the way from the baseline's first to the
    lowest that both reach, and which of the two ("baseline", "candidate" or "") never reaches the other's lowest. None for the
    ratio where one of them never gets below its start."""
    lowest = baseline[-1][1], candidate[-1][1]
    level = share * max(lowest) + (1 - share) * baseline[0][1]   # at share 1 to the bit, or one of them would not reach it
    costs = [cost_to_reach(points, level) for points in (baseline, candidate)]
    short = "" if lowest[0] == lowest[1] else "baseline" if lowest[0] > lowest[1] else "candidate"
    return (costs[0] / costs[1] if costs[0] and costs[1] else None), short


def loss_key(events):
    return "val_dpo_loss" if any("val_dpo_loss" in e for e in events) else "val_loss"


def compare(labelled, baseline, folder, xs=("samples",), title="", noisy=None):
    """Draw compare.png (one panel for each cost in xs) and compare-variance.png (of the labels in `noisy`, or all), save
    compare.json, return its contents. labelled: {label: {seed: (config, events)}}."""
    if baseline not in labelled:
        raise ValueError(f"no runs of the baseline {baseline!r}, but of {'; '.join(map(repr, labelled))}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    everyone = [(label, config["flags"], events) for label, runs in labelled.items() for config, events in runs.values()]
    _, flags, events = next(run for run in everyone if run[0] == baseline)
    key = loss_key(events)
    for label, others, events in everyone:
        for what, one, two in (("loss", key, loss_key(events)), *((name, flags.get(name), others.get(name)) for name in (
                "data", "half", "eval_samples", "loss_on", "beta", "micro_batch"))):
            if one != two:
                raise ValueError(f"{label} does not compare with {baseline}: {what} is {two}, not {one}")
    table = {"loss": key, "baseline": baseline, "runs": {}}
    figure, axes = canvas(len(xs))
    styles = {}
    for label, runs in labelled.items():
        optimizer = next(iter(runs.values()))[0]["flags"]["optimizer"]
        style = styles.setdefault(optimizer, iter(("-", "--", ":", "-.") * 9))
        drawn = COLORS[optimizer], next(style)
        row = table["runs"][label] = {"seeds": sorted(runs),
                                      "lowest": [curve(runs[s][1], "samples", key)[-1][1] for s in sorted(runs)],
                                      "last": [[e[key] for e in runs[s][1] if key in e][-1] for s in sorted(runs)]}
        both = sorted(set(runs) & set(labelled[baseline]))
        for x in COSTS:
            curves = [(curve(labelled[baseline][s][1], x, key), curve(runs[s][1], x, key)) for s in both]
            row[f"speedup_{x}"] = [speedup(*two)[0] for two in curves]
            row[f"speedup_90_{x}"] = [speedup(*two, share=0.9)[0] for two in curves]
            row["fell_short"] = [speedup(*two)[1] for two in curves]
        for axis, x in zip(axes, xs):
            points = [[(e[x], e[key]) for e in events if key in e] for _, events in runs.values()]
            length = min(map(len, points))
            cost = [statistics.fmean(p[i][0] for p in points) for i in range(length)]
            ys = [[p[i][1] for p in points] for i in range(length)]
            axis.fill_between(cost, list(map(min, ys)), list(map(max, ys)), color=drawn[0], alpha=0.15, linewidth=0)
            axis.plot(cost, list(map(statistics.fmean, ys)), drawn[1], color=drawn[0], label=f"{label} (n = {len(runs)})")
    for axis, x in zip(axes, xs):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(ScalarFormatter())
        finish(axis, COSTS[x], f"held-out {'DPO loss' if key == 'val_dpo_loss' else 'loss'} (log axis)")
    axes[0].set_title(f"{title}mean and range over seeds", fontsize=10)
    figure.savefig(folder / "compare.png", dpi=110)
    probed = {label: found for label, runs in labelled.items() if (noisy is None or label in noisy)
              and (found := [e for _, e in runs.values() if any("update_variance" in event for event in e)])}
    if probed:
        colors = [COLORS[next(iter(labelled[label].values()))[0]["flags"]["optimizer"]] for label in probed]
        variance(list(zip(probed, colors, ".xsd^v*+" * 9, probed.values())), folder / "compare-variance.png", title=title)
    (folder / "compare.json").write_text(json.dumps(table, indent=1))
    return table


def spread(values, digits=2):
    """Median and range of what there is, for a table."""
    there = [v for v in values if v is not None]
    if len(there) < 2:
        return f"{there[0]:.{digits}f} (one seed)" if there else ""
    missing = f", {len(values) - len(there)} never" if len(there) < len(values) else ""
    return f"{statistics.median(there):.{digits}f} [{min(there):.{digits}f}, {max(there):.{digits}f}]{missing}"


def as_text(table, x="samples"):
    """The table for a terminal or a README, a row a label; every entry is a median and a range over seeds."""
    base = table["baseline"]
    lines = [f"| | n | last held-out loss | lowest | speedup over {base} in {x}, to the lowest loss that both reach | to 90 % of "
             "the way there | never reaches the other's lowest |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for label, row in table["runs"].items():
        names = {"baseline": base, "candidate": label}
        who = ", ".join(f"{names[side]} {row['fell_short'].count(side)} of {len(row['fell_short'])}" for side in names
                        if side in row["fell_short"])
        lines.append(f"| {label} | {len(row['seeds'])} | {spread(row['last'], 3)} | {spread(row['lowest'], 3)} | "
                     f"{spread(row[f'speedup_{x}'])} | {spread(row[f'speedup_90_{x}'])} | {who} |")
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; -h lists the flags")


def main(arguments):
    parser = Parser(prog="plots.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if arguments[:1] == ["compare"]:
        parser.add_argument("command", choices=["compare"])
        parser.add_argument("runs", nargs="+")
        parser.add_argument("--x", choices=COSTS, default="samples")
        parser.add_argument("--baseline", help="a label: an optimizer, and what differs among its runs [the first run's]")
        parser.add_argument("--out", default=".", help="folder of compare.png and compare.json")
        options = parser.parse_args(arguments)
        labelled = grouped([read(folder) for folder in options.runs])
        table = compare(labelled, options.baseline or next(iter(labelled)), options.out, [options.x])
        print(f"{as_text(table, options.x)}\n\ndrawn and kept: {Path(options.out) / 'compare.png'}, compare.json")
    else:
        parser.add_argument("runs", nargs="+")
        for folder in parser.parse_args(arguments).runs:
            draw(folder)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
