"""
Bytes in and out: safe tensor files, checkpoints, downloads. Nothing here knows what a GPT is.

A file that we write is whole or not there: it gets another name, is synced, then renamed. A file that we read is
never executed: torch files load with weights_only=True, safetensors are a JSON header and raw numbers. What a file says of its
own size is held against its size before memory is taken.
"""
import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import math
import os
import pickle
import re
import struct
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import torch


class InputError(ValueError):
    """Something the user gave is wrong. The scripts print it as one line and exit with status 2."""


def reason(e):
    """An error for one line: of the system's, the file and what is the matter with it."""
    return f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename and e.strerror else str(e)


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
          "BOOL": torch.bool}   # the last two: causal masks in old files


def read_safetensors(path):
    """The tensors of a .safetensors file: 8 bytes of header length, a JSON header, raw numbers. Nothing is executed."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        if not 2 <= n <= min(size - 8, 2_000_000):   # GPT-2 xl's has 60,000
            raise InputError(f"{path}: a header of {n} bytes in a file of {size}: cut off, or not safetensors")
        try:
            header = json.loads(f.read(n))
            spans = {}
            for key, t in header.items():
                if key != "__metadata__":
                    (start, end), shape = t["data_offsets"], tuple(t["shape"])
                    if len(shape) > 8 or not all(type(x) is int and 0 <= x < 2**63 for x in (start, end, *shape)):
                        raise ValueError(f"{key[:80]} {shape[:8]} at bytes {start} to {end}")
                    spans[key] = DTYPES[t["dtype"]], shape, start, end
            written_with = header.get("__metadata__", {}).get("sha256")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise InputError(f"{path}: unreadable safetensors header ({str(e)[:200]!r})") from None
    data, behind, state = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + n:], 0, {}
    for key, (dtype, shape, start, end) in sorted(spans.items(), key=lambda item: item[1][2:]):   # one behind the other: many in
        # one place would need more memory than the file has bytes
        if not behind == start <= end <= len(data) or end - start != math.prod(shape) * dtype.itemsize:
            raise InputError(f"{path}: {key[:80]} {shape} at bytes {start} to {end} of {len(data)}, expected from {behind}: "
                             "the file is cut off or damaged")
        state[key], behind = data[start:end].clone().view(dtype).reshape(shape), end
    if behind != len(data):
        raise InputError(f"{path}: {len(data) - behind} bytes behind the last tensor: damaged, or not safetensors")
    state = {key: state[key] for key in spans}   # in the header's order
    if written_with is not None and written_with != fingerprint(state):
        raise InputError(f"{path}: damaged: the SHA-256 of its tensors is not the one it was written with")
    return state


def write_safetensors(path, state):
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    header, chunks, offset = {"__metadata__": {"format": "pt", "sha256": fingerprint(state)}}, [], 0
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


@contextlib.contextmanager
def named(path):
    """An error of the disk names the file, which Python's own does only where a file is opened."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror or str(e), e.filename or str(path)) from None


@contextlib.contextmanager
def replacing(path):
    """A file to write to, which takes the place of `path` once all of it is on disk. After an error the old file is there, or the
    new one, whole."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with named(part), open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):   # a disk that is full should not stay so
            part.unlink()
        raise
    with named(path.parent):   # the new name is on disk, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomically(path, *chunks):
    """All bytes on disk under another name first, then renamed: a file is whole or not there."""
    with replacing(path) as f:
        for chunk in chunks:
            f.write(chunk)


def append(path, text):
    """All of the text behind the end of the file, or nothing."""
    blob = text.encode()
    with named(path), open(path, "ab", buffering=0) as f:
        end = f.seek(0, os.SEEK_END)
        try:
            written = f.write(blob)
            if written < len(blob):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            f.truncate(end)
            raise


def read_json(path):
    try:
        found = json.loads(Path(path).read_text())
    except RecursionError:
        raise InputError(f"{path}: not JSON that can be read (nested too deeply)") from None
    except ValueError as e:
        raise InputError(f"{path}: not JSON ({e})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


# What torch's reader and the unpickler raise on bytes that are not what they expect.
DAMAGE = (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, MemoryError,
          struct.error, pickle.UnpicklingError, zipfile.BadZipFile)


def torch_load(path):
    """torch.load that runs no code from the file; a cut-off, damaged or foreign file is one clear error."""
    try:
        _check_zip(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except (*DAMAGE, OSError) as e:
        if isinstance(e, OSError) and e.errno != errno.EINVAL:   # torch's reader seeks in vain in a large file that is cut off
            raise
        code = re.search(r"GLOBAL (\S+)", str(e))
        if code and isinstance(e, pickle.UnpicklingError):
            raise InputError(f"{path}: holds code, {code[1][:80]}, which is never run: not a file of plain tensors") from None
        first = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__).strip().split(". ")[0]
        raise InputError(f"{path}: cut off, damaged, or not a file of plain tensors ({first[:120]})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a dictionary of tensors, found {type(found).__name__}")
    _check_plain(path, found, {"values": path_size(path), "bytes": 2 * path_size(path)})   # twice: a tied head is there twice
    return found


def _check_zip(path):
    """torch's files are zip archives with nothing compressed; one that were could unpack to any size."""
    size = path_size(path)
    with open(path, "rb") as f:
        if f.read(4) != b"PK\x03\x04":   # an older format, a pickle and raw numbers
            return
        f.seek(max(0, size - 98))
        record, locator, end = (f.read(n) for n in (56, 20, 22))   # two readers must find one and the same list of entries
    if end[:4] != b"PK\5\6" or end[20:] != bytes(2) or (locator[:4] == b"PK\6\7" and not (
            record[:4] == b"PK\6\6" and int.from_bytes(locator[8:16], "little") == size - 98)):
        raise InputError(f"{path}: cut off, damaged, or not a file of plain tensors (a zip archive without its end)")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise InputError(f"{path}: a compressed archive, which torch does not write: not a file of plain tensors")
    if sum(entry.file_size for entry in entries) > size:
        raise InputError(f"{path}: damaged: its entries are larger than the file")


def _check_plain(path, tree, left, depth=0):
    """Only dictionaries, lists, plain values, and tensors that have their numbers in the file: no other kind that the unpickler
    would make, none that is one number spread over a shape of any size. left: of the values and of the tensors' bytes that the
    file can hold, since the same list or numbers may stand in it in many places."""
    left["values"] -= 1
    left["bytes"] -= tree.nbytes if isinstance(tree, torch.Tensor) and tree.layout == torch.strided else 0
    if depth > 8 or left["values"] < 0:
        raise InputError(f"{path}: expected a dictionary of tensors, found one that is nested too deeply")
    if isinstance(tree, torch.Tensor):
        plain = (type(tree) in (torch.Tensor, torch.nn.Parameter) and tree.layout == torch.strided and tree.device.type == "cpu"
                 and not tree.is_quantized and not tree.is_nested and tree.nbytes <= tree.untyped_storage().nbytes())
        if not plain or left["bytes"] < 0:
            raise InputError(f"{path}: expected plain tensors, found one of shape {str(tuple(tree.shape))[:80]} that the file "
                             "does not hold")
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if type(key) not in (str, int):
                raise InputError(f"{path}: expected names of tensors, found {repr(key)[:80]}")
            _check_plain(path, value, left, depth + 1)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            _check_plain(path, value, left, depth + 1)
    elif not isinstance(tree, (str, int, float, type(None))):
        raise InputError(f"{path}: expected tensors and plain values, found {type(tree).__name__}")


def path_size(path):
    return Path(path).stat().st_size


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


def unlike(found, expected, where=""):
    """How a tree of dictionaries, lists, tensors and plain values differs in its form from another: a few words, or None."""
    if isinstance(expected, torch.Tensor):
        if not isinstance(found, torch.Tensor) or (found.shape, found.dtype) != (expected.shape, expected.dtype):
            def form(x):
                return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            return f"{where}: expected {form(expected)}, found {form(found)}"
        return f"{where}: not finite" if not found.isfinite().all() else None
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            return f"{where}: expected a dictionary, found {type(found).__name__}"
        if found.keys() != expected.keys():
            missing, more = expected.keys() - found.keys(), found.keys() - expected.keys()
            names = ", ".join(sorted(map(str, missing or more)))[:120]
            return f"{where or 'it'} has {'no ' if missing else ''}{names}"
        parts = [(found[key], expected[key], f"{where}.{key}" if where else str(key)) for key in expected]
    elif isinstance(expected, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(expected):
            return f"{where}: expected {len(expected)} values"
        parts = [(*both, where) for both in zip(found, expected)]
    else:
        fit = type(found) is type(expected) or type(expected) is float and type(found) is int
        return None if fit else f"{where}: expected {expected!r}, found {str(found)[:40]!r}"
    return next(filter(None, (unlike(*part) for part in parts)), None)


def not_finite(tree, where=""):
    """The name of a tensor in a tree of dictionaries and lists that holds an infinity or NaN, or None."""
    if isinstance(tree, torch.Tensor):
        return None if tree.isfinite().all() else where
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return next(filter(None, (not_finite(part, f"{where}.{key}" if where else str(key)) for key, part in parts)), None)


def write_checkpoint(path, checkpoint):
    """A dictionary of tensors and plain values, with the SHA-256 of its content, whole or not at all."""
    with replacing(path) as f:
        try:
            torch.save({**checkpoint, "sha256": fingerprint(checkpoint)}, f)
        except RuntimeError as e:   # torch's word for a full disk
            if isinstance(e.__context__, OSError):
                raise e.__context__ from None
            raise


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
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)   # two processes would write into one another's file
        if not target.is_file():
            _download(url, target)
    finally:
        os.close(folder)
    return target


def _download(url, target):
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
            if isinstance(e, OSError) and e.errno == errno.ENOSPC:
                raise
            problem = str(getattr(e, "reason", e))
        if problem is None:
            os.replace(part, target)
            return
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
            f.flush()
            os.fsync(f.fileno())
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
