"""What it takes to serve a model: options checked, its record made, the run started. Knows no client and no engine."""

from __future__ import annotations

import errno
import math
import secrets
import socket
import time
from collections.abc import Mapping
from typing import Any

from palate.backends import PlacementRequest
from palate.common.utils import check_name
from palate.predictor import Predictor, ServedModel
from palate.runs.handle import RunHandle
from palate.runs.record import TOKEN_KEY, Record
from palate.session import Session
from palate_recipes.errors import ConfigurationError, NameTakenError
from palate_recipes.specs.run import Deployment, ServeManifest
from palate_recipes.specs.serve import ServeSpec
from palate_recipes.text import did_you_mean

_OPTIONS: dict[str, tuple[type, ...]] = {
    "engine": (str,),
    "host": (str,),
    "port": (int,),
    "dtype": (str,),
    "max_model_len": (int,),
    "start_timeout_s": (int, float),
    "engine_args": (list, tuple),
    "hang_after_s": (int, float),
    "time_to_live_s": (int, float),
    "idle_time_to_live_s": (int, float, type(None)),
}
_LIVES = ("time_to_live_s", "idle_time_to_live_s")
"""Options that are the service's, and not its server's."""

IDLE_TIME_TO_LIVE_S = 12 * 3600.0
"""For services that a script or a notebook started: what it forgets must not hold a machine for ever."""


def start_service(
    session: Session,
    *,
    service_name: str,
    served: ServedModel,
    options: Mapping[str, Any] | None = None,
    where: PlacementRequest | None = None,
    wait: bool = True,
    show_logs: bool = False,
) -> Predictor:
    """Creates a service, starts it, and waits until it answers; nothing is left running when it does not.

    Args:
        session: Store and backend.
        service_name: Its name, and a model name that it answers to.
        served: What it serves.
        options: See `ModelTrainingRecipe.deploy`.
        where: What the user wants of the backend; default: nothing special.
        wait: Whether to wait until it answers.
        show_logs: Whether to show the engine's log meanwhile.
    """
    check_name("service name", service_name)
    checked = _check_options(service_name, dict(options or {}))
    lives = {name: checked.pop(name) for name in _LIVES if name in checked}
    if session.backend.is_this_host:
        _check_port(checked)
    placement = session.backend.place(where or PlacementRequest(kind="services"))
    record = Record(session.store, "services", service_name)
    manifest = ServeManifest(
        name=service_name,
        backend=session.backend.name,
        labels=dict(served.labels),
        body=Deployment(
            **served.facts(session, session.backend),
            options=checked,
            time_to_live_s=lives.get("time_to_live_s"),
            idle_time_to_live_s=lives.get("idle_time_to_live_s", IDLE_TIME_TO_LIVE_S),
            placement=placement,
        ),
    )
    if not _take_over_failed(record, manifest, session):
        record.create(manifest)
    record.store.put(record.key(TOKEN_KEY), secrets.token_urlsafe(32).encode(), private=True)
    predictor = Predictor(service_name, session=session)
    predictor._run.start()
    if wait:
        try:
            predictor.wait_for_ready(show_logs=show_logs)
        except BaseException:
            predictor._run.stop(grace_s=5.0)  # also on Ctrl-C: what nobody waits for must not stay
            raise
    return predictor


def _take_over_failed(record: Record, manifest: ServeManifest, session: Session) -> bool:
    """Gives a failed service's name to a new one, and says whether it did: there may be none.

    Raises:
        NameTakenError: Somebody else took the name at the same moment.
    """
    if not record.exists():
        return False
    run = RunHandle(record, session)
    failed = run.refresh()
    if failed.state != "Failed":
        return False  # creating it says that the name is taken
    before = record.serve_manifest()
    # One conditional write decides among those who want the name. The next attempt fences off what may be left of the old one.
    if record.begin_again(expect={"Failed"}, attempt=failed.attempt, more=1) is None:
        if not record.exists():
            return False  # deleted meanwhile
        raise NameTakenError(
            f"service name {record.name!r} was taken just now by another deploy to {record.store.root}: choose another, "
            f"or use that service (`palate services` lists it)"
        )
    try:
        record.delete_parts("logs")  # of the failed start, which nobody needs now
        run.replace_manifest(before, manifest)
    except BaseException as error:
        record.advance("Failed", expect={"Creating"}, reason=f"it could not be started: {error}")
        raise
    return True


def _check_options(service_name: str, options: dict[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        if name not in _OPTIONS:
            hint = did_you_mean(name, _OPTIONS)
            raise ConfigurationError(f"unknown deploy option {name!r}: {hint}known are {', '.join(_OPTIONS)}")
        if isinstance(value, bool) or not isinstance(value, _OPTIONS[name]):
            wanted = " or ".join(kind.__name__.replace("NoneType", "None") for kind in _OPTIONS[name])
            raise ConfigurationError(f"deploy option {name}={value!r} must be {wanted}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigurationError(f"deploy option {name}={value!r} must be a finite number")
    for name in _LIVES:
        if (value := options.get(name)) is not None and not value > 0:
            raise ConfigurationError(f"deploy option {name}={value!r} must be above 0")
    settings = {name: value for name, value in options.items() if name not in _LIVES}
    try:
        ServeSpec(service_name=service_name, model_dir="", work_dir="", **settings)  # its bounds are the bounds
    except ValueError as error:
        raise ConfigurationError(f"deploy option {error}") from None
    return dict(options)


def _check_port(options: dict[str, Any]) -> None:
    port, host = options.get("port", 0), options.get("host", "127.0.0.1")
    if not port and host == "127.0.0.1":
        return
    deadline = time.monotonic() + 1.0
    while True:  # a port that was just freed may take a moment
        try:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
            return
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise ConfigurationError(
                    f"deploy option host={host!r} cannot be bound: {error.strerror}. Give an address of this machine, such as 127.0.0.1"
                ) from None
            if time.monotonic() >= deadline:
                raise ConfigurationError(
                    f"port {port} on {host} cannot be used: {error.strerror}. Give another port=, or leave it out for a free one"
                ) from None
            time.sleep(0.1)
