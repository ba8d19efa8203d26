"""All that looks different on a terminal: the live training view and tables. The one module that imports rich."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from palate.display import Display

_QUIET = ("step ",)
"""Lines that the live view itself shows better."""


class LiveDisplay:
    """Log lines above, one line below: step, loss, margin, accuracy, rate, time left."""

    wants_news = True

    def __init__(self, title: str) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            console=self._console,
            transient=False,
        )
        self._task = self._progress.add_task(title, total=None, facts="")
        self._begun = time.monotonic()

    def log(self, text: str) -> None:
        for line in text.splitlines():
            if not line.startswith(_QUIET):
                self._progress.console.print(Text(line, style="dim"))

    def metrics(self, data: bytes) -> None:
        for line in data.splitlines():
            entry = json.loads(line)
            if entry["kind"] == "start":
                self._progress.update(self._task, total=entry["total_steps"])
            elif entry["kind"] == "train":
                self._progress.update(self._task, completed=entry["step"], facts=facts(entry))

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()


def facts(entry: dict[str, Any]) -> str:
    """Returns one metrics object as a short line: loss, margin, accuracy, rate, time left."""
    shown = (
        ("loss", "loss", "{:.3f}"),
        ("margin", "rewards/margins", "{:+.2f}"),
        ("accuracy", "rewards/accuracies", "{:.2f}"),
        ("pairs/s", "pairs_per_s", "{:.2f}"),
    )
    parts = [f"{label} {form.format(entry[key])}" for label, key, form in shown if key in entry]
    if entry["step"] and "seconds" in entry:
        left = entry["seconds"] / entry["step"] * (entry["total_steps"] - entry["step"])
        parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
    return "  ".join(parts)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> None:
    """Prints rows to stdout: a table on a terminal, tab-separated lines with a header elsewhere."""
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            print("\t".join(str(cell).replace("\t", " ").replace("\n", " ") for cell in row))
        return
    table = Table(title=title or None, header_style="bold", title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console().print(table)


def print_side_by_side(question: str, left: tuple[str, str], right: tuple[str, str]) -> None:
    """Prints a question and two answers, beside each other on a terminal, below each other elsewhere.

    Args:
        question: What was asked.
        left: (heading, answer).
        right: (heading, answer).
    """
    if not sys.stdout.isatty():
        print(f"\nQ  {question}\n{left[0]}\n   {left[1]}\n{right[0]}\n   {right[1]}")
        return
    table = Table(title=Text(question, style="bold"), title_justify="left", show_lines=True, expand=True)
    table.add_column(left[0], ratio=1)
    table.add_column(right[0], ratio=1)
    table.add_row(Text(left[1]), Text(right[1]))
    Console().print(table)
