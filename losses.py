"""
From hidden states to losses. Pure functions on tensors: no model, no config, no device moves.

Everything starts at one function, token_logps: the log-probability of each target given its hidden state. It meets only the
rows that are scored, a chunk of them at a time, and computes each chunk's logits again in the backward pass, so that a
matrix of (tokens, 50257) never exists as a whole. SFT, DPO and CDPO are a few lines on top of it.

Shapes: S scored positions, C channels, V vocabulary, B pairs. `owner` (S,) says which of the 2B responses a position belongs
to; the B chosen ones come first, then the B rejected ones. "logp" is of a token, "logps" of a whole response.
"""
import torch
from torch.nn import functional as F

CHUNK = 6_000_000   # logits per chunk: 24 MB in fp32. Above 32 MB glibc maps each buffer anew, which costs more than the product


class _Head(torch.autograd.Function):
    """(S, C) hidden states -> (S,) log-probabilities of the targets and, given a frozen reference, CDPO's R_t (S,).

    forward keeps only its inputs; backward goes over the chunks again. With f a chunk's loss and d = df / dlogp (s, V), the
    gradient at the logits is d - softmax * (sum of d over the vocabulary), since logp = z - logsumexp(z).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, ref_hidden, ref_weight, beta):
        ctx.save_for_backward(hidden, weight, targets, ref_hidden, ref_weight)
        ctx.beta, ctx.matmul_dtype = beta, matmul_dtype(hidden, weight)
        logp_of_target, regularizer = [], []
        for rows in chunks(len(hidden), len(weight)):
            logp = log_softmax(hidden[rows], weight, ctx.matmul_dtype)   # (s, V)
            logp_of_target.append(logp.gather(1, targets[rows, None]).squeeze(1))
            if ref_hidden is not None:
                ref_logp = log_softmax(ref_hidden[rows], ref_weight, ctx.matmul_dtype)
                regularizer.append(cdpo_regularizer(logp, ref_logp, targets[rows], beta))
        return torch.cat(logp_of_target), torch.cat(regularizer) if regularizer else None

    @staticmethod
    def backward(ctx, grad_logp, grad_regularizer):
        hidden, weight, targets, ref_hidden, ref_weight = ctx.saved_tensors
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight) if want_weight else None
        for rows in chunks(len(hidden), len(weight)):
            logp, target = log_softmax(hidden[rows], weight, ctx.matmul_dtype), targets[rows, None]
            if ref_hidden is None:
                d = torch.zeros_like(logp)
            else:   # d sigmoid(beta x) / dx = beta s (1 - s), at every token but the realised one; in place, chunks are large
                ref_logp = log_softmax(ref_hidden[rows], ref_weight, ctx.matmul_dtype)
                d = torch.sub(logp, ref_logp, out=ref_logp).mul_(ctx.beta).sigmoid_()   # s
                d.addcmul_(d, d, value=-1).mul_(grad_regularizer[rows, None] * ctx.beta / (logp.size(1) - 1))
                d.scatter_(1, target, 0.0)
            d.scatter_add_(1, target, grad_logp[rows, None])
            d.addcmul_(logp.exp_(), d.sum(1, keepdim=True), value=-1)
            d = d.to(ctx.matmul_dtype)
            if want_hidden:
                grad_hidden[rows] = (d @ weight.to(d.dtype)).to(hidden.dtype)
            if want_weight and d.dtype == weight.dtype:
                grad_weight.addmm_(d.T, hidden[rows].to(d.dtype))   # in place: no second (V, C)
            elif want_weight:
                grad_weight += d.T @ hidden[rows].to(d.dtype)       # half-precision product, full-precision sum
        return grad_hidden, grad_weight, None, None, None, None


def chunks(n, vocabulary):
    size = max(1, CHUNK // vocabulary)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def matmul_dtype(hidden, weight):
    """What a matrix product here runs in: autocast's dtype where that is on, else the widest of the two."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def log_softmax(hidden, weight, dtype):
    """(s, C), (V, C) -> (s, V) log-probabilities: half types go up to fp32 after the product, fp64 stays."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.to(dtype), weight.to(dtype))
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(dtype, torch.float32))


def token_logps(hidden, weight, targets):
    """hidden (S, C), weight (V, C), targets (S,) -> (S,) log-probability of each target. The shift by one is the caller's:
    hidden[i] is the state *before* targets[i] (data.Batch does it, in one place)."""
    if not len(hidden) == len(targets):
        raise ValueError(f"{len(hidden)} hidden states for {len(targets)} targets")
    return _Head.apply(hidden, weight, targets, None, None, None)[0]


def sequence_logps(logps, owner, n):
    """Token log-probabilities (S,) summed, not averaged, over each of n responses: (n,) (FORMULAS section 1)."""
    return torch.zeros(n, dtype=logps.dtype, device=logps.device).index_add(0, owner, logps)


def response_logps(hidden, weight, batch):
    """The log-probability of each response of a data.Batch, (R,), given the hidden states at its scored places."""
    return sequence_logps(token_logps(hidden, weight, batch.targets), batch.owner, batch.responses)


def batch_logps(model, batch):
    """The same from the model."""
    return response_logps(batch.pick(model.hidden(batch.tokens)), model.wte.weight, batch)


def sft_loss(hidden, weight, targets, normaliser):
    """Negative log-likelihood over a micro-batch, divided by `normaliser`: the number of scored tokens of the *whole*
    accumulated step. A mean of micro-batch means would weigh the tokens of short micro-batches more."""
    return -token_logps(hidden, weight, targets).sum() / normaliser


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, label_smoothing=0.0):
    """Direct preference optimisation (Rafailov et al. 2023, Eq. 7). All arguments and results (B,).

    L = -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h), h the difference of the two log-ratios. eps > 0 allows
    for labels that are wrong that often; elsewhere this is called "conservative DPO", which is not the CDPO below.
    Returns losses, chosen rewards and rejected rewards; a reward is beta (log pi - log ref).
    """
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)
    margin = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def cdpo_regularizer(logp, ref_logp, targets, beta):
    """CDPO's R_t, Eq. 3 of "Efficiently tuning GPT-2", for log-probabilities (S, V) of both models at the same positions:

        R_t = 1/(V-1) sum over v != y_t of sigmoid(beta (log pi(v|c) - log ref(v|c)))

    (S,), each in (0, 1), and 1/2 where the models agree. No log is taken of the sigmoid.
    """
    s = torch.sigmoid(beta * (logp - ref_logp))
    return (s.sum(1) - s.gather(1, targets[:, None]).squeeze(1)) / (logp.size(1) - 1)


def cdpo_loss(hidden, weight, targets, owner, ref_hidden, ref_weight, ref_logps, beta, gamma):
    """L = L_DPO + gamma R (Eq. 4), R the mean over the two responses of the mean over each one's tokens of R_t. The paper
    leaves open how positions and responses combine; FORMULAS section 4 says what our choice means.

    hidden, ref_hidden (S, C); weight, ref_weight (V, C); targets, owner (S,); ref_logps (2B,).
    Returns losses (B,), regularizer (B,), logps (2B,).
    """
    n = len(ref_logps)
    logp, r = _Head.apply(hidden, weight, targets, ref_hidden, ref_weight, beta)
    logps = sequence_logps(logp, owner, n)
    lengths = torch.bincount(owner, minlength=n)
    regularizer = (sequence_logps(r, owner, n) / lengths).view(2, -1).mean(0)
    losses, _, _ = dpo_loss(*logps.chunk(2), *ref_logps.chunk(2), beta)
    return losses + gamma * regularizer, regularizer, logps


def reward_loss(chosen_rewards, rejected_rewards):
    """Bradley-Terry's -log sigmoid(r_w - r_l), (B,): the surprise at the chosen one being preferred (FORMULAS section 5)."""
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


def batch_rewards(model, batch):
    """The rewards of the dialogues of a data.reward_batch, (R,)."""
    hidden = model.hidden(batch.tokens)
    logps = response_logps(batch.pick(hidden), model.wte.weight, batch) if model.likelihood else None
    return model.rewards(batch.last(hidden), logps)


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
    for rows in chunks(len(hidden), len(weight)):
        logp, ref_logp = log_softmax(hidden[rows], weight, dtype), log_softmax(ref_hidden[rows], ref_weight, dtype)
        p, ratio = logp.exp(), logp - ref_logp
        found.append((-(p * logp).sum(1), (p * ratio).sum(1), -(ref_logp.exp() * ratio).sum(1),
                      cdpo_regularizer(logp, ref_logp, targets[rows], beta)))
    return tuple(torch.cat(parts) for parts in zip(*found))
