"""
Files that were damaged by chance or made to harm: each is read as the scripts read it, in a process of its own.

Every kind of file that we read (READERS) is changed in many ways (DAMAGE, and CRAFTED ones for which chance is too slow). What
may come out is the content as it was, one clear line, or, where the format holds no checksum, another content of the right form.
What may not: a traceback, code that ran, memory out of proportion. studies/faults.py calls this and reports.
"""
import gzip
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
import eval_reward
import files
import lora
import model as gpt
import optim
import plots
import reference
import runs
import train_sft
from files import InputError, fingerprint

BOUND = 200e6   # bytes that reading a file may take beyond what the process had: above what the largest of them may unpack to
SPACE = 4 << 30   # bytes of address space that a reader may ask for: what asks for more would take the machine down

# ----------------------------------------------------------------------------------------------------------------------
# a function in a process of its own

class Ended(NamedTuple):
    status: int      # exit status, or minus the signal
    said: str        # what it printed to stderr
    value: object    # what the function returned, if it did
    seconds: float
    peak: int        # bytes


def forked(function, folder, number=None, delay=0.0, patience=120.0):
    """Run function() in a fork, whose imports are ours; with `number`, send it that signal after a delay. Ends as a program."""
    out, err = folder / "forked.json", folder / "forked.err"
    out.unlink(missing_ok=True)
    began, pid = time.time(), os.fork()
    if pid == 0:
        status = 1
        try:
            for fd, where in ((1, os.devnull), (2, err)):
                os.dup2(os.open(where, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), fd)
            value = function()
            out.write_text(json.dumps(value))
            status = 0
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            break
        if number and time.time() >= began + delay:
            os.kill(pid, number)
            number = None
        if time.time() > began + patience:
            os.kill(pid, signal.SIGKILL)
            patience = float("inf")
        time.sleep(0.001)
    value = json.loads(out.read_text()) if out.is_file() else None
    return Ended(os.waitstatus_to_exitcode(status), err.read_text(errors="replace"), value, time.time() - began,
                 usage.ru_maxrss * 1024)

# ----------------------------------------------------------------------------------------------------------------------
# the files as they should be

TINY = gpt.GPTConfig(block_size=16, vocab_size=32, n_layer=2, n_head=2, n_embd=8)
PAIR = {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"}
WHAT = {"model": "0" * 64, "dtype": "torch.float32"}


def tiny(seed=0):
    torch.manual_seed(seed)
    return gpt.GPT(TINY)


def config(folder, **more):
    return train_sft.Config(out=str(folder / "run"), optimizer="adamw-pma", accumulate=2, **more)


def run_of(folder, **more):
    """(Run, model, optimizer), begun."""
    cfg, model = config(folder, **more), tiny()
    optimizer, run = optim.make(cfg.optimizer, model, cfg.lr, None, 0.1, cfg.accumulate), runs.Run(cfg)
    run.begin(model, optimizer, 4, init_sha256="0" * 64, data_sha256="1" * 64, val_pairs=1, baseline_unigram_loss=2.0,
              baseline_longer_wins=0.5)
    return run, model, optimizer


def some_tokens():
    return data.Tokens(np.arange(60, dtype=np.uint16) % 32, np.arange(1, 13).reshape(4, 3).cumsum(0))


def pristine(folder):
    """One of each file, in a folder."""
    run, model, optimizer = run_of(folder)
    found = {"val_loss": 2.5, "train_eval_loss": 2.0, "val_logp_accuracy": 0.5, "val_chosen_logps": -9.0,
             "val_rejected_logps": -9.5}
    for step in range(3):
        if run.evaluation_due():
            run.evaluated("val_loss", found, "an answer\n")
        if step < 2:
            losses = [(model.hidden(torch.arange(8)[None]).square().mean(),) for _ in range(2)]
            _, norms = run.step(model, optimizer, [None, None], iter(losses))
            run.stepped(time.time(), norms, 1e-3, 4, 32, 1000, train_loss=2.0)
    run.keep_best(model.config, model.state_dict(), None)
    run.steps = 2
    run.goes_on(model, optimizer)
    run.end()
    gpt.export(model, folder / "hf")
    state = files.read_safetensors(folder / "hf/model.safetensors")
    header = (folder / "hf/model.safetensors").read_bytes()
    shutil.copytree(folder / "hf", folder / "foreign")   # as others write it: no SHA-256
    (folder / "foreign/model.safetensors").write_bytes(header.replace(b'"sha256"', b'"sha255"'))
    for name, zipped in (("zip", True), ("legacy", False)):
        (folder / name).mkdir()
        shutil.copy(folder / "hf/config.json", folder / name)
        torch.save(state, folder / name / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    model = tiny()
    lora.add_lora(model, 2, bias="all")
    lora.save_adapter(model, folder / "adapter.pt")
    scorer = gpt.reward_model(tiny())
    files.write_checkpoint(folder / "reward.pt", {"model": scorer.state_dict(), "model_config": vars(TINY)})
    lines = "".join(json.dumps({key: text.replace("4", str(i)) for key, text in PAIR.items()}) + "\n" for i in range(50, 80))
    (folder / "pairs.jsonl").write_text(lines)
    packed(lines.encode)(folder)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"What is {i}?"}) + "\n" for i in range(20)))


def read_cache(folder):
    os.environ["HF_HOME"] = str(folder / "cache")
    cache = reference.Cache(some_tokens(), WHAT, tiny().wte.weight.detach())
    model = tiny().requires_grad_(False)
    cache.fill(range(4), 4, reference.live(model), torch.device("cpu"), lambda text: None)
    logps, states, _ = cache(data.pair_batch(some_tokens(), range(4)))
    return fingerprint([logps, states])


def read_tokens(folder):
    os.environ["HF_HOME"] = str(folder / "cache")
    tokens, cut = data.tokenize([data.Pair(*[PAIR["chosen"][:-2], " 4", " 5"])], 2048, 256)
    return fingerprint([torch.from_numpy(tokens.flat.astype(np.int64)), torch.from_numpy(tokens.ends), dict(cut)])


def resumed(folder):
    cfg = runs.parse(train_sft.Config, ["--out", str(folder / "run"), "--resume"])
    model = tiny()
    optimizer, run = optim.make(cfg.optimizer, model, cfg.lr, cfg.betas, 0.1, cfg.accumulate), runs.Run(cfg)
    run.begin(model, optimizer, 4, init_sha256="0" * 64, data_sha256="1" * 64)
    logs = [(folder / "run" / name).read_text() for name in runs.LOGS]
    return fingerprint([model.state_dict(), optimizer.state_dict(), run.at, logs])


def loaded(name, kind=gpt.GPT):
    return lambda folder: fingerprint(dict(gpt.load(str(folder / name), kind=kind).state_dict()))


def adapted(folder):
    return fingerprint(dict(lora.load_adapter(tiny(), folder / "adapter.pt").state_dict()))


def pairs(name):
    return lambda folder: fingerprint([[list(p) for p in data.read_pairs(folder / name)[0]]])


def drawn(folder):
    plots.main([str(folder / "run")])
    return fingerprint(plots.read(folder / "run")[1])


# name of a target: (the file, who reads it, whether a change can show: else other content of the right form is allowed)
READERS = {
    "last.pt": ("run/last.pt", resumed, True),
    "best.pt": ("run/best.pt", loaded("run"), True),
    "reward model": ("reward.pt", loaded("reward.pt", gpt.RewardModel), True),
    "adapter.pt": ("adapter.pt", adapted, True),
    "exported safetensors": ("hf/model.safetensors", loaded("hf"), False),   # its header's own metadata may change unseen
    "foreign safetensors": ("foreign/model.safetensors", loaded("foreign"), False),
    "foreign .bin": ("zip/pytorch_model.bin", loaded("zip"), False),
    "foreign .bin, old": ("legacy/pytorch_model.bin", loaded("legacy"), False),
    "foreign config.json": ("hf/config.json", loaded("hf"), False),
    "run's config.json": ("run/config.json", resumed, False),
    "metrics.jsonl": ("run/metrics.jsonl", drawn, False),
    "metrics.jsonl, resumed": ("run/metrics.jsonl", resumed, True),
    "pairs .jsonl": ("pairs.jsonl", pairs("pairs.jsonl"), False),
    "pairs .jsonl.gz": ("pairs.jsonl.gz", pairs("pairs.jsonl.gz"), True),
    "prompts .jsonl": ("prompts.jsonl", lambda folder: eval_reward.read_prompts(folder / "prompts.jsonl"), False),
    "token cache": ("cache/nanopost/tokens/*.npz", read_tokens, True),
    "reference's log-probs": ("cache/nanopost/reference/*/logps.npz", read_cache, True),
    "reference's states": ("cache/nanopost/reference/*/states.f16", read_cache, True),
}

# ----------------------------------------------------------------------------------------------------------------------
# damage by chance

def cut_off(raw, draw):
    return raw[:draw.randrange(len(raw))]


def flip(raw, draw, bits=1):
    raw = bytearray(raw)
    for _ in range(bits):
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    return bytes(raw)


def overwrite(raw, draw):
    at, n = draw.randrange(len(raw)), draw.randint(1, 64)
    return raw[:at] + draw.randbytes(n) + raw[at + n:]


def zeros(raw, draw):
    at, n = draw.randrange(len(raw)), draw.randint(1, 512)
    return raw[:at] + bytes(min(n, len(raw) - at)) + raw[at + n:]


def lose(raw, draw):
    at = draw.randrange(len(raw))
    return raw[:at] + raw[at + draw.randint(1, 64):]


def repeat(raw, draw):
    at, n = draw.randrange(len(raw)), draw.randint(1, 256)
    return raw[:at + n] + raw[at:]


DAMAGE = {"cut off": cut_off, "a bit flipped": flip, "20 bits flipped": lambda raw, draw: flip(raw, draw, 20),
          "bytes overwritten": overwrite, "bytes zeroed": zeros, "bytes lost": lose, "bytes repeated": repeat,
          "bytes appended": lambda raw, draw: raw + draw.randbytes(draw.randint(1, 64)),
          "all random": lambda raw, draw: draw.randbytes(len(raw)), "empty": lambda raw, draw: b""}

# ----------------------------------------------------------------------------------------------------------------------
# files made to harm: name -> (target, function that changes the folder, words that the line must hold; None: it loads)

class Evil:
    def __init__(self, harm):
        self.harm = harm

    def __reduce__(self):
        return os.mkdir, (str(self.harm),)


def checkpoint(name, change, sign=True):
    """A torch file of ours, changed in place; sign: by someone who gives it its new SHA-256."""
    def craft(folder):
        found = torch.load(folder / name, weights_only=True)
        del found["sha256"]
        change(found, folder)
        torch.save({**found, "sha256": fingerprint(found) if sign else "0" * 64}, folder / name)
    return craft


def old_format(folder):
    torch.save({"x": Evil(folder / "harm"), "y": torch.ones(2)}, folder / "legacy/pytorch_model.bin",
               _use_new_zipfile_serialization=False)


def evil(name, key):
    return checkpoint(name, lambda found, folder: found.update({key: Evil(folder / "harm")}), sign=False)


def tensor(key, make, sign=True):
    """best.pt with another tensor under this name."""
    return checkpoint("run/best.pt", lambda found, folder: found["model"].update({key: make(found["model"].get(key))}), sign)


def last(change, sign=True):
    """last.pt, changed in place."""
    return checkpoint("run/last.pt", lambda found, folder: change(found), sign)


def best(change, sign=True):
    return checkpoint("run/best.pt", lambda found, folder: change(found), sign)


def header(change, name="foreign/model.safetensors"):
    """A safetensors file with another header."""
    def craft(folder):
        raw = (folder / name).read_bytes()
        n, = struct.unpack("<Q", raw[:8])
        head = json.loads(raw[8:8 + n])
        head = json.dumps(change(head) or head).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(head)) + head + raw[8 + n:])
    return craft


def setting(name, key, value):
    def craft(folder):
        found = json.loads((folder / name).read_text())
        where = found["flags"] if "flags" in found and key in found["flags"] else found
        where[key] = value
        (folder / name).write_text(json.dumps(found))
    return craft


def write(name, raw):
    return lambda folder: (folder / name).write_bytes(raw(folder) if callable(raw) else raw)


def packed(raw):
    return lambda folder: (folder / "pairs.jsonl.gz").write_bytes(gzip.compress(raw(), 1))


def bomb(folder):
    """best.pt as a compressed archive, which unpacks to a hundred times its size."""
    with zipfile.ZipFile(folder / "run/best.pt") as old:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(folder / "run/best.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name, raw in entries.items():
            new.writestr(name, raw + bytes(3 * 10 ** 8 if name.endswith("data/0") else 0))


def outside(folder):
    """best.pt whose entries would lie outside of a folder that it was unpacked in."""
    with zipfile.ZipFile(folder / "run/best.pt") as old:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(folder / "run/best.pt", "w") as new:
        for name, raw in entries.items():
            new.writestr("../../harm/" + name, raw)


def cyclic(found):
    found["loop"] = [1]
    found["loop"].append(found["loop"])


def lists(found):
    """7 levels of 300 times the level below: a few kilobytes, and 300^7 to look at."""
    tree = [0] * 300
    for _ in range(6):
        tree = [tree] * 300
    found["tree"] = tree


def two_ends(folder):
    """best.pt, and behind it another archive's list, to which only the zip64 record's place says which one counts."""
    raw = (folder / "run/best.pt").read_bytes()
    (folder / "run/best.pt").write_bytes(raw[:-42] + raw[-98:-42] + raw[-42:])


def nested(found):
    for _ in range(200):
        found["model"] = {"model": found["model"]}


def first(head):
    return next(value for key, value in head.items() if key != "__metadata__")


BIG, BIG_TENSOR = 2 ** 40, torch.zeros(10 ** 4)
CRAFTED = {
    "pickle that runs code": ("best.pt", evil("run/best.pt", "model"), "holds code, posix.mkdir"),
    "pickle that runs code, resumed": ("last.pt", evil("run/last.pt", "at"), "holds code, posix.mkdir"),
    "pickle that runs code, adapter": ("adapter.pt", evil("adapter.pt", "rank"), "holds code, posix.mkdir"),
    "bare pickle that runs code": ("foreign .bin", write("zip/pytorch_model.bin",
                                                         lambda folder: pickle.dumps({"x": Evil(folder / "harm")}, 2)), ""),
    "old format that runs code": ("foreign .bin, old", old_format, "holds code, posix.mkdir"),
    "compressed archive": ("best.pt", bomb, "compressed"),
    "paths with ..": ("best.pt", outside, "cut off, damaged"),
    "wrong shape": ("best.pt", tensor("ln_f.bias", lambda t: torch.zeros(9)), "ln_f.bias: expected shape (8,), found (9,)"),
    "wrong dtype": ("best.pt", tensor("ln_f.bias", lambda t: t.long()), "found ln_f.bias of torch.int64"),
    "complex numbers": ("best.pt", tensor("ln_f.bias", lambda t: t.to(torch.complex64)), "found ln_f.bias of torch.complex64"),
    "not finite": ("best.pt", tensor("ln_f.bias", lambda t: t / 0), "ln_f.bias holds numbers that are not finite"),
    "a tensor too few": ("best.pt", best(lambda c: c["model"].pop("ln_f.bias")), "ln_f.bias: expected shape (8,), found none"),
    "a tensor too many": ("best.pt", tensor("ln_g.bias", lambda t: torch.zeros(8)), "ln_g.bias: expected shape none, found (8,)"),
    "one number as a huge tensor": ("best.pt", tensor("ln_f.bias", lambda t: torch.zeros(1).expand(BIG), False), "does not hold"),
    "sparse tensor": ("best.pt", tensor("ln_f.bias", lambda t: torch.zeros(BIG, layout=torch.sparse_coo), False),
                      "does not hold"),
    "meta tensor": ("best.pt", tensor("ln_f.bias", lambda t: torch.empty(BIG, device="meta"), False), "does not hold"),
    "a list that holds itself": ("best.pt", best(cyclic, False), "nested too deeply"),
    "nested 200 deep": ("best.pt", best(nested), "nested too deeply"),
    "a billion layers": ("best.pt", best(lambda c: c["model_config"].update(n_layer=10 ** 9)), "do not make 1000000000 layers"),
    "half a layer": ("best.pt", best(lambda c: c["model_config"].update(n_layer=0.5)), "whole numbers above 0"),
    "sizes of another type": ("best.pt", best(lambda c: c.update(model_config=[16, 32])), "model_config to be a dictionary"),
    "tensors of another type": ("best.pt", best(lambda c: c.update(model=[1, 2])), "expected a dictionary of tensors"),
    "lists of lists of lists": ("best.pt", best(lists, False), "nested too deeply"),
    "one storage for a thousand tensors": ("best.pt", best(lambda c: c["model"].update(
        {str(i): BIG_TENSOR for i in range(1000)}), False), "does not hold"),
    "20,000 layers of one number": ("best.pt", best(lambda c: c.update(
        model=c["model"] | {str(i): torch.zeros(1) for i in range(20000)}, model_config=c["model_config"] | {"n_layer": 20000})),
        "do not make 20000 layers"),
    "a zip archive with two ends": ("best.pt", two_ends, "a zip archive without its end"),
    "not signed": ("best.pt", best(lambda c: None, False), "damaged: the SHA-256"),
    "resume: wrong shape": ("last.pt", last(lambda c: c["model"].update({"ln_f.bias": torch.zeros(1)})),
                            "model.ln_f.bias: expected torch.float32 (8,), found torch.float32 (1,)"),
    "resume: not finite": ("last.pt", last(lambda c: c["model"]["ln_f.bias"].fill_(float("nan"))), "model.ln_f.bias: not finite"),
    "resume: a moment of another shape": ("last.pt", last(lambda c: c["optimizer"][0].update(m=torch.zeros(3))),
                                          "optimizer.0.m: expected"),
    "resume: no moment": ("last.pt", last(lambda c: c["optimizer"][0].pop("v")), "optimizer.0 has no v"),
    "resume: a parameter too few": ("last.pt", last(lambda c: c["optimizer"].pop(3)), "optimizer has no 3"),
    "resume: moments in another order": ("last.pt", last(lambda c: c.update(optimizer={n - i: kept for n in [len(
        c["optimizer"]) - 1] for i, kept in c["optimizer"].items()})), "optimizer.0.m: expected"),
    "resume: generators of another size": ("last.pt", last(lambda c: c["rng"][0].update(cpu=torch.zeros(7, dtype=torch.uint8))),
                                           "rng.cpu: expected torch.uint8 (5056,), found torch.uint8 (7,)"),
    "resume: generators that are none": ("last.pt", last(lambda c: c["rng"][0]["cpu"].fill_(255)), "generators"),
    "resume: counters below 0": ("last.pt", last(lambda c: c["at"].update(step=-5)), "at: a counter that is none"),
    "resume: half a step": ("last.pt", last(lambda c: c["at"].update(step=2.5)), "at.step: expected 0, found '2.5'"),
    "resume: seconds that are none": ("last.pt", last(lambda c: c["at"].update(seconds=float("nan"))), "a counter that is none"),
    "resume: endless logs": ("last.pt", last(lambda c: c["logs"]["metrics.jsonl"].update(bytes=float("inf"))), "logs.metrics"),
    "resume: counters as text": ("last.pt", last(lambda c: c["at"].update(step="2")), "at.step: expected 0, found '2'"),
    "resume: best.pt in its place": ("last.pt", lambda folder: shutil.copy(folder / "run/best.pt", folder / "run/last.pt"),
                                     "it has no at, best"),
    "adapter of rank 10^9": ("adapter.pt", checkpoint("adapter.pt", lambda c, _: c.update(rank=10 ** 9)), "LoRA rank: expected"),
    "adapter of another base": ("adapter.pt", checkpoint("adapter.pt", lambda c, _: c.update(base_sha256="0" * 64)),
                                "belongs to another base"),
    "adapter, not finite": ("adapter.pt", checkpoint("adapter.pt", lambda c, _: c["adapter"]["ln_f.bias"].fill_(float("inf"))),
                            "expected finite tensors of an adapter"),
    "reward model without a head": ("reward model", checkpoint("reward.pt", lambda c, _: c["model"].pop("reward_head.weight")),
                                    "is a language model"),
    "header of 2^63 bytes": ("foreign safetensors", write("foreign/model.safetensors", b"\xff" * 7 + b"\x7f{}"), "a header of"),
    "header longer than the file": ("foreign safetensors", write("foreign/model.safetensors", struct.pack("<Q", 10 ** 6) + b"{}"),
                                    "a header of 1000000 bytes in a file of 10"),
    "tensors in one place": ("foreign safetensors", header(lambda head: {key: first(head) for key in head}), "damaged"),
    "a thousand tensors in one place": ("foreign safetensors", header(lambda head: {str(i): first(head) for i in range(1000)}),
                                        "damaged"),
    "shape of 2^62": ("foreign safetensors", header(lambda head: {"wte.weight": {**first(head), "shape": [2 ** 62, 0],
                                                                                 "data_offsets": [0, 0]}}), ""),
    "shape of 10^5 dimensions": ("foreign safetensors", header(lambda head: first(head).update(shape=[1] * 10 ** 5)), ""),
    "offsets behind the end": ("foreign safetensors", header(lambda head: first(head).update(data_offsets=[0, BIG])), "damaged"),
    "a dtype of the future": ("foreign safetensors", header(lambda head: first(head).update(dtype="F3")), "F3"),
    "header nested 10^5 deep": ("foreign safetensors", write("foreign/model.safetensors", struct.pack("<Q", 2 * 10 ** 5)
                                                             + b"[" * 10 ** 5 + b"]" * 10 ** 5), "header"),
    "10^5 dimensions of 2^62": ("foreign safetensors", header(lambda head: first(head).update(shape=[2 ** 62] * 10 ** 5)),
                                "header"),
    "header of 20 MB": ("foreign safetensors", write("foreign/model.safetensors", lambda _: struct.pack("<Q", 2 * 10 ** 7)
                                                     + b"[" + b"[]," * 6666666 + b"]" * 2), "a header of 20000000 bytes"),
    "metadata of another type": ("foreign safetensors", header(lambda head: {**head, "__metadata__": 7}), "header"),
    "a SHA-256 that is wrong": ("exported safetensors", header(lambda head: head["__metadata__"].update(sha256="0" * 64),
                                                               "hf/model.safetensors"), "SHA-256"),
    "config of a billion layers": ("foreign config.json", setting("hf/config.json", "n_layer", 10 ** 9), "do not make"),
    "config of 0 heads": ("foreign config.json", setting("hf/config.json", "n_head", 0), "whole numbers above 0"),
    "config of another model": ("foreign config.json", setting("hf/config.json", "model_type", "llama"), "model_type 'gpt2'"),
    "config of 10^400 channels": ("foreign config.json", setting("hf/config.json", "n_embd", 10 ** 400), "whole numbers above 0"),
    "config nested 10^5 deep": ("foreign config.json", write("hf/config.json", b'{"a":' * 10 ** 5), "not JSON"),
    "config in another encoding": ("foreign config.json", write("hf/config.json", "{}".encode("utf-16")), "not JSON"),
    "flags: steps as text": ("run's config.json", setting("run/config.json", "steps", "many"), "steps is 'many'"),
    "flags: another script": ("run's config.json", setting("run/config.json", "script", "train_dpo.py"),
                              "a run of train_dpo.py, not of train_sft.py"),
    "flags: an older version": ("run's config.json", setting("run/config.json", "format", 0), "its format is 0, now"),
    "flags: a list": ("run's config.json", setting("run/config.json", "flags", [1]), "its flags are not there"),
    "flags: another optimizer": ("run's config.json", setting("run/config.json", "optimizer", "sgd"), "optimizer"),
    "flags: out somewhere else": ("run's config.json", setting("run/config.json", "out", "../../harm"), None),
    "an event that is a list": ("metrics.jsonl", write("run/metrics.jsonl", b"[1]\n"), "jsonl:1: expected a JSON object"),
    "an event without counters": ("metrics.jsonl", write("run/metrics.jsonl", b'{"val_loss": 1}\n'), "samples"),
    "an event of text": ("metrics.jsonl", write("run/metrics.jsonl", b'{"samples": 1, "val_loss": {"a": 1}}\n'), ""),
    "a line of 20 MB": ("pairs .jsonl", write("pairs.jsonl", lambda _: b"x" * 2 * 10 ** 7), "jsonl:1: expected a row"),
    "a line that is not UTF-8": ("pairs .jsonl", write("pairs.jsonl", b'{"chosen": "\xff"}\n'), "pairs.jsonl:1: expected UTF-8"),
    "a line nested 10^5 deep": ("pairs .jsonl", write("pairs.jsonl", b"[" * 10 ** 5), "jsonl:1: expected a JSON object"),
    "a row without rejected": ("pairs .jsonl", write("pairs.jsonl", json.dumps({"chosen": "x"}).encode()), '"rejected"'),
    "a row of numbers": ("pairs .jsonl", write("pairs.jsonl", b'\n\n{"chosen": 1, "rejected": 2}\n'), "pairs.jsonl:3: "),
    "a row without a turn": ("pairs .jsonl", write("pairs.jsonl", b'{"chosen": "a", "rejected": "b"}\n'), "turn marker"),
    "one line that unpacks to 300 MB": ("pairs .jsonl.gz", packed(lambda: bytes(3 * 10 ** 8)), "a line of over"),
    "rows that unpack to 300 MB": ("pairs .jsonl.gz", packed(lambda: (b" " * 10 ** 6 + b"\n") * 300), "unpacks to over"),
    "no .gz": ("pairs .jsonl.gz", write("pairs.jsonl.gz", b"hello"), "cut off or damaged"),
    "a prompt that is a number": ("prompts .jsonl", write("prompts.jsonl", b'{"prompt": 7}\n'), "prompts.jsonl:1: "),
}

# ----------------------------------------------------------------------------------------------------------------------
# one file after the other

def read(target, folder):
    """What a reader makes of its file: {"content": ...} or {"refused": the line}."""
    resource.setrlimit(resource.RLIMIT_AS, (SPACE + memory()[0], resource.RLIM_INFINITY))
    try:
        return {"content": READERS[target][1](folder)}
    except InputError as e:
        return {"refused": str(e)}
    except OSError as e:   # as runs.one_line prints it
        return {"refused": f"{e.filename}: {e.strerror}"}
    except ValueError as e:
        if target != "metrics.jsonl":   # plots.py imports nothing of ours, and prints its ValueErrors
            raise
        return {"refused": str(e)}


def memory():
    """Bytes of address space and of memory that this process has (Linux)."""
    return [int(pages) * resource.getpagesize() for pages in Path("/proc/self/statm").read_text().split()[:2]]


def judged(target, what, change, folder, scratch, words=""):
    """One file changed by change(a copy of the folder), and read: {"target", "what", "ended", "wrong": a text, or None}."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(folder, scratch / "copy")
    whole = json.loads((folder.parent / "whole.json").read_text())[target]
    change(scratch / "copy")
    file = next((scratch / "copy").glob(READERS[target][0]))
    before = memory()[1]
    ended = forked(lambda: read(target, scratch / "copy"), scratch)
    found = {"target": target, "what": what, "more memory": max(0, ended.peak - before), "size": file.stat().st_size}
    refused = (ended.value or {}).get("refused")
    if ended.status or "Traceback" in ended.said:
        wrong = f"status {ended.status}: {ended.said[-600:]}"
    elif (scratch / "copy/harm").exists():
        wrong = "code of the file was run"
    elif found["more memory"] > BOUND:
        wrong = f"{found['more memory'] / 1e6:.0f} MB for a file of {found['size'] / 1e6:.1f} MB"
    elif refused is not None and "allocate" in refused and target != "foreign .bin, old":   # that format says only how much
        wrong = f"it asked for all there is: {refused[:300]}"
    elif refused is not None and ("\n" in refused.strip() or len(refused) > 700):
        wrong = f"no clear line: {refused[:300]!r}"
    elif refused is None and words:
        wrong = "it was not refused"
    elif refused is not None and (words is None or words not in refused):
        wrong = f"expected {words!r} in: {refused}"
    elif refused is None and READERS[target][2] and ended.value["content"] != whole:
        wrong = "other content was taken for right"
    else:
        wrong = None
    same = refused is None and ended.value["content"] == whole if wrong is None else None
    return found | {"wrong": wrong, "ended": "refused" if refused is not None else "as it was" if same else "other content"}


def prepare(folder):
    """The files, and what each reader makes of them as they are."""
    (folder / "whole").mkdir(parents=True)
    pristine(folder / "whole")
    read_cache(folder / "whole")
    read_tokens(folder / "whole")
    whole = {}
    for target in READERS:
        shutil.copytree(folder / "whole", folder / "copy")
        ended = forked(lambda target=target: read(target, folder / "copy"), folder)
        assert ended.status == 0 and "content" in ended.value, (target, ended)
        whole[target] = ended.value["content"]
        shutil.rmtree(folder / "copy")
    (folder / "whole.json").write_text(json.dumps(whole))


def chance(folder, target, number, seed):
    """The `number`-th damage by chance to a target's file."""
    draw = random.Random(f"{seed} {target} {number}")
    what = list(DAMAGE)[number % (len(DAMAGE) - 1)] if number % 40 else "empty"

    def change(copy):
        for file in copy.glob(READERS[target][0]):
            file.write_bytes(DAMAGE[what](file.read_bytes(), draw))
    return judged(target, what, change, folder / "whole", folder / f"scratch-{os.getpid()}")


def crafted(folder, what):
    target, change, words = CRAFTED[what]
    return judged(target, what, change, folder / "whole", folder / f"scratch-{os.getpid()}", words)
