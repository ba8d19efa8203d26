"""Which rows an optimizer step takes, and how many of them go through the model at once. Knows row lengths, no model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

_WANTED_TOKENS = {"cpu": 1024, "cuda": 4096}
"""Tokens in a batch from which on more of them make the matrix products no faster."""
_MEMORY_SHARE = 0.2
"""Of the free memory, for the activations of a batch that was not asked for by size."""
_ACTIVATION_FACTOR = 17
"""Values kept a token and layer, in hidden sizes, without recomputation (arXiv 2205.05198, table 2: 34 bytes in 16 bits)."""


class RowSampler(Sampler[int]):
    """Row indices of one epoch, shuffled. The order depends on seed and epoch alone: a resumed run sees the same one."""

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
    """Shuffled, but rows of similar length share a batch, so that little of it is padding: for batches that have any."""

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
        # The short batch stays last, or every batch after it would be cut out of two.
        return (row for batch in [*batches, short] for row in batch)


def batches_at_once(
    batch_size: int, accumulation: int, tokens: Sequence[int], *, device: str, config: Any, free_bytes: int, width: int
) -> int:
    """How many of a step's batches can go through the model as one, which changes their speed and no result.

    A batch of few tokens leaves the processor waiting for memory. As many batches are joined as the device computes
    better together, and as fit a part of the free memory; never more than one step has.

    Args:
        batch_size: Rows of a batch, as asked for.
        accumulation: Batches of a step.
        tokens: Of every row, as packed.
        device: `cpu` or `cuda`.
        config: The model's text config.
        free_bytes: Free memory of the device.
        width: Bytes of a value.

    Returns:
        A divisor of `accumulation`, 1 when nothing is to be joined.
    """
    long = sorted(tokens)[int(0.9 * len(tokens))]  # of ten rows one is longer
    a_token = _ACTIVATION_FACTOR * width * config.num_hidden_layers * config.hidden_size
    most = min(_WANTED_TOKENS[device], _MEMORY_SHARE * free_bytes / a_token)
    fitting = [n for n in range(1, accumulation + 1) if accumulation % n == 0 and n * batch_size * long <= most]
    return max(fitting, default=1)
