"""The order of a campaign: jobs side by side, faults at random points of each, until the wanted number has happened; then the tally."""

from __future__ import annotations

import json
import random
import subprocess
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palate.errors import PalateError
from palate.runs.record import Record
from tests.faults.audit import Auditor, Expected, check_end, last_lines
from tests.faults.faults import FAULTS, Fault
from tests.faults.run import Run
from tests.faults.world import World

JOB_TIMEOUT_S = 900.0
"""After its last fault a job must have its model within this."""

TRAINING = "Running, training"
_POLL_S = 0.2


@dataclass
class Tally:
    """What a campaign was and found.

    Attributes:
        faults: How often each kind happened.
        stages: In what stage of a job.
        causes: Why attempts ended, as their statuses said.
        complaints: What clients printed before they ended with an error: none may.
    """

    faults: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    started: int = 0
    finished: int = 0
    attempts: int = 0
    resumed_by_hand: int = 0
    clients: int = 0
    lost: list[str] = field(default_factory=list)
    lies: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.lies or self.complaints) and self.finished == self.started

    def report(self) -> str:
        """The whole of it, for people."""
        lines = [
            f"{self.faults.total()} faults in {self.seconds:.0f} s:",
            *(f"  {count:4d}  {name}" for name, count in self.faults.most_common()),
            "in these stages of a job:",
            *(f"  {count:4d}  {stage}" for stage, count in self.stages.most_common()),
            f"jobs started {self.started}, finished {self.finished}, attempts {self.attempts}, "
            f"resumed by hand {self.resumed_by_hand}, clients {self.clients}",
            f"attempts that ended before the model was there: {self.causes.total()}, each with a stated cause:",
            *(f"  {count:4d}  {cause}" for cause, count in self.causes.most_common()),
            f"artefacts lost: {len(self.lost)}",
            *(f"  {item}" for item in self.lost),
            f"statuses that lied: {len(self.lies)}",
            *(f"  {item}" for item in self.lies),
            f"clients that broke: {len(self.complaints)}",
            *(f"  {item}" for item in self.complaints),
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "faults": dict(self.faults), "stages": dict(self.stages), "causes": dict(self.causes)}


class Campaign:
    """Makes faults happen to jobs of one world.

    Args:
        world: Where.
        faults: How many, in all.
        seed: Of every choice; what the machine does in between is its own.
        side_by_side: Jobs at a time.
        say: Takes a line of progress.
        kinds: Which faults.
    """

    def __init__(
        self,
        world: World,
        *,
        faults: int,
        seed: int,
        side_by_side: int,
        say: Callable[[str], None],
        kinds: tuple[Fault, ...] = FAULTS,
    ) -> None:
        self.world = world
        self.wanted = faults
        self.seed = seed
        self.side_by_side = side_by_side
        self.kinds = [kind for kind in kinds if kind.name != "disk full" or world.has_own_disk]
        self.tally = Tally()
        self._say = say
        self._lock = threading.Lock()
        self._claimed = 0

    def run(self) -> Tally:
        """Runs it whole: one job without a fault, then jobs with faults until there were enough."""
        begun = time.monotonic()
        expected = self._undisturbed()
        self._say(f"a job without a fault took {time.monotonic() - begun:.0f} s")
        with ThreadPoolExecutor(self.side_by_side) as pool:
            for lane in [pool.submit(self._lane, number, expected) for number in range(self.side_by_side)]:
                lane.result()
        self.tally.seconds = time.monotonic() - begun
        return self.tally

    def _undisturbed(self) -> Expected:
        run = Run(self.world, "undisturbed", 1)
        run.start_client()
        try:
            code = run.client.wait(JOB_TIMEOUT_S)
            assert code == 0, last_lines(run.complaints)
        finally:
            run.kill()
        return Expected.of(Record(self.world.auditors_store(), "jobs", run.name))

    def _lane(self, number: int, expected: Expected) -> None:
        chance = random.Random(self.seed * 1000 + number)
        job = 0
        while count := self._claim(chance.randrange(3, 9)):
            job += 1
            self._job(f"job-{number}-{job}", count, expected, chance)

    def _claim(self, count: int) -> int:
        with self._lock:
            count = min(count, self.wanted - self._claimed)
            self._claimed += count
            return count

    def _job(self, name: str, count: int, expected: Expected, chance: random.Random) -> None:
        run = Run(self.world, name, max_attempts=chance.choice([1, 1, 2, 5]))
        run.start_client()
        auditor = Auditor(run, self.world.auditors_store())
        try:
            with auditor:
                happened = self._make_faults_happen(run, auditor, count, chance)
                self._bring_home(run, auditor)
            self._settle(run, auditor, expected, happened)
        except Exception:
            with self._lock:
                self.tally.complaints.append(f"{name}: {traceback.format_exc(limit=3)}")
        finally:
            run.kill()

    def _make_faults_happen(self, run: Run, auditor: Auditor, count: int, chance: random.Random) -> int:
        happened = 0
        while happened < count:
            self._wait_for_a_moment(run, auditor, chance)
            if run.client.poll() is not None:
                self._again(run)
                if self._is_over(auditor):
                    break  # the job was faster than its faults
            fault = chance.choices(self.kinds, [kind.weight for kind in self.kinds])[0]
            stage = self._stage(run, auditor)
            if not fault.happen(run, chance):
                continue
            happened += 1
            with self._lock:
                self.tally.faults[fault.name] += 1
                self.tally.stages[stage] += 1
            self._say(f"{self.tally.faults.total():4d}  {run.name}, {stage}: {fault.name}")
        with self._lock:
            self._claimed -= count - happened  # another job will have them
        return happened

    def _bring_home(self, run: Run, auditor: Auditor) -> None:
        deadline = time.monotonic() + JOB_TIMEOUT_S
        while not self._is_over(auditor):
            if run.client.poll() is not None:
                self._again(run)
            if time.monotonic() > deadline:
                raise TimeoutError(f"no model {JOB_TIMEOUT_S:.0f} s after the last fault: {auditor.record.status()}")
            time.sleep(_POLL_S)

    def _again(self, run: Run) -> None:
        """Starts a client that ended, if its job has not; one that ended with an error of its own is a finding."""
        if (code := run.client.returncode) == 0:
            return
        if code is not None and code > 0:
            with self._lock:
                self.tally.complaints.append(f"{run.name}: exit code {code}\n{last_lines(run.complaints)}")
            run.complaints.unlink(missing_ok=True)
        run.start_client()

    def _is_over(self, auditor: Auditor) -> bool:
        try:
            return auditor.record.exists() and auditor.record.status().state == "Succeeded"
        except PalateError:
            return False

    def _stage(self, run: Run, auditor: Auditor) -> str:
        try:
            if not auditor.record.exists():
                return "being submitted"
            status = auditor.record.status()
            if status.state != "Running":
                return status.state
            if not run.processes("trainer"):
                return "Running, no trainer (staging, saving, or lost)"
            has_begun = any(event["kind"] == "train" for event in auditor.record.metrics())
        except PalateError:
            return "unknown: the store is away"
        return TRAINING if has_begun else "Running, before the first step"

    def _wait_for_a_moment(self, run: Run, auditor: Auditor, chance: random.Random) -> None:
        """Waits for a random time; every other time for one in the training itself, which is shorter than what precedes it."""
        if chance.random() < 0.5:
            deadline = time.monotonic() + 60
            while self._stage(run, auditor) != TRAINING and run.client.poll() is None and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        with suppress(subprocess.TimeoutExpired):
            run.client.wait(chance.expovariate(1 / 4.0))

    def _settle(self, run: Run, auditor: Auditor, expected: Expected, happened: int) -> None:
        deadline = time.monotonic() + 60
        while run.processes() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        for process in run.processes():
            auditor.findings.lies.append(f"{run.name}: it has ended, and {process.cmdline()} is still there")
        with self.world.store_lock:  # no other job's fault takes the store away while it is read whole
            check_end(auditor.record, auditor.findings, expected)
            status = auditor.record.status()
        events = run.events()
        with self._lock:
            tally = self.tally
            tally.started += 1
            tally.finished += status.state == "Succeeded"
            tally.attempts += status.attempt
            tally.resumed_by_hand += sum(event["what"] == "resumed" for event in events)
            tally.clients += len(run.clients)
            for attempt in status.attempts:
                tally.causes[_class_of(attempt.reason)] += 1
                if not attempt.reason:
                    auditor.findings.lies.append(f"{run.name}: attempt {attempt.attempt} ended without a reason")
            tally.lost += auditor.findings.lost
            tally.lies += auditor.findings.lies
        self._say(f"      {run.name} ended: {status.state} after {happened} faults, attempt {status.attempt}")


def _class_of(reason: str) -> str:
    """The cause without what differs from case to case."""
    words = reason.splitlines()[0] if reason else "NONE"
    return "".join("#" if letter.isdigit() else letter for letter in words)[:110]


def save(tally: Tally, path: Path) -> None:
    path.write_text(json.dumps(tally.to_json(), indent=1, default=str))
