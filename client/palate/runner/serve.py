"""A service's run: model staged, the server run, its endpoint published. Knows the server's spec, no engine."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from palate.checksums import read_model_digests
from palate.runner.child_process import Child, log_tail, watch
from palate.runner.context import Ending, RunContext
from palate.runs.record import TOKEN_KEY
from palate.store import open_parent
from palate.weights import WeightsSource, fetch_weights
from palate_recipes.errors import StoreError
from palate_recipes.specs.serve import ERROR_FILE, IDLE_FILE, READY_FILE, TOKEN_VARIABLE, Ready, ServeSpec

STOP_GRACE_S = 20.0


def run_service(context: RunContext) -> Ending:
    """Runs a service until it is stopped or dies, and returns how it ended; the run is then still to be told."""
    record, body, work = context.record, context.manifest.body, context.work
    options = body["options"]
    begun = time.monotonic()
    tuned_dir = context.retry(lambda: _stage_tuned(context)) if body["tuned_uri"] else None
    base_dir: Path | None = None
    if tuned_dir is None or body["adapter"]:  # whole tuned weights need no base
        source = WeightsSource.from_json(body["model"]["source"])
        base_dir, _ = context.retry(lambda: fetch_weights(source, context.session, say=context.say))
    spec = ServeSpec(
        service_name=record.name,
        model_dir=str(tuned_dir or base_dir),
        base_model_dir=str(base_dir) if tuned_dir is not None and base_dir is not None else None,
        work_dir=str(work),
        idle_after_s=body.get("idle_time_to_live_s"),  # services of earlier versions have none
        **{**options, "engine_args": tuple(options.get("engine_args", ()))},
    )
    spec.write(work / "spec.json")
    context.say(f"starting the engine for {body['model']['name']}")
    child = Child(
        [sys.executable, "-P", "-m", "palate_server", str(work / "spec.json")],
        log=context.log,
        env={TOKEN_VARIABLE: record.store.get(record.key(TOKEN_KEY)).decode(), "HF_HUB_OFFLINE": "1"},
        cwd=work,
    )
    ready_file = work / READY_FILE
    over_at: float | None = None
    announced = False

    def announce() -> None:
        nonlocal announced, over_at
        if announced or not ready_file.exists():
            return
        if body["time_to_live_s"] and over_at is None:
            over_at = time.monotonic() + body["time_to_live_s"]  # its life begins when it answers
        ready = Ready.read(ready_file)
        try:
            context.direct.advance(
                "Running",
                expect={"Creating"},
                attempt=context.heartbeat.attempt,
                started_at=time.time(),
                endpoint=ready.endpoint,
                details={"engine": ready.engine, "models": ready.models, "start_s": round(time.monotonic() - begun, 1)},
            )
        except StoreError:
            return  # at the next tick
        announced = True

    with child:
        outcome = watch(
            child,
            context.heartbeat,
            terminated=context.terminated,
            on_tick=announce,
            deadline=lambda: over_at,
            grace_s=STOP_GRACE_S,
        )
    code = child.process.returncode
    if outcome != "ended":
        reason = "its time to live is over" if outcome == "timed out" else "stopped on request"
        return Ending(state="Stopped", reason=reason, exit_code=code)
    idle = work / IDLE_FILE
    if code == 0 and idle.exists():
        return Ending(state="Stopped", reason=idle.read_text(encoding="utf-8").strip(), exit_code=code)
    error = work / ERROR_FILE
    reason = error.read_text(encoding="utf-8").strip() if error.exists() else ""
    return Ending(
        state="Failed",
        reason=child.cause(reason or ""),
        exit_code=code,
        log_tail=log_tail(context.log),
    )


def _stage_tuned(context: RunContext) -> Path:
    """Returns a local folder with what was trained, every file compared with the digest that the training wrote."""
    body = context.manifest.body
    store, prefix = open_parent(body["tuned_uri"], options=context.session.options_for(body["tuned_uri"]))
    folder = store.local_path(prefix)
    if folder is None:
        folder = context.work / "model"
        store.download_tree(prefix, folder)
    if body.get("tuned_digest"):
        digests = read_model_digests(store, prefix, body["tuned_digest"], what=body["tuned_uri"])
        digests.check_folder(folder, what=body["tuned_uri"])
    return folder
