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
from torch.distributed.tensor import DTensor
from trl.trainer import dpo_trainer

from palate_trainer.parallel import is_main, world_size
from palate_trainer.spec import TrainSpec


def is_sharded(spec: TrainSpec) -> bool:
    """Whether the weights are split over the processes; one alone has them whole whatever is asked."""
    return world_size() > 1 and bool(spec.hyperparameters["fsdp"] == "full_shard")


def fsdp_arguments(spec: TrainSpec) -> dict[str, Any]:
    """Transformers' arguments for it: weights gathered layer by layer, whole in a checkpoint."""
    if not is_sharded(spec):
        return {}
    return {
        "fsdp": True,
        "fsdp_config": {"version": 2, "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"},
    }


def enter_fsdp(trainer: Any) -> None:
    """Lets the trainer's accelerator shard on the processor too.

    accelerate 1.15 takes an FSDP plugin from GPU processes only (`AcceleratorState.__init__`) and forgets it without a
    word elsewhere; torch's FSDP2 itself runs on gloo.
    """
    state = trainer.accelerator.state
    if trainer.args.fsdp_plugin_args is None or getattr(state, "fsdp_plugin", None) is not None:
        return
    plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    if trainer.accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(trainer.accelerator.mixed_precision)
    state.fsdp_plugin = plugin
    state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # every new view of the state copies it from here
    trainer.is_fsdp_enabled = True


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
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {}
    for name, value in model.state_dict().items():
        if trainable_only and name not in trained:
            continue
        whole = value.full_tensor() if isinstance(value, DTensor) else value  # one at a time: the GPU holds no second model
        if is_main():
            weights[name] = whole.detach().to(device="cpu", dtype=dtype if whole.is_floating_point() else None)
    return weights
