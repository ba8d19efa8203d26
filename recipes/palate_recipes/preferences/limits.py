"""How large a row may be, and what a packed file may unpack to: memory stays bounded whatever a file holds.

Knows sizes, no format.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from palate_recipes.errors import DataError

ROW_VARIABLE = "PALATE_MAX_ROW_MIB"
UNPACKED_VARIABLE = "PALATE_MAX_UNPACKED_MIB"

MIB = 1 << 20
_ROW_MIB = 8
"""A row of a million tokens has about 4 MiB. Parsed, JSON takes up to 25 times its bytes (`[[],[],…`)."""
BLOCK_BYTES = MIB // 4
"""Of rows that are given at once; some hundred usual ones."""

_BLOCK_ROWS = 256
_UNPACKED_MIB = 256
_UNPACKED_RATIO = 100
"""Text packs to a third or a tenth. Only a file of repetitions passes this."""


Rows = Iterator[tuple[int, Any]]
"""Number and value of each row."""


class Meter:
    """Counts the bytes of the rows that a reader has given.

    Attributes:
        held: Since the last block.
    """

    held = 0


def in_blocks(rows: Rows, meter: Meter) -> Iterator[list[tuple[int, Any]]]:
    """Yields rows in lists: some hundred small ones, few large ones, so that a list is no larger than the largest row by much."""
    block: list[tuple[int, Any]] = []
    for row in rows:
        block.append(row)
        if len(block) >= _BLOCK_ROWS or meter.held >= BLOCK_BYTES:
            yield block
            block, meter.held = [], 0
    if block:
        yield block


class RowTooLarge(Exception):
    """A row is larger than the limit; whoever knows the file turns it into a DataError.

    Args:
        where: Such as `line 3`.
        hint: What else it may be, a sentence.
    """

    def __init__(self, where: str, hint: str = "") -> None:
        super().__init__(where)
        self.where, self.hint = where, hint

    def of(self, path: Path) -> DataError:
        """Returns the error for users."""
        limit = row_limit() // MIB
        return DataError(
            f"{path}, {self.where}: the row has more than {limit} MiB, the limit for one row. "
            f"{self.hint}Shorten or remove the row, or raise the limit: {ROW_VARIABLE}={4 * limit} in the environment."
        )


def row_limit() -> int:
    """Returns how many bytes a row may have; in text that is decoded already, characters.

    Raises:
        DataError: The variable that sets it is not a whole number from 1.
    """
    return (_setting(ROW_VARIABLE) or _ROW_MIB) * MIB


def unpacked_limit(packed: int) -> int:
    """Returns how many bytes a file may unpack to.

    Args:
        packed: Its own bytes.

    Raises:
        DataError: The variable that sets it is not a whole number from 1.
    """
    mib = _setting(UNPACKED_VARIABLE)
    return mib * MIB if mib else max(_UNPACKED_MIB * MIB, _UNPACKED_RATIO * packed)


def unpacks_too_far(path: Path, packed: int, met: int | None = None) -> DataError:
    """Returns the error for a file that unpacks to more than `unpacked_limit`.

    Args:
        path: Of the file.
        packed: Its own bytes.
        met: What it unpacks to, where that is known before.
    """
    limit = unpacked_limit(packed)
    rule = (
        f"set by {UNPACKED_VARIABLE}"
        if _setting(UNPACKED_VARIABLE)
        else f"the larger of {_UNPACKED_MIB} MiB and {_UNPACKED_RATIO} times the file's own size"
    )
    found = f"{met / MIB:,.0f} MiB" if met else f"more than {limit / MIB:,.0f} MiB"
    return DataError(
        f"{path} has {packed:,} bytes and unpacks to {found}. The limit is {limit / MIB:,.0f} MiB, {rule}. "
        f"If you trust the file, raise the limit: {UNPACKED_VARIABLE}={-(-4 * max(met or 0, limit) // MIB)} in the environment."
    )


class Unpacked(io.RawIOBase):
    """The bytes of a packed file, up to the limit; reading beyond it raises DataError.

    Args:
        stream: Unpacks; needs `readinto`.
        path: Of the file.
    """

    def __init__(self, stream: Any, path: Path) -> None:
        self._stream, self._path = stream, path
        self._packed = path.stat().st_size
        self._left = unpacked_limit(self._packed)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise unpacks_too_far(self._path, self._packed)
        return count


def _setting(name: str) -> int:
    """The variable's value, 0 when it is not set."""
    text = os.environ.get(name, "").strip()
    if text and not (text.isascii() and text.isdigit() and len(text) < 9 and int(text)):
        raise DataError(f"{name}={text[:40]!r} must be a whole number from 1 to 99999999: mebibytes")
    return int(text or 0)
