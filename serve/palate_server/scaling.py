"""How many engines a version should have for its open requests. Knows numbers and a clock, no engine."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from palate_recipes.specs.run import Autoscaling

TARGET_REQUESTS = {False: 32.0, True: 4.0}
"""Open requests per engine to aim at, where the user named no number: on a GPU, and on a processor (True)."""


@dataclass(eq=False)
class Scaler:
    """Follows the open requests with a number of engines.

    The requests are averaged over `upscale_delay_s`. When the average needs more engines than there are, so many are added; when
    it needed fewer during all of `downscale_delay_s`, some end, down to the most that was needed within that time. An
    engine that still starts counts: it was added for these requests.

    Attributes:
        level: The number of engines that it wants now.
    """

    level: int
    _requests: deque[tuple[float, int]] = field(default_factory=deque)
    _needs: deque[tuple[float, int]] = field(default_factory=deque)

    def follow(self, requests: int, *, least: int, settings: Autoscaling, target: float, now: float) -> int:
        """Takes a look and returns the new level.

        Args:
            requests: Open requests, waiting ones included.
            least: The least number of engines.
            settings: The most, and the delays.
            target: Open requests per engine to aim at.
            now: Monotonic time.
        """
        most = max(least, settings.max_instances)
        self._requests.append((now, requests))
        covers_up = _forget(self._requests, now - settings.upscale_delay_s)
        average = sum(count for _, count in self._requests) / len(self._requests)
        needed = min(max(math.ceil(average / target), least), most)
        self._needs.append((now, needed))
        covers_down = _forget(self._needs, now - settings.downscale_delay_s)
        if covers_up and needed > self.level:
            self.level = needed
        elif covers_down:
            self.level = min(self.level, max(one for _, one in self._needs))
        self.level = min(max(self.level, least), most)
        return self.level


def _forget(looks: deque[tuple[float, int]], before: float) -> bool:
    """Forgets what is older than a time, except for the last of it, and returns whether the looks reach back so far."""
    while len(looks) > 1 and looks[1][0] <= before:
        looks.popleft()
    return looks[0][0] <= before
