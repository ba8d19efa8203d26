"""HTML for notebooks: a run's progress, facts and curve. Self-contained; knows texts and events, no run.

Everything shown may come from a store, so every text is escaped. There is no script and no address.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from palate.runs.record import events_in
from palate.ui.display import Display, metrics_line
from palate_recipes.specs.events import Curves, Point
from palate_recipes.text import html_block, html_table, html_text, visible

_WIDTH, _HEIGHT, _MARGIN = 480, 120, 6

_LOG_LINES = 6
"""Log lines below the curve; the others are in `job.logs()`."""


def in_notebook() -> bool:
    """Returns whether this process is the kernel of a notebook. Imports nothing."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None and hasattr(module, "get_ipython") else None
    return hasattr(shell, "kernel")


class NotebookDisplay:
    """A progress bar, the curve of the loss and the last log lines, in one output that is updated in place."""

    wants_news = True

    def __init__(self, title: str) -> None:
        self._title, self._lines, self._events = title, list[str](), list[dict[str, Any]]()
        self._handle: Any = None
        self._has_news = False

    def log(self, text: str) -> None:
        # Made visible first: splitlines() would take each state of a progress bar for a line.
        self._lines = [*self._lines, *visible(text).splitlines()][-_LOG_LINES:]
        self._has_news = True

    def metrics(self, data: bytes) -> None:
        self._events += events_in(data)
        self._has_news = True

    def flush(self) -> None:
        if self._has_news:
            self._show()

    def __enter__(self) -> Display:
        from IPython.display import HTML, display

        self._handle = display(HTML(self._html()), display_id=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._show()

    def _show(self) -> None:
        from IPython.display import HTML

        self._has_news = False
        self._handle.update(HTML(self._html()))

    def _html(self) -> str:
        log = f"<pre>{html_text(chr(10).join(self._lines))}</pre>" if self._lines else ""
        return html_block(run_html(self._title, self._events), log)


def run_html(title: str, events: Iterable[Mapping[str, Any]], facts: Sequence[tuple[str, object]] = ()) -> str:
    """Returns a run as HTML: its facts, a progress bar, the last metrics, the loss curve and the reading.

    Args:
        title: Name of the run.
        events: Metrics events, in order.
        facts: Name and value of what else to show.
    """
    events = list(events)
    curves = Curves.of(events)
    parts = [f"<b>{html_text(title)}</b>", html_table(facts)]
    if curves.total_steps > 0:
        share = max(0.0, min(1.0, curves.steps / curves.total_steps))
        parts.append(
            f'<div><progress value="{share:.4f}" max="1" style="width:{_WIDTH}px"></progress>'
            f" step {curves.steps} of {curves.total_steps}</div>"
        )
    last = next((event for event in reversed(events) if event.get("kind") == "train"), None)
    if last is not None:
        parts.append(f"<div>{html_text(metrics_line(last))}</div>")
    parts.append(_curve(curves))
    end = next((event for event in reversed(events) if event.get("kind") == "end"), None)
    reading = end.get("reading") if end else None
    if isinstance(reading, Mapping):
        parts.append(f"<div><b>{html_text(reading.get('verdict', ''))}.</b> {html_text(reading.get('text', ''))}</div>")
    return html_block(*parts)


def _curve(curves: Curves) -> str:
    """Returns the loss over the steps as SVG: training as a line, validation as a dashed one; "" with fewer than two points."""
    series = {
        "training": _losses(curves.train),
        "validation": _losses(curves.validation),
    }
    losses = [loss for points in series.values() for _, loss in points]
    if len(series["training"]) < 2:
        return ""
    low, high = min(losses), max(losses)
    # A store may say that all steps are 0.
    steps = max(1, curves.total_steps, *(step for points in series.values() for step, _ in points))

    def at(step: int, loss: float) -> str:
        across = _MARGIN + (_WIDTH - 2 * _MARGIN) * max(0, step) / steps
        # Halves, because the difference of two floats can be infinite.
        down = _MARGIN + (_HEIGHT - 2 * _MARGIN) * ((high / 2 - loss / 2) / (high / 2 - low / 2) if high > low else 0.5)
        return f"{across:.1f},{down:.1f}"

    lines = [
        f'<polyline fill="none" stroke="currentColor" stroke-width="1.5"{dash} points="{" ".join(at(*point) for point in points)}">'
        f"<title>{name} loss</title></polyline>"
        for (name, points), dash in zip(series.items(), ("", ' stroke-dasharray="4 3"'), strict=True)
        if points
    ]
    legend = f"loss {high:.3f} (top) to {low:.3f}" + (", validation dashed" if series["validation"] else "")
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{legend}">'
        f"{''.join(lines)}</svg><div><small>{legend}</small></div>"
    )


def _losses(points: Sequence[Point]) -> list[tuple[int, float]]:
    """Returns step and loss of at most one point per pixel, so that a long run does not fill the notebook. Keeps the last."""
    known = [(point.step, point.loss) for point in points if point.loss is not None]
    return known[:: -(len(known) // _WIDTH + 1)][::-1]
