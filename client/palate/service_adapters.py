"""Adds adapters to a service and removes them: checks, writes the record, waits for the running service. Knows no engine.

The record has the list. The service's runner reads it every two seconds, copies and verifies the files, and the server program
loads them into its engines. What it has reached is in the details of the service's status.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msgspec import ValidationError, structs

from palate.adapter_files import AdapterFiles, find_adapter
from palate.checksums import DIGESTS_FILE
from palate.common.utils import check_name
from palate.job import TrainingJob
from palate.preflight import check_adapter
from palate.runs import adapters
from palate.runs.handle import RunHandle
from palate.runs.record import ADAPTER_COPIES
from palate.runs.rollout import open_update
from palate.ui import note
from palate.weights import reachable_weights
from palate_recipes.catalog import find_model
from palate_recipes.errors import ConfigurationError, RunNotFoundError, ServiceError, WaitTimeoutError
from palate_recipes.servability import adapter_rank
from palate_recipes.specs.adapters import ServedAdapter, reserved
from palate_recipes.specs.codec import convert, decode, encode
from palate_recipes.specs.fleet import AdapterState
from palate_recipes.specs.rollout import version_name
from palate_recipes.specs.run import Deployment, ServeManifest, Status
from palate_recipes.specs.weights import BaseModel

if TYPE_CHECKING:
    from palate.predictor import HasModel

READY_LIMIT_S = 300.0
"""Time for the copy of an adapter and its load by every engine."""
REMOVED_LIMIT_S = 30.0
"""After this time a running service that still names a removed adapter counts as unable to follow."""
STALE_S = 15.0
"""A failure that was reported before an adapter was added is ignored for this time: it is that of an earlier try."""
_POLL_S = 0.5

MAX_RANK_DETAIL = "max_lora_rank"
"""Key of a status's details: the largest rank that the running engines accept."""

_JOB_URI = re.compile(r".*/jobs/[^/]+/?")


@dataclass(frozen=True, kw_only=True)
class ServiceAdapter:
    """An adapter of a service.

    Attributes:
        name: The model name in requests.
        state: `ready`: the service answers for it; `loading`; `failed`; or `not running`: the service serves it from its next start.
        reason: Why it failed.
        rank: Its LoRA rank.
        job: Id of the job that trained it; "" if it was given as a folder.
        uri: Folder with its files.
        digest: SHA-256 of the folder's digests.json.
        added_at: Seconds since the epoch.
    """

    name: str
    state: Literal["ready", "loading", "failed", "not running"]
    reason: str
    rank: int
    job: str
    uri: str
    digest: str
    added_at: float


@dataclass(frozen=True, kw_only=True)
class _Given:
    """What a caller wants to add.

    Attributes:
        what: What to call it in messages.
        uri: Folder with its files.
        digest: SHA-256 of its digests.json, from the job's status; None if nothing is known.
        job: Id of the job, or "".
        base: The job's base model; None for a folder.
    """

    what: str
    uri: str
    digest: str | None = None
    job: str = ""
    base: BaseModel | None = None


def listed(run: RunHandle) -> list[ServiceAdapter]:
    """Returns a service's adapters in the order in which they were added. Raises DamagedFilesError if the list is damaged."""
    status = run.refresh()
    found = []
    for one in adapters.read_adapters(run.record):
        state = _reported(status, one)
        found.append(
            ServiceAdapter(
                name=one.name,
                state="not running" if status.state != "Running" else state.state if state else "loading",
                reason=state.reason if state and status.state == "Running" else "",
                rank=one.rank,
                job=one.job,
                uri=one.uri,
                digest=one.digest,
                added_at=one.added_at,
            )
        )
    return found


def add(run: RunHandle, name: str, given: str | Path | HasModel, *, replace: bool, wait: bool) -> None:
    """Adds an adapter to a service. See `Predictor.add_adapter`."""
    check_name("adapter name", name)
    record = run.record
    if whose := reserved(name, record.name):
        raise ConfigurationError(f"adapter name {name!r} is {whose} in service {record.name}: choose another")
    manifest = record.serve_manifest()  # the current one: an update may have replaced it
    status = run.refresh()
    _check_service(record.name, manifest, status)
    _check_open_update(run, manifest)
    source = _read_given(given, run)
    files = find_adapter(source.uri, run.session, digest=source.digest)
    files.check_sizes()
    config = files.config()
    _check_base(source, config, manifest, run)
    check_adapter(config, manifest.body.model, run.session, name=source.what)
    rank = _check_rank(source.what, config, record.name, status)
    uri = _kept(files, run)
    entry = _valid(
        ServedAdapter(
            name=name, uri=uri, digest=files.digest, rank=rank, job=source.job, added_at=round(time.time(), 3)
        )
    )
    before = adapters.add(record, entry, replace=replace)
    if before is not None and (before.digest, before.uri) == (entry.digest, entry.uri):
        entry = before  # it was there already
    try:
        problem = _wait_until_ready(run, entry, before=before) if wait else None
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f"adapter {name} keeps loading: `palate adapter list {record.name}` shows its state")
        raise
    if problem is not None:
        if before is not entry and adapters.take_back(record, entry, before):
            _forget_copy(run, entry)
        raise problem
    if before is not None:
        _forget_copy(run, before)


def remove(run: RunHandle, name: str) -> None:
    """Removes an adapter from a service. See `Predictor.remove_adapter`."""
    removed = adapters.remove(run.record, name)
    begun = time.monotonic()
    while True:
        status = run.refresh()
        if status.state != "Running" or _reported(status, removed) is None:
            break
        if time.monotonic() - begun >= REMOVED_LIMIT_S:
            raise ServiceError(
                f"adapter {name} was removed from the record", reason=_cannot_follow(run.record.name, REMOVED_LIMIT_S)
            )
        time.sleep(_POLL_S)
    _forget_copy(run, removed)


def check_update(run: RunHandle, after: ServeManifest) -> None:
    """Raises ConfigurationError if a service's next model has another base than the adapters that were added to it."""
    names = [one.name for one in adapters.read_adapters(run.record)]
    if not names:
        return
    before = run.record.serve_manifest().body.model
    if not _keeps_base(before, after.body):
        raise ConfigurationError(
            f"service {run.record.name} has adapters ({', '.join(names)}) for {_shown(before)}, which it would no longer serve as "
            f"their base: remove them first (`palate adapter rm {run.record.name} {names[0]}`), or deploy the job under another name"
        )


# ── what is given ─────────────────────────────────────────────────────────────────────────────────────────────────


def _read_given(given: str | Path | HasModel, run: RunHandle) -> _Given:
    if isinstance(given, str | Path):
        if not str(given):
            raise ConfigurationError("job_or_uri is empty: give a job, its id, or the URI of a model folder")
        if isinstance(given, Path) or ("/" in given and not _JOB_URI.fullmatch(given)):
            return _Given(what=f"the adapter in {given}", uri=str(given))
        job: HasModel = _job(given.rstrip("/"), run)
    else:
        job = given
    served = job.served_model()
    if not served.adapter or served.tuned_uri is None:
        raise ConfigurationError(
            f"job {job.id} trained full weights, not an adapter: deploy it as a service of its own (`palate deploy {job.id}`)"
        )
    return _Given(
        what=f"the adapter of job {job.id}",
        uri=served.tuned_uri,
        digest=served.tuned_digest,
        job=job.id,
        base=served.model,
    )


def _job(name: str, run: RunHandle) -> TrainingJob:
    try:
        return TrainingJob.get(name, run.session)
    except RunNotFoundError as error:
        if Path(name).is_dir():
            raise RunNotFoundError(f"{error}. To give the folder {name!r}, write ./{name}") from None
        raise


def _kept(files: AdapterFiles, run: RunHandle) -> str:
    """Returns a URI that the service's runner can reach: of the original, or of a copy in the service's record.

    A folder of this machine may be unreachable for the runner, and gone at the next start. The service's own store is neither.
    """
    local, own = files.local_folder, run.record.store.local_path("")
    if local is None or (own is not None and local.resolve().is_relative_to(own.resolve())):
        return files.uri
    files.files.check_folder(local, what=files.uri, may_hold_more=True)
    store, prefix = run.record.store, run.record.key(ADAPTER_COPIES, files.digest)
    for name in files.files.files:
        store.upload(local / name, f"{prefix}/{name}")
    store.put(f"{prefix}/{DIGESTS_FILE}", files.listing)  # last: its presence means complete
    return store.uri(prefix)


def _forget_copy(run: RunHandle, adapter: ServedAdapter) -> None:
    """Deletes the record's own copy of an adapter, unless another entry names it."""
    prefix = run.record.key(ADAPTER_COPIES, adapter.digest)
    if adapter.uri != run.record.store.uri(prefix):
        return
    if all(one.uri != adapter.uri for one in adapters.read_adapters(run.record)):
        run.record.store.delete_tree(prefix)


def _valid(entry: ServedAdapter) -> ServedAdapter:
    try:
        return decode(encode(entry), ServedAdapter)
    except (ValueError, UnicodeEncodeError) as error:
        raise ConfigurationError(f"the adapter cannot be recorded: {error}") from None


# ── whether it fits ───────────────────────────────────────────────────────────────────────────────────────────────


def _check_service(name: str, manifest: ServeManifest, status: Status) -> None:
    """Raises ConfigurationError if the service cannot take adapters."""
    body = manifest.body
    if not body.adapter:
        served = "full weights" if body.tuned_uri else "a model without an adapter"
        raise ConfigurationError(
            f"service {name} serves {served}, so it has no base to which adapters could be added: deploy a job of LoRA_LLM or "
            "QLoRA_LLM, and add the others to its service"
        )
    if body.options.get("merge"):
        raise ConfigurationError(
            f"service {name} was deployed with merge=True, so it has no base to which adapters could be added: deploy the job without "
            "merge, and add the others to its service"
        )
    running = str(status.details.get("engine", "")) if status.state == "Running" else ""
    if body.options.get("engine") == "transformers" or running.startswith("transformers"):
        raise ConfigurationError(
            f"service {name} runs on the transformers engine, which serves one adapter: deploy it on vLLM (engine='vllm')"
        )


def _check_open_update(run: RunHandle, manifest: ServeManifest) -> None:
    """Raises ConfigurationError if an update is open after which the service would no longer serve this base."""
    update, base = open_update(run.record), manifest.body.model
    if update is None or _keeps_base(base, update.body):
        return
    name, version = run.record.name, version_name(update.body.version)
    raise ConfigurationError(
        f"service {name} has an update to {version} in progress, which does not serve {_shown(base)} as its base, so it could not "
        f"serve the adapter: withdraw the update first (`palate rollback {name}`), or complete it (`palate promote {name}`) and add "
        "an adapter for its base"
    )


def _keeps_base(base: BaseModel, after: Deployment) -> bool:
    """Whether a deployment serves an adapter on these weights."""
    return after.adapter and same_weights(base, after.model)


def _check_rank(what: str, config: Mapping[str, Any], service: str, status: Status) -> int:
    rank = adapter_rank(config)
    limit = status.details.get(MAX_RANK_DETAIL) if status.state == "Running" else None
    if rank < 1:
        raise ConfigurationError(f"{what} has rank {rank}: expected 1 or more")
    if isinstance(limit, int) and rank > limit:
        raise ConfigurationError(
            f"{what} has rank {rank}, and the engine of service {service} was started for ranks up to {limit}: deploy the service "
            "again from the job with the largest rank, and add the others to it"
        )
    return rank


def _check_base(given: _Given, config: Mapping[str, Any], manifest: ServeManifest, run: RunHandle) -> None:
    """Raises ConfigurationError unless an adapter was trained on the weights that the service serves as `base`."""
    body = manifest.body
    if given.base is not None:
        source = reachable_weights(given.base.source, run.session, run.backend)  # as the service's was
        base = structs.replace(given.base, source=source)
        if not same_weights(base, body.model):
            raise ConfigurationError(
                f"{given.what} was trained on {_shown(base)}, and service "
                f"{run.record.name} serves {_shown(body.model)}: both must have the same weights. Deploy the job as a service "
                "of its own"
            )
        return
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ConfigurationError(f"{given.what} does not name its base model (base_model_name_or_path): give its job")
    if _last(named) not in {_last(name) for name in _names(body)} and _catalog(named) not in {
        _catalog(name) for name in _names(body)
    } - {None}:
        raise ConfigurationError(
            f"{given.what} was trained on {named}, and service {run.record.name} serves {_shown(body.model)}: both must have the "
            "same weights"
        )


def same_weights(one: BaseModel, other: BaseModel) -> bool:
    """Returns whether two base models are the same weights from the same place."""
    return all(getattr(one.source, field) == getattr(other.source, field) for field in ("kind", "location", "revision"))


def _names(body: Deployment) -> list[str]:
    model = body.model
    return [model.name, *([model.hub_id] if model.hub_id else []), model.source.location]


def _shown(model: BaseModel) -> str:
    source = model.source
    return f"{model.name} ({source.kind} {source.location}{f' at {source.revision}' if source.revision else ''})"


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].casefold()


def _catalog(name: str) -> str | None:
    with suppress(LookupError):
        return find_model(name).name
    return None


# ── the running service ───────────────────────────────────────────────────────────────────────────────────────────


def _wait_until_ready(
    run: RunHandle, entry: ServedAdapter, *, before: ServedAdapter | None
) -> ServiceError | WaitTimeoutError | None:
    """Waits until the service answers for an adapter.

    Args:
        run: The service.
        entry: The adapter, as the record has it now.
        before: What had its name before.

    Returns:
        Why it does not answer for it. None if it does, or is not running.
    """
    name, active, begun = run.record.name, False, time.monotonic()
    what = f"adapter {entry.name} was not added to service {name}"
    if before is not None:
        what += ", which had it already" if before is entry else ", which keeps the previous one"
    status = run.refresh()
    state = _reported(status, entry)
    failed_before = state is not None and state.state == "failed"
    while not status.is_terminal and status.state != "Stopping":
        active = True
        if status.state == "Creating":  # its start has time limits of its own
            begun = time.monotonic()
        else:
            state, waited_s = _reported(status, entry), time.monotonic() - begun
            if state is not None and state.state == "ready":
                return None
            if state is not None and state.state == "failed" and not (failed_before and waited_s < STALE_S):
                return ServiceError(what, reason=state.reason or "its engine gave no reason")
            if waited_s >= READY_LIMIT_S and state is not None:
                return WaitTimeoutError(f"{what}: it was not loaded within {READY_LIMIT_S:g} s (`palate logs {name}`)")
            if waited_s >= READY_LIMIT_S:
                return WaitTimeoutError(f"{what}: {_cannot_follow(name, READY_LIMIT_S)}")
        time.sleep(_POLL_S)
        status = run.refresh()
    if active and status.state == "Failed":
        return ServiceError(f"{what}: it failed meanwhile", reason=status.reason, log_tail=[*status.log_tail])
    note(f"service {name} is {status.state}: it serves adapter {entry.name} from its next start")
    return None


def _reported(status: Status, adapter: ServedAdapter) -> AdapterState | None:
    """Returns what the service's status says about an adapter."""
    found = status.details.get("adapters")
    for item in found if isinstance(found, list) else []:
        try:
            state = convert(item, AdapterState)
        except ValidationError:  # another version's, or the record was changed
            continue
        if (state.name, state.digest) == (adapter.name, adapter.digest):
            return state
    return None


def _cannot_follow(name: str, limit_s: float) -> str:
    return (
        f"the running service has not followed within {limit_s:g} s: its runner cannot reach the store, or an earlier version of "
        f"Palate started it. `palate stop {name}` and `palate start {name}` apply the record"
    )
