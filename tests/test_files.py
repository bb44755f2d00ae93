"""
files.py: a file we write is whole or not there, a file we read is never executed, a download is complete or refused.

    python -m pytest -q tests/test_files.py

Three kinds of test: oracles that share no code with ours (the safetensors package, hashlib), cases worked by hand,
properties. Downloads come from a server inside this process; no network is needed.
"""
import concurrent.futures
import functools
import hashlib
import http.server
import io
import json
import math
import os
import pickle
import socket
import struct
import threading
import zipfile
from dataclasses import asdict

import pytest
import safetensors
import safetensors.torch
import torch

import files
import model as gpt
from files import (
    InputError,
    append,
    download,
    fingerprint,
    not_finite,
    read_checkpoint,
    read_json,
    read_safetensors,
    torch_load,
    unlike,
    write_atomically,
    write_checkpoint,
    write_safetensors,
)

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def some_tensors():
    """Every type, an odd number of 16-bit values (so that what follows starts at an odd place), a scalar, an empty and a
    transposed one."""
    g = torch.Generator().manual_seed(0)
    state = {f"of {dtype}": torch.randn(3, 5, generator=g).to(dtype) for dtype in FLOATS}
    return {**state, "odd": torch.randn(7, generator=g).half(), "scalar": torch.tensor(math.pi), "empty": torch.zeros(0, 4),
            "transposed": torch.randn(4, 3, generator=g).t(), "special": torch.tensor([math.inf, -math.inf, -0.0, 1e-45])}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, t in expected.items():
        assert found[key].dtype == t.dtype and found[key].shape == t.shape, key
        assert torch.equal(found[key], t), key
        assert torch.equal(found[key].signbit(), t.signbit()), key   # tells -0 from 0

# ----------------------------------------------------------------------------------------------------------------------
# oracle: the safetensors package

def test_the_safetensors_package_reads_our_files(tmp_path):
    write_safetensors(tmp_path / "a", some_tensors())
    assert_same(safetensors.torch.load_file(tmp_path / "a"), some_tensors())
    with safetensors.safe_open(tmp_path / "a", "pt") as f:
        assert f.metadata() == {"format": "pt", "sha256": fingerprint(some_tensors())}   # transformers asks for the format


def test_we_read_the_safetensors_packages_files(tmp_path):
    state = {key: t.contiguous() for key, t in some_tensors().items()}
    state["mask"], state["bytes"] = torch.ones(3, 3).tril().bool(), torch.arange(256, dtype=torch.uint8)
    safetensors.torch.save_file(state, tmp_path / "a", metadata={"format": "pt", "by": "someone"})
    assert_same(read_safetensors(tmp_path / "a"), state)


def test_tensors_read_are_apart_from_the_file(tmp_path):
    write_safetensors(tmp_path / "a", {"x": torch.zeros(4)})
    before = (tmp_path / "a").read_bytes()
    read_safetensors(tmp_path / "a")["x"].fill_(1)
    assert (tmp_path / "a").read_bytes() == before

# ----------------------------------------------------------------------------------------------------------------------
# safetensors worked by hand, and spoilt by hand

@pytest.mark.parametrize("spaces", [0, 1])   # the one more puts the numbers at an odd place in the file
def test_a_minimal_safetensors_file_by_hand(tmp_path, spaces):
    header = b'{"x":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}' + b" " * spaces
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.5, -2))
    assert_same(read_safetensors(tmp_path / "a"), {"x": torch.tensor([[1.5, -2]])})


def test_our_bytes_by_hand(tmp_path):
    write_safetensors(tmp_path / "a", {"x": torch.tensor([1.5, -2]), "y": torch.tensor([1.0]).half()})
    raw = (tmp_path / "a").read_bytes()
    n, = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + n])
    assert len(header["__metadata__"].pop("sha256")) == 64
    assert header == {"__metadata__": {"format": "pt"},
                      "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                      "y": {"dtype": "F16", "shape": [1], "data_offsets": [8, 10]}}
    assert n % 8 == 0 and raw[8 + n:] == struct.pack("<2fe", 1.5, -2, 1)


X = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}   # fits the 8 bytes of data behind the headers below


@pytest.mark.parametrize("header", [
    {**X, "shape": [3]}, {**X, "shape": [-2]}, {**X, "shape": [-1, -2]}, {**X, "data_offsets": [0, 12], "shape": [3]},
    {**X, "data_offsets": [-8, 0]}, {**X, "data_offsets": [8, 0]}, {**X, "data_offsets": [4, 12]}, {**X, "dtype": "F16"},
    {**X, "dtype": "F33"}, {**X, "dtype": ["F32"]}, {**X, "data_offsets": None}, {"dtype": "F32", "shape": [2]}, 7, None, [],
    {**X, "shape": 2}, {**X, "shape": "2"}, {**X, "shape": [2.0]}, {**X, "shape": ["2"]},       # the right size of the wrong kind
    {**X, "data_offsets": [0.0, 8.0]}, {**X, "data_offsets": ["0", "8"]}, {**X, "data_offsets": [0, 8, 8]},
    {**X, "shape": [0, 2 ** 63], "data_offsets": [0, 0]},
], ids=json.dumps)
def test_unfit_safetensors_entries_are_refused(tmp_path, header):
    head = json.dumps({"x": header}).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(head)) + head + bytes(8))
    with pytest.raises(InputError, match=str(tmp_path / "a")):
        read_safetensors(tmp_path / "a")


@pytest.mark.parametrize("raw", [
    b"", b"\0", bytes(8), bytes(16), struct.pack("<Q", 2 ** 63) + b"{}", struct.pack("<Q", 2 ** 64 - 1) + b"{}",
    struct.pack("<Q", 3) + b"{}", struct.pack("<Q", 1) + b"{}", struct.pack("<Q", 2) + b"{]", struct.pack("<Q", 2) + b"[]",
    struct.pack("<Q", 4) + b"\xff\xfe{}", struct.pack("<Q", 4) + b"null", b"<!DOCTYPE html><html>not found</html>",
    struct.pack("<Q", 50_000) + b"[" * 50_000,
], ids=lambda raw: repr(raw[:20]))
def test_what_is_not_safetensors_is_refused(tmp_path, raw):
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(InputError, match=str(tmp_path / "a")):
        read_safetensors(tmp_path / "a")


def test_a_safetensors_file_cut_anywhere_is_refused(tmp_path):
    write_safetensors(tmp_path / "a", {"x": torch.ones(3), "y": torch.ones(2)})
    raw = (tmp_path / "a").read_bytes()
    for n in range(len(raw)):
        (tmp_path / "b").write_bytes(raw[:n])
        with pytest.raises(InputError):
            read_safetensors(tmp_path / "b")

# ----------------------------------------------------------------------------------------------------------------------
# properties: whole or not there

CHECKPOINT = {"model": {"w": torch.arange(6.).view(2, 3), "b": torch.tensor(2.0).bfloat16()},
              "model_config": {"n_layer": 1, "dropout": 0.1}, "step": 3, "name": "run", "rng": (1, 2.5, True),
              "optimizer": {"m": [torch.ones(2, dtype=torch.float64), None]}, "bytes": torch.arange(5, dtype=torch.uint8),
              "ids": torch.arange(3)}

WRITERS = [lambda path, x: write_atomically(path, b"first ", str(x).encode()),
           lambda path, x: write_safetensors(path, {"x": torch.tensor([float(x)])}),
           lambda path, x: write_checkpoint(path, {"x": torch.tensor([float(x)])})]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("write", WRITERS)
def test_the_old_file_survives_a_failure(tmp_path, monkeypatch, write, call):
    def no_space(*args):
        raise OSError(28, "No space left on device")
    path = tmp_path / "a"
    write(path, 1)
    before = path.read_bytes()
    with monkeypatch.context() as m:
        m.setattr(os, call, no_space)
        for where in (path, tmp_path / "new"):
            with pytest.raises(OSError, match="No space") as e:
                write(where, 2)
            assert call == "replace" or str(where) in e.value.filename
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["a"]   # a disk that is full is not kept so
    write(path, 2)
    assert path.read_bytes() != before


def test_a_failure_in_the_middle_of_the_bytes(tmp_path):
    write_atomically(tmp_path / "a", b"old")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "a", b"new", "not bytes")
    assert (tmp_path / "a").read_bytes() == b"old"
    write_atomically(tmp_path / "a", b"n", b"e", b"w")
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("write", WRITERS)
def test_bytes_are_on_disk_before_the_name(tmp_path, monkeypatch, write):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (done.append("fsync"), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    write(tmp_path / "a", 1)
    assert done == ["fsync", "replace", "fsync"] and os.listdir(tmp_path) == ["a"]   # the last one is of the folder: the name

# ----------------------------------------------------------------------------------------------------------------------
# properties: checkpoints

def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(x, b[k]) for k, x in a.items())
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_checkpoint_comes_back_exactly(tmp_path):
    write_checkpoint(tmp_path / "a.pt", CHECKPOINT)
    found = read_checkpoint(tmp_path / "a.pt")
    assert same(found, CHECKPOINT) and "sha256" not in CHECKPOINT   # nor was ours changed
    write_checkpoint(tmp_path / "b.pt", found)
    assert same(read_checkpoint(tmp_path / "b.pt"), CHECKPOINT)


def test_a_flipped_bit_in_the_file_is_found(tmp_path):
    path, w = tmp_path / "a.pt", CHECKPOINT["model"]["w"]
    write_checkpoint(path, CHECKPOINT)
    raw = bytearray(path.read_bytes())
    at = bytes(raw).index(w.numpy().tobytes())   # stored as they are in memory
    for bit in (0, 100, 8 * w.nbytes - 1):
        raw[at + bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        with pytest.raises(InputError, match="a.pt"):
            read_checkpoint(path)
        raw[at + bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    assert same(read_checkpoint(path), CHECKPOINT)


@pytest.mark.parametrize("spoil", [
    lambda c: c["model"]["w"].view(-1)[4].add_(1e-3), lambda c: c["model_config"].update(n_layer=2), lambda c: c.update(step=4),
    lambda c: c.pop("name"), lambda c: c.update(sha256="0" * 64)])
def test_a_sound_file_with_other_content_is_found(tmp_path, spoil):
    """The zip's own check sums are right here: only ours can tell."""
    write_checkpoint(tmp_path / "a.pt", CHECKPOINT)
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save(found, tmp_path / "a.pt")
    read_checkpoint(tmp_path / "a.pt")   # saving again alone does no harm
    spoil(found)
    torch.save(found, tmp_path / "a.pt")
    with pytest.raises(InputError, match="a.pt: damaged.*SHA-256"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_checkpoint_cut_anywhere_is_refused(tmp_path):
    write_checkpoint(tmp_path / "a.pt", CHECKPOINT)
    raw = (tmp_path / "a.pt").read_bytes()
    for n in [0, 1, 2, 10, *range(100, len(raw), 97), len(raw) - 1]:
        (tmp_path / "b.pt").write_bytes(raw[:n])
        with pytest.raises(InputError, match="b.pt.*cut off"):
            read_checkpoint(tmp_path / "b.pt")


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, 2))], ids=["torch", "pickle"])
def test_no_code_in_a_file_is_run(tmp_path, save):
    path, harm = tmp_path / "a.pt", tmp_path / "harm"
    save({"sha256": "", "model": Evil(harm), "model_config": {}}, path)
    for read in (read_checkpoint, torch_load):
        with pytest.raises(InputError, match="a.pt"):
            read(path)
        assert not harm.exists()
    if save is torch.save:   # the file is as evil as it looks
        torch.load(path, weights_only=False)
        assert harm.exists()


@pytest.mark.parametrize("raw", [b"{}", b"PK\x03\x04", b"GIF89a" * 9, b"<!DOCTYPE html>", bytes(100), b"\x80\x02.", b"\x80\x02}.",
                                 b"h\x05.", b"J\x01", b"\x80\x02X\xff\xff\xff\x7f"], ids=repr)   # from \x80 on: broken pickles
def test_a_foreign_file_is_refused(tmp_path, raw):
    (tmp_path / "a.pt").write_bytes(raw)
    for read in (torch_load, read_checkpoint):
        with pytest.raises(InputError, match="a.pt") as e:
            read(tmp_path / "a.pt")
        assert "\n" not in str(e.value)


def test_a_tensor_file_that_is_no_checkpoint(tmp_path):
    torch.save({"weight": torch.ones(2), "sha256": ""}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="a.pt: expected a file of this project with model, model_config, found weight, sha256"):
        read_checkpoint(tmp_path / "a.pt")
    torch.save([torch.ones(2)], tmp_path / "a.pt")
    with pytest.raises(InputError, match="a.pt: expected a dictionary of tensors, found list"):
        read_checkpoint(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError, match="none.pt"):
        read_checkpoint(tmp_path / "none.pt")


def test_an_archive_has_one_list_of_entries(tmp_path):
    """Python's reader and torch's look for it in two ways: what the first has seen the second must read."""
    torch.save({"x": torch.zeros(100)}, tmp_path / "a.pt")
    raw = (tmp_path / "a.pt").read_bytes()
    assert raw[-98:-94] == b"PK\6\6" and raw[-42:-38] == b"PK\6\7" and raw[-22:-18] == b"PK\5\6"   # as torch ends a file
    for changed in (raw[:-42] + raw[-98:-42] + raw[-42:], raw[:-2] + b"\1\0x", raw + b"x", raw[:-22]):
        (tmp_path / "b.pt").write_bytes(changed)
        with pytest.raises(InputError, match="b.pt: cut off, damaged.*a zip archive without its end"):
            torch_load(tmp_path / "b.pt")


def test_append_by_hand(tmp_path):
    append(tmp_path / "a", "one\n")
    append(tmp_path / "a", "zwei, drei: ü\n")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "one\nzwei, drei: ü\n"
    with pytest.raises(OSError) as e:
        append(tmp_path / "none/a", "x")
    assert e.value.filename == str(tmp_path / "none/a")


@pytest.mark.parametrize("how", ["a short write", "an error behind half of it"])
def test_append_leaves_no_half_of_a_line(tmp_path, monkeypatch, how):
    class Full(io.FileIO):
        def write(self, blob):
            written = super().write(blob[:len(blob) // 2])
            if how != "a short write":
                raise OSError(28, "No space left on device")
            return written
    append(tmp_path / "a", "one\n")
    monkeypatch.setattr(files, "open", lambda path, mode, buffering: Full(path, "a"), raising=False)
    with pytest.raises(OSError, match="No space left") as e:
        append(tmp_path / "a", "a line that is not written\n")
    assert (tmp_path / "a").read_text() == "one\n" and e.value.filename == str(tmp_path / "a")


def test_a_full_disk_under_torchs_writer_is_an_oserror_that_names_the_file(tmp_path, monkeypatch):
    """torch calls it a RuntimeError."""
    class Full(io.BytesIO):
        def write(self, blob):
            raise OSError(28, "No space left on device")

        def fileno(self):
            raise AssertionError("nothing to sync")
    monkeypatch.setattr(files, "open", lambda path, mode: Full(), raising=False)
    with pytest.raises(OSError, match="No space left") as e:
        write_checkpoint(tmp_path / "a.pt", {"model": {"x": torch.zeros(4)}})
    assert e.value.filename == str(tmp_path / "a.pt.part")


@pytest.mark.parametrize("change, message", [
    (lambda spans: {"x": spans["x"], "y": spans["x"]}, "y .2,. at bytes 0 to 8 of 16, expected from 8"),   # both in one place
    (lambda spans: {"y": spans["y"]}, "y .2,. at bytes 8 to 16 of 16, expected from 0"),                   # a hole before
    (lambda spans: {"x": spans["x"]}, "8 bytes behind the last tensor"),
    (lambda spans: {**spans, "__metadata__": {"sha256": "0" * 64}}, "the SHA-256 of its tensors is not the one"),
    (lambda spans: {**spans, "__metadata__": 7}, "unreadable safetensors header"),
    (lambda spans: {"x": {**spans["x"], "shape": [1] * 9 + [2]}, "y": spans["y"]}, "unreadable safetensors header")])
def test_safetensors_lie_one_behind_the_other_and_are_what_was_written(tmp_path, change, message):
    """Many tensors in one place would take more memory than the file has bytes."""
    spans = {name: {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]} for name, at in (("x", 0), ("y", 8))}
    head = json.dumps(change(spans)).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(head)) + head + struct.pack("<4f", 1, 2, 3, 4))
    with pytest.raises(InputError, match=f"a: .*{message}"):
        read_safetensors(tmp_path / "a")
    head = json.dumps(dict(reversed(spans.items()))).encode()   # in another order they are no others
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(head)) + head + struct.pack("<4f", 1, 2, 3, 4))
    found = read_safetensors(tmp_path / "a")
    assert list(found) == ["y", "x"] and found["x"].tolist() == [1, 2] and found["y"].tolist() == [3, 4]


@pytest.mark.parametrize("make, message", [
    (lambda: {"x": torch.zeros(1).expand(2 ** 40)}, "found one of shape .1099511627776,. that the file does not hold"),
    (lambda: {"x": torch.zeros(2 ** 40, layout=torch.sparse_coo)}, "does not hold"),
    (lambda: {"x": torch.empty(9, device="meta")}, "does not hold"), (lambda: {("x",): torch.zeros(1)}, "expected names of t"),
    (lambda: {"x": {1, 2}}, "expected tensors and plain values, found set"), (lambda: {"x": 1j}, "found complex"),
    (lambda: functools.reduce(lambda tree, _: {"x": tree}, range(12), {}), "nested too deeply")])
def test_only_plain_tensors_and_values_are_taken(tmp_path, make, message):
    torch.save(make(), tmp_path / "a.pt")
    with pytest.raises(InputError, match=f"a.pt: .*{message}"):
        torch_load(tmp_path / "a.pt")


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    torch.save({"x": torch.zeros(10 ** 6)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert (tmp_path / "b.pt").stat().st_size < 10 ** 5
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(InputError, match="b.pt: a compressed archive, which torch does not write"):
        torch_load(tmp_path / "b.pt")


def test_fingerprints():
    def tree():
        return {"a": torch.tensor([[1., 2.], [3., 4.]]), "b": [1, 2.0, "x", None], "c": {"d": torch.zeros(2)}}
    changes = [
        lambda t: t["a"][0, 1].add_(1e-6), lambda t: t["a"][0, 0].neg_(), lambda t: t["c"].update(d=-t["c"]["d"]),   # values, -0
        lambda t: t.update(a=t["a"].half()), lambda t: t["c"].update(d=torch.zeros(2, dtype=torch.int32)),           # dtype
        lambda t: t.update(a=t["a"].view(4)), lambda t: t.update(a=t["a"].t()), lambda t: t.update(a=t["a"].tolist()),
        lambda t: t.update(b=[1, 2, "x", None]), lambda t: t.update(b=[1, 2.0, "x"]), lambda t: t.update(b=[2.0, 1, "x", None]),
        lambda t: t.update(b=[1, [2.0, "x", None]]), lambda t: t.update(b=[[1, 2.0], "x", None]),
        lambda t: t.update(b=[[1], 2.0, "x", None]), lambda t: t["b"].append({}),                                    # the form
        lambda t: t["c"].update(e=t["c"].pop("d")), lambda t: t.update(b=t.pop("b"))]                                # name, order
    base, changed = fingerprint(tree()), []
    for change in changes:
        t = tree()
        change(t)
        changed.append(fingerprint(t))
    assert len({base, *changed}) == len(changed) + 1 and len(base) == 64   # all different
    t = tree()
    t["a"] = torch.stack([t["a"].t(), t["a"].t()], dim=-1)[..., 0].t()   # the same values, another layout in memory
    assert not t["a"].is_contiguous() and fingerprint(t) == base
    assert fingerprint({**tree(), "a": torch.nn.Parameter(tree()["a"])}) == base


@pytest.mark.parametrize("found, message", [
    ({"a": torch.zeros(2), "b": [1, {"c": 2.5}], "d": "x"}, None),
    ({"a": torch.ones(2), "b": [7, {"c": 7}], "d": "y"}, None),   # the form is compared, not the numbers
    ({"a": torch.zeros(2), "b": [1.5, {"c": 2.5}], "d": "x"}, "b: expected 1, found '1.5'"),
    ({"a": torch.zeros(3), "b": [1, {"c": 2.5}], "d": "x"}, "a: expected torch.float32 (2,), found torch.float32 (3,)"),
    ({"a": torch.zeros(2).half(), "b": [1, {"c": 2.5}], "d": "x"}, "a: expected torch.float32 (2,), found torch.float16 (2,)"),
    ({"a": [0, 0], "b": [1, {"c": 2.5}], "d": "x"}, "a: expected torch.float32 (2,), found list"),
    ({"a": torch.tensor([0, float("nan")]), "b": [1, {"c": 2.5}], "d": "x"}, "a: not finite"),
    ({"a": torch.zeros(2), "b": [1, {}], "d": "x"}, "b has no c"),
    ({"a": torch.zeros(2), "b": [1, {"c": 2, "e": 3}], "d": "x"}, "b has e"),
    ({"a": torch.zeros(2), "b": [1], "d": "x"}, "b: expected 2 values"),
    ({"a": torch.zeros(2), "b": {}, "d": "x"}, "b: expected 2 values"),
    ({"a": torch.zeros(2), "b": [1, {"c": True}], "d": "x"}, "b.c: expected 2.5, found 'True'"),
    ({"a": torch.zeros(2), "b": [1, {"c": 2.5}], "d": None}, "d: expected 'x', found 'None'"),
    ({"a": torch.zeros(2), "b": [1, {"c": 2.5}]}, "it has no d"), ([], ": expected a dictionary, found list")])
def test_a_tree_of_another_form_by_hand(found, message):
    assert unlike(found, {"a": torch.zeros(2), "b": [1, {"c": 2.5}], "d": "x"}) == message


def test_what_is_not_finite_by_hand():
    tree = {"a": torch.zeros(2), "b": [1.0, {"c": torch.tensor([1.0, float("inf")])}], "d": torch.arange(3), "e": "x"}
    assert not_finite(tree) == "b.1.c"
    tree["b"].pop()
    assert not_finite(tree) is None


def test_read_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, "ü"]}', encoding="utf-8")
    assert read_json(path) == {"a": [1, "ü"]}
    for raw, message in ((b'{"a": ', "not JSON"), (b"\xff\xfe", "not JSON"), (b"[1]", "expected a JSON object, found list")):
        path.write_bytes(raw)
        with pytest.raises(InputError, match=f"a.json: {message}"):
            read_json(path)

# ----------------------------------------------------------------------------------------------------------------------
# downloads, from a server of our own

class Hub:
    """What the server has, how it misbehaves, and what it was asked."""
    def __init__(self):
        self.files = {}                      # path -> bytes
        self.headers = {}                    # path -> more headers
        self.redirects = {}                  # path -> (where to, headers)
        self.errors = []                     # status codes of the next answers
        self.cuts = []                       # the next answers end after that many bytes
        self.ranges = True                   # does it know Range?
        self.length = True                   # does it say Content-Length?
        self.asked = []                      # (path, Range header or None)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        # self.path would hide a doubled slash at its beginning
        hub, path, asked = self.server.hub, self.requestline.split()[1][1:], self.headers.get("Range")
        hub.asked.append((path, asked))
        if hub.errors:
            return self.answer(hub.errors.pop(0))
        if path in hub.redirects:
            to, headers = hub.redirects[path]
            return self.answer(302, {"Location": "/" + to, **headers})
        if path not in hub.files:
            return self.answer(404)
        body = hub.files[path]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and hub.ranges else 0
        if start and start >= len(body):
            return self.answer(416)
        length = {"Content-Length": str(len(body) - start)} if hub.length else {}
        self.answer(206 if start else 200, {**length, **hub.headers.get(path, {})})
        self.wfile.write(body[start:][:hub.cuts.pop(0) if hub.cuts else None])

    def answer(self, code, headers=()):
        self.send_response(code)
        for item in dict(headers).items():
            self.send_header(*item)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache"


@pytest.fixture
def hub(cache, monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.hub = Hub()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")   # a slash at the end does no harm
        yield server.hub
        server.shutdown()
        thread.join()


A = "owner/repo/resolve/main/a.bin"
BODY = bytes(range(256)) * 20   # 5120 bytes
SHA = hashlib.sha256(BODY).hexdigest()


def kept(cache):
    return sorted(f.name for f in cache.rglob("*") if f.is_file())


def test_a_download_happens_once(hub, cache):
    hub.files[A] = BODY
    path = download(A)
    assert path.read_bytes() == BODY and path.is_relative_to(cache) and kept(cache) == ["a.bin"]
    hub.files.clear()
    assert download(A) == path and hub.asked == [(A, None)]


@pytest.mark.parametrize("etag", [f'"{SHA}"', SHA, f'W/"{SHA}"', '"5d41402abc4b2a76b9719d911017c592"', '"v1"', '""'])
def test_etags_that_fit_or_are_no_sha256(hub, cache, etag):
    hub.files[A], hub.headers[A] = BODY, {"ETag": etag}
    assert download(A).read_bytes() == BODY and len(hub.asked) == 1


def test_a_missing_file(hub, cache):
    with pytest.raises(FileNotFoundError, match=f"http.*{A}.*no such file"):
        download(A)
    assert kept(cache) == [] and len(hub.asked) == 1   # asking again would not help


def test_a_broken_transfer_goes_on_where_it_ended(hub, cache):
    hub.files[A], hub.headers[A], hub.cuts = BODY, {"ETag": f'"{SHA}"'}, [1000, 2000]
    assert download(A).read_bytes() == BODY and kept(cache) == ["a.bin"]
    assert hub.asked == [(A, None), (A, "bytes=1000-"), (A, "bytes=3000-")]


def test_and_so_it_does_in_the_next_process(hub, cache):
    hub.files[A], hub.cuts = BODY, [1000, 0, 0]
    with pytest.raises(InputError, match="1000 of 5120 bytes"):
        download(A)
    assert "a.bin" not in kept(cache)
    assert download(A).read_bytes() == BODY and hub.asked[-1] == (A, "bytes=1000-")


def test_two_that_want_the_same_file_do_not_write_into_one_another(hub, cache):
    """One downloads, the other waits and finds it there."""
    hub.files[A], hub.cuts = BODY, [1000, 2000]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert [path.read_bytes() for path in pool.map(download, [A] * 4)] == [BODY] * 4
    assert [asked for _, asked in hub.asked] == [None, "bytes=1000-", "bytes=3000-"] and kept(cache) == ["a.bin"]


def test_a_server_without_ranges_starts_again(hub, cache):
    hub.files[A], hub.cuts, hub.ranges = BODY, [1000], False
    assert download(A).read_bytes() == BODY and len(hub.asked) == 2


def test_a_server_that_always_cuts_off(hub, cache):
    hub.files[A], hub.cuts, hub.ranges = BODY, [1000] * 100, False
    with pytest.raises(InputError, match=f"{A}: 1000 of 5120 bytes arrived") as e:
        download(A)
    assert "\n" not in str(e.value) and "a.bin" not in kept(cache) and 2 <= len(hub.asked) <= 10


def test_a_server_error_is_tried_again(hub, cache):
    hub.files[A], hub.errors = BODY, [503]
    assert download(A).read_bytes() == BODY
    hub.errors = [503] * 100
    with pytest.raises(InputError, match="b.bin: the server answered 503"):
        download(A.replace("a.bin", "b.bin"))


@pytest.mark.parametrize("etag", [f'"{SHA}"', SHA, f'W/"{SHA}"'])
def test_wrong_bytes_are_not_kept(hub, cache, etag):
    hub.files[A], hub.headers[A] = BODY[:-1] + b"!", {"ETag": etag}
    with pytest.raises(InputError, match=f"{A}: its SHA-256 is [0-9a-f]{{64}}, expected {SHA}"):
        download(A)
    assert kept(cache) == []


@pytest.mark.parametrize("left", [b"?" * 1000, BODY, BODY + b"?", b"?" * 5120])
def test_a_bad_or_complete_leftover_heals(hub, cache, left):
    """Whatever an earlier process left under the other name."""
    hub.files[A], hub.headers[A] = BODY, {"ETag": f'"{SHA}"'}
    part = cache / "nanopost" / (A + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(left)
    assert download(A).read_bytes() == BODY and kept(cache) == ["a.bin"]


def test_the_redirect_says_size_and_sha256(hub, cache):
    """The hub redirects large files to a store whose own ETag means something else."""
    hub.files["store/1"], hub.headers["store/1"] = BODY, {"ETag": f'"{"0" * 32}"'}
    hub.redirects[A] = "store/1", {"X-Linked-Size": str(len(BODY)), "X-Linked-Etag": f'"{SHA}"'}
    hub.cuts = [1000]
    assert download(A).read_bytes() == BODY
    assert hub.asked == [(A, None), ("store/1", None), (A, "bytes=1000-"), ("store/1", "bytes=1000-")]


def test_the_redirects_sha256_is_checked(hub, cache):
    hub.files["store/1"], hub.redirects[A] = BODY[:-1] + b"!", ("store/1", {"X-Linked-Etag": f'"{SHA}"'})
    with pytest.raises(InputError, match=f"expected {SHA}"):
        download(A)
    assert kept(cache) == []


@pytest.mark.parametrize("size", [5119, 5121, 0])
def test_the_redirects_size_is_checked(hub, cache, size):
    hub.files["store/1"], hub.redirects[A] = BODY, ("store/1", {"X-Linked-Size": str(size)})
    with pytest.raises(InputError, match=f"{A}: "):
        download(A)
    assert "a.bin" not in kept(cache)


def test_size_and_sha256_count_where_the_store_says_no_length(hub, cache):
    hub.files["store/1"], hub.length = BODY, False
    hub.redirects[A] = "store/1", {"X-Linked-Size": str(len(BODY)), "X-Linked-Etag": f'"{SHA}"'}
    hub.cuts = [1000]
    assert download(A).read_bytes() == BODY and hub.asked[-1] == ("store/1", "bytes=1000-")


def test_no_server(cache, monkeypatch):
    with socket.socket() as s:   # a port that was just free
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(InputError, match=f"^http://127.0.0.1:{port}/{A}: .*refused.*--init mini") as e:
        download(A)
    assert "\n" not in str(e.value) and kept(cache) == []


def test_an_endpoint_that_is_no_url(cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    with pytest.raises(InputError, match=f"hub.example/{A}"):
        download(A)


def test_an_empty_endpoint_is_the_default(cache, monkeypatch):
    """`HF_ENDPOINT= python ...` means unset, as an empty HF_HOME does."""
    monkeypatch.setenv("HF_ENDPOINT", "")
    monkeypatch.setattr(files, "_fetch", lambda url, part: url)   # returns what is wrong: here, where it would have asked
    with pytest.raises(InputError, match=f": https://huggingface.co/{A}"):
        download(A)


def test_a_full_disk_is_not_the_networks_fault(hub, cache, monkeypatch):
    def no_space(*args):
        raise OSError(28, "No space left on device")
    hub.files[A] = BODY
    monkeypatch.setattr(files, "_fetch", no_space)
    with pytest.raises(OSError, match="No space"):
        download(A)

# ----------------------------------------------------------------------------------------------------------------------
# whole models from the server

@pytest.fixture
def serve(hub, tmp_path):
    """Puts a tiny model on the server, as `owner/repo`; returns it."""
    def put(repository, weights="model.safetensors"):
        torch.manual_seed(0)
        model = gpt.GPT(gpt.GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=4))
        gpt.export(model, tmp_path / "export")
        for file in (tmp_path / "export").iterdir():
            hub.files[f"{repository}/resolve/main/{file.name}"] = file.read_bytes()
        if weights == "pytorch_model.bin":
            raw = hub.files.pop(f"{repository}/resolve/main/model.safetensors")
            torch.save(safetensors.torch.load(raw), tmp_path / "bin")
            hub.files[f"{repository}/resolve/main/{weights}"] = (tmp_path / "bin").read_bytes()
        return model
    return put


@pytest.mark.parametrize("name, repository", [("gpt2", "openai-community/gpt2"), ("gpt2-xl", "openai-community/gpt2-xl"),
                                              ("hf:owner/tiny", "owner/tiny")])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_models_load_from_the_hub(serve, hub, name, repository, weights):
    expected, found = serve(repository, weights), gpt.load(name)
    assert asdict(found.config) == asdict(expected.config)
    assert same(dict(found.state_dict()), dict(expected.state_dict()))


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_once_loaded_needs_no_server(serve, hub, weights):
    serve("owner/tiny", weights)
    first = gpt.load("hf:owner/tiny")
    hub.errors, hub.asked = [503] * 100, []   # from now on it only says that it is busy
    assert fingerprint(gpt.load("hf:owner/tiny").state_dict()) == fingerprint(first.state_dict())
    assert hub.asked == []


def test_a_repository_that_is_not_there(hub):
    with pytest.raises(OSError, match="owner/none/resolve/main/config.json"):   # the scripts print it like an InputError
        gpt.load("hf:owner/none")
