"""A real engine and images really built; skipped, loudly, where there is no engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.engine import Engine
from tests.support.images import engine as engine
from tests.support.images import podman as podman
from tests.support.images import server as server
from tests.support.images import trainer as trainer


@pytest.fixture
def container(engine: Engine) -> Iterator[Callable[..., str]]:
    """Starts containers, by the engine's arguments, and takes them away after the test; returns their ids."""
    started: list[str] = []

    def start(*arguments: str) -> str:
        started.append(engine.run("run", "--detach", "--network=host", *arguments).stdout.split()[-1])
        return started[-1]

    yield start
    if started:
        engine.run("rm", "--force", "--volumes", *started)
