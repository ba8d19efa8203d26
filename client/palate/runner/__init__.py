"""`palate-run URI`: runs a run's program and keeps its record. Knows stores and the record; no backend, no ML.

It acquires the run's lease, stages inputs, runs the trainer, the server or an evaluation as a child process, uploads its output,
handles stop requests, makes further attempts, and writes the terminal status last. However it ends, the child process ends with it.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from palate.env_file import take_variables
from palate.paths import stale_work_folders, work_folder
from palate.runner.child_process import log_line, log_tail
from palate.runner.context import Ending, RunContext, reason_of
from palate.runner.heartbeat import Heartbeat, Tail
from palate.runner.retry import StoreRetry
from palate.runs.lease import START_ID_VARIABLE, HeldLease, acquire
from palate.runs.record import LOST, Record, locate
from palate.session import Session
from palate_recipes.errors import StoreError
from palate_recipes.specs.evaluation import EvaluationSpec
from palate_recipes.specs.run import ACTIVE
from palate_recipes.specs.train import TrainSpec

logger = logging.getLogger("palate.runner")

USAGE = "usage: palate-run <store>/jobs/<id> | <store>/services/<name> | <store>/evaluations/<name> | train"

_RESERVE_BYTES = 1 << 20
"""Reserved in the work folder, so that a run on a full disk can still report it."""


def main(argv: list[str] | None = None) -> int:
    """Executes one run. Returns 0 if it succeeded, was stopped on request, or belongs to another runner, else 1."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["train"]:  # the command that managed platforms run; there is no store and no record
        os.environ["PYTHONSAFEPATH"] = "1"  # also for every process that it starts
        os.execv(sys.executable, [sys.executable, "-P", "-m", "palate_trainer.platforms", *arguments[1:]])
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    take_variables()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    terminated = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        terminated.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)

    root, kind, name = locate(arguments[0])
    session = Session(store=root)
    direct = Record(session.store, kind, name)
    work = work_folder(kind, name)
    log = work / "program.log"

    def say(text: str) -> None:
        logger.info(text)
        if work.is_dir():
            log_line(log, text)

    retry = StoreRetry(say, terminated.is_set)
    record = Record(retry.store(session.store), kind, name)
    manifest = record.manifest()
    held = _take(record, terminated)
    if held is None:
        return 0
    for stale in stale_work_folders(kind, name):
        shutil.rmtree(stale, ignore_errors=True)
    work.mkdir(parents=True, mode=0o700)
    held = held.through(direct)  # without retries: a heartbeat must not wait for the store
    heartbeat = Heartbeat(direct, held, say)
    context = RunContext(
        record=record,
        direct=direct,
        manifest=manifest,
        session=session,
        work=work,
        heartbeat=heartbeat,
        retry=retry,
        terminated=terminated,
    )
    try:
        with heartbeat:
            ending = _attempts(context)
        if not heartbeat.lease_lost.is_set():
            retry(held.release)
        return 1 if ending.state == "Failed" else 0
    except StoreError as error:
        logger.error("the final status cannot be written: %s", error)
        return 1
    except Exception:  # a damaged record, for example
        logger.exception("the final status cannot be written")
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _take(record: Record, terminated: threading.Event) -> HeldLease | None:
    """Acquires the run's lease and resolves the state that an earlier runner left. Returns None if there is nothing to run."""
    status = record.status()
    if status.is_terminal:
        logger.info("%s is %s: nothing to run", record.uri, status.state)
        return None
    start_id = os.environ.get(START_ID_VARIABLE, "")
    held = acquire(record, attempt=status.attempt, start_id=start_id, give_up=terminated.is_set)
    if held is None:
        logger.info("another runner has %s: exiting", record.uri)
        return None
    status = record.status()
    if status.attempt == held.lease.attempt and status.state == "Running":  # its runner was lost
        if status.attempt < status.last_attempt:
            held.beat(attempt=status.attempt + 1)
            status = record.begin_again(expect={"Running"}, attempt=status.attempt, reason=LOST) or record.status()
        else:
            status = record.advance("Failed", expect={"Running"}, attempt=status.attempt, reason=LOST) or status
    if status.attempt == held.lease.attempt and status.state == "Stopping":
        status = record.advance("Stopped", expect={"Stopping"}, reason="stopped before it began") or status
    if status.attempt == held.lease.attempt and status.state == "Creating":
        return held
    held.release()
    return None


def _attempts(context: RunContext) -> Ending:
    """Makes attempts until one does not fail or none is left. Writes the terminal status and returns the last ending."""
    record, heartbeat = context.record, context.heartbeat
    logs = context.retry(lambda: Tail(context.direct, "logs", context.log))
    heartbeat.push(logs)
    reserve = context.work / "reserve"
    while True:
        ending = _attempt(context, logs, reserve)
        reserve.unlink(missing_ok=True)
        if heartbeat.lease_lost.is_set():
            logger.info("another runner has %s now: exiting", record.uri)
            return ending
        status = record.status()
        if not (ending.state == "Failed" and ending.again and status.attempt < status.last_attempt):
            break
        if context.terminated.is_set() or heartbeat.stop_wanted.is_set():
            break
        context.say(f"attempt {status.attempt} of {status.last_attempt} failed: {ending.reason}")
        facts: dict[str, Any] = {"reason": ending.reason, "exit_code": ending.exit_code}
        following = status.attempt + 1
        context.retry(partial(heartbeat.held.beat, attempt=following))
        if record.begin_again(expect={"Running"}, attempt=status.attempt, state="Running", **facts) is None:
            context.retry(partial(heartbeat.held.beat, attempt=status.attempt))
            break  # a stop request came first
    context.retry(lambda: logs.push(final=True))
    record.advance(
        ending.state,
        expect=ACTIVE,
        attempt=heartbeat.attempt,
        reason=ending.reason,
        exit_code=ending.exit_code,
        log_tail=ending.log_tail,
        endpoint="",
    )  # last: everything that it promises is in place
    return ending


def _attempt(context: RunContext, logs: Tail, reserve: Path) -> Ending:
    try:
        reserve.write_bytes(b"\1" * _RESERVE_BYTES)
        body = context.manifest.body
        if isinstance(body, TrainSpec):
            from palate.runner.train import run_training

            return run_training(context, body, logs)
        if isinstance(body, EvaluationSpec):
            from palate.runner.evaluate import run_evaluation

            return run_evaluation(context, body)
        from palate.runner.serve import run_service

        return run_service(context, body)
    except Exception as error:  # the runner has no caller, so the cause must be saved here
        logger.exception("the runner failed")
        reserve.unlink(missing_ok=True)
        return Ending(state="Failed", reason=reason_of(error), log_tail=log_tail(context.log))
