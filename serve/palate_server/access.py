"""Who may send requests, and how many: the service's tokens and their limits. Knows the runner's file, no HTTP and no engine.

The runner replaces `access.json` in the work folder when the record's tokens change. The file is checked for a change at most
twice a second, with one `stat`, and only while there are requests. Without the file (a server program that no runner started)
there is one token, from the environment.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palate_recipes.specs.access import ACCESS_LIMIT_BYTES, OWNER, AccessToken, GatewayAccess, token_digest
from palate_recipes.specs.serve import BODY_LIMIT_BYTES, token_proof

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
WINDOW_S = 60.0
RETRY_S = 1
"""When a request ends is unknown, so a client that has to wait for that is told to try again soon."""
READS_PER_MINUTE = 600
"""Limit of a named token's requests without a body. Ten a second are more than any monitoring needs."""
BODIES_SHARE_BYTES = 2 * BODY_LIMIT_BYTES
"""Limit of the bodies of a named token's open requests: a quarter of what all may have, so that no token can starve the others."""


@dataclass
class _Usage:
    """What one name uses. It is kept when the token is rotated or its limits change."""

    open: int = 0
    held_bytes: int = 0
    begun: deque[float] = field(default_factory=deque)
    read: deque[float] = field(default_factory=deque)


@dataclass(frozen=True, kw_only=True)
class TooMany:
    """Why a request is over its token's limits, and after how many seconds another try makes sense."""

    message: str
    retry_after_s: int


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who sent a request: a token's name, with its limits. The caller of a successful `enter` must call `leave` once."""

    name: str
    rate_per_minute: int | None = None
    concurrency: int | None = None
    reads_per_minute: int | None = None
    bodies_bytes: int | None = None
    usage: _Usage = field(default_factory=_Usage)
    is_program: bool = False
    """Whether this is the server program itself."""

    def read(self) -> TooMany | None:
        """Counts a request without a body, or returns why it is refused."""
        what = "requests without a body per minute"
        return self._within_rate(self.usage.read, self.reads_per_minute, what, time.monotonic())

    def hold(self, size: int) -> TooMany | None:
        """Adds to the bytes that bodies hold, also beyond the limit: then returns why the request is refused."""
        self.usage.held_bytes += size
        if self.bodies_bytes is None or self.usage.held_bytes <= self.bodies_bytes:
            return None
        message = f"The bodies of token {self.name}'s open requests exceed {self.bodies_bytes} bytes."
        return TooMany(message=f"{message} Wait for an answer first.", retry_after_s=RETRY_S)

    def enter(self) -> TooMany | None:
        """Counts a request as open, or returns why it is refused. A refused request does not count."""
        usage, now = self.usage, time.monotonic()
        if self.concurrency is not None and usage.open >= self.concurrency:
            message = f"Token {self.name} has {usage.open} open requests; its limit is {self.concurrency}."
            return TooMany(message=f"{message} Wait for an answer first.", retry_after_s=RETRY_S)
        too_many = self._within_rate(usage.begun, self.rate_per_minute, "requests per minute", now)
        if too_many is None:
            usage.open += 1
        return too_many

    def _within_rate(self, begun: deque[float], limit: int | None, what: str, now: float) -> TooMany | None:
        if limit is None:
            return None
        while begun and begun[0] <= now - WINDOW_S:
            begun.popleft()
        if len(begun) >= limit:
            # The limit may have become smaller: then more than the oldest request must leave the window.
            wait_s = max(1, math.ceil(begun[len(begun) - limit] + WINDOW_S - now))
            message = f"Token {self.name} has reached its limit of {limit} {what}."
            return TooMany(message=f"{message} Try again in {wait_s} s.", retry_after_s=wait_s)
        begun.append(now)
        return None

    def leave(self) -> None:
        """Reports that the request has ended."""
        self.usage.open -= 1


class Access:
    """The tokens of a service."""

    def __init__(self, path: Path, *, owner: str, probe: str | None = None) -> None:
        """Reads the tokens.

        Args:
            path: The runner's file, which need not exist.
            owner: The owner's token, if there is no such file.
            probe: The token of the server program's own requests, which have no limits.

        Raises:
            ValueError: The file is damaged.
        """
        self._path = path
        self._probe = probe
        self._usage: dict[str, _Usage] = {}
        self._seen: tuple[int, int, int] | None = None
        self._look_at = 0.0
        if path.exists():
            self._seen = _mark(path)
            self._set(_read(path))
        else:
            self._set(owner)

    def holder(self, given: bytes) -> Holder | None:
        """Returns whose token this is; None if the service does not accept it."""
        self._look()
        digest = token_digest(given)
        found = None
        # Hashes in constant time, and all of them: response times reveal neither a part of a token nor which one it is.
        for known, holder in self._known:
            if secrets.compare_digest(digest, known):
                found = holder
        return found

    def proofs(self, challenge: str, *, port: int) -> dict[str, Any]:
        """Returns the proofs that the service knows its tokens: `proof` for the owner's, `proofs` for the named ones."""
        self._look()
        named = [token_proof(token.digest.encode(), challenge, port=port) for token in self._named]
        return {
            "proof": token_proof(self._owner.encode(), challenge, port=port),
            **({"proofs": named} if named else {}),
        }

    def _look(self) -> None:
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY_S
        try:
            mark = _mark(self._path)
            if mark == self._seen:
                return
            access = _read(self._path)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            logger.error("the tokens stay as they are: %s", error)
            return
        self._seen = mark  # from before the read: a later change is noticed
        self._set(access)

    def _set(self, access: GatewayAccess | str) -> None:
        if isinstance(access, str):
            self._owner, self._named = access, tuple[AccessToken, ...]()
        else:
            self._owner, self._named = access.owner, access.tokens
        names = {OWNER, *(token.name for token in self._named)}
        self._usage = {name: self._usage.get(name) or _Usage() for name in names}
        self._known = [
            (token_digest(self._owner.encode()), Holder(name=OWNER, usage=self._usage[OWNER])),
            *(
                (
                    token.digest,
                    Holder(
                        name=token.name,
                        rate_per_minute=token.rate_per_minute,
                        concurrency=token.concurrency,
                        # One with the owner's name is the owner's next token, which has no limits either.
                        reads_per_minute=None if token.name == OWNER else READS_PER_MINUTE,
                        bodies_bytes=None if token.name == OWNER else BODIES_SHARE_BYTES,
                        usage=self._usage[token.name],
                    ),
                )
                for token in self._named
            ),
        ]
        if self._probe:
            self._known.append((token_digest(self._probe.encode()), Holder(name="the server program", is_program=True)))


def _mark(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_ino, found.st_size


def _read(path: Path) -> GatewayAccess:
    if path.stat().st_size > ACCESS_LIMIT_BYTES:
        raise ValueError(f"{path} has more than {ACCESS_LIMIT_BYTES} bytes")
    try:
        return GatewayAccess.read(path)
    except ValueError as error:
        raise ValueError(f"{path} has no valid tokens: {error}") from None


async def drained(receive: Callable[[], Awaitable[MutableMapping[str, Any]]]) -> bool:
    """Reads a refused request's body and drops it, so that the connection stays usable. Returns False if it is not."""
    size = 0
    while size <= BODY_LIMIT_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return False
        size += len(message.get("body", b""))
        if not message.get("more_body", False):
            return True
    return False
