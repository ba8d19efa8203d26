"""An adapter as an input of a recipe: found, read and compared before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from palate import ModelTrainingRecipe, Session, TrainingJob
from palate.adapter_input import read_adapter
from palate.errors import ConfigurationError, DataError, HyperparameterError
from palate_recipes.catalog import find_model
from palate_recipes.lora_targets import AdapterShape

MODEL = "smollm2-135m-instruct"
CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"], "bias": "none"}


def adapter(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, "base_model_name_or_path": MODEL, **changes}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def prefs(tmp_path: Path) -> Path:
    path = tmp_path / "prefs.json"
    path.write_text(json.dumps([{"prompt": "Is it?", "chosen": "Yes, it is.", "rejected": "No."}]))
    return path


def refused(kind: type[Exception], prefs: Path, folder: object, *, method: str = "LoRA_LLM", **given: Any) -> str:
    recipe = ModelTrainingRecipe(model_name=MODEL, method=method, hyperparameters=given)
    with pytest.raises(kind) as error:
        recipe.train(inputs={"train": prefs, "adapter": folder})  # type: ignore[dict-item]
    assert TrainingJob.list() == []
    return str(error.value)


def test_the_adapters_shape_is_the_trainings(session: Session, tmp_path: Path) -> None:
    found = read_adapter(adapter(tmp_path / "sft"), session)
    assert found.size == len((tmp_path / "sft/adapter_config.json").read_bytes()) + len(b"weights")
    given = {"lora_dim": 8, "target_modules": ["q_proj", "v_proj"], "learning_rate": 1e-4}
    recipe = ModelTrainingRecipe(model_name=MODEL, hyperparameters=given)
    settled = found.settle(recipe._spec()).hyperparameters
    assert settled.lora_dim == 8
    assert settled.lora_alpha == 16
    assert settled.target_modules == ["q_proj", "v_proj"]
    assert settled.learning_rate == 1e-4


def test_what_contradicts_the_adapter_is_refused(session: Session, tmp_path: Path, prefs: Path) -> None:
    folder = adapter(tmp_path / "sft")
    message = refused(HyperparameterError, prefs, folder, lora_dim=32, lora_alpha=32, target_modules="q_proj")
    assert "lora_dim = 32, but the adapter has 8: omit lora_dim" in message
    assert "lora_alpha = 32: the adapter has 16" in message
    assert "target_modules = ['q_proj']: the adapter has ['q_proj', 'v_proj']" in message
    assert "Standard_LLM trains all weights" in refused(ConfigurationError, prefs, folder, method="Standard_LLM")


def test_a_folder_without_an_adapter_is_refused(session: Session, tmp_path: Path, prefs: Path) -> None:
    assert "has no adapter_config.json" in refused(DataError, prefs, tmp_path)
    assert "job.model_uri" in refused(DataError, prefs, tmp_path / "absent")
    assert "must be a folder" in refused(ConfigurationError, prefs, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type=IA3"),
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias=all"),
        ({"r": 1024}, "r=1024"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target module lm_head"),
        ({"r": None}, "does not describe a LoRA adapter"),
        ({"target_modules": None}, "does not describe a LoRA adapter"),
    ],
)
def test_an_adapter_that_cannot_be_served_is_refused(
    session: Session, tmp_path: Path, prefs: Path, changes: dict[str, Any], words: str
) -> None:
    assert words in refused(DataError, prefs, adapter(tmp_path / "odd", **changes))


def test_the_base_must_be_the_adapters(session: Session, tmp_path: Path, prefs: Path) -> None:
    other = adapter(tmp_path / "other", base_model_name_or_path="Qwen/Qwen2-0.5B-Instruct")
    message = refused(ConfigurationError, prefs, other)
    assert "trained on Qwen/Qwen2-0.5B-Instruct, not on smollm2-135m-instruct" in message
    assert "model_name='qwen2-0.5b-instruct'" in message
    row = find_model(MODEL)
    for name in ("", MODEL, row.hub_id, f"/somewhere/{row.hub_id.rpartition('/')[2]}"):
        same = adapter(tmp_path / f"same-{len(name)}", base_model_name_or_path=name)
        assert read_adapter(same, session).base_note(MODEL, row) is None
    own = adapter(tmp_path / "own", base_model_name_or_path="/data/my-model")
    assert "must have the same weights" in str(read_adapter(own, session).base_note(MODEL, row))


def test_a_broken_config_is_named() -> None:
    with pytest.raises(DataError, match=r"there/adapter_config\.json does not describe a LoRA adapter"):
        AdapterShape.parse(b"[]", where="there")
