"""Size limits of rows and of compressed files, so that memory is bounded for any file. Knows sizes, no format."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from palate_recipes.errors import DataError

ROW_VARIABLE = "PALATE_MAX_ROW_MIB"
UNPACKED_VARIABLE = "PALATE_MAX_UNPACKED_MIB"

PACKED_ROWS_VARIABLE = "PALATE_MAX_PACKED_ROWS"

MIB = 1 << 20
_PACKED_ROWS = 1_000_000
_BYTES_A_ROW = 16
"""A row of text takes more than this when compressed; only a file made to keep its reader busy has more rows."""
_ROW_MIB = 8
"""Default limit of a row. A row of a million tokens has about 4 MiB. Parsed JSON takes up to 25 times its bytes (`[[],[],…`)."""
BLOCK_BYTES = MIB // 4
"""Size of a block of rows: some hundred rows of usual size."""

_BLOCK_ROWS = 256
_UNPACKED_MIB = 256
_UNPACKED_RATIO = 100
"""Text compresses to between a third and a tenth. Only highly repetitive files exceed this ratio."""


Rows = Iterator[tuple[int, Any]]
"""Number and value of each row."""


class Meter:
    """Counts the bytes that a reader has returned.

    Attributes:
        held: Bytes since the last block.
    """

    held = 0


def in_blocks(rows: Rows, meter: Meter) -> Iterator[list[tuple[int, Any]]]:
    """Yields rows in lists of bounded size: hundreds of small rows, or few large ones."""
    block: list[tuple[int, Any]] = []
    for row in rows:
        block.append(row)
        if len(block) >= _BLOCK_ROWS or meter.held >= BLOCK_BYTES:
            yield block
            block, meter.held = [], 0
    if block:
        yield block


class RowTooLarge(Exception):
    """A row is larger than the limit. The caller that knows the file converts it to a DataError.

    Args:
        where: Place, such as `line 3`.
        hint: Another possible cause, one sentence.
    """

    def __init__(self, where: str, hint: str = "") -> None:
        super().__init__(where)
        self.where, self.hint = where, hint

    def of(self, path: Path) -> DataError:
        """Returns the DataError."""
        limit = row_limit() // MIB
        return DataError(
            f"{path}, {self.where}: the row is larger than the limit of {limit} MiB. "
            f"{self.hint}Shorten or remove the row, or raise the limit: {ROW_VARIABLE}={4 * limit} in the environment."
        )


def row_limit() -> int:
    """Returns the limit of a row in bytes (in characters for decoded text).

    Raises:
        DataError: Its environment variable is not a positive whole number.
    """
    return (_setting(ROW_VARIABLE) or _ROW_MIB) * MIB


def unpacked_limit(packed: int) -> int:
    """Returns the limit of a file's uncompressed size in bytes.

    Args:
        packed: Compressed size in bytes.

    Raises:
        DataError: Its environment variable is not a positive whole number.
    """
    mib = _setting(UNPACKED_VARIABLE)
    return mib * MIB if mib else max(_UNPACKED_MIB * MIB, _UNPACKED_RATIO * packed)


def check_packed_rows(path: Path, rows: int) -> None:
    """Raises DataError if a compressed file has more rows (or lines) than its size explains: each takes time, also empty ones."""
    packed = path.stat().st_size
    limit = _setting(PACKED_ROWS_VARIABLE, "rows") or max(_PACKED_ROWS, packed // _BYTES_A_ROW)
    if rows > limit:
        raise DataError(
            f"{path} has {packed:,} bytes and more than {limit:,} rows, the limit for compressed files of this size. "
            f"If you trust the file, raise the limit: {PACKED_ROWS_VARIABLE}={4 * limit} in the environment."
        )


def unpacks_too_far(path: Path, packed: int, met: int | None = None) -> DataError:
    """Returns the error for a file whose uncompressed size exceeds `unpacked_limit`.

    Args:
        path: The file.
        packed: Compressed size in bytes.
        met: Uncompressed size, if known in advance.
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
    """The uncompressed bytes of a file. Reading beyond the limit raises DataError.

    Args:
        stream: Decompressing stream with `readinto`.
        path: The file.
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


def _setting(name: str, unit: str = "MiB") -> int:
    """The variable's value; 0 if it is not set."""
    text = os.environ.get(name, "").strip()
    if text and not (text.isascii() and text.isdigit() and len(text) < 9 and int(text)):
        raise DataError(f"{name}={text[:40]!r}: expected a whole number of {unit} from 1 to 99999999")
    return int(text or 0)
