"""The short form of `make fuzz`: other inputs than the last run's seed would give are for the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the serving front needs a server: pip install 'palate[serve-transformers]'")


def test_damaged_inputs_are_taken_or_refused(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "tests.fuzz", "--short", "--count", "2000", "--failures", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert done.stdout.count(" 0 failed ") == 10
