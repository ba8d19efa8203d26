"""The versions of a service: the update that is asked for, and the history. Two records of a service. Knows no store.

`update.json` is the update that was asked for last. At most one is open; the next one replaces it once it has ended.
`versions/<number>.json` is one version. The manifest decides which version is current; these say what became of the others.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from palate_recipes.specs.codec import Int, typed
from palate_recipes.specs.run import Deployment, encode_deployed, parse_deployed

UPDATE_SCHEMA = 1
VERSION_SCHEMA = 1

Share = Annotated[float, Meta(ge=0.0, le=1.0)]

Outcome = Literal["asked", "current", "replaced", "failed", "cancelled"]
"""What became of a version: not decided yet; it became the current one; another one replaced it; it did not start or answered
differently; it was withdrawn before it was current."""


class Update(Struct, frozen=True, kw_only=True):
    """An update of a service: the content of `update.json`.

    Attributes:
        id: Random name. Two updates never have the same one.
        body: What the new version serves, with the version's number.
        labels: Labels of the service with this version.
        share: Share of the requests for the tuned model that the new version answers until it is promoted.
        promote: Whether it replaces the current version as soon as it is ready. If not, both answer until somebody decides.
        cancelled: Somebody has withdrawn it. The service's runner stops the new version.
        ended: Nothing more happens with it.
        asked_at: Seconds since the epoch, by the clock of the client that asked.
    """

    id: str
    body: Deployment
    labels: dict[str, str] = {}
    share: Share = 0.0
    promote: bool = True
    cancelled: bool = False
    ended: bool = False
    asked_at: float
    schema: Int = UPDATE_SCHEMA

    def encode(self) -> bytes:
        return encode_deployed(self)

    @classmethod
    def decode(cls, data: bytes) -> Update:
        """Raises ValueError if a required field is missing or a field has the wrong type."""
        return typed(parse_deployed(data), cls)


class Version(Struct, frozen=True, kw_only=True):
    """A version of a service: the content of `versions/<number>.json`.

    Attributes:
        body: What it serves, with its number.
        labels: Labels of the service with this version.
        outcome: What became of it.
        reason: Why it failed or was withdrawn.
        table: The rows in which it differed from the trained model, if that is why it failed.
        asked_at: When it was asked for, in seconds since the epoch.
        changed_at: When its outcome was written.
    """

    body: Deployment
    labels: dict[str, str] = {}
    outcome: Outcome
    reason: str = ""
    table: str = ""
    asked_at: float
    changed_at: float
    schema: Int = VERSION_SCHEMA

    @property
    def number(self) -> int:
        return self.body.version

    def encode(self) -> bytes:
        return encode_deployed(self)

    @classmethod
    def decode(cls, data: bytes) -> Version:
        """Raises ValueError if a required field is missing or a field has the wrong type."""
        return typed(parse_deployed(data), cls)


def version_name(number: int) -> str:
    """Returns the name of a version, such as `v2`."""
    return f"v{number}"
