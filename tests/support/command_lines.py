"""Parses a `palate …` command line with the real parser, up to the point where the verb would run."""

from __future__ import annotations

from functools import cache
from typing import Any

import typer

from palate.cli import app
from palate.cli.data import _format, _settings
from palate.cli.format import pairs, seconds
from palate_recipes.catalog import find_model
from palate_recipes.errors import PalateError
from palate_recipes.hyperparameters import HYPERPARAMETERS
from palate_recipes.preferences.formats import FORMATS, format_named
from palate_recipes.specs.serve import engine_args_of


def parse(arguments: list[str]) -> dict[str, Any]:
    """Returns the parameters that the verb would get.

    Raises:
        ValueError: The parser, the list of hyperparameters or the catalog refuses the line; says why.
    """
    command = _command()
    context: Any = None
    name, rest = "palate", list(arguments)
    try:
        while True:
            context = command.make_context(name, rest, parent=context)
            if not hasattr(command, "resolve_command"):
                break
            name, command, rest = command.resolve_command(context, [*_protected(context), *context.args])
            if command is None:
                raise ValueError("a group without a verb")
    except (SystemExit, ValueError):
        raise
    except Exception as error:  # typer has a click of its own, whose errors have no public name
        message = error.format_message() if hasattr(error, "format_message") else error
        raise ValueError(f"palate {' '.join(arguments)}: {message}") from error
    try:
        _check_values(context.params)
    except PalateError as error:
        raise ValueError(f"palate {' '.join(arguments)}: {error}") from error
    if command.name == "train":
        _check_train(context.params)
    return dict(context.params)


@cache
def _command() -> Any:
    """The whole command, which typer builds anew at each call, for a tenth of a second."""
    return typer.main.get_command(app)


def _protected(context: Any) -> list[str]:
    return list(getattr(context, "_protected_args", ()) or ())


def _check_values(given: dict[str, Any]) -> None:
    """Values in a form of their own, which the command reads once it runs."""
    if given.get("input_column") or given.get("label_column"):
        names = ("from_", "input_column", "label_column", "prompt_template", "prompt_name")
        settings = _settings(*(given.get(name) for name in names))
        if not settings["prompt_template"]:
            _format(settings)
    if given.get("from_") is not None and given["from_"] not in FORMATS:
        raise ValueError(f"--from {given['from_']}: no such format")
    if given.get("to") is not None:
        format_named(given["to"])
    if given.get("since") is not None:
        seconds(given["since"], "--since")
    for flag, value in (("--label", given.get("label")), ("--set", given.get("set_"))):
        pairs(value or [], flag)
    engine_args_of(given.get("engine_arg") or [])


def _check_train(given: dict[str, Any]) -> None:
    for setting in given["set_"] or ():
        name, equals, _ = setting.partition("=")
        if not equals or name not in HYPERPARAMETERS:
            raise ValueError(f"--set {setting}: no such hyperparameter")
    if (
        given["model"] and not given["model"].isupper() and "OWNER/NAME" not in given["model"]
    ):  # for the reader to fill in
        find_model(given["model"])
