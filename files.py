"""
Bytes in and out: safe tensor files, checkpoints, downloads. Nothing here knows what a GPT is.

A file that we write is whole or not there: it gets another name, is synced, then renamed. A file that we read is
never executed: torch files load with weights_only=True, safetensors are a JSON header and raw numbers.
"""
import errno
import hashlib
import http.client
import json
import math
import os
import pickle
import struct
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import torch


class InputError(ValueError):
    """Something the user gave is wrong. The scripts print it as one line and exit with status 2."""


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
          "BOOL": torch.bool}   # the last two: causal masks in old files


def read_safetensors(path):
    """The tensors of a .safetensors file: 8 bytes of header length, a JSON header, raw numbers. Nothing is executed."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        if not 2 <= n <= min(size - 8, 100_000_000):
            raise InputError(f"{path}: a header of {n} bytes in a file of {size}: cut off, or not safetensors")
        try:
            header = json.loads(f.read(n))
            spans = {}
            for key, t in header.items():
                if key != "__metadata__":
                    (start, end), shape = t["data_offsets"], tuple(t["shape"])
                    if not all(type(x) is int and 0 <= x < 2**63 for x in (start, end, *shape)):
                        raise ValueError(f"{key} {shape} at bytes {start} to {end}")
                    spans[key] = DTYPES[t["dtype"]], shape, start, end
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise InputError(f"{path}: unreadable safetensors header ({e!r})") from None
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + n:]
    state = {}
    for key, (dtype, shape, start, end) in spans.items():
        if not start <= end <= len(data) or end - start != math.prod(shape) * dtype.itemsize:
            raise InputError(f"{path}: {key} {shape} at bytes {start} to {end} of {len(data)}: the file is cut off or damaged")
        state[key] = data[start:end].clone().view(dtype).reshape(shape)
    return state


def write_safetensors(path, state):
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    header, chunks, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for key, t in state.items():
        t = t.detach().cpu().contiguous()
        header[key] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        chunks.append(t)
        offset += t.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    write_atomically(path, len(head).to_bytes(8, "little"), head, *(tensor_bytes(t) for t in chunks))


def tensor_bytes(t):
    """The raw bytes of a tensor of any dtype."""
    return t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def write_atomically(path, *chunks):
    """All bytes on disk under another name first, then renamed: a file is whole or not there."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        for chunk in chunks:
            f.write(chunk)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def read_json(path):
    try:
        found = json.loads(Path(path).read_text())
    except ValueError as e:
        raise InputError(f"{path}: not JSON ({e})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


# What torch's reader and the unpickler raise on bytes that are not what they expect.
DAMAGE = (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error,
          pickle.UnpicklingError, zipfile.BadZipFile)


def torch_load(path):
    """torch.load that runs no code from the file; a cut-off, damaged or foreign file is one clear error."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (*DAMAGE, OSError) as e:
        if isinstance(e, OSError) and e.errno != errno.EINVAL:   # torch's reader seeks in vain in a large file that is cut off
            raise
        first = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__).strip().split(". ")[0]
        raise InputError(f"{path}: cut off, damaged, or not a file of plain tensors ({first[:120]})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a dictionary of tensors, found {type(found).__name__}")
    return found


def fingerprint(tree):
    """SHA-256 over a tree of dictionaries and lists: keys, plain values, and every tensor's dtype, shape and bytes."""
    digest = hashlib.sha256()

    def add(x):
        if isinstance(x, torch.Tensor):
            digest.update(f"{x.dtype}{tuple(x.shape)}".encode())
            digest.update(tensor_bytes(x))
        elif isinstance(x, (dict, list, tuple)):
            digest.update(f"{'{' if isinstance(x, dict) else '['}{len(x)}".encode())
            for item in x.items() if isinstance(x, dict) else x:
                add(item)
        else:
            digest.update(repr(x).encode() + b";")
    add(tree)
    return digest.hexdigest()


def write_checkpoint(path, checkpoint):
    """A dictionary of tensors and plain values, with the SHA-256 of its content, whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        torch.save({**checkpoint, "sha256": fingerprint(checkpoint)}, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def read_checkpoint(path, keys=("model", "model_config")):
    """What write_checkpoint wrote, with these keys in it."""
    checkpoint = torch_load(path)
    if not {"sha256", *keys} <= checkpoint.keys():
        raise InputError(f"{path}: expected a file of this project with {', '.join(keys)}, found "
                         f"{', '.join(map(str, checkpoint))[:80] or 'nothing'}")
    if checkpoint.pop("sha256") != fingerprint(checkpoint):
        raise InputError(f"{path}: damaged: the SHA-256 of its content is not the one it was written with")
    return checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# downloads: $HF_ENDPOINT/<path>, kept under $HF_HOME or ~/.cache

def cache_folder():
    return Path(os.environ.get("HF_HOME") or "~/.cache").expanduser() / "nanopost"


class _KeepLinkedHeaders(urllib.request.HTTPRedirectHandler):
    """The hub says the size and SHA-256 of a large file in the answer that redirects to it."""
    def __init__(self):
        self.linked = {}

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.linked.update({k.lower(): v for k, v in headers.items() if k.lower().startswith("x-linked-")})
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(path):
    """Fetch $HF_ENDPOINT/path once; return where it lies. A broken transfer is taken up where it ended, the whole is
    checked by its size and, where the server gives a 64-digit ETag, by SHA-256; until then it has another name."""
    url = f"{(os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')}/{path}"
    target = cache_folder() / path
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    print(f"downloading {url}", file=sys.stderr)
    for _ in range(3):
        try:
            problem = _fetch(url, part)
        except urllib.error.HTTPError as e:
            if e.code == 404:
                raise FileNotFoundError(f"{url}: the server has no such file") from None
            problem = f"the server answered {e.code} {e.reason}"
            if e.code == 416:   # what we have is longer than the file: start again
                part.unlink(missing_ok=True)
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as e:   # ValueError: not a URL
            if isinstance(e, OSError) and e.errno == 28:
                raise
            problem = str(getattr(e, "reason", e))
        if problem is None:
            os.replace(part, target)
            return target
    raise InputError(f"{url}: {problem}. Nothing was kept as whole; without a network use --init mini, --data minihh or a "
                     "local path")


def _fetch(url, part):
    """One try. Returns None when `part` is the whole file, else what is wrong with it."""
    have = part.stat().st_size if part.is_file() else 0
    redirects = _KeepLinkedHeaders()
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.build_opener(redirects).open(request, timeout=30) as answer:
        have = have if answer.status == 206 else 0
        length = answer.headers.get("content-length")
        size = redirects.linked.get("x-linked-size") or (int(length) + have if length else None)
        etag = redirects.linked.get("x-linked-etag") or answer.headers.get("etag") or ""
        with open(part, "ab" if have else "wb") as f:
            while chunk := answer.read(1 << 20):
                f.write(chunk)
    found = part.stat().st_size
    if size is not None and found != int(size):
        return f"{found} of {size} bytes arrived"
    expected = etag.removeprefix("W/").strip('"')
    if len(expected) == 64:
        with open(part, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        if digest != expected:
            part.unlink()
            return f"its SHA-256 is {digest}, expected {expected}"
    return None
