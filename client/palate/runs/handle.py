"""What jobs and services have in common: start, refresh, follow, stop. Knows no kind of run."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from palate.backends import Backend, EngineStatus, Launch, backend_names, folders_seen, for_run, get_backend
from palate.paths import forget_start, remember_start, stale_work_folders, was_started_here, work_folder
from palate.runs.lease import LOST_AFTER_S, START_ID_VARIABLE, is_dead_here, read_lease, silence_s
from palate.runs.record import LONGEST_LINE, LOST, Record
from palate.session import Session
from palate.store.uri import normal_uri
from palate.ui import make_display
from palate.ui.display import Display
from palate_recipes.errors import ConfigurationError, DamagedFilesError, WaitTimeoutError
from palate_recipes.specs.evaluation import EvaluationSpec
from palate_recipes.specs.run import ACTIVE, TERMINAL, Deployment, Manifest, ServeManifest, State, Status
from palate_recipes.specs.train import TrainSpec

logger = logging.getLogger("palate.runs.handle")

START_LIMIT_S = 60.0
"""A run without an engine id after this time was never started: its client died before."""

STOP_GRACE_S = 150.0
LAST_STEPS_S = 60.0
"""After its last status a runner still releases its lease and removes its folder."""

FOLLOW_INTERVAL_S = 1.0
POLL_S = 0.2


class RunHandle:
    """A run in a store, with the backend that runs it.

    Args:
        record: Its record in the store.
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
        """Replaces the service's manifest for its next attempt. Raises ConfigurationError unless `known` is the current one."""
        self.record.replace_manifest(known, new)
        self._manifest = new

    def forget_manifest(self) -> None:
        """The manifest was replaced: the next access reads it again."""
        self._manifest = None

    @property
    def backend(self) -> Backend:
        """The run's backend, limited to this run."""
        same = self.session.backend.name == self.manifest.backend
        return for_run(self.session.backend if same else get_backend(self.manifest.backend), self.record.uri)

    @property
    def is_own(self) -> bool:
        """Whether this user started or resumed it from this PALATE_HOME, with the manifest that the store has now."""
        return was_started_here(self.record.uri, self.record.manifest_bytes())

    def start(self, environments: dict[str, str] | None = None) -> None:
        """Starts the run on its backend. If that fails, sets the status to Failed and raises."""
        start_id = token_hex(8)
        self.forget_manifest()  # an update may have replaced it
        remember_start(self.record.uri, self.record.manifest_bytes())
        launch = Launch(
            uri=self.record.uri,
            kind=self.record.kind,
            name=self.record.name,
            env={**self.session.environment(), **(environments or {}), START_ID_VARIABLE: start_id},
            folders=self._folders(self.manifest.body),
            placement=self.manifest.body.placement,
        )
        try:
            engine_id = self.backend.start(launch)
        except Exception as error:
            self.record.advance("Failed", expect={"Creating"}, reason=f"the backend cannot start it: {error}")
            raise
        self.record.note(engine_id=engine_id, start_id=start_id)

    def out_of_reach(self, body: Deployment, status: Status) -> list[Path]:
        """Returns the local folders that a deployment uses and the running runner, as its backend started it, cannot see."""
        seen = folders_seen(self.backend, status.engine_id)
        if seen is None:
            return []
        return [folder for folder in self._folders(body) if not any(folder.is_relative_to(one) for one in seen)]

    def _folders(self, body: TrainSpec | Deployment | EvaluationSpec) -> dict[Path, bool]:
        """Local folders that a run uses, and whether it writes to them."""
        source = body.model.source
        if isinstance(body, TrainSpec):
            uris = [facts.uri for facts in body.inputs.values()]
        elif isinstance(body, EvaluationSpec):
            began_with = body.training.inputs.get("adapter")
            uris = [body.tuned_uri, body.data.uri, began_with.uri if began_with else ""]
        else:
            uris = [body.tuned_uri or ""]
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
        """Starts the next attempt. Returns False if another caller did.

        Args:
            expect: States from which the change is allowed.
            attempt: The attempt that has ended.
            more: New number of remaining attempts; 0 keeps the limit.
            environments: Environment variables of the program.
            ended: See `Record.begin_again`.
        """
        begun = self.record.begin_again(expect=expect, attempt=attempt, more=more, **ended)
        if begun is not None:
            self.start(environments)
        return begun is not None

    def environments(self, given: Mapping[str, str] | None = None) -> dict[str, str]:
        """Returns the program's environment variables: from `given`, else from this process's environment.

        Raises:
            ConfigurationError: One is in neither. Their values are never recorded.
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
        """Returns the status, after a check whether the runner is alive.

        If the runner is lost, this sets the run to Failed. It starts the next attempt instead if one is left, the backend is
        on this machine, and this user started the run with the same manifest: a user who can write to a shared store must not
        be able to start programs on its readers' machines.
        """
        status = self.record.status()
        if status.is_terminal or not (cause := self.lost(status)):
            return status
        before, status = status, self.record.status()  # it may have finished meanwhile
        if status.is_terminal or (status.attempt, status.start_id) != (before.attempt, before.start_id):
            return status
        gone = bool(status.engine_id) and self.backend.status(status.engine_id).state == "gone"
        if (
            status.state == "Running"
            and gone
            and status.attempt < status.last_attempt
            and self.is_own
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
            self.backend.stop(status.engine_id, grace_s=0)  # its output is saved, and nothing of it is needed any more
        return ended or self.record.status()

    def lost(self, status: Status) -> str:
        """Returns why an active run has lost its runner, or "" if it has one or this is unknown."""
        engine = self.backend.status(status.engine_id) if status.engine_id else EngineStatus("unknown")
        if engine.state == "running":
            return ""
        gone = engine.state == "gone"
        lost = f"the runner died without writing a status: {engine.cause}" if engine.cause else LOST
        try:
            lease = read_lease(self.record)
        except DamagedFilesError as error:
            silent_s = silence_s(self.record)  # a live runner rewrites it
            return f"it has no runner: {error}" if silent_s is not None and silent_s > LOST_AFTER_S else ""
        if lease is None or lease.attempt < status.attempt:  # no runner has started this attempt
            if gone:
                return lost
            if not status.engine_id and (silence_s(self.record, "status.json") or 0) > START_LIMIT_S:
                return "it was created, but never started: the process that created it ended too early"
            return ""
        if lease.released:
            return lost
        silent_s = silence_s(self.record)
        if silent_s is None or silent_s <= lease.fresh_s:
            return ""  # a fresh heartbeat outweighs anything seen from this machine
        # The engine knows only the process that it started. Another process may have the run.
        if (gone and lease.start_id == status.start_id) or is_dead_here(lease):
            return lost
        if silent_s <= lease.lost_after_s:
            return ""
        return (
            f"its runner on {lease.host} has sent no heartbeat for {silent_s:.0f} s: it was killed, cannot reach the store, "
            "or its machine went down"
        )

    def _begin_again(self, status: Status, cause: str) -> bool:
        try:
            environments = self.environments()
        except ConfigurationError:
            return False  # the user can give them to resume()
        self.backend.stop(status.engine_id, grace_s=0)  # cleans up after the runner
        try:
            return self.restart(expect={"Running"}, attempt=status.attempt, environments=environments, reason=cause)
        except Exception as error:
            logger.warning("%s cannot be restarted: %s", self.record.name, error)
            return True  # the status has the error

    def follow(
        self,
        *,
        until: Callable[[Status], bool],
        show_logs: bool,
        timeout_s: float | None = None,
        interval_s: float = FOLLOW_INTERVAL_S,
        what: str,
        stages: bool = False,
        after_log_part: int = 0,
    ) -> Status:
        """Waits until `until(status)` is true or the run has ended, and shows its output, of the log what is after a part.

        Raises:
            WaitTimeoutError: It took longer than `timeout_s`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        log_part, metric_part = after_log_part, 0
        with make_display(show_logs, self.record.name, stages=stages) as display:
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
                        f"{what} took longer than {timeout_s:g} s: {self.record.name} is {status.state} and continues. "
                        f"`palate logs {self.record.name}` shows its log, `palate stop {self.record.name}` stops it"
                    )
                time.sleep(interval_s if deadline is None else max(0.0, min(interval_s, deadline - time.monotonic())))

    def _let_go(self, ended: Status) -> None:
        """Removes an ended run from its engine, once the runner has finished."""
        if ended.engine_id:
            with suppress(ConfigurationError):  # a backend that is not installed has nothing on this machine
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
        display.flush()
        return log_part, metric_part

    def lines(self, *, follow: bool) -> Iterator[str]:
        """Yields log lines. With `follow`, until the run has ended."""
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
        """Asks the run to stop, waits for it, and kills it after `grace_s` seconds. Does nothing if it has already ended.

        In both cases the backend keeps nothing of it.
        """
        status = self.refresh()
        if status.is_terminal:
            self._let_go(status)
            return status
        self.record.advance("Stopping", expect={"Creating", "Running"})
        deadline = time.monotonic() + grace_s
        while not (status := self.refresh()).is_terminal and time.monotonic() < deadline:
            if not status.engine_id:
                break  # never started: there is nothing to wait for
            time.sleep(POLL_S)
        if status.engine_id:
            self.backend.stop(status.engine_id, grace_s=1.0 if not status.is_terminal else 5.0)
        return (
            self.record.advance("Stopped", expect=ACTIVE, reason="stopped on request", endpoint="")
            or self.record.status()
        )

    def delete(self, *, grace_s: float = STOP_GRACE_S) -> None:
        """Stops the run and deletes it from the store, even if its record is damaged.

        If the record is damaged, this stops what the engines on this machine run for it. A runner on another machine ends when
        it finds its run deleted.
        """
        try:
            self.stop(grace_s=grace_s)
        except DamagedFilesError:
            self._stop_unread()
        self.record.delete()
        forget_start(self.record.uri)
        # A runner that was killed after its time to end, such as one whose engine was loading, has not removed its folder.
        for stale in stale_work_folders(self.record.kind, self.record.name):
            shutil.rmtree(stale, ignore_errors=True)
        with suppress(OSError):  # not empty, or not there
            work_folder(self.record.kind, self.record.name).parent.rmdir()

    def _stop_unread(self) -> None:
        with suppress(DamagedFilesError):
            self.record.advance("Stopping", expect={"Creating", "Running"})
        place = _place(self.record.uri)
        for name in backend_names():
            try:
                backend = get_backend(name)
                held = [run for run in backend.runs() if _place(run.uri) == place]
            except ConfigurationError:  # not available on this machine
                continue
            for run in held:
                for_run(backend, self.record.uri).stop(run.engine_id, grace_s=LAST_STEPS_S)


def _place(uri: str) -> str:
    """Returns a run's URI in a form in which two spellings of one location are equal."""
    scheme, _, path = normal_uri(uri).partition("://")
    return os.path.realpath(path) if scheme == "file" else f"{scheme}://{path}"
