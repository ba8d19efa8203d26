"""The order of rows. Knows row lengths, no model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler


class RowSampler(Sampler[int]):
    """Shuffled row indices of one epoch. The order depends on seed and epoch only, so a resumed run sees the same order."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return iter(self._shuffled())

    def _shuffled(self) -> list[int]:
        rows = list(range(self.rows))
        random.Random(f"{self.seed}/{self.epoch}").shuffle(rows)
        return rows


class SimilarLengths(RowSampler):
    """Shuffled batches of rows with similar lengths, to reduce padding. Not needed for packed batches, which have none."""

    _BATCHES_A_POOL = 8

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        super().__init__(len(lengths), seed)
        self.lengths, self.batch_size = lengths, batch_size

    def __iter__(self) -> Iterator[int]:
        rows, size = self._shuffled(), self.batch_size
        batches: list[list[int]] = []
        short: list[int] = []
        for start in range(0, len(rows), size * self._BATCHES_A_POOL):
            pool = sorted(rows[start : start + size * self._BATCHES_A_POOL], key=self.lengths.__getitem__)
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
            short = batches.pop() if len(batches[-1]) < size else []
        random.Random(f"{self.seed}/{self.epoch}/batches").shuffle(batches)
        # The short batch must stay last: the batch sampler cuts every `size` rows and would split all batches after it.
        return (row for batch in [*batches, short] for row in batch)
