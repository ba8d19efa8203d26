"""Checks folders, memory and CPU, and builds an engine's command line and environment. Starts no engine.

It reports problems within milliseconds in one sentence. An engine would report them after half a minute in a traceback.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate_recipes.device import available_memory, cpu_has_bf16, free_gpu_memory, has_gpu_tool, installed_version
from palate_recipes.errors import BadSpec, EngineMissing, OutOfMemory
from palate_recipes.specs.serve import (
    BASE_MODEL,
    LISTENER_VARIABLE,
    TUNED_MODEL,
    EngineInfo,
    ServeSpec,
    describe_engines,
)
from palate_server import cpu_lora
from palate_server.gateway import SPEC_VARIABLE, Gateway

GIB = 1024**3
KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for --max-lora-rank (vllm.config.lora.MaxLoRARanks)."""

_ENGINE_GIB = 1.0
"""Minimum host memory of an engine besides weights and cache."""
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_HEADS = ("lm_head", "embed_out")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """Engine settings that are not in the spec.

    Attributes:
        engine: The engine to start.
        on_cpu: Whether it runs on the CPU.
        dtype: Value for `--dtype`.
        computes_in: The dtype that this is for these weights: float32, bfloat16 or float16.
        prompt_scores: Whether the engine's log-probs of a prompt are those of the whole model. They omit an adapter on the output
            head, and vLLM's own LoRA code for CPUs cannot compute them.
        lora_rank: Value for `--max-lora-rank`; None without an adapter.
        is_eager: Whether vLLM must compile nothing.
        tokenizer_dir: Folder of the tokenizer and chat template used in training.
        kv_cache_gib: Size of vLLM's KV cache on a CPU.
    """

    engine: EngineInfo
    on_cpu: bool
    dtype: str
    computes_in: str
    prompt_scores: bool
    lora_rank: int | None
    tokenizer_dir: Path
    kv_cache_gib: int
    is_eager: bool


def check(spec: ServeSpec) -> EnginePlan:
    """Returns the plan for a spec.

    Raises:
        BadSpec: A folder is missing or incomplete, or the engine cannot serve it.
        EngineMissing: The engine is not installed.
        OutOfMemory: The weights do not fit into free memory.
    """
    engine = choose_engine(spec)
    if engine.name == "transformers" and spec.engine_args:
        raise BadSpec(
            f"engine_args={' '.join(spec.engine_args)!r}, but the transformers engine accepts none: "
            "omit engine_args (--engine-arg), or install vLLM"
        )
    tuned = Path(spec.model_dir)
    weights_dir = Path(spec.base_model_dir) if spec.base_model_dir else tuned
    adapter = _adapter(spec, engine)
    config = _model_config(weights_dir, "base_model_dir" if adapter else "model_dir")
    _context(spec, config)
    tokenizer_dir = next((d for d in (tuned, weights_dir) if _has_any(d, _TOKENIZER_FILES)), None)
    if tokenizer_dir is None:
        raise BadSpec(
            f"{tuned} has no tokenizer (no {' or '.join(_TOKENIZER_FILES[:2])}): save the tokenizer in the same folder"
        )
    on_cpu = _computes_on_cpu(engine)
    dtype, kv_cache_gib = _fit(spec, engine, on_cpu, weights_dir, config, copies=2 if adapter else 1)
    return EnginePlan(
        engine=engine,
        on_cpu=on_cpu,
        dtype=dtype,
        computes_in=_computed_dtype(engine, dtype, config),
        prompt_scores=adapter is None
        or engine.name != "vllm"
        or not (_changes_head(adapter) or (on_cpu and not cpu_lora.is_active())),
        lora_rank=_lora_rank(adapter) if adapter else None,
        tokenizer_dir=tokenizer_dir,
        kv_cache_gib=kv_cache_gib,
        # On a CPU, compilation takes a minute and gains little.
        is_eager=on_cpu
        and not any(re.match("--no-enforce[-_]eager|-O|--optimi[sz]ation", arg) for arg in spec.engine_args),
    )


def choose_engine(spec: ServeSpec) -> EngineInfo:
    """Returns the engine of the spec; "auto" is the preferred installed one. Raises EngineMissing."""
    engines = describe_engines()
    if spec.engine == "auto":
        found = next((e for e in engines if e.chosen), None)
        if found is None:
            ways = "; or ".join(e.remedy for e in engines)
            raise EngineMissing(f"engine='auto', but no engine is installed: {ways}")
        return found
    wanted = next(e for e in engines if e.name == spec.engine)
    if wanted.distribution is None:
        raise EngineMissing(
            f"engine='{spec.engine}' needs {', '.join(wanted.missing)}, which is missing: {wanted.remedy}"
        )
    return wanted


def _adapter(spec: ServeSpec, engine: EngineInfo) -> dict[str, Any] | None:
    """Returns the content of adapter_config.json, or None if the spec has full weights."""
    tuned = _folder(spec.model_dir, "model_dir")
    config_file = tuned / "adapter_config.json"
    if spec.base_model_dir is None:
        if config_file.exists() and not (tuned / "config.json").exists():
            raise BadSpec(
                f"model_dir {tuned} is an adapter, but base_model_dir is None: set it to the base model's folder"
            )
        return None
    if not config_file.exists():
        raise BadSpec(
            f"model_dir {tuned} is not an adapter (no adapter_config.json), but base_model_dir is set: "
            "omit base_model_dir to serve full weights"
        )
    if not _has_any(tuned, _ADAPTER_WEIGHTS):
        raise BadSpec(f"model_dir {tuned} has neither {' nor '.join(_ADAPTER_WEIGHTS)}: copy one of them there")
    adapter = _read_json(config_file)
    if engine.name == "vllm" and (reason := _beyond_vllm(adapter)):
        raise BadSpec(
            f"vLLM cannot serve the adapter in {tuned}: {reason}. Set engine='transformers', which applies it"
        )
    return adapter


def _beyond_vllm(adapter: dict[str, Any]) -> str | None:
    """Returns why vLLM would reject this adapter (vllm.lora.peft_helper), or None."""
    kind = adapter.get("peft_type", "LORA")
    if kind != "LORA":
        return f"its peft_type is {kind}, but vLLM supports only LORA"
    for field in ("use_dora", "modules_to_save", "lora_bias", "layer_replication"):
        if adapter.get(field):
            return f"it has {field}={adapter[field]}"
    if adapter.get("bias", "none") != "none":
        return f"it has bias={adapter['bias']!r}"
    if _rank(adapter) > LORA_RANKS[-1]:
        return f"its rank is {_rank(adapter)}, but vLLM's maximum is {LORA_RANKS[-1]}"
    return None


def _changes_head(adapter: dict[str, Any]) -> bool:
    modules = adapter.get("target_modules") or []
    names = [modules] if isinstance(modules, str) else modules
    return any(name.rpartition(".")[2] in _HEADS for name in names)


def _rank(adapter: dict[str, Any]) -> int:
    return max(int(adapter.get("r") or 8), *(int(rank) for rank in (adapter.get("rank_pattern") or {"": 0}).values()))


def _lora_rank(adapter: dict[str, Any]) -> int:
    """Returns the rank rounded up to one that vLLM accepts. Higher ranks never reach vLLM: transformers applies them."""
    return next((allowed for allowed in LORA_RANKS if allowed >= _rank(adapter)), LORA_RANKS[-1])


def _model_config(folder: Path, field: str) -> dict[str, Any]:
    _folder(str(folder), field)
    if not (folder / "config.json").exists():
        raise BadSpec(f"{field} {folder} has no config.json: set it to a model folder written by save_pretrained")
    if not any(_weight_files(folder)):
        raise BadSpec(f"{field} {folder} has no weights ({' or '.join(_WEIGHTS)}): copy them there")
    config = _read_json(folder / "config.json")
    return {**config, **config.get("text_config", {})}


def _context(spec: ServeSpec, config: dict[str, Any]) -> None:
    """Rejects a context longer than the model's, unless its config scales positions (RoPE scaling)."""
    limit = config.get("max_position_embeddings")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    if limit and not scaled and (spec.max_model_len or 0) > limit:
        raise BadSpec(
            f"max_model_len={spec.max_model_len} is longer than the model's context: expected at most {limit} tokens"
        )


def _fit(
    spec: ServeSpec, engine: EngineInfo, on_cpu: bool, folder: Path, config: dict[str, Any], *, copies: int
) -> tuple[str, int]:
    """Returns (dtype, cache in GiB) that fit into free memory. Raises OutOfMemory if none does.

    On a CPU without bfloat16 instructions, float32 processes prompts three times faster (800 tokens of a 135M model: 2.7 s
    and 7.9 s in vLLM on two AVX-512 cores), so `auto` selects it if it fits.
    """
    stored = _stored_dtype(config)
    on_disk = sum(f.stat().st_size for f in _weight_files(folder))
    in_vllm = engine.name == "vllm"
    if not on_cpu:
        need = on_disk * _DTYPE_BYTES.get(spec.dtype, _DTYPE_BYTES.get(stored, 2)) / _DTYPE_BYTES.get(stored, 2)
        need *= 1 if in_vllm else copies
        free = free_gpu_memory()
        if free is not None and need > free:
            raise OutOfMemory(_does_not_fit(folder, need, free, "GPU memory"))
        return spec.dtype, 1
    free = available_memory()
    choices = [spec.dtype]
    if spec.dtype == "auto":
        choices = ["float32", "auto"] if stored == "bfloat16" and not cpu_has_bf16() else ["auto"]
    need = 0.0
    for dtype in choices:
        width = _DTYPE_BYTES.get(dtype, _DTYPE_BYTES.get(stored, 2))
        cache_gib = int(os.environ.get(KV_CACHE_VARIABLE) or _cache_gib(config, spec.max_model_len, width))
        need = on_disk * width / _DTYPE_BYTES.get(stored, 2) * (1 if in_vllm else copies)
        need += (_ENGINE_GIB + (cache_gib if in_vllm else 0)) * GIB
        if need <= free:
            return dtype, cache_gib
    raise OutOfMemory(_does_not_fit(folder, need, free, "memory"))


def _stored_dtype(config: dict[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")


def _computed_dtype(engine: EngineInfo, dtype: str, config: dict[str, Any]) -> str:
    stored = _stored_dtype(config)
    if dtype != "auto":
        return dtype
    # vLLM's `auto` rounds float32 weights to bfloat16, or to float16 where it prefers that. The coarser one is assumed.
    return "bfloat16" if engine.name == "vllm" and stored == "float32" else stored


def _does_not_fit(folder: Path, need: float, free: float, what: str) -> str:
    return (
        f"the model in {folder} needs at least {need / GIB:.1f} GiB of {what}, but only {free / GIB:.1f} GiB are free: "
        "stop other programs, set a smaller max_model_len, or use a smaller model or a larger machine"
    )


def _cache_gib(config: dict[str, Any], max_model_len: int | None, width: int) -> int:
    """Returns the KV cache for one request of full length, in whole GiB, at least 1."""
    heads = config.get("num_attention_heads") or 0
    head_dim = config.get("head_dim") or (config.get("hidden_size", 0) // heads if heads else 0)
    per_token = (
        2 * (config.get("num_hidden_layers") or 0) * (config.get("num_key_value_heads") or heads) * head_dim * width
    )
    tokens = max_model_len or config.get("max_position_embeddings") or 0
    return max(1, math.ceil(per_token * tokens / GIB))


def _computes_on_cpu(engine: EngineInfo) -> bool:
    if engine.name == "vllm":
        return engine.cpu_build
    return "+cpu" in (installed_version("torch") or "") or not has_gpu_tool()


def _folder(path: str, field: str) -> Path:
    if not Path(path).is_dir():
        raise BadSpec(f"{field} {path} is not a folder: set it to the model's folder")
    return Path(path)


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).exists() for name in names)


def _weight_files(folder: Path) -> list[Path]:
    """Returns the weight files in the preferred format that exists."""
    forms = (sorted(f for f in folder.glob(form) if f.name not in _ADAPTER_WEIGHTS) for form in _WEIGHTS)
    return next((files for files in forms if files), [])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadSpec(f"{path} is not valid JSON ({error}): copy the file again from the original model") from error
    if not isinstance(values, dict):
        raise BadSpec(f"{path} is not a JSON object: copy the file again from the original model")
    return values


def engine_command(spec: ServeSpec, plan: EnginePlan, *, spec_file: Path, port: int, ipc_dir: str) -> list[str]:
    """Returns the command that serves the spec on the inherited socket, which is bound to `port`."""
    if plan.engine.name == "transformers":
        settings = [f"--dtype={plan.dtype}", f"--tokenizer={plan.tokenizer_dir}"]
        if spec.base_model_dir is not None and plan.computes_in == "float32":
            settings.append("--merge")
        return [sys.executable, "-P", "-m", "palate_server.transformers", str(spec_file), *settings]
    command = [
        *(sys.executable, "-P", "-m", "palate_server.vllm"),
        # vLLM always binds something. Give it an unused Unix socket, because the port is already bound.
        *("--uds", f"{ipc_dir}/unused.sock", "--host", spec.host, "--port", str(port)),
        *("--dtype", plan.dtype),
        *("--middleware", f"{Gateway.__module__}.{Gateway.__qualname__}"),
    ]
    if spec.base_model_dir is not None:
        command += ["--model", spec.base_model_dir, "--served-model-name", BASE_MODEL, "--enable-lora"]
        # JSON, because the form NAME=PATH does not support "=" and "," in the path.
        adapter = json.dumps({"name": TUNED_MODEL, "path": spec.model_dir, "base_model_name": BASE_MODEL})
        command += ["--lora-modules", adapter, "--max-lora-rank", str(plan.lora_rank)]
        command += ["--tokenizer", str(plan.tokenizer_dir)]
        if plan.on_cpu:
            # vLLM's CPU kernels index adapters with -1 for a request without one, which is the last slot. With a single slot
            # that is the tuned adapter, and `base` would answer as `default` whenever both share a batch. A second, empty
            # slot makes -1 mean no adapter, as on a GPU. A test queries both at once. Palate's plugin skips -1 by itself, but does
            # not run with every vLLM.
            command += ["--max-loras", "2"]
    else:
        command += ["--model", spec.model_dir, "--served-model-name", TUNED_MODEL]
    if spec.max_model_len is not None:
        command += ["--max-model-len", str(spec.max_model_len)]
    if plan.is_eager:
        command += ["--enforce-eager"]
    return [*command, *spec.engine_args]


def engine_environment(plan: EnginePlan, *, spec_file: Path, ipc_dir: str, listener: int) -> dict[str, str]:
    """Returns the engine's full environment: this process's, offline, plus what the gateway needs.

    Args:
        plan: The engine's plan.
        spec_file: The spec for the gateway.
        ipc_dir: Private folder with a short path, for the engine's own sockets.
        listener: File descriptor of the listening socket that the engine inherits.
    """
    environment = {
        **os.environ,
        SPEC_VARIABLE: str(spec_file),
        LISTENER_VARIABLE: str(listener),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_RPC_BASE_PATH": ipc_dir,
        "TMPDIR": ipc_dir,  # files that an engine leaves behind are removed with this folder
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # the engine's child processes inherit it
    }
    if plan.engine.name == "vllm" and plan.on_cpu:
        environment[KV_CACHE_VARIABLE] = str(plan.kv_cache_gib)
    if plan.engine.name == "vllm" and plan.is_eager:
        # --enforce-eager leaves out the model's compilation, but not that of a function that counts ranks: the first request for
        # log-probs would wait for a C++ compiler (13 s instead of 1 s on two cores).
        environment.setdefault("TORCHDYNAMO_DISABLE", "1")
    package_root = Path(__file__).resolve().parents[1]
    if package_root.name not in {"site-packages", "dist-packages"}:
        # The engine's child processes import the gateway too.
        search = [str(package_root), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(search)
    return environment
