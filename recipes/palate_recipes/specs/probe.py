"""`probe.json`: rows with the log-probs that the trainer computed, which a server must reproduce. Knows no trainer and no engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from palate_recipes.specs.codec import Int, Natural, decode

PROBE_FILE = "probe.json"
"""In the model folder."""

_LogProb = Annotated[float, Meta(le=0.001)]
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
    """

    row: Int
    prompt_ids: Annotated[tuple[Natural, ...], Meta(min_length=1)]
    completion_ids: Annotated[tuple[Natural, ...], Meta(min_length=1)]
    logps: tuple[_LogProb, ...]
    base_logps: tuple[_LogProb, ...] = ()
    messages: tuple[Turn, ...] = ()
    prompt: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError if the lists do not belong together."""
        tokens = len(self.completion_ids)
        if len(self.logps) != tokens or len(self.base_logps) not in {0, tokens}:
            raise ValueError(f"row {self.row} has {tokens} answer tokens, but another number of log-probs")

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

    precision: str
    quantization: str = ""
    model_name: str
    rows: tuple[ProbeRow, ...]

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
