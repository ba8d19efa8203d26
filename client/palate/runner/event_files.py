"""Uploads TensorBoard's event files while a program writes them. Knows a folder and the record, no training."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from palate.runs.record import Record
from palate_recipes.errors import StoreError

_EVERY_S = 10.0
_SHARE = 0.05
"""Maximum share of the time that is spent on uploads: a store has no appending, so a file is uploaded anew when it has grown."""

_LARGEST_BYTES = 32 * 1024**2
"""Larger files are uploaded when the program has ended."""


class EventFilePusher:
    """Uploads event files that have grown, every ten seconds or less often. A context manager; its exit waits for an upload.

    An upload that fails is not repeated: the next one replaces it, and the runner uploads the whole folder at the end.

    Args:
        record: The run, without retries.
        folder: Where the program writes.
        name: Folder in the record.
        every_s: Seconds between two uploads.
    """

    def __init__(self, record: Record, folder: Path, name: str, *, every_s: float = _EVERY_S) -> None:
        self._record, self._folder, self._name, self._every_s = record, folder, name, every_s
        self._sizes = self._present()  # those of earlier attempts are in the store
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="palate-event-files")
        self._upload: Future[None] | None = None
        self._next = 0.0

    def __enter__(self) -> EventFilePusher:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True)

    def look(self) -> None:
        """Starts to upload what has grown, if it is time. Returns at once."""
        if time.monotonic() < self._next or not (self._upload is None or self._upload.done()):
            return
        self._next = time.monotonic() + self._every_s
        grown = {path: size for path, size in self._present().items() if size != self._sizes.get(path)}
        if grown:
            self._sizes |= grown
            self._upload = self._pool.submit(self._push, list(grown))

    def _present(self) -> dict[Path, int]:
        found = {}
        for path in self._folder.rglob("*"):
            size = path.stat().st_size if path.is_file() else 0
            if 0 < size <= _LARGEST_BYTES:
                found[path] = size
        return found

    def _push(self, paths: list[Path]) -> None:
        begun = time.monotonic()
        for path in paths:
            try:
                # As bytes: the file may grow meanwhile. Readers wait for the rest of an event that is cut off.
                data = path.read_bytes()
                self._record.store.put(self._record.key(self._name, path.relative_to(self._folder).as_posix()), data)
            except (StoreError, OSError):
                self._sizes.pop(path, None)
        self._next = max(self._next, time.monotonic() + (time.monotonic() - begun) / _SHARE)
