"""Puts the repository root on the path, so that the tests import the source files as the scripts do."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture
def drawn(monkeypatch):
    """Keeps every figure that plots draws."""
    import plots   # needs the path; and a course may hand the file out with its body removed
    figures, real = [], plots.canvas

    def keep(*size, **options):
        figure, axes = real(*size, **options)
        figures.append(figure)
        return figure, axes
    monkeypatch.setattr(plots, "canvas", keep)
    return figures
