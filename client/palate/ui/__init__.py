"""What a person sees: plain lines or the live view, tables and charts. Knows no run."""

from __future__ import annotations

import sys

from palate.ui.display import Display, NoDisplay, PlainDisplay
from palate_recipes.text import visible


def note(text: str) -> None:
    """Writes lines for the user to stderr; control characters of text from elsewhere are written out."""
    print(visible(text), file=sys.stderr, flush=True)


def make_display(show: bool, title: str) -> Display:
    """Returns the display that fits where stderr goes.

    Args:
        show: False shows nothing.
        title: Name of the run.
    """
    if not show:
        return NoDisplay()
    if not sys.stderr.isatty():
        return PlainDisplay()
    from palate.ui.terminal import LiveDisplay

    return LiveDisplay(title)
