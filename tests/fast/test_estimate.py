"""What an estimate says when something is wrong or not known: a problem is in it, not an exception."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from palate import ModelTrainingRecipe, Session, TrainingJob
from palate.cli.train import print_estimate
from palate.errors import ConfigurationError, HyperparameterError
from palate.estimate import Estimate, _earlier_rates, _tokenizer_folder, _with_time
from palate.preflight import few_steps_note, optimizer_steps, without_needless_notes
from palate.runs.record import Record
from palate.sources.inputs import checked_inputs
from palate.submit import peak_note
from palate_recipes.hyperparameters import DeviceFacts, resolve
from palate_recipes.specs.weights import WeightsSource
from palate_recipes.training_memory import (
    RowTokens,
    memory_warning,
    peak_memory_gib,
    tokens_of_characters,
)
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


# ── the expected peak ─────────────────────────────────────────────────────────────────────────────────────────────

SMOLLM2 = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
PLAIN = {**DPO, "load_in_4bit": False, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 8}
DEMO = RowTokens(count=136, mean=120, deviation=8, largest=145)


def peak(rows: RowTokens | None = DEMO, available: float = 16.0, cuda: bool = False, **given: Any) -> float | None:
    """The expected peak of a training of SmolLM2-135M; `config` and `parameters` may be replaced, the rest is its spec."""
    config, parameters = given.pop("config", SMOLLM2), given.pop("parameters", 134.5e6)
    fields = {name: given.pop(name) for name in ("method", "precision") if name in given}
    spec = train_spec(hyperparameters={**PLAIN, **given}, **fields)
    return peak_memory_gib(spec, parameters, config, rows, available_gib=available, cuda=cuda)


@pytest.mark.parametrize(
    "steps",
    [
        [{"per_device_train_batch_size": size} for size in (1, 2, 8, 32)],
        [{"lora_dim": rank} for rank in (4, 8, 32, 128)],
        [{"rows": replace_rows} for replace_rows in (RowTokens(136, mean, 8, 2 * mean) for mean in (60, 120, 500))],
        [{"rows": RowTokens(136, 120, spread, 400)} for spread in (0, 8, 60)],
        [{"gradient_checkpointing": True}, {"lora_dropout": 0.0}, {"lora_dropout": 0.1}],
        [{"precision": "bfloat16"}, {"precision": "float32"}, {"method": "Standard_LLM"}],
        [{"training_strategy": "sft"}, {"training_strategy": "dpo"}],
        [{"load_in_4bit": True}, {"load_in_8bit": True}, {}],
        [{"method": "Standard_LLM"}, {"method": "Standard_LLM", "training_strategy": "kto"}],
    ],
)
def test_the_expected_peak_grows_with_what_a_step_holds(steps: list[dict[str, Any]]) -> None:
    found = [peak(**step) for step in steps]
    assert None not in found
    assert found == sorted(set(found))  # type: ignore[type-var]


def test_batches_that_run_as_one_forward_pass_count_together() -> None:
    one, joined = (peak(per_device_train_batch_size=1, gradient_accumulation_steps=steps) for steps in (1, 4))
    assert one is not None
    assert joined is not None
    assert joined > 1.1 * one
    # A loss that compares the rows of a batch keeps its batches.
    alone = peak(per_device_train_batch_size=1, gradient_accumulation_steps=4, loss_type="aot")
    assert alone == pytest.approx(one, rel=0.02)


@pytest.mark.parametrize(
    "unknown",
    [
        {"rows": None},
        {"rows": RowTokens(0, 0, 0, 0)},
        {"config": None},
        {"parameters": 0},
        {"config": {**SMOLLM2, "hidden_size": None}},
        {"config": {**SMOLLM2, "num_attention_heads": "9"}},
        {"config": {**SMOLLM2, "num_local_experts": 8}},
    ],
)
def test_the_expected_peak_is_none_where_a_fact_is_unknown(unknown: dict[str, Any]) -> None:
    assert peak(**unknown) is None


def warning(available: float, rows: RowTokens | None = DEMO, cuda: bool = False, **given: Any) -> str:
    spec = train_spec(hyperparameters={**PLAIN, "seq_length": 128, **given})
    return memory_warning(spec, 134.5e6, SMOLLM2, rows, available_gib=available, cuda=cuda)


@pytest.mark.parametrize(
    ("available", "given", "remedy"),
    [
        # The nearest batch that fits, with the same rows per step.
        (
            2.3,
            {},
            "Set per_device_train_batch_size=4 with gradient_accumulation_steps=2, or gradient_checkpointing=true",
        ),
        (2.3, {"per_device_train_batch_size": 1}, ""),
        # KTO's divergence is estimated per batch, so its batch is not made smaller.
        (2.8, {"training_strategy": "kto"}, "Set gradient_checkpointing=true"),
        (2.3, {"loss_type": "aot"}, "Set gradient_checkpointing=true"),
        (0.9, {}, "Use a smaller model, or a machine with more memory"),
    ],
)
def test_a_peak_above_the_free_memory_is_a_warning_with_settings_that_fit(
    available: float, given: dict[str, Any], remedy: str
) -> None:
    said = warning(available, **given)
    assert bool(said) is bool(remedy)
    assert remedy in said
    assert not remedy or f"{available:.1f} GiB are free" in said


def test_settings_of_a_warning_fit() -> None:
    said = warning(2.3)
    assert "or seq_length=32" in said
    for changed in (
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
    ):
        assert warning(2.3, **changed) == ""


def test_without_facts_nothing_is_warned_of() -> None:
    assert warning(1.0, rows=None) == warning(0.0) == ""
    assert "not calibrated on GPUs" in warning(1.0, cuda=True)


def test_tokens_are_guessed_from_characters_up_to_the_cut() -> None:
    def lengths(mean: int) -> dict[str, dict[str, int]]:
        return {name: {"mean": mean, "p95": 2 * mean, "max": 4 * mean} for name in ("prompt", "chosen", "rejected")}

    short = tokens_of_characters(lengths(100), 50, strategy="dpo", seq_length=1024)
    assert short is not None
    assert 75 <= short.mean <= 100
    assert short.mean < short.mean + short.deviation < short.largest
    long = tokens_of_characters(lengths(100_000), 50, strategy="dpo", seq_length=1024)
    assert long == RowTokens(50, 2048, 0, 2048)
    answers = tokens_of_characters(lengths(100), 50, strategy="kto", seq_length=1024)
    assert answers is not None
    assert answers.count == 100
    assert answers.mean < short.mean
    assert tokens_of_characters({}, 50, strategy="dpo", seq_length=1024) is None


def test_train_warns_by_the_characters_of_its_rows(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = DeviceFacts(cuda=False, bf16=False, fp16=False, memory_gib=2.0)
    monkeypatch.setattr(type(session.backend), "device", lambda self, placement=None: small)
    data = write(tmp_path / "p.json", *[{**ROW, "prompt": f"Is it {number}? " * 60} for number in range(64)])
    spec = train_spec(hyperparameters={**PLAIN, "per_device_train_batch_size": 16, "seq_length": 512})
    with checked_inputs({"train": data}, session, strategy="dpo", bad_rows="error") as checked:
        said = peak_note(spec, 134.5e6, SMOLLM2, session, checked["train"])
        unknown = peak_note(spec, 134.5e6, None, session, checked["train"])
    assert "and 2.0 GiB are free" in said
    assert "Set per_device_train_batch_size=" in said
    assert unknown == ""


def test_a_price_per_hour_gives_the_price_of_the_time(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = Estimate(
        seq_length=8, memory_available_gib=1.0, backend="process", device="CPU", precision="float32",
        tokens=1, tokens_per_s=(1.0, 2.0), seconds=(1800.0, 3600.0), rate_source=("one",),
    )  # fmt: skip
    monkeypatch.setattr("palate.estimate.estimate", lambda *_, **__: known)
    recipe = ModelTrainingRecipe("qwen2-0.5b-instruct", hyperparameters=DPO)
    assert recipe.estimate({}).price is None
    found = recipe.estimate({}, price_per_hour=4.0)
    assert found.price == (2.0, 4.0)
    print_estimate(found)
    assert "2.00 to 4.00" in capsys.readouterr().out
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match="price_per_hour"):
            recipe.estimate({}, price_per_hour=wrong)
