"""Trainings that are ended by others, over every backend: nothing is lost, and their end is told as what it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from palate import ModelTrainingRecipe, Session, TrainingJob
from palate.errors import JobNotReadyError, TrainingJobError
from palate.record import Record
from tests.backends.hands import Hands
from tests.slow.conftest import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NEEDS_SERVER = False

STEPS = 100
SETTINGS = {
    "training_strategy": "dpo",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "num_train_epochs": 1000,
    "max_steps": STEPS,
    "save_steps": 10,
}
SECRET = {"MY_KEY": "told-to-nobody"}


def train(model: Path, prefs: Path, name: str, *, wait: bool) -> TrainingJob:
    recipe = ModelTrainingRecipe(
        model_name="tiny", model_uri=str(model), hyperparameters=SETTINGS, environments=SECRET, max_attempts=2
    )
    return recipe.train(inputs={"train": prefs}, wait=wait, job_name=name, show_logs=False)


def losses(job: TrainingJob) -> list[tuple[int, float]]:
    return [(event["step"], event["loss"]) for event in job.metrics() if event["kind"] == "train"]


def adapter(job: TrainingJob) -> bytes:
    record = Record(job._run.session.store, "jobs", job.id)
    return record.store.get(record.key("model", "adapter_model.safetensors"))


def last_checkpoint(job: TrainingJob) -> int:
    """Returns the step of the last whole one, or 0."""
    record = Record(job._run.session.store, "jobs", job.id)
    marks = [info.key for info in record.store.list(record.key("checkpoints")) if info.key.endswith("/.complete")]
    return max((int(mark.split("/")[-2].split("-")[1]) for mark in marks), default=0)


@pytest.mark.parametrize("store_session", ["s3", pytest.param("file", marks=pytest.mark.thorough)], indirect=True)
def test_what_was_ended_and_killed_goes_on_and_equals_the_run_without_a_break(
    hands: Hands,
    store_session: Session,
    home: Path,
    tiny: Path,
    prefs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = train(tiny, prefs, "whole", wait=True)
    expected = losses(whole)
    assert [step for step, _ in expected] == [*range(1, STEPS + 1)]

    # Ended as any program of this engine is: a whole checkpoint is left.
    job = train(tiny, prefs, "broken", wait=False)
    until(lambda: last_checkpoint(job) > 0)
    seen = hands.shown(job.describe().engine_id)
    assert SECRET["MY_KEY"] not in seen
    assert (store_session.environment().get("AWS_SECRET_ACCESS_KEY") or "no key") not in seen
    hands.end(job.describe().engine_id)
    with pytest.raises(TrainingJobError, match="stopped on request"):
        job.wait(show_logs=False, timeout_s=120)
    stopped_at = last_checkpoint(job)
    with pytest.raises(JobNotReadyError, match="palate resume broken"):
        job.deploy("never")

    # Resumed from elsewhere, with the store's address and nothing else. Then the runner is killed: the next attempt comes by itself.
    if store_session.store.root.startswith("s3:"):
        monkeypatch.setenv("PALATE_HOME", str(home.with_name("elsewhere")))
        until(lambda: hands.left() == [], timeout_s=30)
        shutil.rmtree(home)
    resumed = TrainingJob.get("broken").resume(wait=False, environments=SECRET)
    until(lambda: last_checkpoint(resumed) > stopped_at + 10)
    monkeypatch.setenv("MY_KEY", SECRET["MY_KEY"])
    hands.kill(resumed.describe().engine_id)
    resumed.wait(show_logs=False, timeout_s=180)

    status = resumed.describe()
    assert (status.state, status.attempt) == ("Succeeded", 3)
    assert "stopped on request" in status.attempts[0]["reason"]
    assert "runner is gone" in status.attempts[1]["reason"]
    assert any(f"attempt 2, going on from checkpoint-{stopped_at}" in line for line in resumed.logs())
    assert SECRET["MY_KEY"] not in "\n".join(resumed.logs())
    found = losses(resumed)
    assert [step for step, _ in found] == [*range(1, STEPS + 1)]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], abs=1e-5)
    assert adapter(resumed) == adapter(whole)
    until(lambda: hands.left() == [], timeout_s=30)
