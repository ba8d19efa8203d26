"""The adapters that a service serves beside its own model, as its record has them. Knows names and limits, no files.

Runner and server program agree on them in `palate_recipes.specs.fleet`.
"""

from __future__ import annotations

import re
from typing import Annotated

from msgspec import Meta, Struct

from palate_recipes.specs.codec import Int, Sha256
from palate_recipes.specs.fleet import ADAPTERS_LIMIT, AdapterName
from palate_recipes.specs.serve import BASE_MODEL, TUNED_MODEL

ADAPTERS_SCHEMA = 1
ADAPTERS_LIMIT_BYTES = 4 * 1024**2
"""Maximum size of a record's `adapters.json`."""

RANK_LIMIT = 65_536
"""Beyond every engine's limit. An engine's own depends on how it was started."""

_URI_LIMIT = 2048
_VERSION = re.compile(r"v[0-9]+")


class ServedAdapter(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An adapter of a service.

    Attributes:
        name: The model name in requests.
        uri: Folder with its files.
        digest: SHA-256 of the folder's digests.json, which has the SHA-256 of every file.
        rank: Its largest LoRA rank.
        job: Id of the job that trained it; "" if it was given as a folder.
        added_at: Seconds since the epoch, by the clock of the client that added it.
    """

    name: AdapterName
    uri: Annotated[str, Meta(min_length=1, max_length=_URI_LIMIT)]
    digest: Sha256
    rank: Annotated[int, Meta(ge=1, le=RANK_LIMIT)]
    job: Annotated[str, Meta(max_length=100)] = ""
    added_at: float


class Adapters(Struct, frozen=True, kw_only=True):
    """The content of a record's `adapters.json`.

    Attributes:
        adapters: In the order in which they were added. Names are unique.
    """

    adapters: Annotated[tuple[ServedAdapter, ...], Meta(max_length=ADAPTERS_LIMIT)] = ()
    schema: Int = ADAPTERS_SCHEMA


def reserved(name: str, service_name: str) -> str:
    """Returns whose model name it is, or "" if an adapter may have it."""
    if name in (TUNED_MODEL, service_name):
        return "the tuned model's"
    if name == BASE_MODEL:
        return "the base model's"
    if _VERSION.fullmatch(name):
        return "a version's"
    return ""
