"""DPO after SFT through the client: the adapter of one job is an input of the next, over every store."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from msgspec import to_builtins

from palate import ModelTrainingRecipe, Session
from palate.errors import JobNotReadyError

pytestmark = pytest.mark.slow

QUICK = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "logging_steps": 1}


def recipe(model: Path, **hyperparameters: object) -> ModelTrainingRecipe:
    return ModelTrainingRecipe(model_name="tiny", model_uri=str(model), hyperparameters={**QUICK, **hyperparameters})


@pytest.mark.parametrize("store_session", ["s3", pytest.param("file", marks=pytest.mark.thorough)], indirect=True)
def test_a_job_goes_on_from_the_adapter_of_another(
    store_session: Session, tiny: Path, prefs: Path, precision: str
) -> None:
    first = recipe(tiny, precision=precision, training_strategy="sft", lora_dim=4, learning_rate=1e-2).train(
        inputs={"train": prefs}, job_name="sft", show_logs=False
    )
    second = recipe(tiny, precision=precision, training_strategy="dpo", max_steps=2).train(
        inputs={"train": prefs, "adapter": first.model_uri}, job_name="dpo", show_logs=False
    )
    body = second.manifest.body
    assert body.hyperparameters.lora_dim == 4
    assert set(to_builtins(body.inputs["adapter"])) == {"uri", "sha256", "bytes"}
    step_0 = second.metrics()[1]
    near = 1e-3 if precision == "float32" else 2e-2  # the reference was scored in other batches
    assert step_0["loss"] == pytest.approx(math.log(2), abs=near)
    assert step_0["rewards/margins"] == pytest.approx(0, abs=near)
    store = store_session.store
    made = {info.key.removeprefix("jobs/dpo/model/") for info in store.list("jobs/dpo/model/")}
    assert not any(key.startswith("ref") for key in made)
    config = json.loads(store.get("jobs/dpo/model/adapter_config.json"))
    assert (config["r"], config["base_model_name_or_path"]) == (4, "tiny")


def test_a_job_without_a_model_has_no_model_uri(store_session: Session, tiny: Path, prefs: Path) -> None:
    job = recipe(tiny, training_strategy="sft", num_train_epochs=1000).train(
        inputs={"train": prefs}, job_name="long", wait=False, show_logs=False
    )
    with pytest.raises(JobNotReadyError):
        _ = job.model_uri
    job.stop()
