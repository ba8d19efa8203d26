"""What can happen to a run or to what it stands on. Each fault is over when its function returns. Knows no tally."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from tests.faults.run import Role, Run
from tests.faults.world import LEASE_S
from tests.support.gate import FAIR, Weather

Happen = Callable[[Run, random.Random], bool]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: For the report.
        weight: How often it is drawn, against the others.
        happen: Makes it happen; returns False when there was nothing that it could happen to.
        shared: It happens to every run at once.
    """

    name: str
    weight: float
    happen: Happen
    shared: bool = False


def _killed(*roles: Role) -> Happen:
    return lambda run, chance: run.kill(*roles)


def _machine_lost(run: Run, chance: random.Random) -> bool:
    """The machine with client, runner, trainer and all files is gone; somebody goes on from another one."""
    run.lose_machine()
    return True


def _runner_frozen(run: Run, chance: random.Random) -> bool:
    """It is silent for longer than its lease: another may have taken its place when it wakes."""
    found = run.processes("runner", "trainer")
    if not found:
        return False
    for process in found:
        _signal(process, signal.SIGSTOP)
    time.sleep(chance.uniform(1, 2 * LEASE_S))
    for process in found:
        _signal(process, signal.SIGCONT)
    return True


def _stopped_by_user(run: Run, chance: random.Random) -> bool:
    if not run.processes("runner"):
        return False
    subprocess.run(
        [sys.executable, "-m", "palate.cli", "stop", run.name],
        env=run.world.environment(run.home),
        capture_output=True,
        timeout=300,
    )
    return True


def _told_to_end(run: Run, chance: random.Random) -> bool:
    """What a machine that shuts down tells the processes of a run."""
    found = run.processes("runner", "trainer")
    for process in found:
        _signal(process, signal.SIGTERM)
    return bool(found)


def _store_restarted(*, kill: bool) -> Happen:
    def happen(run: Run, chance: random.Random) -> bool:
        with run.world.store_lock:
            run.world.stop_store(kill=kill)
            time.sleep(chance.uniform(0, 10))
            run.world.start_store()
        return True

    return happen


def _store_out_of_reach(run: Run, chance: random.Random) -> bool:
    with run.world.store_lock:
        run.world.gate.shut()
        time.sleep(chance.uniform(0.1, 15))
        run.world.gate.open()
    return True


def _connections(make: Callable[[random.Random], Weather]) -> Happen:
    def happen(run: Run, chance: random.Random) -> bool:
        with run.world.store_lock:
            run.world.gate.weather = make(chance)
            time.sleep(chance.uniform(0.5, 8))
            run.world.gate.weather = FAIR
        return True

    return happen


def _disk_full(run: Run, chance: random.Random) -> bool:
    if not run.world.has_own_disk:
        return False
    with run.world.store_lock, run.world.full_disk():
        time.sleep(chance.uniform(0.5, 6))
    return True


def _signal(process: psutil.Process, number: int) -> None:
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        pass


FAULTS = (
    Fault(name="trainer killed", weight=5, happen=_killed("trainer")),
    Fault(name="runner killed", weight=4, happen=_killed("runner")),
    Fault(name="runner and trainer killed", weight=2, happen=_killed("runner", "trainer")),
    Fault(name="client killed", weight=4, happen=_killed("client")),
    Fault(name="client, runner and trainer killed", weight=2, happen=_killed("client", "runner", "trainer")),
    Fault(name="machine lost with its files", weight=2, happen=_machine_lost),
    Fault(name="runner and trainer frozen for a while", weight=2, happen=_runner_frozen),
    Fault(name="runner and trainer told to end", weight=2, happen=_told_to_end),
    Fault(name="stopped by its user", weight=2, happen=_stopped_by_user),
    Fault(name="store stopped and started", weight=2, happen=_store_restarted(kill=False), shared=True),
    Fault(name="store killed and started", weight=2, happen=_store_restarted(kill=True), shared=True),
    Fault(name="store out of reach", weight=3, happen=_store_out_of_reach, shared=True),
    Fault(
        name="slow connections",
        weight=3,
        happen=_connections(lambda chance: Weather(bytes_per_s=chance.choice([2_000, 20_000, 100_000]))),
        shared=True,
    ),
    Fault(
        name="torn connections",
        weight=3,
        happen=_connections(lambda chance: Weather(torn_within=chance.choice([300, 3_000, 100_000]))),
        shared=True,
    ),
    Fault(
        name="answers lost",
        weight=3,
        happen=_connections(lambda chance: Weather(loses_answers=True)),
        shared=True,
    ),
    Fault(name="disk full", weight=3, happen=_disk_full, shared=True),
)
