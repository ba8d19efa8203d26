"""Says which engine can serve a model, how, and why another cannot; and whether it fits into memory. Reads no folder, starts nothing.

train() asks before it submits, deploy() before it writes a record, and the server before it starts an engine: one set of rules.

Rules are certain or not given: for an architecture, a version or a field that is not known here, nothing is said against an engine.
`engine_architectures.json` is read from the source of vLLM and transformers by docs/tools/vllm_architectures.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from palate_recipes.errors import UnservableError
from palate_recipes.lora_targets import BEYOND_VLLM
from palate_recipes.schema import Hyperparameters

GIB = 1024**3
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for --max-lora-rank (vllm.config.lora.MaxLoRARanks)."""

ENGINES: tuple[Literal["vllm", "transformers"], ...] = ("vllm", "transformers")
"""In order of preference: vLLM answers several requests at once and has logprobs."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_ENGINE_GIB = 1.0
"""Minimum host memory of an engine besides weights and cache."""
_HEADS = ("lm_head", "embed_out")
_TABLE_EMBEDDINGS = ("lm_head", "embed_tokens")
"""Names that vLLM uses in `embedding_modules`. Of other names the table says nothing."""
_EXPERTS = {"mixtral": (("w1", "w3"), "w2", "gate"), "qwen2_moe": (("gate_proj", "up_proj"), "down_proj", "gate")}
"""By kind of `peft_experts` in the table: the layers that PEFT adapts as `gate_up_proj`, `down_proj` and `gate.weight`."""
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Values of `init_lora_weights` that leave the base's weights as they are (vllm.lora.peft_helper)."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Whether an engine can serve a model.

    Attributes:
        engine: `vllm` or `transformers`.
        version: The version that this is about, such as `0.32.0`.
        how: What it serves, such as "the adapter on its base".
        reasons: Why it cannot, one clause each; empty if it can.
    """

    engine: Literal["vllm", "transformers"]
    version: str
    how: str
    reasons: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{'vLLM' if self.engine == 'vllm' else self.engine} {self.version}"

    def __str__(self) -> str:
        return f"{self.name}: {self.how}" if not self.reasons else f"not {self.name}: {'; '.join(self.reasons)}"


# ── what an engine can do ─────────────────────────────────────────────────────────────────────────────────────────


def servings(
    config: Mapping[str, Any] | None,
    adapter: Mapping[str, Any] | None,
    *,
    versions: Mapping[str, str | None] | None = None,
    vllm_knows_more: bool = False,
    vllm_on_cpu: bool = False,
) -> tuple[Serving, ...]:
    """Returns for each engine, preferred first, whether it can serve a model.

    Args:
        config: config.json of the weights: of the base under an adapter. None if it is not at hand.
        adapter: adapter_config.json, or `planned_adapter` before a training; None for full weights.
        versions: Versions of the installed engines, by engine. Default: those of the table, which the images have too. For another
            minor version nothing is said about architectures.
        vllm_knows_more: Whether plug-ins or options of vLLM may add architectures: then nothing is said about them either.
        vllm_on_cpu: Whether vLLM is its CPU build, which has no kernel for adapters on a mixture of experts, wherever they are.
    """
    table = _table()
    found = []
    for engine in ENGINES:
        version = (versions or {}).get(engine) or table[engine]
        is_known = config is not None and _minor(version) == _minor(table[engine])
        is_known &= not (engine == "vllm" and vllm_knows_more)
        architecture = _architecture(config or {}) if is_known else None
        reasons: list[str] = []
        if engine == "vllm":
            what = f"vLLM {_minor(version)}"
            reasons += _unknown_to_vllm(config or {}, what) if is_known else []
            if adapter is not None:
                reasons += _beyond_vllm(adapter)
                reasons += _beyond_model(adapter, architecture, what) if architecture and not reasons else []
                if vllm_on_cpu and is_known and _has_experts(config or {}):
                    reasons.append(f"{what} serves no adapters on a mixture of experts without a GPU")
            how = "full weights" if adapter is None else f"the adapter on its base, rank {adapter_rank(adapter)}"
        else:
            reasons += _unknown_to_transformers(config or {}, f"transformers {_minor(version)}") if is_known else []
            how = "full weights" if adapter is None else "the adapter, merged in float32, beside its base in 16 bits"
        found.append(Serving(engine=engine, version=version, how=how, reasons=tuple(reasons)))
    return tuple(found)


def choose(found: Sequence[Serving], allowed: Sequence[str]) -> tuple[Serving | None, str]:
    """Returns the first of the allowed engines that can serve it, None if none can, and why those before it cannot."""
    whys: list[str] = []
    for serving in found:
        if serving.engine in allowed:
            if not serving.reasons:
                return serving, "; ".join(whys)
            whys += [reason for reason in serving.reasons if reason not in whys]
    return None, "; ".join(whys)


def serving_note(found: Sequence[Serving]) -> str:
    """Returns a note on the result of a training if vLLM cannot serve it, else ""."""
    chosen, why = choose(found, ENGINES)
    if chosen is None:
        return f"no engine can serve the result: {why}."
    return f"{why}: only the transformers engine can serve it, which does less and is slower." if why else ""


def require_servable(found: Sequence[Serving], model_name: str) -> None:
    """Raises UnservableError if no engine can serve the result of a training."""
    chosen, why = choose(found, ENGINES)
    if chosen is None:
        raise UnservableError(
            f"no engine could serve what is trained from {model_name}: {why}. Choose another model (`palate models`), or train it "
            "all the same with servable=False"
        )


def planned_adapter(values: Hyperparameters, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the fields of adapter_config.json that decide on serving, as PEFT will write them in the training.

    transformers keeps the experts of some models in one tensor. PEFT then adapts them by `target_parameters`, gate and up together
    with twice the rank (peft.utils.transformers_weight_conversion).
    """
    adapter = {"peft_type": "LORA", "r": values.lora_dim, "target_modules": values.target_modules, "bias": "none"}
    kind = _table()["peft_experts"].get(_model_type(config or {}))
    if kind is None:
        return adapter
    gate_up, down, router = _EXPERTS[kind]
    names = _module_names(adapter)
    is_all = "all-linear" in names
    targets = {"gate_up_proj": gate_up, "down_proj": (down,), "gate.weight": (router,)}
    found = sorted(target for target, layers in targets.items() if is_all or all(name in names for name in layers))
    if "gate_up_proj" in found:
        adapter["rank_pattern"] = {r".*\.gate_up_proj": values.lora_dim * len(gate_up)}
    return {**adapter, "target_parameters": found}


def trained_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config that full fine-tuning writes: of the class that transformers loads as a causal language model."""
    known = _table()["causal_models"].get(_model_type(config))
    return {**config, "architectures": [known]} if known else dict(config)


def adapter_rank(adapter: Mapping[str, Any]) -> int:
    """Returns an adapter's largest rank."""
    pattern = adapter.get("rank_pattern")
    ranks = [adapter.get("r") or 8, *(pattern.values() if isinstance(pattern, Mapping) else ())]
    return max((rank for rank in ranks if isinstance(rank, int)), default=8)


def vllm_lora_rank(adapter: Mapping[str, Any]) -> int:
    """Returns the rank rounded up to one that vLLM accepts. Higher ranks never reach vLLM: transformers applies them."""
    return next((allowed for allowed in LORA_RANKS if allowed >= adapter_rank(adapter)), LORA_RANKS[-1])


def changes_head(adapter: Mapping[str, Any]) -> bool:
    """Whether an adapter is on the output head."""
    return any(name in _HEADS for name in _module_names(adapter))


def _beyond_vllm(adapter: Mapping[str, Any]) -> list[str]:
    """Returns why vLLM rejects this adapter on any model (vllm.lora.peft_helper)."""
    kind = adapter.get("peft_type", "LORA")
    if kind != "LORA":
        return [f"the adapter's peft_type is {kind}, and vLLM serves only LORA"]
    found = [f"the adapter has {field}={adapter[field]}" for field in BEYOND_VLLM if adapter.get(field)]
    if adapter.get("bias", "none") != "none":
        found.append(f"the adapter has bias={adapter['bias']!r}")
    init = adapter.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        found.append(f"the adapter has init_lora_weights={init!r}, which changes the base's weights")
    if (rank := adapter_rank(adapter)) > LORA_RANKS[-1]:
        found.append(f"the adapter's rank is {rank}, and vLLM's maximum is {LORA_RANKS[-1]}")
    return found


def _beyond_model(adapter: Mapping[str, Any], architecture: str, what: str) -> list[str]:
    """Returns why vLLM rejects this adapter on this architecture."""
    known = _table()["vllm_architectures"]
    if architecture not in known:  # served by transformers' code, which takes adapters
        return []
    if known[architecture] is None:
        return [f"{what} serves no adapters on {architecture}"]
    names = [name for name in _module_names(adapter) if name in _TABLE_EMBEDDINGS and name not in known[architecture]]
    parameters = adapter.get("target_parameters")
    experts = [str(name) for name in parameters] if isinstance(parameters, list) else []
    if (
        any(name.endswith(("gate_up_proj", "down_proj")) for name in experts)
        and architecture not in _table()["fused_experts"]
    ):
        names.append("the experts")
    return [f"{what} serves no adapter on {name} of {architecture}" for name in names]


def _has_experts(config: Mapping[str, Any]) -> bool:
    config = text_config(config)
    return any(config.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def _module_names(adapter: Mapping[str, Any]) -> list[str]:
    modules = adapter.get("target_modules") or []
    names = [modules] if isinstance(modules, str) else modules if isinstance(modules, list | tuple) else []
    return [str(name).rpartition(".")[2] for name in names]


def _unknown_to_vllm(config: Mapping[str, Any], what: str) -> list[str]:
    names = _architectures(config)
    if not names or _architecture(config) is not None:
        return []
    table = _table()
    # vLLM tries transformers' own code for a class of transformers. Of those that are no causal models the table says nothing.
    if names[0] not in table["causal_models"].values() and _transformers_knows(config):
        return []
    return [f"{what} does not know {', '.join(names)}{_own_code(config)}"]


def _unknown_to_transformers(config: Mapping[str, Any], what: str) -> list[str]:
    if _transformers_knows(config):
        return []
    return [f"{what} does not know the model_type {config['model_type']}{_own_code(config)}"]


def _transformers_knows(config: Mapping[str, Any]) -> bool:
    """Whether transformers may know the model type; also if the config has none."""
    table, kind = _table(), _model_type(config)
    return not kind or kind in table["causal_models"] or kind in table["model_types"]


def _model_type(config: Mapping[str, Any]) -> str:
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else ""


def _own_code(config: Mapping[str, Any]) -> str:
    return " (it comes with its own code, which Palate never runs)" if config.get("auto_map") else ""


def _architecture(config: Mapping[str, Any]) -> str | None:
    """Returns the architecture as which vLLM serves these weights, or None if none is known."""
    table, names = _table(), _architectures(config)
    found = next((name for name in names if name in table["vllm_architectures"]), None)
    return found or next((name for name in names[:1] if name in table["through_transformers"]), None)


def _architectures(config: Mapping[str, Any]) -> list[str]:
    given = config.get("architectures")
    names = [name for name in given if isinstance(name, str)] if isinstance(given, list) else []
    causal = _table()["causal_models"].get(_model_type(config))
    return names or ([causal] if causal else [])


@cache
def _table() -> dict[str, Any]:
    import json  # both only here: the client imports this module for every training
    from importlib.resources import files

    text = files("palate_recipes").joinpath("engine_architectures.json").read_text("utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


# ── whether it fits ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a model fits into memory.

    Attributes:
        dtype: Value for the engine's `--dtype`.
        computes_in: What this is for these weights: float32, bfloat16 or float16.
        kv_cache_gib: Size of vLLM's KV cache on a CPU, in whole GiB.
        needed_bytes: Minimum memory.
        free_bytes: What was free; None if unknown.
    """

    dtype: str
    computes_in: str
    kv_cache_gib: int
    needed_bytes: float
    free_bytes: float | None

    @property
    def fits(self) -> bool:
        return self.free_bytes is None or self.needed_bytes <= self.free_bytes


def fit(
    config: Mapping[str, Any],
    *,
    weights_bytes: float,
    adapter_bytes: float | None,
    engine: Literal["vllm", "transformers"],
    on_cpu: bool,
    free_bytes: float | None,
    dtype: str = "auto",
    max_model_len: int | None = None,
    cpu_has_bf16: bool = False,
    kv_cache_gib: int | None = None,
) -> Fit:
    """Returns the dtype with which a model fits, or the last one that was tried.

    A lower bound: what it rejects cannot be served here. On a GPU the KV cache is not counted, because the engine sizes it by what
    is left. On a CPU without bfloat16 instructions, float32 processes prompts three times faster (800 tokens of a 135M model: 2.7 s
    and 7.9 s in vLLM on two AVX-512 cores), so `auto` selects it if it fits.

    Args:
        config: config.json of the weights.
        weights_bytes: Their size as stored.
        adapter_bytes: Size of the adapter; None for full weights.
        engine: Without vLLM, an adapter needs a second copy of the base.
        on_cpu: Whether it computes on the CPU.
        free_bytes: Free memory of the machine, or of its GPUs; None if unknown.
        dtype: As the service's option.
        max_model_len: Context length in tokens; None: the model's.
        cpu_has_bf16: Whether the CPU computes in bfloat16 natively.
        kv_cache_gib: A given size of the KV cache.
    """
    config = text_config(config)
    stored = stored_dtype(config)
    stored_width = DTYPE_BYTES.get(stored, 2)
    choices = [dtype]
    if dtype == "auto" and on_cpu and stored == "bfloat16" and not cpu_has_bf16:
        choices = ["float32", "auto"]
    found = None
    for choice in choices:
        computes_in = stored if choice == "auto" else choice
        width = DTYPE_BYTES.get(computes_in, stored_width)
        cache_gib = kv_cache_gib or (cache_for_one_gib(config, max_model_len, width) if on_cpu else 1)
        needed = weights_bytes * width / stored_width + (adapter_bytes or 0)
        if engine != "vllm" and adapter_bytes is not None:
            needed += weights_bytes * width / stored_width
        if on_cpu:
            needed += (_ENGINE_GIB + (cache_gib if engine == "vllm" else 0)) * GIB
        found = Fit(
            dtype=choice,
            computes_in=computes_in,
            kv_cache_gib=cache_gib,
            needed_bytes=needed,
            free_bytes=free_bytes,
        )
        if found.fits:
            break
    assert found is not None
    return found


def adapter_bytes(config: Mapping[str, Any], adapter: Mapping[str, Any]) -> float:
    """Returns the least that an adapter takes in 16 bits: on the usual layers of a dense model. Other layers count as nothing."""
    config = text_config(config)
    hidden, heads = config.get("hidden_size") or 0, config.get("num_attention_heads") or 0
    head_dim = config.get("head_dim") or (hidden // heads if heads else 0)
    query, key = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    inner = 0 if any("expert" in name for name in config) else config.get("intermediate_size") or 0
    widths = {"q_proj": query, "k_proj": key, "v_proj": key, "o_proj": query}
    widths |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), inner)
    names = _module_names(adapter)
    per_rank = sum(
        hidden + width for name, width in widths.items() if width and (name in names or "all-linear" in names)
    )
    return 2.0 * int(adapter.get("r") or 8) * per_rank * (config.get("num_hidden_layers") or 0)


def cache_for_one_gib(config: Mapping[str, Any], max_model_len: int | None, width: int) -> int:
    """Returns the KV cache for one request of full length, in whole GiB, at least 1. `width` is the bytes of a value."""
    heads = config.get("num_attention_heads") or 0
    head_dim = config.get("head_dim") or (config.get("hidden_size", 0) // heads if heads else 0)
    per_token = (
        2 * (config.get("num_hidden_layers") or 0) * (config.get("num_key_value_heads") or heads) * head_dim * width
    )
    tokens = max_model_len or config.get("max_position_embeddings") or 0
    return max(1, math.ceil(per_token * tokens / GIB))


def too_long(config: Mapping[str, Any], max_model_len: int | None) -> str:
    """Returns why a context is longer than the model's, unless its config scales positions (RoPE scaling); else ""."""
    config = text_config(config)
    limit = config.get("max_position_embeddings")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    if limit and not scaled and (max_model_len or 0) > limit:
        return f"max_model_len={max_model_len} is longer than the model's context: expected at most {limit} tokens"
    return ""


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config with the values of its text model, which a multimodal model has in a part of its own."""
    text = config.get("text_config")
    return {**config, **(text if isinstance(text, Mapping) else {})}


def stored_dtype(config: Mapping[str, Any]) -> str:
    """Returns the dtype of the weights."""
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
