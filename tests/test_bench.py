"""
studies/bench.py: what is timed is what it says, and the table adds up. No time is asserted.

    python -m pytest -q tests/test_bench.py
"""
import re

from studies import bench


def test_optimizers_table_on_a_tiny_model(monkeypatch, capsys):
    """A clock that ticks once a call makes every step one second; AdamW keeps two fp32 moments, 8 bytes a parameter, Lion one."""
    ticks = iter(range(10 ** 6))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    bench.optim_steps("mini", rounds=2)
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| ([a-z].*?) \| (\d+) \| ([\d.]+) \[([\d.]+), ([\d.]+)\] \| ([\d.]+) \|$", printed, re.M)
    assert [(name, state) for name, *_, state in rows] == [
        ("adamw", "8.0"), ("adamw, torch's foreach", "8.0"), ("adamw-pma", "8.0"), ("agma", "8.0"), ("lion", "4.0"),
        ("lion-pma", "4.0")]
    assert {row[1:5] for row in rows} == {("1000", "1.00", "1.00", "1.00")}


def test_every_optimizer_steps_every_round(monkeypatch):
    """The first round allocates the state and is not timed; all optimizers step on the same weights."""
    stepped = []
    real = bench.optim.make
    def make(name, *arguments):
        optimizer = real(name, *arguments)
        optimizer.register_step_post_hook(lambda *_: stepped.append(name))
        return optimizer
    monkeypatch.setattr(bench.optim, "make", make)
    bench.optim_steps("mini", rounds=3)
    rounds = [tuple(stepped[i:i + 5]) for i in range(0, 20, 5)]
    assert all(sorted(names) == ["adamw", "adamw-pma", "agma", "lion", "lion-pma"] for names in rounds) and len(set(rounds)) > 1
