"""
studies/optimizers.py: which runs it asks for, what decides a learning rate, and the tables.

    python -m pytest -q tests/test_optimizers_study.py

The runs themselves are tested with the scripts, the search and the runs' keeping in tests/test_lab.py; here they are made up.
"""
import json
import math

from studies import optimizers as study


def made_up(losses, optimizer="adamw", moved=1.0):
    """A finished run with these evaluations, 52 steps apart, and a probe at each."""
    events = [{"step": 52 * i, "micro_step": 416 * i, "samples": 1664 * i, "updates": 52 * i, "flops": 1e9 * i,
               "seconds": 1.0 * i, "val_loss": loss, "val_dpo_loss": loss, "val_logp_accuracy": 0.75}
              for i, loss in enumerate(losses)]
    noise = {f"{what}_variance{form}": value for form in ("", "_relative")
             for what, value in (("grad", 0.1), ("update", [0.5, 0.25]), ("displacement", 0.1))}
    probes = [{**{key: e[key] for key in ("step", "micro_step", "samples", "seconds")}, "displacement_rms": moved,
               "probe_loss": 1.0, **noise} for e in events]
    return {"flags": {"optimizer": optimizer}, "events": [e for pair in zip(probes, events) for e in pair], "command": []}


def test_the_loss_at_the_end_decides_a_rate(monkeypatch):
    """Lowest at 3e-3 * 1.5, though another was lower on the way. AdamW's first three rates are 3e-3 * 1.5^(-2, 0, 2)."""
    def training(lab, task, name, split, optimizer, lr, seed, steps):
        assert (name, split, optimizer, seed, steps) == (f"grid/adamw-{lr:g}", "valid", "adamw", 1, study.STEPS // 2)
        end = abs(math.log(lr / 3e-3) / math.log(1.5) - 1)
        return {"events": [{"val_loss": 5.0}, {"val_loss": -lr}, {"val_loss": 1 + end}, {"step": 9}]}
    monkeypatch.setattr(study, "training", training)
    grid = study.grid(None, "sft", "adamw")
    assert list(grid) == [study.rate(power) for power in (-2, -1, 0, 1, 2)]
    assert min(grid, key=grid.get) == study.rate(1)
    monkeypatch.setattr(study, "training", lambda *_: None)
    assert study.grid(None, "dpo", "lion") is None
    monkeypatch.setattr(study, "training", lambda *_: {"events": [{"val_dpo_loss": 0.1}], "diverged": "the loss is nan"})
    assert set(study.grid(None, "dpo", "momentum").values()) == {math.inf}


def test_matched_rates_by_hand():
    """S(8) = 4.371, over sqrt(8) is 1.5455; and 2 - 1/8. The matched rate is that of the *other* optimizer, made larger."""
    grids = {method: {1e-3: 2.0, 2e-3: 1.0} for method in study.METHODS}
    grids["adamw"] = {1e-3: 1.0, 2e-3: 3.0}
    runs = study.chosen(grids)
    assert runs["adamw"] == ("adamw", 1e-3) and runs["adamw-pma"] == ("adamw-pma", 2e-3)
    assert runs["adamw-matched"] == ("adamw", 0.00309) and runs["lion-matched"] == ("lion", 0.00375)
    assert len(runs) == 9

# ---- runs

def test_all_runs_of_the_study(tmp_path, monkeypatch):
    """What work() asks for: every method at its rate on five seeds, two matched rates, K = 1, 2, 4, 16, 32, and nothing on test
    before the rates are chosen."""
    monkeypatch.setattr(study, "RUNS", tmp_path)
    asked = []

    def run(self, name, script, *flags):
        asked.append((name, dict(zip(flags[::2], flags[1::2]))))
        return {"events": [{"val_loss": 1.0, "val_dpo_loss": 1.0}], "command": []}
    monkeypatch.setattr(study.Lab, "run", run)
    study.work(study.new_lab(tmp_path))
    kinds = [name.split("/")[1] if "/" in name else "start" for name, _ in asked]
    assert kinds.index("test") > max(i for i, kind in enumerate(kinds) if kind == "grid")
    assert {kind: kinds.count(kind) for kind in kinds} == {"start": 5, "grid": 2 * 7 * 6, "test": 2 * 9 * 5, "k": 2 * 2 * 5 * 3}
    for name, flags in asked:
        if "/" in name:
            task, kind = name.split("/")[:2]
            assert flags["--data"].endswith(f"{'valid' if kind == 'grid' else 'test'}.jsonl") and flags["--eval-samples"] == 520
            assert flags["--grad-clip"] == flags["--weight-decay"] == 0 and flags["--schedule"] == "constant"
            assert flags["--steps"] * flags["--accumulate"] == 8 * (416 if kind == "test" else 208)
            assert flags.get("--init") == (None if task == "sft" else f"{tmp_path}/start-s{flags['--seed']}")
            assert name.endswith(f"s{flags['--seed']}") or kind == "grid"

# ---- the report

def test_report_by_hand(tmp_path, monkeypatch, capsys):
    """Everything falls from 4 to 2 in 3328 examples, PMA to 2 in half of them and at the end to 1; each twice as far a period.
    At all rates but the middle one it stays at 5."""
    lab = study.new_lab(tmp_path)
    monkeypatch.setattr(study, "training", lambda lab, task, name, *_: lab.found.setdefault(f"{task}/{name}", made_up([5, 5, 5])))
    for task in study.TASKS:
        for method, family in study.METHODS.items():
            rate = study.rate(study.TASKS[task].middle[family])
            slow, moved = ([4, 3, 2], 1.0) if method in ("adamw", "lion", "momentum") else ([4, 2, 1], 2.0)
            lab.found[f"{task}/grid/{method}-{rate:g}"] = made_up(slow, method, moved)
            for seed in (1, 2):
                lab.found[f"{task}/test/{method}-{rate:g}-s{seed}"] = made_up(slow, method, moved)
        lab.found[f"{task}/test/{method}-{rate:g}-s3"] = {**made_up([4, 5], method), "diverged": "the loss is nan"}
        rate = study.rate(study.TASKS[task].middle["adam"])
        lab.found[f"{task}/k/adamw-{rate:g}-k2-s1"] = made_up([4, 3, 2])
        lab.found[f"{task}/k/adamw-pma-{rate:g}-k2-s1"] = made_up([4, 2, 1], "adamw-pma")
    study.report(lab)
    text = capsys.readouterr().out
    assert text == (tmp_path / "tables.md").read_text() + "\n"
    for line in ("| adamw-pma | 0.00133: 5.0000, 0.002: 5.0000, **0.003: 1.0000**, 0.0045: 5.0000, 0.00675: 5.0000 |",
                 "| adamw-pma | adamw | **0.003** | 1.000 | 2.000 | 5.000 | 2.00 | 2.00 |",
                 "| adamw-pma | adamw | 0.002 | 5.000 | 5.000 | 2.000 | none | 1.00 |",
                 f"| adamw-pma | 2 |{' 1.000 [1.000, 1.000] |' * 2}{' 2.00 [2.00, 2.00] |' * 2} adamw 2 of 2 |",
                 "| lion-pma | 0.000263 | 2.00 [2.00, 2.00] | 0.10 [0.10, 0.10] | 0.750 [0.750, 0.750] | 0 |",
                 "| momentum | 0.259 | 1.00 [1.00, 1.00] | 0.10 [0.10, 0.10] | 0.750 [0.750, 0.750] | 1 |",
                 "| lion-pma | lion | 2.00 [2.00, 2.00] | 2.00 [2.00, 2.00] |",
                 "| 2 | 2.000 (one seed) | 1.000 (one seed) | 2.00 (one seed) | 2.00 (one seed) |"):
        assert line in text, line
    table = json.loads((tmp_path / "sft/compare.json").read_text())
    assert table["runs"]["agma"]["moved_against_baseline"] == [2.0] * 4   # two seeds, two probes after the warm-up


def test_an_unfinished_study_reports_what_it_has(tmp_path, capsys):
    study.report(study.new_lab(tmp_path))
    text = capsys.readouterr().out
    assert text.startswith("0 runs are done.") and "DPO: the learning rates of adamw, adamw-pma, agma" in text
