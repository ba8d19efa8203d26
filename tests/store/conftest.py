"""One fixture that opens each kind of store, and nothing of this machine in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from palate.store import Store
from tests.support.stores import empty_store


@pytest.fixture(autouse=True)
def _no_ambient_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the machine has in its environment and its AWS files must decide nothing here."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "OSS_", "PALATE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(params=["file", "s3", "oss"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind. `oss` is its own code path over the same server (no real OSS is reachable)."""
    return empty_store(request.param, request, tmp_path)
