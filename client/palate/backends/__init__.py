"""Backends by name: where runs execute. Knows their names, not how they work.

A backend implements `Backend`. Third-party backends register in the entry-point group `palate.backends`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from palate_recipes.errors import ConfigurationError, UnsupportedParameterError
from palate_recipes.hyperparameters import DeviceFacts
from palate_recipes.specs.run import Kind
from palate_recipes.text import did_you_mean

_BUILT_IN = {
    "process": "palate.backends.process:ProcessBackend",
    "container": "palate.backends.container:ContainerBackend",
}
_GROUP = "palate.backends"


@dataclass(frozen=True, kw_only=True)
class PlacementRequest:
    """The user's placement of a run, with PAI's names. None: the backend decides.

    Attributes:
        kind: Whether it trains or serves.
        image_uri: Image to run in.
        instance_type: Type of machine.
        instance_count: Number of machines of a training; number of engines of a service.
        instance_spec: Resource limits of a training; see `Limits.parse`.
        resource_config: Resource limits of a service, as PAI's `ResourceConfig`.
    """

    kind: Kind
    image_uri: str | None = None
    instance_type: str | None = None
    instance_count: int | None = None
    instance_spec: object = None
    resource_config: object = None

    def refuse(self, backend: str, **remedies: str) -> None:
        """Raises UnsupportedParameterError with the remedy for the first named attribute that is set."""
        for name, remedy in remedies.items():
            if (value := getattr(self, name)) is not None:
                raise UnsupportedParameterError(f"{name}={value!r} is not supported by the {backend} backend: {remedy}")

    def refuse_other_machines(self, backend: str, *, more: str) -> None:
        """Raises UnsupportedParameterError unless the run can use this machine alone.

        Args:
            backend: Name of the backend, which is also an instance type.
            more: Remedy for users who want other resources.
        """
        if self.instance_type not in {None, "local", backend}:
            self.refuse(backend, instance_type=f"it runs on this machine; {more}")
        if self.kind == "jobs" and self.instance_count not in {None, 1}:
            self.refuse(backend, instance_count="there is one machine; omit it or set it to 1")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A run to start.

    Attributes:
        uri: URI of the run, the only argument of the runner: `palate-run URI`.
        kind: Whether it trains, serves or evaluates.
        name: Job id, or name of a service or evaluation.
        env: Additional environment variables of the runner. May contain credentials, so never log it.
        folders: Local folders that the run reads; True if it also writes them.
        placement: The result of `place`.
    """

    uri: str
    kind: Kind
    name: str
    env: Mapping[str, str] = field(repr=False)
    folders: Mapping[Path, bool] = field(default_factory=dict)
    placement: Mapping[str, Any] = field(default_factory=dict)

    @property
    def run_name(self) -> str:
        """Display name, also in the engine's own lists."""
        return f"{self.kind}-{self.name}"


@dataclass(frozen=True)
class EngineStatus:
    """State of a run in its engine.

    Attributes:
        state: `unknown` if it cannot be determined from here.
        cause: Why it is gone, if the engine knows.
    """

    state: Literal["running", "gone", "unknown"]
    cause: str = ""


@dataclass(frozen=True)
class EngineRun:
    """A process or container of a run that was started from here.

    Attributes:
        engine_id: An id that `stop` accepts, as returned by `start`.
        uri: URI of the run.
        what: Description.
    """

    engine_id: str
    uri: str
    what: str


class Backend(Protocol):
    """Runs one command. The command finds everything else in the store.

    Attributes:
        name: Name of the backend.
        uses_this_python: Whether runs use this Python environment instead of an image.
        is_this_host: Whether a run's ports are ports of this machine.
    """

    name: str
    uses_this_python: bool
    is_this_host: bool

    def start(self, launch: Launch) -> str:
        """Starts the runner, which must outlive the caller, and returns its engine id."""
        ...

    def status(self, engine_id: str) -> EngineStatus:
        """Returns whether the runner is still running."""
        ...

    def logs(self, engine_id: str) -> str:
        """Returns the runner's own output, which has the cause if it died before it could write to the store."""
        ...

    def stop(self, engine_id: str, *, grace_s: float) -> None:
        """Stops the runner and all its descendants, and kills them after `grace_s` seconds. Removes it from the engine.

        Idempotent.
        """
        ...

    def runs(self) -> list[EngineRun]:
        """Returns the engine's runs of this user and PALATE_HOME, including ended ones; [] if there is no engine."""
        ...

    def device(self, placement: Mapping[str, Any] | None = None) -> DeviceFacts:
        """Returns the device of a run with this placement."""
        ...

    def place(self, request: PlacementRequest) -> dict[str, Any]:
        """Returns the placement for `start`, as JSON for the manifest. Reserves nothing.

        Raises:
            UnsupportedParameterError: The backend does not support a value of the request.
            PalateError: Something is missing, such as an image.
        """
        ...


def for_run(backend: Backend, uri: str) -> Backend:
    """Returns the backend restricted to one run: it reads and stops nothing else.

    Engine ids come from the store, which others may be able to write, so an id could name any process or container.

    Args:
        backend: Restricted with its method `of_run(uri)`. A backend without that method must check ids itself.
        uri: URI of the run.
    """
    of_run = getattr(backend, "of_run", None)
    bound: Backend = backend if of_run is None else of_run(uri)
    return bound


def folders_seen(backend: Backend, engine_id: str) -> list[Path] | None:
    """Returns the local folders that a running run sees; None if it sees all, or if that is not known here.

    A backend without a method `folders_seen(engine_id)` sees all folders of its machine.
    """
    ask = getattr(backend, "folders_seen", None)
    seen: list[Path] | None = None if ask is None else ask(engine_id)
    return seen


def backend_names() -> list[str]:
    """Returns the names of all installed backends."""
    return sorted(_known())


def _known() -> dict[str, str]:
    from importlib.metadata import entry_points  # imported here: it would be a quarter of a recipe's import time

    return {**{entry.name: entry.value for entry in entry_points(group=_GROUP)}, **_BUILT_IN}


def get_backend(name: str) -> Backend:
    """Returns a backend by name. Raises ConfigurationError if it is unknown."""
    found = _BUILT_IN if name in _BUILT_IN else _known()
    if name not in found:
        hint = did_you_mean(name, found)
        raise ConfigurationError(f"unknown backend {name!r}: {hint}valid names: {', '.join(sorted(found))}")
    module, _, attribute = found[name].partition(":")
    backend: Backend = getattr(import_module(module), attribute)()
    return backend
