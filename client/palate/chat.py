"""Conversations with a service: for `palate chat`, and for `TrainingJob.chat`, whose service ends with it. Knows no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from palate_recipes.errors import ConfigurationError, ServiceError
from palate_recipes.specs.serve import TUNED_MODEL
from palate_recipes.text import visible

if TYPE_CHECKING:
    from palate.predictor import Predictor

MAX_TOKENS = 512
TEMPERATURE = 0.7

IDLE_TIME_TO_LIVE_S = 3600.0
"""Default of a service that one conversation uses."""


@dataclass(kw_only=True)
class Conversation:
    """The messages so far, and how the next one is asked.

    Attributes:
        service: The service's name, for messages.
        client: Its OpenAI client.
        model: Model name.
        system: System prompt; "" sends none.
        max_tokens: Maximum tokens of an answer.
        temperature: Sampling temperature.
        turns: Messages of the user and answers, alternating. A failed question is not in it.
        was_cut: Whether the last answer ended at `max_tokens`.
    """

    service: str
    client: Any
    model: str
    system: str
    max_tokens: int
    temperature: float
    turns: list[dict[str, str]] = field(default_factory=list)
    was_cut: bool = False

    @property
    def messages(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def ask(self, text: str) -> Iterator[str]:
        """Yields the answer in pieces. If it is stopped midway, the conversation keeps the pieces that were shown.

        Raises:
            ServiceError: The service answered with an error or the connection broke. The conversation is unchanged.
        """
        import httpx2
        import openai

        question = {"role": "user", "content": text}
        answer = ""
        failed = self.was_cut = False
        stream: Any = None
        try:
            stream = self.client.chat.completions.create(
                model=self.model,
                messages=[*self.messages, question],
                stream=True,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
            )
            for event in stream:
                choice = event.choices[0] if event.choices else None
                self.was_cut = self.was_cut or (choice is not None and choice.finish_reason == "length")
                # Half a character, which JSON can contain, could not be sent back with the next question.
                piece = ((choice.delta.content if choice else "") or "").encode(errors="replace").decode()
                if piece:
                    answer += piece
                    yield piece
        except (openai.OpenAIError, httpx2.HTTPError) as error:  # HTTPError: an interrupted stream
            failed = True
            raise self._failure(error) from error
        finally:
            if stream is not None:
                stream.close()  # the service stops generating when the client leaves
            if answer and not failed:
                self.turns += [question, {"role": "assistant", "content": answer}]

    def model_names(self) -> list[str]:
        """Returns the names of the service's models. Raises ServiceError as `ask`."""
        import httpx2
        import openai

        try:
            return [row.id for row in self.client.models.list().data]
        except (openai.OpenAIError, httpx2.HTTPError) as error:
            raise self._failure(error) from error

    def choose_model(self, name: str, given_as: str) -> None:
        """Sets the model. Raises ConfigurationError with the names that exist if the service lacks it."""
        names = self.model_names()
        if name not in names:
            raise ConfigurationError(
                f"{given_as} {name!r}: service {self.service} has no such model. It has: {', '.join(names)}"
            )
        self.model = name

    def _failure(self, error: Exception) -> ServiceError:
        import openai

        said = f"answered {error.status_code}" if isinstance(error, openai.APIStatusError) else "did not answer"
        reason = str(error)
        if isinstance(error, openai.APIStatusError):  # whose text repeats the status before the service's answer
            told = error.body.get("message") if isinstance(error.body, dict) else None
            reason = str(told or reason.removeprefix(f"Error code: {error.status_code} - "))
        return ServiceError(f"service {self.service} {said}", reason=visible(reason))


class Chat:
    """A conversation with a service of its own, which is deleted at the end. A context manager.

    Created by `TrainingJob.chat`.

    Attributes:
        predictor: The service. `predictor.openai()` is a client for everything else that it can be asked.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._talk = Conversation(
            service=predictor.service_name,
            client=predictor.openai(),
            model=TUNED_MODEL,
            system=predictor.manifest.body.system_prompt,
            max_tokens=MAX_TOKENS,
            temperature=TEMPERATURE,
        )

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, as OpenAI's messages, with the system prompt of the training if it had one."""
        return self._talk.messages

    def ask(self, text: str, *, max_tokens: int = MAX_TOKENS, temperature: float = TEMPERATURE) -> str:
        """Sends one message, with the conversation before it, and returns the answer.

        Args:
            text: The message.
            max_tokens: Maximum tokens of the answer.
            temperature: Sampling temperature; 0 takes the most likely token.

        Raises:
            ServiceError: The service answered with an error or the connection broke. The conversation is unchanged.
        """
        self._talk.max_tokens, self._talk.temperature = max_tokens, temperature
        return "".join(self._talk.ask(text))

    def reset(self) -> None:
        """Forgets the conversation. The system prompt stays."""
        self._talk.turns.clear()

    def close(self) -> None:
        """Deletes the service. Idempotent."""
        self._talk.client.close()
        self.predictor.delete_service()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
