"""What Palate adds to every TRL trainer: row order, packed batches, finite losses, several processes. Knows no loss."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from palate_recipes.errors import NotFiniteError, TrainerError
from palate_recipes.specs.train import COMPLETE_MARK
from palate_trainer.distributed import Rounds, gather_rows, rank, world_size
from palate_trainer.fast.packing import EXACT, ROUNDED, Trial, rounds_activations, try_fast_path
from palate_trainer.fast.tree import TreeCollator
from palate_trainer.samplers import RowSampler, SimilarLengths
from palate_trainer.sharding import enter_fsdp


class DistributedMixin:
    """Runs a trainer in one or several processes.

    TRL gathers two dozen values per batch from all processes. Here each process keeps its own values until they are logged,
    so batches may differ in size and no process waits for another.
    """

    rounds: Rounds
    """The training batches of all processes."""

    _micro = 0
    """Rounds of the current step whose loss is computed."""

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
        """The weight of this process's batch in the current step; 0 for a stand-in."""
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
        if before is not None:  # a stand-in has weight 0 and must not enter any average
            metrics["train"] = defaultdict(list, before)
            self._total_train_tokens = tokens
        return self.weighted(loss, weight)

    def weighted(self, loss: torch.Tensor, weight: float) -> torch.Tensor:
        """Weights the loss of one batch. For losses that are means over the batch's rows."""
        return loss * weight

    @contextmanager
    def _by_itself(self) -> Iterator[None]:
        """Turns TRL's gathering off, so that this process's values stay its own."""
        accelerator = self.accelerator  # type: ignore[attr-defined]
        accelerator.gather = accelerator.gather_for_metrics = lambda values, *args, **kwargs: values
        try:
            yield
        finally:
            del accelerator.gather, accelerator.gather_for_metrics

    def put_metrics_together(self) -> None:
        """Merges the metrics of all processes, batch by batch in data order, before TRL averages them."""
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
    """Shared by all trainers. Must come before TRL's class in the bases."""

    note: Callable[[str], None] = staticmethod(lambda line: None)
    allow_fast: bool = True
    """Whether this run may use the fast path."""

    trial: Trial | None = None
    """The result of the fast path's trial, once it has run."""

    def pack(self) -> None:
        """Installs the parts of the fast path that the model supports. Only the first call has an effect.

        For DPO, TRL's constructor scores the reference, so the first call comes from there.
        """
        if self.trial is not None:
            return
        if not self.allow_fast:
            self.trial = Trial("the fast path is off in this run", fused=False)
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
        # Packing decides the order of rows, which all processes must share. If one cannot pack (less memory), none does.
        trial = next((one for one in gather_rows(trial) if one.reason is not None), trial)
        self.trial = trial
        if packable:
            collator.enabled = trial.reason is None
        if trial.failures:
            self.note(
                "WARNING: the fast path failed its trial, so this run does not use it: same losses, more time. "
                + "; ".join(trial.failures)
            )
        elif packable and trial.reason is not None:
            self.note(
                f"note: this model cannot share a prompt between two answers and encodes it for each: {trial.reason}"
            )

    step_loss: float = 0.0
    """Mean loss of the current step's micro-batches. The reader resets it to 0 at the end of the step."""

    _tokens: torch.Tensor | int = 0
    """Tokens trained since the last log line. Counted on the device, because reading a value would wait for the GPU."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.weight(self._micro):  # a stand-in's tokens do not count
            self._tokens = self._tokens + count_tokens(args[1])
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        value = float(loss)
        if not math.isfinite(value):
            raise NotFiniteError(
                f"The loss is {value} at step {self.state.global_step + 1}."  # type: ignore[attr-defined]
                " Lower learning_rate (try a tenth) or max_grad_norm, or train in bfloat16 or float32 instead of float16."
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

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates. If that is cut short, random numbers continue as before it.

        The checkpoint that a stop writes then holds the state after its step, and a resumed run can repeat the evaluation.
        """
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        try:
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
            torch.cuda.set_rng_state_all(cuda)
            raise

    keeps_best: bool = False
    """Whether a better evaluation writes a checkpoint, for `load_best`."""

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        better = super()._determine_best_metric(*args, **kwargs)  # type: ignore[misc]
        # A checkpoint of this step may have been written before the evaluation, at the end of an epoch. It is complete, may be
        # on its way to the store, and must not change.
        if better and self.keeps_best and not self._checkpoint_exists(self.state.global_step):  # type: ignore[attr-defined]
            self.control.should_save = True  # type: ignore[attr-defined]
        return bool(self.control.should_save)  # type: ignore[attr-defined]  # with save_strategy="best" it becomes this

    def _checkpoint_exists(self, step: int) -> bool:
        return (Path(self.args.output_dir) / f"checkpoint-{step}" / COMPLETE_MARK).exists()  # type: ignore[attr-defined]

    def load_best(self) -> int:
        """Loads the weights of the best evaluation, and returns its step.

        Raises:
            TrainerError: Its checkpoint is missing, or there was no evaluation.
        """
        state = self.state  # type: ignore[attr-defined]
        if state.best_global_step is None:
            raise TrainerError(
                "load_best_model_at_end: no evaluation had a finite metric_for_best_model. Check the validation data, or omit it"
            )
        folder = Path(self.args.output_dir) / f"checkpoint-{state.best_global_step}"  # type: ignore[attr-defined]
        if not folder.is_dir():
            raise TrainerError(
                f"load_best_model_at_end: {folder}, the checkpoint of the best evaluation, is missing. Train again, or resume from "
                "an earlier checkpoint"
            )
        state.best_model_checkpoint = str(folder)  # a resumed state has the path of another machine
        self._load_best_model()  # type: ignore[attr-defined]
        return int(state.best_global_step)

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
        """Replaces batch values by their mean over rows. TRL averages over batches, but the last batch may be shorter.

        Args:
            metrics: Values per batch by name, changed in place. TRL then averages each list.
            sizes: Rows of each evaluation batch; empty in training.
        """
        for values in metrics.values():
            if sizes and len(values) >= len(sizes):  # values beyond `sizes` come from stand-ins
                values[:] = [sum(v * n for v, n in zip(values, sizes, strict=False)) / sum(sizes)]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing. TRL would write a README for the Hub next to the checkpoints."""

    def use_float32_updates(self) -> None:
        """Casts trainable weights to float32. TRL casts QLoRA adapters to bfloat16, which float16's scaler cannot handle."""
        for parameter in self.model.parameters():  # type: ignore[attr-defined]
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def count_tokens(batch: dict[str, Any]) -> torch.Tensor:
    """Tokens of a batch without padding. A pair's prompt counts once, although each answer has a copy of it.

    Args:
        batch: From TRL's collators. With `completion_mask` and no `label`, the rows are (chosen rows, rejected rows).

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
