"""What no real server does on demand: lost answers, conflicts, OSS's refusals. A few lines of HTTP play them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from palate.store import Store, StoreOptions, open_store
from palate_recipes.errors import (
    DigestMismatchError,
    PreconditionFailedError,
    StoreDeniedError,
    StoreError,
    StoreUnreachableError,
)
from tests.support.gate import Weather, gate_to


@dataclass
class Bucket:
    """One bucket in memory. `answer` decides what a put says: a status, a code, or None for no answer at all."""

    answer: Callable[[int], tuple[int, str] | None]
    objects: dict[str, bytes] = field(default_factory=dict)
    puts: list[dict[str, str]] = field(default_factory=list)
    crc: str = ""
    """Metadata that every object is said to have."""
    torn: int = 0
    """Answers to GET that still break off in their middle."""
    gets: list[str] = field(default_factory=list)
    """Range of each GET."""
    ignores: tuple[str, ...] = ()
    """Conditional headers that it takes no notice of."""
    changed: dict[str, str | None] = field(default_factory=dict)
    """Headers of answers that are said in another way, or with None not at all."""


@contextmanager
def serving(bucket: Bucket, scheme: str) -> Iterator[Store]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and content in one packet

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if ".palate-check" in self.path:
                wrong = {"If-None-Match", "If-Match"} & set(self.headers) - set(bucket.ignores)
                self.say(*((412, "PreconditionFailed") if wrong else (200, "")), etag="0")
                return
            bucket.puts.append({name.lower(): value for name, value in self.headers.items()})
            answer = bucket.answer(len(bucket.puts))
            if answer is None or answer[0] == 200:
                bucket.objects[self.path] = body
            if answer is None:
                self.close_connection = True
                return
            self.say(*answer, etag=hashlib.md5(body).hexdigest())

        def do_GET(self) -> None:
            body = bucket.objects.get(self.path.partition("?")[0], b"")
            etag = hashlib.md5(body).hexdigest()
            wanted = self.headers["Range"]
            self.send_response(206 if wanted else 200)
            if wanted:
                start, end = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
                self.send_header("Content-Range", f"bytes {start}-{min(end, len(body) - 1)}/{len(body)}")
                body = body[start : end + 1]
            self.send_header("ETag", f'"{etag}"')
            self.send_header("Last-Modified", "Sat, 21 Nov 2026 03:38:09 GMT")
            self.send_header("Content-Length", str(len(body)))
            if bucket.crc:
                self.send_header("x-amz-meta-palate-crc32", bucket.crc)
            self.end_headers()
            if self.command == "HEAD":
                return
            bucket.gets.append(wanted or "")
            if bucket.torn:
                bucket.torn -= 1
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return
            self.wfile.write(body)

        do_HEAD = do_GET

        def do_DELETE(self) -> None:
            self.send_response(204)
            self.end_headers()

        def say(self, status: int, text: str, *, etag: str) -> None:
            body = text if status == 200 else f"<Error><Code>{text}</Code><Message>no</Message></Error>"
            self.send_response(status)
            self.send_header("ETag", f'"{etag}"')
            self.send_header("Last-Modified", "Sat, 21 Nov 2026 03:38:09 GMT")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def send_header(self, keyword: str, value: str) -> None:
            said = bucket.changed.get(keyword, value)
            if said is not None:
                super().send_header(keyword, said)
            elif keyword == "Content-Length":
                self.close_connection = True  # what ends the content then

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield opened(server.server_port, scheme)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def opened(port: int, scheme: str) -> Store:
    options = StoreOptions(
        endpoint_url=f"http://127.0.0.1:{port}",
        region="cn-hangzhou",
        access_key_id="id",
        secret_access_key="secret",
        addressing_style="path",
    )
    return open_store(f"{scheme}://bucket", options=options)


def test_a_put_whose_answer_got_lost_has_won() -> None:
    bucket = Bucket(lambda number: None if number == 1 else (412, "PreconditionFailed"))
    with serving(bucket, "s3") as store:
        assert store.put("status", b"mine", if_none_match=True) == hashlib.md5(b"mine").hexdigest()
    assert len(bucket.puts) == 2


def test_a_put_whose_answer_got_lost_and_that_another_overwrote_has_lost() -> None:
    def answer(number: int) -> tuple[int, str] | None:
        if number == 1:
            return None
        bucket.objects["/bucket/status"] = b"another's"
        return 412, "PreconditionFailed"

    bucket = Bucket(answer)
    with serving(bucket, "s3") as store, pytest.raises(PreconditionFailedError):
        store.put("status", b"mine", if_none_match=True)


def test_a_plain_refusal_asks_nothing_more() -> None:
    bucket = Bucket(lambda _: (412, "PreconditionFailed"), objects={"/bucket/status": b"mine"})
    with serving(bucket, "s3") as store, pytest.raises(PreconditionFailedError):
        store.put("status", b"mine", if_none_match=True)
    assert len(bucket.puts) == 1


def test_a_conflict_is_tried_again() -> None:
    bucket = Bucket(lambda number: (409, "ConditionalRequestConflict") if number < 3 else (200, ""))
    with serving(bucket, "s3") as store:
        store.put("status", b"mine", if_match="abc")
    assert [headers["if-match"] for headers in bucket.puts] == ['"abc"'] * 3


def test_a_conflict_that_stays_is_an_error() -> None:
    bucket = Bucket(lambda _: (409, "ConditionalRequestConflict"))
    with serving(bucket, "s3") as store, pytest.raises(StoreError, match="ConditionalRequestConflict"):
        store.put("status", b"mine", if_match="abc")
    assert len(bucket.puts) == 5


def test_if_match_of_a_deleted_object_has_lost() -> None:
    bucket = Bucket(lambda _: (404, "NoSuchKey"))
    with serving(bucket, "s3") as store, pytest.raises(PreconditionFailedError):
        store.put("status", b"mine", if_match="abc")


def test_a_failing_server_is_unreachable_after_retries() -> None:
    bucket = Bucket(lambda _: (500, "InternalError"))
    with serving(bucket, "s3") as store, pytest.raises(StoreUnreachableError, match=r"InternalError.* after retries"):
        store.put("status", b"mine")
    assert len(bucket.puts) == 5


@pytest.mark.parametrize("ignored", ["If-Match", "If-None-Match"])
def test_a_server_that_ignores_conditions_is_refused(ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(lambda _: (200, ""), ignores=(ignored,))
    with serving(bucket, "s3") as store:
        for call in (
            lambda: store.put("status", b"1", if_none_match=True),
            lambda: store.put("status", b"1", if_match="abc"),
            store.check,
        ):
            with pytest.raises(
                StoreError, match=rf"s3://bucket at http.* ignores {ignored}: .*PALATE_S3_UNCONDITIONAL=1"
            ):
                call()
        assert not bucket.puts, "nothing was written"
        store.put("status", b"1")  # a plain put promises nothing
        monkeypatch.setenv("PALATE_S3_UNCONDITIONAL", "1")
        allowed = open_store("s3://bucket", options=store._options)  # type: ignore[attr-defined]
        assert not allowed.atomic_replace
        allowed.check()
        for condition in ({"if_none_match": True}, {"if_match": "stale"}):
            with pytest.raises(PreconditionFailedError):
                allowed.put("status", b"2", **condition)  # type: ignore[arg-type]
        allowed.put("status", b"3", if_match=hashlib.md5(b"1").hexdigest())
        assert bucket.objects["/bucket/status"] == b"3"


def test_oss_creates_in_its_own_words() -> None:
    bucket = Bucket(lambda number: (200, "") if number == 1 else (409, "FileAlreadyExists"))
    with serving(bucket, "oss") as store:
        store.put("manifest", b"1", if_none_match=True)
        with pytest.raises(PreconditionFailedError):
            store.put("manifest", b"2", if_none_match=True)
    for headers in bucket.puts:
        assert headers["x-oss-forbid-overwrite"] == "true"
        assert "x-oss-forbid-overwrite" in headers["authorization"], "signed with the rest"
        assert not set(headers) & {"if-none-match", "x-amz-trailer", "x-amz-sdk-checksum-algorithm"}
        assert "aws-chunked" not in headers.get("content-encoding", "")


def test_oss_compares_before_it_replaces() -> None:
    bucket = Bucket(lambda _: (200, ""), objects={"/bucket/status": b"1"})
    with serving(bucket, "oss") as store:
        assert not store.atomic_replace
        etag = store.put("status", b"2", if_match=hashlib.md5(b"1").hexdigest())
        with pytest.raises(PreconditionFailedError):
            store.put("status", b"3", if_match="stale")
        assert store.put("status", b"3", if_match=etag)
    assert len(bucket.puts) == 2
    assert not any({"if-match", "x-oss-forbid-overwrite"} & set(headers) for headers in bucket.puts)


def test_oss_endpoint_follows_the_region(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "https://s3.oss-cn-beijing.aliyuncs.com" in repr(
        open_store("oss://bucket/x", options=StoreOptions(region="cn-beijing"))
    )
    monkeypatch.setenv("OSS_REGION", "cn-shanghai")
    assert "https://s3.oss-cn-shanghai.aliyuncs.com" in repr(open_store("oss://bucket/x"))


def test_an_answer_that_breaks_off_is_asked_for_again(tmp_path: Path) -> None:
    large = bytes(range(256)) * (1 << 16)  # two parts
    bucket = Bucket(lambda _: (200, ""), objects={"/bucket/k": large}, torn=2, crc=f"{zlib.crc32(large):08x}")
    with serving(bucket, "s3") as store:
        store.download("k", tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == large
        bucket.torn = 1
        assert store.get("k") == large
        assert len(bucket.gets) == 2 + 2 + 2


def test_an_answer_that_always_breaks_off_is_an_error_after_five(tmp_path: Path) -> None:
    bucket = Bucket(lambda _: (200, ""), objects={"/bucket/k": b"0123456789"}, torn=99)
    with serving(bucket, "s3") as store, pytest.raises(StoreUnreachableError, match=r"s3://bucket/k .*Check"):
        store.download("k", tmp_path / "out")
    assert len(bucket.gets) == 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["get", "get_range", "stat", "checksum"])
def test_an_answer_that_is_cut_within_its_headers_is_asked_for_again(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here Content-Length comes late, as from some servers: a cut one is a smaller number, and all else was there."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    monkeypatch.setattr("palate.store.s3_transfer._FIRST_PAUSE_S", 0)
    content = b"0123456789" * 20
    bucket = Bucket(lambda _: (200, ""), objects={"/bucket/k": content}, crc=f"{zlib.crc32(content):08x}")
    calls: dict[str, tuple[Callable[[Store], object], object]] = {
        "get": (lambda store: store.get("k"), content),
        "get_range": (lambda store: store.get_range("k", 2, 30), content[2:32]),
        "stat": (
            lambda store: (info := store.stat("k")) and (info.size, info.etag),
            (200, hashlib.md5(content).hexdigest()),
        ),
        "checksum": (lambda store: store.checksum("k"), bucket.crc),
    }
    call, expected = calls[what]
    with serving(bucket, "s3") as direct, gate_to(int(repr(direct).rpartition(":")[2].rstrip("')"))) as gate:
        passing = 0
        while gate.weather.next_answer is None:
            if passing % 30 == 0:  # a client of botocore tries 35 requests again, and more when others succeed
                store = opened(gate.port, "s3")
            gate.weather = Weather(next_answer=passing)
            assert call(store) == expected, f"the answer was cut after {passing} bytes"
            passing += 1
    assert passing > 200


@pytest.mark.parametrize("name", ["ETag", "Last-Modified", "Content-Length", "Content-Range"])
@pytest.mark.parametrize("value", [None, "", "8x", "-1"])
def test_an_answer_without_a_value_or_with_a_malformed_one_is_an_error(
    name: str, value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    bucket = Bucket(lambda _: (200, ""), objects={"/bucket/k": b"0123456789"}, changed={name: value})
    with serving(bucket, "s3") as store:
        calls: list[Callable[[], object]] = [
            lambda: store.get("k"),
            lambda: store.get_range("k", 2, 3),
            lambda: store.stat("k"),
            lambda: store.put("other", b"1"),
            lambda: store.download("k", tmp_path / "out"),
        ]
        expected = [b"0123456789", b"234", 10, hashlib.md5(b"1").hexdigest(), None]
        for call, right in zip(calls, expected, strict=True):
            with suppress(StoreError):
                found = call()
                assert getattr(found, "size", found) == right or (name == "ETag" and value and found == value)


def test_bytes_that_are_not_those_that_were_uploaded(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"before")
    bucket = Bucket(lambda _: (200, ""), objects={"/bucket/k": b"damaged"}, crc=f"{zlib.crc32(b'whole'):08x}")
    moved: list[int] = []
    with serving(bucket, "oss") as store:
        with pytest.raises(DigestMismatchError, match=r"oss://bucket/k .*damaged: .*upload it again"):
            store.download("k", tmp_path / "out", moved=moved.append)
        assert len(bucket.gets) == 2, "asked once more"
        assert sum(moved) == 0
        assert (tmp_path / "out").read_bytes() == b"before"
        bucket.crc = ""
        store.download("k", tmp_path / "out")  # written by another program: nothing to compare with


@pytest.mark.parametrize(
    ("status", "code", "kind", "says"),
    [
        (403, "RequestTimeTooSkewed", StoreDeniedError, "Correct this machine's clock"),
        (403, "ExpiredToken", StoreDeniedError, "new temporary credentials"),
        (403, "AccessDenied", StoreDeniedError, "Check that the credentials"),
        (400, "AuthorizationHeaderMalformed", StoreError, "another region"),
        (301, "PermanentRedirect", StoreError, "another region"),
    ],
)
def test_a_refusal_names_object_endpoint_cause_and_remedy(
    status: int, code: str, kind: type[StoreError], says: str
) -> None:
    bucket = Bucket(lambda _: (status, code))
    with serving(bucket, "oss") as store, pytest.raises(kind, match=says) as caught:
        store.put("jobs/k", b"1")
    for part in ("oss://bucket/jobs/k", "http://127.0.0.1:", code):
        assert part in str(caught.value)
