"""Writes the tuned model's folder: adapter or weights, tokenizer, card, probe. Knows the output folder, no training loop."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import torch
from peft import PeftModel

from palate_recipes.model_card import CARD_FILE, folder_card
from palate_recipes.preferences.row import Row
from palate_recipes.specs.probe import PROBE_FILE, PROBE_ROWS, Probe, ProbeRow, Turn
from palate_recipes.specs.train import MODEL_DIR, TrainTask
from palate_trainer.distributed import is_main
from palate_trainer.model import DTYPES
from palate_trainer.sharding import is_sharded, whole_weights
from palate_trainer.tokenize import Renderer, TokenPair

_COMMIT = re.compile(r"[0-9a-f]{40}")


def save_model(
    task: TrainTask, trainer: Any, renderer: Renderer, probe_rows: list[TokenPair], rows: Sequence[Row]
) -> Path:
    """Writes `<output_dir>/model`: what a server needs, and a probe to check the server with. Only rank 0 writes.

    Args:
        task: The run.
        trainer: After its last step. Its model is a PeftModel or the full network.
        renderer: Its tokenizer has the chat template used in training.
        probe_rows: Rows to score into probe.json. The first eight are used.
        rows: The rows that they were tokenized from, among others.

    Returns:
        The folder. It is renamed into place last, so if it exists it is complete.
    """
    folder = Path(task.files.output_dir) / MODEL_DIR
    model = trainer.model
    sharded = is_sharded(task)
    probe = _probe(task, model, renderer, probe_rows[:PROBE_ROWS], rows) if sharded or is_main() else None
    dtype = None if isinstance(model, PeftModel) else DTYPES[task.spec.precision]
    weights = whole_weights(model, trainable_only=dtype is None, dtype=dtype) if sharded else None
    if not is_main() or probe is None:
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
    renderer.tokenizer.save_pretrained(draft)
    # Also replaces PEFT's template of a card, which is empty.
    card = folder_card(task.spec, [path.name for path in draft.iterdir()])
    (draft / CARD_FILE).write_text(card, encoding="utf-8")
    (draft / PROBE_FILE).write_bytes(msgspec.json.encode(probe) + b"\n")
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


def _probe(task: TrainTask, model: Any, renderer: Renderer, probe_rows: list[TokenPair], rows: Sequence[Row]) -> Probe:
    model.eval()
    hyperparameters = task.spec.hyperparameters
    scored = []
    for row in probe_rows:
        base_logps: list[float] = []
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                base_logps = _logps(task, model, row)
        # A conversation with several answers becomes several rows with one number.
        same = (renderer.messages(read.prompt) for read in rows if read.number == row.row)
        turns = next((turns for turns in same if renderer.prompt_ids(turns) == row.prompt_ids), [])
        date_start, date_end = renderer.date_span(turns) if turns else (0, 0)
        scored.append(
            ProbeRow(
                row=row.row,
                prompt_ids=tuple(row.prompt_ids),
                completion_ids=tuple(row.answer_ids),
                logps=tuple(_logps(task, model, row)),
                base_logps=tuple(base_logps),
                messages=tuple(Turn(**turn) for turn in turns) if renderer.apply_chat_template else (),
                prompt=turns[-1]["content"] if turns and not renderer.apply_chat_template else "",
                date_start=date_start,
                date_end=date_end,
            )
        )
    return Probe(
        precision=task.spec.precision,
        quantization="4 bit" if hyperparameters.load_in_4bit else "8 bit" if hyperparameters.load_in_8bit else "",
        model_name=task.spec.model.name,
        rows=tuple(scored),
    )


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
