"""A random two-layer model of every architecture in the catalog, and of a few more: trains in a second, knows nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.rows import preference_rows

FAMILIES: dict[str, tuple[str, ...]] = {
    "deepseek-r1": ("qwen2", "llama"),
    "gemma-2": ("gemma2",),
    "gemma-3": ("gemma3_text",),
    "llama-3": ("llama",),
    "mistral": ("mistral",),
    "olmo-2": ("olmo2",),
    "phi": ("phi3",),
    "qwen2": ("qwen2",),
    "qwen2.5": ("qwen2",),
    "qwen3": ("qwen3", "qwen3_moe"),
    "smollm2": ("llama",),
    "smollm3": ("smollm3",),
    "tinyllama": ("llama",),
    "zephyr": ("mistral",),
}
"""Families of the catalog, and the `model_type` of their published configs."""

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_OWN: dict[str, dict[str, Any]] = {
    "qwen3_moe": _EXPERTS,
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 512},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 512},
    "mistral": {"sliding_window": None},  # as Mistral-7B-v0.3 has it; zephyr's window is 4,096
    "olmo3": {"sliding_window": 512},
    "cohere2": {"sliding_window": 512},
    "granite": {"logits_scaling": 8.0, "residual_multiplier": 0.22, "embedding_multiplier": 12.0, "attention_multiplier": 0.1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 512},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 4,
        "mamba_n_groups": 1,
        "ssm_state_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
}  # fmt: skip
CATALOG = tuple(sorted({kind for kinds in FAMILIES.values() for kind in kinds}))
OTHERS = ("cohere2", "glm4_moe", "gpt_oss", "granite", "mixtral", "olmo3")
"""Architectures that the catalog does not list, and that a folder of one's own may have."""


_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def small_tokenizer() -> Any:
    """A byte-level tokenizer of 500 tokens that knows ChatML and the words of `preference_rows`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = ["system\nYou are a helpful assistant", "user", "assistant"]
    words += [text for row in preference_rows(40) for text in row.values()]
    ends = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=500, special_tokens=ends, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHATML,
    )


def small_config(model_type: str, tokenizer: Any) -> Any:
    """The config of a two-layer model of an architecture, for the small tokenizer."""
    from transformers import AutoConfig

    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return AutoConfig.for_model(model_type, **{**shape, **_OWN.get(model_type, {})})


def random_model(model_type: str, folder: Path) -> Path:
    """Writes a random model of an architecture, with the small tokenizer.

    Args:
        model_type: As in a config.
        folder: Is made.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small_config(model_type, tokenizer)).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
