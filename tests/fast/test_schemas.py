"""The schemas of a run's records: they are those of the types, and refuse a record that contradicts itself."""

from __future__ import annotations

import json
from importlib import resources

from msgspec.structs import replace

from palate.runs.lease import lease_here
from palate_recipes.specs.codec import encode
from palate_recipes.specs.run import Attempt, Status
from palate_recipes.specs.schemas import as_text, schemas
from tests.support.manifests import serve_manifest, train_manifest
from tests.support.schemas import validator

REMEDY = "python -m palate_recipes.specs.schemas client/palate/schemas"


def test_the_schemas_are_those_of_the_types() -> None:
    kept = resources.files("palate").joinpath("schemas")
    assert {file.name: file.read_text(encoding="utf-8") for file in kept.iterdir() if file.name.endswith(".json")} == {
        name: as_text(schema) for name, schema in schemas().items()
    }, f"they are out of date: {REMEDY}"


def test_what_is_written_is_valid() -> None:
    status = Status(state="Failed", finished_at=1.0, updated_at=1.0, attempts=(Attempt(attempt=1, more={"new": 1}),))
    for name, data in (
        ("manifest", train_manifest(inputs={}, max_attempts=3).encode()),
        ("manifest", serve_manifest(options={"port": 1}, more={"new": 1}).encode()),
        ("status", status.encode()),
        ("lease", encode(lease_here(holder="h", start_id="s", attempt=1))),
    ):
        assert [*validator(name).iter_errors(json.loads(data))] == []


def test_a_status_that_contradicts_itself_is_refused() -> None:
    def ok(**changes: object) -> bool:
        status = Status(state="Failed", finished_at=1.0, updated_at=1.0)
        return bool(validator("status").is_valid({**json.loads(status.encode()), **changes}))

    assert ok()
    assert ok(from_the_future=1)
    assert not ok(state="Done")
    assert not ok(finished_at=None)
    assert not ok(state="Running")
    assert not ok(attempt=0)
    assert not ok(schema=2)


def test_a_manifest_needs_what_its_kind_needs() -> None:
    manifest = train_manifest()
    values = json.loads(manifest.encode())
    assert not validator("manifest").is_valid({**values, "body": {}})
    assert not validator("manifest").is_valid({**values, "kind": "other"})
    assert not validator("manifest").is_valid(
        json.loads(replace(manifest, body=replace(manifest.body, max_attempts=0)).encode())
    )
    assert not validator("manifest").is_valid({**json.loads(serve_manifest().encode()), "body": {"options": {}}})
