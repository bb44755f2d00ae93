"""Puts the repository root on the path, so that the tests import the source files as the scripts do."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
