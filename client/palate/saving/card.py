"""A model card: what a model was trained from and with, in the Hugging Face hub's form. Knows a job's record, no place."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from palate_recipes.catalog import Model, find_model

if TYPE_CHECKING:
    from palate.record import Manifest, Status


def model_card(manifest: Manifest, status: Status, files: Collection[str], *, tags_adapter: bool) -> str:
    """Returns the card in Markdown, with the hub's block of settings at its top.

    Names what data was called and its digest, never the folder or bucket that it lay in.

    Args:
        manifest, status: Of the succeeded job.
        files: Names of the model's files.
        tags_adapter: Whether they are an adapter, not whole weights.

    Source: https://huggingface.co/docs/hub/model-cards
    """
    body = manifest.body
    model, values = body["model"], body["hyperparameters"]
    row = _row(model["name"])
    strategy = values["training_strategy"]
    settings: dict[str, Any] = {
        "base_model": model.get("hub_id"),
        "base_model_relation": "adapter" if tags_adapter else "finetune",
        "library_name": "peft" if tags_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["palate", "trl", strategy, *(["lora"] if tags_adapter else [])],
    }
    if row is not None and row.licence:
        settings["license_name"] = row.licence  # the base's: the hub's own list of identifiers is another
        settings["license"] = "other"
    if settings["base_model"] is None:
        del settings["base_model"], settings["base_model_relation"]
    # JSON is YAML: nothing in a name can break the block.
    head = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items())
    kind = "adapter for" if tags_adapter else "full fine-tuning of"
    facts = {
        "base model": model.get("hub_id") or model["name"],
        "base revision": status.details.get("model_revision", "unknown"),
        "method": body["method"],
        "strategy": strategy,
        "precision": body["precision"],
        "job": manifest.name,
        **{f"label {name}": value for name, value in manifest.labels.items()},
    }
    versions = {**manifest.versions, **status.details.get("versions", {})}
    return "\n".join(
        [
            "---",
            head,
            "---",
            "",
            f"# {manifest.name}",
            "",
            f"A {strategy.upper()} {kind} {facts['base model']}, trained with Palate.",
            "",
            *_table(("fact", "value"), facts),
            "",
            "## Data",
            "",
            "| channel | name | rows | SHA-256 |",
            "| --- | --- | --- | --- |",
            *(_data_row(channel, entry) for channel, entry in body["inputs"].items()),
            "",
            "## Hyperparameters",
            "",
            *_table(("name", "value"), {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}),
            "",
            "## Versions",
            "",
            *_table(("library", "version"), versions),
            "",
            f"{len(files)} files; `digests.json` has the size and SHA-256 of each.",
            "",
        ]
    )


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "| --- | --- |", *(f"| {_cell(k)} | {_cell(v)} |" for k, v in rows.items())]


def _data_row(channel: str, entry: Mapping[str, Any]) -> str:
    name = PurePosixPath(str(entry.get("uri", ""))).name
    return f"| {channel} | {_cell(name)} | {entry.get('rows', '')} | `{entry.get('sha256', '')}` |"


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _row(name: str) -> Model | None:
    try:
        return find_model(name)
    except LookupError:
        return None
