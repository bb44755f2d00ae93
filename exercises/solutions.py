"""
What is the matter with the snippets of bugs.py, and the same mended. For teachers: blank.py leaves this file out of its copies.

    python exercises/solutions.py     # the symptoms once more, with these: each number is the expected one
"""
import copy

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import bugs   # puts the repository on the path
import losses


def pair_labels(prompts, chosen, rejected):
    """The loop went over B prompts, and there are 2B rows: the prompts of the rejected half stayed in the labels. Their tokens
    count as a part of the rejected response, and DPO makes them unlikely. At policy = reference the loss is log 2 all the
    same."""
    rows = [torch.tensor(p + r) for p, r in zip(prompts + prompts, chosen + rejected)]
    ids = pad_sequence(rows, batch_first=True)
    labels = pad_sequence(rows, batch_first=True, padding_value=-100)
    for row, prompt in zip(labels, prompts + prompts):
        row[:len(prompt)] = -100
    return ids, labels


def sft_labels(prompts, responses):
    """Padding was found by its id, and the end-of-text that closes a response has the same one: no label ever said stop. What
    is padding is known from the lengths alone."""
    rows = [torch.tensor(p + r) for p, r in zip(prompts, responses)]
    ids = pad_sequence(rows, batch_first=True, padding_value=bugs.EOT)
    labels = pad_sequence(rows, batch_first=True, padding_value=-100)
    for row, prompt in zip(labels, prompts):
        row[:len(prompt)] = -100
    return ids, labels


def response_logp(logits, ids, start):
    """The shift was right, and the start was not shifted along: the response's first token, which the logits at start - 1 are
    for, was left out."""
    logp = logits[start - 1:-1].log_softmax(1)
    return logp.gather(1, ids[start:, None]).sum()


def sequence_logps(logp, mask):
    """The logarithm of a product is a sum, and a mean was taken: the token of a long response counted less than that of a short
    one, and a length-normalised DPO (others mean it, and call it by another name) came out."""
    return (logp * mask).sum(1)


def dpo_loss(policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp, beta):
    """log sigmoid was taken of each place by itself and then averaged. The responses' tokens at the same place have nothing to
    do with each other, and padding put log 2 into the mean. The sum over tokens comes first: the preference is between
    responses."""
    margin = (policy_chosen_logp - ref_chosen_logp).sum(1) - (policy_rejected_logp - ref_rejected_logp).sum(1)
    return -F.logsigmoid(beta * margin)


class Adapter(nn.Module):
    """alpha was not divided by r: the sum over r rows grows with r, and so a rate tuned at one rank is too large at the
    next."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features ** 0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + self.scale * x @ self.A.T @ self.B.T


def frozen_reference(model):
    """A copy is in the mode of its original, and this one was training: dropout drew anew at every look, and the reference was
    another one each time. requires_grad has nothing to do with it."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def accumulate(model, batches):
    """Each micro-batch's mean had the same weight, so that a token counted more the fewer there were beside it. All are divided
    by the tokens of all."""
    scored = sum(len(batch.targets) for batch in batches)
    for batch in batches:
        losses.sft_loss(*batch.hidden_and_head(model), batch.targets, scored).backward()


class FoldingAdapter(nn.Module):
    """eval() added the adapter every time it was called, also when it was in the weight already, and train() took it out of a
    weight in which it was not; whoever calls eval() inside an evaluation trains on another model from then on. Here the layer
    knows which it is. Still: a weight plus a number minus a number is not bitwise the weight, in half precision by much, and B
    may change in between; so lora.merge is a call of its own that is made once, at the end."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale, self.folded = base.requires_grad_(False), alpha / rank, False
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features ** 0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        y = self.base(x)
        return y if self.folded else y + self.scale * x @ self.A.T @ self.B.T

    def train(self, mode=True):
        super().train(mode)
        if self.folded == mode:   # in training it is out, else in
            with torch.no_grad():
                self.base.weight += (-1 if mode else 1) * self.scale * self.B @ self.A
            self.folded = not mode
        return self


class Lion(torch.optim.Optimizer):
    """Decay stood inside the sign, which forgets its size: a weight whose gradient is small went to zero at the full rate,
    whatever the decay was. Decoupled decay is a factor on the weight."""

    def __init__(self, params, lr, betas=(0.95, 0.98), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                u = torch.sign(b1 * m + (1 - b1) * p.grad)
                m.mul_(b2).add_(p.grad, alpha=1 - b2)
                p.mul_(1 - lr * group["weight_decay"]).sub_(lr * u)


class AdamWPMA(bugs.AdamWPMA):
    """m_hat and v_hat are made anew at every step, and the factor K was put on them when they had been used. It belongs to the
    moments, which go on: a period's small steps leave 1/K of them. The report's listing has it so, too; its text is right."""

    @torch.no_grad()
    def step(self):
        super().step()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                s, K = self.state[p], group["period"]
                t = s["t"] - 1   # of the step just taken
                if t > 0 and t % K == 0:
                    s["m"].mul_(K)
                    s["v"].mul_(K)


SOLUTIONS = {name: globals()[name] for name in bugs.BUGS}
STEP_0 = """
Where policy and reference are one model, DPO's loss is log 2 whatever is done to its inputs: pair_labels, response_logp,
sequence_logps, dpo_loss, Adapter and FoldingAdapter start there all the same, and only frozen_reference shows itself. Another
number at step 0 finds two more: with random weights a response's log-prob is about -log V times its number of tokens, of which
response_logp lacks one and which sequence_logps divides."""


if __name__ == "__main__":
    bugs.table(SOLUTIONS)
    print(STEP_0)
