"""Translates hyperparameters to arguments of TRL's trainers. Knows TRL's configs, no model and no data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from trl import DPOConfig, KTOConfig, SFTConfig

from palate_recipes.hyperparameters import needs_validation
from palate_recipes.specs.train import CHECKPOINTS_DIR, TrainTask
from palate_recipes.trackers import chosen
from palate_trainer.distributed import world_size
from palate_trainer.env import PROJECT
from palate_trainer.sharding import fsdp_arguments, is_sharded


def dpo_config(task: TrainTask, rows: int, evaluates: bool, *, joined: int, reference_known: bool) -> DPOConfig:
    """Arguments of a DPO run.

    Args:
        task: The run.
        rows: Rows of training data.
        evaluates: Whether there is validation data.
        joined: Micro-batches per forward pass (see `batches_at_once`).
        reference_known: Whether the cache has the reference values of every row.
    """
    hyperparameters = task.spec.hyperparameters
    pairs_a_step = hyperparameters.per_device_train_batch_size * hyperparameters.gradient_accumulation_steps
    pairs_a_step *= world_size()
    covers_most = not hyperparameters.max_steps or hyperparameters.max_steps * pairs_a_step >= rows / 2
    return DPOConfig(
        **_common_arguments(task, evaluates, joined),
        beta=hyperparameters.dpo_beta,
        loss_type=hyperparameters.loss_type.split(","),
        loss_weights=hyperparameters.loss_weights or None,
        label_smoothing=hyperparameters.label_smoothing,
        # At 1 every token has full weight, and None computes the same sum with less work.
        ld_alpha=None if hyperparameters.ld_alpha == 1 else hyperparameters.ld_alpha,
        discopop_tau=hyperparameters.discopop_tau,
        max_length=None,  # rows are truncated already
        disable_dropout=False,  # load_model has turned off the base's dropout; LoRA's must stay on
        # Precomputing also saves full fine-tuning a second copy of the model. It is not worth it if a short run reaches
        # less than half of the rows, unless the cache has them all.
        # A sharded base with a starting adapter is scored in each step instead: TRL keeps a frozen copy of the adapter.
        precompute_ref_log_probs=(covers_most or not task.spec.trains_adapter or reference_known)
        and not (is_sharded(task) and task.files.adapter_dir is not None),
        precompute_ref_batch_size=2 * joined * hyperparameters.per_device_train_batch_size,
    )


def sft_config(task: TrainTask, evaluates: bool, *, joined: int) -> SFTConfig:
    """Arguments of an SFT run. See `dpo_config`."""
    return SFTConfig(
        **_common_arguments(task, evaluates, joined),
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def kto_config(task: TrainTask, evaluates: bool) -> KTOConfig:
    """Arguments of a KTO run. See `dpo_config`."""
    hyperparameters = task.spec.hyperparameters
    return KTOConfig(
        **_common_arguments(task, evaluates, joined=1),
        beta=hyperparameters.dpo_beta,
        desirable_weight=hyperparameters.desirable_weight,
        undesirable_weight=hyperparameters.undesirable_weight,
        max_length=None,  # rows are truncated already
        disable_dropout=False,  # load_model has turned off the base's dropout; LoRA's must stay on
        # Mismatched pairs change every epoch, so precomputation would cover only half of the scores.
        precompute_ref_log_probs=False,
    )


def _common_arguments(task: TrainTask, evaluates: bool, joined: int) -> dict[str, Any]:
    hyperparameters = task.spec.hyperparameters
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(Path(task.files.output_dir) / CHECKPOINTS_DIR),
        "learning_rate": hyperparameters.learning_rate,
        "num_train_epochs": hyperparameters.num_train_epochs,
        "max_steps": hyperparameters.max_steps or -1,
        "per_device_train_batch_size": joined * hyperparameters.per_device_train_batch_size,
        "per_device_eval_batch_size": hyperparameters.per_device_train_batch_size,
        "gradient_accumulation_steps": hyperparameters.gradient_accumulation_steps // joined,
        "warmup_steps": hyperparameters.warmup_ratio,  # transformers 5 reads a number below 1 as a ratio
        "lr_scheduler_type": hyperparameters.lr_scheduler_type,
        "weight_decay": hyperparameters.weight_decay,
        "max_grad_norm": hyperparameters.max_grad_norm,
        "seed": hyperparameters.seed,
        "gradient_checkpointing": hyperparameters.gradient_checkpointing,
        "bf16": task.spec.precision == "bfloat16",
        "fp16": task.spec.precision == "float16",
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "logging_steps": hyperparameters.logging_steps,
        "logging_first_step": True,  # computed before the first update, so this is the untrained model's loss
        "logging_nan_inf_filter": False,
        # "best" alone makes transformers record the step of the best evaluation; PalateMixin decides what is saved. Its own
        # load_best_model_at_end stays off: it would require save_steps to be a multiple of eval_steps, and does not load after a
        # resume from the last step.
        "save_strategy": (
            "steps" if hyperparameters.save_steps else "best" if hyperparameters.load_best_model_at_end else "no"
        ),
        "metric_for_best_model": hyperparameters.metric_for_best_model if needs_validation(hyperparameters) else None,
        "save_steps": hyperparameters.save_steps or 500,
        "eval_strategy": ("steps" if hyperparameters.eval_steps else "epoch") if evaluates else "no",
        "eval_steps": hyperparameters.eval_steps or None,
        "prediction_loss_only": True,
        "remove_unused_columns": False,  # keeps the length column, which orders the batches
        **fsdp_arguments(task),
        "accelerator_config": {"even_batches": False},  # `Rounds` evens them out
        # The others are added by RunCallback, which guards them.
        "report_to": [name for name in chosen(hyperparameters.report_to) if name == "tensorboard"],
        "run_name": task.files.run_name,
        "project": os.environ.get("TRACKIO_PROJECT", PROJECT),
        "disable_tqdm": True,
    }
