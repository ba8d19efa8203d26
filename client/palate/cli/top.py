"""The command `top`: what a service is doing, again and again. Knows its metrics and output, no engine."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from palate.cli.format import age
from palate_recipes.text import visible

if TYPE_CHECKING:
    from palate.service_metrics import Load

_WINDOW_S = 60.0
"""Rates and times are those of the last minute: a shorter window is empty between two slow answers."""
_TIMEOUT_S = 10.0


def top(
    name: Annotated[str, typer.Argument(help="Service name.")],
    once: Annotated[bool, typer.Option("--once", help="Show it once, measured over one interval.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two readings.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one line per reading.")] = False,
) -> None:
    """Show a service's rates, times and errors until Ctrl-C.

    A live view on a terminal, a tab-separated line per reading elsewhere. Rates and times are those of the last minute.
    """
    from palate.predictor import Predictor

    predictor = Predictor(name)
    loads = _loads(predictor.endpoint, predictor.access_token, interval, once)
    try:
        if as_json:
            _print_json(loads)
        elif sys.stdout.isatty():
            _draw(loads)
        else:
            _print_lines(loads)
    except KeyboardInterrupt:
        pass  # the way to end it


def _loads(endpoint: str, token: str, interval_s: float, once: bool) -> Iterator[Load]:
    """Yields the load of the last minute after each reading. The first is that since the start, but with `once`."""
    from palate.http import http_client
    from palate.service_metrics import Load, Page, read_page

    pages: deque[Page] = deque()
    with http_client(endpoint, token, timeout_s=_TIMEOUT_S) as client:
        while True:
            page = read_page(client, endpoint, token)
            while pages and page.read_at - pages[0].read_at > _WINDOW_S and len(pages) > 1:
                pages.popleft()
            if pages or not once:
                yield Load.between(pages[0] if pages else None, page)
                if once:
                    return
            pages.append(page)
            time.sleep(interval_s)


def _print_json(loads: Iterator[Load]) -> None:
    from dataclasses import asdict

    for load in loads:
        print(json.dumps(asdict(load)), flush=True)


def _print_lines(loads: Iterator[Load]) -> None:
    is_first = True
    for load in loads:
        facts = _facts(load)
        if is_first:
            print("\t".join(name for name, _ in facts))
        is_first = False
        print(visible("\t".join(value for _, value in facts)), flush=True)


def _draw(loads: Iterator[Load]) -> None:
    from palate.ui.terminal import LiveView

    with ExitStack() as stack:
        view: LiveView | None = None
        for load in loads:
            # Begun with the first reading, so that an error before it is a plain message.
            view = view or stack.enter_context(LiveView())
            view.show_facts(_facts(load))


def _facts(load: Load) -> list[tuple[str, str]]:
    since = "since the start" if load.times_since_start else f"{load.window_s:.0f} s"
    return [
        ("service", load.service),
        ("engine", f"{load.engine} {load.engine_version}".strip()),
        ("palate", load.palate_version),
        ("uptime", age(time.time() - load.uptime_s)),
        ("window", f"{load.window_s:.0f} s"),
        ("requests/s", f"{load.requests_per_s:.2f}"),
        ("tokens/s", f"{load.tokens_per_s:.1f}"),
        ("open", str(load.open)),
        ("running", _or_dash(load.running)),
        ("queued", _or_dash(load.queued)),
        ("cache", "-" if load.cache_used is None else f"{load.cache_used:.0%}"),
        ("p50", _seconds(load.p50_s)),
        ("p95", _seconds(load.p95_s)),
        ("first byte p50", _seconds(load.first_byte_p50_s)),
        ("first byte p95", _seconds(load.first_byte_p95_s)),
        ("times of", since),
        ("requests", str(load.requests)),
        ("errors", str(load.errors)),
        ("rejected", str(load.rejected)),
        ("disconnects", str(load.disconnects)),
    ]


def _or_dash(count: int | None) -> str:
    return "-" if count is None else str(count)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(top)
