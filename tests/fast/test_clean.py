"""The sweep: what lost runs leave behind is shown first, removed when told, and nothing else is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from palate import Session, TrainingJob
from palate.backends import get_backend
from palate.backends.process import ProcessBackend
from palate.paths import stale_work_folders, work_folder
from palate.runs.lease import LEASE_KEY, lease_here
from palate.runs.record import RENEWAL_KEY, Record
from palate.runs.renewal import write_renewal
from palate_recipes.errors import DamagedFilesError
from palate_recipes.specs.codec import encode
from palate_recipes.specs.run import Lease
from tests.support.chat import wait_for
from tests.support.elsewhere import on_another_machine
from tests.support.manifests import serve_manifest, train_manifest

FAR = lease_here(holder="other", start_id="s", attempt=1, host="far", machine="far", lost_after_s=1.0)


def clean(home: Path, *arguments: str) -> tuple[set[tuple[str, str]], str]:
    command = [sys.executable, "-m", "palate.cli", "clean", "--json", *arguments]
    environment = {**os.environ, "PALATE_HOME": str(home)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return {(item["kind"], item["what"]) for item in json.loads(done.stdout)}, done.stderr


def run(session: Session, kind: str, name: str, lease: Lease, **status: object) -> Record:
    record = Record(session.store, kind, name)  # type: ignore[arg-type]
    record.create(serve_manifest(name, time_to_live_s=5.0) if kind == "services" else train_manifest(name))
    record.advance("Running", expect={"Creating"}, engine_id="elsewhere:1:2:x", start_id="s", **status)
    record.store.put(record.key(LEASE_KEY), encode(lease))
    return record


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


def hanging_runner(home: Path, record: Record) -> subprocess.Popen[bytes]:
    fake = home / "palate"
    (fake / "runner").mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "runner" / "__init__.py").touch()
    (fake / "runner" / "__main__.py").write_text("import time; time.sleep(300)")
    return subprocess.Popen(
        [sys.executable, "-m", "palate.runner", record.uri],
        env={**os.environ, "PYTHONPATH": str(home)},
        start_new_session=True,
    )


def test_nothing_is_found_where_nothing_is(home: Path) -> None:
    assert clean(home) == (set(), "nothing to clean\n")


def test_what_is_left_behind_is_shown_then_removed_and_the_living_stay(session: Session, home: Path) -> None:
    alive = replace(FAR, lost_after_s=10_000.0)
    lost = run(session, "jobs", "lost", FAR)
    well = run(session, "jobs", "well", alive)
    over = run(session, "jobs", "over", FAR)
    over.advance("Failed", expect={"Running"})
    # Their runners' clocks are hours off, one each way; the store's counts.
    old = run(session, "services", "old", alive, started_at=time.time() + 10_000)
    _age(home, "services/old/status.json", 1000)
    run(session, "services", "young", alive, started_at=time.time() - 10_000)
    # A renewal counts from when it was written, whether or not the service has followed it.
    for name, age_s in (("renewed", 1), ("renewed-before", 1000)):
        write_renewal(run(session, "services", name, alive), 60)
        _age(home, f"services/{name}/status.json", 1000)
        _age(home, f"services/{name}/renewal.json", age_s)
    write_renewal(run(session, "services", "endless", alive), None)
    unknown = run(session, "services", "unknown", alive)
    unknown.store.put(unknown.key(RENEWAL_KEY), b"{")
    for name in ("endless", "unknown"):
        for file in ("status", "renewal"):
            _age(home, f"services/{name}/{file}.json", 1000)
    ours = work_folder("jobs", "gone")
    stale = ours.with_name(f"{os.getpid()}-1-{ours.name.rpartition('-')[2]}")  # of a process that had this pid before
    elsewhere = ours.with_name(f"{os.getpid()}-1-00000000")
    for folder in (ours, stale, elsewhere):
        folder.mkdir(parents=True)
    # Keys of containers, one of which was never started; the other is about to read them.
    keys = home / "run" / "jobs-lost-0123abcd"
    for folder in (keys, home / "run" / "jobs-well-0123abcd"):
        folder.mkdir(parents=True)
        (folder / "variables.json").write_text("{}")
    os.utime(keys / "variables.json", (time.time() - 1000,) * 2)

    # A runner that hangs on a run which is over: it holds the lease and hears nothing.
    stuck = run(session, "jobs", "stuck", FAR)
    process = hanging_runner(home, stuck)
    try:
        stuck.store.delete_tree(stuck.prefix)
        expected = {
            ("lost run", "jobs/lost"),
            ("stale lease", "jobs/over"),
            ("expired service", "old"),
            ("expired service", "renewed-before"),
            ("stale folder", str(stale)),
            ("stale folder", str(keys)),
            ("orphan run", f"process {process.pid}: palate-run {stuck.uri}"),
        }
        until(lambda: clean(home)[0] == expected)
        assert "7 found, nothing changed\nnext: palate clean --yes" in clean(home)[1]
        assert lost.status().state == "Running"
        assert process.poll() is None

        # As its runner would at once: stop() waits minutes for one elsewhere.
        for service in (old, Record(session.store, "services", "renewed-before")):
            service.advance("Stopped", expect={"Running"})
        assert clean(home, "--yes")[0] == {item for item in expected if item[0] != "expired service"}
        process.wait(30)
        assert (lost.status().state, well.status().state) == ("Failed", "Running")
        assert (ours.exists(), stale.exists(), elsewhere.exists(), keys.exists()) == (True, False, True, False)
        assert clean(home)[0] == set()
    finally:
        process.kill()
        process.wait()


def test_a_folder_of_another_machine_with_the_same_hostname_stays(home: Path, tmp_path: Path) -> None:
    """On a shared disk, the pid in its name says nothing here."""
    code = "from palate.paths import work_folder\nfolder = work_folder('jobs', 'far')\nfolder.mkdir(parents=True)\nprint(folder)"
    folder = Path(on_another_machine(tmp_path, code))
    assert folder.is_dir()
    assert stale_work_folders("jobs", "far") == []


def test_what_belongs_to_no_run_goes_when_it_is_old(session: Session, home: Path) -> None:
    store = session.store
    for name, age_s in (("dead", 2 * 86400), ("begun", 3600)):
        store.put(f"jobs/{name}/inputs/train/prefs.json", b"[]")
        _age(home, f"jobs/{name}/inputs/train/prefs.json", age_s)
    for name, age_s in (("old", 31 * 86400), ("young", 86400)):
        store.put(f"cache/reference/{name}", b"scores")
        _age(home, f"cache/reference/{name}", age_s)
    expected = {("unfinished submission", "jobs/dead"), ("stale cache", "cache/reference/old")}
    assert clean(home)[0] == expected
    assert clean(home, "--yes")[0] == expected
    assert sorted(info.key for info in store.list()) == ["cache/reference/young", "jobs/begun/inputs/train/prefs.json"]


def _age(home: Path, key: str, age_s: float) -> None:
    then = time.time() - age_s
    os.utime(home / "store" / key, (then, then))


def test_the_runner_of_a_damaged_record_counts_and_is_ended_by_delete(session: Session, home: Path) -> None:
    damaged = run(session, "jobs", "damaged", replace(FAR, lost_after_s=10_000.0))
    other = run(session, "jobs", "other", replace(FAR, lost_after_s=10_000.0))
    for record in (damaged, other):
        record.store.put(record.key("status.json"), b"[")
    process = hanging_runner(home, damaged)
    try:
        until(lambda: any(held.uri == damaged.uri for held in get_backend("process").runs()))
        assert clean(home)[0] == set()  # its runner still beats
        damaged.store.put(damaged.key(LEASE_KEY), encode(FAR))  # silent for longer than it may be, soon
        until(lambda: clean(home)[0] == {("damaged record", "jobs/damaged")})
        TrainingJob.get("damaged", session=session).delete()
        process.wait(30)
        assert list(session.store.list("jobs/damaged/")) == []
        assert other.exists()
    finally:
        process.kill()
        process.wait()


def test_a_job_that_a_newer_version_wrote_is_neither_damaged_nor_removed(session: Session, home: Path) -> None:
    job = run(session, "jobs", "newer", replace(FAR, released=True))
    key = job.key("manifest.json")
    values = json.loads(session.store.get(key))
    values["versions"] = {"palate": "9.0"}
    values["body"]["hyperparameters"]["lr_scheduler_type"] = "wsd"
    session.store.put(key, json.dumps(values).encode())
    assert clean(home, "--yes")[0] == set()
    with pytest.raises(DamagedFilesError, match=r"written by Palate '9\.0'\. Use that version") as refused:
        job.manifest()
    assert "delete" not in str(refused.value)
    values["versions"] = {}
    session.store.put(key, json.dumps(values).encode())
    assert clean(home)[0] == {("damaged record", "jobs/newer")}


def test_the_folder_of_a_runner_that_had_to_be_killed_goes_with_its_run(session: Session, home: Path) -> None:
    """As one whose engine is loading and does not end within the time that a stop has."""
    code = (
        "import signal, sys, time; from palate.paths import work_folder; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "work_folder('jobs', 'stuck').mkdir(parents=True); time.sleep(600)"
    )
    record = Record(session.store, "jobs", "stuck")
    record.create(train_manifest("stuck"))
    backend = ProcessBackend(record.uri)
    engine_id = backend.start_command(
        [sys.executable, "-c", code], run_name="jobs-stuck", env={"PALATE_RUN_URI": record.uri}
    )
    record.advance("Creating", expect={"Creating"}, engine_id=engine_id)
    folder = home / "work" / "jobs" / "stuck"
    wait_for(lambda: folder.is_dir() and any(folder.iterdir()))
    TrainingJob.get("stuck")._run.delete(grace_s=0)
    assert backend.status(engine_id).state == "gone"
    assert not folder.exists()
