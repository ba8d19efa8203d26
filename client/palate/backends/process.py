"""Runs as detached processes on this machine. Knows pids, not stores or programs.

A run leads its own session, so it outlives the Python process that started it, and all its descendants can be found by the
session id. An engine id is `host@machine:pid:start time:run name`, so a reused pid or a machine with the same hostname does not
match. Ids come back from the store and are not trusted: a process is signalled only if its own environment says that it was
started for the run.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from palate.backends import EngineRun, EngineStatus, Launch, PlacementRequest
from palate.paths import palate_home
from palate.processes import (
    command_of,
    environment_of,
    machine_digest,
    owner_of,
    pids,
    process_state,
    send,
    session_members,
    start_time,
)
from palate.runs.record import locate
from palate_recipes.device import local_device
from palate_recipes.errors import ConfigurationError
from palate_recipes.hyperparameters import DeviceFacts

_POLL_S = 0.05
_RUN_VARIABLE = "PALATE_RUN"
"""Marks every process of a run, because its session id can be reused by another program after it has ended."""

_URI_VARIABLE = "PALATE_RUN_URI"
"""Distinguishes jobs with the same name in two stores."""

_ENGINE_ID = re.compile(
    r"([^:@]*)(?:@([0-9a-f]{16}))?:([1-9][0-9]{0,9}):([0-9]{1,20}):([A-Za-z0-9][A-Za-z0-9._-]{0,119})"
)
"""Host, machine, pid, start time and run name. Earlier versions had no machine."""


@dataclass(frozen=True)
class _EngineId:
    """A parsed engine id.

    Attributes:
        is_here: Whether the pid belongs to this machine and pid namespace; None if unknown (an id of an earlier version).
        pid, started: Of the runner.
        run_name: See `Launch.run_name`.
    """

    is_here: bool | None
    pid: int
    started: str
    run_name: str


class ProcessBackend:
    """The default backend: the runner as a local process.

    Args:
        run_uri: Restricts the backend to the processes of this run; None: any. See `for_run`.
    """

    name = "process"
    uses_this_python = True
    is_this_host = True

    def __init__(self, run_uri: str | None = None) -> None:
        self._run_uri = run_uri

    def of_run(self, uri: str) -> ProcessBackend:
        return ProcessBackend(uri)

    def start(self, launch: Launch) -> str:
        command = [sys.executable, "-P", "-m", "palate.runner", launch.uri]
        return self.start_command(command, run_name=launch.run_name, env={**launch.env, _URI_VARIABLE: launch.uri})

    def start_command(self, argv: list[str], *, run_name: str, env: Mapping[str, str]) -> str:
        """Starts any command as a run, and returns its engine id."""
        log = self._log_file(run_name)
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with log.open("wb") as output:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env, _RUN_VARIABLE: run_name},
                cwd=palate_home(),
                start_new_session=True,
            )
        with _CHILDREN_LOCK:
            _CHILDREN.append(process)
        return _engine_id(process.pid, run_name)

    def status(self, engine_id: str) -> EngineStatus:
        run = self._parse(engine_id)
        if run is None or run.is_here is False:
            return EngineStatus("unknown")
        _reap()
        state = process_state(run.pid, run.started)
        if state == "alive":
            # The environment of another user's process cannot be read, but it cannot be signalled either.
            is_foreign = owner_of(run.pid) != os.geteuid()
            return EngineStatus("running" if is_foreign or self._belongs(run.pid, run) else "unknown")
        return EngineStatus("gone" if state == "dead" and run.is_here else "unknown")

    def logs(self, engine_id: str) -> str:
        run = self._parse(engine_id)
        if run is None or run.is_here is False:
            return ""
        log = self._log_file(run.run_name)
        return log.read_text(errors="replace") if log.exists() else ""

    def stop(self, engine_id: str, *, grace_s: float) -> None:
        run = self._parse(engine_id)
        if run is None or run.is_here is False:
            return

        def is_running() -> bool:
            _reap()
            return process_state(run.pid, run.started) == "alive"

        was_running = is_running()
        if was_running:
            if not self._belongs(run.pid, run):
                return
            send(run.pid, signal.SIGTERM)
            deadline = time.monotonic() + grace_s
            while is_running() and time.monotonic() < deadline:
                time.sleep(_POLL_S)

        def members() -> list[int]:
            found = session_members(run.pid)
            return found if was_running else [one for one in found if self._belongs(one, run)]

        for member in [*members(), *([run.pid] if is_running() and was_running else [])]:
            send(member, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while members() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            _reap()

    def _parse(self, engine_id: str) -> _EngineId | None:
        """Parses an engine id; None if it is malformed or belongs to another run."""
        match = _ENGINE_ID.fullmatch(engine_id) if isinstance(engine_id, str) else None
        if match is None:
            return None
        host, mark, pid, started, run_name = match.groups()
        if self._run_uri is not None and run_name != _run_name(self._run_uri):
            return None
        is_here: bool | None = mark == machine_digest() != ""
        if mark is None:
            is_here = None if host == socket.gethostname() else False
        return _EngineId(is_here, int(pid), started, run_name)

    def _belongs(self, pid: int, run: _EngineId) -> bool:
        """Whether a process was started for this run. Only then may it be signalled."""
        command = command_of(pid)
        told = [environment_of(pid, _URI_VARIABLE)]
        run_name = environment_of(pid, _RUN_VARIABLE)
        if _is_runner(command):
            told.append(command[-1])
            run_name = run_name or _run_name(command[-1])  # a runner that was started by hand
        if not run_name or run_name != run.run_name:
            return False
        return self._run_uri is None or any(_place(self._run_uri) == _place(uri) for uri in told if uri)

    def runs(self) -> list[EngineRun]:
        found = []
        for pid in pids():
            command = command_of(pid)
            if not _is_runner(command) or owner_of(pid) != os.getuid():
                continue
            if Path(environment_of(pid, "PALATE_HOME") or Path.home() / ".palate").absolute() != palate_home():
                continue
            uri = command[-1]
            run_name = environment_of(pid, _RUN_VARIABLE) or _run_name(uri)
            if not run_name:
                continue
            found.append(EngineRun(_engine_id(pid, run_name), uri, f"process {pid}: palate-run {uri}"))
        return found

    def device(self, placement: Mapping[str, Any] | None = None) -> DeviceFacts:
        return local_device()

    def place(self, request: PlacementRequest) -> dict[str, Any]:
        no_limits = "it sets no limits on this machine; leave it out, or use backend='container'"
        request.refuse(
            self.name,
            image_uri="it runs in this Python environment, not in an image; omit it, or use backend='container'",
            instance_spec=no_limits,
            resource_config=no_limits,
        )
        request.refuse_other_machines(self.name, more="omit it or set it to 'local'")
        return {}

    @staticmethod
    def _log_file(run_name: str) -> Path:
        return palate_home() / "run" / f"{run_name}.log"


def _engine_id(pid: int, run_name: str) -> str:
    mark = machine_digest()
    return f"{socket.gethostname()}{'@' if mark else ''}{mark}:{pid}:{start_time(pid) or 0}:{run_name}"


def _run_name(uri: str) -> str:
    """Returns `Launch.run_name` of a run; "" if the URI is not a run's."""
    try:
        _, kind, name = locate(uri)
    except ConfigurationError:
        return ""
    return f"{kind}-{name}"


def _place(uri: str) -> str:
    """Normalizes a run's URI, so that two spellings of one location compare equal."""
    scheme, _, rest = uri.partition("://")
    return os.path.realpath(rest) if scheme == "file" else rest


def _is_runner(command: list[str]) -> bool:
    return len(command) >= 3 and (command[-3:-1] == ["-m", "palate.runner"] or command[-2].endswith("/palate-run"))


_CHILDREN: list[subprocess.Popen[bytes]] = []
"""Runs started by this process. They must be reaped, otherwise zombies would look alive."""


_CHILDREN_LOCK = Lock()  # listing jobs checks many runs in parallel


def _reap() -> None:
    with _CHILDREN_LOCK:
        _CHILDREN[:] = [child for child in _CHILDREN if child.poll() is None]
