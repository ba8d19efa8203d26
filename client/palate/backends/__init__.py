"""Where runs are put: backends by name. Knows their names, not how they work.

A backend is four verbs over one run (see `Backend`). Others register under the entry-point group `palate.backends`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from palate_recipes.errors import ConfigurationError, UnsupportedParameterError
from palate_recipes.hyperparameters import DeviceFacts
from palate_recipes.text import did_you_mean

_BUILT_IN = {
    "process": "palate.backends.process:ProcessBackend",
    "container": "palate.backends.container:ContainerBackend",
}
_GROUP = "palate.backends"

Kind = Literal["jobs", "services"]


@dataclass(frozen=True, kw_only=True)
class PlacementRequest:
    """Where a user wants a run, in PAI's words; what is None, they leave to the backend.

    Attributes:
        kind: Whether it trains or serves.
        image_uri: Image to run in.
        instance_type: Kind of machine.
        instance_count: How many of them.
        instance_spec: What a training may take; see `Limits.parse`.
        resource_config: What a service may take; as PAI's `ResourceConfig`.
    """

    kind: Kind
    image_uri: str | None = None
    instance_type: str | None = None
    instance_count: int | None = None
    instance_spec: object = None
    resource_config: object = None

    def refuse(self, backend: str, **remedies: str) -> None:
        """Raises UnsupportedParameterError for the first of the named attributes that was given, with its remedy."""
        for name, remedy in remedies.items():
            if (value := getattr(self, name)) is not None:
                raise UnsupportedParameterError(f"{name}={value!r} cannot be had on the {backend} backend: {remedy}")

    def refuse_other_machines(self, backend: str, *, more: str) -> None:
        """Raises UnsupportedParameterError unless the run may go to one machine, this one.

        Args:
            backend: Its name, which is an instance type as well.
            more: What a user does who wants less or more than this machine.
        """
        if self.instance_type not in {None, "local", backend}:
            self.refuse(backend, instance_type=f"it runs on this machine; {more}")
        if self.instance_count not in {None, 1}:
            self.refuse(backend, instance_count="there is one machine; leave it out or say 1")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A run that is to be started.

    Attributes:
        uri: Of the run: all that the runner is told. `palate-run URI` is the command.
        kind: Whether it trains or serves.
        name: Job id or service name.
        env: Variables for the runner on top of the engine's own; may hold credentials, so never to be logged.
        folders: Folders of this machine that the run reads, and whether it writes them, too.
        placement: What `place` returned for it.
    """

    uri: str
    kind: Kind
    name: str
    env: Mapping[str, str] = field(repr=False)
    folders: Mapping[Path, bool] = field(default_factory=dict)
    placement: Mapping[str, Any] = field(default_factory=dict)

    @property
    def run_name(self) -> str:
        """Name for people and for the engine's own lists."""
        return f"{self.kind}-{self.name}"


@dataclass(frozen=True)
class EngineStatus:
    """What an engine says of a run.

    Attributes:
        state: `unknown` when that cannot be told from here.
        cause: Why it is gone, where the engine knows.
    """

    state: Literal["running", "gone", "unknown"]
    cause: str = ""


@dataclass(frozen=True)
class EngineRun:
    """Something that an engine still holds of a run that was started from here.

    Attributes:
        engine_id: As `start` returned it, or as good: `stop` ends it.
        uri: Of the run.
        what: It, in words for people.
    """

    engine_id: str
    uri: str
    what: str


class Backend(Protocol):
    """An engine that can run one command. What it runs finds everything else in the store.

    Attributes:
        name: What it is asked for by.
        uses_this_python: Whether a run has the packages of this very environment, and no image of its own.
        is_this_host: Whether a run's ports are this machine's.
    """

    name: str
    uses_this_python: bool
    is_this_host: bool

    def start(self, launch: Launch) -> str:
        """Starts the runner, which outlives the caller, and returns the engine's id for it."""
        ...

    def status(self, engine_id: str) -> EngineStatus:
        """Returns whether it still runs."""
        ...

    def logs(self, engine_id: str) -> str:
        """Returns what the runner itself said: the cause when it died before it could write to the store."""
        ...

    def stop(self, engine_id: str, *, grace_s: float) -> None:
        """Ends it and all that it started: politely, then by force after `grace_s` seconds. The engine keeps nothing of it.

        Gone is no error.
        """
        ...

    def runs(self) -> list[EngineRun]:
        """Returns what the engine holds of this user's and this PALATE_HOME's runs, ended ones included; [] when it is not there."""
        ...

    def device(self, placement: Mapping[str, Any] | None = None) -> DeviceFacts:
        """Returns what a run with this placement computes with."""
        ...

    def place(self, request: PlacementRequest) -> dict[str, Any]:
        """Returns what `start` is to know of where a run goes, as JSON for the manifest; asks for nothing yet.

        Raises:
            UnsupportedParameterError: This backend cannot give it.
            PalateError: It could, and something is missing, such as an image.
        """
        ...


def for_run(backend: Backend, uri: str) -> Backend:
    """Returns the backend such that it answers, reads and ends nothing but what belongs to one run.

    An engine id comes from a record in the store, which others may be able to write: it could name anything.

    Args:
        backend: One with a method `of_run(uri)` returns such a backend; one without is trusted to check its ids itself.
        uri: Of the run.
    """
    of_run = getattr(backend, "of_run", None)
    bound: Backend = backend if of_run is None else of_run(uri)
    return bound


def backend_names() -> list[str]:
    """Returns the names of all backends that are installed."""
    return sorted(_known())


def _known() -> dict[str, str]:
    from importlib.metadata import entry_points  # a quarter of the time that importing a recipe would take

    return {**{entry.name: entry.value for entry in entry_points(group=_GROUP)}, **_BUILT_IN}


def get_backend(name: str) -> Backend:
    """Returns the backend of that name; raises ConfigurationError with the known names otherwise."""
    found = _BUILT_IN if name in _BUILT_IN else _known()
    if name not in found:
        hint = did_you_mean(name, found)
        raise ConfigurationError(f"unknown backend {name!r}: {hint}known are {', '.join(sorted(found))}")
    module, _, attribute = found[name].partition(":")
    backend: Backend = getattr(import_module(module), attribute)()
    return backend
