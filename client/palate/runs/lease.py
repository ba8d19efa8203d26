"""Who runs a run, and whether it still does: one object, rewritten by its runner alone. Knows records, no program, no backend.

    <run>/lease.json    holder, attempt, host and pid of the runner; `beat`, which goes up every few seconds

Of two runners that were started for one run, the conditional put lets one in. The lease is its heartbeat, too: one that
has not changed for `lost_after_s` is nobody's any more. No two machines' clocks are compared: a single look asks how old
the object is by the store's own clock, and a runner that wants in watches whether it changes.
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
"""Above a minute's loss of the store and what its client retries after it: a run must not be called lost for that."""

LOST_AFTER_VARIABLE = "PALATE_LEASE_S"
EVERY_S = 5.0
START_ID_VARIABLE = "PALATE_START_ID"
"""Tells a runner which start it came from; no secret."""

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
    """Returns a run's lease, or None when no runner has ever begun.

    Raises:
        DamagedFilesError: It cannot be read; a runner that holds it writes it anew with its next heartbeat.
    """
    try:
        data = record.store.get(record.key(LEASE_KEY))
    except ObjectNotFoundError:
        return None
    try:
        return decode(data, Lease)
    except ValueError as error:
        raise DamagedFilesError(
            f"{record.uri}/{LEASE_KEY} is damaged ({error}): its runner writes it again within seconds; if there is no "
            "runner, delete this file"
        ) from None


def silence_s(record: Record, key: str = LEASE_KEY) -> float | None:
    """Returns how long ago an object of a run was written, by the store's clock; None when that cannot be told."""
    info = record.store.stat(record.key(key))
    now = store_now(record.store)
    return None if info is None or now is None else max(0.0, now - info.modified_s)


class HeldLease:
    """The lease of this process.

    Args:
        record: The run.
        lease: As it was written.
        etag: Of that.
    """

    def __init__(self, record: Record, lease: Lease, etag: str) -> None:
        self._record = record
        # Invariant: the ETag of this runner's own last write. A put on this condition can only replace that write.
        self._etag = etag
        # The heartbeat thread and the main thread (a new attempt, release) both write.
        self._lock = threading.Lock()
        self.lease = lease

    def through(self, record: Record) -> HeldLease:
        """Returns the same lease, kept through another opening of its store."""
        return HeldLease(record, self.lease, self._etag)

    def beat(self, *, attempt: int | None = None) -> bool:
        """Writes a heartbeat; returns False when the lease is another's by now.

        Args:
            attempt: The attempt that it is for from now on.

        Raises:
            StoreError: The store cannot be reached; nothing is known.
        """
        with self._lock:
            return self._write(replace(self.lease, beat=self.lease.beat + 1, attempt=attempt or self.lease.attempt))

    def release(self) -> None:
        """Says that this runner has ended in order. Raises StoreError."""
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
                found = self.lease  # it names no other holder; a runner that took the lease finds out at its next beat
            if found is None or there is None:
                return True  # deleted with its run: the status will say so
            if found.holder != self.lease.holder:
                return False
            # An earlier write of our own, whose answer got lost; or damage, which is overwritten.
            self._etag = there.etag
            if found != lease:
                self._etag = self._record.store.put(self._record.key(LEASE_KEY), encode(lease), if_match=there.etag)
        # Only after a successful put, so that a failed write is repeated with the same beat.
        self.lease = lease
        return True


def acquire(record: Record, *, attempt: int, start_id: str, give_up: Callable[[], bool]) -> HeldLease | None:
    """Takes a run's lease, or returns None when another runner has it.

    A lease of this attempt that nobody is known to have left is watched: it is taken when it does not change for its
    `lost_after_s` (`fresh_s` when its runner was one of this machine and is gone), and left alone when it does.

    Args:
        record: The run.
        attempt: The attempt to work for; a lease of an earlier one is taken at once, its runner finds out.
        start_id: See `Lease`.
        give_up: Says that waiting is no longer wanted.

    Raises:
        StoreError: The store refuses or cannot be reached.
        ConfigurationError: PALATE_LEASE_S is no number above 1.
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
            # Somebody holds it, or nobody: a holder writes it anew within seconds.
            found = replace(mine, holder=there.etag if there is not None else "", machine="")
        if found is not None and found.holder == mine.holder and there is not None:
            return HeldLease(record, found, there.etag)  # our own write, whose answer got lost
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
            f"{LOST_AFTER_VARIABLE}={text!r} must be seconds from 1 to 86400: after so long without a heartbeat a run is lost"
        )
    return value


# The store's clock.

# By store object and weak, so that a store opened again is measured again and a closed one is forgotten.
_OFFSETS: weakref.WeakKeyDictionary[Store, float | None] = weakref.WeakKeyDictionary()


def store_now(store: Store) -> float | None:
    """Returns the time by the store's own clock, in seconds since the epoch; None when nothing may be written there.

    It is measured once for each opened store, with a probe that is removed again.
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
            return None  # asked again at the next look
        _OFFSETS[store] = None if info is None else info.modified_s - written
    offset = _OFFSETS[store]
    return None if offset is None else _ticks() + offset


def _ticks() -> float:
    # Goes on while the machine sleeps, which time.monotonic() does not.
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
