"""Finds vLLM's parsers of tool calls and thoughts for a model, from the catalog or its chat template. Imports no engine.

Without `--tool-call-parser`, vLLM answers every request with tools and `tool_choice="auto"`, the default, with 400.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from palate_recipes.catalog import find_model
from palate_recipes.errors import UnknownModelError

_FORMATS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("qwen3_xml", ("<tool_call>", "<function=", "<parameter="), ()),
    ("hermes", ("<tool_call>", "</tool_call>"), ("<function=", "<arg_key>")),
    ("mistral", ("[AVAILABLE_TOOLS]", "[TOOL_CALLS]"), ("[ARGS]",)),
    ("llama3_json", ("<|start_header_id|>", "<|eot_id|>", "ipython", '"parameters"'), ("<|header_start|>",)),
    ("phi4_mini_json", ("<|tool|>", "<|/tool|>"), ()),
)
"""(parser, what a template of its format contains, what it does not contain), most specific first."""

_NEEDS_TOKEN = {"mistral": "[TOOL_CALLS]", "qwen3": "<think>", "deepseek_r1": "<think>"}
"""Parsers that fail with a tokenizer that lacks this token."""

NONE = "none"
"""Value of an option that switches a parser off."""


def with_parsers(
    engine_args: Sequence[str], *, model_name: str, tokenizer_dir: Path, model_dir: Path
) -> tuple[str, ...]:
    """Returns vLLM's arguments with the parsers for the model. An option that the user gave wins; `none` removes it."""
    tools, reasoning = find_parsers(model_name, tokenizer_dir)
    if not _trained_to_think(model_dir, tokenizer_dir):
        reasoning = ""
    arguments, given_tools = _take(list(engine_args), "tool-call-parser")
    arguments, given_reasoning = _take(arguments, "reasoning-parser")
    tools = tools if given_tools is None else given_tools
    reasoning = reasoning if given_reasoning is None else given_reasoning
    if tools not in ("", NONE):
        arguments += [f"--tool-call-parser={tools}"]
        if "--enable-auto-tool-choice" not in arguments and "--no-enable-auto-tool-choice" not in arguments:
            arguments += ["--enable-auto-tool-choice"]
    if reasoning not in ("", NONE):
        arguments += [f"--reasoning-parser={reasoning}"]
    return tuple(arguments)


def find_parsers(model_name: str, tokenizer_dir: Path) -> tuple[str, str]:
    """Returns the names of the tool-call parser and the reasoning parser; "" if there is none, or if it is not sure.

    The catalog decides for its models, if the template supports tools at all. For any other model the template's own markup
    decides about tools. About thoughts it cannot: a model may have been tuned not to think, and then a reasoning parser would
    take its whole answer for a thought.
    """
    template = chat_template(tokenizer_dir)
    tools = reasoning = ""
    try:
        row = find_model(model_name)
        tools, reasoning = row.tool_parser, row.reasoning_parser
    except UnknownModelError:
        pass
    if "tools" not in template:
        tools = ""
    elif not tools:
        tools = next((name for name, has, lacks in _FORMATS if _matches(template, has, lacks)), "")
    return _if_possible(tools, tokenizer_dir), _if_possible(reasoning, tokenizer_dir)


def _trained_to_think(model_dir: Path, tokenizer_dir: Path) -> bool:
    """Whether the answers that the model was tuned on have thoughts; True for an untuned model.

    vLLM's parsers take an answer without `</think>` for an unfinished thought, and return it without content.
    """
    try:
        rows = json.loads(_text(model_dir / "probe.json"))["rows"]
        tokens = json.loads(_text(tokenizer_dir / "tokenizer.json")).get("added_tokens", [])
        ends = {token["id"] for token in tokens if token["content"] == "</think>"}
        return any(ends.intersection(row["completion_ids"]) for row in rows)
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ):  # absent, or of another shape than expected
        return True


def chat_template(tokenizer_dir: Path) -> str:
    """Returns the template that the tokenizer uses; "" if it has none."""
    file = tokenizer_dir / "chat_template.jinja"
    if file.is_file():
        return _text(file)
    try:
        found = json.loads(_text(tokenizer_dir / "tokenizer_config.json")).get("chat_template")
    except (ValueError, AttributeError, RecursionError):
        return ""
    if isinstance(found, list):  # several named templates: with tools, the one of that name is used
        named = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("tool_use") or named.get("default")
    return found if isinstance(found, str) else ""


def _matches(template: str, has: Sequence[str], lacks: Sequence[str]) -> bool:
    return all(mark in template for mark in has) and not any(mark in template for mark in lacks)


def _if_possible(parser: str, tokenizer_dir: Path) -> str:
    token = _NEEDS_TOKEN.get(parser)
    tokenizer = _text(tokenizer_dir / "tokenizer.json") if token else ""
    return "" if tokenizer and json.dumps(token) not in tokenizer else parser


def _text(file: Path) -> str:
    """Returns the text of a model's file; "" if it cannot be read, which the engine reports better."""
    try:
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    except OSError:
        return ""


def _take(arguments: list[str], option: str) -> tuple[list[str], str | None]:
    """Returns the arguments without the option, and its last value; None if it is not given."""
    kept: list[str] = []
    value: str | None = None
    rest = iter(arguments)
    for argument in rest:
        name, given, text = argument.partition("=")
        if name.startswith("--") and name[2:].replace("_", "-") == option:
            value = text if given else next(rest, "")
        else:
            kept.append(argument)
    return kept, value
