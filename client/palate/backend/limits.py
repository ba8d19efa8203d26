"""What a container may take of its machine: processors and memory, in the words of PAI's InstanceSpec. Knows no engine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from palate.errors import ConfigurationError
from palate_recipes.nearest import did_you_mean

_GIB = 1 << 30
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_LEAST_BYTES = 64 << 20
_HELP = 'give instance_spec={"cpu": 4, "memory": "16g"}: cores, and bytes with a unit (a bare number is GiB, as in PAI)'


@dataclass(frozen=True)
class Limits:
    """Upper bounds; None sets none.

    Attributes:
        cpu: Cores, or parts of one.
        memory_bytes: Of all processes of the run together; with nothing swapped out.
    """

    cpu: float | None = None
    memory_bytes: int | None = None

    @classmethod
    def parse(cls, given: object) -> Limits:
        """Reads what a user gave: None, a mapping, or PAI's object with those attributes; raises ConfigurationError."""
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            given = {name: getattr(given, name) for name in ("cpu", "memory") if hasattr(given, name)}
        for name in given:
            if name not in ("cpu", "memory"):
                raise ConfigurationError(
                    f"instance_spec has an unknown key {name!r}: {did_you_mean(name, ('cpu', 'memory'))}{_HELP}"
                )
        return cls(_cores(given.get("cpu")), _bytes(given.get("memory")))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Limits:
        return cls(**values)

    @classmethod
    def of_container(cls, inspected: Mapping[str, Any]) -> Limits:
        """Returns what `inspect` says of a container."""
        return cls(None, int(inspected.get("HostConfig", {}).get("Memory") or 0) or None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def memory_gib(self) -> float | None:
        return None if self.memory_bytes is None else self.memory_bytes / _GIB

    @property
    def memory_text(self) -> str:
        return "the machine" if self.memory_gib is None else f"{self.memory_gib:.3g} GiB"

    def options(self) -> list[str]:
        """Returns the engine's options for them."""
        options = [] if self.cpu is None else ["--cpus", f"{self.cpu:g}"]
        if self.memory_bytes is not None:
            options += ["--memory", str(self.memory_bytes), "--memory-swap", str(self.memory_bytes)]
        return options


def _cores(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigurationError(f"instance_spec cpu={value!r} must be a number above 0: {_HELP}")
    return float(value)


def _bytes(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        size = float(value) * _GIB
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        size = float(match[1]) * _UNITS[match[2].lower()]
    else:
        raise ConfigurationError(f"instance_spec memory={value!r} is no size: {_HELP}")
    if size < _LEAST_BYTES:
        raise ConfigurationError(f"instance_spec memory={value!r} is below {_LEAST_BYTES >> 20} MiB: {_HELP}")
    return int(size)
