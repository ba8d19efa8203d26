"""One model over several processes (FSDP2): how it is asked for, how a reference is sharded, how whole weights come back.

Knows accelerate's and TRL's FSDP, no files. Every function that touches weights is collective.
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
    """Whether the weights are split over the processes; one alone has them whole whatever is asked."""
    return world_size() > 1 and bool(task.spec.hyperparameters.fsdp == "full_shard")


def fsdp_arguments(task: TrainTask) -> dict[str, Any]:
    """Transformers' arguments for it: weights gathered layer by layer, whole in a checkpoint."""
    if not is_sharded(task):
        return {}
    return {
        "fsdp": True,
        "fsdp_config": {"version": 2, "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"},
    }


def enter_fsdp(trainer: Any) -> None:
    """Finishes what accelerate begins: the precision of what is exchanged, and FSDP on the processor too.

    accelerate 1.15 takes an FSDP plugin from GPU processes only (`AcceleratorState.__init__`) and forgets it without a
    word elsewhere; torch's FSDP2 itself runs on gloo. Under mixed precision it would round what the model returns to 16
    bit, and DPO sums hundreds of those log-probabilities, and the gradients where they are added.
    """
    if trainer.args.fsdp_plugin_args is None:
        return
    state = trainer.accelerator.state
    if getattr(state, "fsdp_plugin", None) is None:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # every new view of the state copies it
        trainer.is_fsdp_enabled = True
    arithmetic = _ARITHMETIC.get(trainer.accelerator.mixed_precision)
    if arithmetic is not None:
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=arithmetic, reduce_dtype=torch.float32
        )


@contextmanager
def reference_by_layers() -> Iterator[None]:
    """Within it, TRL shards a reference model layer by layer; by itself it would gather all of it for a forward pass."""
    stock = dpo_trainer.prepare_fsdp

    def prepare(model: Any, accelerator: Any) -> Any:
        return fsdp2_prepare_model(accelerator, model).eval()

    dpo_trainer.prepare_fsdp = prepare
    try:
        yield
    finally:
        dpo_trainer.prepare_fsdp = stock


def whole_weights(model: Any, *, trainable_only: bool, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The weights of a sharded model, on the CPU of rank 0; an empty dict on the others.

    Args:
        model: After `accelerator.prepare`.
        trainable_only: Leave out what was frozen: a base model is on disk already.
        dtype: What they are cast to, or None for as they are.
    """
    weights: dict[str, torch.Tensor] = {}
    seen: set[int] = set()  # a tied output head is the embedding under a second name
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in seen or (trainable_only and not value.requires_grad):
            continue
        seen.add(id(value))
        whole = value.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()  # one at a time: the GPU holds no second model
        if is_main():
            weights[name] = whole.to(device="cpu", dtype=dtype if whole.is_floating_point() else None)
    return weights
