"""
Eleven snippets that are wrong, of kinds that stand in public repositories. A docstring says what its snippet claims to do, not
what is the matter with it. Beside each stands symptom_...(), which runs it and the right one of this repository.

    python exercises/bugs.py                  # the symptoms as a table, and the picture runs/bugs/bugs.png; 20 seconds
    python exercises/bugs.py --own mine.py    # the same of those that you have mended, in a file of yours, under their names

The exercise: explain each symptom from the code, and mend the snippet. Most of them train without an error, and with a loss that
falls. The answers are in solutions.py.
"""
import argparse
import copy
import functools
import runpy
import sys
from pathlib import Path

import torch
import torch.nn as nn
from matplotlib.ticker import MaxNLocator
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

# puts the repository on the path
from oracles import CHECKS, EOT, dialogues, mini, our_adapter, pairs, right_labels, right_pair_labels, right_reference, tuned

import data
import losses
import optim
import plots


def logp_of(model, ids, labels):
    """Of every label its log-probability, 0 where it is -100: (B, T-1). All logits at once, as most repositories do it."""
    logp = F.cross_entropy(model(ids)[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return -logp

# ----------------------------------------------------------------------------------------------------------------------
# 1  the labels of a pair

def pair_labels(prompts, chosen, rejected):
    """B prompts and their responses, lists of ids -> ids and labels (2B, T), the chosen dialogues first, padded on the right. A
    label is -100 where the token is not scored: on prompts and on padding."""
    rows = [torch.tensor(p + r) for p, r in zip(prompts + prompts, chosen + rejected)]
    ids = pad_sequence(rows, batch_first=True)
    labels = pad_sequence(rows, batch_first=True, padding_value=-100)
    for row, prompt in zip(labels, prompts):
        row[:len(prompt)] = -100
    return ids, labels


def symptom_pair_labels(own=pair_labels):
    _, labels = own(*dialogues(range(64)))
    batch = data.pair_batch(pairs(), range(64))
    return {"scored tokens of a rejected response": (labels[64:] != -100).sum().item() / 64,
            "expected": batch.lengths[64:].double().mean().item()}



def prompt_under_dpo(labels_of, steps):
    """The mean log-probability of a held-out prompt's tokens while DPO trains, from an SFT model."""
    policy, reference = copy.deepcopy(tuned()), tuned()
    optimizer, found = torch.optim.AdamW(policy.parameters(), 1e-4), []
    prompts, _, _ = dialogues(range(360, 376))
    held, labels_of_held = right_labels([p[:1] for p in prompts], [p[1:] for p in prompts])
    for step in range(steps + 1):
        ids, labels = labels_of(*dialogues(range(8 * step, 8 * step + 8)))
        with torch.no_grad():
            found.append((logp_of(policy, held, labels_of_held).sum() / (labels_of_held[:, 1:] != -100).sum()).item())
            ref_logps = logp_of(reference, ids, labels).sum(1)
        logps = logp_of(policy, ids, labels).sum(1)
        loss, _, _ = losses.dpo_loss(*logps.chunk(2), *ref_logps.chunk(2), 0.5)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return found

# ----------------------------------------------------------------------------------------------------------------------
# 2  the labels of SFT

def sft_labels(prompts, responses):
    """Prompts and responses, lists of ids, each response closed by end-of-text -> ids and labels (B, T). GPT-2 has no token for
    padding, so end-of-text pads. A label is -100 where the token is not scored: on prompts and on padding."""
    ids = pad_sequence([torch.tensor(p + r) for p, r in zip(prompts, responses)], batch_first=True, padding_value=EOT)
    labels = ids.masked_fill(ids == EOT, -100)
    for row, prompt in zip(labels, prompts):
        row[:len(prompt)] = -100
    return ids, labels


@functools.lru_cache
def ends(labels_of, steps, every=1):
    """[(step, probability of end-of-text behind a held-out answer)] while a mini model trains with these labels."""
    model, found = mini(), []
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    prompts, responses, _ = dialogues(range(360, 376))
    held, last = right_labels(prompts, responses)[0], torch.tensor([len(p) + len(r) - 2 for p, r in zip(prompts, responses)])
    for step in range(steps + 1):
        if step % every == 0:
            with torch.no_grad():
                found.append((step, model(held)[range(16), last].softmax(1)[:, EOT].mean().item()))
        prompts, responses, _ = dialogues(range(8 * step, 8 * step + 8))
        ids, labels = labels_of(prompts, responses)
        optimizer.zero_grad()
        (-logp_of(model, ids, labels).sum() / (labels[:, 1:] != -100).sum()).backward()
        optimizer.step()
    return found


def symptom_sft_labels(own=sft_labels):
    return {"P(end-of-text) behind an answer, 10 steps of SFT": ends(own, 10, every=10)[-1][1],
            "expected": ends(right_labels, 10, every=10)[-1][1]}

# ----------------------------------------------------------------------------------------------------------------------
# 3  the log-probability of a response

def response_logp(logits, ids, start):
    """log pi(response | prompt) of one dialogue, summed over the response's tokens. logits (T, V) and ids (T,) of prompt and
    response; ids[start] is the response's first token."""
    logp = logits[start:-1].log_softmax(1)                       # the logits at a place are for the token behind it
    return logp.gather(1, ids[start + 1:, None]).sum()


@torch.no_grad()
def symptom_response_logp(own=response_logp):
    model, (prompt, chosen, _) = mini(), pairs()[0]
    ids = torch.tensor([*prompt, *chosen].copy()).long()
    return {f"log pi of a response of {len(chosen)} tokens": own(model(ids[None])[0], ids, len(prompt)).item(),
            "expected": losses.batch_logps(model, data.sft_batch(pairs(), [0])).item()}

# ----------------------------------------------------------------------------------------------------------------------
# 4  from tokens to responses

def sequence_logps(logp, mask):
    """log pi(response | prompt), (B,), for DPO: of the log-probabilities of tokens (B, T) those that mask (B, T) says belong to
    the response."""
    return (logp * mask).sum(1) / mask.sum(1)


def symptom_sequence_logps(own=sequence_logps):
    """A chosen response of 20 tokens beside a rejected one of 5. Every token has the same probability."""
    logp = torch.full((2, 20), -1.0, requires_grad=True)
    mask = (torch.arange(20) < torch.tensor([[20], [5]])).float()

    def ratio(logps):
        loss, _, _ = losses.dpo_loss(*logps.chunk(2), *logps.detach().chunk(2), 0.1)
        g, = torch.autograd.grad(loss.sum(), logp)
        return (g[0, 0] / -g[1, 0]).item()
    owner = mask.nonzero()[:, 0]
    return {"pull on a token of 20, over that on one of 5": ratio(own(logp, mask)),
            "expected": ratio(losses.sequence_logps(logp[mask.bool()], owner, 2))}

# ----------------------------------------------------------------------------------------------------------------------
# 5  the loss of DPO

def dpo_loss(policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp, beta):
    """DPO's loss (Rafailov et al. 2023, Eq. 7), (B,), from the log-probabilities of the responses' tokens, (B, T) each, 0 at
    padding."""
    margin = (policy_chosen_logp - ref_chosen_logp) - (policy_rejected_logp - ref_rejected_logp)
    return -F.logsigmoid(beta * margin).mean(1)


def symptom_dpo_loss(own=dpo_loss):
    """Each of the 8 tokens of the chosen response is half a nat likelier than to the reference."""
    reference = torch.full((1, 8), -2.0)
    four = (reference + 0.5, reference, reference, reference)
    return {"DPO loss at a margin of 4": own(*four, 1.0).item(),
            "expected": losses.dpo_loss(*(x.sum(1) for x in four), 1.0)[0].item()}

# ----------------------------------------------------------------------------------------------------------------------
# 6  LoRA

class Adapter(nn.Module):
    """LoRA (Hu et al. 2021) beside a frozen linear layer: W x + (alpha / r) B A x."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.alpha = base.requires_grad_(False), alpha
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features ** 0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + self.alpha * x @ self.A.T @ self.B.T


def first_step(make, rank):
    """How far a layer's output for one input moves at one step of Adam, alpha 16; mean over 20 draws."""
    moved = 0
    for seed in range(20):
        torch.manual_seed(seed)
        layer, x, target = make(nn.Linear(128, 128), rank, 16), torch.randn(1, 128), torch.randn(1, 128)
        optimizer = torch.optim.Adam([layer.A, layer.B], 1e-4)
        before = layer(x)
        (before - target).square().mean().backward()
        optimizer.step()
        moved += (layer(x) - before).square().mean().sqrt().item() / 20
    return moved


def symptom_adapter(own=Adapter):
    return {"first step at rank 64, over that at rank 4": first_step(own, 64) / first_step(own, 4),
            "expected": first_step(our_adapter, 64) / first_step(our_adapter, 4)}

# ----------------------------------------------------------------------------------------------------------------------
# 7  the reference

def frozen_reference(model):
    """The reference of a DPO run: the SFT model as it is now, which no step will change."""
    return copy.deepcopy(model).requires_grad_(False)



@torch.no_grad()
def first_rewards(make):
    """DPO's losses and margins of 64 pairs before the first step, after SFT with dropout 0.1."""
    model = mini(dropout=0.1)
    model.load_state_dict(mini().state_dict())
    reference = make(model.train())
    policy = copy.deepcopy(model).eval()
    batch = data.pair_batch(pairs(), range(64))
    logps, ref_logps = losses.batch_logps(policy, batch), losses.batch_logps(reference, batch)
    loss, chosen, rejected = losses.dpo_loss(*logps.chunk(2), *ref_logps.chunk(2), 0.5)
    return loss, chosen - rejected


def symptom_frozen_reference(own=frozen_reference):
    return {"DPO loss before the first step": first_rewards(own)[0].mean().item(),
            "expected": first_rewards(right_reference)[0].mean().item()}

# ----------------------------------------------------------------------------------------------------------------------
# 8  accumulation

def accumulate(model, batches):
    """Leave in the parameters the gradient that one large batch of all these micro-batches' dialogues would have; the loss is the
    mean over scored tokens."""
    for batch in batches:
        loss = losses.sft_loss(*batch.hidden_and_head(model), batch.targets, len(batch.targets))
        (loss / len(batches)).backward()


def symptom_accumulate(own=accumulate):
    """Four micro-batches of four dialogues, from the ones with the shortest to the ones with the longest answers."""
    rows = pairs().lengths()[:, 1].argsort()[::25].reshape(4, 4).tolist()

    def gradient(take, micro_batches):
        model = mini()
        take(model, [data.sft_batch(pairs(), r) for r in micro_batches])
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    one = gradient(accumulate, [sum(rows, [])])   # a single batch, where there is nothing to weigh
    return {"distance from the large batch's gradient": ((gradient(own, rows) - one).norm() / one.norm()).item(), "expected": 0.0}

# ----------------------------------------------------------------------------------------------------------------------
# 9  merging

class FoldingAdapter(nn.Module):
    """LoRA that costs nothing where nothing is trained: eval() adds the adapter to the frozen weight, train() takes it out."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features ** 0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        y = self.base(x)
        return y + self.scale * x @ self.A.T @ self.B.T if self.training else y

    def train(self, mode=True):
        super().train(mode)
        with torch.no_grad():
            self.base.weight += (-1 if mode else 1) * self.scale * self.B @ self.A
        return self


def adapted(make):
    """The SFT model with adapters that have learned something, to be trained on."""
    model, layers = copy.deepcopy(tuned()), []
    torch.manual_seed(1)
    for block in model.h:
        for parent, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")):
            layers.append(make(getattr(parent, name), 8, 16))
            setattr(parent, name, layers[-1])
    model.train()
    for layer in layers:
        nn.init.normal_(layer.B, std=0.01)
    return model


def loss_after_evaluations(make, cycles=8):
    """Held-out loss of an adapted model, no step of training in between. An evaluation is eval(), some answers by generate, which
    calls eval() too, and train()."""
    model, batch, found = adapted(make), data.sft_batch(pairs(), range(352, 400)), []
    for _ in range(cycles + 1):
        with torch.no_grad():
            found.append(losses.sft_loss(*batch.hidden_and_head(model), batch.targets, len(batch.targets)).item())
        model.eval()
        model.generate([pairs()[0][0]], 2, temperature=0)
        model.train()
    return found


def symptom_folding_adapter(own=FoldingAdapter):
    return {"held-out loss after 4 evaluations": loss_after_evaluations(own, 4)[-1],
            "expected": loss_after_evaluations(our_adapter, 4)[-1]}

# ----------------------------------------------------------------------------------------------------------------------
# 10  Lion

class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, algorithm 2), with decoupled weight decay."""

    def __init__(self, params, lr, betas=(0.95, 0.98), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                u = torch.sign(b1 * m + (1 - b1) * p.grad + group["weight_decay"] * p)
                m.mul_(b2).add_(p.grad, alpha=1 - b2)
                p.sub_(lr * u)


def symptom_lion(own=Lion):
    """One weight of 1, whose gradient is 0."""
    found = []
    for kind in (own, optim.Lion):
        p = nn.Parameter(torch.ones(1, 1))
        optimizer = kind([p], lr=1e-3, weight_decay=0.1)
        for _ in range(100):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        found.append(p.item())
    return dict(zip(("an unused weight of 1 after 100 steps", "expected"), found))

# ----------------------------------------------------------------------------------------------------------------------
# 11  AdamW-PMA

class AdamWPMA(torch.optim.Optimizer):
    """AdamW-PMA (001_..., algorithm 1): a step with every micro-batch's gradient. At the end of a period of K of them the moment
    m is the one that AdamW has which accumulates over the same K."""

    def __init__(self, params, lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, period=1):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "period": period})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), K = group["betas"], group["period"]
            for p in (p for p in group["params"] if p.grad is not None):
                s = self.state[p]
                if not s:
                    s.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                t, m, v = s["t"], s["m"], s["v"]
                (a1, c1, _), (a2, c2, _) = (optim.periodical(group, t, b, K) for b in (b1, b2))   # these are right
                lr, one, two = (optim.AdamWPMA.step_size(self, group, t),
                                *(optim.AdamWPMA.correction(self, group, t, b) for b in (b1, b2)))
                m.mul_(a1).add_(p.grad, alpha=c1)
                v.mul_(a2).addcmul_(p.grad, p.grad, value=c2)
                m_hat, v_hat = m / one, v / two
                p.mul_(1 - lr * group["weight_decay"]).sub_(lr * m_hat / (v_hat.sqrt() + group["eps"]))
                if optim.is_large(group, t):
                    m_hat, v_hat = K * m_hat, K * v_hat
                s["t"] += 1


def moments(kind, periods, K=8):
    """m at the end of each of so many periods, where every gradient is 1."""
    p, found = nn.Parameter(torch.zeros(1)), []
    optimizer = kind([p], lr=1e-3, betas=(0.9, 0.99), period=K)
    for _ in range(periods):
        for _ in range(K):
            p.grad = torch.ones_like(p)
            optimizer.step()
        state = optimizer.state[p]
        found.append(state["m"].item() * state.get("weights", (1.0,))[0])   # optim.py keeps m as a mean and its weight
    return found


def symptom_adamw_pma(own=AdamWPMA):
    return {"m after 10 periods of gradients of 1": moments(own, 10)[-1], "expected": moments(optim.AdamWPMA, 10)[-1]}

# ----------------------------------------------------------------------------------------------------------------------

BUGS = {   # name of the snippet -> the function that shows its symptom
    "pair_labels": symptom_pair_labels, "sft_labels": symptom_sft_labels, "response_logp": symptom_response_logp,
    "sequence_logps": symptom_sequence_logps, "dpo_loss": symptom_dpo_loss, "Adapter": symptom_adapter,
    "frozen_reference": symptom_frozen_reference, "accumulate": symptom_accumulate, "FoldingAdapter": symptom_folding_adapter,
    "Lion": symptom_lion, "AdamWPMA": symptom_adamw_pma}


def judged(name, own):
    """(what the symptom is, found, expected, what is to be said of it)"""
    torch.manual_seed(2)
    (what, found), (_, expected) = BUGS[name](own).items()
    gone = abs(found - expected) <= 1e-4 * abs(expected) + 1e-6
    return what, found, expected, "" if not gone else "right" if CHECKS[name](own) else "wrong elsewhere"


def table(snippets):
    """Returns whether all are right."""
    print(f"{'snippet':<17} {'symptom':<50} {'found':>9} {'expected':>9}")
    right = True
    for name, snippet in snippets.items():
        try:
            what, found, expected, said = judged(name, snippet)
        except NotImplementedError as e:   # in the copy of an exercise
            print(f"{name:<17} needs the {e}")
            continue
        print(f"{name:<17} {what:<50} {found:>9.4f} {expected:>9.4f}  {said}".rstrip())
        right = right and said == "right"
    return right


def draw(path):
    """Six of them, the snippet beside the right one."""
    steps, ranks, periods = 15, [1, 2, 4, 8, 16, 32, 64], range(1, 21)
    panels = [   # name, title, x, y, (xs, ys) of the snippet and of the right one
        ("pair_labels", "DPO makes the questions unlikely", "step of DPO", "log-probability of a prompt's token",
         *((range(steps + 1), prompt_under_dpo(labels, steps)) for labels in (pair_labels, right_pair_labels))),
        ("sft_labels", "It never learns to stop", "step of SFT", "P(end-of-text) behind an answer",
         *(tuple(zip(*ends(labels, 20))) for labels in (sft_labels, right_labels))),
        ("Adapter", "The rank decides the step", "rank, alpha 16", "movement at one step of Adam",
         *((ranks, [first_step(make, rank) for rank in ranks]) for make in (Adapter, our_adapter))),
        ("frozen_reference", "Two equal models disagree", "pair, sorted", "DPO's margin before the first step",
         *((range(1, 65), first_rewards(make)[1].sort().values) for make in (frozen_reference, right_reference))),
        ("FoldingAdapter", "Looking at it makes it worse", "evaluations, without a step of training", "held-out loss",
         *((range(9), loss_after_evaluations(make)) for make in (FoldingAdapter, our_adapter))),
        ("AdamWPMA", "The moment never arrives", "periods of 8 gradients, all of them 1", "moment m at a period's end",
         *((periods, moments(kind, len(periods))) for kind in (AdamWPMA, optim.AdamWPMA)))]
    figure, axes = plots.canvas(columns=3, rows=2, height=7)
    for axis, (name, title, x, y, own, right) in zip(axes, panels):
        axis.plot(*own, color=plots.REJECTED, marker="o", markersize=3, label=f"the snippet {name}")
        axis.plot(*right, color=plots.HELD_OUT, marker="o", markersize=3, label="the right one")
        axis.set_title(title, fontsize=11)
        plots.finish(axis, x, y)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[2].set(xscale="log", yscale="log", xticks=ranks, xticklabels=ranks)
    axes[2].minorticks_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def refuse(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("--out", default="runs/bugs", help="folder of the picture")
    parser.add_argument("--own", metavar="FILE", help="judge the mended snippets in this file; status 1: not all are right")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)   # so small are the tensors that several would wait for each other
    if args.own:
        if not Path(args.own).is_file():
            refuse(f"--own: no file {args.own}")
        found = runpy.run_path(args.own, {key: value for key, value in globals().items() if not key.startswith("__")})
        own = {name: found[name] for name in BUGS if found[name] is not globals()[name]}
        if not own:
            refuse(f"--own: {args.own} has none of {', '.join(BUGS)}")
        return table(own)
    table({name: globals()[name] for name in BUGS})
    path = Path(args.out) / "bugs.png"
    try:
        draw(path)
        print(path)
    except NotImplementedError as e:
        print(f"no picture: it needs the {e}")
    return True


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1:]))
