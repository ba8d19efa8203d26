"""Says what boto3's exceptions mean in Palate's words: kind, cause, remedy. Sends nothing."""

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
    """An answer lacks a value, or has one in another form than S3's."""

    fmt = "{problem}"


def code_of(error: botocore.ClientError) -> tuple[str, int]:
    """Returns the server's error code and the HTTP status."""
    answer = error.response
    return answer.get("Error", {}).get("Code", ""), answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def explain(error: Exception, *, what: str, bucket: str, options: StoreOptions) -> StoreError:
    """Returns the StoreError that stands for an exception of boto3.

    Args:
        error: As caught; one that boto3 wrapped around another is unwrapped.
        what: Beginning of the message: URI, endpoint and what was tried.
        bucket: Named where it is the bucket that is missing.
        options: Their secrets are taken out of the message, should a server echo one.
    """
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
            f"no usable credentials ({said}). Give access keys to the session, set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY (OSS_* for oss://), or ask for anonymous access to a public bucket"
        )
    if isinstance(error, botocore.SSLError):
        return (
            StoreUnreachableError,
            f"{said}. Check https:// in the endpoint, or name the CA with AWS_CA_BUNDLE",
        )
    if isinstance(error, _BROKEN_CONNECTION):
        return (
            StoreUnreachableError,
            f"{said}. Check the endpoint, the network and proxy settings, and that the server runs",
        )
    if isinstance(error, MalformedAnswerError | ResponseParserError):
        return StoreError, f"{said}. Check that the endpoint is one of S3 and that no proxy changes its answers"
    if isinstance(error, botocore.ParamValidationError | botocore.InvalidRegionError | botocore.NoRegionError):
        return StoreUsageError, f"{said}. Check the bucket's name and the region"
    return StoreError, f"{said}. Check endpoint, region and AWS settings"


def _answer_meaning(error: botocore.ClientError, bucket: str) -> tuple[type[StoreError], str]:
    code, status = code_of(error)
    said = error.response.get("Error", {}).get("Message", "").rstrip(". ")
    cause = f"{code}: {said}" if said and said != code else code or f"HTTP {status}"
    if code == "NoSuchBucket":
        return (
            BucketNotFoundError,
            f"bucket {bucket!r} is not there. Create it, or check its name, region and endpoint",
        )
    if code in _WRONG_REGION or status in (301, 307):
        return (
            StoreError,
            f"{cause}. The bucket is in another region: set the region (AWS_DEFAULT_REGION) or the endpoint",
        )
    if status == 404:
        return ObjectNotFoundError, f"no such object ({cause}). Check the name, or wait until it is written"
    if status == 412:
        return PreconditionFailedError, f"{cause}. Somebody else wrote it first: read it again"
    if code in _CLOCK:
        return StoreDeniedError, f"{cause}. Set this machine's clock"
    if code in _EXPIRED:
        return StoreDeniedError, f"{cause}. Get new temporary credentials"
    if code in _WRONG_KEY:
        return (
            StoreDeniedError,
            f"{cause}. Check access key id and secret access key, and that they belong to this endpoint",
        )
    if status in (401, 403):
        return StoreDeniedError, (
            f"{cause}. Check the credentials, and that they may list, read, write and delete here (who may "
            "not list gets this answer for a missing object, too)"
        )
    if status >= 500 or code in ("SlowDown", "RequestTimeout", "Throttling"):
        return (
            StoreUnreachableError,
            f"{cause} (HTTP {status}), after retries. Try again later, or check the server",
        )
    return StoreError, f"{cause} (HTTP {status}). Check bucket, endpoint and region"
