"""
studies/compare.py: a speedup is the ratio of the costs to one loss, and runs that do not compare are refused.

    python -m pytest -q tests/test_compare.py
"""
import json
import random
import subprocess
import sys

import pytest

import plots
from studies import compare
from studies.lab import HERE


def folder(path, events, **flags):
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (path / "config.json").write_text(json.dumps({"flags": {"init": "mini", "data": "minihh", "loss_on": "response", "seed": 1,
                                                            "optimizer": "adamw", "out": str(path), **flags}}))
    return path


def lines(axis):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()}


# ---- worked by hand ---------------------------------------------------------------------------------------------------------

def run(losses, cost=10, updates=1):
    """Evaluations every `cost` examples."""
    return [{"step": i, "samples": i * cost, "updates": i * updates, "flops": 2.0 * i * cost, "seconds": 1.0 * i,
             "val_loss": loss, "val_logp_accuracy": 0.5} for i, loss in enumerate(losses)]


def test_the_cost_to_reach_a_level():
    """Falling from 4 to 2 over 10 examples, up to 3, then to 1: the running minimum is 4, 2, 2, 1."""
    points = compare.curve(run([4, 2, 3, 1]), "samples", "val_loss")
    assert points == [(0, 4), (10, 2), (20, 2), (30, 1)]
    assert [compare.cost_to_reach(points, level) for level in (5, 4, 3, 2, 1.5, 1, 0.9)] == [0, 0, 5, 10, 25, 30, None]
    assert compare.cost_to_reach([(0, 4)], 4) == 0 and compare.cost_to_reach([(0, 4)], 3) is None


def test_speedup_at_the_lowest_level_that_both_reach():
    slow, fast = [(0, 4.0), (10, 3.0), (20, 2.0)], [(0, 4.0), (10, 2.0), (20, 1.0)]
    assert compare.speedup(slow, fast, 0.5) == (2.0, "baseline")   # half of the way from 4.0 to 2.0: after 10 and after 5
    assert compare.speedup([(0, 4.0), (10, 4.0)], fast) == (None, "baseline")   # never below its start
    assert compare.speedup(slow, fast) == (2.0, "baseline")       # 2.0 after 20 and after 10; the slow one never reaches 1.0
    assert compare.speedup(fast, slow) == (0.5, "candidate")
    assert compare.speedup(slow, slow) == (1.0, "")


def test_compare_by_hand(tmp_path, drawn):
    """Two seeds of AdamW; AdamW-PMA reaches their lowest in half of and in two thirds of the examples, with twice the updates."""
    runs = [plots.read(folder(tmp_path / f"{name}{seed}", run(losses, updates=updates), optimizer=name, seed=seed))
            for name, seed, losses, updates in [("adamw", 1, [4, 3, 2], 1), ("adamw", 2, [4, 3, 2.5, 2], 1),
                                                ("adamw-pma", 1, [4, 2, 1], 2), ("adamw-pma", 2, [4, 3, 2], 2)]]
    table = compare.compare(compare.grouped(runs), "adamw", tmp_path / "out")
    pma = table["runs"]["adamw-pma"]
    assert pma["speedup_samples"] == pytest.approx([2, 1.5]) and pma["speedup_updates"] == pytest.approx([1, 0.75])
    assert pma["speedup_flops"] == pma["speedup_seconds"] == pma["speedup_samples"]   # both go with the examples here
    assert pma["speedup_90_samples"] == pytest.approx([18 / 9, 26 / 18])   # to 2.2 = 4 - 0.9 (4 - 2)
    assert pma["lowest"] == pma["last"] == [1, 2] and pma["fell_short"] == ["baseline", ""]
    assert table["runs"]["adamw"]["speedup_samples"] == [1, 1]
    assert json.loads((tmp_path / "out/compare.json").read_text()) == table
    figure, = drawn
    shown = lines(figure.axes[0])
    assert shown["adamw (n = 2)"] == ([0, 10, 20], [4, 3, 2.25]) and shown["adamw-pma (n = 2)"] == ([0, 10, 20], [4, 2.5, 1.5])
    text = compare.as_text(table).splitlines()[-1]
    fast = "1.72 [1.44, 2.00]"
    assert text == f"| adamw-pma | 2 | {'1.500 [1.000, 2.000] | ' * 2}1.75 [1.50, 2.00] | {fast} | adamw 1 of 2 |"
    assert [compare.spread(values) for values in ([1.0], [], [None], [1, 2, None, 4])] == [
        "1.00 (one seed)", "", "", "2.00 [1.00, 4.00], 1 never"]


def test_runs_are_grouped_by_what_differs(tmp_path):
    """The two learning rates of AdamW are two groups; Lion has one, whose label needs no rate."""
    runs = [plots.read(folder(tmp_path / f"{name}{lr}{seed}", run([4, 3]), optimizer=name, seed=seed, lr=lr))
            for name, seed, lr in [("adamw", 1, 0.1), ("adamw", 2, 0.1), ("adamw", 1, 0.2), ("lion", 1, 0.01)]]
    assert {label: sorted(group) for label, group in compare.grouped(runs).items()} == {
        "adamw, lr 0.1": [1, 2], "adamw, lr 0.2": [1], "lion": [1]}
    def grouped(*which):
        names = "optimizer", "seed", "init", "accumulate"
        return list(compare.grouped([({"flags": dict(zip(names, flags))}, []) for flags in which]))
    assert grouped(("adamw", 1, "sft-1", 8), ("adamw", 2, "sft-2", 8), ("lion", 1, "sft-1", 8)) == ["adamw", "lion"]
    assert grouped(("adamw", 1, "a", 8), ("adamw", 1, "b", 8)) == ["adamw, init a", "adamw, init b"]
    assert grouped(("adamw", 1, "a", 8), ("lion", 1, "a", 4)) == ["adamw, accumulate 8", "lion, accumulate 4"]
    with pytest.raises(ValueError, match="two runs of lion with seed 1"):
        compare.grouped([*runs, runs[-1]])
    with pytest.raises(ValueError, match="no runs of the baseline 'adamw', but of 'adamw, lr 0.1'; 'adamw, lr 0.2'; 'lion'$"):
        compare.compare(compare.grouped(runs), "adamw", tmp_path / "out")


def test_reward_models_compare_by_their_loss(tmp_path, drawn):
    for seed in (1, 2):
        folder(tmp_path / f"r{seed}", [{"step": 0, "samples": 0, "updates": 0, "flops": 0, "seconds": 0, "val_reward_loss": 0.69},
                                       {"step": 1, "samples": 8, "updates": 1, "flops": 9, "seconds": 1, "val_reward_loss": 0.5}],
               optimizer="lion", seed=seed)
    table = compare.compare(compare.grouped([plots.read(tmp_path / f"r{seed}") for seed in (1, 2)]), "lion", tmp_path / "out")
    assert table["loss"] == "val_reward_loss" and table["runs"]["lion"]["lowest"] == [0.5, 0.5]
    assert drawn[0].axes[0].get_ylabel() == "held-out reward loss (log axis)"


def test_runs_that_do_not_compare_are_refused(tmp_path):
    def grouped(**other):
        return compare.grouped([plots.read(folder(tmp_path / str(i), run([4, 3]), **flags))
                                for i, flags in enumerate(({}, {"optimizer": "lion", **other}))])
    for other, message in (({"data": "mine"}, "data is mine, not minihh"), ({"eval_samples": 9}, "eval_samples is 9, not None")):
        with pytest.raises(ValueError, match=f"lion does not compare with adamw: {message}"):
            compare.compare(grouped(**other), "adamw", tmp_path / "out")
    runs = grouped()
    runs["dpo"] = {1: ({"flags": {"optimizer": "lion"}}, [{"samples": 0, "val_dpo_loss": 0.6931}])}
    with pytest.raises(ValueError, match="dpo does not compare with adamw: loss is val_dpo_loss, not val_loss"):
        compare.compare(runs, "adamw", tmp_path / "out")
    assert list(grouped(variance_every=5, log_every=1)) == ["adamw", "lion"]


# ---- properties -------------------------------------------------------------------------------------------------------------

def test_both_reach_the_lowest_level_that_both_reach():
    """Whatever the rounding: two falling curves from one start have a speedup, the inverse of the one the other way round."""
    draw = random.Random(1)
    for _ in range(300):
        one, two = ([(0, 7.6209)] + [(step, 7.6209 * draw.random() / step) for step in range(1, 6)] for _ in range(2))
        one, two = (compare.curve([{"x": x, "y": y} for x, y in points], "x", "y") for points in (one, two))
        there, back = compare.speedup(one, two), compare.speedup(two, one)
        assert there[0] * back[0] == pytest.approx(1) and {there[1], back[1]} == {"baseline", "candidate"}


def test_compare_on_the_command_line(tmp_path):
    def program(*arguments):
        return subprocess.run([sys.executable, "-m", "studies.compare", *arguments], cwd=HERE, capture_output=True, text=True)
    runs = [str(folder(tmp_path / name, run([4, 3, 2]), optimizer=name)) for name in ("adamw", "lion")]
    done = program(*runs, "--x", "updates", "--out", str(tmp_path))
    assert done.returncode == 0 and f"| lion | 1 {'| 2.000 (one seed) ' * 2}{'| 1.00 (one seed) ' * 2}|  |" in done.stdout
    assert done.stdout.endswith(f"drawn and kept: {tmp_path}/compare.png, compare.json\n")
    assert (tmp_path / "compare.png").is_file() and not (tmp_path / "compare-variance.png").exists()
    again = program(*reversed(runs), "--out", str(tmp_path))
    assert "speedup over lion in samples" in again.stdout   # the first run's, unless one is named
    damaged = str(folder(tmp_path / "damaged", [{"step": 0, "samples": 0, "val_loss": "low"}], optimizer="adamw"))
    for arguments, message in (([runs[1], "--baseline", "adamw"], "no runs of the baseline 'adamw', but of 'lion'"),
                               ([], "required: runs"),
                               ([*runs, "--x", "hours"], "invalid choice"),
                               ([str(tmp_path)], "config.json"),
                               ([damaged], "metrics.jsonl:1: expected val_loss to be a number")):
        bad = program(*arguments)
        assert bad.returncode == 2 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1 and message in bad.stderr
