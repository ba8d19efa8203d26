"""Verbs about one run: watch, metrics, logs, save, stop, start, update, delete."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from palate.errors import RunNotFoundError
from palate_recipes.visible import visible

if TYPE_CHECKING:
    from palate.job import TrainingJob
    from palate.predictor import Predictor


def watch(
    name: Annotated[str, typer.Argument(help="Job id.")],
    timeout: Annotated[float | None, typer.Option(help="Seconds to wait; the job goes on.")] = None,
) -> None:
    """Follow a job to its end: a live view on a terminal, log lines elsewhere. Ctrl-C leaves the job running."""
    from palate.job import TrainingJob

    job = TrainingJob.get(name)
    job.wait(timeout_s=timeout)
    print(f"{name}\t{job.status}")
    print(f"next: palate deploy {name}", file=sys.stderr)


def metrics(
    name: Annotated[str, typer.Argument(help="Job id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print every event as a JSON line.")] = False,
) -> None:
    """Print a job's metrics, and what they say in words; of a running job those so far."""
    from palate.job import TrainingJob

    job = TrainingJob.get(name)
    events = job.metrics()
    if as_json:
        for event in events:
            print(json.dumps(event))
        return
    from palate.terminal import print_table

    columns = ("loss", "rewards/margins", "rewards/accuracies", "mean_token_accuracy", "grad_norm", "learning_rate")
    rows = []
    for event in events:
        if event["kind"] in ("train", "eval"):
            prefix = "eval_" if event["kind"] == "eval" else ""
            values = (event.get(prefix + column) for column in columns)
            shown = ("" if value is None else f"{value:.4g}" for value in values)
            rows.append(("validation" if prefix else "training", event["step"], event.get("epoch", ""), *shown))
    print_table(("", "step", "epoch", *columns), rows)
    print(visible(f"reading: {job.reading()}"), file=sys.stderr)


def logs(
    name: Annotated[str, typer.Argument(help="Job id or service name.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it has ended.")] = False,
) -> None:
    """Print the log of a job or service."""
    for line in _find(name).logs(follow=follow):
        print(visible(line), flush=follow)


def save(
    name: Annotated[str, typer.Argument(help="Id or URI of a succeeded job.")],
    uri: Annotated[str, typer.Argument(help="A folder, s3://, oss://, or hf://OWNER/NAME.")],
) -> None:
    """Copy a job's model to another store or the Hugging Face hub, with a model card; prints where it is."""
    from palate.job import TrainingJob

    job = TrainingJob.get(name)
    print(f"checking and copying the model of {job.id}", file=sys.stderr)
    print(job.save_model(uri))
    print(f"next: palate deploy {name}", file=sys.stderr)


def stop(name: Annotated[str, typer.Argument(help="Job id or service name.")]) -> None:
    """Stop a job (it writes a checkpoint first) or a service (it can be started again)."""
    from palate.job import TrainingJob

    found = _find(name)
    if isinstance(found, TrainingJob):
        found.stop()
        print(f"{name}\t{found.status}")
    else:
        found.stop_service()
        print(f"{name}\t{found.service_status}")


def start(name: Annotated[str, typer.Argument(help="Service name.")]) -> None:
    """Start a stopped service again."""
    from palate.predictor import Predictor

    predictor = Predictor(name)
    predictor.start_service()
    print(f"{name}\t{predictor.endpoint}")


def update(
    name: Annotated[str, typer.Argument(help="Service name.")],
    job_id: Annotated[str, typer.Argument(help="Id or URI of the succeeded job that it is to serve.")],
    show_logs: Annotated[bool, typer.Option(help="Show the engine's log while waiting.")] = False,
) -> None:
    """Let a service serve another job's model; it goes on with the one it has if that does not come up."""
    from palate.job import TrainingJob
    from palate.predictor import Predictor

    predictor = Predictor(name).update_service(TrainingJob.get(job_id), show_logs=show_logs)
    print(f"{name}\t{predictor.endpoint}")
    print(f"next: palate chat {name}", file=sys.stderr)


def delete(
    names: Annotated[list[str], typer.Argument(help="Job ids or service names.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before a job's model is removed.")] = False,
) -> None:
    """Delete services and jobs, with everything below them."""
    from palate.job import TrainingJob

    for name in names:
        found = _find(name)
        if isinstance(found, TrainingJob):
            if not yes and sys.stdin.isatty():
                typer.confirm(f"remove job {name} with its model and checkpoints?", abort=True)
            found.delete()
        else:
            found.delete_service()
        print(f"{name}\tdeleted")


def _find(name: str) -> TrainingJob | Predictor:
    from palate.job import TrainingJob
    from palate.predictor import Predictor
    from palate.session import get_default_session

    try:
        return TrainingJob.get(name)
    except RunNotFoundError:
        pass
    try:
        return Predictor(name)
    except RunNotFoundError:
        raise RunNotFoundError(
            f"no job and no service {name!r} in {get_default_session().store_uri}: `palate jobs` and `palate services` list them"
        ) from None


def register(app: typer.Typer) -> None:
    """Adds these verbs to the command line."""
    for verb in (watch, metrics, logs, save, stop, start, update, delete):
        app.command()(verb)
