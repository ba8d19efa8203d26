"""Where a request goes: from a model name to a version or an adapter, and to one of the engines that serve it. Knows no HTTP.

The fleet replaces the table as a whole when something changes; the front reads it for each request. So a request sees one state,
and no lock is needed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

Parameters = Callable[[str, dict[str, Any]], dict[str, Any]]
"""Returns a JSON request, given with its path, as the engine should get it. Raises Refused."""


class Answering(Protocol):
    """An engine, as far as requests need it.

    Attributes:
        name: Its name, such as `v1-0`.
        socket: Path of the Unix socket that it listens on.
        takes: Whether it may get new requests.
        models: The engine's names of the models that it has.
        open: Requests that it answers now. Only the front changes it.
        moved_at: Monotonic time of its last progress: bytes of an answer that its model has made.
        waits_from: Monotonic time since which there was an open request, without the time when there was none.
        still_s: Seconds without progress, counted as in `waits_from`, up to when it had no more open requests.
    """

    name: str
    socket: str
    takes: bool
    models: set[str]
    open: int
    moved_at: float
    waits_from: float
    still_s: float


def unchanged(_path: str, request: dict[str, Any]) -> dict[str, Any]:
    return request


@dataclass(eq=False, kw_only=True)
class Lane:
    """The engines that serve one model under one name of the engine's.

    Attributes:
        model: The engine's name of the model.
        label: The model in metrics and log.
        version: The version in metrics; "" for a model that has none.
        engines: The pool's engines; the list changes while the service runs.
        parameters: See `Parameters`.
        max_model_len: Context length in tokens, for the model's card; None if unknown.
        open: Requests that use this lane now.
        wakes: Whether requests wait for an engine that is still to be started, instead of being refused.
    """

    model: str
    label: str
    version: str = ""
    engines: Sequence[Answering] = ()
    parameters: Parameters = unchanged
    max_model_len: int | None = None
    open: int = 0
    wakes: bool = False

    def engine(self, *, without: Sequence[Answering] = ()) -> Answering | None:
        """Returns the engine with the fewest open requests, at random among equals; None if no other can take one."""
        # A copy: the service's thread changes the list.
        able = [one for one in tuple(self.engines) if one.takes and self.model in one.models and one not in without]
        fewest = min((one.open for one in able), default=0)
        return random.choice([one for one in able if one.open == fewest]) if able else None


@dataclass(frozen=True, kw_only=True)
class Table:
    """The lanes by model name.

    Attributes:
        lanes: By the name in requests: lanes with their shares of the requests. The first name's lane answers what has no model.
        trials: Versions that do not answer for others yet, by name: only the server program's own requests reach them.
        instances: Number of engines by version and state: `starting`, `ready` or `draining`. Versions that differ only in their
            adapter share engines.
        restarts: How many times an engine was started again, by version.
    """

    lanes: Mapping[str, Sequence[tuple[float, Lane]]] = field(default_factory=dict)
    trials: Mapping[str, Mapping[str, Lane]] = field(default_factory=dict)
    instances: Mapping[tuple[str, str], int] = field(default_factory=dict)
    restarts: Mapping[str, int] = field(default_factory=dict)


class Routes:
    """The current table."""

    def __init__(self, table: Table | None = None) -> None:
        self.table = table or Table()
        self.created = int(time.time())
        self.waiting = 0
        """Requests that wait for an engine. Only the front changes it."""
        self.is_asleep = False
        """Whether the service has ended its engines until a request comes."""

    def names(self) -> list[str]:
        return list(self.table.lanes)

    def lane(self, name: str, *, version: str = "") -> Lane | None:
        """Returns the lane for a request that names this model; None if there is none.

        Args:
            name: The model's name in the request.
            version: A version on trial, for the server program's own requests.
        """
        if version:
            return self.table.trials.get(version, {}).get(name)
        shares = self.table.lanes.get(name, ())
        if len(shares) <= 1:
            return shares[0][1] if shares else None
        lanes = [lane for _, lane in shares]
        return random.choices(lanes, [share for share, _ in shares])[0]

    def any_lane(self) -> Lane | None:
        """Returns the lane for a request without a model, such as `GET /version`."""
        return next((self.lane(name) for name in self.table.lanes), None)

    def each_engine(self) -> dict[str, Lane]:
        """Returns a lane for every engine that takes requests, by the engine's name."""
        lanes = [lane for shares in self.table.lanes.values() for _, lane in shares]
        taking = {
            one.name: (one, lane)
            for lane in lanes
            for one in tuple(lane.engines)
            if one.takes and lane.model in one.models
        }
        return {name: replace(lane, engines=(one,)) for name, (one, lane) in sorted(taking.items())}

    def card(self, name: str) -> dict[str, Any] | None:
        """Returns a model's entry in `/v1/models`."""
        shares = self.table.lanes.get(name)
        if not shares:
            return None
        lane = max(shares, key=lambda one: one[0])[1]
        card = {"id": name, "object": "model", "created": self.created, "owned_by": "palate", "root": lane.model}
        return card if lane.max_model_len is None else {**card, "max_model_len": lane.max_model_len}
