"""The command `show`: everything about one job or service on a page. Knows records and output, no other command."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palate.cli.format import age, left, moment, open_run, say_next
from palate_recipes.errors import ConfigurationError, PalateError
from palate_recipes.specs.events import duration
from palate_recipes.text import visible

if TYPE_CHECKING:
    from palate.job import TrainingJob
    from palate.predictor import Predictor
    from palate_recipes.specs.run import Deployment, Status
    from palate_recipes.specs.train import InputFile, TrainSpec
    from palate_recipes.specs.weights import BaseModel

_DETAILS_HIDDEN = ("model_digest", "renewal", "ends_at")
"""Details that only `--json` shows."""

_MOST_EVALUATIONS, _MOST_PAIRS = 8, 4


def show(
    name: Annotated[str, typer.Argument(help="Job id, or name of a service or evaluation.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print manifest and status as JSON.")] = False,
    token: Annotated[bool, typer.Option("--token", help="Print only the service's bearer token.")] = False,
) -> None:
    """Show one job, service or evaluation.

    Only hyperparameters that differ from the defaults are listed; --json has all.
    """
    from palate.job import TrainingJob
    from palate.predictor import Predictor

    found = open_run(name)
    if token:
        if not isinstance(found, Predictor):
            raise ConfigurationError(f"{name} is not a service: only a service has a token")
        print(found.access_token)
        return
    status = found.describe() if isinstance(found, TrainingJob) else found._run.refresh()
    if as_json:
        import msgspec

        record = {"manifest": msgspec.to_builtins(found.manifest), "status": msgspec.to_builtins(status)}
        print(json.dumps(record, indent=1))
        return
    if not isinstance(found, TrainingJob | Predictor):
        print(f"evaluation {found.name}: {status.state}{f': {status.reason}' if status.reason else ''}")
        if status.state == "Succeeded":
            print(visible(str(found.scores())))
        return
    facts = _job(found, status) if isinstance(found, TrainingJob) else _service(found, status)
    width = max(len(title) for title, _ in facts)
    for title, value in facts:
        for line in visible(str(value)).splitlines() or [""]:
            print(f"{title:{width}}  {line}".rstrip())
            title = ""
    for verb in _following(isinstance(found, TrainingJob), status):
        say_next(verb, found.id if isinstance(found, TrainingJob) else found.service_name)


def _job(job: TrainingJob, status: Status) -> list[tuple[str, object]]:
    manifest, spec = job.manifest, job.manifest.body
    facts: list[tuple[str, object]] = [
        ("job", job.id),
        *_state(status, manifest.created_at),
        ("base model", _model(spec.model)),
        ("training", f"{spec.hyperparameters.training_strategy}, {spec.method}, {spec.precision}"),
        *((f"data {channel}", _data(given)) for channel, given in sorted(spec.inputs.items())),
        ("differs", "\n".join(_differences(spec)) or "nothing: all hyperparameters have their defaults"),
        *(("note", note) for note in spec.notes),
    ]
    if status.state == "Succeeded":
        facts.append(("model", job.output_path("model")))
    facts += [("evaluations", "\n".join(found)) for found in [_evaluations(job)] if found]
    return [*facts, *_rest(manifest.labels, manifest.backend, status), ("record", job.uri)]


def _evaluations(job: TrainingJob) -> list[str]:
    """Returns a line for each of the newest evaluations and each comparison with the job in it."""
    from palate.evaluation import record as evaluations

    read = evaluations.newest_first(job._run.record)
    found = [one for _, one in read if not isinstance(one, PalateError)]  # `palate eval` says which are damaged
    lines = []
    for one in found[:_MOST_EVALUATIONS]:
        pairs = [pair.seen_from(job.id) for pair in one.comparisons if job.id in (pair.first, pair.second)]
        told = "; ".join(f"win-rate {pair.win_rate} against {pair.second}" for pair in pairs[:_MOST_PAIRS])
        lines.append(f"{one.key}, {moment(one.created_at)}{': ' if told else ''}{told}")
    if len(found) > _MOST_EVALUATIONS:
        lines.append(f"and {len(found) - _MOST_EVALUATIONS} older ones, which `palate eval {job.id}` lists")
    return lines


def _instances(body: Deployment) -> str:
    if body.autoscaling:
        return f"{body.instances} to {body.autoscaling.max_instances} instances, as the requests need"
    return f"{body.instances} instance{'s' if body.instances > 1 else ''}"


def _service(service: Predictor, status: Status) -> list[tuple[str, object]]:
    from palate.predictor import ends_at
    from palate.runs.renewal import read_renewal

    manifest, body, end = service.manifest, service.manifest.body, ends_at(status)
    renewal = read_renewal(service._run.record)
    time_to_live_s = body.time_to_live_s if renewal is None else renewal.time_to_live_s
    lives = {"time_to_live_s": time_to_live_s, "idle_time_to_live_s": body.idle_time_to_live_s}
    given = {**body.options, **{name: value for name, value in lives.items() if value is not None}}
    return [
        ("service", service.service_name),
        *_state(status, manifest.created_at, noun="start"),
        *((("ends", f"in {left(end)}, at {moment(end)}"),) if end is not None else ()),
        ("endpoint", status.endpoint or "none: it is not running"),
        *((("OpenAI base URL", f"{status.endpoint}/v1"),) if status.endpoint else ()),
        ("version", f"v{body.version}, {_instances(body)}"),
        ("default", body.tuned_uri or "the base model"),
        ("base", _model(body.model)),
        *((("system prompt", body.system_prompt),) if body.system_prompt else ()),
        ("options", "\n".join(f"{name}={value!r}" for name, value in sorted(given.items())) or "the defaults"),
        *_rest(manifest.labels, manifest.backend, status),
        ("record", service._run.record.uri),
    ]


def _state(status: Status, created_at: float, *, noun: str = "attempt") -> list[tuple[str, object]]:
    # A service has no limit of starts: each start and update raises it.
    limit = f" of {status.last_attempt}" if noun == "attempt" else ""
    tries = f", {noun} {status.attempt}{limit}" if status.last_attempt > 1 else ""
    facts: list[tuple[str, object]] = [("state", f"{status.state}{tries}")]
    if status.reason:
        facts.append(("reason", status.reason))
    facts.append(("created", f"{moment(created_at)} ({age(created_at)} ago)"))
    if status.started_at:
        end = status.finished_at or (time.time() if not status.is_terminal else status.updated_at)
        facts.append(("ran", f"{duration(max(0.0, end - status.started_at))} in this {noun}"))
    for attempt in status.attempts:
        facts.append((f"{noun} {attempt.attempt}", attempt.reason or "no reason recorded"))
    return facts


def _rest(labels: dict[str, str], backend: str, status: Status) -> list[tuple[str, object]]:
    told = {
        name: value for name, value in status.details.items() if name not in _DETAILS_HIDDEN and value not in ([], {})
    }
    return [
        ("labels", ", ".join(f"{name}={value}" for name, value in sorted(labels.items())) or "none"),
        ("backend", backend),
        *(
            (("details", "\n".join(f"{name}: {_short(value)}" for name, value in sorted(told.items()))),)
            if told
            else ()
        ),
    ]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _model(model: BaseModel) -> str:
    source = model.source
    where = {"hub": "hf://", "package": "package "}.get(source.kind, "") + source.location
    return f"{model.name}, from {where}{'@' if source.revision else ''}{source.revision}"


def _data(given: InputFile) -> str:
    rows = "" if given.rows is None else f", {given.rows:,} rows"
    skipped = f", {len(given.skipped_rows):,} skipped" if given.skipped_rows else ""
    return f"{given.origin or given.uri}{rows}{skipped}"


def _differences(spec: TrainSpec) -> list[str]:
    from palate_recipes.hyperparameters import differences

    return [f"{name}={value} (default {default})" for name, value, default in differences(spec.hyperparameters)]


def _following(is_job: bool, status: Status) -> tuple[str, ...]:
    if is_job:
        verbs = {"Succeeded": ("metrics", "deploy"), "Failed": ("logs", "resume"), "Stopped": ("logs", "resume")}
        return verbs.get(status.state, ("watch",))
    return {"Running": ("chat",), "Creating": ("logs",)}.get(status.state, ("logs", "start"))
