"""The server's main path: the public socket, the front, the service behind it, ready.json, and a clean shutdown."""

from __future__ import annotations

import errno
import logging
import os
import resource
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec.structs import replace

from palate_recipes.errors import BadSpec, PortTaken, ServerError
from palate_recipes.specs.access import ACCESS_FILE
from palate_recipes.specs.fleet import FLEET_STATE_FILE
from palate_recipes.specs.serve import ERROR_FILE, IDLE_FILE, READY_FILE, TOKEN_VARIABLE, Parity, Ready, ServeSpec
from palate_server.access import Access
from palate_server.gateway import Activity, Gateway
from palate_server.listener import Front
from palate_server.metrics import METRICS
from palate_server.proxy import Proxy
from palate_server.request_log import REQUEST_LOG
from palate_server.routes import Routes
from palate_server.service import Service
from palate_server.trial import Asking

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_DESCRIPTORS = 65536
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def main(argv: list[str]) -> int:
    """Serves the spec file in argv until SIGTERM. Returns the exit code; 1 means a failure with error.txt written."""
    if len(argv) != 1:
        print("usage: python -m palate_server SPEC.json", file=sys.stderr)
        return 2
    try:
        _raise_descriptor_limit()
        spec = ServeSpec.read(Path(argv[0]))
    except (OSError, ValueError) as error:
        print(f"palate_server: {error}", file=sys.stderr)
        return 2
    work_dir = Path(spec.work_dir).resolve()
    if not work_dir.is_dir():
        print(f"palate_server: work_dir {work_dir} is not a folder: create it first", file=sys.stderr)
        return 2
    spec = _absolute(spec, work_dir)
    for name in (READY_FILE, ERROR_FILE, IDLE_FILE, FLEET_STATE_FILE):
        (work_dir / name).unlink(missing_ok=True)
    try:
        serve(spec)
    except ServerError as error:
        (work_dir / ERROR_FILE).write_text(f"{error}\n", encoding="utf-8")
        logger.error("%s", error)
        return 1
    except Exception as error:  # a bug, or a full disk: the runner shows error.txt
        logger.exception("the server program failed")
        (work_dir / ERROR_FILE).write_text(
            f"the server program failed ({type(error).__name__}: {error})\n", encoding="utf-8"
        )
        return 1
    finally:
        (work_dir / READY_FILE).unlink(missing_ok=True)
    return 0


def serve(spec: ServeSpec) -> None:
    """Runs the service in the foreground until SIGTERM or SIGINT. When it returns or raises, all engine processes have ended.

    Raises:
        ServerError: The service cannot start, or none of its engines can go on.
    """
    began = time.monotonic()
    owner = os.environ.get(TOKEN_VARIABLE)
    if not owner:
        raise BadSpec(
            f"{TOKEN_VARIABLE} is not set, and a service never runs without a token: export a long random one"
        )
    work_dir = Path(spec.work_dir)
    with _listening(spec.host, spec.port) as listener:
        port = listener.getsockname()[1]
        endpoint = _endpoint(spec.host, port)
        # Of its own: the owner's token may change while the service runs, and limits are for users.
        token = secrets.token_urlsafe(32)
        routes, activity = Routes(), Activity()
        proxy = Proxy(routes)
        gateway = Gateway(
            proxy,
            service_name=spec.service_name,
            routes=routes,
            access=Access(work_dir / ACCESS_FILE, owner=owner, probe=token),
            activity=activity,
        )
        REQUEST_LOG.follow(spec.engine_args)
        front = Front(gateway, listener, on_end=proxy.close, on_failure=lambda why: service.front_ended(why))

        def ready(engine: str, parity: Parity | None) -> None:
            METRICS.engine = engine
            seconds = round(time.monotonic() - began, 1)
            Ready(endpoint=endpoint, engine=engine, models=spec.models, seconds=seconds, parity=parity).write(
                work_dir / READY_FILE
            )
            logger.info("ready after %.1f s: %s/v1", seconds, endpoint)

        service = Service(
            spec,
            routes=routes,
            activity=activity,
            asking=Asking(endpoint, token),
            on_ready=ready,
            on_engine_end=lambda socket: front.call(proxy.forget(socket)),
        )
        front.start()
        quiet = False
        with _signals_to(service.stop):
            try:
                reason = service.run()
                quiet = True
            finally:
                (work_dir / READY_FILE).unlink(missing_ok=True)
                # Open requests are answered first if it was asked to stop; otherwise no engine can answer them.
                front.end(drain=quiet)
                service.end(quiet=quiet)
    if reason == "idle":
        text = f"no request for {spec.idle_after_s:g} s, its idle time to live"
        (work_dir / IDLE_FILE).write_text(f"{text}\n", encoding="utf-8")
        logger.info("stopped: %s", text)
    else:
        logger.info("stopped")


def _raise_descriptor_limit() -> None:
    """Raises the limit of open files: a forwarded request needs two, and the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _absolute(spec: ServeSpec, work_dir: Path) -> ServeSpec:
    """Returns the spec with absolute paths: the engine runs in the work folder."""
    base = spec.base_model_dir and str(Path(spec.base_model_dir).resolve())
    return replace(spec, work_dir=str(work_dir), model_dir=str(Path(spec.model_dir).resolve()), base_model_dir=base)


@contextmanager
def _signals_to(stop: Callable[[], None]) -> Iterator[None]:
    before = {s: signal.signal(s, lambda *_: stop()) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Yields a listening socket. Raises PortTaken.

    From here on no other process can bind the port, so every connection reaches this program. That includes its own requests,
    which have a token.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(_BACKLOG)
        except OSError as error:
            remedy = "stop the program that uses it, choose another port, or set port=0 for a free one"
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                remedy = "set host to an address of this machine, such as 127.0.0.1"
            raise PortTaken(f"cannot bind port {port} on {host} ({error.strerror}): {remedy}") from error
        yield listener


def _endpoint(host: str, port: int) -> str:
    host = _LOOPBACK.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
