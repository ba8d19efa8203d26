"""Data in a store: objects, prefixes and globs become local files, over a real S3 server as over a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from palate import Session
from palate.errors import DataError
from palate.sources.resolve import fetch_files
from palate.sources.select import Fetched
from palate.store import StoreOptions, open_store
from palate_recipes.errors import BucketNotFoundError, StoreDeniedError, StoreUsageError
from tests.support.seaweed import SeaweedServer

ROW = '{"prompt": "p", "chosen": "c", "rejected": "r"}\n'
Place = Callable[..., tuple[str, Session]]


@pytest.fixture(params=["file", "s3", "oss"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Makes objects with the given keys, and returns the URI above them and a session that reaches it."""
    monkeypatch.setenv("PALATE_HOME", str(tmp_path / "home"))

    def make(*keys: str) -> tuple[str, Session]:
        if request.param == "file":
            uri, options = f"file://{tmp_path}/store", None
        else:
            bucket, options = request.getfixturevalue("bucket"), request.getfixturevalue("s3_options")
            uri = f"{request.param}://{bucket}/{tmp_path.name}"
        store = open_store(uri, options=options)
        for key in keys:
            store.put(key, f"{ROW}{key}".encode())
        return uri, Session(options=options)

    return make


def keys_of(fetched: Fetched) -> list[str]:
    """Returns the keys, which `place` wrote into the objects, in the order of the files."""
    return [file.read_text().removeprefix(ROW) for file in fetched.files]


def check(uri: str, session: Session, keys: list[str]) -> Fetched:
    with fetch_files(uri, session) as fetched:
        assert keys_of(fetched) == keys
        assert all(
            file.as_posix().endswith(key.rpartition("/")[2]) for file, key in zip(fetched.files, keys, strict=True)
        )
    assert all(file.exists() is uri.startswith("file://") for file in fetched.files), "what was fetched vanishes"
    return fetched


def test_objects_prefixes_and_globs(place: Place) -> None:
    parts = [f"data/part-{index:02}.jsonl" for index in range(12)]
    uri, session = place(
        *reversed(parts), "data/_SUCCESS", "data/README.md", "data/.x.crc", "data/x.log", "data2/z.json"
    )
    fetched = check(f"{uri}/data/part-03.jsonl", session, ["data/part-03.jsonl"])
    assert fetched.origin == f"{uri}/data/part-03.jsonl"
    assert fetched.revision is None
    for prefix in (f"{uri}/data", f"{uri}/data/"):
        fetched = check(prefix, session, parts)
        assert fetched.passed_over == ("x.log",)
    check(f"{uri}/data/part-0[0-2].jsonl", session, parts[:3])
    check(f"{uri}/*/*.json", session, ["data2/z.json"])
    check(f"{uri}/**/*1.jsonl", session, [parts[1], parts[11]])


def test_splits_below_a_prefix_are_refused(place: Place) -> None:
    uri, session = place("d/train-0.jsonl", "d/train-1.jsonl", "d/test/0.jsonl", "d/test/deep/1.jsonl")
    with pytest.raises(DataError, match="several splits") as caught, fetch_files(f"{uri}/d", session):
        pass
    shown = uri.removeprefix("file://")
    assert f"train (2 files): {shown}/d/train*" in str(caught.value)
    assert f"test (2 files): {shown}/d/test" in str(caught.value)
    check(f"{uri}/d/train*", session, ["d/train-0.jsonl", "d/train-1.jsonl"])
    check(f"{uri}/d/test", session, ["d/test/0.jsonl", "d/test/deep/1.jsonl"])


def test_nothing_there(place: Place) -> None:
    uri, session = place("d/a.txt", "d/prefs.json")
    shown = uri.removeprefix("file://")
    with pytest.raises(DataError) as caught, fetch_files(f"{uri}/d/prefs.jsonl", session):
        pass
    assert f"{shown}/d/prefs.jsonl" in str(caught.value)
    meant = "Did you mean 'prefs.json'?" if uri.startswith("file:") else "a.txt, prefs.json"
    assert meant in str(caught.value)
    with (
        pytest.raises(DataError, match=r"no data files found.*found a\.txt, prefs\.json"),
        fetch_files(f"{uri}/d/*.csv", session),
    ):
        pass


@pytest.fixture
def s3_session(s3_options: StoreOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setenv("PALATE_HOME", str(tmp_path / "home"))
    return Session(options=s3_options)


def test_a_whole_bucket(seaweed: SeaweedServer, s3_session: Session) -> None:
    bucket = seaweed.make_bucket()
    open_store(f"s3://{bucket}", options=s3_session.options).put("deep/prefs.json", ROW.encode())
    for uri in (f"s3://{bucket}", f"s3://{bucket}/", f"s3://{bucket}/**", f"s3://{bucket}/*/prefs.json"):
        with fetch_files(uri, s3_session) as fetched:
            assert [file.name for file in fetched.files] == ["prefs.json"]
    with pytest.raises(DataError, match=r"contains deep/"), fetch_files(f"s3://{bucket}/prefs.json", s3_session):
        pass


def test_a_store_that_cannot_be_read_says_the_uri(bucket: str, s3_session: Session, s3_options: StoreOptions) -> None:
    for uri in ("s3://no-such-bucket/prefs.json", "s3://no-such-bucket/data/", "s3://no-such-bucket/*.json"):
        with pytest.raises(BucketNotFoundError, match="s3://no-such-bucket"), fetch_files(uri, s3_session):
            pass
    nobody = StoreOptions(
        endpoint_url=s3_options.endpoint_url, region="us-east-1", access_key_id="x", secret_access_key="hush"
    )
    with pytest.raises(StoreDeniedError) as caught, fetch_files(f"s3://{bucket}/prefs.json", Session(options=nobody)):
        pass
    assert f"s3://{bucket}/prefs.json" in str(caught.value)
    assert "hush" not in str(caught.value)
    with pytest.raises(StoreUsageError) as usage, fetch_files("s3://id:hush@bucket/prefs.json", s3_session):
        pass
    assert "hush" not in str(usage.value)
