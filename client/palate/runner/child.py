"""One child program: started, watched, its words pushed to the record, and never left behind. Knows no trainer or server."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from palate.record import Record, Status

TICK_S = 0.25
STATUS_EVERY_S = 2.0
PUSH_FAST_S = 1.0
PUSH_SLOW_S = 5.0
FAST_UNTIL_S = 120.0
"""Logs are pushed every second at first, when somebody is watching, then every five."""

LOG_TAIL_LINES = 25
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # opened here: between fork and exec as little as possible may happen


class Child:
    """A program whose output goes to `log` and whose life ends with this process."""

    def __init__(self, argv: list[str], *, log: Path, env: dict[str, str], cwd: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
                cwd=cwd,
                preexec_fn=_die_with_parent,
            )

    def terminate(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Tail:
    """Pushes what a growing file gains as numbered parts of the record, whole lines only until the end."""

    def __init__(self, record: Record, kind: Literal["logs", "metrics"], path: Path) -> None:
        self._record = record
        self._kind = kind
        self._path = path
        self._offset = 0
        self._part = sum(1 for _ in record.parts(kind))  # a later attempt goes on counting

    def push(self, *, final: bool = False) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        if not final:
            data = data[: data.rfind(b"\n") + 1]
        if data:
            self._record.append(self._kind, self._part + 1, data)
            self._part += 1
            self._offset += len(data)


def log_line(log: Path, text: str) -> None:
    """Adds a line of the runner's own to the run's log."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"palate: {text}\n")


def log_tail(log: Path) -> tuple[str, ...]:
    """Returns the last lines of the log that say something."""
    if not log.exists():
        return ()
    lines = [line.rstrip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return tuple(line for line in lines if line)[-LOG_TAIL_LINES:]


def watch(
    child: Child,
    record: Record,
    tails: list[Tail],
    *,
    terminated: threading.Event,
    on_tick: Callable[[], None],
    deadline: Callable[[], float | None],
    grace_s: float,
) -> Literal["ended", "stopped", "timed out"]:
    """Pushes what the child says until it ends, a stop is asked for, or the deadline comes.

    Args:
        child: The program.
        record: Its run; Stopping, a terminal state, or a deleted record is the wish to stop.
        tails: Files to push.
        terminated: Set when this runner itself was told to end.
        on_tick: Called every quarter second.
        deadline: Gives the `time.monotonic()` at which the run is over, or None.
        grace_s: Seconds that the child has to end by itself after a stop, before it is killed.

    Returns:
        `ended` when the child ended by itself; else the child has been ended.
    """
    begun = time.monotonic()
    pushed = checked = begun
    outcome: Literal["ended", "stopped", "timed out"] = "ended"
    kill_at: float | None = None
    while child.process.poll() is None:
        now = time.monotonic()
        if now - pushed >= (PUSH_FAST_S if now - begun < FAST_UNTIL_S else PUSH_SLOW_S):
            for tail in tails:
                tail.push()
            pushed = now
        if kill_at is None:
            if terminated.is_set():
                outcome = "stopped"
            elif (limit := deadline()) is not None and now >= limit:
                outcome = "timed out"
            elif now - checked >= STATUS_EVERY_S:
                checked = now
                if _wants_stop(record):
                    outcome = "stopped"
            if outcome != "ended":
                child.terminate()
                kill_at = now + grace_s
        elif now >= kill_at:
            child.kill()
        on_tick()
        try:
            child.process.wait(TICK_S)
        except subprocess.TimeoutExpired:
            pass
    return outcome


def _wants_stop(record: Record) -> bool:
    if record.store.stat(record.key("status.json")) is None:
        return True  # the run was deleted
    status: Status = record.status()
    return status.state == "Stopping" or status.is_terminal


def describe_exit(code: int) -> str:
    """Returns what an exit code says to a person."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        return f"killed by {name}: most often the kernel ending a process that took too much memory"
    return f"killed by {name}"


def _die_with_parent() -> None:
    # A runner that is killed must not leave a program behind: the kernel signals the child instead.
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
