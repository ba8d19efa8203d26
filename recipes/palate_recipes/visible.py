"""Makes text from elsewhere harmless to a terminal. Knows characters, not where a text comes from."""

from __future__ import annotations

import re

_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and newline, DEL, C1: they begin escape sequences
    "\u202a-\u202e\u2066-\u2069"  # bidirectional overrides: they show a line in another order than it has
    "\ud800-\udfff]"  # halves of characters: no output can encode them
)
_OVERWRITTEN = re.compile(r"[^\r\n]*\r+(?=[^\r\n])")


def visible(text: str) -> str:
    r"""Returns a text in which every control character but tab and newline is written out, as `\x1b`.

    Logs, answers, names and reasons come from stores and models; an escape sequence in one could rewrite the screen, set
    the clipboard, or hide a line. Of a line that overwrites itself, as progress bars do, the last state is left.
    """
    if "\r" in text:
        text = _OVERWRITTEN.sub("", text.replace("\r\n", "\n"))
    return _CONTROLS.sub(_written_out, text)


def _written_out(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
