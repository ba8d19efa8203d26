"""What is worth a word while a run still goes: a loss that runs wild, a validation loss that rises. Says it once, stops nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from palate_trainer.spec.curves import Curves, mean
from palate_trainer.spec.reading import lower_rate

_KEPT_POINTS = 64
"""Training points that are looked back on: a long run does not make the watch slow."""

_WILD_POINTS = 3
_WILD = 1.5
"""The mean of so many points, over the loss that the run began with."""

_WILD_AT_ONCE = 3.0
_RISE = 0.02
"""Least rise of the validation loss over two evaluations, as a share of the loss that the run began with."""


class Watch:
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
