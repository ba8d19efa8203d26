"""Held-out pairs scored by a run of its own: the real trainer on a tiny model, over a file store."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from palate import ModelTrainingRecipe, Session, TrainingJob
from palate.errors import DamagedFilesError, DataError, EvaluationError, JobNotReadyError
from palate.evaluation.preferences import PreferenceRun, preference_scores, start_preference_scores
from palate.runs.record import Record
from palate_recipes.specs.evaluation import SCORES_FILE
from tests.slow.conftest import until
from tests.support.architectures import random_model
from tests.support.manifests import train_manifest
from tests.support.rows import preference_rows

pytestmark = pytest.mark.slow

HYPERPARAMETERS: dict[str, Any] = {
    "training_strategy": "dpo",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "max_steps": 4,
    "save_steps": 2,
    "precision": "float32",
}
HELD_OUT = [
    *preference_rows(2),  # which the job has seen
    {"prompt": "Is 1 an even number?", "chosen": "No.", "rejected": "Yes, of course, as you say."},
    *({"prompt": f"Is {n} prime?", "chosen": f"Divide {n} first.", "rejected": "Yes."} for n in range(20, 26)),
]


@pytest.fixture
def job(session: Session, tmp_path: Path) -> TrainingJob:
    model = random_model("llama", tmp_path / "model")
    recipe = ModelTrainingRecipe("tiny", model_uri=str(model), hyperparameters=HYPERPARAMETERS)
    return recipe.train({"train": preference_rows(), "validation": HELD_OUT}, job_name="one", show_logs=False)


def runs_of(job: TrainingJob) -> list[str]:
    return sorted(job._run.session.store.list_children("evaluations/"))


def test_the_same_question_is_answered_once(
    job: TrainingJob, session: Session, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="`rejected` is missing"):
        preference_scores(job, [{"prompt": "a", "chosen": "b"}])
    assert runs_of(job) == []
    held_out = tmp_path / "held-out.json"
    held_out.write_text(json.dumps(HELD_OUT))
    scores = preference_scores(job, held_out)
    assert "WARNING: 2 of 9 rows are in the job's training data (row 1 is the first)" in capfd.readouterr().err
    assert (scores.seen_rows, scores.seen_prompts, scores.pairs.rows) == ((1, 2), 3, [*range(1, 10)])
    last = next(event for event in reversed(job.metrics()) if event["kind"] == "eval")
    assert scores.loss == pytest.approx(last["eval_loss"], abs=1e-4)
    assert scores.reward_accuracy.value == pytest.approx(last["eval_rewards/accuracies"])
    assert scores.reward_margin.value == pytest.approx(last["eval_rewards/margins"], abs=1e-4)
    assert scores.pairs.cached >= len(HELD_OUT)  # of the reference, which the training has scored
    assert [found.id for found in TrainingJob.list()] == ["one"]

    # The same rows from another file, in another format: nothing is started.
    lines = tmp_path / "again.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))
    before = Record(session.store, "evaluations", scores.name).status()
    again = preference_scores("one", lines)
    assert (again, runs_of(job)) == (scores, [scores.name])
    assert Record(session.store, "evaluations", scores.name).status() == before
    assert "is stored: nothing is started" in capfd.readouterr().err

    checkpoint = preference_scores(job, held_out, checkpoint=2, show_logs=False)
    assert (checkpoint.checkpoint, len(runs_of(job))) == ("step-000002", 2)
    assert checkpoint.pairs.base == scores.pairs.base
    assert checkpoint.pairs.tuned != scores.pairs.tuned

    record = Record(session.store, "evaluations", scores.name)
    changed = record.store.get(record.key(SCORES_FILE)).replace(b"-", b"", 1)
    record.store.put(record.key(SCORES_FILE), changed)
    with pytest.raises(DamagedFilesError, match="missing or changed"):
        preference_scores(job, held_out)
    PreferenceRun.get(scores.name).delete()
    assert runs_of(job) == [checkpoint.name]


def test_a_killed_run_is_continued_and_a_damaged_model_refused(job: TrainingJob, session: Session) -> None:
    run = start_preference_scores(job, HELD_OUT, announce=False)
    until(lambda: run._run.record.status().state == "Running")
    os.kill(int(run._run.record.status().engine_id.split(":")[1]), signal.SIGKILL)
    with pytest.raises(EvaluationError, match="the runner died"):
        run.wait(show_logs=False, timeout_s=120)
    scores = preference_scores(job, HELD_OUT, show_logs=False)
    assert (scores.name, scores.pairs.rows) == (run.name, [*range(1, 10)])
    assert run._run.record.status().attempt == 2

    folder = Path(str(session.store.local_path("jobs/one/model")))
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # same size: only its digest tells
    with pytest.raises(EvaluationError, match=r"adapter_model\.safetensors missing or changed"):
        preference_scores(job, HELD_OUT[:3], show_logs=False)
    weights.write_bytes(whole[:-1])
    count = len(runs_of(job))
    with pytest.raises(DamagedFilesError, match=r"adapter_model\.safetensors missing or changed"):
        preference_scores(job, HELD_OUT[:4], show_logs=False)
    assert len(runs_of(job)) == count
    shutil.rmtree(folder)


def test_a_job_without_a_model_is_refused(session: Session) -> None:
    Record(session.store, "jobs", "one").create(train_manifest("one"))
    with pytest.raises(JobNotReadyError, match="is Creating"):
        preference_scores("one", HELD_OUT)
    with pytest.raises(JobNotReadyError, match="no complete checkpoint"):
        preference_scores("one", HELD_OUT, checkpoint="latest")
    assert not session.store.list_children("evaluations/")
