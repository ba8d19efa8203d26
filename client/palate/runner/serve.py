"""Runs a service: stages the model, runs the server, publishes the endpoint. Knows the server's spec, no engine."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from msgspec import to_builtins

from palate.processes import bind_error
from palate.runner.access import AccessFile
from palate.runner.adapters import StagedAdapters
from palate.runner.checkpoints import stage_tuned
from palate.runner.child_process import Child, log_tail, watch
from palate.runner.context import Ending, RunContext
from palate.runner.fleet import NotStaged, Rollout, Staged
from palate.runner.lifetime import Lifetime
from palate.runner.merge import merge_adapter
from palate.runner.poll import RecordPoll
from palate.runner.retry import StoreRetry
from palate.runs.adapters import read_adapters
from palate.weights import fetch_weights
from palate_recipes.engine_options import spec_fields
from palate_recipes.errors import StoreError
from palate_recipes.specs.access import ACCESS_FILE
from palate_recipes.specs.run import Deployment
from palate_recipes.specs.serve import ERROR_FILE, IDLE_FILE, READY_FILE, TOKEN_VARIABLE, Ready, ServeSpec

STOP_GRACE_S = 20.0
_PORT_RELEASE_S = 10.0
"""How long the engine of a killed attempt may take to release its port."""


def run_service(context: RunContext, body: Deployment) -> Ending:
    """Runs a service until it stops or fails. Returns how it ended; the caller writes the status."""
    work = context.work
    begun = time.monotonic()
    port = cache(lambda: _port(context, body.options))

    def stage(body: Deployment, folder: Path, retry: StoreRetry) -> Staged:
        return _stage(context, body, folder, retry, port=port)

    try:
        current = stage(body, work / "model", context.retry)
    except NotStaged as refused:
        return refused.ending
    spec = current.spec
    spec.write(work / "spec.json")
    access_file = AccessFile(context.direct, work / ACCESS_FILE)
    access = context.retry(access_file.update)
    lifetime = Lifetime(context.direct, context.heartbeat.attempt, body.time_to_live_s or None)
    context.retry(lifetime.update)
    rollout = Rollout(
        context.direct,
        current,
        work,
        stage=stage,
        attempt=lambda: context.heartbeat.attempt,
        say=context.say,
        adapters=StagedAdapters(context.direct, work / "adapters", context.session, context.say),
    )
    rollout.begin()
    context.say(f"starting the engine for {body.model.name}; it loads the model and answers a first request")
    child = Child(
        [sys.executable, "-P", "-m", "palate_server", str(work / "spec.json")],
        log=context.log,
        env={TOKEN_VARIABLE: access.owner, "HF_HUB_OFFLINE": "1"},
        cwd=work,
    )
    poll = RecordPoll(
        {"tokens": access_file.update, "time to live": lifetime.update, "versions and adapters": rollout.update},
        context.say,
    )
    ready_file = work / READY_FILE
    announced = False

    def announce() -> None:
        nonlocal announced
        if announced or not ready_file.exists():
            return
        life = lifetime.begin()  # also if the status cannot be written: the time to live starts with the first answer
        ready = Ready.read(ready_file)
        facts = rollout.facts()
        try:
            context.direct.advance(
                "Running",
                expect={"Creating"},
                attempt=context.heartbeat.attempt,
                started_at=time.time(),
                endpoint=ready.endpoint,
                details={
                    "engine": ready.engine,
                    "models": ready.models,
                    "start_s": round(time.monotonic() - begun, 1),
                    "port": urlsplit(ready.endpoint).port,
                    "parity": to_builtins(ready.parity),
                    **life,
                    **facts,
                },
            )
        except StoreError:
            return  # retried at the next tick
        announced = True
        rollout.announced(facts)
        context.say(f"{ready.engine} has answered its first request, {time.monotonic() - begun:.0f} s after the start")

    with child, poll:
        outcome = watch(
            child,
            context.heartbeat,
            terminated=context.terminated,
            on_tick=announce,
            deadline=lifetime.ends_at,
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
        reason=child.cause(current.explain(reason)),
        exit_code=code,
        log_tail=log_tail(context.log),
    )


def _port(context: RunContext, options: Mapping[str, Any]) -> int:
    """Returns the port to bind: the given one, else the one of the last start, else 0.

    Clients keep the URL of a service, so it stays the same over stop, start and update. If another program has taken the port,
    the service takes a free one and says so: nobody asked for that number, and a service that answers is worth more.
    """
    if given := options.get("port", 0):
        return int(given)
    last = context.record.status().details.get("port")
    if not isinstance(last, int) or not 1024 <= last <= 65535:  # the record is not trusted
        return 0
    host = str(options.get("host", "127.0.0.1"))
    error = bind_error(host, last, within_s=_PORT_RELEASE_S)
    if error is None:
        return last
    context.say(
        f"note: port {last}, which this service had, cannot be bound ({error.strerror}): it takes a free one, and its URL changes. "
        "Deploy with a fixed port to make that an error"
    )
    return 0


def _stage(
    context: RunContext, body: Deployment, folder: Path, retry: StoreRetry, *, port: Callable[[], int]
) -> Staged:
    """Brings the model of a version to this machine. Returns it with what the server program gets.

    Args:
        context: The run.
        body: The version.
        folder: Where the tuned model is copied to, unless the store is on this machine.
        retry: Retries store operations.
        port: Returns the service's port. Called once the files are here: it may wait for a port to be released.

    Raises:
        NotStaged: The adapter could not be merged, or the run is to end.
    """
    options, tuned_uri = body.options, body.tuned_uri
    tuned_dir = (
        retry(
            lambda: stage_tuned(
                context.session, tuned_uri, folder, checkpoint=bool(body.checkpoint), digest=body.tuned_digest
            )
        )
        if tuned_uri
        else None
    )
    base_dir: Path | None = None
    if tuned_dir is None or body.adapter:  # full tuned weights need no base
        base_dir, _ = retry(lambda: fetch_weights(body.model.source, context.session, say=context.say))
    merged = None
    if options.get("merge") and tuned_dir is not None and base_dir is not None:
        done = merge_adapter(context, base_dir=base_dir, adapter_dir=tuned_dir, out=folder / "merged", options=options)
        if isinstance(done, Ending):
            raise NotStaged(done)
        merged, tuned_dir, base_dir = done, done.folder, None
    spec = ServeSpec(
        service_name=context.record.name,
        model_dir=str(tuned_dir or base_dir),
        base_model_dir=str(base_dir) if tuned_dir is not None and base_dir is not None else None,
        work_dir=str(context.work),
        idle_after_s=body.idle_time_to_live_s,
        model_name=body.model.name,
        adapters_rank=max((one.rank for one in retry(lambda: read_adapters(context.record))), default=0),
        **{**spec_fields(options), "port": port()},
    )
    return Staged(body=body, spec=spec, folder=folder if folder.exists() else None, merged=merged)
