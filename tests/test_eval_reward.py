"""
eval_reward.py: it counts right answers as the checker does, ranks pairs as the DPO run's own evaluation does, and never sees the
training data.

    python -m pytest -q tests/test_eval_reward.py
"""
import json
import math
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
import eval_reward
import losses
import minihh
import model as gpt
import train_dpo
import train_sft
from files import InputError

TINY = eval_reward.Config(prompts=24, max_new_tokens=8, show=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two short runs: (SFT folder, DPO folder)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(train_sft.plots, "draw", lambda folder: None)
        path = tmp_path_factory.mktemp("runs")
        small = {"eval_samples": 40, "eval_every": 100, "micro_batch": 8}
        train_sft.main(train_sft.Config(steps=20, out=str(path / "sft"), **small))
        train_dpo.main(train_dpo.Config(steps=10, lr=1e-3, init=str(path / "sft"), out=str(path / "dpo"), **small))
        shutil.copy(path / "dpo" / "last.pt", path / "dpo" / "best.pt")   # so few steps need not beat the start on held-out pairs
        yield str(path / "sft"), str(path / "dpo")


# ---- oracle ---------------------------------------------------------------------------------------------------------------

def test_reward_accuracy_equals_full_logits_in_float64(trained, tmp_path):
    """The implicit reward's accuracy, one dialogue at a time, from whole logits: no chunks, no batches, no masks."""
    sft, dpo = trained
    scores = eval_reward.main(replace(TINY, models=("mini", sft, dpo), out=str(tmp_path)))
    encoding = data.tokenizer(2048)
    policy, ref = gpt.load(dpo).double(), gpt.load(sft).double()

    def logps(model, prompt, response):
        p, r = encoding.encode(prompt), encoding.encode(response) + [2047]
        logp = model(torch.tensor([p + r]))[0].log_softmax(-1)
        return sum(logp[len(p) - 1 + i, t].item() for i, t in enumerate(r))
    won = []
    for e in minihh.examples("test")[:24]:
        h = [logps(m, e.prompt, y) for m in (policy, ref) for y in (e.chosen, e.rejected)]
        won.append((h[0] - h[2]) > (h[1] - h[3]))
    assert 0 < np.mean(won) < 1 and scores[dpo]["pairs"]["reward_accuracy"] == pytest.approx(np.mean(won))
    assert scores[dpo]["init"] == sft and "pairs" not in scores[sft] and "pairs" not in scores["mini"]


# ---- worked by hand ---------------------------------------------------------------------------------------------------------

def test_a_model_that_knows_everything_scores_1(trained, tmp_path, monkeypatch):
    """generate is replaced by a parrot of the chosen answers for the first model and of the rejected ones for the second."""
    sft, dpo = trained
    encoding, calls = data.tokenizer(2048), []
    by_prompt = {tuple(encoding.encode(e.prompt)): e for e in minihh.examples("test")}

    def parrot(self, prompts, *args, **kwargs):
        calls.append(1)
        found = [by_prompt[tuple(int(t) for t in p)] for p in prompts]
        return [encoding.encode(e.chosen if len(calls) <= 2 else e.rejected) + [2047] for e in found]   # two modes a model
    monkeypatch.setattr(gpt.GPT, "generate", parrot)
    scores = eval_reward.main(replace(TINY, models=(sft, dpo), out=str(tmp_path)))
    assert scores[sft]["greedy"]["right"] == 1 and scores[sft]["sampled"]["right"] == 1
    assert scores[dpo]["greedy"]["right"] == 0 and scores[dpo]["greedy"]["against_init"] == -1
    assert set(scores[sft]["greedy"]["by_skill"].values()) == {1.0}


def test_half_width_by_hand():
    """Differences 1, 0, 0, 1: mean 1/2, sample variance 1/3, standard error sqrt(1/12), times 1.96."""
    assert eval_reward.half_width([1, 0, 0, 1]) == pytest.approx(1.96 * math.sqrt(1 / 12))


# ---- properties -------------------------------------------------------------------------------------------------------------

def test_files_and_printed_table(trained, tmp_path, capsys):
    sft, dpo = trained
    scores = eval_reward.main(replace(TINY, models=("mini", sft, dpo), out=str(tmp_path)))
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads(json.dumps(scores))
    generations = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert len(generations) == 3 * 2 * 24 and {g["mode"] for g in generations} == {"greedy", "sampled"}
    text = capsys.readouterr().out
    assert "greedy, share right" in text and "reward accuracy on the test pairs" in text and "paired, 95 %" in text
    again = eval_reward.main(replace(TINY, models=("mini", sft, dpo), out=str(tmp_path)))
    assert again == scores   # samples have a generator of their own


def test_pair_logps_do_not_depend_on_the_batch(trained):
    model = gpt.load(trained[0])
    pairs, _ = data.load_pairs("minihh", ("test",))
    tokens, _ = data.tokenize(pairs["test"][:40], 2048, 512)
    with torch.no_grad():
        whole = eval_reward.pair_logps(model, tokens, torch.no_grad)
        alone = torch.stack([losses.batch_logps(model, data.pair_batch(tokens, [i])) for i in range(40)], 1)
    torch.testing.assert_close(whole, alone, rtol=1e-6, atol=1e-4)   # sums near -100 in fp32


def test_a_reference_that_has_changed_is_refused(trained, tmp_path):
    sft, dpo = trained
    shutil.copytree(dpo, tmp_path / "dpo")
    config = json.loads((tmp_path / "dpo" / "config.json").read_text())
    config["init_sha256"] = "0" * 64
    (tmp_path / "dpo" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="holds other weights now"):
        eval_reward.main(replace(TINY, models=(str(tmp_path / "dpo"),), out=str(tmp_path / "eval")))


@pytest.mark.parametrize("flags, message", [
    (["--models", "runs/none"], "no model 'runs/none'"),
    (["--models", "mini", "--data", "a.jsonl,b.jsonl"], "no such file"),
    (["--seed", "x"], "invalid int value"),
    (["--prompts", "0"], "--prompts: expected at least 2, found 0"),
])
def test_bad_flags_end_in_one_line_and_status_2(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["eval_reward.py", "--out", str(tmp_path / "eval"), *flags])
    with pytest.raises(SystemExit) as stopped:
        eval_reward.runs.command_line(eval_reward.main, eval_reward.Config)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "eval").exists()
