"""The checkpoints of a job in its store: lists, chooses and checks them. Knows no trainer and no engine.

A checkpoint is complete if it has a marker file, which is written last and lists every file with its digest. Each attempt writes
its own.

    step-000100/  step-000200/            from the first attempt
    step-000200-attempt-2/                from the second, which resumed from step 100 of the first
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from palate.checksums import Checksums
from palate.runs.record import Record, events_once
from palate_recipes.errors import ConfigurationError, DamagedFilesError, JobNotReadyError
from palate_recipes.lora_targets import ADAPTER_FILES
from palate_recipes.specs.events import duration
from palate_recipes.specs.train import CHECKPOINTS_DIR, COMPLETE_MARK, TrainSpec

if TYPE_CHECKING:
    from palate.store import ObjectInfo

LATEST = "latest"

_NAME = re.compile(r"step-(?P<step>[0-9]{1,18})(-attempt-(?P<attempt>[0-9]{1,9}))?")
_WANTED = re.compile(r"(step-|checkpoint-)?(?P<step>[0-9]{1,18})")
"""A step as users write it: 100, step-100, or the trainer's name, which its log has."""

_SERVED = (".json", ".jinja", ".model", ".safetensors", ".tiktoken", ".txt")
"""Endings of weights, configs and tokenizers. The state of the training is most of a checkpoint, as pickles (.pt, .pth, .bin)."""
_TRAINER_STATE = "trainer_state.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

_SHOWN = 10
"""Checkpoints in an error message, the newest ones."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in the store. Created by `TrainingJob.checkpoints`.

    Attributes:
        name: Name of its folder in the store, which `checkpoint=` takes, as it takes the step.
        step: Optimizer steps before it.
        attempt: The attempt that wrote it.
        is_complete: Whether it can be served and resumed from. If not, it is still being uploaded, or its runner died meanwhile.
        written_at: When it was completed, or its last file was written, in seconds since the epoch.
        size_bytes: Size of its files in the store.
        metrics: Metrics of its step, with TRL's names: of the log line at the step, or of the last one before it (`loss`,
            `rewards/margins` and so on), and of the evaluation at exactly this step, if there was one (`eval_loss` and so on).
    """

    name: str
    step: int
    attempt: int
    is_complete: bool
    written_at: float
    size_bytes: int
    metrics: dict[str, Any] = field(default_factory=dict)


def list_checkpoints(record: Record) -> list[Checkpoint]:
    """Returns a job's checkpoints without metrics, by step, and of the same step by attempt. Does not verify their files."""
    prefix = record.key(CHECKPOINTS_DIR)
    folders: dict[str, dict[str, ObjectInfo]] = {}
    for info in record.store.list(prefix):
        name, _, file = info.key.removeprefix(f"{prefix}/").partition("/")
        folders.setdefault(name, {})[file] = info
    found = []
    for name, files in folders.items():
        if (match := _NAME.fullmatch(name)) is None:
            continue
        mark = files.get(COMPLETE_MARK)
        found.append(
            Checkpoint(
                name=name,
                step=int(match["step"]),
                attempt=int(match["attempt"] or 1),
                is_complete=mark is not None,
                written_at=mark.modified_s if mark else max(info.modified_s for info in files.values()),
                size_bytes=sum(info.size for info in files.values()),
            )
        )
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.attempt))


def complete_checkpoints(record: Record) -> list[Checkpoint]:
    """Returns those of `list_checkpoints` that are complete."""
    return [checkpoint for checkpoint in list_checkpoints(record) if checkpoint.is_complete]


def with_metrics(checkpoints: Sequence[Checkpoint], events: Iterable[dict[str, Any]]) -> list[Checkpoint]:
    """Returns the checkpoints with their metrics.

    Args:
        checkpoints: Of one job.
        events: Its metrics events, each step once.
    """
    known = [event for event in events if event["kind"] in ("train", "eval")]
    return [replace(checkpoint, metrics=_metrics_at(checkpoint.step, known)) for checkpoint in checkpoints]


def _metrics_at(step: int, events: list[dict[str, Any]]) -> dict[str, Any]:
    lines = [event for event in events if event["kind"] == "train" and event["step"] <= step]
    line = max(lines, key=lambda event: event["step"], default={})
    evaluation = next((event for event in events if event["kind"] == "eval" and event["step"] == step), {})
    figures = {name: value for name, value in evaluation.items() if name.startswith("eval_")}
    return {name: value for name, value in {**line, **figures}.items() if name not in ("kind", "attempt")}


def choose_checkpoint(record: Record, wanted: str | int) -> Checkpoint:
    """Returns the complete checkpoint that a user means.

    Args:
        record: The job.
        wanted: `latest`, a step, or a name (`step-000100`). Of a step, the last attempt's; a full name is that one.

    Raises:
        ConfigurationError: It has another form, or the job has no such checkpoint; the message lists those that it has.
        JobNotReadyError: The job has none.
    """
    given = str(wanted)
    step = None if isinstance(wanted, bool) else _WANTED.fullmatch(given)
    if given != LATEST and step is None and not _NAME.fullmatch(given):
        raise ConfigurationError(
            f"checkpoint={wanted!r} is not a checkpoint: expected '{LATEST}', a step such as 100, or a name such as 'step-000100'"
        )
    found = complete_checkpoints(record)
    if not found:
        raise none_yet(record)
    if given == LATEST:
        return found[-1]
    same = [one for one in found if one.name == given] or [
        one for one in found if step and one.step == int(step["step"])
    ]
    if not same:
        names = [one.name for one in found]
        left_out = f"{len(names) - _SHOWN} older and " if len(names) > _SHOWN else ""
        raise ConfigurationError(
            f"checkpoint={wanted!r}: job {record.name} has no complete checkpoint of this step. It has "
            f"{left_out}{', '.join(names[-_SHOWN:])}"
        )
    return same[-1]


def none_yet(record: Record) -> JobNotReadyError:
    """Returns the error for a job without a complete checkpoint: when the first one comes, or how to get one."""
    status, body = record.status(), record.manifest().body
    assert isinstance(body, TrainSpec)  # a job's record has no other kind
    every = body.hyperparameters.save_steps
    what = f"job {record.name} is {status.state} and has no complete checkpoint"
    if status.state == "Succeeded":
        return JobNotReadyError(f"{what}: deploy its model without a checkpoint (`palate deploy {record.name}`)")
    if every and not status.is_terminal:
        return JobNotReadyError(
            f"{what} yet: it writes one every {every} steps (save_steps){_first_one(record, every)}. Follow it with "
            f"`palate watch {record.name}`"
        )
    remedy = (
        "set the hyperparameter save_steps, the steps between two checkpoints, to a number from 1 on when you train"
    )
    if status.is_terminal:
        return JobNotReadyError(f"{what}: {remedy}")
    return JobNotReadyError(
        f"{what}: save_steps is 0, so it writes one only if it is stopped (`palate stop {record.name}`, "
        f"`palate resume {record.name}` continues it). For checkpoints during a training {remedy}"
    )


def _first_one(record: Record, every: int) -> str:
    """Returns when a running job's first checkpoint comes, as far as its metrics tell; else ""."""
    last: dict[str, Any] = {}
    for event in events_once(record.metrics()):
        last = event if event["kind"] == "train" else last
    step, total = last.get("step", 0), last.get("total_steps", 0)
    if not total:
        return ""
    first = min(every, total)  # also after the last step
    if step >= first:
        return f", and is at step {step} of {total}: the first one is being uploaded"
    left = last.get("seconds_left")
    when = ""
    if isinstance(left, int | float) and left >= 0:
        when = f", in about {duration(left * (first - step) / (total - step))}"
    return f", and is at step {step} of {total}: the first one comes at step {first}{when}"


def served_files(digests: Checksums) -> Checksums:
    """Returns the files of a checkpoint that a server reads: weights, configs and tokenizer, none of the training's state."""
    return Checksums(
        {
            name: facts
            for name, facts in digests.files.items()
            if name.endswith(_SERVED) and name.rpartition("/")[2] != _TRAINER_STATE
        }
    )


def check_servable(record: Record, checkpoint: Checkpoint, *, adapter: bool) -> str:
    """Checks from one listing that a checkpoint has what a server needs, and returns the SHA-256 of its marker.

    Args:
        record: The job.
        checkpoint: One of its complete checkpoints.
        adapter: Whether it has an adapter, not full weights.

    Raises:
        DamagedFilesError: It is deleted, a file is missing or has the wrong size, or it was written without a tokenizer.
    """
    prefix = record.key(CHECKPOINTS_DIR, checkpoint.name)
    what, mark = record.store.uri(prefix), f"{prefix}/{COMPLETE_MARK}"
    try:
        data = record.store.get(mark)
    except FileNotFoundError:
        raise deleted(what, record.name) from None
    remedy = "choose another checkpoint"
    files = served_files(Checksums.parse(data, where=record.store.uri(mark), remedy=remedy))
    if missing := _missing(files.files, adapter=adapter):
        raise DamagedFilesError(
            f"{what} has no {' and no '.join(missing)}, which a server needs. An earlier version of Palate wrote it: serve the "
            f"model of the finished job, or a checkpoint that this version writes after `palate resume {record.name}`"
        )
    files.check_store(record.store, prefix, what=what, remedy=f"{remedy[0].upper()}{remedy[1:]}", may_hold_more=True)
    return hashlib.sha256(data).hexdigest()


def deleted(what: str, job: str) -> DamagedFilesError:
    """Returns the error for a checkpoint that somebody deleted in the meantime.

    Args:
        what: URI of the checkpoint.
        job: The job's id, for the remedy.
    """
    return DamagedFilesError(
        f"{what} was deleted and cannot be served. Deploy a checkpoint that exists: `palate deploy {job} --checkpoint {LATEST}`"
    )


def _missing(names: Iterable[str], *, adapter: bool) -> list[str]:
    there = set(names)
    missing = [name for name in (ADAPTER_FILES if adapter else ("config.json",)) if name not in there]
    if not adapter and not any(name.endswith(".safetensors") for name in there):
        missing.append("weights (*.safetensors)")
    if there.isdisjoint(_TOKENIZERS):
        missing.append("tokenizer")
    return missing
