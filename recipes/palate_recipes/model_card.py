"""The model card of a tuned model: the Hub's metadata block, and code that loads the model. Knows no store and no run.

Source: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from palate_recipes.catalog import Model, find_model
from palate_recipes.specs.train import TrainSpec
from palate_recipes.specs.weights import BaseModel
from palate_recipes.text import visible

CARD_FILE = "README.md"
_TEMPLATE_FILE = "chat_template.jinja"
_ADAPTER_FILE = "adapter_config.json"

_MARKUP = re.compile(r"[`*\[\]<>&|~]|\\(?=[!-/:-@\[-`{-~])")
_NOT_PLAIN = re.compile("[^ -~\xa0-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Controls, line separators, bidirectional overrides and what YAML does not allow. All have four hexadecimal digits."""


def folder_card(spec: TrainSpec, files: Collection[str]) -> str:
    """Returns the card of a model folder as the training writes it. Published cards add the data and the settings."""
    strategy = spec.hyperparameters.training_strategy
    lines = [
        *card_head(spec, files),
        "",
        f"# {inline(spec.model.name)}, {strategy.upper()}",
        "",
        card_summary(spec, files),
        "",
        *card_usage(spec, files),
        "",
    ]
    return "\n".join(lines)


def card_head(spec: TrainSpec, files: Collection[str]) -> list[str]:
    """Returns the metadata block. `files` are the names of the model's files."""
    is_adapter, hub_id, strategy = _ADAPTER_FILE in files, spec.model.hub_id, spec.hyperparameters.training_strategy
    settings: dict[str, Any] = {}
    if hub_id:
        settings["base_model"] = hub_id
        settings["base_model_relation"] = "adapter" if is_adapter else "finetune"
    settings["library_name"] = "peft" if is_adapter else "transformers"
    settings["pipeline_tag"] = "text-generation"
    settings["tags"] = ["palate", "trl", strategy, *(["lora"] if is_adapter else [])]
    row = _row(hub_id) if hub_id else None
    if row is not None and " " in row.licence:  # the catalog's licences without an SPDX id have names of several words
        settings["license"] = "other"
        settings["license_name"] = row.licence
    elif row is not None:
        settings["license"] = row.licence.lower()
    # JSON is valid YAML, so no name can break the block.
    return ["---", *(f"{key}: {_quoted(value)}" for key, value in settings.items()), "---"]


def card_summary(spec: TrainSpec, files: Collection[str]) -> str:
    """Returns one sentence: what the model is, and its base."""
    kind = "adapter for" if _ADAPTER_FILE in files else "full fine-tuning of"
    strategy = spec.hyperparameters.training_strategy.upper()
    return f"A {strategy} {kind} {inline(base_name(spec.model))}, trained with Palate."


def base_name(model: BaseModel) -> str:
    """Returns the base's hub id, or its name with a remark that the Hub does not have it."""
    return model.hub_id or f"{model.name} (not on the Hub)"


def card_usage(spec: TrainSpec, files: Collection[str], *, place: str = ".") -> list[str]:
    """Returns a section with code that loads the model and asks it something.

    Args:
        spec: The training.
        files: Names of the model's files.
        place: The model's id on the Hub, or "." for code that runs in the model's folder.
    """
    remark = "  # this folder" if place == "." else ""
    start, note = [f"place = {_quoted(place)}{remark}"], []
    if _ADAPTER_FILE not in files:
        imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
        load = ["model = AutoModelForCausalLM.from_pretrained(place)"]
    elif spec.model.hub_id:
        imports = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"]
        load = ["model = AutoPeftModelForCausalLM.from_pretrained(place)"]
    else:
        imports = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
        ]
        start.append(f"base = {_quoted(spec.model.name)}  # the folder of the base model")
        load = [
            "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), place)",
        ]
        note = [f"Base model: {inline(spec.model.name)}, not on the Hub. Set `base` to its folder.", ""]
    question = ['inputs = tokenizer("The capital of France is", return_tensors="pt")']
    if _TEMPLATE_FILE in files and spec.hyperparameters.apply_chat_template:
        question = [
            'chat = [{"role": "user", "content": "What is the capital of France?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    return [
        "## Usage",
        "",
        *note,
        "```python",
        *imports,
        "",
        *start,
        *load,
        "tokenizer = AutoTokenizer.from_pretrained(place)",
        *question,
        "answer = model.generate(**inputs, max_new_tokens=100)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
    ]


def inline(value: object) -> str:
    """Returns a value as one line of plain text in Markdown. Names come from records, and a card is published."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(visible(str(value)).split()))


def _quoted(value: object) -> str:
    """Returns strings and lists as they are written in YAML and in Python."""
    return _NOT_PLAIN.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def _row(hub_id: str) -> Model | None:
    try:
        return find_model(hub_id)
    except LookupError:
        return None
