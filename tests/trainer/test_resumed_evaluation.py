"""A run that is ended where an evaluation was due, and resumed: it has every evaluation of an unbroken run, and its losses."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from palate.runs.record import events_once
from palate_recipes.specs.events import Curves
from palate_recipes.specs.train import COMPLETE_MARK, EXIT_STOPPED
from tests.slow.conftest import until
from tests.support.rows import preference_rows
from tests.trainer.support import losses, spec, train
from tests.trainer.test_parallel import log_of, start, training
from tests.trainer.test_training import program, wait_for

STEPS = 40
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lora_dropout": 0.2,  # drawn from the random state that the checkpoint holds: an evaluation must not move it
    "save_steps": 1000,
    "max_steps": STEPS,
    "held_out": preference_rows(16),  # the stop most likely comes during an evaluation
}
DUE = {
    "steps": {"eval_steps": 1},
    "epoch": {"eval_steps": 0, "rows": 4, "num_train_epochs": STEPS},  # an epoch is one step
}
"""An evaluation at every step, at whatever step the stop comes: of the steps, or of the epochs."""


def evaluations(events: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(event["step"], event["eval_loss"]) for event in events if event["kind"] == "eval"]


@pytest.mark.slow
@pytest.mark.parametrize("due", DUE)
def test_a_resumed_run_has_every_evaluation(small: Path, tmp_path: Path, due: str) -> None:
    settings = {**SETTINGS, **DUE[due]}
    whole = train(spec(small, tmp_path / "whole", **settings))
    assert [step for step, _ in evaluations(whole)] == [*range(1, STEPS + 1)]

    broken = spec(small, tmp_path / "broken", **settings)
    process = start(broken)
    try:
        until(lambda: training(broken) or process.poll() is not None, timeout_s=240)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == EXIT_STOPPED, log_of(broken)[-3000:]
    finally:
        process.kill()
        process.wait()
    out = tmp_path / "broken" / "out"
    (mark,) = (out / "checkpoints").glob(f"checkpoint-*/{COMPLETE_MARK}")
    stopped_at = int(mark.parent.name.removeprefix("checkpoint-"))
    first = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max([0, *(step for step, _ in evaluations(first))]) == stopped_at - 1  # the one that was lost

    second = train(spec(small, tmp_path / "resumed", resume_from=str(mark.parent), **settings))
    once = events_once([{**event, "attempt": 1} for event in first] + [{**event, "attempt": 2} for event in second])
    for (step, loss), (whole_step, whole_loss) in zip(evaluations(once), evaluations(whole), strict=True):
        assert step == whole_step
        assert loss == pytest.approx(whole_loss, abs=1e-5)
    assert losses(once) == pytest.approx(losses(whole), abs=1e-5)


def test_an_evaluation_that_was_made_twice_counts_once() -> None:
    """The first attempt was killed after its evaluation was uploaded, and resumes from a checkpoint without it."""
    begin = {"kind": "start", "step": 0}
    step = {"kind": "train", "step": 20, "loss": 0.5}
    first = [begin, step, {"kind": "eval", "step": 20, "eval_loss": 0.61}]
    second = [{**begin, "step": 20}, {"kind": "eval", "step": 20, "eval_loss": 0.6}, {**step, "step": 30}]
    once = events_once([{**event, "attempt": 1} for event in first] + [{**event, "attempt": 2} for event in second])
    assert evaluations(once) == [(20, 0.6)]
    assert [point.step for point in Curves.of([*first, *second]).validation] == [20]


@pytest.mark.slow
@pytest.mark.parametrize(
    "due",
    [
        {"eval_steps": 3, "max_steps": 3},
        pytest.param({"eval_steps": 0, "num_train_epochs": 1, "rows": 12}, marks=pytest.mark.thorough),
        pytest.param({"eval_steps": 2, "max_steps": 3, "save_steps": 1}, marks=pytest.mark.thorough),
    ],
    ids=["only", "epoch", "last"],
)
def test_a_stop_in_the_last_evaluation_leaves_the_best_model_to_the_resumed_run(
    small: Path, tmp_path: Path, due: dict[str, Any], precision: str
) -> None:
    """Without the evaluation that was stopped, the best model would be an earlier one, or none."""
    settings = {
        "learning_rate": 1e-3,
        "held_out": preference_rows(100),  # takes many times as long as a look at the metrics
        "load_best_model_at_end": True,
        "precision": precision,
        **due,
    }
    whole = train(spec(small, tmp_path / "whole", **settings))
    assert whole[-1]["best_step"] == 3

    broken = spec(small, tmp_path / "broken", **settings)
    out = tmp_path / "broken" / "out"
    process = program(broken, tmp_path / "broken")
    try:
        wait_for(process, out, '"kind": "train", "attempt": 1, "step": 3')
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == EXIT_STOPPED, output[-2000:]
    finally:
        process.kill()
        process.wait()
    assert not (out / "model").exists()
    first = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert 3 not in [step for step, _ in evaluations(first)]

    checkpoint = out / "checkpoints" / "checkpoint-3"
    second = train(broken.changed(resume_from=str(checkpoint), attempt=2))[len(first) :]
    assert losses(second) == []
    assert [step for step, _ in evaluations(second)] == [3]
    assert (second[-1]["best_step"], second[-1]["best_metric"]) == (
        3,
        pytest.approx(whole[-1]["best_metric"], abs=1e-5),
    )
