"""
Proves optim.py: every optimizer of the registry step by step, which parameters it holds and which of them decay, the schedules of
the learning rate, and clipping.

    python -m pytest -q tests/test_optim.py

The oracle shares no code with torch.optim: each textbook update in float64 numpy (FORMULAS.md section 7, Baselines).
"""
import math

import numpy as np
import pytest
import torch
from torch import nn

import optim
from files import InputError
from model import GPT, GPTConfig

BETAS = {"sgd": (), "momentum": (0.5,), "nesterov": (0.5,), "adam": (0.8, 0.9), "adamw": (0.8, 0.9)}   # nobody's defaults
ROUNDING = dict(rtol=1e-12, atol=1e-12)   # float64 on both sides, 15 steps, another order of the same products

# ----------------------------------------------------------------------------------------------------------------------
# oracles: textbook updates. x parameter, g gradient, t step counted from 1, state a dict of the parameter's own

def sgd(x, g, lr, betas, decay, t, state):
    return x - lr * (g + decay * x)


def momentum(x, g, lr, betas, decay, t, state):
    """Heavy ball as torch has it: the first velocity is the gradient itself, and lr stands outside the velocity."""
    state["v"] = betas[0] * state.get("v", 0) + (g + decay * x)
    return x - lr * state["v"]


def nesterov(x, g, lr, betas, decay, t, state):
    """torch's form: the gradient is taken at x, and the step looks one velocity ahead."""
    g = g + decay * x
    state["v"] = betas[0] * state.get("v", 0) + g
    return x - lr * (g + betas[0] * state["v"])


def adam(x, g, lr, betas, decay, t, state):
    """Kingma and Ba 2015, algorithm 1. Decay as L2: it is a part of the gradient and goes through both moments."""
    g = g + decay * x
    state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * g
    state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * g ** 2
    m_hat, v_hat = state["m"] / (1 - betas[0] ** t), state["v"] / (1 - betas[1] ** t)
    return x - lr * m_hat / (np.sqrt(v_hat) + 1e-8)


def adamw(x, g, lr, betas, decay, t, state):
    """Loshchilov and Hutter 2019, algorithm 2. Decay stands apart from the moments, and is multiplied by lr as torch does it."""
    return adam(x, g, lr, betas, 0.0, t, state) - lr * decay * x


TEXTBOOK = {"sgd": sgd, "momentum": momentum, "nesterov": nesterov, "adam": adam, "adamw": adamw}

# ----------------------------------------------------------------------------------------------------------------------
# what the tests work on

class Small(nn.Module):
    """A matrix and a vector."""

    def __init__(self, matrix, vector):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor(matrix, dtype=torch.float64))
        self.vector = nn.Parameter(torch.tensor(vector, dtype=torch.float64))


def tiny_gpt():
    return GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=4))


def step(optimizer, model, matrix_gradient, vector_gradient):
    model.matrix.grad, model.vector.grad = (torch.as_tensor(g, dtype=torch.float64) for g in (matrix_gradient, vector_gradient))
    optimizer.step()

# ----------------------------------------------------------------------------------------------------------------------
# optimizers: oracle

@pytest.mark.parametrize("given", [True, False], ids=["given betas", "default betas"])
@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))   # a new name without a textbook fails here
def test_fifteen_steps_of_the_textbook(name, given):
    """With decay, a learning rate that changes, and gradients of very different sizes, some of them zero."""
    betas = BETAS[name] if given else optim.OPTIMIZERS[name][1]
    rng = np.random.default_rng(0)
    x = {"matrix": rng.normal(size=(3, 4)), "vector": rng.normal(size=5)}
    model = Small(x["matrix"].tolist(), x["vector"].tolist())
    optimizer = optim.make(name, model, 1.0, betas if given else None, weight_decay=0.3)
    state = {"matrix": {}, "vector": {}}
    for t in range(1, 16):
        lr = optim.set_lr(optimizer, 0.1 / t)
        g = {key: rng.normal(size=value.shape) * 10.0 ** rng.integers(-3, 2) * (t % 5 > 0) for key, value in x.items()}
        step(optimizer, model, g["matrix"], g["vector"])
        for key, decay in (("matrix", 0.3), ("vector", 0.0)):
            x[key] = TEXTBOOK[name](x[key], g[key], lr, betas, decay, t, state[key])
            np.testing.assert_allclose(getattr(model, key).detach().numpy(), x[key], err_msg=f"{key}, step {t}", **ROUNDING)

# ---- by hand

@pytest.mark.parametrize("name, betas, first, second", [
    # x = 1, decay 0.5, lr 0.1, gradient 2 and then 1
    ("sgd", (), 1 - 0.1 * 2.5, 0.75 - 0.1 * (1 + 0.375)),
    ("momentum", (0.9,), 1 - 0.1 * 2.5, 0.75 - 0.1 * (0.9 * 2.5 + 1.375)),
    ("nesterov", (0.9,), 1 - 0.1 * (2.5 + 0.9 * 2.5), 0.525 - 0.1 * (1.2625 + 0.9 * (0.9 * 2.5 + 1.2625))),
    # the first step of Adam is lr, whatever the gradient; then m = 0.9 * 0.25 + 0.1 * 1.45 = 0.37 with a correction of 0.19,
    # v = 0.999 * 0.00625 + 0.001 * 1.45^2 = 0.00834625 with one of 0.001999. The gradients are 2.5 and 1 + 0.5 * 0.9
    ("adam", (0.9, 0.999), 0.9, 0.9 - 0.1 * (0.37 / 0.19) / math.sqrt(0.00834625 / 0.001999)),
    # decay first: 1 - 0.05; then the same with m = 0.9 * 0.2 + 0.1 * 1 = 0.28 and v = 0.95 * 0.2 + 0.05 * 1 = 0.24
    ("adamw", (0.9, 0.95), 0.95 - 0.1, 0.85 * 0.95 - 0.1 * (0.28 / 0.19) / math.sqrt(0.24 / 0.0975)),
])
def test_two_steps_by_hand(name, betas, first, second):
    model = Small([[1.0]], [1.0])
    optimizer = optim.make(name, model, 0.1, betas, weight_decay=0.5)
    step(optimizer, model, [[2.0]], [0.0])
    assert model.matrix.item() == pytest.approx(first, rel=1e-7)   # Adam's eps of 1e-8 is left out above
    step(optimizer, model, [[1.0]], [0.0])
    assert model.matrix.item() == pytest.approx(second, rel=1e-7)
    assert model.vector.item() == 1   # no gradient, no decay: it stays

# ---- properties

@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_without_a_gradient_decay_is_a_factor(name):
    model = Small([[1.0, -2.0]], [3.0])
    optimizer = optim.make(name, model, 0.1, None, weight_decay=0.5)
    for _ in range(10):
        step(optimizer, model, [[0.0, 0.0]], [0.0])
    np.testing.assert_allclose(model.matrix.detach().numpy(), np.array([[1, -2]]) * (1 - 0.1 * 0.5) ** 10, **ROUNDING)
    assert model.vector.item() == 3


@pytest.mark.parametrize("name, betas", [
    ("sgd", (0.9,)), ("momentum", ()), ("momentum", (0.9, 0.99)), ("nesterov", (1.0,)), ("adam", (0.9,)), ("adam", (0.9, 1.0)),
    ("adamw", (-0.1, 0.9)), ("adamw", (0.9, 0.95, 0.99)), ("adamw", (math.nan, 0.9)),
])
def test_wrong_betas_are_refused(name, betas):
    with pytest.raises(InputError, match="betas"):
        optim.make(name, tiny_gpt(), 0.1, betas, 0.0)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="'adamx'.*sgd.*adamw"):
        optim.make("adamx", tiny_gpt(), 0.1, None, 0.0)


def test_betas_at_the_border_and_from_a_list_are_taken():
    assert optim.make("adamw", tiny_gpt(), 0.1, [0.0, 0.5], 0.0).param_groups[0]["betas"] == (0.0, 0.5)


def test_set_lr_reaches_every_group():
    optimizer = optim.make("adamw", tiny_gpt(), 0.1, None, 0.1)
    assert optim.set_lr(optimizer, 0.025) == 0.025
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.025]

# ----------------------------------------------------------------------------------------------------------------------
# parameter groups: by hand and properties

def test_gpts_groups_by_name():
    """Decay on the linear layers' weights and both embeddings; none on biases and LayerNorm."""
    model = tiny_gpt()
    decays = {id(p): group["weight_decay"] for group in optim.parameter_groups(model, 0.1) for p in group["params"]}
    for name, p in model.named_parameters():
        assert decays.pop(id(p)) == (0.0 if name.endswith("bias") or ".ln_" in name or name.startswith("ln_f") else 0.1), name
    assert not decays


def test_every_trainable_parameter_once_frozen_ones_never():
    model = tiny_gpt()
    for name, p in model.named_parameters():
        p.requires_grad_("attn" in name)
    held = [p for group in optim.parameter_groups(model, 0.1) for p in group["params"]]
    assert len(held) == 2 * 4 and {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    for name, p in model.named_parameters():   # biases alone, as in the smallest fine-tuning there is
        p.requires_grad_(name.endswith("bias"))
    group, = optim.parameter_groups(model, 0.1)   # no empty group
    assert group["weight_decay"] == 0 and len(group["params"]) == 2 * 6 + 1
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert [len(group["params"]) for group in optim.parameter_groups(tied, 0.1)] == [1, 2]


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_frozen_parameters_stay_and_all_others_move(name):
    model = tiny_gpt()
    model.wte.weight.requires_grad_(False)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = optim.make(name, model, 0.1, None, 0.1)
    model.hidden(torch.arange(8)[None]).pow(3).sum().backward()   # not linear: LayerNorm's outputs sum to a constant
    optimizer.step()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == before.keys() - {"wte.weight"}

# ----------------------------------------------------------------------------------------------------------------------
# learning rate: oracle and by hand

def test_cosine_is_half_a_wave_down_to_a_tenth():
    for steps, warmup in ((100, 0), (100, 10)):
        last = steps - 1 - warmup
        for i in range(last + 1):
            expected = 0.1 + 0.9 * (1 + np.cos(np.pi * i / last)) / 2
            assert optim.lr_at(warmup + i, steps, 3.0, "cosine", warmup) == pytest.approx(3 * expected, rel=1e-12)


@pytest.mark.parametrize("schedule, expected", [
    ("constant", [0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8]),
    ("linear", [0.2, 0.4, 0.6, 0.8, 0.62, 0.44, 0.26, 0.08]),              # 0.72 in 4 equal parts
    ("cosine", [0.2, 0.4, 0.6, 0.8, 0.69455844, 0.44, 0.18544156, 0.08]),  # 0.44 + 0.36 cos(i pi / 4); cos(pi / 4) = 0.70710678
])
def test_schedules_by_hand(schedule, expected):
    """8 steps at 0.8: three of warm-up, in quarters, the full rate, and four steps down to 0.08."""
    assert [optim.lr_at(i, 8, 0.8, schedule, 3) for i in range(8)] == pytest.approx(expected, rel=1e-7)


def test_cosine_with_warmup_is_the_default():
    assert optim.lr_at(4, 5, 1.0) == pytest.approx(0.1) and optim.lr_at(0, 5, 1.0) == 1 and optim.lr_at(1, 5, 1.0) > 0.775

# ---- properties

@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_rise_and_then_never_do(schedule):
    for steps in (1, 2, 3, 7, 50):
        for warmup in (0, 1, 5, 60):
            found = [optim.lr_at(i, steps, 2e-3, schedule, warmup) for i in range(steps)]
            assert all(0 < lr <= 2e-3 for lr in found)
            up, down = found[:warmup + 1], found[warmup:]
            assert all(a < b for a, b in zip(up, up[1:])) and all(a >= b for a, b in zip(down, down[1:]))
            if warmup < steps:
                assert max(found) == found[warmup] == 2e-3
            if warmup < steps - 1:   # there is room to fall
                assert found[-1] == pytest.approx(2e-3 if schedule == "constant" else 2e-4, rel=1e-12)


def test_one_step():
    assert [optim.lr_at(0, 1, 0.5, schedule) for schedule in ("constant", "linear", "cosine")] == [0.5] * 3

# ----------------------------------------------------------------------------------------------------------------------
# clipping: by hand

def clipped(largest):
    """Gradients (3, 0) and (4): norm 5."""
    model = Small([[1.0, 1.0]], [1.0])
    model.matrix.grad, model.vector.grad = torch.tensor([[3.0, 0.0]]).double(), torch.tensor([4.0]).double()
    norm = optim.clip(model, largest)
    assert isinstance(norm, float)
    return norm, [*model.matrix.grad.flatten().tolist(), model.vector.grad.item()]


def test_clip_by_hand():
    """The norm is over all parameters together, and the one before clipping is returned."""
    for largest in (1.0, 2.5):
        norm, gradient = clipped(largest)
        assert norm == pytest.approx(5)
        assert gradient == pytest.approx([0.6 * largest, 0, 0.8 * largest], rel=1e-6)   # torch divides by norm + 1e-6


def test_clip_leaves_small_gradients_alone():
    assert clipped(5.5) == clipped(0) == (pytest.approx(5), [3, 0, 4])


def test_clip_0_touches_nothing_even_where_the_norm_is_infinite():
    """An overflow in one matrix must not become NaN in all parameters: the factor would be inf / inf."""
    model = Small([[1.0, 1.0]], [1.0])
    model.matrix.grad, model.vector.grad = torch.tensor([[math.inf, 3.0]]).double(), torch.tensor([4.0]).double()
    assert optim.clip(model, 0) == math.inf
    assert model.matrix.grad.tolist() == [[math.inf, 3]] and model.vector.grad.tolist() == [4]


def test_clip_skips_parameters_without_a_gradient():
    model = Small([[1.0]], [1.0])
    model.vector.grad = torch.tensor([2.0]).double()
    assert optim.clip(model, 1.0) == pytest.approx(2)
    assert model.matrix.grad is None and model.vector.grad.item() == pytest.approx(1, rel=1e-6)

# ---- property

def test_clipped_gradients_keep_their_direction():
    model = tiny_gpt()
    model(torch.arange(8)[None]).logsumexp(-1).sum().backward()
    before = torch.cat([p.grad.flatten() for p in model.parameters()])
    norm = optim.clip(model, 0.01)
    after = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert norm == pytest.approx(before.norm().item(), rel=1e-5) and norm > 0.1   # fp32 sums
    assert after.norm().item() == pytest.approx(0.01, rel=1e-4)
    torch.testing.assert_close(after / after.norm(), before / before.norm(), rtol=1e-5, atol=1e-6)
