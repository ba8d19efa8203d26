"""Tables to numbered raw rows: CSV, Parquet, Arrow. Knows their libraries, no row format."""

from __future__ import annotations

import csv
import io
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from palate_recipes.data.arrow_limits import check_messages, check_pages, values, weight
from palate_recipes.data.limits import Meter, Rows, RowTooLarge, row_limit, unpacked_limit, unpacks_too_far
from palate_recipes.data.rows import Fault
from palate_recipes.errors import DataError

if TYPE_CHECKING:
    from palate_recipes.data.containers import Container

DELIMITERS = ",\t;|"

_BLOCK = 1 << 20
_ROWS_A_BATCH = 512

_MESSAGE = frozenset(("role", "from", "messages"))
_LISTS = frozenset(("messages", "conversations", "history", "system", "tools"))
"""Columns whose cells may hold lists of something other than messages."""
_PYTHON = re.compile(r"""\[?\s*\{\s*'(?:role|from|content|value|messages)'\s*:""")
csv.field_size_limit(1 << 30)


def pyarrow() -> Any:
    """Returns the module, or says what to install."""
    try:
        return import_module("pyarrow")
    except ImportError:
        raise DataError(
            "Parquet, Arrow and .zst files need pyarrow, not installed here: pip install 'palate[data]'"
        ) from None


def _csv_rows(container: Container, meter: Meter) -> Rows:
    with container.open() as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
        number = 0
        limit, taken, line_number = row_limit(), 0, 0

        def read_lines() -> Iterator[str]:
            nonlocal taken, line_number
            for line in iter(partial(text.readline, limit + 1), ""):
                line_number += 1
                taken += len(line)
                if taken > limit:
                    hint = "Where it should be shorter, a closing quote is missing. "
                    raise RowTooLarge(f"line {line_number}", hint)
                yield line

        lines = read_lines()
        try:
            first = next((line for line in lines if line.strip()), "")
            delimiter = max(DELIMITERS, key=first.count)
            reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(reader)]
            _check_header(container.path, header)
            taken = 0
            for cells in reader:
                meter.held += taken
                taken = 0
                if not cells or cells == [""]:
                    continue
                number += 1
                if len(cells) != len(header):
                    what = f"{len(cells)} cells at line {reader.line_num}, the header has {len(header)}"
                    yield number, Fault("broken-table", "", what)
                else:
                    yield number, _row(header, cells)
        except UnicodeDecodeError:
            yield number + 1, _bad_byte(container)
        except csv.Error as error:
            reason = "a cell's closing quote is missing" if "end of data" in str(error) else str(error)
            yield number + 1, Fault("broken-table", "", f"broken CSV at line {reader.line_num}: {reason}")
        finally:
            text.detach()


def _bad_byte(container: Container) -> Fault:
    """The reader of text knows no line: the file is looked through again."""
    with container.open() as stream:
        for number, line in enumerate(iter(partial(stream.readline, row_limit() + 1), b""), start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return Fault("not-utf8", "", f"not UTF-8, byte 0x{line[error.start]:02x} at line {number}")
    return Fault("not-utf8", "", "not UTF-8")


def _check_header(path: Path, header: list[str]) -> None:
    seen: set[str] = set()
    for column, name in enumerate(header, start=1):
        if not name:
            raise DataError(f"{path}: column {column} has no name. The first row of a table names its columns.")
        if name in seen:
            raise DataError(f"{path}: two columns are called {name!r}. Rename one of them.")
        seen.add(name)


def _row(header: list[str], cells: list[str]) -> Any:
    """The cells by name; conversations among them are JSON, any other cell is text, even one that JSON would take."""
    row: dict[str, Any] = {}
    for name, text in zip(header, cells, strict=True):
        row[name] = text
        if text[:1] in ("[", "{") and text.rstrip()[-1:] in ("]", "}"):
            try:
                value = orjson.loads(text)
            except ValueError:
                if _PYTHON.match(text):
                    what = f"`{name}` holds a list as Python prints it, not as JSON: write such cells with json.dumps"
                    return Fault("not-text", name, what)
                continue
            if name in _LISTS or _holds_messages(value) or (name == "output" and _is_ranking(value)):
                row[name] = value
    return row


def _is_ranking(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _holds_messages(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and not _MESSAGE.isdisjoint(first)


def _parquet_rows(container: Container, meter: Meter) -> Rows:
    def batches(path: Path) -> Iterator[Any]:
        # A buffer: without one a column of a whole row group is held at once.
        with import_module("pyarrow.parquet").ParquetFile(path, buffer_size=_BLOCK) as file:
            rows = check_pages(path, file.metadata, container.path)
            yield from file.iter_batches(batch_size=min(rows, _ROWS_A_BATCH))

    pyarrow()
    yield from _arrow_values(container, batches, meter)


def _arrow_rows(container: Container, meter: Meter) -> Rows:
    def batches(path: Path) -> Iterator[Any]:
        ipc = import_module("pyarrow.ipc")
        with arrow.memory_map(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            check_messages(file, 8 if is_file else 0, container.path)
            file.seek(0)
            if is_file:
                reader = ipc.open_file(file)
                parts = (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                parts = iter(ipc.open_stream(file))
            for part in parts:
                for start in range(0, part.num_rows, _ROWS_A_BATCH):
                    yield part.slice(start, _ROWS_A_BATCH)

    arrow = pyarrow()
    yield from _arrow_values(container, batches, meter)


def _arrow_values(container: Container, batches: Any, meter: Meter) -> Rows:
    arrow = pyarrow()
    number = 0
    with _as_file(container) as path:
        packed = path.stat().st_size
        left = unpacked_limit(packed)
        try:
            for batch in batches(path):
                batch.validate(full=True)  # a damaged file must not be followed out of memory's bounds
                left -= weight(batch)
                if left < 0:
                    raise unpacks_too_far(container.path, packed)
                for value, size in values(batch, number):
                    number += 1
                    meter.held += size
                    yield number, value
        except DataError:
            raise
        except (arrow.ArrowException, ValueError, OverflowError) as error:
            raise DataError(
                f"{container.path}: the {container.kind} data is damaged{f' behind row {number}' if number else ''}:"
                f" {str(error).rstrip('.')}. Export it anew."
            ) from None


@contextmanager
def _as_file(container: Container) -> Iterator[Path]:
    """These two are read from several places at once, which a packed file does not allow: it is unpacked beside."""
    if not container.compression:
        yield container.path
        return
    with tempfile.NamedTemporaryFile(prefix="palate-", suffix=container.path.name) as file:
        with container.open() as stream:
            shutil.copyfileobj(stream, file, _BLOCK)
        file.flush()
        yield Path(file.name)


TABLES: dict[str, Callable[[Container, Meter], Rows]] = {
    "csv": _csv_rows,
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
}
"""The reader of each kind of table."""
