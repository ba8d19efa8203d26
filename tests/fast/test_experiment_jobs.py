"""Which jobs of a store an experiment takes for its own: their ids can be computed, so another writer may have been first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from palate import ExperimentFile, Session
from palate.errors import ConfigurationError, NameTakenError
from palate.experiments.execute import Planned, planned_runs, prepared
from palate.paths import remember_start
from palate.runs.record import Record
from palate_recipes.specs.run import State, TrainManifest
from palate_recipes.specs.train import InputFile
from palate_recipes.specs.weights import WeightsSource
from tests.support.rows import preference_rows

FILE = """
e:
  model_name: own
  model_uri: MODEL
  inputs: {train: prefs.json, validation: held-out.json}
  environments: [A_VALUE]
  hyperparameters: {training_strategy: dpo, max_steps: 2, learning_rate: 1e-3}
search:
  model_name: own
  model_uri: MODEL
  inputs: {train: prefs.json}
  search: random
  trials: 1
  hyperparameters: {training_strategy: dpo, max_steps: 2, learning_rate: {min: 1e-5, max: 1e-3, log: true}}
"""


@pytest.fixture
def file(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("A_VALUE", "a")
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    (tmp_path / "prefs.json").write_text(json.dumps(preference_rows()))
    (tmp_path / "held-out.json").write_text(json.dumps(preference_rows(4)))
    path = tmp_path / "experiments.yml"
    path.write_text(FILE.replace("MODEL", str(folder)))
    return path


def plan(file: Path, name: str = "e") -> Planned:
    with prepared(ExperimentFile.load(file, name)) as plans:
        (found,) = planned_runs(plans)
    return found


def own_manifest(file: Path, name: str = "e") -> TrainManifest:
    """Returns the manifest that the experiment's job would have."""
    with prepared(ExperimentFile.load(file, name)) as plans:
        (found,) = planned_runs(plans)
        body = plans._body(found.recipe)
        return TrainManifest(name=found.name, backend="process", body=body, labels=dict(found.recipe.labels or {}))


def put(session: Session, manifest: TrainManifest, state: State) -> Record:
    """Writes a job as another user's client and runner would."""
    record = Record(session.store, "jobs", manifest.name)
    record.create(manifest)
    assert record.advance(state, expect={"Creating"})
    return record


def test_a_job_with_the_same_settings_and_data_is_reused(session: Session, file: Path) -> None:
    own = own_manifest(file)
    inputs = {channel: replace(one, uri="s3://elsewhere/prefs") for channel, one in own.body.inputs.items()}
    body = replace(own.body, inputs=inputs, notes=("12 GiB are free",), max_run_time_s=60, max_attempts=2)
    put(session, replace(own, body=body), "Succeeded")
    found = plan(file)
    assert (found.state, found.is_reused) == ("Succeeded", True)


def test_variables_of_a_tracker_do_not_make_another_job(
    session: Session, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(file.read_text().replace("learning_rate: 1e-3}", "learning_rate: 1e-3, report_to: mlflow}"))
    put(session, own_manifest(file), "Succeeded")
    monkeypatch.setenv("MLFLOW_RUN_ID", "1")
    assert plan(file).is_reused


def hostile(kind: str, own: TrainManifest) -> TrainManifest:
    body = own.body
    changed: dict[str, dict[str, Any]] = {
        "model": {"model": replace(body.model, source=WeightsSource(kind="store", location="s3://evil/model"))},
        "secret": {"environment_names": ("A_VALUE", "GITHUB_TOKEN")},
        "data": {"inputs": {**body.inputs, "train": InputFile(uri="s3://evil/prefs", sha256="0" * 64)}},
        "adapter": {"inputs": {**body.inputs, "adapter": InputFile(uri="s3://evil/adapter")}},
        "placement": {"placement": {"image": "evil"}},
        "hyperparameter": {"hyperparameters": replace(body.hyperparameters, system_prompt="\x1b[2J")},
        "method": {"method": "Standard_LLM"},
        "backend": {},
    }
    manifest = replace(own, body=replace(body, **changed[kind]))
    return replace(manifest, backend="container") if kind == "backend" else manifest


@pytest.mark.parametrize("state", ["Succeeded", "Failed", "Running"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("model", r"model\.source\.kind is 'store' instead of 'folder', model\.source\.location is 's3://evil/model'"),
        ("secret", r"environment_names is \['A_VALUE', 'GITHUB_TOKEN'\] instead of \['A_VALUE'\]"),
        ("data", r"inputs\.train\.sha256 is '0000"),
        ("adapter", r"inputs\.adapter is \{.*\} instead of absent"),
        ("placement", r"placement\.image is 'evil' instead of absent"),
        ("hyperparameter", r"hyperparameters\.system_prompt is '\\x1b\[2J' instead of"),
        ("method", "method is 'Standard_LLM' instead of 'LoRA_LLM'"),
        ("backend", "backend is 'container' instead of 'process'"),
    ],
)
def test_another_job_under_the_id_is_refused(
    session: Session, file: Path, kind: str, state: State, message: str
) -> None:
    record = put(session, hostile(kind, own_manifest(file)), state)
    remember_start(record.uri, record.manifest_bytes())
    with pytest.raises(NameTakenError, match=message) as refused:
        ExperimentFile.load(file, "e").run(show=False)
    assert f"give the experiment another id, or delete the job (`palate delete {record.name}`)" in str(refused.value)
    status = record.status()
    assert (status.state, status.attempt, status.engine_id) == (state, 1, "")


@pytest.mark.parametrize("state", ["Failed", "Stopped"])
def test_only_a_job_that_was_started_here_is_resumed(session: Session, file: Path, state: State) -> None:
    record = put(session, own_manifest(file), state)
    with pytest.raises(
        NameTakenError, match=rf"is {state} and was not started by you .* `palate resume {record.name}`"
    ):
        ExperimentFile.load(file, "e").run(show=False)
    assert record.status().attempt == 1
    remember_start(record.uri, record.manifest_bytes())
    assert plan(file).state == state


def test_a_trial_in_the_store_must_have_values_of_the_search(session: Session, file: Path) -> None:
    pytest.importorskip("optuna")
    own = own_manifest(file, "search")
    for evil in ('{"learning_rate": 0.5}', '{"learning_rate": "x"}', "{}", "[]", "", "[" * 100_000):
        record = put(session, replace(own, labels={**own.labels, "values": evil}), "Succeeded")
        with pytest.raises(ConfigurationError, match="not values of this search"):
            plan(file, "search")
        record.delete()
    hyperparameters = replace(own.body.hyperparameters, learning_rate=0.5)
    record = put(session, replace(own, body=replace(own.body, hyperparameters=hyperparameters)), "Succeeded")
    with pytest.raises(NameTakenError, match="learning_rate"):
        plan(file, "search")
    record.delete()
    record = put(session, replace(own, body=replace(own.body, environment_names=("GITHUB_TOKEN",))), "Succeeded")
    with pytest.raises(NameTakenError, match="GITHUB_TOKEN"):
        plan(file, "search")
    record.delete()
    put(session, own, "Succeeded")
    assert plan(file, "search").is_reused
