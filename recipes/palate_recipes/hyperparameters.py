"""What hyperparameters mean together: validation of what a user gives, and resolution on a machine.
Knows no trainer and no ML library; one value at a time is `palate_recipes.schema`.

    validate(values, method="LoRA_LLM")               only the given names, in their own types
    resolve(values, method="LoRA_LLM", device=facts)  every name, the precision, a note for each silent change
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from msgspec.structs import asdict, replace

from palate_recipes.errors import HyperparameterError
from palate_recipes.lora_targets import why_not_served
from palate_recipes.schema import (
    HYPERPARAMETERS,
    METHODS,
    Hyperparameter,
    Hyperparameters,
    Method,
    as_definitions,
    describe,
    show,
)
from palate_recipes.text import nearest

__all__ = [
    "HYPERPARAMETERS",
    "METHODS",
    "DeviceFacts",
    "Hyperparameter",
    "Hyperparameters",
    "Precision",
    "Resolved",
    "as_definitions",
    "check_method",
    "describe",
    "resolve",
    "validate",
]

Precision = Literal["bfloat16", "float16", "float32"]

# What users of other toolkits type. Hinted at, never accepted: one name a thing keeps manifests comparable.
_HINTS: Mapping[str, tuple[str, ...]] = {
    "training_strategy": ("training_method", "training_type", "strategy", "stage", "rlhf_type"),
    "learning_rate": ("lr", "base_lr", "peak_lr"),
    "num_train_epochs": ("epoch", "epochs", "n_epochs", "num_epochs"),
    "per_device_train_batch_size": ("batch_size", "train_batch_size", "micro_batch_size"),
    "seq_length": (
        "max_length",
        "max_seq_length",
        "max_seq_len",
        "max_context_length",
        "sequence_len",
        "sequence_length",
        "cutoff_len",
    ),
    "lora_dim": ("lora_rank", "lora_r", "rank", "r"),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "dpo_beta": ("beta", "pref_beta", "kto_beta"),
    "desirable_weight": ("kto_chosen_weight", "chosen_weight", "lambda_d"),
    "undesirable_weight": ("kto_rejected_weight", "rejected_weight", "lambda_u"),
    "load_in_4bit": ("quantization_bit", "quant_bits", "quantization"),
    "gradient_accumulation_steps": ("grad_accum", "accumulate_grad_batches", "gradient_accumulation"),
    "apply_chat_template": ("chat_template", "use_chat_template"),
    "system_prompt": ("system", "default_system", "system_message"),
    "warmup_ratio": ("warmup_steps", "warmup", "lr_warmup"),
    "target_modules": ("lora_target", "lora_target_modules", "lora_trainable_modules"),
    "lr_scheduler_type": ("lr_scheduler", "scheduler"),
    "max_grad_norm": ("max_gradient_norm", "gradient_clipping", "clip_grad"),
    "seed": ("random_seed",),
    "loss_type": ("pref_loss", "dpo_loss", "dpo_loss_type"),
    "bad_rows": ("skip_bad_rows", "on_bad_row"),
    "loss_weights": ("loss_weight", "pref_ftx", "rpo_alpha"),
    "precision": ("dtype", "torch_dtype", "mixed_precision", "compute_dtype", "bf16", "fp16"),
    "gradient_checkpointing": ("use_gradient_checkpointing", "activation_checkpointing"),
    "fsdp": ("sharding_strategy", "fsdp_strategy", "zero_stage"),
}
_LORA_NAMES = ("lora_dim", "lora_alpha", "lora_dropout", "target_modules")
_PAIR_NAMES = ("loss_type", "loss_weights", "label_smoothing", "ld_alpha", "discopop_tau")
_DPO_NAMES = ("dpo_beta", *_PAIR_NAMES)
_KTO_NAMES = ("desirable_weight", "undesirable_weight")
_KTO_BATCH = 4
"""Answers of a batch where none are asked for: TRL's advice for its estimate of the KL divergence is 4 or more."""
_SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}

# Objectives that TRL 1.16 keeps in trl.experimental only, and what comes nearest among its stable ones.
_NOT_OFFERED: Mapping[str, str] = {
    "simpo": "training_strategy=dpo with loss_type=sigmoid_norm compares length-normalised log-probabilities, with a reference",
    "cpo": 'training_strategy=dpo with loss_type="sigmoid,sft" adds its likelihood term to DPO',
    "orpo": 'training_strategy=dpo with loss_type="sigmoid,sft" adds the likelihood of the chosen answer to DPO',
}


@dataclass(frozen=True)
class DeviceFacts:
    """What training needs to know of a machine. `bf16` and `fp16` are what its GPU, or without CUDA its CPU,
    computes fast; a CPU has bf16 with avx512_bf16 or amx. `gpu_name` and `gpu_memory_gib` are those of the first GPU,
    `gpu_count` says how many a run may use (0: not known); `memory_is_limited` says that `memory_gib` is a limit that
    the run was given, and not what the machine has."""

    cuda: bool
    bf16: bool
    fp16: bool
    gpu_name: str = ""
    gpu_memory_gib: float = 0.0
    memory_gib: float = 0.0
    gpu_count: int = 0
    memory_is_limited: bool = False


@dataclass(frozen=True)
class Resolved:
    """The hyperparameters of one run with every default written out, the precision it computes in (also under
    `precision` in `values`, in place of `auto`), and one sentence for each default that gave way and each given value
    that has no effect."""

    values: Hyperparameters
    precision: Precision
    notes: tuple[str, ...]


def validate(values: Mapping[str, object] | Hyperparameters | None, *, method: str) -> dict[str, Any]:
    """Check the given hyperparameters and return them in their own types; defaults are not filled in.

    Args:
        values: names to values; strings are read as PAI sends them (`"5e-5"`, `"true"`). None is no values. Resolved ones
            may be given again: each counts as given.
        method: one of `METHODS`.

    Raises:
        HyperparameterError: lists every problem at once, each with name, value and what it must be.
    """
    check_method(method)
    if isinstance(values, Hyperparameters):
        values = asdict(values)
    if values is not None and not isinstance(values, Mapping):
        raise HyperparameterError(
            f"hyperparameters is a {type(values).__name__}; give a dict of names to values, such as "
            '{"training_strategy": "dpo"}'
        )
    given: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in (values or {}).items():
        row = HYPERPARAMETERS.get(name)
        if row is None:
            problems.append(f"{str(name)[:60]} = {shorten(value)}: unknown name; {_hint(name)}")
            continue
        try:
            given[name] = row.parse(value)
        except ValueError as error:
            problems.append(f"{name} = {shorten(value)}: {error}{_not_offered(value)}")
    problems.extend(_contradictions(given, method))
    problems.extend(_loss_contradictions(given))
    problems.extend(_kto_contradictions(given))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise HyperparameterError(f"{count} in the hyperparameters for {method}:\n  " + "\n  ".join(problems))
    return given


def resolve(values: Mapping[str, object] | Hyperparameters | None, *, method: str, device: DeviceFacts) -> Resolved:
    """Check the given hyperparameters, fill in every default, and settle what depends on method and machine.

    Under kto a batch has 4 answers unless a size is given: PAI's default of 1 cannot work there.
    The 4-bit rule is PAI's (an adapter, load_in_4bit and not load_in_8bit hold the weights in 4 bits), except
    that the default of load_in_4bit gives way where it cannot work: without CUDA, with load_in_8bit, and in
    Standard_LLM. QLoRA_LLM asks for 4 bits by its name, so there the default holds without CUDA too.

    Raises:
        HyperparameterError: as `validate`, or the machine cannot compute in the given `precision`.
    """
    given = validate(values, method=method)
    resolved = Hyperparameters(**given)
    if problem := _impossible_precision(resolved.precision, device):
        raise HyperparameterError(f"1 problem in the hyperparameters for {method}:\n  {problem}")
    precision = _precision(resolved.precision, device)
    emulated = precision == "bfloat16" and not device.bf16
    no_bfloat16 = resolved.precision == "auto" and precision == "float16"
    resolved = replace(resolved, precision=precision)
    notes: list[str] = []

    if resolved.training_strategy == "kto" and "per_device_train_batch_size" not in given:
        resolved = replace(resolved, per_device_train_batch_size=_KTO_BATCH)
        notes.append(
            f"per_device_train_batch_size is {_KTO_BATCH}: kto estimates the KL divergence from the answers of one batch, "
            "and the default of 1 has none to compare."
        )
    if "load_in_4bit" not in given and (reason := _why_not_4bit(resolved, method, device, precision)):
        resolved = replace(resolved, load_in_4bit=False)
        notes.append(f"load_in_4bit is false: {reason}.")
    quantised = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(resolved, name)]
    if quantised and not device.cuda:
        notes.append(
            f"{quantised[0]} stays true without CUDA, as asked: "
            f"it needs bitsandbytes' CPU kernels and is slower than {precision} weights."
        )
    if no_bfloat16:
        notes.append(f"{device.gpu_name or 'This GPU'} has no bfloat16: training computes in float16.")
    if emulated:
        notes.append(
            "precision=bfloat16 is emulated: this processor has neither avx512_bf16 nor amx, so training is slower than in float32."
        )
    if resolved.fsdp == "full_shard" and (not device.cuda or device.gpu_count == 1):
        notes.append(
            f"fsdp has no effect: {'there is one GPU' if device.cuda else 'there is no CUDA'} to hold the weights."
        )
    notes.extend(_without_effect(given, resolved, method))
    return Resolved(values=resolved, precision=precision, notes=tuple(notes))


def _why_not_4bit(resolved: Hyperparameters, method: str, device: DeviceFacts, precision: Precision) -> str | None:
    if method == "Standard_LLM":
        return "Standard_LLM trains every weight, and 4-bit weights cannot be trained"
    if resolved.load_in_8bit:
        return "load_in_8bit=true was given, and weights are held in one of the two"
    if resolved.fsdp == "full_shard" and device.cuda and device.gpu_count != 1:
        return f"fsdp=full_shard was given, and 4-bit weights cannot be split, so they are held in {precision}"
    if not device.cuda and method != "QLoRA_LLM":
        return f"its default is for CUDA, which this machine lacks, so the weights are held in {precision}"
    return None


def check_method(method: str) -> Method:
    """The method's name if it is one of `METHODS`.

    Raises:
        HyperparameterError: it is not; the message names the nearest one and all of them.
    """
    if isinstance(method, str) and method in METHODS:
        return cast(Method, method)
    text = method[:60] if isinstance(method, str) else shorten(method)
    meant = {"full": "Standard_LLM", "full_ft": "Standard_LLM"}.get(text.casefold())
    meant = meant or nearest(text, METHODS, cutoff=0.5)
    hint = f'did you mean "{meant}"? ' if meant else ""
    known = "; ".join(f"{name} {meaning}" for name, meaning in METHODS.items())
    raise HyperparameterError(f"method = {text!r}: unknown method; {hint}The methods are: {known}.")


def _contradictions(given: Mapping[str, Any], method: str) -> Iterable[str]:
    four, eight = given.get("load_in_4bit"), given.get("load_in_8bit")
    if method == "Standard_LLM":
        for name in ("load_in_4bit", "load_in_8bit"):
            if given.get(name):
                yield f"{name} = true: Standard_LLM trains full weights; drop it, or use method QLoRA_LLM"
        return
    if given.get("fsdp") == "full_shard":
        if method == "QLoRA_LLM":
            yield 'fsdp = "full_shard": it cannot split 4-bit or 8-bit weights; drop it, or use method LoRA_LLM'
        for name in ("load_in_4bit", "load_in_8bit"):
            if given.get(name) and method != "QLoRA_LLM":
                yield f'fsdp = "full_shard", {name} = true: quantised weights cannot be split; give only one'
    if four and eight:
        yield "load_in_4bit = true, load_in_8bit = true: weights are held in one of the two; give only one"
    if method == "QLoRA_LLM" and four is False and not eight:
        yield (
            "load_in_4bit = false, load_in_8bit = false: QLoRA_LLM holds the weights in 4 or 8 bits; "
            "set one to true, or use method LoRA_LLM"
        )
    if given.get("lora_dim") == 0:
        yield f"lora_dim = 0: {method} needs an adapter; give at least 1, or use method Standard_LLM"
    modules = given.get("target_modules", [])
    for module in modules if isinstance(modules, list) else []:
        if reason := why_not_served(module):
            yield f"target_modules = {show(modules)}: {module} {reason}; leave it out"


def _loss_contradictions(given: Mapping[str, Any]) -> Iterable[str]:
    losses = given.get("loss_type", HYPERPARAMETERS["loss_type"].default).split(",")
    weights, smoothing = given.get("loss_weights"), given.get("label_smoothing", 0.0)
    if weights and len(weights) != len(losses):
        yield (
            f"loss_weights = {show(weights)}: {len(weights)} for {len(losses)} losses ({', '.join(losses)}); "
            "give one for each, or none"
        )
    elif weights and not any(weights):
        yield f"loss_weights = {show(weights)}: nothing would be trained; give at least one above 0"
    if given.get("training_strategy") == "dpo" and "exo_pair" in losses and not smoothing:
        yield "loss_type = exo_pair needs label_smoothing above 0 (its paper takes 1e-3): give label_smoothing"


def _kto_contradictions(given: Mapping[str, Any]) -> Iterable[str]:
    strategy = given.get("training_strategy")
    # A value that is the default is no wish: resolved values hold every name, and are given again to repeat a run.
    wished = {name for name, value in given.items() if value != HYPERPARAMETERS[name].default}
    if strategy == "kto":
        for name in _PAIR_NAMES:
            if name in wished:
                yield (
                    f"{name} = {show(given[name])}: it is part of a loss over pairs, and kto has its own loss over single "
                    "answers; drop it, or use training_strategy=dpo"
                )
        size = given.get("per_device_train_batch_size", _KTO_BATCH)
        if size < 2:
            yield (
                f"per_device_train_batch_size = {size}: kto estimates the KL divergence from the other answers of a batch; "
                f"give at least 2, better {_KTO_BATCH} or more"
            )
        if given.get("fsdp") == "full_shard":
            yield 'fsdp = "full_shard": kto trains on whole weights; drop it, or use training_strategy=dpo'
    elif strategy is not None:
        for name in _KTO_NAMES:
            if name in wished:
                yield f'{name} = {show(given[name])}: only kto weighs answers, and training_strategy is "{strategy}"; drop it'
    weights = [given.get(name, HYPERPARAMETERS[name].default) for name in _KTO_NAMES]
    if not any(weights):
        yield "desirable_weight = 0, undesirable_weight = 0: nothing would be trained; give at least one above 0"


def _without_effect(given: Mapping[str, Any], resolved: Hyperparameters, method: str) -> Iterable[str]:
    if resolved.training_strategy == "sft":
        for name in _DPO_NAMES:
            if name in given:
                yield f'{name} has no effect: training_strategy is "sft"; "dpo" trains on preferences.'
    elif resolved.training_strategy == "dpo":
        yield from _loss_notes(given, resolved)
    if resolved.training_strategy != "kto":
        for name in _KTO_NAMES:
            if getattr(resolved, name) != HYPERPARAMETERS[name].default:
                yield f'{name} has no effect: training_strategy is "{resolved.training_strategy}"; "kto" has it.'
    if method == "Standard_LLM":
        for name in _LORA_NAMES:
            if name in given:
                yield f"{name} has no effect: Standard_LLM trains every weight, without an adapter."
    if given.get("system_prompt") and not resolved.apply_chat_template:
        yield "system_prompt has no effect: apply_chat_template is false."
    if given.get("warmup_ratio") and resolved.lr_scheduler_type == "constant":
        yield "warmup_ratio has no effect: lr_scheduler_type is constant; use constant_with_warmup."
    if "num_train_epochs" in given and resolved.max_steps:
        yield f"num_train_epochs has no effect: max_steps={resolved.max_steps} decides when to stop."


def _loss_notes(given: Mapping[str, Any], resolved: Hyperparameters) -> Iterable[str]:
    losses = set(resolved.loss_type.split(","))
    if losses & {"aot", "aot_unpaired"} and resolved.per_device_train_batch_size == 1:
        yield (
            f"loss_type={resolved.loss_type} compares pairs within a batch, "
            "and per_device_train_batch_size is 1: give more pairs."
        )
    if "sft" in losses and resolved.gradient_accumulation_steps > 1:
        yield (
            "the loss sft is a mean over the tokens of one batch: with gradient_accumulation_steps="
            f"{resolved.gradient_accumulation_steps} a token in a batch of short answers weighs more."
        )
    if given.get("label_smoothing") and not losses & _SMOOTHED:
        yield f"label_smoothing has no effect on {resolved.loss_type}: {', '.join(sorted(_SMOOTHED))} have it."
    if "discopop_tau" in given and "discopop" not in losses:
        yield f"discopop_tau has no effect: loss_type is {resolved.loss_type}."


def _not_offered(value: object) -> str:
    name = value.strip().casefold() if isinstance(value, str) else ""
    if name == "kto":
        return ". KTO is no loss over pairs: training_strategy=kto trains on good and bad answers, those of pairs too"
    if name not in _NOT_OFFERED:
        return ""
    return f". TRL has {name} among its experiments only, so it is not offered: {_NOT_OFFERED[name]}"


def _impossible_precision(wanted: str, device: DeviceFacts) -> str | None:
    """Why the machine cannot compute in the given precision, with the remedy; None when it can."""
    if wanted == "float16" and not device.cuda:
        return (
            'precision = "float16": a CPU cannot train in float16; use "float32", or "bfloat16" where the processor '
            'has avx512_bf16 or amx, or leave it at "auto"'
        )
    if wanted == "bfloat16" and device.cuda and not device.bf16:
        return (
            f'precision = "bfloat16": {device.gpu_name or "this GPU"} computes bfloat16 only from compute capability 8.0 on; '
            'use "float16" or "float32", or leave it at "auto"'
        )
    return None


def _precision(wanted: str, device: DeviceFacts) -> Precision:
    if wanted != "auto":
        return cast(Precision, wanted)
    if device.bf16:
        return "bfloat16"
    return "float16" if device.cuda and device.fp16 else "float32"


def _hint(name: object) -> str:
    key = str(name)[:100].strip().casefold().replace("-", "_")
    alias = next((known for known, others in _HINTS.items() if key in others), None)
    if meant := alias or nearest(key, HYPERPARAMETERS):
        return f"did you mean {meant}?"
    return "recipe.hyperparameter_definitions lists the known names"


def shorten(value: object) -> str:
    """Returns a value as a message shows it, 60 characters at most."""
    text = show(value)
    return text if len(text) <= 60 else text[:57] + "..."
