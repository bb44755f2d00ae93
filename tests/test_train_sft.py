"""
train_sft.py: its losses equal those of an independent loop over transformers' GPT-2, it learns, it resumes bit for bit, and bad
input ends in one line and status 2.

    python -m pytest -q tests/test_train_sft.py
"""
import functools
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import data
import model as gpt
import train_sft
from files import InputError, read_checkpoint

ROOT = Path(__file__).parent.parent
TINY = train_sft.Config(steps=10, micro_batch=4, accumulate=2, eval_every=5, eval_samples=8, log_every=1, lr=1e-3, warmup=2)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def no_pictures(monkeypatch):
    """Where pictures are not the point: half of a tiny run's time."""
    monkeypatch.setattr(train_sft.plots, "draw", lambda folder: None)


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def without_time(event):
    return {k: v for k, v in event.items() if k not in ("seconds", "tokens_per_second", "peak_memory")}


def run_flags(monkeypatch, *flags):
    """The script as a program, in this process: (exit status, what it printed to stderr is in capsys)."""
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        train_sft.runs.command_line(train_sft.main, train_sft.Config)
    return stopped.value.code


# ---- oracle --------------------------------------------------------------------------------------------------------------

def pma_step(parameters, t, K, lr, b1=0.9, b2=0.99, decay=0.1):
    """AdamW-PMA, 001_..., algorithm 1, as optim.py's docstring has it."""
    tau, n, large = t % K, t // K + 1, t > 0 and t % K == 0
    for p in parameters:
        g, m, v = p.grad, getattr(p, "m", 0), getattr(p, "v", 0)
        if large:
            m, v, lr_t = b1 * m + (1 - b1) * g / K, b2 * v + (1 - b2) * g ** 2 / K, lr
        else:
            m, v, lr_t = (tau * m + (1 - b1) * g) / (tau + 1), (tau * v + (1 - b2) * g ** 2) / (tau + 1), lr / K ** 0.5
        with torch.no_grad():
            p *= 1 - lr_t * (decay if p.dim() == 2 else 0)
            p -= lr_t * (m / (1 - b1 ** n)) / ((v / (1 - b2 ** n)) ** 0.5 + 1e-8)
        p.m, p.v, p.grad = (K * m, K * v, None) if large else (m, v, None)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-pma"])
def test_ten_steps_equal_a_plain_loop_over_transformers(tmp_path, no_pictures, optimizer):
    """Full logits, labels of -100 on the prompt, torch's unfused AdamW or PMA's equations: written without our losses, loader,
    schedule or optimizers. Both see each micro-batch's loss as its share, by tokens, of the step's mean."""
    gpt.torch.manual_seed(5)
    start = gpt.load("mini")
    gpt.export(start, tmp_path / "hf")
    cfg = replace(TINY, init=str(tmp_path / "hf"), out=str(tmp_path / "run"), schedule="constant", warmup=0, grad_clip=0.0,
                  optimizer=optimizer)
    train_sft.main(cfg)
    ours = [(e["train_loss"], e["grad_norm"]) for e in metrics(cfg.out) if "train_loss" in e]

    theirs, hf = [], transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()   # eval: no dropout
    matrices = [p for p in hf.parameters() if p.dim() == 2]
    rest = [p for p in hf.parameters() if p.dim() != 2]
    adamw = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                              lr=1e-3, betas=(0.9, 0.99))
    pairs = data.load_pairs("minihh")[0]["train"]
    encoding = data.tokenizer(2048)
    order = data.Order([len(encoding.encode(p.prompt + p.chosen)) + 1 for p in pairs], 4, cfg.seed)

    def ids(i):
        return encoding.encode(pairs[i].prompt), encoding.encode(pairs[i].prompt + pairs[i].chosen) + [2047]

    def gradient_norm():
        return torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in hf.parameters()])).item()

    for step in range(10):
        scored = sum(len(whole) - len(prompt) for k in (0, 1) for prompt, whole in map(ids, order[2 * step + k]))
        total, norms = 0.0, []
        for k in (0, 1):
            for prompt, whole in map(ids, order[2 * step + k]):   # one dialogue at a time: no padding, no batching
                labels = torch.tensor([-100] * len(prompt) + whole[len(prompt):])
                logits = hf(torch.tensor([whole])).logits[0]
                nll = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum") / scored
                (nll if optimizer == "adamw" else 2 * nll).backward()
                total += nll.item()
            if optimizer == "adamw-pma":
                norms.append(gradient_norm())
                pma_step(hf.parameters(), 2 * step + k, 2, 1e-3)
        if optimizer == "adamw":
            norms.append(gradient_norm())
            adamw.step()
            adamw.zero_grad()
        theirs.append((total, sum(norms) / len(norms)))
    # AdamW divides by the gradient's size, so rounding in tiny gradients grows over the steps; a wrong mask is off by 0.1 at once
    assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in theirs], abs=2e-4)
    assert [norm for _, norm in ours] == pytest.approx([norm for _, norm in theirs], rel=1e-2)   # AdamW hides a wrong scale


def some_dialogues(n=120):
    """Of one turn each, as (question, better answer, worse answer)."""
    return [(f"What is {i}?" if i % 3 else f"Name a thing.\nNumber {i}", f"It is {i}, of course.", "No idea.") for i in range(n)]


def written(folder, kind):
    """The same dialogues in each of the formats; or, as plain text, their answers."""
    found, path = some_dialogues(), folder / {"pairs": "a.jsonl", "list": "a.json", "alpaca": "b.json", "text": "a.txt"}[kind]
    if kind == "pairs":
        rows = [{"chosen": f"\n\nHuman: {q}\n\nAssistant: {good}", "rejected": f"\n\nHuman: {q}\n\nAssistant: {bad}"}
                for q, good, bad in found]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "text":
        path.write_text("\n<|endoftext|>\n".join(f"{q}\n" + f"{good}\n" * 3 for q, good, _ in found))
    else:
        split = [(*q.split("\n"), "")[:2] for q, _, _ in found]
        path.write_text(json.dumps([f"\n\nHuman: {q}\n\nAssistant: {good}" for q, good, _ in found] if kind == "list" else [
            {"instruction": a, "input": b, "output": good} for (a, b), (_, good, _) in zip(split, found)]))
    return str(path)


PAIRED = {"val_logp_accuracy", "val_chosen_logps", "val_rejected_logps"}


def test_dialogues_alone_train_as_those_of_pairs(tmp_path, no_pictures, capsys):
    """To the bit, and stopped and resumed: a list of dialogues, and Alpaca's rows, are the chosen half of pairs. What needs the
    other half is left out."""
    cfg, found = replace(TINY, steps=2, eval_every=2, micro_batch=2, eval_samples=5, eval_answers=1), {}
    for kind in ("pairs", "list", "alpaca"):
        for stop in (None,) if kind == "pairs" else (1, None):
            train_sft.main(replace(cfg, data=written(tmp_path, kind), out=str(tmp_path / kind), stop_at=stop,
                                   resume=kind != "pairs" and stop is None))
        config = json.loads((tmp_path / kind / "config.json").read_text())
        assert ("baseline_longer_wins" in config) == (kind == "pairs") and config["baseline_unigram_loss"] > 0
        found[kind] = [without_time(e) for e in metrics(tmp_path / kind)], (tmp_path / kind / "samples.txt").read_text()
        said = capsys.readouterr().out
        assert ("longer-wins" in said, "likelier" in said, "5 held-out pairs: " in said) == (kind == "pairs",) * 3
    assert PAIRED < found["pairs"][0][0].keys()
    expected = [{k: v for k, v in e.items() if k not in PAIRED} for e in found["pairs"][0]], found["pairs"][1]
    assert found["list"] == found["alpaca"] == expected


def test_plain_text_is_scored_as_transformers_scores_it(tmp_path, no_pictures):
    """Before the first step: each held-out block alone, every token but its first. Held-out documents are mixed."""
    gpt.torch.manual_seed(5)
    gpt.export(gpt.load("mini"), tmp_path / "hf")
    path = written(tmp_path, "text")
    train_sft.main(replace(TINY, steps=0, init=str(tmp_path / "hf"), data=f"{path},{path}", loss_on="all", block_size=128,
                           eval_samples=1000, eval_answers=0, out=str(tmp_path / "run")))
    encoding, hf = data.tokenizer(2048), transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    texts = [pair.chosen for pair in data.load_pairs(f"{path},{path}", need="all")[0]["valid"]]
    assert sorted(texts) == sorted(part.strip() + "<|endoftext|>" for part in Path(path).read_text().split("<|endoftext|>"))
    line = torch.tensor([t for text in texts for t in encoding.encode(text, allowed_special="all")])
    nll = scored = 0
    for block in line.split(128):
        with torch.no_grad():
            nll, scored = nll + hf(block[None], labels=block[None]).loss.item() * (len(block) - 1), scored + len(block) - 1
    event, = metrics(tmp_path / "run")
    assert event["val_loss"] == pytest.approx(nll / scored, abs=1e-5) and scored > 4000   # fp32 sums
    assert not PAIRED & event.keys()


# ---- worked by hand ------------------------------------------------------------------------------------------------------

def test_counters_by_hand(tmp_path, no_pictures):
    """3 steps of 2 micro-batches of 4 are 24 dialogues; the first loss of random weights is near log 2048 = 7.62."""
    final = train_sft.main(replace(TINY, steps=3, out=str(tmp_path / "run")))
    assert (final["step"], final["updates"], final["micro_step"], final["samples"]) == (3, 3, 6, 24)
    final = train_sft.main(replace(TINY, steps=3, out=str(tmp_path / "pma"), optimizer="adamw-pma"))   # an update a micro-batch
    assert (final["step"], final["updates"], final["micro_step"], final["samples"]) == (3, 6, 6, 24)
    first = metrics(tmp_path / "run")[0]
    assert first["step"] == 0 and first["val_loss"] == pytest.approx(math.log(2048), abs=0.5)


@pytest.mark.parametrize("init, bias, extra", [("mini", "none", 0), ("random:mini", "lora_only", 2 * 9 * 128),
                                               ("mini", "all", 2 * 11 * 128 + 128)])
def test_what_trains_by_hand(tmp_path, no_pictures, capsys, init, bias, extra):
    """mini has C = 128 and two blocks; the adapters of rank r beside its four matrices have 16 C r numbers a block, the linear
    layers 9 C biases, the LayerNorms 2 C a block and C at the end. AdamW keeps two fp32 numbers for each. No other moves."""
    train_sft.main(replace(TINY, steps=2, eval_every=2, out=str(tmp_path / "run"), init=init, lora_rank=3, lora_bias=bias))
    trains = 3 * 2 * 16 * 128 + extra
    assert (f"trains {trains:,} of 736,768 parameters ({trains / 736_768:.3%}), optimizer state {8e-6 * trains:.2f} MB"
            in (printed := capsys.readouterr().out))
    assert f"note: --init {init} is random, and adapters beside random weights learn little" in printed
    gpt.torch.manual_seed(TINY.seed)
    base, tuned = gpt.load("mini").state_dict(), gpt.load(str(tmp_path / "run")).state_dict()
    moved = {key for key in base if not torch.equal(base[key], tuned[key])}
    matrices = {key for key in base if key.startswith("h.") and base[key].dim() == 2}
    biases = {key for key in base if key.endswith("bias") and (bias == "all" or bias == "lora_only" and "ln_" not in key)}
    assert moved == matrices | biases


def test_every_lora_flag_arrives(tmp_path, no_pictures, monkeypatch):
    given, real = [], train_sft.lora.add_lora
    monkeypatch.setattr(train_sft.lora, "add_lora", lambda *arguments: given.append(arguments[1:5]) or real(*arguments))
    train_sft.main(replace(TINY, steps=1, eval_every=1, out=str(tmp_path / "run"), lora_rank=3, lora_alpha=5.0, lora_dropout=0.2,
                           lora_bias="all"))
    assert given == [(3, 5.0, 0.2, "all")]


def test_lora_flops_by_hand(tmp_path, no_pictures):
    """Two passes of the frozen matrices and the head, three of adapters and attention. In the second of two blocks, the matrices
    behind attention, 9 of the 12, meet only the places that predict the r + 1 tokens of a response; of the adapters' 16 C r
    numbers a block these are 12."""
    full = train_sft.main(replace(TINY, steps=1, eval_every=1, out=str(tmp_path / "full")))["flops"]
    adapted = train_sft.main(replace(TINY, steps=1, eval_every=1, out=str(tmp_path / "lora"), lora_rank=4))["flops"]
    pairs, encoding = data.load_pairs("minihh")[0]["train"], data.tokenizer(2048)
    order = data.Order([len(encoding.encode(p.prompt + p.chosen)) + 1 for p in pairs], 4, TINY.seed)
    rows = [(len(encoding.encode(pairs[i].prompt)), len(encoding.encode(pairs[i].chosen))) for k in (0, 1) for i in order[k]]
    blocks = sum(2 * 12 * 128 ** 2 * (p + r) + 2 * 128 ** 2 * (3 * (p + r) + 9 * (r + 1)) for p, r in rows)   # end-of-text, the
    #                                                                                                last token, is never put in
    head = sum(2 * 2048 * 128 * (r + 1) for _, r in rows)
    attention = sum(4 * 2 * 128 * (p + r) * (p + r + 1) // 2 for p, r in rows)
    adapters = sum(2 * 4 * 128 * (16 * (p + r) + 4 * (p + r) + 12 * (r + 1)) for p, r in rows)
    assert full == 3 * (blocks + head + attention) and adapted == 2 * (blocks + head) + 3 * (attention + adapters)


def test_where_all_tokens_are_scored_the_last_block_sees_all_by_hand(tmp_path, no_pictures):
    """A dialogue of n tokens with its end-of-text predicts n - 1, from as many places."""
    final = train_sft.main(replace(TINY, steps=1, eval_every=1, out=str(tmp_path / "run"), loss_on="all"))
    pairs, encoding = data.load_pairs("minihh")[0]["train"], data.tokenizer(2048)
    order = data.Order([len(encoding.encode(p.prompt + p.chosen)) + 1 for p in pairs], 4, TINY.seed)
    ns = [len(encoding.encode(pairs[i].prompt + pairs[i].chosen)) for k in (0, 1) for i in order[k]]
    assert final["tokens"] == sum(ns)
    assert final["flops"] == 3 * sum(2 * (2 * 12 * 128 ** 2 + 2048 * 128) * n + 4 * 2 * 128 * n * (n + 1) // 2 for n in ns)


def test_steps_come_from_epochs(tmp_path):
    """8000 training pairs in steps of 4 * 500: an epoch of 4 steps. --steps wins."""
    cfg = replace(TINY, steps=None, epochs=0.5, micro_batch=500, accumulate=4)
    assert train_sft.runs.count_steps(cfg, 8000) == 2
    assert train_sft.runs.count_steps(replace(cfg, steps=7), 8000) == 7


# ---- properties ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stop_at, optimizer, adapters", [
    (5, "adamw", {}), (7, "adamw", {}), (7, "agma-perturb", {}),   # studies/faults.py has them all
    (7, "adamw-pma", {"lora_rank": 2, "lora_dropout": 0.3, "lora_bias": "all"})])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, no_pictures, stop_at, optimizer, adapters):
    """Stopped on an evaluation and between two. (Within a period, after a skipped step: tests/test_optim.py.)"""
    cfg = replace(TINY, dropout=0.1, optimizer=optimizer, variance_every=3, **adapters)   # dropout: its state must come back
    train_sft.main(replace(cfg, out=str(tmp_path / "whole")))
    cut = replace(cfg, out=str(tmp_path / "cut"))
    train_sft.main(replace(cut, stop_at=stop_at))
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as f:
        f.write('{"step": 99}\n')   # written after the checkpoint by a run that was then killed: must go
    train_sft.main(replace(cut, resume=True))
    for name in ("last.pt", "best.pt"):
        a, b = (read_checkpoint(tmp_path / run / name) for run in ("whole", "cut"))
        assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    a, b = (read_checkpoint(tmp_path / run / "last.pt") for run in ("whole", "cut"))
    assert str(a["optimizer"]) == str(b["optimizer"]) and torch.equal(a["rng"][0]["cpu"], b["rng"][0]["cpu"])
    assert list(map(without_time, metrics(tmp_path / "whole"))) == list(map(without_time, metrics(tmp_path / "cut")))
    assert (tmp_path / "whole" / "samples.txt").read_text() == (tmp_path / "cut" / "samples.txt").read_text()


def test_plain_text_resumes_bit_for_bit(tmp_path, no_pictures):
    cfg = replace(TINY, steps=3, eval_every=3, micro_batch=2, eval_samples=2, eval_answers=1, loss_on="all", block_size=128,
                  data=written(tmp_path, "text"))
    for name, stops in (("whole", [None]), ("cut", [1, None])):
        for stop in stops:
            train_sft.main(replace(cfg, out=str(tmp_path / name), stop_at=stop, resume=name == "cut" and stop is None))
    whole, cut = (tmp_path / name for name in ("whole", "cut"))
    assert list(map(without_time, metrics(whole))) == list(map(without_time, metrics(cut))) and metrics(cut)[-1]["step"] == 3
    assert (whole / "samples.txt").read_text() == (cut / "samples.txt").read_text() != ""
    a, b = (read_checkpoint(folder / "last.pt")["model"] for folder in (whole, cut))
    assert all(torch.equal(a[key], b[key]) for key in a) and gpt.load(str(whole)).config.block_size == 128


def test_checkpointed_activations_change_no_run(tmp_path, no_pictures):
    """Dropout on: what is computed again is what was computed."""
    cfg = replace(TINY, steps=3, dropout=0.1, eval_every=3, eval_answers=0)
    for name, again in (("kept", False), ("again", True)):
        train_sft.main(replace(cfg, out=str(tmp_path / name), checkpoint_activations=again))
    kept, again = (metrics(tmp_path / name) for name in ("kept", "again"))
    for one, two in zip(kept, again, strict=True):
        assert without_time(one) == pytest.approx(without_time(two), rel=1e-6)


def test_evaluating_changes_nothing(tmp_path, no_pictures):
    often = train_sft.main(replace(TINY, steps=4, dropout=0.1, eval_every=1, out=str(tmp_path / "often")))
    seldom = train_sft.main(replace(TINY, steps=4, dropout=0.1, eval_every=4, out=str(tmp_path / "seldom")))
    assert often["val_loss"] == seldom["val_loss"]


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_it_learns_and_leaves_a_whole_run_folder(tmp_path, loss_on):
    out = tmp_path / "run"
    final = train_sft.main(replace(TINY, steps=40, eval_every=20, micro_batch=8, loss_on=loss_on, out=str(out)))
    first = metrics(out)[0]
    assert final["val_loss"] < first["val_loss"] - 1.5 and final["train_eval_loss"] < first["train_eval_loss"] - 1.5
    config = json.loads((out / "config.json").read_text())
    assert config["flags"]["loss_on"] == loss_on and config["parameters"] > 0 and config["data"]["train pairs"] == 8000
    assert config["val_pairs"] == 8 and 0 < config["baseline_longer_wins"] < 1 and 4 < config["baseline_unigram_loss"] < 6
    assert all((out / png).read_bytes().startswith(b"\x89PNG") for png in ("loss.png", "accuracy.png"))
    assert "Human:" in (out / "samples.txt").read_text()
    steps = [e["step"] for e in metrics(out)]
    assert steps == sorted(steps)
    assert gpt.load(str(out)).config.vocab_size == 2048


def test_ctrl_c_saves_and_exits_with_130_and_resumes(tmp_path):
    flags = ["--steps", "400", "--micro-batch", "2", "--eval-samples", "4", "--log-every", "1", "--eval-every", "1000"]
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, str(ROOT / "train_sft.py"), "--out", str(out), *flags], text=True,
                               stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.startswith("step     3"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 130 and "--resume" in rest
    step = read_checkpoint(out / "last.pt")["at"]["step"]
    assert 3 <= step < 400
    for flag, value, was in (("--micro-batch", "3", 2), ("--optimizer", "lion", "adamw"), ("--accumulate", "8", 1)):
        with pytest.raises(InputError, match=f"{flag} was {was}, now {value}"):
            train_sft.runs.parse(train_sft.Config, ["--out", str(out), "--resume", flag, value])
    cfg = train_sft.runs.parse(train_sft.Config, ["--out", str(out), "--resume", "--stop-at", str(step + 1)])
    assert cfg.micro_batch == 2 and train_sft.main(cfg)["step"] == step + 1


# ---- bad input -----------------------------------------------------------------------------------------------------------

def test_a_run_is_never_overwritten_silently(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    cfg = replace(TINY, steps=1, out=str(out))
    train_sft.main(cfg)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    assert run_flags(monkeypatch, "--out", str(out)) == 2
    assert "already holds a run" in capsys.readouterr().err
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"chosen": 1}\n')
    assert run_flags(monkeypatch, "--out", str(out), "--overwrite", "--data", str(bad)) == 2   # fails before it clears the folder
    assert "bad.jsonl:1: expected the keys" in capsys.readouterr().err
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before


def test_checkpoints_of_another_shape_or_cut_off_are_refused(tmp_path, no_pictures, monkeypatch, capsys):
    out = tmp_path / "run"
    train_sft.main(replace(TINY, steps=1, out=str(out)))
    whole = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(whole[:len(whole) // 2])
    assert run_flags(monkeypatch, "--out", str(out), "--resume") == 2
    assert "last.pt: cut off, damaged" in capsys.readouterr().err
    (out / "last.pt").write_bytes(whole)
    checkpoint = read_checkpoint(out / "last.pt")
    checkpoint["model_config"]["n_embd"] = 64
    gpt_file = tmp_path / "other.pt"
    from files import write_checkpoint
    write_checkpoint(gpt_file, checkpoint)
    assert run_flags(monkeypatch, "--out", str(tmp_path / "new"), "--init", str(gpt_file)) == 2
    assert "tensors do not fit the model" in capsys.readouterr().err


def test_resume_refuses_other_starting_weights_and_other_data(tmp_path, no_pictures, monkeypatch):
    start = tmp_path / "start"
    train_sft.main(replace(TINY, steps=1, out=str(start)))
    cfg = replace(TINY, init=str(start), out=str(tmp_path / "run"))
    train_sft.main(replace(cfg, stop_at=2))
    train_sft.main(replace(TINY, steps=1, seed=2, out=str(start), overwrite=True))
    with pytest.raises(InputError, match="--init .* is not what it was when the run began"):
        train_sft.main(replace(cfg, resume=True))
    train_sft.main(replace(cfg, init="mini", out=str(tmp_path / "other"), stop_at=2))
    monkeypatch.setattr(data, "sha256", lambda *splits: "edited")
    with pytest.raises(InputError, match="--data minihh is not what it was"):
        train_sft.main(replace(cfg, init="mini", out=str(tmp_path / "other"), resume=True))


def test_overwrite_never_deletes_what_it_starts_from(tmp_path, no_pictures):
    start = tmp_path / "start"
    train_sft.main(replace(TINY, steps=1, out=str(start)))
    for init in (start, start / "best.pt"):
        with pytest.raises(InputError, match="would delete --init"):
            train_sft.main(replace(TINY, init=str(init), out=str(start), overwrite=True))


def test_what_does_not_fit_in_memory_says_so_before_there_is_a_run(tmp_path, monkeypatch, capsys):
    """The longest micro-batch of all steps is tried first, with a backward pass; nothing is written."""
    seen, real, out = [], data.sft_batch, tmp_path / "run"

    def full(hidden, *arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(data, "sft_batch", lambda tokens, rows, what: seen.append((tokens, rows)) or real(tokens, rows, what))
    monkeypatch.setattr(train_sft.losses, "sft_loss", full)
    assert run_flags(monkeypatch, "--out", str(out), "--steps", "3", "--micro-batch", "4", "--accumulate", "2") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out of GPU memory: try fewer sequences at a time") and error.count("\n") == 1
    assert not out.exists()
    (train, rows), = seen
    order = data.Order(lengths := train.lengths()[:, :2].sum(1), 4, TINY.seed)
    assert lengths[rows].sum() == max(lengths[order[i]].sum() for i in range(6)) and len(rows) == 4


def test_a_diverged_run_stops_and_keeps_its_last_checkpoint(tmp_path, no_pictures):
    with pytest.raises(InputError, match="step .*: the loss is (nan|inf)"):
        train_sft.main(replace(TINY, lr=1e30, grad_clip=0.0, out=str(tmp_path / "run")))
    assert all(t.isfinite().all() for t in read_checkpoint(tmp_path / "run" / "last.pt")["model"].values())


def test_resume_from_the_command_line_after_overwrite_and_stop_at(tmp_path, no_pictures, capsys):
    """What the printed hint says must work, also where the run began with --overwrite or --stop-at."""
    out = str(tmp_path / "run")
    flags = ["--steps", "3", "--micro-batch", "2", "--eval-samples", "4"]
    cfg = train_sft.runs.parse(train_sft.Config, ["--out", out, "--overwrite", "--stop-at", "2", *flags])
    assert train_sft.main(cfg)["step"] == 2
    printed = capsys.readouterr().out
    assert printed.endswith(f"stopped: go on with --resume --out {out}\n") and "note:" not in printed
    assert train_sft.main(train_sft.runs.parse(train_sft.Config, ["--out", out, "--resume"]))["step"] == 3


def test_a_run_with_missing_pieces_is_not_resumed(tmp_path, no_pictures):
    out = tmp_path / "run"
    cfg = replace(TINY, out=str(out))
    train_sft.main(replace(cfg, stop_at=2))
    whole = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(whole[:5])
    with pytest.raises(InputError, match="metrics.jsonl is shorter than when last.pt was written"):
        train_sft.main(replace(cfg, resume=True))
    (out / "metrics.jsonl").write_bytes(whole)
    (out / "best.pt").replace(out / "last.pt")
    with pytest.raises(InputError, match="no checkpoint to resume this run from: it has no at, best, data_sha256"):
        train_sft.main(replace(cfg, resume=True))


def test_two_processes_never_write_one_folder(tmp_path):
    import fcntl
    out = tmp_path / "run"
    out.mkdir()
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is writing this run"):
            train_sft.main(replace(TINY, out=str(out)))


# ---- numbers that are none, and half precision -----------------------------------------------------------------------------

def test_a_loss_that_is_no_number_names_the_step_its_rows_and_the_last_checkpoint(tmp_path, no_pictures, monkeypatch):
    """At step 3, in the second of two micro-batches. No weight has moved by it, the folder and the signals are given back, and
    the run goes on where the cause is gone."""
    out, seen, real = tmp_path / "run", [], train_sft.losses.sft_loss

    def spoilt(hidden, head, targets, normaliser):
        seen.append(len(targets))
        return real(hidden, head, targets, normaliser) * (float("nan") if len(seen) == 1 + 2 * 3 + 2 else 1)   # 1: rehearsed
    cfg, handler = replace(TINY, out=str(out), save_every=2, eval_answers=0), signal.getsignal(signal.SIGINT)
    train_sft.main(replace(cfg, out=str(tmp_path / "whole")))
    monkeypatch.setattr(train_sft.losses, "sft_loss", spoilt)
    pairs = data.load_pairs("minihh")[0]["train"]
    encoding = data.tokenizer(2048)
    order = data.Order([len(encoding.encode(p.prompt + p.chosen)) + 1 for p in pairs], 4, cfg.seed)
    with pytest.raises(InputError) as e:
        train_sft.main(cfg)
    rows = ", ".join(str(row) for row in order[2 * 3 + 1])
    assert str(e.value) == (f"step 3: the loss is nan, on the training pairs {rows}: try a smaller --lr. {out}/last.pt holds "
                            "step 2")
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.setattr(train_sft.losses, "sft_loss", real)
    train_sft.main(replace(cfg, resume=True))
    a, b = (read_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("whole", "run"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_weights_that_are_no_numbers_are_never_written(tmp_path, no_pictures):
    """A rate so large that finite gradients make infinite weights, where the next thing is a checkpoint and not a loss."""
    out = tmp_path / "run"
    with pytest.raises(InputError, match="step 1: the weights are not finite any more .model..*last.pt holds step 0"):
        train_sft.main(replace(TINY, lr=3e38, weight_decay=1e5, grad_clip=0.0, warmup=0, optimizer="sgd", save_every=1,
                               eval_every=1000, out=str(out)))
    for name in ("last.pt", "best.pt"):
        assert all(t.isfinite().all() for t in read_checkpoint(out / name)["model"].values())


def test_float16_is_float32_but_for_rounding_and_resumes_bit_for_bit(tmp_path, no_pictures, monkeypatch):
    """The scale starts at 2^30, so that the first updates overflow and are skipped and counted, with PMA in the middle of a
    period; weights and moments stay in fp32."""
    cfg = replace(TINY, steps=2, eval_every=20, save_every=1, eval_samples=2, eval_answers=0, micro_batch=2,
                  optimizer="adamw-pma", lora_rank=2, lora_dropout=0.3)
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0 ** 16))
    for name, dtype in (("wide", "float32"), ("half", "float16")):
        train_sft.main(replace(cfg, dtype=dtype, out=str(tmp_path / name)))
    wide, half = ([e["train_loss"] for e in metrics(tmp_path / name) if "train_loss" in e] for name in ("wide", "half"))
    assert half == pytest.approx(wide, rel=2e-3) and half != wide
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(train_sft.runs.torch.amp.GradScaler, init_scale=2.0 ** 30))
    cfg = replace(cfg, dtype="float16", steps=10)
    train_sft.main(replace(cfg, out=str(tmp_path / "whole")))
    for stop in (3, 9, None):
        train_sft.main(replace(cfg, out=str(tmp_path / "cut"), stop_at=stop, resume=stop != 3))
    a, b = (read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"]) and a["scaler"] == b["scaler"]
    assert str(a["optimizer"]) == str(b["optimizer"]) and a["at"]["skipped"] == b["at"]["skipped"] > 3
    assert a["at"]["updates"] + a["at"]["skipped"] == 20 and a["at"]["updates"] > 0
    assert {kept["t"] for kept in a["optimizer"].values()} == {a["at"]["updates"]}
    assert all(t.dtype == torch.float32 for t in a["model"].values())
    assert all(t.dtype == torch.float32 for kept in a["optimizer"].values() for t in kept.values() if torch.is_tensor(t))
    scales = [e["scale"] for e in metrics(tmp_path / "whole") if "scale" in e]
    assert scales[0] < 2.0 ** 30 and scales == sorted(scales, reverse=True)
