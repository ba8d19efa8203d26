"""Every backend that can be had here, and every store: the same tests over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import palate.session
from tests.backends.hands import ContainerHands, Hands, ProcessHands
from tests.slow.conftest import store_session as store_session
from tests.slow.conftest import until
from tests.support.engine import Engine
from tests.support.images import engine as engine
from tests.support.images import server as server
from tests.support.images import trainer as trainer

BACKENDS = ["process", pytest.param("docker", marks=pytest.mark.container)]


@pytest.fixture(params=BACKENDS, autouse=True)
def hands(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hands]:
    """A backend is what runs go to, and its hands; afterwards nothing of them is there."""
    found: Hands = ProcessHands(home)
    if request.param != "process":
        its_engine: Engine = request.getfixturevalue("engine")
        request.getfixturevalue("trainer")
        for name, value in its_engine.settings().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PALATE_BACKEND", "container")
        monkeypatch.setattr(palate.session, "_default", None)
        found = ContainerHands(its_engine, home)
    yield found
    until(lambda: found.left() == [], timeout_s=30)  # a runner says that it is over, then ends
