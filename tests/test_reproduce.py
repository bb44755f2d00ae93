"""
studies/reproduce.py and what it stands on: ratios, verdicts and tables by hand, the committed results held to the runs that they
come from and RESULTS.md to them, the reports' own commands to the scripts' flags.

    python -m pytest -q tests/test_reproduce.py
"""
import itertools
import json
import math
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import minihh
import plots
import runs
import train_dpo
import train_sft
from studies import gpu, paper_000, paper_001, paper_002, reproduce, trials
from studies.compare import mean_range

HERE = Path(__file__).parent.parent
RESULTS = HERE / reproduce.RESULTS


def run(costs, **series):
    """A run whose evaluations have these costs (samples) and numbers."""
    return {"events": [{"samples": cost, "step": i, **{name: values[i] for name, values in series.items()}}
                       for i, cost in enumerate(costs)]}

# ---- numbers, by hand

def test_speedups_by_hand():
    """The baseline is at 1.0 after 100, the candidate after 50 (both on the straight line between evaluations)."""
    slow = {1: run([0, 100], val_loss=[2.0, 1.0])}
    fast = {1: run([0, 100], val_loss=[2.0, 0.0]), 2: run([0, 100], val_loss=[2.0, 0.0])}   # seed 2 has no partner
    assert trials.speedups(fast, slow) == [2.0] and trials.speedups(slow, fast | slow) == [1.0]
    stuck = {1: run([0, 100], val_loss=[2.0, 3.0])}
    assert trials.speedups(stuck, slow) == [None]
    assert trials.differences(fast, slow, "val_loss") == [-1.0]


def test_accuracy_speedups_and_at_equal_by_hand():
    """To 0.7: the baseline needs 40, the candidate 80. There its KL is 0.2 + (0.4 - 0.2) / 2, and the baseline's 0.1."""
    base = {1: run([0, 40, 80], val_reward_accuracy=[0.5, 0.7, 0.7], val_full_kl=[0.0, 0.1, 0.9])}
    other = {1: run([0, 60, 100], val_reward_accuracy=[0.5, 0.6, 0.8], val_full_kl=[0.0, 0.2, 0.4])}
    assert trials.accuracy_speedups(other, base) == pytest.approx([0.5])
    assert trials.at_equal(other, base, "val_full_kl") == pytest.approx([3.0])
    flat = {1: run([0, 60], val_reward_accuracy=[0.5, 0.5], val_full_kl=[0.0, 0.1])}   # never above its start
    assert trials.at_equal(flat, base, "val_full_kl") == [None]


@pytest.mark.parametrize("values, claimed, none, expected", [
    ([1.5, 1.6, 1.9], 2, 1, "reproduced"),          # median 1.6: log 1.6 / log 2 = 0.68
    ([1.2, 1.3, 1.4], 2, 1, "partly"),              # all above 1, 0.38 of the way
    ([1.01, 1.02, 1.03], 2, 1, "not reproduced"),   # all above 1, a 35th of the way
    ([0.9, 1.6, 1.9], 2, 1, "partly"),              # one seed on the other side
    ([0.9, 1.1, 1.2], 2, 1, "not reproduced"),
    ([0.4, 0.5, 0.6], 0.5, 1, "reproduced"),        # a ratio below 1
    ([1.4, 1.5], 0.5, 1, "not reproduced"),
    ([0.2, 0.1], 0.18, 0, "reproduced"),            # a difference
    ([-0.2, 0.1], 0.18, 0, "not reproduced"),
    ([None, None], 2, 1, "not reproduced"),
    ([None, 1.5, 1.6], 2, 1, "partly"),             # a seed that never gets there is on the other side
    ([None, None, 1.6], 2, 1, "not reproduced"),
    ([None, 4.0], 2, 1, "not reproduced"),          # the median of one that never gets there and another is no median
    ([5.0, 6.0], 2, 1, "reproduced")])              # 2.4 times the way and more
def test_verdicts_by_hand(values, claimed, none, expected):
    assert trials.verdict(values, claimed, none) == expected


def test_a_verdict_may_know_too_much():
    assert [trials.verdict([3.7], claimed, none=0, at_most=2) for claimed in (1.5, 1.9)] == ["partly", "reproduced"]


def test_two_protocols_that_differ_are_partly():
    assert trials.two_verdicts([2.0, 1.9], [1.9, 1.8]) == "reproduced" and trials.two_verdicts([2.0], [1.0]) == "partly"
    assert trials.two_verdicts([1.0], [0.9]) == "not reproduced"


def test_a_run_that_diverged_is_the_worst():
    lost = {1: run([0, 100], val_loss=[2.0, 0.1]) | {"diverged": "at step 3"}}
    whole = {1: run([0, 100], val_loss=[2.0, 1.0])}
    assert trials.lasts(lost, "val_loss") == [math.inf]
    assert trials.speedups(lost, whole) == trials.speedups(whole, lost) == [None]
    assert trials.differences(lost, whole, "val_loss") == [math.inf]


def test_what_the_items_count_by_hand():
    """Of two rises of the accuracy one comes without a fall of the loss; the last quarter against the third; two checkpoints
    against two."""
    found = run(range(4), val_reward_accuracy=[0.5, 0.6, 0.7, 0.6], val_dpo_loss=[0.7, 0.6, 0.6, 0.5])
    assert paper_000.rises_without_a_fall(found) == (1, 2)
    found = run(range(9), val_loss=[9, 9, 9, 9, 1, 3, 4, 5, 6], train_eval_loss=[9, 9, 9, 9, 4, 2, 1, 1, 1])
    assert paper_002.last_quarter(found) == (5 - 2, 1 - 3)
    judged = {str(i): {"reward, sampled": x} for i, x in enumerate([9, 9, 9, 9, 1, 3, 7, 9, 5])}   # 0: the start
    assert paper_002.second_half(judged) == (9 + 5) / 2 - (1 + 3) / 2


def test_a_verdict_does_not_improve_as_the_figures_get_worse():
    order = ["reproduced", "partly", "not reproduced"]
    for a, b in itertools.combinations([0.5, 0.9, 1.05, 1.2, 1.45, 1.8, 2.5], 2):
        for rest in ([1.3, 1.6], [0.8, 1.1], [2.0, 2.1]):
            assert order.index(trials.verdict([a, *rest], 2)) >= order.index(trials.verdict([b, *rest], 2))


def test_holds_by_hand():
    found = [trials.holds(x) for x in ([1, 1], [1, 1, 0], [1, 0], [0])]
    assert found == ["reproduced", "partly", "not reproduced", "not reproduced"]
    assert trials.holds([True] * 9 + [False], 0.9) == "reproduced" and trials.holds([True] * 19 + [False]) == "partly"
    assert mean_range([0.1, -0.1, 0.3]) == "+0.100 [-0.100, +0.300]"


def test_curves_by_hand():
    """Mean and range over the seeds that did not diverge; the label counts those that did."""
    _, (axis,) = plots.canvas()
    lost = run([0, 8], val_loss=[9.0, 9.0]) | {"diverged": "at step 3"}
    trials.curves(axis, {"adamw": {1: run([0, 8], val_loss=[3.0, 1.0]), 2: run([0, 8], val_loss=[5.0, 2.0]), 3: lost}},
                  "samples", "val_loss")
    line, = axis.lines
    assert line.get_label() == "adamw (n = 2, 1 diverged)" and line.get_xydata().tolist() == [[0, 4.0], [8, 1.5]]
    seen = {tuple(place) for place in axis.collections[0].get_paths()[0].vertices.tolist()}
    assert seen == {(0, 3.0), (8, 1.0), (0, 5.0), (8, 2.0)}


def test_the_files_of_the_runs(tmp_path, monkeypatch):
    """Pairs, and every dialogue with either response as plain text; no refusal among the helpful ones."""
    monkeypatch.setattr(trials, "HERE", tmp_path)
    trials.write_data(few=40)
    folder = tmp_path / trials.RUNS / "quick"
    rows = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")}
    assert sorted(rows) == ["few", "helpful", "helpful-test", "helpful-valid", "test", "train", "valid"]
    refusals = {e.prompt + e.chosen for split in ("train", "valid", "test") for e in minihh.examples(split)
                if e.skill == "refusal"}
    for name, found in rows.items():
        asked = sum(row["chosen"] in refusals for row in found)
        assert len(found) == 40 and (asked == 0 if "helpful" in name else asked > 0)
        assert (folder / f"{name}.txt").read_text() == "".join(row["chosen"] + row["rejected"] for row in found) + "\n"

# ---- a comparison: rates from valid, figures from test

class FakeLab:
    """Answers as if every run of a method ended at its distance from the method's best rate."""
    quick = False

    def __init__(self, best):
        self.best, self.asked = best, []

    def made(self, name, script, *flags):
        flags = list(map(str, flags))
        value = {flag: flags[flags.index(flag) + 1] for flag in ("--lr", "--seed", "--data", "--optimizer")}
        self.asked.append((name, value))
        loss = abs(math.log(float(value["--lr"]) / self.best[value["--optimizer"]])) + 0.01 * int(value["--seed"])
        return run([0, 1], val_loss=[9.0, loss])

    def map(self, function, jobs):
        return [function(*job) for job in jobs]


def test_every_method_gets_the_rate_that_is_best_on_valid_and_is_read_on_test():
    comparison = trials.Comparison("x", "train_sft.py", ["--flag", 1], {
        "a": (0, ["--optimizer", "adamw"]), "b, two": (-4, ["--optimizer", "lion"])}, tuning=["--short", 1])
    lab = FakeLab({"adamw": 0.003, "lion": 0.000593})   # lattice: powers 0 and -4
    rates, found = comparison.own(lab, 2)
    assert rates == {"a": 0.003, "b, two": 0.000593}
    assert {label: sorted(seeds) for label, seeds in found.items()} == {"a": [1, 2], "b, two": [1, 2]}
    assert trials.lasts(found["a"], "val_loss") == pytest.approx([0.01, 0.02])
    for name, value in lab.asked:
        split = name.split("/")[1]
        assert value["--data"] == f"runs/reproduce/train.jsonl,runs/reproduce/{split}.jsonl"
        assert split == "test" or value["--seed"] == "1"   # one seed tunes
    tried = [sorted(float(value["--lr"]) for name, value in lab.asked if f"/valid/{slug}-" in name) for slug in ("a", "b-two")]
    assert len(tried[0]) == len(tried[1]) == 5   # the same budget, and no coarser than 1.5 around the best
    assert all(b / a == pytest.approx(1.5, rel=0.01) for rates in tried for a, b in zip(rates, rates[1:]))


@pytest.mark.parametrize("task, script, micro_batches", [("SFT", train_sft, 600), ("DPO", train_dpo, 416)])
def test_every_period_reads_as_many_examples(task, script, micro_batches):
    for k in paper_001.PERIODS:
        comparison = paper_001.by_period(task, k)
        for label, optimizer in zip(comparison.methods, ("adamw", "adamw-pma", "adamw-noaccum"), strict=True):
            _, _, *flags = comparison._replace(start=None).command(FakeLab({}), label, 1e-3, 1)
            cfg = runs.parse(script.Config, list(map(str, flags)))
            assert (cfg.optimizer, cfg.accumulate, cfg.micro_batch) == (optimizer, k, 4)
            assert 0 <= cfg.steps * k - micro_batches < k and cfg.steps // cfg.eval_every >= 13
            assert 32 <= cfg.warmup * k <= 40


def test_what_followed_found_is_kept_by_label_and_seed():
    jobs = [(None, None, label, 1e-3, seed, 8) for seed in (1, 2) for label in "ab"]
    assert paper_002.by_label(jobs, [1, 2, 3, 4]) == {"a": {1: 1, 2: 3}, "b": {1: 2, 2: 4}}


def test_a_start_is_made_when_something_that_is_not_there_asks_for_it(tmp_path, monkeypatch):
    """Once, before what begins with it, and its own start before it. What is there already asks for nothing."""
    lab, made = trials.Trials(tmp_path), []
    monkeypatch.setattr(lab, "weights", lambda name, *_: made.append(name) or {"events": []})
    monkeypatch.setattr(lab, "run", lambda name, *_: made.append(name) or {"events": []})
    first = lab.trained("first", "train_sft.py", "--seed", 1)
    second = lab.trained("second", "train_sft.py", "--init", first)
    lab.trained("other", "train_sft.py")
    assert not made and second == "runs/reproduce/second"
    lab.found["there"] = {"events": []}
    lab.made("there", "train_dpo.py", "--init", second)
    assert made == ["there"]
    lab.made("new", "train_dpo.py", "--init", f"{second}/best.pt")
    lab.made("newer", "train_dpo.py", "--init", second)
    assert made == ["there", "first", "second", "new", "newer"]
    monkeypatch.setattr(lab, "weights", lambda *_: None)   # the time is up
    with pytest.raises(trials.TimeUp):
        lab.made("newest", "train_dpo.py", "--init", lab.trained("third", "train_sft.py"))

# ---- theory, from other sides

def test_what_a_constant_gradient_moves():
    """With a gradient of 1 both corrected moments are 1 at the end of a period and the step at tau is about lr / sqrt(tau + 1)
    (FORMULAS.md, section 7); K = 1 is torch's AdamW."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    oracle = torch.optim.AdamW([weight], lr=1e-3, betas=paper_001.BETAS, weight_decay=0)
    for _ in range(5):
        weight.grad = torch.ones_like(weight)
        oracle.step()
    assert sum(paper_001.periods_moved(1, 5)) == pytest.approx(-weight.item() / 1e-3, rel=1e-6)
    for k in (4, 16):
        steps = sum(j ** -0.5 for j in range(1, k + 1))
        assert paper_001.periods_moved(k, 40)[-1] == pytest.approx(steps, rel=0.1)
        assert paper_001.periods_moved(k, 40)[-1] > paper_001.periods_moved(k, 40)[2] * 0.9   # it does not go to 0

# ---- the reports' own commands

def test_every_gpu_command_names_flags_that_its_script_has():
    for command in {command for commands in gpu.RECIPES.values() for command in commands}:
        script, *words = shlex.split(command)
        module = __import__(script.removesuffix(".py"))
        assert runs.parse(module.Config, words).out.startswith("runs/gpu-")
    assert set(gpu.RECIPES) <= set(reproduce.ITEMS)
    commands = {command for found in gpu.RECIPES.values() for command in found}
    assert len({command.split("--out ")[1] for command in commands}) == len(commands)   # one command, one folder
    without = set(reproduce.ITEMS) - set(gpu.RECIPES)
    assert without == {"001-fig2", "001-theory", "real"}


def test_gpu_commands_are_run_each_once_and_go_on(tmp_path, monkeypatch, capsys):
    """The same command in two items. Called again, a run that has ended has nothing to do; a command that fails ends it in one
    line."""
    short = "train_sft.py --steps 2 --warmup 0 --micro-batch 2 --eval-every 2 --eval-samples 4 --eval-answers 0 --out"
    one, file = f"{short} {tmp_path}/one", tmp_path / "one/last.pt"
    monkeypatch.setattr(gpu, "RECIPES", {"000-fig1": [one], "000-fig7": [one]})
    monkeypatch.setattr(gpu, "estimate", lambda command: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gpu.show(["000-fig1", "000-fig7"], True)
    assert capsys.readouterr().out.count("# as above: --out ") == 1
    before = file.read_bytes()
    gpu.show(["000-fig7"], True)
    assert file.read_bytes() == before
    monkeypatch.setattr(gpu, "RECIPES", {"000-fig1": [f"{short} {tmp_path}/three --lr nothing"]})
    with pytest.raises(gpu.InputError, match="train_sft.py ended with status 2; what is done is kept, and the same call goes on"):
        gpu.show(["000-fig1"], True)


def test_estimates_by_hand():
    """DPO of gpt2-medium, 300 steps of 2,048 pairs of 140 + 64 + 64 tokens: 6 (302 M matrices x 268 + 51 M head x 128) FLOPs each
    and attention's; and a batch of 1 is bound by the number of passes."""
    peak, seconds = gpu.estimate(gpu.RECIPES["000-fig5-6"][1])
    products = 6 * (302e6 * 268 + 51.5e6 * 128)
    assert seconds == pytest.approx(300 * 2048 * products / gpu.SPEED, rel=0.1) or seconds == 300 * 512 * gpu.LATENCY
    assert 6e9 < peak < 16e9
    _, seconds = gpu.estimate(gpu.RECIPES["002-fig1-2"][0])
    assert seconds == 80_000 * gpu.LATENCY
    assert gpu.estimate(gpu.RECIPES["000-table1"][1]) is None   # no training

# ---- what is committed

def test_a_table_by_hand(tmp_path):
    (tmp_path / "000-fig1.json").write_text(json.dumps({
        "setting": "here", "seeds": 3, "command": "python -m x", "pictures": ["results/a.png"],
        "claims": [{"says": "a", "found": "1.0", "verdict": "partly", "brief": ""},
                   {"says": "b", "found": "2", "verdict": "partly", "brief": "two"}]}))
    lines = reproduce.table(tmp_path).splitlines()
    assert lines[2] == "| 000-fig1 | a | 1.0 | **partly** | here; n = 3. `python -m x` [a.png](results/a.png) |"
    assert lines[3] == "| 000-fig1 | b | 2 | **partly** | as above |"
    assert reproduce.short(tmp_path).splitlines()[2:] == ["| 000-fig1 | b | two | **partly** |"]
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- claims -->\nold\n<!-- /claims -->\nbelow\n")
    reproduce.write_table(page, "new\n", "claims")
    assert page.read_text() == "above\n<!-- claims -->\nnew\n<!-- /claims -->\nbelow\n"


@pytest.mark.parametrize("name", reproduce.ITEMS)
def test_committed_results_follow_from_the_committed_runs(name, tmp_path):
    """Every item is there, with claims, verdicts and pictures, and is what the kept runs say: nothing is trained here."""
    kept = json.loads((RESULTS / f"{name}.json").read_text())
    lab = trials.Trials(reproduce.RESULTS)
    lab.stop.set()
    found = reproduce.ITEMS[name].work(lab, reproduce.ITEMS[name].seeds)
    assert [c._asdict() for c in found.claims] == kept["claims"] and found.setting == kept["setting"]
    assert all(claim.verdict in trials.VERDICTS for claim in found.claims)
    assert all((HERE / path).is_file() for path in kept["pictures"])
    assert (kept["title"], kept["seeds"]) == (reproduce.ITEMS[name].title, reproduce.ITEMS[name].seeds)


def test_an_item_says_how_it_is_called(tmp_path):
    for name, command in (("real", "python -m studies.reproduce real --hh FOLDER"),
                          ("002-lr", "python -m studies.reproduce 002-lr")):
        reproduce.save(SimpleNamespace(file=tmp_path / "runs.jsonl"), name, 2, trials.Found("here", [], pictures=("a.png",)))
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert (found["command"], found["seeds"], found["pictures"]) == (command, 2, ["a.png"])


def test_results_md_and_readme_show_what_is_committed():
    assert reproduce.table(RESULTS) in (HERE / "RESULTS.md").read_text()
    assert reproduce.short(RESULTS) in (HERE / "README.md").read_text()

# ---- the program

def test_program(tmp_path, monkeypatch, capsys):
    def called(*words):
        monkeypatch.setattr(sys, "argv", ["studies.reproduce", *words])
        try:
            runs.one_line(reproduce.main)
            status = 0
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()
    status, out, _ = called("--list")
    assert status == 0 and all(re.search(rf"^{name} ", out, re.M) for name in reproduce.ITEMS)
    status, out, error = called("000-fig9")
    assert status == 2 and not out and error.count("\n") == 1
    assert error.startswith("error: no item '000-fig9': expected all or 000-fig1")
    assert called("001-theory", "--minutes", "0") == (2, "", "error: --minutes: expected a number above 0, found 0.0\n")
    assert called("001-theory", "--run")[::2] == (2, "error: --run goes with --scale gpu; without it, an item is run anyway\n")
    status, _, _ = called("000-fig2-4", "--report", "--seeds", "2", "--results", str(tmp_path))   # it trains nothing: five seeds
    assert status == 0 and json.loads((tmp_path / "000-fig2-4.json").read_text())["seeds"] == 5
    status, out, _ = called("001-theory", "--report", "--results", str(tmp_path))
    assert status == 0 and "2.24 at t = 1" in out and (tmp_path / "001-theory.png").is_file()
    assert json.loads((tmp_path / "001-theory.json").read_text())["seeds"] == 1
    status, out, _ = called("002-lr", "--report", "--results", str(tmp_path))
    assert status == 0 and out == "002-lr: not all runs are there yet\n"
    status, out, _ = called("000-fig5-6", "--scale", "gpu")
    assert status == 0 and "python train_dpo.py --init runs/gpu-sft" in out and "about 8 GB, " in out
