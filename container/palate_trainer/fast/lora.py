"""Fused LoRA forward and backward passes with less memory traffic. Knows PEFT's linear layers, no model.

PEFT computes `base(x) + B(A(x)) * scaling` as separate operations, and autograd adds their gradients separately. Here the
matrix product accumulates the low-rank term into the base's result (addmm), in both directions, in the base's dtype.
The sums are the same. Only the number of memory passes differs.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional

# Compared by name, because bitsandbytes' classes exist only if it is installed.
_LAYERS = ("Linear", "Linear4bit", "Linear8bitLt")


class _FrozenWithLowRank(torch.autograd.Function):
    """`x W^T + bias + scaling * x A^T B^T`, with W frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        # A and B are float32 for the optimizer, but the product runs in the base's dtype, as under PEFT with autocast.
        small = flat @ a.to(x.dtype).T  # (tokens, rank)
        out = functional.linear(flat, weight, bias).addmm_(small, b.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(flat, weight, a, b, small)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        flat, weight, a, b, small = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        a_grad, b_grad, small_grad = _low_rank_gradients(grad, flat, a, b, small, ctx.scaling)
        # The first layers have an input without gradient: the embeddings are frozen.
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (grad @ weight).addmm_(small_grad, a.to(grad.dtype)).view(ctx.shape)
        return x_grad, None, None, a_grad, b_grad, None


class _AddLowRank(torch.autograd.Function):
    """`out + scaling * x A^T B^T`, for a base that computes `out` itself (quantised) or a different x (LoRA dropout)."""

    @staticmethod
    def forward(
        ctx: Any, out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        small = flat @ a.to(x.dtype).T
        ctx.save_for_backward(flat, a, b, small)
        ctx.scaling, ctx.shape = scaling, x.shape
        return torch.addmm(out.reshape(-1, out.shape[-1]), small, b.to(x.dtype).T, alpha=scaling).view(out.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        flat, a, b, small = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        a_grad, b_grad, small_grad = _low_rank_gradients(rows, flat, a, b, small, ctx.scaling)
        x_grad = (small_grad @ a.to(grad.dtype)).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return grad, x_grad, a_grad, b_grad, None


def _low_rank_gradients(
    grad: torch.Tensor, flat: torch.Tensor, a: torch.Tensor, b: torch.Tensor, small: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of A, of B, and of `x A^T`."""
    small_grad = (grad @ b.to(grad.dtype)).mul_(scaling)  # (tokens, rank)
    b_grad = torch.mm(grad.T, small).mul_(scaling).to(b.dtype)
    a_grad = torch.mm(small_grad.T, flat).to(a.dtype)
    return a_grad, b_grad, small_grad


def fuse_lora(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Replaces the forward of every LoRA linear layer with the fused one, and returns the layers.

    Each call falls back to PEFT's own forward for adapters that are disabled, merged, mixed or several, and for variants
    such as DoRA.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and type(layer).__name__ in _LAYERS]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return layers


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    adapter = self.active_adapters[0] if len(self.active_adapters) == 1 else None
    if (
        adapter not in self.lora_A
        or adapter in self.lora_variant
        or self.disable_adapters
        or self.merged
        or args
        or kwargs
        or self.lora_A[adapter].bias is not None
        or self.lora_B[adapter].bias is not None
    ):
        return type(self).forward(self, x, *args, **kwargs)
    # Decided per call, not at installation: TRL disables the adapter for the reference and switches between adapters.
    base, dropout = self.base_layer, self.lora_dropout[adapter]
    a, b, scaling = self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.scaling[adapter]
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if (
        type(base) is torch.nn.Linear
        and base.weight.dtype == x.dtype
        and not base.weight.requires_grad
        and not (self.training and isinstance(dropout, torch.nn.Dropout))
    ):
        return _FrozenWithLowRank.apply(x, base.weight, base.bias, a, b, scaling)  # type: ignore[no-untyped-call]
    out = base(x)
    return _AddLowRank.apply(out, dropout(x).to(out.dtype), a, b, scaling)  # type: ignore[no-untyped-call]
