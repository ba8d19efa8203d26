"""The server's main path: preflight, supervised engine, first real answers, ready.json, and a clean shutdown."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
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
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import IO, Any

from msgspec.structs import replace

from palate_recipes.device import available_memory
from palate_recipes.errors import BadSpec, EngineFailed, EngineHung, ParityFailed, PortTaken, ServerError, StartTimeout
from palate_recipes.specs.access import PROBE_TOKEN_VARIABLE
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
    Parity,
    Ready,
    ServeSpec,
)
from palate_server.causes import failure
from palate_server.parity import Check, OwnScores, VllmScores, compare, read_probe, refusal
from palate_server.parsers import with_parsers
from palate_server.plan import EnginePlan, check, engine_command, engine_environment
from palate_server.supervisor import Supervised

logger = logging.getLogger(__name__)

_KEPT_LINES = 400
_PROBE_EVERY_S = 0.25
_LINE_BYTES = 64 * 1024
_BACKLOG = 2048
_LOOK_EVERY_S = 5.0
_STILL_TIMES = 5
"""An engine hangs if requests make no progress, and a one-token request gets no answer, for this many times `hang_after_s`."""
_PARITY_TOKENS_ON_CPU = 384
"""Tokens to score per model: a processor takes about a second for them."""
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class _Answered:
    """The engine has answered, and was compared with the trained model if that was asked for."""

    parity: Parity | None


Event = str | ServerError | _Answered


def main(argv: list[str]) -> int:
    """Serves the spec file in argv until SIGTERM. Returns the exit code; 1 means a failure with error.txt written."""
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
        print(f"palate_server: work_dir {work_dir} is not a folder: create it first", file=sys.stderr)
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
    """Runs the service in the foreground until SIGTERM or SIGINT. When it returns or raises, all engine processes have ended.

    Raises:
        ServerError: The service cannot start, or its engine died.
    """
    began = time.monotonic()
    if not os.environ.get(TOKEN_VARIABLE):
        raise BadSpec(
            f"{TOKEN_VARIABLE} is not set, and a service never runs without a token: export a long random one"
        )
    work_dir = Path(spec.work_dir)
    plan = check(spec)
    title = f"{plan.engine.distribution} {plan.engine.version}"
    if plan.engine.name == "vllm":
        found = with_parsers(
            spec.engine_args,
            model_name=spec.model_name,
            tokenizer_dir=plan.tokenizer_dir,
            model_dir=Path(spec.model_dir),
        )
        spec = replace(spec, engine_args=found)
    spec_file = work_dir / "engine-spec.json"
    spec.write(spec_file)
    events: SimpleQueue[Event] = SimpleQueue()
    with (
        _signals_to(events),
        _listening(spec.host, spec.port) as listener,
        # A temporary folder, because vLLM does not remove its sockets, and the work folder's path may be too long for one.
        TemporaryDirectory(prefix="palate-") as ipc_dir,
    ):
        port = listener.getsockname()[1]
        command = engine_command(spec, plan, spec_file=spec_file, port=port, ipc_dir=ipc_dir)
        logger.info("starting %s on port %d, dtype %s", title, port, plan.dtype)
        if plan.why:
            logger.info("the engine is not vLLM: %s", plan.why)
        # Of its own: the owner's token may change while the service runs, and limits are for users.
        token = secrets.token_urlsafe(32)
        environment = engine_environment(plan, spec_file=spec_file, ipc_dir=ipc_dir, listener=listener.fileno())
        environment[PROBE_TOKEN_VARIABLE] = token
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
        threading.Thread(target=_probe, args=(asking, spec, plan, events), daemon=True).start()
        ended = threading.Event()
        free_bytes: int | None = None
        try:
            event = _next(events, timeout_s=spec.start_timeout_s)
            if isinstance(event, _Answered):
                free_bytes = available_memory()
                seconds = round(time.monotonic() - began, 1)
                ready = Ready(endpoint=endpoint, engine=title, models=spec.models, seconds=seconds, parity=event.parity)
                ready.write(work_dir / READY_FILE)
                logger.info("ready after %.1f s: %s/v1", seconds, endpoint)
                threading.Thread(target=_watch, args=(asking, spec, events, ended), daemon=True).start()
                event = _next(events, timeout_s=None)
            if event in ("stop", "idle"):
                log.end_forwarding()
        finally:
            ended.set()
            engine.end()
            log.finish()

    def story(returncode: int | None) -> str:
        command = f"palate logs {spec.service_name}"
        return failure(log.lines(), returncode=returncode, free_bytes=free_bytes, log=command)

    if event == "stop":
        logger.info("stopped")
    elif event == "idle":
        reason = f"no request for {spec.idle_after_s:g} s, its idle time to live"
        (work_dir / IDLE_FILE).write_text(f"{reason}\n", encoding="utf-8")
        logger.info("stopped: %s", reason)
    elif event == "ended":
        raise EngineFailed(f"{title} ended unexpectedly: {story(engine.returncode)}")
    elif isinstance(event, EngineHung):
        raise EngineHung(f"{title} hangs: {event}. It was stopped; start the service again. {story(None)}")
    elif isinstance(event, ParityFailed):
        raise event
    elif isinstance(event, ServerError):
        raise EngineFailed(f"{title} started, but {event}: {story(None)}")
    else:
        raise StartTimeout(
            f"{title} did not answer within start_timeout_s={spec.start_timeout_s:g}: set a higher value, or look for the "
            f"cause: {story(None)}"
        )


def _next(events: SimpleQueue[Event], *, timeout_s: float | None) -> Event | None:
    try:
        return events.get(timeout=timeout_s)
    except Empty:
        return None


def _absolute(spec: ServeSpec, work_dir: Path) -> ServeSpec:
    """Returns the spec with absolute paths: the engine runs in the work folder."""
    base = spec.base_model_dir and str(Path(spec.base_model_dir).resolve())
    return replace(spec, work_dir=str(work_dir), model_dir=str(Path(spec.model_dir).resolve()), base_model_dir=base)


@contextmanager
def _signals_to(events: SimpleQueue[Event]) -> Iterator[None]:
    # put() of a SimpleQueue is safe in a signal handler. An Event or a Queue could deadlock there.
    before = {s: signal.signal(s, lambda *_: events.put("stop")) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Yields a listening socket. Raises PortTaken.

    From here on no other process can bind the port, so every connection reaches the engine that inherits the socket. That
    includes this program's probe, which sends the token. Connections wait until the engine answers.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(_BACKLOG)
        except OSError as error:
            remedy = "stop the program that uses it, choose another port, or set port=0 for a free one"
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                remedy = "set host to an address of this machine, such as 127.0.0.1"
            raise PortTaken(f"cannot bind port {port} on {host} ({error.strerror}): {remedy}") from error
        yield listener


def _endpoint(host: str, port: int) -> str:
    host = _LOOPBACK.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Asking:
    """Queries the service as a client does. The endpoint is this program's own socket, so no other process gets the token."""

    def __init__(self, endpoint: str, token: str) -> None:
        self._endpoint = endpoint
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", PROBE_HEADER: "1"}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def token_of(self, model: str, *, timeout_s: float) -> None:
        """Makes the model generate one token. Raises OSError; HTTPError if the answer is an error."""
        body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 1}).encode()
        self._get("/v1/completions", body, timeout_s)

    def json(self, path: str, request: dict[str, Any], *, timeout_s: float) -> Any:
        """Posts a request and returns the answer's JSON. Raises ServerError."""
        try:
            return json.loads(self._get(path, json.dumps(request).encode(), timeout_s))
        except urllib.error.HTTPError as error:
            text = error.read(2000).decode(errors="replace")
            raise ServerError(f"it answered {path} with {error.code} {text}".rstrip()) from error
        except (OSError, ValueError) as error:
            raise ServerError(f"it did not answer {path} ({error})") from error

    def activity(self, *, timeout_s: float) -> dict[str, float]:
        """Returns the gateway's `Activity.facts`. Raises OSError or ValueError."""
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


def _probe(asking: _Asking, spec: ServeSpec, plan: EnginePlan, events: SimpleQueue[Event]) -> None:
    """Requests one token from each model until it answers, compares the service with the trained model, then reports.

    Reports an error answer at once.
    """
    for model in [TUNED_MODEL, *([BASE_MODEL] if spec.base_model_dir else [])]:
        while True:
            try:
                asking.token_of(model, timeout_s=spec.start_timeout_s)
                break
            except urllib.error.HTTPError as error:
                if error.code != 503:  # 503: the engine is still starting
                    # A server error's text only points to the log, which has the cause.
                    text = error.read(2000).decode(errors="replace") if error.code < 500 else ""
                    answered = f"its model '{model}' answered its first request with {error.code} {text}"
                    events.put(ServerError(answered.rstrip()))
                    return
            except OSError:
                pass  # the engine does not accept connections yet
            time.sleep(_PROBE_EVERY_S)
    try:
        events.put(_Answered(_parity(asking, spec, plan)))
    except ServerError as error:
        events.put(error)
    except Exception as error:
        # Without an event the service would wait until start_timeout_s.
        events.put(
            ServerError(
                f"its comparison with the trained model failed ({type(error).__name__}: {error}); verify=False omits it"
            )
        )
        raise


def _parity(asking: _Asking, spec: ServeSpec, plan: EnginePlan) -> Parity | None:
    """Returns the comparison with the trained model; None if it is off or there is nothing to compare.

    Raises:
        ParityFailed: They differ, and `verify` is `error`.
        ServerError: The service does not answer the comparison's requests.
    """
    if spec.verify == "off":
        return None

    def ask(path: str, request: dict[str, Any]) -> Any:
        try:
            return asking.json(path, request, timeout_s=spec.start_timeout_s)
        except ServerError as error:
            raise ServerError(
                f"{error}. This was asked to compare it with the trained model: verify=False omits it"
            ) from error

    try:
        if re.search(r"--logprobs[-_]mode[ =]\S*logits", " ".join(spec.engine_args)):
            raise ServerError(
                "with logprobs-mode it returns logits, which cannot be compared with the trainer's log-probs: omit it, or set "
                "verify=False"
            )
        probe = read_probe(Path(spec.model_dir))
        if probe is None:
            return Parity(verdict="not verified", text="the model's folder has no probe.json")
        check = Check(
            probe=probe,
            service_name=spec.service_name,
            has_base=spec.base_model_dir is not None,
            dtype=plan.computes_in,
            quantised=any(re.match("--(quantization|kv[-_]cache[-_]dtype)|-q", one) for one in spec.engine_args),
            prompt_scores=plan.prompt_scores,
            max_model_len=spec.max_model_len,
            token_budget=_PARITY_TOKENS_ON_CPU if plan.on_cpu else Check.token_budget,
        )
        kind = VllmScores if plan.engine.name == "vllm" else OwnScores
        parity = compare(kind(ask), check)
    except ServerError as error:
        if spec.verify == "error":
            raise
        parity = Parity(verdict="not verified", text=str(error))
    logger.info("compared with the trained model: %s: %s", parity.verdict, parity.text)
    if parity.verdict == "different" and spec.verify == "error":
        raise refusal(parity)
    return parity


def _watch(asking: _Asking, spec: ServeSpec, events: SimpleQueue[Event], ended: threading.Event) -> None:
    """Polls the engine every few seconds, and reports once if it hangs or is idle.

    A busy engine is not a hung one. The gateway answers from an event loop that does no computing, so if it is silent, the
    process is stopped or stuck. If open requests make no progress, a one-token request decides: a working engine answers it
    between the others.
    """
    look_every_s = min(_LOOK_EVERY_S, spec.hang_after_s / 4)
    seen_at = time.monotonic()
    while not ended.wait(look_every_s):
        asked_at = time.monotonic()
        try:
            facts = asking.activity(timeout_s=spec.hang_after_s)
        except urllib.error.HTTPError:
            facts = {}  # an error answer (such as too many connections) shows that the process is alive
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
                    events.put(EngineHung(f"it generated no token within {limit_s:g} s ({error})"))
                    return


def _still_s(asking: _Asking, timeout_s: float) -> float:
    try:
        return asking.activity(timeout_s=timeout_s).get("still_s", 0.0)
    except (OSError, ValueError):
        return 0.0  # unknown: leave the decision to the next poll


class _Log:
    """Forwards the engine's output to stdout and keeps the last lines."""

    def __init__(self, output: IO[bytes]) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._output = output
        self._passing_on = True
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while line := self._output.readline(_LINE_BYTES):
            self._lines.append(line.decode(errors="replace").rstrip())
            if self._passing_on:
                try:
                    sys.stdout.buffer.write(line)
                    sys.stdout.buffer.flush()
                except OSError:
                    self._passing_on = (
                        False  # stdout is closed; keep reading, because a full pipe would block the engine
                    )

    def end_forwarding(self) -> None:
        """Forwards no more lines: vLLM reports its own end on request as errors with a traceback."""
        self._passing_on = False

    def finish(self) -> None:
        """Waits until all output of the ended engine is read."""
        self._reader.join(timeout=5.0)

    def lines(self) -> list[str]:
        """Returns the last lines that are not empty."""
        return [line for line in self._lines if line.strip()]
