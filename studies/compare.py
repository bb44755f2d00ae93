"""
Several runs compared: which optimizer reaches a loss first, and how much sooner?

    python -m studies.compare runs/adamw-s* runs/lion-s* --x samples --baseline adamw --out results

It groups the runs that differ in their seed alone, draws mean and range over seeds against samples, updates, flops or seconds,
and prints and saves each group's speedup over the baseline: compare.png, compare.json, and compare-variance.png where runs were
probed (--variance-every).
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

from matplotlib.ticker import ScalarFormatter

import plots

IMMATERIAL = ("seed", "out", "overwrite", "resume", "stop_at", "device", "variance_every", "eval_answers", "log_every",
              "save_every", "keep_every")   # flags that do not change a curve, but for the seed
LOSSES = {"val_loss": "loss", "val_reward_loss": "reward loss", "val_dpo_loss": "DPO loss"}
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
    return next(key for key in plots.EVALUATED if any(key in e for e in events))


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
    figure, axes = plots.canvas(len(xs))
    styles = {}
    for label, runs in labelled.items():
        optimizer = next(iter(runs.values()))[0]["flags"]["optimizer"]
        style = styles.setdefault(optimizer, iter(("-", "--", ":", "-.") * 9))
        drawn = plots.COLORS[optimizer], next(style)
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
        plots.finish(axis, COSTS[x], f"held-out {LOSSES[key]} (log axis)")
    axes[0].set_title(f"{title}mean and range over seeds", fontsize=10)
    figure.savefig(folder / "compare.png", dpi=110)
    probed = {label: found for label, runs in labelled.items() if (noisy is None or label in noisy)
              and (found := [e for _, e in runs.values() if any("update_variance" in event for event in e)])}
    if probed:
        colors = [plots.COLORS[next(iter(labelled[label].values()))[0]["flags"]["optimizer"]] for label in probed]
        plots.variance(list(zip(probed, colors, ".xsd^v*+" * 9, probed.values())), folder / "compare-variance.png", title=title)
    (folder / "compare.json").write_text(json.dumps(table, indent=1))
    return table


def spread(values, digits=2):
    """Median and range of what there is, for a table."""
    there = [v for v in values if v is not None]
    if len(there) < 2:
        return f"{there[0]:.{digits}f} (one seed)" if there else ""
    missing = f", {len(values) - len(there)} never" if len(there) < len(values) else ""
    return f"{statistics.median(there):.{digits}f} [{min(there):.{digits}f}, {max(there):.{digits}f}]{missing}"


def mean_range(values, digits=3):
    """Mean and range of differences, for a table."""
    return f"{statistics.fmean(values):+.{digits}f} [{min(values):+.{digits}f}, {max(values):+.{digits}f}]"


def as_text(table, x="samples"):
    """The table for a terminal or a report, a row a label; every entry is a median and a range over seeds."""
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


def main(arguments):
    parser = plots.Parser(prog="python -m studies.compare", description=__doc__,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--x", choices=COSTS, default="samples")
    parser.add_argument("--baseline", help="a label: an optimizer, and what differs among its runs [the first run's]")
    parser.add_argument("--out", default=".", help="folder of compare.png and compare.json")
    options = parser.parse_args(arguments)
    labelled = grouped([plots.read(folder) for folder in options.runs])
    table = compare(labelled, options.baseline or next(iter(labelled)), options.out, [options.x])
    print(f"{as_text(table, options.x)}\n\ndrawn and kept: {Path(options.out) / 'compare.png'}, compare.json")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
