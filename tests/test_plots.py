"""
plots.py: a picture shows the numbers of metrics.jsonl, in the unit it names.

    python -m pytest -q tests/test_plots.py
"""
import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import plots

SFT = [{"samples": 0, "val_loss": 7.6, "train_eval_loss": 7.5, "val_logp_accuracy": 0.5, "val_chosen_logps": -90.0,
        "val_rejected_logps": -91.0},
       {"samples": 8, "train_loss": 6.0},
       {"samples": 16, "val_loss": 4.0, "train_eval_loss": 3.9, "val_logp_accuracy": 0.6, "val_chosen_logps": -60.0,
        "val_rejected_logps": -63.0}]
DPO = [{"samples": 0, "val_dpo_loss": 0.6931, "val_reward_accuracy": 0.5, "val_logp_accuracy": 0.7, "val_chosen_reward": 0.0,
        "val_rejected_reward": 0.0, "val_chosen_logps": -20.0, "val_rejected_logps": -30.0, "baseline_sft_logps": 0.7},
       {"samples": 8, "train_loss": 0.65, "train_reward_accuracy": 0.75},
       {"samples": 16, "val_dpo_loss": 0.5, "val_reward_accuracy": 0.9, "val_logp_accuracy": 0.8, "val_chosen_reward": -0.1,
        "val_rejected_reward": -1.0, "val_chosen_logps": -21.0, "val_rejected_logps": -40.0, "baseline_sft_logps": 0.7}]


def folder(path, events, **flags):
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (path / "config.json").write_text(json.dumps({"val_pairs": 400, "baseline_longer_wins": 0.49, "baseline_unigram_loss": 5.1,
                                                  "flags": {"init": "mini", "data": "minihh", "loss_on": "response", "seed": 1,
                                                            "optimizer": "adamw", "out": str(path), **flags}}))
    return path


@pytest.fixture
def drawn(monkeypatch):
    """Keeps every figure that plots draws."""
    figures, real = [], plots.canvas

    def keep(*size, **options):
        figure, axes = real(*size, **options)
        figures.append(figure)
        return figure, axes
    monkeypatch.setattr(plots, "canvas", keep)
    return figures


def lines(axis):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()}


# ---- oracle: the PNG's own header -------------------------------------------------------------------------------------------

def test_pictures_are_png_files_of_a_sensible_size(tmp_path):
    plots.draw(folder(tmp_path / "run", DPO, loss="dpo", beta=0.1, gamma=1.0))
    for name in ("loss.png", "accuracy.png"):
        data = (tmp_path / "run" / name).read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and 500 < width < 2000 and 300 < height < 800


# ---- worked by hand ---------------------------------------------------------------------------------------------------------

def test_sft_pictures_show_these_numbers(tmp_path, drawn):
    plots.draw(folder(tmp_path / "run", SFT))
    loss, accuracy = drawn
    shown = lines(loss.axes[0])
    assert shown["held out, n = 400"] == ([0, 16], [7.6, 4.0]) and shown["training, per step"] == ([8], [6.0])
    assert "unigram frequencies 5.100" in shown and loss.axes[0].get_xlabel() == "dialogues seen"
    assert len(accuracy.axes) == 2   # no reference, so no rewards
    assert lines(accuracy.axes[0])["log-prob: chosen likelier than rejected"] == ([0, 16], [0.5, 0.6])
    assert lines(accuracy.axes[1])["chosen"] == ([0, 16], [-90.0, -60.0])


def test_dpo_pictures_show_these_numbers(tmp_path, drawn):
    plots.draw(folder(tmp_path / "run", DPO, loss="dpo", beta=0.1, gamma=1.0))
    loss, accuracy = drawn
    assert lines(loss.axes[0])["held out, n = 400"] == ([0, 16], [0.6931, 0.5])
    assert "policy = reference: log 2 = 0.693" in lines(loss.axes[0])
    first, rewards, logps = accuracy.axes
    assert lines(first)["reward, held out, n = 400"] == ([0, 16], [0.5, 0.9])
    assert {"longer wins 0.490", "the start's log-prob 0.700"} <= lines(first).keys()
    assert lines(rewards)["rejected"] == ([0, 16], [0.0, -1.0]) and lines(logps)["rejected"] == ([0, 16], [-30.0, -40.0])
    assert "Two negative rewards are no bug" in accuracy.get_supxlabel()


# ---- several runs: worked by hand -----------------------------------------------------------------------------------------

def run(losses, cost=10, updates=1):
    """Evaluations every `cost` examples."""
    return [{"step": i, "samples": i * cost, "updates": i * updates, "flops": 2.0 * i * cost, "seconds": 1.0 * i,
             "val_loss": loss, "val_logp_accuracy": 0.5} for i, loss in enumerate(losses)]


def test_the_cost_to_reach_a_level():
    """Falling from 4 to 2 over 10 examples, up to 3, then to 1: the running minimum is 4, 2, 2, 1."""
    points = plots.curve(run([4, 2, 3, 1]), "samples", "val_loss")
    assert points == [(0, 4), (10, 2), (20, 2), (30, 1)]
    assert [plots.cost_to_reach(points, level) for level in (5, 4, 3, 2, 1.5, 1, 0.9)] == [0, 0, 5, 10, 25, 30, None]
    assert plots.cost_to_reach([(0, 4)], 4) == 0 and plots.cost_to_reach([(0, 4)], 3) is None


def test_speedup_at_the_lowest_level_that_both_reach():
    slow, fast = [(0, 4.0), (10, 3.0), (20, 2.0)], [(0, 4.0), (10, 2.0), (20, 1.0)]
    assert plots.speedup(slow, fast, 0.5) == (2.0, "baseline")   # half of the way from 4.0 to 2.0: after 10 and after 5
    assert plots.speedup([(0, 4.0), (10, 4.0)], fast) == (None, "baseline")   # never below its start
    assert plots.speedup(slow, fast) == (2.0, "baseline")       # 2.0 after 20 and after 10; the slow one never reaches 1.0
    assert plots.speedup(fast, slow) == (0.5, "candidate")
    assert plots.speedup(slow, slow) == (1.0, "")


def test_compare_by_hand(tmp_path, drawn):
    """Two seeds of AdamW; AdamW-PMA reaches their lowest in half of and in two thirds of the examples, with twice the updates."""
    runs = [plots.read(folder(tmp_path / f"{name}{seed}", run(losses, updates=updates), optimizer=name, seed=seed))
            for name, seed, losses, updates in [("adamw", 1, [4, 3, 2], 1), ("adamw", 2, [4, 3, 2.5, 2], 1),
                                                ("adamw-pma", 1, [4, 2, 1], 2), ("adamw-pma", 2, [4, 3, 2], 2)]]
    table = plots.compare(plots.grouped(runs), "adamw", tmp_path / "out")
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
    text = plots.as_text(table).splitlines()[-1]
    fast = "1.72 [1.44, 2.00]"
    assert text == f"| adamw-pma | 2 | {'1.500 [1.000, 2.000] | ' * 2}1.75 [1.50, 2.00] | {fast} | adamw 1 of 2 |"
    assert [plots.spread(values) for values in ([1.0], [], [None], [1, 2, None, 4])] == [
        "1.00 (one seed)", "", "", "2.00 [1.00, 4.00], 1 never"]


def test_runs_are_grouped_by_what_differs(tmp_path):
    """The two learning rates of AdamW are two groups; Lion has one, whose label needs no rate."""
    runs = [plots.read(folder(tmp_path / f"{name}{lr}{seed}", run([4, 3]), optimizer=name, seed=seed, lr=lr))
            for name, seed, lr in [("adamw", 1, 0.1), ("adamw", 2, 0.1), ("adamw", 1, 0.2), ("lion", 1, 0.01)]]
    assert {label: sorted(group) for label, group in plots.grouped(runs).items()} == {
        "adamw, lr 0.1": [1, 2], "adamw, lr 0.2": [1], "lion": [1]}
    def grouped(*which):
        names = "optimizer", "seed", "init", "accumulate"
        return list(plots.grouped([({"flags": dict(zip(names, flags))}, []) for flags in which]))
    assert grouped(("adamw", 1, "sft-1", 8), ("adamw", 2, "sft-2", 8), ("lion", 1, "sft-1", 8)) == ["adamw", "lion"]
    assert grouped(("adamw", 1, "a", 8), ("adamw", 1, "b", 8)) == ["adamw, init a", "adamw, init b"]
    assert grouped(("adamw", 1, "a", 8), ("lion", 1, "a", 4)) == ["adamw, accumulate 8", "lion, accumulate 4"]
    with pytest.raises(ValueError, match="two runs of lion with seed 1"):
        plots.grouped([*runs, runs[-1]])
    with pytest.raises(ValueError, match="no runs of the baseline 'adamw', but of 'adamw, lr 0.1'; 'adamw, lr 0.2'; 'lion'$"):
        plots.compare(plots.grouped(runs), "adamw", tmp_path / "out")


def test_runs_that_do_not_compare_are_refused(tmp_path):
    def grouped(**other):
        return plots.grouped([plots.read(folder(tmp_path / str(i), run([4, 3]), **flags))
                              for i, flags in enumerate(({}, {"optimizer": "lion", **other}))])
    for other, message in (({"data": "mine"}, "data is mine, not minihh"), ({"eval_samples": 9}, "eval_samples is 9, not None")):
        with pytest.raises(ValueError, match=f"lion does not compare with adamw: {message}"):
            plots.compare(grouped(**other), "adamw", tmp_path / "out")
    runs = grouped()
    runs["dpo"] = {1: ({"flags": {"optimizer": "lion"}}, DPO)}
    with pytest.raises(ValueError, match="dpo does not compare with adamw: loss is val_dpo_loss, not val_loss"):
        plots.compare(runs, "adamw", tmp_path / "out")
    assert list(grouped(variance_every=5, log_every=1)) == ["adamw", "lion"]


def test_variance_picture_shows_these_numbers(tmp_path, drawn):
    probe = {"step": 0, "samples": 0, "seconds": 1.0, "probe_loss": 3.0, "grad_variance": 4.0, "grad_variance_relative": 0.4,
             "update_variance": [0.5, 0.25, 0.15], "update_variance_relative": [0.05, 0.03, 0.01], "displacement_variance": 2.0,
             "displacement_variance_relative": 0.2}
    plots.draw(folder(tmp_path / "run", [SFT[0], probe, {**probe, "seconds": 2.0, "probe_loss": 2.0}], optimizer="lion-pma"))
    for figure, xs in zip(drawn[-2:], ([3.0, 2.0], [1.0, 2.0])):   # against the loss, against time
        shown = [axis.containers[0] for axis in figure.axes]
        for (points, _, _), y in zip(shown, (4.0, 0.3, 2.0, 0.4, 0.03, 0.2)):
            assert list(points.get_xdata()) == xs and list(points.get_ydata()) == pytest.approx([y, y])
        low_high = [segment[:, 1].tolist() for segment in shown[1][2][0].get_segments()]
        assert low_high == [pytest.approx([0.15, 0.5])] * 2   # from the lowest to the highest tau
        assert {axis.get_yscale() for axis in figure.axes} == {"log"}
        assert all(high > 9 * low for low, high in (axis.get_ylim() for axis in figure.axes))
    assert drawn[-2].axes[0].xaxis_inverted() and not drawn[-1].axes[0].xaxis_inverted()
    assert (tmp_path / "run/variance.png").is_file() and (tmp_path / "run/variance-time.png").is_file()


def test_probes_of_several_seeds_are_averaged():
    assert plots.average([{"step": 5, "update_variance": [1.0, 3.0], "probe_loss": 1.0},
                          {"step": 5, "update_variance": [2.0, 5.0], "probe_loss": 2.0}]) == {
        "step": 5, "update_variance": [1.5, 4.0], "probe_loss": 1.5}


# ---- properties -------------------------------------------------------------------------------------------------------------

def test_both_reach_the_lowest_level_that_both_reach():
    """Whatever the rounding: two falling curves from one start have a speedup, the inverse of the one the other way round."""
    draw = random.Random(1)
    for _ in range(300):
        one, two = ([(0, 7.6209)] + [(step, 7.6209 * draw.random() / step) for step in range(1, 6)] for _ in range(2))
        one, two = (plots.curve([{"x": x, "y": y} for x, y in points], "x", "y") for points in (one, two))
        there, back = plots.speedup(one, two), plots.speedup(two, one)
        assert there[0] * back[0] == pytest.approx(1) and {there[1], back[1]} == {"baseline", "candidate"}


def test_a_cdpo_picture_leaves_out_the_training_loss_that_does_not_compare(tmp_path, drawn):
    plots.draw(folder(tmp_path / "run", DPO, loss="cdpo", beta=0.1, gamma=10.0))
    assert "held out, n = 400" in lines(drawn[0].axes[0]) and not any(k.startswith("training") for k in lines(drawn[0].axes[0]))
    assert "CDPO (gamma 10)" in drawn[0].axes[0].get_title()


def test_the_first_event_alone_can_be_drawn(tmp_path, drawn):
    plots.draw(folder(tmp_path / "run", SFT[:1]))
    assert lines(drawn[0].axes[0])["held out, n = 400"] == ([0], [7.6])


def test_accuracy_axis_is_never_cut(tmp_path, drawn):
    plots.draw(folder(tmp_path / "run", DPO, loss="dpo", beta=0.1, gamma=1.0))
    assert drawn[1].axes[0].get_ylim() == (0, 1) and drawn[0].axes[0].get_ylim()[0] == 0


def test_curves_are_not_pressed_flat(tmp_path, drawn):
    """A loss that falls from 7.6 to 3 is shown from 0, with the unigram's line; one that falls from 0.35 to 0.33 fills the
    picture, and the unigram's 5.1, far above it, is in the legend alone."""
    plots.draw(folder(tmp_path / "scratch", [{**SFT[0], "val_loss": 7.6}, {**SFT[-1], "val_loss": 3.0}]))
    tuned = [{**e, "val_loss": y, "train_eval_loss": y} for e, y in ((SFT[0], 0.35), (SFT[-1], 0.33))]
    plots.draw(folder(tmp_path / "tuned", tuned, lora_rank=8, lora_bias="all"))
    scratch, tuned = drawn[0].axes[0], drawn[2].axes[0]
    assert scratch.get_ylim()[0] == 0 and "unigram frequencies 5.100" in lines(scratch)
    assert 0.32 < tuned.get_ylim()[0] < 0.33 and 0.35 < tuned.get_ylim()[1] < 0.36
    assert "unigram frequencies, above: 5.100" in lines(tuned)
    assert tuned.get_title() == drawn[3].get_suptitle() == "SFT of mini on minihh, LoRA rank 8, bias all"


def test_command_line(tmp_path):
    script = str(Path(plots.__file__))
    run = folder(tmp_path / "run", SFT)
    assert subprocess.run([sys.executable, script, str(run)]).returncode == 0 and (run / "loss.png").is_file()
    bad = subprocess.run([sys.executable, script, str(tmp_path / "none")], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1


def test_one_colour_per_optimizer():
    import optim
    assert plots.COLORS.keys() == optim.OPTIMIZERS.keys() and len(set(plots.COLORS.values())) == len(plots.COLORS)


def test_compare_on_the_command_line(tmp_path):
    script = str(Path(plots.__file__))
    runs = [str(folder(tmp_path / name, run([4, 3, 2]), optimizer=name)) for name in ("adamw", "lion")]
    done = subprocess.run([sys.executable, script, "compare", *runs, "--x", "updates", "--out", str(tmp_path)],
                          capture_output=True, text=True)
    assert done.returncode == 0 and f"| lion | 1 {'| 2.000 (one seed) ' * 2}{'| 1.00 (one seed) ' * 2}|  |" in done.stdout
    assert done.stdout.endswith(f"drawn and kept: {tmp_path}/compare.png, compare.json\n")
    assert (tmp_path / "compare.png").is_file() and not (tmp_path / "compare-variance.png").exists()
    again = subprocess.run([sys.executable, script, "compare", *reversed(runs), "--out", str(tmp_path)], capture_output=True,
                           text=True)
    assert "speedup over lion in samples" in again.stdout   # the first run's, unless one is named
    for arguments, message in ((["compare", runs[1], "--baseline", "adamw"], "no runs of the baseline 'adamw', but of 'lion'"),
                               ([], "required: runs"),
                               (["compare", *runs, "--x", "hours"], "invalid choice"),
                               (["compare", str(tmp_path)], "config.json")):
        bad = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
        assert bad.returncode == 2 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1 and message in bad.stderr
