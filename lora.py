"""
LoRA by hand (Hu et al. 2021, arXiv 2106.09685): beside every frozen matrix of the blocks a product of two thin ones that trains.

    W x + b   ->   W x + b + (alpha / r) B A x        W (out, in) frozen, A (r, in), B (out, r)

A is normal with standard deviation 1 / sqrt(in), so that a number of A x has the same size at every rank; B is zero, so that the
adapted model starts as the base, exactly. Four layers a block are adapted: c_attn, attention's c_proj, c_fc, MLP's c_proj. The
embedding, which is also the head, is not. With the adapters off the model *is* the base, to the bit: DPO with LoRA needs no
second model.

    add_lora(model, rank=8, alpha=16)             # in place; everything else is frozen
    with adapters_off(model) as reference: ...    # the base, trained biases put back too
    merge(model)                                  # in place: a plain GPT again
    save_adapter(model, "adapter.pt")             # A, B and trained biases alone
    python lora.py gpt2 runs/dpo-lora FOLDER      # base and adapter, merged, as a Hugging Face folder

r is the rank, alpha / r the scale: with alpha = 2r it is 2 at every rank.
"""
import contextlib
import sys
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

import model as gpt
from files import InputError, fingerprint, read_checkpoint, reason, write_checkpoint

BIASES = ("none", "lora_only", "all")


class LoRALinear(nn.Module):
    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        out_features, in_features = base.weight.shape
        self.base, self.scale, self.on = base, alpha / rank, True
        self.A = nn.Parameter((torch.randn(rank, in_features) / in_features ** 0.5).to(base.weight))   # one draw for all devices
        self.B = nn.Parameter(torch.zeros(out_features, rank).to(base.weight))
        self.drop = nn.Dropout(dropout)
        self.train(base.training)

    def forward(self, x):
        if not self.on:
            return self.base(x)
        rows = x.reshape(-1, x.size(-1))   # (N, in): a view of y changed in place would cost the backward pass a copy
        y = self.base(rows)
        # in place: a sum beside y would leave a hole as large as y in the heap, layer after layer; .to: autocast skips addmm_
        y.addmm_(F.linear(self.drop(rows), self.A), self.B.T.to(y.dtype), alpha=self.scale)
        return y.view(*x.shape[:-1], y.size(-1))

    def merged_weight(self):
        with torch.autocast(self.A.device.type, enabled=False):
            return self.base.weight + self.scale * self.B @ self.A


def add_lora(model, rank, alpha=None, dropout=0.0, bias="none", base_sha256=None):
    """Put an adapter beside every linear layer of the model's blocks, in place, and freeze everything else. Returns how many.

    rank: r, at least 1; alpha: the adapters' output is scaled by alpha / r, None: 2r; dropout: of their input. bias: `none` of
    the biases trains, `lora_only` those of the adapted layers, `all` of them, LayerNorm's included. base_sha256: fingerprint() of
    the model's state dict where it is known. Draws from torch's global generator.
    """
    width = model.config.n_embd
    if not (type(rank) is int and 1 <= rank <= width):
        raise InputError(f"LoRA rank: expected a whole number from 1 to the model's width {width}, found {rank}")
    alpha = 2 * rank if alpha is None else alpha
    if not (isinstance(alpha, (int, float)) and 0 < alpha < float("inf")):
        raise InputError(f"LoRA alpha: expected a finite number above 0, found {alpha}")
    if not (isinstance(dropout, (int, float)) and 0 <= dropout < 1):
        raise InputError(f"LoRA dropout: expected a share from 0 to below 1, found {dropout}")
    if bias not in BIASES:
        raise InputError(f"LoRA bias: expected {', '.join(BIASES)}, found {bias!r}")
    if hasattr(model, "lora"):
        raise InputError("the model has adapters already: merge them first")
    model.lora = {"rank": rank, "alpha": float(alpha), "bias": bias, "block_size": model.config.block_size,
                  "base_sha256": base_sha256 or fingerprint(model.state_dict())}
    model.requires_grad_(False)
    if hasattr(model, "reward_head"):   # new as well, and not in the base: it trains whole
        model.reward_head.requires_grad_(True)
    wrapped = 0
    for parent in list(model.h.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, LoRALinear(layer, rank, alpha, dropout))
                _train_bias(layer, bias != "none")
                wrapped += 1
            elif isinstance(layer, nn.LayerNorm):
                _train_bias(layer, bias == "all")
    _train_bias(model.ln_f, bias == "all")
    assert wrapped, "no linear layer to adapt"
    return wrapped


def _train_bias(layer, trains):
    if trains:   # the original stays at hand for adapters_off; not saved, since it is the base's
        layer.register_buffer("base_bias", layer.bias.detach().clone(), persistent=False)
        layer.bias.requires_grad_(True)


def adapters(model, on=False):
    """(name, LoRALinear) of every adapted layer. on: refuse a model whose adapters are off."""
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]
    if not found:
        raise InputError("the model has no adapters")
    if on and not all(layer.on for _, layer in found):
        raise InputError("the model's adapters are off: leave adapters_off first")
    return found


@contextlib.contextmanager
def adapters_off(model):
    """Inside, the model is its base, bit for bit: no adapter adds anything, and in the place of each bias that trains stands the
    base's. A graph that was built before and still waits for its backward pass is not touched."""
    layers = [layer for _, layer in adapters(model)]
    were_on = [layer.on for layer in layers]
    biased = [layer for layer in model.modules() if hasattr(layer, "base_bias")]
    trained = [layer.bias for layer in biased]
    try:
        for layer in layers:
            layer.on = False
        for layer in biased:
            layer.bias = nn.Parameter(layer.base_bias, requires_grad=False)
        yield model
    finally:
        for layer, on in zip(layers, were_on):
            layer.on = on
        for layer, bias in zip(biased, trained):
            layer.bias = bias


@torch.no_grad()
def merge(model):
    """Add the adapters into the weights, in place: a plain GPT, all of it trainable, as load() gives it. Returns it."""
    weights = {layer: layer.merged_weight() for _, layer in adapters(model, on=True)}
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if layer in weights:
                layer.base.weight.copy_(weights[layer])
                setattr(parent, name, layer.base)
        if hasattr(parent, "base_bias"):
            del parent.base_bias
    del model.lora
    return model.requires_grad_(True)


@torch.no_grad()
def merged_state(model):
    """The state dict of merge()'s model, on the CPU, while this one stays as it is. A plain GPT's is simply its own."""
    state = model.state_dict()
    if hasattr(model, "lora"):
        layers = {f"{name}.base.weight": layer for name, layer in adapters(model, on=True)}
        state = {key.replace(".base.", "."): (layers[key].merged_weight() if key in layers else t).cpu()
                 for key, t in state.items() if not key.endswith((".A", ".B"))}
    return state


def merged(model):
    """A merged copy, in fp32 on the CPU, to export: gpt.export(lora.merged(model), folder)."""
    return gpt.build(model.config, {key: t.clone() for key, t in merged_state(model).items()}, "the merged model")


def adapter_state(model):
    """What adapter.pt holds: rank, alpha, bias mode, the base's block size and SHA-256, and what trains. None for a plain GPT."""
    if not hasattr(model, "lora"):
        return None
    adapters(model, on=True)
    return {**model.lora, "adapter": {name: t.detach().cpu() for name, t in _own(model).items()}}


def _own(model):
    """What of an adapted model is not the base's: all that trains, and a reward model's centre, its one buffer."""
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if t.requires_grad or not isinstance(t, nn.Parameter)}


def save_adapter(model, path):
    adapters(model)
    write_checkpoint(path, adapter_state(model))


def load_adapter(model, path):
    """Give a plain GPT the adapter in the file `path`; only to the base that it was trained on. Returns the model."""
    saved = read_checkpoint(path, ("rank", "alpha", "bias", "block_size", "base_sha256", "adapter"))
    if hasattr(model, "lora"):
        raise InputError("the model has adapters already: merge them first")
    if saved["block_size"] != model.config.block_size:
        raise InputError(f"{path} was trained with block_size {saved['block_size']}, found a base with {model.config.block_size}")
    tensors = saved["adapter"] if isinstance(saved["adapter"], dict) else {}
    if ("reward_head.weight" in tensors) != hasattr(model, "reward_head"):
        raise InputError(f"{path}: expected the adapter of a {'reward' if hasattr(model, 'reward_head') else 'language'} model")
    if hasattr(model, "reward_head") and tensors["reward_head.weight"].shape != model.reward_head.weight.shape:
        raise InputError(f"{path}: its reward head reads something else than the model's (--head)")
    base_sha256 = fingerprint(model.state_dict())
    if saved["base_sha256"] != base_sha256:
        raise InputError(f"{path} belongs to another base: these weights do not have the SHA-256 of those that it was trained on")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        add_lora(model, saved["rank"], saved["alpha"], bias=saved["bias"], base_sha256=base_sha256)
        trained = _own(model)
        if trained.keys() != tensors.keys() or not all(
                torch.is_tensor(t) and t.shape == trained[name].shape and t.isfinite().all() for name, t in tensors.items()):
            merge(model)   # B is still zero: the base as it was
            raise InputError(f"{path}: expected finite tensors of an adapter of rank {saved['rank']} with bias {saved['bias']}")
        for name, p in trained.items():
            p.copy_(tensors[name])
    return model


def main(arguments):
    if len(arguments) != 3:
        raise InputError("usage: python lora.py BASE ADAPTER FOLDER     write BASE with ADAPTER, an adapter.pt or the folder of "
                         "its run, merged as a Hugging Face folder")
    base, path, folder = arguments
    if Path(path).is_dir():
        path = Path(path) / "adapter.pt"
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file: expected an adapter.pt, or the folder of a run that was made with --lora-rank")
    saved = read_checkpoint(path, ("rank", "bias", "block_size"))
    gpt.export(merge(load_adapter(gpt.load(base, block_size=saved["block_size"]), path)), folder)
    print(f"{folder}: {base} with {path}, rank {saved['rank']}, bias {saved['bias']}, merged")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (InputError, OSError) as e:
        print(f"error: {reason(e)}", file=sys.stderr)
        sys.exit(2)
