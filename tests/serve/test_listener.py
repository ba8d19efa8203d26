"""The public socket with real connections: nobody else can have it, and no connection costs more than its share."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import httpx
import psutil
import pytest

from palate_recipes.specs.serve import CHALLENGE_HEADER, token_proof
from palate_server.server import _listening
from tests.support.fronted import FrontedService, fronted_service

TOKEN = "a-token-for-tests"
WITH_TOKEN = {"Authorization": f"Bearer {TOKEN}"}
AUTHORISED = f"authorization: Bearer {TOKEN}\r\n".encode()


needs_httptools = pytest.mark.skipif(find_spec("httptools") is None, reason="httptools comes with vLLM alone")


@pytest.fixture(scope="module", params=[pytest.param("httptools", marks=needs_httptools), "h11"])
def service(request: pytest.FixtureRequest) -> Iterator[FrontedService]:
    """With limits that a test reaches in a moment."""
    limits = {"HEAD_TIMEOUT_S": 1.0, "BODY_TIMEOUT_S": 1.0, "CONNECTIONS_LIMIT": 40, "BODY_LIMIT_BYTES": 1024**2}
    with fronted_service(TOKEN, http=request.param, **limits) as started:
        yield started


def connect(service: FrontedService) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.port), timeout=30)


def answer(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Reads until the service closes; returns status and error."""
    data = b""
    try:
        while block := connection.recv(65536):
            data += block
    except ConnectionResetError:
        pass  # it closed on what was still being sent
    head, _, body = data.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), error


def drip(connection: socket.socket, piece: bytes) -> None:
    """Sends a piece again and again, a few a second, until the service says something or closes."""
    connection.settimeout(0.2)
    for _ in range(50):
        try:
            connection.sendall(piece)
            if connection.recv(1, socket.MSG_PEEK) is not None:
                break
        except TimeoutError:
            continue
        except OSError:
            break
    connection.settimeout(30)


def test_nobody_else_can_have_the_port_before_an_engine_answers() -> None:
    with _listening("127.0.0.1", 0) as listener, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            other.bind(listener.getsockname())


def test_headers_that_drip_in_are_cut_off(service: FrontedService) -> None:
    with connect(service) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
        drip(connection, b"x-slow: 1\r\n")
        status, error = answer(connection)
    assert (status, error["type"]) == (408, "RequestTimeoutError")


def test_a_connection_that_says_nothing_is_closed(service: FrontedService) -> None:
    with connect(service) as connection:
        assert connection.recv(1) == b""


def test_a_second_request_that_drips_in_is_cut_off_as_well(service: FrontedService) -> None:
    with connect(service) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" in connection.recv(65536)
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
        drip(connection, b"x-slow: 1\r\n")
        connection.settimeout(30)
        data = b""
        while block := connection.recv(65536):
            data += block
    assert b"408" in data


def test_headers_without_end_are_refused_and_cost_no_memory(service: FrontedService) -> None:
    before = psutil.Process(service.process.pid).memory_info().rss
    with connect(service) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
        try:
            for number in range(20_000):
                connection.sendall(b"x-%d: %s\r\n" % (number, b"y" * 1000))
        except OSError:
            pass
        else:
            pytest.fail("20 MB of headers were taken")
    assert psutil.Process(service.process.pid).memory_info().rss - before < 10 * 1024**2


def test_requests_that_nobody_waits_for_cost_no_memory(service: FrontedService) -> None:
    """Without a token: each of them was kept until those before it were answered."""
    before = psutil.Process(service.process.pid).memory_info().rss
    with connect(service) as connection:
        connection.settimeout(3)
        try:
            for _ in range(200):
                connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 1000)
        except OSError:
            pass  # it closed, or it reads no more
        grown = psutil.Process(service.process.pid).memory_info().rss - before
    assert grown < 40 * 1024**2


def test_trailers_without_end_are_refused_and_cost_no_memory(service: FrontedService) -> None:
    before = psutil.Process(service.process.pid).memory_info().rss
    with connect(service) as connection:
        connection.sendall(
            b"POST /v1/x HTTP/1.1\r\nhost: x\r\n" + AUTHORISED + b"transfer-encoding: chunked\r\n\r\n0\r\n"
        )
        try:
            for number in range(1000):
                connection.sendall(b"x-%d: %s\r\n" % (number, b"y" * 60_000))
        except OSError:
            pass
        else:
            pytest.fail("60 MB of trailers were taken")
    assert psutil.Process(service.process.pid).memory_info().rss - before < 20 * 1024**2


def test_what_is_not_http_is_answered_in_the_form_of_all_errors(service: FrontedService) -> None:
    with connect(service) as connection:
        connection.sendall(b"hello there\r\n\r\n")
        assert answer(connection)[0] == 400


def test_a_body_that_drips_in_is_cut_off(service: FrontedService) -> None:
    with connect(service) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + AUTHORISED + b"content-length: 9999\r\n\r\n"
        )
        drip(connection, b"x")
        status, error = answer(connection)
    assert (status, error["code"]) == (408, 408)


@pytest.mark.parametrize("kind", [b"application/json", b"multipart/form-data; boundary=x"])
@pytest.mark.parametrize("claimed", [True, False])
def test_a_body_that_is_too_large_is_refused(service: FrontedService, claimed: bool, kind: bytes) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: " + kind + b"\r\n" + AUTHORISED
    with connect(service) as connection:
        if claimed:
            connection.sendall(head + b"content-length: 99999999\r\n\r\n")  # and none of it
        else:
            connection.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
            try:
                for _ in range(1000):
                    connection.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
            except OSError:
                pass
        status, error = answer(connection)
    assert (status, error["type"]) == (413, "RequestEntityTooLargeError")


def test_too_many_connections_are_turned_away(service: FrontedService) -> None:
    held = [connect(service) for _ in range(60)]
    try:
        statuses = []
        for connection in held:
            data = connection.recv(65536)  # those within the limit are closed after a second, without a word
            statuses += [int(data.split()[1])] if data else []
        assert len(statuses) >= 15
        assert set(statuses) == {503}
    finally:
        for connection in held:
            connection.close()
    assert httpx.get(f"{service.endpoint}/health").status_code == 200


def test_the_service_proves_that_it_knows_its_token(service: FrontedService) -> None:
    challenge = os.urandom(16).hex()
    said = httpx.get(f"{service.endpoint}/health", headers={CHALLENGE_HEADER: challenge})
    assert said.json() == {"proof": token_proof(TOKEN.encode(), challenge, port=service.port)}
    assert httpx.get(f"{service.endpoint}/health", headers={CHALLENGE_HEADER: "x" * 40}).status_code == 400


@pytest.mark.parametrize(
    "target", [b"/palate/score#x", b".x/palate/score", b"@h/palate/score", b"/v1/load_lora_adapter%0a"]
)
def test_a_target_that_is_no_plain_path_reaches_no_engine(service: FrontedService, target: bytes) -> None:
    with connect(service) as connection:
        head = b"POST " + target + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + AUTHORISED
        connection.sendall(head + b"content-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
        assert answer(connection)[0] in (400, 404)


def test_a_rejected_parameter_is_answered_each_time_and_keeps_the_connection(service: FrontedService) -> None:
    """As lm-eval asks: eight connections, each used again and again, and every request is rejected."""
    connections = [http.client.HTTPConnection("127.0.0.1", service.port, timeout=30) for _ in range(8)]
    try:
        for connection in connections:
            connection.connect()
        ports = [connection.sock.getsockname()[1] for connection in connections]
        for _ in range(4):
            for connection in connections:
                headers = {**WITH_TOKEN, "content-type": "application/json"}
                connection.request("POST", "/v1/completions", json.dumps({"model": [1]}), headers)
            for connection in connections:
                response = connection.getresponse()
                assert response.status == 400
                assert json.load(response)["error"]["param"] == "model"
        # http.client opens another one after `connection: close`.
        assert ports == [connection.sock.getsockname()[1] for connection in connections]
    finally:
        for connection in connections:
            connection.close()
