"""Generates the JSON schemas of a run's records: `python -m palate_recipes.specs.schemas FOLDER` writes them.

They are made from the types. This module adds one rule that no type expresses: an ended run has the time of its end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from palate_recipes.specs.access import ACCESS_SCHEMA, Access
from palate_recipes.specs.adapters import ADAPTERS_SCHEMA, Adapters
from palate_recipes.specs.rollout import UPDATE_SCHEMA, VERSION_SCHEMA, Update, Version
from palate_recipes.specs.run import (
    LEASE_SCHEMA,
    MANIFEST_SCHEMA,
    RENEWAL_SCHEMA,
    STATUS_SCHEMA,
    TERMINAL,
    Lease,
    Manifest,
    Renewal,
    Status,
)

_ENDED = {
    "if": {"properties": {"state": {"enum": sorted(TERMINAL)}}},
    "then": {"properties": {"finished_at": {"type": "number"}}, "required": ["finished_at"]},
    "else": {"properties": {"finished_at": {"type": "null"}}},
}


def schemas() -> dict[str, dict[str, Any]]:
    """Returns the schemas by file name."""
    status = _schema(Status, "status.json", STATUS_SCHEMA)
    status["$defs"]["Status"] |= _ENDED
    return {
        f"manifest-{MANIFEST_SCHEMA}.json": _schema(Manifest, "manifest.json", MANIFEST_SCHEMA),
        f"status-{STATUS_SCHEMA}.json": status,
        f"lease-{LEASE_SCHEMA}.json": _schema(Lease, "lease.json", LEASE_SCHEMA),
        f"renewal-{RENEWAL_SCHEMA}.json": _schema(Renewal, "renewal.json", RENEWAL_SCHEMA),
        f"access_tokens-{ACCESS_SCHEMA}.json": _schema(Access, "access_tokens.json", ACCESS_SCHEMA),
        f"adapters-{ADAPTERS_SCHEMA}.json": _schema(Adapters, "adapters.json", ADAPTERS_SCHEMA),
        f"update-{UPDATE_SCHEMA}.json": _schema(Update, "update.json", UPDATE_SCHEMA),
        f"version-{VERSION_SCHEMA}.json": _schema(Version, "versions/<number>.json", VERSION_SCHEMA),
    }


def _schema(kind: Any, title: str, version: int) -> dict[str, Any]:
    made = msgspec.json.schema(kind)
    for definition in made["$defs"].values():
        if "description" in definition:
            definition["description"] = definition["description"].split("\n\n")[0].replace("\n", " ")
        properties = definition.get("properties", {})
        properties.pop("more", None)  # stands for unknown fields, not for a field of this name
        if "schema" in properties:
            properties["schema"] = {"const": version}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **made}


def as_text(schema: dict[str, Any]) -> str:
    """Returns the content of a schema file."""
    return json.dumps(schema, indent=1) + "\n"


if __name__ == "__main__":
    for name, schema in schemas().items():
        Path(sys.argv[1], name).write_text(as_text(schema), encoding="utf-8")
