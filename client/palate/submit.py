"""Submits a training: checks everything, then writes the manifest and starts the run. Knows no recipe class.

The order matters: everything that can be rejected is rejected before the first key is written.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from msgspec.structs import replace

from palate.adapter_input import CHANNEL, keep_adapter, read_adapter
from palate.job import TrainingJob
from palate.preflight import (
    available_memory_gib,
    check_memory,
    check_trackers,
    check_trainer,
    serving_notes,
    servings_after,
    without_needless_notes,
)
from palate.runs.handle import RunHandle
from palate.runs.record import Record, check_manifest, versions
from palate.session import Session
from palate.sources.hub_model import check_architecture
from palate.sources.inputs import Input, PreferenceData, Rows, checked_inputs
from palate.ui import note
from palate.weights import config_at_hand, reachable_weights
from palate_recipes.catalog import Model
from palate_recipes.errors import ConfigurationError, HyperparameterError, NameTakenError
from palate_recipes.hyperparameters import differences, needs_validation
from palate_recipes.servability import require_servable
from palate_recipes.specs.run import TrainManifest
from palate_recipes.specs.train import TrainSpec
from palate_recipes.text import did_you_mean
from palate_recipes.training_memory import memory_warning, tokens_of_characters

CHANNELS = ("train", "validation", CHANNEL)

_shown_notes: set[str] = set()
"""Notes on changed defaults that this process has printed: the jobs of a sweep have the same ones."""


def submit(
    spec: TrainSpec,
    session: Session,
    *,
    inputs: Mapping[str, str | Path | Rows | PreferenceData],
    row: Model | None,
    job_name: str,
    labels: dict[str, str],
    environments: dict[str, str],
    announce: bool,
    notes: bool,
    servable: bool = True,
) -> TrainingJob:
    """Checks a training, writes its manifest, and starts its run.

    Args:
        spec: What to train. This function fills in its `inputs`.
        session: Store and backend.
        inputs: Preference data by channel, and an adapter to continue training.
        row: The model's catalog row, if it has one.
        job_name: The job's id.
        labels: Recorded in the manifest.
        environments: Environment variables of the trainer. Only their names are recorded.
        announce: Whether to print to stderr what was submitted.
        notes: Whether that includes the notes on changed defaults, which the log has too.
        servable: Whether to reject what no engine could serve.

    Raises:
        PalateError: Something cannot work. Nothing has been written. See `ModelTrainingRecipe.train`.
    """
    check_validation(spec, inputs)
    source = reachable_weights(spec.model.source, session, session.backend)
    spec = replace(spec, model=replace(spec.model, source=source))
    spec = without_needless_notes(spec, parameter_count(spec, row), session.backend.device(spec.placement))
    with checked_inputs(
        {channel: given for channel, given in inputs.items() if channel != CHANNEL},
        session,
        strategy=spec.hyperparameters.training_strategy,
        bad_rows=spec.hyperparameters.bad_rows,
    ) as checked:
        adapter = read_adapter(cast("str | Path", inputs[CHANNEL]), session) if CHANNEL in inputs else None
        if adapter:
            spec = adapter.settle(spec)
            if note := adapter.base_note(spec.model.name, row):
                spec = replace(spec, notes=(*spec.notes, note))
        if text := imitation_note(spec, checked):
            warnings.warn(text, UserWarning, stacklevel=4)  # the caller of train(), which has the decorator's frame
            spec = replace(spec, notes=(*spec.notes, text))
        config = config_at_hand(spec.model.source, session)
        engines = servings_after(spec, config, session)
        if servable:
            require_servable(engines, spec.model.name)
        spec = replace(spec, notes=(*spec.notes, *serving_notes(spec, config, engines, session)))
        record = Record(session.store, "jobs", job_name)
        for check in place_checks(spec, record, session, row):
            check()
        if text := peak_note(spec, parameter_count(spec, row), config, session, checked["train"]):
            warnings.warn(text, UserWarning, stacklevel=4)
            spec = replace(spec, notes=(*spec.notes, text))
        manifest = TrainManifest(
            name=job_name,
            backend=session.backend.name,
            body=spec,
            labels=labels,
            versions=versions(),
        )
        check_manifest(manifest)
        kept = {channel: item.keep(record, channel) for channel, item in checked.items()}
        if adapter:
            kept[CHANNEL] = keep_adapter(record, adapter, session).as_input()
        manifest = replace(manifest, body=replace(spec, inputs=kept))
        record.create(manifest)
        job = TrainingJob(record, session)
        RunHandle(record, session).start(environments)
        if announce:
            _announce(job, manifest.body, checked, notes=notes)
    return job


def imitation_note(spec: TrainSpec, checked: Mapping[str, Input]) -> str:
    """Returns a warning if pairs are trained on with SFT by default, as in PAI, and nobody asked for SFT; else ""."""
    if spec.hyperparameters.training_strategy != "sft" or "training_strategy" in spec.given:
        return ""
    if not any("unread-rejected" in item.report.findings for item in checked.values()):
        return ""
    return (
        "the rows are preference pairs, but training_strategy is sft, the default: `rejected` is ignored. For DPO set "
        'hyperparameters={"training_strategy": "dpo"}; to keep SFT without this warning set "sft"'
    )


def peak_note(spec: TrainSpec, parameters: float, config: dict[str, Any] | None, session: Session, train: Input) -> str:
    """Returns a warning if the training is expected to run out of memory; "" if its model is not known.

    From the characters of the rows: counting tokens loads the trainer's libraries, which takes seconds. A dry run counts them.
    """
    device = session.backend.device(spec.placement)
    values = spec.hyperparameters
    rows = tokens_of_characters(
        train.report.lengths, train.rows, strategy=values.training_strategy, seq_length=values.seq_length
    )
    return memory_warning(
        spec,
        parameters,
        config,
        rows,
        available_gib=available_memory_gib(device),
        cuda=device.cuda,
        gpus=max(1, device.gpu_count) if device.cuda else 1,
    )


def place_checks(
    spec: TrainSpec, record: Record | None, session: Session, row: Model | None
) -> list[Callable[[], None]]:
    """Returns the checks that reject a training that does not fit its machine or store, or whose name is taken, in order.

    Args:
        spec: The training.
        record: Where the job would be, or None if it has no name yet.
        session: Store and backend.
        row: The model's catalog row, if it has one.
    """

    def check_name_is_free() -> None:
        if record is not None and record.exists():
            raise NameTakenError(
                f"job name {record.name!r} is taken in {session.store.root}: choose another, or delete it first "
                f"(`palate delete {record.name}`)"
            )

    device = session.backend.device(spec.placement)
    source = spec.model.source
    here = session.backend.uses_this_python  # elsewhere the libraries are in the image
    return [
        *([check_trainer, lambda: check_trackers(spec)] if here else []),
        *([lambda: check_architecture(source)] if here and source.kind == "hub" and row is None else []),
        lambda: check_memory(spec, parameter_count(spec, row), device=device, row=row),
        lambda: session.store.check(),
        check_name_is_free,
    ]


def check_channels(inputs: Mapping[str, Any]) -> None:
    """Rejects input channels that do not exist, and a training without data."""
    if isinstance(inputs, str | Path):
        raise ConfigurationError(
            f'inputs is {str(inputs)!r}, not a dict by channel: give inputs={{"train": {json.dumps(str(inputs))}}}'
        )
    if not isinstance(inputs, Mapping):
        raise ConfigurationError(
            f'inputs is {type(inputs).__name__}, not a dict by channel: give inputs={{"train": …}} with the data as value'
        )
    for channel in inputs:
        if channel not in CHANNELS:
            hint = did_you_mean(channel, CHANNELS)
            raise ConfigurationError(
                f"inputs has an unknown channel {channel!r}: {hint}known are {', '.join(CHANNELS)}"
            )
    if "train" not in inputs:
        raise ConfigurationError('no training data: give inputs={"train": "<path or URI of a preference file>"}')


def check_validation(spec: TrainSpec, inputs: Mapping[str, Any]) -> None:
    """Rejects hyperparameters that compare evaluations, if there is no validation data.

    Raises:
        HyperparameterError: Names the hyperparameter.
    """
    if "validation" not in inputs and (setting := needs_validation(spec.hyperparameters)):
        raise HyperparameterError(
            f'{setting} compares evaluations, but there is no validation data: add inputs["validation"], or omit it'
        )


def parameter_count(spec: TrainSpec, row: Model | None) -> float:
    """Returns the number of parameters: from catalog or hub, else from the weights' size (taken as 16 bit), else 0."""
    source = spec.model.source
    return row.parameters_b * 1e9 if row is not None else source.parameters or source.size_bytes / 2


def _announce(job: TrainingJob, spec: TrainSpec, inputs: Mapping[str, Input], *, notes: bool) -> None:
    rows = ", ".join(f"{item.rows} rows for {channel}" for channel, item in inputs.items())
    lines = [
        f"job {job.id} submitted: {rows}",
        *(f"note: {text}" for text in spec.notes if notes and text not in _shown_notes),
    ]
    _shown_notes.update(spec.notes if notes else ())
    lines += [line for channel, item in inputs.items() for line in item.remarks(channel, skipped=notes)]
    shown = [f"{name}={value}" for name, value, _ in differences(spec.hyperparameters) if name != "precision"]
    more = f"; `palate show {job.id}` lists the data and settings" if shown else ""
    lines.append(f"{spec.method} in {spec.precision}, defaults but for: {', '.join(shown) or 'nothing'}{more}")
    note("\n".join(lines))
