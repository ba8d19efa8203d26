"""Names, variables and secrets of trackers, without any of them."""

from __future__ import annotations

import json
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest

from palate_recipes.errors import HyperparameterError
from palate_recipes.hyperparameters import validate
from palate_recipes.specs.train import ERROR_FILE, EXIT_FAILED, LocalFiles, TrainTask
from palate_recipes.text import without_secrets
from palate_recipes.trackers import chosen, missing, variables
from tests.support.manifests import train_spec
from tests.support.rows import preference_rows


def test_report_to_takes_names_and_none() -> None:
    for given, value in (("trackio", "trackio"), (["MLflow", "wandb"], "mlflow,wandb"), ("none", "none")):
        assert validate({"report_to": given}, method="LoRA_LLM") == {"report_to": value}
    assert chosen("none") == []
    assert chosen("tensorboard,mlflow") == ["tensorboard", "mlflow"]
    for wrong, words in (("all", "must be one or"), ("none,mlflow", "none turns trackers off"), ("", "must be one or")):
        with pytest.raises(HyperparameterError, match=words):
            validate({"report_to": wrong}, method="LoRA_LLM")


def test_the_variables_of_the_chosen_trackers_are_taken() -> None:
    environment = {"MLFLOW_TRACKING_URI": "a", "WANDB_API_KEY": "b", "TRACKIO_DIR": "c", "PATH": "d"}
    assert variables("tensorboard", environment) == {}
    assert variables("none", environment) == {}
    assert variables("mlflow,wandb", environment) == {"MLFLOW_TRACKING_URI": "a", "WANDB_API_KEY": "b"}


def test_what_is_not_installed_is_named_with_the_remedy() -> None:
    assert missing("none") == ""
    assert missing("no_such_tracker").endswith("pip install no_such_tracker, or remove it from report_to")


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed, so it cannot be missing")
def test_the_trainer_refuses_a_tracker_that_is_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from palate_trainer.train import run

    data = tmp_path / "prefs.json"
    data.write_text(json.dumps(preference_rows(2)))
    files = LocalFiles(model_dir=str(tmp_path), train_file=str(data), output_dir=str(tmp_path / "out"))
    settings = {"training_strategy": "dpo", "report_to": "tensorboard,wandb"}
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run(TrainTask(spec=train_spec(hyperparameters=settings), files=files)) == EXIT_FAILED
    finally:
        signal.signal(signal.SIGTERM, before)  # the program's own ends the process
    error = (tmp_path / "out" / ERROR_FILE).read_text()
    assert error.startswith("report_to=tensorboard,wandb: wandb is not installed in the environment that trains")
    assert error in capsys.readouterr().err


def test_texts_have_no_values_of_variables_and_no_credentials_of_urls() -> None:
    environment = {"WANDB_API_KEY": "0123456789", "LONGER": "0123456789-and-more", "FLAG": "1"}
    text = "401 for 0123456789 and 0123456789-and-more at https://user:pw@host/a and http://token@host, 1 time"
    expected = "401 for *** and *** at https://***@host/a and http://***@host, 1 time"
    assert without_secrets(text, environment, environment) == expected
