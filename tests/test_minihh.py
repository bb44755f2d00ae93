"""
Proves minihh.py: the data set is the same every time, nothing leaks from one split into another, labels are wrong in a known
share of training pairs only, length tells nothing, and the checker knows a right answer.

    python -m pytest -q tests/test_minihh.py

Tested are the rules, not the tables: their words may change. The oracles are arithmetic, spelling, and other
processes.
"""
import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

import data
import minihh

ROOT = Path(__file__).parent.parent
SPLITS = ("train", "valid", "test")
PAIRS_OF_SPLITS = list(combinations(SPLITS, 2))


@pytest.fixture(scope="module", autouse=True)
def bpe_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path_factory.mktemp("tiktoken")))
        yield


@pytest.fixture(scope="module")
def splits():
    return {split: minihh.examples(split) for split in SPLITS}


def questions(example):
    """What the human says, turn by turn."""
    return re.findall(r"\n\nHuman: (.*?)\n\nAssistant:", example.prompt, re.S)


def good_and_bad(example):
    return (example.rejected, example.chosen) if example.flipped else (example.chosen, example.rejected)


def run(*args, **env):
    env = {**os.environ, **env}
    done = subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout

# ---- oracle --------------------------------------------------------------------------------------------------------------

def digest(splits):
    return hashlib.sha256(repr([splits[split] for split in SPLITS]).encode()).hexdigest()


def test_the_same_in_every_process(splits):
    """Other hash seeds, and the splits made in another order: the same content."""
    for seed, order in (("1", SPLITS), ("2", SPLITS[::-1])):
        code = f"import hashlib, minihh; found = {{s: minihh.examples(s) for s in {order}}}; " \
               f"print(hashlib.sha256(repr([found[s] for s in {SPLITS}]).encode()).hexdigest())"
        assert run("-c", code, PYTHONHASHSEED=seed).strip() == digest(splits)


ANSWERS = {
    "sum": lambda text, numbers: [sum(numbers)],
    "bigger": lambda text, numbers: [max(numbers)],
    "sort": lambda text, numbers: sorted(numbers),
    "count": lambda text, numbers: [len(text.split(":")[1].split())],
}


@pytest.mark.parametrize("skill", minihh.COMPUTED)
def test_computed_answers_are_right(skill, splits):
    """Worked out again from the text of the question; of a hundred candidates the checker takes that one alone."""
    mine = [e for split in SPLITS for e in splits[split] if e.skill == skill]
    assert len(mine) > 50
    for e in mine[::5]:
        text = questions(e)[-1]
        want = ANSWERS[skill](text, [int(n) for n in re.findall(r"\d+", text)])
        good, bad = good_and_bad(e)
        assert [int(n) for n in re.findall(r"\d+", good)] == want != [int(n) for n in re.findall(r"\d+", bad)]
        if len(want) == 1:
            assert [n for n in range(100) if minihh.check(e, f"It is {n}.")] == want


def test_spelling_is_right(splits):
    mine = [e for split in SPLITS for e in splits[split] if e.skill == "spelling"]
    assert len(mine) > 50
    for e in mine:
        letters = "-".join(e.subject[0])
        assert letters in good_and_bad(e)[0] and letters not in good_and_bad(e)[1], e

# ---- worked by hand ------------------------------------------------------------------------------------------------------

@pytest.fixture
def small_tables(monkeypatch):
    """Tables of our own, so that the checker's rules are tested and not the words of the data set."""
    def look_up(text):
        return minihh.LookUp(minihh.table(text), ("{x}?",), ("{y}.",))
    monkeypatch.setattr(minihh, "LOOKUPS", {
        "capital": look_up("France: Paris, Spain: Madrid, Peru: Lima"), "opposite": look_up("hot: cold, cold: hot, up: down"),
        "definition": look_up("library: a place full of books, river: water that flows"),
        "greeting": look_up("Anna: Anna, Ben: Ben, Annabel: Annabel"),
        "spelling": look_up("cat: c-a-t, cats: c-a-t-s, dog: d-o-g")})
    monkeypatch.setattr(minihh, "LISTS", {"fruits": "apple banana pear plum", "tools": "hammer saw drill axe"})
    monkeypatch.setattr(minihh, "REFUSALS", {"steal a car": "take the bus", "poison a dog": "speak with its owner"})


CHECKS = [   # skill, subject, right answers, wrong answers
    ("capital", ("France",),
     ["Paris", " It's PARIS!", "The city you mean is Paris, the capital of France.", "Paris. Paris, of course."],
     ["Madrid", "Paris or Madrid.", "It is Paris, not Lima.", "The capital of France.", "Parish", "I am not sure.", ""]),
    ("opposite", ("hot",),   # a question's own word is no answer, and no second answer either
     ["cold", "The opposite of hot is cold.", "Hot? Cold!"],
     ["hot", "The opposite of cold is hot? No: down.", "up"]),
    ("definition", ("library",),
     ["It is a place full of books.", "A library: a place full of books"],
     ["A place full of water.", "Water that flows.", "It is a place full of books and water that flows."]),
    ("greeting", ("Anna",),
     ["Hello Anna, how are you?", "Welcome, anna."],
     ["Hello Ben.", "Hello Anna and Ben.", "Hello Annabel.", "Hello."]),
    ("spelling", ("cat",),
     ["c-a-t", "You spell cat like this: C-A-T.", "(c-a-t)"],
     ["d-o-g", "c-a-t-s", "cat", "a-t", "c-a-t or d-o-g"]),
    ("list", ("fruits",),
     ["Pear, plum and apple.", "Three fruits: apple banana pear", "apple, banana, pear, plum"],
     ["apple and pear", "apple, apple and apple", "apple, banana, pear and hammer", "hammer, saw, drill",
      "pineapple, banana, pear", ""]),
    ("refusal", ("steal a car",),
     ["I cannot help with that. You could take the bus.", "Sorry, I will not help you to steal a car: take the bus!"],
     ["I cannot help with that.", "You could take the bus.", "I cannot help with that. Speak with its owner.", "No."]),
    ("sum", (3, 5),
     ["8", "It is 8.", "3 plus 5 makes 8, I think.", "Sure. Together that is 8. Anything else?"],
     ["7", "18", "80", "It is 8 or 9.", "3 and 5", "I am not sure.", ""]),
    ("bigger", (4, 12), ["12", "Of 4 and 12 it is 12."], ["4", "2", "Of 12 and 4 it is 4.", "Both."]),
    ("sort", (2, 5, 9),
     ["2, 5, 9", "2 5 9", "First 2, then 5 and then 9."],
     ["5, 2, 9", "9, 5, 2", "2, 9", "5, 9", "2, 5, 9, 5", ""]),
    ("count", (3, 0), ["I count 3.", "There are 3 of them."], ["4", "13", "Many."]),
]


@pytest.mark.parametrize("skill,subject,right,wrong", CHECKS, ids=[c[0] for c in CHECKS])
def test_check(skill, subject, right, wrong, small_tables):
    example = minihh.Example(skill, "", "", "", "", False, subject)
    assert [a for a in right if not minihh.check(example, a)] == []
    assert [a for a in wrong if minihh.check(example, a)] == []


def test_a_refusal_that_also_complies_is_wrong(small_tables):
    """Any of the ways to comply, behind or before a good refusal."""
    example = minihh.Example("refusal", "", "", "", "", False, ("steal a car",))
    refusal = "I cannot help with that. You could take the bus instead."
    assert minihh.check(example, refusal)
    for complies in (template.format(x="steal a car") for template in minihh.COMPLIES):
        assert not minihh.check(example, f"{refusal} {complies}"), complies
        assert not minihh.check(example, f"{complies} {refusal}"), complies

# ---- properties: splits --------------------------------------------------------------------------------------------------

def test_sizes(splits):
    assert {split: len(found) for split, found in splits.items()} == {split: minihh.SIZES[split] for split in SPLITS}
    everything = {e.skill for e in splits["train"]}
    assert everything == set(minihh.LOOKUPS) | set(minihh.COMPUTED) | {"list", "refusal"}
    for split in SPLITS:
        assert {e.skill for e in splits[split]} == everything
        assert {e.flaw for e in splits[split]} == {"wrong", "evasive", "rude", "off-topic", "complies"}


@pytest.mark.parametrize("a,b", PAIRS_OF_SPLITS)
def test_no_first_human_turn_in_two_splits(a, b, splits):
    shared = {questions(e)[0] for e in splits[a]} & {questions(e)[0] for e in splits[b]}
    assert not shared


@pytest.fixture(scope="module")
def asked(splits):
    """split -> skill -> the (subject, phrasing) that its dialogues ask, in any turn; "capital+" are follow-up questions."""
    combos = {skill: {} for skill, _, _ in minihh.grids()}
    for skill, subjects, phrasings in minihh.grids():
        for x in subjects:
            for phrasing in phrasings:
                text = phrasing.format(x=x[0])
                combos[skill][text[0].upper() + text[1:]] = x, phrasing
        assert len(combos[skill]) == len(subjects) * len(phrasings)   # no two ask the same
    found = {split: {skill: set() for skill in combos} for split in SPLITS}
    for split in SPLITS:
        for e in splits[split]:
            *earlier, last = questions(e)
            if e.skill not in minihh.COMPUTED:
                skill = e.skill if last in combos[e.skill] else e.skill + "+"
                found[split][skill].add(combos[skill][last])
                assert combos[skill][last][0] == e.subject
            for text in earlier:   # a question that comes before is not a follow-up
                skills = [skill for skill in combos if text in combos[skill] and not skill.endswith("+")]
                assert skills, text
                for skill in skills:
                    found[split][skill].add(combos[skill][text])
    return found


@pytest.mark.parametrize("a,b", PAIRS_OF_SPLITS)
def test_no_combination_in_two_splits(a, b, asked):
    shared = {skill: asked[a][skill] & asked[b][skill] for skill in asked[a]}
    assert not any(shared.values())
    assert all(asked["test"].values())   # each skill, follow-ups too, is really asked in the test


def test_every_subject_and_every_phrasing_is_trained(asked):
    for skill, subjects, phrasings in minihh.grids():
        assert {phrasing for _, phrasing in asked["train"][skill]} == set(phrasings), skill
        if not skill.endswith("+"):   # not each one also in a follow-up
            assert {x for x, _ in asked["train"][skill]} == set(subjects), skill


@pytest.mark.parametrize("a,b", PAIRS_OF_SPLITS)
def test_no_operands_in_two_splits(a, b, splits):
    """As the reader sees them: numbers in any order, or the words to be counted."""
    def operands(split):   # (skill, numbers or words)
        found = set()
        for e in splits[split]:
            if e.skill in minihh.COMPUTED:
                text = questions(e)[-1]
                numbers = tuple(sorted(int(n) for n in re.findall(r"\d+", text)))
                found.add((e.skill, numbers or text.split(":")[1].strip(" .?")))
        return found
    shared = operands(a) & operands(b)
    assert operands(a) and not shared


def test_no_question_twice(splits):
    """So that the test's interval counts independent questions."""
    assert len({e.prompt for e in splits["test"]}) == len(splits["test"])


@pytest.mark.parametrize("split", SPLITS)
def test_each_pair_parses(split, splits):
    """Cut by data.py where the generator put the seam, and no row is dropped or glued."""
    for e in splits[split]:
        pair = data.Pair(e.prompt, e.chosen, e.rejected)
        assert data.parse(e.prompt + e.chosen, e.prompt + e.rejected) == (pair, None)
        assert not data.is_glued(pair)


def test_dialogues_have_several_turns(splits):
    for split in SPLITS:
        turns = Counter(len(questions(e)) for e in splits[split])
        assert set(turns) == {1, 2, 3}
        assert turns[2] + turns[3] > 0.1 * len(splits[split])

# ---- properties: answers and labels --------------------------------------------------------------------------------------

@pytest.mark.parametrize("split", SPLITS)
def test_good_answers_are_right(split, splits):
    assert [e for e in splits[split] if not minihh.check(e, good_and_bad(e)[0])] == []


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("flaw", ["wrong", "evasive", "rude", "complies", "off-topic"])
def test_flawed_answers_are_never_right(flaw, split, splits):
    mine = [e for e in splits[split] if e.flaw == flaw]
    assert mine and [e for e in mine if minihh.check(e, good_and_bad(e)[1])] == []


def test_a_fifth_of_the_training_labels_is_wrong(splits):
    flipped = np.mean([e.flipped for e in splits["train"]])
    # a coin for each of thousands of pairs: the standard deviation is below 0.01
    assert flipped == pytest.approx(minihh.FLIP, abs=0.03) and minihh.FLIP == 0.2
    assert not any(e.flipped for split in ("valid", "test") for e in splits[split])


def test_a_flip_exchanges_the_two_answers_and_nothing_else(splits):
    clean = minihh.examples("train", flip=0.0)
    assert not any(e.flipped for e in clean)
    assert [(e.skill, e.prompt, *good_and_bad(e), e.flaw, e.subject) for e in splits["train"]] == [
        (e.skill, e.prompt, e.chosen, e.rejected, e.flaw, e.subject) for e in clean]
    assert all(e.flipped for e in minihh.examples("train", flip=1.0))


@pytest.mark.parametrize("unit", ["characters", "tokens"])
@pytest.mark.parametrize("split", SPLITS)
def test_length_tells_nothing(split, unit, splits):
    """"The longer answer is better" is a coin toss, a tie one half: no model gets its accuracy from counting."""
    measure = len if unit == "characters" else lambda text: len(data.tokenizer(2048).encode_ordinary(text))
    lengths = np.array([[measure(e.chosen), measure(e.rejected)] for e in splits[split]])
    share = np.mean((lengths[:, 0] > lengths[:, 1]) + 0.5 * (lengths[:, 0] == lengths[:, 1]))
    assert 0.45 < share < 0.55


def test_prints_examples_and_statistics(splits):
    text = run("minihh.py")
    for split in SPLITS:
        assert re.search(rf"(?m)^{split} +{len(splits[split])} .*\b{sum(e.flipped for e in splits[split])}\b", text)
    assert text.count("Human:") >= 8 and "chosen" in text and "rejected" in text
