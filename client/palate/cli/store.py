"""`palate store`: the verbs about objects, and `up`, which prints its settings to stdout. Knows no job."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from palate.cli import objects

store = typer.Typer(
    name="store",
    help="List, copy and remove the objects of any store, or run one of your own.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


objects.register(store)


@store.command()
def up(
    folder: Annotated[Path | None, typer.Option(help="Where its data lie; default: ~/.palate/store-server.")] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; the next four are used, too.")] = 8333,
    bucket: Annotated[str, typer.Option(help="Bucket; made when it is not there.")] = "palate",
) -> None:
    """Run an S3 store in a folder until Ctrl-C, and print the settings that reach it (the secret key once)."""
    from palate.home import palate_home
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
                print("the secret access key is shown this once: keep it", file=sys.stderr)
            else:
                print("the secret access key is the one of the first start", file=sys.stderr)
            print("serving until Ctrl-C; set the lines above elsewhere", file=sys.stderr)
            print("next: palate doctor", file=sys.stderr, flush=True)
            server.wait()
    except (KeyboardInterrupt, _Stopped):
        print("stopped; the data stay", file=sys.stderr)


class _Stopped(Exception):
    """SIGTERM came."""


def _stop(*_: object) -> NoReturn:
    raise _Stopped
