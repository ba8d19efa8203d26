"""Training jobs that lose their trainer, runner, machine, store or disk: nothing is lost, and no status lies."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from msgspec.structs import replace

from palate import ModelTrainingRecipe, Session, TrainingJob, setup_default_session
from palate.errors import DamagedFilesError, ServiceError, TrainingJobError
from palate.runs.lease import read_lease
from palate.runs.record import Record
from palate_recipes.specs.run import TrainManifest
from tests.slow.conftest import processes_of, until
from tests.support.gate import gate_to
from tests.support.seaweed import SeaweedServer
from tests.support.trainings import SETTINGS, adapter, last_checkpoint, losses

pytestmark = pytest.mark.slow

LONG = pytest.mark.skipif(
    os.environ.get("PALATE_TEST_RECOVERY") != "1",
    reason="real outages, full disks and lost runners take minutes each; PALATE_TEST_RECOVERY=1 runs them",
)

STEPS = 100


def train(
    model: Path, prefs: Path, name: str, *, steps: int = STEPS, wait: bool = False, **arguments: object
) -> TrainingJob:
    recipe = ModelTrainingRecipe(
        model_name="tiny",
        model_uri=str(model),
        hyperparameters={**SETTINGS, "max_steps": steps},
        **arguments,  # type: ignore[arg-type]
    )
    return recipe.train(inputs={"train": prefs}, wait=wait, job_name=name, show_logs=False)


def runner_pid(job: TrainingJob) -> int:
    lease = read_lease(Record(job._run.session.store, "jobs", job.id))
    assert lease is not None
    return lease.pid


def is_over(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def trainer_of(job: TrainingJob) -> psutil.Process:
    return psutil.Process(runner_pid(job)).children()[0]


def test_a_trainer_that_was_killed_begins_again_by_itself(
    session: Session, home: Path, tiny: Path, prefs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tiny, prefs, "whole", wait=True)
    monkeypatch.setenv("OPENAI_API_KEY", "of no use to a trainer")
    tried = train(tiny, prefs, "tried", max_attempts=2, environments={"MY_API_KEY": "meant for it"})
    until(lambda: last_checkpoint(tried) > 0)
    trainer = trainer_of(tried)
    assert (trainer.environ().get("OPENAI_API_KEY"), trainer.environ()["MY_API_KEY"]) == (None, "meant for it")
    trainer.kill()
    tried.wait(show_logs=False, timeout_s=120)
    status = tried.describe()
    assert (status.state, status.attempt) == ("Succeeded", 2)
    assert "killed by SIGKILL" in status.attempts[0].reason
    found, expected = losses(tried), losses(whole)
    assert [step for step, _ in found] == [*range(1, STEPS + 1)]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], abs=1e-5)
    assert adapter(tried) == adapter(whole)
    assert (tried.metrics()[-1]["kind"], tried.metrics()[-1]["first_loss"] is None) == ("end", False)
    until(lambda: processes_of(home) == [], timeout_s=30)


@pytest.mark.parametrize("away_s", [6, pytest.param(60, marks=LONG)])
def test_a_store_that_is_away_stops_no_training(
    seaweed: SeaweedServer,
    bucket: str,
    home: Path,
    tiny: Path,
    prefs: Path,
    monkeypatch: pytest.MonkeyPatch,
    away_s: int,
) -> None:
    with gate_to(int(seaweed.endpoint.rpartition(":")[2])) as gate:
        for name, value in seaweed.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{gate.port}")
        monkeypatch.setenv("PALATE_STORE", f"s3://{bucket}/away-{away_s}")
        setup_default_session()
        job = train(tiny, prefs, "away")
        until(lambda: last_checkpoint(job) > 0)
        trainer = trainer_of(job)
        gate.shut()
        back = threading.Timer(away_s, gate.open)
        back.start()
        trainer.wait(120)  # it ends by itself, store or no store
        back.join()
        job = TrainingJob.get("away")
        job.wait(show_logs=False, timeout_s=150)
        assert [step for step, _ in losses(job)] == [*range(1, STEPS + 1)]
        assert any("the store is back" in line for line in job.logs())
        assert job.describe().attempt == 1
        assert last_checkpoint(job) > STEPS - 11
        until(lambda: processes_of(home) == [], timeout_s=30)


@LONG
def test_of_two_runners_for_one_job_one_trains(session: Session, home: Path, tiny: Path, prefs: Path) -> None:
    job = train(tiny, prefs, "template", steps=1, wait=True)
    record = Record(session.store, "jobs", "twice")
    spec = job.manifest.body
    spec = replace(spec, hyperparameters=replace(spec.hyperparameters, max_steps=30))
    record.create(TrainManifest(name="twice", backend="process", body=spec))
    runners = [
        subprocess.Popen([sys.executable, "-m", "palate.runner", record.uri], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    words = [runner.communicate(timeout=200)[1] for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0]
    assert sum("another runner has" in text for text in words) == 1
    twice = TrainingJob.get("twice")
    assert (twice.status, twice.describe().attempt) == ("Succeeded", 1)
    assert [step for step, _ in losses(twice)] == [*range(1, 31)]
    assert sum("steps, " in line and line.startswith("training ") for line in twice.logs()) == 1
    until(lambda: processes_of(home) == [], timeout_s=30)


@LONG
def test_a_disk_without_space_is_the_stated_cause(
    session: Session, home: Path, tiny: Path, prefs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here: it needs root")
    try:
        monkeypatch.setenv("PALATE_STORE", str(home / "store"))
        monkeypatch.setenv("PALATE_HOME", str(small / "home"))
        job = train(tiny, prefs, "full")
        with pytest.raises(TrainingJobError, match=r"(?i)disk is full"):
            job.wait(show_logs=False, timeout_s=120)
        until(lambda: processes_of(small / "home") == [], timeout_s=30)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_model_that_was_changed_is_not_served(session: Session, home: Path, tiny: Path, prefs: Path) -> None:
    store = session.store
    lost = "jobs/changed/model/weights-of-an-attempt-that-was-lost.safetensors"
    store.put(lost, b"it counts as added, unless the attempt that succeeds removes it")
    job = train(tiny, prefs, "changed", steps=2, wait=True)
    assert store.stat(lost) is None
    job.require_model()
    weights = adapter(job)
    key = "jobs/changed/model/adapter_model.safetensors"
    store.put(key, weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ServiceError, match=r"adapter_model\.safetensors missing or changed"):
        job.deploy("wrong", options={"engine": "transformers"})
    store.put(key, weights[:-1])
    with pytest.raises(DamagedFilesError, match=r"adapter_model\.safetensors missing or changed"):
        job.deploy("short")
    until(lambda: processes_of(home) == [], timeout_s=30)


@LONG
def test_a_stop_that_is_not_heard_is_made_by_force(session: Session, home: Path, tiny: Path, prefs: Path) -> None:
    job = train(tiny, prefs, "deaf", steps=100_000)
    until(lambda: last_checkpoint(job) > 0)
    trainer_of(job).suspend()  # it gets no signal that it could heed
    job.stop(grace_s=3)
    assert job.status == "Stopped"
    until(lambda: processes_of(home) == [], timeout_s=30)
    assert last_checkpoint(job) > 0


@LONG
def test_a_runner_that_was_given_up_and_comes_back_leaves(
    session: Session, home: Path, tiny: Path, prefs: Path
) -> None:
    job = train(tiny, prefs, "frozen", steps=2 * STEPS)
    until(lambda: last_checkpoint(job) > 0)
    runner, trainer = psutil.Process(runner_pid(job)), trainer_of(job)
    runner.suspend()
    trainer.suspend()
    record = Record(session.store, "jobs", "frozen")
    record.advance("Failed", expect={"Running"}, reason="as another machine would, when its lease went silent")
    job.resume(wait=False)
    until(lambda: runner_pid(job) != runner.pid)
    runner.resume()
    until(lambda: is_over(trainer) and is_over(runner), timeout_s=30)
    job.wait(show_logs=False, timeout_s=120)
    assert (job.status, job.describe().attempt) == ("Succeeded", 2)
    assert [step for step, _ in losses(job)] == [*range(1, 2 * STEPS + 1)]
    until(lambda: processes_of(home) == [], timeout_s=30)
