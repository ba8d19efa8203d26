"""TensorBoard's files reach the store while they grow, and a store that is away for a while delays nothing."""

from __future__ import annotations

from pathlib import Path

from palate.runner.event_files import EventFilePusher
from palate.runs.record import Record
from palate.store import open_store
from tests.support.manifests import train_manifest


def record_at(home: Path) -> Record:
    record = Record(open_store(str(home / "store")), "jobs", "one")
    record.create(train_manifest("one"))
    return record


def stored(record: Record) -> dict[str, bytes]:
    prefix = record.key("tensorboard")
    return {info.key.removeprefix(f"{prefix}/"): record.store.get(info.key) for info in record.store.list(prefix)}


def test_what_has_grown_is_uploaded_and_what_was_there_is_not(home: Path, tmp_path: Path) -> None:
    record, folder = record_at(home), tmp_path / "tensorboard"
    folder.mkdir()
    (folder / "events.earlier").write_bytes(b"staged")
    file = folder / "inner" / "events.now"
    file.parent.mkdir()
    with EventFilePusher(record, folder, "tensorboard", every_s=0) as pusher:
        pusher.look()
        for content in (b"one", b"one two"):
            file.write_bytes(content)
            # Looks again until the worker has uploaded it: the runner looks every quarter second.
            while stored(record).get("inner/events.now") != content:
                pusher.look()
    assert stored(record) == {"inner/events.now": b"one two"}


def test_a_folder_that_is_missing_and_a_store_that_fails_are_no_errors(home: Path, tmp_path: Path) -> None:
    record, folder = record_at(home), tmp_path / "tensorboard"
    with EventFilePusher(record, folder, "tensorboard", every_s=0) as pusher:
        pusher.look()
        folder.mkdir()
        (folder / "events").write_bytes(b"one")
        blocked = home / "store" / "jobs" / "one" / "tensorboard"
        blocked.write_bytes(b"a file in place of the folder")
        pusher.look()
    assert blocked.is_file()
    blocked.unlink()
    with EventFilePusher(record, folder, "tensorboard", every_s=0) as pusher:
        (folder / "events").write_bytes(b"one two")
        pusher.look()
    assert stored(record) == {"events": b"one two"}
