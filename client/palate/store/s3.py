"""A store in an S3 bucket: AWS, compatible servers, Alibaba OSS. Knows boto3, never a job.

Importing this module imports boto3, so `open_store` does it only for `s3://` and `oss://`.

OSS differs from S3 in three ways: virtual-hosted addressing only, no aws-chunked checksum trailers, and no conditional
headers on puts (it returns NotImplemented). Its own header `x-oss-forbid-overwrite` replaces If-None-Match. Nothing
replaces If-Match, so on OSS the etag is compared before the put.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

from palate.store.base import Keys, ObjectInfo, Store, check_condition, check_not_root, check_range
from palate.store.local import in_parallel
from palate.store.options import StoreOptions
from palate.store.uri import RESERVED, check_key, check_prefix, is_reserved
from palate_recipes.errors import BucketNotFoundError, ObjectNotFoundError, PreconditionFailedError, StoreError

try:
    import boto3.exceptions
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    from palate.store.s3_client import connect
    from palate.store.s3_errors import code_of, explain
    from palate.store.s3_transfer import CRC, Transfer, etag_of, understood
except ImportError as missing:
    from palate_recipes.errors import MissingDependencyError

    raise MissingDependencyError(
        f"s3:// and oss:// stores need boto3 and zlib-ng ({missing}): pip install 'palate[s3]'"
    ) from missing

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import HeadObjectOutputTypeDef

_PROBE = f"{RESERVED}check"
_CONFLICT_ATTEMPTS = 5


class S3Store(Store):
    """Objects below a prefix of a bucket.

    Args:
        root: `s3://bucket/prefix` or `oss://bucket/prefix`, in the form that `normal_uri` returns.
        options: Endpoint and credentials.

    Raises:
        StoreUsageError: The options are invalid, such as an `oss://` root with neither region nor endpoint.
    """

    def __init__(self, root: str, options: StoreOptions) -> None:
        super().__init__(root)
        scheme, _, rest = root.partition("://")
        self._bucket, _, prefix = rest.partition("/")
        self._prefix = prefix + "/" if prefix else ""
        self._options = options
        self._is_oss = scheme == "oss"
        self._is_unconditional = not self._is_oss and (
            options.unconditional or bool(os.environ.get("PALATE_S3_UNCONDITIONAL"))
        )
        self.atomic_replace = not self._is_oss and not self._is_unconditional
        # The bucket and its conditional writes are tested once per store: each test costs a request or more.
        self._bucket_seen = False
        self._conditions_seen = not self.atomic_replace
        self._endpoint = options.endpoint_url or "the default endpoint"  # for errors before there is a client
        with self._explained("opened", ""):
            self._client: S3Client = connect(options, is_oss=self._is_oss)
        self._endpoint = self._client.meta.endpoint_url
        self._transfer = Transfer(self._client, self._bucket, checksums=not self._is_oss)

    def __repr__(self) -> str:
        return f"S3Store({self.root!r}, endpoint={self._endpoint!r})"

    def get(self, key: str) -> bytes:
        with self._explained("read", key):
            return self._transfer.read(self._full(key)).data

    def get_range(self, key: str, start: int, length: int | None = None) -> bytes:
        check_range(key, start, length)
        with self._explained("read", key):
            return self._transfer.read(self._full(key), start, length).data

    def put(
        self,
        key: str,
        data: bytes,
        *,
        if_match: str | None = None,
        if_none_match: bool = False,
        private: bool = False,
    ) -> str:
        check_condition(key, if_match, if_none_match)
        full = self._full(key)
        if (if_none_match or if_match is not None) and not self._conditions_seen:
            self._require_conditions(self._client)
        conditions: dict[str, str] = {}
        # Where the server has no such condition, compare here. Another writer can get in between this and the put:
        # `atomic_replace` is False then.
        if if_none_match and not self._is_unconditional:
            conditions["IfNoneMatch"] = "*"  # for OSS, s3_client translates it
        elif if_none_match:
            if self.stat(key) is not None:
                raise self._lost(key)
        elif if_match is not None and self.atomic_replace:
            conditions["IfMatch"] = f'"{if_match}"'
        elif if_match is not None:
            info = self.stat(key)
            if info is None or info.etag != if_match:
                raise self._lost(key)
        for attempt in range(_CONFLICT_ATTEMPTS):
            with self._explained("written", key):
                try:
                    etag = self._transfer.write(full, data, **conditions)
                except ClientError as error:
                    code, status = code_of(error)
                    # AWS: another conditional put of this key is in progress, and neither has succeeded yet.
                    if code == "ConditionalRequestConflict" and attempt < _CONFLICT_ATTEMPTS - 1:
                        continue
                    lost = (
                        status == 412 or code == "FileAlreadyExists" or (if_match is not None and code == "NoSuchKey")
                    )
                    if not lost:
                        raise
                    # botocore may have retried a put that had succeeded: it then fails on our own object.
                    if error.response["ResponseMetadata"].get("RetryAttempts") and (
                        written := self._etag_if_equal(key, data)
                    ):
                        return written  # the first try succeeded and its response was lost
                    raise self._lost(key) from error
                return _plain(etag)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def stat(self, key: str) -> ObjectInfo | None:
        head = self._head(key)
        if head is None:
            return None
        with self._explained("read", key), understood():
            return ObjectInfo(
                key=key,
                size=head["ContentLength"],
                etag=_plain(etag_of(head)),
                modified_s=head["LastModified"].timestamp(),
            )

    def checksum(self, key: str) -> str | None:
        head = self._head(key)
        return None if head is None else head["Metadata"].get(CRC)

    def delete(self, key: str) -> None:
        try:
            with self._explained("deleted", key):
                self._client.delete_object(Bucket=self._bucket, Key=self._full(key))
        except ObjectNotFoundError:  # AWS returns 204, some servers 404
            pass

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        # Web consoles create folders as empty objects whose key ends with a slash.
        return (info for info in self._all(prefix) if not info.key.endswith("/") and not is_reserved(info.key))

    def list_children(self, prefix: str = "") -> Keys:
        below = self._prefix + check_prefix(prefix)
        with self._explained("listed", prefix), understood():
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=below, Delimiter="/"
            )
            found = [entry["Prefix"] for page in pages for entry in page.get("CommonPrefixes", [])]
        names = (name.removeprefix(below).removesuffix("/") for name in found)
        return sorted(name for name in names if name and not is_reserved(name))

    def delete_tree(self, prefix: str) -> None:
        check_not_root(prefix)

        # One request per object: OSS requires a Content-MD5 for DeleteObjects, and botocore no longer sends one.
        def delete(key: str) -> None:
            with self._explained("deleted", prefix):
                self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)

        in_parallel(delete, [info.key for info in self._all(prefix)])

    def upload(self, path: str | os.PathLike[str], key: str, *, moved: Callable[[int], object] | None = None) -> None:
        if not os.path.isfile(path):
            raise ObjectNotFoundError(
                f"{os.fspath(path)} is not a local file: nothing to upload to {self.uri(key)}. Check the path"
            )
        full = self._full(key)
        with self._explained("written", key):
            self._transfer.send(path, full, moved or (lambda _: None))

    def _fetch(self, key: str, target: Path, moved: Callable[[int], object]) -> None:
        try:
            with self._explained("read", key):
                what = f"{self.uri(key)} at {self._endpoint} is damaged"
                self._transfer.fetch(self._full(key), target, moved, what=what)
        except ObjectNotFoundError:
            self._require_bucket()
            raise

    def check(self, *, write: bool = True) -> None:
        with self._explained("used", ""):
            client = connect(self._options, is_oss=self._is_oss, impatient=True)
            client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        self._bucket_seen = True
        if not write:
            return
        if self._conditions_seen:
            with self._probe(client):
                pass
        else:
            self._require_conditions(client)

    # ── inside ─────────────────────────────────────────────────────────────────────────────────────────────

    def _full(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _head(self, key: str) -> HeadObjectOutputTypeDef | None:
        try:
            with self._explained("read", key), understood():
                return self._client.head_object(Bucket=self._bucket, Key=self._full(key))
        except ObjectNotFoundError:
            self._require_bucket()
            return None

    def _all(self, prefix: str) -> Iterator[ObjectInfo]:
        below = self._prefix + check_prefix(prefix)
        found = []
        with self._explained("listed", prefix), understood():
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=below):
                for entry in page.get("Contents", []):
                    info = ObjectInfo(
                        key=entry["Key"].removeprefix(self._prefix),
                        size=entry["Size"],
                        etag=_plain(etag_of(entry)),
                        modified_s=entry["LastModified"].timestamp(),
                    )
                    found.append(info)
        # `list` promises an order by key. AWS sorts by bytes, SeaweedFS by folder.
        yield from sorted(found, key=lambda info: info.key)

    def _etag_if_equal(self, key: str, data: bytes) -> str | None:
        piece = self._transfer.read(self._full(key))
        return _plain(piece.etag) if piece.data == data else None

    def _require_bucket(self) -> None:
        """Raises BucketNotFoundError if the bucket does not exist: the 404 to a HEAD does not tell it from an object."""
        if self._bucket_seen:
            return
        try:
            with self._explained("listed", ""):
                self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        except BucketNotFoundError:
            raise
        except StoreError:
            pass  # without permission to list, the bucket's existence is unknown: keep the 404 of the object
        self._bucket_seen = True

    @contextmanager
    def _probe(self, client: S3Client) -> Iterator[str]:
        """Writes an object and deletes it at the end; yields its key in the bucket, which is unique."""
        probe = f"{self._prefix}{_PROBE}-{token_hex(8)}"
        with self._explained("written", ""):
            client.put_object(Bucket=self._bucket, Key=probe, Body=b"")
        try:
            yield probe
        finally:
            with self._explained("deleted", ""):
                client.delete_object(Bucket=self._bucket, Key=probe)

    def _require_conditions(self, client: S3Client) -> None:
        """Raises StoreError if the server accepts a put whose condition is not met. Tested once per store.

        Records rely on conditional writes: two writers of one status must not both succeed.
        """
        ignored = []
        with self._probe(client) as probe:
            for header, condition in (
                ("If-None-Match", {"IfNoneMatch": "*"}),
                ("If-Match", {"IfMatch": f'"{"0" * 32}"'}),
            ):
                with self._explained("written", ""):
                    try:
                        client.put_object(Bucket=self._bucket, Key=probe, Body=b"", **condition)  # type: ignore[arg-type]
                        ignored.append(header)
                    except ClientError as error:
                        code, status = code_of(error)
                        if code == "NotImplemented" or status == 501:
                            ignored.append(header)
                        elif status not in (409, 412):
                            raise
        if ignored:
            raise StoreError(
                f"{self.root} at {self._endpoint} ignores {' and '.join(ignored)}: two racing writers would both succeed, so it is "
                "not safe for jobs and services. Use a server that enforces conditional writes (AWS S3, SeaweedFS, MinIO). If only "
                "one client and one run write there at a time, set PALATE_S3_UNCONDITIONAL=1 or pass "
                "StoreOptions(unconditional=True): see docs/stores.md"
            )
        self._conditions_seen = True

    def _lost(self, key: str) -> PreconditionFailedError:
        return PreconditionFailedError(
            f"{self.uri(key)} at {self._endpoint} was not written: another writer changed it first; read it again"
        )

    @contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        """Turns exceptions of boto3 into a StoreError with URI, endpoint, cause and remedy."""
        try:
            yield
        except (BotoCoreError, ClientError, ResponseParserError, boto3.exceptions.Boto3Error) as error:
            what = f"{self.uri(key)} at {self._endpoint} cannot be {verb}"
            raise explain(error, what=what, bucket=self._bucket, options=self._options) from error


def _plain(etag: str) -> str:
    return etag.strip('"')
