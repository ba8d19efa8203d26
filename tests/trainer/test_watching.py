"""What a real run says of itself: rates, memory, time left, TensorBoard, and readings that fit how it went."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from palate_recipes.specs.train import TENSORBOARD_DIR
from tests.trainer.support import spec, train

pytestmark = pytest.mark.slow

WORDS = [
    "river", "stone", "cloud", "lamp", "garden", "paper", "train", "music", "winter", "copper", "yellow", "seven", "orbit", "magnet",
]  # fmt: skip


@pytest.fixture(scope="module")
def loud(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with logits as large as a trained model's: only then can a learning rate be too high for it."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("loud") / "model"
    shutil.copytree(tiny, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 20
    model.save_pretrained(folder)
    return folder


def without_a_rule(count: int, seed: int) -> list[dict[str, str]]:
    """Pairs that can only be learned by heart."""
    pick = random.Random(seed)
    return [
        {
            "prompt": f"Question {pick.randrange(1000)}: {pick.choice(WORDS)}?",
            "chosen": " ".join(pick.sample(WORDS, 6)),
            "rejected": " ".join(pick.sample(WORDS, 6)),
        }
        for _ in range(count)
    ]


def with_a_rule(count: int, seed: int) -> list[dict[str, str]]:
    """Pairs whose better answer is always the plain one."""
    pick = random.Random(seed)
    rows = []
    for _ in range(count):
        one, other = pick.sample(WORDS, 2)
        prompt = f"Tell me about the {one} and the {other}."
        rows.append(
            {"prompt": prompt, "chosen": f"Honestly, {one} is plain.", "rejected": f"Wonderful, {other} is grand!"}
        )
    return rows


def watched(
    model: Path, folder: Path, rows: list[dict[str, str]], held_out: list[dict[str, str]], **settings: Any
) -> Any:
    """Trains with a validation file of its own and returns the metrics."""

    wanted = spec(model, folder, data=rows, seq_length=64, **settings)
    path = folder / "held-out.json"
    path.write_text(json.dumps(held_out))
    return train(wanted.changed(validation_file=str(path)))


def test_a_line_has_rates_memory_and_time_left_and_tensorboard_has_the_same(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = watched(
        tiny, tmp_path, with_a_rule(16, 1), with_a_rule(4, 2), logging_steps=2, save_steps=1, eval_steps=2
    )
    lines = [entry for entry in metrics if entry["kind"] == "train"]
    assert [entry["step"] for entry in lines] == [1, 2, 4]
    for entry in lines:
        assert entry["tokens_per_s"] > entry["pairs_per_s"] > 0
        assert entry["memory_gb"] > 0.05
        assert entry["tokens_per_s"] / entry["pairs_per_s"] == pytest.approx(
            entry["tokens"] / (4 * (2 if entry["step"] == 4 else 1)), rel=0.01
        )
    assert all(0 < entry["seconds_left"] < 60 for entry in lines[:2])

    from transformers import AutoTokenizer

    from palate_recipes.preferences.row import plain_row
    from palate_trainer.tokenize import Renderer

    renderer = Renderer(AutoTokenizer.from_pretrained(tiny), True, "You are a helpful assistant", 64)
    rows = [plain_row(row["prompt"], row["chosen"], row["rejected"], 1) for row in with_a_rule(16, 1)]
    encoded = [renderer.encode(row)[0] for row in rows]
    assert sum(entry["tokens"] for entry in lines) == sum(
        len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in encoded
    )

    end = metrics[-1]
    assert end["reading"]["verdict"] == "too early to tell"
    assert end["tokens_per_s"] > 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "reading: {verdict}. {text}".format(**end["reading"])
    first = "step 1 is the untrained model, whose exact loss is 0.693"
    assert any(line.startswith(first) and line.endswith("means over the steps since the line before") for line in said)
    assert any(line.startswith("step 2/4 loss 0.6") and line.endswith(" s left") for line in said)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "out" / TENSORBOARD_DIR))
    board.Reload()
    names = set(board.Tags()["scalars"])
    same = "loss grad_norm learning_rate rewards/margins rewards/accuracies pairs_per_s tokens_per_s memory_gb seconds_left"
    assert {f"train/{name}" for name in same.split()} <= names
    assert {"eval/loss", "eval/rewards/margins"} <= names
    for name in ("tokens_per_s", "loss"):
        points = [(point.step, point.value) for point in board.Scalars(f"train/{name}")]
        assert points == [(entry["step"], pytest.approx(entry[name], rel=1e-4)) for entry in lines]


@pytest.mark.thorough
def test_tensorboard_shows_each_step_of_a_resumed_run_once(tiny: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_train_epochs": 2, "save_steps": 3}
    train(spec(tiny, tmp_path / "whole", **settings))
    # As a runner stages it: with the events of all steps, and a checkpoint before the last ones.
    whole, resumed = tmp_path / "whole" / "out", tmp_path / "resumed" / "out"
    shutil.copytree(whole / TENSORBOARD_DIR, resumed / TENSORBOARD_DIR)
    checkpoint = whole / "checkpoints" / "checkpoint-3"
    train(spec(tiny, tmp_path / "resumed", resume_from=str(checkpoint), **settings))

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(resumed / TENSORBOARD_DIR))
    board.Reload()
    assert [point.step for point in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_has_sane_rates_and_time_left(tiny: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_train_epochs": 4, "save_steps": 6, "learning_rate": 1e-3}
    train(spec(tiny, tmp_path / "whole", **settings))
    checkpoint = tmp_path / "whole" / "out" / "checkpoints" / "checkpoint-6"
    metrics = train(spec(tiny, tmp_path / "resumed", resume_from=str(checkpoint), **settings))
    first, *_, last = [entry for entry in metrics if entry["kind"] == "train"]
    assert first["step"] == 7
    assert 0 < first["seconds_left"] < 30
    # Four pairs a step: a rate that took the steps before the checkpoint for its own would say far more.
    assert 4 / first["pairs_per_s"] <= first["seconds"] + 0.01
    assert last["seconds_left"] == pytest.approx(0, abs=2)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(
    ("rows", "settings", "verdict", "words"),
    [
        (with_a_rule, {"learning_rate": 1e-6}, "not learning", "Raise learning_rate from 1e-06 to 1e-05"),
        (without_a_rule, {"learning_rate": 0.1}, "unstable", "Lower learning_rate from 0.1 to 0.0"),
        (with_a_rule, {"learning_rate": 1e-3}, "saturated", "every pair was right"),
    ],
)
def test_the_reading_fits_the_learning_rate(
    loud: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: Any, settings: Any, verdict: str, words: str
) -> None:
    metrics = watched(loud, tmp_path, rows(100, 1), rows(8, 2), **settings)
    assert metrics[-1]["reading"]["verdict"] == verdict
    assert words in metrics[-1]["reading"]["text"]
    assert ("note: the loss is diverging" in capsys.readouterr().out) == (verdict == "unstable")


@pytest.mark.usefixtures("precision")
def test_a_rule_that_is_learned_in_the_course_of_the_run_is_learning(tiny: Path, tmp_path: Path) -> None:
    metrics = watched(tiny, tmp_path, with_a_rule(100, 1), with_a_rule(8, 2), learning_rate=1e-3)
    assert metrics[-1]["reading"]["verdict"] == "learning"


@pytest.mark.usefixtures("precision")
def test_few_rows_and_many_epochs_are_over_fitting_and_noted_early(
    loud: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = watched(
        loud, tmp_path, without_a_rule(24, 1), without_a_rule(24, 2), learning_rate=3e-3, num_train_epochs=12
    )
    assert metrics[-1]["reading"]["verdict"] == "over-fitting"
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: the validation loss")]
    assert "has risen twice" in note
