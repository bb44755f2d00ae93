"""
The headline comparisons on real HH-RLHF text, from random weights; see studies/reproduce.py. The files are given with --hh.
"""
import json

import data
import plots
from files import InputError
from studies.compare import mean_range, spread
from studies.lab import HERE
from studies.trials import (FAIR, RUNS, Claim, Comparison, Found, accuracy_speedups, at_equal, curves, differences, files, holds,
                            lasts, speedups, three, verdict)

K = 8


def write_data(folder):
    """Our splits of the files in a folder, by first human turn, under RUNS."""
    if not folder:
        if not (HERE / RUNS / "hh-train.jsonl").exists():
            raise InputError("real: expected --hh FOLDER, of HH-RLHF's .jsonl.gz files (RESULTS.md says which)")
        return
    found, counts = data.load_pairs(folder, ("train", "valid", "test"))
    print(f"{folder}: {data.describe(counts)}", flush=True)
    for split, pairs in found.items():
        rows = [json.dumps({"chosen": p.prompt + p.chosen, "rejected": p.prompt + p.rejected}) + "\n" for p in pairs]
        (HERE / RUNS).mkdir(parents=True, exist_ok=True)
        (HERE / RUNS / f"hh-{split}.jsonl").write_text("".join(rows))
        (HERE / RUNS / f"hh-{split}.txt").write_text("".join(p.prompt + p.chosen for p in pairs) + "\n")


def text_start(lab, seed):
    """One pass over the training dialogues as plain text."""
    return lab.trained(f"real/text-s{seed}", "train_sft.py", "--seed", seed, "--data", files(lab, "hh-valid", "txt", "hh-train"),
                       "--loss-on", "all", "--micro-batch", 4, "--epochs", 1, "--eval-every", 100, "--eval-samples", 40,
                       "--eval-answers", 0, "--lr", 4e-3, "--warmup", 20)


SFT = Comparison("real/sft", "train_sft.py", [*FAIR, "--micro-batch", 4, "--accumulate", K, "--steps", 60, "--warmup", 5,
                                              "--eval-every", 6, "--eval-samples", 200],
                 {name: (power, ["--optimizer", name]) for name, power in (("adamw", -1), ("adamw-pma", -2),
                                                                          ("adamw-noaccum", -4))},
                 text_start, data={"train": "hh-train"}, tuning=["--eval-every", 60])


def sft_start(lab, seed):
    return lab.trained(f"real/sft-s{seed}", "train_sft.py", "--init", text_start(lab, seed), "--seed", seed, "--data",
                       files(lab, "hh-valid", train="hh-train"), "--micro-batch", 16, "--epochs", 1, "--lr", 1e-3,
                       "--eval-every", 62, "--eval-answers", 0)


DPO = Comparison("real/dpo", "train_dpo.py", [*FAIR, "--micro-batch", 8, "--accumulate", 2, "--steps", 60, "--warmup", 5,
                                              "--eval-every", 12, "--beta", 0.1, "--log-every", 1],
                 {"DPO": (0, []), "CDPO, gamma 1": (0, ["--loss", "cdpo"])}, sft_start, "val_dpo_loss", {"train": "hh-train"})


def real(lab, n):
    """PMA against AdamW in SFT; CDPO against DPO."""
    if not lab.stop.is_set():
        write_data(lab.hh)

    def split(comparison):   # lab.search tunes on valid; what is reported is read on test
        return comparison._replace(data=comparison.data | {"prefix": "hh-"})
    rates, own = split(SFT).own(lab, n)
    shared = split(SFT).at(lab, {"adamw-pma": rates["adamw"]}, n)["adamw-pma"]
    dpo = split(DPO).at(lab, dict.fromkeys(DPO.methods, 1e-5), n)
    ends = {name: lasts(runs, "val_loss") for name, runs in {**own, "adamw-pma at AdamW's rate": shared}.items()}
    faster = speedups(own["adamw-pma"], own["adamw"])
    accuracy = {name: lasts(runs, "val_reward_accuracy") for name, runs in dpo.items()}
    sooner = accuracy_speedups(dpo["CDPO, gamma 1"], dpo["DPO"])
    far = at_equal(dpo["CDPO, gamma 1"], dpo["DPO"], "val_full_kl")
    less = differences(dpo["CDPO, gamma 1"], dpo["DPO"], "val_reward_accuracy")

    def draw(path):
        figure, axes = plots.canvas(3)
        curves(axes[0], own, "samples", "val_loss")
        axes[0].set_title("SFT, each at its own rate (y axis does not start at 0)", fontsize=9)
        plots.finish(axes[0], "dialogues seen", "held-out loss")
        for axis, key, title in ((axes[1], "val_dpo_loss", "DPO loss"), (axes[2], "val_reward_accuracy", "reward accuracy")):
            curves(axis, dpo, "samples", key)
            axis.set_title(f"DPO and CDPO: held-out {title}", fontsize=9)
            plots.finish(axis, "pairs seen", "")
        axes[2].axhline(0.5, color="#8c8c8c", linestyle="--", linewidth=1)
        figure.savefig(path, dpi=110)
    return Found(
        "0.7 M parameters, random weights, one pass over real dialogues as plain text, then SFT on 1,920 of them or DPO; "
        "the public test files of harmless-base and helpful-rejection-sampled, split by first human turn; own rates "
        f"({', '.join(f'{name} {lr:g}' for name, lr in rates.items())}); DPO at 1e-5, beta 0.1",
        [Claim("(001) PMA reaches the same SFT loss about 2 times as fast", f"own rates {spread(faster)}; last loss " + ", ".join(
            f"{name} {three(values)}" for name, values in ends.items()), verdict(faster, 2)),
         Claim("(000) CDPO reaches the same accuracy in half of the time",
               f"{'' if min(accuracy['DPO']) > 0.55 else 'no accuracy to reach: '}last {three(accuracy['DPO'])} (DPO), "
               f"{three(accuracy['CDPO, gamma 1'])} (CDPO), "
               f"CDPO less DPO {mean_range(less)}; to the highest that both reach {spread(sooner)}, "
               f"KL there {spread(far)} times DPO's",
               verdict(sooner, 2) if holds([a > 0.55 for a in accuracy["DPO"]]) == "reproduced" else "not testable here")],
        draw, numbers={"rates": rates, "last": ends, "speedup": faster, "accuracy": accuracy})
