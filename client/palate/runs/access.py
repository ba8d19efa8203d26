"""The tokens in a service's record: reads, adds, removes and replaces them. Knows the record, no gateway and no endpoint."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable

from msgspec import structs

from palate.common.utils import check_name
from palate.runs.record import NAMED_TOKENS_KEY, TOKEN_KEY, Record
from palate_recipes.errors import ConfigurationError, DamagedFilesError
from palate_recipes.specs.access import (
    ACCESS_LIMIT_BYTES,
    CONCURRENCY_LIMIT,
    OWNER,
    OWNER_TOKEN,
    RATE_LIMIT,
    TOKENS_LIMIT,
    Access,
    AccessToken,
    token_digest,
)
from palate_recipes.specs.codec import decode, encode

_OWNER_BYTES = 1000


def new_token() -> str:
    """Returns a random token of 256 bits."""
    return secrets.token_urlsafe(32)


def owner_token(record: Record) -> str:
    """Returns the owner's token. Raises DamagedFilesError if the stored one is not valid."""
    token = record.store.get_range(record.key(TOKEN_KEY), 0, _OWNER_BYTES + 1)
    if not re.fullmatch(OWNER_TOKEN.encode(), token):
        raise DamagedFilesError(
            f"{record.uri}/{TOKEN_KEY} is damaged: delete the service (`palate delete {record.name}`) and deploy again"
        )
    return token.decode()


def write_owner_token(record: Record, token: str) -> None:
    record.store.put(record.key(TOKEN_KEY), token.encode(), private=True)


def read_access(record: Record) -> Access:
    """Returns the named tokens. Raises DamagedFilesError if they cannot be read."""
    return _parse(record, record.listed(NAMED_TOKENS_KEY, limit_bytes=ACCESS_LIMIT_BYTES))


def forget_named_tokens(record: Record) -> None:
    """Removes all named tokens."""
    record.store.delete(record.key(NAMED_TOKENS_KEY))


def add(record: Record, name: str, *, rate_per_minute: int | None, concurrency: int | None) -> tuple[str, AccessToken]:
    """Adds a token. Returns its value, which is stored nowhere, and its entry.

    Raises:
        ConfigurationError: The name or a limit is invalid, the name is taken, or the service has too many tokens.
    """
    check_name("token name", name)
    for what, limit, most in (
        ("rate_per_minute", rate_per_minute, RATE_LIMIT),
        ("concurrency", concurrency, CONCURRENCY_LIMIT),
    ):
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= most):
            raise ConfigurationError(
                f"{what}={limit!r} is out of range: expected a whole number from 1 to {most}, or None for no limit"
            )
    if name == OWNER:
        raise ConfigurationError(f"token name {OWNER!r} is the owner's: choose another, or rotate that token")
    value = new_token()
    token = AccessToken(
        name=name,
        digest=token_digest(value.encode()),
        created_at=time.time(),
        rate_per_minute=rate_per_minute,
        concurrency=concurrency,
    )

    def change(tokens: tuple[AccessToken, ...]) -> tuple[AccessToken, ...]:
        named = [one.name for one in tokens if one.name != OWNER]
        if name in named:
            raise ConfigurationError(
                f"service {record.name} has a token {name!r} already: choose another name, rotate it or remove it"
            )
        if len(named) >= TOKENS_LIMIT:
            raise ConfigurationError(f"service {record.name} has {TOKENS_LIMIT} tokens, the maximum: remove one first")
        return (*tokens, token)

    _rewrite(record, change)
    return value, token


def remove(record: Record, name: str) -> AccessToken:
    """Removes a token and returns its entry. Raises ConfigurationError if there is none of this name."""
    if name == OWNER:
        raise ConfigurationError(f"token {OWNER!r} is the owner's and cannot be removed: rotate it")
    removed: list[AccessToken] = []

    def change(tokens: tuple[AccessToken, ...]) -> tuple[AccessToken, ...]:
        removed.append(_named(record, tokens, name))
        return tuple(one for one in tokens if one.name != name)

    _rewrite(record, change)
    return removed[-1]


def replace(record: Record, name: str) -> tuple[str, AccessToken]:
    """Gives a token a new value and keeps its limits. Returns the value and the entry.

    For the owner's token this only announces the next one: the service accepts both until `write_owner_token` is called.

    Raises:
        ConfigurationError: No token has this name.
    """
    value = new_token()
    made: list[AccessToken] = []

    def change(tokens: tuple[AccessToken, ...]) -> tuple[AccessToken, ...]:
        before = (
            next((one for one in tokens if one.name == OWNER), None) if name == OWNER else _named(record, tokens, name)
        )
        digest, now = token_digest(value.encode()), time.time()
        after = (
            structs.replace(before, digest=digest, created_at=now)
            if before is not None
            else AccessToken(name=name, digest=digest, created_at=now)
        )
        made.append(after)
        return (*(one for one in tokens if one.name != name), after)

    _rewrite(record, change)
    return value, made[-1]


def _named(record: Record, tokens: tuple[AccessToken, ...], name: str) -> AccessToken:
    found = next((one for one in tokens if one.name == name), None)
    if found is None:
        known = ", ".join([OWNER, *(one.name for one in tokens if one.name != OWNER)])
        raise ConfigurationError(f"service {record.name} has no token {name!r}. It has: {known}")
    return found


def _rewrite(record: Record, change: Callable[[tuple[AccessToken, ...]], tuple[AccessToken, ...]]) -> None:
    record.change_listed(
        NAMED_TOKENS_KEY,
        lambda data: encode(Access(tokens=change(_parse(record, data).tokens))),
        limit_bytes=ACCESS_LIMIT_BYTES,
        private=True,
    )


def _parse(record: Record, data: bytes) -> Access:
    try:
        if len(data) > ACCESS_LIMIT_BYTES:
            raise ValueError(f"it has more than {ACCESS_LIMIT_BYTES} bytes")
        access = decode(data, Access) if data else Access()
        if len({one.name for one in access.tokens}) < len(access.tokens):
            raise ValueError("two tokens have the same name")
    except ValueError as error:
        raise DamagedFilesError(
            f"{NAMED_TOKENS_KEY} of {record.name} is damaged ({error}): restore {record.uri}/{NAMED_TOKENS_KEY}, or delete that "
            "file, which removes all named tokens"
        ) from None
    return access
