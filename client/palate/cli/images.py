"""Verbs about images: build, list. Names and sizes to stdout, steps to stderr; knows no run."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from palate.errors import ConfigurationError

if TYPE_CHECKING:
    from palate.images import Program, Variant
    from palate.images.engine import ImageFacts

images = typer.Typer(
    name="images",
    help="Build and list the images of the trainer and the server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_Engine = Annotated[Literal["docker", "podman"] | None, typer.Option(help="Default: whichever answers.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@images.command()
def build(
    program: Annotated[Literal["trainer", "server"] | None, typer.Argument(help="Default: both.")] = None,
    engine: _Engine = None,
    variant: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="Default: cuda where there is a GPU.")] = None,
    tag: Annotated[str | None, typer.Option(help="Tag; default: the version and the variant.")] = None,
    build_arg: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the Dockerfile; see docs/containers.md. Never a secret.")
    ] = None,
    network: Annotated[str | None, typer.Option(help="The engine's --network while it builds, such as host.")] = None,
    as_json: _Json = False,
) -> None:
    """Build the images from this Palate, whether it is a checkout or an installed package."""
    from palate.images import build_image
    from palate.images.engine import find_engine
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
    print("next: palate images list", file=sys.stderr)


@images.command("list")
def list_(engine: _Engine = None, as_json: _Json = False) -> None:
    """List Palate's images that the engine has, newest first."""
    from palate.images import list_images
    from palate.images.engine import find_engine

    found = list_images(find_engine(engine))
    _show(found, as_json)
    if not found:
        print("no images yet; next: palate images build", file=sys.stderr)


def _show(found: list[ImageFacts], as_json: bool) -> None:
    from palate.images import PROGRAM_LABEL, VARIANT_LABEL

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
    from palate.terminal import print_table

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
    print_table(("image", "program", "variant", "version", "size", "id"), shown)


def _pair(given: str) -> tuple[str, str]:
    name, equals, value = given.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigurationError(f"--build-arg {given!r} must be NAME=VALUE, such as TORCH_INDEX_URL=https://…")
    return name, value


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
