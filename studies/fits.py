"""
What fits on a card: computed, not measured (plan.py).

    python -m studies.fits --out results/bench/fits.json     # ten minutes; prints the table, which RESULTS.md shows

The largest micro-batch, a power of two up to 64, of pairs of 512 tokens: more than 94 in 100 pairs of HH-RLHF's harmless-base
have. Training on a GPU in bfloat16 autocast with AdamW, the reference cached; autocast's copies of the weights are counted. Two
sizes are counted for each line, and what lies between is on a straight line.
"""
import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np

import data
import model as gpt
import plan
import runs
import train_dpo
import train_sft
from files import InputError

CARDS = (6, 8, 12, 16, 24)   # GB of 10^9 bytes. A card has GiB: the 7 % more are for what is not counted, and a desktop
PARTS = (300, 100, 112)      # tokens of prompt, chosen and rejected response
KINDS = ("sft", "dpo", "cdpo")
FEW, MOST = 16, 64           # pairs that are counted


def peak(config, tokens, rows, kind, device="cpu", half=False, **flags):
    """plan.count() of a training step of this kind on these pairs, and the micro-batch's tokens. flags: as for train_dpo.py."""
    cfg = train_dpo.Config(loss="cdpo" if kind == "cdpo" else "dpo", **flags)

    def make(model):
        return (lambda batch: train_sft.batch_loss(model, batch, 1)) if kind == "sft" else train_dpo.dry_losses(cfg, model, True)
    batch = data.sft_batch(tokens, rows, "all") if kind == "sft" else data.pair_batch(tokens, rows)
    return plan.count(cfg, config, batch, make, device=device, half=half), len(batch.tokens)


def line(config, kind, **flags):
    """(least, a, b): n pairs of 512 tokens take the larger of `least` and a + b n bytes on a GPU. The first is what the
    optimizer's step needs, when no activations are left."""
    tokens = data.Tokens(np.zeros(MOST * sum(PARTS), dtype=np.uint16),
                         np.cumsum(np.tile(PARTS, (MOST, 1)).flatten(), dtype=np.int64).reshape(-1, 3))
    few, many = (peak(config, tokens, range(n), kind, "cuda", True, **flags)[0] for n in (FEW, MOST))
    b = (many["peak"] - few["peak"]) / (MOST - FEW)
    least = sum(few[what] for what in ("parameters", "reference", "gradients", "optimizer state"))
    return least + plan.CONTEXT, few["peak"] - FEW * b + plan.CONTEXT, b


def largest(found, gigabytes):
    """Pairs of the largest micro-batch that fits, 0 for none. found: line()."""
    least, a, b = found
    return max((n for n in (1, 2, 4, 8, 16, 32, 64) if max(least, a + b * n) <= gigabytes * 1e9), default=0)


def table(rows):
    """rows: {"model", "rank", "checkpointing", kind: line()} for each row."""
    lines = [f"| computed, not measured | {' | '.join(f'{card} GB' for card in CARDS)} |", "| --- |" + " --- |" * len(CARDS)]
    for row in rows:
        way = f"rank {row['rank']}" if row["rank"] else "full"
        cells = [" / ".join(str(largest(row[kind], card) or "–") for kind in KINDS) for card in CARDS]
        lines.append(f"| {row['model']}, {way}{', checkpointing' if row['checkpointing'] else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gpt2,gpt2-medium,gpt2-large,gpt2-xl")
    parser.add_argument("--out", help="JSON file for the bytes")
    cfg, rows = parser.parse_args(argv), []
    names = cfg.models.split(",")
    if unknown := [name for name in names if name not in gpt.SIZES]:
        raise InputError(f"--models: no size {unknown[0]!r}: expected {', '.join(gpt.SIZES)}")
    if cfg.out and not Path(cfg.out).parent.is_dir():
        raise InputError(f"--out: expected a file's name in a folder that exists, found {cfg.out}")
    for name, rank, checkpointing in itertools.product(names, (0, 8), (False, True)):
        rows.append({"model": name, "rank": rank, "checkpointing": checkpointing} | {
            kind: line(gpt.SIZES[name], kind, lora_rank=rank, checkpoint_activations=checkpointing) for kind in KINDS})
        print(f"{name}, rank {rank}, checkpointing {checkpointing}", file=sys.stderr, flush=True)
    print(table(rows))
    if cfg.out:
        Path(cfg.out).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    runs.one_line(main)
