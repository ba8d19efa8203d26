"""A service's adapters from the client to the work folder: the record, the checks, the files, and the wait. Without an engine."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace as with_fields
from pathlib import Path
from typing import Any

import pytest
from msgspec import to_builtins
from msgspec.structs import replace

import palate.adapter_files
import palate.runner.adapters
import palate.service_adapters
from palate import Predictor, Session, TrainingJob
from palate.checksums import DIGESTS_FILE, Checksums
from palate.deploy import _take_over_failed
from palate.errors import (
    ConfigurationError,
    DamagedFilesError,
    DataError,
    JobNotReadyError,
    RunNotFoundError,
    ServiceError,
    StoreUsageError,
    UnservableError,
    WaitTimeoutError,
)
from palate.runner.adapters import StagedAdapters
from palate.runs.adapters import add, read_adapters, remove, take_back
from palate.runs.record import ADAPTERS_KEY, Record
from palate.runs.rollout import ask, reserve, update_to, withdraw
from palate.store import Store, StoreOptions, open_store
from palate_recipes.specs.adapters import ServedAdapter
from palate_recipes.specs.fleet import ADAPTERS_LIMIT, AdapterState, FleetAdapter
from palate_recipes.specs.weights import BaseModel, WeightsSource
from tests.slow.conftest import until
from tests.support.gate import FAIR, Weather, gate_to
from tests.support.manifests import base_model, serve_manifest, train_manifest
from tests.support.schemas import check_records
from tests.support.stores import empty_store

CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
CONFIG["base_model_name_or_path"] = "m"
RUNNING: dict[str, Any] = {"state": "Running", "endpoint": "http://127.0.0.1:9", "engine_id": "elsewhere:1:2:x"}


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, home: Path, tmp_path: Path) -> Store:
    return empty_store(request.param, request, tmp_path)


@pytest.fixture
def session(store: Store, request: pytest.FixtureRequest) -> Session:
    options = None if store.root.startswith("file") else request.getfixturevalue("s3_options")
    return Session(store=store.root, options=options)


@pytest.fixture
def record(store: Store) -> Record:
    """A service of a LoRA job that its record says is stopped."""
    return service(store)


def service(store: Store, name: str = "svc", **fields: Any) -> Record:
    record = Record(store, "services", name)
    record.create(serve_manifest(name, **{"tuned_uri": store.uri("jobs/first/model"), "adapter": True, **fields}))
    record.advance("Stopped", expect={"Creating"})
    return record


def adapter_folder(folder: Path, *, weights: bytes = b"weights", **changes: Any) -> Path:
    """What a LoRA training writes, and a pickle that a loader could prefer."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_model.bin").write_bytes(b"a pickle")
    (folder / "tokenizer.json").write_text("{}")
    (folder / DIGESTS_FILE).write_bytes(Checksums.of(folder).encode())
    return folder


def digest_of(folder: Path) -> str:
    return hashlib.sha256((folder / DIGESTS_FILE).read_bytes()).hexdigest()


def job(store: Store, folder: Path, name: str = "second", **fields: Any) -> Record:
    """A succeeded job whose model is this folder's content."""
    record = Record(store, "jobs", name)
    record.create(train_manifest(name, **fields))
    for path in folder.iterdir():
        store.upload(path, record.key("model", path.name))
    record.advance("Succeeded", expect={"Creating"}, details={"model_digest": digest_of(folder)})
    return record


def entry(name: str = "support", digit: str = "a", **changes: Any) -> ServedAdapter:
    fields = {"uri": "file:///nowhere/model", "rank": 8, "job": "second", "added_at": 1.0, **changes}
    return ServedAdapter(name=name, digest=digit * 64, **fields)


def of_job(record: Record, folder: Path, name: str = "support", job: str = "second") -> ServedAdapter:
    """The entry of a job's adapter."""
    return replace(entry(name, job=job, uri=record.store.uri(f"jobs/{job}/model")), digest=digest_of(folder))


def staged(record: Record, folder: Path, session: Session, said: list[str] | None = None) -> StagedAdapters:
    return StagedAdapters(record, folder, session, (said if said is not None else []).append)


def brought(staging: StagedAdapters) -> tuple[FleetAdapter, ...]:
    """The adapters that are here once all was tried."""
    staging.look()
    staging.bring()
    return staging.look()


@contextmanager
def followed(record: Record, folder: Path, session: Session, *, engine: str = "") -> Iterator[list[dict[str, Any]]]:
    """The service runs, and its runner tells what it has staged; `engine` is why its engine takes none. Yields what was told."""
    staging, ended, told = staged(record, folder, session), threading.Event(), []

    def follow() -> None:
        while not ended.wait(0.05):
            states = [
                AdapterState(name=one.name, digest=one.digest, state="failed" if engine else "ready", reason=engine)
                for one in brought(staging)
            ]
            found = to_builtins([*states, *staging.missing])
            if found != (told[-1] if told else None):
                record.note(details={**record.status().details, "adapters": found})
                told.append(found)

    record.note(**RUNNING, finished_at=None)
    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield told
    finally:
        ended.set()
        thread.join()
        record.note(state="Stopped", finished_at=time.time())


# ── the record ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_concurrent_changes_all_count_and_the_number_is_limited(record: Record) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: add(record, entry(f"a-{number}"), replace=False), range(12)))
    assert {one.name for one in read_adapters(record)} == {f"a-{number}" for number in range(12)}
    assert remove(record, "a-3").name == "a-3"
    with pytest.raises(ConfigurationError, match=r"no adapter 'a-3'. It has: a-"):
        remove(record, "a-3")
    many = [to_builtins(entry(f"b-{number}")) for number in range(ADAPTERS_LIMIT)]
    record.store.put(record.key(ADAPTERS_KEY), json.dumps({"adapters": many, "schema": 1}).encode())
    with pytest.raises(ConfigurationError, match="has 256 adapters"):
        add(record, entry(), replace=False)
    assert check_records(record.store) == 3


def test_a_name_is_replaced_only_if_that_is_meant(record: Record) -> None:
    first, second = entry(), entry(digit="b", job="third")
    assert add(record, first, replace=False) is None
    assert add(record, replace(first, added_at=2.0), replace=False) == first, "the same files: nothing changes"
    with pytest.raises(ConfigurationError, match="has an adapter 'support' already, of job second"):
        add(record, second, replace=False)
    assert add(record, second, replace=True) == first
    assert take_back(record, second, first)
    assert not take_back(record, second, None), "somebody else has changed it"
    assert read_adapters(record) == (first,)
    moved = replace(first, uri="file:///elsewhere/model")
    assert add(record, moved, replace=False) == first, "the same files at another place"
    assert read_adapters(record) == (moved,)


@pytest.mark.parametrize("store", ["file"], indirect=True)
def test_a_damaged_list_is_named_and_changes_nothing(record: Record, session: Session, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "model")
    job(record.store, folder)
    add(record, of_job(record, folder), replace=False)
    staging = staged(record, tmp_path / "work", session)
    before = brought(staging)
    assert [one.name for one in before] == ["support"]
    good = json.loads(record.store.get(record.key(ADAPTERS_KEY)))
    one = good["adapters"][0]
    for content in (
        b" ",
        b"{",
        b"\xff",
        b"[" * 60_000,
        b'{"adapters": "' + b"x" * 5_000_000 + b'"}',
        *(
            json.dumps({"adapters": adapters}).encode()
            for adapters in (
                [one, one],
                [{**one, "name": "../up"}],
                [{**one, "digest": "../up"}],
                [{**one, "digest": one["digest"].upper()}],
                [{**one, "rank": 0}],
                [{**one, "uri": ""}],
                [{**one, "uri": "x" * 3000}],
                [{**one, "name": f"a{number}"} for number in range(300)],
            )
        ),
    ):
        record.store.put(record.key(ADAPTERS_KEY), content)
        with pytest.raises(DamagedFilesError, match=r"adapters\.json of svc is damaged"):
            brought(staging)
        with pytest.raises(DamagedFilesError):
            Predictor("svc", session=session).adapters()
    record.store.put(record.key(ADAPTERS_KEY), json.dumps(good).encode())
    assert brought(staging) == before


def test_a_service_that_takes_over_a_failed_one_has_none_of_its_adapters(record: Record, session: Session) -> None:
    add(record, entry(), replace=False)
    record.store.put(record.key("adapters", "a" * 64, DIGESTS_FILE), b"{}")
    record.note(state="Failed")
    assert _take_over_failed(record, serve_manifest("svc"), session)
    assert read_adapters(record) == ()
    assert [info.key for info in record.store.list(record.key("adapters"))] == []


# ── the files ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_adapters_are_staged_verified_and_cleaned_up(
    record: Record, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    work = tmp_path / "work"
    staging = staged(record, work, session, said)
    assert brought(staging) == ()
    assert not work.exists(), "a service without adapters has no folder for them"

    one = adapter_folder(tmp_path / "one")
    other = adapter_folder(tmp_path / "other", weights=b"of the other")
    job(record.store, one)
    job(record.store, other, "third")
    add(record, of_job(record, one), replace=False)
    add(record, of_job(record, other, "sales", "third"), replace=False)
    add(record, of_job(record, one, "same-files"), replace=False)
    found = brought(staging)
    assert [(a.name, a.digest) for a in found] == [
        ("support", digest_of(one)),
        ("sales", digest_of(other)),
        ("same-files", digest_of(one)),
    ]
    assert found[0].path == found[2].path
    assert (staging.missing, len(said)) == ((), 2)
    for adapter, folder in ((found[0], one), (found[1], other)):
        files = {path.name: path for path in Path(adapter.path).iterdir()}
        assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}, "no pickle, and no tokenizer"
        assert all(path.read_bytes() == (folder / name).read_bytes() for name, path in files.items())
        assert not any(path.is_symlink() for path in files.values())

    # The copy outlives the job, a new process finds the adapters again, and a removed one stays for a while.
    record.store.delete_tree("jobs/third")
    remove(record, "same-files")
    remove(record, "sales")
    assert [a.name for a in brought(staging)] == ["support"]
    assert Path(found[1].path).is_dir()
    monkeypatch.setattr(palate.runner.adapters, "KEPT_S", 0.0)
    again = brought(staged(record, tmp_path / "again", session))
    assert [(a.name, a.digest) for a in again] == [("support", digest_of(one))]
    assert [a.name for a in brought(staging)] == ["support"]
    assert [path.name for path in work.iterdir()] == [digest_of(one)]


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_removal_and_a_new_adapter_do_not_wait_for_the_download_of_another(
    record: Record, session: Session, tmp_path: Path, s3_options: StoreOptions
) -> None:
    first = adapter_folder(tmp_path / "first")
    large = adapter_folder(tmp_path / "large", weights=os.urandom(4 << 20))
    job(record.store, first)
    job(record.store, large, "third")
    add(record, of_job(record, first), replace=False)
    with gate_to(int(str(s3_options.endpoint_url).rpartition(":")[2])) as gate:
        through = with_fields(s3_options, endpoint_url=f"http://127.0.0.1:{gate.port}")
        work = tmp_path / "work"
        staging = staged(record, work, Session(store=record.store.root, options=through))
        assert [one.name for one in brought(staging)] == ["support"]
        add(record, of_job(record, large, "sales", "third"), replace=False)
        assert [one.name for one in staging.look()] == ["support"]
        gate.weather = Weather(bytes_per_s=10_000)  # minutes for the weights
        bringing = threading.Thread(target=staging.bring)
        bringing.start()
        try:
            until(lambda: any(path.name.startswith(".draft-") for path in work.iterdir()))
            assert [(one.name, one.state) for one in staging.missing] == [("sales", "loading")]
            remove(record, "support")
            add(record, of_job(record, first, "again"), replace=False)
            assert [one.name for one in staging.look()] == ["again"], "its files are here"
            remove(record, "sales")
            assert (staging.look()[0].name, staging.missing) == ("again", ())
            assert bringing.is_alive()
        finally:
            gate.weather = FAIR
            bringing.join()
    assert [one.name for one in staging.look()] == ["again"]


class Counting:
    """A store that counts requests."""

    def __init__(self, store: Store) -> None:
        self._store, self.requests = store, list[str]()

    def __getattr__(self, name: str) -> Any:
        if name not in ("root", "uri", "local_path"):
            self.requests.append(name)
        return getattr(self._store, name)


def test_an_update_without_a_change_is_one_request(record: Record, session: Session, tmp_path: Path) -> None:
    one = adapter_folder(tmp_path / "one")
    job(record.store, one)
    add(record, of_job(record, one), replace=False)
    add(record, entry("absent"), replace=False)
    counting = Counting(record.store)
    staging = staged(Record(counting, "services", "svc"), tmp_path / "work", session)  # type: ignore[arg-type]
    first = brought(staging)
    counting.requests.clear()
    assert staging.look() == first
    assert counting.requests == ["get_range"]
    assert [state.name for state in staging.missing] == ["absent"]


def _weights(folder: Path, content: bytes) -> None:
    (folder / "adapter_model.safetensors").write_bytes(content)


def _list(folder: Path, name: str, **facts: Any) -> None:
    listed = json.loads((folder / DIGESTS_FILE).read_bytes())
    listed["files"][name] = {**listed["files"].get(name, {"bytes": 1, "sha256": "0" * 64}), **facts}
    (folder / DIGESTS_FILE).write_text(json.dumps(listed))


DAMAGE = {
    "changed weights of the same size": (
        lambda f: _weights(f, b"WEIGHTS"),
        "adapter_model.safetensors missing or changed",
    ),
    "longer weights": (lambda f: _weights(f, b"weights" * 9), "adapter_model.safetensors missing or changed"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors missing or changed",
    ),
    "another list": (lambda f: _list(f, "x"), "is not the adapter that was added"),
    "no list": (lambda f: (f / DIGESTS_FILE).unlink(), "has no digests.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_does_not_hinder_the_others(
    record: Record, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    good, bad = adapter_folder(tmp_path / "good"), adapter_folder(tmp_path / "bad", r=4)
    change, words = DAMAGE[damage]
    added = of_job(record, bad, "bad", "third")
    kept = {path.name: path.read_bytes() for path in bad.iterdir()}
    change(bad)
    third = Record(record.store, "jobs", "third")
    for path in bad.iterdir():
        record.store.upload(path, third.key("model", path.name))
    job(record.store, good)
    add(record, added, replace=False)
    add(record, of_job(record, good), replace=False)
    said: list[str] = []
    staging = staged(record, tmp_path / "work", session, said)
    assert [one.name for one in brought(staging)] == ["support"]
    (failed,) = staging.missing
    assert (failed.name, failed.digest, failed.state) == ("bad", added.digest, "failed")
    assert words in failed.reason
    assert len(said) == 2
    assert {path.name for path in (tmp_path / "work").iterdir()} == {digest_of(good)}, "nothing unverified stays"

    # It is tried again when its time has come, and served once it is restored.
    for name, content in kept.items():
        record.store.put(third.key("model", name), content)
    assert [one.name for one in brought(staging)] == ["support"]
    later = time.monotonic() + palate.runner.adapters.FIRST_RETRY_S

    class Later:
        @staticmethod
        def monotonic() -> float:
            return later

    monkeypatch.setattr(palate.runner.adapters, "time", Later)
    assert [one.name for one in brought(staging)] == ["bad", "support"]
    assert staging.missing == ()


@pytest.mark.parametrize("store", ["file"], indirect=True)
def test_hostile_entries_are_refused_one_by_one(record: Record, session: Session, tmp_path: Path) -> None:
    good = adapter_folder(tmp_path / "good")
    job(record.store, good)

    outside = tmp_path / "secret"
    outside.write_bytes(b"secret!")  # as long as the weights
    linked = adapter_folder(tmp_path / "linked", r=9)
    (linked / "adapter_model.safetensors").unlink()
    (linked / "adapter_model.safetensors").symlink_to(outside)
    pipe = adapter_folder(tmp_path / "pipe", r=2)
    (pipe / "adapter_model.safetensors").unlink()
    os.mkfifo(pipe / "adapter_model.safetensors")
    listed = adapter_folder(tmp_path / "listed", r=3)
    _list(listed, "../../up")
    huge = adapter_folder(tmp_path / "huge", r=5)
    _list(huge, "adapter_model.safetensors", bytes=10**15)
    long_list = adapter_folder(tmp_path / "long", r=6)
    (long_list / DIGESTS_FILE).write_bytes(b" " * 2_000_000)
    no_list = adapter_folder(tmp_path / "no-list", r=7)
    (no_list / DIGESTS_FILE).write_bytes(b"[]")
    folders = {
        "linked": "adapter_model.safetensors missing or changed",
        "pipe": "missing or changed",
        "listed": "not a path inside the folder",
        "huge": "expected up to 64 GiB",
        "long": "more than 1048576 bytes",
        "no-list": "not a list of digests",
    }
    for name in folders:
        uri = f"file://{tmp_path / name}"
        add(record, replace(entry(name, uri=uri), digest=digest_of(tmp_path / name)), replace=False)
    others = {
        "default": ("file:///nowhere/model", "is the tuned model's"),
        "svc": ("file:///nowhere/model", "is the tuned model's"),
        "base": ("file:///nowhere/model", "is the base model's"),
        "v2": ("file:///nowhere/model", "is a version's"),
        "bucket": ("s3://bucket", "whole store"),
        "scheme": ("http://127.0.0.1:9/model", "scheme http:// is unknown"),
        "up": ("file:///nowhere/../../model", "has no digests.json"),
        "nul": ("file:///nowhere/mo\0del", "NUL character"),
    }
    for name, (uri, _) in others.items():
        add(record, entry(name, uri=uri), replace=False)
    add(record, of_job(record, good), replace=False)
    staging = staged(record, tmp_path / "work", session)
    assert [one.name for one in brought(staging)] == ["support"]
    reasons = {state.name: state.reason for state in staging.missing}
    words = {**folders, **{name: words for name, (_, words) in others.items()}}
    assert set(reasons) == set(words)
    assert not {name: reason for name, reason in reasons.items() if words[name] not in reason}
    assert [path.name for path in (tmp_path / "work").iterdir()] == [digest_of(good)]

    # A link to what the training wrote is no harm: what is served is a copy, and no link.
    outside.write_bytes(b"weights")
    whole = brought(staged(record, tmp_path / "whole", session))
    assert [one.name for one in whole] == ["linked", "support"]
    assert not (Path(whole[0].path) / "adapter_model.safetensors").is_symlink()


@pytest.mark.parametrize("store", ["file"], indirect=True)
def test_an_adapter_that_does_not_fit_on_the_disk_is_not_copied(
    record: Record, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = adapter_folder(tmp_path / "one")
    job(record.store, one)
    add(record, of_job(record, one), replace=False)
    monkeypatch.setattr(palate.adapter_files, "_FREE_BYTES", 2**62)
    staging = staged(record, tmp_path / "work", session)
    assert brought(staging) == ()
    assert "GiB are free" in staging.missing[0].reason


# ── the client ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_adapter_is_added_replaced_and_removed_while_the_service_runs(
    record: Record, session: Session, tmp_path: Path
) -> None:
    first, second = adapter_folder(tmp_path / "one"), adapter_folder(tmp_path / "two", weights=b"newer", r=16)
    job(record.store, first)
    job(record.store, second, "third")
    predictor = Predictor("svc", session=session)
    with followed(record, tmp_path / "work", session) as told:
        predictor.add_adapter("support", TrainingJob.get("second", session))
        assert told[-1] == [{"name": "support", "digest": digest_of(first), "state": "ready"}]
        predictor.add_adapter("support", "second")  # there already
        (one,) = predictor.adapters()
        assert (one.name, one.state, one.rank, one.job) == ("support", "ready", 8, "second")
        assert (one.digest, one.uri) == (digest_of(first), record.store.uri("jobs/second/model"))
        assert time.time() - 60 < one.added_at <= time.time()

        with pytest.raises(ConfigurationError, match="has an adapter 'support' already, of job second"):
            predictor.add_adapter("support", "third")
        predictor.add_adapter("support", "third", replace=True)
        assert [(one.rank, one.state) for one in predictor.adapters()] == [(16, "ready")]
        predictor.add_adapter("by-uri", record.store.uri("jobs/second/model"))
        predictor.add_adapter("by-job-uri", record.store.uri("jobs/second"))
        assert [(one.name, one.job) for one in predictor.adapters()] == [
            ("support", "third"),
            ("by-uri", ""),
            ("by-job-uri", "second"),
        ]
        predictor.remove_adapter("support")
        assert "support" not in [one["name"] for one in told[-1]], "it is gone when the call returns"
        with pytest.raises(ConfigurationError, match=r"no adapter 'support'. It has: by-uri, by-job-uri"):
            predictor.remove_adapter("support")
    assert {one.state for one in predictor.adapters()} == {"not running"}
    assert check_records(record.store) == 7


def test_a_folder_outside_the_store_is_copied_into_it(
    record: Record, session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that every replica finds it after a restart, wherever it runs."""
    folder, other = adapter_folder(tmp_path / "mine"), adapter_folder(tmp_path / "other", r=4)
    predictor = Predictor("svc", session=session)
    predictor.add_adapter("support", folder)
    assert "service svc is Stopped: it serves adapter support from its next start" in capsys.readouterr().err
    predictor.add_adapter("again", str(folder), wait=False)
    prefix = record.key("adapters", digest_of(folder))
    assert [one.uri for one in predictor.adapters()] == [record.store.uri(prefix)] * 2
    names = {info.key.removeprefix(f"{prefix}/") for info in record.store.list(prefix)}
    assert names == {"adapter_config.json", "adapter_model.safetensors", DIGESTS_FILE}
    for path in folder.iterdir():
        path.unlink()
    assert [one.name for one in brought(staged(record, tmp_path / "work", session))] == ["support", "again"]
    predictor.remove_adapter("support")
    assert list(record.store.list(prefix)), "the other entry names it"
    predictor.add_adapter("again", other, replace=True, wait=False)
    assert list(record.store.list(prefix)) == []
    predictor.remove_adapter("again")
    assert list(record.store.list(record.key("adapters"))) == []


def test_what_the_service_cannot_load_is_taken_back(
    record: Record, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(palate.service_adapters, "STALE_S", 0.5)
    good, new = adapter_folder(tmp_path / "good"), adapter_folder(tmp_path / "new", r=4)
    job(record.store, good)
    job(record.store, new, "third")
    predictor = Predictor("svc", session=session)
    predictor.add_adapter("support", "second")
    before = record.store.get(record.key(ADAPTERS_KEY))
    with followed(record, tmp_path / "work", session, engine="its rank is higher than the engine's"):
        for _ in range(2):  # the second time the status still has the failure of the first
            with pytest.raises(ServiceError, match=r"sales was not added to service svc: its rank is higher"):
                predictor.add_adapter("sales", "third")
            with pytest.raises(ServiceError, match=r"which keeps the previous one: its rank is higher"):
                predictor.add_adapter("support", "third", replace=True)
            assert record.store.get(record.key(ADAPTERS_KEY)) == before
        with pytest.raises(ServiceError, match=r"was not added to service svc: its rank"):
            predictor.add_adapter("mine", adapter_folder(tmp_path / "mine", r=2))
        assert list(record.store.list(record.key("adapters"))) == [], "nor does its copy stay"
        # What the client saw was intact; the runner finds it changed.
        changed = job(record.store, adapter_folder(tmp_path / "changed", weights=b"changed"), "fourth")
        record.store.put(changed.key("model", "adapter_model.safetensors"), b"WEIGHTS")
        with pytest.raises(ServiceError, match=r"adapter_model\.safetensors missing or changed"):
            predictor.add_adapter("changed", "fourth")
    assert record.store.get(record.key(ADAPTERS_KEY)) == before


@pytest.mark.parametrize("store", ["file"], indirect=True)
def test_a_wait_ends_when_the_service_does_or_its_time_is_over(
    record: Record, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(palate.service_adapters, "READY_LIMIT_S", 0.2)
    monkeypatch.setattr(palate.service_adapters, "REMOVED_LIMIT_S", 0.2)
    monkeypatch.setattr(palate.service_adapters, "_POLL_S", 0.05)
    folder = adapter_folder(tmp_path / "one")
    job(record.store, folder)
    predictor = Predictor("svc", session=session)
    loading = {"name": "support", "digest": digest_of(folder), "state": "loading"}
    for adapters in (None, "nonsense", [1, {}, {"name": "x"}], [{**loading, "digest": "0" * 64}]):
        record.note(**RUNNING, finished_at=None, details={"adapters": adapters})
        with pytest.raises(WaitTimeoutError, match=r"support was not added.*has not followed"):
            predictor.add_adapter("support", "second")
        assert predictor.adapters() == []
    record.note(details={"adapters": [loading]})
    with pytest.raises(WaitTimeoutError, match=r"was not loaded within 0\.2 s"):
        predictor.add_adapter("support", "second")

    predictor.add_adapter("support", "second", wait=False)
    assert [one.state for one in predictor.adapters()] == ["loading"]
    with pytest.raises(ServiceError, match=r"support was removed from the record.*has not followed"):
        predictor.remove_adapter("support")
    assert predictor.adapters() == []

    monkeypatch.setattr(palate.service_adapters, "READY_LIMIT_S", 60.0)
    for state, outcome in (("Failed", r"it failed meanwhile: out of memory"), ("Stopped", "")):
        record.note(**RUNNING, finished_at=None, reason="", details={})
        ended: dict[str, Any] = {"state": state, "reason": "out of memory", "finished_at": time.time()}
        # Once the client waits: it has seen a running service by then.
        monkeypatch.setattr(palate.service_adapters.time, "sleep", lambda _, ended=ended: record.note(**ended))
        if outcome:
            with pytest.raises(ServiceError, match=outcome):
                predictor.add_adapter("support", "second")
            assert predictor.adapters() == []
        else:
            predictor.add_adapter("support", "second")
            assert [one.state for one in predictor.adapters()] == ["not running"]


def other_base() -> BaseModel:
    return BaseModel(name="m", source=WeightsSource(kind="folder", location="/elsewhere"))


@pytest.mark.parametrize("store", ["file"], indirect=True)
def test_what_cannot_be_served_is_refused_before_anything_is_written(
    store: Store, record: Record, session: Session, tmp_path: Path
) -> None:
    def refused(kind: type[Exception], name: str, given: Any, words: str, *, to: str = "svc") -> None:
        before = {info.key for info in store.list("")}
        with pytest.raises(kind, match=words):
            Predictor(to, session=session).add_adapter(name, given)
        assert {info.key for info in store.list("")} == before

    folder = adapter_folder(tmp_path / "one")
    job(store, folder)
    for name, words in (
        ("", "adapter name"),
        ("a b", "adapter name"),
        ("../up", "adapter name"),
        ("x" * 101, "adapter name"),
        ("default", "'default' is the tuned model's"),
        ("svc", "'svc' is the tuned model's"),
        ("base", "'base' is the base model's"),
        ("v1", "'v1' is a version's"),
        ("v12345", "'v12345' is a version's"),
    ):
        refused(ConfigurationError, name, "second", words)

    # What is given.
    refused(RunNotFoundError, "a", "absent", "no job 'absent'")
    refused(ConfigurationError, "a", "", "job_or_uri is empty")
    refused(StoreUsageError, "a", "hf://owner/name", "scheme hf:// is unknown")
    refused(DataError, "a", tmp_path / "absent", "has no digests.json")
    unfinished = Record(store, "jobs", "unfinished")
    unfinished.create(train_manifest("unfinished"))
    refused(JobNotReadyError, "a", "unfinished", "is Creating")
    job(store, folder, "full", method="Standard_LLM")
    refused(ConfigurationError, "a", "full", "job full trained full weights, not an adapter")
    no_adapter = tmp_path / "no-adapter"
    no_adapter.mkdir()
    (no_adapter / "config.json").write_text("{}")
    (no_adapter / DIGESTS_FILE).write_bytes(Checksums.of(no_adapter).encode())
    refused(DataError, "a", no_adapter, "has no adapter_config.json and no adapter_model.safetensors")
    changed = adapter_folder(tmp_path / "changed")
    _weights(changed, b"WEIGHTS")
    refused(DamagedFilesError, "a", changed, "adapter_model.safetensors missing or changed")
    _weights(changed, b"too long")
    refused(DamagedFilesError, "a", changed, "adapter_model.safetensors missing or changed")
    (changed / "adapter_config.json").write_text(json.dumps({**CONFIG, "r": 9}))
    refused(DamagedFilesError, "a", changed, "adapter_model.safetensors missing or changed")
    damaged = job(store, folder, "damaged")
    store.put(damaged.key("model", "adapter_config.json"), b"{}")
    refused(DamagedFilesError, "a", "damaged", "adapter_config.json missing or changed")
    text = tmp_path / "text"
    text.mkdir()
    (text / "adapter_config.json").write_text("[" * 100_000)
    (text / "adapter_model.safetensors").write_bytes(b"x")
    (text / DIGESTS_FILE).write_bytes(Checksums.of(text).encode())
    refused(DataError, "a", text, "is not a JSON object")

    # Whether it fits.
    job(store, adapter_folder(tmp_path / "rank", r=1024), "rank")
    refused(UnservableError, "a", "rank", "the adapter's rank is 1024, and vLLM's maximum is 512")
    job(store, adapter_folder(tmp_path / "dora", use_dora=True), "dora")
    refused(UnservableError, "a", "dora", r"adapter of job dora cannot be added.*use_dora=True.*engine='transformers'")
    refused(ConfigurationError, "a", adapter_folder(tmp_path / "minus", r=-1), "has rank -1")
    elsewhere = job(store, adapter_folder(tmp_path / "elsewhere"), "elsewhere")
    manifest = elsewhere.manifest()
    store.put(
        elsewhere.key("manifest.json"), replace(manifest, body=replace(manifest.body, model=other_base())).encode()
    )
    refused(
        ConfigurationError, "a", "elsewhere", r"trained on m \(folder /elsewhere\).*svc serves m \(folder /nowhere\)"
    )
    for base, words in (("qwen2-0.5b-instruct", "was trained on qwen2"), ("", "does not name its base"), (7, "base")):
        odd = adapter_folder(tmp_path / f"base-{base}", base_model_name_or_path=base)
        refused(ConfigurationError, "a", odd, words)

    # Whether the service can.
    service(store, "full-svc", adapter=False)
    refused(ConfigurationError, "a", "second", "full-svc serves full weights, so it has no base", to="full-svc")
    service(store, "untuned", adapter=False, tuned_uri=None)
    refused(ConfigurationError, "a", "second", "untuned serves a model without an adapter", to="untuned")
    service(store, "slow", options={"engine": "transformers"})
    refused(ConfigurationError, "a", "second", "transformers engine, which serves one adapter", to="slow")
    record.note(**RUNNING, finished_at=None, details={"engine": "transformers 5.19.0"})
    refused(ConfigurationError, "a", "second", "transformers engine, which serves one adapter")
    record.note(details={"engine": "vllm 0.32.0", "max_lora_rank": 4})
    refused(
        ConfigurationError, "a", "second", "has rank 8, and the engine of service svc was started for ranks up to 4"
    )
    assert read_adapters(record) == ()


@pytest.mark.parametrize("store", ["file"], indirect=True)
def test_an_update_keeps_the_base_of_the_adapters(
    store: Store, record: Record, session: Session, tmp_path: Path
) -> None:
    folder = adapter_folder(tmp_path / "one")
    predictor = Predictor("svc", session=session)
    job(store, folder, "full", method="Standard_LLM")
    job(store, folder, "elsewhere", model="other")
    elsewhere = Record(store, "jobs", "elsewhere")
    manifest = elsewhere.manifest()
    store.put(
        elsewhere.key("manifest.json"), replace(manifest, body=replace(manifest.body, model=other_base())).encode()
    )
    job(store, folder)
    predictor.add_adapter("support", "second")
    before = store.get(record.key("manifest.json"))
    for name in ("full", "elsewhere"):
        with pytest.raises(
            ConfigurationError, match=r"svc has adapters \(support\) for m .*palate adapter rm svc support"
        ):
            predictor.update_service(TrainingJob.get(name, session))
    assert store.get(record.key("manifest.json")) == before
    assert record.status().state == "Stopped"


@pytest.mark.parametrize("store", ["file"], indirect=True)
@pytest.mark.parametrize("full_weights", [False, True])
def test_no_adapter_is_added_while_an_update_to_another_base_is_open(
    store: Store, record: Record, session: Session, tmp_path: Path, full_weights: bool
) -> None:
    after: dict[str, Any] = {"adapter": False} if full_weights else {"model": other_base()}
    folder = adapter_folder(tmp_path / "one")
    job(store, folder)
    predictor = Predictor("svc", session=session)
    body = record.serve_manifest().body
    update = update_to(reserve(record, replace(body, **after), {}), share=0.1, promote=False)
    ask(record, update)
    with pytest.raises(ConfigurationError, match=r"has an update to v2 in progress.*palate rollback svc") as refused:
        predictor.add_adapter("support", "second")
    assert "palate promote svc" in str(refused.value)
    assert read_adapters(record) == ()
    withdraw(record, update, reason="the test")
    predictor.add_adapter("support", "second")
    assert [one.name for one in read_adapters(record)] == ["support"]
    remove(record, "support")
    ask(record, update_to(reserve(record, body, {}), share=0.1, promote=False))  # on the same base: it keeps adapters
    predictor.add_adapter("support", "second")


@pytest.mark.parametrize("store", ["file"], indirect=True)
@pytest.mark.parametrize(
    ("base", "service_base"),
    [
        ("SmolLM2-135M-Instruct", base_model("smollm2-135m-instruct")),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", base_model("smollm2-135m-instruct")),
        ("smollm2-135m-instruct", base_model("own", hub_id="HuggingFaceTB/SmolLM2-135M-Instruct")),
        ("/data/models/nowhere/", base_model("own")),
    ],
)
def test_a_folders_base_is_recognised_by_its_names(
    store: Store, session: Session, tmp_path: Path, base: str, service_base: BaseModel
) -> None:
    record = Record(store, "services", "svc")
    manifest = serve_manifest(adapter=True, tuned_uri="file:///nowhere/model")
    record.create(replace(manifest, body=replace(manifest.body, model=service_base)))
    record.advance("Stopped", expect={"Creating"})
    Predictor("svc", session=session).add_adapter("a", adapter_folder(tmp_path / "a", base_model_name_or_path=base))
    assert [one.name for one in read_adapters(record)] == ["a"]


@pytest.mark.parametrize("store", ["file"], indirect=True)
def test_the_commands(store: Store, tmp_path: Path, home: Path) -> None:
    from typer.testing import CliRunner

    from palate.cli import app

    own = open_store(f"file://{home}/store")
    service(own)
    job(own, adapter_folder(tmp_path / "one"))
    job(own, adapter_folder(tmp_path / "two", r=4), "third")

    def palate_(*arguments: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, ["adapter", *arguments])
        return done.exit_code, done.stdout, done.stderr

    code, printed, said = palate_("add", "svc", "support", "second")
    assert (code, printed) == (0, "support\tadded\n"), said
    assert "svc is Stopped: it serves adapter support from its next start" in said
    assert "next: palate chat svc --model support" in said
    code, _, said = palate_("add", "svc", "support", "third", "--no-wait")
    assert (code, "replace it with --replace" in said) == (1, True), said
    assert palate_("add", "svc", "support", "third", "--replace", "--no-wait")[0] == 0
    (shown,) = json.loads(palate_("list", "svc", "--json")[1])
    assert (shown["name"], shown["state"], shown["rank"], shown["job"]) == ("support", "not running", 4, "third")
    assert "support\tnot running\t" in palate_("list", "svc")[1]
    assert palate_("rm", "svc", "support")[:2] == (0, "support\tremoved\n")
    assert palate_("rm", "svc", "support")[0] == 1
