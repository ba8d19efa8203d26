"""An estimate beside the training that follows it: same rows, tokens and steps, and its rate for the next estimate."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from palate import ModelTrainingRecipe, Session, TrainingJob
from tests.support.rows import preference_rows

pytestmark = pytest.mark.slow

BASE = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1, "precision": "float32"}


def write_rows(path: Path) -> Path:
    rows = preference_rows(11)
    rows[1]["chosen"] += " and more" * 40
    rows[2]["prompt"] += " really" * 70
    rows[3]["chosen"], rows[3]["rejected"] = "same " * 60 + "a", "same " * 60 + "b"
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("strategy", ["dpo", "kto", "sft"])
def test_an_estimate_is_what_the_training_does(session: Session, tiny: Path, tmp_path: Path, strategy: str) -> None:
    data = write_rows(tmp_path / "p.json")
    settings: dict[str, Any] = {**BASE, "training_strategy": strategy, "seq_length": 64, "num_train_epochs": 3}
    recipe = ModelTrainingRecipe("tiny", model_uri=str(tiny), hyperparameters=settings)
    found = recipe.estimate({"train": data})
    assert TrainingJob.list() == []
    assert (found.errors, found.rows, found.skipped_rows) == ((), 11, 0)
    assert (found.tokens_per_s, found.seconds, found.rate_source) == (None, None, ())
    assert (found.device, found.precision, found.backend) == ("CPU", "float32", "process")
    job = recipe.train({"train": data}, job_name="one", show_logs=False)
    start, *events = job.metrics()
    trained = [event for event in events if event["kind"] == "train"]
    assert found.steps == start["total_steps"]
    assert found.truncated_rows == start["truncated_rows"]

    assert found.dropped_rows == len(set(start["dropped_rows"])) > 0
    assert found.tokens is not None
    assert 3 * found.tokens == sum(event["tokens"] for event in trained)
    assert found.memory_gib is not None
    # The libraries are most of it: 0.7 GiB by the formula.
    assert found.memory_gib == pytest.approx(events[-1]["memory_gb"] * 1e9 / 1024**3, abs=0.4)
    if strategy == "dpo":  # how fast it was is read alike for all
        again = recipe.estimate({"train": data}, job_name="one")
        assert again.rate_source == ("one",)
        assert again.tokens_per_s == (events[-1]["tokens_per_s"],) * 2
        assert again.seconds == (pytest.approx(events[-1]["train_seconds"], rel=0.1, abs=0.1),) * 2
        assert "'one' is taken" in again.errors[0]


@pytest.mark.thorough
def test_the_expected_peak_is_that_of_the_training(session: Session, base_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "p.json"
    data.write_text(json.dumps(preference_rows(32)))
    settings: dict[str, Any] = {
        "training_strategy": "dpo",
        "precision": "float32",
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "logging_steps": 1,
    }
    recipe = ModelTrainingRecipe("smollm", model_uri=str(base_model), hyperparameters=settings)
    found = recipe.estimate({"train": data})
    assert found.memory_gib is not None
    assert found.peak_memory_gib is not None
    assert found.memory_gib < found.peak_memory_gib
    job = recipe.train({"train": data}, show_logs=False)
    measured = job.metrics()[-1]["memory_gb"] * 1e9 / 1024**3
    assert found.peak_memory_gib == pytest.approx(measured, rel=0.15)


def test_a_dry_run_prints_the_estimate_and_submits_nothing(session: Session, tiny: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "p.json")
    (tmp_path / "r.toml").write_text(f'model_uri = "{tiny}"\ntrain = "{data.name}"\n[hyperparameters]\nseq_length = 64')
    command = [sys.executable, "-m", "palate.cli", "train", "--recipe", str(tmp_path / "r.toml"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    table = dict(line.split("\t") for line in done.stdout.splitlines())
    assert done.returncode == 0, done.stderr
    assert table["rows"] == "11 usable, 0 skipped"
    assert table["at seq_length=64"] == "1 rows truncated, 2 dropped"
    assert re.fullmatch(r"(at least 0\.7 GiB, )?expected peak 0\.\d GiB; the device has [\d.]+ GiB", table["memory"])
    assert table["time"].startswith("not known: no succeeded job")
    assert "nothing was submitted" in done.stderr
    data.write_text("[]")
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert (done.returncode, "error: " in done.stderr, "rows\tnot known" in done.stdout) == (1, True, True)
    assert TrainingJob.list() == []
