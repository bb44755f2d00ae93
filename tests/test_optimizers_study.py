"""
studies/optimizers.py: the rule that picks learning rates, runs that go on where they were, and the tables.

    python -m pytest -q tests/test_optimizers_study.py

The runs themselves are tested with the scripts; here they are tiny, or made up.
"""
import json
import math
import threading

import pytest

import train_sft
from studies import optimizers as study


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "runs"


def made_up(losses, optimizer="adamw", moved=1.0):
    """A finished run with these evaluations, 52 steps apart, and a probe at each."""
    events = [{"step": 52 * i, "micro_step": 416 * i, "samples": 1664 * i, "updates": 52 * i, "flops": 1e9 * i,
               "seconds": 1.0 * i, "val_loss": loss, "val_dpo_loss": loss, "val_logp_accuracy": 0.75}
              for i, loss in enumerate(losses)]
    probes = [{**{key: e[key] for key in ("step", "micro_step", "samples", "seconds")}, "displacement_rms": moved,
               "probe_loss": 1.0, "update_variance": [0.5, 0.25], "displacement_variance_relative": 0.1} for e in events]
    return {"flags": {"optimizer": optimizer}, "events": [e for pair in zip(probes, events) for e in pair]}

# ---- the rule that picks learning rates

@pytest.mark.parametrize("best, tried", [
    (0.0, [-2, -1, 0, 1, 2]),              # the middle: its neighbours, and no extension
    (2.1, [-2, 0, 1, 2, 3, 4]),            # the outermost, once extended
    (5.0, [-2, 0, 2, 3, 4, 5, 6]),
    (9.0, [-2, 0, 2, 4, 5, 6, 7, 8]),      # four times extended, and then no more
    (-4.6, [-6, -5, -4, -3, -2, 0, 2]),
    (-0.9, [-2, -1, 0, 1, 2]),             # a neighbour is the best, and has its own neighbours
])
def test_search_by_hand(monkeypatch, best, tried):
    """The loss has its minimum at 3e-3 * 1.5^best; AdamW's first three rates are 3e-3 * 1.5^(-2, 0, 2)."""
    def training(lab, task, name, split, optimizer, lr, seed, steps):
        assert (split, optimizer, seed, steps) == ("valid", "adamw", 1, study.STEPS // 2)
        return {"events": [{"val_loss": 1 + abs(math.log(lr / 3e-3) / math.log(1.5) - best)}, {"val_loss": 100.0}]}
    monkeypatch.setattr(study, "training", training)
    grid = study.search(None, "sft", "adamw")
    assert list(grid) == [study.rate(power) for power in tried]
    assert grid[study.rate(tried[0])] == pytest.approx(1 + abs(tried[0] - best), abs=0.01)   # the lowest, rates have 3 digits


def test_search_stops_when_the_time_is_up_but_not_where_a_run_diverges(monkeypatch):
    monkeypatch.setattr(study, "training", lambda *_: None)
    assert study.search(None, "dpo", "lion") is None
    monkeypatch.setattr(study, "training", lambda lab, task, name, split, optimizer, lr, *_:
                        {"failed": "the loss is nan"} if lr > 1e-3 else {"events": [{"val_dpo_loss": 1 - lr}]})
    grid = study.search(None, "dpo", "momentum")
    assert min(grid, key=grid.get) == max(lr for lr in grid if lr <= 1e-3) and max(grid.values()) == math.inf


def test_matched_rates_by_hand():
    """S(8) = 4.371, over sqrt(8) is 1.5455; and 2 - 1/8. The matched rate is that of the *other* optimizer, made larger."""
    grids = {method: {1e-3: 2.0, 2e-3: 1.0} for method in study.METHODS}
    grids["adamw"] = {1e-3: 1.0, 2e-3: 3.0}
    runs = study.chosen(grids)
    assert runs["adamw"] == ("adamw", 1e-3) and runs["adamw-pma"] == ("adamw-pma", 2e-3)
    assert runs["adamw-matched"] == ("adamw", 0.00309) and runs["lion-matched"] == ("lion", 0.00375)
    assert len(runs) == 9

# ---- runs

TINY = ["--steps", 2, "--lr", 1e-3, "--micro-batch", 2, "--eval-every", 1, "--eval-samples", 4, "--eval-answers", 0]


def test_a_run_is_made_once_and_goes_on_where_it_was(folder, monkeypatch):
    train_sft.main(train_sft.Config(steps=2, micro_batch=2, eval_every=1, eval_samples=4, eval_answers=0, stop_at=1, lr=1e-3,
                                    out=str(folder / "cut")))
    lab = study.Lab(folder)
    run = lab.run("cut", "train_sft.py", *TINY)
    assert [e["step"] for e in run["events"] if "val_loss" in e] == [0, 1, 2] and not (folder / "cut/last.pt").exists()
    assert run["flags"] == {"optimizer": "adamw", "lr": 1e-3, "seed": 1, "accumulate": 1, "steps": 2}
    assert "the loss is nan" in lab.run("diverges", "train_sft.py", *TINY, "--lr", 1e30)["failed"]
    with pytest.raises(RuntimeError, match="no optimizer 'none'"):
        lab.run("typo", "train_sft.py", *TINY, "--optimizer", "none")
    monkeypatch.setattr(study.subprocess, "Popen", None)   # what is there is not made again; nothing starts after the deadline
    again = study.Lab(folder, minutes=-1)
    assert again.run("cut", "train_sft.py") == run and "failed" in again.run("diverges", "train_sft.py")
    assert again.run("late", "train_sft.py") is None


def test_two_at_a_time(tmp_path):
    lab, running, most, lock = study.Lab(tmp_path), [0], [0], threading.Event()

    def job(i):
        running[0] += 1
        most[0] = max(most[0], running[0])
        if most[0] == 2:
            lock.set()
        lock.wait(10)
        running[0] -= 1
        return i
    assert lab.map(job, [(i,) for i in range(5)]) == [0, 1, 2, 3, 4] and most == [2]

# ---- the report

def test_report_by_hand(tmp_path, capsys):
    """Everything falls from 4 to 2 in 3328 examples, PMA to 2 in half of them and at the end to 1; each twice as far a period."""
    lab = study.Lab(tmp_path)
    for task in study.TASKS:
        for method in study.METHODS:
            slow, moved = ([4, 3, 2], 1.0) if method in ("adamw", "lion", "momentum") else ([4, 2, 1], 2.0)
            for lr in (1e-3, 2e-3):
                lab.found[f"{task}/grid/{method}-{lr:g}"] = made_up(slow if lr == 1e-3 else [5, 5, 5], method, moved)
            for seed in (1, 2):
                lab.found[f"{task}/test/{method}-0.001-s{seed}"] = made_up(slow, method, moved)
        lab.found[f"{task}/k/adamw-0.001-k2-s1"] = made_up([4, 3, 2])
        lab.found[f"{task}/k/adamw-pma-0.001-k2-s1"] = made_up([4, 2, 1], "adamw-pma")
    study.report(lab)
    text = capsys.readouterr().out
    assert text == (tmp_path / "tables.md").read_text() + "\n"
    for line in ("| adamw-pma | **0.001: 1.0000**, 0.002: 5.0000 (at the edge of what was tried) |",
                 "| adamw-pma | adamw | 0.001 | 2.00 | 2.00 |",
                 "| adamw-pma | 2 | 1.0000 [1.0000, 1.0000] | 2.00 [2.00, 2.00] | adamw 2 of 2 |",
                 "| lion-pma | 0.001 | 2.00 [2.00, 2.00] | 0.750 [0.750, 0.750] | 2.00 [2.00, 2.00] | 2.00 [2.00, 2.00] |",
                 "| 2 | 2.0000 [2.0000, 2.0000] | 1.0000 [1.0000, 1.0000] | 2.00 [2.00, 2.00] |"):
        assert text.count(line) == 2, line   # SFT and DPO
    table = json.loads((tmp_path / "sft/compare.json").read_text())
    assert table["runs"]["agma"]["moved_against_baseline"] == [2.0] * 4   # two seeds, two probes after the warm-up


def test_an_unfinished_study_reports_what_it_has(tmp_path, capsys):
    study.report(study.Lab(tmp_path))
    assert capsys.readouterr().out.strip() == ""
