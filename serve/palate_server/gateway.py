"""ASGI middleware in front of all engines: token, limits, model names and list, error format. Knows no engine.

Every request except `GET /health` needs a token. In JSON requests the gateway resolves the model to a lane (see `routes`): an alias
becomes the engine's name, a missing name becomes the tuned model (vLLM would use the base model), an unknown name is answered with
404. Answers pass through unchanged. Errors in another format are converted to OpenAI's.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any

from palate_recipes.specs.serve import (
    BODY_LIMIT_BYTES,
    CHALLENGE_HEADER,
    HEALTH_PATH,
    METRICS_PATH,
    TUNED_MODEL,
    VERSION_HEADER,
    ServeSpec,
)
from palate_server.access import RETRY_S, Access, Holder, TooMany, drained
from palate_server.metrics import METRICS, EnginePages, Metrics, answer_metrics
from palate_server.parity import PRIVATE_PATHS
from palate_server.proxy import LANE
from palate_server.request_log import REQUEST_LOG, RequestLog, observed, request_of
from palate_server.routes import Parameters, Routes, unchanged

BODIES_LIMIT_BYTES = 8 * BODY_LIMIT_BYTES
"""Limit of all bodies in memory together."""

_ERROR_LIMIT_BYTES = 64 * 1024
"""Errors up to this size are converted to OpenAI's format. Longer ones pass through."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]


class Activity:
    """Tracks requests, for the decision whether the service is idle."""

    def __init__(self) -> None:
        self._answering = 0
        self._asked_at = time.monotonic()

    def begin(self) -> None:
        """Reports that a request has begun."""
        self._answering += 1

    def end(self) -> None:
        """Reports that a request has ended."""
        self._answering -= 1
        self._asked_at = time.monotonic()

    def restart(self) -> None:
        """Counts the time without a request from now."""
        self._asked_at = time.monotonic()

    @property
    def open(self) -> int:
        """Open requests."""
        return self._answering

    @property
    def idle_s(self) -> float:
        """Seconds without a request; 0 while one is open."""
        return 0.0 if self._answering else time.monotonic() - self._asked_at


_ENGINES_OWN = re.compile(
    r"/+(v1/+(un)?load_lora_adapter|adapters(/.*)?|palate/+activity|invocations|scale_elastic_ep|reset|load_model)/*"
)
"""Paths of engines that are not for users: they load adapters from any folder (`/adapters` is vLLM's second name for that, after
SageMaker's), resize or reload the engine, or take the model's name from a header."""

_PLAIN = re.compile(r"/[A-Za-z0-9/_.:~-]*")
"""Paths that are forwarded. An engine's router could read any other one differently than the checks here: its patterns match before
a line break, and libraries disagree about escapes and fragments."""

_WITHOUT_V1 = ("/chat/completions", "/completions", "/models", "/responses", "/embeddings")
"""Where OpenAI's clients ask if their base_url lacks /v1."""


class Gateway:
    """ASGI middleware around an OpenAI-compatible app that serves the models `default` and, for adapters, `base`."""

    def __init__(
        self,
        app: App,
        *,
        service_name: str,
        routes: Routes,
        access: Access,
        activity: Activity | None = None,
        metrics: Metrics = METRICS,
        log: RequestLog = REQUEST_LOG,
    ) -> None:
        """Wraps the app.

        Args:
            app: What forwards requests to engines. It finds the chosen lane in the scope, under `proxy.LANE`.
            service_name: The service's name.
            routes: The models and where they are.
            access: The tokens.
            activity: Where requests are counted.
            metrics: What `/metrics` shows.
            log: The request log.
        """
        self._app = app
        self._routes = routes
        self._access = access
        self._activity = activity or Activity()
        self._held_bytes = 0
        self._service_name = service_name
        self._metrics = metrics
        self._log = log
        self._engine_pages = EnginePages(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        await observed(self._observed_http, scope, receive, send, metrics=self._metrics, log=self._log)

    async def _observed_http(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path, headers = scope["method"], scope["path"], scope["headers"]
        # Health is public: container engines and load balancers have no token.
        if method == "GET" and path == HEALTH_PATH:
            if challenge := _header(headers, CHALLENGE_HEADER.encode()):
                await self._prove(scope, challenge.decode("latin-1"), send)
            elif self._routes.is_asleep:  # a health check does not wake it
                await _answer(send, 200, {})
            else:
                await self._pass_on(scope, _without_body(receive), send)
        elif (holder := self._holder(headers)) is None:
            await _refuse(send)
        elif _ENGINES_OWN.fullmatch(path):
            await _complain(send, 404, f"No such path {path}.", headers=[_CLOSE])
        elif holder.is_program:
            request_of(scope).mark_probe()
            await self._within_limits(holder, scope, receive, send)
        elif method in _READING and (too_many := holder.read()) is not None:
            await _refuse_for_now(send, too_many, keep=await drained(receive))
        # Answered here, not by the engine: it does not know the aliases.
        elif path == "/v1/models" or path.startswith("/v1/models/"):
            await self._models(method, path, send)
        elif path in PRIVATE_PATHS:
            await _complain(send, 404, f"No such path {path}.", headers=[_CLOSE])
        elif path in _WITHOUT_V1:
            await _complain(send, 404, f"No such path {path}: it is /v1{path}. A client's base_url ends with /v1.")
        elif path == METRICS_PATH and method in {"GET", "HEAD"}:
            await answer_metrics(self._metrics, self._service_name, self._routes, self._engine_pages, send)
        elif not _is_plain(scope):
            await _complain(send, 404, f"No such path {path[:200]!r}.", headers=[_CLOSE])
        elif method in _READING:
            await self._pass_on(scope, _without_body(receive), send)
        else:
            await self._within_limits(holder, scope, receive, send)

    async def _within_limits(self, holder: Holder, scope: Scope, receive: Receive, send: Send) -> None:
        """Forwards a request with a body. It is open until it has ended, or its client has disconnected."""
        if (too_many := holder.enter()) is not None:
            await _refuse_for_now(send, too_many, keep=await drained(receive))
            return
        try:
            await self._post(holder, scope, receive, send)
        finally:
            holder.leave()

    def _holder(self, headers: Headers) -> Holder | None:
        """Returns whose token the request has."""
        given = _header(headers, b"authorization").strip()
        scheme, _, rest = given.partition(b" ")
        if scheme.lower() == b"bearer":  # PAI EAS expects the token alone, and scripts for it send that
            given = rest.strip()
        return self._access.holder(given)

    async def _prove(self, scope: Scope, challenge: str, send: Send) -> None:
        """Proves to a client that this service knows its token, before the client sends it.

        The proof covers the port, so that another process cannot relay the challenge to the real service.
        """
        if not re.fullmatch(r"[0-9a-f]{32,128}", challenge):
            await _complain(send, 400, f"Header {CHALLENGE_HEADER}: expected 32 to 128 hexadecimal digits.")
            return
        port = (scope.get("server") or ("", 0))[1]
        await _answer(send, 200, self._access.proofs(challenge, port=port))

    async def _models(self, method: str, path: str, send: Send) -> None:
        name = path.removeprefix("/v1/models").removeprefix("/")
        if method not in {"GET", "HEAD"}:
            message = f"Method {method} is not allowed for {path}. Use GET."
            await _complain(send, 405, message, headers=[(b"allow", b"GET, HEAD"), _CLOSE])
        elif not name:
            cards = [self._routes.card(one) for one in self._routes.names()]
            await _answer(send, 200, {"object": "list", "data": [card for card in cards if card]})
        elif (card := self._routes.card(name)) is not None:
            await _answer(send, 200, card)
        else:
            await self._unknown(send, name)

    async def _post(self, holder: Holder, scope: Scope, receive: Receive, send: Send) -> None:
        """Forwards a request with a body. In a JSON body, replaces the model by the engine's name for it."""
        body = _Body(receive, lambda size: self._hold(holder, size))
        try:
            content = await body.whole(claimed=_header(scope["headers"], b"content-length"))
            if content is None:
                return
            if _is_json(scope["headers"]):
                try:
                    named = await self._named(scope, content, send)
                except RecursionError:  # what could just be read can be nested too deeply to be written
                    raise Refused(400, "The request's JSON is nested too deeply.") from None
                if named is None:
                    return
                scope, content = named
            await self._counted(scope, _replay(content, receive), send)
        except _ForNow as refused:
            await _refuse_for_now(
                send, refused.too_many, status=refused.status, keep=body.is_read or await drained(receive)
            )
        except Refused as refused:
            # A request with a bad parameter was read to the end: the connection stays usable.
            await _complain(
                send, refused.status, str(refused), param=refused.param, headers=[] if refused.param else [_CLOSE]
            )
        finally:
            # Also after a refusal or a disconnect: the sum must return to 0, or the service would refuse all requests.
            self._held_bytes -= body.size
            holder.usage.held_bytes -= body.size

    async def _named(self, scope: Scope, content: bytes, send: Send) -> tuple[Scope, bytes] | None:
        """Returns the request to forward, or None if the model is unknown (then the 404 is already sent).

        Raises:
            Refused: A model that is no text, or a parameter that the engine does not support.
        """
        try:
            request = json.loads(content)
        except (ValueError, RecursionError):
            request = None  # forward invalid JSON, so that the engine reports it
        if isinstance(request, dict):
            wanted = TUNED_MODEL if request.get("model") in (None, "") else request["model"]
            if not isinstance(wanted, str):
                raise Refused(400, f"model={json.dumps(wanted)[:100]} is invalid: expected a name.", param="model")
            asked = request_of(scope)
            version = _header(scope["headers"], _VERSION).decode("latin-1") if asked.is_probe else ""
            lane = self._routes.lane(wanted, version=version)
            asked.of(lane)
            if lane is None and not self._routes.names():  # the service is starting
                return scope, content
            if lane is None:
                await self._unknown(send, wanted)
                return None
            scope = {**scope, LANE: lane}
            wanted_request = {**lane.parameters(scope["path"], request), "model": lane.model}
            if wanted_request != request:  # an unchanged body is forwarded byte for byte
                content = json.dumps(wanted_request).encode()
                scope = {**scope, "headers": _with_length(scope["headers"], len(content))}
        return scope, content

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forwards a request and records it as activity."""
        if request_of(scope).is_probe:  # the server program's own requests must not keep an idle service alive
            await self._pass_on(scope, receive, send)
            return
        self._activity.begin()
        try:
            await self._pass_on(scope, receive, send)
        finally:
            self._activity.end()

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_of(scope).has_reached_engine = True
        answer = _Answer(send, has_body=scope["method"] != "HEAD")
        try:
            await self._app(scope, receive, answer.send)
        except Exception:
            if not answer.started:
                await _complain(send, 500, "Internal error of the engine. See the service's log.")
            raise  # uvicorn logs the traceback
        await answer.finish()

    async def _unknown(self, send: Send, wanted: object) -> None:
        message = (
            f"The model `{str(wanted)[:200]}` does not exist. This service has: {', '.join(self._routes.names())}."
        )
        await _complain(send, 404, message, param="model")

    def _hold(self, holder: Holder, size: int) -> None:
        """Adds to the bytes that bodies hold. Raises _ForNow if they are over the token's share or over the limit of all."""
        self._held_bytes += size
        if (too_many := holder.hold(size)) is not None:
            raise _ForNow(429, too_many)
        if self._held_bytes > BODIES_LIMIT_BYTES:
            message = f"The bodies of all open requests exceed {BODIES_LIMIT_BYTES} bytes. Try again later."
            raise _ForNow(503, TooMany(message=message, retry_after_s=RETRY_S))


def calls_need_a_parser(spec: ServeSpec) -> Parameters:
    """Returns the check that rejects tools if nothing reads tool calls out of the model's text."""
    if any(re.match("--tool[-_]call[-_]parser", argument) for argument in spec.engine_args):
        return unchanged

    def check(path: str, request: dict[str, Any]) -> dict[str, Any]:
        wants_calls = path == "/v1/chat/completions" and request.get("tools")
        if wants_calls and request.get("tool_choice", "auto") == "auto":
            raise Refused(
                400,
                "This service reads no tool calls: no parser is known for the model's chat template. If it was trained to "
                "call tools, deploy it with the parser of its format: palate deploy ... --engine-arg tool-call-parser=NAME "
                "(hermes, llama3_json, mistral, ...). Otherwise omit tools.",
                param="tools",
            )
        return request

    return check


def error_body(message: str, *, kind: str, param: str | None, code: int | str) -> dict[str, Any]:
    """Returns an error in the format of OpenAI and vLLM."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_kind(status: int) -> str:
    """Returns vLLM's error type for an HTTP status, such as `NotFoundError`."""
    if status in _KINDS:
        return _KINDS[status]
    try:
        return HTTPStatus(status).phrase.replace(" ", "").replace("-", "") + "Error"
    except ValueError:
        return "BadRequestError" if status < 500 else "InternalServerError"


_KINDS = {
    400: "BadRequestError",
    401: "invalid_request_error",
    404: "NotFoundError",
    422: "UnprocessableEntityError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
_VERSION = VERSION_HEADER.encode()
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods without a body, which make the engine generate nothing."""
_CLOSE = (b"connection", b"close")
"""Sent if the body was not read to the end: the server would parse the rest as the next request."""


class Refused(Exception):
    """Rejects a request with an HTTP status, and with the name of the parameter at fault."""

    def __init__(self, status: int, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


class _ForNow(Exception):
    """Rejects a request that may be accepted a moment later."""

    def __init__(self, status: int, too_many: TooMany) -> None:
        super().__init__(too_many.message)
        self.status = status
        self.too_many = too_many


class _Body:
    """Reads a request's body within the size limits.

    Attributes:
        size: Bytes so far.
        is_read: Whether it was read to its end.
    """

    def __init__(self, receive: Receive, hold: Callable[[int], None]) -> None:
        self._receive = receive
        self._hold = hold
        self.size = 0
        self.is_read = False

    async def whole(self, *, claimed: bytes) -> bytes | None:
        """Returns the full body, or None if the client disconnected first.

        Args:
            claimed: The Content-Length header. A value over the limit is rejected before reading.

        Raises:
            Refused: The body is too large.
            _ForNow: It is too large together with those of other requests.
        """
        # 20 digits are enough to exceed the limit. Python refuses to parse numbers of several thousand digits.
        if claimed.isdigit() and int(claimed[:20]) > BODY_LIMIT_BYTES:
            raise _too_large()
        parts: list[bytes] = []
        while not self.is_read:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return None
            self.is_read = not message.get("more_body", False)
            part = message.get("body", b"")
            if self.size + len(part) > BODY_LIMIT_BYTES:
                raise _too_large()
            parts.append(part)
            self.size += len(part)
            self._hold(len(part))
        return b"".join(parts)


def _too_large() -> Refused:
    return Refused(413, f"The request's body is larger than {BODY_LIMIT_BYTES} bytes. Send a smaller request.")


class _Answer:
    """Forwards an app's answer as it arrives. Buffers an error until it is complete, to convert it to OpenAI's format."""

    def __init__(self, send: Send, *, has_body: bool) -> None:
        self._send = send
        self._has_body = has_body
        self._held: Message | None = None
        self._content = b""
        self.started = False

    def send(self, message: Message) -> Awaitable[None]:
        # Returns the app's awaitable instead of awaiting it: a coroutine per streamed chunk costs as much as the chunk.
        return self._send(message) if self.started else self._begin(message)

    async def _begin(self, message: Message) -> None:
        if self._held is None:
            if message["type"] == "http.response.start" and message["status"] >= 400 and self._has_body:
                self._held = message
                return
            self.started = True
            await self._send(message)
            return
        self._content += message.get("body", b"")
        if not message.get("more_body", False) or len(self._content) > _ERROR_LIMIT_BYTES:
            await self._release(more=message.get("more_body", False))

    async def finish(self) -> None:
        """Sends a buffered error."""
        if self._held is not None:
            await self._release(more=False)

    async def _release(self, *, more: bool) -> None:
        assert self._held is not None
        start, content, self._held = self._held, self._content, None
        if not more:  # only a complete body can be parsed
            content = in_openai_form(start["status"], content)
            kept = [(k, v) for k, v in _with_length(start["headers"], len(content)) if k.lower() != b"content-type"]
            start = {**start, "headers": [*kept, (b"content-type", b"application/json")]}
        self.started = True
        await self._send(start)
        await self._send({"type": "http.response.body", "body": content, "more_body": more})


def in_openai_form(status: int, content: bytes) -> bytes:
    """Converts an error's body to OpenAI's format. A body in that format is returned unchanged."""
    try:
        said = json.loads(content)
    except ValueError:
        said = content.decode(errors="replace").strip()
    if isinstance(said, dict):
        error = said.get("error")
        if isinstance(error, dict) and "message" in error:
            return content
        said = error or said.get("detail") or said.get("message") or said.get("reason") or said
    param = None
    if isinstance(said, list):  # pydantic's list of validation errors
        places = [".".join(str(part) for part in item.get("loc", ())[1:]) for item in said if isinstance(item, dict)]
        param = next(filter(None, places), None)
        said = "; ".join(
            f"{place}: {item.get('msg', item)}" if place else str(item.get("msg", item))
            for place, item in zip(places, (item for item in said if isinstance(item, dict)), strict=True)
        )
    message = said if isinstance(said, str) and said else json.dumps(said) if said else _phrase(status)
    return json.dumps(error_body(message, kind=error_kind(status), param=param, code=status)).encode()


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"status {status}"


async def _refuse(send: Send) -> None:
    message = "The request has no valid token. Send the service's token as `Authorization: Bearer TOKEN`."
    error = error_body(message, kind=error_kind(401), param=None, code="invalid_api_key")
    await _answer(send, 401, error, (b"www-authenticate", b"Bearer"), _CLOSE)


async def _refuse_for_now(send: Send, too_many: TooMany, *, keep: bool, status: int = 429) -> None:
    """Answers 429 or 503. Without `keep` the connection is closed, because the body was not read to the end."""
    code: int | str = "rate_limit_exceeded" if status == 429 else status
    error = error_body(too_many.message, kind=error_kind(status), param=None, code=code)
    retry_after = (b"retry-after", str(too_many.retry_after_s).encode())
    await _answer(send, status, error, retry_after, *([] if keep else [_CLOSE]))


async def _complain(
    send: Send, status: int, message: str, *, param: str | None = None, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    await _answer(send, status, error_body(message, kind=error_kind(status), param=param, code=status), *headers)


async def _answer(send: Send, status: int, content: object, *headers: tuple[bytes, bytes]) -> None:
    body = json.dumps(content).encode()
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})


def _is_plain(scope: Scope) -> bool:
    path: str = scope["path"]
    return bool(_PLAIN.fullmatch(path)) and scope.get("raw_path", path.encode()) == path.encode()


def _without_body(receive: Receive) -> Receive:
    """Returns a receive for a request whose method has no body: whatever its client sends is dropped as it comes."""
    given = False

    async def empty() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": b"", "more_body": False}
        message = await receive()
        return message if message["type"] == "http.disconnect" else {**message, "body": b""}

    return empty


def _replay(body: bytes, receive: Receive) -> Receive:
    """Returns a receive that yields the body once and then forwards to the server, so that a disconnect still arrives."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _header(headers: Headers, name: bytes) -> bytes:
    return next((value for key, value in headers if key.lower() == name), b"")


def _is_json(headers: Headers) -> bool:
    content_type = _header(headers, b"content-type").lower()
    return not content_type or b"json" in content_type


def _with_length(headers: Headers, length: int) -> list[tuple[bytes, bytes]]:
    # Transfer-Encoding must go: a message must not have both headers.
    kept = [(k, v) for k, v in headers if k.lower() not in {b"content-length", b"transfer-encoding"}]
    return [*kept, (b"content-length", str(length).encode())]
