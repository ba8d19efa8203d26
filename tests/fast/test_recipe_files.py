"""Every recipe file that ships loads, and bad ones say what is wrong."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from palate import ModelTrainingRecipe, Session
from palate_recipes.errors import HyperparameterError
from palate_recipes.files import read_recipe

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
    ],
)
def test_a_bad_recipe_file_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(HyperparameterError) as caught:
        read_recipe(path)
    for word in ["bad.toml", *words]:
        assert word in str(caught.value)
