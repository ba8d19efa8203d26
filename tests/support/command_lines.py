"""Parses a `palate …` command line with the real parser, up to the point where the verb would run."""

from __future__ import annotations

from functools import cache
from typing import Any

import typer

from palate.cli import app
from palate_recipes.catalog import find_model
from palate_recipes.hyperparameters import HYPERPARAMETERS


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
    if command.name == "train":
        _check_train(context.params)
    return dict(context.params)


@cache
def _command() -> Any:
    """The whole command, which typer builds anew at each call, for a tenth of a second."""
    return typer.main.get_command(app)


def _protected(context: Any) -> list[str]:
    return list(getattr(context, "_protected_args", ()) or ())


def _check_train(given: dict[str, Any]) -> None:
    for setting in given["set_"] or ():
        name, equals, _ = setting.partition("=")
        if not equals or name not in HYPERPARAMETERS:
            raise ValueError(f"--set {setting}: no such hyperparameter")
    if (
        given["model"] and not given["model"].isupper() and "OWNER/NAME" not in given["model"]
    ):  # for the reader to fill in
        find_model(given["model"])
