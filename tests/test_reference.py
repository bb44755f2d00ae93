"""
reference.py: a cached reference says what a live one says, computes each pair once, and believes nothing that is damaged, of
another model, or half written.

    python -m pytest -q tests/test_reference.py

The oracle is transformers' GPT-2, one dialogue at a time from full logits. No network is needed. train_dpo.py with a cached
reference: tests/test_train_dpo.py.
"""
import hashlib
import io
import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import transformers

import data
import lora
import losses
import model as gpt
import reference
from files import InputError

V, C, BLOCK = 61, 24, 32
WHAT = {"model": "abc", "dtype": "torch.float32"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Caches lie in an empty folder of each test's own."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def tiny(seed=0):
    """Every number is random, biases and LayerNorms too: nothing that is 0 or 1 can hide a mix-up."""
    model, generator = gpt.GPT(gpt.GPTConfig(BLOCK, V, n_layer=2, n_head=3, n_embd=C)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "ln_" in name and name.endswith("weight") else 0.0, 0.3, generator=generator)
    return model.eval()


def tokens_of(pairs):
    parts = [part for pair in pairs for part in pair]
    return data.Tokens(np.concatenate(parts).astype(np.uint16), np.cumsum([len(p) for p in parts]).reshape(-1, 3))


def some_pairs(n=12, seed=0):
    """Of unequal length: prompts and responses of 1 to 9 tokens."""
    rng = np.random.default_rng(seed)
    return [[rng.integers(V, size=rng.integers(1, 10)).tolist() for _ in range(3)] for _ in range(n)]


class Live:
    """A live reference that notes the pairs that it is asked for."""

    def __init__(self, model):
        self.live, self.asked = reference.live(model), []

    def __call__(self, batch):
        self.asked.append(list(map(int, batch.rows)))
        return self.live(batch)

    def pairs(self):
        """All of them since the last time."""
        found = sorted(sum(self.asked, []))
        self.asked = []
        return found


def cache(tokens, model=None, what=WHAT):
    """Of log-probabilities alone; or, given the model whose head it is, with hidden states."""
    return reference.Cache(tokens, what, None if model is None else model.wte.weight.detach().clone())


def fill(found, rows, ref, size=4):
    """Returns what was said."""
    said = []
    found.fill(rows, size, ref, torch.device("cpu"), said.append)
    return said


def ready(model, pairs, rows=None, size=4, states=True):
    """A cache on disk with these rows, all unless given."""
    found = cache(tokens_of(pairs), model if states else None)
    fill(found, range(len(pairs)) if rows is None else rows, reference.live(model), size)
    return found


def refused(match):
    """One line that says what to do."""
    return pytest.raises(InputError, match=rf"(?s)^[^\n]*{match}[^\n]*--reference live$")

# ---- oracle --------------------------------------------------------------------------------------------------------------

def hf_states(folder, ids):
    """(final hidden states, log-probabilities of all tokens) of one dialogue."""
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).double().eval()
    with torch.no_grad():
        hidden = model.transformer(torch.tensor([ids])).last_hidden_state[0]
        return hidden, (hidden @ model.lm_head.weight.T).log_softmax(-1)


def test_a_cached_pair_holds_what_transformers_says(tmp_path):
    model, pairs = tiny(), some_pairs(5)
    gpt.export(model, tmp_path / "hf")
    found, rows = ready(model, pairs), [3, 0, 4]
    logps, hidden, head = found(data.pair_batch(tokens_of(pairs), rows))
    expected_logps, expected_hidden = [], []
    for k in (1, 2):   # all chosen, then all rejected responses
        for prompt, response in ((pairs[i][0], pairs[i][k]) for i in rows):
            states, logp = hf_states(tmp_path / "hf", [*prompt, *response])
            expected_hidden.append(states[len(prompt) - 1:-1])
            expected_logps.append(sum(logp[len(prompt) - 1 + t, y].item() for t, y in enumerate(response)))
    torch.testing.assert_close(logps, torch.tensor(expected_logps), rtol=1e-5, atol=0)
    torch.testing.assert_close(hidden, torch.cat(expected_hidden).float(), rtol=2e-3, atol=1e-4)   # fp16 keeps 11 bits
    assert torch.equal(head, model.wte.weight) and hidden.dtype == head.dtype

# ---- worked by hand ------------------------------------------------------------------------------------------------------

def test_where_states_stand_and_what_they_take_by_hand():
    """Responses of 2 and 1, 3 and 2, 1 and 4 tokens: their states stand in a line of 13 with ends 2 3, 6 8, 9 13. Of 24 channels
    in fp16, 48 bytes a state and 8 for a pair's two numbers: 8 + 48 * 3 for the first pair."""
    model, pairs = tiny(), [([1, 2], [3, 4], [5]), ([6], [7, 8, 9], [10, 11]), ([12, 13], [14], [15, 16, 17, 18])]
    found = cache(tokens_of(pairs), model)
    assert found.ends.tolist() == [[2, 3], [6, 8], [9, 13]]
    assert (found.folder / "states.f16").stat().st_size == 13 * 48
    missing, need = found.need([0])
    assert missing.tolist() == [0] and need == 8 + 48 * 3
    missing, need = found.need([2, 1, 0, 2, 1])   # each once, the shortest first: 3 + 5 + 5 scored tokens with prompts of 2, 1, 2
    assert missing.tolist() == [0, 1, 2] and need == 3 * 8 + 13 * 48
    assert cache(tokens_of(pairs)).need([0, 1])[1] == 16   # log-probabilities alone
    fill(found, [1], reference.live(model))
    assert found.need([0, 1, 2])[0].tolist() == [0, 2]
    stored = np.fromfile(found.folder / "states.f16", np.float16).reshape(13, C)
    hidden = [model.hidden(torch.tensor([[6, *y[:-1]]]))[0].detach() for y in pairs[1][1:]]
    np.testing.assert_allclose(stored[3:8], torch.cat(hidden).numpy(), rtol=2e-3, atol=1e-3)
    assert not stored[:3].any() and not stored[8:].any()   # room is there, and nothing in it


def test_what_is_said():
    """12 pairs, of which 3 are met and 2 are missing: 16 bytes."""
    model, pairs = tiny(), some_pairs()
    found = ready(model, pairs, [5], states=False)
    assert fill(found, [2, 5, 7, 5], reference.live(model)) == [
        f"reference: 3 pairs in {found.folder}, 2 of them to compute, 0.00 MB", "reference: 2 of 2 pairs computed"]
    assert fill(found, [2, 5], reference.live(model)) == [f"reference: 2 pairs in {found.folder}, all of them there"]

# ---- properties: cached and live agree -----------------------------------------------------------------------------------

def test_cached_and_live_agree():
    """In another order, in micro-batches of other sizes, read again from the disk; the log-probabilities are those of the states
    before they were rounded."""
    model, pairs = tiny(), some_pairs()
    ready(model, pairs, size=3)
    ready(model, pairs, size=5, states=False)
    found, short, live = cache(tokens_of(pairs), model), cache(tokens_of(pairs)), reference.live(model)
    for rows in ([4], [11, 0, 7], list(range(12))):
        batch = data.pair_batch(tokens_of(pairs), rows)
        logps, hidden, head = live(batch)
        assert not logps.requires_grad and not hidden.requires_grad
        cached, states, same = found(batch)
        torch.testing.assert_close(cached, logps, rtol=1e-5, atol=0)
        torch.testing.assert_close(states, hidden, rtol=2 ** -11, atol=1e-6)   # half a unit in the last place of fp16
        assert torch.equal(same, head)
        again, *nothing = short(batch)
        torch.testing.assert_close(again, logps, rtol=1e-5, atol=0)
        assert nothing == [None, None]


def test_cdpo_with_cached_states_is_close_to_live():
    """The loss, its gradient and R; and where the policy is the reference, R is one half but for rounding to fp16."""
    model, policy, pairs = tiny(), tiny(1), some_pairs()
    found, batch = ready(model, pairs), data.pair_batch(tokens_of(pairs), range(12))
    results = []
    for ref in (found, reference.live(model)):
        ref_logps, ref_hidden, head = ref(batch)
        loss, regularizer, _ = losses.cdpo_loss(*batch.hidden_and_head(policy), batch.targets, batch.owner, ref_hidden,
                                                head, ref_logps, 0.5, 10.0)
        results.append((loss.detach(), regularizer, torch.autograd.grad(loss.sum(), policy.wte.weight)[0]))
        start, half, _ = losses.cdpo_loss(*batch.hidden_and_head(model), batch.targets, batch.owner, ref_hidden, head,
                                          ref_logps, 0.5, 10.0)
        assert (half - 0.5).abs().max() < 1e-3 and (start - np.log(2) - 5).abs().max() < 1e-2
    (loss, regularizer, gradient), (live_loss, live_regularizer, live_gradient) = results
    torch.testing.assert_close(regularizer, live_regularizer, rtol=0, atol=1e-3)
    torch.testing.assert_close(loss, live_loss, rtol=1e-3, atol=1e-2)   # ten times R
    assert (gradient - live_gradient).norm() < 1e-3 * live_gradient.norm()
    assert (live_regularizer - 0.5).abs().max() > 0.01   # they differ, so the comparison means something


@pytest.mark.parametrize("bias", ["none", "all"])
def test_with_lora_the_reference_is_the_policy_with_its_adapters_off(bias):
    """Live and cached it is the base, wherever the adapters are; the adapters are on again afterwards."""
    base, pairs = tiny(), some_pairs()
    model = tiny()
    torch.manual_seed(0)
    lora.add_lora(model, 2, 4.0, bias=bias)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) * p.requires_grad)
    found, batch = ready(model, pairs), data.pair_batch(tokens_of(pairs), [3, 9, 1])
    (logps, hidden, head), (expected, states, base_head) = reference.live(model)(batch), reference.live(base)(batch)
    assert torch.equal(logps, expected) and torch.equal(hidden, states) and torch.equal(head, base_head)
    cached, cached_states, _ = found(batch)
    torch.testing.assert_close(cached, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(cached_states, states, rtol=2 ** -11, atol=1e-6)
    assert all(layer.on for _, layer in lora.adapters(model))
    assert (losses.batch_logps(model, batch) - expected).abs().max() > 1   # they would have been seen


def test_in_half_precision():
    """Under autocast, as on a GPU: what is kept agrees with what is live there."""
    model, pairs = tiny(), some_pairs()
    with torch.autocast("cpu", torch.bfloat16):
        found, batch = ready(model, pairs), data.pair_batch(tokens_of(pairs), [2, 3])
        (cached, states, _), (logps, hidden, _) = found(batch), reference.live(model)(batch)
    torch.testing.assert_close(cached, logps, rtol=2e-3, atol=0)
    torch.testing.assert_close(states, hidden.float(), rtol=0, atol=0.05)
    assert cached.dtype == torch.float32 and not torch.equal(logps, reference.live(model)(batch)[0])

# ---- properties: each pair once ------------------------------------------------------------------------------------------

def test_only_pairs_that_are_met_are_computed_and_none_twice():
    """A second run computes nothing; it holds a few pairs against the reference, as many as go in at once."""
    model, pairs = tiny(), some_pairs()
    live, tokens = Live(model), tokens_of(pairs)
    fill(cache(tokens, model), [7, 2, 9, 2, 7, 4, 11], live, size=2)
    assert [len(rows) for rows in live.asked] == [2, 2, 1] and live.pairs() == [2, 4, 7, 9, 11]
    fill(cache(tokens, model), [7, 2, 9], live, size=2)
    assert len(live.asked) == 1 and set(live.pairs()) < {2, 7, 9}
    later = cache(tokens, model)
    fill(later, [7, 0, 9, 5, 2], live, size=2)
    asked = Counter(live.pairs())   # two new ones, two of the known looked at
    assert asked.total() == 4 and asked[0] == asked[5] == 1 and asked.keys() < {0, 5, 2, 7, 9}
    logps, states, _ = later(data.pair_batch(tokens, [0, 1]))
    assert logps.isnan().tolist() == [False, True, False, True] and not states.isnan().any()   # pair 1 was never met
    fill(later, np.array([], dtype=int), live)   # a run of no steps
    assert live.asked == []


def test_short_pairs_come_first():
    """Those of similar length together, so that attention pads little."""
    model, pairs = tiny(), some_pairs()
    live, tokens = Live(model), tokens_of(pairs)
    fill(cache(tokens), range(12), live, size=5)
    lengths = [sum(map(len, pairs[i])) for rows in live.asked for i in rows]
    assert lengths == sorted(lengths) and [len(rows) for rows in live.asked] == [5, 5, 2]


@pytest.mark.parametrize("change", ["model", "dtype", "pairs", "order", "states"])
def test_what_the_numbers_depend_on_has_a_folder_of_its_own(change):
    """train_dpo.py says model and dtype; the block size is a part of the model's fingerprint and of the tokens."""
    pairs, model = some_pairs(), tiny()
    folder = ready(model, pairs).folder
    assert cache(tokens_of(pairs), model).folder == folder   # the same is found again
    what = {**WHAT, change: "other"} if change in WHAT else WHAT
    others = {"pairs": some_pairs(seed=1), "order": pairs[::-1]}.get(change, pairs)
    other = cache(tokens_of(others), None if change == "states" else model, what)
    assert other.folder != folder and other.folder.parent == folder.parent
    assert other.need(range(12))[0].size == 12   # nothing of it is there

# ---- properties: what is not believed ------------------------------------------------------------------------------------

def test_a_damaged_file_of_numbers_is_refused():
    """Any byte of it, cut off anywhere, or empty."""
    model, pairs = tiny(), some_pairs()
    path = ready(model, pairs).folder / "logps.npz"
    blob = path.read_bytes()
    spoilt = [blob[:i] + bytes([blob[i] ^ 1]) + blob[i + 1:] for i in (0, 31, 32, 40, len(blob) // 2, len(blob) - 1)]
    for bad in (*spoilt, b"", blob[:20], blob[:32], blob[:-1], blob + b"\0"):
        path.write_bytes(bad)
        with refused(r"logps\.npz: damaged: delete "):
            cache(tokens_of(pairs), model)
    path.write_bytes(blob)
    assert cache(tokens_of(pairs), model).need(range(12))[0].size == 0


def test_states_that_are_missing_or_of_another_size_are_refused():
    model, pairs = tiny(), some_pairs()
    path = ready(model, pairs).folder / "states.f16"
    blob = path.read_bytes()
    for bad in (None, b"", blob[:-2], blob + bytes(2)):
        path.unlink()
        if bad is not None:
            path.write_bytes(bad)
        with refused(rf"states\.f16: not there, or not of {len(blob)} bytes: delete "):
            cache(tokens_of(pairs), model)
        path.write_bytes(blob)
    assert cache(tokens_of(pairs), model).need(range(12))[0].size == 0


@pytest.mark.parametrize("content", ["zeros", "noise", "shifted"])
def test_other_states_of_the_right_size_are_refused(content):
    """A sparse file that was never written, or written wrongly: every pair has a checksum, looked at when it is read."""
    model, pairs = tiny(), some_pairs()
    path = ready(model, pairs).folder / "states.f16"
    states = np.fromfile(path, np.float16).reshape(-1, C)
    spoilt = {"zeros": 0 * states, "noise": states + np.random.default_rng(0).normal(size=states.shape),
              "shifted": np.roll(states, 1, axis=0)}[content]
    spoilt.astype(np.float16).tofile(path)
    with refused(r"states\.f16: the hidden states of pair \d+ are damaged: delete .*, or use"):
        fill(cache(tokens_of(pairs), model), range(12), reference.live(model))


def test_one_bit_of_one_pair_is_noticed_when_it_is_read():
    model, pairs = tiny(), some_pairs()
    tokens, path = tokens_of(pairs), ready(model, pairs).folder / "states.f16"
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1   # in the last pair's rejected response
    path.write_bytes(blob)
    found = cache(tokens, model)
    found(data.pair_batch(tokens, range(11)))
    with refused(r"states\.f16: the hidden states of pair 11 are damaged: delete .*, or use"):
        found(data.pair_batch(tokens, [3, 11]))


def test_two_runs_may_write_one_cache(monkeypatch):
    """Each writes under a name of its own first. What the other one has written before a run computes is kept."""
    model, tokens = tiny(), tokens_of(some_pairs())
    first, second = cache(tokens, model), cache(tokens, model)
    monkeypatch.setattr(reference.os, "getpid", lambda: 1)
    fill(first, [0, 1], reference.live(model))
    monkeypatch.setattr(reference.os, "getpid", lambda: 2)
    fill(second, [2, 3], reference.live(model))
    assert cache(tokens, model).need(range(5))[0].tolist() == [4]
    assert {p.name for p in first.folder.iterdir()} == {"logps.npz", "states.f16"}


@pytest.mark.parametrize("states", [False, True])
def test_numbers_of_another_model_are_refused(states):
    """Should two models ever come to one folder."""
    pairs = some_pairs()
    ready(tiny(), pairs, states=states)
    with refused("its log-probabilities differ from the reference's by"):
        fill(cache(tokens_of(pairs), tiny() if states else None), range(12), reference.live(tiny(1)))


def test_numbers_of_nearly_the_same_model_are_refused():
    """Its final gains are larger by 1 %, which is far above rounding."""
    pairs, other = some_pairs(), tiny()
    ready(tiny(), pairs, states=False)
    with torch.no_grad():
        other.ln_f.weight.mul_(1.01)
    with refused("its log-probabilities differ from the reference's by 0\\.[0-9]+%"):
        fill(cache(tokens_of(pairs)), range(12), reference.live(other))


def test_a_reference_that_says_nan_is_refused():
    pairs = some_pairs()
    ready(tiny(), pairs, states=False)
    live = reference.live(tiny())
    with refused("its log-probabilities differ from the reference's by nan"):
        fill(cache(tokens_of(pairs)), range(12), lambda batch: (live(batch)[0] * math.nan, *live(batch)[1:]))


@pytest.mark.parametrize("what", ["model", "dtype"])
def test_a_folder_made_for_something_else_is_refused(what):
    """Its file says what it was made for, whatever the folder is called."""
    model, pairs = tiny(), some_pairs()
    made = ready(model, pairs).folder
    other = cache(tokens_of(pairs), model, {**WHAT, what: "another"})
    shutil.copy(made / "logps.npz", other.folder)
    with refused(rf"logps\.npz: made for other {what}: delete "):
        cache(tokens_of(pairs), model, {**WHAT, what: "another"})


def test_what_does_not_fit_on_the_disk_is_refused(monkeypatch):
    """Half of what is free is left alone; nothing is computed, and a smaller run goes on."""
    model, pairs = tiny(), some_pairs()
    live, found = Live(model), cache(tokens_of(pairs), model)
    _, need = found.need(range(12))
    for free, fits in ((2 * need - 2, False), (2 * need, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(10 ** 12, 0, free))
        if fits:
            fill(found, range(12), live)
        else:
            with refused(r"the reference's cache would take 0\.0 GB, above half of the 0\.0 GB that are free: use"):
                fill(found, range(12), live)
            assert live.asked == [] and not (found.folder / "logps.npz").exists()
    assert live.pairs() == list(range(12))


def test_a_run_that_is_killed_leaves_no_pair_that_is_believed(monkeypatch):
    """Between the states and the numbers: what was computed since the last time that numbers were written is computed again."""
    model, pairs = tiny(), some_pairs()
    tokens, live = tokens_of(pairs), Live(model)
    ready(model, pairs, [3, 4])

    class Killed(BaseException):
        pass

    def killed(self):
        raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(reference.Cache, "_write", killed)
        with pytest.raises(Killed):
            fill(cache(tokens, model), range(12), live)
    assert np.fromfile(cache(tokens, model).folder / "states.f16", np.float16).reshape(-1, C).any(1).all()   # all are there
    found = cache(tokens, model)
    assert sorted(found.need(range(12))[0].tolist()) == [0, 1, 2, *range(5, 12)]
    live.pairs()
    fill(found, range(12), live)
    assert Counter(live.pairs()) == Counter(range(12))   # ten anew, two looked at


def test_an_interrupted_run_goes_on_where_numbers_were_written(monkeypatch):
    """Every minute they are: here after every micro-batch, as time flies. The third one breaks off."""
    model, pairs = tiny(), some_pairs()
    live, tokens, now = Live(model), tokens_of(pairs), iter(range(0, 10 ** 6, 100))
    monkeypatch.setattr(reference.time, "time", lambda: next(now))

    def breaks_off(batch):
        if len(live.asked) == 2:
            raise KeyboardInterrupt
        return live(batch)
    with pytest.raises(KeyboardInterrupt):
        fill(cache(tokens, model), range(12), breaks_off)
    done = live.pairs()
    assert len(done) == 8 and set(cache(tokens, model).need(range(12))[0]) == set(range(12)) - set(done)
    found = cache(tokens, model)
    fill(found, range(12), live)
    assert set(live.pairs()) >= set(range(12)) - set(done) and found.need(range(12))[0].size == 0


def test_numbers_are_written_whole(home):
    """Under another name first: no file is left over, and what is there is a hash and numpy's format, which holds no code."""
    found = ready(tiny(), some_pairs())
    assert found.folder.parent == home / "nanopost" / "reference"
    assert sorted(f.name for f in found.folder.iterdir()) == ["logps.npz", "states.f16"]
    blob = (found.folder / "logps.npz").read_bytes()
    assert hashlib.sha256(blob[32:]).digest() == blob[:32]
    with np.load(io.BytesIO(blob[32:]), allow_pickle=False) as f:
        assert np.array_equal(f["logps"], found.logps) and json.loads(str(f["what"])) == found.what
