"""What a runner has for its run, and how an attempt ended. Knows no program."""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from palate.runner.child_process import log_line
from palate.runner.heartbeat import Heartbeat
from palate.runner.retry import StoreRetry
from palate.runs.record import Record
from palate.session import Session
from palate_recipes.errors import PalateError
from palate_recipes.specs.run import Manifest


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What a runner needs to execute its run.

    Attributes:
        record: The run. Requests are retried while the store is unreachable.
        direct: The same without retries.
        manifest: The run's manifest.
        session: Opens inputs and weights.
        work: Local work folder, removed at the end.
        heartbeat: Lease, stop request, and uploads of logs and metrics.
        retry: Retries other store operations.
        terminated: Set when this runner got a signal to end.
    """

    record: Record
    direct: Record
    manifest: Manifest
    session: Session
    work: Path
    heartbeat: Heartbeat
    retry: StoreRetry
    terminated: threading.Event

    @property
    def log(self) -> Path:
        """Log file of the program and the runner."""
        return self.work / "program.log"

    def say(self, text: str) -> None:
        """Appends a line of the runner to the log."""
        log_line(self.log, text)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How an attempt ended.

    Attributes:
        state: The state to write.
        reason, exit_code, log_tail: For the status. See `palate_recipes.specs.run.Status`.
        again: Whether a failure may be retried.
    """

    state: Literal["Succeeded", "Failed", "Stopped"]
    reason: str = ""
    exit_code: int | None = None
    log_tail: tuple[str, ...] = ()
    again: bool = True


def reason_of(error: Exception) -> str:
    """Returns an error in words, for a status."""
    if isinstance(error, PalateError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: {error}. Free some space, or set PALATE_HOME to a folder on another disk."
    return f"{type(error).__name__}: {error}"
