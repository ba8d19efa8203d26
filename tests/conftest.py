"""What every test may use: a home, a store and a session of its own, and a sweep that proves nothing stays behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import palate.session
from palate import Session


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PALATE_HOME of the test's own; no setting of the user's enters."""
    for name in list(os.environ):
        if name.startswith(("PALATE_", "AWS_ACCESS", "AWS_SECRET", "AWS_SESSION", "AWS_ENDPOINT", "AWS_REGION", "AWS_DEFAULT")):
            monkeypatch.delenv(name)
    folder = tmp_path / "home"
    monkeypatch.setenv("PALATE_HOME", str(folder))
    monkeypatch.setattr(palate.session, "_default", None)
    return folder


@pytest.fixture
def session(home: Path) -> Iterator[Session]:
    """The default session over a file store in the test's home."""
    yield palate.session.get_default_session()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says loudly what was skipped, and why."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.section("NOT TESTED HERE", sep="!")
        for report in skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            terminalreporter.line(f"{report.nodeid}: {reason}")
