"""Observes each request from its first byte to its last: counts it and writes one JSON line. Never a prompt, an answer or a token.

A line has only what Palate knows itself: names from fixed sets, numbers, and an id that the client may choose within limits.
"""

from __future__ import annotations

import re
import sys
from collections import deque
from collections.abc import Awaitable, Sequence
from datetime import UTC, datetime
from secrets import token_hex
from time import perf_counter
from typing import TYPE_CHECKING, Any

import orjson

from palate_recipes.specs.serve import ACTIVITY_PATH, GENERATION_PATHS, HEALTH_PATH, METRICS_PATH
from palate_server.metrics import METRICS, OTHER, Metrics

if TYPE_CHECKING:
    from palate_server.gateway import App, Message, Receive, Scope, Send
    from palate_server.routes import Lane

REQUEST_ID_HEADER = b"x-request-id"

_OWN_ID = re.compile(rb"[\w.:+/=@-]{1,128}")
_QUIET_PATHS = frozenset({HEALTH_PATH, METRICS_PATH, ACTIVITY_PATH})
"""Paths that programs poll: one line every few seconds would hide the others."""
_PATHS = (
    GENERATION_PATHS
    | _QUIET_PATHS
    | {"/v1/models", "/v1/embeddings", "/v1/score", "/tokenize", "/detokenize", "/version", "/ping", "/load"}
)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_PROBE_LABEL = "probe"
_LEFT_STATUS = 499
"""Status of a request whose client left before the answer began, as nginx logs it."""
_KEPT_PARTS = 4
"""The last parts of an answer that are kept. A stream tells its usage in the second last, before `[DONE]`."""


class RequestLog:
    """Writes lines to stdout, which is the service's log."""

    def __init__(self) -> None:
        self.is_on = False
        self._skipped: frozenset[str] = frozenset()

    def follow(self, engine_args: Sequence[str]) -> None:
        """Obeys vLLM's options for its access log, which this log replaces: no lines, or none for the paths that are named."""
        self.is_on = not re.search(r"--disable[-_]uvicorn[-_]access[-_]log", " ".join(engine_args))
        found = re.search(r"--disable[-_]access[-_]log[-_]for[-_]endpoints[= ](\S+)", " ".join(engine_args))
        self._skipped = frozenset(found[1].split(",")) if found else frozenset()

    def wants(self, path: str) -> bool:
        return self.is_on and path not in self._skipped

    def write(self, fields: dict[str, Any]) -> None:
        """Writes a line. Turns itself off if stdout is closed."""
        line = orjson.dumps(fields, option=orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE)
        try:
            # Not through the text layer: vLLM puts the name of its process before every line of that.
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        except (OSError, ValueError):
            self.is_on = False


REQUEST_LOG = RequestLog()


class Request:
    """One request while it is answered, with `receive` and `send` for the app in place of the server's.

    Attributes:
        model: The model in metrics and log: `default`, `base` or an adapter's name; set by the gateway.
        version: The version that answers; set by the gateway.
        is_probe: Whether the server program sent it.
        has_reached_engine: Set by the gateway. If not, it rejected the request or answered it itself.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, metrics: Metrics, log: RequestLog) -> None:
        self._began_at = perf_counter()
        self._receive = receive
        self._send = send
        self._metrics = metrics
        self._log = log
        self._first_at: float | None = None
        self._last_parts: deque[bytes] = deque(maxlen=_KEPT_PARTS)
        self._status = 0
        self._is_complete = self._is_left = False
        self.model = self.version = ""
        self.is_probe = False
        self.has_reached_engine = False

        given: list[bytes] = []
        for name, value in scope["headers"]:  # ASGI has names in lower case
            if name == REQUEST_ID_HEADER:
                given.append(value)
        path: str = scope["path"]
        if path.startswith("/v1/models/"):
            path = "/v1/models"
        self._path = path if path in _PATHS else OTHER
        self._is_quiet = path in _QUIET_PATHS
        self._method = scope["method"] if scope["method"] in _METHODS else OTHER
        self.scope: Scope = {**scope, "palate.request": self}
        if len(given) == 1 and _OWN_ID.fullmatch(given[0]):
            self._id = given[0]
        else:
            self._id = token_hex(8).encode()
            kept = scope["headers"]
            if given:
                kept = [(name, value) for name, value in kept if name != REQUEST_ID_HEADER]
            # The engine gets it too: vLLM makes the id of its answer from it.
            self.scope["headers"] = [*kept, (REQUEST_ID_HEADER, self._id)]

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._is_complete:
            self._is_left = True
        return message

    def send(self, message: Message) -> Awaitable[None]:
        # Returns the server's awaitable instead of awaiting it, as the gateway does for each part of a stream.
        if message["type"] == "http.response.body":
            if body := message.get("body"):
                self._last_parts.append(body)
                if self._first_at is None:
                    self._first_at = perf_counter()
            if not message.get("more_body"):
                self._is_complete = True
        elif message["type"] == "http.response.start":
            self._status = message["status"]
            headers = message.get("headers", ())
            if REQUEST_ID_HEADER not in [name for name, _ in headers]:
                message = {**message, "headers": [*headers, (REQUEST_ID_HEADER, self._id)]}
        return self._send(message)

    def mark_probe(self) -> None:
        """Says that the server program sent it: such requests are counted apart."""
        self.is_probe = True
        self._path = _PROBE_LABEL
        if not self._is_quiet:
            self._is_quiet = True
            self._metrics.open -= 1

    def of(self, lane: Lane | None) -> None:
        """Says which model it asks; None: one that the service does not have."""
        if lane is None:
            self.model = OTHER
        else:
            self.model, self.version = lane.label, lane.version

    def begin(self) -> None:
        if not self._is_quiet:
            self._metrics.open += 1

    def end(self, *, has_failed: bool) -> None:
        """Counts the request and writes its line."""
        seconds = perf_counter() - self._began_at
        metrics = self._metrics
        left = self._is_left or not (self._is_complete or has_failed)
        status = 500 if has_failed else self._status or _LEFT_STATUS
        if not self._is_quiet:
            metrics.open -= 1
        metrics.requests[self._path, self.model, str(status)] += 1
        if self.version and not self.is_probe:
            metrics.versions[self.version, str(status)] += 1
        if not self.has_reached_engine and self._status >= 400:
            metrics.reject(self._status)
        if self._is_quiet and status < 400:
            return
        if left:
            metrics.disconnects += 1
        to_first = None if self._first_at is None else self._first_at - self._began_at
        metrics.durations[self._path].add(seconds)
        if to_first is not None:
            metrics.first_bytes[self._path].add(to_first)
        prompt, completion = self._usage() if status < 400 else (None, None)
        if prompt is not None:
            metrics.prompt_tokens[self.model] += prompt
        if completion is not None:
            metrics.completion_tokens[self.model] += completion
        if self._log.wants(self.scope["path"]):
            self._log.write(
                {
                    "time": datetime.now(UTC),
                    "id": self._id.decode(),
                    "method": self._method,
                    "path": self._path,
                    "model": self.model,
                    "status": status,
                    "prompt_tokens": prompt,
                    "completion_tokens": completion,
                    "ms": round(1000 * seconds, 1),
                    "first_byte_ms": None if to_first is None else round(1000 * to_first, 1),
                    "client_disconnected": left,
                }
            )

    def _usage(self) -> tuple[int | None, int | None]:
        if self._path not in GENERATION_PATHS or not self.has_reached_engine:
            return None, None
        return usage_in(b"".join(self._last_parts))


_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,12})\b')
_COMPLETION = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,12})\b')
_USAGE_BYTES = 2000
_USAGE_TRIES = 3


def usage_in(answer: bytes) -> tuple[int | None, int | None]:
    """Returns the prompt and completion tokens that the end of an answer tells, without parsing it: it may have megabytes.

    A text with these words cannot be taken for the field: within a JSON string, its quotes are escaped.
    """
    end = len(answer)
    for _ in range(_USAGE_TRIES):
        end = answer.rfind(b'"usage"', 0, end)
        if end < 0:
            break
        if _USAGE.match(answer, end):
            told = answer[end : end + _USAGE_BYTES]
            prompt, completion = _PROMPT.search(told), _COMPLETION.search(told)
            return prompt and int(prompt[1]), completion and int(completion[1])
    return None, None


def request_of(scope: Scope) -> Request:
    """Returns the request that the scope belongs to."""
    request: Request = scope["palate.request"]
    return request


async def observed(
    app: App,
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    metrics: Metrics = METRICS,
    log: RequestLog = REQUEST_LOG,
) -> None:
    """Calls the app for one HTTP request and observes it."""
    request = Request(scope, receive, send, metrics, log)
    request.begin()
    has_failed = True
    try:
        await app(request.scope, request.receive, request.send)
        has_failed = False
    finally:
        request.end(has_failed=has_failed)
