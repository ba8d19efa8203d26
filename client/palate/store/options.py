"""Where an object store is and who asks. Knows no client library."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from palate_recipes.errors import StoreUsageError

ADDRESSING_STYLES = ("auto", "path", "virtual")


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Endpoint and credentials of an object store. What is None comes from the environment and the AWS files.

    Attributes:
        endpoint_url: URL of an S3-compatible endpoint, no credentials in it. Default: AWS_ENDPOINT_URL_S3,
            else AWS itself.
        region: Region of the bucket, such as `us-east-1` or `cn-hangzhou`.
        access_key_id: Given together with `secret_access_key` or not at all.
        secret_access_key: Never shown.
        session_token: Of temporary credentials; never shown.
        addressing_style: `path`, `virtual` or `auto`. Default: PALATE_S3_ADDRESSING_STYLE, else what suits
            the endpoint.
        anonymous: Sign nothing: for public buckets.
        unconditional: Accept an `s3://` server that ignores conditional writes: compare first, write after. Two writers at the
            same moment can then both win. Default: PALATE_S3_UNCONDITIONAL, else such a server is refused.

    Raises:
        StoreUsageError: Half a key pair, an endpoint that is no http(s) URL, an unknown addressing style.
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
            raise StoreUsageError(f"only {given} is given: access_key_id and secret_access_key go together")
        if self.session_token is not None and self.access_key_id is None:
            raise StoreUsageError("session_token is given without access_key_id and secret_access_key: give all three")
        if self.endpoint_url is not None:
            # Neither message repeats the value: it may hold a password.
            if not re.match(r"https?://[^/]", self.endpoint_url):
                raise StoreUsageError("endpoint_url is no URL: give scheme and host, such as https://s3.example.com")
            if "@" in self.endpoint_url:
                raise StoreUsageError(
                    "endpoint_url holds credentials: give access_key_id and secret_access_key instead"
                )
        if self.addressing_style is not None and self.addressing_style not in ADDRESSING_STYLES:
            raise StoreUsageError(
                f"addressing_style={self.addressing_style!r} is unknown: give one of {ADDRESSING_STYLES}"
            )

    def environment(self) -> dict[str, str]:
        """Returns what is given here as environment variables: another process then opens the same stores.

        The values hold the secrets: for a child's environment only, never for a manifest or a log.
        """
        variables = {
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_REGION": self.region,  # botocore reads AWS_DEFAULT_REGION, most other SDKs AWS_REGION
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_SESSION_TOKEN": self.session_token,
            # The same for oss://, which reads these first: what stands in the environment must not win over what was given.
            "OSS_ACCESS_KEY_ID": self.access_key_id,
            "OSS_ACCESS_KEY_SECRET": self.secret_access_key,
            "OSS_SESSION_TOKEN": self.session_token,
            "OSS_REGION": self.region,
            "PALATE_S3_ANONYMOUS": "1" if self.anonymous else None,
            "PALATE_S3_UNCONDITIONAL": "1" if self.unconditional else None,
            "PALATE_S3_ADDRESSING_STYLE": self.addressing_style,
        }
        return {name: value for name, value in variables.items() if value is not None}
