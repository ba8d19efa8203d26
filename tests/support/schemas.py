"""Holds records of a store against the schemas that the package ships. Knows jsonschema and a store."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

import jsonschema

from palate.store import Store
from palate_recipes.specs.run import KINDS

NAMES = ("manifest", "status", "lease", "access_tokens", "renewal", "adapters", "update")


@cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    """The validator of a record file's current schema."""
    text = resources.files("palate").joinpath("schemas", f"{name}-1.json").read_text(encoding="utf-8")
    schema = json.loads(text)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def check_records(store: Store) -> int:
    """Fails for the first record of a store that breaks its schema; returns how many were looked at."""
    looked = 0
    for kind in KINDS:
        for run in store.list_children(f"{kind}/"):
            for name in NAMES:
                key = f"{kind}/{run}/{name}.json"
                if store.stat(key) is not None:
                    errors = [*validator(name).iter_errors(json.loads(store.get(key)))]
                    assert not errors, f"{key}: {errors[0].message} at {errors[0].json_path}"
                    looked += 1
            for info in store.list(f"{kind}/{run}/versions"):
                errors = [*validator("version").iter_errors(json.loads(store.get(info.key)))]
                assert not errors, f"{info.key}: {errors[0].message} at {errors[0].json_path}"
                looked += 1
    return looked
