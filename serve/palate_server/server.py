"""The server's main path: preflight, engine on a leash, first real answers, ready.json, and an end that leaves nothing behind."""

from __future__ import annotations

import errno
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
from http.client import HTTPException
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import IO

from msgspec.structs import replace

from palate_recipes.errors import BadSpec, EngineFailed, EngineHung, PortTaken, ServerError, StartTimeout
from palate_recipes.specs.serve import (
    ACTIVITY_PATH,
    BASE_MODEL,
    ERROR_FILE,
    IDLE_FILE,
    PROBE_HEADER,
    READY_FILE,
    STOP_GRACE_S,
    TOKEN_VARIABLE,
    TUNED_MODEL,
    Ready,
    ServeSpec,
)
from palate_server.plan import check, engine_command, engine_environment
from palate_server.supervisor import Supervised

logger = logging.getLogger(__name__)

_TAIL_LINES = 30
_KEPT_LINES = 400
_PROBE_EVERY_S = 0.25
_LINE_BYTES = 64 * 1024
_BACKLOG = 2048
_LOOK_EVERY_S = 5.0
_STILL_TIMES = 5
"""For so many times `hang_after_s` requests may be without a sign of life, and a request for one token without an answer."""
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}
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
    for name in (READY_FILE, ERROR_FILE, IDLE_FILE):
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
        _listening(spec.host, spec.port) as listener,
        # vLLM leaves its sockets behind; a work folder's path may be too long for one.
        TemporaryDirectory(prefix="palate-") as ipc_dir,
    ):
        port = listener.getsockname()[1]
        command = engine_command(spec, plan, spec_file=spec_file, port=port, ipc_dir=ipc_dir)
        logger.info("starting %s on port %d, dtype %s", title, port, plan.dtype)
        environment = engine_environment(plan, spec_file=spec_file, ipc_dir=ipc_dir, listener=listener.fileno())
        engine = Supervised(
            command,
            env=environment,
            cwd=work_dir,
            grace_s=STOP_GRACE_S,
            on_end=lambda: events.put("ended"),
            pass_fds=[listener.fileno()],
        )
        log = _Log(engine.output)
        endpoint = _endpoint(spec.host, port)
        asking = _Asking(endpoint, token)
        threading.Thread(target=_probe, args=(asking, spec, events), daemon=True).start()
        ended = threading.Event()
        try:
            event = _next(events, timeout_s=spec.start_timeout_s)
            if event == "answered":
                seconds = round(time.monotonic() - began, 1)
                Ready(endpoint=endpoint, engine=title, models=spec.models, seconds=seconds).write(work_dir / READY_FILE)
                logger.info("ready after %.1f s: %s/v1", seconds, endpoint)
                threading.Thread(target=_watch, args=(asking, spec, events, ended), daemon=True).start()
                event = _next(events, timeout_s=None)
        finally:
            ended.set()
            engine.end()
            log.finish()
    if event == "stop":
        logger.info("stopped")
    elif event == "idle":
        reason = f"nobody has asked it for anything for {spec.idle_after_s:g} s, its idle time to live"
        (work_dir / IDLE_FILE).write_text(f"{reason}\n", encoding="utf-8")
        logger.info("stopped: %s", reason)
    elif event == "ended":
        raise EngineFailed(f"{title} ended by itself with exit code {engine.returncode}: {log.story()}")
    elif isinstance(event, EngineHung):
        raise EngineHung(f"{title} hangs: {event}. It was ended; start the service again. {log.story()}")
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
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Yields a socket that listens; raises PortTaken.

    From here on the kernel gives the port to nobody else, so whoever connects, this program's probe with the token among
    them, reaches the engine that is handed the socket. Until the engine answers, connections wait.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(_BACKLOG)
        except OSError as error:
            remedy = "stop what listens there, choose another port, or set port=0 for a free one"
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                remedy = "give an address of this machine as host, such as 127.0.0.1"
            raise PortTaken(f"cannot bind port {port} on {host} ({error.strerror}): {remedy}") from error
        yield listener


def _endpoint(host: str, port: int) -> str:
    host = _LOOPBACK.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Asking:
    """Asks the service as its clients do. The endpoint is this program's own socket: the token goes to nobody else."""

    def __init__(self, endpoint: str, token: str) -> None:
        self._endpoint = endpoint
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", PROBE_HEADER: "1"}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def token_of(self, model: str, *, timeout_s: float) -> None:
        """Has the model make one token; raises OSError, which is an HTTPError when the answer is an error."""
        body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 1}).encode()
        self._get("/v1/completions", body, timeout_s)

    def activity(self, *, timeout_s: float) -> dict[str, float]:
        """Returns what the front says of its requests (`palate_server.gateway.Activity`); raises OSError or ValueError."""
        facts: dict[str, float] = json.loads(self._get(ACTIVITY_PATH, None, timeout_s))
        return facts

    def _get(self, path: str, body: bytes | None, timeout_s: float) -> bytes:
        request = urllib.request.Request(f"{self._endpoint}{path}", data=body, headers=self._headers)
        try:
            with self._opener.open(request, timeout=timeout_s) as response:
                content: bytes = response.read()
                return content
        except HTTPException as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error


def _probe(asking: _Asking, spec: ServeSpec, events: SimpleQueue[str | ServerError]) -> None:
    """Asks each model for one token until it answers, then reports; an answer that is an error is reported at once."""
    for model in [TUNED_MODEL, *([BASE_MODEL] if spec.base_model_dir else [])]:
        while True:
            try:
                asking.token_of(model, timeout_s=spec.start_timeout_s)
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


def _watch(asking: _Asking, spec: ServeSpec, events: SimpleQueue[str | ServerError], ended: threading.Event) -> None:
    """Looks every few seconds whether the engine lives, and reports once when it hangs, or when nobody needs it any more.

    A busy engine is not a hung one. Its front answers from an event loop that computes nothing, so silence there is a
    process that is stopped or stuck. Requests that make no token and end not are asked about with a request for a token,
    which an engine that works answers between the others.
    """
    look_every_s = min(_LOOK_EVERY_S, spec.hang_after_s / 4)
    seen_at = time.monotonic()
    while not ended.wait(look_every_s):
        asked_at = time.monotonic()
        try:
            facts = asking.activity(timeout_s=spec.hang_after_s)
        except urllib.error.HTTPError:
            facts = {}  # too many connections, say: something lives there
        except (OSError, ValueError) as error:
            if time.monotonic() - seen_at >= spec.hang_after_s:
                events.put(EngineHung(f"it has not answered for {spec.hang_after_s:g} s ({error})"))
                return
            continue
        seen_at = asked_at
        if spec.idle_after_s is not None and facts.get("idle_s", 0) >= spec.idle_after_s:
            events.put("idle")
            return
        if facts.get("still_s", 0) >= spec.hang_after_s:
            limit_s = _STILL_TIMES * spec.hang_after_s
            try:
                asking.token_of(TUNED_MODEL, timeout_s=limit_s)
            except urllib.error.HTTPError:
                pass  # an answer
            except OSError as error:
                if not ended.is_set() and _still_s(asking, spec.hang_after_s) >= limit_s:
                    events.put(EngineHung(f"it makes no token any more: none came within {limit_s:g} s ({error})"))
                    return


def _still_s(asking: _Asking, timeout_s: float) -> float:
    try:
        return asking.activity(timeout_s=timeout_s).get("still_s", 0.0)
    except (OSError, ValueError):
        return 0.0  # the next look says more


class _Log:
    """Passes the engine's output on to this program's and keeps its end."""

    def __init__(self, output: IO[bytes]) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._output = output
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        passing_on = True
        while line := self._output.readline(_LINE_BYTES):
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
