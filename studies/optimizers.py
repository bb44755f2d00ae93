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
import argparse
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import minihh
import plots
from files import InputError, write_atomically

HERE = Path(__file__).parent.parent
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


def rate(power):
    return float(f"{3e-3 * 1.5 ** power:.3g}")


class Lab:
    """Starts runs until it is told to stop, and keeps what they found, {name: {"command", "flags", "events", ...}}, a line each
    of runs.jsonl in the results' folder."""

    def __init__(self, results):
        self.file = HERE / results / "runs.jsonl"
        self.stop, self.children, self.lock, self.found = threading.Event(), set(), threading.Lock(), {}
        lines = self.file.read_text().splitlines(True) if self.file.exists() else []
        for line in lines:
            if line.endswith("\n"):   # else a crash cut it off, and the run is made again
                run = json.loads(line)
                self.found[run.pop("name")] = run

    def run(self, name, script, *flags):
        """What the run `name` found: made now if it is not there. None where we are to stop before it is."""
        command = [script, *map(str, flags)]
        if name in self.found:
            if self.found[name]["command"] != command:
                raise InputError(f"{self.file} holds {name} made by {self.found[name]['command']}, which is not {command}: "
                                 "give another --results")
            return self.found[name]
        folder = HERE / RUNS / name
        how = "--resume" if (folder / "last.pt").exists() else "--overwrite"
        with self.lock:
            if self.stop.is_set():
                return None
            child = subprocess.Popen([sys.executable, *command, "--out", f"{RUNS}/{name}", how], cwd=HERE, text=True,
                                     stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
                                     env={**os.environ, "OMP_NUM_THREADS": "1"})
            self.children.add(child)
        if self.stop.is_set():   # since we looked
            child.send_signal(signal.SIGTERM)
        message = child.communicate()[1].strip()
        with self.lock:
            self.children.discard(child)
        if child.returncode == 0 or child.returncode == 2 and "the loss is" in message:
            self.keep(name, {"command": command, **summary(folder), **({"diverged": message} if child.returncode else {})})
            (folder / "last.pt").unlink()
        elif child.returncode == 2 and "cannot be resumed" in message:   # left by a study with other flags
            (folder / "last.pt").unlink()
            return self.run(name, script, *flags)
        elif not self.stop.is_set():
            raise InputError(f"{' '.join(command)}: {message}")
        return self.found.get(name)

    def keep(self, name, run):
        with self.lock:
            self.found[name] = run
            self.file.parent.mkdir(parents=True, exist_ok=True)
            text = self.file.read_text() if self.file.exists() else ""
            if text and not text.endswith("\n"):
                write_atomically(self.file, text[:text.rfind("\n") + 1].encode())
            with open(self.file, "a") as f:
                f.write(json.dumps({"name": name, **run}, separators=(",", ":")) + "\n")
        what = run.get("diverged") or f"{run['events'][-1]['seconds']:.0f} s of training"
        print(f"{time.strftime('%H:%M:%S')} {name}: {what}", flush=True)

    def interrupt(self, *_):
        """Stop: every run writes a checkpoint, from which the next call of the study goes on."""
        self.stop.set()
        for child in list(self.children):
            child.send_signal(signal.SIGTERM)

    def map(self, function, jobs):
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda job: function(*job), jobs))


KEPT = ("step", "micro_step", "samples", "updates", "flops", "seconds", "val_loss", "val_dpo_loss", "val_logp_accuracy",
        "val_reward_accuracy", "probe_loss", "displacement_rms", *(f"{what}_variance{form}" for form in ("", "_relative")
                                                                   for what in ("grad", "update", "displacement")))


def summary(folder):
    """Of a run's folder: what tells it apart, its evaluations and its probes, to 5 digits."""
    def short(value):
        if isinstance(value, list):
            return [short(x) for x in value]
        return float(f"{value:.5g}") if isinstance(value, float) else value
    config, events = plots.read(folder)
    return {"flags": {key: config["flags"][key] for key in ("optimizer", "lr", "seed", "accumulate", "steps")},
            "commit": config["commit"],
            "events": [{key: short(e[key]) for key in KEPT if key in e} for e in events
                       if "val_logp_accuracy" in e or "probe_loss" in e]}


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


def search(lab, task, method):
    """{rate: last loss on valid} of the rule above, or None where the time was up."""
    tried = {}

    def at(power):
        if power not in tried:
            name = f"grid/{method}-{rate(power):g}"
            run = training(lab, task, name, "valid", method, rate(power), 1, STEPS // 2)
            if run is None:
                raise TimeoutError
            tried[power] = last_loss(task, run)
        return tried[power]

    middle = TASKS[task].middle[METHODS[method]]
    try:
        for power in (middle - 2, middle, middle + 2):
            at(power)
        for stride in (2, 2, 1, 1):
            best = min(tried, key=tried.get)
            if stride == 1:
                at(best - 1)
                at(best + 1)
            elif best in (min(tried), max(tried)):
                at(best - stride if best == min(tried) else best + stride)
    except TimeoutError:
        return None
    return {rate(power): tried[power] for power in sorted(tried)}


def chosen(grids):
    """method -> its rate, and the matched ones: name -> (optimizer, rate)."""
    best = {method: min(grid, key=grid.get) for method, grid in grids.items()}
    runs = {method: (method, lr) for method, lr in best.items()}
    return runs | {f"{base}-matched": (base, float(f"{factor * best[method]:.3g}")) for method, (base, factor) in MATCHED.items()}


def start(lab, seed):
    """What DPO starts from. Made again where its weights are gone: they must then be the same ones."""
    name, before = f"start-s{seed}", lab.found.get(f"start-s{seed}")
    if before and not (HERE / RUNS / name / "best.pt").exists():
        del lab.found[name]
    run = lab.run(name, "train_sft.py", "--seed", seed, "--eval-answers", 0, "--data", f"{RUNS}/train.jsonl,{RUNS}/valid.jsonl")
    if run and before and [e["val_loss"] for e in run["events"]] != [e["val_loss"] for e in before["events"]]:
        raise InputError(f"{name} is not what it was when {lab.file} was begun: give another --results")
    return run


def work(lab):
    """Whatever of the study is not there yet."""
    (HERE / RUNS).mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid", "test"):
        pairs = [{"chosen": e.prompt + e.chosen, "rejected": e.prompt + e.rejected} for e in minihh.examples(split)]
        (HERE / RUNS / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    starts = lab.map(start, [(lab, seed) for seed in range(1, SEEDS + 1)])
    if None in starts:
        return
    found = lab.map(search, [(lab, task, method) for task in TASKS for method in METHODS])
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
    lab.stop.set()   # search() starts nothing now
    text = [f"{len(lab.found)} runs are done.", ""]
    for task in TASKS:
        grids = {method: search(lab, task, method) for method in METHODS}
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
    """{seed: (config, events)} of the runs at hand, as plots.compare takes them."""
    found = {seed: lab.found.get(f"{name}-s{seed}") for seed in range(1, SEEDS + 1)}
    return {seed: (run, run["events"]) for seed, run in found.items() if run}


def rates(task, grids):
    """The learning rates that were tried."""
    lines = [f"{TASKS[task].loss} at the end, on valid, half length, seed 1; the chosen rate in bold.", "", "| | rate: loss |",
             "| --- | --- |"]
    for method, grid in grids.items():
        best = min(grid, key=grid.get)
        tried = [f"{lr:g}: {loss:.4f}" if loss < math.inf else f"{lr:g}: diverges" for lr, loss in sorted(grid.items())]
        tried = [f"**{text}**" if lr == best else text for lr, text in zip(sorted(grid), tried)]
        edge = " (at the edge of what was tried)" if best in (min(grid), max(grid)) else ""
        lines.append(f"| {method} | {', '.join(tried)}{edge} |")
    return lines


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
                curves = [plots.curve(events, "samples", TASKS[task].loss) for events in (one, two)]
                ratio = plots.speedup(*curves)[0]   # None where one never gets below its start
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
    table = plots.compare(groups, "adamw", folder, title=f"{task.upper()} on minihh, test split, K = {K}: ",
                          noisy=("adamw", "adamw-pma", "adamw-noaccum", "agma"))
    base = {seed: events for seed, (_, events) in groups["adamw"].items()}
    lines = [f"{STEPS} steps of {K} micro-batches, each method at its own rate, test split; median and [range] over seeds.", "",
             plots.as_text(table), "",
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
        lines.append(f"| {name} | {runs[name][1]:g} | {plots.spread(moved)} | {plots.spread(noise)} | "
                     f"{plots.spread(accuracy, 3)} | {row['diverged']} |")
    (folder / "compare.json").write_text(json.dumps(table, indent=1))
    lines += ["", "The same speedups over other baselines.", "",
              "| | over | to the lowest loss that both reach | to 90 % of the way there |", "| --- | --- | --- | --- |"]
    for name, base in (("adamw-pma", "adamw-matched"), ("lion-pma", "lion"), ("lion-pma", "lion-matched")):
        if name in groups and base in groups:
            curves = [{seed: plots.curve(events, "samples", TASKS[task].loss) for seed, (_, events) in groups[which].items()}
                      for which in (base, name)]
            lines.append(f"| {name} | {base} | {' | '.join(speedups(*curves))} |")
    return lines


def speedups(baseline, candidate):
    """Of {seed: curve} and {seed: curve}: to the lowest loss that both reach and to 90 % of the way there, over common seeds."""
    both = [(baseline[seed], candidate[seed]) for seed in baseline if seed in candidate]
    return [plots.spread([plots.speedup(*two, share)[0] for two in both]) for share in (1, 0.9)]


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
            pair.append({seed: plots.curve([e for e in events if e["micro_step"] <= half], "samples", TASKS[task].loss)
                         for seed, (_, events) in found.items() if seed <= 3})
        if pair[0] and pair[1]:
            columns = [plots.spread([points[-1][1] for points in found.values()], 3) for found in pair]
            lines.append(f"| {k} | {' | '.join(columns + speedups(*pair))} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=24 * 60, help="stop after this time; the next call goes on")
    parser.add_argument("--report", action="store_true", help="only write the tables and pictures")
    parser.add_argument("--results", default="results/optimizers", help="folder of the results")
    options = parser.parse_args()
    if not options.minutes > 0:
        raise InputError(f"--minutes: expected a number above 0, found {options.minutes}")
    lab = Lab(options.results)
    if not options.report:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, lab.interrupt)
        signal.setitimer(signal.ITIMER_REAL, 60 * options.minutes)
        work(lab)
    report(lab)


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
