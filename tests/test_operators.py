"""
studies/operators.py: shares by hand, and that a profiled step's operators are known.

    python -m pytest -q tests/test_operators.py
"""
import json

import pytest

from files import InputError
from studies import operators, rivals
from studies.lab import HERE


def test_shares_and_table_by_hand():
    """Times 5, 2, 2, 1: an operator counts once, and what no group knows for the last one."""
    found = operators.shares({"aten::addmm": 5, "aten::_scaled_dot_product_flash_attention_for_cpu_backward": 2, "aten::mm": 2,
                              "aten::copy_": 1})
    assert found == {**dict.fromkeys(operators.GROUPS, 0), "matrix products": 0.7, "attention": 0.2, "all else": 0.1}
    text = operators.table({"dpo": found})
    assert text.splitlines()[2] == "| DPO | 70.0 | 20.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 10.0 |"


def test_every_name_is_that_of_an_operator():
    """Of the three kinds of step together: each name that a group is known by begins one, so none has gone stale; and no group of
    any kind is empty."""
    work, seen = rivals.work("minihh", "mini", "cpu", size=3, steps=2, longest=40), set()
    for kind in operators.KINDS:
        times = operators.profiled(work, kind)
        seen |= set(times)
        found = operators.shares(times)
        assert min(found.values()) > 0 and sum(found.values()) == pytest.approx(1)
    starts = {start for group in operators.GROUPS.values() for start in group}
    assert [start for start in starts if not any(name.startswith(start) for name in seen)] == []


@pytest.mark.parametrize("out", [".", "none/found.json"])
def test_a_bad_out_is_one_line_before_any_work(out):
    with pytest.raises(InputError, match=f"--out: expected a file's name in a folder that exists, found {out}"):
        operators.main(["--model", "mini", "--data", "minihh", "--out", out])


def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(operators, "KINDS", ("dpo",))
    operators.main(["--model", "mini", "--data", "minihh", "--out", str(tmp_path / "found.json")])
    assert capsys.readouterr().out.strip() == operators.table(json.loads((tmp_path / "found.json").read_text()))


def test_the_results_have_the_measured_table():
    assert operators.table(json.loads((HERE / "results/bench/operators.json").read_text())) in (HERE / "RESULTS.md").read_text()
