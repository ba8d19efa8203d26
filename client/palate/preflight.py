"""Checks libraries, memory, steps, and whether an engine can serve it, before anything is written or started. Knows no run, no data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from palate.session import Session
from palate.store import read_uri
from palate.weights import config_at_hand
from palate_recipes.catalog import Model, models
from palate_recipes.device import available_memory, cpu_has_bf16, free_gpu_memory, installed_version, local_device
from palate_recipes.engine_options import (
    ENGINE_OPTIONS,
    known_table,
    known_version,
    problem,
    spec_fields,
    vllm_only,
)
from palate_recipes.errors import (
    ConfigurationError,
    MissingDependencyError,
    NotEnoughMemoryError,
    PalateError,
    UnservableError,
)
from palate_recipes.hyperparameters import NOT_4BIT, DeviceFacts
from palate_recipes.schema import Hyperparameters
from palate_recipes.servability import (
    ENGINES,
    GIB,
    Serving,
    adapter_bytes,
    choose,
    fit,
    planned_adapter,
    serving_note,
    servings,
    trained_config,
)
from palate_recipes.specs.merge import MERGE_PACKAGES
from palate_recipes.specs.serve import EngineInfo, describe_engines, vllm_knows_more
from palate_recipes.specs.train import TrainSpec
from palate_recipes.specs.weights import BaseModel

if TYPE_CHECKING:
    from palate.predictor import ServedModel


TRAINER_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tensorboard")
"""Packages that the trainer needs to start."""

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_FULL_BYTES = {"float32": 16.0, "bfloat16": 16.0, "float16": 18.0}
"""Bytes per trained parameter: weight, gradient, two Adam moments (and an fp32 master copy with fp16)."""

_REFERENCE_BYTES = 4.0
"""Bytes per parameter. KTO scores the reference in each step, so full fine-tuning keeps a float32 copy in memory."""

_PROCESS_GIB = 0.7
"""Memory of Python, torch and the libraries without weights."""


FEW_STEPS = 10
"""With fewer optimizer steps an adapter hardly moves at the usual learning rates."""


def check_trainer() -> None:
    """Raises MissingDependencyError if the trainer's libraries are not installed in this environment."""
    missing = [name for name in TRAINER_PACKAGES if installed_version(name) is None]
    if missing:
        raise MissingDependencyError(
            f"training on this machine needs {', '.join(missing)}, which is not installed: pip install 'palate[train]'"
        )


def training_memory_gib(parameters: float, spec: TrainSpec, *, gpus: int = 1) -> float:
    """Returns the minimum memory of a training in GiB, per GPU or for the machine if it has none.

    Deliberately a lower bound: a training that it rejects cannot work, and one that it accepts may still run out of memory.

    Args:
        parameters: Number of parameters of the model.
        spec: Method, precision and quantization are used.
        gpus: Number of GPUs. With `fsdp=full_shard` they share the weights, else each has a copy.
    """
    values = spec.hyperparameters
    if spec.method == "Standard_LLM":
        weights = parameters * _FULL_BYTES[spec.precision]
        if values.training_strategy == "kto":
            weights += parameters * _REFERENCE_BYTES
    elif values.load_in_4bit:
        weights = parameters * 0.6  # NF4 with its block constants
    elif values.load_in_8bit:
        weights = parameters * 1.1
    else:
        weights = parameters * _BYTES[spec.precision]
    if values.fsdp == "full_shard":
        weights /= max(1, gpus)
    return weights / GIB + _PROCESS_GIB


def available_memory_gib(device: DeviceFacts) -> float:
    """Returns the memory that a training may use in GiB: of the first GPU, or of the machine without one. 0 if unknown."""
    return device.gpu_memory_gib if device.cuda else device.memory_gib


def check_memory(spec: TrainSpec, parameters: float, *, device: DeviceFacts, row: Model | None) -> None:
    """Raises NotEnoughMemoryError if the training does not fit. The message has required and available memory, and the remedy."""
    if not parameters:
        return
    gpus = device.gpu_count if device.cuda else 1
    needed = training_memory_gib(parameters, spec, gpus=gpus)
    there = available_memory_gib(device)
    if not there or needed <= there:
        return
    where = (
        f"{device.gpu_name or 'the GPU'} has {there:.1f} GiB{f' ({gpus} GPUs)' if gpus > 1 else ''}"
        if device.cuda
        else f"the run's memory limit is {there:.2g} GiB"
        if device.memory_is_limited
        else f"this machine has {there:.1f} GiB free"
    )
    values, method = spec.hyperparameters, spec.method
    quantised = values.load_in_4bit or values.load_in_8bit
    remedies = [f'instance_spec={{"memory": "{math.ceil(needed)}g"}}'] if device.memory_is_limited else []
    shardable = not quantised and values.training_strategy != "kto"
    if method == "Standard_LLM" and _fits(replace(spec, method="LoRA_LLM"), parameters, there, gpus):
        remedies.append('method="LoRA_LLM"')
    if device.cuda and not values.load_in_4bit and values.fsdp == "off":
        four_bit = replace(values, load_in_4bit=True, load_in_8bit=False)
        if _fits(replace(spec, method="QLoRA_LLM", hyperparameters=four_bit), parameters, there, gpus):
            remedies.append('method="QLoRA_LLM"')
    if gpus > 1 and values.fsdp == "off" and shardable:
        sharded = replace(values, fsdp="full_shard")
        if _fits(replace(spec, hyperparameters=sharded), parameters, there, gpus):
            remedies.append('fsdp="full_shard"')
    smaller = [
        model.name
        for model in sorted(models("chat"), key=lambda model: -model.parameters_b)
        if _fits(spec, model.parameters_b * 1e9, there, gpus)
    ]
    remedies.append(
        f"a smaller model (`palate models`), such as {', '.join(smaller[:3])}"
        if smaller
        else "a machine with more memory"
    )
    if device.cuda:
        remedies.append(f"a GPU with {needed:.0f} GiB or more")
    elif row is not None:
        remedies.append(f"a GPU with {row.min_gpu_memory(method):.0f} GiB")
    raise NotEnoughMemoryError(
        f"{spec.model.name} with {method} in {spec.precision} needs at least {needed:.1f} GiB of memory, but {where}: "
        f"use {', or '.join(remedies)}"
    )


def check_scoring_memory(spec: TrainSpec, parameters: float, *, device: DeviceFacts) -> None:
    """Raises NotEnoughMemoryError if the weights of a training do not fit without optimizer and reference.

    Args:
        spec: The training whose model is scored. Of full fine-tuning the weights are loaded in float32.
        parameters: Number of parameters of the model; 0 if unknown.
        device: Where it runs.
    """
    if spec.method == "Standard_LLM":
        needed = parameters * _BYTES["float32"] / GIB + _PROCESS_GIB
    else:
        whole = replace(spec, hyperparameters=replace(spec.hyperparameters, fsdp="off"))
        needed = training_memory_gib(parameters, whole)
    there = available_memory_gib(device)
    if parameters and there and needed > there:
        where = f"{device.gpu_name or 'the GPU'} has" if device.cuda else "free are"
        raise NotEnoughMemoryError(
            f"scoring pairs with {spec.model.name} in {spec.precision} needs at least {needed:.1f} GiB of memory on one device, but "
            f"{where} {there:.1f} GiB: stop other programs, or evaluate on a machine with more memory"
        )


def _fits(spec: TrainSpec, parameters: float, there: float, gpus: int) -> bool:
    """Whether the training's minimum memory is available, by the formula that rejects it."""
    return training_memory_gib(parameters, spec, gpus=gpus) <= there


def without_needless_notes(spec: TrainSpec, parameters: float, device: DeviceFacts) -> TrainSpec:
    """Returns the training without the note that its weights are not in 4 bits, if they need at most half of the memory anyway.

    Args:
        spec: The training, with the notes of `resolve`.
        parameters: Number of parameters of the model; 0 if unknown.
        device: Where it runs.
    """
    needed = training_memory_gib(parameters, spec, gpus=device.gpu_count if device.cuda else 1)
    if not parameters or needed > available_memory_gib(device) / 2:
        return spec
    return replace(spec, notes=tuple(note for note in spec.notes if not note.startswith(NOT_4BIT)))


# ── optimizer steps ───────────────────────────────────────────────────────────────────────────────────────────────


def optimizer_steps(examples: int, values: Hyperparameters, *, gpus: int) -> int:
    """Returns the number of optimizer steps, as transformers' Trainer counts them.

    Args:
        examples: Rows trained on per epoch; under KTO single answers, under SFT answers of all learned turns.
        values: Batch size, accumulation, epochs and `max_steps` are used.
        gpus: Number of processes.
    """
    if not examples or values.max_steps:
        return values.max_steps if examples else 0
    return math.ceil(values.num_train_epochs * steps_per_epoch(examples, values, gpus=gpus))


def steps_per_epoch(examples: int, values: Hyperparameters, *, gpus: int) -> int:
    """Returns the number of optimizer steps of one epoch. See `optimizer_steps`."""
    batches = math.ceil(examples / (values.per_device_train_batch_size * gpus))
    return math.ceil(batches / values.gradient_accumulation_steps)


def few_steps_note(examples: int, values: Hyperparameters, *, gpus: int) -> str:
    """Returns a note if the data makes too few optimizer steps to learn from, with the remedy; else "".

    None if `max_steps` was given: then their number is what the user asked for.
    """
    steps = optimizer_steps(examples, values, gpus=gpus)
    if values.max_steps or not 0 < steps < FEW_STEPS:
        return ""
    batch = values.per_device_train_batch_size * values.gradient_accumulation_steps * gpus
    epochs = math.ceil(2 * FEW_STEPS / steps_per_epoch(examples, values, gpus=gpus))
    return (
        f"{steps} optimizer step{'' if steps == 1 else 's'} ({examples} examples, {batch} per step, num_train_epochs="
        f"{values.num_train_epochs:g}) are too few to learn from: set num_train_epochs={epochs} for {2 * FEW_STEPS} steps or more, "
        "or lower gradient_accumulation_steps or per_device_train_batch_size, or raise learning_rate "
        f"from {values.learning_rate:g}"
    )


# ── serving ───────────────────────────────────────────────────────────────────────────────────────────────────────


def servings_after(spec: TrainSpec, config: dict[str, Any] | None, session: Session) -> tuple[Serving, ...]:
    """Returns which engines can serve the result of a training: those installed here, or those of the images.

    Args:
        spec: The training.
        config: config.json of its base, or None if it is not at hand.
        session: Its backend decides where the engines are.
    """
    adapter = planned_adapter(spec.hyperparameters, config) if spec.trains_adapter else None
    if config is not None and adapter is None:
        config = trained_config(config)
    installed = _installed_engines(session)
    return servings(config, adapter, **_what_is_known(installed))


def serving_notes(
    spec: TrainSpec, config: dict[str, Any] | None, found: tuple[Serving, ...], session: Session
) -> list[str]:
    """Returns a note if only the slow engine or none can serve the result, and one if it does not fit into memory here.

    Args:
        spec, config, session: As in `servings_after`.
        found: Its result.
    """
    return [note for note in (serving_note(found), _memory_note(spec, config, found, session)) if note]


def _memory_note(spec: TrainSpec, config: dict[str, Any] | None, found: tuple[Serving, ...], session: Session) -> str:
    """Returns a note if the result does not fit into the memory that is free on this machine now; "" also if that is unknown."""
    installed, size = _installed_engines(session), spec.model.source.size_bytes
    chosen, _ = choose(found, [engine.name for engine in installed])
    if chosen is None or config is None or not size:
        return ""
    engine = next(engine for engine in installed if engine.name == chosen.engine)
    try:
        needs = fit(
            config,
            weights_bytes=size,
            adapter_bytes=adapter_bytes(config, planned_adapter(spec.hyperparameters, config))
            if spec.trains_adapter
            else None,
            engine=engine.name,
            on_cpu=engine.on_cpu,
            free_bytes=available_memory() if engine.on_cpu else free_gpu_memory(),
            cpu_has_bf16=cpu_has_bf16(),
        )
    except (TypeError, ValueError, ArithmeticError):  # a config may contain anything
        return ""
    if needs.fits or needs.free_bytes is None:
        return ""
    return (
        f"serving the result on this machine needs at least {needs.needed_bytes / GIB:.1f} GiB of memory at the model's full context, "
        f"and {needs.free_bytes / GIB:.1f} GiB are free now: deploy with a smaller max_model_len, or on another machine."
    )


def check_deployment(served: ServedModel, session: Session, options: Mapping[str, Any]) -> str:
    """Returns which engine will serve a model, and why another cannot; "" if something of it is not known here.

    Raises:
        ConfigurationError: The engine that will run does not have an option, or not this value of it.
        UnservableError: No engine that the service may use can serve it.
    """
    wanted = options.get("engine", "auto")
    installed = _installed_engines(session)
    names: list[str] = [engine.name for engine in installed] if session.backend.uses_this_python else [*ENGINES]
    allowed = [name for name in names if wanted in ("auto", name)]
    _check_merge(served, session, options)
    if wanted != "transformers":
        _check_vllm_options(options, session, installed)
    if "transformers" in (wanted, *allowed[:1]):
        _require_vllm(options, "engine='transformers'" if wanted == "transformers" else "vLLM is not installed")
    adapter, config = None, None
    if served.adapter:
        adapter = _tuned_json(served, session, "adapter_config.json")
        if adapter is None:
            return ""
    elif served.tuned_uri:
        config = _tuned_json(served, session, "config.json")
    if served.adapter or not served.tuned_uri:
        config = config_at_hand(served.model.source, session)
    if not allowed:  # the server says what is missing
        return ""
    known = _what_is_known(installed, options.get("engine_args", ()))
    merged = servings(trained_config(config) if config else None, None, **known) if adapter is not None else ()
    found = merged if options.get("merge") else servings(config, adapter, **known)
    chosen, why = choose(found, allowed)
    if chosen is not None:
        if chosen.engine == "transformers":
            _require_vllm(options, why)
        if config is None:
            return ""
        more = []
        if options.get("merge"):
            more.append("merged from the adapter, because of merge=True: one model without 'base'")
        elif why and any(one.engine == "vllm" and not one.reasons for one in merged) and "vllm" in allowed:
            more.append("with merge=True it runs on vLLM, without 'base'")
        reasons = "; ".join(filter(None, [why, *more]))
        return f"{chosen}{f' ({reasons})' if reasons else ''}"
    transformers = next(one for one in found if one.engine == "transformers")
    remedy = "deploy another model"
    if not transformers.reasons:
        remedy = "set deploy option engine='transformers', which serves it"
        missing = [engine.remedy for engine in describe_engines() if engine.name == "transformers" and engine.remedy]
        if missing and session.backend.uses_this_python:
            remedy += f" ({missing[0]})"
    if any(one.engine in allowed and not one.reasons for one in merged):
        remedy += ", or merge=True, which serves the adapter merged into its base"
    raise UnservableError(f"engine={wanted!r} cannot serve {served.model.name}: {why}. Remedy: {remedy}")


def check_adapter(adapter: Mapping[str, Any], base: BaseModel, session: Session, *, name: str) -> None:
    """Checks an adapter for a service that serves several, which only vLLM does.

    Args:
        adapter: Its adapter_config.json.
        base: The base model of the service.
        session: Its backend decides where the engines are.
        name: What to call it in a message.

    Raises:
        UnservableError: vLLM cannot serve it.
    """
    found = servings(config_at_hand(base.source, session), adapter, **_what_is_known(_installed_engines(session)))
    if reasons := next(one for one in found if one.engine == "vllm").reasons:
        raise UnservableError(
            f"{name} cannot be added to a service: {'; '.join(reasons)}. Remedy: deploy it as a service of its own, with deploy "
            "option engine='transformers'"
        )


def _check_merge(served: ServedModel, session: Session, options: Mapping[str, Any]) -> None:
    if not options.get("merge"):
        return
    if not served.adapter:
        what = "these are full weights" if served.tuned_uri else "the model is untuned"
        raise ConfigurationError(f"deploy option merge=True, but there is no adapter to merge, {what}: omit merge")
    if given := [name for name in ("max_loras", "max_lora_rank") if name in options]:
        raise ConfigurationError(
            f"deploy option {given[0]}={options[given[0]]!r} is for adapters, and merge=True leaves none: omit one of them"
        )
    missing = [name for name in MERGE_PACKAGES if installed_version(name) is None]
    if missing and session.backend.uses_this_python:
        raise MissingDependencyError(
            f"merge=True needs {', '.join(missing)}, which is not installed: pip install {' '.join(missing)}"
        )


def _check_vllm_options(options: Mapping[str, Any], session: Session, installed: list[EngineInfo]) -> None:
    """Raises ConfigurationError for options that the vLLM which will run rejects. Another version than the known one is asked by
    the server program, before the engine starts."""
    size = options.get("tensor_parallel_size", 1)
    device = local_device()
    # Without a GPU the CPU build splits the model over the processor's NUMA nodes.
    if session.backend.is_this_host and device.cuda and size > device.gpu_count:
        raise ConfigurationError(
            f"deploy option tensor_parallel_size={size} needs {size} GPUs, and this machine has {device.gpu_count}: "
            f"expected at most {device.gpu_count}"
        )
    if session.backend.uses_this_python and known_version() not in [engine.version for engine in installed]:
        return
    raw = options.get("engine_args", ())
    complete = not (session.backend.uses_this_python and vllm_knows_more(raw))
    for name in ENGINE_OPTIONS:
        if name in options:
            (argument,) = spec_fields({name: options[name]})["engine_args"]
            if text := problem([argument], known_table(), names_are_complete=complete):
                raise ConfigurationError(f"deploy option {text.replace(argument, f'{name}={options[name]!r}')}")
    if text := problem(raw, known_table(), names_are_complete=complete):
        raise ConfigurationError(f"deploy option engine_args: {text}")


def _require_vllm(options: Mapping[str, Any], why: str) -> None:
    if names := vllm_only(options):
        raise ConfigurationError(
            f"deploy option {', '.join(names)}: only vLLM has {'it' if len(names) == 1 else 'them'}, and the service would run on "
            f"transformers ({why}): omit {'it' if len(names) == 1 else 'them'}"
        )


def _installed_engines(session: Session) -> list[EngineInfo]:
    """Returns the engines that runs of the session's backend use here; empty if they are in an image."""
    if not session.backend.uses_this_python:
        return []
    return [engine for engine in describe_engines() if engine.distribution is not None]


def _what_is_known(installed: list[EngineInfo], engine_args: Sequence[str] = ()) -> dict[str, Any]:
    return {
        "versions": {engine.name: engine.version for engine in installed},
        "vllm_knows_more": vllm_knows_more(engine_args),
        "vllm_on_cpu": any(engine.cpu_build for engine in installed),
    }


def _tuned_json(served: ServedModel, session: Session, name: str) -> dict[str, Any] | None:
    with suppress(PalateError, ValueError):
        uri = f"{served.tuned_uri}/{name}"
        found = json.loads(read_uri(uri, options=session.options_for(uri)))
        return found if isinstance(found, dict) else None
    return None
