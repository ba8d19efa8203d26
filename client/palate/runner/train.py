"""Runs one attempt of a training: stages inputs, runs the trainer, uploads checkpoints and model. Knows the trainer's spec, no ML.

A later attempt resumes from the last complete checkpoint in the store, with the metrics up to its step.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import time
from pathlib import Path

from msgspec.structs import replace

from palate.adapter_input import fetch_adapter
from palate.checksums import DIGESTS_FILE, Checksums
from palate.runner.checkpoints import CheckpointPusher, stage_last_checkpoint
from palate.runner.child_process import Child, log_tail, watch
from palate.runner.context import Ending, RunContext
from palate.runner.heartbeat import Tail
from palate.runner.reference_cache import ReferenceCache
from palate.runs.record import events_once
from palate.session import Session
from palate.store import open_parent
from palate.weights import fetch_weights
from palate_recipes.device import installed_version
from palate_recipes.errors import ConfigurationError
from palate_recipes.specs.train import (
    CHECKPOINTS_DIR,
    ERROR_FILE,
    EXIT_STOPPED,
    METRICS_FILE,
    MODEL_DIR,
    TENSORBOARD_DIR,
    LocalFiles,
    TrainSpec,
    TrainTask,
)

STOP_GRACE_S = 120.0
"""A stopped trainer first finishes its step and writes a checkpoint."""

_FULL_BYTES = 1 << 20

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "palate")

_COMMIT = re.compile(r"[0-9a-f]{40}")
"""What the hub's client returns as revision. Anything else in a record is not trusted with a file name."""


def run_training(context: RunContext, spec: TrainSpec, logs: Tail) -> Ending:
    """Makes one attempt. Returns how it ended; the caller writes the status."""
    record = context.record
    deadline = time.monotonic() + spec.max_run_time_s if spec.max_run_time_s else None
    output = context.work / "output"
    shutil.rmtree(output, ignore_errors=True)  # of an earlier attempt; what is needed of it is in the store
    output.mkdir()
    record.advance("Running", expect={"Creating"}, attempt=context.heartbeat.attempt, started_at=time.time())
    if record.status().state != "Running":
        return Ending(state="Stopped", reason="stopped before it began")
    for note in spec.notes:
        context.say(f"note: {note}")
    task, resumed_from = _stage_all(context, spec, output)
    known = _stage_metrics(context, output, resumed_from)
    metrics = context.retry(lambda: Tail(context.direct, "metrics", output / METRICS_FILE, offset=known))
    context.heartbeat.push(logs, metrics)
    cache = ReferenceCache(context.direct.store, task, context.say)
    context.say(f"training {spec.model.name} with {spec.method} in {spec.precision}")
    child = Child(
        [sys.executable, "-P", "-m", "palate_trainer", str(context.work / "spec.json")],
        log=context.log,
        env={"HF_HUB_OFFLINE": "1"},  # everything is staged, so the program must not download anything
        kept=spec.environment_names,
        cwd=context.work,
    )

    was_full = False

    def look() -> None:
        nonlocal was_full
        was_full = (
            was_full or shutil.disk_usage(output).free < _FULL_BYTES
        )  # there may be space again when the trainer has ended
        checkpoints.look()
        cache.look()

    pusher = CheckpointPusher(
        record,
        output / CHECKPOINTS_DIR,
        attempt=context.heartbeat.attempt,
        staged=resumed_from.name if resumed_from else None,
        before_mark=lambda: context.retry(metrics.push),
    )
    with child, cache, pusher as checkpoints:
        outcome = watch(
            child,
            context.heartbeat,
            terminated=context.terminated,
            on_tick=look,
            deadline=lambda: deadline,
            grace_s=STOP_GRACE_S,
        )
        if outcome != "lease lost":
            checkpoints.look()
    code = child.process.returncode
    if outcome == "lease lost" or not context.retry(
        context.heartbeat.held.beat
    ):  # the machine may have slept since the last heartbeat
        context.heartbeat.lease_lost.set()
        return Ending(state="Failed", again=False)
    context.retry(lambda: metrics.push(final=True))
    if (output / TENSORBOARD_DIR).is_dir():
        record.store.upload_tree(output / TENSORBOARD_DIR, record.key(TENSORBOARD_DIR))
    if code == 0:  # also if a stop request came after the last step: the model is complete
        context.say("saving the model")
        details = {**record.status().details, "model_digest": _push_model(context, output / MODEL_DIR)}
        record.note(attempt=context.heartbeat.attempt, details=details)
        return Ending(state="Succeeded", exit_code=code)
    if outcome == "stopped" or (outcome == "ended" and code == EXIT_STOPPED):
        return Ending(state="Stopped", exit_code=code, reason="stopped on request")
    if outcome == "timed out":
        reason = f"max_run_time of {spec.max_run_time_s} s was reached; complete checkpoints are kept"
        return Ending(state="Failed", exit_code=code, reason=reason, log_tail=log_tail(context.log), again=False)
    return Ending(
        state="Failed",
        exit_code=code,
        reason=cause_of(output, child, was_full=was_full),
        log_tail=log_tail(context.log),
    )


def _stage_all(context: RunContext, spec: TrainSpec, output: Path) -> tuple[TrainTask, Path | None]:
    """Stages everything that the trainer reads. Returns its task and the checkpoint to resume from."""
    retry, work = context.retry, context.work
    earlier = context.record.status()
    source = spec.model.source
    known = str(earlier.details.get("model_revision"))
    if source.kind == "hub" and _COMMIT.fullmatch(known):
        source = replace(source, revision=known)  # a branch may have moved since
    model_dir, revision = retry(lambda: fetch_weights(source, context.session, say=context.say))
    resumed_from = None
    if earlier.attempt > 1:
        resumed_from = retry(lambda: stage_last_checkpoint(context.record, output / CHECKPOINTS_DIR, context.say))
        went_on = f"resuming from {resumed_from.name}" if resumed_from else "from the beginning: there is no checkpoint"
        context.say(f"attempt {earlier.attempt}, {went_on}")
    before = earlier.details.get("model_revision", revision)
    if resumed_from and before != revision:
        raise ConfigurationError(
            f"the weights of {spec.model.name} have changed since the run started (revision {revision}, "
            f"before {before}): restore them, or start a new training"
        )
    details = {**earlier.details, "model_revision": revision, "versions": library_versions()}
    context.record.note(attempt=context.heartbeat.attempt, details=details)
    inputs = {channel: facts.uri for channel, facts in spec.inputs.items()}

    def stage(channel: str) -> str | None:
        if channel not in inputs:
            return None
        return str(retry(lambda: stage_file(inputs[channel], context.session, work / channel)))

    files = LocalFiles(
        model_dir=str(model_dir),
        train_file=stage("train") or "",
        validation_file=stage("validation"),
        adapter_dir=(
            str(retry(lambda: fetch_adapter(inputs["adapter"], context.session, work / "adapter")))
            if "adapter" in inputs
            else None
        ),
        output_dir=str(output),
        cache_dir=str(work / "cache"),
        resume_from=str(resumed_from) if resumed_from else None,
        attempt=context.heartbeat.attempt,
    )
    task = TrainTask(spec=spec, files=files)
    task.write(work / "spec.json")
    return task, resumed_from


def _stage_metrics(context: RunContext, output: Path, resumed_from: Path | None) -> int:
    """Writes the events up to the checkpoint's step to the trainer's metrics file, and returns their size in bytes.

    The trainer's final reading uses all of them. TensorBoard's files are staged too.
    """
    if resumed_from is None:
        return 0
    step = int(resumed_from.name.rpartition("-")[2])
    events = [
        event
        for event in events_once(context.retry(lambda: [*context.direct.metrics()]))
        if event["kind"] == "start" or (event["kind"] != "end" and event["step"] <= step)
    ]
    text = "".join(json.dumps(event) + "\n" for event in events)  # ASCII: a store may have half characters
    (output / METRICS_FILE).write_text(text, encoding="ascii")
    key = context.record.key(TENSORBOARD_DIR)
    if context.retry(lambda: any(True for _ in context.direct.store.list(key))):
        context.record.store.download_tree(key, output / TENSORBOARD_DIR)
    return len(text.encode())


def _push_model(context: RunContext, folder: Path) -> str:
    """Uploads the model and then the list of its files. Returns the list's SHA-256."""
    digests, store, prefix = Checksums.of(folder), context.record.store, context.record.key(MODEL_DIR)
    # An earlier attempt may have been lost here. A file of its model that this one lacks would count as added to it.
    for info in list(store.list(prefix)):
        if info.key.removeprefix(f"{prefix}/") not in digests.files:
            store.delete(info.key)
    listed = digests.encode()
    store.upload_tree(folder, prefix)
    store.put(f"{prefix}/{DIGESTS_FILE}", listed)
    return hashlib.sha256(listed).hexdigest()


def cause_of(output: Path, child: Child, *, was_full: bool) -> str:
    """Returns why the trainer failed: its own message, or a full disk, else its exit."""
    error = output / ERROR_FILE
    told = error.read_text(encoding="utf-8").strip() if error.exists() else ""
    if not told and (was_full or shutil.disk_usage(output).free < _FULL_BYTES):
        told = f"The disk is full: {output} is on a disk without free space. Free some space and resume the job."
    return child.cause(told)


def stage_file(uri: str, session: Session, folder: Path) -> Path:
    """Returns a local file with the content of `uri` and the same name, which error messages use."""
    store, name = open_parent(uri, options=session.options_for(uri))
    local = store.local_path(name)
    if local is not None:
        return local
    target = folder / name
    store.download(name, target)
    return target


def library_versions() -> dict[str, str]:
    """Returns the versions of the training libraries that are installed here."""
    return {name: found for name in LIBRARIES if (found := installed_version(name)) is not None}
