"""A store that cannot be used says so early: which URI, which endpoint, why, what to do, and never a secret."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest

from palate.store import Store, StoreOptions, open_store
from palate_recipes.errors import (
    BucketNotFoundError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StoreDeniedError,
    StoreError,
    StoreUnreachableError,
    StoreUsageError,
)
from tests.support.gate import Weather, gate_to
from tests.support.seaweed import free_ports

_GATES = 6

SECRET = "hush-hush-very-secret"


def everything(store: Store, tmp_path: Path) -> dict[str, StoreError]:
    """Does each thing once and returns how it failed."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("x")
    calls: dict[str, Callable[[], object]] = {
        "check": store.check,
        "check-read": lambda: store.check(write=False),
        "get": lambda: store.get("k"),
        "put": lambda: store.put("k", b""),
        "stat": lambda: store.stat("k"),
        "list": lambda: list(store.list()),
        "children": store.list_children,
        "upload": lambda: store.upload(tmp_path / "tree" / "file", "k"),
        "upload_tree": lambda: store.upload_tree(tmp_path / "tree", "k"),
        "download": lambda: store.download("k", tmp_path / "out"),
        "download_tree": lambda: store.download_tree("k", tmp_path / "out"),
        "delete_tree": lambda: store.delete_tree("k"),
    }
    errors = {}
    for name, call in calls.items():
        with pytest.raises(StoreError) as caught:
            call()
        errors[name] = caught.value
    assert not (tmp_path / "out").exists()
    return errors


def test_a_missing_bucket(s3_options: StoreOptions, tmp_path: Path) -> None:
    store = open_store("s3://no-such-bucket/x", options=s3_options)
    for name, error in everything(store, tmp_path).items():
        assert type(error) is BucketNotFoundError, name
        assert not isinstance(error, FileNotFoundError), "a reader would wait for an object that cannot come"
        assert "'no-such-bucket' does not exist. Create it" in str(error)
        assert str(s3_options.endpoint_url) in str(error)


@pytest.mark.parametrize("wrong", ["secret", "both", "none"])
def test_wrong_credentials(s3_options: StoreOptions, bucket: str, wrong: str, tmp_path: Path) -> None:
    if wrong == "none":
        options = replace(s3_options, access_key_id=None, secret_access_key=None, anonymous=True)
    else:
        key_id = s3_options.access_key_id if wrong == "secret" else "nobody"
        options = replace(s3_options, access_key_id=key_id, secret_access_key=SECRET)
    store = open_store(f"s3://{bucket}/x", options=options)
    for name, error in everything(store, tmp_path).items():
        assert type(error) is StoreDeniedError, name
        assert isinstance(error, PermissionError)
        assert f"s3://{bucket}/x" in str(error)
        assert "Check" in str(error)
        assert SECRET not in str(error)


def test_no_credentials_at_all(s3_options: StoreOptions, bucket: str) -> None:
    options = StoreOptions(endpoint_url=s3_options.endpoint_url)
    with pytest.raises(StoreDeniedError, match="set AWS_ACCESS_KEY_ID"):
        open_store(f"s3://{bucket}", options=options).check()


def test_credentials_and_endpoint_from_the_environment(
    s3_options: StoreOptions, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_options.environment().items():
        monkeypatch.setenv(name, value)
    store = open_store(f"s3://{bucket}/from-environment")
    store.check()
    assert str(s3_options.endpoint_url) in repr(store)

    key_id, secret = os.environ.pop("AWS_ACCESS_KEY_ID"), os.environ.pop("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("OSS_ACCESS_KEY_ID", key_id)
    monkeypatch.setenv("OSS_ACCESS_KEY_SECRET", secret)
    open_store(f"oss://{bucket}/from-environment").check()


def test_nothing_listens_at_the_endpoint(s3_options: StoreOptions) -> None:
    options = replace(s3_options, endpoint_url=f"http://127.0.0.1:{free_ports(1)[0]}")
    store = open_store("s3://bucket/x", options=options)
    for call in (store.check, lambda: store.get("k"), lambda: store.put("k", b"")):
        began = time.monotonic()
        with pytest.raises(StoreUnreachableError, match="Check the endpoint") as caught:
            call()
        assert time.monotonic() - began < 10
        assert str(options.endpoint_url) in str(caught.value)
        assert isinstance(caught.value, ConnectionError)


def test_the_endpoint_accepts_and_says_nothing(s3_options: StoreOptions) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = replace(s3_options, endpoint_url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(StoreUnreachableError, match="Check the endpoint"):
            open_store("s3://bucket/x", options=options).check()
        assert time.monotonic() - began < 12


@pytest.mark.parametrize("what", ["get", "get_range", "stat", "list"])
def test_an_answer_that_is_cut_at_any_byte_is_asked_for_again(
    s3_options: StoreOptions, bucket: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Python takes headers that break off for all there are: what never came must not count as empty, or as not there."""
    _cut_everywhere(s3_options, bucket, monkeypatch, what)


@pytest.mark.thorough
@pytest.mark.parametrize("what", ["list_children", "absent", "checksum", "download", "put", "delete"])
def test_any_other_answer_that_is_cut_at_any_byte_is_asked_for_again(
    s3_options: StoreOptions, bucket: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    _cut_everywhere(s3_options, bucket, monkeypatch, what)


def test_an_upload_whose_last_answer_got_lost_is_in_place(
    s3_options: StoreOptions, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has put the parts together by then, and knows nothing of that upload any more."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    content = os.urandom((8 << 20) + 1)
    (tmp_path / "large").write_bytes(content)
    with gate_to(int(str(s3_options.endpoint_url).rpartition(":")[2])) as gate:
        through = replace(s3_options, endpoint_url=f"http://127.0.0.1:{gate.port}")
        store = open_store(f"s3://{bucket}/lost-answer", options=through)
        arrived = 0

        def moved(count: int) -> None:
            nonlocal arrived
            arrived += count
            if arrived == len(content):  # the parts are there: the next answer is to what puts them together
                gate.weather = Weather(next_answer=0)

        store.upload(tmp_path / "large", "large", moved=moved)
        assert gate.weather.next_answer is None
        store.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def _cut_everywhere(options: StoreOptions, bucket: str, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Does one thing as often as its answer has bytes, and breaks the answer off after each of them."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    monkeypatch.setattr("palate.store.s3_transfer._FIRST_PAUSE_S", 0)
    content = b'{"state": "Running"}'
    direct = open_store(f"s3://{bucket}/cut-{what}", options=options)
    direct.put("folder/one", content)
    written = direct.stat("folder/one")
    assert written is not None
    assert written.size == len(content)

    def download(store: Store, at: int) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            store.download("folder/one", Path(folder) / "one")
            return (Path(folder) / "one").read_bytes()

    calls: dict[str, tuple[Callable[[Store, int], object], object]] = {
        "get": (lambda store, _: store.get("folder/one"), content),
        "get_range": (lambda store, _: store.get_range("folder/one", 3, 12), content[3:15]),
        "stat": (lambda store, _: store.stat("folder/one"), written),
        "list": (lambda store, _: [*store.list("folder/")], [written]),
        "list_children": (lambda store, _: store.list_children(), ["folder"]),
        "absent": (lambda store, _: store.stat("folder/two"), None),
        "checksum": (lambda store, _: store.checksum("folder/one"), f"{zlib.crc32(content):08x}"),
        "download": (download, content),
        "put": (lambda store, at: store.put(f"made-{at}", content, if_none_match=True), written.etag),
        "delete": (lambda store, _: store.delete("folder/three"), None),
    }
    call, expected = calls[what]

    def answers(remainder: int) -> int:
        """Cuts the answer after each `_GATES`th byte, and returns the number of cuts."""
        at = remainder
        with gate_to(int(str(options.endpoint_url).rpartition(":")[2])) as gate:
            through = replace(options, endpoint_url=f"http://127.0.0.1:{gate.port}")
            while True:
                if at // _GATES % 30 == 0:  # a client of botocore tries 35 requests again, and more when others succeed
                    store = open_store(direct.root, options=through)
                    call(store, -1 - at)  # whether the bucket is there is asked once
                gate.weather = Weather(next_answer=at)
                assert call(store, at) == expected, f"the answer was cut after {at} bytes"
                if gate.weather.next_answer is not None:
                    return at // _GATES
                at += _GATES

    with ThreadPoolExecutor(_GATES) as pool:
        assert sum(pool.map(answers, range(_GATES))) > 100


def test_no_secret_is_ever_shown(s3_options: StoreOptions) -> None:
    options = replace(s3_options, secret_access_key=SECRET, session_token=SECRET + "-token")
    store = open_store("s3://bucket/x", options=options)
    assert SECRET not in f"{options!r} {options} {store!r} {store}"
    assert set(options.environment().values()) >= {SECRET, SECRET + "-token"}
    for uri in (f"s3://key:{SECRET}@bucket/x", f"oss://key:{SECRET}@bucket"):
        with pytest.raises(StoreUsageError, match="contains credentials") as caught:
            open_store(uri)
        assert SECRET not in str(caught.value)
    for endpoint in (f"http://key:{SECRET}@host", f"key:{SECRET}@host"):
        with pytest.raises(StoreUsageError, match="endpoint_url") as caught:
            StoreOptions(endpoint_url=endpoint)
        assert SECRET not in str(caught.value)


def test_half_given_options() -> None:
    with pytest.raises(StoreUsageError, match="go together"):
        StoreOptions(access_key_id="id")
    with pytest.raises(StoreUsageError, match="go together"):
        StoreOptions(secret_access_key=SECRET)
    with pytest.raises(StoreUsageError, match="all three"):
        StoreOptions(session_token=SECRET)
    with pytest.raises(StoreUsageError, match="addressing_style='odd'"):
        StoreOptions(addressing_style="odd")
    with pytest.raises(StoreUsageError, match="needs a region"):
        open_store("oss://bucket")


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("gs://bucket/x", "s3://"),
        ("", "empty"),
        ("file://data/x", "three slashes"),
        ("file://~/x", "three slashes"),
        ("s3://", "no valid bucket name"),
        ("s3:///x", "no valid bucket name"),
        ("s3://bucket/../other", "'..'"),
        ("s3://bucket/a//b", "empty part"),
    ],
)
def test_uris_that_cannot_work(uri: str, says: str) -> None:
    with pytest.raises(StoreUsageError, match=says):
        open_store(uri)


def test_paths_are_file_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    roots = {open_store(uri).root for uri in (tmp_path / "s", "s", "./s/", "~/s", f"file://{tmp_path}/s/")}
    assert roots == {f"file://{tmp_path}/s"}
    assert not (tmp_path / "s").exists(), "opening makes nothing"


def test_a_file_stores_folder(tmp_path: Path) -> None:
    store = open_store(tmp_path / "a" / "b")
    with pytest.raises(BucketNotFoundError, match="does not exist"):
        store.check(write=False)
    store.check()
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    (tmp_path / "plain").write_text("")
    for uri in (tmp_path / "plain", tmp_path / "plain" / "below"):
        with pytest.raises(StoreError, match="plain"):
            open_store(uri).check()


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "shut"
    folder.mkdir(mode=0o500)
    store = open_store(folder)
    with _without_root():
        for call in (store.check, lambda: store.put("k", b"")):
            with pytest.raises(StoreDeniedError, match=r"shut.* Give this user"):
                call()


def test_an_object_is_no_folder_in_a_file_store(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put("a/b", b"")
    for key in ("a", "a/b/c"):
        with pytest.raises(StoreError, match="choose another key"):
            store.put(key, b"")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_no_object(tmp_path: Path, kind: str) -> None:
    """Another user of a shared store may put it there: it would be read without end."""
    if kind == "pipe":
        os.mkfifo(tmp_path / "strange")
    else:
        (tmp_path / "strange").symlink_to("/dev/zero")
    store = open_store(tmp_path)
    assert (store.stat("strange"), store.checksum("strange")) == (None, None)
    for read in (
        lambda: store.get("strange"),
        lambda: store.get_range("strange", 0, 5),
        lambda: store.download("strange", tmp_path / "here"),
    ):
        with pytest.raises(ObjectNotFoundError, match="strange"):
            read()


def test_a_failed_put_leaves_no_draft(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError):
        store.put("folder", b"x")
    assert {path.name for path in tmp_path.iterdir()} == {"folder", ".palate-lock"}


def test_puts_that_race_with_the_deletion_of_their_folder(tmp_path: Path) -> None:
    """Each comes before it or after it: none fails, and nobody sees a part of the tree that was deleted."""
    store = open_store(tmp_path / "store")
    (tmp_path / "file").write_bytes(b"uploaded")
    done = Event()

    def write(number: int) -> int:
        puts = 0
        while not done.is_set():
            store.put(f"jobs/1/logs/{number}", b"x")
            store.upload(tmp_path / "file", f"jobs/1/model/{number}")
            with suppress(PreconditionFailedError):
                store.put(f"jobs/1/logs/{number}", b"y", if_none_match=True)
            store.delete(f"jobs/1/logs/{number}")
            puts += 1
        return puts

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, number) for number in range(4)]
        try:
            for _ in range(60):
                store.put("jobs/1/manifest.json", b"first")
                store.put("jobs/1/a/b/c", b"deep")
                store.delete_tree("jobs/1")
                assert not {info.key for info in store.list("jobs")} & {"jobs/1/manifest.json", "jobs/1/a/b/c"}
        finally:
            done.set()
        assert all(writer.result() for writer in writers)
    store.delete_tree("jobs")
    assert not list((tmp_path / "store").iterdir())


def test_what_a_put_names_is_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content before the name that readers find, and that name, and each new folder's, before the put is over."""
    (tmp_path / "file").write_bytes(b"uploaded")
    kept: list[str] = []
    really = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else ["content"]
        kept.extend(f"{path.name}: {name}" for name in names if not name.startswith(".palate-lock"))
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    store = open_store(tmp_path / "store")
    store.put("jobs/1/status.json", b"{}")
    assert kept[-4:] == ["store: jobs", "jobs: 1", kept[-2], "1: status.json"]
    assert kept[-2].endswith(": content")
    kept.clear()
    store.upload(tmp_path / "file", "jobs/1/model/weights")
    assert "1: model" in kept
    assert kept[-2].endswith(": content")
    assert kept[-1] == "model: weights"


def test_without_boto3_only_an_object_store_fails(tmp_path: Path) -> None:
    program = f"""
import sys
sys.modules["boto3"] = None
from palate.store import open_store
open_store({str(tmp_path)!r}).put("k", b"v")
try:
    open_store("s3://bucket")
except ImportError as error:
    from palate.errors import MissingDependencyError
    assert isinstance(error, MissingDependencyError)
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'palate[s3]'" in done.stdout


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = "import sys, palate.store; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"boto3", "botocore", "concurrent.futures", "hashlib", "shutil", "logging", "palate.store.s3"}


@contextmanager
def _without_root() -> Iterator[None]:
    """Root may write anywhere: be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
