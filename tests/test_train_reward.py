"""
train_reward.py: its losses equal those of an independent loop over transformers' GPT2ForSequenceClassification, it starts with
every pair a tie, what it leaves is centred, and it resumes bit for bit.

    python -m pytest -q tests/test_train_reward.py
"""
import contextlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import data
import lora
import losses
import model as gpt
import train_reward
import train_sft
from files import InputError, read_checkpoint

TINY = train_reward.Config(steps=10, micro_batch=3, accumulate=2, eval_every=5, eval_samples=8, log_every=1, lr=1e-3, warmup=2,
                           head="hidden")


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        out = tmp_path_factory.mktemp("sft") / "run"
        train_sft.main(train_sft.Config(steps=10, micro_batch=8, eval_every=10, eval_samples=8, out=str(out)))
        yield str(out)


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(train_reward.plots, "draw", lambda folder: None)


@pytest.fixture
def few_for_the_centre(monkeypatch):
    """The centre is a mean over this many training pairs: less work where it is not the point."""
    monkeypatch.setattr(train_reward, "CENTER", 20)


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def whole_ids(pair, which):
    encoding = data.tokenizer(2048)
    return encoding.encode(pair.prompt) + encoding.encode(pair[which]) + [2047]


def plain_rewards(model, pairs, which):
    """One dialogue at a time, from text: no padding, no batches, no places to get wrong."""
    with torch.no_grad():
        hidden = [model.hidden(torch.tensor([whole_ids(p, which)]))[0, -1] for p in pairs]
    return torch.stack(hidden) @ model.reward_head.weight[0] - model.center


# ---- oracle --------------------------------------------------------------------------------------------------------------

def test_ten_steps_equal_a_plain_loop_over_transformers(sft, tmp_path, no_pictures, few_for_the_centre):
    """GPT2ForSequenceClassification with one label is GPT-2 with a linear head read at a dialogue's last token. One dialogue at a
    time, Bradley-Terry written out, torch's unfused AdamW."""
    cfg = replace(TINY, init=sft, out=str(tmp_path / "run"), schedule="constant", warmup=0, grad_clip=0.0, lr=3e-3)
    train_reward.main(cfg)
    ours = [e for e in metrics(cfg.out) if "train_loss" in e]

    gpt.export(gpt.load(sft), tmp_path / "hf")
    hf = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "hf", num_labels=1).eval()
    torch.nn.init.zeros_(hf.score.weight)
    matrices, rest = ([p for p in hf.parameters() if (p.dim() == 2) == want] for want in (True, False))
    adamw = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                              lr=3e-3, betas=(0.9, 0.99))
    pairs, encoding = data.load_pairs("minihh")[0]["train"], data.tokenizer(2048)
    order = data.Order([sum(len(encoding.encode(text)) for text in p) + 2 for p in pairs], 3, cfg.seed)
    for step in range(10):
        total, won = 0.0, 0.0
        for i in (i for k in (0, 1) for i in order[2 * step + k]):
            chosen, rejected = (hf(torch.tensor([whole_ids(pairs[i], which)])).logits[0, 0] for which in (1, 2))
            loss = torch.log1p(torch.exp(rejected - chosen)) / 6
            loss.backward()
            total, won = total + loss.item(), won + (0.5 if chosen == rejected else float(chosen > rejected)) / 6
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in hf.parameters()])).item()
        assert ours[step]["train_loss"] == pytest.approx(total, abs=1e-4)   # AdamW amplifies rounding from step to step
        assert ours[step]["grad_norm"] == pytest.approx(norm, rel=1e-2)
        assert ours[step]["train_reward_accuracy"] == pytest.approx(won)
        adamw.step()
        adamw.zero_grad()
    head = read_checkpoint(tmp_path / "run" / "last.pt")["model"]["reward_head.weight"]
    assert head.norm() > 0.03   # it moved, so the comparison meant something
    torch.testing.assert_close(head, hf.score.weight.data, atol=3e-4, rtol=0)


# ---- worked by hand ------------------------------------------------------------------------------------------------------

def test_it_starts_with_every_pair_a_tie(sft, tmp_path, no_pictures, few_for_the_centre):
    train_reward.main(replace(TINY, init=sft, out=str(tmp_path / "run"), steps=1))
    first, step = metrics(tmp_path / "run")[:2]
    assert first["val_reward_accuracy"] == 0.5 and first["val_reward_loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["val_reward_margins"] == [0.0] * 8 and first["val_margin"] == 0
    assert step["train_loss"] == pytest.approx(math.log(2), abs=1e-6) and step["train_reward_accuracy"] == 0.5


def test_with_pma_each_micro_batch_is_an_update_of_its_own_mean(sft, tmp_path, no_pictures, few_for_the_centre):
    """At a head of zero the gradient is the head's alone, half of the mean difference of the hidden states. The rate is 0, so
    that it stays there: the reported norm is the mean of two micro-batches' norms."""
    train_reward.main(replace(TINY, init=sft, out=str(tmp_path / "run"), steps=1, eval_every=1, optimizer="adamw-pma", lr=0.0,
                              grad_clip=0.0))
    model, (pairs, encoding) = gpt.load(sft).eval(), (data.load_pairs("minihh")[0]["train"], data.tokenizer(2048))
    order, norms = data.Order([sum(len(encoding.encode(text)) for text in p) + 2 for p in pairs], 3, TINY.seed), []
    for k in (0, 1):
        with torch.no_grad():
            gaps = [torch.sub(*(model.hidden(torch.tensor([whole_ids(pairs[i], which)]))[0, -1] for which in (1, 2)))
                    for i in order[k]]
        norms.append(torch.stack(gaps).mean(0).norm().item() / 2)
    assert [e for e in metrics(tmp_path / "run") if "grad_norm" in e][0]["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-4)


def test_the_starts_log_probabilities_are_a_baseline(sft, tmp_path, no_pictures, few_for_the_centre):
    """The share of held-out pairs whose chosen response the SFT run finds likelier, from whole logits."""
    train_reward.main(replace(TINY, init=sft, out=str(tmp_path / "run"), steps=1, eval_samples=12))
    model, likelier = gpt.load(sft).eval(), []
    for pair in data.load_pairs("minihh")[0]["valid"][:12]:
        n, logps = len(data.tokenizer(2048).encode(pair.prompt)), []
        for which in (1, 2):
            ids = torch.tensor([whole_ids(pair, which)])
            with torch.no_grad():
                logp = model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            logps.append(logp[n - 1:].sum().item())
        likelier.append(logps[0] > logps[1])
    found = json.loads((tmp_path / "run" / "config.json").read_text())["baseline_sft_logps"]
    assert found == pytest.approx(sum(likelier) / 12) and found != 0.5


@pytest.mark.parametrize("change", [{"val_reward_accuracy": 0.51}, {"val_reward_loss": 0.7}])
def test_a_start_that_is_no_tie_is_refused(change):
    found = {"val_reward_accuracy": 0.5, "val_reward_loss": math.log(2)}
    train_reward.check_start(found)
    with pytest.raises(InputError, match="at step 0 not all rewards are equal"):
        train_reward.check_start(found | change)


def test_calibration_by_hand():
    """Four pairs: margins of +-log 3 (sigmoid 3/4) of which one is wrong, and of +-log 9 (sigmoid 9/10), both right."""
    m3, m9 = math.log(3), math.log(9)
    low, high = train_reward.calibration(torch.tensor([m9, -m3, m9, m3]), bins=2)
    assert low[:2] == pytest.approx((0.75, 0.5)) and high[:2] == pytest.approx((0.9, 1.0))
    assert low[2:] == (*data.interval(0.5, 2), 2) and high[2] < 1 <= high[3] + 1e-9
    assert [n for *_, n in train_reward.calibration(torch.randn(10), bins=4)] == [3, 3, 2, 2]
    assert len(train_reward.calibration(torch.randn(3))) == 3   # no bin is empty


def test_counters_and_flops_by_hand(sft, tmp_path, no_pictures, few_for_the_centre):
    """3 steps of 2 micro-batches of 3 pairs are 18 pairs. Whole dialogues go in, end-of-text too, a prompt once for both
    responses; no vocabulary is multiplied. In the second of two blocks, the matrices behind attention, 9 of the 12, meet only the
    last tokens, two a pair; with the likelihood, also the places that predict the responses."""
    final = train_reward.main(replace(TINY, init=sft, steps=3, out=str(tmp_path / "run")))
    assert (final["step"], final["updates"], final["micro_step"], final["samples"]) == (3, 3, 6, 18)
    final = train_reward.main(replace(TINY, init=sft, steps=1, eval_every=1, out=str(tmp_path / "one")))
    pairs, encoding = data.load_pairs("minihh")[0]["train"], data.tokenizer(2048)
    order = data.Order([sum(len(encoding.encode(text)) for text in p) + 2 for p in pairs], 3, TINY.seed)
    met = [[len(encoding.encode(text)) + (k > 0) for k, text in enumerate(pairs[i])] for k in (0, 1) for i in order[k]]
    tokens, scored = sum(map(sum, met)), sum(c + r for _, c, r in met)
    places = sum(p * (p + 1) // 2 + sum(p * n + n * (n + 1) // 2 for n in (c, r)) for p, c, r in met)   # that are attended to
    assert final["tokens"] == tokens

    def three_passes(read, head):
        return 3 * (2 * 128 ** 2 * (12 * tokens + 3 * tokens + 9 * read) + 4 * 2 * 128 * places + 2 * 2048 * 128 * head)
    assert final["flops"] == three_passes(2 * 6, 0)
    more = train_reward.main(replace(TINY, init=sft, steps=1, eval_every=1, head="likelihood", out=str(tmp_path / "more")))
    assert more["flops"] == three_passes(2 * 6 + scored, scored) and more["tokens"] == tokens


# ---- properties ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("adapters", [{}, {"lora_rank": 4, "lora_bias": "all"}])
def test_what_it_leaves_is_centred(sft, tmp_path, no_pictures, monkeypatch, adapters):
    """In best.pt and in every step-N.pt the mean reward of the first training pairs' chosen responses is 0; last.pt does not hold
    the centre, and nothing that is measured in training knows of it."""
    monkeypatch.setattr(train_reward, "CENTER", 30)
    train_reward.main(replace(TINY, init=sft, out=str(tmp_path / "run"), keep_every=5, **adapters))
    assert sorted(f.name for f in (tmp_path / "run").glob("step-*")) == ["step-0.pt", "step-10.pt", "step-5.pt"]
    train = data.load_pairs("minihh")[0]["train"][:30]
    means = {}
    for name in ("best.pt", "step-0.pt", "step-10.pt"):
        model = gpt.load(str(tmp_path / "run" / name), kind=gpt.RewardModel).eval()
        means[name] = plain_rewards(model, train, 1).mean().item()
        assert abs(means[name]) < 1e-5 and (model.center != 0) == (name != "step-0.pt" and bool(model.reward_head.weight.any()))
    assert "center" not in read_checkpoint(tmp_path / "run" / "last.pt")["model"]


def test_rewards_do_not_depend_on_padding_neighbours_or_batch_size(sft):
    """The place that is read comes from the length: an answer that holds end-of-text or the padding's id changes nothing."""
    model = gpt.reward_model(gpt.load(sft)).eval()
    torch.nn.init.normal_(model.reward_head.weight)
    pairs = data.load_pairs("minihh", ("valid",))[0]["valid"][:20]
    tokens, _ = data.tokenize(pairs, 2048, 512)
    prompts, answers = ([tokens[i][part] for i in range(20)] for part in (0, 1))
    answers[3] = torch.tensor([2047, 5, 0, 0]).numpy()       # end-of-text first, two of the padding's id at the end
    answers[4] = torch.tensor([2047, 2047, 2047]).numpy()
    dialogues = list(zip(prompts, answers))
    with torch.no_grad():
        alone = torch.stack([model.hidden(torch.tensor([[*p.tolist(), *a.tolist()]]))[0, -1] for p, a in zip(prompts, answers)])
        alone = alone @ model.reward_head.weight[0]
        for size in (1, 3, 20):
            batches = [data.collate(dialogues[i:i + size], whole=True) for i in range(0, 20, size)]
            found = torch.cat([losses.batch_rewards(model, batch) for batch in batches])
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
        pairs = [(p, a, b) for (p, a), b in zip(dialogues, [a for _, a in dialogues[1:] + dialogues[:1]])]   # two to each prompt
        for rows in (slice(0, 20), slice(3, 5)):
            found = losses.batch_rewards(model, data.collate(pairs[rows], whole=True)).chunk(2)[0]
            torch.testing.assert_close(found, alone[rows], atol=1e-5, rtol=0)
        lengths = [len(p) + len(a) for p, a in dialogues]
        for filler in (0, 2047, 7):   # a rectangle with more columns, of any token
            wider = torch.full((20, max(lengths) + 9), filler)
            for row, dialogue, n in zip(wider, dialogues, lengths):
                row[:n] = torch.cat([torch.from_numpy(part.astype(int)) for part in dialogue])
            hidden = model.hidden(wider)[torch.arange(20), torch.tensor(lengths) - 1]
            torch.testing.assert_close(model.rewards(hidden), alone, atol=1e-5, rtol=0)
    assert alone.std() > 0.1


def test_with_likelihood_they_do_not_either_and_equal_full_logits(sft):
    """w h + a log pi(y|x), one dialogue at a time, from whole logits."""
    model = gpt.reward_model(gpt.load(sft), likelihood=True).eval()
    torch.nn.init.normal_(model.reward_head.weight, std=0.1)
    model.reward_head.weight.data[0, -1] = 0.3
    pairs = data.load_pairs("minihh", ("valid",))[0]["valid"][:12]
    tokens, _ = data.tokenize(pairs, 2048, 512)
    expected = []
    with torch.no_grad():
        for pair in pairs:
            ids, n = whole_ids(pair, 1), len(data.tokenizer(2048).encode(pair.prompt))
            logp, h = model(torch.tensor([ids]))[0].log_softmax(-1), model.hidden(torch.tensor([ids]))[0, -1]
            logps = sum(logp[t - 1, ids[t]] for t in range(n, len(ids)))
            expected.append(h @ model.reward_head.weight[0, :-1] + 0.3 * logps)
        for size in (1, 5, 12):
            found = torch.cat([losses.batch_rewards(model, data.reward_batch(tokens, range(i, min(i + size, 12)), ["chosen"]))
                               for i in range(0, 12, size)])
            torch.testing.assert_close(found, torch.stack(expected), atol=2e-5, rtol=0)


@pytest.mark.parametrize("stop_at, extra", [(5, {}), (7, {"head": "likelihood"}), (7, {"optimizer": "adamw-pma"}),
                                            (7, {"lora_rank": 2, "lora_dropout": 0.3, "lora_bias": "all"})])
def test_resumed_run_equals_the_uninterrupted_one(sft, tmp_path, no_pictures, few_for_the_centre, stop_at, extra):
    cfg = replace(TINY, init=sft, dropout=0.1, variance_every=3, keep_every=3, **extra)
    train_reward.main(replace(cfg, out=str(tmp_path / "whole")))
    cut = replace(cfg, out=str(tmp_path / "cut"))
    train_reward.main(replace(cut, stop_at=stop_at))
    train_reward.main(replace(cut, resume=True))
    for name in ("last.pt", "best.pt", "step-3.pt", "step-9.pt"):
        a, b = (read_checkpoint(tmp_path / run / name) for run in ("whole", "cut"))
        assert a["model"].keys() == b["model"].keys() and all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])

    def timeless(run):
        return [{k: v for k, v in e.items() if k not in ("seconds", "tokens_per_second", "peak_memory")}
                for e in metrics(tmp_path / run)]
    assert timeless("whole") == timeless("cut")
    assert (tmp_path / "whole" / "samples.txt").read_text() == (tmp_path / "cut" / "samples.txt").read_text()


@pytest.mark.parametrize("head", ["hidden", "likelihood"])
def test_lora_trains_the_head_whole(sft, tmp_path, no_pictures, few_for_the_centre, capsys, head):
    """AdamW's state is two numbers for each of the adapters and the head; in last.pt all of them have moved."""
    train_reward.main(replace(TINY, init=sft, out=str(tmp_path / "run"), lora_rank=3, head=head))
    trains = 3 * 2 * 16 * 128 + 128 + (head == "likelihood")
    assert f"trains {trains:,} of" in capsys.readouterr().out
    last = read_checkpoint(tmp_path / "run" / "last.pt")["model"]
    assert sum(t.numel() for t in last.values()) == trains and all(t.any() for t in last.values())
    held = read_checkpoint(tmp_path / "run" / "adapter.pt", ("adapter",))["adapter"]
    assert held.keys() == last.keys() | {"center"}


def test_an_adapter_goes_back_on_its_base(sft, tmp_path):
    """Head and centre with it: the same rewards from the adapter's file, from the model and from its merged state; a language
    model refuses it."""
    model = lora_model = gpt.reward_model(gpt.load(sft)).eval()
    lora.add_lora(lora_model, 3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p) * p.requires_grad)
    model.center = torch.tensor(0.7)
    lora.save_adapter(model, adapter := tmp_path / "adapter.pt")
    again = lora.load_adapter(gpt.reward_model(gpt.load(sft)), adapter).eval()
    merged = gpt.build(model.config, {k: t.clone() for k, t in lora.merged_state(model).items()}, "", gpt.RewardModel).eval()
    pairs = data.load_pairs("minihh", ("valid",))[0]["valid"][:5]
    expected = plain_rewards(model, pairs, 1)
    assert torch.equal(plain_rewards(again, pairs, 1), expected) and expected.std() > 0.01
    torch.testing.assert_close(plain_rewards(merged, pairs, 1), expected, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="its reward head reads something else"):
        lora.load_adapter(gpt.reward_model(gpt.load(sft), likelihood=True), adapter)
    base = gpt.load(sft)
    with pytest.raises(InputError, match="expected the adapter of a language model"):
        lora.load_adapter(base, adapter)
    assert not hasattr(base, "lora")


def test_it_learns_and_leaves_a_whole_run_folder(sft, tmp_path, few_for_the_centre):
    """80 steps teach it that rude and evasive answers are worse."""
    out = tmp_path / "run"
    final = train_reward.main(replace(TINY, init=sft, steps=80, eval_every=40, micro_batch=16, accumulate=1, eval_samples=100,
                                      lr=4e-3, out=str(out)))
    assert final["val_reward_loss"] < 0.68 and final["val_reward_accuracy"] > 0.6
    config = json.loads((out / "config.json").read_text())
    assert 0 < config["baseline_longer_wins"] < 1 and 0 < config["baseline_sft_logps"] < 1 and config["val_pairs"] == 100
    for name in ("loss.png", "accuracy.png", "calibration.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    worst = (out / "samples.txt").read_text()
    assert "=== step 80" in worst and "chosen" in worst and "rejected" in worst


def test_the_pairs_it_shows_are_those_it_ranks_most_wrongly(sft):
    model = gpt.reward_model(gpt.load(sft))
    torch.nn.init.normal_(model.reward_head.weight)
    pairs = data.load_pairs("minihh", ("valid",))[0]["valid"][:10]
    tokens, _ = data.tokenize(pairs, 2048, 512)
    found, worst = train_reward.evaluate(TINY, model, contextlib.nullcontext, tokens, tokens)
    margins = plain_rewards(model.eval(), pairs, 1) - plain_rewards(model, pairs, 2)
    assert found["val_reward_margins"] == pytest.approx(margins.tolist(), rel=1e-3, abs=1e-4)
    said, right = torch.sigmoid(margins.abs()), (margins > 0).float()   # eight bins for ten pairs: two of two, six of one
    bins = torch.tensor_split(said.argsort(), 8)
    gap = sum(len(rows) * abs(said[rows].mean() - right[rows].mean()) for rows in bins) / 10
    assert [len(rows) for rows in bins][:3] == [2, 2, 1]
    assert found["val_reward_calibration_error"] == pytest.approx(gap.item(), abs=1e-4)
    first = pairs[int(margins.argmin())]
    assert worst.startswith(first.prompt) and f"[{first.chosen}<|endoftext|>]" in worst.split("\n\n\n")[0]


# ---- bad input -----------------------------------------------------------------------------------------------------------

def test_what_does_not_fit_in_memory_says_so_before_there_is_a_run(sft, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(train_reward.losses, "reward_loss", full)
    monkeypatch.setattr(sys, "argv", ["train_reward.py", "--out", str(tmp_path / "run"), "--init", sft, "--steps", "2"])
    with pytest.raises(SystemExit) as stopped:
        train_reward.runs.command_line(train_reward.main, train_reward.Config)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: out of GPU memory") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_reward_model_is_no_language_model_and_the_reverse(sft, tmp_path, no_pictures, few_for_the_centre):
    reward = str(tmp_path / "run")
    train_reward.main(replace(TINY, init=sft, steps=1, out=reward))
    for script in (train_reward, train_sft):
        with pytest.raises(InputError, match="is a reward model, and a language model is needed here"):
            script.main(script.Config(init=reward, out=str(tmp_path / "again"), steps=1))
    with pytest.raises(InputError, match="is a language model, and a reward model is needed here"):
        gpt.load(sft, kind=gpt.RewardModel)
    with pytest.raises(InputError, match="mini is a language model"):
        gpt.load("mini", kind=gpt.RewardModel)
