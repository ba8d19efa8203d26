"""Text from people and strangers: safe for a terminal, near misses of names, paths, YAML. Knows no file and no setting."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

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


_LONGEST = 100


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Returns the known name that is most like a word, whatever their case; None when none is.

    Args:
        word: As it was given.
        known: What could have been meant.
        cutoff: Similarity from which on a name counts, 0 to 1 (`difflib.get_close_matches`).
    """
    import difflib  # only a mistake needs it

    folded = {name.casefold(): name for name in known}
    # Cut: of a long text every place would be compared with every name.
    found = difflib.get_close_matches(word[:_LONGEST].casefold(), folded, n=1, cutoff=cutoff)
    return folded[found[0]] if found else None


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Returns the part of a message that names what was meant, a space at its end; empty when nothing is near."""
    found = nearest(str(word), known)
    return f"did you mean {found!r}? " if found else ""


LONGEST = 4096
"""Bytes of a path, as Linux limits them (PATH_MAX)."""


def show_path(path: object) -> str:
    """Returns a path or URI in quotes as messages show it, cut where nobody reads on."""
    text = str(path)
    return repr(text if len(text) <= 200 else f"{text[:197]}...")


def expand_path(path: str | os.PathLike[str]) -> str:
    """Returns a path with `~` and `~user` replaced by the folders that they mean.

    Raises:
        ValueError: No file can have this path; the message says why and what to do, without the path.
    """
    text = os.fspath(path)
    if len(text) >= LONGEST:
        raise ValueError(f"has {len(text):,} characters, and a path has less than {LONGEST:,}: check the argument")
    if "\0" in text:
        raise ValueError("contains a NUL character (U+0000), which no file name can have: remove it")
    try:
        os.fsencode(text)  # names in other encodings pass: Python keeps their bytes as U+DC80 to U+DCFF
    except UnicodeEncodeError as error:
        raise ValueError(
            f"contains U+{ord(text[error.start]):04X}, half of a character, which no file name can have: correct the text"
        ) from None
    expanded = os.path.expanduser(text)
    user = text.partition("/")[0]
    if user.startswith("~") and expanded == text:
        raise ValueError(f"begins with {show_path(user)}, and this machine has no such user: write the whole path")
    return expanded


def load_yaml(text: str) -> Any:
    """Returns what a YAML text holds: lists, dicts, texts, numbers, dates.

    Tags of Python's objects are refused, and aliases of lists and mappings: a kilobyte of those can stand for gigabytes
    (merge keys copy what they name).

    Raises:
        ValueError: It is broken or refused; the message says where and why, on one line.
        ImportError: PyYAML is not installed.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                if not isinstance(self.anchors.get(event.anchor, yaml.ScalarNode), yaml.ScalarNode | type):
                    raise yaml.composer.ComposerError(
                        None, None, f"the alias *{event.anchor} of a list or mapping: write it out", event.start_mark
                    )
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # All but the first are what PyYAML lets through of a date, a number or a boolean that is not one.
        said = " ".join(str(error).split())
        raise ValueError(said[:300] or type(error).__name__) from None
