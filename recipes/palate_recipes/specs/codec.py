"""Reads and writes JSON as typed structs, with limits and one-line messages. Knows msgspec, no record.

msgspec rejects text that is not UTF-8, lone surrogates, NaN and numbers beyond a float. This module also rejects objects that are
too large or nested too deeply, with ValueError as for all other errors. The bounds of `Int`, `Natural` and `Ordinal` reject
integers beyond 64 bits.
"""

from __future__ import annotations

import re
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, ClassVar, Self, TypeVar

import msgspec
from msgspec import Meta, Struct

Int = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
"""An int that other programs can read, too. msgspec alone accepts integers of any length."""
Natural = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Ordinal = Annotated[int, Meta(ge=1, le=2**63 - 1)]


def whole(pattern: str) -> Meta:
    """Returns the rule that a text matches a regular expression from its first to its last character.

    msgspec and JSON schemas search, and Python's `$` also matches before a newline at the end. `\\Z` would prevent that, but no
    other language reads it in a schema.
    """
    return Meta(pattern=f"^{pattern}(?!\\n)$")


Sha256 = Annotated[str, whole("[0-9a-f]{64}")]

_LARGEST = 64 * 1024**2
"""Bytes. A record has a few KiB, and parsing needs a multiple of an object's size in memory."""

_ROOM = 100
"""Levels of nesting that are left for the stack of those who read and write a record."""

_Record = TypeVar("_Record", bound=Struct)


def parse_object(data: bytes) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
        ValueError: It is too large, not UTF-8, not JSON, nested too deeply, not an object, or contains a value that cannot be
            written (a lone surrogate, NaN). The message is one line.
    """
    if len(data) > _LARGEST:
        raise ValueError(f"it has {len(data):,} bytes, more than {_LARGEST:,}")
    try:
        values = msgspec.json.decode(data)
        nested: object = values
        for _ in range(
            _ROOM
        ):  # fails here, not in a heartbeat with a deeper stack, if it is nested too deeply to be written
            nested = [nested]
        msgspec.json.encode(nested)
    except UnicodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON: {str(error).removeprefix('JSON is malformed: ')}") from None
    if not isinstance(values, dict):
        raise ValueError(f"it is {type(values).__name__}, not an object")
    return values


def decode(data: bytes, kind: type[_Record]) -> _Record:
    """Parses a record. Ignores unknown fields, which a newer version may have written.

    Raises:
        ValueError: See `parse_object` and `typed`.
    """
    return typed(parse_object(data), kind)


def typed(values: dict[str, Any], kind: type[_Record]) -> _Record:
    """Converts JSON values to a record.

    Raises:
        ValueError: A field is missing, has the wrong type, or is out of bounds. The message has the field's path, the value and
            what is expected. If fields of the record itself are missing, it names all of them.
    """
    try:
        return convert(values, kind)
    except msgspec.ValidationError as error:
        raise ValueError(_explained(str(error), values, kind)) from None


def convert(values: object, kind: type[_Record]) -> _Record:
    """Converts JSON values to a record. Thread-safe. Raises msgspec.ValidationError."""
    if kind not in _known:
        # msgspec builds its tables of a type and its fields' types at first use. If two threads do that at once, it crashes
        # (0.22: segmentation fault), and sixteen threads read a list of runs.
        with _one_at_a_time:
            msgspec.json.Decoder(kind)
            _known.add(kind)
    return msgspec.convert(values, kind)


_known: set[type[Struct]] = set()
_one_at_a_time = Lock()


def encode(value: object) -> bytes:
    """Returns a record as indented JSON in UTF-8. Raises UnicodeEncodeError for a lone surrogate."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1)


class File(Struct, frozen=True, kw_only=True):
    """A record in a local file, which one process writes and another reads."""

    MODE: ClassVar[int] = 0o666
    """Permissions of the file, less those that the umask takes away."""

    def write(self, path: Path) -> None:
        """Replaces the file atomically: a reader sees the whole of the old or of the new one."""
        draft = path.with_suffix(".tmp")
        draft.unlink(missing_ok=True)  # of a process that was killed; it may have other permissions
        draft.touch(mode=self.MODE, exist_ok=False)
        draft.write_bytes(encode(self))
        draft.replace(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises OSError or ValueError."""
        return decode(path.read_bytes(), cls)


_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`", re.DOTALL)
_QUOTED = re.compile(r"(Invalid (?:enum )?value) ['\"].*", re.DOTALL)
_STEP = re.compile(r"\.(?P<field>[^.\[]+)|\[(?P<index>[0-9]+|\.\.\.)\]")


def _explained(message: str, values: dict[str, Any], kind: type[Struct]) -> str:
    # The last path is msgspec's own: a value that it quotes may contain the same words.
    what, _, place = message.rpartition(" - at `")
    if not what:
        what, place = message, ""
    value: Any = values
    path = ""  # as far as msgspec gives it: it omits the keys of a dict
    for step in _STEP.finditer(place.removesuffix("`")):
        if step["index"] == "...":
            break
        try:
            value = value[int(step["index"]) if step["index"] else step["field"]]
        except (LookupError, TypeError):
            break
        path += f"[{step['index']}]" if step["index"] else f".{step['field']}"
    path = path.removeprefix(".")
    if missing := _MISSING.fullmatch(what):
        if path:
            return f"{path} has no {missing['name']}"
        required = [field.encode_name for field in msgspec.structs.fields(kind) if field.required]
        return f"it has no {' and no '.join(name for name in required if name not in values) or missing['name']}"
    what = _QUOTED.sub(r"\1", what).replace("`", "")  # `shown` has the value, truncated
    return f"{path or 'it'} is {shown(value)}: {what[:1].lower()}{what[1:]}"


def shown(value: object) -> str:
    """Returns a value for a message, truncated to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# For records that are read and rewritten: they keep unknown fields, which a newer version may have written.


def gather(values: object, kind: type[Struct]) -> object:
    """Moves the fields that `kind` does not have into its field `more`."""
    if not isinstance(values, dict):
        return values
    known = {*kind.__struct_encode_fields__} - {"more"}
    return {
        **{name: value for name, value in values.items() if name in known},
        "more": {name: value for name, value in values.items() if name not in known},
    }


def spread(values: dict[str, Any]) -> dict[str, Any]:
    """Moves the fields in `more` back to the top level: the inverse of `gather`."""
    more = values.pop("more")
    return {**values, **more}
