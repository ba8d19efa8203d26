"""The tokens that a service accepts, and their limits: in the service's record, and in the file that its gateway reads.

The owner's token is a separate private object of the record, because clients read it there. Of a named token only the SHA-256
is kept: its value is shown once, and a copy of the store contains none. The hash has no salt. The tokens are random, 256 bits
long, so there is no dictionary to precompute; and a salt per token would cost one hash per token and request.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, ClassVar

from msgspec import Meta, Struct

from palate_recipes.specs.codec import File, Int, Sha256, whole

ACCESS_FILE = "access.json"
"""In the work folder of a service. The runner replaces it when the record changes; the gateway reads it again."""

OWNER = "default"
"""Name of the owner's token."""

ACCESS_SCHEMA = 1
TOKENS_LIMIT = 64
"""Maximum number of named tokens of a service."""
ACCESS_LIMIT_BYTES = 64 * 1024
OWNER_TOKEN = r"[!-~]{1,1000}"
"""Regular expression of the owner's token: characters that are valid in a header."""

RATE_LIMIT = 60_000
CONCURRENCY_LIMIT = 1024

TokenName = Annotated[str, whole("[A-Za-z0-9][A-Za-z0-9._-]{0,99}")]


class AccessToken(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A token without its value.

    Attributes:
        name: Its name.
        digest: See `token_digest`.
        created_at: Seconds since the epoch, by the clock of the client that made it.
        rate_per_minute: Maximum number of requests within 60 seconds; None: no limit.
        concurrency: Maximum number of open requests; None: no limit.
    """

    name: TokenName
    digest: Sha256
    created_at: float
    rate_per_minute: Annotated[int, Meta(ge=1, le=RATE_LIMIT)] | None = None
    concurrency: Annotated[int, Meta(ge=1, le=CONCURRENCY_LIMIT)] | None = None


class Access(Struct, frozen=True, kw_only=True):
    """The content of a record's `access_tokens.json`.

    Attributes:
        tokens: The named tokens. One with the owner's name is the next token of the owner, while it is replaced, and after that
            the current one.
    """

    tokens: Annotated[tuple[AccessToken, ...], Meta(max_length=TOKENS_LIMIT + 1)] = ()
    schema: Int = ACCESS_SCHEMA


class GatewayAccess(File, frozen=True, kw_only=True):
    """The content of `access.json` in the work folder. Only this user can read it.

    Attributes:
        owner: The owner's token.
        tokens: As in `Access`.
    """

    MODE: ClassVar[int] = 0o600

    owner: Annotated[str, whole(OWNER_TOKEN)]
    tokens: Annotated[tuple[AccessToken, ...], Meta(max_length=TOKENS_LIMIT + 1)] = ()


def token_digest(token: bytes) -> str:
    """Returns the SHA-256 of a token. It is also the key of the proof for named tokens (see `specs.serve.token_proof`)."""
    return hashlib.sha256(b"palate token: " + token).hexdigest()
