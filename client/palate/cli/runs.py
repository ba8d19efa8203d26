"""Commands for runs: list, watch, stop, delete, clean. Know arguments and output, not how runs are read."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import typer

from palate.cli.format import Wide, age, left, moment, open_run, pairs, say_next, seconds
from palate.cli.show import show
from palate_recipes.errors import ConfigurationError, DamagedFilesError, WaitTimeoutError
from palate_recipes.text import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from palate.evaluation.preferences import PreferenceRun
    from palate.job import TrainingJob
    from palate.predictor import Predictor
    from palate.runs.list import Listing, RunFilter, RunSummary
    from palate_recipes.specs.run import State


_TIMEOUT_S = 30.0

_Status = Annotated[list[str] | None, typer.Option(help="Show only this state, such as Running; repeat for more.")]
_Name = Annotated[str, typer.Option(help="Show only names that match a glob, such as 'qwen2-*'.")]
_Model = Annotated[str, typer.Option(help="Show only models whose name matches a glob.")]
_Label = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Show only runs with this label; repeat for more.")
]
_Since = Annotated[
    str | None, typer.Option(metavar="AGE", help="Show only runs created within this time, such as 30min, 2h, 7d.")
]
_Limit = Annotated[int | None, typer.Option(min=1, help="Show at most this many, newest first.")]
_Timeout = Annotated[float, typer.Option(min=0.1, help="Time limit in seconds; what was read by then is shown.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def jobs(
    status: _Status = None,
    name: _Name = "*",
    model: _Model = "*",
    label: _Label = None,
    since: _Since = None,
    attempts: Annotated[int, typer.Option(min=1, help="Show only jobs with at least this many attempts.")] = 1,
    limit: _Limit = None,
    timeout: _Timeout = _TIMEOUT_S,
    as_json: _Json = False,
    wide: Wide = False,
) -> None:
    """List training jobs, newest first."""
    wanted = _wanted(status, name, model, label, since, attempts)
    listing = _list_runs("jobs", wanted, limit, timeout)
    rows = [_job(found) for found in (*listing.runs, *listing.unread)]
    columns = ("job", "state", ("model", 1), ("method", 3), ("strategy", 2), "age", ("reason", 4))
    shown = [
        (*(row[key] for key in ("id", "state", "model", "method", "strategy")), _age(row), _why(row)) for row in rows
    ]
    _show(rows, columns, shown, as_json=as_json, wide=wide)
    _end("jobs", wanted, listing, {"Succeeded": "deploy", "Creating": "watch", "Running": "watch"}, "quickstart")


def services(
    status: _Status = None,
    name: _Name = "*",
    model: _Model = "*",
    label: _Label = None,
    since: _Since = None,
    limit: _Limit = None,
    timeout: _Timeout = _TIMEOUT_S,
    live: Annotated[
        bool, typer.Option("--live", help="Redraw the table until Ctrl-C, with what each service does.")
    ] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="With --live: seconds between two readings.")] = 2.0,
    as_json: _Json = False,
    wide: Wide = False,
) -> None:
    """List services, newest first.

    With --live also their end and, of those that can be reached from here, requests and tokens of the last minute.
    """
    wanted = _wanted(status, name, model, label, since, 1)
    if live:
        from palate.cli.live import show_live

        if as_json or not sys.stdout.isatty():
            raise ConfigurationError("--live needs a terminal: omit it for one table, or use --json without it")
        show_live(lambda: _list_runs("services", wanted, limit, timeout), interval, wide=wide)
        return
    listing = _list_runs("services", wanted, limit, timeout)
    rows = [_service(found) for found in (*listing.runs, *listing.unread)]
    columns = ("service", "state", ("model", 2), "endpoint", ("age", 1), ("reason", 3))
    shown = [
        (*(row[key] for key in ("ServiceName", "Status", "Model", "Endpoint")), _age(row), _why(row)) for row in rows
    ]
    _show(rows, columns, shown, as_json=as_json, wide=wide)
    _end("services", wanted, listing, {"Running": "chat", "Stopped": "start"}, "jobs")


def _wanted(
    status: list[str] | None, name: str, model: str, label: list[str] | None, since: str | None, attempts: int
) -> RunFilter:
    from palate.runs.list import RunFilter
    from palate_recipes.specs.run import State

    known = {state.lower(): state for state in get_args(State)}
    return RunFilter(
        states=tuple(known.get(state.lower(), cast("State", state)) for state in status or []),
        name=name,
        model=model,
        labels=pairs(label or [], "--label"),
        since_s=None if since is None else seconds(since, "--since"),
        min_attempts=attempts,
    )


def _list_runs(kind: Literal["jobs", "services"], wanted: RunFilter, limit: int | None, timeout_s: float) -> Listing:
    from palate.runs.list import find_runs
    from palate.session import get_default_session

    return find_runs(get_default_session(), kind, wanted, limit=limit, timeout_s=timeout_s)


def _job(found: RunSummary) -> dict[str, Any]:
    from msgspec.structs import asdict

    from palate_recipes.specs.run import TrainManifest

    manifest, status = found.manifest, found.status
    spec = manifest.body if isinstance(manifest, TrainManifest) else None
    return {
        "id": found.name,
        "uri": found.handle.record.uri,
        "state": status.state if status else None,
        "model": manifest.model_name if manifest else "",
        "method": spec.method if spec else "",
        "strategy": spec.hyperparameters.training_strategy if spec else "",
        "hyperparameters": asdict(spec.hyperparameters) if spec else {},
        "given": spec.given if spec else {},
        "data": {channel: given.origin or given.uri for channel, given in spec.inputs.items()} if spec else {},
        "model_uri": f"{found.handle.record.uri}/model" if status and status.state == "Succeeded" else None,
        "labels": manifest.labels if manifest else {},
        "created_at": manifest.created_at if manifest else None,
        "attempt": status.attempt if status else None,
        "reason": str(found.error) if found.error else status.reason if status else "",
    }


def _service(found: RunSummary) -> dict[str, Any]:
    from palate.predictor import describe

    created_at = found.manifest.created_at if found.manifest else None
    if found.status is not None:
        return {**describe(found.handle, found.status), "created_at": created_at}
    return {
        "ServiceName": found.name,
        "Status": None,
        "Reason": str(found.error),
        "Endpoint": "",
        "Model": found.manifest.model_name if found.manifest else "",
        "created_at": created_at,
    }


def _show(
    rows: list[dict[str, Any]],
    columns: Sequence[str | tuple[str, int]],
    shown: list[tuple[Any, ...]],
    *,
    as_json: bool,
    wide: bool,
) -> None:
    """Prints rows as JSON or as a table. A column with a number may be left out, the highest number first."""
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from palate.ui.terminal import Column, print_table

    print_table(
        [one if isinstance(one, str) else Column(*one, wraps=one[0] == "reason") for one in columns],
        [["?" if cell is None else cell for cell in row] for row in shown],
        wide=wide,
    )


def _age(row: dict[str, Any]) -> str | None:
    return None if row["created_at"] is None else age(row["created_at"])


def _why(row: dict[str, Any]) -> str:
    reason = row.get("reason") or row.get("Reason") or ""
    return reason.splitlines()[0][:100] if reason else ""


def _end(kind: str, wanted: RunFilter, listing: Listing, verbs: dict[str, str], first: str) -> None:
    """Prints the next command. An incomplete list exits with 1, so that a program notices."""
    if listing.unread:
        count = len(listing.unread)
        print(
            f"error: {count} of the {kind} could not be read (the rows with a ?); they may or may not match",
            file=sys.stderr,
        )
        damaged = next((found.name for found in listing.unread if isinstance(found.error, DamagedFilesError)), None)
        say_next(*(("delete", damaged) if damaged else (kind, "--timeout", 300)))
        raise typer.Exit(1)
    if listing.runs:
        newest = listing.runs[0]
        verb = verbs.get(newest.status.state if newest.status else "", "logs")
        say_next(verb, newest.name)
    elif wanted.is_everything:
        print(f"no {kind} yet", file=sys.stderr)
        say_next(first)
    else:
        print(f"no {kind} match", file=sys.stderr)
        say_next(kind)


def watch(
    name: Annotated[str, typer.Argument(help="Job id.")],
    timeout: Annotated[
        float | None,
        typer.Option(help="Stop watching after this many seconds, with exit code 1; the job continues."),
    ] = None,
) -> None:
    """Follow a job until it ends; Ctrl-C leaves it running.

    A live view on a terminal, log lines elsewhere.
    """
    from palate.job import TrainingJob

    job = TrainingJob.get(name)
    try:
        job.wait(timeout_s=timeout)
    except WaitTimeoutError:
        print(f"{name}\t{job.status}")
        print(f"{name} has not ended within --timeout {timeout:g} s, and continues", file=sys.stderr)
        say_next("watch", name)
        raise typer.Exit(1) from None
    print(f"{name}\t{job.status}")
    say_next("deploy", name)


def metrics(
    name: Annotated[str, typer.Argument(help="Job id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as one line of JSON.")] = False,
    wide: Wide = False,
) -> None:
    """Print a job's metrics so far and their reading in words."""
    from palate.job import TrainingJob

    job = TrainingJob.get(name)
    events = job.metrics()
    if as_json:
        for event in events:
            print(json.dumps(event))
        return
    from palate.ui.terminal import Column, print_table

    columns = ("loss", "rewards/margins", "rewards/accuracies", "mean_token_accuracy", "grad_norm", "learning_rate")
    rows = []
    for event in events:
        if event["kind"] in ("train", "eval"):
            prefix = "eval_" if event["kind"] == "eval" else ""
            values = (event.get(prefix + column) for column in columns)
            shown = ("" if value is None else f"{value:.4g}" for value in values)
            rows.append(("validation" if prefix else "training", event["step"], event.get("epoch", ""), *shown))
    # Of two columns that tell the same, the one that fewer people read is left out first.
    table = (Column("epoch", 3), "loss", Column("rewards/margins", 1), Column("rewards/accuracies", 2))
    print_table(("", "step", *table, *(Column(name, 4 + at) for at, name in enumerate(columns[3:]))), rows, wide=wide)
    print(visible(f"reading: {job.reading()}"), file=sys.stderr)


def report(
    names: Annotated[list[str], typer.Argument(help="Job ids; several are compared.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
    answers: Annotated[
        Path | None, typer.Option(help="Also show the answers in this file, such as the quickstart's answers.json.")
    ] = None,
) -> None:
    """Write a report of jobs as one HTML file.

    Curves, reading, answers, data, settings, versions, and how to reproduce it. The file loads nothing.
    """
    from palate.job import TrainingJob

    first, *others = map(TrainingJob.get, names)
    print(first.report(others, answers=answers).save(output))
    if first.status == "Succeeded":
        say_next("deploy", first.id)


def checkpoints(
    name: Annotated[str, typer.Argument(help="Job id.")],
    as_json: _Json = False,
    wide: Wide = False,
) -> None:
    """List a job's checkpoints with their metrics.

    The figures are of the log line at the step or the last one before it, and of the validation at the step.
    """
    from palate.job import TrainingJob
    from palate.runs.checkpoints import none_yet

    job = TrainingJob.get(name)
    state = job.status  # first, so that a lost runner is noticed
    found = job.checkpoints()
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))
        return
    from palate.ui.terminal import Column, print_table

    columns = ("loss", "eval_loss", "eval_rewards/accuracies", "rewards/margins")
    rows = []
    for one in found:
        figures = [one.metrics.get(column) for column in columns]
        shown = ["" if figure is None else f"{figure:.4g}" for figure in figures]
        left = "being uploaded" if state in ("Running", "Stopping") else "incomplete"
        ready = "complete" if one.is_complete else left
        rows.append((one.name, one.step, ready, age(one.written_at), f"{one.size_bytes / 1e6:.1f} MB", *shown))
    titles = ("loss", "validation loss", "validation accuracy", "margin")
    table = [Column(title, drop) for title, drop in zip(titles, (0, 0, 2, 3), strict=True)]
    print_table(("checkpoint", "step", "state", "age", Column("size", 1), *table), rows, wide=wide)
    if any(one.is_complete for one in found):
        say_next("deploy", job.id, "--checkpoint", "latest")
    else:
        print(visible(str(none_yet(job._run.record))), file=sys.stderr)


def logs(
    name: Annotated[str, typer.Argument(help="Job id, or name of a service or of a held-out scoring run.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the log until the run ends.")] = False,
) -> None:
    """Print the log of a job, service or evaluation."""
    for line in open_run(name).logs(follow=follow):
        print(visible(line), flush=follow)


def save(
    name: Annotated[str, typer.Argument(help="Id or URI of a succeeded job.")],
    uri: Annotated[str, typer.Argument(help="Target: a folder, s3://, oss:// or hf://OWNER/NAME.")],
) -> None:
    """Copy a job's model to a folder, a bucket or the hub.

    Adds a model card and prints the URI of the copy.
    """
    from palate.job import TrainingJob

    job = TrainingJob.get(name)
    print(f"checking and copying the model of {job.id}", file=sys.stderr)
    print(job.save_model(uri))
    say_next("deploy", name)


def stop(
    name: Annotated[str, typer.Argument(help="Job id, or name of a service or of a held-out scoring run.")],
) -> None:
    """Stop a job, a service or an evaluation.

    A job writes a checkpoint first: `palate resume` continues it. `palate start` restarts a service.
    """
    from palate.predictor import Predictor

    found = open_run(name)
    if isinstance(found, Predictor):
        found.stop_service()
        print(f"{name}\t{found.service_status}")
    else:
        found.stop()
        print(f"{name}\t{found.status}")


def start(name: Annotated[str, typer.Argument(help="Service name.")]) -> None:
    """Start a stopped or failed service again."""
    from palate.predictor import Predictor

    predictor = Predictor(name)
    predictor.start_service()
    print(f"{name}\t{predictor.endpoint}")


def renew(
    name: Annotated[str, typer.Argument(help="Service name.")],
    time_to_live: Annotated[str, typer.Argument(help="Time until it stops, such as 30min, 2h, 7d; never: no limit.")],
) -> None:
    """Give a service a new time to live, counted from now.

    If it is not running, the time counts from the first answer of its next start. Later starts use the new time, too.
    """
    from palate.predictor import Predictor, ends_at

    predictor = Predictor(name)
    predictor.renew(None if time_to_live == "never" else seconds(time_to_live, "TIME_TO_LIVE"))
    status = predictor._run.refresh()
    if status.state != "Running":
        print(f"{name}\t{status.state}: the time counts from its next first answer")
        say_next("show" if status.state == "Creating" else "start", name)
        return
    end = ends_at(status)
    print(f"{name}\t{'no end' if end is None else f'ends in {left(end)}, at {moment(end)}'}")
    say_next("services", "--live")


def delete(
    names: Annotated[list[str], typer.Argument(help="Job ids, or names of services or of held-out scoring runs.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
) -> None:
    """Delete jobs, services and evaluations with their files.

    Asks before it deletes a job or a running service.
    """
    from palate.predictor import Predictor

    found = {name: open_run(name) for name in names}  # a wrong name is an error before anything is deleted
    losses = [f"{name} ({loss})" for name, run in found.items() if (loss := _lost_with(run))]
    if losses and not yes:
        others = [name for name, run in found.items() if not _lost_with(run)]
        what = ", ".join([*losses, *others])
        if not sys.stdin.isatty():
            raise ConfigurationError(f"nothing was deleted: this would delete {what}; confirm with --yes")
        typer.confirm(visible(f"delete {what}?"), abort=True)
    for name, run in found.items():
        if isinstance(run, Predictor):
            run.delete_service()
        else:
            run.delete()
        print(f"{name}\tdeleted")


def _lost_with(run: TrainingJob | Predictor | PreferenceRun) -> str:
    """Returns what a user would miss of a run, or ""."""
    from palate.evaluation.preferences import PreferenceRun
    from palate.job import TrainingJob

    if isinstance(run, TrainingJob):
        return "job, with model and checkpoints"
    if isinstance(run, PreferenceRun):
        return ""
    try:
        return "running service" if run.service_status == "Running" else ""
    except DamagedFilesError:
        return ""


def clean(
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Remove what was found. Without it nothing changes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what lost runs left behind; --yes removes it.

    Processes, leases, folders and expired services.
    """
    from palate.runs.clean import find_leftovers
    from palate.session import get_default_session

    found = find_leftovers(get_default_session())
    if as_json:
        print(json.dumps([{"kind": item.kind, "what": item.what, "why": item.why} for item in found], indent=1))
    else:
        from palate.ui.terminal import Column, print_table

        print_table(("kind", "what", Column("why", wraps=True)), [(item.kind, item.what, item.why) for item in found])
    if not found:
        print("nothing to clean", file=sys.stderr)
    elif yes:
        for item in found:
            item.remove()
        print(f"{len(found)} removed", file=sys.stderr)
        say_next("jobs")
    else:
        print(f"{len(found)} found, nothing changed", file=sys.stderr)
        say_next("clean", "--yes")


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    for verb in (
        jobs,
        services,
        show,
        watch,
        metrics,
        report,
        checkpoints,
        logs,
        save,
        stop,
        start,
        renew,
        delete,
        clean,
    ):
        app.command()(verb)
