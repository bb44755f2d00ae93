"""
studies/bench.py: what is timed is what it says, and the table adds up. No time is asserted.

    python -m pytest -q tests/test_bench.py
"""
import importlib.util
import itertools
import json
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import model as gpt
from files import InputError
from studies import bench, rivals
from studies.lab import HERE


def test_optimizers_table_on_a_tiny_model(monkeypatch, capsys):
    """A clock that ticks once a call makes every step one second; AdamW keeps two fp32 moments, 8 bytes a parameter, Lion one."""
    ticks = iter(range(10 ** 6))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    bench.optim_steps("mini", rounds=2)
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| ([a-z].*?) \| (\d+) \| ([\d.]+) \[([\d.]+), ([\d.]+)\] \| ([\d.]+) \|$", printed, re.M)
    assert [(name, state) for name, *_, state in rows] == [
        ("adamw", "8.0"), ("adamw, torch's foreach", "8.0"), ("adamw-pma", "8.0"), ("agma", "8.0"), ("lion", "4.0"),
        ("lion-pma", "4.0")]
    assert {row[1:5] for row in rows} == {("1000", "1.00", "1.00", "1.00")}


def test_every_optimizer_steps_every_round(monkeypatch):
    """The first round allocates the state and is not timed; all optimizers step on the same weights."""
    stepped = []
    real = bench.optim.make
    def make(name, *arguments):
        optimizer = real(name, *arguments)
        optimizer.register_step_post_hook(lambda *_: stepped.append(name))
        return optimizer
    monkeypatch.setattr(bench.optim, "make", make)
    bench.optim_steps("mini", rounds=3)
    rounds = [tuple(stepped[i:i + 5]) for i in range(0, 20, 5)]
    assert all(sorted(names) == ["adamw", "adamw-pma", "agma", "lion", "lion-pma"] for names in rounds) and len(set(rounds)) > 1


def test_the_results_have_the_measured_tables():
    results = (HERE / "RESULTS.md").read_text()
    files = {"generate": "results/generate.json", "plan": "results/bench/plan.json", "lora": "results/ranks/cost-gpt2.json",
             "lora-dpo": "results/ranks/cost-dpo-gpt2-medium.json",
             **{what: f"results/bench/{what}.json" for what in ("dpo", "dpo-lora", "sft", "cdpo", "cdpo-head", "checkpointing")}}
    for what, path in files.items():
        found = json.loads((HERE / path).read_text())
        text = (bench.generation_table(found) if what == "generate" else bench.planned_table(found["rows"]) if what == "plan" else
                bench.against_table(what, found["found"], found["units"]))
        assert text in results, what
    found = json.loads((HERE / "results/ranks/cost-gpt2-medium.json").read_text())["found"]
    peaks = [statistics.median(one["peak_bytes"] for one in found[name]) for name in (
        "full", *(f"rank {rank}, bias none" for rank in (1, 2, 8, 16)))]
    cells = " | ".join([f"{peaks[0] / 1e9:.2f}", *(f"{peak / 1e9:.2f} ({peak / peaks[0]:.2f})" for peak in peaks[1:])])
    assert f"| {cells} |\n| 002_..., table 2 |" in results


# ---- generation

def test_generation_counts_what_was_made_and_what_must_be_read(monkeypatch, tmp_path, capsys):
    """A clock that ticks once a call: each turn takes one second. mini's matrices are 724,480 numbers less 512 rows of positions;
    a token's keys and values are 2 * 2 layers * 128 numbers."""
    ticks = iter(range(10 ** 6))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(bench, "generation", lambda *arguments, real=bench.generation: real(*arguments, new=5))
    bench.main(["generate", "--model", "mini", "--rounds", "2", "--device", "cpu", "--out", str(tmp_path / "generate.json")])
    found = json.loads((tmp_path / "generate.json").read_text())
    lengths = found["prompts"]
    assert len(lengths) == 8 and found["tokens per second"]["transformers"] == [40, 40] and found["memory"] == [4 * 724_480] * 2
    assert 0 < max(found["tokens per second"]["ours"]) <= 40   # an answer may end by itself
    past = (sum(lengths) + 8 * (0 + 1 + 2 + 3 + 4) / 5) * 2 * 2 * 128 * 4
    assert found["bytes_per_token"] == 4 * (724_480 - 512 * 128) + past
    limit = 8 * 4 * 724_480 / found["bytes_per_token"]
    assert found["tokens per second"]["the memory's limit"] == pytest.approx([limit] * 2)
    assert found["ratio"]["ours / transformers"] == [ours / 40 for ours in found["tokens per second"]["ours"]]
    assert capsys.readouterr().out.strip() == bench.generation_table(found)
    assert "| transformers, tokens/s | 40.0 [40.0, 40.0] |" in bench.generation_table(found)


@pytest.mark.parametrize("text", ["README.md", "RESULTS.md"])
def test_every_table_has_as_many_cells_as_its_header(text):
    lines = (HERE / text).read_text().splitlines()
    for i, line in enumerate(lines):
        if re.fullmatch(r"\|( --- \|)+", line):
            for row in [lines[i - 1], *itertools.takewhile(lambda row: row.startswith("|"), lines[i + 1:])]:
                assert row.replace(r"\|", "").count("|") == line.count("|"), row


# ---- bad input

@pytest.mark.parametrize("flags, named", [
    (["lora", "--rounds", "0"], "--rounds: expected at least 1, found 0"),
    (["lora", "--tokens", "1025"], "--tokens: expected 4 to 1024, the context of gpt2, found 1025"),
    (["lora-dpo", "--model", "mini", "--tokens", "3"], "--tokens: expected 4 to 512, the context of mini, found 3"),
    (["lora", "--device", "none"], "--device none: "),
    (["lora", "--out", "none/cost.json"], "--out: expected a file's name in a folder that exists, found none/cost.json"),
    (["lora", "--out", "."], "--out: expected a file's name in a folder that exists, found ."),
])
def test_bad_flags_are_one_line_before_any_work(monkeypatch, flags, named):
    monkeypatch.setattr(bench, "against", None)
    with pytest.raises(InputError, match=f"^{re.escape(named)}") as e:
        bench.main(flags)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("what, missing", [("dpo", "trl"), ("dpo-lora", "trl and peft"), ("sft", "trl"),
                                           ("generate", "transformers")])
def test_what_is_not_installed_is_one_line_before_any_work(monkeypatch, what, missing):
    real, gone = importlib.util.find_spec, missing.split(" and ")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else real(name) or "here")
    for work in ("against", "generation"):
        monkeypatch.setattr(bench, work, None)
    with pytest.raises(InputError, match=f"^{what} is measured against {missing}, not installed: pip install -r req"):
        bench.main([what, "--model", "mini", "--data", "minihh"])


# ---- against others

@pytest.fixture(scope="module")
def work():
    return rivals.work("minihh", "mini", "cpu", size=3, steps=2, longest=40)


def test_the_work_is_pairs_at_even_quantiles_of_the_length(work):
    """Six of those with at most 40 tokens a dialogue, each from its sixth of them, and three from the middle to warm up."""
    tokens, _ = data.encode(data.load_pairs("minihh", ("train",))[0]["train"], 2048, 512)
    lengths = tokens.lengths()
    fits = np.sort(lengths[lengths[:, 0] + lengths[:, 1:].max(1) <= 40].sum(1))
    sizes = [sum(map(len, pair)) for pair in work.pairs]
    assert work.batches == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert sizes[3:] == [fits[int((i + 0.5) / 6 * len(fits))] for i in range(6)]
    assert sizes[:3] == [fits[len(fits) // 2 + i] for i in range(3)]
    mixed = work.shuffled().batches
    assert mixed[0] == [0, 1, 2] and sorted(sum(mixed[1:], [])) == list(range(3, 9)) and mixed[1:] != work.batches[1:]
    with pytest.raises(InputError, match="--data minihh: 0 pairs of at most 5 tokens, expected 20 or more"):
        rivals.work("minihh", "mini", "cpu", longest=5)


@pytest.mark.parametrize("kind, rank, bias, cached, trains", [
    ("sft", 0, "all", True, 724_480), ("dpo", 0, "all", True, 724_480), ("cdpo", 0, "all", True, 724_480),
    ("dpo", 2, "none", True, 2 * 2 * 16 * 128), ("dpo", 0, "all", False, 724_480), ("dpo", 2, "none", False, 2 * 2 * 16 * 128),
    ("sft", 2, "lora_only", True, 2 * 2 * 16 * 128 + 2 * 9 * 128)])
def test_our_side_does_a_step_for_every_micro_batch(work, monkeypatch, kind, rank, bias, cached, trains):
    """As many seconds as micro-batches but the first; the FLOPs are those of the timed ones; each moves all that trains, and
    leaves no gradient."""
    stepped, moved, real, made = [], [], rivals.optim.clip, rivals.optim.make
    monkeypatch.setattr(rivals.optim, "clip", lambda model, norm: stepped.append((model, norm)) or real(model, norm))

    def make(name, model, *arguments):
        optimizer, before = made(name, model, *arguments), {}
        optimizer.register_step_pre_hook(lambda *_: before.update(
            {key: p.detach().clone() for key, p in model.named_parameters()}))
        optimizer.register_step_post_hook(lambda *_: moved.append(
            {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}))
        return optimizer
    monkeypatch.setattr(rivals.optim, "make", make)
    monkeypatch.setenv("HF_HOME", "somewhere")   # put back behind the test: the side takes a folder of its own
    run, facts = rivals.ours(work, kind, rank, bias, cached)
    assert len(run()) == 2 and [norm for _, norm in stepped] == [1.0, 1.0, 1.0] and facts["trainable"] == trains
    model = stepped[0][0]
    assert moved == [{key for key, p in model.named_parameters() if p.requires_grad}] * 3
    assert all(p.grad is None for p in model.parameters())
    parts, loss_on = (2, "all") if kind == "sft" else (3, "response")
    batches = [data.collate([work.pairs[i][:parts] for i in rows], loss_on) for rows in work.batches[1:]]
    config = gpt.SIZES["mini"]
    forward = sum(gpt.flops(config, *b.size) for b in batches) if kind == "dpo" and not cached else (
        2 * 2048 * 128 * sum(len(b.targets) for b in batches) if kind == "cdpo" else 0)   # the reference's part
    assert facts["flops"] == forward + sum(gpt.flops(config, *b.size, backward=True, rank=rank) for b in batches)


@pytest.mark.parametrize("kind, rank, cached", [("cdpo", 0, True), ("dpo", 0, False), ("dpo", 2, False)])
def test_the_reference_stays_where_the_policy_moves(work, monkeypatch, kind, rank, cached):
    """What it says of one micro-batch, and its head for CDPO, are the same at the first and at the last step."""
    seen, real, first = [], rivals.train_dpo.pair_losses, []

    def pair_losses(cfg, model, look, batch):
        first.append(batch)
        with torch.no_grad():
            logps, _, head = look(first[0])
        seen.append((logps.clone(), head if kind == "cdpo" else logps, model))
        return real(cfg, model, look, batch)
    monkeypatch.setattr(rivals.train_dpo, "pair_losses", pair_losses)
    monkeypatch.setenv("HF_HOME", "somewhere")
    rivals.ours(work, kind, rank, cached=cached)[0]()
    (before, head, model), *_, (after, last, _) = seen
    assert len(seen) == 3 and torch.equal(before, after)
    assert kind == "dpo" or torch.equal(head, last) and head.data_ptr() != model.wte.weight.data_ptr()


def test_a_checkpointed_side_runs_its_blocks_again(work, monkeypatch):
    """Two blocks in three micro-batches and in the reference's pass over nine pairs, and with checkpoints twice in the former."""
    calls, real = [], gpt.Block.forward
    monkeypatch.setattr(gpt.Block, "forward", lambda self, *arguments, **options: calls.append(self) or real(
        self, *arguments, **options))
    monkeypatch.setenv("HF_HOME", "somewhere")
    found = []
    for checkpointing in (False, True):
        run, _ = rivals.ours(work, "dpo", checkpointing=checkpointing)
        calls.clear()
        run()
        found.append(len(calls))
    assert found == [6, 12]


def test_the_machines_rate_by_hand(monkeypatch):
    """A product of (1370, 768) by (768, 3072) in one second; a repetition's rate is the mean of those before and after."""
    now = iter(range(1000))
    monkeypatch.setattr(rivals.time, "perf_counter", lambda: next(now))
    assert rivals.rate() == 2 * 1370 * 768 * 3072
    sent = []
    monkeypatch.setattr(rivals, "rate", iter((2.0, 4.0)).__next__)
    side = bench.Side(lambda work: (lambda: [1.0], {}))
    bench.alone(SimpleNamespace(send=sent.append), side, rivals.Work([], [], "mini", "cpu"))
    assert sent[0]["rate"] == 3.0


def test_both_ways_of_sft_start_with_the_same_loss(work, monkeypatch):
    """Ours and the padded rectangle, on the same weights: what is timed is the same work."""
    found, torch_grad = {}, torch.Tensor.backward
    def backward(loss):
        found[side].append(loss.item())
        torch_grad(loss)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    for side, make in (("ours", lambda: rivals.ours(work, "sft")), ("rectangle", lambda: rivals.rectangle_sft(work))):
        found[side] = []
        make()[0]()   # runs.setup seeds: the same weights
    assert len(found["ours"]) == 3 and found["ours"] == pytest.approx(found["rectangle"], rel=1e-5)


def test_both_ways_of_cdpos_head_give_the_same_loss(work, monkeypatch):
    found, torch_grad = [], torch.Tensor.backward
    def backward(loss):
        found.append(loss.item())
        torch_grad(loss)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(rivals, "memory", lambda device: 1000)
    for full in (False, True):
        run, facts = rivals.cdpo_head(work, full, rows=24, repeats=1)
        assert len(run()) == 1 and facts["given_bytes"] == 1000 + 4 * 2048 * 128   # the matrix's gradient is not charged
    assert len(found) == 6 and found == pytest.approx([found[0], found[1], found[1]] * 2, rel=1e-5)   # first: what torch loads


def test_repetitions_run_in_processes_of_their_own(work, monkeypatch, tmp_path):
    """What they find comes back; the environment that malloc reads is the process's alone."""
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    found = bench.repetition(bench.Side(rivals.ours, {"kind": "sft"}, environ=bench.MALLOC), work)
    assert len(found["seconds"]) == 2 and found["rate"] > 1e8 and found["peak_bytes"] > found["resident"] > 5e7
    assert "MALLOC_MMAP_MAX_" not in bench.os.environ
    monkeypatch.setattr(bench.tempfile, "tempdir", str(tmp_path))   # where the sides' folders lie
    with pytest.raises(InputError, match=r"a process of the benchmark \(killed\) ended early"):
        bench.repetition(bench.Side(killed), work)
    assert list(tmp_path.iterdir()) == []   # it left 2 MB, and could not clear up


def killed(work):
    (Path(bench.tempfile.mkdtemp()) / "model").write_bytes(bytes(2_000_000))
    bench.os._exit(9)


def test_transformers_side_runs(work):
    run, _ = rivals.transformers_sft(work)
    assert len(run()) == 2


def test_table_of_sides_by_hand(monkeypatch):
    """10 pairs in 2 and 4 seconds, then 5 and 4: ratios 2 and 0.8. 8e9 FLOPs in 2 s on a machine with 8e9 a second: MFU 0.5."""
    ours = [{"seconds": [1, 1], "peak_bytes": 2e9, "flops": 8e9, "rate": 8e9}, {"seconds": [5], "peak_bytes": 2e9, "flops": 8e9,
                                                                               "rate": 1.6e9}]
    theirs = [{"seconds": [4], "peak_bytes": 3e9}, {"seconds": [4], "peak_bytes": 5e9}]
    lines = bench.against_table("dpo", {"ours": ours, "theirs": theirs}, (10, "pairs")).splitlines()
    assert lines[0] == "| dpo | median [range] | times as long as ours | peak, GB | times as large | MFU |"
    rows = lines[2:]
    assert rows == ["| ours | 3.50 [2.00, 5.00] pairs/s | 1.00 [1.00, 1.00] | 2.00 | 1.00 | 0.75 [0.50, 1.00] |",
                    "| theirs | 2.50 [2.50, 2.50] pairs/s | 1.40 [0.80, 2.00] | 4.00 | 2.00 |  |"]
    heads = [{**one, "given_bytes": given} for one, given in zip(theirs, (1e9, 4e9))]   # what all sides are given does not count
    assert "| heads | 2.50 [2.50, 2.50] heads/s | 1.00 [1.00, 1.00] | 1.50 | 1.00 |" in bench.against_table(
        "cdpo-head", {"heads": heads}, (10, "heads"))


@pytest.mark.parametrize("what", bench.SIDES)
def test_every_side_is_run_in_every_round_on_its_work(work, monkeypatch, tmp_path, capsys, what):
    """Sides take turns; the units are what the timed micro-batches hold. What is written makes the table that is printed."""
    seen = []
    monkeypatch.setattr(bench.rivals, "work", lambda *_, **__: work)
    monkeypatch.setattr(bench, "NEEDED", {})
    monkeypatch.setattr(bench, "repetition", lambda side, given: seen.append((side, given)) or {
        "seconds": [1.0, 3.0], "peak_bytes": 2e9})
    bench.main([what, "--model", "mini", "--device", "cpu", "--tokens", "40", "--rounds", "2", "--out",
                str(tmp_path / "found.json")])
    assert [side for side, _ in seen] == 2 * list(bench.SIDES[what].values())
    found = json.loads((tmp_path / "found.json").read_text())
    assert capsys.readouterr().out.endswith(bench.against_table(what, found["found"], found["units"]) + "\n")
    given = seen[0][1]
    tokens = sum(len(p) + len(c) - 1 for rows in given.batches[1:] for i in rows for p, c, _ in [given.pairs[i]])
    assert found["units"] == {"sft": [tokens, "tokens"], "lora": [80, "tokens"], "lora-dpo": [100, "tokens"],
                              "pma": [320, "tokens"],
                              "cdpo-head": [5, "heads"]}.get(what, [6, "pairs"])
    if what in bench.RANDOM:   # one dialogue of so many inputs, whatever --data
        assert [b.tokens.numel() for b in [data.collate([given.pairs[0][:2]])]] == [40]
        assert given.batches == [[0]] * (9 if what == "pma" else 3)
    else:
        assert all((given.batches == work.batches) == side.alike for side, given in seen)


def test_plan_s_table_by_hand():
    rows = [{"model": "gpt2", "kind": "dpo", "rank": 0, "tokens": 1200, "counted": 1.8e9, "measured": 2e9},
            {"model": "gpt2", "kind": "sft", "rank": 8, "tokens": 12, "counted": 1.1e9, "measured": 1e9}]
    assert bench.planned_table(rows).splitlines()[2:] == ["| gpt2, dpo, full | 1,200 | 1.80 | 2.00 | 0.90 |",
                                                          "| gpt2, sft, rank 8 | 12 | 1.10 | 1.00 | 1.10 |"]


def test_planned_counts_the_longest_micro_batch(work, monkeypatch, tmp_path, capsys):
    """A repetition that took 3 GB of which 1 GB was there before: its measured 2 GB stand beside what is counted for it."""
    pairs = [([7] * n, [8, 9], [9] * 3) for n in (9, 5, 30, 2)]
    given = rivals.Work(pairs, [[0, 1], [2, 3]], "mini", "cpu")
    seen = []
    monkeypatch.setattr(bench.rivals, "work", lambda *_, **__: given)
    monkeypatch.setattr(bench, "repetition", lambda side, work: seen.append((side, work)) or {"peak_bytes": 3e9, "resident": 1e9})
    bench.planned(["mini"], "data", 2, tmp_path / "plan.json")
    found = json.loads((tmp_path / "plan.json").read_text())
    assert capsys.readouterr().out.strip() == bench.planned_table(found["rows"])
    assert all(row["measured"] == 2e9 and 0.1e9 < row["counted"] < 0.2e9 for row in found["rows"])
    assert all(full["counted"] > adapters["counted"] for full, adapters in zip(found["rows"][::2], found["rows"][1::2]))
    assert [row["tokens"] for row in found["rows"]] == [31 + 3] * 2 + [33 + 5] * 4   # less each last token
    assert [side.options for side, _ in seen[::2]] == [{"kind": k, "rank": r} for k in ("sft", "dpo", "cdpo") for r in (0, 8)]
    assert all(sorted(each.batches[0]) == [2, 3] and len(each.batches) == 3 for _, each in seen)
