"""The commands `adapter list`, `add` and `rm`. Know arguments and output, not how an adapter is checked or loaded."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from palate.cli.format import Wide, age, say_next
from palate_recipes.text import visible

adapter = typer.Typer(
    help="More tuned models on a service's base: list, add, remove.",
    no_args_is_help=True,
)

_Service = Annotated[str, typer.Argument(help="Service name.")]
_Named = Annotated[str, typer.Argument(help="Name of the adapter: the model name in requests.")]


@adapter.command("list")
def list_adapters(
    service: _Service,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    wide: Wide = False,
) -> None:
    """List a service's adapters with their state."""
    from dataclasses import asdict

    from palate.predictor import Predictor

    found = Predictor(service).adapters()
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))
        return
    from palate.ui.terminal import Column, print_table

    rows = [
        (
            visible(one.name),
            visible(f"{one.state}: {one.reason}" if one.reason else one.state),
            age(one.added_at),
            one.rank,
            visible(one.job or one.uri),
        )
        for one in found
    ]
    print_table(("adapter", "state", "age", Column("rank", 1), Column("from", 2)), rows, wide=wide)
    say_next("adapter", "add", service, "NAME", "JOB")


@adapter.command()
def add(
    service: _Service,
    name: _Named,
    job_or_uri: Annotated[
        str, typer.Argument(metavar="JOB|URI", help="Job id or URI; or the URI of a model folder with digests.json.")
    ],
    replace: Annotated[bool, typer.Option("--replace", help="Replace another adapter of this name.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait until the service answers for it.")] = False,
) -> None:
    """Serve another job's adapter under a model name of its own.

    A running service loads it while it answers requests.
    """
    from palate.predictor import Predictor

    Predictor(service).add_adapter(name, job_or_uri, replace=replace, wait=not no_wait)
    print(visible(f"{name}\tadded"))
    say_next("chat", service, "--model", name)


@adapter.command("rm")
def remove(service: _Service, name: _Named) -> None:
    """Remove an adapter. Requests that a running service has accepted are answered."""
    from palate.predictor import Predictor

    Predictor(service).remove_adapter(name)
    print(visible(f"{name}\tremoved"))
