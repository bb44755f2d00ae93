"""
README.md: its table of what to read has every file, and numbers that are about right.

    python -m pytest -q tests/test_readme.py
"""
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_reading_list_has_every_file_and_about_its_lines():
    """A fifth beside the file, since a list that went stale with every commit would be no help; minutes at 15 lines each."""
    row = r"^\| (?:`(\w+\.py)`|all) \|.*\| ([\d,]+) \| (\d+) \|(.*)\|$"
    *files, (_, all_lines, all_minutes, all_short) = re.findall(row, (ROOT / "README.md").read_text(), re.M)
    assert sorted(name for name, *_ in files) == sorted(path.name for path in ROOT.glob("*.py"))
    for name, lines, minutes, _ in files:
        assert abs(int(lines) - len((ROOT / name).read_text().splitlines())) <= 0.2 * int(lines), name
        assert abs(int(minutes) - int(lines) / 15) <= 1, name
    assert int(all_lines.replace(",", "")) == sum(int(lines) for _, lines, *_ in files)
    assert int(all_minutes) == sum(int(minutes) for *_, minutes, _ in files)
    shorts = re.findall(r"^\| `\w+\.py`.*: (\d+) \|$", (ROOT / "README.md").read_text(), re.M)   # one file stands there twice
    assert int(all_short) == sum(map(int, shorts)) <= 240
