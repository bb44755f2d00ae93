"""
studies/fits.py: the table of what fits is the plan's own count, and its cells are by hand.

    python -m pytest -q tests/test_fits.py
"""
import json

import numpy as np
import pytest

import data
import model as gpt
import optim
import plan
from files import InputError
from studies import fits
from studies.lab import HERE

MINI = gpt.SIZES["mini"]


def test_largest_by_hand():
    """1 GB for each pair on top of 3, but at least 5: on 4.9 GB none fits, on 5 GB two, on 6.9 two, on 7 four."""
    assert [fits.largest((5e9, 3e9, 1e9), card) for card in (4.9, 5, 6.9, 7, 10.9, 11, 1000)] == [0, 2, 2, 4, 4, 8, 64]


def test_table_by_hand(monkeypatch):
    monkeypatch.setattr(fits, "CARDS", (6, 8))
    rows = [{"model": "gpt2", "rank": 0, "checkpointing": False, "sft": (5e9, 4e9, 1e9), "dpo": (7e9, 0, 1e9),
             "cdpo": (9e9, 0, 1)},
            {"model": "gpt2", "rank": 8, "checkpointing": True, "sft": (0, 1e9, 1), "dpo": (0, 0, 1.5e8), "cdpo": (0, 5e9, 1e9)}]
    assert fits.table(rows).splitlines() == [
        "| computed, not measured | 6 GB | 8 GB |", "| --- | --- | --- |", "| gpt2, full | 2 / – / – | 4 / 8 / – |",
        "| gpt2, rank 8, checkpointing | 64 / 32 / 1 | 64 / 32 / 2 |"]


def pairs_of(n, *parts):
    """n pairs, each with so many tokens of prompt, chosen and rejected response."""
    flat = np.random.default_rng(0).integers(2047, size=n * sum(parts)).astype(np.uint16)
    return data.Tokens(flat, np.cumsum(np.tile(parts, (n, 1)).flatten(), dtype=np.int64).reshape(-1, 3))


@pytest.mark.parametrize("kind, flags", [("sft", {}), ("dpo", {"lora_rank": 8}), ("cdpo", {"checkpoint_activations": True})])
def test_a_line_is_the_plan_in_between(kind, flags):
    """Oracle: the plan of 32 and of 40 pairs of 512 tokens, which were not among those that were counted."""
    found = fits.line(MINI, kind, **flags)
    for n in (32, 40):
        counted = fits.peak(MINI, pairs_of(n, 300, 100, 112), range(n), kind, "cuda", True, **flags)[0]["peak"]
        assert max(found[0], found[1] + found[2] * n) == pytest.approx(counted + plan.CONTEXT, rel=0.01)
    assert 0 < found[2] < 100e6


@pytest.mark.parametrize("kind", fits.KINDS)
def test_peak_is_bounded_by_what_a_step_holds(kind):
    """Parameters, gradients, AdamW's two moments, and some activations; less with checkpoints, and with adapters."""
    tokens = pairs_of(4, 30, 25, 35)
    found, n = fits.peak(MINI, tokens, range(4), kind)
    assert n == 4 * (30 + 24 if kind == "sft" else 30 + 24 + 34)
    state = 4 * 4 * optim.footprint("adamw", gpt.GPT(MINI))["parameters"] + plan.LOADED["cpu"]
    assert state < found["peak"] < state + 40e6
    lean, checkpointed = (fits.peak(MINI, tokens, range(4), kind, "cuda", True, checkpoint_activations=on)[0]["peak"]
                          for on in (False, True))
    adapters = fits.peak(MINI, tokens, range(4), kind, "cuda", True, lora_rank=2)[0]["peak"]
    assert checkpointed <= lean and adapters < lean


@pytest.mark.parametrize("kind, rank, nbytes", [("sft", 0, 0), ("dpo", 0, 0), ("cdpo", 0, 4 * 2048 * 128), ("cdpo", 2, 0)])
def test_a_cached_reference_takes_a_head_for_cdpo_alone(kind, rank, nbytes):
    assert fits.peak(MINI, pairs_of(3, 9, 8, 7), range(3), kind, lora_rank=rank)[0]["reference"] == nbytes


def test_the_least_is_what_the_optimizers_step_needs():
    """Parameters, gradients, two moments and CDPO's head of a few pairs; large where activations are nothing."""
    found = fits.peak(MINI, pairs_of(2, 300, 100, 112), range(2), "cdpo", "cuda", True)[0]
    assert fits.line(MINI, "cdpo")[0] == plan.CONTEXT + sum(
        found[what] for what in ("parameters", "reference", "gradients", "optimizer state"))


def test_command_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    """Every row is counted; the counting itself is tested above. 1 GB, and 50 or 100 MB a pair more: 64 need 4.2 or 7.4."""
    monkeypatch.setattr(fits, "line", lambda config, kind, **flags: (1e9, 1e9, 1e8 if kind == "cdpo" else 5e7))
    fits.main(["--models", "mini", "--out", str(tmp_path / "fits.json")])
    printed, rows = capsys.readouterr().out, json.loads((tmp_path / "fits.json").read_text())
    assert fits.table(rows) in printed and len(rows) == 4
    assert "| mini, full | 64 / 64 / 32 | 64 / 64 / 64 |" in printed


def test_the_results_have_the_table():
    assert fits.table(json.loads((HERE / "results/bench/fits.json").read_text())) in (HERE / "RESULTS.md").read_text()


@pytest.mark.parametrize("argv, message", [(["--models", "gpt2,gpt3"], "--models: no size 'gpt3': expected mini, gpt2"),
                                           (["--out", "nowhere/fits.json"], "--out: expected a file's name in a folder")])
def test_bad_input_is_one_line(argv, message):
    with pytest.raises(InputError, match=message):
        fits.main(argv)
