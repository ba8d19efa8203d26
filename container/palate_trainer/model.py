"""Loads the base model and the adapter from folders. Knows transformers and PEFT, no data and no training loop."""

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
    """Raises TrainerError if the model folder is incomplete or settings contradict each other."""
    folder = Path(task.files.model_dir)
    if not folder.is_dir():
        raise TrainerError(
            f"Model folder {folder} does not exist. Give a folder with config.json, weights and tokenizer."
        )
    if not (folder / "config.json").is_file():
        raise TrainerError(f"{folder} is not a model folder: it has no config.json.")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise TrainerError(
            f"{folder} has no weights (*.safetensors). The download may be incomplete: fetch the model again."
        )
    four, eight = task.spec.hyperparameters.load_in_4bit, task.spec.hyperparameters.load_in_8bit
    if four and eight:
        raise TrainerError("load_in_4bit and load_in_8bit are both true. Choose one.")
    if (four or eight) and not task.spec.trains_adapter:
        raise TrainerError(
            "Quantised weights cannot be trained directly. Set load_in_4bit=false and load_in_8bit=false, or use QLoRA_LLM."
        )
    if (four or eight) and is_sharded(task):
        raise TrainerError(
            "fsdp=full_shard does not support quantised weights. Set load_in_4bit=false and load_in_8bit=false, or fsdp=off."
        )
    if task.files.adapter_dir is not None:
        _check_adapter(task, Path(task.files.adapter_dir))
    if task.spec.precision == "float16" and not torch.cuda.is_available():
        raise TrainerError("precision float16 needs a GPU. On a CPU use float32, or bfloat16 if the CPU supports it.")


def check_target_modules(task: TrainTask) -> None:
    """Raises TrainerError if a name in `target_modules` matches no layer that can have an adapter.

    Builds the model from its config only, without weights.
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
            reason = "matches no layer of this model" + (f"; did you mean {' or '.join(near)}?" if near else "")
        elif not any(isinstance(module, torch.nn.Linear | Conv1D) for module in fitting):
            reason = f"is a {type(fitting[0]).__name__}, not a linear layer: engines cannot serve adapters on it"
        if reason is not None:
            raise TrainerError(
                f"target_modules: {target} {reason.rstrip('.')}{'' if reason.endswith('?') else '.'}"
                f" Layers that can have an adapter: {', '.join(known)}; all-linear selects all of them."
            )


def load_model(task: TrainTask) -> Any:
    """Loads the base as a causal language model, quantised if the hyperparameters say so.

    A frozen base is loaded in `precision`. In full fine-tuning the weights stay float32, because most updates of a 16-bit
    weight would be rounded away. Arithmetic still runs in `precision`.
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
            f"The model cannot be loaded in {bits} bit on {'CUDA' if torch.cuda.is_available() else 'this CPU'}: {error}."
            f" Set load_in_{bits}bit=false to train LoRA on {task.spec.precision} weights."
        ) from error
    for module in model.modules():
        # On CPUs with avx512_bf16, bitsandbytes repacks 4-bit weights in the first pass without gradients, and the kernel for
        # repacked weights has no backward pass. Earlier layers would get wrong gradients, with only a warning from torch.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    # TRL's disable_dropout would also turn off LoRA's dropout. So turn off the base's here, before the adapter exists.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    return model


def lora_config(task: TrainTask) -> LoraConfig:
    """The adapter's configuration from PAI's hyperparameter names."""
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
    """Puts the adapter of `files.adapter_dir` on the model, trainable.

    Raises:
        TrainerError: The adapter's weights do not match this model's layers.
    """
    config = LoraConfig.from_pretrained(task.files.adapter_dir)
    config.lora_dropout = task.spec.hyperparameters.lora_dropout
    misfit = TrainerError(
        f"The adapter in {task.files.adapter_dir} does not fit {task.spec.model.name or task.files.model_dir}: its base is"
        f" {config.base_model_name_or_path or 'unnamed'}. Train the base model that it was made for."
    )
    config.base_model_name_or_path = task.files.model_dir  # PEFT reads the base's config when it saves
    try:
        model = PeftModel.from_pretrained(model, task.files.adapter_dir, config=config, is_trainable=True)
    except (ValueError, RuntimeError) as error:  # unknown layer; size mismatch
        raise misfit from error
    with safe_open(Path(str(task.files.adapter_dir)) / ADAPTER_FILES[1], framework="pt") as file:
        # PEFT only warns about unexpected and missing keys.
        if set(file.keys()) != set(get_peft_model_state_dict(model, save_embedding_layers=False)):
            raise misfit
    # TRL adds a frozen copy, "ref", as DPO's reference. It is not part of the result, and resuming from a checkpoint that
    # contains it would lose the trained adapter.
    model.save_pretrained = partial(model.save_pretrained, selected_adapters=["default"])
    return model


def _check_adapter(task: TrainTask, folder: Path) -> None:
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        raise TrainerError(
            f"{folder} has no {' and no '.join(missing)}. Give the model folder of a finished LoRA run as the adapter."
        )
    if not task.spec.trains_adapter:
        raise TrainerError(
            f"{task.spec.method} trains all weights and cannot continue from the adapter in {folder}. Use LoRA_LLM or QLoRA_LLM."
        )
    shape = AdapterShape.parse((folder / ADAPTER_CONFIG).read_bytes(), where=str(folder))
    if problems := shape.contradictions(asdict(task.spec.hyperparameters)):
        raise TrainerError(f"The hyperparameters contradict the adapter in {folder}:\n  " + "\n  ".join(problems))


def _quantisation(task: TrainTask) -> BitsAndBytesConfig:
    if task.spec.hyperparameters.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[task.spec.precision],
    )
