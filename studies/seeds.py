"""
The demo over five seeds: what do DPO and CDPO do to a model's answers, and does a judge see it?

    python -m studies.seeds                 # 40 runs and 10 judgements, about 18 minutes on 2 cores
    python -m studies.seeds --minutes 10    # a piece of it: stops after 10 minutes; call it again to go on
    python -m studies.seeds --report        # the tables of what is there

Each seed has an SFT run of its own, from random weights, and from it both reward models, DPO and CDPO at the scripts' defaults,
CDPO with more of its regulariser (gamma 10 and 100), and DPO with a larger step and a looser leash. The last checkpoint of each
answers the 520 test prompts of minihh, greedily and sampled.
"""
import json
import statistics
from pathlib import Path

import minihh
import plots
from studies.compare import mean_range, spread
from studies.lab import Lab, command_line

RUNS = Path("runs/seeds")   # under the repository
SEEDS = 5
STEPS = 125
WAYS = {"DPO": [], "CDPO, gamma 1": ["--loss", "cdpo"], "CDPO, gamma 10": ["--loss", "cdpo", "--gamma", 10],
        "CDPO, gamma 100": ["--loss", "cdpo", "--gamma", 100], "DPO, large step": ["--lr", 3e-4, "--beta", 0.1]}
HEADS = ("likelihood", "hidden")
DISTANCE = ("policy_entropy", "val_full_kl", "regularizer")


def new_lab(results):
    return Lab(results, RUNS, ("step", "seconds", "val_loss", "val_dpo_loss", "val_reward_loss", "val_reward_accuracy",
                               *DISTANCE), ("lr", "seed"))


def folder(what, seed):
    return f"{what.lower().replace(', ', '-').replace(' ', '-')}-s{seed}"


def train(lab, seed):
    """All runs of a seed, or fewer where the time was up. Whether all are there."""
    start = lab.weights(folder("sft", seed), "train_sft.py", "--seed", seed)
    init = ["--init", f"{RUNS}/{folder('sft', seed)}", "--seed", seed]
    return bool(start) and all([*(lab.weights(folder(head, seed), "train_reward.py", *init, "--head", head) for head in HEADS),
                                *(lab.weights(folder(way, seed), "train_dpo.py", *init, *flags, "--steps", STEPS,
                                              "--keep-every", STEPS) for way, flags in WAYS.items())])


def judge(lab, seed, head):
    """What eval_reward.py finds of a seed's models by the reward model with this head, kept under judged/head-sN. It takes a
    minute, and is not broken off."""
    name = f"judged/{folder(head, seed)}"
    if lab.stop.is_set():
        return
    models = {"SFT": f"{RUNS}/{folder('sft', seed)}/best.pt",
              **{way: f"{RUNS}/{folder(way, seed)}/step-{STEPS}.pt" for way in WAYS}}
    out = lab.judge(f"judged-{folder(head, seed)}", models.values(), f"{RUNS}/{folder(head, seed)}")
    lines = (out / "generations.jsonl").read_text().splitlines()
    lab.keep(name, summary(json.loads((out / "scores.json").read_text()), map(json.loads, lines), models))


def summary(scores, generations, models):
    """Of a scores.json: how right the judge is on pairs, and what it and the checkers say of every model; and of
    generations.jsonl: how many of the sampled answers are rude or evasive, as the rejected responses are that have this flaw."""
    sampled, flawed = "temperature 1", (*minihh.RUDE, *minihh.EVASIVE)
    answers = {path: [] for path in models.values()}
    for line in generations:
        if line["mode"] == sampled:
            answers[line["model"]].append(any(text in line["answer"] for text in flawed))
    found = {"judge": {"all": scores["judge"]["accuracy"], **scores["judge"]["by_group"],
                       **{f"flaw: {flaw}": share for flaw, share in scores["judge"]["by_flaw"].items()}}}
    for name, path in models.items():
        score = scores["models"][path]
        row = found[name] = {f"{key}, {mode}": score[of][key] for mode, of in (("greedy", "greedy"), ("sampled", sampled))
                             for key in ("right", "reward")}
        row["rude or evasive, sampled"] = statistics.fmean(answers[path])
        if "pairs" in score:
            row["reward accuracy"] = score["pairs"]["accuracy"]
            found["SFT"]["log-probability accuracy"] = score["pairs"]["init_logp_accuracy"]   # the same of all
    return found


def work(lab):
    """Whatever of the study is not there yet: a seed that is judged needs no runs any more."""
    missing = [(lab, seed, head) for seed in range(1, SEEDS + 1) for head in HEADS
               if f"judged/{folder(head, seed)}" not in lab.found]
    if all(lab.map(train, [(lab, seed) for seed in sorted({seed for _, seed, _ in missing})])):
        lab.map(judge, missing)

# ----------------------------------------------------------------------------------------------------------------------
# the report

def values(lab, head, name, key):
    """{seed: a number of a row of the judgements by this head}."""
    found = {seed: lab.found.get(f"judged/{folder(head, seed)}") for seed in range(1, SEEDS + 1)}
    return {seed: run[name][key] for seed, run in found.items() if run}


def changes(lab, head, name, key):
    """From the SFT model of the same seed, on the same prompts."""
    before, after = (values(lab, head, of, key) for of in ("SFT", name))
    return [after[seed] - before[seed] for seed in after]


def difference(lab, head, name, key):
    return mean_range(changes(lab, head, name, key))


def last(lab, what, key):
    return [run["events"][-1][key] for seed in range(1, SEEDS + 1) if (run := lab.found.get(folder(what, seed)))]


def median(lab, head, name, key):
    return spread(list(values(lab, head, name, key).values()), 3)


def table(head, rows):
    return [f"| | {' | '.join(head)} |", "| --- |" + " --- |" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def answers(lab):
    """What becomes of the answers, by the checkers, and of the implicit reward on pairs."""
    return table(["reward accuracy", "right, greedy", "against SFT", "right, sampled", "against SFT"], [
        [name, median(lab, HEADS[0], name, "reward accuracy") if name in WAYS else "",
         *(cell for mode in ("greedy", "sampled") for key in [f"right, {mode}"]
           for cell in (median(lab, HEADS[0], name, key), difference(lab, HEADS[0], name, key) if name in WAYS else ""))]
        for name in ("SFT", *WAYS)])


def judges(lab):
    """What two judges say of sampled answers, beside the truth."""
    keys = [("right, by the checkers", HEADS[0], "right, sampled"), ("rude or evasive", HEADS[0], "rude or evasive, sampled"),
            *((f"reward by `{head}`", head, "reward, sampled") for head in HEADS)]
    return table([title for title, _, _ in keys],
                 [[way, *(difference(lab, head, way, key) for _, head, key in keys)] for way in WAYS])


def distances(lab):
    """How far CDPO goes from the reference, on 200 valid pairs."""
    return table(["entropy", "KL(ref ‖ pi) a position", "R"], [
        [way, *(spread(last(lab, way, key), 4 if key == "val_full_kl" else 3) for key in DISTANCE)]
        for way in WAYS if way != "DPO, large step"])


def heads(lab):
    """How right the two reward models are on test pairs."""
    columns = ("look-up", "refusal", "chat", "computed", "all", "flaw: wrong")
    return [*table([*columns[:-1], "pairs whose flaw is a wrong fact"], [
        [f"`{head}`", *(median(lab, head, "judge", column) for column in columns)] for head in HEADS]),
            f"| the SFT model's log-probabilities | | | | | {median(lab, HEADS[0], 'SFT', 'log-probability accuracy')} | |"]


def picture(lab, path):
    """What two judges say of sampled answers, beside the truth: every seed's change from its SFT run."""
    figure, axes = plots.canvas(3)
    panels = [("right answers, by the checkers", HEADS[0], "right, sampled"),
              *((f"reward by --head {head}", head, "reward, sampled") for head in HEADS)]
    for axis, (title, head, key) in zip(axes, panels):
        axis.axhline(0, color="#8c8c8c", linewidth=0.8)
        for i, way in enumerate(WAYS):
            found = changes(lab, head, way, key)
            axis.plot([i] * len(found), found, ".", color="#1f5fa8", alpha=0.6)
            axis.plot(i, statistics.fmean(found), "_", color="#222222", markersize=14)
        axis.set_xticks(range(len(WAYS)), WAYS, rotation=25, ha="right", fontsize=8)
        axis.set_title(f"{title}: every seed, and the mean", fontsize=9)
        plots.finish(axis, "", "change from SFT, sampled answers" if axis is axes[0] else "", legend=False)
    figure.savefig(path, dpi=110)


def report(lab):
    seeds = [len(values(lab, head, "judge", "all")) for head in HEADS]
    lab.file.parent.mkdir(parents=True, exist_ok=True)
    text = f"{len(lab.found)} runs and judgements are done; nothing is judged yet.\n"
    if min(seeds):
        text = "\n".join([f"{min(seeds)} seeds on test: median [range]; differences from SFT are means [range], paired by seed.",
                          "", *answers(lab), "", *judges(lab), "", *distances(lab), "", *heads(lab), ""])
        picture(lab, lab.file.parent / "judges.png")
    (lab.file.parent / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    command_line(__doc__, "results/seeds", new_lab, work, report)
