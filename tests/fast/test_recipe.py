"""What a recipe refuses before anything is written or started, and how it says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from palate import ModelTrainingRecipe, RegisteredModel, Session, TrainingJob, setup_default_session
from palate.errors import (
    ConfigurationError,
    DataError,
    HyperparameterError,
    JobNotReadyError,
    NotEnoughMemoryError,
    UnknownModelError,
    UnsupportedParameterError,
)
from palate.preflight import check_memory
from palate.sources.inputs import checked_inputs
from palate.submit import imitation_note
from palate_recipes.catalog import find_model
from palate_recipes.hyperparameters import DeviceFacts
from tests.support.manifests import train_spec

MODEL = "smollm2-135m-instruct"
DPO = {"training_strategy": "dpo"}


@pytest.fixture
def prefs(tmp_path: Path) -> Path:
    path = tmp_path / "prefs.json"
    path.write_text(json.dumps([{"prompt": "Is it?", "chosen": "Yes, it is.", "rejected": "No."}]))
    return path


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"model_name": "qwen2-0.5-instruct"}, UnknownModelError, ["qwen2-0.5-instruct", "qwen2-0.5b-instruct", "palate models"]),
        ({"model_name": 5}, UnknownModelError, ["model '5'", "palate models"]),
        ({"model_name": MODEL, "method": ["LoRA_LLM"]}, HyperparameterError, ["['LoRA_LLM']"]),
        ({}, ConfigurationError, ["model_name=", "model_uri="]),
        ({"model_name": MODEL, "method": "LoRA"}, HyperparameterError, ["LoRA", "LoRA_LLM"]),
        ({"model_name": MODEL, "hyperparameters": {"lr": 1}}, HyperparameterError, ["lr", "learning_rate"]),
        ({"model_name": MODEL, "hyperparameters": {"seq_length": "helloworld"}}, HyperparameterError, ["seq_length", "helloworld"]),
        ({"model_name": MODEL, "hyperparameters": {"dpo_beta": -1}}, HyperparameterError, ["dpo_beta", "-1"]),
        ({"model_name": MODEL, "source_dir": "code"}, UnsupportedParameterError, ["source_dir", "code"]),
        ({"model_name": MODEL, "spot_spec": {"a": 1}}, UnsupportedParameterError, ["spot_spec"]),
        ({"model_name": MODEL, "requirements": ["x"]}, UnsupportedParameterError, ["requirements"]),
        ({"model_name": MODEL, "instance_type": "ecs.gn6e"}, UnsupportedParameterError, ["instance_type", "ecs.gn6e", "process"]),
        ({"model_name": MODEL, "instance_count": 2}, UnsupportedParameterError, ["instance_count"]),
        ({"model_name": MODEL, "image_uri": "img:1"}, UnsupportedParameterError, ["image_uri", "img:1"]),
        ({"model_name": MODEL, "model_channel_name": "other"}, UnsupportedParameterError, ["model_channel_name"]),
        ({"model_name": MODEL, "max_run_time": 0}, ConfigurationError, ["max_run_time"]),
        ({"model_name": MODEL, "max_run_time": True}, ConfigurationError, ["max_run_time=True"]),
        ({"model_name": MODEL, "max_run_time": float("nan")}, ConfigurationError, ["max_run_time=nan"]),
        ({"model_name": MODEL, "max_run_time": "60"}, ConfigurationError, ["max_run_time='60'"]),
        ({"model_name": MODEL, "backend": "proces"}, ConfigurationError, ["proces", "'process'"]),
    ],
)  # fmt: skip
def test_a_bad_recipe_says_what_value_and_remedy(
    session: Session, arguments: dict[str, object], kind: type[Exception], words: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        ModelTrainingRecipe(**arguments)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "kind", "words"),
    [
        (None, ConfigurationError, ["train", "inputs="]),
        ({"trian": "x"}, ConfigurationError, ["trian", "'train'"]),
        ({"train": "/nowhere/prefs.json"}, DataError, ["/nowhere/prefs.json"]),
        ({"train": 3}, ConfigurationError, ["inputs['train']=3"]),
    ],
)
def test_bad_inputs_are_refused_before_anything_is_written(
    session: Session, inputs: dict[str, object] | None, kind: type[Exception], words: list[str]
) -> None:
    recipe = ModelTrainingRecipe(MODEL, hyperparameters=DPO)
    with pytest.raises(kind) as caught:
        recipe.train(inputs=inputs)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)
    assert TrainingJob.list() == []
    assert recipe.latest_job is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty"]),
        ("[]", []),
        ('[{"prompt": "a", "chosen": "b"}]', ["rejected", "row 1"]),
        ('[{"prompt": "a", "chosen": "b", "rejected": "b"}]', ["row 1"]),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a"', ["line 2"]),
    ],
)
def test_bad_rows_are_refused_before_anything_is_written(
    session: Session, tmp_path: Path, text: str, words: list[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        ModelTrainingRecipe(MODEL, hyperparameters=DPO).train(inputs={"train": path})
    for word in ["bad.json", *words]:
        assert word in str(caught.value)
    assert TrainingJob.list() == []


def test_a_model_folder_without_weights_is_refused(session: Session, tmp_path: Path, prefs: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    recipe = ModelTrainingRecipe(model_uri=str(folder), hyperparameters=DPO)
    with pytest.raises(ConfigurationError, match=r"weights.*tokenizer"):
        recipe.train(inputs={"train": prefs})
    with pytest.raises(ConfigurationError, match="not a folder on this machine"):
        ModelTrainingRecipe(model_uri=str(tmp_path / "absent"), hyperparameters=DPO).train(inputs={"train": prefs})


def test_a_model_that_cannot_fit_is_refused(session: Session, prefs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = DeviceFacts(cuda=False, bf16=False, fp16=False, memory_gib=8.0)
    monkeypatch.setattr(type(session.backend), "device", lambda self, placement=None: small)
    recipe = ModelTrainingRecipe("qwen2-72b-instruct", method="Standard_LLM", hyperparameters=DPO)
    with pytest.raises(NotEnoughMemoryError) as caught:
        recipe.train(inputs={"train": prefs})
    for word in ("qwen2-72b-instruct", "Standard_LLM", "8.0 GiB", "palate models"):
        assert word in str(caught.value)
    assert '"LoRA_LLM"' not in str(caught.value)  # 16-bit weights of 72B parameters do not fit in 8 GiB either
    assert TrainingJob.list() == []


def test_a_warning_points_at_the_line_that_trains(
    session: Session, prefs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = DeviceFacts(cuda=False, bf16=False, fp16=False, memory_gib=8.0)
    monkeypatch.setattr(type(session.backend), "device", lambda self, placement=None: small)
    recipe = ModelTrainingRecipe("qwen2-72b-instruct", method="Standard_LLM")
    with pytest.warns(UserWarning, match="preference pairs") as warned, pytest.raises(NotEnoughMemoryError):
        recipe.train(inputs={"train": prefs})
    assert [one.filename for one in warned] == [__file__]


@pytest.mark.parametrize(("parameters", "advised"), [(2e9, True), (70e9, False)])
def test_a_method_is_advised_only_where_it_fits(parameters: float, advised: bool) -> None:
    gpu = DeviceFacts(cuda=True, bf16=True, fp16=True, gpu_name="A10G", gpu_memory_gib=23.0, gpu_count=1)
    spec = structs.replace(
        train_spec("a model", precision="bfloat16", hyperparameters={"load_in_4bit": False}), method="Standard_LLM"
    )
    with pytest.raises(NotEnoughMemoryError) as caught:
        check_memory(spec, parameters, device=gpu, row=None)
    message = str(caught.value)
    assert ('method="LoRA_LLM"' in message, 'method="QLoRA_LLM"' in message) == (advised, advised)
    for name in message.partition("such as ")[2].split(", or ")[0].split(", "):
        check_memory(spec, find_model(name).parameters_b * 1e9, device=gpu, row=None)


def test_weights_that_are_split_fit_where_a_copy_does_not() -> None:
    eight = DeviceFacts(cuda=True, bf16=True, fp16=True, gpu_name="A100", gpu_memory_gib=80.0, gpu_count=8)
    whole, split = (
        train_spec("a 72B model", precision="bfloat16", hyperparameters=values)
        for values in ({"load_in_4bit": False}, {"load_in_4bit": False, "fsdp": "full_shard"})
    )
    with pytest.raises(NotEnoughMemoryError, match=r'80.0 GiB \(8 GPUs\): .*fsdp="full_shard"'):
        check_memory(whole, 72e9, device=eight, row=None)
    check_memory(split, 72e9, device=eight, row=None)


def test_what_needs_a_job_says_so(session: Session) -> None:
    recipe = ModelTrainingRecipe(MODEL, hyperparameters=DPO)
    for act in (recipe.deploy, recipe.model_data, recipe.wait):
        with pytest.raises(JobNotReadyError, match=r"train\(\)"):
            act()
    with pytest.raises(UnsupportedParameterError, match="inference_spec"):
        recipe.deploy("x", inference_spec={"a": 1})


def test_hyperparameters_show_what_would_be_trained_with(session: Session) -> None:
    recipe = ModelTrainingRecipe(MODEL, hyperparameters={**DPO, "learning_rate": "1e-4"})
    assert recipe.hyperparameters["learning_rate"] == 1e-4
    assert recipe.hyperparameters["seq_length"] == 128
    definitions = {row["Name"]: row for row in recipe.hyperparameter_definitions}
    assert definitions["dpo_beta"]["DefaultValue"] == 0.1


def test_registered_models_make_recipes(session: Session) -> None:
    names = [model.model_name for model in RegisteredModel.list()]
    assert "qwen2-0.5b-instruct" in names
    recipe = RegisteredModel("Qwen/Qwen2-0.5B-Instruct", model_provider="pai").training_recipe("QLoRA_LLM")
    assert recipe.model_name == "qwen2-0.5b-instruct"
    assert recipe.hyperparameters["load_in_4bit"] is True


def test_secrets_are_shown_nowhere(home: Path, prefs: Path) -> None:
    session = setup_default_session(
        access_key_id="AKID", access_key_secret="s3cr3t-value", security_token="t0ken-value"
    )
    saved = session.save_config().read_text()
    for text in (repr(session), repr(session.options), saved):
        assert "s3cr3t-value" not in text
        assert "t0ken-value" not in text
    assert session.environment()["AWS_SECRET_ACCESS_KEY"] == "s3cr3t-value"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"inputs": {"trian": "p.json"}}, "trian"), ({"inputs": {"train": "p.json"}, "job_name": "a/b"}, "job_name")],
)
def test_what_costs_nothing_to_check_is_checked_before_the_weights_are_looked_for(
    arguments: dict[str, Any], word: str
) -> None:
    recipe = ModelTrainingRecipe(model_name="mine", model_uri="/nowhere/at/all")
    with pytest.raises(ConfigurationError, match=word):
        recipe.train(**arguments)


@pytest.mark.parametrize(
    ("rows", "given", "warns"),
    [
        ([{"prompt": "p", "chosen": "c", "rejected": "r"}], {}, True),
        ([{"prompt": "p", "chosen": "c", "rejected": "r"}], {"training_strategy": "sft"}, False),
        ([{"instruction": "p", "output": "c"}], {}, False),
    ],
)
def test_sft_by_default_on_pairs_says_that_rejected_is_ignored(
    session: Session, rows: list[dict[str, str]], given: dict[str, str], warns: bool
) -> None:
    spec = train_spec(given=given)
    with checked_inputs({"train": rows}, session, strategy="sft", bad_rows="refuse") as checked:
        text = imitation_note(spec, checked)
    assert bool(text) is warns
    if warns:
        assert "`rejected` is ignored" in text
        assert 'hyperparameters={"training_strategy": "dpo"}' in text
