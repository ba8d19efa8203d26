"""A service's time to live is renewed: by the client through the record to the runner's deadline. Without an engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import palate.predictor
from palate import Predictor, Session
from palate.deploy import _take_over_failed
from palate.errors import ConfigurationError, DamagedFilesError, ServiceError
from palate.runner.lifetime import Lifetime
from palate.runner.poll import RecordPoll
from palate.runs.record import RENEWAL_KEY, Record
from palate.runs.renewal import read_renewal, write_renewal
from palate.store import open_store
from tests.support.manifests import serve_manifest
from tests.support.schemas import check_records

HOUR_S = 3600.0


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(store=f"file://{tmp_path}/store")


@pytest.fixture
def record(session: Session) -> Record:
    """A service that starts, and may run for an hour."""
    record = Record(session.store, "services", "svc")
    record.create(serve_manifest(time_to_live_s=HOUR_S))
    return record


@pytest.fixture
def predictor(session: Session, record: Record) -> Predictor:
    return Predictor("svc", session=session)


def lifetime_of(record: Record) -> Lifetime:
    """As the runner makes it at a start."""
    found = Lifetime(record, record.status().attempt, record.serve_manifest().body.time_to_live_s)
    found.update()
    return found


def announce(record: Record, lifetime: Lifetime) -> None:
    """What the runner does when the program has answered."""
    details = {"port": 8000, **lifetime.begin()}
    assert record.advance("Running", expect={"Creating"}, engine_id="elsewhere:1:2:x", details=details)


@contextmanager
def running(record: Record) -> Iterator[Lifetime]:
    """The part of a runner that follows the record of its running service."""
    lifetime, said = lifetime_of(record), list[str]()
    announce(record, lifetime)
    with RecordPoll({"time to live": lifetime.update}, said.append):
        yield lifetime
    assert said == []


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palate.runner.poll.POLL_S", 0.05)
    monkeypatch.setattr(palate.predictor, "_TOKENS_POLL_S", 0.01)


def about(seconds: float | None) -> object:
    return None if seconds is None else pytest.approx(seconds, abs=30)


def left_s(lifetime: Lifetime) -> float | None:
    end = lifetime.ends_at()
    return None if end is None else end - time.monotonic()


def shown_left_s(predictor: Predictor) -> float | None:
    end = predictor.describe_service()["EndsAt"]
    return None if end is None else end - time.time()


def check_end(lifetime: Lifetime, predictor: Predictor, seconds: float | None) -> None:
    """The runner's deadline and what is shown are the same."""
    assert (left_s(lifetime), shown_left_s(predictor)) == (about(seconds), about(seconds))


def test_a_running_service_follows_before_the_call_returns(predictor: Predictor, record: Record) -> None:
    with running(record) as lifetime:
        check_end(lifetime, predictor, HOUR_S)
        for seconds in (2 * HOUR_S, 600, None, 5 * HOUR_S):
            predictor.renew(seconds)
            check_end(lifetime, predictor, seconds)
    details = record.status().details
    assert details["port"] == 8000, "the other details stay"
    assert details["renewal"] == read_renewal(record).id  # type: ignore[union-attr]
    assert not {"renewal", "ends_at"} & set(predictor.describe_service())
    assert check_records(record.store) == 3


def test_a_service_without_a_time_to_live_gets_one(session: Session, tmp_path: Path) -> None:
    record = Record(session.store, "services", "endless")
    record.create(serve_manifest("endless"))
    predictor = Predictor("endless", session=session)
    with running(record) as lifetime:
        check_end(lifetime, predictor, None)
        assert "ends_at" not in record.status().details
        predictor.renew(HOUR_S)
        check_end(lifetime, predictor, HOUR_S)


def test_the_deadline_is_what_ends_it_and_no_renewal_is_followed_after_that(
    predictor: Predictor, record: Record
) -> None:
    with running(record) as lifetime:
        predictor.renew(0.001)
        end = lifetime.ends_at()
        assert end is not None
        assert end <= time.monotonic()
        told: list[BaseException] = []

        def renew() -> None:
            try:
                predictor.renew(HOUR_S)
            except ServiceError as error:
                told.append(error)

        late = threading.Thread(target=renew)
        late.start()
        wait_for(lambda: (renewal := read_renewal(record)) is not None and renewal.time_to_live_s == HOUR_S)
        for _ in range(3):
            lifetime.update()
        assert lifetime.ends_at() == end
        record.advance("Stopped", expect={"Running"}, reason="its time to live is over")
        late.join(30)
    assert "was not renewed in time" in str(told[0])
    assert "its time to live is over" in str(told[0])
    assert predictor.describe_service()["EndsAt"] is None


def wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def test_a_stopped_service_has_the_time_at_each_later_start(predictor: Predictor, record: Record) -> None:
    record.advance("Stopped", expect={"Creating"})
    predictor.renew(2 * HOUR_S)
    for attempt in (1, 2):
        record.begin_again(expect={"Stopped"}, attempt=attempt, more=1)
        lifetime = lifetime_of(record)
        assert lifetime.ends_at() is None, "it counts from the first answer"
        announce(record, lifetime)
        check_end(lifetime, predictor, 2 * HOUR_S)
        record.advance("Stopped", expect={"Running"})


def test_a_renewal_during_the_start_counts_from_the_first_answer(predictor: Predictor, record: Record) -> None:
    lifetime = lifetime_of(record)
    predictor.renew(2 * HOUR_S)  # returns at once: there is nobody to wait for
    lifetime.update()
    assert (lifetime.ends_at(), record.status().details) == (None, {})
    details = lifetime.begin()
    # Renewed between the first answer and the status that says so: the later one reaches the status, too.
    write_renewal(record, 5 * HOUR_S)
    lifetime.update()
    assert record.status().details == {}
    record.advance("Running", expect={"Creating"}, details=details)
    assert shown_left_s(predictor) == about(2 * HOUR_S)
    lifetime.update()
    check_end(lifetime, predictor, 5 * HOUR_S)


def test_of_two_renewals_the_last_counts_and_both_callers_return(predictor: Predictor, record: Record) -> None:
    with running(record) as lifetime:
        threads = [threading.Thread(target=predictor.renew, args=(hours * HOUR_S,)) for hours in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        renewal = read_renewal(record)
        assert renewal is not None
        assert left_s(lifetime) == about(renewal.time_to_live_s or 0)


def test_a_runner_that_does_not_follow_is_told(
    predictor: Predictor, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(palate.predictor, "_TOKENS_LIMIT_S", 0.1)
    announce(record, lifetime_of(record))  # and then nobody polls, as with a runner of an earlier version
    with pytest.raises(ServiceError, match=r"was renewed in its record.*has not followed.*palate stop svc"):
        predictor.renew(60)


def test_a_later_attempt_is_not_written_to(record: Record) -> None:
    """A runner that counted as lost and comes back."""
    lifetime = lifetime_of(record)
    announce(record, lifetime)
    record.advance("Failed", expect={"Running"})
    record.begin_again(expect={"Failed"}, attempt=1, more=1)
    record.advance("Running", expect={"Creating"}, details={"port": 1})
    write_renewal(record, 60)
    lifetime.update()
    assert record.status().details == {"port": 1}


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), 1e12, True, "2h", 10**400])
def test_a_time_that_cannot_be_is_refused(predictor: Predictor, record: Record, seconds: float) -> None:
    with pytest.raises(ConfigurationError, match=r"time_to_live_s=.* is out of range"):
        predictor.renew(seconds)
    assert record.store.stat(record.key(RENEWAL_KEY)) is None


def test_a_damaged_renewal_changes_nothing_and_is_named_once(record: Record) -> None:
    lifetime, said = lifetime_of(record), list[str]()
    announce(record, lifetime)
    before = lifetime.ends_at()
    calls = threading.Semaphore(0)

    def follow() -> None:
        calls.release()
        lifetime.update()

    damaged = (b"", b"{", b"\xff", b"[]", b'{"id": "x", "time_to_live_s": 1, "schema": 1}', b"[" * 100_000)
    for content in (*damaged, b'{"id": "0123456789abcdef", "time_to_live_s": 1e99, "schema": 1}'):
        record.store.put(record.key(RENEWAL_KEY), content)
        with pytest.raises(DamagedFilesError, match=r"renewal.json of svc is damaged.*palate renew svc"):
            lifetime.update()
    with RecordPoll({"time to live": follow, "rest": calls.release}, said.append):
        for _ in range(6):
            assert calls.acquire(timeout=30), "the part after it is called all the same"
    assert lifetime.ends_at() == before
    assert len(said) == 1
    assert "changes of the time to live wait" in said[0]


def test_a_deploy_over_a_failed_service_has_its_own_time_to_live(session: Session, record: Record) -> None:
    write_renewal(record, 60)
    record.advance("Failed", expect={"Creating"})
    assert _take_over_failed(record, serve_manifest(time_to_live_s=5.0), session)
    assert read_renewal(record) is None


def test_the_command(home: Path) -> None:
    from typer.testing import CliRunner

    from palate.cli import app

    store = open_store(f"file://{home}/store")
    service = Record(store, "services", "svc")
    service.create(serve_manifest(time_to_live_s=60.0))

    def palate_(*arguments: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, [*arguments])
        return done.exit_code, done.stdout, done.stderr

    with running(service):
        code, out, said = palate_("renew", "svc", "122min")
        assert (code, out.startswith("svc\tends in 2 h, at 2"), said) == (0, True, "next: palate services --live\n"), (
            out
        )
        shown = palate_("show", "svc")[1]
        assert "ends      " in shown
        assert "in 2 h, at 2" in shown
        assert "time_to_live_s=7320.0" in shown
        assert "renewal" not in shown
        assert palate_("renew", "svc", "never")[:2] == (0, "svc\tno end\n")
    service.advance("Stopped", expect={"Running"})
    assert palate_("renew", "svc", "30min") == (
        0,
        "svc\tStopped: the time counts from its next first answer\n",
        "next: palate start svc\n",
    )
    code, _, said = palate_("renew", "svc", "soon")
    assert (code, "error: TIME_TO_LIVE: expected a duration such as 30min" in said) == (1, True)
    code, _, said = palate_("renew", "svc", "0s")
    assert (code, said.startswith("error: TIME_TO_LIVE 0.0 is out of range")) == (1, True), said
    assert "never removes the limit" in said
