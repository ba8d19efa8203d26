"""Jobs that were never trained, with adapters of random weights that answer differently, and a judge that follows one rule."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from palate import Session, TrainingJob
from palate.checksums import DIGESTS_FILE, Checksums
from palate.evaluation.record import Comparison, Contestant, EvaluationRecord, Figure
from palate.runs.record import Record
from palate_recipes.specs.train import InputFile
from palate_recipes.specs.weights import BaseModel, WeightsSource
from tests.support.chat import Answer, completion, shown_answers
from tests.support.manifests import train_manifest

TRAINED_ON = [{"prompt": "Is 0 an even number?", "chosen": "It is.", "rejected": "Yes, of course, as you say."}]
"""What the jobs say that they were trained on."""


def job_of(session: Session, name: str, base: Path, model: Path, **hyperparameters: Any) -> TrainingJob:
    """Returns a succeeded job whose model has the files of a folder.

    Args:
        session: Its store.
        name: Its id.
        base: Folder with the base model.
        model: Folder with the adapter.
        **hyperparameters: Of its training.
    """
    (model / DIGESTS_FILE).unlink(missing_ok=True)
    (model / DIGESTS_FILE).write_bytes(Checksums.of(model).encode())
    record = Record(session.store, "jobs", name)
    manifest = train_manifest(name, hyperparameters=hyperparameters)
    source = WeightsSource(kind="folder", location=str(base))
    record.store.put(record.key("inputs", "train", "train.json"), json.dumps(TRAINED_ON).encode())
    inputs = {
        "train": InputFile(uri=record.store.uri(record.key("inputs", "train", "train.json")), rows=len(TRAINED_ON))
    }
    body = replace(manifest.body, model=BaseModel(name="tiny", source=source), inputs=inputs)
    record.create(replace(manifest, body=body))
    for path in model.iterdir():
        record.store.upload(path, record.key("model", path.name))
    digest = hashlib.sha256((model / DIGESTS_FILE).read_bytes()).hexdigest()
    record.advance("Succeeded", expect={"Creating"}, details={"model_digest": digest})
    return TrainingJob.get(name, session)


def evaluation_record(
    key: str, *models: str, comparisons: tuple[Comparison, ...] = (), **fields: Any
) -> EvaluationRecord:
    """Returns the record of an evaluation that nobody made."""
    return EvaluationRecord(
        key=key,
        created_at=1.0,
        base=BaseModel(name="tiny", source=WeightsSource(kind="folder", location="/models/tiny")),
        models=tuple(Contestant(name=name) for name in models),
        comparisons=comparisons,
        **fields,
    )


def compared(first: str, second: str, win_rate: Figure, **fields: Any) -> Comparison:
    """Returns a comparison of which all verdicts are ties, but for `win_rate`."""
    counts = {"prompts": 4, "wins": 0, "losses": 0, "ties": 4, "flips": 0, "same": 0, "unreadable": 0, "failed": 0}
    return Comparison(first=first, second=second, win_rate=win_rate, **{**counts, **fields})


def alphabetical(body: dict[str, Any], number: int) -> Answer:
    """A judge that knows nothing: it prefers the answer that comes first in the alphabet."""
    first, second = shown_answers(body)
    return completion("A" if first < second else "B", usage=(100, 1))
