"""What must hold before a second of compute is spent: memory that suffices, data that can be read. Knows no run.

Errors from here come before anything is written or started.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from palate.errors import ConfigurationError, DataError, MissingDependencyError, NotEnoughMemoryError
from palate.session import Session
from palate.store import open_parent
from palate_recipes.catalog import Model
from palate_recipes.hyperparameters import DeviceFacts, Resolved
from palate_trainer.spec.preferences import read_preferences

_GIB = 1024**3

TRAINER_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tensorboard")
"""Distributions without which the trainer cannot start."""

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_FULL_BYTES = {"float32": 16.0, "bfloat16": 16.0, "float16": 18.0}
"""Bytes a trained parameter: weight, gradient, two Adam moments (and an fp32 master copy under fp16)."""

_PROCESS_GIB = 0.7
"""What Python, torch and the libraries take before any weight."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """A preference file that has been read to its last row.

    Attributes:
        uri: Where it lies; a local path has become `file://`.
        sha256: Digest of its bytes.
        size: Bytes.
        rows: Rows that can be trained on.
        skipped: Rows that `bad_rows=skip` leaves out: number to fault.
    """

    uri: str
    sha256: str
    size: int
    rows: int
    skipped: dict[int, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        facts = {"uri": self.uri, "sha256": self.sha256, "bytes": self.size, "rows": self.rows}
        return {**facts, "skipped_rows": list(self.skipped)} if self.skipped else facts


def as_local_path(uri: str | Path) -> Path | None:
    """Returns the path that `uri` names on this machine, or None when it lies in an object store."""
    text = str(uri)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return None if "://" in text else Path(text).expanduser().absolute()


def check_input(
    channel: str,
    uri: str | Path,
    session: Session,
    *,
    strategy: Literal["dpo", "sft"],
    bad_rows: Literal["refuse", "skip"],
) -> Input:
    """Reads a preference file whole, from wherever it lies.

    Raises:
        DataError: It is missing or has unusable rows (with `bad_rows="skip"`: no usable one); names file, row, field and
            remedy.
        StoreError: The object store cannot be read.
    """
    if not isinstance(uri, str | Path) or not str(uri):
        raise ConfigurationError(f"inputs[{channel!r}]={uri!r} must be a path or a URI (file://, s3://, oss://)")
    with _at_hand(uri, session) as path:
        skipped: dict[int, str] = {}
        pairs = read_preferences(path, strategy=strategy, bad_rows=bad_rows, on_skip=skipped.__setitem__)
        data = path.read_bytes()
        local = as_local_path(uri)
        return Input(
            uri=f"file://{local}" if local else str(uri),
            sha256=hashlib.sha256(data).hexdigest(),
            size=len(data),
            rows=len(pairs),
            skipped=skipped,
        )


@contextmanager
def _at_hand(uri: str | Path, session: Session) -> Iterator[Path]:
    local = as_local_path(uri)
    if local is not None:
        yield local
        return
    store, name = open_parent(uri, options=session.options_for(str(uri)))
    import tempfile

    with tempfile.TemporaryDirectory(prefix="palate-") as folder:
        path = Path(folder) / name
        try:
            store.download(name, path)
        except FileNotFoundError as error:
            raise DataError(f"{uri} is not there: check bucket and key, or upload the file first") from error
        yield path


def check_trainer() -> None:
    """Raises MissingDependencyError when the trainer's libraries are not installed in this environment."""
    missing = [name for name in TRAINER_PACKAGES if not _installed(name)]
    if missing:
        raise MissingDependencyError(
            f"training on this machine needs {', '.join(missing)}, not installed here: pip install 'palate[train]'"
        )


def _installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def training_memory_gib(parameters: float, resolved: Resolved, *, method: str, gpus: int = 1) -> float:
    """Returns the memory that a training needs at least on each GPU, or on the machine without one, in GiB.

    A lower bound, on purpose: what it refuses cannot work, what it lets through may still be tight.

    Args:
        parameters: Of the model.
        resolved: Resolved hyperparameters: batch, length, quantisation, precision.
        method: `LoRA_LLM`, `QLoRA_LLM` or `Standard_LLM`.
        gpus: That take part; they share the weights under `fsdp=full_shard`, and else hold a copy each.
    """
    if method == "Standard_LLM":
        weights = parameters * _FULL_BYTES[resolved.precision]
    elif resolved.values["load_in_4bit"]:
        weights = parameters * 0.6  # NF4 with its block constants
    elif resolved.values["load_in_8bit"]:
        weights = parameters * 1.1
    else:
        weights = parameters * _BYTES[resolved.precision]
    if resolved.values["fsdp"] == "full_shard":
        weights /= max(1, gpus)
    return weights / _GIB + _PROCESS_GIB


def check_memory(
    model_name: str, parameters: float, resolved: Resolved, *, method: str, device: DeviceFacts, row: Model | None
) -> None:
    """Raises NotEnoughMemoryError when the training cannot fit the device; says what is needed, what is there, and the remedy."""
    if not parameters:
        return
    gpus = device.gpu_count if device.cuda else 1
    needed = training_memory_gib(parameters, resolved, method=method, gpus=gpus)
    there = device.gpu_memory_gib if device.cuda else device.memory_gib
    if not there or needed <= there:
        return
    where = (
        f"{device.gpu_name or 'the GPU'} has {there:.1f} GiB{f', {gpus} of them are here' if gpus > 1 else ''}"
        if device.cuda
        else f"this machine has {there:.1f} GiB free"
    )
    quantised = resolved.values["load_in_4bit"] or resolved.values["load_in_8bit"]
    remedies = []
    if method == "Standard_LLM":
        remedies.append('method="LoRA_LLM"')
    if device.cuda and not resolved.values["load_in_4bit"] and resolved.values["fsdp"] == "off":
        remedies.append('method="QLoRA_LLM"')
    if gpus > 1 and resolved.values["fsdp"] == "off" and not quantised:
        remedies.append('fsdp="full_shard"')
    remedies.append("a smaller model (`palate models`)")
    if row is not None and not device.cuda:
        remedies.append(f"a GPU with {row.min_gpu_memory(method):.0f} GiB")
    raise NotEnoughMemoryError(
        f"{model_name} with {method} in {resolved.precision} needs at least {needed:.1f} GiB of memory, {where}: "
        f"use {', or '.join(remedies)}"
    )
