"""A service without an engine: the front and its socket as in every engine, over an app that echoes. Also runs as a program."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import palate_server
from palate_recipes.specs.access import ACCESS_FILE
from palate_recipes.specs.serve import TUNED_MODEL, ServeSpec
from palate_server.access import Access
from palate_server.gateway import Gateway, calls_need_a_parser
from palate_server.routes import Lane, Routes, Table


def routes_of(spec: ServeSpec) -> Routes:
    """Returns routes to one app that serves the models of a spec."""
    parameters = calls_need_a_parser(spec)
    lanes = {name: Lane(model=name, label=name, parameters=parameters) for name in spec.models}
    lanes[spec.service_name] = lanes[TUNED_MODEL]
    return Routes(Table(lanes={name: [(1.0, lane)] for name, lane in lanes.items()}))


def gateway_of(app: Any, spec: ServeSpec, *, token: str, probe: str | None = None, **options: Any) -> Gateway:
    """Returns the front of a service over an app instead of its engines."""
    access = Access(Path(spec.work_dir) / ACCESS_FILE, owner=token, probe=probe)
    return Gateway(app, service_name=spec.service_name, routes=routes_of(spec), access=access, **options)


@dataclass(frozen=True)
class FrontedService:
    """What runs: its process, its port, and the token that it knows."""

    process: subprocess.Popen[bytes]
    port: int
    token: str

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def fronted_service(
    token: str,
    *,
    port: int = 0,
    http: str = "auto",
    hangs: bool = False,
    chats: bool = False,
    work_dir: Path = Path("w"),
    adapts: bool = False,
    **limits: float,
) -> Iterator[FrontedService]:
    """Runs it until the block ends. It answers with what reached it, and never at `/hang`.

    Args:
        token: The service's.
        port: 0 takes a free one.
        http: Which of uvicorn's protocols.
        hangs: Whether it answers no POST at all.
        chats: Whether it streams chat answers; see `talk`.
        work_dir: Where the tokens are read that a runner would write.
        adapts: Whether it has a base model beside the tuned one.
        limits: Constants of palate_server.listener, gateway and access to be set to other values.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(palate_server.__file__).parents[1]), os.getcwd()]),
        }
        command = [
            sys.executable,
            "-m",
            __name__,
            http,
            json.dumps(limits),
            "POST" if hangs else "",
            "talk" if chats else "echo",
            str(work_dir),
            str(listener.fileno()),
            token,
            *(["base"] if adapts else []),
        ]
        process = subprocess.Popen(command, env=environment, pass_fds=[listener.fileno()])
        port = listener.getsockname()[1]
    try:
        yield FrontedService(process, port, token)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with method, path and body; needs no framework."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if scope["path"] == "/hang" or scope["method"] == sys.argv[3]:
        await receive()  # until the client leaves
        return
    said = json.dumps({"object": "echo", "method": scope["method"], "path": scope["path"], "body": body.decode()})
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": said.encode()})


async def talk(scope: Any, receive: Any, send: Any) -> None:
    """Streams what it was asked, in words; answers in one piece if it is not asked for a stream.

    `forever` gets an answer that never ends, `refuse` an error, `half` also half a character, `long` an answer that is cut.
    """
    if scope["type"] != "http":
        return
    if scope["method"] != "POST":  # a health check
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})
        return
    asked = json.loads((await receive())["body"])
    said = asked["messages"][-1]["content"]
    if said == "refuse":
        await send({"type": "http.response.start", "status": 400, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b'{"error": {"message": "no"}}'})
        return
    roles = "".join(message["role"][0] for message in asked["messages"])
    if not asked.get("stream"):
        message = {"role": "assistant", "content": f"[{roles}] {asked['model']} {said}."}
        whole = {
            "id": "x",
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        }
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": json.dumps(whole).encode()})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})

    async def tell(content: str, *, more: bool = True) -> None:
        event = f"data: {content}\n\n".encode()
        await send({"type": "http.response.body", "body": event, "more_body": more})

    half = "\ud83d" if said == "half" else ""
    for word in (f"[{roles}]", f" {asked['model']}", f" {asked['temperature']:g}", f" {said}.{half}"):
        choice = {"index": 0, "delta": {"content": word}, "finish_reason": "length" if said == "long" else None}
        await tell(json.dumps({"id": "x", "object": "chat.completion.chunk", "choices": [choice]}))
    if said.startswith("forever"):
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    await tell("[DONE]", more=False)


def main() -> None:
    from palate_server import access, gateway, listener

    http, limits = sys.argv[1], json.loads(sys.argv[2])
    for name, value in limits.items():
        for module in (access, gateway, listener):
            if hasattr(module, name):
                setattr(module, name, value)
    base = sys.argv[8] if len(sys.argv) > 8 else None
    spec = ServeSpec(service_name="svc", model_dir="m", base_model_dir=base, work_dir=sys.argv[5])
    app = gateway_of({"echo": echo, "talk": talk}[sys.argv[4]], spec, token=sys.argv[7])
    listener.Front(app, socket.socket(fileno=int(sys.argv[6])), http=http).run()


if __name__ == "__main__":
    main()
