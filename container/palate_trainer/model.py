"""The base model from a folder, and the adapter's shape. Knows transformers and PEFT, no data and no training loop."""

from __future__ import annotations

from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import asdict
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from palate_recipes.errors import TrainerError
from palate_recipes.lora_targets import ADAPTER_CONFIG, ADAPTER_FILES, AdapterShape, why_not_served
from palate_recipes.specs.train import TrainTask
from palate_trainer.distributed import local_rank
from palate_trainer.sharding import is_sharded

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def check_model_dir(task: TrainTask) -> None:
    """Raises TrainerError when the folder lacks what a model needs, or the settings cannot go together."""
    folder = Path(task.files.model_dir)
    if not folder.is_dir():
        raise TrainerError(f"{folder}: no such model folder. Name a folder with config.json, weights and tokenizer.")
    if not (folder / "config.json").is_file():
        raise TrainerError(f"{folder} has no config.json, so it is no model folder.")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise TrainerError(
            f"{folder} has no weights (*.safetensors). The download may be incomplete: fetch the model again."
        )
    four, eight = task.spec.hyperparameters.load_in_4bit, task.spec.hyperparameters.load_in_8bit
    if four and eight:
        raise TrainerError("load_in_4bit and load_in_8bit are both true. Choose one.")
    if (four or eight) and not task.spec.trains_adapter:
        raise TrainerError(
            "Quantised weights cannot be trained. Set load_in_4bit=false and load_in_8bit=false, or use QLoRA_LLM."
        )
    if (four or eight) and is_sharded(task):
        raise TrainerError(
            "fsdp=full_shard cannot split quantised weights. Set load_in_4bit=false and load_in_8bit=false, or fsdp=off."
        )
    if task.files.adapter_dir is not None:
        _check_adapter(task, Path(task.files.adapter_dir))
    if task.spec.precision == "float16" and not torch.cuda.is_available():
        raise TrainerError("precision float16 needs a GPU: on a CPU use float32, or bfloat16 where the CPU has it.")


def check_target_modules(task: TrainTask) -> None:
    """Raises TrainerError when a name in `target_modules` fits no layer that can carry an adapter.

    The model is built from its config alone, without weights.
    """
    targets = task.spec.hyperparameters.target_modules
    if not task.spec.trains_adapter or task.files.adapter_dir is not None or isinstance(targets, str):
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(task.files.model_dir))
    kinds = {path: module for path, module in model.named_modules() if not list(module.children())}
    linear = {path.rpartition(".")[2] for path, module in kinds.items() if isinstance(module, torch.nn.Linear | Conv1D)}
    known = sorted(name for name in linear if why_not_served(name) is None)
    for target in targets:
        fitting = [module for path, module in kinds.items() if f".{path}".endswith(f".{target}")]
        reason = why_not_served(target)
        if not fitting:
            near = get_close_matches(target, known, n=2, cutoff=0.5)
            reason = "fits no layer of this model" + (f"; did you mean {' or '.join(near)}?" if near else "")
        elif not any(isinstance(module, torch.nn.Linear | Conv1D) for module in fitting):
            reason = f"is no linear layer but {type(fitting[0]).__name__}, which takes no adapter that can be served"
        if reason is not None:
            raise TrainerError(
                f"target_modules: {target} {reason.rstrip('.')}{'' if reason.endswith('?') else '.'}"
                f" Layers that can carry an adapter here: {', '.join(known)}; or all-linear for all of them."
            )


def load_model(task: TrainTask) -> Any:
    """The base model as a causal language model, quantised when the hyperparameters ask for it.

    A frozen base is loaded in `precision`. Weights that are trained themselves stay float32: an update of a 16-bit
    weight is mostly rounded away; arithmetic still runs in `precision`.
    """
    hyperparameters = task.spec.hyperparameters
    dtype = DTYPES[task.spec.precision] if task.spec.trains_adapter else torch.float32
    config = AutoConfig.from_pretrained(task.files.model_dir)
    if getattr(config, "attention_dropout", 0.0):
        config.attention_dropout = 0.0  # the reference and the policy must see the same network
    options: dict[str, Any] = {"config": config, "dtype": dtype}
    if hyperparameters.load_in_4bit or hyperparameters.load_in_8bit:
        options["quantization_config"] = _quantisation(task)
        options["device_map"] = {"": local_rank() if torch.cuda.is_available() else "cpu"}
    try:
        model = AutoModelForCausalLM.from_pretrained(task.files.model_dir, **options)
    except ImportError as error:
        raise TrainerError(f"Loading the model needs a package that is not installed: {error}") from error
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        if "quantization_config" not in options or isinstance(error, torch.OutOfMemoryError):
            raise
        bits = 4 if hyperparameters.load_in_4bit else 8
        raise TrainerError(
            f"The model could not be loaded in {bits} bit on {'CUDA' if torch.cuda.is_available() else 'this CPU'}: {error}."
            f" Set load_in_{bits}bit=false (LoRA on {task.spec.precision} weights)."
        ) from error
    for module in model.modules():
        # On CPUs with avx512_bf16 bitsandbytes repacks 4-bit weights at the first pass without gradients, and its kernel for
        # them has no backward pass: layers below would train on wrong gradients, with no more than a warning by torch.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    # TRL's disable_dropout would silence LoRA's dropout as well: the base is silenced here, before the adapter exists.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    return model


def lora_config(task: TrainTask) -> LoraConfig:
    """The adapter's shape, from PAI's names."""
    hyperparameters = task.spec.hyperparameters
    targets = hyperparameters.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=hyperparameters.lora_dim,
        lora_alpha=hyperparameters.lora_alpha,
        lora_dropout=hyperparameters.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )


def load_adapter(task: TrainTask, model: Any) -> Any:
    """The model with the adapter of `files.adapter_dir` on it, to be trained further.

    Raises:
        TrainerError: The adapter's weights are not those of this model's layers.
    """
    config = LoraConfig.from_pretrained(task.files.adapter_dir)
    config.lora_dropout = task.spec.hyperparameters.lora_dropout
    misfit = TrainerError(
        f"The adapter in {task.files.adapter_dir} does not fit {task.spec.model.name or task.files.model_dir}: its base is"
        f" {config.base_model_name_or_path or 'unnamed'}. Train the model that it belongs to."
    )
    config.base_model_name_or_path = task.files.model_dir  # PEFT looks there when it saves
    try:
        model = PeftModel.from_pretrained(model, task.files.adapter_dir, config=config, is_trainable=True)
    except (ValueError, RuntimeError) as error:  # no such layer; another size
        raise misfit from error
    with safe_open(Path(str(task.files.adapter_dir)) / ADAPTER_FILES[1], framework="pt") as file:
        # PEFT only warns of weights that found no place, and of places that got none.
        if set(file.keys()) != set(get_peft_model_state_dict(model, save_embedding_layers=False)):
            raise misfit
    # TRL adds a frozen copy, "ref", as DPO's reference. It is the run's input, no part of what it makes; and a checkpoint
    # with it would be resumed without the trained adapter.
    model.save_pretrained = partial(model.save_pretrained, selected_adapters=["default"])
    return model


def _check_adapter(task: TrainTask, folder: Path) -> None:
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        raise TrainerError(f"{folder} lacks {' and '.join(missing)}: name the model folder of a finished LoRA run.")
    if not task.spec.trains_adapter:
        raise TrainerError(f"{task.spec.method} trains every weight and cannot go on from the adapter in {folder}.")
    shape = AdapterShape.parse((folder / ADAPTER_CONFIG).read_bytes(), where=str(folder))
    if problems := shape.contradictions(asdict(task.spec.hyperparameters)):
        raise TrainerError(f"The adapter in {folder} has its shape already:\n  " + "\n  ".join(problems))


def _quantisation(task: TrainTask) -> BitsAndBytesConfig:
    if task.spec.hyperparameters.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[task.spec.precision],
    )
