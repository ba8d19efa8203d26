"""Asks OpenAI-compatible endpoints for chat completions: several at once, rate limited, retried where it helps. No prompts.

A call that the ledger knows is not asked. What may pass by itself (no connection, 408, 409, 429, 5xx, an unreadable body) is
asked again after a growing wait with jitter, or after what Retry-After says; any other refusal is final.
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
"""What is sent where no key is known: servers without keys take anything."""

OPENAI_URL = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Endpoint:
    """Where chat completions are asked.

    Args:
        base_url: With its path, such as `http://127.0.0.1:8000/v1`; no user name and no query, which may be secrets.
        api_key: Sent as bearer token; in no repr, error or file.
        key_source: Where the key comes from, in words, for errors.
        identity: What finished calls are remembered by; default: the base URL. A service keeps its own over restarts,
            which change its port.
        is_service: Whether it is a Palate service, which has to prove that it knows the key before the key is sent.

    Raises:
        ConfigurationError: The URL cannot be used.
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
                f"the base URL of {parts.hostname} carries a user name or a query, which would end up in messages: "
                "give the URL alone and name the environment variable that holds the key (--api-key-env)"
            )
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ConfigurationError(
                f"base URL {self.base_url!r} must be an http:// or https:// URL, such as {OPENAI_URL}"
            )
        object.__setattr__(self, "base_url", self.base_url.rstrip("/"))
        object.__setattr__(self, "identity", self.identity or self.base_url)

    @classmethod
    def from_environment(cls, base_url: str | None = None, api_key_env: str | None = None) -> Endpoint:
        """Returns the endpoint that the OpenAI client would take.

        Args:
            base_url: Default: OPENAI_BASE_URL, else OpenAI's own.
            api_key_env: Environment variable with the key; it must be set. Default: OPENAI_API_KEY if it is set.

        Raises:
            ConfigurationError: No endpoint is known, or the named variable is not set.
        """
        url = base_url or os.environ.get("OPENAI_BASE_URL") or ""
        name = api_key_env or "OPENAI_API_KEY"
        key = os.environ.get(name, "").strip()
        if api_key_env and not key:
            raise ConfigurationError(f"environment variable {api_key_env} is not set: it should hold the API key")
        if not url and not key:
            raise ConfigurationError(
                "no endpoint to ask: give --service NAME or --base-url URL, or set OPENAI_BASE_URL or OPENAI_API_KEY"
            )
        return cls(url or OPENAI_URL, key or NO_KEY, f"environment variable {name}" + ("" if key else " (not set)"))

    @classmethod
    def other(cls, base_url: str, api_key_env: str | None = None) -> Endpoint:
        """Returns an endpoint that gets a key only if one is named for it: a key meant for elsewhere stays at home.

        Raises:
            ConfigurationError: The named variable is not set.
        """
        if api_key_env:
            return cls.from_environment(base_url, api_key_env)
        return cls(base_url, key_source="no key (--judge-api-key-env names one)")

    @classmethod
    def of_service(cls, name: str, session: Session | None = None) -> Endpoint:
        """Returns the endpoint of a running Palate service.

        Raises:
            RunNotFoundError: No service of that name.
            ServiceError: It is not running.
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
        """Returns a text, such as what the server says, with the key blotted out."""
        return text if self.api_key == NO_KEY else text.replace(self.api_key, "***")


_log = logging.getLogger(__name__)

_AGAIN = {408, 409, 429}
_OF_THIS_CALL = {400, 413, 422}
"""May be the fault of one prompt (too long, refused), when the same model has answered others."""

_LONGEST_WAIT_S = 30.0
_LONGEST_RETRY_AFTER_S = 900.0
_GIVEN_UP_IN_A_ROW = 10
"""Calls in a row that may be given up at an endpoint that still lists its models: above, it is no fault of the calls."""

_ALIVE_S = 10.0
_LIMITED_TIMES = 5
"""How many times as often a call is tried when the endpoint only says that it is busy."""


class Call(NamedTuple):
    """One chat completion, with all that its answer depends on."""

    endpoint: Endpoint
    model: str
    messages: list[dict[str, str]]
    temperature: float
    max_tokens: int
    sample: int = 0
    """Which of several samples of the same request."""
    temperature_may_be_dropped: bool = False
    """Whether a model that takes no temperature is asked without."""
    about: str = ""
    """What it is for, in words, for errors."""

    def key(self) -> str:
        """Returns the digest of everything that enters the call; never the API key."""
        entering = [
            self.endpoint.identity,
            self.model,
            self.messages,
            float(self.temperature),
            self.max_tokens,
            self.sample,
        ]
        return hashlib.sha256(json.dumps(entering).encode()).hexdigest()


class CallFailed(Exception):
    """One call cannot be answered, while others are. Caught by the caller, who counts it."""


class _Passing(Exception):
    """A failure that may pass by itself."""

    def __init__(self, reason: str, *, status: int | None, after_s: float | None = None, weight: int = 1) -> None:
        super().__init__(reason)
        self.status = status
        self.after_s = after_s
        self.weight = weight


@dataclass
class _Lane:
    """What is known of one endpoint."""

    client: AsyncOpenAI
    next_start: float = 0.0
    paused_until: float = 0.0
    answered: bool = False
    given_up: int = 0
    """Calls given up since the last answer."""
    dialects: dict[str, frozenset[str]] = field(default_factory=dict)
    """By model, which parameters it wants otherwise: `max_tokens`, `temperature`."""


class ChatClient:
    """Asks calls; as an asynchronous context manager it closes its connections.

    Args:
        ledger: Knows finished calls and takes new ones.
        concurrency: Calls at once, all endpoints together.
        requests_per_minute: For each endpoint, evenly spaced, repeated requests included; None: no bound.
        timeout_s: Seconds that one request may take.
        retries: How often a failed request is made again; a busy endpoint (429) is given five times as many.
        retry_wait_s: Seconds before the first repetition; they double up to 30.

    Attributes:
        asked: Calls finished by this asker.
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
        """Lets no further request begin, each raises the failure instead; what is under way may finish."""
        self._stopped_by = self._stopped_by or failure

    async def ask(self, call: Call) -> Reply:
        """Returns the call's answer, from the ledger or from its endpoint.

        Raises:
            CallFailed: This call cannot be answered; others can.
            EndpointError: The endpoint refuses what all calls have in common, or is gone. No further call is made then.
            DataError: The ledger cannot be written. Likewise.
        """
        key = call.key()
        known = self._ledger.get(key)
        if known is not None:
            return known
        async with self._slots:
            try:
                reply = await self._answer(call)
                # No await between answer and ledger: it cannot be lost.
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
                # Until something has answered, a wrong address is likelier than an outage.
                bound = self._retries if lane.answered or failure.status else min(self._retries, 2)
                if failures > bound or limited > self._retries * _LIMITED_TIMES:
                    raise await self._given_up(lane, call, failure) from None
                await self._wait(lane, failure, attempt=failures + limited)
            else:
                lane.answered, lane.given_up = True, 0
                return reply

    async def _turn(self, lane: _Lane) -> None:
        """Waits until the endpoint may be asked again: rate and pauses."""
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
                await asyncio.sleep(random.uniform(0, self._retry_wait_s))  # not all at the same moment
            elif lane.next_start > now:
                await asyncio.sleep(lane.next_start - now)
            else:
                lane.next_start = now + self._spacing_s
                return

    async def _wait(self, lane: _Lane, failure: _Passing, *, attempt: int) -> None:
        _log.info("%s; asked again", failure)
        if failure.after_s:
            lane.paused_until = max(lane.paused_until, time.monotonic() + failure.after_s)
            return  # the turn waits for it
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
            reason = f"no answer within {self._timeout_s:g} s"
            raise _Passing(reason, status=408, weight=max(1, self._retries // 2)) from None
        except openai.APIConnectionError as error:
            raise _Passing(f"no connection ({error.__cause__ or error})", status=None) from None
        except openai.APIStatusError as error:
            wanted = _dialect(error, call)
            if wanted is None or wanted in dialect:
                raise self._refused(lane, call, error) from None
            _log.warning("%s takes no %s as given: it is asked in its own way", call.model, wanted)
            lane.dialects[call.model] = lane.dialects.get(call.model, frozenset()) | {wanted}
            return await self._request(lane, call)
        return _read(response.http_response.content)

    def _refused(self, lane: _Lane, call: Call, error: Any) -> Exception:
        status: int = error.status_code
        said = call.endpoint.without_key(_said(error))
        after_s = _retry_after_s(error.response.headers)
        what = f"{call.model} at {call.endpoint.base_url} answered {status}: {said}"
        if status == 429 and error.code == "insufficient_quota":
            return self._error(call, f"{what}. The account's credit is used up: top it up", status)
        if after_s is not None and after_s > _LONGEST_RETRY_AFTER_S:
            return self._error(call, f"{what}. It wants to be left alone for {after_s:.0f} s: go on after that", status)
        if status in _AGAIN or status >= 500:
            return _Passing(f"status {status}: {said}", status=status, after_s=after_s)
        if status in _OF_THIS_CALL and (call.model, call.temperature) in self._ledger.answered:
            return CallFailed(f"{call.about}: {what}")
        remedies = {
            401: f"The key was not accepted; it comes from {call.endpoint.key_source}",
            403: f"The key ({call.endpoint.key_source}) may not use this model: ask with another key or model",
            404: f"No such model, or the base URL lacks its path: {call.endpoint.base_url}/models lists the names",
        }
        remedy = remedies.get(status, "The request is made of --model, --temperature, --max-tokens and the prompt")
        blamed = f" ({call.about})" if status in _OF_THIS_CALL else ""
        return self._error(call, f"{what}{blamed}. {remedy}", status)

    async def _given_up(self, lane: _Lane, call: Call, failure: _Passing) -> Exception:
        lane.given_up += 1
        reason = call.endpoint.without_key(str(failure))
        what = f"{call.model} at {call.endpoint.base_url} did not answer, the last time with {reason}"
        if failure.status == 429:
            return self._error(call, f"{what}. Ask less: --concurrency, --requests-per-minute", 429)
        worked = lane.answered or bool(self._ledger.answered)
        if worked and lane.given_up <= _GIVEN_UP_IN_A_ROW and await _is_alive(lane):
            return CallFailed(f"{call.about}: {what}")
        return self._error(call, f"{what}. See that the endpoint runs and is reached from here", failure.status)

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
    """Returns the parameter that the model wants otherwise, as OpenAI's reasoning models do; None if that is not it."""
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
        raise _Passing(f"a body that is no chat completion: {shown!r}", status=200) from None
    prompt_tokens, completion_tokens = (count if isinstance(count, int) else None for count in counts)
    whole = str(text).encode("utf-8", "replace").decode()  # half a character cannot be written to a file
    return Reply(whole.strip(), str(finish), prompt_tokens, completion_tokens)


def _retry_after_s(headers: Any) -> float | None:
    """Returns the seconds that Retry-After asks for, as number or as date; None without it."""
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
