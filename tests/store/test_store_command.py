"""`palate store ls, cp, rm, cat, url` over files and a real S3 server: from any place to any other."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from palate.cli import app
from palate.store import Store, open_store
from palate.store.errors import ObjectNotFoundError, StoreUsageError
from tests.support.seaweed import SeaweedServer

BIG = bytes(range(256)) * 40_000  # 10 MB: more than one part


@pytest.fixture(params=["file", "s3"])
def root(request: pytest.FixtureRequest, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of an empty folder that the command can reach, on this machine or in a bucket."""
    if request.param == "file":
        return str(tmp_path / "data")
    return s3_root(request, tmp_path, monkeypatch)


@pytest.fixture
def bucket_root(request: pytest.FixtureRequest, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return s3_root(request, tmp_path, monkeypatch)


def s3_root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    server: SeaweedServer = request.getfixturevalue("seaweed")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PALATE_S3_ADDRESSING_STYLE", "path")  # oss:// would ask for the bucket by host name
    return f"s3://{request.getfixturevalue('bucket')}/{tmp_path.name}"


def run(*arguments: str, **settings: Any) -> Result:
    return CliRunner().invoke(app, ["store", *arguments], **settings)


def done(*arguments: str, **settings: Any) -> Result:
    result = run(*arguments, **settings)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def tree(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"first")
    (folder / "sub" / "b.bin").write_bytes(BIG)
    (folder / "sub" / "ü c.txt").write_bytes(b"")
    return folder


def content(store: Store, prefix: str = "") -> dict[str, bytes]:
    return {info.key.removeprefix(prefix): store.get(info.key) for info in store.list(prefix)}


WHOLE = {"a.txt": b"first", "sub/b.bin": BIG, "sub/ü c.txt": b""}


def test_a_tree_goes_there_and_back_and_is_seen(root: str, tmp_path: Path) -> None:
    here, back = tree(tmp_path / "here"), tmp_path / "back"
    sent = done("cp", "-r", str(here), f"{root}/tree")
    assert sent.stdout.strip().endswith("/tree")
    assert "3 files, 10.2 MB in place" in sent.stderr
    assert sent.stderr.splitlines()[-1].startswith("next: palate store ls -l ")
    assert done("ls", f"{root}/tree").stdout.splitlines() == ["a.txt", "sub/"]
    assert done("ls", "-r", f"{root}/tree/").stdout.splitlines() == ["a.txt", "sub/b.bin", "sub/ü c.txt"]
    header, first, folder = done("ls", "-l", f"{root}/tree").stdout.splitlines()
    assert header == "bytes\tmodified\tname"
    assert (first.split("\t")[0], first.split("\t")[2], folder) == ("5", "a.txt", "\t\tsub/")
    assert done("ls", f"{root}/tree/a.txt").stdout == "a.txt\n"
    done("cp", "-r", f"{root}/tree", str(back))
    assert content(open_store(back)) == WHOLE
    assert done("cat", f"{root}/tree/a.txt", f"{root}/tree/sub/b.bin").stdout_bytes == b"first" + BIG


def test_one_object_goes_into_a_folder_or_gets_a_name(root: str, tmp_path: Path) -> None:
    here = tree(tmp_path / "here")
    assert done("cp", str(here / "a.txt"), f"{root}/into/").stdout.strip().endswith("/into/a.txt")
    done("cp", f"{root}/into/a.txt", f"{root}/named.txt")
    done("cp", f"{root}/named.txt", str(here / "sub"))
    assert (here / "sub" / "named.txt").read_bytes() == b"first"
    with pytest.raises(StoreUsageError, match="it is a folder: give -r"):
        run("cp", f"{root}/into", str(tmp_path / "x"), catch_exceptions=False)
    with pytest.raises(StoreUsageError, match="one of them is, or lies in"):
        run("cp", "-r", root, f"{root}/into/deeper", catch_exceptions=False)


def test_rm_says_what_it_is_and_needs_a_yes(root: str, tmp_path: Path) -> None:
    done("cp", "-r", str(tree(tmp_path / "here")), f"{root}/tree")
    with pytest.raises(StoreUsageError, match=r"nothing was removed.*--yes"):
        run("rm", "-r", f"{root}/tree", catch_exceptions=False)
    with pytest.raises(StoreUsageError, match="give -r to remove"):
        run("rm", "--yes", f"{root}/tree", catch_exceptions=False)
    assert len(content(open_store(root), "tree/")) == 3
    gone = done("rm", "--yes", f"{root}/tree/a.txt")
    assert "1 object, 5 bytes" in gone.stderr
    assert gone.stdout.endswith("/tree/a.txt\tdeleted\n")
    assert "2 objects, 10.2 MB, below" in done("rm", "-r", "--yes", f"{root}/tree").stderr
    for arguments in (["rm", "--yes", f"{root}/tree/a.txt"], ["rm", "-ry", f"{root}/tree"], ["ls", f"{root}/tree"]):
        with pytest.raises(ObjectNotFoundError, match="tree"):
            run(*arguments, catch_exceptions=False)


def test_a_tree_goes_on_where_it_broke_off(bucket_root: str, tmp_path: Path) -> None:
    """Within a bucket and between two: what is in place is left, what differs is replaced."""
    server_side, other = open_store(f"{bucket_root}/copy"), open_store(f"{bucket_root.replace('s3:', 'oss:')}/other")
    done("cp", "-r", str(tree(tmp_path / "here")), f"{bucket_root}/tree")
    for uri, store in ((f"{bucket_root}/copy", server_side), (other.root, other)):
        done("cp", "-r", f"{bucket_root}/tree", uri)
        assert content(store) == WHOLE
        before = {info.key: info.modified_s for info in store.list()}
        store.put("a.txt", b"FIRST")  # the same size
        store.delete("sub/ü c.txt")
        done("cp", "-r", f"{bucket_root}/tree", uri)
        assert content(store) == WHOLE
        assert {info.key: info.modified_s for info in store.list()}["sub/b.bin"] == before["sub/b.bin"]


def test_a_link_is_read_without_keys(bucket_root: str) -> None:
    store = open_store(bucket_root)
    store.put("a b.txt", b"for all")
    link = done("url", f"{bucket_root}/a b.txt", "--expires", "5min")
    assert urllib.request.urlopen(link.stdout.strip(), timeout=20).read() == b"for all"
    assert link.stderr == "whoever has this link can read the object for 5min\n"
    writing = done("url", f"{bucket_root}/new.txt", "--put").stdout.strip()
    urllib.request.urlopen(urllib.request.Request(writing, data=b"sent", method="PUT"), timeout=20).close()
    assert store.get("new.txt") == b"sent"
    with pytest.raises(ObjectNotFoundError, match="missing"):
        run("url", f"{bucket_root}/missing", catch_exceptions=False)
    with pytest.raises(StoreUsageError, match="a week"):
        run("url", f"{bucket_root}/new.txt", "--expires", "8d", catch_exceptions=False)


def test_a_file_has_no_link(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreUsageError, match="has no link"):
        run("url", str(tmp_path / "x"), catch_exceptions=False)


def test_whole_stores_are_safe(bucket_root: str) -> None:
    bucket = bucket_root.rpartition("/")[0]
    for uri in (bucket, f"{bucket}/", "/"):
        with pytest.raises(StoreUsageError, match="is a whole store"):
            run("rm", "-r", "--yes", uri, catch_exceptions=False)


def test_an_error_is_one_message(home: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "palate.cli", "store", "cat", str(tmp_path / "missing")]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("error: ")
    assert "is not there" in failed.stderr
