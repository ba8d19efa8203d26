"""The live table of `palate services --live`. Knows records, metrics and output, no engine."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from palate.cli.format import age, largest_unit, left
from palate_recipes.errors import PalateError

if TYPE_CHECKING:
    import httpx

    from palate.runs.list import Listing, RunSummary
    from palate.service_metrics import Load, Page

_WINDOW_S = 60.0
"""Rates are those of the last minute."""
_ANSWER_S = 2.0
"""A service that does not answer within this time has no rates in this reading. The others must not wait for it."""


def show_live(read: Callable[[], Listing], interval_s: float, *, wide: bool = False) -> None:
    """Draws the services until Ctrl-C.

    A store that fails later than in the first reading is named below the table, which stays as it was.

    Args:
        read: Returns the services to show.
        interval_s: Seconds between two readings.
        wide: Show all columns.

    Raises:
        PalateError: The first reading failed.
    """
    from palate.ui.terminal import Column, LiveView

    columns = (
        "service",
        "state",
        Column("model", 5),
        Column("uptime", 4),
        Column("ends in", 1),
        Column("requests/min", 2),
        Column("tokens/s", 3),
    )
    loads, rows, view = _Loads(), list[tuple[str, ...]](), None
    try:
        with ExitStack() as stack:
            while True:
                below = ""
                try:
                    listing = read()
                except PalateError as error:
                    if view is None:
                        raise
                    below = f"as before, because the store cannot be read: {error}"
                else:
                    found = loads.read(listing.runs)
                    rows = [_row(run, found.get(run.name)) for run in (*listing.runs, *listing.unread)]
                    below = _below(listing)
                # Begun with the first reading, so that an error before it is a plain message.
                view = view or stack.enter_context(LiveView())
                view.show_table(columns, rows, below=below, wide=wide)
                time.sleep(interval_s)
    except KeyboardInterrupt:
        pass  # the way to end it


def _below(listing: Listing) -> str:
    if listing.unread:
        return f"{len(listing.unread)} could not be read (the rows with a ?): {listing.unread[0].error}"
    return "" if listing.runs else "no services"


def _row(run: RunSummary, load: Load | None) -> tuple[str, ...]:
    status = run.status
    is_running = status is not None and status.state == "Running"
    return (
        run.name,
        status.state if status else "?",
        run.manifest.model_name if run.manifest else "?",
        age(status.started_at) if is_running and status and status.started_at else "-",
        _end(run) if is_running else "-",
        f"{60 * load.requests_per_s:.1f}" if load else "-",
        f"{load.tokens_per_s:.1f}" if load else "-",
    )


def _end(run: RunSummary) -> str:
    from palate.predictor import ends_at
    from palate_recipes.specs.run import ServeManifest

    if run.status is not None and (end := ends_at(run.status)) is not None:
        return left(end)
    body = run.manifest.body if isinstance(run.manifest, ServeManifest) else None
    return f"{largest_unit(body.idle_time_to_live_s)} idle" if body and body.idle_time_to_live_s else "never"


class _Loads:
    """What the running services do. Reads them at the same time, so that one that hangs delays no other."""

    def __init__(self) -> None:
        self._meters: dict[str, _Meter] = {}

    def read(self, runs: list[RunSummary]) -> dict[str, Load]:
        """Returns the load of each service by name, from its second answer on."""
        from palate.runs.list import each_result

        running = {run.name: run for run in runs if run.status is not None and run.status.endpoint}
        self._meters = {name: self._meters.get(name) or _Meter() for name in running}
        meters, found = self._meters, {}
        deadline = time.monotonic() + _ANSWER_S
        for name, load in each_result(lambda name: meters[name].read(running[name]), [*running], deadline):
            if isinstance(load, BaseException):
                raise load
            if load is not None:
                found[name] = load
        return found


class _Meter:
    """The metrics of one service within the last minute."""

    def __init__(self) -> None:
        self._pages: deque[Page] = deque()
        self._client: httpx.Client | None = None
        self._endpoint = self._token = ""
        self._busy = threading.Lock()

    def read(self, run: RunSummary) -> Load | None:
        """Returns what the service did within the last minute, or None if that is not known."""
        from palate.http import checked_endpoint, http_client
        from palate.runs.access import owner_token
        from palate.service_metrics import Load, read_page

        assert run.status is not None
        if not self._busy.acquire(blocking=False):
            return None  # an earlier reading still waits for the service
        try:
            if self._client is None or self._endpoint != run.status.endpoint:
                self._endpoint, self._token = checked_endpoint(run.status.endpoint), owner_token(run.handle.record)
                self._client = http_client(self._endpoint, self._token, timeout_s=_ANSWER_S)
            page = read_page(self._client, self._endpoint, self._token)
            while len(self._pages) > 1 and page.read_at - self._pages[0].read_at > _WINDOW_S:
                self._pages.popleft()
            self._pages.append(page)
        except PalateError:  # unreachable from here, another token by now, an earlier version: shown as unknown
            self._client = None
            self._pages.clear()
        finally:
            self._busy.release()
        return Load.between(self._pages[0], page) if len(self._pages) > 1 else None
