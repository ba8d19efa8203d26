"""What a run's curves say, in words: a verdict with its figures and what to change, and warnings while it runs. No ML.

The thresholds were compared with runs of a two-layer model at learning rates too low, right and far too high, on few rows and
on more; tests repeat some. Those for gradient norms, swinging margins and displacement have met made curves alone.
A reading is a first look, not a measurement: how good the answers are is for an evaluation to say.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from palate_recipes.specs.events import Curves, Point, mean

Verdict = Literal["learning", "over-fitting", "not learning", "unstable", "saturated", "too early to tell"]

ADVICE_NAMES = ("learning_rate", "num_train_epochs", "dpo_beta", "loss_type")
"""Hyperparameters that the `start` event repeats, so that advice can name a value."""

ENOUGH_STEPS = 20
"""Fewer steps than this without a clear result prove nothing."""

FLAT = 0.03
"""A loss that changed by less than this share of the first one has not moved."""

FLAT_SFT = 0.01
"""The same for SFT, where most of the loss is what no training can remove."""

CLEAR = 0.1
_BY_HEART = 0.8
_STIRRED = 0.02
"""Margins about this far from 0 (root mean square) without a lower loss: the steps are not too small, they go nowhere."""

_ABOVE_START = 1.25
_SPIKE = 2.0
_SWING = 0.5
_GAP_ACCURACY = 0.15
_SATURATED_ACCURACY = 0.99
_SATURATED_LOSS = 0.1
_DISPLACED = 1.0


@dataclass(frozen=True)
class Reading:
    """A run in words.

    Attributes:
        verdict: One of `Verdict`.
        text: One to three sentences: the figures, and what to change.
    """

    verdict: Verdict
    text: str

    def __str__(self) -> str:
        return f"{self.verdict}. {self.text}"


def read_run(events: Iterable[Mapping[str, Any]]) -> Reading:
    """Reads a run, whole or as far as it has come.

    Args:
        events: The objects of metrics.jsonl in order, as `TrainingJob.metrics` returns them.

    Returns:
        The verdict. Unstable goes before over-fitting, that before everything that assumes a run in order.
    """
    curves = Curves.of(events)
    if not curves.train:
        return Reading("too early to tell", "No step has been logged yet.")
    for look in (_unstable, _over_fitting, _too_early, _not_learning, _saturated):
        reading = look(curves)
        if reading is not None:
            return reading
    return _learning(curves)


def lower_rate(curves: Curves, by: int) -> str:
    """Advice to lower the learning rate, with the value where the run said its own."""
    rate = curves.start.learning_rate
    return f"lower learning_rate from {rate:g} to {_round(rate / by)}" if rate else f"divide learning_rate by {by}"


# One look each; None: that is not it.


def _unstable(curves: Curves) -> Reading | None:
    first = curves.first_loss
    lost = next((point for point in curves.train if point.loss is None), None)
    if lost is not None or first is None:
        step = lost.step if lost else curves.steps
        return Reading("unstable", f"The loss of step {step} is no finite number. {_sentence(lower_rate(curves, 10))}")
    end = mean(curves.last(), "loss") or 0.0
    later = [point for point in curves.train if point.step > curves.steps / 10 and point.step > 1]
    if end > _ABOVE_START * first:
        margins = _swing(later)
        text = f"The loss began with {first:.3f} and ended at {end:.3f}{margins}."
        return Reading("unstable", f"{text} {_sentence(lower_rate(curves, 10))}")
    spikes = [point for point in later if (point.loss or 0.0) > _SPIKE * first]
    if len(spikes) >= max(2, len(later) / 20):
        worst = max(spikes, key=lambda point: point.loss or 0.0)
        text = (
            f"The loss jumped above {_SPIKE * first:.2f} in {len(spikes)} of {len(later)} log lines, to {worst.loss:.3f} at step"
            f" {worst.step}{_swing(later)}."
        )
        return Reading("unstable", f"{text} {_sentence(lower_rate(curves, 3))}")
    half = [point for point in curves.train if point.step > curves.steps / 2]
    if _sign_changes(half) >= 3:
        text = f"The margin keeps changing its sign{_swing(half)}, so nothing that is learned stays."
        return Reading("unstable", f"{text} {_sentence(lower_rate(curves, 3))}")
    before, after = _median_norm(curves.train[: len(curves.train) // 2]), _median_norm(curves.last())
    if before and after and after > 10 * before and end > (1 - CLEAR) * first:
        text = f"The gradient norm grew from {before:.2g} to {after:.2g}, and the loss stands at {end:.3f} ({first:.3f} at first)."
        return Reading("unstable", f"{text} {_sentence(lower_rate(curves, 3))}")
    return None


def _over_fitting(curves: Curves) -> Reading | None:
    points = [point for point in curves.validation if point.loss is not None]
    first, end = curves.first_loss, mean(curves.last(), "loss")
    if not points or first is None or end is None:
        return None
    best, last = min(points, key=_loss), points[-1]
    if curves.has_reference and _loss(best) > (1 - FLAT) * first and end < _BY_HEART * first:
        cause = (
            f"the rows were learned by heart. Take fewer epochs or more rows, or {lower_rate(curves, 3)}"
            if curves.train[-1].epoch > 1
            else "what was learned does not carry over. See whether the validation rows are of the same kind; varied data helps"
        )
        text = f"The training loss fell to {end:.3f}, the validation loss is {_loss(last):.3f} ({first:.3f} untrained)"
        return Reading("over-fitting", f"{text}: {cause}.")
    then = mean(curves.around(best.step), "loss")
    if _loss(last) - _loss(best) > _flat(curves) * first and then is not None and end < then:
        text = (
            f"The validation loss was lowest, {_loss(best):.3f}, at step {best.step} (epoch {best.epoch:.2g}) and rose to"
            f" {_loss(last):.3f}, while the training loss fell from {then:.3f} to {end:.3f}."
        )
        return Reading("over-fitting", f"{text} {_sentence(_stop_at(curves, best))}")
    return None


def _too_early(curves: Curves) -> Reading | None:
    first, end = curves.first_loss, mean(curves.last(), "loss")
    if curves.steps >= ENOUGH_STEPS or first is None or end is None:
        return None
    fall = (first - end) / first
    if fall > CLEAR and (not curves.is_dpo or _sure(curves)):
        return None
    figures = _figures(curves)
    return Reading(
        "too early to tell",
        f"{curves.steps} steps are too few for a verdict: {figures}. Take {ENOUGH_STEPS} steps or more: more epochs, more rows,"
        " or a smaller gradient_accumulation_steps.",
    )


def _not_learning(curves: Curves) -> Reading | None:
    first, end = curves.first_loss, mean(curves.last(), "loss")
    if first is None or end is None:
        return None
    if first - end > _flat(curves) * first:
        return None
    text = f"After {curves.steps} steps {_figures(curves)}."
    if not curves.has_reference:
        return Reading("not learning", f"{text} {_sentence(_raise_rate(curves, 5))}")
    margins = [point.margin for point in curves.last(0.5) if point.margin is not None]
    stirred = math.sqrt(sum(margin**2 for margin in margins) / max(1, len(margins)))
    # A loss over pairs falls as soon as margins grow; KTO's follows at an eighth of them.
    towards = not curves.is_dpo and stirred > _STIRRED and sum(margins) > len(margins) * stirred / 2
    if stirred > _STIRRED and not towards:
        differ = "chosen and rejected" if curves.is_dpo else "good and bad answers"
        cause = f"The rewards move, but not towards the chosen answers: see whether {differ} differ as they should"
        return Reading("not learning", f"{text} {cause}, and {lower_rate(curves, 10)}.")
    if towards or _sure(curves):
        return Reading(
            "not learning", f"{text} The direction is right, the steps far too small: {_raise_rate(curves, 10)}."
        )
    return Reading(
        "not learning",
        f"{text} {_sentence(_raise_rate(curves, 10))} If that changes nothing, look at the"
        f" {'pairs' if curves.is_dpo else 'answers and labels'} themselves.",
    )


def _saturated(curves: Curves) -> Reading | None:
    first, steps = curves.first_loss, curves.steps
    if first is None:
        return None
    since = None
    for point in curves.train:
        right = point.accuracy is None or point.accuracy >= _SATURATED_ACCURACY
        holds = right and point.loss is not None and point.loss < _SATURATED_LOSS * first
        since = (since or point) if holds else None
    if since is None or since.step > steps / 3 or steps - since.step < ENOUGH_STEPS / 2:
        return None
    end = mean(curves.last(), "loss")
    by_heart = "the rows were learned by heart" if since.epoch > 1 else "the pairs are told apart by something trivial"
    if not curves.is_dpo:
        by_heart = "the answers were learned by heart"
        text = (
            f"From step {since.step} of {steps} on the loss was below {_SATURATED_LOSS * first:.3f}; it ended at {end:.3f}:"
            f" {by_heart}."
        )
    else:
        text = (
            f"From step {since.step} of {steps} on every pair was right; the loss ended at {end:.4f}: {by_heart}, and later steps"
            " taught nothing."
        )
    validation = _held_out(curves)
    if validation is not None and (validation.accuracy or 0.0) >= _SATURATED_ACCURACY and since.epoch <= 1:
        remedy = (
            f"The validation rows too ({validation.accuracy:.0%}): look for a length, a phrase or a format that gives the answer"
            " away, and for rows that stand in both files"
        )
    elif since.epoch > 1:
        remedy = f"Take fewer epochs (num_train_epochs={max(1, round(since.epoch))}) or more rows"
    else:
        remedy = "Look for a length, a phrase or a format that gives the chosen answer away; harder pairs teach more"
    return Reading("saturated", f"{text} {remedy}.")


def _learning(curves: Curves) -> Reading:
    sentences = [f"{_figures(curves)[0].upper()}{_figures(curves)[1:]}."]
    for remark in (_displacement(curves), _gap(curves) or _still_falling(curves)):
        if remark is not None:
            sentences.append(remark)
    return Reading("learning", " ".join(sentences))


# Remarks that leave the verdict as it is.


def _displacement(curves: Curves) -> str | None:
    point = _held_out(curves)
    points = [point] if point is not None else curves.last()
    chosen, rejected, margin = mean(points, "chosen"), mean(points, "rejected"), mean(points, "margin")
    if chosen is None or rejected is None or margin is None or chosen > -max(_DISPLACED, margin / 2):
        return None
    beta = curves.start.dpo_beta
    raised = f"raise dpo_beta from {beta:g} to {_round(beta * 3)}" if beta else "raise dpo_beta"
    return (
        f"The chosen answers became much less likely too (reward {chosen:.2f}, rejected {rejected:.2f}; likelihood displacement):"
        f" {raised}, or {lower_rate(curves, 3)}."
    )


def _gap(curves: Curves) -> str | None:
    point, first, end = _held_out(curves), curves.first_loss, mean(curves.last(), "loss")
    if point is None or first is None or end is None:
        return None
    accuracy = mean(curves.last(), "accuracy")
    behind = accuracy is not None and point.accuracy is not None and accuracy - point.accuracy > _GAP_ACCURACY
    if not behind and _loss(point) < max(1.5 * end, end + CLEAR * first):
        return None
    return f"Validation is behind training (loss {_loss(point):.3f} against {end:.3f}): more data or fewer epochs would narrow that."


def _still_falling(curves: Curves) -> str | None:
    end = mean(curves.last(), "loss")
    before = mean([point for point in curves.last(0.5) if point not in curves.last()], "loss")
    epochs = curves.start.num_train_epochs
    rising = len(curves.validation) > 1 and _loss(curves.validation[-1]) > _loss(curves.validation[-2])
    if (
        end is None
        or before is None
        or rising
        or curves.steps < ENOUGH_STEPS
        or before - end < 0.05 * (curves.first_loss or 0.0)
    ):
        return None
    more = f" (num_train_epochs={epochs + 1:g})" if epochs else ""
    return f"The loss was still falling at the end: another epoch{more} may give more."


# Figures and advice.


def _figures(curves: Curves) -> str:
    first, end = curves.first_loss, mean(curves.last(), "loss")
    point = _held_out(curves)
    where, points = ("validation", [point]) if point is not None else ("training", curves.last())
    words = f"the training loss went from {first:.3f} to {end:.3f}"
    if point is not None:
        words += f", the validation loss to {_loss(point):.3f}"
    accuracy, margin, tokens = (mean(points, name) for name in ("accuracy", "margin", "token_accuracy"))
    if curves.is_dpo and accuracy is not None and margin is not None:
        return f"{words}; {accuracy:.0%} of the {where} pairs are in the right order, with a margin of {margin:.2f}"
    if curves.has_reference and margin is not None:
        return f"{words}; the reward of good {where} answers is {margin:.2f} above that of bad ones"
    if tokens is not None:
        return f"{words}; {tokens:.0%} of the {where} answers' tokens are ranked first"
    return words


def _flat(curves: Curves) -> float:
    return FLAT if curves.has_reference else FLAT_SFT


def _held_out(curves: Curves) -> Point | None:
    """The last evaluation, unless training went on for long after it."""
    point = curves.validation[-1] if curves.validation else None
    return point if point is not None and point.loss is not None and point.step >= curves.steps / 2 else None


def _sure(curves: Curves) -> bool:
    """Whether the accuracy of the later half is above chance by more than two standard errors."""
    points = curves.last(0.5)
    accuracy = mean(points, "accuracy")
    rows_a_step = curves.start.train_rows * curves.train[-1].epoch / max(1, curves.steps)
    rows = max(1.0, rows_a_step * sum(point.steps for point in points))
    return accuracy is not None and accuracy - 0.5 > 2 * math.sqrt(0.25 / rows)


def _stop_at(curves: Curves, best: Point) -> str:
    whole = max(1, round(best.epoch))
    later = whole < round(curves.train[-1].epoch)
    advice = f"set num_train_epochs={whole}" if later else lower_rate(curves, 3)
    return f"{advice}, or add data; eval_steps with save_steps keeps the best step as a checkpoint"


def _raise_rate(curves: Curves, by: int) -> str:
    rate = curves.start.learning_rate
    return f"raise learning_rate from {rate:g} to {_round(rate * by)}" if rate else f"multiply learning_rate by {by}"


def _swing(points: list[Point]) -> str:
    margins = [point.margin for point in points if point.margin is not None]
    return f" (margins between {min(margins):.2f} and {max(margins):.2f})" if margins else ""


def _sign_changes(points: list[Point]) -> int:
    signs = [point.margin > 0 for point in points if point.margin is not None and abs(point.margin) > _SWING]
    return sum(one != other for one, other in pairwise(signs))


def _median_norm(points: list[Point]) -> float | None:
    norms = sorted(point.grad_norm for point in points if point.grad_norm is not None)
    return norms[len(norms) // 2] if norms else None


def _loss(point: Point) -> float:
    return math.inf if point.loss is None else point.loss


def _round(value: float) -> str:
    return f"{float(f'{value:.0e}'):g}"


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


_KEPT_POINTS = 64
"""Training points that are looked back on: a long run does not make the watch slow."""

_WILD_POINTS = 3
_WILD = 1.5
"""The mean of so many points, over the loss that the run began with."""

_WILD_AT_ONCE = 3.0
_RISE = 0.02
"""Least rise of the validation loss over two evaluations, as a share of the loss that the run began with."""


class DivergenceWatch:
    """Looks at each event as it comes, and says at most one line about each kind of trouble."""

    def __init__(self) -> None:
        self._curves = Curves()
        self._first_loss: float | None = None
        self._said: set[str] = set()
        self._recent: deque[float] = deque(maxlen=_WILD_POINTS)

    def add(self, event: Mapping[str, Any]) -> list[str]:
        """Takes an event of metrics.jsonl and returns the lines that it calls for, most often none."""
        curves = self._curves
        curves.add(event)
        if event["kind"] == "train":
            if self._first_loss is None:
                self._first_loss = curves.first_loss
            del curves.train[:-_KEPT_POINTS]
            return self._once("wild", self._wild())
        if event["kind"] == "eval":
            return self._once("rising", self._rising())
        return []

    def _once(self, kind: str, line: str | None) -> list[str]:
        if line is None or kind in self._said:
            return []
        self._said.add(kind)
        return [line]

    def _wild(self) -> str | None:
        point, first = self._curves.train[-1], self._first_loss
        if point.loss is None:
            return f"the loss of step {point.step} is no finite number; {lower_rate(self._curves, 10)}"
        self._recent.append(point.loss)
        if first is None or point.step <= 1:
            return None
        recent = sum(self._recent) / len(self._recent)
        at_once = point.loss > _WILD_AT_ONCE * first
        if not at_once and (len(self._recent) < _WILD_POINTS or recent <= _WILD * first):
            return None
        return (
            f"the loss runs wild: {point.loss:.3f} at step {point.step}, it began with {first:.3f}."
            f" If it stays there, stop and {lower_rate(self._curves, 10 if at_once else 3)}"
        )

    def _rising(self) -> str | None:
        losses = [(point.step, point.loss) for point in self._curves.validation if point.loss is not None][-3:]
        first = self._first_loss
        if len(losses) < 3 or first is None or not losses[0][1] < losses[1][1] < losses[2][1]:
            return None
        (step, low), (_, high) = losses[0], losses[2]
        then, now = mean(self._curves.around(step), "loss"), mean(self._curves.train[-1:], "loss")
        if high - low < _RISE * first or then is None or now is None or now >= then:
            return None
        return (
            f"the validation loss has risen twice, from {low:.3f} at step {step} to {high:.3f}, while the training loss fell"
            f" from {then:.3f} to {now:.3f}: over-fitting begins. The run goes on; its best step may lie behind"
        )
