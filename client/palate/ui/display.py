"""Progress of a run behind one interface: nothing, plain lines, or the live view. Knows logs and metrics, no run.

All output goes to stderr: stdout is for results.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

from palate_recipes.specs.events import duration
from palate_recipes.text import visible

STAGE_PREFIX = "palate: "
"""Start of the runner's own lines in a log; the others are the program's."""

_QUIET_S = 15.0
_WEIGHTS_LOADED = re.compile(r"Loading safetensors checkpoint shards: +(\d+%) Completed")
"""vLLM's progress; the one step of an engine's start that can take minutes and has an end in sight."""


class Display(Protocol):
    """Receives the logs and metrics of a run; a context manager, so that the terminal is always restored."""

    wants_news: bool
    """False if logs and metrics need not be fetched at all."""

    def log(self, text: str) -> None:
        """Shows whole lines of the log."""
        ...

    def metrics(self, data: bytes) -> None:
        """Shows whole lines of metrics.jsonl."""
        ...

    def flush(self) -> None:
        """Called after each poll that may have brought logs and metrics; a view that collects them shows them now."""
        ...

    def __enter__(self) -> Display: ...

    def __exit__(self, *exception: object) -> None: ...


class NoDisplay:
    """Shows nothing."""

    wants_news = False

    def log(self, text: str) -> None:
        pass

    def metrics(self, data: bytes) -> None:
        pass

    def flush(self) -> None:
        pass

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class PlainDisplay(NoDisplay):
    """Log lines, for pipes and CI: the trainer's lines already contain step, loss and throughput."""

    wants_news = True

    def log(self, text: str) -> None:
        text = visible(text)
        print(text, end="" if text.endswith("\n") else "\n", file=sys.stderr, flush=True)


class StageDisplay(NoDisplay):
    """The steps of a service's start with their time; in a long one, how far the engine has loaded the weights.

    Nothing else of the engine's log: its warnings look like failures, and there is nothing that a user could do about them. A start
    that fails ends with the lines that say why.
    """

    wants_news = True

    def __init__(self) -> None:
        self._begun = self._last = time.monotonic()

    def log(self, text: str) -> None:
        lines = visible(text).splitlines()
        stages = [line.removeprefix(STAGE_PREFIX) for line in lines if line.startswith(STAGE_PREFIX)]
        if not stages and time.monotonic() - self._last >= _QUIET_S:
            loaded = [found[1] for line in lines if (found := _WEIGHTS_LOADED.search(line))]
            stages = [f"  {loaded[-1]} of the weights are loaded" if loaded else "  the engine is still starting"]
        for stage in stages:
            self._last = time.monotonic()
            print(f"[{self._last - self._begun:4.0f} s] {stage}", file=sys.stderr, flush=True)


def metrics_line(entry: Mapping[str, Any], validation_loss: float | None = None, *, passed_s: float = 0.0) -> str:
    """Returns the metrics of a `train` event as one short line: losses, margin, accuracy, throughput, time left.

    Args:
        entry: The event.
        validation_loss: Loss of the last evaluation, if there was one.
        passed_s: Seconds since the event; subtracted from the time left.
    """
    shown = (
        ("loss", "loss {:.3f}"),
        ("validation", "validation {:.3f}"),
        ("rewards/margins", "margin {:+.2f}"),
        ("rewards/accuracies", "accuracy {:.2f}"),
        *([] if "rewards/margins" in entry else [("mean_token_accuracy", "token accuracy {:.2f}")]),
        ("tokens_per_s", "{:.0f} tokens/s"),
        ("memory_gb", "{:.1f} GB"),
    )
    values = {**entry, "validation": validation_loss}
    parts = [form.format(values[name]) for name, form in shown if isinstance(values.get(name), int | float)]
    left = entry.get("seconds_left")
    if isinstance(left, int | float) and entry["step"] < entry.get("total_steps", 0):
        parts.append(f"{duration(max(0.0, left - passed_s))} left")
    return "  ".join(parts)
