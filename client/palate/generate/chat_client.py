"""Sends chat completions to OpenAI-compatible endpoints: concurrent, rate limited, with retries. Knows calls, no pairs.

A call in the ledger is not sent. Transient failures (no connection, 408, 409, 429, 5xx, an unreadable body) are retried with
exponential backoff and jitter, or after the time in Retry-After; all other errors are final.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
import time
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from palate.generate.completion_log import CompletionLog, Reply
from palate_recipes.errors import ConfigurationError, EndpointError, PalateError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from palate.session import Session


NO_KEY = "none"
"""Sent if no key is known: servers without authentication accept any key."""

OPENAI_URL = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Endpoint:
    """An endpoint for chat completions.

    Args:
        base_url: Includes the path, such as `http://127.0.0.1:8000/v1`; no user name and no query, which may be secrets.
        api_key: Sent as bearer token; never in a repr, error or file.
        key_source: Origin of the key, for error messages.
        identity: Identifies the endpoint in the ledger; default: the base URL. A service has its own, because a restart
            changes its port.
        is_service: Whether it is a Palate service, which must prove that it knows the key before the key is sent.

    Raises:
        ConfigurationError: The URL is invalid.
    """

    base_url: str
    api_key: str = field(default=NO_KEY, repr=False)
    key_source: str = "no key"
    identity: str = ""
    is_service: bool = False

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if "@" in parts.netloc or parts.query:
            raise ConfigurationError(
                f"the base URL of {parts.hostname} contains a user name or a query, which would appear in messages: "
                "pass only the URL, and the key in an environment variable (--api-key-env)"
            )
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ConfigurationError(
                f"base URL {self.base_url!r} must be an http:// or https:// URL, such as {OPENAI_URL}"
            )
        object.__setattr__(self, "base_url", self.base_url.rstrip("/"))
        object.__setattr__(self, "identity", self.identity or self.base_url)

    @classmethod
    def from_environment(cls, base_url: str | None = None, api_key_env: str | None = None) -> Endpoint:
        """Returns the endpoint that the OpenAI client would use.

        Args:
            base_url: Default: OPENAI_BASE_URL, else OpenAI's endpoint.
            api_key_env: Environment variable with the key; must be set. Default: OPENAI_API_KEY, if set.

        Raises:
            ConfigurationError: No endpoint is configured, or the variable `api_key_env` is not set.
        """
        url = base_url or os.environ.get("OPENAI_BASE_URL") or ""
        name = api_key_env or "OPENAI_API_KEY"
        key = os.environ.get(name, "").strip()
        if api_key_env and not key:
            raise ConfigurationError(f"environment variable {api_key_env} is not set: set it to the API key")
        if not url and not key:
            raise ConfigurationError(
                "no endpoint is configured: pass --service NAME or --base-url URL, or set OPENAI_BASE_URL or OPENAI_API_KEY"
            )
        return cls(url or OPENAI_URL, key or NO_KEY, f"environment variable {name}" + ("" if key else " (not set)"))

    @classmethod
    def other(cls, base_url: str, api_key_env: str | None = None) -> Endpoint:
        """Returns an endpoint without a default key: OPENAI_API_KEY may be meant for another server.

        Raises:
            ConfigurationError: The variable `api_key_env` is not set.
        """
        if api_key_env:
            return cls.from_environment(base_url, api_key_env)
        return cls(base_url, key_source="none; --judge-api-key-env VARIABLE passes one")

    @classmethod
    def of_service(cls, name: str, session: Session | None = None) -> Endpoint:
        """Returns the endpoint of a running Palate service.

        Raises:
            RunNotFoundError: No service has this name.
            ServiceError: The service is not running.
        """
        from msgspec import to_builtins

        from palate.predictor import Predictor

        predictor = Predictor(name, session=session)
        body = predictor.manifest.body
        weights = json.dumps([to_builtins(body.model), body.tuned_uri], sort_keys=True)
        return cls(
            f"{predictor.endpoint}/v1",
            predictor.access_token,
            f"the token of service {name}",
            identity=f"service:{hashlib.sha256(weights.encode()).hexdigest()[:32]}",
            is_service=True,
        )

    def without_key(self, text: str) -> str:
        """Returns `text`, such as a server's message, with the key masked."""
        return text if self.api_key == NO_KEY else text.replace(self.api_key, "***")


_log = logging.getLogger(__name__)

_AGAIN = {408, 409, 429}
_OF_THIS_CALL = {400, 413, 422}
"""Can be caused by a single prompt (too long, rejected), if the same model has answered others."""

_LONGEST_WAIT_S = 30.0
_LONGEST_RETRY_AFTER_S = 900.0
_GIVEN_UP_IN_A_ROW = 10
"""Consecutive failed calls before an endpoint that still lists its models counts as failed: the calls are not the cause."""

_ALIVE_S = 10.0
_LIMITED_TIMES = 5
"""Factor on the number of retries when the endpoint is only busy (429)."""


class Call(NamedTuple):
    """One chat completion request, with everything that its response depends on."""

    endpoint: Endpoint
    model: str
    messages: list[dict[str, str]]
    temperature: float
    max_tokens: int
    sample: int = 0
    """Index among several samples of the same request."""
    temperature_may_be_dropped: bool = False
    """Whether to send no temperature to a model that does not support it."""
    about: str = ""
    """Its purpose, for error messages."""
    as_model: str = ""
    """Name of the model in the key; default: `model`. For weights that other services serve under other names."""

    def key(self) -> str:
        """Returns a digest of the inputs of the call, without the API key."""
        entering = [
            self.endpoint.identity,
            self.as_model or self.model,
            self.messages,
            float(self.temperature),
            self.max_tokens,
            self.sample,
        ]
        return hashlib.sha256(json.dumps(entering).encode()).hexdigest()


class CallFailed(Exception):
    """A single call failed while others succeed. The caller catches and counts it."""


class _Passing(Exception):
    """A transient failure."""

    def __init__(self, reason: str, *, status: int | None, after_s: float | None = None, weight: int = 1) -> None:
        super().__init__(reason)
        self.status = status
        self.after_s = after_s
        self.weight = weight


@dataclass
class _Lane:
    """State of one endpoint."""

    client: AsyncOpenAI
    next_start: float = 0.0
    paused_until: float = 0.0
    answered: bool = False
    given_up: int = 0
    """Failed calls since the last response."""
    dialects: dict[str, frozenset[str]] = field(default_factory=dict)
    """Per model, the parameters it needs in another form: `max_tokens`, `temperature`."""


class ChatClient:
    """Sends calls; an asynchronous context manager that closes its connections.

    Args:
        ledger: Has the finished calls and records new ones.
        concurrency: Maximum concurrent calls, over all endpoints.
        requests_per_minute: Rate limit per endpoint, evenly spaced, including retries; None: no limit.
        timeout_s: Timeout of one request in seconds.
        retries: Maximum retries of a failed request; five times as many for a busy endpoint (429).
        retry_wait_s: Seconds before the first retry; doubles up to 30.

    Attributes:
        asked: Calls finished by this client.
    """

    def __init__(
        self,
        ledger: CompletionLog,
        *,
        concurrency: int,
        requests_per_minute: float | None,
        timeout_s: float,
        retries: int,
        retry_wait_s: float,
    ) -> None:
        self._ledger = ledger
        self._slots = asyncio.Semaphore(concurrency)
        self._spacing_s = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._timeout_s = timeout_s
        self._retries = retries
        self._retry_wait_s = retry_wait_s
        self._lanes: dict[Endpoint, _Lane] = {}
        self._stopped_by: BaseException | None = None
        self.asked = 0

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for lane in self._lanes.values():
            await lane.client.close()

    def stop(self, failure: BaseException) -> None:
        """Makes each new request raise `failure`; requests in flight can finish."""
        self._stopped_by = self._stopped_by or failure

    async def ask(self, call: Call) -> Reply:
        """Returns the response to a call, from the ledger or from its endpoint.

        Raises:
            CallFailed: Only this call failed.
            EndpointError: The endpoint rejects what all calls have in common, or is unreachable. Stops all further calls.
            DataError: The ledger cannot be written. Stops all further calls.
        """
        key = call.key()
        known = self._ledger.get(key)
        if known is not None:
            return known
        async with self._slots:
            try:
                reply = await self._answer(call)
                # No await between response and ledger, so a cancellation cannot lose the response.
                self._ledger.add(key, reply, model=call.model, temperature=call.temperature)
            except PalateError as error:
                self.stop(error)
                raise
        self.asked += 1
        return reply

    async def _answer(self, call: Call) -> Reply:
        lane = self._lane(call.endpoint)
        failures = limited = 0
        while True:
            await self._turn(lane)
            try:
                reply = await self._request(lane, call)
            except _Passing as failure:
                if failure.status == 429:
                    limited += 1
                else:
                    failures += failure.weight
                # Before the first response, a wrong URL is more likely than an outage.
                bound = self._retries if lane.answered or failure.status else min(self._retries, 2)
                if failures > bound or limited > self._retries * _LIMITED_TIMES:
                    raise await self._given_up(lane, call, failure) from None
                await self._wait(lane, failure, attempt=failures + limited)
            else:
                lane.answered, lane.given_up = True, 0
                return reply

    async def _turn(self, lane: _Lane) -> None:
        """Waits until a request to the endpoint is allowed by its rate limit and pauses."""
        paused = False
        while True:
            if self._stopped_by is not None:
                raise self._stopped_by
            now = time.monotonic()
            if lane.paused_until > now:
                paused = True
                await asyncio.sleep(lane.paused_until - now)
            elif paused:
                paused = False
                await asyncio.sleep(
                    random.uniform(0, self._retry_wait_s)
                )  # jitter: all calls waited for the same pause
            elif lane.next_start > now:
                await asyncio.sleep(lane.next_start - now)
            else:
                lane.next_start = now + self._spacing_s
                return

    async def _wait(self, lane: _Lane, failure: _Passing, *, attempt: int) -> None:
        _log.info("%s; retrying", failure)
        if failure.after_s:
            lane.paused_until = max(lane.paused_until, time.monotonic() + failure.after_s)
            return  # _turn waits for the pause
        longest = min(_LONGEST_WAIT_S, self._retry_wait_s * 2.0 ** (attempt - 1))
        await asyncio.sleep(longest * random.uniform(0.5, 1.0))

    async def _request(self, lane: _Lane, call: Call) -> Reply:
        import openai

        dialect = lane.dialects.get(call.model, frozenset())
        parameters: dict[str, Any] = {"model": call.model, "messages": call.messages}
        parameters["max_completion_tokens" if "max_tokens" in dialect else "max_tokens"] = call.max_tokens
        if "temperature" not in dialect or not call.temperature_may_be_dropped:
            parameters["temperature"] = call.temperature
        try:
            response = await lane.client.chat.completions.with_raw_response.create(**parameters)
        except openai.APITimeoutError:
            reason = f"no response within {self._timeout_s:g} s"
            raise _Passing(reason, status=408, weight=max(1, self._retries // 2)) from None
        except openai.APIConnectionError as error:
            raise _Passing(f"no connection ({error.__cause__ or error})", status=None) from None
        except openai.APIStatusError as error:
            wanted = _dialect(error, call)
            if wanted is None or wanted in dialect:
                raise self._refused(lane, call, error) from None
            _log.warning(
                "%s rejects the parameter %s: sending it in the form that the model accepts", call.model, wanted
            )
            lane.dialects[call.model] = lane.dialects.get(call.model, frozenset()) | {wanted}
            return await self._request(lane, call)
        return _read(response.http_response.content)

    def _refused(self, lane: _Lane, call: Call, error: Any) -> Exception:
        status: int = error.status_code
        said = call.endpoint.without_key(_said(error))
        after_s = _retry_after_s(error.response.headers)
        what = f"{call.model} at {call.endpoint.base_url} returned status {status}: {said}"
        if status == 429 and error.code == "insufficient_quota":
            return self._error(call, f"{what}. The account has no credit left: top it up", status)
        if after_s is not None and after_s > _LONGEST_RETRY_AFTER_S:
            return self._error(call, f"{what}. Its Retry-After is {after_s:.0f} s: resume after that", status)
        if status in _AGAIN or status >= 500:
            return _Passing(f"status {status}: {said}", status=status, after_s=after_s)
        if status in _OF_THIS_CALL and (call.model, call.temperature) in self._ledger.answered:
            return CallFailed(f"{call.about}: {what}")
        source = call.endpoint.key_source
        unkeyed = f"No key was sent ({source}), and the endpoint needs one"
        remedies = {
            401: unkeyed if call.endpoint.api_key == NO_KEY else f"The key was rejected: check the key from {source}",
            403: f"The key ({source}) may not use this model: use another key or model",
            404: f"No such model, or the base URL lacks its path: see {call.endpoint.base_url}/models for the names",
        }
        remedy = remedies.get(status, "Check --model, --temperature, --max-tokens and the prompt")
        blamed = f" ({call.about})" if status in _OF_THIS_CALL else ""
        return self._error(call, f"{what}{blamed}. {remedy}", status)

    async def _given_up(self, lane: _Lane, call: Call, failure: _Passing) -> Exception:
        lane.given_up += 1
        reason = call.endpoint.without_key(str(failure))
        what = f"{call.model} at {call.endpoint.base_url} failed after retries, the last time with {reason}"
        if failure.status == 429:
            return self._error(call, f"{what}. Lower --concurrency or --requests-per-minute", 429)
        worked = lane.answered or bool(self._ledger.answered)
        if worked and lane.given_up <= _GIVEN_UP_IN_A_ROW and await _is_alive(lane):
            return CallFailed(f"{call.about}: {what}")
        return self._error(call, f"{what}. Check that the endpoint runs and is reachable from here", failure.status)

    def _error(self, call: Call, message: str, status: int | None) -> EndpointError:
        return EndpointError(message, endpoint=call.endpoint.base_url, model=call.model, status=status)

    def _lane(self, endpoint: Endpoint) -> _Lane:
        if endpoint not in self._lanes:
            import openai

            from palate.http import async_http_client

            client = openai.AsyncOpenAI(
                base_url=endpoint.base_url,
                api_key=endpoint.api_key,
                timeout=self._timeout_s,
                max_retries=0,
                http_client=async_http_client(endpoint.base_url, endpoint.api_key if endpoint.is_service else None),
            )
            self._lanes[endpoint] = _Lane(client)
        return self._lanes[endpoint]


async def _is_alive(lane: _Lane) -> bool:
    import openai

    try:
        await lane.client.models.with_raw_response.list(timeout=_ALIVE_S)
    except openai.APIStatusError as error:
        return error.status_code < 500
    except openai.APIConnectionError:
        return False
    return True


def _dialect(error: Any, call: Call) -> str | None:
    """Returns the parameter that the model needs in another form, as OpenAI's reasoning models do, or None."""
    if error.status_code != 400:
        return None
    said = _said(error)
    if "max_completion_tokens" in said:
        return "max_tokens"
    refused = error.param == "temperature" or "'temperature'" in said
    return "temperature" if refused and call.temperature_may_be_dropped else None


def _said(error: Any) -> str:
    body = error.body
    message = body.get("message") or body.get("detail") if isinstance(body, dict) else body
    return " ".join(str(message or error.message).split())[:300]


def _read(content: bytes) -> Reply:
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        text = choice["message"].get("content") or ""
        finish = choice.get("finish_reason") or ""
        usage = body.get("usage") or {}
        counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        shown = content[:80].decode("utf-8", "replace")
        raise _Passing(f"a body that is not a chat completion: {shown!r}", status=200) from None
    prompt_tokens, completion_tokens = (count if isinstance(count, int) else None for count in counts)
    whole = str(text).encode("utf-8", "replace").decode()  # a lone surrogate cannot be written to a UTF-8 file
    return Reply(whole.strip(), str(finish), prompt_tokens, completion_tokens)


def _retry_after_s(headers: Any) -> float | None:
    """Returns the seconds in Retry-After, given as a number or a date; None without the header."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit_s
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except ValueError:
                continue
        if seconds == seconds:  # not NaN
            return max(0.0, seconds)
    return None
