"""Lets TRL score completion tokens only on every device. Knows one private name of TRL, and what it must stay equal to.

TRL 1.16 projects only the labelled positions through the LM head where Triton runs, and every position elsewhere, prompt
and padding too (`trl.trainer.utils.add_fused_lm_head`). The labelled-only path is plain torch, and gives the same numbers:
the reason it names for the other one is recompilation on Neuron, which does not hold on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from trl.trainer import utils


@contextmanager
def completion_tokens_only() -> Iterator[None]:
    """Within it, models with TRL's fused head score labelled positions only, on CPU as on GPU.

    Raises:
        AttributeError: The installed TRL has no such switch; the tested version is pinned.
    """
    stock = utils._use_triton

    def compact(device: torch.device) -> bool:
        return device.type == "cpu" or stock(device)

    utils._use_triton = compact
    try:
        yield
    finally:
        utils._use_triton = stock
