"""
parallel.py: two processes take the steps that one takes, only the first one writes, none waits for ever.

    python -m pytest -q tests/test_parallel.py
"""
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import chat
import data
import model as gpt
import parallel
import parallel_worker
from files import InputError, read_checkpoint

ROOT = Path(__file__).parent.parent
WORKER = str(ROOT / "tests/parallel_worker.py")
CASES = list(parallel_worker.CASES)


def environment(folder, **more):
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return {**clean, "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1", **more}


def together(n, folder, *arguments):
    """The processes of one run, as torchrun would start them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    return [subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                             env=environment(folder, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n),
                                             MASTER_ADDR="127.0.0.1", MASTER_PORT=port)) for rank in range(n)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model to start from, 9 training pairs, so that every third micro-batch has a single row, and all runs, made twice."""
    folder = tmp_path_factory.mktemp("parallel")
    pairs = data.load_pairs("minihh")[0]
    for split, n in (("train", 9), ("valid", 4)):
        with open(folder / f"{split}.jsonl", "w") as f:
            f.writelines(json.dumps({"chosen": p.prompt + p.chosen, "rejected": p.prompt + p.rejected}) + "\n"
                         for p in pairs[split][:n])
    torch.manual_seed(0)
    gpt.export(gpt.GPT(gpt.GPTConfig(block_size=256, vocab_size=2048, n_layer=2, n_head=2, n_embd=32)), folder / "start")
    two = together(2, folder, WORKER, str(folder), *CASES)
    one = subprocess.run([sys.executable, WORKER, str(folder), *CASES], capture_output=True, text=True, cwd=ROOT,
                         env=environment(folder))
    assert one.returncode == 0, one.stderr
    printed = [process.communicate(timeout=200) for process in two]
    assert [process.returncode for process in two] == [0, 0], printed
    (folder / "printed").write_text(printed[1][0])
    return folder


def metrics(path):
    times = ("seconds", "tokens_per_second", "peak_memory")
    return [{k: v for k, v in json.loads(line).items() if k not in times}
            for line in (path / "metrics.jsonl").read_text().splitlines()]

# ---- oracle: one process -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(folder, case):
    """Losses, gradient norms, counters and weights, with accumulation and where each micro-batch is an update of its own; 9 pairs
    in micro-batches of 4 leave one process without a row in every third."""
    one, two = (folder / str(n) / case for n in (1, 2))
    close = {"fp16": 2e-3, "fp32": 1e-6}.get(case[:4], 1e-10)
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a.keys() == b.keys()
        for key in a:   # a win is a number in fp32; there, what is neither a loss nor a weight gathers some rounding more
            wide = max(close, 1e-5) if close > 1e-10 else 1e-7 if "accuracy" in key else close
            tolerance = close if key.endswith("loss") else wide
            np.testing.assert_allclose(np.array(a[key], dtype=float), np.array(b[key], dtype=float), tolerance, tolerance)
    a, b = (read_checkpoint(run / "last.pt") for run in (one, two))
    start = gpt.load(str(folder / "start")).state_dict()
    for key in a["model"]:
        torch.testing.assert_close(a["model"][key], b["model"][key], rtol=close, atol=close)
    assert any(not torch.equal(a["model"][key].float(), start[key]) for key in a["model"] if key in start) or "lora" in case \
        or case == "lion-pma"
    assert not torch.equal(b["rng"][0]["cpu"], b["rng"][1]["cpu"])   # nothing was drawn; dropout would not be the same on both
    assert a["at"]["samples"] == b["at"]["samples"] > 0 and a["processes"] == 1 and b["processes"] == 2

# ---- worked by hand ------------------------------------------------------------------------------------------------------

def test_shares_by_hand(monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        shares.append([parallel.mine(rows) for rows in ([7, 8, 9, 10], [5, 6], [])])
    assert shares == [[[7, 10], [5], []], [[8], [6], []], [[9], [], []]]


def test_one_process_adds_nothing():
    x = torch.ones(2)
    assert parallel.size() == 1 and parallel.rank() == 0 and parallel.mine([1, 2]) == [1, 2]
    assert parallel.total(3, 0.1) == (3, 0.1) and parallel.gathered(x) == [x] and parallel.any_of(True)
    parallel.sum_gradients([x])
    assert x.tolist() == [1, 1]

# ---- properties ----------------------------------------------------------------------------------------------------------

def test_only_the_first_process_writes_and_prints(folder):
    """What the second one prints is our worker's own lines."""
    lines = (folder / "printed").read_text().splitlines()
    assert [json.loads(line)["case"] for line in lines] == CASES and all(json.loads(line)["rank"] == 1 for line in lines)


def test_runs_of_two_and_of_one_do_not_mix(folder):
    script, flags = parallel_worker.CASES["fp32-sgd"]
    out = folder / "2" / "fp32-sgd"
    stored = script.runs.Run(script.Config(out=str(out), resume=True)).stored_flags()
    with pytest.raises(InputError, match="it ran as 2 processes, these are 1"):
        script.main(replace(script.Config(**stored), resume=True))


FLAGS = ["--steps", "400", "--micro-batch", "2", "--eval-every", "1000", "--save-every", "5", "--log-every", "1",
         "--eval-samples", "4", "--eval-answers", "0", "--dropout", "0.1", "--optimizer", "adamw-pma", "--accumulate", "2"]
SPOILT = """
import sys
import parallel, runs, train_sft
real = train_sft.losses.sft_loss
seen = []

def sft_loss(*arguments):
    seen.append(1)
    return real(*arguments) * (float("nan") if parallel.rank() == 1 and len(seen) == 4 else 1)
train_sft.losses.sft_loss = sft_loss
runs.command_line(train_sft.main, train_sft.Config)
"""


PRIMITIVES = """
import json, sys, time
import torch
import parallel
parallel.join()
rank = parallel.rank()
torch.manual_seed(rank)
model = torch.nn.Linear(2, 2)
parallel.start_equal(model, data="same")
gradients = [torch.full((2,), 1.0 + rank), torch.full((3,), 10.0 * rank)]
parallel.sum_gradients(gradients)
if rank == 0:
    time.sleep(0.5)
parallel.in_turn(lambda: open(sys.argv[1], "a").write(str(rank)))
found = {"weights": model.weight.sum().item(), "gradients": [g.tolist() for g in gradients],
         "total": parallel.total(rank + 1, 0.5), "any": [parallel.any_of(rank == 1), parallel.any_of(False)],
         "gathered": [t.item() for t in parallel.gathered(torch.tensor(rank))], "mine": parallel.mine([7, 8, 9])}
try:
    parallel.start_equal(model, data=str(rank))
except parallel.InputError as e:
    found["refused"] = str(e)
print(json.dumps(found))
"""


def test_what_two_processes_do_together_by_hand(folder):
    processes = together(2, folder, "-c", PRIMITIVES, str(folder / "turns"))
    one, two = (json.loads(process.communicate(timeout=60)[0]) for process in processes)
    torch.manual_seed(0)
    assert one["weights"] == two["weights"] == torch.nn.Linear(2, 2).weight.sum().item()
    for found in (one, two):
        assert found["gradients"] == [[3, 3], [10, 10, 10]] and found["total"] == [3, 1.0] and found["any"] == [True, False]
        assert found["gathered"] == [0, 1]
    assert (folder / "turns").read_text() == "01" and (one["mine"], two["mine"]) == ([7, 9], [8])
    assert two["refused"] == "its data is not that of process 0"   # which then waits for one that has ended
    assert one["refused"].startswith("another process of this run has ended")


def test_a_loss_that_is_no_number_on_one_process_ends_both(folder):
    """The second one names its rows; the first one says that another has ended, and does not wait for it."""
    flags = [*FLAGS, "--accumulate", "1", "--save-every", "1"]
    processes = together(2, folder, "-c", SPOILT, "--out", str(folder / "spoilt"), *flags)
    said = [process.communicate(timeout=60)[1].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    rows = data.Order([1] * 8000, 4, 1)[2][1::2]
    assert said[1] == [f"error: process 1: step 2: the loss is nan, on the training pairs {rows[0]}, {rows[1]}: try a smaller "
                       f"--lr. {folder}/spoilt/last.pt holds step 2"]
    assert len(said[0]) == 1 and said[0][0].startswith("error: process 0: another process of this run has ended")


SLOW = """
import time
import files, runs, train_sft
save = files.torch.save

def slow(checkpoint, f):
    time.sleep(1.5 * ("rng" in checkpoint and checkpoint["at"]["step"] > 0))
    save(checkpoint, f)
files.torch.save = slow
runs.command_line(train_sft.main, train_sft.Config)
"""


def test_one_that_is_told_to_stop_waits_until_the_other_has_written(folder):
    """SIGTERM to the second process alone: both end. torchrun ends the other as soon as one has ended: too late to harm."""
    first, second = together(2, folder, "-u", "-c", SLOW, "--out", str(folder / "slow"), *FLAGS, "--save-every", "1000")
    while "step     3" not in (line := first.stdout.readline()):
        assert line, first.stderr.read()
    second.send_signal(signal.SIGTERM)
    second.wait(timeout=60)
    assert read_checkpoint(folder / "slow/last.pt")["at"]["step"] == metrics(folder / "slow")[-1]["step"] > 2
    assert (first.wait(timeout=60), second.returncode) == (130, 130)


def test_what_is_no_training_script_runs_alone(monkeypatch, capsys):
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    monkeypatch.setattr(chat.runs.os, "_exit", sys.exit)   # with others about, it ends without torch's way out
    with pytest.raises(SystemExit) as stopped:
        chat.runs.command_line(chat.main, chat.Config)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: process 1: torchrun is for the training scripts: this one runs in one process\n"


def test_a_killed_process_ends_the_other_with_a_line_and_a_checkpoint_to_go_on_from(folder):
    """That torchrun's run then goes on to the same bits: studies/faults.py."""
    first, second = together(2, folder, "-u", "train_sft.py", "--out", str(folder / "cut"), *FLAGS)
    while "step     7" not in (line := first.stdout.readline()):
        assert line, first.stderr.read()
    second.kill()
    _, said = first.communicate(timeout=60)
    assert first.returncode == 2 and said.startswith("error: process 0: another process of this run has ended")
    assert said.count("\n") == 1 and second.wait() == -signal.SIGKILL
    last = read_checkpoint(folder / "cut/last.pt")
    assert last["at"]["step"] >= 5 and last["processes"] == len(last["rng"]) == 2
