"""What the container backend has and no other: limits, images, containers that somebody left. The rest is in tests/backends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from palate import ModelTrainingRecipe, TrainingJob, setup_default_session
from palate.errors import ConfigurationError, NotEnoughMemoryError, TrainingJobError, UnsupportedParameterError
from palate.model import RegisteredModel, ResourceConfig
from palate_recipes.errors import ImageMissingError
from tests.backends.hands import ContainerHands
from tests.slow.conftest import until
from tests.support.engine import Engine
from tests.support.images import Image, palate
from tests.support.trainings import SETTINGS

pytestmark = [pytest.mark.slow, pytest.mark.container, pytest.mark.timeout(3600)]


@pytest.fixture
def containers(engine: Engine, trainer: Image, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ContainerHands]:
    """Runs go to containers; afterwards none is left, running or not."""
    for name, value in {**engine.settings(), "PALATE_BACKEND": "container"}.items():
        monkeypatch.setenv(name, value)
    hands = ContainerHands(engine, home)
    yield hands
    until(lambda: hands.left() == [], timeout_s=30)


def train(
    model: Path, prefs: Path, name: str, *, wait: bool = True, memory: str = "4g", **settings: int
) -> TrainingJob:
    recipe = ModelTrainingRecipe(
        model_name="tiny",
        model_uri=str(model),
        hyperparameters={**SETTINGS, "max_steps": 30, **settings},
        instance_spec={"cpu": 2, "memory": memory},
        environments={"MY_KEY": "told-to-nobody"},
    )
    return recipe.train(inputs={"train": prefs}, wait=wait, job_name=name, show_logs=False)


def test_a_training_that_takes_too_much_memory_says_so(containers: ContainerHands, tiny: Path, tmp_path: Path) -> None:
    setup_default_session()
    # What can be foreseen is refused.
    with pytest.raises(NotEnoughMemoryError, match=r"the run's memory limit is 0\.29 GiB: use instance_spec="):
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


def test_limits_hold_and_a_container_that_nobody_waits_for_is_cleaned_up(
    containers: ContainerHands, tiny: Path, prefs: Path, engine: Engine
) -> None:
    job = train(tiny, prefs, "limited", wait=False, max_steps=100_000)
    assert job.manifest.body.placement["image_id"].startswith("sha256:")
    (facts,) = json.loads(engine.run("inspect", job.describe().engine_id.split(":")[2]).stdout)
    assert facts["HostConfig"]["Memory"] == 4 << 30
    assert facts["HostConfig"]["NanoCpus"] == 2_000_000_000
    assert facts["HostConfig"]["CapDrop"] == ["ALL"]
    assert clean(engine) == []
    store = job._run.session.store
    store.delete_tree(f"jobs/{job.id}/")  # as if its record had gone with another machine's palate delete
    (found,) = clean(engine, "--yes")
    assert (found["kind"], found["why"]) == ("orphan run", "its run was deleted")
    assert job.uri in found["what"]
    assert containers.left() == []


def clean(engine: Engine, *arguments: str) -> list[dict[str, str]]:
    done = palate(engine, "clean", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, str]] = json.loads(done.stdout)
    return found


def test_what_cannot_be_had_is_refused_before_anything_is_written(
    containers: ContainerHands, tiny: Path, prefs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = setup_default_session()
    monkeypatch.setenv("PALATE_TRAINER_IMAGE", "palate-trainer:never-cpu")
    with pytest.raises(ImageMissingError, match="palate images build trainer"):
        train(tiny, prefs, "none")
    monkeypatch.delenv("PALATE_TRAINER_IMAGE")
    for wrong, says in (
        ({"memory": "lots"}, "is not a size"),
        ({"memory": 0.01}, "below 64 MiB"),
        ({"cpu": 0}, "above 0"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            ModelTrainingRecipe(model_name="tiny", model_uri=str(tiny), instance_spec=wrong)
    with pytest.raises(ConfigurationError, match="resource_config gpu=1 is not supported"):
        RegisteredModel("smollm2-135m-instruct").deploy("never", resource_config=ResourceConfig(1, 2000, gpu=1))
    with pytest.raises(UnsupportedParameterError, match="there is one machine"):
        ModelTrainingRecipe(model_name="tiny", model_uri=str(tiny), instance_count=2)
    shutil.rmtree(session.store.root.removeprefix("file://"), ignore_errors=True)
    assert TrainingJob.list() == []
