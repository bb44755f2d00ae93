"""
A reward model: GPT-2 with a scalar head learns from pairs which of two responses people prefer.

    python train_reward.py                                   # from runs/sft, the embedded data
    python train_reward.py --head hidden                     # the textbook's head
    python train_reward.py --init runs/sft-medium --data hh-rlhf ...   # README: the GPU recipe
    python train_reward.py --lora-rank 8 --lr 3e-3           # adapters beside frozen weights (lora.py); the head trains whole

The head, n_embd -> 1, is read at the end-of-text that closes the response. Bradley-Terry says P(the chosen one is preferred) =
sigmoid(r_w - r_l). The head starts at zero: before the first step every pair is a tie and the loss is log 2; the script checks
that. Only differences are learned; in best.pt the mean reward of chosen training responses is 0. One epoch is the rule, more
overfits.

By default the head reads one number more, the response's log-probability to this very model: r = w h + a log pi(y|x). That is
ours and not the textbook's; our tiny model needs it to tell right from wrong (RESULTS.md has figures).
The calibration on training pairs is in-sample: an SFT run has seen their labels.

On several processes: torchrun --standalone --nproc-per-node N (parallel.py).
"""
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
import runs
import variance
from files import InputError, fingerprint

CENTER = 2000   # the first so many training pairs: the mean reward of their chosen responses becomes 0


@dataclass
class Config(runs.Config):
    out: str = "runs/reward"
    init: str = "runs/sft"
    lr: float = 5e-4
    warmup: int = 10
    eval_every: int = 50
    eval_samples: int = 400
    eval_answers: int = 0   # stays 0: a reward model gives no answers
    head: Literal["likelihood", "hidden"] = "likelihood"   # what it reads: hidden state and log-probability, or the first alone


@torch.no_grad()
def rewards(cfg, model, autocast, tokens, which=("chosen", "rejected")):
    """The rewards of all these pairs in eval mode, a row of n for each of `which`."""
    model.eval()
    found = torch.zeros(len(which), len(tokens), dtype=model.center.dtype)
    for rows in data.in_order(tokens, 4 * cfg.micro_batch):   # more fit where nothing is kept for a backward pass
        with autocast():
            r = losses.batch_rewards(model, data.reward_batch(tokens, rows, which).to(model.wte.weight.device))
        found[:, rows] = r.cpu().view(len(which), -1)
    model.train()
    return found


def calibration(margins, bins=8):
    """Is the model right as often as it says? Pairs are sorted by the probability that it gives to the response it prefers,
    sigmoid |margin|, and cut into bins of equal size. A list of (mean probability, share in which it is right, the 95 % interval
    of that, pairs)."""
    said, right, found = torch.sigmoid(margins.abs()), losses.wins(margins, torch.zeros(1)), []
    for rows in said.argsort().tensor_split(min(bins, len(margins))):
        share = right[rows].mean().item()
        found.append((said[rows].mean().item(), share, *data.interval(share, len(rows)), len(rows)))
    return found


def evaluate(cfg, model, autocast, train, valid):
    """Loss, accuracy, calibration and margins on held-out and on training pairs, and the held-out pairs that are ranked most
    wrongly, as text."""
    found, decode = {}, data.tokenizer(model.config.vocab_size).decode
    for key, tokens in (("train_eval", train), ("val_reward", valid)):
        chosen, rejected = rewards(cfg, model, autocast, tokens)
        margins = chosen - rejected
        found |= {f"{key}_loss": losses.reward_loss(chosen, rejected).mean().item(),
                  f"{key}_accuracy": losses.wins(chosen, rejected).mean().item(),
                  f"{key}_calibration": (bins := calibration(margins)),
                  f"{key}_calibration_error": sum(n * abs(said - share) for said, share, *_, n in bins) / len(margins),
                  f"{key}_margins": [float(f"{m:.4g}") for m in margins.tolist()]}
    worst = [f"{decode(valid[i][0].tolist())}\n  chosen {chosen[i]:+.2f} [{decode(valid[i][1].tolist())}]\n"
             f"  rejected {rejected[i]:+.2f} [{decode(valid[i][2].tolist())}]\n\n" for i in margins.argsort()[:4].tolist()]
    return found | {"val_margin": margins.mean().item(), "val_chosen_reward": chosen.mean().item(),
                    "val_rejected_reward": rejected.mean().item()}, "".join(worst)


def check_start(found):
    """Before the first step the head is zero."""
    if found["val_reward_accuracy"] != 0.5 or abs(found["val_reward_loss"] - math.log(2)) > 1e-6:
        raise InputError(f"at step 0 not all rewards are equal: loss {found['val_reward_loss']:.6f}, expected log 2 = "
                         f"{math.log(2):.6f}; accuracy {found['val_reward_accuracy']}, expected 0.5")


@torch.no_grad()
def sft_logps(cfg, model, autocast, valid):
    """A baseline: how often the model that we start from finds the chosen response likelier than the rejected one."""
    won = []
    for rows in data.in_order(valid, 4 * cfg.micro_batch):
        with autocast():
            logps = losses.batch_logps(model, data.pair_batch(valid, rows).to(model.wte.weight.device))
        won.append(losses.wins(*logps.chunk(2)))
    return torch.cat(won).mean().item()


def pair_losses(model, batch):
    """Losses and whether the chosen response won (1, 0, or 1/2 at a tie) of a micro-batch of B pairs, each (B,)."""
    chosen, rejected = losses.batch_rewards(model, batch).chunk(2)
    return losses.reward_loss(chosen, rejected), losses.wins(chosen, rejected)


def main(cfg):
    runs.validate(cfg)
    if cfg.eval_answers:
        raise InputError(f"--eval-answers {cfg.eval_answers}: a reward model gives no answers, expected 0")
    if cfg.dry_run:
        return plan.show(cfg, data.reward_batch, 3, lambda model: lambda batch: pair_losses(model, batch)[0].sum(),
                         lambda config: gpt.RewardModel(config, cfg.head == "likelihood"))
    run = runs.Run(cfg)

    # ---- device and seed ---------------------------------------------------------------------------------------------
    device, autocast = runs.setup(cfg)

    # ---- data --------------------------------------------------------------------------------------------------------
    model = gpt.load(cfg.init, dropout=cfg.dropout, block_size=cfg.block_size).to(device)
    init_sha256 = fingerprint(model.state_dict())
    train, valid, counts = data.load(cfg.data, model.config, cfg.half)
    valid = valid[:cfg.eval_samples]
    order = data.Order(train.lengths().sum(1), cfg.micro_batch * parallel.size(), cfg.seed)
    steps = runs.count_steps(cfg, len(train))
    longer, likelier = data.longer_wins(valid), sft_logps(cfg, model.eval(), autocast, valid)

    # ---- model -------------------------------------------------------------------------------------------------------
    model = gpt.reward_model(model, likelihood=cfg.head == "likelihood")
    model.checkpoint_activations = cfg.checkpoint_activations
    if cfg.lora_rank:
        lora.add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_bias)

    # ---- optimizer ---------------------------------------------------------------------------------------------------
    optimizer = optim.make(cfg.optimizer, model, cfg.lr, cfg.betas, cfg.weight_decay, cfg.accumulate)
    per_update = optim.per_update(cfg.optimizer, cfg.accumulate)

    # ---- micro-batches -----------------------------------------------------------------------------------------------
    def micro_batches(rows):   # this process' share of each; None where it has no row
        return [data.reward_batch(train, r).to(device) if len(r) else None for r in map(parallel.mine, rows)]

    def micro_losses(batches):
        """(loss, share won), each divided by the pairs of all: a mean of means would weigh a short micro-batch more."""
        pairs, = parallel.total(sum(batch.responses for batch in batches if batch) // 2)
        for batch in batches:
            with autocast():
                found = pair_losses(model, batch) if batch else torch.zeros(2)
            yield [x.sum() / pairs for x in found]

    def drawn(rng):   # the losses of a step's worth of micro-batches, for the variance probe
        return (loss for loss, _ in micro_losses(micro_batches(order.draw(run.at["micro_step"], rng, cfg.accumulate))))

    def centred():
        """The states of the model and of its adapters with the mean reward of chosen training responses at 0. The model itself
        stays as it is: last.pt does not hold the centre, and a resumed run must be the same to the bit."""
        model.center = rewards(cfg, model, autocast, train[:CENTER], ["chosen"]).mean().to(device)
        states = lora.merged_state(model), lora.adapter_state(model)
        model.center = torch.zeros_like(model.center)
        return states

    # ---- begin -------------------------------------------------------------------------------------------------------
    size = optim.footprint(cfg.optimizer, model)
    run.say(f"reward model from {cfg.init} on {device}, for {steps} steps of {runs.step_size(cfg)} pairs\n"
            f"{optim.describe(size)}\ndata {cfg.data}: {data.describe(counts)}\n"
            f"on {len(valid)} held-out pairs: longer-wins {longer:.3f}, log-prob of {cfg.init} {likelier:.3f}")
    longest = order.longest(steps * cfg.accumulate)
    runs.rehearse((loss for loss, *_ in micro_losses(micro_batches([longest]))), optimizer, size["optimizer_bytes"], device)
    run.begin(model, optimizer, steps, init_sha256=init_sha256, data_sha256=data.sha256(train, valid), **size,
              device=str(device), data=counts, baseline_longer_wins=longer, baseline_sft_logps=likelier, val_pairs=len(valid))

    # ---- loop --------------------------------------------------------------------------------------------------------
    while True:
        if run.evaluation_due():
            found, wrong = evaluate(cfg, model, autocast, train[:cfg.eval_samples], valid)
            if run.at["step"] == 0:
                check_start(found)
            if run.evaluated("val_reward_loss", found, wrong):
                run.keep_best(model.config, *centred())
            run.draw(plots.draw)
            low, high = data.interval(found["val_reward_accuracy"], len(valid))
            run.say("step {step:>5} held-out loss {val_reward_loss:.4f} | accuracy {val_reward_accuracy:.3f} [{low:.3f}, "
                    "{high:.3f}] | calibration error {val_reward_calibration_error:.3f} | training pairs: loss "
                    "{train_eval_loss:.4f}, accuracy {train_eval_accuracy:.3f}".format(**run.at, **found, low=low, high=high))
        if run.keep_due():
            run.keep(f"step-{run.at['step']}.pt", model.config, centred()[0])
        if not run.goes_on(model, optimizer):
            break

        step = run.at["step"]
        lr = optim.set_lr(optimizer, optim.lr_at(step, steps, cfg.lr, cfg.schedule, cfg.warmup))
        if run.probe_due():
            run.probed(variance.measure(optimizer, model.h[-1], drawn, cfg.accumulate, per_update, [cfg.seed, step],
                                        cfg.grad_clip, scale=run.scaler.get_scale()))
        began = time.time()
        batches = micro_batches(order[step * cfg.accumulate + k] for k in range(cfg.accumulate))
        (train_loss, train_won), norms = run.step(model, optimizer, batches, micro_losses(batches))
        mine = [batch for batch in batches if batch]
        run.stepped(began, norms, lr, samples=sum(b.responses for b in mine) // 2, tokens=sum(len(b.tokens) for b in mine),
                    flops=sum(gpt.flops(model.config, len(b.tokens), b.attended, b.responses + model.likelihood * len(b.targets),
                                        model.likelihood * len(b.targets), True, cfg.lora_rank) for b in mine),
                    train_loss=train_loss, train_reward_accuracy=train_won)

    return run.end()


if __name__ == "__main__":
    runs.command_line(main, Config)
