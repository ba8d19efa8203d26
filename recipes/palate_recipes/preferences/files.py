"""Reads files to numbered raw rows: JSON arrays, JSON lines, CSV, Parquet and Arrow, plain or compressed. Knows no row format.

Memory is bounded by a block and a row (see `limits`), not by the file. An invalid line does not hide the others: it is returned
as a `Fault` in its place. An error that makes the rest unreadable is the last row.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal

import orjson

from palate_recipes.errors import DataError
from palate_recipes.preferences.json_array import JsonArray, advice, plain
from palate_recipes.preferences.limits import (
    BLOCK_BYTES,
    Meter,
    Rows,
    RowTooLarge,
    Unpacked,
    check_packed_rows,
    in_blocks,
    row_limit,
)
from palate_recipes.preferences.row import Fault
from palate_recipes.preferences.tables import DELIMITERS, TABLES, pyarrow
from palate_recipes.text import expand_path, show_path

Kind = Literal["json", "wrapped", "jsonl", "csv", "parquet", "arrow"]
Compression = Literal["", "gzip", "zstd"]

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
"""Suffixes of data files in folders and globs; each may be followed by .gz or .zst. The type is detected from the content."""

_BLOCK = 1 << 20
_DAMAGED = (OSError, EOFError, zlib.error)

_FOREIGN = (
    (b"PK\x03\x04", "a ZIP archive or an Excel workbook", "Unpack it, or save the sheet as CSV"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data itself", "Fetch it with `git lfs pull`"),
    (b"<", "HTML or XML, perhaps an error page of a server", "Download the file itself"),
    (b"BZh", "compressed with bzip2", "Decompress it, or use gzip or zstd"),
    (b"\xfd7zXZ", "compressed with xz", "Decompress it, or use gzip or zstd"),
    (b"%PDF", "a PDF", "Export the data as JSON lines or CSV"),
)
"""First bytes of common other file types, with description and remedy."""


@dataclass(frozen=True)
class Container:
    """A data file whose type was detected from its first bytes.

    Attributes:
        path: Path of the file.
        kind: Type of the content.
        compression: Compression; "" for none.
        byte_order_mark: Whether the text begins with one.
    """

    path: Path
    kind: Kind
    compression: Compression
    byte_order_mark: bool

    @property
    def unit(self) -> str:
        """Unit of row numbers: `line` for JSON lines, else `row`."""
        return "line" if self.kind == "jsonl" else "row"

    def raw_rows(self) -> Rows:
        """Yields number and value of each row. The value is a `Fault` if the row cannot be read.

        Raises:
            DataError: The file cannot be read at all.
        """
        return chain.from_iterable(self.raw_blocks())

    def raw_blocks(self) -> Iterator[list[tuple[int, Any]]]:
        """Yields the rows of `raw_rows` in lists of bounded size. Raises as `raw_rows`."""
        try:
            packed = bool(self.compression) or self.kind in ("parquet", "arrow")
            for block in _READERS[self.kind](self):
                if packed:
                    check_packed_rows(self.path, block[-1][0] if block else 0)
                yield block
        except _DAMAGED as error:
            raise _cannot_be_read(self.path, self.compression, error) from None
        except RowTooLarge as error:
            raise error.of(self.path) from None

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Opens the uncompressed bytes, after a byte-order mark."""
        with _unpacked(self.path, self.compression) as stream:
            if self.byte_order_mark:
                stream.read(len(codecs.BOM_UTF8))
            yield stream


def open_container(path: str | Path) -> Container:
    """Detects a file's type from its first bytes.

    Raises:
        DataError: The file does not exist, cannot be read, is empty, or has an unsupported type.
    """
    try:
        path = Path(expand_path(path))
    except ValueError as error:
        raise DataError(f"{show_path(path)} {error}.") from None
    if os.path.isdir(path):
        raise DataError(f"{path} is a folder, not a preference file. Give the .json or .jsonl file in it.")
    compression: Compression = ""
    try:
        with path.open("rb") as file:
            magic = file.read(8)
        compression = (
            "gzip" if magic.startswith(b"\x1f\x8b") else "zstd" if magic.startswith(b"\x28\xb5\x2f\xfd") else ""
        )
        with _unpacked(path, compression) as stream:
            start = stream.read(_BLOCK)
        kind = _kind(path, start)
        if kind == "jsonl" and _WRAPPER.match(start.removeprefix(codecs.BOM_UTF8)):
            with _unpacked(path, compression) as stream:
                kind = "wrapped" if _wrapped(stream.read(row_limit() + 1)) is not None else kind
    except FileNotFoundError:
        raise DataError(f"preference file {path} does not exist. Check the path.") from None
    except _DAMAGED as error:
        raise _cannot_be_read(path, compression, error) from None
    return Container(path, kind, compression, start.startswith(codecs.BOM_UTF8))


def _cannot_be_read(path: Path, compression: Compression, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or str(error).rstrip(".")
    if not compression or isinstance(error, PermissionError):
        return DataError(f"{path} cannot be read: {reason}. Check the file and its permissions.")
    return DataError(
        f"{path} cannot be read: {reason}. The {compression} data is damaged or truncated: copy the file again."
    )


def _kind(path: Path, start: bytes) -> Kind:
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\x00" in start[:4]:
        raise DataError(f"{path}: not UTF-8 but UTF-16 or binary. Save the file as UTF-8.")
    for beginning, what, remedy in _FOREIGN:
        if start.lstrip().startswith(beginning):
            raise DataError(f"{path} is {what}. {remedy}.")
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    if not text:
        raise DataError(f"{path} is empty. Expected a JSON array of objects, or one JSON object per line.")
    if text.startswith(b"["):
        return "json"
    stem = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    if not text.startswith(b"{") and (
        stem.endswith((".csv", ".tsv")) or (not stem.endswith(SUFFIXES) and _is_header(text))
    ):
        return "csv"
    return "jsonl"


def _is_header(text: bytes) -> bool:
    line = text.split(b"\n", 1)[0].decode("utf-8", "replace")
    cells = {cell.strip().strip('"').strip().lower() for cell in re.split(f"[{DELIMITERS}]", line)}
    return len(cells & {"prompt", "chosen", "rejected", "instruction", "messages", "question", "completion"}) > 1


@contextmanager
def _unpacked(path: Path, compression: Compression) -> Iterator[IO[bytes]]:
    if compression == "zstd":
        arrow = pyarrow()
        with arrow.input_stream(str(path), compression="zstd") as stream:
            yield io.BufferedReader(Unpacked(stream, path), _BLOCK)
    else:
        with path.open("rb") as file:
            yield io.BufferedReader(Unpacked(gzip.GzipFile(fileobj=file), path), _BLOCK) if compression else file


# JSON lines.


def _line_blocks(container: Container) -> Iterator[list[tuple[int, Any]]]:
    limit = row_limit()
    with container.open() as stream:
        lines = iter(partial(stream.readline, limit + 1), b"")
        block: list[tuple[int, Any]] = []
        held = 0
        for number, line in enumerate(lines, start=1):
            size = len(line)
            if size > limit:
                raise RowTooLarge(f"line {number}")
            try:
                block.append((number, orjson.loads(line)))
            except ValueError:
                if line.isspace():
                    if container.compression and not number % 65536:
                        check_packed_rows(container.path, number)
                else:
                    block.append((number, parse_line(line, number, container.path)))
            held += size
            if held > BLOCK_BYTES:  # `in_blocks`, inlined for speed: files can have millions of lines
                yield block
                block, held = [], 0
        if block:
            yield block


def parse_line(line: bytes, number: int, path: Path) -> Any:
    """Parses a line that the fast parser rejects. Returns its value, or the fault.

    Raises:
        DataError: The file is one object spread over several lines.
    """
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return Fault("not-utf8", "", f"not UTF-8, byte 0x{line[error.start]:02x} at position {error.start + 1}")
    try:
        return json.loads(text)  # accepts NaN and lone surrogates, which are checked later per field
    except (ValueError, RecursionError) as error:
        if number == 1 and _is_one_object(path):
            raise DataError(
                f"{path} is one JSON object, not a list of rows. Put the rows into a JSON array: [{{...}}, {{...}}]."
            ) from None
        if number == 1 and getattr(error, "pos", 1) == 0 and path.suffix not in ("", ".json", ".jsonl", ".ndjson"):
            raise DataError(
                f"{path} does not hold preference data: its first line is {text.strip()[:40]!r}, which is not JSON. "
                "`palate data formats` lists what a row can be"
            ) from None
        if isinstance(error, RecursionError):
            return Fault("broken-json", "", f"broken JSON at line {number}: nested too deeply")
        if not isinstance(error, json.JSONDecodeError):  # Python rejects integers with more than 4300 digits
            return Fault("broken-json", "", f"broken JSON at line {number}: a number with too many digits")
        what = f"broken JSON at line {number}, column {error.colno}: {plain(error.msg)}"
        hint = advice(error.msg, text[error.pos : error.pos + 8])
        if text.strip() in ("{", "[{"):
            hint = "Write each object on one line, or put the objects into an array."
        return Fault("broken-json", "", f"{what}. {hint}" if hint else what)


def _is_one_object(path: Path) -> bool:
    if path.stat().st_size > row_limit():
        return False
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (ValueError, RecursionError):
        return False


# An object around the rows.

_WRAPPER = re.compile(rb'\s*\{\s*"(?:data|rows|examples|instances|items|records|pairs)"\s*:\s*\[\s*\{')
"""Beginning of a file that may be one object around its rows; a row of JSON lines can begin like this, too."""


def _wrapped(text: bytes) -> list[Any] | None:
    """Returns the only list of objects in an object that is the whole file, or None."""
    try:
        whole = json.loads(text.removeprefix(codecs.BOM_UTF8)) if len(text) <= row_limit() else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(whole, dict):
        return None
    lists: list[list[Any]] = [value for value in whole.values() if _are_objects(value)]
    if len(lists) != 1 or whole.keys() & lists[0][0].keys():  # a row that has examples has the fields of a row itself
        return None
    return lists[0]


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _wrapped_blocks(container: Container) -> Iterator[list[tuple[int, Any]]]:
    with container.open() as stream:
        yield list(enumerate(_wrapped(stream.read(row_limit() + 1)) or (), start=1))


# A JSON array.


def _array_blocks(container: Container) -> Iterator[list[tuple[int, Any]]]:
    meter = Meter()
    with container.open() as stream:
        yield from in_blocks(JsonArray(stream, limit=row_limit(), meter=meter).values(), meter)


def _table_blocks(container: Container) -> Iterator[list[tuple[int, Any]]]:
    meter = Meter()
    yield from in_blocks(TABLES[container.kind](container, meter), meter)


_READERS = {
    "json": _array_blocks,
    "wrapped": _wrapped_blocks,
    "jsonl": _line_blocks,
    "csv": _table_blocks,
    "parquet": _table_blocks,
    "arrow": _table_blocks,
}
