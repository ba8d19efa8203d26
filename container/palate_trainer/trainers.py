"""TRL's trainers with Palate's additions: own tokens in, packed batches, finite losses only. Knows TRL, no files of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from trl import DPOTrainer, SFTTrainer
from trl.trainer import dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from palate_trainer.arguments import dpo_config, may_join, sft_config
from palate_trainer.errors import TrainerError
from palate_trainer.fast.packing import MOST_APART, MOST_APART_16_BIT, try_packing
from palate_trainer.fast.tree import TreeCollator, answer_sequences, pair_sequences
from palate_trainer.loading import load_adapter, load_model, lora_config
from palate_trainer.order import RowOrder, SimilarLengths, batches_at_once
from palate_trainer.parallel import gather_rows, share_of_rank, world_size
from palate_trainer.processes import OneOfSeveral
from palate_trainer.reference import ReferenceScores
from palate_trainer.sharding import is_sharded, reference_by_layers
from palate_trainer.spec import TrainSpec
from palate_trainer.spec.reference import LogProbs, row_digest
from palate_trainer.tokens import TokenPair


class _Additions(OneOfSeveral):
    """What both trainers share; mixed in before TRL's class."""

    note: Callable[[str], None] = staticmethod(lambda line: None)

    def pack(self) -> None:
        """Lets batches go through the model as packed trees if the model can take them; the first call decides.

        DPO's constructor scores the reference already, so that call comes from within it.
        """
        collator: TreeCollator = self.data_collator  # type: ignore[attr-defined]
        if collator.decided:
            return
        lengths = list(self.train_dataset["length"])  # type: ignore[attr-defined]
        shortest = sorted(range(len(lengths)), key=lengths.__getitem__)[:2]
        rounded = self.args.bf16 or self.args.fp16  # type: ignore[attr-defined]
        with self.accelerator.autocast():  # type: ignore[attr-defined]
            reason = try_packing(
                [self.model, getattr(self, "ref_model", None)],  # type: ignore[attr-defined]
                collator,
                [self.train_dataset[row] for row in shortest],  # type: ignore[attr-defined]
                to_device=self._prepare_inputs,  # type: ignore[attr-defined]
                longest=max(lengths),
                tolerance=MOST_APART_16_BIT if rounded else MOST_APART,
            )
        # One order of rows for all processes: where one cannot pack (its memory may be the smaller), none does.
        reason = next((one for one in gather_rows(reason) if one is not None), None)
        if reason is not None:
            collator.enabled = False
            self.note(f"note: prompts are encoded once an answer, not once a pair, because of this model: {reason}")

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
            raise TrainerError(
                f"The loss became {value} at step {self.state.global_step + 1}."  # type: ignore[attr-defined]
                " Lower learning_rate (a tenth is a good try) or max_grad_norm, or train in bfloat16 or float32 instead of float16."
            )
        self.step_loss += value
        return loss

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> RowOrder:
        rows = self.train_dataset if train_dataset is None else train_dataset  # type: ignore[attr-defined]
        args = self.args  # type: ignore[attr-defined]
        if self.data_collator.enabled:  # type: ignore[attr-defined]
            self.order = RowOrder(len(rows), args.seed)  # a packed batch has no padding to save
        else:
            self.order = SimilarLengths(list(rows["length"]), args.per_device_train_batch_size, args.seed)
        return self.order

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if world_size() > 1:
            self.put_metrics_together()
        # TRL averages over batches; the last one may be shorter, so pairs are weighted by their batch here.
        if any(name.startswith("eval_") for name in logs):
            rows, size = len(self.eval_dataset), self.args.per_device_eval_batch_size  # type: ignore[attr-defined]
            sizes = [size] * (rows // size) + ([rows % size] if rows % size else [])
            for values in self._metrics["eval"].values():  # type: ignore[attr-defined]
                if len(values) >= len(sizes):  # beyond them: a stand-in of a process without a batch
                    values[:] = [sum(v * n for v, n in zip(values, sizes, strict=False)) / rows]
        elif "loss" in logs:
            logs["tokens"] = sum(gather_rows(int(self._tokens)))
            self._tokens = 0
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
    """DPO on rows that carry token ids already, with the reference scored once before the first step.

    Args:
        reference: Where its log-probabilities come from and go to.
        arguments: For TRL's trainer.
    """

    def __init__(self, *, reference: ReferenceScores, **arguments: Any) -> None:
        self.reference = reference  # before TRL's constructor, which already asks for the log-probabilities
        with no_weights_hash():
            super().__init__(**arguments)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        self.pack()

        def score(rows: list[int]) -> list[LogProbs]:
            found: dict[int, LogProbs] = {}
            for part in share_of_rank([rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]):
                batch = self._prepare_inputs(self.data_collator([dataset[row] for row in part]))
                chosen, rejected = self.compute_ref_log_probs(self.ref_model or self.model, batch)  # (pairs,) each
                found |= dict(
                    zip(part, zip(chosen.float().tolist(), rejected.float().tolist(), strict=True), strict=True)
                )
            everyone = {row: values for share in gather_rows(found) for row, values in share.items()}
            return [everyone[row] for row in rows]

        # TRL keeps these values in a cache that misses too often and, under other truncation, hits wrongly.
        logps = self.reference.logps(
            list(dataset["digest"]), list(dataset["length"]), score, name=name, batch_size=batch_size * world_size()
        )
        chosen, rejected = zip(*logps, strict=True)
        return dataset.add_column("ref_chosen_logps", list(chosen)).add_column("ref_rejected_logps", list(rejected))


@contextmanager
def no_weights_hash() -> Iterator[None]:
    """Within it, a DPOTrainer is built without the SHA-256 of all weights, which only TRL's own cache reads.

    Raises:
        AttributeError: The installed TRL has no such function; the tested version is pinned.
    """
    stock = dpo_trainer.hash_module
    dpo_trainer.hash_module = lambda module: ""
    try:
        yield
    finally:
        dpo_trainer.hash_module = stock


class AnswerTrainer(_Additions, SFTTrainer):
    """SFT on rows that carry token ids and labels already."""

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # TRL divides by the tokens of all processes' batches: a stand-in must have none.
        last = len(batch_samples) - 1
        if world_size() > 1 and batch_samples and not self.weight(last):
            batch_samples[last]["labels"].fill_(-100)
        return super()._get_num_items_in_batch(batch_samples, device)

    def weighted(self, loss: torch.Tensor, weight: float) -> torch.Tensor:
        return loss  # a mean over tokens already, whoever has them


def build_trainer(
    spec: TrainSpec,
    *,
    model: Any,
    tokenizer: Any,
    train: list[TokenPair],
    validation: list[TokenPair],
    callbacks: list[Any],
    reference: ReferenceScores,
    note: Callable[[str], None],
) -> PairTrainer | AnswerTrainer:
    """The trainer for `spec`, with adapter, reference log-probabilities and float32 updates in place.

    Args:
        spec: The run.
        model: From `load_model`; the adapter is put on it here, a new one or that of `spec.adapter_dir`.
        tokenizer: From `load_tokenizer`.
        train: Rows to train on.
        validation: Rows to evaluate on; may be empty.
        callbacks: Transformers callbacks.
        reference: For DPO, where the reference's log-probabilities come from and go to.
        note: Takes one progress line.
    """
    is_dpo = spec.hyperparameters["training_strategy"] == "dpo"
    if spec.adapter_dir is not None:
        model = load_adapter(spec, model)
    start = {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if spec.adapter_dir and value.requires_grad
    }
    common: dict[str, Any] = {
        "model": model,
        "train_dataset": _dataset(spec, train),
        "eval_dataset": _dataset(spec, validation) if validation else None,
        "processing_class": tokenizer,
        "callbacks": callbacks,
        "peft_config": lora_config(spec) if spec.trains_adapter and spec.adapter_dir is None else None,
    }
    joined = _joined(spec, model, train) if may_join(spec) else 1
    if joined > 1:
        batches = spec.hyperparameters["gradient_accumulation_steps"]
        note(
            f"{joined} of a step's {batches} batches go through the model as one: they are small, and the sums are the same"
        )
    _Additions.note = staticmethod(note)  # before TRL's constructor, which already scores the reference
    try:
        if is_dpo:
            known = all(
                reference.knows(list(rows["digest"]))
                for rows in (common["train_dataset"], common["eval_dataset"])
                if rows
            )
            config = dpo_config(spec, len(train), bool(validation), joined=joined, reference_known=known)
            # A policy is sharded when training begins, so a reference that is to score before that is a model of its own.
            frozen = load_model(spec) if is_sharded(spec) and config.precompute_ref_log_probs else None
            with reference_by_layers():
                trainer: PairTrainer | AnswerTrainer = PairTrainer(
                    args=config,
                    ref_model=frozen,
                    reference=reference,
                    data_collator=TreeCollator(
                        DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id), pair_sequences
                    ),
                    **common,
                )
            trainer.ref_model = None  # has scored all rows
        else:
            trainer = AnswerTrainer(
                args=sft_config(spec, bool(validation), joined=joined),
                data_collator=TreeCollator(
                    DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id), answer_sequences
                ),
                **common,
            )
    except ValueError as error:
        if "Target modules" in str(error) or "lm_head" in str(error):
            raise TrainerError(
                f"target_modules={spec.hyperparameters['target_modules']!r} does not fit this model: {error}"
            ) from error
        raise
    trainer.pack()
    trainer.use_float32_updates()
    for name, value in start.items():
        # On quantised weights TRL has rounded the adapter to bfloat16, but not its frozen copy, the reference.
        trainer.model.get_parameter(name).data.copy_(value)
    return trainer


def _joined(spec: TrainSpec, model: Any, rows: list[TokenPair]) -> int:
    on_gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if on_gpu else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    here = batches_at_once(
        spec.hyperparameters["per_device_train_batch_size"],
        spec.hyperparameters["gradient_accumulation_steps"],
        [len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids) for row in rows],
        device="cuda" if on_gpu else "cpu",
        config=model.config.get_text_config(),
        free_bytes=free,
        width=4 if spec.precision == "float32" else 2,
    )
    if world_size() == 1:
        return here
    # Free memory differs between GPUs, and all take the same steps. TRL's arguments would tie the processes later, so.
    PartialState(cpu=not on_gpu, timeout=timedelta(minutes=30))
    return min(gather_rows(here))


def _dataset(spec: TrainSpec, rows: list[TokenPair]) -> Dataset:
    if spec.hyperparameters["training_strategy"] == "dpo":
        ld_alpha = spec.hyperparameters["ld_alpha"]
        return Dataset.from_list(
            [
                {
                    "prompt_ids": row.prompt_ids,
                    "chosen_ids": row.chosen_ids,
                    "rejected_ids": row.rejected_ids,
                    "length": row.length,
                    "digest": row_digest(row.prompt_ids, row.chosen_ids, row.rejected_ids, ld_alpha=ld_alpha),
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
