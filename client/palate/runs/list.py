"""Lists and filters the runs of a store with their states, newest first. Knows records, no kind of run.

A list reads two objects per run, and a bucket needs milliseconds for each. One after the other, hundreds of runs would take a
minute, so sixteen threads read them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from queue import Empty, SimpleQueue
from typing import TypeVar, get_args

from palate.runs.handle import RunHandle
from palate.runs.record import Record
from palate.session import Session
from palate_recipes.errors import ConfigurationError, PalateError, RunNotFoundError, WaitTimeoutError
from palate_recipes.specs.run import Kind, Manifest, State, Status

_THREADS = 16
_BATCH = 64
"""Number of runs whose status is read at once in a list with a limit."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class RunFilter:
    """Selects runs; by default all.

    Attributes:
        states: States to include; empty means all.
        name: Glob for the name, such as `qwen2-*`.
        model: Glob for the model's name.
        labels: Labels that a run must have, with values.
        since_s: Maximum age in seconds by this machine's clock; None means no limit.
        min_attempts: Minimum number of attempts.
    """

    states: Sequence[State] = ()
    name: str = "*"
    model: str = "*"
    labels: Mapping[str, str] = field(default_factory=dict)
    since_s: float | None = None
    min_attempts: int = 1

    def __post_init__(self) -> None:
        if unknown := [state for state in self.states if state not in get_args(State)]:
            raise ConfigurationError(
                f"status={unknown[0]!r} is not a state of a run: expected one of {', '.join(get_args(State))}"
            )
        if self.since_s is not None and not self.since_s > 0:
            raise ConfigurationError(f"since_s={self.since_s!r} must be above 0 seconds")
        if self.min_attempts < 1:
            raise ConfigurationError(f"min_attempts={self.min_attempts!r} must be 1 or more")

    @property
    def is_everything(self) -> bool:
        return self == RunFilter()

    @property
    def needs_status(self) -> bool:
        return bool(self.states) or self.min_attempts > 1

    def has_manifest(self, manifest: Manifest) -> bool:
        """Whether the filter accepts this manifest."""
        return (
            fnmatchcase(manifest.model_name, self.model)
            and all(manifest.labels.get(name) == value for name, value in self.labels.items())
            and (self.since_s is None or time.time() - manifest.created_at <= self.since_s)
        )

    def has_status(self, status: Status) -> bool:
        """Whether the filter accepts this status."""
        return (not self.states or status.state in self.states) and status.attempt >= self.min_attempts


@dataclass(kw_only=True)
class RunSummary:
    """A run in a list.

    Attributes:
        handle: The run.
        manifest: None if it cannot be read.
        status: None if it was not requested or cannot be read.
        error: Why manifest or status cannot be read.
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
    """The result of `find_runs`.

    Attributes:
        runs: Runs that match the filter, newest first.
        unread: Runs that cannot be read, so that it is unknown whether they match, by name. Each has its `error`.
    """

    runs: list[RunSummary]
    unread: list[RunSummary]

    def require_all(self) -> list[RunSummary]:
        """Returns the runs. Raises the first error if some cannot be read."""
        if self.unread:
            error = self.unread[0].error
            assert error is not None
            raise error
        return self.runs


def find_runs(
    session: Session,
    kind: Kind,
    wanted: RunFilter,
    *,
    status: bool = True,
    limit: int | None = None,
    timeout_s: float | None = None,
) -> Listing:
    """Reads the runs of a store in parallel, and checks whether the active ones still have a runner.

    Args:
        session: The session with the store.
        kind: `jobs`, `services` or `evaluations`.
        wanted: The filter.
        status: Whether to read states. If False, `RunSummary.status` is None unless `wanted` needs it.
        limit: Maximum number of runs to return, newest first. The status of the others is not read.
        timeout_s: Time limit in seconds. Runs that are not read by then are `unread`. None waits as long as the store's client
            does. If states are read, manifests get half of the time, so that a hanging one leaves time for the states.

    Raises:
        StoreError: The store cannot be listed.
        WaitTimeoutError: The listing itself took longer than `timeout_s`.
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
    # Without a limit all at once, so that a slow run delays no other.
    size = max(1, len(candidates) if limit is None else _BATCH if wanted.needs_status else limit)
    while candidates and (limit is None or len(runs) < limit):
        batch, candidates = candidates[:size], candidates[size:]
        _read(batch, "status", lambda run: run.handle.refresh(), deadline)
        unread += [run for run in batch if run.error and not isinstance(run.error, RunNotFoundError)]
        runs += [run for run in batch if run.status is not None and wanted.has_status(run.status)]
    return Listing(runs=runs[:limit], unread=sorted(unread, key=lambda run: run.name))


def _names(session: Session, kind: Kind, pattern: str, deadline: float | None) -> list[str]:
    for _, listed in each_result(session.store.list_children, [f"{kind}/"], deadline):
        if isinstance(listed, BaseException):
            raise listed
        return [name for name in listed if fnmatchcase(name, pattern)]
    raise WaitTimeoutError(
        f"{session.store_uri} was not listed in time: raise the time limit, or check the store with `palate doctor`"
    )


def _read(
    runs: Sequence[RunSummary], what: str, read: Callable[[RunSummary], Manifest | Status], deadline: float | None
) -> None:
    """Sets the attribute `what` of each run, or its `error`."""
    for run in runs:
        run.error = WaitTimeoutError(f"{run.handle.record.uri}: its {what} was not read in time")
    for run, value in each_result(read, runs, deadline):
        if not isinstance(value, BaseException):
            setattr(run, what, value)
            run.error = None
        elif isinstance(value, PalateError):
            run.error = value
        else:
            raise value


def each_result(
    function: Callable[[_Item], _Result], items: Sequence[_Item], deadline: float | None
) -> Iterator[tuple[_Item, _Result | BaseException]]:
    """Yields each item with the result or exception of `function`, as they complete, until the deadline.

    Uses daemon threads, unlike a thread pool: a program must be able to exit while a thread waits for a store.
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
