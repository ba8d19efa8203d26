"""Starts and watches one child process, explains its exit, and never leaves it behind. Knows no store, trainer or server."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

from palate.env_file import without_credentials
from palate.runner.heartbeat import LAST_BYTES, TICK_S, Heartbeat, last_file
from palate_recipes.prctl import die_with_parent

_ROOT = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60  # cgroup v1 reports a huge number


class MemoryGuard:
    """Detects whether the kernel killed a process of this cgroup for lack of memory.

    Detects nothing outside a container, or if the cgroup cannot be read.
    """

    def __init__(self, root: Path = _ROOT, own: Path = Path("/proc/self/cgroup")) -> None:
        self._folders = _folders(root, own)
        self._before = self._kills()

    def cause(self) -> str:
        """Returns a message with limit and remedy if the kernel has killed a process since, else ""."""
        if self._kills() <= self._before:
            return ""
        limit = self._limit()
        which = f"its memory limit of {limit / (1 << 30):.3g} GiB" if limit else "the memory of its machine"
        return (
            f"out of memory: the kernel killed it at {which}. Raise the limit (instance_spec={{'memory': ...}} on the container "
            "backend), or need less: a smaller per_device_train_batch_size or seq_length, or QLoRA_LLM"
        )

    def _kills(self) -> int:
        for folder in self._folders:
            for name in ("memory.events", "memory.oom_control"):
                for line in _lines(folder / name):
                    key, _, value = line.partition(" ")
                    if key == "oom_kill":
                        return int(value)
        return 0

    def _limit(self) -> int | None:
        for folder in self._folders:
            for name in ("memory.max", "memory.limit_in_bytes"):
                lines = _lines(folder / name)
                if lines and lines[0].isdigit() and int(lines[0]) < _NO_LIMIT:
                    return int(lines[0])
        return None


def _folders(root: Path, own: Path) -> list[Path]:
    """Folders of this process's memory cgroup, v1 and v2, with the path as seen in the container and on its host."""
    found = []
    for line in _lines(own):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found += [root / path.lstrip("/"), root]
        elif "memory" in controllers.split(","):
            found += [root / "memory" / path.lstrip("/"), root / "memory"]
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


LOG_TAIL_LINES = 25


class Child:
    """A program whose output goes to `log`. It ends with this process, or at the end of the `with` block.

    It works only with files, so it does not get this process's credentials for stores and hubs.

    Args:
        argv: Program and arguments.
        log: File to which its output is appended.
        env: Variables on top of this process's own.
        cwd: Working folder.
        kept: Names of variables that the user set for this program. It gets them even if they look like credentials.
    """

    def __init__(
        self, argv: list[str], *, log: Path, env: dict[str, str], cwd: Path, kept: Collection[str] = ()
    ) -> None:
        self.log = log
        self._memory = MemoryGuard()
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={
                    **without_credentials(os.environ, kept=kept),
                    "PYTHONUNBUFFERED": "1",
                    "PYTHONSAFEPATH": "1",  # also for its child processes: files in the working folder must not be imported
                    **env,
                },
                cwd=cwd,
                preexec_fn=die_with_parent,  # a runner that is killed must not leave a program behind
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def cause(self, told: str) -> str:
        """Returns why it ended: out of memory, else its own message, else its exit code."""
        code = self.process.returncode
        if code != 0 and (out_of_memory := self._memory.cause()):
            return f"{out_of_memory}\n{told}" if told else out_of_memory
        return told or f"the program ended: {_describe_exit(code)}"

    def terminate(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def log_line(log: Path, text: str) -> None:
    """Appends a line of the runner to the log. On a full disk the line is lost, but the run continues."""
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"palate: {text}\n")
    except OSError:
        pass


def log_tail(log: Path) -> tuple[str, ...]:
    """Returns the last non-empty lines of the log. Reads only its end."""
    content = b""
    for path in (last_file(log), log):
        if path.exists():
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - LAST_BYTES))
                content += file.read(LAST_BYTES)
    lines = [line.rstrip() for line in content.decode(errors="replace").splitlines()]
    return tuple(line for line in lines if line)[-LOG_TAIL_LINES:]


def watch(
    child: Child,
    heartbeat: Heartbeat,
    *,
    terminated: threading.Event,
    on_tick: Callable[[], None],
    deadline: Callable[[], float | None],
    grace_s: float,
) -> Literal["ended", "stopped", "timed out", "lease lost"]:
    """Waits until the child ends, a stop is requested, or the deadline is reached. Does not access the store.

    Args:
        child: The program.
        heartbeat: Has the stop request, and whether this runner still has the lease.
        terminated: Set when this runner got a signal to end.
        on_tick: Called every quarter second.
        deadline: Returns the `time.monotonic()` at which the run must end, or None.
        grace_s: Seconds from SIGTERM to SIGKILL.

    Returns:
        `ended` if the child ended by itself, else the child was stopped or killed. `lease lost`: another runner has the run.
    """
    outcome: Literal["ended", "stopped", "timed out", "lease lost"] = "ended"
    kill_at: float | None = None
    while child.process.poll() is None:
        now = time.monotonic()
        if heartbeat.lease_lost.is_set():
            child.kill()  # no grace: two programs must not write the same checkpoints
            return "lease lost"
        if kill_at is None:
            if terminated.is_set() or heartbeat.stop_wanted.is_set():
                outcome = "stopped"
            elif (limit := deadline()) is not None and now >= limit:
                outcome = "timed out"
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


def _describe_exit(code: int) -> str:
    """Describes an exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        return f"killed by {name}, probably by the kernel for lack of memory"
    return f"killed by {name}"
