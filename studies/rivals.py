"""
The same training steps by us and by others: what studies.bench times, each side in a process of its own.

A side is a function (work, **options) -> (run, facts): run() does a step for each micro-batch of the work, the first one to warm
up, and returns the seconds of the others; facts go into the table. Sides share the shape, random weights, pairs, fp32, AdamW and
gradient clipping. Others get their token ids as they want them, so that no side tokenizes.
"""
import contextlib
import copy
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import data
import lora
import losses
import model as gpt
import optim
import reference
import runs
import train_dpo
import train_sft
from files import InputError

class Work(NamedTuple):
    """What every side gets: pairs of (prompt, chosen, rejected) token ids and the micro-batches they come in."""
    pairs: list       # of three lists of ids
    batches: list     # of lists of pairs' numbers, the first one to warm up
    model: str        # a size
    device: str

    def shuffled(self):
        """The pairs of all micro-batches but the first, in an order without regard to length."""
        order, size = np.random.default_rng(1).permutation(np.concatenate(self.batches[1:])).tolist(), len(self.batches[0])
        return self._replace(batches=[self.batches[0]] + [order[i:i + size] for i in range(0, len(order), size)])


def work(name, model, device, size=4, steps=4, longest=512):
    """Training pairs of a data set for `steps` micro-batches of `size`, and one to warm up: those at even quantiles of the length
    among all whose dialogues have at most `longest` tokens, the most alike together."""
    config = gpt.SIZES[model]
    pairs, _ = data.load_pairs(name, splits=("train",))
    tokens, _ = data.encode(pairs["train"], config.vocab_size, config.block_size)
    lengths = tokens.lengths()
    fits = np.flatnonzero(lengths[:, 0] + lengths[:, 1:].max(1) <= longest)
    fits = fits[np.argsort(lengths[fits].sum(1), kind="stable")]
    if len(fits) < size * (steps + 1):
        raise InputError(f"--data {name}: {len(fits)} pairs of at most {longest} tokens, expected {size * (steps + 1)} or more")
    at = [int((i + 0.5) / (size * steps) * len(fits)) for i in range(size * steps)]
    middle = [i for i in range(len(fits) // 2, len(fits)) if i not in at][:size]
    picked = [[part.tolist() for part in tokens[i]] for i in fits[middle + at]]
    return Work(picked, [list(range(i, i + size)) for i in range(0, len(picked), size)], model, device)


def long_pair(model, device, tokens, steps=2):
    """One random pair, three quarters of it prompt, as every micro-batch: the model reads `tokens` of either dialogue."""
    rng, cut = np.random.default_rng(1), tokens * 3 // 4
    pair = [rng.integers(gpt.SIZES[model].vocab_size, size=n).tolist() for n in (cut, *2 * [tokens - cut + 1])]
    return Work([pair], [[0]] * (steps + 1), model, device)


def rate():
    """FLOPs a second of a product that gpt2's blocks have, best of 20: the machine's rate, for MFU."""
    x, w, took = torch.randn(1370, 768), torch.randn(3072, 768), []
    for _ in range(20):
        began = time.perf_counter()
        F.linear(x, w)
        took.append(time.perf_counter() - began)
    return 2 * 1370 * 768 * 3072 / min(took)


def timed(device, steps):
    """Seconds of every step but the first."""
    took = []
    for step in steps:
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return took[1:]

# ----------------------------------------------------------------------------------------------------------------------
# ours: what a step of the training scripts does

def ours(work, kind, rank=0, bias="none", cached=True, checkpointing=False):
    """dpo and cdpo with the reference cached, as train_dpo.py has it by default for full fine-tuning, and the pass that fills the
    cache not timed; or else live, as it is by default with LoRA."""
    device, model, step = ready(work, rank, bias)
    model.checkpoint_activations = checkpointing
    tokens, cfg = tokens_of(work), train_dpo.Config(beta=0.1, loss="cdpo" if kind == "cdpo" else "dpo")
    if kind == "sft":
        batches = [data.sft_batch(tokens, rows, "all").to(device) for rows in work.batches]

        def loss(batch):
            return train_sft.batch_loss(model, batch, len(batch.targets))
    else:
        batches, look = [data.pair_batch(tokens, rows).to(device) for rows in work.batches], reference.live(model.eval())
        if cached:
            live, head = look, model.wte.weight.detach()
            os.environ["HF_HOME"] = tempfile.mkdtemp()
            look = reference.Cache(tokens, {"model": "random", "dtype": "torch.float32"},
                                   None if kind == "dpo" else head if rank else head.clone())
            look.fill(range(len(tokens)), 16, live, device, lambda text: None)
        elif not rank:
            look = reference.live(copy.deepcopy(model).requires_grad_(False))

        def loss(batch):
            return train_dpo.pair_losses(cfg, model, look, batch)[0].mean()
    needed = [gpt.flops(model.config, *b.size, backward=True, rank=rank) + looked(work, kind, cached, b) for b in batches]
    return (lambda: timed(device, [lambda b=b: step(loss(b)) for b in batches])), {
        "flops": sum(needed[1:]), **optim.footprint("adamw", model)}


def period(work, name):
    """One step of SFT on all tokens, of as many micro-batches as the work has, by the optimizer `name` as the scripts take it."""
    device, _ = runs.setup(runs.Config(device=work.device, dtype="float32"))
    model, K, tokens = gpt.GPT(gpt.SIZES[work.model]).to(device), len(work.batches) - 1, tokens_of(work)
    optimizer = optim.make(name, model, 1e-5, None, 0.1, K)
    batches = [data.sft_batch(tokens, rows, "all").to(device) for rows in work.batches]

    def step(some, per_update):
        scored = sum(len(batch.targets) for batch in some)
        optim.accumulated_step(model, optimizer, ((train_sft.batch_loss(model, batch, scored),) for batch in some),
                               [batch.rows for batch in some], per_update, 1.0)
    needed = sum(gpt.flops(model.config, *batch.size, backward=True) for batch in batches[1:])
    return (lambda: timed(device, [lambda: step(batches[:1], 1), lambda: step(batches[1:], optim.per_update(name, K))])), {
        "flops": needed, **optim.footprint(name, model)}


def looked(work, kind, cached, batch):
    """FLOPs of the reference in a step: a forward pass, or of a cached one CDPO's product with the head."""
    if kind == "sft" or cached and kind == "dpo":
        return 0
    return gpt.flops(gpt.SIZES[work.model], *((0, 0, 0, len(batch.targets)) if cached else batch.size))


def ready(work, rank=0, bias="none"):
    """The device, a random model with its adapters there, and what the scripts do with a loss."""
    device, _ = runs.setup(runs.Config(device=work.device, dtype="float32"))
    model = gpt.GPT(gpt.SIZES[work.model]).to(device)
    if rank:
        lora.add_lora(model, rank, bias=bias, base_sha256="random")
    optimizer = optim.make("adamw", model, 1e-5, None, 0.1)

    def step(loss):
        loss.backward()
        optim.clip(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return device, model, step


def tokens_of(work):
    flat = np.array([t for pair in work.pairs for part in pair for t in part], dtype=np.uint16)
    return data.Tokens(flat, np.cumsum([len(part) for pair in work.pairs for part in pair], dtype=np.int64).reshape(-1, 3))


def rectangle_sft(work):
    """The plain way: a padded rectangle, logits at every place, cross-entropy by autograd."""
    device, model, step = ready(work)
    batches = []
    for rows in work.batches:
        dialogues = [torch.tensor(work.pairs[i][0] + work.pairs[i][1]) for i in rows]
        batches.append([pad_sequence([d[cut] for d in dialogues], batch_first=True, padding_value=pad).to(device)
                        for cut, pad in ((slice(-1), 0), (slice(1, None), -1))])

    def micro_loss(ids, targets):
        return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=-1)
    return (lambda: timed(device, [lambda b=b: step(micro_loss(*b)) for b in batches])), {}

# ----------------------------------------------------------------------------------------------------------------------
# theirs

def theirs(work):
    """transformers' model of this shape, random."""
    import transformers
    c, device = gpt.SIZES[work.model], runs.setup(runs.Config(device=work.device))[0]
    config = transformers.GPT2Config(
        n_positions=c.block_size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        **{key: getattr(c, key) for key in ("vocab_size", "n_layer", "n_head", "n_embd")})
    folder = tempfile.mkdtemp()
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)   # trl reads its reference from where the model came from
    return transformers.GPT2LMHeadModel.from_pretrained(folder).to(device), device


def transformers_sft(work):
    """transformers' model and its own loss, our loop and optimizer."""
    model, device = theirs(work)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    batches = []
    for rows in work.batches:
        dialogues = [torch.tensor(work.pairs[i][0] + work.pairs[i][1]) for i in rows]
        ids, labels = (pad_sequence(dialogues, batch_first=True, padding_value=pad).to(device) for pad in (0, -100))
        batches.append({"input_ids": ids, "labels": labels, "attention_mask": (labels >= 0).long()})

    def step(batch):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return (lambda: timed(device, [lambda b=b: step(b) for b in batches])), {}


def trl_run(work, kind, rows, best, rank=0):
    """A trl trainer over these rows in this order. best: without activation checkpointing and, in DPO, with the reference's
    log-probabilities computed before; else its defaults, but in fp32."""
    import datasets   # these are installed for a comparison alone
    import peft
    import tokenizers
    import transformers
    import trl
    (model, device), eot, began, took = theirs(work), "<|endoftext|>", [], []
    words = {str(i): i for i in range(model.config.vocab_size - 1)} | {eot: model.config.vocab_size - 1}
    tokenizer = transformers.PreTrainedTokenizerFast(
        eos_token=eot, pad_token=eot, tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words)))
    Trainer, Config = (trl.DPOTrainer, trl.DPOConfig) if kind == "dpo" else (trl.SFTTrainer, trl.SFTConfig)

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            began.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            if device.type == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - began[-1])

    class Ready(Trainer):
        def _prepare_dataset(self, dataset, *_, **__):   # the ids are there
            return dataset
    options = {"gradient_checkpointing": False} if best else {}
    if kind == "dpo":
        options |= {"beta": 0.1, "precompute_ref_log_probs": best}
    args = Config(output_dir=tempfile.mkdtemp(), bf16=False, per_device_train_batch_size=len(work.batches[0]),
                  max_steps=len(work.batches), learning_rate=1e-5, report_to="none", save_strategy="no", disable_tqdm=True,
                  train_sampling_strategy="sequential", use_cpu=device.type == "cpu", **options)
    adapter = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True,
                              task_type="CAUSAL_LM") if rank else None
    trainer = Ready(model=model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
                    callbacks=[Clock()], peft_config=adapter)

    def run():
        with contextlib.redirect_stdout(None):
            trainer.train()
        return took[1:]
    return run, {}


def trl_dpo(work, best, rank=0):
    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), work.pairs[i])) for rows in work.batches for i in rows]
    return trl_run(work, "dpo", rows, best, rank)


def trl_sft(work, best):
    rows = [work.pairs[i][0] + work.pairs[i][1] for rows in work.batches for i in rows]
    return trl_run(work, "sft", [{"input_ids": ids, "labels": ids} for ids in rows], best)

# ----------------------------------------------------------------------------------------------------------------------
# CDPO's head alone

HEADS = 5   # how often it is timed


def cdpo_head(work, full, rows=376, pairs=4, repeats=HEADS):
    """Loss and gradient from hidden states on: ours, or by autograd through whole logits at the response positions. Memory is
    what comes on top of the inputs and of the matrix's gradient, which both sides need."""
    device, _ = runs.setup(runs.Config(device=work.device, dtype="float32"))
    c = gpt.SIZES[work.model]

    def inputs(rows, vocabulary, width):
        (hidden, ref_hidden), (weight, ref_weight) = ([torch.randn(n, width, device=device).mul_(std) for _ in range(2)]
                                                      for n, std in ((rows, 1), (vocabulary, 0.02)))
        return (hidden.requires_grad_(), weight.requires_grad_(), torch.randint(vocabulary, (rows,), device=device),
                torch.arange(rows, device=device) * 2 * pairs // rows, ref_hidden, ref_weight,
                torch.full((2 * pairs,), -100.0, device=device))

    def whole_logits(hidden, weight, targets, owner, ref_hidden, ref_weight, ref_logps):
        logp, ref_logp = (F.log_softmax(h @ w.T, 1) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
        r = losses.cdpo_regularizer(logp, ref_logp, targets, 0.1)
        logps = losses.sequence_logps(logp.gather(1, targets[:, None]).squeeze(1), owner, 2 * pairs)
        r = losses.sequence_logps(r / torch.bincount(owner)[owner], owner, 2 * pairs).view(2, -1).mean(0)
        return losses.dpo_loss(*logps.chunk(2), *ref_logps.chunk(2), 0.1)[0] + r

    def step(given):
        (whole_logits(*given) if full else losses.cdpo_loss(*given, 0.1, 1.0)[0]).mean().backward()
        given[0].grad = given[1].grad = None
    step(inputs(2 * pairs, 16, 8))   # what torch loads only now
    given = inputs(rows, c.vocab_size, c.n_embd)
    held = memory(device) + given[1].nbytes
    return (lambda: timed(device, [lambda: step(given)] * (repeats + 1))), {"given_bytes": held}


def memory(device):
    """Bytes that this process has now: on the GPU, or resident; where the system does not say, the most it has had."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else runs.peak_memory()
