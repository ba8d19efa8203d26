"""A finished job's model, from one real store to another and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from palate import Session, TrainingJob
from palate.checksums import DIGESTS_FILE
from palate.errors import DamagedFilesError, NameTakenError
from palate.runs.record import Record
from palate.store import Store, StoreOptions, open_store
from tests.support.manifests import train_manifest

FILES = {"adapter_config.json": b"{}", "deep/er/tokenizer.json": b"{}\n", "adapter_model.safetensors": b"\0w" * 4096}


def succeeded(session: Session) -> TrainingJob:
    record = Record(session.store, "jobs", "one")
    record.create(train_manifest(model="mine", hyperparameters={"training_strategy": "dpo"}))
    for name, data in FILES.items():
        session.store.put(record.key("model", name), data)
    record.advance("Succeeded", expect={"Creating"})
    return TrainingJob.get("one", session=session)


def test_from_any_store_to_any_and_back(
    store: Store, s3_options: StoreOptions, bucket: str, tmp_path: Path, home: Path
) -> None:
    session = Session(store=store.root, options=s3_options)
    job = succeeded(session)
    for target in (
        f"s3://{bucket}/saved-{tmp_path.name}/one",
        f"oss://{bucket}/saved-{tmp_path.name}/two",
        tmp_path / "here",
    ):
        uri = job.save_model(target)
        saved = open_store(uri, options=s3_options)
        assert {info.key for info in saved.list("")} == {*FILES, "README.md", DIGESTS_FILE}
        assert {name: saved.get(name) for name in FILES} == FILES
    with pytest.raises(NameTakenError):
        job.save_model(f"s3://{bucket}/saved-{tmp_path.name}/one")


def test_a_job_in_a_bucket_is_saved_with_the_targets_own_session(
    s3_options: StoreOptions, bucket: str, tmp_path: Path, home: Path
) -> None:
    job = succeeded(Session(store=tmp_path / "store"))
    uri = f"s3://{bucket}/own-{tmp_path.name}"
    assert job.save_model(uri, session=Session(store=tmp_path / "store", options=s3_options)) == uri
    assert DIGESTS_FILE in {info.key for info in open_store(uri, options=s3_options).list("")}


def test_a_model_damaged_in_the_bucket_is_not_saved(
    s3_options: StoreOptions, bucket: str, tmp_path: Path, home: Path
) -> None:
    first = succeeded(Session(store=tmp_path / "store"))
    other = Session(store=f"s3://{bucket}/damaged-{tmp_path.name}", options=s3_options)
    job = succeeded(other)
    first.save_model(f"{other.store_uri}/jobs/one/model-copy", session=other)
    digests = other.store.get(f"jobs/one/model-copy/{DIGESTS_FILE}")
    other.store.put(f"jobs/one/model/{DIGESTS_FILE}", digests)
    with pytest.raises(DamagedFilesError, match=r"README\.md missing or changed"):
        job.save_model(tmp_path / "copy")
