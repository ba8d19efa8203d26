"""Where runs are put: backends by name. Knows their names, not how they work.

A backend is four verbs over one command (see `Backend`). Others register under the entry-point group `palate.backends`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

from palate.errors import ConfigurationError
from palate_recipes.hyperparameters import DeviceFacts
from palate_recipes.nearest import did_you_mean

_BUILT_IN = {"process": "palate.backend.process:ProcessBackend"}
_GROUP = "palate.backends"


class Backend(Protocol):
    """An engine that can run one command. What it runs finds everything else in the store."""

    name: str

    def start(self, argv: list[str], *, run_name: str, env: dict[str, str]) -> str:
        """Starts `argv`, which outlives the caller, and returns the engine's id for it.

        Args:
            argv: The command; its last element is the run's URI.
            run_name: Name for people and for the engine's own lists.
            env: Variables on top of the engine's own; may hold credentials, so never to be logged.
        """
        ...

    def status(self, engine_id: str) -> str:
        """Returns `running`, `gone`, or `unknown` when that cannot be told from here."""
        ...

    def logs(self, engine_id: str) -> str:
        """Returns what the runner itself said: the cause when it died before it could write to the store."""
        ...

    def stop(self, engine_id: str, *, grace_s: float) -> None:
        """Ends it and all that it started: politely, then by force after `grace_s` seconds. Gone is no error."""
        ...

    def device(self) -> DeviceFacts:
        """Returns what a run there computes with."""
        ...

    def refuse(
        self, *, image_uri: str | None, instance_type: str | None, instance_count: int | None, instance_spec: object
    ) -> None:
        """Raises UnsupportedParameterError for a placement that this backend cannot give."""
        ...


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
