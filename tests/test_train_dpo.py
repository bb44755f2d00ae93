"""
train_dpo.py: its losses and rewards equal those of an independent loop over transformers' GPT-2, it starts at log 2 with every
pair a tie, and it resumes bit for bit.

    python -m pytest -q tests/test_train_dpo.py
"""
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import data
import model as gpt
import train_dpo
import train_sft
from files import InputError, read_checkpoint

TINY = train_dpo.Config(steps=10, micro_batch=3, accumulate=2, eval_every=5, eval_samples=8, log_every=1, lr=1e-3, warmup=2,
                        beta=0.1)


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """A run folder to start from: some steps of SFT, so that chosen and rejected responses differ in likelihood."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        out = tmp_path_factory.mktemp("sft") / "run"
        train_sft.main(train_sft.Config(steps=30, micro_batch=8, eval_every=30, eval_samples=8, out=str(out)))
        yield str(out)


@pytest.fixture
def no_pictures(monkeypatch):
    """Where pictures are not the point: half of a tiny run's time."""
    monkeypatch.setattr(train_dpo.plots, "draw", lambda folder: None)


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


# ---- oracle --------------------------------------------------------------------------------------------------------------

def hf_logps(model, encoding, prompt, response):
    """Summed log-probability of one response from full logits, one dialogue at a time."""
    p, r = encoding.encode(prompt), encoding.encode(response) + [2047]
    logp = model(torch.tensor([p + r])).logits[0].double().log_softmax(-1)
    return sum(logp[len(p) - 1 + i, token] for i, token in enumerate(r))


def lion_pma_step(parameters, t, K, lr, b1=0.95, b2=0.98, decay=0.1):
    """001_..., algorithm 2, as optim.py's docstring has it."""
    tau, large = t % K, t > 0 and t % K == 0
    for p in parameters:
        g, m = p.grad, getattr(p, "m", torch.zeros_like(p))
        if large:
            u, m, lr_t = torch.sign(b1 * m + (1 - b1) * g / K), K * (b2 * m + (1 - b2) * g / K), lr
        else:
            u, m, lr_t = torch.sign(tau * m + (1 - b1) * g), (tau * m + (1 - b2) * g) / (tau + 1), lr / K
        with torch.no_grad():
            p *= 1 - lr_t * (decay if p.dim() == 2 else 0)
            p -= lr_t * u
        p.m, p.grad = m, None


@pytest.mark.parametrize("optimizer, lr", [("adamw", 1e-3), ("lion-pma", 1e-4)])
def test_ten_steps_equal_a_plain_loop_over_transformers(sft, tmp_path, no_pictures, optimizer, lr):
    cfg = replace(TINY, init=sft, out=str(tmp_path / "run"), schedule="constant", warmup=0, grad_clip=0.0,
                  optimizer=optimizer, lr=lr)
    train_dpo.main(cfg)
    ours = [e for e in metrics(cfg.out) if "train_loss" in e]

    gpt.export(gpt.load(sft), tmp_path / "hf")
    policy, ref = (transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval() for _ in range(2))
    matrices, rest = ([p for p in policy.parameters() if (p.dim() == 2) == want] for want in (True, False))
    adamw = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                              lr=1e-3, betas=(0.9, 0.99))
    pairs, encoding = data.load_pairs("minihh")[0]["train"], data.tokenizer(2048)
    order = data.Order([sum(len(encoding.encode(text)) for text in p) + 2 for p in pairs], 3, cfg.seed)
    for step in range(10):
        losses, margins, norms = [], [], []
        for k in (0, 1):
            for i in order[2 * step + k]:
                prompt, chosen, rejected = pairs[i]
                with torch.no_grad():
                    ref_gap = hf_logps(ref, encoding, prompt, chosen) - hf_logps(ref, encoding, prompt, rejected)
                h = hf_logps(policy, encoding, prompt, chosen) - hf_logps(policy, encoding, prompt, rejected) - ref_gap
                losses.append(torch.log1p(torch.exp(-0.1 * h)))   # -log sigmoid
                (losses[-1] / (6 if optimizer == "adamw" else 3)).backward()   # Lion-PMA steps on each micro-batch's own mean
                margins.append(0.1 * h.item())
            if k == 1 or optimizer == "lion-pma":
                norms.append(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in policy.parameters()])).item())
            if optimizer == "lion-pma":
                lion_pma_step(policy.parameters(), 2 * step + k, 2, lr)
        loss = torch.stack(losses).mean()
        # fp32 sums of log-probabilities near -100 are known to about 1e-5, and AdamW amplifies rounding from step to step
        assert ours[step]["train_loss"] == pytest.approx(loss.item(), abs=5e-4)
        assert ours[step]["train_margin"] == pytest.approx(sum(margins) / 6, abs=1e-3)
        assert ours[step]["grad_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-2)   # updates do not show a wrong scale
        if optimizer == "adamw":
            adamw.step()
            adamw.zero_grad()
    assert ours[-1]["train_margin"] > 0.05   # it moved, so the comparison meant something


# ---- worked by hand ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss, start", [("dpo", math.log(2)), ("cdpo", math.log(2) + 4 / 2)])
def test_starts_at_log_2_with_every_pair_a_tie(sft, tmp_path, no_pictures, loss, start):
    """pi = ref: h = 0 for every pair, so L = log 2 = 0.6931, CDPO adds gamma / 2, rewards and KL are 0, the accuracy is 1/2."""
    train_dpo.main(replace(TINY, init=sft, out=str(tmp_path / "run"), steps=1, loss=loss, gamma=4.0))
    zero, first = metrics(tmp_path / "run")[:2]
    assert zero["val_dpo_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert zero["val_reward_accuracy"] == 0.5 and zero["ties"] == 1
    for key in ("val_margin", "val_chosen_reward", "val_rejected_reward", "val_kl", "val_full_kl"):
        assert zero[key] == pytest.approx(0, abs=1e-5)
    assert zero["regularizer"] == pytest.approx(0.5, abs=1e-6)
    assert first["train_loss"] == pytest.approx(start, abs=1e-5)   # logged after the step, measured before it


def test_a_start_that_is_not_the_reference_is_an_error():
    fine = {"ties": 1.0, "val_dpo_loss": math.log(2)}
    train_dpo.check_start(fine)
    with pytest.raises(InputError, match="DPO loss 0.750000, expected log 2"):
        train_dpo.check_start({**fine, "val_dpo_loss": 0.75})
    with pytest.raises(InputError, match="90.0% of the pairs tie"):
        train_dpo.check_start({**fine, "ties": 0.9})


def test_a_reference_that_differs_stops_the_run(sft, tmp_path, monkeypatch):
    """The check is wired in: a reference that differs stops the run before its first step."""
    noisy = gpt.load(sft)
    with torch.no_grad():
        noisy.wpe.weight.mul_(1.5)   # adding a constant would not do: every LayerNorm takes it out again
    monkeypatch.setattr(train_dpo, "copy", SimpleNamespace(deepcopy=lambda model: noisy))
    with pytest.raises(InputError, match="at step 0 policy and reference differ"):
        train_dpo.main(replace(TINY, init=sft, out=str(tmp_path / "run")))


# ---- properties ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss", ["dpo", "cdpo"])
def test_resumed_run_equals_the_uninterrupted_one(sft, tmp_path, no_pictures, loss):
    cfg = replace(TINY, init=sft, loss=loss)
    train_dpo.main(replace(cfg, out=str(tmp_path / "whole")))
    train_dpo.main(replace(cfg, out=str(tmp_path / "cut"), stop_at=5))
    train_dpo.main(replace(cfg, out=str(tmp_path / "cut"), resume=True))
    for name in ("last.pt", "best.pt"):
        a, b = (read_checkpoint(tmp_path / run / name)["model"] for run in ("whole", "cut"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    timing = ("seconds", "tokens_per_second", "peak_memory")
    a, b = ([{k: v for k, v in e.items() if k not in timing} for e in metrics(tmp_path / run)] for run in ("whole", "cut"))
    assert a == b


def test_gamma_0_is_dpo(sft, tmp_path, no_pictures):
    a = train_dpo.main(replace(TINY, init=sft, out=str(tmp_path / "dpo")))
    b = train_dpo.main(replace(TINY, init=sft, out=str(tmp_path / "cdpo"), loss="cdpo", gamma=0.0))
    assert a["val_dpo_loss"] == pytest.approx(b["val_dpo_loss"], abs=1e-5)
    c = train_dpo.main(replace(TINY, init=sft, out=str(tmp_path / "strong"), loss="cdpo", gamma=1e4))
    assert abs(a["val_dpo_loss"] - c["val_dpo_loss"]) > 1e-3 and c["regularizer"] < a["regularizer"]


def test_it_learns_the_training_preferences(sft, tmp_path):
    out = tmp_path / "run"
    final = train_dpo.main(replace(TINY, init=sft, out=str(out), steps=40, micro_batch=8, eval_every=20))
    assert final["val_margin"] > 0 and final["val_kl"] > 0.01 and final["val_full_kl"] > 0
    losses = [e["train_loss"] for e in metrics(out) if "train_loss" in e]
    assert sum(losses[-10:]) < sum(losses[:10]) - 0.1
    assert all((out / png).read_bytes().startswith(b"\x89PNG") for png in ("loss.png", "accuracy.png"))


@pytest.mark.parametrize("flags, message", [
    (["--dropout", "0.1"], "dropout off"),
    (["--loss", "cdpo", "--label-smoothing", "0.1"], "goes with --loss dpo only"),
    (["--beta", "0"], "--beta: expected a number from"),
    (["--gamma", "-1"], "--gamma: expected"),
    (["--label-smoothing", "0.7"], "--label-smoothing: expected"),
    (["--loss", "ppo"], "invalid choice: 'ppo'"),
    (["--init", "runs/none-such"], "no model 'runs/none-such'"),
])
def test_bad_flags_end_in_one_line_and_status_2(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["train_dpo.py", "--out", str(tmp_path / "run"), "--init", "mini", *flags])
    with pytest.raises(SystemExit) as stopped:
        train_dpo.runs.command_line(train_dpo.main, train_dpo.Config)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "run").exists()
