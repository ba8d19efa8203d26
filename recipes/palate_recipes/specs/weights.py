"""The base model of a run and the source of its weights, as in manifests. Knows no catalog and downloads nothing."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from palate_recipes.specs.codec import Natural


class WeightsSource(Struct, frozen=True, kw_only=True):
    """The source of weights.

    Attributes:
        kind: `folder` (a local path), `store` (an object-store URI), `hub` (Hugging Face), or `package` (a Python package).
        location: Path, URI, hub id, or package name.
        revision: Version of a package, hub revision, or "" for the latest.
        size_bytes: Size of the weights in bytes, or 0 if unknown.
        parameters: Number of weights of a hub model; unset if unknown.
    """

    kind: Literal["folder", "store", "hub", "package"]
    location: str
    revision: str = ""
    size_bytes: Natural = 0
    parameters: Natural | UnsetType = UNSET


class BaseModel(Struct, frozen=True, kw_only=True):
    """The base model that is trained or served.

    Attributes:
        name: Display name: from the catalog, or the user's own.
        source: Source of the weights.
        hub_id: Hub id, or None for a model that is not on the Hub.
    """

    name: str
    source: WeightsSource
    hub_id: str | None = None
