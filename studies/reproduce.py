"""
Every figure and table of the three reports, one command each: what the paper says, what is found here, with range and n.

    python -m studies.reproduce --list
    python -m studies.reproduce 000-fig5-6 001-theory     # these; or all: everything that is not there yet
    python -m studies.reproduce all --minutes 30          # a piece of it: stops after 30 minutes; call it again to go on
    python -m studies.reproduce all --report              # only tables and pictures, from what is there, and RESULTS.md's table
    python -m studies.reproduce 000-fig1 --scale gpu      # the commands of the paper's own setting, with memory and time
    python -m studies.reproduce --quick                   # every item in two steps a run, nothing kept: does it all still work?

Runs are made on one thread, two at a time, and kept in results/reproduce/runs.jsonl; stopped (Ctrl-C, a crash), a run goes on
where it was. Every item writes ID.json and ID.png there. A method's learning rate is tuned on valid with seed 1, every method
with the same rule; all that is reported is read on test. Verdicts follow from the figures by a rule (trials.verdict).
"""
import argparse
import json
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import plots
from files import InputError, write_atomically
from runs import one_line
from studies import gpu, paper_000, paper_001, paper_002, real_text
from studies.lab import HERE
from studies.trials import TimeUp, Trials, write_data

RESULTS = "results/reproduce"


class Item(NamedTuple):
    work: Callable    # (lab, seeds) -> Found
    title: str
    seeds: int
    minutes: int      # on 2 cores, where nothing is there yet; 0: it trains nothing, and its seeds are what they are


ITEMS = {
    "000-fig1": Item(paper_000.batches, "SFT at batch 4 and 1,024: spikes", 3, 16),
    "000-table1": Item(paper_000.scores, "reward scores of the original, of SFT and of the data's answers", 5, 12),
    "000-fig2-4": Item(paper_000.lora_ranks, "LoRA: ranks, biases, memory, speed (from results/ranks)", 5, 0),
    "000-fig5-6": Item(paper_000.cdpo, "DPO and CDPO: variance, equal accuracy, out-of-sequence tokens", 5, 18),
    "000-fig7": Item(paper_000.agma, "AGMA and its ablations", 3, 16),
    "001-fig1": Item(paper_001.pma_speedup, "PMA's speedup at one rate and at own rates", 5, 22),
    "001-fig11-12": Item(paper_001.other_periods, "the same in SFT at K = 1 and 4 (figures 11, 12)", 5, 14),
    "001-fig2": Item(paper_001.schedule, "dynamic beta and learning rate, read off the optimizer", 1, 0),
    "001-table1": Item(paper_001.table1, "validation loss by optimizer and K, one pass of SFT", 3, 20),
    "001-fig3-4": Item(paper_001.dpo_curves, "DPO's accuracy, loss and time (figures 3, 4, 13, 14)", 5, 6),
    "001-fig5": Item(paper_001.epochs, "several epochs of DPO, overfitting", 3, 5),
    "001-fig6": Item(paper_001.periods, "sensitivity to K (figures 6, 15, 16)", 3, 60),
    "001-fig7": Item(paper_001.variances, "variance of update and period", 3, 4),
    "001-fig8": Item(paper_001.half, "bfloat16 in the place of 7B", 3, 5),
    "001-fig9": Item(paper_001.pretraining, "pre-training on plain text", 3, 17),
    "001-fig10": Item(paper_001.schedule_ablation, "PMA's learning rates without its averages", 3, 9),
    "001-time": Item(paper_001.overhead, "the time that PMA's updates take (from results/bench)", 3, 0),
    "001-theory": Item(paper_001.theory, "what the theorems assume and say", 1, 0),
    "002-fig1-2": Item(paper_002.long_training, "one dialogue a step for long: loss and scores", 3, 9),
    "002-lr": Item(paper_002.divergence, "10 and 100 times the learning rate", 3, 5),
    "002-fig3-4": Item(paper_002.optimizers, "five optimizers: loss, memory, time (and table 1)", 3, 13),
    "002-fig5-7": Item(paper_002.lora, "LoRA's ranks: loss and scores (and table 2, from results/ranks)", 3, 16),
    "002-fig8-9": Item(paper_002.helpful_only, "the helpful data alone", 3, 4),
    "002-accumulation": Item(paper_002.accumulation, "accumulation of 4 against a batch of 1", 3, 6),
    "002-dpo": Item(paper_002.dpo_fits, "DPO that did not fit", 1, 0),
    "real": Item(real_text.real, "PMA and CDPO on real HH-RLHF text (needs --hh)", 3, 20),
}


def save(lab, name, seeds, found):
    """ID.json and ID.png."""
    folder = lab.file.parent
    folder.mkdir(parents=True, exist_ok=True)
    if found.draw:
        found.draw(folder / f"{name}.png")
    pictures = [*([f"{RESULTS}/{name}.png"] if found.draw else []), *found.pictures]
    command = f"python -m studies.reproduce {name}" + (" --hh FOLDER" if name == "real" else "")
    text = json.dumps({"item": name, "title": ITEMS[name].title, "seeds": seeds, "setting": found.setting, "pictures": pictures,
                       "command": command, "claims": [c._asdict() for c in found.claims],
                       "numbers": found.numbers}, indent=1)
    write_atomically(folder / f"{name}.json", text.encode())


def show(name, found):
    print(f"\n{name}: {ITEMS[name].title}\n{found.setting}\n")
    for claim in found.claims:
        print(f"  the report: {claim.says}\n  here:       {claim.found}\n  verdict:    {claim.verdict}\n")


def table(folder):
    """RESULTS.md's rows, from what is in a folder of results."""
    lines = ["| | the report says | here | verdict | setting, command, picture |", "| --- | --- | --- | --- | --- |"]
    for name in ITEMS:
        path = folder / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text())
            for i, claim in enumerate(found["claims"]):
                pictures = ", ".join(f"[{Path(p).name}]({p})" for p in found["pictures"])
                where = f"{found['setting']}; n = {found['seeds']}. `{found['command']}` {pictures}" if not i else "as above"
                lines.append(f"| {name} | {claim['says']} | {claim['found']} | **{claim['verdict']}** | {where} |")
    return "\n".join(lines) + "\n"


def short(folder):
    """The headlines, for the README."""
    lines = ["| | the report says | here, over seeds: median (of a difference: mean) [range] | verdict |",
             "| --- | --- | --- | --- |"]
    for name in ITEMS:
        path = folder / f"{name}.json"
        claims = json.loads(path.read_text())["claims"] if path.exists() else []
        lines += [f"| {name} | {c['says']} | {c['brief']} | **{c['verdict']}** |" for c in claims if c["brief"]]
    return "\n".join(lines) + "\n"


def write_table(path, lines, marks):
    """Between the marks of a page."""
    begin, end = f"<!-- {marks} -->\n", f"<!-- /{marks} -->"
    before, rest = path.read_text().split(begin)
    write_atomically(path, (before + begin + lines + end + rest.split(end)[1]).encode())


def listing(lab):
    print(f"{'item':<14} {'what':<72} {'seeds':>5} {'minutes':>7}  state")
    for name, item in ITEMS.items():
        state = "done" if (lab.file.parent / f"{name}.json").exists() else ""
        print(f"{name:<14} {item.title:<72} {item.seeds:>5} {item.minutes:>7}  {state}")


def quick():
    """Every item with runs of two steps, in this process; nothing of it is kept."""
    with tempfile.TemporaryDirectory() as folder:
        lab = Trials(folder, quick=True)
        lab.runs = Path(folder) / "runs"
        write_data(few=64)
        plots.draw = lambda folder: None   # of every run at every evaluation, which would take most of the time
        for name, item in ITEMS.items():
            if name == "real":   # needs files that are not here
                continue
            began = time.time()
            try:
                found = item.work(lab, 1)
            except TimeUp:   # it stands on a result that is not there yet
                continue
            save(lab, name, 1, found)
            print(f"{name}: {len(found.claims)} claims, {time.time() - began:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(prog="python -m studies.reproduce", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="*", help="ids of --list, or all")
    parser.add_argument("--list", action="store_true", help="the items, and which are done")
    parser.add_argument("--scale", choices=("cpu", "gpu"), default="cpu", help="gpu: print the paper's own commands")
    parser.add_argument("--run", action="store_true", help="with --scale gpu: run them, too")
    parser.add_argument("--hh", help="for the item real: a folder of HH-RLHF's .jsonl.gz files")
    parser.add_argument("--seeds", type=int, help="of what an item trains; its own number unless given")
    parser.add_argument("--minutes", type=float, default=24 * 60, help="stop after this time; the next call goes on")
    parser.add_argument("--report", action="store_true", help="only from what is there")
    parser.add_argument("--results", default=RESULTS, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="two steps a run, nothing kept")
    options = parser.parse_args()
    names = options.items
    if names == ["all"]:   # real only where its files are given
        names = [name for name in ITEMS if name != "real" or options.hh or options.report]
    for name in names:
        if name not in ITEMS:
            raise InputError(f"no item {name!r}: expected all or {', '.join(ITEMS)}")
    for flag, value in (("minutes", options.minutes), ("seeds", options.seeds)):
        if value is not None and not value > 0:
            raise InputError(f"--{flag}: expected a number above 0, found {value}")
    if options.run and options.scale != "gpu":
        raise InputError("--run goes with --scale gpu; without it, an item is run anyway")
    if options.quick:
        return quick()
    if options.scale == "gpu":
        return gpu.show(names, options.run)
    lab = Trials(options.results, hh=options.hh)
    if options.list or not names:
        return listing(lab)
    if options.report:
        lab.stop.set()
    else:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, lab.interrupt)
        signal.setitimer(signal.ITIMER_REAL, 60 * options.minutes)
        write_data()
    for name in names:
        try:
            seeds = options.seeds if options.seeds and ITEMS[name].minutes else ITEMS[name].seeds
            found = ITEMS[name].work(lab, seeds)
        except TimeUp:
            print(f"{name}: not all runs are there yet", flush=True)
            continue
        save(lab, name, seeds, found)
        show(name, found)
    if options.results == RESULTS and (HERE / "RESULTS.md").exists():
        write_table(HERE / "RESULTS.md", table(lab.file.parent), "claims")
        write_table(HERE / "README.md", short(lab.file.parent), "claims in short")


if __name__ == "__main__":
    one_line(main)
