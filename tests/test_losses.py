"""
Proves losses.py: log-probabilities of tokens and responses, SFT, DPO, CDPO, rewards, win rates and divergences, values and
gradients, also when the scored rows go through the vocabulary matrix in many small chunks; and that a packed micro-batch gives
every loss and gradient of its dialogues run one at a time.

    python -m pytest -q tests/test_losses.py

The oracles share no code with losses.py: float64, full logits, written from the papers' equations; one is transformers.
"""
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import lora
import losses
from model import GPT, GPTConfig, export, reward_model

EXACT = dict(rtol=1e-10, atol=1e-10)   # float64 on both sides: only the order of summation differs (about 1e-15)
LOG2 = math.log(2)

# ----------------------------------------------------------------------------------------------------------------------
# oracles: the whole (S, V) matrix at once, in float64, as the equations have it

def full_logp(hidden, weight):
    """Every token's log-probability, (S, V), with gradients by torch's autograd."""
    logits = hidden @ weight.T
    return logits - torch.logsumexp(logits, dim=1, keepdim=True)


def full_token_logps(hidden, weight, targets):
    return full_logp(hidden, weight)[torch.arange(len(targets)), targets]


def full_cdpo(hidden, weight, targets, owner, ref_hidden, ref_weight, beta, gamma):
    """Equation 4 of 000_..., response by response: losses (B,), R (B,), log-probs (2B,)."""
    logp, ref_logp = full_logp(hidden, weight), full_logp(ref_hidden, ref_weight)
    s = 1 / (1 + torch.exp(-beta * (logp - ref_logp)))
    n, B = int(owner.max()) + 1, (int(owner.max()) + 1) // 2
    logps, ref_logps, R = [], [], []
    for i in range(n):
        positions = [t for t in range(len(owner)) if owner[t] == i]
        logps.append(sum(logp[t, targets[t]] for t in positions))
        ref_logps.append(sum(ref_logp[t, targets[t]] for t in positions))
        R_t = [sum(s[t, v] for v in range(s.size(1)) if v != targets[t]) / (s.size(1) - 1) for t in positions]
        R.append(sum(R_t) / len(positions))
    h = [(logps[i] - ref_logps[i]) - (logps[B + i] - ref_logps[B + i]) for i in range(B)]
    R = [(R[i] + R[B + i]) / 2 for i in range(B)]
    dpo = [torch.log(1 + torch.exp(-beta * x)) for x in h]   # -log sigmoid
    return torch.stack([a + gamma * b for a, b in zip(dpo, R)]), torch.stack(R), torch.stack(logps)


def numpy_logp(logits):
    logits = np.asarray(logits, dtype=np.float64)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def numpy_regularizer(logp, ref_logp, targets, beta):
    """Equation 3, literally: a loop over v != y_t."""
    found = []
    for t, y in enumerate(targets):
        terms = [1 / (1 + np.exp(-beta * (logp[t][v] - ref_logp[t][v]))) for v in range(len(logp[t])) if v != y]
        found.append(sum(terms) / len(terms))
    return np.array(found)


def response_logp(model, prompt, response):
    """log pi(response | prompt) from the model's full logits, without padding or neighbours."""
    logits = model(torch.tensor([[*prompt, *response]]))[0]
    logp = logits - torch.logsumexp(logits, dim=1, keepdim=True)
    return sum(logp[len(prompt) + t - 1, y] for t, y in enumerate(response))

# ----------------------------------------------------------------------------------------------------------------------
# what the tests work on

V, EOT = 23, 22
PROMPTS = [[1, 2, 3], [4, 5]]
CHOSEN = [[6, 7, EOT], [8, EOT]]
REJECTED = [[9, EOT], [10, 11, 12, 13, EOT]]
CHUNK_ROWS = 3


def tiny_gpt(seed, dtype=torch.float64):
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size=16, vocab_size=V, n_layer=2, n_head=2, n_embd=8)).to(dtype).eval()


def pairs(*more):
    """The two pairs above, and more of them, as data.py stores them."""
    parts = [part for triple in (*zip(PROMPTS, CHOSEN, REJECTED), *more) for part in triple]
    return data.Tokens(np.concatenate(parts).astype(np.uint16), np.cumsum([len(p) for p in parts]).reshape(-1, 3))


def arrays(lists):
    return [np.array(x, dtype=np.uint16) for x in lists]


def gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])])


def assert_same_gradients(ours, oracle, inputs, upstream):
    gradients = [torch.autograd.grad(x, inputs, upstream, retain_graph=True) for x in (ours, oracle)]
    torch.testing.assert_close(*gradients, **EXACT)


def random_rows(S=11, C=4, vocabulary=13, seed=0, dtype=torch.float64):
    """hidden (S, C) and weight (V, C) that ask for gradients, targets (S,)."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, C, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for n in (S, vocabulary))
    return hidden, weight, torch.randint(vocabulary, (S,), generator=g)


def random_pairs():
    """Two pairs whose responses have 3, 1 (chosen), 5 and 2 (rejected) tokens, in mixed order: the arguments of full_cdpo."""
    hidden, weight, targets = random_rows(seed=1)
    ref_hidden, ref_weight, _ = (x.detach() for x in random_rows(seed=2))
    owner = torch.tensor([0, 2, 2, 0, 1, 3, 2, 2, 3, 0, 2])
    return hidden, weight, targets, owner, ref_hidden, ref_weight


def one_pair(hidden, weight, targets, owner, ref_hidden, ref_weight, i):
    """The arguments of full_cdpo for pair i of two, alone."""
    mine = owner % 2 == i
    return hidden[mine], weight, targets[mine], owner[mine] // 2, ref_hidden[mine], ref_weight


def cdpo(hidden, weight, targets, owner, ref_hidden, ref_weight, beta, gamma):
    """losses.cdpo_loss with the reference's log-probs filled in."""
    with torch.autocast("cpu", enabled=False):
        logp = full_token_logps(ref_hidden, ref_weight, targets)
    ref_logps = torch.stack([logp[owner == i].sum() for i in range(int(owner.max()) + 1)])
    return losses.cdpo_loss(hidden, weight, targets, owner, ref_hidden, ref_weight, ref_logps, beta, gamma)


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(params=[10 ** 9, 13 * CHUNK_ROWS], ids=["one chunk", "uneven chunks"])
def chunked(request, monkeypatch):
    """Runs a test twice: with all rows in one chunk, and (for V = 13) with 11 rows as 3 + 3 + 3 + 2."""
    monkeypatch.setattr(losses, "CHUNK", request.param)


@pytest.fixture
def seen(monkeypatch):
    """("policy" or "reference", rows) of every chunk of hidden states that meets a vocabulary matrix, CHUNK_ROWS at a time (for
    V = 13). The reference's matrix asks for no gradient."""
    found, original = [], losses.log_softmax

    def spy(hidden, weight, dtype, out):
        found.append(("policy" if weight.requires_grad else "reference", len(hidden)))
        return original(hidden, weight, dtype, out)
    monkeypatch.setattr(losses, "log_softmax", spy)
    monkeypatch.setattr(losses, "CHUNK", 13 * CHUNK_ROWS + 12)   # not quite one row more
    return found


class Watch(TorchDispatchMode):
    """Notes operation, shape and type of every tensor that comes out of torch while it is on."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.made.append((str(func), x.shape, x.dtype))
        return result

    def largest(self):
        return max(shape.numel() for _, shape, _ in self.made)

    def products(self):
        """(shape, type) of the results of matrix products."""
        return {(tuple(shape), dtype) for name, shape, dtype in self.made if "mm" in name}

# ----------------------------------------------------------------------------------------------------------------------
# token_logps: oracle

def test_token_logps_and_both_gradients_are_those_of_full_logits(chunked):
    hidden, weight, targets = random_rows()
    upstream = torch.randn(len(targets), dtype=torch.float64)   # another one for each row
    ours, oracle = losses.token_logps(hidden, weight, targets), full_token_logps(hidden, weight, targets)
    torch.testing.assert_close(ours, oracle, **EXACT)
    assert_same_gradients(ours, oracle, (hidden, weight), upstream)


def test_token_logps_gradcheck(chunked):
    hidden, weight, targets = random_rows()
    assert torch.autograd.gradcheck(lambda h, w: losses.token_logps(h, w, targets), (hidden, weight))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_costs_no_product(frozen, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 13 * CHUNK_ROWS)
    hidden, weight, targets = random_rows()
    inputs = {"hidden": hidden, "weight": weight}
    inputs.pop(frozen).requires_grad_(False)
    free, = inputs.values()
    expected, = torch.autograd.grad(full_token_logps(hidden, weight, targets).sum(), free)
    with Watch() as forward:
        logps = losses.token_logps(hidden, weight, targets)
    with Watch() as backward:
        logps.sum().backward()
    torch.testing.assert_close(free.grad, expected, **EXACT)
    assert {"hidden": hidden, "weight": weight}[frozen].grad is None
    # of each chunk: logits (s, V), then (s, C) for hidden and (V, C) for the weight, and one of the two is not wanted. The weight
    # needs d and so the logits again; without it the hidden states' gradient comes at once, and going back is no product
    logits, of_hidden, of_weight = {(3, 13), (2, 13)}, {(3, 4), (2, 4)}, {(13, 4)}
    made = [{shape for shape, _ in watch.products()} for watch in (forward, backward)]
    assert made == {"hidden": [logits, logits | of_weight], "weight": [logits | of_hidden, set()]}[frozen]


def test_with_a_frozen_weight_each_row_has_its_own_gradient(chunked):
    """As LoRA has it: computed for the log-probability itself at once, and scaled by what comes back for each."""
    hidden, weight, targets = random_rows()
    weight.requires_grad_(False)
    upstream = torch.randn(len(targets), dtype=torch.float64)
    ours, oracle = losses.token_logps(hidden, weight, targets), full_token_logps(hidden, weight, targets)
    torch.testing.assert_close(ours, oracle, **EXACT)
    assert_same_gradients(ours, oracle, hidden, upstream)
    assert_same_gradients(ours, oracle, hidden, upstream.flip(0))   # once more through the same graph
    assert torch.autograd.gradcheck(lambda h: losses.token_logps(h, weight, targets), hidden)


@pytest.mark.parametrize("frozen", [False, True])
def test_fp32_is_close_to_fp64(frozen):
    hidden, weight, targets = random_rows(S=100, C=16, vocabulary=500)
    small = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    small[1].requires_grad_(not frozen)
    inputs, of = (small[:1], (hidden,)) if frozen else (small, (hidden, weight))
    oracle = full_token_logps(hidden, weight, targets)
    for ours, theirs in ((losses.token_logps(*small, targets), oracle), (losses.sft_loss(*small, targets, 7), -oracle.sum() / 7)):
        found = torch.autograd.grad(ours.sum(), inputs)
        expected = torch.autograd.grad(theirs.sum(), of, retain_graph=True)
        assert {x.dtype for x in (ours, *found)} == {torch.float32}
        # a few roundings (6e-8 each) of logits of size 10: 1e-5 leaves a factor of ten
        torch.testing.assert_close((ours, *found), (theirs, *expected), rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("frozen", [False, True])
def test_bfloat16_products_under_autocast_float32_results(chunked, frozen):
    hidden, weight, targets = random_rows(dtype=torch.float32)
    inputs = (hidden, weight)[:2 - frozen]
    weight.requires_grad_(not frozen)
    oracle = full_token_logps(hidden, weight, targets)
    expected = torch.autograd.grad(oracle.sum(), inputs)
    for one_pass in (False, True):   # each log-probability; their sum and its gradient at once
        with Watch() as watch:
            with torch.autocast("cpu", torch.bfloat16):
                ours = -losses.sft_loss(hidden, weight, targets, 1) if one_pass else losses.token_logps(hidden, weight, targets)
            found = torch.autograd.grad(ours.sum(), inputs)   # outside autocast, as in the training loops
        theirs = oracle.sum() / 11 if one_pass else oracle
        ours = ours / 11 if one_pass else ours
        assert {x.dtype for x in (ours, *found)} == {torch.float32}
        assert {dtype for _, dtype in watch.products()} == {torch.bfloat16}
        # bfloat16 keeps 8 bits: inputs of size 3 are off by 1e-2, a logit of 4 terms and a weight gradient of 11 by a few of them
        torch.testing.assert_close((ours, *found), (theirs, *expected), rtol=0, atol=0.08)
        for a, b in zip((ours, *found), (theirs, *expected)):
            assert (a - b).abs().max() > 1e-4, "nothing was rounded to bfloat16"


@pytest.mark.parametrize("one_pass", [False, True])
def test_under_autocast_the_weights_gradient_is_summed_in_float32(monkeypatch, one_pass):
    """600 equal chunks of one row give 600 times the gradient of one. A bfloat16 sum, 8 bits, would stop growing at 256 times."""
    monkeypatch.setattr(losses, "CHUNK", 13)
    hidden, weight, targets = random_rows(S=1, dtype=torch.float32)
    gradients = []
    for n in (1, 600):
        arguments = hidden.expand(n, 4), weight, targets.expand(n)
        with torch.autocast("cpu", torch.bfloat16):
            total = -losses.sft_loss(*arguments, 1) if one_pass else losses.token_logps(*arguments).sum()
        gradients.append(torch.autograd.grad(total, weight)[0])
    torch.testing.assert_close(gradients[1], 600 * gradients[0], rtol=1e-4, atol=0)   # 600 fp32 roundings


def test_under_autocast_only_the_products_are_rounded():
    """Whole numbers up to 256 are exact in bfloat16, and so is their product here. What is left is log-softmax's own rounding:
    float32's, 1e-6. In bfloat16, 8 bits, log-probabilities of size 2 and more would be off by 1e-2."""
    hidden, weight, targets = random_rows()
    hidden, weight = hidden.detach().mul(2).round(), weight.detach().round()
    with torch.autocast("cpu", torch.bfloat16):
        ours = losses.token_logps(hidden.float(), weight.float(), targets)
    torch.testing.assert_close(ours, full_token_logps(hidden, weight, targets).float(), rtol=1e-6, atol=1e-6)


def test_half_precision_inputs_give_float32_log_probs_and_gradients_of_their_own_type():
    hidden, weight, targets = random_rows(dtype=torch.bfloat16)
    ours = losses.token_logps(hidden, weight, targets)
    torch.testing.assert_close(ours, full_token_logps(hidden.float(), weight.float(), targets), rtol=0, atol=0.08)   # as above
    assert ours.dtype == torch.float32
    assert [g.dtype for g in torch.autograd.grad(ours.sum(), (hidden, weight))] == [torch.bfloat16] * 2
    loss = losses.sft_loss(hidden, weight, targets, 11)
    torch.testing.assert_close(loss, -ours.mean(), rtol=1e-6, atol=0)
    assert [g.dtype for g in torch.autograd.grad(loss, (hidden, weight))] == [torch.bfloat16] * 2

# ---- by hand

def test_the_wider_of_two_types_is_that_of_the_products():
    hidden, weight, targets = torch.randn(5, 64).bfloat16(), torch.randn(9, 64), torch.arange(5)
    expected = torch.log_softmax(hidden.float() @ weight.T, 1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(losses.token_logps(hidden, weight, targets), expected)


def test_the_weights_gradient_is_summed_in_place():
    found = losses._Gradient(torch.randn(4, 3), torch.randn(5, 3), torch.float32, False, True)
    found.add(slice(0, 2), torch.randn(2, 5))
    where = found.weight.data_ptr()
    found.add(slice(2, 4), torch.randn(2, 5))
    assert found.weight.data_ptr() == where


def test_token_logps_by_hand():
    """Logits log(2, 1, 1) and log(1, 3, 4): probabilities 1/2 1/4 1/4 and 1/8 3/8 1/2."""
    hidden = torch.tensor([[2., 1., 1.], [1., 3., 4.]], dtype=torch.float64).log()
    logps = losses.token_logps(hidden, torch.eye(3, dtype=torch.float64), torch.tensor([0, 1]))
    torch.testing.assert_close(logps.exp(), torch.tensor([1 / 2, 3 / 8], dtype=torch.float64), **EXACT)


def test_gradient_at_the_logits_by_hand():
    """d log p_y / dz = [k = y] - p = (1/2, -1/4, -1/4), here times 2. The identity as weight makes the hidden state z, here
    (log 2, 0, 0); the gradient of the weight is the outer product of the two."""
    hidden = torch.tensor([[2., 1., 1.]], dtype=torch.float64).log().requires_grad_()
    weight = torch.eye(3, dtype=torch.float64, requires_grad=True)
    (2 * losses.token_logps(hidden, weight, torch.tensor([0]))).sum().backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[1.0, -0.5, -0.5]], dtype=torch.float64), **EXACT)
    expected = torch.tensor([[LOG2, 0, 0], [-LOG2 / 2, 0, 0], [-LOG2 / 2, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(weight.grad, expected, **EXACT)

# ---- properties

def test_the_full_matrix_never_exists(monkeypatch):
    """40 rows, 50 tokens, chunks of 6: no tensor of more than 300 numbers, though the full matrix has 2000."""
    hidden, weight, targets = random_rows(S=40, C=3, vocabulary=50)
    ref_hidden, ref_weight, _ = (x.detach() for x in random_rows(S=40, C=3, vocabulary=50, seed=1))
    monkeypatch.setattr(losses, "CHUNK", 6 * 50)
    owner, ref_logps = torch.arange(40) % 4, torch.zeros(4, dtype=torch.float64)
    with Watch() as watch:
        losses.token_logps(hidden, weight, targets).sum().backward()
        losses.token_logps(hidden, weight.detach(), targets).sum().backward()
        losses.sft_loss(hidden, weight, targets, 40).backward()
        loss, _, _ = losses.cdpo_loss(hidden, weight, targets, owner, ref_hidden, ref_weight, ref_logps, 0.1, 1.0)
        loss.sum().backward()
        losses.divergences(hidden, weight, ref_hidden, ref_weight, targets, 0.1)
    assert 3 * 50 < watch.largest() <= 6 * 50   # the weight has 150, so more means that it saw the logits


ALL_ROWS = [("policy", 3), ("policy", 3), ("policy", 3), ("policy", 2)]


def test_backward_computes_each_row_again(seen):
    """Nothing of size (rows, V) waits for the backward pass: it asks for the log-softmax of every row a second time."""
    hidden, weight, targets = random_rows()
    logps = losses.token_logps(hidden, weight, targets)
    assert seen == ALL_ROWS
    logps.sum().backward()
    assert seen == ALL_ROWS * 2


def test_no_row_is_computed_again_where_the_gradient_is_known_at_once(seen):
    """With a frozen weight, and in SFT, each row meets the vocabulary once. CDPO's policy does so twice, its reference once, and
    with two models a chunk has half as many rows: one, where it had three."""
    hidden, weight, targets, owner, ref_hidden, ref_weight = random_pairs()
    losses.sft_loss(hidden, weight, targets, 11).backward()
    assert seen == ALL_ROWS
    seen.clear()
    loss, _, _ = losses.cdpo_loss(hidden, weight, targets, owner, ref_hidden, ref_weight, torch.zeros(4).double(), 0.5, 2.0)
    loss.mean().backward()
    assert seen == [("policy", 1)] * 11 + [("policy", 1), ("reference", 1)] * 11
    seen.clear()
    losses.token_logps(hidden, weight.detach(), targets).sum().backward()
    assert [rows for _, rows in seen] == [3, 3, 3, 2]


def test_without_gradients_none_is_computed_and_nothing_kept(chunked):
    """Neither under no_grad nor where nothing asks for one."""
    hidden, weight, *rest = random_pairs()
    frozen = [x.detach() for x in (hidden, weight)]
    for context, inputs in ((torch.no_grad(), (hidden, weight)), (torch.no_grad(), (hidden, frozen[1])),
                            (torch.enable_grad(), frozen)):
        with context, Watch() as watch:
            found = [losses.token_logps(*inputs, rest[0]), losses.sft_loss(*inputs, rest[0], 11), *cdpo(*inputs, *rest, 0.5, 2.0)]
        assert not any(x.requires_grad or x.grad_fn for x in found)
        assert {shape[1] for shape, _ in watch.products()} == {13}   # logits only: a gradient's product has C = 4 columns


def test_a_chunk_holds_one_row_at_least(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", 5)   # less than one row of logits
    hidden, weight, targets = random_rows()
    torch.testing.assert_close(losses.token_logps(hidden, weight, targets), full_token_logps(hidden, weight, targets), **EXACT)


def test_grad_is_the_callers_alone(chunked):
    """Gradients are returned: .grad changes in backward() only, by addition, and a second backward pass gives the same."""
    hidden, weight, targets = random_rows()
    before = hidden.detach().clone(), weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    logps = losses.token_logps(hidden, weight, targets)
    assert hidden.grad is None and torch.equal(weight.grad, torch.ones_like(weight))
    first = torch.autograd.grad(logps.sum(), (hidden, weight), retain_graph=True)
    assert hidden.grad is None and torch.equal(weight.grad, torch.ones_like(weight))
    logps.sum().backward()
    torch.testing.assert_close(hidden.grad, first[0], rtol=0, atol=0)
    torch.testing.assert_close(weight.grad, 1 + first[1], rtol=0, atol=0)
    assert torch.equal(hidden, before[0]) and torch.equal(weight, before[1])


def test_huge_logits_stay_finite():
    """Logits 0 and 1000: e^1000 overflows, its logarithm must not."""
    hidden = torch.tensor([[0., 1000.]], requires_grad=True)
    logps = losses.token_logps(hidden.expand(2, 2), torch.eye(2), torch.tensor([0, 1]))
    assert logps.tolist() == [-1000, 0]
    logps.sum().backward()
    assert hidden.grad.tolist() == [[1, -1]]   # (1, -1) from the first row, (0, 0) from the second


def test_a_frozen_weight_leaves_the_callers_tensors_alone(chunked):
    hidden, weight, targets = random_rows()
    before, hidden.grad = hidden.detach().clone(), torch.ones_like(hidden)
    logps = losses.token_logps(hidden, weight.detach(), targets)
    first, = torch.autograd.grad(logps.sum(), hidden, retain_graph=True)
    kept = first.clone()
    logps.sum().backward()
    assert torch.equal(first, kept) and torch.equal(hidden.grad, 1 + kept) and torch.equal(hidden, before)


def test_lengths_must_agree():
    hidden, weight, targets = random_rows()
    with pytest.raises(ValueError, match="11 .* 10"):
        losses.token_logps(hidden, weight, targets[:10])

# ----------------------------------------------------------------------------------------------------------------------
# responses and SFT: oracle

@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_sft_loss_is_that_of_transformers(loss_on, tmp_path):
    """transformers takes -100 as "not counted" and averages over the rest; its GPT-2 reads our exported weights."""
    from transformers import GPT2LMHeadModel
    model = tiny_gpt(0, torch.float32)
    export(model, tmp_path / "hf")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    rows = [p + r for p, r in zip(PROMPTS, CHOSEN)]
    idx, labels = torch.zeros(2, 6, dtype=torch.long), torch.full((2, 6), -100)
    for i, (prompt, row) in enumerate(zip(PROMPTS, rows)):
        first = len(prompt) if loss_on == "response" else 1
        idx[i, :len(row)] = torch.tensor(row)
        labels[i, first:len(row)] = torch.tensor(row[first:])
    expected = theirs(idx, labels=labels).loss.item()
    batch = data.sft_batch(pairs(), [0, 1], loss_on)
    assert len(batch.targets) == (labels != -100).sum()
    ours = losses.sft_loss(*batch.hidden_and_head(model), batch.targets, len(batch.targets))
    assert ours.item() == pytest.approx(expected, rel=1e-5)   # fp32 in both, with products in another order


@pytest.mark.parametrize("free", ["hidden", "weight", "both"])
def test_sft_loss_and_its_gradients_are_those_of_full_logits(chunked, free):
    """Also of a multiple of it, and of what else is added to it."""
    hidden, weight, targets = random_rows()
    inputs = {"hidden": (hidden,), "weight": (weight,), "both": (hidden, weight)}[free]
    for x in (hidden, weight):
        x.requires_grad_(any(x is y for y in inputs))
    ours, oracle = losses.sft_loss(hidden, weight, targets, 7), -full_token_logps(hidden, weight, targets).sum() / 7
    torch.testing.assert_close(ours, oracle, **EXACT)
    more = sum(x.sin().sum() for x in inputs)
    assert_same_gradients(3 * ours + more, 3 * oracle + more, inputs, None)


def test_a_responses_log_prob_is_that_of_full_logits(chunked):
    model = tiny_gpt(0)
    expected = torch.stack([response_logp(model, p, r) for p, r in zip(PROMPTS * 2, CHOSEN + REJECTED)])
    torch.testing.assert_close(losses.batch_logps(model, data.pair_batch(pairs(), [0, 1])), expected, **EXACT)

# ---- by hand

def test_sequence_logps_by_hand():
    """Summed, not averaged; owners in any order; a response without scored tokens has log-prob 0."""
    logps = torch.tensor([-1., -2., -4., -8., -16.], dtype=torch.float64, requires_grad=True)
    found = losses.sequence_logps(logps, torch.tensor([0, 2, 0, 2, 2]), 4)
    assert found.tolist() == [-5, 0, -26, 0] and found.dtype == torch.float64
    (found * torch.tensor([1., 10., 100., 1000.])).sum().backward()
    assert logps.grad.tolist() == [1, 100, 1, 100, 100]


def test_sft_loss_by_hand():
    """Probabilities 1/2 and 1/8: -log of the product is 4 log 2, of which a step with 8 scored tokens in all gets an eighth."""
    hidden = torch.tensor([[2., 1., 1.], [1., 3., 4.]], dtype=torch.float64).log()
    loss = losses.sft_loss(hidden, torch.eye(3, dtype=torch.float64), torch.tensor([0, 0]), 8)
    assert loss.item() == pytest.approx(LOG2 / 2, abs=1e-12)


def test_sft_gradient_by_hand():
    """p - [k = y], over the 8 scored tokens: (1/2 - 1, 1/4, 1/4) and (1/8 - 1, 3/8, 1/2). Here 16 times that, for a loss of 16
    times the size; the identity as weight makes the hidden states the logits."""
    hidden = torch.tensor([[2., 1., 1.], [1., 3., 4.]], dtype=torch.float64).log().requires_grad_()
    (16 * losses.sft_loss(hidden, torch.eye(3, dtype=torch.float64), torch.tensor([0, 0]), 8)).backward()
    expected = torch.tensor([[-1., 0.5, 0.5], [-1.75, 0.75, 1.]], dtype=torch.float64)
    torch.testing.assert_close(hidden.grad, expected, **EXACT)

# ---- properties

def test_micro_batches_of_unequal_length_give_one_batchs_loss_and_gradient():
    model = tiny_gpt(0)
    prompts, responses = arrays(PROMPTS * 2), arrays(CHOSEN + REJECTED)

    def loss(rows, normaliser=None):
        batch = data.collate([(prompts[i], responses[i]) for i in rows])
        return losses.sft_loss(*batch.hidden_and_head(model), batch.targets, normaliser or len(batch.targets))
    tokens = sum(map(len, responses))
    whole, micro = loss([0, 1, 2, 3]), loss([3], tokens) + loss([0, 2], tokens) + loss([1], tokens)
    assert micro.item() == pytest.approx(whole.item(), rel=1e-6)
    expected = gradient(whole, model)
    scale = 1e-6 * expected.abs().max().item()
    torch.testing.assert_close(gradient(micro, model), expected, rtol=1e-6, atol=scale)
    # the well-known bug is far outside those tolerances
    mean_of_means = (loss([3]) + loss([0, 2]) + loss([1])) / 3
    assert abs(mean_of_means.item() / whole.item() - 1) > 1e-3
    assert (gradient(mean_of_means, model) - expected).abs().max() > 1000 * scale


LINE = [1, 2, 3, 6, 7, 9, 4, 5, 8, 10, 11, 12, 13]   # the two pairs, but for each response's last token
# where each response is scored: from its prompt's last token on; the first two places of a prompt and all else are not
SCORED = [[2, 3, 4], [7, 8], [2, 5], [7, 9, 10, 11, 12]]


def stand_in(hidden, weight):
    """A model whose hidden states, one of each token of the line, are these."""
    return SimpleNamespace(hidden_and_head=lambda tokens, packing, at: (hidden[at], weight))


def test_only_response_and_end_of_text_count():
    """Free hidden states in place of the model's: a response's gradient is nonzero where one of its tokens or end-of-text comes
    next."""
    batch = data.pair_batch(pairs(), [0, 1])
    assert batch.tokens.tolist() == LINE
    hidden = torch.randn(len(LINE), 8, requires_grad=True)
    logps = losses.batch_logps(stand_in(hidden, torch.randn(V, 8)), batch)
    for r, places in enumerate(SCORED):
        found, = torch.autograd.grad(logps[r], hidden, retain_graph=True)
        assert (found.abs().sum(1) > 0).nonzero().flatten().tolist() == places, r


def test_which_labels_count():
    """A bias towards one token, by a channel that is 1 everywhere, raises a response's log-prob only if it is a label there."""
    batch = data.pair_batch(pairs(), [0, 1])
    hidden = torch.cat([torch.zeros(len(LINE), 2), torch.ones(len(LINE), 1)], dim=1)

    def logps(token):
        weight = torch.zeros(V, 3)
        weight[token, 2] = 1
        return losses.batch_logps(stand_in(hidden, weight), batch)
    even = -torch.tensor([3, 2, 2, 5]) * math.log(V)
    assert (logps(EOT) > even).all()                        # every response is closed by it
    assert (logps(2) < even).all()                          # only in a prompt
    assert ((logps(7) > even) == torch.tensor([1, 0, 0, 0])).all()    # in the first chosen response
    assert ((logps(11) > even) == torch.tensor([0, 0, 0, 1])).all()   # in the second rejected one


def test_padding_neighbours_and_order_do_not_matter():
    """Nor whether a prompt is there once for both responses or once for each."""
    model = tiny_gpt(0, torch.float32)
    dialogues = list(zip(arrays(PROMPTS * 2), arrays(CHOSEN + REJECTED)))
    with torch.no_grad():
        alone = torch.cat([losses.batch_logps(model, data.collate([dialogue])) for dialogue in dialogues])
        batch = data.collate(dialogues)
        together = losses.batch_logps(model, batch)
        backwards = losses.batch_logps(model, data.collate(dialogues[::-1])).flip(0)
        shared = losses.batch_logps(model, data.pair_batch(pairs(), [0, 1]))
        shared_backwards = losses.batch_logps(model, data.pair_batch(pairs(), [1, 0])).view(2, 2).flip(1).flatten()
        (B, T), places = (2, 7), torch.full((2, 7), 5)   # the second pair in one rectangle; another token as padding
        places[0, :3], places[1] = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3, 4, 5, 6, 6])
        batch = data.pair_batch(pairs(), [1])
        packing = batch.packing._replace(shapes=((B, T),), places=places.flatten(), back=torch.tensor([7, 1, 2, 9, 10, 11, 12]))
        padded_otherwise = losses.batch_logps(model, replace(batch, packing=packing))
    torch.testing.assert_close(padded_otherwise, alone[1::2], rtol=1e-6, atol=0)
    for found in (together, backwards, shared, shared_backwards):
        torch.testing.assert_close(found, alone, rtol=1e-6, atol=0)   # fp32 products at another shape are not bitwise the same

# ----------------------------------------------------------------------------------------------------------------------
# DPO: oracle

def test_dpo_loss_and_label_smoothing_against_numpy():
    rng = np.random.default_rng(0)
    w, l, ref_w, ref_l = rng.normal(-30, 5, (4, 20))
    for beta, eps in ((0.1, 0.0), (0.5, 0.1), (1.0, 0.3)):
        h = (w - ref_w) - (l - ref_l)
        sigmoid = 1 / (1 + np.exp(-beta * h))
        expected = -(1 - eps) * np.log(sigmoid) - eps * np.log(1 - sigmoid)
        found = losses.dpo_loss(*map(torch.from_numpy, (w, l, ref_w, ref_l)), beta, eps)
        expected = (expected, beta * (w - ref_w), beta * (l - ref_l))
        np.testing.assert_allclose(torch.stack(found).numpy(), expected, rtol=1e-8)   # 1 - sigmoid loses digits in the oracle


def test_dpo_gradient_is_the_closed_form():
    """-beta sigmoid(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l)), through a whole small model."""
    model, reference, beta = tiny_gpt(0), tiny_gpt(1), 0.7
    batch = data.pair_batch(pairs(), [0, 1])
    logps, ref_logps = losses.batch_logps(model, batch), losses.batch_logps(reference, batch).detach()
    loss, _, _ = losses.dpo_loss(*logps.chunk(2), *ref_logps.chunk(2), beta)
    expected = 0
    for prompt, w, l in zip(PROMPTS, CHOSEN, REJECTED):
        logp_w, logp_l = (response_logp(model, prompt, y) for y in (w, l))
        r_w, r_l = (beta * (logp - response_logp(reference, prompt, y)).item() for logp, y in ((logp_w, w), (logp_l, l)))
        sigmoid = 1 / (1 + math.exp(r_w - r_l))   # of r_l - r_w
        expected = expected - beta * sigmoid * (gradient(logp_w, model) - gradient(logp_l, model)) / len(PROMPTS)
    torch.testing.assert_close(gradient(loss.mean(), model), expected, **EXACT)

# ---- by hand

def hand_pair():
    """Three tokens, the identity as weight, integers as odds. The chosen response is (0, 1), the rejected one (2).

        policy  1/2 and 1/2 -> 1/4;  1/8       ref  1/4 and 1/2 -> 1/8;  1/2
    """
    odds = torch.tensor([[2., 1, 1], [1, 2, 1], [3, 4, 1]], dtype=torch.float64)
    ref_odds = torch.tensor([[1., 2, 1], [1, 4, 3], [1, 1, 2]], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    return odds.log(), eye, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), ref_odds.log(), eye


def test_dpo_by_hand_from_raw_probabilities():
    """Ratios 2 and 1/4, h = log 8. Beta 1: sigmoid(log 8) = 8/9, loss log 9/8. Beta 1/3: sigmoid(log 2) = 2/3, loss log 3/2."""
    hidden, weight, targets, owner, ref_hidden, ref_weight = hand_pair()
    policy = losses.sequence_logps(losses.token_logps(hidden, weight, targets), owner, 2)
    ref = losses.sequence_logps(losses.token_logps(ref_hidden, ref_weight, targets), owner, 2)
    for beta, expected in ((1, math.log(9 / 8)), (1 / 3, math.log(3 / 2))):
        loss, chosen, rejected = losses.dpo_loss(*policy.chunk(2), *ref.chunk(2), beta)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        assert (chosen.item(), rejected.item()) == pytest.approx((beta * LOG2, -2 * beta * LOG2), abs=1e-12)


def test_label_smoothing_by_hand():
    """Margin log 3: sigmoid 3/4. eps 1/4: -3/4 log 3/4 - 1/4 log 1/4."""
    zero = torch.zeros(1, dtype=torch.float64)
    loss, _, _ = losses.dpo_loss(zero + math.log(3), zero, zero, zero, 1.0, 0.25)
    assert loss.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), abs=1e-12)

# ---- properties

def test_dpo_starts_at_log_2():
    chosen, rejected = torch.tensor([-50., -3.]), torch.tensor([-20., -70.])
    for eps in (0.0, 0.2):
        loss, r_w, r_l = losses.dpo_loss(chosen, rejected, chosen.clone(), rejected.clone(), 0.1, eps)
        assert loss.tolist() == pytest.approx([LOG2] * 2, rel=1e-7)   # one fp32 rounding
        assert r_w.tolist() == r_l.tolist() == [0, 0]


def test_swapping_the_pair_negates_the_margin():
    w, l, ref_w, ref_l = torch.randn(4, 9, dtype=torch.float64)
    loss, r_w, r_l = losses.dpo_loss(w, l, ref_w, ref_l, 0.3)
    swapped, s_w, s_l = losses.dpo_loss(l, w, ref_l, ref_w, 0.3)
    torch.testing.assert_close(s_w - s_l, -(r_w - r_l), rtol=0, atol=0)
    torch.testing.assert_close(swapped - loss, r_w - r_l, **EXACT)   # -log s(-m) + log s(m) = m


def test_half_smoothing_has_no_preference():
    w, l, ref_w, ref_l = torch.randn(4, 9, dtype=torch.float64)
    loss, _, _ = losses.dpo_loss(w, l, ref_w, ref_l, 0.3, label_smoothing=0.5)
    swapped, _, _ = losses.dpo_loss(l, w, ref_l, ref_w, 0.3, label_smoothing=0.5)
    torch.testing.assert_close(loss, swapped, **EXACT)
    assert (loss > LOG2).all()   # least at margin 0


def test_extreme_margins_stay_finite():
    """log(sigmoid(-1000)) would be -inf."""
    policy = torch.tensor([-1e4, -10.], requires_grad=True)
    ref = torch.tensor([-10., -1e4])
    loss, _, _ = losses.dpo_loss(policy, policy.detach().flip(0), ref, ref.flip(0), 0.1)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([1998, 0], abs=1e-3)           # margins 0.1 (-9990 - 9990) and its opposite
    assert policy.grad.tolist() == pytest.approx([-0.1, 0], abs=1e-7)    # -beta sigmoid(-margin)


def test_rewards_are_for_reporting():
    policy = torch.randn(2, 3, requires_grad=True)
    loss, r_w, r_l = losses.dpo_loss(policy[0], policy[1], torch.zeros(3), torch.zeros(3), 0.1)
    assert loss.requires_grad and not r_w.requires_grad and not r_l.requires_grad

# ----------------------------------------------------------------------------------------------------------------------
# CDPO: oracle

@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_regularizer_is_the_literal_sum(beta):
    hidden, weight, targets, _, ref_hidden, ref_weight = random_pairs()
    logp, ref_logp = (numpy_logp((h @ w.T).detach().numpy()) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
    found = losses.cdpo_regularizer(torch.from_numpy(logp), torch.from_numpy(ref_logp), targets, beta)
    np.testing.assert_allclose(found.numpy(), numpy_regularizer(logp, ref_logp, targets.tolist(), beta), rtol=1e-10)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_cdpo_and_its_gradients_are_those_of_full_logits(beta, gamma, chunked):
    """Of a multiple of all losses, and of each pair alone. The regulariser and the log-probs are for reporting."""
    rows = random_pairs()
    hidden, weight = rows[:2]
    ours, oracle = cdpo(*rows, beta, gamma), full_cdpo(*rows, beta, gamma)
    torch.testing.assert_close(ours, oracle, **EXACT)
    assert [x.requires_grad for x in ours] == [True, False, False], "the regulariser and the log-probs have no gradient"
    assert_same_gradients(ours[0], oracle[0], (hidden, weight), torch.full((2,), -3.0, dtype=torch.float64))
    for i in (0, 1):
        loss, regularizer, logps = cdpo(*one_pair(*rows, i), beta, gamma)
        torch.testing.assert_close((loss[0], regularizer[0], logps), (oracle[0][i], oracle[1][i], oracle[2][i::2]), **EXACT)
        assert_same_gradients(loss.sum(), oracle[0][i], (hidden, weight), None)


def test_cdpo_gradient_by_differences(chunked):
    """Of every number by itself, as gradcheck does it and with its tolerances. (It would go back through one graph twice.)"""
    hidden, weight, *rest = random_pairs()

    def total():
        return cdpo(hidden, weight, *rest, 0.5, 10.0)[0].sum()
    found = torch.autograd.grad(total(), (hidden, weight))
    for x, gradient in zip((hidden, weight), found):
        numbers, differences = x.detach().view(-1), torch.zeros(x.numel(), dtype=torch.float64)
        for i in range(len(numbers)):
            for sign in (1, -1):
                numbers[i] += sign * 1e-6
                differences[i] += sign * total().item() / 2e-6
                numbers[i] -= sign * 1e-6
        torch.testing.assert_close(gradient.flatten(), differences, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1])
def test_cdpo_with_a_frozen_input(chunked, frozen):
    """As with LoRA, whose weight is frozen: the other gradient is the same, and none is computed for this one."""
    rows = random_pairs()
    expected, = torch.autograd.grad(full_cdpo(*rows, 0.5, 10.0)[0].sum(), rows[1 - frozen])
    rows[frozen].requires_grad_(False)
    with Watch() as watch:
        cdpo(*rows, 0.5, 10.0)[0].sum().backward()
    torch.testing.assert_close(rows[1 - frozen].grad, expected, **EXACT)
    assert rows[frozen].grad is None
    unwanted = {(13, 4)} if frozen else {(n, 4) for n in (CHUNK_ROWS, 2, 11)}
    assert not {shape for shape, _ in watch.products()} & unwanted


def test_cdpo_in_bfloat16():
    hidden, weight, targets, owner, ref_hidden, ref_weight = random_pairs()
    oracle = full_cdpo(hidden, weight, targets, owner, ref_hidden, ref_weight, 0.5, 10.0)
    expected = torch.autograd.grad(oracle[0].sum(), (hidden, weight))
    small = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        found = cdpo(*small, targets, owner, ref_hidden.float(), ref_weight.float(), 0.5, 10.0)
        assert all(x.dtype == torch.float32 for x in found)
    # log-probs of up to five tokens, each off by 1e-2 or so, times beta; gradients of size 1 likewise
    torch.testing.assert_close(found[:2], oracle[:2], rtol=0, atol=0.05, check_dtype=False)
    torch.testing.assert_close(torch.autograd.grad(found[0].sum(), small), expected, rtol=0, atol=0.05, check_dtype=False)

# ---- by hand

def test_regularizer_by_hand():
    """pi = (1/2, 1/4, 1/4), ref = (1/4, 1/4, 1/2), y = 0. At beta 1 the sigmoid is pi / (pi + ref): 1/2 for v = 1, 1/3 for v = 2,
    mean 5/12 (the realised token would add 2/3). At beta 2, pi^2 / (pi^2 + ref^2): 1/2 and 1/5, mean 7/20."""
    logp, ref_logp = torch.tensor([[2., 1, 1], [1, 1, 2]], dtype=torch.float64).div(4).log().split(1)
    for beta, expected in ((1, 5 / 12), (2, 7 / 20)):
        assert losses.cdpo_regularizer(logp, ref_logp, torch.tensor([0]), beta).tolist() == pytest.approx([expected], abs=1e-12)


def test_cdpo_by_hand():
    """hand_pair at beta 1, the sigmoids pi / (pi + ref) of the two other tokens:
    (2 1 1)/4 with (1 2 1)/4, y = 0: 1/3 and 1/2, R_t = 5/12;   (1 2 1)/4 with (1 4 3)/8, y = 1: 2/3 and 2/5, R_t = 8/15;
    (3 4 1)/8 with (1 1 2)/4, y = 2: 3/5 and 2/3, R_t = 19/30.  R = ((5/12 + 8/15)/2 + 19/30)/2 = 133/240."""
    loss, regularizer, logps = cdpo(*hand_pair(), 1.0, 10.0)
    assert regularizer.tolist() == pytest.approx([133 / 240], abs=1e-12)
    assert loss.tolist() == pytest.approx([math.log(9 / 8) + 10 * 133 / 240], abs=1e-12)
    assert logps.exp().tolist() == pytest.approx([1 / 4, 1 / 8], abs=1e-12)

# ---- properties

def test_cdpo_starts_at_log_2_plus_half_gamma(chunked):
    hidden, weight, targets, owner, _, _ = random_pairs()
    for gamma in (0.0, 1.0, 100.0):
        loss, regularizer, _ = cdpo(hidden, weight, targets, owner, hidden.detach(), weight.detach(), 0.1, gamma)
        assert regularizer.tolist() == [0.5, 0.5]   # exactly: sums of halves
        torch.testing.assert_close(loss, torch.full_like(loss, LOG2 + gamma / 2), **EXACT)


def test_regularizers_gradient_at_the_start_is_the_closed_form():
    """dR_t/dz_k = beta / (4 (V-1)) ([k != y_t] - (V-1) p_k). The identity as weight makes the hidden states
    z; two responses of one token each, so each R_t counts one half. DPO's own gradient, which is the loss's at gamma 0, is
    -beta / 2 (grad log pi(y_w) - grad log pi(y_l)), as sigmoid(0) is one half."""
    odds = torch.tensor([[2., 1., 1., 4.], [3., 3., 1., 1.]], dtype=torch.float64)   # rows sum to 8
    hidden, weight, targets = odds.log().requires_grad_(), torch.eye(4, dtype=torch.float64), torch.tensor([0, 3])
    beta = 0.4
    plain, whole = (torch.autograd.grad(cdpo(hidden, weight, targets, torch.tensor([0, 1]), hidden.detach(), weight, beta, gamma)
                                        [0].sum(), hidden)[0] for gamma in (0.0, 1.0))
    others = torch.tensor([[0., 1., 1., 1.], [1., 1., 1., 0.]], dtype=torch.float64)
    torch.testing.assert_close(whole - plain, beta / (4 * 3) * (others - 3 * odds / 8) / 2, **EXACT)
    assert (whole - plain).abs().min() > 1e-3   # pi = ref is no minimum of R
    signs = torch.tensor([[-1.], [1.]], dtype=torch.float64)
    torch.testing.assert_close(plain, beta / 2 * signs * (1 - others - odds / 8), **EXACT)


def test_gamma_0_is_dpo():
    rows = random_pairs()
    hidden, weight, targets, owner, ref_hidden, ref_weight = rows
    loss, _, logps = cdpo(*rows, 0.3, 0.0)
    plain = losses.sequence_logps(losses.token_logps(hidden, weight, targets), owner, 4)
    ref_logps = losses.sequence_logps(losses.token_logps(ref_hidden, ref_weight, targets), owner, 4)
    dpo, _, _ = losses.dpo_loss(*plain.chunk(2), *ref_logps.chunk(2), 0.3)
    torch.testing.assert_close(logps, plain, **EXACT)
    torch.testing.assert_close(loss, dpo, **EXACT)
    assert_same_gradients(loss, dpo, (hidden, weight), torch.full((2,), -3.0, dtype=torch.float64))


def test_only_a_multiple_of_the_sum_is_differentiated():
    """Of anything else the gradient is not known, and it is not made up."""
    rows = random_pairs()
    for of in (lambda loss: loss[0], lambda loss: loss @ torch.tensor([1., -3.]).double(), lambda loss: loss.square().sum()):
        loss, _, _ = cdpo(*rows, 0.5, 10.0)
        with pytest.raises(ValueError, match="only a multiple of the losses' sum can be differentiated"):
            of(loss).backward()
    assert rows[0].grad is None and rows[1].grad is None


@pytest.mark.parametrize("loss", ["sft", "cdpo"])
def test_a_second_backward_pass_is_refused_and_spoils_nothing(chunked, loss):
    """The first one scales the gradient that forward has computed; what would come a second time is not it."""
    rows = random_pairs()
    total = losses.sft_loss(*rows[:3], 7) if loss == "sft" else cdpo(*rows, 0.5, 10.0)[0].sum()
    first = torch.autograd.grad(3 * total, rows[:2], retain_graph=True)
    kept = [g.clone() for g in first]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, rows[:2], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, kept))


def test_gradients_of_one_pass_add_up(chunked):
    """Micro-batch after micro-batch, beside what is in .grad already; the hidden states themselves stay as they are."""
    rows = random_pairs()
    hidden, weight = rows[:2]
    before = hidden.detach().clone(), weight.detach().clone()
    expected = torch.autograd.grad(full_cdpo(*rows, 0.5, 0.0)[0].sum() * 2
                                   - full_token_logps(*rows[:3]).sum() / 8, (hidden, weight))
    weight.grad = torch.ones_like(weight)
    for _ in range(2):
        cdpo(*rows, 0.5, 0.0)[0].sum().backward()
    losses.sft_loss(*rows[:3], 8).backward()
    torch.testing.assert_close((hidden.grad, weight.grad - 1), expected, **EXACT)
    assert torch.equal(hidden, before[0]) and torch.equal(weight, before[1])


def test_regularizer_lies_between_0_and_1():
    hidden, weight, targets, owner, ref_hidden, ref_weight = random_pairs()
    for scale in (0.1, 1, 10):   # from nearly equal models to very different ones
        _, regularizer, _ = cdpo(scale * hidden, weight, targets, owner, ref_hidden, ref_weight, 0.5, 1.0)
        assert ((regularizer > 0) & (regularizer < 1)).all()

# ----------------------------------------------------------------------------------------------------------------------
# packed micro-batches: oracle, one dialogue at a time, as a rectangle of one row

BETA, GAMMA, STEP = 0.7, 3.0, 13   # STEP: scored tokens of the accumulated step
LAST = [14], [EOT], [15, EOT]      # a prompt and a response of one token
TRIPLES = [*zip(PROMPTS, CHOSEN, REJECTED), LAST]


def alone(model, prompt, response, scored=None):
    """Of one dialogue: the states before its scored tokens (the response's, unless all but the first are), the sum of these
    tokens' log-probabilities, and the state at its last token."""
    ids, first = [*prompt, *response], len(prompt) if scored is None else scored
    hidden = model.hidden(torch.tensor([ids]))[0]
    states = hidden[first - 1:-1]
    return states, full_token_logps(states, model.wte.weight, torch.tensor(ids[first:])).sum(), hidden[-1]


def one_at_a_time(kind, model, reference):
    """(the numbers that the loss is made of, the loss)"""
    if kind.startswith("sft"):
        logps = torch.stack([alone(model, prompt, y, 1 if kind == "sft all" else None)[1] for prompt, y, _ in TRIPLES])
        return logps, -logps.sum() / STEP
    responses = [(triple[0], triple[1 + k]) for k in (0, 1) for triple in TRIPLES]
    states, logps, last = zip(*(alone(model, *each) for each in responses))
    logps = torch.stack(logps)
    if kind.startswith("reward"):
        w = model.reward_head.weight[0]
        rewards = torch.stack(last) @ w[:8] - model.center
        if kind == "reward likelihood":
            rewards = rewards + w[8] * logps
        chosen, rejected = rewards.chunk(2)
        return rewards, torch.log(1 + torch.exp(rejected - chosen)).mean()
    with torch.no_grad():
        ref_states, ref_logps, _ = zip(*(alone(reference, *each) for each in responses))
    if kind == "dpo":
        chosen, rejected = (logps - torch.stack(ref_logps)).chunk(2)
        return logps, torch.log(1 + torch.exp(-BETA * (chosen - rejected))).mean()
    targets = torch.tensor([t for _, response in responses for t in response])
    owner = torch.tensor([r for r, (_, response) in enumerate(responses) for _ in response])
    loss, regularizer, _ = full_cdpo(torch.cat(states), model.wte.weight, targets, owner, torch.cat(ref_states),
                                     reference.wte.weight.detach(), BETA, GAMMA)
    return torch.cat((logps, regularizer)), loss.mean()


def packed(kind, model, reference):
    """The same as the scripts have it."""
    tokens, rows = pairs(LAST), [0, 1, 2]
    if kind.startswith("sft"):
        batch = data.sft_batch(tokens, rows, kind.removeprefix("sft "))
        hidden = batch.hidden_and_head(model)[0]
        loss = losses.sft_loss(hidden, model.wte.weight, batch.targets, STEP)
        return losses.response_logps(hidden, model.wte.weight, batch), loss
    if kind.startswith("reward"):
        rewards = losses.batch_rewards(model, data.reward_batch(tokens, rows))
        return rewards, losses.reward_loss(*rewards.chunk(2)).mean()
    batch = data.pair_batch(tokens, rows)
    with torch.no_grad():
        ref_hidden = batch.hidden_and_head(reference)[0]
        ref_logps = losses.response_logps(ref_hidden, reference.wte.weight, batch)
    if kind == "dpo":
        logps = losses.batch_logps(model, batch)
        return logps, losses.dpo_loss(*logps.chunk(2), *ref_logps.chunk(2), BETA)[0].mean()
    loss, regularizer, logps = losses.cdpo_loss(*batch.hidden_and_head(model), batch.targets, batch.owner, ref_hidden,
                                                reference.wte.weight, ref_logps, BETA, GAMMA)
    return torch.cat((logps, regularizer)), loss.mean()


@pytest.mark.parametrize("kind", ["sft response", "sft all", "dpo", "cdpo", "reward hidden", "reward likelihood"])
@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("everywhere", [False, True], ids=["read at places", "read everywhere"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_with_a_shared_prompt_equals_one_dialogue_at_a_time(kind, adapters, everywhere, dtype, monkeypatch):
    model, reference = tiny_gpt(0), tiny_gpt(1)
    if kind.startswith("reward"):
        model = reward_model(model, likelihood=kind == "reward likelihood").double().eval()
    if adapters:
        lora.add_lora(model, 2, 3.0, bias="all")
    with torch.no_grad():
        for p in (*model.parameters(), *reference.parameters()):   # nothing is 0 or 1, and the two models differ
            p.add_(0.2 * torch.randn_like(p))
    model, reference = model.to(dtype), reference.to(dtype)
    expected, plain = one_at_a_time(kind, model, reference)
    if everywhere:   # the last block leaves nothing out
        def read(ids, packing, at, _=None, real=model.hidden_and_head):
            hidden, head = real(ids, packing)
            return hidden[at], head
        monkeypatch.setattr(model, "hidden_and_head", read)
    found, loss = packed(kind, model, reference)
    exact = dtype == torch.float64   # fp32: sums in another order; a reward may be a small sum of large terms
    atol = 1e-10 if exact else 1e-6 * expected.detach().abs().max() if kind.startswith("reward") else 0
    torch.testing.assert_close(found, expected, rtol=1e-10 if exact else 1e-6, atol=atol)
    torch.testing.assert_close(loss, plain, rtol=1e-10 if exact else 1e-5, atol=0)
    expected = gradient(plain, model)
    torch.testing.assert_close(gradient(loss, model), expected, rtol=0, atol=(1e-10 if exact else 1e-5) * expected.abs().max())
    assert expected.abs().max() > 0.01 and (expected != 0).float().mean() > 0.7

# ----------------------------------------------------------------------------------------------------------------------
# wins: by hand

def test_reward_loss_is_binary_cross_entropy_of_the_margin():
    """Values and gradients; a difference of 200 is no infinity, and a shift of all rewards changes nothing."""
    chosen, rejected = torch.tensor([[0.0, 3, -1, 200, 0], [0.0, 1, 2, 0, 200]], dtype=torch.float64).unbind()
    chosen.requires_grad_(), rejected.requires_grad_()
    loss = losses.reward_loss(chosen, rejected)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(chosen - rejected, torch.ones(5, dtype=torch.float64),
                                                                    reduction="none")
    torch.testing.assert_close(loss, expected, **EXACT)
    ours, theirs = (torch.autograd.grad(x.sum(), (chosen, rejected), retain_graph=True) for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(losses.reward_loss(chosen + 7, rejected + 7), loss, **EXACT)


def test_reward_loss_by_hand():
    """P(chosen) is 1/2 at equal rewards and 3/4 at a margin of log 3."""
    found = losses.reward_loss(torch.tensor([1.0, math.log(3)]), torch.tensor([1.0, 0.0]))
    assert found.tolist() == pytest.approx([LOG2, math.log(4 / 3)])


def test_wins_by_hand():
    a, b = torch.tensor([1., 2., 3., -5.]), torch.tensor([2., 2., 1., -5.1])
    assert losses.wins(a, b).tolist() == [0, 0.5, 1, 1]
    assert losses.wins(a, b, slack=0.2).tolist() == [0, 0.5, 1, 0.5]
    assert losses.wins(a, b, slack=torch.tensor([1.5, 0., 1.5, 0.])).tolist() == [0.5, 0.5, 1, 1]   # one slack a pair


def test_reward_wins_by_hand():
    """Log-ratios 2 and 1, 1 and 2, 1 and 1; the rewards decide, not the log-probs, which point the other way."""
    chosen, ref_chosen = torch.tensor([-98., -99., -99.]), torch.tensor([-100., -100., -100.])
    rejected, ref_rejected = torch.tensor([-9., -108., -9.]), torch.tensor([-10., -110., -10.])
    assert losses.reward_wins(chosen, rejected, ref_chosen, ref_rejected).tolist() == [1, 0, 0.5]

# ---- properties

@pytest.mark.parametrize("largest", [[0, 1], [2, 3], [0, 2], [1, 3]], ids=["policy", "reference", "chosen", "rejected"])
def test_a_tie_is_relative_to_the_largest_log_prob(largest):
    """Within 1e-6 of it (fp32 rounding of a sum): 1e-4 of 100 nats, whichever of the four that is. In half precision 1e-2."""
    logps = torch.full((4, 4), -2.0, dtype=torch.float64)
    logps[largest] = -100   # h is 0 so far
    logps[0] += torch.tensor([0.9e-4, 1.1e-4, -0.9e-4, -1.1e-4])
    assert losses.reward_wins(*logps).tolist() == [0.5, 1, 0.5, 0]
    logps[0] += 0.9 * torch.tensor([1, 1, -1, -1])
    assert losses.reward_wins(*logps).tolist() == [1, 1, 0, 0]
    with torch.autocast("cpu", torch.bfloat16):
        assert losses.reward_wins(*logps).tolist() == [0.5] * 4
        logps[0] += 0.2 * torch.tensor([1, 1, -1, -1])
        assert losses.reward_wins(*logps).tolist() == [1, 1, 0, 0]


def test_a_tie_depends_on_its_own_pair_alone():
    """h is 1e-3 in both: much among log-probs of -2, and also beside a pair whose log-probs are -1e5."""
    logps = torch.tensor([[-2., -1e5]] * 4, dtype=torch.float64)
    logps[0] += 1e-3
    assert losses.reward_wins(*logps).tolist() == [1, 0.5]

# ----------------------------------------------------------------------------------------------------------------------
# divergences: oracle

def test_divergences_against_numpy(chunked):
    hidden, weight, targets, _, ref_hidden, ref_weight = random_pairs()
    logp, ref_logp = (numpy_logp((h @ w.T).detach().numpy()) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
    p, q = np.exp(logp), np.exp(ref_logp)
    expected = (-(p * np.log(p)).sum(1), (p * np.log(p / q)).sum(1), (q * np.log(q / p)).sum(1),
                numpy_regularizer(logp, ref_logp, targets.tolist(), 0.5))
    found = losses.divergences(hidden, weight, ref_hidden, ref_weight, targets, 0.5)
    np.testing.assert_allclose(torch.stack(found).numpy(), expected, rtol=1e-10)   # and numpy() would refuse a graph

# ---- by hand

def test_divergences_by_hand():
    """pi = (1/2, 1/4, 1/4), ref = (1/4, 1/4, 1/2): entropy 3/2 log 2; KL(pi || ref) = (1/2 - 1/4) log 2, and the same back.
    Against ref = (1/8, 1/8, 3/4): 1/2 log 4 + 1/4 log 2 - 1/4 log 3, and -1/8 log 4 - 1/8 log 2 + 3/4 log 3."""
    hidden = torch.tensor([[2., 1, 1]] * 2, dtype=torch.float64).log()
    ref_hidden = torch.tensor([[1., 1, 2], [1., 1, 6]], dtype=torch.float64).log()
    eye = torch.eye(3, dtype=torch.float64)
    entropy, kl, back, r = losses.divergences(hidden, eye, ref_hidden, eye, torch.tensor([0, 0]), 1.0)
    assert entropy.tolist() == pytest.approx([1.5 * LOG2] * 2, abs=1e-12)
    assert kl.tolist() == pytest.approx([LOG2 / 4, 1.25 * LOG2 - 0.25 * math.log(3)], abs=1e-12)
    assert back.tolist() == pytest.approx([LOG2 / 4, 0.75 * math.log(3) - 0.375 * LOG2], abs=1e-12)
    assert r.tolist() == pytest.approx([5 / 12, (2 / 3 + 1 / 4) / 2], abs=1e-12)   # pi / (pi + ref), tokens 1 and 2

# ---- properties

def test_divergences_are_positive_and_zero_for_equal_models():
    hidden, weight, targets, _, ref_hidden, ref_weight = random_pairs()
    entropy, kl, back, r = losses.divergences(hidden, weight, ref_hidden, ref_weight, targets, 0.1)
    assert ((entropy > 0) & (entropy <= math.log(13)) & (kl > 0) & (back > 0) & (r > 0) & (r < 1)).all()
    _, kl, back, r = losses.divergences(hidden, weight, hidden, weight, targets, 0.1)
    assert kl.tolist() == back.tolist() == [0] * 11 and r.tolist() == [0.5] * 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("there", [True, False])
def test_the_head_product_is_x_times_the_transposed_matrix(monkeypatch, dtype, there):
    """With oneDNN or without it, for a matrix as it lies and for a transposed one, as the way back takes it."""
    if not there:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    x, w = torch.randn(5, 7, dtype=dtype), torch.randn(11, 7, dtype=dtype)
    exact = x.double() @ w.double().T
    close = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    for weight in (w, w.T.contiguous().T):
        found = losses.product(x, weight)
        assert found.dtype == dtype and found.is_contiguous()
        torch.testing.assert_close(found.double(), exact, atol=close, rtol=close)


@pytest.mark.parametrize("kind", ["sft", "dpo", "cdpo"])
def test_float16_keeps_the_smallest_gradients(kind):
    """The gradient at the logits is small beside float16's smallest number, 6e-8: CDPO's at a token that is no target is about
    gamma beta / (8 T V). In float16 it would be zero, and the scale of the loss comes too late to help."""
    torch.manual_seed(0)
    V, C, S = 4000, 16, 12
    hidden, weight, ref_hidden, ref_weight = (torch.randn(n, C) for n in (S, V, S, V))
    targets, owner = torch.arange(S), torch.arange(S) // 3

    def gradient(half):
        h, w = hidden.clone().requires_grad_(), (0.3 * weight).requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=half):
            if kind == "sft":
                loss = losses.sft_loss(h, w, targets, 10_000)
            elif kind == "dpo":
                logps = losses.sequence_logps(losses.token_logps(h, w, targets), owner, 4)
                loss = losses.dpo_loss(*logps.chunk(2), torch.zeros(2), torch.zeros(2), 1e-3)[0].sum() / 1000
            else:
                both = losses.cdpo_loss(h, w, targets, owner, ref_hidden, 0.3 * ref_weight, torch.zeros(4), 0.1, 1.0)[0]
                loss = both.sum() / 1000
        assert loss.dtype == torch.float32
        (loss * 2.0 ** 10).backward()
        return h.grad, w.grad
    for wide, half in zip(gradient(False), gradient(True)):
        others = slice(S, None) if len(wide) == V else slice(None)   # rows of tokens that are no target
        assert half.dtype == torch.float32 and (half[others] - wide[others]).norm() < 2e-2 * wide[others].norm()
