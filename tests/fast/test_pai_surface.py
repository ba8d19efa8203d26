"""Every name, parameter and attribute of PAI's SDK works under `import pai`, or raises Palate's error with a remedy.

The list is client/palate/pai/surface.json; CI compares it with the installed package (docs/tools/pai_surface.py check).
"""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import palate.pai
from palate import ModelTrainingRecipe, RegisteredModel, Session
from palate.errors import PaiAttributeError, PaiNameError, PalateError, UnsupportedParameterError
from palate.pai.finder import surface
from palate.pai.names import ATTRIBUTES, PROVIDED, VERSION

HOMES = {owner: module for module, owner in ATTRIBUTES}

KEYWORDS = {"VAR_KEYWORD", "VAR_POSITIONAL"}

NOTEBOOK_CELLS = {
    "session": (
        "import pai\n"
        "from pai.session import get_default_session, setup_default_session\n"
        "print(pai.__version__)\n"
        "sess = get_default_session()\n"
        "assert sess and sess.workspace_name is not None\n"
        "sess.save_config()\n"
        "print(sess.workspace_id, sess.workspace_name, sess.oss_bucket_name, sess.oss_endpoint)\n"
    ),
    "models": (
        "from pai.model import RegisteredModel\n"
        "rows = [(m.model_name, m.model_version, m.model_provider, m.task, m.version_labels.get('license'),\n"
        "         m.version_labels.get('revision'), bool(m.training_spec), bool(m.inference_spec))\n"
        "        for m in RegisteredModel.list(model_provider='pai', task='large-language-model')]\n"
        "assert len(rows) > 10 and all(row[-2:] == (True, True) for row in rows)\n"
        "model = RegisteredModel(model_name='qwen2-0.5b-instruct', model_provider='pai')\n"
        "print(model.model_data, model.training_spec, model.inference_spec)\n"
    ),
    "recipe": (
        "from pai.model import ModelTrainingRecipe, RegisteredModel\n"
        "recipe = ModelTrainingRecipe(model_name='qwen2-0.5b-instruct', model_provider='pai', method='LoRA_LLM',\n"
        "                             base_job_name='tuned')\n"
        "print(recipe.default_inputs, recipe.input_channels, recipe.output_channels, recipe.hyperparameters)\n"
        "print(recipe.hyperparameter_definitions, recipe.instance_type, recipe.image_uri, recipe.model_uri)\n"
        "assert recipe.job_name().startswith('tuned-') and recipe.job_name('mine') == 'mine'\n"
        "assert RegisteredModel('qwen2-0.5b-instruct').training_recipe(method='Standard').method == 'Standard_LLM'\n"
    ),
}
"""What the first cells of the SDK's notebooks on models ask for: pretrained_model, dlf-qwen2-pai and chatglm_finetune."""


@pytest.fixture
def installed() -> Iterator[None]:
    palate.pai.install()
    importlib.import_module("pai")
    yield
    palate.pai.uninstall()


def test_the_table_is_of_the_version_that_is_reported() -> None:
    assert surface()["version"] + "+palate" == VERSION
    assert len(surface()["modules"]) > 70
    assert set(surface()["classes"]) == set(HOMES)


@pytest.mark.parametrize("module", sorted(surface()["modules"]))
def test_every_name_is_there_or_says_what_to_use(installed: None, module: str) -> None:
    imported = importlib.import_module(module)
    for name in surface()["modules"][module]:
        scope: dict[str, Any] = {}
        try:
            exec(f"from {module} import {name}", scope)
        except PaiNameError as error:
            said, separator, remedy = str(error).partition(": ")
            assert said == f"{module}.{name} exists in PAI's SDK but not in Palate"
            assert separator
            assert len(remedy) > 5
        else:
            home = PROVIDED.get(module.partition("._")[0], {}).get(name)
            submodule = sys.modules.get(f"{module}.{name}")
            assert scope[name] is (getattr(importlib.import_module(home), name) if home else submodule)
            assert getattr(imported, name) is scope[name]


def test_what_palate_provides_is_pais() -> None:
    names = surface()["modules"]
    for module, provided in PROVIDED.items():
        assert provided.keys() <= set(names[module]), module


def test_the_documented_names_are_those_provided() -> None:
    page = (Path(__file__).parents[2] / "docs" / "pai.md").read_text()
    table = page.partition("| module | names |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`([^`]+)`", line) for line in table.splitlines() if line.startswith("| `")]
    assert {module: set(names) for module, *names in rows} == {
        module: set(names) for module, names in PROVIDED.items() if names
    }


@pytest.mark.parametrize("owner", sorted(HOMES))
def test_every_method_takes_pais_parameters_in_pais_order(installed: None, owner: str) -> None:
    kind = getattr(importlib.import_module(HOMES[owner]), owner)
    held = 0
    for name, theirs in surface()["classes"][owner].items():
        if theirs is None:
            continue
        try:
            ours = inspect.signature(kind) if name == "__init__" else inspect.signature(getattr(kind, name))
        except PaiAttributeError:
            continue
        bound = inspect.signature(kind) if name == "__init__" else ours
        values = {item[0]: object() for item in theirs if item[1] not in KEYWORDS}
        # A method that is read from the class has `self`, which a class method has not.
        first = [None] if name != "__init__" and inspect.isfunction(inspect.getattr_static(kind, name)) else []
        by_position = bound.bind(*first, *values.values()).arguments
        assert {key: by_position[key] for key in values} == values, name
        by_name = bound.bind(*first, **values).arguments
        assert {key: by_name[key] for key in values} == values, name
        needed = {key for key, item in bound.parameters.items() if item.default is item.empty and key != "self"}
        assert needed - {"kwargs"} <= {item[0] for item in theirs if not item[2]}, f"{name} needs more than PAI's"
        held += 1
    assert held >= 3


@pytest.mark.parametrize("name", ["setup_default_session", "get_default_session"])
def test_every_function_takes_pais_parameters_in_pais_order(installed: None, name: str) -> None:
    theirs = [item[0] for item in surface()["functions"][f"pai.session.{name}"] if item[1] not in KEYWORDS]
    function = getattr(importlib.import_module("pai.session"), name)
    ours = list(inspect.signature(function).parameters)
    assert ours[: len(theirs)] == theirs


def refusals(owner: str, thing: object) -> Iterator[tuple[str, str, str]]:
    """Reads every attribute that PAI's class has; yields those that Palate refuses, with the message."""
    for name in surface()["classes"][owner]:
        try:
            getattr(thing, name)
        except PaiAttributeError as error:
            yield owner, name, str(error)


def test_every_attribute_is_there_or_says_what_to_use(installed: None, session: Session) -> None:
    objects = {
        "Session": session,
        "RegisteredModel": RegisteredModel("qwen2-0.5b-instruct"),
        "ModelTrainingRecipe": ModelTrainingRecipe("qwen2-0.5b-instruct"),
    }
    refused = [refusal for owner, thing in objects.items() for refusal in refusals(owner, thing)]
    assert len(refused) > 20
    for owner, name, said in refused:
        assert said.startswith(f"{owner}.{name} exists in PAI's SDK but not in Palate: ")
    for owner in ("TrainingJob", "Predictor"):  # without a run: what the class answers
        kind = getattr(importlib.import_module(HOMES[owner]), owner)
        for name, theirs in surface()["classes"][owner].items():
            if inspect.getattr_static(kind, name, None) is None:
                assert theirs is None
                pytest.fail(f"{owner}.{name} is neither Palate's nor refused")


def test_parameters_of_pais_deploy_are_refused_by_name(session: Session) -> None:
    model = RegisteredModel("qwen2-0.5b-instruct")
    for name in ("resource_id", "service_type", "serializer", "inference_method"):
        arguments: dict[str, Any] = {name: "x"}
        with pytest.raises(UnsupportedParameterError, match=name):
            model.deploy("never", **arguments)
    with pytest.raises(PalateError, match=r"instance_type='ecs\.g6\.large'"):
        model.deploy("never", 1, "ecs.g6.large")


def test_models_are_listed_by_name_and_publisher(session: Session) -> None:
    names = [model.model_name for model in RegisteredModel.list("Qwen2-0.5B-Instruct", "pai")]
    assert names == ["qwen2-0.5b-instruct"]
    assert {model.model_provider for model in RegisteredModel.list(model_provider="qwen")} == {"qwen"}
    assert len(RegisteredModel.list(task="large-language-model")) == len(RegisteredModel.list())
    assert RegisteredModel.list(model_provider="nobody") == []


def test_a_session_tells_its_bucket(home: Path, tmp_path: Path) -> None:
    assert Session(store=tmp_path).oss_bucket_name is None
    told = Session("cn-beijing", 58670, None, "mine", "https://s3.example.com")  # type: ignore[arg-type]
    assert (told.oss_bucket_name, told.oss_endpoint, told.workspace_name) == ("mine", "https://s3.example.com", "58670")
    saved = told.save_config(config_path=tmp_path / "config.json")
    assert "oss://mine/palate" in saved.read_text()


@pytest.mark.parametrize("cell", NOTEBOOK_CELLS)
def test_the_first_cells_of_pais_notebooks_run(home: Path, tmp_path: Path, cell: str) -> None:
    script = tmp_path / "cell.py"
    script.write_text(NOTEBOOK_CELLS[cell])
    command = [sys.executable, "-m", "palate.cli", "run", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or cell == "recipe"
