"""Runs an evaluation: stages both models and the data, runs the trainer's scoring program, uploads the scores. Knows no ML.

A later attempt, and another evaluation with some of the same rows, finds what was scored before in the store's cache.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from pathlib import Path

from msgspec.structs import replace

from palate.adapter_input import fetch_adapter
from palate.runner.checkpoints import stage_tuned
from palate.runner.child_process import Child, log_tail, watch
from palate.runner.context import Ending, RunContext
from palate.runner.reference_cache import ReferenceCache
from palate.runner.train import cause_of, library_versions, stage_file
from palate.weights import fetch_weights
from palate_recipes.errors import ConfigurationError
from palate_recipes.specs.evaluation import SCORES_FILE, EvaluateTask, EvaluationSpec
from palate_recipes.specs.train import EXIT_STOPPED

_STOP_GRACE_S = 20.0
"""A stopped program saves the rows that it has scored."""


def run_evaluation(context: RunContext, spec: EvaluationSpec) -> Ending:
    """Makes one attempt. Returns how it ended; the caller writes the status."""
    record, output = context.record, context.work / "output"
    shutil.rmtree(output, ignore_errors=True)  # of an earlier attempt
    output.mkdir()
    record.advance("Running", expect={"Creating"}, attempt=context.heartbeat.attempt, started_at=time.time())
    if record.status().state != "Running":
        return Ending(state="Stopped", reason="stopped before it began")
    task = _stage_all(context, spec, output)
    tables = [ReferenceCache(context.direct.store, of, context.say) for of in (task.base(), task.tuned())]
    context.say(f"scoring the held-out pairs with {spec.model.name} before and after the training")
    child = Child(
        [sys.executable, "-P", "-m", "palate_trainer.evaluate", str(context.work / "task.json")],
        log=context.log,
        env={"HF_HUB_OFFLINE": "1"},  # everything is staged, so the program must not download anything
        cwd=context.work,
    )

    def look() -> None:
        for table in tables:
            table.look()

    with tables[0], tables[1], child:
        outcome = watch(
            child,
            context.heartbeat,
            terminated=context.terminated,
            on_tick=look,
            deadline=lambda: None,
            grace_s=_STOP_GRACE_S,
        )
    code = child.process.returncode
    if outcome == "lease lost":
        return Ending(state="Failed", again=False)
    if code == 0:
        scores = (output / SCORES_FILE).read_bytes()
        record.store.put(record.key(SCORES_FILE), scores)
        details = {**record.status().details, "scores_digest": hashlib.sha256(scores).hexdigest()}
        record.note(attempt=context.heartbeat.attempt, details=details)
        return Ending(state="Succeeded", exit_code=code)
    if outcome == "stopped" or code == EXIT_STOPPED:
        return Ending(state="Stopped", exit_code=code, reason="stopped on request")
    reason = cause_of(output, child, was_full=False)
    return Ending(state="Failed", exit_code=code, reason=reason, log_tail=log_tail(context.log))


def _stage_all(context: RunContext, spec: EvaluationSpec, output: Path) -> EvaluateTask:
    """Stages everything that the program reads, and writes its task."""
    retry, work, session = context.retry, context.work, context.session
    # The tuned model first: it is small, and a damaged one is refused before the base is downloaded.
    tuned_dir = retry(
        lambda: stage_tuned(
            session, spec.tuned_uri, work / "tuned", checkpoint=bool(spec.checkpoint), digest=spec.tuned_digest
        )
    )
    model_dir, revision = retry(lambda: fetch_weights(spec.model.source, session, say=context.say))
    if spec.base_revision and revision != spec.base_revision:
        raise ConfigurationError(
            f"the weights of {spec.model.name} have changed since the job trained them (revision {revision}, before "
            f"{spec.base_revision}): restore them, or train again"
        )
    details = {"model_revision": revision, "versions": library_versions()}
    context.record.note(attempt=context.heartbeat.attempt, details=details)
    began_with = spec.training.inputs.get("adapter")
    task = EvaluateTask(
        training=replace(spec.training, inputs={}),
        model_dir=str(model_dir),
        tuned_dir=str(tuned_dir),
        data_file=str(retry(lambda: stage_file(spec.data.uri, session, work / "data"))),
        output_dir=str(output),
        adapter_dir=str(retry(lambda: fetch_adapter(began_with.uri, session, work / "adapter")))
        if began_with
        else None,
        cache_dir=str(work / "cache"),
    )
    task.write(work / "task.json")
    return task
