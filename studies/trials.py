"""
What the items of studies/reproduce.py share: runs that differ in a method, each method at a learning rate of its own; judgements
of answers; claims with their verdicts; curves.
"""
import contextlib
import importlib
import json
import math
import os
import statistics
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import eval_reward
import minihh
import plots
import runs
from studies import seeds
from studies.compare import curve, speedup, spread
from studies.lab import HERE, Lab, rate, search

RUNS = Path("runs/reproduce")   # under the repository
KEPT = ("step", "samples", "updates", "flops", "seconds", "train_eval_loss", "val_loss", "val_dpo_loss", "val_reward_accuracy",
        "policy_entropy", "val_full_kl", "probe_loss", "displacement_rms",
        *(f"{what}_variance{form}" for what in ("grad", "update", "displacement") for form in ("", "_relative")))
FAIR = ["--schedule", "constant", "--weight-decay", 0, "--grad-clip", 0, "--eval-samples", 520, "--eval-answers", 0]
VERDICTS = ("reproduced", "partly", "not reproduced", "not testable here")


class TimeUp(Exception):
    """The lab was told to stop: what is there is kept, and the next call goes on."""


class Claim(NamedTuple):
    says: str       # the report
    found: str      # figures here, with n
    verdict: str    # one of VERDICTS
    brief: str = ""   # of a headline: the figure for the README


class Found(NamedTuple):
    """What an item came to. draw(path) makes its picture; pictures: those of another study that show it."""
    setting: str
    claims: list
    draw: Callable = None
    pictures: tuple = ()
    numbers: dict = {}   # for the JSON file, beside the claims

# ----------------------------------------------------------------------------------------------------------------------
# runs

class Trials(Lab):
    """The lab of all items. quick: every run has two short steps on little data and stays in this process, every method has one
    rate, and nothing is kept."""

    def __init__(self, results, quick=False, hh=None):
        super().__init__(results, RUNS, KEPT, ("optimizer", "lr", "seed", "accumulate"), brief="/valid/")
        self.quick, self.hh = quick, hh   # hh: a folder of HH-RLHF's files
        self.makers, self.making = {}, threading.RLock()   # folder of a run whose weights others begin with -> what makes it

    def made(self, name, script, *flags):
        """A run's findings, or TimeUp."""
        if name not in self.found:
            self.provide(*flags)
        found = self.in_process(name, script, *flags) if self.quick else self.run(name, script, *flags)
        if found is None:
            raise TimeUp
        return found

    def trained(self, name, script, *flags, by=None):
        """The folder of a run whose weights are needed: made when a run or a judgement that is not there yet asks for it. by: the
        lab that makes it, if it is another study's."""
        lab = by or self

        def make():
            self.provide(*flags)
            return self.in_process(name, script, *flags) if self.quick else lab.weights(name, script, *flags)
        with self.making:
            self.makers.setdefault(f"{lab.runs}/{name}", make)
        return f"{lab.runs}/{name}"

    def provide(self, *flags):
        """Make the runs that stand among these flags, themselves or a file in them; each once."""
        for folder in list(self.makers):
            if any(str(flag) == folder or str(flag).startswith(folder + "/") for flag in flags):
                with self.making:   # another thread may want the same
                    if self.makers[folder] and self.makers[folder]() is None:
                        raise TimeUp
                    self.makers[folder] = None

    def in_process(self, name, script, *flags):
        if name not in self.found:
            script = importlib.import_module(script.removesuffix(".py"))
            short = ["--steps", 2, "--warmup", 0, "--eval-every", 1, "--eval-samples", 8, "--keep-every", 1, "--log-every", 1,
                     "--micro-batch", 2, "--accumulate", 2]
            probes = ["--variance-every", 1] if "--variance-every" in flags else []
            rows = [] if "--data" in flags else ["--data", files(self, "valid")]
            out = ["--out", f"{self.runs}/{name}", "--overwrite"]
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                script.main(runs.parse(script.Config, [str(flag) for flag in (*flags, *short, *probes, *rows, *out)]))
            self.found[name] = self.summary(self.folder(name))
        return self.found[name]

    def judged(self, name, models, judge):
        """{model: {"right", "reward", each greedy and sampled}} of models, {label: checkpoint}, and {"own": {which: reward}}, by
        a reward model's run, on minihh's test prompts; made once."""
        if name in self.found:
            return self.found[name]
        if self.stop.is_set():
            raise TimeUp
        self.provide(*models.values(), judge)
        if self.quick:
            out = self.folder(name)
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                eval_reward.main(eval_reward.Config(models=tuple(models.values()), judge=judge, out=str(out), show=0, limit=4,
                                                    max_new_tokens=8))
        else:
            out = self.judge(name, models.values(), judge)
        scores = json.loads((out / "scores.json").read_text())
        found = {"own": {which: row["reward"] for which, row in scores["own answers"].items()}, "models": {
            label: {f"{key}, {mode}": scores["models"][path][of][key] for key in ("right", "reward")
                    for mode, of in (("greedy", "greedy"), ("sampled", "temperature 1"))} for label, path in models.items()}}
        self.keep(name, found) if not self.quick else self.found.update({name: found})
        return self.found[name]

    def map(self, function, jobs):
        return [function(*job) for job in jobs] if self.quick else super().map(function, jobs)


def write_data(few=None):
    """minihh's splits as files under RUNS: pairs, and plain text (every dialogue with either response); and two parts of train:
    its first 800 pairs, and a quarter of it without refusals; the others without them."""
    found = {split: minihh.examples(split) for split in ("train", "valid", "test")}
    helpful = [e for e in found["train"] if e.skill != "refusal"]
    found |= {"few": found["train"][:800], "helpful": helpful[:len(found["train"]) // 4], **{
        f"helpful-{split}": [e for e in found[split] if e.skill != "refusal"] for split in ("valid", "test")}}
    for name, examples in found.items():   # few: so many rows of each, for quick
        rows = [{"chosen": e.prompt + e.chosen, "rejected": e.prompt + e.rejected} for e in examples[:few]]
        for kind, text in (("jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
                           ("txt", "".join(row["chosen"] + row["rejected"] for row in rows) + "\n")):
            path = HERE / RUNS / ("quick" if few else "") / f"{name}.{kind}"
            if not path.exists() or path.read_text() != text:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)


def files(lab, split, kind="jsonl", train="train", prefix=""):
    """TRAIN,VALID of --data, with a split in the place of valid."""
    folder = RUNS / "quick" if lab.quick else RUNS
    return f"{folder}/{train}.{kind},{folder}/{prefix}{split}.{kind}"


def sft_start(lab, seed):
    """The demo's SFT model, which studies/seeds.py has for five seeds."""
    if lab.quick:
        return lab.trained(f"start/sft-s{seed}", "train_sft.py", "--seed", seed)
    other = seeds.new_lab("results/seeds")
    other.stop, other.children, other.lock = lab.stop, lab.children, lab.lock
    return lab.trained(seeds.folder("sft", seed), "train_sft.py", "--seed", seed, by=other)


def text_start(lab, seed):
    """A model that was trained on plain text, every dialogue with its good and its bad response: what a pre-trained GPT-2 is
    here."""
    return lab.trained(f"start/text-s{seed}", "train_sft.py", "--seed", seed, "--data", files(lab, "valid", "txt"), "--loss-on",
                       "all", "--micro-batch", 4, "--epochs", 1, "--eval-every", 100, "--eval-samples", 60, "--eval-answers", 0,
                       "--lr", 4e-3, "--warmup", 20)


class Comparison(NamedTuple):
    """Runs that differ in their method. Each method's rate is tuned on valid with seed 1 (lab.search, a lattice of 1.5) by the
    last loss; what is reported is read on test."""
    name: str
    script: str
    flags: list
    methods: dict             # label -> (power of 1.5 of its first rate, its flags)
    start: Callable = None    # (lab, seed) -> --init
    loss: str = "val_loss"
    data: dict = {}           # which files: arguments of files()
    tuning: list = []         # flags of the runs that tune, such as half the length

    def only(self, *labels):
        return self._replace(methods={label: self.methods[label] for label in labels})

    def command(self, lab, label, lr, seed, split="test"):
        """A run's name, script and flags."""
        init = ["--init", self.start(lab, seed)] if self.start else []
        tuning = self.tuning if split == "valid" else []
        slug = label.replace(", ", "-").replace(" ", "-")
        return (f"{self.name}/{split}/{slug}-{lr:g}-s{seed}", self.script, *self.flags, *self.methods[label][1], *tuning,
                "--lr", lr, "--seed", seed, "--data", files(lab, split, **self.data), *init)

    def run(self, lab, label, lr, seed, split="test"):
        return lab.made(*self.command(lab, label, lr, seed, split))

    def last(self, run):
        return lasts({1: run}, self.loss)[0]

    def grid(self, lab, label):
        """{rate: last loss on valid}"""
        middle = self.methods[label][0]
        if lab.quick:
            return {rate(middle): 0.0}
        return {rate(power): loss for power, loss in
                search(lambda power: self.last(self.run(lab, label, rate(power), 1, "valid")), middle).items()}

    def tuned(self, lab, label):
        """The rate of its own."""
        grid = self.grid(lab, label)
        return min(grid, key=grid.get)

    def rates(self, lab):
        return dict(zip(self.methods, lab.map(self.tuned, [(lab, label) for label in self.methods])))

    def at(self, lab, rates, n):
        """{label: {seed: run}} of methods, {label: rate}, with n seeds, on test."""
        jobs = [(lab, label, lr, seed) for seed in range(1, n + 1) for label, lr in rates.items()]
        found = lab.map(self.run, jobs)
        return {label: {seed: run for (_, name, _, seed), run in zip(jobs, found) if name == label} for label in rates}

    def own(self, lab, n):
        """Every method at the rate of its own: ({label: rate}, {label: {seed: run}})."""
        rates = self.rates(lab)
        return rates, self.at(lab, rates, n)

# ----------------------------------------------------------------------------------------------------------------------
# figures and verdicts

def lasts(runs, key):
    """[last value a seed], infinite where a run diverged"""
    return [math.inf if "diverged" in run else [e[key] for e in run["events"] if key in e][-1] for run in runs.values()]


def speedups(runs, base, key="val_loss", x="samples", share=1.0):
    """[cost of the baseline / cost of the method to equal loss, a seed], of {seed: run} and {seed: run}; None where one diverged
    or never gets below its start."""
    return [None if "diverged" in runs[seed] or "diverged" in base[seed] else
            speedup(curve(base[seed]["events"], x, key), curve(runs[seed]["events"], x, key), share)[0] for seed in runs
            if seed in base]


def accuracy_speedups(runs, base, x="samples", key="val_reward_accuracy"):
    """The same to an equal accuracy: the highest that both reach."""
    def falling(run):
        return curve([{**e, key: -e[key]} for e in run["events"] if key in e], x, key)
    return [speedup(falling(base[seed]), falling(runs[seed]))[0] for seed in runs if seed in base]


def at_equal(runs, base, key, accuracy="val_reward_accuracy"):
    """[a number of the method / the baseline's, a seed], both where their accuracy is first the highest that both reach."""
    def at(run, level):
        points = [(e[accuracy], e[key]) for e in run["events"] if accuracy in e]
        for (a, x), (b, y) in zip(points, points[1:]):
            if b >= level > a:
                return x + (y - x) * (level - a) / (b - a)

    def best(run):
        return max(e[accuracy] for e in run["events"] if accuracy in e)
    found = []
    for seed in runs:
        level = min(best(runs[seed]), best(base[seed]))
        one, two = at(runs[seed], level), at(base[seed], level)
        found.append(one / two if one is not None and two else None)
    return found


def differences(runs, base, key):
    """[last value less the baseline's, a seed]"""
    one, two = ({seed: lasts({seed: run}, key)[0] for seed, run in of.items()} for of in (runs, base))
    return [one[seed] - two[seed] for seed in one if seed in two]


def verdict(values, claimed, none=1.0, at_most=math.inf):
    """Of a ratio (none = 1) or a difference (none = 0) that a report says is about `claimed`, a value a seed: reproduced where
    every seed is on its side and the median goes at least half of the way (of a ratio's logarithm: 1.41 for 2) and no farther
    than `at_most` times; partly where it goes farther, where every seed is on its side and the median goes a tenth of the way, or
    where only the median goes half of it; else not. None counts as the farthest on the other side."""
    def way(x):
        return -math.inf if x is None else math.log(x) / math.log(claimed) if none else x / claimed
    side, size = min(map(way, values)) > 0, statistics.median(map(way, values))
    return ("reproduced" if side and 0.5 <= size <= at_most else "partly" if side and size >= 0.1 or size >= 0.5 else
            "not reproduced")


def both(one, other):
    """Of the verdicts in the report's protocol and in the fair one: where they differ, partly."""
    return one if one == other else "partly"


def two_verdicts(at_one_rate, own, claimed=2):
    return both(verdict(at_one_rate, claimed), verdict(own, claimed))


def holds(values, share=1.0):
    """Of a yes or no, one a seed: reproduced where all say yes, partly where most do."""
    yes = statistics.fmean(bool(value) for value in values)
    return "reproduced" if yes >= share else "partly" if yes > 0.5 else "not reproduced"


PALETTE = ("#1f5fa8", "#d62728", "#2a8f5b", "#e8890c", "#6a3d9a", "#86c440", "#8a5a3b", "#222222", "#b39ddb")


def color(label, labels):
    return plots.COLORS.get(label) or PALETTE[list(labels).index(label) % len(PALETTE)]


def curves(axis, groups, x, y, colors=None):
    """Mean and range over seeds of {label: {seed: run}}'s evaluations."""
    for label, by_seed in groups.items():
        points = [[(e[x], e[y]) for e in run["events"] if y in e] for run in by_seed.values() if "diverged" not in run]
        lost = f", {len(by_seed) - len(points)} diverged" if len(points) < len(by_seed) else ""
        length = min(map(len, points), default=0)
        cost = [statistics.fmean(p[i][0] for p in points) for i in range(length)]
        values = [[p[i][1] for p in points] for i in range(length)]
        drawn = (colors or {}).get(label) or color(label, groups)
        axis.fill_between(cost, list(map(min, values)), list(map(max, values)), color=drawn, alpha=0.12, linewidth=0)
        axis.plot(cost, list(map(statistics.fmean, values)), color=drawn, linewidth=1.3,
                  label=f"{label} (n = {len(points)}{lost})")


def three(values):
    return spread(values, 3)
