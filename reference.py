"""
DPO's frozen reference: what it says of every training pair.

A reference is a function from a micro-batch of B pairs to its log-probabilities of the responses (2B,), its final hidden states
at the scored places (S, C), and its head (V, C). There are two kinds.

    live(model)   a model that runs beside the policy; with LoRA it is the policy itself, adapters off
    Cache         computed once, before the policy moves, and kept on disk, for this run and the next. DPO needs two numbers a
                  pair and no hidden states. CDPO wants the reference's distribution over the vocabulary at every scored place:
                  kept is the hidden state, C numbers in fp16, from which it is one product with the frozen head away

A module of its own, since a training script would otherwise hold it: files, keys and checks.

A cache has room for the whole data set, but only pairs that a run meets are computed (states.f16 is a sparse file). A pair counts
once logps.npz, which is replaced whole and last, has numbers for it: a killed run leaves nothing that is believed by mistake.
"""
import contextlib
import hashlib
import io
import json
import os
import shutil
import time
import zlib

import numpy as np
import torch

import data
import lora
import losses
from files import InputError, cache_folder, write_atomically

# Of a log-probability: above rounding, below what another model says.
SLACK = {"torch.float32": 1e-4, "torch.bfloat16": 1e-2, "torch.float16": 1e-2}


def live(model):
    def reference(batch):
        with lora.adapters_off(model) if hasattr(model, "lora") else contextlib.nullcontext(), torch.no_grad():
            hidden, head = batch.hidden_and_head(model)
            return losses.response_logps(hidden, head, batch), hidden, head
    return reference


def disk_bytes(tokens, rows, width):
    """Bytes that these pairs take on disk, with hidden states of this width (0: without)."""
    return 8 * len(rows) + 2 * width * int(tokens.lengths()[rows, 1:].sum())


class Cache:
    """tokens: data.Tokens, the training pairs. what: all else that the numbers depend on, a dict of plain values. head: the
    reference's, (V, C), if hidden states are wanted."""

    def __init__(self, tokens, what, head=None):
        self.tokens, self.head, width = tokens, head, 0 if head is None else head.size(1)
        self.what = {**what, "data": data.sha256(tokens), "states": width}
        self.folder = cache_folder() / "reference" / hashlib.sha256(json.dumps(self.what).encode()).hexdigest()[:32]
        self.advice = f"delete {self.folder}, or use --reference live"
        self.ends = np.cumsum(tokens.lengths()[:, 1:]).reshape(-1, 2)   # where each response's states end; all stand in a line
        self.logps, self.states = np.full((len(tokens), 2), np.nan, np.float32), None
        self.sums = np.zeros(len(tokens), np.uint32)   # CRC-32 of each pair's states, checked whenever they are read
        if (self.folder / "logps.npz").is_file():
            self._read(self.folder / "logps.npz")
        if width:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "states.f16", "ab") as f:
                f.truncate(2 * width * int(self.ends[-1, 1]))
            self.states = np.memmap(self.folder / "states.f16", np.float16, "r+", shape=(int(self.ends[-1, 1]), width))

    def _read(self, path):
        found = path.read_bytes()
        if hashlib.sha256(found[32:]).digest() != found[:32]:
            raise InputError(f"{path}: damaged: {self.advice}")
        with np.load(io.BytesIO(found[32:]), allow_pickle=False) as f:
            what, self.logps, self.sums = json.loads(str(f["what"])), f["logps"], f["sums"]
        if what != self.what:
            other = ", ".join(key for key in self.what if what.get(key) != self.what[key])
            raise InputError(f"{path}: made for other {other}: {self.advice}")
        states, expected = self.folder / "states.f16", 2 * self.what["states"] * int(self.ends[-1, 1])
        if expected and not (states.is_file() and states.stat().st_size == expected):
            raise InputError(f"{states}: not there, or not of {expected} bytes: {self.advice}")

    def need(self, rows):
        """The pairs among these that are not there yet, the shortest first, and the bytes that they will take."""
        lengths = self.tokens.lengths()
        missing = np.unique(rows)
        missing = missing[np.isnan(self.logps[missing, 0])]
        missing = missing[np.argsort(lengths[missing].sum(1), kind="stable")]
        return missing, disk_bytes(self.tokens, missing, self.what["states"])

    def fill(self, rows, size, reference, device, say):
        """Compute what is missing of these pairs, `size` at a time, with a live reference. What was there is held against it on a
        few pairs. say: takes a line of text."""
        if (self.folder / "logps.npz").is_file():   # another process may have been here
            self._read(self.folder / "logps.npz")
        missing, need = self.need(rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        say(f"reference: {len(np.unique(rows)):,} pairs in {self.folder}, " + (
            f"{len(missing):,} of them to compute, {need / 1e6:,.2f} MB" if len(missing) else "all of them there"))
        if need > free / 2:
            raise InputError(f"{self.folder}: the reference's cache would take {need / 1e9:.1f} GB, above half of the "
                             f"{free / 1e9:.1f} GB that are free: use --reference live")
        self._check(np.random.default_rng().permutation(np.setdiff1d(rows, missing))[:size], reference, device)
        written = time.time()
        for done in range(size, len(missing) + size, size):
            batch = data.pair_batch(self.tokens, missing[done - size:done])
            logps, hidden, _ = reference(batch.to(device))
            self.logps[batch.rows] = logps.float().cpu().view(2, -1).T
            if self.states is not None:
                for span, states in zip(self._spans(batch.rows), hidden.half().cpu().split(batch.lengths.tolist())):
                    self.states[span] = states
                self.sums[batch.rows] = [self._sum(row) for row in batch.rows]
            if done >= len(missing) or time.time() > written + 60:
                self._write()
                written = time.time()
                say(f"reference: {min(done, len(missing)):,} of {len(missing):,} pairs computed")

    def _check(self, rows, reference, device):
        if len(rows):
            batch = data.pair_batch(self.tokens, rows).to(device)
            (logps, *_), (cached, *_) = reference(batch), self(batch)
            wrong = (cached - logps).abs().max() / logps.abs().max()
            if not wrong <= SLACK[self.what["dtype"]]:
                raise InputError(f"{self.folder}: its log-probabilities differ from the reference's by {wrong:.2%}: "
                                 f"{self.advice}")

    def _write(self):
        if self.states is not None:
            self.states.flush()
        blob = io.BytesIO()
        np.savez(blob, what=json.dumps(self.what), logps=self.logps, sums=self.sums)
        mine = self.folder / f"logps.{os.getpid()}.npz"   # another run may be writing as well
        write_atomically(mine, hashlib.sha256(blob.getbuffer()).digest(), blob.getbuffer())
        os.replace(mine, self.folder / "logps.npz")

    def _sum(self, row):
        return zlib.crc32(b"".join(self.states[span].tobytes() for span in self._spans([row])))

    def _spans(self, rows):
        """Where the states of these pairs' responses stand: the chosen ones, then the rejected ones."""
        lengths = self.tokens.lengths()[rows, 1:]
        return [slice(end - n, end) for ends, lengths in zip(self.ends[rows].T, lengths.T) for end, n in zip(ends, lengths)]

    def __call__(self, batch):
        """NaN for pairs that are not there."""
        logps = torch.from_numpy(self.logps[batch.rows].T.reshape(-1)).to(batch.tokens.device)
        if self.states is None:
            return logps, None, None
        for row in batch.rows:
            if self.sums[row] != self._sum(row) and not np.isnan(self.logps[row, 0]):
                raise InputError(f"{self.folder}/states.f16: the hidden states of pair {row} are damaged: {self.advice}")
        states = np.concatenate([self.states[span] for span in self._spans(batch.rows)])
        return logps, torch.from_numpy(states).to(self.head.device, self.head.dtype), self.head
