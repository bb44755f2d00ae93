"""
The settings of the reports themselves, as commands for one GPU: python -m studies.reproduce ID --scale gpu.

Written, not run: no GPU was at hand. What the reports leave open (beta, alpha, decay, AGMA's K, lengths of runs) is ours and the
usual. 001_... tuned Phi-2 and Qwen; here GPT-2 takes their place. Files of yours: sft_train.json and sft_test.json are the
course's lists of dialogues, prompts.jsonl its prompts (README: Data), wiki.txt any plain text. Memory: for dialogues or pairs of
512 tokens in bfloat16, as studies.fits counted it (with LoRA, of rank 8); time: the FLOPs that dialogues of a mean length need,
over SPEED.
"""
import json
import shlex
import subprocess
import sys

import torch

import model as gpt
import runs
import train_dpo
import train_reward
import train_sft
from files import InputError
from studies.lab import HERE

SPEED = 25e12     # FLOPs a second that a step gets out of a consumer's card in bfloat16: a third of an RTX 4090's, our guess
LATENCY = 0.05    # seconds that a forward and backward pass of 24 layers takes at least, however few its tokens, our guess
LENGTHS = {"hh-rlhf": (140, 64, 64), "alpaca": (35, 65, 0), "other": (300, 84, 0)}   # mean tokens of prompt and responses
ROWS = {"hh-rlhf": 160_800, "hh-rlhf/harmless-base": 42_537, "hh-rlhf/helpful-base": 43_835, "alpaca": 52_002}
SCRIPTS = {"train_sft.py": train_sft, "train_reward.py": train_reward, "train_dpo.py": train_dpo}

PLAIN = "--schedule constant --grad-clip 0"
SFT = ("train_sft.py --init gpt2-medium --data hh-rlhf --half sft --loss-on all --optimizer adam --betas 0.9,0.99 --lr 1e-4 "
       f"--weight-decay 0 {PLAIN} --log-every 1")
LARGE = f"{SFT} --micro-batch 8 --accumulate 128 --epochs 1 --eval-every 5 --out runs/gpu-sft"
TASK = ("train_dpo.py --init runs/gpu-sft --data hh-rlhf --half preference --lr 5e-6 --beta 0.1 --weight-decay 0.1 "
        f"{PLAIN} --steps 300 --eval-every 5")
DPO = f"{TASK} --betas 0.9,0.999 --micro-batch 4 --accumulate 512 --log-every 1 --variance-every 100"
ALPACA = (f"train_sft.py --init gpt2-large --data alpaca --epochs 1 --lr 2e-6 --weight-decay 0.1 {PLAIN} --micro-batch 32 "
          "--eval-every 20")
MEDIUM = ALPACA.replace("gpt2-large", "gpt2-medium").replace("2e-6", "5e-6")
HARMLESS = (f"train_dpo.py --init gpt2-medium --data hh-rlhf/harmless-base --lr 2e-6 --beta 0.1 --weight-decay 0.1 {PLAIN} "
            "--micro-batch 16 --eval-every 20")
DIALOGUES = f"train_sft.py --init gpt2-medium --data sft_train.json,sft_test.json --loss-on all --micro-batch 1 --lr 1e-4 {PLAIN}"
TORCH = "--betas 0.9,0.999 --weight-decay"   # torch's defaults: AdamW decays by 0.01, Adam by nothing
COURSE = f"{DIALOGUES} {TORCH} 0.01"
LONG = f"{COURSE} --steps 80000 --eval-every 2000 --keep-every 2000 --out runs/gpu-course"
BETAS = {"adamw": "0.9,0.95", "adamw-pma": "0.9,0.95", "adamw-noaccum": "0.9,0.95", "adamw-pma-schedule": "0.9,0.95",
         "lion": "0.95,0.98", "lion-pma": "0.95,0.98"}


def by(command, names, accumulate, out, more=""):
    return [f"{command} --accumulate {accumulate} --optimizer {name} --betas {BETAS[name]} {more} --out runs/gpu-{out}-{name}"
            for name in names]


def scores(models, out):
    return (f"eval_reward.py --models '{models}' --prompts prompts.jsonl --judge deberta --temperatures 0.7 --top-p 0.95 "
            f"--max-new-tokens 128 --out runs/gpu-{out}")


FOUR = ("adamw", "adamw-pma", "lion", "lion-pma", "adamw-noaccum")
ONE_PASS = {k: by(HARMLESS, FOUR, k, f"harmless-{k}", "--epochs 1") for k in (8, 16)}
RECIPES = {
    "000-fig1": [f"{SFT} --micro-batch 4 --epochs 1 --eval-every 1000 --out runs/gpu-sft-4", LARGE],
    "000-table1": [LARGE, "eval_reward.py --models gpt2-medium,runs/gpu-sft --data hh-rlhf --limit 500 --temperatures 0.7 "
                          "--top-p 0.95 --max-new-tokens 128 --judge deberta --out runs/gpu-table1"],
    "000-fig2-4": [LARGE] + [
        "train_sft.py --init runs/gpu-sft --data hh-rlhf --half sft --loss-on all --micro-batch 1 --steps 20000 --lr 1e-4 "
        f"{PLAIN} --eval-every 500 {flags} --out runs/gpu-rank-{name}" for name, flags in (
            ("full", ""), *((f"{r}-{b}", f"--lora-rank {r} --lora-bias {b}") for b, ranks in (
                ("none", (1, 2, 8, 16)), ("all", (1, 2, 8, 16)), ("lora_only", (8,))) for r in ranks))],
    "000-fig5-6": [LARGE, f"{DPO} --out runs/gpu-dpo"] + [
        f"{DPO} --loss cdpo --gamma {gamma} --out runs/gpu-cdpo-{gamma}" for gamma in (0, 1, 10, 100)],
    "000-fig7": [LARGE] + [f"{TASK} --micro-batch 32 --accumulate 64 --optimizer {name} --out runs/gpu-{name}" for name in (
        "adamw", "adamw-noaccum", "agma", "agma-linear", "agma-sgd", "agma-decay", "agma-perturb")],
    "001-fig1": by(ALPACA, FOUR, 8, "alpaca-8") + ONE_PASS[16],
    "001-fig11-12": by(ALPACA, FOUR[:4], 1, "alpaca-1") + by(ALPACA, FOUR, 4, "alpaca-4"),
    "001-table1": by(ALPACA, FOUR, 4, "alpaca-4") + by(ALPACA, FOUR, 8, "alpaca-8"),
    "001-fig3-4": ONE_PASS[8] + ONE_PASS[16],
    "001-fig5": by(HARMLESS, FOUR, 16, "epochs", "--epochs 3"),
    "001-fig6": [one for k in (1, 2, 4, 8, 16, 32, 64) for one in (
        [*ONE_PASS[k][:2], ONE_PASS[k][4]] if k in ONE_PASS else
        by(HARMLESS, ("adamw", "adamw-pma", "adamw-noaccum"), k, f"harmless-{k}", "--epochs 1"))],
    "001-fig7": by(MEDIUM, ("adamw", "adamw-pma", "adamw-noaccum"), 16, "variance", "--variance-every 20"),
    "001-fig8": by(ALPACA.replace("gpt2-large", "gpt2-xl"), ("adamw", "adamw-pma"), 8, "xl", "--dtype bfloat16"),
    "001-fig9": by("train_sft.py --init random:gpt2 --data wiki.txt --loss-on all --micro-batch 8 --steps 5000 --lr 6e-4 "
                   f"--weight-decay 0.1 {PLAIN}", ("adamw", "adamw-pma", "adamw-noaccum"), 8, "text"),
    "001-fig10": by(HARMLESS, ("adamw", "adamw-noaccum", "adamw-pma", "adamw-pma-schedule"), 16, "schedule", "--epochs 3"),
    "001-time": by(ALPACA, ("adamw", "adamw-pma"), 8, "time", "--steps 50"),
    "002-fig1-2": [LONG, scores("gpt2-medium,runs/gpu-course/step-*.pt", "course-scores")],
    "002-lr": [f"{COURSE} --lr {lr} --steps 1000 --eval-every 50 --out runs/gpu-course-{lr}" for lr in ("1e-2", "1e-3")],
    "002-fig3-4": [f"{DIALOGUES} {more} --accumulate 4 --steps 5000 --eval-every 125 --optimizer {name} "
                   f"--out runs/gpu-course-{name}" for name, more in (
                       ("adamw", f"{TORCH} 0.01"), ("adam", f"{TORCH} 0"), ("nesterov", "--weight-decay 0"),
                       ("momentum", "--weight-decay 0"), ("sgd", "--weight-decay 0"))],
    "002-fig5-7": [f"{COURSE} --steps 20000 --eval-every 500 --keep-every 2000 {flags} --out runs/gpu-course-rank-{name}"
                   for name, flags in (("full", ""), *((r, f"--lora-rank {r}") for r in (1, 2, 8, 16)))] + [
                       scores("runs/gpu-course-rank-*", "course-ranks")],
    "002-fig8-9": [f"{COURSE} --data hh-rlhf/helpful-base --half sft --steps 40000 --eval-every 1000 --keep-every 2000 "
                   "--out runs/gpu-course-helpful", scores("gpt2-medium,runs/gpu-course-helpful/step-*.pt", "helpful-scores")],
    "002-accumulation": [f"{COURSE} --accumulate {k} --steps {20000 // k} --eval-every {500 // k} --out runs/gpu-course-by-{k}"
                         for k in (1, 4)],
    "002-dpo": [LONG, "train_dpo.py --init runs/gpu-course --data hh-rlhf --half preference --lr 1e-6 --beta 0.1 --micro-batch 4 "
                      "--accumulate 16 --out runs/gpu-course-dpo"],
}


def estimate(command):
    """(bytes at the peak, seconds) of a training command, or None."""
    script, *words = shlex.split(command)
    if script not in SCRIPTS:
        return None
    cfg = runs.parse(SCRIPTS[script].Config, words)
    size = next((name for name in ("gpt2-xl", "gpt2-large", "gpt2-medium") if name in cfg.init), "gpt2-medium")
    size = "gpt2" if cfg.init.removeprefix("random:") == "gpt2" else size
    config, pairs = gpt.SIZES[size], script != "train_sft.py"
    kind = "sft" if not pairs else "cdpo" if getattr(cfg, "loss", "") == "cdpo" else "dpo"
    counted, = (row[kind] for row in json.loads((HERE / "results/bench/fits.json").read_text()) if row["model"] == size
                and bool(row["rank"]) == bool(cfg.lora_rank) and not row["checkpointing"])
    least, fixed, each = counted
    prompt, one, two = LENGTHS.get(cfg.data.split("/")[0], LENGTHS["other"])
    rows = ROWS.get(cfg.data, 84_576) / (1 if cfg.half == "all" else 2)
    steps = cfg.steps or cfg.epochs * rows / (cfg.micro_batch * cfg.accumulate)
    tokens, scored = prompt + one + (two if pairs else 0), (prompt if getattr(cfg, "loss_on", "") == "all" else 0) + one
    needed = gpt.flops(config, tokens, tokens * (prompt + one) / 2, scored + (two if pairs else 0), backward=True,
                       rank=cfg.lora_rank)
    passes = steps * cfg.accumulate
    return max(least, fixed + each * cfg.micro_batch), passes * max(LATENCY, cfg.micro_batch * needed / SPEED)


def show(names, run):
    """The commands of these items, each once, with estimates; run: and start them, one after the other."""
    missing = [name for name in names if name not in RECIPES]
    if run and not torch.cuda.is_available():
        raise InputError("--run: expected a CUDA device, found none")
    done = set()
    for name in names:
        print(f"\n# {name}" + (": nothing for a GPU" if name in missing else ""))
        for command in RECIPES.get(name, ()):
            if command in done:
                print(f"# as above: --out {command.split('--out ')[1]}")
                continue
            done.add(command)
            found = estimate(command)
            print(" ".join(f"python {command}".split()) +
                  (f"    # about {found[0] / 1e9:.0f} GB, {duration(found[1])}" if found else ""), flush=True)
            if run:
                words, folder = shlex.split(command), HERE / command.split("--out ")[1]
                if words[0] in SCRIPTS and (folder / "last.pt").exists():
                    words.append("--resume")   # a run that has ended has nothing to do then
                status = subprocess.run([sys.executable, *words], cwd=HERE).returncode
                if status:
                    raise InputError(f"{words[0]} ended with status {status}; what is done is kept, and the same call goes on")


def duration(seconds):
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.0f} hours"
