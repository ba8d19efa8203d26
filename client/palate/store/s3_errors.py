"""Maps boto3's exceptions to StoreErrors with a cause and a remedy. Sends no requests."""

from __future__ import annotations

from botocore import exceptions as botocore
from botocore.parsers import ResponseParserError

from palate.store.options import StoreOptions
from palate_recipes.errors import (
    BucketNotFoundError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StoreDeniedError,
    StoreError,
    StoreUnreachableError,
    StoreUsageError,
)

_WRONG_KEY = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidSecurity", "NoSuchAccessKey"}
_EXPIRED = {
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "SecurityTokenExpired",
    "InvalidSecurityToken",
}
_CLOCK = {"RequestTimeTooSkewed", "RequestExpired"}
_WRONG_REGION = {
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "301",
    "307",
}

_NO_CREDENTIALS = (
    botocore.NoCredentialsError,
    botocore.PartialCredentialsError,
    botocore.CredentialRetrievalError,
    botocore.ProfileNotFound,
    botocore.TokenRetrievalError,
    botocore.SSOError,
    botocore.UnauthorizedSSOTokenError,
)
_BROKEN_CONNECTION = (
    botocore.ConnectionError,
    botocore.HTTPClientError,
    botocore.IncompleteReadError,
    botocore.ResponseStreamingError,
)


class MalformedAnswerError(botocore.BotoCoreError):
    """A response lacks a value, or has one that is not in S3's form."""

    fmt = "{problem}"


def code_of(error: botocore.ClientError) -> tuple[str, int]:
    """Returns the server's error code and the HTTP status."""
    answer = error.response
    return answer.get("Error", {}).get("Code", ""), answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def explain(error: Exception, *, what: str, bucket: str, options: StoreOptions) -> StoreError:
    """Returns the StoreError for an exception of boto3.

    Args:
        error: The caught exception; if boto3 wrapped another one, it is unwrapped.
        what: Start of the message: URI, endpoint and the operation.
        bucket: Named in the message if the bucket does not exist.
        options: Their secrets are removed from the message, in case a server echoes one.
    """
    # boto3's own exceptions have no code or status; the botocore exception below them has.
    while not isinstance(error, botocore.ClientError | botocore.BotoCoreError | ResponseParserError) and isinstance(
        error.__cause__ or error.__context__, Exception
    ):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]  # an Exception, by the line above
    kind, cause = _meaning(error, bucket)
    message = f"{what}: {cause}"
    for secret in (options.secret_access_key, options.session_token):
        if secret:
            message = message.replace(secret, "***")
    return kind(message)


def _meaning(error: Exception, bucket: str) -> tuple[type[StoreError], str]:
    if isinstance(error, botocore.ClientError):
        return _answer_meaning(error, bucket)
    said = str(error).rstrip(".")
    if isinstance(error, _NO_CREDENTIALS):
        return StoreDeniedError, (
            f"no usable credentials ({said}). Pass StoreOptions with access keys, set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY (OSS_* for oss://), or use StoreOptions(anonymous=True) for a public bucket"
        )
    if isinstance(error, botocore.SSLError):
        return (
            StoreUnreachableError,
            f"{said}. Check https:// in the endpoint, or set AWS_CA_BUNDLE to the CA file",
        )
    if isinstance(error, _BROKEN_CONNECTION):
        return (
            StoreUnreachableError,
            f"{said}. Check the endpoint, the network and proxy settings, and that the server is running",
        )
    if isinstance(error, MalformedAnswerError | ResponseParserError):
        return StoreError, f"{said}. Check that the endpoint is an S3 endpoint and that no proxy changes its responses"
    if isinstance(error, botocore.ParamValidationError | botocore.InvalidRegionError | botocore.NoRegionError):
        return StoreUsageError, f"{said}. Check the bucket's name and the region"
    return StoreError, f"{said}. Check the endpoint, the region and the AWS settings"


def _answer_meaning(error: botocore.ClientError, bucket: str) -> tuple[type[StoreError], str]:
    code, status = code_of(error)
    said = error.response.get("Error", {}).get("Message", "").rstrip(". ")
    cause = f"{code}: {said}" if said and said != code else code or f"HTTP {status}"
    if code == "NoSuchBucket":
        return (
            BucketNotFoundError,
            f"bucket {bucket!r} does not exist. Create it, or check its name, region and endpoint",
        )
    if code in _WRONG_REGION or status in (301, 307):
        return (
            StoreError,
            f"{cause}. The bucket is in another region: set the region (AWS_DEFAULT_REGION) or the endpoint",
        )
    if status == 404:
        return ObjectNotFoundError, f"no such object ({cause}). Check the name, or wait until it is written"
    if status == 412:
        return PreconditionFailedError, f"{cause}. Another writer changed it first: read it again"
    # Before the status: these come with 400 or 403, and a check of permissions would not help.
    if code in _CLOCK:
        return StoreDeniedError, f"{cause}. Correct this machine's clock"
    if code in _EXPIRED:
        return StoreDeniedError, f"{cause}. Get new temporary credentials"
    if code in _WRONG_KEY:
        return (
            StoreDeniedError,
            f"{cause}. Check the access key id and secret access key, and that they belong to this endpoint",
        )
    if status in (401, 403):
        return StoreDeniedError, (
            f"{cause}. Check that the credentials are allowed to list, read, write and delete here (without "
            "permission to list, a missing object gives this error too)"
        )
    if status >= 500 or code in ("SlowDown", "RequestTimeout", "Throttling"):
        return (
            StoreUnreachableError,
            f"{cause} (HTTP {status}), after retries. Try again later, or check the server",
        )
    return StoreError, f"{cause} (HTTP {status}). Check the bucket, the endpoint and the region"
