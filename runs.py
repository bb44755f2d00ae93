"""
What every script needs around its loop: flags from a dataclass, device and seed, the run folder, metrics, checkpoints, resume,
and the progress line.

A run that is killed, at any moment, goes on with --resume to what it would have become: bit for bit on a CPU. last.pt is written
whole or not at all and says how long the other files were then; what came after it is forgotten and done again.

A run folder holds config.json (every flag, versions, counts), metrics.jsonl (one object an event, append-only), last.pt (to
resume from: what trains, the optimizer, the generators), best.pt (what the next stage loads: a whole GPT), with --keep-every
step-N.pt (the same of every N steps), with LoRA adapter.pt (the adapters of best.pt alone), samples.txt and pictures. One process
writes a folder at a time.
"""
import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import inspect
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy
import tiktoken
import torch

import optim
import parallel
from files import (InputError, append, named, not_finite, read_checkpoint, read_json, reason, unlike, write_atomically,
                   write_checkpoint)

FORMAT = 1   # of a run: raised when a run that was begun before could not go on as it began


@dataclass
class Config:
    """The flags that the training scripts share. Each comment is the flag's help text."""
    out: str = "runs/run"                     # the run folder
    overwrite: bool = False                   # replace the run that is in --out
    resume: bool = False                      # go on with the run in --out, with its own flags
    init: str = "mini"   # mini, gpt2[-medium|-large|-xl], random:SIZE, a run folder, a checkpoint, a Hugging Face GPT-2
    data: str = "minihh"                      # minihh, hh-rlhf[/SUBSET], alpaca, a file or folder (README: Data), or TRAIN,VALID
    half: Literal["all", "sft", "preference"] = "all"   # which half of the training pairs; the two halves share no dialogue
    seed: int = 1                             # of weights, data order, dropout and samples
    device: str = "auto"                      # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"   # autocast; auto is bfloat16 on a GPU that has it
    dropout: float = 0.0                      # in every block and after the embedding
    steps: int | None = None                  # accumulated steps; wins over --epochs
    epochs: float = 1.0                       # passes over the training pairs
    stop_at: int | None = None                # stop after this step as if interrupted, to be resumed
    micro_batch: int = 32                     # examples in one forward and backward pass, of each process
    accumulate: int = 1                       # micro-batches per step
    block_size: int | None = None             # context in tokens; the model's own unless given
    optimizer: str = "adamw"                  # a name in optim.OPTIMIZERS
    lr: float = 1e-3                          # peak learning rate
    betas: tuple[float, ...] | None = None    # comma-separated; the optimizer's own unless given
    weight_decay: float = 0.1                 # on matrices only
    schedule: Literal["constant", "linear", "cosine"] = "cosine"   # after the warm-up; the last two end at a tenth of --lr
    warmup: int = 0                           # steps of linear rise
    grad_clip: float = 1.0                    # largest norm of an update's gradient; 0: no clipping
    lora_rank: int = 0                        # train adapters of this rank beside frozen weights (lora.py); 0: train the weights
    lora_alpha: float | None = None           # the adapters' scale is alpha / rank; twice the rank unless given
    lora_dropout: float = 0.0                 # on the adapters' input
    lora_bias: Literal["none", "lora_only", "all"] = "none"   # biases that train too: of adapted layers, or all
    eval_every: int = 100                     # steps between evaluations; also at step 0 and at the end
    eval_samples: int = 200                   # validation pairs an evaluation looks at
    eval_answers: int = 32                    # answers an evaluation samples; 0: none, which is quicker
    save_every: int | None = None             # steps between checkpoints; at every evaluation unless given
    keep_every: int | None = None             # steps between models that stay, step-100.pt and so on; none unless given
    dry_run: bool = False                     # print how much memory the run needs, whether it fits, and end
    checkpoint_activations: bool = False      # keep only the blocks' inputs and compute the rest again: less memory, slower
    log_every: int = 10                       # steps between lines of metrics and of progress
    variance_every: int | None = None         # steps between probes of the noise in the updates; none unless given

# ----------------------------------------------------------------------------------------------------------------------
# flags

def parse(Config, argv=None):
    """A Config from the command line: one --flag per field. With --resume the flags come from the run's config.json, and those
    typed beside it must agree (stop-at may change)."""
    parser = _Parser(description=inspect.getmodule(Config).__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
                     allow_abbrev=False)
    comments = dict(re.findall(r"^    (\w+):.*?#\s*(.*)$", "\n".join(map(inspect.getsource, Config.__mro__[-2::-1])), re.M))
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        kind, options = hints[field.name], {}
        if isinstance(kind, types.UnionType):   # X | None
            kind = typing.get_args(kind)[0]
        if kind is bool:
            options = {"action": "store_true"}
        elif typing.get_origin(kind) is Literal:
            options = {"choices": typing.get_args(kind)}
        elif typing.get_origin(kind) is tuple:
            options = {"type": _listed(typing.get_args(kind)[0]), "metavar": "X,Y,..."}
        else:
            options = {"type": kind, "metavar": kind.__name__.upper()}
        default = "" if kind is bool or field.default is None else f" [{field.default}]"
        text = (comments[field.name] + default).replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), help=text, **options)
    typed = vars(parser.parse_args(argv))
    cfg = Config(**typed)
    if getattr(cfg, "resume", False):
        stored = Run(cfg).stored_flags()
        cfg = Config(**{**stored, "overwrite": False, "stop_at": None, "dry_run": False, "out": cfg.out,
                        **{key: typed[key] for key in MAY_CHANGE if key in typed}})
        check_same(cfg.out, stored, {key: value for key, value in typed.items() if key not in MAY_CHANGE})
    return cfg


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; -h lists the flags")


def _listed(kind):
    def parse(text):
        try:
            return tuple(kind(x) for x in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected numbers with commas between them, found {text!r}") from None
    return parse


MAY_CHANGE = ("resume", "overwrite", "stop_at", "out", "dry_run")   # flags in which a resumed run may differ


def check_same(out, stored, given):
    differ = [f"--{k.replace('_', '-')} was {stored.get(k)}, now {v}" for k, v in given.items() if stored.get(k) != v]
    if differ:
        raise InputError(f"{out} cannot be resumed with other flags: {'; '.join(differ)}")


def validate(cfg):
    """What argparse cannot see: names and numbers that make no sense."""
    for name in ("out", "init", "data"):
        if not getattr(cfg, name).strip():
            raise InputError(f"--{name}: expected a name, found {getattr(cfg, name)!r}")
    for name, low in {"steps": 0, "epochs": 0, "stop_at": 1, "micro_batch": 1, "accumulate": 1, "lr": 0, "weight_decay": 0,
                      "warmup": 0, "grad_clip": 0, "eval_every": 1, "eval_samples": 1, "save_every": 1, "keep_every": 1,
                      "log_every": 1, "eval_answers": 0, "variance_every": 1, "lora_rank": 0, "dropout": 0, "seed": 0}.items():
        value = getattr(cfg, name)
        if value is not None and not value >= low:
            raise InputError(f"--{name.replace('_', '-')}: expected at least {low}, found {value}")
    for name in ("epochs", "lr", "weight_decay", "grad_clip"):
        if getattr(cfg, name) == float("inf"):
            raise InputError(f"--{name.replace('_', '-')}: expected a finite number, found inf")
    if cfg.epochs == 0 and cfg.steps is None:
        raise InputError("--epochs: expected a number above 0, found 0")
    if cfg.seed >= 2 ** 63:
        raise InputError(f"--seed: expected a number below 2^63, found {cfg.seed}")
    if cfg.dropout >= 1:
        raise InputError(f"--dropout: expected a share below 1, found {cfg.dropout}")
    if not cfg.lora_rank and (cfg.lora_alpha, cfg.lora_dropout, cfg.lora_bias) != (None, 0, "none"):
        raise InputError("--lora-alpha, --lora-dropout and --lora-bias go with --lora-rank")


def command_line(main, Config):
    """Run main(cfg) as a program: exit status 0 done, 2 bad input (one line on stderr), 130 interrupted."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:   # closed
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")   # a character that a terminal cannot show ends nothing

    def program():
        parallel.join()
        if parallel.size() > 1 and "micro_batch" not in Config.__dataclass_fields__:
            raise InputError("torchrun is for the training scripts: this one runs in one process")
        try:
            main(parse(Config))
        except SystemExit:   # -h, or told to stop, as all processes are
            parallel.leave()
            raise
        parallel.leave()
    one_line(program)


def one_line(program):
    """Run a program. What goes wrong for a reason outside the code is one line, and exit status 2, or 130 when interrupted."""
    try:
        program()
        return
    except InputError as e:
        status = _fail(str(e))
    except torch.OutOfMemoryError:
        status = _fail("out of GPU memory: try fewer sequences at a time (--micro-batch, with a larger --accumulate)")
    except OSError as e:   # missing file, no permission, full disk: the message names the file
        status = _fail(reason(e))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        status = 130
    if parallel.size() > 1:   # the others may have gone, and torch would abort over that on the way out
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _fail(message):
    whose = f"process {parallel.rank()}: " if parallel.size() > 1 else ""
    print(f"error: {whose}{' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2

# ----------------------------------------------------------------------------------------------------------------------
# device

def setup(cfg):
    """Seed torch; return the device and a function that makes the autocast context for a forward pass."""
    name = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if parallel.size() > 1:
        if name not in ("cpu", "cuda"):
            raise InputError(f"--device {name}: several processes take cpu or cuda, a GPU each")
        name = f"cuda:{parallel.local_rank()}" if name == "cuda" else name
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {name}: {str(e).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {name}: expected cpu, cuda or mps")
    torch.manual_seed(cfg.seed)
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if cfg.dtype == "bfloat16" and not has_bf16:
        raise InputError(f"--dtype bfloat16: {torch.cuda.get_device_name(device)} does not have it: try float16")
    if cfg.dtype == "float16" and device.type == "mps":
        raise InputError("--dtype float16: expected --device cuda, or cpu, where it is slow")
    if cfg.dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" and has_bf16 else torch.float32
    else:
        dtype = getattr(torch, cfg.dtype)
    return device, contextlib.nullcontext if dtype == torch.float32 else (lambda: torch.autocast(device.type, dtype))


def rehearse(losses, optimizer, state, device):
    """Run the first of these losses forward and backward and forget it, with the `state` bytes of the optimizer in memory: what
    does not fit fails before the first step. Draws nothing from torch's generators that a later draw would miss."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        held = torch.empty(state, dtype=torch.uint8, device=device)
        if (loss := next(losses)).requires_grad:   # else this process has no row of it
            loss.backward()
        del loss
        optimizer.zero_grad(set_to_none=True)
        del held


def count_steps(cfg, examples):
    """--steps, or what --epochs comes to."""
    return cfg.steps if cfg.steps is not None else max(1, round(cfg.epochs * examples / step_size(cfg)))


def step_size(cfg):
    """Examples in an accumulated step."""
    return cfg.micro_batch * parallel.size() * cfg.accumulate

# ----------------------------------------------------------------------------------------------------------------------
# the run folder

OURS = ("config.json", "metrics.jsonl", "samples.txt", "last.pt", "best.pt", "adapter.pt", "step-*.pt", "loss.png",
        "accuracy.png", "calibration.png", "variance.png", "variance-time.png")
LOGS = ("metrics.jsonl", "samples.txt")   # these grow


class Run:
    """One run: its folder, its counters, its checkpoints. Making a Run only looks; begin() is the first thing that writes. Of
    several processes the first one alone evaluates and writes.

    at      the counters that every line of metrics starts with
    final   what the last evaluation found
    """
    latest = None   # of this process, which may have ended by an error and still hold its folder

    def __init__(self, cfg):
        self.cfg, self.path, self.writes = cfg, Path(cfg.out), parallel.rank() == 0
        self.at = {"step": 0, "updates": 0, "micro_step": 0, "samples": 0, "tokens": 0, "flops": 0, "seconds": 0.0}
        if cfg.dtype == "float16":
            self.at["skipped"] = 0   # updates left out, since the scaled gradient overflowed
        self.best, self.last_evaluation, self.final, self.stop, self.draw_after = float("inf"), -1, {}, False, 0.0
        self.handlers, self.saved, self.signalled, self.lock = {}, None, False, None
        if cfg.resume and cfg.overwrite:
            raise InputError("--resume and --overwrite exclude each other")
        self._refuse_used()
        if cfg.overwrite and self.path.resolve() in (Path(cfg.init).resolve(), Path(cfg.init).resolve().parent):
            raise InputError(f"--overwrite of {self.path} would delete --init {cfg.init}: choose another --out")
        if cfg.resume and not (self.path / "config.json").is_file():
            raise InputError(f"{self.path} holds no run to resume: there is no config.json")

    def _refuse_used(self):
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--out {self.path} is a file: expected a folder, or a name for a new one")
        if (self.path / "scores.json").exists():
            raise InputError(f"{self.path} holds an evaluation: choose another --out")
        used = [f for f in OURS if any(self.path.glob(f))]
        if not self.cfg.resume and not is_run(self.path):   # but a killed --overwrite may have left something of one
            other = sorted(f.name for f in self.path.glob("*") if f.name == "config.json" or not f.name.endswith(".part")
                           and not any(f.match(name) for name in (*OURS, "lock")))
            if other:
                raise InputError(f"{self.path} holds other files ({other[0]}), and no run: choose another --out")
        if used and not (self.cfg.resume or self.cfg.overwrite):
            raise InputError(f"{self.path} already holds a run ({used[0]}): choose --resume, --overwrite or another --out")
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise InputError(f"--out {self.path}: {there} is no folder that may be written")

    def stored_flags(self):
        """The flags of the run in the folder, if they are of this script and this version."""
        config, hints = read_json(self.path / "config.json"), typing.get_type_hints(type(self.cfg))
        flags, script = config.get("flags"), script_of(self.cfg)
        if config.get("script") != script:
            raise InputError(f"{self.path}/config.json: a run of {config.get('script')}, not of {script}")
        if not isinstance(flags, dict):
            raise InputError(f"{self.path}/config.json: its flags are not there")
        differ = [f"it has no --{name.replace('_', '-')}" for name in hints if name not in flags]
        differ += [f"it has --{name.replace('_', '-')}" for name in flags if name not in hints]
        if config.get("format") != FORMAT:
            differ.insert(0, f"its format is {config.get('format')}, now {FORMAT}")
        if differ:
            raise InputError(f"{self.path} is a run of another version of this code: {'; '.join(differ)}")
        flags = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
        wrong = [name for name, value in flags.items() if not fits(value, hints[name])]
        if wrong:
            raise InputError(f"{self.path}/config.json: {wrong[0]} is {str(flags[wrong[0]])[:40]!r}, which is no value of "
                             f"--{wrong[0].replace('_', '-')}")
        return flags

    def begin(self, model, optimizer, steps, **facts):
        """Take the folder: lock it, then clear it, or with --resume put everything back to where last.pt was written. `facts`
        go into config.json. From here on Ctrl-C ends the run after the step in hand, with a checkpoint."""
        self.steps, device = steps, model.wte.weight.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=self.cfg.dtype == "float16")
        self.identity = {key: facts[key] for key in ("init_sha256", "data_sha256")} | {
            "device": device, "processes": parallel.size()}
        parallel.start_equal(model, **{key: facts[key] for key in ("init_sha256", "data_sha256")})
        if parallel.rank():
            torch.manual_seed(self.cfg.seed + 1_000_003 * parallel.rank())   # its own dropout
        if Run.latest:
            Run.latest._give_back()
        Run.latest = self
        if self.writes:
            with named(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                self.lock = open(self.path / "lock", "w")
        try:
            self._take(model, optimizer, facts)
        except BaseException:
            self._give_back()
            raise
        self.began_at, self.began = self.at["step"], time.time()
        if threading.current_thread() is threading.main_thread():
            ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()   # nohup
            self.handlers = {s: signal.signal(s, self._interrupt)
                             for s in {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} - ignored}

    def _take(self, model, optimizer, facts):
        checkpoint = None
        if self.writes:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"{self.path}: another process is writing this run") from None
        if self.cfg.resume:
            given = {k: v for k, v in dataclasses.asdict(self.cfg).items() if k not in MAY_CHANGE}
            check_same(self.path, self.stored_flags(), given)
            if (self.path / "last.pt").is_file():
                checkpoint = self._read_last(model, optimizer)
                if self.cfg.stop_at is not None and self.cfg.stop_at < checkpoint["at"]["step"]:
                    raise InputError(f"--stop-at {self.cfg.stop_at}: {self.path}/last.pt is at step {checkpoint['at']['step']} "
                                     "already")
            elif self._has_trained():
                raise InputError(f"{self.path} holds a run that has trained, and its last.pt is gone: it cannot be resumed")
        if checkpoint:
            for name, p in trained(model).items():
                p.copy_(checkpoint["model"][name])
            optimizer.load_state_dict({**optimizer.state_dict(), "state": checkpoint["optimizer"]})   # the rest is in the flags
            self.scaler.load_state_dict(checkpoint["scaler"])
            set_rng_state(checkpoint["rng"][parallel.rank()], model.wte.weight.device, self.path / "last.pt")
            for key in ("at", "best", "last_evaluation", "final"):
                setattr(self, key, checkpoint[key])
            self.saved = self.at["step"]
            self.say(f"resumed at step {self.at['step']} of {self.steps}")
        elif self.cfg.resume:
            self.say("there is no last.pt yet: from the beginning")
        # its first call sets it up, which a process without a row in the first step would not make
        self.scaler.scale(torch.zeros((), device=model.wte.weight.device))
        if self.writes:
            if not checkpoint:
                self._refuse_used()   # another process may have come first
            for name in OURS:   # config.json first: what is left of the old run then cannot be taken for one
                old = () if checkpoint or self.cfg.resume and name == "config.json" else self.path.glob(name)
                for file in (*old, *self.path.glob(f"{name}.part")):
                    file.unlink(missing_ok=True)
            modules = (torch, numpy, tiktoken, matplotlib)
            write_atomically(self.path / "config.json", json.dumps({
                "script": script_of(self.cfg), "format": FORMAT, "flags": dataclasses.asdict(self.cfg), "steps": self.steps,
                "model": dataclasses.asdict(model.config), **facts, "processes": parallel.size(),
                "versions": {"python": sys.version.split()[0], **{m.__name__: m.__version__ for m in modules}},
                "commit": commit()}, indent=2).encode())
            for name in LOGS:   # on resume: forget what was written after the checkpoint
                with named(self.path / name), open(self.path / name, "ab") as f:
                    f.truncate(checkpoint["logs"][name]["bytes"] if checkpoint else 0)

    def _has_trained(self):
        """last.pt is first written at step 0, before a step is done."""
        metrics = self.path / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        return any(not line.startswith('{"step": 0,') for line in lines)

    def _read_last(self, model, optimizer):
        """last.pt, if it is of a run like this one in every respect."""
        path = self.path / "last.pt"
        checkpoint, expected = read_checkpoint(path), self._state(model, optimizer)
        missing = sorted(expected.keys() - checkpoint.keys())
        if missing:
            raise InputError(f"{path} is no checkpoint to resume this run from: it has no {', '.join(missing)}")
        for key, now in self.identity.items():
            if checkpoint[key] != now:
                was = str(checkpoint[key])[:40]
                raise InputError(f"{self.path} cannot be resumed: " + {
                    "init_sha256": f"--init {self.cfg.init} is not what it was when the run began",
                    "data_sha256": f"--data {self.cfg.data} is not what it was when the run began",
                    "device": f"it ran on {was}, this is {now}",
                    "processes": f"it ran as {was} processes, these are {now} (torchrun --nproc-per-node)"}[key])
        if checkpoint["optimizer"]:   # nothing before the first step
            expected["optimizer"] = optim.state_form(self.cfg.optimizer, self.cfg.betas, self.cfg.accumulate, [
                p for group in optimizer.param_groups for p in group["params"]])
        if isinstance(checkpoint["final"], dict):
            expected["final"] = checkpoint["final"]
        expected["rng"] *= parallel.size()
        wrong = unlike(checkpoint, expected)
        if not wrong and not all(0 <= x < float("inf") for x in checkpoint["at"].values()):
            wrong = "at: a counter that is none"
        if wrong:
            raise InputError(f"{path} is no checkpoint to resume this run from: {wrong}")
        for name, log in checkpoint["logs"].items():
            found = self._log_state(name, log["bytes"])
            if found != log:
                how = "is shorter" if found["bytes"] < log["bytes"] else "says something else"
                raise InputError(f"{self.path}/{name} {how} than when last.pt was written: the run cannot be resumed")
        return checkpoint

    def _log_state(self, name, most=None):
        """Bytes of a file that grows, and the SHA-256 of them; or of so many at its beginning."""
        path = self.path / name
        blob = path.read_bytes()[:most] if path.is_file() else b""
        return {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}

    def _state(self, model, optimizer):
        """What last.pt holds, with the generators of this process alone."""
        return {"model": trained(model), "model_config": dataclasses.asdict(model.config),
                "optimizer": optimizer.state_dict()["state"], "scaler": self.scaler.state_dict(),
                "rng": [rng_state(model.wte.weight.device)],
                "logs": {name: self._log_state(name) for name in LOGS}, "at": self.at, "best": self.best,
                "last_evaluation": self.last_evaluation, "final": self.final, **self.identity}

    def _interrupt(self, number, frame):
        if self.signalled and number == signal.SIGINT:   # the second Ctrl-C: at once
            raise KeyboardInterrupt
        self.signalled = True
        with contextlib.suppress(OSError):   # not print: it may be what was interrupted
            os.write(2, b"\nstopping after this step ...\n")

    # -- the loop asks and tells ---------------------------------------------------------------------------------------

    def evaluation_due(self):
        step = self.at["step"]
        return self.writes and step > self.last_evaluation and (step % self.cfg.eval_every == 0 or step == self.steps)

    def evaluated(self, key, found, samples):
        """Keep what an evaluation found; whether it has the lowest `key` so far, and is to be kept with keep_best."""
        if not math.isfinite(found[key]):
            raise self._broken(f"{key} is {found[key]}")
        self.final, self.last_evaluation = found, self.at["step"]
        self._log(**found, peak_memory=peak_memory())
        append(self.path / "samples.txt", f"=== step {self.at['step']}\n{samples}")
        better = found[key] < self.best
        self.best = min(self.best, found[key])
        return better

    def keep_best(self, config, state, adapter):
        """best.pt from a GPT's state dict; adapter.pt too where there is one (lora.adapter_state)."""
        if adapter is not None:
            self._write("adapter.pt", adapter)
        self.keep("best.pt", config, state)

    def keep_due(self):
        return self.writes and self.cfg.keep_every is not None and self.at["step"] % self.cfg.keep_every == 0

    def keep(self, name, config, state):
        """A whole model under this name, as load() takes it."""
        self._write(name, {"model": state, "model_config": dataclasses.asdict(config)})

    def _write(self, name, checkpoint):
        self._check_place()
        broken = not_finite(checkpoint)
        if broken:
            raise self._broken(f"the weights are not finite any more ({broken})")
        write_checkpoint(self.path / name, checkpoint)

    def _broken(self, what):
        """The error to raise where a number is none. What the run had taken is given back."""
        self._give_back()
        saved = "nothing is saved yet" if self.saved is None else f"{self.path}/last.pt holds step {self.saved}"
        return InputError(f"step {self.at['step']}: {what}: try a smaller --lr. {saved}")

    def draw(self, draw):
        """The pictures again, draw(folder), at the end and as often as takes a thirtieth of the time at most."""
        now = time.time()
        if now > self.draw_after or self.at["step"] == self.steps:
            try:
                draw(self.path)
            except ValueError as e:   # plots.py's word for files that are not as they were written
                raise InputError(str(e)) from None
            self.draw_after = time.time() + 30 * (time.time() - now)

    def probe_due(self):
        return self.cfg.variance_every is not None and self.at["step"] % self.cfg.variance_every == 0

    def probed(self, found):
        if math.isfinite(found["grad_variance"]):   # in float16 the scale may still be too large
            self._log(**found)

    def goes_on(self, model, optimizer):
        """Save last.pt where it is due; whether there is another step to do."""
        step, self.stop = self.at["step"], parallel.any_of(self.signalled)
        ends = step >= self.steps or step == self.cfg.stop_at or self.stop
        if ends or step % (self.cfg.save_every or self.cfg.eval_every) == 0:
            state = self._state(model, optimizer)
            own, = state["rng"]
            state["rng"] = [{"cpu": cpu, "cuda": list(cuda)} for cpu, *cuda in
                            zip(*map(parallel.gathered, (own["cpu"], *own["cuda"])))]
            if self.writes:
                self._write("last.pt", state)
            self.saved = step
        return not ends

    def step(self, model, optimizer, batches, losses):
        """optim.accumulated_step; a loss or gradient that is no number ends the run before it moves a weight."""
        rows = [[] if batch is None else batch.rows for batch in batches]
        per_update = optim.per_update(self.cfg.optimizer, self.cfg.accumulate)
        try:
            return optim.accumulated_step(model, optimizer, losses, rows, per_update, self.cfg.grad_clip, self.scaler)
        except optim.NotFinite as e:
            raise self._broken(f"{e}, on the training pairs {', '.join(map(str, e.rows))}") from None

    def stepped(self, began, norms, lr, samples, tokens, flops, **values):
        """Count a step; every --log-every steps a line of metrics and a line of progress. norms: the updates' gradient norms."""
        took, at, K = time.time() - began, self.at, self.cfg.accumulate
        samples, tokens, flops = parallel.total(samples, tokens, flops)
        more = {"step": 1, "updates": len(norms), "micro_step": K, "samples": samples, "tokens": tokens, "flops": flops,
                "seconds": took, "skipped": K // optim.per_update(self.cfg.optimizer, K) - len(norms)}
        self.at = {key: at[key] + more[key] for key in at}
        values |= {"grad_norm": sum(norms) / len(norms)} if norms else {}
        values |= {"lr": lr} | ({"scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {})
        if self.at["step"] % self.cfg.log_every == 0 and self.writes:
            self._log(**values, tokens_per_second=tokens / took)
            step, steps = self.at["step"], self.steps
            left = (time.time() - self.began) / (step - self.began_at) * (steps - step)
            numbers = " | ".join(f"{key.removeprefix('train_').replace('_', ' ')} {value:.4g}" for key, value in values.items())
            line = f"step {step:>5}/{steps} {step / steps:4.0%} | {numbers} | {tokens / took:,.0f} tokens/s | {clock(left)} left"
            terminal = sys.stdout.isatty()
            show(f"\r{line}\033[K" if terminal else line, "" if terminal else "\n")

    def say(self, text):
        """A line that stays, also where the progress line overwrites itself."""
        if self.writes:
            show(f"\r\033[K{text}" if sys.stdout.isatty() else text)

    def end(self):
        """Give the folder and the signals back; after an interrupt, end the program with status 130."""
        self._give_back()
        if self.at["step"] < self.steps:
            self.say(f"{'interrupted' if self.stop else 'stopped'}: go on with --resume --out {self.path}")
            if self.stop:
                raise SystemExit(130)
        return {**self.at, **self.final, "best": self.best}

    def _give_back(self):
        Run.latest = None
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        self.handlers = {}
        if self.lock:
            self.lock.close()

    def _check_place(self):
        """The folder may have been moved, and another run may be where it was."""
        here = self.path / "lock"
        if not here.is_file() or os.stat(here).st_ino != os.fstat(self.lock.fileno()).st_ino:
            raise InputError(f"{self.path} is not this run's folder any more: it was moved or removed")

    def _log(self, **values):
        if self.writes:
            self._check_place()
            append(self.path / "metrics.jsonl", json.dumps({**self.at, **values}) + "\n")


def show(text, end="\n"):
    """A run goes on where what it says is no longer read, or has no room."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_run(folder):
    """Whether a folder's config.json was written by a training script."""
    try:
        return isinstance(read_json(folder / "config.json").get("flags"), dict)
    except (OSError, InputError):
        return False


def script_of(cfg):
    return Path(inspect.getfile(type(cfg))).name


def fits(value, hint):
    """Whether a value from a file may stand where the dataclass has this type."""
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(fits(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(fits(x, typing.get_args(hint)[0]) for x in value)
    return type(value) is hint or hint is float and type(value) is int


def trained(model):
    """{name: tensor} of what trains: everything, or with LoRA what --init does not hold. The tensors are the parameters' own."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def commit():
    """The commit of this code, or None: there may be no repository around it, and no git."""
    try:
        git = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True,
                             check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return git.stdout.strip()


def clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def rng_state(device):
    """torch's global generators (dropout draws from them); they load under weights_only."""
    return {"cpu": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []}


def set_rng_state(state, device, path):
    try:
        torch.set_rng_state(state["cpu"])
        for cuda in state["cuda"]:
            torch.cuda.set_rng_state(cuda, device)
    except RuntimeError as e:
        raise InputError(f"{path}: its generators' states are none ({str(e).splitlines()[0][:80]})") from None


def peak_memory():
    """Bytes: of the GPU where there is one, else the process's largest resident size."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
