"""What must hold whatever happens: no status lies, and nothing that was there is lost. Reads the store past the gate.

`Auditor` looks at a run again and again while faults happen; `check_end` looks at what it left.
"""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from palate.checksums import Checksums, read_model_digests
from palate.errors import PalateError
from palate.runs.lease import is_dead_here, read_lease
from palate.runs.record import Record, events_once
from palate.store import Store
from palate_recipes.specs.run import Status
from tests.faults.run import Run
from tests.faults.world import LEASE_S, STEPS

SILENT_LIMIT_S = 60.0 + 2 * LEASE_S + 20.0
"""A run without a runner may be called active for so long: until its start counts as failed, or its lease as lost."""

_LOOK_S = 0.5


@dataclass
class Findings:
    """What was seen of one run.

    Attributes:
        lost: Artefacts that were there, or should be, and are not; must stay empty.
        lies: Statuses that said what was not so; must stay empty.
        statuses: Every status that was seen, without repeats.
        whole: Checkpoints that were whole at some time: their store prefixes.
    """

    lost: list[str] = field(default_factory=list)
    lies: list[str] = field(default_factory=list)
    statuses: list[Status] = field(default_factory=list)
    whole: set[str] = field(default_factory=set)


class Auditor:
    """Watches a run from outside, on a thread of its own; a context manager."""

    def __init__(self, run: Run, store: Store) -> None:
        self.run = run
        self.record = Record(store, "jobs", run.name)
        self.findings = Findings()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._unattended_since: float | None = None

    def __enter__(self) -> Auditor:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_S):
            try:
                if self.record.exists():
                    self.look()
            except PalateError:
                self._unattended_since = None  # the store is away; what cannot be written is no lie

    def look(self) -> None:
        status = self.record.status()
        if not self.findings.statuses or _facts(status) != _facts(self.findings.statuses[-1]):
            self._compare(status)
            self.findings.statuses.append(status)
        marks = [info.key for info in self.record.store.list(self.record.key("checkpoints"))]
        self.findings.whole |= {key.rpartition("/")[0] for key in marks if key.endswith("/.complete")}
        attended = status.is_terminal or self.run.processes("runner") or not self.run.processes("client")
        if attended:
            self._unattended_since = None
        self._unattended_since = self._unattended_since if attended else self._unattended_since or time.monotonic()
        if self._unattended_since and time.monotonic() - self._unattended_since > SILENT_LIMIT_S:
            self._lie(f"{status.state} for {SILENT_LIMIT_S:.0f} s without a runner")
            self._unattended_since = None

    def _compare(self, status: Status) -> None:
        before = self.findings.statuses[-1] if self.findings.statuses else None
        if status.state in ("Failed", "Stopped") and not status.reason:
            self._lie(f"{status.state} without a reason")
        if before is None:
            return
        if status.attempt < before.attempt:
            self._lie(f"attempt {before.attempt} became attempt {status.attempt}")
        if before.is_terminal and status.attempt == before.attempt:
            self._lie(f"{before.state} became {status.state} in the same attempt")
        if before.state == "Succeeded":
            self._lie(f"Succeeded became {status.state}")

    def _lie(self, what: str) -> None:
        self.findings.lies.append(f"{self.run.name}: {what}")


def _facts(status: Status) -> tuple[Any, ...]:
    return status.state, status.attempt, status.reason


def check_end(record: Record, findings: Findings, expected: Expected) -> None:
    """Adds to `findings` what a job that has ended lacks, or has other than the run without a fault."""
    status = record.status()
    if status.state != "Succeeded":
        findings.lies.append(f"{record.name}: its client ended in order, and it is {status.state}")
        return
    try:
        what = f"{record.name}/model"
        digests = read_model_digests(record.store, record.key("model"), status.details["model_digest"], what=what)
        digests.check_store(record.store, record.key("model"), what=what)
    except (PalateError, KeyError) as error:
        findings.lies.append(f"{record.name}: Succeeded with a model that is not whole: {error!r}")
        return
    for name, facts in digests.files.items():
        data = record.store.get(record.key("model", name))
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            findings.lost.append(f"{record.name}: model/{name} is not what its digest says")
    adapter = record.store.get(record.key("model", "adapter_model.safetensors"))
    if hashlib.sha256(adapter).hexdigest() != expected.adapter:
        findings.lost.append(f"{record.name}: the adapter is another than without faults")
    _check_metrics(record, findings, expected)
    _check_checkpoints(record, findings)
    lease = read_lease(record)
    if lease is None or (not lease.released and not is_dead_here(lease)):
        findings.lies.append(f"{record.name}: it has ended, and its lease is held")


def _check_metrics(record: Record, findings: Findings, expected: Expected) -> None:
    events = [*record.metrics()]
    losses = [(event["step"], event["loss"]) for event in events_once(events) if event["kind"] == "train"]
    if [step for step, _ in losses] != [*range(1, STEPS + 1)]:
        seen = [step for step, _ in losses]
        findings.lost.append(
            f"{record.name}: metrics of steps {sorted({*range(1, STEPS + 1)} - {*seen})}, twice"
            f" {sorted({step for step in seen if seen.count(step) > 1})}; its starts in the order of the store: "
            f"{[(e['step'], e.get('attempt', 1)) for e in events if e['kind'] == 'start']}"
        )
    elif any(abs(loss - other) > 1e-6 for (_, loss), other in zip(losses, expected.losses, strict=True)):
        findings.lost.append(f"{record.name}: its losses are others than without faults")
    for kind in ("logs", "metrics"):
        numbers = sorted(int(info.key.rpartition("/")[2].split(".")[0]) for info in record.store.list(record.key(kind)))
        if gaps := sorted({*range(1, max(numbers, default=0) + 1)} - {*numbers}):
            findings.lost.append(f"{record.name}: parts of its {kind} are missing: {gaps}")


def _check_checkpoints(record: Record, findings: Findings) -> None:
    for prefix in sorted(findings.whole):
        try:
            digests = Checksums.parse(record.store.get(f"{prefix}/.complete"), where=prefix)
            for name, facts in digests.files.items():
                if hashlib.sha256(record.store.get(f"{prefix}/{name}")).hexdigest() != facts["sha256"]:
                    findings.lost.append(f"{prefix}/{name} is not what it was")
        except PalateError as error:
            findings.lost.append(f"{prefix} was whole and is not: {error}")


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a run without a fault gave.

    Attributes:
        adapter: SHA-256 of its weights.
        losses: Of every step.
    """

    adapter: str
    losses: list[float]

    @classmethod
    def of(cls, record: Record) -> Expected:
        data = record.store.get(record.key("model", "adapter_model.safetensors"))
        losses = [event["loss"] for event in events_once(record.metrics()) if event["kind"] == "train"]
        return cls(adapter=hashlib.sha256(data).hexdigest(), losses=losses)


def last_lines(path: Any, count: int = 15) -> str:
    """Returns the end of what a client wrote to stderr."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-count:]) if path.exists() else ""
