"""The records of a run: manifest, status, and the index of a merged log, checked as they are read from a store. Knows no store."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

_LARGEST = 64 * 1024**2
"""Bytes. A record of Palate has some KiB; parsing takes a multiple of an object's size in memory."""


def parse_object(data: bytes) -> dict[str, Any]:
    """Returns the JSON object that `data` is.

    Raises:
        ValueError: It is too large, not UTF-8, not JSON, nested too deeply, not an object, or holds what cannot be written
            again (half a character). The message says which, in one line.
    """
    if len(data) > _LARGEST:
        raise ValueError(f"it has {len(data):,} bytes, more than {_LARGEST:,}")
    try:
        values = json.loads(data)
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"it is {type(values).__name__}, not an object")
    return values


def is_kind(value: object, kind: type | tuple[type, ...]) -> bool:
    """Says whether a JSON value has one of these types: a bool is not a number, and a number can be calculated with."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, bool):
        return bool in kinds
    if not isinstance(value, kinds):
        return False
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return False
    return not isinstance(value, float) or math.isfinite(value)


def check_fields(values: dict[str, Any], kinds: dict[str, type | tuple[type, ...]], *, of: str = "") -> None:
    """Raises ValueError when a field that is there has another type."""
    for name, kind in kinds.items():
        if name in values and not is_kind(values[name], kind):
            raise ValueError(f"{of}{name} is {shown(values[name])}")


def shown(value: object) -> str:
    """Returns a value for a message, cut where nobody reads on."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


State = Literal["Creating", "Running", "Stopping", "Succeeded", "Failed", "Stopped"]
TERMINAL: frozenset[State] = frozenset({"Succeeded", "Failed", "Stopped"})
ACTIVE: frozenset[State] = frozenset({"Creating", "Running", "Stopping"})

MANIFEST_SCHEMA = 1
STATUS_SCHEMA = 1
"""Go up when a field gets another meaning. A new field is no new schema: readers leave out what they do not know."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What reproduces a run. Holds no secret.

    Attributes:
        kind: `train` or `serve`.
        name: Job id or service name.
        backend: Name of the backend that the run was given to.
        body: The kind's own fields (see `palate.job` and `palate.predictor`).
        labels: The user's key-value pairs.
        created_at: Seconds since the epoch, by the clock of the client.
        versions: Palate's version and Python's at submission.
    """

    kind: Literal["train", "serve"]
    name: str
    backend: str
    body: dict[str, Any]
    labels: dict[str, str] = field(default_factory=dict)
    created_at: float = field(default_factory=time.time)
    versions: dict[str, str] = field(default_factory=dict)
    schema: int = MANIFEST_SCHEMA

    @property
    def model_name(self) -> str:
        """The model's name for people; "" where the body names none."""
        model: dict[str, Any] = self.body.get("model") or {}
        return str(model.get("name", ""))

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Raises ValueError when a field is missing that every manifest has, or one has another type."""
        values = _known_fields(cls, data, _MANIFEST_KINDS, required=("kind", "name", "backend", "body"))
        if values["kind"] not in ("train", "serve"):
            raise ValueError(f"kind is {shown(values['kind'])}")
        body = values["body"]
        check_fields(body, _BODY_KINDS, of="body.")
        model = body.get("model") or {}
        check_fields(model, {"name": str, "source": dict}, of="body.model.")
        check_fields(model.get("source") or {}, {"kind": str, "location": str}, of="body.model.source.")
        for what, facts in (body.get("inputs") or {}).items():
            if not is_kind(facts, dict):
                raise ValueError(f"body.inputs.{shown(what)} is {shown(facts)}")
            check_fields(facts, {"uri": str}, of="body.inputs.")
        texts = [*values.get("labels", {}).values(), *(body.get("environment_names") or [])]
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"a label or the name of a variable is {shown(wrong[0])}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a run stands.

    Attributes:
        state: One of `State`.
        reason: Why it failed or stopped, in one message.
        log_tail: Last log lines of a failed run.
        attempt: Number of the attempt, from 1. Each runner works for one, and writes only while it is the current one.
        last_attempt: The attempt up to which a failure is tried again.
        attempts: The earlier attempts: attempt, reason, exit_code, started_at, finished_at of each.
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
    attempt: int = 1
    last_attempt: int = 1
    attempts: tuple[dict[str, Any], ...] = ()
    start_id: str = ""
    engine_id: str = ""
    started_at: float | None = None
    finished_at: float | None = None
    updated_at: float = 0.0
    exit_code: int | None = None
    endpoint: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    schema: int = STATUS_SCHEMA

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL

    @classmethod
    def from_json(cls, data: bytes) -> Status:
        """Raises ValueError when the state is missing, or a field has another type."""
        values = _known_fields(cls, data, _STATUS_KINDS, required=("state",))
        if values["state"] not in get_args(State):
            raise ValueError(f"state is {shown(values['state'])}")
        for name in ("attempt", "last_attempt"):
            if values.get(name, 1) < 1:
                raise ValueError(f"{name} is {values[name]}")
        for name, kind in (("log_tail", str), ("attempts", dict)):
            if wrong := [item for item in values.get(name, ()) if not is_kind(item, kind)]:
                raise ValueError(f"{name} holds {shown(wrong[0])}")
        return cls(**{**values, **{name: tuple(values.get(name, ())) for name in ("log_tail", "attempts")}})


_NUMBER = (int, float)
_MAYBE_NUMBER = (int, float, type(None))
_MAYBE_OBJECT = (dict, type(None))
_MANIFEST_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("kind", "name", "backend"), str),
    **dict.fromkeys(("body", "labels", "versions"), dict),
    "created_at": _NUMBER,
    "schema": int,
}
_BODY_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model", "inputs", "placement"), _MAYBE_OBJECT),
    **dict.fromkeys(("hyperparameters", "options"), dict),
    **dict.fromkeys(("max_attempts", "max_run_time", "time_to_live_s"), _MAYBE_NUMBER),
    "environment_names": list,
    "tuned_uri": (str, type(None)),
}
"""What a list, a stop or the sweep reads of a body; the rest is its program's to check."""
_STATUS_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("state", "reason", "start_id", "engine_id", "endpoint"), str),
    **dict.fromkeys(("attempt", "last_attempt", "schema"), int),
    **dict.fromkeys(("log_tail", "attempts"), list),
    **dict.fromkeys(("started_at", "finished_at"), _MAYBE_NUMBER),
    "updated_at": _NUMBER,
    "exit_code": (int, type(None)),
    "details": dict,
}


def _known_fields(
    cls: type[Manifest] | type[Status],
    data: bytes,
    kinds: dict[str, type | tuple[type, ...]],
    *,
    required: tuple[str, ...],
) -> dict[str, Any]:
    values = parse_object(data)
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"it has no {' and no '.join(missing)}")
    check_fields(values, kinds)
    known = {item.name for item in fields(cls)}  # a newer writer may say more
    return {key: value for key, value in values.items() if key in known}


@dataclass(frozen=True, kw_only=True)
class MergedLog:
    """Parts of a service's log that became one: numbers of the first and the last, and bytes."""

    first: int
    last: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.first:06d}-{self.last:06d}.log"


@dataclass(frozen=True, kw_only=True)
class LogIndex:
    """What `logs/index.json` says of a service's log.

    Attributes:
        merged: The merged parts, oldest first.
        following: Number of the first part that is there as it was written; those before it are merged or dropped.
    """

    merged: tuple[MergedLog, ...] = ()
    following: int = 1

    @property
    def size(self) -> int:
        return sum(merged.size for merged in self.merged)

    @classmethod
    def parse(cls, data: bytes) -> LogIndex:
        values = json.loads(data)
        merged = tuple(
            MergedLog(**{name: int(each[name]) for name in ("first", "last", "size")}) for each in values["merged"]
        )
        return cls(merged=merged, following=int(values["following"]))

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()
