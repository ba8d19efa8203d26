"""Processes of this machine: which one it was, whether it is still there, what belongs to it. Knows /proc, no run."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path


def start_time(pid: int) -> str:
    """Returns the kernel's start time of a process in clock ticks since boot, or "" when it is not there or a zombie."""
    stat = _stat(pid)
    return "" if stat is None or stat[0] == "Z" else stat[19]


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
    """Names the host and pid namespace that pids are counted in: the same after a restart of the machine."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()  # no Linux: the host's name has to do


def machine_mark() -> str:
    """Names this machine, this boot and this pid namespace: only where it is equal does a pid mean the same process."""
    try:
        return f"{pid_space()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    except OSError:
        return pid_space()


def _stat(pid: int) -> list[str] | None:
    """Returns the fields of /proc/PID/stat after the command's name (which may hold spaces), or None."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
