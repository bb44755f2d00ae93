"""
studies/lab.py: the rule that picks learning rates, and runs that are made once and go on where they were.

    python -m pytest -q tests/test_lab.py
"""
import json
import math
import random
import sys
import threading

import pytest

import train_sft
from files import InputError
from studies import lab as labs


def new_lab(folder):
    return labs.Lab(folder, folder, ("step", "samples", "seconds", "val_loss"), ("optimizer", "lr", "seed"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "runs"


# ---- the rule that picks learning rates, by hand

@pytest.mark.parametrize("best, tried", [
    (0.0, [-2, -1, 0, 1, 2]),              # the middle: its neighbours, and no extension
    (2.1, [-2, 0, 1, 2, 3, 4]),            # the outermost, once extended
    (5.0, [-2, 0, 2, 3, 4, 5, 6]),
    (9.0, [-2, 0, 2, 4, 5, 6, 7, 8]),      # four times extended, and then no more
    (-4.6, [-6, -5, -4, -3, -2, 0, 2]),
    (-0.9, [-2, -1, 0, 1, 2]),             # a neighbour is the best, and has its own neighbours
])
def test_search_by_hand(best, tried):
    """The loss is lowest at the power `best`; every power is asked for once."""
    asked = []
    found = labs.search(lambda power: asked.append(power) or 1 + abs(power - best), 0)
    assert list(found) == tried == sorted(asked) and found[tried[0]] == 1 + abs(tried[0] - best)
    assert list(labs.search(lambda power: 1 + abs(power - 7 - best), 7)) == [power + 7 for power in tried]


def test_search_stops_when_the_time_is_up_but_not_where_a_run_diverges():
    assert labs.search(lambda power: None, 0) is None
    assert labs.search(lambda power: None if power == 1 else 1.0 + power ** 2, 0) is None   # up in the middle of it
    found = labs.search(lambda power: math.inf if power > -3 else 1.0 + power, -2)
    assert min(found, key=found.get) == min(found) and found[0] == math.inf


def test_rates_by_hand():
    assert [labs.rate(power) for power in (0, 1, -1, 2)] == [0.003, 0.0045, 0.002, 0.00675]
    assert labs.rates_table({"a": {0.002: 1.0, 0.001: 2.0, 0.003: math.inf}, "b": {0.1: 3.0, 0.2: 4.0}}) == [
        "| | rate: loss |", "| --- | --- |", "| a | 0.001: 2.0000, **0.002: 1.0000**, 0.003: diverges |",
        "| b | **0.1: 3.0000**, 0.2: 4.0000 (at the edge of what was tried) |"]

# ---- what is kept of a training loss, by hand

def test_band_by_hand():
    steps, losses = [2, 4, 6, 8, 10], [1.0, 3.0, 5.0, 4.0, 9.0]
    assert labs.band(steps, losses, bins=3) == [[4, 2.0, 1.0, 3.0], [8, 4.5, 4.0, 5.0], [10, 9.0, 9.0, 9.0]]
    assert labs.band([1], [2.0]) == [[1, 2.0, 2.0, 2.0]]


def test_spikes_by_hand():
    """Of ten steps the last five count. Their third is twice the median of those around it: one of five is a spike. The
    three inner ones are -1, 2 and -1 from their neighbours' mean: sqrt((1 + 4 + 1) / 3 / 1.5). A line has 0, noise its size."""
    first = [9.0, 1.0, 9.0, 1.0, 9.0]
    found = labs.spikes([*first, 2.0, 2.0, 4.0, 2.0, 2.0], reach=2)
    assert found == {"share": 0.2, "roughness": pytest.approx(math.sqrt(4 / 3))}
    assert labs.spikes([9.0 - 0.1 * i for i in range(40)]) == {"share": 0.0, "roughness": pytest.approx(0, abs=1e-9)}
    assert labs.spikes([1.0, 1.0, 1.0, 1.0, 1.5, 1.0], reach=1)["share"] == 0   # half as high again is not yet one
    noise = random.Random(1)
    assert labs.spikes([2 + noise.gauss(0, 0.1) for _ in range(20_000)])["roughness"] == pytest.approx(0.1, rel=0.03)
    assert labs.spikes([1.0, 2.0, 3.0])["roughness"] is None

# ---- runs

TINY = ["--steps", 2, "--lr", 1e-3, "--micro-batch", 2, "--eval-every", 1, "--eval-samples", 4, "--eval-answers", 0]


def test_a_run_is_made_once_and_goes_on_where_it_was(folder, monkeypatch):
    train_sft.main(train_sft.Config(steps=2, micro_batch=2, eval_every=1, eval_samples=4, eval_answers=0, stop_at=1, lr=1e-3,
                                    out=str(folder / "cut")))
    lab = new_lab(folder)
    run = lab.run("cut", "train_sft.py", *TINY)
    assert [e["step"] for e in run["events"] if "val_loss" in e] == [0, 1, 2] and not (folder / "cut/last.pt").exists()
    assert run["flags"] == {"optimizer": "adamw", "lr": 1e-3, "seed": 1}
    assert lab.summary(folder / "cut", brief=True)["events"] == run["events"][-1:]
    hot = ["train_sft.py", *TINY, "--lr", 1e30]
    assert "val_loss is nan: try a smaller --lr" in lab.run("hot", *hot)["diverged"]
    assert lab.found["hot"]["events"][0]["val_loss"] > 7
    with pytest.raises(InputError, match="no optimizer 'none'"):
        lab.run("typo", "train_sft.py", *TINY, "--optimizer", "none")
    monkeypatch.setattr(labs.subprocess, "Popen", None)   # what is there is not made again; nothing starts after a stop
    with open(lab.file, "a") as f:
        f.write('{"name": "half a li')   # a crash
    again = new_lab(folder)
    assert again.run("cut", "train_sft.py", *TINY) == run and "diverged" in again.run("hot", *hot)
    with pytest.raises(InputError, match="cut made by .*give another --results"):
        again.run("cut", "train_sft.py", *TINY, "--seed", 2)
    again.interrupt()
    assert again.run("late", "train_sft.py") is None
    again.keep("new", run)
    assert list(new_lab(folder).found) == ["cut", "hot", "new"]


@pytest.mark.parametrize("what", ["flags", "version"])
def test_a_run_left_by_an_older_study_is_made_anew(folder, what):
    train_sft.main(train_sft.Config(steps=2, micro_batch=1, eval_every=1, eval_samples=4, eval_answers=0, stop_at=1,
                                    out=str(folder / "old")))
    if what == "version":
        config = json.loads((folder / "old/config.json").read_text())
        (folder / "old/config.json").write_text(json.dumps({**config, "format": 0}))
    assert new_lab(folder).run("old", "train_sft.py", *TINY)["events"][-1]["samples"] == 4


@pytest.mark.parametrize("key", ["val_loss", "val_dpo_loss", "val_reward_loss"])
def test_weights_that_are_gone_are_made_again_and_must_be_the_same(folder, monkeypatch, capsys, key):
    """But for another CPU's rounding. What was kept stays, and no line is written twice."""
    made, loss = [], [2.0]

    def run(self, name, script, *flags):   # what a run leaves: its evaluations, and best.pt
        if name not in self.found:
            made.append(name)
            self.folder(name).mkdir(parents=True, exist_ok=True)
            (self.folder(name) / "best.pt").touch()
            self.keep(name, {"events": [{"step": 0, key: 7.0}, {"step": 9, key: loss[0], "seconds": len(made)}]})
        return self.found[name]
    monkeypatch.setattr(labs.Lab, "run", run)
    new_lab(folder).weights("start", "train_sft.py")
    new_lab(folder).weights("start", "train_sft.py")
    assert made == ["start"]
    written = new_lab(folder).file.read_text()
    for loss[0], note in ((2.0, ""), (2.19, "losses up to 9.5% from those kept")):
        (folder / "start/best.pt").unlink()
        capsys.readouterr()
        lab = new_lab(folder)
        found = lab.weights("start", "train_sft.py")
        assert found["events"][1] == {"step": 9, key: 2.0, "seconds": 1} and lab.found["start"] == found
        said = capsys.readouterr().out
        assert made.pop() == "start" and (note in said if note else "losses" not in said)
        assert new_lab(folder).file.read_text() == written
    (folder / "start/best.pt").unlink()
    loss[0] = 1.79
    with pytest.raises(InputError, match="start is not what it was when .* was begun"):
        new_lab(folder).weights("start", "train_sft.py")


def test_distance_by_hand():
    before = [{"step": 0, "samples": 0, "val_loss": 4.0, "val_reward_accuracy": 0.5}, {"step": 9, "samples": 36, "val_loss": 2.0}]
    assert labs.distance(before, before) == 0
    assert labs.distance(before, [before[0] | {"val_reward_accuracy": 0.4}, before[1] | {"val_loss": 1.5}]) == 0.25
    assert labs.distance(before, [before[0], before[1] | {"samples": 35}]) == labs.distance(before, before[:1]) == math.inf
    assert labs.distance(before, [before[0], {"step": 9, "samples": 36}]) == math.inf   # no such loss


def test_two_at_a_time(tmp_path):
    lab, running, most, lock = new_lab(tmp_path), [0], [0], threading.Event()

    def job(i):
        running[0] += 1
        most[0] = max(most[0], running[0])
        if most[0] == 2:
            lock.set()
        lock.wait(10)
        running[0] -= 1
        return i
    assert lab.map(job, [(i,) for i in range(5)]) == [0, 1, 2, 3, 4] and most == [2]


def test_command_line(tmp_path, monkeypatch, capsys):
    """work and report, in this order, of a Lab in --results; --report alone starts nothing; a wrong flag is one line."""
    done = []

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["study", "--results", str(tmp_path), *flags])
        labs.command_line("A study.", "results/none", new_lab, lambda lab: done.append(("work", lab.file)),
                          lambda lab: done.append(("report", lab.file)))
    monkeypatch.setattr(labs.signal, "signal", lambda *_: None)   # pytest's own handlers stay
    monkeypatch.setattr(labs.signal, "setitimer", lambda kind, seconds: done.append(seconds))
    call("--minutes", "2")
    call("--report")
    file = tmp_path / "runs.jsonl"
    assert done == [120, ("work", file), ("report", file), ("report", file)]
    with pytest.raises(SystemExit) as stopped:
        call("--minutes", "0")
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: --minutes: expected a number above 0, found 0.0\n"
