"""Untrusted text: escaping for terminals and HTML, suggestions for misspelled names, paths, YAML. Knows no file and no setting."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 except tab and newline, DEL, C1: they start escape sequences
    "\u202a-\u202e\u2066-\u2069"  # bidirectional overrides: they change the displayed order of a line
    "\ud800-\udfff]"  # lone surrogates: they cannot be encoded
)
_OVERWRITTEN = re.compile(
    r"^[^\n]*\r(?=[^\r\n])", re.MULTILINE
)  # tried once per line, so that a long one takes linear time


def visible(text: str) -> str:
    r"""Escapes control characters except tab and newline, such as `\x1b`.

    Logs, answers, names and reasons come from stores and models. An escape sequence in them could rewrite the screen, set the
    clipboard, or hide a line. Of a line that overwrites itself with carriage returns (a progress bar) only the last state stays.
    """
    if "\r" in text:
        text = _OVERWRITTEN.sub("", text.replace("\r\n", "\n"))
    return _CONTROLS.sub(_written_out, text)


def visible_line(text: str) -> str:
    """Returns a text as `visible`, on one line: a newline in a name would look like a further row of a table."""
    return visible(text).replace("\t", " ").replace("\n", " ")


def _written_out(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


_CREDENTIALS_IN_URL = re.compile(r"://[^/\s@]+@")
_SHORTEST_SECRET = 6
"""Shorter values are not hidden: `true` or `1` are parts of many words."""


def without_secrets(text: str, names: Collection[str], environment: Mapping[str, str]) -> str:
    """Returns a text without the values of these variables and without user and password of URLs."""
    values = {environment.get(name, "") for name in names}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    return _CREDENTIALS_IN_URL.sub("://***@", text)


def html_text(value: object) -> str:
    """Returns a value as the text of an HTML element or of an attribute in quotes; control characters are escaped as `visible` does."""
    from html import escape  # imported here, because only notebooks need it

    return escape(visible(str(value)))


def html_table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """Returns rows of values as an HTML table, with every value escaped; "" without rows."""
    style = 'style="text-align:left;vertical-align:top;white-space:pre-line"'
    body = "".join(f"<tr>{''.join(f'<td {style}>{html_text(value)}</td>' for value in row)}</tr>" for row in rows)
    titles = "".join(f"<th {style}>{html_text(name)}</th>" for name in head)
    return f"<table>{f'<tr>{titles}</tr>' if head else ''}{body}</table>" if body else ""


def html_block(*parts: str) -> str:
    """Returns escaped parts as one element that notebooks show unchanged: they would typeset text between dollar signs as TeX."""
    # The classes by which MathJax 2 and MathJax 3 skip an element.
    return f'<div class="tex2jax_ignore mathjax_ignore">{"".join(parts)}</div>'


_LONGEST = 100


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Returns the known name most similar to a word, ignoring case; None if none is similar.

    Args:
        word: The name as given.
        known: The valid names.
        cutoff: Minimum similarity, 0 to 1 (`difflib.get_close_matches`).
    """
    import difflib  # imported here, because only error messages need it

    folded = {name.casefold(): name for name in known}
    # Cut to bound the time: the comparison is quadratic in the length.
    found = difflib.get_close_matches(word[:_LONGEST].casefold(), folded, n=1, cutoff=cutoff)
    return folded[found[0]] if found else None


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Returns "did you mean ...? " for a message, or "" if no name is similar."""
    found = nearest(str(word), known)
    return f"did you mean {found!r}? " if found else ""


LONGEST = 4096
"""Maximum bytes of a path on Linux (PATH_MAX)."""


def show_path(path: object) -> str:
    """Returns a path or URI in quotes for a message, cut to 200 characters."""
    text = str(path)
    return repr(text if len(text) <= 200 else f"{text[:197]}...")


def expand_path(path: str | os.PathLike[str]) -> str:
    """Returns a path with `~` and `~user` expanded.

    Raises:
        ValueError: No file can have this path. The message has the reason and the remedy, without the path.
    """
    text = os.fspath(path)
    if len(text) >= LONGEST:
        raise ValueError(
            f"has {len(text):,} characters, but a path must have fewer than {LONGEST:,}: check the argument"
        )
    if "\0" in text:
        raise ValueError("contains a NUL character (U+0000), which file names cannot contain: remove it")
    try:
        os.fsencode(text)  # names in other encodings pass: Python represents their bytes as U+DC80 to U+DCFF
    except UnicodeEncodeError as error:
        raise ValueError(
            f"contains the lone surrogate U+{ord(text[error.start]):04X}, which file names cannot contain: correct the text"
        ) from None
    expanded = os.path.expanduser(text)
    user = text.partition("/")[0]
    if user.startswith("~") and expanded == text:
        raise ValueError(f"begins with {show_path(user)}, but this machine has no such user: write the full path")
    return expanded


def load_yaml(text: str) -> Any:
    """Parses a YAML text: lists, dicts, strings, numbers, dates.

    Rejects tags of Python objects, and aliases of lists and mappings: a kilobyte of aliases can expand to gigabytes, because
    merge keys copy what they reference.

    Raises:
        ValueError: The text is invalid or rejected. The message has the place and the reason on one line.
        ImportError: PyYAML is not installed.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                if not isinstance(self.anchors.get(event.anchor, yaml.ScalarNode), yaml.ScalarNode | type):
                    raise yaml.composer.ComposerError(
                        None, None, f"alias *{event.anchor} of a list or mapping: write the value out", event.start_mark
                    )
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # Besides YAMLError, PyYAML raises the others for invalid dates, numbers and booleans.
        said = " ".join(str(error).split())
        raise ValueError(said[:300] or type(error).__name__) from None
