"""A small model in the place of a named one, for trials and tests of whole scripts. Knows names, no weights."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from palate.errors import ConfigurationError, UnknownModelError
from palate_recipes.catalog import find_model

SETTING = "PALATE_MODEL_STAND_IN"
LABEL = "stand_in_for"
"""Label of a job or service whose model stands in for another: what it made says what it is."""


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """What is used instead of a model that was asked for.

    Attributes:
        for_name: The model that was asked for.
        name: Name of the one that is used.
        uri: Its folder or object-store URI, or None for a model of the catalog.
    """

    for_name: str
    name: str
    uri: str | None


def stand_in_for(model_name: str) -> StandIn | None:
    """Returns what PALATE_MODEL_STAND_IN puts in the place of a model, or None; says so on stderr each time.

    The setting is `NAME=OTHER`, several with commas between; OTHER is a name of the catalog, a folder, or a URI.

    Raises:
        ConfigurationError: The setting cannot be read.
        UnknownModelError: OTHER is neither in the catalog nor a path.
    """
    setting = os.environ.get(SETTING, "")
    for entry in filter(None, (part.strip() for part in setting.split(","))):
        name, separator, other = (part.strip() for part in entry.partition("="))
        if not (separator and name and other):
            raise ConfigurationError(f"{SETTING}={setting!r}: {entry!r} is no NAME=OTHER; write both, or unset it")
        if _canonical(name) == _canonical(model_name):
            found = _resolve(model_name, other)
            print(
                f"STAND-IN: {found.uri or found.name} is used in the place of {model_name}, because {SETTING} says so. "
                f"What comes out is no {model_name}",
                file=sys.stderr,
                flush=True,
            )
            return found
    return None


def _resolve(model_name: str, other: str) -> StandIn:
    try:
        return StandIn(for_name=model_name, name=find_model(other).name, uri=None)
    except UnknownModelError:
        if "/" not in other:
            raise
    return StandIn(for_name=model_name, name=other.rstrip("/").rpartition("/")[2], uri=other)


def _canonical(name: str) -> str:
    try:
        return find_model(name).name
    except UnknownModelError:
        return name.casefold()
