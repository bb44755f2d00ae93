"""
How fast is it? Ratios within one run, since a machine's speed drifts.

    python -m studies.bench optim       # one step of each optimizer at 124M parameters, against torch's fused AdamW
    python -m studies.bench lora        # SFT by LoRA rank, one dialogue a step, against full fine-tuning
    python -m studies.bench lora-dpo --model gpt2-medium   # DPO with the adapters off as reference, against a second model
    python -m studies.bench dpo         # DPO's steps against trl's trainer; dpo-lora: with LoRA, against trl + peft
    python -m studies.bench sft         # SFT's against trl, transformers, and a padded rectangle with whole logits
    python -m studies.bench cdpo        # CDPO's against DPO's; cdpo-head: its head alone, against whole logits
    python -m studies.bench checkpointing   # DPO's with --checkpoint-activations, against those without
    python -m studies.bench pma         # a step of 8 micro-batches, 8 updates by AdamW-PMA against AdamW's one
    python -m studies.bench plan        # what --dry-run counts against what processes take, gpt2 and gpt2-medium
    python -m studies.bench generate    # tokens a second of 8 prompts: against transformers' generate, and the memory's limit
"""
import argparse
import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import data
import eval_reward
import model as gpt
import optim
import runs
from files import InputError
from studies import fits, rivals
from studies.lab import HERE


def optim_steps(name="gpt2", rounds=25):
    """Rounds of one step() of every optimizer in turn, on the same weights with the same gradients (fp32). Prints the median and
    the range over rounds of each one's time over that of torch's fused AdamW in the same round, and its state's bytes."""
    model = gpt.GPT(gpt.SIZES[name])
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 0.01
    K, numbers = 8, sum(p.numel() for p in model.parameters())
    compared = {"adamw": optim.make("adamw", model, 1e-6, None, 0.1)}
    compared["adamw, torch's foreach"] = torch.optim.AdamW(optim.parameter_groups(model, 0.1), 1e-6, (0.9, 0.99), foreach=True)
    compared |= {key: optim.make(key, model, 1e-6, None, 0.1, K) for key in ("adamw-pma", "agma", "lion", "lion-pma")}
    took = {key: [] for key in compared}
    for turn in range(rounds + 1):   # the first allocates the state
        for key in random.Random(turn).sample(list(compared), len(compared)):   # who follows whom should not matter
            optimizer = compared[key]
            start = time.perf_counter()
            optimizer.step()
            if turn:
                took[key].append(time.perf_counter() - start)
    print(f"{name}, {numbers / 1e6:.0f}M parameters, {torch.get_num_threads()} threads, K = {K}: one step, {rounds} rounds\n")
    print("| | ms, median | times torch's fused AdamW: median [range] | bytes of state a parameter |\n| --- | --- | --- | --- |")
    for key, optimizer in compared.items():
        ratios = [a / b for a, b in zip(took[key], took["adamw"])]
        state = sum(x.numel() * x.element_size() for s in optimizer.state.values() for x in s.values() if torch.is_tensor(x))
        print(f"| {key} | {1000 * statistics.median(took[key]):.0f} | {statistics.median(ratios):.2f} [{min(ratios):.2f}, "
              f"{max(ratios):.2f}] | {state / numbers:.1f} |")

# ----------------------------------------------------------------------------------------------------------------------

def generation(name, device, rounds, new=128):
    """Sampling at temperature 1 with our generate and with transformers', on the same random weights and prompts, in turns; and
    between them the memory: a plain sum over as many bytes as the weights have. The limit: each new token of all rows reads every
    matrix once (but one row of the positions') and the keys and values of all rows' past. The pass over the prompts counts in the
    time of both sides, and the limit leaves it out."""
    import transformers   # an oracle, not needed to run what is measured
    device, autocast = runs.setup(runs.Config(device=device))
    model = gpt.GPT(gpt.SIZES[name]).to(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        gpt.export(model, Path(folder) / "hf")
        theirs = transformers.GPT2LMHeadModel.from_pretrained(Path(folder) / "hf").to(device).eval()
    c, encoding, eot = model.config, data.tokenizer(model.config.vocab_size), model.config.vocab_size - 1
    prompts = [encoding.encode_ordinary(p) for p in eval_reward.read_prompts(HERE / "prompts.jsonl")[0][:8]]
    width = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), width), eot), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, seen, prompt in zip(ids, mask, prompts):   # transformers pads on the left
        row[width - len(prompt):], seen[width - len(prompt):] = torch.tensor(prompt), 1
    ids, mask, memory = ids.to(device), mask.to(device), torch.randn(sum(p.numel() for p in model.parameters()), device=device)

    def ours():
        return sum(map(len, model.generate(prompts, new)))

    def transformers_():
        return theirs.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=new,
                               min_new_tokens=new, pad_token_id=eot)[:, width:].numel()

    def read():
        memory.sum()
        return memory.nbytes
    rates = {f: [] for f in (ours, transformers_, read)}
    for turn in range(rounds + 1):   # the first warms up
        for f, found in rates.items():
            began = time.perf_counter()
            with autocast():
                n = f()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                found.append(n / (time.perf_counter() - began))
    weights = memory.nbytes - model.wpe.weight.nbytes
    past = sum(len(p) + t for p in prompts for t in range(new)) / new * 2 * c.n_layer * c.n_embd * 4   # bytes, mean over tokens
    limits = [len(prompts) * speed / (weights + past) for speed in rates[read]]
    return {"model": name, "machine": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "threads": torch.get_num_threads(), "prompts": [len(p) for p in prompts], "new": new,
            "bytes_per_token": weights + past, "memory": rates[read],
            "tokens per second": {"ours": rates[ours], "transformers": rates[transformers_], "the memory's limit": limits},
            "ratio": {"ours / transformers": [a / b for a, b in zip(rates[ours], rates[transformers_])],
                      "ours / the memory's limit": [a / b for a, b in zip(rates[ours], limits)]}}


def generation_table(found):
    """What generation() found, as text for a terminal and RESULTS.md."""
    speeds, lengths = [speed / 1e9 for speed in found["memory"]], found["prompts"]
    lines = [f"{found['machine']}, {found['threads']} threads, {found['model']}: {len(lengths)} prompts of {min(lengths)} to "
             f"{max(lengths)} tokens, {found['new']} new ones each, {len(speeds)} rounds. The memory",
             f"reads {spread(speeds, 1)} GB/s; a new token of all rows needs {found['bytes_per_token'] / 1e6:.0f} MB of it.", "",
             "| | median [range] |", "| --- | --- |"]
    lines += [f"| {key}, tokens/s | {spread(values, 1)} |" for key, values in found["tokens per second"].items()]
    return "\n".join(lines + [f"| {key} | {spread(values, 2)} |" for key, values in found["ratio"].items()])

# ----------------------------------------------------------------------------------------------------------------------
# sides in turns, every repetition in a process of its own: each has its own peak memory, and the machine's drift hits all alike

MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}   # glibc keeps what it once had: no page faults


class Side(NamedTuple):
    make: Callable
    options: dict = {}
    alike: bool = False    # whether micro-batches hold pairs of similar length
    environ: dict = {}


NEEDED = {"dpo": ("trl",), "dpo-lora": ("trl", "peft"), "sft": ("trl", "transformers"), "generate": ("transformers",)}
RANDOM = ("lora", "lora-dpo", "cdpo-head", "pma")   # on random tokens; the others on the pairs of a data set
SIDES = {
    "dpo": {"ours": Side(rivals.ours, {"kind": "dpo"}),
            "ours, malloc variables": Side(rivals.ours, {"kind": "dpo"}, environ=MALLOC),
            "trl as it comes": Side(rivals.trl_dpo, {"best": False}),
            "trl at its best": Side(rivals.trl_dpo, {"best": True}, True),
            "trl at its best, malloc variables": Side(rivals.trl_dpo, {"best": True}, True, MALLOC)},
    "dpo-lora": {"ours, rank 8": Side(rivals.ours, {"kind": "dpo", "rank": 8}),
                 "trl + peft at its best, rank 8": Side(rivals.trl_dpo, {"best": True, "rank": 8}, True)},
    "sft": {"ours": Side(rivals.ours, {"kind": "sft"}), "trl as it comes": Side(rivals.trl_sft, {"best": False}),
            "trl at its best": Side(rivals.trl_sft, {"best": True}, True), "transformers": Side(rivals.transformers_sft),
            "rectangle": Side(rivals.rectangle_sft), "rectangle, similar lengths": Side(rivals.rectangle_sft, alike=True)},
    "cdpo": {"ours, CDPO": Side(rivals.ours, {"kind": "cdpo"}), "ours, DPO": Side(rivals.ours, {"kind": "dpo"})},
    "cdpo-head": {"ours": Side(rivals.cdpo_head, {"full": False}), "whole logits": Side(rivals.cdpo_head, {"full": True})},
    "checkpointing": {"ours": Side(rivals.ours, {"kind": "dpo"}),
                      "ours, checkpointing": Side(rivals.ours, {"kind": "dpo", "checkpointing": True})},
    "lora": {"full": Side(rivals.ours, {"kind": "sft"}),
             **{f"rank {rank}, bias {bias}": Side(rivals.ours, {"kind": "sft", "rank": rank, "bias": bias}) for rank, bias in (
                 (1, "none"), (2, "none"), (8, "none"), (16, "none"), (8, "lora_only"), (8, "all"))}},
    "pma": {name: Side(rivals.period, {"name": name}) for name in ("adamw", "adamw-pma", "lion", "lion-pma")},
    "lora-dpo": {"full": Side(rivals.ours, {"kind": "dpo", "cached": False}),
                 "rank 8, bias none": Side(rivals.ours, {"kind": "dpo", "rank": 8, "cached": False})},
}


def alone(connection, side, work):
    """One repetition: seconds of the steps, bytes, and FLOPs a second of the machine before and after."""
    with contextlib.suppress(torch.OutOfMemoryError, KeyboardInterrupt):
        resident = rivals.memory(torch.device("cpu"))   # before there is a model
        run, facts = side.make(work, **side.options)
        before = rivals.rate() if work.device == "cpu" else None
        seconds = run()
        connection.send({**facts, "seconds": seconds, "peak_bytes": runs.peak_memory(), "resident": resident,
                         "rate": before and (before + rivals.rate()) / 2})


def repetition(side, work):
    """What alone() finds in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    folder = tempfile.TemporaryDirectory()   # for all that the side writes: it ends without a chance to clear up
    environ = {"OMP_PROC_BIND": "true", "TMPDIR": folder.name, **side.environ}
    before = {key: os.environ.get(key) for key in environ}
    os.environ.update(environ)   # what malloc and OpenMP read when a process starts
    try:
        process = spawn.Process(target=alone, args=(there, side, work), daemon=True)
        process.start()
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise InputError(f"a process of the benchmark ({side.make.__name__}) ended early. Unless it says above why, it needed "
                         "more memory than there is: try a smaller --model or fewer --tokens") from None
    finally:
        process.terminate()
        process.join()
        folder.cleanup()


def against(what, work, rounds):
    """{side: [what one repetition found, for each round]}, sides in turns."""
    found = {name: [] for name in SIDES[what]}
    for turn in range(rounds):
        for name, side in SIDES[what].items():
            found[name].append(repetition(side, work if side.alike else work.shuffled()))
            print(f"round {turn + 1} of {rounds}, {name}: {sum(found[name][-1]['seconds']):.1f} s", file=sys.stderr, flush=True)
    return found


def against_table(what, found, units):
    """units: what a repetition's steps process, (how many, of what)."""
    (first, mine), (amount, unit), lines = next(iter(found.items())), units, []
    peak, *peaks = (statistics.median(one["peak_bytes"] - one.get("given_bytes", 0) for one in each)
                    for each in (mine, *found.values()))
    for (name, each), own_peak in zip(found.items(), peaks):
        ratios = [sum(other["seconds"]) / sum(own["seconds"]) for own, other in zip(mine, each)]
        mfu = [one["flops"] / sum(one["seconds"]) / one["rate"] for one in each if one.get("flops") and one.get("rate")]
        lines.append(f"| {name} | {spread([amount / sum(one['seconds']) for one in each], 2)} {unit}/s | {spread(ratios, 2)} | "
                     f"{own_peak / 1e9:.2f} | {own_peak / peak:.2f} | {spread(mfu, 2) if mfu else ''} |")
    return "\n".join([f"| {what} | median [range] | times as long as {first} | peak, GB | times as large | MFU |",
                      "| --- |" + " --- |" * 5, *lines])


def planned(names, dataset, rounds, out):
    """What --dry-run counts against what processes take: peak less what was resident before the model, median of `rounds`."""
    rows = []
    for name, kind, rank in itertools.product(names, ("sft", "dpo", "cdpo"), (0, 8)):
        work = rivals.work(dataset, name, "cpu", size=2).shuffled()
        longest = max(work.batches, key=lambda batch: sum(len(part) for i in batch for part in work.pairs[i]))
        work = work._replace(batches=[longest] * 3)
        found = [repetition(Side(rivals.ours, {"kind": kind, "rank": rank}), work) for _ in range(rounds)]
        measured = statistics.median(one["peak_bytes"] - one["resident"] for one in found)
        counted, tokens = fits.peak(gpt.SIZES[name], rivals.tokens_of(work), longest, kind, lora_rank=rank)
        rows.append({"model": name, "kind": kind, "rank": rank, "tokens": tokens, "counted": counted["peak"],
                     "measured": measured})
        print(f"{name}, {kind}, rank {rank}: {counted['peak'] / measured:.2f}", file=sys.stderr, flush=True)
    print(planned_table(rows))
    if out:
        Path(out).write_text(json.dumps({"what": "plan", "rounds": rounds, "rows": rows}, indent=1) + "\n")


def planned_table(rows):
    lines = ["| | tokens | counted, GB | measured, GB | counted / measured |", "| --- |" + " --- |" * 4]
    for row in rows:
        way = f"rank {row['rank']}" if row["rank"] else "full"
        lines.append(f"| {row['model']}, {row['kind']}, {way} | {row['tokens']:,} | {row['counted'] / 1e9:.2f} | "
                     f"{row['measured'] / 1e9:.2f} | {row['counted'] / row['measured']:.2f} |")
    return "\n".join(lines)


def spread(values, digits):
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def compare(what, model, dataset, device, tokens, rounds, out):
    work = (rivals.long_pair(model, device, tokens, 8 if what == "pma" else 2) if what in RANDOM
            else rivals.work(dataset, model, device))
    pairs = [work.pairs[i] for rows in work.batches[1:] for i in rows]
    chosen = sum(len(p) + len(c) - 1 for p, c, _ in pairs)   # a dialogue's last token is not read
    once, twice = sum(len(part) for pair in pairs for part in pair), sum(2 * len(p) + len(c) + len(r) for p, c, r in pairs)
    units = {"sft": (chosen, "tokens"), "lora": (chosen, "tokens"), "pma": (chosen, "tokens"),
             "cdpo-head": (rivals.HEADS, "heads"),
             "lora-dpo": (chosen + sum(len(r) - 1 for _, _, r in pairs), "tokens")}.get(what, (len(pairs), "pairs"))
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    given = "random tokens" if what in RANDOM else (
        f"{len(pairs)} pairs, {len(work.batches[0])} a micro-batch, {twice / len(pairs):.0f} tokens each with the prompt twice,\n"
        f"{twice / once:.2f} times as many as with it once")
    print(f"{where}, {torch.get_num_threads()} threads, {model}, fp32, {rounds} rounds; {given}\n", flush=True)
    found = against(what, work, rounds)
    print(against_table(what, found, units))
    if out:
        Path(out).write_text(json.dumps({"what": what, "model": model, "machine": where, "units": units, "found": found},
                                        indent=1) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["optim", "generate", "plan", *SIDES])
    parser.add_argument("--model", choices=gpt.SIZES, default="gpt2")
    options = parser.add_argument_group("of all but optim")
    options.add_argument("--device", default="auto", help="of all but plan")
    options.add_argument("--data", default="hh-rlhf/harmless-base",
                         help="as for a script; not of lora, lora-dpo, pma, cdpo-head, generate")
    options.add_argument("--tokens", type=int, default=1024, help="of a dialogue in lora, lora-dpo and pma")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--out", help="JSON file for what was found; studies.ranks draws results/ranks/cost-*.json")
    cfg = parser.parse_args(argv)
    if cfg.what == "optim":
        optim_steps(cfg.model)
        return
    context = gpt.SIZES[cfg.model].block_size
    if cfg.what in ("lora", "lora-dpo", "pma") and not 4 <= cfg.tokens <= context:   # three of four are prompt
        raise InputError(f"--tokens: expected 4 to {context}, the context of {cfg.model}, found {cfg.tokens}")
    if cfg.rounds < 1:
        raise InputError(f"--rounds: expected at least 1, found {cfg.rounds}")
    if cfg.out and (Path(cfg.out).is_dir() or not Path(cfg.out).parent.is_dir()):   # better now than after the work
        raise InputError(f"--out: expected a file's name in a folder that exists, found {cfg.out}")
    if missing := [package for package in NEEDED.get(cfg.what, ()) if importlib.util.find_spec(package) is None]:
        raise InputError(f"{cfg.what} is measured against {' and '.join(missing)}, not installed: pip install -r "
                         "requirements-dev.txt trl -c constraints.txt")
    if cfg.what == "generate":
        found = generation(cfg.model, cfg.device, cfg.rounds)
        print(generation_table(found))
        if cfg.out:
            Path(cfg.out).write_text(json.dumps(found, indent=1) + "\n")
        return
    if cfg.what == "plan":
        planned(["gpt2", "gpt2-medium"] if cfg.model == "gpt2" else [cfg.model], cfg.data, cfg.rounds, cfg.out)
        return
    device = runs.setup(runs.Config(device=cfg.device))[0].type
    compare(cfg.what, cfg.model, cfg.data, device, cfg.tokens, cfg.rounds, cfg.out)


if __name__ == "__main__":
    runs.one_line(main)
