"""
Proves optim.py: every optimizer step by step, and what it keeps, saves and survives; which parameters are held and which of them
decay, the schedules of the learning rate, and clipping.

    python -m pytest -q tests/test_optim.py

The oracles share no code with optim.py: each algorithm in float64 numpy as optim.py's docstrings state it, torch's own AdamW,
and the package lion_pytorch.
"""
import copy
import functools
import io
import math

import lion_pytorch
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import optim
from files import InputError
from model import GPT, GPTConfig
from optim import AGMA, AdamWPMA, AdamWSchedule, Lion, LionPMA

ROUNDING = dict(rtol=1e-12, atol=1e-12)   # float64 on both sides, some dozens of steps, another order of the same products

# ----------------------------------------------------------------------------------------------------------------------
# oracles: one step of each algorithm. x parameter, g gradient, t its age counted from 0, K the period, kept its own m and v

def sgd(x, g, lr, betas, decay, eps, t, K, kept):
    return x - lr * (g + decay * x)


def momentum(x, g, lr, betas, decay, eps, t, K, kept):
    """Heavy ball as torch has it: the first velocity is the gradient itself, and lr stands outside the velocity."""
    kept["m"] = betas[0] * kept.get("m", 0) + (g + decay * x)
    return x - lr * kept["m"]


def nesterov(x, g, lr, betas, decay, eps, t, K, kept):
    """torch's form: the gradient is taken at x, and the step looks one velocity ahead."""
    g = g + decay * x
    kept["m"] = betas[0] * kept.get("m", 0) + g
    return x - lr * (g + betas[0] * kept["m"])


def adam(x, g, lr, betas, decay, eps, t, K, kept):
    """Kingma and Ba 2015, algorithm 1. Decay as L2: it is a part of the gradient and goes through both moments."""
    g = g + decay * x
    kept["m"] = betas[0] * kept.get("m", 0) + (1 - betas[0]) * g
    kept["v"] = betas[1] * kept.get("v", 0) + (1 - betas[1]) * g ** 2
    m_hat, v_hat = kept["m"] / (1 - betas[0] ** (t + 1)), kept["v"] / (1 - betas[1] ** (t + 1))
    return x - lr * m_hat / (np.sqrt(v_hat) + eps)


def adamw(x, g, lr, betas, decay, eps, t, K, kept):
    """Loshchilov and Hutter 2019, algorithm 2. Decay stands apart from the moments, and is multiplied by lr as torch does it."""
    return adam(x, g, lr, betas, 0.0, eps, t, K, kept) - lr * decay * x


def noaccum(x, g, lr, betas, decay, eps, t, K, kept):
    return adamw(x, g, lr, (betas[0], betas[1] ** (1 / K)), decay, eps, t, K, kept)


def schedule(x, g, lr, betas, decay, eps, t, K, kept):
    return adamw(x, g, lr / (t % K + 1), betas, decay, eps, t, K, kept)


def averaged(m, g, b, t, K):
    """A moment after a large step's gradient and after a small one's; v has g^2 for g."""
    tau = t % K
    if tau == 0 and t > 0:
        return b * m + (1 - b) * g / K
    return tau / (tau + 1) * m + (1 - b) / (tau + 1) * g


def adamw_pma(x, g, lr, betas, decay, eps, t, K, kept, rescale=True):
    (b1, b2), large, n = betas, t > 0 and t % K == 0, t // K + 1
    lr_t = lr if large else lr / math.sqrt(K)
    m, v = averaged(kept.get("m", 0), g, b1, t, K), averaged(kept.get("v", 0), g ** 2, b2, t, K)
    m_hat, v_hat = m / (1 - b1 ** n), v / (1 - b2 ** n)
    kept["m"], kept["v"] = (K * m, K * v) if large and rescale else (m, v)
    return (1 - lr_t * decay) * x - lr_t * m_hat / (np.sqrt(v_hat) + eps)


def agma(x, g, lr, betas, decay, eps, t, K, kept, small_lr="sqrt", small_step="adam"):
    (b1, b2), large, tau = betas, t > 0 and t % K == 0, t % K
    small = {"sqrt": lr / math.sqrt(K), "linear": lr / K, "decay": lr / math.sqrt(K) * (1 - tau / K)}[small_lr]
    lr_t = lr if large else small
    m, v = averaged(kept.get("m", 0), g, b1, t, K), averaged(kept.get("v", 0), g ** 2, b2, t, K)
    kept["m"], kept["v"] = (b1 * K * m, b2 * K * v) if large else (m, v)
    return (1 - lr_t * decay) * x - lr_t * (m if small_step == "sgd" and not large else m / (np.sqrt(v) + eps))


def lion(x, g, lr, betas, decay, eps, t, K, kept):
    (b1, b2), m = betas, kept.get("m", 0)
    u = np.sign(b1 * m + (1 - b1) * g)
    kept["m"] = b2 * m + (1 - b2) * g
    return (1 - lr * decay) * x - lr * u


def lion_pma(x, g, lr, betas, decay, eps, t, K, kept):
    (b1, b2), large, m = betas, t > 0 and t % K == 0, kept.get("m", 0)
    lr_t = lr if large else lr / K
    u = np.sign(averaged(m, g, b1, t, K))
    kept["m"] = (K if large else 1) * averaged(m, g, b2, t, K)
    return (1 - lr_t * decay) * x - lr_t * u


NAMES = {   # the registry: a textbook, the default betas, and whether one update takes all K gradients together
    "sgd": (sgd, (), True), "momentum": (momentum, (0.9,), True), "nesterov": (nesterov, (0.9,), True),
    "adam": (adam, (0.9, 0.999), True), "adamw": (adamw, (0.9, 0.99), True), "adamw-noaccum": (noaccum, (0.9, 0.99), False),
    "adamw-pma-schedule": (schedule, (0.9, 0.99), False), "adamw-pma": (adamw_pma, (0.9, 0.99), False),
    "adamw-pma-norescale": (functools.partial(adamw_pma, rescale=False), (0.9, 0.99), False),
    "agma": (agma, (0.9, 0.99), False), "agma-linear": (functools.partial(agma, small_lr="linear"), (0.9, 0.99), False),
    "agma-sgd": (functools.partial(agma, small_lr="linear", small_step="sgd"), (0.9, 0.99), False),
    "agma-decay": (functools.partial(agma, small_lr="decay"), (0.9, 0.99), False),
    "agma-perturb": (functools.partial(agma, small_lr="decay"), (0.9, 0.99), False),
    "lion": (lion, (0.95, 0.98), True), "lion-pma": (lion_pma, (0.95, 0.98), False),
}
AGMAS = [{"small_lr": rate, "small_step": kind} for rate in ("sqrt", "linear", "decay") for kind in ("adam", "sgd")]
CLASSES = [(AdamWPMA, {}, adamw_pma), (AdamWPMA, {"rescale": False}, functools.partial(adamw_pma, rescale=False)),
           *[(AGMA, options, functools.partial(agma, **options)) for options in AGMAS],
           (AdamWSchedule, {}, schedule), (LionPMA, {}, lion_pma), (Lion, {}, lion)]
classes = pytest.mark.parametrize("kind, options, rule", CLASSES, ids=[" ".join([c.__name__, *map(str, o.values())])
                                                                       for c, o, _ in CLASSES])
kinds = pytest.mark.parametrize("kind", [AdamWPMA, AGMA, AdamWSchedule, Lion, LionPMA])

# ----------------------------------------------------------------------------------------------------------------------
# what the tests work on

class Small(nn.Module):
    """A matrix and a vector."""

    def __init__(self, matrix, vector):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor(matrix, dtype=torch.float64))
        self.vector = nn.Parameter(torch.tensor(vector, dtype=torch.float64))


def small():
    rng = np.random.default_rng(0)
    return Small(rng.normal(size=(3, 4)).tolist(), rng.normal(size=5).tolist())


def tiny_gpt():
    return GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=4))


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def step(optimizer, model, matrix_gradient, vector_gradient):
    model.matrix.grad, model.vector.grad = (torch.as_tensor(g, dtype=torch.float64) for g in (matrix_gradient, vector_gradient))
    optimizer.step()


def with_period(kind, K):
    return functools.partial(kind, **{} if kind is Lion else {"period": K})


@pytest.mark.parametrize("question, arguments, expected", [
    ("moment", (0.9,), [(0, 0.1, 1), (0.5, 0.05, 1), (0.9, 0.05, 2), (0.5, 0.05, 1)]),
    ("correction", (0.9,), [0.1, 0.1, 0.19, 0.19]),
    ("denominator", (0.02,), 2 * [(2 ** 0.5, 1e-8)] + 2 * [((0.02 / 0.0199) ** 0.5, 1e-8)]),
    ("step_size", (), [0.1 / 2 ** 0.5, 0.1 / 2 ** 0.5, 0.1, 0.1 / 2 ** 0.5])])
def test_the_four_answers_by_hand(question, arguments, expected):
    """AdamW-PMA at K = 2: steps 0 and 1 are small, 2 is large, 3 is small."""
    optimizer = AdamWPMA([torch.nn.Parameter(torch.zeros(1))], lr=0.1, betas=(0.9, 0.99), period=2)
    for t, answer in enumerate(expected):
        assert getattr(optimizer, question)(optimizer.param_groups[0], t, *arguments) == pytest.approx(answer), f"t = {t}"


def follow(rule, optimizer, model, K, settings, steps, eps=1e-8, absent=(), largest=0.0, perturb=0.0):
    """Give optimizer and rule the same gradients; compare every parameter after every step. The gradients are of very different
    sizes, some zero, all zero in each fifth step; lr falls from period to period. settings: (lr, betas, decay) per parameter;
    absent: (parameter, step) without a gradient; largest: clip to that norm; perturb: noise expected after large steps."""
    rng, ps, rates = np.random.default_rng(1), dict(model.named_parameters()), [group["lr"] for group in optimizer.param_groups]
    x, kept, age = {key: p.detach().numpy().copy() for key, p in ps.items()}, {key: {} for key in ps}, dict.fromkeys(ps, 0)
    for t in range(steps):
        fall = 1 / (1 + t // K)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * fall
        for key, p in ps.items():
            g = rng.normal(size=p.shape) * 10.0 ** rng.integers(-3, 2, p.shape) * (rng.random(p.shape) < 0.8) * (t % 5 != 3)
            p.grad = None if (key, t) in absent else torch.tensor(g)
        optim.clip(model, largest)
        given = {key: p.grad.numpy().copy() for key, p in ps.items() if p.grad is not None}
        optimizer.step()
        for key, p in ps.items():
            found, (lr, betas, decay), where = p.detach().numpy(), settings[key], f"{key}, step {t}"
            if key in given:
                np.testing.assert_array_equal(p.grad.numpy(), given[key], f"gradient written to: {where}")
                x[key] = rule(x[key], given[key], lr * fall, betas, decay, eps, age[key], K, kept[key])
                age[key] += 1
            if perturb and t > 0 and t % K == 0:   # which noise: tested below
                assert 0 < abs(found - x[key]).max() < 6 * perturb * lr * fall
                x[key] = found.copy()
            np.testing.assert_allclose(found, x[key], err_msg=where, **ROUNDING)

# ----------------------------------------------------------------------------------------------------------------------
# optimizers: oracle

@pytest.mark.parametrize("given", [True, False], ids=["given betas", "default betas"])
@pytest.mark.parametrize("K", [1, 2, 4, 7])
@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))   # a new name without a textbook fails here
def test_every_name_follows_its_textbook(name, K, given):
    rule, betas, _ = NAMES[name]
    if given:
        betas = (0.8, 0.9)[:len(betas)]   # nobody's defaults
    model = small()
    optimizer = optim.make(name, model, 0.1, betas if given else None, 0.3, K)
    follow(rule, optimizer, model, K, {"matrix": (0.1, betas, 0.3), "vector": (0.1, betas, 0.0)}, max(15, 5 * K),
           perturb=0.1 if name == "agma-perturb" else 0.0)


@pytest.mark.parametrize("K", [1, 2, 4, 7])
@classes
def test_every_class_follows_its_textbook(kind, options, rule, K):
    """With an eps that matters, and groups of their own lr, betas and decay."""
    model, eps = small(), {} if kind in (Lion, LionPMA) else {"eps": 1e-3}
    settings = {"matrix": (0.1, (0.8, 0.9), 0.3), "vector": (0.2, (0.0, 0.6), 0.1)}
    groups = [{"params": [getattr(model, key)], "lr": lr, "betas": betas, "weight_decay": decay}
              for key, (lr, betas, decay) in settings.items()]
    optimizer = with_period(kind, K)(groups, 1.0, **eps, **options)
    follow(rule, optimizer, model, K, settings, max(15, 5 * K), eps=1e-3)


@pytest.mark.parametrize("largest", [0.0, 0.1], ids=["as they are", "clipped"])
@classes
def test_clipped_gradients_and_absent_ones(kind, options, rule, largest):
    """A parameter without a gradient in some steps keeps its own age, and so its own tau."""
    model, settings = small(), dict.fromkeys(("matrix", "vector"), (0.1, (0.8, 0.9), 0.3))
    optimizer = with_period(kind, 3)(model.parameters(), 0.1, (0.8, 0.9), weight_decay=0.3, **options)
    absent = {("vector", 0), ("vector", 1), ("matrix", 4), ("vector", 8), ("matrix", 9), ("vector", 9)}
    follow(rule, optimizer, model, 3, settings, 20, absent=absent, largest=largest)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])   # some units in the last place
@pytest.mark.parametrize("ours, theirs", [
    (AdamWPMA, functools.partial(torch.optim.AdamW, foreach=False)),
    (LionPMA, Lion),
    (Lion, lion_pytorch.Lion),   # its decay is lr lam too, by default
], ids=["AdamW-PMA", "Lion-PMA", "Lion"])
def test_period_1_is_the_known_optimizer(ours, theirs, dtype, tolerance):
    """200 steps of a network, each on its own gradients, with decay and a learning rate that changes."""
    torch.manual_seed(1)
    batches, models = torch.randn(200, 16, 9, dtype=dtype), [network(dtype), network(dtype)]
    optimizers = [kind(m.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.1) for kind, m in zip((ours, theirs), models)]
    for t, batch in enumerate(batches):
        for model, optimizer in zip(models, optimizers):
            optim.set_lr(optimizer, optim.lr_at(t, 200, 1e-3, "cosine", 10))
            optimizer.zero_grad()
            (model(batch[:, :6]) - batch[:, 6:]).pow(2).mean().backward()
            optimizer.step()
    for p, q, start in zip(*(model.parameters() for model in models), network(dtype).parameters()):
        assert (p - q).abs().max() <= tolerance and (p - start).abs().max() > 0.01


@pytest.mark.parametrize("K", [2, 4, 7, 16])
def test_at_a_periods_end_m_is_that_of_accumulation_and_v_the_mean_of_squares(K):
    rng, v = np.random.default_rng(2), 0
    p, q = (nn.Parameter(torch.ones(6, dtype=torch.float64)) for _ in range(2))
    ours, theirs = AdamWPMA([p], 0.1, (0.8, 0.9), period=K), torch.optim.AdamW([q], 0.1, (0.8, 0.9))
    for _ in range(5):
        gradients = torch.tensor(rng.normal(size=(K, 6)))
        for p.grad in gradients:
            ours.step()
        q.grad = gradients.mean(0)
        theirs.step()
        v, state = 0.9 * v + 0.1 * (gradients.numpy() ** 2).mean(0), ours.state[p]
        np.testing.assert_allclose(state["weights"][0] * state["m"], theirs.state[q]["exp_avg"], **ROUNDING)
        np.testing.assert_allclose(state["weights"][1] * state["v"], v, **ROUNDING)


@classes
def test_bf16_autocast(kind, options, rule):
    """Gradients, state and parameters stay fp32, and 12 steps of fp32 keep 5 digits."""
    model = network()
    optimizer = with_period(kind, 3)(model.parameters(), 0.01, (0.8, 0.9), weight_decay=0.1, **options)
    x, kept = [p.detach().numpy().astype(float) for p in model.parameters()], [{} for _ in range(4)]
    for t in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(torch.randn(16, 6))
        assert out.dtype == torch.bfloat16
        optimizer.zero_grad()
        out.float().pow(2).mean().backward()
        optimizer.step()
        for i, p in enumerate(model.parameters()):
            x[i] = rule(x[i], p.grad.numpy().astype(float), 0.01, (0.8, 0.9), 0.1, 1e-8, t, 3, kept[i])
            np.testing.assert_allclose(p.detach().numpy(), x[i], rtol=1e-5, atol=1e-6)


def test_noise_of_agma_is_standard_normal_and_its_own():
    """What perturb adds, over perturb lr, is N(0, 1) after large steps and nothing after small ones; it depends on seed, period,
    group and parameter. 5 sigma of a mean, a standard deviation and a correlation of 20,000 numbers."""
    def noise(seed, perturb=0.25, n=20_000):
        generator = np.random.default_rng(3)
        ps = [nn.Parameter(torch.ones(n, dtype=torch.float64)) for _ in range(3)]
        optimizer = AGMA([{"params": ps[:2]}, {"params": ps[2:]}], 0.1, period=3, perturb=perturb, seed=seed)
        rows = []
        for t in range(8):   # large: 3 and 6
            lr, before = optim.set_lr(optimizer, 0.1 / (1 + t // 3)), [p.detach().clone() for p in ps]
            for p in ps:
                p.grad = torch.tensor(generator.normal(size=n))
            optimizer.step()
            rows.append([(p.detach() - b).numpy() / lr for p, b in zip(ps, before)])
        return np.array(rows)

    plain, rng_state = noise(0, perturb=0.0), torch.get_rng_state()
    zero, seven = (noise(seed) - plain for seed in (0, 7))
    assert torch.equal(rng_state, torch.get_rng_state())   # the global generator is not touched
    assert abs(zero[[0, 1, 2, 4, 5, 7]]).max() < 1e-12   # rounding
    rows = np.concatenate([zero[[3, 6]].reshape(6, -1), seven[[3, 6]].reshape(6, -1)]) / 0.25
    assert abs(rows.mean(1)).max() < 5 / math.sqrt(20_000) and abs(rows.std(1) - 1).max() < 5 / math.sqrt(40_000)
    assert abs((abs(rows) < 1).mean() - math.erf(math.sqrt(0.5))) < 0.005   # 0.683, and 240,000 numbers know it to 0.001
    assert abs(np.corrcoef(rows) - np.eye(12)).max() < 5 / math.sqrt(20_000)
    np.testing.assert_array_equal(noise(0) - plain, zero)
    torch.manual_seed(7)
    np.testing.assert_array_equal(noise(None) - plain, seven)   # by default the global seed
    assert np.isfinite(noise(2 ** 64 - 1)).all()   # the largest that torch.manual_seed takes

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
    ("lion", (0.9, 0.95), 0.95 - 0.1, 0.85 * 0.95 - 0.1),
])
def test_two_steps_by_hand(name, betas, first, second):
    model = Small([[1.0]], [1.0])
    optimizer = optim.make(name, model, 0.1, betas, weight_decay=0.5)
    step(optimizer, model, [[2.0]], [0.0])
    assert model.matrix.item() == pytest.approx(first, rel=1e-7)   # Adam's eps of 1e-8 is left out above
    step(optimizer, model, [[1.0]], [0.0])
    assert model.matrix.item() == pytest.approx(second, rel=1e-7)
    assert model.vector.item() == 1   # no gradient, no decay: it stays


@pytest.mark.parametrize("kind, gradients, moves", [
    # betas 0.5 and 0.75, lr 0.1: (lr_t, update) of two periods of 2. m and v of AdamW-PMA, small steps first:
    #   0.5 * 2 = 1                   0.25 * 4 = 1                       over 1 - 0.5 and 1 - 0.75
    #   1/2 + 0.25 * 4 = 1.5          1/2 + 0.125 * 16 = 2.5             the same
    #   0.75 + 0.5 * 2/2 = 1.25       0.75 * 2.5 + 0.25 * 4/2 = 2.375    large; over 1 - 0.25 and 1 - 0.5625. Then twice them
    #   2.5/2 - 0.25 * 1 = 1          4.75/2 + 0.125 * 1 = 2.5           the same
    (AdamWPMA, [2, 4, 2, -1], [(0.1 / math.sqrt(2), 2 / math.sqrt(4)), (0.1 / math.sqrt(2), 3 / math.sqrt(10)),
                               (0.1, 1.25 / 0.75 / math.sqrt(2.375 / 0.4375)),
                               (0.1 / math.sqrt(2), 1 / 0.75 / math.sqrt(2.5 / 0.4375))]),
    # AGMA has these m and v up to the large step, uncorrected; then 0.5 * 2 * 1.25 = 1.25 and 0.75 * 2 * 2.375 = 3.5625, and
    #   1.25/2 - 0.25 * 1 = 0.375     3.5625/2 + 0.125 * 1 = 1.90625
    (AGMA, [2, 4, 2, -1], [(0.1 / math.sqrt(2), 1), (0.1 / math.sqrt(2), 1.5 / math.sqrt(2.5)), (0.1, 1.25 / math.sqrt(2.375)),
                           (0.1 / math.sqrt(2), 0.375 / math.sqrt(1.90625))]),
    # Lion-PMA: what u is the sign of, and the m after it
    #   0.5 * 2 = 1                                       0.25 * 2 = 0.5
    #   0.5/2 - 0.25 * 3 = -0.5                           0.5/2 - 0.125 * 3 = -0.125
    #   -0.5 * 0.125 + 0.5 * 1/2 = 0.1875                 -0.75 * 0.125 + 0.25 * 1/2 = 0.03125, then 0.0625
    #   0.0625/2 - 0.25 * 0.1 = 0.00625; without the rescaling it would be -0.009375
    (LionPMA, [2, -3, 1, -0.1], [(0.05, 1), (0.05, -1), (0.1, 1), (0.05, 1)]),
])
def test_two_periods_by_hand(kind, gradients, moves):
    model, x = Small([[1.0]], [1.0]), 1.0
    optimizer = kind(model.parameters(), 0.1, (0.5, 0.75), weight_decay=0.5, period=2)
    for g, (lr_t, u) in zip(gradients, moves):
        step(optimizer, model, [[g]], [0.0])
        x = (1 - 0.5 * lr_t) * x - lr_t * u
        assert model.matrix.item() == pytest.approx(x, rel=1e-7)   # eps = 1e-8 is left out above


def test_the_registry_by_hand():
    assert list(optim.OPTIMIZERS) == list(NAMES)
    for name, (_, betas, together) in NAMES.items():
        assert optim.OPTIMIZERS[name].betas == betas
        assert [optim.per_update(name, K) for K in (1, 4)] == ([1, 4] if together else [1, 1])
    for kind, _, _ in CLASSES:
        group, = kind([nn.Parameter(torch.ones(1))], 0.1).param_groups
        assert group["betas"] == ((0.95, 0.98) if kind in (Lion, LionPMA) else (0.9, 0.99)) and group["weight_decay"] == 0

# ---- properties: how far a period goes

@pytest.mark.parametrize("K", [2, 4, 8])
def test_a_period_of_lion_pma_moves_2_minus_1_over_K_of_lions_steps(K):
    """Under a constant gradient: K of lr / K, and from the second period on one of lr and K - 1 of lr / K."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer, found = LionPMA([p], 0.1, period=K), [0.0]
    for _ in range(3 * K):
        p.grad = torch.ones_like(p)
        optimizer.step()
        found.append(p.item())
    assert -np.diff(found[::K]) == pytest.approx(0.1 * np.array([1, 2 - 1 / K, 2 - 1 / K]), rel=1e-12)


@pytest.mark.parametrize("noise", [False, True], ids=["constant", "noise"])
@pytest.mark.parametrize("K", [4, 8])
def test_a_period_of_adamw_pma_moves_S_times_a_step(K, noise):
    """S(K) = sum of j^-1/2 under a constant gradient, S(K) / sqrt(K) under noise. Both as b1 and b2 go to 1; at 0.98, and for
    1,000 numbers of noise, to within 1.5 % (six seeds)."""
    generator = torch.Generator().manual_seed(0)
    p, q = (nn.Parameter(torch.zeros(1000, dtype=torch.float64)) for _ in range(2))
    ours, theirs = AdamWPMA([p], 0.1, (0.98, 0.98), period=K), torch.optim.Adam([q], 0.1, (0.98, 0.98))
    for _ in range(150):
        before = p.detach().clone(), q.detach().clone()
        gradients = torch.randn(K, 1000, generator=generator, dtype=torch.float64) if noise else torch.ones(K, 1000).double()
        for p.grad in gradients:
            ours.step()
        q.grad = gradients.mean(0)
        theirs.step()
    S, ratio = sum(j ** -0.5 for j in range(1, K + 1)), (p - before[0]).norm() / (q - before[1]).norm()
    assert ratio.item() == pytest.approx(S / math.sqrt(K) if noise else S, rel=0.03)

@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_footprint_is_the_state_that_there_is(name):
    """Of a model in which one matrix is frozen, after a step; torch's own scalar counters are not counted."""
    model = network(torch.float64)
    model[0].weight.requires_grad_(False)
    optimizer = optim.make(name, model, 1e-3, None, 0.1, 2)
    model(torch.ones(2, 6, dtype=torch.float64)).pow(2).sum().backward()
    optimizer.step()
    held = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
    size = optim.footprint(name, model)
    assert size["optimizer_bytes"] == sum(t.numel() * t.element_size() for t in held)
    assert size["trainable"] == size["parameters"] - model[0].weight.numel() == sum(p.numel() for p in model.parameters()) - \
        model[0].weight.numel()


def test_describe_by_hand():
    assert optim.describe({"parameters": 2_000, "trainable": 25, "optimizer_bytes": 1_234_567_890}) == \
        "trains 25 of 2,000 parameters (1.250%), optimizer state 1,234.57 MB"

# ---- properties: state

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@kinds
def test_two_tensors_of_state_for_adams_family_one_for_lions(kind, dtype):
    """Of the parameter's shape and dtype, at every tau, and nothing at all for a frozen parameter, which stays."""
    model = network(dtype)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = with_period(kind, 3)(model.parameters(), 0.1, weight_decay=0.1)
    for t in range(1, 9):
        optimizer.zero_grad()
        model(torch.ones(2, 6, dtype=dtype)).pow(2).sum().backward()
        optimizer.step()
        assert optimizer.state.keys() == {model[0].bias, model[2].weight, model[2].bias}
        for p, state in optimizer.state.items():
            tensors = [value for value in state.values() if torch.is_tensor(value)]
            assert len(tensors) == (1 if kind in (Lion, LionPMA) else 2)
            assert all(x.shape == p.shape and x.dtype == p.dtype == dtype for x in tensors)
            assert state["t"] == t and all(type(s) is float for s in state["weights"])
    assert torch.equal(model[0].weight, before) and model[0].weight.grad is None


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_resumes_at_any_tau_bit_for_bit(name):
    gradients = torch.randn(12, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def walk(optimizer, model, steps):
        for t in steps:
            optim.set_lr(optimizer, 0.1 / (1 + t // 4))
            step(optimizer, model, gradients[t, :12].view(3, 4), gradients[t, 12:])

    torch.manual_seed(5)
    whole = small()
    walk(optim.make(name, whole, 0.1, None, 0.3, 4), whole, range(12))
    for done in range(12):
        torch.manual_seed(5)
        first = small()
        optimizer = optim.make(name, first, 0.1, None, 0.3, 4)
        walk(optimizer, first, range(done))
        file = io.BytesIO()
        torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        torch.manual_seed(6)   # another process: AGMA's seed comes from the file
        second = small()
        second.load_state_dict(saved["model"])
        optimizer = optim.make(name, second, 0.7, None, 0.9, 4)
        optimizer.load_state_dict(saved["optimizer"])
        walk(optimizer, second, range(done, 12))
        assert torch.equal(second.matrix, whole.matrix) and torch.equal(second.vector, whole.vector), done


@kinds
def test_a_scaler_skips_a_step_whose_gradient_is_infinite(kind):
    """And the run is that which never had this step, bit for bit: the scales are powers of two."""
    gradients = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))

    def walk(steps, infinite=None):
        p = nn.Parameter(torch.ones(4))
        optimizer, scaler = with_period(kind, 3)([p], 0.1, weight_decay=0.3), torch.amp.GradScaler("cpu", init_scale=2.0 ** 10)
        for t in steps:
            before, age = p.detach().clone(), optimizer.state[p].get("t", 0)
            optimizer.zero_grad()
            scaler.scale((gradients[t] * p).sum()).backward()
            if t == infinite:
                p.grad[1] = math.inf
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(p, before) == (t == infinite) and optimizer.state[p].get("t", 0) == age + (t != infinite)
        return p, scaler.get_scale()

    for infinite in (0, 3, 4, 5):
        (p, scale), (q, _) = walk(range(9), infinite), walk([t for t in range(9) if t != infinite])
        assert torch.equal(p, q) and scale == 2.0 ** 9


@kinds
def test_a_closure_is_called_with_gradients_and_its_loss_returned(kind):
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = kind([p], 0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.pow(2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5 and (p < torch.tensor([1.0, 2.0])).all() and optimizer.step() is None

# ---- properties: shapes and layouts

@kinds
def test_a_parameter_moves_the_same_whatever_its_layout_and_company(kind):
    """Scalars, empty tensors, another dtype and a transposed matrix in one group, against each alone and contiguous."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(), (0,), (3,), (0, 4), (4, 0), (1, 1)]]
    values += [torch.randn(2, 5, generator=generator), torch.randn(5, 2, generator=generator, dtype=torch.float64).t()]
    together = [nn.Parameter(x.clone()) for x in values]
    alone = [nn.Parameter(x.clone(memory_format=torch.contiguous_format)) for x in values]
    assert not together[-1].is_contiguous() and alone[-1].is_contiguous()
    optimizers = [with_period(kind, 3)(ps, 0.1, weight_decay=0.3) for ps in (together, *[[p] for p in alone])]
    for _ in range(8):
        for p, q in zip(together, alone):
            p.grad = q.grad = None
            target = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            ((p - target).pow(2).sum() + (q - target).pow(2).sum()).backward()   # gradients as backward lays them out
        for optimizer in optimizers:
            optimizer.step()
    for p, q, x in zip(together, alone, values):
        assert torch.equal(p, q) and (x.numel() == 0 or not torch.equal(p, x))
        assert optimizers[0].state[p]["m"].stride() == p.stride()


def test_blocks_hold_every_element_once_in_order():
    """Pieces that are views, the lists in step; packed full, and no fuller than 2^18 but for a single row."""
    half, wide = 2 ** 17, (2, 300_000)
    shapes = [(), (0,), (3,), (700, 600), (5, 0), (2 * half,), (half,), (half,), (2 * half + 1,), wide, (3, half + 1), (9,)]
    ps = [torch.arange(math.prod(shape)).view(shape) + i * 10_000_000 for i, shape in enumerate(shapes)]
    ps[3] = ps[3].t()   # not contiguous
    negative, pieces, sizes = [-p for p in ps], [], []
    for a, b in optim.blocks(ps, negative):
        assert len(a) == len(b) and all(torch.equal(x, -y) for x, y in zip(a, b))
        assert sum(x.numel() for x in a) <= 2 ** 18 or len(a) == 1 and len(a[0]) == 1
        sizes.append(sum(x.numel() for x in a))
        pieces += a
    assert torch.equal(torch.cat([x.flatten() for x in pieces]), torch.cat([p.flatten() for p in ps]))
    assert all(a + b > 2 ** 18 for a, b in zip(sizes, sizes[1:]))   # no two neighbours would have fitted into one
    assert len(pieces) == 8 + 2 + 2 + 2 + 3   # of the matrix of 420,000, the 2^18 + 1, the two wide rows and the three
    for x in pieces:
        x.zero_()
    assert not any(p.any() for p in ps)
    assert [list(x) for x in optim.blocks([ps[2]], [ps[2]])] == [[[ps[2]], [ps[2]]]]   # a small tensor is not cut


@pytest.mark.parametrize("kind", [AdamWPMA, AGMA, AdamWSchedule, Lion, LionPMA])
def test_a_hundred_parameters_take_five_calls(kind):
    """Calls into torch that compute something: on a GPU each is a kernel or a few, and a hundred kernels a call would be felt."""
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Count.calls += str(function).startswith("aten.") and str(function) != "aten.full.default"   # full: one number
            return function(*args, **kwargs or {})

    optimizer = with_period(kind, 4)([nn.Parameter(torch.randn(7)) for _ in range(100)], 0.1, weight_decay=0.1)
    for _ in range(6):   # small steps and a large one; the first makes the state
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn(7)
        Count.calls = 0
        with Count():
            optimizer.step()
    assert 0 < Count.calls <= 5


def test_lion_over_several_blocks():
    rng, shapes = np.random.default_rng(4), [(3,), (70, 9000), (4, 5)]
    x, kept = [rng.normal(size=shape) for shape in shapes], [{} for _ in shapes]
    ps = [nn.Parameter(torch.tensor(a)) for a in x]
    optimizer = LionPMA(ps, 0.1, weight_decay=0.3, period=2)
    for t in range(5):
        g = [rng.normal(size=shape) for shape in shapes]
        for p, a in zip(ps, g):
            p.grad = torch.tensor(a)
        optimizer.step()
        x = [lion_pma(a, b, 0.1, (0.95, 0.98), 0.3, 0, t, 2, own) for a, b, own in zip(x, g, kept)]
    for p, a in zip(ps, x):
        np.testing.assert_allclose(p.detach().numpy(), a, **ROUNDING)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion"])
def test_without_a_gradient_decay_is_a_factor(name):
    model = Small([[1.0, -2.0]], [3.0])
    optimizer = optim.make(name, model, 0.1, None, weight_decay=0.5)
    for _ in range(10):
        step(optimizer, model, [[0.0, 0.0]], [0.0])
    np.testing.assert_allclose(model.matrix.detach().numpy(), np.array([[1, -2]]) * (1 - 0.1 * 0.5) ** 10, **ROUNDING)
    assert model.vector.item() == 3

# ---- properties: what is refused

@pytest.mark.parametrize("kind, wrong, message", [
    (AdamWPMA, {"period": 0}, "period: .*found 0"), (LionPMA, {"period": -1}, "period"), (AGMA, {"period": 2.5}, "period"),
    (AdamWPMA, {"betas": (0.9, 1.0)}, "betas"), (Lion, {"betas": (-0.1, 0.9)}, "betas"), (LionPMA, {"betas": (0.9,)}, "betas"),
    (AGMA, {"betas": (0.9, 0.9, 0.9)}, "betas"), (AdamWSchedule, {"betas": (math.nan, 0.9)}, "betas"),
    (Lion, {"lr": -0.1}, "^lr"), (AdamWPMA, {"lr": math.inf}, "^lr"), (AGMA, {"lr": math.nan}, "^lr"),
    (LionPMA, {"weight_decay": -0.1}, "^weight_decay"), (AdamWPMA, {"weight_decay": math.inf}, "^weight_decay"),
    (AdamWPMA, {"eps": -1e-8}, "^eps"), (AGMA, {"small_lr": "cubic"}, "sqrt, linear, decay, found 'cubic'"),
    (AGMA, {"small_step": "lion"}, "adam, sgd, found 'lion'"),
    (AGMA, {"perturb": -0.1}, "^perturb"), (AGMA, {"perturb": math.inf}, "^perturb"),
])
def test_wrong_numbers_are_refused(kind, wrong, message):
    with pytest.raises(InputError, match=message):
        kind([nn.Parameter(torch.ones(2))], **{"lr": 0.1} | wrong)


@kinds
def test_an_option_it_does_not_have_is_refused(kind):
    with pytest.raises(TypeError, match="perod"):
        kind([nn.Parameter(torch.ones(2))], 0.1, perod=4)


@pytest.mark.parametrize("name, betas", [
    ("sgd", (0.9,)), ("momentum", ()), ("momentum", (0.9, 0.99)), ("nesterov", (1.0,)), ("nesterov", (0.0,)), ("adam", (0.9,)),
    ("adam", (0.9, 1.0)), ("adamw", (-0.1, 0.9)), ("adamw", (0.9, 0.95, 0.99)), ("adamw", (math.nan, 0.9)), ("lion-pma", (0.9,)),
])
def test_wrong_betas_are_refused(name, betas):
    with pytest.raises(InputError, match="betas"):
        optim.make(name, tiny_gpt(), 0.1, betas, 0.0)


def test_an_unknown_name_is_refused_with_the_known_ones():
    for refusing in (lambda name: optim.make(name, tiny_gpt(), 0.1, None, 0.0), lambda name: optim.per_update(name, 4)):
        with pytest.raises(InputError, match=f"'adamx'.*{', '.join(NAMES)}"):
            refusing("adamx")


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

# ----------------------------------------------------------------------------------------------------------------------
# one step of a training script

def regression(seed=0, width=3):
    """A linear model, and six rows of data."""
    torch.manual_seed(seed)
    return nn.Linear(width, 1, bias=False).double(), torch.randn(6, width, dtype=torch.float64), torch.randn(6, 1).double()


def shares(model, x, y, batches, spoil=None):
    """Each micro-batch's share of the mean loss over all rows, and its number of rows. spoil: a function of the loss."""
    n = sum(map(len, batches))
    for k, rows in enumerate(batches):
        loss = (model(x[rows]) - y[rows]).square().sum() / n
        yield spoil(k, loss) if spoil else loss, torch.tensor(float(len(rows)))


BATCHES = [[0, 1, 2], [3], [4, 5]]


def test_accumulation_is_the_step_of_all_rows():
    """Against torch's own SGD on the whole; the other numbers are summed, the norm is that before clipping."""
    model, x, y = regression()
    plain = copy.deepcopy(model)
    theirs, ours = (torch.optim.SGD(m.parameters(), 0.1) for m in (plain, model))
    (plain(x) - y).square().mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1).item()
    theirs.step()
    (loss, rows), norms = optim.accumulated_step(model, ours, shares(model, x, y, BATCHES), BATCHES, 3, grad_clip=0.1)
    torch.testing.assert_close(model.weight, plain.weight, **ROUNDING)
    assert norms == pytest.approx([norm]) and rows == 6 and model.weight.grad is None
    assert loss == pytest.approx((regression()[0](x) - y).square().mean().item())


def test_where_each_micro_batch_is_an_update_its_own_mean_counts():
    """K times its share: with equal micro-batches its mean."""
    model, x, y = regression()
    plain = copy.deepcopy(model)
    theirs, ours = (torch.optim.SGD(m.parameters(), 0.1) for m in (plain, model))
    batches = [[0, 1], [2, 3], [4, 5]]
    for rows in batches:
        theirs.zero_grad()
        (plain(x[rows]) - y[rows]).square().mean().backward()
        theirs.step()
    _, norms = optim.accumulated_step(model, ours, shares(model, x, y, batches), batches, 1)
    torch.testing.assert_close(model.weight, plain.weight, **ROUNDING)
    assert len(norms) == 3


@pytest.mark.parametrize("what", ["nan", "inf"])
@pytest.mark.parametrize("per_update, moved", [(3, False), (1, True)])
def test_a_loss_that_is_none_stops_before_the_update_and_names_its_rows(what, per_update, moved):
    """In the second micro-batch: with accumulation nothing has moved, else only the first one's update was made."""
    model, x, y = regression()
    before, optimizer = model.weight.detach().clone(), torch.optim.SGD(model.parameters(), 0.1)
    losses = shares(model, x, y, BATCHES, lambda k, loss: loss * float(what) if k == 1 else loss)
    with pytest.raises(optim.NotFinite, match=f"^the loss is {what}$") as e:
        optim.accumulated_step(model, optimizer, losses, BATCHES, per_update)
    assert e.value.rows == [3] and model.weight.isfinite().all() and torch.equal(model.weight, before) != moved


@pytest.mark.parametrize("per_update, named", [(3, [0, 1, 2, 3, 4, 5]), (1, [3])])
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_a_gradient_that_is_none_stops_before_the_update_and_names_its_rows(per_update, named, grad_clip):
    """A finite loss whose slope is infinite: the square root at 0."""
    model, x, y = regression()
    before, optimizer = model.weight.detach().clone(), torch.optim.AdamW(model.parameters(), 0.1)
    losses = shares(model, x, y, BATCHES, lambda k, loss: loss + (0 * loss).sqrt() if k == 1 else loss)
    with pytest.raises(optim.NotFinite, match=r"^the gradient's norm is (nan|inf)$") as e:
        optim.accumulated_step(model, optimizer, losses, BATCHES, per_update, grad_clip)
    assert e.value.rows == named and model.weight.isfinite().all()
    assert torch.equal(model.weight, before) == (per_update == 3)


def test_a_micro_batch_without_a_row_adds_nothing():
    """What a process yields that has no row of it."""
    model, x, y = regression()
    plain, batches = copy.deepcopy(model), [[0, 1], []]

    def losses():
        yield (model(x[:2]) - y[:2]).square().mean(), torch.tensor(2.0)
        yield torch.zeros(2)
    (plain(x[:2]) - y[:2]).square().mean().backward()
    (_, rows), norms = optim.accumulated_step(model, torch.optim.SGD(model.parameters(), 0.1), losses(), batches, 2)
    torch.testing.assert_close(model.weight, plain.weight - 0.1 * plain.weight.grad, **ROUNDING)
    assert rows == 2 and norms == pytest.approx([plain.weight.grad.norm().item()])


@pytest.mark.parametrize("name", ["adamw", "adamw-pma", "lion-pma"])
def test_an_update_that_overflows_is_left_out_and_the_scale_halved(name):
    """Four micro-batches whose scaled gradient overflows in fp32 at first. With a period of its own, a step skips some of its
    updates and the optimizer's age says so; the updates that were made are those of a run without a scaler."""
    model = nn.Linear(3, 1, bias=False)
    x, y, batches = torch.randn(4, 3), torch.randn(4, 1), [[0], [1], [2], [3]]
    plain = copy.deepcopy(model)
    ours, theirs = (optim.make(name, m, 0.1, None, 0.0, 4) for m in (model, plain))
    per_update = optim.per_update(name, 4)

    def losses(m, rows):
        return ((4 * (m(x[r]) - y[r]).square().mean() / 4,) for r in rows)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 127)   # twice too large: 4 * 2^127 is no fp32
    _, norms = optim.accumulated_step(model, ours, losses(model, batches), batches, per_update, 0.0, scaler)
    made = len(norms)
    assert 0 <= made < 4 // per_update and scaler.get_scale() < 2.0 ** 127
    if per_update == 1:
        assert made and ours.state[model.weight]["t"] == made   # in the middle of its period
        skipped = 4 - made
        for k in range(skipped, 4):
            for loss, in losses(plain, [batches[k]]):
                (4 * loss).backward()
            theirs.step()
            theirs.zero_grad()
        torch.testing.assert_close(model.weight, plain.weight)
    else:
        assert torch.equal(model.weight, plain.weight) and not made


def test_a_scale_that_cannot_fall_further_stops():
    model, x, y = regression()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    stops = []
    for _ in range(4):
        losses = shares(model, x, y, BATCHES, lambda k, loss: loss + (0 * loss).sqrt() if k == 1 else loss)
        try:
            optim.accumulated_step(model, torch.optim.SGD(model.parameters(), 0.1), losses, BATCHES, 3, 0.0, scaler)
            stops.append(scaler.get_scale())
        except optim.NotFinite:
            stops.append("stopped")
            break
    assert stops == [2.0, 1.0, "stopped"]


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_the_form_of_a_state_is_that_of_the_state(name):
    """Of matrices and vectors, after three steps: the same keys, shapes, dtypes and kinds of numbers."""
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer = optim.make(name, model, 0.1, None, 0.1, 2)
    for _ in range(3):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
    form = optim.state_form(name, None, 2, [p for group in optimizer.param_groups for p in group["params"]])
    kept = optimizer.state_dict()["state"]
    assert form.keys() == kept.keys() or not any(map(dict, kept.values()))
    for i in kept:
        assert form[i].keys() == kept[i].keys()
        for key, value in kept[i].items():
            assert type(value) is type(form[i][key])
            if torch.is_tensor(value):
                assert (value.shape, value.dtype) == (form[i][key].shape, form[i][key].dtype)
