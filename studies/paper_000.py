"""
The figures and tables of 000_..., "Efficiently tuning GPT-2: a case study", at our scale; see studies/reproduce.py.
"""
import json
import statistics

import plots
from studies import ranks
from studies.trials import (FAIR, Claim, Comparison, Found, accuracy_speedups, at_equal, both, color, curves, files, holds, lasts,
                            sft_start, speedups, text_start, three, two_verdicts, verdict)
from studies.compare import mean_range, spread
from studies.lab import HERE

# ----------------------------------------------------------------------------------------------------------------------
# figure 1: a batch of 4 and one of 1,024

BATCHES = Comparison(
    "000-fig1", "train_sft.py", [*FAIR, "--loss-on", "all", "--optimizer", "adam", "--betas", "0.9,0.99", "--log-every", 1],
    {"batch 4": (-6, ["--micro-batch", 4, "--warmup", 20, "--eval-every", 256]),
     "batch 1024": (0, ["--micro-batch", 32, "--accumulate", 32, "--warmup", 1, "--eval-every", 1])}, text_start)
BATCH_STEPS = {"batch 4": 3072, "batch 1024": 12}   # 12,288 dialogues, one and a half epochs


def batches(lab, n):
    """Spikes of the training loss, and what they cost."""
    half = {label: BATCHES._replace(tuning=["--steps", steps // 2]) for label, steps in BATCH_STEPS.items()}
    whole = BATCHES._replace(methods={label: (power, [*flags, "--steps", BATCH_STEPS[label]])
                                      for label, (power, flags) in BATCHES.methods.items()})
    rates = dict(zip(half, lab.map(lambda label: half[label].tuned(lab, label), [(label,) for label in half])))
    own = whole.at(lab, rates, n)
    shared = whole.at(lab, {"batch 1024": rates["batch 4"]}, n)["batch 1024"]
    small, large = own["batch 4"], own["batch 1024"]
    rough = {label: [run["spikes"]["roughness"] for run in runs.values()] for label, runs in own.items()}
    share = [run["spikes"]["share"] for run in small.values()]
    ratio = [a and b and a / b for a, b in zip(*rough.values())]   # None: a run of two steps, for quick
    faster = speedups(large, small, x="updates")
    in_samples = speedups(large, small)
    at_one_rate = speedups(shared, small)

    def draw(path):
        figure, axes = plots.canvas(3)
        for axis, (label, runs) in zip(axes, own.items()):
            run = runs[1]
            steps, mean, low, high = zip(*run["band"])
            axis.fill_between(steps, low, high, color=color(label, own), alpha=0.25, linewidth=0, label="lowest to highest")
            axis.plot(steps, mean, color=color(label, own), linewidth=1.2, label="mean")
            axis.set_title(f"training loss, {label}, seed 1", fontsize=9)
            plots.finish(axis, "updates", "nats a token")
        top = max(axes[0].get_ylim()[1], axes[1].get_ylim()[1])
        for axis in axes[:2]:
            axis.set_ylim(0, top)
        curves(axes[2], own, "samples", "val_loss")
        curves(axes[2], {"batch 1024 at batch 4's rate": shared}, "samples", "val_loss",
               colors={"batch 1024 at batch 4's rate": "#8c8c8c"})
        axes[2].set_title("held-out loss (y axis does not start at 0)", fontsize=9)
        plots.finish(axes[2], "dialogues seen", "")
        figure.savefig(path, dpi=110)
    return Found(
        f"SFT on all tokens of minihh's dialogues, from a model trained on plain text; Adam (.9, .99), 12,288 dialogues, "
        f"constant rate of its own for either batch ({rates['batch 4']:g} and {rates['batch 1024']:g})",
        [Claim("the training loss at batch 4 has numerous spikes, at 1,024 it is considerably smoother",
               f"a step lies {three(rough['batch 4'])} nats from the line through its neighbours against "
               f"{three(rough['batch 1024'])}, {spread(ratio, 1)} times as far (16 times, if averaging 256 times as many "
               f"dialogues were all; second half of the runs); {100 * statistics.median(share):.1f} % of the steps at batch 4 "
               "lie half as high again as their surroundings", verdict(ratio, 16)),
         Claim("at 1,024 it decreases more rapidly: faster convergence",
               f"per update {spread(faster, 1)} times faster; per dialogue {spread(in_samples)} times as fast (batch 4's rate "
               f"for both: {spread(at_one_rate)})",
               "reproduced" if holds([x and x > 1 for x in in_samples]) == "reproduced" else
               "partly" if verdict(faster, 2) == "reproduced" else "not reproduced")],
        draw, numbers={"rates": rates})

# ----------------------------------------------------------------------------------------------------------------------
# table 1: average reward scores

def judge_of(lab, seed):
    """An SFT model of a model trained on plain text, and a reward model that begins with it."""
    sft = lab.trained(f"000-table1/sft-s{seed}", "train_sft.py", "--init", text_start(lab, seed), "--seed", seed, "--epochs", 1,
                      "--data", files(lab, "valid"), "--eval-answers", 0, "--eval-every", 125, "--lr", 2e-3)
    return sft, lab.trained(f"000-table1/reward-s{seed}", "train_reward.py", "--init", sft, "--seed", seed)


def scores(lab, n):
    """Original, SFT, and the data's own answers, judged by a reward model."""
    def one(seed):
        sft, judge = judge_of(lab, seed)
        models = {"original": f"{text_start(lab, seed)}/best.pt", "SFT": f"{sft}/best.pt"}
        return lab.judged(f"000-table1/judged-s{seed}", models, judge)
    found = lab.map(one, [(seed,) for seed in range(1, n + 1)])
    columns = {f"{model}, {mode}": [row["models"][model][f"reward, {mode}"] for row in found] for model in ("original", "SFT")
               for mode in ("sampled", "greedy")}
    columns |= {name: [row["own"][name] for row in found] for name in found[0]["own"]}
    right = {model: [row["models"][model]["right, sampled"] for row in found] for model in ("original", "SFT")}
    gain = [b - a for a, b in zip(columns["original, sampled"], columns["SFT, sampled"])]
    short = [b - a for a, b in zip(columns["SFT, sampled"], columns["test, chosen"])]
    short_greedy = [b - a for a, b in zip(columns["SFT, greedy"], columns["test, chosen"])]
    train = [b - a for a, b in zip(columns["test, chosen"], columns["training, chosen"])]

    def draw(path):
        figure, (axis,) = plots.canvas()
        names = ["original, sampled", "SFT, sampled", "original, greedy", "SFT, greedy", "test, chosen", "training, chosen",
                 "test, rejected"]
        for i, name in enumerate(names):
            axis.plot([i] * len(columns[name]), columns[name], ".", color="#1f5fa8", alpha=0.6)
            axis.plot(i, statistics.fmean(columns[name]), "_", color="#222222", markersize=16)
        axis.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
        axis.set_title(f"mean reward, minihh's test prompts: {len(found)} seeds and their mean", fontsize=10)
        plots.finish(axis, "", "reward (0: chosen training responses)", legend=False)
        figure.savefig(path, dpi=110)
    table = "; ".join(f"{name} {spread(values)}" for name, values in columns.items() if "greedy" not in name)
    return Found(
        "original: trained on plain text with good and bad answers, once through; SFT: one epoch on the chosen ones; judge: our "
        "reward model, which begins with that SFT model; 520 test prompts",
        [Claim("SFT -3.19 against the original's -3.37: slightly better",
               f"sampled {mean_range(gain, 2)}; {table}. Right answers {three(right['original'])} -> {three(right['SFT'])}",
               verdict(gain, 0.18, none=0), f"{mean_range(gain, 2)} (SFT less a model that has read plain text; claimed +0.18)"),
         Claim("SFT falls short of the test set's own answers (-1.41)",
               f"these score {mean_range(short, 2)} more than SFT's sampled answers, {mean_range(short_greedy, 2)} more than its "
               "greedy ones", both(*(holds([x > 0 for x in found]) for found in (short, short_greedy)))),
         Claim("training answers (-0.83) score above test answers", f"by {mean_range(train, 2)}; a fifth of the training labels "
               "is flipped here, of the test's none", holds([x > 0 for x in train]))],
        draw, numbers={"columns": columns, "right": right})

# ----------------------------------------------------------------------------------------------------------------------
# figures 2 to 4: LoRA

def rank_tests():
    """{configuration: {seed: what test says}} of results/ranks' SFT runs, made by studies/ranks.py; and of the start."""
    study = ranks.new_lab("results/ranks")
    study.stop.set()   # it makes nothing now
    grids = {ranks.label(*c): ranks.grid(study, "sft", *c) for c in ranks.TASKS["sft"].configurations}
    return {"start": ranks.tests(study, "sft", "start"), **{
        name: ranks.tests(study, "sft", f"{name}-{min(grid, key=grid.get):g}") for name, grid in grids.items()}}


def rank_costs():
    """{configuration: what each round of studies.bench lora found} at gpt2-medium's shape, and each one's peak in GB."""
    found = json.loads((HERE / "results/ranks/cost-gpt2-medium.json").read_text())["found"]
    return found, {name: statistics.median(one["peak_bytes"] for one in side) / 1e9 for name, side in found.items()}


def lora_ranks(lab, n):
    """From results/ranks."""
    tests = rank_tests()
    start = tests.pop("start")
    gain = {name: [(start[s]["loss"] - found[s]["loss"]) / (start[s]["loss"] - tests["full"][s]["loss"]) for s in found]
            for name, found in tests.items()}
    bias = {mode: [tests[f"r8-{mode}"][s]["loss"] - tests["r8-none"][s]["loss"] for s in tests["r8-none"]]
            for mode in ("lora_only", "all")}
    order = [all(a["loss"] > b["loss"] for a, b in zip((tests[f"{r}-{mode}"][s] for r in ("r1", "r2", "r8")),
                                                     (tests[f"{r}-{mode}"][s] for r in ("r2", "r8", "r16"))))
             for mode in ("none", "lora_only", "all") for s in start]
    missing = statistics.fmean(tests["r8-none"][s]["loss"] - tests["full"][s]["loss"] for s in start)
    medium = ranks.sizes("gpt2-medium", 16, "none")
    share = 100 * medium["trainable"] / medium["parameters"]
    return Found(
        "an SFT model goes on with the other half of minihh; alpha = 2r, each configuration at its own rate; results/ranks",
        [Claim("ranks 1 to 16 have similar losses, close to but slightly inferior to full tuning",
               f"rank 1 has {spread(gain['r1-none'])} of full's gain in test loss, rank 16 {spread(gain['r16-none'])} (similar: "
               "rank 16 four fifths of full's, rank 1 four fifths of that)",
               holds([b > 0.8 * a > 0.64 for a, b in zip(gain["r16-none"], gain["r1-none"])]),
               f"rank 1 has {spread(gain['r1-none'])} of full's gain, rank 16 {spread(gain['r16-none'])}"),
         Claim("no consistent pattern among ranks: higher is not better",
               f"the loss falls with every rank from 1 to 16 in {sum(order)} of {len(order)} series",
               holds([not x for x in order])),
         Claim("training the biases, too, gives a noticeable reduction",
               f"at rank 8 {mean_range(bias['lora_only'], 4)} (lora_only) and {mean_range(bias['all'], 4)} (all) in test loss; "
               f"rank 8 lacks {missing:.4f} to full (noticeable: a tenth of it)",
               verdict(bias["all"], -missing / 10, none=0)),
         Claim("rank 16 trains 1.79 % of the parameters", f"{share:.3f} %, counted; 1.787 % where LayerNorm's weights train too",
               "reproduced"),
         *lora_cost()],
        pictures=("results/ranks/sft.png", "results/ranks/cost.png"))


def lora_cost():
    found, peaks = rank_costs()
    times = [sum(a["seconds"]) / sum(b["seconds"]) for a, b in zip(found["full"], found["rank 16, bias none"])]
    saved = peaks["full"] - peaks["rank 16, bias none"]
    return [Claim("rank 16 saves about 1.5 GB at gpt2-medium",
                  f"{saved:.1f} GB of {peaks['full']:.1f}, fp32, one dialogue of 1,024 tokens (studies.bench lora)",
                  verdict([saved], 1.5, none=0, at_most=2)),
            Claim("rank 16 is about 7.3 % faster", f"{spread(times)} times as fast on this CPU (n = {len(times)} rounds)",
                  verdict(times, 1.073, at_most=2))]

# ----------------------------------------------------------------------------------------------------------------------
# figures 5 and 6: DPO and CDPO

CDPO = Comparison(
    "000-fig5-6", "train_dpo.py", [*FAIR, "--micro-batch", 16, "--steps", 100, "--warmup", 5, "--eval-every", 5, "--log-every", 1,
                                   "--variance-every", 50],
    {"DPO": (-10, []), **{f"CDPO, gamma {gamma}": (-10, ["--loss", "cdpo", "--gamma", gamma]) for gamma in (1, 10, 100)}},
    sft_start, "val_dpo_loss", tuning=["--eval-every", 50])


def cdpo(lab, n):
    """Variance, and what an equal accuracy costs."""
    rates, own = CDPO.own(lab, n)
    shared = CDPO.at(lab, dict.fromkeys(CDPO.methods, rates["DPO"]), n)
    ways = [way for way in CDPO.methods if way != "DPO"]
    one = ways[0]   # gamma 1, the paper's

    def noise(groups, key="grad_variance_relative", steps=1):
        """Of a way against DPO's, at the probes after the first."""
        at = {way: {s: [e[key] for e in run["events"] if key in e and e["step"] >= steps] for s, run in runs.items()}
              for way, runs in groups.items()}
        return {way: [statistics.fmean(at[way][s]) / statistics.fmean(at["DPO"][s]) for s in at[way]] for way in ways}

    def each(function, groups):
        return {way: function(groups[way], groups["DPO"]) for way in ways}
    variance = noise(shared)
    raw = noise(shared, "grad_variance")
    rough = {way: [run["spikes"]["roughness"] for run in runs.values()] for way, runs in shared.items()}
    faster, faster_own = each(accuracy_speedups, shared), each(accuracy_speedups, own)
    seconds = each(lambda a, b: accuracy_speedups(a, b, "seconds"), shared)
    equal = {key: {way: at_equal(own[way], own["DPO"], key) for way in ways} for key in ("policy_entropy", "val_full_kl")}
    accuracy = {way: lasts(runs, "val_reward_accuracy") for way, runs in own.items()}
    apart = {way: [rises_without_a_fall(run) for run in shared[way].values()] for way in ("DPO", one)}

    def draw(path):
        figure, axes = plots.canvas(3, 2, height=7)
        for axis, (key, title) in zip(axes, (("val_dpo_loss", "held-out DPO loss"), ("val_reward_accuracy", "held-out accuracy"),
                                             ("policy_entropy", "entropy of the policy"))):
            curves(axis, shared, "samples", key)
            axis.set_title(f"{title}, at DPO's rate", fontsize=9)
            plots.finish(axis, "pairs seen", "", legend=axis is axes[0])
        curves(axes[3], own, "samples", "val_reward_accuracy")
        axes[3].set_title("held-out accuracy, each at its own rate", fontsize=9)
        plots.finish(axes[3], "pairs seen", "", legend=False)
        for label, runs in own.items():
            for run in runs.values():
                points = [(e["val_reward_accuracy"], e["val_full_kl"]) for e in run["events"] if "val_full_kl" in e]
                axes[4].plot(*zip(*points), color=color(label, own), linewidth=0.8, alpha=0.7)
        axes[4].set_title("distance from the reference against accuracy, own rates", fontsize=9)
        plots.finish(axes[4], "held-out accuracy", "KL(ref ‖ pi) a position", legend=False)
        for label in ("DPO", one):
            steps, mean, _, _ = zip(*shared[label][1]["band"])
            axes[5].plot(steps, [x - mean[0] for x in mean], color=color(label, shared), linewidth=0.9, label=label)
        axes[5].set_title("training loss (CDPO's with gamma R) less its first, seed 1", fontsize=9)
        plots.finish(axes[5], "steps", "", legend=False)
        figure.savefig(path, dpi=110)

    def all_ways(values, digits=2):
        return ", ".join(f"{spread(values[way], digits)} (gamma {way.split()[-1]})" for way in ways)
    return Found(
        "DPO on minihh from the demo's SFT model, 100 steps of 16 pairs, beta 0.5, constant rate; own rates "
        + ", ".join(f"{lr:g} ({way})" for way, lr in rates.items()) + "; otherwise DPO's rate for all",
        [Claim("CDPO significantly reduces the variance",
               f"of the gradient, relative to its square, against DPO's: {all_ways(variance)}; raw {all_ways(raw)}. A step of "
               f"the training loss lies {three(rough['DPO'])} nats from the line through its neighbours in DPO, "
               f"{three(rough[one])} at gamma 1, whose loss is higher by gamma R and so looks smoother beside its own height",
               verdict(variance[one], 0.5), f"the gradient's, relative: {spread(variance[one])} of DPO's"),
         Claim("CDPO reaches the same accuracy in half of the time",
               f"speedup to the highest accuracy that both reach, at DPO's rate, in pairs: {all_ways(faster)}; in seconds "
               f"{all_ways(seconds)}; with own rates, in pairs {all_ways(faster_own)}; there the last accuracies are "
               f"{three(accuracy['DPO'])} (DPO), "
               + ", ".join(f"{three(accuracy[way])} (gamma {way.split()[-1]})" for way in ways), verdict(faster[one], 2),
               f"to an equal accuracy {spread([x and 1 / x for x in faster[one]])} times as many pairs as DPO"),
         Claim("CDPO keeps the policy near the reference on out-of-sequence tokens",
               f"own rates, at equal accuracy: KL(ref ‖ pi) over the whole vocabulary is {all_ways(equal['val_full_kl'])} "
               f"times DPO's, the entropy {all_ways(equal['policy_entropy'], 3)} times (gamma 100 hardly learns at any rate: its "
               "accuracy is chance)", verdict(equal["val_full_kl"][one], 0.5),
               f"{spread(equal['val_full_kl'][one])} times DPO's distance at equal accuracy"),
         Claim("accuracy rises while the DPO loss does not always fall",
               "evaluations with a higher accuracy and no lower DPO loss than the one before, of those with a higher accuracy: " +
               ", ".join(f"{sum(a for a, _ in found)} of {sum(b for _, b in found)} in {sum(a > 0 for a, _ in found)} of "
                         f"{len(found)} runs ({way})" for way, found in apart.items()) + ", at DPO's rate",
               holds([a > 0 for a, _ in apart[one]]))],
        draw, numbers={"rates": rates, "variance": variance, "speedup": faster, "speedup_own": faster_own, "seconds": seconds,
                       "equal": equal, "accuracy": accuracy})


def rises_without_a_fall(run):
    """(evaluations with a higher accuracy and no lower DPO loss than the one before, those with a higher accuracy)"""
    found = [(e["val_reward_accuracy"], e["val_dpo_loss"]) for e in run["events"] if "val_dpo_loss" in e]
    rises = [loss_now >= loss for (accuracy, loss), (now, loss_now) in zip(found, found[1:]) if now > accuracy]
    return sum(rises), len(rises)

# ----------------------------------------------------------------------------------------------------------------------
# figure 7 and the text below it: AGMA

K = 8
OPTIMIZERS = Comparison(
    "dpo-optimizers", "train_dpo.py", [*FAIR, "--micro-batch", 4, "--accumulate", K, "--steps", 52, "--warmup", 4,
                                       "--eval-every", 4],
    {name: (power, ["--optimizer", name]) for name, power in (
        ("adamw", -8), ("adamw-noaccum", -11), ("adamw-pma", -9), ("adamw-pma-schedule", -9), ("agma", -9), ("agma-linear", -8),
        ("agma-sgd", -8), ("agma-decay", -9), ("agma-perturb", -9))},
    sft_start, "val_dpo_loss", tuning=["--eval-every", 26])


def agma(lab, n):
    """AGMA and its two ablations against AdamW; the linear decay; the perturbation."""
    which = OPTIMIZERS.only("adamw", "adamw-noaccum", "agma", "agma-linear", "agma-sgd", "agma-decay", "agma-perturb")
    rates, own = which.own(lab, n)
    shared = which.at(lab, dict.fromkeys(which.methods, rates["adamw"]), n)
    key = which.loss
    faster = {name: speedups(runs, shared["adamw"], key) for name, runs in shared.items()}
    faster_own = {name: speedups(runs, own["adamw"], key) for name, runs in own.items()}
    ends = {name: lasts(runs, key) for name, runs in shared.items()}
    ends_own = {name: lasts(runs, key) for name, runs in own.items()}

    def late(runs):
        """What share of the fall of the loss comes after the first quarter."""
        found = [[e[key] for e in run["events"] if key in e] for run in runs.values()]
        return [(e[(len(e) + 3) // 4] - min(e)) / (e[0] - min(e)) if min(e) < e[0] else 0.0 for e in found]
    stuck = {name: late(shared[name]) for name in ("agma", "agma-decay")}
    perturbed = [b - a for a, b in zip(ends["agma-decay"], ends["agma-perturb"])]

    def draw(path):
        figure, axes = plots.canvas(2)
        for axis, groups, title in ((axes[0], shared, f"all at AdamW's rate, {rates['adamw']:g}"),
                                    (axes[1], own, "each at its own")):
            curves(axis, {name: runs for name, runs in groups.items() if name != "agma-perturb"}, "samples", key)
            axis.set_title(f"{title} (y axis does not start at 0)", fontsize=9)
            plots.finish(axis, "pairs seen (agma-perturb, not drawn, lies on agma-decay)", "held-out DPO loss")
        figure.savefig(path, dpi=110)

    def ablation(name):
        return (f"last loss {three(ends[name])} against AGMA's {three(ends['agma'])} at one rate; "
                f"{three(ends_own[name])} against {three(ends_own['agma'])} with a rate of its own each",
                both(*(holds([a > b for a, b in zip(found[name], found["agma"])]) for found in (ends, ends_own))))
    return Found(
        f"DPO on minihh from the demo's SFT model, {K} micro-batches of 4 pairs a step, 52 steps, constant rate; "
        f"AdamW's rate for all ({rates['adamw']:g}), and own rates ({', '.join(f'{name} {lr:g}' for name, lr in rates.items())})",
        [Claim("AGMA converges notably faster than AdamW",
               f"at one rate {spread(faster['agma'])} times as fast in pairs; own rates {spread(faster_own['agma'])} "
               f"(adamw-noaccum, the baseline without accumulation: {spread(faster_own['adamw-noaccum'])})",
               two_verdicts(faster["agma"], faster_own["agma"], 1.5), f"{spread(faster['agma'])} times as fast at one rate, "
               f"{spread(faster_own['agma'])} with own rates"),
         Claim("small steps of lr / K instead of lr / sqrt(K) are slower", *ablation("agma-linear")),
         Claim("small steps like SGD's are slower than Adam's", *ablation("agma-sgd")),
         Claim("with small steps that fall linearly the training loss does not drop after a few large steps",
               f"{spread(stuck['agma-decay'])} of the held-out loss's fall comes after the first quarter of the steps (AGMA: "
               f"{spread(stuck['agma'])}), at one rate; own rate: last {three(ends_own['agma-decay'])} beside AGMA's "
               f"{three(ends_own['agma'])} (stuck: less than a tenth)", holds([x < 0.1 for x in stuck["agma-decay"]])),
         Claim("a slight perturbation of that run does not help",
               f"last loss with it less without, at one rate {mean_range(perturbed)}; own rates "
               f"{three(ends_own['agma-perturb'])} and {three(ends_own['agma-decay'])}", holds([x > -0.005 for x in perturbed]))],
        draw, numbers={"rates": rates, "speedup": faster, "speedup_own": faster_own, "last": ends, "last_own": ends_own,
                       "late": stuck})
