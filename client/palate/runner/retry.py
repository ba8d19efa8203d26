"""Retries store requests while the store is unreachable. Knows store errors, no run."""

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
"""A finished training is worth a long wait. After six hours somebody must look."""

OTHER_LIMIT_S = 30.0
"""For a full disk or a rejected request, which rarely go away, but do while a store server starts."""

_LONGEST_PAUSE_S = 10.0
_ANSWERS = (ObjectNotFoundError, PreconditionFailedError, StoreUsageError)
"""Answers of a working store, which are not retried."""

_METHODS = frozenset({"get", "put", "stat", "delete", "upload", "upload_tree", "download", "download_tree"})


class StoreRetry:
    """Repeats operations that fail because of the store.

    Args:
        say: Called with a log line when the store fails and when it is back.
        give_up: Returns True to stop retrying and raise the error at once.

    Attributes:
        give_up: As given. True also means that nobody waits for the result any more.
    """

    def __init__(self, say: Callable[[str], None], give_up: Callable[[], bool]) -> None:
        self._say = say
        self.give_up = give_up

    def __call__(self, act: Callable[[], T]) -> T:
        """Calls `act` until it succeeds, and returns its result.

        Raises:
            StoreError: The last error, after the time limit or when `give_up` returns True.
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
                if self.give_up() or time.monotonic() - begun >= limit_s:
                    raise
                if not failed:
                    self._say(f"note: the store fails, trying again for up to {limit_s:.0f} s: {error}")
                failed = True
            else:
                if failed:
                    self._say(f"note: the store is back after {time.monotonic() - begun:.0f} s")
                return result
            until = time.monotonic() + random.uniform(0.5, 1.0) * pause_s
            while time.monotonic() < until and not self.give_up():
                time.sleep(0.1)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def store(self, store: Store) -> Store:
        """Returns a store whose requests are retried like this, except listings."""
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
