"""Heartbeat, stop requests, and uploads of logs and metrics while a program runs.

All of this runs in separate threads: a slow or unreachable store never delays the program or its deadline. What cannot be
uploaded is uploaded when the store is back. A service may run for months, so its log is limited in size: old parts are merged and
the oldest deleted. Readers find merged parts through `logs/index.json` (see `palate_recipes.specs.run.LogIndex`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from palate.runs.lease import HeldLease
from palate.runs.record import Record
from palate_recipes.errors import PalateError, PreconditionFailedError
from palate_recipes.specs.run import LogIndex

KEPT_BYTES = 32 * 1024**2
"""Maximum size of a service's log in the store. The oldest parts are deleted first."""

PART_BYTES = 1024**2
"""Maximum size of a part, merged or not."""

_MOST_PARTS = 600
_UNMERGED_PARTS = 200
"""This many of the newest parts are never merged, since a reader that follows the log may be at one of them."""


class LogCompactor:
    """Merges and deletes parts of one service's log, which has no other writer. After a StoreError the next call repeats the work.

    Args:
        record: The service.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._index = record.log_index()
        found = record.part_sizes("logs")
        self._parts = {number: size for number, size in found.items() if number >= self._index.following}
        # The index is the truth: parts below `following` are merged already, and only their deletion was interrupted.
        self._left_over = [number for number in found if number < self._index.following]  # left by a killed runner

    def added(self, number: int, size: int) -> None:
        """Call after writing a part. Merges and deletes parts over the limits."""
        self._parts[number] = size
        self._remove_left_over()
        if len(self._parts) > _MOST_PARTS:
            self._merge()
        if self._index.size + sum(self._parts.values()) > KEPT_BYTES:
            self._drop()

    def _merge(self) -> None:
        """Merges the oldest parts into parts of about PART_BYTES. They are stored before the index names them."""
        merged = list(self._index.merged)
        numbers = sorted(self._parts)[:-_UNMERGED_PARTS]
        while numbers:
            run = [numbers.pop(0)]
            # At least one part, even if it is larger than the limit: otherwise the loop would not advance.
            while numbers and sum(self._parts[number] for number in (*run, numbers[0])) <= PART_BYTES:
                run.append(numbers.pop(0))
            content = b"".join(self._record.part("logs", number) for number in run)
            merged.append(self._record.write_merged(run[0], run[-1], content))
        self._publish(LogIndex(merged=tuple(merged), following=merged[-1].last + 1))

    def _drop(self) -> None:
        """Deletes the oldest parts, down to 7/8 of the limit."""
        merged, numbers = list(self._index.merged), sorted(self._parts)
        size = self._index.size + sum(self._parts.values())
        gone = []
        while merged and size > KEPT_BYTES * 7 // 8:
            gone.append(merged.pop(0))
            size -= gone[-1].size
        following = self._index.following
        # The newest part always stays: the log must not become empty.
        while len(numbers) > 1 and size > KEPT_BYTES * 7 // 8:
            size -= self._parts[numbers[0]]
            following = numbers.pop(0) + 1
        # The index first: a reader must never find a name in it whose object is gone for good.
        self._publish(LogIndex(merged=tuple(merged), following=following))
        for each in gone:
            self._record.store.delete(self._record.key("logs", each.name))

    def _publish(self, index: LogIndex) -> None:
        self._record.write_log_index(index)
        self._index = index
        self._left_over += [number for number in self._parts if number < index.following]
        self._parts = {number: size for number, size in self._parts.items() if number >= index.following}
        self._remove_left_over()

    def _remove_left_over(self) -> None:
        # Popped after the deletion: if the store fails, the part stays in the list and is deleted the next time.
        while self._left_over:
            self._record.delete_part("logs", self._left_over[-1])
            self._left_over.pop()


logger = logging.getLogger("palate.runner")

TICK_S = 0.25
STATUS_EVERY_S = 2.0
PUSH_FAST_S = 1.0
PUSH_SLOW_S = 5.0
FAST_UNTIL_S = 120.0
"""Logs are uploaded every second at first, when somebody may be watching, then every five seconds."""

FILE_BYTES = 16 * 1024**2
"""A service's local log file is emptied at this size."""

WAITING_BYTES = 64 * 1024**2
"""Maximum size of a service's log that waits locally for an unreachable store. More is discarded."""

LAST_BYTES = 64 * 1024

DELETED_AFTER_S = 15.0
"""A status that is missing for this long was deleted. A store server that has just started may miss it for a moment."""


def last_file(path: Path) -> Path:
    """Returns the file that keeps the end of an emptied log."""
    return path.with_name(f"{path.name}.1")


class Tail:
    """Uploads a growing file as numbered parts of complete lines, and at the end of a log the remaining bytes.

    A service's log is limited in the store and on disk: the file is emptied when it is large, and `last_file` keeps its end.

    Args:
        record: The run.
        kind: Kind of the parts.
        path: The file, which need not exist yet.
        offset: Number of bytes that the record already has.
    """

    def __init__(self, record: Record, kind: Literal["logs", "metrics"], path: Path, *, offset: int = 0) -> None:
        self._record = record
        self._kind = kind
        self._path = path
        self._offset = offset
        self._compactor = LogCompactor(record) if (record.kind, kind) == ("services", "logs") else None
        self._part = record.last_part(kind)  # later attempts continue the numbers
        if self._compactor is not None:
            self._part = max(self._part, record.log_index().following - 1)
        # `_offset` counts bytes read from the file. Those not yet in the store are in `_read_ahead` (an incomplete line) or in
        # `_pending` (a part whose upload failed).
        self._read_ahead = b""
        self._pending = b""
        # Other threads push too: before a checkpoint's marker is written, and at the end of the run.
        self._lock = threading.Lock()

    def push(self, *, final: bool = False) -> None:
        """Uploads new content. After a StoreError the next call uploads the same part first."""
        with self._lock:
            self._leave_out()
            while data := self._pending or self._read(final):
                self._pending = data  # a repeated upload must have the same content: a reader may have it
                try:
                    self._record.append(self._kind, self._part + 1, data)
                except PreconditionFailedError:
                    # An earlier runner still writes, or its last part arrived late. Keep both.
                    self._part = max(self._part + 1, self._record.last_part(self._kind))
                    continue
                self._part += 1
                self._pending = b""
                if self._compactor is not None:
                    self._compactor.added(self._part, len(data))
            self._empty()

    def _read(self, final: bool) -> bytes:
        """Returns the next part: complete lines, PART_BYTES or less unless one line is longer."""
        if not self._path.exists():
            return b""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = self._read_ahead
            while block := file.read(PART_BYTES - len(data) if len(data) < PART_BYTES else PART_BYTES):
                self._offset += len(block)
                data += block
                # A metrics event must not be split, however long it is: readers parse each part on its own.
                if len(data) >= PART_BYTES and (self._kind == "logs" or b"\n" in data):
                    break
        whole = data.rfind(b"\n") + 1
        if self._kind == "logs" and (final or (not whole and len(data) >= PART_BYTES)):
            whole = len(data)
        self._read_ahead = data[whole:]
        return data[:whole]

    def _empty(self) -> None:
        """Empties a service's local log once it is large and completely uploaded."""
        # Only for services, which run without end. Truncated in place, because the program has the file open.
        if self._compactor is None or self._offset < FILE_BYTES:
            return
        with self._path.open("r+b") as file:
            file.seek(max(0, self._offset - LAST_BYTES))
            last_file(self._path).write_bytes(file.read(LAST_BYTES))
            file.seek(self._offset)
            self._read_ahead += file.read()  # a few bytes written meanwhile
            file.truncate(0)  # the program appends, so it continues at the beginning
            self._offset = 0

    def _leave_out(self) -> None:
        """Discards a service's log that waits for an unreachable store, once it is too large for the disk."""
        if self._compactor is None or not self._path.exists():
            return
        waiting = self._path.stat().st_size - self._offset
        if waiting > WAITING_BYTES:
            with self._path.open("r+b") as file:
                file.truncate(0)
            self._offset = 0
            self._read_ahead += (
                f"\npalate: {waiting} bytes of the log were discarded: the store was unreachable\n".encode()
            )


class Heartbeat:
    """Renews a run's lease and checks for stop requests. A context manager.

    Attributes:
        stop_wanted: Somebody requested a stop, set the run to a final state, or deleted it.
        lease_lost: Another runner has the run: this one must exit without writing a state.
    """

    def __init__(self, record: Record, held: HeldLease, say: Callable[[str], None]) -> None:
        self.record = record
        self.held = held
        self.stop_wanted = threading.Event()
        self.lease_lost = threading.Event()
        self._say = say
        self._tails: list[Tail] = []
        self._ended = threading.Event()
        # Two threads: a slow upload of logs must not delay a heartbeat, or the run would be declared lost.
        self._threads = [
            threading.Thread(target=self._kept, args=(work,), daemon=True) for work in (self._beats, self._pushes)
        ]
        self._failing: set[str] = set()
        self._missing_since: float | None = None

    @property
    def attempt(self) -> int:
        return self.held.lease.attempt

    def __enter__(self) -> Heartbeat:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def push(self, *tails: Tail) -> None:
        """Sets the files to upload from now on."""
        self._tails = [*tails]  # a new list, because the other thread may be iterating over the old one

    def _kept(self, work: Callable[[], None]) -> None:
        """Restarts the work after any exception until the run has ended: without heartbeats the run would count as lost."""
        while not self._ended.is_set():
            try:
                work()
            except BaseException:  # SystemExit and MemoryError too: a thread that ends here ends the run's heartbeat
                logger.exception("the runner's %s failed and restarts", work.__name__)
                self._ended.wait(TICK_S)

    def _beats(self) -> None:
        beaten = checked = time.monotonic()
        while not self._ended.wait(TICK_S):
            now = time.monotonic()
            if now - beaten >= self.held.lease.every_s:
                # Before the call: a store that times out must not shift the next beat by its timeout.
                beaten = now
                self._guarded("heartbeat", self._beat)
            if now - checked >= STATUS_EVERY_S:
                checked = now
                self._guarded("status", self._check)

    def _beat(self) -> None:
        if not self.held.beat():
            self.lease_lost.set()
            self._ended.set()  # the logs belong to the other runner now

    def _check(self) -> None:
        if self.record.store.stat(self.record.key("status.json")) is None:
            now = time.monotonic()
            self._missing_since = self._missing_since or now
            if now - self._missing_since >= DELETED_AFTER_S:
                self.stop_wanted.set()
            return
        self._missing_since = None
        status = self.record.status()
        # A later attempt was started, which means that this runner was declared lost. It must not write a state any more.
        if status.attempt > self.attempt:
            self.lease_lost.set()
        elif status.state == "Stopping" or status.is_terminal:
            self.stop_wanted.set()

    def _pushes(self) -> None:
        begun = pushed = time.monotonic()
        while not self._ended.wait(TICK_S):
            now = time.monotonic()
            if now - pushed >= (PUSH_FAST_S if now - begun < FAST_UNTIL_S else PUSH_SLOW_S):
                pushed = now
                for tail in self._tails:
                    self._guarded("logs", tail.push)

    def _guarded(self, what: str, act: Callable[[], None]) -> None:
        """Calls `act` and catches its errors. Logs once that the store fails, and once that it is back. The next call repeats the work.

        A damaged record may raise any exception. It is read again, too, since it may be restored.
        """
        try:
            act()
        except Exception as error:
            if not self._failing:
                cause = str(error) if isinstance(error, PalateError | OSError) else repr(error)
                self._say(
                    f"note: the store or the run's record cannot be used; the run continues, and its {what} will follow: {cause}"
                )
            self._failing.add(what)
        else:
            if self._failing:
                self._failing.discard(what)
                if not self._failing:
                    self._say("note: the store is back")
