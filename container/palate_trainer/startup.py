"""Where the seconds before the first step go. Knows a clock, no stage in particular."""

from __future__ import annotations

import time


class Startup:
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
