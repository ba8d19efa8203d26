"""Brings a service's tokens from its record to its gateway while the service runs. Knows the record and a file, no gateway.

The gateway and the store never meet: the server program works with files only and gets no credentials. So the runner polls, in a
thread of its own, because a slow store must not delay the heartbeat. Runner and program share the work folder on every backend.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from palate.runs.access import owner_token, read_access
from palate.runs.record import Record
from palate_recipes.specs.access import GatewayAccess

POLL_S = 2.0


class AccessFile:
    """Keeps the gateway's file equal to the record's tokens. A context manager.

    While the store cannot be reached or the record is damaged, the tokens stay as they are.

    Args:
        record: The service, without retries.
        path: The file.
        say: Writes a line to the service's log.
    """

    def __init__(self, record: Record, path: Path, say: Callable[[str], None]) -> None:
        self._record = record
        self._path = path
        self._say = say
        self._written: GatewayAccess | None = None
        self._failing = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def update(self) -> GatewayAccess:
        """Reads the record, and writes the file if the tokens have changed.

        Raises:
            StoreError: The record cannot be read.
            DamagedFilesError: The record's tokens are damaged.
        """
        access = GatewayAccess(owner=owner_token(self._record), tokens=read_access(self._record).tokens)
        if access != self._written:
            access.write(self._path)
            self._written = access
        return access

    def __enter__(self) -> AccessFile:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._ended.wait(POLL_S):
            try:
                self.update()
            except Exception as error:  # whatever it is, a later try may succeed, and the service must go on
                if not self._failing:
                    self._say(f"note: the tokens stay as they are, because the record cannot be used: {error}")
                self._failing = True
            else:
                self._failing = False
