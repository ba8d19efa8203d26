"""Whom a service's token is sent to: a service that knows it, without a proxy, and nobody who has its port after it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import openai
import pytest

from palate import Predictor, Session
from palate.errors import DamagedFilesError, ServiceError
from palate.http import _Challenge, async_http_client, is_loopback
from palate.runs.record import TOKEN_KEY, Record
from palate.store import Store, open_store
from tests.support.fronted import FrontedService, fronted_service
from tests.support.manifests import serve_manifest
from tests.support.seaweed import SeaweedServer

TOKEN = "a-token-for-tests"


@dataclass
class Recorder:
    """Listens, notes all that it is sent, and passes it on to `target`, or answers 200 to everything."""

    port: int
    target: int = 0
    heard: bytearray = field(default_factory=bytearray)

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection:
            if not self.target:
                while data := connection.recv(65536):
                    self.heard += data
                    connection.sendall(
                        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
                    )
                return
            with socket.create_connection(("127.0.0.1", self.target)) as other:
                # Each way on its own: an answer may come in several pieces.
                threading.Thread(target=_hand_back, args=(other, connection), daemon=True).start()
                while data := connection.recv(65536):
                    self.heard += data
                    other.sendall(data)
                other.shutdown(socket.SHUT_WR)


def _hand_back(other: socket.socket, connection: socket.socket) -> None:
    with suppress(OSError):
        while data := other.recv(65536):
            connection.sendall(data)


@contextmanager
def recorder(port: int = 0, target: int = 0) -> Iterator[Recorder]:
    listener = socket.create_server(("127.0.0.1", port))
    found = Recorder(listener.getsockname()[1], target)
    threading.Thread(target=found.serve, args=(listener,), daemon=True).start()
    yield found
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def predictor_of(session: Session, endpoint: str) -> Predictor:
    """A service that says in its record that it runs at the endpoint."""
    record = Record(session.store, "services", "svc")
    if not record.exists():
        record.create(serve_manifest())
        record.store.put(record.key(TOKEN_KEY), TOKEN.encode(), private=True)
    record.advance("Running", expect={"Creating", "Running"}, endpoint=endpoint, engine_id="elsewhere:1:2:x")
    return Predictor("svc", session=session)


async def first_model(client: openai.AsyncOpenAI) -> str:
    async with client:
        return (await client.models.list()).data[0].id


def test_a_service_is_asked_by_every_client(session: Session) -> None:
    with fronted_service(TOKEN) as service:
        predictor = predictor_of(session, service.endpoint)
        assert predictor.openai().models.list().data[0].id == "default"
        assert asyncio.run(first_model(predictor.async_openai())) == "default"
        assert predictor.raw_predict(path="/v1/models", method="GET").status_code == 200
        assert predictor.predict({"messages": []})["object"] == "echo"


@pytest.mark.parametrize("relays", [False, True])
def test_who_has_the_port_of_a_service_that_is_over_gets_no_token(session: Session, relays: bool) -> None:
    """Nor if he asks the service itself, which has another port by now, for the proof."""
    with fronted_service(TOKEN) as service:
        predictor = predictor_of(session, service.endpoint)
        held = predictor.openai(max_retries=0)
        held_async = predictor.async_openai(max_retries=0)
        held.models.list()
    with fronted_service(TOKEN) as moved, recorder(service.port, moved.port if relays else 0) as impostor:
        predictor_of(session, f"http://127.0.0.1:{moved.port}").openai()  # it answers before it is needed
        predictor = predictor_of(session, service.endpoint)
        for ask in (predictor.openai, predictor.async_openai, lambda: predictor.raw_predict({})):
            with pytest.raises(ServiceError, match=r"is not the service.*was not sent"):
                ask()
        with pytest.raises(ServiceError, match="is not the service"):
            predictor.predict({"messages": []})
        with pytest.raises(ServiceError, match="is not the service"):
            held.models.list()
        with pytest.raises(ServiceError, match="is not the service"):
            asyncio.run(first_model(held_async))
        assert b"x-palate-challenge" in impostor.heard
        assert TOKEN.encode() not in impostor.heard


def test_a_service_that_does_not_answer_is_named_with_a_remedy(session: Session) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ServiceError, match=r"does not respond.*palate start"):
        predictor_of(session, endpoint).openai()


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://[",
        "http://a:99999",
        "file:///etc/passwd",
        "http://\0",
        "//x",
        "http://",
        "http://xn--/",
        f"http://{'a' * 300}",
    ],
)
def test_an_endpoint_that_is_not_one_is_named(session: Session, endpoint: str) -> None:
    predictor = predictor_of(session, endpoint)
    for ask in (predictor.openai, predictor.async_openai, lambda: predictor.predict({"messages": []})):
        with pytest.raises(ServiceError, match=r"is not the URL of a server.*palate start"):
            ask()


@pytest.mark.parametrize("token", [b"", b"\xff", b"a\r\nx-more: 1", "\u00e9".encode(), b"a b"])
def test_a_token_that_is_not_one_is_named(session: Session, token: bytes) -> None:
    predictor = predictor_of(session, "http://127.0.0.1:9")
    session.store.put(f"services/svc/{TOKEN_KEY}", token)
    for ask in (predictor.openai, lambda: predictor.predict({"messages": []})):
        with pytest.raises(DamagedFilesError, match=r"access_token is damaged.*palate delete svc"):
            ask()


@pytest.mark.parametrize("proof", [b'{"proof": "\\ud800"}', b"[" * 10_000, b'{"proof": 1}', b"[]"], ids=len)
def test_an_answer_that_is_no_proof_is_refused(proof: bytes) -> None:
    challenge = _Challenge("http://127.0.0.1:9", TOKEN)
    challenge.take(b"HTTP/1.1 200 OK\r\n\r\n" + proof)
    with pytest.raises(ServiceError, match="is not the service"):
        challenge.check()


def test_a_proof_that_drips_in_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _Challenge("http://127.0.0.1:9", TOKEN).wants_more
    monkeypatch.setattr("palate.http._PROOF_TIMEOUT_S", 0.0)
    challenge = _Challenge("http://127.0.0.1:9", TOKEN)
    challenge.take(b"H")
    assert not challenge.wants_more


def test_an_answer_that_does_not_come_in_time_is_an_error(session: Session) -> None:
    with (
        fronted_service(TOKEN, hangs=True) as service,
        pytest.raises(ServiceError, match=r"no answer within timeout=0.5 s"),
    ):
        predictor_of(session, service.endpoint).predict({"messages": []}, timeout=0.5)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """A proxy that the environment names for everything."""
    with recorder() as found:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{found.port}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield found


def test_no_proxy_hears_of_a_service_on_the_loopback(session: Session, proxy: Recorder) -> None:
    with fronted_service(TOKEN) as service:
        test_of = predictor_of(session, service.endpoint)
        assert test_of.openai().models.list().data[0].id == "default"
        assert test_of.raw_predict(path="/v1/models", method="GET").status_code == 200
        assert asyncio.run(first_model(test_of.async_openai())) == "default"
        assert asyncio.run(first_model(_other_server(service))) == "default"
    assert proxy.heard == b""


def _other_server(service: FrontedService) -> openai.AsyncOpenAI:
    """As `palate data` asks a server of the loopback that is no Palate service."""
    url = f"{service.endpoint}/v1"
    return openai.AsyncOpenAI(base_url=url, api_key=TOKEN, http_client=async_http_client(url, None))


@pytest.mark.parametrize("by", ["option", "environment"])
def test_no_proxy_hears_of_a_store_on_the_loopback(
    seaweed: SeaweedServer, bucket: str, proxy: Recorder, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    from palate.store import StoreOptions

    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    endpoint = seaweed.endpoint
    if by == "option":
        monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    store: Store = open_store(
        f"s3://{bucket}/proxy", options=StoreOptions(endpoint_url=endpoint if by == "option" else None)
    )
    store.put("one", b"1")
    assert store.get("one") == b"1"
    assert proxy.heard == b""


def test_the_loopback_is_known_by_all_its_names() -> None:
    assert all(
        is_loopback(f"http://{host}:1/v1") for host in ("127.0.0.1", "127.8.0.1", "localhost", "[::1]", "a.localhost")
    )
    assert not any(is_loopback(f"http://{host}:1") for host in ("10.0.0.1", "localhost.example.com", "example.com"))
