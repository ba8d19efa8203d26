"""A training run: inputs staged, the trainer run, its checkpoints and model pushed. Knows the trainer's spec, no ML."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from palate.continuation import fetch_adapter
from palate.record import ACTIVE, Manifest, Record
from palate.runner.cache import ReferenceCache
from palate.runner.child import Child, Tail, describe_exit, log_line, log_tail, watch
from palate.session import Session
from palate.store import open_parent
from palate.weights import WeightsSource, fetch_weights
from palate_trainer.spec import (
    CHECKPOINTS_DIR,
    COMPLETE_MARK,
    ERROR_FILE,
    EXIT_STOPPED,
    METRICS_FILE,
    MODEL_DIR,
    TENSORBOARD_DIR,
    TrainSpec,
)

STOP_GRACE_S = 120.0
"""A trainer that was told to stop finishes its step and writes a checkpoint first."""

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "palate")


def run_training(record: Record, manifest: Manifest, session: Session, work: Path, terminated: threading.Event) -> int:
    """Runs a training to its end and writes its terminal status; returns the runner's exit code."""
    if record.advance("Running", expect={"Creating"}, started_at=time.time()) is None:
        record.advance("Stopped", expect={"Stopping"}, reason="stopped before it began")
        return 0
    body = manifest.body
    deadline = time.monotonic() + body["max_run_time_s"] if body.get("max_run_time_s") else None
    log = work / "program.log"
    output = work / "output"
    output.mkdir()
    logs = Tail(record, "logs", log)
    metrics = Tail(record, "metrics", output / METRICS_FILE)

    def say(text: str) -> None:
        log_line(log, text)
        logs.push()

    for note in body["notes"]:
        say(f"note: {note}")
    model_dir, revision = fetch_weights(WeightsSource.from_json(body["model"]["source"]), session, say=say)
    details = {"model_revision": revision, "versions": _library_versions()}
    record.note(details=details)

    spec = TrainSpec(
        method=body["method"],
        model_dir=str(model_dir),
        model_name=body["model"]["name"],
        train_file=str(_stage(body["inputs"]["train"]["uri"], session, work / "train")),
        validation_file=(
            str(_stage(body["inputs"]["validation"]["uri"], session, work / "validation"))
            if "validation" in body["inputs"]
            else None
        ),
        adapter_dir=(
            str(fetch_adapter(body["inputs"]["adapter"]["uri"], session, work / "adapter"))
            if "adapter" in body["inputs"]
            else None
        ),
        output_dir=str(output),
        hyperparameters=body["hyperparameters"],
        precision=body["precision"],
        cache_dir=str(work / "cache"),
    )
    spec.write(work / "spec.json")
    cache = ReferenceCache(record.store, spec, lambda text: log_line(log, text))
    say(f"training {body['model']['name']} with {body['method']} in {body['precision']}")
    child = Child(
        [sys.executable, "-m", "palate_trainer", str(work / "spec.json")],
        log=log,
        env={"HF_HUB_OFFLINE": "1"},  # everything is staged: nothing may be fetched behind the user's back
        cwd=work,
    )

    def look() -> None:
        checkpoints.look()
        cache.look()

    with cache, _CheckpointPusher(record, output / CHECKPOINTS_DIR) as checkpoints:
        outcome = watch(
            child,
            record,
            [logs, metrics],
            terminated=terminated,
            on_tick=look,
            deadline=lambda: deadline,
            grace_s=STOP_GRACE_S,
        )
        checkpoints.look()
    code = child.process.returncode
    metrics.push(final=True)

    if code == 0:  # also when a stop came after the last step: the model is whole
        say("saving the model")
        record.store.upload_tree(output / MODEL_DIR, record.key(MODEL_DIR))
        if (output / TENSORBOARD_DIR).is_dir():
            record.store.upload_tree(output / TENSORBOARD_DIR, record.key(TENSORBOARD_DIR))
        logs.push(final=True)
        record.advance("Succeeded", expect=ACTIVE, exit_code=code)  # last: everything it promises is in place
        return 0

    logs.push(final=True)
    if outcome == "stopped" or (outcome == "ended" and code == EXIT_STOPPED):
        record.advance("Stopped", expect=ACTIVE, exit_code=code, reason="stopped on request")
        return 0
    if outcome == "timed out":
        reason = f"max_run_time of {body['max_run_time_s']} s was reached; whole checkpoints are kept"
    else:
        error = output / ERROR_FILE
        reason = (
            error.read_text(encoding="utf-8").strip() if error.exists() else f"the trainer ended: {describe_exit(code)}"
        )
    record.advance("Failed", expect=ACTIVE, exit_code=code, reason=reason, log_tail=log_tail(log))
    return 1


class _CheckpointPusher:
    """Pushes each checkpoint once it is whole, beside the training; a checkpoint in the store is whole when its mark is there."""

    def __init__(self, record: Record, folder: Path) -> None:
        self._record = record
        self._folder = folder
        self._seen: set[str] = set()
        self._pool = ThreadPoolExecutor(1)
        self._uploads: list[Future[None]] = []

    def __enter__(self) -> _CheckpointPusher:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True)
        for upload in self._uploads:
            upload.result()

    def look(self) -> None:
        if not self._folder.is_dir():
            return
        for mark in self._folder.glob(f"checkpoint-*/{COMPLETE_MARK}"):
            if mark.parent.name not in self._seen:
                self._seen.add(mark.parent.name)
                self._uploads.append(self._pool.submit(self._push, mark.parent))

    def _push(self, folder: Path) -> None:
        step = int(folder.name.rpartition("-")[2])
        prefix = self._record.key("checkpoints", f"step-{step:06d}")
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != COMPLETE_MARK:
                self._record.store.upload(path, f"{prefix}/{path.relative_to(folder).as_posix()}")
        self._record.store.put(f"{prefix}/{COMPLETE_MARK}", b"")


def _stage(uri: str, session: Session, folder: Path) -> Path:
    """Returns a local file with what `uri` holds, keeping its name: error messages speak of it."""
    store, name = open_parent(uri, options=session.options_for(uri))
    local = store.local_path(name)
    if local is not None:
        return local
    target = folder / name
    store.download(name, target)
    return target


def _library_versions() -> dict[str, str]:
    found: dict[str, Any] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found
