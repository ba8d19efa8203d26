"""The same front for every engine: token, model names, model list. A plain ASGI middleware; knows no engine and no framework.

An engine constructs it as `Front(app)` in its own process; what to serve then comes from the spec file that the environment
variable `PALATE_SERVE_SPEC` names, the token from `PALATE_ACCESS_TOKEN`. Everything but `GET /health` needs the token.
Each JSON request is made to name one of the service's models: aliases become the engine's names, a missing name becomes the
tuned model (vLLM would take the base model), an unknown one is answered with 404. Responses pass through untouched.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

from palate_server.spec import TOKEN_VARIABLE, TUNED_MODEL, ServeSpec

SPEC_VARIABLE = "PALATE_SERVE_SPEC"
HEALTH_PATH = "/health"

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]


class Front:
    """ASGI middleware around an OpenAI-compatible app that knows the models `default` and maybe `base`."""

    def __init__(self, app: App, *, spec: ServeSpec | None = None, token: str | None = None) -> None:
        """Wraps the app; spec and token come from the environment unless they are given."""
        self._app = app
        spec = spec or ServeSpec.read(Path(os.environ[SPEC_VARIABLE]))
        self._token = (token or os.environ[TOKEN_VARIABLE]).encode()
        self._engine_names = {name: TUNED_MODEL if name == spec.service_name else name for name in spec.models}
        created = int(time.time())
        self._cards = {
            name: {"id": name, "object": "model", "created": created, "owned_by": "palate", "root": target}
            for name, target in self._engine_names.items()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        is_http = scope["type"] == "http"
        method = scope["method"] if is_http else "GET"
        path: str = scope["path"]
        if is_http and method == "GET" and path == HEALTH_PATH:
            await self._app(scope, receive, send)
        elif not self._has_token(scope["headers"]):
            await (_refuse(send) if is_http else send({"type": "websocket.close", "code": 1008}))
        elif is_http and path == "/v1/models":
            await _answer(send, 200, {"object": "list", "data": list(self._cards.values())})
        elif is_http and path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")
            if name in self._cards:
                await _answer(send, 200, self._cards[name])
            else:
                await self._unknown(send, name)
        elif is_http and method == "POST" and _is_json(scope["headers"]):
            await self._named(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _has_token(self, headers: Headers) -> bool:
        scheme, _, given = _header(headers, b"authorization").partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(given.strip(), self._token)

    async def _named(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a JSON request on with the engine's name for the model that it asks for."""
        body = await _body(receive)
        if body is None:
            return
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            request = None  # the engine words its own complaint
        if isinstance(request, dict):
            wanted = request.get("model") or TUNED_MODEL
            target = self._engine_names.get(wanted) if isinstance(wanted, str) else None
            if target is None:
                await self._unknown(send, wanted)
                return
            if request.get("model") != target:
                body = json.dumps({**request, "model": target}).encode()
                scope = {**scope, "headers": _with_length(scope["headers"], len(body))}
        await self._app(scope, _replay(body, receive), send)

    async def _unknown(self, send: Send, wanted: object) -> None:
        message = f"The model `{wanted}` does not exist. This service has: {', '.join(self._engine_names)}."
        await _answer(send, 404, error_body(message, kind="NotFoundError", param="model", code=404))


def error_body(message: str, *, kind: str, param: str | None, code: int | str) -> dict[str, Any]:
    """Returns an error as OpenAI clients and vLLM word it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _refuse(send: Send) -> None:
    message = "The request carries no valid token. Send the service's token as `Authorization: Bearer TOKEN`."
    error = error_body(message, kind="invalid_request_error", param=None, code="invalid_api_key")
    await _answer(send, 401, error, (b"www-authenticate", b"Bearer"))


async def _answer(send: Send, status: int, content: object, *headers: tuple[bytes, bytes]) -> None:
    body = json.dumps(content).encode()
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})


async def _body(receive: Receive) -> bytes | None:
    """Returns the whole request body, or None when the client left before its end."""
    parts: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Returns a receive that gives the body once and then what the server says, so that a disconnect still arrives."""
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
    # A body of known length is no longer chunked.
    kept = [(k, v) for k, v in headers if k.lower() not in {b"content-length", b"transfer-encoding"}]
    return [*kept, (b"content-length", str(length).encode())]
