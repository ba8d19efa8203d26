"""`palate clean`: shows what runs left behind, and removes it when told to. Knows the sweep, nothing of what it finds."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer


def clean(
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Remove what was found; without it nothing changes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what lost runs left behind (processes, leases, folders, expired services); with --yes, remove it."""
    from palate.clean import find_leftovers
    from palate.session import get_default_session

    found = find_leftovers(get_default_session())
    if as_json:
        print(json.dumps([{"kind": item.kind, "what": item.what, "why": item.why} for item in found], indent=1))
    else:
        from palate.terminal import print_table

        print_table(("kind", "what", "why"), [(item.kind, item.what, item.why) for item in found])
    if not found:
        print("nothing is left behind", file=sys.stderr)
    elif yes:
        for item in found:
            item.remove()
        print(f"{len(found)} removed; next: palate jobs", file=sys.stderr)
    else:
        print(f"{len(found)} found, nothing changed; next: palate clean --yes", file=sys.stderr)


def register(app: typer.Typer) -> None:
    """Adds the verb to the command line."""
    app.command()(clean)
