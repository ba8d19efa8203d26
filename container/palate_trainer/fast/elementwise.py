"""RMSNorm and gated SiLU that keep fewer activations for the backward pass. Knows two common module layouts, no model.

Autograd keeps every intermediate of `weight * (x * rsqrt(mean(x**2) + eps))` and of `silu(gate) * up`. Here only the inputs
are kept and the rest is recomputed, which is faster than reading it back. A module is replaced only if a test input gives
the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch.nn import functional


class _RMSNorm(torch.autograd.Function):
    """RMSNorm with a frozen weight. Sums are float32 for any dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        # In float32, as the modules compute it: a sum of squares in 16 bits loses precision with the hidden size.
        wide = x.float()
        scale = (torch.linalg.vecdot(wide, wide).unsqueeze(-1) / x.shape[-1] + eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        normed: torch.Tensor = (wide * scale).to(x.dtype).mul_(weight)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        wide, weighted = x.float(), (grad * weight).float()
        along = torch.linalg.vecdot(weighted, wide).unsqueeze(-1) * scale**3 / -x.shape[-1]
        return weighted.mul_(scale).addcmul_(wide, along).to(x.dtype), None, None


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        activated = functional.silu(gate)
        up_grad = grad * activated
        # `activated` is reused as a buffer: this layer's activations are the largest of the network.
        return torch.ops.aten.silu_backward(activated.copy_(grad).mul_(up), gate), up_grad


def fuse_elementwise(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Replaces the forward of matching modules, and returns the modules."""
    fused: list[torch.nn.Module] = []
    verdicts: dict[type, bool] = {}  # one test per class: its modules compute the same function
    for module in model.modules():
        form = _form(module)
        if form is None:
            continue
        # Same layout does not mean same function: some RMSNorms add 1 to the weight (Gemma), some gates use GELU.
        if type(module) not in verdicts:
            verdicts[type(module)] = _same(module, *form)
        if verdicts[type(module)]:
            module.forward = MethodType(form[0], module)
            fused.append(module)
    return fused


def _form(module: Any) -> tuple[Callable[..., Any], int] | None:
    """The replacement for a module's forward and the width of its input, or None if the layout is unknown."""
    children = {name for name, _ in module.named_children()}
    if not children and hasattr(module, "variance_epsilon") and [n for n, _ in module.named_parameters()] == ["weight"]:
        return _norm, len(module.weight)
    if children - {"act_fn"} == {"gate_proj", "up_proj", "down_proj"} and hasattr(module, "act_fn"):
        return _gated, module.gate_proj.in_features
    return None


def _norm(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    # More arguments mean another computation: the norms of Mamba-2 layers take a gate.
    if args or kwargs or self.weight.requires_grad or self.weight.dtype != x.dtype:
        normed: torch.Tensor = type(self).forward(self, x, *args, **kwargs)
        return normed
    return _RMSNorm.apply(x, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call,no-any-return]


def _gated(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args or kwargs:
        own: torch.Tensor = type(self).forward(self, x, *args, **kwargs)
        return own
    gate, up = self.gate_proj(x), self.up_proj(x)
    projected: torch.Tensor = self.down_proj(_GatedSilu.apply(gate, up))  # type: ignore[no-untyped-call]
    return projected


@torch.no_grad()
def _same(module: Any, forward: Callable[..., Any], width: int) -> bool:
    weight = next(module.parameters())
    # Not random: the test must not change the random state of the run. Asymmetric, so that sign errors show.
    x = torch.linspace(-2, 3, 3 * width, device=weight.device).view(1, 3, width)
    x = x.to(weight.dtype if weight.is_floating_point() and weight.element_size() > 1 else torch.float32)
    was_training = module.training
    module.eval()  # dropout would make the two results differ
    try:
        expected, found = module(x), forward(module, x)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    finally:
        module.train(was_training)
    close = 1e-5 if expected.dtype == torch.float32 else 1e-2
    return torch.allclose(found.float(), expected.float(), rtol=close, atol=close * float(expected.abs().max()))
