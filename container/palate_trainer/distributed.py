"""The processes of one training: which one this is, its share of the batches, and what all of them agree on.

Knows torch.distributed and batch samplers, no trainer and no files. Torch is imported only where a function needs it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

T = TypeVar("T")

MEETING = "PALATE_MEETING_FILE"
"""Environment variable in which the launcher names the file by which its workers find each other."""


def rank() -> int:
    """This process among all of the training, from 0; the launcher says it in the environment."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes of this training; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes files and lines."""
    return rank() == 0


def local_rank() -> int:
    """The index of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def join_group(*, sharded: bool) -> None:
    """Makes this worker one of its launcher's group, over a file: torch's own way is a TCP port open to every machine.

    Does nothing in a process alone, or under another launcher. Collective.

    Args:
        sharded: Whether weights are split over the processes: then what is on the CPU is exchanged as well.
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

    # Over gloo also beside NCCL: what is agreed on lies on the CPU, and no GPU has to finish its queue for it. A process
    # that is lost ends the others through the launcher, so waiting for a slow one (who saves) needs no short limit.
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on one process at least; the same answer on all. Collective."""
    return sum_over_processes([float(flag)])[0] > 0


def sum_over_processes(values: Sequence[float]) -> list[float]:
    """The sums of a row of numbers, one row a process. Collective.

    Args:
        values: As many numbers on every process.
    """
    if world_size() == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=_control_group())
    return [float(value) for value in total]


def gather_rows(mine: T) -> list[T]:
    """What every process hands in, in the order of their ranks; the same list on all. Collective.

    Args:
        mine: Anything that pickles and is small: row numbers with their log-probabilities, metrics.
    """
    if world_size() == 1:
        return [mine]
    import torch.distributed as dist

    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, mine, group=_control_group())
    return everyone


def wait_for_all() -> None:
    """Returns when every process has come here. Collective."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier(group=_control_group())


def share_of_rank(batches: Sequence[T]) -> list[T]:
    """The batches that fall to this process, dealt in turn; as many on every process.

    What is missing to a whole round is filled with the last batch again: processes that share one model's weights must
    take the same number of forward passes. So results have to be gathered by row, not counted.
    """
    processes = world_size()
    missing = -len(batches) % processes
    whole = [*batches, *[batches[-1]] * missing] if batches else []
    return whole[rank() :: processes]


class Rounds:
    """The batches of one epoch, filled up to whole rounds: in a round every process takes one batch.

    N processes are then one process with N times the accumulation, to the last step of an epoch. There batches may be
    missing to a whole round: the processes without one take a stand-in, a row seen before with weight 0, and the
    batches that are there weigh more, so that each counts as it would in one process. (accelerate's own filling trains
    rows of the epoch's beginning twice.)

    A step's loss is the mean over its rows, however they were cut into batches: the epoch's last batch, which may be
    short, weighs as much as it has rows.

    Args:
        batches: A batch sampler; each batch is a list of row numbers. The same on every process.
        processes: How many take part.
        accumulation: Rounds of one optimizer step.
        last: Rows of the last batch, as a share of the others'.
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
        """What the batch of `process` counts in its step: 1, more where others are missing or short, 0 for a stand-in.

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
