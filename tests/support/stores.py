"""An empty store of each kind, for tests that run over several. Knows the fixtures that give the S3 server, no test."""

from __future__ import annotations

from pathlib import Path

import pytest

from palate.store import Store, StoreOptions, open_store


def empty_store(scheme: str, request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Returns a store that holds nothing.

    Args:
        scheme: `file`; or `s3` or `oss`, over the one S3 server: only then is it started.
        request: Of the test.
        tmp_path: Its folder; its name is the prefix in the bucket.
    """
    if scheme == "file":
        return open_store(tmp_path / "store")
    options: StoreOptions = request.getfixturevalue("s3_options")
    bucket: str = request.getfixturevalue("bucket")
    return open_store(f"{scheme}://{bucket}/{tmp_path.name}", options=options)
