"""FSDP2: configures it, shards the reference model, gathers full weights. Knows accelerate's and TRL's FSDP, no files.

Every function that touches weights is collective: all processes must call it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from trl.trainer import dpo_trainer

from palate_recipes.specs.train import TrainTask
from palate_trainer.distributed import is_main, world_size

_ARITHMETIC = {"bf16": torch.bfloat16, "fp16": torch.float16}


def is_sharded(task: TrainTask) -> bool:
    """Whether the weights are sharded. A single process never shards."""
    return world_size() > 1 and bool(task.spec.hyperparameters.fsdp == "full_shard")


def fsdp_arguments(task: TrainTask) -> dict[str, Any]:
    """FSDP arguments of transformers: weights are gathered layer by layer, and checkpoints hold the full state."""
    if not is_sharded(task):
        return {}
    return {
        "fsdp": True,
        "fsdp_config": {"version": 2, "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"},
    }


def enter_fsdp(trainer: Any) -> None:
    """Completes accelerate's FSDP setup: enables it on CPU and keeps reductions in float32.

    accelerate 1.15 accepts an FSDP plugin on GPUs only (`AcceleratorState.__init__`) and silently drops it elsewhere,
    although torch's FSDP2 runs on gloo. Its default mixed precision rounds model outputs and gradient sums to 16 bits.
    DPO sums hundreds of log-probabilities, so that error would be large.
    """
    if trainer.args.fsdp_plugin_args is None:
        return
    state = trainer.accelerator.state
    if getattr(state, "fsdp_plugin", None) is None:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # later instances copy the shared state
        trainer.is_fsdp_enabled = True
    arithmetic = _ARITHMETIC.get(trainer.accelerator.mixed_precision)
    if arithmetic is not None:
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=arithmetic, reduce_dtype=torch.float32
        )


@contextmanager
def reference_by_layers() -> Iterator[None]:
    """Makes TRL shard the reference model layer by layer. By default TRL gathers the full model for a forward pass."""
    stock = dpo_trainer.prepare_fsdp

    def prepare(model: Any, accelerator: Any) -> Any:
        return fsdp2_prepare_model(accelerator, model).eval()

    dpo_trainer.prepare_fsdp = prepare
    try:
        yield
    finally:
        dpo_trainer.prepare_fsdp = stock


def whole_weights(model: Any, *, trainable_only: bool, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Gathers the weights of a sharded model on the CPU of rank 0. Other ranks get an empty dict.

    Args:
        model: After `accelerator.prepare`.
        trainable_only: Skip frozen weights: the base model is on disk already.
        dtype: Target dtype, or None to keep each weight's own.
    """
    weights: dict[str, torch.Tensor] = {}
    seen: set[int] = set()  # a tied LM head is the embedding under a second name
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in seen or (trainable_only and not value.requires_grad):
            continue
        seen.add(id(value))
        whole = value.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()  # one weight at a time, so the GPU never holds a second copy of the model
        if is_main():
            weights[name] = whole.to(device="cpu", dtype=dtype if whole.is_floating_point() else None)
    return weights
