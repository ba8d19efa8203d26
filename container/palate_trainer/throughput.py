"""Throughput, time left, peak memory, and the stages of startup.

Training time excludes evaluations and checkpoints. The caller reports each finished activity; the time since the previous
report is counted for it.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable

from palate_trainer.distributed import world_size

RECENT_WINDOWS = 5
"""Log lines over which the rate is averaged. It varies with the machine's load and the row lengths."""

_EVALUATION_SHARE = 1 / 3
"""Cost of evaluating a row relative to training on it, until an evaluation is timed: training is about three forward passes."""


class Throughput:
    """Times a run.

    Args:
        clock: Seconds from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.steps = 0.0
        """Optimizer steps of this process; fractional within the first step."""
        self.train_s = 0.0
        self.rows = 0.0
        self.tokens = 0
        self.start()

    def start(self) -> None:
        """Starts the clock: the next report covers the time from here."""
        self._began = self._mark = self._clock()
        self._evaluation_s: float | None = None
        self._checkpoint_s = 0.0
        self._marks: deque[tuple[float, float]] = deque([(0.0, 0.0)], maxlen=RECENT_WINDOWS + 1)  # (steps, train_s)
        self._after_first = (0.0, 0.0)
        self._window_s = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the start, including evaluations and checkpoints."""
        return self._clock() - self._began

    def micro_batch(self, share: float) -> None:
        """Reports a micro-batch that did not end its step; `share` of the step is done."""
        self._trained()
        # The first micro-batch includes warm-up, so the rate is measured from its end.
        if self.steps == 0 and self._marks[0] == (0.0, 0.0):
            self._marks[0] = (share, self.train_s)

    def step(self) -> None:
        """Reports an optimizer step."""
        self._trained()
        if self.steps == 1 and self._marks[0] == (0.0, 0.0):
            self._marks[0] = self._after_first
        self.steps += 1
        if self.steps == 1:
            self._after_first = (1.0, self.train_s)

    def evaluation(self) -> None:
        """Reports an evaluation."""
        self._evaluation_s = self._since_mark()

    def checkpoint(self) -> None:
        """Reports a checkpoint."""
        self._checkpoint_s = self._since_mark()

    def window(self, rows: float, tokens: int | None) -> dict[str, float]:
        """Closes the window since the previous log line and returns its rates.

        Args:
            rows: Rows trained in the window.
            tokens: Their tokens, or None if not counted.

        Returns:
            `pairs_per_s`, and `tokens_per_s` if tokens were counted.
        """
        self._trained()
        if self.steps == 1 and self._marks[0] == (0.0, 0.0):
            # Steps are asynchronous on a GPU. Logging waited for the device, so only now has the first step really ended.
            self._after_first = (1.0, self.train_s)
        seconds = max(self._window_s, 1e-9)
        self._window_s = 0.0
        self.rows += rows
        rates = {"pairs_per_s": round(rows / seconds, 3)}
        if tokens is not None:
            self.tokens += tokens
            rates["tokens_per_s"] = round(tokens / seconds, 1)
        return rates

    def seconds_left(
        self, *, steps: int, evaluations: int = 0, checkpoints: int = 0, evaluation_rows: int = 0
    ) -> float | None:
        """Estimates the seconds left from the recent rate. Call it once per window, after `window`.

        Args:
            steps: Remaining optimizer steps.
            evaluations: Remaining evaluations.
            checkpoints: Remaining checkpoints.
            evaluation_rows: Rows per evaluation.

        Returns:
            None before the first micro-batch.
        """
        from_steps, from_s = self._marks[0]
        if self.steps <= from_steps:
            return None
        step_s = (self.train_s - from_s) / (self.steps - from_steps)
        if self.steps > 1:
            self._marks.append((self.steps, self.train_s))
        evaluation_s = self._evaluation_s
        if evaluation_s is None:
            row_s = self.train_s / self.rows if self.rows else 0.0
            evaluation_s = evaluation_rows * row_s * _EVALUATION_SHARE
        return round(steps * step_s + evaluations * evaluation_s + checkpoints * self._checkpoint_s, 1)

    def totals(self) -> dict[str, float]:
        """Returns `train_seconds`, `pairs_per_s` and `tokens_per_s` over the whole run of this process."""
        seconds = max(self.train_s, 1e-9)
        totals = {"train_seconds": round(self.train_s, 2), "pairs_per_s": round(self.rows / seconds, 3)}
        if self.tokens:
            totals["tokens_per_s"] = round(self.tokens / seconds, 1)
        return totals

    def _since_mark(self) -> float:
        now = self._clock()
        passed, self._mark = now - self._mark, now
        return passed

    def _trained(self) -> None:
        passed = self._since_mark()
        self.train_s += passed
        self._window_s += passed


def peak_memory_gb() -> float | None:
    """Peak memory of this process so far: on the CUDA device if there is one, else in RAM.

    Returns:
        GB (10^9 bytes): torch's allocations on CUDA, resident memory elsewhere; None if the system does not report it.
    """
    torch = sys.modules.get("torch")  # if torch is not imported, nothing is on a device
    if torch is not None and torch.cuda.is_available():
        return round(float(torch.cuda.max_memory_allocated()) / 1e9, 3)
    try:
        # Not getrusage: its peak survives exec, so a child would report its parent's.
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None
    return round(kib * 1024 / 1e9, 3)


def device_name() -> str:
    """What the run trains on, as an estimate names it: `CPU`, a GPU, or `2 x` a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return "CPU"
    name, processes = str(torch.cuda.get_device_name()), world_size()
    return f"{processes} x {name}" if processes > 1 else name


class StartupTimes:
    """Seconds of each stage from program start to the first step, in order."""

    def __init__(self) -> None:
        self._began = self._mark = time.monotonic()
        self._stages: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Seconds since program start."""
        return time.monotonic() - self._began

    def done(self, stage: str, **within: float) -> None:
        """Ends a stage, which began when the previous one ended.

        Args:
            stage: Name of the stage.
            within: Seconds of it to report as separate stages.
        """
        now = time.monotonic()
        self._stages |= within | {stage: now - self._mark - sum(within.values())}
        self._mark = now

    def report(self) -> dict[str, float]:
        """The figures of the `start` event: total seconds so far, and those of each stage."""
        total = {"seconds_to_first_step": round(self.seconds, 2)}
        return total | {f"{stage}_seconds": round(seconds, 2) for stage, seconds in self._stages.items()}

    def line(self) -> str:
        """The same as a log line."""
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self._stages.items())
        return f"ready after {self.seconds:.1f} s: {stages}"
