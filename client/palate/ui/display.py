"""Progress of a run behind one interface: nothing, plain lines, or the live view. Knows logs and metrics, no run.

All output goes to stderr: stdout is for results.
"""

from __future__ import annotations

import sys
from typing import Protocol

from palate_recipes.text import visible


class Display(Protocol):
    """Receives the logs and metrics of a run; a context manager, so that the terminal is always restored."""

    wants_news: bool
    """False if logs and metrics need not be fetched at all."""

    def log(self, text: str) -> None:
        """Shows whole lines of the log."""
        ...

    def metrics(self, data: bytes) -> None:
        """Shows whole lines of metrics.jsonl."""
        ...

    def __enter__(self) -> Display: ...

    def __exit__(self, *exception: object) -> None: ...


class NoDisplay:
    """Shows nothing."""

    wants_news = False

    def log(self, text: str) -> None:
        pass

    def metrics(self, data: bytes) -> None:
        pass

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class PlainDisplay(NoDisplay):
    """Log lines, for pipes, CI and notebooks: the trainer's lines already contain step, loss and throughput."""

    wants_news = True

    def log(self, text: str) -> None:
        text = visible(text)
        print(text, end="" if text.endswith("\n") else "\n", file=sys.stderr, flush=True)
