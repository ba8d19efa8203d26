"""TRL's trainers with Palate's additions: own tokens in, similar lengths together, finite losses only. Knows TRL, no files of a run."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import Sampler
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer import dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from palate_trainer.errors import TrainerError
from palate_trainer.fast.attention import allow_flex
from palate_trainer.fast.forward import add_tree_forward, difference, why_not
from palate_trainer.fast.lora import fuse_lora
from palate_trainer.fast.tree import TreeCollator, answer_sequences, pair_sequences
from palate_trainer.loading import load_adapter, load_model, lora_config, uses_adapter
from palate_trainer.parallel import gather_rows, share_of_rank, world_size
from palate_trainer.processes import OneOfSeveral
from palate_trainer.reference import ReferenceScores
from palate_trainer.sharding import fsdp_arguments, is_sharded, reference_by_layers
from palate_trainer.spec import CHECKPOINTS_DIR, TrainSpec
from palate_trainer.spec.reference import LogProbs, row_digest
from palate_trainer.tokens import TokenPair

_MOST_APART, _MOST_APART_16_BIT = 1e-3, 0.1
"""Nats a token by which packed log-probabilities may differ from TRL's: rounding, no more."""


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


class _Additions(OneOfSeveral):
    """What both trainers share; mixed in before TRL's class."""

    note: Callable[[str], None] = staticmethod(lambda line: None)

    def pack(self) -> None:
        """Sends batches through the model as packed prefix trees, once it has shown the same numbers that way.

        The first call decides for the run: DPO's constructor scores the reference already.
        """
        collator: TreeCollator = self.data_collator  # type: ignore[attr-defined]
        if collator.enabled or collator.refused:
            return
        wrapper = self.model  # type: ignore[attr-defined]
        network = wrapper.get_base_model() if isinstance(wrapper, PeftModel) else wrapper
        lengths = list(self.train_dataset["length"])  # type: ignore[attr-defined]
        reason = why_not(network, longest=max(lengths))
        if reason is None:
            for one in (network, getattr(self, "ref_model", None)):
                if one is not None:
                    add_tree_forward(one)
            collator.enabled = True
            shortest = sorted(range(len(lengths)), key=lengths.__getitem__)[:2]
            batch = self._prepare_inputs(collator([self.train_dataset[row] for row in shortest]))  # type: ignore[attr-defined]
            rounds = self.args.bf16 or self.args.fp16  # type: ignore[attr-defined]
            most = _MOST_APART_16_BIT if rounds else _MOST_APART
            with self.accelerator.autocast():  # type: ignore[attr-defined]
                apart = difference(wrapper, batch)
                if apart > most and batch["input_ids"].is_cuda:
                    allow_flex(False)
                    apart = difference(wrapper, batch)
            if apart > most:
                reason = f"its log-probabilities differ by {apart:.2g} a token when packed"
        if reason is not None:
            collator.enabled, collator.refused = False, True
            self.note(f"note: prompts are encoded once an answer, not once a pair, because of this model: {reason}")
        fuse_lora(wrapper)

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
        # A packed batch has no padding to save: its rows stay as they were drawn.
        lengths = [1] * len(rows) if self.data_collator.enabled else list(rows["length"])  # type: ignore[attr-defined]
        self.order = SimilarLengths(lengths, args.per_device_train_batch_size, args.seed)
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
        "peft_config": lora_config(spec) if uses_adapter(spec) and spec.adapter_dir is None else None,
    }
    _Additions.note = staticmethod(note)  # before TRL's constructor, which already scores the reference
    try:
        if is_dpo:
            known = all(
                reference.knows(list(rows["digest"]))
                for rows in (common["train_dataset"], common["eval_dataset"])
                if rows
            )
            config = _dpo_config(spec, len(train), bool(validation), reference_known=known)
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
                args=_sft_config(spec, bool(validation)),
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


def _dataset(spec: TrainSpec, rows: list[TokenPair]) -> Dataset:
    if spec.hyperparameters["training_strategy"] == "dpo":
        ld_alpha = spec.hyperparameters.get("ld_alpha")
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


def _dpo_config(spec: TrainSpec, rows: int, evaluates: bool, *, reference_known: bool) -> DPOConfig:
    hyperparameters = spec.hyperparameters
    pairs_a_step = hyperparameters["per_device_train_batch_size"] * hyperparameters["gradient_accumulation_steps"]
    pairs_a_step *= world_size()
    covers_most = not hyperparameters["max_steps"] or hyperparameters["max_steps"] * pairs_a_step >= rows / 2
    return DPOConfig(
        **_common_arguments(spec, evaluates),
        beta=hyperparameters["dpo_beta"],
        loss_type=hyperparameters["loss_type"].split(","),
        loss_weights=hyperparameters["loss_weights"] or None,
        label_smoothing=hyperparameters["label_smoothing"],
        # At 1 every token counts fully, and the plain sum is the cheaper way to the same number.
        ld_alpha=None if hyperparameters["ld_alpha"] == 1 else hyperparameters["ld_alpha"],
        discopop_tau=hyperparameters["discopop_tau"],
        max_length=None,  # rows are cut already
        disable_dropout=False,  # the base has none left, and LoRA's is to apply
        # Also spares full fine-tuning a second copy of the model. Not worth it when most rows are never reached,
        # unless the cache has them all.
        # A starting adapter whose base is sharded is its own reference step by step: TRL keeps a frozen copy beside it.
        precompute_ref_log_probs=(covers_most or not uses_adapter(spec) or reference_known)
        and not (is_sharded(spec) and spec.adapter_dir is not None),
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
        **fsdp_arguments(spec),
        "accelerator_config": {"even_batches": False},  # `Rounds` sees to it
        "report_to": ["tensorboard"],
        "disable_tqdm": True,
    }
