"""ASGI app that forwards a request to an engine and its answer back, byte for byte. Knows HTTP, no model.

An engine listens on a Unix socket in a private folder: no other user can reach it, so it needs no token. A request that an engine
did not begin to answer, because it was killed, goes to another one: it has changed nothing, since engines keep no state of theirs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from typing import Any

import aiohttp
from yarl import URL

from palate_server.routes import Answering, Lane, Routes

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LANE = "palate.lane"
"""Key of the scope: the lane that the gateway has chosen."""

WAIT_FOR_ENGINE_S = 60.0
"""How long a request waits while every engine of its lane is being started again."""
_LOOK_EVERY_S = 0.1
_TRIES = 3
_SUSPECT_S = 5.0
"""An engine that broke off a request gets it again only if it still takes requests after this time."""
_RETRY_AFTER_S = 5
_KEPT_S = 2.0
"""How long an idle connection to an engine may be used again. The engines' web servers close theirs after 5 s: a request that is
sent just then would be lost."""
_LATE_S = 0.5
"""If a client took longer to accept a part of its answer, the engine may have ended the answer long ago, and its time runs from
then: the connection is not used again."""

_WITHOUT_MODEL = frozenset({"/tokenize", "/detokenize"})
"""What vLLM's web server answers while its model hangs."""

_HOP_BY_HOP = frozenset({
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te", b"trailer",
    b"transfer-encoding", b"upgrade",
})  # fmt: skip
_NOT_SENT = _HOP_BY_HOP | {b"authorization", b"content-length", b"expect"}
"""The service's tokens stay in the front. The length is that of the body as it is sent."""
_SAGEMAKER = b"x-amzn-sagemaker"
"""vLLM takes the model's name from such headers."""
_NOT_RETURNED = _HOP_BY_HOP | {b"date", b"server"}
"""The front's own server adds them."""
_NOT_ADDED = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
"""Headers that the client library would add to a request without them."""


class NoEngine(Exception):
    """No engine can take the request now."""


class Proxy:
    """The app behind the gateway. Used in one event loop."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        lane = scope.get(LANE) or self._routes.any_lane()
        if lane is None:
            await self._unavailable(send, "The service is starting")
            return
        lane.open += 1
        try:
            body = await _body(receive)
            if body is not None:
                await self._answer(lane, scope, body, receive, send)
        finally:
            lane.open -= 1

    async def _answer(self, lane: Lane, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Forwards, and gives up when the client leaves, so that the engine stops to generate."""
        forwarding = asyncio.ensure_future(self._with_retries(lane, scope, body, send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({forwarding, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if forwarding.done():
                forwarding.result()
        finally:
            for task in (forwarding, leaving):
                task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await forwarding

    async def _with_retries(self, lane: Lane, scope: Scope, body: bytes, send: Send) -> None:
        generates = scope["method"] == "POST"
        failed: list[Answering] = []
        written = 0
        while len(failed) < _TRIES:
            try:
                engine = await self._engine(lane, failed, waits=generates)
            except NoEngine as error:
                await self._unavailable(send, str(error))
                return
            answer = _Answer(send, engine if generates and scope["path"] not in _WITHOUT_MODEL else None)
            if generates:
                _begin(engine)
            try:
                await self._forward(engine, scope, body, answer)
                return
            except (aiohttp.ClientError, OSError) as error:
                logger.warning("engine %s did not answer a request: %s", engine.name, error or type(error).__name__)
                if answer.has_begun:
                    await answer.break_off(engine.name)
                    return
                failed.append(engine)
                # A request that ends every engine which reads it must not go on to all of them.
                written += not isinstance(error, aiohttp.ClientConnectorError)
                if written > 1:
                    break
            finally:
                if generates:
                    _end(engine)
        await self._unavailable(send, "The service's engines ended while they answered this request")

    async def _engine(self, lane: Lane, failed: Sequence[Answering], *, waits: bool) -> Answering:
        """Returns an engine; waits for one that is being started. Raises NoEngine."""
        if (engine := lane.engine(without=failed)) is not None:
            return engine
        if not waits:
            raise NoEngine("The service has no engine now")
        began = time.monotonic()
        self._routes.waiting += 1
        try:
            while lane.wakes or time.monotonic() < began + WAIT_FOR_ENGINE_S:
                await asyncio.sleep(_LOOK_EVERY_S)
                # One that failed has usually ended, and the service sees that a moment later.
                is_trusted = time.monotonic() > began + _SUSPECT_S
                if (engine := lane.engine(without=() if is_trusted else failed)) is not None:
                    return engine
        finally:
            self._routes.waiting -= 1
        raise NoEngine("The service's engine is being started again")

    async def _forward(self, engine: Answering, scope: Scope, body: bytes, answer: _Answer) -> None:
        # The path as the gateway has checked it: one without escapes.
        query = scope["query_string"].decode("latin-1")
        url = URL.build(scheme="http", host="engine", path=scope["path"], query_string=query, encoded=True)
        headers = [
            (k.decode("latin-1"), v.decode("latin-1"))
            for k, v in scope["headers"]
            if k not in _NOT_SENT and not k.startswith(_SAGEMAKER)
        ]
        async with self._session(engine).request(
            scope["method"],
            url,
            data=body or None,
            headers=headers,
            allow_redirects=False,
            skip_auto_headers=_NOT_ADDED,
        ) as response:
            await answer.start(
                response.status, [(k.lower(), v) for k, v in response.raw_headers if k.lower() not in _NOT_RETURNED]
            )
            async for part in response.content.iter_any():
                given_at = time.monotonic()
                await answer.part(part)
                # None: the answer has arrived to its end, so the engine's time runs from a moment ago.
                if (connection := response.connection) is not None and time.monotonic() - given_at > _LATE_S:
                    assert connection.protocol is not None
                    connection.protocol.force_close()
            await answer.end()

    def _session(self, engine: Answering) -> aiohttp.ClientSession:
        session = self._sessions.get(engine.socket)
        if session is None:
            # Used again while requests follow each other: a new one costs the front and the engine 0.2 ms before the first token.
            connector = aiohttp.UnixConnector(engine.socket, limit=0, keepalive_timeout=_KEPT_S)
            session = self._sessions[engine.socket] = aiohttp.ClientSession(
                connector=connector,
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
            )
        return session

    async def forget(self, socket: str) -> None:
        """Drops what is kept for an engine that has ended."""
        if (session := self._sessions.pop(socket, None)) is not None:
            await session.close()

    async def close(self) -> None:
        for socket in list(self._sessions):
            await self.forget(socket)

    async def _unavailable(self, send: Send, message: str) -> None:
        said = {"message": f"{message}. Try again.", "type": "ServiceUnavailableError", "param": None, "code": 503}
        body = json.dumps({"error": said}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"retry-after", str(_RETRY_AFTER_S).encode()),
        ]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class _Answer:
    """What the client has got of an answer."""

    def __init__(self, send: Send, engine: Answering | None) -> None:
        self._send = send
        # None: a health check and an error are no progress, they would hide an engine that no longer generates.
        self._engine = engine
        self._streams_events = False
        self.has_begun = False

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._streams_events = any(k == b"content-type" and v.startswith(b"text/event-stream") for k, v in headers)
        self.has_begun = True
        if status >= 400:
            self._engine = None
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    def part(self, data: bytes) -> Awaitable[None]:
        if self._engine is not None:
            self._engine.moved_at = time.monotonic()
        return self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        if self._engine is not None:
            self._engine.moved_at = time.monotonic()
        await self._send({"type": "http.response.body", "body": b""})

    async def break_off(self, engine: str) -> None:
        """Tells a client whose answer cannot be completed. Clients of OpenAI raise the error in an event."""
        if not self._streams_events:
            raise ConnectionAbortedError(f"engine {engine} ended within an answer")
        message = "The engine ended within this answer. Send the request again."
        error = {"error": {"message": message, "type": "InternalServerError", "param": None, "code": 502}}
        text = f"\n\ndata: {json.dumps(error)}\n\n".encode()
        await self._send({"type": "http.response.body", "body": text})


def _begin(engine: Answering) -> None:
    if not engine.open:
        # A new request is no progress: clients that leave one after the other would hide an engine that hangs.
        engine.waits_from = time.monotonic() - engine.still_s
    engine.open += 1


def _end(engine: Answering) -> None:
    engine.open -= 1
    if not engine.open:
        engine.still_s = time.monotonic() - max(engine.moved_at, engine.waits_from)


async def _body(receive: Receive) -> bytes | None:
    """Returns the whole body, which the gateway has limited; None if the client has left."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
