"""Reads a run's curves: a verdict with figures and advice. No ML.

The thresholds were tuned on a two-layer model at learning rates that were too low, right and far too high, with few rows and
with many; tests repeat some of these runs. Gradient norm, margin sign changes and displacement were tested on synthetic curves only.
A reading is a first look, not a measurement. Answer quality needs an evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from palate_recipes.specs.events import Curves, Point, mean

Verdict = Literal["learning", "over-fitting", "not learning", "unstable", "saturated", "too early to tell"]

ADVICE_NAMES = ("learning_rate", "num_train_epochs", "dpo_beta", "loss_type")
"""Hyperparameters that the `start` event repeats, so that advice can name a value."""

# Thresholds. Loss thresholds are shares of the first loss, the loss before training.
ENOUGH_STEPS = 20  # a shorter run gets a verdict only if its result is clear
ENOUGH_LINES = 4  # the same for fewer log lines: the last quarter would be one batch
CLEAR = 0.5  # a fall of this much is clear
WARM = 0.1  # share of a run after which a flat loss counts: the learning rate may rise until then (warm-up)
FLAT = 0.03  # a smaller fall is none
FLAT_SFT = 0.01  # lower for SFT: most of its loss is text entropy, which training cannot remove
MEMORIZED = 0.8  # training loss below this while the validation loss never improved
ABOVE_START = 1.25  # final loss above this is unstable
SPIKE = 2.0  # the same for single log lines
SWING = 0.5  # smaller margins do not count as a change of sign
NORM_GROWTH = 10  # gradient norm of the last quarter over that of the first half
STIRRED = 0.02  # margins (root mean square) above this have moved: a higher rate would not help
SATURATED_ACCURACY, SATURATED_LOSS = 0.99, 0.1
BEHIND, BEHIND_BY = 1.5, 0.1  # validation loss over training loss, and the difference
DISPLACED = -1.0  # reward of the chosen answers
STILL_FALLING = 0.05  # between the third and the last quarter of the run


@dataclass(frozen=True)
class Reading:
    """The verdict on a run.

    Attributes:
        verdict: One of `Verdict`.
        text: One to three sentences: the figures, and what to change.
    """

    verdict: Verdict
    text: str

    def __str__(self) -> str:
        return f"{self.verdict}. {self.text}"


@dataclass(frozen=True)
class _Run:
    """Curves with finite losses only, the loss before training, and the mean loss of the last quarter."""

    curves: Curves
    first: float
    end: float

    @property
    def flat(self) -> float:
        return self.first * (FLAT if self.curves.has_reference else FLAT_SFT)

    @property
    def is_clear(self) -> bool:
        return self.first - self.end > CLEAR * self.first

    @property
    def is_partial(self) -> bool:
        """Whether it is still running, or ended early."""
        return self.curves.steps < self.curves.total_steps

    @property
    def validation(self) -> list[Point]:
        """The last evaluation, or nothing if it is older than half the run."""
        return [p for p in self.curves.validation[-1:] if p.loss is not None and p.step >= self.curves.steps / 2]


def read_run(events: Iterable[Mapping[str, Any]]) -> Reading:
    """Reads a finished run, or a run so far.

    Args:
        events: The objects of metrics.jsonl in order, as `TrainingJob.metrics` returns them.

    Returns:
        The first verdict that applies. Too few steps or log lines for one come first, then "unstable" and "over-fitting": the
        others assume a run without either. The text of a run with steps to come says at which step it was read.
    """
    curves = Curves.of(events)
    if not curves.train:
        return Reading("too early to tell", "No step has been logged yet.")
    lost = next((point.step for point in curves.train if point.loss is None), None)
    first, end = curves.first_loss, mean(curves.last(), "loss")
    if lost is not None or first is None or end is None:
        return Reading("unstable", f"The loss at step {lost} is not finite. {_sentence(change_rate(curves, 0.1))}.")
    run = _Run(curves, first, end)
    looks: tuple[tuple[Verdict, str | None], ...] = (
        ("too early to tell", _too_early(run)),
        ("unstable", _unstable(run)),
        ("over-fitting", _over_fitting(run)),
        ("too early to tell", _still_flat(run)),
        ("not learning", _not_learning(run)),
        ("saturated", _saturated(run)),
        ("learning", _learning(run)),
    )
    verdict, text = next((verdict, text) for verdict, text in looks if text)
    if run.is_partial and verdict != "too early to tell":
        text = f"At step {curves.steps} of {curves.total_steps}: {text}"
    return Reading(verdict, text)


# One function per verdict: its text, or None if it does not apply.


def _unstable(run: _Run) -> str | None:
    train, steps = run.curves.train, run.curves.steps
    later = [point for point in train if point.step > max(1, steps / 10)]
    spikes = [point for point in later if _loss(point) > SPIKE * run.first]
    margins = [p.margin for p in train if p.step > steps / 2 and p.margin is not None and abs(p.margin) > SWING]
    norm, last_norm = _median_norm(train[: len(train) // 2]), _median_norm(run.curves.last())
    if run.end > ABOVE_START * run.first:
        return f"The loss rose from {run.first:.3f} to {run.end:.3f}. {_sentence(change_rate(run.curves, 0.1))}."
    if len(spikes) >= max(2, len(later) / 20):
        fact = f"The loss was above {SPIKE * run.first:.2f} in {len(spikes)} of {len(later)} log lines"
    elif sum((one > 0) != (other > 0) for one, other in pairwise(margins)) >= 3:
        fact = "The margin keeps changing its sign"
    elif norm and last_norm and last_norm > NORM_GROWTH * norm and run.first - run.end <= run.flat:
        fact = f"The gradient norm grew from {norm:.2g} to {last_norm:.2g} and the loss did not fall"
    else:
        return None
    return f"{fact}. {_sentence(change_rate(run.curves, 1 / 3))}."


def _over_fitting(run: _Run) -> str | None:
    points = [point for point in run.curves.validation if point.loss is not None]
    if not points:
        return None
    best, last = min(points, key=_loss), points[-1]
    lower = change_rate(run.curves, 1 / 3)
    if run.curves.has_reference and _loss(best) > (1 - FLAT) * run.first and run.end < MEMORIZED * run.first:
        return (
            f"The training loss fell to {run.end:.3f}, but the validation loss is {_loss(last):.3f} ({run.first:.3f}"
            f" untrained): the model memorized the training rows. Use fewer epochs or more varied rows, or {lower}."
        )
    then = mean(run.curves.around(best.step), "loss")
    if then is None or run.end >= then or _loss(last) - _loss(best) <= run.flat:
        return None
    epochs = max(1, round(best.epoch))
    advice = f"Set num_train_epochs={epochs}" if epochs < round(run.curves.train[-1].epoch) else _sentence(lower)
    return (
        f"The validation loss was lowest, {_loss(best):.3f}, at step {best.step} (epoch {best.epoch:.2g}) and rose to"
        f" {_loss(last):.3f}, while the training loss fell from {then:.3f} to {run.end:.3f}. {advice}, or add data."
    )


def _too_early(run: _Run) -> str | None:
    steps, total, lines = run.curves.steps, run.curves.total_steps, len(run.curves.train)
    if run.is_clear or run.end > SPIKE * run.first:
        return None  # a loss that has halved, or doubled, needs no more steps
    if steps < ENOUGH_STEPS <= total:
        return f"Step {steps} of {total} is too early for a verdict: {_figures(run)}. Read it again after step {ENOUGH_STEPS}."
    if steps < ENOUGH_STEPS:
        return (
            f"{steps} steps are too few for a verdict: {_figures(run)}. Train for {ENOUGH_STEPS} steps or more: more"
            " epochs, more rows, or a smaller gradient_accumulation_steps."
        )
    if lines < ENOUGH_LINES:
        remedy = "Read it again later, or lower logging_steps" if run.is_partial else "Lower logging_steps"
        return f"{lines} log lines in {steps} steps are too few for a verdict: {_figures(run)}. {remedy}."
    return None


def _still_flat(run: _Run) -> str | None:
    """A loss that has not fallen yet, early in a run that is not over."""
    warm = math.ceil(WARM * run.curves.total_steps)
    if not run.is_partial or run.curves.steps >= warm or run.first - run.end > run.flat:
        return None
    return (
        f"Step {run.curves.steps} of {run.curves.total_steps} is too early for a verdict: {_figures(run)}."
        f" Read it again after step {warm}."
    )


def _not_learning(run: _Run) -> str | None:
    if run.first - run.end > run.flat:
        return None
    margins = [point.margin for point in run.curves.last(0.5) if point.margin is not None]
    size = math.sqrt(sum(margin * margin for margin in margins) / max(1, len(margins)))
    # A DPO loss falls as soon as margins grow. A KTO loss falls by an eighth of them, so it may still look flat.
    growing = not run.curves.is_dpo and sum(margins) > len(margins) * size / 2
    answers = "chosen and rejected answers" if run.curves.is_dpo else "good and bad answers"
    if size > STIRRED and not growing:
        advice = f"The rewards move, but the loss does not fall: check that {answers} differ as intended, and"
        advice += f" {change_rate(run.curves, 0.1)}"
    else:
        advice = f"{_sentence(change_rate(run.curves, 10 if run.curves.has_reference else 5))}. If that does not help, check the data"
    return f"After {run.curves.steps} steps {_figures(run)}. {advice}."


def _saturated(run: _Run) -> str | None:
    since: Point | None = None
    for point in run.curves.train:
        right = point.accuracy is None or point.accuracy >= SATURATED_ACCURACY
        since = (since or point) if right and _loss(point) < SATURATED_LOSS * run.first else None
    steps, is_dpo = run.curves.steps, run.curves.is_dpo
    if since is None or since.step > steps / 3 or steps - since.step < ENOUGH_STEPS / 2:
        return None
    pairs = "every pair was right and " if is_dpo else ""
    memorized = "the model memorized the rows. Use fewer epochs or more rows"
    trivial = "look for a length, a phrase or a format that gives the chosen answer away"
    return (
        f"From step {since.step} of {steps} on {pairs}the loss was below {SATURATED_LOSS * run.first:.3f}:"
        f" {trivial if is_dpo and since.epoch <= 1 else memorized}."
    )


def _learning(run: _Run) -> str:
    return " ".join([f"{_sentence(_figures(run))}.", _displacement(run), _behind(run) or _still_falling(run)]).strip()


# Remarks on a run that is learning, empty if there is nothing to say.


def _displacement(run: _Run) -> str:
    points = run.validation or run.curves.last()
    chosen, margin, beta = mean(points, "chosen"), mean(points, "margin"), run.curves.start.dpo_beta
    if chosen is None or margin is None or chosen > min(DISPLACED, -margin / 2):
        return ""
    raised = f"raise dpo_beta from {beta:g} to {_round(beta * 3)}" if beta else "raise dpo_beta"
    return (
        f"The chosen answers became much less likely too (reward {chosen:.2f}; likelihood displacement):"
        f" {raised}, or {change_rate(run.curves, 1 / 3)}."
    )


def _behind(run: _Run) -> str:
    loss = mean(run.validation, "loss")
    if loss is None or loss < max(BEHIND * run.end, run.end + BEHIND_BY * run.first):
        return ""
    return f"Validation is behind training (loss {loss:.3f} and {run.end:.3f}): use more data or fewer epochs."


def _still_falling(run: _Run) -> str:
    quarter_begins = (
        run.curves.steps * 0.75
    )  # as `last()` counts; looking each point up in it takes a minute in a long run
    before = mean([point for point in run.curves.last(0.5) if point.step <= quarter_begins], "loss")
    rising = any(_loss(last) > _loss(previous) for previous, last in pairwise(run.curves.validation[-2:]))
    if (
        before is None
        or rising
        or run.is_partial
        or run.curves.steps < ENOUGH_STEPS
        or before - run.end < STILL_FALLING * run.first
    ):
        return ""
    return "The loss was still falling at the end: another epoch may improve the model."


# Figures and advice.


def _figures(run: _Run) -> str:
    where, points = ("validation", run.validation) if run.validation else ("training", run.curves.last())
    words = f"the training loss went from {run.first:.3f} ({run.curves.first_loss_source}) to {run.end:.3f} (mean of the last quarter)"
    words += "".join(f", the validation loss to {point.loss:.3f}" for point in run.validation)
    accuracy, margin, tokens = (mean(points, name) for name in ("accuracy", "margin", "token_accuracy"))
    if run.curves.is_dpo and accuracy is not None and margin is not None:
        return f"{words}; {accuracy:.0%} of the {where} pairs are in the right order, with a margin of {margin:.2f}"
    if run.curves.has_reference and margin is not None:
        return f"{words}; the reward of good {where} answers is {margin:.2f} above that of bad ones"
    return f"{words}; {tokens:.0%} of the {where} answers' tokens are ranked first" if tokens is not None else words


def change_rate(curves: Curves, factor: float) -> str:
    """Advice to change the learning rate, with the value if the run logged one."""
    rate = curves.start.learning_rate
    change = f" from {rate:g} to {_round(rate * factor)}" if rate else f" by a factor of {max(factor, 1 / factor):g}"
    return f"{'raise' if factor > 1 else 'lower'} learning_rate{change}"


def _median_norm(points: list[Point]) -> float | None:
    norms = sorted(point.grad_norm for point in points if point.grad_norm is not None)
    return norms[len(norms) // 2] if norms else None


def _loss(point: Point) -> float:
    return math.inf if point.loss is None else point.loss


def _round(value: float) -> str:
    return f"{float(f'{value:.0e}'):g}"


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}"
