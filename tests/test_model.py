"""
model.py: the network is GPT-2 (transformers is the judge), packed tokens are dialogues run alone, the KV cache changes no token,
weights go in and out unharmed.

    python -m pytest -q tests/test_model.py

Three kinds of test: an oracle that shares no code with ours, cases worked by hand, properties. No network is needed.
"""
import json
import math
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

import data
import model as gpt
from files import InputError, write_checkpoint
from model import GPT, SIZES, GPTConfig, export, flops, load, sample

V, BLOCK = 61, 24   # the small models below; V - 1 is end-of-text
MODEL_PY = Path(gpt.__file__)


def hf_model(n_layer=2, n_head=3, n_embd=24, seed=0):
    """transformers' GPT-2 with every number random, biases and LayerNorms too: nothing that is 0 or 1 can hide a mix-up.

    Large weights keep the likeliest token far ahead of the second, so that rounding cannot change an argmax; the
    row of end-of-text is 0, so that its logit is 0 and greedy answers run on."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=BLOCK, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                                       bos_token_id=V - 1, eos_token_id=V - 1, attn_implementation="eager"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0, 0.3, generator=generator)
        model.transformer.wte.weight[V - 1] = 0
    return model.eval()


@pytest.fixture(scope="module")
def hf():
    return hf_model()


@pytest.fixture(scope="module")
def hf_folder(hf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    hf.save_pretrained(folder)
    return folder


@pytest.fixture
def ours(hf_folder):
    return load(str(hf_folder)).eval()


def tokens(*shape, seed=1):
    return torch.randint(V - 1, shape, generator=torch.Generator().manual_seed(seed))


def plain_greedy(model, prompt, n):
    """Greedy decoding as anyone would write it first: the whole sequence again for every token."""
    ids = list(prompt)
    while len(ids) - len(prompt) < n and len(ids) <= model.config.block_size:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == model.config.vocab_size - 1:
            break
    return ids[len(prompt):]


PROMPTS = [[5, 17, 40], [8], [33, 2, 2, 59, 11, 7, 21], [1, 0]]   # of unequal length on purpose

# ----------------------------------------------------------------------------------------------------------------------
# oracle: transformers' GPT-2

def old_layout(hf):
    """The published gpt2 files: no "transformer." prefix, no head, and the causal mask stored as if it were a weight."""
    state = {key.removeprefix("transformer."): t.clone() for key, t in hf.state_dict().items() if key != "lm_head.weight"}
    for i in range(hf.config.n_layer):
        state[f"h.{i}.attn.bias"] = torch.ones(BLOCK, BLOCK).tril().view(1, 1, BLOCK, BLOCK)
        state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


# fp32 sums of a few hundred terms of size 1 in another order differ by about 1e-6; a wrong formula by far more than 1e-5.
ATOL = 1e-5


@pytest.mark.parametrize("layout", ["safetensors", "bin", "old safetensors", "old bin", "no causal masks in bytes"])
def test_logits_equal_transformers(hf, tmp_path, layout):
    hf.config.save_pretrained(tmp_path)
    if layout == "safetensors":
        hf.save_pretrained(tmp_path)
    elif layout == "bin":
        torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin")
    elif layout == "old safetensors":
        safetensors.torch.save_file(old_layout(hf), tmp_path / "model.safetensors")
    else:
        state = old_layout(hf)
        if layout != "old bin":   # some files hold the mask as bytes
            state = {key: t.byte() if key.endswith(".attn.bias") else t for key, t in state.items()}
        torch.save(state, tmp_path / "pytorch_model.bin")
    idx = tokens(3, BLOCK)
    with torch.no_grad():
        torch.testing.assert_close(load(str(tmp_path)).eval()(idx), hf(idx).logits, atol=ATOL, rtol=0)


def test_gradients_equal_transformers(hf, ours):
    idx, target = tokens(2, BLOCK), tokens(2, BLOCK, seed=2)
    grads = []
    for model, logits in ((ours, ours(idx)), (hf, hf(idx).logits)):
        model.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
        grads.append({name.removeprefix("transformer."): p.grad for name, p in model.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, g in grads[0].items():
        theirs = grads[1][name]   # Conv1D stores its matrices (in, out)
        theirs = theirs.t() if g.dim() == 2 and name.startswith("h.") else theirs
        torch.testing.assert_close(g, theirs, atol=ATOL, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("n_layer, n_head, n_embd", [(2, 3, 24), (1, 1, 8), (3, 4, 20)])
def test_export_is_read_by_transformers(tmp_path, n_layer, n_head, n_embd):
    torch.manual_seed(0)
    model = GPT(GPTConfig(BLOCK, V, n_layer, n_head, n_embd)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    export(model, tmp_path / "new" / "folder")
    theirs, info = GPT2LMHeadModel.from_pretrained(tmp_path / "new" / "folder", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert theirs.config.eos_token_id == V - 1
    idx = tokens(2, BLOCK)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(idx).logits, model(idx), atol=ATOL, rtol=0)
        back = load(str(tmp_path / "new" / "folder")).eval()
    assert back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values(), strict=True))


def test_greedy_generation_equals_transformers(hf, ours):
    for prompt in PROMPTS:
        idx = torch.tensor([prompt])
        theirs = hf.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False, max_new_tokens=12, pad_token_id=V - 1)
        assert ours.generate([prompt], 12, temperature=0) == [theirs[0, len(prompt):].tolist()]


def test_flops_of_one_token_equal_torchs_counter():
    """At T = 1 causal and full attention are the same sum, so torch's own counter must agree to the last operation."""
    config = GPTConfig(block_size=4, vocab_size=11, n_layer=3, n_head=2, n_embd=8)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(
            torch.nn.attention.SDPBackend.MATH):   # as plain products, which the counter knows on every machine
        GPT(config)(torch.tensor([[3]]))
    assert flops(config, 1, 1, 1) == counter.get_total_flops()


@pytest.mark.parametrize("at", [[0, 2, 3, 5], [4], [1, 1, 0, 5, 5, 2, 3]])   # a place that is read twice is computed twice
def test_flops_of_packed_tokens_equal_torchs_counter(at):
    """Six sequences of one token each, for the same reason, read at some places in the last block; the head meets fewer."""
    config = GPTConfig(block_size=4, vocab_size=11, n_layer=3, n_head=2, n_embd=8)
    model, line = GPT(config), torch.arange(6)
    packing = gpt.Packing(torch.zeros_like(line), ((4, 1), (2, 1)), line, line)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(
            torch.nn.attention.SDPBackend.MATH):
        hidden = model.hidden(line, packing, torch.tensor(at))
        hidden[:1] @ model.wte.weight.T
    assert flops(config, 6, 6, len(at), 1) == counter.get_total_flops()

# ----------------------------------------------------------------------------------------------------------------------
# worked by hand

@pytest.mark.parametrize("name, count", [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080),
                                         ("gpt2-xl", 1_557_611_200)])
def test_parameter_counts(name, count):
    """The published ones. For gpt2: (50257 + 1024) 768 embeddings, 12 blocks of 12 * 768^2 + 13 * 768, a LayerNorm 2 * 768."""
    with torch.device("meta"):   # shapes only, no memory
        model = GPT(SIZES[name])
    assert sum(p.numel() for p in model.parameters()) == count


def test_flops_by_hand():
    """V 10, C 4, 2 layers; sequences of 3 and 1 tokens. A block has 12 * 4^2 = 192 weights: 2 * 192 * 2 layers * 4 tokens = 3072,
    less what the 2 tokens that are not read do not meet in the last block, c_proj, c_fc and c_proj, (1 + 4 + 4) * 4^2 = 144:
    2 * 144 * 2 = 576. Positions attended: 1 + 2 + 3, and 1, so 7: 4 * 2 layers * 4 channels * 7 = 224. Head at 2 positions:
    2 * 10 * 4 * 2 = 160."""
    config = GPTConfig(block_size=8, vocab_size=10, n_layer=2, n_head=2, n_embd=4)
    assert flops(config, 4, 7, 2) == 3072 - 576 + 224 + 160
    assert flops(config, 4, 7, 2, backward=True) == 3 * (3072 - 576 + 224 + 160)
    assert flops(config, 4, 7, 4, head=2) == 3072 + 224 + 160   # read everywhere, by the head at two places
    assert flops(config, 4, 7, 2, head=0) == 3072 - 576 + 224   # as a reward model, whose head is next to nothing
    assert flops(config, 0, 0, 0, head=2) == 160                # as a reference whose hidden states are known
    # rank 2: A and B of the four layers have 2 * 16 * 4 = 128 numbers a block: 2 * 128 * 2 layers * 4 tokens = 2048; less those
    # of three layers, (2 + 5 + 5) * 4 * 2 = 96 numbers, at two tokens: 2 * 96 * 2 = 384
    assert flops(config, 4, 7, 2, backward=True, rank=2) == 2 * (3072 - 576 + 160) + 3 * (2048 - 384 + 224)


def averaging():
    """Two channels, queries and keys 0, values and projection the identity: attention adds the mean of what is behind. Tokens
    A = (1, -1) and B = (-1, 1) are their own LayerNorm (but for its epsilon of 1e-5, which makes 0.999995 of 1). Returns the
    model and the list into which it puts the stream behind the attention."""
    model = GPT(GPTConfig(block_size=4, vocab_size=2, n_layer=1, n_head=1, n_embd=2)).eval()
    for p in model.h.parameters():
        if p.dim() == 2:
            torch.nn.init.zeros_(p)
    with torch.no_grad():
        model.wpe.weight.zero_()
        model.wte.weight.copy_(torch.tensor([[1., -1.], [-1., 1.]]))
        model.h[0].attn.c_attn.weight[4:].copy_(torch.eye(2))
        model.h[0].attn.c_proj.weight.copy_(torch.eye(2))
    seen = []
    model.h[0].ln_2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return model, seen


def test_uniform_attention_by_hand():
    """For A B B the means are A, 0 and (A + 2 B) / 3 = B / 3."""
    model, seen = averaging()
    model(torch.tensor([[0, 1, 1]]))
    torch.testing.assert_close(seen[0][0], torch.tensor([[2., -2.], [-1., 1.], [-4 / 3, 4 / 3]]), atol=1e-5, rtol=0)


def scripted(script, vocab_size=8):
    """A model that answers script[p] at position p, whatever it reads: the blocks add nothing, and the position's embedding
    points at one token ten times as strongly as the token's own."""
    model = GPT(GPTConfig(block_size=len(script), vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=vocab_size))
    with torch.no_grad():
        for p in model.h.parameters():
            p.zero_()
        model.wte.weight.copy_(torch.eye(vocab_size))
        model.wpe.weight.copy_(10 * torch.eye(vocab_size)[script])
    return model


def test_generation_stops_where_it_should_by_hand():
    model = scripted([1, 2, 3, 4, 5, 7, 6, 3])   # 8 positions; 7 is end-of-text
    # the first two answers end with end-of-text, which belongs to them, the others because the context is full: a token
    # may still be predicted from the last position, but has no position of its own to go on from
    prompts, expected = [[0], [0, 0, 0, 0], [0] * 7, [0] * 8], [[1, 2, 3, 4, 5, 7], [4, 5, 7], [6, 3], [3]]
    assert model.generate(prompts, 100, temperature=0) == expected
    assert model.generate([[0], [0] * 7], 3, temperature=0) == [[1, 2, 3], [6, 3]]
    assert model.generate([[0], [0] * 7], 0, temperature=0) == [[], []]
    seen = []
    answers = model.generate([[0], [0, 0]], 100, temperature=0, stop=lambda ids: seen.append(list(ids)) or ids[-2:] == [3, 4])
    assert answers == [[1, 2, 3, 4], [2, 3, 4]]                # each stops on its own answer
    assert [1, 2] in seen and [1, 2, 3, 4, 5] not in seen      # and is not asked again


@pytest.mark.parametrize("settings, expected", [
    (dict(temperature=1.0), [.3, .1, .6]),
    (dict(temperature=0.5), [.09 / .46, .01 / .46, .36 / .46]),    # p^2, normalised
    (dict(top_k=2), [1 / 3, 0, 2 / 3]),
    (dict(top_k=1), [0, 0, 1]),
    (dict(top_k=50), [.3, .1, .6]),                                # more than there are
    (dict(top_p=0.95), [.3, .1, .6]),                              # .6 + .3 is not enough
    (dict(top_p=0.65), [1 / 3, 0, 2 / 3]),                         # .6 is not enough, .9 is
    (dict(top_p=0.5), [0, 0, 1]),                                  # the likeliest alone is
    (dict(top_k=2, top_p=0.65), [0, 0, 1]),                        # of the two that are left it has 2/3
    (dict(temperature=0), [0, 0, 1]),
])
def test_sampling_frequencies_by_hand(settings, expected):
    """Probabilities .3, .1, .6 out of order, 20,000 draws."""
    n = 20_000
    logits = (torch.tensor([.3, .1, .6]).log() + 5).expand(n, 3)   # a constant changes no probability
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, **settings}
    drawn = sample(logits, **settings, generator=torch.Generator().manual_seed(0))
    found = drawn.bincount(minlength=3) / n
    assert [bool(f > 0) for f in found] == [e > 0 for e in expected]
    # four standard errors of a frequency: 4 sqrt(.25 / 20000)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float), atol=0.0142, rtol=0)


def test_sampling_treats_each_row_alone():
    """Another order of the probabilities in each row; top_p cuts in each row's own order."""
    n, p = 4_000, torch.tensor([[.3, .1, .6], [.6, .3, .1], [.98, .01, .01]])
    drawn = sample(p.log().repeat(n, 1), 1.0, None, 0.65, torch.Generator().manual_seed(0)).view(n, 3)
    assert [set(column.tolist()) for column in drawn.T] == [{0, 2}, {0, 1}, {0}]

# ----------------------------------------------------------------------------------------------------------------------
# properties of the network

def test_causality(ours):
    idx = tokens(2, BLOCK)
    for t in (0, 7, BLOCK - 1):
        other = idx.clone()
        other[:, t] = (other[:, t] + 1) % V
        with torch.no_grad():
            before, after = ours(idx), ours(other)
        # same shapes, same order of every sum: equal but for a kernel that splits its work by content
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=0)
        assert ((after[:, t:] - before[:, t:]).abs().amax(-1) > 1e-3).all()   # and everything from t on does see it


def test_right_padding_changes_no_real_position(ours):
    idx = tokens(1, 9)
    with torch.no_grad():
        alone = ours(idx)
        for fill in (0, V - 1):
            padded = ours(F.pad(idx, (0, BLOCK - 9), value=fill))
            torch.testing.assert_close(padded[:, :9], alone, atol=ATOL, rtol=0)   # another shape, another order of sums


def test_rows_of_a_batch_do_not_meet(ours):
    idx = tokens(3, 10)
    with torch.no_grad():
        torch.testing.assert_close(ours(idx)[1:2], ours(idx[1:2]), atol=ATOL, rtol=0)


def test_forward_is_hidden_times_the_embedding(ours):
    idx = tokens(2, 6)
    with torch.no_grad():
        assert ours.hidden(idx).shape == (2, 6, 24)
        torch.testing.assert_close(ours(idx), ours.hidden(idx) @ ours.wte.weight.T, atol=ATOL, rtol=0)


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_the_embedding_s_gradient_is_added_to_the_head_s_in_place(shape):
    """Token 2 stands twice, token 3 never: only autograd's own sum would need a second matrix."""
    weight, idx = torch.randn(5, 2, requires_grad=True), torch.tensor([2, 0, 2, 4, 1]).view(shape)
    rows, head = gpt.Tied.apply(idx, weight)
    assert torch.equal(rows, weight[idx]) and torch.equal(head, weight) and head.data_ptr() == weight.data_ptr()
    upstream, head_grad = torch.arange(10.0).view(*shape, 2), torch.full((5, 2), 100.0)
    found, = torch.autograd.grad((rows, head), weight, (upstream, head_grad))
    assert found.tolist() == [[102, 103], [108, 109], [104, 106], [100, 100], [106, 107]]   # 2: rows 0 and 2, [0, 1] + [4, 5]
    assert found.data_ptr() == head_grad.data_ptr()


@pytest.mark.parametrize("used", ["rows", "head"])
def test_one_use_of_the_embedding_alone(used):
    """As in a reward model without the likelihood, and where the head is trained on given states."""
    weight = torch.randn(5, 2, requires_grad=True)
    rows, head = gpt.Tied.apply(torch.tensor([1, 1]), weight)
    found, = torch.autograd.grad((rows if used == "rows" else head).sum(), weight)
    assert found.tolist() == ([[0, 0], [2, 2], [0, 0], [0, 0], [0, 0]] if used == "rows" else [[1, 1]] * 5)


def test_the_head_is_the_embedding(ours):
    """The gradient of wte is the sum of its two uses; a token that is not in the input gets one from the head alone."""
    idx, target = tokens(1, 6), tokens(6, seed=2)

    def wte_grad(embed, head):
        h = ours.hidden(idx) if embed else ours.hidden(idx).detach()
        loss = F.cross_entropy(F.linear(h[0], ours.wte.weight if head else ours.wte.weight.detach()), target)
        return torch.autograd.grad(loss, ours.wte.weight)[0]

    whole = torch.autograd.grad(F.cross_entropy(ours(idx)[0], target), ours.wte.weight)[0]
    torch.testing.assert_close(whole, wte_grad(True, False) + wte_grad(False, True), atol=1e-6, rtol=1e-5)   # one fp32 addition
    unseen = [t for t in range(V) if t not in idx]
    assert not wte_grad(True, False)[unseen].any() and whole[unseen].abs().amax(1).gt(0).all()


def test_random_initialisation_knows_nothing(monkeypatch):
    """Cross-entropy of random targets is near log V: no token is preferred, and the logits are small. Of any size."""
    torch.manual_seed(0)
    model = load("mini").eval()
    idx, target = torch.randint(model.config.vocab_size, (2, 4, 64))
    with torch.no_grad():
        loss = F.cross_entropy(model(idx).flatten(0, 1), target.flatten())
    # logits of variance s^2 cost about s^2 / 2 over log V; wanted is s < 1. 256 targets move the mean by less than 0.1
    assert abs(loss.item() - math.log(model.config.vocab_size)) < 0.5
    torch.manual_seed(0)
    again = load("random:mini")   # by its other name
    torch.manual_seed(1)
    other = load("mini")
    assert torch.equal(again.wte.weight, model.wte.weight) and not torch.equal(other.wte.weight, model.wte.weight)
    monkeypatch.setitem(gpt.SIZES, "small", gpt.replace(gpt.SIZES["mini"], n_layer=1))
    assert load("random:small").config == gpt.config_of("random:small") == gpt.SIZES["small"]


def test_dropout_is_where_gpt2_has_it(hf_folder, ours):
    """On the embedding's sum, on the attention's probabilities, and on what each half of a block adds; off in eval()."""
    model, idx, p = load(str(hf_folder), dropout=0.25), tokens(4, BLOCK), 0.25
    seen, block = {}, model.h[0]
    block.ln_1.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    block.attn.c_proj.register_forward_hook(lambda m, args, out: seen.update(attn=out))
    block.ln_2.register_forward_pre_hook(lambda m, args: seen.update(middle=args[0]))
    block.mlp.c_proj.register_forward_hook(lambda m, args, out: seen.update(mlp=out))
    model.h[1].ln_1.register_forward_pre_hook(lambda m, args: seen.update(end=args[0]))
    torch.manual_seed(0)
    with torch.no_grad():
        model.train()(idx)
        embedded = model.wte(idx) + model.wpe(torch.arange(BLOCK))
        for found, whole in ((seen["x"], embedded), (seen["middle"] - seen["x"], seen["attn"]),
                             (seen["end"] - seen["middle"], seen["mlp"])):
            kept = found != 0
            torch.testing.assert_close(found[kept], whole[kept] / (1 - p), atol=ATOL, rtol=0)   # a difference of fp32 sums
            assert abs(kept.float().mean() - (1 - p)) < 0.04   # 4 standard errors: 4 sqrt(p (1 - p) / 2304)
        # the attention alone, on one input twice: only its probabilities can differ
        x = torch.randn(1, 6, 24)
        one, two = (block.attn(x, None, None, None, 0) for _ in range(2))
        assert not torch.equal(one, two)
        torch.testing.assert_close(model.eval()(idx), ours(idx), atol=0, rtol=0)


def test_block_size_cut(hf_folder, ours):
    short = load(str(hf_folder), block_size=8).eval()
    assert short.config.block_size == 8 and short.wpe.weight.shape == (8, 24)
    idx = tokens(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(short(idx), ours(idx), atol=0, rtol=0)
    with pytest.raises(InputError, match="9 tokens.*block_size 8"):
        short(tokens(1, 9))
    assert load("mini", block_size=16).wpe.weight.shape == (16, SIZES["mini"].n_embd)
    for wrong in (0, -1, BLOCK + 1):
        with pytest.raises(InputError, match=f"block_size {wrong}.*1 to {BLOCK}"):
            load(str(hf_folder), block_size=wrong)

# ----------------------------------------------------------------------------------------------------------------------
# packed tokens: oracle, each dialogue alone as a rectangle of one row

# prompt, chosen, rejected: of unequal length on purpose, prompts and responses of one token too
PAIRS = [([5, 17, 40], [8, 33, 2, 2, 59], [11]), ([7], [21, 1], [0, 9, 9, 30, 4, 4, 12, 50, 3]), ([6, 28, 13, 0, 44], [7], [35]),
         ([2, 2], [41, 19, 3], [41, 19, 3])]


def packed(pairs=PAIRS):
    """A micro-batch that holds every token, the last too; and where each dialogue's tokens stand in its line, which is prompt,
    chosen, rejected of pair after pair: all chosen dialogues, then all rejected ones."""
    batch, places, start = data.collate(pairs, whole=True), ([], []), 0
    assert batch.tokens.tolist() == [t for pair in pairs for part in pair for t in part]
    for prompt, *responses in pairs:
        stem, start = torch.arange(start, start + len(prompt)), start + len(prompt)
        for found, response in zip(places, responses):
            found.append(torch.cat((stem, torch.arange(start, start + len(response)))))
            start += len(response)
    return batch, places[0] + places[1]


def states_alone(model, batch, places):
    return [model.hidden(batch.tokens[at][None])[0] for at in places]


def assert_equal_gradients(model, scalar, oracle, tolerance):
    """Of all parameters, up to this share of the largest number in the oracle's."""
    found, expected = (torch.autograd.grad(x, list(model.parameters())) for x in (scalar, oracle))
    largest = max(g.abs().max() for g in expected)
    for (name, _), a, b in zip(model.named_parameters(), found, expected):
        assert (a - b).abs().max() <= tolerance * largest, name


# fp32 sums in another order; in fp64 nothing is left of that
precisions = pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])


@precisions
def test_packed_states_and_gradients_equal_each_dialogues_alone(ours, dtype, tolerance):
    model, (batch, places) = ours.to(dtype), packed()
    together, alone = model.hidden(batch.tokens, batch.packing), states_alone(model, batch, places)
    assert together.shape == (len(batch.tokens), 24) and together.dtype == dtype
    for at, states in zip(places, alone):
        torch.testing.assert_close(together[at], states, atol=tolerance, rtol=0)
    upstream = [torch.randn(x.shape, generator=torch.Generator().manual_seed(r)).to(dtype) for r, x in enumerate(alone)]
    assert_equal_gradients(model, *(sum((x * u).sum() for x, u in zip(states, upstream))
                                    for states in ([together[at] for at in places], alone)), tolerance)


@precisions
def test_packed_states_where_they_are_read(ours, dtype, tolerance):
    """In any order, twice, and not at all; the gradients too."""
    model, (batch, places) = ours.to(dtype), packed()
    at = torch.cat((batch.ends, batch.score_at.flip(0), torch.zeros(2, dtype=torch.long)))
    found, expected = model.hidden(batch.tokens, batch.packing, at), torch.zeros(len(batch.tokens), 24, dtype=dtype)
    for numbers, states in zip(places, states_alone(model, batch, places)):
        expected = expected.index_copy(0, numbers, states)
    torch.testing.assert_close(found, expected[at], atol=tolerance, rtol=0)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_equal_gradients(model, (found * upstream).sum(), (expected[at] * upstream).sum(), tolerance)

# ---- worked by hand

def test_uniform_attention_over_a_shared_prompt_by_hand():
    """Prompt A B, responses A and B: the means are A, 0, then (2 A + B) / 3 = A / 3 for the first and (A + 2 B) / 3 = B / 3 for
    the second, which does not see the first. The stream is the token plus the mean."""
    (model, seen), line = averaging(), torch.tensor([0, 1, 0, 1])
    expected = torch.tensor([[2., -2.], [-1., 1.], [4 / 3, -4 / 3], [-4 / 3, 4 / 3]])
    for shapes in ((2, 3),), ((1, 3), (1, 3)):   # side by side in one rectangle, and each in its own
        packing = gpt.Packing(torch.tensor([0, 1, 2, 2]), shapes, torch.tensor([0, 1, 2, 0, 1, 3]), torch.tensor([0, 4, 2, 5]))
        model.hidden(line, packing)
        model.hidden(line, packing, torch.tensor([3, 0]))
        torch.testing.assert_close(seen[-2], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(seen[-1], expected[[3, 0]], atol=1e-5, rtol=0)

# ---- properties

@pytest.mark.parametrize("changed", [1, 2])
def test_a_response_does_not_see_the_other_one(ours, changed):
    """Other tokens in the chosen responses change no state of a prompt or of a rejected response, and the other way round."""
    others = [[part if k != changed else [(t + 1) % V for t in part] for k, part in enumerate(pair)] for pair in PAIRS]
    (batch, places), (other, _) = packed(), packed(others)
    half = places[:4] if changed == 1 else places[4:]
    mine = torch.cat([at[len(prompt):] for at, (prompt, *_) in zip(half, PAIRS)]).sort().values
    rest = torch.tensor(sorted(set(range(len(batch.tokens))) - set(mine.tolist())))
    with torch.no_grad():
        before, after = (ours.hidden(b.tokens, b.packing) for b in (batch, other))
    assert torch.equal((batch.tokens != other.tokens).nonzero().flatten(), mine)
    torch.testing.assert_close(after[rest], before[rest], atol=1e-6, rtol=0)   # but for a kernel that splits work by content
    assert ((after[mine] - before[mine]).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("groups", [[8], [1] * 8, [3, 5]], ids=str)
@pytest.mark.parametrize("filler, more", [(3, 0), (11, 1), (0, 4)])
def test_how_rows_make_rectangles_changes_nothing(ours, groups, filler, more):
    """One for all, one each, two; any token behind a row's end, and any number of them; a prompt may be read from any of its
    rows."""
    batch, places = packed()
    shapes, filled, back, start = [], [], torch.empty_like(batch.packing.back), 0
    for n in groups:
        rows, places = places[:n], places[n:]
        T = max(map(len, rows)) + more
        shapes.append((n, T))
        for at in rows:
            filled.append(F.pad(at, (0, T - len(at)), value=filler))
            back[at] = start + torch.arange(len(at))
            start += T
    with torch.no_grad():
        expected = ours.hidden(batch.tokens, batch.packing)
        found = ours.hidden(batch.tokens, gpt.Packing(batch.packing.positions, tuple(shapes), torch.cat(filled), back))
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("n", [1, 3, 17])
def test_attention_is_called_a_few_times_a_layer(ours, monkeypatch, n):
    """However many pairs there are: a call for each of them is what would make packing slow on a GPU."""
    calls, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(gpt.F, "scaled_dot_product_attention", lambda *a, **k: calls.append(tuple(a[0].shape)) or real(*a, **k))
    batch, places = packed((PAIRS * 5)[:n])
    ours.hidden(batch.tokens, batch.packing, batch.score_at).sum().backward()
    assert len(calls) == 2 * min(data.RECTANGLES, 2 * n) and data.RECTANGLES <= 4   # two layers
    assert calls == [(B, 3, T, 8) for B, T in batch.packing.shapes] * 2
    assert sum(B for B, *_ in calls) == 2 * 2 * n and max(T for _, _, T, _ in calls) == max(map(len, places))


def test_the_line_may_be_longer_than_the_context_but_no_sequence(ours):
    batch, _ = packed([([1, 2], [3] * 20, [4] * 22)] * 3)   # 24 tokens in the longest, 132 in the line
    assert ours.hidden(batch.tokens, batch.packing).shape == (132, 24)
    batch, _ = packed([([1, 2], [3] * 20, [4] * 23)])
    with pytest.raises(InputError, match="a sequence of 25 tokens does not fit block_size 24"):
        ours.hidden(batch.tokens, batch.packing)


@pytest.mark.parametrize("training, dropout", [(True, 0.0), (True, 0.25), (False, 0.0)])
@pytest.mark.parametrize("form", ["rectangle", "packed", "read at places"])
def test_checkpointed_activations_give_the_same_gradients(hf_folder, form, training, dropout):
    """What is computed again is what was computed, dropout's draws included; both blocks are, and only in a backward pass. DPO
    trains a model in eval()."""
    model, (batch, _), runs = load(str(hf_folder), dropout=dropout).train(training), packed(), []
    for block in model.h:
        block.register_forward_pre_hook(lambda module, args: runs.append(module))
    arguments = {"rectangle": (tokens(3, 9),), "packed": (batch.tokens, batch.packing),
                 "read at places": (batch.tokens, batch.packing, batch.score_at)}[form]
    found = []
    for model.checkpoint_activations in (False, True):
        torch.manual_seed(3)
        hidden = model.hidden(*arguments)
        upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
        runs.clear()
        found.append((hidden.detach(), torch.autograd.grad((hidden * upstream).sum(), list(model.parameters()))))
        assert runs == [[], [model.h[1], model.h[0]]][model.checkpoint_activations]
        with torch.no_grad():
            model.hidden(*arguments)
        assert len(runs) == 2 + 2 * model.checkpoint_activations   # not kept, so nothing to compute again
    assert torch.equal(found[0][0], found[1][0])
    largest = max(g.abs().max() for g in found[0][1])
    for one, two in zip(found[0][1], found[1][1]):
        assert (one - two).abs().max() <= 1e-6 * largest

def test_as_little_is_kept_in_eval_as_in_training(hf_folder):
    """Bytes that autograd saves. DPO trains a model in eval()."""
    model, (batch, _) = load(str(hf_folder)), packed()

    def saved():
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: seen.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t):
            kept = model.hidden_and_head(batch.tokens, batch.packing)
        return sum(seen.values()), kept
    assert saved()[0] > 0
    model.train()
    in_training, _ = saved()
    model.eval()
    assert saved()[0] == in_training


def test_the_embeddings_gradient_has_no_matrix_of_its_own(ours):
    """The rows' gradient is added to the head's (Tied); torch's own way makes a second one of the vocabulary's size."""
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.embedding_dense_backward.default:
                made.append(len(out))
            return out
    hidden, head = ours.hidden_and_head(tokens(2, 5))
    with Watch():
        F.linear(hidden, head).sum().backward()
    assert made == [ours.config.block_size]   # the positions' alone

# ----------------------------------------------------------------------------------------------------------------------
# properties of generation

def test_the_cache_changes_no_token(ours):
    """Alone, in a batch of unequal prompts, and up to a full context: the tokens of the plain loop."""
    expected = [plain_greedy(ours, prompt, 100) for prompt in PROMPTS]
    assert [len(p) + len(e) for p, e in zip(PROMPTS, expected, strict=True)] == [BLOCK + 1] * 4      # the context was filled
    assert len({t for e in expected for t in e}) > 10                                    # and not with one token
    assert [ours.generate([prompt], 100, temperature=0)[0] for prompt in PROMPTS] == expected
    assert ours.generate(PROMPTS, 100, temperature=0) == expected
    assert ours.generate(PROMPTS, 5, temperature=0) == [e[:5] for e in expected]


def test_a_new_token_costs_one_position():
    """What the cache is for; and when every answer is over, nothing more is computed."""
    model, seen = scripted([1, 2, 3, 4, 5, 6, 7, 0]), []
    model.ln_f.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[:2])))
    model.generate([[0, 0], [0, 0, 0]], 100, temperature=0, stop=lambda ids: 5 in ids)
    assert seen == [(2, 3), (2, 1), (2, 1), (1, 1)]   # the prompts, then a token of each open row: 2 3 4 5 and 3 4 5


@pytest.mark.parametrize("rows", [1, 5])
def test_packed_weights_change_no_product_and_are_gone_afterwards(ours, rows):
    """Inside, F.linear is not called; the products, whatever their number of rows, are those of F.linear to rounding."""
    idx, calls, real = torch.stack([tokens(1, 7, seed=s)[0] for s in range(rows)]), [], F.linear
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        expected = ours.hidden(idx)
        patch.setattr(gpt.F, "linear", lambda *args: calls.append(1) or real(*args))
        with gpt.packed_weights(ours, rows) as head:
            found = ours.hidden(idx)
            torch.testing.assert_close(head(found[:, -1]), real(expected[:, -1], ours.wte.weight), atol=1e-4, rtol=1e-5)
        assert not calls
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(ours.hidden(idx), expected) and len(calls) == 8   # four matrices in each of two blocks
    assert all(layer.packed is None for layer in ours.modules() if isinstance(layer, gpt.Linear))


def test_packed_weights_leave_other_dtypes_alone(ours):
    for model, context in ((ours, torch.autocast("cpu", torch.bfloat16)), (ours.double(), torch.no_grad())):
        with context, gpt.packed_weights(model, 3):
            assert all(layer.packed is None for layer in model.modules() if isinstance(layer, gpt.Linear))


def test_generation_that_is_broken_off_leaves_the_model_as_it_was(ours):
    """A stop function may raise, as Ctrl-C does in it."""
    def stop(ids):
        raise KeyboardInterrupt
    ours.train()
    with pytest.raises(KeyboardInterrupt):
        ours.generate(PROMPTS, 5, stop=stop)
    assert ours.training and all(layer.packed is None for layer in ours.modules() if isinstance(layer, gpt.Linear))


def test_a_closed_row_runs_on_unread_to_the_end_of_the_context():
    """The first answer is over at once, the second fills its context: the first row goes past the last position meanwhile."""
    model = scripted([1, 2, 3, 4, 5, 6, 1, 2])
    prompts = [[0] * 8, [0], [0, 0]]
    assert model.generate(prompts, 100, temperature=0) == [[2], [1, 2, 3, 4, 5, 6, 1, 2], [2, 3, 4, 5, 6, 1, 2]]


def test_prompts_may_be_tensors_or_arrays(ours):
    expected = ours.generate(PROMPTS, 4, temperature=0)
    assert ours.generate([torch.tensor(p) for p in PROMPTS], 4, temperature=0) == expected
    assert ours.generate([torch.tensor(p).numpy().astype("uint16") for p in PROMPTS], 4, temperature=0) == expected


def test_narrow_sampling_is_greedy(ours):
    greedy = ours.generate(PROMPTS, 10, temperature=0)
    assert ours.generate(PROMPTS, 10, top_k=1) == greedy
    assert ours.generate(PROMPTS, 10, top_p=1e-6) == greedy
    assert ours.generate(PROMPTS, 10, temperature=1e-4) == greedy


def test_the_likeliest_token_is_never_dropped(ours):
    """However small a share or a temperature is, in fp32 it may be nothing."""
    greedy = ours.generate(PROMPTS, 5, temperature=0)
    assert ours.generate(PROMPTS, 5, top_p=1e-60) == greedy and ours.generate(PROMPTS, 5, temperature=1e-46) == greedy


def test_sampling_repeats_with_its_generator_and_leaves_torchs_alone(ours):
    def answers(seed):
        return ours.generate(PROMPTS, 10, temperature=2.0, generator=torch.Generator().manual_seed(seed))
    before = torch.get_rng_state()
    assert answers(0) == answers(0) != answers(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_generation_leaves_the_model_as_it_was(hf_folder, ours):
    """No dropout while it generates, no gradient, and the mode from before afterwards."""
    model = load(str(hf_folder), dropout=0.5).train()
    assert model.generate(PROMPTS, 6, temperature=0) == ours.generate(PROMPTS, 6, temperature=0)
    assert model.training and all(m.training for m in model.modules()) and not ours.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_generation_under_autocast(ours):
    """The cache takes autocast's type. The first token comes from the very computation that forward() does."""
    prompts = [tokens(6, seed=s).tolist() for s in range(3)]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        answers = ours.generate(prompts, 5, temperature=0)
        assert [a[0] for a in answers] == ours(torch.tensor(prompts))[:, -1].argmax(-1).tolist()
    assert [len(a) for a in answers] == [5, 5, 5]


@pytest.mark.parametrize("prompts, found", [([[1], []], 0), ([[1], [1] * (BLOCK + 1)], BLOCK + 1)])
def test_a_prompt_must_fit(ours, prompts, found):
    with pytest.raises(InputError, match=f"prompt of {found} tokens.* 1 to block_size {BLOCK}"):
        ours.generate(prompts, 1)

# ----------------------------------------------------------------------------------------------------------------------
# the reward model

def reward_on(ours):
    model = gpt.reward_model(ours).eval()
    torch.nn.init.normal_(model.reward_head.weight, generator=torch.Generator().manual_seed(1))
    return model


def test_rewards_equal_transformers_sequence_classifier(hf, ours, tmp_path):
    """Which has the same head, without the centre."""
    model = reward_on(ours)
    theirs = GPT2ForSequenceClassification(GPT2Config(**{**hf.config.to_dict(), "num_labels": 1, "pad_token_id": V - 1})).eval()
    theirs.transformer.load_state_dict(hf.transformer.state_dict())
    with torch.no_grad():
        theirs.score.weight.copy_(model.reward_head.weight)
        idx = tokens(3, 9).clamp(max=V - 2)
        model.center.fill_(0.5)
        torch.testing.assert_close(model.rewards(model.hidden(idx)[:, -1]), theirs(idx).logits[:, 0] - 0.5, atol=1e-5, rtol=1e-5)


def test_a_reward_model_starts_at_zero_on_the_very_weights(ours):
    model = gpt.reward_model(ours)
    assert model.rewards(model.hidden(tokens(2, 5))[:, -1]).tolist() == [0, 0]
    assert all(p.data_ptr() == model.state_dict()[key].data_ptr() for key, p in ours.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and model.config == ours.config


def test_likelihood_is_one_more_input_of_the_head(ours):
    """r = w h + a log pi - center."""
    model, hidden, logps = gpt.reward_model(ours, likelihood=True), torch.randn(3, 24), torch.tensor([-5.0, -7.0, -100.0])
    assert model.rewards(hidden, logps).tolist() == [0, 0, 0]
    with torch.no_grad():
        model.reward_head.weight[0, :24] = torch.arange(24)
        model.reward_head.weight[0, 24] = 0.5
        model.center.fill_(2)
    torch.testing.assert_close(model.rewards(hidden, logps), hidden @ torch.arange(24.0) + 0.5 * logps - 2)


@pytest.mark.parametrize("likelihood", [False, True])
def test_what_a_checkpoint_holds_says_whether_there_is_a_likelihood(ours, tmp_path, likelihood):
    model = gpt.reward_model(ours, likelihood)
    torch.nn.init.normal_(model.reward_head.weight)
    write_checkpoint(tmp_path / "best.pt", {"model": model.state_dict(), "model_config": asdict(ours.config)})
    again = load(str(tmp_path), kind=gpt.RewardModel)
    assert again.likelihood is likelihood and torch.equal(again.reward_head.weight, model.reward_head.weight)
    spoiled = model.state_dict() | {"reward_head.weight": torch.zeros(1, 30)}
    write_checkpoint(tmp_path / "best.pt", {"model": spoiled, "model_config": asdict(ours.config)})
    with pytest.raises(InputError, match=r"first reward_head.weight: expected shape \(1, 24\), found \(1, 30\)"):
        load(str(tmp_path), kind=gpt.RewardModel)


def test_rewards_stay_in_full_precision_under_autocast(ours):
    """bfloat16 has 8 bits: rewards near 100 that differ by 0.1 would be equal."""
    model, hidden = reward_on(ours), torch.randn(4, 24)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = model.rewards(hidden)
    assert found.dtype == torch.float32 and torch.equal(found, model.rewards(hidden).detach())
    assert model.double().rewards(hidden.double()).dtype == torch.float64


def test_a_reward_model_is_loaded_as_such_only(ours, tmp_path):
    model = reward_on(ours)
    model.center.fill_(0.25)
    write_checkpoint(tmp_path / "best.pt", {"model": model.state_dict(), "model_config": asdict(ours.config)})
    again = load(str(tmp_path), kind=gpt.RewardModel, block_size=10)
    assert torch.equal(again.reward_head.weight, model.reward_head.weight) and again.center == 0.25
    assert again.wpe.weight.shape == (10, 24)
    with pytest.raises(InputError, match="is a reward model, and a language model is needed here"):
        load(str(tmp_path))
    write_checkpoint(tmp_path / "last.pt", {"model": {key: t for key, t in model.state_dict().items() if key != "center"},
                                            "model_config": asdict(ours.config)})
    with pytest.raises(InputError, match="last.pt holds what a run trains, and no centre"):
        load(str(tmp_path / "last.pt"), kind=gpt.RewardModel)
    for name in ("mini", str(tmp_path / "lm.pt")):
        write_checkpoint(tmp_path / "lm.pt", {"model": ours.state_dict(), "model_config": asdict(ours.config)})
        with pytest.raises(InputError, match="is a language model, and a reward model is needed here"):
            load(name, kind=gpt.RewardModel)

# ----------------------------------------------------------------------------------------------------------------------
# properties of weights in and out

def test_runs_and_checkpoints_load(ours, tmp_path):
    write_checkpoint(tmp_path / "best.pt", {"model": ours.state_dict(), "model_config": asdict(ours.config)})
    idx = tokens(1, 8)
    for name in (tmp_path, tmp_path / "best.pt"):
        model = load(str(name))
        assert model.config == ours.config
        with torch.no_grad():
            assert torch.equal(model(idx), ours(idx))


def test_loaded_weights_are_fp32_own_memory_and_trainable(hf, tmp_path):
    """Also from a file of 16-bit numbers."""
    hf.config.save_pretrained(tmp_path)
    safetensors.torch.save_file({key: t.half() for key, t in old_layout(hf).items()}, tmp_path / "model.safetensors")
    model, before = load(str(tmp_path)), (tmp_path / "model.safetensors").read_bytes()
    for p in model.parameters():
        assert p.dtype == torch.float32 and p.requires_grad and p.is_leaf and p.is_contiguous() and p.device.type == "cpu"
        p.data.fill_(7)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    torch.testing.assert_close(load(str(tmp_path)).wte.weight.data, hf.transformer.wte.weight.data.half().float(), atol=0, rtol=0)


@pytest.fixture
def broken(ours, tmp_path):
    """change(weights, config) spoils an exported folder; load() of it must then fail with this message."""
    def check(change, message, kind=InputError):
        folder = tmp_path / "model"
        export(ours, folder)
        state = safetensors.torch.load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        change(state, config)
        safetensors.torch.save_file({key: t.contiguous() for key, t in state.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(kind, match=message) as e:
            load(str(folder))
        assert str(folder) in str(e.value) and "\n" not in str(e.value)   # it names the file, in one line
    return check


W = "transformer.h.1.mlp.c_fc.weight"   # (24, 96) as stored


@pytest.mark.parametrize("change, message", [
    (lambda state, config: state.pop(W), r"h.1.mlp.c_fc.weight: expected shape \(96, 24\), found none"),
    (lambda state, config: state.pop("transformer.wpe.weight"), r"wpe.weight: expected shape \(24, 24\), found none"),
    (lambda state, config: state.pop("transformer.wte.weight"), r"wte.weight: expected shape \(61, 24\), found none"),
    (lambda state, config: state.update({"transformer.h.2.ln_1.bias": torch.ones(24)}),
     r"h.2.ln_1.bias: expected shape none, found \(24,\)"),
    (lambda state, config: state.update({W: state[W].t()}), r"c_fc.weight: expected shape \(96, 24\), found \(24, 96\)"),
    (lambda state, config: state.update({W: state[W][0]}), r"c_fc.weight: expected shape \(96, 24\), found \(96,\)"),
    (lambda state, config: state.update({"transformer.wpe.weight": torch.ones(BLOCK + 8, 24)}),
     r"wpe.weight: expected shape \(24, 24\), found \(32, 24\)"),   # more positions than the config says
    (lambda state, config: state.update({"transformer.wpe.weight": torch.ones(BLOCK - 8, 24)}),
     r"wpe.weight: expected shape \(24, 24\), found \(16, 24\)"),
    (lambda state, config: state[W][3, 5].fill_(math.nan), "c_fc.weight.*not finite"),
    (lambda state, config: state[W][3, 5].fill_(-math.inf), "c_fc.weight.*not finite"),
    (lambda state, config: state.update({"lm_head.weight": state["transformer.wte.weight"] + 1}), "lm_head.weight differs"),
    (lambda state, config: config.update(n_layer=3), "h.2.*found none"),
    (lambda state, config: config.update(model_type="llama"), "expected model_type 'gpt2', found 'llama'"),
    (lambda state, config: config.pop("model_type"), "expected model_type 'gpt2', found None"),
    (lambda state, config: config.update(activation_function="relu"), "expected activation_function 'gelu_new', found 'relu'"),
    (lambda state, config: config.update(layer_norm_epsilon=1e-6), "expected layer_norm_epsilon 1e-05, found 1e-06"),
    # two switches of transformers' GPT-2 (Stanford's models use the second) that change every logit and no shape
    (lambda state, config: config.update(scale_attn_weights=False), "expected scale_attn_weights True, found False"),
    (lambda state, config: config.update(scale_attn_by_inverse_layer_idx=True),
     "expected scale_attn_by_inverse_layer_idx False, found True"),
    (lambda state, config: config.pop("n_embd"), "config.json.*n_embd"),
    (lambda state, config: config.update(n_layer="2"), "config.json.*n_layer"),
    (lambda state, config: config.update(n_head=0), "config.json.*n_head"),
])
def test_unfit_folders_are_refused(broken, change, message):
    broken(change, message)


def test_a_tied_head_in_the_file_is_fine(ours, tmp_path):
    export(ours, tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(load(str(tmp_path)).wte.weight, ours.wte.weight)


def test_what_is_no_model_is_refused(ours, tmp_path):
    with pytest.raises(InputError, match="no model 'gpt3': expected mini, gpt2, .*hf:OWNER/REPOSITORY"):
        load("gpt3")
    with pytest.raises(InputError, match=f"{tmp_path}.*found none of them"):
        load(str(tmp_path))
    export(ours, tmp_path / "a")
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(OSError, match="a/config.json"):   # the scripts print an OSError like an InputError
        load(str(tmp_path / "a"))
    for text, message in (("{", "not JSON"), ("[1]", "expected a JSON object, found list")):
        (tmp_path / "a" / "config.json").write_text(text)
        with pytest.raises(InputError, match=f"a/config.json: {message}"):
            load(str(tmp_path / "a"))


def test_a_bin_file_holds_tensors_only(ours, tmp_path):
    export(ours, tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for spoilt, message in (({**state, "step": 3}, "tensors only"), (list(state.values()), "expected a dictionary"),
                            ({**state, 3: state["transformer.wte.weight"]}, "pytorch_model.bin")):
        torch.save(spoilt, tmp_path / "pytorch_model.bin")
        with pytest.raises(InputError, match=message) as e:
            load(str(tmp_path))
        assert str(tmp_path) in str(e.value)


def test_export_overwrites_nothing(ours, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match=f"{tmp_path} is not empty"):
        export(ours, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["letter.txt"]


def test_heads_must_divide_the_channels():
    with pytest.raises(InputError, match="n_embd 10 is not a multiple of n_head 3"):
        GPT(GPTConfig(n_embd=10, n_head=3))


def test_command_line_exports(hf, hf_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["model.py", str(hf_folder), str(tmp_path / "out")])
    runpy.run_path(str(MODEL_PY), run_name="__main__")
    idx = tokens(1, 8)
    with torch.no_grad():
        theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(theirs(idx).logits, hf(idx).logits, atol=ATOL, rtol=0)
