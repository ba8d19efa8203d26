"""Creates and starts a service: checks options, writes the record, starts the run. Knows no client and no engine."""

from __future__ import annotations

import errno
import math
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import UNSET

from palate.backends import PlacementRequest
from palate.common.utils import check_name
from palate.predictor import Predictor, ServedModel
from palate.preflight import check_deployment
from palate.processes import bind_error
from palate.rollout import check_autoscaling, check_instances
from palate.runs.access import forget_named_tokens, new_token, write_owner_token
from palate.runs.adapters import forget_adapters
from palate.runs.handle import RunHandle
from palate.runs.record import Record, versions
from palate.runs.renewal import forget_renewal
from palate.runs.rollout import forget as forget_versions
from palate.session import Session
from palate.ui import note
from palate_recipes.engine_options import ENGINE_OPTIONS, check_values, spec_fields
from palate_recipes.errors import ConfigurationError, NameTakenError
from palate_recipes.specs.run import Deployment, ServeManifest
from palate_recipes.specs.serve import ServeSpec
from palate_recipes.text import did_you_mean, show_path

_OPTIONS: dict[str, tuple[type, ...]] = {
    "engine": (str,),
    "host": (str,),
    "port": (int,),
    "dtype": (str,),
    "max_model_len": (int,),
    "start_timeout_s": (int, float),
    **dict.fromkeys(ENGINE_OPTIONS, (object,)),  # their own check has the bounds too
    "chat_template": (str, Path),
    "engine_args": (list, tuple),
    "merge": (bool,),
    "hang_after_s": (int, float),
    "time_to_live_s": (int, float),
    "idle_time_to_live_s": (int, float, type(None)),
    "sleep_after_s": (int, float, type(None)),
    "restarts": (int,),
    "autoscaling": (Mapping,),
    "verify": (bool, str),
}
_LIVES = ("time_to_live_s", "idle_time_to_live_s")
"""Times that the runner keeps; the manifest has them beside the options."""

_UNSET_BY_NONE = frozenset({*ENGINE_OPTIONS, "chat_template"})
_TEMPLATE_BYTES = 256 * 1024

IDLE_TIME_TO_LIVE_S = 12 * 3600.0
"""Default for services started from a script or notebook: a forgotten service must not hold a machine forever."""


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
    """Creates a service, starts it, and waits until it answers. If it fails, nothing is left running.

    Args:
        session: Store and backend.
        service_name: Name of the service, also a model name.
        served: The model to serve.
        options: See `ModelTrainingRecipe.deploy`.
        where: Placement; default: the backend's. Its `instance_count` is the number of engines.
        wait: Wait until it answers.
        show_logs: Show the engine's log while waiting; otherwise the steps of the start, on stderr.
    """
    check_name("service name", service_name)
    checked = _check_options(service_name, dict(options or {}))
    lives = {name: checked.pop(name) for name in _LIVES if name in checked}
    scaling = checked.pop("autoscaling", None)
    if session.backend.is_this_host:
        _check_port(checked)
    settings = served.settings(checked)
    engine = check_deployment(served, session, settings["options"])
    where = where or PlacementRequest(kind="services")
    instances = check_instances("instance_count", 1 if where.instance_count is None else where.instance_count)
    autoscaling = UNSET if scaling is None else check_autoscaling(scaling, least=instances)
    placement = session.backend.place(where)
    record = Record(session.store, "services", service_name)
    manifest = ServeManifest(
        name=service_name,
        backend=session.backend.name,
        labels=dict(served.labels),
        versions=versions(),
        body=Deployment(
            **served.facts(session, session.backend),
            **settings,
            time_to_live_s=lives.get("time_to_live_s"),
            idle_time_to_live_s=lives.get("idle_time_to_live_s", IDLE_TIME_TO_LIVE_S),
            placement=placement,
            instances=instances,
            autoscaling=autoscaling,
        ),
    )
    if not _take_over_failed(record, manifest, session):
        record.create(manifest)
    write_owner_token(record, new_token())
    predictor = Predictor(service_name, session=session)
    predictor._run.start()
    if wait:
        note(f"service {service_name} is starting; `palate logs -f {service_name}` shows the engine's log")
        if engine:
            note(f"it will run on {engine}")
        try:
            predictor._wait_until_ready(show_logs=show_logs, show_stages=True)
        except BaseException as error:
            predictor._run.stop(grace_s=5.0)  # on Ctrl-C too: a service that nobody waits for must not stay
            if isinstance(error, KeyboardInterrupt):
                error.add_note(f"service {service_name} was stopped; `palate start {service_name}` starts it again")
            raise
        if served.tuned_uri:
            tell_parity(predictor.describe_service().get("parity"), served.checkpoint)
    return predictor


def tell_parity(parity: object, checkpoint: str) -> None:
    """Notes the comparison of a service with its trained model, as its status has it."""
    if not isinstance(parity, dict):  # verify=False, or an untuned model
        return
    if checkpoint:
        note(
            f"{checkpoint} is a checkpoint: its files are verified, but its answers are not compared with the trainer's"
        )
        return
    verdict, text = parity.get("verdict"), str(parity.get("text"))
    if verdict == "same":
        note(f"the service answers as the trained model: {text}")
    elif verdict == "different":
        note(f"WARNING: what is served is not what was trained: {text}\n{parity.get('table', '')}")
    else:
        note(f"not compared with the trained model: {text}")


def _take_over_failed(record: Record, manifest: ServeManifest, session: Session) -> bool:
    """Reuses the name of a failed service. Returns False if there is no failed service with this name.

    Raises:
        NameTakenError: Another deploy took the name at the same time.
    """
    if not record.exists():
        return False
    run = RunHandle(record, session)
    failed = run.refresh()
    if failed.state != "Failed":
        return False  # then `Record.create` raises NameTakenError
    before = record.serve_manifest()
    # One conditional write decides between concurrent deploys. The new attempt number fences off a runner of the old service.
    if record.begin_again(expect={"Failed"}, attempt=failed.attempt, more=1) is None:
        if not record.exists():
            return False  # deleted in the meantime
        raise NameTakenError(
            f"service name {record.name!r} was just taken by another deploy to {record.store.root}: choose another, "
            f"or use that service (`palate services` lists it)"
        )
    try:
        record.delete_parts("logs")  # the logs of the failed start
        forget_named_tokens(record)  # it is another service, with a token of its own
        forget_renewal(record)
        forget_adapters(record)
        forget_versions(record)
        run.replace_manifest(before, manifest)
    except BaseException as error:
        record.advance("Failed", expect={"Creating"}, reason=f"the service could not be started: {error}")
        raise
    return True


def _check_options(service_name: str, options: dict[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        if name not in _OPTIONS:
            hint = did_you_mean(name, _OPTIONS)
            raise ConfigurationError(f"unknown deploy option {name!r}: {hint}valid options: {', '.join(_OPTIONS)}")
        kinds = _OPTIONS[name]
        if value is None and name in _UNSET_BY_NONE:
            continue
        if not isinstance(value, kinds) or (isinstance(value, bool) and not {bool, object}.intersection(kinds)):
            wanted = " or ".join(kind.__name__.replace("NoneType", "None") for kind in kinds)
            raise ConfigurationError(f"deploy option {name}={value!r}: expected {wanted}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigurationError(f"deploy option {name}={value!r} is not finite: expected a finite number")
    for name in _LIVES:
        if (value := options.get(name)) is not None and not value > 0:
            raise ConfigurationError(f"deploy option {name}={value!r}: expected a number of seconds above 0")
    options = {name: value for name, value in options.items() if value is not None or name not in _UNSET_BY_NONE}
    check_values(options)
    if "chat_template" in options:
        options["chat_template"] = read_template(options["chat_template"])
    if "verify" in options:
        options["verify"] = {True: "error", False: "off"}.get(options["verify"], options["verify"])
    settings = {name: value for name, value in options.items() if name not in (*_LIVES, "autoscaling")}
    try:
        ServeSpec(service_name=service_name, model_dir="", work_dir="", **spec_fields(settings))  # checks the bounds
    except ValueError as error:
        raise ConfigurationError(f"deploy option {error}") from None
    return dict(options)


def read_template(given: str | Path) -> str:
    """Returns a chat template's text, which the record keeps: the service may run where the file is not."""
    if isinstance(given, str) and ("{{" in given or "{%" in given):  # the text itself, as a service's record has it
        return given
    path = Path(given).expanduser()
    try:
        if path.stat().st_size > _TEMPLATE_BYTES:
            raise ConfigurationError(
                f"deploy option chat_template={show_path(given)} has {path.stat().st_size} bytes: expected a Jinja template of at "
                f"most {_TEMPLATE_BYTES} bytes"
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"deploy option chat_template={show_path(given)} cannot be read ({getattr(error, 'strerror', None) or error}): "
            "expected the path of a Jinja template"
        ) from None
    if not text.strip():
        raise ConfigurationError(f"deploy option chat_template={show_path(given)} is empty: expected a Jinja template")
    return text


def _check_port(options: dict[str, Any]) -> None:
    port, host = options.get("port", 0), options.get("host", "127.0.0.1")
    if not port and host == "127.0.0.1":
        return
    error = bind_error(host, port, within_s=1.0)
    if error is None:
        return
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        raise ConfigurationError(
            f"deploy option host={host!r} cannot be bound: {error.strerror}. Set it to an address of this machine, such as"
            " 127.0.0.1"
        )
    raise ConfigurationError(
        f"port {port} on {host} cannot be bound: {error.strerror}. Choose another port, or omit it for a free one"
    )
