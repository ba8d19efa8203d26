"""A service: a URI with a port, and the clients that speak to it. Knows no engine."""

from __future__ import annotations

import builtins
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import structs

from palate.backends import Backend
from palate.common.utils import check_name
from palate.http import ANSWER_TIMEOUT_S
from palate.runs.handle import RunHandle
from palate.runs.list import RunFilter, find_runs
from palate.runs.record import TOKEN_KEY, Record
from palate.session import Session, get_default_session
from palate.weights import reachable_weights
from palate_recipes.errors import DamagedFilesError, ServiceError, UnsupportedParameterError, WaitTimeoutError
from palate_recipes.specs.run import ServeManifest, State, Status
from palate_recipes.specs.weights import BaseModel

if TYPE_CHECKING:
    import httpx
    from openai import AsyncOpenAI, OpenAI

READY_MARGIN_S = 900.0
"""Staging of model and base on top of the engine's own start: a first download of several GB belongs to it."""

STOP_GRACE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What a service serves.

    Attributes:
        model: The base, as a job's manifest has it.
        tuned_uri: What was trained: an adapter or whole weights; None serves the base alone.
        tuned_digest: SHA-256 of its list of files, which the runner checks them against; None checks nothing.
        adapter: Whether `tuned_uri` is an adapter on top of the base.
        system_prompt: What the model was trained with: `palate chat` begins with it.
        labels: Key-value pairs to find the service by.
    """

    model: BaseModel
    tuned_uri: str | None = None
    tuned_digest: str | None = None
    adapter: bool = False
    system_prompt: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    def facts(self, session: Session, backend: Backend) -> dict[str, Any]:
        """Returns its fields of a `Deployment`, with weights that a run of the backend can reach."""
        source = reachable_weights(self.model.source, session, backend)
        return {
            "model": structs.replace(self.model, source=source),
            "tuned_uri": self.tuned_uri,
            "tuned_digest": self.tuned_digest,
            "adapter": self.adapter,
            "system_prompt": self.system_prompt,
        }

    def instead_of(self, manifest: ServeManifest, run: RunHandle) -> ServeManifest:
        """Returns a service's manifest with its settings and this model, which its run can reach."""
        body = structs.replace(manifest.body, **self.facts(run.session, run.backend))
        return structs.replace(manifest, labels=dict(self.labels), body=body)


class HasModel(Protocol):
    """A job, as `Predictor.update_service` takes it."""

    @property
    def id(self) -> str: ...

    def served_model(self) -> ServedModel: ...


class Predictor:
    """A service in a store; as a context manager it deletes the service at the end.

    Args:
        service_name: Its name.
        endpoint_type: Refused unless `INTERNET`, PAI's default: there is one endpoint.
        serializer: Refused: bodies are JSON.
        session: Default: the default session.

    Raises:
        RunNotFoundError: No service of that name is in the session's store.
    """

    def __init__(
        self,
        service_name: str,
        endpoint_type: str = "INTERNET",
        serializer: object = None,
        session: Session | None = None,
    ) -> None:
        if endpoint_type != "INTERNET":
            raise UnsupportedParameterError(
                f"endpoint_type={endpoint_type!r} has no meaning here: a service has one endpoint"
            )
        if serializer is not None:
            raise UnsupportedParameterError("serializer has no meaning here: predict() and raw_predict() speak JSON")
        check_name("service_name", service_name)
        session = session or get_default_session()
        self._run = RunHandle(Record(session.store, "services", service_name), session)
        with suppress(DamagedFilesError):  # it can still be deleted
            _ = self._run.manifest  # raises when there is none

    @classmethod
    def list(
        cls,
        session: Session | None = None,
        *,
        status: State | None = None,
        name: str = "*",
        model: str = "*",
        labels: Mapping[str, str] | None = None,
        since_s: float | None = None,
    ) -> builtins.list[Predictor]:
        """Returns the services of the session's store, newest first; the arguments are those of `TrainingJob.list`.

        Raises:
            ConfigurationError: An argument that lets nothing through.
            StoreError: The store, or a service of it, cannot be read.
            DamagedFilesError: A service's record is no record.
        """
        states = () if status is None else (status,)
        wanted = RunFilter(states=states, name=name, model=model, labels=labels or {}, since_s=since_s)
        found = find_runs(session or get_default_session(), "services", wanted, status=False).require_all()
        return [cls._of(run.handle) for run in found]

    @classmethod
    def _of(cls, run: RunHandle) -> Predictor:
        predictor = cls.__new__(cls)
        predictor._run = run  # its manifest has been read
        return predictor

    # ── what it is ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def service_name(self) -> str:
        return self._run.record.name

    @property
    def manifest(self) -> ServeManifest:
        return _manifest(self._run)

    @property
    def labels(self) -> dict[str, str]:
        return dict(self._run.manifest.labels)

    @property
    def service_status(self) -> State:
        """Where it stands: Creating, Running, Stopping, Stopped or Failed."""
        return self._run.refresh().state

    @property
    def endpoint(self) -> str:
        """The base URL, without `/v1`.

        Raises:
            ServiceError: It is not running, so it has none.
        """
        status = self._run.refresh()
        if not status.endpoint:
            raise ServiceError(
                f"service {self.service_name} has no endpoint",
                reason=f"it is {status.state}" + (f": {status.reason}" if status.reason else ""),
                log_tail=[*status.log_tail],
            )
        from palate.http import checked_endpoint

        return checked_endpoint(status.endpoint)

    @property
    def access_token(self) -> str:
        """The bearer token; read from the store when asked for, and shown nowhere.

        Raises:
            DamagedFilesError: What is there is no token.
        """
        record = self._run.record
        token = record.store.get(record.key(TOKEN_KEY))
        if not re.fullmatch(rb"[!-~]{1,1000}", token):  # what a header can carry
            raise DamagedFilesError(
                f"{record.uri}/{TOKEN_KEY} is damaged: delete the service (`palate delete {record.name}`), and deploy again"
            )
        return token.decode()

    def describe_service(self) -> dict[str, Any]:
        """Returns what is known of the service, without its token."""
        return describe(self._run, self._run.refresh())

    def logs(self, follow: bool = False) -> Iterator[str]:
        """Yields the log of server and engine; with `follow`, goes on until the service has ended."""
        return self._run.lines(follow=follow)

    # ── asking it ───────────────────────────────────────────────────────────────────────────────────────────────────

    def openai(self, url_suffix: str = "v1", **kwargs: Any) -> OpenAI:
        """Returns an OpenAI client for this service.

        Models: `default` and the service's name answer with the tuned model, `base` with the untuned one.

        The token is sent to nobody else: each new connection begins with a question that only the service can answer.

        Args:
            url_suffix: Path below the endpoint.
            kwargs: For `openai.OpenAI`: timeout (default: 600 s, of a stream for each piece), max_retries and so on.

        Raises:
            ServiceError: The service is not running, does not answer, or another program listens where it did.
        """
        from palate.http import openai_client

        return openai_client(self.endpoint, self.access_token, url_suffix, kwargs)

    def async_openai(self, url_suffix: str = "v1", **kwargs: Any) -> AsyncOpenAI:
        """Returns the asynchronous client; see `openai`."""
        from palate.http import async_openai_client

        return async_openai_client(self.endpoint, self.access_token, url_suffix, kwargs)

    def raw_predict(
        self,
        data: Any = None,
        path: str | None = None,
        headers: dict[str, str] | None = None,
        method: str = "POST",
        timeout: float | None = 60.0,
    ) -> httpx.Response:
        """Sends one request to the service and returns the response, whatever its status.

        Args:
            data: JSON-able object, bytes or str; None sends no body.
            path: Below the endpoint, such as `/v1/models`; default `/v1/chat/completions`.
            headers: On top of the authorisation.
            method: HTTP method.
            timeout: Seconds without a sign of an answer; None waits without end.

        Raises:
            ServiceError: The service is not running, or another program listens where it did; no token was sent.
            httpx.HTTPError: It cannot be reached, or does not answer in time.
        """
        from palate.http import http_client

        endpoint, token = self.endpoint, self.access_token
        url = f"{endpoint}/{(path or '/v1/chat/completions').lstrip('/')}"
        sent = {"Authorization": f"Bearer {token}", **(headers or {})}
        content: dict[str, Any] = {"content" if data is None or isinstance(data, bytes | str) else "json": data}
        with http_client(endpoint, token, timeout_s=timeout) as client:
            return client.request(method, url, headers=sent, **content)

    def predict(self, data: dict[str, Any], timeout: float | None = ANSWER_TIMEOUT_S) -> dict[str, Any]:
        """Sends a chat completion request and returns its JSON; `model` may be left out.

        Args:
            data: The request.
            timeout: Seconds in which the whole answer must come; None waits without end.

        Raises:
            ServiceError: The service answered with an error, or not in time, or cannot be reached.
        """
        import httpx

        what = f"service {self.service_name}"
        try:
            response = self.raw_predict({"model": "default", **data}, timeout=timeout)
        except httpx.TimeoutException as error:
            reason = f"no answer within timeout={timeout:g} s: give it longer, or ask for fewer tokens (max_tokens)"
            raise ServiceError(f"{what} did not answer", reason=f"{reason} ({type(error).__name__})") from error
        except httpx.HTTPError as error:
            raise ServiceError(f"{what} did not answer", reason=f"{type(error).__name__}: {error}") from error
        if response.is_error:
            raise ServiceError(
                f"service {self.service_name} answered {response.status_code}", reason=response.text.strip()
            )
        answer: dict[str, Any] = response.json()
        return answer

    # ── its life ────────────────────────────────────────────────────────────────────────────────────────────────────

    def wait_for_ready(self, timeout_s: float | None = None, *, show_logs: bool = False) -> Predictor:
        """Waits until the service has answered a real request.

        Args:
            timeout_s: Seconds; default: the service's own start timeout plus 900 s for staging its model.

        Raises:
            ServiceError: It failed or was stopped; carries the reason and the engine's last lines.
            WaitTimeoutError: It did not come up in time. It still tries; `stop_service()` ends it.
        """
        if timeout_s is None:
            timeout_s = self.manifest.body.options.get("start_timeout_s", 600.0) + READY_MARGIN_S
        status = self._run.follow(
            until=lambda status: status.state == "Running",
            show_logs=show_logs,
            timeout_s=timeout_s,
            interval_s=0.5,
            what="readiness",
        )
        if status.state != "Running":
            raise self._failure(status)
        return self

    wait = wait_for_ready

    def refresh(self) -> None:
        """Does nothing that the properties do not: they always look. Kept for PAI's scripts."""

    def start_service(self, wait: bool = True) -> None:
        """Starts a stopped or failed service again, with the model and settings it had. Running is no error."""
        status = self._run.refresh()
        self._run.restart(expect={"Stopped", "Failed"}, attempt=status.attempt, more=1, environments={})
        if wait:
            self.wait_for_ready()

    def update_service(self, job: HasModel, *, show_logs: bool = False) -> Predictor:
        """Serves what another job made, under this name, with the token and settings that it has.

        Nothing answers from the end of the old model to the first answer of the new one; `endpoint` may be another afterwards, as
        after `start_service()`. If the new one does not come up, the service goes on with what it served.

        Args:
            job: A succeeded one.
            show_logs: Whether to show the engine's log meanwhile.

        Raises:
            JobNotReadyError: The job has not succeeded; the service is as it was.
            ServiceError: The new model did not come up; carries the reason and the engine's last lines.
            ConfigurationError: Somebody else updates the service at this moment.
        """
        before = self._run.record.serve_manifest()
        after = job.served_model().instead_of(before, self._run)
        was_active = not self._run.refresh().is_terminal
        self._run.replace_manifest(before, after)
        self.stop_service()
        try:
            self.start_service(wait=False)
            return self.wait_for_ready(show_logs=show_logs)
        except BaseException as error:
            self.stop_service()
            self._run.replace_manifest(after, before)
            if was_active:
                self.start_service(wait=isinstance(error, Exception))
            if isinstance(error, ServiceError | WaitTimeoutError):
                raise ServiceError(
                    f"service {self.service_name} could not be updated to job {job.id}, and "
                    + ("serves what it served before" if was_active else "is stopped with what it served before"),
                    reason=error.reason if isinstance(error, ServiceError) else "it did not answer in time",
                    log_tail=error.log_tail if isinstance(error, ServiceError) else [],
                ) from error
            raise

    def stop_service(self, wait: bool = True) -> None:
        """Stops the service and keeps its name and settings.

        Args:
            wait: Whether its port and processes are to be free when this returns; else it is only asked to stop.
        """
        if wait:
            self._run.stop(grace_s=STOP_GRACE_S)
        else:
            self._run.record.advance("Stopping", expect={"Creating", "Running"})

    def delete_service(self) -> None:
        """Stops and removes the service: port, processes and record, which may be damaged. Deleted already is no error."""
        if self._run.record.exists():
            self._run.delete(grace_s=STOP_GRACE_S)

    def switch_version(self, version: int) -> None:
        raise UnsupportedParameterError(
            f"switch_version({version}) has no meaning here: a service has one version; deploy the other job under another name"
        )

    def _failure(self, status: Status) -> ServiceError:
        verb = "was stopped" if status.state == "Stopped" else "failed"
        return ServiceError(f"service {self.service_name} {verb}", reason=status.reason, log_tail=[*status.log_tail])

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.delete_service()

    def __repr__(self) -> str:
        return f"Predictor(service_name={self.service_name!r}, uri={self._run.record.uri!r})"


def _manifest(run: RunHandle) -> ServeManifest:
    manifest = run.manifest
    assert isinstance(manifest, ServeManifest)  # no other is read from a service's record
    return manifest


def describe(run: RunHandle, status: Status) -> dict[str, Any]:
    """Returns what is known of a service, without its token."""
    return {
        "ServiceName": run.record.name,
        "Status": status.state,
        "Reason": status.reason,
        "Endpoint": status.endpoint,
        "Model": run.manifest.model_name,
        "ModelUri": _manifest(run).body.tuned_uri,
        "Labels": dict(run.manifest.labels),
        "Uri": run.record.uri,
        **status.details,
    }
