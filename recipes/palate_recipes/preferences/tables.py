"""Reads tables to numbered raw rows: CSV, Parquet, Arrow, with limits of the uncompressed size. Knows no row format.

Parquet and Arrow compress columns inside the file and repeat values by reference, so a file of a kilobyte can expand to
gigabytes.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import IO, Any, Protocol

import orjson

from palate_recipes.errors import DataError
from palate_recipes.preferences.limits import (
    Meter,
    Rows,
    RowTooLarge,
    check_packed_rows,
    row_limit,
    unpacked_limit,
    unpacks_too_far,
)
from palate_recipes.preferences.row import Fault

DELIMITERS = ",\t;|"

_BLOCK = 1 << 20
_ROWS_A_BATCH = 512

_MESSAGE = frozenset(("role", "from", "messages"))
_LISTS = frozenset(("messages", "conversations", "history", "system", "tools"))
"""Columns whose cells may be lists."""
_PYTHON = re.compile(r"""\[?\s*\{\s*'(?:role|from|content|value|messages)'\s*:""")
csv.field_size_limit(1 << 30)


class Opened(Protocol):
    """The part of `files.Container` that readers need."""

    @property
    def path(self) -> Path: ...

    @property
    def kind(self) -> str: ...

    @property
    def compression(self) -> str: ...

    def open(self) -> AbstractContextManager[IO[bytes]]: ...


def pyarrow() -> Any:
    """Imports pyarrow. Raises with the install command if it is missing."""
    try:
        return import_module("pyarrow")
    except ImportError:
        raise DataError(
            "Parquet, Arrow and .zst files need pyarrow, which is not installed: pip install 'palate[data]'"
        ) from None


def _csv_rows(container: Opened, meter: Meter) -> Rows:
    with container.open() as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
        number = blank = 0
        limit, taken, line_number = row_limit(), 0, 0

        def read_lines() -> Iterator[str]:
            nonlocal taken, line_number
            for line in iter(partial(text.readline, limit + 1), ""):
                line_number += 1
                taken += len(line)
                if taken > limit:
                    hint = "If it should be shorter, a closing quote is missing. "
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
                    blank += 1
                    if container.compression and not blank % 65536:
                        check_packed_rows(container.path, number + blank)
                    continue
                number += 1
                if len(cells) != len(header):
                    what = f"{len(cells)} cells at line {reader.line_num}, but the header has {len(header)}"
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


def _bad_byte(container: Opened) -> Fault:
    """Reads the file again to find the line of the error, because a text reader does not know it."""
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
            raise DataError(
                f"{path}: column {column} has no name. The first row of a table must have the column names."
            )
        if name in seen:
            raise DataError(f"{path}: two columns are named {name!r}. Rename one of them.")
        seen.add(name)


def _row(header: list[str], cells: list[str]) -> Any:
    """Returns the cells by name. Only conversations are parsed as JSON; other cells stay text, even if they are valid JSON."""
    row: dict[str, Any] = {}
    for name, text in zip(header, cells, strict=True):
        row[name] = text
        if text[:1] in ("[", "{") and text.rstrip()[-1:] in ("]", "}"):
            try:
                value = orjson.loads(text)
            except ValueError:
                if _PYTHON.match(text):
                    what = f"`{name}` is a Python list, not JSON: write such cells with json.dumps"
                    return Fault("not-text", name, what)
                continue
            plain = name.lower()  # names are read in any case
            if plain in _LISTS or _holds_messages(value) or (plain == "output" and _is_ranking(value)):
                row[name] = value
    return row


def _is_ranking(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _holds_messages(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and not _MESSAGE.isdisjoint(first)


def _parquet_rows(container: Opened, meter: Meter) -> Rows:
    def batches(path: Path) -> Iterator[Any]:
        # Without a buffer size, pyarrow reads the column of a whole row group at once.
        with import_module("pyarrow.parquet").ParquetFile(path, buffer_size=_BLOCK) as file:
            rows = check_pages(path, file.metadata, container.path)
            yield from file.iter_batches(batch_size=min(rows, _ROWS_A_BATCH))

    pyarrow()
    yield from _arrow_values(container, batches, meter)


def _arrow_rows(container: Opened, meter: Meter) -> Rows:
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


def _arrow_values(container: Opened, batches: Any, meter: Meter) -> Rows:
    arrow = pyarrow()
    number = 0
    with _as_file(container) as path:
        packed = path.stat().st_size
        left = unpacked_limit(packed)
        try:
            for batch in batches(path):
                batch.validate(full=True)  # offsets in a damaged file could point out of bounds
                if not number:
                    _check_columns(container.path, batch.schema.names)
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
                f"{container.path}: the {container.kind} data is damaged{f' after row {number}' if number else ''}:"
                f" {str(error).rstrip('.')}. Export it again."
            ) from None


def _check_columns(path: Path, names: list[str]) -> None:
    """Raises DataError if two columns have one name: of these a row would keep only the last."""
    if len(set(names)) < len(names):
        name = Counter(names).most_common(1)[0][0]
        raise DataError(f"{path}: two columns are named {name!r}. Rename one of them.")


@contextmanager
def _as_file(container: Opened) -> Iterator[Path]:
    """Yields an uncompressed file. Parquet and Arrow need random access, so a compressed file is decompressed to a temporary one."""
    if not container.compression:
        yield container.path
        return
    with tempfile.NamedTemporaryFile(prefix="palate-", suffix=container.path.name) as file:
        with container.open() as stream:
            shutil.copyfileobj(stream, file, _BLOCK)
        file.flush()
        yield Path(file.name)


TABLES: dict[str, Callable[[Opened, Meter], Rows]] = {
    "csv": _csv_rows,
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
}
"""Reader by kind of table."""


_BATCH_BYTES = 1 << 26
"""Limit of the rows that are decoded at once."""
_EACH = 8
"""Bytes counted per value in addition to its text: in a list of nulls a value has no bytes in Arrow, but eight in Python."""
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3


def check_pages(path: Path, metadata: Any, shown: Path) -> int:
    """Returns how many rows of a Parquet file may be decoded at once.

    Args:
        path: Path of the file.
        metadata: Its `pyarrow.parquet.FileMetaData`.
        shown: Name of the file in messages.

    Raises:
        DataError: Its declared uncompressed size exceeds the limit.
    """
    packed, unpacked, largest = path.stat().st_size, 0, 1
    with path.open("rb") as file:
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            group_bytes = 0
            for column in map(group.column, range(group.num_columns)):
                group_bytes += max(column.total_uncompressed_size, column.num_values)
                largest = max(largest, _largest_repeated(file, column))
            unpacked += group_bytes
            largest = max(largest, group_bytes // max(group.num_rows, 1))
    if unpacked > unpacked_limit(packed):
        raise unpacks_too_far(shown, packed, unpacked)
    return max(1, _BATCH_BYTES // largest)


def _largest_repeated(file: Any, column: Any) -> int:
    """Maximum bytes of a value that the file stores once and rows repeat."""
    if "DELTA_BYTE_ARRAY" in column.encodings:  # a value can repeat the prefix of the previous one
        return int(column.total_uncompressed_size)
    if not column.has_dictionary_page or column.dictionary_page_offset is None:
        return 0
    file.seek(column.dictionary_page_offset)
    # PageHeader, Thrift's compact protocol: field 1 is the type, field 2 uncompressed_page_size, both i32.
    head = file.read(16)
    at, numbers = 0, list[int]()
    while len(numbers) < 2 and at < len(head) and head[at] == 0x15:
        number = shift = 0
        for byte in head[at + 1 :]:
            at += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        at += 1
        numbers.append(number >> 1)
    return numbers[1] if len(numbers) == 2 else int(column.total_uncompressed_size)


def check_messages(file: Any, start: int, shown: Path) -> None:
    """Raises DataError if the declared uncompressed size of an Arrow file's buffers exceeds the limit.

    Args:
        file: `pyarrow.NativeFile`, not read into memory.
        start: Offset of its first message.
        shown: Name of the file in messages.
    """
    reader = import_module("pyarrow.ipc").MessageReader.open_stream
    packed, unpacked = file.size(), 0
    file.seek(start)
    messages = reader(file)
    while True:
        try:
            message = messages.read_next_message()
        except StopIteration:
            break
        body = memoryview(message.body) if message.body is not None else memoryview(b"")
        try:
            for offset, length in _packed_buffers(bytes(message.metadata)):
                if length >= 8 and offset + 8 <= len(body):
                    unpacked += max(0, struct.unpack_from("<q", body, offset)[0])
        except (struct.error, IndexError):
            raise DataError(f"{shown}: the arrow data is damaged: a message has no frame. Export it again.") from None
        if unpacked > unpacked_limit(packed):
            raise unpacks_too_far(shown, packed, unpacked)


def _packed_buffers(metadata: bytes) -> list[tuple[int, int]]:
    """Offset and length of a message's compressed buffers. Each begins with its uncompressed size.

    Source: Message.fbs and the FlatBuffers layout, https://arrow.apache.org/docs/format/Columnar.html
    """

    def field(table: int, index: int) -> int:
        """Offset of a table's field; 0 if it has its default."""
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        if 4 + 2 * index >= struct.unpack_from("<H", metadata, vtable)[0]:
            return 0
        offset = struct.unpack_from("<H", metadata, vtable + 4 + 2 * index)[0]
        return table + int(offset) if offset else 0

    def follow(place: int) -> int:
        return place + int(struct.unpack_from("<I", metadata, place)[0])

    message = follow(0)
    kind, header = field(message, 1), field(message, 2)
    if not kind or not header or metadata[kind] not in (_DICTIONARY_BATCH, _RECORD_BATCH):
        return []
    batch = follow(header)
    if metadata[kind] == _DICTIONARY_BATCH:
        batch = follow(field(batch, 1))
    buffers, compression = field(batch, 2), field(batch, 3)
    if not buffers or not compression:
        return []
    vector = follow(buffers)
    count = struct.unpack_from("<I", metadata, vector)[0]
    return [struct.unpack_from("<qq", metadata, vector + 4 + 16 * index) for index in range(count)]


def weight(batch: Any) -> int:
    """Returns the bytes of a record batch's values, counting shared values each time.

    Raises:
        DataError: A column has an unsupported type.
    """
    return sum(map(_weight, batch.columns))


def values(batch: Any, before: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields the rows of a record batch with their approximate sizes in bytes. Converts only as many at once as the row limit allows.

    Args:
        batch: `pyarrow.RecordBatch`.
        before: Number of rows before it in the file.

    Raises:
        RowTooLarge: A row is larger than the limit.
        DataError: A column has a type that repeats values by reference.
    """
    size = weight(batch)
    if size <= row_limit():
        share = size // max(1, batch.num_rows)
        for row in batch.to_pylist():
            yield row, share
    elif batch.num_rows == 1:
        raise RowTooLarge(f"row {before + 1}")
    else:
        half = batch.num_rows // 2
        yield from values(batch.slice(0, half), before)
        yield from values(batch.slice(half), before + half)


def _weight(array: Any) -> int:
    """Bytes of the values, plus `_EACH` per value, counting shared values each time."""
    arrow = import_module("pyarrow")
    types, kind, count = arrow.types, array.type, len(array)
    if isinstance(array, arrow.ExtensionArray):
        return _weight(array.storage)
    if types.is_dictionary(kind):
        found = array.indices.value_counts()
        used, counts = array.dictionary.take(found.field("values")), found.field("counts").to_pylist()
        return sum(many * _weight(used.slice(index, 1)) for index, many in enumerate(counts))
    if types.is_struct(kind):
        return _EACH * count + sum(_weight(array.field(index)) for index in range(kind.num_fields))
    if types.is_map(kind) or types.is_list(kind) or types.is_large_list(kind):
        if not count:
            return 0
        first, last = array.offsets[0].as_py(), array.offsets[count].as_py()
        inner = [array.keys, array.items] if types.is_map(kind) else [array.values]
        return _EACH * count + sum(_weight(part.slice(first, last - first)) for part in inner)
    if types.is_fixed_size_list(kind):
        return _EACH * count + _weight(array.values.slice(array.offset * kind.list_size, count * kind.list_size))
    if types.is_string_view(kind) or types.is_binary_view(kind):  # count every view of a shared text
        return _EACH * count + sum(len(text) for value in array if (text := value.as_buffer()) is not None)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        return _EACH * count + int(array.nbytes)
    if types.is_primitive(kind) or types.is_null(kind) or types.is_fixed_size_binary(kind) or types.is_decimal(kind):
        return _EACH * count + int(array.nbytes)
    raise DataError(
        f"a column of type {kind} is not supported: cast it to string, or to a list of structs, and export it again."
    )
