"""Curves in words: each verdict on a made curve, the remarks, the early notes, the pace, and the lines of progress."""

from __future__ import annotations

import math
from typing import Any

import pytest

from palate_recipes.specs.diagnose import read_run
from palate_recipes.specs.divergence import DivergenceWatch
from palate_recipes.specs.events import duration, progress_line
from palate_trainer.throughput import Throughput

START = {
    "kind": "start",
    "step": 0,
    "strategy": "dpo",
    "loss_type": "sigmoid",
    "learning_rate": 1e-4,
    "num_train_epochs": 4,
    "dpo_beta": 0.1,
    "train_rows": 200,
}
LN2 = math.log(2)


def loss_at(margin: float) -> float:
    return math.log1p(math.exp(-margin))


def run(
    margins: list[float],
    *,
    validation: list[float] | None = None,
    every: int = 2,
    accuracies: list[float] | None = None,
    chosen: float = 0.5,
    **start: Any,
) -> list[dict[str, Any]]:
    """A DPO run whose training margins are given, one log line each `every` steps, and validation losses evenly between."""
    events: list[dict[str, Any]] = [{**START, **start}]
    total, evaluations = every * len(margins), validation or []
    for index, margin in enumerate(margins):
        step = 1 if index == 0 else every * (index + 1)
        accuracy = accuracies[index] if accuracies else (0.5 if margin == 0 else 0.8)
        events.append(
            {
                "kind": "train",
                "step": step,
                "total_steps": total,
                "epoch": 4 * step / total,
                "loss": loss_at(margin),
                "rewards/margins": margin,
                "rewards/accuracies": accuracy,
                "rewards/chosen": chosen,
                "rewards/rejected": chosen - margin,
                "grad_norm": 1.0,
            }
        )
        if evaluations and (index + 1) * len(evaluations) % len(margins) < len(evaluations):
            done = (index + 1) * len(evaluations) // len(margins)
            events.append(
                {
                    "kind": "eval",
                    "step": step,
                    "total_steps": total,
                    "epoch": 4 * step / total,
                    "eval_loss": evaluations[done - 1],
                    "eval_rewards/margins": 0.5,
                    "eval_rewards/accuracies": 0.7,
                    "eval_rewards/chosen": chosen,
                    "eval_rewards/rejected": chosen - 0.5,
                }
            )
    return events


def ramp(first: float, last: float, count: int = 20) -> list[float]:
    return [first + (last - first) * index / (count - 1) for index in range(count)]


def test_a_margin_that_grows_is_learning_with_its_figures() -> None:
    reading = read_run(run(ramp(0, 1.5), validation=[0.6, 0.5, 0.45, 0.4]))
    assert reading.verdict == "learning"
    for words in (
        "went from 0.693 (ln 2, untrained) to",
        "validation loss to 0.400",
        "70% of the validation pairs",
        "margin of 0.50",
    ):
        assert words in reading.text


def test_a_validation_loss_that_rises_is_over_fitting_and_says_where_to_stop() -> None:
    reading = read_run(run(ramp(0, 3), validation=[0.5, 0.55, 0.7, 0.9]))
    assert reading.verdict == "over-fitting"
    for words in ("0.500, at step 10", "rose to 0.900", "num_train_epochs=1"):
        assert words in reading.text


def test_a_validation_loss_that_never_fell_means_memorized_rows() -> None:
    reading = read_run(run(ramp(0, 3), validation=[0.95]))
    assert reading.verdict == "over-fitting"
    assert "memorized" in reading.text


@pytest.mark.parametrize(
    ("margins", "accuracies", "words"),
    [
        ([0.001] * 20, [0.5] * 20, "check the data"),
        (ramp(0, 0.02), [0.95] * 20, "aise learning_rate from 0.0001 to 0.001"),
        ([0.1, -0.12] * 10, [0.5] * 20, "lower learning_rate from 0.0001 to 1e-05"),
    ],
)
def test_a_flat_loss_is_not_learning_and_the_advice_fits_why(
    margins: list[float], accuracies: list[float], words: str
) -> None:
    reading = read_run(run(margins, accuracies=accuracies))
    assert reading.verdict == "not learning"
    assert words in reading.text


@pytest.mark.parametrize(
    "margins",
    [
        ramp(0, -2),  # ends far above where it began
        [*ramp(0, 1, 8), -3.0, 1.0, 1.0, 1.0, -3.0, 1.0, 1.0, 1.0],  # jumps
        [0.0, *([0.8, -0.8] * 8), *([1.0] * 8)][:20],  # swings
    ],
)
def test_a_wild_loss_is_unstable(margins: list[float]) -> None:
    reading = read_run(run(margins))
    assert reading.verdict == "unstable"
    assert "ower learning_rate from 0.0001 to" in reading.text


def test_a_loss_that_is_no_number_and_growing_gradients_are_unstable() -> None:
    events = run(ramp(0, 1))
    events[-1]["loss"] = None
    assert read_run(events).verdict == "unstable"
    events = run([0.0] * 20)
    for event in events[-5:]:
        event["grad_norm"] = 50.0
    reading = read_run(events)
    assert reading.verdict == "unstable"
    assert "gradient norm grew from 1 to 50" in reading.text


def test_a_short_run_is_too_early_to_tell_unless_its_result_is_clear() -> None:
    assert read_run([START]).verdict == "too early to tell"
    assert read_run(run([0, 0.02, 0.01, 0.05])).verdict == "too early to tell"
    assert read_run(run(ramp(0, 2, 6), accuracies=[1.0] * 6)).verdict == "learning"


def test_pairs_that_are_told_apart_at_once_are_saturated() -> None:
    margins = [0.0, 4.0, *([7.0] * 18)]
    reading = read_run(run(margins, accuracies=[0.5] + [1.0] * 19))
    assert reading.verdict == "saturated"
    assert "From step 4 of 40" in reading.text


def test_displacement_and_a_gap_to_validation_are_remarks() -> None:
    displaced = read_run(run(ramp(0, 1.5), chosen=-4.0))
    assert displaced.verdict == "learning"
    assert "likelihood displacement" in displaced.text
    assert "dpo_beta from 0.1 to 0.3" in displaced.text
    assert "behind training" in read_run(run(ramp(0, 3), validation=[0.6, 0.55])).text


def sft(losses: list[float]) -> list[dict[str, Any]]:
    start = {**START, "strategy": "sft"}
    return [start] + [
        {"kind": "train", "step": 2 * i, "total_steps": 40, "epoch": i / 20, "loss": loss, "mean_token_accuracy": 0.6}
        for i, loss in enumerate(losses, start=1)
    ]


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [(ramp(2.0, 1.2), "learning"), ([2.0, 2.01] * 10, "not learning"), (ramp(2.0, 5.0), "unstable")],
)
def test_sft_is_read_by_its_own_measures(losses: list[float], verdict: str) -> None:
    reading = read_run(sft(losses))
    assert reading.verdict == verdict
    assert "margin" not in reading.text
    assert verdict == "unstable" or "(mean of the first tenth) to" in reading.text


def test_what_a_resumed_run_did_again_counts_once() -> None:
    wild = run([0.0, *([-5.0] * 19)])
    events = [*wild, *run(ramp(0, 1.5))]
    assert read_run(events).verdict == "learning"


def notes(events: list[dict[str, Any]]) -> list[str]:
    watch = DivergenceWatch()
    return [line for event in events for line in watch.add(event)]


def test_trouble_is_said_once_and_at_the_time() -> None:
    assert notes(run(ramp(0, 1.5), validation=[0.6, 0.5, 0.55, 0.45])) == []
    (wild,) = notes(run([0.0, 0.2, -4.0, -4.0, -4.0, 0.5]))
    assert "4.018 at step 6" in wild
    (rising,) = notes(run(ramp(0, 3), validation=[0.6, 0.5, 0.55, 0.6, 0.7]))
    assert "from 0.500 at step 16 to 0.600" in rising


def test_pace_leaves_evaluations_and_checkpoints_out_of_the_rate_and_counts_them_in_the_time_left() -> None:
    now = 0.0
    pace = Throughput(lambda: now)
    for step in range(1, 5):
        now += 10.0 if step == 1 else 2.0  # the first step warms up
        pace.step()
        if step == 1:
            assert pace.window(4, 400) == {"pairs_per_s": 0.4, "tokens_per_s": 40.0}
            assert pace.seconds_left(steps=9) == 90.0
        if step == 3:  # between two lines, without one
            now += 5.0
            pace.evaluation()
            now += 1.0
            pace.checkpoint()
    assert pace.window(12, 600) == {"pairs_per_s": 2.0, "tokens_per_s": 100.0}
    assert pace.seconds_left(steps=6, evaluations=2, checkpoints=1) == 6 * 2 + 2 * 5 + 1
    assert pace.seconds == 22.0
    assert pace.totals() == {"train_seconds": 16.0, "pairs_per_s": 1.0, "tokens_per_s": 62.5}


def test_the_first_estimate_rests_on_what_came_after_the_first_micro_batch() -> None:
    now = 0.0
    pace = Throughput(lambda: now)
    assert pace.seconds_left(steps=3) is None
    for micro_batch in range(4):
        now += 9.0 if micro_batch == 0 else 1.0
        pace.step() if micro_batch == 3 else pace.micro_batch(1 / 4)
    pace.window(4, None)
    assert pace.seconds_left(steps=3) == pytest.approx(12.0)
    # An evaluation that nobody timed yet takes a third of training on its rows.
    assert pace.seconds_left(steps=0, evaluations=1, evaluation_rows=8) == pytest.approx(8 * 3.0 / 3)


def test_a_line_of_progress_says_it_in_few_words() -> None:
    step = {"kind": "train", "step": 30, "total_steps": 120, "loss": 0.412, "rewards/margins": 1.1}
    step |= {"rewards/accuracies": 0.94, "tokens_per_s": 310.2, "seconds_left": 240.0}
    assert progress_line(step) == "step 30/120 loss 0.412 margin 1.10 accuracy 0.94 310 tokens/s 4 min left"
    evaluation = {"kind": "eval", "step": 30, "total_steps": 120, "eval_loss": 0.5, "eval_mean_token_accuracy": 0.25}
    assert progress_line(evaluation) == "validation at step 30/120 loss 0.500 token accuracy 0.25"


def test_durations_fit_an_estimate() -> None:
    assert [duration(s) for s in (0.4, 89, 90, 3599, 7800, 90000)] == [
        "0 s", "89 s", "2 min", "1 h", "2 h 10 min", "1 d 1 h",
    ]  # fmt: skip


def running(margins: list[float], *, total: int, every: int = 2, **fields: Any) -> list[dict[str, Any]]:
    """The events of a run with more steps to come."""
    return [{**event, "total_steps": total} for event in run(margins, every=every, **fields)]


@pytest.mark.parametrize(
    ("events", "words"),
    [
        # Two evaluations that rise by chance, a loss that rises by chance: five steps prove neither.
        (run([0, 0.3], every=5, validation=[0.5, 0.6]), "10 steps are too few"),
        (run([0, -0.6, -0.8, -0.9]), "8 steps are too few"),
        (running([0, -0.6, -0.8, -0.9], total=400), "Step 8 of 400 is too early for a verdict"),
        (running([0, 0.02, 0.01] * 5, total=400), "Step 30 of 400 is too early for a verdict"),
        (running([0, 0.5], every=20, total=400), "2 log lines in 40 steps"),
        (run([0, 0.5], every=20), "Lower logging_steps"),
    ],
)
def test_too_little_to_read_is_said_and_no_verdict_given(events: list[dict[str, Any]], words: str) -> None:
    reading = read_run(events)
    assert reading.verdict == "too early to tell"
    assert words in reading.text


@pytest.mark.parametrize(
    ("margins", "verdict"),
    [([0, 1, 1.5, 2.0], "learning"), ([0, -3, -4, -5], "unstable")],
)
def test_what_is_clear_needs_no_twenty_steps(margins: list[float], verdict: str) -> None:
    assert read_run(run(margins)).verdict == verdict


def test_the_reading_of_a_run_with_steps_to_come_says_where_it_is() -> None:
    reading = read_run(running(ramp(0, 1.5), total=400))
    assert reading.verdict == "learning"
    assert reading.text.startswith("At step 40 of 400: ")
    assert "at the end" not in reading.text
    flat = read_run(running([0, 0.01, 0.02] * 8, total=400))
    assert (flat.verdict, flat.text[:18]) == ("not learning", "At step 48 of 400:")
