"""
How noisy is what an optimizer does? Drawn again and again from one frozen state: the gradient, the update, and the way that a
whole period of K micro-batches would go (001_..., section 5.5; the last of the three is ours).

    python train_sft.py --optimizer adamw-pma --accumulate 8 --variance-every 50     # metrics.jsonl and variance.png

Measured on the last transformer block only: GPT-2's output layer is the embedding. An own module, since the training scripts
would otherwise hold this mathematics.

Simplified: parameters stand still within a period, where a real one moves them a little at every tau.
"""
import collections
import copy

import numpy as np
import torch

import parallel
from files import InputError


def measure(optimizer, block, losses, micro_batches, per_update, seed, grad_clip=0.0, samples=8, scale=1.0):
    """One probe. Changes nothing: not a parameter, gradient, moment, generator.

    block: the module that is looked at. losses(rng) -> an iterator over the losses of K = `micro_batches` drawn with rng, each
    its share of their mean; a plain zero where this process has no row of it. per_update: how many of them one step() of the
    optimizer takes. seed: a list of integers. grad_clip: the norm, over all of the optimizer's parameters, to which the gradient
    of a step() is clipped; 0: it is not. samples: M. scale: of the losses on their way back (float16).

    -> a dict of floats, and for the update of lists of floats, one for each step() of a period (tau = 0, 1, ...):

        grad_variance          mean over coordinates of the sample variance (denominator M-1) of the gradient of one step()
        update_variance        of the update u, theta = (1 - lr_t lam) theta - lr_t u, from the state that the optimizer has at
                               tau after a period's first tau micro-batches, the same ones for all M
        displacement_variance  of the sum of lr_t u over a whole period, each of the M from the state at hand with K fresh micro-
                               batches: what compares fairly, since at one tau PMA gives the newest gradient a small weight
        *_relative             each divided by the mean square over coordinates and samples of what it is the variance of
        displacement_rms       root of the mean square of the displacement
        probe_loss             mean training loss
    """
    params = [p for p in block.parameters() if p.requires_grad]
    if not params:
        raise InputError("the variance probe looks at the last block, and none of its parameters trains")
    steps, decay = micro_batches // per_update, _coupled_decay(optimizer)
    needed = [p for group in optimizer.param_groups for p in group["params"]] if grad_clip else params
    found, seen = collections.defaultdict(list), []

    def gradient(stream):
        """Of one step(): the sum over its micro-batches."""
        total = [torch.zeros_like(p) for p in needed]
        for _ in range(per_update):
            loss = next(stream)
            if loss.requires_grad:
                total = [a + b / scale for a, b in zip(total, torch.autograd.grad(scale * steps * loss, needed))]
            seen.append(loss.item())
        parallel.sum_gradients(total)
        if grad_clip:
            factor = min(1.0, grad_clip / (torch.nn.utils.get_total_norm(total).item() + 1e-6))   # as torch clips
            of = {id(p): factor * g for p, g in zip(needed, total)}
            total = [of[id(p)] for p in params]
        return [g + decay[p] * p.detach() if decay.get(p) else g for g, p in zip(total, params)]

    # dropout draws from torch's own generators
    with torch.random.fork_rng([params[0].device] if params[0].is_cuda else []), torch.enable_grad():
        rng = np.random.default_rng(seed)
        torch.manual_seed(int(rng.integers(2 ** 31)))
        walks = [(Walker(optimizer, params), losses(rng)) for _ in range(samples)]
        common, stream = Walker(optimizer, params), losses(rng)
        for tau in range(steps):
            gradients, updates = [], []
            for walk, own in walks:
                gradients.append(gradient(own))
                walk.step(gradients[-1])
                updates.append(common.update(gradients[-1]))
            if tau + 1 < steps:
                common.step(gradient(stream))
            for name, drawn in (("grad", gradients), ("update", updates)):
                for key, value in zip((f"{name}_variance", f"{name}_variance_relative"), variance(drawn)):
                    found[key].append(value)
    moved = [walk.params for walk, _ in walks]
    raw, relative = variance(moved)
    return {**found, **{key: float(np.mean(found[key])) for key in ("grad_variance", "grad_variance_relative")},
            "displacement_variance": raw, "displacement_variance_relative": relative,
            "displacement_rms": mean_square(moved) ** 0.5, "probe_loss": parallel.total(sum(seen))[0] / len(seen) * micro_batches}


class Walker:
    """A copy of an optimizer over some of its parameters, with their state, its own copies of them starting from zero: they then
    hold the sum of -lr_t u, with no decay and no rounding against the weights themselves."""

    def __init__(self, optimizer, params):
        self.optimizer = copy.copy(optimizer)
        wanted, self.optimizer.state, self.optimizer.param_groups = {id(p) for p in params}, collections.defaultdict(dict), []
        twins = {}
        for group in optimizer.param_groups:
            inside = [p for p in group["params"] if id(p) in wanted]
            for p in inside:
                twins[id(p)] = twin = torch.zeros_like(p, requires_grad=True)
                if p in optimizer.state:
                    self.optimizer.state[twin] = {key: value.clone() if torch.is_tensor(value) else value
                                                  for key, value in optimizer.state[p].items()}
            if inside:
                self.optimizer.param_groups.append({**group, "params": [twins[id(p)] for p in inside], "weight_decay": 0.0,
                                                    **({"perturb": 0.0} if "perturb" in group else {})})
        self.params = [twins[id(p)].detach() for p in params]
        self.twins = [twins[id(p)] for p in params]

    def step(self, gradients):
        """One step of the optimizer with these gradients, one for each parameter."""
        for twin, g in zip(self.twins, gradients):
            twin.grad = g
        self.optimizer.step()

    def update(self, gradients):
        """u for these gradients, also at a rate of 0; stays where it is. lr_t is what step_size(group, t) says at a rate of 1,
        where the optimizer has that, t being the age of its state."""
        trial = Walker(self.optimizer, self.twins)
        group = trial.optimizer.param_groups[0]
        for other in trial.optimizer.param_groups:
            other["lr"] = 1.0
        t = trial.optimizer.state.get(trial.twins[0], {}).get("t", 0)
        lr_t = trial.optimizer.step_size(group, t) if hasattr(trial.optimizer, "step_size") else 1.0
        trial.step(gradients)
        return [p / -lr_t for p in trial.params]


def variance(samples):
    """samples: M lists of equal tensors -> (mean over coordinates of the sample variance, that over the mean square, 0 where that
    is 0)."""
    total = sum(torch.stack(same).var(0).double().sum().item() for same in zip(*samples))
    raw = total / sum(x.numel() for x in samples[0])
    return raw, raw / (mean_square(samples) or 1.0)   # nothing moved: no variance either


def mean_square(samples):
    """Over samples and coordinates, in float64."""
    return sum(x.double().square().sum().item() for tensors in samples for x in tensors) / sum(
        x.numel() for tensors in samples for x in tensors)


def _coupled_decay(optimizer):
    """{parameter: lam} of the optimizers whose decay is a part of the gradient: torch's SGD and Adam."""
    if isinstance(optimizer, torch.optim.SGD) or type(optimizer) is torch.optim.Adam:
        return {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    return {}
