"""TRL's trainers with Palate's additions: pretokenized rows, packed batches, finite losses. Knows TRL, no files of a run."""

from __future__ import annotations

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

from palate_recipes.errors import TrainerError
from palate_recipes.specs.reference_table import LogProbs, row_digest
from palate_recipes.specs.train import TrainTask
from palate_recipes.training_memory import batches_at_once, may_join
from palate_trainer.distributed import gather_rows, share_of_rank, world_size
from palate_trainer.fast.tree import TreeCollator, answer_sequences, pair_sequences
from palate_trainer.model import load_adapter, load_model, lora_config
from palate_trainer.reference_scores import ReferenceScores
from palate_trainer.sharding import is_sharded, reference_by_layers
from palate_trainer.tokenize import TokenPair
from palate_trainer.trainers.arguments import dpo_config, kto_config, sft_config
from palate_trainer.trainers.base import PalateMixin
from palate_trainer.trainers.kto import MismatchedAnswers, PalateKTOTrainer, label_rows


class PalateDPOTrainer(PalateMixin, DPOTrainer):
    """DPO on rows that already have token ids, with the reference scored once before the first step.

    Args:
        reference: Source and store of the reference log-probabilities.
        arguments: Passed to TRL's trainer.
    """

    def __init__(self, *, reference: ReferenceScores, **arguments: Any) -> None:
        self.reference = reference  # before TRL's constructor, because it scores the reference
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

        # A reference that is an adapter has LoRA's dropout too, which would make its values, and the cache's, random.
        training = self.model.training
        self.model.eval()
        try:
            # This replaces TRL's own cache, which misses too often, and returns wrong values if the truncation changed.
            logps = self.reference.logps(
                list(dataset["digest"]), list(dataset["length"]), score, name=name, batch_size=batch_size * world_size()
            )
        finally:
            self.model.train(training)
        chosen, rejected = zip(*logps, strict=True)
        return dataset.add_column("ref_chosen_logps", list(chosen)).add_column("ref_rejected_logps", list(rejected))


@contextmanager
def no_weights_hash() -> Iterator[None]:
    """Skips the SHA-256 of all weights in DPOTrainer's constructor, which only TRL's own cache needs.

    Raises:
        AttributeError: The installed TRL has no such function. The tested version is pinned.
    """
    stock = dpo_trainer.hash_module
    dpo_trainer.hash_module = lambda module: ""
    try:
        yield
    finally:
        dpo_trainer.hash_module = stock


class PalateSFTTrainer(PalateMixin, SFTTrainer):
    """SFT on rows that already have token ids and labels."""

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # TRL divides by the number of tokens of all processes, so a stand-in batch must have none.
        last = len(batch_samples) - 1
        if world_size() > 1 and batch_samples and not self.weight(last):
            batch_samples[last]["labels"].fill_(-100)
        return super()._get_num_items_in_batch(batch_samples, device)

    def weighted(self, loss: torch.Tensor, weight: float) -> torch.Tensor:
        return loss  # already a mean over the tokens of all processes


def build_trainer(
    task: TrainTask,
    *,
    model: Any,
    tokenizer: Any,
    train: list[TokenPair],
    validation: list[TokenPair],
    callbacks: list[Any],
    reference: ReferenceScores,
    note: Callable[[str], None],
) -> PalateDPOTrainer | PalateSFTTrainer | PalateKTOTrainer:
    """Builds the trainer for `task`, with adapter, reference log-probabilities and float32 updates.

    Args:
        task: The run.
        model: From `load_model`. This function adds the adapter: a new one, or that of `files.adapter_dir`.
        tokenizer: From `load_tokenizer`.
        train: Training rows.
        validation: Evaluation rows; may be empty.
        callbacks: Transformers callbacks.
        reference: Source and store of the reference log-probabilities (DPO).
        note: Called with a progress line.
    """
    strategy = task.spec.hyperparameters.training_strategy
    if task.files.adapter_dir is not None:
        model = load_adapter(task, model)
    start = {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if task.files.adapter_dir and value.requires_grad
    }
    common: dict[str, Any] = {
        "model": model,
        "train_dataset": _dataset(task, train),
        "eval_dataset": _dataset(task, validation, evaluation=True) if validation else None,
        "processing_class": tokenizer,
        "callbacks": callbacks,
        "peft_config": lora_config(task) if task.spec.trains_adapter and task.files.adapter_dir is None else None,
    }
    joined = _joined(task, model, train) if may_join(task.spec.hyperparameters) else 1
    if joined > 1:
        batches = task.spec.hyperparameters.gradient_accumulation_steps
        note(
            f"batches are small: {joined} of the {batches} batches per step run as one forward pass, with the same result"
        )
    # Set on the class, because TRL's constructor already scores the reference and needs them.
    PalateMixin.note, PalateMixin.allow_fast = staticmethod(note), task.files.fast
    try:
        trainer: PalateDPOTrainer | PalateSFTTrainer | PalateKTOTrainer
        if strategy == "dpo":
            known = all(
                reference.knows(list(rows["digest"]))
                for rows in (common["train_dataset"], common["eval_dataset"])
                if rows
            )
            config = dpo_config(task, len(train), bool(validation), joined=joined, reference_known=known)
            # FSDP shards the policy when training starts. To score before that, the reference must be a separate model.
            frozen = load_model(task) if is_sharded(task) and config.precompute_ref_log_probs else None
            with reference_by_layers():
                trainer = PalateDPOTrainer(
                    args=config,
                    ref_model=frozen,
                    reference=reference,
                    data_collator=TreeCollator(
                        DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id), pair_sequences
                    ),
                    **common,
                )
            trainer.ref_model = None  # frees it: all rows are scored
        elif strategy == "kto":
            trainer = PalateKTOTrainer(
                args=kto_config(task, bool(validation)),
                # Without an adapter to disable, TRL would try to load the reference by the name in the model's config.
                ref_model=None if task.spec.trains_adapter else load_model(task),
                data_collator=MismatchedAnswers(
                    pad_token_id=tokenizer.pad_token_id, seq_length=task.spec.hyperparameters.seq_length
                ),
                **common,
            )
        else:
            trainer = PalateSFTTrainer(
                args=sft_config(task, bool(validation), joined=joined),
                data_collator=TreeCollator(
                    DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id), answer_sequences
                ),
                **common,
            )
    except ValueError as error:
        if any(words in str(error) for words in ("Target modules", "target_modules", "lm_head")):
            raise TrainerError(
                f"target_modules={task.spec.hyperparameters.target_modules!r} does not fit this model: {error}"
            ) from error
        raise
    trainer.keeps_best = task.spec.hyperparameters.load_best_model_at_end
    trainer.pack()
    trainer.use_float32_updates()
    for name, value in start.items():
        # On quantised weights TRL rounds the adapter to bfloat16, but not its frozen copy, the reference. Undo that, so that
        # policy and reference start equal.
        trainer.model.get_parameter(name).data.copy_(value)
    return trainer


def _joined(task: TrainTask, model: Any, rows: list[TokenPair]) -> int:
    on_gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if on_gpu else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    config = model.config.get_text_config()
    here = batches_at_once(
        task.spec.hyperparameters.per_device_train_batch_size,
        task.spec.hyperparameters.gradient_accumulation_steps,
        [len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids) for row in rows],
        device="cuda" if on_gpu else "cpu",
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        free_bytes=free,
        width=4 if task.spec.precision == "float32" else 2,
    )
    if world_size() == 1:
        return here
    # Free memory differs between GPUs, but all must take the same steps. Under another launcher there is no group yet.
    PartialState(cpu=not on_gpu, timeout=timedelta(minutes=30))
    return min(gather_rows(here))


def _dataset(task: TrainTask, rows: list[TokenPair], *, evaluation: bool = False) -> Dataset:
    if task.spec.hyperparameters.training_strategy == "kto":
        return label_rows(rows, shuffle_seed=task.spec.hyperparameters.seed if evaluation else None)
    if task.spec.hyperparameters.training_strategy == "dpo":
        ld_alpha = task.spec.hyperparameters.ld_alpha
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
