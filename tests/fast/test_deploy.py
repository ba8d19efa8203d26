"""One service, one name: who gets it when several want it at once. Over a backend that starts nothing."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from palate import Predictor, Session
from palate.backends import EngineStatus, PlacementRequest
from palate.backends.process import ProcessBackend
from palate.deploy import IDLE_TIME_TO_LIVE_S, ServedModel, start_service
from palate.errors import ConfigurationError, NameTakenError, ServiceError
from palate.runner.context import RunContext
from palate.runner.serve import _port
from palate.runs.access import add, read_access
from palate.runs.record import TOKEN_KEY, Record
from palate.runs.rollout import ask, history, open_update, reserve, update_to
from palate.store import Store, open_store
from palate_recipes.specs.weights import BaseModel, WeightsSource
from tests.support.manifests import serve_manifest
from tests.support.stores import empty_store

RACERS = 6


class NothingStarts(ProcessBackend):
    """Says that what it was told to start runs."""

    def __init__(self) -> None:
        super().__init__()
        self.started = 0

    def start(self, launch: Any) -> str:
        self.started += 1
        return "nothing"

    def of_run(self, uri: str) -> NothingStarts:
        return self

    def status(self, engine_id: str) -> EngineStatus:
        return EngineStatus("running")


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, home: Path, tmp_path: Path) -> Store:
    return empty_store(request.param, request, tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> ServedModel:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x")
    return ServedModel(model=BaseModel(name="m", source=WeightsSource(kind="folder", location=str(folder))))


def deploy(store: Store, backend: NothingStarts, model: ServedModel, **options: Any) -> Record:
    session = Session(store=store.root, backend=backend)
    session._store = store
    start_service(session, service_name="svc", served=model, options=options, wait=False)
    return Record(store, "services", "svc")


def race(act: Callable[[int], object]) -> list[Exception]:
    """Lets all begin at once; returns what went wrong for those who lost."""
    ready, failures = threading.Barrier(RACERS), []

    def run(number: int) -> None:
        ready.wait()
        try:
            act(number)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(RACERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


@pytest.mark.parametrize("round_", range(4))
@pytest.mark.parametrize("is_new", [False, True], ids=["failed", "new"])
def test_one_of_several_deploys_gets_the_name(store: Store, model: ServedModel, is_new: bool, round_: int) -> None:
    record = Record(store, "services", "svc")
    if not is_new:
        record.create(serve_manifest())
        record.append("logs", 1, b"of the failed start\n")
        add(record, "alice", rate_per_minute=None, concurrency=None)
        record.advance("Failed", expect={"Creating"}, reason="once")
    backends = [NothingStarts() for _ in range(RACERS)]
    failures = race(lambda number: deploy(store, backends[number], model, max_model_len=100 + number))
    assert len(failures) == RACERS - 1
    for failure in failures:
        assert isinstance(failure, NameTakenError)
        assert "service name 'svc'" in str(failure)
    assert sum(backend.started for backend in backends) == 1
    winner = next(number for number, backend in enumerate(backends) if backend.started)
    assert record.serve_manifest().body.options["max_model_len"] == 100 + winner
    assert record.status().state == "Creating"
    assert len(store.get(record.key(TOKEN_KEY))) >= 32
    assert read_access(record).tokens == (), "the failed service's tokens are not the new one's"
    assert list(record.log_lines()) == []


@pytest.mark.parametrize("store", ["file"], indirect=True)
def test_a_service_of_a_script_has_an_idle_time_to_live(store: Store, model: ServedModel) -> None:
    backend = NothingStarts()
    assert deploy(store, backend, model).serve_manifest().body.idle_time_to_live_s == IDLE_TIME_TO_LIVE_S == 12 * 3600
    Record(store, "services", "svc").delete()
    record = deploy(store, backend, model, idle_time_to_live_s=None, time_to_live_s=60)
    assert (record.serve_manifest().body.idle_time_to_live_s, record.serve_manifest().body.time_to_live_s) == (None, 60)
    for options in (
        {"idle_time_to_live_s": 0},
        {"idle_time_to_live_s": "1"},
        {"time_to_live_s": None},
        {"hang_after_s": 0},
        {"time_to_live_s": float("inf")},
        {"start_timeout_s": float("nan")},
    ):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            deploy(store, backend, model, **options)
    with pytest.raises(ConfigurationError, match="--middleware"):
        deploy(store, backend, model, engine_args=["--middleware", "x.Y"])


@pytest.mark.parametrize("store", ["file"], indirect=True)
@pytest.mark.parametrize("host", ["", "host.invalid", "203.0.113.1", "a\0b", "127.0.0.1 "])
def test_a_host_that_cannot_be_bound_is_refused_before_anything_is_written(
    store: Store, model: ServedModel, host: str
) -> None:
    """An empty one above all: to a socket it means every address of the machine."""
    with pytest.raises(ConfigurationError, match=r"host.*127\.0\.0\.1"):
        deploy(store, NothingStarts(), model, host=host)
    assert not Record(store, "services", "svc").exists()


def test_a_service_keeps_its_port_and_takes_another_if_that_one_is_taken(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("palate.runner.serve._PORT_RELEASE_S", 0.2)
    record = Record(session.store, "services", "svc")
    record.create(serve_manifest("svc"))
    said: list[str] = []
    context = cast(RunContext, SimpleNamespace(record=record, say=said.append))
    assert _port(context, {}) == 0, "the first start has no port to keep"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        record.note(attempt=1, details={"port": port})
        assert _port(context, {}) == 0
        assert f"port {port}" in said[0]
        assert "its URL changes" in said[0]
        assert _port(context, {"port": port}) == port, "a port that was asked for is not replaced: binding it fails"
    assert _port(context, {}) == port
    assert len(said) == 1
    for value in (80, 70_000, -1, "8000", True, None):  # the record is not trusted
        record.note(attempt=1, details={"port": value})
        assert _port(context, {}) == 0


def test_a_new_start_shows_nothing_of_the_starts_before(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = Record(open_store(f"file://{home}/store"), "services", "svc")
    record.create(serve_manifest())  # its model is nowhere, so the start fails
    record.store.put(record.key(TOKEN_KEY), b"a-token-for-tests", private=True)
    record.append("logs", 1, b"palate: vllm has answered its first request, 24 s after the start\n")
    record.advance("Stopped", expect={"Creating"}, attempt=1)
    with pytest.raises(ServiceError, match="not on this machine"):
        Predictor("svc").start_service()
    assert "has answered" not in capsys.readouterr().err


def test_a_request_that_is_no_dict_is_refused_in_words(home: Path) -> None:
    Record(open_store(f"file://{home}/store"), "services", "svc").create(serve_manifest())
    with pytest.raises(ConfigurationError, match=r'data is str, not a request: give \{"messages"'):
        Predictor("svc").predict("Is it?")  # type: ignore[arg-type]


def test_a_service_that_serves_the_job_already_is_not_started_again(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record(open_store(f"file://{home}/store"), "services", "svc")
    manifest = serve_manifest()
    record.create(manifest)
    record.advance("Running", expect={"Creating"}, endpoint="http://127.0.0.1:9", engine_id="elsewhere:1:2:x")

    class Same:
        id = "one"

        def served_model(self, checkpoint: str | int | None = None) -> ServedModel:
            body = manifest.body
            return ServedModel(
                model=body.model,
                tuned_uri=body.tuned_uri,
                tuned_digest=body.tuned_digest,
                adapter=body.adapter,
                system_prompt=body.system_prompt,
                labels=manifest.labels,
            )

    Predictor("svc").update_service(Same())
    assert capsys.readouterr().err == "service svc already serves job one\n"
    assert (record.status().state, record.status().attempt) == ("Running", 1)


def test_nothing_of_a_deleted_run_stays_in_the_work_folder(home: Path) -> None:
    Record(open_store(f"file://{home}/store"), "services", "svc").create(serve_manifest())
    left = home / "work" / "services" / "svc"
    code = "from palate.paths import work_folder\nwork_folder('services', 'svc').mkdir(parents=True)"
    subprocess.run([sys.executable, "-c", code], check=True)  # a runner that was killed
    assert [*left.iterdir()]
    Predictor("svc").delete_service()
    assert not left.exists()


@pytest.mark.parametrize(("given", "kept"), [(True, "error"), ("warn", "warn"), (False, "off")])
@pytest.mark.parametrize("store", ["file"], indirect=True)
def test_what_verify_means_is_in_the_record(store: Store, model: ServedModel, given: bool | str, kept: str) -> None:
    record = deploy(store, NothingStarts(), model, verify=given)
    assert record.serve_manifest().body.options["verify"] == kept


@pytest.mark.parametrize("given", ["yes", 1.5, None])
@pytest.mark.parametrize("store", ["file"], indirect=True)
def test_an_unknown_verify_is_refused(store: Store, model: ServedModel, given: object) -> None:
    with pytest.raises(ConfigurationError, match="verify"):
        deploy(store, NothingStarts(), model, verify=given)
    assert not Record(store, "services", "svc").exists()


@pytest.mark.parametrize("store", ["file"], indirect=True)
def test_the_number_of_instances_is_in_the_record_and_bounded(store: Store, model: ServedModel) -> None:
    session = Session(store=store.root, backend=NothingStarts())
    for count, kept in ((None, 1), (3, 3)):
        name = f"svc-{kept}"
        where = PlacementRequest(kind="services", instance_count=count)
        start_service(session, service_name=name, served=model, where=where, wait=False)
        assert Record(store, "services", name).serve_manifest().body.instances == kept
    for wrong in (0, 65):
        where = PlacementRequest(kind="services", instance_count=wrong)
        with pytest.raises(ConfigurationError, match=f"instance_count={wrong} is out of range"):
            start_service(session, service_name="never", served=model, where=where, wait=False)


@pytest.mark.parametrize("store", ["file"], indirect=True)
def test_a_service_over_a_failed_one_has_a_history_of_its_own(store: Store, model: ServedModel) -> None:
    record = deploy(store, NothingStarts(), model)
    ask(record, update_to(reserve(record, record.serve_manifest().body, {})))
    record.advance("Failed", expect={"Creating"})
    deploy(store, NothingStarts(), model)
    assert (history(record), open_update(record), record.serve_manifest().body.version) == ([], None, 1)
