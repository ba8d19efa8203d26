"""The commands `models`, `doctor`, `images` and `store up`."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from palate.cli.format import Wide, say_next
from palate_recipes.errors import ConfigurationError

if TYPE_CHECKING:
    from palate.backends.engine import ImageFacts
    from palate.backends.images import Program, Variant


def models(
    search: Annotated[
        str | None, typer.Argument(help="Show only models whose name or publisher contains this.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Show only models for this task, such as chat.")] = None,
    kind: Annotated[str | None, typer.Option(help="Show only this kind: instruct, thinking, base or moe.")] = None,
    hyperparameters: Annotated[
        bool, typer.Option("--hyperparameters", help="List the hyperparameters instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    wide: Wide = False,
) -> None:
    """List the models of the catalog, or the hyperparameters."""
    if hyperparameters:
        _hyperparameters(as_json, wide)
        return
    from palate_recipes.catalog import models as catalog

    wanted = (search or "").lower()
    rows = [row for row in catalog(task, kind) if wanted in row.name or wanted in row.hub_id.lower()]
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
    from palate.ui.terminal import Column, print_table

    columns = ("model", "kind", "params", Column("context", 3), Column("licence", 4), "LoRA GiB")
    print_table(
        (*columns, Column("QLoRA GiB", 1), Column("full GiB", 2), Column("guidance", 5)),
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
        wide=wide,
    )
    if not rows:
        print(f"no model of the catalog contains {search!r}", file=sys.stderr)
        say_next("models")
        return
    print("GiB: minimum GPU memory at batch size 1. For any other model: --model-uri FOLDER", file=sys.stderr)
    say_next("data", "demo")


def _hyperparameters(as_json: bool, wide: bool) -> None:
    from palate_recipes.hyperparameters import HYPERPARAMETERS, as_definitions
    from palate_recipes.schema import show

    if as_json:
        print(json.dumps(as_definitions(), indent=1))
        return
    from palate.ui.terminal import Column, print_table

    print_table(
        (
            "name",
            Column("default", wraps=True),
            Column("values", 2, wraps=True),
            Column("unit", 1),
            Column("meaning", wraps=True),
        ),
        [(row.name, show(row.default), row.expectation, row.unit, row.meaning) for row in HYPERPARAMETERS.values()],
        wide=wide,
    )


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what is installed, missing and used."""
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
        from palate.ui.terminal import Column, print_table

        print_table(
            ("", "topic", Column("fact", wraps=True), Column("remedy", wraps=True)),
            [(item.state, item.topic, item.fact, item.remedy) for item in findings],
        )
    if any(item.state == "broken" for item in findings):
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line."""
    for verb in (models, doctor):
        app.command()(verb)


images = typer.Typer(
    name="images",
    help="Build and list the images of the trainer and the server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_Engine = Annotated[
    Literal["docker", "podman"] | None, typer.Option(help="Container engine. Default: the one that answers.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@images.command()
def build(
    program: Annotated[
        Literal["trainer", "server"] | None, typer.Argument(help="Image to build. Default: both.")
    ] = None,
    engine: _Engine = None,
    variant: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Default: cuda on a machine with a GPU, else cpu.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Image tag. Default: version and variant.")] = None,
    build_arg: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE for the Dockerfile, see docs/containers.md. Do not pass secrets."),
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="Network of the build, as the engine's --network, such as host.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Build the images from this checkout or installed package."""
    from palate.backends.engine import find_engine
    from palate.backends.images import build_image
    from palate_recipes.device import local_device

    chosen: Variant = variant or ("cuda" if local_device().cuda else "cpu")
    wanted: tuple[Program, ...] = (program,) if program else ("trainer", "server")
    arguments = dict(map(_pair, build_arg or []))
    found = find_engine(engine)
    built = [
        build_image(
            name,
            chosen,
            engine=found,
            tag=tag,
            build_args=arguments,
            network=network,
            say=_say,
        )
        for name in wanted
    ]
    _show(built, as_json)
    say_next("images", "list")


@images.command("list")
def list_(engine: _Engine = None, as_json: _Json = False, wide: Wide = False) -> None:
    """List Palate's images, newest first."""
    from palate.backends.engine import find_engine
    from palate.backends.images import list_images

    found = list_images(find_engine(engine))
    _show(found, as_json, wide)
    if not found:
        print("no images yet", file=sys.stderr)
        say_next("images", "build")


def _show(found: list[ImageFacts], as_json: bool, wide: bool = False) -> None:
    from palate.backends.images import PROGRAM_LABEL, VARIANT_LABEL

    rows = [
        {
            "name": image.name,
            "id": image.id,
            "digest": image.digest,
            "size_bytes": image.size_bytes,
            "created": image.created,
            "program": image.labels.get(PROGRAM_LABEL, ""),
            "variant": image.labels.get(VARIANT_LABEL, ""),
            "version": image.labels.get("org.opencontainers.image.version", ""),
            "revision": image.labels.get("org.opencontainers.image.revision", ""),
            "base": image.labels.get("org.opencontainers.image.base.name", ""),
            "base_digest": image.labels.get("org.opencontainers.image.base.digest", ""),
        }
        for image in found
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from palate.ui.terminal import Column, print_table

    shown = [
        (
            row["name"],
            row["program"],
            row["variant"],
            row["version"],
            f"{int(str(row['size_bytes'])) / 1e9:.2f} GB",
            row["id"],
        )
        for row in rows
    ]
    columns = ("image", Column("program", 4), Column("variant", 3), Column("version", 2), "size", Column("id", 1))
    print_table(columns, shown, wide=wide)


def _pair(given: str) -> tuple[str, str]:
    name, equals, value = given.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigurationError(f"--build-arg: expected NAME=VALUE, such as TORCH_INDEX_URL=https://…, got {given!r}")
    return name, value


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


store = typer.Typer(
    name="store",
    help="Run a local S3 server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@store.command()
def up(
    folder: Annotated[Path | None, typer.Option(help="Data folder. Default: ~/.palate/store-server.")] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; the next four are used as well.")] = 8333,
    bucket: Annotated[str, typer.Option(help="Bucket; created if missing.")] = "palate",
) -> None:
    """Run an S3 server until Ctrl-C and print its settings.

    The secret key is shown only at the first start.
    """
    from palate.paths import palate_home
    from palate.store.server import REGION, running_server

    signal.signal(signal.SIGTERM, _stop)
    try:
        with running_server(folder or palate_home() / "store-server", port=port, bucket=bucket) as server:
            print(f"export AWS_ENDPOINT_URL_S3={server.endpoint} AWS_DEFAULT_REGION={REGION}")
            print(f"export AWS_ACCESS_KEY_ID={server.access_key_id}")
            if server.is_new:
                print(f"export AWS_SECRET_ACCESS_KEY={server.secret_access_key}")
            print(f"export PALATE_STORE=s3://{bucket}/palate", flush=True)
            if server.is_new:
                print("the secret access key is shown only this once: save it", file=sys.stderr)
            else:
                print("the secret access key is the one shown at the first start", file=sys.stderr)
            print("serving until Ctrl-C; run the lines above in another terminal", file=sys.stderr)
            say_next("doctor")
            server.wait()
    except (KeyboardInterrupt, _Stopped):
        print("stopped; the data is kept", file=sys.stderr)


class _Stopped(Exception):
    """SIGTERM was received."""


def _stop(*_: object) -> NoReturn:
    raise _Stopped
