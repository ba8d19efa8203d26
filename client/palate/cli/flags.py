"""Errors in the words of the command line: `max_attempts=0` is `--max-attempts 0` to somebody who typed the flag. Knows no command.

Errors are worded once, for Python callers. A command's errors are shown with its own options in place of the arguments.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

import typer

from palate_recipes.errors import PalateError

_ALIASES: Mapping[str, tuple[str, ...]] = {
    "model_name": ("model", "job_id"),
    "model_uri": ("model_uri", "tokenizer"),
    "job_name": ("name",),
    "service_name": ("name", "service"),
    "training_job_id": ("name", "job_id"),
    "training_strategy": ("strategy",),
    "time_to_live_s": ("time_to_live",),
    "idle_time_to_live_s": ("idle_time_to_live",),
    "sleep_after_s": ("sleep_after",),
    "input_columns": ("input_column",),
    "label_columns": ("label_column",),
    "hyperparameters": ("set_",),
    "instance_count": ("instances",),
    "system_prompt": ("system",),
}
"""Arguments of the Python API whose option has another name: the names in the commands, of which a command has one."""

_CHANNELS = {"train": "data", "validation": "validation", "adapter": "adapter"}
_PHRASES = (
    ("; PALATE_STORE or Session(store=…) selects another store", "; PALATE_STORE selects another store"),
    (" (job.model_uri)", " (`palate show JOB` prints its URI)"),
    (", or None for no limit", "; omit it for no limit"),
    (", or None", "; or omit it"),
    ("None removes the limit", "never removes the limit"),
    ("servable=False", "--no-servable"),
    ("replace=True", "--replace"),
    ("zero_downtime=False", "--stop-start"),
)
_OF_TABLES = ("--input-column", "--label-column", "--prompt-template", "--prompt-name", "--from")
"""Options of `palate data` that `train` lacks."""

_NOT_OURS = re.compile(
    r"^  \| .*$|^(?:last log lines|\d+ problems? in the experiment file):(?:\n  .*)+|"
    r"""(?<!inputs\[)(?<!\w)(?P<quote>['"])(?P<text>(?:(?!(?P=quote)).)*)(?P=quote)(?!\w)"""
    r"|`[^`\n]*`",
    re.MULTILINE,
)
"""Log lines, problems in an experiment file (its keys are not options), quoted names and values, and commands."""


def name_flags(app: typer.Typer) -> None:
    """Makes every command of `app` print its errors with its own options, and exit with 1."""
    for command in app.registered_commands:
        assert command.callback is not None
        command.callback = _naming_flags(command.callback)
    for group in app.registered_groups:
        assert group.typer_instance is not None
        name_flags(group.typer_instance)


def _naming_flags(command: Callable[..., None]) -> Callable[..., None]:

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()  # here, so that a closed pipe is noticed while it can be handled
        except BrokenPipeError:
            # The reader of stdout has exited (`palate logs … | head`), which is not an error. Typer would exit with 1.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except PalateError as error:
            print(f"error: {reworded(str(error), options_of(command))}", file=sys.stderr)
            raise typer.Exit(1) from None

    return run


def reworded(message: str, options: Mapping[str, tuple[str, str]]) -> str:
    """Returns a message with options in place of Python arguments.

    Args:
        message: The message for Python callers.
        options: By parameter of the command: the flag (or the argument's name in capitals) and the form of its value.
    """
    kept: list[str] = []

    def hide(found: re.Match[str]) -> str:
        quote = found["quote"] or ""
        kept.append(found[0] if found["text"] is None else found["text"])
        return f"{quote}\0{len(kept) - 1}\0{quote}"

    message = _NOT_OURS.sub(hide, message.replace("\0", ""))
    for python, shell in _PHRASES:
        message = message.replace(python, shell)
    for channel, parameter in _CHANNELS.items():
        if parameter in options:
            message = re.sub(rf"inputs\[['\"]{channel}['\"]\]", options[parameter][0], message)
    names = {name: name for name in options} | {
        python: next(name for name in shell if name in options)
        for python, shell in _ALIASES.items()
        if any(name in options for name in shell)
    }
    for python in sorted(names, key=len, reverse=True):
        flag, form = options[names[python]]
        # Not inside a path or an attribute: those are the user's own words, as what is quoted.
        word = rf"(?<![\w/.'\"`-]){re.escape(python)}"
        message = re.sub(rf"(?:deploy option )?{word} ?= ?\{{[^}}]*\}}", f"{flag} {form}".rstrip(), message)
        message = re.sub(rf"(?:deploy option )?{word} ?=(?= ?['\"\d-])[ ]?", f"{flag} ", message)
        message = re.sub(rf"(?:deploy option )?{word}=(?!\w)", flag, message)
        message = re.sub(rf"deploy option {re.escape(python)}\b", flag, message)
        if "_" in python:
            message = re.sub(rf"{word}(?![\w/='\"`(-])", flag, message)
    return re.sub(r"\0(\d+)\0", lambda found: kept[int(found[1])], message)


def usage_hint(error: Any) -> str:
    """Returns what the command line adds to typer's usage error, or "": how what was meant is given to `train`.

    Args:
        error: typer's exception: its message, the context of the command, and the name of an unknown option.
    """
    context = error.ctx
    if context is None or context.info_name != "train":
        return ""
    flag = getattr(error, "option_name", None)
    if flag in _OF_TABLES:
        return (
            f". `train` reads known fields only: `palate data convert DATA --output NEW.jsonl {flag} …` writes them, "
            "and train reads NEW.jsonl"
        )
    from palate_recipes.hyperparameters import HYPERPARAMETERS, known_name

    if flag and (name := known_name(flag.strip("-").replace("-", "_"))):
        return f". {name} is a hyperparameter: --set {name}=VALUE"
    alone = [name for name in context.params.get("set_") or () if name in HYPERPARAMETERS]
    return f". --set takes one word: --set {alone[0]}=VALUE" if alone and not flag else ""


def options_of(command: Callable[..., None]) -> dict[str, tuple[str, str]]:
    """Returns the flag (or the argument's name in capitals) and the form of its value, by parameter of a command."""
    found = {}
    hints = get_type_hints(command, include_extras=True)
    for name in inspect.signature(command).parameters:
        info = next(iter(getattr(hints[name], "__metadata__", ())), None)
        form = str(getattr(info, "metavar", None) or "")
        if isinstance(info, typer.models.OptionInfo):
            # With Annotated, typer stores the first flag in `default`.
            names = [one for one in (info.default, *(info.param_decls or ())) if isinstance(one, str)]
            flags = sorted((one.partition("/")[0] for one in names if one.startswith("-")), key=len, reverse=True)
            found[name] = (flags[0] if flags else f"--{name.strip('_').replace('_', '-')}", form)
        else:
            found[name] = (name.strip("_").upper(), form)
    return found
