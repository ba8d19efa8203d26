"""The service's public end: an HTTP server with limits per connection, in a thread. Knows uvicorn, no engine."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine
from http import HTTPStatus
from typing import Any

import uvicorn

from palate_recipes.specs.serve import (
    BODY_LIMIT_BYTES,
    BODY_TIMEOUT_S,
    CONNECTIONS_LIMIT,
    HEAD_LIMIT_BYTES,
    HEAD_TIMEOUT_S,
    PIPELINED_LIMIT,
)
from palate_server.gateway import App, error_body, error_kind
from palate_server.metrics import METRICS

logger = logging.getLogger(__name__)

DRAIN_S = 8.0
"""Time for open requests to be answered when the service stops."""
WRITE_TIMEOUT_S = 60.0
"""How long a client may read nothing of its answer. As long as it may take to send a request; a stopped one would keep its engine's
place, and so a drain, for as long as its connection is open."""


async def _nothing() -> None:
    pass


class Front:
    """The service's HTTP server, in a thread of its own with its own event loop.

    The server program binds the socket and listens before an engine starts, so no other process can take the port. uvicorn limits
    neither the time for a request to arrive nor the size of its headers; `_Guard` does.
    """

    def __init__(
        self,
        app: App,
        listener: socket.socket,
        *,
        on_end: Callable[[], Awaitable[None]] = _nothing,
        on_failure: Callable[[str], None] = lambda why: None,
        http: str = "auto",
        drain_s: float = DRAIN_S,
    ) -> None:
        """Prepares the server.

        Args:
            app: The ASGI app.
            listener: The listening socket.
            on_end: Called on the event loop when the server has ended.
            on_failure: Called in the thread with the cause if the server ends by itself.
            http: Which of uvicorn's protocols: auto, h11 or httptools.
            drain_s: Time for open requests to be answered when it ends.
        """
        config = uvicorn.Config(
            app,
            http=http,
            ws="none",
            lifespan="off",
            proxy_headers=False,  # nothing here asks who the client is
            log_config=None,
            access_log=False,  # the request log replaces it: it has the query of every URL
            timeout_graceful_shutdown=math.ceil(drain_s),
        )
        config.load()
        # A subclass keeps uvicorn's choice between h11 and httptools.
        config.http_protocol_class = type("Guarded", (_Guard, config.http_protocol_class), {})
        self._server = uvicorn.Server(config)
        self._listener = listener
        self._on_end = on_end
        self._on_failure = on_failure
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="front", daemon=True)

    def run(self) -> None:
        """Serves in this thread until SIGTERM."""
        self._server.run(sockets=[self._listener])

    def start(self) -> None:
        """Serves in a thread from now on."""
        self._thread.start()

    def end(self, *, drain: bool = True) -> None:
        """Accepts no more connections, and returns when the thread has ended.

        Args:
            drain: Wait for open requests; otherwise break them off.
        """
        if not drain:
            self._server.config.timeout_graceful_shutdown = 0
        self._server.should_exit = True
        self._thread.join()

    def call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Runs a coroutine on the server's event loop, without waiting for it."""
        if self._loop is None or self._loop.is_closed():
            coroutine.close()
        else:
            asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
                runner.run(self._serve())
        except BaseException as error:  # also SystemExit, with which uvicorn gives up
            logger.exception("the HTTP server ended")
            self._on_failure(f"{type(error).__name__}: {error}")

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await self._server.serve(sockets=[self._listener])
        finally:
            await self._on_end()


class _Guard:
    """Mixin for uvicorn's protocols: closes connections whose request is too slow or too large.

    Two timers that never run at the same time: one for the request line and headers, one for the body. While the app answers,
    neither runs: a long generation is not a slow client. A third one runs while the answer fills the write buffer.
    """

    # Attributes of both uvicorn protocols (h11 and httptools).
    connections: set[Any]
    cycle: Any
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport

    _head_bytes = 0
    _request_bytes = 0
    _counted_cycle: Any = None
    _timer: asyncio.TimerHandle | None = None
    _timer_is_for = ""
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)  # type: ignore[misc]
        if len(self.connections) > CONNECTIONS_LIMIT:
            self._refuse(503, f"The service has {CONNECTIONS_LIMIT} open connections. Try again later.")
        else:
            self._start_timer("line and headers", HEAD_TIMEOUT_S)

    def data_received(self, data: bytes) -> None:
        waited = self._waits_for_head()
        super().data_received(data)  # type: ignore[misc]
        # uvicorn makes a new cycle for each request on the connection. Bytes count per request, not per connection.
        if self.cycle is not self._counted_cycle:
            self._counted_cycle, self._request_bytes = self.cycle, 0
        self._request_bytes += len(data)
        # uvicorn buffers pipelined requests and trailers before the gateway has checked the token, so limit them here.
        if len(getattr(self, "pipeline", ())) > PIPELINED_LIMIT:
            self._refuse(
                429, f"More than {PIPELINED_LIMIT} pipelined requests on one connection. Wait for answers first."
            )
            return
        # Twice the body's limit, because chunked encoding adds to the bytes. The gateway enforces the exact limit.
        if self._request_bytes > 2 * BODY_LIMIT_BYTES:
            self._refuse(413, f"The request is larger than {2 * BODY_LIMIT_BYTES} bytes including its encoding.")
            return
        if self._waits_for_head():
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_LIMIT_BYTES:
                self._refuse(431, f"The request's line and headers are larger than {HEAD_LIMIT_BYTES} bytes.")
            # Not restarted by further bytes of the same head: a client that sends one byte at a time must time out too.
            elif not waited or self._timer is None:
                self._start_timer("line and headers", HEAD_TIMEOUT_S)
            return
        self._head_bytes = 0
        if self.cycle is None or not self.cycle.more_body:
            self._stop_timer()
        elif self._timer_is_for != "body":
            self._start_timer("body", BODY_TIMEOUT_S)

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_timer()
        self._stop_writing_timer()
        super().connection_lost(error)  # type: ignore[misc]

    def pause_writing(self) -> None:
        """Called by the event loop when the client reads more slowly than the app writes."""
        super().pause_writing()  # type: ignore[misc]
        self._writing = self.loop.call_later(WRITE_TIMEOUT_S, self._is_stuck, self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._stop_writing_timer()
        super().resume_writing()  # type: ignore[misc]

    def send_400_response(self, message: str) -> None:
        """Answers invalid HTTP with a JSON error. uvicorn would send plain text."""
        self._refuse(400, message)

    def _waits_for_head(self) -> bool:
        if self.transport.is_closing() or id(self.transport.get_protocol()) != id(self):
            return False  # closed, or upgraded to a websocket
        return self.cycle is None or self.cycle.response_complete

    def _start_timer(self, what: str, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._is_late, what, seconds)
        self._timer_is_for = what

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_is_for = ""

    def _stop_writing_timer(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _is_stuck(self, size: int) -> None:
        """Breaks the connection off if its write buffer still has its size. uvicorn tells the app, which ends the request."""
        now = self.transport.get_write_buffer_size()
        if now < size:
            self._writing = self.loop.call_later(WRITE_TIMEOUT_S, self._is_stuck, now)
        else:
            logger.warning("a client read nothing of its answer for %g s: its connection is closed", WRITE_TIMEOUT_S)
            self.transport.abort()

    def _is_late(self, what: str, seconds: float) -> None:
        self._stop_timer()
        if self._waits_for_head() and not self._head_bytes:
            self.transport.close()  # an idle connection: there is no request to answer
        elif self._waits_for_head() or not self.cycle.response_started:
            self._refuse(408, f"The request's {what} did not arrive within {seconds:g} s.")
        else:
            self.transport.close()  # the answer has begun, so a second status line would corrupt it

    def _refuse(self, status: int, message: str) -> None:
        # Written to the transport directly: the request never becomes an ASGI cycle, so the gateway cannot answer it.
        if self.transport.is_closing():
            return
        METRICS.reject_connection(status)
        body = json.dumps(error_body(message, kind=error_kind(status), param=None, code=status)).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
