"""
Does LoRA's rank matter, does training biases help, and what does it cost? The study of 000_... section 5.2 and 002_... section
2.2, without what confounded it: only adapters (and the biases of the mode) train, alpha = 2 rank, every configuration at a rate
of its own.

    python -m studies.ranks                 # everything: about 85 minutes on 2 cores
    python -m studies.ranks --minutes 30    # a piece of it: stops after 30 minutes; call it again to go on
    python -m studies.ranks --report        # tables and pictures of what is there
    python -m studies.bench lora --out results/ranks/cost-gpt2.json     # memory and speed, drawn by --report

minihh's training set in two halves that share no dialogue. Every run begins with a mini model after six epochs of SFT on one half
and goes on with the other (the papers: an SFT model on the SFT data). SFT: 250 steps of 16 dialogues; full fine-tuning; ranks 1,
2, 8, 16 in three bias modes; rank 128, the model's width, where the blocks' matrices can go anywhere. DPO: 120 steps of 16 pairs;
full, four ranks, and rank 8 in three bias modes.

Rates by the rule of studies/lab.py, on valid, seed 1: the lowest loss of a run's evaluations decides. Then five seeds, each from
a start of its own; the checkpoint with the lowest loss on valid is judged once on *test*: its loss, its accuracy on pairs, the
share of prompts that it answers rightly (greedy, by the checker of the skill).
"""
import contextlib
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
import eval_reward
import lora
import minihh
import model as gpt
import reference
import optim
import plots
import train_dpo
import train_sft
from studies.compare import mean_range, spread
from studies.lab import Lab, command_line, rate, rates_table, search

RUNS = Path("runs/ranks")   # under the repository
SEEDS = 5
RANKS = (1, 2, 8, 16)
COLORS = {0: "#222222", 1: "#86c440", 2: "#2a8f5b", 8: "#1f5fa8", 16: "#6a3d9a", 128: "#8c8c8c",
          "none": "#1f5fa8", "lora_only": "#e8890c", "all": "#c8553d"}


class Task(NamedTuple):
    script: str
    flags: list
    configurations: list   # (rank, bias mode)
    loss: str              # the one that counts
    accuracy: str
    full: int              # its first rate, as a power of 1.5 on studies/lab.py's lattice
    adapters: int          # theirs


FULL = (0, "all")
TASKS = {
    "sft": Task("train_sft.py", ["--steps", 250, "--warmup", 20, "--eval-every", 50],
                [FULL, *((rank, bias) for bias in lora.BIASES for rank in RANKS), (128, "none")], "val_loss", "val_logp_accuracy",
                -3, 1),
    "dpo": Task("train_dpo.py", ["--steps", 120, "--warmup", 10, "--eval-every", 30],
                [FULL, *((rank, "none") for rank in RANKS), (8, "lora_only"), (8, "all")], "val_dpo_loss", "val_reward_accuracy",
                -8, -2)}


def new_lab(results):
    return Lab(results, RUNS, ("step", "samples", "seconds", "train_eval_loss", "val_loss", "val_dpo_loss", "val_logp_accuracy",
                               "val_reward_accuracy"), ("lr", "seed", "lora_rank", "lora_bias"))


def label(rank, bias):
    return f"r{rank}-{bias}" if rank else "full"


def start(lab, seed):
    """What every run with this seed begins with, and DPO's reference."""
    return lab.weights(f"start-s{seed}", "train_sft.py", "--half", "sft", "--epochs", 6, "--seed", seed, "--eval-samples", 400,
                       "--eval-answers", 0)


def training(lab, task, rank, bias, lr, seed):
    adapters = ["--lora-rank", rank, "--lora-bias", bias] if rank else []
    return lab.run(f"{task}/{label(rank, bias)}-{lr:g}-s{seed}", TASKS[task].script,
                   "--init", f"{RUNS}/start-s{seed}", "--half", "preference", "--micro-batch", 16,
                   *TASKS[task].flags, "--lr", lr, "--seed", seed, "--eval-samples", 400, "--eval-answers", 0,
                   "--log-every", 1000, *adapters)


def lowest(task, run):
    return math.inf if "diverged" in run else min(e[TASKS[task].loss] for e in run["events"])


def grid(lab, task, rank, bias):
    """{rate: lowest loss on valid}, or None where the time was up."""
    def loss_at(power):
        run = training(lab, task, rank, bias, rate(power), 1)
        return run and lowest(task, run)
    found = search(loss_at, TASKS[task].adapters if rank else TASKS[task].full)
    return found and {rate(power): loss for power, loss in found.items()}


def judged(lab, task, what, run, seed):
    """What best.pt of a run does on the test split, kept under test/task/what; made once."""
    if f"test/{task}/{what}" not in lab.found and not lab.stop.is_set():
        lab.keep(f"test/{task}/{what}", judge(task, lab.folder(run), lab.folder(f"start-s{seed}")))


def judge(task, folder, start):
    """{"loss", "accuracy" (of log-probs, or of rewards in DPO), "right" (share of greedy answers)} on all of the test split."""
    torch.set_num_threads(1)   # two judges at a time
    examples, model = minihh.examples("test"), gpt.load(str(folder)).eval()
    pairs = [data.Pair(e.prompt, e.chosen, e.rejected) for e in examples]
    tokens, _ = data.tokenize(pairs, model.config.vocab_size, model.config.block_size)
    if task == "sft":
        cfg = train_sft.Config(eval_answers=0)
        found, _ = train_sft.evaluate(cfg, model, contextlib.nullcontext, tokens[:1], tokens)
    else:
        cfg, live = train_dpo.Config(eval_answers=0), reference.live(gpt.load(str(start)).eval())
        found, _ = train_dpo.evaluate(cfg, model, live, contextlib.nullcontext, tokens)
    answers = eval_reward.answer(eval_reward.Config(), model, [tokens[i][0] for i in range(len(tokens))], 0.0)
    right = [minihh.check(e, eval_reward.as_text(model, a)) for e, a in zip(examples, answers)]
    return {"loss": found[TASKS[task].loss], "accuracy": found[TASKS[task].accuracy], "right": float(np.mean(right))}


def final(lab, task, rank, bias, lr, seed):
    """One of the five runs of a configuration at its rate, and what the test says of it."""
    what = f"{label(rank, bias)}-{lr:g}-s{seed}"
    if f"test/{task}/{what}" not in lab.found and not (lab.folder(f"{task}/{what}") / "best.pt").exists():
        lab.found.pop(f"{task}/{what}", None)   # its weights are needed: once more
    if training(lab, task, rank, bias, lr, seed):
        judged(lab, task, what, f"{task}/{what}", seed)


def work(lab):
    """Whatever of the study is not there yet."""
    seeds = range(1, SEEDS + 1)
    if None in lab.map(start, [(lab, seed) for seed in seeds]):
        return
    lab.map(judged, [(lab, task, f"start-s{seed}", f"start-s{seed}", seed) for task in TASKS for seed in seeds])
    for task in TASKS:
        configurations = TASKS[task].configurations
        grids = lab.map(grid, [(lab, task, *configuration) for configuration in configurations])
        if None in grids:
            return
        rates = [min(found, key=found.get) for found in grids]
        lab.map(final, [(lab, task, *configuration, lr, seed) for seed in seeds
                        for configuration, lr in zip(configurations, rates)])

# ----------------------------------------------------------------------------------------------------------------------
# the report

def report(lab):
    lab.stop.set()   # grid() starts nothing now
    folder = lab.file.parent
    folder.mkdir(parents=True, exist_ok=True)
    text = [f"{len(lab.found)} runs and judgements are done.", "", *shares(), ""]
    for task in TASKS:
        grids = {label(*c): grid(lab, task, *c) for c in TASKS[task].configurations}
        missing = [name for name, found in grids.items() if found is None]
        if missing:
            text += [f"{task.upper()}: the learning rates of {', '.join(missing)} are not found yet.", ""]
            continue
        rates = {name: min(found, key=found.get) for name, found in grids.items()}
        text += [f"## {task.upper()}", "", f"Lowest {TASKS[task].loss} on valid by rate, seed 1; the chosen in bold.", "",
                 *rates_table(grids), "", *results(lab, task, rates), ""]
        curves(lab, task, rates, folder / f"{task}.png")
    answers(lab, folder / "answers.png")
    costs = [json.loads(path.read_text()) for path in sorted(folder.glob("cost-*.json"))]
    costs = [found for found in costs if found["what"] == "lora"]
    if costs:
        cost(costs, folder / "cost.png")
    (folder / "tables.md").write_text("\n".join(text))
    print("\n".join(text))


def sizes(name, rank, bias):
    """optim.footprint of a model with adapters, without its weights."""
    with torch.device("meta"):
        model = gpt.GPT(gpt.SIZES[name])
    if rank:
        lora.add_lora(model, rank, bias=bias, base_sha256="no weights")
    return optim.footprint("adamw", model)


def shares():
    """The per cent of parameters that train, counted."""
    columns = " | ".join(f"{name}: trainable | per cent | AdamW's state, MB" for name in ("mini", "gpt2", "gpt2-medium"))
    lines = ["Parameters that train, of all, counted on models without weights.", "", f"| | {columns} |",
             "| --- |" + " --- |" * 9]
    for rank, bias in TASKS["sft"].configurations:
        found = [sizes(name, rank, bias) for name in ("mini", "gpt2", "gpt2-medium")]
        lines.append(f"| {label(rank, bias)} | " + " | ".join(
            f"{s['trainable']:,} | {100 * s['trainable'] / s['parameters']:.3f} | {s['optimizer_bytes'] / 1e6:,.2f}"
            for s in found) + " |")
    return lines


def tests(lab, task, name):
    """{seed: judgement} of what is there."""
    found = {seed: lab.found.get(f"test/{task}/{name}-s{seed}") for seed in range(1, SEEDS + 1)}
    return {seed: run for seed, run in found.items() if run}


def difference(mine, theirs, key):
    """Mean and range of the paired differences over common seeds."""
    paired = [mine[seed][key] - theirs[seed][key] for seed in mine if seed in theirs]
    return mean_range(paired, 4) if paired else ""


def results(lab, task, rates):
    """A row a configuration; medians and ranges over seeds, differences paired by seed."""
    found = {"start": tests(lab, task, "start"), **{name: tests(lab, task, f"{name}-{lr:g}") for name, lr in rates.items()}}
    what = "accuracy of log-probs" if task == "sft" else "reward accuracy"
    lines = [f"On test, {max(map(len, found.values()))} seeds: median [range]. Differences of the loss are means [range], paired "
             "by seed: from full fine-tuning, and from the same rank with bias none. Of full's gain: how far of the way from the "
             "start's loss to full's.", "",
             f"| | rate | n | test loss | {what} | right answers, greedy | of full's gain | against full | against bias none |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name, by_seed in found.items():
        if by_seed:
            columns = [spread([run[key] for run in by_seed.values()], 3) for key in ("loss", "accuracy", "right")]
            plain = found.get(f"{name.split('-')[0]}-none", {})
            against = ["", "", ""]
            if name not in ("start", "full"):
                ends = {seed: (found["start"][seed]["loss"], found["full"][seed]["loss"]) for seed in by_seed
                        if seed in found["start"] and seed in found["full"]}
                against = [spread([(a - by_seed[seed]["loss"]) / (a - b) for seed, (a, b) in ends.items()]),
                           difference(by_seed, found["full"], "loss"),
                           difference(by_seed, plain, "loss") if "-none" not in name else ""]
            lines.append(f"| {name} | {rates.get(name, '')} | {len(by_seed)} | {' | '.join(columns + against)} |")
    return lines


def curve(lab, task, name, lr, key):
    """(steps, mean, lowest, highest over seeds) of an evaluation's number."""
    runs = [lab.found.get(f"{task}/{name}-{lr:g}-s{seed}") for seed in range(1, SEEDS + 1)]
    points = [[(e["step"], e[key]) for e in run["events"] if key in e] for run in runs if run and "diverged" not in run]
    steps = [step for step, _ in points[0]]
    values = [[p[i][1] for p in points] for i in range(len(steps))]
    return steps, list(map(statistics.fmean, values)), list(map(min, values)), list(map(max, values)), len(points)


def curves(lab, task, rates, path):
    """Figures 2 and 3 of 000_..., 5 and 6 of 002_...: training and held-out loss against steps, by rank and by bias mode."""
    rows = [("bias none", [("full", 0), *((f"r{rank}-none", rank) for rank in RANKS)]),
            ("all biases", [("full", 0), *((f"r{rank}-all", rank) for rank in RANKS)]),
            ("rank 8", [("full", 0), *((f"r8-{bias}", bias) for bias in lora.BIASES)])]
    rows = [(title, lines) for title, lines in rows if all(name in rates for name, _ in lines)]
    keys = {"sft": {"train_eval_loss": "training loss (200 examples)", "val_loss": "held-out loss (400 examples)"},
            "dpo": {"val_dpo_loss": "held-out DPO loss (400 pairs)", "val_reward_accuracy": "held-out reward accuracy"}}[task]
    figure, axes = plots.canvas(2, len(rows), height=3.2 * len(rows))
    for row, (title, lines) in enumerate(rows):
        for axis, (key, text) in zip(axes[2 * row:], keys.items()):
            for name, color in lines:
                steps, mean, low, high, n = curve(lab, task, name, rates[name], key)
                axis.fill_between(steps, low, high, color=COLORS[color], alpha=0.12, linewidth=0)
                axis.plot(steps, mean, color=COLORS[color], linewidth=1.2, label=name)
            axis.set_title(f"{title}: {text}", fontsize=9)
            plots.finish(axis, "steps" if row == len(rows) - 1 else "", "")
    figure.suptitle(f"{task.upper()} on minihh, each at its own rate: mean and range over {n} seeds (y axes do not start at 0)",
                    fontsize=10)
    figure.savefig(path, dpi=110)


def answers(lab, path):
    """In the place of 002_...'s figure 7, whose reward model comes later: the share of right answers by the checkers."""
    figure, axes = plots.canvas(2)
    for axis, task in zip(axes, TASKS):
        ends = {}
        for key, run in lab.found.items():
            if key.startswith(f"test/{task}/"):
                ends.setdefault("start" if "/start" in key else key.split("/")[2].rsplit("-", 2)[0], []).append(run["right"])
        names = [("start", "none"), *((label(*c), c[0]) for c in TASKS[task].configurations)]
        names = [(name, color) for name, color in names if name in ends]
        for i, (name, color) in enumerate(names):
            axis.plot([i] * len(ends[name]), ends[name], ".", color=COLORS[color], alpha=0.5)
            axis.plot(i, statistics.median(ends[name]), "_", color=COLORS[color], markersize=14)
        axis.set_xticks(range(len(names)), [name for name, _ in names], rotation=90, fontsize=7)
        plots.finish(axis, "", "share of right answers, greedy, test" if task == "sft" else "")
        axis.set_title(f"{task.upper()}: every seed, and the median", fontsize=9)
    figure.savefig(path, dpi=110)


def cost(costs, path):
    """Figure 4 of 000_...: memory, per cent that trains, speed, by rank, as studies.bench measured them, a file each."""
    figure, axes = plots.canvas(3)
    width = 0.76 / len(costs)
    for i, found in enumerate(costs):
        full, sides = found["found"]["full"], {name: side for name, side in found["found"].items() if "bias" not in name or
                                               name.endswith("none")}
        places = [place + width * i for place in range(len(sides))]
        speeds = [[sum(a["seconds"]) / sum(b["seconds"]) for a, b in zip(full, side)] for side in sides.values()]
        heights = ([statistics.median(one["peak_bytes"] for one in side) / 1e9 for side in sides.values()],
                   [100 * side[0]["trainable"] / side[0]["parameters"] for side in sides.values()],
                   [statistics.median(ratios) for ratios in speeds])
        for axis, values in zip(axes, heights):
            axis.bar(places, values, width=0.95 * width, zorder=2, label=f"{found['model']}, {found['machine']}")
            axis.set_xticks([place + width * (len(costs) - 1) / 2 for place in range(len(sides))],
                            [name.removesuffix(", bias none") for name in sides], fontsize=8)
        axes[2].vlines(places, *zip(*((min(ratios), max(ratios)) for ratios in speeds)), color="#222222", linewidth=1, zorder=3)
    texts = ("peak memory, GB", "per cent that trains (log axis)", "steps a second, full = 1: median, range of rounds")
    for axis, text in zip(axes, texts):
        plots.finish(axis, "", text, legend=axis is axes[0])
    axes[1].set_yscale("log")
    figure.suptitle("One SFT step by rank, bias none (python -m studies.bench lora)", fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    command_line(__doc__, "results/ranks", new_lab, work, report)
