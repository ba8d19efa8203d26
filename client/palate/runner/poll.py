"""Follows changes of a service's record while it runs. Knows when to look, not what to look at.

The server program works with files only and gets no credentials for the store. So its runner polls the record, in a thread of its
own, because a slow store must not delay the heartbeat or the program's deadline.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

POLL_S = 2.0


class RecordPoll:
    """Calls each part every two seconds, all of them in one thread. A context manager.

    A part reads its object of the record and applies what has changed. It must be quick, since it delays the parts after it. What
    it raises concerns that part alone: it is called again, since the store may come back, and a damaged record may be restored.

    Args:
        parts: By the name of what a part follows, such as `tokens`.
        say: Writes a line to the service's log.
    """

    def __init__(self, parts: Mapping[str, Callable[[], object]], say: Callable[[str], None]) -> None:
        self._parts = parts
        self._say = say
        self._failing: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> RecordPoll:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._ended.wait(POLL_S):
            for what, follow in self._parts.items():
                self._call(what, follow)

    def _call(self, what: str, follow: Callable[[], object]) -> None:
        try:
            follow()
        except Exception as error:  # whatever it is, a later try may succeed, and the service must go on
            if what not in self._failing:
                self._say(f"note: changes of the {what} wait, because the record cannot be used: {error}")
            self._failing.add(what)
        else:
            self._failing.discard(what)
