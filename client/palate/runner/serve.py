"""A service's run: model staged, the server run, its endpoint published. Knows the server's spec, no engine."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from palate.record import ACTIVE, TOKEN_KEY, Manifest, Record
from palate.runner.child import Child, Tail, describe_exit, log_line, log_tail, watch
from palate.session import Session
from palate.store import open_parent
from palate.weights import WeightsSource, fetch_weights
from palate_server.spec import ERROR_FILE, READY_FILE, TOKEN_VARIABLE, Ready, ServeSpec

STOP_GRACE_S = 20.0


def run_service(record: Record, manifest: Manifest, session: Session, work: Path, terminated: threading.Event) -> int:
    """Runs a service until it is stopped or dies, and writes its terminal status; returns the runner's exit code."""
    body = manifest.body
    options = body["options"]
    log = work / "program.log"
    logs = Tail(record, "logs", log)

    def say(text: str) -> None:
        log_line(log, text)
        logs.push()

    if record.status().state != "Creating":
        record.advance("Stopped", expect={"Stopping"}, reason="stopped before it began")
        return 0
    begun = time.monotonic()
    tuned_dir = _stage_tree(body["tuned_uri"], session, work / "model") if body["tuned_uri"] else None
    base_dir: Path | None = None
    if tuned_dir is None or body["adapter"]:  # whole tuned weights need no base
        base_dir, _ = fetch_weights(WeightsSource.from_json(body["model"]["source"]), session, say=say)
    spec = ServeSpec(
        service_name=record.name,
        model_dir=str(tuned_dir or base_dir),
        base_model_dir=str(base_dir) if tuned_dir is not None and base_dir is not None else None,
        work_dir=str(work),
        **{**options, "engine_args": tuple(options.get("engine_args", ()))},
    )
    spec.write(work / "spec.json")
    say(f"starting the engine for {body['model']['name']}")
    child = Child(
        [sys.executable, "-m", "palate_server", str(work / "spec.json")],
        log=log,
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
        announced = True
        if body["time_to_live_s"]:
            over_at = time.monotonic() + body["time_to_live_s"]  # its life begins when it answers
        ready = Ready.read(ready_file)
        record.advance(
            "Running",
            expect={"Creating"},
            started_at=time.time(),
            endpoint=ready.endpoint,
            details={"engine": ready.engine, "models": ready.models, "start_s": round(time.monotonic() - begun, 1)},
        )

    outcome = watch(
        child,
        record,
        [logs],
        terminated=terminated,
        on_tick=announce,
        deadline=lambda: over_at,
        grace_s=STOP_GRACE_S,
    )
    code = child.process.returncode
    logs.push(final=True)
    if outcome != "ended":
        reason = "its time to live is over" if outcome == "timed out" else "stopped on request"
        record.advance("Stopped", expect=ACTIVE, reason=reason, exit_code=code, endpoint="")
        return 0
    error = work / ERROR_FILE
    reason = error.read_text(encoding="utf-8").strip() if error.exists() else f"the server ended: {describe_exit(code)}"
    record.advance("Failed", expect=ACTIVE, reason=reason, exit_code=code, log_tail=log_tail(log), endpoint="")
    return 1


def _stage_tree(uri: str, session: Session, folder: Path) -> Path:
    store, prefix = open_parent(uri, options=session.options_for(uri))
    local = store.local_path(prefix)
    if local is not None:
        return local
    store.download_tree(prefix, folder)
    return folder
