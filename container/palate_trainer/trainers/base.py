"""What Palate adds to every TRL trainer: own row order, packed batches, finite losses, several processes. Knows no loss."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from palate_recipes.errors import NotFiniteError
from palate_trainer.distributed import Rounds, gather_rows, rank, world_size
from palate_trainer.fast.packing import EXACT, ROUNDED, Trial, rounds_activations, try_fast_path
from palate_trainer.fast.tree import TreeCollator
from palate_trainer.samplers import RowSampler, SimilarLengths
from palate_trainer.sharding import enter_fsdp


class DistributedMixin:
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


class PalateMixin(DistributedMixin):
    """What all trainers share; mixed in before TRL's class."""

    note: Callable[[str], None] = staticmethod(lambda line: None)
    allow_fast: bool = True
    """Whether this run may compute otherwise than TRL does."""

    trial: Trial | None = None
    """What the model takes of the fast path, once it was tried."""

    def pack(self) -> None:
        """Gives the model what it can take of the fast path; the first call decides.

        DPO's constructor scores the reference already, so that call comes from within it.
        """
        if self.trial is not None:
            return
        if not self.allow_fast:
            self.trial = Trial("this run is TRL's own way", fused=False)
            return
        lengths = list(self.train_dataset["length"])  # type: ignore[attr-defined]
        shortest = sorted(range(len(lengths)), key=lengths.__getitem__)[:2]
        rows = [self.train_dataset[row] for row in shortest]  # type: ignore[attr-defined]
        collator = self.data_collator  # type: ignore[attr-defined]
        packable = isinstance(collator, TreeCollator)

        def collate(packed: bool) -> dict[str, Any]:
            if packable:
                collator.enabled = packed
            batch: dict[str, Any] = self._prepare_inputs(collator(rows))  # type: ignore[attr-defined]
            return batch

        rounded = self.args.bf16 or self.args.fp16 or rounds_activations(self.model)  # type: ignore[attr-defined]
        trial = try_fast_path(
            [self.model, getattr(self, "ref_model", None)],  # type: ignore[attr-defined]
            collate,
            autocast=self.accelerator.autocast,  # type: ignore[attr-defined]
            longest=max(lengths),
            tolerance=ROUNDED if rounded else EXACT,
            packable=packable,
            options={"output_router_logits": True} if self.aux_loss_enabled else {},  # type: ignore[attr-defined]
        )
        # One order of rows for all processes: where one cannot pack (its memory may be the smaller), none does.
        trial = next((one for one in gather_rows(trial) if one.reason is not None), trial)
        self.trial = trial
        if packable:
            collator.enabled = trial.reason is None
        if trial.failures:
            self.note(
                "WARNING: the fast path failed in its trial, and this run goes without it: the same losses, more time. "
                + "; ".join(trial.failures)
            )
        elif packable and trial.reason is not None:
            self.note(
                f"note: prompts are encoded once an answer, not once a pair, because of this model: {trial.reason}"
            )

    step_loss: float = 0.0
    """Loss of the step under way, a mean over its micro-batches; whoever reads it at the step's end sets it back to 0."""

    _tokens: torch.Tensor | int = 0
    """Tokens trained on since the last log line, on the device: a count there does not wait for it."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.weight(self._micro):  # a stand-in's tokens are nobody's
            self._tokens = self._tokens + count_tokens(args[1])
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        value = float(loss)
        if not math.isfinite(value):
            raise NotFiniteError(
                f"The loss became {value} at step {self.state.global_step + 1}."  # type: ignore[attr-defined]
                " Lower learning_rate (a tenth is a good try) or max_grad_norm, or train in bfloat16 or float32 instead of float16."
            )
        self.step_loss += value
        return loss

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> RowSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset  # type: ignore[attr-defined]
        args = self.args  # type: ignore[attr-defined]
        if getattr(self.data_collator, "enabled", False):  # type: ignore[attr-defined]
            self.order = RowSampler(len(rows), args.seed)  # a packed batch has no padding to save
        else:
            self.order = SimilarLengths(list(rows["length"]), args.per_device_train_batch_size, args.seed)
        return self.order

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if world_size() > 1:
            self.put_metrics_together()
        if any(name.startswith("eval_") for name in logs):
            rows, size = len(self.eval_dataset), self.args.per_device_eval_batch_size  # type: ignore[attr-defined]
            sizes = [size] * (rows // size) + ([rows % size] if rows % size else [])
            self.average(self._metrics["eval"], sizes)  # type: ignore[attr-defined]
        elif "loss" in logs:
            self.average(self._metrics["train"], [])  # type: ignore[attr-defined]
            logs["tokens"] = sum(gather_rows(int(self._tokens)))
            self._tokens = 0
        super().log(logs, start_time)  # type: ignore[misc]

    def average(self, metrics: dict[str, list[float]], sizes: list[int]) -> None:
        """Averages metrics where TRL's mean over batches is not one over rows: the last batch may be shorter.

        Args:
            metrics: Values of each batch by name, changed in place; TRL averages what is in the lists after this.
            sizes: Rows of each batch of an evaluation; empty in training.
        """
        for values in metrics.values():
            if sizes and len(values) >= len(sizes):  # beyond them: a stand-in of a process without a batch
                values[:] = [sum(v * n for v, n in zip(values, sizes, strict=False)) / sum(sizes)]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL would put a README with a hub's wording beside the checkpoints."""

    def use_float32_updates(self) -> None:
        """Casts what is trained to float32: TRL makes QLoRA adapters bfloat16, which the float16 scaler cannot take."""
        for parameter in self.model.parameters():  # type: ignore[attr-defined]
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def count_tokens(batch: dict[str, Any]) -> torch.Tensor:
    """Tokens of a batch without padding, a pair's prompt once although both answers follow a copy of it.

    Args:
        batch: As TRL's collators make it; with `completion_mask` and no `label`, rows stand as (chosen rows, rejected rows).

    Returns:
        A scalar on the batch's device.
    """
    mask: torch.Tensor | None = batch.get("attention_mask")
    if mask is None:
        return torch.tensor(batch["input_ids"].numel(), device=batch["input_ids"].device)
    if "completion_mask" not in batch or "label" in batch:
        return mask.sum()
    chosen, _ = mask.chunk(2)
    completion_mask: torch.Tensor = batch["completion_mask"]
    _, rejected_answers = completion_mask.chunk(2)
    return chosen.sum() + rejected_answers.sum()
