"""What keeps a text from naming a file of this machine. Knows texts, opens no file."""

from __future__ import annotations

import os

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
