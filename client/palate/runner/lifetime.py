"""When a service ends because its time is over: its time to live, and renewals while it runs. Knows the record, no process.

The runner counts by its own monotonic clock, so that a service also ends without its client and without its store. A renewal says
how long, not when: clocks of different machines are never compared.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from palate.runs.record import Record
from palate.runs.renewal import read_renewal


class Lifetime:
    """The end of one start of a service.

    `update` belongs to the thread that polls the record, the other methods to the one that watches the program.

    Args:
        record: The service, without retries.
        attempt: Number of this start.
        time_to_live_s: As in the manifest; counts until there is a renewal.
    """

    def __init__(self, record: Record, attempt: int, time_to_live_s: float | None) -> None:
        self._record = record
        self._attempt = attempt
        self._lock = threading.Lock()
        self._time_to_live_s = time_to_live_s
        self._renewal = ""  # id of the renewal that it follows
        self._noted = ""  # id of the one whose end is in the status
        self._has_begun = False
        self._is_over = False
        self._ends: tuple[float, float] | None = None
        """By the monotonic clock, and in seconds since the epoch, for people."""

    def update(self) -> None:
        """Follows the record's renewal.

        Raises:
            StoreError: The record cannot be read or written.
            DamagedFilesError: The renewal is damaged.
        """
        renewal = read_renewal(self._record)
        with self._lock:
            # Once the program is told to end, a renewal is for the next start, and its caller must not hear that it was followed.
            if renewal is not None and renewal.id != self._renewal and not self._is_over:
                self._renewal, self._time_to_live_s = renewal.id, renewal.time_to_live_s
                if self._has_begun:
                    self._count()
            unnoted = self._has_begun and self._noted != self._renewal
            details = self._details()
        # Until the status is `Running`, which the other thread writes with its own details, this is refused and tried again.
        if unnoted and self._record.add_details(self._attempt, details):
            self._noted = details["renewal"]

    def begin(self) -> dict[str, Any]:
        """Counts from now, on the first call: the service has answered. Returns the details for its status."""
        with self._lock:
            if not self._has_begun:
                self._has_begun = True
                self._count()
                # Not in a later call: its details may be refused because the earlier ones did arrive.
                self._noted = self._renewal
            return self._details() if self._renewal or self._ends else {}

    def ends_at(self) -> float | None:
        """Returns the `time.monotonic()` at which the service must end, or None. After that time no renewal is followed."""
        with self._lock:
            if self._ends is None:
                return None
            self._is_over = self._is_over or time.monotonic() >= self._ends[0]
            return self._ends[0]

    def _count(self) -> None:
        left_s = self._time_to_live_s
        self._ends = None if left_s is None else (time.monotonic() + left_s, time.time() + left_s)

    def _details(self) -> dict[str, Any]:
        return {"renewal": self._renewal, "ends_at": self._ends[1] if self._ends else None}
