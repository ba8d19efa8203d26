"""A store that may be away for a while: what is asked of it is asked again until it is back. Knows store errors, no run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from palate.store import Store
from palate_recipes.errors import (
    ObjectNotFoundError,
    PreconditionFailedError,
    StoreError,
    StoreUnreachableError,
    StoreUsageError,
)

T = TypeVar("T")

UNREACHABLE_LIMIT_S = 6 * 3600.0
"""A finished training is worth waiting for its store; after a night without one somebody has to look."""

OTHER_LIMIT_S = 30.0
"""For a full disk or a refusal, which rarely heals by itself, but does while a server starts."""

_LONGEST_PAUSE_S = 10.0
_ANSWERS = (ObjectNotFoundError, PreconditionFailedError, StoreUsageError)
"""What a store says, not that it fails."""

_METHODS = frozenset({"get", "put", "stat", "delete", "upload", "upload_tree", "download", "download_tree"})


class StoreRetry:
    """Repeats what fails for the store's sake.

    Args:
        say: Takes one line for the log when the store goes, and one when it is back.
        give_up: Says that waiting is no longer wanted: the failure is then raised at once.
    """

    def __init__(self, say: Callable[[str], None], give_up: Callable[[], bool]) -> None:
        self._say = say
        self._give_up = give_up

    def __call__(self, act: Callable[[], T]) -> T:
        """Returns what `act` returns.

        Raises:
            StoreError: It failed for too long, with the last cause, or waiting was given up.
        """
        begun = time.monotonic()
        pause_s = 0.5
        failed = False
        while True:
            try:
                result = act()
            except _ANSWERS:
                raise
            except StoreError as error:
                limit_s = UNREACHABLE_LIMIT_S if isinstance(error, StoreUnreachableError) else OTHER_LIMIT_S
                if self._give_up() or time.monotonic() - begun >= limit_s:
                    raise
                if not failed:
                    self._say(f"note: the store fails, trying again for up to {limit_s:.0f} s: {error}")
                failed = True
            else:
                if failed:
                    self._say(f"note: the store is back after {time.monotonic() - begun:.0f} s")
                return result
            until = time.monotonic() + random.uniform(0.5, 1.0) * pause_s
            while time.monotonic() < until and not self._give_up():
                time.sleep(0.1)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def store(self, store: Store) -> Store:
        """Returns the same store, each request of which is repeated so; listings are not."""
        return cast(Store, _RetryingStore(store, self))


class _RetryingStore:
    def __init__(self, store: Store, retry: StoreRetry) -> None:
        self._store = store
        self._retry = retry

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in _METHODS:
            return found
        return lambda *args, **kwargs: self._retry(lambda: found(*args, **kwargs))
