"""Every name, parameter, keyword and attribute of PAI's SDK works under `import pai`, or raises Palate's error with a remedy.

The list is client/palate/pai/surface.json; CI compares it with the installed package (docs/tools/pai_surface.py check).
"""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import palate.pai
from palate import ModelTrainingRecipe, PreferenceData, RegisteredModel, Session
from palate.backends.limits import ResourceConfig
from palate.errors import PaiAttributeError, PaiNameError, PalateError, UnsupportedParameterError
from palate.http import async_openai_client, openai_client
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


def public_callables() -> dict[str, Callable[..., Any]]:
    """All that users of PAI's SDK call, by the name that messages have; methods take None for `self`."""
    homes = {**HOMES, "PreferenceData": PreferenceData.__module__, "ResourceConfig": ResourceConfig.__module__}
    kinds = {owner: getattr(importlib.import_module(module), owner) for owner, module in homes.items()}
    found: dict[str, Callable[..., Any]] = dict(kinds)
    for owner, kind in kinds.items():
        for name, value in vars(kind).items():
            if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, classmethod)):
                bound = getattr(kind, name)
                found[f"{owner}.{name}"] = partial(bound, None) if inspect.isfunction(value) else bound
    for name in ("get_default_session", "setup_default_session"):
        found[name] = getattr(importlib.import_module("palate.session"), name)
    found["random_str"] = importlib.import_module("palate.common.utils").random_str
    return found


CALLABLES = public_callables()

OPEN = {"Predictor.openai", "Predictor.async_openai"}
"""They take the keywords of openai's client."""


@pytest.mark.parametrize("what", sorted(surface()["keywords"]))
def test_what_pai_takes_through_kwargs_is_refused_with_the_reason(home: Path, what: str) -> None:
    for name in surface()["keywords"][what]:
        with pytest.raises(UnsupportedParameterError) as refused:
            CALLABLES[what](**{name: 7})
        said = str(refused.value)
        assert isinstance(refused.value, TypeError)
        assert said.startswith((f"{name}=7 is not supported by Palate: ", f"{name}=... is not supported by Palate: "))
        assert said.endswith(". Omit it")


def test_the_table_has_the_keywords_of_every_function_that_takes_any(installed: None) -> None:
    table = surface()
    functions = {name.rpartition(".")[2]: rows for name, rows in table["functions"].items() if "pai.session." in name}
    taking = {name for name, rows in functions.items() if any(row[1] == "VAR_KEYWORD" for row in rows)}
    for owner, members in table["classes"].items():
        for name, rows in members.items():
            if rows and any(row[1] == "VAR_KEYWORD" for row in rows):
                taking.add(owner if name == "__init__" else f"{owner}.{name}")
    assert taking & CALLABLES.keys() == table["keywords"].keys()


@pytest.mark.parametrize("what", sorted(CALLABLES.keys() - OPEN))
def test_a_misspelt_keyword_is_refused_with_the_nearest(home: Path, what: str) -> None:
    parameters = inspect.signature(CALLABLES[what]).parameters
    assert "VAR_KEYWORD" not in {item.kind.name for item in parameters.values()}
    for name in (*parameters, "no_such_keyword"):
        wrong = f"{name}x"
        assert wrong not in parameters
        with pytest.raises(UnsupportedParameterError) as refused:
            CALLABLES[what](**{wrong: 7})
        said = str(refused.value)
        assert said.startswith((f"{what}() has no parameter {wrong}=7: ", f"{what}() has no parameter {wrong}=...: "))
        if name == "no_such_keyword":
            assert said.partition(": ")[2].startswith("valid parameters: " if parameters else "it has none")
        elif len(name) > 1:
            assert f"did you mean {name!r}?" in said


def test_a_misspelt_keyword_of_openais_client_is_refused_before_the_service_is_asked() -> None:
    for client in (openai_client, async_openai_client):
        with pytest.raises(UnsupportedParameterError, match=r"has no parameter time_out=3: did you mean 'timeout'\?"):
            client("http://127.0.0.1:1", "token", "v1", {"time_out": 3})  # type: ignore[operator]


@pytest.mark.parametrize(
    ("what", "name", "value", "shown"),
    [
        ("setup_default_session", "acces_key_id", "s3cret", "..."),
        ("setup_default_session", "password", "s3cret", "..."),
        ("Session", "header", {"Authorization": "s3cret"}, "{'Authorization': ...}"),
        ("ModelTrainingRecipe", "environment", {"HF_TOKEN": "s3cret"}, "{'HF_TOKEN': ...}"),
        ("ModelTrainingRecipe", "command", "train --token s3cret --fast", "'train --token ...'"),
        ("ModelTrainingRecipe", "requirements", ["git+https://me:s3cret@example.com/x"], "['git+https://...@example.com/x']"),
        ("ModelTrainingRecipe", "comands", list("abcde"), "['a', 'b', 'c', ...]"),
        ("ModelTrainingRecipe", "comands", [1, [2, [3]]], "[1, [...]]"),
        ("ModelTrainingRecipe.train", "job_nam", "x" * 5000, "'" + "x" * 57 + "...'"),
        ("ModelTrainingRecipe.train", "rows", 10**40, "<int>"),
        ("Predictor.raw_predict", "hooks", object(), "<object>"),
    ],
)  # fmt: skip
def test_a_value_is_shown_short_and_without_secrets(
    home: Path, what: str, name: str, value: object, shown: str
) -> None:
    with pytest.raises(UnsupportedParameterError) as refused:
        CALLABLES[what](**{name: value})
    said = str(refused.value)
    assert f"{name}={shown}" in said
    assert len(said) < 600


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
