"""The server's main path: preflight, engine on a leash, first real answers, ready.json, and an end that leaves nothing behind."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import IO

from palate_server.engines import engine_command, engine_environment
from palate_server.errors import BadSpec, EngineFailed, PortTaken, ServerError, StartTimeout
from palate_server.leash import Leash
from palate_server.preflight import check
from palate_server.spec import (
    BASE_MODEL,
    ERROR_FILE,
    READY_FILE,
    STOP_GRACE_S,
    TOKEN_VARIABLE,
    TUNED_MODEL,
    Ready,
    ServeSpec,
)

logger = logging.getLogger(__name__)

_TAIL_LINES = 30
_KEPT_LINES = 400
_PROBE_EVERY_S = 0.25
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
_WRAPPERS = ("Engine core initialization failed", "See root cause above", "WorkerProc initialization failed")
"""Errors of vLLM that only say that another one came before."""


def main(argv: list[str]) -> int:
    """Serves the spec that argv names until SIGTERM; returns the exit code, 1 with an error.txt after a failure."""
    if len(argv) != 1:
        print("usage: python -m palate_server SPEC.json", file=sys.stderr)
        return 2
    try:
        spec = ServeSpec.read(Path(argv[0]))
    except (OSError, ValueError) as error:
        print(f"palate_server: {error}", file=sys.stderr)
        return 2
    work_dir = Path(spec.work_dir).resolve()
    if not work_dir.is_dir():
        print(f"palate_server: work_dir {work_dir} is no folder: create it first", file=sys.stderr)
        return 2
    spec = _absolute(spec, work_dir)
    for name in (READY_FILE, ERROR_FILE):
        (work_dir / name).unlink(missing_ok=True)
    try:
        serve(spec)
    except ServerError as error:
        (work_dir / ERROR_FILE).write_text(f"{error}\n", encoding="utf-8")
        logger.error("%s", error)
        return 1
    finally:
        (work_dir / READY_FILE).unlink(missing_ok=True)
    return 0


def serve(spec: ServeSpec) -> None:
    """Runs the service in the foreground; returns after SIGTERM or SIGINT, when nothing of the engine is left.

    Raises:
        ServerError: The service cannot start, or its engine died. Nothing of the engine is left then either.
    """
    began = time.monotonic()
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise BadSpec(f"{TOKEN_VARIABLE} is not set: a service never runs without a token, export a long random one")
    work_dir = Path(spec.work_dir)
    plan = check(spec)
    title = f"{plan.engine.distribution} {plan.engine.version}"
    spec_file = work_dir / "engine-spec.json"
    spec.write(spec_file)
    events: SimpleQueue[str | ServerError] = SimpleQueue()
    with (
        _signals_to(events),
        _held_port(spec.host, spec.port) as port,
        # vLLM leaves its sockets behind; a work folder's path may be too long for one.
        TemporaryDirectory(prefix="palate-") as ipc_dir,
    ):
        command = engine_command(spec, plan, spec_file=spec_file, port=port)
        logger.info("starting %s on port %d, dtype %s", title, port, plan.dtype)
        environment = engine_environment(plan, spec_file=spec_file, ipc_dir=ipc_dir)
        engine = Leash(command, env=environment, cwd=work_dir, grace_s=STOP_GRACE_S, on_end=lambda: events.put("ended"))
        log = _Log(engine.output)
        endpoint = _endpoint(spec.host, port)
        probing = threading.Thread(target=_probe, args=(endpoint, token, spec, events), daemon=True)
        probing.start()
        try:
            event = _next(events, timeout_s=spec.start_timeout_s)
            if event == "answered":
                seconds = round(time.monotonic() - began, 1)
                Ready(endpoint=endpoint, engine=title, models=spec.models, seconds=seconds).write(work_dir / READY_FILE)
                logger.info("ready after %.1f s: %s/v1", seconds, endpoint)
                event = _next(events, timeout_s=None)
        finally:
            engine.end()
            log.finish()
    if event == "stop":
        logger.info("stopped")
    elif event == "ended":
        raise EngineFailed(f"{title} ended by itself with exit code {engine.returncode}: {log.story()}")
    elif isinstance(event, ServerError):
        raise EngineFailed(f"{title} started, but {event}: {log.story()}")
    else:
        raise StartTimeout(
            f"{title} did not answer within start_timeout_s={spec.start_timeout_s:g}: give it longer, or see why it is "
            f"slow: {log.story()}"
        )


def _next(events: SimpleQueue[str | ServerError], *, timeout_s: float | None) -> str | ServerError | None:
    try:
        return events.get(timeout=timeout_s)
    except Empty:
        return None


def _absolute(spec: ServeSpec, work_dir: Path) -> ServeSpec:
    """Returns the spec with absolute paths: the engine runs in the work folder."""
    base = spec.base_model_dir and str(Path(spec.base_model_dir).resolve())
    return replace(spec, work_dir=str(work_dir), model_dir=str(Path(spec.model_dir).resolve()), base_model_dir=base)


@contextmanager
def _signals_to(events: SimpleQueue[str | ServerError]) -> Iterator[None]:
    # put() of a SimpleQueue may be called in a signal handler; an Event or a Queue could deadlock there.
    before = {s: signal.signal(s, lambda *_: events.put("stop")) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _held_port(host: str, port: int) -> Iterator[int]:
    """Yields a port that was free and that nothing else is given meanwhile; raises PortTaken.

    An engine binds its port only after seconds of imports. The held socket never listens, so that the engine, which sets
    SO_REUSEADDR as this does, can bind beside it.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind((host, port))
        except OSError as error:
            raise PortTaken(
                f"cannot bind port {port} on {host} ({error.strerror}): stop what listens there, "
                "choose another port, or set port=0 for a free one"
            ) from error
        yield held.getsockname()[1]


def _endpoint(host: str, port: int) -> str:
    host = _LOOPBACK.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _probe(endpoint: str, token: str, spec: ServeSpec, events: SimpleQueue[str | ServerError]) -> None:
    """Asks each model for one token until it answers, then reports; an answer that is an error is reported at once."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    for model in [TUNED_MODEL, *([BASE_MODEL] if spec.base_model_dir else [])]:
        body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 1}).encode()
        request = urllib.request.Request(f"{endpoint}/v1/completions", data=body, headers=headers)
        while True:
            try:
                with opener.open(request, timeout=spec.start_timeout_s) as response:
                    response.read()
                break
            except urllib.error.HTTPError as error:
                if error.code != 503:  # 503: not yet
                    text = error.read(2000).decode(errors="replace")
                    events.put(ServerError(f"its model '{model}' answered its first request with {error.code} {text}"))
                    return
            except OSError:
                pass  # not yet
            time.sleep(_PROBE_EVERY_S)
    events.put("answered")


class _Log:
    """Passes the engine's output on to this program's and keeps its end."""

    def __init__(self, output: IO[bytes]) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._output = output
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        passing_on = True
        for line in self._output:
            self._lines.append(line.decode(errors="replace").rstrip())
            if passing_on:
                try:
                    sys.stdout.buffer.write(line)
                    sys.stdout.buffer.flush()
                except OSError:
                    passing_on = False  # nobody reads it any more; the engine must still not block

    def finish(self) -> None:
        """Waits until everything that the ended engine wrote has been read."""
        self._reader.join(timeout=5.0)

    def story(self) -> str:
        """Returns the likely cause and the last lines."""
        lines = [line for line in self._lines if line.strip()]
        cause = root_cause(lines)
        last = "\n".join(f"  | {line}" for line in lines[-_TAIL_LINES:])
        return f"{cause or 'no error line in its log'}\nThe engine's last lines:\n{last or '  (none)'}"


_PREFIX = re.compile(r"^(\([^)]*pid=\d+\)\s*)?((ERROR|CRITICAL)\s[\d-]+\s[\d:]+\s\[[^\]]*\]\s*)?")
_ERROR = re.compile(
    r"^([\w.]*(Error|Exception|Exit|Interrupt)\b.*|[\w.\- ]+: error: .*|Killed.*|Segmentation fault.*)$"
)


def root_cause(lines: list[str]) -> str | None:
    """Returns the last line that states an error of its own, rather than one that points to an earlier one."""
    for number in range(len(lines) - 1, -1, -1):
        text = _PREFIX.sub("", lines[number])
        if _ERROR.match(text) and not any(wrapper in text for wrapper in _WRAPPERS):
            follows = _PREFIX.sub("", lines[number + 1]) if number + 1 < len(lines) else ""
            # pydantic's first line only counts; what is wrong stands below it
            return f"{text}: {follows.strip()}" if "validation error" in text and follows.startswith(" ") else text
    return None
