"""What keeps a text from naming a file of this machine. Knows texts, opens no file."""

from __future__ import annotations

import os


def expand_path(path: str | os.PathLike[str]) -> str:
    """Returns a path with `~` and `~user` replaced by the folders that they mean.

    Raises:
        ValueError: No file can have this path; the message says why and what to do, without the path.
    """
    text = os.fspath(path)
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
        raise ValueError(f"begins with {user!r}, and this machine has no such user: write the whole path, or ./{user}")
    return expanded
