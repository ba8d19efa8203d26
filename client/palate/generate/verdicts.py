"""Asks a judge which of two answers is better, in both orders. Sends no requests itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from palate.generate.chat_client import Call, Endpoint
from palate.generate.completion_log import Reply
from palate.generate.judge import Verdict, agreed, asked_again, comparison, read_verdict, together

CUT = frozenset({"length", "max_tokens", "model_length"})
"""Finish reasons of responses cut at the token limit."""

Ask = Callable[[Call], Awaitable[Reply]]
"""Returns the response to a call; raises CallFailed if only that call failed."""


class Verdicts(NamedTuple):
    """The two verdicts of one comparison; None could not be parsed, even on the second try."""

    straight: Verdict | None
    """With the first answer as A."""
    swapped: Verdict | None
    """With the first answer as B."""

    @property
    def result(self) -> Literal["first", "second", "tie", "disagreement"]:
        return agreed(self.straight, self.swapped)

    @property
    def unreadable(self) -> int:
        return (self.straight is None) + (self.swapped is None)


@dataclass(frozen=True)
class Judge:
    """A model that compares answers.

    Attributes:
        endpoint: Its endpoint.
        model: Its model name.
        rubric: Criteria for the better answer.
        max_tokens: Maximum tokens of a verdict, including its reasoning.
    """

    endpoint: Endpoint
    model: str
    rubric: str
    max_tokens: int

    async def compare(
        self, ask: Ask, conversation: Sequence[tuple[str, str]], first: str, second: str, *, about: str
    ) -> Verdicts:
        """Compares two answers to a conversation, of pairs (role, content), in both orders.

        Args:
            ask: Sends the calls.
            conversation: What was to be answered.
            first: An answer.
            second: The other answer.
            about: What is judged, for error messages, such as `prompt 3`.
        """
        straight, swapped = await together(
            self._verdict(ask, comparison(conversation, first, second, self.rubric), about),
            self._verdict(ask, comparison(conversation, second, first, self.rubric), about),
        )
        return Verdicts(straight, swapped)

    @staticmethod
    def verdict_in(reply: Reply) -> Verdict | None:
        """Returns the verdict in a reply; None if it cannot be parsed."""
        return None if reply.finish in CUT else read_verdict(reply.text)  # cut: the verdict could still follow

    async def _verdict(self, ask: Ask, messages: list[dict[str, str]], about: str) -> Verdict | None:
        for attempt in range(2):
            call = Call(self.endpoint, self.model, messages, 0.0, self.max_tokens, attempt, True, f"verdict on {about}")
            reply = await ask(call)
            verdict = self.verdict_in(reply)
            if verdict is not None:
                return verdict
            messages = asked_again(messages, reply.text)
        return None
