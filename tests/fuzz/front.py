"""The serving front behind a real server and a real socket: broken requests in, an answer or a closed connection out, never a 500."""

from __future__ import annotations

import logging
import socket
import threading
import time
from contextlib import ExitStack
from random import Random
from typing import Any

from tests.fuzz import mutate

_TOKEN = "right"
_CHAT = {"model": "default", "messages": [{"role": "user", "content": "hello"}], "n": 1, "stream": False}
_HEAD = (
    "{method} {path} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer right\r\n"
    "Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
)


class _Faults(logging.Handler):
    """Keeps what the server logs as an error: an exception that the front let through."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(logging.Formatter().format(record))


def serve(world: dict[str, Any], stack: ExitStack) -> None:
    """Starts the front over an app that reads the body and repeats its length."""
    import uvicorn

    from palate_recipes.specs.serve import ServeSpec
    from tests.support.fronted import gateway_of

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", scope["type"] == "http"
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})

    spec = ServeSpec(service_name="svc", model_dir="m", base_model_dir="b", work_dir="w")
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    settings = uvicorn.Config(
        gateway_of(app, spec, token=_TOKEN), log_level="error", lifespan="off", timeout_keep_alive=1
    )
    server = uvicorn.Server(settings)
    world["address"], world["faults"] = listener.getsockname(), _Faults()
    logging.getLogger("uvicorn.error").handlers = [world["faults"]]
    logging.getLogger("uvicorn.error").propagate = False
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    stack.callback(thread.join, 10)
    stack.callback(setattr, server, "should_exit", True)
    until = time.monotonic() + 30
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)


def requests(rng: Random, world: dict[str, Any]) -> bytes:
    """Returns a request as bytes: damaged JSON in a whole request, or a damaged head."""
    body = mutate.dump(rng, mutate.value(rng, _CHAT))
    path = rng.choice(
        ("/v1/chat/completions", "/v1/models/svc", "/v1/models", "/health", mutate.text(rng, "/v1/models/x"))
    )
    method = rng.choice(("POST", "POST", "POST", "GET", "PUT", "HEAD", "OPTIONS"))
    length = len(body) if rng.random() < 0.9 else rng.choice((0, len(body) + 5, -1, 10**30))
    head = _HEAD.format(method=method, path=path, length=length).encode("utf-8", "surrogatepass")
    return (mutate.data(rng, head) if rng.random() < 0.3 else head) + body


def ask(request: bytes, world: dict[str, Any]) -> str:
    """Sends the request and no more, reads to the end, and returns the answer's status or `closed`."""
    with socket.create_connection(world["address"], timeout=4) as connection:
        answer = b""
        try:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            while block := connection.recv(65536):
                answer += block
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            # The server may close before it has read all.
    if world["faults"].seen:
        raise AssertionError(world["faults"].seen.pop()[-2000:])
    status = answer[9:12].decode("ascii", "replace") if answer.startswith(b"HTTP/1.1 ") else "closed"
    if status.startswith("5"):
        raise AssertionError(f"the front answers {status}: {answer[:500]!r}")
    return status
