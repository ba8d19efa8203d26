"""Makes boto3 clients for S3 and OSS endpoints. Knows options and environment, no bucket and no key."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any

import boto3.session
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.loaders import Loader, create_loader

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
    if is_oss:
        client.meta.events.register("before-call.s3.PutObject", _forbid_overwrite)
    return client


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
