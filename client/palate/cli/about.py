"""Verbs that tell: models, doctor."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer


def models(
    task: Annotated[str | None, typer.Option(help="Only those fit for it, such as chat.")] = None,
    kind: Annotated[str | None, typer.Option(help="instruct, thinking, base or moe.")] = None,
    hyperparameters: Annotated[
        bool, typer.Option("--hyperparameters", help="List the hyperparameters instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List models with what they need, or the hyperparameters."""
    if hyperparameters:
        _hyperparameters(as_json)
        return
    from palate_recipes.catalog import models as catalog

    rows = catalog(task, kind)
    if as_json:
        print(
            json.dumps(
                [
                    {"name": row.name, "hub_id": row.hub_id, "kind": row.kind, "parameters_b": row.parameters_b}
                    for row in rows
                ],
                indent=1,
            )
        )
        return
    from palate.terminal import print_table

    print_table(
        ("model", "kind", "params", "context", "licence", "LoRA GiB", "QLoRA GiB", "full GiB", "guidance"),
        [
            (
                row.name,
                row.kind,
                f"{row.parameters_b:g}B",
                row.context,
                row.licence,
                *(f"{row.min_gpu_memory(method):g}" for method in ("LoRA_LLM", "QLoRA_LLM", "Standard_LLM")),
                row.guidance,
            )
            for row in rows
        ],
    )
    print("GiB: least GPU memory at batch size 1. Any other model: --model-uri FOLDER", file=sys.stderr)
    print("next: palate train DATA --model NAME", file=sys.stderr)


def _hyperparameters(as_json: bool) -> None:
    from palate_recipes.hyperparameters import HYPERPARAMETERS, as_definitions
    from palate_recipes.schema import show

    if as_json:
        print(json.dumps(as_definitions(), indent=1))
        return
    from palate.terminal import print_table

    print_table(
        ("name", "default", "values", "unit", "meaning"),
        [(row.name, show(row.default), row.expectation, row.unit, row.meaning) for row in HYPERPARAMETERS.values()],
    )


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what is installed here, what is missing for what, and what will be used."""
    from palate.doctor import examine

    findings = examine()
    if as_json:
        print(
            json.dumps(
                [
                    {"topic": item.topic, "state": item.state, "fact": item.fact, "remedy": item.remedy}
                    for item in findings
                ],
                indent=1,
            )
        )
    else:
        from palate.terminal import print_table

        print_table(
            ("", "topic", "fact", "remedy"), [(item.state, item.topic, item.fact, item.remedy) for item in findings]
        )
    if any(item.state == "broken" for item in findings):
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Adds these verbs to the command line."""
    for verb in (models, doctor):
        app.command()(verb)
