"""Processes of this machine: which one it was, whether it is still there, what belongs to it. Knows /proc, no run."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
from pathlib import Path
from typing import Literal

ProcessState = Literal["alive", "dead", "unknown"]


def start_time(pid: int) -> str:
    """Returns the kernel's start time of a process in clock ticks since boot, or "" when it is not there or a zombie."""
    stat = _stat(pid)
    return "" if stat is None or stat[0] == "Z" else stat[19]


def process_state(pid: int, started: str) -> ProcessState:
    """Returns whether the process with this pid and start time still runs; "unknown" when that cannot be seen from here.

    Args:
        pid: As counted in this pid namespace.
        started: What `start_time` said of it.
    """
    if pid < 1 or not started:
        return "unknown"  # to kill(2), 0 and negative numbers are groups of processes
    stat = _stat(pid)
    if stat is not None:
        return "alive" if stat[0] not in ("Z", "X") and stat[19] == started else "dead"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "dead"
    except (OSError, OverflowError):
        pass  # EPERM: there is such a process, and hidepid hides it
    return "unknown"


def session_members(session: int) -> list[int]:
    """Returns the pids of all live processes of a session."""
    return [pid for pid in pids() if (stat := _stat(pid)) and stat[0] != "Z" and int(stat[3]) == session]


def pids() -> list[int]:
    """Returns the pids of all processes that can be seen."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def command_of(pid: int) -> list[str]:
    """Returns a process's arguments; empty when it is gone or not ours to read."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def environment_of(pid: int, name: str) -> str | None:
    """Returns one variable of a process's environment; None when it is not set, or not ours to read."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    return next((entry.partition("=")[2] for entry in entries if entry.startswith(f"{name}=")), None)


def owner_of(pid: int) -> int | None:
    """Returns the user id that a process runs under; None when it is gone."""
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return None


def send(pid: int, number: signal.Signals) -> None:
    """Sends a signal; gone is no error."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def pid_space() -> str:
    """Names the installation and pid namespace that pids are counted in: the same after a restart of the machine.

    Where an installation has no id (most containers), the name holds for this boot alone.
    """
    try:
        installation = Path("/etc/machine-id").read_text().strip()
    except OSError:
        installation = ""
    return f"{socket.gethostname()} {installation} {machine_mark() if not installation else _pid_namespace()}"


def machine_mark() -> str:
    """Names this machine, this boot and this pid namespace: only where it is equal does a pid mean the same process.

    It is "" where the kernel does not tell: then it is equal to no other, since two machines may have one hostname.
    """
    namespace = _pid_namespace()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {namespace} {boot}" if namespace and boot else ""


def machine_digest() -> str:
    """Returns `machine_mark` as 16 characters, for ids; "" where there is none."""
    mark = machine_mark()
    return hashlib.sha256(mark.encode()).hexdigest()[:16] if mark else ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _stat(pid: int) -> list[str] | None:
    """Returns the fields of /proc/PID/stat after the command's name (which may hold spaces), or None."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
