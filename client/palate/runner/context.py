"""What a runner holds of its run, and how one attempt of it ended. Knows no program."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from palate.runner.child_process import log_line
from palate.runner.heartbeat import Heartbeat
from palate.runner.retry import StoreRetry
from palate.runs.record import Record
from palate.session import Session
from palate_recipes.specs.run import Manifest


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """A runner's post beside its program.

    Attributes:
        record: The run; each request waits for a store that is away.
        direct: The same, without waiting.
        manifest: What is to be run.
        session: Where inputs and weights are opened.
        work: Folder on this machine, removed at the end.
        heartbeat: Lease, wish to stop, and parts.
        retry: For what else waits for a store.
        terminated: Set when this runner was told to end.
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
        """What program and runner say."""
        return self.work / "program.log"

    def say(self, text: str) -> None:
        """Adds a line of the runner's own to the log."""
        log_line(self.log, text)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How an attempt ended.

    Attributes:
        state: The state to be written.
        reason, exit_code, log_tail: For the status, see `palate_recipes.specs.run.Status`.
        again: Whether a further attempt may be made of a failed one.
    """

    state: Literal["Succeeded", "Failed", "Stopped"]
    reason: str = ""
    exit_code: int | None = None
    log_tail: tuple[str, ...] = ()
    again: bool = True
