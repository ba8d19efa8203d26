"""The engine's end of the public socket, inherited from the server program, with limits per connection. Knows uvicorn.

The server program binds the socket and listens before the engine starts, so no other process can take the port in between.
Both engines serve with uvicorn, which limits neither the time for a request to arrive nor the size of its headers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from http import HTTPStatus
from typing import Any

import uvicorn

from palate_recipes.specs.serve import (
    BODY_LIMIT_BYTES,
    BODY_TIMEOUT_S,
    CONNECTIONS_LIMIT,
    HEAD_LIMIT_BYTES,
    HEAD_TIMEOUT_S,
    LISTENER_VARIABLE,
    PIPELINED_LIMIT,
)
from palate_server.gateway import error_body, error_kind
from palate_server.metrics import METRICS
from palate_server.request_log import REQUEST_LOG


def take_listener() -> socket.socket:
    """Returns the socket that this process inherited."""
    number = int(
        os.environ.pop(LISTENER_VARIABLE)
    )  # popped, and not inheritable: the engine's children must not get it
    os.set_inheritable(number, False)
    return socket.socket(fileno=number)


def serve_on(listener: socket.socket) -> None:
    """Makes every uvicorn server in this process use the socket, regardless of its configuration, with the limits of `_Guard`."""
    startup = uvicorn.Server.startup

    async def startup_on_listener(server: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        config = server.config
        # The engine has chosen h11 or httptools by now. A subclass keeps its choice.
        if not issubclass(config.http_protocol_class, _Guard):
            config.http_protocol_class = type("Guarded", (_Guard, config.http_protocol_class), {})
        _log_requests()
        await startup(server, sockets=[listener])

    uvicorn.Server.startup = startup_on_listener  # type: ignore[method-assign,assignment]


def _log_requests() -> None:
    """Replaces uvicorn's access log, which has the query of every URL, by the request log. If it is off, both are."""
    access = logging.getLogger("uvicorn.access")
    if access.hasHandlers() and access.isEnabledFor(logging.INFO):
        REQUEST_LOG.is_on = True
    access.handlers.clear()  # uvicorn formats no line for a logger without handlers
    access.propagate = False


class _Guard:
    """Mixin for uvicorn's protocols: closes connections whose request is too slow or too large.

    Two timers that never run at the same time: one for the request line and headers, one for the body. While the app answers,
    neither runs: a long generation is not a slow client.
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
        super().connection_lost(error)  # type: ignore[misc]

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
