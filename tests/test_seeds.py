"""
studies/seeds.py: which runs it asks for, what it keeps of a judgement, and its tables.

    python -m pytest -q tests/test_seeds.py

Runs and judgements are made up here; the scripts and the keeping of runs have their own tests.
"""
import json
import subprocess

import pytest

import minihh
from files import InputError
from studies import seeds as study
from studies.lab import HERE


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    return study.new_lab(tmp_path)


def scores(models, seed):
    """What eval_reward.py writes: with seed s, SFT has s hundredths right, DPO 0.1 more when it is sampled; all rewards are 0."""
    rows = {}
    for i, path in enumerate(models):
        right = seed / 100 + 0.1 * (i == 1)
        rows[path] = {"greedy": {"right": seed / 100, "reward": 0.0}, "temperature 1": {"right": right, "reward": 0.0},
                      **({"pairs": {"accuracy": 0.9, "init_logp_accuracy": 0.8}} if i else {})}
    groups = {"look-up": 0.5, "refusal": 0.6, "chat": 0.7, "computed": 0.8}
    return {"judge": {"accuracy": seed / 10, "by_group": groups, "by_flaw": {"wrong": 0.25}}, "models": rows}


def generations(models):
    """Of four sampled answers of each model one is evasive; of DPO's none, and a greedy one does not count."""
    texts = ["It is rain.", f"Hm. {minihh.EVASIVE[0]}", "It is 4.", "Yes."]
    return [{"model": path, "mode": mode, "answer": texts[0] if i == 1 and mode != "greedy" else text}
            for i, path in enumerate(models) for mode, said in (("greedy", [minihh.RUDE[0]]), ("temperature 1", texts))
            for text in said]


def made_up(self, name, script, *flags):
    return self.found.setdefault(name, {"command": [script, *flags], "events": [
        {"policy_entropy": 0.4, "val_full_kl": 0.00123, "regularizer": 0.5}]})


def test_all_runs_of_the_study(lab, monkeypatch):
    """Each seed: SFT, both reward models, five ways from it, and one judgement by either model; the test asks for the last
    checkpoint of each way and SFT's best. Again, nothing is judged twice."""
    asked = []
    monkeypatch.setattr(study.Lab, "weights", made_up)

    def run(command, **_):
        flags = dict(zip(command[2::2], command[3::2]))
        models, seed = flags["--models"].split(","), int(flags["--judge"][-1])
        asked.append((flags["--judge"].rpartition("/")[2], models))
        out = HERE / flags["--out"]
        out.mkdir(parents=True)
        (out / "scores.json").write_text(json.dumps(scores(models, seed)))
        (out / "generations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in generations(models)))
        return subprocess.CompletedProcess(command, 0, "", "")
    monkeypatch.setattr(subprocess, "run", run)
    study.work(lab)
    trained = {name: run for name, run in lab.found.items() if not name.startswith("judged/")}
    assert len(trained) == 5 * 8 and sorted(judge for judge, _ in asked) == sorted(
        f"{head}-s{seed}" for head in ("hidden", "likelihood") for seed in range(1, 6))
    for judge, models in asked:
        seed = judge[-1]
        assert [path.removeprefix(f"{study.RUNS}/") for path in models] == [
            f"sft-s{seed}/best.pt", *(f"{way}-s{seed}/step-125.pt" for way in (
                "dpo", "cdpo-gamma-1", "cdpo-gamma-10", "cdpo-gamma-100", "dpo-large-step"))]
    for name, found in trained.items():
        script, *flags = found["command"]
        flags = dict(zip(flags[::2], flags[1::2]))
        assert f"-s{flags['--seed']}" == name[-3:] and (name.startswith("sft") or flags["--init"].endswith(f"sft-s{name[-1]}"))
        assert flags.get("--head") == (name[:-3] if script == "train_reward.py" else None)
        assert flags.get("--gamma") == {"cdpo-gamma-10": 10, "cdpo-gamma-100": 100}.get(name[:-3])
        assert (flags.get("--lr"), flags.get("--beta")) == ((3e-4, 0.1) if "large" in name else (None, None))
    assert lab.found["judged/hidden-s4"]["SFT"]["rude or evasive, sampled"] == 0.25
    assert lab.found["judged/hidden-s4"]["SFT"]["log-probability accuracy"] == 0.8
    monkeypatch.setattr(study.Lab, "weights", None)   # on another machine, which has no weights
    study.work(study.new_lab(lab.file.parent))
    assert len(asked) == 10


def test_a_judgement_that_fails_is_told(lab, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 2, "", "error: no model\n"))
    with pytest.raises(InputError, match="judged-hidden-s2: error: no model"):
        study.judge(lab, 2, "hidden")
    lab.stop.set()
    assert study.judge(lab, 2, "hidden") is None and not lab.found


def test_report_by_hand(lab, monkeypatch, capsys, drawn):
    study.report(lab)
    assert "nothing is judged yet" in capsys.readouterr().out
    monkeypatch.setattr(study.Lab, "weights", made_up)
    paths = {name: f"{name}.pt" for name in ("SFT", *study.WAYS)}
    for seed in (1, 2, 4):
        study.train(lab, seed)
        for head in study.HEADS:
            found = study.summary(scores(list(paths.values()), seed), generations(paths.values()), paths)
            lab.keep(f"judged/{head}-s{seed}", found)
    capsys.readouterr()
    study.report(lab)
    text = capsys.readouterr().out
    assert text.startswith("3 seeds") and text == (lab.file.parent / "tables.md").read_text() + "\n"
    assert "| SFT |  | 0.020 [0.010, 0.040] |  | 0.020 [0.010, 0.040] |  |" in text
    assert ("| DPO | 0.900 [0.900, 0.900] | 0.020 [0.010, 0.040] | +0.000 [+0.000, +0.000] | 0.120 [0.110, 0.140] | "
            "+0.100 [+0.100, +0.100] |") in text
    assert "| DPO | +0.100 [+0.100, +0.100] | -0.250 [-0.250, -0.250] | +0.000 [+0.000, +0.000] | +0.000 [+0.000" in text
    truth, likelihood, hidden = drawn[-1].axes   # DPO's three seeds and their mean; rewards do not change
    assert truth.lines[1].get_ydata() == pytest.approx([0.1] * 3) and truth.lines[2].get_ydata() == pytest.approx([0.1])
    assert not any(y for axis in (likelihood, hidden) for line in axis.lines for y in line.get_ydata())
    assert (lab.file.parent / "judges.png").read_bytes().startswith(b"\x89PNG")
    assert "| CDPO, gamma 1 | 0.400 [0.400, 0.400] | 0.0012 [0.0012, 0.0012] | 0.500 [0.500, 0.500] |" in text
    assert ("| `hidden` | 0.500 [0.500, 0.500] | 0.600 [0.600, 0.600] | 0.700 [0.700, 0.700] | 0.800 [0.800, 0.800] | "
            "0.200 [0.100, 0.400] | 0.250 [0.250, 0.250] |") in text


def test_the_results_have_the_measured_tables():
    results, lab = (HERE / "RESULTS.md").read_text(), study.new_lab("results/seeds")
    for part in (study.answers, study.judges, study.distances, study.heads):
        assert "\n".join(part(lab)) in results, part.__name__
