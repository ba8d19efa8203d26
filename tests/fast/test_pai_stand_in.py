"""A small model in the place of a named one: only where the setting says so, and never in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from palate import ModelTrainingRecipe, RegisteredModel
from palate.errors import ConfigurationError, UnknownModelError
from palate.weights import SETTING, stand_in_for


def test_without_the_setting_every_model_is_itself(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ModelTrainingRecipe("qwen2-0.5b-instruct")
    assert (recipe.model_name, recipe.model_uri, recipe.labels) == ("qwen2-0.5b-instruct", None, {})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("asked", ["qwen2-0.5b-instruct", "Qwen/Qwen2-0.5B-Instruct", "QWEN2-0.5b-instruct"])
def test_a_model_of_the_catalog_stands_in_loudly(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    monkeypatch.setenv(SETTING, "qwen2-7b-instruct=qwen2-1.5b-instruct, qwen2-0.5b-instruct=smollm2-135m-instruct")
    for _ in range(2):
        recipe = ModelTrainingRecipe(asked, model_version="main", model_provider="pai", labels={"team": "x"})
        assert (recipe.model_name, recipe.model_uri, recipe.model_version) == ("smollm2-135m-instruct", None, None)
        assert recipe.labels == {"team": "x", "stand_in_for": asked}
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith(f"STAND-IN: smollm2-135m-instruct replaces {asked}, because {SETTING} is set")
    assert ModelTrainingRecipe("smollm2-360m-instruct").labels == {}
    assert capsys.readouterr().err == ""


def test_a_folder_stands_in_under_its_own_name(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(SETTING, f"qwen2-0.5b-instruct={tmp_path / 'small'}/")
    recipe = ModelTrainingRecipe("qwen2-0.5b-instruct")
    assert (recipe.model_name, recipe.model_uri) == ("small", f"{tmp_path / 'small'}/")


@pytest.mark.parametrize("asked", ["chatglm2-6b", "qwen2-0.5b-instruct"])
def test_a_registered_model_is_replaced_as_in_a_recipe(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    monkeypatch.setenv(SETTING, f"{asked}=smollm2-135m-instruct")
    model = RegisteredModel(asked, model_provider="pai")
    assert capsys.readouterr().err == ""
    assert model.model_data == "hf://HuggingFaceTB/SmolLM2-135M-Instruct"
    recipe = model.training_recipe(method="LoRA_LLM")
    assert (recipe.model_name, recipe.labels) == ("smollm2-135m-instruct", {"stand_in_for": asked})
    assert "STAND-IN" in capsys.readouterr().err


def test_a_folder_that_the_script_names_itself_wins(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, "qwen2-0.5b-instruct=smollm2-135m-instruct")
    recipe = ModelTrainingRecipe("qwen2-0.5b-instruct", model_uri="/models/mine")
    assert (recipe.model_name, recipe.model_uri, recipe.labels) == ("qwen2-0.5b-instruct", "/models/mine", {})


@pytest.mark.parametrize("setting", ["qwen2-0.5b-instruct", "qwen2-0.5b-instruct=", "=smollm2-135m-instruct"])
def test_a_setting_that_cannot_be_read_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv(SETTING, setting)
    with pytest.raises(ConfigurationError, match=r"PALATE_MODEL_STAND_IN.*NAME=OTHER"):
        stand_in_for("qwen2-0.5b-instruct")


def test_an_unknown_stand_in_names_the_nearest(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, "qwen2-0.5b-instruct=smollm2-135m-instuct")
    with pytest.raises(UnknownModelError, match="smollm2-135m-instruct"):
        stand_in_for("qwen2-0.5b-instruct")
