"""A service's `/metrics` page as numbers, and what happened between two pages. Knows the metrics' names, no record and no output."""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from palate_recipes.errors import ServiceError
from palate_recipes.specs.serve import GENERATION_PATHS, METRICS_PATH

if TYPE_CHECKING:
    import httpx

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?")
_LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"')
_ESCAPED = {r"\\": "\\", r"\"": '"', r"\n": "\n"}

_DURATION = "palate_request_duration_seconds"
_FIRST_BYTE = "palate_time_to_first_byte_seconds"


@dataclass(frozen=True)
class Sample:
    """One line of the page."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class Page:
    """What a service had counted at one moment.

    Attributes:
        samples: The page's lines.
        read_at: When it was read, by the monotonic clock.
        read_time: The same, in seconds since the epoch.
    """

    samples: tuple[Sample, ...]
    read_at: float
    read_time: float

    @classmethod
    def of(cls, text: str) -> Page:
        """Reads Prometheus' text format; lines in any other form are skipped."""
        found = []
        for line in text.splitlines():
            matched = None if line.startswith("#") else _SAMPLE.fullmatch(line.strip())
            if matched is None:
                continue
            try:
                value = float(matched[3])
            except ValueError:
                continue
            if not math.isfinite(value):
                continue
            labels = {
                name: re.sub(r"\\.", lambda one: _ESCAPED.get(one[0], one[0]), text)
                for name, text in _LABEL.findall(matched[2] or "")
            }
            found.append(Sample(matched[1], labels, value))
        return cls(tuple(found), time.monotonic(), time.time())

    def total(self, name: str) -> float | None:
        """Returns the sum of a metric over its labels; None if the page does not have it."""
        values = [sample.value for sample in self.samples if sample.name == name]
        return sum(values) if values else None

    @property
    def started_at(self) -> float:
        return self.total("palate_start_time_seconds") or 0.0

    @property
    def versions(self) -> Mapping[str, str]:
        return next((sample.labels for sample in self.samples if sample.name == "palate_service_info"), {})

    def answers_by_bound(self, name: str) -> dict[float, float]:
        """Returns how many answers of a model took up to each bound in seconds, from a histogram."""
        counts: dict[float, float] = defaultdict(float)
        for sample in self.samples:
            if sample.name == f"{name}_bucket" and sample.labels.get("path") in GENERATION_PATHS:
                counts[float(sample.labels.get("le", "inf"))] += sample.value
        return dict(counts)

    def server_errors(self) -> float:
        """Returns the number of answers with a 5xx status."""
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == "palate_requests_total" and sample.labels.get("status", "").startswith("5")
        )


def read_page(client: httpx.Client, endpoint: str, token: str) -> Page:
    """Reads a service's metrics.

    Raises:
        ServiceError: The service does not answer, or its version has no metrics.
    """
    import httpx

    try:
        answer = client.get(f"{endpoint}{METRICS_PATH}", headers={"Authorization": f"Bearer {token}"})
    except httpx.HTTPError as error:
        raise ServiceError(
            f"the service at {endpoint} does not answer",
            reason=f"{type(error).__name__}: {error}. Run `palate services` to see whether it runs",
        ) from error
    page = Page.of(answer.text) if answer.status_code == 200 else None
    if page is None or not page.started_at:
        raise ServiceError(
            f"the service at {endpoint} has no metrics",
            reason=f"it answered {METRICS_PATH} with status {answer.status_code}. If an older version of Palate started it, run "
            "`palate stop NAME` and `palate start NAME` to restart it",
        )
    return page


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a service does. Rates and times are those of the window, counts those since the start of its engine.

    Attributes:
        service: Its name.
        engine: The engine's package.
        engine_version: That package's version.
        palate_version: Version of Palate.
        uptime_s: Seconds since the engine's process began.
        window_s: Seconds that the rates are about.
        requests_per_s: Requests whose answer ended; without health checks and the like.
        tokens_per_s: Generated tokens: those that the engine counts, else those that answers tell.
        open: Requests that are being answered.
        running: Those that the engine computes; None if it does not say.
        queued: Those that wait in the engine; None if it does not say.
        cache_used: Used part of the KV cache, 0 to 1; None if the engine does not say.
        p50_s: Median time to the end of a model's answer; None without an answer.
        p95_s: 95th percentile of it.
        first_byte_p50_s: Median time to the first byte of a model's answer.
        first_byte_p95_s: 95th percentile of it.
        times_since_start: The times are those of all answers since the start, because none ended within the window.
        requests: Requests since the start.
        errors: Answers with a 5xx status since the start.
        rejected: Requests that did not reach the engine since the start.
        disconnects: Clients that left before their answer's end since the start.
    """

    service: str
    engine: str
    engine_version: str
    palate_version: str
    uptime_s: float
    window_s: float
    requests_per_s: float
    tokens_per_s: float
    open: int
    running: int | None
    queued: int | None
    cache_used: float | None
    p50_s: float | None
    p95_s: float | None
    first_byte_p50_s: float | None
    first_byte_p95_s: float | None
    times_since_start: bool
    requests: int
    errors: int
    rejected: int
    disconnects: int

    @classmethod
    def between(cls, before: Page | None, after: Page) -> Load:
        """Returns the load between two pages; without the first, since the start."""
        if before is not None and before.started_at != after.started_at:
            before = None  # the service was restarted meanwhile, and counts from 0
        uptime_s = max(0.0, after.read_time - after.started_at)
        window_s = uptime_s if before is None else after.read_at - before.read_at
        tokens = "vllm:generation_tokens_total"
        if after.total(tokens) is None:
            tokens = "palate_completion_tokens_total"

        def rate(name: str) -> float:
            earlier = 0.0 if before is None else before.total(name) or 0.0
            return max(0.0, (after.total(name) or 0.0) - earlier) / window_s if window_s > 0 else 0.0

        def count(name: str) -> int:
            return int(after.total(name) or 0)

        def gauge(name: str) -> int | None:
            value = after.total(name)
            return None if value is None else int(value)

        ended = _since(before, after, _DURATION)
        times_since_start = before is not None and not ended.get(math.inf)
        base = None if times_since_start else before
        durations, first_bytes = _since(base, after, _DURATION), _since(base, after, _FIRST_BYTE)
        versions = after.versions
        return cls(
            service=versions.get("service", ""),
            engine=versions.get("engine", ""),
            engine_version=versions.get("engine_version", ""),
            palate_version=versions.get("palate", ""),
            uptime_s=uptime_s,
            window_s=window_s,
            requests_per_s=rate(f"{_DURATION}_count"),
            tokens_per_s=rate(tokens),
            open=count("palate_open_requests"),
            running=gauge("vllm:num_requests_running"),
            queued=gauge("vllm:num_requests_waiting"),
            cache_used=after.total("vllm:kv_cache_usage_perc"),
            p50_s=quantile(durations, 0.5),
            p95_s=quantile(durations, 0.95),
            first_byte_p50_s=quantile(first_bytes, 0.5),
            first_byte_p95_s=quantile(first_bytes, 0.95),
            times_since_start=times_since_start,
            requests=count(f"{_DURATION}_count"),
            errors=int(after.server_errors()),
            rejected=count("palate_rejected_total"),
            disconnects=count("palate_client_disconnects_total"),
        )


def _since(before: Page | None, after: Page, name: str) -> dict[float, float]:
    earlier = {} if before is None else before.answers_by_bound(name)
    return {bound: count - earlier.get(bound, 0.0) for bound, count in after.answers_by_bound(name).items()}


def quantile(counts: Mapping[float, float], share: float) -> float | None:
    """Returns the value below which a share of the observations lies, interpolated within its bucket as Prometheus does.

    Args:
        counts: Observations up to each upper bound, cumulative; the last bound is infinite.
        share: 0 to 1.

    Returns:
        None without observations; the last finite bound if the value is above it.
    """
    bounds = sorted(counts)
    if not bounds or counts[bounds[-1]] <= 0:
        return None
    wanted = share * counts[bounds[-1]]
    low, below = 0.0, 0.0
    for bound in bounds:
        if counts[bound] >= wanted:
            inside = counts[bound] - below
            if math.isinf(bound):
                return low
            return low + (bound - low) * ((wanted - below) / inside if inside > 0 else 1.0)
        low, below = bound, counts[bound]
    return low
