"""
plots.py: a picture shows the numbers of metrics.jsonl, in the unit it names.

    python -m pytest -q tests/test_plots.py
"""
import json
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
                                                  "flags": {"init": "mini", "data": "minihh", "loss_on": "response", **flags}}))
    return path


@pytest.fixture
def drawn(monkeypatch):
    """Keeps every figure that plots draws."""
    figures, real = [], plots.canvas

    def keep(columns=1):
        figure, axes = real(columns)
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


# ---- properties -------------------------------------------------------------------------------------------------------------

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


def test_command_line(tmp_path):
    script = str(Path(plots.__file__))
    run = folder(tmp_path / "run", SFT)
    assert subprocess.run([sys.executable, script, str(run)]).returncode == 0 and (run / "loss.png").is_file()
    bad = subprocess.run([sys.executable, script, str(tmp_path / "none")], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
