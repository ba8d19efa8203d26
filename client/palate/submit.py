"""From a recipe to a submitted job: all is checked, then the manifest is written and the run started. Knows no recipe class.

The order is the point: whatever can be refused is refused before the first key is written.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from palate.adapter_input import CHANNEL, keep_adapter, read_adapter
from palate.common.utils import check_name, unique_name
from palate.job import TrainingJob
from palate.preflight import check_memory, check_trainer
from palate.runs.handle import RunHandle
from palate.runs.record import Record
from palate.session import Session
from palate.sources.inputs import Input, PreferenceData, checked_inputs
from palate.ui import note
from palate.weights import WeightsSource, find_weights, reachable_weights
from palate_recipes import __version__
from palate_recipes.catalog import Model
from palate_recipes.errors import ConfigurationError, NameTakenError, UnsupportedParameterError
from palate_recipes.hyperparameters import Resolved
from palate_recipes.specs.run import Manifest
from palate_recipes.text import did_you_mean

CHANNELS = ("train", "validation", CHANNEL)


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """What a recipe asks for.

    Attributes:
        model_name: Name for people: of the catalog, or the user's own beside `model_uri`.
        model_uri, model_version: See `find_weights`.
        row: The catalog's row, when the name has one.
        method: `LoRA_LLM`, `QLoRA_LLM` or `Standard_LLM`.
        given: Hyperparameters as the user gave them, validated.
        resolved: The same with every default, for the machine that trains.
        inputs: Preference data by channel, and an adapter to go on from.
        job_name: The job's id, or None for a unique one that begins with `base_job_name`.
        base_job_name: See `job_name`.
        labels: Recorded.
        environments: For the trainer; only their names are recorded.
        max_run_time_s: Seconds until an attempt is ended, or None.
        max_attempts: How often the training is begun, at most.
        placement: Where it goes, as the backend said.
    """

    model_name: str
    model_uri: str | None
    model_version: str | None
    row: Model | None
    method: str
    given: dict[str, Any]
    resolved: Resolved
    inputs: Mapping[str, str | Path | PreferenceData]
    job_name: str | None
    base_job_name: str | None
    labels: dict[str, str]
    environments: dict[str, str]
    max_run_time_s: int | None
    max_attempts: int
    placement: dict[str, Any]


def submit(request: TrainingRequest, session: Session, *, announce: bool, notes: bool) -> TrainingJob:
    """Checks a request whole, writes its manifest, and starts its run.

    Args:
        request: What to train.
        session: Store and backend.
        announce: Say on stderr what was submitted.
        notes: Let that include the notes on changed defaults (a reader of the log sees them there).

    Raises:
        PalateError: Something cannot work; nothing has been written. See `ModelTrainingRecipe.train`.
    """
    values = request.resolved.values
    strategy, bad_rows = values["training_strategy"], values["bad_rows"]
    base_name = request.base_job_name or f"{request.model_name}-{strategy}"
    name = check_name("job_name", request.job_name or unique_name(base_name))
    _check_channels(request.inputs)
    source, row = find_weights(
        session,
        model_name=request.model_name if request.row or not request.model_uri else None,
        model_uri=request.model_uri,
        model_version=request.model_version,
    )
    source = reachable_weights(source, session, session.backend)
    with checked_inputs(
        {channel: given for channel, given in request.inputs.items() if channel != CHANNEL},
        session,
        strategy=strategy,
        bad_rows=bad_rows,
    ) as inputs:
        job, resolved = _submit(request, session, name, source, row, inputs)
        if announce:
            _announce(job, resolved, inputs, notes=notes)
    return job


def _submit(
    request: TrainingRequest,
    session: Session,
    name: str,
    source: WeightsSource,
    row: Model | None,
    inputs: Mapping[str, Input],
) -> tuple[TrainingJob, Resolved]:
    """What is left once weights and data are known to be good; the job, and the hyperparameters that it has."""
    resolved = request.resolved
    adapter = read_adapter(cast("str | Path", request.inputs[CHANNEL]), session) if CHANNEL in request.inputs else None
    if adapter:
        resolved = adapter.settle(resolved, request.given, method=request.method)
        if note := adapter.base_note(request.model_name, row):
            resolved = replace(resolved, notes=(*resolved.notes, note))
    if session.backend.uses_this_python:
        check_trainer()  # elsewhere the libraries are in the image
    check_memory(
        request.model_name,
        _parameters(source, row),
        resolved,
        method=request.method,
        device=session.backend.device(request.placement),
        row=row,
    )
    session.store.check()
    record = Record(session.store, "jobs", name)
    if record.exists():
        raise NameTakenError(
            f"job name {name!r} is taken in {session.store.root}: choose another, or delete it first (`palate delete {name}`)"
        )

    manifest = Manifest(
        kind="train",
        name=name,
        backend=session.backend.name,
        labels=request.labels,
        versions={"palate": __version__, "python": platform.python_version()},
        body={
            "model": {"name": request.model_name, "source": source.to_json(), "hub_id": row.hub_id if row else None},
            "method": request.method,
            "hyperparameters": dict(resolved.values),
            "given": request.given,
            "precision": resolved.precision,
            "notes": list(resolved.notes),
            "inputs": {
                **{channel: item.keep(record, channel) for channel, item in inputs.items()},
                **({CHANNEL: keep_adapter(record, adapter, session).to_json()} if adapter else {}),
            },
            "max_run_time_s": request.max_run_time_s,
            "max_attempts": request.max_attempts,
            "placement": request.placement,
            "environment_names": sorted(request.environments),
        },
    )
    record.create(manifest)
    job = TrainingJob(record, session)
    RunHandle(record, session).start(request.environments)
    return job, resolved


def _check_channels(inputs: Mapping[str, Any]) -> None:
    for channel in inputs:
        if channel not in CHANNELS:
            hint = did_you_mean(channel, CHANNELS)
            raise ConfigurationError(
                f"inputs has an unknown channel {channel!r}: {hint}known are {', '.join(CHANNELS)}"
            )
    if "train" not in inputs:
        raise ConfigurationError('no training data: give inputs={"train": "<path or URI of a preference file>"}')


def _parameters(source: WeightsSource, row: Model | None) -> float:
    """Returns the number of parameters: from the catalog, else from the weights' size (taken as 16 bit), else 0."""
    return row.parameters_b * 1e9 if row is not None else source.size_bytes / 2


def _announce(job: TrainingJob, resolved: Resolved, inputs: Mapping[str, Input], *, notes: bool) -> None:
    rows = ", ".join(f"{item.rows} rows for {channel}" for channel, item in inputs.items())
    lines = [f"job {job.id} submitted: {rows}", *(f"note: {text}" for text in resolved.notes if notes)]
    lines += [line for channel, item in inputs.items() for line in item.remarks(channel, skipped=notes)]
    shown = "  ".join(f"{name}={value}" for name, value in resolved.values.items() if name != "precision")
    lines += [f"precision={resolved.precision}  {shown}"]
    note("\n".join(lines))


_NO_MEANING = {
    "source_dir": "the training program is Palate's own; its behaviour is set by hyperparameters",
    "command": "the training program is Palate's own; its behaviour is set by hyperparameters",
    "requirements": "the training program runs in a pinned environment: add packages to the environment or the image",
    "job_type": "every training is one job of one program",
    "spot_spec": "where a run is placed is the backend's matter; it has no spot market",
    "resource_id": "where a run is placed is the backend's matter: choose backend=",
    "resource_type": "where a run is placed is the backend's matter: choose backend=",
    "user_vpc_config": "Palate knows endpoints, not Alibaba's networks",
    "experiment_config": "metrics and TensorBoard files lie beside the job: see job.metrics() and job.output_path('tensorboard')",
    "input_channels": f"the channels are fixed: {', '.join(CHANNELS)}",
    "output_channels": "outputs are fixed: model, checkpoints, tensorboard; see job.output_path()",
    "outputs": "outputs lie in the job's own prefix: see job.output_path(), and Session(store=…) to choose where jobs are kept",
    "inference_spec": "what a service runs follows from the job; options= sets engine, port and limits",
}


def refuse(**parameters: object) -> None:
    """Refuses each parameter that was given.

    Args:
        parameters: By name, which has a row here; None when it was left out.

    Raises:
        UnsupportedParameterError: Names the parameter, its value, and why it has no meaning here.
    """
    for name, value in parameters.items():
        if value is not None:
            raise UnsupportedParameterError(
                f"{name}={value!r} has no meaning in Palate: {_NO_MEANING[name]}. Leave it out"
            )
