"""The command line: `palate …`. Each command is one call of the public API. Imports no ML library.

Results go to stdout, progress to stderr. An error is one message and exit code 1.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Annotated, Any

import typer
import typer.core

from palate.cli import chat, evaluate, experiments, machine, rollout, runs, top, train
from palate.cli.adapter import adapter
from palate.cli.data import data
from palate.cli.examples import add_examples
from palate.cli.flags import name_flags, usage_hint
from palate.cli.format import Terminated
from palate.cli.machine import images, store
from palate.cli.token import token
from palate_recipes import __version__
from palate_recipes.errors import PalateError
from palate_recipes.text import visible


class _Interrupted(Exception):
    """Ctrl-C was pressed. typer ends the process without a word on KeyboardInterrupt."""


class _Commands(typer.core.TyperGroup):
    """The commands, with Ctrl-C passed on to `main`, and hints added to usage errors."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise _Interrupted(*getattr(interrupt, "__notes__", ())) from interrupt
        except Exception as error:
            if hasattr(error, "format_message"):  # a usage error; its class has no public name
                error.message += usage_hint(error)  # type: ignore[attr-defined]
            raise


app = typer.Typer(
    name="palate",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
train.register(app)
experiments.register(app)
chat.register(app)
evaluate.register(app)
runs.register(app)
rollout.register(app)
top.register(app)
machine.register(app)
app.add_typer(token, name="token")
app.add_typer(adapter, name="adapter")
app.add_typer(data, name="data")
app.add_typer(store, name="store")
app.add_typer(images, name="images")
add_examples(app)
name_flags(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"palate {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Preference-tune an open model and serve it behind an OpenAI-compatible endpoint."""


_SAME_SIGTERM_S = 3.0
"""A SIGTERM within this time after another counts as the same one: a second exception would break off the first one's end."""


def _raise_terminated() -> None:
    """Makes SIGTERM raise Terminated."""
    received: list[float] = []

    def terminate(signum: int, frame: object) -> None:
        now = time.monotonic()
        if not received or now - received[-1] > _SAME_SIGTERM_S:
            received.append(now)
            raise Terminated

    signal.signal(signal.SIGTERM, terminate)


def main() -> None:
    """Runs the command line. Prints Palate's errors as one message and exits with 1."""
    _raise_terminated()
    try:
        app(prog_name="palate")  # also with `python -m palate.cli`
    except PalateError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        # Optional packages have their own errors, with the extra that has them. A missing required one is a broken installation.
        if (error.name or "palate").partition(".")[0].startswith("palate"):
            raise
        print(
            f"error: the package {(error.name or '').partition('.')[0]} is required, and it is missing or damaged:"
            " pip install --force-reinstall palate",
            file=sys.stderr,
        )
        sys.exit(1)
    except (_Interrupted, KeyboardInterrupt) as interrupt:
        known = [note for note in interrupt.args if isinstance(note, str)]  # what was waited for, and how to go on
        general = "submitted jobs and services keep running: `palate jobs` and `palate services` list them"
        terminated = isinstance(interrupt, Terminated) or isinstance(interrupt.__cause__, Terminated)
        what = "ended by SIGTERM" if terminated else "interrupted"
        print(visible("\n".join([what, *(known or [general])])), file=sys.stderr)
        sys.exit(143 if terminated else 130)
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
