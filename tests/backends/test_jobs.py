"""Training jobs over every backend, with the real trainer and a tiny model: the contract of a backend and a store."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from palate import ModelTrainingRecipe, Predictor, Session, TrainingJob
from palate.errors import JobNotReadyError, NameTakenError, TrainingJobError, WaitTimeoutError
from palate.runs.record import Record
from tests.backends.hands import Hands
from tests.slow.conftest import until
from tests.support.trainings import last_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NEEDS_SERVER = True

QUICK = {
    "training_strategy": "dpo",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
}
SECRET = {"HF_TOKEN": "hf_a_secret_value"}
LONG = {**QUICK, "per_device_train_batch_size": 1, "num_train_epochs": 1000, "save_steps": 50}


def recipe(model: Path, hyperparameters: dict[str, object], **arguments: object) -> ModelTrainingRecipe:
    return ModelTrainingRecipe(model_name="tiny", model_uri=str(model), hyperparameters=hyperparameters, **arguments)  # type: ignore[arg-type]


def palate(*arguments: str) -> str:
    """Runs the command line as a new process and returns its stdout."""
    command = [sys.executable, "-m", "palate.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_job_trains_and_leaves_what_it_promises(
    hands: Hands,
    store_session: Session,
    home: Path,
    tiny: Path,
    prefs: Path,
    capfd: pytest.CaptureFixture[str],
    precision: str,
) -> None:
    job = recipe(tiny, {**QUICK, "precision": precision}, labels={"team": "x"}, environments=SECRET).train(
        inputs={"train": prefs, "validation": prefs}, job_name="one"
    )
    assert (job.id, job.status, job.is_succeeded(), job.is_completed()) == ("one", "Succeeded", True, True)
    assert [found.id for found in TrainingJob.list("Succeeded")] == ["one"]
    assert job.manifest.backend == hands.backend

    metrics = job.metrics()
    assert [entry["kind"] for entry in metrics] == ["start", "train", "train", "train", "eval", "end"]
    first = metrics[1]
    assert first["step"] == 1
    assert metrics[0]["precision"] == precision
    near = 1e-3 if precision == "float32" else 2e-2  # the reference was scored in other batches
    assert first["loss"] == pytest.approx(math.log(2), abs=near)
    assert first["rewards/margins"] == pytest.approx(0, abs=near)
    assert {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "learning_rate",
        "epoch",
        "logps/chosen",
    } <= set(first)
    assert {"eval_loss", "eval_rewards/accuracies"} <= set(metrics[4])

    store = store_session.store
    model = {info.key.rpartition("/")[2] for info in store.list("jobs/one/model/")}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "probe.json"} <= model
    assert any("tfevents" in info.key for info in store.list("jobs/one/tensorboard/"))
    assert job.output_path() == f"{store.root}/jobs/one/model"

    manifest = job.manifest
    assert manifest.labels == {"team": "x"}
    assert manifest.body.hyperparameters.seq_length == 128
    assert manifest.body.inputs["train"].rows == 12
    assert len(manifest.body.inputs["train"].sha256 or "") == 64
    assert job.describe().details["versions"]["trl"]

    assert manifest.body.environment_names == ("HF_TOKEN",)
    assert not any(SECRET["HF_TOKEN"].encode() in path.read_bytes() for path in home.rglob("*") if path.is_file())
    assert not any(SECRET["HF_TOKEN"].encode() in store.get(info.key) for info in store.list(""))

    shown = capfd.readouterr()
    assert shown.out == ""
    assert "step 3/3" in shown.err
    assert any("step 3/3" in line for line in job.logs())
    until(lambda: hands.left() == [], timeout_s=30)  # the runner says that it is over, then ends
    assert not any((home / "work").rglob("*.json"))

    with pytest.raises(NameTakenError, match="'one'"):
        recipe(tiny, QUICK).train(inputs={"train": prefs}, job_name="one")


@pytest.mark.parametrize("store_session", ["s3", pytest.param("file", marks=pytest.mark.thorough)], indirect=True)
def test_training_survives_the_client_that_started_it(
    hands: Hands, store_session: Session, tiny: Path, prefs: Path
) -> None:
    code = (
        "from palate import ModelTrainingRecipe\n"
        f"recipe = ModelTrainingRecipe(model_name='tiny', model_uri={str(tiny)!r}, hyperparameters={{**{LONG!r}, 'max_steps': 120}})\n"
        f"recipe.train(inputs={{'train': {str(prefs)!r}}}, job_name='survivor', wait=True)\n"
    )
    client = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    record = Record(store_session.store, "jobs", "survivor")
    until(lambda: record.exists() and record.status().state == "Running")
    client.send_signal(signal.SIGKILL)
    client.wait()

    assert [(row["id"], row["state"]) for row in json.loads(palate("jobs", "--json"))] == [("survivor", "Running")]
    job = TrainingJob.attach("survivor").wait(show_logs=False, timeout_s=120)
    assert job.is_succeeded()
    marks = [
        info.key for info in store_session.store.list("jobs/survivor/checkpoints/") if info.key.endswith(".complete")
    ]
    assert "jobs/survivor/checkpoints/step-000050/.complete" in marks
    assert TrainingJob.get(job.uri).is_succeeded()

    # And a new process serves it, from nothing but the store.
    told = palate("deploy", "survivor", "--name", "served", "--engine", "transformers")
    assert told.startswith("served\thttp://127.0.0.1:")
    assert palate("chat", "served", "Hi", "--max-tokens", "4")
    assert palate("delete", "--yes", "served") == "served\tdeleted\n"
    until(lambda: hands.left() == [], timeout_s=30)  # the runner says that it is over, then ends


def test_stop_from_another_process_keeps_a_whole_checkpoint(
    hands: Hands, session: Session, tiny: Path, prefs: Path
) -> None:
    job = recipe(tiny, {**LONG, "save_steps": 0}).train(inputs={"train": prefs}, wait=False, job_name="long")
    with pytest.raises(WaitTimeoutError, match="palate stop long"):
        job.wait(show_logs=False, timeout_s=0.5)
    until(lambda: any(entry["kind"] == "train" for entry in job.metrics()))
    assert palate("stop", "long") == "long\tStopped\n"
    until(lambda: hands.left() == [], timeout_s=30)  # the runner says that it is over, then ends
    assert any(info.key.endswith("/.complete") for info in session.store.list("jobs/long/checkpoints/"))
    with pytest.raises(TrainingJobError, match="was stopped"):
        job.wait(show_logs=False)
    with pytest.raises(JobNotReadyError, match="Stopped"):
        job.deploy("never")
    job.stop()  # twice is no error
    job.delete()
    assert TrainingJob.list() == []


def test_a_failed_job_raises_with_its_last_lines_and_never_deploys(
    hands: Hands, session: Session, tiny: Path, prefs: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.safetensors").write_bytes(b"not weights at all")
    broken_recipe = recipe(broken, QUICK)
    with pytest.raises(TrainingJobError) as caught:
        broken_recipe.train(inputs={"train": prefs}, show_logs=False)
    assert caught.value.reason
    assert "last log lines:" in str(caught.value)
    job = broken_recipe.latest_job
    assert job is not None
    assert job.status == "Failed"
    for act in (broken_recipe.deploy, broken_recipe.model_data):
        with pytest.raises(JobNotReadyError, match="Failed"):
            act()
    until(lambda: hands.left() == [], timeout_s=30)  # the runner says that it is over, then ends


def test_a_job_is_sampled_while_it_trains_and_a_runner_that_is_killed_takes_its_trainer_along(
    hands: Hands, session: Session, tiny: Path, prefs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = recipe(tiny, {**LONG, "learning_rate": 1e-3}).train(inputs={"train": prefs}, wait=False)
    until(lambda: last_checkpoint(job) > 0)
    with job.chat(checkpoint="latest", options={"engine": "transformers", "dtype": "float32"}) as chat:
        assert chat.ask("Is 3 an even number?", max_tokens=4)
        assert [turn["role"] for turn in chat.messages] == ["system", "user", "assistant"]
        labels = chat.predictor.labels
        assert (labels["job"], labels["checkpoint"][:8]) == (job.id, "step-000")
        asked: Any = chat.predictor.openai().completions.create
        tuned, base = (
            asked(model=model, prompt="Is 3 an even number?", max_tokens=32, temperature=0).choices[0].text
            for model in ("default", "base")
        )
        assert tuned != base, "the adapter is not applied"
        assert job.status == "Running"
    assert Predictor.list() == []
    assert "is a checkpoint: its files are verified, but its answers are not compared" in capfd.readouterr().err
    hands.kill(job.describe().engine_id)
    with pytest.raises(TrainingJobError, match="runner died"):
        job.wait(show_logs=False, timeout_s=30)
    until(lambda: hands.left() == [], timeout_s=10)


def test_max_run_time_ends_a_training_as_failed(hands: Hands, session: Session, tiny: Path, prefs: Path) -> None:
    with pytest.raises(TrainingJobError, match=r"max_run_time of 8 s"):
        recipe(tiny, LONG, max_run_time=8).train(inputs={"train": prefs}, show_logs=False)
    until(lambda: hands.left() == [], timeout_s=30)  # the runner says that it is over, then ends


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("hands", ["process"], indirect=True)
def test_sft_and_full_fine_tuning(hands: Hands, session: Session, tiny: Path, prefs: Path, precision: str) -> None:
    settings = {**QUICK, "training_strategy": "sft", "max_steps": 2, "precision": precision}
    job = recipe(tiny, settings, method="Standard_LLM").train(inputs={"train": prefs}, show_logs=False)
    names = {info.key.rpartition("/")[2] for info in session.store.list(f"jobs/{job.id}/model/")}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert "adapter_model.safetensors" not in names
