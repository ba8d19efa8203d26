"""What a job and a service have in common for the one who holds them: started, refreshed, followed, stopped. Knows no kind."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

from palate.backend import Backend, get_backend
from palate.display import Display, make_display
from palate.errors import WaitTimeoutError
from palate.record import ACTIVE, TERMINAL, Manifest, Record, State, Status
from palate.session import Session

START_LIMIT_S = 60.0
"""A run without an engine id after this long was never started: its client died in between."""

STOP_GRACE_S = 150.0
FOLLOW_INTERVAL_S = 1.0
POLL_S = 0.2


class RunHandle:
    """A run in a store, with the backend that runs it.

    Args:
        record: Its prefix in the store.
        session: Store and credentials.
    """

    def __init__(self, record: Record, session: Session) -> None:
        self.record = record
        self.session = session
        self._manifest: Manifest | None = None

    @property
    def manifest(self) -> Manifest:
        if self._manifest is None:
            self._manifest = self.record.manifest()
        return self._manifest

    @property
    def backend(self) -> Backend:
        if self.session.backend.name == self.manifest.backend:
            return self.session.backend
        return get_backend(self.manifest.backend)

    def start(self, environments: dict[str, str] | None = None) -> None:
        """Gives the run to its backend; a start that fails becomes the run's status and is raised."""
        env = {**self.session.environment(), **(environments or {})}
        command = [sys.executable, "-m", "palate.runner", self.record.uri]
        try:
            engine_id = self.backend.start(command, run_name=f"{self.record.kind}-{self.record.name}", env=env)
        except Exception as error:
            self.record.advance("Failed", expect={"Creating"}, reason=f"the backend could not start it: {error}")
            raise
        self.record.note(engine_id=engine_id)

    def refresh(self) -> Status:
        """Returns the status, after looking whether the engine still stands behind it."""
        status = self.record.status()
        if status.is_terminal:
            return status
        if not status.engine_id:
            if time.time() - status.updated_at > START_LIMIT_S:
                reason = "it was created, but never started: the process that did so ended too early"
                return self.record.advance("Failed", expect={"Creating"}, reason=reason) or self.record.status()
            return status
        if self.backend.status(status.engine_id) != "gone":
            return status
        status = self.record.status()  # it may have finished between the two looks
        if status.is_terminal:
            return status
        words = [line for line in self.backend.logs(status.engine_id).splitlines() if line.strip()][-10:]
        asked = status.state == "Stopping"
        state: State = "Stopped" if asked else "Failed"
        reason = (
            "stopped on request"
            if asked
            else "its runner is gone without a last word: killed, or the machine went down"
        )
        tail = tuple([*self.record.log_lines()][-15:] + words)
        return (
            self.record.advance(state, expect=ACTIVE, reason=reason, log_tail=tail, endpoint="") or self.record.status()
        )

    def follow(
        self,
        *,
        until: Callable[[Status], bool],
        show_logs: bool,
        timeout_s: float | None = None,
        interval_s: float = FOLLOW_INTERVAL_S,
        what: str,
    ) -> Status:
        """Waits until `until(status)`, showing what the run says; raises WaitTimeoutError when the time is over.

        A run that ends, ends the waiting, whether `until` has come true or not.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        log_part = metric_part = 0
        with make_display(show_logs, self.record.name) as display:
            while True:
                status = self.refresh()
                log_part, metric_part = self._show_news(display, log_part, metric_part)
                if until(status) or status.is_terminal:
                    self._show_news(display, log_part, metric_part)
                    return status
                if deadline is not None and time.monotonic() >= deadline:
                    raise WaitTimeoutError(
                        f"{what} did not come within {timeout_s:g} s: {self.record.name} is {status.state}. It goes on; "
                        f"`palate logs {self.record.name}` shows what it does, `palate stop {self.record.name}` ends it"
                    )
                time.sleep(interval_s if deadline is None else max(0.0, min(interval_s, deadline - time.monotonic())))

    def _show_news(self, display: Display, log_part: int, metric_part: int) -> tuple[int, int]:
        if not display.wants_news:
            return log_part, metric_part
        for number, data in self.record.parts("logs", after=log_part):
            log_part = number
            display.log(data.decode(errors="replace"))
        for number, data in self.record.parts("metrics", after=metric_part):
            metric_part = number
            display.metrics(data)
        return log_part, metric_part

    def lines(self, *, follow: bool) -> Iterator[str]:
        """Yields log lines; with `follow`, goes on until the run has ended."""
        part, rest = 0, b""
        while True:
            ended = not follow or self.refresh().state in TERMINAL
            for number, data in self.record.parts("logs", after=part):
                part = number
                *whole, rest = (rest + data).split(b"\n")
                yield from (line.decode(errors="replace") for line in whole)
            if ended:
                if rest:
                    yield rest.decode(errors="replace")
                return
            time.sleep(FOLLOW_INTERVAL_S)

    def stop(self, *, grace_s: float = STOP_GRACE_S) -> Status:
        """Asks the run to stop, waits for it, and ends it by force after `grace_s` seconds. Ended already is no error."""
        status = self.refresh()
        if status.is_terminal:
            return status
        self.record.advance("Stopping", expect={"Creating", "Running"})
        deadline = time.monotonic() + grace_s
        while not (status := self.refresh()).is_terminal and time.monotonic() < deadline:
            if not status.engine_id:
                break  # never started: nothing will answer
            time.sleep(POLL_S)
        if status.engine_id:
            self.backend.stop(status.engine_id, grace_s=1.0 if not status.is_terminal else 5.0)
        return (
            self.record.advance("Stopped", expect=ACTIVE, reason="stopped on request", endpoint="")
            or self.record.status()
        )
