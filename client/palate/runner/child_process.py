"""One child program: started, watched, its end explained, and never left behind. Knows no store, trainer or server."""

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
_NO_LIMIT = 1 << 60  # the first kind of cgroup says a huge number


class MemoryGuard:
    """Remembers how often the kernel has ended a process of this cgroup for its memory.

    Outside a container, and where the cgroup cannot be read, it knows nothing.
    """

    def __init__(self, root: Path = _ROOT, own: Path = Path("/proc/self/cgroup")) -> None:
        self._folders = _folders(root, own)
        self._before = self._kills()

    def cause(self) -> str:
        """Returns what happened, with the limit and the remedy, when the kernel ended a process since; else ""."""
        if self._kills() <= self._before:
            return ""
        limit = self._limit()
        which = f"its memory limit of {limit / (1 << 30):.3g} GiB" if limit else "the memory of its machine"
        return (
            f"out of memory: the kernel ended it at {which}. Give it more (instance_spec={{'memory': ...}} on the container "
            "backend), or take less: a smaller per_device_train_batch_size or max_length, or QLoRA_LLM"
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
    """Where this process's memory is accounted: by both kinds of cgroup, as a container and as its host see the path."""
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
    """A program whose output goes to `log`; its life ends with this process, or with the `with` block that it is given to.

    It knows files alone, so it is given none of the credentials that this process has for stores and hubs.

    Args:
        argv: Program and arguments.
        log: File that its output is added to.
        env: Variables on top of this process's own.
        cwd: Its working folder.
        kept: Names of variables that the user gave to this program, and that it gets whatever they hold.
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
                    "PYTHONSAFEPATH": "1",  # for every Python below it: no file of a working folder is a module
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
        """Returns why it ended: for its memory, else what it told itself, else what its exit code says."""
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
    """Adds a line of the runner's own to the run's log; on a full disk the line is lost, and the run is not."""
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"palate: {text}\n")
    except OSError:
        pass


def log_tail(log: Path) -> tuple[str, ...]:
    """Returns the last lines of the log that say something; reads no more than its end."""
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
    """Waits until the child ends, a stop is asked for, or the deadline comes. Asks nothing of the store itself.

    Args:
        child: The program.
        heartbeat: Knows who wants the run to stop, and whether it is still this runner's.
        terminated: Set when this runner itself was told to end.
        on_tick: Called every quarter second.
        deadline: Gives the `time.monotonic()` at which the run is over, or None.
        grace_s: Seconds that the child has to end by itself after a stop, before it is killed.

    Returns:
        `ended` when the child ended by itself; else the child has been ended. `lease lost`: another runner has the run.
    """
    outcome: Literal["ended", "stopped", "timed out", "lease lost"] = "ended"
    kill_at: float | None = None
    while child.process.poll() is None:
        now = time.monotonic()
        if heartbeat.lease_lost.is_set():
            child.kill()  # no grace: two of them must not write the same checkpoints
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
    """Returns what an exit code says to a person."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        return f"killed by {name}: most often the kernel ending a process that took too much memory"
    return f"killed by {name}"
