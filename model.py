"""
GPT-2 in one file: the network, a KV-cached generate, and weights in and out.

    model = load("gpt2")                      # a size, one of our runs or checkpoints, or a Hugging Face folder or repository
    logits = model(idx)                       # (B, T) token ids -> (B, T, V)
    hidden = model.hidden(idx)                # (B, T, C) after the final LayerNorm, no logits yet
    hidden = model.hidden(ids, packing, at)   # the same without padding, and only where it is read: (S, C)
    python model.py runs/dpo my-gpt2          # export: a folder that transformers' from_pretrained loads

Letters, here and everywhere: B rows (in losses.py: pairs), T time, C channels (n_embd), V vocabulary, nh heads,
hs head size; N tokens in a line, M places (Packing), S scored tokens, R responses, K micro-batches a step.
Parameters carry the names of the published GPT-2 weights. Two differences from them: every matrix is an
nn.Linear (out, in), where theirs is a Conv1D (in, out), and the head is the token embedding itself, so it is
stored once. The training scripts never call forward(): their micro-batches are packed (Packing), and the
vocabulary matrix meets only the positions that are scored (losses.py).
"""
import contextlib
import json
import math
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from files import (InputError, download, read_checkpoint, read_json, read_safetensors, reason, torch_load, write_atomically,
                   write_safetensors)


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0


SIZES = {
    "mini":        GPTConfig(block_size=512, vocab_size=2048, n_layer=2, n_head=4, n_embd=128),  # 0.7 M, from scratch
    "gpt2":        GPTConfig(n_layer=12, n_head=12, n_embd=768),    # 124 M
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),   # 355 M
    "gpt2-large":  GPTConfig(n_layer=36, n_head=20, n_embd=1280),   # 774 M
    "gpt2-xl":     GPTConfig(n_layer=48, n_head=25, n_embd=1600),   # 1558 M
}

# ----------------------------------------------------------------------------------------------------------------------
# the network

class Linear(nn.Linear):
    """nn.Linear; while generate runs on a CPU, `packed` is its matrix in oneDNN's layout (packed_weights; not a Packing)."""
    packed = None

    def forward(self, x):
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Packing(NamedTuple):
    """How N tokens in a line, without padding, make sequences. The matrices see every token once, (N, C). Attention sees a few
    rectangles (B, T), each with sequences of similar length, padded on the right; M places in all. The responses to one prompt
    share its tokens: these stand in several sequences and, since a prompt sees only itself, are the same in each (Wang & Hegde
    2024, arXiv 2410.20305). Of data.collate's example, the tokens 10 11 12 20 21 30: positions 0 1 2 3 4 3, shapes (1, 4) (1, 5),
    places 0 1 2 5 and 0 1 2 3 4, back 4 5 6 7 8 3."""
    positions: torch.Tensor   # (N,) of each token in its sequence
    shapes: tuple             # the rectangles' (B, T)
    places: torch.Tensor      # (M,) for each place, the number of its token, 0..N-1; padding has any, no real token sees it
    back: torch.Tensor        # (N,) for each token, one of its places, 0..M-1, to read attention's output from


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)   # query, key and value in one product
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, packing, at, cache, layer):
        """packing: None for rows (B, T), as in generate. at: numbers of the only tokens that are still needed (last block); None:
        all. cache, layer: for generate. F.embedding(i, x) below is x[i], with a faster backward pass."""
        if packing is None:
            return self.c_proj(self.attend(self.c_attn(x), cache, layer))
        parts = F.embedding(packing.places, self.c_attn(x)).split([B * T for B, T in packing.shapes])   # (N, 3C) -> (M, 3C)
        y = [self.attend(part.view(*shape, -1)).flatten(0, 1) for part, shape in zip(parts, packing.shapes)]
        return self.c_proj(F.embedding(packing.back if at is None else packing.back[at], torch.cat(y)))   # (M, C) -> (N, C)

    def attend(self, qkv, cache=None, layer=None):
        """(B, T, 3C) -> (B, T, C)"""
        B, T, C = *qkv.shape[:2], qkv.size(2) // 3
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)    # each (B, nh, T, hs)
                   for part in qkv.split(C, dim=2))
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(layer, k, v)
        # causal, but for a single new token, which sees all. Padding sits on the right, where no real token can see it
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T > 1,
                                           dropout_p=self.dropout if self.training else 0.0)
        return y.transpose(1, 2).reshape(B, T, C)   # heads side by side again


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x, lean):
        """lean: there will be a backward pass. GELU's output, 4C of 17C numbers that a layer would keep of a token, is not kept
        for it, but computed again from h."""
        h = self.c_fc(x)
        y = F.gelu(h, approximate="tanh")
        if not lean:
            return self.c_proj(y)
        storage = y.untyped_storage()._cdata   # c_proj saves a view of y

        def pack(t):
            return t.shape if t.untyped_storage()._cdata == storage else t

        def unpack(t):
            return F.gelu(h, approximate="tanh").view(t) if isinstance(t, torch.Size) else t
        with saved_tensors_hooks(pack, unpack):
            return self.c_proj(y)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, packing=None, at=None, cache=None, layer=None, lean=False):
        x = (x if at is None else F.embedding(at, x)) + self.drop(self.attn(self.ln_1(x), packing, at, cache, layer))
        return x + self.drop(self.mlp(self.ln_2(x), lean))


def embedding(n, width):
    """nn.Embedding without its own random start, which on the meta device would cost two seconds of imports."""
    return nn.Embedding.from_pretrained(torch.empty(n, width), freeze=False)


class Tied(torch.autograd.Function):
    """Both uses of the vocabulary matrix: ids (...), weight (V, C) -> the ids' rows (..., C), and the weight again, as the head.
    The rows' gradient is added to the head's in place; autograd itself would make a second (V, C) of it, at the memory's peak."""

    @staticmethod
    def forward(ctx, idx, weight):
        ctx.save_for_backward(idx)
        return F.embedding(idx, weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad_rows, grad_head):
        idx, = ctx.saved_tensors
        return None, grad_head.contiguous().index_add_(0, idx.flatten(), grad_rows.flatten(0, -2))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): learned positions, pre-LayerNorm blocks, tanh-GELU, head tied to the embedding."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise InputError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.config = config
        self.checkpoint_activations = False   # True: of a block its input is kept for the backward pass, the rest computed again
        self.wte = embedding(config.vocab_size, config.n_embd)   # tokens, and the head
        self.wpe = embedding(config.block_size, config.n_embd)   # positions
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        std = 0.02 * max(1.0, (768 / config.n_embd) ** 0.5)   # 0.02 is for 768 channels; a narrower sum needs larger terms
        for name, p in self.named_parameters():
            if p.is_meta:   # only shapes are wanted; nothing to draw
                continue
            if name.endswith("c_proj.weight"):   # two additions to the stream a layer: it should not grow with depth
                nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=std / 2 if name == "wpe.weight" else std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx, packing=None, at=None, cache=None):
        """Final hidden states, one matrix product short of the logits.

        idx (B, T) token ids -> (B, T, C). Or packed ones (N,) with their Packing -> (N, C); or, of these, the tokens with the
        numbers `at` (S,) alone -> (S, C): the last block leaves out what is not read.
        """
        return self.hidden_and_head(idx, packing, at, cache)[0]

    def hidden_and_head(self, idx, packing=None, at=None, cache=None):
        """The same, and the vocabulary matrix (V, C) to multiply them by: wte.weight, whose gradient is made once (Tied)."""
        T = idx.size(-1) if packing is None else max(T for _, T in packing.shapes)
        if cache is None and T > self.config.block_size:
            raise InputError(f"a sequence of {T} tokens does not fit block_size {self.config.block_size}")
        if packing is not None:
            pos = packing.positions
        else:
            pos = torch.arange(T, device=idx.device).expand(idx.shape) if cache is None else cache.positions(T)
        x, head = Tied.apply(idx, self.wte.weight)
        x = self.drop(x + self.wpe(pos))
        for layer, block in enumerate(self.h):
            read = at if layer == len(self.h) - 1 else None
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, packing, read, use_reentrant=False)
            else:
                x = block(x, packing, read, cache, layer, lean=torch.is_grad_enabled())
        return self.ln_f(x), head

    def forward(self, idx):
        """idx (B, T) -> logits (B, T, V)."""
        return F.linear(*self.hidden_and_head(idx))

    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None, generator=None):
        """Continue each prompt. Greedy at temperature 0.

        prompts: list of B sequences of token ids, of any lengths; stop: a function from the ids generated so far
        to True when the answer is over (a stop string, say); generator: a torch.Generator of the model's device.
        Returns a list of B lists of new ids. An answer ends with end-of-text (the last id of the vocabulary,
        included), when stop says so, after max_new_tokens, or when the context is full.
        """
        return _generate(self, prompts, max_new_tokens, temperature, top_k, top_p, stop, generator)


class RewardModel(GPT):
    """GPT-2 that scores a dialogue: a linear head n_embd -> 1, read at the dialogue's last token. It
    starts at zero. Only differences of rewards are learned; `center` says where zero is.

    likelihood: not the textbook's, the head has one input more, the log-probability of the response to this very model: r = w h +
    a log pi(y|x). Without it a reward model of two layers does not find wrong facts. We think that this is since what it knows of
    an answer stands in its last layer, behind which nothing compares it with what was said; not proved.
    """

    def __init__(self, config, likelihood=False):
        super().__init__(config)
        self.likelihood = likelihood
        self.reward_head = nn.Linear(config.n_embd + likelihood, 1, bias=False)
        nn.init.zeros_(self.reward_head.weight)
        self.register_buffer("center", torch.zeros(()))   # the mean reward of the training set's chosen responses

    def rewards(self, hidden, logps=None):
        """(R, C) hidden states at the last tokens of R dialogues, with `likelihood` the responses' log-probabilities (R,) -> (R,)
        rewards, never in half precision."""
        with torch.autocast(hidden.device.type, enabled=False):
            inputs = hidden.to(self.center.dtype)
            if self.likelihood:
                inputs = torch.cat((inputs, logps[:, None].to(inputs.dtype)), dim=1)
            return self.reward_head(inputs).squeeze(1) - self.center


def reward_model(model, likelihood=False):
    """A RewardModel on the weights of a GPT, whose tensors it takes over."""
    device = model.wte.weight.device
    head = {"reward_head.weight": torch.zeros(1, model.config.n_embd + likelihood, device=device),
            "center": torch.zeros((), device=device)}
    return build(model.config, {**model.state_dict(), **head}, "the model", RewardModel)


def flops(config, tokens, attended, scored, head=None, backward=False, rank=0):
    """FLOPs of a forward pass over packed tokens that is read at `scored` places, by the vocabulary matrix at `head` of them (all
    unless given); or of forward and backward. 2 per weight and token, 4 C per layer and attended place, and twice that to go
    back; with LoRA of this rank, frozen matrices need the gradient of their input only. The last block's matrices
    behind attention meet scored places only."""
    C, head = config.n_embd, scored if head is None else head
    matrices = 24 * config.n_layer * C ** 2 * tokens - 18 * C ** 2 * (tokens - scored) + 2 * config.vocab_size * C * head
    adapters = 2 * rank * C * (16 * config.n_layer * tokens - 12 * (tokens - scored))   # in + out of c_proj, c_fc, c_proj: 12 C
    attention = 4 * config.n_layer * C * attended
    if not backward:
        return matrices + adapters + attention
    return (2 if rank else 3) * matrices + 3 * (adapters + attention)

# ----------------------------------------------------------------------------------------------------------------------
# generation

class KVCache:
    """Keys and values of past tokens, so that a new token costs one position and not the whole sequence.

    Prompts of unequal length stand left-aligned in the first columns, as many as the longest has tokens; behind them, each new
    token has a column in all rows. What is between the end of a prompt and the first new token is padding, hidden by the mask.
    """

    def __init__(self, config, lengths, new, dtype):
        B, device, width = len(lengths), lengths.device, int(lengths.max())
        self.config, self.lengths, self.end = config, lengths, 0   # tokens a row has; columns in use
        self.kv = torch.empty(2, config.n_layer, B, config.n_head, width + new, config.n_embd // config.n_head,
                              device=device, dtype=dtype)
        columns = torch.arange(width + new, device=device)
        padding = (columns >= lengths[:, None]) & (columns < width)   # (B, width + new)
        self.mask = torch.zeros(padding.shape, device=device, dtype=dtype).masked_fill(padding, -math.inf)[:, None, None]

    def positions(self, T):
        """(B, T) of the tokens that come now: whole prompts at first, then one token a row."""
        if self.end == 0:
            return torch.arange(T, device=self.lengths.device).expand(len(self.lengths), T)
        return self.lengths[:, None].clamp(max=self.config.block_size - 1)   # a closed row may run over the end, unread

    def extend(self, layer, k, v):
        """Store k, v (B, nh, T, hs) of the tokens that come now; return the keys, the values and the mask to attend with."""
        keys, values, end = *self.kv[:, layer], self.end + k.size(2)
        keys[:, :, self.end:end], values[:, :, self.end:end] = k, v
        if self.end == 0:   # plain causal attention among themselves
            return k, v, None
        return keys[:, :, :end], values[:, :, :end], self.mask[..., :end]

    def advance(self, T):
        """After the pass through all layers."""
        self.lengths = self.lengths + (self.end > 0)
        self.end += T

    def keep(self, rows):
        """Go on with these rows only."""
        self.kv, self.lengths, self.mask = self.kv[:, :, rows], self.lengths[rows], self.mask[rows]


def sample(logits, temperature, top_k, top_p, generator):
    """logits (B, V) -> token ids (B,). top_k keeps the k likeliest, top_p the fewest that hold that much probability."""
    if temperature < 1e-6:   # below it fp32 has no room for the differences
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p and top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)   # probability of everything likelier
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, (before >= top_p) & (before > 0))
        logits = logits.masked_fill(drop, -math.inf)
    cdf = logits.softmax(-1).cumsum(-1)   # one uniform number a row; torch.multinomial draws V of them
    u = torch.rand(len(cdf), 1, generator=generator, device=cdf.device) * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True).squeeze(-1).clamp(max=cdf.size(-1) - 1)


@contextlib.contextmanager
def packed_weights(model, rows):
    """Inside, products with the model's matrices go through oneDNN where they can, on a CPU in fp32; gives the head as a function
    of hidden states.

    A new token reads all weights for a few rows, and F.linear (MKL) reads them at a quarter to a half of the memory's speed.
    oneDNN is faster on the weights as they are; for several rows it wants them in blocks, which is a second copy of the weights
    for the time being. Other devices, dtypes and autocast keep F.linear.
    """
    weight, ops = model.wte.weight, torch.ops.mkldnn
    if (weight.device.type != "cpu" or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
            or not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise")):
        yield lambda h: F.linear(h, weight)
        return
    layers = [layer for layer in model.modules() if isinstance(layer, Linear)]

    def pack(w):
        w = w.detach()
        return ops._reorder_linear_weight(w, rows) if rows > 1 else w
    try:
        for layer in layers:
            layer.packed = pack(layer.weight)
        head = pack(weight)
        yield lambda h: ops._linear_pointwise(h, head, None, "none", [], "")
    finally:
        for layer in layers:
            layer.packed = None


@torch.inference_mode()
def _generate(model, prompts, max_new_tokens, temperature, top_k, top_p, stop, generator):
    config, device = model.config, model.wte.weight.device
    lengths = [len(p) for p in prompts]
    if not prompts:
        return []
    if not all(0 < n <= config.block_size for n in lengths):
        raise InputError(f"a prompt of {max(lengths) if min(lengths) else 0} tokens: a prompt takes 1 to block_size "
                         f"{config.block_size} tokens")
    idx = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
    for row, prompt in zip(idx, prompts):
        row[:len(prompt)] = torch.as_tensor([int(t) for t in prompt])
    autocast = torch.is_autocast_enabled(device.type)
    cache = KVCache(config, torch.tensor(lengths, device=device), min(max_new_tokens, config.block_size - min(lengths)),
                    torch.get_autocast_dtype(device.type) if autocast else model.wte.weight.dtype)
    answers, rows = [[] for _ in prompts], list(range(len(prompts)))   # rows[i]: whose answer row i of the batch is
    x, was_training = idx.to(device), model.training
    model.eval()
    try:
        with packed_weights(model, len(prompts)) as head:
            for _ in range(max_new_tokens):
                h = model.hidden(x, cache=cache)
                h = h[:, 0] if cache.end else h[torch.arange(len(h), device=device), cache.lengths - 1]   # (B, C)
                cache.advance(x.size(1))
                tokens = sample(head(h), temperature, top_k, top_p, generator)
                open_ = []
                for i, (b, token) in enumerate(zip(rows, tokens.tolist())):
                    if b is not None:
                        answers[b].append(token)
                        full = lengths[b] + len(answers[b]) > config.block_size   # the new token itself needs a position
                        if token == config.vocab_size - 1 or full or (stop is not None and stop(answers[b])):
                            rows[i] = None
                        else:
                            open_.append(i)
                if not open_:
                    break
                if len(open_) <= len(rows) // 2:   # closed rows run on, unread, until they are half of the batch
                    cache.keep(open_)
                    tokens, rows = tokens[open_], [rows[i] for i in open_]
                x = tokens[:, None]
    finally:   # stop() may raise, as Ctrl-C does
        model.train(was_training)
    return answers

# ----------------------------------------------------------------------------------------------------------------------
# weights in and out

HUB_NAMES = {name: f"openai-community/{name}" for name in SIZES if name != "mini"}


def download_model(repository):
    """The folder that holds a hub repository's config.json and weights; safetensors where it has them."""
    folder = download(f"{repository}/resolve/main/config.json").parent
    if not (folder / "pytorch_model.bin").is_file():   # it lies there only if there were no safetensors
        try:
            download(f"{repository}/resolve/main/model.safetensors")
        except FileNotFoundError:
            download(f"{repository}/resolve/main/pytorch_model.bin")
    return folder


def load(name, dropout=0.0, block_size=None, kind=GPT):
    """A GPT in fp32 on the CPU: `mini`, which is `random:mini`, or another `random:SIZE` (from torch's global generator), a size
    in SIZES (weights from the hub), one of our run folders (its best.pt) or checkpoints, a Hugging Face GPT-2 folder, or
    `hf:owner/repository`. A smaller block_size drops the positions behind it. kind=RewardModel: a run of train_reward.py."""
    config, state = _read(name)
    if (state is not None and "reward_head.weight" in state) != (kind is RewardModel):
        raise InputError(f"{name} is a reward model, and a language model is needed here" if kind is GPT else
                         f"{name} is a language model, and a reward model is needed here: train_reward.py makes one of it")
    cut = _cut(config, name, block_size, dropout)
    if kind is RewardModel and "center" not in state:
        raise InputError(f"{name} holds what a run trains, and no centre: give the run's folder, or a step-N.pt")
    if state is None:
        return GPT(cut)
    wpe = state.get("wpe.weight")
    if wpe is not None and wpe.shape[:1] == (config.block_size,):   # anything else is for build to refuse
        state["wpe.weight"] = wpe[:cut.block_size].clone()
    return build(cut, state, name, kind)


def config_of(name, block_size=None, dropout=0.0):
    """The GPTConfig that load() would give; of a size by its name without its weights."""
    config = SIZES[name] if name in SIZES else _read(name)[0]
    return _cut(config, name, block_size, dropout)


def _cut(config, name, block_size, dropout):
    if block_size is not None and not 0 < block_size <= config.block_size:
        raise InputError(f"block_size {block_size}: {name} has positions for 1 to {config.block_size} tokens")
    return replace(config, dropout=dropout, block_size=block_size or config.block_size)


def _read(name):
    """(GPTConfig, state dict with this file's names and shapes); the state is None where the weights are to be random."""
    path = Path(name)
    if name == "mini" or name.startswith("random:"):
        size = name.removeprefix("random:")
        if size not in SIZES:
            raise InputError(f"{name}: expected random: and one of {', '.join(SIZES)}")
        return SIZES[size], None
    if name in HUB_NAMES:
        return from_folder(download_model(HUB_NAMES[name]))
    if name.startswith("hf:"):
        if not re.fullmatch(r"hf:(?!\.+/)[\w.-]+/(?!\.+$)[\w.-]+", name):   # a part `..` would leave the cache's folder
            raise InputError(f"{name}: expected hf:OWNER/REPOSITORY, letters, digits, dots and hyphens")
        return from_folder(download_model(name.removeprefix("hf:")))
    if path.is_file() or (path / "best.pt").is_file():
        checkpoint = read_checkpoint(path if path.is_file() else path / "best.pt")
        config, state = checkpoint["model_config"], checkpoint["model"]
        if not isinstance(config, dict) or config.keys() != asdict(GPTConfig()).keys():
            raise InputError(f"{name}: a checkpoint of another version, its model_config holds {str(list(config))[:80]}"
                             if isinstance(config, dict) else f"{name}: expected model_config to be a dictionary")
        if not isinstance(state, dict):
            raise InputError(f"{name}: expected a dictionary of tensors, found {type(state).__name__}")
        if "wte.weight" not in state:
            raise InputError(f"{name}: holds only what a LoRA run trains: give the run's folder, whose best.pt is merged")
        if not (type(config["dropout"]) in (int, float) and 0 <= config["dropout"] < 1):
            raise InputError(f"{name}: expected a dropout from 0 to below 1, found {str(config['dropout'])[:40]}")
        return _sizes(name, config), state
    if path.is_dir():
        return from_folder(path)
    raise InputError(f"no model {name!r}: expected {', '.join(SIZES)}, a run folder, a checkpoint, a Hugging Face GPT-2 folder, "
                     "or hf:OWNER/REPOSITORY")


def _sizes(source, config):
    """A GPTConfig of a dictionary from a file."""
    if not all(type(config[key]) is int and 0 < config[key] < 2 ** 31 for key in config if key != "dropout"):
        raise InputError(f"{source}: expected whole numbers above 0, found {str(config)[:200]}")
    return GPTConfig(**config)


def build(config, state, source, kind=GPT):
    """A model that takes over the tensors of `state`: no random initialisation, every key, shape and dtype accounted for."""
    kinds = [key for key, t in state.items() if not (isinstance(t, torch.Tensor) and t.dtype in FLOATS)]
    if kinds:
        raise InputError(f"{source}: expected floating-point numbers, found {kinds[0][:80]} of "
                         f"{getattr(state[kinds[0]], 'dtype', type(state[kinds[0]]).__name__)}")
    if 6 * config.n_layer > len(state) + 12:   # a layer has 12; before so many are built
        raise InputError(f"{source}: {len(state)} tensors do not make {config.n_layer} layers")
    with torch.device("meta"):
        head = state.get("reward_head.weight")
        model = GPT(config) if kind is GPT else kind(config, head is not None and head.shape[1:] == (config.n_embd + 1,))
    want = {key: tuple(p.shape) for key, p in model.state_dict().items()}
    have = {key: tuple(t.shape) for key, t in state.items()}
    if want != have:
        wrong = sorted(key for key in want.keys() | have.keys() if want.get(key) != have.get(key))
        raise InputError(f"{source}: {len(wrong)} tensors do not fit the model, first {wrong[0]}: expected shape "
                         f"{want.get(wrong[0], 'none')}, found {have.get(wrong[0], 'none')}")
    broken = [key for key, t in state.items() if not t.isfinite().all()]
    if broken:
        raise InputError(f"{source}: {broken[0]} holds numbers that are not finite")
    model.load_state_dict({key: t.float() for key, t in state.items()}, strict=True, assign=True)
    return model.requires_grad_(True)


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_conv1d(key):
    return key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))   # stored (in, out) by OpenAI


def from_folder(folder):
    """A Hugging Face GPT-2 folder: config.json with model.safetensors or, where that is missing, pytorch_model.bin."""
    folder = Path(folder)
    if not any((folder / f).is_file() for f in ("model.safetensors", "pytorch_model.bin")):
        raise InputError(f"{folder}: expected best.pt (a run), model.safetensors or pytorch_model.bin (Hugging Face), "
                         "found none of them")
    config = read_json(folder / "config.json")
    for key, value in {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
                       "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}.items():
        if config.get(key, value if key != "model_type" else None) != value:
            raise InputError(f"{folder}/config.json: expected {key} {value!r}, found {config.get(key)!r}")
    sizes = {"n_positions": config.get("n_positions", config.get("n_ctx", 1024)),
             **{key: config.get(key) for key in ("vocab_size", "n_layer", "n_head", "n_embd")}}
    config = _sizes(f"{folder}/config.json", {"block_size": sizes.pop("n_positions"), **sizes})
    safe = folder / "model.safetensors"
    state = read_safetensors(safe) if safe.is_file() else torch_load(folder / "pytorch_model.bin")
    if not all(isinstance(key, str) and isinstance(t, torch.Tensor) for key, t in state.items()):
        raise InputError(f"{folder}: expected tensors only in pytorch_model.bin")
    state = {key.removeprefix("transformer."): t for key, t in state.items()
             if not key.endswith((".attn.bias", ".attn.masked_bias"))}   # old files store the causal mask
    head = state.pop("lm_head.weight", None)
    if head is not None and not ("wte.weight" in state and torch.equal(head, state["wte.weight"])):
        raise InputError(f"{folder}: lm_head.weight differs from wte.weight, but GPT-2 ties them")
    state = {key: t.t().contiguous() if is_conv1d(key) and t.dim() == 2 else t for key, t in state.items()}
    return config, state


def export(model, folder):
    """Write config.json and model.safetensors, which transformers' GPT2LMHeadModel.from_pretrained(folder) loads."""
    folder, c = Path(folder), model.config
    if hasattr(model, "lora"):
        raise InputError("the model has adapters: export a merged copy, lora.merged(model)")
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: nothing is overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    eot = c.vocab_size - 1
    write_atomically(folder / "config.json", json.dumps({
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "n_positions": c.block_size, "n_ctx": c.block_size, "vocab_size": c.vocab_size,
        "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "bos_token_id": eot, "eos_token_id": eot,
        "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout}, indent=2).encode())
    write_safetensors(folder / "model.safetensors", {"transformer." + key: t.t() if is_conv1d(key) else t
                                                     for key, t in model.state_dict().items()})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("error: usage: python model.py MODEL FOLDER     write MODEL as a Hugging Face GPT-2 folder", file=sys.stderr)
        sys.exit(2)
    try:
        export(load(sys.argv[1]), sys.argv[2])
    except (InputError, OSError) as e:
        print(f"error: {reason(e)}", file=sys.stderr)
        sys.exit(2)
