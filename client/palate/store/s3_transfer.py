"""Transfers the bytes of objects with an S3 client: in parts, concurrently, with retries. Knows bucket keys, no Palate key.

Every object has the CRC-32 of its content in its metadata, and downloads are compared with it. A part is one `bytes`
object, sent or received at once. boto3's own transfer uses small blocks and a queue: it takes 1.3 to 1.5 times the CPU time
for small files and up to four times the memory for a large one (benchmarks/RESULTS.md). It does not notice a file that
changes during its upload, or an upload that was completed although the response was lost. The number of parts in memory is
bounded per store.
"""

from __future__ import annotations

import base64
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import TYPE_CHECKING, Any

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    ResponseStreamingError,
)
from urllib3.exceptions import HTTPError
from zlib_ng.zlib_ng import crc32, crc32_combine

from palate.store.local import in_parallel, spelled
from palate.store.s3_errors import MalformedAnswerError, code_of
from palate_recipes.errors import DigestMismatchError, StoreError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, GetObjectOutputTypeDef

PART = 8 << 20
"""Bytes per part. Larger parts measured no faster, and allow less concurrency for the same memory."""

_PARTS_AT_A_TIME = 4
_PARTS_IN_MEMORY = 8
_WRITE_BLOCK = 256 << 10
_MOST_PARTS = 10_000  # S3's limit per upload
_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.4
_BROKEN_OFF = (
    HTTPClientError,
    IncompleteReadError,
    FlexibleChecksumError,
)  # botocore does not retry while a body is read

CRC = "palate-crc32"
"""Name of the metadata entry with an object's CRC-32."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A range of an object, and the response's metadata of the whole object.

    Attributes:
        data: The bytes.
        total: Size of the whole object in bytes.
        etag: Of the version that the bytes are from, in quotes.
        crc: CRC-32 recorded at the upload, as hex digits; None if not recorded.
    """

    data: bytes
    total: int
    etag: str
    crc: str | None


@contextmanager
def understood() -> Iterator[None]:
    """Raises MalformedAnswerError for a response that lacks a value or has one that is not in S3's form.

    For such a value, botocore's parser raises Python's own exceptions, such as ValueError.
    """
    try:
        yield
    except (BotoCoreError, StoreError):  # some of them are also a ValueError
        raise
    except (KeyError, ValueError, TypeError) as error:
        lacks = isinstance(error, KeyError)
        problem = f"the response lacks {error.args[0]}" if lacks else f"the response has a malformed value ({error})"
        raise MalformedAnswerError(problem=problem) from error


def etag_of(answer: Mapping[str, Any]) -> str:
    """Returns the etag of a response, in quotes. Raises KeyError or ValueError if it has none."""
    if not answer["ETag"].strip('"'):
        raise ValueError("an empty ETag")
    return str(answer["ETag"])


class Transfer:
    """Reads and writes the objects of one bucket; raises botocore's exceptions. Thread-safe.

    Args:
        client: A boto3 client.
        bucket: Name of the bucket.
        checksums: Also let the server verify each part's CRC-32; Alibaba OSS rejects these headers.
    """

    def __init__(self, client: S3Client, bucket: str, *, checksums: bool) -> None:
        self._client, self._bucket, self._checksums = client, bucket, checksums
        self._room = BoundedSemaphore(_PARTS_IN_MEMORY)

    # ── down ───────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, full: str, start: int = 0, length: int | None = None, *, etag: str | None = None) -> Piece:
        """Returns `length` bytes from `start` (all by default), of the version `etag` if given.

        A truncated response is requested again, up to five attempts, with exponential backoff and jitter.
        """
        wanted: dict[str, Any] = {"IfMatch": etag} if etag else {}
        if start or length is not None:
            wanted["Range"] = f"bytes={start}-{'' if length is None else start + length - 1}"
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with understood():
                    answer = self._client.get_object(Bucket=self._bucket, Key=full, **wanted)
            except ClientError as error:
                if code_of(error)[1] != 416:
                    raise
                # S3 returns 416 for any range of an empty object, and for one past the end: that is an empty range here.
                with understood():
                    head = self._client.head_object(Bucket=self._bucket, Key=full)
                    return Piece(
                        data=b"", total=head["ContentLength"], etag=etag_of(head), crc=head["Metadata"].get(CRC)
                    )
            try:
                with understood():
                    return _piece(answer, start, length)
            except (*_BROKEN_OFF, HTTPError) as error:
                if attempt == _ATTEMPTS:
                    raise error if isinstance(error, BotoCoreError) else ResponseStreamingError(error=error) from error
                time.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def fetch(self, full: str, target: Path, moved: Callable[[int], object], *, what: str) -> None:
        """Writes an object to the file `target` and compares it with the recorded CRC-32.

        Args:
            full: Key of the object in the bucket.
            target: A new file name.
            moved: Called with the number of bytes of each part that was received.
            what: Start of the message if the bytes differ.

        Raises:
            DigestMismatchError: The bytes differ, also after a second download.
        """
        for _ in range(2):  # once more: the damage may be in transit and not in the object
            counted = _Counted(moved)
            found, recorded = self._fetch_once(full, target, counted)
            if recorded is None or spelled(found) == recorded:
                return
            counted.take_back()
        raise DigestMismatchError(
            f"{what}: its content has CRC-32 {spelled(found)}, but {recorded} was recorded at the upload. "
            "The object was damaged in storage or in transit: upload it again"
        )

    def _fetch_once(self, full: str, target: Path, moved: Callable[[int], object]) -> tuple[int, str | None]:
        """Returns the CRC-32 of the received bytes and the recorded one."""
        # The first part also gives size and etag: a small object takes one request.
        with self._room:
            first = self.read(full, 0, PART)
            with target.open("wb") as file:
                file.write(first.data)
            got, crc = len(first.data), crc32(first.data)
            total, etag, recorded = first.total, first.etag, first.crc
            del first  # frees the part's memory before the others are read
        moved(got)
        starts = range(got, total, PART) if got else ()
        sums: dict[int, tuple[int, int]] = {}
        descriptor = os.open(target, os.O_WRONLY)
        try:

            def fetch(start: int) -> None:
                with self._room:
                    # If-Match: parts of two versions must never be combined.
                    data = self.read(full, start, min(PART, total - start), etag=etag).data
                    _write_at(descriptor, data, start)
                    sums[start] = crc32(data), len(data)
                moved(sums[start][1])

            if starts:
                in_parallel(fetch, starts, threads=_PARTS_AT_A_TIME)
        finally:
            os.close(descriptor)
        for start in starts:
            crc = crc32_combine(crc, *sums[start])
        return crc, recorded

    # ── up ─────────────────────────────────────────────────────────────────────────────────────────────────

    def write(self, full: str, data: bytes, **conditions: str) -> str:
        """Puts an object in one request and returns its etag, in quotes."""
        crc = crc32(data)
        with understood():
            answer = self._client.put_object(
                Bucket=self._bucket,
                Key=full,
                Body=data,
                Metadata={CRC: spelled(crc)},
                **self._checksum(crc),
                **conditions,  # type: ignore[arg-type]  # IfMatch or IfNoneMatch
            )
            return etag_of(answer)

    def send(self, path: str | os.PathLike[str], full: str, moved: Callable[[int], object]) -> None:
        """Uploads a file; it becomes visible when it is complete, and an error leaves no parts behind.

        Raises:
            StoreError: The file changed during the upload.
            OSError: The file cannot be read.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            if size <= PART:
                with self._room:
                    self.write(full, _read_at(descriptor, 0, size, path))
                moved(size)
            else:
                self._send_parts(descriptor, path, size, full, moved)
        finally:
            os.close(descriptor)

    def _send_parts(
        self, descriptor: int, path: str | os.PathLike[str], size: int, full: str, moved: Callable[[int], object]
    ) -> None:
        part = max(PART, -(-size // _MOST_PARTS))
        starts = range(0, size, part)
        sums: dict[int, int] = {}

        def weigh(start: int) -> None:  # before the upload, because S3 takes metadata only when the upload is created
            with self._room:
                sums[start] = crc32(_read_at(descriptor, start, min(part, size - start), path))

        in_parallel(weigh, starts, threads=_PARTS_AT_A_TIME)
        whole = 0
        for start in starts:
            whole = crc32_combine(whole, sums[start], min(part, size - start))
        asked: dict[str, Any] = {"ChecksumAlgorithm": "CRC32"} if self._checksums else {}
        with understood():
            upload = self._client.create_multipart_upload(
                Bucket=self._bucket, Key=full, Metadata={CRC: spelled(whole)}, **asked
            )["UploadId"]
        done: dict[int, CompletedPartTypeDef] = {}

        def send(start: int) -> None:
            with self._room:
                data = _read_at(descriptor, start, min(part, size - start), path)
                if crc32(data) != sums[start]:  # the metadata of the upload would be wrong
                    raise _changed(path)
                number, checksum = start // part + 1, self._checksum(sums[start])
                with understood():
                    answer = self._client.upload_part(
                        Bucket=self._bucket, Key=full, UploadId=upload, PartNumber=number, Body=data, **checksum
                    )
                    done[number] = {"PartNumber": number, "ETag": etag_of(answer)}
            if self._checksums:
                done[number]["ChecksumCRC32"] = checksum["ChecksumCRC32"]
            moved(len(data))

        try:
            in_parallel(send, starts, threads=_PARTS_AT_A_TIME)
            try:
                with understood():
                    self._client.complete_multipart_upload(
                        Bucket=self._bucket,
                        Key=full,
                        UploadId=upload,
                        MultipartUpload={"Parts": [done[number] for number in sorted(done)]},
                    )
            except ClientError as error:
                if code_of(error)[0] != "NoSuchUpload" or not self._is_there(full, size, whole):
                    raise  # otherwise an earlier request completed the upload, and its response was lost
        except BaseException:  # KeyboardInterrupt too: the bucket bills for parts until they are aborted
            self._abort(full, upload)
            raise

    def _is_there(self, full: str, size: int, crc: int) -> bool:
        with understood():
            head = self._client.head_object(Bucket=self._bucket, Key=full)
            return head["ContentLength"] == size and head["Metadata"].get(CRC) == spelled(crc)

    def _abort(self, full: str, upload: str) -> None:
        try:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=full, UploadId=upload)
        except (BotoCoreError, ClientError):
            pass  # the original error is the one to report; a lifecycle rule of the bucket can remove the parts

    def _checksum(self, crc: int) -> dict[str, Any]:
        return {"ChecksumCRC32": base64.b64encode(crc.to_bytes(4, "big")).decode()} if self._checksums else {}


def _piece(answer: GetObjectOutputTypeDef, start: int, length: int | None) -> Piece:
    """Reads the body of a response. Raises ValueError or KeyError if it is not the requested range."""
    said = answer["ResponseMetadata"]
    # Without either header, a closed connection looks like the end of the body, and truncation goes unnoticed.
    if not {"content-length", "transfer-encoding"} & set(said["HTTPHeaders"]):
        raise ValueError("it has neither Content-Length nor chunked encoding, so its end is unknown")
    data = answer["Body"].read()
    end = None if length is None else start + length
    if said["HTTPStatusCode"] == 206:
        place = answer["ContentRange"]
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", place, re.ASCII)
        first, last, total = (int(number) for number in found.groups()) if found else (-1, -1, -1)
        if first != start or last + 1 - first != len(data) or last >= total or (end is not None and last >= end):
            raise ValueError(f"Content-Range {place!r} with {len(data)} bytes")
    else:  # the whole object; also from a server that ignores Range
        total, data = len(data), data[start:end]
    return Piece(data=data, total=total, etag=etag_of(answer), crc=answer["Metadata"].get(CRC))


class _Counted:
    """Forwards byte counts and can take all of them back before a second download."""

    def __init__(self, tell: Callable[[int], object]) -> None:
        self._tell, self._sum, self._lock = tell, 0, Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._sum += count
        self._tell(count)

    def take_back(self) -> None:
        self._tell(-self._sum)


def _read_at(descriptor: int, start: int, length: int, path: str | os.PathLike[str]) -> bytes:
    pieces = []
    while length:  # one pread returns at most 2 GiB
        piece = os.pread(descriptor, length, start)
        if not piece:  # the file is shorter than when its size was read
            raise _changed(path)
        pieces.append(piece)
        start, length = start + len(piece), length - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _write_at(descriptor: int, data: bytes, start: int) -> None:
    # In small blocks: for one large write, Linux 6.16 and newer allocates its page cache as huge folios. In a virtual machine
    # whose host has not backed that memory yet, this measured 12 times slower than blocks of this size.
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view[:_WRITE_BLOCK], start)
        view, start = view[written:], start + written


def _changed(path: str | os.PathLike[str]) -> StoreError:
    return StoreError(
        f"{os.fspath(path)} changed during the upload, so nothing was written: upload it again when it no longer changes"
    )
