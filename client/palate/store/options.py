"""Endpoint and credentials of an object store. Knows settings, no client library."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from palate_recipes.errors import StoreUsageError

ADDRESSING_STYLES = ("auto", "path", "virtual")


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Endpoint and credentials of an object store. None values come from the environment and the AWS config files.

    Attributes:
        endpoint_url: URL of an S3-compatible endpoint, without credentials. Default: AWS_ENDPOINT_URL_S3, else AWS.
        region: Region of the bucket, such as `us-east-1` or `cn-hangzhou`.
        access_key_id: Requires `secret_access_key`.
        secret_access_key: Requires `access_key_id`. Not in the repr.
        session_token: Token of temporary credentials. Not in the repr.
        addressing_style: `path`, `virtual` or `auto`. Default: PALATE_S3_ADDRESSING_STYLE, else chosen by the endpoint.
        anonymous: Send unsigned requests, for public buckets.
        unconditional: Accept an `s3://` server that ignores conditional writes. Palate then compares before it writes, and two
            concurrent writers can both succeed. Default: PALATE_S3_UNCONDITIONAL, else such a server is rejected.

    Raises:
        StoreUsageError: Half a key pair, an endpoint that is not an http(s) URL, an unknown addressing style.
    """

    endpoint_url: str | None = None
    region: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    addressing_style: str | None = None
    anonymous: bool = False
    unconditional: bool = False

    def __post_init__(self) -> None:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            given = "secret_access_key" if self.access_key_id is None else "access_key_id"
            raise StoreUsageError(f"only {given} is given: access_key_id and secret_access_key go together, pass both")
        if self.session_token is not None and self.access_key_id is None:
            raise StoreUsageError("session_token requires access_key_id and secret_access_key: pass all three")
        if self.endpoint_url is not None:
            # The messages omit the value, which may contain a password.
            if not re.match(r"https?://[^/]", self.endpoint_url):
                raise StoreUsageError(
                    "endpoint_url is not an http(s) URL: pass scheme and host, such as https://s3.example.com"
                )
            if "@" in self.endpoint_url:
                raise StoreUsageError(
                    "endpoint_url contains credentials: pass access_key_id and secret_access_key instead"
                )
        if self.addressing_style is not None and self.addressing_style not in ADDRESSING_STYLES:
            raise StoreUsageError(
                f"addressing_style={self.addressing_style!r} is unknown: expected one of {', '.join(ADDRESSING_STYLES)}"
            )

    def environment(self) -> dict[str, str]:
        """Returns these options as environment variables, so that a child process can open the same stores.

        Includes the secrets: only for the environment of a child, never for a manifest or a log.
        """
        variables = {
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_REGION": self.region,  # botocore reads AWS_DEFAULT_REGION, most other SDKs AWS_REGION
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_SESSION_TOKEN": self.session_token,
            # oss:// reads OSS_* first: without these, a value in the parent's environment would override the options.
            "OSS_ACCESS_KEY_ID": self.access_key_id,
            "OSS_ACCESS_KEY_SECRET": self.secret_access_key,
            "OSS_SESSION_TOKEN": self.session_token,
            "OSS_REGION": self.region,
            "PALATE_S3_ANONYMOUS": "1" if self.anonymous else None,
            "PALATE_S3_UNCONDITIONAL": "1" if self.unconditional else None,
            "PALATE_S3_ADDRESSING_STYLE": self.addressing_style,
        }
        return {name: value for name, value in variables.items() if value is not None}
