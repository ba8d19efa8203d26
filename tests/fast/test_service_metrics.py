"""What `palate top` reads of a service's metrics: the page's text, the load between two pages, and the command itself."""

from __future__ import annotations

import json
import math
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from palate.http import http_client
from palate.runs.record import TOKEN_KEY, Record
from palate.service_metrics import Load, Page, Sample, quantile, read_page
from palate.store import open_store
from palate_recipes import __version__
from palate_recipes.errors import ServiceError
from tests.support.fronted import FrontedService, fronted_service
from tests.support.manifests import serve_manifest

TOKEN = "a-token-for-tests"


def page(text: str, *, at: float = 0.0) -> Page:
    return Page(Page.of(text).samples, read_at=at, read_time=1000.0 + at)


def test_the_text_format_is_read() -> None:
    text = (
        "# HELP a what\n# TYPE a gauge\na 1.0\n"
        'b{x="1",y="a \\"b\\" \\\\ \\n }"} 2e3 1700000000\n'
        "nan_one NaN\nbroken{ 1\nbroken 1 2 3\n\nvllm:c{} +Inf\nb -1\n"
    )
    assert Page.of(text).samples == (
        Sample("a", {}, 1.0),
        Sample("b", {"x": "1", "y": 'a "b" \\ \n }'}, 2000.0),
        Sample("b", {}, -1.0),
    )
    assert Page.of(text).total("b") == 1999
    assert Page.of(text).total("c") is None


def counts(
    *,
    started: float = 900,
    ended: int = 0,
    below_1: int = 0,
    below_5: int = 0,
    tokens: int = 0,
    vllm: int | None = None,
) -> str:
    path = 'path="/v1/chat/completions"'
    lines = [
        f"palate_start_time_seconds {started}",
        'palate_service_info{engine="e",engine_version="1",palate="2",service="svc"} 1',
        "palate_open_requests 3",
        f'palate_request_duration_seconds_bucket{{le="1.0",{path}}} {below_1}',
        f'palate_request_duration_seconds_bucket{{le="5.0",{path}}} {below_5}',
        f'palate_request_duration_seconds_bucket{{le="+Inf",{path}}} {ended}',
        'palate_request_duration_seconds_bucket{le="+Inf",path="/v1/models"} 7',
        f"palate_request_duration_seconds_count{{{path}}} {ended}",
        f'palate_completion_tokens_total{{model="default"}} {tokens}',
        'palate_requests_total{model="",path="other",status="502"} 2',
        'palate_requests_total{model="",path="other",status="404"} 9',
        'palate_rejected_total{reason="token"} 4',
        'palate_rejected_total{reason="model"} 1',
    ]
    if vllm is not None:
        lines += [f"vllm:generation_tokens_total {vllm}", "vllm:num_requests_waiting 5", "vllm:kv_cache_usage_perc 0.5"]
    return "\n".join(lines)


def test_rates_and_times_are_those_between_the_pages() -> None:
    before = page(counts(ended=10, below_1=10, below_5=10, tokens=100))
    after = page(counts(ended=30, below_1=10, below_5=30, tokens=300), at=10.0)
    load = Load.between(before, after)
    assert (load.window_s, load.uptime_s) == (10, 110)
    assert (load.requests_per_s, load.tokens_per_s) == (2, 20)
    assert load.p50_s == pytest.approx(3.0)  # half of the 20 between 1 and 5 s
    assert load.p95_s == pytest.approx(4.8)
    assert load.first_byte_p50_s is None
    assert (load.open, load.requests, load.errors, load.rejected, load.disconnects) == (3, 30, 2, 5, 0)
    assert (load.running, load.queued, load.cache_used) == (None, None, None)
    assert (load.service, load.engine, load.engine_version, load.palate_version) == ("svc", "e", "1", "2")


def test_the_engines_own_counts_are_used_where_it_has_some() -> None:
    load = Load.between(page(counts(vllm=100)), page(counts(tokens=7, vllm=150), at=5.0))
    assert (load.tokens_per_s, load.queued, load.cache_used) == (10, 5, 0.5)


def test_without_an_answer_in_the_window_the_times_are_those_since_the_start() -> None:
    same = counts(ended=4, below_1=4, below_5=4)
    load = Load.between(page(same), page(same, at=5.0))
    assert (load.requests_per_s, load.times_since_start, load.p50_s) == (0, True, 0.5)


def test_a_restart_between_the_pages_begins_at_zero() -> None:
    after = page(counts(started=1000, ended=6, below_1=6, below_5=6), at=3.0)
    load = Load.between(page(counts(started=900, ended=50)), after)
    assert (load.window_s, load.requests_per_s, load.requests) == (3, 2, 6)


@pytest.mark.parametrize(
    ("found", "share", "value"),
    [
        ({}, 0.5, None),
        ({1.0: 0, math.inf: 0}, 0.5, None),
        ({1.0: 4, math.inf: 4}, 0.25, 0.25),
        ({1.0: 0, 2.0: 4, math.inf: 4}, 0.5, 1.5),
        ({1.0: 1, math.inf: 4}, 0.95, 1.0),
    ],
)
def test_a_quantile_is_interpolated_within_its_bucket(found: dict[float, float], share: float, value: float) -> None:
    assert quantile(found, share) == value


@pytest.fixture
def service(home: Path) -> Iterator[FrontedService]:
    """A running service `svc` in the home's store, with the gateway and no engine."""
    store = open_store(f"file://{home}/store")
    record = Record(store, "services", "svc")
    record.create(serve_manifest())
    store.put(record.key(TOKEN_KEY), TOKEN.encode(), private=True)
    with fronted_service(TOKEN) as started:
        record.advance("Running", expect={"Creating"}, endpoint=started.endpoint, engine_id="elsewhere:1:2:x")
        headers = {"Authorization": f"Bearer {TOKEN}"}
        for _ in range(3):
            assert httpx.post(f"{started.endpoint}/v1/completions", headers=headers, json={}).status_code == 200
        assert httpx.post(f"{started.endpoint}/v1/completions", json={}).status_code == 401
        yield started


def top(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "palate.cli", "top", "svc", "--interval", "0.1", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PALATE_HOME": str(home)},
        timeout=60,
    )


def test_top_prints_json_once(home: Path, service: FrontedService) -> None:
    done = top(home, "--once", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    load = json.loads(done.stdout)
    assert (load["service"], load["palate_version"]) == ("svc", __version__)
    assert (load["requests"], load["rejected"], load["errors"], load["open"]) == (4, 1, 0, 0)
    assert load["p50_s"] > 0
    assert load["times_since_start"] is True
    assert TOKEN not in done.stdout


def test_top_prints_a_header_and_a_line_without_a_terminal(home: Path, service: FrontedService) -> None:
    done = top(home, "--once")
    header, line = done.stdout.splitlines()
    facts = dict(zip(header.split("\t"), line.split("\t"), strict=True))
    assert (facts["service"], facts["requests"], facts["queued"]) == ("svc", "4", "-")


def test_top_draws_on_a_terminal_until_ctrl_c(home: Path, service: FrontedService) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "palate.cli", "top", "svc", "--interval", "0.1"],
        stdin=follower,
        stdout=follower,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PALATE_HOME": str(home), "TERM": "xterm"},
    )
    os.close(follower)
    drawn = b""
    try:
        while drawn.count(b"requests/s") < 3:
            drawn += os.read(leader, 65536)
        process.send_signal(2)
        with open(leader, "rb", buffering=0) as screen:
            try:
                while data := screen.read(65536):
                    drawn += data
            except OSError:
                pass  # Linux's end of a terminal
        assert process.wait(timeout=30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
        process.stderr.close()
    finally:
        process.kill()
        process.wait()
    assert b"\x1b[?25h" in drawn[-200:]  # the cursor is back


def test_a_service_without_metrics_is_one_error_with_a_remedy(home: Path, service: FrontedService) -> None:
    with http_client(service.endpoint, TOKEN, timeout_s=10) as client, pytest.raises(ServiceError, match="status 401"):
        read_page(client, service.endpoint, "wrong")
    service.process.kill()
    service.process.wait()
    done = top(home, "--once")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: the service at ")
    assert "palate services" in done.stderr
