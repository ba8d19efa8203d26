"""Moves the bytes of objects over an S3 client: in parts, several at a time, each tried again. Knows no Palate key.

Every object carries the CRC-32 of its content in its metadata, and what comes back is compared with it. A part is one
`bytes` in memory, sent or received in one piece. boto3's own transfer goes through small blocks and a queue: it takes 1.3 to
1.5 times the processor time for small files, and up to four times the memory for a large one (benchmarks/RESULTS.md). It does
not notice a file that changes while it is uploaded, or an upload that was completed although the answer was lost. The number
of parts in memory is bounded for the whole store.
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
"""Bytes of a part; larger ones were no faster, and fewer of them go at the same time."""

_PARTS_AT_A_TIME = 4
_PARTS_IN_MEMORY = 8
_MOST_PARTS = 10_000  # of one upload, by S3's rules
_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.4
_BROKEN_OFF = (HTTPClientError, IncompleteReadError, FlexibleChecksumError)  # botocore tries only whole answers again

CRC = "palate-crc32"
"""Name of the metadata that hold an object's CRC-32."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some bytes of an object, and what the answer said of the whole.

    Attributes:
        data: The bytes.
        total: Bytes of the whole object.
        etag: Of the version that the bytes are from, in quotes.
        crc: CRC-32 that was recorded when it was uploaded, as hex digits; None where nobody did.
    """

    data: bytes
    total: int
    etag: str
    crc: str | None


@contextmanager
def understood() -> Iterator[None]:
    """Raises MalformedAnswerError for an answer that lacks a value or has one in another form than S3's.

    For a value in another form botocore's parser raises what Python does, such as ValueError.
    """
    try:
        yield
    except (BotoCoreError, StoreError):  # some of them are a ValueError, too
        raise
    except (KeyError, ValueError, TypeError) as error:
        lacks = isinstance(error, KeyError)
        problem = f"the answer lacks {error.args[0]}" if lacks else f"a value in the answer is malformed ({error})"
        raise MalformedAnswerError(problem=problem) from error


def etag_of(answer: Mapping[str, Any]) -> str:
    """Returns the etag that an answer names, in quotes. Raises KeyError or ValueError when it names none."""
    if not answer["ETag"].strip('"'):
        raise ValueError("an empty ETag")
    return str(answer["ETag"])


class Transfer:
    """Reads and writes the objects of one bucket; raises what botocore raises. Safe to use from several threads.

    Args:
        client: Of boto3.
        bucket: Its name.
        checksums: Let the server check each part's CRC-32, too; Alibaba OSS refuses that.
    """

    def __init__(self, client: S3Client, bucket: str, *, checksums: bool) -> None:
        self._client, self._bucket, self._checksums = client, bucket, checksums
        self._room = BoundedSemaphore(_PARTS_IN_MEMORY)

    # ── down ───────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, full: str, start: int = 0, length: int | None = None, *, etag: str | None = None) -> Piece:
        """Returns `length` bytes from `start` (all by default), of the version `etag` if given.

        An answer that breaks off is asked for again, five times in all, after pauses that grow and differ.
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
                # S3 has no range of an empty object, and none behind the end.
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
        """Writes an object to the file `target`, and compares it with the CRC-32 that was recorded.

        Args:
            full: The object's key in the bucket.
            target: A fresh name.
            moved: Gets the bytes of each part that has arrived.
            what: Beginning of the message, should the bytes differ.

        Raises:
            DigestMismatchError: They differ, the second time, too.
        """
        for _ in range(2):
            counted = _Counted(moved)
            found, recorded = self._fetch_once(full, target, counted)
            if recorded is None or spelled(found) == recorded:
                return
            counted.take_back()
        raise DigestMismatchError(
            f"{what}: its content has the CRC-32 {spelled(found)}, and {recorded} was recorded when it was uploaded. "
            "The object or the way to it is damaged: upload it again"
        )

    def _fetch_once(self, full: str, target: Path, moved: Callable[[int], object]) -> tuple[int, str | None]:
        """Returns the CRC-32 of what came, and the recorded one."""
        with self._room:
            first = self.read(full, 0, PART)
            with target.open("wb") as file:
                file.write(first.data)
            got, crc = len(first.data), crc32(first.data)
            total, etag, recorded = first.total, first.etag, first.crc
            del first
        moved(got)
        starts = range(got, total, PART) if got else ()
        sums: dict[int, tuple[int, int]] = {}
        descriptor = os.open(target, os.O_WRONLY)
        try:

            def fetch(start: int) -> None:
                with self._room:
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
        """Puts an object in one request, and returns its etag, in quotes."""
        crc = crc32(data)
        with understood():
            answer = self._client.put_object(
                Bucket=self._bucket,
                Key=full,
                Body=data,
                Metadata={CRC: spelled(crc)},
                **self._checksum(crc),
                **conditions,  # type: ignore[arg-type]  # If-Match and If-None-Match, by their names in boto3
            )
            return etag_of(answer)

    def send(self, path: str | os.PathLike[str], full: str, moved: Callable[[int], object]) -> None:
        """Uploads a file; nothing is visible before it is whole, and no parts stay behind after an error.

        Raises:
            StoreError: The file changed meanwhile.
            OSError: It cannot be read.
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

        def weigh(start: int) -> None:  # before the upload: S3 takes metadata at its beginning only
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
                if crc32(data) != sums[start]:
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
                    raise  # else an earlier request of ours completed it, and its answer got lost
        except BaseException:
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
            pass  # the error that led here is the one to tell; the bucket's lifecycle rule removes the parts

    def _checksum(self, crc: int) -> dict[str, Any]:
        return {"ChecksumCRC32": base64.b64encode(crc.to_bytes(4, "big")).decode()} if self._checksums else {}


def _piece(answer: GetObjectOutputTypeDef, start: int, length: int | None) -> Piece:
    """Reads the content of an answer. Raises ValueError or KeyError when it is not what was asked for."""
    said = answer["ResponseMetadata"]
    if not {"content-length", "transfer-encoding"} & set(said["HTTPHeaders"]):
        raise ValueError("neither Content-Length nor chunks say where its content ends")
    data = answer["Body"].read()
    end = None if length is None else start + length
    if said["HTTPStatusCode"] == 206:
        place = answer["ContentRange"]
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", place, re.ASCII)
        first, last, total = (int(number) for number in found.groups()) if found else (-1, -1, -1)
        if first != start or last + 1 - first != len(data) or last >= total or (end is not None and last >= end):
            raise ValueError(f"Content-Range {place!r} of {len(data)} bytes")
    else:  # the whole, also from a server that knows no ranges
        total, data = len(data), data[start:end]
    return Piece(data=data, total=total, etag=etag_of(answer), crc=answer["Metadata"].get(CRC))


class _Counted:
    """Passes on numbers of bytes, and can take all of them back."""

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
    while length:
        piece = os.pread(descriptor, length, start)
        if not piece:
            raise _changed(path)
        pieces.append(piece)
        start, length = start + len(piece), length - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _write_at(descriptor: int, data: bytes, start: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, start)
        view, start = view[written:], start + written


def _changed(path: str | os.PathLike[str]) -> StoreError:
    return StoreError(f"{os.fspath(path)} changed while it was uploaded; nothing was written: upload it when it rests")
