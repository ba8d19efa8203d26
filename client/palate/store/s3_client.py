"""Makes boto3 clients for S3 and OSS endpoints. Knows options and environment, no bucket and no key."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3.session
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ConnectionClosedError
from botocore.loaders import Loader, create_loader

from palate.connection import is_loopback
from palate.store.errors import StoreUsageError
from palate.store.options import ADDRESSING_STYLES, StoreOptions

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_OSS_REGION_VARIABLES = ("OSS_REGION", "ALIBABA_CLOUD_REGION_ID", "AWS_REGION", "AWS_DEFAULT_REGION")


def connect(options: StoreOptions, *, is_oss: bool, impatient: bool = False) -> S3Client:
    """Returns a client; sends nothing to the store.

    Args:
        options: What is None comes from boto3's own chain: environment, AWS files, the machine's role.
        is_oss: Follow Alibaba OSS's ways; OSS_ACCESS_KEY_ID and OSS_ACCESS_KEY_SECRET come before that chain.
        impatient: Give up within about ten seconds; for checks. Otherwise an unreachable endpoint costs some
            20 seconds, and one that accepts and stays silent five minutes.

    Raises:
        StoreUsageError: An OSS store with neither region nor endpoint, or an unknown addressing style in the
            environment.
    """
    options = _with_oss_defaults(options) if is_oss else options
    style = (
        options.addressing_style or os.environ.get("PALATE_S3_ADDRESSING_STYLE") or ("virtual" if is_oss else "auto")
    )
    if style not in ADDRESSING_STYLES:
        raise StoreUsageError(
            f"PALATE_S3_ADDRESSING_STYLE={style!r} is unknown: set one of {', '.join(ADDRESSING_STYLES)}"
        )
    settings: dict[str, Any] = {
        "s3": {"addressing_style": style},
        "retries": {"mode": "standard", "total_max_attempts": 2 if impatient else 5},
        "connect_timeout": 3,
        "read_timeout": 4 if impatient else 60,
        "max_pool_connections": 40,  # PARALLEL files of a tree, each in several parts
        "user_agent_appid": "palate",
        "signature_version": "s3v4",  # presigned links would be signed in S3's first, retired way
    }
    if is_oss:
        settings |= {
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
    if options.anonymous or os.environ.get("PALATE_S3_ANONYMOUS"):
        settings["signature_version"] = UNSIGNED
    if is_loopback(options.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or ""):
        settings["proxies"] = {}  # none leads there; it would see who is asked for what, and with which key
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
    if is_loopback(client.meta.endpoint_url) and "proxies" not in settings:  # it came from a file
        settings["proxies"] = {}
        client = session.client("s3", endpoint_url=options.endpoint_url, config=Config(**settings))
    if _is_plain_loopback(client.meta.endpoint_url):
        # Over plain HTTP every body is hashed for its signature, against those on the way; on the loopback there is nobody. Every
        # body still has its CRC-32, under the signature.
        client.meta.config.s3["payload_signing_enabled"] = False  # type: ignore[attr-defined]
    client.meta.events.register_last("before-call.s3", _send_body_at_once, unique_id="palate-no-expect")
    answers = _WholeAnswers(client._endpoint.http_session)  # type: ignore[attr-defined]
    client.meta.events.register("before-send.s3", answers.send, unique_id="palate-whole-answers")
    if is_oss:
        client.meta.events.register("before-call.s3.PutObject", _forbid_overwrite)
    return client


def _send_body_at_once(params: dict[str, Any], **_: object) -> None:
    """Sends no `Expect: 100-continue`: a connection that breaks off in the answer to that lets botocore read for ever."""
    params["headers"].pop("Expect", None)


_ALWAYS_SAID = {
    "GetObject": ("ETag", "Last-Modified"),
    "HeadObject": ("ETag", "Last-Modified", "Content-Length"),
    "PutObject": ("ETag",),
    "UploadPart": ("ETag",),
}


class _WholeAnswers:
    """Sends requests, and raises ConnectionClosedError, which is tried again, for an answer that broke off.

    Python takes headers that break off for all that there are. Without its Content-Length a body that never came then counts as
    an empty one: a folder without files, an object without content.
    """

    def __init__(self, session: Any) -> None:
        self._session = session

    def send(self, request: Any, event_name: str, **_: object) -> Any:
        answer = self._session.send(request)
        if answer.status_code < 300 and answer.status_code != 204 and not _is_whole(answer, request, event_name):
            answer.raw.close()
            raise ConnectionClosedError(endpoint_url=request.url.partition("?")[0])
        return answer


def _is_whole(answer: Any, request: Any, event_name: str) -> bool:
    said: Mapping[str, str] = answer.headers
    length = said.get("Content-Length")
    if length is None and "Transfer-Encoding" not in said and said.get("Connection", "").lower() != "close":
        return False
    for name in _ALWAYS_SAID.get(event_name.rpartition(".")[2], ()):
        value = said.get(name, "")
        if (
            not value
            or (name == "ETag" and not value.endswith('"'))
            or (name == "Last-Modified" and value[-3:] != "GMT")
        ):
            return False
    # Of an object the reader counts the bytes.
    return length is None or request.stream_output or request.method == "HEAD" or len(answer.content) == int(length)


def _is_plain_loopback(endpoint: str) -> bool:
    return urlsplit(endpoint).scheme == "http" and is_loopback(endpoint)


@cache
def _shared_loader() -> Loader:
    """Keeps S3's API description, a megabyte of JSON, parsed: each session would read it anew."""
    return create_loader()


def _with_oss_defaults(options: StoreOptions) -> StoreOptions:
    region = options.region or next((value for name in _OSS_REGION_VARIABLES if (value := os.environ.get(name))), None)
    endpoint = options.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3")
    if endpoint is None:
        if region is None:
            raise StoreUsageError(
                "oss:// needs a region, such as cn-hangzhou: give StoreOptions(region=…) or set OSS_REGION"
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
    )


def _forbid_overwrite(params: dict[str, Any], **_: object) -> None:
    """Says If-None-Match in OSS's own words, before the request is signed."""
    if params["headers"].pop("If-None-Match", None):
        params["headers"]["x-oss-forbid-overwrite"] = "true"
