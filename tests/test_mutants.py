"""
exercises/mutants.py: every wrong solution is a place found once and becomes another program, there are some of all families and
exercises, and the runner tells what is caught from what survives, and leaves nothing behind.

    python -m pytest -q tests/test_mutants.py

That the tests catch them all is no test of ours, but a run of up to ten minutes: python exercises/mutants.py
"""
import ast
import collections
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "exercises"))

import blank
import mutants
from mutants import MUTANTS, ROOT, Mutant, Task

# ----------------------------------------------------------------------------------------------------------------------
# the table

@functools.cache
def program(file):
    return ast.dump(ast.parse((ROOT / file).read_text()))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_is_another_program(mutant):
    """One place, found once, and what it becomes compiles and is not the same program in another layout."""
    assert ast.dump(ast.parse(mutant.text((ROOT / mutant.file).read_text()))) != program(mutant.file)
    assert (ROOT / mutant.tests).is_file()


def test_there_are_enough_of_every_kind():
    families, exercises = (collections.Counter(m[key] for m in MUTANTS) for key in (1, 0))
    assert families.keys() == mutants.FAMILIES.keys() and min(families.values()) >= 4
    assert exercises.keys() == set(range(1, len(blank.EXERCISES) + 1)) and min(exercises.values()) >= 3
    assert len(MUTANTS) >= 40 and sum(m.blind for m in MUTANTS) >= 10
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)   # --only finds them by it


def test_a_text_that_is_not_there_once_is_refused():
    for old, times in (("a", 2), ("c", 0)):
        with pytest.raises(ValueError, match=f"in x.py once, found it {times} times"):
            Mutant(1, "sign", "x.py", "name", old, "b").text("a = a")


def test_only_takes_a_number_or_a_part_of_a_name():
    def names(*only):
        return [task.name for task in mutants.work(only) if task.kind == "mutant"]
    assert sorted(names()) == sorted(m.name for m in MUTANTS)
    assert set(names("4")) == {m.name for m in MUTANTS if m.exercise == 4}
    assert names("eps helps") == ["eps helps the chosen response"]
    assert [task.kind for task in mutants.work(["eps helps"])] == ["untouched", "mutant"]
    assert {task.kind for task in mutants.work(["4"])} == {"untouched", "blank", "mutant"}

# ----------------------------------------------------------------------------------------------------------------------
# the runner, on a repository of two files

SOURCE = "def double(x):\n    return 2 * x\n"
TEST = "import code_\n\ndef test_three():\n    assert code_.double(3) == 6\n"


def repository(folder):
    (folder / "tests").mkdir(parents=True)
    (folder / "code_.py").write_text(SOURCE)
    (folder / "tests/test_code_.py").write_text(TEST)


def planted(name, new, kind="mutant"):
    m = Mutant(1, "scale", "code_.py", name, "2 * x", new)
    return Task(kind, name, m.tests, m.file, m.text(SOURCE), m.exercise, m.family)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_the_runner_tells_caught_from_survived(temporary, capsys):
    """3 * 3 is not 6, 3 + 3 is. One after the other in the same copy: the untouched file passes, though a mutant was there."""
    untouched = Task("untouched", "tests/test_code_.py", "tests/test_code_.py")
    tasks = [planted("three times", "3 * x"), untouched, planted("the sum", "x + x")]
    assert not mutants.report(mutants.run(tasks, 1, repository))
    lines = [line.rpartition("   ")[0] if line.endswith(" s") else line for line in capsys.readouterr().out.splitlines()]
    assert lines == ["caught    1 scale      three times   by test_three", "passes      untouched  tests/test_code_.py",
                     "SURVIVED  1 scale      the sum", "caught   1 of   2  scale",
                     f"caught   1 of   2  1 {blank.EXERCISES[0].title}", "caught   1 of   2  mutants",
                     "not as it must be: the sum"]
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("kind, passed, good", [("untouched", True, True), ("untouched", False, False), ("blank", True, False),
                                                ("blank", False, True), ("mutant", True, False), ("mutant", False, True)])
def test_what_must_pass_and_what_must_fail(kind, passed, good):
    assert mutants.report([(planted("a", "3 * x", kind), passed, "", 1.0)]) == good


def test_what_runs_for_ever_is_caught_and_ended(temporary, monkeypatch):
    monkeypatch.setattr(mutants, "TIMEOUT", 0)
    (_, passed, why, _), = mutants.run([planted("waits", "__import__('time').sleep(600)")], 1, repository)
    assert (passed, why) == (False, "no end after 0 s")
    assert not list(temporary.iterdir())


def test_no_test_at_all_is_not_caught(temporary):
    with pytest.raises(RuntimeError, match="test_none.py ended with status 4"):
        list(mutants.run([planted("a", "3 * x")._replace(tests="tests/test_none.py")], 1, repository))
    assert not list(temporary.iterdir())


def test_a_runner_that_is_killed_leaves_nothing_behind(tmp_path):
    runner = subprocess.Popen([sys.executable, str(ROOT / "exercises/mutants.py"), "--only", "eps helps"],
                              env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.DEVNULL)
    try:
        while runner.poll() is None and not list(tmp_path.glob("mutants-*/copy-*-scratch/said")):
            time.sleep(0.02)
        time.sleep(0.2)   # tests are at work
        assert runner.poll() is None
        runner.send_signal(signal.SIGTERM)
        assert runner.wait() == 128 + signal.SIGTERM
    finally:
        runner.kill()
    assert not list(tmp_path.iterdir())
