"""Records that the version before the typed ones wrote: listed, read whole, made ready to be resumed and to be served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from palate import Predictor, Session, TrainingJob
from palate.deploy import start_service
from palate.runner.checkpoints import stage_last_checkpoint
from palate.runs.handle import RunHandle
from palate.runs.list import RunFilter, find_runs
from palate.runs.record import Record
from palate_recipes.specs.codec import decode as decode_lease
from palate_recipes.specs.codec import encode
from palate_recipes.specs.run import Lease, ServeManifest, Status, TrainManifest
from tests.fast.test_deploy import NothingStarts
from tests.support.fixtures import records_v1
from tests.support.schemas import check_records

STATES = {"whole": "Succeeded", "resumed": "Succeeded", "failed": "Failed", "kto": "Succeeded", "sft": "Succeeded"}


@pytest.fixture(autouse=True)
def _store(home: Path) -> None:
    records_v1(home)


def palate(home: Path, *arguments: str) -> str:
    environment = {**os.environ, "PALATE_HOME": str(home)}
    command = [sys.executable, "-m", "palate.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_run_is_listed(session: Session) -> None:
    jobs = find_runs(session, "jobs", RunFilter()).require_all()
    assert {run.name: run.status.state for run in jobs if run.status} == STATES
    assert {run.manifest.model_name for run in jobs if run.manifest} == {"tiny"}
    assert [job.id for job in TrainingJob.list(labels={"team": "quality"})] == ["whole"]
    assert [job.id for job in TrainingJob.list(min_attempts=2)] == ["resumed"]
    (service,) = find_runs(session, "services", RunFilter()).require_all()
    assert service.status is not None
    assert (service.name, service.status.state, service.status.endpoint) == ("answers", "Stopped", "")
    assert check_records(session.store) == 3 * (len(STATES) + 1)


def test_they_are_written_again_as_they_are(session: Session) -> None:
    for kind, manifest in (("jobs", TrainManifest), ("services", ServeManifest)):
        for name in session.store.list_children(f"{kind}/"):
            for file, decode in (("manifest", manifest.decode), ("status", Status.decode)):
                data = session.store.get(f"{kind}/{name}/{file}.json")
                assert json.loads(decode(data).encode()) == json.loads(data)
            data = session.store.get(f"{kind}/{name}/lease.json")
            assert json.loads(encode(decode_lease(data, Lease))) == json.loads(data)


def test_the_commands_show_them(home: Path) -> None:
    rows = json.loads(palate(home, "jobs", "--json"))
    assert {row["id"]: (row["state"], row["strategy"]) for row in rows} == {
        name: (state, name if name in ("kto", "sft") else "dpo") for name, state in STATES.items()
    }
    assert {row["method"] for row in rows} == {"LoRA_LLM"}
    (row,) = json.loads(palate(home, "services", "--json"))
    assert (row["ServiceName"], row["Model"], row["Labels"]) == ("answers", "tiny", {"job": "whole"})
    assert row["ModelUri"].endswith("/store/jobs/whole/model")
    assert "saving the model" in palate(home, "logs", "whole")


@pytest.mark.parametrize("name", STATES)
def test_a_job_is_read_whole(session: Session, name: str) -> None:
    job = TrainingJob.attach(name)
    status, events = job.describe(), job.metrics()
    assert status.state == STATES[name]
    assert status.finished_at is not None
    assert status.details["model_revision"]
    assert status.details["versions"]["palate"] == "0.1.0"
    steps = [event["step"] for event in events if event["kind"] == "train"]
    assert steps == sorted(set(steps))
    assert any(line.startswith("palate: training tiny with LoRA_LLM in") for line in job.logs())
    if name == "failed":
        assert "SIGKILL" in status.reason
        assert status.log_tail
        return
    assert (events[0]["kind"], events[-1]["kind"]) == ("start", "end")
    assert job.reading().verdict
    job.require_model()
    if name == "resumed":
        assert (status.attempt, "SIGKILL" in status.attempts[0].reason) == (2, True)
        assert any("attempt 2, going on from" in line for line in job.logs())


def test_a_failed_job_is_made_ready_to_go_on(session: Session, home: Path, tmp_path: Path) -> None:
    record = Record(session.store, "jobs", "failed")
    said: list[str] = []
    folder = stage_last_checkpoint(record, tmp_path, said.append)
    assert said == []
    assert folder is not None
    assert (folder / "adapter_model.safetensors").is_file()
    assert (folder / "optimizer.pt").is_file()
    handle = RunHandle(record, session)
    assert handle.environments() == {}
    places = handle._folders(handle.manifest.body)
    assert places[home / "models" / "tiny"] is False
    assert places[home / "store"] is True
    begun = record.begin_again(expect={"Failed"}, attempt=1, more=1)
    assert begun is not None
    assert (record.status().state, record.status().attempt, record.status().last_attempt) == ("Creating", 2, 2)


def test_a_job_with_variables_wants_their_values_again(session: Session) -> None:
    handle = RunHandle(Record(session.store, "jobs", "whole"), session)
    assert handle.environments({"EXTRA_FLAG": "1"}) == {"EXTRA_FLAG": "1"}


def test_a_job_is_made_ready_to_be_served(session: Session) -> None:
    backend = NothingStarts()
    where = Session(store=session.store.root, backend=backend)
    served = TrainingJob.get("whole", session=where).served_model()
    start_service(where, service_name="again", served=served, wait=False)
    assert backend.started == 1
    old, new = (
        json.loads(session.store.get(f"services/{name}/manifest.json"))["body"] for name in ("answers", "again")
    )
    same = ("model", "tuned_uri", "tuned_digest", "adapter", "system_prompt")
    assert {name: old[name] for name in same} == {name: new[name] for name in same}


def test_a_service_takes_another_job(session: Session) -> None:
    predictor = Predictor("answers")
    before = predictor.manifest
    after = TrainingJob.get("resumed").served_model().instead_of(before, predictor._run)
    predictor._run.replace_manifest(before, after)
    found = json.loads(session.store.get("services/answers/manifest.json"))
    assert found["body"]["tuned_uri"].endswith("/store/jobs/resumed/model")
    assert found["body"]["options"]["engine"] == "transformers"
    assert found["labels"] == {"job": "resumed"}
