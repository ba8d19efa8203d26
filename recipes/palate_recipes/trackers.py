"""Trackers that a training can report to: names, packages, variables. Imports none of them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

OFF = "none"

PREFIXES: Mapping[str, str] = {"tensorboard": "", "trackio": "TRACKIO_", "mlflow": "MLFLOW_", "wandb": "WANDB_"}
"""Trackers by transformers' names, which are their packages' too, and the prefix of the variables that configure them."""


def chosen(report_to: str) -> list[str]:
    """Returns the trackers of a value of `report_to`."""
    return [name for name in report_to.split(",") if name != OFF]


def missing(report_to: str) -> str:
    """Returns a message with the remedy if a tracker's package is not installed in this environment, else ""."""
    absent = [name for name in chosen(report_to) if find_spec(name) is None]
    if not absent:
        return ""
    packages = " ".join({"mlflow": "mlflow-skinny"}.get(name, name) for name in absent)
    return (
        f"report_to={report_to}: {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed in the environment that"
        f" trains: pip install {packages}, or remove it from report_to"
    )


def variables(report_to: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that configure the chosen trackers, such as MLFLOW_TRACKING_URI."""
    prefixes = tuple(prefix for name in chosen(report_to) if (prefix := PREFIXES.get(name)))
    return {name: value for name, value in environment.items() if prefixes and name.startswith(prefixes)}
