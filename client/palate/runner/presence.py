"""A runner's ties to the store while its program runs: heartbeat, wish to stop, log and metric parts. Knows the record, no program.

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

from palate.errors import PalateError
from palate.lease import HeldLease
from palate.record import Record
from palate.store.errors import PreconditionFailedError

logger = logging.getLogger("palate.runner")

TICK_S = 0.25
STATUS_EVERY_S = 2.0
PUSH_FAST_S = 1.0
PUSH_SLOW_S = 5.0
FAST_UNTIL_S = 120.0
"""Logs are pushed every second at first, when somebody is watching, then every five."""

DELETED_AFTER_S = 15.0
"""A status that is missing for so long was deleted; a server that has just started may miss it for a moment."""


class Tail:
    """Pushes what a growing file gains as numbered parts of the record: whole lines, and of a log at the end what is left.

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
        self._part = record.last_part(kind)  # a later attempt goes on counting
        self._pending = b""
        self._lock = threading.Lock()

    def push(self, *, final: bool = False) -> None:
        """Pushes what is new. Raises StoreError; the same is then pushed first the next time."""
        with self._lock:
            while data := self._pending or self._read(final):
                self._pending = data  # a part must not grow when it is pushed again: a reader may have it
                try:
                    self._record.append(self._kind, self._part + 1, data)
                except PreconditionFailedError:
                    # A runner before this one is still at it, or its last word came late: both are kept.
                    self._part = max(self._part + 1, self._record.last_part(self._kind))
                    continue
                self._part += 1
                self._offset += len(data)
                self._pending = b""

    def _read(self, final: bool) -> bytes:
        if not self._path.exists():
            return b""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        return data if final and self._kind == "logs" else data[: data.rfind(b"\n") + 1]


class Presence:
    """Keeps a run's lease and looks for a wish to stop; a context manager.

    Attributes:
        stop_wanted: Somebody asked for a stop, gave the run up for lost, or deleted it.
        fenced: Another runner has the run: this one must leave without a word.
    """

    def __init__(self, record: Record, held: HeldLease, say: Callable[[str], None]) -> None:
        self.record = record
        self.held = held
        self.stop_wanted = threading.Event()
        self.fenced = threading.Event()
        self._say = say
        self._tails: list[Tail] = []
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._kept, args=(work,), daemon=True) for work in (self._beats, self._pushes)
        ]
        self._failing: set[str] = set()
        self._missing_since: float | None = None

    @property
    def attempt(self) -> int:
        return self.held.lease.attempt

    def __enter__(self) -> Presence:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def push(self, *tails: Tail) -> None:
        """Pushes these files from now on, instead of those before."""
        self._tails = [*tails]

    def _kept(self, work: Callable[[], None]) -> None:
        """Begins the work anew whatever it ended with, until the run is over: without heartbeats the run counts as lost."""
        while not self._ended.is_set():
            try:
                work()
            except BaseException:
                logger.exception("the runner's %s broke off and begins anew", work.__name__)
                self._ended.wait(TICK_S)

    def _beats(self) -> None:
        beaten = checked = time.monotonic()
        while not self._ended.wait(TICK_S):
            now = time.monotonic()
            if now - beaten >= self.held.lease.every_s:
                beaten = now
                self._guarded("heartbeat", self._beat)
            if now - checked >= STATUS_EVERY_S:
                checked = now
                self._guarded("status", self._check)

    def _beat(self) -> None:
        if not self.held.beat():
            self.fenced.set()
            self._ended.set()

    def _check(self) -> None:
        if self.record.store.stat(self.record.key("status.json")) is None:
            now = time.monotonic()
            self._missing_since = self._missing_since or now
            if now - self._missing_since >= DELETED_AFTER_S:
                self.stop_wanted.set()
            return
        self._missing_since = None
        status = self.record.status()
        if status.attempt > self.attempt:
            self.fenced.set()
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
