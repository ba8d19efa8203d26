"""Writes a service's desired state and waits until it is reached, as the runner does. Knows the two files, no process."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

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
from palate_recipes.specs.serve import ServeSpec

REACHED_LIMIT_S = 240.0


def fleet_adapter(name: str, folder: Path) -> FleetAdapter:
    """Returns an adapter to ask for. Its digest is that of its weights, because no store made these files."""
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    return FleetAdapter(name=name, digest=digest, path=str(folder))


class Desired:
    """The desired state of a service in `work`, which may not run yet.

    Attributes:
        versions: The versions that it names.
        adapters: The adapters that it names.
    """

    def __init__(self, work: Path, spec: dict[str, Any], *, instances: int = 1) -> None:
        """Writes the first one: `v1` with the fields of `spec`."""
        self._work = work
        self._generation = self._last = 0
        self._spec = ServeSpec(service_name="smol_example", work_dir=str(work), **spec)
        self.instances = instances
        self.versions: tuple[FleetVersion, ...] = ()
        self.adapters: tuple[FleetAdapter, ...] = ()
        work.mkdir(parents=True, exist_ok=True)
        self.ask(versions=[self.version()])

    def version(self, **changed: Any) -> FleetVersion:
        """Returns the next version: the fields of the one before, with these changed."""
        self._last += 1
        self._spec = replace(self._spec, **changed)
        return FleetVersion(name=f"v{self._last}", spec=self._spec, instances=self.instances)

    def ask(
        self, *, versions: Sequence[FleetVersion] | None = None, adapters: Sequence[FleetAdapter] | None = None
    ) -> None:
        """Writes the next desired state; what is not given stays."""
        self.versions = self.versions if versions is None else tuple(versions)
        self.adapters = self.adapters if adapters is None else tuple(adapters)
        self._generation += 1
        Fleet(generation=self._generation, versions=self.versions, adapters=self.adapters).write(
            self._work / FLEET_FILE
        )

    def scale(self, instances: int) -> None:
        self.instances = instances
        self.ask(versions=[replace(one, instances=instances) for one in self.versions])

    def state(self) -> FleetState:
        return FleetState.read(self._work / FLEET_STATE_FILE)

    def is_reached(self) -> bool:
        state = self.state()
        return (
            state.generation == self._generation
            and not any(version.state in ("starting", "draining") for version in state.versions)
            and not any(adapter.state == "loading" for adapter in state.adapters)
        )

    def reached(self) -> FleetState:
        """Waits for the desired state and returns the observed one."""
        until(self.is_reached, lambda: f"the desired state was not reached: {self.state()}")
        return self.state()

    def serves(self, version: str) -> VersionState:
        return next(one for one in self.state().versions if one.name == version)

    def serves_adapter(self, name: str) -> AdapterState:
        return next(one for one in self.state().adapters if one.name == name)


def until(condition: Callable[[], bool], told: Callable[[], str], *, timeout_s: float = REACHED_LIMIT_S) -> None:
    """Waits for a condition; `told` says what is wrong if it does not come true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.05)
