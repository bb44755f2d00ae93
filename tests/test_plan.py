"""
plan.py: what --dry-run counts is what a step takes.

    python -m pytest -q tests/test_plan.py

The oracle is the step itself: the bytes of real tensors, and those that autograd's hooks see saved. Whole processes are measured
by `python -m studies.bench plan`.
"""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import model as gpt
import optim
import plan
import train_dpo
import train_reward
import train_sft
from files import InputError

MINI = gpt.SIZES["mini"]
PARAMETERS = 724_480


def pairs(n=3, seed=0):
    rng = np.random.default_rng(seed)
    parts = [rng.integers(2047, size=rng.integers(5, 40)) for _ in range(3 * n)]
    return data.Tokens(np.concatenate(parts).astype(np.uint16), np.cumsum([len(p) for p in parts]).reshape(-1, 3))


def sft(model):
    return lambda batch: train_sft.batch_loss(model, batch, 1)


def counted(batch, make=sft, kind=gpt.GPT, half=False, device="cpu", **flags):
    return plan.count(train_sft.Config(**flags), MINI, batch, make, kind, device, half)

# ---- by hand -------------------------------------------------------------------------------------------------------------

def test_storages_are_counted_while_they_live():
    with FakeTensorMode(), plan.Meter() as meter:
        a = torch.zeros(10, 10)
        assert (meter.live, meter.peak) == (400, 400)
        b = a.T.reshape(-1)[3:]   # a copy, and a view of that
        assert meter.live == 800
        a.add_(1)
        del a
        assert (meter.live, meter.peak) == (400, 800)
        c = b.view(97) + torch.zeros(97)   # the second summand is gone at once
        assert (meter.live, meter.peak) == (400 + 388, 800 + 376)
        del b, c
        assert meter.live == 0


def test_a_heap_keeps_its_small_blocks():
    """10 MB and 40 MB: freed, the first stays with the process and the second does not."""
    with FakeTensorMode(), plan.Meter(plan.Heap()) as meter:
        torch.zeros(10_000_000, dtype=torch.uint8)
        torch.zeros(40_000_000, dtype=torch.uint8)
        assert meter.live == 0 and meter.peak == 50_000_064
        torch.zeros(30_000_000, dtype=torch.uint8)   # 20 MB more, since the hole at the end grows
        torch.zeros(41_000_000, dtype=torch.uint8)
        assert meter.peak == 71_000_064 and meter.heap.size == 30_000_064


def test_a_block_takes_the_smallest_hole_that_is_large_enough(monkeypatch):
    """Of blocks of 1,000, 700 and 400, with others between them, the last two make room for 300 and 600 and none for 600 more."""
    monkeypatch.setattr(plan, "PINNED", 0)
    heap = plan.Heap()
    blocks = [heap.take(n) for n in (1000, 10, 700, 10, 400, 10)]
    assert blocks == [(0, 1064), (1064, 1138), (1138, 1902), (1902, 1976), (1976, 2440), (2440, 2514)] and heap.size == 2514
    heap.free(*blocks[2]), heap.free(*blocks[4])
    assert heap.take(300) == (1976, 2340) and heap.take(600) == (1138, 1802) and heap.take(600) == (2514, 3178)
    heap.free(*blocks[0])
    assert heap.holes == [(0, 1064), (1802, 1902), (2340, 2440)]
    heap.free(*blocks[1]), heap.free(1138, 1802), heap.free(*blocks[3])   # each touches a hole, the last one two
    assert heap.holes == [(0, 1976), (2340, 2440)] and heap.size == 3178


@pytest.mark.parametrize("pinned, holes", [(0, [(0, 492)]), (1, [(0, 164), (164, 328), (328, 492)])])
def test_holes_that_touch_are_one_unless_something_lives_in_between(monkeypatch, pinned, holes):
    monkeypatch.setattr(plan, "PINNED", pinned)
    heap = plan.Heap()
    blocks = [heap.take(100) for _ in range(3)]
    for k in (0, 2, 1):
        heap.free(*blocks[k])
    assert heap.holes == holes
    assert heap.take(200) == ((0, 264) if pinned == 0 else (328, 592))   # or it grows the last hole


def test_blocks_do_not_overlap_and_the_heap_ends_behind_the_last_one():
    heap, rng, live = plan.Heap(), np.random.default_rng(0), []
    for _ in range(3000):
        if live and rng.random() < 0.5:
            heap.free(*live.pop(rng.integers(len(live))))
        else:
            live.append(heap.take(int(rng.integers(1, 10_000))))
        pieces = sorted(live + heap.holes)
        assert pieces[0][0] == 0 and pieces[-1][1] == heap.size   # without a gap
        assert all(end == start for (_, end), (start, _) in zip(pieces, pieces[1:]))


def test_a_hole_must_have_room_to_spare():
    """A block of 100 leaves a hole of 164: 36 go in with twice 64 to spare, and 37 do not."""
    heap = plan.Heap()
    first, _ = heap.take(100), heap.take(10)
    heap.free(*first)
    assert heap.take(37)[0] > 164 and heap.take(36)[0] == 0


def test_the_longest_and_the_cached_are_of_all_micro_batches(monkeypatch, tmp_path):
    """Three steps of two micro-batches: six."""
    seen, longest, first = [], data.Order.longest, data.Order.first
    monkeypatch.setattr(data.Order, "longest", lambda self, n: seen.append(("longest", n)) or longest(self, n))
    monkeypatch.setattr(data.Order, "first", lambda self, n: seen.append(("first", n)) or first(self, n))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    train_dpo.main(train_dpo.Config(init="mini", steps=3, accumulate=2, micro_batch=4, dry_run=True))
    assert seen == [("longest", 6), ("first", 6)]


def test_memory_is_what_is_available(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemFree: 2 kB\nMemAvailable: 5 kB\n")
    monkeypatch.setattr(plan, "Path", lambda name: tmp_path / name.rpartition("/")[2])
    assert plan.memory(torch.device("cpu")) == 5 * 1024

# ---- oracle: the step itself ---------------------------------------------------------------------------------------------

def test_parameters_gradients_and_state_are_those_of_a_step():
    found = counted(data.sft_batch(pairs(), [0, 1]))
    assert found["parameters"] == found["gradients"] == 4 * PARAMETERS and found["reference"] == 0
    tensors = len(list(gpt.GPT(MINI).parameters()))
    assert found["optimizer state"] == 8 * PARAMETERS + 4 * tensors   # two moments, and the age of each tensor


@pytest.mark.parametrize("rank, bias", [(2, "none"), (3, "all")])
def test_lora_has_gradients_and_state_of_what_trains(rank, bias):
    found = counted(data.sft_batch(pairs(), [0, 1]), lora_rank=rank, lora_bias=bias)
    model = gpt.GPT(MINI)
    plan.lora.add_lora(model, rank, bias=bias)
    size = optim.footprint("adamw", model)
    kept = sum(b.nbytes for b in model.buffers())   # the base's biases, where they train
    assert found["gradients"] == 4 * size["trainable"] and found["parameters"] == 4 * size["parameters"] + kept


@pytest.mark.parametrize("flags", [{}, {"checkpoint_activations": True}, {"lora_rank": 2}])
def test_activations_are_what_autograd_saves(flags):
    """Distinct storages that the hooks see, parameters aside, and what SFT's head computes ahead: its gradient."""
    batch, model = data.sft_batch(pairs(), [0, 1, 2]), gpt.GPT(MINI)
    model.checkpoint_activations = flags.get("checkpoint_activations", False)
    if "lora_rank" in flags:
        plan.lora.add_lora(model, flags["lora_rank"])
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {t.untyped_storage().data_ptr() for t in (
        batch.tokens, batch.targets, batch.score_at, *batch.packing[2:], batch.packing.positions)}
    seen = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = train_sft.batch_loss(model, batch, 1)
    lean = 0 if flags else sum(4 * MINI.n_embd * 4 * n for n in (len(batch.tokens), len(batch.targets)))   # not seen: h, for GELU
    assert loss.isfinite()
    saved, found = sum(seen.values()), counted(batch, **flags)["activations"]
    if flags.get("checkpoint_activations"):   # the hooks of a checkpoint hide what it keeps: a block's input each, and positions
        assert found < 0.5 * counted(batch)["activations"]
    else:
        assert saved <= found <= 1.05 * (saved + lean) + 50_000


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_every_optimizer_can_be_counted(name):
    found = counted(data.sft_batch(pairs(), [0]), optimizer=name, accumulate=2)
    assert found["optimizer state"] == pytest.approx(4 * PARAMETERS * optim.OPTIMIZERS[name].state, abs=4 * 60)


def test_on_a_gpu_the_optimizers_state_lives_through_a_step():
    """Where activations make the peak, it differs between AdamW and Lion by one moment."""
    batch = data.sft_batch(pairs(40), range(40))
    adamw, lion = (counted(batch, device="cuda", optimizer=name) for name in ("adamw", "lion"))
    assert adamw["peak"] - lion["peak"] == adamw["optimizer state"] - lion["optimizer state"] > 2e6


def test_two_counts_are_equal():
    batch = data.sft_batch(pairs(), [0, 1])
    assert counted(batch) == counted(batch)

# ---- properties ----------------------------------------------------------------------------------------------------------

def test_more_tokens_take_more_and_a_second_micro_batch_adds_a_gradient():
    tokens = pairs(8)
    small, large = (counted(data.sft_batch(tokens, range(n))) for n in (2, 8))
    assert large["activations"] > 2 * small["activations"] and large["peak"] > small["peak"]
    alone, together = (counted(data.sft_batch(tokens, range(8)), accumulate=k) for k in (1, 4))
    assert together["peak"] > alone["peak"]
    noaccum = counted(data.sft_batch(tokens, range(8)), accumulate=4, optimizer="adamw-noaccum")
    assert noaccum["peak"] == alone["peak"]


def test_autocast_is_counted():
    """Half of the activations' size; but the matrices have copies."""
    batch = data.sft_batch(pairs(40), range(40))
    assert counted(batch, half=True)["activations"] < 0.8 * counted(batch)["activations"]


@pytest.mark.parametrize("loss, rank, cached, bytes_", [
    ("dpo", 0, True, 0), ("dpo", 0, False, 4 * PARAMETERS), ("dpo", 2, False, 0), ("dpo", 2, True, 0),
    ("cdpo", 0, True, 4 * 2048 * 128), ("cdpo", 2, True, 0), ("cdpo", 0, False, 4 * PARAMETERS)])
def test_what_dpo_keeps_of_its_reference(loss, rank, cached, bytes_):
    cfg = train_dpo.Config(loss=loss, lora_rank=rank)
    found = plan.count(cfg, MINI, data.pair_batch(pairs(), [0, 1]), lambda model: train_dpo.dry_losses(cfg, model, cached))
    assert found["reference"] == bytes_

# ---- the scripts ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def no_weights(monkeypatch):
    def load(*_, **__):
        raise AssertionError("a plan loads no weights")
    monkeypatch.setattr(gpt, "load", load)


@pytest.mark.parametrize("script, flags", [
    (train_sft, {}), (train_sft, {"loss_on": "all", "checkpoint_activations": True}), (train_reward, {}),
    (train_reward, {"head": "hidden"}), (train_dpo, {}), (train_dpo, {"loss": "cdpo", "reference": "live"}),
    (train_dpo, {"loss": "cdpo", "lora_rank": 2, "reference": "cache"})])
def test_a_dry_run_prints_a_plan_and_writes_nothing(tmp_path, capsys, no_weights, script, flags):
    found = script.main(script.Config(out=str(tmp_path / "run"), init="mini", steps=3, micro_batch=4, dry_run=True, **flags))
    printed = capsys.readouterr().out
    assert "mini, on cpu in float32: the longest of 3 micro-batches has " in printed and "fits" in printed
    assert not (tmp_path / "run").exists() and found["fits"] and found["total"] > found["peak"] > found["parameters"] > 0
    assert ("reference, on disk" in printed) == (script is train_dpo and flags.get("reference") != "live")
    if script is train_dpo and flags.get("reference") == "cache":
        train, _, _ = data.load("minihh", MINI)
        rows = data.Order(train.lengths().sum(1), 4, 1).first(3)
        assert found["disk"] == 8 * 12 + 2 * 128 * train.lengths()[rows, 1:].sum()


def test_dropout_keeps_its_masks():
    """A byte or more for each number that goes through it; found through the script, as a user gives it."""
    plain, dropped = (train_sft.main(train_sft.Config(steps=1, dry_run=True, dropout=p)) for p in (0.0, 0.1))
    assert dropped["activations"] > 1.05 * plain["activations"] and dropped["parameters"] == plain["parameters"]


def test_it_says_when_it_does_not_fit(monkeypatch, capsys):
    monkeypatch.setattr(plan, "memory", lambda device: 10e6)
    found = train_sft.main(train_sft.Config(steps=1, dry_run=True))
    assert not found["fits"] and "of 10.0 MB: does not fit: try --micro-batch" in capsys.readouterr().out


def test_a_size_is_planned_without_its_weights(monkeypatch, capsys):
    """gpt2: 124,439,808 parameters of 4 bytes; its weights are nowhere."""
    monkeypatch.setattr(gpt, "download_model", lambda name: pytest.fail("a plan downloads nothing"))
    found = train_sft.main(train_sft.Config(init="gpt2", steps=1, micro_batch=2, dry_run=True))
    assert found["parameters"] == 4 * 124_439_808 and "parameters                          497.8 MB" in capsys.readouterr().out


def test_an_unknown_model_is_one_line():
    with pytest.raises(InputError, match="^no model 'nothing'"):
        train_sft.main(train_sft.Config(init="nothing", dry_run=True))


def test_memory_is_what_the_system_says(monkeypatch, tmp_path):
    device = SimpleNamespace(type="cpu")
    assert 1e8 < plan.memory(device) < 1e14
    monkeypatch.setattr(plan, "Path", lambda name: tmp_path / "none")   # as on macOS
    assert plan.memory(device) == plan.os.sysconf("SC_PAGE_SIZE") * plan.os.sysconf("SC_PHYS_PAGES")


def test_a_run_that_is_there_can_be_planned_again(tmp_path, capsys):
    """With its own flags, and without a change to it."""
    flags = ["--out", str(tmp_path / "run"), "--steps", "2", "--stop-at", "1", "--micro-batch", "3", "--eval-samples", "4",
             "--eval-answers", "0"]
    train_sft.main(plan.runs.parse(train_sft.Config, flags))
    before = {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    found = train_sft.main(plan.runs.parse(train_sft.Config, ["--out", str(tmp_path / "run"), "--resume", "--dry-run"]))
    assert found["fits"] and "the longest of 2 micro-batches" in capsys.readouterr().out
    assert {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()} == before


def test_gelus_output_is_not_kept(monkeypatch):
    """4C of about 17C numbers a token and layer: what is computed again instead is missing from the activations."""
    batch, lean = data.sft_batch(pairs(20), range(20)), counted(data.sft_batch(pairs(20), range(20)))
    forward = gpt.MLP.forward
    monkeypatch.setattr(gpt.MLP, "forward", lambda self, x, lean: forward(self, x, False))
    kept = counted(batch)["activations"] - lean["activations"]
    rows = [len(batch.tokens), len(batch.targets)]   # of the first block's MLP, and of the last one's
    assert kept == sum(4 * MINI.n_embd * 4 * n for n in rows)
