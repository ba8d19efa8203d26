"""Which runs of a store are meant, and where they stand: read many at a time, newest first. Knows records, no kind of run.

A list needs two objects of each run, and a bucket takes milliseconds to give one: one after the other, hundreds of runs
would take a minute.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from queue import Empty, SimpleQueue
from typing import Literal, TypeVar, get_args

from palate.runs.handle import RunHandle
from palate.runs.record import Record
from palate.session import Session
from palate_recipes.errors import ConfigurationError, PalateError, RunNotFoundError, WaitTimeoutError
from palate_recipes.specs.run import Manifest, State, Status

_THREADS = 16
_BATCH = 64
"""Runs whose status is read at a time where a list ends early."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class RunFilter:
    """Which runs are meant; by default all.

    Attributes:
        states: Their state is one of these; empty means any.
        name: Glob for their name, such as `qwen2-*`.
        model: Glob for their model's name.
        labels: Labels that they have, with these values.
        since_s: Created at most so many seconds ago, by this machine's clock; None means ever.
        min_attempts: They have been begun so often at least.
    """

    states: Sequence[State] = ()
    name: str = "*"
    model: str = "*"
    labels: Mapping[str, str] = field(default_factory=dict)
    since_s: float | None = None
    min_attempts: int = 1

    def __post_init__(self) -> None:
        if unknown := [state for state in self.states if state not in get_args(State)]:
            raise ConfigurationError(f"status={unknown[0]!r} is no state of a run: give {', '.join(get_args(State))}")
        if self.since_s is not None and not self.since_s > 0:
            raise ConfigurationError(f"since_s={self.since_s!r} lets no run through: give seconds above 0")
        if self.min_attempts < 1:
            raise ConfigurationError(f"min_attempts={self.min_attempts!r} must be 1 or more")

    @property
    def is_everything(self) -> bool:
        return self == RunFilter()

    @property
    def needs_status(self) -> bool:
        return bool(self.states) or self.min_attempts > 1

    def has_manifest(self, manifest: Manifest) -> bool:
        """Says whether a run with this manifest can be meant."""
        return (
            fnmatchcase(manifest.model_name, self.model)
            and all(manifest.labels.get(name) == value for name, value in self.labels.items())
            and (self.since_s is None or time.time() - manifest.created_at <= self.since_s)
        )

    def has_status(self, status: Status) -> bool:
        """Says whether a run with this status can be meant."""
        return (not self.states or status.state in self.states) and status.attempt >= self.min_attempts


@dataclass(kw_only=True)
class RunSummary:
    """A run of a list.

    Attributes:
        handle: To do something with it.
        manifest: None when it could not be read.
        status: None when it was not asked for, or could not be read.
        error: Why something of it could not be read.
    """

    handle: RunHandle
    manifest: Manifest | None = None
    status: Status | None = None
    error: PalateError | None = None

    @property
    def name(self) -> str:
        return self.handle.record.name


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a look at a store gave.

    Attributes:
        runs: Those that are meant, newest first.
        unread: Those of which that is not known, by name: each has its `error`.
    """

    runs: list[RunSummary]
    unread: list[RunSummary]

    def require_all(self) -> list[RunSummary]:
        """Returns the runs; raises the first error when some could not be read."""
        if self.unread:
            error = self.unread[0].error
            assert error is not None
            raise error
        return self.runs


def find_runs(
    session: Session,
    kind: Literal["jobs", "services"],
    wanted: RunFilter,
    *,
    status: bool = True,
    limit: int | None = None,
    timeout_s: float | None = None,
) -> Listing:
    """Reads the runs of a store, several at a time, and looks whether a runner still stands behind those that go on.

    Args:
        session: Whose store.
        kind: `jobs` or `services`.
        wanted: Which.
        status: Read where each stands; without it `RunSummary.status` is None unless `wanted` needs it.
        limit: Return so many at most, the newest; the others' status is not read.
        timeout_s: Seconds after which what is not read yet is `unread`. None waits as long as the store's client does. Where
            states are read as well, manifests get half of it: one that hangs must not take the time of the others' states.

    Raises:
        StoreError: The store cannot be listed.
        WaitTimeoutError: It was not even listed within `timeout_s`.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    names = _names(session, kind, wanted.name, deadline)
    found = [RunSummary(handle=RunHandle(Record(session.store, kind, name), session)) for name in names]
    reads_status = status or wanted.needs_status
    now = time.monotonic()
    halfway = None if deadline is None else now + (deadline - now) / 2
    _read(found, "manifest", lambda run: run.handle.manifest, halfway if reads_status else deadline)
    unread = [run for run in found if run.error and not isinstance(run.error, RunNotFoundError)]
    known = [(run.manifest.created_at, run) for run in found if run.manifest and wanted.has_manifest(run.manifest)]
    known.sort(key=lambda pair: pair[0], reverse=True)
    candidates = [run for _, run in known]
    if not reads_status:
        return Listing(runs=candidates[:limit], unread=unread)
    runs: list[RunSummary] = []
    # Without a limit all at once: then a run that is slow to read holds up no other.
    size = max(1, len(candidates) if limit is None else _BATCH if wanted.needs_status else limit)
    while candidates and (limit is None or len(runs) < limit):
        batch, candidates = candidates[:size], candidates[size:]
        _read(batch, "status", lambda run: run.handle.refresh(), deadline)
        unread += [run for run in batch if run.error and not isinstance(run.error, RunNotFoundError)]
        runs += [run for run in batch if run.status is not None and wanted.has_status(run.status)]
    return Listing(runs=runs[:limit], unread=sorted(unread, key=lambda run: run.name))


def _names(session: Session, kind: Literal["jobs", "services"], pattern: str, deadline: float | None) -> list[str]:
    for _, listed in _each(session.store.list_children, [f"{kind}/"], deadline):
        if isinstance(listed, BaseException):
            raise listed
        return [name for name in listed if fnmatchcase(name, pattern)]
    raise WaitTimeoutError(
        f"{session.store_uri} did not say in time what it holds: give it longer, or see what keeps it (`palate doctor`)"
    )


def _read(
    runs: Sequence[RunSummary], what: str, read: Callable[[RunSummary], Manifest | Status], deadline: float | None
) -> None:
    """Sets the field `what` of each run, or its `error`."""
    for run in runs:
        run.error = WaitTimeoutError(f"{run.handle.record.uri}: its {what} was not read in time")
    for run, value in _each(read, runs, deadline):
        if not isinstance(value, BaseException):
            setattr(run, what, value)
            run.error = None
        elif isinstance(value, PalateError):
            run.error = value
        else:
            raise value


def _each(
    function: Callable[[_Item], _Result], items: Sequence[_Item], deadline: float | None
) -> Iterator[tuple[_Item, _Result | BaseException]]:
    """Yields each item with what `function` returned or raised, as it comes; at the deadline it ends.

    Its threads are daemons, unlike those of a pool: a program must be able to end while a store keeps one waiting.
    """
    todo, done = deque(items), SimpleQueue[tuple[_Item, _Result | BaseException]]()

    def work() -> None:
        while True:
            try:
                item = todo.popleft()
            except IndexError:
                return
            try:
                done.put((item, function(item)))
            except BaseException as error:
                done.put((item, error))

    for _ in range(min(_THREADS, len(items))):
        threading.Thread(target=work, name="palate-listing", daemon=True).start()
    try:
        for _ in items:
            left_s = None if deadline is None else min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
            yield done.get(timeout=left_s)
    except Empty:
        pass
    finally:
        todo.clear()
