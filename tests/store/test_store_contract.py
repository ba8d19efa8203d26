"""What every store promises, over a folder, over a real S3 server, and over the OSS code path on that server."""

from __future__ import annotations

import hashlib
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from palate.store import Store, open_parent, open_store, read_uri, split_uri
from palate_recipes.errors import ObjectNotFoundError, PreconditionFailedError, StoreUsageError

BAD_KEYS = [
    "",
    "/etc/passwd",
    "../up",
    "a/../../up",
    "a//b",
    "a/",
    "./a",
    "a\nb",
    "a\x00b",
    ".palate-lock",
    "a/.palate-x",
]


def keys(store: Store, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


def test_what_is_put_is_got(store: Store) -> None:
    etag = store.put("jobs/1/status.json", b"one")
    assert store.get("jobs/1/status.json") == b"one"
    info = store.stat("jobs/1/status.json")
    assert info is not None
    assert (info.key, info.size, info.etag) == ("jobs/1/status.json", 3, etag)
    assert abs(info.modified_s - time.time()) < 60
    assert store.put("jobs/1/status.json", b"three") != etag
    assert store.get("jobs/1/status.json") == b"three"


def test_an_object_may_be_empty(store: Store, tmp_path: Path) -> None:
    store.put("empty", b"")
    assert store.get("empty") == b""
    info = store.stat("empty")
    assert info is not None
    assert info.size == 0
    store.download("empty", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b""


def test_keys_hold_any_printable_text(store: Store, tmp_path: Path) -> None:
    for key in ["a b/c d.txt", "ünïcödé/雪/🍜.json", "100%/a%20b", "plus+and&amp;=?#", "tilde~'quote\""]:
        store.put(key, key.encode())
        assert store.get(key) == key.encode()
        assert keys(store) == [key]
        assert keys(store, key.rpartition("/")[0]) == [key]
        store.download(key, tmp_path / "out")
        assert (tmp_path / "out").read_text() == key
        assert store.stat(key) is not None
        store.delete(key)
        assert keys(store) == []


def test_a_key_stays_below_the_root(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    calls: list[Callable[[str], object]] = [
        lambda key: store.put(key, b"x"),
        store.get,
        store.stat,
        store.delete,
        lambda key: store.download(key, tmp_path / "out"),
        lambda key: store.upload(tmp_path / "file", key),
    ]
    for key in BAD_KEYS:
        for call in calls:
            with pytest.raises(StoreUsageError, match="relative path"):
                call(key)
    assert not (tmp_path / "out").exists()


def test_a_prefix_stays_below_the_root(store: Store, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    calls: list[Callable[[str], object]] = [
        lambda prefix: list(store.list(prefix)),
        store.list_children,
        store.delete_tree,
        lambda prefix: store.download_tree(prefix, tmp_path / "out"),
        lambda prefix: store.upload_tree(tmp_path / "tree", prefix),
        store.local_path,
    ]
    for prefix in ["..", "/", "a/..", "/abs", "a//"]:
        for call in calls:
            with pytest.raises(StoreUsageError, match="relative path"):
                call(prefix)


def test_what_is_not_there(store: Store, tmp_path: Path) -> None:
    store.put("folder/object", b"x")
    for key in ["absent", "folder", "folder/absent", "no/such/folder"]:
        with pytest.raises(ObjectNotFoundError, match="is written") as caught:
            store.get(key)
        assert store.uri(key) in str(caught.value)
        assert isinstance(caught.value, FileNotFoundError)
        assert store.stat(key) is None
        store.delete(key)
        store.delete_tree(key + "/absent")
        (tmp_path / "kept").write_text("before")
        with pytest.raises(ObjectNotFoundError):
            store.download(key, tmp_path / "kept")
        assert (tmp_path / "kept").read_text() == "before"
    assert keys(store) == ["folder/object"]
    assert keys(store, "absent") == store.list_children("absent") == []
    with pytest.raises(ObjectNotFoundError, match="contains no objects"):
        store.download_tree("absent", tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".palate-")]


def test_a_listing_is_recursive_and_sorted_by_key(store: Store) -> None:
    names = ["a.txt", "a/b", "a-b/c", "a b", "Z", "jobs/10/m", "jobs/1/m", "jobs/1/logs/000002", "jobs/1/logs/000001"]
    for name in names:
        store.put(name, name.encode())
    assert keys(store) == sorted(names)
    assert keys(store, "jobs/1") == keys(store, "jobs/1/") == ["jobs/1/logs/000001", "jobs/1/logs/000002", "jobs/1/m"]
    assert keys(store, "job") == []
    assert {info.key: info.size for info in store.list()} == {name: len(name) for name in names}


def test_children_are_folders_that_hold_something(store: Store) -> None:
    for name in ["jobs/b/x/y", "jobs/a/z", "jobs/loose", "services/s/m"]:
        store.put(name, b"")
    if store.root.startswith("file://"):  # SeaweedFS names an emptied folder for a while
        store.put("jobs/gone/m", b"")
        store.delete("jobs/gone/m")
    assert store.list_children("jobs") == store.list_children("jobs/") == ["a", "b"]
    assert store.list_children() == ["jobs", "services"]
    assert store.list_children("jobs/a") == []


def test_a_listing_longer_than_one_page(store: Store) -> None:
    if store.root.startswith("oss://"):
        pytest.skip("the same requests as s3://, and a thousand objects take seconds")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.put(f"many/{number:04d}/x", b""), range(1010)))
    assert keys(store, "many") == [f"many/{number:04d}/x" for number in range(1010)]
    assert len(store.list_children("many")) == 1010
    store.delete_tree("many")
    assert keys(store) == []


def test_deleting_a_tree_leaves_its_neighbours(store: Store) -> None:
    for name in ["jobs/1/a", "jobs/1/b/c", "jobs/10/a", "jobs/1x"]:
        store.put(name, b"")
    store.delete("jobs/1/a")
    assert keys(store, "jobs/1") == ["jobs/1/b/c"]
    store.delete_tree("jobs/1/")
    assert keys(store) == ["jobs/10/a", "jobs/1x"]
    with pytest.raises(StoreUsageError, match="whole store"):
        store.delete_tree("")
    assert keys(store) == ["jobs/10/a", "jobs/1x"]


def test_if_match_writes_only_over_what_was_read(store: Store) -> None:
    first = store.put("status", b"1")
    second = store.put("status", b"2", if_match=first)
    for stale in (first, "never-an-etag"):
        with pytest.raises(PreconditionFailedError, match="read it again"):
            store.put("status", b"3", if_match=stale)
    assert store.get("status") == b"2"
    info = store.stat("status")
    assert info is not None
    assert info.etag == second
    with pytest.raises(PreconditionFailedError):
        store.put("absent", b"", if_match=first)
    assert store.stat("absent") is None
    with pytest.raises(StoreUsageError, match="mutually exclusive"):
        store.put("status", b"", if_match=second, if_none_match=True)
    with pytest.raises(StoreUsageError, match="empty"):
        store.put("status", b"", if_match="")


def test_if_none_match_writes_only_where_nothing_is(store: Store) -> None:
    if not store.atomic_replace:
        pytest.skip("OSS's own header means nothing to this server: test_s3_wire.py has it")
    store.put("manifest", b"1", if_none_match=True)
    with pytest.raises(PreconditionFailedError):
        store.put("manifest", b"2", if_none_match=True)
    assert store.get("manifest") == b"1"


@pytest.mark.parametrize("how", ["create", "replace"])
def test_of_eight_racing_writers_one_wins(store: Store, how: str) -> None:
    if not store.atomic_replace:
        pytest.skip("OSS has no If-Match, and its own header means nothing to this server")
    # A runner may open the job's folder as its root, the client the whole store: they still race for one object.
    below = open_store(store.uri("jobs/1"), options=getattr(store, "_options", None))
    for round_number in range(3):
        name = f"{how}-{round_number}"
        etag = store.put(f"jobs/1/{name}", b"before") if how == "replace" else None
        barrier = Barrier(8)

        def write(number: int, name: str = name, etag: str | None = etag, barrier: Barrier = barrier) -> bool:
            opened, key = (store, f"jobs/1/{name}") if number % 2 else (below, name)
            barrier.wait()
            try:
                opened.put(key, f"writer {number}".encode(), if_match=etag, if_none_match=etag is None)
            except PreconditionFailedError:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            won = [number for number, result in enumerate(pool.map(write, range(8))) if result]
        assert len(won) == 1
        assert store.get(f"jobs/1/{name}") == f"writer {won[0]}".encode()


def test_a_tree_goes_up_and_comes_down(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "linked").mkdir()
    contents = {f"deep/er/{n:02d}.bin": os.urandom(n * 1000) for n in range(20)} | {
        "top level.txt": b"t",
        "deep/ü": b"",
    }
    for name, data in contents.items():
        (source / name).write_bytes(data)
    (source / "skipped.tmp").write_bytes(b"no")
    (source / "link.txt").symlink_to(source / "top level.txt")
    (source / "linked" / "up").symlink_to(source)  # a loop

    expected = {**contents, "link.txt": b"t"}
    sent = store.upload_tree(source, "jobs/1/model/", skip=lambda name: name.endswith(".tmp"))
    assert sent == sorted(expected)
    assert keys(store) == [f"jobs/1/model/{name}" for name in sorted(expected)]

    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "top level.txt").write_bytes(b"old")
    assert store.download_tree("jobs/1/model", tmp_path / "target") == sorted(expected)
    assert {name: (tmp_path / "target" / name).read_bytes() for name in expected} == expected
    assert not [path for path in (tmp_path / "target").rglob("*") if path.name.startswith(".palate-")]


def test_a_tree_that_cannot_go_up(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a local folder"):
        store.upload_tree(tmp_path / "absent", "x")
    with pytest.raises(FileNotFoundError, match="not a local file"):
        store.upload(tmp_path / "absent", "x")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="dangling"):
        store.upload_tree(tmp_path / "tree", "x")
    assert keys(store) == []


def test_a_large_object_goes_in_parts_and_comes_back_equal(store: Store, tmp_path: Path) -> None:
    block = os.urandom(1 << 20)
    with (tmp_path / "large").open("wb") as stream:
        for number in range(20):
            stream.write(number.to_bytes(4) + block)
    digest = hashlib.sha256((tmp_path / "large").read_bytes()).hexdigest()
    store.upload(tmp_path / "large", "model/large.bin")
    store.download("model/large.bin", tmp_path / "back" / "large")
    assert hashlib.sha256((tmp_path / "back" / "large").read_bytes()).hexdigest() == digest
    assert hashlib.sha256(store.get("model/large.bin")).hexdigest() == digest
    info = store.stat("model/large.bin")
    assert info is not None
    assert info.size == (tmp_path / "large").stat().st_size
    replaced = store.put("model/large.bin", b"small", if_match=info.etag)
    with pytest.raises(PreconditionFailedError):
        store.put("model/large.bin", b"again", if_match=info.etag)
    assert replaced != info.etag


def test_a_private_object(store: Store) -> None:
    store.put("services/s/access_token", b"open")
    store.put("services/s/access_token", b"token", private=True)
    assert store.get("services/s/access_token") == b"token"
    path = store.local_path("services/s/access_token")
    if path is not None:
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700


def test_uris_name_objects(store: Store) -> None:
    store.put("inputs/a b.json", b"[]")
    uri = store.uri("inputs/a b.json")
    assert uri == f"{store.root}/inputs/a b.json"
    assert split_uri(uri) == (f"{store.root}/inputs", "a b.json")
    assert store.uri() == store.root
    assert store.uri("inputs/") == f"{store.root}/inputs"
    options = getattr(store, "_options", None)
    assert read_uri(uri, options=options) == b"[]"
    parent, name = open_parent(uri, options=options)
    assert parent.get(name) == b"[]"
    assert keys(open_store(store.uri("inputs") + "/", options=options)) == ["a b.json"]


def test_a_usable_store_passes_its_check_and_stays_clean(store: Store) -> None:
    store.check()
    store.check(write=False)
    assert keys(store) == []


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(ObjectNotFoundError("s3://b/k is not there")))
    assert isinstance(error, ObjectNotFoundError)
    assert str(error) == "s3://b/k is not there"
