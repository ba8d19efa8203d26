"""What every test of the training program needs."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.architectures import random_model
from tests.trainer.support import QUICK


@pytest.fixture(autouse=True)
def keep_signals() -> Iterator[None]:
    """The program takes SIGTERM for itself; the test process wants it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def precision(precision: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """That of every run in the test that names no other."""
    monkeypatch.setitem(QUICK, "precision", precision)
    return precision


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama of 500 tokens: trains in a second, in emulated bfloat16 too."""
    return random_model("llama", tmp_path_factory.mktemp("small") / "model")
