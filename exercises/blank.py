"""
Makes an exercise: a copy of the repository in which the body of a function is gone, for somebody to write it again. The tests of
its file are the grader.

    python exercises/blank.py --list                          # the exercises of README.md, beside this file
    python exercises/blank.py 4                               # the whole of exercise 4, into ../NAME-exercise-4
    python exercises/blank.py 3 4 9                           # several in one copy: none then shows how another is done
    python exercises/blank.py losses.py dpo_loss              # any function, into ../NAME-dpo_loss
    python exercises/blank.py lora.py LoRALinear.forward merge --to FOLDER
    python exercises/blank.py 4 --grade FILE                  # FILE, a student's losses.py, in a fresh copy: its points

What stays is the signature, the docstring and every other byte of the file. Comments in the body go with it, since they tell how
it is done. What holds answers (solutions.py, mutants.py, their tests) is not in a copy that is handed out.
"""
import argparse
import ast
import difflib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = (".git", ".venv", "runs", "hh", "__pycache__", ".pytest_cache", ".ruff_cache")   # where there is no git to ask
TIMEOUT = 900   # seconds for a test file
TEACHERS = ("exercises/solutions.py", "exercises/mutants.py", "tests/test_exercises.py", "tests/test_mutants.py")


class Exercise(NamedTuple):
    title: str
    file: str
    names: tuple   # of the functions whose bodies go, as Class.method or outer.inner where they stand in something
    tests: str     # the test file that grades it


EXERCISES = [
    Exercise("The attention mask", "model.py", ("Attention.attend",), "tests/test_model.py"),
    Exercise("Which tokens are scored, and the shift", "data.py", ("collate",), "tests/test_data.py"),
    Exercise("The log-probability of a response", "losses.py",
             ("_Logp.forward", "_Logp.backward", "token_logps", "sequence_logps"), "tests/test_losses.py"),
    Exercise("The DPO loss and its gradient", "losses.py", ("dpo_loss",), "tests/test_losses.py"),
    Exercise("LoRA and merging", "lora.py", ("LoRALinear.forward", "LoRALinear.merged_weight", "merge"), "tests/test_lora.py"),
    Exercise("Lion", "optim.py", ("Lion.update",), "tests/test_optim.py"),
    Exercise("AdamW-PMA", "optim.py", ("is_large", "periodical", "AdamWPMA.moment", "AdamWPMA.correction", "AdamWPMA.denominator",
                                       "AdamWPMA.step_size"), "tests/test_optim.py"),
    Exercise("AGMA", "optim.py", ("AGMA.moment", "AGMA.correction", "AGMA.denominator", "AGMA.step_size"), "tests/test_optim.py"),
    Exercise("CDPO", "losses.py", ("cdpo_regularizer", "cdpo_loss"), "tests/test_losses.py"),
    Exercise("The reward model", "losses.py", ("reward_loss", "batch_rewards"), "tests/test_train_reward.py"),
    Exercise("The variance probe", "variance.py", ("variance", "mean_square", "Walker.step", "Walker.update"),
             "tests/test_variance.py"),
    Exercise("Accumulation, weighted by tokens", "train_sft.py", ("main.micro_losses",), "tests/test_train_sft.py"),
    Exercise("One step of K micro-batches", "optim.py", ("accumulated_step",), "tests/test_optim.py"),
]


class Refused(ValueError):
    """What was asked for is not there: one line, status 2."""


def refuse(message):
    raise Refused(message)


def functions(text):
    """{dotted name: node} of every function in a source text, methods and inner functions too."""
    found = {}

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            if named and not isinstance(child, ast.ClassDef):
                found[prefix + child.name] = child
            walk(child, f"{prefix}{child.name}." if named else prefix)
    walk(ast.parse(text), "")
    return found


def blanked(text, name):
    """The source text with the body of one function replaced by its docstring, if it has one, and a NotImplementedError."""
    found = functions(text)
    if name not in found:
        close = [full for full in found if full.endswith(f".{name}")] or difflib.get_close_matches(name, found, 3)
        raise Refused(f"no function {name}" + (f": did you mean {', '.join(close)}?" if close else ""))
    body = found[name].body
    if ast.get_docstring(found[name]) is not None:
        body = body[1:]
    if not body:
        raise Refused(f"{name} has no body to take out")
    lines = text.encode().splitlines(keepends=True)   # ast counts columns in bytes
    first, column, last = body[0].lineno - 1, body[0].col_offset, body[-1].end_lineno - 1
    if isinstance(body[0], (ast.FunctionDef, ast.ClassDef)) and body[0].decorator_list:
        first = body[0].decorator_list[0].lineno - 1   # a node begins behind its decorators
    before = lines[first][:column]
    while not before.strip() and (not lines[first - 1].strip() or lines[first - 1].lstrip().startswith(b"#")):
        first -= 1   # comments above the first statement
    end = lines[last][len(lines[last].rstrip(b"\r\n")):]
    return b"".join((*lines[:first], before + f'raise NotImplementedError("exercise: {name}")'.encode() + end,
                     *lines[last + 1:])).decode()


def held():
    """The repository's files, relative to its root: those that git tracks; in an unpacked archive all but what a run leaves."""
    try:
        top = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--show-toplevel"], capture_output=True, text=True)
        if top.returncode == 0 and Path(top.stdout.strip()).resolve() == ROOT:   # and not a repository around the archive
            tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
            return sorted(Path(name) for name in tracked.stdout.split("\0") if name and (ROOT / name).is_file())
    except FileNotFoundError:   # no git on this machine
        pass
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in NOT_COPIED]
        found += [(Path(folder) / name).relative_to(ROOT) for name in names if not name.endswith((".pt", ".part"))]
    return sorted(found)


def copied(folder):
    """The repository's files, copied into a new or empty folder."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise Refused(f"{folder} is there already, and not an empty folder: nothing is overwritten")
    for name in held():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def listed():
    """The exercises as lines of text."""
    return "".join(f"{n:>2}  {e.title}\n      {e.file}: {', '.join(e.names)}\n      python -m pytest -q {e.tests}\n"
                   for n, e in enumerate(EXERCISES, 1))


def chosen(what):
    """The arguments of the command line, numbers or a file and names -> ([(file, names, test file)], end of the folder's
    name)."""
    if what and all(word.isdecimal() for word in what):
        wrong = [word for word in what if not 1 <= int(word) <= len(EXERCISES)]
        if wrong:
            raise Refused(f"no exercise {wrong[0]}: they go from 1 to {len(EXERCISES)}, see --list")
        numbers = sorted(set(map(int, what)))
        return [EXERCISES[n - 1][1:] for n in numbers], "exercise-" + "-".join(map(str, numbers))
    if len(what) < 2:
        raise Refused("expected the number of an exercise, or a file and the names of functions in it; see --list")
    file, *names = what
    files = [name.as_posix() for name in held()]
    if file not in files or not file.endswith(".py"):
        close = difflib.get_close_matches(file, [name for name in files if name.endswith(".py")], 3)
        raise Refused(f"{file} is no .py file of this repository" + (f": did you mean {', '.join(close)}?" if close else ""))
    tests = [e.tests for e in EXERCISES if e.file == file and set(names) & set(e.names)] + [f"tests/test_{Path(file).stem}.py"]
    return [(file, names, tests[0])], names[0]


def without(text, file, names):
    """A source text without the bodies of these functions."""
    for name in names:
        try:
            text = blanked(text, name)
        except Refused as e:
            raise Refused(f"{file}: {e}") from None
    return text


def failed(folder, tests):
    """The names of the tests in a test file that fail in a copy."""
    try:
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", tests],
                              cwd=folder, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {tests}   # one that runs for ever; as if nothing of it ran
    if done.returncode not in (0, 1, 2):   # passed, failed, cannot be collected
        raise Refused(f"{tests}: {(done.stderr or done.stdout).strip()[-200:]}")
    return set(re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.M))


def grade(file, names, tests, path):
    """A student's file in a fresh copy: how many of the tests that fail without these bodies pass with it. Prints those that do
    not, and returns whether all tests pass."""
    text = Path(path).read_bytes().decode()
    without(text, file, names)   # refused where one of them is not there
    with tempfile.TemporaryDirectory(prefix="grade-") as folder:
        folder = Path(folder) / "copy"
        copied(folder)
        (folder / file).write_bytes(without((ROOT / file).read_bytes().decode(), file, names).encode())
        asked = failed(folder, tests)
        (folder / file).write_bytes(text.encode())
        left = failed(folder, tests)
    wrong = asked & left if tests not in left else asked   # else the file cannot even be imported, or takes for ever
    print("\n".join([f"{len(asked - wrong)} of {len(asked)} tests that ask for it pass",
                     *(f"  not: {one}" for one in sorted(wrong)),
                     *(f"  nor, though it asks for something else: {one}" for one in sorted(left - asked))]))
    return not left


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("what", nargs="*", help="numbers of exercises; or a file and the names of functions in it")
    parser.add_argument("--grade", metavar="FILE", help="run the tests with this file in the repository's place; status 1: not "
                        "all pass")
    parser.add_argument("--to", metavar="FOLDER", help="where the copy goes; a new or empty folder")
    parser.add_argument("--list", action="store_true", help="print the exercises")
    args = parser.parse_args(arguments)
    if args.list:
        print(listed(), end="")
        return True
    work, end = chosen(args.what)
    if args.grade:
        if len(work) > 1:
            raise Refused("--grade: expected one exercise")
        return grade(*work[0], args.grade)
    texts = {file: (ROOT / file).read_bytes().decode() for file, _, _ in work}   # as they are, line ends too
    for file, names, _ in work:
        texts[file] = without(texts[file], file, names)
    folder = Path(args.to) if args.to else ROOT.parent / f"{ROOT.name}-{end}"
    copied(folder)
    for name in TEACHERS:
        (folder / name).unlink(missing_ok=True)
    for file, text in texts.items():
        (folder / file).write_bytes(text.encode())
    for file, names, tests in work:
        print(f"{folder}: a copy in which {file} has to be completed: {', '.join(names)}")
        if (ROOT / tests).is_file():
            print(f"graded by: cd {shlex.quote(str(folder))} && {shlex.quote(sys.executable)} -m pytest -q {tests}")
        else:
            print(f"no test file goes with {file}: grep -rl {Path(file).stem} tests")
    return True


if __name__ == "__main__":
    try:
        sys.exit(0 if main(sys.argv[1:]) else 1)
    except (Refused, OSError, SyntaxError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
