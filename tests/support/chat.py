"""A real HTTP server that speaks OpenAI's chat API as a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from palate.generate import Generated, generate_pairs
from palate.generate.chat_client import Endpoint
from palate.generate.pairs import PairSettings

KEY = "sk-secret-of-the-test"
PROMPTS = ["Is it?", "Why so?", "What now?"]

HANG = "hang"
DROP = "drop"


class Answer(NamedTuple):
    """What the server sends: a status, a body, headers."""

    status: int
    body: bytes
    headers: Mapping[str, str] = MappingProxyType({})


class Asked(NamedTuple):
    """One request."""

    at_s: float
    authorization: str
    body: dict[str, Any]

    @property
    def is_verdict(self) -> bool:
        return "<answer-A-" in self.body["messages"][0]["content"]

    @property
    def key(self) -> str:
        return json.dumps(self.body, sort_keys=True)


Behaviour = Callable[[dict[str, Any], int], "Answer | str"]
"""From the request's body and its number, from 1, to an answer, HANG or DROP."""


def completion(text: str | None, *, finish: str = "stop", usage: tuple[int, int] | None = (10, 5)) -> Answer:
    body: dict[str, Any] = {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
    }
    if usage:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return Answer(200, json.dumps(body).encode())


def refusal(status: int, message: str = "no", *, headers: dict[str, str] | None = None, **error: Any) -> Answer:
    return Answer(status, json.dumps({"error": {"message": message, **error}}).encode(), headers or {})


def shown_answers(body: dict[str, Any]) -> tuple[str, str]:
    """Returns the answers that a judge is to compare."""
    text = body["messages"][0]["content"]
    found = [re.search(rf"<answer-{place}-(\w+)>\n(.*)\n</answer-{place}-\1>", text, re.DOTALL) for place in "AB"]
    assert all(found), text
    return found[0].group(2), found[1].group(2)  # type: ignore[union-attr]


class ChatServer:
    """Answers `/v1/chat/completions` by a behaviour that a test may exchange at any time."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.asked: list[Asked] = []
        self.most_at_once = 0
        self.port = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Listens; after `close`, on the port that it had."""
        self._closing.clear()
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Refuses connections from now on; what hangs is let go without an answer."""
        self._closing.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self._send(Answer(200, b'{"object": "list", "data": []}'))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with chat._lock:
                    chat.asked.append(Asked(time.monotonic(), self.headers.get("Authorization", ""), body))
                    number = len(chat.asked)
                    chat._at_once += 1
                    chat.most_at_once = max(chat.most_at_once, chat._at_once)
                try:
                    answer = DROP if chat._closing.is_set() else chat.behaviour(body, number)
                    if answer == HANG:
                        chat._closing.wait()
                finally:
                    with chat._lock:
                        chat._at_once -= 1
                if isinstance(answer, Answer) and not chat._closing.is_set():
                    self._send(answer)
                else:
                    self.close_connection = True

            def _send(self, answer: Answer) -> None:
                try:
                    self.send_response(answer.status)
                    for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(answer.body)))
                    self.end_headers()
                    self.wfile.write(answer.body)
                except OSError:
                    self.close_connection = True  # the one who asked is gone

        return Handler


@contextmanager
def chat_server(behaviour: Behaviour) -> Iterator[ChatServer]:
    server = ChatServer(behaviour)
    server.start()
    try:
        yield server
    finally:
        server.close()


class World:
    """Answers are numbered as they are asked for; the judge prefers the lower number."""

    def __init__(self) -> None:
        self.answers = 0
        self._lock = threading.Lock()

    def __call__(self, body: dict[str, Any], number: int) -> Answer | str:
        with self._lock:
            if "<answer-A-" in body["messages"][0]["content"]:
                first, second = (int(answer.split()[-1]) for answer in shown_answers(body))
                return completion(f"The lower one.\nVerdict: {'A' if first < second else 'B'}", usage=(100, 7))
            self.answers += 1
            return completion(f"{body['model']} says {self.answers}")


def settings(server: ChatServer, **changes: Any) -> PairSettings:
    return PairSettings(
        **{
            "endpoint": Endpoint(server.url, KEY, "environment variable THE_KEY"),
            "models": ["small"],
            "judge_model": "big",
            "concurrency": 4,
            "timeout_s": 20.0,
            "retry_wait_s": 0.01,
            **changes,
        }
    )


def make(server: ChatServer, output: Path, prompts: Any = PROMPTS, **changes: Any) -> Generated:
    return generate_pairs(prompts, output=output, settings=settings(server, **changes))


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Waits for a condition, as the one who would see it does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
