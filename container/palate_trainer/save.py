"""Writes the tuned model's folder: adapter or weights, tokenizer, card, probe. Knows the output folder, no training loop."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from palate_recipes.model_card import CARD_FILE, folder_card
from palate_recipes.specs.train import MODEL_DIR, PROBE_FILE, TrainTask
from palate_trainer.distributed import is_main
from palate_trainer.model import DTYPES
from palate_trainer.sharding import is_sharded, whole_weights
from palate_trainer.tokenize import TokenPair

PROBE_ROWS = 8
_COMMIT = re.compile(r"[0-9a-f]{40}")


def save_model(task: TrainTask, trainer: Any, tokenizer: Any, probe_rows: list[TokenPair]) -> Path:
    """Writes `<output_dir>/model`: what a server needs, and a probe to check the server with. Only rank 0 writes.

    Args:
        task: The run.
        trainer: After its last step. Its model is a PeftModel or the full network.
        tokenizer: With the chat template used in training.
        probe_rows: Rows to score into probe.json. The first eight are used.

    Returns:
        The folder. It is renamed into place last, so if it exists it is complete.
    """
    folder = Path(task.files.output_dir) / MODEL_DIR
    model = trainer.model
    sharded = is_sharded(task)
    probe = _probe(task, model, probe_rows[:PROBE_ROWS]) if sharded or is_main() else {}
    dtype = None if isinstance(model, PeftModel) else DTYPES[task.spec.precision]
    weights = whole_weights(model, trainable_only=dtype is None, dtype=dtype) if sharded else None
    if not is_main():
        return folder
    draft = folder.with_name(f".{MODEL_DIR}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    if isinstance(model, PeftModel):
        _name_base(task, model.peft_config["default"])
        # Adapters on linear layers never resize embeddings. Without this flag PEFT looks up the base config to check.
        model.save_pretrained(draft, state_dict=weights, save_embedding_layers=False)
    else:
        model.config.use_cache = True
        if not sharded:
            model.to(dtype)
        model.config.dtype = dtype
        model.save_pretrained(draft, state_dict=weights)
    tokenizer.save_pretrained(draft)
    # Also replaces PEFT's template of a card, which is empty.
    card = folder_card(task.spec, [path.name for path in draft.iterdir()])
    (draft / CARD_FILE).write_text(card, encoding="utf-8")
    (draft / PROBE_FILE).write_text(json.dumps(probe) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)
    return folder


def _name_base(task: TrainTask, config: Any) -> None:
    """Writes the base's hub id and commit, by which PEFT finds it on any machine, or its name if it has no hub id."""
    model, folder = task.spec.model, Path(task.files.model_dir)
    # A local path means nothing on another machine.
    config.base_model_name_or_path = model.hub_id or model.name or folder.name
    config.revision = None
    if model.hub_id and model.source.kind == "hub":
        # The hub's cache names a snapshot by its commit, which is exact where the asked revision is a branch or empty.
        config.revision = folder.name if _COMMIT.fullmatch(folder.name) else model.source.revision or None


def _probe(task: TrainTask, model: Any, rows: list[TokenPair]) -> dict[str, Any]:
    model.eval()
    scored = []
    for row in rows:
        entry = {"row": row.row, "prompt_ids": row.prompt_ids, "completion_ids": row.answer_ids}
        entry["logps"] = _logps(task, model, row)
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                entry["base_logps"] = _logps(task, model, row)
        scored.append(entry)
    return {"precision": task.spec.precision, "model_name": task.spec.model.name, "rows": scored}


def _logps(task: TrainTask, model: Any, row: TokenPair) -> list[float]:
    device = next(model.parameters()).device
    ids = torch.tensor([row.prompt_ids + row.answer_ids], device=device)  # (1, tokens)
    mixed = (
        nullcontext() if task.spec.precision == "float32" else torch.autocast(device.type, DTYPES[task.spec.precision])
    )
    with torch.no_grad(), mixed:
        logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1].float()
    picked = logits.log_softmax(-1).gather(1, torch.tensor(row.answer_ids, device=device).unsqueeze(1))
    return [round(value, 5) for value in picked.squeeze(1).tolist()]
