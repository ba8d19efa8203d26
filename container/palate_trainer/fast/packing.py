"""Whether a model takes the fast path: what is known of its architecture, then a trial of what training does. Knows models, no trainer.

The trial runs forward and backward pass on a few rows, TRL's way first, then the fast way. Log-probabilities and gradients must
agree; what fails or differs is undone, so that the model is again the one that TRL's trainer was given.
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
"""Config fields by which some architectures change their logits; TRL's own path knows them all."""

_COMPARED_GRADIENTS = 2**24
"""Elements of the gradient that the trial compares: those of the first layers, which every layer's backward pass has a part in."""


@dataclass(frozen=True)
class Tolerance:
    """What counts as rounding between two ways to compute the same.

    Attributes:
        logps: Mean distance of log-probabilities, in nats a token.
        gradients: Distance of gradients, as a share of their norm.
    """

    logps: float
    gradients: float


EXACT, ROUNDED = Tolerance(1e-4, 1e-2), Tolerance(0.1, 0.3)
"""For arithmetic in float32, and in 16 bits: there two orders of sums are a few percent apart in the gradients of deep models."""


@dataclass(frozen=True)
class Trial:
    """What came of it.

    Attributes:
        reason: Why batches are not packed, or None when they are.
        failures: What the trial found to fail or differ, in words; empty where only a known trait of the model spoke against it.
        fused: Whether LoRA layers, norms and gates have their fused computation.
    """

    reason: str | None = None
    failures: tuple[str, ...] = ()
    fused: bool = True

    @property
    def fast(self) -> bool:
        """Whether anything is computed otherwise than TRL does."""
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
    """Gives the models what they can take of the fast path, and leaves them as they were in the rest.

    Args:
        models: The policy, and a reference model beside it or None.
        collate: Makes a small batch of the data, with its tree if it is told True, on the device of the data.
        autocast: As in training.
        longest: Tokens of the longest sequence in the data.
        tolerance: What counts as rounding.
        packable: Whether there is a tree for the batches of this training.
        options: Further arguments of the model in training.
    """
    policy = models[0]
    networks = [one.get_base_model() if isinstance(one, PeftModel) else one for one in models if one is not None]
    reason = why_not(networks[0], longest=longest) if packable else "its batches are not packed"
    plain = collate(False)
    if next(policy.parameters()).device.type != plain["input_ids"].device.type:
        # FSDP brings the weights to the GPUs when training begins.
        return Trial("its weights are split later, so the fast path cannot be tried", fused=False)
    if rounds_activations(policy) and not plain["input_ids"].is_cuda:
        # Seen: 0.06 nats a token between two batches in float32, which no tolerance tells from a fault, and slow passes.
        return Trial("its 8-bit layers round their inputs, so that a trial could prove nothing", fused=False)
    try:
        expected = _pass(policy, plain, autocast, options)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # TRL's trainer will meet the same, or it calls the model otherwise: its own way is the safe one.
        return Trial("it could not be tried", (f"TRL's own pass failed in the trial: {_short(error)}",), fused=False)

    def problem(batch: dict[str, Any]) -> str | None:
        try:
            return expected.difference(_pass(policy, batch, autocast, options), tolerance)
        except Exception as error:  # the architecture's own code, a kernel that does not compile, too little memory
            return _short(error)

    failures: list[str] = []
    unfuse = _fuse(policy)
    if reason is None:
        undo = [add_tree_forward(network) for network in networks]
        packed = collate(True)
        found = problem(packed)
        if found is not None and packed["input_ids"].is_cuda:
            attention.allow_flex(False)
            found = problem(packed)
        if found is None:
            return Trial()
        for one in undo:
            one()
        failures.append(f"packed batches: {found}")
        reason = found
    found = problem(plain)
    if found is not None:
        unfuse()
        failures.append(f"fused layers: {found}")
    if failures and plain["input_ids"].is_cuda:
        torch.cuda.empty_cache()
    return Trial(reason, tuple(failures), fused=found is None)


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
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and longest > window:
        return f"its sliding window of {window} tokens is shorter than the longest sequence ({longest})"
    return None


def rounds_activations(model: Any) -> bool:
    """Whether the model's layers take 8-bit inputs, whatever the precision: two orders of rows are then rounded apart."""
    return any(type(module).__name__ == "Linear8bitLt" for module in model.modules())


def _fuse(model: torch.nn.Module) -> Callable[[], None]:
    """Gives LoRA layers, norms and gates their fused computation; returns a function that undoes it."""
    before = {module: vars(module).get("forward") for module in model.modules()}
    changed = [*fuse_elementwise(model), *fuse_lora(model)]  # a reference beside it keeps nothing for a backward pass

    def undo() -> None:
        for module in changed:
            vars(module).pop("forward", None)
            if (forward := before[module]) is not None:
                module.forward = forward

    return undo


@dataclass(frozen=True)
class _Outcome:
    """What one pass over a batch gave.

    Attributes:
        logps: Of every token; 0 where none is scored.  # (sequences, length - 1)
        scored: How many are.
        balance: The load-balancing loss of a mixture of experts, or 0.
        gradients: Of the first layers' trainable weights.  # (elements,)
    """

    logps: torch.Tensor
    scored: int
    balance: float
    gradients: torch.Tensor

    def difference(self, other: _Outcome, tolerance: Tolerance) -> str | None:
        """What sets the other apart by more than rounding, in words; None when nothing does."""
        apart = float((other.logps - self.logps).abs().sum()) / max(1, self.scored)
        if not apart <= tolerance.logps:  # no number compares False
            return f"its log-probabilities differ by {apart:.2g} a token"
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
    """Forward and backward pass over a batch; leaves no gradient and no random number used.

    Without dropout, which would tell any two passes apart.
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
    """Gradients of the first layers, embeddings left out, as one row of float32."""
    picked: list[torch.Tensor] = []
    room = _COMPARED_GRADIENTS
    for name, parameter in model.named_parameters():
        if parameter.grad is None or "embed" in name:
            continue
        if picked and parameter.numel() > room:
            break
        picked.append(parameter.grad.float().flatten())
        room -= parameter.numel()
    return torch.cat(picked) if picked else torch.zeros(1)


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
