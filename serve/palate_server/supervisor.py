"""Runs a command so that nothing of it outlives its holder: when the holder closes or dies, all its processes end. Knows no engine.

Two sides. The holder's side is `Supervised`: it starts `python -m palate_server.supervisor FD[,FD...] GRACE_S COMMAND...`, the keeper.
The keeper leads a new process group, runs the command in it, and reads from a pipe that only the holder can write to. The end of
that pipe (closed, or the holder killed with -9) is the order to end everything: SIGTERM to the command, which has its grace period
to stop, then to whatever is left, then SIGKILL. The keeper adopts orphans (Linux), so that what an engine forked ends, too.
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
"""What the keeper may take beyond the command's grace before the holder kills the group itself."""
_LEAVE_S = 3.0
"""What the rest may take to leave once the command has ended."""
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
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Starts the command.

        Args:
            command: Program and arguments.
            env: The whole environment of the command.
            cwd: Its working folder.
            grace_s: Seconds between SIGTERM and SIGKILL when it is ended.
            on_end: Called from a thread once the command and all it started have ended.
            pass_fds: Open files that the command gets, under their numbers.
        """
        self._grace_s = grace_s
        self._let_go = threading.Lock()
        read_end, self._write_end = os.pipe()
        numbers = ",".join(str(number) for number in (read_end, *pass_fds))
        keeper = [sys.executable, "-P", "-m", __name__, numbers, str(grace_s), *command]
        try:
            self._keeper = subprocess.Popen(
                keeper,
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(read_end, *pass_fds),
            )
        finally:
            os.close(read_end)
        assert self._keeper.stdout is not None
        self.output: IO[bytes] = self._keeper.stdout
        self._watcher = threading.Thread(target=self._watch, args=(on_end,), daemon=True)
        self._watcher.start()

    @property
    def returncode(self) -> int | None:
        """The command's exit code, 128 + n when signal n ended it; None while anything of it runs."""
        return self._keeper.poll()

    def end(self) -> None:
        """Ends the command and all it started, and returns when nothing is left. May be called again."""
        with self._let_go:
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
        # The keeper leaves nothing; this is for the case that the keeper itself was killed.
        self._kill_group()
        on_end()

    def _kill_group(self) -> None:
        try:
            os.killpg(self._keeper.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def keep(leash_fd: int, grace_s: float, command: Sequence[str], *, pass_fds: Sequence[int] = ()) -> int:
    """Runs the command until it ends or the leash is let go; returns its exit code once nothing of it is left."""
    events: SimpleQueue[str] = SimpleQueue()
    adopt_orphans()
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda *_: events.put("let go"))
    # Dies with the keeper too. Set between fork and exec of the only thread that there is at this point.
    child = subprocess.Popen(command, preexec_fn=die_with_parent, pass_fds=tuple(pass_fds))
    for number in pass_fds:
        os.close(number)
    threading.Thread(target=_report, args=(lambda: os.read(leash_fd, 1), "let go", events), daemon=True).start()
    threading.Thread(target=_report, args=(child.wait, "ended", events), daemon=True).start()
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
    """Ends whatever is left. SIGTERM first: Python's resource tracker outlives that, and removes shared memory at the end."""
    _signal(_descendants(), signal.SIGTERM)
    deadline = time.monotonic() + _LEAVE_S
    while time.monotonic() < deadline and _descendants():
        time.sleep(_LOOK_EVERY_S)
    # A process that forks while it is being killed is found in the next round.
    while found := _descendants():
        _signal(found, signal.SIGKILL)
        time.sleep(_LOOK_EVERY_S)


def _signal(processes: list[psutil.Process], signum: int) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signum)


def _reap() -> None:
    """Collects adopted children: in a container the first process may be one that never does."""
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        pass


def _descendants() -> list[psutil.Process]:
    """Returns the living processes below this one, without zombies."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                found.append(process)
    return found


if __name__ == "__main__":
    leash_fd, *pass_fds = map(int, sys.argv[1].split(","))
    code = keep(leash_fd, float(sys.argv[2]), sys.argv[3:], pass_fds=pass_fds)
    sys.exit(code if code >= 0 else 128 - code)
