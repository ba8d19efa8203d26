"""The known name that a misspelt one may mean. Knows no names of its own."""

from __future__ import annotations

from collections.abc import Iterable

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
