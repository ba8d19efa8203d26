"""Updates of a service: asks its runner for a new version, follows it, returns to an earlier one. Knows the record, no engine.

A running service is updated by its runner (see `palate.runner.fleet`): the new version starts while the current one answers. The
other way, with a stop and a start, is for services that do not run, and for machines that cannot hold both versions.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msgspec import UNSET, UnsetType, ValidationError, convert
from msgspec.structs import replace

from palate.runs.handle import POLL_S, RunHandle
from palate.runs.rollout import (
    ask,
    change_update,
    history,
    in_progress,
    make_current,
    note_outcome,
    of_manifest,
    open_update,
    previous,
    read_version,
    reserve,
    update_to,
    withdraw,
)
from palate.service_adapters import check_update
from palate.ui import note
from palate_recipes.errors import ConfigurationError, ServiceError, WaitTimeoutError
from palate_recipes.specs.rollout import Update, Version, version_name
from palate_recipes.specs.run import INSTANCES_LIMIT, TERMINAL, Autoscaling, Deployment, Status
from palate_recipes.text import did_you_mean

if TYPE_CHECKING:
    from palate.predictor import Predictor, ServedModel

FOLLOWED_S = 15.0
"""A runner that follows updates says so in the status within this time."""
_TAKEN_S = 60.0
"""A runner that reaches its store takes an update up within this time."""
_WITHDRAWN_S = 10.0
"""A runner ends an update that was withdrawn within this time."""
_CAS_ATTEMPTS = 20


@dataclass(frozen=True, kw_only=True)
class ServiceVersion:
    """A version of a service.

    Attributes:
        name: `v1`, `v2` and so on.
        state: `current`; `starting`: its engines start; `ready`: it answers a share of the requests; `draining`: it answers its
            open requests; `replaced`, `failed` or `cancelled`: it does not run.
        share: Share of the requests that it answers.
        instances: Engines that answer for it.
        job: Id of the job whose model it serves, or "".
        checkpoint: Name of the job's checkpoint, or "".
        model: Name of the base model.
        created_at: When it was asked for, in seconds since the epoch.
        reason: Why it failed or was withdrawn.
    """

    name: str
    state: str
    share: float
    instances: int
    job: str
    checkpoint: str
    model: str
    created_at: float
    reason: str = ""


# ── what there is ───────────────────────────────────────────────────────────────────────────────────────────────────


def list_versions(service: Predictor) -> list[ServiceVersion]:
    """Returns the versions of a service, oldest first."""
    record = service._run.record
    status = service._run.refresh()
    manifest, update, known = record.serve_manifest(), open_update(record), history(record)
    current = manifest.body.version
    if all(one.number != current for one in known):
        known.append(of_manifest(manifest, None))
    live = _live(status)
    return [
        _shown(one, current, update, live.get(version_name(one.number)))
        for one in sorted(known, key=lambda one: one.number)
    ]


def _shown(version: Version, current: int, update: Update | None, live: Mapping[str, Any] | None) -> ServiceVersion:
    number, reason, share = version.number, version.reason, 0.0
    live = live or {}
    if number == current:
        state, share = "current", 1.0 if update is None else 1.0 - update.share
    elif update is not None and number == update.body.version:
        state, share = ("ready" if live.get("state") == "ready" else "starting"), update.share
    elif live.get("state") == "draining":
        state = "draining"
    elif version.outcome == "asked":
        state, reason = "cancelled", "the client that asked for it ended before the update began"
    else:
        # `current`, but the manifest has another: the client of an update with a stop and a start was killed.
        state = "replaced" if version.outcome == "current" else version.outcome
    return ServiceVersion(
        name=version_name(number),
        state=state,
        share=float(live.get("share", share)),
        instances=int(live.get("instances", 0)),
        job=version.labels.get("job", ""),
        checkpoint=version.body.checkpoint or "",
        model=version.body.model.name,
        created_at=version.asked_at,
        reason=reason or str(live.get("reason", "")),
    )


def _live(status: Status) -> dict[str, dict[str, Any]]:
    """Returns what the runner tells about the versions that run, by name."""
    told = status.details.get("versions") if status.state == "Running" else None
    return {one["name"]: one for one in told or [] if isinstance(one, dict) and "name" in one}


def _told(status: Status, update: Update) -> dict[str, Any]:
    """Returns what the runner tells about an update; empty if it has not taken it up."""
    told = status.details.get("update")
    return told if isinstance(told, dict) and told.get("id") == update.id else {}


# ── updates ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def update_to_job(
    service: Predictor,
    served: ServedModel,
    job_id: str,
    *,
    wait: bool,
    traffic: float | None,
    zero_downtime: bool,
    show_logs: bool,
) -> Predictor:
    """Updates a service to a job's model. See `Predictor.update_service`."""
    run = service._run
    before = run.record.serve_manifest()
    after = served.instead_of(before, run)
    if run.refresh().state == "Running" and after == before:
        note(f"service {service.service_name} already serves job {job_id}")
        return service
    return _change(
        service,
        after.body,
        dict(after.labels),
        what=f"job {job_id}",
        wait=wait,
        traffic=traffic,
        zero_downtime=zero_downtime,
        show_logs=show_logs,
    )


def update_to_version(service: Predictor, number: int, *, wait: bool = True, zero_downtime: bool = True) -> Predictor:
    """Updates a service to a version of its history. It gets a new number. See `Predictor.switch_version`."""
    record = service._run.record
    if isinstance(number, bool) or not isinstance(number, int):
        raise ConfigurationError(
            f"version={number!r} is not the number of a version: expected a whole number, such as 1"
        )
    if number == record.serve_manifest().body.version:
        note(f"service {service.service_name} already serves {version_name(number)}")
        return service
    version = read_version(record, number)
    if version is None:
        known = ", ".join(one.name for one in list_versions(service))
        raise ConfigurationError(f"service {service.service_name} has no version {number}. It has: {known}")
    job = version.labels.get("job", "")
    what = f"{version_name(number)}{f' (job {job})' if job else ''}"
    return _change(
        service, version.body, version.labels, what=what, wait=wait, zero_downtime=zero_downtime, show_logs=False
    )


def rollback(service: Predictor, *, wait: bool = True, zero_downtime: bool = True) -> Predictor:
    """Withdraws the update in progress, or updates to the version before. See `Predictor.rollback`."""
    record = service._run.record
    update = open_update(record)
    if update is None:
        before = previous(record)
        if before is None:
            raise ConfigurationError(f"service {service.service_name} has no earlier version to return to")
        return update_to_version(service, before.number, wait=wait, zero_downtime=zero_downtime)
    name = version_name(update.body.version)
    if not _withdrawn(service, update, "rollback", within_s=_TAKEN_S if wait else 0.0) and wait:
        if record.serve_manifest().body.version == update.body.version:
            raise ServiceError(
                f"the update of service {service.service_name} to {name} was not withdrawn",
                reason="it was completed at the same moment: roll back again to return to the version before",
            )
        raise ServiceError(
            f"the update of service {service.service_name} to {name} was withdrawn in the record",
            reason=f"its runner has not followed within {_TAKEN_S:g} s: it cannot reach the store",
        )
    note(f"the update to {name} was withdrawn: service {service.service_name} keeps its previous model")
    return service


def _change(
    service: Predictor,
    body: Deployment,
    labels: dict[str, str],
    *,
    what: str,
    wait: bool,
    traffic: float | None = None,
    zero_downtime: bool,
    show_logs: bool,
) -> Predictor:
    run = service._run
    record = run.record
    if traffic is not None and not 0 < traffic <= 1:
        raise ConfigurationError(f"traffic={traffic!r} is out of range: expected 0 < traffic <= 1, such as 0.1")
    if (pending := open_update(record)) is not None:
        raise in_progress(record, pending)
    check_update(run, replace(record.serve_manifest(), body=body))
    status = run.refresh()
    running = status.state == "Running"
    if not running or not zero_downtime:
        if traffic is not None:
            why = "it is not running" if not running else "zero_downtime=False stops the current version"
            raise ConfigurationError(f"traffic={traffic:g} cannot be shared between two versions: {why}")
        return _stop_and_start(service, body, labels, what=what, wait=wait, show_logs=show_logs)
    if unseen := run.out_of_reach(body, status):
        raise ConfigurationError(
            f"service {service.service_name} runs in a container that was started without {unseen[0]}, so it cannot read the new "
            f"model while it runs: zero_downtime=False (`palate update {service.service_name} JOB --stop-start`) starts it again with "
            "that folder"
        )
    _require_following(service)
    shown = record.last_part("logs")
    version = reserve(record, body, labels)
    update = update_to(version, share=traffic or 0.0, promote=traffic is None)
    try:
        try:
            ask(record, update)
        except ConfigurationError as error:
            note_outcome(record, version, "cancelled", reason=str(error))
            raise
        note(
            f"{version_name(version.number)} of service {service.service_name} serves {what}; it starts beside the current one"
        )
        if not wait:
            return service
        return _follow(service, update, what, show_logs=show_logs, after_log_part=shown)
    except KeyboardInterrupt as interrupt:
        if _withdrawn(service, update, "interrupted", within_s=_WITHDRAWN_S):
            interrupt.add_note(f"service {service.service_name} keeps its previous model")
        elif record.serve_manifest().body.version == version.number:
            interrupt.add_note(f"service {service.service_name} serves {what}: the update was completed before")
        else:
            interrupt.add_note(
                f"the update to {version_name(version.number)} was withdrawn; service {service.service_name} keeps its previous model"
            )
        raise


def _follow(
    service: Predictor, update: Update, what: str, *, show_logs: bool = False, after_log_part: int, asked: bool = True
) -> Predictor:
    """Waits until an update is completed, or answers its share.

    Args:
        service: The service.
        update: The update.
        what: What it serves, for messages.
        show_logs: As in `Predictor.update_service`.
        after_log_part: Part of the log after which lines are shown.
        asked: Whether this client has asked for it, and withdraws it if nobody waits for it any more.
    """
    run, name = service._run, version_name(update.body.version)
    begun = time.monotonic()

    def settled(status: Status) -> bool:
        told = _told(status, update)
        if not told and time.monotonic() - begun > _TAKEN_S and status.state == "Running":
            return True
        waits = told.get("state") == "ready" and not update.promote
        return waits or told.get("state") in ("promoted", "failed", "cancelled")

    failed = f"service {service.service_name} could not be updated to {what}, and serves its previous model as before"
    try:
        status = run.follow(
            until=settled,
            show_logs=show_logs,
            timeout_s=service.ready_limit_s,
            interval_s=0.5,
            what="the update",
            stages=True,
            after_log_part=after_log_part,
        )
    except KeyboardInterrupt as interrupt:
        if not asked:
            interrupt.add_note(f"the update to {name} continues: `palate versions {service.service_name}` shows it")
        raise
    except WaitTimeoutError:
        status = run.record.status()
    told = _told(status, update)
    if status.state in TERMINAL and told.get("state") not in ("promoted", "failed", "cancelled"):
        if asked:  # a start must not repeat what may have ended the service
            withdraw(run.record, update, reason=status.reason)
        raise ServiceError(
            f"service {service.service_name} ended during its update to {what}",
            reason=f"{status.reason or status.state}. `palate start {service.service_name}` starts it with its previous model",
            log_tail=[*status.log_tail],
        )
    if not settled(status) or not told:
        reason = "it did not answer in time"
        if not told:
            reason = f"its runner has not taken it up within {_TAKEN_S:g} s: {_cannot_follow(service)}"
        ended = not asked or _withdrawn(service, update, reason, within_s=_WITHDRAWN_S)
        if not ended and run.record.serve_manifest().body.version == update.body.version:
            return _completed(service, run.record.status(), update, what)
        raise ServiceError(failed, reason=reason, log_tail=run.record.last_log_lines(15))
    if told["state"] == "promoted":
        return _completed(service, status, update, what)
    if told["state"] == "ready":
        note(
            f"{name} answers {update.share:.0%} of the requests for the tuned model: `palate promote {service.service_name}` "
            f"makes it the current version, `palate rollback {service.service_name}` stops it"
        )
        return service
    reason = "\n".join(filter(None, (str(told.get("reason") or ""), str(told.get("table") or ""))))
    if told["state"] == "cancelled":
        raise ServiceError(failed, reason=f"the update was withdrawn ({reason})")
    if re.search(r"memory|\bOOM\b", reason, re.IGNORECASE):
        reason += (
            "\nThis machine may not hold two versions at once: zero_downtime=False "
            f"(`palate update {service.service_name} JOB --stop-start`) stops the current version first"
        )
    raise ServiceError(failed, reason=reason, log_tail=run.record.last_log_lines(15))


def _completed(service: Predictor, status: Status, update: Update, what: str) -> Predictor:
    from palate.deploy import tell_parity

    service._run.forget_manifest()
    note(f"service {service.service_name} serves {what}, as {version_name(update.body.version)}")
    if update.body.tuned_uri:
        tell_parity(status.details.get("parity"), update.body.checkpoint or "")
    return service


def _withdrawn(service: Predictor, update: Update, reason: str, *, within_s: float) -> bool:
    """Withdraws an update. Returns whether it has ended without its version; False also if that is not known within the time."""
    record = service._run.record
    if change_update(record, update.id, cancelled=True) is None:
        return record.serve_manifest().body.version != update.body.version
    deadline = time.monotonic() + within_s
    while True:
        if service._run.refresh().state in TERMINAL:
            withdraw(record, update, reason=reason)
        pending = open_update(record)
        if pending is None or pending.id != update.id:
            return record.serve_manifest().body.version != update.body.version
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)


def _require_following(service: Predictor) -> None:
    """Raises ServiceError unless the runner of a running service follows updates."""
    deadline = time.monotonic() + FOLLOWED_S
    while True:
        status = service._run.refresh()
        if status.state != "Running" or _live(status):
            return
        if time.monotonic() >= deadline:
            raise ServiceError(
                f"service {service.service_name} cannot be changed while it runs", reason=_cannot_follow(service)
            )
        time.sleep(POLL_S)


def _cannot_follow(service: Predictor) -> str:
    name = service.service_name
    return (
        "its runner cannot reach the store, or an earlier version of Palate started it. zero_downtime=False "
        f"(`palate update {name} JOB --stop-start`) updates it with a stop and a start; `palate stop {name}` and "
        f"`palate start {name}` start it with this version"
    )


def _stop_and_start(
    service: Predictor, body: Deployment, labels: dict[str, str], *, what: str, wait: bool, show_logs: bool
) -> Predictor:
    """Updates a service with a stop and a start, and returns to the previous model if the new one does not start."""
    run, name = service._run, service.service_name
    before = run.record.serve_manifest()
    was_active = run.refresh().state not in TERMINAL
    version = reserve(run.record, body, labels)
    try:
        after = make_current(run.record, before, version)
    except ConfigurationError as error:
        note_outcome(run.record, version, "cancelled", reason=str(error))
        raise
    run.forget_manifest()
    try:
        service.stop_service()
        shown = run.record.last_part("logs")
        service.start_service(wait=False)
        if not wait:
            return service
        return service._wait_until_ready(show_logs=show_logs, show_stages=True, after_log_part=shown)
    except BaseException as error:
        service.stop_service()
        run.replace_manifest(after, before)
        reason = error.reason if isinstance(error, ServiceError) else "it did not answer in time"
        interrupted = isinstance(error, KeyboardInterrupt)
        note_outcome(
            run.record,
            version,
            "cancelled" if interrupted else "failed",
            reason="interrupted" if interrupted else reason,
        )
        if was_active:
            service.start_service(wait=isinstance(error, Exception))
        if interrupted:
            error.add_note(f"service {name} keeps its previous model")
        if isinstance(error, ServiceError | WaitTimeoutError):
            raise ServiceError(
                f"service {name} could not be updated to {what}, and "
                + ("serves its previous model again" if was_active else "is stopped, with its previous model"),
                reason=reason,
                log_tail=error.log_tail if isinstance(error, ServiceError) else [],
            ) from error
        raise


# ── two versions at once ────────────────────────────────────────────────────────────────────────────────────────────


def promote(service: Predictor, *, wait: bool = True) -> Predictor:
    """Makes the new version of an open update the current one. See `Predictor.promote`."""
    run = service._run
    update = _open(service)
    name = version_name(update.body.version)
    check_update(
        run, replace(run.record.serve_manifest(), body=update.body)
    )  # an adapter may have been added meanwhile
    shown = run.record.last_part("logs")
    changed = change_update(run.record, update.id, promote=True)
    if changed is None:
        raise ConfigurationError(f"the update to {name} has ended meanwhile: `palate versions {service.service_name}`")
    if run.refresh().state != "Running":
        note(f"service {service.service_name} is not running: it becomes {name} once that answers after the next start")
        return service
    if not wait:
        return service
    return _follow(service, changed, name, after_log_part=shown, asked=False)


def set_traffic(service: Predictor, shares: Mapping[str, float]) -> None:
    """Sets the shares of the two versions of an open update. See `Predictor.set_traffic`."""
    run = service._run
    update, current = _open(service), version_name(run.record.serve_manifest().body.version)
    name = version_name(update.body.version)
    if update.promote:
        raise in_progress(run.record, update)
    for given, value in shares.items():
        if given not in (current, name):
            raise ConfigurationError(
                f"service {service.service_name} has no version {given!r} that answers: it has {current} and {name}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigurationError(f"the share {value!r} of {given} is out of range: expected 0 to 1")
    if not shares or (abs(sum(shares.values()) - 1) > 1e-6 and len(shares) == 2):
        raise ConfigurationError(
            f"the shares {dict(shares)!r} do not add up to 1: give both, or one, and the other version gets the rest"
        )
    share = float(shares[name]) if name in shares else 1.0 - shares[current]
    if change_update(run.record, update.id, share=share) is None:
        raise ConfigurationError(f"the update to {name} has ended meanwhile: `palate versions {service.service_name}`")

    def applied(status: Status) -> bool:
        if _told(status, update).get("share") != share:
            return False
        return bool(_live(status).get(name, {}).get("share", share) == share)

    _wait_for(service, applied, limit_s=_TAKEN_S, what=f"the share of {name}")


# ── how many engines ────────────────────────────────────────────────────────────────────────────────────────────────


def scale(service: Predictor, instances: int, *, wait: bool = True) -> None:
    """Sets the number of engines. See `Predictor.scale`."""
    check_instances("instances", instances)
    _resize(service, instances, UNSET)
    if wait:
        _wait_for_instances(service, instances, instances)


def autoscale(service: Predictor, least: int, settings: Mapping[str, Any], *, wait: bool = True) -> None:
    """Lets the number of engines follow the requests. See `Predictor.autoscale`."""
    check_instances("min_instances", least)
    autoscaling = check_autoscaling(settings, least=least)
    _resize(service, least, autoscaling)
    if wait:
        _wait_for_instances(service, least, autoscaling.max_instances)


def _resize(service: Predictor, instances: int, autoscaling: Autoscaling | UnsetType) -> None:
    run = service._run
    if run.refresh().state == "Running":
        _require_following(service)
    for _ in range(_CAS_ATTEMPTS):
        known = run.record.serve_manifest()
        body = replace(known.body, instances=instances, autoscaling=autoscaling)
        if body == known.body:
            return
        try:
            run.replace_manifest(known, replace(known, body=body))
        except ConfigurationError:
            continue  # somebody else has changed it, such as the runner that completes an update
        return
    raise ConfigurationError(f"{run.record.uri} was changed by others again and again: try again")


def _wait_for_instances(service: Predictor, least: int, most: int) -> None:
    def reached(status: Status) -> bool:
        told = _live(status).get(version_name(service._run.record.serve_manifest().body.version), {})
        count = told.get("instances")
        asleep = told.get("state") == "ready" and count == 0  # they start with the next request
        return asleep or (isinstance(count, int) and least <= count <= most)

    what = f"{least} instances" if least == most else f"{least} to {most} instances"
    _wait_for(service, reached, limit_s=service.ready_limit_s, what=what)


def check_instances(name: str, instances: object) -> int:
    """Returns a valid number of instances. Raises ConfigurationError."""
    if isinstance(instances, bool) or not isinstance(instances, int) or not 1 <= instances <= INSTANCES_LIMIT:
        raise ConfigurationError(
            f"{name}={instances!r} is out of range: expected a whole number from 1 to {INSTANCES_LIMIT}"
        )
    return instances


def check_autoscaling(settings: Mapping[str, Any], *, least: int) -> Autoscaling:
    """Returns valid settings. Raises ConfigurationError.

    Args:
        settings: Fields of `Autoscaling` as the user gave them; None stands for the default.
        least: The least number of engines.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    fields = Autoscaling.__struct_fields__
    for name in given:
        if name not in fields:
            hint = did_you_mean(name, fields)
            raise ConfigurationError(f"unknown setting of autoscaling {name!r}: {hint}it has: {', '.join(fields)}")
    if "max_instances" not in given:
        raise ConfigurationError("autoscaling needs max_instances, such as 4: the most engines at once")
    check_instances("max_instances", given["max_instances"])
    if given["max_instances"] < least:
        raise ConfigurationError(
            f"max_instances={given['max_instances']} is below the least number of instances, {least}: expected at least {least}"
        )
    try:
        return convert(given, Autoscaling)
    except ValidationError as error:
        text, _, place = str(error).partition(" - at `$.")
        name = place.rstrip("`")
        raise ConfigurationError(f"{name}={given.get(name)!r} is invalid: {text}") from None


def _open(service: Predictor) -> Update:
    update = open_update(service._run.record)
    if update is None or update.cancelled:
        raise ConfigurationError(
            f"service {service.service_name} has no second version: update_service(job, traffic=0.1) "
            f"(`palate update {service.service_name} JOB --traffic 0.1`) starts one"
        )
    return update


def _wait_for(service: Predictor, reached: Callable[[Status], bool], *, limit_s: float, what: str) -> None:
    """Waits until the runner has followed a change. A service that does not run follows with its next start.

    Raises:
        ServiceError: It has not followed in time. The record keeps the change.
    """
    run: RunHandle = service._run
    deadline = time.monotonic() + limit_s
    while True:
        status = run.refresh()
        if status.state != "Running":
            note(f"service {service.service_name} is {status.state}: the change applies when it runs")
            return
        if reached(status):
            return
        if time.monotonic() >= deadline:
            told = _live(status).values()
            reason = next((str(why) for one in told if (why := one.get("reason") or one.get("last_crash"))), "")
            raise ServiceError(
                f"service {service.service_name} has not reached {what} within {limit_s:g} s",
                reason=reason or _cannot_follow(service),
            )
        time.sleep(POLL_S)
