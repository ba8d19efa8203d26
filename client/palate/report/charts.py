"""The curves of one or several runs as figures of Plotly. Knows metrics events, no store and no page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from palate_recipes.errors import MissingDependencyError
from palate_recipes.text import visible

_MOST_POINTS = 2000
"""Points of one curve. A screen has no more pixels, and the file stays small."""

_LARGEST = 1e100
"""Larger values are not drawn: Plotly calculates with their differences, which overflow."""

_COLOURS = (
    "#2f6fb0", "#d9742b", "#3a9152", "#b63b48", "#7d5fb2", "#7b5a45",
    "#c65fa5", "#666666", "#9c9a24", "#249aa8", "#8a1f5c", "#204a3a",
)  # fmt: skip
"""One per job of a comparison; dark enough on white, also in print."""


class _Series(NamedTuple):
    name: str
    kind: str
    field: str
    dash: str = "solid"


class _Chart(NamedTuple):
    title: str
    unit: str
    series: tuple[_Series, ...]


def _both(title: str, field: str, unit: str = "") -> _Chart:
    """A chart with the values of the training and those of the validation."""
    return _Chart(
        title,
        unit,
        (_Series("training", "train", field), _Series("validation", "eval", f"eval_{field}", "dot")),
    )


_CHARTS = (
    _both("Loss", "loss"),
    _both("Reward margin", "rewards/margins"),
    _Chart(
        "Rewards of chosen and rejected answers",
        "",
        (
            _Series("chosen", "train", "rewards/chosen"),
            _Series("rejected", "train", "rewards/rejected", "dash"),
            _Series("chosen, validation", "eval", "eval_rewards/chosen", "dot"),
            _Series("rejected, validation", "eval", "eval_rewards/rejected", "dashdot"),
        ),
    ),
    _both("Pairs in the right order", "rewards/accuracies", "share"),
    _both("Answer tokens ranked first", "mean_token_accuracy", "share"),
    _Chart("Learning rate", "", (_Series("learning rate", "train", "learning_rate"),)),
    _Chart("Gradient norm", "L2 norm", (_Series("gradient norm", "train", "grad_norm"),)),
    _Chart("Throughput", "tokens/s", (_Series("throughput", "train", "tokens_per_s"),)),
    _Chart("Peak memory", "GB", (_Series("memory", "train", "memory_gb"),)),
)


def require_plotly() -> None:
    """Raises MissingDependencyError if Plotly is not installed."""
    try:
        import plotly  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            "a report needs plotly, which is not installed: pip install 'palate[report]'"
        ) from None


def plotly_js() -> str:
    """Returns the source of plotly.js, from the installed package."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def figures(runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> list[tuple[str, dict[str, Any]]]:
    """Returns title and figure of each chart for which a run has values.

    Args:
        runs: Name and metrics events of each run. Several runs are overlaid, one colour each.
    """
    from plotly import graph_objects

    found, several = [], len(runs) > 1
    axis = {"gridcolor": "#e3e6ea", "zerolinecolor": "#c3c8cf"}
    for chart in _CHARTS:
        traces, is_shared = [], len(chart.series) > 1
        for at, (run, events) in enumerate(runs):
            for turn, series in enumerate(chart.series[:2] if several else chart.series):
                steps, values = _points(events, series)
                if not any(value is not None for value in values):
                    continue
                words = [*([run] if several else []), *([series.name] if is_shared or not several else [])]
                traces.append(
                    graph_objects.Scatter(
                        x=steps,
                        y=values,
                        # Plotly shows a subset of HTML in names, links included.
                        name=escape(visible(", ".join(words))),
                        mode="lines+markers" if len(steps) <= 60 else "lines",
                        line={"color": _COLOURS[(at if several else turn) % len(_COLOURS)], "dash": series.dash},
                        marker={"size": 5},
                        hovertemplate="%{y:.4g}",
                    )
                )
        if not traces:
            continue
        figure = graph_objects.Figure(
            traces,
            {
                "template": "none",  # the others repeat 7 KB of settings in each figure
                "autosize": True,
                "height": 255 + 20 * math.ceil(len(traces) / 2),  # the legend has two names in a line
                "margin": {"l": 56, "r": 12, "t": 30, "b": 28},
                "hovermode": "x unified",
                "showlegend": len(traces) > 1,
                "legend": {"orientation": "h", "y": -0.12, "x": 0},
                "xaxis": axis,
                "yaxis": {**axis, "title": {"text": chart.unit, "standoff": 4}, "automargin": True},
                "font": {"size": 12, "family": "system-ui, sans-serif"},
            },
        )
        found.append((chart.title, figure.to_plotly_json()))
    return found


def _points(events: Sequence[Mapping[str, Any]], series: _Series) -> tuple[list[int], list[float | None]]:
    """Returns steps and values of a curve. A value that is missing or cannot be drawn interrupts the line."""
    chosen = [event for event in events if event.get("kind") == series.kind and series.field in event]
    chosen = chosen[:: -(len(chosen) // _MOST_POINTS + 1)][::-1]  # keeps the last
    return [event["step"] for event in chosen], [_drawn(event[series.field]) for event in chosen]


def _drawn(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and abs(value) <= _LARGEST else None  # NaN is not
