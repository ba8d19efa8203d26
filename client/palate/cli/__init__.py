"""The command line: `palate …`. Each command is one call of the public API. Imports no ML library.

Results go to stdout, progress to stderr. An error is one message and exit code 1.
"""

from __future__ import annotations

import os
import sys

import typer

from palate.cli import chat, machine, runs, train
from palate.cli.data import data
from palate.cli.machine import images, store
from palate_recipes.errors import PalateError
from palate_recipes.text import visible

app = typer.Typer(
    name="palate",
    help="Preference-tune an open model and serve it behind an OpenAI-compatible endpoint.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
train.register(app)
chat.register(app)
runs.register(app)
machine.register(app)
app.add_typer(data, name="data")
app.add_typer(store, name="store")
app.add_typer(images, name="images")


def main() -> None:
    """Runs the command line. Prints Palate's errors as one message and exits with 1."""
    try:
        app()
    except PalateError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(
            "interrupted; submitted jobs and services keep running: `palate jobs` and `palate services` list them",
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:
        # The reader of stdout has exited (`palate logs … | head`), which is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        # An error with a path is the user's. Without one it is a bug, and the traceback is needed.
        if error.filename is None:
            raise
        path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else error.filename
        print(
            visible(
                f"error: {path} cannot be used: {error.strerror}. Check the path, its permissions and the free space"
            ),
            file=sys.stderr,
        )
        sys.exit(1)
