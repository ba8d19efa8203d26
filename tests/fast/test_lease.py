"""Who has a run, and whether it still has: over a file store and a real S3 server, with threads and real runners."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from palate import Session
from palate.backends.process import ProcessBackend
from palate.errors import ConfigurationError, DamagedFilesError, JobNotReadyError, TrainingJobError
from palate.job import TrainingJob
from palate.paths import remember_start, was_started_here
from palate.processes import process_state
from palate.runner.heartbeat import Heartbeat, Tail
from palate.runs.handle import RunHandle
from palate.runs.lease import LEASE_KEY, HeldLease, acquire, lease_here, read_lease, silence_s, store_now
from palate.runs.record import LOST, Record, events_once
from palate.store import Store
from palate_recipes.specs.codec import encode
from palate_recipes.specs.run import Lease
from tests.support.elsewhere import as_another_user, on_another_machine
from tests.support.manifests import train_manifest
from tests.support.stores import empty_store


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return empty_store(request.param, request, tmp_path)


def job(store: Store, name: str = "one", **fields: object) -> Record:
    record = Record(store, "jobs", name)
    record.create(train_manifest(name, **fields))
    return record


def take(record: Record, *, attempt: int = 1, patient: bool = False) -> HeldLease | None:
    return acquire(record, attempt=attempt, start_id="", give_up=lambda: not patient)


def left_by(record: Record, **facts: object) -> Lease:
    """Leaves the lease of a runner elsewhere that says nothing any more."""
    lease = lease_here(holder="other", start_id="s", attempt=1, host="far", machine="far", lost_after_s=1.0)
    lease = replace(lease, **facts)  # type: ignore[arg-type]
    record.store.put(record.key(LEASE_KEY), encode(lease))
    return lease


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def test_of_many_runners_one_gets_in(store: Store) -> None:
    record = job(store)
    gate, won = threading.Barrier(6), []

    def run() -> None:
        gate.wait()
        if (held := take(record)) is not None:
            won.append(held)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert won[0].beat()
    lease = read_lease(record)
    assert lease is not None
    assert (lease.beat, lease.attempt, lease.released) == (1, 1, False)
    won[0].release()
    assert take(record) is not None  # who left in order keeps nobody out


def test_a_lease_that_changes_is_left_alone_and_one_that_does_not_is_taken(store: Store) -> None:
    record = job(store)
    left_by(record, lost_after_s=30.0)
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(0.05):
            left_by(record, beat=(count := count + 1), lost_after_s=30.0)

    thread = threading.Thread(target=beat)
    thread.start()
    assert take(record, patient=True) is None
    ended.set()
    thread.join()
    left_by(record, lost_after_s=0.5)
    begun = time.monotonic()
    assert take(record, patient=True) is not None
    assert time.monotonic() - begun >= 0.5


def test_an_earlier_attempt_is_taken_from_at_once_and_a_dead_process_of_this_machine_soon(store: Store) -> None:
    record = job(store)
    left_by(record, lost_after_s=1000.0)
    held = take(record, attempt=2)
    assert held is not None
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lease = replace(lease_here(holder="x", start_id="", attempt=2), pid=gone.pid, lost_after_s=1000.0)
    store.put(record.key(LEASE_KEY), encode(replace(lease, every_s=500.0)))
    assert take(record, attempt=2) is None  # a heartbeat that is not overdue counts for more
    store.put(record.key(LEASE_KEY), encode(replace(lease, every_s=0.1)))
    assert take(record, attempt=2, patient=True) is not None
    assert not held.beat()  # and who was robbed finds out


def test_a_lost_answer_is_no_lost_lease(store: Store) -> None:
    record = job(store)
    held = take(record)
    assert held is not None
    store.put(record.key(LEASE_KEY), encode(replace(held.lease, beat=1)))  # its own write, whose answer it never got
    assert held.beat()
    assert held.beat()
    lease = read_lease(record)
    assert lease is not None
    assert lease.holder == held.lease.holder


def test_silence_is_told_by_the_stores_clock(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    record = job(store)
    left_by(record)
    monkeypatch.setattr(time, "time", lambda: 12345.0)  # this machine's clock is decades off
    now = store_now(store)
    assert now is not None
    assert now > 1.7e9
    age = silence_s(record)
    assert age is not None
    assert 0 <= age < 20
    assert list(store.list("cache/")) == []


def test_a_run_whose_runner_went_silent_elsewhere_is_failed_by_the_next_look(store: Store, session: Session) -> None:
    record = job(store)
    record.advance("Running", expect={"Creating"}, engine_id="elsewhere:1:2:jobs-one", start_id="s")
    handle = RunHandle(record, session)
    left_by(record, lost_after_s=1000.0)
    assert handle.refresh().state == "Running"
    left_by(record, lost_after_s=1.0)
    until(lambda: handle.refresh().state == "Failed")
    assert "far has sent no heartbeat for" in handle.refresh().reason


def test_a_run_whose_engine_is_gone_is_in_the_hands_of_another_runner(store: Store, session: Session) -> None:
    record = job(store)
    engine_id = ProcessBackend().start_command([sys.executable, "-c", ""], run_name="jobs-one", env={})
    until(lambda: session.backend.status(engine_id).state == "gone")
    record.advance("Running", expect={"Creating"}, engine_id=engine_id, start_id="mine")
    left_by(record, start_id="by hand", lost_after_s=1000.0)
    handle = RunHandle(record, session)
    assert handle.refresh().state == "Running"
    left_by(record, start_id="mine", lost_after_s=1000.0, every_s=500.0)
    assert handle.refresh().state == "Running"  # its own heartbeat is not overdue
    left_by(record, start_id="mine", lost_after_s=1000.0, every_s=0.1)
    until(lambda: handle.refresh().state == "Failed")
    assert handle.refresh().reason == LOST


@pytest.mark.parametrize("started_here", [False, True])
def test_a_look_begins_the_next_attempt_of_its_own_runs_alone(session: Session, home: Path, started_here: bool) -> None:
    """Whoever may write to a store could otherwise start programs on the machines of those who look at it."""
    record = job(session.store, max_attempts=2)
    engine_id = ProcessBackend().start_command([sys.executable, "-c", ""], run_name="jobs-one", env={})
    until(lambda: session.backend.status(engine_id).state == "gone")
    if started_here:
        remember_start(record.uri, record.manifest_bytes())
    record.advance("Running", expect={"Creating"}, engine_id=engine_id, start_id="s")
    handle = RunHandle(record, session)
    until(lambda: handle.refresh().is_terminal)
    status = record.status()
    assert (status.state, status.attempt) == ("Failed", 2 if started_here else 1)
    handle.delete()
    assert not list((home / "started").glob("*"))


def test_a_start_that_cannot_be_noted_is_a_start(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On a full disk, for example: the run must not stay behind as one that was begun and never started."""
    home.mkdir(exist_ok=True)
    (home / "started").write_text("no folder can be made here")
    remember_start("file:///store/jobs/one", b"{}")
    assert "resumed manually" in caplog.text
    assert not was_started_here("file:///store/jobs/one", b"{}")


LOOK = """
import sys
from palate import Session
from palate.runs.record import Record
from palate.runs.handle import RunHandle
session = Session(store=sys.argv[1])
status = RunHandle(Record(session.store, "jobs", "one"), session).refresh()
print(status.state, status.reason)
"""


@pytest.mark.parametrize("every_s", [500.0, 0.001], ids=["fresh", "overdue"])
def test_a_look_from_another_machine_with_the_same_hostname_leaves_a_run_alone(
    session: Session, tmp_path: Path, every_s: float
) -> None:
    record = job(session.store)
    backend = ProcessBackend()
    engine_id = backend.start_command(
        [sys.executable, "-c", "import time; time.sleep(300)"], run_name="jobs-one", env={}
    )
    try:
        pid, pid_start = engine_id.split(":")[1:3]
        record.advance("Running", expect={"Creating"}, engine_id=engine_id, start_id="s")
        lease = lease_here(holder="h", start_id="s", attempt=1, pid=int(pid), pid_start=pid_start, every_s=every_s)
        record.store.put(record.key(LEASE_KEY), encode(lease))
        assert on_another_machine(tmp_path, LOOK, str(session.store_uri)) == "Running"
        old = engine_id.partition("@")[0] + engine_id[engine_id.index(":") :]  # as earlier versions wrote it
        record.note(engine_id=old)
        assert on_another_machine(tmp_path, LOOK, str(session.store_uri)) == "Running"
        assert record.status().state == "Running"
    finally:
        backend.stop(engine_id, grace_s=0)


def test_a_process_that_is_hidden_from_a_user_is_not_dead(home: Path) -> None:
    backend = ProcessBackend()
    code = [sys.executable, "-c", "import time; time.sleep(300)"]
    engine_id = backend.start_command(code, run_name="jobs-one", env={})
    try:
        _, pid, started, _ = engine_id.split(":")
        imports = "from palate.backends.process import ProcessBackend\nfrom palate.processes import process_state"
        ask = "print(process_state(int(sys.argv[1]), sys.argv[2]), ProcessBackend().status(sys.argv[3]).state)"
        assert as_another_user(imports, ask, pid, started, engine_id) == "unknown unknown"
        assert process_state(int(pid), started) == "alive"
        assert process_state(int(pid), str(int(started) + 1)) == "dead"
        assert [process_state(number, "1") for number in (0, -1, 1 << 70)] == ["unknown"] * 3
    finally:
        backend.stop(engine_id, grace_s=0)
    assert process_state(int(pid), started) == "dead"


DAMAGE = [b'{"holder": "x", "be', b"", b"null", b"[]", b'{"holder": 3}', b"\xff\xfe"]


@pytest.mark.parametrize(
    "damage", [DAMAGE[0], *(pytest.param(data, marks=pytest.mark.thorough) for data in DAMAGE[1:])]
)
def test_damaged_records_end_no_heartbeat(store: Store, damage: bytes) -> None:
    record = job(store)
    record.advance("Running", expect={"Creating"})
    whole = store.get(record.key("status.json"))
    held = take(record)
    assert held is not None
    held.lease = replace(held.lease, every_s=0.1)
    said: list[str] = []
    with Heartbeat(record, held, said.append) as heartbeat:
        store.put(record.key("status.json"), damage)
        until(lambda: any("status" in line for line in said))
        for data in DAMAGE:
            store.put(record.key(LEASE_KEY), data)
            until(lambda: is_whole(record))
        beat = held.lease.beat
        until(lambda: held.lease.beat > beat + 2)
        assert not heartbeat.lease_lost.is_set()
        assert not heartbeat.stop_wanted.is_set()
        store.put(record.key("status.json"), whole)
        record.advance("Stopping", expect={"Running"})
        assert heartbeat.stop_wanted.wait(10)
        until(lambda: said[-1] == "note: the store is back")


def is_whole(record: Record) -> bool:
    try:
        return read_lease(record) is not None
    except DamagedFilesError:
        return False


def test_nothing_ends_a_heartbeat_but_the_end_of_its_run(store: Store) -> None:
    record = job(store)
    held = take(record)
    assert held is not None
    held.lease = replace(held.lease, every_s=0.1)
    told = threading.Event()

    def say(text: str) -> None:
        told.set()
        raise SystemExit(text)  # as bad as it can be

    with Heartbeat(record, held, say):
        store.put(record.key("status.json"), b"{")
        assert told.wait(10)
        beat = held.lease.beat
        until(lambda: held.lease.beat > beat + 2)


def test_a_damaged_lease_is_taken_when_nobody_renews_it(
    store: Store, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PALATE_LEASE_S", "1")
    record = job(store)
    store.put(record.key(LEASE_KEY), b"{")
    with pytest.raises(DamagedFilesError, match=r"jobs/one/lease\.json is damaged"):
        read_lease(record)
    record.advance("Running", expect={"Creating"}, engine_id="elsewhere:1:2:jobs-one", start_id="s")
    assert RunHandle(record, session).refresh().state == "Running"  # a runner may be about to write it anew
    assert take(record) is None
    assert take(record, patient=True) is not None


@pytest.mark.parametrize("lost_after_s", [float("nan"), float("inf"), 1e308, 0.0, -1.0])
def test_a_lease_that_would_never_count_as_lost_is_damaged(store: Store, lost_after_s: float) -> None:
    record = job(store)
    left_by(record, lost_after_s=lost_after_s)
    with pytest.raises(DamagedFilesError, match="lost_after_s"):
        read_lease(record)


def test_of_two_that_begin_an_attempt_one_does(store: Store) -> None:
    record = job(store, max_attempts=3)
    record.advance("Failed", expect={"Creating"}, reason="once", exit_code=9)
    gate, won = threading.Barrier(4), []

    def begin() -> None:
        gate.wait()
        won.append(record.begin_again(expect={"Failed"}, attempt=1, more=3))

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(status is not None for status in won) == 1
    status = record.status()
    assert (status.state, status.attempt, status.last_attempt, status.reason) == ("Creating", 2, 4, "")
    assert [(entry.attempt, entry.reason, entry.exit_code) for entry in status.attempts] == [(1, "once", 9)]
    assert record.advance("Failed", expect={"Creating"}, attempt=1) is None  # the first attempt's last word comes late


def test_parts_of_two_writers_are_both_kept_and_a_lost_answer_repeats_nothing(store: Store, tmp_path: Path) -> None:
    record = job(store)
    files = [tmp_path / "a", tmp_path / "b"]
    tails = [Tail(record, "logs", path) for path in files]
    for number in range(3):
        for path, tail in zip(files, tails, strict=True):
            with path.open("a") as file:
                file.write(f"{path.name}{number}\n")
            tail.push()
    assert sorted(record.log_lines()) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    record.append("logs", 6, dict(record.parts("logs"))[6])
    assert record.last_part("logs") == 6


def test_heartbeats_go_on_and_a_stop_or_a_successor_is_heard(store: Store) -> None:
    record = job(store)
    record.advance("Running", expect={"Creating"})
    held = take(record)
    assert held is not None
    held.lease = replace(held.lease, every_s=0.1)
    said: list[str] = []
    with Heartbeat(record, held, said.append) as heartbeat:
        until(lambda: (read_lease(record) or held.lease).beat >= 3)
        record.advance("Stopping", expect={"Running"})
        assert heartbeat.stop_wanted.wait(10)
        assert not heartbeat.lease_lost.is_set()
        assert take(record, attempt=2) is not None
        assert heartbeat.lease_lost.wait(10)
    assert said == []


def test_events_of_steps_that_were_done_again_are_there_once() -> None:
    first = [{"kind": "start", "step": 0}, *({"kind": "train", "step": step, "by": 1} for step in (1, 2, 3, 4))]
    second = [{"kind": "start", "step": 2}, *({"kind": "train", "step": step, "by": 2} for step in (3, 4))]
    events = events_once([*first, *second, {"kind": "end", "step": 4}])
    assert [(event["step"], event.get("by")) for event in events] == [
        (0, None), (1, 1), (2, 1), (2, None), (3, 2), (4, 2), (4, None),
    ]  # fmt: skip


def test_the_last_words_of_a_lost_attempt_hide_nothing_of_the_next_one() -> None:
    # While the store was away both attempts went on from step 2; what the lost one did is pushed in the midst of the other.
    first = [{"kind": "start", "step": 0}, *({"kind": "train", "step": step, "by": 1} for step in (1, 2))]
    late = [{"kind": "start", "step": 2, "attempt": 2}, {"kind": "train", "step": 3, "by": 2, "attempt": 2}]
    next_one = [
        {"kind": "start", "step": 2, "attempt": 3},
        *({"kind": "train", "step": step, "by": 3, "attempt": 3} for step in (3, 4, 5)),
    ]
    for split in range(len(next_one) + 1):
        events = events_once([*first, *next_one[:split], *late, *next_one[split:]])
        steps = [(event["step"], event["by"]) for event in events if event["kind"] == "train"]
        assert steps == [(1, 1), (2, 1), (3, 3), (4, 3), (5, 3)]
        assert [event["step"] for event in events if event["kind"] == "start"] == [0, 2, 2]


def test_a_fast_path_that_failed_in_an_attempt_doubles_no_step() -> None:
    # It began anew, so its attempt has two starts; the next one went on from step 2.
    one = [
        {"kind": "start", "step": 0},
        {"kind": "start", "step": 0},
        *({"kind": "train", "step": s} for s in (1, 2, 3)),
    ]
    two = [{"kind": "start", "step": 2}, *({"kind": "train", "step": step} for step in (3, 4))]
    numbered = [*({**event, "attempt": 1} for event in one), *({**event, "attempt": 2} for event in two)]
    before = [*one, *({**event, "attempt": 2} for event in two)]  # the first attempt was one of an earlier version
    for events in (numbered, before, [*one, *two]):
        assert [event["step"] for event in events_once(events) if event["kind"] == "train"] == [1, 2, 3, 4]


def palate_run(record: Record) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "palate.runner", record.uri]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_runner_leaves_a_run_that_another_has_or_that_is_over(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = job(session.store, inputs={})
    ended = threading.Event()
    held = take(record)
    assert held is not None

    def beat() -> None:
        while not ended.wait(0.1):
            held.beat()

    thread = threading.Thread(target=beat)
    thread.start()
    done = palate_run(record)
    ended.set()
    thread.join()
    assert (done.returncode, record.status().state) == (0, "Creating")
    assert "another runner has" in done.stderr
    held.release()
    record.advance("Stopped", expect={"Creating"})
    done = palate_run(record)
    assert (done.returncode, record.status().state) == (0, "Stopped")
    assert "nothing to run" in done.stderr
    monkeypatch.setenv("PALATE_LEASE_S", "soon")
    with pytest.raises(ConfigurationError, match=r"PALATE_LEASE_S='soon'.*seconds"):
        take(record)


def test_attempts_of_a_job_that_cannot_work_are_all_made_and_written_down(session: Session, home: Path) -> None:
    record = job(session.store, max_attempts=3)
    assert palate_run(record).returncode == 1
    status = record.status()
    assert (status.state, status.attempt, status.is_terminal) == ("Failed", 3, True)
    assert [entry.attempt for entry in status.attempts] == [1, 2]
    assert all("/nowhere" in reason for reason in [*(entry.reason for entry in status.attempts), status.reason])
    lease = read_lease(record)
    assert lease is not None
    assert lease.released
    assert not list((home / "work").rglob("program.log"))
    words = [line for line in record.log_lines() if "attempt" in line]
    assert len([line for line in words if "failed" in line]) == 2


def test_only_an_ended_job_is_resumed(session: Session) -> None:
    record = job(session.store, environment_names=("HF_TOKEN",))
    with pytest.raises(JobNotReadyError, match=r"is Creating.*palate watch one"):
        TrainingJob.get("one").resume()
    record.advance("Failed", expect={"Creating"})
    with pytest.raises(ConfigurationError, match=r"HF_TOKEN.*never recorded"):
        TrainingJob.get("one").resume()
    record.begin_again(expect={"Failed"}, attempt=1)
    record.advance("Succeeded", expect={"Creating"})
    with pytest.raises(JobNotReadyError, match="is Succeeded"):
        TrainingJob.get("one").resume()
    assert json.loads(session.store.get("jobs/one/status.json"))["attempt"] == 2


def test_a_resumed_job_shows_nothing_of_the_attempts_before(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    record = job(session.store)  # its model is nowhere, so the attempt fails
    record.append("logs", 1, b"step 1/2 loss 0.7, of the first attempt\n")
    record.advance("Failed", expect={"Creating"})
    with pytest.raises(TrainingJobError, match="nowhere"):
        TrainingJob.get("one").resume()
    assert "of the first attempt" not in capsys.readouterr().err
    assert "of the first attempt" in "\n".join(record.log_lines())
