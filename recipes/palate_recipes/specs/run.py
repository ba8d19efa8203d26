"""The records of a run: manifest, status, lease, renewal and log index. Reading one validates it. Knows no store."""

from __future__ import annotations

import time
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, field

from palate_recipes.specs.codec import (
    Int,
    Natural,
    Ordinal,
    Sha256,
    decode,
    encode,
    gather,
    parse_object,
    spread,
    typed,
)
from palate_recipes.specs.evaluation import EvaluationSpec
from palate_recipes.specs.train import TrainSpec
from palate_recipes.specs.weights import BaseModel

Kind = Literal["jobs", "services", "evaluations"]
"""Folder of a store that a run is in: trainings, services, and evaluations of trained models."""
KINDS: tuple[Kind, ...] = get_args(Kind)

State = Literal["Creating", "Running", "Stopping", "Succeeded", "Failed", "Stopped"]
TERMINAL: frozenset[State] = frozenset({"Succeeded", "Failed", "Stopped"})
ACTIVE: frozenset[State] = frozenset({"Creating", "Running", "Stopping"})

MANIFEST_SCHEMA = 1
STATUS_SCHEMA = 1
LEASE_SCHEMA = 1
RENEWAL_SCHEMA = 1
"""Incremented when the meaning of a field changes. A new field keeps the version: readers ignore unknown fields."""

VERSIONS_LIMIT = 999_999
"""Largest number of a service's version."""
INSTANCES_LIMIT = 64
"""Maximum number of engines of one version of a service."""


class Deployment(Struct, frozen=True, kw_only=True):
    """What a service serves and how. The body of its manifest.

    Attributes:
        model: The base model.
        tuned_uri: The adapter or full weights that were trained; None serves only the base.
        tuned_digest: SHA-256 of the tuned model's digests.json, or of a checkpoint's marker, which the runner checks files against;
            None checks nothing.
        checkpoint: Name of the checkpoint that `tuned_uri` is; unset for the model of a finished job.
        adapter: Whether `tuned_uri` is an adapter for the base.
        system_prompt: The system prompt used in training; `palate chat` starts with it.
        options: Options of `deploy()` as the user gave them: fields of `palate_recipes.specs.serve.ServeSpec`, options of vLLM by
            type (`palate_recipes.engine_options`), and `merge`.
        time_to_live_s: Seconds from the first answer until the service stops; None means no limit.
        idle_time_to_live_s: Seconds without a request until the service stops; None means no limit. Earlier versions did not write it.
        placement: The placement, as the backend returned it.
        version: Number of the service's version that this is; each update has a number of its own. Earlier versions of Palate did not
            write it.
        instances: Engines that answer requests. Earlier versions of Palate did not write it.
        more: Fields that a newer version wrote.
    """

    model: BaseModel
    tuned_uri: str | None = None
    tuned_digest: Sha256 | None = None
    checkpoint: str | UnsetType = UNSET
    adapter: bool = False
    system_prompt: str = ""
    options: dict[str, Any] = {}
    time_to_live_s: float | None = None
    idle_time_to_live_s: float | None = None
    placement: dict[str, Any] = {}
    version: Annotated[int, Meta(ge=1, le=VERSIONS_LIMIT)] = 1
    instances: Annotated[int, Meta(ge=1, le=INSTANCES_LIMIT)] = 1
    more: dict[str, Any] = {}


_Body = TypeVar("_Body", TrainSpec, Deployment, EvaluationSpec)


class _Manifest(Struct, Generic[_Body], frozen=True, kw_only=True, tag_field="kind"):
    """What is needed to reproduce a run. Contains no secrets.

    Attributes:
        name: Job id, or name of a service or evaluation.
        backend: Name of the backend that runs it.
        body: The training, the deployment or the evaluation.
        labels: The user's key-value pairs.
        created_at: Seconds since the epoch, by the client's clock.
        versions: Versions of Palate and Python at submission.
    """

    name: str
    backend: str
    body: _Body
    labels: dict[str, str] = {}
    created_at: float = field(default_factory=time.time)
    versions: dict[str, str] = {}
    schema: Int = MANIFEST_SCHEMA

    @property
    def model_name(self) -> str:
        """The model's display name."""
        return self.body.model.name


class TrainManifest(_Manifest[TrainSpec], frozen=True, kw_only=True, tag="train"):
    __doc__ = _Manifest.__doc__

    def encode(self) -> bytes:
        return encode(self)

    @classmethod
    def decode(cls, data: bytes) -> TrainManifest:
        """Raises ValueError if a required field is missing or a field has the wrong type."""
        return decode(data, cls)


class ServeManifest(_Manifest[Deployment], frozen=True, kw_only=True, tag="serve"):
    __doc__ = _Manifest.__doc__

    def encode(self) -> bytes:
        return encode_deployed(self)

    @classmethod
    def decode(cls, data: bytes) -> ServeManifest:
        """Raises ValueError if a required field is missing or a field has the wrong type."""
        return typed(parse_deployed(data), cls)


class EvaluateManifest(_Manifest[EvaluationSpec], frozen=True, kw_only=True, tag="evaluate"):
    __doc__ = _Manifest.__doc__

    def encode(self) -> bytes:
        return encode(self)

    @classmethod
    def decode(cls, data: bytes) -> EvaluateManifest:
        """Raises ValueError if a required field is missing or a field has the wrong type."""
        return decode(data, cls)


def encode_deployed(record: Struct) -> bytes:
    """Returns a record whose `body` is a Deployment as JSON. A service that was never updated or scaled is written as ever."""
    values = msgspec.to_builtins(record)
    body = spread(values["body"])
    for name in ("version", "instances"):
        if body[name] == 1:
            del body[name]
    return encode({**values, "body": body})


def parse_deployed(data: bytes) -> dict[str, Any]:
    """Returns the values of a record whose `body` is a Deployment. Raises ValueError if it is not an object."""
    values = parse_object(data)
    if "body" in values:
        values["body"] = gather(values["body"], Deployment)
    return values


Manifest = TrainManifest | ServeManifest | EvaluateManifest


class Attempt(Struct, frozen=True, kw_only=True):
    """An earlier attempt of a run.

    Attributes:
        attempt: Number of the attempt.
        reason, exit_code, started_at, finished_at: As in `Status` when it ended.
        more: Fields that a newer version wrote.
    """

    attempt: Ordinal
    reason: str = ""
    exit_code: Int | None = None
    started_at: float | None = None
    finished_at: float | None = None
    more: dict[str, Any] = {}


class Status(Struct, frozen=True, kw_only=True):
    """The state of a run.

    Attributes:
        state: One of `State`.
        reason: Why it failed or stopped.
        log_tail: Last log lines of a failed run.
        attempt: Number of the attempt, from 1. A runner works for one attempt, and writes only while it is the current one.
        last_attempt: Number of the last attempt. Failures of earlier attempts are retried.
        attempts: Earlier attempts.
        start_id: Id of the start that `engine_id` belongs to. A runner's lease has the id of its own start.
        engine_id: The backend's id of the process. Only a hint: the store decides.
        started_at, finished_at, updated_at: Seconds since the epoch.
        exit_code: Exit code of the program, once it has ended.
        endpoint: Base URL of a running service.
        details: Facts found during the run (versions, durations, engine).
    """

    state: State
    reason: str = ""
    log_tail: tuple[str, ...] = ()
    attempt: Ordinal = 1
    last_attempt: Ordinal = 1
    attempts: tuple[Attempt, ...] = ()
    start_id: str = ""
    engine_id: str = ""
    started_at: float | None = None
    finished_at: float | None = None
    updated_at: float = 0.0
    exit_code: Int | None = None
    endpoint: str = ""
    details: dict[str, Any] = {}
    schema: Int = STATUS_SCHEMA

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL

    def encode(self) -> bytes:
        values = msgspec.to_builtins(self)
        return encode({**values, "attempts": [spread(attempt) for attempt in values["attempts"]]})

    @classmethod
    def decode(cls, data: bytes) -> Status:
        """Raises ValueError if the state is missing or a field has the wrong type."""
        values = parse_object(data)
        if isinstance(values.get("attempts"), list):
            values["attempts"] = [gather(attempt, Attempt) for attempt in values["attempts"]]
        return typed(values, cls)


_LONGEST_S = 7 * 24 * 3600.0
"""Without this limit a lease in a hostile store would never expire."""

_Period = Annotated[float, Meta(gt=0, le=_LONGEST_S)]


class Lease(Struct, frozen=True, kw_only=True):
    """The runner of a run and its heartbeat: the content of `lease.json`.

    Attributes:
        holder: Random name of the runner.
        start_id: Id of the start that the runner belongs to, or "" if it was started by hand.
        attempt: The attempt that it works for.
        beat: Incremented with every heartbeat.
        every_s: Seconds between two heartbeats.
        lost_after_s: Seconds without a heartbeat after which the runner counts as lost.
        host: Host name, for messages.
        machine, pid, pid_start: Identify the runner for processes on the same machine.
        released: The runner has ended normally.
    """

    holder: str
    start_id: str = ""
    attempt: Int
    beat: Int
    every_s: _Period
    lost_after_s: _Period
    host: str = ""
    machine: str = ""
    pid: Int = 0
    pid_start: str = ""
    released: bool
    schema: Int

    @property
    def fresh_s(self) -> float:
        """Seconds after the last heartbeat in which no other evidence counts against the runner.

        A runner that looks dead here may run on another machine: a clone of a running machine has the mark of the original.
        """
        return min(2 * self.every_s, self.lost_after_s)


LONGEST_LIFE_S = 10 * 365 * 24 * 3600.0
"""Maximum of a renewed time to live. Without a limit a hostile store could name an end that no calendar has."""


class Renewal(Struct, frozen=True, kw_only=True):
    """A service's time to live in place of the one in its manifest: the content of `renewal.json`.

    Attributes:
        id: Random name. A running service that sees a new one counts from that moment; a start counts from its first answer.
        time_to_live_s: Seconds until the service stops; None means no limit.
    """

    id: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
    time_to_live_s: Annotated[float, Meta(gt=0, le=LONGEST_LIFE_S)] | None
    schema: Int = RENEWAL_SCHEMA


class MergedLog(Struct, frozen=True, kw_only=True):
    """Several parts of a service's log merged into one: number of the first and last part, and size in bytes."""

    first: Natural
    last: Natural
    size: Natural

    @property
    def name(self) -> str:
        return f"{self.first:06d}-{self.last:06d}.log"


class LogIndex(Struct, frozen=True, kw_only=True):
    """The content of `logs/index.json`: which parts of a service's log were merged.

    Attributes:
        merged: The merged parts, oldest first.
        following: Number of the first part that is still stored as written. Earlier parts are merged or deleted.
    """

    merged: tuple[MergedLog, ...] = ()
    following: Natural = 1

    @property
    def size(self) -> int:
        return sum(merged.size for merged in self.merged)
