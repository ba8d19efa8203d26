"""The gateway's tokens and their limits: changed while it runs, refused in time, and no slot is ever lost."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from palate_recipes.specs.access import ACCESS_FILE, AccessToken, GatewayAccess, token_digest
from palate_recipes.specs.serve import ACTIVITY_PATH, CHALLENGE_HEADER, ServeSpec, token_proof
from palate_server import access as access_module
from palate_server.gateway import Gateway, Message, Receive, Scope, Send
from palate_server.parity import PRIVATE_PATHS
from tests.slow.conftest import until
from tests.support.fronted import FrontedService, fronted_service, gateway_of

OWNER = "the-token-of-the-owner"
ALICE = "the-token-of-alice"
CHAT = {"model": "default", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}


def token(name: str, value: str, **limits: int) -> AccessToken:
    return AccessToken(name=name, digest=token_digest(value.encode()), created_at=1.0, **limits)


def write(folder: Path, *tokens: AccessToken, owner: str = OWNER) -> None:
    GatewayAccess(owner=owner, tokens=tokens).write(folder / ACCESS_FILE)


def spec(folder: Path) -> ServeSpec:
    return ServeSpec(service_name="svc", model_dir="m", base_model_dir="b", work_dir=str(folder))


class Held:
    """An app that answers a POST when it is told to, in two pieces."""

    def __init__(self) -> None:
        self.begun = asyncio.Semaphore(0)
        self.go_on = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first ", "more_body": True})
        self.begun.release()
        await self.go_on.wait()
        await send({"type": "http.response.body", "body": b"last"})


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body", False):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


@asynccontextmanager
async def client_of(gateway: Gateway, value: str) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {value}"}
    transport = httpx.ASGITransport(gateway, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test:8000", headers=headers) as client:
        yield client


async def status_of(gateway: Gateway, value: str, method: str = "POST", path: str = "/v1/completions") -> int:
    async with client_of(gateway, value) as client:
        return (await client.request(method, path, json={} if method == "POST" else None)).status_code


@pytest.fixture
def always_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_module, "LOOK_EVERY_S", 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the limits, in its only element."""
    now = [1000.0]

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    monkeypatch.setattr(access_module, "time", Clock)
    return now


def test_every_token_is_accepted_and_its_digest_is_not(tmp_path: Path) -> None:
    write(tmp_path, token("alice", ALICE), token("bob", "bobs"))
    gateway = gateway_of(echo, spec(tmp_path), token="of-the-environment")

    async def go() -> list[int]:
        wrong = (token_digest(ALICE.encode()), ALICE[:-1], ALICE + "x", "", "of-the-environment", "alice")
        return [await status_of(gateway, value, "GET", "/v1/models") for value in (OWNER, ALICE, "bobs", *wrong)]

    assert asyncio.run(go()) == [200, 200, 200, 401, 401, 401, 401, 401, 401]


@pytest.mark.usefixtures("always_looks")
def test_tokens_change_while_the_gateway_runs(tmp_path: Path) -> None:
    gateway = gateway_of(echo, spec(tmp_path), token="of-the-environment")
    values = ("of-the-environment", OWNER, "next", ALICE)

    async def accepted() -> list[str]:
        return [value for value in values if await status_of(gateway, value) == 200]

    async def go() -> list[list[str]]:
        seen = [await accepted()]
        write(tmp_path)
        seen.append(await accepted())
        write(tmp_path, token("alice", ALICE))
        seen.append(await accepted())
        write(tmp_path, token("default", "next"), token("alice", ALICE))  # the owner's next token is announced
        seen.append(await accepted())
        write(tmp_path, token("default", "next"), owner="next")
        seen.append(await accepted())
        return seen

    assert asyncio.run(go()) == [
        ["of-the-environment"],
        [OWNER],
        [OWNER, ALICE],
        [OWNER, "next", ALICE],
        ["next"],
    ]


def test_the_file_is_checked_rarely_and_read_only_after_a_change(tmp_path: Path, clock: list[float]) -> None:
    write(tmp_path, token("alice", ALICE))
    gateway = gateway_of(echo, spec(tmp_path), token="x")

    async def alice() -> int:
        return await status_of(gateway, ALICE)

    assert asyncio.run(alice()) == 200
    write(tmp_path)
    assert asyncio.run(alice()) == 200, "within the same half second"
    clock[0] += access_module.LOOK_EVERY_S
    assert asyncio.run(alice()) == 401


@pytest.mark.usefixtures("always_looks")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"owner": ""}',
        b'{"owner": "x y"}',
        b'{"owner": "x\\n"}',
        b'{"owner": "x", "tokens": [{"name": "a", "digest": "x", "created_at": 1}]}',
        b'{"owner": "x", "tokens": [{"name": "../a", "digest": "%s", "created_at": 1}]}' % (b"0" * 64),
        b'{"owner": "x", "tokens": [{"name": "a", "digest": "%s", "created_at": 1, "concurrency": 0}]}' % (b"0" * 64),
        b'{"owner": "x", "more": "%s"}' % (b"0" * 70_000),
        b"\xff" * 100,
        b"[" * 60_000,
    ],
)
def test_a_damaged_file_changes_nothing(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, token("alice", ALICE))
    gateway = gateway_of(echo, spec(tmp_path), token="x")
    (tmp_path / ACCESS_FILE).write_bytes(content)

    async def go() -> list[int]:
        return [await status_of(gateway, value) for value in (OWNER, ALICE, "x", "")]

    assert asyncio.run(go()) == [200, 200, 401, 401]
    with pytest.raises(ValueError, match=ACCESS_FILE):
        gateway_of(echo, spec(tmp_path), token="x")
    (tmp_path / ACCESS_FILE).unlink()
    assert asyncio.run(go()) == [200, 200, 401, 401], "a missing file is no change"


def test_only_this_user_reads_the_file(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write(tmp_path)
        write(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / ACCESS_FILE).stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [ACCESS_FILE]


def test_the_server_programs_token_has_no_limits_and_opens_its_own_paths(tmp_path: Path) -> None:
    write(tmp_path, token("alice", ALICE, concurrency=9, rate_per_minute=99))
    gateway = gateway_of(echo, spec(tmp_path), token="x", probe="probe")

    async def go() -> list[int]:
        return [await status_of(gateway, "probe") for _ in range(5)]

    assert asyncio.run(go()) == [200] * 5
    for path in PRIVATE_PATHS:
        assert asyncio.run(status_of(gateway, "probe", "POST", path)) == 200
        assert asyncio.run(status_of(gateway, OWNER, "POST", path)) == 404
        assert asyncio.run(status_of(gateway, ALICE, "POST", path)) == 404


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/load_lora_adapter/"),
        *("/v1/load%5Flora_adapter", "/adapters", "/adapters/", "/adapters/x", "/%61dapters/x%2Fy", ACTIVITY_PATH),
    ],
)
def test_nobody_reaches_the_engines_own_paths(tmp_path: Path, path: str) -> None:
    """They would load an adapter from any folder of the machine."""
    gateway = gateway_of(echo, spec(tmp_path), token="x", probe="probe")
    for value in ("x", "probe", "nobody"):
        for method in ("POST", "GET", "DELETE"):
            status = 401 if value == "nobody" else 404
            assert asyncio.run(status_of(gateway, value, method, path)) == status


def test_the_service_proves_that_it_knows_each_token(tmp_path: Path) -> None:
    write(tmp_path, token("alice", ALICE), token("bob", "bobs"))
    gateway = gateway_of(echo, spec(tmp_path), token="x")
    challenge = "0123456789abcdef" * 2

    async def go() -> Any:
        async with client_of(gateway, "") as client:
            return (await client.get("/health", headers={CHALLENGE_HEADER: challenge})).json()

    def proof(key: str) -> str:
        return token_proof(key.encode(), challenge, port=8000)

    said = asyncio.run(go())
    assert said == {
        "proof": proof(OWNER),
        "proofs": [proof(token_digest(value.encode())) for value in (ALICE, "bobs")],
    }


def test_a_rate_is_exact_and_says_when_to_come_back(tmp_path: Path, clock: list[float]) -> None:
    write(tmp_path, token("alice", ALICE, rate_per_minute=3), token("bob", "bobs"))
    gateway = gateway_of(echo, spec(tmp_path), token="x")

    async def go() -> None:
        for _ in range(3):
            assert await status_of(gateway, ALICE) == 200
            clock[0] += 10
        async with client_of(gateway, ALICE) as client:
            answer = await client.post("/v1/chat/completions", json={})
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "30")
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["code"] == "rate_limit_exceeded"
            assert "3 requests per minute" in error["message"]
            assert "connection" not in answer.headers, "its body was read"
            assert (await client.get("/v1/models")).status_code == 200, "it has a limit of its own"
        assert [await status_of(gateway, value) for value in ("bobs", OWNER)] == [200, 200]
        clock[0] += 29.9
        assert await status_of(gateway, ALICE) == 429
        clock[0] += 0.1  # the first of the three leaves the window; a refused one never was in it
        assert [await status_of(gateway, ALICE) for _ in range(2)] == [200, 429]
        # A smaller limit holds at once, for the requests that were made before.
        write(tmp_path, token("alice", ALICE, rate_per_minute=1))
        clock[0] += 1
        async with client_of(gateway, ALICE) as client:
            answer = await client.post("/v1/completions", json={})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "59")

    asyncio.run(go())


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/svc", "/metrics", "/version", "/nowhere"])
def test_reading_has_a_limit_of_its_own(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """A token could read the engines' pages without end."""
    monkeypatch.setattr(access_module, "READS_PER_MINUTE", 3)
    write(tmp_path, token("alice", ALICE), token("bob", "bobs"), token("default", "next"))
    gateway = gateway_of(echo, spec(tmp_path), token="x")

    async def go() -> None:
        assert [await status_of(gateway, ALICE, "GET", path) for _ in range(4)] == [200, 200, 200, 429]
        clock[0] += 20
        async with client_of(gateway, ALICE) as client:
            answer = await client.get(path)
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "40")
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
            assert "3 requests without a body per minute" in answer.json()["error"]["message"]
            assert (await client.head(path)).status_code == 429
        assert await status_of(gateway, ALICE) == 200, "a request with a body"
        assert await status_of(gateway, "", "GET", "/health") == 200
        assert await status_of(gateway, "bobs", "GET", path) == 200
        for value in (OWNER, "next"):
            assert [await status_of(gateway, value, "GET", path) for _ in range(5)] == [200] * 5
        clock[0] += 40
        assert await status_of(gateway, ALICE, "GET", path) == 200

    asyncio.run(go())


def test_no_token_takes_the_room_of_all_bodies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bodies of one token's requests could fill what all have together, and the others got a 503."""
    monkeypatch.setattr(access_module, "BODIES_SHARE_BYTES", 2000)
    monkeypatch.setattr("palate_server.gateway.BODIES_LIMIT_BYTES", 8000)
    write(tmp_path, token("alice", ALICE), token("bob", "bobs"), token("default", "next"))
    part: Message = {"type": "http.request", "body": b"x" * 500, "more_body": True}

    async def go() -> None:
        app = Held()
        gateway = gateway_of(app, spec(tmp_path), token="x")
        async with client_of(gateway, ALICE) as client:
            held = [asyncio.create_task(client.post("/v1/completions", content=b"x" * 900)) for _ in range(2)]
            for _ in held:
                await app.begun.acquire()
            answer = await client.post("/v1/completions", content=b"x" * 900)
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
            assert "open requests exceed 2000 bytes" in answer.json()["error"]["message"]
            assert "connection" not in answer.headers, "its body was read"
            sent, asking = _ask(gateway, *[part] * 5, {"type": "http.request", "body": b""})
            await asking
            assert sent[0]["status"] == 429
            assert (b"connection", b"close") not in sent[0]["headers"]
            sent, asking = _ask(gateway, *[part] * 5, {"type": "http.disconnect"})
            await asking
            assert (b"connection", b"close") in sent[0]["headers"]
            others = [asyncio.create_task(status_of(gateway, value)) for value in ("bobs", OWNER, "next")]
            for _ in others:
                await app.begun.acquire()
            app.go_on.set()
            assert await asyncio.gather(*others) == [200] * 3
            assert [(await one).status_code for one in held] == [200, 200]
            assert (await client.post("/v1/completions", content=b"x" * 1900)).status_code == 200
        async with client_of(gateway, OWNER) as client:
            assert (await client.post("/v1/completions", content=b"x" * 7000)).status_code == 200, "it has no share"
            answer = await client.post("/v1/completions", content=b"x" * 9000)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert (await client.post("/v1/completions", content=b"x")).status_code == 200

    asyncio.run(go())


@pytest.mark.usefixtures("always_looks")
def test_open_requests_are_counted_until_their_end_over_a_rotation(tmp_path: Path) -> None:
    write(tmp_path, token("alice", ALICE, concurrency=2))

    async def go() -> None:
        app = Held()
        gateway = gateway_of(app, spec(tmp_path), token="x")
        streams = [asyncio.create_task(status_of(gateway, ALICE)) for _ in range(2)]
        for _ in streams:
            await app.begun.acquire()
        async with client_of(gateway, ALICE) as client:
            answer = await client.post("/v1/completions", json={})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert "limit is 2" in answer.json()["error"]["message"]
        write(tmp_path, token("alice", "rotated", concurrency=2))
        assert [await status_of(gateway, value) for value in (ALICE, "rotated")] == [401, 429]
        app.go_on.set()
        assert await asyncio.gather(*streams) == [200, 200], "what was accepted is answered"
        assert [await status_of(gateway, "rotated") for _ in range(3)] == [200] * 3

    asyncio.run(go())


async def _raises(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("broken")


async def _waits(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.Event().wait()


def _ask(gateway: Gateway, *messages: Message) -> tuple[list[Message], Any]:
    """Sends one request of Alice's by hand; returns where its answer goes, and the request."""
    waiting, sent = [*messages], list[Message]()

    async def receive() -> Message:
        return waiting.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"authorization", ALICE.encode()), (b"content-length", b"4")],
    }
    return sent, gateway(scope, receive, send)


def test_no_way_to_end_keeps_a_slot(tmp_path: Path) -> None:
    """An error of the app, a client that leaves while it sends, a body that is too large, an unknown model, a cancelled task."""
    write(tmp_path, token("alice", ALICE, concurrency=1))
    body: Message = {"type": "http.request", "body": b'{"n":', "more_body": True}

    async def go() -> None:
        for app, messages in (
            (_raises, ({"type": "http.request", "body": b"{}"},)),
            (echo, (body, {"type": "http.disconnect"})),
            (echo, ({"type": "http.request", "body": b"x" * (33 * 1024**2)},)),
            (echo, ({"type": "http.request", "body": b'{"model": "nope"}'},)),
        ):
            gateway = gateway_of(app, spec(tmp_path), token="x")
            for _ in range(3):
                sent, asking = _ask(gateway, *messages)
                with suppress(RuntimeError):
                    await asking
                assert 429 not in [message.get("status") for message in sent]
        gateway = gateway_of(_waits, spec(tmp_path), token="x")
        for _ in range(3):
            sent, asking = _ask(gateway, {"type": "http.request", "body": b"{}"})
            task = asyncio.create_task(asking)
            await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            assert sent == []

    asyncio.run(go())


def test_a_refused_request_is_read_to_its_end_or_its_connection_closed(tmp_path: Path) -> None:
    write(tmp_path, token("alice", ALICE, concurrency=1))

    async def go() -> None:
        app = Held()
        gateway = gateway_of(app, spec(tmp_path), token="x")
        held = asyncio.create_task(status_of(gateway, ALICE))
        await app.begun.acquire()
        part: Message = {"type": "http.request", "body": b"x" * 1024**2, "more_body": True}
        for messages, closes in (
            ([part, part, {"type": "http.request", "body": b""}], False),
            ([part] * 40, True),
            ([part, {"type": "http.disconnect"}], True),
        ):
            sent, asking = _ask(gateway, *messages)
            await asking
            assert sent[0]["status"] == 429
            assert ((b"connection", b"close") in sent[0]["headers"]) is closes
        assert gateway._held_bytes == len(b"{}"), "only the body of the open request"
        app.go_on.set()
        await held
        assert await status_of(gateway, ALICE) == 200

    asyncio.run(go())


# ── over a real socket ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FrontedService, Path]]:
    """A service whose chat never ends if it is asked for `forever`, and the folder of its tokens."""
    folder = tmp_path_factory.mktemp("work")
    write(folder)
    with fronted_service(OWNER, chats=True, work_dir=folder) as service:
        yield service, folder


def test_a_client_that_leaves_a_stream_frees_its_slot(limited: tuple[FrontedService, Path]) -> None:
    service, folder = limited
    write(folder, token("alice", ALICE, concurrency=1))
    url, headers = f"{service.endpoint}/v1/chat/completions", {"Authorization": f"Bearer {ALICE}"}
    endless = {**CHAT, "messages": [{"role": "user", "content": "forever"}], "stream": True}
    until(lambda: httpx.post(url, headers=headers, json=CHAT).status_code == 200, timeout_s=30)
    for _ in range(3):
        with httpx.stream("POST", url, headers=headers, json=endless) as stream:
            lines = stream.iter_lines()  # held: the stream ends with it
            assert next(lines).startswith("data:")
            assert httpx.post(url, headers=headers, json=CHAT).status_code == 429
        until(lambda: httpx.post(url, headers=headers, json=CHAT).status_code == 200, timeout_s=30)


def test_openais_client_waits_as_it_is_told(limited: tuple[FrontedService, Path]) -> None:
    service, folder = limited
    write(folder, token("alice", ALICE, concurrency=1))
    url, headers = f"{service.endpoint}/v1/chat/completions", {"Authorization": f"Bearer {ALICE}"}
    endless = {**CHAT, "messages": [{"role": "user", "content": "forever"}], "stream": True}
    until(lambda: httpx.post(url, headers=headers, json=CHAT).status_code == 200, timeout_s=30)
    with openai.OpenAI(base_url=f"{service.endpoint}/v1", api_key=ALICE, max_retries=1) as client:
        with httpx.stream("POST", url, headers=headers, json=endless) as stream:
            lines = stream.iter_lines()
            next(lines)
            begun = time.monotonic()
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(**{**CHAT, "stream": True})  # type: ignore[arg-type]
            assert time.monotonic() - begun >= 1.0, "one retry, after the second that retry-after says"
        assert caught.value.code == "rate_limit_exceeded"
        client.with_options(max_retries=3).chat.completions.create(**{**CHAT, "stream": True}).close()  # type: ignore[arg-type]


def test_a_removed_token_is_refused_soon_also_on_an_open_connection(limited: tuple[FrontedService, Path]) -> None:
    service, folder = limited
    write(folder, token("alice", ALICE))
    with httpx.Client(base_url=service.endpoint, headers={"Authorization": f"Bearer {ALICE}"}) as client:
        until(lambda: client.get("/v1/models").status_code == 200, timeout_s=30)
        write(folder)
        until(lambda: client.get("/v1/models").status_code == 401, timeout_s=access_module.LOOK_EVERY_S + 2)
    assert json.loads((folder / ACCESS_FILE).read_text())["tokens"] == []
