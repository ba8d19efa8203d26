"""Updates from the client to the program: the record, the runner's part and the server program, over small engines and under load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from palate import Predictor, Session
from palate.deploy import ServedModel
from palate.errors import ServiceError
from palate.predictor import HasModel
from palate.runner.fleet import Rollout, Staged
from palate.runner.poll import RecordPoll
from palate.runner.retry import StoreRetry
from palate.runs.record import Record
from palate_recipes.specs.run import Deployment
from tests.support.manifests import serve_manifest
from tests.support.small_service import Load, SmallService, small

__all__ = ["small"]  # a fixture


def job(name: str) -> HasModel:
    class Job:
        id = name

        def served_model(self, checkpoint: str | int | None = None) -> ServedModel:
            uri = f"file:///jobs/{name}"
            return ServedModel(model=serve_manifest().body.model, tuned_uri=uri, adapter=True, labels={"job": name})

    return Job()


@pytest.mark.parametrize("base", [True, False], ids=["adapters", "full weights"])
def test_no_request_fails_over_updates_a_canary_a_failure_a_return_and_other_numbers_of_engines(
    base: bool, home: Path, small: Callable[..., SmallService], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("palate.runner.poll.POLL_S", 0.05)
    program = small(base=base)
    session = Session(store=f"file://{tmp_path}/store")
    record = Record(session.store, "services", "svc")
    record.create(serve_manifest(tuned_uri="file:///jobs/one", adapter=True))
    said: list[str] = []

    def stage(body: Deployment, folder: Path, retry: StoreRetry) -> Staged:
        name = str(body.tuned_uri).rpartition("/")[2]
        why = "not enough memory"
        model = program.folder(name, **({"refuses": why, "says": why} if name == "broken" else {}))
        return Staged(body=body, spec=program.version("v1", model).spec, folder=None)

    current = stage(record.serve_manifest().body, tmp_path, StoreRetry(said.append, lambda: False))
    rollout = Rollout(record, current, program.work, stage=stage, attempt=lambda: 1, say=said.append)
    rollout.begin()
    program.start()
    facts = rollout.facts()
    record.note(state="Running", endpoint=program.url, engine_id="elsewhere:1:2:x", details={"port": 1, **facts})
    rollout.announced(facts)
    service = Predictor("svc", session=session)
    with RecordPoll({"versions": rollout.update}, said.append):
        with Load(program) as load:
            service.update_service(job("two"))
            assert program.ask().folder == "two"
            with pytest.raises(ServiceError, match=r"(?s)previous model as before.*not enough memory") as caught:
                service.update_service(job("broken"))
            assert "zero_downtime=False" in caught.value.reason
            service.update_service(job("three"), traffic=0.5)
            assert {program.ask().folder for _ in range(40)} == {"two", "three"}
            service.set_traffic({"v4": 0.0})
            assert {program.ask().folder for _ in range(10)} == {"two"}
            service.promote()
            service.scale(3)
            assert len(program.engines()) >= 3
            service.rollback()
            assert program.ask().folder == "two"
            service.scale(1)
        assert load.failures == []
        assert load.folders() == {"one", "two", "three"}
        program.wait(lambda: len(program.engines()) == 1)
    told = record.status().details
    assert [(one["name"], one["state"], one["instances"]) for one in told["versions"]] == [("v5", "ready", 1)], said
    assert [(one.name, one.state, one.job) for one in service.versions()] == [
        ("v1", "replaced", ""),
        ("v2", "replaced", "two"),
        ("v3", "failed", "broken"),
        ("v4", "replaced", "three"),
        ("v5", "current", "two"),
    ]
    assert program.end() == 0
