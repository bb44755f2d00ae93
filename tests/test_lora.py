"""
lora.py: the adapters' outputs, gradients and training steps equal peft's, the base comes back bit for bit when they are off,
merging and the adapter file keep every output, and what does not fit is refused.

    python -m pytest -q tests/test_lora.py

Three kinds of test: oracles that share no code with lora.py (peft on transformers' GPT-2; numpy), cases worked by hand,
properties. No network is needed.
"""
import copy
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, LoraModel
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel

import lora
import model as gpt
import optim
from files import InputError, fingerprint, read_checkpoint, write_checkpoint
from lora import LoRALinear, adapters_off, add_lora, load_adapter, merge, merged, merged_state, save_adapter
from model import GPT, SIZES, GPTConfig, export

V, BLOCK, C = 61, 16, 8
CONFIG = GPTConfig(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=2, n_embd=C)
EXACT = dict(rtol=1e-12, atol=1e-12)   # float64 on both sides: only the order of summation differs (about 1e-15; 1e-13 after ten
#                                        steps); numbers are of size 0.01 to 10
FP32 = dict(rtol=0, atol=1e-5)         # logits of size 1 in fp32, summed in another order
LAYERS = [f"h.{i}.{name}" for i in range(2) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
NORMS = ["h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2", "ln_f"]
every_bias = pytest.mark.parametrize("bias", ["none", "lora_only", "all"])


def base(dtype=torch.float32, seed=0, config=CONFIG):
    """A GPT with every number random, biases and LayerNorms too: nothing that is 0 or 1 can hide a mix-up. Large weights keep the
    likeliest token far ahead; the row of end-of-text is 0, so that greedy answers run on. In eval mode; it has no dropout."""
    model, generator = GPT(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "ln_" in name and name.endswith("weight") else 0.0, 0.3, generator=generator)
        model.wte.weight[-1] = 0
    return model.to(dtype).eval()


def shake(model, seed=7, std=0.3):
    """Move all that trains, as a run would: B is no longer 0, trained biases are no longer the base's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(std * torch.randn(p.shape, generator=generator))
    return model


def adapted(bias="none", dtype=torch.float32, rank=2, alpha=3.0):
    model = base(dtype)
    torch.manual_seed(3)
    add_lora(model, rank, alpha, bias=bias)
    return shake(model)


def tokens(seed=1, T=12):
    return torch.randint(V - 1, (3, T), generator=torch.Generator().manual_seed(seed))


def cross_entropy(logits, idx):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        cross_entropy(model(tokens(step)), tokens(step)).backward()
        optimizer.step()


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def copied(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_same(one, two):
    """Two dictionaries of tensors: the same keys in the same order, the same bits."""
    assert list(one) == list(two)
    assert [key for key in one if not (one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]))] == []


@torch.no_grad()
def hidden(model, seed=1):
    return model.hidden(tokens(seed))


@torch.no_grad()
def hf_logits(folder, idx):
    return GPT2LMHeadModel.from_pretrained(folder).eval()(idx).logits

# ----------------------------------------------------------------------------------------------------------------------
# oracle: peft's LoRA on transformers' GPT-2

def peft_twin(model, folder, rank, alpha, bias):
    """The plain fp64 `model`, whose numbers fit in fp32, as transformers' GPT-2 with peft's adapters."""
    export(copy.deepcopy(model).float(), folder)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, bias=bias)
    return LoraModel(GPT2LMHeadModel.from_pretrained(folder).double().eval(), config, "default").double().eval()


def peft_name(name):
    for ours, theirs in ((".A", ".lora_A.default.weight"), (".B", ".lora_B.default.weight"), (".base.bias", ".base_layer.bias")):
        if name.endswith(ours):
            name = name.removesuffix(ours) + theirs
    return "model.transformer." + name


def twins(folder, rank, alpha, bias):
    """Our model and peft's with the same base, the same random A and B, the same moved biases; what trains of each by our names.
    That both train the same tensors is peft's verdict on the three bias modes."""
    twin = peft_twin(base(torch.float64), folder, rank, alpha, bias)
    model = adapted(bias, torch.float64, rank, alpha)
    theirs = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    assert {peft_name(name) for name in trained(model)} == theirs.keys()
    with torch.no_grad():
        for name, p in trained(model).items():
            theirs[peft_name(name)].copy_(p)
    return model, twin, trained(model), {name: theirs[peft_name(name)] for name in trained(model)}


@every_bias
@pytest.mark.parametrize("rank, alpha", [(1, 2), (5, 3.0)])
def test_ten_steps_equal_pefts(tmp_path, rank, alpha, bias):
    """Logits and gradients at every step, and where ten of them lead. A bias of the keys has gradient 0, rounded to 1e-17,
    which AdamW divides by itself or by eps: the usual 1e-8 would make it a difference of 1e-10."""
    model, twin, ours, theirs = twins(tmp_path, rank, alpha, bias)
    optimizers = [torch.optim.AdamW(list(params.values()), 1e-2, eps=1e-4, weight_decay=0.1) for params in (ours, theirs)]
    before = {name: p.detach().clone() for name, p in ours.items()}
    for step in range(10):
        idx = tokens(step)
        logits = model(idx), twin(idx).logits
        torch.testing.assert_close(*logits, **EXACT)
        for optimizer, found in zip(optimizers, logits):
            optimizer.zero_grad()
            cross_entropy(found, idx).backward()
        for name in ours:
            torch.testing.assert_close(ours[name].grad, theirs[name].grad, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
        for optimizer in optimizers:
            optimizer.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **EXACT, msg=lambda m, name=name: f"{name}: {m}")
        assert (ours[name] - before[name]).abs().max() > 0.01   # ten steps of 1e-2: it trained


@every_bias
def test_merged_weights_equal_pefts(tmp_path, bias):
    model, twin, _, _ = twins(tmp_path, 5, 3.0, bias)
    theirs = twin.merge_and_unload().state_dict()
    for name, t in merge(model).state_dict().items():   # Conv1D stores its matrices (in, out)
        found = theirs["transformer." + name]
        torch.testing.assert_close(t, found.T if gpt.is_conv1d(name) else found, rtol=0, atol=1e-14)

# ----------------------------------------------------------------------------------------------------------------------
# oracle: float64 numpy

def numpy_hidden(model, idx, scale):
    """GPT-2's final hidden states of one sequence, every layer of a block as W x + b + scale B (A x)."""
    p, (T, nh) = {name: t.numpy() for name, t in model.state_dict().items()}, (len(idx), model.config.n_head)

    def linear(x, name):
        y = x @ p[f"{name}.base.weight"].T + p[f"{name}.base.bias"]
        return y + scale * np.array([p[f"{name}.B"] @ (p[f"{name}.A"] @ row) for row in x])

    def norm(x, name):
        x = x - x.mean(1, keepdims=True)
        return x / np.sqrt((x ** 2).mean(1, keepdims=True) + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def attention(x):
        found = []
        for q, k, v in zip(*(np.split(part, nh, axis=1) for part in np.split(x, 3, axis=1))):
            score = np.where(np.tri(T, dtype=bool), q @ k.T / math.sqrt(q.shape[1]), -np.inf)
            weight = np.exp(score - score.max(1, keepdims=True))
            found.append(weight / weight.sum(1, keepdims=True) @ v)
        return np.concatenate(found, axis=1)

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))

    x = p["wte.weight"][idx] + p["wpe.weight"][:T]
    for h in ("h.0.", "h.1."):
        x = x + linear(attention(linear(norm(x, h + "ln_1"), h + "attn.c_attn")), h + "attn.c_proj")
        x = x + linear(gelu(linear(norm(x, h + "ln_2"), h + "mlp.c_fc")), h + "mlp.c_proj")
    return norm(x, "ln_f")


@pytest.mark.parametrize("rank, alpha, scale", [(1, 2, 2), (4, 1, 0.25), (8, 16, 2)])
def test_hidden_states_equal_numpys(rank, alpha, scale):
    model = adapted("all", torch.float64, rank, alpha)
    for row, found in zip(tokens(), hidden(model)):
        np.testing.assert_allclose(found.numpy(), numpy_hidden(model, row.numpy(), scale), **EXACT)


def test_gradients_are_the_full_ones_through_the_product():
    """W + s B A has gradient G, so A has s B^T G and B has s G A^T; G comes from the merged model, where W itself trains."""
    model = adapted(dtype=torch.float64)   # scale 3 / 2
    whole = merge(copy.deepcopy(model))
    for each in (model, whole):
        cross_entropy(each(tokens()), tokens()).backward()
    for name in LAYERS:
        layer, G = model.get_submodule(name), whole.get_submodule(name).weight.grad.numpy()
        A, B = layer.A.detach().numpy(), layer.B.detach().numpy()
        np.testing.assert_allclose(layer.A.grad.numpy(), 1.5 * B.T @ G, **EXACT)
        np.testing.assert_allclose(layer.B.grad.numpy(), 1.5 * G @ A.T, **EXACT)

# ----------------------------------------------------------------------------------------------------------------------
# worked by hand

def hand_layer(dropout=0.0):
    """3 in, 2 out, rank 2, alpha 6: the scale is 3."""
    layer = LoRALinear(torch.nn.Linear(3, 2), 2, 6, dropout)
    for p, numbers in ((layer.base.weight, [[1, 0, 2], [0, 1, 0]]), (layer.base.bias, [10, 20]),
                       (layer.A, [[1, 0, 1], [0, 1, 0]]), (layer.B, [[1, 0], [2, 1]])):
        assert p.shape == torch.tensor(numbers).shape
        p.data = torch.tensor(numbers).float()
    return layer


def test_one_layer_by_hand():
    """x = (1, 2, 3). W x + b = (17, 22), A x = (4, 2), B A x = (4, 10), three times that (12, 30). The loss y1 + 2 y2 has
    dB = 3 (1, 2)' (A x), dA = 3 B' (1, 2)' x = 3 (5, 2)' x, and dx = (1, 2) W_merged."""
    layer, x = hand_layer(), torch.tensor([1.0, 2, 3], requires_grad=True)
    y = layer(x)
    assert y.tolist() == [29, 52]
    (y @ torch.tensor([1.0, 2])).backward()
    assert layer.A.grad.tolist() == [[15, 30, 45], [6, 12, 18]]
    assert layer.B.grad.tolist() == [[12, 6], [24, 12]]
    assert x.grad.tolist() == [16, 8, 17]
    assert layer.merged_weight().tolist() == [[4, 0, 5], [6, 4, 6]]   # W + 3 ((1, 0, 1), (2, 1, 2))


@pytest.mark.parametrize("shape", [(), (4,), (2, 4), (1, 2, 4), (0,), (0, 2), (2, 0)])
def test_any_number_of_rows(shape):
    """Also none, as nn.Linear."""
    layer = hand_layer()
    y = layer(torch.ones(*shape, 3))
    assert y.shape == (*shape, 2) and torch.equal(y, layer(torch.ones(3)).expand(*shape, 2))


def test_off_and_on_by_hand():
    """A trained bias of (11, 21) stands at the base's (10, 20) while the adapters are off."""
    model = torch.nn.Sequential(hand_layer())
    lora._train_bias(model[0].base, True)
    model[0].base.bias.data += 1
    x = torch.tensor([1.0, 2, 3])
    assert model(x).tolist() == [30, 53]
    with adapters_off(model) as reference:
        assert reference is model and model(x).tolist() == [17, 22]
    assert model(x).tolist() == [30, 53]


def test_dropout_by_hand():
    """x = (1, 1, 1, 1) and A x = x1 + 2 x2 + 4 x3 + 8 x4: each x_i that is kept counts twice, so that B A x is one of 0, 2, 4,
    ... 30, all of them met in 1000 draws (one is missed in 1000 (15/16)^1000 of all seeds). With dropout after A, or on the
    output, it would be 0, 30 or 60; with dropout on W's input, 1000 would be missing."""
    layer = LoRALinear(torch.nn.Linear(4, 1), 1, 1, 0.5)
    layer.base.weight.data, layer.base.bias.data = torch.tensor([[100.0, 200, 300, 400]]), torch.zeros(1)
    layer.A.data, layer.B.data = torch.tensor([[1.0, 2, 4, 8]]), torch.ones(1, 1)
    torch.manual_seed(0)
    x = torch.ones(1000, 4)
    found = layer(x)
    assert sorted(set(found.flatten().tolist())) == [1000 + 2 * k for k in range(16)]
    assert set(layer.eval()(x).flatten().tolist()) == {1015}


@pytest.mark.parametrize("rank", [1, 2, 8, 16])
@pytest.mark.parametrize("bias, biases", [("none", 0), ("lora_only", 221_184), ("all", 271_360)])
def test_counts_at_gpt2_medium_by_hand(rank, bias, biases):
    """24 blocks of C = 1024 (a model without numbers, which has no hash of its own). A and B have in + out rows of r:
    C + 3C, C + C, C + 4C, 4C + C: 16 C r a block, 393,216 r in all. The four layers' biases: 3C + C + 4C + C = 9C a block,
    221,184; the two LayerNorms 2C a block and ln_f C: 50,176 more."""
    with torch.device("meta"):
        model = GPT(SIZES["gpt2-medium"])
    assert add_lora(model, rank, 2 * rank, bias=bias, base_sha256="known") == 96
    count = sum(p.numel() for p in trained(model).values())
    assert count == 393_216 * rank + biases
    if bias == "none":
        share = count / sum(p.numel() for p in model.parameters())
        assert f"{share:.3%}" == {1: "0.111%", 2: "0.221%", 8: "0.879%", 16: "1.742%"}[rank]

# ----------------------------------------------------------------------------------------------------------------------
# properties: what add_lora does

@every_bias
@pytest.mark.parametrize("rank", [1, 2, 8])   # 8 is the width: the largest
def test_the_adapted_model_starts_as_the_base_exactly(rank, bias):
    model = base()
    logits, state = model(tokens()), copied(model)
    assert add_lora(model, rank, 16, bias=bias) == 8
    assert [name for name, _ in lora.adapters(model)] == LAYERS
    assert torch.equal(model(tokens()), logits)
    assert_same({key.replace(".base.", "."): t for key, t in model.state_dict().items() if key[-2:] not in (".A", ".B")}, state)
    expected = {f"{name}.{matrix}" for name in LAYERS for matrix in "AB"}
    expected |= {f"{name}.base.bias" for name in LAYERS} if bias != "none" else set()
    expected |= {f"{name}.bias" for name in NORMS} if bias == "all" else set()
    assert trained(model).keys() == expected
    assert all(layer.A.shape[0] == layer.B.shape[1] == rank for _, layer in lora.adapters(model))


@every_bias
def test_nothing_of_the_base_trains(bias):
    """No gradient, no optimizer state, the same bits after steps; all else moves."""
    model = base()
    add_lora(model, 2, 4, bias=bias)
    optimizer = optim.make("adamw", model, 1e-2, None, 0.1)
    before = copied(model)
    train(model, optimizer, 3)
    names = trained(model).keys()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == names
    assert {id(p) for p in optimizer.state} == {id(p) for p in trained(model).values()}
    assert {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])} == names


def test_a_has_the_same_size_at_every_rank():
    """Normal with standard deviation 1 / sqrt(in): times sqrt(in), 4096 numbers at least have a mean within 0.016 of 0, a
    deviation within 0.011 of 1 and a mean size within 0.0094 of 0.798 (a uniform's is 0.866). Five times that is allowed."""
    for rank in (16, 64):   # the first has a quarter of the numbers: twice as much room
        model = GPT(GPTConfig(block_size=4, vocab_size=5, n_layer=2, n_head=2, n_embd=64))
        torch.manual_seed(0)
        add_lora(model, rank, 1)
        room = 2 if rank == 16 else 1
        for name, layer in lora.adapters(model):
            A = layer.A.detach().double() * math.sqrt(256 if name.endswith("mlp.c_proj") else 64)
            assert A.mean().item() == pytest.approx(0, abs=0.078 * room), name
            assert A.std().item() == pytest.approx(1, abs=0.055 * room), name
            assert A.abs().mean().item() == pytest.approx(0.798, abs=0.047 * room), name
            assert not layer.B.any()


def test_the_seed_alone_decides_a():
    """Not the precision, nor the numbers of the base: the draws are fp32, on the CPU. No two layers get the same."""
    found = []
    for seed, dtype, of in ((0, torch.float32, 0), (0, torch.float64, 1), (1, torch.float32, 0)):
        model = base(dtype, seed=of)
        torch.manual_seed(seed)
        add_lora(model, 2, 4)
        assert {p.dtype for p in model.parameters()} == {dtype}
        found.append([layer.A.detach().float() for _, layer in lora.adapters(model)])
    torch.manual_seed(0)
    assert torch.equal(found[0][0], torch.randn(2, C) / math.sqrt(C))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1]))
    assert not any(torch.equal(a, b) for a, b in zip(found[0], found[2]))
    assert len({A.flatten()[0].item() for A in found[0]}) == len(LAYERS)


def test_dropout_acts_on_the_adapters_alone_and_in_training_alone():
    plain, model = adapted(), base()
    torch.manual_seed(0)
    add_lora(model, 2, 3.0, dropout=0.5)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(hidden(model.eval()), hidden(plain))
    model.train()
    one, two = hidden(model), hidden(model)
    assert not torch.equal(one, two) and not torch.equal(one, hidden(plain))
    with adapters_off(model):
        assert torch.equal(hidden(model), hidden(base()))
    state = torch.get_rng_state()
    first = hidden(model)
    torch.set_rng_state(state)
    assert torch.equal(hidden(model), first)
    plain.train()
    state = torch.get_rng_state()
    assert torch.equal(hidden(plain), hidden(plain.eval())) and torch.equal(torch.get_rng_state(), state)   # none: none is drawn


class Made(TorchDispatchMode):
    """The storages that operations make, each once; all stay alive, so that no address comes twice."""

    def __init__(self, *given):
        super().__init__()
        self.given, self.storages = {t.untyped_storage().data_ptr() for t in given}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in self.given:   # else it is a view of what was there
                self.storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return out

    def count(self, numbers):
        return sum(storage.nbytes() == 4 * numbers for storage in self.storages.values())


def test_the_output_is_made_once():
    """5 rows of 7 in, 11 out, rank 2, so A x has 10 numbers. A sum beside the base's output would be a second 55 forward; an
    addition into a view would copy the gradient's 55 backward. The input's 35 are not copied. The frozen weight has no gradient
    of 77, A and B have theirs."""
    layer, x = LoRALinear(torch.nn.Linear(7, 11).requires_grad_(False), 2, 4, 0.0), torch.randn(1, 5, 7, requires_grad=True)
    gradient = torch.ones(1, 5, 11)
    with Made(x) as forward:
        y = layer(x)
    assert (forward.count(55), forward.count(10), forward.count(35)) == (1, 1, 0)
    with Made(gradient, *layer.parameters()) as backward:
        y.backward(gradient)
    assert backward.count(14) >= 1 and backward.count(22) >= 1
    assert (backward.count(55), backward.count(77)) == (0, 0)


@pytest.mark.parametrize("given, named", [
    (dict(rank=0), "rank: .*1 to the model's width 8, found 0"), (dict(rank=-1), "rank"), (dict(rank=2.5), "rank.*2.5"),
    (dict(rank=9), "rank.*9"), (dict(alpha=0), "alpha.*above 0, found 0"), (dict(alpha=-1), "alpha"),
    (dict(alpha=math.inf), "alpha.*inf"), (dict(alpha=math.nan), "alpha.*nan"), (dict(dropout=1), "dropout.*below 1, found 1"),
    (dict(dropout=-0.1), "dropout"), (dict(dropout=math.nan), "dropout"),
    (dict(bias="some"), "bias: expected none, lora_only, all, found 'some'"),
], ids=str)
def test_bad_settings_are_one_clear_line_and_leave_the_model_alone(given, named):
    model = base()
    with pytest.raises(InputError, match=named) as e:
        add_lora(model, **{"rank": 2, "alpha": 4, **given})
    assert "\n" not in str(e.value)
    assert_same(model.state_dict(), base().state_dict())
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "lora")


def test_the_hash_of_the_base_is_its_own_or_the_one_given():
    for given, expected in ((None, fingerprint(base().state_dict())), ("known", "known")):
        model = base()
        add_lora(model, 2, 3, bias="all", base_sha256=given)
        assert model.lora == {"rank": 2, "alpha": 3.0, "bias": "all", "block_size": BLOCK, "base_sha256": expected}


def test_adapters_are_not_put_on_twice():
    model = adapted()
    state = copied(model)
    with pytest.raises(InputError, match="adapters already"):
        add_lora(model, 2, 4)
    assert_same(model.state_dict(), state)

# ----------------------------------------------------------------------------------------------------------------------
# properties: adapters_off

@every_bias
def test_off_is_the_base_to_the_bit_and_on_again_what_it_was(bias):
    model = base()
    reference = [hidden(model, seed) for seed in range(3)]
    add_lora(model, 2, 4, bias=bias)
    train(model, optim.make("adamw", model, 1e-2, None, 0.1), 5)
    mine, state = [hidden(model, seed) for seed in range(3)], copied(model)
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]

    def is_base():
        return [torch.equal(hidden(model, seed), reference[seed]) for seed in range(3)] == [True] * 3

    assert not is_base()
    with adapters_off(model):
        assert is_base() and not model.hidden(tokens()).requires_grad
        with adapters_off(model):
            assert is_base()
        assert is_base()   # leaving the inner one does not switch them on
        with pytest.raises(KeyError), adapters_off(model):
            raise KeyError
        assert is_base()
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    assert all(torch.equal(hidden(model, seed), mine[seed]) for seed in range(3))
    assert_same(model.state_dict(), state)
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == parameters   # the optimizer's own


@every_bias
@pytest.mark.parametrize("half", [False, True])   # autocast keeps copies of weights: those of one pass must not reach the other
def test_a_graph_does_not_notice(bias, half):
    """DPO's order: the policy's pass, the reference's, the backward pass; and the reference's first. The gradients are those of a
    model whose adapters were never off, and the reference is the base."""
    idx, models = tokens(), [adapted(bias) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        expected = base().hidden(idx)
        loss = cross_entropy(models[0](idx), idx)
        loss.backward()
        before = cross_entropy(models[1](idx), idx)
        for model in models[1:]:
            with torch.no_grad(), adapters_off(model):
                assert torch.equal(model.hidden(idx), expected)
        after = cross_entropy(models[2](idx), idx)
    assert loss == before == after
    before.backward()
    with adapters_off(models[2]):
        after.backward()
    gradients = [{name: p.grad for name, p in trained(model).items()} for model in models]
    assert all(g.abs().max() > 0 for g in gradients[0].values())
    assert_same(gradients[1], gradients[0])
    assert_same(gradients[2], gradients[0])


@every_bias
def test_training_does_not_notice(bias):
    """Six steps, with and without a look at the base after each: the same bits."""
    models = [adapted(bias) for _ in range(2)]
    for model, looks in zip(models, (False, True)):
        optimizer = optim.make("adamw", model, 1e-2, None, 0.1)
        for step in range(6):
            train(model, optimizer, 1, step)
            if looks:
                with adapters_off(model):
                    assert torch.equal(hidden(model), hidden(base()))
    assert_same(models[0].state_dict(), models[1].state_dict())


def test_the_base_goes_where_the_model_goes():
    """To another precision, as to another device; and into a copy."""
    model = adapted("all").double()
    with adapters_off(model):
        assert torch.equal(hidden(model), hidden(base().double()))
    model = copy.deepcopy(model)
    with adapters_off(model):
        assert torch.equal(hidden(model), hidden(base().double()))


def test_a_plain_model_has_nothing_to_switch_off():
    with pytest.raises(InputError, match="no adapters"), adapters_off(base()):
        pass

# ----------------------------------------------------------------------------------------------------------------------
# properties: merging

@every_bias
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])   # hidden states of size 1
def test_merging_keeps_the_outputs_and_gives_a_plain_gpt(dtype, tolerance, bias):
    model, fresh = adapted(bias, dtype), base(dtype)
    expected = hidden(model)
    assert merge(model) is model
    torch.testing.assert_close(hidden(model), expected, rtol=0, atol=tolerance)
    assert not torch.allclose(hidden(fresh), expected, atol=0.1)
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert [(name, type(m), vars(m).keys()) for name, m in model.named_modules()] == \
        [(name, type(m), vars(m).keys()) for name, m in fresh.named_modules()]
    assert list(model.named_buffers()) == [] and vars(model).keys() == vars(fresh).keys()
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in model.parameters())
    for refused in (merge, lora.adapters):
        with pytest.raises(InputError, match="no adapters"):
            refused(model)


def test_a_merged_model_is_adapted_again(tmp_path):
    """Its base is then the merged model: to that one its adapter belongs, and to that one it returns when off."""
    model = merge(adapted("all"))
    second = copy.deepcopy(model)
    add_lora(model, 3, 2, bias="all")
    shake(model, seed=8)
    with adapters_off(model):
        assert torch.equal(hidden(model), hidden(second))
    save_adapter(model, tmp_path / "adapter.pt")
    with pytest.raises(InputError, match="another base"):
        load_adapter(base(), tmp_path / "adapter.pt")
    assert torch.equal(hidden(load_adapter(second, tmp_path / "adapter.pt")), hidden(model))
    torch.testing.assert_close(hidden(merge(model)), hidden(second), **FP32)


@every_bias
def test_merged_state_and_merged_leave_the_model_alone(bias):
    model = adapted(bias)
    state, found = copied(model), hidden(model)
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    one, two = merged_state(model), merged(model)
    assert isinstance(two, GPT) and two.config == model.config and not hasattr(two, "lora")
    with torch.no_grad():
        for p in two.parameters():   # a copy: it shares no number with the model
            p.zero_()
    again = {key: t.clone() for key, t in merged_state(model).items()}
    assert_same(model.state_dict(), state)
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == parameters
    assert torch.equal(hidden(model), found) and model.lora["bias"] == bias
    assert_same(merged(model).state_dict(), again)
    whole = merge(model)
    assert_same(whole.state_dict(), again)
    assert_same(whole.state_dict(), one)
    assert list(one) == list(GPT(CONFIG).state_dict())
    assert not any(t.requires_grad for t in one.values())


def test_a_plain_models_merged_state_is_its_own():
    model = base()
    assert_same(merged_state(model), model.state_dict())
    assert_same(merged(model).state_dict(), model.state_dict())
    assert lora.adapter_state(model) is None


@every_bias
def test_a_merged_copy_exports_to_transformers_and_an_adapted_model_does_not(tmp_path, bias):
    model = adapted(bias)
    with pytest.raises(InputError, match="adapters: export a merged copy"):
        export(model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    export(merged(model), tmp_path / "hf")
    torch.testing.assert_close(hf_logits(tmp_path / "hf", tokens()), model(tokens()).detach(), **FP32)


def test_greedy_answers_are_those_of_the_merged_model():
    """Through the KV cache, token for token, with prompts of unequal length; and not those of the base."""
    model, prompts = adapted("all", torch.float64), [[5, 17, 40], [8], [33, 2, 2, 59, 11, 7, 21]]
    found = model.generate(prompts, 9, temperature=0)
    with adapters_off(model):
        off = model.generate(prompts, 9, temperature=0)
    assert found == merge(model).generate(prompts, 9, temperature=0)
    assert off == base(torch.float64).generate(prompts, 9, temperature=0) != found
    assert [len(answer) for answer in found] == [9, 9, 9]

# ----------------------------------------------------------------------------------------------------------------------
# properties: the adapter file

@every_bias
def test_round_trip(tmp_path, bias):
    """Bit-identical outputs on and off, the same settings, the same tensors train, and the next save is the same."""
    model, path = adapted(bias, rank=3, alpha=5), tmp_path / "adapter.pt"
    save_adapter(model, path)
    found = base()
    assert load_adapter(found, path) is found
    assert torch.equal(hidden(found), hidden(model))
    assert_same(found.state_dict(), model.state_dict())
    assert trained(found).keys() == trained(model).keys()
    assert found.lora == model.lora and {layer.scale for _, layer in lora.adapters(found)} == {5 / 3}
    with adapters_off(found):
        assert torch.equal(hidden(found), hidden(base()))
    save_adapter(found, tmp_path / "again.pt")
    one, two = read_checkpoint(path, ()), read_checkpoint(tmp_path / "again.pt", ())
    assert_same(one.pop("adapter"), two.pop("adapter"))
    assert one == two and one.keys() == {"rank", "alpha", "bias", "block_size", "base_sha256"}


@every_bias
def test_the_file_holds_what_trains_and_is_small(tmp_path, bias):
    model = base(config=GPTConfig(block_size=BLOCK, vocab_size=5000, n_layer=2, n_head=2, n_embd=C))
    add_lora(model, 2, 4, bias=bias)
    save_adapter(model, tmp_path / "adapter.pt")
    saved = read_checkpoint(tmp_path / "adapter.pt", ("adapter",))["adapter"]
    assert_same(saved, {name: p.detach() for name, p in trained(model).items()})
    bytes_held = 4 * sum(p.numel() for p in trained(model).values())
    assert bytes_held < (tmp_path / "adapter.pt").stat().st_size < bytes_held + 20_000   # torch's headers: under 700 a tensor
    assert 4 * model.wte.weight.numel() > 100_000                                        # one tensor of the base more is seen


def test_a_plain_model_has_no_adapter_to_save(tmp_path):
    with pytest.raises(InputError, match="no adapters"):
        save_adapter(base(), tmp_path / "adapter.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def adapter(tmp_path):
    save_adapter(adapted("all"), tmp_path / "adapter.pt")
    return tmp_path / "adapter.pt"


@pytest.mark.parametrize("name", ["wte.weight", "wpe.weight", "h.1.mlp.c_proj.weight", "h.0.ln_1.weight", "h.0.attn.c_attn.bias",
                                  "ln_f.bias"])
def test_another_base_is_refused(adapter, name):
    """One number, one bit away."""
    model = base()
    p = model.get_parameter(name).data.flatten()
    p[-1] = torch.nextafter(p[-1], torch.tensor(math.inf))
    with pytest.raises(InputError, match=r"adapter\.pt belongs to another base"):
        load_adapter(model, adapter)


def test_another_block_size_is_refused(adapter):
    model = base(config=GPTConfig(block_size=8, vocab_size=V, n_layer=2, n_head=2, n_embd=C))
    with pytest.raises(InputError, match=r"adapter\.pt was trained with block_size 16, found a base with 8"):
        load_adapter(model, adapter)


def test_a_model_that_has_adapters_is_refused_another(adapter):
    model = adapted("all")
    state = copied(model)
    with pytest.raises(InputError, match="another base|adapters already"):
        load_adapter(model, adapter)
    assert_same(model.state_dict(), state)


A = "h.0.mlp.c_fc.A"

FINITE = "expected finite tensors of an adapter of rank 2 with bias all"
TAMPERED = {   # a change to what the file holds, written with the right SHA-256 -> the complaint
    "nan": (lambda saved: saved["adapter"]["ln_f.bias"].__setitem__(3, math.nan), FINITE),
    "inf": (lambda saved: saved["adapter"][A].__setitem__((0, 0), -math.inf), FINITE),
    "a tensor missing": (lambda saved: saved["adapter"].pop("h.1.mlp.c_proj.B"), FINITE),
    "a bias missing": (lambda saved: saved["adapter"].pop("h.0.ln_2.bias"), FINITE),
    "one too many": (lambda saved: saved["adapter"].update({"wte.weight": torch.zeros(V, C)}), FINITE),
    "another name": (lambda saved: saved["adapter"].update({"h.0.C": saved["adapter"].pop(A)}), FINITE),
    "transposed": (lambda saved: saved["adapter"].update({A: saved["adapter"][A].T}), FINITE),
    "another rank": (lambda saved: saved.update(rank=3), "an adapter of rank 3 with bias all"),
    "another bias mode": (lambda saved: saved.update(bias="lora_only"), "of rank 2 with bias lora_only"),
    "rank 0": (lambda saved: saved.update(rank=0), "LoRA rank"),
    "alpha nan": (lambda saved: saved.update(alpha=math.nan), "LoRA alpha"),
    "bias some": (lambda saved: saved.update(bias="some"), "LoRA bias"),
    "alpha a word": (lambda saved: saved.update(alpha="x"), "LoRA alpha"),
    "a list": (lambda saved: saved.update(adapter=[1.0]), FINITE),
    "no tensor": (lambda saved: saved["adapter"].update({A: 1.0}), FINITE),
    "no alpha": (lambda saved: saved.pop("alpha"), r"adapter\.pt: expected a file of this project with rank, alpha"),
    "no tensors": (lambda saved: saved.pop("adapter"), r"adapter\.pt: expected a file of this project with rank, alpha"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_adapter_is_refused(adapter, name):
    change, named = TAMPERED[name]
    saved = read_checkpoint(adapter, ("adapter",))
    change(saved)
    write_checkpoint(adapter, saved)
    model = base()
    with pytest.raises(InputError, match=named):
        load_adapter(model, adapter)
    assert_same(model.state_dict(), base().state_dict())   # as it was, and ready for another adapter
    assert not hasattr(model, "lora") and all(p.requires_grad for p in model.parameters())


def test_inside_adapters_off_nothing_is_saved_or_merged(tmp_path):
    """It would be half of the adapter: the biases in place are the base's."""
    model = base()
    add_lora(model, 2, bias="all")
    with adapters_off(model):
        for take in (lora.merged_state, lora.adapter_state, lora.merge, lambda model: save_adapter(model, tmp_path / "a.pt")):
            with pytest.raises(InputError, match="adapters are off"):
                take(model)
    assert not (tmp_path / "a.pt").exists() and lora.adapter_state(model)["alpha"] == 4.0   # alpha None: twice the rank


def test_an_eval_model_stays_one():
    model = base().eval()
    add_lora(model, 2, dropout=0.5)
    assert not any(module.training for module in model.modules())


def test_merging_under_autocast_stays_in_full_precision():
    model = base()
    add_lora(model, 2)
    with torch.no_grad():
        for _, layer in lora.adapters(model):
            layer.B.normal_()
    plain = lora.merged_state(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(lora.merged_state(model), plain)


def test_what_is_no_adapter_is_refused(adapter):
    content = adapter.read_bytes()
    saved = torch.load(adapter, weights_only=True)
    for damaged in (content[:-100], content[:1000], b"not torch's"):
        adapter.write_bytes(damaged)
        with pytest.raises(InputError, match=r"adapter\.pt: cut off, damaged, or not a file of plain tensors \([^.]+\)$"):
            load_adapter(base(), adapter)
    torch.save({**saved, "alpha": 4.0}, adapter)   # with the SHA-256 of alpha 3
    with pytest.raises(InputError, match="the SHA-256 of its content is not the one"):
        load_adapter(base(), adapter)
    write_checkpoint(adapter, {"model": base().state_dict(), "model_config": {}})   # a run's
    with pytest.raises(InputError, match="expected a file of this project with rank, .* found model, model_config"):
        load_adapter(base(), adapter)
    with pytest.raises(FileNotFoundError):
        load_adapter(base(), adapter.with_name("none.pt"))

# ----------------------------------------------------------------------------------------------------------------------
# properties: the command line

def test_main_writes_base_and_adapter_as_one_folder(tmp_path, capsys):
    """Also with the adapter of a run whose block_size was half of the base's: the base is cut as the run cut it."""
    export(base(), tmp_path / "base")
    for block_size in (16, 8):
        model, out = gpt.load(str(tmp_path / "base"), block_size=block_size), tmp_path / f"out{block_size}"
        add_lora(model, 2, 3.0, bias="all")
        shake(model)
        save_adapter(model, tmp_path / "adapter.pt")
        lora.main([str(tmp_path / "base"), str(tmp_path / "adapter.pt"), str(out)])
        assert capsys.readouterr().out == (f"{out}: {tmp_path / 'base'} with {tmp_path / 'adapter.pt'}, rank 2, bias all, "
                                           "merged\n")
        idx = tokens(T=8)
        torch.testing.assert_close(hf_logits(out, idx), model(idx).detach(), **FP32)
        assert gpt.load(str(out)).config.block_size == block_size
        with pytest.raises(InputError, match="nothing is overwritten"):
            lora.main([str(tmp_path / "base"), str(tmp_path), str(out)])   # the folder of its run
    with pytest.raises(InputError, match="another base"):
        lora.main([str(tmp_path / "out8"), str(tmp_path / "adapter.pt"), str(tmp_path / "not")])
    with pytest.raises(InputError, match="expected a file of this project with rank, bias, block_size"):
        write_checkpoint(tmp_path / "run.pt", {"model": {}, "model_config": {}})
        lora.main([str(tmp_path / "base"), str(tmp_path / "run.pt"), str(tmp_path / "not")])
    assert not (tmp_path / "not").exists()
