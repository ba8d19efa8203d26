"""Attention over a packed prefix tree, registered in transformers as an attention implementation. Knows no trainer.

The tree's `ends` travel in place of the attention mask, as an int64 tensor of shape (1, 1, 1, tokens): transformers passes a
4-D mask to every layer unchanged, under gradient checkpointing too. Any other mask means an ordinary batch and goes to SDPA.

On GPUs with Triton, FlexAttention takes the tree as a block mask. On CPUs, and if FlexAttention cannot run, the tree is split
into groups: small subtrees, with their ancestors as additional keys. A group needs a few dense products, so the cost grows
with the sum of the groups, not with the square of the packed row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from palate_trainer.fast.tree import visible

NAME = "palate_tree"
_flex = True
_FLEX_CAPABILITY = (8, 0)
_GROUP_TOKENS = 256
"""Maximum tokens of a subtree that forms one group."""


@dataclass
class Group:
    """A slice of queries and the keys that they see: their ancestors, then the slice itself."""

    queries: slice
    ancestors: list[slice]
    seen: torch.Tensor  # bool (queries, keys)
    # Cached, because all layers use the same plan.
    _bias: torch.Tensor | None = None

    def bias(self, copies: int) -> torch.Tensor:
        """The additive mask for `copies` query heads that share a key head.  # float32 (copies * queries, keys)"""
        if self._bias is None or len(self._bias) != copies * len(self.seen):
            bias = torch.zeros(self.seen.shape, device=self.seen.device).masked_fill_(~self.seen, float("-inf"))
            self._bias = bias.repeat(copies, 1)
        return self._bias


def groups(ends: torch.Tensor) -> list[Group]:
    """Splits a tree into groups.

    Args:
        ends: Of a `PrefixTree`.  # (tokens,)
    """
    last = ends.tolist()
    found: list[Group] = []

    def cut(start: int, stop: int, above: list[slice]) -> None:
        # [start, stop) is a run of sibling subtrees. Siblings are joined while they are small: fewer, larger products.
        while start < stop:
            end = last[start]
            if end - start > _GROUP_TOKENS:
                # Too large: the stem up to its first fork is a group, and the subtrees above it have the stem as ancestor.
                fork = start
                while fork < end and last[fork] == end and fork - start < _GROUP_TOKENS:
                    fork += 1
                add(start, fork, above)
                cut(fork, end, [*above, slice(start, fork)])
                start = end
                continue
            reach = end
            while reach < stop and last[reach] - start <= _GROUP_TOKENS // 2:
                reach = last[reach]
            add(start, reach, above)
            start = reach

    def add(start: int, stop: int, above: list[slice]) -> None:
        queries = slice(start, stop)
        own = visible(ends, queries, queries)
        older = torch.ones(stop - start, sum(s.stop - s.start for s in above), dtype=torch.bool, device=ends.device)
        found.append(Group(queries, above, torch.cat([older, own], dim=1)))

    cut(0, len(last), [])
    return found


class _GroupedAttention(torch.autograd.Function):
    """softmax(q k^T) v, group by group. The backward pass recomputes probabilities: they are cheap to compute but large."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: list[Group], scale: float) -> Any:
        q, k, v = (q * scale).contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(q)  # q (heads, tokens, dim), k and v (kv heads, tokens, dim)
        for group in plan:
            p = _probabilities(q, k, group).to(v.dtype)
            out[:, group.queries] = _merge(p @ _rows(v, group), q)
        # q is saved scaled, so the backward pass uses it as it is and scales only dq.
        ctx.save_for_backward(q, k, v)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v = ctx.saved_tensors
        # Each query is in exactly one group, so dq is written once. Ancestor keys are in many groups, so dk and dv accumulate.
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for group in ctx.plan:
            p = _probabilities(q, k, group)
            g = _split(grad[:, group.queries], k)
            dp = (g @ _rows(v, group).transpose(1, 2)).to(p.dtype)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).to(q.dtype)
            dq[:, group.queries] = _merge(ds @ _rows(k, group), q)
            _add_rows(dk, group, ds.transpose(1, 2) @ _split(q[:, group.queries], k))
            _add_rows(dv, group, p.to(g.dtype).transpose(1, 2) @ g)
        return dq.mul_(ctx.scale), dk, dv, None, None


def _probabilities(q: torch.Tensor, k: torch.Tensor, group: Group) -> torch.Tensor:
    """Softmax in float32, as in SDPA's kernels: rounding scores to 16 bits can exceed the difference between scores."""
    queries, keys = _split(q[:, group.queries], k), _rows(k, group)
    bias = group.bias(len(q) // len(k)).expand(len(k), -1, -1)
    return torch.baddbmm(bias, queries.float(), keys.float().transpose(1, 2)).softmax(-1)


def _split(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Groups query heads by shared key head.  # (heads, n, dim) -> (kv heads, heads / kv heads * n, dim)"""
    return q.reshape(len(k), -1, q.shape[-1])


def _merge(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return x.reshape(len(q), -1, x.shape[-1])


def _rows(x: torch.Tensor, group: Group) -> torch.Tensor:
    own = x[:, group.queries]
    return torch.cat([*(x[:, part] for part in group.ancestors), own], dim=1) if group.ancestors else own


def _add_rows(x: torch.Tensor, group: Group, values: torch.Tensor) -> None:
    start = 0
    for part in [*group.ancestors, group.queries]:
        stop = start + part.stop - part.start
        x[:, part] += values[:, start:stop]
        start = stop


def as_mask(ends: torch.Tensor) -> torch.Tensor:
    """The `attention_mask` of a packed tree.  # int64 (1, 1, 1, tokens)"""
    return ends[None, None, None]


def tree_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: tree attention if the mask is a tree, else SDPA."""
    if attention_mask is None or attention_mask.dtype != torch.int64:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return out, None
    if torch.is_autocast_enabled(query.device.type):
        # Autocast would do this for SDPA's inputs: rotary embeddings leave q and k in float32 while v is 16 bit.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if _flex and query.is_cuda and torch.cuda.get_device_capability(query.device) >= _FLEX_CAPABILITY:
        block_mask = _kept(attention_mask, "palate_blocks", flex_mask)
        return flex_attention_forward(module, query, key, value, block_mask, scaling=scaling)[0], None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    plan = _kept(attention_mask, "palate_groups", groups)
    with torch.autocast(query.device.type, enabled=False):  # autocast would round the scores to 16 bits
        out = _GroupedAttention.apply(query[0], key[0], value[0], plan, scale)  # type: ignore[no-untyped-call]
    return out.transpose(0, 1)[None], None  # (1, tokens, heads, dim)


def flex_mask(ends: torch.Tensor) -> BlockMask:
    """The tree's mask for FlexAttention.

    Args:
        ends: Of a `PrefixTree`.  # (tokens,)
    """

    def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (query < ends[key])

    return create_block_mask(seen, B=None, H=None, Q_LEN=len(ends), KV_LEN=len(ends), device=ends.device)


def allow_flex(allowed: bool) -> None:
    """Turns FlexAttention on GPUs on or off. It compiles on its first call, which needs tools that a machine may lack."""
    global _flex
    _flex = allowed


def _kept(mask: torch.Tensor, name: str, make: Callable[[torch.Tensor], Any]) -> Any:
    # All layers share one mask tensor, so the plan is stored on it: computed by the first layer, freed with the mask.
    if not hasattr(mask, name):
        setattr(mask, name, make(mask[0, 0, 0]))
    return getattr(mask, name)


# SDPA's masks for ordinary batches: they go to SDPA.
AttentionInterface.register(NAME, tree_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
