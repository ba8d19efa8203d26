"""The trainer image run by hand as SageMaker and PAI run it: folders mounted, the word `train`, a stop, a second start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from palate_recipes.specs.train import EXIT_STOPPED
from palate_trainer.checkpoint_marker import last_whole
from tests.slow.conftest import until
from tests.support.engine import Engine
from tests.support.images import Image
from tests.trainer.test_platforms import platform, steps

pytestmark = [pytest.mark.slow, pytest.mark.container, pytest.mark.timeout(3600)]


def laid_out(root: Path, ml: str, tiny: Path, **hyperparameters: object) -> Path:
    """A platform's folder that the image's user may write to, with the model as a copy: a link leads nowhere inside."""
    folder = platform(root, ml, **hyperparameters)
    shutil.copytree(tiny, folder / "input/data/model")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    return folder


def test_sagemaker_runs_it_unchanged(engine: Engine, trainer: Image, tiny: Path, tmp_path: Path) -> None:
    ml = laid_out(tmp_path, "opt/ml", tiny, training_strategy='"dpo"', sagemaker_region='"eu-west-1"')
    done = engine.run("run", "--rm", "--network=none", "--volume", f"{ml}:/opt/ml", trainer.name, "train", check=False)
    assert done.returncode == 0, done.stdout
    assert (ml / "model/adapter_model.safetensors").exists()
    assert steps(ml / "output/data", "train") == [1, 2, 3, 4]


def test_a_stop_leaves_a_whole_checkpoint_and_the_next_start_goes_on_from_it(
    engine: Engine, trainer: Image, tiny: Path, tmp_path: Path, container: Callable[..., str]
) -> None:
    ml = laid_out(tmp_path, "ml", tiny, max_steps=60, save_steps=1000, learning_rate=1e-4)
    arguments = ("--volume", f"{ml}:/ml", trainer.name, "train")
    id = container(*arguments)
    until(lambda: "step 3/" in engine.run("logs", id).stdout)
    engine.run("stop", "--time", "120", id)
    state = json.loads(engine.run("inspect", id).stdout)[0]["State"]
    assert state["ExitCode"] == EXIT_STOPPED
    checkpoint = last_whole(ml / "output/checkpoints")
    assert checkpoint is not None

    done = engine.run("run", "--rm", "--network=none", *arguments, check=False)
    assert done.returncode == 0, done.stdout
    assert f"resuming from /ml/output/checkpoints/{checkpoint.name}" in done.stdout
    assert steps(ml / "output", "train") == list(range(1, 61))


def test_folders_that_its_user_may_not_write_to_are_named(
    engine: Engine, trainer: Image, tiny: Path, tmp_path: Path
) -> None:
    ml = laid_out(tmp_path, "opt/ml", tiny)
    (ml / "model").mkdir(mode=0o755)
    done = engine.run("run", "--rm", "--network=none", "--volume", f"{ml}:/opt/ml", trainer.name, "train", check=False)
    assert done.returncode == 1
    assert "cannot write to /opt/ml/model" in (ml / "output/failure").read_text()
    assert "RUN_AS=root" in done.stdout
    as_root = engine.run(
        "run", "--rm", "--network=none", "--user=0", "--volume", f"{ml}:/opt/ml", trainer.name, "train", check=False
    )
    assert as_root.returncode == 0, as_root.stdout
