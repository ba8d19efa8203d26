"""CPU and memory limits of a container, in the form of PAI's InstanceSpec. Knows no engine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from palate.parameters import reject_unknown_keywords
from palate_recipes.errors import ConfigurationError
from palate_recipes.text import did_you_mean

_GIB = 1 << 30
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_LEAST_BYTES = 64 << 20
_KEYS = ("cpu", "memory", "shared_memory")
_GPU_HELP = "a run gets all GPUs of its machine; omit it"
_HELP = {
    "instance_spec": 'expected instance_spec={"cpu": 4, "memory": "16g"}: cores, and a size; a plain number is GiB, as in PAI',
    "resource_config": 'expected resource_config={"cpu": 4, "memory": "16g"}: cores, and a size; a plain number is MB, as in PAI',
}
_BARE_UNIT = {"instance_spec": 1 << 30, "resource_config": 1 << 20}


@reject_unknown_keywords
@dataclass(frozen=True)
class ResourceConfig:
    """Resource limits of a service (PAI's class of this name).

    Attributes:
        cpu: Cores.
        memory: MB (2^20 bytes).
        gpu: Not supported: a service gets all GPUs.
        gpu_memory: Not supported: use vLLM's option, options={"gpu_memory_utilization": 0.5}.
    """

    cpu: float
    memory: float
    gpu: float | None = None
    gpu_memory: float | None = None


@dataclass(frozen=True)
class Limits:
    """Upper limits; None: no limit.

    Attributes:
        cpu: Cores, may be fractional.
        memory_bytes: Memory of all processes of the run together, without swap.
        shared_memory_bytes: Size of /dev/shm. Unlike the others it has a default, because the engine's is too small for
            PyTorch and vLLM.
    """

    cpu: float | None = None
    memory_bytes: int | None = None
    shared_memory_bytes: int = 2 << 30

    @classmethod
    def parse(cls, parameter: str, given: object) -> Limits:
        """Parses None, a mapping, or PAI's object with such attributes.

        Args:
            parameter: `instance_spec` (a plain number of memory is GiB) or `resource_config` (it is MB).
            given: The value.

        Raises:
            ConfigurationError: The value is invalid. The message has parameter, key, value and an example.
        """
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            named = getattr(given, "__dict__", {})
            given = {name: value for name, value in named.items() if value and name[0] != "_"}
            if not given:
                raise ConfigurationError(f"{parameter} has no limit: {_HELP[parameter]}")
        for name, value in given.items():
            if name.startswith("gpu"):
                raise ConfigurationError(f"{parameter} {name}={value!r} is not supported: {_GPU_HELP}")
            if name not in _KEYS:
                hint = did_you_mean(name, _KEYS)
                raise ConfigurationError(f"{parameter} has an unknown key {name!r}: {hint}{_HELP[parameter]}")
        memory, shared = (_bytes(parameter, name, given.get(name)) for name in _KEYS[1:])
        return cls(_cores(parameter, given.get("cpu")), memory, shared or cls.shared_memory_bytes)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Limits:
        return cls(**values)

    @classmethod
    def of_container(cls, inspected: Mapping[str, Any]) -> Limits:
        """Reads the limits of a container from `inspect`."""
        return cls(None, int(inspected.get("HostConfig", {}).get("Memory") or 0) or None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def named(self) -> set[str]:
        """Returns the keys (see `parse`) of the limits that are set."""
        return {name for name, value in (("cpu", self.cpu), ("memory", self.memory_bytes)) if value is not None}

    @property
    def memory_gib(self) -> float | None:
        return None if self.memory_bytes is None else self.memory_bytes / _GIB

    @property
    def memory_text(self) -> str:
        return "the machine" if self.memory_gib is None else f"{self.memory_gib:.3g} GiB"

    def options(self) -> list[str]:
        """Returns the engine's command-line options."""
        options = ["--shm-size", str(self.shared_memory_bytes)]
        if self.cpu is not None:
            options += ["--cpus", f"{self.cpu:g}"]
        if self.memory_bytes is not None:
            options += ["--memory", str(self.memory_bytes), "--memory-swap", str(self.memory_bytes)]
        return options


def _cores(parameter: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigurationError(f"{parameter} cpu={value!r} is not a number above 0: {_HELP[parameter]}")
    return float(value)


def _bytes(parameter: str, name: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        size = float(value) * _BARE_UNIT[parameter]
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        size = float(match[1]) * _UNITS[match[2].lower()]
    else:
        raise ConfigurationError(f"{parameter} {name}={value!r} is not a size: {_HELP[parameter]}")
    if size < _LEAST_BYTES:
        raise ConfigurationError(f"{parameter} {name}={value!r} is below {_LEAST_BYTES >> 20} MiB: {_HELP[parameter]}")
    return int(size)
