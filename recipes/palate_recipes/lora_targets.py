"""LoRA settings: which layers can have an adapter, and how to read adapter_config.json. Knows no weights.

vLLM 0.32 serves LoRA on linear layers; on embeddings and the LM head only for some architectures, on norms never.

The client reads adapter_config.json before it submits and the trainer before it loads, so both report the same contradictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from palate_recipes.errors import DataError
from palate_recipes.schema import HYPERPARAMETERS

_HEADS = ("lm_head", "embed_out", "output_projection")
_EMBEDDINGS = ("embed_tokens", "tok_embeddings", "word_embeddings", "wte", "wpe", "embed_in", "embed_positions")
_ROUTERS = ("gate", "router", "shared_expert_gate")


def why_not_served(module: str) -> str | None:
    """Returns why an adapter on these layers cannot be served, or None if it can.

    Args:
        module: An entry of `target_modules`: a name such as `q_proj`, or a path that ends with one.
    """
    name = module.rpartition(".")[2].casefold()
    if name in _HEADS:
        # TRL's DPO computes log-probabilities from the head's weight directly, so it rejects an adapter there too.
        return "is the LM head: vLLM serves adapters on it only for some architectures, and DPO cannot train one"
    if name in _EMBEDDINGS:
        return "is an embedding: vLLM serves adapters on it only for some architectures"
    if "norm" in name or name in ("ln_1", "ln_2", "ln_f"):
        return "is a normalisation layer: it has no matrix to which an adapter could be added"
    if name in _ROUTERS:
        return "is a router of experts: engines differ in how they serve an adapter on it"
    return None


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors")
"""Files that an adapter folder must have to continue training from it."""

BEYOND_VLLM = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_bdlora",
    "use_qalora",
)
"""Fields of adapter_config.json with which vLLM rejects an adapter (vllm.lora.peft_helper, vllm.lora.utils)."""
_NOT_PLAIN = (*BEYOND_VLLM, "rank_pattern", "alpha_pattern")
_NAMES = ("lora_dim", "lora_alpha", "target_modules")


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """The hyperparameters that an existing adapter fixes.

    Attributes:
        rank: `lora_dim`.
        alpha: `lora_alpha`.
        target_modules: Names of the adapted layers, or PEFT's regular expression.
        base_model: Name of the base model, or "".
    """

    rank: int
    alpha: int
    target_modules: list[str] | str
    base_model: str

    @classmethod
    def parse(cls, text: bytes | str, *, where: str) -> AdapterShape:
        """Reads an adapter_config.json.

        Args:
            text: Content of the file.
            where: Name of the folder in messages.

        Raises:
            DataError: It is not a LoRA adapter, or has features that Palate does not support.
        """
        import json  # imported here, because the client imports this module at every start

        try:
            config = json.loads(text)
            kind = config.get("peft_type", "LORA")
            shape = cls(
                rank=int(config["r"]),
                alpha=int(config["lora_alpha"]),
                target_modules=_modules(config["target_modules"]),
                base_model=str(config.get("base_model_name_or_path") or ""),
            )
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise DataError(
                f"{where}/{ADAPTER_CONFIG} does not describe a LoRA adapter ({type(error).__name__}: {error})."
                " Give the model folder of a finished LoRA run."
            ) from None
        odd = [f"{name}={config[name]}" for name in _NOT_PLAIN if config.get(name)]
        if kind != "LORA":
            odd = [f"peft_type={kind}"]
        if config.get("bias", "none") != "none":
            odd.append(f"bias={config['bias']}")
        for name, key, value in (("lora_dim", "r", shape.rank), ("lora_alpha", "lora_alpha", shape.alpha)):
            try:
                HYPERPARAMETERS[name].parse(value)
            except ValueError:
                odd.append(f"{key}={value}")
        if isinstance(shape.target_modules, list):
            odd += [f"target module {name}" for name in shape.target_modules if why_not_served(name)]
        if odd:
            raise DataError(
                f"The adapter in {where} has {', '.join(odd)}, but Palate continues only from plain LoRA adapters."
                " Merge it into its base model and give the result as model_uri."
            )
        return shape

    def contradictions(self, values: Mapping[str, Any]) -> list[str]:
        """Returns a sentence for each of `lora_dim`, `lora_alpha` and `target_modules` that differs from the adapter's.

        `all-linear` never contradicts: the adapter's own training has resolved it to layer names.
        """
        own = self.values()
        return [
            f"{name} = {values[name]!r}, but the adapter has {own[name]!r}: omit {name}"
            for name in _NAMES
            if name in values and _comparable(values[name]) not in ("all-linear", _comparable(own[name]))
        ]

    def values(self) -> dict[str, Any]:
        """The hyperparameters that the adapter fixes."""
        return {"lora_dim": self.rank, "lora_alpha": self.alpha, "target_modules": self.target_modules}


def _modules(value: Any) -> list[str] | str:
    if isinstance(value, str):
        return value
    return sorted(str(name) for name in value)


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | tuple) else value
