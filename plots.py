"""
Pictures of a run, drawn from its metrics.jsonl alone.

    python plots.py runs/dpo        # loss.png and accuracy.png again

Training is thin, held-out data solid, a baseline dashed with its number in the legend.
"""
import json
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

TRAIN, HELD_OUT, CHOSEN, REJECTED, BASELINE = "#9aa5b1", "#1f5fa8", "#2a8f5b", "#c8553d", "#555555"


def draw(folder):
    """loss.png and accuracy.png of the run in `folder`."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if any("val_dpo_loss" in e for e in events):
        dpo_loss(events, config, folder / "loss.png")
    else:
        sft_loss(events, config, folder / "loss.png")
    accuracy(events, config, folder / "accuracy.png")


def series(events, key):
    found = [(e["samples"], e[key]) for e in events if key in e]
    return zip(*found) if found else ((), ())


def canvas(columns=1):
    figure = Figure(figsize=(6.4 if columns == 1 else 4.6 * columns, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def finish(axis, x, y, **legend):
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8, **legend)


def baseline(axis, y, name, style="--"):
    if y is not None:
        axis.axhline(y, color=BASELINE, linestyle=style, linewidth=1, label=f"{name} {y:.3f}")


def sft_loss(events, config, path):
    figure, (axis,) = canvas()
    axis.plot(*series(events, "train_loss"), color=TRAIN, linewidth=0.8, label="training, per step")
    axis.plot(*series(events, "train_eval_loss"), color=CHOSEN, marker=".", label="training, 200 examples in evaluation mode")
    axis.plot(*series(events, "val_loss"), color=HELD_OUT, marker=".", label=f"held out, n = {config['val_pairs']}")
    baseline(axis, config["baseline_unigram_loss"], "unigram frequencies")
    axis.set_ylim(bottom=0)
    scored = "the response" if config["flags"]["loss_on"] == "response" else "all tokens"
    finish(axis, "dialogues seen", f"nats per token of {scored}")
    axis.set_title(f"SFT of {Path(config['flags']['init']).name} on {Path(config['flags']['data']).name}", fontsize=10)
    figure.savefig(path, dpi=110)


def dpo_loss(events, config, path):
    flags = config["flags"]
    figure, (axis,) = canvas()
    if flags["loss"] == "dpo":   # a CDPO step's loss holds gamma R besides and would not compare
        axis.plot(*series(events, "train_loss"), color=TRAIN, linewidth=0.8, label="training, per step (labels as they come)")
    axis.plot(*series(events, "val_dpo_loss"), color=HELD_OUT, marker=".", label=f"held out, n = {config['val_pairs']}")
    baseline(axis, 0.6931, "policy = reference: log 2 =")
    axis.set_ylim(bottom=0)
    finish(axis, "pairs seen", "DPO loss")
    name = f"CDPO (gamma {flags['gamma']:g})" if flags["loss"] == "cdpo" else "DPO"
    axis.set_title(f"{name}, beta {flags['beta']:g}, on {Path(flags['data']).name}", fontsize=10)
    figure.savefig(path, dpi=110)


def accuracy(events, config, path):
    """Accuracy, rewards and log-probabilities side by side. An SFT run has no reference and so no rewards."""
    has_rewards = any("val_chosen_reward" in e for e in events)
    figure, axes = canvas(3 if has_rewards else 2)
    axis, unit = axes[0], "pairs seen" if has_rewards else "dialogues seen"
    if has_rewards:
        axis.plot(*series(events, "train_reward_accuracy"), color=TRAIN, linewidth=0.8,
                  label="reward, training (labels as they come)")
        axis.plot(*series(events, "val_reward_accuracy"), color=HELD_OUT, marker=".",
                  label=f"reward, held out, n = {config['val_pairs']}")
        baseline(axis, next((e["baseline_sft_logps"] for e in events if "baseline_sft_logps" in e), None), "the start's log-prob")
    axis.plot(*series(events, "val_logp_accuracy"), color=CHOSEN, marker=".", label="log-prob: chosen likelier than rejected")
    baseline(axis, config["baseline_longer_wins"], "longer wins", ":")
    axis.set_ylim(0, 1)
    finish(axis, unit, "share of pairs that are ranked right", loc="lower right")
    if has_rewards:
        axes[1].plot(*series(events, "val_chosen_reward"), color=CHOSEN, marker=".", label="chosen")
        axes[1].plot(*series(events, "val_rejected_reward"), color=REJECTED, marker=".", label="rejected")
        axes[1].axhline(0, color=BASELINE, linewidth=0.8)
        finish(axes[1], unit, "reward: beta (log pi - log ref), held out")
    axes[-1].plot(*series(events, "val_chosen_logps"), color=CHOSEN, marker=".", label="chosen")
    axes[-1].plot(*series(events, "val_rejected_logps"), color=REJECTED, marker=".", label="rejected")
    finish(axes[-1], unit, "log-probability of a response, held out")
    if has_rewards:
        figure.supxlabel("Two negative rewards are no bug: only the gap between them enters the loss, and both fall when the "
                         "policy moves probability to other answers.", fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        print("usage: python plots.py RUN ...", file=sys.stderr)
        sys.exit(2)
    for folder in sys.argv[1:]:
        try:
            draw(folder)
        except (OSError, ValueError, KeyError) as e:
            print(f"error: {folder} is not a run that can be drawn ({e})", file=sys.stderr)
            sys.exit(2)
