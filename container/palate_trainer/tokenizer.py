"""A model folder's tokenizer, and the tokens at which engines end an answer. Knows no weights and no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from palate_trainer.errors import TrainerError


def load_tokenizer(model_dir: str) -> Any:
    """The tokenizer, with a padding token (batches are masked, so the end-of-text token may stand in)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
    except (OSError, ValueError, KeyError) as error:
        raise TrainerError(f"{model_dir} has no usable tokenizer: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_token_ids(model_dir: str) -> frozenset[int]:
    """Tokens at which engines end an answer by the model's generation_config.json, which may be missing."""
    path = Path(model_dir) / "generation_config.json"
    if not path.is_file():
        return frozenset()
    given = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return frozenset(given if isinstance(given, list) else [] if given is None else [given])
