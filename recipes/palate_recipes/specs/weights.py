"""Where a base model comes from, as manifests name it. Knows no catalog and fetches nothing."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from palate_recipes.specs.codec import Natural


class WeightsSource(Struct, frozen=True, kw_only=True):
    """Where weights come from.

    Attributes:
        kind: `folder` (a local path), `store` (an object-store URI), `hub` (Hugging Face), or `package` (a Python package).
        location: Path, URI, hub id, or package name.
        revision: Version of a package, hub revision, or "" for the newest.
        size_bytes: Bytes of weights where they can be known now, else 0.
    """

    kind: Literal["folder", "store", "hub", "package"]
    location: str
    revision: str = ""
    size_bytes: Natural = 0


class BaseModel(Struct, frozen=True, kw_only=True):
    """The model that is trained, or served.

    Attributes:
        name: For people: of the catalog, or the user's own.
        source: Its weights.
        hub_id: Of the catalog's model, or None.
    """

    name: str
    source: WeightsSource
    hub_id: str | None = None
