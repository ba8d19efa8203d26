"""Metrics events of a run: progress lines, and curves. Knows names of metrics, no trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import Struct

from palate_recipes.specs.codec import Int, convert


class _Words(Struct, frozen=True):
    verdict: str
    text: str


class _Event(Struct):
    """Fields that every event has, and fields of some events that readers calculate with."""

    kind: str
    step: Int
    total_steps: Int = 0
    attempt: Int = 1
    reading: _Words = _Words("", "")


class Start(Struct, frozen=True, kw_only=True):
    """The last `start` event of a run: sizes, and the hyperparameters that advice names.

    Attributes:
        step: Optimizer steps before this start.
        train_rows: Number of training rows.
        strategy: `sft`, `dpo` or `kto`.
        loss_type, learning_rate, num_train_epochs, dpo_beta: As in `Hyperparameters`; None if the run did not log it.
    """

    step: Int = 0
    train_rows: Int = 0
    strategy: str = "dpo"
    loss_type: str = "sigmoid"
    learning_rate: float | None = None
    num_train_epochs: float | None = None
    dpo_beta: float | None = None


def is_event(values: object) -> bool:
    """Whether readers can calculate with it. A store may contain anything."""
    try:
        event = convert(values, _Event)
        if event.kind == "start":
            convert(values, Start)
    except (msgspec.ValidationError, UnicodeError):  # the latter for a field name with half a character
        return False
    assert isinstance(values, dict)
    if event.kind not in ("train", "eval"):
        return True
    return all(_is_figure(value) for name, value in values.items() if name not in ("kind", "step"))


def _is_figure(value: object) -> bool:
    """Includes NaN and infinity: losses of a failed training are figures, too."""
    return value is None or isinstance(value, float) or (type(value) is int and -(2**63) <= value < 2**64)


_SHOWN = (
    ("loss", "loss {:.3f}"),
    ("rewards/margins", "margin {:.2f}"),
    ("rewards/accuracies", "accuracy {:.2f}"),
    ("tokens_per_s", "{:.0f} tokens/s"),
)
_SHOWN_WITHOUT_REWARDS = (
    ("loss", "loss {:.3f}"),
    ("mean_token_accuracy", "token accuracy {:.2f}"),
    ("tokens_per_s", "{:.0f} tokens/s"),
)


def progress_line(event: Mapping[str, Any]) -> str:
    """A `train` or `eval` event as a log line: `step 30/120 loss 0.412 margin 1.10 … 4 min left`."""
    prefix = "eval_" if event["kind"] == "eval" else ""
    shown = _SHOWN if f"{prefix}rewards/margins" in event else _SHOWN_WITHOUT_REWARDS
    words = [f"{'validation at step' if prefix else 'step'} {event['step']}/{event['total_steps']}"]
    for name, form in shown:
        value = event.get(prefix + name)
        if value is not None:
            words.append(form.format(value))
    left = event.get("seconds_left")
    if left is not None and event["step"] < event["total_steps"]:
        words.append(f"{duration(left)} left")
    return " ".join(words)


def duration(seconds: float) -> str:
    """Formats seconds with the precision of an estimate: `40 s`, `4 min`, `2 h 10 min`, `3 d 4 h`."""
    if not math.isfinite(seconds):
        return "unknown time"
    if seconds < 90:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


_UNDECIDED = {"sigmoid": math.log(2), "sigmoid_norm": math.log(2)}
"""Loss of a pair at margin 0, by loss type. Known even if the first step is missing, as in a resumed run."""


@dataclass(frozen=True)
class Point:
    """One `train` or `eval` event.

    Attributes:
        step: Optimizer steps so far.
        steps: Number of steps that a training point averages.
        epoch: Epochs so far.
        loss, margin, accuracy, chosen, rejected: As logged; None if missing or not finite.
        token_accuracy: Share of answer tokens that are ranked first.
        grad_norm: Gradient norm of this step (not averaged).
    """

    step: int
    steps: int
    epoch: float
    loss: float | None
    margin: float | None
    accuracy: float | None
    chosen: float | None
    rejected: float | None
    token_accuracy: float | None
    grad_norm: float | None


@dataclass
class Curves:
    """The curves of a run so far.

    Attributes:
        start: The last `start` event.
        train, validation: Points in order of steps. Steps that a resumed run repeated occur once.
        total_steps: Steps of the whole run; 0 if no event has it.
    """

    start: Start = field(default_factory=Start)
    train: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
    total_steps: int = 0

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> Curves:
        """Reads metrics events in order."""
        curves = cls()
        for event in events:
            curves.add(event)
        return curves

    def add(self, event: Mapping[str, Any]) -> None:
        """Adds an event. Ignores kinds other than `start`, `train` and `eval`."""
        kind = event["kind"]
        self.total_steps = event.get("total_steps") or self.total_steps
        if kind == "start":
            self.start = convert(dict(event), Start)
            self.train = [point for point in self.train if point.step <= event["step"]]
            self.validation = [point for point in self.validation if point.step <= event["step"]]
        elif kind == "train":
            before = self.train[-1].step if self.train else self.start.step
            self.train.append(_point(event, "", max(1, event["step"] - before)))
        elif kind == "eval":
            # A resumed run repeats the evaluation that its checkpoint was written without.
            self.validation = [point for point in self.validation if point.step != event["step"]]
            self.validation.append(_point(event, "eval_", 0))

    @property
    def is_dpo(self) -> bool:
        """Whether the loss compares pairs, so that margins and accuracies exist."""
        return self.start.strategy == "dpo"

    @property
    def has_reference(self) -> bool:
        """Whether a reference scores answers. Then rewards exist, and the loss can fall to 0 (unlike SFT's)."""
        return self.is_dpo or self.start.strategy == "kto"

    @property
    def steps(self) -> int:
        return self.train[-1].step if self.train else 0

    @property
    def first_loss(self) -> float | None:
        """The training loss before anything was learned."""
        if self.is_dpo and self.start.loss_type in _UNDECIDED:
            return _UNDECIDED[self.start.loss_type]
        if self.has_reference:
            return next((point.loss for point in self.train if point.loss is not None), None)
        # One batch of answers is too noisy, so SFT uses the mean of the first tenth.
        early = [point for point in self.train if point.step <= max(1, self.steps / 10)]
        return mean(early or self.train[:1], "loss")

    @property
    def first_loss_source(self) -> str:
        """What `first_loss` is, for a text that names it."""
        if self.is_dpo and self.start.loss_type in _UNDECIDED:
            return "ln 2, untrained"
        return "first log line" if self.has_reference else "mean of the first tenth"

    def last(self, share: float = 0.25) -> list[Point]:
        """The training points of the last `share` of the steps, at least one."""
        return [point for point in self.train if point.step > self.steps * (1 - share)]

    def around(self, step: int) -> list[Point]:
        """The training points around a step: a sixteenth of the run in both directions, at least the nearest point."""
        reach = max(self.steps / 16, min((abs(point.step - step) for point in self.train), default=0))
        return [point for point in self.train if abs(point.step - step) <= reach]


def mean(points: Sequence[Point], name: str) -> float | None:
    """The mean of a value, weighted by the steps of each point; None if no point has it."""
    known = [(getattr(point, name), max(1, point.steps)) for point in points if getattr(point, name) is not None]
    weight = sum(steps for _, steps in known)
    return sum(value * steps for value, steps in known) / weight if known else None


def _point(event: Mapping[str, Any], prefix: str, steps: int) -> Point:
    def number(name: str, prefix: str = prefix) -> float | None:
        value = event.get(prefix + name)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    return Point(
        step=event["step"],
        steps=steps,
        epoch=number("epoch", "") or 0.0,
        loss=number("loss"),
        margin=number("rewards/margins"),
        accuracy=number("rewards/accuracies"),
        chosen=number("rewards/chosen"),
        rejected=number("rewards/rejected"),
        token_accuracy=number("mean_token_accuracy"),
        grad_norm=number("grad_norm"),
    )
