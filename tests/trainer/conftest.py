"""What every test of the training program needs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.architectures import random_model
from tests.trainer.support import QUICK


@pytest.fixture(autouse=True)
def keep_process() -> Iterator[None]:
    """The program takes SIGTERM for itself and makes its libraries offline by variables; the tests after it want both back."""
    before, environment = signal.getsignal(signal.SIGTERM), dict(os.environ)
    yield
    signal.signal(signal.SIGTERM, before)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def precision(precision: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """That of every run in the test that names no other."""
    monkeypatch.setitem(QUICK, "precision", precision)
    return precision


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama of 500 tokens: trains in a second, in emulated bfloat16 too."""
    return random_model("llama", tmp_path_factory.mktemp("small") / "model")
