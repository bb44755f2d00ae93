"""
runs.py: flags come from the dataclass, the run folder is taken safely, clocks and counters read right.

    python -m pytest -q tests/test_runs.py
"""
import argparse
import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

import model as gpt
import runs
from files import InputError, read_checkpoint


@dataclass
class Config(runs.Config):
    out: str = "runs/test"
    colour: Literal["red", "blue"] = "red"   # 100 % of the paint


def tiny():
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(16, 32, 1, 2, 8))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def begun(tmp_path, steps=4, **flags):
    run = runs.Run(Config(out=str(tmp_path / "run"), eval_every=2, log_every=1, **flags))
    model, optimizer = tiny()
    run.begin(model, optimizer, steps, init_sha256="x", data_sha256="y")
    return run, model, optimizer


# ---- oracle: argparse's own reading of the same flags ---------------------------------------------------------------------

def test_flags_equal_a_parser_written_by_hand():
    argv = ["--lr", "0.5", "--betas", "0.8,0.9", "--overwrite", "--steps", "7", "--half", "sft", "--seed=3", "--colour", "blue"]
    parser = argparse.ArgumentParser()
    for name, kind in {"lr": float, "steps": int, "half": str, "seed": int, "colour": str, "betas": str}.items():
        parser.add_argument("--" + name, type=kind)
    parser.add_argument("--overwrite", action="store_true")
    want = vars(parser.parse_args(argv))
    want["betas"] = tuple(map(float, want["betas"].split(",")))
    assert dataclasses.asdict(runs.parse(Config, argv)) == {**dataclasses.asdict(Config()), **want}


def test_every_flag_has_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        runs.parse(Config, ["-h"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "100 % of the paint [red]" in " ".join(text.split())
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in text


# ---- worked by hand --------------------------------------------------------------------------------------------------------

def test_clock():
    assert [runs.clock(s) for s in (0, 59.6, 61, 3599, 3600, 7384)] == ["0:00", "1:00", "1:01", "59:59", "1:00:00", "2:03:04"]


def test_counters_of_two_steps(tmp_path):
    run, _, _ = begun(tmp_path, accumulate=3)
    for _ in range(2):
        run.stepped(run.began, [1.0], 0.1, samples=12, tokens=100, flops=1000, train_loss=1.5)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    counters = ("step", "micro_step", "samples", "tokens", "flops")
    assert [[e[key] for key in counters] for e in lines] == [[1, 3, 12, 100, 1000], [2, 6, 24, 200, 2000]]
    assert lines[0]["train_loss"] == 1.5 and lines[0]["tokens_per_second"] > 0


def test_when_to_evaluate_and_to_end(tmp_path):
    """Every 2 steps and at the last of 5: 0, 2, 4, 5."""
    run, model, optimizer = begun(tmp_path, steps=5)
    seen = []
    while True:
        if run.evaluation_due():
            seen.append(run.at["step"])
            run.evaluated("val_loss", {"val_loss": 1.0}, "")
            assert not run.evaluation_due()   # never twice at one step
        if not run.goes_on(model, optimizer):
            break
        run.stepped(run.began, [1.0], 0.1, 1, 1, 1)
    assert seen == [0, 2, 4, 5] and (tmp_path / "run" / "last.pt").is_file()


# ---- properties ------------------------------------------------------------------------------------------------------------

def test_best_keeps_the_lowest(tmp_path):
    run, model, _ = begun(tmp_path)
    for step, loss in enumerate((3.0, 1.0, 2.0)):
        with torch.no_grad():
            model.ln_f.bias.fill_(step)
        if run.evaluated("val_loss", {"val_loss": loss}, ""):
            run.keep_best(model.config, model.state_dict(), {"rank": step})
    assert run.best == 1.0 and (gpt.load(str(tmp_path / "run")).ln_f.bias == 1).all()
    assert read_checkpoint(tmp_path / "run" / "adapter.pt", ("rank",)) == {"rank": 1}
    with pytest.raises(InputError, match="the weights are not finite any more .adapter.x."):   # nor are an adapter's written
        run.keep_best(model.config, model.state_dict(), {"adapter": {"x": torch.tensor([float("inf")])}})
    assert read_checkpoint(tmp_path / "run" / "adapter.pt", ("rank",)) == {"rank": 1}


def test_last_holds_what_trains_and_resume_puts_it_back(tmp_path):
    """With LoRA the frozen weights are --init's, whose hash is checked."""
    def frozen():
        model = tiny()[0]
        model.requires_grad_(False)
        model.ln_f.requires_grad_(True)
        return model, torch.optim.AdamW(model.ln_f.parameters(), lr=0.1)
    model, optimizer = frozen()
    run = runs.Run(Config(out=str(tmp_path / "run"), stop_at=1))
    run.begin(model, optimizer, 2, init_sha256="x", data_sha256="y")
    with torch.no_grad():
        model.ln_f.bias.fill_(3.0)
    run.stepped(run.began, [1.0], 0.1, 1, 1, 1)
    run.goes_on(model, optimizer)
    run.end()
    assert read_checkpoint(tmp_path / "run" / "last.pt")["model"].keys() == {"ln_f.weight", "ln_f.bias"}
    model, optimizer = frozen()
    run = runs.Run(Config(out=str(tmp_path / "run"), resume=True))
    run.begin(model, optimizer, 2, init_sha256="x", data_sha256="y")
    assert (model.ln_f.bias == 3).all() and run.at["step"] == 1
    run.end()
    other, optimizer = tiny()   # everything trains: not what last.pt holds
    with pytest.raises(InputError, match="last.pt is no checkpoint to resume this run from: model has no h.0.attn.c_attn.bias, "):
        runs.Run(Config(out=str(tmp_path / "run"), resume=True)).begin(other, optimizer, 2, init_sha256="x", data_sha256="y")


def test_config_json_says_everything(tmp_path):
    begun(tmp_path, lr=0.25)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["flags"]["lr"] == 0.25 and config["flags"]["colour"] == "red" and config["steps"] == 4
    assert {"python", "torch", "numpy", "tiktoken", "matplotlib"} == config["versions"].keys()
    assert config["init_sha256"] == "x" and config["model"]["n_embd"] == 8


def test_no_git_on_the_machine_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    begun(tmp_path)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["commit"] is None


def test_overwrite_removes_the_old_run_and_nothing_else(tmp_path):
    run, model, optimizer = begun(tmp_path)
    run.goes_on(model, optimizer)
    run.end()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run, _, _ = begun(tmp_path, overwrite=True)
    assert not (tmp_path / "run" / "last.pt").exists() and (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_models_that_stay(tmp_path):
    """--keep-every 2: whole models of steps 0 and 2, which load() takes and --overwrite clears; none without the flag."""
    run, model, _ = begun(tmp_path, keep_every=2)
    due = []
    for step in range(4):
        run.at["step"] = step
        if run.keep_due():
            due.append(step)
            run.keep(f"step-{step}.pt", model.config, model.state_dict())
    run.end()
    assert due == [0, 2] and sorted(f.name for f in (tmp_path / "run").glob("step*")) == ["step-0.pt", "step-2.pt"]
    again = gpt.load(str(tmp_path / "run" / "step-2.pt"))
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in again.state_dict().items())
    with pytest.raises(InputError, match="already holds a run"):
        begun(tmp_path)
    run, _, _ = begun(tmp_path, overwrite=True)
    assert not list((tmp_path / "run").glob("step*")) and not run.keep_due()
    run.end()


def test_a_folder_with_an_evaluation_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "scores.json").touch()
    for flags in ({}, {"overwrite": True}):
        with pytest.raises(InputError, match="holds an evaluation"):
            begun(tmp_path, **flags)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_polite_and_only_a_second_ctrl_c_is_not(tmp_path, number):
    """A terminal, a batch system and torchrun may all send SIGTERM for one and the same reason."""
    run, model, optimizer = begun(tmp_path)
    before = signal.getsignal(number)
    assert run.goes_on(model, optimizer)
    signal.raise_signal(number)
    assert not run.goes_on(model, optimizer)   # saved, and no further step
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        run.end()
    assert stopped.value.code == 130 and signal.getsignal(number) != before


def test_a_signal_while_the_processes_agree_is_not_lost(tmp_path, monkeypatch):
    """It comes when this process has told that it had none."""
    run, model, optimizer = begun(tmp_path)
    real = runs.parallel.any_of

    def interrupted(flag):
        found = real(flag)
        if not run.signalled:
            signal.raise_signal(signal.SIGTERM)
        return found
    monkeypatch.setattr(runs.parallel, "any_of", interrupted)
    assert run.goes_on(model, optimizer) and not run.goes_on(model, optimizer)
    with pytest.raises(SystemExit):
        run.end()


def test_nohup_stays_in_force(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run, _, _ = begun(tmp_path)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and set(run.handlers) == {signal.SIGINT, signal.SIGTERM}
        run.end()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_folder_that_was_moved_away_is_not_written_to(tmp_path):
    """Another run may have taken its place: each would write over the other."""
    run, model, optimizer = begun(tmp_path)
    run.goes_on(model, optimizer)
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = {f.name: f.read_bytes() for f in (tmp_path / "moved").iterdir()}
    second = runs.Run(Config(out=str(tmp_path / "run")))
    runs.Run.latest = None   # as in a process of its own
    second.begin(model, optimizer, 4, init_sha256="x", data_sha256="y")
    taken = {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    for write in (lambda: run.goes_on(model, optimizer), lambda: run._log(train_loss=1.0),
                  lambda: run.evaluated("val_loss", {"val_loss": 1.0}, "")):
        with pytest.raises(InputError, match="run is not this run's folder any more: it was moved or removed"):
            write()
    assert {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()} == taken
    assert {f.name: f.read_bytes() for f in (tmp_path / "moved").iterdir()} == moved
    second.end()


def test_a_run_whose_last_pt_is_gone_keeps_the_rest(tmp_path):
    run, model, optimizer = begun(tmp_path, keep_every=1)
    run.goes_on(model, optimizer)
    run.stepped(run.began, [1.0], 0.1, 1, 1, 1)
    run.keep("step-1.pt", model.config, model.state_dict())
    run.end()
    (tmp_path / "run/last.pt").unlink()
    before = {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    with pytest.raises(InputError, match="holds a run that has trained, and its last.pt is gone: it cannot be resumed"):
        begun(tmp_path, resume=True, keep_every=1)
    assert {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("files", [{"config.json": '{"vocab_size": 1}', "model.safetensors": "weights"}, {"config.json": "hi"},
                                   {"metrics.jsonl": "precious", "thesis.tex": "more so"}, {"best.pt.bak": "mine"}])
def test_overwrite_is_for_runs_alone(tmp_path, files):
    """A Hugging Face folder has a config.json, too."""
    (tmp_path / "run").mkdir()
    for name, text in files.items():
        (tmp_path / "run" / name).write_text(text)
    for flags in ({}, {"overwrite": True}):
        with pytest.raises(InputError, match="run holds other files .*, and no run: choose another --out"):
            begun(tmp_path, **flags)
    assert {f.name: f.read_text() for f in (tmp_path / "run").iterdir()} == files


def test_what_a_killed_overwrite_left_is_overwritten(tmp_path):
    run, model, optimizer = begun(tmp_path)
    run.goes_on(model, optimizer)
    run.end()
    (tmp_path / "run/config.json").unlink()   # the first to go
    (tmp_path / "run/last.pt.part").touch()
    run, _, _ = begun(tmp_path, overwrite=True)
    assert not (tmp_path / "run/last.pt").exists() and not (tmp_path / "run/last.pt.part").exists()
    run.end()


def test_a_run_goes_on_where_nobody_reads_what_it_says(tmp_path, monkeypatch):
    """A closed terminal or pipe, a full disk; and without any output from the start."""
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

        def fileno(self):
            return kept.fileno()
    with open(tmp_path / "out", "w") as kept:
        monkeypatch.setattr(sys, "stdout", Broken())
        runs.show("a line")
        monkeypatch.undo()
        assert os.stat(kept.fileno()).st_rdev == os.stat(os.devnull).st_rdev
    flags = ["--steps", "2", "--micro-batch", "2", "--eval-samples", "2", "--eval-answers", "0", "--log-every", "1"]
    line = f"{sys.executable} train_sft.py --out {tmp_path / 'run'} {' '.join(flags)} >&- 2>&-"
    assert subprocess.run(["bash", "-c", line], cwd=Path(runs.__file__).parent).returncode == 0
    assert read_checkpoint(tmp_path / "run/last.pt")["at"]["step"] == 2


def test_a_rehearsal_changes_nothing(monkeypatch):
    """The first loss alone goes forward and back, beside as many bytes as the optimizer will take. Afterwards there is no
    gradient, no memory is held, weights and optimizer are as before, and torch's generator, for all of dropout, has drawn
    nothing."""
    model = gpt.GPT(gpt.GPTConfig(16, 32, 1, 2, 8, dropout=0.5))
    optimizer, weights = torch.optim.AdamW(model.parameters(), lr=0.1), [p.detach().clone() for p in model.parameters()]
    made, seen, real = [], [], torch.empty

    def empty(*size, **options):
        made.append(weakref.ref(found := real(*size, **options)))
        return found

    def losses():
        hidden = model.hidden(torch.arange(8)[None])
        hidden.register_hook(lambda gradient: seen.append((gradient.any().item(), [held().nbytes for held in made])))
        yield hidden.square().sum()
        raise AssertionError("the second micro-batch was computed")
    monkeypatch.setattr(runs.torch, "empty", empty)
    state = torch.get_rng_state()
    runs.rehearse(losses(), optimizer, 12345, torch.device("cpu"))
    assert seen == [(True, [12345])] and [held() for held in made] == [None]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters()) and not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))


@pytest.mark.parametrize("where", ["forward", "backward", "the optimizer's bytes"])
def test_what_does_not_fit_is_one_line_before_there_is_a_run(tmp_path, monkeypatch, capsys, where):
    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def main(cfg):
        run, (model, optimizer) = runs.Run(cfg), tiny()

        def losses():
            if where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            yield Full.apply(model.hidden(torch.arange(8)[None]).sum())
        if where == "the optimizer's bytes":
            def empty(*size, **options):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            monkeypatch.setattr(runs.torch, "empty", empty)
        runs.rehearse(losses(), optimizer, 100, torch.device("cpu"))
        run.begin(model, optimizer, 4, init_sha256="x", data_sha256="y")
    monkeypatch.setattr(sys, "argv", ["x.py", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stopped:
        runs.command_line(main, Config)
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err == ("error: out of GPU memory: try fewer sequences at a time (--micro-batch, with a larger "
                                       "--accumulate)\n")


def test_setup_seeds_and_refuses_unknown_devices():
    cfg = Config(device="cpu")
    a = (runs.setup(cfg), torch.rand(3))[1]
    b = (runs.setup(cfg), torch.rand(3))[1]
    assert torch.equal(a, b)
    with pytest.raises(InputError, match="--device cuda:99"):
        runs.setup(Config(device="cuda:99"))
    device, autocast = runs.setup(Config(device="cpu", dtype="bfloat16"))
    with autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_precisions_that_a_device_lacks_are_refused(monkeypatch):
    def on(kind):
        monkeypatch.setattr(runs.torch, "empty", lambda *size, device: argparse.Namespace(device=argparse.Namespace(type=kind)))
    on("mps")
    with pytest.raises(InputError, match="--dtype float16: expected --device cuda, or cpu"):
        runs.setup(Config(device="mps", dtype="float16"))
    on("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    with pytest.raises(InputError, match="--dtype bfloat16: an old card does not have it: try float16"):
        runs.setup(Config(device="cuda", dtype="bfloat16"))
    assert runs.setup(Config(device="cuda"))[1] is contextlib.nullcontext   # auto


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path, capsys):
    """It has config.json, and no last.pt; what it logged is forgotten."""
    run, _, _ = begun(tmp_path)
    run._log(train_loss=1.0)
    run.end()
    run, model, optimizer = begun(tmp_path, resume=True)
    assert run.at["step"] == 0 and (tmp_path / "run/metrics.jsonl").read_text() == ""
    assert "there is no last.pt yet: from the beginning" in capsys.readouterr().out


@pytest.mark.parametrize("value, hint, fit", [
    (1, int, True), (1.0, int, False), (True, int, False), (1, float, True), (1.5, float, True), ("1", float, False),
    (None, int | None, True), (3, int | None, True), (None, int, False), (True, bool, True), (1, bool, False), ("a", str, True),
    ("red", Literal["red", "blue"], True), ("pink", Literal["red", "blue"], False), ([], Literal["red"], False),
    ((0.9, 1), tuple[float, ...], True), ((0.9, "1"), tuple[float, ...], False), (0.9, tuple[float, ...], False),
    ((0.9,), tuple[float, ...] | None, True), ({}, tuple[float, ...] | None, False)])
def test_values_for_flags_by_hand(value, hint, fit):
    assert runs.fits(value, hint) == fit


def test_a_full_disk_or_missing_right_is_one_line(monkeypatch, capsys):
    def full(cfg):
        raise OSError(28, "No space left on device", "runs/x/last.pt.part")
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit) as stopped:
        runs.command_line(full, Config)
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: runs/x/last.pt.part: No space left on device\n"


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch):
    def bug(cfg):
        raise ValueError("not the user's fault")
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(ValueError, match="not the user's fault"):
        runs.command_line(bug, Config)
