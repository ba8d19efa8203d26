"""The commands `token list`, `add`, `remove` and `rotate`. Know arguments and output, not how a token is stored or checked."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from palate.cli.format import Wide, age, say_next
from palate_recipes.specs.access import OWNER
from palate_recipes.text import visible

token = typer.Typer(help="The tokens of a service: list, add, remove, rotate.", no_args_is_help=True)

_Service = Annotated[str, typer.Argument(help="Service name.")]
_Named = Annotated[str, typer.Argument(help="Name of the token.")]


@token.command("list")
def list_tokens(
    service: _Service,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    wide: Wide = False,
) -> None:
    """List a service's tokens with their limits, never their values."""
    from dataclasses import asdict

    from palate.predictor import Predictor

    found = Predictor(service).tokens()
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))
        return
    from palate.ui.terminal import Column, print_table

    rows = [
        (
            one.name,
            age(one.created_at),
            "none" if one.rate_per_minute is None else one.rate_per_minute,
            "none" if one.concurrency is None else one.concurrency,
        )
        for one in found
    ]
    print_table(("token", "age", Column("requests per minute", 1), Column("open requests", 2)), rows, wide=wide)
    say_next("token", "add", service, "NAME")


@token.command()
def add(
    service: _Service,
    name: _Named,
    rate_per_minute: Annotated[
        int | None, typer.Option(help="Allow at most this many requests within 60 seconds.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help="Allow at most this many open requests.")] = None,
) -> None:
    """Add a token and print its value, which cannot be read again.

    A running service accepts it at once.
    """
    from palate.predictor import Predictor

    print(Predictor(service).add_token(name, rate_per_minute=rate_per_minute, concurrency=concurrency))
    say_next("token", "list", service)


@token.command()
def remove(service: _Service, name: _Named) -> None:
    """Remove a token. When the command returns, a running service refuses it."""
    from palate.predictor import Predictor

    Predictor(service).remove_token(name)
    print(visible(f"{name}\tremoved"))


@token.command()
def rotate(service: _Service, name: _Named = OWNER) -> None:
    """Give a token a new value and print it. The old value is refused.

    The default is the owner's token, which Palate's own clients read from the store.
    """
    from palate.predictor import Predictor

    print(Predictor(service).rotate_token(name))
    say_next("token", "list", service)
