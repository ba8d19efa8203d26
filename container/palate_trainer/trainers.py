"""TRL's trainers with Palate's additions: own tokens in, similar lengths together, finite losses only. Knows TRL, no files of a run."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from palate_trainer.errors import TrainerError
from palate_trainer.loading import lora_config, uses_adapter
from palate_trainer.spec import CHECKPOINTS_DIR, TrainSpec
from palate_trainer.tokens import TokenPair

_PROGRESS_EVERY_S = 10.0


class SimilarLengths(Sampler[int]):
    """Row indices of one epoch: shuffled, but rows of similar length share a batch, so that little of it is padding.

    The order depends on seed and epoch alone, so a resumed run sees the order that the first one saw.
    """

    _BATCHES_A_POOL = 8

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        shuffle = random.Random(f"{self.seed}/{self.epoch}").shuffle
        rows = list(range(len(self.lengths)))
        shuffle(rows)
        size, batches, short = self.batch_size, [], []
        for start in range(0, len(rows), size * self._BATCHES_A_POOL):
            pool = sorted(rows[start : start + size * self._BATCHES_A_POOL], key=self.lengths.__getitem__)
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
            short = batches.pop() if len(batches[-1]) < size else []
        shuffle(batches)
        # The short batch stays last, or every batch after it would be cut out of two.
        return (row for batch in [*batches, short] for row in batch)


class _Additions:
    """What both trainers share; mixed in before TRL's class."""

    step_loss: float = 0.0
    """Loss of the step under way, a mean over its micro-batches; whoever reads it at the step's end sets it back to 0."""

    _tokens: torch.Tensor | None = None
    """Tokens trained on since the last log line, on the device: a count there does not wait for it."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = count_tokens(args[1])
        self._tokens = tokens if self._tokens is None else self._tokens + tokens
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        value = float(loss)
        if not math.isfinite(value):
            raise TrainerError(
                f"The loss became {value} at step {self.state.global_step + 1}."  # type: ignore[attr-defined]
                " Lower learning_rate (a tenth is a good try) or max_grad_norm, or train in bfloat16 or float32 instead of float16."
            )
        self.step_loss += value
        return loss

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SimilarLengths:
        rows = self.train_dataset if train_dataset is None else train_dataset  # type: ignore[attr-defined]
        args = self.args  # type: ignore[attr-defined]
        self.order = SimilarLengths(list(rows["length"]), args.per_device_train_batch_size, args.seed)
        return self.order

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # TRL averages over batches; the last one may be shorter, so pairs are weighted by their batch here.
        if any(name.startswith("eval_") for name in logs):
            rows, size = len(self.eval_dataset), self.args.per_device_eval_batch_size  # type: ignore[attr-defined]
            sizes = [size] * (rows // size) + ([rows % size] if rows % size else [])
            for values in self._metrics["eval"].values():  # type: ignore[attr-defined]
                if len(values) == len(sizes):
                    values[:] = [sum(v * n for v, n in zip(values, sizes, strict=True)) / rows]
        elif self._tokens is not None:
            logs["tokens"] = int(self.accelerator.gather(self._tokens).sum())  # type: ignore[attr-defined]
            self._tokens = None
        super().log(logs, start_time)  # type: ignore[misc]

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
        batch: As TRL's collators make it; pairs have `completion_mask` and stand as (chosen rows, rejected rows).

    Returns:
        A scalar on the batch's device.
    """
    mask: torch.Tensor | None = batch.get("attention_mask")
    if mask is None:
        return torch.tensor(batch["input_ids"].numel(), device=batch["input_ids"].device)
    if "completion_mask" not in batch:
        return mask.sum()
    chosen, _ = mask.chunk(2)
    completion_mask: torch.Tensor = batch["completion_mask"]
    _, rejected_answers = completion_mask.chunk(2)
    return chosen.sum() + rejected_answers.sum()


class PairTrainer(_Additions, DPOTrainer):
    """DPO on rows that carry token ids already, with the reference scored once before the first step."""

    note: Callable[[str], None] = staticmethod(lambda line: None)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        # TRL keeps these values in a cache that misses too often and, under other truncation, hits wrongly.
        order = sorted(range(len(dataset)), key=dataset["length"].__getitem__, reverse=True)
        logps = torch.zeros(len(dataset), 2)  # (pairs, [chosen, rejected])
        said = time.monotonic()
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = self._prepare_inputs(self.data_collator([dataset[row] for row in rows]))
            logps[rows] = torch.stack(self.compute_ref_log_probs(self.model, batch), dim=1).float().cpu()
            if time.monotonic() - said > _PROGRESS_EVERY_S:
                said = time.monotonic()
                self.note(f"reference {name} {start + len(rows)}/{len(order)} pairs")
        columns = {"ref_chosen_logps": logps[:, 0].tolist(), "ref_rejected_logps": logps[:, 1].tolist()}
        for column, values in columns.items():
            dataset = dataset.add_column(column, values)
        return dataset


class AnswerTrainer(_Additions, SFTTrainer):
    """SFT on rows that carry token ids and labels already."""


def build_trainer(
    spec: TrainSpec,
    *,
    model: Any,
    tokenizer: Any,
    train: list[TokenPair],
    validation: list[TokenPair],
    callbacks: list[Any],
    note: Callable[[str], None],
) -> PairTrainer | AnswerTrainer:
    """The trainer for `spec`, with adapter, reference log-probabilities and float32 updates in place.

    Args:
        spec: The run.
        model: From `load_model`.
        tokenizer: From `load_tokenizer`.
        train: Rows to train on.
        validation: Rows to evaluate on; may be empty.
        callbacks: Transformers callbacks.
        note: Takes one progress line.
    """
    is_dpo = spec.hyperparameters["training_strategy"] == "dpo"
    common: dict[str, Any] = {
        "model": model,
        "train_dataset": _dataset(train, is_dpo),
        "eval_dataset": _dataset(validation, is_dpo) if validation else None,
        "processing_class": tokenizer,
        "callbacks": callbacks,
        "peft_config": lora_config(spec) if uses_adapter(spec) else None,
    }
    try:
        if is_dpo:
            PairTrainer.note = staticmethod(note)  # before TRL's constructor, which already scores the reference
            trainer: PairTrainer | AnswerTrainer = PairTrainer(
                args=_dpo_config(spec, len(train), bool(validation)), **common
            )
        else:
            trainer = AnswerTrainer(args=_sft_config(spec, bool(validation)), **common)
    except ValueError as error:
        if "Target modules" in str(error) or "lm_head" in str(error):
            raise TrainerError(
                f"target_modules={spec.hyperparameters['target_modules']!r} does not fit this model: {error}"
            ) from error
        raise
    trainer.use_float32_updates()
    return trainer


def _dataset(rows: list[TokenPair], is_dpo: bool) -> Dataset:
    if is_dpo:
        return Dataset.from_list(
            [
                {
                    "prompt_ids": row.prompt_ids,
                    "chosen_ids": row.chosen_ids,
                    "rejected_ids": row.rejected_ids,
                    "length": row.length,
                }
                for row in rows
            ]
        )
    return Dataset.from_list(
        [
            {
                "input_ids": row.prompt_ids + row.chosen_ids,
                "labels": [-100] * len(row.prompt_ids) + row.chosen_ids,
                "length": row.length,
            }
            for row in rows
        ]
    )


def _dpo_config(spec: TrainSpec, rows: int, evaluates: bool) -> DPOConfig:
    hyperparameters = spec.hyperparameters
    pairs_a_step = hyperparameters["per_device_train_batch_size"] * hyperparameters["gradient_accumulation_steps"]
    covers_most = not hyperparameters["max_steps"] or hyperparameters["max_steps"] * pairs_a_step >= rows / 2
    return DPOConfig(
        **_common_arguments(spec, evaluates),
        beta=hyperparameters["dpo_beta"],
        loss_type=[hyperparameters["loss_type"]],
        max_length=None,  # rows are cut already
        disable_dropout=False,  # the base has none left, and LoRA's is to apply
        # Also spares full fine-tuning a second copy of the model. Not worth it when most rows are never reached.
        precompute_ref_log_probs=covers_most or not uses_adapter(spec),
        precompute_ref_batch_size=2 * hyperparameters["per_device_train_batch_size"],
    )


def _sft_config(spec: TrainSpec, evaluates: bool) -> SFTConfig:
    return SFTConfig(
        **_common_arguments(spec, evaluates),
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _common_arguments(spec: TrainSpec, evaluates: bool) -> dict[str, Any]:
    hyperparameters = spec.hyperparameters
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(Path(spec.output_dir) / CHECKPOINTS_DIR),
        "learning_rate": hyperparameters["learning_rate"],
        "num_train_epochs": hyperparameters["num_train_epochs"],
        "max_steps": hyperparameters["max_steps"] or -1,
        "per_device_train_batch_size": hyperparameters["per_device_train_batch_size"],
        "per_device_eval_batch_size": hyperparameters["per_device_train_batch_size"],
        "gradient_accumulation_steps": hyperparameters["gradient_accumulation_steps"],
        "warmup_steps": hyperparameters["warmup_ratio"],  # transformers 5 reads a number below 1 as a ratio
        "lr_scheduler_type": hyperparameters["lr_scheduler_type"],
        "weight_decay": hyperparameters["weight_decay"],
        "max_grad_norm": hyperparameters["max_grad_norm"],
        "seed": hyperparameters["seed"],
        "gradient_checkpointing": hyperparameters["gradient_checkpointing"],
        "bf16": spec.precision == "bfloat16",
        "fp16": spec.precision == "float16",
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "logging_steps": hyperparameters["logging_steps"],
        "logging_first_step": True,  # computed before the first update, so it is the loss of step 0
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if hyperparameters["save_steps"] else "no",
        "save_steps": hyperparameters["save_steps"] or 500,
        "eval_strategy": ("steps" if hyperparameters["eval_steps"] else "epoch") if evaluates else "no",
        "eval_steps": hyperparameters["eval_steps"] or None,
        "prediction_loss_only": True,
        "remove_unused_columns": False,  # keeps the length column, which orders the batches
        "report_to": ["tensorboard"],
        "disable_tqdm": True,
    }
