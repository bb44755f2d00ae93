"""
train_dpo.py: its losses and rewards equal those of an independent loop over transformers' GPT-2, it starts at log 2 with every
pair a tie, a cached reference is as good as a live one, and it resumes bit for bit.

    python -m pytest -q tests/test_train_dpo.py
"""
import contextlib
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers

import data
import lora
import model as gpt
import optim
import reference
import train_dpo
import train_sft
from files import InputError, fingerprint, read_checkpoint, write_checkpoint

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


def caches(home):
    return {f.parent.name for f in Path(home).rglob("logps.npz")}


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
    assert abs(ours[-1]["train_margin"]) > 0.05   # it moved, so the comparison meant something


def test_ten_lora_steps_equal_a_plain_loop_over_peft(sft, tmp_path, no_pictures):
    """Adapters of peft beside transformers' GPT-2, with the A that our seed draws; the reference is a second, frozen model there,
    and the policy with its adapters off here."""
    cfg = replace(TINY, init=sft, out=str(tmp_path / "run"), schedule="constant", warmup=0, grad_clip=0.0, lora_rank=4,
                  lora_alpha=2.0, lora_bias="all", lr=3e-3)
    train_dpo.main(cfg)
    ours = [e for e in metrics(cfg.out) if "train_loss" in e]

    torch.manual_seed(cfg.seed)
    adapted = gpt.load(sft)
    gpt.export(adapted, tmp_path / "hf")
    lora.add_lora(adapted, 4, 2.0)
    base, ref = (transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval() for _ in range(2))
    policy = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=2, target_modules=["c_attn", "c_proj", "c_fc"], bias="all",
                                                       fan_in_fan_out=True)).eval()
    theirs = dict(policy.named_parameters())
    with torch.no_grad():
        for name, layer in lora.adapters(adapted):
            theirs[f"base_model.model.transformer.{name}.lora_A.default.weight"].copy_(layer.A)
    trainable = [p for p in policy.parameters() if p.requires_grad]
    matrices, rest = ([p for p in trainable if p.dim() == n] for n in (2, 1))
    adamw = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                              lr=3e-3, betas=(0.9, 0.99))
    pairs, encoding = data.load_pairs("minihh")[0]["train"], data.tokenizer(2048)
    order = data.Order([sum(len(encoding.encode(text)) for text in p) + 2 for p in pairs], 3, cfg.seed)
    for step in range(10):
        total = 0.0
        for i in [i for k in (0, 1) for i in order[2 * step + k]]:
            gap, ref_gap = (hf_logps(m, encoding, pairs[i].prompt, pairs[i].chosen)
                            - hf_logps(m, encoding, pairs[i].prompt, pairs[i].rejected) for m in (policy, ref))
            loss = torch.log1p(torch.exp(-0.1 * (gap - ref_gap.detach()))) / 6
            loss.backward()
            total += loss.item()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in trainable])).item()
        assert ours[step]["train_loss"] == pytest.approx(total, abs=2e-4)   # fp32, as above
        assert ours[step]["grad_norm"] == pytest.approx(norm, rel=1e-2)
        adamw.step()
        adamw.zero_grad()
    assert max(abs(e["train_margin"]) for e in ours) > 0.02   # it moved


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


@pytest.mark.parametrize("how", ["live", "cache"])
def test_a_reference_that_differs_stops_the_run(sft, tmp_path, monkeypatch, how):
    """The check is wired in: a reference that differs stops the run before its first step."""
    noisy = gpt.load(sft)
    with torch.no_grad():
        noisy.wpe.weight.mul_(1.5)   # adding a constant would not do: every LayerNorm takes it out again
    monkeypatch.setattr(train_dpo, "copy", SimpleNamespace(deepcopy=lambda model: noisy))
    monkeypatch.setattr(train_dpo, "again", lambda *arguments: noisy)
    with pytest.raises(InputError, match="at step 0 policy and reference differ"):
        train_dpo.main(replace(TINY, init=sft, out=str(tmp_path / "run"), reference=how))


@pytest.mark.parametrize("rank", [0, 2])
def test_flops_by_hand(sft, tmp_path, no_pictures, rank):
    """One step of 2 micro-batches of 3 pairs. A prompt of p tokens is there once, a response of n with end-of-text puts in n - 1
    and is scored n times. In the second of two blocks, the matrices behind attention, 9 of the 12 (of the adapters' 16 C r
    numbers 12), meet scored places only. A live reference costs a forward pass more, a cached one nothing, in CDPO the product
    with the vocabulary."""
    pairs, encoding = data.load_pairs("minihh")[0]["train"], data.tokenizer(2048)
    order = data.Order([sum(len(encoding.encode(text)) for text in p) + 2 for p in pairs], 3, TINY.seed)
    met = [[len(encoding.encode(text)) + (k > 0) for k, text in enumerate(pairs[i])] for k in (0, 1) for i in order[k]]
    tokens, scored = sum(p + c + r - 2 for p, c, r in met), sum(c + r for _, c, r in met)
    matrices = 2 * 128 ** 2 * (15 * tokens + 9 * scored) + 2 * 2048 * 128 * scored
    adapters = 2 * rank * 128 * (20 * tokens + 12 * scored)
    attention = 4 * 2 * 128 * sum(p * (p + 1) // 2 + sum(p * n + n * (n + 1) // 2 for n in (c - 1, r - 1)) for p, c, r in met)
    policy = (2 if rank else 3) * matrices + 3 * (adapters + attention)
    for loss, how, ours in (("dpo", "cache", policy), ("cdpo", "cache", policy + 2 * 2048 * 128 * scored),
                            ("dpo", "live", policy + matrices + attention), ("cdpo", "live", policy + matrices + attention)):
        final = train_dpo.main(replace(TINY, init=sft, out=str(tmp_path / f"{loss}-{how}"), steps=1, eval_every=1, eval_answers=0,
                                       loss=loss, reference=how, lora_rank=rank))
        assert (final["tokens"], final["flops"]) == (tokens, ours), (loss, how)


# ---- properties ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss, adapters", [("dpo", {}), ("cdpo", {}), ("dpo", {"lora_rank": 2, "lora_bias": "all"}),
                                            ("cdpo", {"lora_rank": 1, "optimizer": "lion-pma"}), ("cdpo", {"reference": "live"}),
                                            ("cdpo", {"lora_rank": 1, "reference": "cache"})])
def test_resumed_run_equals_the_uninterrupted_one(sft, tmp_path, no_pictures, capsys, loss, adapters):
    cfg = replace(TINY, init=sft, loss=loss, **adapters)
    train_dpo.main(replace(cfg, out=str(tmp_path / "whole")))
    train_dpo.main(replace(cfg, out=str(tmp_path / "cut"), stop_at=5))
    capsys.readouterr()
    train_dpo.main(replace(cfg, out=str(tmp_path / "cut"), resume=True))
    cached = cfg.reference == "cache" or cfg.reference == "auto" and not cfg.lora_rank
    printed = capsys.readouterr().out
    assert ("reference: 60 pairs in " in printed and ", all of them there" in printed) == cached   # 10 steps of 6
    for name in ("last.pt", "best.pt"):
        a, b = (read_checkpoint(tmp_path / run / name)["model"] for run in ("whole", "cut"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    timing = ("seconds", "tokens_per_second", "peak_memory")
    a, b = ([{k: v for k, v in e.items() if k not in timing} for e in metrics(tmp_path / run)] for run in ("whole", "cut"))
    assert a == b


def test_one_model_in_memory_is_as_good_as_two(sft, tmp_path, no_pictures, monkeypatch):
    """With a live copy of the base in the place of the adapters that are off, a LoRA run finds the same to the last bit."""
    cfg = replace(TINY, init=sft, lora_rank=2, lora_bias="all", loss="cdpo", lr=1e-2)
    one = train_dpo.main(replace(cfg, out=str(tmp_path / "one")))
    base, real = gpt.load(sft).eval().requires_grad_(False), reference.live
    monkeypatch.setattr(reference, "live", lambda model: real(base))
    monkeypatch.setattr(lora, "adapters_off", lambda model: contextlib.nullcontext())   # nobody switches them off
    two = train_dpo.main(replace(cfg, out=str(tmp_path / "two")))
    timing = ("seconds",)
    assert {k: v for k, v in one.items() if k not in timing} == {k: v for k, v in two.items() if k not in timing}
    assert one["val_full_kl"] > 1e-4 and one["policy_entropy"] > 0   # they differed by then


@pytest.mark.parametrize("loss, tolerance", [("dpo", 1e-5), ("cdpo", 2e-3)])   # fp32; states in fp16 times gamma
@pytest.mark.parametrize("rank", [0, 2])
def test_a_cached_reference_is_as_good_as_a_live_one(sft, tmp_path, no_pictures, capsys, loss, tolerance, rank):
    """The same losses, margins and gradients over six steps; evaluations, which look at other pairs, are live in both."""
    cfg = replace(TINY, init=sft, steps=6, eval_every=3, eval_answers=0, loss=loss, gamma=2.0, lora_rank=rank,
                  lr=1e-2 if rank else 3e-3)
    said = {}
    for how in ("live", "cache", "auto"):
        train_dpo.main(replace(cfg, out=str(tmp_path / how), reference=how))
        said[how] = "reference: " in capsys.readouterr().out
    assert said == {"live": False, "cache": True, "auto": not rank}   # with adapters a live one takes no memory
    live, cached = metrics(tmp_path / "live"), metrics(tmp_path / "cache")
    for a, b in zip(live, cached, strict=True):
        for key in ("train_loss", "train_margin", "train_reward_accuracy", "val_dpo_loss", "val_full_kl", "regularizer"):
            assert a.get(key) == pytest.approx(b.get(key), abs=tolerance)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-3)
    assert live[-1]["val_full_kl"] > 1e-3 and max(abs(e.get("train_margin", 0)) for e in live) > 0.05   # it moved
    auto = metrics(tmp_path / "auto")
    assert [e.get("train_loss") for e in auto] == [e.get("train_loss") for e in (live if rank else cached)]


def test_the_policy_moves_and_the_cache_does_not(sft, tmp_path, no_pictures):
    """The head is tied to the embedding that trains: CDPO's reference keeps its own."""
    cfg = replace(TINY, init=sft, steps=4, eval_every=4, eval_answers=0, loss="cdpo", lr=1e-2)
    live, cached = (train_dpo.main(replace(cfg, out=str(tmp_path / how), reference=how)) for how in ("live", "cache"))
    moved = gpt.load(sft).wte.weight - read_checkpoint(tmp_path / "cache" / "last.pt")["model"]["wte.weight"]
    assert moved.abs().max() > 0.01 and cached["val_dpo_loss"] == pytest.approx(live["val_dpo_loss"], abs=2e-3)


@pytest.mark.parametrize("change, new", [({}, 0), ({"seed": 2}, 0), ({"lr": 0.1, "loss": "dpo", "beta": 1.0}, 0),
                                         ({"lora_rank": 2, "reference": "cache"}, 0), ({"loss": "cdpo"}, 1),
                                         ({"block_size": 400}, 1), ({"half": "sft"}, 1), ({"dtype": "bfloat16"}, 1),
                                         ({"init": "mini"}, 1)], ids=str)
def test_what_makes_another_cache(sft, tmp_path, monkeypatch, change, new):
    """Model, data, context, precision and whether states are kept; nothing else. Adapters start as their base."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    class Filled(Exception):
        pass

    def stop(*arguments, **facts):
        raise Filled
    monkeypatch.setattr(train_dpo.runs.Run, "begin", stop)   # what comes after the cache is filled
    for cfg in (TINY, replace(TINY, **change)):
        with pytest.raises(Filled):
            train_dpo.main(replace(cfg, out=str(tmp_path / "run"), init=change.get("init", sft) if cfg is not TINY else sft))
    assert len(caches(tmp_path / "home")) == 1 + new and not (tmp_path / "run").exists()


def test_the_variance_probe_draws_from_all_pairs_and_all_are_there(sft, tmp_path, no_pictures, capsys):
    """A step sees 6 of the training pairs, the probe any."""
    pairs = data.load_pairs("minihh")[0]["train"][:60]
    rows = [{"chosen": p.prompt + p.chosen, "rejected": p.prompt + p.rejected} for p in pairs]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = replace(TINY, init=sft, data=str(tmp_path / "some.jsonl"), steps=1, eval_every=1, eval_answers=0)
    train_dpo.main(replace(cfg, out=str(tmp_path / "run")))
    printed = capsys.readouterr().out
    assert "reference: 6 pairs in " in printed and ", 6 of them to compute" in printed
    n = len(data.load_pairs(cfg.data)[0]["train"])
    train_dpo.main(replace(cfg, out=str(tmp_path / "probed"), variance_every=1))
    printed = capsys.readouterr().out
    assert f"reference: {n} pairs in " in printed and f", {n - 6} of them to compute" in printed
    probe = next(e for e in metrics(tmp_path / "probed") if "probe_loss" in e)
    assert probe["probe_loss"] == pytest.approx(math.log(2), abs=1e-5)   # all of them: NaN for what is not there


def test_bfloat16_with_a_cache(sft, tmp_path, no_pictures):
    """As on a GPU, here by autocast on the CPU: states are kept, and every pair is a tie before the first step."""
    cfg = replace(TINY, init=sft, steps=3, eval_every=3, eval_answers=0, loss="cdpo", dtype="bfloat16")
    live, cached = (metrics(tmp_path / how) for how in ("live", "cache")
                    if train_dpo.main(replace(cfg, out=str(tmp_path / how), reference=how)))
    for a, b in zip(live, cached, strict=True):
        assert a.get("train_loss") == pytest.approx(b.get("train_loss"), abs=2e-2)
    assert cached[0]["ties"] == 1


def test_an_init_that_changes_under_the_run_is_refused(sft, tmp_path, monkeypatch):
    """A run with a cache reads --init again where it evaluates."""
    start, out = tmp_path / "start", tmp_path / "run"
    shutil.copytree(sft, start)
    other = read_checkpoint(start / "best.pt")
    other["model"]["ln_f.bias"] += 0.1

    def change(folder):   # after the evaluation at step 0
        write_checkpoint(start / "best.pt", other)
    monkeypatch.setattr(train_dpo.plots, "draw", change)
    cfg = replace(TINY, init=str(start), out=str(out), eval_answers=0, steps=4, eval_every=2)
    with pytest.raises(InputError, match=f"--init {start} is not what it was when the run began"):
        train_dpo.main(cfg)
    assert [e["step"] for e in metrics(out)] == [0, 1, 2]
    with pytest.raises(InputError, match=f"cannot be resumed: --init {start} is not what it was"):
        train_dpo.main(replace(cfg, resume=True))


@pytest.mark.parametrize("init", ["mini", None])
def test_the_reference_comes_again_without_a_draw(sft, init):
    """--init mini is drawn from the seed: the same weights again, and torch's generator where it was."""
    cfg = replace(TINY, init=init or sft, block_size=300)
    torch.manual_seed(cfg.seed)
    model = gpt.load(cfg.init, block_size=300)
    state, sha256 = torch.get_rng_state(), fingerprint(model.state_dict())
    again = train_dpo.again(cfg, sha256, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state) and fingerprint(again.state_dict()) == sha256
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    with pytest.raises(InputError, match="is not what it was when the run began"):
        train_dpo.again(cfg, "another", torch.device("cpu"))


@pytest.mark.parametrize("optimizer", optim.OPTIMIZERS)
def test_lora_works_with_every_optimizer(sft, tmp_path, no_pictures, optimizer):
    """State for what trains and no more, of the size that was printed; best.pt is a plain model."""
    out = tmp_path / "run"
    final = train_dpo.main(replace(TINY, init=sft, out=str(out), steps=2, eval_every=2, lora_rank=2, optimizer=optimizer,
                                   variance_every=1))
    config, last = json.loads((out / "config.json").read_text()), read_checkpoint(out / "last.pt")
    assert config["trainable"] == 2 * 2 * 16 * 128 and config["parameters"] == 724_480 + config["trainable"]
    assert sum(t.numel() for t in last["model"].values()) == config["trainable"]
    state = [t for s in last["optimizer"].values() for t in s.values() if torch.is_tensor(t) and t.dim()]
    assert sum(t.numel() * t.element_size() for t in state) == config["optimizer_bytes"]
    assert all(t.any() for t in last["model"].values()) and final["updates"] in (2, 4)   # B too has moved
    assert sum(p.numel() for p in gpt.load(str(out)).parameters()) == 724_480


def test_a_lora_runs_files_agree(sft, tmp_path, no_pictures):
    """best.pt is the base with adapter.pt merged; last.pt alone is no model, and its run says so in one line."""
    out = tmp_path / "run"
    final = train_dpo.main(replace(TINY, init=sft, out=str(out), lora_rank=2, lora_bias="lora_only", lr=1e-2))
    assert final["best"] == final["val_dpo_loss"]   # the last evaluation is the best: all files are of step 10
    again = lora.merge(lora.load_adapter(gpt.load(sft), out / "adapter.pt")).state_dict()
    best = gpt.load(str(out)).state_dict()
    assert best.keys() == again.keys() and all(torch.equal(best[key], again[key]) for key in best)
    with pytest.raises(InputError, match="holds only what a LoRA run trains"):
        gpt.load(str(out / "last.pt"))
    with pytest.raises(InputError, match="cannot be resumed with other flags: --lora-rank was 2, now 4"):
        train_dpo.main(replace(TINY, init=sft, out=str(out), lora_rank=4, lora_bias="lora_only", lr=1e-2, resume=True))
    train_dpo.main(replace(TINY, init=str(out), out=str(tmp_path / "next"), steps=1))   # the next stage; step 0 is checked
    train_dpo.main(replace(TINY, init=sft, out=str(out), steps=1, overwrite=True))   # full fine-tuning: no adapter stays behind
    assert not (out / "adapter.pt").exists()


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


@pytest.mark.parametrize("how", ["live", "cache"])
def test_what_does_not_fit_in_memory_says_so_before_there_is_a_run(sft, tmp_path, monkeypatch, capsys, how):
    """And before the reference is computed: the longest micro-batch comes first."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    seen, real = [], data.pair_batch

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(data, "pair_batch", lambda tokens, rows: seen.append((tokens, rows)) or real(tokens, rows))
    monkeypatch.setattr(train_dpo.losses, "dpo_loss", full)
    monkeypatch.setattr(sys, "argv", ["train_dpo.py", "--out", str(tmp_path / "run"), "--init", sft, "--steps", "3",
                                      "--micro-batch", "4", "--accumulate", "2", "--reference", how])
    with pytest.raises(SystemExit) as stopped:
        train_dpo.runs.command_line(train_dpo.main, train_dpo.Config)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: out of GPU memory") and error.count("\n") == 1
    assert not (tmp_path / "run").exists() and not caches(tmp_path / "home")
    (train, rows), = seen
    order = data.Order(lengths := train.lengths().sum(1), 4, TINY.seed)
    assert lengths[rows].sum() == max(lengths[order[i]].sum() for i in range(6)) and len(rows) == 4


def test_a_disk_that_is_too_small_is_refused_before_there_is_a_run(sft, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e5))
    with pytest.raises(InputError, match="above half of the .* that are free: use --reference live"):
        train_dpo.main(replace(TINY, init=sft, out=str(tmp_path / "run"), loss="cdpo"))
    assert not (tmp_path / "run").exists() and not caches(tmp_path / "home")
