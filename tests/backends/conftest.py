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

BACKENDS = [
    "process",
    pytest.param("docker", marks=pytest.mark.container),
    pytest.param("podman", marks=pytest.mark.container),
]
EVERY = os.environ.get("PALATE_TEST_BACKENDS") == "all"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out, unless all are asked for, podman, to which gigabytes are copied, and a container's further stores."""
    left_out = pytest.mark.skip(
        reason="one of many combinations, minutes each; PALATE_TEST_BACKENDS=all runs every one"
    )
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("hands")  # type: ignore[attr-defined]
        if not EVERY and (backend == "podman" or (backend == "docker" and item.get_closest_marker("thorough"))):
            item.add_marker(left_out)


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
