"""
Optimizers by name, their parameter groups, and the learning-rate schedule.

Written here: Lion; and those that step on each of K micro-batches where gradient accumulation steps once, in the memory of Adam
or Lion: AdamW-PMA and Lion-PMA (Periodical Moving Average, the report 001_...), AGMA (the report 000_..., appendix A), and AdamW
on a schedule like theirs. All others are torch.optim's.

In every docstring t counts the updates from 0, one for every micro-batch, K is the period, tau = t mod K, n = t // K + 1. An
update is "large" at tau = 0, except the very first, else "small": a period, which the scripts call one step, is a large update
and K-1 small ones, the first period K small ones, since there is no old moment. g is one micro-batch's gradient, lr_t an update's
own rate, lam the weight decay.

Weight decay falls on matrices only: biases and LayerNorm gains are few, and pulling a gain to zero has no meaning.
"""
import collections
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.optim.adamw import adamw

import parallel
from files import InputError


class Stepwise(torch.optim.Optimizer):
    """Base of the optimizers below: the walk over parameters, their state, their age.

    A moment m is kept as a weighted mean M of the gradients and its weight s, m = s M: after m = a m + c g the weight is s' = a s
    + c and M' = M + (c / s') (g - M), one moving average whatever a and c are, and m = K m only touches s. So torch's fused
    AdamW, which knows nothing but moving averages, can do the work (AdamWPMA.update). State of a parameter: the tensors M (named
    in `tensors`), the floats s (`weights`) and its age t.
    """
    tensors = ("m",)

    def __init__(self, params, lr, betas, weight_decay, **options):
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay, **options})

    def add_param_group(self, group):
        """Also called for every group by __init__, so that a group's own values are checked too."""
        values = {**self.defaults, **group}
        if not (len(values["betas"]) == 2 and all(0 <= b < 1 for b in values["betas"])):
            raise InputError(f"betas: expected two numbers in [0, 1), found {values['betas']}")
        if not (isinstance(values.get("period", 1), int) and values.get("period", 1) >= 1):
            raise InputError(f"period: expected a whole number of micro-batches, at least 1, found {values['period']}")
        for name in ("lr", "weight_decay", "eps", "perturb"):
            if not 0 <= values.get(name, 0) < math.inf:
                raise InputError(f"{name}: expected a finite number, at least 0, found {values[name]}")
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike = collections.defaultdict(list)   # of one age, so that one call updates them: nearly always the whole group
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state |= {"t": 0, "weights": (0.0,) * len(self.tensors)}
                        state |= {name: torch.zeros_like(p) for name in self.tensors}
                    alike[p.device, state["t"], state["weights"]].append(p)
            for (_, t, weights), params in alike.items():
                moments = [[self.state[p][name] for p in params] for name in self.tensors]
                weights = self.update(group, t, weights, params, [p.grad for p in params], *moments)
                for p in params:
                    self.state[p] |= {"t": t + 1, "weights": weights}
        return loss

    def moment(self, group, t, b):
        """(a, c, scale): the moment becomes a m + c g, and scale times that once the step is done. Here the moving average."""
        return b, 1 - b, 1

    def step_size(self, group, t):
        """lr_t"""
        return group["lr"]


def is_large(group, t):
    return t > 0 and t % group["period"] == 0


def periodical(group, t, b, scale):
    """PMA's moment (001_..., section 3.2): a period's K gradients weigh the same, where a moving average fades the older ones."""
    if is_large(group, t):
        return b, (1 - b) / group["period"], scale
    tau = t % group["period"]
    return tau / (tau + 1), (1 - b) / (tau + 1), 1

# ----------------------------------------------------------------------------------------------------------------------
# the Lion family: one tensor of state

class Lion(Stepwise):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

        u = sign(b1 m + (1-b1) g)
        m = b2 m + (1-b2) g
        theta = (1 - lr lam) theta - lr u
    """

    def __init__(self, params, lr, betas=(0.95, 0.98), weight_decay=0.0):
        super().__init__(params, lr, betas, weight_decay)

    def update(self, group, t, weights, params, grads, m):
        lr_t, (s,) = self.step_size(group, t), weights
        (a1, c1, _), (a2, c2, scale) = (self.moment(group, t, b) for b in group["betas"])
        for p, g, mean in blocks(params, grads, m):
            u = torch._foreach_lerp(mean, g, c1 / (a1 * s + c1))   # a1 m + c1 g but for a positive factor: of the same sign
            torch._foreach_sign_(u)
            torch._foreach_lerp_(mean, g, c2 / (a2 * s + c2))
            if group["weight_decay"]:
                torch._foreach_mul_(p, 1 - lr_t * group["weight_decay"])
            torch._foreach_add_(p, u, alpha=-lr_t)
        return (scale * (a2 * s + c2),)


class LionPMA(Lion):
    """Lion-PMA (001_..., algorithm 2).

        large:  lr_t = lr      u = sign(b1 m + (1-b1) g / K)                     m = b2 m + (1-b2) g / K
        small:  lr_t = lr / K  u = sign(tau/(tau+1) m + (1-b1)/(tau+1) g)        m = tau/(tau+1) m + (1-b2)/(tau+1) g
        theta = (1 - lr_t lam) theta - lr_t u;     after a large update m = K m

    The paper's large branch does not update m and its small one reads v and g^2, which Lion lacks: both are filled in as in its
    Algorithm 1, with b2. Without the first, K = 1 would not be Lion. A period moves up to 2 - 1/K times what one Lion step does.
    """

    def __init__(self, params, lr, betas=(0.95, 0.98), weight_decay=0.0, period=1):
        Stepwise.__init__(self, params, lr, betas, weight_decay, period=period)

    def moment(self, group, t, b):
        return periodical(group, t, b, group["period"])

    def step_size(self, group, t):
        return group["lr"] if is_large(group, t) else group["lr"] / group["period"]


def blocks(*lists):
    """The lists of tensors again, cut into pieces and packed into lists of about 2^18 elements on a CPU (several passes over them
    stay in its cache) and of 2^25 on a GPU (few kernels, and no temporary as large as the model)."""
    size, held, filled = 1 << (18 if lists[0][0].device.type == "cpu" else 25), [], 0
    for tensors in zip(*lists):
        p = tensors[0]
        rows = max(1, size * len(p) // p.numel()) if p.numel() > size else 0
        for slices in zip(*(x.split(rows) for x in tensors)) if rows else (tensors,):
            if held and filled + slices[0].numel() > size:
                yield map(list, zip(*held))
                held, filled = [], 0
            held.append(slices)
            filled += slices[0].numel()
    yield map(list, zip(*held))

# ----------------------------------------------------------------------------------------------------------------------
# the Adam family: two tensors of state

class AdamWPMA(Stepwise):
    """AdamW-PMA (001_..., algorithm 1).

        large:  lr_t = lr            m = b1 m + (1-b1) g / K                        v = b2 v + (1-b2) g^2 / K
        small:  lr_t = lr / sqrt(K)  m = tau/(tau+1) m + (1-b1)/(tau+1) g           v = tau/(tau+1) v + (1-b2)/(tau+1) g^2
        m_hat = m / (1 - b1^n)       v_hat = v / (1 - b2^n)
        theta = (1 - lr_t lam) theta - lr_t m_hat / (sqrt(v_hat) + eps)
        after a large update:  m = K m,  v = K v

    m = K m looks odd: the small updates' factors tau/(tau+1) multiply to 1/K and take it back by tau = K-1. There m is that of
    AdamW with K-fold accumulation, and v holds the mean of the squares where that has the square of the mean. By hand at K = 2, c
    = 1 - b1: g0 and g1 leave m1 = c (g0 + g1) / 2; the large update with g2 makes it 2 (b1 m1 + c g2 / 2), the small one with g3
    half of that and c g3 / 2: b1 m1 + c (g2 + g3) / 2, AdamW's m on the mean of g2 and g3. K = 1 is AdamW. A period moves between
    S(K) / sqrt(K) (all noise) and S(K) times (a constant gradient) as far as one accumulated step at the same lr, S(K) = sum over
    j = 1..K of j^-1/2.

    Where the sources disagree. The paper corrects the bias with exponent t // K, zero in the first period: n is one more. Its
    text scales the moments after a large step (ours; only that gives AdamW's m); its listings and the released code scale a
    temporary, which does nothing: rescale=False. The released code also lacks the square root in small steps' bias correction.
    """
    tensors = ("m", "v")

    def __init__(self, params, lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, period=1, rescale=True):
        super().__init__(params, lr, betas, weight_decay, eps=eps, period=period, rescale=rescale)

    def update(self, group, t, weights, params, grads, m, v):
        """The equations in one call of torch's fused AdamW. Its moments are the means M and R; the weights, the bias corrections
        and lr_t go into its arguments, and its own bias correction is off at "step" infinity."""
        s, r = weights
        (a1, c1, scale1), (a2, c2, scale2) = (self.moment(group, t, b) for b in group["betas"])
        beta1, beta2 = a1 * s / (a1 * s + c1), a2 * r / (a2 * r + c2)
        s, r = a1 * s + c1, a2 * r + c2
        factor = s / self.correction(group, t, group["betas"][0])   # the docstring's m_hat is factor M
        root, eps = self.denominator(group, t, r)                   # and sqrt(v_hat) + eps is root sqrt(R) + eps
        never = torch.full((), math.inf, device=params[0].device)
        adamw(params, grads, m, v, [], [never] * len(params), fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2,
              lr=self.step_size(group, t) * factor / root, eps=eps / root, weight_decay=group["weight_decay"] * root / factor)
        return scale1 * s, scale2 * r

    def moment(self, group, t, b):
        return periodical(group, t, b, group["period"] if group["rescale"] else 1)

    def correction(self, group, t, b):
        return 1 - b ** (t // group["period"] + 1)

    def denominator(self, group, t, r):
        return math.sqrt(r / self.correction(group, t, group["betas"][1])), group["eps"]

    def step_size(self, group, t):
        return group["lr"] if is_large(group, t) else group["lr"] / math.sqrt(group["period"])


class AGMA(AdamWPMA):
    """AGMA, "accumulate gradient by momentum averaging" (000_..., appendix A). AdamW-PMA's moments and step sizes, but

        theta = (1 - lr_t lam) theta - lr_t m / (sqrt(v) + eps)       no bias correction
        after a large step:  m = b1 K m,  v = b2 K v

    so that the old moment decays twice (at tau = K-1 it weighs b1^2, the period's first gradient b1 (1-b1)/K) and K = 1 is not
    Adam. The listing has K-1 small steps and one large (ours), the text K small; the listing's last lines step with gamma where
    the text has gamma / sqrt(K) for small steps (ours).

    small_lr    the small steps' rate: "sqrt" lr / sqrt(K), "linear" lr / K, "decay" lr / sqrt(K) (1 - tau/K)
    small_step  "adam" as above; "sgd": theta = (1 - lr_t lam) theta - lr_t m in small steps (m and not g is our choice)
    perturb     after each large step theta += perturb lr N(0, 1), drawn from (seed, t, number of the group) alone
    """

    def __init__(self, params, lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, period=1, small_lr="sqrt", small_step="adam",
                 perturb=0.0, seed=None):
        for value, known in ((small_lr, ("sqrt", "linear", "decay")), (small_step, ("adam", "sgd"))):
            if value not in known:
                raise InputError(f"AGMA: expected one of {', '.join(known)}, found {value!r}")
        Stepwise.__init__(self, params, lr, betas, weight_decay, eps=eps, period=period, small_lr=small_lr, small_step=small_step,
                          perturb=perturb, seed=torch.initial_seed() if seed is None else seed)

    def update(self, group, t, weights, params, grads, m, v):
        weights = super().update(group, t, weights, params, grads, m, v)
        if group["perturb"] and is_large(group, t):
            number = next(i for i, other in enumerate(self.param_groups) if other is group)
            seed = (group["seed"] + 1_000_003 * t + 998_244_353 * number) % 2 ** 63
            generator = torch.Generator(params[0].device).manual_seed(seed)
            for p in params:
                noise = torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)
                p.add_(noise, alpha=group["perturb"] * group["lr"])
        return weights

    def moment(self, group, t, b):
        return periodical(group, t, b, b * group["period"])

    def correction(self, group, t, b):
        return 1

    def denominator(self, group, t, r):
        if group["small_step"] == "sgd" and not is_large(group, t):
            return 1e-20, 1.0   # so small that 1e-20 sqrt(R) + 1 is 1: divided by nothing, Adam's step is SGD's
        return super().denominator(group, t, r)

    def step_size(self, group, t):
        K, kind = group["period"], group["small_lr"]
        if is_large(group, t):
            return group["lr"]
        return group["lr"] / (K if kind == "linear" else math.sqrt(K)) * (1 - t % K / K if kind == "decay" else 1)


class AdamWSchedule(AdamWPMA):
    """AdamW at every micro-batch on a schedule like PMA's (001_..., appendix E.2): lr_t = lr / (tau+1), our reading of a schedule
    that the paper does not state."""

    def __init__(self, params, lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, period=1):
        Stepwise.__init__(self, params, lr, betas, weight_decay, eps=eps, period=period)

    def moment(self, group, t, b):
        return Stepwise.moment(self, group, t, b)

    def correction(self, group, t, b):
        return 1 - b ** (t + 1)

    def step_size(self, group, t):
        return group["lr"] / (t % group["period"] + 1)

# ----------------------------------------------------------------------------------------------------------------------
# by name

class Recipe(NamedTuple):
    make: Callable        # (groups, lr, betas, K) -> optimizer
    betas: tuple          # the default; SGD's only "beta" is its momentum
    accumulates: bool     # whether one update takes a step's K micro-batches together; else K updates take one each
    state: int            # numbers of state a parameter


def _torch(kind):
    return lambda groups, lr, betas, K: kind(groups, lr, betas, fused=True)


def _sgd(**options):
    return lambda groups, lr, betas, K: torch.optim.SGD(groups, lr, *betas, **options, fused=True)


def _ours(kind, **options):
    return lambda groups, lr, betas, K: kind(groups, lr, betas, period=K, **options)


def _noaccum(groups, lr, betas, K):
    """v forgets a token as fast as with accumulation: its half-life is kept."""
    return torch.optim.AdamW(groups, lr, (betas[0], betas[1] ** (1 / K)), fused=True)


OPTIMIZERS = {
    "sgd":                 Recipe(_sgd(), (), True, 0),
    "momentum":            Recipe(_sgd(), (0.9,), True, 1),
    "nesterov":            Recipe(_sgd(nesterov=True), (0.9,), True, 1),
    "adam":                Recipe(_torch(torch.optim.Adam), (0.9, 0.999), True, 2),   # decay as L2, not decoupled
    "adamw":               Recipe(_torch(torch.optim.AdamW), (0.9, 0.99), True, 2),
    "adamw-noaccum":       Recipe(_noaccum, (0.9, 0.99), False, 2),
    "adamw-pma-schedule":  Recipe(_ours(AdamWSchedule), (0.9, 0.99), False, 2),
    "adamw-pma":           Recipe(_ours(AdamWPMA), (0.9, 0.99), False, 2),
    "adamw-pma-norescale": Recipe(_ours(AdamWPMA, rescale=False), (0.9, 0.99), False, 2),
    "agma":                Recipe(_ours(AGMA), (0.9, 0.99), False, 2),
    "agma-linear":         Recipe(_ours(AGMA, small_lr="linear"), (0.9, 0.99), False, 2),
    "agma-sgd":            Recipe(_ours(AGMA, small_lr="linear", small_step="sgd"), (0.9, 0.99), False, 2),
    "agma-decay":          Recipe(_ours(AGMA, small_lr="decay"), (0.9, 0.99), False, 2),
    "agma-perturb":        Recipe(_ours(AGMA, small_lr="decay", perturb=0.1), (0.9, 0.99), False, 2),   # a tenth: our choice
    "lion":                Recipe(lambda groups, lr, betas, K: Lion(groups, lr, betas), (0.95, 0.98), True, 1),
    "lion-pma":            Recipe(_ours(LionPMA), (0.95, 0.98), False, 1),
}


def parameter_groups(model, weight_decay):
    """Two groups that hold every trainable parameter exactly once: matrices (with decay), everything else (without)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0}]
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(p) for p in trainable}
    return [group for group in groups if group["params"]]


def make(name, model, lr, betas, weight_decay, accumulate=1):
    """The optimizer `name` over the trainable parameters of a model, for steps of K = `accumulate` micro-batches. betas None: the
    optimizer's own. How many of the K its step() takes at a time: per_update(name, K)."""
    recipe = _recipe(name)
    if accumulate < 1:
        raise InputError(f"--accumulate: expected at least 1, found {accumulate}")
    betas = recipe.betas if betas is None else tuple(betas)
    if len(betas) != len(recipe.betas) or not all(0 <= b < 1 for b in betas):
        raise InputError(f"--betas: {name} takes {len(recipe.betas)} numbers in [0, 1), found {betas}")
    if name == "nesterov" and not betas[0]:
        raise InputError("--betas: nesterov takes a momentum above 0")
    return recipe.make(parameter_groups(model, weight_decay), lr, betas, accumulate)


def per_update(name, accumulate):
    """Micro-batches whose gradients one step() takes: all of a step's with accumulation, else 1. One micro-batch's share of the
    step's mean loss is then to be multiplied by accumulate / per_update, so that the same gradients enter."""
    return accumulate if _recipe(name).accumulates else 1


def footprint(name, model):
    """What trains, of how much, and the bytes of the state that the optimizer `name` keeps for it."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return {"parameters": sum(p.numel() for p in model.parameters()), "trainable": sum(p.numel() for p in trainable),
            "optimizer_bytes": sum(p.numel() * p.element_size() for p in trainable) * _recipe(name).state}


def describe(size):
    share = size["trainable"] / size["parameters"]
    return (f"trains {size['trainable']:,} of {size['parameters']:,} parameters ({share:.3%}), optimizer state "
            f"{size['optimizer_bytes'] / 1e6:,.2f} MB")


def _recipe(name):
    if name not in OPTIMIZERS:
        raise InputError(f"no optimizer {name!r}: expected {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


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

# ----------------------------------------------------------------------------------------------------------------------
# one step of a training script

class NotFinite(ArithmeticError):
    """A loss or a gradient that is no number. rows: of the training pairs that it came from."""

    def __init__(self, message, rows):
        super().__init__(message)
        self.rows = rows


def accumulated_step(model, optimizer, losses, rows, per_update, grad_clip=0.0, scaler=None):
    """One step of K micro-batches, which is K / per_update updates: one with accumulation, K with PMA (per_update above).

    losses: an iterator over K tuples (loss, more numbers ...), each a micro-batch's share of the step's mean; plain zeros where
    this process has no row of it. With PMA each micro-batch's gradient is clipped alone. rows: those of each micro-batch. scaler:
    of float16, whose gradients would vanish unscaled; an update whose scaled gradient overflows is left out, and the scale
    halved. -> (the tuples' sum, over all processes too; the gradient norms of the updates that were done). Raises NotFinite, with
    the weights as they were before the update.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    K, sums, norms = len(rows), (), []
    for k, (loss, *others) in enumerate(losses, 1):
        # a share of the mean of all K; where each is an update of its own (PMA, AGMA), K times that share, which is its own mean
        # only if all K have as many tokens (pairs)
        if loss.requires_grad:
            scaler.scale(loss * (K // per_update)).backward()
        values = [x.item() for x in (loss, *others)]
        if not math.isfinite(values[0]):
            raise NotFinite(f"the loss is {values[0]}", rows[k - 1])
        sums = [a + b for a, b in zip(sums or [0.0] * len(values), values)]
        if k % per_update:
            continue
        if parallel.size() > 1:
            for p in trained:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            parallel.sum_gradients([p.grad for p in trained])
        scaler.unscale_(optimizer)
        norm = clip(model, grad_clip)
        if math.isfinite(norm):
            optimizer.step()
            norms.append(norm)
            scaler.update()
        elif scaler.get_scale() > 1:
            scaler.update(scaler.get_scale() / 2)   # also where each number is finite, and only their norm is not
        else:   # also without a scaler
            raise NotFinite(f"the gradient's norm is {norm}", [row for j in range(k - per_update, k) for row in rows[j]])
        optimizer.zero_grad(set_to_none=True)
    return parallel.total(*sums), norms


def state_form(name, betas, accumulate, params):
    """What the optimizer `name` keeps of these parameters once it has stepped, as in its state_dict()["state"], with tensors that
    have no numbers: to hold a file against."""
    tiny = torch.nn.Linear(1, 1, bias=False)
    optimizer = make(name, tiny, 1e-3, betas, 0.0, accumulate)
    tiny.weight.grad = torch.zeros_like(tiny.weight)
    optimizer.step()
    kept = optimizer.state_dict()["state"].get(0, {})
    return {i: {key: torch.empty_like(p, device="meta") if torch.is_tensor(x) and x.dim() else x for key, x in kept.items()}
            for i, p in enumerate(params)}
