"""Log-probabilities of scored tokens from hidden states, without the logits. Knows one weight matrix, no model.

With a frozen head, the backward pass needs no second pass over the vocabulary: d log p[y] / d hidden = W[y] - softmax(logits) W,
and the forward pass can compute both terms. It processes the vocabulary in blocks with a running maximum, as FlashAttention
does with keys. A block of W is still in cache for its second product, and memory is bounded by one block of logits. This takes
two matrix products; recomputing the logits in the backward pass takes three.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

# Many rows get smaller blocks, to bound memory. Below the minimum, small matrix products would waste the device.
_VOCABULARY_BLOCK, _SMALLEST_BLOCK = 8192, 1024
_LOGITS_AT_ONCE = 2**24  # elements of one block


class Scores(NamedTuple):
    """What TRL's metrics need of scored tokens. float32 except for is_top1. Only `log_probs` has a gradient.

    Attributes:
        log_probs: Log-probability of each edge's target.  # (edges,)
        entropy: Entropy of the distribution the target was drawn from, in nats.  # (edges,)
        mean_logits: Mean logit over the vocabulary.  # (edges,)
        is_top1: Whether the target is the most likely token.  # (edges,)
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor
    is_top1: torch.Tensor


def score_edges(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    edge_rows: torch.Tensor,
    edge_targets: torch.Tensor,
) -> Scores:
    """Scores next tokens under a frozen LM head.

    Args:
        hidden: Final hidden states.  # (rows, hidden)
        weight: Of the LM head; gets no gradient.  # (vocabulary, hidden)
        bias: Of the LM head, or None.  # (vocabulary,)
        edge_rows: Row of each edge.  # (edges,)
        edge_targets: Token id of each edge.  # (edges,)
    """
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would round the sums to 16 bits
        return Scores(*_OnePass.apply(hidden, weight, bias, edge_rows, edge_targets))  # type: ignore[no-untyped-call]


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        edge_rows: torch.Tensor,
        edge_targets: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.dtype, hidden = hidden.dtype, hidden.to(weight.dtype)
        top, log_sum, mean_excess, target_logits, expected = _fold(
            hidden, weight, bias, edge_rows, edge_targets, with_gradient=ctx.needs_input_grad[0]
        )
        if expected is not None:
            ctx.save_for_backward(expected, weight[edge_targets], edge_rows)
        # The mean over the vocabulary commutes with the product, so it needs no logits.
        mean_logits = hidden.float() @ weight.mean(0, dtype=torch.float32)
        if bias is not None:
            mean_logits += bias.float().mean()
        entropy = log_sum - (top + mean_excess)
        results = (
            target_logits - log_sum[edge_rows],
            entropy[edge_rows],
            mean_logits[edge_rows],
            target_logits >= top[edge_rows],
        )
        # Only for metrics. Marked, so that autograd does not expect gradients for them.
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        expected, chosen, edge_rows = ctx.saved_tensors
        weighted = grad.unsqueeze(1) * (chosen.float() - expected[edge_rows])
        return torch.zeros_like(expected).index_add_(0, edge_rows, weighted).to(ctx.dtype), None, None, None, None


def _fold(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    edge_rows: torch.Tensor,
    edge_targets: torch.Tensor,
    *,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Online softmax over vocabulary blocks, in float32.

    Returns:
        Per row: the largest logit, logsumexp(logits), and E[logit] - max. Per edge: its target's logit. With gradient:
        softmax(logits) W per row.  # (rows,), (rows,), (rows,), (edges,), (rows, hidden)
    """
    rows = len(hidden)
    top = torch.full((rows, 1), float("-inf"), device=hidden.device)
    total, excess = torch.zeros_like(top), torch.zeros_like(top)
    target_logits = torch.zeros(len(edge_targets), device=hidden.device)
    expected = torch.zeros((rows, weight.shape[1]), device=hidden.device) if with_gradient else None
    block = min(_VOCABULARY_BLOCK, max(_SMALLEST_BLOCK, _LOGITS_AT_ONCE // max(1, rows)))
    for start in range(0, len(weight), block):
        part = weight[start : start + block]
        logits = (hidden @ part.T).float()
        if bias is not None:
            logits += bias[start : start + block]
        place = edge_targets - start
        inside = (place >= 0) & (place < len(part))
        picked = logits[edge_rows, place.clamp(0, len(part) - 1)]
        target_logits = torch.where(inside, picked, target_logits)
        # All sums are relative to the running maximum. If it grows, the old sums are rescaled, so exp never overflows.
        # `shift` is 0 in the first block, where top is -inf and -inf * 0 would be NaN.
        higher = torch.maximum(top, logits.amax(-1, keepdim=True))
        shrink, shift = torch.exp(top - higher), torch.where(total > 0, top - higher, 0.0)
        logits -= higher
        weights = logits.exp()
        excess = (excess + total * shift) * shrink + torch.linalg.vecdot(weights, logits).unsqueeze(1)
        total = total * shrink + weights.sum(-1, keepdim=True)
        if expected is not None:
            _add_product(expected.mul_(shrink), weights, part)
        top = higher
    if expected is not None:
        expected /= total
    return top.squeeze(1), (top + total.log()).squeeze(1), (excess / total).squeeze(1), target_logits, expected


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total += left @ right` with a float32 product: rounding it to 16 bits would bias training over many steps."""
    if right.dtype != torch.float32 and right.device.type == "cuda":
        torch.addmm(total, left.to(right.dtype), right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left, right.float())
