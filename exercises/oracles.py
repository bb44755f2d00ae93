"""
What bugs.py stands on: its data and models; the right one beside a snippet; and what a mended snippet has to do beside losing its
symptom, check_...(own). Not to be read before you have mended yours.
"""
import copy
import functools
import sys
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402  (behind the path)
import lora  # noqa: E402
import losses  # noqa: E402
import model as gpt  # noqa: E402
import optim  # noqa: E402

EOT = 2047   # the mini model's end-of-text


@functools.lru_cache
def pairs():
    """The first 400 training pairs of minihh as tokens."""
    found, _ = data.load_pairs("minihh", ("train",))
    tokens, _ = data.encode(found["train"][:400], EOT + 1, 512)
    return tokens


def dialogues(rows):
    """Three lists of lists of ids: the prompts, the chosen and the rejected responses of these pairs."""
    return map(list, zip(*([part.tolist() for part in pairs()[i]] for i in rows)))


@functools.lru_cache
@torch.enable_grad()
def tuned(steps=40):
    """A mini model after some steps of SFT."""
    model = mini()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for step in range(steps):
        batch = data.sft_batch(pairs(), [(16 * step + i) % 352 for i in range(16)])
        optimizer.zero_grad()
        losses.sft_loss(*batch.hidden_and_head(model), batch.targets, len(batch.targets)).backward()
        optimizer.step()
    return model.eval()


def mini(seed=0, **sizes):
    torch.manual_seed(seed)
    return gpt.GPT(gpt.replace(gpt.SIZES["mini"], **sizes))

# ----------------------------------------------------------------------------------------------------------------------
# the right ones

def right_labels(prompts, responses):
    """What data.collate scores, as labels."""
    rows = [torch.tensor(p + r) for p, r in zip(prompts, responses)]
    scored = [torch.tensor([-100] * len(p) + r) for p, r in zip(prompts, responses)]
    return pad_sequence(rows, batch_first=True), pad_sequence(scored, batch_first=True, padding_value=-100)


def right_pair_labels(prompts, chosen, rejected):
    return right_labels(prompts + prompts, chosen + rejected)


def right_reference(model):
    return copy.deepcopy(model).eval()


def our_adapter(base, rank, alpha):
    return lora.LoRALinear(base, rank, alpha, 0.0)

# ----------------------------------------------------------------------------------------------------------------------
# checks

def check_pair_labels(own):
    return same_labels(own, right_pair_labels, *dialogues(range(64)))


def check_sft_labels(own):
    return same_labels(own, right_labels, *list(dialogues(range(64)))[:2])


def same_labels(own, right, prompts, *responses):
    """The same labels, and the dialogues' ids wherever there is no padding."""
    (ids, labels), (right_ids, scored) = own(prompts, *responses), right(prompts, *responses)
    lengths = [len(p) + len(r) for side in responses for p, r in zip(prompts, side)]
    return labels.equal(scored) and all(a[:n].equal(b[:n]) for a, b, n in zip(ids, right_ids, lengths))


@torch.no_grad()
def check_response_logp(own):
    expected = losses.batch_logps(tuned(), data.sft_batch(pairs(), range(8)))
    for row, logp in enumerate(expected):
        prompt, chosen, _ = pairs()[row]
        ids = torch.tensor([*prompt, *chosen]).long()
        if not torch.isclose(own(tuned()(ids[None])[0], ids, len(prompt)), logp, rtol=1e-4):
            return False
    return True


def check_sequence_logps(own):
    logp, mask = -torch.rand(6, 9), (torch.rand(6, 9) < 0.5).float()
    return own(logp, mask).allclose(losses.sequence_logps(logp[mask.bool()], mask.nonzero()[:, 0], 6))


def check_dpo_loss(own):
    four = [-torch.rand(5, 9) * (torch.rand(5, 9) < 0.7) for _ in range(4)]
    return own(*four, 0.7).allclose(losses.dpo_loss(*(x.sum(1) for x in four), 0.7)[0])


def check_adapter(own):
    mine, ours, x = (*(make(nn.Linear(6, 5), 3, 7) for make in (own, our_adapter)), torch.randn(4, 6))
    ours.load_state_dict({**ours.state_dict(), "base.weight": mine.base.weight, "base.bias": mine.base.bias})
    ours.A.data, ours.B.data, mine.B.data = mine.A.data, torch.ones(5, 3), torch.ones(5, 3)
    return mine(x).allclose(ours(x), atol=1e-6)


def check_frozen_reference(own):
    """Another model of the same weights, without dropout or gradients, that stays as it is; the first one is untouched."""
    model = mini(dropout=0.1).train()
    reference, before = own(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    return (model.training and all(p.requires_grad for p in model.parameters()) and not any(m.training for m in
            reference.modules()) and not any(p.requires_grad for p in reference.parameters())
            and all(p.equal(before[name]) for name, p in reference.state_dict().items()))


def check_accumulate(own):
    """Micro-batches of unlike size and length, too."""
    rows = [[0], [1, 2, 3, 4], [5, 6]]

    def gradient(take):
        model = mini()
        take(model)
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    whole = data.sft_batch(pairs(), sum(rows, []))
    mine = gradient(lambda model: own(model, [data.sft_batch(pairs(), r) for r in rows]))
    right = gradient(lambda model: losses.sft_loss(*whole.hidden_and_head(model), whole.targets, len(whole.targets)).backward())
    return (mine - right).norm() < 1e-4 * right.norm()


def check_folding_adapter(own):
    """The same outputs in both modes, called as often as one likes; in evaluation the adapter is in the weight."""
    layer, x = own(nn.Linear(3, 2), 1, 2), torch.randn(4, 3)
    layer.B.data += 1
    base, whole = layer.base.weight.clone(), layer.base.weight + 2 * layer.B.detach() @ layer.A.detach()
    expected = layer.base(x) + 2 * (x @ layer.A[0])[:, None]
    return all(layer.train(mode)(x).allclose(expected, atol=1e-5)
               and layer.base.weight.allclose(base if mode else whole, atol=1e-5)
               for mode in (True, True, False, False, True, False, True))


def same_weights(own, ours, **options):
    """After twelve random gradients, one parameter without any."""
    found = []
    for kind in (own, ours):
        generator = torch.Generator().manual_seed(1)
        p, unused = (nn.Parameter(torch.ones(3, 3)) for _ in range(2))
        optimizer = kind([p, unused], lr=1e-2, weight_decay=0.1, **options)
        for _ in range(12):
            p.grad = torch.randn(3, 3, generator=generator)
            optimizer.step()
        found.append(torch.cat((p, unused)))
    return found[0].allclose(found[1], rtol=1e-4)


def check_lion(own):
    return same_weights(own, optim.Lion)


def check_adamw_pma(own):
    return same_weights(own, optim.AdamWPMA, period=4)


CHECKS = {   # name of the snippet -> its check
    "pair_labels": check_pair_labels, "sft_labels": check_sft_labels, "response_logp": check_response_logp,
    "sequence_logps": check_sequence_logps, "dpo_loss": check_dpo_loss, "Adapter": check_adapter,
    "frozen_reference": check_frozen_reference, "accumulate": check_accumulate, "FoldingAdapter": check_folding_adapter,
    "Lion": check_lion, "AdamWPMA": check_adamw_pma}
