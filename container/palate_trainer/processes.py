"""A TRL trainer as one of several processes: its batches, its loss's weight, its metrics. Knows TRL's hooks, no data and no files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from palate_trainer.parallel import Rounds, gather_rows, rank, world_size
from palate_trainer.sharding import enter_fsdp


class OneOfSeveral:
    """What a trainer needs to be one of several processes, or the only one.

    TRL gathers two dozen values a batch from all processes. Here each keeps its own, and they are put together when they
    are logged: batches need not be of one size, and nobody waits.
    """

    rounds: Rounds
    """The batches of training, as they are dealt."""

    _micro = 0
    """Rounds of the step under way whose loss has been computed."""

    def _get_dataloader(
        self,
        dataset: Dataset,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Dataset], Any] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        args = self.args  # type: ignore[attr-defined]
        order = (sampler_fn(dataset) if sampler_fn else None) or SequentialSampler(dataset)
        last = (len(dataset) - 1) % batch_size + 1
        rounds = Rounds(
            BatchSampler(order, batch_size, drop_last=False),
            world_size(),
            args.gradient_accumulation_steps,
            last=last / batch_size,
        )
        if is_training:
            self.rounds = rounds
        if world_size() == 1:
            return super()._get_dataloader(  # type: ignore[misc]
                dataset, description, batch_size, lambda dataset: order, is_training, dataloader_key
            )
        return self.accelerator.prepare(  # type: ignore[attr-defined]
            DataLoader(
                dataset,
                batch_sampler=rounds,
                collate_fn=self.data_collator,  # type: ignore[attr-defined]
                pin_memory=args.dataloader_pin_memory,
            )
        )

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        enter_fsdp(self)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._micro = 0
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def weight(self, micro: int) -> float:
        """What this process's batch counts in the step under way; 0 for a stand-in."""
        return self.rounds.weight(self.state.global_step, micro, rank())  # type: ignore[attr-defined]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if world_size() == 1:
            loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
            if not self.model.training:  # type: ignore[attr-defined]
                return loss
            self._micro += 1
            return self.weighted(loss, self.weight(self._micro - 1))
        metrics = self._metrics  # type: ignore[attr-defined]
        if not self.model.training:  # type: ignore[attr-defined]
            with self._by_itself():
                loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
            metrics["eval"]["loss"].append(float(loss))
            return loss
        weight = self.weight(self._micro)
        self._micro += 1
        before = None if weight else {name: list(values) for name, values in metrics["train"].items()}
        tokens = self._total_train_tokens  # type: ignore[has-type]
        with self._by_itself():
            loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if before is not None:  # a stand-in teaches nothing and is in no average
            metrics["train"] = defaultdict(list, before)
            self._total_train_tokens = tokens
        return self.weighted(loss, weight)

    def weighted(self, loss: torch.Tensor, weight: float) -> torch.Tensor:
        """The loss of one batch as it enters the step, where it is a mean over the rows of its batch."""
        return loss * weight

    @contextmanager
    def _by_itself(self) -> Iterator[None]:
        """Within it, what TRL would gather from all processes is this process's alone."""
        accelerator = self.accelerator  # type: ignore[attr-defined]
        accelerator.gather = accelerator.gather_for_metrics = lambda values, *args, **kwargs: values
        try:
            yield
        finally:
            del accelerator.gather, accelerator.gather_for_metrics

    def put_metrics_together(self) -> None:
        """Makes the values that TRL is about to average those of all processes, batch by batch in the order of the data."""
        mode = "train" if self.model.training else "eval"  # type: ignore[attr-defined]
        mine = self._metrics[mode]  # type: ignore[attr-defined]
        everyone = gather_rows((dict(mine), self._total_train_tokens))
        mine.clear()
        names = {name: None for values, _ in everyone for name in values if name != "num_tokens"}
        for name in names:
            columns = [values.get(name, []) for values, _ in everyone]
            longest = max(map(len, columns))
            mine[name] = [column[row] for row in range(longest) for column in columns if row < len(column)]
        if any("num_tokens" in values for values, _ in everyone):
            mine["num_tokens"] = [sum(tokens for _, tokens in everyone)]
