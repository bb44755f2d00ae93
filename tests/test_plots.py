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
                                                  "flags": {"init": "mini", "data": "minihh", "loss_on": "response", "seed": 1,
                                                            "optimizer": "adamw", "out": str(path), **flags}}))
    return path


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


def test_where_there_are_no_pairs_there_is_no_accuracy(tmp_path, drawn):
    run = folder(tmp_path / "run", [{k: v for k, v in e.items() if "logp" not in k} for e in SFT], loss_on="all")
    config = json.loads((run / "config.json").read_text())
    del config["baseline_longer_wins"]
    (run / "config.json").write_text(json.dumps(config | {"data": {"train blocks": 7}}))
    plots.draw(run)
    assert drawn[0].axes[0].get_xlabel() == "blocks seen" and len(drawn) == 1 and not (run / "accuracy.png").exists()


def test_dpo_pictures_show_these_numbers(tmp_path, drawn):
    plots.draw(folder(tmp_path / "run", DPO, loss="dpo", beta=0.1, gamma=1.0))
    loss, accuracy = drawn
    assert lines(loss.axes[0])["held out, n = 400"] == ([0, 16], [0.6931, 0.5])
    assert "policy = reference: log 2 = 0.693" in lines(loss.axes[0])
    first, rewards, logps = accuracy.axes
    assert lines(first)["reward, held out, n = 400"] == ([0, 16], [0.5, 0.9])
    assert {"longer wins 0.490", "the start's log-prob 0.700"} <= lines(first).keys()
    assert lines(rewards)["rejected"] == ([0, 16], [0.0, -1.0]) and lines(logps)["rejected"] == ([0, 16], [-30.0, -40.0])
    assert DPO[-1]["val_chosen_reward"] < 0 and "Two negative rewards are no bug" in accuracy.get_supxlabel()
    rises = [*DPO[:-1], {**DPO[-1], "val_chosen_reward": 0.1}]   # then there is nothing to explain
    plots.draw(folder(tmp_path / "rises", rises, loss="dpo", beta=0.1, gamma=1.0))
    assert drawn[-1].get_supxlabel() == ""


REWARD = [{"step": step, "samples": 16 * step, "val_reward_loss": loss, "train_eval_loss": loss + 0.1,
           "val_reward_accuracy": right, "train_eval_accuracy": right - 0.1, "val_chosen_reward": loss,
           "val_rejected_reward": -loss, "val_margin": 2 * loss,
           "val_reward_calibration": [[0.6, 0.5, 0.2, 0.8, 2], [0.9, 1.0, 0.4, 1 - 1e-12, 2]],
           "train_eval_calibration": [[0.6, 0.4, 0.1, 0.7, 2]], "val_reward_calibration_error": 0.1,
           "train_eval_calibration_error": 0.2,
           "val_reward_margins": [0.5, 1.0, -0.2, 2.0], "train_eval_margins": [-1.0, 1.0]}
          for step, loss, right in ((0, 0.6931, 0.5), (1, 0.5, 0.75))]


def test_reward_pictures_show_these_numbers(tmp_path, drawn):
    path = folder(tmp_path / "run", [*REWARD, {"samples": 8, "train_loss": 0.6, "train_reward_accuracy": 0.7}])
    config = json.loads((path / "config.json").read_text())
    del config["flags"]["loss_on"]
    (path / "config.json").write_text(json.dumps(config | {"baseline_sft_logps": 0.8}))
    plots.draw(path)
    loss, calibration, accuracy = drawn
    assert lines(loss.axes[0])["held out, n = 400"] == ([0, 16], [0.6931, 0.5])
    assert "all rewards equal: log 2 = 0.693" in lines(loss.axes[0])
    said, margins = calibration.axes
    points, _, (bars,) = said.containers[1]   # of the last evaluation; training pairs come first
    assert (list(points.get_xdata()), list(points.get_ydata())) == ([0.6, 0.9], [0.5, 1.0])
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [pytest.approx([0.2, 0.8]), pytest.approx([0.4, 1.0])]
    assert said.containers[1].get_label() == "held out: calibration error 0.100" and calibration.get_suptitle().endswith("step 1")
    assert sum(bar.get_height() for bar in margins.patches if hasattr(bar, "get_height")) == pytest.approx(1)
    first, rewards = accuracy.axes   # no log-probabilities
    assert lines(first)["reward, held out, n = 400"] == ([0, 16], [0.5, 0.75]) and "the start's log-prob 0.800" in lines(first)
    assert lines(rewards)["rejected"] == ([0, 16], [-0.6931, -0.5]) and accuracy.get_supxlabel() == ""
    assert (path / "calibration.png").is_file()


def judged(reward, right):
    return {"greedy": {"n": 3, "reward": reward, "reward_95": [reward - 1, reward + 2], "right": right}}


def test_score_pictures_show_these_numbers(tmp_path, drawn):
    scores = {"judge": {"name": "runs/reward"}, "own answers": {"test, chosen": {"reward": 0.5}},
              "models": {"mini": judged(-2.0, 0.0), "a/step-5.pt": judged(-1.0, 0.2), "a/step-9.pt": judged(1.0, 0.6)}}
    curves = {"a": [(5, scores["models"]["a/step-5.pt"]), (9, scores["models"]["a/step-9.pt"])]}
    plots.score_over_steps(scores, curves, ["greedy"], tmp_path / "steps.png")
    reward, right = drawn[0].axes
    shown = lines(reward)
    assert shown["a, greedy"] == ([5, 9], [-1.0, 1.0])
    assert shown.keys() == {"a, greedy", "mini -2.00, greedy", "test, chosen +0.50"}
    band = reward.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (-2.0, 3.0) and lines(right)["a, greedy"] == ([5, 9], [0.2, 0.6])
    low, high = reward.get_ylim()
    assert low < -2.0 and high > 1.0   # nothing is cut, the data's own answers are in it
    rewards = {(name, "greedy"): [score["greedy"]["reward"]] * 3 for name, score in scores["models"].items()}
    plots.reward_histograms(scores, rewards | {("test, chosen", "data"): [0.4, 0.6, 0.5]}, ["greedy"], tmp_path / "rewards.png")
    (axis,) = drawn[1].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["test, chosen", "a/step-9.pt", "a/step-5.pt", "mini"]
    assert [text.get_text() for text in axis.texts] == ["+0.50", "+1.00", "-1.00", "-2.00"]
    # mini lies too far left: no line of its mean, and all of it in the first bin
    assert {(*line.get_xdata(),) for line in axis.get_lines()} == {(x, x) for x in (-1.0, 1.0, 0.5)}
    assert axis.patches[-1].get_data().values[0] - axis.patches[-1].get_data().baseline == pytest.approx(0.85)
    assert (tmp_path / "steps.png").is_file() and (tmp_path / "rewards.png").is_file()


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
    cut, old = folder(tmp_path / "cut", SFT), folder(tmp_path / "old", SFT)
    (cut / "metrics.jsonl").write_bytes((cut / "metrics.jsonl").read_bytes()[:-9])
    (old / "metrics.jsonl").write_text((old / "metrics.jsonl").read_text().replace("samples", "seen"))
    for arguments, message in (([str(tmp_path / "none")], "holds no run: expected config.json"), ([], "required: runs"),
                               ([str(cut)], f"cut/metrics.jsonl:{len(SFT)}: not JSON"),
                               ([str(old)], "old: its config.json or metrics.jsonl is damaged, or of another version")):
        bad = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
        assert bad.returncode == 2 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1 and message in bad.stderr


def test_one_colour_per_optimizer():
    import optim
    assert plots.COLORS.keys() == optim.OPTIMIZERS.keys() and len(set(plots.COLORS.values())) == len(plots.COLORS)
