"""
variance.py: the probe's numbers equal those of a numpy replay from the recorded gradients, and probing changes nothing.

    python -m pytest -q tests/test_variance.py

The oracle holds each optimizer's equations once more, in float64 numpy, and np.var.
"""
import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import optim
import train_sft
import variance
from files import InputError, read_checkpoint

M, N = 8, 5
EXACT = dict(rel=1e-9)   # float64 on both sides; variances of numbers near each other lose some digits


class Linear(torch.nn.Module):
    """Two parameters, 5 numbers. The loss of a micro-batch x is theta . x, whose gradient is x, wherever theta stands."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.linspace(-1, 1, n, dtype=torch.float64)) for n in (3, 2))

    def loss(self, x):
        return self.a @ x[:3] + self.b @ x[3:]


class Draws:
    """losses(rng) for measure(): K micro-batches' shares of their mean loss. Keeps the x of every call."""

    def __init__(self, model, K, mean=1.0):
        self.model, self.K, self.mean, self.seen = model, K, mean, []

    def __call__(self, rng):
        xs = self.mean + rng.normal(size=(self.K, N))
        self.seen.append(xs)
        return (self.model.loss(torch.from_numpy(x)) / self.K for x in xs)

# ----------------------------------------------------------------------------------------------------------------------
# the oracle: one step() of an optimizer on gradient g -> (u, lr_t), with its state in a dict

def adamw(s, g, lr, K, theta):
    s["t"], s["m"], s["v"] = s.get("t", 0) + 1, 0.9 * s.get("m", 0) + 0.1 * g, 0.99 * s.get("v", 0) + 0.01 * g ** 2
    return s["m"] / (1 - 0.9 ** s["t"]) / (np.sqrt(s["v"] / (1 - 0.99 ** s["t"])) + 1e-8), lr


def noaccum(s, g, lr, K, theta):
    b2 = 0.99 ** (1 / K)
    s["t"], s["m"], s["v"] = s.get("t", 0) + 1, 0.9 * s.get("m", 0) + 0.1 * g, b2 * s.get("v", 0) + (1 - b2) * g ** 2
    return s["m"] / (1 - 0.9 ** s["t"]) / (np.sqrt(s["v"] / (1 - b2 ** s["t"])) + 1e-8), lr


def adamw_pma(s, g, lr, K, theta):
    t = s.get("t", 0)
    tau, n, large, m, v = t % K, t // K + 1, t > 0 and t % K == 0, s.get("m", 0), s.get("v", 0)
    if large:
        m, v = 0.9 * m + 0.1 * g / K, 0.99 * v + 0.01 * g ** 2 / K
    else:
        m, v = tau / (tau + 1) * m + 0.1 / (tau + 1) * g, tau / (tau + 1) * v + 0.01 / (tau + 1) * g ** 2
    u = m / (1 - 0.9 ** n) / (np.sqrt(v / (1 - 0.99 ** n)) + 1e-8)
    s["t"], s["m"], s["v"] = t + 1, m * (K if large else 1), v * (K if large else 1)
    return u, lr if large else lr / math.sqrt(K)


def lion_pma(s, g, lr, K, theta):
    t = s.get("t", 0)
    tau, large, m = t % K, t > 0 and t % K == 0, s.get("m", 0)
    if large:
        u, m = np.sign(0.95 * m + 0.05 * g / K), K * (0.98 * m + 0.02 * g / K)
    else:
        u, m = np.sign(tau / (tau + 1) * m + 0.05 / (tau + 1) * g), tau / (tau + 1) * m + 0.02 / (tau + 1) * g
    s["t"], s["m"] = t + 1, m
    return u, lr if large else lr / K


def lion(s, g, lr, K, theta):
    u, s["m"] = np.sign(0.95 * s.get("m", 0) + 0.05 * g), 0.98 * s.get("m", 0) + 0.02 * g
    return u, lr


def momentum(s, g, lr, K, theta):   # its decay is a part of the gradient, and so of u
    s["m"] = 0.9 * s.get("m", 0) + g
    return s["m"], lr


def adam(s, g, lr, K, theta):   # the same, and its b2 is 0.999
    s["t"], s["m"], s["v"] = s.get("t", 0) + 1, 0.9 * s.get("m", 0) + 0.1 * g, 0.999 * s.get("v", 0) + 0.001 * g ** 2
    return s["m"] / (1 - 0.9 ** s["t"]) / (np.sqrt(s["v"] / (1 - 0.999 ** s["t"])) + 1e-8), lr


RULES = {"adamw": (adamw, True), "adamw-noaccum": (noaccum, False), "adamw-pma": (adamw_pma, False), "lion": (lion, True),
         "lion-pma": (lion_pma, False), "momentum": (momentum, True), "adam": (adam, True)}   # name -> (rule, accumulates)
COUPLED = ("momentum", "adam")


def relative(samples):
    samples = np.array(samples)
    raw = samples.var(0, ddof=1).mean()
    return raw, raw / (samples ** 2).mean()


@pytest.mark.parametrize("start", [0, 4])   # with an empty state, and after some steps
@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("name", RULES)
def test_every_number_equals_a_replay(name, K, start):
    rule, accumulates = RULES[name]
    model, rng, lr, decay = Linear(), np.random.default_rng(1), 0.01, 0.3
    groups = [{"params": [p], "weight_decay": decay} for p in (model.b, model.a)]   # the groups' order is not the model's
    optimizer = optim.OPTIMIZERS[name].make(groups, lr, optim.OPTIMIZERS[name].betas, K)
    state, parts, per_update = {}, 1 if accumulates else K, K if accumulates else 1

    def theta():
        return torch.cat([model.a, model.b]).detach().numpy().copy()

    for _ in range(start * parts):   # the same gradients to both; where theta goes enters by coupled decay alone
        g = rng.normal(size=N)
        rule(state, g + decay * theta() * (name in COUPLED), lr, K, None)
        model.a.grad, model.b.grad = torch.from_numpy(g[:3].copy()), torch.from_numpy(g[3:].copy())
        optimizer.step()

    draws = Draws(model, K)
    found = variance.measure(optimizer, model, draws, K, per_update, seed=[3])
    assert len(draws.seen) == M + 1
    walks, common, moved = [copy.deepcopy(state) for _ in range(M)], copy.deepcopy(state), np.zeros((M, N))
    by_tau = []
    for tau in range(parts):
        gs, us = [], []
        for i in range(M):
            g = draws.seen[i].mean(0) if accumulates else draws.seen[i][tau]
            gs.append(g + decay * theta() * (name in COUPLED))
            u, lr_t = rule(walks[i], gs[-1], lr, K, None)
            moved[i] += lr_t * u
            us.append(rule(copy.deepcopy(common), gs[-1], lr, K, None)[0])
        if not accumulates:
            rule(common, draws.seen[M][tau], lr, K, None)
        by_tau.append((relative(gs), relative(us)))
    assert found["update_variance"] == pytest.approx([u[0] for _, u in by_tau], **EXACT)
    assert found["update_variance_relative"] == pytest.approx([u[1] for _, u in by_tau], **EXACT)
    assert found["grad_variance"] == pytest.approx(np.mean([g[0] for g, _ in by_tau]), **EXACT)
    assert found["grad_variance_relative"] == pytest.approx(np.mean([g[1] for g, _ in by_tau]), **EXACT)
    assert (found["displacement_variance"], found["displacement_variance_relative"]) == pytest.approx(relative(moved), **EXACT)
    assert found["displacement_rms"] == pytest.approx(math.sqrt((moved ** 2).mean()), **EXACT)
    used = draws.seen if not accumulates and K > 1 else draws.seen[:M]   # the common walk needs none for a period of one step
    used = [x for i, xs in enumerate(used) for x in (xs if i < M else xs[:-1])]
    assert found["probe_loss"] == pytest.approx(np.mean([theta() @ x for x in used]), **EXACT)

# ---- worked by hand

def test_two_samples_by_hand():
    """M = 2 gradients, (0, 0, 0, 0, 4) and (0, 0, 0, 0, 2): variance 2 in one coordinate of five, mean square 20 / 10."""
    assert variance.variance([[torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.0, 4.0])],
                              [torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.0, 2.0])]]) == pytest.approx((0.4, 0.2))


def test_plain_sgd_by_hand():
    """u is the gradient, and the displacement lr times it."""
    model = Linear()
    found = variance.measure(torch.optim.SGD(model.parameters(), 0.1), model, Draws(model, 1), 1, 1, [0])
    assert found["update_variance"] == pytest.approx([found["grad_variance"]])
    assert found["displacement_variance"] == pytest.approx(0.01 * found["grad_variance"])
    assert found["displacement_variance_relative"] == pytest.approx(found["grad_variance_relative"])


@pytest.mark.parametrize("name, u", [("sgd", [3.0, -2.0, 0.5, 4.0, -1.0]), ("lion", [1, -1, 1, 1, -1]),
                                     ("lion-pma", [1, -1, 1, 1, -1]), ("adamw", [1, -1, 1, 1, -1])])
def test_u_points_uphill_by_hand(name, u):
    """From an empty state: SGD's u is the gradient, Lion's and Adam's its signs, at whatever rate; a step goes lr_t against it.
    No variance sees a sign, so that the probe's numbers are no proof of it."""
    model, K, lr = Linear(), 4, 0.25
    optimizer = optim.OPTIMIZERS[name].make(model.parameters(), lr, optim.OPTIMIZERS[name].betas, K)
    walker = variance.Walker(optimizer, [model.a, model.b])
    gradients = [torch.tensor([3.0, -2.0, 0.5]).double(), torch.tensor([4.0, -1.0]).double()]
    assert torch.cat(walker.update(gradients)).tolist() == pytest.approx(u, rel=1e-6)   # Adam's eps of 1e-8 takes a little
    assert not torch.cat(walker.params).any()   # it stayed where it was
    walker.step(gradients)
    rate = lr / K if name == "lion-pma" else lr
    assert torch.cat(walker.params).tolist() == pytest.approx([-rate * x for x in u], rel=1e-6)


def test_gradients_are_clipped_as_the_run_clips_them():
    """Gradients near (1, 1, 1, 1, 1) and, elsewhere in the model, (3, 4): the norm is over all parameters, not over the block."""
    model, other = Linear(), torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([*model.parameters(), other], 0.1)
    drawn = []

    def losses(rng):
        xs = torch.from_numpy(1 + 0.1 * rng.normal(size=(2, N)))
        drawn.append(xs.mean(0).numpy())
        return ((model.loss(x) + other @ torch.tensor([3.0, 4.0]).double()) / 2 for x in xs)
    found = variance.measure(optimizer, model, losses, 2, 2, [0], grad_clip=2.0)
    norms = [math.sqrt((g ** 2).sum() + 25) for g in drawn[:M]]
    assert min(norms) > 5
    expected = relative([g * 2 / (norm + 1e-6) for g, norm in zip(drawn, norms)])
    assert (found["grad_variance"], found["grad_variance_relative"]) == pytest.approx(expected, **EXACT)
    loose = variance.measure(optimizer, model, losses, 2, 2, [0], grad_clip=100.0)   # larger than any: the same as none
    assert loose == variance.measure(optimizer, model, losses, 2, 2, [0])


def test_nothing_moves_at_rate_0():
    model = Linear()
    found = variance.measure(optim.AdamWPMA(model.parameters(), 0.0, period=2), model, Draws(model, 2), 2, 1, [0])
    assert found["displacement_variance"] == found["displacement_variance_relative"] == found["displacement_rms"] == 0
    assert min(found["update_variance"]) > 0   # u excludes lr_t

# ---- properties

@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_probing_changes_nothing(name):
    K, model = 4, Linear()
    optimizer = optim.make(name, model, 0.01, None, 0.1, K)
    for _ in range(2):   # with an empty state, then in the middle of a period
        before = [p.detach().clone() for p in model.parameters()], copy.deepcopy(optimizer.state_dict())
        gradients = [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
        states = torch.get_rng_state(), np.random.get_state()[1].copy()
        variance.measure(optimizer, model, Draws(model, K), K, optim.per_update(name, K), [5])
        assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters()))
        assert str(before[1]) == str(optimizer.state_dict())
        assert all(p.grad is g is None or torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients))
        assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()
        for x in torch.eye(N, dtype=torch.float64)[:3]:
            optimizer.zero_grad()
            model.loss(x + 1).backward()
            optimizer.step()


def test_the_scale_of_float16s_losses_is_taken_out_again():
    """A power of two costs no digit. Were it left in, relative variances would not tell."""
    found = []
    for scale in (1.0, 1024.0):
        model = Linear()
        optimizer = optim.make("adamw-pma", model, 0.01, None, 0.0, 2)
        found.append(variance.measure(optimizer, model, Draws(model, 2), 2, 1, [0], grad_clip=1.0, scale=scale))
    assert found[0] == found[1]


def test_the_displacement_is_without_agmas_perturbation():
    """The noise is no part of u. Two steps were done: at K = 2 the next one is large, after which it falls."""
    found = []
    for name in ("agma-decay", "agma-perturb"):
        model = Linear()
        optimizer = optim.make(name, model, 0.01, None, 0.0, 2)
        for _ in range(2):
            model.a.grad, model.b.grad = torch.ones(3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
            optimizer.step()
        found.append(variance.measure(optimizer, model, Draws(model, 2), 2, 1, [0]))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["agma-perturb", "lion"])
def test_a_run_with_probes_is_bit_identical_to_one_without(tmp_path, monkeypatch, name):
    """Dropout on: the probe's forward passes draw random numbers too."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    cfg = train_sft.Config(steps=5, micro_batch=4, accumulate=3, eval_every=5, eval_samples=8, eval_answers=0, lr=1e-3,
                           dropout=0.1, optimizer=name, warmup=2)
    for folder, every in (("with", 2), ("without", None)):
        train_sft.main(replace(cfg, out=str(tmp_path / folder), variance_every=every))
    one, two = (read_checkpoint(tmp_path / folder / "last.pt") for folder in ("with", "without"))
    assert all(torch.equal(one["model"][key], two["model"][key]) for key in one["model"])
    assert str(one["optimizer"]) == str(two["optimizer"]) and torch.equal(one["rng"][0]["cpu"], two["rng"][0]["cpu"])
    events = [json.loads(line) for line in Path(tmp_path / "with/metrics.jsonl").read_text().splitlines()]
    if name == "lion":   # each coordinate goes lr or not at all: the rate is that of the step itself, in the warm-up too
        moved = [e["displacement_rms"] for e in events if "displacement_rms" in e]
        assert moved == pytest.approx([1e-3 / 3, 1e-3, moved[2]], rel=1e-3) and moved[2] < 1e-3
    assert [e["step"] for e in events if "update_variance" in e] == [0, 2, 4]
    assert {len(e["update_variance"]) for e in events if "update_variance" in e} == {1 if name == "lion" else 3}
    assert (tmp_path / "with/variance.png").exists() and not (tmp_path / "without/variance.png").exists()


def test_accumulating_k_times_as_much_divides_the_variance_by_k():
    """Independent draws with mean 0: the gradient's variance falls as 1 / K, its relative variance is near 1 throughout."""
    model = Linear()
    at = {K: np.mean([variance.measure(torch.optim.SGD(model.parameters(), 0.1), model, Draws(model, K, 0.0), K, K, [seed])
                      ["grad_variance"] for seed in range(60)]) for K in (1, 16)}
    assert at[1] / at[16] == pytest.approx(16, rel=0.15)   # a variance of 60 * 5 estimates of 8 is known to about 4 %


def test_a_block_that_does_not_train_is_one_clear_line():
    model = Linear().requires_grad_(False)
    with pytest.raises(InputError, match="none of its parameters trains"):
        variance.measure(None, model, None, 1, 1, [0])


def test_only_the_block_is_looked_at_and_frozen_parameters_are_left_out():
    model = Linear()
    whole = torch.nn.ModuleList([torch.nn.Linear(2, 2), model])
    optimizer = optim.make("adamw-pma", whole, 0.01, None, 0.0, 2)
    model.b.requires_grad_(False)
    found = variance.measure(optimizer, model, Draws(model, 2), 2, 1, [0])
    again = Linear()
    again.b.requires_grad_(False)
    alone = variance.measure(optim.make("adamw-pma", again, 0.01, None, 0.0, 2), again, Draws(again, 2), 2, 1, [0])
    assert found == alone
