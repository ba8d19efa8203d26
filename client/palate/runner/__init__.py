"""`palate-run URI`: stands beside a program and keeps its run's record. Knows stores and the record; no backend, no ML.

It stages inputs, runs the trainer or the server as a child, pushes what the child says, heeds a stop, and writes the
terminal status last. Whatever ends it, the child ends with it.
"""

from __future__ import annotations

import logging
import shutil
import signal
import sys
import threading
from types import FrameType

from palate.errors import PalateError
from palate.home import palate_home
from palate.record import ACTIVE, Record, locate
from palate.session import Session

logger = logging.getLogger("palate.runner")

USAGE = "usage: palate-run <store>/jobs/<id> | <store>/services/<name>"


def main(argv: list[str] | None = None) -> int:
    """Runs one run to its end; returns 0 when the run succeeded or was stopped as asked, else 1."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    terminated = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        terminated.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)

    root, kind, name = locate(arguments[0])
    session = Session(store=root)
    record = Record(session.store, kind, name)
    manifest = record.manifest()
    work = palate_home() / "work" / kind / name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, mode=0o700)
    try:
        if manifest.kind == "train":
            from palate.runner.train import run_training

            return run_training(record, manifest, session, work, terminated)
        from palate.runner.serve import run_service

        return run_service(record, manifest, session, work, terminated)
    except Exception as error:  # the last place where a cause can be saved: the runner has no caller
        logger.exception("the runner failed")
        reason = str(error) if isinstance(error, PalateError) else f"{type(error).__name__}: {error}"
        record.advance("Failed", expect=ACTIVE, reason=reason)
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)
