"""The leash with a command that would rather stay: nothing of it outlives its holder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from palate_server import supervisor
from palate_server.engine import _Log
from palate_server.supervisor import Supervised

STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
kind = sys.argv[1] if len(sys.argv) > 1 else "parent"
if kind == "parent":  # a child in a session of its own, whose parent then ends: an orphan
    subprocess.Popen([sys.executable, __file__, "middle"])
elif kind == "middle":
    orphan = subprocess.Popen([sys.executable, __file__, "orphan"], start_new_session=True)
    print("up", orphan.pid, flush=True)
    os._exit(0)
time.sleep(600)
"""


@pytest.fixture
def stubborn(tmp_path: Path) -> list[str]:
    program = tmp_path / "stubborn.py"
    program.write_text(STUBBORN)
    return [sys.executable, str(program)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(supervisor.__file__).parents[1])}


def test_the_end_takes_orphans_and_those_who_ignore_sigterm(tmp_path: Path, stubborn: list[str]) -> None:
    ended = threading.Event()
    held = Supervised(stubborn, env=environment(), cwd=tmp_path, grace_s=0.2, on_end=ended.set)
    orphan = psutil.Process(int(held.output.readline().split()[1]))
    family = [*psutil.Process(held._keeper.pid).children(recursive=True), orphan]
    held.end()
    assert psutil.wait_procs(family, timeout=5)[1] == []
    assert ended.wait(5)
    held.end()  # again is no harm


@pytest.mark.parametrize("victim", ["holder", "keeper"])
def test_a_killed_holder_or_keeper_leaves_nothing(tmp_path: Path, stubborn: list[str], victim: str) -> None:
    holder_code = (
        "import sys, threading, os; from pathlib import Path; from palate_server.supervisor import Supervised\n"
        "ended = threading.Event()\n"
        "held = Supervised(sys.argv[1:], env=os.environ, cwd=Path.cwd(), grace_s=0.2, on_end=ended.set)\n"
        "print(held.output.readline().decode(), flush=True)\n"
        "ended.wait()\n"
    )
    command = [sys.executable, "-c", holder_code, *stubborn]
    with subprocess.Popen(command, env=environment(), cwd=tmp_path, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        orphan = psutil.Process(int(holder.stdout.readline().split()[1]))
        family = psutil.Process(holder.pid).children(recursive=True)
        keeper = next(p for p in family if p.ppid() == holder.pid)
        os.kill(holder.pid if victim == "holder" else keeper.pid, signal.SIGKILL)
        if victim == "keeper":
            # Without the keeper nobody knows a process that left both its parent and its session.
            orphan.kill()
            family = [process for process in family if process.pid != orphan.pid]
        else:
            family.append(orphan)
        assert psutil.wait_procs(family, timeout=15)[1] == []


def test_the_exit_code_comes_through(tmp_path: Path) -> None:
    for code, seen in (("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)):
        ended = threading.Event()
        held = Supervised([sys.executable, "-c", code], env=environment(), cwd=tmp_path, grace_s=1, on_end=ended.set)
        assert ended.wait(20)
        assert held.returncode == seen


def test_a_process_that_may_not_be_read_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """With hidepid, psutil lists processes of other users and may not read them."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    read = psutil.Process.status

    def status(process: psutil.Process) -> str:
        if process.pid == 1:
            raise psutil.AccessDenied(process.pid)
        return read(process)

    monkeypatch.setattr(psutil.Process, "status", status)
    try:
        assert child.pid in [process.pid for process in supervisor._descendants()]
    finally:
        child.kill()
        child.wait()


def test_what_an_engine_says_when_it_is_told_to_end_is_kept_and_not_shown(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    ours, its = os.pipe()
    with os.fdopen(its, "wb", buffering=0) as engine, os.fdopen(ours, "rb") as output:
        log = _Log(output)
        engine.write(b"ready\n")
        while log.lines() != ["ready"]:
            os.sched_yield()
        log.end_forwarding()
        engine.write(b"EngineDeadError: EngineCore encountered an issue\n")
        engine.close()
        log.finish()
    assert capfdbinary.readouterr().out == b"ready\n"
    assert log.lines()[-1].startswith("EngineDeadError")
