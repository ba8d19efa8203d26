"""Base models from a hub, and what a trained model says of its base: found on any machine, without this machine's folders."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from palate import ModelTrainingRecipe, TrainingJob
from palate.checksums import DIGESTS_FILE
from tests.support.hub import Hub, running_hub

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
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING_FACE")):
            monkeypatch.delenv(name)
    with running_hub(TOKEN) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", "")
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
