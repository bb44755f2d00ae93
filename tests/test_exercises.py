"""
exercises/: a blanked function has lost its body and nothing else has changed, the README says what the table says, every wrong
snippet shows its symptom and its mended one does not.

    python -m pytest -q tests/test_exercises.py

That a blanked copy fails the tests that grade it is not proved here: it takes minutes, and exercises/mutants.py does it.
"""
import ast
import difflib
import inspect
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "exercises"))

import blank  # noqa: E402  (behind the path)
import bugs  # noqa: E402
import solutions  # noqa: E402
from blank import EXERCISES, Refused, blanked, copied  # noqa: E402

README = (ROOT / "exercises/README.md").read_text()
PARTS = [(e.file, name) for e in EXERCISES for name in e.names]
every_exercise = pytest.mark.parametrize("n", range(1, len(EXERCISES) + 1))
every_bug = pytest.mark.parametrize("name", bugs.BUGS)

# ----------------------------------------------------------------------------------------------------------------------
# oracle: Python's own parser, and the interpreter

def node_of(text, name):
    """The node of a function by its dotted name, found by descent, outermost first."""
    node = ast.parse(text)
    for part in name.split("."):
        node, = (n for n in ast.walk(node) if getattr(n, "name", None) == part and n is not node)
    return node


@pytest.mark.parametrize("file, name", PARTS)
def test_the_body_alone_is_gone(file, name):
    before = (ROOT / file).read_text()
    after = blanked(before, name)
    old, new = node_of(before, name), node_of(after, name)
    assert ast.get_docstring(new, clean=False) == ast.get_docstring(old, clean=False)
    assert len(new.body) == 1 + (ast.get_docstring(old) is not None) and isinstance(new.body[-1], ast.Raise)
    _, _, *lost = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    assert [line[1:].strip() for line in lost if line[0] == "+"] == [f'raise NotImplementedError("exercise: {name}")']
    assert {line[1:] for line in lost if line[0] == "-"} <= set(before.splitlines()[old.lineno - 1:old.end_lineno])
    # with both bodies emptied the two files are one program
    trees = []
    for text in (before, after):
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if getattr(node, "name", None) == name.split(".")[-1] and node.lineno == old.lineno:
                node.body = []
        trees.append(ast.dump(tree))
    assert trees[0] == trees[1]


@pytest.mark.parametrize("file, name", PARTS)
def test_it_raises_when_it_is_called(file, name):
    """By itself, without its decorators, with as many Nones as it takes; a generator too, and before it is iterated over."""
    node = node_of(blanked((ROOT / file).read_text(), name), name)
    node.decorator_list = []
    found = {}
    exec(compile(ast.Module([node], []), file, "exec"), found)
    function = found[node.name]
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    with pytest.raises(NotImplementedError, match=re.escape(f"exercise: {name}") + "$"):
        function(*[None] * len(needed))


def test_a_copy_is_what_git_tracks(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("an unpacked archive")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    copied(tmp_path / "copy")
    found = {path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert found == set(tracked) and {"model.py", "LICENSE", "tests/conftest.py"} <= found
    assert all((tmp_path / "copy" / name).read_bytes() == (ROOT / name).read_bytes() for name in found)

# ----------------------------------------------------------------------------------------------------------------------
# worked by hand

SOURCE = '''\
"""Naïve."""
class A:
    @staticmethod
    def f(a,   # the "first"
          b=(1, 2),
          ):   # signature's
        """Says é.

        More."""
        # how it is done
        if a:
            return b   # and why

    def g(self): return 1   # secret

    def h(self):

        # secret
        @cached
        def inner(): yield 1
        return inner


async def f(): pass
'''


@pytest.mark.parametrize("name, old, new", [
    ("A.f", '        # how it is done\n        if a:\n            return b   # and why\n', "        RAISE\n"),
    ("A.g", "return 1   # secret", "RAISE"),
    ("A.h", "\n        # secret\n        @cached\n        def inner(): yield 1\n        return inner\n", "        RAISE\n"),
    ("A.h.inner", "yield 1", "RAISE"),
    ("f", "pass", "RAISE")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blanked_by_hand(name, old, new, end):
    assert SOURCE.count(old) == 1
    new = new.replace("RAISE", f'raise NotImplementedError("exercise: {name}")')
    expected = SOURCE.replace(old, new)
    assert blanked(SOURCE.replace("\n", end), name) == expected.replace("\n", end)


def test_what_cannot_be_blanked():
    for name, message in (("g", "no function g: did you mean A.g"), ("inner", "did you mean A.h.inner"), ("A", "no function A"),
                          ("zzz", "no function zzz$")):
        with pytest.raises(Refused, match=message):
            blanked(SOURCE, name)
    with pytest.raises(Refused, match="no body"):
        blanked('def f():\n    """All there is."""\n', "f")


@pytest.mark.parametrize("around", [False, True], ids=["no git", "inside another repository"])
def test_an_unpacked_archive_is_copied_without_what_runs_leave(tmp_path, monkeypatch, around):
    root = tmp_path / "outer" / "nano"
    for name in ("a.py", "tests/test_a.py", ".gitignore", ".venv/bin/python", "runs/sft/last.pt", "tests/__pycache__/a.pyc",
                 ".pytest_cache/x", "best.pt", "results/runs.jsonl"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    if around:
        if not shutil.which("git"):
            pytest.skip("no git here")
        subprocess.run(["git", "init", "-q", str(tmp_path / "outer")], check=True)
    monkeypatch.setattr(blank, "ROOT", root)
    copied(tmp_path / "copy")
    found = sorted(p.relative_to(tmp_path / "copy").as_posix() for p in (tmp_path / "copy").rglob("*") if p.is_file())
    assert found == [".gitignore", "a.py", "results/runs.jsonl", "tests/test_a.py"]

# ----------------------------------------------------------------------------------------------------------------------
# properties: the command line

def test_an_exercise_is_a_copy_that_differs_in_one_file(tmp_path, capsys):
    """Exercise 7, six functions in one file. What is for teachers is not in it."""
    blank.main(["7", "--to", str(tmp_path / "a b")])
    said = capsys.readouterr().out
    assert f"graded by: cd '{tmp_path / 'a b'}' && {shlex.quote(sys.executable)} -m pytest -q tests/test_optim.py" in said
    found = {p.relative_to(tmp_path / "a b") for p in (tmp_path / "a b").rglob("*") if p.is_file()}
    assert set(blank.held()) - found == {Path(name) for name in (
        "exercises/solutions.py", "exercises/mutants.py", "tests/test_exercises.py", "tests/test_mutants.py")} & set(blank.held())
    changed = [name for name in found if (tmp_path / "a b" / name).read_bytes() != (ROOT / name).read_bytes()]
    assert changed == [Path("optim.py")]
    text = (tmp_path / "a b/optim.py").read_text()
    assert re.findall(r'NotImplementedError\("exercise: (.*)"\)', text) == list(EXERCISES[6].names)


def test_several_exercises_in_one_copy(tmp_path, capsys):
    """Two of them in one file."""
    blank.main(["9", "3", "1", "--to", str(tmp_path / "copy")])
    said = capsys.readouterr().out
    assert [said.count(f"{file} has to be completed") for file in ("model.py", "losses.py", "data.py")] == [1, 2, 0]
    for file, numbers in (("losses.py", (3, 9)), ("model.py", (1,))):
        gone = re.findall(r'NotImplementedError\("exercise: (.*)"\)', (tmp_path / "copy" / file).read_text())
        assert sorted(gone) == sorted(name for n in numbers for name in EXERCISES[n - 1].names)


def test_grades_by_hand(tmp_path, monkeypatch, capsys):
    """Three tests, two of which ask for f; one wrong body, a right one, one that breaks g, and one that is no Python."""
    root = tmp_path / "nano"
    (root / "tests").mkdir(parents=True)
    (root / "a.py").write_text("def f(x):\n    return 2 * x\n\ndef g(x):\n    return x\n")
    (root / "tests/test_a.py").write_text("import sys; sys.path.insert(0, '.')\nimport a\nimport pytest\n"
                                          "@pytest.mark.parametrize('x', [1, 2])\ndef test_f(x):\n    assert a.f(x) == 2 * x\n"
                                          "def test_g():\n    assert a.g(1) == 1\n")
    monkeypatch.setattr(blank, "ROOT", root)
    for f, g, good, lines in (
            ("x + 1", "x", False, ["1 of 2 tests that ask for it pass", "  not: tests/test_a.py::test_f[2]"]),
            ("x + x", "x", True, ["2 of 2 tests that ask for it pass"]),
            ("x + x", "0", False, ["2 of 2 tests that ask for it pass",
                                   "  nor, though it asks for something else: tests/test_a.py::test_g"])):
        (tmp_path / "mine.py").write_text(f"def f(x):\n    return {f}\n\ndef g(x):\n    return {g}\n")
        assert blank.main(["a.py", "f", "--grade", str(tmp_path / "mine.py")]) is good
        assert capsys.readouterr().out.splitlines() == lines
    (tmp_path / "mine.py").write_text("import nothing_like_this\ndef f(x):\n    return 2 * x\n\ndef g(x):\n    return x\n")
    assert blank.main(["a.py", "f", "--grade", str(tmp_path / "mine.py")]) is False
    assert capsys.readouterr().out.splitlines()[0] == "0 of 2 tests that ask for it pass"


def test_a_file_that_takes_for_ever_fails_all(tmp_path, monkeypatch):
    def run(*_, timeout, **__):
        raise subprocess.TimeoutExpired("pytest", timeout)
    monkeypatch.setattr(blank.subprocess, "run", run)
    assert 300 <= blank.TIMEOUT and blank.failed(tmp_path, "tests/test_a.py") == {"tests/test_a.py"}
    monkeypatch.setattr(blank.subprocess, "run", lambda *_, timeout, **__: SimpleNamespace(returncode=0, stdout=str(timeout)))
    assert blank.failed(tmp_path, "tests/test_a.py") == set()


def test_where_a_copy_goes(tmp_path, monkeypatch, capsys):
    """Beside the repository, named after it; into an empty folder, but into no other."""
    went = []
    monkeypatch.setattr(blank, "copied", lambda folder: went.append(folder) or (folder / "exercises").mkdir(parents=True))
    monkeypatch.setattr(blank, "ROOT", tmp_path / "nano")
    monkeypatch.setattr(blank, "held", lambda: [Path("lora.py")])
    (tmp_path / "nano").mkdir()
    shutil.copy(ROOT / "lora.py", tmp_path / "nano/lora.py")
    for arguments in (["5"], ["lora.py", "LoRALinear.forward", "merge"]):
        blank.main(arguments)
    assert went == [tmp_path / "nano-exercise-5", tmp_path / "nano-LoRALinear.forward"]
    assert blank.chosen(["9", "3", "1", "3"])[1] == "exercise-1-3-9"
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    for full in (tmp_path, tmp_path / "file"):
        with pytest.raises(Refused, match="nothing is overwritten"):
            copied(full)


@pytest.mark.parametrize("arguments, message", [
    ([], "expected the number of an exercise, or a file"),
    (["99"], "no exercise 99: they go from 1 to 13"),
    (["0"], "no exercise 0"),
    (["losse.py", "dpo_loss"], "losse.py is no .py file of this repository: did you mean losses.py"),
    (["README.md", "x"], "README.md is no .py file"),
    (["../losses.py", "dpo_loss"], "no .py file of this repository"),
    (["losses.py"], "expected the number"),
    (["losses.py", "dpo_los"], "losses.py: no function dpo_los: did you mean dpo_loss"),
    (["lora.py", "forward"], "lora.py: no function forward: did you mean LoRALinear.forward?"),
    (["losses.py", "dpo_loss", "--to", str(ROOT / "tests")], "not an empty folder"),
    (["4", "--to", str(ROOT / "LICENSE" / "x")], "Not a directory"),
    (["4", "--wrong"], "unrecognized arguments"),
    (["4", "14"], "no exercise 14: they go from 1 to 13"),
    (["3", "4", "--grade", "losses.py"], "--grade: expected one exercise"),
    (["4", "--grade", "nothing.py"], "No such file"),
    (["4", "--grade", "lora.py"], "losses.py: no function dpo_loss"),
])
def test_an_error_is_one_line_and_status_2(arguments, message):
    done = subprocess.run([sys.executable, str(ROOT / "exercises/blank.py"), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    line, = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_the_list_is_the_table(capsys):
    blank.main(["--list"])
    said = capsys.readouterr().out
    for n, e in enumerate(EXERCISES, 1):
        assert f"{n:>2}  {e.title}\n      {e.file}: {', '.join(e.names)}\n      python -m pytest -q {e.tests}\n" in said

# ----------------------------------------------------------------------------------------------------------------------
# the README says what the table says

@every_exercise
def test_the_readme_has_every_exercise(n):
    e = EXERCISES[n - 1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith(f"| {n} |")]
    (number, title, names, tests, seconds, time), = rows
    anchor = f"{n}-" + re.sub(r"[^\w\s-]", "", e.title).lower().replace(" ", "-")   # as GitHub makes it
    assert title == f"[{e.title}](#{anchor})" and tests == f"`{e.tests}`" and int(seconds) > 0 and time
    assert names == f"`{e.file}`: " + ", ".join(f"`{name}`" for name in e.names)
    section = README.split(f"\n## {n}. {e.title}\n")[1].split("\n## ")[0]
    commands = re.search(r"```sh\n(.*?)```", section, re.S)[1].splitlines()
    assert commands[0] == f"python exercises/blank.py {n}" and commands[1] == f"python -m pytest -q {e.tests}"
    said = " ".join(section.split())
    assert "What goes wrong: " in said and "A right one: " in said
    # every word of a -k is a part of a test's name there, so that a renamed test is noticed
    known = re.findall(r"^def (test_\w+)", (ROOT / e.tests).read_text(), re.M)
    for command in commands[2:]:
        *beginning, words = shlex.split(command, comments=True)
        assert beginning == ["python", "-m", "pytest", "-q", e.tests, "-k"]
        for word in re.findall(r"\w+", words):
            assert word in ("not", "or", "and") or any(word in test for test in known), word


def test_the_readmes_table_ends_with_the_last_exercise():
    assert re.findall(r"^## (\d+)\. (.*)$", README, re.M) == [(str(n), e.title) for n, e in enumerate(EXERCISES, 1)]
    assert all((ROOT / e.tests).is_file() for e in EXERCISES)


def test_the_readme_has_every_snippet():
    table = README.split("## Eleven wrong snippets")[-1]
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == list(bugs.BUGS)
    assert len(bugs.BUGS) == 11

# ----------------------------------------------------------------------------------------------------------------------
# wrong snippets

BY_HAND = {   # what a right one gives, without our code
    "sequence_logps": 1.0,                          # a token is a token, in whichever response
    "dpo_loss": math.log(1 + math.exp(-4)),         # 8 tokens of half a nat
    "frozen_reference": math.log(2),
    "accumulate": 0.0,
    "Lion": (1 - 1e-3 * 0.1) ** 100,
    "AdamWPMA": 1 - 0.9 ** 10}
FAR = {"accumulate": 0.1, "frozen_reference": 0.05, "Lion": 0.05}   # else 0.1 of the expected number or more


@every_bug
def test_a_bug_shows_its_symptom_and_its_solution_does_not(name):
    symptom = bugs.BUGS[name]
    (_, found), (_, expected) = symptom().items()
    (_, mended), (_, again) = symptom(getattr(solutions, name)).items()
    far = FAR.get(name, 0.05 * abs(expected))
    assert abs(found - expected) > far
    # fp32, and another order of its sums; FoldingAdapter adds to a weight and takes away again
    assert again == expected and mended == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert bugs.judged(name, getattr(solutions, name))[-1] == "right" and not bugs.judged(name, getattr(bugs, name))[-1]
    assert not bugs.CHECKS[name](getattr(bugs, name))
    if name in BY_HAND:
        assert expected == pytest.approx(BY_HAND[name], rel=1e-4, abs=1e-6)


@every_bug
def test_bug_and_solution_are_called_alike_and_say_something(name):
    wrong, right = getattr(bugs, name), getattr(solutions, name)
    assert wrong is not right and wrong.__doc__ and right.__doc__ and wrong.__doc__ != right.__doc__
    assert inspect.signature(wrong) == inspect.signature(right)


def rolled_labels(prompts, chosen, rejected):
    ids, labels = solutions.pair_labels(prompts, chosen, rejected)
    return ids, labels.roll(-1, 1)


def other_ids(prompts, chosen, rejected):
    ids, labels = solutions.pair_labels(prompts, chosen, rejected)
    return ids.roll(-1, 1), labels


class NeverFolds(solutions.Adapter):
    pass


class OneBeta(solutions.Lion):
    @bugs.torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, _), lr = group["betas"], group["lr"]
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("m", bugs.torch.zeros_like(p)).lerp_(p.grad, 1 - b1)
                p.mul_(1 - lr * group["weight_decay"]).sub_(lr * m.sign())


class ForgetsV(solutions.AdamWPMA):
    def step(self):
        super().step()
        for group in self.param_groups:
            for s in map(self.state.get, group["params"]):
                if s and s["t"] > 1 and (s["t"] - 1) % group["period"] == 0:
                    s["v"].div_(group["period"])


@pytest.mark.parametrize("name, wrong", [
    ("pair_labels", rolled_labels), ("pair_labels", other_ids), ("frozen_reference", lambda model: model.eval()),
    ("FoldingAdapter", NeverFolds), ("Lion", OneBeta), ("AdamWPMA", ForgetsV),
    ("dpo_loss", lambda *args: solutions.dpo_loss(*args[:4], 1.0))])
def test_what_only_takes_the_symptom_away_is_not_mended(name, wrong):
    assert bugs.judged(name, wrong)[-1] != "right"


@pytest.mark.parametrize("text, message", [(None, "no file"), ("x = 1\n", "has none of pair_labels, sft_labels")])
def test_a_file_without_snippets_is_refused(tmp_path, capsys, text, message):
    if text:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(SystemExit) as e:
        bugs.main(["--own", str(tmp_path / "mine.py")])
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


def test_own_snippets_are_judged(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def sequence_logps(logp, mask):\n    return (logp * mask).sum(1)\n\n"
                                      "def dpo_loss(a, b, c, d, beta):\n    return -F.logsigmoid(beta * (a - b).sum(1))\n")
    assert bugs.main(["--own", str(tmp_path / "mine.py")]) is False
    _, one, two = capsys.readouterr().out.splitlines()
    assert one.split()[0] == "sequence_logps" and one.endswith("1.0000    1.0000  right")
    assert two.split()[0] == "dpo_loss" and two.endswith("0.0181    0.0181  wrong elsewhere")   # where the references differ


def test_scored_tokens_by_hand():
    """Two pairs: what is scored is the responses and nothing else, padding not, an end-of-text (2047) too."""
    prompts, chosen, rejected = [[1, 2, 3], [4]], [[5, 2047], [6, 7, 2047]], [[8, 2047], [9, 2047]]
    ids, labels = solutions.pair_labels(prompts, chosen, rejected)
    assert labels.tolist() == [[-100, -100, -100, 5, 2047], [-100, 6, 7, 2047, -100],
                               [-100, -100, -100, 8, 2047], [-100, 9, 2047, -100, -100]]
    assert ids[0].tolist() == [1, 2, 3, 5, 2047]
    ids, labels = solutions.sft_labels(prompts, chosen)
    assert labels.tolist() == [[-100, -100, -100, 5, 2047], [-100, 6, 7, 2047, -100]] and ids[1].tolist() == [4, 6, 7, 2047, 2047]


def test_a_folding_adapter_keeps_its_outputs_in_both_modes():
    """Also at eval() twice, and train() twice; B A and the base by hand."""
    bugs.torch.manual_seed(0)
    layer = solutions.FoldingAdapter(bugs.nn.Linear(3, 2), 1, 2)
    layer.B.data += 1
    x = bugs.torch.randn(4, 3)
    expected = layer.base(x) + 2 * (x @ layer.A[0])[:, None]
    for mode in (True, True, False, False, True, False, True):
        bugs.torch.testing.assert_close(layer.train(mode)(x), expected)


def test_the_table_and_the_picture(tmp_path, monkeypatch, drawn, capsys):
    """With the curves that take long replaced: every panel has the snippet and the right one, on axes with names."""
    monkeypatch.setattr(bugs, "BUGS", {"Lion": bugs.BUGS["Lion"]})
    monkeypatch.setattr(bugs, "ends", lambda labels, steps, every=1: [(0, 0.0), (steps, 0.5)])
    monkeypatch.setattr(bugs, "prompt_under_dpo", lambda labels, steps: [-1.0] * (steps + 1))
    monkeypatch.setattr(bugs, "loss_after_evaluations", lambda make: [1.0] * 9)
    bugs.main(["--out", str(tmp_path / "new")])
    assert (tmp_path / "new/bugs.png").read_bytes()[:4] == b"\x89PNG"
    head, line, path = capsys.readouterr().out.splitlines()
    assert line.split()[0] == "Lion" and line.split()[-2:] == ["0.9000", "0.9900"] and path.endswith("bugs.png")
    figure, = drawn
    assert len(figure.axes) == 6
    for axis in figure.axes:
        assert len(axis.lines) == 2 and axis.get_title() and axis.get_xlabel() and axis.get_ylabel()
        assert [text.get_text() for text in axis.get_legend().get_texts()][1] == "the right one"
