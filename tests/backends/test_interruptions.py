"""Trainings that are ended by others, over every backend: nothing is lost, and their end is told as what it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from palate import ModelTrainingRecipe, Session, TrainingJob
from palate.errors import JobNotReadyError, TrainingJobError
from tests.backends.hands import Hands
from tests.slow.conftest import until
from tests.support.trainings import SETTINGS, adapter, last_checkpoint, losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NEEDS_SERVER = False

STEPS = 100
SECRET = {"MY_KEY": "told-to-nobody"}


def train(model: Path, prefs: Path, name: str, precision: str, *, wait: bool) -> TrainingJob:
    recipe = ModelTrainingRecipe(
        model_name="tiny",
        model_uri=str(model),
        hyperparameters={**SETTINGS, "max_steps": STEPS, "precision": precision},
        environments=SECRET,
        max_attempts=2,
    )
    return recipe.train(inputs={"train": prefs}, wait=wait, job_name=name, show_logs=False)


# The store knows nothing of the precision: each of the two is tested with one value of the other.
@pytest.mark.parametrize(
    ("store_session", "precision"),
    [
        ("s3", "float32"),
        pytest.param("file", "float32", marks=pytest.mark.thorough),
        pytest.param("s3", "bfloat16", marks=pytest.mark.thorough),
    ],
    indirect=["store_session"],
)
def test_what_was_ended_and_killed_goes_on_and_equals_the_run_without_a_break(
    hands: Hands,
    store_session: Session,
    home: Path,
    tiny: Path,
    prefs: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    whole = train(tiny, prefs, "whole", precision, wait=True)
    expected = losses(whole)
    assert [step for step, _ in expected] == [*range(1, STEPS + 1)]

    # Ended as any program of this engine is: a whole checkpoint is left.
    job = train(tiny, prefs, "broken", precision, wait=False)
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
    assert "stopped on request" in status.attempts[0].reason
    assert "runner died" in status.attempts[1].reason
    assert any(f"attempt 2, resuming from checkpoint-{stopped_at}" in line for line in resumed.logs())
    assert SECRET["MY_KEY"] not in "\n".join(resumed.logs())
    found = losses(resumed)
    assert [step for step, _ in found] == [*range(1, STEPS + 1)]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], abs=1e-5)
    assert adapter(resumed) == adapter(whole)
    until(lambda: hands.left() == [], timeout_s=30)
