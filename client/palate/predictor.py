"""A service in a store, and the clients that call its endpoint. Knows no engine."""

from __future__ import annotations

import builtins
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import UNSET, structs

from palate import service_adapters
from palate.backends import Backend
from palate.chat import MAX_TOKENS, TEMPERATURE
from palate.common.utils import check_name
from palate.http import ANSWER_TIMEOUT_S
from palate.parameters import reject_unknown_keywords
from palate.runs import access
from palate.runs.handle import RunHandle
from palate.runs.list import RunFilter, find_runs
from palate.runs.record import TOKEN_KEY, Record
from palate.runs.renewal import read_renewal, write_renewal
from palate.service_adapters import ServiceAdapter
from palate.session import Session, get_default_session
from palate.ui import note
from palate.weights import reachable_weights
from palate_recipes.errors import (
    ConfigurationError,
    DamagedFilesError,
    ServiceError,
    UnsupportedParameterError,
)
from palate_recipes.specs.access import OWNER, token_digest
from palate_recipes.specs.run import ServeManifest, State, Status
from palate_recipes.specs.weights import BaseModel

if TYPE_CHECKING:
    import httpx
    from openai import AsyncOpenAI, OpenAI

    from palate.rollout import ServiceVersion
    from palate.web import WebUI

READY_MARGIN_S = 900.0
"""Time for staging model and base before the engine starts, including a first download of several GB."""

STOP_GRACE_S = 30.0

TOKENS_TAKEN_S = 5.0
"""A running service that reaches its store applies a change of its tokens or its time to live within this time."""
_TOKENS_LIMIT_S = 30.0
"""A service that answers, but has not applied a change after this time, counts as unable to."""
_TOKENS_POLL_S = 0.25

_NOTES_OF_THE_RUNNER = ("renewal", "ends_at")
"""Details of the status that a description does not repeat."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The model of a service.

    Attributes:
        model: The base model, as in a job's manifest.
        tuned_uri: The adapter or full weights that were trained; None serves only the base.
        tuned_digest: SHA-256 of the tuned model's digests.json, or of a checkpoint's marker, which the runner checks files against;
            None checks nothing.
        checkpoint: Name of the checkpoint that `tuned_uri` is; "" for the model of a finished job.
        dtype: Data type to serve in if the service's options name none; "" leaves it to the engine.
        adapter: Whether `tuned_uri` is an adapter for the base.
        system_prompt: The system prompt used in training; `palate chat` starts with it.
        labels: Labels of the service, for filters.
    """

    model: BaseModel
    tuned_uri: str | None = None
    tuned_digest: str | None = None
    checkpoint: str = ""
    dtype: str = ""
    adapter: bool = False
    system_prompt: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    def facts(self, session: Session, backend: Backend) -> dict[str, Any]:
        """Returns its fields for a `Deployment`, with weights that the backend's run can reach."""
        source = reachable_weights(self.model.source, session, backend)
        return {
            "model": structs.replace(self.model, source=source),
            "tuned_uri": self.tuned_uri,
            "tuned_digest": self.tuned_digest,
            "checkpoint": self.checkpoint or UNSET,
            "adapter": self.adapter,
            "system_prompt": self.system_prompt,
        }

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of a `Deployment` for a user's options, with the model's dtype if they have none."""
        if not self.dtype or "dtype" in options:
            return {"options": dict(options), "model_dtype": UNSET}
        return {"options": {**options, "dtype": self.dtype}, "model_dtype": self.dtype}

    def options_instead_of(self, manifest: ServeManifest) -> dict[str, Any]:
        """Returns the options of a service that its user gave. What came with the model that is replaced, goes with it."""
        body = manifest.body
        return {name: value for name, value in body.options.items() if name != "dtype" or body.model_dtype is UNSET}

    def instead_of(self, manifest: ServeManifest, run: RunHandle) -> ServeManifest:
        """Returns a service's manifest with the same settings and this model."""
        own = self.options_instead_of(manifest)
        body = structs.replace(manifest.body, **self.settings(own), **self.facts(run.session, run.backend))
        return structs.replace(manifest, labels=dict(self.labels), body=body)


@dataclass(frozen=True, kw_only=True)
class ServiceToken:
    """A token of a service, without its value.

    Attributes:
        name: Its name; `default` is the owner's.
        created_at: Seconds since the epoch.
        rate_per_minute: Maximum number of requests within 60 seconds; None: no limit.
        concurrency: Maximum number of open requests; None: no limit.
    """

    name: str
    created_at: float
    rate_per_minute: int | None = None
    concurrency: int | None = None


class HasModel(Protocol):
    """A job, as `Predictor.update_service` takes it."""

    @property
    def id(self) -> str: ...

    def served_model(self, checkpoint: str | int | None = None) -> ServedModel: ...


@reject_unknown_keywords
class Predictor:
    """A service in a store. As a context manager it deletes the service at the end.

    Args:
        service_name: Name of the service.
        endpoint_type: Must be `INTERNET`, PAI's default: a service has one endpoint.
        serializer: Must be None: bodies are JSON.
        session: Default: the default session.

    Raises:
        RunNotFoundError: No service in the session's store has this name.
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
                f"endpoint_type={endpoint_type!r} is not supported: a service has one endpoint; omit endpoint_type"
            )
        if serializer is not None:
            raise UnsupportedParameterError(
                "serializer is not supported: predict() and raw_predict() use JSON; omit it"
            )
        check_name("service_name", service_name)
        session = session or get_default_session()
        self._run = RunHandle(Record(session.store, "services", service_name), session)
        with suppress(DamagedFilesError):  # a damaged service can still be deleted
            _ = self._run.manifest  # raises if there is no such service

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
        """Returns the services of the session's store, newest first. See `TrainingJob.list` for the arguments.

        Raises:
            ConfigurationError: An argument is invalid or matches nothing.
            StoreError: The store or a service in it cannot be read.
            DamagedFilesError: A service's record is damaged.
        """
        states = () if status is None else (status,)
        wanted = RunFilter(states=states, name=name, model=model, labels=labels or {}, since_s=since_s)
        found = find_runs(session or get_default_session(), "services", wanted, status=False).require_all()
        return [cls._of(run.handle) for run in found]

    @classmethod
    def _of(cls, run: RunHandle) -> Predictor:
        predictor = cls.__new__(cls)
        predictor._run = run  # with its manifest, so that it is not read again
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
        """The current state: Creating, Running, Stopping, Stopped or Failed."""
        return self._run.refresh().state

    @property
    def endpoint(self) -> str:
        """The base URL, without `/v1`.

        Raises:
            ServiceError: The service is not running.
        """
        status = self._run.refresh()
        if not status.endpoint:
            remedy = {
                "Creating": f"wait for it (`palate logs -f {self.service_name}` shows its log)",
                "Stopping": f"start it again once it is stopped (`palate start {self.service_name}`)",
            }.get(status.state, f"start it again (`palate start {self.service_name}`)")
            raise ServiceError(
                f"service {self.service_name} has no endpoint",
                reason=f"it is {status.state}{f' ({status.reason})' if status.reason else ''}: {remedy}",
                log_tail=[*status.log_tail],
            )
        from palate.http import checked_endpoint

        return checked_endpoint(status.endpoint)

    @property
    def access_token(self) -> str:
        """The owner's bearer token, read from the store on each access.

        Raises:
            DamagedFilesError: The stored token is not valid.
        """
        return access.owner_token(self._run.record)

    def describe_service(self) -> dict[str, Any]:
        """Returns the service's description, without its token."""
        self._run.forget_manifest()  # the runner replaces it when an update is complete
        return describe(self._run, self._run.refresh())

    def logs(self, follow: bool = False) -> Iterator[str]:
        """Yields the log lines of server and engine. With `follow`, continues until the service has ended."""
        return self._run.lines(follow=follow)

    # ── asking it ───────────────────────────────────────────────────────────────────────────────────────────────────

    def openai(self, url_suffix: str = "v1", **kwargs: Any) -> OpenAI:
        """Returns an OpenAI client for this service.

        Models: `default` and the service's name are the tuned model, `base` is the base model.

        The token is sent only to the service: each new connection starts with a challenge that only the service can answer.

        Args:
            url_suffix: Path below the endpoint.
            kwargs: Passed to `openai.OpenAI`: timeout (default: 600 s, in a stream per chunk), max_retries and so on.

        Raises:
            ServiceError: The service is not running, does not answer, or another program uses its port.
        """
        from palate.http import openai_client

        return openai_client(self.endpoint, self.access_token, url_suffix, kwargs)

    def async_openai(self, url_suffix: str = "v1", **kwargs: Any) -> AsyncOpenAI:
        """Returns the asynchronous client. See `openai`."""
        from palate.http import async_openai_client

        return async_openai_client(self.endpoint, self.access_token, url_suffix, kwargs)

    def webui(
        self,
        *,
        votes: str | Path | None = None,
        port: int = 0,
        models: Sequence[str] = (),
        system: str | None = None,
        max_tokens: int = MAX_TOKENS,
        temperature: float = TEMPERATURE,
    ) -> WebUI:
        """Serves a page on this machine: chat with the models side by side, and blind votes, which become training data.

            with predictor.webui() as page:
                print(page.url)
                page.wait()

        The page runs in threads of this process and asks the service with its token, which no browser sees. It ends with `close()`
        or with the process.

        Args:
            votes: File for the pairs, as JSON lines; ties are written next to it. Default: `votes/SERVICE.jsonl` in PALATE_HOME.
            port: Port on 127.0.0.1; 0 takes a free one.
            models: Models that are selected at first. Default: the tuned model and the base.
            system: System prompt at first. Default: the one used in training.
            max_tokens: Maximum tokens of an answer, at first.
            temperature: Sampling temperature, at first.

        Raises:
            ServiceError: The service is not running, or does not answer.
            ConfigurationError: The port is in use, a model is unknown, or the file of votes cannot be used.
        """
        from palate.web import WebUI

        return WebUI(
            self,
            votes=votes,
            port=port,
            models=list(models),
            defaults={
                "system": self.manifest.body.system_prompt if system is None else system,
                "max_tokens": max_tokens,
                "temperature": temperature,
            },
        )

    def raw_predict(
        self,
        data: Any = None,
        path: str | None = None,
        headers: dict[str, str] | None = None,
        method: str = "POST",
        timeout: float | None = 60.0,
    ) -> httpx.Response:
        """Sends one request to the service and returns the response, also for error statuses.

        Args:
            data: JSON-serializable object, bytes or str; None sends no body.
            path: Path below the endpoint, such as `/v1/models`; default `/v1/chat/completions`.
            headers: Headers in addition to the authorization.
            method: HTTP method.
            timeout: Seconds without receiving data; None: no limit.

        Raises:
            ServiceError: The service is not running, or another program uses its port. No token was sent.
            httpx.HTTPError: The service cannot be reached, or does not answer in time.
        """
        from palate.http import http_client

        endpoint, token = self.endpoint, self.access_token
        url = f"{endpoint}/{(path or '/v1/chat/completions').lstrip('/')}"
        sent = {"Authorization": f"Bearer {token}", **(headers or {})}
        content: dict[str, Any] = {"content" if data is None or isinstance(data, bytes | str) else "json": data}
        with http_client(endpoint, token, timeout_s=timeout) as client:
            return client.request(method, url, headers=sent, **content)

    def predict(self, data: dict[str, Any], timeout: float | None = ANSWER_TIMEOUT_S) -> dict[str, Any]:
        """Sends a chat completion request and returns the answer's JSON.

        Args:
            data: The request; `model` defaults to `default`.
            timeout: Time limit for the full answer in seconds; None: no limit.

        Raises:
            ConfigurationError: `data` is not a request.
            ServiceError: The service answered with an error, did not answer in time, or cannot be reached.
        """
        import httpx

        if not isinstance(data, Mapping):
            raise ConfigurationError(
                f'data is {type(data).__name__}, not a request: give {{"messages": [{{"role": "user", "content": "…"}}]}}'
            )
        what = f"service {self.service_name}"
        try:
            response = self.raw_predict({"model": "default", **data}, timeout=timeout)
        except httpx.TimeoutException as error:
            reason = (
                f"no answer within timeout={timeout:g} s: set a higher timeout, or request fewer tokens (max_tokens)"
            )
            raise ServiceError(f"{what} did not answer", reason=f"{reason} ({type(error).__name__})") from error
        except httpx.HTTPError as error:
            raise ServiceError(f"{what} did not answer", reason=f"{type(error).__name__}: {error}") from error
        if response.is_error:
            raise ServiceError(
                f"service {self.service_name} answered {response.status_code}", reason=response.text.strip()
            )
        answer: dict[str, Any] = response.json()
        return answer

    # ── who may ask it ──────────────────────────────────────────────────────────────────────────────────────────────

    def tokens(self) -> builtins.list[ServiceToken]:
        """Returns the service's tokens without their values, the owner's first.

        Raises:
            DamagedFilesError: The stored tokens are not valid.
        """
        record = self._run.record
        owner = token_digest(self.access_token.encode())
        stored = record.store.stat(record.key(TOKEN_KEY))
        created_at = stored.modified_s if stored else 0.0
        named = []
        for token in access.read_access(record).tokens:
            if token.name != OWNER:
                facts = {"rate_per_minute": token.rate_per_minute, "concurrency": token.concurrency}
                named.append(ServiceToken(name=token.name, created_at=token.created_at, **facts))
            elif token.digest == owner:
                created_at = token.created_at
        return [ServiceToken(name=OWNER, created_at=created_at), *named]

    def add_token(self, name: str, rate_per_minute: int | None = None, concurrency: int | None = None) -> str:
        """Adds a token and returns its value. The value is not stored, so it cannot be read again.

        When this returns, a running service accepts the token. The token stays valid over stop, start and update.

        Args:
            name: Who or what uses it.
            rate_per_minute: Maximum number of requests within any 60 seconds; None: no limit.
            concurrency: Maximum number of open requests; None: no limit.

        Raises:
            ConfigurationError: The name or a limit is invalid, the name is taken, or there are 64 named tokens.
        """
        record = self._run.record
        value, token = access.add(record, name, rate_per_minute=rate_per_minute, concurrency=concurrency)
        if not self._has_followed(token.digest, accepts=True):
            note(f"WARNING: the token was added, but {self._cannot_follow}")
        return value

    def remove_token(self, name: str) -> None:
        """Removes a token. When this returns, a running service rejects it. Requests already accepted are still answered.

        Raises:
            ConfigurationError: No token has this name, or it is the owner's.
            ServiceError: The running service still accepts the token, which is no longer in the record.
        """
        token = access.remove(self._run.record, name)
        if not self._has_followed(token.digest, accepts=False):
            raise ServiceError(f"token {name} was removed from the record", reason=self._cannot_follow)

    def rotate_token(self, name: str = OWNER) -> str:
        """Replaces a token's value and returns the new one. The limits stay. The old value is rejected, as after `remove_token`.

        Clients that use the old value of the owner's token get a 401; `openai()` returns a client with the new one.

        Args:
            name: Default: the owner's token, which `access_token` returns and Palate's own clients read.

        Raises:
            ConfigurationError: No token has this name.
            ServiceError: The running service has not applied the change. The owner's token is unchanged.
        """
        record = self._run.record
        before = access.owner_token(record)
        value, token = access.replace(record, name)
        followed = self._has_followed(token.digest, accepts=True)
        if name != OWNER:
            if not followed:
                note(f"WARNING: token {name} was replaced in the record, but {self._cannot_follow}")
            return value
        if not followed:
            raise ServiceError(f"the token of service {record.name} was not replaced", reason=self._cannot_follow)
        # Only now: a client that reads the new token asks the service to prove that it knows it.
        access.write_owner_token(record, value)
        if not self._has_followed(before, accepts=False):
            raise ServiceError(f"the token of service {record.name} was replaced", reason=self._cannot_follow)
        return value

    @property
    def _cannot_follow(self) -> str:
        return (
            f"the running service has not followed within {_TOKENS_LIMIT_S:g} s: its runner cannot reach the store, or an earlier "
            f"version of Palate started it. `palate stop {self.service_name}` and `palate start {self.service_name}` apply the change"
        )

    def _has_followed(self, key: str, *, accepts: bool) -> bool:
        """Waits until the running service accepts or refuses a token.

        Args:
            key: The token's digest; for the owner's token, its value.
            accepts: What to wait for.

        Returns:
            False if the service answers and has not followed in time. If it cannot be asked from here, waits as long as a change
            takes, and returns True.
        """
        from palate.http import knows_token

        begun = time.monotonic()
        while True:
            status = self._run.refresh()
            if status.state != "Running" or not status.endpoint:
                return True  # the next start reads the record
            try:
                known = knows_token(self.endpoint, key)
            except (OSError, ServiceError):
                known = None
            if known is accepts:
                return True
            waited_s = time.monotonic() - begun
            if waited_s >= (TOKENS_TAKEN_S if known is None else _TOKENS_LIMIT_S):
                return known is None
            time.sleep(_TOKENS_POLL_S)

    # ── more tuned models on its base ───────────────────────────────────────────────────────────────────────────────

    def adapters(self) -> builtins.list[ServiceAdapter]:
        """Returns the adapters that were added to the service, with their state, in the order in which they were added.

        Raises:
            DamagedFilesError: The record's list is damaged.
        """
        return service_adapters.listed(self._run)

    def add_adapter(
        self, name: str, job_or_uri: HasModel | str | Path, *, replace: bool = False, wait: bool = True
    ) -> None:
        """Adds another job's adapter to the service, under its own model name. It runs on the base model that is already loaded.

        A running service loads it while it answers requests; a stopped one loads it at its next start. Each start verifies all
        files by SHA-256. The adapter stays over stop, start and update, until `remove_adapter`.

        Args:
            name: The model name in requests.
            job_or_uri: A succeeded job or its id; or a model folder with digests.json: `job.model_uri`, or a copy made by
                `job.save_model()`. A folder outside the service's store is copied into it.
            replace: Replace an adapter with the same name. The old one answers until the new one is ready.
            wait: Wait until the running service answers with it.

        Raises:
            ConfigurationError: The name is taken or reserved, the job trained full weights or another base, the service has no base
                (full weights) or its engine serves one adapter only (transformers), the rank is too high for the running engine, or
                an update to another base is in progress.
            UnservableError: vLLM cannot serve the adapter.
            JobNotReadyError: The job has not succeeded.
            DataError: The folder has no adapter, or no digests.json.
            DamagedFilesError: A file is missing or changed.
            ServiceError: The service could not load it. The record is as before.
            WaitTimeoutError: It was not loaded within 5 minutes. The record is as before.
        """
        service_adapters.add(self._run, name, job_or_uri, replace=replace, wait=wait)

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter. Requests already accepted are still answered; later ones get a 404.

        Raises:
            ConfigurationError: No adapter has this name.
            ServiceError: The running service still has the adapter, which is no longer in the record.
        """
        service_adapters.remove(self._run, name)

    # ── its life ────────────────────────────────────────────────────────────────────────────────────────────────────

    def renew(self, time_to_live_s: float | None) -> None:
        """Sets a new time to live: the service stops this many seconds from now.

        When this returns, a running service has applied it, and `describe_service()["EndsAt"]` is the new end. Otherwise the time
        counts from the first answer after the next start. All later starts use the new time to live too, counted from their first
        answer. An update of a running service does not restart the count.

        Args:
            time_to_live_s: Seconds; None removes the limit.

        Raises:
            ConfigurationError: The time is out of range.
            ServiceError: The running service has not applied it, or has stopped in the meantime. Its next start applies it.
        """
        record = self._run.record
        write_renewal(record, time_to_live_s)
        was_running, begun = False, time.monotonic()
        while (status := self._run.refresh()).state == "Running":
            was_running = True
            current = read_renewal(record)  # a later renewal replaces this one, and the runner may have seen only that
            if current is None or status.details.get("renewal") == current.id:
                return
            if time.monotonic() - begun >= _TOKENS_LIMIT_S:
                raise ServiceError(f"service {record.name} was renewed in its record", reason=self._cannot_follow)
            time.sleep(_TOKENS_POLL_S)
        if was_running:
            raise ServiceError(
                f"service {record.name} was not renewed in time",
                reason=f"it is {status.state}{f' ({status.reason})' if status.reason else ''}: `palate start {record.name}` starts it "
                "with the new time to live",
            )

    def wait_for_ready(
        self, timeout_s: float | None = None, *, show_logs: bool = False, show_stages: bool = False
    ) -> Predictor:
        """Waits until the service has answered a real request.

        Args:
            timeout_s: Default: the service's start_timeout_s plus 900 s for staging its model.
            show_logs: Show the engine's log while waiting.
            show_stages: If not, show the steps of the start with their time. Both go to stderr.

        Raises:
            ServiceError: It failed or was stopped. Has the reason and the last lines of the engine's log.
            WaitTimeoutError: It is not ready in time. It keeps starting; `stop_service()` stops it.
        """
        try:
            return self._wait_until_ready(timeout_s, show_logs=show_logs, show_stages=show_stages)
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(self._keeps_starting)
            raise

    @property
    def _keeps_starting(self) -> str:
        name = self.service_name
        return f"service {name} keeps starting: `palate services` shows it, `palate stop {name}` stops it"

    def _wait_until_ready(
        self,
        timeout_s: float | None = None,
        *,
        show_logs: bool = False,
        show_stages: bool = False,
        after_log_part: int = 0,
    ) -> Predictor:
        if timeout_s is None:
            timeout_s = self.ready_limit_s
        status = self._run.follow(
            until=lambda status: status.state == "Running",
            show_logs=show_logs,
            timeout_s=timeout_s,
            interval_s=0.5,
            what="readiness",
            stages=show_stages,
            after_log_part=after_log_part,
        )
        if status.state != "Running":
            raise self._failure(status)
        return self

    @property
    def ready_limit_s(self) -> float:
        """Seconds that a version may take to be ready: its start_timeout_s, and time for staging its model."""
        return float(self.manifest.body.options.get("start_timeout_s", 600.0)) + READY_MARGIN_S

    wait = wait_for_ready

    def refresh(self) -> None:
        """Does nothing, because the properties always read the current state. Kept for PAI's scripts."""

    def start_service(self, wait: bool = True) -> None:
        """Starts a stopped or failed service again with its model and settings, on the same port. Does nothing if it is running.

        If another program uses the port by now, the service takes a free one. If the port was given to `deploy()`, the start fails.
        """
        status = self._run.refresh()
        shown = self._run.record.last_part("logs")  # the new start continues the log
        self._run.restart(expect={"Stopped", "Failed"}, attempt=status.attempt, more=1, environments={})
        if not wait:
            return
        try:
            self._wait_until_ready(show_stages=True, after_log_part=shown)
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(self._keeps_starting)
            raise

    def update_service(
        self,
        job: HasModel,
        *,
        checkpoint: str | int | None = None,
        wait: bool = True,
        traffic: float | None = None,
        zero_downtime: bool = True,
        show_logs: bool = False,
        require_win_rate: float | None = None,
    ) -> Predictor:
        """Updates the service to another job's model or checkpoint. Name, token and settings stay.

        The service answers during the update: the new version starts while the current one runs, is compared with its trained model,
        and then replaces it. If it does not start, or its answers differ from the trained model's, the service is unchanged. A
        stopped service is started with the new model. If the service already serves this model, nothing happens.

        Args:
            job: A succeeded job; with `checkpoint`, a job in any state.
            checkpoint: `latest`, a step or a name, as in `TrainingJob.deploy`. None: the model of the succeeded job.
            wait: Wait until the new version answers. Ctrl-C cancels the update.
            traffic: Share of the requests for the tuned model that the new version answers, 0 < traffic <= 1. Both versions then
                answer until `promote()` or `rollback()`. None: the new version replaces the current one.
            zero_downtime: False stops the current version before the new one starts, for machines without memory for both. If the
                new one does not start, the service returns to the previous model.
            show_logs: Show the engine's log while waiting.
            require_win_rate: Update only if the last evaluation of exactly this model against the one that the service serves has
                a win-rate whose 95% interval begins at this value or above, such as 0.55.

        Raises:
            JobNotReadyError: The job has not succeeded or, with `checkpoint`, has no complete checkpoint. The service is unchanged.
            WinRateError: There is no such evaluation, its interval begins lower, it has fewer than 20 prompts, or more than 5% of
                them failed. The service is unchanged.
            ServiceError: The new version did not start, or is not what was trained. Has the reason and the last lines of the
                engine's log.
            ConfigurationError: Another update is in progress; the service has adapters and the job has another base; or the service
                runs in a container that cannot see the folder of the new model.
        """
        from palate.rollout import update_to_job

        served = job.served_model(checkpoint=checkpoint)
        if require_win_rate is not None:
            from palate.evaluation.gate import check_win_rate

            check_win_rate(job, served, require_win_rate, instead_of=self._run.record.serve_manifest())
        return update_to_job(
            self,
            served,
            job.id,
            wait=wait,
            traffic=traffic,
            zero_downtime=zero_downtime,
            show_logs=show_logs,
        )

    def versions(self) -> builtins.list[ServiceVersion]:
        """Returns the service's versions, oldest first: earlier ones, the current one, and that of an update in progress.

        Raises:
            DamagedFilesError: A record of a version cannot be read.
        """
        from palate.rollout import list_versions

        return list_versions(self)

    def promote(self, wait: bool = True) -> Predictor:
        """Completes `update_service(job, traffic=...)`: the new version gets all requests. The old one finishes its own and ends.

        Raises:
            ConfigurationError: There is no second version.
            ServiceError: The new version failed. The service keeps its previous model.
        """
        from palate.rollout import promote

        return promote(self, wait=wait)

    def rollback(self, wait: bool = True, *, zero_downtime: bool = True) -> Predictor:
        """Cancels the update in progress. If there is none, returns to the previous version.

        A second rollback returns to where you were; `switch_version()` goes further back.

        Args:
            wait: Wait until the previous version answers, or the cancelled one has ended.
            zero_downtime: As in `update_service`.

        Raises:
            ConfigurationError: There is no earlier version.
            ServiceError: The earlier version did not start.
        """
        from palate.rollout import rollback

        return rollback(self, wait=wait, zero_downtime=zero_downtime)

    def switch_version(self, version: int) -> None:
        """Returns to a version of the service's history, which gets a new number. `versions()` lists them.

        Raises:
            ConfigurationError: There is no such version, or another update is in progress.
            ServiceError: It did not start.
        """
        from palate.rollout import update_to_version

        update_to_version(self, version)

    def set_traffic(self, shares: Mapping[str, float]) -> None:
        """Splits the requests for the tuned model between two versions. It has taken effect when this returns.

        Args:
            shares: By name of the version, such as `{"v1": 0.9, "v2": 0.1}`. With one of them, the other gets the rest.

        Raises:
            ConfigurationError: There is no second version, or the shares are invalid.
            ServiceError: The running service has not applied the change.
        """
        from palate.rollout import set_traffic

        set_traffic(self, shares)

    def scale(self, instances: int, wait: bool = True) -> None:
        """Sets the number of engines, and ends `autoscale`. An engine that is stopped completes its open requests first.

        Args:
            instances: 1 to 64. Each has its own copy of the model in memory.
            wait: Wait until that many engines answer.

        Raises:
            ConfigurationError: `instances` is out of range.
            ServiceError: The running service did not reach that number in time.
        """
        from palate.rollout import scale

        scale(self, instances, wait=wait)

    def autoscale(
        self,
        max_instances: int,
        min_instances: int = 1,
        target_requests: float | None = None,
        *,
        upscale_delay_s: float | None = None,
        downscale_delay_s: float | None = None,
        wait: bool = True,
    ) -> None:
        """Lets the number of engines follow the open requests, between two bounds. `scale` ends it.

        `sleep_after_s` of `deploy()` ends all engines of an unused service, also with bounds.

        Args:
            max_instances: The most engines, up to 64. Memory for so many must be there: each has its own copy of the model.
            min_instances: The least.
            target_requests: Open requests, waiting ones included, for which there should be one engine; None: 32 on a GPU, 4 on a
                processor.
            upscale_delay_s: Engines are added when the average of so many seconds needs more; None: 10.
            downscale_delay_s: Engines are ended when fewer were needed during all of so many seconds; None: 300.
            wait: Wait until their number is within the bounds.

        Raises:
            ConfigurationError: A value is out of range.
            ServiceError: The running service has not reached the bounds in time.
        """
        from palate.rollout import autoscale

        settings = {
            "max_instances": max_instances,
            "target_requests": target_requests,
            "upscale_delay_s": upscale_delay_s,
            "downscale_delay_s": downscale_delay_s,
        }
        autoscale(self, min_instances, settings, wait=wait)

    def stop_service(self, wait: bool = True) -> None:
        """Stops the service. Its name and settings stay.

        Args:
            wait: Wait until its port is free and its processes have ended. False only requests the stop.
        """
        if wait:
            self._run.stop(grace_s=STOP_GRACE_S)
        else:
            self._run.record.advance("Stopping", expect={"Creating", "Running"})

    def delete_service(self) -> None:
        """Stops the service and deletes its record, also a damaged one. Idempotent."""
        if self._run.record.exists():
            self._run.delete(grace_s=STOP_GRACE_S)

    def _failure(self, status: Status) -> ServiceError:
        verb = "was stopped" if status.state == "Stopped" else "failed"
        return ServiceError(f"service {self.service_name} {verb}", reason=status.reason, log_tail=[*status.log_tail])

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.delete_service()

    def _repr_html_(self) -> str:
        """The service in a notebook, without its token."""
        from palate_recipes.text import html_block, html_table

        told = self.describe_service()
        names = ("Status", "Reason", "Endpoint", "Model", "ModelUri")
        facts = [(name, told[name]) for name in names if told.get(name)]
        return html_block(html_table([("service", self.service_name), *facts]))

    def __repr__(self) -> str:
        return f"Predictor(service_name={self.service_name!r}, uri={self._run.record.uri!r})"


def _manifest(run: RunHandle) -> ServeManifest:
    manifest = run.manifest
    assert isinstance(manifest, ServeManifest)  # no other is read from a service's record
    return manifest


def describe(run: RunHandle, status: Status) -> dict[str, Any]:
    """Returns a service's description, without its token."""
    return {
        "ServiceName": run.record.name,
        "Status": status.state,
        "Reason": status.reason,
        "Endpoint": status.endpoint,
        "Model": run.manifest.model_name,
        "ModelUri": _manifest(run).body.tuned_uri,
        "Labels": dict(run.manifest.labels),
        "Uri": run.record.uri,
        "EndsAt": ends_at(status),
        **{name: value for name, value in status.details.items() if name not in _NOTES_OF_THE_RUNNER},
    }


def ends_at(status: Status) -> float | None:
    """Returns when a running service's time to live is over, in seconds since the epoch by its machine's clock; None: no limit."""
    value = status.details.get("ends_at")
    return value if status.state == "Running" and isinstance(value, float) else None
