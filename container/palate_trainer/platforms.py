"""`python -m palate_trainer.platforms`: training by the file contract of managed platforms. Knows their folders, no cloud API.

Amazon SageMaker  /opt/ml    docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo.html
Alibaba PAI       /ml        the folders of PAI's SDK: input/data, input/config, output/model, output/checkpoints

<ml>/input/data/<channel>/               train, model; optional: validation, adapter
<ml>/input/config/hyperparameters.json   values by name, as strings or typed; also `method` and `model_name`
<ml>/model or <ml>/output/model          the tuned model
<ml>/checkpoints or <ml>/output/checkpoints   complete checkpoints; training resumes from the newest one
<ml>/output/failure                      the error message of a failed training
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate_recipes.device import local_device
from palate_recipes.errors import PalateError, TrainerError
from palate_recipes.hyperparameters import check_method, resolve
from palate_recipes.preferences.files import SUFFIXES
from palate_recipes.specs.train import (
    CHECKPOINTS_DIR,
    ERROR_FILE,
    EXIT_FAILED,
    METRICS_FILE,
    MODEL_DIR,
    TENSORBOARD_DIR,
    LocalFiles,
    TrainSpec,
    TrainTask,
)
from palate_recipes.specs.weights import BaseModel, WeightsSource
from palate_trainer.checkpoint_marker import last_whole
from palate_trainer.failures import explain

_CHANNELS = {
    "train": ("train", "training"),
    "validation": ("validation",),
    "model": ("model",),
    "adapter": ("adapter",),
}
"""Our channels and the folder names accepted for each. SageMaker's SDK calls a single input `training`."""

_OWN_NAMES = ("method", "model_name")
_PLATFORM_PREFIX = "sagemaker_"
"""Hyperparameters that SageMaker's SDK adds for its own images."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The folders of a platform."""

    root: Path
    model: Path
    checkpoints: Path
    output: Path
    results: Path

    @classmethod
    def find(cls, root: Path) -> Layout:
        """Returns the layout whose input folder exists. Raises TrainerError if there is none."""
        sagemaker, pai = root / "opt/ml", root / "ml"
        if (sagemaker / "input").is_dir():
            output = sagemaker / "output"
            return cls(
                root=sagemaker,
                model=sagemaker / "model",
                checkpoints=sagemaker / "checkpoints",
                output=output,
                results=output / "data",  # SageMaker stores this folder next to the model
            )
        if (pai / "input").is_dir():
            output = pai / "output"
            return cls(
                root=pai, model=output / "model", checkpoints=output / "checkpoints", output=output, results=output
            )
        raise TrainerError(
            f"neither {sagemaker / 'input'} nor {pai / 'input'} exists. `train` expects the folders of a managed platform:"
            " mount one with data/train, data/model and config/hyperparameters.json. To run a job in a store, pass its URI"
        )

    def failed(self, message: str) -> None:
        """Writes the message to the platform's failure file. The caller also prints it."""
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "failure").write_text(message.rstrip() + "\n", encoding="utf-8")
        except OSError as error:
            print(f"{self.output / 'failure'} cannot be written: {error}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Trains from the platform's folders. Returns the trainer's exit code: 0, EXIT_FAILED, or EXIT_STOPPED after SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="palate-run train", description="Train with the folder layout of a managed platform."
    )
    parser.add_argument("--root", type=Path, default=Path("/"), help="folder that contains opt/ml or ml")
    given = parser.parse_args(argv)
    try:
        layout = Layout.find(given.root)
    except TrainerError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    with tempfile.TemporaryDirectory(prefix="palate-train-") as scratch:
        output = Path(scratch) / "output"
        try:
            task = _read(layout, output)
            task.write(Path(scratch) / "spec.json")
        except (PalateError, OSError, ValueError) as error:
            message = explain(error)
            print(message, file=sys.stderr)
            layout.failed(message)
            return EXIT_FAILED
        from palate_trainer.__main__ import main as train

        code = EXIT_FAILED
        try:
            code = train([f"{scratch}/spec.json"])
            if code == 0:
                _hand_over(output / MODEL_DIR, layout.model)
                shutil.copyfile(output / METRICS_FILE, layout.results / METRICS_FILE)
        except OSError as error:
            code = EXIT_FAILED
            (output / ERROR_FILE).write_text(explain(error), encoding="utf-8")
        if code == EXIT_FAILED:
            error_file = output / ERROR_FILE
            layout.failed(
                error_file.read_text(encoding="utf-8") if error_file.exists() else "the trainer wrote no error message"
            )
        return code


def _read(layout: Layout, output: Path) -> TrainTask:
    """Builds the task from the platform's folders, and creates the folders that the trainer writes to."""
    _one_machine(layout)
    values = _hyperparameters(layout.root / "input/config/hyperparameters.json")
    method = str(values.pop("method", "LoRA_LLM"))
    model = _model_folder(layout)
    name = str(values.pop("model_name", "") or model.name)
    resolved = resolve(values, method=method, device=local_device())
    for note in resolved.notes:
        print(f"note: {note}", flush=True)
    adapter = _channel(layout, "adapter")
    output.mkdir(parents=True)
    for folder in (layout.model, layout.checkpoints, layout.results, layout.output / TENSORBOARD_DIR):
        _writable(folder)
    # Symlinks, because the platform uploads these while training runs. The model is copied only when it is complete.
    (output / CHECKPOINTS_DIR).symlink_to(layout.checkpoints)
    (output / TENSORBOARD_DIR).symlink_to(layout.output / TENSORBOARD_DIR)
    (output / METRICS_FILE).symlink_to(layout.checkpoints / METRICS_FILE)
    resume_from = last_whole(layout.checkpoints)
    _keep_metrics(layout.checkpoints / METRICS_FILE, resume_from)
    if resume_from:
        print(f"resuming from {resume_from}", flush=True)
    spec = TrainSpec(
        model=BaseModel(name=name, source=WeightsSource(kind="folder", location=str(model))),
        method=check_method(method),
        hyperparameters=resolved.values,
        precision=resolved.precision,
        notes=resolved.notes,
    )
    files = LocalFiles(
        model_dir=str(model),
        train_file=str(_data_file(layout, "train", wanted=True)),
        validation_file=_data_file(layout, "validation"),
        adapter_dir=str(adapter) if adapter else None,
        output_dir=str(output),
        resume_from=str(output / CHECKPOINTS_DIR / resume_from.name) if resume_from else None,
    )
    return TrainTask(spec=spec, files=files)


def _one_machine(layout: Layout) -> None:
    file = layout.root / "input/config/resourceconfig.json"
    hosts = json.loads(file.read_text(encoding="utf-8")).get("hosts", []) if file.is_file() else []
    if len(hosts) > 1:
        raise TrainerError(
            f"resourceconfig.json lists {len(hosts)} machines, but training runs on one. Set the instance count to 1"
        )


def _hyperparameters(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrainerError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise TrainerError(f"{file}: expected a JSON object of names and values, got {type(values).__name__}")
    return {name: _plain(value) for name, value in values.items() if not name.startswith(_PLATFORM_PREFIX)}


def _plain(value: object) -> object:
    """Removes the second pair of quotes that SageMaker's SDK puts around a string."""
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] == '"':
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _channel(layout: Layout, name: str) -> Path | None:
    data = layout.root / "input/data"
    return next((data / folder for folder in _CHANNELS[name] if (data / folder).is_dir()), None)


def _data_file(layout: Layout, name: str, *, wanted: bool = False) -> str | None:
    data = layout.root / "input/data"
    folder = _channel(layout, name)
    if folder is None:
        if wanted:
            there = ", ".join(sorted(entry.name for entry in data.iterdir())) if data.is_dir() else ""
            raise TrainerError(
                f"channel {name!r} is missing in {data} (found: {there or 'nothing'}). Add it with the preference data"
            )
        return None
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    data_files = [
        path for path in files if path.name.removesuffix(".gz").removesuffix(".zst").endswith(SUFFIXES)
    ] or files
    if len(data_files) != 1:
        names = ", ".join(path.name for path in data_files[:5])
        raise TrainerError(
            f"channel {folder}: expected one data file, found {len(data_files)} ({names}). Merge them into one"
        )
    return str(data_files[0])


def _model_folder(layout: Layout) -> Path:
    folder = _channel(layout, "model")
    if folder is None:
        raise TrainerError(
            f"channel 'model' is missing in {layout.root / 'input/data'}. Add it with the base model's folder (config, weights,"
            " tokenizer); the container downloads nothing"
        )
    configs = sorted(folder.rglob("config.json"), key=lambda path: len(path.parts))
    if not configs:
        raise TrainerError(f"channel 'model': {folder} has no config.json. Give it a complete, unpacked model folder")
    return configs[0].parent


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refused = not os.access(folder, os.W_OK)
    except PermissionError:
        refused = True
    if refused:
        raise TrainerError(
            f"user {os.geteuid()} cannot write to {folder}. Start the container as a user who can. If the platform mounts its"
            " folders for root only, build the image with RUN_AS=root"
        )


def _keep_metrics(file: Path, resume_from: Path | None) -> None:
    """Drops the events after the checkpoint, because the trainer will write them again."""
    events = file.read_text(encoding="utf-8").splitlines() if resume_from and file.exists() else []
    step = int(resume_from.name.rpartition("-")[2]) if resume_from else 0
    kept = [line for line in events if _step(line) <= step]
    file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step(line: str) -> float:
    try:
        event = json.loads(line)
    except ValueError:  # truncated when the machine died
        return float("inf")
    return float("inf") if event["kind"] == "end" else float(event["step"])


def _hand_over(model: Path, target: Path) -> None:
    """Copies the model. The target may be a mount owned by another user, so files are neither renamed nor chmodded there."""
    for path in sorted(model.rglob("*")):
        place = target / path.relative_to(model)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            shutil.copyfile(path, place)


if __name__ == "__main__":
    sys.exit(main())
