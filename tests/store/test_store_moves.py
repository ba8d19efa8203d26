"""Ranges, checksums, and trees that go on where they ended: over every store."""

from __future__ import annotations

import os
import random
import resource
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from palate.store import Store, StoreOptions, TransferProgress, open_store
from palate.store.local import crc32_of, spelled
from palate_recipes.errors import ObjectNotFoundError, StoreError, StoreUsageError
from tests.support.stores import empty_store

LARGE = 16 * (1 << 20) + 12_345


@pytest.fixture(params=["file", "s3", pytest.param("oss", marks=pytest.mark.thorough)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return empty_store(request.param, request, tmp_path)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of three parts, the last one short."""
    path = tmp_path_factory.mktemp("large") / "weights.bin"
    path.write_bytes(random.Random(1).randbytes(LARGE))
    return path


def crc(data: bytes) -> str:
    return spelled(zlib.crc32(data))


def test_ranges(store: Store) -> None:
    store.put("log", b"0123456789")
    assert store.get_range("log", 0, 4) == b"0123"
    assert store.get_range("log", 3, 1) == b"3"
    assert store.get_range("log", 8, 100) == store.get_range("log", 8) == b"89"
    assert store.get_range("log", 10) == store.get_range("log", 10, 5) == store.get_range("log", 99, 5) == b""
    assert store.get_range("log", 0) == b"0123456789"
    store.put("empty", b"")
    assert store.get_range("empty", 0, 5) == store.get_range("empty", 0) == b""
    for start, length in ((-1, 5), (0, 0), (0, -1)):
        with pytest.raises(StoreUsageError, match="expected start >= 0"):
            store.get_range("log", start, length)
    for key in ("absent", "absent/log"):
        with pytest.raises(ObjectNotFoundError):
            store.get_range(key, 0, 5)


def test_what_exists(store: Store) -> None:
    store.put("folder/object", b"")
    assert store.exists("folder/object")
    assert not store.exists("folder")
    assert not store.exists("absent")
    assert not store.exists("folder/object/below")


def test_checksums_of_all_that_was_written(store: Store, large: Path, tmp_path: Path) -> None:
    store.put("small", b"small")
    assert store.checksum("small") == crc(b"small")
    store.put("small", b"other")
    assert store.checksum("small") == crc(b"other")
    (tmp_path / "empty").write_bytes(b"")
    store.upload(tmp_path / "empty", "empty")
    assert store.checksum("empty") == crc(b"") == "00000000"
    store.upload(large, "large")
    assert store.checksum("large") == crc32_of(large) == crc(large.read_bytes())
    assert store.checksum("absent") is None


@pytest.fixture
def tree(tmp_path: Path, large: Path) -> Path:
    folder = tmp_path / "tree"
    (folder / "deep").mkdir(parents=True)
    for number in range(12):
        (folder / "deep" / f"{number:02d}.bin").write_bytes(os.urandom(number * 500))
    (folder / "weights.bin").symlink_to(large)
    return folder


def etags(store: Store, prefix: str) -> dict[str, float]:
    return {info.key: info.modified_s for info in store.list(prefix)}


def test_a_tree_up_again_sends_only_what_differs(store: Store, tree: Path) -> None:
    names = store.upload_tree(tree, "m")
    before = etags(store, "m")
    edge = time.time() + 1.1  # times of a bucket are of whole seconds
    while time.time() < edge:
        time.sleep(0.05)
    data = bytearray((tree / "deep" / "07.bin").read_bytes())
    data[100] ^= 1
    (tree / "deep" / "07.bin").write_bytes(data)  # as large as before
    (tree / "deep" / "08.bin").write_bytes(b"another size")
    store.delete("m/deep/03.bin")
    sent: list[int] = []
    assert store.upload_tree(tree, "m", progress=lambda state: sent.append(state.files_done)) == names
    assert sent[-1] == len(names)
    after = etags(store, "m")
    changed = {key for key in after if after[key] != before[key]}
    assert changed == {"m/deep/07.bin", "m/deep/08.bin", "m/deep/03.bin"}
    assert store.get("m/deep/07.bin") == bytes(data)


def test_a_tree_down_again_fetches_only_what_differs(store: Store, tree: Path, tmp_path: Path) -> None:
    names = store.upload_tree(tree, "m")
    target = tmp_path / "target"
    store.download_tree("m", target)
    numbers = {name: (target / name).stat().st_ino for name in names}
    (target / "deep" / "05.bin").unlink()
    damaged = bytearray((target / "weights.bin").read_bytes())
    damaged[-1] ^= 1
    (target / "weights.bin").write_bytes(damaged)
    kept = (target / "deep" / "06.bin").stat().st_mtime_ns
    assert store.download_tree("m", target) == names
    assert {name: (target / name).read_bytes() for name in names} == {
        name: (tree / name).read_bytes() for name in names
    }
    assert (target / "deep" / "06.bin").stat().st_mtime_ns == kept
    replaced = {name for name in names if (target / name).stat().st_ino != numbers[name]}
    assert {"weights.bin"} <= replaced <= {"weights.bin", "deep/05.bin"}


def test_progress_ends_at_the_whole(store: Store, tree: Path, tmp_path: Path) -> None:
    size = sum((tree / name).stat().st_size for name in ["weights.bin", *(f"deep/{n:02d}.bin" for n in range(12))])
    for move in (
        lambda tell: store.upload_tree(tree, "m", progress=tell),
        lambda tell: store.download_tree("m", tmp_path / "target", progress=tell),
        lambda tell: store.download_tree("m", tmp_path / "target", progress=tell),  # all of it is there
    ):
        states: list[TransferProgress] = []
        move(states.append)
        assert states[-1] == TransferProgress(files_done=13, files_total=13, bytes_done=size, bytes_total=size)
        assert all(a.bytes_done <= b.bytes_done for a, b in pairwise(states))
    moved: list[int] = []
    store.upload(tree / "weights.bin", "single", moved=moved.append)
    store.download("single", tmp_path / "single", moved=moved.append)
    assert sum(moved) == 2 * LARGE


def test_a_tree_with_a_file_that_fails_goes_on_later(store: Store, tree: Path) -> None:
    (tree / "deep" / "00.bin").unlink()
    (tree / "deep" / "00.bin").symlink_to(tree / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"00\.bin"):
        store.upload_tree(tree, "m")
    (tree / "deep" / "00.bin").unlink()
    (tree / "deep" / "00.bin").write_bytes(b"mended")
    assert len(store.upload_tree(tree, "m")) == 13
    assert store.get("m/deep/00.bin") == b"mended"


def test_one_store_serves_many_threads(store: Store, large: Path, tmp_path: Path) -> None:
    def both(number: int) -> str:
        store.upload(large, f"{number}")
        store.download(f"{number}", tmp_path / f"{number}")
        return crc32_of(tmp_path / f"{number}")

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(both, range(4))) == {crc32_of(large)}


def test_a_file_that_changes_while_it_goes_up(s3_options: StoreOptions, bucket: str, tmp_path: Path) -> None:
    store = open_store(f"s3://{bucket}/{tmp_path.name}", options=s3_options)
    path = tmp_path / "growing"
    path.write_bytes(bytes(4 * LARGE))  # more parts than go at the same time
    once = threading.Lock()

    def change(_: int) -> None:
        if once.acquire(blocking=False):
            path.write_bytes(b"\1" * 4 * LARGE)

    with pytest.raises(StoreError, match="changed during the upload"):
        store.upload(path, "growing", moved=change)
    assert not store.exists("growing")
    pages = store._client.list_multipart_uploads(Bucket=bucket, Prefix=tmp_path.name)  # type: ignore[attr-defined]
    assert not pages.get("Uploads"), "no parts stay behind"


def test_a_download_that_finds_no_room(store: Store, large: Path, tmp_path: Path) -> None:
    store.upload(large, "large")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(StoreError, match=r"out cannot be written: File too large.*Check") as caught:
            store.download("large", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not isinstance(caught.value, FileNotFoundError)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
