"""
Pictures of a run, drawn from its metrics.jsonl alone (studies/compare.py draws several runs in one picture).

    python plots.py runs/dpo      # its pictures again

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
EVALUATED = ("val_loss", "val_reward_loss", "val_dpo_loss")   # one of them is in every evaluation of a run
LEVELS = ("--", (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (6, 2)), (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))   # lines of fixed scores
COLORS = {
    "sgd": "#8c8c8c", "momentum": "#8a5a3b", "nesterov": "#c49a6c", "adam": "#7fb2e5", "adamw": "#1f5fa8",
    "adamw-noaccum": "#6a3d9a", "adamw-pma-schedule": "#b39ddb", "adamw-pma": "#d62728", "adamw-pma-norescale": "#f4a6a0",
    "agma": "#e8890c", "agma-linear": "#f2b866", "agma-sgd": "#b8860b", "agma-decay": "#d9c36a", "agma-perturb": "#a65e2e",
    "lion": "#2a8f5b", "lion-pma": "#86c440"}


def draw(folder):
    """The pictures of the run in `folder`: loss.png, accuracy.png; of a reward model calibration.png; variance.png and
    variance-time.png where it was probed."""
    folder = Path(folder)
    config, events = read(folder)
    if any("val_dpo_loss" in e for e in events):
        dpo_loss(events, config, folder / "loss.png")
    elif any("val_reward_loss" in e for e in events):
        reward_loss(events, config, folder / "loss.png")
        calibration(events, config, folder / "calibration.png")
    else:
        sft_loss(events, config, folder / "loss.png")
    if any("val_logp_accuracy" in e or "val_reward_accuracy" in e for e in events):   # SFT on no pairs has none
        accuracy(events, config, folder / "accuracy.png")
    if any("update_variance" in e for e in events):
        optimizer = config["flags"]["optimizer"]
        for name, x in (("variance.png", "probe_loss"), ("variance-time.png", "seconds")):
            variance([(optimizer, COLORS[optimizer], ".", [events])], folder / name, x)


def read(folder):
    """(config, events) of a run."""
    config, metrics = Path(folder) / "config.json", Path(folder) / "metrics.jsonl"
    if not (config.is_file() and metrics.is_file()):
        raise ValueError(f"{folder} holds no run: expected config.json and metrics.jsonl in it")
    said, = rows(config, [config.read_bytes()])
    events = rows(metrics, metrics.read_bytes().splitlines())
    flags = said.get("flags")
    if not isinstance(flags, dict) or "optimizer" not in flags or not any(key in e for e in events for key in EVALUATED):
        raise ValueError(f"{folder} is not a training run with an evaluation")
    for n, event in enumerate(events, 1):
        for key in ("step", "updates", "samples", "flops", "seconds", "train_loss", *EVALUATED):
            if type(event.get(key, 0)) not in (int, float):
                raise ValueError(f"{metrics}:{n}: expected {key} to be a number, found {str(event[key])[:40]!r}")
    return said, events


def rows(path, texts):
    """JSON objects, one a text."""
    found = []
    for n, text in enumerate(texts, 1):
        try:
            found.append(json.loads(text))
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}:{n}: not JSON ({e})") from None
        if not isinstance(found[-1], dict):
            raise ValueError(f"{path}:{n}: expected a JSON object, found {type(found[-1]).__name__}")
    return found


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
        name = f"{'SFT of' if 'loss_on' in flags else 'reward model from'} {Path(flags['init']).name}"
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
    unit = "blocks" if "train blocks" in config.get("data", {}) else "dialogues"
    finish(axis, f"{unit} seen", f"nats per token of {scored}")
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


def reward_loss(events, config, path):
    figure, (axis,) = canvas()
    axis.plot(*series(events, "train_loss"), color=TRAIN, linewidth=0.8, label="training, per step (labels as they come)")
    axis.plot(*series(events, "train_eval_loss"), color=CHOSEN, marker=".", label="training pairs in evaluation mode (the same)")
    axis.plot(*series(events, "val_reward_loss"), color=HELD_OUT, marker=".", label=f"held out, n = {config['val_pairs']}")
    baseline(axis, 0.6931, "all rewards equal: log 2 =")
    axis.set_ylim(bottom=0)
    finish(axis, "pairs seen", "-log sigmoid(chosen - rejected reward)")
    axis.set_title(title(config["flags"]), fontsize=10)
    figure.savefig(path, dpi=110)


def calibration(events, config, path):
    """Of the last evaluation: how often it is right against how sure it is, and the margins' histogram."""
    last = [e for e in events if "val_reward_calibration" in e][-1]
    figure, (left, right) = canvas(2)
    left.plot([0.5, 1], [0.5, 1], color=BASELINE, linestyle="--", linewidth=1, label="right as often as it says")
    for key, color, name in (("train_eval", CHOSEN, "training pairs, in-sample"), ("val_reward", HELD_OUT, "held out")):
        said, share, low, high, _ = zip(*last[f"{key}_calibration"])
        reach = [[max(0, s - a) for s, a in zip(share, low)], [max(0, b - s) for s, b in zip(share, high)]]   # 1 - 1e-16 at a 1
        left.errorbar(said, share, reach, fmt="o-", markersize=4, color=color, linewidth=1, elinewidth=0.8,
                      label=f"{name}: calibration error {last[f'{key}_calibration_error']:.3f}")
    left.set_ylim(0, 1.02)
    finish(left, "how sure it is: sigmoid |margin|, a dot an eighth of the pairs", "share of pairs in which it is right (95 %)",
           loc="lower right")
    margins = last["val_reward_margins"], last["train_eval_margins"]
    reach = max(map(abs, margins[0] + margins[1])) or 1
    edges = [reach * (i / 20 - 1) for i in range(41)]
    weights = [[1 / len(m)] * len(m) for m in margins]
    right.hist(margins[0], edges, weights=weights[0], color=HELD_OUT, alpha=0.5,
               label=f"held out: {last['val_reward_accuracy']:.3f} ranked right")
    right.hist(margins[1], edges, weights=weights[1], color=CHOSEN, histtype="step",
               label=f"training pairs: {last['train_eval_accuracy']:.3f}")
    right.axvline(0, color=BASELINE, linewidth=0.8)
    finish(right, "margin: chosen minus rejected reward", "share of pairs", loc="upper left")
    figure.suptitle(f"{title(config['flags'])}, step {last['step']}", fontsize=10)
    figure.savefig(path, dpi=110)


def accuracy(events, config, path):
    """Accuracy, rewards and log-probabilities side by side: an SFT run has no rewards, a reward model no log-probabilities."""
    has_rewards, has_logps = (any(key in e for e in events) for key in ("val_chosen_reward", "val_chosen_logps"))
    figure, axes = canvas(1 + has_rewards + has_logps)
    axis, unit = axes[0], "pairs seen" if has_rewards else "dialogues seen"
    if has_rewards:
        axis.plot(*series(events, "train_reward_accuracy"), color=TRAIN, linewidth=0.8,
                  label="reward, training (labels as they come)")
        axis.plot(*series(events, "val_reward_accuracy"), color=HELD_OUT, marker=".",
                  label=f"reward, held out, n = {config['val_pairs']}")
        start = [e["baseline_sft_logps"] for e in (config, *events) if "baseline_sft_logps" in e]
        baseline(axis, start[0] if start else None, "the start's log-prob")
    if has_logps:
        axis.plot(*series(events, "val_logp_accuracy"), color=CHOSEN, marker=".", label="log-prob: chosen likelier than rejected")
    baseline(axis, config["baseline_longer_wins"], "longer wins", ":")
    axis.set_ylim(0, 1)
    finish(axis, unit, "share of pairs that are ranked right", loc="lower right")
    if has_rewards:
        axes[1].plot(*series(events, "val_chosen_reward"), color=CHOSEN, marker=".", label="chosen")
        axes[1].plot(*series(events, "val_rejected_reward"), color=REJECTED, marker=".", label="rejected")
        axes[1].axhline(0, color=BASELINE, linewidth=0.8)
        what = "reward: beta (log pi - log ref), held out" if has_logps else "mean reward, held out, before centring"
        finish(axes[1], unit, what)
    if has_logps:
        axes[-1].plot(*series(events, "val_chosen_logps"), color=CHOSEN, marker=".", label="chosen")
        axes[-1].plot(*series(events, "val_rejected_logps"), color=REJECTED, marker=".", label="rejected")
        finish(axes[-1], unit, "log-probability of a response, held out")
    for axis in axes:
        axis.locator_params(axis="x", nbins=5)   # or numbers of five digits run into each other
    figure.suptitle(title(config["flags"]), fontsize=10)
    rewards = [e for e in events if "val_chosen_reward" in e]
    if has_logps and rewards and rewards[-1]["val_chosen_reward"] < 0 and rewards[-1]["val_rejected_reward"] < 0:
        figure.supxlabel("Two negative rewards are no bug: only the gap between them enters the loss, and both fall when the "
                         "policy moves probability to other answers.", fontsize=8)
    figure.savefig(path, dpi=110)


def reward_histograms(scores, rewards, modes, path):
    """How the judge's rewards are spread over each model's answers, a column a mode of sampling, and over the data's own. scores:
    eval_reward's; rewards: {(model, mode): array}. What lies far left of the rest (a random model's) is in the first bin."""
    def quantile(values, q):
        return sorted(values)[round(q * (len(values) - 1))]
    names = [*scores["models"], *scores["own answers"]]
    figure, axes = canvas(len(modes), height=1.2 + 0.5 * len(names))
    high = max(quantile(values, 0.99) for values in rewards.values())
    typical = statistics.median(quantile(values, 0.02) for values in rewards.values())
    low = max(min(map(min, rewards.values())), typical - (high - typical))
    high = high if high > low else low + 1   # all rewards equal
    edges = [low + (high - low) * i / 50 for i in range(51)]
    for axis, mode in zip(axes, modes):
        for row, name in enumerate(reversed(names)):
            own = name in scores["own answers"]
            found = scores["own answers"][name] if own else scores["models"][name][mode]
            values = rewards[name, "data" if own else mode]
            counts = [0] * 50
            for x in values:
                counts[min(49, max(0, int(50 * (x - low) / (high - low))))] += 1
            color = BASELINE if own else HELD_OUT
            axis.stairs([row + 0.85 * n / max(counts) for n in counts], edges, baseline=row, fill=True, color=color, alpha=0.35)
            if low <= found["reward"] <= high:
                axis.plot([found["reward"]] * 2, [row, row + 0.85], color=color, linewidth=1.5)
            axis.annotate(f"{found['reward']:+.2f}", (1, row + 0.3), xycoords=("axes fraction", "data"), xytext=(4, 0),
                          textcoords="offset points", color=color, fontsize=8)
        axis.set_yticks([i + 0.3 for i in range(len(names))], list(reversed(names)), fontsize=8)
        finish(axis, "reward of an answer; line: mean", "", legend=False)
        axis.set_title(mode, fontsize=10)
    n = next(iter(scores["models"].values()))[modes[0]]["n"]
    figure.suptitle(f"rewards by {Path(scores['judge']['name']).name}, {n} prompts", fontsize=10)
    figure.savefig(path, dpi=110)


def score_over_steps(scores, curves, modes, path):
    """Mean reward with its 95 % interval against training steps, and the share of right answers where it is known; dashed, other
    models and the data's own answers. curves: {run: [(step, its scores), ...]}."""
    known = "right" in next(iter(scores["models"].values()))[modes[0]]
    figure, axes = canvas(1 + known)
    colors, styles = (HELD_OUT, CHOSEN, REJECTED, "#6a3d9a", "#e8890c", "#8a5a3b"), ("-", ":", "-.", "--")
    for (run, points), color in zip(curves.items(), colors * len(curves)):
        steps = [step for step, _ in points]
        for mode, style in zip(modes, styles * len(modes)):
            rows = [score[mode] for _, score in points]
            low, high = zip(*(row["reward_95"] for row in rows))
            axes[0].fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
            for axis, key in zip(axes, ("reward", "right")):
                axis.plot(steps, [row[key] for row in rows], style, marker=".", color=color, label=f"{Path(run).name}, {mode}")
    on_curves = {id(score) for points in curves.values() for _, score in points}
    levels = {name: score[modes[0]] for name, score in scores["models"].items() if id(score) not in on_curves}
    for (name, row), style in zip({**levels, **scores["own answers"]}.items(), LEVELS * 9):
        label = f"{name} {row['reward']:+.2f}" + (f", {modes[0]}" if name in levels else "")
        axes[0].axhline(row["reward"], color=BASELINE, linestyle=style, linewidth=1, label=label)
    every = [score[mode]["reward"] for points in curves.values() for _, score in points for mode in modes]
    typical, top = statistics.median(every), max(*every, *(row["reward"] for row in scores["own answers"].values()))
    cut = typical - 5 * (top - typical)   # a random start would press the rest flat
    below = ", cut below" if min(every) < cut < typical else ""
    if below:
        axes[0].set_ylim(cut, top + 0.1 * (top - cut))
    finish(axes[0], "step of training", f"mean reward by {Path(scores['judge']['name']).name} (95 %{below})", loc="lower right")
    if known:
        axes[1].set_ylim(0, 1)
        finish(axes[1], "step of training", "share of right answers, by the checkers")
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


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; -h lists the flags")


def main(arguments):
    parser = Parser(prog="plots.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    for folder in parser.parse_args(arguments).runs:
        try:
            draw(folder)
        except (KeyError, TypeError) as e:   # an event or a flag that is not there, or no number
            raise ValueError(f"{folder}: its config.json or metrics.jsonl is damaged, or of another version ({e})") from None


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
