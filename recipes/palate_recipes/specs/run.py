"""The records of a run: manifest, status, lease, and the index of a merged log, checked as they are read. Knows no store."""

from __future__ import annotations

import time
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct, field

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
from palate_recipes.specs.train import TrainSpec
from palate_recipes.specs.weights import BaseModel

State = Literal["Creating", "Running", "Stopping", "Succeeded", "Failed", "Stopped"]
TERMINAL: frozenset[State] = frozenset({"Succeeded", "Failed", "Stopped"})
ACTIVE: frozenset[State] = frozenset({"Creating", "Running", "Stopping"})

MANIFEST_SCHEMA = 1
STATUS_SCHEMA = 1
LEASE_SCHEMA = 1
"""Go up when a field gets another meaning. A new field is no new schema: readers leave out what they do not know."""


class Deployment(Struct, frozen=True, kw_only=True):
    """What a service serves, and how: the body of its manifest.

    Attributes:
        model: The base model.
        tuned_uri: What was trained: an adapter or whole weights; None serves the base alone.
        tuned_digest: SHA-256 of its list of files, which the runner checks them against; None checks nothing.
        adapter: Whether `tuned_uri` is an adapter on top of the base.
        system_prompt: What the model was trained with: `palate chat` begins with it.
        options: Fields of `palate_recipes.specs.serve.ServeSpec` as the user gave them.
        time_to_live_s: Seconds that it runs from its first answer on; None has no end.
        idle_time_to_live_s: Seconds without a request after which it ends; None has no end. Earlier versions wrote none.
        placement: Where it goes, as the backend said.
        more: What a newer writer said of it.
    """

    model: BaseModel
    tuned_uri: str | None = None
    tuned_digest: Sha256 | None = None
    adapter: bool = False
    system_prompt: str = ""
    options: dict[str, Any] = {}
    time_to_live_s: float | None = None
    idle_time_to_live_s: float | None = None
    placement: dict[str, Any] = {}
    more: dict[str, Any] = {}


_Body = TypeVar("_Body", TrainSpec, Deployment)


class _Manifest(Struct, Generic[_Body], frozen=True, kw_only=True, tag_field="kind"):
    """What reproduces a run. Holds no secret.

    Attributes:
        name: Job id or service name.
        backend: Name of the backend that the run was given to.
        body: What is trained, or served.
        labels: The user's key-value pairs.
        created_at: Seconds since the epoch, by the clock of the client.
        versions: Palate's version and Python's at submission.
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
        """The model's name for people."""
        return self.body.model.name


class TrainManifest(_Manifest[TrainSpec], frozen=True, kw_only=True, tag="train"):
    __doc__ = _Manifest.__doc__

    def encode(self) -> bytes:
        return encode(self)

    @classmethod
    def decode(cls, data: bytes) -> TrainManifest:
        """Raises ValueError when a field is missing that every manifest has, or one has another type."""
        return decode(data, cls)


class ServeManifest(_Manifest[Deployment], frozen=True, kw_only=True, tag="serve"):
    __doc__ = _Manifest.__doc__

    def encode(self) -> bytes:
        values = msgspec.to_builtins(self)
        return encode({**values, "body": spread(values["body"])})

    @classmethod
    def decode(cls, data: bytes) -> ServeManifest:
        """Raises ValueError when a field is missing that every manifest has, or one has another type."""
        values = parse_object(data)
        if "body" in values:
            values["body"] = gather(values["body"], Deployment)
        return typed(values, cls)


Manifest = TrainManifest | ServeManifest


class Attempt(Struct, frozen=True, kw_only=True):
    """An earlier attempt of a run.

    Attributes:
        attempt: Its number.
        reason, exit_code, started_at, finished_at: As of a `Status`, when it ended.
        more: What a newer writer said of it.
    """

    attempt: Ordinal
    reason: str = ""
    exit_code: Int | None = None
    started_at: float | None = None
    finished_at: float | None = None
    more: dict[str, Any] = {}


class Status(Struct, frozen=True, kw_only=True):
    """Where a run stands.

    Attributes:
        state: One of `State`.
        reason: Why it failed or stopped, in one message.
        log_tail: Last log lines of a failed run.
        attempt: Number of the attempt, from 1. Each runner works for one, and writes only while it is the current one.
        last_attempt: The attempt up to which a failure is tried again.
        attempts: The earlier attempts.
        start_id: Name of the start that `engine_id` came from; the lease of a runner names the one that it came from.
        engine_id: The backend's name for the process: a hint, never the truth.
        started_at, finished_at, updated_at: Seconds since the epoch.
        exit_code: Of the program, when it ended.
        endpoint: Base URL of a service that answers.
        details: Facts that came up in the run (versions, seconds, engine).
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
        """Raises ValueError when the state is missing, or a field has another type."""
        values = parse_object(data)
        if isinstance(values.get("attempts"), list):
            values["attempts"] = [gather(attempt, Attempt) for attempt in values["attempts"]]
        return typed(values, cls)


_LONGEST_S = 7 * 24 * 3600.0
"""Without a bound a lease of a hostile store would never count as lost."""

_Period = Annotated[float, Meta(gt=0, le=_LONGEST_S)]


class Lease(Struct, frozen=True, kw_only=True):
    """Who runs a run, and its heartbeat: what `lease.json` says.

    Attributes:
        holder: Random name of the runner.
        start_id: The start that the runner came from, or "" when it was started by hand.
        attempt: The attempt that it works for.
        beat: Goes up with every heartbeat.
        every_s: Seconds between two heartbeats.
        lost_after_s: Seconds without one after which the runner counts as lost.
        host: Where it runs, for people.
        machine, pid, pid_start: Where it runs, for a process of the same machine.
        released: It has ended in order.
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
        """Seconds after its last heartbeat for which no other evidence counts against its runner.

        What looks like a dead runner may be another machine's: a copy of a running machine has the mark of the original.
        """
        return min(2 * self.every_s, self.lost_after_s)


class MergedLog(Struct, frozen=True, kw_only=True):
    """Parts of a service's log that became one: numbers of the first and the last, and bytes."""

    first: Natural
    last: Natural
    size: Natural

    @property
    def name(self) -> str:
        return f"{self.first:06d}-{self.last:06d}.log"


class LogIndex(Struct, frozen=True, kw_only=True):
    """What `logs/index.json` says of a service's log.

    Attributes:
        merged: The merged parts, oldest first.
        following: Number of the first part that is there as it was written; those before it are merged or dropped.
    """

    merged: tuple[MergedLog, ...] = ()
    following: Natural = 1

    @property
    def size(self) -> int:
        return sum(merged.size for merged in self.merged)
