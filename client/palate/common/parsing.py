"""JSON objects from files that anybody may have damaged. Knows no record and no store."""

from __future__ import annotations

import json
import math
from typing import Any

_LARGEST = 64 * 1024**2
"""Bytes. A record of Palate has some KiB; parsing takes a multiple of an object's size in memory."""


def parse_object(data: bytes) -> dict[str, Any]:
    """Returns the JSON object that `data` is.

    Raises:
        ValueError: It is too large, not UTF-8, not JSON, nested too deeply, not an object, or holds what cannot be written
            again (half a character). The message says which, in one line.
    """
    if len(data) > _LARGEST:
        raise ValueError(f"it has {len(data):,} bytes, more than {_LARGEST:,}")
    try:
        values = json.loads(data)
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"it is {type(values).__name__}, not an object")
    return values


def is_kind(value: object, kind: type | tuple[type, ...]) -> bool:
    """Says whether a JSON value has one of these types: a bool is not a number, and a number can be calculated with."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, bool):
        return bool in kinds
    if not isinstance(value, kinds):
        return False
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return False
    return not isinstance(value, float) or math.isfinite(value)


def check_fields(values: dict[str, Any], kinds: dict[str, type | tuple[type, ...]], *, of: str = "") -> None:
    """Raises ValueError when a field that is there has another type."""
    for name, kind in kinds.items():
        if name in values and not is_kind(values[name], kind):
            raise ValueError(f"{of}{name} is {shown(values[name])}")


def shown(value: object) -> str:
    """Returns a value for a message, cut where nobody reads on."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
