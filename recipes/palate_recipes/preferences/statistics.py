"""Compact facts about streamed rows, and statistics over all of them. Knows numbers, no rule.

36 bytes per row: its number, a hash of the pair, a hash of the pair with swapped answers, and the lengths of its three texts.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any

HISTOGRAM_STEPS = 24


class Facts:
    """Facts about the rows of one or more files, in order."""

    def __init__(self) -> None:
        self._hashes = array("q")  # (rows, 3): number, hash of the pair, hash of the pair with its answers swapped
        self._sizes = array("I")  # (rows, 3): characters of prompt, chosen, rejected
        self._keep_hash, self._keep_size = self._hashes.append, self._sizes.append

    def __len__(self) -> int:
        return len(self._sizes) // 3

    def keep(self, number: int, asked: str, chosen: str, rejected: str) -> None:
        """Adds a row. A missing answer is empty."""
        keep = self._keep_hash
        keep(number)
        keep(hash((asked, chosen, rejected)))
        keep(hash((asked, rejected, chosen)))
        keep = self._keep_size
        keep(len(asked))
        keep(len(chosen))
        keep(len(rejected))

    def keep_all(
        self, numbers: Sequence[int], asked: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]
    ) -> None:
        """Adds many rows, in a third of the time of `keep`."""
        pairs = map(hash, zip(asked, chosen, rejected, strict=True))
        swapped = map(hash, zip(asked, rejected, chosen, strict=True))
        self._hashes.extend(chain.from_iterable(zip(numbers, pairs, swapped, strict=True)))
        sizes = zip(map(len, asked), map(len, chosen), map(len, rejected), strict=True)
        self._sizes.extend(chain.from_iterable(sizes))

    def number(self, index: int) -> int:
        """The number of a row in its file."""
        return self._hashes[3 * index]

    def sizes(self) -> Any:
        """Characters of prompt, chosen and rejected.  # uint32 (rows, 3)"""
        import numpy as np

        return np.frombuffer(self._sizes, dtype=np.uint32).reshape(-1, 3)

    def repeats(self) -> tuple[Any, Any]:
        """Duplicate rows: their indexes in order, and the index of the first equal row for each."""
        import numpy as np

        pairs, _ = self._columns()
        order = np.argsort(pairs, kind="stable")  # rows of one hash stay in file order
        ordered = pairs[order]
        later = np.sort(order[np.flatnonzero(ordered[1:] == ordered[:-1]) + 1])
        return later, order[np.searchsorted(ordered, pairs[later])]

    def mirrored(self) -> tuple[Any, Any]:
        """Rows that repeat an earlier row with swapped answers: their indexes in order, and the earlier row's for each."""
        import numpy as np

        pairs, swapped = self._columns()
        order = np.argsort(pairs, kind="stable")
        ordered = pairs[order]
        at = np.searchsorted(ordered, swapped)
        at[at == len(ordered)] = 0
        first = order[at]
        later = np.flatnonzero((ordered[at] == swapped) & (first < np.arange(len(pairs))))
        return later, first[later]

    def _columns(self) -> tuple[Any, Any]:
        import numpy as np

        hashes = np.frombuffer(self._hashes, dtype=np.int64).reshape(-1, 3)
        return hashes[:, 1], hashes[:, 2]


def percentiles(lengths: Any) -> dict[str, int]:
    """Returns mean, percentiles 50, 95 and 99, and maximum of an array of lengths."""
    import numpy as np

    p50, p95, p99 = np.percentile(lengths, (50, 95, 99))
    return {
        "mean": round(float(lengths.mean())),
        "p50": round(p50),
        "p95": round(p95),
        "p99": round(p99),
        "max": int(lengths.max()),
    }


def histogram(lengths: Any) -> list[int]:
    """Returns a histogram of lengths in HISTOGRAM_STEPS equal steps from 0 to the 99th percentile."""
    import numpy as np

    top = max(1, int(np.percentile(lengths, 99)))
    return [int(count) for count in np.histogram(lengths, bins=HISTOGRAM_STEPS, range=(0, top))[0]]
