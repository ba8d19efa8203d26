"""The lease of a run: which runner has it, and its heartbeat. Knows records, no program, no backend.

    <run>/lease.json    holder, attempt, host and pid of the runner; `beat`, incremented every few seconds

Only the runner rewrites it. Of two runners that were started for one run, a conditional put lets one in. The lease is also
the heartbeat: a lease that has not changed for `lost_after_s` has expired. Clocks of different machines are never compared: the
age of a lease is measured by the store's clock, and a runner that waits for the lease watches whether it changes.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from secrets import token_hex
from typing import Any

from msgspec.structs import replace

from palate.processes import machine_mark, process_state, start_time
from palate.runs.record import Record
from palate.store import Store
from palate_recipes.errors import (
    ConfigurationError,
    DamagedFilesError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StoreError,
)
from palate_recipes.specs.codec import decode, encode
from palate_recipes.specs.run import LEASE_SCHEMA, Lease

LEASE_KEY = "lease.json"

LOST_AFTER_S = 120.0
"""Longer than a store outage of one minute plus the client's retries: such an outage must not make a run count as lost."""

LOST_AFTER_VARIABLE = "PALATE_LEASE_S"
EVERY_S = 5.0
START_ID_VARIABLE = "PALATE_START_ID"
"""Environment variable with the id of the start that a runner belongs to. Not a secret."""

_POLL_S = 0.2


def lease_here(**facts: Any) -> Lease:
    """Returns a lease of this process with the given fields."""
    here = {
        "beat": 0,
        "every_s": EVERY_S,
        "lost_after_s": LOST_AFTER_S,
        "host": socket.gethostname(),
        "machine": machine_mark(),
        "pid": os.getpid(),
        "pid_start": start_time(os.getpid()),
        "released": False,
        "schema": LEASE_SCHEMA,
    }
    return Lease(**{**here, **facts})


def is_dead_here(lease: Lease) -> bool:
    """Whether this machine knows that the lease's runner is dead. False if it cannot know."""
    # Without a mark (not Linux) nothing proves that the pid belongs to this machine. A pid alone is not enough either:
    # it can be reused, so its start time is compared too.
    return lease.machine == machine_mark() != "" and process_state(lease.pid, lease.pid_start) == "dead"


def read_lease(record: Record) -> Lease | None:
    """Returns a run's lease, or None if no runner has ever started.

    Raises:
        DamagedFilesError: It cannot be read. A runner that holds it rewrites it with its next heartbeat.
    """
    try:
        data = record.store.get(record.key(LEASE_KEY))
    except ObjectNotFoundError:
        return None
    try:
        return decode(data, Lease)
    except ValueError as error:
        raise DamagedFilesError(
            f"{record.uri}/{LEASE_KEY} is damaged ({error}): a live runner rewrites it within seconds. If there is no "
            "runner, delete this file"
        ) from None


def silence_s(record: Record, key: str = LEASE_KEY) -> float | None:
    """Returns the age of a run's object by the store's clock, or None if unknown."""
    info = record.store.stat(record.key(key))
    now = store_now(record.store)
    return None if info is None or now is None else max(0.0, now - info.modified_s)


class HeldLease:
    """The lease of this process.

    Args:
        record: The run.
        lease: The lease as written.
        etag: ETag of that write.
    """

    def __init__(self, record: Record, lease: Lease, etag: str) -> None:
        self._record = record
        # Invariant: the ETag of this runner's own last write. A put on this condition can only replace that write.
        self._etag = etag
        # The heartbeat thread and the main thread (a new attempt, release) both write.
        self._lock = threading.Lock()
        self.lease = lease

    def through(self, record: Record) -> HeldLease:
        """Returns the same lease, held through another store object."""
        return HeldLease(record, self.lease, self._etag)

    def beat(self, *, attempt: int | None = None) -> bool:
        """Writes a heartbeat. Returns False if another runner has the lease.

        Args:
            attempt: New attempt of the lease, if it changes.

        Raises:
            StoreError: The store cannot be reached. The lease's state is unknown.
        """
        with self._lock:
            return self._write(replace(self.lease, beat=self.lease.beat + 1, attempt=attempt or self.lease.attempt))

    def release(self) -> None:
        """Marks the lease as released: this runner has ended normally. Raises StoreError."""
        # Not a delete: that has no condition, and could remove another runner's lease.
        with self._lock:
            self._write(replace(self.lease, beat=self.lease.beat + 1, released=True))

    def _write(self, lease: Lease) -> bool:
        try:
            self._etag = self._record.store.put(self._record.key(LEASE_KEY), encode(lease), if_match=self._etag)
        except (PreconditionFailedError, ObjectNotFoundError):
            there = self._record.store.stat(
                self._record.key(LEASE_KEY)
            )  # before the read: a later write must not match
            try:
                found = read_lease(self._record)
            except DamagedFilesError:
                found = self.lease  # no proof of another holder; if there is one, its next beat shows it
            if found is None or there is None:
                return True  # deleted with its run, which the status check finds
            if found.holder != self.lease.holder:
                return False
            # Either our own earlier write, whose answer was lost, or damage, which is overwritten.
            self._etag = there.etag
            if found != lease:
                self._etag = self._record.store.put(self._record.key(LEASE_KEY), encode(lease), if_match=there.etag)
        # Only after a successful put, so that a failed write is repeated with the same beat.
        self.lease = lease
        return True


def acquire(record: Record, *, attempt: int, start_id: str, give_up: Callable[[], bool]) -> HeldLease | None:
    """Acquires a run's lease, or returns None if another runner has it.

    If this attempt has a lease that was not released, waits: acquires it once it has not changed for its `lost_after_s`
    (`fresh_s` if its runner was on this machine and is dead), and returns None once it changes.

    Args:
        record: The run.
        attempt: The attempt to work for. A lease of an earlier attempt is taken at once; its runner will notice.
        start_id: See `Lease`.
        give_up: Returns True to stop waiting.

    Raises:
        StoreError: The store rejects the request or cannot be reached.
        ConfigurationError: PALATE_LEASE_S is invalid.
    """
    lost_after_s = _lost_after_s()
    # A random holder name, not host and pid: both can be the same in two containers.
    mine = lease_here(
        holder=token_hex(8),
        start_id=start_id,
        attempt=attempt,
        every_s=min(EVERY_S, lost_after_s / 6),
        lost_after_s=lost_after_s,
    )
    seen: tuple[str, int] | None = None
    # This process's own clock: waiting until the lease stays unchanged needs no comparison of clocks.
    since = time.monotonic()
    while True:
        there = record.store.stat(record.key(LEASE_KEY))  # before the read: a later write must not match
        try:
            found = read_lease(record)
        except DamagedFilesError:
            # It may have a holder, which rewrites it within seconds.
            found = replace(mine, holder=there.etag if there is not None else "", machine="")
        if found is not None and found.holder == mine.holder and there is not None:
            return HeldLease(record, found, there.etag)  # our own write, whose answer was lost
        free = found is None or found.released or found.attempt < attempt
        if found is not None and not free:
            # One change is proof of a live runner, so there is no need to wait longer.
            if seen is not None and seen != (found.holder, found.beat):
                return None
            seen = (found.holder, found.beat)
            silent_s = time.monotonic() - since
            free = silent_s >= found.lost_after_s
            # A dead process shortens the wait, but `fresh_s` must still pass: a cloned machine has the same mark and the
            # original runner may be alive there.
            if is_dead_here(found):
                free = max(silent_s, silence_s(record) or 0.0) > found.fresh_s
        if free:
            # Of several runners that see a free lease, the condition lets exactly one write.
            try:
                etag = record.store.put(
                    record.key(LEASE_KEY),
                    encode(mine),
                    if_match=there.etag if there is not None else None,
                    if_none_match=there is None,
                )
                return HeldLease(record, mine, etag)
            except (PreconditionFailedError, ObjectNotFoundError):
                continue
        if give_up():
            return None
        time.sleep(_POLL_S)


def _lost_after_s() -> float:
    text = os.environ.get(LOST_AFTER_VARIABLE, "")
    try:
        value = float(text) if text else LOST_AFTER_S
    except ValueError:
        value = 0.0
    if not 1 <= value <= 86400:
        raise ConfigurationError(
            f"{LOST_AFTER_VARIABLE}={text!r} must be a number of seconds from 1 to 86400 (a run without a heartbeat is then lost)"
        )
    return value


# The store's clock.

# By store object and weak, so that a store opened again is measured again and a closed one is forgotten.
_OFFSETS: weakref.WeakKeyDictionary[Store, float | None] = weakref.WeakKeyDictionary()


def store_now(store: Store) -> float | None:
    """Returns the time by the store's clock, in seconds since the epoch, or None if the store is read-only.

    The offset is measured once per store object, with a probe object that is deleted.
    """
    if store not in _OFFSETS:
        key = f"cache/clock-{token_hex(8)}"
        try:
            store.put(key, b"", if_none_match=True)
            # Right after the answer: the error of the offset is at most one round trip, far below any lost_after_s.
            written = _ticks()
            info = store.stat(key)
            store.delete(key)
        except StoreError:
            return None  # tried again at the next call
        _OFFSETS[store] = None if info is None else info.modified_s - written
    offset = _OFFSETS[store]
    return None if offset is None else _ticks() + offset


def _ticks() -> float:
    # Unlike time.monotonic(), it includes the time that the machine sleeps.
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
