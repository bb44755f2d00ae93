"""
Who grades the graders? Wrong solutions of the exercises, as a student or a public repository writes them: each must fail.

    python exercises/mutants.py                        # all of them: less than ten minutes on two free cores
    python exercises/mutants.py --only 4 "eps helps"   # an exercise; whatever has this in its name
    python exercises/mutants.py --list

A mutant is one mistake in a copy of the repository: a piece of a file, replaced by another. tests/test_X.py, which grades X.py,
must find it alone. The untouched files must pass, and an exercise whose bodies are taken out (blank.py) must fail. The blind ones
were thought up from the sources and the formulas, before anyone looked whether a test is there that would see them.
"""
import argparse
import collections
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from blank import EXERCISES, blanked, copied

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {
    "shift": "off by one: positions, targets, steps counted from 1",
    "mask": "the wrong ones are seen, scored, trained or treated",
    "normaliser": "divided by the wrong number",
    "sign": "a sign turned around",
    "scale": "a factor forgotten, or there twice",
    "detach": "a gradient that does not flow, or should not",
    "dtype": "numbers narrower than they must be",
    "order": "right things in the wrong order, or taken for one another",
    "state": "something not kept, not put back, or changed on the way",
}
TIMEOUT = 240   # seconds for a mutant; one that runs for ever is caught, too
SLOW = ("tests/test_train_sft.py", "tests/test_train_reward.py", "tests/test_variance.py", "tests/test_model.py")   # begin first


class Mutant(NamedTuple):
    exercise: int
    family: str
    file: str
    name: str
    old: str   # stands in the file once
    new: str
    blind: bool = True

    @property
    def tests(self):
        return f"tests/test_{self.file}"

    def text(self, source):
        if source.count(self.old) != 1:
            raise ValueError(f"{self.name}: expected its old text in {self.file} once, found it {source.count(self.old)} times")
        return source.replace(self.old, self.new)


MUTANTS = [Mutant(*row) for row in [
    # ---- 1 the attention mask ----------------------------------------------------------------------------------------
    (1, "mask", "model.py", "attention sees the future",
     "is_causal=T > 1,", "is_causal=False,"),
    (1, "mask", "model.py", "the first place of padding is seen",
     "(columns >= lengths[:, None])", "(columns > lengths[:, None])"),
    (1, "order", "model.py", "heads are not brought side by side",
     "y.transpose(1, 2).reshape(B, T, C)", "y.reshape(B, T, C)"),
    (1, "order", "model.py", "heads are cut out of time",
     "(part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)", "(part.reshape(B, self.n_head, T, C // self.n_head)"),
    (1, "scale", "model.py", "attention is scaled by the width, not by a head's",
     "self.training else 0.0)", "self.training else 0.0, scale=C ** -0.5)"),
    (1, "shift", "model.py", "a generated token stands one position late",
     "return self.lengths[:, None].clamp(", "return (self.lengths[:, None] + 1).clamp("),
    (1, "state", "model.py", "attention drops in eval mode, too",
     "dropout_p=self.dropout if self.training else 0.0", "dropout_p=self.dropout"),

    # ---- 2 which tokens are scored, and the shift ----------------------------------------------------------------------
    (2, "mask", "data.py", "the prompt is scored",
     'np.concatenate((prompt[1:], response)) if loss_on == "all" else response)', "np.concatenate((prompt[1:], response)))"),
    (2, "mask", "data.py", "the prompt is scored with the rejected response only",
     'if loss_on == "all" else response)', 'if loss_on == "all" or response is not responses[0] else response)'),
    (2, "mask", "data.py", "end-of-text is not scored",
     "owner = [np", "score_at, targets = ([x[:-1] for x in found] for found in (score_at, targets))\n    owner = [np"),
    (2, "mask", "data.py", "the rejected response sees the chosen one",
     "np.concatenate((stem, start + np.arange(n)))", "np.arange(stem[0], start + n)"),
    (2, "mask", "data.py", "a response that was cut is closed all the same",
     "else response[:block_size - KEEP_PROMPT])", "else response[:block_size - KEEP_PROMPT - 1] + [eot])"),
    (2, "shift", "data.py", "a response's first token is not scored",
     "owner = [np", "score_at, targets = ([x[1:] for x in found] for found in (score_at, targets))\n    owner = [np"),
    (2, "shift", "data.py", "targets are shifted twice",
     "[-len(scored):] for", "[-len(scored) - 1:-1] for"),
    (2, "shift", "data.py", "targets of whole dialogues are not shifted",
     "sequence[:len(sequence) - whole][-len(scored):]", "sequence[-len(scored):]"),
    (2, "shift", "data.py", "positions start again at the response",
     "positions.append(len(prompt) + np.arange(n))", "positions.append(np.arange(n))"),
    (2, "order", "data.py", "chosen and rejected responses alternate",
     "[found[i] for k in range(each) for i in range(k, len(found), each)]", "list(found)"),
    (2, "normaliser", "data.py", "a response's length is without its end-of-text",
     "torch.tensor([len(t) for t in targets])", "torch.tensor([len(t) - 1 for t in targets])"),
    (2, "dtype", "data.py", "token ids go through 16 bits with a sign",
     "np.concatenate(x).astype(np.int64)", "np.concatenate(x).astype(np.int16).astype(np.int64)"),

    # ---- 3 log-probabilities -----------------------------------------------------------------------------------------
    (3, "normaliser", "losses.py", "a response's log-probability is a mean",
     ".index_add(0, owner, logps)", ".index_add(0, owner, logps) / torch.bincount(owner, minlength=n)"),
    (3, "dtype", "losses.py", "log-softmax in half precision",
     "return torch.log_softmax(product(hidden.to(dtype), weight.to(dtype)), 1, dtype=out.dtype, out=out[:len(hidden)])",
     "return out[:len(hidden)].copy_(torch.log_softmax(product(hidden.to(dtype), weight.to(dtype)), 1))"),
    (3, "dtype", "losses.py", "float64 becomes float32 on the way",
     "models)), torch.promote_types(dtype, torch.float32)", "models)), torch.float32"),
    (3, "dtype", "losses.py", "log-probabilities are summed in bfloat16",
     "torch.zeros(n, dtype=logps.dtype, device=logps.device).index_add(0, owner, logps)",
     "torch.zeros(n, dtype=torch.bfloat16, device=logps.device).index_add(0, owner, logps.bfloat16()).to(logps.dtype)"),
    (3, "dtype", "losses.py", "the gradient at the logits in float16",
     "torch.float32 if dtype == torch.float16 else dtype", "dtype"),
    (3, "sign", "losses.py", "softmax is added to the gradient",
     ".exp_().mul_(-grad_logp[rows, None])", ".exp_().mul_(grad_logp[rows, None])"),
    (3, "scale", "losses.py", "beside a frozen head, the gradient that arrives is forgotten",
     "return at_once * grad_logp[:, None].to(at_once.dtype),", "return at_once,"),
    (3, "state", "losses.py", "of the head's gradient the last chunk's remains",
     "self.weight.addmm_(d.T, hidden[rows].to(d.dtype))", "self.weight = d.T @ hidden[rows].to(d.dtype)"),
    (3, "detach", "losses.py", "the head gets no gradient",
     "return _Logp.apply(hidden, weight, targets,", "return _Logp.apply(hidden, weight.detach(), targets,"),

    # ---- 4 the DPO loss ----------------------------------------------------------------------------------------------
    (4, "sign", "losses.py", "the margin is rejected minus chosen",
     "margin = chosen_rewards - rejected_rewards", "margin = rejected_rewards - chosen_rewards"),
    (4, "sign", "losses.py", "eps helps the chosen response",
     "label_smoothing * F.logsigmoid(-margin)", "label_smoothing * F.logsigmoid(margin)"),
    (4, "scale", "losses.py", "rewards are reported without beta",
     "return losses, chosen_rewards.detach(), rejected_rewards.detach()",
     "return losses, (chosen_rewards / beta).detach(), (rejected_rewards / beta).detach()"),
    (4, "scale", "losses.py", "beta is applied twice",
     "F.logsigmoid(margin) - label", "F.logsigmoid(beta * margin) - label"),
    (4, "order", "losses.py", "the chosen response's reference is subtracted from both",
     "(policy_rejected_logps - ref_rejected_logps)", "(policy_rejected_logps - ref_chosen_logps)"),
    (4, "detach", "losses.py", "the rejected response gets no gradient",
     "(policy_rejected_logps - ref_rejected_logps)", "(policy_rejected_logps.detach() - ref_rejected_logps)"),
    (4, "dtype", "losses.py", "the log of a sigmoid, which underflows",
     "F.logsigmoid(margin) - label", "torch.log(torch.sigmoid(margin)) - label"),
    # what exercises/README.md says goes wrong, where no mutant above has it
    (4, "detach", "losses.py", "rewards that are for reporting have a gradient",
     "return losses, chosen_rewards.detach(), rejected_rewards.detach()", "return losses, chosen_rewards, rejected_rewards",
     False),
    (4, "normaliser", "losses.py", "the mean is taken inside",
     "losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)",
     "losses = -((1 - label_smoothing) * F.logsigmoid(margin)\n"
     "               + label_smoothing * F.logsigmoid(-margin)).mean().expand_as(margin)",
     False),

    # ---- 5 LoRA ------------------------------------------------------------------------------------------------------
    (5, "scale", "lora.py", "alpha is not divided by the rank",
     "base, alpha / rank, True", "base, alpha, True"),
    (5, "scale", "lora.py", "alpha is divided by the root of the rank",
     "base, alpha / rank, True", "base, alpha / rank ** 0.5, True"),
    (5, "scale", "lora.py", "merged without the scale",
     "self.scale * self.B @ self.A", "self.B @ self.A"),
    (5, "normaliser", "lora.py", "the spread of A goes by the rank",
     "/ in_features ** 0.5", "/ rank ** 0.5"),
    (5, "state", "lora.py", "B does not start at zero",
     "torch.zeros(out_features, rank)", "(0.02 * torch.randn(out_features, rank))"),
    (5, "detach", "lora.py", "the embeddings go on training",
     "    model.requires_grad_(False)", "    model.h.requires_grad_(False)"),
    (5, "mask", "lora.py", "LayerNorm's biases train with lora_only",
     '_train_bias(layer, bias == "all")', '_train_bias(layer, bias != "none")'),
    (5, "state", "lora.py", "adapters that were off are on after a second adapters_off",
     "            layer.on = on", "            layer.on = True"),
    (5, "state", "lora.py", "trained biases stay without the adapters",
     "            layer.bias = nn.Parameter(layer.base_bias, requires_grad=False)", "            layer.bias = layer.bias"),
    (5, "state", "lora.py", "trained biases are written over the base's",
     "            layer.bias = bias", "            layer.bias.data.copy_(bias.data)"),
    (5, "state", "lora.py", "the base is added twice in merging",
     "layer.base.weight.copy_(weights[layer])", "layer.base.weight.add_(weights[layer])"),
    (5, "state", "lora.py", "whoever asks for the merged weight merges",
     "return self.base.weight + self.scale * self.B @ self.A", "return self.base.weight.data.add_(self.scale * self.B @ self.A)"),
    (5, "order", "lora.py", "dropout falls on the frozen layer's input, too",
     "rows = x.reshape(-1, x.size(-1))", "rows = self.drop(x.reshape(-1, x.size(-1)))"),
    (5, "dtype", "lora.py", "merged in autocast's half precision",
     "with torch.autocast(self.A.device.type, enabled=False):", "with contextlib.nullcontext():"),

    # ---- 6 Lion ------------------------------------------------------------------------------------------------------
    (6, "order", "optim.py", "Lion's momentum moves before the sign is taken",
     "u = torch._foreach_lerp(mean, g, c1 / (a1 * s + c1))",
     "u = torch._foreach_lerp(torch._foreach_lerp(mean, g, c2 / (a2 * s + c2)), g, c1 / (a1 * s + c1))"),
    (6, "order", "optim.py", "Lion's betas change places",
     "(a1, c1, _), (a2, c2, scale) = (", "(a2, c2, scale), (a1, c1, _) = ("),
    (6, "order", "optim.py", "Lion decays after its update",
     """            if group["weight_decay"]:
                torch._foreach_mul_(p, 1 - lr_t * group["weight_decay"])
            torch._foreach_add_(p, u, alpha=-lr_t)
""", """            torch._foreach_add_(p, u, alpha=-lr_t)
            if group["weight_decay"]:
                torch._foreach_mul_(p, 1 - lr_t * group["weight_decay"])
"""),
    (6, "sign", "optim.py", "Lion's decay pushes away from zero",
     '1 - lr_t * group["weight_decay"]', '1 + lr_t * group["weight_decay"]'),
    (6, "scale", "optim.py", "Lion-PMA decays at the full rate in small steps",
     '1 - lr_t * group["weight_decay"]', '1 - group["lr"] * group["weight_decay"]'),
    (6, "scale", "optim.py", "Lion-PMA's small steps are Adam's",
     'else group["lr"] / group["period"]', 'else group["lr"] / math.sqrt(group["period"])'),
    (6, "scale", "optim.py", "Lion-PMA's moment is not rescaled",
     "return (scale * (a2 * s + c2),)", "return (a2 * s + c2,)"),
    (6, "state", "optim.py", "Lion leaves another gradient behind",
     "torch._foreach_lerp_(mean, g, c2 / (a2 * s + c2))", "torch._foreach_lerp_(mean, g, c2 / (a2 * s + c2))\n"
     "            torch._foreach_mul_(g, 0)", False),
    (6, "order", "optim.py", "Lion has one beta for both",
     "(a1, c1, _), (a2, c2, scale) = (self.moment(group, t, b) for b in group[\"betas\"])",
     "(a1, c1, _), (a2, c2, scale) = (self.moment(group, t, b) for b in 2 * group[\"betas\"][:1])", False),
    (6, "order", "optim.py", "Lion's decay stands inside the sign, too",
     "torch._foreach_sign_(u)", "torch._foreach_add_(u, p, alpha=group[\"weight_decay\"])\n            torch._foreach_sign_(u)",
     False),

    # ---- 7 AdamW-PMA -------------------------------------------------------------------------------------------------
    (7, "scale", "optim.py", "small steps are of lr / K",
     'else group["lr"] / math.sqrt(group["period"])', 'else group["lr"] / group["period"]'),
    (7, "scale", "optim.py", "a large step takes its gradient whole",
     'return b, (1 - b) / group["period"], scale', "return b, 1 - b, scale"),
    (7, "scale", "optim.py", "v is not rescaled after a large step",
     "return scale1 * s, scale2 * r", "return scale1 * s, r"),
    (7, "shift", "optim.py", "large steps end a period",
     'return t > 0 and t % group["period"] == 0', 'return (t + 1) % group["period"] == 0'),
    (7, "shift", "optim.py", "tau is counted from 1",
     '    tau = t % group["period"]', '    tau = t % group["period"] + 1'),
    (7, "shift", "optim.py", "t starts at 1",
     'state |= {"t": 0,', 'state |= {"t": 1,'),
    (7, "mask", "optim.py", "the very first step is large",
     "return t > 0 and t %", "return t %"),
    (7, "normaliser", "optim.py", "the bias is corrected by steps, not by periods",
     'return 1 - b ** (t // group["period"] + 1)', "return 1 - b ** (t + 1)"),
    (7, "normaliser", "optim.py", "b1 corrects v, too",
     'self.correction(group, t, group["betas"][1])', 'self.correction(group, t, group["betas"][0])'),
    (7, "order", "optim.py", "v is corrected outside of the root",
     'sqrt(r / self.correction(group, t, group["betas"][1]))', 'sqrt(r) / self.correction(group, t, group["betas"][1])'),
    (7, "state", "optim.py", "the moments' weight is not kept",
     '{"t": t + 1, "weights": weights}', '{"t": t + 1}'),

    # ---- 8 AGMA ------------------------------------------------------------------------------------------------------
    (8, "scale", "optim.py", "the old moment decays once",
     'return periodical(group, t, b, b * group["period"])', 'return periodical(group, t, b, group["period"])'),
    (8, "scale", "optim.py", "the perturbation does not go with the rate",
     'alpha=group["perturb"] * group["lr"]', 'alpha=group["perturb"]'),
    (8, "normaliser", "optim.py", "AGMA corrects the bias",
     "    def correction(self, group, t, b):\n        return 1\n",
     '    def correction(self, group, t, b):\n        return 1 - b ** (t // group["period"] + 1)\n'),
    (8, "shift", "optim.py", "the decaying rate is one step ahead",
     "(1 - t % K / K if", "(1 - (t % K + 1) / K if"),
    (8, "order", "optim.py", "linear and root change places",
     '(K if kind == "linear" else math.sqrt(K))', '(math.sqrt(K) if kind == "linear" else K)'),
    (8, "mask", "optim.py", "large steps go without the division, too",
     'group["small_step"] == "sgd" and not is_large(group, t)', 'group["small_step"] == "sgd"'),
    (8, "mask", "optim.py", "every step is perturbed",
     'if group["perturb"] and is_large(group, t):', 'if group["perturb"]:'),
    (8, "state", "optim.py", "the perturbation is the same in every period",
     'group["seed"] + 1_000_003 * t +', 'group["seed"] +'),
    (8, "state", "optim.py", "the perturbation seeds torch's own generator",
     "torch.Generator(params[0].device).manual_seed(seed)", "torch.manual_seed(seed)"),

    # ---- 9 CDPO ------------------------------------------------------------------------------------------------------
    (9, "normaliser", "losses.py", "R_t is divided by V",
     "(logp.size(1) - 1)", "logp.size(1)"),
    (9, "normaliser", "losses.py", "gamma is for each of the two responses",
     "(gamma / 2 / lengths)[owner]", "(gamma / lengths)[owner]"),
    (9, "normaliser", "losses.py", "the two responses' R are summed",
     ".view(2, -1).mean(0)", ".view(2, -1).sum(0)"),
    (9, "mask", "losses.py", "R_t has the realised token in it",
     ".sigmoid_().scatter_(1, target, 0.0)", ".sigmoid_()"),
    (9, "sign", "losses.py", "R_t asks how much likelier the reference is",
     "torch.sigmoid(beta * (logp - ref_logp))", "torch.sigmoid(beta * (ref_logp - logp))"),
    (9, "sign", "losses.py", "CDPO pulls away from the reference",
     "torch.sub(logp, s, out=s)", "torch.sub(s, logp, out=s)"),
    (9, "scale", "losses.py", "R_t's gradient lacks beta",
     "share[rows, None] * beta /", "share[rows, None] /"),
    (9, "scale", "losses.py", "the gradient that arrives is forgotten",
     "g if g is None else g.mul_(grad)", "g"),
    (9, "detach", "losses.py", "the regulariser has no gradient",
     "d = s.addcmul_(s, s, value=-1).mul_(share[rows, None] * beta / (s.size(1) - 1)).scatter_(1, target, f)",
     "d = torch.zeros_like(s).scatter_(1, target, f)"),
    (9, "detach", "losses.py", "softmax's sum counts as a constant",
     "                d.addcmul_(logp.exp_(), d.sum(1, keepdim=True), value=-1)\n", ""),
    (9, "scale", "losses.py", "R_t has a log of the sigmoid",
     "s = torch.sigmoid(beta * (logp - ref_logp))", "s = torch.sigmoid(beta * (logp - ref_logp)).log()", False),
    (9, "normaliser", "losses.py", "a pair's positions are averaged together",
     "# to take the mean over a response's tokens", "\n    lengths = lengths.view(2, -1).mean(0).repeat(2)", False),

    # ---- 10 the reward head ------------------------------------------------------------------------------------------
    (10, "sign", "losses.py", "the reward loss prefers the rejected response",
     "-F.logsigmoid(chosen_rewards - rejected_rewards)", "-F.logsigmoid(rejected_rewards - chosen_rewards)"),
    (10, "sign", "model.py", "the centre is added",
     "squeeze(1) - self.center", "squeeze(1) + self.center"),
    (10, "shift", "data.py", "the reward is read before end-of-text",
     "sequence[-1] for sequence", "sequence[-2] for sequence"),
    (10, "normaliser", "losses.py", "the head reads a mean log-probability",
     "model.rewards(last, response_logps(scored, head, batch))",
     "model.rewards(last, response_logps(scored, head, batch) / batch.lengths)"),
    (10, "detach", "losses.py", "the head's log-probability has no gradient",
     "model.rewards(last, response_logps(scored, head, batch))",
     "model.rewards(last, response_logps(scored, head, batch).detach())"),
    (10, "dtype", "model.py", "rewards in autocast's half precision",
     "with torch.autocast(hidden.device.type, enabled=False):", "with contextlib.nullcontext():"),
    (10, "order", "model.py", "the log-probability comes before the hidden state",
     "(inputs, logps[:, None].to(inputs.dtype))", "(logps[:, None].to(inputs.dtype), inputs)"),

    # ---- 11 the variance probe ---------------------------------------------------------------------------------------
    (11, "normaliser", "variance.py", "divided by M, not by M - 1",
     "torch.stack(same).var(0)", "torch.stack(same).var(0, unbiased=False)"),
    (11, "normaliser", "variance.py", "a share of the mean is taken for a micro-batch's mean",
     "scale * steps * loss", "scale * loss"),
    (11, "sign", "variance.py", "u points downhill",
     "[p / -lr_t for p in trial.params]", "[p / lr_t for p in trial.params]"),
    (11, "scale", "variance.py", "float16's scale stays in the gradient",
     "a + b / scale for", "a + b for"),
    (11, "scale", "variance.py", "clipping makes short gradients long",
     "factor = min(1.0, grad_clip / (torch.nn.utils.get_total_norm(total).item() + 1e-6))",
     "factor = grad_clip / (torch.nn.utils.get_total_norm(total).item() + 1e-6)"),
    (11, "mask", "variance.py", "clipped by the norm of the block alone",
     '[p for group in optimizer.param_groups for p in group["params"]] if grad_clip else params', "params"),
    (11, "shift", "variance.py", "u is divided by the next step's rate",
     "trial.optimizer.step_size(group, t)", "trial.optimizer.step_size(group, t + 1)"),
    (11, "state", "variance.py", "the probe moves the optimizer's own moments",
     "value.clone() if torch.is_tensor(value) else value", "value"),
    (11, "state", "variance.py", "the probe draws from torch's own generators",
     "with torch.random.fork_rng([params[0].device] if params[0].is_cuda else []), torch.enable_grad():",
     "with torch.enable_grad():"),
    (11, "state", "variance.py", "every sample's update is from a state of its own",
     "                walk.step(gradients[-1])\n                updates.append(common.update(gradients[-1]))",
     "                updates.append(walk.update(gradients[-1]))\n                walk.step(gradients[-1])"),
    (11, "state", "variance.py", "the perturbation is a part of the displacement",
     ',\n                                                    **({"perturb": 0.0} if "perturb" in group else {})})', "})"),
    (11, "normaliser", "variance.py", "a mean of the tensors' means",
     "total = sum(torch.stack(same).var(0).double().sum().item() for same in zip(*samples))\n"
     "    raw = total / sum(x.numel() for x in samples[0])",
     "total = sum(torch.stack(same).var(0).double().mean().item() for same in zip(*samples))\n"
     "    raw = total / len(samples[0])", False),
    (11, "scale", "variance.py", "lr_t stays in u",
     "return [p / -lr_t for p in trial.params]", "return [-p for p in trial.params]", False),

    # ---- 12 accumulation, weighted by tokens -------------------------------------------------------------------------
    (12, "normaliser", "train_sft.py", "a mean of the micro-batches' means",
     "loss = batch_loss(model, batch, normaliser) if", "loss = batch_loss(model, batch, len(batch.targets) * len(batches)) if"),
    (12, "normaliser", "train_sft.py", "divided by dialogues, not by tokens",
     "sum(len(batch.targets) for batch in batches if batch)", "sum(batch.responses for batch in batches if batch)"),
    (12, "sign", "losses.py", "fine-tuning unlearns",
     "targets.shape, -1 / normaliser,", "targets.shape, 1 / normaliser,"),

    # ---- 13 a step of K micro-batches --------------------------------------------------------------------------------
    (13, "scale", "optim.py", "an update of its own gets a share of the mean",
     "scaler.scale(loss * (K // per_update))", "scaler.scale(loss)"),
    (13, "shift", "optim.py", "the update comes after the first micro-batch",
     "if k % per_update:", "if (k - 1) % per_update:"),
    (13, "state", "optim.py", "the gradient of the last update stays",
     "        optimizer.zero_grad(set_to_none=True)\n    return", "    return"),
    (13, "order", "optim.py", "clipped after the step",
     """        norm = clip(model, grad_clip)
        if math.isfinite(norm):
            optimizer.step()
""", """        norm = clip(model, 0.0)
        if math.isfinite(norm):
            optimizer.step()
            clip(model, grad_clip)
"""),
    (13, "order", "optim.py", "clipped before the scale is taken out",
     "        scaler.unscale_(optimizer)\n        norm = clip(model, grad_clip)\n",
     "        norm = clip(model, grad_clip)\n        scaler.unscale_(optimizer)\n"),
]]

# ----------------------------------------------------------------------------------------------------------------------
# the runner

class Task(NamedTuple):
    """A test file in a copy of the repository, in which one file is changed, or none."""
    kind: str          # "untouched" must pass, "blank" and "mutant" must fail
    name: str
    tests: str
    file: str = ""
    text: str = ""     # the whole file, changed
    exercise: int = 0
    family: str = ""


class Grading:
    """A task at work, in a job's copy."""

    def __init__(self, folder, task):
        self.folder, self.task, self.began = folder, task, time.monotonic()
        self.scratch = folder.with_name(f"{folder.name}-scratch")   # a cache with a mutant's numbers must not outlive it
        self.scratch.mkdir()
        if task.file:
            self.kept = (folder / task.file).read_bytes()
            (folder / task.file).write_bytes(task.text.encode())
        own = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HOME": str(self.scratch), "TMPDIR": str(self.scratch),
               "TIKTOKEN_CACHE_DIR": ""}
        with open(self.scratch / "said", "w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", task.tests], cwd=folder, stdout=said,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env={**os.environ, **own}, start_new_session=True)

    def ended(self):
        return self.process.poll() is not None or self.late()

    def late(self):
        return self.task.kind == "mutant" and time.monotonic() > self.began + TIMEOUT

    def stop(self):
        """End the tests and what they have started; the copy is as it was. Returns pytest's status, None where it was at work."""
        status = self.process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        said = (self.scratch / "said").read_text(errors="replace")
        shutil.rmtree(self.scratch)
        if self.task.file:
            (self.folder / self.task.file).write_bytes(self.kept)
        return status, said

    def verdict(self):
        """(whether all tests passed, what failed first, seconds)"""
        status, said = self.stop()
        seconds = time.monotonic() - self.began
        failed = re.search(r"^(?:FAILED|ERROR) (?:.*?::)?(.*)$", said, re.MULTILINE)
        if status is None:
            return False, f"no end after {TIMEOUT} s", seconds
        if status > 2 or (status > 0 and not failed):   # not a test that fails: no such file, no test in it
            raise RuntimeError(f"{self.task.name}: pytest {self.task.tests} ended with status {status}:\n{said[-2000:]}")
        return status == 0, failed[1] if failed else f"signal {-status}" if status else "", seconds


def run(tasks, jobs, copy=copied):
    """Do the tasks, so many at a time, each job in a copy of its own: an iterator over (task, passed, what failed, seconds)."""
    tasks, running = list(tasks), []
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as root:
        free = [Path(root) / f"copy-{i}" for i in range(min(jobs, len(tasks)))]
        for folder in free:
            copy(folder)
        try:
            while tasks or running:
                while tasks and free:
                    running.append(Grading(free.pop(), tasks.pop(0)))
                for job in [job for job in running if job.ended()]:
                    running.remove(job)
                    verdict = job.verdict()
                    free.append(job.folder)
                    yield job.task, *verdict
                time.sleep(0.05)
        finally:
            for job in running:
                job.stop()


def report(results):
    """Print each result as it comes, then what was caught of each family and exercise. Returns whether all is as it must be."""
    caught, of, bad = collections.Counter(), collections.Counter(), []
    for task, passed, why, seconds in results:
        good = passed == (task.kind == "untouched")
        if not good:
            bad.append(task.name)
        if task.kind == "mutant":
            for key in (task.family, task.exercise, "mutants"):
                caught[key], of[key] = caught[key] + good, of[key] + 1
        word = {(True, True): "passes", (True, False): "FAILS", (False, True): "SURVIVED", (False, False): "caught"}[
            task.kind == "untouched", passed]
        label = f"{task.exercise:>2} {task.family:<10} {task.name}" if task.exercise else f"   untouched  {task.name}"
        print(f"{word:<8} {label}" + (f"   by {why.partition(' - ')[0]}" if why else "") + f"   {seconds:.0f} s", flush=True)
    for key in [*FAMILIES, *range(1, len(EXERCISES) + 1), "mutants"]:
        if of[key]:
            print(f"caught {caught[key]:>3} of {of[key]:>3}  {f'{key} {EXERCISES[key - 1].title}' if type(key) is int else key}")
    if bad:
        print("not as it must be: " + "; ".join(bad))
    return not bad


def work(only=()):
    """The tasks of the mutants and exercises with these numbers, or words in their names; slow test files first."""
    tasks = []
    for n, exercise in enumerate(EXERCISES, 1):
        if not only or str(n) in only:
            text = (ROOT / exercise.file).read_bytes().decode()
            for name in exercise.names:
                text = blanked(text, name)
            tasks.append(Task("blank", f"{exercise.title}: taken out", exercise.tests, exercise.file, text, n, "blank"))
    for m in MUTANTS:
        if not only or any(word == str(m.exercise) or not word.isdecimal() and word in m.name for word in only):
            text = m.text((ROOT / m.file).read_bytes().decode())
            tasks.append(Task("mutant", m.name, m.tests, m.file, text, m.exercise, m.family))
    tasks += [Task("untouched", tests, tests) for tests in dict.fromkeys(task.tests for task in tasks)]
    return sorted(tasks, key=lambda task: (SLOW.index(task.tests) if task.tests in SLOW else len(SLOW), task.kind != "untouched"))


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="test files at a time, of one thread each")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME_OR_NUMBER", help="an exercise's number, a part of a name")
    parser.add_argument("--list", action="store_true", help="print the mutants")
    args = parser.parse_args(arguments)
    if args.list:
        for m in MUTANTS:
            print(f"{m.exercise:>2} {m.family:<10} {m.file:<12} {m.name}{'' if m.blind else '   (not blind)'}")
        return True
    for number in (signal.SIGTERM, signal.SIGHUP):   # as Ctrl-C: no copy and no test stays behind
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    began, tasks = time.monotonic(), work(args.only)
    with contextlib.closing(run(tasks, max(1, args.jobs))) as results:
        good = report(results)
    print(f"{len(tasks)} runs of test files in {time.monotonic() - began:.0f} s")
    return good


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1:]))
