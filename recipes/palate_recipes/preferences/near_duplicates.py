"""Finds identical and nearly identical prompts. Knows rows, no file.

Prompts are nearly identical if the Jaccard similarity of their word triples (3-shingles, Broder 1997) is 0.8 or more.
"""

from __future__ import annotations

import re
from collections import Counter

from palate_recipes.preferences.messages import without_system
from palate_recipes.preferences.report import Location
from palate_recipes.preferences.row import Row

_SHINGLE = 3
_NEAR = 0.8
_FREQUENT = 1000
"""Triples are indexed for at most this many prompts: a frequent triple is no evidence, and its comparisons take too long."""

_WORD = re.compile(r"\w+")


class NearIndex:
    """Index of the prompts of one data set, to search with those of another."""

    def __init__(self) -> None:
        self._same: dict[int, int] = {}
        self._places: list[Location] = []
        self._sizes: list[int] = []
        self._shingles: dict[int, list[int]] = {}

    def __bool__(self) -> bool:
        return bool(self._places)

    def add(self, row: Row, place: Location) -> None:
        """Adds a row's prompt. `find` returns `place` for it."""
        words = prompt_words(row)
        index = len(self._places)
        shingles = _shingles(words)
        self._same.setdefault(hash(tuple(words)), index)
        self._places.append(place)
        self._sizes.append(len(shingles))
        for shingle in shingles:
            found = self._shingles.setdefault(shingle, [])
            if len(found) < _FREQUENT:
                found.append(index)

    def find(self, row: Row) -> tuple[bool, Location] | None:
        """Returns (True if identical, False if similar) and the place of a matching prompt; None if there is none.

        Ignores case, spaces, punctuation and the system turn.
        """
        words = prompt_words(row)
        same = self._same.get(hash(tuple(words)))
        if same is not None:
            return True, self._places[same]
        shingles = _shingles(words)
        shared: Counter[int] = Counter()
        for shingle in shingles:
            shared.update(self._shingles.get(shingle, ()))
        if not shared:
            return None
        index, count = shared.most_common(1)[0]
        if count >= _NEAR * (len(shingles) + self._sizes[index] - count):
            return False, self._places[index]
        return None


def prompt_words(row: Row) -> list[str]:
    """Returns the lowercase words of a row's conversation. If it has no words (`?!`), returns its texts."""
    turns = without_system(row.prompt)
    words = [word for turn in turns for word in _WORD.findall(turn.content.casefold())]
    return words or [turn.content for turn in turns]


def _shingles(words: list[str]) -> set[int]:
    if len(words) < _SHINGLE:
        return set()
    return {hash(tuple(words[at : at + _SHINGLE])) for at in range(len(words) - _SHINGLE + 1)}
