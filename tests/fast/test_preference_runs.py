"""Which evaluations of held-out pairs in a store count as the one that is asked for. Their names can be computed by anybody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from palate import Session, TrainingJob
from palate.backends import Launch
from palate.backends.process import ProcessBackend
from palate.errors import NameTakenError
from palate.evaluation.preferences import PreferenceRun, start_preference_scores
from palate.paths import forget_start, remember_start
from palate.runs.record import Record
from palate_recipes.specs.run import EvaluateManifest, State
from palate_recipes.specs.train import InputFile
from tests.support.evaluations import job_of
from tests.support.rows import preference_rows

PAIRS = preference_rows(3)


class Broken(ProcessBackend):
    """The process backend on a machine where no process can be started."""

    uses_this_python = False

    def of_run(self, uri: str) -> ProcessBackend:
        return Broken(uri)

    def start(self, launch: Launch) -> str:
        raise OSError("no process can be started")


@pytest.fixture
def job(home: Path, tmp_path: Path) -> TrainingJob:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    return job_of(Session(backend=Broken()), "one", tmp_path / "base", tmp_path / "adapter", training_strategy="dpo")


@pytest.fixture
def own(job: TrainingJob) -> Record:
    """The evaluation that the question makes. It has failed, since it could not be started."""
    with pytest.raises(OSError, match="no process"):
        start_preference_scores(job, PAIRS, announce=False)
    store = job._run.session.store
    (name,) = store.list_children("evaluations/")
    return Record(store, "evaluations", name.strip("/").rpartition("/")[2])


def rewrite(record: Record, manifest: EvaluateManifest, state: State) -> None:
    """Puts an evaluation in the place of another, as another writer of the store could."""
    record.store.delete(record.key("manifest.json"))
    record.create(manifest)
    assert record.advance(state, expect={"Creating"})


def test_only_a_run_that_was_started_here_is_started_again(job: TrainingJob, own: Record) -> None:
    with pytest.raises(OSError, match="no process"):
        start_preference_scores(job, PAIRS, announce=False)
    assert own.status().attempt == 2
    forget_start(own.uri)
    with pytest.raises(
        NameTakenError, match=rf"was not started by you .* \(`palate delete {own.name}`\), and ask again"
    ):
        start_preference_scores(job, PAIRS, announce=False)
    assert (own.status().attempt, own.status().state) == (2, "Failed")


@pytest.mark.parametrize("state", ["Succeeded", "Failed", "Running"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tuned_uri": "s3://evil/model"}, "tuned_uri is 's3://evil/model' instead of"),
        ({"tuned_digest": "0" * 64}, "tuned_digest is '0000"),
        ({"base_revision": "\x1b[2J"}, r"base_revision is '\\x1b\[2J' instead of ''"),
        ({"seen_rows": (), "seen_prompts": 0}, "seen_prompts is 0 instead of 1"),
        ({"data": InputFile(uri="file:///etc/passwd", sha256="0" * 64)}, "its pairs are others"),
        ({}, "backend is 'container' instead of 'process'"),
    ],
)
def test_another_evaluation_under_the_name_is_refused(
    job: TrainingJob, own: Record, changed: dict[str, Any], state: State, message: str
) -> None:
    manifest = own.evaluate_manifest()
    forged = replace(manifest, body=replace(manifest.body, **changed), backend="process" if changed else "container")
    rewrite(own, forged, state)
    remember_start(own.uri, own.manifest_bytes())
    with pytest.raises(NameTakenError, match=message):
        start_preference_scores(job, PAIRS, announce=False)
    assert (own.status().state, own.status().attempt) == (state, 1)


def test_the_same_pairs_in_another_file_find_the_run(job: TrainingJob, own: Record, tmp_path: Path) -> None:
    rewrite(own, own.evaluate_manifest(), "Succeeded")
    other = tmp_path / "pairs.json"
    other.write_text(json.dumps(PAIRS, indent=2))
    found = start_preference_scores(job, other, announce=False)
    assert isinstance(found, PreferenceRun)
    assert (found.name, found.status) == (own.name, "Succeeded")
    data = own.evaluate_manifest().body.data
    key = own.key("inputs", "held-out", data.uri.rpartition("/")[2])
    own.store.put(key, own.store.get(key).replace(b"even", b"odd"))  # not what its digest says
    with pytest.raises(NameTakenError, match="its pairs are others"):
        start_preference_scores(job, other, announce=False)
