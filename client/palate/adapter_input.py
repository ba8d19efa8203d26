"""An adapter as input of a training: read and checked before anything is written, copied, staged. Knows no training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from msgspec import structs

from palate.runs.record import Record
from palate.session import Session
from palate.store import open_parent
from palate.store.uri import normal_uri
from palate_recipes.catalog import Model, find_model
from palate_recipes.errors import ConfigurationError, DataError, HyperparameterError
from palate_recipes.lora_targets import ADAPTER_CONFIG, ADAPTER_FILES, AdapterShape
from palate_recipes.specs.train import InputFile, TrainSpec

CHANNEL = "adapter"


@dataclass(frozen=True, kw_only=True)
class AdapterInput:
    """An adapter that was found and read.

    Attributes:
        uri: Folder with adapter_config.json and adapter_model.safetensors.
        sha256: Digest of both files.
        size: Size of both files in bytes.
        shape: Hyperparameters that the adapter determines, and its base model.
    """

    uri: str
    sha256: str
    size: int
    shape: AdapterShape

    def as_input(self) -> InputFile:
        """Returns its entry in a manifest."""
        return InputFile(uri=self.uri, sha256=self.sha256, bytes=self.size)

    def settle(self, spec: TrainSpec) -> TrainSpec:
        """Returns the training with the adapter's shape in its hyperparameters.

        Raises:
            ConfigurationError: The method trains no adapter.
            HyperparameterError: A given value contradicts the adapter.
        """
        if spec.method == "Standard_LLM":
            raise ConfigurationError(
                f"inputs[{CHANNEL!r}] continues from an adapter, but Standard_LLM trains all weights: use LoRA_LLM or QLoRA_LLM"
            )
        if problems := self.shape.contradictions(spec.given):
            raise HyperparameterError(
                f"the hyperparameters contradict the adapter in {self.uri}:\n  " + "\n  ".join(problems)
            )
        return structs.replace(spec, hyperparameters=structs.replace(spec.hyperparameters, **self.shape.values()))

    def base_note(self, model_name: str, row: Model | None) -> str | None:
        """Returns a note if the adapter names another base that may still have the same weights, or None if it fits.

        Raises:
            ConfigurationError: It was trained on another model of the catalog.
        """
        base = self.shape.base_model
        names = {model_name, *([row.name, row.hub_id] if row else [])}
        if not base or _last(base) in {_last(name) for name in names}:
            return None
        known = _find(base)
        if known is not None and row is not None:
            if known.name == row.name:
                return None
            raise ConfigurationError(
                f"the adapter in {self.uri} was trained on {base}, not on {row.name}: give model_name={known.name!r}"
            )
        return (
            f"the adapter's base is {base}, and the model of this job is {model_name}: both must have the same weights."
        )


def read_adapter(uri: str | Path, session: Session) -> AdapterInput:
    """Reads an adapter from a folder or an object store.

    Raises:
        DataError: The folder has no LoRA adapter that Palate can continue from.
        StoreError: The object store cannot be read.
    """
    if not isinstance(uri, str | Path) or not str(uri):
        raise ConfigurationError(f"inputs[{CHANNEL!r}]={uri!r} must be a folder or its URI (file://, s3://, oss://)")
    where = normal_uri(uri)
    store, folder = open_parent(where, options=session.options_for(where))
    digest, size, config = hashlib.sha256(), 0, b""
    for name in ADAPTER_FILES:
        try:
            data = store.get(f"{folder}/{name}")
        except FileNotFoundError:
            raise DataError(
                f"{where} has no {name}: inputs[{CHANNEL!r}] must be the model folder of a finished LoRA run (job.model_uri)"
            ) from None
        digest.update(data)
        size += len(data)
        config = data if name == ADAPTER_CONFIG else config
    return AdapterInput(uri=where, sha256=digest.hexdigest(), size=size, shape=AdapterShape.parse(config, where=where))


def keep_adapter(record: Record, adapter: AdapterInput, session: Session) -> AdapterInput:
    """Copies an adapter from this machine to the job's folder, like preference files."""
    if not adapter.uri.startswith("file://"):
        return adapter
    folder = fetch_adapter(adapter.uri, session, Path())
    for name in ADAPTER_FILES:
        record.store.upload(folder / name, record.key("inputs", CHANNEL, name))
    return replace(adapter, uri=record.store.uri(record.key("inputs", CHANNEL)))


def fetch_adapter(uri: str, session: Session, target: Path) -> Path:
    """Returns a local folder with the adapter's files: the original if it is local, else `target` with copies."""
    store, folder = open_parent(uri, options=session.options_for(uri))
    local = store.local_path(folder)
    if local is not None:
        return local
    for name in ADAPTER_FILES:
        store.download(f"{folder}/{name}", target / name)
    return target


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].casefold()


def _find(name: str) -> Model | None:
    try:
        return find_model(name)
    except LookupError:
        return None
