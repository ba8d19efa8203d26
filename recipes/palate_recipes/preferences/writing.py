"""Writes raw rows to a data file atomically. Knows containers, no format."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, cast

import orjson

from palate_recipes.errors import DataError
from palate_recipes.preferences.tables import pyarrow

WRITTEN = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""Supported suffixes; each except .parquet may be followed by .gz or .zst."""

_ROWS_A_GROUP = 10_000


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]], *, columns: Iterable[str] = ()) -> int:
    """Writes raw rows in the format of the file's suffix.

    Args:
        path: Ends in one of WRITTEN. An existing file is replaced once all rows are written.
        rows: Objects. In a table, values other than text are written as JSON.
        columns: Columns of a table, if rows may lack some; default: those of the first row.

    Returns:
        The number of rows.

    Raises:
        DataError: The suffix is unknown, or the folder is not writable.
    """
    path = Path(path)
    write, pack = _writer(path)
    try:
        # A temporary file in the same folder, so that a full disk or a kill does not damage an existing file.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            try:
                with pack(cast("IO[bytes]", file)) as stream:
                    counted = _Counted(rows)
                    write(stream, iter(counted), list(columns))
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}. Check the folder and its permissions."
        ) from None
    return counted.count


def check_name(path: str | Path) -> None:
    """Raises DataError if a file's suffix is unknown or its folder does not exist."""
    _writer(Path(path))
    if not Path(path).absolute().parent.is_dir():
        raise DataError(f"{path}: folder {Path(path).parent} does not exist. Create it first.")


class _Counted:
    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self._rows, self.count = rows, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self._rows:
            self.count += 1
            yield row


_Write = Callable[[IO[bytes], Iterator[dict[str, Any]], list[str]], None]


def _writer(path: Path) -> tuple[_Write, Callable[[IO[bytes]], Any]]:
    name = path.name.lower()
    pack = _gzip if name.endswith(".gz") else _zstd if name.endswith(".zst") else _plain
    stem = name.removesuffix(".gz").removesuffix(".zst")
    suffix = next((suffix for suffix in WRITTEN if stem.endswith(suffix)), None)
    if suffix is None or (suffix == ".parquet" and pack is not _plain):
        raise DataError(f"{path}: unknown file type. The name must end in one of {', '.join(WRITTEN)}.")
    return _WRITERS[suffix], pack


@contextmanager
def _plain(file: IO[bytes]) -> Iterator[IO[bytes]]:
    yield file


@contextmanager
def _gzip(file: IO[bytes]) -> Iterator[IO[bytes]]:
    with gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as stream:  # the same rows give the same bytes
        yield cast("IO[bytes]", stream)


@contextmanager
def _zstd(file: IO[bytes]) -> Iterator[IO[bytes]]:
    with pyarrow().output_stream(file.name, compression="zstd") as stream:  # by name: Arrow closes what it is given
        yield stream


def _write_lines(stream: IO[bytes], rows: Iterator[dict[str, Any]], columns: list[str]) -> None:
    for row in rows:
        stream.write(_json(row) + b"\n")


def _write_array(stream: IO[bytes], rows: Iterator[dict[str, Any]], columns: list[str]) -> None:
    stream.write(b"[")
    for index, row in enumerate(rows):
        stream.write((b",\n  " if index else b"\n  ") + _json(row))
    stream.write(b"\n]\n")


def _json(row: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(row)
    except (TypeError, ValueError):
        return json.dumps(row, ensure_ascii=True, default=str).encode()  # lone surrogates, huge numbers, dates


def _write_table(delimiter: str) -> _Write:
    def write(stream: IO[bytes], rows: Iterator[dict[str, Any]], columns: list[str]) -> None:
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="", write_through=True)
        first = next(rows, None)
        table = csv.writer(text, delimiter=delimiter, lineterminator="\n")
        names = columns or list(first or ())
        table.writerow(names)
        for row in chain([first] if first is not None else [], rows):
            if len(row) > len(names) or any(name not in names for name in row):
                extra = [name for name in row if name not in names]
                raise DataError(
                    f"a row has {', '.join(extra)}, which the table's first row does not have. Write .jsonl instead."
                )
            table.writerow([_cell(row.get(name)) for name in names])
        text.detach()

    return write


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _write_parquet(stream: IO[bytes], rows: Iterator[dict[str, Any]], columns: list[str]) -> None:
    from importlib import import_module

    arrow = pyarrow()
    parquet = import_module("pyarrow.parquet")
    writer = None
    try:
        while group := list(islice(rows, _ROWS_A_GROUP)):
            if columns:
                group = [{name: row.get(name) for name in columns} for row in group]
            try:
                table = arrow.Table.from_pylist(group, schema=writer.schema if writer else None)
            except (arrow.ArrowException, TypeError) as error:
                raise DataError(f"Parquet needs rows of one type: {error}. Write .jsonl instead.") from None
            if writer is None:
                writer = parquet.ParquetWriter(stream, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is None:
            raise DataError("there are no rows: Parquet needs one to determine its columns. Write .jsonl instead.")
    finally:
        if writer is not None:
            writer.close()


_WRITERS: dict[str, _Write] = {
    ".json": _write_array,
    ".jsonl": _write_lines,
    ".ndjson": _write_lines,
    ".csv": _write_table(","),
    ".tsv": _write_table("\t"),
    ".parquet": _write_parquet,
}
