"""HTTP clients: no proxy for the loopback, and no token to a listener that does not know it. Knows endpoints, no record.

When a service ends, its address stays in the store, and another program can take its port. So each new connection to a
service starts with a challenge that only a process with the token can answer. The token is sent only after that.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Awaitable, Callable
from inspect import signature
from ipaddress import ip_address
from secrets import compare_digest, token_hex
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from palate.parameters import check_keywords
from palate_recipes.errors import ServiceError
from palate_recipes.specs.access import token_digest
from palate_recipes.specs.serve import CHALLENGE_HEADER, HEALTH_PATH, token_proof

if TYPE_CHECKING:
    import httpx
    from openai import AsyncOpenAI, OpenAI


ANSWER_TIMEOUT_S = 600.0
"""Maximum seconds between two chunks of a response; a response that is not streamed is one chunk."""

CONNECT_TIMEOUT_S = 10.0
_PROOF_TIMEOUT_S = 30.0
_LONGEST_PROOF = 16 * 1024


def is_loopback(url: str) -> bool:
    """Returns whether a URL points to the loopback of this machine."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def checked_endpoint(endpoint: str) -> str:
    """Returns a service's endpoint, as read from the store; raises ServiceError unless it is an http(s) URL."""
    import httpx

    try:
        parts = urlsplit(endpoint)
        host = httpx.URL(endpoint).host and (parts.hostname or "")
        host.encode("idna")  # as the resolver does, which rejects labels of more than 63 characters
        is_url = parts.scheme in ("http", "https") and bool(host) and parts.port != 0  # .port raises above 65,535
    except (httpx.InvalidURL, ValueError):
        is_url = False
    if not is_url:
        raise ServiceError(
            f"the service's endpoint {endpoint[:200]!r} is not the URL of a server",
            reason="its status.json is damaged. Run `palate stop NAME` and `palate start NAME` to write it again",
        )
    return endpoint


def openai_client(endpoint: str, token: str, url_suffix: str, options: dict[str, Any]) -> OpenAI:
    """Returns a client that sends the token only to the service.

    Raises:
        ServiceError: The service does not respond, or the listener does not know the token.
    """
    import httpx2
    import openai

    check_keywords("Predictor.openai", options, signature(openai.OpenAI).parameters)
    check_service(endpoint, token)
    defaults: dict[str, Any] = {"timeout": openai.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)}
    if (transport := _transport(httpx2, endpoint, token)) is not None:
        defaults["http_client"] = openai.DefaultHttpxClient(transport=transport)
    return openai.OpenAI(base_url=f"{endpoint}/{url_suffix}", api_key=token, **{**defaults, **options})


def async_openai_client(endpoint: str, token: str, url_suffix: str, options: dict[str, Any]) -> AsyncOpenAI:
    """Returns the asynchronous client; see `openai_client`."""
    import openai

    check_keywords("Predictor.async_openai", options, signature(openai.AsyncOpenAI).parameters)
    check_service(endpoint, token)
    defaults: dict[str, Any] = {"timeout": openai.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)}
    defaults["http_client"] = async_http_client(endpoint, token)
    return openai.AsyncOpenAI(base_url=f"{endpoint}/{url_suffix}", api_key=token, **{**defaults, **options})


def async_http_client(url: str, token: str | None) -> Any:
    """Returns the HTTP client for `openai.AsyncOpenAI`, or None for openai's default.

    Args:
        url: Base URL of the requests.
        token: Token of a service, which must prove that it knows it; None for any other server.
    """
    import httpx2
    import openai

    if token is None:
        return openai.DefaultAsyncHttpxClient(trust_env=False) if is_loopback(url) else None
    transport = _async_transport(httpx2, url, token)
    return None if transport is None else openai.DefaultAsyncHttpxClient(transport=transport)


def http_client(endpoint: str, token: str, *, timeout_s: float | None) -> httpx.Client:
    """Returns a client for a service that sends no request to a listener without the token."""
    import httpx

    timeout = httpx.Timeout(timeout_s, connect=None if timeout_s is None else min(timeout_s, CONNECT_TIMEOUT_S))
    return httpx.Client(transport=_transport(httpx, endpoint, token), timeout=timeout)


def check_service(endpoint: str, token: str) -> None:
    """Raises ServiceError unless the listener at the endpoint responds and knows the token. Does not send the token."""
    import httpx

    try:
        with http_client(endpoint, token, timeout_s=_PROOF_TIMEOUT_S) as client:
            client.get(f"{endpoint}{HEALTH_PATH}")
    except httpx.HTTPError as error:
        raise ServiceError(
            f"the service at {endpoint} does not respond",
            reason=f"{type(error).__name__}: {error}. Run `palate services` to see whether it runs, `palate start NAME` to start it",
        ) from error


def knows_token(endpoint: str, key: str) -> bool | None:
    """Returns whether the service accepts the token whose proof has this key.

    Returns:
        None if a proxy or TLS is in between, or the listener does not answer as a service.

    Raises:
        OSError: The service cannot be reached.
    """
    if not _is_proven(endpoint):
        return None
    parts = urlsplit(endpoint)
    challenge = _Challenge(endpoint, key)
    with socket.create_connection((parts.hostname or "", parts.port or 80), CONNECT_TIMEOUT_S) as connection:
        connection.settimeout(_PROOF_TIMEOUT_S)
        connection.sendall(challenge.request)
        while challenge.wants_more:
            challenge.take(connection.recv(_LONGEST_PROOF))
    return challenge.is_met if challenge.proofs else None


def _is_proven(endpoint: str) -> bool:
    """Returns whether connections go directly to the service over plain HTTP, so that the challenge is possible.

    Otherwise a proxy is in between, or the certificate proves the identity.
    """
    from urllib.request import getproxies, proxy_bypass

    parts = urlsplit(endpoint)
    if parts.scheme != "http":
        return False
    return is_loopback(endpoint) or "http" not in getproxies() or bool(proxy_bypass(parts.hostname or ""))


def _transport(library: Any, endpoint: str, token: str) -> Any:
    """Returns a transport of httpx or of a library with the same interface, or None for the library's default."""
    if not _is_proven(endpoint):
        return library.HTTPTransport() if is_loopback(endpoint) else None
    check = _checking(endpoint, token)

    class ProvenTransport(library.HTTPTransport):  # type: ignore[misc]
        def handle_request(self, request: Any) -> Any:
            request.extensions = {**request.extensions, "trace": check}
            return super().handle_request(request)

    return ProvenTransport(verify=False, limits=_limits(library))  # plain HTTP: no certificate, so do not load the CAs


def _async_transport(library: Any, endpoint: str, token: str) -> Any:
    if not _is_proven(endpoint):
        return library.AsyncHTTPTransport() if is_loopback(endpoint) else None
    check = _checking_async(endpoint, token)

    class ProvenTransport(library.AsyncHTTPTransport):  # type: ignore[misc]
        async def handle_async_request(self, request: Any) -> Any:
            request.extensions = {**request.extensions, "trace": check}
            return await super().handle_async_request(request)

    return ProvenTransport(verify=False, limits=_limits(library))


def _limits(library: Any) -> Any:
    return library.Limits(max_connections=1000, max_keepalive_connections=100)  # openai's defaults


_CONNECTED = "connection.connect_tcp.complete"
"""Event of httpx's trace extension: the connection is open and nothing has been sent yet."""


def _checking(endpoint: str, token: str) -> Callable[[str, dict[str, Any]], None]:
    def check(event: str, info: dict[str, Any]) -> None:
        if event != _CONNECTED:
            return
        stream, challenge = info["return_value"], _Challenge(endpoint, *_keys(token))
        try:
            stream.write(challenge.request, _PROOF_TIMEOUT_S)
            while challenge.wants_more:
                challenge.take(stream.read(_LONGEST_PROOF, _PROOF_TIMEOUT_S))
            challenge.check()
        except BaseException:
            stream.close()
            raise

    return check


def _checking_async(endpoint: str, token: str) -> Callable[[str, dict[str, Any]], Awaitable[None]]:
    async def check(event: str, info: dict[str, Any]) -> None:
        if event != _CONNECTED:
            return
        stream, challenge = info["return_value"], _Challenge(endpoint, *_keys(token))
        try:
            await stream.write(challenge.request, _PROOF_TIMEOUT_S)
            while challenge.wants_more:
                challenge.take(await stream.read(_LONGEST_PROOF, _PROOF_TIMEOUT_S))
            challenge.check()
        except BaseException:
            await stream.aclose()
            raise

    return check


def _keys(token: str) -> tuple[str, str]:
    """The keys of a token's proof: the owner's token itself, and the digest of a named one, which is all the service has."""
    return token, token_digest(token.encode())


class _Challenge:
    """A challenge to a listener to prove that it knows one of the keys, and its response. Does no I/O."""

    def __init__(self, endpoint: str, *keys: str) -> None:
        self._endpoint = endpoint
        parts = urlsplit(endpoint)
        challenge = token_hex(32)
        self._expected = [token_proof(key.encode(), challenge, port=parts.port or 80).encode() for key in keys]
        self._answer = b""
        self._over = False
        self._until = time.monotonic() + _PROOF_TIMEOUT_S  # for the whole response: each read has its own timeout
        self.request = (
            f"GET {HEALTH_PATH} HTTP/1.1\r\nhost: {parts.netloc}\r\n{CHALLENGE_HEADER}: {challenge}\r\n\r\n"
        ).encode()

    @property
    def wants_more(self) -> bool:
        head, end, body = self._answer.partition(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: *(\d{1,4})\r\n", head + b"\r\n", re.IGNORECASE)
        whole = bool(end) and (length is None or len(body) >= int(length[1]))
        is_late = time.monotonic() >= self._until
        return not (self._over or whole or is_late or len(self._answer) > _LONGEST_PROOF)

    def take(self, data: bytes) -> None:
        self._answer += data
        self._over = not data

    @property
    def proofs(self) -> list[bytes]:
        """The proofs in the response: of the owner's token, then of the named ones. Empty if it is not a service's answer."""
        head, _, body = self._answer.partition(b"\r\n\r\n")
        try:
            said = json.loads(body)
            proofs = [said["proof"], *said.get("proofs", ())]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return []
        is_answer = head.startswith(b"HTTP/1.1 200")
        return [proof.encode(errors="replace") for proof in proofs if isinstance(proof, str)] if is_answer else []

    @property
    def is_met(self) -> bool:
        """Whether the response has a proof with one of the keys."""
        return any(compare_digest(proof, expected) for proof in self.proofs for expected in self._expected)

    def check(self) -> None:
        """Raises ServiceError unless the response has the proof."""
        if not self.is_met:
            raise ServiceError(
                f"the listener at {self._endpoint} is not the service",
                reason="it does not know the client's token, which was not sent. The token may have been replaced or removed, the "
                "service may have ended and another program taken its port, or an older version of Palate started it. Run "
                "`palate services` to see whether it runs, `palate stop NAME` and `palate start NAME` to restart it",
            )
