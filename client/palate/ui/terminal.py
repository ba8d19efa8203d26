"""Terminal output: the live training view and tables. The only module that imports rich."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from palate.runs.record import events_in
from palate.ui.display import Display, metrics_line
from palate_recipes.specs.events import Curves
from palate_recipes.text import visible, visible_line

_QUIET = ("step ", "validation at step ", "reading: ")
"""Starts of log lines that the live view replaces."""

_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 40
_REFRESHES_A_SECOND = 4


class LiveDisplay:
    """Log lines, and below them a block with progress, the latest metrics, the time left and the loss curve.

    Everything comes from logs and metrics, so any process that can read the record can show it, at any time.
    """

    wants_news = True

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task(visible(title), total=None)
        self._curves = Curves()
        self._last: dict[str, Any] = {}
        self._seen = 0.0
        self._reading: dict[str, str] | None = None
        self._live = Live(
            console=self._console, get_renderable=self._block, refresh_per_second=_REFRESHES_A_SECOND, transient=False
        )

    def log(self, text: str) -> None:
        for line in visible(text).splitlines():
            if not line.startswith(_QUIET):
                self._console.print(Text(line, style="yellow" if "note: " in line[:16] else "dim"))

    def metrics(self, data: bytes) -> None:
        for entry in events_in(data):
            self._curves.add(entry)
            if entry["kind"] == "train":
                self._last, self._seen = entry, time.monotonic()
            elif entry["kind"] == "end":
                self._reading = entry.get("reading")
            if "total_steps" in entry:
                self._progress.update(self._task, total=entry["total_steps"], completed=entry["step"])

    def flush(self) -> None:
        pass  # the block is drawn by a timer

    def __enter__(self) -> Display:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop_task(self._task)
        self._live.stop()

    def _block(self) -> RenderableType:
        lines: list[RenderableType] = [self._progress.get_renderable()]
        if self._last:
            passed = time.monotonic() - self._seen
            validation = self._curves.validation[-1] if self._curves.validation else None
            lines.append(
                Text("  " + metrics_line(self._last, validation.loss if validation else None, passed_s=passed))
            )
        losses = [point.loss for point in self._curves.train if point.loss is not None]
        if len(losses) > 1 and not self._console.options.ascii_only:
            lines.append(Text(f"  loss {losses[0]:.3f} {sparkline(losses)} {losses[-1]:.3f}", style="cyan"))
        if self._reading is not None:
            lines.append(
                Text(visible("  {verdict}. ".format(**self._reading)), style="bold").append(
                    visible(self._reading["text"]), "none"
                )
            )
        return Group(*lines)


def sparkline(values: Sequence[float], width: int = _SPARK_WIDTH) -> str:
    """Returns a curve as up to `width` block characters, scaled from the lowest to the highest value."""
    cells = min(width, len(values))
    edges = [len(values) * cell // cells for cell in range(cells + 1)]
    # Of half the values: the sum or the difference of two floats can be infinite.
    means = [math.fsum(value / 2 / (b - a) for value in values[a:b]) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(_SPARKS[round((value - low) / span * (len(_SPARKS) - 1)) if span else 0] for value in means)


def bars(counts: Sequence[int]) -> str:
    """Returns a histogram with one block character per bin; an empty bin is a space."""
    top = max(counts, default=0)
    return "".join(_SPARKS[min(7, 8 * count // (top + 1))] if count else " " for count in counts)


@dataclass(frozen=True)
class Column:
    """A column of `print_table`.

    Attributes:
        title: Header.
        drop: On a narrow terminal, columns with the highest number are left out first; 0 is never left out.
        wraps: Text that may take several lines. Other cells, such as ids, are never broken, so that they can be copied.
    """

    title: str
    drop: int = 0
    wraps: bool = False


class LiveView:
    """A block on stdout that is redrawn in place; a context manager, so that the terminal is always restored."""

    def __init__(self) -> None:
        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=False)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def show_facts(self, facts: Sequence[tuple[str, object]]) -> None:
        """Draws names and values."""
        grid = Table.grid(padding=(0, _GAP, 0, 0))
        for name, value in facts:
            grid.add_row(Text(visible(name), style="bold"), Text(visible(str(value))))
        self._live.update(grid, refresh=True)

    def show_table(
        self, columns: Sequence[str | Column], rows: Sequence[Sequence[object]], *, below: str = "", wide: bool = False
    ) -> None:
        """Draws rows as `print_table` does, with text below.

        What is wider than the terminal is cut: a line that the terminal breaks could not be drawn again in its place.
        """
        every = _columns(columns)
        cells = [[visible_line(str(cell)) for cell in row] for row in rows]
        shown = [*range(len(every))] if wide else _fitting(every, cells, self._console.width)
        widths = dict(zip(shown, _widths(every, cells, shown, whole=True), strict=True))
        cut: dict[int, int] = {}
        if (excess := sum(widths.values()) - _GAP - self._console.width) > 0:
            # The longest, such as a name, since a state that is cut could be another one.
            longest = max(shown, key=lambda at: widths[at])
            cut[longest] = max(_LEAST_CUT_WIDTH, widths[longest] - _GAP - excess)
        table = _table(every, cells, shown, wraps=False, overflow="ellipsis", cut=cut)
        text = Text(visible(below), no_wrap=True, overflow="ellipsis")
        self._live.update(Group(table, text) if below else table, refresh=True)


_GAP = 2
_LEAST_CUT_WIDTH = 8  # of a name in a table that is redrawn
_LEAST_TEXT_WIDTH = 24
"""Width in characters below which a column of text is left out instead of wrapped."""


def print_table(
    columns: Sequence[str | Column], rows: Sequence[Sequence[object]], *, wide: bool = False, title: str = ""
) -> None:
    """Prints rows to stdout: a table on a terminal, otherwise tab-separated lines with a header and all columns.

    Args:
        columns: The columns; a plain title is a column that is always shown and never broken.
        rows: A cell per column.
        wide: Show all columns, one line per row, however long.
        title: Shown above a table.
    """
    every = _columns(columns)
    if not sys.stdout.isatty():
        for row in ([column.title for column in every], *rows):
            print("\t".join(visible_line(str(cell)) for cell in row))
        return
    cells = [[visible_line(str(cell)) if wide else visible(str(cell)) for cell in row] for row in rows]
    width = Console().width
    shown = [*range(len(every))] if wide else _fitting(every, cells, width)
    # If the rest is still too wide, the terminal breaks the lines: an id that rich has cut or broken could not be copied.
    console = Console(width=max(width, sum(_widths(every, cells, shown, whole=wide))))
    console.print(_table(every, cells, shown, wraps=not wide, overflow="fold", title=title), crop=False)
    if hidden := [every[at].title for at in range(len(every)) if at not in shown]:
        print(f"not shown at this width: {', '.join(hidden)}; --wide shows all", file=sys.stderr)


def _columns(columns: Sequence[str | Column]) -> list[Column]:
    return [Column(column) if isinstance(column, str) else column for column in columns]


def _fitting(every: Sequence[Column], cells: Sequence[Sequence[str]], width: int) -> list[int]:
    """Returns the positions of the columns that are shown at a width: all that fit, and those that are never left out."""
    shown = [*range(len(every))]
    while sum(_widths(every, cells, shown, whole=False)) - _GAP > width:
        last = max(shown, key=lambda at: every[at].drop)
        if not every[last].drop:
            break
        shown.remove(last)
    return shown


def _widths(every: Sequence[Column], cells: Sequence[Sequence[str]], shown: Sequence[int], *, whole: bool) -> list[int]:
    return [_width(every[at], [row[at] for row in cells], whole=whole) + _GAP for at in shown]


def _table(
    every: Sequence[Column],
    cells: Sequence[Sequence[str]],
    shown: Sequence[int],
    *,
    wraps: bool,
    overflow: Literal["fold", "ellipsis"],
    title: str = "",
    cut: Mapping[int, int] | None = None,
) -> Table:
    """Returns the table of the columns `shown`. `wraps`: columns of text may take several lines. `cut`: maximum widths."""
    table = Table(
        title=Text(visible(title)) if title else None,
        header_style="bold",
        title_justify="left",
        box=None,
        padding=(0, _GAP, 0, 0),
        pad_edge=False,
    )
    for at in shown:
        table.add_column(
            Text(visible(every[at].title)),
            no_wrap=not (wraps and every[at].wraps),
            overflow=overflow,
            max_width=(cut or {}).get(at),
        )
    for row in cells:
        table.add_row(*(Text(row[at]) for at in shown))
    return table


def _width(column: Column, cells: Sequence[str], *, whole: bool) -> int:
    """Returns the characters that a column needs; for text that wraps, unless `whole`, those that it needs at least."""
    full = max(cell_len(line) for line in (column.title, *(line for cell in cells for line in cell.splitlines())))
    return min(full, _LEAST_TEXT_WIDTH) if column.wraps and not whole else full


def print_side_by_side(question: str, left: tuple[str, str], right: tuple[str, str]) -> None:
    """Prints a question and two answers: side by side on a terminal, otherwise one below the other.

    Args:
        question: The prompt.
        left: (heading, answer).
        right: (heading, answer).
    """
    question, *answers = (visible(text) for text in (question, *left, *right))
    left, right = (answers[0], answers[1]), (answers[2], answers[3])
    if not sys.stdout.isatty():
        print(f"\nQ  {question}\n{left[0]}\n   {left[1]}\n{right[0]}\n   {right[1]}")
        return
    table = Table(title=Text(question, style="bold"), title_justify="left", show_lines=True, expand=True)
    table.add_column(Text(left[0]), ratio=1)
    table.add_column(Text(right[0]), ratio=1)
    table.add_row(Text(left[1]), Text(right[1]))
    Console().print(table)
