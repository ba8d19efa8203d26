"""What a job and a service have in common for the one who holds them: started, refreshed, followed, stopped. Knows no kind."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from palate.backends import Backend, EngineStatus, Launch, backend_names, for_run, get_backend
from palate.paths import forget_start, remember_start, was_started_here
from palate.runs.lease import LOST_AFTER_S, START_ID_VARIABLE, is_dead_here, read_lease, silence_s
from palate.runs.record import LONGEST_LINE, LOST, Record
from palate.session import Session
from palate.store.uri import normal_uri
from palate.ui import make_display
from palate.ui.display import Display
from palate_recipes.errors import ConfigurationError, DamagedFilesError, WaitTimeoutError
from palate_recipes.specs.run import ACTIVE, TERMINAL, Manifest, ServeManifest, State, Status
from palate_recipes.specs.train import TrainSpec

logger = logging.getLogger("palate.runs.handle")

START_LIMIT_S = 60.0
"""A run without an engine id after this long was never started: its client died in between."""

STOP_GRACE_S = 150.0
LAST_STEPS_S = 60.0
"""After its last word a runner lets go of its lease and its folder, which takes a moment."""

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

    def replace_manifest(self, known: ServeManifest, new: ServeManifest) -> None:
        """Gives the service another manifest, for its next attempt; raises ConfigurationError unless the known one is there now."""
        self.record.replace_manifest(known, new)
        self._manifest = new

    @property
    def backend(self) -> Backend:
        """The run's own, which touches nothing of another run."""
        same = self.session.backend.name == self.manifest.backend
        return for_run(self.session.backend if same else get_backend(self.manifest.backend), self.record.uri)

    def start(self, environments: dict[str, str] | None = None) -> None:
        """Gives the run to its backend; a start that fails becomes the run's status and is raised."""
        start_id = token_hex(8)
        remember_start(self.record.uri, self.record.manifest_bytes())
        launch = Launch(
            uri=self.record.uri,
            kind=self.record.kind,
            name=self.record.name,
            env={**self.session.environment(), **(environments or {}), START_ID_VARIABLE: start_id},
            folders=self._folders(),
            placement=self.manifest.body.placement,
        )
        try:
            engine_id = self.backend.start(launch)
        except Exception as error:
            self.record.advance("Failed", expect={"Creating"}, reason=f"the backend could not start it: {error}")
            raise
        self.record.note(engine_id=engine_id, start_id=start_id)

    def _folders(self) -> dict[Path, bool]:
        """The folders of this machine that the run's manifest names, and whether it writes there."""
        body = self.manifest.body
        source = body.model.source
        uris = [facts.uri for facts in body.inputs.values()] if isinstance(body, TrainSpec) else [body.tuned_uri or ""]
        read = [Path(source.location)] if source.kind == "folder" else []
        for uri in filter(None, uris):
            scheme, _, path = normal_uri(uri).partition("://")
            if scheme == "file":
                local = Path(path)
                read.append(local if local.is_dir() else local.parent)
        own = self.record.store.local_path("")
        return {**dict.fromkeys(read, False), **({own: True} if own is not None else {})}

    def restart(
        self, *, expect: Collection[State], attempt: int, more: int = 0, environments: dict[str, str], **ended: Any
    ) -> bool:
        """Begins the next attempt, and says whether it was this call that did.

        Args:
            expect: States that the run may leave.
            attempt: The attempt that is over.
            more: Attempts that it is given anew; 0 leaves the limit.
            environments: Variables for the program.
            ended: See `Record.begin_again`.
        """
        begun = self.record.begin_again(expect=expect, attempt=attempt, more=more, **ended)
        if begun is not None:
            self.start(environments)
        return begun is not None

    def environments(self, given: Mapping[str, str] | None = None) -> dict[str, str]:
        """Returns the variables that the program began with: from `given`, else from this process's environment.

        Raises:
            ConfigurationError: One is in neither; their values are never recorded.
        """
        body = self.manifest.body
        names = body.environment_names if isinstance(body, TrainSpec) else ()
        known = {**{name: os.environ[name] for name in names if name in os.environ}, **(given or {})}
        if missing := [name for name in names if name not in known]:
            raise ConfigurationError(
                f"{self.record.name} was started with environments {', '.join(missing)}, whose values are never recorded: "
                "give them again with resume(environments={…}), or set them in this environment"
            )
        return known

    def refresh(self) -> Status:
        """Returns the status, after looking whether a runner still stands behind it.

        A run whose runner is lost is Failed by this look, or begins its next attempt if it has one left, its backend can be
        asked from here, and this user started it with the manifest that it has: whoever may write to a shared store must
        not start programs on the machines of those who read it.
        """
        status = self.record.status()
        if status.is_terminal or not (cause := self.lost(status)):
            return status
        before, status = status, self.record.status()  # it may have finished between the two looks
        if status.is_terminal or (status.attempt, status.start_id) != (before.attempt, before.start_id):
            return status
        gone = bool(status.engine_id) and self.backend.status(status.engine_id).state == "gone"
        if (
            status.state == "Running"
            and gone
            and status.attempt < status.last_attempt
            and was_started_here(self.record.uri, self.record.manifest_bytes())
            and self._begin_again(status, cause)
        ):
            return self.record.status()
        asked = status.state == "Stopping"
        words = self.backend.logs(status.engine_id).splitlines() if status.engine_id else []
        words = [line for line in words if line.strip()][-10:]
        ended = self.record.advance(
            "Stopped" if asked else "Failed",
            expect={status.state},
            attempt=status.attempt,
            reason="stopped on request" if asked else cause,
            log_tail=tuple(self.record.last_log_lines(15) + words),
            endpoint="",
        )
        if gone:
            self.backend.stop(status.engine_id, grace_s=0)  # its words are kept, and what it left behind is nobody's
        return ended or self.record.status()

    def lost(self, status: Status) -> str:
        """Returns why an active run has no runner any more, or "" when it has one or that cannot be told from here."""
        engine = self.backend.status(status.engine_id) if status.engine_id else EngineStatus("unknown")
        if engine.state == "running":
            return ""
        gone = engine.state == "gone"
        lost = f"the runner died without writing a status: {engine.cause}" if engine.cause else LOST
        try:
            lease = read_lease(self.record)
        except DamagedFilesError as error:
            silent_s = silence_s(self.record)  # a runner that is well writes it anew
            return f"it has no runner: {error}" if silent_s is not None and silent_s > LOST_AFTER_S else ""
        if lease is None or lease.attempt < status.attempt:  # nobody has taken up this attempt
            if gone:
                return lost
            if not status.engine_id and (silence_s(self.record, "status.json") or 0) > START_LIMIT_S:
                return "it was created, but never started: the process that did so ended too early"
            return ""
        if lease.released:
            return lost
        silent_s = silence_s(self.record)
        if silent_s is None or silent_s <= lease.fresh_s:
            return ""  # a heartbeat is the runner's own word: nothing that is seen from here counts against it
        # The engine knows the process that it started; the run may be in the hands of another one.
        if (gone and lease.start_id == status.start_id) or is_dead_here(lease):
            return lost
        if silent_s <= lease.lost_after_s:
            return ""
        return (
            f"its runner on {lease.host} has not been heard of for {silent_s:.0f} s: killed, cut off from the store, "
            "or its machine went down"
        )

    def _begin_again(self, status: Status, cause: str) -> bool:
        try:
            environments = self.environments()
        except ConfigurationError:
            return False  # a resume() can give them
        self.backend.stop(status.engine_id, grace_s=0)  # what the runner may have left behind
        try:
            return self.restart(expect={"Running"}, attempt=status.attempt, environments=environments, reason=cause)
        except Exception as error:
            logger.warning("%s could not be started again: %s", self.record.name, error)
            return True  # the status says so

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
                    if status.is_terminal:
                        self._let_go(status)
                    return status
                if deadline is not None and time.monotonic() >= deadline:
                    raise WaitTimeoutError(
                        f"{what} did not come within {timeout_s:g} s: {self.record.name} is {status.state}. It goes on; "
                        f"`palate logs {self.record.name}` shows what it does, `palate stop {self.record.name}` ends it"
                    )
                time.sleep(interval_s if deadline is None else max(0.0, min(interval_s, deadline - time.monotonic())))

    def _let_go(self, ended: Status) -> None:
        """Lets the engine forget a run that is over, once its runner has done its last steps."""
        if ended.engine_id:
            with suppress(ConfigurationError):  # a backend that is not installed here keeps nothing here, either
                self.backend.stop(ended.engine_id, grace_s=LAST_STEPS_S)

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
                if len(rest) > LONGEST_LINE:
                    yield rest.decode(errors="replace")
                    rest = b""
            if ended:
                if rest:
                    yield rest.decode(errors="replace")
                return
            time.sleep(FOLLOW_INTERVAL_S)

    def stop(self, *, grace_s: float = STOP_GRACE_S) -> Status:
        """Asks the run to stop, waits for it, and ends it by force after `grace_s` seconds. Ended already is no error.

        Its backend keeps nothing of it either way.
        """
        status = self.refresh()
        if status.is_terminal:
            self._let_go(status)
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

    def delete(self, *, grace_s: float = STOP_GRACE_S) -> None:
        """Stops the run and removes all that the store has of it; its record may be damaged.

        Of a run with a damaged record, what the engines of this machine hold is ended. A runner elsewhere ends when it
        finds its run deleted.
        """
        try:
            self.stop(grace_s=grace_s)
        except DamagedFilesError:
            self._stop_unread()
        self.record.delete()
        forget_start(self.record.uri)

    def _stop_unread(self) -> None:
        with suppress(DamagedFilesError):
            self.record.advance("Stopping", expect={"Creating", "Running"})
        place = _place(self.record.uri)
        for name in backend_names():
            try:
                backend = get_backend(name)
                held = [run for run in backend.runs() if _place(run.uri) == place]
            except ConfigurationError:  # it is not this machine's
                continue
            for run in held:
                for_run(backend, self.record.uri).stop(run.engine_id, grace_s=LAST_STEPS_S)


def _place(uri: str) -> str:
    """Returns a run's URI so that two spellings of one place are equal."""
    scheme, _, path = normal_uri(uri).partition("://")
    return os.path.realpath(path) if scheme == "file" else f"{scheme}://{path}"
