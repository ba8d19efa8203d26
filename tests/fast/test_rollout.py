"""Updates of a running service: the record, its runner's part and the client, with a program that only reports states."""

from __future__ import annotations

import json
import signal
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace as with_fields
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace

import palate.rollout
from palate import Predictor, Session
from palate.cli import rollout as command_line
from palate.deploy import ServedModel
from palate.errors import ConfigurationError, DamagedFilesError, ServiceError, StoreUnreachableError
from palate.predictor import HasModel
from palate.runner.fleet import Rollout, Staged
from palate.runner.poll import RecordPoll
from palate.runner.retry import StoreRetry
from palate.runs.record import Record
from palate.runs.rollout import (
    KEPT_VERSIONS,
    UPDATE_KEY,
    ask,
    change_update,
    history,
    last_update,
    numbers,
    open_update,
    read_version,
    reserve,
    update_to,
)
from palate.store import Store
from palate_recipes.specs.fleet import FLEET_FILE, AdapterState, Fleet, FleetAdapter, VersionState
from palate_recipes.specs.run import Autoscaling, Deployment
from palate_recipes.specs.serve import Parity, ServeSpec
from palate_recipes.specs.weights import BaseModel, WeightsSource
from tests.fast.test_deploy import NothingStarts
from tests.support.fleet import Program
from tests.support.fleets import until
from tests.support.manifests import serve_manifest
from tests.support.schemas import check_records
from tests.support.stores import empty_store


class Killed(BaseException):
    """The runner was killed at this write."""


class Breaks:
    """A store that fails, for the runner's side only. `before` counts the writes until it is killed."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.away = False
        self.before: int | None = None
        self.after_write = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in ("get", "put", "stat", "list", "delete"):
            return found

        def act(*args: Any, **kwargs: Any) -> Any:
            if self.away:
                raise StoreUnreachableError("the store is away")
            if name == "put" and self.before is not None:
                self.before -= 1
                if self.before < 0:
                    if self.after_write:
                        found(*args, **kwargs)
                    raise Killed
            return found(*args, **kwargs)

        return act


class Runner:
    """The runner's part and its program, one step at a time."""

    def __init__(self, record: Record, work: Path, *, fails: dict[str, VersionState] | None = None) -> None:
        work.mkdir(parents=True)
        self.store = Breaks(record.store)
        direct = Record(cast(Store, self.store), "services", record.name)
        self.work = work
        self.said: list[str] = []
        self.staging = threading.Event()
        self.staging.set()
        self.stage_error: Exception | None = None
        self.program = Program(work, fails)
        current = self.stage(record.serve_manifest().body, work / "model", StoreRetry(self.said.append, lambda: False))
        self.rollout = Rollout(
            direct, current, work, stage=self.stage, attempt=lambda: record.status().attempt, say=self.said.append
        )
        self.rollout.begin()
        self.program.look()
        self.program.look()
        facts = self.rollout.facts()
        record.note(
            state="Running",
            endpoint="http://127.0.0.1:9",
            engine_id="elsewhere:1:2:x",
            finished_at=None,
            details={"port": 9, "models": ["default", record.name], **facts},
        )
        self.rollout.announced(facts)

    def stage(self, body: Deployment, folder: Path, retry: StoreRetry) -> Staged:
        assert self.staging.wait(10)
        folder.mkdir()
        (folder / "weights").write_bytes(b"w")
        if self.stage_error is not None:
            raise self.stage_error
        spec = ServeSpec(
            service_name="svc",
            model_dir=str(folder),
            base_model_dir="/base" if body.adapter else None,
            work_dir=str(self.work),
        )
        return Staged(body=body, spec=spec, folder=folder)

    def step(self) -> None:
        self.rollout.update()
        self.program.look()

    def steps(self, until: Callable[[], bool]) -> None:
        """Takes steps until something is so. Staging is in a thread of its own, so the number of steps varies."""
        deadline = time.monotonic() + 20
        while not until():
            assert time.monotonic() < deadline, self.said
            self.step()
            time.sleep(0.002)

    @property
    def fleet(self) -> dict[str, tuple[float, int]]:
        """The desired state: share and instances by version."""
        return {one.name: (one.share, one.instances) for one in Fleet.read(self.work / FLEET_FILE).versions}

    @property
    def folders(self) -> list[str]:
        return sorted(path.name for path in self.work.iterdir() if path.is_dir())


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.thorough)])
def store(request: pytest.FixtureRequest, home: Path, tmp_path: Path) -> Store:
    return empty_store(request.param, request, tmp_path)


@pytest.fixture
def record(store: Store) -> Record:
    record = Record(store, "services", "svc")
    record.create(replace(serve_manifest(tuned_uri="file:///jobs/one/model"), labels={"job": "one"}))
    return record


@pytest.fixture
def service(record: Record) -> Predictor:
    session = Session(store=record.store.root)
    session._store = record.store
    return Predictor("svc", session=session)


@pytest.fixture
def runner(record: Record, tmp_path: Path) -> Runner:
    return Runner(record, tmp_path / "work")


only_file = pytest.mark.parametrize("store", ["file"], indirect=True)


def job(name: str, **fields: Any) -> HasModel:
    class Job:
        id = name

        def served_model(self, checkpoint: str | int | None = None) -> ServedModel:
            model = serve_manifest().body.model
            served = ServedModel(model=model, tuned_uri=f"file:///jobs/{name}/model", labels={"job": name})
            return with_fields(served, **fields)

    return Job()


def asked(record: Record, name: str = "two", **how: Any) -> str:
    """Asks for an update as the client does; returns its id."""
    body = replace(record.serve_manifest().body, tuned_uri=f"file:///jobs/{name}/model", adapter=True)
    update = update_to(reserve(record, body, {"job": name}), **how)
    ask(record, update)
    return update.id


@contextmanager
def running(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    monkeypatch.setattr("palate.runner.poll.POLL_S", 0.02)
    with runner.program, RecordPoll({"versions": runner.rollout.update}, runner.said.append):
        yield runner


def states(service: Predictor) -> list[tuple[str, str]]:
    return [(one.name, one.state) for one in service.versions()]


# ── the runner ──────────────────────────────────────────────────────────────────────────────────────────────────────


@only_file
def test_a_new_version_joins_replaces_the_old_one_and_removes_its_files(record: Record, runner: Runner) -> None:
    assert runner.fleet == {"v1": (1.0, 1)}
    runner.step()
    assert len(runner.program.seen) == 1, "nothing to do: the desired state is not written again"
    asked(record)
    runner.steps(lambda: open_update(record) is None)
    assert [[(one.name, one.share) for one in fleet.versions] for fleet in runner.program.seen] == [
        [("v1", 1.0)],
        [("v1", 1.0), ("v2", 0.0)],
        [("v2", 1.0)],
    ], "the old version answers until the new one is ready"
    manifest = record.serve_manifest()
    assert (manifest.body.version, manifest.body.tuned_uri, manifest.labels) == (
        2,
        "file:///jobs/two/model",
        {"job": "two"},
    )
    assert [(one.number, one.outcome) for one in history(record)] == [(1, "replaced"), (2, "current")]
    runner.steps(lambda: runner.folders == ["model-v2"])
    details = record.status().details
    assert details["update"]["state"] == "promoted"
    assert details["versions"] == [{"name": "v2", "state": "ready", "instances": 1, "engine": "fake 1", "share": 1.0}]
    assert (details["port"], details["models"], details["engine"]) == (9, ["default", "svc", "base"], "fake 1")
    assert check_records(record.store) == 5


@only_file
def test_a_version_that_fails_leaves_the_old_one_and_says_why(record: Record, tmp_path: Path) -> None:
    parity = Parity(verdict="different", text="0.3 nats apart", table="row 1")
    failed = VersionState(name="v2", state="failed", reason="it is not what was trained", parity=parity)
    runner = Runner(record, tmp_path / "work", fails={"v2": failed})
    before = record.manifest_bytes()
    asked(record)
    runner.steps(lambda: open_update(record) is None and runner.folders == ["model"])
    assert (record.manifest_bytes(), runner.fleet) == (before, {"v1": (1.0, 1)})
    kept = read_version(record, 2)
    assert kept is not None
    assert (kept.outcome, kept.reason, kept.table) == ("failed", "it is not what was trained", "row 1")
    told = record.status().details["update"]
    assert (told["version"], told["state"], told["reason"], told["table"]) == ("v2", "failed", kept.reason, "row 1")


@only_file
def test_a_model_that_cannot_be_staged_is_a_failed_update(record: Record, runner: Runner) -> None:
    runner.stage_error = OSError(28, "No space left on device")
    asked(record)
    runner.steps(lambda: open_update(record) is None)
    assert "The disk is full" in history(record)[-1].reason
    assert (runner.folders, runner.fleet) == (["model"], {"v1": (1.0, 1)})


@only_file
def test_an_update_that_is_withdrawn_while_it_is_staged_ends_at_once(record: Record, runner: Runner) -> None:
    runner.staging.clear()
    update_id = asked(record)
    runner.step()
    assert record.status().details["update"]["state"] == "staging"
    change_update(record, update_id, cancelled=True)
    runner.step()
    assert open_update(record) is None
    assert history(record)[-1].outcome == "cancelled"
    runner.staging.set()
    runner.steps(lambda: runner.folders == ["model"])


@only_file
def test_a_canary_has_its_share_until_it_is_promoted(record: Record, runner: Runner) -> None:
    update_id = asked(record, share=0.1, promote=False)
    runner.steps(lambda: record.status().details["update"].get("state") == "ready")
    assert runner.fleet == {"v1": (0.9, 1), "v2": (0.1, 1)}
    change_update(record, update_id, share=0.5)
    runner.step()
    assert runner.fleet == {"v1": (0.5, 1), "v2": (0.5, 1)}
    assert record.serve_manifest().body.version == 1
    change_update(record, update_id, promote=True)
    runner.step()
    assert (runner.fleet, record.serve_manifest().body.version) == ({"v2": (1.0, 1)}, 2)


@only_file
def test_instances_follow_the_record_and_survive_an_update(record: Record, runner: Runner) -> None:
    manifest = record.serve_manifest()
    record.replace_manifest(manifest, replace(manifest, body=replace(manifest.body, instances=3)))
    runner.step()
    assert runner.fleet == {"v1": (1.0, 3)}
    asked(record)
    runner.steps(lambda: open_update(record) is None)
    assert record.serve_manifest().body.instances == 3, "the update was asked for with 3, and 3 it is"
    assert runner.fleet == {"v2": (1.0, 3)}


@only_file
@pytest.mark.parametrize("after_write", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("ends", ["promoted", "failed", "cancelled"])
def test_a_runner_killed_at_any_write_is_followed_by_one_that_completes_the_update(
    record: Record, tmp_path: Path, ends: str, after_write: bool
) -> None:
    """Each update is killed at its first write, the next one at its second, and so on, until one needs no more writes."""
    fails = {name: VersionState(name=name, state="failed", reason="broken") for name in (f"v{n}" for n in range(2, 40))}
    for write in range(12):
        first = Runner(record, tmp_path / f"first-{write}", fails=fails if ends == "failed" else None)
        version = record.serve_manifest().body.version
        update_id = asked(record, f"job-{write}", promote=ends != "cancelled")
        number = numbers(record)[-1]
        if ends == "cancelled":
            first.steps(lambda runner=first: len(runner.fleet) == 2)  # type: ignore[misc]
            change_update(record, update_id, cancelled=True)
        first.store.before, first.store.after_write = write, after_write
        killed = False
        try:
            first.steps(lambda: open_update(record) is None)
        except Killed:
            killed = True
        second = Runner(record, tmp_path / f"second-{write}", fails=fails if ends == "failed" else None)
        second.steps(lambda: open_update(record) is None)
        second.step()
        now = record.serve_manifest()
        kept = read_version(record, number)
        assert kept is not None
        if ends == "promoted":
            assert (now.body.version, now.labels, kept.outcome) == (number, {"job": f"job-{write}"}, "current")
            old = read_version(record, version)
            assert old is not None
            assert old.outcome == "replaced"
        else:
            assert (now.body.version, kept.outcome) == (version, ends)
        assert second.fleet == {f"v{now.body.version}": (1.0, 1)}
        if not killed:
            break
    else:
        pytest.fail("an update needs more writes than it should")
    assert write >= 3, "it was killed at each of its writes"


@only_file
def test_an_open_update_is_taken_up_after_the_current_version_answers(record: Record, tmp_path: Path) -> None:
    asked(record, share=0.25, promote=False)
    runner = Runner(record, tmp_path / "work")
    assert runner.fleet == {"v1": (1.0, 1)}
    runner.steps(lambda: runner.fleet == {"v1": (0.75, 1), "v2": (0.25, 1)})
    assert record.serve_manifest().body.version == 1


@only_file
def test_while_the_store_is_away_everything_stays_as_it_is(record: Record, runner: Runner) -> None:
    asked(record)
    runner.steps(lambda: len(runner.fleet) == 2)
    before = runner.fleet
    runner.store.away = True
    for _ in range(4):  # the version becomes ready meanwhile
        with pytest.raises(StoreUnreachableError):
            runner.rollout.update()
        runner.program.look()
    assert runner.fleet == before
    runner.store.away = False
    runner.steps(lambda: open_update(record) is None)
    assert record.serve_manifest().body.version == 2


@only_file
def test_a_damaged_update_changes_nothing(record: Record, runner: Runner) -> None:
    record.store.put(record.key(UPDATE_KEY), b"{")
    with pytest.raises(DamagedFilesError, match=r"update.json of svc is damaged"):
        runner.step()
    assert runner.fleet == {"v1": (1.0, 1)}


@only_file
def test_adapters_reach_the_program_with_the_versions(record: Record, runner: Runner) -> None:
    adapter = FleetAdapter(name="polite", digest="0" * 64, path="/adapters/polite")

    class Adapters:
        missing = (AdapterState(name="rude", digest="1" * 64, state="failed", reason="no such file"),)
        away = False
        downloads = threading.Event()
        brought = 0

        def look(self) -> tuple[FleetAdapter, ...]:
            if self.away:
                raise StoreUnreachableError("the store is away")
            return () if self.brought else (adapter,)

        def bring(self) -> None:
            self.brought += 1
            assert self.downloads.wait(10)

    staged = runner.rollout._adapters = Adapters()
    runner.step()
    assert Fleet.read(runner.work / FLEET_FILE).adapters == (adapter,)
    assert record.status().details["adapters"][-1]["reason"] == "no such file"
    # It is removed while the other one is brought.
    runner.steps(lambda: Fleet.read(runner.work / FLEET_FILE).adapters == ())
    assert staged.brought == 1
    staged.away = True
    with pytest.raises(StoreUnreachableError):
        runner.step()
    assert Fleet.read(runner.work / FLEET_FILE).adapters == ()
    staged.downloads.set()


# ── the record ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_of_updates_asked_for_at_once_one_is_open(record: Record) -> None:
    ready, won, lost = threading.Barrier(6), [], []

    def run(number: int) -> None:
        ready.wait()
        try:
            won.append(asked(record, f"job-{number}"))
        except ConfigurationError as error:
            lost.append(str(error))

    for _ in range(2):  # the first is created, the second replaces one that has ended
        threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 5)
        assert "in progress: `palate promote svc`" in lost[0]
        update = open_update(record)
        assert update is not None
        assert update.id == won[0]
        assert change_update(record, update.id, ended=True) is not None
        assert change_update(record, update.id, share=0.5) is None, "an ended update does not change"
        won.clear()
        lost.clear()
    assert numbers(record) == list(range(2, 14)), "each has a number of its own"


@only_file
def test_the_history_is_limited_and_keeps_the_current_version(record: Record) -> None:
    body = record.serve_manifest().body
    for _ in range(KEPT_VERSIONS + 3):
        reserve(record, body, {})
    assert numbers(record) == list(range(5, KEPT_VERSIONS + 5))


# ── the client ──────────────────────────────────────────────────────────────────────────────────────────────────────


@only_file
def test_a_service_is_updated_and_returns(
    service: Predictor, runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(runner, monkeypatch):
        assert service.update_service(job("two")) is service
        assert service.labels == {"job": "two"}
        assert "service svc serves job two, as v2" in capsys.readouterr().err
        assert states(service) in ([("v1", "draining"), ("v2", "current")], [("v1", "replaced"), ("v2", "current")])
        service.update_service(job("two"))
        assert "already serves job two" in capsys.readouterr().err
        service.rollback()
        assert (service.labels, service.manifest.body.tuned_uri) == ({"job": "one"}, "file:///jobs/one/model")
        service.rollback()
        assert service.labels == {"job": "two"}
        service.switch_version(1)
        assert service.labels == {"job": "one"}
        with pytest.raises(ConfigurationError, match=r"no version 9. It has: v1, v2, v3, v4, v5"):
            service.switch_version(9)
    assert [(one.name, one.job) for one in service.versions()] == [
        (f"v{number}", name) for number, name in enumerate(["one", "two", "one", "two", "one"], 1)
    ]


@only_file
def test_a_canary_gets_traffic_and_is_promoted_or_stopped(
    service: Predictor, runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(runner, monkeypatch):
        for call in (service.promote, lambda: service.set_traffic({"v1": 1.0})):
            with pytest.raises(ConfigurationError, match="no second version"):
                call()
        with pytest.raises(ConfigurationError, match="no earlier version"):
            service.rollback()
        with pytest.raises(ConfigurationError, match=r"traffic=2 is out of range"):
            service.update_service(job("two"), traffic=2)
        service.update_service(job("two"), traffic=0.1)
        assert "v2 answers 10% of the requests" in capsys.readouterr().err
        assert [(one.state, one.share) for one in service.versions()] == [("current", 0.9), ("ready", 0.1)]
        with pytest.raises(ConfigurationError, match="update to v2 in progress"):
            service.update_service(job("three"))
        service.set_traffic({"v1": 0.7, "v2": 0.3})
        assert runner.fleet == {"v1": (0.7, 1), "v2": (0.3, 1)}
        service.set_traffic({"v1": 0.5})
        assert runner.fleet["v2"] == (0.5, 1)
        for shares in ({"v1": 0.5, "v2": 0.6}, {"v3": 0.5}, {"v2": 1.5}, {}):
            with pytest.raises(ConfigurationError):
                service.set_traffic(shares)
        service.rollback()
        assert (service.labels, states(service)[-1]) == ({"job": "one"}, ("v2", "cancelled"))
        service.update_service(job("two"), traffic=0.2)
        service.promote()
        assert service.labels == {"job": "two"}
        assert service.manifest.body.version == 3


@only_file
@pytest.mark.parametrize(("reason", "hint"), [("out of memory", True), ("a wrong file", False)])
def test_a_failed_update_raises_with_the_reason(
    record: Record, service: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, hint: bool
) -> None:
    runner = Runner(record, tmp_path / "work", fails={"v2": VersionState(name="v2", state="failed", reason=reason)})
    with (
        running(runner, monkeypatch),
        pytest.raises(ServiceError, match=r"could not be updated to job two.*previous model") as caught,
    ):
        service.update_service(job("two"))
    assert reason in caught.value.reason
    assert ("zero_downtime=False" in caught.value.reason) is hint
    assert (service.labels, states(service)) == ({"job": "one"}, [("v1", "current"), ("v2", "failed")])


@only_file
def test_ctrl_c_withdraws_the_update(
    record: Record, service: Predictor, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.staging.clear()
    with running(runner, monkeypatch):

        def press() -> None:
            while not runner.said:
                time.sleep(0.01)
            while not (update := last_update(record)) or not update.cancelled:  # Python drops one within a finalizer
                interrupt_main()
                time.sleep(1.5)

        # A shell starts what it runs in the background with SIGINT ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=press, daemon=True).start()
        try:
            with pytest.raises(KeyboardInterrupt) as caught:
                service.update_service(job("two"))
        finally:
            signal.signal(signal.SIGINT, before)
        runner.staging.set()
    assert caught.value.__notes__ == ["service svc keeps its previous model"]
    assert states(service) == [("v1", "current"), ("v2", "cancelled")]


@only_file
def test_a_runner_that_does_not_follow_is_told(
    record: Record, service: Predictor, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(palate.rollout, "FOLLOWED_S", 0.0)
    monkeypatch.setattr(palate.rollout, "_TAKEN_S", 0.2)
    monkeypatch.setattr(palate.rollout, "_WITHDRAWN_S", 0.1)
    with pytest.raises(ServiceError, match=r"has not taken it up within 0.2 s.*zero_downtime=False"):
        service.update_service(job("two"))
    runner.steps(lambda: open_update(record) is None)
    assert states(service)[-1] == ("v2", "cancelled"), "it was withdrawn: a runner that comes back must not begin it"
    record.add_details(1, {"versions": []})  # an earlier version of Palate tells nothing
    for call in (lambda: service.update_service(job("two")), lambda: service.scale(2)):
        with pytest.raises(ServiceError, match="cannot be changed while it runs"):
            call()
    assert numbers(record) == [2]


def body(record: Record) -> dict[str, Any]:
    """Returns the deployment in the service's manifest, as a reader of the JSON sees it."""
    return dict(json.loads(record.serve_manifest().encode())["body"])


@only_file
def test_a_service_is_scaled(
    record: Record, service: Predictor, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(runner, monkeypatch):
        service.scale(4)
        assert [(one.name, one.instances) for one in service.versions()] == [("v1", 4)]
        for wrong in (0, 65, True, 1.5):
            with pytest.raises(ConfigurationError, match="expected a whole number from 1 to 64"):
                service.scale(wrong)  # type: ignore[arg-type]
        service.autoscale(5, min_instances=2, target_requests=8)
        wanted = {"instances": 2, "autoscaling": {"max_instances": 5, "target_requests": 8.0}}
        assert {name: body(record).get(name) for name in wanted} == wanted
        for settings, says in (
            ({"max_instances": 1, "min_instances": 2}, "max_instances=1 is below the least number of instances, 2"),
            ({"max_instances": 65}, "expected a whole number from 1 to 64"),
            ({"max_instances": 2, "min_instances": 0}, "min_instances=0 is out of range"),
            ({"max_instances": 2, "target_requests": 0}, "target_requests=0 is invalid"),
            ({"max_instances": 2, "target_requests": "8"}, "target_requests='8' is invalid"),
            ({"max_instances": 2, "downscale_delay_s": -1}, "downscale_delay_s=-1 is invalid"),
        ):
            with pytest.raises(ConfigurationError, match=says):
                service.autoscale(**settings)  # type: ignore[arg-type]

        def followed() -> bool:
            [version] = Fleet.read(runner.work / FLEET_FILE).versions
            return (version.instances, version.autoscaling) == (2, Autoscaling(max_instances=5, target_requests=8))

        until(followed, lambda: str(runner.fleet), timeout_s=20)
        service.update_service(job("two"))
        assert {name: body(record).get(name) for name in wanted} == wanted, "an update keeps them"
        service.scale(3)
        assert "autoscaling" not in body(record), "a fixed number ends it"
    record.advance("Stopped", expect={"Running"})
    service.scale(2)
    assert record.serve_manifest().body.instances == 2


@only_file
def test_an_update_of_a_service_that_ends_is_withdrawn(
    record: Record, service: Predictor, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new version may be what ended it, such as for lack of memory: a start must not repeat that."""
    runner.staging.clear()
    with running(runner, monkeypatch):

        def end() -> None:
            while not runner.said:
                time.sleep(0.01)
            record.advance("Failed", expect={"Running"}, reason="the machine ran out of memory")

        threading.Thread(target=end, daemon=True).start()
        with pytest.raises(ServiceError, match="ended during its update to job two: the machine ran out of memory"):
            service.update_service(job("two"))
        runner.staging.set()
    assert (open_update(record), record.serve_manifest().body.version) == (None, 1)


@only_file
def test_an_update_that_is_open_when_the_service_is_stopped_can_be_withdrawn(
    record: Record, service: Predictor, runner: Runner
) -> None:
    asked(record, share=0.1, promote=False)
    record.advance("Stopped", expect={"Running"})
    with pytest.raises(ConfigurationError, match="in progress"):
        service.update_service(job("three"))
    service.promote()
    update = last_update(record)
    assert update is not None
    assert update.promote
    service.rollback()
    assert (open_update(record), states(service)) == (None, [("v1", "current"), ("v2", "cancelled")])


@only_file
def test_a_stopped_service_is_started_with_the_new_model(
    record: Record, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("palate.predictor.STOP_GRACE_S", 0.1)  # nothing runs that could stop by itself
    session = Session(store=record.store.root, backend=NothingStarts())
    service = Predictor("svc", session=session)
    record.advance("Stopped", expect={"Creating"})
    with pytest.raises(ConfigurationError, match=r"traffic=0.5 cannot be shared.*not running"):
        service.update_service(job("two"), traffic=0.5)
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    source = WeightsSource(kind="folder", location=str(folder))
    service.update_service(job("two", model=BaseModel(name="m", source=source)), wait=False)
    assert (service.manifest.body.version, record.status().state) == (2, "Creating")
    assert [(one.number, one.outcome) for one in history(record)] == [(1, "replaced"), (2, "current")]
    record.advance("Running", expect={"Creating"})
    service.update_service(job("three", model=BaseModel(name="m", source=source)), zero_downtime=False, wait=False)
    assert (states(service)[-1], record.status().attempt) == (("v3", "current"), 3)


class Mounted(NothingStarts):
    """A container sees what it was started with, and these folders are it."""

    def __init__(self, *folders: Path) -> None:
        super().__init__()
        self.folders = [*folders]

    def of_run(self, uri: str) -> Mounted:
        return self

    def folders_seen(self, engine_id: str) -> list[Path] | None:
        assert engine_id == "elsewhere:1:2:x"
        return self.folders


@only_file
def test_an_update_to_a_folder_that_the_container_cannot_see_is_refused_with_the_remedy(
    record: Record, runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Mounted(tmp_path / "seen")
    service = Predictor("svc", session=Session(store=record.store.root, backend=backend))
    there, elsewhere = tmp_path / "seen" / "base", tmp_path / "elsewhere"
    for folder in (there, elsewhere):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    def of(folder: Path) -> HasModel:
        source = WeightsSource(kind="folder", location=str(folder))
        return job("two", model=BaseModel(name="m", source=source), tuned_uri=record.store.uri("jobs/two/model"))

    own = record.store.local_path("")
    assert own is not None
    backend.folders.append(own)
    before = record.manifest_bytes()
    with pytest.raises(ConfigurationError, match=r"started without .*/elsewhere.*palate update svc JOB --stop-start"):
        service.update_service(of(elsewhere))
    assert (record.manifest_bytes(), numbers(record), last_update(record)) == (before, [], None)
    with running(runner, monkeypatch):
        service.update_service(of(there))
    assert service.manifest.body.version == 2
    backend.folders = []
    with pytest.raises(ConfigurationError, match="started without"):
        service.update_service(of(elsewhere))
    monkeypatch.setattr("palate.predictor.STOP_GRACE_S", 0.1)  # nothing runs that could stop by itself
    service.update_service(of(elsewhere), zero_downtime=False, wait=False)
    assert service.manifest.body.model.source.location == str(elsewhere)


@only_file
def test_the_commands_show_and_change_versions(
    record: Record, runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PALATE_STORE", record.store.root)
    monkeypatch.setattr("palate.session._default", None)
    with running(runner, monkeypatch):
        asked(record, share=0.1, promote=False)
        while record.status().details["update"].get("state") != "ready":
            time.sleep(0.01)
        command_line.traffic("svc", ["v2=0.25"])
        assert capsys.readouterr().out == "v1\t75%\nv2\t25%\n"
        with pytest.raises(ConfigurationError, match="'much' of v2 is not a number"):
            command_line.traffic("svc", ["v2=much"])
        command_line.versions("svc", as_json=True)
        shown = json.loads(capsys.readouterr().out)
        assert [(one["name"], one["state"], one["share"], one["job"]) for one in shown] == [
            ("v1", "current", 0.75, "one"),
            ("v2", "ready", 0.25, "two"),
        ]
        command_line.promote("svc")
        command_line.scale("svc", "3")
        assert capsys.readouterr().out == "svc\t3\n"
        command_line.scale("svc", "3-4", downscale_delay=60)
        assert capsys.readouterr().out == "svc\t3-4\n"
        assert body(record)["autoscaling"] == {"max_instances": 4, "downscale_delay_s": 60.0}
        for wrong, says in (
            ("x", "is not a number of engines"),
            ("1-", "is not a number"),
            ("4-1", "max_instances=1 is below"),
        ):
            with pytest.raises(ConfigurationError, match=says):
                command_line.scale("svc", wrong)
        with pytest.raises(ConfigurationError, match="--upscale-delay: only with two bounds"):
            command_line.scale("svc", "3", upscale_delay=1)
        command_line.rollback("svc")
        command_line.versions("svc")
        assert "current" in capsys.readouterr().out.splitlines()[-1]
    assert (record.serve_manifest().labels, record.serve_manifest().body.instances) == ({"job": "one"}, 3)
