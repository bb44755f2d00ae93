"""
Supervised fine-tuning: GPT-2 learns to answer as the chosen responses do.

    python train_sft.py                                         # the embedded data, from scratch, on a laptop
    python train_sft.py --init gpt2-medium --data hh-rlhf ...   # README: the GPU recipe
    python train_sft.py --init ... --lora-rank 8 --lr 5e-3      # adapters beside frozen weights (lora.py)
    python train_sft.py --data some.txt --loss-on all           # pre-training: plain text, every token

On several processes: torchrun --standalone --nproc-per-node N (parallel.py).
"""
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
from files import fingerprint


@dataclass
class Config(runs.Config):
    out: str = "runs/sft"
    eval_every: int = 250
    epochs: float = 4.0
    lr: float = 4e-3
    warmup: int = 40
    loss_on: Literal["response", "all"] = "response"   # what is learned: the last answer, or every token, also of plain text


@torch.no_grad()
def evaluate(cfg, model, autocast, train, valid):
    """Loss on held-out and on training examples, of pairs how often the chosen response is likelier than the rejected one, and
    what sampled answers look like. Draws from a generator of its own, so that evaluating changes nothing."""
    device, found = model.wte.weight.device, {}
    model.eval()
    with autocast():
        for key, tokens in (("val_loss", valid), ("train_eval_loss", train)):
            nll = scored = 0
            for rows in data.in_order(tokens, 4 * cfg.micro_batch):   # more fit where nothing is kept for a backward pass
                batch = data.sft_batch(tokens, rows, cfg.loss_on).to(device)
                logps = losses.token_logps(*batch.hidden_and_head(model), batch.targets)
                nll, scored = nll - logps.double().sum().item(), scored + len(batch.targets)
            found[key] = nll / scored
        if valid.paired:
            logps = [losses.batch_logps(model, data.pair_batch(valid, rows).to(device)).chunk(2)
                     for rows in data.in_order(valid, 4 * cfg.micro_batch)]
            chosen, rejected = map(torch.cat, zip(*logps))
            found |= {"val_logp_accuracy": losses.wins(chosen, rejected).mean().item(),
                      "val_chosen_logps": chosen.mean().item(), "val_rejected_logps": rejected.mean().item()}
        answers = data.sample_answers(model, valid, cfg.seed, cfg.eval_answers)
    model.train()
    return found | data.describe_answers(answers), data.show(model, valid, answers)


def batch_loss(model, batch, normaliser):
    return losses.sft_loss(*batch.hidden_and_head(model), batch.targets, normaliser)


def main(cfg):
    runs.validate(cfg)
    if cfg.dry_run:
        return plan.show(cfg, lambda tokens, rows: data.sft_batch(tokens, rows, cfg.loss_on), 2,
                         lambda model: lambda batch: batch_loss(model, batch, 1))
    run = runs.Run(cfg)

    # ---- device and seed ---------------------------------------------------------------------------------------------
    device, autocast = runs.setup(cfg)

    # ---- model -------------------------------------------------------------------------------------------------------
    model = gpt.load(cfg.init, dropout=cfg.dropout, block_size=cfg.block_size).to(device)
    init_sha256 = fingerprint(model.state_dict())
    model.checkpoint_activations = cfg.checkpoint_activations
    if cfg.lora_rank:
        lora.add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_bias, init_sha256)

    # ---- data --------------------------------------------------------------------------------------------------------
    train, valid, counts = data.load(cfg.data, model.config, cfg.half, need=cfg.loss_on)
    valid = valid[:cfg.eval_samples]
    order = data.Order(train.lengths()[:, :2].sum(1), cfg.micro_batch * parallel.size(), cfg.seed)
    steps = runs.count_steps(cfg, len(train))
    unigram = data.unigram_loss(train, valid, model.config.vocab_size, cfg.loss_on)
    longer = {"baseline_longer_wins": data.longer_wins(valid)} if valid.paired else {}
    unit = "blocks" if "train blocks" in counts else "dialogues"

    # ---- optimizer ---------------------------------------------------------------------------------------------------
    optimizer = optim.make(cfg.optimizer, model, cfg.lr, cfg.betas, cfg.weight_decay, cfg.accumulate)
    per_update = optim.per_update(cfg.optimizer, cfg.accumulate)

    # ---- micro-batches -----------------------------------------------------------------------------------------------
    def micro_batches(rows):   # this process' share of each; None where it has no row
        return [data.sft_batch(train, r, cfg.loss_on).to(device) if len(r) else None for r in map(parallel.mine, rows)]

    def micro_losses(batches):
        """Every micro-batch's summed loss is divided by the tokens of them all: then K micro-batches of unequal length have the
        gradient of one large batch. A mean of their means would not. A generator: a micro-batch's forward pass runs when the
        step asks for it, behind the backward pass (with PMA the update, too) of the one before."""
        normaliser, = parallel.total(sum(len(batch.targets) for batch in batches if batch))
        for batch in batches:
            with autocast():
                loss = batch_loss(model, batch, normaliser) if batch else torch.zeros(())
            yield (loss,)

    def drawn(rng):   # the losses of a step's worth of micro-batches, for the variance probe
        return (loss for loss, in micro_losses(micro_batches(order.draw(run.at["micro_step"], rng, cfg.accumulate))))

    # ---- begin -------------------------------------------------------------------------------------------------------
    size = optim.footprint(cfg.optimizer, model)
    run.say(f"SFT of {cfg.init} on {device}, for {steps} steps of {runs.step_size(cfg)} {unit}\n"
            f"{optim.describe(size)}\ndata {cfg.data}: {data.describe(counts)}\n"
            f"on {len(valid)} held-out {'pairs' if longer else unit}: unigram loss {unigram:.3f}"
            + "".join(f", longer-wins {share:.3f}" for share in longer.values()))
    if cfg.lora_rank and (cfg.init == "mini" or cfg.init.startswith("random:")):
        run.say(f"note: --init {cfg.init} is random, and adapters beside random weights learn little: give --init a trained "
                "model")
    longest = order.longest(steps * cfg.accumulate)
    runs.rehearse((loss for loss, in micro_losses(micro_batches([longest]))), optimizer, size["optimizer_bytes"], device)
    run.begin(model, optimizer, steps, init_sha256=init_sha256, data_sha256=data.sha256(train, valid), **size,
              device=str(device), data=counts, baseline_unigram_loss=unigram, **longer, val_pairs=len(valid))

    # ---- loop --------------------------------------------------------------------------------------------------------
    while True:
        if run.evaluation_due():
            found, samples = evaluate(cfg, model, autocast, train[:200], valid)
            if run.evaluated("val_loss", found, samples):
                run.keep_best(model.config, lora.merged_state(model), lora.adapter_state(model))
            run.draw(plots.draw)
            likelier = " | chosen likelier {val_logp_accuracy:.3f}" if valid.paired else ""
            run.say(("step {step:>5} held-out loss {val_loss:.4f}, train {train_eval_loss:.4f}" + likelier)
                    .format(**run.at, **found) + data.show_answers(found))
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
        (train_loss,), norms = run.step(model, optimizer, batches, micro_losses(batches))
        mine = [batch for batch in batches if batch]
        run.stepped(began, norms, lr, samples=sum(b.responses for b in mine), tokens=sum(len(b.tokens) for b in mine),
                    flops=sum(gpt.flops(model.config, *b.size, backward=True, rank=cfg.lora_rank) for b in mine),
                    train_loss=train_loss)

    return run.end()


if __name__ == "__main__":
    runs.command_line(main, Config)
