"""What the commands share: options, NAME=VALUE, ages, a run by its name, the next command. Knows no command."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from palate_recipes.errors import ConfigurationError, RunNotFoundError
from palate_recipes.text import visible

if TYPE_CHECKING:
    from palate.evaluation.preferences import PreferenceRun
    from palate.job import TrainingJob
    from palate.predictor import Predictor

_NEWS_S = 5.0
"""Seconds between progress lines; on a terminal, one line is updated instead."""
EXAMPLE_MODEL = "smollm2-135m-instruct"
"""The model in printed commands. It trains on any machine, so the printed line runs unchanged."""

Checkpoint = Annotated[
    str | None,
    typer.Option(
        metavar="STEP", help="Serve a checkpoint of the job, which may still be running: latest, or a step such as 100."
    ),
]
Wide = Annotated[bool, typer.Option("--wide", help="Show all columns and whole lines, however long.")]

_UNITS_S = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. Like Ctrl-C: a `with` block deletes its service, and a job continues. Unlike it, ends any command."""


def pairs(entries: list[str], flag: str) -> dict[str, str]:
    """Parses a repeated option NAME=VALUE."""
    found = {}
    for entry in entries:
        name, separator, value = entry.partition("=")
        if not separator or not name:
            raise ConfigurationError(f"{flag}: expected NAME=VALUE, got {entry!r}")
        found[name.strip()] = value
    return found


def seconds(words: str, flag: str) -> float:
    """Parses a duration such as `2h` or `30min` to seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h|d|w)", words.strip())
    if found is None:
        raise ConfigurationError(
            f"{flag}: expected a duration such as 30min, 2h or 7d (units s, min, h, d, w), got {words!r}"
        )
    return float(found[1]) * _UNITS_S[found[2]]


def age(since: float) -> str:
    """Formats the time since `since` (seconds since the epoch) in its largest unit."""
    return largest_unit(time.time() - since)


def left(until: float) -> str:
    """Formats the time until `until` (seconds since the epoch) in its largest unit."""
    return largest_unit(until - time.time())


def moment(seconds: float) -> str:
    """Formats seconds since the epoch as local date and time."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, OSError, ValueError):  # a record may contain any number
        return f"{seconds:g} s since 1970"


def largest_unit(seconds: float) -> str:
    """Formats a duration in its largest unit."""
    passed = max(0, int(seconds))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if passed >= size:
            return f"{passed // size} {unit}"
    return f"{passed} s"


def program() -> list[str]:
    """Returns the words that start this installation's `palate` in the user's shell.

    `palate` is enough only if PATH leads to it: an environment that was not activated, such as that of `make quickstart`, is not on
    it, or another one is.
    """
    typed = Path(sys.argv[0])
    own = typed if typed.name == "palate" and typed.exists() else Path(sys.executable).with_name("palate")
    found = shutil.which("palate")
    if found and (not own.exists() or own.samefile(found)):
        return ["palate"]
    return [str(own)] if own.exists() else [sys.executable, "-P", "-m", "palate.cli"]


def say_next(*words: object, store: str | None = None) -> None:
    """Prints the next command, quoted for a shell, on stderr.

    Args:
        words: The arguments of `palate`.
        store: Where the command has to look, if that is not the default store.
    """
    where = f"PALATE_STORE={shlex.quote(store)} " if store else ""
    print(visible(f"next: {where}{shlex.join([*program(), *map(str, words)])}"), file=sys.stderr)


def open_run(name: str) -> TrainingJob | Predictor | PreferenceRun:
    """Returns the job or, if there is none, the service or the evaluation with this name."""
    from palate.job import TrainingJob
    from palate.predictor import Predictor
    from palate.session import get_default_session

    try:
        return TrainingJob.get(name)
    except RunNotFoundError:
        pass
    try:
        return Predictor(name)
    except RunNotFoundError:
        pass
    from palate.evaluation.preferences import PreferenceRun

    try:
        return PreferenceRun.get(name)
    except RunNotFoundError:
        raise RunNotFoundError(
            f"no job, service or held-out scoring run {name!r} in {get_default_session().store_uri}: `palate jobs` and "
            "`palate services` list jobs and services, and `palate eval JOB` lists the evaluations of a job"
        ) from None


class ProgressLine:
    """Prints progress to stderr: one updated line on a terminal, otherwise a line every few seconds."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._said = 0.0 if self._terminal else time.monotonic()
        self._open = False

    def show(self, line: Callable[[], str], *, is_last: bool) -> None:
        """Prints what `line` returns, if it is time for it."""
        now = time.monotonic()
        if not is_last and now - self._said < (0.2 if self._terminal else _NEWS_S):
            return
        self._said = now
        if self._terminal:
            print(f"\r\x1b[K{line()}", end="", file=sys.stderr, flush=True)
            self._open = True
        else:
            print(line(), file=sys.stderr, flush=True)

    def end(self) -> None:
        """Ends the updated line."""
        if self._open:
            print(file=sys.stderr)
            self._open = False
