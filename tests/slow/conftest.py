"""Jobs and services over every store, with real programs and a model small enough to train in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import palate.session
from palate import Session, setup_default_session
from tests.support.schemas import check_records
from tests.support.seaweed import SeaweedServer


@pytest.fixture(params=["file", "s3"])
def store_session(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    """The default session, over a file store and over a real S3 server; other processes find it in the environment."""
    if request.param == "file":
        yield palate.session.get_default_session()
        return
    server: SeaweedServer = request.getfixturevalue("seaweed")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    uri = f"s3://{request.getfixturevalue('bucket')}/{request.node.name.replace('[', '-').strip(']')}"
    monkeypatch.setenv("PALATE_STORE", uri)
    session = setup_default_session()
    yield session
    check_records(session.store)


def until(condition: Callable[[], bool], *, timeout_s: float = 90.0) -> None:
    """Waits for a condition, as the one who would see it does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.1)


def processes_of(home: Path) -> list[str]:
    """Returns the command lines of all processes that belong to a test's home."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("PALATE_HOME") == str(home):
                found.append(" ".join(process.cmdline())[:200])
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
