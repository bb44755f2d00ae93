"""
Will it fit? --dry-run counts the memory of a training step before any weights are loaded.

The step runs on fake tensors, which have shapes and lifetimes, but no numbers and no memory. Every storage that comes to life and
every one that dies is counted, so the peak is that of the real step. It takes seconds, for the largest model on the smallest
machine. On a CPU it also counts the holes that they leave in the process' memory (Heap).

A module of its own, since three scripts use it. Simplified: the counted step runs the CPU's kernels, on a GPU others do the same.
Not counted: an evaluation, which keeps nothing for a backward pass. `python -m studies.bench plan` holds it against processes.
"""
import bisect
import contextlib
import os
import random
import weakref
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import lora
import model as gpt
import optim
import parallel
import runs

MAPPED = 32e6   # bytes: glibc takes a block of this size from the system and gives it back; smaller ones share a heap
ALIGN = 64      # bytes that a block in the heap loses, since torch wants it aligned; a hole must have twice as many to spare
PINNED = 1 / 3  # how often holes that touch stay apart: set on measured peaks, of gpt2 and gpt2-medium, which agree
LOADED = {"cpu": 0.12e9}   # what torch still loads during the first step; elsewhere it is in START
START = {"cpu": 0.30e9}    # Python and torch before the model
CONTEXT = 0.60e9           # what a GPU's driver keeps for itself


class Heap:
    """Bytes that glibc takes from the system. A block gets the smallest hole that is large enough, or space on top; holes stay
    with the process. Two that touch become one, unless something small that is not counted lives in between."""

    def __init__(self):
        self.holes, self.top, self.mapped, self.chance = [], 0, 0, random.Random(0)   # (start, end) in order

    @property
    def size(self):
        return self.top + self.mapped

    def take(self, nbytes):
        """(start, end) of the block; a large one is not in the heap and starts at None."""
        if nbytes >= MAPPED:
            self.mapped += nbytes
            return None, nbytes
        on_top = self.holes[-1][0] if self.holes and self.holes[-1][1] == self.top else self.top
        fits = [(end - start, start, end) for start, end in self.holes if end - start >= nbytes + 2 * ALIGN]
        _, start, end = min(fits, default=(0, on_top, self.top))
        if start < self.top:
            self.holes.remove((start, end))
        block = start, start + nbytes + ALIGN
        if block[1] < end:
            bisect.insort(self.holes, (block[1], end))
        self.top = max(self.top, block[1])
        return block

    def free(self, start, end):
        if start is None:
            self.mapped -= end
            return
        at = bisect.bisect(self.holes, (start, end))
        if at < len(self.holes) and self.holes[at][0] == end and self.chance.random() > PINNED:
            end = self.holes.pop(at)[1]
        if at and self.holes[at - 1][1] == start and self.chance.random() > PINNED:
            at -= 1
            start = self.holes.pop(at)[0]
        self.holes.insert(at, (start, end))


class Meter(TorchDispatchMode):
    """Bytes of all storages that were made inside and are alive, and the most there were at a time: alive, or with a Heap, as the
    system sees it."""

    def __init__(self, heap=None):
        super().__init__()
        self.heap, self.known = heap, weakref.WeakKeyDictionary()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage()) not in self.known:
                self.known[storage], nbytes = True, storage.nbytes()
                self.live += nbytes
                block = self.heap.take(nbytes) if self.heap else None
                self.peak = max(self.peak, self.heap.size if self.heap else self.live)
                weakref.finalize(storage, self.freed, nbytes, block)
        return out

    def freed(self, nbytes, block):
        self.live -= nbytes
        if self.heap:
            self.heap.free(*block)


def count(cfg, config, batch, make, kind=gpt.GPT, device="cpu", half=False):
    """{what: bytes} of a training step on this micro-batch. make(model) -> a function from a micro-batch to its loss; half: under
    autocast to bfloat16."""
    def autocast():
        return torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), Meter(Heap() if device == "cpu" else None) as meter:
        model = kind(config)
        model.checkpoint_activations = cfg.checkpoint_activations
        if cfg.lora_rank:
            lora.add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_bias, base_sha256="not known")
        found = {"parameters": meter.live}
        loss = make(model)
        found["reference"] = meter.live - found["parameters"]
        optimizer = optim.make(cfg.optimizer, model, cfg.lr, cfg.betas, cfg.weight_decay, cfg.accumulate)
        together = min(2, optim.per_update(cfg.optimizer, cfg.accumulate))   # a second adds to the first one's gradient
        for step in range(3 if meter.heap else 2):   # the optimizer's state comes with the first; a heap's holes settle later
            for k in range(together):
                before = meter.live
                with autocast():
                    value = loss(batch)
                if step == k == 0:
                    found["activations"] = meter.live - before
                value.backward()
                del value
            found["gradients"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step == 0:
                found["optimizer state"] = meter.live - found["parameters"] - found["reference"]
    return found | {"peak": meter.peak + LOADED.get(device, 0.0)}


def show(cfg, batch_of, columns, make, kind=gpt.GPT, on_disk=None):
    """What --dry-run prints. batch_of(tokens, rows) -> a micro-batch, whose length is that of the first `columns` parts of its
    pairs; on_disk(tokens, rows, n_embd) -> bytes of the cache for the pairs that the run meets."""
    device, autocast = runs.setup(cfg)
    config = gpt.config_of(cfg.init, cfg.block_size, cfg.dropout)
    train, _, _ = data.load(cfg.data, config, cfg.half, need="pair" if columns == 3 else cfg.loss_on)
    order, steps = data.Order(train.lengths()[:, :columns].sum(1), cfg.micro_batch, cfg.seed), runs.count_steps(cfg, len(train))
    batch, half = batch_of(train, order.longest(steps * cfg.accumulate)), autocast is not contextlib.nullcontext
    found = count(cfg, config, batch, make, kind, device.type, half)
    if parallel.rank():
        return found
    print(f"{cfg.init}, on {device} in {'bfloat16 autocast' if half else 'float32'}: the longest of {steps * cfg.accumulate} "
          f"micro-batches has {len(batch.tokens):,} tokens")
    for what in ("parameters", "reference", "gradients", "optimizer state", "activations"):
        if found[what]:
            print(f"  {what:<30} {found[what] / 1e6:>10,.1f} MB")
    if on_disk is not None:
        found["disk"] = on_disk(train, order.first(steps * cfg.accumulate), config.n_embd)
        print(f"  {'reference, on disk':<30} {found['disk'] / 1e6:>10,.1f} MB")
    total, there = found["peak"] + START.get(device.type, CONTEXT), memory(device)
    print(f"  {'peak of a step':<30} {found['peak'] / 1e6:>10,.1f} MB   not all of these at a time, and what comes and goes\n"
          f"  {'with Python and torch':<30} {total / 1e6:>10,.1f} MB   of {there / 1e6:,.1f} MB: "
          f"{'fits' if total <= there else 'does not fit: try --micro-batch, --checkpoint-activations, --lora-rank'}")
    return found | {"total": total, "there": there, "fits": total <= there}


def memory(device):
    """Bytes that a new process can have: what is free on the GPU, or what Linux calls available, else all there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + CONTEXT   # the context is there already
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return available[0] if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
