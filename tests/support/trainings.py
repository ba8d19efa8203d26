"""Trainings that tests interrupt: their settings, and what they have left in the store so far."""

from __future__ import annotations

from typing import Any

from palate import TrainingJob
from palate.runs.record import Record

SETTINGS: dict[str, Any] = {
    "training_strategy": "dpo",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "num_train_epochs": 1000,
    "save_steps": 10,
}
"""A checkpoint a second, with the tiny model; as many steps as `max_steps` says."""


def losses(job: TrainingJob) -> list[tuple[int, float]]:
    """Returns step and loss of every step, as its metrics have them."""
    return [(event["step"], event["loss"]) for event in job.metrics() if event["kind"] == "train"]


def adapter(job: TrainingJob) -> bytes:
    """Returns the weights that it has made."""
    record = Record(job._run.session.store, "jobs", job.id)
    return record.store.get(record.key("model", "adapter_model.safetensors"))


def last_checkpoint(job: TrainingJob) -> int:
    """Returns the step of the last whole checkpoint, or 0."""
    record = Record(job._run.session.store, "jobs", job.id)
    marks = [info.key for info in record.store.list(record.key("checkpoints")) if info.key.endswith("/.complete")]
    return max((int(mark.split("/")[-2].split("-")[1]) for mark in marks), default=0)
