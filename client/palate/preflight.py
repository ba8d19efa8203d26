"""Checks libraries and memory before anything is written or started. Knows no run and no data."""

from __future__ import annotations

import math

from msgspec.structs import replace

from palate_recipes.catalog import Model, models
from palate_recipes.device import installed_version
from palate_recipes.errors import MissingDependencyError, NotEnoughMemoryError
from palate_recipes.hyperparameters import DeviceFacts
from palate_recipes.specs.train import TrainSpec

_GIB = 1024**3

TRAINER_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tensorboard")
"""Packages that the trainer needs to start."""

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_FULL_BYTES = {"float32": 16.0, "bfloat16": 16.0, "float16": 18.0}
"""Bytes per trained parameter: weight, gradient, two Adam moments (and an fp32 master copy with fp16)."""

_REFERENCE_BYTES = 4.0
"""Bytes per parameter. KTO scores the reference in each step, so full fine-tuning keeps a float32 copy in memory."""

_PROCESS_GIB = 0.7
"""Memory of Python, torch and the libraries without weights."""


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
    return weights / _GIB + _PROCESS_GIB


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


def _fits(spec: TrainSpec, parameters: float, there: float, gpus: int) -> bool:
    """Whether the training's minimum memory is available, by the formula that rejects it."""
    return training_memory_gib(parameters, spec, gpus=gpus) <= there
