"""Keeps a running service equal to its record: versions, instances, updates. Knows the record and two files, no engine.

The server program reads `fleet.json` and reports in `fleet-state.json` (see `palate_recipes.specs.fleet`). An update goes through
these steps, and a runner that is started again takes it up at any of them:

    1. the client adds a version to the history and writes update.json
    2. the runner stages the version's model, and adds the version to fleet.json
    3. the program starts it and compares it with the trained model: `ready` or `failed`
    4. failed: the history, then update.json, then fleet.json without the version
       ready, to be promoted: the history, the manifest, the history, then update.json, then fleet.json without the old version

The current version answers during all of this. While the store cannot be reached, everything stays as it is.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from msgspec import to_builtins

from palate.runner.context import Ending, reason_of
from palate.runner.merge import MergedModel
from palate.runner.retry import StoreRetry
from palate.runs.record import Record
from palate.runs.rollout import change_update, make_current, note_outcome, open_update, read_version
from palate_recipes.specs.fleet import (
    FLEET_FILE,
    FLEET_STATE_FILE,
    AdapterState,
    Fleet,
    FleetAdapter,
    FleetState,
    FleetVersion,
    VersionState,
)
from palate_recipes.specs.rollout import Update, Version, version_name
from palate_recipes.specs.run import Deployment, ServeManifest
from palate_recipes.specs.serve import ServeSpec


class NotStaged(Exception):
    """A version could not be brought to this machine.

    Attributes:
        ending: How the run ends, if that was its only version.
    """

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.reason)
        self.ending = ending


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A version whose model is on this machine.

    Attributes:
        body: The version.
        spec: What the server program gets.
        folder: Folder that was created for it; None if its files are used where they are.
        merged: The merged model that it serves; None if nothing was merged.
    """

    body: Deployment
    spec: ServeSpec
    folder: Path | None
    merged: MergedModel | None = None

    def explain(self, reason: str) -> str:
        """Returns why it failed, with what merging may have to do with it."""
        return reason if self.merged is None else self.merged.explain(reason)

    @property
    def name(self) -> str:
        return version_name(self.body.version)


Stage = Callable[[Deployment, Path, StoreRetry], Staged]
"""Brings a version's model into a folder, which it creates if it needs one. Raises whatever prevents that."""


class Adapters(Protocol):
    """Brings the adapters of the record to this machine.

    Attributes:
        missing: Those that are not here: they load, or could not be brought.
    """

    @property
    def missing(self) -> tuple[AdapterState, ...]: ...

    def look(self) -> tuple[FleetAdapter, ...]:
        """Reads the record and returns those that are here."""
        ...

    def bring(self) -> None:
        """Brings what is missing. May take as long as a download, while `look` is called."""
        ...


class _Staging:
    """Stages a version in a thread of its own: a download takes minutes, and neither stop nor withdrawal must wait for it.

    A version that is withdrawn gives up what it can: retries, and the program that merges.
    """

    def __init__(self, stage: Stage, body: Deployment, folder: Path, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.staged: Staged | None = None
        self.error = ""
        self._abandoned = threading.Event()
        self._lock = threading.Lock()
        retry = StoreRetry(say, self._abandoned.is_set)
        self._thread = threading.Thread(target=self._run, args=(stage, body, retry), daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Gives up, and removes the folder, now or once the thread has ended."""
        with self._lock:
            self._abandoned.set()
            ended = self.staged is not None or bool(self.error)
        if ended:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, stage: Stage, body: Deployment, retry: StoreRetry) -> None:
        staged, error = None, ""
        try:
            staged = stage(body, self.folder, retry)
        except NotStaged as caught:
            if caught.ending.state == "Stopped" and not self._abandoned.is_set():
                return  # the service ends: its next start takes the update up again
            error = caught.ending.reason
        except Exception as caught:  # whatever it is, the update has failed and the service continues
            error = reason_of(caught)
        with self._lock:
            self.staged, self.error = staged, error
            abandoned = self._abandoned.is_set()
        if abandoned or error:
            shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(kw_only=True)
class _Candidate:
    """The new version of an open update.

    Attributes:
        update: As read last.
        version: Its entry in the history.
        staging: Brings its model here.
        since: Generation of the first desired state that has it; 0: none yet.
    """

    update: Update
    version: Version
    staging: _Staging
    since: int = 0

    @property
    def name(self) -> str:
        return version_name(self.update.body.version)


class Rollout:
    """Follows the versions and adapters in the record of a running service. `update` is a part of the poll.

    Args:
        record: The service, without retries.
        current: The version that the service starts with.
        work: The work folder, with the two files.
        stage: See `Stage`.
        attempt: Returns the number of the runner's attempt.
        say: Writes a line to the service's log.
        adapters: The adapters of the record; None: there are none.
    """

    def __init__(
        self,
        record: Record,
        current: Staged,
        work: Path,
        *,
        stage: Stage,
        attempt: Callable[[], int],
        say: Callable[[str], None],
        adapters: Adapters | None = None,
    ) -> None:
        self._record = record
        self._work = work
        self._stage = stage
        self._attempt = attempt
        self._say = say
        self._adapters = adapters
        self._current = current
        self._candidate: _Candidate | None = None
        self._outcome: dict[str, Any] = {}  # of the last update that this runner has ended
        self._settling: Update | None = (
            None  # that update, until the program no longer gives requests to the other version
        )
        self._replaced: list[Staged] = []  # their engines may still answer open requests
        self._sizes = current.body
        self._staged_adapters: tuple[FleetAdapter, ...] = ()
        self._bringing: threading.Thread | None = None
        self._fleet: Fleet | None = None
        self._shares: dict[str, float] = {}  # those that the program has read
        self._told: dict[str, Any] = {}
        self._announced = False

    def begin(self) -> None:
        """Writes the first desired state: the current version. Call before the program starts."""
        self._write_fleet()

    def announced(self, facts: dict[str, Any]) -> None:
        """Call when the status is `Running` with these details, from `facts`. Until then `update` changes nothing.

        An update that was open when the service started waits for this: the current version answers first.
        """
        self._told = facts
        self._announced = True

    def facts(self) -> dict[str, Any]:
        """Returns the details of the status: versions, adapters, and the update. Empty until the program has reported them."""
        state = self._read_state()
        if state is None:
            return {}
        if self._fleet is not None and state.generation >= self._fleet.generation:
            self._shares = {version.name: version.share for version in self._fleet.versions}
        return {
            "versions": [
                {**to_builtins(one), "instances": one.instances, "share": self._shares.get(one.name, 0.0)}
                for one in state.versions
            ],
            "adapters": to_builtins((*state.adapters, *(self._adapters.missing if self._adapters is not None else ()))),
            "update": self._update_facts(state),
            "max_lora_rank": next(
                (one.max_lora_rank for one in state.versions if one.name == self._current.name), None
            ),
        }

    def update(self) -> None:
        """Reads record and state, and takes the next step of whatever there is to do.

        Raises:
            StoreError: The record cannot be read or written. Nothing has changed; the next call repeats the step.
            DamagedFilesError: The record is damaged. As above.
        """
        if not self._announced:
            return
        manifest = self._record.serve_manifest()
        failed: Exception | None = None
        # What is damaged for one of them must keep neither the other nor the number of engines from being followed.
        steps: tuple[Callable[[], None], ...] = (
            lambda: self._follow_update(manifest, open_update(self._record)),
            self._follow_adapters,
        )
        for follow in steps:
            try:
                follow()
            except Exception as error:
                failed = failed or error
        if manifest.body.version == self._current.body.version:
            self._sizes = manifest.body
        self._write_fleet()
        self._remove_replaced()
        self._tell()
        if failed is not None:
            raise failed

    def _follow_adapters(self) -> None:
        """Looks at the record, and brings what is missing in a thread: neither a removal nor an update waits for a download."""
        if self._adapters is None:
            return
        self._staged_adapters = self._adapters.look()
        if self._adapters.missing and (self._bringing is None or not self._bringing.is_alive()):
            self._bringing = threading.Thread(target=self._adapters.bring, daemon=True)
            self._bringing.start()

    # ── the update ──────────────────────────────────────────────────────────────────────────────────────────────

    def _follow_update(self, manifest: ServeManifest, asked: Update | None) -> None:
        candidate = self._candidate
        if candidate is not None and (asked is None or asked.id != candidate.update.id):
            self._say(f"the update to {candidate.name} is no longer in the record: it ends")
            self._drop("cancelled", "its record was removed")
            candidate = None
        if asked is None:
            return
        number = asked.body.version
        if number == manifest.body.version:  # promoted, by this runner or one before it, which could not write the rest
            self._finish(asked, manifest)
            return
        if manifest.body.version != self._current.body.version:
            return  # somebody replaces the model with a stop and a start, which end this runner
        if asked.cancelled:
            self._end(asked, "cancelled", "it was withdrawn")
            return
        if candidate is None:
            version = read_version(self._record, number)
            if version is None or version.outcome in ("failed", "cancelled"):
                # An earlier runner wrote the outcome, and did not get to update.json.
                change_update(self._record, asked.id, ended=True)
                return
            self._say(f"update to {version_name(number)}: bringing its model to this machine")
            folder = self._work / f"model-{version_name(number)}"
            staging = _Staging(self._stage, asked.body, folder, self._say)
            candidate = self._candidate = _Candidate(update=asked, version=version, staging=staging)
        candidate.update = asked
        if candidate.staging.error:
            self._end(asked, "failed", candidate.staging.error)
        elif candidate.staging.staged is not None:
            self._follow_state(candidate, manifest)

    def _follow_state(self, candidate: _Candidate, manifest: ServeManifest) -> None:
        state = self._state_of(candidate, self._read_state())
        if state is None or state.state not in ("ready", "failed"):
            return
        if state.state == "failed":
            table = state.parity.table if state.parity is not None else ""
            staged = candidate.staging.staged
            reason = state.reason or "it ended without a reason"
            self._end(candidate.update, "failed", staged.explain(reason) if staged is not None else reason, table)
        elif candidate.update.promote:
            after = make_current(self._record, manifest, candidate.version)
            self._finish(candidate.update, after)

    def _finish(self, update: Update, manifest: ServeManifest) -> None:
        """Ends an update whose version is the current one in the manifest."""
        version = read_version(self._record, update.body.version)
        if version is not None and version.outcome != "current":
            note_outcome(self._record, version, "current")
        change_update(self._record, update.id, ended=True)
        candidate = self._candidate
        if candidate is not None and candidate.staging.staged is not None:
            self._replaced.append(self._current)
            self._current = candidate.staging.staged
        self._candidate = None
        self._sizes = manifest.body
        self._outcome, self._settling = _outcome(update, "promoted"), update
        self._say(f"{self._current.name} is the current version now")

    def _end(self, update: Update, outcome: Any, reason: str, table: str = "") -> None:
        """Ends an update without its version. The record first: after a crash, the next runner must not try it again."""
        version = read_version(self._record, update.body.version)
        if version is not None:
            note_outcome(self._record, version, outcome, reason=reason, table=table)
        change_update(self._record, update.id, ended=True)
        name = version_name(update.body.version)
        self._say(f"the update to {name} {'failed' if outcome == 'failed' else 'ends'}: {reason}")
        self._outcome, self._settling = _outcome(update, outcome, reason=reason, table=table), update
        if self._candidate is not None:
            self._drop(outcome, reason, table)

    def _drop(self, outcome: str, reason: str, table: str = "") -> None:
        candidate = self._candidate
        assert candidate is not None
        self._candidate = None
        self._outcome, self._settling = (
            _outcome(candidate.update, outcome, reason=reason, table=table),
            candidate.update,
        )
        staged = candidate.staging.staged
        if staged is None:
            candidate.staging.abandon()
        else:
            self._replaced.append(staged)  # removed when its engines have ended

    # ── the files ───────────────────────────────────────────────────────────────────────────────────────────────

    def _write_fleet(self) -> None:
        """Writes the desired state, if it has changed."""
        versions = [(self._current, 1.0)]
        candidate = self._candidate
        joins = candidate.staging.staged if candidate is not None else None
        if candidate is not None and joins is not None:
            share = candidate.update.share
            versions = [(self._current, round(1.0 - share, 9)), (joins, share)]
        wanted = tuple(
            FleetVersion(
                name=staged.name,
                spec=staged.spec,
                instances=self._sizes.instances,
                share=share,
                autoscaling=self._sizes.autoscaling or None,
            )
            for staged, share in versions
        )
        known = self._fleet
        if known is not None and (known.versions, known.adapters) == (wanted, self._staged_adapters):
            return
        fleet = Fleet(
            generation=1 if known is None else known.generation + 1, versions=wanted, adapters=self._staged_adapters
        )
        fleet.write(self._work / FLEET_FILE)
        self._fleet = fleet
        if candidate is not None and joins is not None and not candidate.since:
            candidate.since = fleet.generation

    def _read_state(self) -> FleetState | None:
        """Returns what the program has reported; None if it has not yet."""
        try:
            return FleetState.read(self._work / FLEET_STATE_FILE)
        except (
            OSError,
            ValueError,
        ):  # unreadable is like not reported: no step is taken, and a client says that nothing happens
            return None

    def _state_of(self, candidate: _Candidate, state: FleetState | None) -> VersionState | None:
        if state is None or not candidate.since or state.generation < candidate.since:
            return None
        return next((one for one in state.versions if one.name == candidate.name), None)

    def _remove_replaced(self) -> None:
        """Removes the files of versions that have no engine any more."""
        state = self._read_state()
        if not self._replaced or state is None or self._fleet is None or state.generation < self._fleet.generation:
            return
        running = {one.name for one in state.versions if one.state != "failed"}
        for staged in [one for one in self._replaced if one.name not in running]:
            if staged.folder is not None:
                shutil.rmtree(staged.folder, ignore_errors=True)
            self._replaced.remove(staged)

    # ── the status ──────────────────────────────────────────────────────────────────────────────────────────────

    def _update_facts(self, state: FleetState) -> dict[str, Any]:
        candidate = self._candidate
        if candidate is None:
            if self._settling is not None and not self._is_settled(state):
                return _outcome(self._settling, "ready")  # a client that hears of the end may ask at once
            self._settling = None
            return self._outcome
        if candidate.staging.staged is None:
            return _outcome(candidate.update, "staging")
        found = self._state_of(candidate, state)
        return _outcome(candidate.update, "ready" if found is not None and found.state == "ready" else "starting")

    def _is_settled(self, state: FleetState) -> bool:
        others = [one for one in state.versions if one.name != self._current.name]
        return (
            self._fleet is not None
            and state.generation >= self._fleet.generation
            and all(one.state in ("draining", "failed") for one in others)
        )

    def _tell(self) -> None:
        facts = self.facts()
        if not facts:
            return
        current = next((one for one in facts["versions"] if one["name"] == self._current.name), None)
        if current is not None and current["state"] == "ready" and self._outcome.get("state") == "promoted":
            facts |= {
                "engine": current.get("engine", ""),
                "models": self._current.spec.models,
                "parity": current.get("parity"),
            }
        if facts != self._told and self._record.add_details(self._attempt(), facts):
            self._told = facts


def _outcome(update: Update, state: str, *, reason: str = "", table: str = "") -> dict[str, Any]:
    told = {"id": update.id, "version": version_name(update.body.version), "state": state}
    if state in ("staging", "starting", "ready"):
        return {**told, "share": update.share, "promote": update.promote}
    return {**told, "reason": reason, "table": table, "ended_at": round(time.time(), 3)}
