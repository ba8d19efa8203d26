"""Options of vLLM: those of `deploy()` by type and bounds, and any by the table of the vLLM that will serve. Imports no engine.

`engine_options.json` is written by `python -m palate_server.vllm_options`, which asks vLLM's own parser. Another version than the
table's is asked on the machine that serves, before the engine starts. Values that only vLLM's configuration checks, such as a memory
share for a certain model, are not known here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from palate_recipes.errors import ConfigurationError
from palate_recipes.servability import LORA_RANKS
from palate_recipes.text import did_you_mean

NONE = "none"
"""Value of a parser's option that switches the parser off."""
_PARSERS = ("tool-call-parser", "reasoning-parser")


@dataclass(frozen=True, kw_only=True)
class EngineOption:
    """An option of `deploy()` that vLLM has under the same name, with dashes.

    Attributes:
        kind: Type of its value.
        low: Smallest value; 0.0 itself is not allowed.
        high: Largest value.
        choices: All values, if they are few.
    """

    kind: type[int] | type[float] | type[str]
    low: float = 1
    high: float = math.inf
    choices: tuple[int, ...] = ()


ENGINE_OPTIONS: dict[str, EngineOption] = {
    "quantization": EngineOption(kind=str),
    "kv_cache_dtype": EngineOption(kind=str),
    "tensor_parallel_size": EngineOption(kind=int),
    "gpu_memory_utilization": EngineOption(kind=float, low=0.0, high=1.0),
    "max_num_seqs": EngineOption(kind=int),
    "max_loras": EngineOption(kind=int),
    "max_lora_rank": EngineOption(kind=int, choices=LORA_RANKS),
    "tool_call_parser": EngineOption(kind=str),
    "reasoning_parser": EngineOption(kind=str),
}
"""Options of `deploy()` that only vLLM has."""

_SAME = {"device-memory-utilization": "gpu-memory-utilization"}
_SHORT = {"-q": "quantization", "-tp": "tensor-parallel-size"}


def check_values(options: Mapping[str, Any]) -> None:
    """Raises ConfigurationError for a typed option with a wrong type, out of bounds, or given in `engine_args` too."""
    given = {_SAME.get(name, name): text for name, text, _ in _pairs(options.get("engine_args") or ())}
    for name, option in ENGINE_OPTIONS.items():
        if name not in options:
            continue
        value = options[name]
        told = f"deploy option {name}={value!r}"
        if (text := given.get(_flag(name))) is not None:
            raise ConfigurationError(f"{told}, but engine_args has {text} too: give it once")
        kinds = (int, float) if option.kind is float else (option.kind,)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ConfigurationError(f"{told}: expected {option.kind.__name__}")
        if isinstance(value, str):
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", value):
                raise ConfigurationError(f"{told}: expected a name that vLLM knows")
        elif limits := _beyond(name, value):
            raise ConfigurationError(f"{told} is out of range: expected {limits}")


def spec_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields of a `ServeSpec` for a deployment's options: typed options of vLLM become arguments of its command line.

    Options that the runner alone reads are left out.
    """
    fields = {name: value for name, value in options.items() if name not in (*ENGINE_OPTIONS, *RUNNER_OPTIONS)}
    typed = [f"--{_flag(name)}={options[name]}" for name in ENGINE_OPTIONS if name in options]
    if typed or "engine_args" in fields:
        fields["engine_args"] = (*typed, *fields.get("engine_args", ()))
    return fields


RUNNER_OPTIONS = ("merge",)
"""Options of a service that its runner carries out."""


def vllm_only(options: Mapping[str, Any]) -> list[str]:
    """Returns the given options that the transformers engine does not have, as the user named them."""
    return [name for name in (*ENGINE_OPTIONS, "engine_args") if options.get(name) not in (None, (), [])]


def known_version() -> str:
    """Returns the version of vLLM that the package's table is of."""
    return str(known_table()["vllm"])


@cache
def known_table() -> dict[str, Any]:
    """Returns the table of the version that the package asks for. Keys: see `palate_server.vllm_options.describe`."""
    from importlib.resources import files

    text = files("palate_recipes").joinpath("engine_options.json").read_text("utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def problem(arguments: Sequence[str], table: Mapping[str, Any], *, names_are_complete: bool = True) -> str:
    """Returns why vLLM's parser would refuse an argument; "" if it takes all.

    Args:
        arguments: A vLLM command line that `check_engine_args` accepts.
        table: The table of the vLLM that will serve.
        names_are_complete: Whether no plug-in adds parsers or quantization methods to vLLM's own.
    """
    for name, given, value in _pairs(arguments):
        if re.fullmatch(r"-O[0-3]", given):
            continue
        if name in table["switches"]:
            if value is None:
                continue
            return f"{given} is a switch of vLLM {table['vllm']}: write --{name}, or --no-{name} to turn it off"
        if name not in table["values"]:
            near = did_you_mean(name, [*table["values"], *table["switches"]])
            return f"vLLM {table['vllm']} has no option {given.partition('=')[0]}{f': {near}' if near else ''}".rstrip()
        if value is None:
            return f"{given} has no value: write --{name}=VALUE"
        if name in _PARSERS and value == NONE:
            continue
        if not (value == "None" and name in table["may_be_none"]):
            kind = table["values"][name]
            choices = kind if isinstance(kind, list) else table["names"].get(name) if names_are_complete else None
            if choices is not None and value not in choices:
                hint = did_you_mean(value, choices) or f"it knows {', '.join(choices)}"
                return f"--{name}={value} is unknown to vLLM {table['vllm']}: {hint.rstrip()}"
            if isinstance(kind, str) and not _parses(kind, value):
                return f"--{name}={value}: vLLM {table['vllm']} expects {_KINDS[kind]}"
            typed = _SAME.get(name, name).replace("-", "_")
            if typed in ENGINE_OPTIONS and kind in ("int", "float") and (limits := _beyond(typed, float(value))):
                return f"--{name}={value} is out of range: expected {limits}"
    return ""


def _beyond(name: str, value: float) -> str:
    """Returns the limits of a typed option if a number is beyond them, else ""."""
    option = ENGINE_OPTIONS[name]
    if option.choices:
        return "" if value in option.choices else f"one of {', '.join(map(str, option.choices))}"
    if option.low <= value <= option.high and value > 0:  # NaN is not in between either
        return ""
    return f"0 < {name} <= {option.high:g}" if option.high < math.inf else f"at least {option.low:g}"


def argument(arguments: Sequence[str], name: str) -> str | None:
    """Returns the value of an option, the last one as vLLM takes it; None if it is not given."""
    return next((value for option, _, value in reversed(list(_pairs(arguments))) if option == name), None)


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "count": "a whole number, or such as 1k",
    "json": "JSON",
}


def _parses(kind: str, value: str) -> bool:
    if kind in ("text", "other"):
        return True
    try:
        if kind == "json":
            json.loads(value)
        elif kind == "float":
            float(value)
        elif kind == "int" or not re.fullmatch(r"\d+(\.\d+)?[kKmMgGtT]", value):
            int(value)
    except (ValueError, RecursionError):
        return False
    return True


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str, str | None]]:
    """Returns option, argument as given, and value, for each option; value None if there is none."""
    rest = list(arguments)
    while rest:
        given = str(rest.pop(0))
        name, has_value, value = given.partition("=")
        option = _SHORT.get(name) or name.lstrip("-").replace("_", "-")
        if has_value:
            yield option, given, value
        elif rest and (not str(rest[0]).startswith("-") or re.fullmatch(r"-[\d.]+", str(rest[0]))):
            yield option, given, str(rest.pop(0))
        else:
            yield option, given, None


def _flag(name: str) -> str:
    return name.replace("_", "-")
