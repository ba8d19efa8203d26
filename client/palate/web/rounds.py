"""Questions and their answers: asks the service, deals sides, and turns votes into rows. Knows no HTTP server and no page."""

from __future__ import annotations

import asyncio
import queue
import random
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from palate.web.votes import VOTES, Kept, Shown, Vote, VotesFile
from palate_recipes.errors import ConfigurationError, ServiceError
from palate_recipes.preferences.messages import check_prompt, read_messages
from palate_recipes.preferences.row import RowFaults

if TYPE_CHECKING:
    from palate.predictor import Predictor

MOST_TOKENS = 32768
MOST_ROUNDS = 1000
"""Rounds kept for a vote; the oldest are forgotten."""

MOST_OPEN = 16
"""Answers that the page may receive at a time. The limits of the service's token apply in addition."""

_POLL_S = 0.2
"""How often a stream without a new piece looks whether the browser has left."""


class Refused(Exception):
    """A request that cannot be fulfilled, with its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Answer:
    """An answer of a round.

    Attributes:
        model: Name of the model.
        text: What has arrived.
        finish: Why it ended: `stop`, `length`, `stopped` (by the reader), `error`; "" while it is not complete.
    """

    model: str
    text: str = ""
    finish: str = ""
    is_open: bool = False


@dataclass
class Round:
    """One question to one model, or blind to two.

    Attributes:
        prompt: The messages, with the system prompt.
        sampling: `temperature`, `max_tokens` and, if it was set, `seed`.
        is_blind: Whether it has two answers whose models are not told before the vote.
        answers: Left and right.
        has_vote: Whether it was voted on.
    """

    prompt: list[dict[str, str]]
    sampling: dict[str, Any]
    is_blind: bool
    answers: list[Answer]
    has_vote: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


Event = tuple[Literal["text", "finish", "error"], str]


class Rounds:
    """The rounds of a page.

    Answers are requested on an event loop in a thread, because only there a request can be cancelled while it waits: a stopped answer
    ends in the service at once, also before its first token.
    """

    def __init__(self, predictor: Predictor, votes: VotesFile) -> None:
        self._predictor, self._votes = predictor, votes
        self._rounds: OrderedDict[str, Round] = OrderedDict()
        self._lock = threading.Lock()
        self._open = threading.BoundedSemaphore(MOST_OPEN)
        self._client: Any = None
        self._dealer = random.SystemRandom()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="palate-web", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends all requests."""

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            if self._client is not None:
                await self._client.close()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def models(self) -> list[str]:
        """Returns the names of the service's models: `default` and `base` first, without the service's name, which is `default` too.

        Raises:
            ServiceError: The service does not answer.
        """

        async def ask() -> list[str]:
            client = await self._connected()
            return [card.id for card in (await client.models.list()).data]

        try:
            names = asyncio.run_coroutine_threadsafe(ask(), self._loop).result()
        except Exception as error:
            raise ServiceError(
                f"service {self._predictor.service_name} did not list its models", reason=_told(error)
            ) from error
        first = [name for name in ("default", "base") if name in names]
        hidden = {*first, *((self._predictor.service_name,) if "default" in names else ())}
        return first + [name for name in names if name not in hidden]

    # ── asking ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self, asked: dict[str, Any]) -> str:
        """Makes a round of a request, and returns its id. A blind one draws two of the given models, and their sides.

        Raises:
            Refused: The request is not valid.
        """
        models = asked.get("models")
        if not isinstance(models, list) or not models or not all(isinstance(name, str) and name for name in models):
            raise Refused(400, "models: expected a list of model names")
        is_blind = asked.get("blind") is True
        if is_blind and len(set(models)) < 2:
            raise Refused(400, "models: a blind vote needs two models or more")
        if not is_blind and len(models) != 1:
            raise Refused(400, "models: expected one model")
        made = Round(
            prompt=_prompt(asked),
            sampling=_sampling(asked),
            is_blind=is_blind,
            answers=[Answer(name) for name in (self._dealer.sample(sorted(set(models)), 2) if is_blind else models)],
        )
        identity = secrets.token_hex(16)
        with self._lock:
            self._rounds[identity] = made
            if len(self._rounds) > MOST_ROUNDS:
                self._rounds.popitem(last=False)
        return identity

    def stream(self, identity: object, side: object, *, has_left: Callable[[], bool]) -> Iterator[Event]:
        """Asks for one answer of a round, once, and yields its pieces.

        Args:
            identity: The round's id.
            side: 0 for left, 1 for right.
            has_left: Returns whether nobody reads the pieces any more. Then the request is cancelled.

        Raises:
            Refused: There is no such answer, it was requested already, or too many are open.
        """
        found = self._round(identity)
        if not isinstance(side, int) or isinstance(side, bool) or not 0 <= side < len(found.answers):
            raise Refused(400, "side: expected 0 or 1")
        answer = found.answers[side]
        if not self._open.acquire(blocking=False):
            raise Refused(429, f"{MOST_OPEN} answers are being written: wait for one of them")
        with found.lock:
            if answer.is_open or answer.finish:
                self._open.release()
                raise Refused(409, "this answer was already requested")
            answer.is_open = True
        return self._pieces(found, answer, has_left)

    def _pieces(self, found: Round, answer: Answer, has_left: Callable[[], bool]) -> Iterator[Event]:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        asking = asyncio.run_coroutine_threadsafe(self._ask(found, answer.model, events.put), self._loop)
        try:
            while True:
                try:
                    kind, text = events.get(timeout=_POLL_S)
                except queue.Empty:
                    if has_left():
                        return
                    continue
                if kind == "text":
                    answer.text += text
                else:
                    answer.finish = text if kind == "finish" else "error"
                if kind == "error" and found.is_blind:  # the service's messages name the model
                    text = text.replace(answer.model, "…")
                yield kind, text
                if kind != "text":
                    return
                if has_left():
                    return
        finally:  # also when the reader closes this generator
            asking.cancel()
            answer.finish = answer.finish or "stopped"
            answer.is_open = False
            self._open.release()

    async def _ask(self, found: Round, model: str, put: Callable[[Event], None]) -> None:
        stream: Any = None
        finish = "stop"
        try:
            client = await self._connected()
            stream = await client.chat.completions.create(
                model=model, messages=found.prompt, stream=True, **found.sampling
            )
            async for event in stream:
                choice = event.choices[0] if event.choices else None
                finish = (choice.finish_reason if choice else None) or finish
                # Half a character, which JSON can contain, could not be sent back with the next question.
                piece = ((choice.delta.content if choice else "") or "").encode(errors="replace").decode()
                if piece:
                    put(("text", piece))
            put(("finish", finish))
        except asyncio.CancelledError:
            put(("finish", "stopped"))  # for a reader that is still there when the page is closed
            raise
        except Exception as error:
            if getattr(error, "status_code", 401) == 401:
                self._client = None  # the service may have another address or token now
            put(("error", _told(error)))
        finally:
            if stream is not None:
                await stream.close()  # the service stops generating

    async def _connected(self) -> Any:
        if self._client is None:
            # Reads the store and calls the service, so not on the loop.
            client = await asyncio.to_thread(self._predictor.async_openai, max_retries=0)
            self._client = self._client or client
        return self._client

    # ── voting ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def vote(self, identity: object, vote: object, voter: object) -> tuple[Kept, list[str]]:
        """Saves a vote, and returns where it was kept and the models, left and right.

        Raises:
            Refused: The round cannot be voted on: it is not blind, not complete, or has a vote; or the vote is not valid.
            ConfigurationError: The vote could not be written. It can be repeated.
        """
        if vote not in VOTES:
            raise Refused(400, f"vote: expected one of {', '.join(VOTES)}")
        known: Vote = vote
        name = voter.strip() if isinstance(voter, str) else ""
        if not 0 < len(name) <= 80 or not name.isprintable():
            raise Refused(400, "voter: expected a name of 1 to 80 characters")
        found = self._round(identity)
        if not found.is_blind:
            raise Refused(409, "only blind answers are voted on")
        with found.lock:
            if found.has_vote:
                raise Refused(409, "this pair already has a vote")
            if any(answer.finish not in ("stop", "length") for answer in found.answers):
                raise Refused(409, "an answer is not complete: regenerate to vote")
            left, right = (Shown(answer.model, answer.text, answer.finish) for answer in found.answers)
            served = self._predictor.describe_service()  # an update may have changed it
            facts = {
                "voter": name,
                "voted_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "service": self._predictor.service_name,
                "base_model": served["Model"],
                "tuned_uri": served["ModelUri"],
                "sampling": found.sampling,
            }
            kept = self._votes.add(found.prompt, left, right, known, facts)
            found.has_vote = True
        return kept, [answer.model for answer in found.answers]

    def _round(self, identity: object) -> Round:
        with self._lock:
            found = self._rounds.get(identity) if isinstance(identity, str) else None
        if found is None:
            raise Refused(404, "this round is not known any more: ask again")
        return found


def _prompt(asked: dict[str, Any]) -> list[dict[str, str]]:
    """Returns the messages of a request, checked as those of training data, so that a vote on them can be trained on."""
    system = asked.get("system", "")
    if not isinstance(system, str):
        raise Refused(400, "system: expected a text")
    messages = asked.get("messages")
    try:
        turns = read_messages(messages, "messages")
        if turns[0].role == "system":
            raise Refused(400, "messages: the system prompt has its own field")
        check_prompt(turns, "messages")
        if system.strip():
            turns = (*read_messages([{"role": "system", "content": system}], "system"), *turns)
    except RowFaults as error:
        raise Refused(400, str(error)) from None
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _sampling(asked: dict[str, Any]) -> dict[str, Any]:
    temperature, max_tokens, seed = (asked.get(name) for name in ("temperature", "max_tokens", "seed"))
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature <= 2:
        raise Refused(400, f"temperature={temperature!r} is out of range: expected 0 to 2")
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or not 1 <= max_tokens <= MOST_TOKENS:
        raise Refused(400, f"max_tokens={max_tokens!r} is out of range: expected 1 to {MOST_TOKENS}")
    found = {"temperature": temperature, "max_tokens": max_tokens}
    if seed is None:
        return found
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**53:  # what JavaScript counts exactly
        raise Refused(400, f"seed={seed!r} is out of range: expected a whole number of 0 or more")
    return {**found, "seed": seed}


def _told(error: Exception) -> str:
    """Returns the reason of a failed request, as the service told it."""
    import openai

    if isinstance(error, openai.APIStatusError):
        told = error.body.get("message") if isinstance(error.body, dict) else None
        return f"{told or 'the service refused the request'} (status {error.status_code})"
    if isinstance(error, ServiceError | ConfigurationError):
        return str(error)
    return f"the service did not answer: {type(error).__name__}: {error}"
