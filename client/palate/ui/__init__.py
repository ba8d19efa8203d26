"""Output for users: plain lines or the live view, tables and charts. Knows text and events, no run."""

from __future__ import annotations

import sys

from palate.ui.display import Display, NoDisplay, PlainDisplay, StageDisplay
from palate_recipes.text import visible


def note(text: str) -> None:
    """Prints lines for the user to stderr; escapes control characters, since the text may come from elsewhere."""
    print(visible(text), file=sys.stderr, flush=True)


def make_display(show: bool, title: str, *, stages: bool = False) -> Display:
    """Returns a view that is updated in place in a notebook and on a terminal, else plain lines.

    Args:
        show: Whether to show the whole log.
        title: Name of the run.
        stages: If not, whether to show the steps of a service's start; otherwise nothing.
    """
    if not show:
        return StageDisplay() if stages else NoDisplay()
    if "IPython" in sys.modules:
        from palate.ui.notebook import NotebookDisplay, in_notebook

        if in_notebook():
            return NotebookDisplay(title)
    if not sys.stderr.isatty():
        return PlainDisplay()
    from palate.ui.terminal import LiveDisplay

    return LiveDisplay(title)
