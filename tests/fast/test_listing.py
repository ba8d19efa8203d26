"""Lists of jobs and services: what is asked for, newest first, and what a slow or damaged store still tells."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from palate import Predictor, Session, TrainingJob
from palate.errors import ConfigurationError, DamagedFilesError, WaitTimeoutError
from palate.runs.clean import find_leftovers
from palate.runs.list import RunFilter, find_runs
from palate.runs.record import Record
from palate.store import Store, open_store
from palate_recipes.specs.run import State
from tests.support.manifests import serve_manifest, train_manifest
from tests.support.seaweed import SeaweedServer

HOUR_S = 3600.0


def add(
    store: Store,
    name: str,
    *,
    model: str = "smollm2-135m-instruct",
    state: State = "Succeeded",
    age_s: float = 0.0,
    attempts: int = 1,
    kind: str = "train",
    **labels: str,
) -> None:
    record = Record(store, "jobs" if kind == "train" else "services", name)
    manifest = (
        train_manifest(name, model=model, hyperparameters={"training_strategy": "dpo"})
        if kind == "train"
        else serve_manifest(name, model=model)
    )
    record.create(replace(manifest, labels=labels, created_at=time.time() - age_s))
    for attempt in range(1, attempts):
        record.begin_again(expect={"Creating"}, attempt=attempt, more=1, reason="the machine went down")
    record.advance(state, expect={"Creating"}, reason="out of memory\nall of it" if state == "Failed" else "")


def fill(store: Store) -> None:
    add(store, "qwen-old", model="qwen2-0.5b-instruct", age_s=50 * HOUR_S, team="x")
    add(store, "qwen-new", model="qwen2-1.5b-instruct", age_s=1 * HOUR_S, team="x", stage="try")
    add(store, "smol", state="Failed", age_s=3 * HOUR_S, attempts=3, team="y")
    add(store, "smol-2", state="Stopped", age_s=2 * HOUR_S)
    add(store, "answers", kind="serve", state="Stopped", team="x")


def palate(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "palate.cli", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PALATE_HOME": str(home), **environment},
        timeout=120,
    )


def ids(**wanted: object) -> list[str]:
    return [job.id for job in TrainingJob.list(**wanted)]  # type: ignore[arg-type]


def test_jobs_are_found_by_what_they_are(session: Session) -> None:
    fill(session.store)
    assert ids() == ["qwen-new", "smol-2", "smol", "qwen-old"]
    assert ids(status="Failed") == ["smol"]
    assert ids(name="qwen-*") == ["qwen-new", "qwen-old"]
    assert ids(model="qwen2-*") == ["qwen-new", "qwen-old"]
    assert ids(labels={"team": "x"}) == ["qwen-new", "qwen-old"]
    assert ids(labels={"team": "x", "stage": "try"}) == ["qwen-new"]
    assert ids(since_s=2.5 * HOUR_S) == ["qwen-new", "smol-2"]
    assert ids(min_attempts=2) == ["smol"]
    assert ids(min_attempts=4) == []
    assert ids(status="Succeeded", labels={"team": "x"}, name="*-old") == ["qwen-old"]
    assert [service.service_name for service in Predictor.list(labels={"team": "x"}, status="Stopped")] == ["answers"]
    assert Predictor.list(status="Running") == []


def test_pages_are_as_in_pais_sdk(session: Session) -> None:
    fill(session.store)
    assert [job.id for job in TrainingJob.list("Succeeded", session, 1, 2)] == ["qwen-old"]
    assert ids(page_size=3) == ["qwen-new", "smol-2", "smol"]
    assert ids(page_size=3, page_number=2) == ["qwen-old"]
    assert ids(page_size=3, page_number=3) == []


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"status": "Suceeded"}, "Suceeded.*Succeeded"),
        ({"since_s": 0}, "since_s=0"),
        ({"min_attempts": 0}, "min_attempts=0"),
        ({"page_size": 0}, "page_size=0"),
        ({"page_number": 0}, "page_number=0"),
    ],
)
def test_a_filter_that_lets_nothing_through_is_refused(session: Session, wanted: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        ids(**wanted)


def test_a_limit_reads_no_more_statuses_than_it_needs(session: Session) -> None:
    fill(session.store)
    (session.store.local_path("jobs/qwen-old/status.json") or Path()).write_text("damaged")
    assert [found.name for found in find_runs(session, "jobs", RunFilter(), limit=2).runs] == ["qwen-new", "smol-2"]
    listing = find_runs(session, "jobs", RunFilter())
    assert ([found.name for found in listing.unread], len(listing.runs)) == (["qwen-old"], 3)


def test_a_damaged_record_is_named(session: Session) -> None:
    fill(session.store)
    session.store.put("jobs/smol/manifest.json", b"[]")
    with pytest.raises(DamagedFilesError, match=r"manifest\.json of smol is damaged"):
        ids()
    assert ids(name="qwen*") == ["qwen-new", "qwen-old"]
    session.store.put("jobs/half-made/inputs/train.jsonl", b"")  # no manifest yet: not a job
    assert ids(name="half*") == []


def test_many_runs_are_read_at_the_same_time(session: Session) -> None:
    """Each read waits until three are under way: one after the other they would wait for ever."""
    together = threading.Barrier(3, timeout=30)
    for name in ("a", "b", "c"):
        add(session.store, name)

    class Meeting(type(session.store)):  # type: ignore[misc]
        def get(self, key: str) -> bytes:
            together.wait()
            return bytes(super().get(key))

    session._store = Meeting(session.store.root)
    assert [found.name for found in find_runs(session, "jobs", RunFilter()).runs] == ["c", "b", "a"]


def test_the_command_shows_what_was_asked_for(home: Path) -> None:
    fill(open_store(home / "store"))
    done = palate("jobs", "--status", "failed", "--status", "stopped", "--since", "150min", home=home)
    header, *rows = done.stdout.splitlines()
    assert header.split("\t") == ["job", "state", "model", "method", "strategy", "age", "reason"]
    assert [row.split("\t")[0] for row in rows] == ["smol-2"]
    assert done.stderr == "next: palate logs smol-2\n"
    rows = json.loads(palate("jobs", "--label", "team=x", "--limit", "1", "--json", home=home).stdout)
    (row,) = rows
    assert (row["id"], row["labels"]) == ("qwen-new", {"team": "x", "stage": "try"})
    (row,) = json.loads(palate("jobs", "--attempts", "2", "--json", home=home).stdout)
    assert (row["id"], row["attempt"], row["reason"]) == ("smol", 3, "out of memory\nall of it")
    (row,) = json.loads(palate("services", "--name", "ans*", "--json", home=home).stdout)
    assert (row["ServiceName"], row["Status"]) == ("answers", "Stopped")
    assert palate("jobs", "--model", "llama*", home=home).stderr == "no jobs match\nnext: palate jobs\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--since", "yesterday"], ["yesterday", "2h"]),
        (["--label", "team"], ["--label", "team", "NAME=VALUE"]),
        (["--status", "Done"], ["Done", "Succeeded"]),
    ],
)
def test_a_wrong_filter_is_one_message(home: Path, arguments: list[str], words: list[str]) -> None:
    done = palate("jobs", *arguments, home=home)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert [word for word in words if word not in done.stderr] == []


SLOW = """
import threading
from palate.cli import main
from palate.store.file import FileStore

get = FileStore.get

def slow(self, key):
    if key == "jobs/slow/manifest.json":
        threading.Event().wait()  # as for a server that does not answer
    return get(self, key)

FileStore.get = slow
main()
"""


def test_a_slow_store_shows_what_it_can(home: Path) -> None:
    fill(open_store(home / "store"))
    slow = home / "store" / "jobs" / "slow"
    slow.mkdir()
    (slow / "status.json").write_text("{}")
    (slow / "manifest.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-c", SLOW, "jobs", "--timeout", "20"],  # the others take a moment on a busy machine
        capture_output=True,
        text=True,
        env={**os.environ, "PALATE_HOME": str(home)},
        timeout=120,
    )
    rows = [row.split("\t")[:2] for row in done.stdout.splitlines()[1:]]
    assert rows[-1] == ["slow", "?"]
    assert ["smol", "Failed"] in rows
    assert done.returncode == 1
    assert "1 of the jobs could not be read" in done.stderr
    assert done.stderr.splitlines()[-1] == "next: palate jobs --timeout 300"


def test_a_silent_store_is_given_up(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = palate(
            "jobs",
            "--timeout",
            "1",
            home=home,
            PALATE_STORE="s3://bucket/team",
            AWS_ENDPOINT_URL_S3=endpoint,
            AWS_ACCESS_KEY_ID="id",
            AWS_SECRET_ACCESS_KEY="key",
            AWS_DEFAULT_REGION="us-east-1",
        )
    assert done.returncode == 1
    assert "s3://bucket/team was not listed in time" in done.stderr


def test_a_listing_can_be_given_up_from_python(session: Session) -> None:
    add(session.store, "one")
    gate = threading.Event()

    class Gated(type(session.store)):  # type: ignore[misc]
        def list_children(self, prefix: str = "") -> list[str]:
            gate.wait(30)
            return list(super().list_children(prefix))

    session._store = Gated(session.store.root)
    with pytest.raises(WaitTimeoutError, match="was not listed in time"):
        find_runs(session, "jobs", RunFilter(), timeout_s=0.05)
    gate.set()


DAMAGE = {
    "not JSON": b"{",
    "not UTF-8": b"\xff\xfe{}",
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "no fields": b"{}",
    "wrong types": b'{"kind": 1, "name": [], "backend": 0, "body": 7, "state": ["Running"], "attempt": "x"}',
}


@pytest.mark.parametrize("file", ["manifest.json", "status.json"])
def test_a_damaged_record_in_a_bucket_can_be_deleted(
    seaweed: SeaweedServer, bucket: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    session = Session(store=f"s3://{bucket}/{tmp_path.name}")
    fill(session.store)
    session.store.put(f"jobs/smol/{file}", DAMAGE["deep"])
    session.store.put(f"services/answers/{file}", b"")
    TrainingJob.get("smol", session=session).delete()
    Predictor("answers", session=session).delete_service()
    assert not [*session.store.list("jobs/smol/"), *session.store.list("services/")]


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("file", ["manifest.json", "status.json"])
def test_a_damaged_record_is_named_and_can_be_deleted(session: Session, file: str, content: bytes) -> None:
    fill(session.store)
    for prefix in ("jobs/smol", "services/answers"):
        session.store.put(f"{prefix}/{file}", content)
    for kind, name in (("jobs", "smol"), ("services", "answers")):
        listing = find_runs(session, kind, RunFilter())  # type: ignore[arg-type]
        assert [found.name for found in listing.unread] == [name]
        assert isinstance(listing.unread[0].error, DamagedFilesError)
        words = str(listing.unread[0].error)
        assert f"{file} of {name} is damaged" in words
        assert f"{kind}/{name}/{file}" in words
        assert f"`palate delete {name}`" in words
        assert len(listing.runs) == (3 if kind == "jobs" else 0)
    damaged = {item.what: item for item in find_leftovers(session) if item.kind == "damaged record"}
    assert set(damaged) == {"jobs/smol", "services/answers"}
    TrainingJob.get("smol", session=session).delete()
    damaged["services/answers"].remove()
    assert not [*session.store.list("jobs/smol/"), *session.store.list("services/")]


def test_the_command_shows_and_deletes_a_damaged_record(home: Path) -> None:
    store = open_store(home / "store")
    fill(store)
    store.put("jobs/smol/status.json", b"\xff")
    store.put("services/answers/manifest.json", b"[]")
    done = palate("jobs", home=home)
    assert "status.json of smol is damaged" in done.stdout
    assert "qwen-new" in done.stdout
    assert done.stderr.endswith("next: palate delete smol\n")
    done = palate("delete", "--yes", "smol", "answers", home=home)
    assert (done.returncode, done.stdout) == (0, "smol\tdeleted\nanswers\tdeleted\n"), done.stderr


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "~nosuchuser", "x" * 5000, "..", ""])
@pytest.mark.parametrize("find", [TrainingJob.get, Predictor], ids=["job", "service"])
def test_a_name_that_no_run_can_have_is_refused(find: Callable[[str], object], name: str, home: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not valid: expected up to 100 letters") as refused:
        find(name)
    assert len(str(refused.value)) < 500
