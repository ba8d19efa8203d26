"""Brings a service's tokens from its record to its gateway while the service runs. Knows the record and a file, no gateway.

The gateway and the store never meet. Runner and program share the work folder on every backend.
"""

from __future__ import annotations

from pathlib import Path

from palate.runs.access import owner_token, read_access
from palate.runs.record import Record
from palate_recipes.specs.access import GatewayAccess


class AccessFile:
    """Keeps the gateway's file equal to the record's tokens.

    While the store cannot be reached or the record is damaged, the tokens stay as they are.

    Args:
        record: The service, without retries.
        path: The file.
    """

    def __init__(self, record: Record, path: Path) -> None:
        self._record = record
        self._path = path
        self._written: GatewayAccess | None = None

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
