"""The verb for scripts that were written for PAI's SDK: run."""

from __future__ import annotations

from typing import Annotated

import typer


def run(
    script: Annotated[str, typer.Argument(help="A Python script written for PAI's SDK; - reads it from stdin.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="For the script, untouched.")] = None,
) -> None:
    """Run a script written for PAI's SDK without an edit: as `python SCRIPT`, with `import pai` meaning Palate."""
    from palate.pai.script import run_script

    run_script(script, arguments or [])


def register(app: typer.Typer) -> None:
    """Adds this verb to the command line."""
    # What stands after the script is the script's, options included.
    app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})(run)
