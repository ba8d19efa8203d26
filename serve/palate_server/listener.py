"""The engine's side of the public socket: taken over from the server program, with limits on what a connection may do. Knows uvicorn.

The server program binds the socket and listens before the engine starts, so nobody else can have the port in between. Both
engines serve with uvicorn, which has no limit on the time that a request takes to arrive, nor on the size of its headers.
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
    ACTIVITY_PATH,
    BODY_LIMIT_BYTES,
    BODY_TIMEOUT_S,
    CONNECTIONS_LIMIT,
    HEAD_LIMIT_BYTES,
    HEAD_TIMEOUT_S,
    HEALTH_PATH,
    LISTENER_VARIABLE,
    PIPELINED_LIMIT,
)
from palate_server.gateway import error_body, error_kind


def take_listener() -> socket.socket:
    """Returns the socket that this process was handed."""
    number = int(os.environ.pop(LISTENER_VARIABLE))  # what the engine starts gets none
    os.set_inheritable(number, False)
    return socket.socket(fileno=number)


def serve_on(listener: socket.socket) -> None:
    """Makes every uvicorn server of this process answer at the socket, whatever it was told, within the limits of `_Guard`."""
    startup = uvicorn.Server.startup

    async def startup_on_listener(server: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        config = server.config
        if not issubclass(config.http_protocol_class, _Guard):
            config.http_protocol_class = type("Guarded", (_Guard, config.http_protocol_class), {})
        await startup(server, sockets=[listener])

    uvicorn.Server.startup = startup_on_listener  # type: ignore[method-assign,assignment]
    logging.getLogger("uvicorn.access").addFilter(_is_worth_a_line)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Leaves the looks of supervisors out of the access log: one every few seconds."""
    arguments = record.args
    return not (isinstance(arguments, tuple) and len(arguments) > 2 and arguments[2] in {HEALTH_PATH, ACTIVITY_PATH})


class _Guard:
    """Mixin over a protocol of uvicorn: closes connections whose request does not arrive in time, or begins with too much."""

    # Of uvicorn's protocols, whichever it is.
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
        if self.cycle is not self._counted_cycle:
            self._counted_cycle, self._request_bytes = self.cycle, 0
        self._request_bytes += len(data)
        # uvicorn keeps each request that has not had its turn, and every trailer, whether or not a token came with it.
        if len(getattr(self, "pipeline", ())) > PIPELINED_LIMIT:
            self._refuse(429, f"The connection has more than {PIPELINED_LIMIT} requests that wait for their turn.")
            return
        if self._request_bytes > 2 * BODY_LIMIT_BYTES:
            self._refuse(413, f"The request is larger than {2 * BODY_LIMIT_BYTES} bytes, with what frames its body.")
            return
        if self._waits_for_head():
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_LIMIT_BYTES:
                self._refuse(431, f"The request's line and headers are larger than {HEAD_LIMIT_BYTES} bytes.")
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
        """Answers what is not HTTP; uvicorn would do so in plain text."""
        self._refuse(400, message)

    def _waits_for_head(self) -> bool:
        if self.transport.is_closing() or id(self.transport.get_protocol()) != id(self):
            return False  # closed, or a websocket by now
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
            self.transport.close()  # it has not begun to ask
        elif self._waits_for_head() or not self.cycle.response_started:
            self._refuse(408, f"The request's {what} did not arrive within {seconds:g} s.")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        body = json.dumps(error_body(message, kind=error_kind(status), param=None, code=status)).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
