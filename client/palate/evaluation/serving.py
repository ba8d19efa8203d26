"""Serves the models of an evaluation, together where one engine can, and ends every service that it has started. Knows no judge."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.common.utils import unique_name
from palate.evaluation.arena import Seat, Weights
from palate.evaluation.record import BASE
from palate.generate.chat_client import Endpoint
from palate.generate.completion_log import CompletionLog
from palate.predictor import Predictor, ServedModel
from palate.runs.adapters import read_adapters
from palate.runs.rollout import last_update, open_update
from palate.service_adapters import same_weights
from palate.session import Session
from palate.ui import note
from palate_recipes.errors import ConfigurationError, PalateError, RunNotFoundError
from palate_recipes.specs.serve import BASE_MODEL, TUNED_MODEL

if TYPE_CHECKING:
    from palate.job import TrainingJob

_log = logging.getLogger(__name__)

OF_ANSWERS = ("dtype", "quantization", "kv_cache_dtype", "chat_template", "engine_args")
"""Options of a service that its answers depend on."""

IDLE_TIME_TO_LIVE_S = 3600.0
"""A service that was left behind, because this process was killed, stops after this time without a request."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of an evaluation, as it is served.

    Attributes:
        weights: What the ledger knows of it.
        served: What a service of its own serves.
        job: Its job; None for the base.
    """

    weights: Weights
    served: ServedModel
    job: TrainingJob | None = None

    @property
    def name(self) -> str:
        return self.weights.name

    @property
    def can_be_added(self) -> bool:
        """Whether a service of another job can serve it as a further adapter. A checkpoint has no list of files that it could read."""
        return self.job is not None and self.served.adapter and not self.served.checkpoint


def serve_in_turn(
    models: Sequence[Model], session: Session, options: Mapping[str, Any]
) -> Generator[tuple[Predictor, dict[Weights, Seat]], None, None]:
    """Yields a running service and the models that it serves, until each model was served once. Ends each before the next.

    The first model that is left is deployed, with its base if that is wanted and the engine has it, and the others are added as
    adapters where the engine takes them.

    Close the generator to end its service early (`contextlib.closing`).

    Args:
        models: The models, of one base.
        session: Store and backend of the services.
        options: As in `TrainingJob.deploy`.

    Raises:
        ServiceError: A service did not start. Nothing keeps running.
    """
    left = list(models)
    while left:
        first = next((one for one in left if one.can_be_added), left[0])
        with _service(first, session, options) as predictor:
            seats = {first.weights: _seat(predictor, TUNED_MODEL)}
            left.remove(first)
            base = next((one for one in left if one.name == BASE), None)
            if base is not None and BASE_MODEL in _model_names(predictor):
                seats[base.weights] = _seat(predictor, BASE_MODEL)
                left.remove(base)
            for one in [one for one in left if one.can_be_added and first.can_be_added]:
                assert one.job is not None
                try:
                    predictor.add_adapter(one.name, one.job)
                except (
                    ConfigurationError
                ) as error:  # one adapter only, or a rank that is too high: a service of its own
                    _log.info("%s gets a service of its own: %s", one.name, error)
                    continue
                seats[one.weights] = _seat(predictor, one.name)
                left.remove(one)
            yield predictor, seats


def seats_in(predictor: Predictor, models: Sequence[Model]) -> dict[Weights, Seat]:
    """Returns where a running service serves models. It is not changed.

    Raises:
        ConfigurationError: It does not serve one of them, or two versions share its requests.
        ServiceError: It is not running.
    """
    run, name = predictor._run, predictor.service_name
    if open_update(run.record) is not None:
        raise ConfigurationError(
            f"service {name} is being updated, so two models may answer: `palate promote {name}` or `palate rollback {name}` first"
        )
    run.forget_manifest()
    body = predictor.manifest.body
    there = _model_names(predictor)
    ready = {one.digest: one.name for one in predictor.adapters() if one.state == "ready"}
    seats = {}
    for one in models:
        digest = one.served.tuned_digest
        if one.job is not None and digest and digest == body.tuned_digest:
            seats[one.weights] = _seat(predictor, TUNED_MODEL)
        elif one.job is not None and digest in ready:
            seats[one.weights] = _seat(predictor, ready[digest])
        elif one.name == BASE and same_weights(one.served.model, body.model) and BASE_MODEL in there:
            seats[one.weights] = _seat(predictor, BASE_MODEL)
        elif one.name == BASE and same_weights(one.served.model, body.model) and body.tuned_uri is None:
            seats[one.weights] = _seat(predictor, TUNED_MODEL)
        else:
            remedy = (
                ""
                if one.job is None or not one.can_be_added
                else f" (`palate adapter add {name} NAME {one.job.id}` adds it)"
            )
            raise ConfigurationError(
                f"service {name} does not serve {one.name}{remedy}. It has: {', '.join(sorted(there))}. Omit service= for a "
                "service that is started for the evaluation"
            )
    return seats


@contextmanager
def answering(predictor: Predictor, models: Sequence[Model], ledger: CompletionLog) -> Iterator[dict[Weights, Seat]]:
    """Yields where a running service serves models (see `seats_in`), and records the answers of the block if it still does so.

    The requests name a model, not a version: an update during the block would put another model's answers into the ledger under
    this model's digest. So they are recorded at the end, after its record was compared with that before the first request.

    Raises:
        ConfigurationError: As `seats_in`; or the service was changed meanwhile, and its answers were dropped.
    """
    before = _state(predictor, models)  # before `seats_in`, so that a change in between is seen
    seats = seats_in(predictor, models)
    ledger.hold()
    try:
        yield seats
    except BaseException:
        # Ctrl-C, or a failed call: what has finished is kept, if it counts. The reason of the end stays the one that is raised.
        if changed := _settle(predictor, models, ledger, before):
            note(f"WARNING: {changed}")
        raise
    if changed := _settle(predictor, models, ledger, before):
        raise ConfigurationError(changed)


def _settle(predictor: Predictor, models: Sequence[Model], ledger: CompletionLog, before: list[object]) -> str:
    """Records what the ledger holds, or drops it and returns why."""
    same, why = False, "was changed"
    try:
        same = _state(predictor, models) == before
    except PalateError as error:
        why = f"cannot be read any more ({error})"
    finally:
        dropped = ledger.release(keep=same)
    if same:
        return ""
    name = predictor.service_name
    return (
        f"service {name} {why} while it answered, so another model may have: {dropped} answers are dropped. Repeat the call when no "
        f"update is in progress (`palate versions {name}` and `palate adapter list {name}` show what it serves), or omit service= "
        "(--service) for a service that is started for the evaluation"
    )


def _state(predictor: Predictor, models: Sequence[Model]) -> list[object]:
    """Returns what decides which model answers: the service, its version, the last update, and the models' adapters."""
    run = predictor._run
    run.forget_manifest()
    manifest, update = predictor.manifest, last_update(run.record)
    digests = {one.served.tuned_digest for one in models}
    return [
        (manifest.created_at, manifest.body.version, manifest.body.tuned_digest),
        None if update is None else (update.id, update.ended),
        [(one.name, one.digest, one.added_at) for one in read_adapters(run.record) if one.digest in digests],
    ]


def answer_settings(served: ServedModel, options: Mapping[str, Any]) -> dict[str, str]:
    """Returns what the answers of a service depend on besides its model, as an evaluation keeps it.

    Values are texts, because a store keeps no tuples and no paths; of a chat template it is the digest.

    Args:
        served: The model, which may come with a dtype.
        options: As in `TrainingJob.deploy`, or of a service's manifest.
    """
    from palate.deploy import read_template

    given = served.settings(options)["options"]
    found = {name: given[name] for name in OF_ANSWERS if given.get(name) is not None}
    if isinstance(found.get("chat_template"), str | Path):
        found["chat_template"] = hashlib.sha256(read_template(found["chat_template"]).encode()).hexdigest()[:16]
    if isinstance(found.get("engine_args"), list | tuple):
        found["engine_args"] = " ".join(map(str, found["engine_args"]))
    return {name: str(value) for name, value in found.items() if value not in ("", "auto")}


@contextmanager
def _service(model: Model, session: Session, options: Mapping[str, Any]) -> Iterator[Predictor]:
    """A service of one model, which is deleted at the end, however that comes."""
    from palate.deploy import start_service

    name = unique_name(f"eval-{model.name}")
    settings: dict[str, Any] = {"idle_time_to_live_s": IDLE_TIME_TO_LIVE_S, **options}
    if model.served.dtype:
        settings.setdefault("dtype", model.served.dtype)
    try:
        predictor = start_service(session, service_name=name, served=model.served, options=settings)
        yield predictor
    finally:
        # Also what was interrupted while it started: nobody else has its name.
        _delete(name, session)


def _delete(name: str, session: Session) -> None:
    try:
        Predictor(name, session=session).delete_service()
    except RunNotFoundError:  # it was refused before it had a record
        pass
    except PalateError as error:  # not raised: what ended the evaluation is more important
        note(f"WARNING: service {name} could not be deleted: {error}. `palate delete {name}` deletes it")


def _seat(predictor: Predictor, model: str) -> Seat:
    name = predictor.service_name
    return Seat(
        Endpoint(f"{predictor.endpoint}/v1", predictor.access_token, f"the token of service {name}", is_service=True),
        model,
    )


def _model_names(predictor: Predictor) -> set[str]:
    client = predictor.openai()
    try:
        return {one.id for one in client.models.list().data}
    finally:
        client.close()
