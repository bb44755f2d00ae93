"""
From hidden states to losses. Functions on tensors, without config or device moves; those named batch_ run the model, too.

What they share is log_softmax, of the rows that are scored and of a chunk of them at a time, so that a matrix of (tokens, 50257)
never exists as a whole. DPO differentiates through token_logps, the log-probability of each target given its hidden state, and
computes each chunk's logits again to go back. SFT and CDPO know the factor of every log-probability in their loss beforehand, so
that one pass over the chunks gives loss and gradient (_Weighted).

Shapes: S scored positions, s of a chunk, C channels, V vocabulary, B pairs, R responses. `owner` (S,) says which response a
position belongs to; of B pairs the B chosen ones come first, then the B rejected ones, R = 2B. logp is of a position, over the
vocabulary (s, V) or of its target (S,); logps of whole responses, (R,).
"""
import torch
from torch.nn import functional as F

# Logits at a time, of all models: 24 MB in fp32. Above 32 MB glibc maps each buffer anew, which costs more than the product.
CHUNK = 6_000_000


def chunk_rows(vocabulary, models):
    """Rows whose logits, of so many models at a time, fill a CHUNK."""
    return max(1, CHUNK // (vocabulary * models))


def chunks(n, vocabulary, models=1):
    size = chunk_rows(vocabulary, models)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def matmul_dtype(hidden, weight):
    """What a matrix product here runs in: autocast's dtype where that is on, else the widest of the two."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def room(hidden, weight, dtype, models=1):
    """For the log-probabilities of one chunk after the other. A new buffer for each would leave holes in the heap that nothing
    fills."""
    rows, wide = min(len(hidden), chunk_rows(len(weight), models)), torch.promote_types(dtype, torch.float32)
    return torch.empty(rows, len(weight), dtype=wide, device=hidden.device)


def product(x, weight):
    """x @ weight.T, without a gradient. oneDNN is up to twice as fast as F.linear's MKL where few rows meet a vocabulary."""
    ops = torch.ops.mkldnn
    if (x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
            and hasattr(ops, "_linear_pointwise")):
        return ops._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def log_softmax(hidden, weight, dtype, out):
    """(s, C), (V, C) -> (s, V) log-probabilities: half types go up to fp32 after the product, fp64 stays. They stand in `out`, a
    room(), until the next chunk's do."""
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.log_softmax(product(hidden.to(dtype), weight.to(dtype)), 1, dtype=out.dtype, out=out[:len(hidden)])


class _Gradient:
    """The sums that a pass over the chunks builds up: d @ weight is a chunk's gradient of its hidden states, d.T @ hidden what it
    adds to that of the matrix, with d (s, V) the gradient at the logits."""

    def __init__(self, hidden, weight, dtype, want_hidden, want_weight):
        self.inputs, self.want_weight = (hidden, weight), want_weight
        self.dtype = torch.float32 if dtype == torch.float16 else dtype   # its smallest number, 6e-8, is too large for many of d
        self.hidden = torch.empty_like(hidden) if want_hidden else None
        self.weight = None

    def add(self, rows, d):
        hidden, weight = self.inputs
        with torch.autocast(hidden.device.type, enabled=False):   # self.dtype says in what
            d = d.to(self.dtype)
            if self.hidden is not None:
                self.hidden[rows] = product(d, weight.to(d.dtype).T).to(hidden.dtype)
            if self.want_weight and self.weight is None:
                self.weight = (d.T @ hidden[rows].to(d.dtype)).to(weight.dtype)
            elif self.want_weight and d.dtype == weight.dtype:
                self.weight.addmm_(d.T, hidden[rows].to(d.dtype))   # in place: no second (V, C)
            elif self.want_weight:
                self.weight += d.T @ hidden[rows].to(d.dtype)       # half-precision product, full-precision sum

# ----------------------------------------------------------------------------------------------------------------------
# log-probabilities

class _Logp(torch.autograd.Function):
    """(S, C) hidden states -> (S,) log-probabilities of the targets.

    The gradient at the logits is d = g (onehot - softmax), g = dL / dlogp, a number for each position. A frozen matrix (LoRA)
    needs that of the hidden states only, whose rows g scales: forward computes them for g = 1 at once. Else only the inputs are
    kept, and backward goes over the chunks again. grad: whether a gradient is wanted, which forward cannot ask autograd.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, grad, models):
        ctx.dtype, found = matmul_dtype(hidden, weight), []
        at_once = torch.empty_like(hidden) if grad and not ctx.needs_input_grad[1] else None
        out = room(hidden, weight, ctx.dtype, models)
        for rows in chunks(len(hidden), len(weight), models):
            logp, target = log_softmax(hidden[rows], weight, ctx.dtype, out), targets[rows, None]   # (s, V)
            found.append(logp.gather(1, target).squeeze(1))
            if at_once is not None:
                d = logp.exp_().neg_().scatter_add_(1, target, torch.ones_like(logp[:, :1]))
                at_once[rows] = product(d.to(ctx.dtype), weight.to(ctx.dtype).T)
        ctx.save_for_backward(*((at_once,) if at_once is not None else (hidden, weight, targets)))
        return torch.cat(found)

    @staticmethod
    def backward(ctx, grad_logp):
        if len(ctx.saved_tensors) == 1:
            at_once, = ctx.saved_tensors
            return at_once * grad_logp[:, None].to(at_once.dtype), None, None, None, None
        hidden, weight, targets = ctx.saved_tensors
        sums, out = _Gradient(hidden, weight, ctx.dtype, *ctx.needs_input_grad[:2]), room(hidden, weight, ctx.dtype)
        for rows in chunks(len(hidden), len(weight)):
            d = log_softmax(hidden[rows], weight, ctx.dtype, out).exp_().mul_(-grad_logp[rows, None])
            sums.add(rows, d.scatter_add_(1, targets[rows, None], grad_logp[rows, None]))
        return sums.hidden, sums.weight, None, None, None


def token_logps(hidden, weight, targets, models=1):
    """hidden (S, C), weight (V, C), targets (S,) -> (S,) log-probability of each target: F.linear(hidden, weight).log_softmax(1)
    [range(S), targets], in chunks, as small as where so many models are computed beside each other. The shift by one is the
    caller's: hidden[i] is the state *before* targets[i] (data.Batch does it, in one place)."""
    if not len(hidden) == len(targets):
        raise ValueError(f"{len(hidden)} hidden states for {len(targets)} targets")
    return _Logp.apply(hidden, weight, targets, torch.is_grad_enabled() and hidden.requires_grad, models)


def sequence_logps(logps, owner, n):
    """A number of each token (S,), such as its log-probability, summed, not averaged, over each of n responses: (n,)."""
    return torch.zeros(n, dtype=logps.dtype, device=logps.device).index_add(0, owner, logps)


def response_logps(hidden, weight, batch):
    """The log-probability of each response of a data.Batch, (R,), given the hidden states at its scored places."""
    return sequence_logps(token_logps(hidden, weight, batch.targets), batch.owner, batch.responses)


def batch_logps(model, batch):
    """The same from the model."""
    return response_logps(*batch.hidden_and_head(model), batch)

# ----------------------------------------------------------------------------------------------------------------------
# losses

class _Weighted(torch.autograd.Function):
    """sum over positions of factor logp + share R_t -> that number, and R_t, (S,), without a gradient. R_t, CDPO's regulariser,
    where there is a reference. Loss and gradient in one pass: backward multiplies by the number that arrives.

    With s_v the sigmoid in R_t (cdpo_regularizer), the gradient at log pi(v) is factor at v = y_t and share beta s_v (1 - s_v) /
    (V - 1) elsewhere; at the logits it is d - softmax * (sum of d over the vocabulary), since logp = z - logsumexp(z).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, factor, ref_hidden, ref_weight, share, beta, grad):
        dtype, found, regularizer = matmul_dtype(hidden, weight), [], []
        sums = _Gradient(hidden, weight, dtype, *(grad and need for need in ctx.needs_input_grad[:2]))
        models = 1 if ref_hidden is None else 2
        out, ref_out = [room(hidden, weight, dtype, models) for _ in range(models)] + [None] * (2 - models)
        for rows in chunks(len(hidden), len(weight), models):
            logp, target = log_softmax(hidden[rows], weight, dtype, out), targets[rows, None]   # (s, V)
            found.append(logp.gather(1, target).squeeze(1))
            f = factor[rows, None].to(logp.dtype)
            if ref_hidden is None:
                d = logp.exp_().mul_(-f).scatter_add_(1, target, f)
            else:   # in place, chunks are large
                s = log_softmax(ref_hidden[rows], ref_weight, dtype, ref_out)
                torch.sub(logp, s, out=s).mul_(beta).sigmoid_().scatter_(1, target, 0.0)
                regularizer.append(s.sum(1) / (s.size(1) - 1))
                # d is the gradient at the log-probabilities, and one line on at the logits
                d = s.addcmul_(s, s, value=-1).mul_(share[rows, None] * beta / (s.size(1) - 1)).scatter_(1, target, f)
                d.addcmul_(logp.exp_(), d.sum(1, keepdim=True), value=-1)
            sums.add(rows, d)
        ctx.save_for_backward(sums.hidden, sums.weight)
        total = (factor * torch.cat(found)).sum()
        if ref_hidden is None:
            return total, None
        regularizer = torch.cat(regularizer)
        ctx.mark_non_differentiable(regularizer)
        return total + (share * regularizer).sum(), regularizer

    @staticmethod
    def backward(ctx, grad, *_):
        return *(g if g is None else g.mul_(grad) for g in ctx.saved_tensors), *(None,) * 7


def sft_loss(hidden, weight, targets, normaliser):
    """Negative log-likelihood over a micro-batch, divided by `normaliser`: the number of scored tokens of the *whole*
    accumulated step. A mean of micro-batch means would weigh the tokens of short micro-batches more. The same as
    F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum") / normaliser."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    factor = torch.full(targets.shape, -1 / normaliser, dtype=wide, device=hidden.device)
    return _Weighted.apply(hidden, weight, targets, factor, None, None, None, None, torch.is_grad_enabled())[0]


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, label_smoothing=0.0):
    """Direct preference optimisation (Rafailov et al. 2023, Eq. 7). All arguments and results (B,).

    L = -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h), h = (log pi - log ref)(chosen) - (log pi - log ref)(rejected);
    the margin is beta h. At eps = 0 the gradient at chosen's log pi is -beta sigmoid(-margin), at rejected's the opposite:
    pairs that are ranked right count less. eps > 0 allows for labels that are wrong that often; elsewhere this is called
    "conservative DPO", which is not the CDPO below.
    Returns losses, and without a gradient the chosen and the rejected rewards; a reward is beta (log pi - log ref).
    """
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)
    margin = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def cdpo_regularizer(logp, ref_logp, targets, beta):
    """CDPO's R_t, Eq. 3 of "Efficiently tuning GPT-2", for log-probabilities (S, V) of both models at the same positions:

        R_t = 1/(V-1) sum over v != y_t of sigmoid(beta (log pi(v|c) - log ref(v|c)))

    (S,), each in (0, 1), and 1/2 where the models agree; c is all that stands before y_t. It lowers pi, against ref, on all
    tokens but the target, and is not smallest where the two agree (RESULTS.md, CDPO). No log is taken of the sigmoid. The report
    does not say what the C stands for.
    """
    s = torch.sigmoid(beta * (logp - ref_logp))
    return (s.sum(1) - s.gather(1, targets[:, None]).squeeze(1)) / (logp.size(1) - 1)


class _Shared(torch.autograd.Function):
    """The losses (B,), with the gradient of `total`, which is linear in the log-probabilities with L_DPO's derivatives as
    factors: it has the gradient of their sum, and another value."""

    @staticmethod
    def forward(ctx, losses, total):
        return losses.clone()

    @staticmethod
    def backward(ctx, grad):
        if grad.stride(0) and not (grad == grad[0]).all():   # stride 0: one number for all, as sum() and mean() hand it on
            raise ValueError("cdpo_loss: only a multiple of the losses' sum can be differentiated, such as their mean")
        return None, grad[0]


def cdpo_loss(hidden, weight, targets, owner, ref_hidden, ref_weight, ref_logps, beta, gamma):
    """L = L_DPO + gamma R (Eq. 4), R the mean over the two responses of the mean over each one's tokens of R_t. How positions and
    responses combine is our choice, since the paper leaves it open.

    hidden, ref_hidden (S, C); weight, ref_weight (V, C); targets, owner (S,); ref_logps (2B,). Returns losses (B,), and without a
    gradient regularizer (B,) and logps (2B,). Only a multiple of losses.sum() can be differentiated: the gradient is computed
    here, in two phases. The first finds the responses' log-probabilities and with them each one's factor in L_DPO's gradient; in
    the second, which alone needs the reference's hidden states, all is known.
    """
    n = len(ref_logps)
    with torch.no_grad():
        logps = sequence_logps(token_logps(hidden, weight, targets, models=2), owner, n)   # in chunks as small as phase two's
    with torch.enable_grad():
        leaf = logps.requires_grad_()
        losses, _, _ = dpo_loss(*leaf.chunk(2), *ref_logps.chunk(2), beta)
        factor, = torch.autograd.grad(losses.sum(), leaf)
    lengths = sequence_logps(torch.ones_like(owner, dtype=logps.dtype), owner, n)   # to take the mean over a response's tokens
    total, r = _Weighted.apply(hidden, weight, targets, factor[owner], ref_hidden, ref_weight, (gamma / 2 / lengths)[owner],
                                  beta, torch.is_grad_enabled())
    regularizer = (sequence_logps(r, owner, n) / lengths).view(2, -1).mean(0)
    return _Shared.apply(losses.detach() + gamma * regularizer, total), regularizer, logps.detach()


def reward_loss(chosen_rewards, rejected_rewards):
    """Bradley-Terry's -log sigmoid(r_chosen - r_rejected), (B,): the surprise at the chosen one being preferred."""
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


def batch_rewards(model, batch):
    """The rewards of the dialogues of a data.reward_batch, (R,)."""
    if not model.likelihood:
        return model.rewards(model.hidden(batch.tokens, batch.packing, batch.ends))
    hidden, head = model.hidden_and_head(batch.tokens, batch.packing, torch.cat((batch.score_at, batch.ends)))
    scored, last = hidden.split((len(batch.targets), batch.responses))
    return model.rewards(last, response_logps(scored, head, batch))

# ----------------------------------------------------------------------------------------------------------------------
# what is reported

def wins(a, b, slack=0.0):
    """1 where a > b, 0 where a < b, 1/2 at a tie, |a - b| <= slack. (B,)"""
    return torch.where((a - b).abs() <= slack, 0.5, (a > b).float())


def reward_wins(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps):
    """Whether the implicit reward prefers the chosen response, (B,) of 1, 0 or 1/2. A matrix product is not bitwise the same at
    another batch shape, so a tie is |h| <= 1e-6 of the largest log-probability, 1e-2 where autocast ran in half precision."""
    every = torch.stack((policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps))
    half = torch.is_autocast_enabled(every.device.type)
    slack = every.abs().amax(0) * (1e-2 if half else 1e-6)
    return wins(every[0] - every[2], every[1] - every[3], slack)


@torch.no_grad()
def divergences(hidden, weight, ref_hidden, ref_weight, targets, beta):
    """How two models differ at the same positions, over the whole vocabulary, each (S,): entropy of pi, KL(pi || ref) and
    KL(ref || pi) in nats, and CDPO's R_t."""
    dtype, found = matmul_dtype(hidden, weight), []
    out, ref_out = (room(hidden, weight, dtype, models=2) for _ in range(2))
    for rows in chunks(len(hidden), len(weight), models=2):
        logp, ref_logp = log_softmax(hidden[rows], weight, dtype, out), log_softmax(ref_hidden[rows], ref_weight, dtype, ref_out)
        p, ratio = logp.exp(), logp - ref_logp
        found.append((-(p * logp).sum(1), (p * ratio).sum(1), -(ref_logp.exp() * ratio).sum(1),
                      cdpo_regularizer(logp, ref_logp, targets[rows], beta)))
    return tuple(torch.cat(parts) for parts in zip(*found))
