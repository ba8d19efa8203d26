"""Runs as detached processes of this machine. Knows pids, not stores or programs.

A run is the leader of a session of its own, so it outlives the Python process that started it, and everything it starts
can be found and ended by that session's id. An engine id is `host:pid:start time`: a recycled pid is never mistaken for it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from palate.backend import EngineRun, EngineStatus, Launch, PlacementRequest
from palate.home import palate_home
from palate.processes import command_of, environment_of, owner_of, pids, send, session_members, start_time
from palate_recipes.device import local_device
from palate_recipes.hyperparameters import DeviceFacts

_POLL_S = 0.05
_RUN_VARIABLE = "PALATE_RUN"
"""Marks every process of a run: long after its end its session's number may be that of somebody else's."""


class ProcessBackend:
    """The embedded default: the runner as a process beside you."""

    name = "process"
    uses_this_python = True
    is_this_host = True

    def start(self, launch: Launch) -> str:
        command = [sys.executable, "-m", "palate.runner", launch.uri]
        return self.start_command(command, run_name=launch.run_name, env=launch.env)

    def start_command(self, argv: list[str], *, run_name: str, env: Mapping[str, str]) -> str:
        """Starts any command as a run; returns its engine id."""
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
        return f"{socket.gethostname()}:{process.pid}:{start_time(process.pid)}:{run_name}"

    def status(self, engine_id: str) -> EngineStatus:
        host, pid, started, _ = engine_id.split(":", 3)
        if host != socket.gethostname():
            return EngineStatus("unknown")
        _reap()
        return EngineStatus("running" if started and start_time(int(pid)) == started else "gone")

    def logs(self, engine_id: str) -> str:
        host, _, _, run_name = engine_id.split(":", 3)
        log = self._log_file(run_name)
        if host != socket.gethostname() or not log.exists():
            return ""
        return log.read_text(errors="replace")

    def stop(self, engine_id: str, *, grace_s: float) -> None:
        host, pid_text, _, run_name = engine_id.split(":", 3)
        if host != socket.gethostname():
            return
        pid = int(pid_text)
        was_running = self.status(engine_id).state == "running"  # then the whole session is its own
        if was_running:
            send(pid, signal.SIGTERM)
            deadline = time.monotonic() + grace_s
            while self.status(engine_id).state == "running" and time.monotonic() < deadline:
                time.sleep(_POLL_S)

        def members() -> list[int]:
            found = session_members(pid)
            return found if was_running else [one for one in found if environment_of(one, _RUN_VARIABLE) == run_name]

        for member in members():
            send(member, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while members() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            _reap()

    def runs(self) -> list[EngineRun]:
        found = []
        for pid in pids():
            command = command_of(pid)
            if not _is_runner(command) or owner_of(pid) != os.getuid():
                continue
            if Path(environment_of(pid, "PALATE_HOME") or Path.home() / ".palate").absolute() != palate_home():
                continue
            uri, run_name = command[-1], environment_of(pid, _RUN_VARIABLE) or ""
            engine_id = f"{socket.gethostname()}:{pid}:{start_time(pid)}:{run_name}"
            found.append(EngineRun(engine_id, uri, f"process {pid}: palate-run {uri}"))
        return found

    def device(self, placement: Mapping[str, Any] | None = None) -> DeviceFacts:
        return local_device()

    def place(self, request: PlacementRequest) -> dict[str, Any]:
        no_limits = "it sets no limits on this machine; leave it out, or use backend='container'"
        request.refuse(
            self.name,
            image_uri="it runs in this Python environment and no image; leave it out, or use backend='container'",
            instance_spec=no_limits,
            resource_config=no_limits,
        )
        request.refuse_other_machines(self.name, more="leave it out or say 'local'")
        return {}

    @staticmethod
    def _log_file(run_name: str) -> Path:
        return palate_home() / "run" / f"{run_name}.log"


def _is_runner(command: list[str]) -> bool:
    return len(command) >= 3 and (command[-3:-1] == ["-m", "palate.runner"] or command[-2].endswith("/palate-run"))


_CHILDREN: list[subprocess.Popen[bytes]] = []
"""Runs started by this very process: they must be reaped, or they would look alive as zombies."""


_CHILDREN_LOCK = Lock()  # a list of jobs looks at many at a time


def _reap() -> None:
    with _CHILDREN_LOCK:
        _CHILDREN[:] = [child for child in _CHILDREN if child.poll() is None]
