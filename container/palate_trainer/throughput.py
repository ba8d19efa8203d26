"""How fast a run goes, how long it will still take, its peak memory, and where the seconds before the first step went.

Training time is counted without evaluations and checkpoints. Who trains says what has just been done; the time since the last
such word belongs to it.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable

RECENT_WINDOWS = 5
"""Log lines whose steps the rate rests on: a run slows down and speeds up with the machine and the lengths of its rows."""

_EVALUATION_SHARE = 1 / 3
"""What scoring a row takes of training on it, until an evaluation was timed: one forward pass of about three."""


class Throughput:
    """Times a run as it goes.

    Args:
        clock: Seconds from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.steps = 0.0
        """Optimizer steps of this process; a part of one is counted within the first."""
        self.train_s = 0.0
        self.rows = 0.0
        self.tokens = 0
        self.start()

    def start(self) -> None:
        """Begins to count: the next word is about what comes now."""
        self._began = self._mark = self._clock()
        self._evaluation_s: float | None = None
        self._checkpoint_s = 0.0
        self._marks: deque[tuple[float, float]] = deque([(0.0, 0.0)], maxlen=RECENT_WINDOWS + 1)  # (steps, train_s)
        self._after_first = (0.0, 0.0)
        self._window_s = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the start, evaluations and checkpoints included."""
        return self._clock() - self._began

    def micro_batch(self, share: float) -> None:
        """A micro-batch that did not end its step is done; `share` of the step lies behind."""
        self._trained()
        if self.steps == 0 and self._marks[0] == (
            0.0,
            0.0,
        ):  # the first one also warms up: what comes after it says more about the rest
            self._marks[0] = (share, self.train_s)

    def step(self) -> None:
        """An optimizer step is done."""
        self._trained()
        if self.steps == 1 and self._marks[0] == (0.0, 0.0):
            self._marks[0] = self._after_first
        self.steps += 1
        if self.steps == 1:
            self._after_first = (1.0, self.train_s)

    def evaluation(self) -> None:
        """An evaluation is done."""
        self._evaluation_s = self._since_mark()

    def checkpoint(self) -> None:
        """A checkpoint is written."""
        self._checkpoint_s = self._since_mark()

    def window(self, rows: float, tokens: int | None) -> dict[str, float]:
        """Closes the window since the line before and returns its rates.

        Args:
            rows: Rows trained on in it.
            tokens: Tokens in them, or None when nobody counted.

        Returns:
            `pairs_per_s`, and `tokens_per_s` where tokens were counted.
        """
        self._trained()
        if self.steps == 1 and self._marks[0] == (0.0, 0.0):
            self._after_first = (1.0, self.train_s)  # the line waited for the device: now the first step is really over
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
        """Seconds until the last step and what follows it, from the recent rate; call once a window, after it was closed.

        Args:
            steps: Optimizer steps to come.
            evaluations: Evaluations to come.
            checkpoints: Checkpoints to come.
            evaluation_rows: Rows of one evaluation.

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
        """Returns `train_seconds`, `pairs_per_s` and `tokens_per_s` of all that this process trained."""
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
    """The most memory that this process held so far: of the CUDA device where there is one, else of the machine.

    Returns:
        GB (10^9 bytes): torch's allocations on CUDA, resident memory elsewhere; None where the system does not say.
    """
    torch = sys.modules.get("torch")  # not worth an import: without it nothing lies on a device
    if torch is not None and torch.cuda.is_available():
        return round(float(torch.cuda.max_memory_allocated()) / 1e9, 3)
    try:
        # Not getrusage: its peak survives exec, so a child would report what its parent once held.
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None
    return round(kib * 1024 / 1e9, 3)


class StartupTimes:
    """Seconds of each stage between the program's start and the first step, in order."""

    def __init__(self) -> None:
        self._began = self._mark = time.monotonic()
        self._stages: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Since the program's start."""
        return time.monotonic() - self._began

    def done(self, stage: str, **within: float) -> None:
        """Ends a stage, which began where the one before ended.

        Args:
            stage: Its name.
            within: Seconds of it that count as stages of their own.
        """
        now = time.monotonic()
        self._stages |= within | {stage: now - self._mark - sum(within.values())}
        self._mark = now

    def report(self) -> dict[str, float]:
        """What the `start` event says: seconds up to now, and of each stage."""
        total = {"seconds_to_first_step": round(self.seconds, 2)}
        return total | {f"{stage}_seconds": round(seconds, 2) for stage, seconds in self._stages.items()}

    def line(self) -> str:
        """The same for people."""
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self._stages.items())
        return f"ready after {self.seconds:.1f} s: {stages}"
