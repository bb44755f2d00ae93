"""
Direct preference optimisation (DPO): a model learns from pairs to prefer the chosen response. And CDPO, which adds a regulariser
over the whole vocabulary.

    python train_dpo.py                                   # from runs/sft, the embedded data
    python train_dpo.py --loss cdpo --gamma 10 --out runs/cdpo
    python train_dpo.py --init runs/sft-medium --data hh-rlhf ...   # README: the GPU recipe
    python train_dpo.py --lora-rank 8 --lr 1e-3           # adapters beside frozen weights (lora.py)

The reference is --init as it was. What it says of the training pairs is computed once and cached (reference.py), so that there is
one model in memory (two during an evaluation); with LoRA it is the policy with its adapters off. Both see every pair with dropout
off, since else they would differ at the start and margins would be noise. Before the first step they are the same model, so every
margin is 0, every pair a tie and DPO's loss -log sigmoid(0) = log 2 (CDPO adds gamma / 2); the script checks that.

On several processes: torchrun --standalone --nproc-per-node N (parallel.py).
"""
import copy
import math
import time
from dataclasses import dataclass
from typing import Literal

import torch

import data
import lora
import losses
import model as gpt
import optim
import parallel
import plan
import plots
import reference
import runs
import variance
from files import InputError, fingerprint


@dataclass
class Config(runs.Config):
    out: str = "runs/dpo"
    init: str = "runs/sft"
    lr: float = 4e-5
    warmup: int = 10
    epochs: float = 0.5
    eval_every: int = 50
    loss: Literal["dpo", "cdpo"] = "dpo"   # cdpo adds gamma times a regulariser over the whole vocabulary
    beta: float = 0.5                      # reward = beta (log pi - log ref): units of reward a nat
    gamma: float = 1.0                     # weight of CDPO's regulariser
    reference: Literal["auto", "cache", "live"] = "auto"   # computed once and kept on disk, or run beside the policy
    label_smoothing: float = 0.0           # share of pairs that are taken to be labelled wrong; for --loss dpo


def pair_losses(cfg, model, look, batch):
    """Losses, margins and whether the chosen response won (1, 0, or 1/2 at a tie) of a micro-batch of B pairs, each (B,).
    look(batch): what the reference says, its (logps, hidden states, head); see reference.py."""
    hidden, head = batch.hidden_and_head(model)
    ref_logps, ref_hidden, ref_head = look(batch)
    if cfg.loss == "cdpo":
        cdpo, _, logps = losses.cdpo_loss(hidden, head, batch.targets, batch.owner, ref_hidden, ref_head, ref_logps, cfg.beta,
                                          cfg.gamma)
    else:
        logps = losses.response_logps(hidden, head, batch)
    dpo, chosen_rewards, rejected_rewards = losses.dpo_loss(*logps.chunk(2), *ref_logps.chunk(2), cfg.beta, cfg.label_smoothing)
    won = losses.reward_wins(*logps.detach().chunk(2), *ref_logps.chunk(2))
    return cdpo if cfg.loss == "cdpo" else dpo, chosen_rewards - rejected_rewards, won


@torch.no_grad()
def evaluate(cfg, model, look, autocast, valid):
    """The plain DPO loss and both accuracies on held-out pairs, so that DPO and CDPO runs compare; how far the policy has moved
    there over the whole vocabulary, KL(ref || pi); and what it says when it is sampled, with the exact KL(pi || ref) of each
    position summed. look: not of a cache, since what is sampled is new."""
    def both(batch):
        batch = batch.to(model.wte.weight.device)
        (hidden, head), (ref_logps, ref_hidden, ref_head) = batch.hidden_and_head(model), look(batch)
        per_token = losses.divergences(hidden, head, ref_hidden, ref_head, batch.targets, cfg.beta)
        return losses.response_logps(hidden, head, batch), ref_logps, per_token, batch

    pairs, per_token, regularizer = [], [], []
    with autocast():
        for rows in data.in_order(valid, 4 * cfg.micro_batch):   # more fit where nothing is kept for a backward pass
            logps, ref_logps, (entropy, _, ref_kl, r), batch = both(data.pair_batch(valid, rows))
            pairs.append((*logps.chunk(2), *ref_logps.chunk(2)))
            per_token.append((entropy, ref_kl))
            regularizer.append(losses.sequence_logps(r, batch.owner, batch.responses) / batch.lengths)
        answers = data.sample_answers(model, valid, cfg.seed, cfg.eval_answers)
        if answers:
            _, _, (_, sampled_kl, _, _), _ = both(data.collate([(valid[i][0], answer) for i, answer in enumerate(answers)]))
        chosen, rejected, ref_chosen, ref_rejected = logps = [torch.cat(part) for part in zip(*pairs)]
        won = losses.reward_wins(*logps)   # inside autocast, which says how near a tie is
    loss, chosen_rewards, rejected_rewards = losses.dpo_loss(*logps, cfg.beta)
    entropy, ref_kl = (torch.cat(part).mean() for part in zip(*per_token))
    found = {
        "val_dpo_loss": loss.mean(), "val_reward_accuracy": won.mean(), "val_margin": (chosen_rewards - rejected_rewards).mean(),
        "val_chosen_reward": chosen_rewards.mean(), "val_rejected_reward": rejected_rewards.mean(),
        "val_logp_accuracy": losses.wins(chosen, rejected).mean(),
        "baseline_sft_logps": losses.wins(ref_chosen, ref_rejected).mean(),
        "val_chosen_logps": chosen.mean(), "val_rejected_logps": rejected.mean(),
        "policy_entropy": entropy, "val_full_kl": ref_kl, "regularizer": torch.cat(regularizer).mean(),
        "ties": (won == 0.5).float().mean(), **({"val_kl": sampled_kl.sum() / len(answers)} if answers else {}),
        **data.describe_answers(answers)}
    return {key: float(value) for key, value in found.items()}, data.show(model, valid, answers)


def again(cfg, init_sha256, device):
    """--init once more: the reference of a run that keeps only its cache, for as long as an evaluation takes."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(cfg.seed)   # as when it was first read: --init mini is drawn
        model = gpt.load(cfg.init, block_size=cfg.block_size)
    if fingerprint(model.state_dict()) != init_sha256:
        raise InputError(f"--init {cfg.init} is not what it was when the run began")
    return model.to(device).eval().requires_grad_(False)


def check_start(found):
    """Before the first step the policy is the reference."""
    if found["ties"] != 1 or abs(found["val_dpo_loss"] - math.log(2)) > 1e-2:
        raise InputError(f"at step 0 policy and reference differ: DPO loss {found['val_dpo_loss']:.6f}, expected log 2 = "
                         f"{math.log(2):.6f}; {found['ties']:.1%} of the pairs tie, expected all")


def dry_losses(cfg, model, cached):
    """For --dry-run: what a step keeps in memory of its reference, and its loss."""
    if cached:
        head = None if cfg.loss == "dpo" else model.wte.weight.detach() if cfg.lora_rank else model.wte.weight.detach().clone()

        def look(batch):
            states = None if head is None else torch.zeros(len(batch.targets), head.size(1))
            return torch.zeros(batch.responses), states, head
    else:
        look = reference.live(model if cfg.lora_rank else gpt.GPT(model.config).requires_grad_(False))
    return lambda batch: pair_losses(cfg, model, look, batch)[0].sum()


def main(cfg):
    runs.validate(cfg)
    if cfg.dropout:
        raise InputError(f"--dropout {cfg.dropout}: DPO compares policy and reference with dropout off, expected 0")
    if cfg.lora_dropout:
        raise InputError(f"--lora-dropout {cfg.lora_dropout}: DPO runs with dropout off, expected 0")
    if cfg.loss == "cdpo" and cfg.label_smoothing:
        raise InputError("--label-smoothing goes with --loss dpo only")
    for name, low, high in (("beta", 1e-9, math.inf), ("gamma", 0, math.inf), ("label_smoothing", 0, 0.5)):
        if not low <= getattr(cfg, name) <= high or getattr(cfg, name) == math.inf:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: expected a number from {low:g} to {high:g}, found {getattr(cfg, name)}")
    cached = cfg.reference == "cache" or cfg.reference == "auto" and not cfg.lora_rank
    if cfg.dry_run:
        def on_disk(tokens, rows, n_embd):
            return reference.disk_bytes(tokens, rows, n_embd if cfg.loss == "cdpo" else 0)
        return plan.show(cfg, data.pair_batch, 3, lambda model: dry_losses(cfg, model, cached),
                         on_disk=on_disk if cached else None)
    run = runs.Run(cfg)

    # ---- device and seed ---------------------------------------------------------------------------------------------
    device, autocast = runs.setup(cfg)

    # ---- model and reference -----------------------------------------------------------------------------------------
    model = gpt.load(cfg.init, block_size=cfg.block_size).to(device).eval()
    init_sha256 = fingerprint(model.state_dict())
    model.checkpoint_activations = cfg.checkpoint_activations
    if cfg.lora_rank:
        lora.add_lora(model, cfg.lora_rank, cfg.lora_alpha, 0.0, cfg.lora_bias, init_sha256)

    # ---- data --------------------------------------------------------------------------------------------------------
    train, valid, counts = data.load(cfg.data, model.config, cfg.half)
    valid = valid[:cfg.eval_samples]
    order = data.Order(train.lengths().sum(1), cfg.micro_batch * parallel.size(), cfg.seed)
    steps = runs.count_steps(cfg, len(train))
    longer = data.longer_wins(valid)

    # ---- reference ---------------------------------------------------------------------------------------------------
    second = None if cached or cfg.lora_rank else copy.deepcopy(model).requires_grad_(False)

    def live_look():
        """The reference beside the policy: the policy with its adapters off, a second model, or one for the time being."""
        return reference.live(model if cfg.lora_rank else second or again(cfg, init_sha256, device))
    if cached:
        with autocast():   # for CDPO with the head, a copy where the policy's own trains
            head = model.wte.weight.detach()
            look = reference.Cache(train, {"model": init_sha256, "dtype": str(losses.matmul_dtype(head, head))},
                                   None if cfg.loss == "dpo" else head if cfg.lora_rank else head.clone())
    else:
        look = live_look()

    # ---- optimizer ---------------------------------------------------------------------------------------------------
    optimizer = optim.make(cfg.optimizer, model, cfg.lr, cfg.betas, cfg.weight_decay, cfg.accumulate)
    per_update = optim.per_update(cfg.optimizer, cfg.accumulate)

    # ---- micro-batches -----------------------------------------------------------------------------------------------
    def micro_batches(rows):   # this process' share of each; None where it has no row
        return [data.pair_batch(train, r).to(device) if len(r) else None for r in map(parallel.mine, rows)]

    def look_flops(batch):   # what the reference costs: a forward pass, CDPO's product with the head alone, nothing
        if not cached:
            return gpt.flops(model.config, *batch.size)
        return gpt.flops(model.config, 0, 0, 0, len(batch.targets)) if cfg.loss == "cdpo" else 0

    def micro_losses(batches):
        """(loss, margin, share won), each divided by the pairs of all: a mean of means would weigh a short micro-batch more. A
        generator, so that one micro-batch's graph is in memory at a time."""
        pairs, = parallel.total(sum(batch.responses for batch in batches if batch) // 2)
        for batch in batches:
            with autocast():
                found = pair_losses(cfg, model, look, batch) if batch else torch.zeros(3)
            yield [x.sum() / pairs for x in found]

    def drawn(rng):   # the losses of a step's worth of micro-batches, for the variance probe
        return (loss for loss, _, _ in micro_losses(micro_batches(order.draw(run.at["micro_step"], rng, cfg.accumulate))))

    # ---- begin -------------------------------------------------------------------------------------------------------
    what = f"CDPO, beta {cfg.beta}, gamma {cfg.gamma}" if cfg.loss == "cdpo" else f"DPO, beta {cfg.beta}"
    size = optim.footprint(cfg.optimizer, model)
    run.say(f"{what}, of {cfg.init} on {device}, for {steps} steps of {runs.step_size(cfg)} pairs\n"
            f"{optim.describe(size)}\ndata {cfg.data}: {data.describe(counts)}\n"
            f"on {len(valid)} held-out pairs: longer-wins {longer:.3f}; an accuracy is known to about "
            f"+-{(data.interval(0.8, len(valid))[1] - data.interval(0.8, len(valid))[0]) / 2:.3f} (95 %)")
    longest = order.longest(steps * cfg.accumulate)   # for its memory; where the cache is still empty its loss is NaN, unused
    runs.rehearse((loss for loss, *_ in micro_losses(micro_batches([longest]))), optimizer, size["optimizer_bytes"], device)
    if cached:   # the policy is the reference still; a variance probe draws from all pairs
        met = range(len(train)) if cfg.variance_every else order.first(steps * cfg.accumulate)
        with autocast():
            parallel.in_turn(lambda: look.fill(met, 4 * cfg.micro_batch, reference.live(model), device, run.say))
    run.begin(model, optimizer, steps, init_sha256=init_sha256, data_sha256=data.sha256(train, valid), **size,
              device=str(device), data=counts, baseline_longer_wins=longer, val_pairs=len(valid))

    # ---- loop --------------------------------------------------------------------------------------------------------
    while True:
        if run.evaluation_due():
            found, samples = evaluate(cfg, model, live_look(), autocast, valid)
            if run.at["step"] == 0:
                check_start(found)
            if run.evaluated("val_dpo_loss", found, samples):
                run.keep_best(model.config, lora.merged_state(model), lora.adapter_state(model))
            run.draw(plots.draw)
            run.say("step {step:>5} held-out DPO loss {val_dpo_loss:.4f} | reward accuracy {val_reward_accuracy:.3f} | "
                    "margin {val_margin:.3f}".format(**run.at, **found) + data.show_answers(found))
        if run.keep_due():
            run.keep(f"step-{run.at['step']}.pt", model.config, lora.merged_state(model))
        if not run.goes_on(model, optimizer):
            break

        step = run.at["step"]
        lr = optim.set_lr(optimizer, optim.lr_at(step, steps, cfg.lr, cfg.schedule, cfg.warmup))
        if run.probe_due():
            run.probed(variance.measure(optimizer, model.h[-1], drawn, cfg.accumulate, per_update, [cfg.seed, step],
                                        cfg.grad_clip, scale=run.scaler.get_scale()))
        began = time.time()
        batches = micro_batches(order[step * cfg.accumulate + k] for k in range(cfg.accumulate))
        # backward, clip and optimizer.step: optim.accumulated_step
        (train_loss, train_margin, train_won), norms = run.step(model, optimizer, batches, micro_losses(batches))
        mine = [batch for batch in batches if batch]
        run.stepped(began, norms, lr, samples=sum(b.responses for b in mine) // 2, tokens=sum(len(b.tokens) for b in mine),
                    flops=sum(gpt.flops(model.config, *b.size, backward=True, rank=cfg.lora_rank) + look_flops(b) for b in mine),
                    train_loss=train_loss, train_reward_accuracy=train_won, train_margin=train_margin)

    return run.end()


if __name__ == "__main__":
    runs.command_line(main, Config)
