"""Prompts that are the same, or nearly so. Knows rows, no file.

Two prompts are nearly the same when they share four of five word triples (Jaccard similarity of 3-shingles, Broder 1997).
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
"""A triple that so many prompts share tells nothing, and comparing them all would take for ever."""

_WORD = re.compile(r"\w+")


class NearIndex:
    """Prompts of one data set, to be searched with those of another."""

    def __init__(self) -> None:
        self._same: dict[int, int] = {}
        self._places: list[Location] = []
        self._sizes: list[int] = []
        self._shingles: dict[int, list[int]] = {}

    def __bool__(self) -> bool:
        return bool(self._places)

    def add(self, row: Row, place: Location) -> None:
        """Adds a row's prompt; `place` is what `find` returns for it."""
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
        """Returns whether a row's prompt is there word for word or nearly, and where; None when it is not.

        Case, spaces and punctuation do not count; the system turn does not either.
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
    """Returns the words of a row's conversation, in lower case; its texts when there is none, as in `?!`."""
    turns = without_system(row.prompt)
    words = [word for turn in turns for word in _WORD.findall(turn.content.casefold())]
    return words or [turn.content for turn in turns]


def _shingles(words: list[str]) -> set[int]:
    if len(words) < _SHINGLE:
        return set()
    return {hash(tuple(words[at : at + _SHINGLE])) for at in range(len(words) - _SHINGLE + 1)}
