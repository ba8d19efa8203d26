"""Processes and ports of this machine: identity, state, sessions, signals. Knows /proc, no run."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import socket
import time
from pathlib import Path
from typing import Literal

ProcessState = Literal["alive", "dead", "unknown"]


def bind_error(host: str, port: int, *, within_s: float) -> OSError | None:
    """Returns why a TCP port cannot be bound, or None if it can. Retries, because a port that was just released may not be free yet.

    Args:
        host: Address of this machine.
        port: 0 to 65535.
        within_s: Seconds to retry.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
            return None
        except OSError as error:
            # A wrong address does not become right.
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL or time.monotonic() >= deadline:
                return error
        time.sleep(0.1)


def start_time(pid: int) -> str:
    """Returns the start time of a process in clock ticks since boot, or "" if it does not exist or is a zombie."""
    stat = _stat(pid)
    return "" if stat is None or stat[0] == "Z" else stat[19]


def process_state(pid: int, started: str) -> ProcessState:
    """Returns whether the process with this pid and start time still runs; "unknown" if that is not visible.

    Args:
        pid: In this pid namespace.
        started: Its start time, from `start_time`.
    """
    if pid < 1 or not started:
        return "unknown"  # for kill(2), 0 and negative numbers mean process groups
    stat = _stat(pid)
    if stat is not None:
        return "alive" if stat[0] not in ("Z", "X") and stat[19] == started else "dead"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "dead"
    except (OSError, OverflowError):
        pass  # EPERM: the process exists, but hidepid hides it
    return "unknown"


def session_members(session: int) -> list[int]:
    """Returns the pids of all live processes of a session."""
    return [pid for pid in pids() if (stat := _stat(pid)) and stat[0] != "Z" and int(stat[3]) == session]


def pids() -> list[int]:
    """Returns the pids of all visible processes."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def command_of(pid: int) -> list[str]:
    """Returns the arguments of a process; empty if it has exited or is not readable."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def environment_of(pid: int, name: str) -> str | None:
    """Returns one variable of a process's environment; None if it is not set or not readable."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    return next((entry.partition("=")[2] for entry in entries if entry.startswith(f"{name}=")), None)


def owner_of(pid: int) -> int | None:
    """Returns the user id of a process; None if it has exited."""
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return None


def send(pid: int, number: signal.Signals) -> None:
    """Sends a signal; does nothing if the process has exited."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def pid_space() -> str:
    """Returns an id of the installation and pid namespace that pids belong to; it survives a reboot.

    Without a machine id (most containers), it is valid only for this boot.
    """
    try:
        installation = Path("/etc/machine-id").read_text().strip()
    except OSError:
        installation = ""
    return f"{socket.gethostname()} {installation} {machine_mark() if not installation else _pid_namespace()}"


def machine_mark() -> str:
    """Returns an id of this machine, boot and pid namespace: a pid means the same process only if the id is equal.

    It is "" if the kernel does not provide these. Treat "" as unequal to any id: two machines can have the same hostname.
    """
    namespace = _pid_namespace()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {namespace} {boot}" if namespace and boot else ""


def machine_digest() -> str:
    """Returns a digest of `machine_mark` with 16 characters, for ids; "" if there is none."""
    mark = machine_mark()
    return hashlib.sha256(mark.encode()).hexdigest()[:16] if mark else ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _stat(pid: int) -> list[str] | None:
    """Returns the fields of /proc/PID/stat after the command name (which may contain spaces), or None."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
