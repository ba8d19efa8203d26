"""LoRA adapters by their settings: which layers may carry one, and what an adapter_config.json says. Knows no weights.

vLLM 0.32 serves LoRA on linear layers; on embeddings and the output head for some architectures only, on norms never.

The client reads an adapter_config.json before it submits, the trainer before it loads: both see the same contradictions.
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
    """Returns why an adapter on the layers of that name would not be served, or None when nothing speaks against it.

    Args:
        module: As in `target_modules`: `q_proj`, or a path that ends with such a name.
    """
    name = module.rpartition(".")[2].casefold()
    if name in _HEADS:
        # TRL's DPO computes log-probabilities from the head's weight itself, and refuses an adapter there, too.
        return "is the output head, where vLLM serves an adapter for some architectures only, and DPO trains none"
    if name in _EMBEDDINGS:
        return "is an embedding, where vLLM serves an adapter for some architectures only"
    if "norm" in name or name in ("ln_1", "ln_2", "ln_f"):
        return "is a normalisation, which has no matrix that an adapter could be added to"
    if name in _ROUTERS:
        return (
            "chooses between experts: an adapter there changes which weights answer, and engines do not serve it alike"
        )
    return None


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors")
"""What a folder must hold for a training to go on from it."""

_BEYOND_SERVING = ("use_dora", "modules_to_save", "lora_bias", "layer_replication", "rank_pattern", "alpha_pattern")
_NAMES = ("lora_dim", "lora_alpha", "target_modules")


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """What an adapter decides for a training that goes on from it.

    Attributes:
        rank: `lora_dim`.
        alpha: `lora_alpha`.
        target_modules: Names of the layers with an adapter, or PEFT's regular expression over them.
        base_model: Name of the model it was trained on, or "".
    """

    rank: int
    alpha: int
    target_modules: list[str] | str
    base_model: str

    @classmethod
    def parse(cls, text: bytes | str, *, where: str) -> AdapterShape:
        """Reads an adapter_config.json.

        Args:
            text: Its content.
            where: What the folder is called in messages.

        Raises:
            DataError: It is no LoRA adapter, or one of a kind that Palate neither trains nor serves.
        """
        import json  # the client reads this module at every start, and an adapter rarely

        try:
            config = json.loads(text)
            kind = config.get("peft_type", "LORA")
            shape = cls(
                rank=int(config["r"]),
                alpha=int(config["lora_alpha"]),
                target_modules=_modules(config["target_modules"]),
                base_model=str(config.get("base_model_name_or_path") or ""),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{where}/{ADAPTER_CONFIG} describes no LoRA adapter ({type(error).__name__}: {error})."
                " Name the model folder of a finished LoRA run."
            ) from None
        odd = [f"{name}={config[name]}" for name in _BEYOND_SERVING if config.get(name)]
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
            odd += [f"{name} among its layers" for name in shape.target_modules if why_not_served(name)]
        if odd:
            raise DataError(
                f"{where} holds an adapter with {', '.join(odd)}: Palate goes on from plain LoRA adapters only."
                " Merge it into its base model and give that as model_uri."
            )
        return shape

    def contradictions(self, values: Mapping[str, Any]) -> list[str]:
        """Returns a sentence for each of `lora_dim`, `lora_alpha` and `target_modules` in `values` that is not the adapter's.

        `all-linear` contradicts no list of names: which layers it means, the adapter's own training has settled.
        """
        own = self.values()
        return [
            f"{name} = {values[name]!r}: the adapter has {own[name]!r}; leave {name} out"
            for name in _NAMES
            if name in values and _comparable(values[name]) not in ("all-linear", _comparable(own[name]))
        ]

    def values(self) -> dict[str, Any]:
        """The hyperparameters that the adapter decides."""
        return {"lora_dim": self.rank, "lora_alpha": self.alpha, "target_modules": self.target_modules}


def _modules(value: Any) -> list[str] | str:
    if isinstance(value, str):
        return value
    return sorted(str(name) for name in value)


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | tuple) else value
