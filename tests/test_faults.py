"""
studies/faults.py and studies/fuzz.py: a handful of faults lead to nothing, a weakness that is put in is found, and what is kept
under results/faults is what RESULTS.md says. All of it: python -m studies.faults.

    python -m pytest -q tests/test_faults.py
"""
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import optim
from studies import faults, fuzz

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """faults_worker.py's findings. A process of its own: one that has used autograd cannot fork."""
    done = subprocess.run([sys.executable, str(ROOT / "tests/faults_worker.py"), str(tmp_path_factory.mktemp("faults"))],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wrong(found, name):
    return [one["wrong"] for one in found[name]]

# ---- oracle: the uninterrupted run, the file as it was ---------------------------------------------------------------------

def test_killed_stopped_and_out_of_space_a_run_becomes_what_it_would_have(found):
    assert [hit["kind"] for hit in found["sound"]] == ["SIGKILL at write", "disk full at a write", "SIGINT"]
    assert wrong(found, "sound") == [None] * 3


def test_damaged_files_are_refused(found):
    assert wrong(found, "files") == [None] * 7 and {one["ended"] for one in found["files"]} == {"refused"}


@pytest.mark.parametrize("weakness, message", [
    ("not atomic", "does not load: .*best.pt: cut off"), ("generators not restored", "the resumed run differs in .*last.pt"),
    ("pickles run", "code of the file was run"), ("no SHA-256", "it was not refused"),
    ("too narrow a handler", "status 1: .*RuntimeError"), ("too much memory", " MB for a file of ")])
def test_a_weakness_is_found(found, weakness, message):
    assert any(w and re.search(message, w, re.S) for w in wrong(found, weakness)), found[weakness]

# ---- by hand ---------------------------------------------------------------------------------------------------------------

def test_the_matrix_by_hand():
    """Every optimizer in two ways to train, all eight of them, two in float16; 7 kills each, 3 of them placed."""
    cases = [name.split(", ") for name, *_ in faults.cases()]
    plain = [name for name in cases if name[-1] != "float16"]
    assert Counter(name[-1] for name in plain) == dict.fromkeys(optim.OPTIMIZERS, 2)
    assert Counter(", ".join(name[:-1]) for name in plain) == dict.fromkeys(faults.MODES, 4)
    assert len(cases) - len(plain) == 2
    plan, rounds, jobs = faults.plan(quick=False)
    kinds = Counter(kind for _, kinds in plan for kind in kinds)
    assert len(plan) == 34 and sum(kinds.values()) == 34 * 8
    assert sum(n for kind, n in kinds.items() if kind.startswith("SIG")) == 34 * 7 >= 200
    assert sum(n for kind, n in kinds.items() if kind.startswith("SIGKILL at ")) == 34 * 3 >= 60
    assert set(kinds) == {*faults.SIGNALS, *faults.DISK, *(f"SIGKILL at {place}" for place in faults.PLACES)}
    assert rounds * len(fuzz.READERS) + len(fuzz.CRAFTED) >= 2000 and jobs == faults.JOBS


@pytest.mark.parametrize("name, raw", [("cut off", b"ab"), ("a bit flipped", b"abc"), ("bytes lost", b"a" * 99), ("empty", b"")])
def test_damage_by_hand(name, raw):
    changed = fuzz.DAMAGE[name](b"a" * 100 if name == "bytes lost" else b"abc", random.Random(2))
    if name == "a bit flipped":
        assert len(changed) == 3 and sum((x ^ y).bit_count() for x, y in zip(changed, raw)) == 1
    else:
        assert len(changed) < 100 and (raw.startswith(changed) or changed == b"")

# ---- properties ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", fuzz.DAMAGE)
def test_damage_is_drawn_from_its_seed_and_changes_something(name):
    raw = bytes(range(256)) * 8
    one, same, other = (fuzz.DAMAGE[name](raw, random.Random(seed)) for seed in (1, 1, 2))
    assert one == same and one != raw and (other != one or name == "empty")


def test_what_is_kept_meets_the_bars_and_is_in_the_results():
    kept = json.loads((ROOT / "results/faults/faults.json").read_text())
    assert kept["wrong"] == [] and kept["kills"] >= 200 and kept["placed"] >= 60 and kept["files"] >= 2000
    assert kept["most_memory"] <= fuzz.BOUND
    assert kept["crafted"].keys() == fuzz.CRAFTED.keys()
    assert set(kept["crafted"].values()) <= {"refused", "as it was"}
    told = {what for what, ended in kept["crafted"].items() if ended == "refused" and fuzz.CRAFTED[what][2]}
    assert len(told) >= 8   # kinds of defects that the line names
    memory = kept["most_memory"] / 1e6
    said = (f"{kept['kills']} kills, {kept['placed']} of them at a write, fsync or rename of a checkpoint, and {kept['disk']} "
            f"failing disks; {kept['files']:,} files, at most {memory:.0f} MB to read one; nothing went wrong.")
    results = (ROOT / "RESULTS.md").read_text()
    assert said in " ".join(results.split())
    tables = (ROOT / "results/faults/tables.md").read_text()
    assert tables.split("\n\n", 1)[1].strip() in results
