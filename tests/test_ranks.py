"""
studies/ranks.py: which runs it asks for, what it counts, how it judges, and its tables.

    python -m pytest -q tests/test_ranks.py

The runs themselves are tested with the scripts, the search and the runs' keeping in tests/test_lab.py; here they are made up.
"""
import json
import math

import pytest
import torch

import data
import minihh
import model as gpt
from files import write_checkpoint
from studies import ranks as study
from studies.lab import HERE


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return study.new_lab(tmp_path)


def made_up(loss):
    """A finished run, whose loss is lowest in the middle."""
    events = [{"step": 50 * i, "samples": 800 * i, "seconds": 1.0 * i, "train_eval_loss": y, "val_loss": y, "val_dpo_loss": y,
               "val_logp_accuracy": 0.75, "val_reward_accuracy": 0.75} for i, y in enumerate((loss + 1, loss, loss + 0.5))]
    return {"flags": {}, "events": events, "command": []}


# ---- oracle

def test_the_judges_loss_equals_a_plain_one_over_full_logits(lab, tmp_path, monkeypatch):
    """Cross-entropy of full logits over the responses of the first test examples, one at a time."""
    examples = minihh.examples("test")[:6]
    monkeypatch.setattr(study.minihh, "examples", lambda split: examples if split == "test" else None)
    torch.manual_seed(3)
    model = gpt.load("mini")
    write_checkpoint(tmp_path / "model.pt", {"model": model.state_dict(), "model_config": vars(model.config)})
    encoding, nll, scored, won = data.tokenizer(2048), 0.0, 0, []
    for e in examples:
        sums = []
        for text in (e.chosen, e.rejected):
            prompt, answer = encoding.encode(e.prompt), [*encoding.encode(text), 2047]
            logp = model(torch.tensor([prompt + answer])).log_softmax(-1)[0, len(prompt) - 1:-1]
            sums.append(logp[range(len(answer)), answer].sum().item())
        nll, scored = nll - sums[0], scored + len(encoding.encode(e.chosen)) + 1
        won.append(sums[0] > sums[1])
    found = study.judge("sft", tmp_path / "model.pt", None)
    assert found == {"loss": pytest.approx(nll / scored, rel=1e-5), "accuracy": pytest.approx(sum(won) / 6), "right": 0.0}
    found = study.judge("dpo", tmp_path / "model.pt", tmp_path / "model.pt")
    assert found == {"loss": pytest.approx(math.log(2), abs=1e-6), "accuracy": 0.5, "right": 0.0}
    monkeypatch.setattr(study.minihh, "check", lambda example, text: example is examples[0] and "<|endoftext|>" not in text)
    assert study.judge("sft", tmp_path / "model.pt", None)["right"] == 1 / 6


# ---- by hand

def test_counted_shares_by_hand():
    """gpt2-medium, bias none, trains 24 layers * r * (4096 + 2048 + 5120 + 5120) = 393,216 r: 0.111 % at 1 to 1.742 % at 16."""
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in study.shares()}
    for rank, share in ((1, "0.111"), (2, "0.221"), (8, "0.879"), (16, "1.742")):
        assert lines[f"r{rank}-none"][7:9] == [f"{393_216 * rank:,}", share]
    assert lines["full"][7:] == ["354,823,168", "100.000", "2,838.59 |"]
    assert lines["r8-lora_only"][7] == f"{8 * 393_216 + 24 * 9 * 1024:,}"   # biases: 3 C, C, 4 C, C a layer
    assert lines["r8-all"][7] == f"{8 * 393_216 + 24 * 11 * 1024 + 1024:,}"  # and C in each of 49 LayerNorms


def test_the_results_have_the_counted_table():
    assert "\n".join(study.shares()[2:]) in (HERE / "RESULTS.md").read_text()


def test_all_runs_of_the_study(lab, monkeypatch):
    """Five starts; on every configuration a grid with seed 1, then five seeds at the best rate, each judged once on test. The
    lowest loss on the way decides."""
    asked, judged = [], []

    def run(self, name, script, *flags):
        asked.append(name)
        if "/" in name:
            flags = dict(zip(flags[::2], flags[1::2]))
            assert flags["--half"] == "preference" and flags["--eval-samples"] == 400 and flags["--eval-answers"] == 0
            assert flags["--init"] == f"{study.RUNS}/start-s{flags['--seed']}" and name.endswith(f"-s{flags['--seed']}")
            rank, bias = flags.get("--lora-rank", 0), flags.get("--lora-bias", "all")
            assert name == f"{name[:3]}/{study.label(rank, bias)}-{flags['--lr']:g}-s{flags['--seed']}"
            assert script == f"train_{name[:3]}.py"
            task = study.TASKS[name[:3]]
            best = study.rate(task.adapters if rank else task.full)
            found = made_up(1 + abs(math.log(flags["--lr"] / best)))
        else:
            assert dict(zip(flags[::2], flags[1::2]))["--half"] == "sft"
            found = made_up(1)
        self.found[name] = found
        return found
    monkeypatch.setattr(study.Lab, "run", run)
    monkeypatch.setattr(study, "judge", lambda *arguments: judged.append(arguments) or {"loss": 1.0})
    study.work(lab)
    assert sorted(asked[:5]) == [f"start-s{seed}" for seed in range(1, 6)]
    names = {name for name in asked if "/" in name}
    for task, count in (("sft", 14), ("dpo", 7)):
        assert len(study.TASKS[task].configurations) == count
        for rank, bias in study.TASKS[task].configurations:
            mine = {name for name in names if name.startswith(f"{task}/{study.label(rank, bias)}-")}
            assert sum(name.endswith("-s1") for name in mine) == 5 and len(mine) == 9   # the middle, its neighbours, two outside
    assert len(judged) == 5 * (14 + 7 + 2)
    assert {arguments[0] for arguments in judged} == {"sft", "dpo"} and all(
        str(where).endswith(f"start-s{str(folder)[-1]}") for _, folder, where in judged)
    study.work(study.new_lab(lab.file.parent))   # what is judged is not judged again
    assert len(judged) == 5 * (14 + 7 + 2)


def test_report_by_hand(lab, monkeypatch, capsys, drawn):
    """Full ends at 0.5 + seed / 100, adapters at twice that, training all biases takes 0.1 off."""
    def run(self, name, script, *flags):
        if "/" not in name:
            return made_up(1)
        task, flags = study.TASKS[name[:3]], dict(zip(flags[::2], flags[1::2]))
        return self.found.setdefault(name, made_up(1 + abs(math.log(flags["--lr"] / study.rate(
            task.adapters if "--lora-rank" in flags else task.full)))))
    monkeypatch.setattr(study.Lab, "run", run)

    def judge(task, folder, start):
        loss, name = 0.5 + int(str(folder)[-1]) / 100, folder.name
        return {"loss": (loss if name.startswith("full") else 2 * loss) - 0.1 * ("-all" in name), "accuracy": 0.75, "right": 0.5}
    monkeypatch.setattr(study, "judge", judge)
    study.work(lab)
    made_of = (("full", 4, [3, 6, 9], 8e9), ("rank 1, bias none", 1, [2, 2, 2], 2e9), ("rank 1, bias all", 2, [1, 1, 1], 1e9))
    sides = {name: [{"trainable": trains, "parameters": 4, "seconds": [s], "peak_bytes": peak} for s in seconds]
             for name, trains, seconds, peak in made_of}
    sft = {"what": "lora", "model": "gpt2", "machine": "abacus", "found": sides}
    for found in (sft, {"what": "lora-dpo"}):   # the second is not drawn
        (lab.file.parent / f"cost-{found['what']}.json").write_text(json.dumps(found))
    capsys.readouterr()
    study.report(lab)
    text = capsys.readouterr().out
    assert text == (lab.file.parent / "tables.md").read_text() + "\n"
    for line in ("| full | 0.000395: 1.8112, 0.000593: 1.4049, **0.000889: 1.0000**, 0.00133: 1.4028, 0.002: 1.8108 |",
                 "| full | 0.000889 | 5 | 0.530 [0.510, 0.550] | 0.750 [0.750, 0.750] | 0.500 [0.500, 0.500] |  |  |  |",
                 "| start |  | 5 | 1.060 [1.020, 1.100] | 0.750 [0.750, 0.750] | 0.500 [0.500, 0.500] |  |  |  |",
                 "| r8-none | 0.0045 | 5 | 1.060 [1.020, 1.100] | 0.750 [0.750, 0.750] | 0.500 [0.500, 0.500] | "
                 "0.00 [0.00, 0.00] | +0.5300 [+0.5100, +0.5500] |  |",
                 "| r8-all | 0.00133 | 5 | 0.960 [0.920, 1.000] | 0.750 [0.750, 0.750] | 0.500 [0.500, 0.500] | "
                 "0.19 [0.18, 0.20] | +0.4300 [+0.4100, +0.4500] | -0.1000 [-0.1000, -0.1000] |"):
        assert line in text, line
    assert text.count("| r8-lora_only |") == 5   # the shares; in both tasks a row of rates and one of results
    for name in ("sft", "dpo", "answers", "cost"):
        assert (lab.file.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    memory, trains, speed = drawn[-1].axes   # of full and of rank 1 with bias none
    assert [[bar.get_height() for bar in axis.patches] for axis in (memory, trains, speed)] == [[8, 2], [100, 25], [1, 3]]
    assert [line.tolist() for line in speed.collections[0].get_segments()][1] == [[1, 1.5], [1, 4.5]]


# ---- a property

def test_an_unfinished_study_reports_what_it_has(lab, capsys):
    study.report(lab)
    text = capsys.readouterr().out
    assert text.startswith("0 runs and judgements are done.") and "DPO: the learning rates of full, r1-none, r2-none" in text
    lab.found["start-s1"] = made_up(1)
    study.report(lab)
    assert capsys.readouterr().out.startswith("1 runs")


def test_a_run_whose_weights_are_gone_is_made_again_before_it_is_judged(lab, monkeypatch):
    """A crash between the end of a run and its judgement, then another machine."""
    name = "sft/full-0.001-s1"
    lab.found[name], made = made_up(1), []

    def run(self, name, script, *flags):
        made.append(name not in self.found)
        return made_up(1)
    monkeypatch.setattr(study.Lab, "run", run)
    monkeypatch.setattr(study, "judge", lambda *arguments: {"loss": 1.0})
    study.final(lab, "sft", 0, "all", 0.001, 1)
    assert made == [True] and lab.found[f"test/{name}"] == {"loss": 1.0}
