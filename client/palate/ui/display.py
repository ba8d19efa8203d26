"""What a person sees while a run goes on, behind one interface: nothing, plain lines, or the live view. Knows no run.

All of it goes to stderr: stdout belongs to results.
"""

from __future__ import annotations

import sys
from typing import Protocol

from palate_recipes.text import visible


class Display(Protocol):
    """Receives what a run says; a context manager, so that a terminal is always given back."""

    wants_news: bool
    """False when logs and metrics need not be fetched at all."""

    def log(self, text: str) -> None:
        """Takes a piece of the log, whole lines."""
        ...

    def metrics(self, data: bytes) -> None:
        """Takes a piece of metrics.jsonl, whole lines."""
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
    """Log lines, for pipes, CI and notebooks: the trainer's own lines already carry step, loss and rate."""

    wants_news = True

    def log(self, text: str) -> None:
        text = visible(text)
        print(text, end="" if text.endswith("\n") else "\n", file=sys.stderr, flush=True)
