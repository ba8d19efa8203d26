"""Trackers: real trainings report to local stores of trackio and MLflow; a failing one ends nothing; no secret is recorded."""

from __future__ import annotations

import json
import socket
import sqlite3
from importlib.util import find_spec
from pathlib import Path

import pytest

from palate import ModelTrainingRecipe, Session
from palate.errors import MissingDependencyError
from palate.runs.record import Record
from tests.slow.conftest import until

pytestmark = pytest.mark.slow

QUICK = {
    "training_strategy": "dpo",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
}
SECRET = "a-secret-of-the-tracker"


def recipe(model: Path, report_to: str, **arguments: object) -> ModelTrainingRecipe:
    settings = {**QUICK, "report_to": report_to, **arguments.pop("settings", {})}  # type: ignore[dict-item]
    return ModelTrainingRecipe(model_uri=str(model), hyperparameters=settings, **arguments)  # type: ignore[arg-type]


def needs(*names: str) -> pytest.MarkDecorator:
    absent = [name for name in names if find_spec(name) is None]
    return pytest.mark.skipif(
        bool(absent), reason=f"NO TRACKER: {', '.join(absent)} not installed (pip install 'palate[trackers]')"
    )


def nowhere_holds(secret: str, session: Session, home: Path) -> bool:
    stored = all(secret.encode() not in session.store.get(info.key) for info in session.store.list(""))
    return stored and not any(secret.encode() in path.read_bytes() for path in home.rglob("*") if path.is_file())


@needs("trackio", "mlflow", "sqlalchemy", "alembic")
def test_trackers_get_the_metrics_of_a_job_under_its_id(
    session: Session, home: Path, tiny: Path, prefs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db"
    )  # found without naming it in `environments`
    job = recipe(
        tiny,
        "tensorboard,trackio,mlflow",
        environments={"TRACKIO_DIR": str(tmp_path / "trackio"), "MLFLOW_TRACKING_TOKEN": SECRET},
    ).train(inputs={"train": prefs, "validation": prefs}, job_name="tracked")
    assert set(job.manifest.body.environment_names) == {"MLFLOW_TRACKING_URI", "TRACKIO_DIR", "MLFLOW_TRACKING_TOKEN"}
    assert "WARNING" not in "\n".join(job.logs())
    assert nowhere_holds(SECRET, session, home)
    assert nowhere_holds("mlflow.db", session, home)
    losses = [(event["step"], event["loss"]) for event in job.metrics() if event["kind"] == "train"]
    held_out = next(event["eval_loss"] for event in job.metrics() if event["kind"] == "eval")

    with sqlite3.connect(tmp_path / "mlflow.db") as board:
        ((name, status),) = board.execute("SELECT name, status FROM runs").fetchall()
        assert (name, status) == ("tracked", "FINISHED")
        assert ("palate",) in board.execute("SELECT name FROM experiments").fetchall()
        found = board.execute("SELECT step, value FROM metrics WHERE key = 'loss' ORDER BY step").fetchall()
        assert found == [(step, pytest.approx(loss)) for step, loss in losses]
        assert ("learning_rate", "5e-05") in board.execute("SELECT key, value FROM params").fetchall()
        tags = dict(board.execute("SELECT key, value FROM tags").fetchall())
        assert tags["palate.job"] == "tracked"
        assert tags["palate.data.train"] == job.manifest.body.inputs["train"].sha256

    with sqlite3.connect(tmp_path / "trackio" / "palate.db") as board:
        rows = [json.loads(values) for (values,) in board.execute("SELECT metrics FROM metrics ORDER BY id")]
        assert [(row["train/global_step"], row["train/loss"]) for row in rows if "train/loss" in row] == losses
        assert [row["eval/loss"] for row in rows if "eval/loss" in row] == [held_out]
        ((run, config),) = board.execute("SELECT run_name, config FROM configs").fetchall()
        assert run == "tracked"
        assert json.loads(config)["palate.method"] == "LoRA_LLM"


@needs("mlflow")
def test_a_tracker_that_fails_ends_nothing_and_its_secrets_are_not_logged(
    session: Session, home: Path, tiny: Path, prefs: Path
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # taken, and nothing listens
        address = f"http://user:{SECRET}@127.0.0.1:{nobody.getsockname()[1]}"
        job = recipe(tiny, "mlflow", environments={"MLFLOW_TRACKING_URI": address}).train(
            inputs={"train": prefs}, job_name="untracked"
        )
    assert job.is_succeeded()
    warnings = [line for line in job.logs() if "WARNING: the tracker mlflow failed (start)" in line]
    assert len(warnings) == 1
    assert "does not report to it any more" in warnings[0]
    assert nowhere_holds(SECRET, session, home)


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed, so it cannot be missing")
def test_a_missing_package_is_an_error_before_anything_is_written(session: Session, tiny: Path, prefs: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"wandb is not installed .* pip install wandb"):
        recipe(tiny, "wandb").train(inputs={"train": prefs}, job_name="none")
    assert not Record(session.store, "jobs", "none").exists()


@pytest.mark.thorough
def test_tensorboard_can_be_watched_while_the_job_runs(session: Session, home: Path, tiny: Path, prefs: Path) -> None:
    settings = {"num_train_epochs": 1000, "per_device_train_batch_size": 1}
    job = recipe(tiny, "tensorboard", settings=settings).train(inputs={"train": prefs}, job_name="long", wait=False)
    try:
        until(lambda: any(info.size > 200 for info in session.store.list("jobs/long/tensorboard")))
        assert job.status == "Running"
    finally:
        job.stop()
