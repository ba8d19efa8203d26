"""Keeps a service's log within bounds in its store: small parts become larger ones, the oldest go. Knows parts of a record, no program.

A service may run for months. Its readers find what was merged through `logs/index.json` (see `palate.record.LogIndex`).
"""

from __future__ import annotations

from palate.record import LogIndex, Record

KEPT_BYTES = 32 * 1024**2
"""What is kept of a service's log in its store; the oldest goes first."""

PART_BYTES = 1024**2
"""A part is this large, and a merged one."""

_MOST_PARTS = 600
_UNMERGED_PARTS = 200
"""So many of the newest stay as they are: a reader that follows may be at one of them."""


class Keeper:
    """Of one service's log, whose only writer holds it; raises StoreError, and does the same the next time.

    Args:
        record: The service.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._index = record.log_index()
        found = record.part_sizes("logs")
        self._parts = {number: size for number, size in found.items() if number >= self._index.following}
        self._left_over = [number for number in found if number < self._index.following]  # of a runner that was killed

    def added(self, number: int, size: int) -> None:
        """A part was written. Merges and removes what is over the bounds."""
        self._parts[number] = size
        self._remove_left_over()
        if len(self._parts) > _MOST_PARTS:
            self._merge()
        if self._index.size + sum(self._parts.values()) > KEPT_BYTES:
            self._drop()

    def _merge(self) -> None:
        """Merges the oldest parts into some of about PART_BYTES; they are in place before the index names them."""
        merged = list(self._index.merged)
        numbers = sorted(self._parts)[:-_UNMERGED_PARTS]
        while numbers:
            run = [numbers.pop(0)]
            while numbers and sum(self._parts[number] for number in (*run, numbers[0])) <= PART_BYTES:
                run.append(numbers.pop(0))
            content = b"".join(self._record.part("logs", number) for number in run)
            merged.append(self._record.write_merged(run[0], run[-1], content))
        self._publish(LogIndex(merged=tuple(merged), following=merged[-1].last + 1))

    def _drop(self) -> None:
        """Removes the oldest, down to seven eighths of the bound."""
        merged, numbers = list(self._index.merged), sorted(self._parts)
        size = self._index.size + sum(self._parts.values())
        gone = []
        while merged and size > KEPT_BYTES * 7 // 8:
            gone.append(merged.pop(0))
            size -= gone[-1].size
        following = self._index.following
        while len(numbers) > 1 and size > KEPT_BYTES * 7 // 8:
            size -= self._parts[numbers[0]]
            following = numbers.pop(0) + 1
        self._publish(LogIndex(merged=tuple(merged), following=following))
        for each in gone:
            self._record.store.delete(self._record.key("logs", each.name))

    def _publish(self, index: LogIndex) -> None:
        self._record.write_log_index(index)
        self._index = index
        self._left_over += [number for number in self._parts if number < index.following]
        self._parts = {number: size for number, size in self._parts.items() if number >= index.following}
        self._remove_left_over()

    def _remove_left_over(self) -> None:
        while self._left_over:
            self._record.delete_part("logs", self._left_over[-1])
            self._left_over.pop()
