"""Commands for the versions of a service: update, versions, traffic, promote, rollback, scale. Know arguments and output, no record."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from palate.cli.format import Checkpoint, Wide, age, pairs, say_next
from palate_recipes.errors import ConfigurationError
from palate_recipes.text import visible

_Service = Annotated[str, typer.Argument(help="Service name.")]
_Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the change has taken effect.")]
_StopStart = Annotated[
    bool,
    typer.Option(
        "--stop-start",
        help="Stop the current version before the new one starts. Needs memory for one version only, but interrupts the service.",
    ),
]


def update(
    name: _Service,
    job_id: Annotated[str, typer.Argument(help="Id or URI of the job to serve.")],
    checkpoint: Checkpoint = None,
    traffic: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the requests to send to the new version, such as 0.1. The old version answers the rest.",
        ),
    ] = None,
    require_win_rate: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            help="Update only if an evaluation against the served model has a win-rate whose 95% interval begins here or above.",
        ),
    ] = None,
    stop_start: _StopStart = False,
    wait: _Wait = True,
    show_logs: Annotated[bool, typer.Option(help="Show the engine's log while waiting.")] = False,
) -> None:
    """Switch a service to another model or checkpoint.

    If the new model does not start, or its answers differ from the trained model's, the service keeps the old one. Ctrl-C cancels
    the update. A stopped service is started with the new model.
    """
    from palate.job import TrainingJob
    from palate.predictor import Predictor

    predictor = Predictor(name).update_service(
        TrainingJob.get(job_id),
        checkpoint=checkpoint,
        wait=wait,
        traffic=traffic,
        zero_downtime=not stop_start,
        show_logs=show_logs,
        require_win_rate=require_win_rate,
    )
    if not wait:
        say_next("versions", name)
        return
    print(f"{name}\t{predictor.endpoint}")
    say_next(*(("promote", name) if traffic is not None else ("chat", name)))


def versions(
    name: _Service,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    wide: Wide = False,
) -> None:
    """List the versions of a service.

    Oldest first, with their shares of the requests.
    """
    from dataclasses import asdict

    from palate.predictor import Predictor

    found = Predictor(name).versions()
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))
        return
    from palate.ui.terminal import Column, print_table

    rows = [
        (
            one.name,
            one.state,
            f"{one.share:.0%}",
            one.instances,
            " ".join(filter(None, (one.job, one.checkpoint))) or one.model,
            age(one.created_at),
            one.reason.splitlines()[0] if one.reason else "",
        )
        for one in found
    ]
    columns = (
        "version",
        "state",
        "share",
        Column("instances", 2),
        "job",
        Column("age", 1),
        Column("reason", 3, wraps=True),
    )
    print_table(columns, rows, wide=wide)
    opened = any(one.state in ("starting", "ready") for one in found)
    say_next(*(("promote", name) if opened else ("chat", name)))


def traffic(
    name: _Service,
    shares: Annotated[
        list[str], typer.Argument(metavar="VERSION=SHARE", help="Share of the requests for a version, such as v2=0.1.")
    ],
) -> None:
    """Split the requests between two versions of a service.

    Give one share or both. With one, the other version gets the rest.
    """
    from palate.predictor import Predictor

    parsed = {}
    for version, text in pairs(shares, "SHARES").items():
        try:
            parsed[version] = float(text)
        except ValueError:
            raise ConfigurationError(f"the share {text!r} of {version} is not a number: expected 0 to 1") from None
    predictor = Predictor(name)
    predictor.set_traffic(parsed)
    for one in predictor.versions():
        if one.state in ("current", "ready", "starting"):
            print(f"{one.name}\t{one.share:.0%}")
    say_next("promote", name)


def promote(name: _Service, wait: _Wait = True) -> None:
    """Send all requests to the new version of a service.

    For an update that was started with `palate update --traffic`.
    """
    from palate.predictor import Predictor

    Predictor(name).promote(wait=wait)
    say_next("versions", name)


def rollback(name: _Service, stop_start: _StopStart = False, wait: _Wait = True) -> None:
    """Cancel an update, or return to the previous version.

    `palate versions` lists the versions.
    """
    from palate.predictor import Predictor

    Predictor(name).rollback(wait=wait, zero_downtime=not stop_start)
    say_next("versions", name)


def scale(
    name: _Service,
    instances: Annotated[str, typer.Argument(help="Number of engines, such as 2, or two bounds, such as 1-4.")],
    target_requests: Annotated[
        float | None,
        typer.Option(help="With bounds: open requests for one engine. Default: 32 on a GPU, 4 on a CPU."),
    ] = None,
    upscale_delay: Annotated[
        float | None,
        typer.Option(help="With bounds: seconds over which requests are averaged to add engines. Default: 10."),
    ] = None,
    downscale_delay: Annotated[
        float | None,
        typer.Option(
            help="With bounds: seconds for which fewer engines must be enough before some are stopped. Default: 300."
        ),
    ] = None,
    wait: _Wait = True,
) -> None:
    """Set the number of engines of a service.

    Between two bounds their number follows the open requests. Each has its own copy of the model in memory.
    """
    from palate.predictor import Predictor
    from palate_recipes.errors import ConfigurationError

    least, dash, most = instances.partition("-")
    settings = {
        "target_requests": target_requests,
        "upscale_delay_s": upscale_delay,
        "downscale_delay_s": downscale_delay,
    }
    if not least.isdecimal() or (dash and not most.isdecimal()):
        raise ConfigurationError(
            f"{instances!r} is not a number of engines: expected one such as 2, or bounds such as 1-4"
        )
    if dash:
        Predictor(name).autoscale(int(most), int(least), **settings, wait=wait)
    elif given := [f"--{one.removesuffix('_s').replace('_', '-')}" for one in settings if settings[one] is not None]:
        raise ConfigurationError(f"{', '.join(given)}: only with two bounds, such as `palate scale {name} 1-4`")
    else:
        Predictor(name).scale(int(least), wait=wait)
    print(visible(f"{name}\t{instances}"))
    say_next("versions", name)


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    for verb in (update, versions, traffic, promote, rollback, scale):
        app.command()(verb)
