"""The front over a tiny app that says what reached it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from palate_recipes.specs.serve import ServeSpec
from palate_server.gateway import Message, Receive, Scope, Send
from tests.support.fronted import gateway_of

TOKEN = "right"
SPEC = ServeSpec(service_name="svc", model_dir="m", base_model_dir="b", work_dir="w")
WITH_TOKEN = {"Authorization": f"Bearer {TOKEN}"}


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the path and the body as they arrived, and with the length that the headers claim."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    claimed = dict(scope["headers"]).get(b"content-length", b"0").decode()
    headers = [(b"x-path", scope["path"].encode()), (b"x-claimed", claimed.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def ask(method: str, path: str, *, headers: dict[str, str] | None = None, **options: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(gateway_of(echo, SPEC, token=TOKEN))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=WITH_TOKEN if headers is None else headers, **options)

    return asyncio.run(go())


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/metrics", "/invocations", "/"])
@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer wrong",
        "Bearer",
        "Bearer ",
        "wrong",
        "righ",
        "rightx",
        f"Basic {TOKEN}",
        f"Token {TOKEN}",
        f"{TOKEN} x",
        f"Bearer {TOKEN} x",
        f"Bearer Bearer {TOKEN}",
        f"{TOKEN}, Bearer x",
        f"Bearer{TOKEN}",
        "RIGHT",
        "Bearer réight",
    ],
)
def test_nothing_but_health_answers_without_the_token(path: str, authorization: str) -> None:
    raw = {"Authorization": authorization.encode()} if authorization else {}
    answer = ask("POST", path, headers=raw, json={"model": "default"})  # type: ignore[arg-type]
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert TOKEN not in answer.text.replace("right.", "")


@pytest.mark.parametrize("authorization", [f"Bearer {TOKEN}", f"bearer  {TOKEN}", TOKEN, f" {TOKEN} "])
def test_the_token_is_accepted_with_bearer_or_alone_as_pai_eas_does(authorization: str) -> None:
    assert ask("GET", "/v1/models", headers={"Authorization": authorization}).status_code == 200


def test_the_token_is_accepted_in_no_other_header_and_not_in_the_url() -> None:
    for headers in ({"X-Api-Key": TOKEN}, {"Token": TOKEN}, {"Proxy-Authorization": f"Bearer {TOKEN}"}):
        assert ask("GET", "/v1/models", headers=headers).status_code == 401
    assert ask("GET", f"/v1/models?token={TOKEN}&access_token={TOKEN}", headers={}).status_code == 401


def test_tools_without_a_parser_are_rejected_with_what_to_do() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for request in ({"tools": tools}, {"tools": tools, "tool_choice": "auto"}):
        answer = ask("POST", "/v1/chat/completions", json=request)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "tools"
        assert "--engine-arg tool-call-parser=NAME" in answer.json()["error"]["message"]
    for request in ({"tools": []}, {"tools": tools, "tool_choice": "none"}, {"tools": None}):
        assert ask("POST", "/v1/chat/completions", json=request).status_code == 200


def test_a_base_url_without_v1_is_answered_with_the_path_that_is_meant() -> None:
    for method, path in (("POST", "/chat/completions"), ("GET", "/models")):
        answer = ask(method, path)
        assert answer.status_code == 404
        assert f"it is /v1{path}. A client's base_url ends with /v1" in answer.json()["error"]["message"]
        assert ask(method, path, headers={}).status_code == 401


def test_health_is_open_but_only_to_get() -> None:
    assert ask("GET", "/health", headers={}).headers["x-path"] == "/health"
    assert ask("POST", "/health", headers={}).status_code == 401


def test_the_tuned_models_are_listed_first() -> None:
    listed = ask("GET", "/v1/models").json()
    assert [card["id"] for card in listed["data"]] == ["default", "svc", "base"]
    assert ask("GET", "/v1/models/svc").json()["root"] == "default"
    assert ask("GET", "/v1/models/nope").status_code == 404


@pytest.mark.parametrize(
    ("asked", "reached"),
    [({"model": "svc"}, "default"), ({"model": "default"}, "default"), ({"model": "base"}, "base"), ({}, "default")],
)
def test_names_become_the_engines_names(asked: dict[str, str], reached: str) -> None:
    request = {**asked, "messages": [{"role": "user", "content": "héllo \ud83d"}], "n": 1.5}
    text = json.dumps(request)
    answer = ask(
        "POST", "/v1/chat/completions", content=text, headers={**WITH_TOKEN, "content-type": "application/json"}
    )
    assert json.loads(answer.content) == {**request, "model": reached}
    assert int(answer.headers["x-claimed"]) == len(answer.content)


def test_a_body_that_needs_no_change_is_not_touched() -> None:
    text = b'{"model":  "default" , "big": 12345678901234567890.123}'
    headers = {**WITH_TOKEN, "content-type": "application/json"}
    assert ask("POST", "/v1/completions", content=text, headers=headers).content == text
    assert ask("POST", "/v1/completions", content=b"{no json", headers=headers).content == b"{no json"
    assert ask("POST", "/v1/completions", content=b"[1]", headers=headers).content == b"[1]"


@pytest.mark.parametrize("name", [7, 0, False, ["default"], [], {"default": 1}])
def test_a_model_that_is_no_text_is_answered_with_400(name: object) -> None:
    answer = ask("POST", "/v1/chat/completions", json={"model": name})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "model"


@pytest.mark.parametrize("name", ["nope", "/etc"])
def test_an_unknown_model_is_answered_with_404(name: object) -> None:
    answer = ask("POST", "/v1/chat/completions", json={"model": name})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["type"] == "NotFoundError"
    assert "default, svc, base" in error["message"]


def test_an_unknown_name_is_not_repeated_whole() -> None:
    answer = ask("POST", "/v1/completions", json={"model": "a" * 100_000})
    assert (answer.status_code, len(answer.content) < 1000) == (404, True)


def test_a_request_of_any_depth_gets_an_answer() -> None:
    for depth in (10, *range(800, 1000, 7), *range(960, 1000), 20_000):
        for body in (f'{{"a": {"[" * depth}{"]" * depth}}}', f'{{"model": {"[" * depth}{"]" * depth}}}'):
            answer = ask("POST", "/v1/completions", content=body.encode(), headers=WITH_TOKEN)
            assert answer.status_code in (200, 400, 404)


def test_big_bodies_in_many_parts_arrive_whole() -> None:
    request = {"model": "svc", "prompt": "x" * 5_000_000}

    async def parts() -> Any:
        text = json.dumps(request).encode()
        for start in range(0, len(text), 65536):
            yield text[start : start + 65536]

    answer = ask("POST", "/v1/completions", content=parts(), headers={**WITH_TOKEN, "content-type": "application/json"})
    assert answer.json() == {**request, "model": "default"}


def test_a_stream_passes_unbuffered() -> None:
    """Each event is with the client before the app sends the next."""
    arrived: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(3):
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
            assert len(arrived) == number + 1
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Message) -> None:
        if message.get("body"):
            arrived.append(message["body"])

    async def receive() -> Message:
        return {"type": "http.request", "body": b'{"model": "svc", "stream": true}'}

    headers = [(b"authorization", f"Bearer {TOKEN}".encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    asyncio.run(gateway_of(app, SPEC, token=TOKEN)(scope, receive, send))
    assert arrived == [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n"]


def test_a_client_that_leaves_is_noticed_by_the_app() -> None:
    seen: list[str] = []
    messages: list[Message] = [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([(await receive())["type"], (await receive())["type"]])

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        raise AssertionError(message)

    headers = [(b"authorization", f"Bearer {TOKEN}".encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    asyncio.run(gateway_of(app, SPEC, token=TOKEN)(scope, receive, send))
    assert seen == ["http.request", "http.disconnect"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/svc"])
def test_models_are_only_read(method: str, path: str) -> None:
    answer = ask(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert answer.json()["error"]["type"] == "MethodNotAllowedError"
    assert ask("HEAD", path).status_code == 200


def answering(status: int, body: bytes) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"text/plain"), (b"x-kept", b"1")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body[:5], "more_body": True})
        await send({"type": "http.response.body", "body": body[5:]})

    return app


def ask_of(app: Any, **options: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(gateway_of(app, SPEC, token=TOKEN), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/completions", headers=WITH_TOKEN, json={}, **options)

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (b'{"detail": "Not Found"}', "Not Found", None),
        (b"Internal Server Error", "Internal Server Error", None),
        (b'{"error": "the worker died"}', "the worker died", None),
        (b'{"object": "error", "message": "no"}', "no", None),
        (
            b'{"detail": [{"loc": ["body", "n", 0], "msg": "too large"}, {"msg": "and wrong"}]}',
            "n.0: too large; and wrong",
            "n.0",
        ),
        (b"", "Not Found", None),
        (b"\xff[[[", "�[[[", None),
    ],
)
def test_every_error_gets_the_form_that_clients_read(body: bytes, message: str, param: str | None) -> None:
    answer = ask_of(answering(404, body))
    assert answer.json() == {"error": {"message": message, "type": "NotFoundError", "param": param, "code": 404}}
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert (answer.headers["content-type"], answer.headers["x-kept"]) == ("application/json", "1")


def test_an_error_that_has_the_form_and_an_answer_are_left_as_they_are() -> None:
    ours = b'{"error":  {"message": "x", "code": 1}}'
    assert ask_of(answering(400, ours)).content == ours
    assert ask_of(answering(200, b'{"detail": "Not Found"}')).content == b'{"detail": "Not Found"}'


def test_an_app_that_breaks_is_an_error_of_the_same_form() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("a secret path")

    answer = ask_of(broken)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, 500)
    assert "secret" not in answer.text


def test_requests_hold_no_more_than_their_bound_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palate_server.gateway.BODIES_LIMIT_BYTES", 1000)
    front = gateway_of(echo, SPEC, token=TOKEN)

    async def go() -> list[int]:
        transport = httpx.ASGITransport(front)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=WITH_TOKEN) as client:
            return [
                (await client.post("/v1/completions", json={"prompt": "x" * size})).status_code
                for size in (500, 2000, 500)
            ]

    assert asyncio.run(go()) == [200, 503, 200]


@pytest.mark.parametrize(
    "target",
    [
        "/v1/load_lora_adapter%0A",
        "/adapters%0A",
        "/v1/models%0A",
        "/palate/score%0A",
        "/palate/score%23x",
        "/v1/chat/completions%0A",
        "/v1/%63hat/completions",
        "/v1/chat%2Fcompletions",
        "/v1/chat/completions;x",
        "/v1/chat/completions%00",
        "/invocations",
        "/reset",
    ],
)
def test_a_path_that_an_engine_could_read_differently_is_not_forwarded(target: str) -> None:
    """Starlette's patterns match before a line break: `%0A` after a path went past every check on it."""
    for method in ("POST", "GET", "DELETE"):
        answer = ask(method, target, **({"json": {"model": "default"}} if method == "POST" else {}))
        assert answer.status_code == 404, (method, answer.text)
        assert "x-path" not in answer.headers


def test_the_body_of_a_request_that_has_none_is_not_kept() -> None:
    """`/health` needs no token, and its body was read to its end and sent to the engine."""
    for path, headers in (("/health", {}), ("/version", None)):
        answer = ask("GET", path, headers=headers, content=b"x" * 100_000)
        assert (answer.status_code, answer.headers["x-path"], answer.content) == (200, path, b"")
