"""The benchmark against stock TRL, on the tiny model: it runs from a file of pairs, and the two curves it compares are one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.rows import preference_rows

pytestmark = pytest.mark.slow

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "train_speed.py"


@pytest.mark.thorough
def test_it_compares_speed_at_equal_loss(tiny: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "prefs.json", tmp_path / "figures.json"
    data.write_text(json.dumps(preference_rows(20)))
    command = [sys.executable, str(BENCHMARK), "--model", str(tiny), "--data", str(data), "--precision", "float32"]
    command += ["--steps", "2", "--epochs", "2", "--rounds", "1", "--variants", "tuned,palate", "--json", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    results = json.loads(out.read_text())["results"]
    ours, theirs = results["palate"][0], results["tuned"][0]
    assert len(ours["losses"]) == 4
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
    assert ours["pairs"] == theirs["pairs"] == 32
    assert "palate / tuned" in run.stdout
    assert "TFLOP/s" in run.stdout
