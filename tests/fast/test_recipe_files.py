"""Every recipe file that ships loads, and bad ones say what is wrong."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from palate import ModelTrainingRecipe, Session
from palate_recipes.errors import HyperparameterError
from palate_recipes.recipe_file import read_recipe

ROOT = Path(__file__).parents[2]
SHIPPED = [*sorted((ROOT / "recipes").glob("*.toml")), Path(str(files("palate_recipes.demo") / "recipe.toml"))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_recipe_makes_a_recipe(session: Session, path: Path) -> None:
    recipe = ModelTrainingRecipe(**read_recipe(path))
    assert recipe.hyperparameters["training_strategy"] in {"dpo", "sft"}


def test_there_are_recipes() -> None:
    assert len(SHIPPED) >= 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model_name = ", ["not valid TOML"]),
        ('modle_name = "x"', ["'modle_name'", "'model_name'"]),
        ("[hyperparameters]\nlr = 1", ["lr", "learning_rate"]),
        ('method = "LoRA"', ["LoRA_LLM"]),
        ("max_attempts = " + "9" * 5000, ["cannot be read", "4300 digits"]),
        ("[hyperparameters]\nseq_length = 0x" + "f" * 5000, ["seq_length", "too long to show", "must be"]),
        ("[hyperparameters]\nlearning_rate = " + "[" * 2000 + "]" * 2000, ["nested too deeply"]),
        ("[hyperparameters]\ntarget_modules = '" + "[" * 9000 + "'", ["target_modules", "must be"]),
        ("d = 2024-02-30", ["not valid TOML"]),
        ("model_name = 5", ["model_name = 5", "expected a string"]),
        ("labels = {a = 1}", ["labels", "expected a table of strings"]),
        ("max_run_time = true", ["max_run_time = true", "whole number of seconds"]),
        ("hyperparameters = 1", ["expected a table"]),
        ("method = [1]", ["expected a string"]),
        ("#" + "a" * (1 << 20), ["1,048,576 bytes"]),
        ("k" * 5000 + " = 1", ["unknown key 'kkk"]),
    ],
)
def test_a_bad_recipe_file_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(HyperparameterError) as caught:
        read_recipe(path)
    for word in ["bad.toml", *words]:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("~nosuchuser/x", "no such user"),
        ("a\0b", "NUL character"),
        ("a\ud83d", r"U\+D83D"),
        ("a" * 5000, "5,000 characters"),
    ],
)
def test_a_path_that_no_file_can_have_is_named_with_its_reason(path: str, words: str) -> None:
    with pytest.raises(HyperparameterError, match=words):
        read_recipe(path)
