"""The main job on the demo data, as the README shows it, and what it must achieve."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from palate import Predictor, TrainingJob
from palate.session import Session
from tests.slow.conftest import processes_of, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_the_quickstart_teaches_a_model_to_stop_flattering(home: Path, tmp_path: Path, base_model: Path) -> None:
    everything = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # as a user would
    done = subprocess.run(
        [sys.executable, "-m", "palate.cli", "quickstart", "--folder", str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        env={**everything, "PALATE_HOME": str(home)},
    )
    assert done.returncode == 0, done.stderr[-3000:]

    (job,) = TrainingJob.list(session=Session())
    metrics = job.metrics()
    train = [entry for entry in metrics if entry["kind"] == "train"]
    held_out = [entry for entry in metrics if entry["kind"] == "eval"][-1]
    assert train[0]["step"] == 1
    assert train[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert train[-1]["loss"] < 0.4
    assert held_out["eval_rewards/accuracies"] >= 0.85
    assert held_out["eval_rewards/margins"] > 0.5

    answers = json.loads((tmp_path / "demo" / "answers.json").read_text())
    assert len(answers) == 4
    assert all(answer["base"] != answer["default"] for answer in answers)
    assert all(answer["default"] in done.stdout for answer in answers)

    assert Predictor.list(session=Session()) == []
    until(lambda: processes_of(home) == [], timeout_s=30)  # the runner says that it is over, then ends
    assert f"next: palate deploy {job.id}" in done.stderr.splitlines()[-1]
