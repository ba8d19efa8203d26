"""Estimates a training before it is submitted: rows, tokens, steps, memory, time. Knows the checks of `train()`; writes no run.

Downloads the data and, if needed, a tokenizer. Reads no weights, except that a model from a Python package is unpacked once, as its
first job would.
"""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from msgspec import structs

from palate.adapter_input import CHANNEL, read_adapter
from palate.paths import palate_home
from palate.preflight import (
    available_memory_gib,
    few_steps_note,
    optimizer_steps,
    serving_notes,
    servings_after,
    steps_per_epoch,
    training_memory_gib,
    without_needless_notes,
)
from palate.runs.list import RunFilter, find_runs
from palate.runs.record import Record, events_once
from palate.session import Session
from palate.sources.hub import connect, explained
from palate.sources.hub_model import HubModel
from palate.sources.inputs import Input, PreferenceData, Rows, checked_inputs
from palate.store import open_store
from palate.store.uri import check_key
from palate.submit import check_channels, check_validation, imitation_note, parameter_count, place_checks
from palate.weights import config_at_hand, fetch_weights
from palate_recipes.catalog import Model
from palate_recipes.errors import MissingDependencyError, PalateError, WeightsError
from palate_recipes.servability import ENGINES, choose, require_servable
from palate_recipes.specs.run import TrainManifest
from palate_recipes.specs.train import Measured, TrainSpec
from palate_recipes.specs.weights import WeightsSource
from palate_recipes.training_memory import RowTokens, memory_warning, peak_memory_gib

if TYPE_CHECKING:
    from palate_recipes.hyperparameters import DeviceFacts

_JOBS_READ = 20
"""Maximum number of earlier jobs whose metrics are read, newest first."""
_LISTING_S = 30.0
_LOWEST_RATE = 1e-9
"""Tokens per second. No job is slower than this, or faster than its inverse."""

_TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja", "additional_chat_templates/*")
"""What a tokenizer and its chat template need. An index of weight shards matches too; it has no weights."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimated size, memory and time of a training. A field is None if it is unknown; `errors` or `warnings` has the reason.

    Attributes:
        rows: Usable training rows.
        skipped_rows: Rows that `bad_rows="skip"` leaves out, and ties.
        tokens: Tokens trained on in one epoch, after truncation: the prompt of a pair once, as `tokens` of the metrics.
        longest_row: Tokens of the longest row before truncation: prompt and longer answer.
        median_row: Median of the same, in tokens.
        truncated_rows: Rows whose answer loses its end at `seq_length`.
        dropped_rows: Rows that are not trained on, because at `seq_length` no answer is left or both are the same.
        seq_length: Maximum tokens of prompt and answer.
        steps: Optimizer steps. Without token counts an upper bound: no row is taken as dropped.
        memory_gib: Minimum memory in GiB, by the formula that `train()` rejects with: weights, optimizer and libraries. Activations are
            not included. Per GPU, or of the machine without one. None if the model's size is not known.
        peak_memory_gib: Expected peak in GiB: with the activations of the largest batch, measured to within 11% on a CPU and not
            calibrated on a GPU. None without the model's size and config, without token counts, or with experts.
        memory_available_gib: What the device has in GiB; 0 if it is not known.
        backend: Name of the backend.
        device: `CPU`, or the GPU's name with its number.
        precision: Data type of weights and arithmetic.
        tokens_per_s: Lowest and highest `tokens_per_s` of earlier succeeded jobs with the same model, method, strategy, precision and
            device.
        seconds: Lowest and highest seconds of training at these rates. Start-up, reference, evaluations and saving are not included.
        rate_source: Ids of the jobs behind `tokens_per_s`.
        price: Lowest and highest price of `seconds`, in the currency of the given price per hour; None without one.
        serving: Of each engine, preferred first, how it can serve the result, or why not. Empty if the model's config is not here.
        errors: Why `train()` would raise, in its words.
        warnings: What `train()` would warn about, and what could not be estimated.
    """

    rows: int | None = None
    skipped_rows: int | None = None
    tokens: int | None = None
    longest_row: int | None = None
    median_row: int | None = None
    truncated_rows: int | None = None
    dropped_rows: int | None = None
    seq_length: int
    steps: int | None = None
    memory_gib: float | None = None
    peak_memory_gib: float | None = None
    memory_available_gib: float
    backend: str
    device: str
    precision: str
    tokens_per_s: tuple[float, float] | None = None
    seconds: tuple[float, float] | None = None
    rate_source: tuple[str, ...] = ()
    price: tuple[float, float] | None = None
    serving: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def estimate(
    spec: TrainSpec,
    session: Session,
    *,
    inputs: Mapping[str, str | Path | Rows | PreferenceData],
    row: Model | None,
    job_name: str | None,
    servable: bool = True,
) -> Estimate:
    """Runs the checks of `submit` and estimates the training. Returns problems instead of raising them.

    Args:
        spec: What to train, without its inputs.
        session: Store and backend.
        inputs: Preference data by channel, and an adapter to continue training.
        row: The model's catalog row, if it has one.
        job_name: The job's id, if it was given; checked whether it is taken.
        servable: Whether a result that no engine could serve is an error.
    """
    errors: list[str] = []
    warnings: list[str] = []

    def attempt(check: Callable[[], object]) -> None:
        try:
            check()
        except PalateError as error:
            if str(error) not in errors:
                errors.append(str(error))

    def continue_from_adapter() -> None:
        nonlocal spec
        adapter = read_adapter(cast("str | Path", inputs[CHANNEL]), session)
        spec = adapter.settle(spec)
        warnings.extend(filter(None, [adapter.base_note(spec.model.name, row)]))

    attempt(lambda: check_channels(inputs))
    if not isinstance(inputs, Mapping):
        inputs = {}  # check_channels has said so
    else:
        attempt(lambda: check_validation(spec, inputs))
    examples = 0
    if CHANNEL in inputs:
        attempt(continue_from_adapter)
    device = session.backend.device(spec.placement)
    parameters = parameter_count(spec, row)
    gpus = max(1, device.gpu_count) if device.cuda else 1
    found = Estimate(
        seq_length=spec.hyperparameters.seq_length,
        memory_gib=training_memory_gib(parameters, spec, gpus=gpus) if parameters else None,
        memory_available_gib=available_memory_gib(device),
        backend=session.backend.name,
        device=_device_name(device),
        precision=spec.precision,
    )
    if not parameters:
        warnings.append("the memory is not known: the model's size is in no catalog and in no listing")
    spec = without_needless_notes(spec, parameters, device)
    warnings += spec.notes
    config = config_at_hand(spec.model.source, session)
    engines = servings_after(spec, config, session)
    if servable:
        attempt(lambda: require_servable(engines, spec.model.name))
    if not servable or choose(engines, ENGINES)[0] is not None:
        warnings += serving_notes(spec, config, engines, session)
    if config is not None:
        found = replace(found, serving=tuple(map(str, engines)))
    data = {channel: given for channel, given in inputs.items() if channel in ("train", "validation")}
    try:
        with checked_inputs(
            data,
            session,
            strategy=spec.hyperparameters.training_strategy,
            bad_rows=spec.hyperparameters.bad_rows,
        ) as checked:
            if text := imitation_note(spec, checked):
                warnings.append(text)
            for channel, item in checked.items():
                warnings += [line.removeprefix("note: ") for line in item.remarks(channel, skipped=True)]
            if "train" in checked:
                measured = _measured(checked["train"], data["train"], spec, session, warnings)
                examples = checked["train"].rows if measured is None else measured["kept"]
                found = _with_rows(found, checked["train"], measured, examples, spec, gpus, errors)
                if measured is not None and examples:
                    rows = RowTokens(
                        examples, measured["tokens"] / examples, measured["deviation"], measured["largest"]
                    )
                    there: dict[str, Any] = {
                        "available_gib": found.memory_available_gib,
                        "cuda": device.cuda,
                        "gpus": gpus,
                    }
                    found = replace(found, peak_memory_gib=peak_memory_gib(spec, parameters, config, rows, **there))
                    # A training that is rejected already has an error with its own remedies.
                    if (found.memory_gib or 0.0) <= found.memory_available_gib:
                        warnings += filter(None, [memory_warning(spec, parameters, config, rows, **there)])
                if few := few_steps_note(examples, spec.hyperparameters, gpus=gpus):
                    warnings.append(few)
    except PalateError as error:
        errors.append(str(error))
    record = Record(session.store, "jobs", job_name) if job_name is not None else None
    for check in place_checks(spec, record, session, row):
        attempt(check)
    if found.tokens is not None:
        try:
            found = _with_time(found, examples, spec, session, gpus)
        except PalateError as error:
            warnings.append(f"earlier jobs cannot be read for their rate: {error}")
    return replace(found, errors=tuple(errors), warnings=tuple(warnings))


def _device_name(device: DeviceFacts) -> str:
    if not device.cuda:
        return "CPU"
    return f"{device.gpu_count} x {device.gpu_name}" if device.gpu_count > 1 else device.gpu_name or "GPU"


# ── rows and tokens ───────────────────────────────────────────────────────────────────────────────────────────────


def _measured(item: Input, given: object, spec: TrainSpec, session: Session, warnings: list[str]) -> Measured | None:
    """Counts the tokens. Without a tokenizer or the trainer, adds the reason to the warnings and returns None."""
    from palate.sources.token_stats import measure

    settings: dict[str, Any] = {}
    if isinstance(given, PreferenceData):
        settings = {
            "name": given.format,
            "input_columns": given.input_columns and dict(given.input_columns),
            "label_columns": given.label_columns and dict(given.label_columns),
            "prompt_template": given.prompt_template and str(Path(given.prompt_template).expanduser().absolute()),
            "prompt_name": given.prompt_name,
        }
    values = spec.hyperparameters
    try:
        with _tokenizer_folder(spec.model.source, session) as folder:
            return measure(
                replace(item.report, findings={}, lengths={}, histograms={}),
                [(path, str(path)) for path in item.fetched.files],
                tokenizer=str(folder),
                strategy=values.training_strategy,
                settings=settings,
                seq_length=values.seq_length,
                system_prompt=values.system_prompt,
                apply_chat_template=values.apply_chat_template,
            )
    except MissingDependencyError:
        warnings.append("the tokens are not counted: the trainer is not installed here (pip install 'palate[train]')")
    except PalateError as error:
        warnings.append(f"the tokens are not counted: {error}")
    return None


@contextmanager
def _tokenizer_folder(source: WeightsSource, session: Session) -> Iterator[Path]:
    """Provides a folder with the model's tokenizer and config, without its weights if they are not here already."""
    if source.kind in ("folder", "package"):
        yield fetch_weights(source, session, say=lambda line: None)[0]
    elif source.kind == "store":
        store = open_store(source.location, options=session.options_for(source.location))
        with tempfile.TemporaryDirectory(prefix="palate-") as work:
            for info in store.list(""):
                key = info.key.lstrip("/")
                # Path.match() compares the end of a path: without this, also checkpoints below, and keys with `..`.
                if not key.startswith("additional_chat_templates/") and "/" in key:
                    continue
                if any(Path(key).match(pattern) for pattern in _TOKENIZER_FILES):
                    store.download(check_key(key), Path(work) / key)
            yield Path(work)
    else:
        yield _hub_tokenizer(source)


def _hub_tokenizer(source: WeightsSource) -> Path:
    what = HubModel(source.location, source.revision or None)
    api, _, endpoint, kept, offline = connect(str(what), repo_type="model")
    with suppress(PalateError), explained(what, endpoint, True, absent=WeightsError):
        there = Path(api.snapshot_download(what.repo, revision=what.revision, local_files_only=True, **kept))
        if (there / "config.json").is_file():
            return there
    # A cache of its own: a snapshot without weights in the Hub's cache would look like a complete model offline.
    kept["cache_dir"] = palate_home() / "cache" / "tokenizers"
    with explained(what, endpoint, offline, absent=WeightsError):
        found = api.snapshot_download(
            what.repo, revision=what.revision, allow_patterns=list(_TOKENIZER_FILES), local_files_only=offline, **kept
        )
    return Path(found)


def _with_rows(
    found: Estimate,
    item: Input,
    measured: Measured | None,
    examples: int,
    spec: TrainSpec,
    gpus: int,
    errors: list[str],
) -> Estimate:
    """Adds rows, tokens and steps."""
    found = replace(found, rows=item.rows, skipped_rows=len(item.skipped))
    if measured is not None:
        found = replace(
            found,
            tokens=measured["tokens"],
            longest_row=measured["lengths"].get("max", 0),
            median_row=measured["lengths"].get("p50", 0),
            truncated_rows=measured["truncated_rows"],
            dropped_rows=measured["dropped_rows"],
        )
        if not examples:
            errors.append(f"train has no row left to train on at seq_length={found.seq_length}: raise it")
    return replace(found, steps=optimizer_steps(examples, spec.hyperparameters, gpus=gpus))


# ── time ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _with_time(found: Estimate, examples: int, spec: TrainSpec, session: Session, gpus: int) -> Estimate:
    """Adds the rates of earlier jobs and the time that follows from them."""
    rates = _earlier_rates(found.device, spec, session)
    values = spec.hyperparameters
    if not rates or not found.tokens or not found.steps:
        return found
    epochs = float(values.num_train_epochs)
    if values.max_steps:
        epochs = values.max_steps / steps_per_epoch(examples, values, gpus=gpus)
    low, high = min(rates.values()), max(rates.values())
    total = found.tokens * epochs
    return replace(
        found,
        tokens_per_s=(low, high),
        seconds=(round(total / high, 1), round(total / low, 1)),
        rate_source=tuple(rates),
    )


def _earlier_rates(device: str, spec: TrainSpec, session: Session) -> dict[str, float]:
    """Returns the tokens per second of earlier succeeded jobs with the same settings, by id. Changes no run."""
    wanted = RunFilter(model=glob.escape(spec.model.name))
    # Without states: reading them through the handle may start the next attempt of a lost job.
    runs = find_runs(session, "jobs", wanted, status=False, timeout_s=_LISTING_S).runs
    rates: dict[str, float] = {}
    for run in runs:
        manifest, record = run.manifest, run.handle.record
        if len(rates) == _JOBS_READ:
            break
        if not isinstance(manifest, TrainManifest) or not _is_alike(manifest.body, spec):
            continue
        if record.status().state != "Succeeded":
            continue
        events = events_once(record.metrics())
        start = next((event for event in events if event["kind"] == "start"), {})
        rate = events[-1].get("tokens_per_s") if events and events[-1]["kind"] == "end" else None
        # A store may contain anything, such as an integer too large for a float.
        if start.get("device") == device and isinstance(rate, int | float) and _LOWEST_RATE < rate < 1 / _LOWEST_RATE:
            rates[run.name] = float(rate)
    return rates


def _is_alike(body: TrainSpec, spec: TrainSpec) -> bool:
    """Whether two trainings have the same rate, apart from their data and batches."""
    same = ("training_strategy", "load_in_4bit", "load_in_8bit", "gradient_checkpointing")
    earlier, values = structs.asdict(body.hyperparameters), structs.asdict(spec.hyperparameters)
    return (body.method, body.precision) == (spec.method, spec.precision) and all(
        earlier[name] == values[name] for name in same
    )
