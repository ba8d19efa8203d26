"""Runs the prefix tree behind TRL's fused LM head: same batch in, same log-probabilities out. Knows TRL's hook.

TRL 1.16 patches `model.forward` (`trl.trainer.utils.add_fused_lm_head`): `fused_lm_head=True` returns log-probabilities of
shape (sequences, length - 1). If the call carries a `tree`, they come from one pass over the packed tree; otherwise TRL's own
path runs. TRL's use of the values is unchanged.

With Triton, TRL projects only labelled positions through the LM head; without it, every position, prompt and padding
included. The labelled-only path is plain torch and gives the same numbers. TRL's reason to avoid it is recompilation on
Neuron, which does not apply to CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer import utils

from palate_trainer.fast import attention
from palate_trainer.fast.head import Scores, score_edges
from palate_trainer.fast.tree import PrefixTree


@contextmanager
def completion_tokens_only() -> Iterator[None]:
    """Inside this context TRL's fused head scores labelled positions only, on CPU too.

    Raises:
        AttributeError: The installed TRL has no such switch. The tested version is pinned.
    """
    stock = utils._use_triton

    def compact(device: torch.device) -> bool:
        return device.type == "cpu" or stock(device)

    utils._use_triton = compact
    try:
        yield
    finally:
        utils._use_triton = stock


_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def add_tree_forward(model: Any) -> Callable[[], None]:
    """Lets a causal language model with TRL's fused head accept a `tree` (from `PrefixTree.as_dict`) with its batch.

    Args:
        model: The network itself, not its PEFT wrapper.

    Returns:
        A function that reverts it.
    """
    stock, stock_attention = model.forward, model.config._attn_implementation
    model.set_attn_implementation(attention.NAME)

    def forward(self: Any, *args: Any, tree: dict[str, torch.Tensor] | None = None, **kwargs: Any) -> Any:
        # Generation, the save probe and unpacked batches have no tree.
        if tree is None or not kwargs.get("fused_lm_head"):
            return stock(*args, **kwargs)
        config = self.config.get_text_config()
        routers = kwargs.get("output_router_logits", getattr(config, "output_router_logits", False))
        return _tree_forward(
            self, PrefixTree(**tree), kwargs["labels"], kwargs.get("num_items_in_batch"), routers=bool(routers)
        )

    model.forward = MethodType(forward, model)

    def undo() -> None:
        model.forward = stock
        model.set_attn_implementation(stock_attention)

    return undo


def _tree_forward(
    model: Any, tree: PrefixTree, labels: torch.Tensor, num_items: Any, *, routers: bool
) -> utils.FusedCausalLMOutput:
    output = model.base_model(
        input_ids=tree.ids[None],
        position_ids=tree.positions[None],
        attention_mask=attention.as_mask(tree.ends),
        use_cache=False,
        **({"output_router_logits": True} if routers else {}),
    )
    # Only rows that are scored: most tokens of a prompt need no pass over the vocabulary.
    hidden = output.last_hidden_state[0, tree.score_rows]  # (rows, hidden)
    scores = _score(model.get_output_embeddings(), hidden, tree)
    scored = labels[:, 1:] != -100  # (sequences, length - 1)
    # Back to TRL's layout, one row per sequence. masked_scatter fills in row order, which is the order of `slots`.
    fields = {
        name: values.new_zeros(scored.shape).masked_scatter(scored, values[tree.slots])
        for name, values in scores._asdict().items()
    }
    count = scored.sum().clamp(min=1) if num_items is None else num_items
    loss, balance = -fields["log_probs"].sum() / count, None
    if routers:
        config = model.config.get_text_config()
        balance = _load_balance(output.router_logits, tree, config)
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * balance
    return utils.FusedCausalLMOutput(loss=loss, label_mask=scored, aux_loss=balance, **fields)


def _load_balance(router_logits: tuple[torch.Tensor, ...], tree: PrefixTree, config: Any) -> torch.Tensor:
    """The load-balancing loss of a mixture of experts. A shared token counts once per sequence, as it does in TRL."""
    repeated = tuple(
        layer.repeat_interleave(tree.counts, 0) for layer in router_logits
    )  # (tokens of all sequences, experts)
    balance: torch.Tensor = load_balancing_loss_func(repeated, config.num_experts, config.num_experts_per_tok)
    return balance


def _score(head: Any, hidden: torch.Tensor, tree: PrefixTree) -> Scores:
    weight, bias = head.weight, head.bias
    if isinstance(weight, DTensor):  # FSDP: gather once, not once per vocabulary block
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    # score_edges gives the head no gradient, so a trained head (full fine-tuning) takes TRL's function.
    if not weight.requires_grad:
        return score_edges(hidden, weight, bias, tree.edge_rows, tree.edge_targets)
    log_probs, entropy, _, mean_logits, is_top1 = utils._ChunkedLogProbFunction.apply(
        hidden[tree.edge_rows],
        weight,
        bias,
        tree.edge_targets,
        1.0,
        utils._CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        _OUTPUTS,
    )
    return Scores(log_probs, entropy, mean_logits, is_top1)
