"""Every backend that can be had here, and every store: the same tests over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import palate.session
from tests.backends.hands import ContainerHands, Hands, ProcessHands
from tests.slow.conftest import store_session as store_session
from tests.slow.conftest import until
from tests.support.engine import Engine
from tests.support.images import engine as engine
from tests.support.images import podman as podman
from tests.support.images import server as server
from tests.support.images import trainer as trainer
from tests.support.podman import copy_image

PODMAN = pytest.mark.skipif(
    os.environ.get("PALATE_TEST_PODMAN") != "1",
    reason="both images are copied to a podman of the tests' own, minutes for gigabytes; PALATE_TEST_PODMAN=1 does so",
)
BACKENDS = [
    "process",
    pytest.param("docker", marks=pytest.mark.container),
    pytest.param("podman", marks=[pytest.mark.container, PODMAN]),
]


@pytest.fixture(params=BACKENDS, autouse=True)
def hands(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hands]:
    """A backend is what runs go to, and its hands; afterwards nothing of them is there."""
    found: Hands = ProcessHands(home)
    if request.param != "process":
        its_engine = _engine_with_images(request)
        for name, value in its_engine.settings().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PALATE_BACKEND", "container")
        monkeypatch.setattr(palate.session, "_default", None)
        found = ContainerHands(its_engine, home)
    yield found
    until(lambda: found.left() == [], timeout_s=30)  # a runner says that it is over, then ends


def _engine_with_images(request: pytest.FixtureRequest) -> Engine:
    """Returns the engine that a parameter names, with the images that the module's tests need."""
    engine: Engine = request.getfixturevalue("engine")
    needed = ["trainer", "server"] if request.module.NEEDS_SERVER else ["trainer"]
    images = [request.getfixturevalue(program) for program in needed]
    if request.param == "docker":
        return engine
    podman: Engine = request.getfixturevalue("podman")
    for image in images:
        copy_image(engine, podman, image.name)
    return podman
