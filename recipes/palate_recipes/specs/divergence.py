"""Warnings about the curves of a run while it trains. The verdict at the end is `palate_recipes.specs.diagnose`."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from palate_recipes.specs.diagnose import change_rate
from palate_recipes.specs.events import Curves, mean

# Thresholds, as shares of the first loss.
DIVERGING, DIVERGING_LINES = 1.5, 3  # mean loss of that many log lines
RISE = 0.02  # of the validation loss over three evaluations


class DivergenceWatch:
    """Takes events as they arrive and returns at most one warning of each kind."""

    def __init__(self) -> None:
        self._curves = Curves()
        self._first_loss: float | None = None
        self._warned: set[str] = set()
        self._recent: deque[float] = deque(maxlen=DIVERGING_LINES)

    def add(self, event: Mapping[str, Any]) -> list[str]:
        """Takes an event of metrics.jsonl and returns its warnings, usually none."""
        curves, kind = self._curves, event["kind"]
        curves.add(event)
        if kind == "train":
            if self._first_loss is None:
                self._first_loss = curves.first_loss
            del curves.train[:-64]  # bounds the work per event in a long run
        line = self._diverging() if kind == "train" else self._rising() if kind == "eval" else None
        if line is None or kind in self._warned:
            return []
        self._warned.add(kind)
        return [line]

    def _diverging(self) -> str | None:
        point, first = self._curves.train[-1], self._first_loss
        if point.loss is None:
            return f"the loss at step {point.step} is not finite; {change_rate(self._curves, 0.1)}"
        self._recent.append(point.loss)
        if first is None or sum(self._recent) <= DIVERGING * DIVERGING_LINES * first:
            return None
        return (
            f"the loss is diverging: {point.loss:.3f} at step {point.step}, {first:.3f} at the start."
            f" If it does not recover, stop the job and {change_rate(self._curves, 1 / 3)}"
        )

    def _rising(self) -> str | None:
        last = [(point.step, point.loss) for point in self._curves.validation if point.loss is not None][-3:]
        first = self._first_loss
        if len(last) < 3 or first is None:
            return None
        (step, low), (_, middle), (_, high) = last
        then, now = mean(self._curves.around(step), "loss"), mean(self._curves.train[-1:], "loss")
        if not low < middle < high or high - low < RISE * first or then is None or now is None or now >= then:
            return None
        return (
            f"the validation loss has risen twice, from {low:.3f} at step {step} to {high:.3f}, while the"
            f" training loss fell from {then:.3f} to {now:.3f}: the model is over-fitting, and its best step may have passed"
        )
