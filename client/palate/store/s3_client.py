"""Creates boto3 clients for S3 and OSS endpoints. Knows options and environment, no bucket and no key."""

from __future__ import annotations

import os
from functools import cache
from http.client import HTTPException, HTTPResponse, RemoteDisconnected
from io import BufferedReader
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import boto3.session
import botocore.session
from botocore import UNSIGNED
from botocore.awsrequest import AWSHTTPConnection, AWSHTTPConnectionPool, AWSHTTPSConnection, AWSHTTPSConnectionPool
from botocore.config import Config
from botocore.exceptions import ConnectionClosedError
from botocore.loaders import Loader, create_loader
from urllib3.exceptions import HTTPError

from palate.http import is_loopback
from palate.store.options import ADDRESSING_STYLES, StoreOptions
from palate_recipes.errors import StoreUsageError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_OSS_REGION_VARIABLES = ("OSS_REGION", "ALIBABA_CLOUD_REGION_ID", "AWS_REGION", "AWS_DEFAULT_REGION")


def connect(options: StoreOptions, *, is_oss: bool, impatient: bool = False) -> S3Client:
    """Returns a client; sends no request to the store.

    Args:
        options: None values come from boto3's own chain: environment, AWS config files, instance role.
        is_oss: Use the settings for Alibaba OSS; OSS_ACCESS_KEY_ID and OSS_ACCESS_KEY_SECRET precede that chain.
        impatient: Give up after about ten seconds, for checks. Otherwise an unreachable endpoint fails after about
            20 seconds, and one that accepts connections but does not respond after five minutes.

    Raises:
        StoreUsageError: An OSS store with neither region nor endpoint, or an invalid PALATE_S3_ADDRESSING_STYLE.
    """
    options = _with_oss_defaults(options) if is_oss else options
    style = (
        options.addressing_style or os.environ.get("PALATE_S3_ADDRESSING_STYLE") or ("virtual" if is_oss else "auto")
    )
    if style not in ADDRESSING_STYLES:
        raise StoreUsageError(
            f"PALATE_S3_ADDRESSING_STYLE={style!r} is unknown: expected one of {', '.join(ADDRESSING_STYLES)}"
        )
    settings: dict[str, Any] = {
        "s3": {"addressing_style": style},
        "retries": {"mode": "standard", "total_max_attempts": 2 if impatient else 5},
        "connect_timeout": 3,
        "read_timeout": 4 if impatient else 60,
        "max_pool_connections": 40,  # PARALLEL files of a tree, each with several parts in flight
        "user_agent_appid": "palate",
        "signature_version": "s3v4",
    }
    if is_oss:  # OSS rejects the checksums that botocore adds to every request by default
        settings |= {
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
    if options.anonymous or os.environ.get("PALATE_S3_ANONYMOUS"):
        settings["signature_version"] = UNSIGNED
    if is_loopback(options.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or ""):
        settings["proxies"] = {}  # a proxy cannot reach the loopback, but would see the requests and the key id
    core = botocore.session.Session()
    core.register_component("data_loader", _shared_loader())
    session = boto3.session.Session(
        botocore_session=core,
        aws_access_key_id=options.access_key_id,
        aws_secret_access_key=options.secret_access_key,
        aws_session_token=options.session_token,
        region_name=options.region,
    )
    client = session.client("s3", endpoint_url=options.endpoint_url, config=Config(**settings))
    if is_loopback(client.meta.endpoint_url) and "proxies" not in settings:  # the endpoint came from an AWS config file
        settings["proxies"] = {}
        client = session.client("s3", endpoint_url=options.endpoint_url, config=Config(**settings))
    if _is_plain_loopback(client.meta.endpoint_url):
        # Over plain HTTP, botocore hashes every body for its signature, against tampering in transit. On the loopback there is no
        # one to tamper, and the signature still covers the CRC-32 of every body.
        client.meta.config.s3["payload_signing_enabled"] = False  # type: ignore[attr-defined]
    client.meta.events.register_last("before-call.s3", _send_body_at_once, unique_id="palate-no-expect")
    answers = _WholeAnswers(client._endpoint.http_session)  # type: ignore[attr-defined]
    client.meta.events.register("before-send.s3", answers.send, unique_id="palate-whole-answers")
    if is_oss:
        client.meta.events.register("before-call.s3.PutObject", _forbid_overwrite)
    return client


def _send_body_at_once(params: dict[str, Any], **_: object) -> None:
    """Removes `Expect: 100-continue`: if the connection breaks during the response to it, botocore reads forever."""
    params["headers"].pop("Expect", None)


class _WholeHead(HTTPResponse):
    """Raises HTTPException for a response that breaks off within its headers.

    Python treats the headers received so far as complete: a truncated value, or a missing Content-Length and so no content.
    """

    def begin(self) -> None:
        if self.headers is not None:  # already read
            return
        file = self.fp
        lines = _Lines(file)
        self.fp = cast("BufferedReader", lines)
        try:
            super().begin()
        finally:
            if self.fp is lines:  # unless a response without a body was closed by begin()
                self.fp = file
        if lines.last not in (b"\r\n", b"\n"):
            raise RemoteDisconnected("the connection was closed within the headers of the response")
        length = self.headers.get("Content-Length", "0")
        if not (length.isascii() and length.isdigit()):  # Python would ignore it and read until the connection closes
            raise HTTPException(f"invalid Content-Length {length!r}")


class _Lines:
    """Reads lines from a file and remembers the last one."""

    def __init__(self, file: BufferedReader) -> None:
        self._file, self.last = file, b""

    def readline(self, limit: int) -> bytes:
        self.last = self._file.readline(limit)
        return self.last

    def close(self) -> None:
        self._file.close()


class _Connection(AWSHTTPConnection):
    response_class = _WholeHead  # type: ignore[assignment]  # AWSHTTPResponse only handles `Expect`, which is not sent


class _SecureConnection(AWSHTTPSConnection):
    response_class = _WholeHead  # type: ignore[assignment]  # AWSHTTPResponse only handles `Expect`, which is not sent


class _Pool(AWSHTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(AWSHTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class _WholeAnswers:
    """Sends requests; raises ConnectionClosedError, which botocore retries, for a truncated response.

    Args:
        session: HTTP session of the client; must not be shared, because its pool classes are replaced.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        session._pool_classes_by_scheme.update(http=_Pool, https=_SecurePool)

    def send(self, request: Any, **_: object) -> Any:
        answer = self._session.send(request)
        try:
            whole = _is_whole(answer, request)
        except HTTPError as error:  # the body of an error response was truncated
            raise ConnectionClosedError(endpoint_url=request.url.partition("?")[0], error=error) from error
        if not whole:
            answer.raw.close()
            raise ConnectionClosedError(endpoint_url=request.url.partition("?")[0])
        return answer


def _is_whole(answer: Any, request: Any) -> bool:
    """Returns whether the body has Content-Length bytes. Object bodies are read later, and `Transfer.read` checks them."""
    length: str | None = answer.headers.get("Content-Length")
    if length is None:
        return True  # chunked encoding marks its own end; truncated XML fails to parse
    is_read_later = request.stream_output and answer.status_code < 300
    return is_read_later or request.method == "HEAD" or len(answer.content) == int(length)


def _is_plain_loopback(endpoint: str) -> bool:
    return urlsplit(endpoint).scheme == "http" and is_loopback(endpoint)


@cache
def _shared_loader() -> Loader:
    """Caches the parsed API description of S3, a megabyte of JSON that each session would read again."""
    return create_loader()


def _with_oss_defaults(options: StoreOptions) -> StoreOptions:
    region = options.region or next((value for name in _OSS_REGION_VARIABLES if (value := os.environ.get(name))), None)
    endpoint = options.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3")
    if endpoint is None:
        if region is None:
            raise StoreUsageError(
                "oss:// needs a region, such as cn-hangzhou: pass StoreOptions(region=…) or set OSS_REGION"
            )
        endpoint = f"https://s3.oss-{region}.aliyuncs.com"
    key_id, secret, token = options.access_key_id, options.secret_access_key, options.session_token
    if key_id is None and "OSS_ACCESS_KEY_ID" in os.environ and "OSS_ACCESS_KEY_SECRET" in os.environ:
        key_id, secret = os.environ["OSS_ACCESS_KEY_ID"], os.environ["OSS_ACCESS_KEY_SECRET"]
        token = os.environ.get("OSS_SESSION_TOKEN")
    return StoreOptions(
        endpoint_url=endpoint,
        region=region,
        access_key_id=key_id,
        secret_access_key=secret,
        session_token=token,
        addressing_style=options.addressing_style,
        anonymous=options.anonymous,
        unconditional=options.unconditional,
    )


def _forbid_overwrite(params: dict[str, Any], **_: object) -> None:
    """Replaces If-None-Match with OSS's own header, before the request is signed."""
    if params["headers"].pop("If-None-Match", None):
        params["headers"]["x-oss-forbid-overwrite"] = "true"
