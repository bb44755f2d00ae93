"""
What test_faults.py looks at, in a process that forks and has not used autograd: a few faults that must lead to nothing, and the
same with a weakness put in, which must be found.

    python tests/faults_worker.py FOLDER      prints {name: findings} as JSON
"""
import contextlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import files
import runs
from studies import faults, fuzz

PMA_WITH_DROPOUT = next(i for i, (name, *_) in enumerate(faults.cases()) if name == "sft, adamw-pma, float16")


@contextlib.contextmanager
def weakened(module, name, value):
    real = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, real)


@contextlib.contextmanager
def straight(path):
    """A checkpoint written where the old one was."""
    with files.open(path, "wb") as f:
        yield f


def open_marked(path, mode="r", **options):
    """So that the harness takes a file without .part for a checkpoint, too."""
    return faults.HookedFile(open(path, mode, **options), RUNNING[-1]) if str(path).endswith(".pt") and "w" in mode else open(
        path, mode, **options)


RUNNING = []


class Watching(faults.Hooked):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        RUNNING.append(self)
        files.open = open_marked


def main(folder):
    (folder / "start.log").mkdir()
    faults.begin(folder)
    found = {"sound": faults.case(folder, 0, ["SIGKILL at write", "disk full at a write", "SIGINT"], 1)}
    with weakened(files, "replacing", straight), weakened(faults, "Hooked", Watching):
        found["not atomic"] = faults.case(folder, 0, ["SIGKILL at write"], 1)
    with weakened(runs, "set_rng_state", lambda *_: None):   # dropout is on; seed 3 kills behind the first step
        found["generators not restored"] = faults.case(folder, 0, 2 * ["SIGKILL at renamed"], 3)

    ended = fuzz.forked(lambda: fuzz.prepare(folder / "files"), folder)
    assert ended.status == 0, ended.said
    found["files"] = [fuzz.crafted(folder / "files", what) for what in ("pickle that runs code", "wrong shape", "not signed")]
    found["files"] += [fuzz.chance(folder / "files", target, k, 1) for k in (1, 3) for target in ("last.pt", "pairs .jsonl.gz")]
    load = torch.load
    with weakened(torch, "load", lambda path, **_: load(path, map_location="cpu", weights_only=False)):
        found["pickles run"] = [fuzz.crafted(folder / "files", "pickle that runs code")]
    with weakened(fuzz.gpt, "read_checkpoint", lambda path, keys=(): files.torch_load(path)):
        found["no SHA-256"] = [fuzz.crafted(folder / "files", "not signed")]
    with weakened(files, "DAMAGE", (OSError,)):
        found["too narrow a handler"] = [fuzz.chance(folder / "files", "best.pt", 10, 1)]
    with weakened(fuzz, "BOUND", -1):
        found["too much memory"] = [fuzz.crafted(folder / "files", "wrong shape")]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
