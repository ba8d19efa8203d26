"""Reads one value of a hyperparameter into its type, from Python or from the strings that PAI sends.
Knows types only: no names, no bounds. Every reader raises TypeError, ValueError or OverflowError.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

ALL_LINEAR = "all-linear"


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # half a character, as bytes of a terminal that are not UTF-8 become: no manifest can hold it
    return value


def _bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    text = _string(value).strip().casefold()
    if text not in ("true", "1", "false", "0"):
        raise ValueError
    return text in ("true", "1")


def _int(value: object) -> int:
    if isinstance(value, bool):
        raise TypeError  # True is 1 to Python, but a flag in the place of a count is a mistake
    if hasattr(value.__class__, "__index__"):  # also the integers of numpy
        return operator.index(value)  # type: ignore[arg-type]
    if isinstance(value, str):
        try:
            return int(_ascii(value))
        except ValueError:
            pass
    number = _float(value)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _float(value: object) -> float:
    if isinstance(value, bool) or not (isinstance(value, str) or hasattr(value.__class__, "__float__")):
        raise TypeError
    number = float(_ascii(value) if isinstance(value, str) else value)  # type: ignore[arg-type]
    if not math.isfinite(number):
        raise ValueError
    return number


def _ascii(text: str) -> str:
    if "_" in text or not text.isascii():
        raise ValueError  # Python reads "1_0" and the digits of every script as numbers; other readers do not
    return text


def _modules(value: object) -> str | list[str]:
    if isinstance(value, str) and value.strip().casefold() == ALL_LINEAR:
        return ALL_LINEAR
    names = [_string(item).strip() for item in _items(value)]
    if not names or not all(name.replace(".", "").isidentifier() for name in names):
        raise ValueError
    # A list even for one name: PEFT reads a plain string as a regular expression.
    return list(dict.fromkeys(names))


def _items(value: object) -> list[object]:
    """The items of a list, or of the string that stands for one: "a,b" or "[1, 2]"."""
    if isinstance(value, str):
        text = value.strip()
        if not text.startswith("["):
            return [part.strip() for part in text.split(",")] if text else []
        import json

        value = json.loads(text)
    if not isinstance(value, (list, tuple)):
        raise TypeError
    return list(value)


def _names(value: object) -> str:
    names = [_string(item).strip().casefold() for item in _items(value)]
    if not names or len(set(names)) < len(names):
        raise ValueError
    return ",".join(names)


def _numbers(value: object) -> list[float]:
    single = isinstance(value, (int, float)) and not isinstance(value, bool)
    return [_float(item) for item in (_items([value]) if single else _items(value))]


PARSERS: Mapping[str, Callable[[object], Any]] = {
    "string": _string,
    "bool": _bool,
    "int": _int,
    "float": _float,
    "modules": _modules,
    "names": _names,
    "numbers": _numbers,
}
