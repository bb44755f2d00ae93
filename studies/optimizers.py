"""
Do periodical averages beat gradient accumulation? Seven optimizers, SFT and DPO on minihh, 8 micro-batches a step, five seeds.

    python -m studies.optimizers                 # everything: about 3 hours on 2 cores
    python -m studies.optimizers --minutes 30    # a piece of it: stops after 30 minutes; call it again to go on
    python -m studies.optimizers --report        # tables and pictures of what is there
    python -m studies.optimizers --results DIR   # anew: what is in results/optimizers is not made again

Every run is a call of train_sft.py or train_dpo.py on one thread, two at a time, in a folder under runs/optimizers. Stopped
(Ctrl-C, a crash), it goes on where it was. DIR gets runs.jsonl (the evaluations and probes of every run), tables.md and pictures.

1. Learning rates. One lattice, 3e-3 times powers of 1.5, for all. Each method tries three rates 2.25 apart, up to two more while
   the best of them is the outermost, then the two next to the best, 1.5 away, and once more where that made another the best;
   at half length, seed 1, and the lowest loss on *valid* at the end wins (not the lowest on the way: DPO's rises again).
2. Comparison. Each method at its own rate, and AdamW and Lion with accumulation at the rates that move as far in a period as
   AdamW-PMA and Lion-PMA do where noise dominates (MATCHED); five seeds, read on *test*.
3. K. AdamW and AdamW-PMA at their rates for K = 8, with K = 1, 2, 4, 16, 32, equal samples, half length, three seeds, on test.
   K = 8 is the first half of 2.; at K = 1 the two are one optimizer at two rates.

A constant rate after 20 steps of warm-up, so that the time to a loss means something at every loss; no weight decay (it means
other things to SGD than to AdamW) and no clipping. DPO with seed s starts from an SFT run with seed s.
"""
import json
import math
from pathlib import Path
from typing import NamedTuple

import minihh
from studies.compare import as_text, compare, curve, speedup, spread
from studies.lab import HERE, Lab, command_line, rate, rates_table, search

RUNS = Path("runs/optimizers")   # under HERE
K, STEPS, SEEDS = 8, 416, 5


class Task(NamedTuple):
    script: str
    flags: list        # 4 dialogues a micro-batch in either task
    loss: str          # the one that counts
    middle: dict       # of each family's first three rates, as a power of 1.5


TASKS = {"sft": Task("train_sft.py", ["--micro-batch", 4], "val_loss", {"adam": 0, "lion": -6, "sgd": 11}),
         "dpo": Task("train_dpo.py", ["--micro-batch", 2], "val_dpo_loss", {"adam": -11, "lion": -17, "sgd": -6})}
METHODS = {"adamw": "adam", "adamw-pma": "adam", "agma": "adam", "adamw-noaccum": "adam", "lion": "lion", "lion-pma": "lion",
           "momentum": "sgd"}
# matched to -> (optimizer, factor): how much farther a period of the first goes than one accumulated step of the second
MATCHED = {"adamw-pma": ("adamw", sum(j ** -0.5 for j in range(1, K + 1)) / math.sqrt(K)), "lion-pma": ("lion", 2 - 1 / K)}


KEPT = ("step", "micro_step", "samples", "updates", "flops", "seconds", "val_loss", "val_dpo_loss", "val_logp_accuracy",
        "val_reward_accuracy", "probe_loss", "displacement_rms", *(f"{what}_variance{form}" for form in ("", "_relative")
                                                                   for what in ("grad", "update", "displacement")))


FLAGS = ("optimizer", "lr", "seed", "accumulate", "steps")


def new_lab(results):
    return Lab(results, RUNS, KEPT, FLAGS)


def training(lab, task, name, split, optimizer, lr, seed, steps=STEPS, k=K):
    every = (52 if split == "test" else 104) * K // k   # at equal samples
    probes = ["--variance-every", every] if k == K and seed <= 2 else []
    init = ["--init", f"{RUNS}/start-s{seed}"] if task == "dpo" else []
    return lab.run(f"{task}/{name}", TASKS[task].script, *TASKS[task].flags, "--optimizer", optimizer, "--lr", lr, "--seed", seed,
                   "--data", f"{RUNS}/train.jsonl,{RUNS}/{split}.jsonl", "--steps", steps, "--accumulate", k, "--schedule",
                   "constant", "--warmup", 20 * K // k, "--weight-decay", 0, "--grad-clip", 0, "--eval-every", every,
                   "--log-every", every, "--eval-samples", 520, "--eval-answers", 0, *init, *probes)   # the whole split


def last_loss(task, run):
    """Its held-out loss at the end; infinite where it diverged."""
    return math.inf if "diverged" in run else [e[TASKS[task].loss] for e in run["events"] if TASKS[task].loss in e][-1]


def grid(lab, task, method):
    """{rate: last loss on valid} of the rule above, or None where the time was up."""
    def loss_at(power):
        run = training(lab, task, f"grid/{method}-{rate(power):g}", "valid", method, rate(power), 1, STEPS // 2)
        return run and last_loss(task, run)
    found = search(loss_at, TASKS[task].middle[METHODS[method]])
    return found and {rate(power): loss for power, loss in found.items()}


def chosen(grids):
    """method -> its rate, and the matched ones: name -> (optimizer, rate)."""
    best = {method: min(grid, key=grid.get) for method, grid in grids.items()}
    runs = {method: (method, lr) for method, lr in best.items()}
    return runs | {f"{base}-matched": (base, float(f"{factor * best[method]:.3g}")) for method, (base, factor) in MATCHED.items()}


def start(lab, seed):
    """What DPO starts from."""
    return lab.weights(f"start-s{seed}", "train_sft.py", "--seed", seed, "--eval-answers", 0,
                       "--data", f"{RUNS}/train.jsonl,{RUNS}/valid.jsonl")


def work(lab):
    """Whatever of the study is not there yet."""
    (HERE / RUNS).mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid", "test"):
        pairs = [{"chosen": e.prompt + e.chosen, "rejected": e.prompt + e.rejected} for e in minihh.examples(split)]
        (HERE / RUNS / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    starts = lab.map(start, [(lab, seed) for seed in range(1, SEEDS + 1)])
    if None in starts:
        return
    found = lab.map(grid, [(lab, task, method) for task in TASKS for method in METHODS])
    if None in found:
        return
    grids = {task: dict(zip(METHODS, found[i * len(METHODS):])) for i, task in enumerate(TASKS)}
    for seed in range(1, SEEDS + 1):
        lab.map(training, [(lab, task, f"test/{optimizer}-{lr:g}-s{seed}", "test", optimizer, lr, seed)
                           for task in TASKS for optimizer, lr in chosen(grids[task]).values()])
    lab.map(training, [(lab, task, f"k/{name}-{chosen(grids[task])[name][1]:g}-k{k}-s{seed}", "test", name,
                        chosen(grids[task])[name][1], seed, STEPS * K // 2 // k, k)
                       for seed in (1, 2, 3) for task in TASKS for k in (1, 2, 4, 16, 32)
                       for name in ("adamw", "adamw-pma")])

# ----------------------------------------------------------------------------------------------------------------------
# the report

def report(lab):
    lab.stop.set()   # grid() starts nothing now
    text = [f"{len(lab.found)} runs are done.", ""]
    for task in TASKS:
        grids = {method: grid(lab, task, method) for method in METHODS}
        if None in grids.values():
            missing = ", ".join(method for method, grid in grids.items() if grid is None)
            text += [f"{task.upper()}: the learning rates of {missing} are not found yet.", ""]
        else:
            text += [f"## {task.upper()}", "", *rates(task, grids), "", *shared_rate(lab, task, grids), ""]
            groups = {name: events for name, (optimizer, lr) in chosen(grids).items()
                      if (events := seeds(lab, f"{task}/test/{optimizer}-{lr:g}"))}
            if "adamw" in groups:
                text += [*comparison(lab, task, groups, chosen(grids)), "", *periods(lab, task, groups, chosen(grids)), ""]
    lab.file.parent.mkdir(parents=True, exist_ok=True)
    (lab.file.parent / "tables.md").write_text("\n".join(text))
    print("\n".join(text))


def seeds(lab, name):
    """{seed: (config, events)} of the runs at hand, as compare() takes them."""
    found = {seed: lab.found.get(f"{name}-s{seed}") for seed in range(1, SEEDS + 1)}
    return {seed: (run, run["events"]) for seed, run in found.items() if run}


def rates(task, grids):
    """The learning rates that were tried."""
    return [f"{TASKS[task].loss} at the end, on valid, half length, seed 1; the chosen rate in bold.", "", *rates_table(grids)]


def shared_rate(lab, task, grids):
    """The papers' protocol, read off the grid: two methods at one rate, one seed, and how far a period of each goes."""
    lines = ["Both at the same rate (the papers' protocol), half length, valid split, **n = 1**; bold: the other's own rate. "
             "Evaluations are 104 steps apart: the straight line between two of them pulls a speedup towards 1.", "",
             "| | against | rate | last loss | the other's | the other's at 1.5 times the rate | speedup in samples | "
             "a period moves, ratio |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for method, base in (("adamw-pma", "adamw"), ("agma", "adamw"), ("adamw-noaccum", "adamw"), ("lion-pma", "lion")):
        own = min(grids[base], key=grids[base].get)
        for lr in sorted(set(grids[method]) & set(grids[base])):
            if math.inf not in (grids[method][lr], grids[base][lr]):
                one, two = (lab.found[f"{task}/grid/{name}-{lr:g}"]["events"] for name in (base, method))
                curves = [curve(events, "samples", TASKS[task].loss) for events in (one, two)]
                ratio = speedup(*curves)[0]   # None where one never gets below its start
                moved = [after_warmup(events)[0]["displacement_rms"] for events in (one, two)]
                higher = "".join(f"{loss:.3f}" for other, loss in grids[base].items() if abs(other / lr - 1.5) < 0.01)
                lines.append(f"| {method} | {base} | {f'**{lr:g}**' if lr == own else f'{lr:g}'} | {grids[method][lr]:.3f} | "
                             f"{grids[base][lr]:.3f} | {higher} | {f'{ratio:.2f}' if ratio else 'none'} | "
                             f"{moved[1] / moved[0]:.2f} |")
    return lines


def after_warmup(events):
    return [e for e in events if "displacement_rms" in e and e["step"] > 20]


def comparison(lab, task, groups, runs):
    """Every method at its own rate. FLOPs are not listed: they are samples times a constant, the same one for all."""
    folder = lab.file.parent / task
    table = compare(groups, "adamw", folder, title=f"{task.upper()} on minihh, test split, K = {K}: ",
                    noisy=("adamw", "adamw-pma", "adamw-noaccum", "agma"))
    base = {seed: events for seed, (_, events) in groups["adamw"].items()}
    lines = [f"{STEPS} steps of {K} micro-batches, each method at its own rate, test split; median and [range] over seeds.", "",
             as_text(table), "",
             "| | rate | a period moves, against adamw's (last block, probes of two seeds) | relative variance of that | last "
             "held-out accuracy | diverged |", "| --- | --- | --- | --- | --- | --- |"]
    for name, by_seed in groups.items():
        moved = [b["displacement_rms"] / a["displacement_rms"] for seed, (_, events) in by_seed.items() if seed in base
                 for a, b in zip(after_warmup(base[seed]), after_warmup(events))]
        noise = [e["displacement_variance_relative"] for _, events in by_seed.values() for e in after_warmup(events)]
        accuracy = [events[-1].get("val_reward_accuracy", events[-1]["val_logp_accuracy"]) for _, events in by_seed.values()]
        row = table["runs"][name]
        row |= {"rate": runs[name][1], "moved_against_baseline": moved, "relative_variance": noise, "last_accuracy": accuracy,
                "diverged": sum("diverged" in run for run, _ in by_seed.values())}
        lines.append(f"| {name} | {runs[name][1]:g} | {spread(moved)} | {spread(noise)} | "
                     f"{spread(accuracy, 3)} | {row['diverged']} |")
    (folder / "compare.json").write_text(json.dumps(table, indent=1))
    lines += ["", "The same speedups over other baselines.", "",
              "| | over | to the lowest loss that both reach | to 90 % of the way there |", "| --- | --- | --- | --- |"]
    for name, base in (("adamw-pma", "adamw-matched"), ("lion-pma", "lion"), ("lion-pma", "lion-matched")):
        if name in groups and base in groups:
            curves = [{seed: curve(events, "samples", TASKS[task].loss) for seed, (_, events) in groups[which].items()}
                      for which in (base, name)]
            lines.append(f"| {name} | {base} | {' | '.join(speedups(*curves))} |")
    return lines


def speedups(baseline, candidate):
    """Of {seed: curve} and {seed: curve}: to the lowest loss that both reach and to 90 % of the way there, over common seeds."""
    both = [(baseline[seed], candidate[seed]) for seed in baseline if seed in candidate]
    return [spread([speedup(*two, share)[0] for two in both]) for share in (1, 0.9)]


def periods(lab, task, groups, runs):
    """AdamW-PMA against AdamW at every K. K = 8 is the first half of the comparison's runs."""
    half = STEPS * K // 2
    lines = [f"K, at equal samples ({half} micro-batches), the rates of K = 8, test split, three seeds.", "",
             "| K | adamw, lowest loss | adamw-pma, lowest loss | speedup over adamw in samples | to 90 % of the way |",
             "| --- | --- | --- | --- | --- |"]
    for k in (1, 2, 4, 8, 16, 32):
        pair = []
        for name in ("adamw", "adamw-pma"):
            found = seeds(lab, f"{task}/k/{name}-{runs[name][1]:g}-k{k}") if k != K else groups.get(name, {})
            pair.append({seed: curve([e for e in events if e["micro_step"] <= half], "samples", TASKS[task].loss)
                         for seed, (_, events) in found.items() if seed <= 3})
        if pair[0] and pair[1]:
            columns = [spread([points[-1][1] for points in found.values()], 3) for found in pair]
            lines.append(f"| {k} | {' | '.join(columns + speedups(*pair))} |")
    return lines


if __name__ == "__main__":
    command_line(__doc__, "results/optimizers", new_lab, work, report)
