"""A runner's ties to the store while its program runs: heartbeat, wish to stop, log and metric parts, kept within bounds.

A service may run for months. Its readers find what was merged through `logs/index.json` (see `palate_recipes.specs.run.LogIndex`).

All of it happens on a thread of its own: a store that is slow, or away, never holds up the program or its deadline. What
could not be pushed is pushed when the store is back.
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
"""What is kept of a service's log in its store; the oldest goes first."""

PART_BYTES = 1024**2
"""A part is this large, and a merged one."""

_MOST_PARTS = 600
_UNMERGED_PARTS = 200
"""So many of the newest stay as they are: a reader that follows may be at one of them."""


class LogCompactor:
    """Of one service's log, whose only writer holds it; raises StoreError, and does the same the next time.

    Args:
        record: The service.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._index = record.log_index()
        found = record.part_sizes("logs")
        self._parts = {number: size for number, size in found.items() if number >= self._index.following}
        # The index is the truth: parts below `following` are merged already, and only their deletion was interrupted.
        self._left_over = [number for number in found if number < self._index.following]  # of a runner that was killed

    def added(self, number: int, size: int) -> None:
        """A part was written. Merges and removes what is over the bounds."""
        self._parts[number] = size
        self._remove_left_over()
        if len(self._parts) > _MOST_PARTS:
            self._merge()
        if self._index.size + sum(self._parts.values()) > KEPT_BYTES:
            self._drop()

    def _merge(self) -> None:
        """Merges the oldest parts into some of about PART_BYTES; they are in place before the index names them."""
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
        """Removes the oldest, down to seven eighths of the bound."""
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
"""Logs are pushed every second at first, when somebody is watching, then every five."""

FILE_BYTES = 16 * 1024**2
"""A service's log file on its machine is emptied when it is this large."""

WAITING_BYTES = 64 * 1024**2
"""Of a service's log, so much waits on its machine for a store that is away; then it is left out."""

LAST_BYTES = 64 * 1024

DELETED_AFTER_S = 15.0
"""A status that is missing for so long was deleted; a server that has just started may miss it for a moment."""


def last_file(path: Path) -> Path:
    """Returns where the end of a log is kept that was emptied."""
    return path.with_name(f"{path.name}.1")


class Tail:
    """Pushes what a growing file gains as numbered parts of the record: whole lines, and of a log at the end what is left.

    A service's log is kept within bounds, in the store and in the file, which is emptied now and then; what it said last is
    then in `last_file`.

    Args:
        record: The run.
        kind: Which parts.
        path: The file; it need not be there yet.
        offset: Bytes of it that the record has already.
    """

    def __init__(self, record: Record, kind: Literal["logs", "metrics"], path: Path, *, offset: int = 0) -> None:
        self._record = record
        self._kind = kind
        self._path = path
        self._offset = offset
        self._compactor = LogCompactor(record) if (record.kind, kind) == ("services", "logs") else None
        self._part = record.last_part(kind)  # a later attempt goes on counting
        if self._compactor is not None:
            self._part = max(self._part, record.log_index().following - 1)
        # `_offset` counts bytes read from the file. Those not yet in the store are in `_read_ahead` (an incomplete line) or in
        # `_pending` (a part whose upload failed).
        self._read_ahead = b""
        self._pending = b""
        # Other threads push too: before a checkpoint's marker is written, and at the end of the run.
        self._lock = threading.Lock()

    def push(self, *, final: bool = False) -> None:
        """Pushes what is new. Raises StoreError; the same is then pushed first the next time."""
        with self._lock:
            self._leave_out()
            while data := self._pending or self._read(final):
                self._pending = data  # a part must not grow when it is pushed again: a reader may have it
                try:
                    self._record.append(self._kind, self._part + 1, data)
                except PreconditionFailedError:
                    # A runner before this one is still at it, or its last word came late: both are kept.
                    self._part = max(self._part + 1, self._record.last_part(self._kind))
                    continue
                self._part += 1
                self._pending = b""
                if self._compactor is not None:
                    self._compactor.added(self._part, len(data))
            self._empty()

    def _read(self, final: bool) -> bytes:
        """Returns the next part: whole lines of PART_BYTES or less, unless one line is longer."""
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
        """Empties a service's log of this machine once it is large, and all of it is in the store."""
        # Only for services, which run without end. Truncated in place, because the program has the file open.
        if self._compactor is None or self._offset < FILE_BYTES:
            return
        with self._path.open("r+b") as file:
            file.seek(max(0, self._offset - LAST_BYTES))
            last_file(self._path).write_bytes(file.read(LAST_BYTES))
            file.seek(self._offset)
            self._read_ahead += file.read()  # what came meanwhile is little
            file.truncate(0)  # the program appends, so it goes on at the beginning
            self._offset = 0

    def _leave_out(self) -> None:
        """Leaves out what a service said while its store was away, once it is too much for the disk."""
        if self._compactor is None or not self._path.exists():
            return
        waiting = self._path.stat().st_size - self._offset
        if waiting > WAITING_BYTES:
            with self._path.open("r+b") as file:
                file.truncate(0)
            self._offset = 0
            self._read_ahead += f"\npalate: {waiting} bytes of the log were left out: the store was away\n".encode()


class Heartbeat:
    """Keeps a run's lease and looks for a wish to stop; a context manager.

    Attributes:
        stop_wanted: Somebody asked for a stop, gave the run up for lost, or deleted it.
        lease_lost: Another runner has the run: this one must leave without a word.
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
        """Pushes these files from now on, instead of those before."""
        self._tails = [*tails]  # a new list, because the other thread may be iterating over the old one

    def _kept(self, work: Callable[[], None]) -> None:
        """Begins the work anew whatever it ended with, until the run is over: without heartbeats the run counts as lost."""
        while not self._ended.is_set():
            try:
                work()
            except BaseException:  # SystemExit and MemoryError too: a thread that ends here ends the run's heartbeat
                logger.exception("the runner's %s broke off and begins anew", work.__name__)
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
            self._ended.set()  # the logs are the other runner's now

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
        """Says once that the store fails, and once that it is back; what `act` was to do is done the next time.

        A damaged record may raise anything; it may be replaced by a whole one, so it is read again as well.
        """
        try:
            act()
        except Exception as error:
            if not self._failing:
                cause = str(error) if isinstance(error, PalateError | OSError) else repr(error)
                self._say(f"note: the store fails, the run continues and its {what} will follow: {what}: {cause}")
            self._failing.add(what)
        else:
            if self._failing:
                self._failing.discard(what)
                if not self._failing:
                    self._say("note: the store is back")
