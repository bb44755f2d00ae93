"""
The figures and tables of 002_..., the course project "A case study from GPT-2", at our scale; see studies/reproduce.py.
"""
import json
import math
import statistics

import torch

import model as gpt
import optim
import plots
from studies import paper_000
from studies.compare import mean_range, spread
from studies.lab import HERE
from studies.trials import (FAIR, Claim, Comparison, Found, both, color, curves, differences, holds, lasts, speedups, text_start,
                            three)

# ----------------------------------------------------------------------------------------------------------------------
# figures 1, 2, 8 and 9: one dialogue a step, for long; on all data and on the helpful part

STEPS, KEPT = 8000, 1000
LONG = ["--loss-on", "all", "--micro-batch", 1, "--log-every", 100, "--warmup", 50, *FAIR]
ONE = Comparison("002-fig1", "train_sft.py", [*LONG, "--steps", STEPS, "--eval-every", 400, "--keep-every", KEPT],
                 {"all data": (-6, [])}, text_start, tuning=["--steps", STEPS // 4, "--eval-every", STEPS // 4])


# a quarter of the dialogues, none of them a refusal, twice; held-out loss on such dialogues, too
HELPFUL = ONE._replace(name="002-fig8", data={"train": "helpful", "prefix": "helpful-"}, methods={
    "helpful only": (-6, ["--steps", STEPS // 2, "--eval-every", 200, "--keep-every", KEPT // 2])})


def long_runs(lab, n, which):
    """The rate, and {label: {seed: (run, {step: its judgement})}} of long runs with kept checkpoints."""
    lr = ONE.tuned(lab, "all data")

    jobs = [(lab, *((ONE, label, lr, seed, STEPS) if label == "all data" else (HELPFUL, label, lr, seed, STEPS // 2)))
            for seed in range(1, n + 1) for label in which]
    return lr, by_label(jobs, lab.map(followed, jobs))


def followed(lab, comparison, label, lr, seed, steps, kept=8):
    """A run whose checkpoints, so many of them, were kept, and {step: its judgement}."""
    command = comparison.command(lab, label, lr, seed)
    run, folder = lab.made(*command), lab.trained(*command)
    every = 1 if lab.quick else steps // kept
    models = {"0": f"{text_start(lab, seed)}/best.pt",
              **{str(s): f"{folder}/step-{s}.pt" for s in range(every, (2 if lab.quick else steps) + 1, every)}}
    _, judge = paper_000.judge_of(lab, seed)
    return run, lab.judged(f"{comparison.name}/judged/{label.replace(' ', '-')}-s{seed}", models, judge)["models"]


def by_label(jobs, found):
    """{label: {seed: what followed() found}}"""
    groups = {}
    for (_, _, label, _, seed, *_), two in zip(jobs, found):
        groups.setdefault(label, {})[seed] = two
    return groups


def draw_long(groups, path):
    figure, axes = plots.canvas(3)
    for label, style in zip(groups, ("-", "--")):
        for key, drawn, what in (("train_eval_loss", plots.CHOSEN, "training, 200"),
                                 ("val_loss", plots.HELD_OUT, "held out")):
            runs = [run for run, _ in groups[label].values()]
            points = [[(e["step"], e[key]) for e in run["events"] if key in e] for run in runs]
            steps = [step for step, _ in points[0]]
            axes[0].plot(steps, [statistics.fmean(p[i][1] for p in points) for i in range(len(steps))], style, color=drawn,
                         label=f"{label}: {what}")
        for axis, key, title in ((axes[1], "reward, sampled", "mean reward, sampled answers"),
                                 (axes[2], "right, sampled", "share of right answers, sampled")):
            for judged in (judged for _, judged in groups[label].values()):
                axis.plot([int(step) for step in judged], [row[key] for row in judged.values()], style, marker=".",
                          color=plots.HELD_OUT if style == "-" else "#e8890c", alpha=0.7,
                          label=label if judged is groups[label][1][1] else None)
            axis.set_title(title, fontsize=9)
            plots.finish(axis, "steps of one dialogue", "", loc="lower right")
    axes[0].set_title("loss, nats a token of all tokens, mean over seeds", fontsize=9)
    plots.finish(axes[0], "steps of one dialogue", "")
    figure.savefig(path, dpi=110)


def last_quarter(run):
    """How much higher the last quarter's mean held-out loss is than the third quarter's, and the mean training loss."""
    held_out, train = ([e[key] for e in run["events"] if key in e] for key in ("val_loss", "train_eval_loss"))
    middle, late = len(held_out) // 2, len(held_out) * 3 // 4
    return tuple(statistics.fmean(x[late:]) - statistics.fmean(x[middle:late]) for x in (held_out, train))


def second_half(judged):
    """How much higher the mean reward of the last two checkpoints is than that of the two in the middle of the run."""
    found = [row["reward, sampled"] for step, row in judged.items() if step != "0"]
    middle = len(found) // 2
    return statistics.fmean(found[-2:]) - statistics.fmean(found[middle - 1:middle + 1])


OVERFITS = 0.005   # nats that the held-out loss rises at least, while the training loss falls
ONE_ERROR = 0.03   # about the standard error of a mean reward over 520 sampled answers


def long_training(lab, n):
    """Overfitting, and scores over steps."""
    lr, groups = long_runs(lab, n, ("all data",))
    found = groups["all data"]
    quarter = [last_quarter(run) for run, _ in found.values()]
    held_out, train = zip(*quarter)
    first = {seed: judged["0"]["reward, sampled"] for seed, (_, judged) in found.items()}
    last = {seed: list(judged.values())[-1]["reward, sampled"] for seed, (_, judged) in found.items()}
    best = {seed: max(row["reward, sampled"] for row in judged.values()) for seed, (_, judged) in found.items()}
    change = [second_half(judged) for _, judged in found.values()]
    return Found(
        f"SFT on all tokens, one dialogue a step, {STEPS:,} steps (one epoch of minihh), AdamW at {lr:g}, constant, from a model "
        "trained on plain text; reward model as in 000-table1",
        [Claim("the loss converges and begins to overfit after three quarters of the run",
               f"from the third quarter's mean to the last one's the held-out loss goes {mean_range(held_out)}, that of 200 "
               f"training dialogues {mean_range(train)}", holds([b > OVERFITS and a < 0 for b, a in quarter]),
               f"held-out loss, last quarter less third: {mean_range(held_out)}"),
         Claim("the reward score fluctuates and falls in the second half",
               f"it rises from {three(list(first.values()))} to {three(list(best.values()))} at its best; the last two of eight "
               f"checkpoints score {mean_range(change)} beside the two in the middle (a fall: more than {ONE_ERROR}, one "
               "standard error)", holds([x < -ONE_ERROR for x in change])),
         Claim("the tuned model answers better than the original",
               f"reward, sampled: {mean_range([last[s] - first[s] for s in found])}",
               holds([last[s] > first[s] for s in found]))],
        lambda path: draw_long(groups, path), numbers={"rate": lr, "last_quarter": quarter, "second_half": change})


def helpful_only(lab, n):
    """A quarter of the data, helpful only."""
    lr, groups = long_runs(lab, n, ("all data", "helpful only"))
    quarter = {label: [last_quarter(run) for run, _ in found.values()] for label, found in groups.items()}
    held_out = {label: [b for b, _ in pairs] for label, pairs in quarter.items()}
    train = [a for _, a in quarter["helpful only"]]
    last = {label: [list(judged.values())[-1]["reward, sampled"] for _, judged in found.values()]
            for label, found in groups.items()}
    right = {label: [list(judged.values())[-1]["right, sampled"] for _, judged in found.values()]
             for label, found in groups.items()}
    less = [b - a for a, b in zip(last["all data"], last["helpful only"])]
    return Found(
        "as 002-fig1-2, on a quarter of minihh's dialogues, without refusals (held-out loss on such dialogues, too), "
        f"{STEPS // 2:,} steps (two epochs), AdamW at {lr:g}; both are judged on all test prompts, a tenth of which ask for harm",
        [Claim("on the helpful data alone the model quickly overfits",
               "from the third quarter's mean to the last one's the held-out loss goes "
               f"{mean_range(held_out['helpful only'])}, the training loss {mean_range(train)} (held-out on all data: "
               f"{mean_range(held_out['all data'])})",
               holds([b > OVERFITS and a < 0 and b > c for (b, a), c in zip(quarter["helpful only"], held_out["all data"])])),
         Claim("its answers are not much worse than those of the model tuned on all data",
               f"reward, sampled, {mean_range(less)}; "
               f"right answers {three(right['helpful only'])} against {three(right['all data'])}",
               holds([x > -0.05 for x in less]))],
        lambda path: draw_long(groups, path), numbers={"rate": lr, "last_quarter": quarter, "last": last,
                                                                  "right": right})

# ----------------------------------------------------------------------------------------------------------------------
# learning rates that diverge

def divergence(lab, n):
    """10 and 100 times the rate."""
    lr = ONE.tuned(lab, "all data")
    which = ONE._replace(name="002-lr", methods={f"{times} times": (0, []) for times in (1, 10, 100)},
                         flags=[*LONG, "--steps", 1000, "--eval-every", 50])
    runs = which.at(lab, {f"{times} times": float(f"{times * lr:.3g}") for times in (1, 10, 100)}, n)
    change = {name: [math.inf if "diverged" in run else run["events"][-1]["val_loss"] - run["events"][0]["val_loss"]
                     for run in found.values()] for name, found in runs.items()}

    def draw(path):
        figure, (axis,) = plots.canvas()
        curves(axis, runs, "step", "val_loss")
        axis.set_yscale("log")
        axis.set_title(f"AdamW at {lr:g} and 10 and 100 times that", fontsize=10)
        plots.finish(axis, "steps of one dialogue", "held-out loss (log axis)")
        figure.savefig(path, dpi=110)
    return Found(
        f"as 002-fig1, 1,000 steps; 1 is the rate tuned there, {lr:g} (the project's 1e-4)",
        [Claim("10 and 100 times the rate do not converge", "held-out loss, last less first: " + ", ".join(
            f"{name} {three(values)}" for name, values in change.items()),
            both(*(holds([x > 0 for x in change[f"{times} times"]]) for times in (10, 100))))], draw,
        numbers={"rate": lr, "change": {name: [x if x < math.inf else None for x in values] for name, values in change.items()}})

# ----------------------------------------------------------------------------------------------------------------------
# figures 3 and 4, table 1: optimizers; accumulation

NAMES = {"adamw": -5, "adam": -5, "nesterov": 5, "momentum": 5, "sgd": 11}
SHORT = [*LONG, "--steps", 400, "--eval-every", 80]
TORCH = {"adamw": ["--betas", "0.9,0.999", "--weight-decay", 0.01], "adam": ["--betas", "0.9,0.999"]}   # torch's defaults
FIVE = Comparison("002-fig3-4", "train_sft.py", [*SHORT, "--accumulate", 4],
                  {name: (power, ["--optimizer", name, *TORCH.get(name, [])]) for name, power in NAMES.items()}, text_start,
                  tuning=["--eval-every", 400])


def optimizers(lab, n):
    """Five optimizers at one rate, and at their own; memory and time."""
    rates, own = FIVE.own(lab, n)
    shared = FIVE.at(lab, dict.fromkeys(NAMES, rates["adamw"]), n)
    ends, ends_own = ({name: lasts(runs, "val_loss") for name, runs in groups.items()} for groups in (shared, own))
    same = [abs(x) for x in differences(shared["adam"], shared["adamw"], "val_loss")]
    with torch.device("meta"):
        medium = gpt.GPT(gpt.SIZES["gpt2-medium"])
    memory = {name: optim.footprint(name, medium)["optimizer_bytes"] / 1e9 for name in NAMES}
    seconds = {name: [own[name][s]["events"][-1]["seconds"] / own["adamw"][s]["events"][-1]["seconds"] for s in own[name]]
               for name in NAMES}
    slowest = [max(losses) == losses[-1] for losses in zip(*ends.values())]   # sgd stands last
    alike = [abs(a - b) < 0.1 * (c - a) for a, b, c in zip(ends["nesterov"], ends["momentum"], ends["sgd"])]

    def draw(path):
        figure, axes = plots.canvas(2)
        for axis, groups, title in ((axes[0], shared, f"all at {rates['adamw']:g}"), (axes[1], own, "each at its own rate")):
            curves(axis, groups, "step", "val_loss")
            axis.set_title(f"{title} (y axis does not start at 0)", fontsize=9)
            plots.finish(axis, "steps of 4 dialogues", "held-out loss")
        figure.savefig(path, dpi=110)

    def row(found, form=three):
        return ", ".join(f"{name} {form(values)}" for name, values in found.items())
    return Found(
        "SFT on all tokens, 400 steps of 4 dialogues one at a time, from a model trained on plain text; AdamW's rate for all "
        f"({rates['adamw']:g}), and own rates ({', '.join(f'{name} {lr:g}' for name, lr in rates.items())})",
        [Claim("Adam and AdamW are the same curve",
               f"last losses differ by {three(same)} (torch's defaults: AdamW with a decay of 0.01, Adam with none)",
               holds([x < 0.005 for x in same])),
         Claim("at one rate Adam(W) is fastest, Nesterov and momentum alike, plain SGD slowest",
               f"last loss at one rate {row(ends)} (alike: Nesterov and momentum differ by less than a tenth of their distance "
               "to SGD)", holds([*(a < b for a, b in zip(ends["adamw"], ends["momentum"])), *alike, *slowest])),
         Claim("(fair) the same with a rate of its own for each", f"last loss {row(ends_own)}",
               holds([a < b for name in ("nesterov", "momentum", "sgd") for a, b in zip(ends_own["adamw"], ends_own[name])])),
         Claim("memory: Adam(W) 13.52 GB, with momentum 11.23, SGD 8.41 at gpt2-medium",
               "the optimizer's state at gpt2-medium in fp32: " + ", ".join(f"{name} {x:.2f} GB" for name, x in memory.items())
               + ", counted; the project's differences, 2.29 and 2.82 GB, are not the 1.42 of one fp32 number a parameter",
               "partly"),
         Claim("time: AdamW 200 minutes, Adam 189, momentum 182, SGD 171",
               f"seconds over AdamW's: {row(seconds, spread)} (two runs at a time; the update is a small part of a step)",
               holds([statistics.median(seconds["sgd"]) < 0.95]))],
        draw, numbers={"rates": rates, "last": ends, "last_own": ends_own, "seconds": seconds, "memory": memory})


def accumulation(lab, n):
    """1,600 dialogues one a step, and four a step."""
    ones = Comparison("002-accumulation", "train_sft.py", [*LONG, "--steps", 1600, "--eval-every", 320],
                      {"adamw": (-6, ["--optimizer", "adamw", *TORCH["adamw"]])}, text_start, tuning=["--eval-every", 1600])
    one_rate, four_rate = lab.map(lambda comparison: comparison.tuned(lab, "adamw"), [(ones,), (FIVE,)])
    one, four = (comparison.at(lab, {"adamw": lr}, n)["adamw"] for comparison, lr in ((ones, one_rate), (FIVE, four_rate)))
    less = differences(four, one, "val_loss")
    faster = speedups(four, one)

    def draw(path):
        figure, (axis,) = plots.canvas()
        curves(axis, {"1 dialogue a step": one, "4 dialogues a step": four}, "samples", "val_loss")
        axis.set_title("AdamW, each at its own rate (y axis does not start at 0)", fontsize=10)
        plots.finish(axis, "dialogues seen", "held-out loss")
        figure.savefig(path, dpi=110)
    return Found(
        f"SFT on all tokens, 1,600 dialogues, AdamW, own rates {one_rate:g} (1 a step) and {four_rate:g} (4 a step)",
        [Claim("accumulation of 4 seems no different from a batch of 1",
               f"at equal dialogues 4 a step ends {mean_range(less)} beside 1 a step, {spread(faster)} times as fast",
               holds([abs(x) < 0.02 for x in less]))],
        draw, numbers={"rates": {"1": one_rate, "4": four_rate}, "less": less})

# ----------------------------------------------------------------------------------------------------------------------
# figures 5 to 7 and table 2: LoRA; section 3.3: DPO that did not fit

LORA = Comparison("002-fig5", "train_sft.py", [*LONG, "--steps", STEPS // 2, "--eval-every", 400, "--keep-every", KEPT], {
    "full": (-6, []), **{f"rank {r}": (-1, ["--lora-rank", r]) for r in (1, 2, 8, 16)}}, text_start,
                  tuning=["--steps", STEPS // 4, "--eval-every", STEPS // 4])


def lora(lab, n):
    """LoRA's ranks against full tuning: losses and scores over steps; and losses, right answers and memory of results/ranks."""
    rates = LORA.rates(lab)
    jobs = [(lab, LORA, label, lr, seed, STEPS // 2, 4) for seed in range(1, n + 1) for label, lr in rates.items()]
    groups = by_label(jobs, lab.map(followed, jobs))
    names = [label for label in rates if label != "full"]
    loss = {name: differences(*({seed: run for seed, (run, _) in groups[label].items()} for label in (name, "full")), "val_loss")
            for name in names}
    score = {what: {name: [list(judged.values())[-1][what] - list(groups["full"][seed][1].values())[-1][what]
                           for seed, (_, judged) in groups[name].items()] for name in names}
             for what in ("reward, greedy", "right, greedy", "reward, sampled")}

    tests, (_, peaks) = paper_000.rank_tests(), paper_000.rank_costs()
    longer = {key: {name: [tests[name.replace("rank ", "r") + "-none"][s][key] - tests["full"][s][key] for s in tests["full"]]
                    for name in names} for key in ("loss", "right")}
    saved = {r: peaks["full"] - peaks[f"rank {r}, bias none"] for r in (1, 2, 8, 16)}

    def text(found):
        return ", ".join(f"{name} {mean_range(values)}" for name, values in found.items())

    def draw(path):
        figure, axes = plots.canvas(3)
        for axis, key, title in ((axes[0], "train_eval_loss", "loss of 200 training dialogues"),
                                 (axes[1], "val_loss", "held-out loss")):
            curves(axis, {label: {seed: run for seed, (run, _) in found.items()} for label, found in groups.items()}, "step", key)
            axis.set_title(f"{title} (y axis does not start at 0)", fontsize=9)
            plots.finish(axis, "steps of one dialogue", "nats a token of all tokens" if axis is axes[0] else "")
        for label, found in groups.items():
            steps = [int(step) for step in found[1][1]]
            rewards = [[row["reward, greedy"] for row in judged.values()] for _, judged in found.values()]
            drawn = color(label, groups)
            axes[2].plot(steps, [statistics.fmean(x) for x in zip(*rewards)], marker=".", color=drawn, label=label)
            axes[2].fill_between(steps, *([f(x) for x in zip(*rewards)] for f in (min, max)), color=drawn, alpha=0.12,
                                 linewidth=0)
        axes[2].set_title(f"mean reward of greedy answers, mean and range of {n} seeds", fontsize=9)
        axes[2].set_ylim(top=0.5)   # room for the legend
        plots.finish(axes[2], "steps of one dialogue", "", loc="upper left")
        figure.savefig(path, dpi=110)
    higher = [x > 0 for found in (loss, longer["loss"]) for values in found.values() for x in values]
    return Found(
        f"SFT on all tokens, one dialogue a step, {STEPS // 2:,} steps, from a model trained on plain text, alpha = 2r, AdamW, "
        f"constant, own rates ({', '.join(f'{label} {lr:g}' for label, lr in rates.items())}); reward model as in 000-table1. "
        "Longer: an SFT model goes on with the other half of minihh, steps of 16 dialogues, own rates, five seeds "
        "(results/ranks). Memory: gpt2-medium, fp32, one dialogue of 1,024 tokens",
        [Claim("LoRA saves 3.6 to 3.75 GB of 11.77; the smaller the rank, the lower the memory",
               ", ".join(f"rank {r} saves {x:.2f} GB" for r, x in saved.items()) + f" of {peaks['full']:.2f}",
               holds([abs(saved[16] - 3.62) < 1, saved[1] >= saved[16]])),
         Claim("LoRA is underfitted: full tuning converges faster and further",
               f"held-out loss less full's: {text(loss)}; longer: {text(longer['loss'])}", holds(higher)),
         Claim("LoRA's answers score better than full tuning's, though its loss is higher",
               f"reward of greedy answers less full's: {text(score['reward, greedy'])}; share of right ones: "
               f"{text(score['right, greedy'])}; reward of sampled ones: {text(score['reward, sampled'])} (adapters leave the "
               "vocabulary as it is, and plain text has no end-of-text here: sampled, such answers run on); longer, share of "
               f"right greedy answers: {text(longer['right'])}",
               holds([x > 0 for values in score["reward, greedy"].values() for x in values]),
               f"reward of greedy answers, rank 16 less full: {mean_range(score['reward, greedy']['rank 16'])}")],
        draw, ("results/ranks/sft.png", "results/ranks/answers.png", "results/ranks/cost.png"),
        {"rates": rates, "loss": loss, **score})


def dpo_fits(lab, n):
    """Section 3.3."""
    found = json.loads((HERE / "results/ranks/cost-dpo-gpt2-medium.json").read_text())["found"]
    peaks = {name: statistics.median(one["peak_bytes"] for one in side) / 1e9 for name, side in found.items()}
    full, lora = peaks["full"], peaks["rank 8, bias none"]
    return Found("gpt2-medium, one pair of 1,024 tokens a response, fp32, AdamW, the reference in memory, too "
                 "(python -m studies.bench lora-dpo --model gpt2-medium)",
                 [Claim("DPO of gpt2-medium could not be run on two cards (P100, 16 GB)",
                        f"one such pair needs {full:.1f} GB at its peak, {lora:.1f} with LoRA of rank 8: one of the cards would "
                        "do (theirs failed where the two had to talk to each other, too)",
                        "not reproduced" if full < 16 else "reproduced")])
