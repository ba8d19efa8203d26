"""A small engine for tests of the service: vLLM's HTTP paths on a Unix socket, without a model. Needs uvicorn alone.

    python small_engine.py SPEC.json --uds SOCKET [--adapters '{"default": "/folder"}']

It answers with the model's name, its folder and its own process id, so a test sees who has answered. The prompt says what it does:

    tokens:5 delay:0.1   that many tokens, with seconds before each
    until:FILE           waits for the file
    pad:1000             so many characters more in each token
    die:2                SIGKILL before token 2
    stick:FILE           from now on no request generates; makes the file, and does nothing if it exists
    error                answers 500

An `engine.json` in a model's or an adapter's folder says how it is started or loaded: `says` (a line to print), `dies`, `slow_s`,
`until` (a file to wait for), `once` (makes this file; dies if it exists), `refuses` (a text: an adapter is not loaded, a model
answers 500).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import uvicorn

PID = os.getpid()
CONTEXT_TOKENS = 512


class SmallEngine:
    """The ASGI app."""

    def __init__(self, spec: dict[str, Any], adapters: dict[str, str]) -> None:
        base = spec.get("base_model_dir")
        self._models: dict[str, str] = {"base": base, **adapters} if base else {"default": spec["model_dir"]}
        self._adapts = bool(base)
        self._is_stuck = False
        self._requests = self._cancelled = self._running = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        if path == "/health":
            await _answer(send, 200, b"")
        elif path == "/metrics":
            await _answer(send, 200, self._page(), kind=b"text/plain; version=0.0.4")
        elif path == "/v1/models":
            cards = [{"id": name, "max_model_len": CONTEXT_TOKENS} for name in self._models]
            await _answer(send, 200, {"object": "list", "data": cards})
        elif path == "/echo":
            await _echo(scope, receive, send)
        elif path in ("/v1/completions", "/v1/chat/completions"):
            await self._generate(json.loads(await _body(receive)), receive, send, chats="chat" in path)
        elif path == "/v1/load_lora_adapter" and self._adapts:
            await self._load(json.loads(await _body(receive)), send)
        elif path == "/v1/unload_lora_adapter" and self._adapts:
            name = json.loads(await _body(receive))["lora_name"]
            known = self._models.pop(name, None)
            await _answer(send, 200 if known else 404, f"unloaded {name}".encode())
        else:
            await _fail(send, 404, f"no such path {path}")

    async def _load(self, request: dict[str, Any], send: Any) -> None:
        name, folder = request["lora_name"], request["lora_path"]
        if name in self._models:
            await _fail(send, 400, f"The lora adapter '{name}' has already been loaded.")
            return
        if why := _start(folder):
            await _fail(send, 400, why)
            return
        self._models[name] = folder
        await _answer(send, 200, f"Success: LoRA adapter '{name}' added successfully.".encode())

    async def _generate(self, request: dict[str, Any], receive: Any, send: Any, *, chats: bool) -> None:
        folder = self._models.get(request["model"])
        if folder is None:
            await _fail(send, 404, f"The model `{request['model']}` does not exist.")
            return
        asked = request["messages"][-1]["content"] if chats else request["prompt"]
        does = dict((*word.split(":", 1), "")[:2] for word in asked.split())
        if "error" in does or (why := _behaviour(folder).get("refuses")):
            await _fail(send, 500, "error" if "error" in does else why)
            return
        self._requests += 1
        self._running += 1
        leaving = asyncio.ensure_future(_left(receive))
        try:
            tokens, delay_s = int(does.get("tokens", 1)), float(does.get("delay", 0))
            text = f"{request['model']} {folder} {PID}"
            answer = _Answer(send, request, text, chats=chats, pad=" " * int(does.get("pad", 0)))
            for number in range(tokens):
                if "stick" in does and not Path(does["stick"]).exists():
                    Path(does["stick"]).touch()
                    self._is_stuck = True
                while (self._is_stuck or _waits(does)) and not leaving.done():
                    await asyncio.sleep(0.01)
                if does.get("die") == str(number):
                    os.kill(PID, signal.SIGKILL)
                if delay_s:
                    await asyncio.wait({leaving}, timeout=delay_s)
                if leaving.done():
                    self._cancelled += 1
                    return
                await answer.token(number)
            await answer.end()
        finally:
            self._running -= 1
            leaving.cancel()

    def _page(self) -> bytes:
        labels = '{model_name="default"}'
        return (
            "# HELP vllm:num_requests_running Number of requests.\n# TYPE vllm:num_requests_running gauge\n"
            f"vllm:num_requests_running{labels} {self._running}.0\n"
            "# HELP vllm:request_success Requests.\n# TYPE vllm:request_success counter\n"
            f"vllm:request_success_total{labels} {self._requests}.0\n"
            "# HELP small_cancelled Requests whose client left.\n# TYPE small_cancelled gauge\n"
            f"small_cancelled {self._cancelled}.0\n"
        ).encode()


class _Answer:
    """A completion or a chat, whole or streamed."""

    def __init__(self, send: Any, request: dict[str, Any], text: str, *, chats: bool, pad: str) -> None:
        self._send = send
        self._pad = pad
        self._streams = bool(request.get("stream"))
        self._model, self._text, self._chats = request["model"], text, chats
        self._has_begun = False
        self._count = 0

    async def token(self, number: int) -> None:
        self._count += 1
        if self._streams:
            await self._begin(b"text/event-stream; charset=utf-8")
            content = (self._text if number == 0 else f" {number}") + self._pad
            await self._part(f"data: {json.dumps(self._body(content, streams=True))}\n\n".encode())

    async def end(self) -> None:
        if self._streams:
            await self._part(b"data: [DONE]\n\n")
        else:
            await self._begin(b"application/json")
            usage = {"prompt_tokens": 1, "completion_tokens": self._count, "total_tokens": 1 + self._count}
            await self._part(json.dumps({**self._body(self._text, streams=False), "usage": usage}).encode())
        await self._send({"type": "http.response.body", "body": b""})

    def _body(self, content: str, *, streams: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": None if streams else "length"}
        message = {"role": "assistant", "content": content}
        choice |= {"delta" if streams else "message": message} if self._chats else {"text": content}
        kind = f"{'chat' if self._chats else 'text'}.completion{'.chunk' if streams else ''}"
        return {"id": "x", "object": kind, "created": 1, "model": self._model, "choices": [choice]}

    async def _begin(self, kind: bytes) -> None:
        if not self._has_begun:
            self._has_begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})

    async def _part(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": True})


async def _echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what has arrived, with the status and in as many parts as the query says."""
    body = await _body(receive)
    query = scope["query_string"].decode("latin-1")
    asked = dict(pair.split("=", 1) for pair in query.split("&") if "=" in pair)
    status = int(asked.get("status", 200))
    said = {
        "method": scope["method"],
        "path": scope["raw_path"].decode("latin-1"),
        "query": query,
        "headers": [[k.decode("latin-1"), v.decode("latin-1")] for k, v in scope["headers"]],
        "body": body.decode("latin-1"),
    }
    content = b"" if status in (204, 304) else json.dumps(said).encode()
    headers = [(b"x-mine", "café".encode()), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]
    if status != 204:
        headers.append((b"content-type", b"application/x-echo"))
    if "chunked" not in asked and status not in (204, 304):
        headers.append((b"content-length", str(len(content)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for start in range(0, len(content), 50):
        await send({"type": "http.response.body", "body": content[start : start + 50], "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _answer(send: Any, status: int, content: object, *, kind: bytes = b"application/json") -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _fail(send: Any, status: int, message: str) -> None:
    await _answer(send, status, {"error": {"message": message, "type": "E", "param": None, "code": status}})


async def _body(receive: Any) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def _left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _waits(does: dict[str, str]) -> bool:
    return "until" in does and not Path(does["until"]).exists()


def _behaviour(folder: str) -> dict[str, Any]:
    file = Path(folder) / "engine.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _start(folder: str) -> str:
    """Does what the folder says about its start; returns why it is refused."""
    behaviour = _behaviour(folder)
    if says := behaviour.get("says"):
        print(says, flush=True)
    once = behaviour.get("once")
    if behaviour.get("dies") or (once and Path(once).exists()):
        os.kill(PID, signal.SIGKILL)
    if once:
        Path(once).touch()
    while _waits(behaviour):
        time.sleep(0.01)
    time.sleep(behaviour.get("slow_s", 0))
    return str(behaviour.get("refuses", ""))


def main() -> None:
    """Serves until SIGTERM. Open requests are broken off then, so that a test sees whether the service has waited for them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("--uds", required=True)
    parser.add_argument("--adapters", type=json.loads, default={})
    given = parser.parse_args()
    spec = json.loads(given.spec.read_text())
    for folder in given.adapters.values() if spec.get("base_model_dir") else [spec["model_dir"]]:
        if (why := _start(folder)) and spec.get("base_model_dir"):
            sys.exit(f"ValueError: {why}")
    app = SmallEngine(spec, given.adapters)
    uvicorn.run(
        app, uds=given.uds, http="h11", loop="asyncio", ws="none", lifespan="off", log_level="warning",
        access_log=False, timeout_graceful_shutdown=0,
    )  # fmt: skip


if __name__ == "__main__":
    main()
