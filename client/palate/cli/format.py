"""What verbs read and write in words: NAME=VALUE, ages, the next command. Knows no verb."""

from __future__ import annotations

import re
import shlex
import sys
import time

from palate_recipes.errors import ConfigurationError
from palate_recipes.text import visible

_UNITS_S = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def pairs(entries: list[str], flag: str) -> dict[str, str]:
    """Returns what a repeated option NAME=VALUE gave."""
    found = {}
    for entry in entries:
        name, separator, value = entry.partition("=")
        if not separator or not name:
            raise ConfigurationError(f"{flag}: expected NAME=VALUE, got {entry!r}")
        found[name.strip()] = value
    return found


def seconds(words: str, flag: str) -> float:
    """Returns what an option such as `2h` or `30min` means, in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h|d|w)", words.strip())
    if found is None:
        raise ConfigurationError(
            f"{flag}: expected a duration such as 30min, 2h or 7d (units s, min, h, d, w), got {words!r}"
        )
    return float(found[1]) * _UNITS_S[found[2]]


def age(since: float) -> str:
    """Returns how long ago a time (seconds since the epoch) was, in its largest unit."""
    passed = max(0, int(time.time() - since))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if passed >= size:
            return f"{passed // size} {unit}"
    return f"{passed} s"


def say_next(*words: object) -> None:
    """Prints a command that can be pasted into a shell as the next one, on stderr.

    Args:
        words: What follows `palate`.
    """
    print(visible(f"next: {shlex.join(['palate', *map(str, words)])}"), file=sys.stderr)
