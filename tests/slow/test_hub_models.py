"""Base models from a hub, and what a trained model says of its base: found on any machine, without this machine's folders."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from palate import ModelTrainingRecipe, RegisteredModel, Session, TrainingJob
from palate.checksums import DIGESTS_FILE
from palate.errors import ConfigurationError, StoreDeniedError, StoreError, UnknownModelError
from palate.sources.hub_model import HubModel, check_architecture, hub_model
from palate.weights import find_weights
from tests.support.hub import Hub, used_hub

pytestmark = pytest.mark.slow

pytest.importorskip("huggingface_hub")

TOKEN = "hf_a_secret_of_the_test"
QUICK = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 1,
    "training_strategy": "dpo",
    "precision": "float32",
}


@pytest.fixture
def hub(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with used_hub(TOKEN, tmp_path / "hub-cache", monkeypatch) as server:
        yield server


def train(prefs: Path, method: str = "LoRA_LLM", **model: Any) -> TrainingJob:
    recipe = ModelTrainingRecipe(**model, method=method, hyperparameters=QUICK)
    return recipe.train(inputs={"train": prefs}, job_name="one", show_logs=False)


def paths_in(folder: Path, tmp_path: Path) -> list[str]:
    """Returns the names of the files that contain a path of this machine's temporary folders."""
    scratch = str(tmp_path.parent).encode()
    return [str(file) for file in folder.rglob("*") if file.is_file() and scratch in file.read_bytes()]


def run_usage(folder: Path, **replaced: str) -> str:
    """Runs the code of the card in the model's folder, and returns what it prints."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    for old, new in replaced.items():
        code = code.replace(f"{old} = ", f"{old} = {new!r} or ")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def head_of(folder: Path) -> dict[str, Any]:
    import yaml

    head = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert isinstance(head, dict)
    return head


def test_a_saved_adapter_finds_its_base_on_the_hub(hub: Hub, tiny: Path, prefs: Path, tmp_path: Path) -> None:
    base = hub.add_model("Qwen/Qwen2-0.5B-Instruct", tiny)
    job = train(prefs, model_name="qwen2-0.5b-instruct")
    made = Path(job.model_uri.removeprefix("file://"))
    assert "README.md" in json.loads((made / DIGESTS_FILE).read_text())["files"]
    job.save_model(tmp_path / "saved")
    for folder in (made, tmp_path / "saved"):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("Qwen/Qwen2-0.5B-Instruct", base.commit)
        head = head_of(folder)
        assert (head["base_model"], head["license"]) == ("Qwen/Qwen2-0.5B-Instruct", "apache-2.0")
        assert head["library_name"] == "peft"
        assert paths_in(folder, tmp_path) == []
    assert "AutoPeftModelForCausalLM" in (tmp_path / "saved" / "README.md").read_text()
    run_usage(tmp_path / "saved")


@pytest.mark.parametrize("method", ["LoRA_LLM", "Standard_LLM"])
def test_a_base_from_a_folder_is_named_without_its_path(
    home: Path, tiny: Path, prefs: Path, tmp_path: Path, method: str
) -> None:
    job = train(prefs, method, model_uri=str(tiny))
    job.save_model(tmp_path / "saved")
    for folder in (Path(job.model_uri.removeprefix("file://")), tmp_path / "saved"):
        text = (folder / "README.md").read_text()
        assert f"{tiny.name} (not on the Hub)" in text
        assert head_of(folder).keys() == {"library_name", "pipeline_tag", "tags"}
        assert paths_in(folder, tmp_path) == []
    if method == "LoRA_LLM":
        config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == (tiny.name, None)
    run_usage(tmp_path / "saved", base=str(tiny))


# ── any model on the hub ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "model",
    [pytest.param({"model_name": "me/Tiny-1"}, marks=pytest.mark.thorough), {"model_uri": "hf://me/Tiny-1@v1"}],
)
def test_a_hub_id_outside_of_the_catalog_is_trained(
    hub: Hub, tiny: Path, prefs: Path, tmp_path: Path, model: dict[str, str]
) -> None:
    base = hub.add_model(
        "me/Tiny-1", tiny, revisions=("main", "v1"), facts={"safetensors": {"parameters": {"F32": 1234}, "total": 1234}}
    )
    job = train(prefs, **model)
    body = job.manifest.body
    assert (body.model.name, body.model.hub_id) == ("me/Tiny-1", "me/Tiny-1")
    assert (body.model.source.kind, body.model.source.revision) == ("hub", base.commit)
    folder = Path(job.model_uri.removeprefix("file://"))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/Tiny-1", base.commit)
    assert head_of(folder)["base_model"] == "me/Tiny-1"
    run_usage(folder)


def test_facts_of_a_hub_model_come_without_its_weights(hub: Hub, home: Path, tiny: Path) -> None:
    base = hub.add_model("me/tiny", tiny, facts={"safetensors": {"parameters": {"F32": 1234}, "total": 1234}})
    source, row = find_weights(Session(), model_name="hf://me/tiny", model_uri=None)
    size = (tiny / "model.safetensors").stat().st_size
    assert (source.revision, source.parameters, source.size_bytes, row) == (base.commit, 1234, size, None)
    base.facts = {}
    assert find_weights(Session(), model_name="me/tiny", model_uri=None)[0].parameters == size // 4
    assert not any("safetensors" in line for line in hub.asked)


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"[]", b"\xff"])
def test_a_damaged_config_is_the_models_fault_not_the_hubs(hub: Hub, home: Path, tiny: Path, content: bytes) -> None:
    hub.add_model("me/tiny", tiny).files["config.json"] = content
    with pytest.raises(ConfigurationError, match=r"config\.json of the model is not a JSON object"):
        find_weights(Session(), model_name="me/tiny", model_uri=None)


def test_a_commit_is_pinned_only_if_it_is_one(hub: Hub, home: Path, tiny: Path) -> None:
    hub.add_model("me/tiny", tiny, facts={"sha": "main"})
    with pytest.raises(StoreError, match=r"does not respond like a Hugging Face hub .*'main'"):
        find_weights(Session(), model_name="me/tiny", model_uri=None)


def test_architectures_of_another_shape_are_not_known(hub: Hub, home: Path, tiny: Path, tmp_path: Path) -> None:
    hub.add_model("me/odd", changed(tiny, tmp_path / "odd", model_type="odd", architectures=5))
    source, _ = find_weights(Session(), model_name="me/odd", model_uri=None)
    with pytest.raises(ConfigurationError, match=r"architecture unknown \(model_type odd\)"):
        check_architecture(source)


def test_a_service_of_a_hub_model_needs_no_name(hub: Hub, home: Path, tiny: Path) -> None:
    hub.add_model("me/Tiny-1", tiny)
    command = [sys.executable, "-m", "palate.cli", "deploy", "me/Tiny-1", "--base", "--engine", "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "--engine is 'x'" in done.stderr  # its name is checked first


def test_ids_and_names() -> None:
    assert hub_model("qwen2-0.5b") is None
    assert hub_model("hf://models/me/x@refs/pr/1") == HubModel("me/x", "refs/pr/1")
    for wrong in ("hf://me", "hf://datasets/me/x", "hf://datasets/me"):
        with pytest.raises(ConfigurationError, match="OWNER/NAME"):
            hub_model(wrong)


def test_the_catalog_comes_first(hub: Hub, home: Path) -> None:
    source, row = find_weights(Session(), model_name="hf://Qwen/Qwen2-0.5B-Instruct@v1", model_uri=None)
    assert (source.location, source.revision) == ("Qwen/Qwen2-0.5B-Instruct", "v1")
    assert row is not None
    assert RegisteredModel("qwen/qwen2-0.5b-instruct").model_name == "qwen2-0.5b-instruct"
    assert hub.asked == []
    with pytest.raises(UnknownModelError, match="most similar names"):
        ModelTrainingRecipe(model_name="qwen2-0.5b-instrukt")
    with pytest.raises(UnknownModelError, match="provider 'me'"):
        ModelTrainingRecipe(model_name="me/x", model_provider="qwen")
    with pytest.raises(ConfigurationError, match="give one of them"):
        ModelTrainingRecipe(model_name="hf://me/x@a", model_version="b")


def changed(tiny: Path, target: Path, **config: Any) -> Path:
    """Returns a copy of a model's folder with other values in config.json."""
    target.mkdir()
    for file in tiny.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    before = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**before, **config}))
    return target


def test_what_cannot_be_trained_is_an_error_before_weights_are_downloaded(
    hub: Hub, tiny: Path, prefs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_model("me/gated", tiny, gated=True)
    hub.add_model("me/adapter", tiny).files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}
    odd = changed(tiny, tmp_path / "odd", model_type="odd", architectures=["OddForCausalLM"], auto_map={})
    hub.add_model("me/odd", odd)
    for name, error, message in (
        ("me/Qwen2-0.5B-Instrukt", UnknownModelError, r"does not exist or is private.*qwen2-0\.5b-instruct"),
        ("hf://me/odd@none", UnknownModelError, "no revision 'none'"),
        ("me/gated", StoreDeniedError, r"is gated: accept its terms at http\S+/me/gated, then set HF_TOKEN"),
        ("me/adapter", ConfigurationError, "looks like a LoRA adapter"),
        ("me/odd", ConfigurationError, r"OddForCausalLM.*model_type odd"),
    ):
        with pytest.raises(error, match=message):
            train(prefs, model_name=name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UnknownModelError, match="HF_HUB_OFFLINE is set"):
        train(prefs, model_name="me/absent")
    assert not any("safetensors" in line for line in hub.asked)
    assert TrainingJob.list(session=Session()) == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert find_weights(Session(), model_name="me/gated", model_uri=None)[0].revision
