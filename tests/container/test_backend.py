"""The container backend with a real engine: trained, stopped, resumed, served and gone, and nobody learns a secret on the way."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from palate import ModelTrainingRecipe, Session, TrainingJob, setup_default_session
from palate.errors import ConfigurationError, NotEnoughMemoryError, TrainingJobError, UnsupportedParameterError
from palate.images.errors import ImageMissingError
from tests.container.conftest import Image
from tests.slow.conftest import until
from tests.support.engine import Engine
from tests.support.seaweed import SeaweedServer

pytestmark = [pytest.mark.slow, pytest.mark.container, pytest.mark.timeout(3600)]

SETTINGS = {
    "training_strategy": "dpo",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "num_train_epochs": 1000,
    "max_steps": 30,
    "save_steps": 10,
}


@pytest.fixture
def containers(engine: Engine, trainer: Image, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs go to containers; afterwards none is left, running or not."""
    monkeypatch.setenv("DOCKER_HOST", engine.host)
    monkeypatch.setenv("PALATE_ENGINE", "docker")
    monkeypatch.setenv("PALATE_BACKEND", "container")
    before = set(engine.run("ps", "--all", "--quiet").stdout.split())
    yield
    left = set(engine.run("ps", "--all", "--quiet").stdout.split()) - before
    words = engine.run("ps", "--all").stdout
    if left:
        engine.run("rm", "--force", "--volumes", *left)
    assert not left, words


@pytest.fixture(params=["file", "s3"])
def container_session(request: pytest.FixtureRequest, containers: None, monkeypatch: pytest.MonkeyPatch) -> Session:
    if request.param == "s3":
        server: SeaweedServer = request.getfixturevalue("seaweed")
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PALATE_STORE", f"s3://{request.getfixturevalue('bucket')}/containers-{time.time_ns()}")
    return setup_default_session()


def train(
    model: Path, prefs: Path, name: str, *, wait: bool = True, memory: str = "4g", **settings: int
) -> TrainingJob:
    recipe = ModelTrainingRecipe(
        model_name="tiny",
        model_uri=str(model),
        hyperparameters={**SETTINGS, **settings},
        instance_spec={"cpu": 2, "memory": memory},
        environments={"MY_KEY": "told-to-nobody"},
    )
    return recipe.train(inputs={"train": prefs}, wait=wait, job_name=name, show_logs=False)


def the_container(engine: Engine, job: TrainingJob) -> str:
    (found,) = engine.run(
        "ps", "--all", "--quiet", "--no-trunc", "--filter", f"label=ai.palate.run={job.uri}"
    ).stdout.split()
    return found


def checkpoints(job: TrainingJob) -> list[str]:
    store = job._run.session.store
    return [info.key for info in store.list(f"jobs/{job.id}/checkpoints") if info.key.endswith("/.complete")]


def test_stopped_killed_and_resumed_it_equals_the_run_without_a_break(
    container_session: Session,
    engine: Engine,
    tiny: Path,
    prefs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = train(tiny, prefs, "whole")
    losses = [event["loss"] for event in whole.metrics() if event["kind"] == "train"]
    assert len(losses) == SETTINGS["max_steps"]
    assert whole.manifest.body["placement"]["image_id"].startswith("sha256:")

    job = train(tiny, prefs, "broken", wait=False)
    container = the_container(engine, job)
    seen = engine.run("inspect", container).stdout
    assert "told-to-nobody" not in seen
    assert (os.environ.get("AWS_SECRET_ACCESS_KEY") or "no key") not in seen
    (facts,) = json.loads(seen)
    assert facts["HostConfig"]["Memory"] == 4 << 30
    assert facts["HostConfig"]["NanoCpus"] == 2_000_000_000
    assert facts["HostConfig"]["CapDrop"] == ["ALL"]
    until(lambda: len(checkpoints(job)) > 0, timeout_s=600)
    engine.run("stop", "--time", "120", container)  # as an operator would, behind Palate's back
    with pytest.raises(TrainingJobError, match="stopped on request"):
        job.wait(show_logs=False, timeout_s=120)
    stopped_at = len(checkpoints(job))

    if container_session.store.root.startswith("s3://"):  # from another machine, which has the store's address alone
        monkeypatch.setenv("PALATE_HOME", str(tmp_path / "elsewhere"))
    resumed = TrainingJob.get("broken").resume(wait=False, environments={"MY_KEY": "told-to-nobody"})
    until(lambda: any("attempt 2, going on from checkpoint-" in line for line in resumed.logs()), timeout_s=300)
    until(lambda: resumed.status == "Running", timeout_s=60)
    engine.run("kill", the_container(engine, resumed))
    with pytest.raises(
        TrainingJobError, match="its runner is gone without a last word: its container ended with exit code 137"
    ):
        resumed.wait(show_logs=False, timeout_s=120)
    TrainingJob.get("broken").resume(show_logs=False, environments={"MY_KEY": "told-to-nobody"})
    assert stopped_at > 0
    found = [event["loss"] for event in resumed.metrics() if event["kind"] == "train"]
    assert found == pytest.approx(losses, abs=1e-5)
    assert "told-to-nobody" not in "\n".join(resumed.logs())


def test_a_training_that_takes_too_much_memory_says_so(containers: None, tiny: Path, tmp_path: Path) -> None:
    setup_default_session()
    with pytest.raises(NotEnoughMemoryError, match=r"has 0\.3 GiB free"):  # what can be foreseen is refused
        train(tiny, _long_rows(tmp_path, words=1), "foreseen", memory="300m")
    with pytest.raises(TrainingJobError, match=r"out of memory.*its memory limit of 0\.781 GiB.*instance_spec"):
        train(
            tiny,
            _long_rows(tmp_path, words=1900),
            "large",
            memory="800m",
            seq_length=2048,
            per_device_train_batch_size=16,
        )


def _long_rows(folder: Path, *, words: int) -> Path:
    path = folder / "long.json"
    rows = [{"prompt": f"Say {n}", "chosen": f"{n} " * words, "rejected": "no " * words} for n in range(32)]
    path.write_text(json.dumps(rows))
    return path


def test_what_was_trained_is_served(
    container_session: Session, engine: Engine, server: Image, base_model: Path, prefs: Path
) -> None:
    if container_session.store.root.startswith("file") and os.environ.get("PALATE_TEST_THOROUGH") != "1":
        pytest.skip("a further case; PALATE_TEST_THOROUGH=1 runs it")
    job = train(base_model, prefs, "real", max_steps=2)
    with job.deploy("served", options={"max_model_len": 512}) as predictor:
        token = predictor.access_token
        running = engine.run("ps", "--quiet").stdout.split()
        assert token not in engine.run("inspect", *running).stdout
        assert [model.id for model in predictor.openai().models.list().data][-1] == "base"
        reply = predictor.openai().chat.completions.create(
            model="default", messages=[{"role": "user", "content": "Is 4 even?"}], max_tokens=8
        )
        assert reply.choices[0].message.content
        predictor.stop_service()
        assert predictor.service_status == "Stopped"
        predictor.start_service()
        assert predictor.predict({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4})["choices"]


def test_what_cannot_be_had_is_refused_before_anything_is_written(
    containers: None, tiny: Path, prefs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = setup_default_session()
    monkeypatch.setenv("PALATE_TRAINER_IMAGE", "palate-trainer:never-cpu")
    with pytest.raises(ImageMissingError, match="palate images build trainer"):
        train(tiny, prefs, "none")
    monkeypatch.delenv("PALATE_TRAINER_IMAGE")
    for wrong, says in (
        ({"memory": "lots"}, "is no size"),
        ({"memory": 0.01}, "below 64 MiB"),
        ({"cpu": 0}, "above 0"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            ModelTrainingRecipe(model_name="tiny", model_uri=str(tiny), instance_spec=wrong)
    with pytest.raises(UnsupportedParameterError, match="there is one machine"):
        ModelTrainingRecipe(model_name="tiny", model_uri=str(tiny), instance_count=2)
    shutil.rmtree(session.store.root.removeprefix("file://"), ignore_errors=True)
    assert TrainingJob.list() == []
