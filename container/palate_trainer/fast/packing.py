"""Decides by architecture and by a trial whether a model can use the fast path. Knows models, no trainer.

The trial runs a forward and a backward pass on a few rows, first through TRL's path, then through the fast path.
Log-probabilities and gradients must agree. If the fast path fails or differs, it is removed and the model is as before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from palate_trainer.failures import is_out_of_memory
from palate_trainer.fast import attention
from palate_trainer.fast.elementwise import fuse_elementwise
from palate_trainer.fast.forward import add_tree_forward
from palate_trainer.fast.lora import fuse_lora

_LOGIT_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling", "final_logit_softcapping")
"""Config fields with which some architectures modify their logits. Only TRL's own path supports them."""

_COMPARED_GRADIENTS = 2**24
"""Gradient elements that the trial compares. They are those of the first layers, because every layer's backward pass
contributes to them."""


@dataclass(frozen=True)
class Tolerance:
    """Differences that count as rounding.

    Attributes:
        logps: Mean difference of log-probabilities, in nats per token.
        gradients: Difference of gradients, relative to their norm.
    """

    logps: float
    gradients: float


EXACT, ROUNDED = Tolerance(1e-4, 1e-2), Tolerance(0.1, 0.3)
"""For float32 and for 16-bit arithmetic. In 16 bits the order of sums changes the gradients of deep models by a few percent."""


@dataclass(frozen=True)
class Trial:
    """The result of the trial.

    Attributes:
        reason: Why batches are not packed, or None if they are.
        failures: What failed or differed in the trial. Empty if only a known property of the model rules packing out.
        fused: Whether LoRA layers, norms and gates use the fused implementations.
    """

    reason: str | None = None
    failures: tuple[str, ...] = ()
    fused: bool = True

    @property
    def fast(self) -> bool:
        """Whether any part of the fast path is active."""
        return self.fused or self.reason is None


def try_fast_path(
    models: list[Any],
    collate: Callable[[bool], dict[str, Any]],
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    longest: int,
    tolerance: Tolerance,
    packable: bool,
    options: dict[str, Any] | None = None,
) -> Trial:
    """Installs the parts of the fast path that work for the models.

    Args:
        models: The policy, and its separate reference model or None.
        collate: Makes a small batch on the training device, with its tree if the argument is True.
        autocast: The autocast context of training.
        longest: Tokens of the longest sequence in the data.
        tolerance: Differences that count as rounding.
        packable: Whether the training's collator can build trees.
        options: Extra model arguments in training.
    """
    policy = models[0]
    networks = [one.get_base_model() if isinstance(one, PeftModel) else one for one in models if one is not None]
    reason = why_not(networks[0], longest=longest) if packable else "its batches are not packed"
    plain = collate(False)
    if next(policy.parameters()).device.type != plain["input_ids"].device.type:
        # FSDP moves the weights to the GPUs only when training starts.
        return Trial("its weights are split later, so the fast path cannot be tried", fused=False)
    if rounds_activations(policy) and not plain["input_ids"].is_cuda:
        # Measured: 0.06 nats per token between two batches in float32. No tolerance separates that from a bug.
        return Trial("its 8-bit layers round their inputs, so a trial would prove nothing", fused=False)
    try:
        expected = _pass(policy, plain, autocast, options)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # Either training fails the same way, or TRL's trainer calls the model differently. TRL's own path is the safe choice.
        return Trial("it could not be tried", (f"TRL's own pass failed in the trial: {_short(error)}",), fused=False)

    def problem(batch: dict[str, Any]) -> str | None:
        try:
            return expected.difference(_pass(policy, batch, autocast, options), tolerance)
        except Exception as error:  # the model's own code, a kernel that does not compile, out of memory
            return _short(error)

    failures: list[str] = []
    unfuse = _fuse(policy)
    if reason is None:
        undo = [add_tree_forward(network) for network in networks]
        packed = collate(True)
        found = problem(packed)
        # FlexAttention needs a compiler at run time. Grouped attention does not, so try it before giving up packing.
        if found is not None and packed["input_ids"].is_cuda:
            attention.allow_flex(False)
            found = problem(packed)
        if found is None:
            return Trial()
        for one in undo:
            one()
        failures.append(f"packed batches: {found}")
        reason = found
    # Without packing the fused layers can still help, so they get their own trial on the plain batch.
    found = problem(plain)
    if found is not None:
        unfuse()
        failures.append(f"fused layers: {found}")
    if failures and plain["input_ids"].is_cuda:
        torch.cuda.empty_cache()
    return Trial(reason, tuple(failures), fused=found is None)


def why_not(model: Any, *, longest: int) -> str | None:
    """Why a model cannot use packed batches, or None if no reason is known.

    Args:
        model: A causal language model.
        longest: Tokens of the longest sequence.
    """
    config = model.config.get_text_config()
    if model.config._attn_implementation not in ("sdpa", attention.NAME):
        return f"its attention is {model.config._attn_implementation}"
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _LOGIT_FACTORS):
        return "it modifies its logits after the LM head"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}"
    if any(isinstance(module, torch.nn.Conv1d) for module in model.modules()):
        return "its convolutions mix neighbouring tokens of the packed row"
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and longest > window:
        return f"its sliding window of {window} tokens is shorter than the longest sequence ({longest})"
    return None


def rounds_activations(model: Any) -> bool:
    """Whether layers quantise their inputs to 8 bit. Then the result of a row depends on the rest of its batch."""
    return any(type(module).__name__ == "Linear8bitLt" for module in model.modules())


def _fuse(model: torch.nn.Module) -> Callable[[], None]:
    """Installs the fused LoRA layers, norms and gates. Returns a function that removes them."""
    before = {module: vars(module).get("forward") for module in model.modules()}
    # Only the policy: a separate reference model has no backward pass, so it keeps no activations that fusing could save.
    changed = [*fuse_elementwise(model), *fuse_lora(model)]

    def undo() -> None:
        for module in changed:
            vars(module).pop("forward", None)
            if (forward := before[module]) is not None:
                module.forward = forward

    return undo


@dataclass(frozen=True)
class _Outcome:
    """The result of one pass over a batch.

    Attributes:
        logps: Log-probability of each token; 0 if it is not scored.  # (sequences, length - 1)
        scored: Number of scored tokens.
        balance: Load-balancing loss of a mixture of experts, or 0.
        gradients: Gradients of the first layers' trainable weights.  # (elements,)
    """

    logps: torch.Tensor
    scored: int
    balance: float
    gradients: torch.Tensor

    def difference(self, other: _Outcome, tolerance: Tolerance) -> str | None:
        """Describes the first difference beyond rounding; None if there is none."""
        apart = float((other.logps - self.logps).abs().sum()) / max(1, self.scored)
        if not apart <= tolerance.logps:  # `not <=`, so that NaN counts as a difference
            return f"its log-probabilities differ by {apart:.2g} per token"
        if not abs(other.balance - self.balance) <= tolerance.logps * max(1.0, abs(self.balance)):
            return f"its load-balancing loss is {other.balance:.4g} instead of {self.balance:.4g}"
        size = float(self.gradients.norm())
        apart = float((other.gradients - self.gradients).norm())
        if not apart <= tolerance.gradients * size:
            return f"its gradients differ by {apart / size if size else apart:.2g} of their norm"
        return None


def _pass(
    model: Any,
    batch: dict[str, Any],
    autocast: Callable[[], AbstractContextManager[Any]],
    options: dict[str, Any] | None,
) -> _Outcome:
    """Forward and backward pass over a batch, without dropout, which would make any two passes differ.

    Leaves no gradients, and the random state as it was: a run with a trial must equal a run without one.
    """
    labels = (
        batch["labels"] if "labels" in batch else batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    )
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "tree") if name in batch}
    training = model.training
    cuda = [batch["input_ids"].device] if batch["input_ids"].is_cuda else []
    model.eval()
    try:
        with torch.random.fork_rng(devices=cuda):
            with autocast():
                output = model(**inputs, labels=labels, fused_lm_head=True, use_cache=False, **(options or {}))
            logps, balance = output.log_probs.float(), output.aux_loss
            total = logps.sum()
            (total if balance is None else total + balance).backward()
        return _Outcome(
            logps.detach(),
            int((labels[:, 1:] != -100).sum()),
            0.0 if balance is None else float(balance),
            _gradients(model),
        )
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)


def _gradients(model: torch.nn.Module) -> torch.Tensor:
    """Gradients of the first layers without embeddings, flattened to one float32 vector."""
    picked: list[torch.Tensor] = []
    room = _COMPARED_GRADIENTS
    for name, parameter in model.named_parameters():
        if parameter.grad is None or "embed" in name:
            continue
        # At least one parameter, even if it is larger than the limit: an empty comparison would pass anything.
        if picked and parameter.numel() > room:
            break
        picked.append(parameter.grad.float().flatten())
        room -= parameter.numel()
    return torch.cat(picked) if picked else torch.zeros(1)


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
