"""The schemas of a run's records: they say what the code writes, no more and no less."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import pytest

from palate.runs.lease import LEASE_SCHEMA, Lease
from palate_recipes.specs.run import MANIFEST_SCHEMA, STATUS_SCHEMA, Manifest, Status
from tests.support.schemas import validator


@pytest.mark.parametrize(
    ("name", "kind", "version"),
    [("manifest", Manifest, MANIFEST_SCHEMA), ("status", Status, STATUS_SCHEMA), ("lease", Lease, LEASE_SCHEMA)],
)
def test_a_schema_names_every_field_and_the_version(name: str, kind: type, version: int) -> None:
    properties = validator(name).schema["properties"]
    assert set(properties) == {item.name for item in fields(kind)}
    assert properties["schema"] == {"const": version}


def test_a_status_that_contradicts_itself_is_refused() -> None:
    def ok(**changes: object) -> bool:
        status = Status(state="Failed", finished_at=1.0, updated_at=1.0)
        return bool(validator("status").is_valid(json.loads(json.dumps({**asdict(status), **changes}))))

    assert ok()
    assert ok(from_the_future=1)
    assert not ok(state="Done")
    assert not ok(finished_at=None)
    assert not ok(state="Running")
    assert not ok(attempt=0)
    assert not ok(schema=2)


def test_a_manifest_needs_what_its_kind_needs() -> None:
    values = asdict(Manifest(kind="train", name="one", backend="process", body={}))
    assert not validator("manifest").is_valid(values)
    source = {"kind": "folder", "location": "/m"}
    body = {
        "model": {"name": "m", "source": source},
        "method": "LoRA_LLM",
        "hyperparameters": {},
        "precision": "float32",
        "inputs": {"train": {"uri": "file:///x", "sha256": "0" * 64}},
    }
    assert validator("manifest").is_valid({**values, "body": body})
    assert not validator("manifest").is_valid({**values, "body": {**body, "max_attempts": 0}})
    assert not validator("manifest").is_valid({**values, "kind": "serve", "body": {"model": body["model"]}})
