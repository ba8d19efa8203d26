"""Validates hyperparameters together, and resolves them for a machine.
Knows no trainer and no ML library. Single values are `palate_recipes.schema`.

    validate(values, method="LoRA_LLM")               the given names, typed
    resolve(values, method="LoRA_LLM", device=facts)  all names, the precision, a note for each automatic change
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from palate_recipes.trackers import OFF

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
    "differences",
    "incomparable_losses",
    "known_name",
    "needs_validation",
    "resolve",
    "validate",
]

Precision = Literal["bfloat16", "float16", "float32"]

# Names from other toolkits, for suggestions only. They are not accepted, because one name per setting keeps manifests comparable.
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
    "load_best_model_at_end": ("load_best_model", "save_best_model", "save_best"),
    "metric_for_best_model": ("best_metric", "metric", "monitor"),
    "early_stopping_patience": ("early_stopping", "patience"),
    "loss_type": ("pref_loss", "dpo_loss", "dpo_loss_type"),
    "bad_rows": ("skip_bad_rows", "on_bad_row"),
    "loss_weights": ("loss_weight", "pref_ftx", "rpo_alpha"),
    "precision": ("dtype", "torch_dtype", "mixed_precision", "compute_dtype", "bf16", "fp16"),
    "gradient_checkpointing": ("use_gradient_checkpointing", "activation_checkpointing"),
    "report_to": ("tracker", "trackers", "logger", "loggers", "log_with"),
    "fsdp": ("sharding_strategy", "fsdp_strategy", "zero_stage"),
}
_LORA_NAMES = ("lora_dim", "lora_alpha", "lora_dropout", "target_modules")
_PAIR_NAMES = ("loss_type", "loss_weights", "label_smoothing", "ld_alpha", "discopop_tau")
_DPO_NAMES = ("dpo_beta", *_PAIR_NAMES)
LOSS_DEFINED_BY = ("training_strategy", "loss_type", "dpo_beta")
"""Hyperparameters without which losses do not compare."""
_KTO_NAMES = ("desirable_weight", "undesirable_weight")
_KTO_BATCH = 4
_BEST_NAMES = ("load_best_model_at_end", "early_stopping_patience")
_METRIC_NAMES = ("metric_for_best_model", "early_stopping_threshold")
BEST_METRICS: Mapping[str, tuple[str, ...]] = {
    "sft": ("eval_loss", "eval_mean_token_accuracy"),
    "dpo": ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"),
    "kto": ("eval_loss", "eval_rewards/margins"),
}
"""Metrics that an evaluation has, by training strategy."""

NOT_4BIT = "load_in_4bit is false: "
"""Start of the note that weights are not in 4 bits although that is the default."""
"""Default batch size for KTO: TRL recommends 4 or more answers for its estimate of the KL divergence."""
_SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}

# Objectives that TRL 1.16 has only in trl.experimental, and the closest stable alternative.
_NOT_OFFERED: Mapping[str, str] = {
    "simpo": "training_strategy=dpo with loss_type=sigmoid_norm compares length-normalised log-probabilities, with a reference",
    "cpo": 'training_strategy=dpo with loss_type="sigmoid,sft" adds its likelihood term to DPO',
    "orpo": 'training_strategy=dpo with loss_type="sigmoid,sft" adds the likelihood of the chosen answer to DPO',
}


@dataclass(frozen=True)
class DeviceFacts:
    """What training needs to know of a machine.

    Attributes:
        cuda: Whether there is a CUDA device.
        bf16, fp16: Whether the GPU, or without CUDA the CPU, computes in it natively. For a CPU: avx512_bf16 or amx.
        gpu_name, gpu_memory_gib: Of the first GPU.
        memory_gib: Host memory.
        gpu_count: Number of GPUs that a run may use; 0 if unknown.
        memory_is_limited: Whether `memory_gib` is a limit of the run rather than the machine's memory.
    """

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
    """The hyperparameters of one run.

    Attributes:
        values: All hyperparameters with defaults filled in. `precision` replaces `auto`.
        precision: The precision of the run.
        notes: One sentence for each default that was changed and each given value that has no effect.
    """

    values: Hyperparameters
    precision: Precision
    notes: tuple[str, ...]


def validate(values: Mapping[str, object] | Hyperparameters | None, *, method: str) -> dict[str, Any]:
    """Checks the given hyperparameters and returns them typed, without defaults.

    Args:
        values: Values by name. Strings are parsed, as PAI sends them (`"5e-5"`, `"true"`). None is an empty dict. Of resolved
            `Hyperparameters` every value counts as given.
        method: One of `METHODS`.

    Raises:
        HyperparameterError: Lists all problems at once, each with name, value and what is expected.
    """
    check_method(method)
    if isinstance(values, Hyperparameters):
        values = asdict(values)
    if values is not None and not isinstance(values, Mapping):
        raise HyperparameterError(
            f"hyperparameters is a {type(values).__name__}: expected a dict of names and values, such as "
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
    if OFF in (names := given.get("report_to", "").split(",")) and len(names) > 1:
        problems.append(f"report_to = {shorten(given['report_to'])}: {OFF} turns trackers off; omit it, or the others")
    problems.extend(_best_model_contradictions(given))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise HyperparameterError(f"{count} in the hyperparameters for {method}:\n  " + "\n  ".join(problems))
    return given


def differences(values: Hyperparameters) -> list[tuple[str, str, str]]:
    """Returns name, value and default, formatted, of each hyperparameter that does not have its default."""
    return [
        (name, show(value), show(row.default))
        for name, row in HYPERPARAMETERS.items()
        if (value := getattr(values, name)) != row.default
    ]


def incomparable_losses(settings: Sequence[Mapping[str, Any]]) -> str:
    """Returns why the losses of trainings with these hyperparameters do not compare, or ""."""
    values = {name: list(dict.fromkeys(str(one[name]) for one in settings)) for name in LOSS_DEFINED_BY}
    differing = [f"{name} differs ({'; '.join(found)})" for name, found in values.items() if len(found) > 1]
    return f"losses do not compare, because {', '.join(differing)}" if differing else ""


def resolve(values: Mapping[str, object] | Hyperparameters | None, *, method: str, device: DeviceFacts) -> Resolved:
    """Checks the given hyperparameters, fills in defaults, and resolves what depends on method and machine.

    With kto the default batch size is 4, because PAI's default of 1 cannot work there. The 4-bit rule is PAI's: an adapter with
    load_in_4bit and without load_in_8bit has 4-bit weights. But the default of load_in_4bit becomes false where it cannot work:
    without CUDA, with load_in_8bit, and in Standard_LLM. QLoRA_LLM requests 4 bits by its name, so its default stays true
    without CUDA too.

    Raises:
        HyperparameterError: As `validate`, or the machine does not support the given `precision`.
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
            "which is impossible with the default of 1."
        )
    if "load_in_4bit" not in given and (method == "Standard_LLM" or resolved.load_in_8bit):
        resolved = replace(resolved, load_in_4bit=False)  # without a note: the user has chosen other weights
    elif "load_in_4bit" not in given and (reason := _why_not_4bit(resolved, method, device, precision)):
        resolved = replace(resolved, load_in_4bit=False)
        notes.append(f"{NOT_4BIT}{reason}.")
    quantised = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(resolved, name)]
    if quantised and not device.cuda:
        notes.append(
            f"{quantised[0]} stays true without CUDA, as requested: "
            f"it uses bitsandbytes' CPU kernels and is slower than {precision} weights."
        )
    if no_bfloat16:
        notes.append(f"{device.gpu_name or 'This GPU'} does not support bfloat16: training uses float16.")
    if emulated:
        notes.append(
            "precision=bfloat16 is emulated: this CPU has neither avx512_bf16 nor amx, so training is slower than in float32."
        )
    if resolved.fsdp == "full_shard" and (not device.cuda or device.gpu_count == 1):
        notes.append(f"fsdp has no effect: {'there is only one GPU' if device.cuda else 'there is no CUDA device'}.")
    notes.extend(_without_effect(given, resolved, method))
    return Resolved(values=resolved, precision=precision, notes=tuple(notes))


def _why_not_4bit(resolved: Hyperparameters, method: str, device: DeviceFacts, precision: Precision) -> str | None:
    if resolved.fsdp == "full_shard" and device.cuda and device.gpu_count != 1:
        return f"fsdp=full_shard was given, and 4-bit weights cannot be sharded, so the weights are in {precision}"
    if not device.cuda and method != "QLoRA_LLM":
        return f"its default needs CUDA, which this machine does not have, so the weights are in {precision}"
    return None


def known_name(name: str) -> str:
    """Returns the hyperparameter that is meant by a name of its own or of another toolkit, or ""."""
    if name in HYPERPARAMETERS:
        return name
    return next((known for known, others in _HINTS.items() if name in others), "")


def check_method(method: str) -> Method:
    """Returns `method` if it is one of `METHODS`.

    Raises:
        HyperparameterError: The method is unknown. The message suggests the most similar one and lists all.
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
                yield f"{name} = true: Standard_LLM trains full weights; omit it, or use method QLoRA_LLM"
        return
    if given.get("fsdp") == "full_shard":
        if method == "QLoRA_LLM":
            yield 'fsdp = "full_shard": 4-bit and 8-bit weights cannot be sharded; omit it, or use method LoRA_LLM'
        for name in ("load_in_4bit", "load_in_8bit"):
            if given.get(name) and method != "QLoRA_LLM":
                yield f'fsdp = "full_shard", {name} = true: quantised weights cannot be sharded; set only one'
    if four and eight:
        yield "load_in_4bit = true, load_in_8bit = true: set only one"
    if method == "QLoRA_LLM" and four is False and not eight:
        yield (
            "load_in_4bit = false, load_in_8bit = false: QLoRA_LLM needs 4-bit or 8-bit weights; "
            "set one to true, or use method LoRA_LLM"
        )
    if given.get("lora_dim") == 0:
        yield f"lora_dim = 0: {method} needs an adapter; set it to 1 or more, or use method Standard_LLM"
    modules = given.get("target_modules", [])
    for module in modules if isinstance(modules, list) else []:
        if reason := why_not_served(module):
            yield f"target_modules = {show(modules)}: {module} {reason}; remove it from the list"


def _loss_contradictions(given: Mapping[str, Any]) -> Iterable[str]:
    losses = given.get("loss_type", HYPERPARAMETERS["loss_type"].default).split(",")
    weights, smoothing = given.get("loss_weights"), given.get("label_smoothing", 0.0)
    if weights and len(weights) != len(losses):
        yield (
            f"loss_weights = {show(weights)}: {len(weights)} weights for {len(losses)} losses ({', '.join(losses)}); "
            "give one weight per loss, or none"
        )
    elif weights and not any(weights):
        yield f"loss_weights = {show(weights)}: the loss would always be 0; set at least one above 0"
    if given.get("training_strategy") == "dpo" and "exo_pair" in losses and not smoothing:
        yield "loss_type = exo_pair needs label_smoothing above 0 (its paper uses 1e-3): set label_smoothing"


def _kto_contradictions(given: Mapping[str, Any]) -> Iterable[str]:
    strategy = given.get("training_strategy")
    # A value equal to the default is not a request: repeating a run passes its resolved values, which have every name.
    wished = {name for name, value in given.items() if value != HYPERPARAMETERS[name].default}
    if strategy == "kto":
        for name in _PAIR_NAMES:
            if name in wished:
                yield (
                    f"{name} = {show(given[name])}: it belongs to losses over pairs, but kto has its own loss over single "
                    "answers; omit it, or use training_strategy=dpo"
                )
        size = given.get("per_device_train_batch_size", _KTO_BATCH)
        if size < 2:
            yield (
                f"per_device_train_batch_size = {size}: kto estimates the KL divergence from the other answers of a batch; "
                f"set at least 2, preferably {_KTO_BATCH} or more"
            )
        if given.get("fsdp") == "full_shard":
            yield 'fsdp = "full_shard": kto does not support sharded weights; omit it, or use training_strategy=dpo'
    elif strategy is not None:
        for name in _KTO_NAMES:
            if name in wished:
                yield f'{name} = {show(given[name])}: only kto uses it, but training_strategy is "{strategy}"; omit it'
    weights = [given.get(name, HYPERPARAMETERS[name].default) for name in _KTO_NAMES]
    if not any(weights):
        yield "desirable_weight = 0, undesirable_weight = 0: the loss would always be 0; set at least one above 0"


def _best_model_contradictions(given: Mapping[str, Any]) -> Iterable[str]:
    metric, strategy = given.get("metric_for_best_model"), given.get("training_strategy", "sft")
    if metric is not None and metric not in BEST_METRICS[strategy]:
        yield (
            f"metric_for_best_model = {show(metric)}: an evaluation of {strategy} has no such metric; use one of "
            f"{', '.join(BEST_METRICS[strategy])}"
        )
    if given.get("load_best_model_at_end") and given.get("fsdp") == "full_shard":
        yield (
            'load_best_model_at_end = true, fsdp = "full_shard": the best checkpoint cannot be loaded into sharded weights; '
            "omit one, or serve a checkpoint with deploy(checkpoint=…)"
        )


def needs_validation(values: Hyperparameters) -> str:
    """Returns the hyperparameter that needs validation data, as `name=value`; "" if none does."""
    return next((f"{name}={show(value)}" for name in _BEST_NAMES if (value := getattr(values, name))), "")


def _without_effect(given: Mapping[str, Any], resolved: Hyperparameters, method: str) -> Iterable[str]:
    if resolved.training_strategy == "sft":
        for name in _DPO_NAMES:
            if name in given:
                yield f'{name} has no effect: training_strategy is "sft"; use "dpo" to train on preferences.'
    elif resolved.training_strategy == "dpo":
        yield from _loss_notes(given, resolved)
    if resolved.training_strategy != "kto":
        for name in _KTO_NAMES:
            if getattr(resolved, name) != HYPERPARAMETERS[name].default:
                yield f'{name} has no effect: training_strategy is "{resolved.training_strategy}"; only "kto" uses it.'
    if method == "Standard_LLM":
        for name in _LORA_NAMES:
            if name in given:
                yield f"{name} has no effect: Standard_LLM trains all weights, without an adapter."
    if given.get("system_prompt") and not resolved.apply_chat_template:
        yield "system_prompt has no effect: apply_chat_template is false."
    if given.get("warmup_ratio") and resolved.lr_scheduler_type == "constant":
        yield "warmup_ratio has no effect: lr_scheduler_type is constant; use constant_with_warmup."
    if not needs_validation(resolved):
        for name in _METRIC_NAMES:
            if name in given and given[name] != HYPERPARAMETERS[name].default:
                yield f"{name} has no effect: neither load_best_model_at_end nor early_stopping_patience is set."
    elif "early_stopping_threshold" in given and not resolved.early_stopping_patience:
        yield "early_stopping_threshold has no effect: early_stopping_patience is 0."
    if "num_train_epochs" in given and resolved.max_steps:
        yield f"num_train_epochs has no effect: max_steps={resolved.max_steps} takes precedence."


def _loss_notes(given: Mapping[str, Any], resolved: Hyperparameters) -> Iterable[str]:
    losses = set(resolved.loss_type.split(","))
    if losses & {"aot", "aot_unpaired"} and resolved.per_device_train_batch_size == 1:
        yield (
            f"loss_type={resolved.loss_type} compares pairs within a batch, "
            "but per_device_train_batch_size is 1: set it to 2 or more."
        )
    if "sft" in losses and resolved.gradient_accumulation_steps > 1:
        yield (
            "loss_type sft is a mean over the tokens of one batch: with gradient_accumulation_steps="
            f"{resolved.gradient_accumulation_steps} a token in a batch of short answers has a higher weight."
        )
    if given.get("label_smoothing") and not losses & _SMOOTHED:
        yield f"label_smoothing has no effect on {resolved.loss_type}: only {', '.join(sorted(_SMOOTHED))} use it."
    if "discopop_tau" in given and "discopop" not in losses:
        yield f"discopop_tau has no effect: loss_type is {resolved.loss_type}."


def _not_offered(value: object) -> str:
    name = value.strip().casefold() if isinstance(value, str) else ""
    if name == "kto":
        return ". KTO is not a loss over pairs: training_strategy=kto trains on good and bad answers, including those of pairs"
    if name not in _NOT_OFFERED:
        return ""
    return f". {name} is experimental in TRL and not supported here: {_NOT_OFFERED[name]}"


def _impossible_precision(wanted: str, device: DeviceFacts) -> str | None:
    """Why the machine does not support the precision, with the remedy; None if it does."""
    if wanted == "float16" and not device.cuda:
        return (
            'precision = "float16": a CPU cannot train in float16; use "float32", or "bfloat16" if the CPU '
            'has avx512_bf16 or amx, or "auto"'
        )
    if wanted == "bfloat16" and device.cuda and not device.bf16:
        return (
            f'precision = "bfloat16": {device.gpu_name or "this GPU"} does not support it (it needs compute capability 8.0); '
            'use "float16", "float32" or "auto"'
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
    return "recipe.hyperparameter_definitions lists the valid names"


def shorten(value: object) -> str:
    """Returns a value for a message, cut to 60 characters."""
    text = show(value)
    return text if len(text) <= 60 else text[:57] + "..."
