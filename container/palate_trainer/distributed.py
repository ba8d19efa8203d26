"""The processes of one training: ranks, shares of the batches, and collective operations.

Knows torch.distributed and batch samplers, no trainer and no files. Torch is imported only in functions that need it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

T = TypeVar("T")

MEETING = "PALATE_MEETING_FILE"
"""Environment variable: the rendezvous file through which the launcher's workers find each other."""


def rank() -> int:
    """The global rank of this process, from 0, as the launcher sets it in the environment."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes of this training; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes files and lines."""
    return rank() == 0


def local_rank() -> int:
    """The rank of this process on its machine, which is also its GPU index."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def join_group(*, sharded: bool) -> None:
    """Joins the launcher's process group through a file. torch's default is a TCP port that any machine can reach.

    Does nothing in a single process or under another launcher. Collective.

    Args:
        sharded: Whether weights are sharded. Then tensors on the CPU are exchanged too.
    """
    meeting = os.environ.get(MEETING)
    if meeting is None or world_size() == 1:
        return
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
        backend = "cuda:nccl,cpu:gloo" if sharded else "nccl"
    dist.init_process_group(
        backend, init_method=f"file://{meeting}", rank=rank(), world_size=world_size(), timeout=timedelta(minutes=30)
    )


@lru_cache(maxsize=1)
def _control_group() -> Any:
    import torch.distributed as dist

    # gloo even with NCCL: these values are on the CPU, and an NCCL operation would wait for the GPU's queue. The long timeout
    # is safe, because the launcher ends all processes if one dies. Waiting for one that saves can take long.
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on any process. All get the same answer. Collective."""
    return sum_over_processes([float(flag)])[0] > 0


def sum_over_processes(values: Sequence[float]) -> list[float]:
    """Element-wise sums over all processes. Collective.

    Args:
        values: The same number of values on every process.
    """
    if world_size() == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=_control_group())
    return [float(value) for value in total]


def gather_rows(mine: T) -> list[T]:
    """Gathers one object per process in rank order, on all processes. Collective.

    Args:
        mine: A small picklable object, such as row numbers with their log-probabilities, or metrics.
    """
    if world_size() == 1:
        return [mine]
    import torch.distributed as dist

    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, mine, group=_control_group())
    return everyone


def wait_for_all() -> None:
    """A barrier. Collective."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier(group=_control_group())


def share_of_rank(batches: Sequence[T]) -> list[T]:
    """This process's batches, dealt round-robin, the same number on every process.

    The last round is filled up with copies of the last batch, because processes that share a sharded model must run the same
    number of forward passes. So gather results by row and do not count them.
    """
    processes = world_size()
    missing = -len(batches) % processes
    whole = [*batches, *[batches[-1]] * missing] if batches else []
    return whole[rank() :: processes]


class Rounds:
    """The batches of one epoch in full rounds: in each round every process takes one batch.

    Invariant: N processes train like one process with N times the accumulation, up to the last step of an epoch. In an
    incomplete last round, the processes without a batch take a stand-in, one earlier row with weight 0, and the real batches
    get a higher weight, so that each counts as it would in one process. (accelerate instead repeats rows from the start of the
    epoch, which trains them twice.)

    A step's loss is the mean over its rows, regardless of how they are batched. The epoch's last batch may be short and is
    weighted by its number of rows.

    Args:
        batches: A batch sampler that yields lists of row numbers. The same on every process.
        processes: Number of processes.
        accumulation: Rounds per optimizer step.
        last: Size of the last batch as a share of the others' size.
    """

    def __init__(self, batches: Any, processes: int, accumulation: int = 1, *, last: float = 1.0) -> None:
        self.batches, self.processes, self.accumulation, self.last = batches, processes, accumulation, last

    def set_epoch(self, epoch: int) -> None:
        inner = getattr(self.batches, "sampler", self.batches)
        if hasattr(inner, "set_epoch"):
            inner.set_epoch(epoch)

    def __len__(self) -> int:
        return self.rounds * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for batch in self.batches:
            yield batch
        for _ in range(len(self) - len(self.batches)):
            yield batch[:1]

    @property
    def rounds(self) -> int:
        """Rounds of one epoch."""
        return -(-len(self.batches) // self.processes)

    @property
    def steps(self) -> int:
        """Optimizer steps of one epoch."""
        return -(-self.rounds // self.accumulation)

    def weight(self, step: int, micro: int, process: int) -> float:
        """The weight of `process`'s batch in its step: 1, more if others are missing or short, 0 for a stand-in.

        Args:
            step: Optimizer step, from 0, over all epochs.
            micro: Round within the step, from 0.
            process: Rank.
        """
        first = step % self.steps * self.accumulation  # round of the epoch
        there = min(self.accumulation * self.processes, len(self.batches) - first * self.processes)
        slots = min(self.accumulation, self.rounds - first) * self.processes
        batch = (first + micro) * self.processes + process
        if batch >= len(self.batches):
            return 0.0
        is_last = first * self.processes + there == len(self.batches)
        share = self.last if batch == len(self.batches) - 1 else 1.0
        return share * slots / (there - (1.0 - self.last if is_last else 0.0))
