"""Every recipe file that ships loads, and bad ones say what is wrong."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from palate import ModelTrainingRecipe, Session
from palate_recipes.errors import HyperparameterError
from palate_recipes.recipe_file import read_recipe, read_recipe_file

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
        ('validaton = "x"', ["'validaton'", "did you mean 'validation'?"]),
        ('[inputs]\nadaptor = "x"', ["'adaptor' in [inputs]", "did you mean 'adapter'?", "train, validation, adapter"]),
        ("inputs = 1", ["inputs = 1", "expected a table"]),
        ('train = ""', ['train = ""', "expected a path or URI"]),
        ("[inputs]\ntrain = 3", ["inputs.train = 3", "expected a path or URI"]),
        ('train = "a"\n[inputs]\ntrain = "b"', ["train twice", "[inputs]"]),
        ("store = 1", ["store = 1", "expected a path or URI"]),
        ('store = "here"', ["store", "Session(store=…)", "read_recipe_file()"]),
        ('name = "one"', ["name", "train(job_name=…)", "read_recipe_file()"]),
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


@pytest.mark.parametrize(
    "text", ['train = "d.json"\nvalidation = "v/*.json"', '[inputs]\nvalidation = "v/*.json"\ntrain = "d.json"']
)
def test_data_of_a_recipe_file_is_beside_the_file(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    folder = tmp_path / "a[1]"
    folder.mkdir()
    (folder / "r.toml").write_text(f'model_name = "smollm2-135m-instruct"\n{text}')
    monkeypatch.chdir(tmp_path)
    recipe = ModelTrainingRecipe(**read_recipe("a[1]/r.toml"))
    # Only a glob is matched as a pattern, so only its folder is escaped.
    assert recipe.default_inputs == {"train": str(folder / "d.json"), "validation": f"{tmp_path}/a[[]1]/v/*.json"}


@pytest.mark.parametrize(
    "location", ["s3://bucket/p.json", "hf://datasets/a/b?split=train", "~/p.json", "/data/p.json"]
)
def test_a_location_that_is_not_relative_is_left_alone(tmp_path: Path, location: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(f'model_uri = "{location}"\ntrain = "{location}"\nstore = "{location}"\nname = "one"')
    found = read_recipe_file(path)
    assert found.arguments == {"model_uri": location, "default_training_inputs": {"train": location}}
    assert (found.store, found.name) == (location, "one")


def test_store_and_model_folder_are_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('model_uri = "../models/mine"\nstore = "runs"')
    found = read_recipe_file(path)
    assert found.arguments == {"model_uri": str(tmp_path.parent / "models" / "mine")}
    assert (found.store, found.name) == (str(tmp_path / "runs"), None)


def test_an_empty_model_folder_and_a_name_that_no_file_can_have_stay_what_they_are(tmp_path: Path) -> None:
    path, long = tmp_path / "r.toml", "x" * 300 + "*.json"
    path.write_text(f'model_uri = ""\ntrain = "{long}"\n')
    found = read_recipe(path)
    assert found == {"model_uri": "", "default_training_inputs": {"train": str(tmp_path / long)}}
