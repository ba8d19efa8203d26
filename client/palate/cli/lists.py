"""Verbs that list what is there: jobs, services. Know what is asked for and how it is shown, not how it is read."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import typer

from palate.cli.words import age, pairs, seconds
from palate.errors import DamagedFilesError
from palate_recipes.visible import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from palate.listing import Found, Listing, Wanted
    from palate.record import State

_TIMEOUT_S = 30.0

_Status = Annotated[
    list[str] | None, typer.Option(help="Only those in this state, such as Running; again for one more state.")
]
_Name = Annotated[str, typer.Option(help="Only those whose name fits a glob, such as 'qwen2-*'.")]
_Model = Annotated[str, typer.Option(help="Only those whose model's name fits a glob.")]
_Label = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only those with this label; again for one more label.")
]
_Since = Annotated[str | None, typer.Option(metavar="AGE", help="Only those no older, such as 30min, 2h, 7d.")]
_Limit = Annotated[int | None, typer.Option(min=1, help="So many at most, the newest.")]
_Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds; then what was read by then is shown.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def jobs(
    status: _Status = None,
    name: _Name = "*",
    model: _Model = "*",
    label: _Label = None,
    since: _Since = None,
    attempts: Annotated[int, typer.Option(min=1, help="Only those that were begun so often at least.")] = 1,
    limit: _Limit = None,
    timeout: _Timeout = _TIMEOUT_S,
    as_json: _Json = False,
) -> None:
    """List training jobs, newest first."""
    wanted = _wanted(status, name, model, label, since, attempts)
    listing = _find("jobs", wanted, limit, timeout)
    rows = [_job(found) for found in (*listing.runs, *listing.unread)]
    columns = ("job", "state", "model", "method", "strategy", "age", "reason")
    shown = [
        (*(row[key] for key in ("id", "state", "model", "method", "strategy")), _age(row), _why(row)) for row in rows
    ]
    _show(rows, columns, shown, as_json=as_json)
    _end("jobs", wanted, listing, {"Succeeded": "deploy", "Creating": "watch", "Running": "watch"}, "palate quickstart")


def services(
    status: _Status = None,
    name: _Name = "*",
    model: _Model = "*",
    label: _Label = None,
    since: _Since = None,
    limit: _Limit = None,
    timeout: _Timeout = _TIMEOUT_S,
    as_json: _Json = False,
) -> None:
    """List services, newest first."""
    wanted = _wanted(status, name, model, label, since, 1)
    listing = _find("services", wanted, limit, timeout)
    rows = [_service(found) for found in (*listing.runs, *listing.unread)]
    columns = ("service", "state", "model", "endpoint", "age", "reason")
    shown = [
        (*(row[key] for key in ("ServiceName", "Status", "Model", "Endpoint")), _age(row), _why(row)) for row in rows
    ]
    _show(rows, columns, shown, as_json=as_json)
    _end("services", wanted, listing, {"Running": "chat", "Stopped": "start"}, "palate deploy JOB")


def _wanted(
    status: list[str] | None, name: str, model: str, label: list[str] | None, since: str | None, attempts: int
) -> Wanted:
    from palate.listing import Wanted
    from palate.record import State

    known = {state.lower(): state for state in get_args(State)}
    return Wanted(
        states=tuple(known.get(state.lower(), cast("State", state)) for state in status or []),
        name=name,
        model=model,
        labels=pairs(label or [], "--label"),
        since_s=None if since is None else seconds(since, "--since"),
        min_attempts=attempts,
    )


def _find(kind: Literal["jobs", "services"], wanted: Wanted, limit: int | None, timeout_s: float) -> Listing:
    from palate.listing import find_runs
    from palate.session import get_default_session

    return find_runs(get_default_session(), kind, wanted, limit=limit, timeout_s=timeout_s)


def _job(found: Found) -> dict[str, Any]:
    manifest, status = found.manifest, found.status
    body = manifest.body if manifest else {}
    return {
        "id": found.name,
        "state": status.state if status else None,
        "model": manifest.model_name if manifest else "",
        "method": body.get("method", ""),
        "strategy": body.get("hyperparameters", {}).get("training_strategy", ""),
        "labels": manifest.labels if manifest else {},
        "created_at": manifest.created_at if manifest else None,
        "attempt": status.attempt if status else None,
        "reason": str(found.error) if found.error else status.reason if status else "",
    }


def _service(found: Found) -> dict[str, Any]:
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


def _show(rows: list[dict[str, Any]], columns: Sequence[str], shown: list[tuple[Any, ...]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from palate.terminal import print_table

    print_table(columns, [["?" if cell is None else cell for cell in row] for row in shown])


def _age(row: dict[str, Any]) -> str | None:
    return None if row["created_at"] is None else age(row["created_at"])


def _why(row: dict[str, Any]) -> str:
    reason = row.get("reason") or row.get("Reason") or ""
    return reason.splitlines()[0][:100] if reason else ""


def _end(kind: str, wanted: Wanted, listing: Listing, verbs: dict[str, str], first: str) -> None:
    """Says what to do next; a list that is not whole is a failure, which a program must see."""
    if listing.unread:
        count = len(listing.unread)
        print(
            f"error: {count} of the {kind} could not be read, and may be meant or not: the rows with a ?",
            file=sys.stderr,
        )
        damaged = next((found.name for found in listing.unread if isinstance(found.error, DamagedFilesError)), None)
        remedy = f"delete {damaged}" if damaged else f"{kind} --timeout 300"
        print(visible(f"next: palate {remedy}"), file=sys.stderr)
        raise typer.Exit(1)
    if listing.runs:
        newest = listing.runs[0]
        verb = verbs.get(newest.status.state if newest.status else "", "logs")
        print(visible(f"next: palate {verb} {newest.name}"), file=sys.stderr)
    elif wanted.is_everything:
        print(f"no {kind} yet; next: {first}", file=sys.stderr)
    else:
        print(f"no such {kind}; next: palate {kind}", file=sys.stderr)


def register(app: typer.Typer) -> None:
    """Adds these verbs to the command line."""
    for verb in (jobs, services):
        app.command()(verb)
