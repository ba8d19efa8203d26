"""The order of rows, and how many batches run as one forward pass. Knows row lengths, no model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

_WANTED_TOKENS = {"cpu": 1024, "cuda": 4096}
"""Tokens per batch beyond which matrix products get no faster."""
_MEMORY_SHARE = 0.2
"""Share of free memory for the activations of a joined batch. The user did not choose its size, so keep it small."""
_ACTIVATION_FACTOR = 17
"""Values kept per token and layer, in units of the hidden size, without recomputation (arXiv 2205.05198, table 2: 34 bytes
in 16 bits)."""


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


def batches_at_once(
    batch_size: int, accumulation: int, tokens: Sequence[int], *, device: str, config: Any, free_bytes: int, width: int
) -> int:
    """How many of a step's micro-batches to run as one forward pass. Changes the speed, not the result.

    Small batches are bound by memory bandwidth. Batches are joined up to the size at which the device computes efficiently,
    within a share of the free memory, and never across optimizer steps.

    Args:
        batch_size: Rows per micro-batch, as configured.
        accumulation: Micro-batches per optimizer step.
        tokens: Tokens of each row, as packed.
        device: `cpu` or `cuda`.
        config: The model's text config.
        free_bytes: Free memory of the device.
        width: Bytes per value.

    Returns:
        A divisor of `accumulation`; 1 to join nothing.
    """
    long = sorted(tokens)[int(0.9 * len(tokens))]  # 90th percentile
    a_token = _ACTIVATION_FACTOR * width * config.num_hidden_layers * config.hidden_size
    most = min(_WANTED_TOKENS[device], _MEMORY_SHARE * free_bytes / a_token)
    fitting = [n for n in range(1, accumulation + 1) if accumulation % n == 0 and n * batch_size * long <= most]
    return max(fitting, default=1)
