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

STEPS = 40
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lora_dropout": 0.2,  # drawn from the random state that the checkpoint holds: an evaluation must not move it
    "eval_steps": 1,  # due at whatever step the stop comes
    "save_steps": 1000,
    "max_steps": STEPS,
    "held_out": preference_rows(4),
}


def evaluations(events: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(event["step"], event["eval_loss"]) for event in events if event["kind"] == "eval"]


def test_a_resumed_run_has_every_evaluation(tiny: Path, tmp_path: Path) -> None:
    whole = train(spec(tiny, tmp_path / "whole", **SETTINGS))
    assert [step for step, _ in evaluations(whole)] == [*range(1, STEPS + 1)]

    broken = spec(tiny, tmp_path / "broken", **SETTINGS)
    program = start(broken)
    try:
        until(lambda: training(broken) or program.poll() is not None, timeout_s=240)
        program.send_signal(signal.SIGTERM)
        assert program.wait(timeout=60) == EXIT_STOPPED, log_of(broken)[-3000:]
    finally:
        program.kill()
        program.wait()
    out = tmp_path / "broken" / "out"
    (mark,) = (out / "checkpoints").glob(f"checkpoint-*/{COMPLETE_MARK}")
    stopped_at = int(mark.parent.name.removeprefix("checkpoint-"))
    first = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max([0, *(step for step, _ in evaluations(first))]) == stopped_at - 1  # the one that was lost

    second = train(spec(tiny, tmp_path / "resumed", resume_from=str(mark.parent), **SETTINGS))
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
