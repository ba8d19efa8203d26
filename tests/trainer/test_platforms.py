"""The file contract of managed platforms, without a container: a folder in the place of the root, the trainer in processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from palate_recipes.specs.train import COMPLETE_MARK, EXIT_STOPPED
from palate_trainer.checkpoint_marker import is_whole, last_whole, mark_complete
from tests.slow.conftest import until
from tests.support.rows import preference_rows

slow = pytest.mark.slow

QUICK = {"training_strategy": "dpo", "gradient_accumulation_steps": "1", "logging_steps": "1", "max_steps": "4"}


def platform(
    root: Path, ml: str, *, model: Path | None = None, train: str = "train", **hyperparameters: object
) -> Path:
    """Lays out what a platform gives, and returns its folder."""
    folder = root / ml
    (folder / "input/config").mkdir(parents=True)
    (folder / "input/config/hyperparameters.json").write_text(json.dumps({**QUICK, **hyperparameters}))
    channel = folder / "input/data" / train
    channel.mkdir(parents=True)
    (channel / "prefs.json").write_text(json.dumps(preference_rows()))
    if model:
        (folder / "input/data/model").symlink_to(model)
    return folder


def command(root: Path) -> list[str]:
    return [sys.executable, "-m", "palate.runner", "train", "--root", str(root)]


def run(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(root), capture_output=True, text=True, timeout=300)


def steps(folder: Path, kind: str) -> list[int]:
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event["step"] for event in events if event["kind"] == kind]


@slow
def test_sagemaker_gives_strings_and_takes_the_model(tiny: Path, tmp_path: Path) -> None:
    sagemaker = {"training_strategy": '"dpo"', "sagemaker_region": '"eu-west-1"', "method": "LoRA_LLM"}
    ml = platform(tmp_path, "opt/ml", model=tiny, train="training", **sagemaker)
    (ml / "input/config/resourceconfig.json").write_text(json.dumps({"current_host": "a", "hosts": ["a"]}))
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"adapter_model.safetensors", "tokenizer.json", "probe.json"} <= {
        path.name for path in (ml / "model").iterdir()
    }
    assert steps(ml / "output/data", "train") == [1, 2, 3, 4]
    assert any((ml / "output/tensorboard").iterdir())
    assert not (ml / "output/failure").exists()


@slow
def test_pai_stops_a_training_which_goes_on_from_its_whole_checkpoint(tiny: Path, tmp_path: Path) -> None:
    ml = platform(tmp_path, "ml", model=tiny, max_steps=60, save_steps=1000, learning_rate=1e-4)
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command(tmp_path), stdout=output, stderr=subprocess.STDOUT)
    until(lambda: "step 3/" in log.read_text() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)  # what comes before spot capacity is taken away
    assert process.wait(60) == EXIT_STOPPED, log.read_text()
    checkpoint = last_whole(ml / "output/checkpoints")
    assert checkpoint is not None
    assert not list((ml / "output/model").iterdir())
    torn = shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-59"))  # a sync that was cut short
    next(torn.glob("*.safetensors")).write_bytes(b"")

    again = run(tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"resuming from {checkpoint}" in again.stdout
    assert steps(ml / "output", "train") == list(range(1, 61))
    assert (ml / "output/model/adapter_model.safetensors").exists()


@slow
@pytest.mark.thorough
def test_a_training_that_fails_says_why_in_the_failure_file(tiny: Path, tmp_path: Path) -> None:
    ml = platform(tmp_path, "opt/ml", model=tiny, seq_length=16)
    (ml / "input/data/train/prefs.json").write_text('[{"prompt": "Why?"}]')
    done = run(tmp_path)
    assert done.returncode == 1
    assert "`chosen` is missing" in (ml / "output/failure").read_text()


def test_what_cannot_be_trained_is_said_in_the_failure_file(tmp_path: Path) -> None:
    def failure(name: str, change: str | None = None, **hyperparameters: object) -> str:
        root = tmp_path / name
        ml = platform(root, "opt/ml", **hyperparameters)
        if change:
            exec_change[change](ml)
        done = run(root)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return (ml / "output/failure").read_text()

    def with_model(ml: Path) -> None:
        (ml / "input/data/model").mkdir()
        (ml / "input/data/model/config.json").write_text("{}")

    def two_files(ml: Path) -> None:
        with_model(ml)
        (ml / "input/data/train/more.json").write_text("[]")

    def two_machines(ml: Path) -> None:
        (ml / "input/config/resourceconfig.json").write_text('{"hosts": ["a", "b"]}')

    def no_json(ml: Path) -> None:
        (ml / "input/config/hyperparameters.json").write_text("{")

    exec_change = {"two files": two_files, "two machines": two_machines, "no json": no_json, "model": with_model}
    assert "channel 'model' is missing in" in failure("no-model")
    assert "more.json" in failure("two-files", "two files")
    assert "lists 2 machines" in failure("two-machines", "two machines")
    assert "is not valid JSON" in failure("no-json", "no json")
    assert "learning_rate" in failure("bad", "model", learning_rate="fast")


def test_without_a_platforms_folders_it_says_what_it_looked_for(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1
    assert str(tmp_path / "opt/ml/input") in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to_is_named(tmp_path: Path) -> None:
    ml = platform(tmp_path, "opt/ml")
    (ml / "model").mkdir(mode=0o500)
    (ml / "input/data/model").mkdir()
    (ml / "input/data/model/config.json").write_text("{}")
    assert run(tmp_path).returncode == 1
    assert "RUN_AS=root" in (ml / "output/failure").read_text()


def test_a_checkpoint_is_whole_as_long_as_its_files_are(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/weights").write_bytes(b"123")
    assert not is_whole(folder)
    mark_complete(folder)
    assert is_whole(folder)
    assert last_whole(tmp_path) == folder
    (folder / "deep/weights").write_bytes(b"12")
    assert not is_whole(folder)
    assert last_whole(tmp_path) is None
    (folder / COMPLETE_MARK).write_text("")  # written by a runner that compared digests
    assert is_whole(folder)
