"""One row of training data, whatever file it came from, and what can be wrong with one. Knows no file and no format."""

from __future__ import annotations

from typing import Literal, NamedTuple

Strategy = Literal["dpo", "sft", "kto"]
"""What rows are read for: `dpo` needs both answers, `sft` the chosen one, `kto` one answer and whether it is good."""

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
        number: 1-based: the position in an array or a table, the line of a JSON-lines file.
        prompt: The conversation up to the answers: perhaps a system turn, then user and assistant in turn, a user turn last.
        chosen: The answer to learn; None in an unpaired row whose label is false.
        rejected: The answer to move away from; None in rows for SFT and in unpaired rows whose label is true.
    """

    number: int
    prompt: tuple[Message, ...]
    chosen: str | None
    rejected: str | None

    @property
    def text(self) -> str | None:
        """The prompt as plain text when it is one user turn, else None."""
        return self.prompt[0].content if len(self.prompt) == 1 else None


def plain_row(prompt: str, chosen: str | None, rejected: str | None = None, number: int = 1) -> Row:
    """Returns a row whose prompt is one user turn."""
    return Row(number, (Message("user", prompt),), chosen, rejected)


class Fault(NamedTuple):
    """One thing that is wrong in a row.

    Attributes:
        code: Its rule, see `palate_recipes.preferences.report`.
        field: Where in the row, such as `chosen` or `messages[2]`; empty when it is the row itself.
        what: What is wrong, with the value.
    """

    code: str
    field: str
    what: str


class RowFaults(Exception):
    """Why a row cannot be used; collected by whoever reads the file, never shown alone."""

    def __init__(self, *faults: Fault) -> None:
        super().__init__("; ".join(fault.what for fault in faults))
        self.faults = faults


def fault(code: str, field: str, what: str) -> RowFaults:
    """Returns an exception for one fault."""
    return RowFaults(Fault(code, field, what))
