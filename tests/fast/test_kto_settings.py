"""KTO's hyperparameters, and how a KTO run is read: no model is needed for either."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import asdict

from palate_recipes.errors import HyperparameterError
from palate_recipes.hyperparameters import DeviceFacts, Resolved, resolve, validate
from palate_recipes.specs.diagnose import Reading, read_run

CPU = DeviceFacts(cuda=False, bf16=False, fp16=False)


def refusal(values: dict[str, object]) -> str:
    with pytest.raises(HyperparameterError) as error:
        validate(values, method="LoRA_LLM")
    return str(error.value)


def resolved(**values: object) -> Resolved:
    return resolve(values, method="LoRA_LLM", device=CPU)


def test_a_batch_has_four_answers_unless_a_size_is_given() -> None:
    silent = resolved(training_strategy="kto")
    assert silent.values.per_device_train_batch_size == 4
    assert any("per_device_train_batch_size is 4" in note for note in silent.notes)
    asked = resolved(training_strategy="kto", per_device_train_batch_size=2)
    assert asked.values.per_device_train_batch_size == 2
    assert not any("per_device_train_batch_size" in note for note in asked.notes)
    assert resolved(training_strategy="dpo").values.per_device_train_batch_size == 1


def test_resolved_values_resolve_to_themselves() -> None:
    first = resolved(training_strategy="kto", desirable_weight=1.3)
    again = resolved(**asdict(first.values))
    assert again.values == first.values
    assert not any("no effect" in note for note in again.notes)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"per_device_train_batch_size": 1}, "set at least 2"),
        ({"loss_type": "ipo"}, "kto has its own loss"),
        ({"loss_weights": [2.0]}, "kto has its own loss"),
        ({"label_smoothing": 0.1}, "kto has its own loss"),
        ({"ld_alpha": 0.5}, "kto has its own loss"),
        ({"discopop_tau": 0.1}, "kto has its own loss"),
        ({"fsdp": "full_shard", "load_in_4bit": False}, "kto does not support sharded weights"),
        ({"desirable_weight": 0, "undesirable_weight": 0}, "the loss would always be 0"),
        ({"desirable_weight": -1}, "a number from 0 to 1000"),
        ({"kto_chosen_weight": 1.5}, "did you mean desirable_weight?"),
        ({"kto_rejected_weight": 1.5}, "did you mean undesirable_weight?"),
        ({"loss_type": "kto"}, "training_strategy=kto"),
    ],
)
def test_what_kto_cannot_use_is_refused(values: dict[str, object], part: str) -> None:
    assert part in refusal({"training_strategy": "kto", **values})


def test_weights_are_ktos_alone() -> None:
    for strategy in ("dpo", "sft"):
        assert "only kto uses it" in refusal({"training_strategy": strategy, "desirable_weight": 1.3})
    notes = resolved(undesirable_weight=0.5).notes  # no strategy was given: it is the default
    assert sum("undesirable_weight has no effect" in note for note in notes) == 1
    assert validate({"training_strategy": "kto", "desirable_weight": "1.3"}, method="LoRA_LLM")[
        "desirable_weight"
    ] == pytest.approx(1.3)


def read(losses: list[float], margins: list[float | None]) -> Reading:
    events: list[dict[str, Any]] = [{"kind": "start", "step": 0, "strategy": "kto", "learning_rate": 1e-4}]
    for step, (loss, margin) in enumerate(zip(losses, margins, strict=True), 1):
        event = {"kind": "train", "step": step, "epoch": step / 10, "loss": loss}
        events.append(event if margin is None else {**event, "rewards/margins": margin})
    return read_run(events)


def test_a_kto_run_is_read_by_its_loss_and_its_margin() -> None:
    steps = range(40)
    learning = read([0.5 - 0.005 * step for step in steps], [None if step % 5 == 0 else 0.05 * step for step in steps])
    assert learning.verdict == "learning"
    assert "the reward of good training answers is" in learning.text
    assert "pairs" not in learning.text
    flat = read([0.5] * 40, [0.1 * (-1) ** step for step in steps])
    assert flat.verdict == "not learning"
    assert "good and bad answers differ" in flat.text
    slow = read([0.499] * 40, [0.002 * step for step in steps])
    assert slow.verdict == "not learning"
    assert "Raise learning_rate from 0.0001 to 0.001" in slow.text
    assert "check the data" in read([0.5] * 40, [0.0] * 40).text
    assert read([0.5] * 5, [0.0] * 5).verdict == "too early to tell"
