"""What an estimate says when something is wrong or not known: a problem is in it, not an exception."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from palate import ModelTrainingRecipe, Session, TrainingJob
from palate.errors import ConfigurationError, HyperparameterError
from palate.estimate import Estimate, _earlier_rates, _tokenizer_folder, _with_time
from palate.preflight import few_steps_note, optimizer_steps, without_needless_notes
from palate.runs.record import Record
from palate_recipes.hyperparameters import DeviceFacts, resolve
from palate_recipes.specs.weights import WeightsSource
from tests.support.manifests import train_manifest, train_spec

DPO = {"training_strategy": "dpo"}
ROW = {"prompt": "Is it?", "chosen": "Yes, it is.", "rejected": "No."}


def write(path: Path, *rows: object) -> Path:
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip(
        "huggingface_hub.constants"
    )  # before the variable is set: it is read once, for the whole process
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def test_problems_are_in_the_estimate(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = DeviceFacts(cuda=False, bf16=False, fp16=False, memory_gib=8.0)
    monkeypatch.setattr(type(session.backend), "device", lambda self, placement=None: small)
    recipe = ModelTrainingRecipe("qwen2-72b-instruct", method="Standard_LLM", hyperparameters=DPO)
    found = recipe.estimate({"train": tmp_path / "absent.json", "adapter": "/nowhere/adapter"})
    adapter, data, memory = found.errors
    assert "/nowhere/adapter" in adapter
    assert "absent.json: no such file" in data
    assert "needs at least 10" in memory
    assert (found.rows, found.tokens, found.steps) == (None, None, None)
    assert found.memory_gib is not None
    assert found.memory_gib > 1000
    assert found.memory_available_gib == 8.0
    assert "no training data" in recipe.estimate({}).errors[0]
    assert TrainingJob.list() == []


def test_a_tokenizer_out_of_reach_leaves_the_tokens_out(session: Session, tmp_path: Path) -> None:
    data = write(tmp_path / "p.json", *[{**ROW, "prompt": f"Is it {number}?"} for number in range(9)], {"a": 1})
    recipe = ModelTrainingRecipe(
        "qwen2-0.5b-instruct",
        hyperparameters={**DPO, "bad_rows": "skip", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    )
    found = recipe.estimate({"train": data})
    assert (found.rows, found.skipped_rows, found.tokens, found.truncated_rows, found.errors) == (9, 1, None, None, ())
    assert found.steps == optimizer_steps(9, recipe._spec().hyperparameters, gpus=1) == 3
    assert any(
        "tokens are not counted: hf://Qwen/Qwen2-0.5B-Instruct is not complete in the hub's cache" in text
        for text in found.warnings
    )


def test_a_bad_setting_or_model_is_an_exception(session: Session, tmp_path: Path) -> None:
    with pytest.raises(HyperparameterError):
        ModelTrainingRecipe("qwen2-0.5b-instruct", hyperparameters={"lr": 1}).estimate({})
    with pytest.raises(ConfigurationError, match="not a folder"):
        ModelTrainingRecipe(model_uri=str(tmp_path / "absent")).estimate({})


@pytest.mark.parametrize(
    ("settings", "gpus", "steps"),
    [
        ({"num_train_epochs": 3}, 1, 9),  # 5 batches, 3 steps an epoch
        ({"num_train_epochs": 1.5}, 1, 5),
        ({"num_train_epochs": 3}, 4, 3),
        ({"max_steps": 7}, 1, 7),
    ],
)
def test_steps(settings: dict[str, float], gpus: int, steps: int) -> None:
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    values = train_spec(hyperparameters={**batches, **settings}).hyperparameters
    assert optimizer_steps(10, values, gpus=gpus) == steps


@pytest.mark.parametrize(
    ("examples", "settings", "gpus", "words"),
    [
        (12, {}, 1, "2 optimizer steps (12 examples, 8 per step, num_train_epochs=1) are too few"),
        (12, {}, 1, "set num_train_epochs=10 for 20 steps or more"),
        (
            12,
            {},
            1,
            "lower gradient_accumulation_steps or per_device_train_batch_size, or raise learning_rate from 5e-05",
        ),
        (3, {"num_train_epochs": 0.5}, 1, "1 optimizer step (3 examples, 8 per step, num_train_epochs=0.5)"),
        (72, {}, 8, "2 optimizer steps (72 examples, 64 per step"),
        (72, {}, 1, "9 optimizer steps"),
        (80, {}, 1, ""),
        (12, {"max_steps": 2}, 1, ""),  # as many as were asked for
        (0, {}, 1, ""),  # an error of its own
    ],
)
def test_too_few_steps_are_a_note_with_the_remedy(
    examples: int, settings: dict[str, float], gpus: int, words: str
) -> None:
    note = few_steps_note(examples, train_spec(hyperparameters=settings).hyperparameters, gpus=gpus)
    assert words in note
    assert bool(note) is bool(words)


def test_the_estimate_warns_of_too_few_steps(session: Session, tmp_path: Path) -> None:
    data = write(tmp_path / "p.json", *[{**ROW, "prompt": f"Is it {number}?"} for number in range(9)])
    found = ModelTrainingRecipe("qwen2-0.5b-instruct", hyperparameters=DPO).estimate({"train": data})
    assert [text[:18] for text in found.warnings if "too few" in text] == ["2 optimizer steps "]


@pytest.mark.parametrize(("parameters", "kept"), [(1e8, False), (1.5e9, True), (0, True)])
def test_weights_that_are_not_in_4_bits_are_told_of_where_memory_is_tight(parameters: float, kept: bool) -> None:
    device = DeviceFacts(cuda=False, bf16=False, fp16=False, memory_gib=8.0)
    resolved = resolve({}, method="LoRA_LLM", device=device)
    spec = replace(train_spec(), hyperparameters=resolved.values, notes=(*resolved.notes, "another"))
    shown = without_needless_notes(spec, parameters, device).notes
    assert shown == (
        ("load_in_4bit is false: " + resolved.notes[0].partition(": ")[2], "another") if kept else ("another",)
    )


@pytest.mark.parametrize("inputs", ["p.json", [ROW], [("train", "p.json")], 5])
def test_inputs_that_are_not_by_channel_are_an_error_in_words(session: Session, inputs: Any) -> None:
    recipe = ModelTrainingRecipe("qwen2-0.5b-instruct", hyperparameters=DPO)
    assert "not a dict by channel" in recipe.estimate(inputs).errors[0]
    with pytest.raises(ConfigurationError, match="not a dict by channel") as failed:
        recipe.train(inputs)
    remedy = 'give inputs={"train": "p.json"}' if inputs == "p.json" else 'give inputs={"train": …}'
    assert remedy in str(failed.value)


def earlier_job(session: Session, name: str, rate: str) -> None:
    """Writes the record of a succeeded job that logged this number, as JSON, as its rate."""
    record = Record(session.store, "jobs", name)
    record.create(train_manifest(name))
    record.append("metrics", 1, b'{"kind": "start", "step": 0, "device": "CPU"}\n')
    record.append("metrics", 2, b'{"kind": "end", "step": 1, "tokens_per_s": ' + rate.encode() + b"}\n")
    record.advance("Succeeded", expect={"Creating"})


def test_rates_that_no_job_can_have_are_left_out(session: Session) -> None:
    for index, rate in enumerate(("1" + "0" * 400, "1e999", "NaN", "-3", "0", "5e-324", '"9"', "null", "2.5")):
        earlier_job(session, f"job-{index}", rate)
    assert _earlier_rates("CPU", train_spec(), session) == {"job-8": 2.5}


def test_the_time_of_a_number_of_steps_counts_the_answers_of_pairs(session: Session) -> None:
    earlier_job(session, "one", "100")
    spec = train_spec(
        hyperparameters={"max_steps": 10, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    )
    known = Estimate(
        rows=20, tokens=4000, dropped_rows=0, steps=10, seq_length=64, memory_available_gib=1,
        backend="process", device="CPU", precision="float32",
    )  # fmt: skip
    # 40 answers of 20 pairs, 4 a step: 10 steps are one epoch.
    assert _with_time(known, 40, spec, session, 1).seconds == (40.0, 40.0)


def test_a_tokenizer_in_a_store_takes_no_file_outside_its_folder(tmp_path: Path, session: Session) -> None:
    model = tmp_path / "bucket" / "model"
    for name in ("config.json", "checkpoint-1/trainer_state.json", "additional_chat_templates/a.jinja"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("{}")
    source = WeightsSource(kind="store", location=model.as_uri())
    with _tokenizer_folder(source, session) as folder:
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json", "additional_chat_templates/a.jinja"}
