"""The names that users import, and what importing them may load."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import palate
from palate import ModelTrainingRecipe, Predictor, RegisteredModel, Session, TrainingJob

HEAVY = ("torch", "transformers", "openai", "boto3", "botocore", "rich", "trl", "peft", "vllm", "httpx", "numpy")

PAI_RECIPE_PARAMETERS = [
    "model_name",
    "model_version",
    "model_provider",
    "model_uri",
    "method",
    "source_dir",
    "model_channel_name",
    "hyperparameters",
    "job_type",
    "image_uri",
    "command",
    "instance_count",
    "instance_type",
    "spot_spec",
    "instance_spec",
    "resource_id",
    "resource_type",
    "user_vpc_config",
    "labels",
    "requirements",
    "environments",
    "experiment_config",
    "input_channels",
    "output_channels",
    "max_run_time",
    "default_training_inputs",
    "base_job_name",
]


def loaded_by(line: str) -> set[str]:
    code = f"{line}\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "line",
    [
        "import palate",
        "from palate import ModelTrainingRecipe",
        "from palate import TrainingJob, Predictor, Session, RegisteredModel",
        "from palate.cli import app",
    ],
)
def test_importing_loads_nothing_heavy(line: str) -> None:
    assert loaded_by(line) & set(HEAVY) == set()


def test_import_palate_alone_loads_next_to_nothing() -> None:
    ours = subprocess.run(
        [sys.executable, "-c", "import palate, sys; print([m for m in sys.modules if m.startswith('palate')])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ours.stdout.strip() == "['palate_recipes', 'palate']"


def test_no_command_is_registered_twice() -> None:
    from palate.cli import app

    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert sorted(names) == sorted(set(names))
    assert {"train", "deploy", "jobs", "models", "doctor", "run"} <= set(names)


def test_the_public_names() -> None:
    assert set(palate.__all__) == {
        "ExperimentFile",
        "ModelTrainingRecipe",
        "PalateError",
        "Predictor",
        "PreferenceData",
        "RegisteredModel",
        "Session",
        "TrainingJob",
        "__version__",
        "compare",
        "get_default_session",
        "random_str",
        "setup_default_session",
    }
    for name in palate.__all__:
        assert getattr(palate, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = palate.no_such_name


def test_a_pai_script_needs_its_import_root_changed_and_nothing_else() -> None:
    code = (
        "from palate.session import get_default_session, setup_default_session, Session\n"
        "from palate.common.utils import random_str\n"
        "from palate.model import ModelTrainingRecipe, RegisteredModel\n"
        "from palate.predictor import Predictor\n"
        "from palate.job import TrainingJob\n"
        "assert len(random_str(6)) == 6\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_recipe_takes_pais_parameters_in_pais_order() -> None:
    parameters = inspect.signature(ModelTrainingRecipe.__init__).parameters
    positional = [name for name, item in parameters.items() if item.kind is item.POSITIONAL_OR_KEYWORD]
    assert positional[1:] == PAI_RECIPE_PARAMETERS
    assert [name for name, item in parameters.items() if item.kind is item.KEYWORD_ONLY] == [
        "backend",
        "session",
        "max_attempts",
    ]


def test_pais_methods_are_there() -> None:
    surface = {
        ModelTrainingRecipe: "train run deploy model_data latest_job wait hyperparameters hyperparameter_definitions",
        TrainingJob: "get attach list wait stop resume logs metrics reading status is_succeeded is_completed output_path deploy id",
        RegisteredModel: "list training_recipe deploy",
        Predictor: "openai async_openai raw_predict predict wait_for_ready wait describe_service logs start_service "
        "stop_service delete_service endpoint service_status access_token labels refresh",
        Session: "save_config get_storage_path_by_category",
    }
    for kind, names in surface.items():
        assert [name for name in names.split() if not hasattr(kind, name)] == []
