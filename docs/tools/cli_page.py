"""Writes docs/reference/cli.md from the command line itself: every verb, argument and option, with its help.

    python docs/tools/cli_page.py

The page is committed, so that it can be read on GitHub and the site needs no installed Palate; a test compares the two.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from palate.cli import app

PAGE = Path(__file__).resolve().parents[1] / "reference" / "cli.md"

_HEAD = """# Command line

`palate COMMAND --help` prints the same text. Results go to stdout, progress to stderr. The exit code is 0 on success, 1 on an
error, which is one message on stderr, and 2 when the command line itself is wrong. Most commands that list something take `--json`.

This page is generated from the commands by `python docs/tools/cli_page.py`.
"""


def render() -> str:
    """Returns the text of the page."""
    parts = [_HEAD]
    for name, command in _verbs(typer.main.get_command(app), "palate"):
        parts.append(_section(name, command))
    return "\n".join(parts)


def _verbs(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    for verb, found in getattr(command, "commands", {}).items():
        if hasattr(found, "commands"):
            yield from _verbs(found, f"{name} {verb}")
        else:
            yield f"{name} {verb}", found


def _section(name: str, command: Any) -> str:
    # What follows the first \b is laid out for a terminal.
    text, _, program = (command.help or "").partition("\b\n")
    lines = [f"## {name}", "", inspect.cleandoc(text), ""]
    if program.strip():
        lines += ["```text", program.replace("\b\n", "").strip(), "```", ""]
    arguments = [item for item in command.params if item.param_type_name == "argument"]
    options = [item for item in command.params if item.param_type_name == "option" and item.name != "help"]
    usage = [name, *(_usage(item) for item in arguments), *(["[OPTIONS]"] if options else [])]
    lines += [f"`{' '.join(usage)}`", ""]
    if arguments or options:
        lines += ["| | value | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [_row(_name(item), item) for item in arguments]
        lines += [_row(", ".join([*item.opts, *item.secondary_opts]), item) for item in options]
        lines.append("")
    examples = [line.strip() for line in (command.epilog or "").splitlines() if line.startswith("  ")]
    return "\n".join([*lines, "```bash", *examples, "```", ""])


def _usage(argument: Any) -> str:
    name = _name(argument) + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _name(argument: Any) -> str:
    return str(argument.metavar or argument.name).upper().rstrip("_")


def _row(name: str, item: Any) -> str:
    flag = getattr(item, "is_flag", False)
    default = "" if item.default is None or item.required or callable(item.default) else item.default
    shown = {True: "on", False: "off"}.get(default, str(default)) if flag else str(default)
    value = "" if flag else _value(item)
    cell = "required" if item.required and item.param_type_name == "option" else f"`{shown}`" if shown else ""
    return f"| `{name}` | {value} | {cell} | {(item.help or '').replace('|', chr(92) + '|')} |"


def _value(item: Any) -> str:
    if item.metavar:
        return f"`{item.metavar}`"
    annotation = item.type_descriptor.annotation
    while (inner := [one for one in get_args(annotation) if one is not type(None)]) and get_origin(
        annotation
    ) is not Literal:
        annotation = inner[0]  # float in list[float] | None
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    return {int: "integer", float: "number", Path: "path"}.get(annotation, "text")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE)
