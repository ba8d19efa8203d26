"""One row of training data, independent of its file, and its faults. Knows no file and no format."""

from __future__ import annotations

from typing import Literal, NamedTuple

Strategy = Literal["dpo", "sft", "kto"]
"""Training strategy of the rows: `dpo` needs both answers, `sft` the chosen one, `kto` one answer and its label."""

BadRows = Literal["refuse", "skip"]


class Message(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: `system`, `user`, `assistant` or `tool`.
        content: Its text.
    """

    role: str
    content: str


class Row(NamedTuple):
    """One row: a conversation, and one or two answers to it.

    Attributes:
        number: 1-based position in an array or table, or line of a JSON-lines file.
        prompt: The conversation before the answers: an optional system turn, then alternating user and assistant turns, ending
            with a user turn.
        chosen: The preferred answer; None in an unpaired row with label false.
        rejected: The other answer; None in rows for SFT and in unpaired rows with label true.
    """

    number: int
    prompt: tuple[Message, ...]
    chosen: str | None
    rejected: str | None

    @property
    def text(self) -> str | None:
        """The prompt as plain text if it is a single user turn, else None."""
        return self.prompt[0].content if len(self.prompt) == 1 else None


def plain_row(prompt: str, chosen: str | None, rejected: str | None = None, number: int = 1) -> Row:
    """Returns a row with a single user turn as prompt."""
    return Row(number, (Message("user", prompt),), chosen, rejected)


class Fault(NamedTuple):
    """One error in a row.

    Attributes:
        code: Rule of `palate_recipes.preferences.report`.
        field: Field, such as `chosen` or `messages[2]`; empty for the row itself.
        what: Description with the value.
    """

    code: str
    field: str
    what: str


class RowFaults(Exception):
    """The row cannot be used. Readers of files collect these; users never see one alone."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__("; ".join(fault.what for fault in faults))
        self.faults = faults

    @property
    def is_tie(self) -> bool:
        """Whether the row is valid but says nothing: no answer is better. It is left out, with a message, and refuses no file."""
        return all(fault.code == "tie" for fault in self.faults)


def fault(code: str, field: str, what: str) -> RowFaults:
    """Returns an exception for one fault."""
    return RowFaults(Fault(code, field, what))
