"""`probe.json`: rows with the log-probs that the trainer computed, which a server must reproduce. Knows no trainer and no engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from palate_recipes.specs.codec import Int, Natural, decode

PROBE_FILE = "probe.json"
"""In the model folder."""

PROBE_ROWS = 8

_LogProb = Annotated[float, Meta(ge=-1e6, le=0.001)]
"""In nats; a sum of rounded probabilities may exceed 0 a little."""


class Turn(Struct, frozen=True, kw_only=True):
    """One turn of a conversation."""

    role: str
    content: str


class ProbeRow(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One row with the trainer's log-probs.

    Attributes:
        row: The row number in the preference file.
        prompt_ids: Tokens before the answer, as the trainer rendered them.
        completion_ids: Tokens of the answer.
        logps: Log-prob of each answer token by the tuned model, in nats.
        base_logps: The same by the base model; empty after full fine-tuning.
        messages: The conversation that `prompt_ids` renders, with the generation prompt; empty for plain text.
        prompt: The text that `prompt_ids` encodes, with `apply_chat_template=false`.
        date_start: The first of the `prompt_ids` that may differ on another day, because the template writes the date.
        date_end: The first after them; 0 if the template writes no date.
    """

    row: Int
    prompt_ids: Annotated[tuple[Natural, ...], Meta(min_length=1)]
    completion_ids: Annotated[tuple[Natural, ...], Meta(min_length=1)]
    logps: tuple[_LogProb, ...]
    base_logps: tuple[_LogProb, ...] = ()
    messages: tuple[Turn, ...] = ()
    prompt: str = ""
    date_start: Natural = 0
    date_end: Natural = 0

    def __post_init__(self) -> None:
        """Raises ValueError if the lists do not belong together."""
        tokens = len(self.completion_ids)
        if len(self.logps) != tokens or len(self.base_logps) not in {0, tokens}:
            raise ValueError(f"row {self.row} has {tokens} answer tokens, but another number of log-probs")
        if not self.date_start <= self.date_end <= len(self.prompt_ids):
            raise ValueError(
                f"row {self.row} has a date at tokens {self.date_start} to {self.date_end}, outside of its prompt"
            )

    def renders_as(self, tokens: Sequence[int]) -> bool:
        """Whether these tokens are the prompt, on any day."""
        if not self.date_end:
            return tuple(tokens) == self.prompt_ids
        before, after = self.prompt_ids[: self.date_start], self.prompt_ids[self.date_end :]
        return (
            len(tokens) >= len(before) + len(after)
            and tuple(tokens[: len(before)]) == before
            and tuple(tokens[len(tokens) - len(after) :]) == after
        )

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.completion_ids)


class Probe(Struct, frozen=True, kw_only=True):
    """The content of `probe.json`.

    Attributes:
        precision: The trainer's: float32, bfloat16 or float16.
        quantization: `4 bit` or `8 bit` if the base's weights were rounded in training, else "".
        model_name: The base model's name.
        rows: At most eight rows.
    """

    # Fixed values: they are quoted in messages, and a model may come from anywhere.
    precision: Literal["float32", "bfloat16", "float16"]
    quantization: Literal["", "4 bit", "8 bit"] = ""
    model_name: str
    rows: Annotated[tuple[ProbeRow, ...], Meta(max_length=PROBE_ROWS)]

    @classmethod
    def read(cls, model_dir: Path) -> Probe | None:
        """Reads a model folder's probe; None if it has none. Raises ValueError if it is damaged."""
        file = model_dir / PROBE_FILE
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return decode(content, cls)
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}") from None
