"""A run's prefix in a store: manifest, status, logs, metrics. Owns every key below it; knows no backend and no program.

    jobs/<id>/      manifest.json  status.json  logs/000001.log  metrics/000001.jsonl  inputs/  checkpoints/  model/  tensorboard/
    services/<name>/manifest.json  status.json  logs/000001.log  access_token

`manifest.json` is written once and says all that a run needs. `status.json` is written conditionally, so that of two
writers (a stop and a finish) one wins, and a terminal state is written last: all that it names is in place by then.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from palate.errors import ConfigurationError, NameTakenError, RunNotFoundError
from palate.store import Store
from palate.store.errors import PreconditionFailedError

State = Literal["Creating", "Running", "Stopping", "Succeeded", "Failed", "Stopped"]
TERMINAL: frozenset[State] = frozenset({"Succeeded", "Failed", "Stopped"})
ACTIVE: frozenset[State] = frozenset({"Creating", "Running", "Stopping"})

MANIFEST_SCHEMA = 1
TOKEN_KEY = "access_token"
"""A service's bearer token: a key of its own, so that no manifest, status or log ever holds it."""

_CAS_ATTEMPTS = 20


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


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a run stands.

    Attributes:
        state: One of `State`.
        reason: Why it failed or stopped, in one message.
        log_tail: Last log lines of a failed run.
        engine_id: The backend's name for the process: a hint, never the truth.
        started_at, finished_at, updated_at: Seconds since the epoch.
        exit_code: Of the program, when it ended.
        endpoint: Base URL of a service that answers.
        details: Facts that came up in the run (versions, seconds, engine).
    """

    state: State
    reason: str = ""
    log_tail: tuple[str, ...] = ()
    engine_id: str = ""
    started_at: float | None = None
    finished_at: float | None = None
    updated_at: float = 0.0
    exit_code: int | None = None
    endpoint: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL

    @classmethod
    def from_json(cls, data: bytes) -> Status:
        values = json.loads(data)
        known = {item.name for item in fields(cls)}  # a newer writer may say more
        values = {key: value for key, value in values.items() if key in known}
        return cls(**{**values, "log_tail": tuple(values.get("log_tail", ()))})


class Record:
    """One run's prefix in a store.

    Args:
        store: Where it lives.
        kind: `jobs` or `services`.
        name: Job id or service name.
    """

    def __init__(self, store: Store, kind: Literal["jobs", "services"], name: str) -> None:
        self.store = store
        self.kind = kind
        self.name = name
        self.prefix = f"{kind}/{name}"

    @property
    def uri(self) -> str:
        return self.store.uri(self.prefix)

    def key(self, *parts: str) -> str:
        """Returns the store key of something below this record."""
        return "/".join((self.prefix, *parts))

    # ── manifest ────────────────────────────────────────────────────────────────────────────────────────────────────

    def create(self, manifest: Manifest) -> None:
        """Writes the manifest where none is, then the first status.

        Raises:
            NameTakenError: A run of that name is there.
        """
        body = json.dumps(asdict(manifest), indent=1, ensure_ascii=False).encode()
        try:
            self.store.put(self.key("manifest.json"), body, if_none_match=True)
        except PreconditionFailedError:
            noun = "job" if self.kind == "jobs" else "service"
            command = "palate jobs" if self.kind == "jobs" else "palate services"
            raise NameTakenError(
                f"{noun} name {self.name!r} is taken in {self.store.root}: choose another, "
                f"or delete it first (`palate delete {self.name}`; `{command}` lists what is there)"
            ) from None
        status = Status(state="Creating", updated_at=time.time())
        self.store.put(self.key("status.json"), _encode(status))

    def manifest(self) -> Manifest:
        """Raises RunNotFoundError when there is none."""
        try:
            data = self.store.get(self.key("manifest.json"))
        except FileNotFoundError:
            noun = "job" if self.kind == "jobs" else "service"
            raise RunNotFoundError(
                f"no {noun} {self.name!r} in {self.store.root}: `palate {self.kind}` lists what is there; "
                "another store is chosen with PALATE_STORE or Session(store=…)"
            ) from None
        values = json.loads(data)
        known = {item.name for item in fields(Manifest)}
        return Manifest(**{key: value for key, value in values.items() if key in known})

    def exists(self) -> bool:
        return self.store.stat(self.key("manifest.json")) is not None

    # ── status ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def status(self) -> Status:
        try:
            return Status.from_json(self.store.get(self.key("status.json")))
        except FileNotFoundError:
            manifest = self.manifest()  # raises when the run itself is unknown
            return Status(state="Creating", updated_at=manifest.created_at)

    def advance(self, state: State, *, expect: Collection[State], **changes: Any) -> Status | None:
        """Moves the run to `state`, or leaves it and returns None when its state is not one of `expect`.

        The write is conditional on what was read, so of two that race one wins and the other sees its result.
        """
        if state in TERMINAL:
            changes.setdefault("finished_at", time.time())
        return self._rewrite(lambda current: replace(current, state=state, **changes), expect)

    def note(self, **changes: Any) -> Status | None:
        """Adds facts to the status and leaves its state; returns None when the run is gone."""
        return self._rewrite(lambda current: replace(current, **changes), ACTIVE | TERMINAL)

    def _rewrite(self, change: Callable[[Status], Status], expect: Collection[State]) -> Status | None:
        for _ in range(_CAS_ATTEMPTS):
            info = self.store.stat(self.key("status.json"))  # before the read: a later write must not match
            try:
                current = Status.from_json(self.store.get(self.key("status.json")))
            except FileNotFoundError:
                return None
            if info is None or current.state not in expect:
                return None
            target = replace(change(current), updated_at=time.time())
            try:
                self.store.put(self.key("status.json"), _encode(target), if_match=info.etag)
            except (PreconditionFailedError, FileNotFoundError):
                continue
            return target
        raise RuntimeError(f"{self.uri}/status.json changed {_CAS_ATTEMPTS} times while it was to be written")

    # ── logs and metrics ────────────────────────────────────────────────────────────────────────────────────────────

    def append(self, kind: Literal["logs", "metrics"], part: int, data: bytes) -> None:
        """Writes part number `part`, beginning with 1; the one writer of a run counts."""
        self.store.put(self.key(kind, f"{part:06d}{_SUFFIX[kind]}"), data)

    def parts(self, kind: Literal["logs", "metrics"], *, after: int = 0) -> Iterator[tuple[int, bytes]]:
        """Yields (number, data) of the parts after number `after`, in order, without a gap.

        Asks for the next number by name instead of listing: one small read a poll, on any store.
        """
        number = after + 1
        while True:
            try:
                data = self.store.get(self.key(kind, f"{number:06d}{_SUFFIX[kind]}"))
            except FileNotFoundError:
                return
            yield number, data
            number += 1

    def log_lines(self) -> Iterator[str]:
        """Yields the whole log, line by line."""
        buffer = b""
        for _, data in self.parts("logs"):
            *lines, buffer = (buffer + data).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
        if buffer:
            yield buffer.decode(errors="replace")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yields every metrics object in order (parts hold whole lines)."""
        for _, data in self.parts("metrics"):
            yield from (json.loads(line) for line in data.splitlines() if line.strip())

    def delete(self) -> None:
        """Removes everything, the manifest last: until then the run can still be found and deleted again."""
        for info in list(self.store.list(self.prefix + "/")):
            if info.key != self.key("manifest.json"):
                self.store.delete(info.key)
        self.store.delete_tree(self.prefix + "/")


_SUFFIX = {"logs": ".log", "metrics": ".jsonl"}


def _encode(status: Status) -> bytes:
    return json.dumps(asdict(status), indent=1, ensure_ascii=False).encode()


def names(store: Store, kind: Literal["jobs", "services"]) -> list[str]:
    """Returns the names of all runs of a kind in a store."""
    return [name for name in store.list_children(f"{kind}/") if store.stat(f"{kind}/{name}/manifest.json")]


def locate(uri: str) -> tuple[str, Literal["jobs", "services"], str]:
    """Splits a run's URI into store root, kind and name; raises ConfigurationError when it is none."""
    root, _, name = uri.rstrip("/").rpartition("/")
    root, _, kind = root.rpartition("/")
    if kind == "jobs" and name:
        return root, "jobs", name
    if kind == "services" and name:
        return root, "services", name
    raise ConfigurationError(f"{uri!r} is not the URI of a run: expected <store>/jobs/<id> or <store>/services/<name>")
