"""Plays the server program for tests of updates: reads fleet.json and reports in fleet-state.json, without an engine.

A version takes two looks from `starting` to its end, and one that is no longer wanted takes one look to drain.
"""

from __future__ import annotations

import threading
from pathlib import Path

from palate_recipes.specs.fleet import FLEET_FILE, FLEET_STATE_FILE, Fleet, FleetState, VersionState


class Program:
    """A server program in whose engines nothing happens.

    Args:
        work: The work folder.
        fails: By name of a version, the state with which it ends instead of `ready`.
    """

    def __init__(self, work: Path, fails: dict[str, VersionState] | None = None) -> None:
        self._work = work
        self._states: dict[str, VersionState] = {}
        self.fails = fails or {}
        self.seen: list[Fleet] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def look(self) -> None:
        """Reads the desired state once and reports."""
        fleet = Fleet.read(self._work / FLEET_FILE)
        assert abs(sum(version.share for version in fleet.versions) - 1) < 1e-9
        if not self.seen or self.seen[-1].generation != fleet.generation:
            assert not self.seen or fleet.generation > self.seen[-1].generation
            self.seen.append(fleet)
        wanted = {version.name: version for version in fleet.versions}
        states = {}
        for name, state in self._states.items():
            if name not in wanted and state.state != "draining":
                states[name] = VersionState(name=name, state="draining", instances=state.instances)
        for name, version in wanted.items():
            before = self._states.get(name)
            if before is None:
                states[name] = VersionState(name=name, state="starting")
            elif name in self.fails:
                states[name] = self.fails[name]
            else:
                states[name] = VersionState(name=name, state="ready", instances=version.instances, engine="fake 1")
        self._states = states
        FleetState(generation=fleet.generation, versions=tuple(states.values())).write(self._work / FLEET_STATE_FILE)

    def __enter__(self) -> Program:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(0.02):
            self.look()
