"""A run's record: created once, moved conditionally, followed in parts. Over a file store and a real S3 server."""

from __future__ import annotations

import json
import threading
import tracemalloc
from pathlib import Path

import pytest

from palate.checksums import Checksums
from palate.errors import NameTakenError, RunNotFoundError
from palate.runner import heartbeat
from palate.runner.checkpoints import stage_last_checkpoint
from palate.runner.child_process import LOG_TAIL_LINES, log_tail
from palate.runner.heartbeat import Tail
from palate.runs.record import Record, events_once, locate, names
from palate.store import Store
from palate_recipes.specs.events import Curves
from palate_recipes.specs.run import ACTIVE, Status
from palate_recipes.specs.train import COMPLETE_MARK
from tests.support.manifests import serve_manifest, train_manifest, train_spec
from tests.support.stores import empty_store


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return empty_store(request.param, request, tmp_path)


def job(store: Store, name: str = "one") -> Record:
    record = Record(store, "jobs", name)
    record.create(train_manifest(name, labels={"team": "x"}))
    return record


def test_a_record_is_created_once(store: Store) -> None:
    record = job(store)
    assert record.manifest().body == train_spec()
    assert record.manifest().labels == {"team": "x"}
    assert record.status().state == "Creating"
    with pytest.raises(NameTakenError) as caught:
        job(store)
    for word in ("'one'", store.root, "palate delete one"):
        assert word in str(caught.value)
    assert names(store, "jobs") == ["one"]
    assert names(store, "services") == []


def test_what_is_not_there_is_said_with_the_store(store: Store) -> None:
    with pytest.raises(RunNotFoundError) as caught:
        Record(store, "services", "absent").manifest()
    for word in ("'absent'", store.root, "palate services"):
        assert word in str(caught.value)


def test_a_move_from_another_state_is_lost_and_changes_nothing(store: Store) -> None:
    record = job(store)
    assert record.advance("Running", expect={"Creating"}, engine_id="e1") is not None
    assert record.advance("Succeeded", expect=ACTIVE, exit_code=0) is not None
    before = record.status()
    assert record.advance("Failed", expect=ACTIVE, reason="late") is None
    assert record.status() == before
    assert (before.state, before.engine_id, before.exit_code, before.reason) == ("Succeeded", "e1", 0, "")
    assert before.finished_at is not None


def test_a_stop_and_a_finish_cannot_both_win(store: Store) -> None:
    for round_ in range(5):
        record = job(store, f"race-{round_}")
        record.advance("Running", expect={"Creating"})
        results: dict[str, Status | None] = {}
        gate = threading.Barrier(2)

        def finish(state: str, record: Record = record, results: dict[str, Status | None] = results) -> None:
            gate.wait()  # noqa: B023
            results[state] = record.advance(state, expect=ACTIVE, reason=state)  # type: ignore[arg-type]

        threads = [threading.Thread(target=finish, args=(state,)) for state in ("Succeeded", "Stopped")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [state for state, result in results.items() if result is not None]
        assert len(winners) == 1
        assert record.status().state == winners[0] == record.status().reason


def test_a_note_keeps_the_state_and_races_lose_nothing(store: Store) -> None:
    record = job(store)
    threads = [
        threading.Thread(target=record.note, kwargs={key: f"value of {key}"})
        for key in ("engine_id", "endpoint", "reason")
    ]
    for thread in threads:
        thread.start()
    record.advance("Running", expect={"Creating"})
    for thread in threads:
        thread.join()
    status = record.status()
    assert (status.state, status.engine_id, status.endpoint, status.reason) == (
        "Running", "value of engine_id", "value of endpoint", "value of reason",
    )  # fmt: skip


def test_parts_are_followed_without_gap_or_repeat(store: Store) -> None:
    record = job(store)
    record.append("logs", 1, b"first\nsec")
    assert [number for number, _ in record.parts("logs")] == [1]
    record.append("logs", 2, b"ond\nthird")
    assert list(record.parts("logs", after=1)) == [(2, b"ond\nthird")]
    assert list(record.log_lines()) == ["first", "second", "third"]
    events = [{"kind": "train", "step": 1}, {"kind": "train", "step": 2}]
    record.append("metrics", 1, b"".join(json.dumps(event).encode() + b"\n" for event in events))
    assert list(record.metrics()) == events


def test_a_line_that_was_cut_short_is_no_event_and_stops_none(store: Store, tmp_path: Path) -> None:
    record = Record(store, "jobs", "cut")
    written = tmp_path / "metrics.jsonl"
    written.write_bytes(
        b'{"kind": "train", "step": 1}\n{"kind": "tr{"kind": "train", "step": 2}\n{"kind": "train", "step": 3}\n{"ki'
    )
    tail = Tail(record, "metrics", written)
    tail.push(final=True)
    assert [event["step"] for event in record.metrics()] == [1, 3]
    written.open("ab").write(b'nd": "train", "step": 4}\n')
    tail.push(final=True)
    assert [event["step"] for event in record.metrics()] == [1, 3, 4]


_STRANGE_EVENTS = [
    b'{"a": 1}', b'{"kind": "start"}', b'{"kind": "train", "step": "x"}', b'{"kind": [], "step": {}}', b"[" * 100_000,
    b'{"kind": "train", "step": 1, "loss": "x"}', b'{"kind": "eval", "step": 1, "eval_loss": 1' + b"0" * 400 + b"}",
    b'{"kind": "end", "step": 1, "reading": {}}', b'{"kind": "train", "step": 1, "\\ud800": 1}',
    b'{"kind": "start", "step": 0, "attempt": [2]}',
    b'{"kind": "start", "step": 0, "total_steps": "x"}', b'{"kind": "start", "step": 0, "train_rows": []}',
    b'{"kind": "end", "step": 1, "reading": "x"}', b'{"kind": "end", "step": 1, "reading": {"verdict": 1}}',
]  # fmt: skip


def test_what_is_no_event_of_a_training_is_left_out(store: Store) -> None:
    record = job(store)
    known = [{"kind": "start", "step": 0}, {"kind": "train", "step": 1, "loss": 2.0}, {"kind": "end", "step": 1}]
    lines = [*_STRANGE_EVENTS, *(json.dumps(event).encode() for event in known)]
    record.append("metrics", 1, b"".join(line + b"\n" for line in lines))
    assert events_once(record.metrics()) == known
    assert Curves.of(record.metrics()).steps == 1


@pytest.mark.parametrize(
    "index",
    [b'{"merged": [], "following": 1e999}', b"[" * 100_000, b'{"merged": 5}', b'{"merged": ["a"], "following": 1}'],
)
def test_a_strange_log_index_counts_as_empty(store: Store, index: bytes) -> None:
    record = Record(store, "services", "svc")
    record.append("logs", 1, b"first\n")
    store.put(record.key("logs", "index.json"), index)
    store.put(record.key("logs", "\u00b2.log"), b"no part: that is no number, though Python calls it a digit")
    assert [*record.log_lines()] == record.last_log_lines(5) == ["first"]
    assert record.last_part("logs") == 1


def test_what_is_no_checkpoint_is_passed_over(store: Store, tmp_path: Path) -> None:
    record = job(store)
    mark = Checksums({}).encode()
    for name in ("step-000100", "step-000020-attempt-2", "foo", "step-abc", "step-1-2-3-4", "step-000300/sub"):
        store.put(record.key("checkpoints", name, COMPLETE_MARK), mark)
    store.put(record.key("checkpoints", COMPLETE_MARK), mark)
    said: list[str] = []
    assert stage_last_checkpoint(record, tmp_path, said.append) == tmp_path / "checkpoint-100"
    assert said == []


def test_delete_leaves_nothing_and_frees_the_name(store: Store) -> None:
    record = job(store)
    record.append("logs", 1, b"x")
    store.put(record.key("model", "a.bin"), b"x")
    record.delete()
    assert not record.exists()
    assert list(store.list("jobs/one/")) == []
    assert record.note(reason="too late") is None
    job(store)


def test_a_newer_writers_fields_are_read_over(store: Store) -> None:
    record = job(store)
    values = json.loads(store.get(record.key("status.json")))
    store.put(record.key("status.json"), json.dumps({**values, "from_the_future": 1}).encode())
    assert record.status().state == "Creating"


def test_a_run_is_found_by_its_uri() -> None:
    assert locate("s3://bucket/team/jobs/one") == ("s3://bucket/team", "jobs", "one")
    assert locate("file:///tmp/store/services/two/") == ("file:///tmp/store", "services", "two")
    with pytest.raises(ValueError, match="not the URI"):
        locate("s3://bucket/elsewhere/one")


def service_log(store: Store) -> Record:
    record = Record(store, "services", "chatty")
    record.create(serve_manifest("chatty"))
    return record


def test_a_services_log_keeps_to_its_bounds_and_is_read_whole(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"KEPT_BYTES": 20_000, "PART_BYTES": 2000, "_MOST_PARTS": 30, "_UNMERGED_PARTS": 10}.items():
        monkeypatch.setattr(heartbeat, name, value)
    monkeypatch.setattr(heartbeat, "FILE_BYTES", 5000)
    record, log = service_log(store), tmp_path / "program.log"
    tail = Tail(record, "logs", log)
    followed: list[str] = []
    part = 0
    for number in range(600):
        with log.open("a") as file:
            file.write(f"line {number:05d} {'x' * 88}\n")
        tail.push()
        for found, data in record.parts("logs", after=part):
            part = found
            followed += data.decode().splitlines()
        if number == 300:
            tail = Tail(record, "logs", log, offset=log.stat().st_size)  # the next attempt's
    assert [int(line.split()[1]) for line in followed] == list(range(600))
    kept = [int(line.split()[1]) for line in record.log_lines()]
    assert kept == list(range(kept[0], 600))
    assert 15_000 < 100 * len(kept) <= 20_000
    objects = list(store.list("services/chatty/logs"))
    assert sum(info.size for info in objects) < 22_000
    assert len(objects) < 60
    assert log.stat().st_size < 6000
    assert record.last_log_lines(3) == followed[-3:]
    assert [line.split()[1] for line in log_tail(log)][-2:] == ["00598", "00599"]
    assert len(log_tail(log)) == LOG_TAIL_LINES


def test_a_log_of_any_size_costs_little_memory(store: Store, tmp_path: Path) -> None:
    record, log = service_log(store), tmp_path / "program.log"
    with log.open("wb") as file:
        for _ in range(48):
            file.write(b"y" * 1023 * 1024 + b"\n" + b"z" * 1023 + b"\n")
        file.write(b"the end\n")
    tracemalloc.start()
    try:
        tail = Tail(record, "logs", log)
        tail.push()
        assert (record.last_log_lines(1), log_tail(log)[-1:]) == (["the end"], ("the end",))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * 1024**2
    assert sum(info.size for info in store.list("services/chatty/logs")) <= heartbeat.KEPT_BYTES + 10_000
    assert log.stat().st_size == 0


def test_a_log_that_waits_for_its_store_is_left_out_before_the_disk_is_full(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "WAITING_BYTES", 1000)
    record, log = service_log(store), tmp_path / "program.log"
    tail = Tail(record, "logs", log)
    log.write_bytes(b"lost\n" * 300)
    tail.push()
    with log.open("a") as file:
        file.write("kept\n")
    tail.push()
    assert [line for line in record.log_lines() if line] == [
        "palate: 1500 bytes of the log were discarded: the store was unreachable",
        "kept",
    ]


class _Counted(dict[str, object]):
    """An event that counts how often its fields are read."""

    reads = 0

    def __getitem__(self, name: str) -> object:
        _Counted.reads += 1
        return super().__getitem__(name)


def test_evaluations_are_merged_in_linear_time() -> None:
    events = [_Counted(kind="start", step=0)]
    for step in range(1, 1001):
        events += [_Counted(kind="train", step=step), _Counted(kind="eval", step=step)]
    again = [_Counted(kind="start", step=1000, attempt=2), _Counted(kind="eval", step=1000, attempt=2, repeated=True)]
    once = events_once([*events, *again])
    assert len(once) == len(events) + 1
    assert [event for event in once if event["kind"] == "eval"][-1].get("repeated")
    assert _Counted.reads < 20 * len(events)
