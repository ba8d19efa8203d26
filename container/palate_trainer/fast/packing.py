"""Whether a model takes packed trees: what is known of its architecture, then its own numbers. Knows models, no trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel

from palate_trainer.fast import attention
from palate_trainer.fast.elementwise import fuse_elementwise
from palate_trainer.fast.forward import add_tree_forward
from palate_trainer.fast.lora import fuse_lora
from palate_trainer.fast.tree import TreeCollator

MOST_APART, MOST_APART_16_BIT = 1e-4, 0.1
"""Nats a token by which packed log-probabilities may differ from TRL's: rounding, no more."""

_LOGIT_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling", "final_logit_softcapping")
"""Config fields by which some architectures change their logits; TRL's own path knows them all."""


def try_packing(
    models: list[Any],
    collator: TreeCollator,
    rows: list[dict[str, Any]],
    *,
    to_device: Callable[[dict[str, Any]], dict[str, Any]],
    longest: int,
    tolerance: float,
) -> str | None:
    """Sends batches through the model as packed trees if it gives the same log-probabilities that way.

    LoRA layers, norms and gates get their fused computation in any case.

    Args:
        models: The policy, and a reference model beside it or None.
        collator: Is enabled or not, as it turns out.
        rows: A few rows of the data to try it with.
        to_device: Brings a batch to the model.
        longest: Tokens of the longest sequence in the data.
        tolerance: Mean distance in nats a token that is rounding.

    Returns:
        Why the model is trained TRL's way, or None when it is packed.
    """
    policy = models[0]
    networks = [one.get_base_model() if isinstance(one, PeftModel) else one for one in models if one is not None]
    collator.decided = True
    fuse_elementwise(policy)  # a reference keeps nothing for a backward pass
    fuse_lora(policy)
    reason = why_not(networks[0], longest=longest)
    if reason is not None:
        return reason
    for network in networks:
        add_tree_forward(network)
    collator.enabled = True
    batch = to_device(collator(rows))
    apart = difference(policy, batch)
    if apart > tolerance and batch["input_ids"].is_cuda:
        attention.allow_flex(False)
        apart = difference(policy, batch)
    if apart > tolerance:
        collator.enabled = False
        return f"its log-probabilities differ by {apart:.2g} a token when packed"
    return None


def why_not(model: Any, *, longest: int) -> str | None:
    """Why a model cannot take the packed tree, or None when nothing known speaks against it.

    Args:
        model: A causal language model.
        longest: Tokens of the longest sequence.
    """
    config = model.config.get_text_config()
    if model.config._attn_implementation not in ("sdpa", attention.NAME):
        return f"its attention is {model.config._attn_implementation}"
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _LOGIT_FACTORS):
        return "it changes its logits after the LM head"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}"
    if any(isinstance(module, torch.nn.Conv1d) for module in model.modules()):
        return "its convolutions mix neighbours in the row"
    if getattr(config, "output_router_logits", False):
        return "its router's loss counts tokens as often as they appear"
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and longest > window:
        return f"its sliding window of {window} tokens is shorter than the longest sequence ({longest})"
    return None


def difference(model: Any, batch: dict[str, Any]) -> float:
    """Mean distance of the log-probabilities that the tree gives from TRL's own, on one batch.

    Args:
        model: As the trainer calls it, with `add_tree_forward` done.
        batch: Of a `TreeCollator`, on the model's device.

    Returns:
        In nats a scored token; infinite when the model cannot run a tree at all.
    """
    labels = (
        batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        if "labels" not in batch
        else batch["labels"]
    )
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(**inputs, fused_lm_head=True).log_probs
        # FlexAttention compiles its backward pass by itself: it has to stand the trial too.
        backward = inputs["input_ids"].is_cuda and isinstance(model, PeftModel)
        with torch.set_grad_enabled(backward):
            found = model(**inputs, tree=batch["tree"], fused_lm_head=True).log_probs
            if backward:
                found.sum().backward()
                model.zero_grad(set_to_none=True)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError):
        return float("inf")  # the architecture's own code stumbles over a packed row: it is trained TRL's way
    finally:
        model.train(training)
    return float((found.detach() - expected).abs().sum() / (labels[:, 1:] != -100).sum())
