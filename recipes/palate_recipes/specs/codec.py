"""JSON of records: read into typed structs, with limits and one-line messages, and written. Knows msgspec, no record.

msgspec refuses text that is not UTF-8, half a character, NaN and numbers beyond a float. The size of an object and its depth
are refused here, as a ValueError like all the rest; integers beyond 64 bits by the bounds of `Int` and its kin.
"""

from __future__ import annotations

import re
from threading import Lock
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

Int = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
"""An int that other programs can hold, too: msgspec alone takes one of any length."""
Natural = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Ordinal = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]

_LARGEST = 64 * 1024**2
"""Bytes. A record of Palate has some KiB; parsing takes a multiple of an object's size in memory."""

_Record = TypeVar("_Record", bound=Struct)


def parse_object(data: bytes) -> dict[str, Any]:
    """Returns the JSON object that `data` is.

    Raises:
        ValueError: It is too large, not UTF-8, not JSON, nested too deeply, not an object, or holds what cannot be written
            again (half a character, NaN). The message says which, in one line.
    """
    if len(data) > _LARGEST:
        raise ValueError(f"it has {len(data):,} bytes, more than {_LARGEST:,}")
    try:
        values = msgspec.json.decode(data)
        msgspec.json.encode(values)  # what is nested too deeply to be written again is found here, and by no heartbeat
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
    """Returns the record that `data` holds; fields that the type lacks are left out, a newer writer may say more.

    Raises:
        ValueError: See `parse_object` and `typed`.
    """
    return typed(parse_object(data), kind)


def typed(values: dict[str, Any], kind: type[_Record]) -> _Record:
    """Returns JSON values as a record.

    Raises:
        ValueError: A field is missing, or has another type or a value out of its bounds. The message names the field by its
            path, the value and what it must be; of missing fields of the record itself all.
    """
    try:
        return convert(values, kind)
    except msgspec.ValidationError as error:
        raise ValueError(_explained(str(error), values, kind)) from None


def convert(values: object, kind: type[_Record]) -> _Record:
    """Returns JSON values as a record, from any thread; raises msgspec.ValidationError where they are none."""
    if kind not in _known:
        # msgspec makes its table of a type, and of those below it, at the first use. Two threads that do so at once crash it
        # (0.22: a segmentation fault), and a list of runs is read by sixteen.
        with _one_at_a_time:
            msgspec.json.Decoder(kind)
            _known.add(kind)
    return msgspec.convert(values, kind)


_known: set[type[Struct]] = set()
_one_at_a_time = Lock()


def encode(value: object) -> bytes:
    """Returns a record as JSON for people: indented, UTF-8; raises UnicodeEncodeError for half a character."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1)


_ERROR = re.compile(r"(?P<what>.*?)(?: - at `(?:key in )?\$(?P<path>.*?)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`")
_STEP = re.compile(r"\.(?P<field>[^.\[]+)|\[(?P<index>[0-9]+|\.\.\.)\]")


def _explained(message: str, values: dict[str, Any], kind: type[Struct]) -> str:
    found = _ERROR.fullmatch(message)
    assert found is not None
    value: Any = values
    path = ""  # as far as msgspec names it: not the key of a dict with free keys
    for step in _STEP.finditer(found["path"] or ""):
        if step["index"] == "...":
            break
        value = value[int(step["index"]) if step["index"] else step["field"]]
        path += f"[{step['index']}]" if step["index"] else f".{step['field']}"
    path = path.removeprefix(".")
    if missing := _MISSING.fullmatch(found["what"]):
        if path:
            return f"{path} has no {missing['name']}"
        required = [field.encode_name for field in msgspec.structs.fields(kind) if field.required]
        return f"it has no {' and no '.join(name for name in required if name not in values) or missing['name']}"
    what = found["what"].replace("`", "")
    return f"{path or 'it'} is {shown(value)}: {what[:1].lower()}{what[1:]}"


def shown(value: object) -> str:
    """Returns a value for a message, cut where nobody reads on."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# Records that are written again, and keep what a newer writer said beside the fields that are known here.


def gather(values: object, kind: type[Struct]) -> object:
    """Returns the JSON of a record of a kind that has a field `more`, with the fields that the kind lacks in there."""
    if not isinstance(values, dict):
        return values
    known = {*kind.__struct_encode_fields__} - {"more"}
    return {
        **{name: value for name, value in values.items() if name in known},
        "more": {name: value for name, value in values.items() if name not in known},
    }


def spread(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the JSON of a record as it is written, see `gather`."""
    more = values.pop("more")
    return {**values, **more}
