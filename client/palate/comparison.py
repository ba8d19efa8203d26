"""Compares jobs: what differs between them, and what came out, ranked by a metric. Reads records, trains nothing."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import asdict

from palate.evaluation import record as evaluations
from palate.job import TrainingJob
from palate.runs.list import each_result
from palate.session import Session
from palate_recipes.errors import ConfigurationError, JobNotReadyError, PalateError
from palate_recipes.hyperparameters import incomparable_losses
from palate_recipes.text import did_you_mean, html_block, html_table, html_text, visible, visible_line

METRICS: Mapping[str, bool] = {
    "eval_loss": False,
    "best_eval_loss": False,
    "eval_rewards/accuracies": True,
    "eval_rewards/margins": True,
    "eval_mean_token_accuracy": True,
    "final_loss": False,
    "win_rate": True,
    "tokens_per_s": True,
    "seconds": False,
}
"""Metrics that rank jobs, and whether higher is better."""

EVALUATION_METRICS = tuple(name for name in METRICS if name.startswith("eval_") or name == "best_eval_loss")
"""Those that need validation data."""

_ACCURACY, _MARGIN = "eval_rewards/accuracies", "eval_rewards/margins"
_LOSSES = ("eval_loss", "best_eval_loss", "final_loss")
_NOT_SETTINGS = ("precision",)  # in the hyperparameters too, as it was given


@dataclass(frozen=True, kw_only=True)
class ComparedJob:
    """A job in a comparison.

    Attributes:
        id: The job's id.
        state: Its state.
        settings: Everything that may differ: model, method, hyperparameters, precision, digests of the data, versions.
        figures: What came out, by the names of `METRICS`, and `steps` and `best_step`. Those of an evaluation are of the step that the
            model has. A figure that the job does not have is missing.
        reason: Why it failed or stopped.
        reading: The verdict on its curves.
    """

    id: str
    state: str
    settings: dict[str, Any]
    figures: dict[str, float]
    reason: str = ""
    reading: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Jobs side by side.

    Attributes:
        metric: What ranks them; "" if nothing does.
        jobs: The jobs, best first. Those without the metric are last. As given if nothing ranks them.
        varied: Names that are always shown among the settings, such as those of a sweep.
        note: Why the losses of the jobs do not compare, or "".
    """

    metric: str
    jobs: tuple[ComparedJob, ...]
    varied: tuple[str, ...] = field(default=())
    note: str = ""

    @property
    def is_ranked(self) -> bool:
        """Whether the first job is better than the others: not if the rank is by losses that do not compare."""
        has_figure = any(self.metric in job.figures for job in self.jobs)
        return bool(self.metric) and has_figure and not (self.note and self.metric in _LOSSES)

    @property
    def best(self) -> ComparedJob:
        """The best succeeded job.

        Raises:
            JobNotReadyError: No job has succeeded with this metric, or nothing ranks the jobs.
        """
        if not self.metric:
            raise JobNotReadyError(f"no job is the best: {self.note}")
        for job in self.jobs:
            if job.state == "Succeeded" and self.metric in job.figures:
                return job
        raise JobNotReadyError(
            f"no job has succeeded with {self.metric}: {', '.join(f'{job.id} is {job.state}' for job in self.jobs)}"
        )

    @property
    def differing(self) -> list[str]:
        """The settings that are not the same in all jobs, and those that were varied."""
        names = dict.fromkeys(name for job in self.jobs for name in job.settings)
        return [
            name
            for name in names
            if name in self.varied or len({_key(job.settings.get(name)) for job in self.jobs}) > 1
        ]

    @property
    def columns(self) -> list[str]:
        """The head of the table."""
        figures = [name for name in (*METRICS, "steps", "best_step") if any(name in job.figures for job in self.jobs)]
        return ["job", "state", *self.differing, *figures, "reading"]

    def rows(self) -> list[list[Any]]:
        """Returns one row for each job, in the order of `columns`; None where a job has no value."""
        names = self.columns[2:-1]
        return [
            [job.id, job.state, *(job.settings.get(name, job.figures.get(name)) for name in names), job.reading]
            for job in self.jobs
        ]

    def cells(self) -> list[list[str]]:
        """Returns the rows as text, with rounded figures."""
        return [[shown(value) for value in row] for row in self.rows()]

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as values for JSON."""
        return {
            "metric": self.metric,
            "higher_is_better": METRICS.get(self.metric),
            "note": self.note,
            "differing": self.differing,
            "jobs": [
                {
                    "rank": rank if self.metric in job.figures else None,
                    "id": job.id,
                    "state": job.state,
                    "reason": job.reason,
                    "settings": {name: job.settings.get(name) for name in self.differing},
                    "figures": job.figures,
                    "reading": job.reading,
                }
                for rank, job in enumerate(self.jobs, start=1)
            ],
        }

    def to_csv(self) -> str:
        """Returns the table as CSV, with unrounded figures."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([_csv_cell(name) for name in self.columns])
        writer.writerows([_csv_cell(value) for value in row] for row in self.rows())
        return text.getvalue()

    def __str__(self) -> str:
        # Names, reasons and settings come from a store.
        table = [[visible_line(cell) for cell in row] for row in (self.columns, *self.cells())]
        widths = [max(len(row[at]) for row in table) for at in range(len(self.columns))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ) + (f"\n{self.note}" if self.note else "")

    def _repr_html_(self) -> str:
        note = f"<p>{html_text(self.note)}</p>" if self.note else ""
        return html_block(html_table(self.cells(), self.columns) + note)


def compare(jobs: Iterable[TrainingJob | str], *, metric: str = "", session: Session | None = None) -> Comparison:
    """Compares jobs: a table of the settings that differ and of what came out.

    Args:
        jobs: Jobs, ids or URIs, in any state.
        metric: What ranks them, one of `palate.comparison.METRICS`; default: eval_loss if a job has it, else final_loss. If their
            losses do not compare (see `Comparison.note`): the reward accuracy if all jobs with a loss train with DPO and have it, else
            nothing.
        session: For ids; default: the default session.

    Returns:
        The comparison, best job first. It prints as a table, and shows as one in a notebook.

    Raises:
        ConfigurationError: There is no job, one is given twice, or the metric is unknown.
        RunNotFoundError: No job has this id.
    """
    if isinstance(jobs, str):
        jobs = [jobs]
    found = [TrainingJob.get(job, session) if isinstance(job, str) else job for job in jobs]
    return compare_jobs(found, metric=metric)


def compare_jobs(jobs: Sequence[TrainingJob], *, metric: str = "", varied: Sequence[str] = ()) -> Comparison:
    """As `compare`, with names of settings to show even if they are the same."""
    if not jobs:
        raise ConfigurationError("jobs is empty: give the ids of the jobs to compare (`palate jobs` lists them)")
    seen = [job.uri for job in jobs]
    if twice := next((job.id for job in jobs if seen.count(job.uri) > 1), None):
        raise ConfigurationError(f"job {twice} is given twice: remove one of them")
    check_metric(metric)
    read: dict[str, ComparedJob] = {}
    for job, result in each_result(_read, jobs, None):
        if isinstance(result, BaseException):
            raise result
        read[job.uri] = result
    compared = [read[uri] for uri in seen]
    with_loss = [job for job in compared if any(name in job.figures for name in _LOSSES)]
    note = incomparable_losses([job.settings for job in with_loss])
    if not metric:
        metric = _default_metric(with_loss, note)
    if note:
        ranking = (
            f"the jobs are ranked by {metric}"
            if metric
            else "the jobs are not ranked; metric (--metric) chooses a figure"
        )
        note = f"{note}: {ranking}"
    return Comparison(metric=metric, jobs=tuple(_ranked(compared, metric)), varied=tuple(varied), note=note)


def _default_metric(with_loss: Sequence[ComparedJob], note: str) -> str:
    if not note:
        return "eval_loss" if any("eval_loss" in job.figures for job in with_loss) else "final_loss"
    # Accuracies of DPO count pairs, whatever the loss.
    same = all(job.settings["training_strategy"] == "dpo" and _ACCURACY in job.figures for job in with_loss)
    return _ACCURACY if same else ""


def _ranked(jobs: Sequence[ComparedJob], metric: str) -> Sequence[ComparedJob]:
    if not metric:
        return jobs
    sign = -1 if METRICS[metric] else 1
    # A margin is in units of beta, so that it decides only between jobs of one beta.
    ties = metric == _ACCURACY and len({_key(job.settings.get("dpo_beta")) for job in jobs}) == 1

    def key(job: ComparedJob) -> tuple[float, float]:
        margin = job.figures.get(_MARGIN, -math.inf) if ties else 0.0
        return sign * job.figures.get(metric, sign * math.inf), -margin

    return sorted(jobs, key=key)


def check_metric(metric: str) -> None:
    """Raises ConfigurationError if it is neither "" nor a metric that ranks jobs."""
    if metric and metric not in METRICS:
        raise ConfigurationError(
            f"metric={metric!r} is unknown: {did_you_mean(metric, METRICS)}expected one of {', '.join(METRICS)}"
        )


def _read(job: TrainingJob) -> ComparedJob:
    status, events = job.describe(), job.metrics()
    body = job.manifest.body
    libraries = status.details.get("versions")
    versions = {**(libraries if isinstance(libraries, dict) else {}), **job.manifest.versions}
    settings = {
        "model": body.model.name,
        "method": body.method,
        **{name: value for name, value in asdict(body.hyperparameters).items() if name not in _NOT_SETTINGS},
        "precision": body.precision,
        **{f"data {channel}": (given.sha256 or given.uri)[:12] for channel, given in body.inputs.items()},
        "weights": str(status.details.get("model_revision") or "")[:12],
        **{f"version {name}": str(found) for name, found in versions.items()},
    }
    figures = figures_of(events)
    if (rate := _win_rate(job)) is not None:
        figures["win_rate"] = rate
    end = events[-1] if events and events[-1]["kind"] == "end" else {}
    reading = end.get("reading")
    return ComparedJob(
        id=job.id,
        state=status.state,
        settings=settings,
        figures=figures,
        reason=status.reason,
        reading=str(reading.get("verdict", "")) if isinstance(reading, dict) else "",
    )


def figures_of(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the figures of a job's metrics events, also of a job that still runs."""
    end: Mapping[str, Any] = next((event for event in reversed(events) if event["kind"] == "end"), {})
    evaluations = [event for event in events if event["kind"] == "eval"]
    steps = [event for event in events if event["kind"] == "train"]
    best_step = end.get("best_step")
    at = next((event for event in evaluations if event["step"] == best_step), evaluations[-1] if evaluations else {})
    values: dict[str, Any] = {name: at.get(name) for name in METRICS if name.startswith("eval_")}
    values["best_eval_loss"] = min(
        (event["eval_loss"] for event in evaluations if _is_number(event.get("eval_loss"))), default=None
    )
    values["final_loss"] = end.get("final_loss", steps[-1].get("loss") if steps else None)
    values["tokens_per_s"] = end.get("tokens_per_s")
    values["seconds"] = end.get("seconds")
    values["steps"] = end.get("step", steps[-1]["step"] if steps else None)
    values["best_step"] = best_step
    return {name: value for name, value in values.items() if _is_number(value)}


def _win_rate(job: TrainingJob) -> float | None:
    """Returns the win-rate against the base in the job's newest evaluation that has a possible one, or None."""
    for _, evaluation in evaluations.newest_first(job._run.record):
        for one in () if isinstance(evaluation, PalateError) else evaluation.comparisons:
            if {one.first, one.second} == {job.id, evaluations.BASE}:
                rate = one.seen_from(job.id).win_rate.value
                if (
                    _is_number(rate) and 0 <= rate <= 1
                ):  # NaN compares with nothing: it would spoil the order of all jobs
                    return rate
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def shown(value: Any) -> str:
    """Formats a value of the table."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _csv_cell(value: Any) -> Any:
    text = json.dumps(value) if isinstance(value, list | dict) else visible(value) if isinstance(value, str) else value
    # A spreadsheet would run a text that begins like a formula, and names and readings come from a store.
    return f"'{text}" if isinstance(text, str) and text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
