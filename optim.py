"""
Optimizers by name, their parameter groups, and the learning-rate schedule.

Weight decay falls on matrices only: biases and LayerNorm gains are few, and pulling a gain to zero has no meaning.
"""
import math

import torch

from files import InputError

# name -> (constructor, default betas); SGD's momentum is its only "beta"
OPTIMIZERS = {
    "sgd":      (lambda groups, lr, betas: torch.optim.SGD(groups, lr, fused=True), ()),
    "momentum": (lambda groups, lr, betas: torch.optim.SGD(groups, lr, momentum=betas[0], fused=True), (0.9,)),
    "nesterov": (lambda groups, lr, betas: torch.optim.SGD(groups, lr, momentum=betas[0], nesterov=True, fused=True), (0.9,)),
    "adam":     (lambda groups, lr, betas: torch.optim.Adam(groups, lr, betas, fused=True), (0.9, 0.999)),   # L2, not decoupled
    "adamw":    (lambda groups, lr, betas: torch.optim.AdamW(groups, lr, betas, fused=True), (0.9, 0.99)),
}


def parameter_groups(model, weight_decay):
    """Two groups that hold every trainable parameter exactly once: matrices (with decay), everything else (without)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0}]
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(p) for p in trainable}
    return [group for group in groups if group["params"]]


def make(name, model, lr, betas, weight_decay):
    """The optimizer `name` over the trainable parameters of a model. betas None: the optimizer's own."""
    if name not in OPTIMIZERS:
        raise InputError(f"no optimizer {name!r}: expected {', '.join(OPTIMIZERS)}")
    constructor, default = OPTIMIZERS[name]
    betas = default if betas is None else tuple(betas)
    if len(betas) != len(default) or not all(0 <= b < 1 for b in betas):
        raise InputError(f"--betas: {name} takes {len(default)} numbers in [0, 1), found {betas}")
    if name == "nesterov" and not betas[0]:
        raise InputError("--betas: nesterov takes a momentum above 0")
    return constructor(parameter_groups(model, weight_decay), lr, betas)


def lr_at(step, steps, lr, schedule="cosine", warmup=0):
    """The learning rate of accumulated step `step` of `steps`, counted from 0: a linear rise over `warmup` steps, then
    constant, or down to a tenth at the last step, on a line or on half a cosine."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    fall = {"constant": 0.0, "linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2}[schedule]
    return lr * (1 - 0.9 * fall)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def clip(model, largest):
    """Scale the gradient down to norm `largest` (0: leave it); return its norm before."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if largest:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), largest, norm)
    return norm.item()
