"""Runs a command whose processes all end when their holder ends or dies. Knows no engine.

The holder uses `Supervised`. It starts a keeper process: `python -m palate_server.supervisor FD GRACE_S COMMAND...`.
The keeper leads a new process group, runs the command in it, and reads from a pipe to which only the holder has the write end.
EOF on the pipe (closed, or the holder killed with SIGKILL) means: end everything. The keeper sends SIGTERM to the command, waits
for its grace period, then sends SIGTERM and SIGKILL to all remaining processes. On Linux the keeper adopts orphans, so processes
that an engine forked end too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO

import psutil

from palate_recipes.prctl import adopt_orphans, die_with_parent

_KEEPER_MARGIN_S = 5.0
"""Time for the keeper beyond the command's grace. After that the holder kills the group."""
_LEAVE_S = 3.0
"""Time for the remaining processes to exit once the command has ended."""
_LOOK_EVERY_S = 0.02


class Supervised:
    """A running command that cannot outlive its holder."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        grace_s: float,
        on_end: Callable[[], None],
    ) -> None:
        """Starts the command.

        Args:
            command: Program and arguments.
            env: The full environment of the command.
            cwd: Working folder of the command.
            grace_s: Seconds between SIGTERM and SIGKILL.
            on_end: Called from a thread after the command and all its descendants have ended.
        """
        self._grace_s = grace_s
        self._let_go = threading.Lock()
        # Python makes pipe ends non-inheritable, so only this process has the write end. If it dies in any way, the kernel
        # closes the pipe and the keeper reads EOF.
        read_end, self._write_end = os.pipe()
        # A new interpreter instead of a fork: the holder has threads, and a fork of those can deadlock.
        keeper = [sys.executable, "-P", "-m", __name__, str(read_end), str(grace_s), *command]
        try:
            self._keeper = subprocess.Popen(
                keeper,
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(read_end,),
            )
        finally:
            os.close(read_end)
        assert self._keeper.stdout is not None
        self.output: IO[bytes] = self._keeper.stdout
        self._watcher = threading.Thread(target=self._watch, args=(on_end,), daemon=True)
        self._watcher.start()

    @property
    def returncode(self) -> int | None:
        """The command's exit code, 128 + n if signal n ended it; None while any of its processes runs."""
        return self._keeper.poll()

    def has_ended(self, *, within_s: float) -> bool:
        """Whether the command ends within this time; then `on_end` has been called."""
        self._watcher.join(within_s)
        return not self._watcher.is_alive()

    def end(self, *, at_once: bool = False) -> None:
        """Ends the command and all its descendants, and waits for them. Idempotent.

        Args:
            at_once: Whether the command gets SIGKILL instead of SIGTERM.
        """
        if at_once:
            with suppress(psutil.Error):  # the keeper stays, and ends what the command leaves behind
                _signal(psutil.Process(self._keeper.pid).children(), signal.SIGKILL)
        with self._let_go:  # a second close could hit a reused descriptor
            if self._write_end >= 0:
                os.close(self._write_end)
                self._write_end = -1
        try:
            self._keeper.wait(self._grace_s + _KEEPER_MARGIN_S)
        except subprocess.TimeoutExpired:
            self._kill_group()
            self._keeper.wait()

    def _watch(self, on_end: Callable[[], None]) -> None:
        self._keeper.wait()
        # The keeper leaves no process behind. This covers a keeper that was itself killed.
        self._kill_group()
        on_end()

    def _kill_group(self) -> None:
        try:
            os.killpg(self._keeper.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def keep(leash_fd: int, grace_s: float, command: Sequence[str]) -> int:
    """Runs the command until it ends or the pipe is closed. Returns its exit code after all its processes have ended."""
    # SimpleQueue, because its put() is safe in a signal handler.
    events: SimpleQueue[str] = SimpleQueue()
    adopt_orphans()
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda *_: events.put("let go"))
    # The kernel kills the command if the keeper dies. preexec_fn is safe here, because the keeper has no other thread yet.
    child = subprocess.Popen(command, preexec_fn=die_with_parent)
    threading.Thread(target=_report, args=(lambda: os.read(leash_fd, 1), "let go", events), daemon=True).start()
    threading.Thread(target=_report, args=(child.wait, "ended", events), daemon=True).start()
    # SIGTERM goes to the command first and alone, so that it can shut its workers down in order.
    if events.get() == "let go":
        child.terminate()
        _wait_for("ended", events, timeout_s=grace_s)
    _end_descendants()
    code = child.wait()
    _reap()
    return code


def _report(wait: Callable[[], object], event: str, events: SimpleQueue[str]) -> None:
    wait()
    events.put(event)


def _wait_for(event: str, events: SimpleQueue[str], *, timeout_s: float) -> None:
    try:
        while events.get(timeout=timeout_s) != event:
            pass
    except Empty:
        pass


def _end_descendants() -> None:
    """Ends all remaining descendants. SIGTERM first: Python's resource tracker ignores it and can still remove shared memory."""
    _signal(_descendants(), signal.SIGTERM)
    deadline = time.monotonic() + _LEAVE_S
    while time.monotonic() < deadline and _descendants():
        time.sleep(_LOOK_EVERY_S)
    # Repeat, because a process can fork between the scan and the kill.
    while found := _descendants():
        _signal(found, signal.SIGKILL)
        time.sleep(_LOOK_EVERY_S)


def _signal(processes: list[psutil.Process], signum: int) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signum)


def _reap() -> None:
    """Reaps adopted children, because PID 1 of a container may never reap them."""
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        pass


def _descendants() -> list[psutil.Process]:
    """Returns the live descendants of this process, without zombies."""
    below: dict[int, list[psutil.Process]] = {}
    for pid in psutil.pids():
        # Another user's process may be hidden (hidepid); `Process.children` fails altogether if one is.
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                below.setdefault(process.ppid(), []).append(process)
    found: list[psutil.Process] = []
    parents = [os.getpid()]
    while parents:
        children = below.pop(parents.pop(), [])
        found += children
        parents += [child.pid for child in children]
    return found


if __name__ == "__main__":
    code = keep(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
    sys.exit(code if code >= 0 else 128 - code)
