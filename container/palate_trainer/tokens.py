"""Preference pairs to token ids: one rendering for prompt and answers, cut to length, with a report. Knows the tokenizer, no model.

The ids are those that TRL 1.16's own preparation gives (a test compares them); they are made here so that every pair that
truncation would spoil is known by its row number before a weight is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any

from jinja2 import TemplateError

from palate_recipes.errors import DataError
from palate_trainer.errors import TrainerError
from palate_trainer.spec.preferences import PreferencePair

ROWS_NAMED = 8
_BATCH_ROWS = 1000


@dataclass(frozen=True)
class TokenPair:
    """One pair as the trainer sees it: `prompt + chosen` and `prompt + rejected` are at most `seq_length` tokens.

    Attributes:
        row: The row number in the preference file.
        prompt_ids: Tokens both answers follow.
        chosen_ids: Tokens of the chosen answer, scored.
        rejected_ids: Tokens of the rejected answer, scored; empty for SFT.
    """

    row: int
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def length(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass
class LengthReport:
    """What `seq_length` did to one file: rows cut, rows left out and why, the longest row in tokens."""

    rows: int = 0
    longest: int = 0
    cut: list[int] = field(default_factory=list)
    no_room: list[int] = field(default_factory=list)
    same_after_cut: list[int] = field(default_factory=list)
    merged_boundary: list[int] = field(default_factory=list)

    @property
    def dropped(self) -> list[int]:
        return sorted(self.no_room + self.same_after_cut)

    def notes(self, name: str, seq_length: int) -> list[str]:
        """One line for people per finding, none when every row fits."""
        lines = []
        fits = f"the longest of {self.rows} rows has {self.longest} tokens: seq_length={self.longest} keeps all"
        if self.cut:
            lines.append(
                f"{name}: {len(self.cut)} rows lose their end at seq_length={seq_length} ({_numbers(self.cut)}); {fits}"
            )
        if self.no_room:
            lines.append(
                f"{name}: left out, the prompt alone fills seq_length={seq_length} ({_numbers(self.no_room)}); {fits}"
            )
        if self.same_after_cut:
            lines.append(
                f"{name}: left out, chosen and rejected are the same once cut to seq_length={seq_length}"
                f" ({_numbers(self.same_after_cut)}); {fits}"
            )
        if self.merged_boundary:
            lines.append(
                f"{name}: prompt and answer merge into one token ({_numbers(self.merged_boundary)}); end these prompts with"
                " a line break or set apply_chat_template=true, or serving sees other tokens than training"
            )
        return lines


@dataclass(frozen=True)
class Renderer:
    """How a row becomes tokens, the same for prompt and answers.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
        apply_chat_template: Render through the model's chat template; else plain text, where an answer ends with EOS.
        system_prompt: The one system turn; empty leaves it out, and the template may then put its own default, in
            training as in serving.
        seq_length: Most tokens of prompt and answer together.
    """

    tokenizer: Any
    apply_chat_template: bool
    system_prompt: str
    seq_length: int

    def check(self) -> None:
        """Raises TrainerError when the tokenizer cannot render rows this way."""
        if not self.apply_chat_template:
            if self.tokenizer.eos_token is None:
                raise TrainerError(
                    "The tokenizer has no end-of-text token, so plain answers cannot end. Use another base model."
                )
            return
        if not self.tokenizer.chat_template:
            raise TrainerError(
                "apply_chat_template=true, but this base model has no chat template: it is not a chat model. Use the instruct"
                " version of the model, add a chat_template.jinja to its folder, or set apply_chat_template=false."
            )
        self._rendered(self.messages("Hello"), add_generation_prompt=True)

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """The conversation up to the answer: at most one system turn, then the user's."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt.strip() else []
        return [*system, {"role": "user", "content": prompt}]

    def encode(self, pair: PreferencePair) -> tuple[TokenPair, bool]:
        """Token ids of one pair, uncut, and whether an answer merged into the end of its prompt.

        The answer starts where the rendering with it departs from the rendering of the prompt alone, as in TRL.
        """
        return next(self.encode_all([pair]))

    def encode_all(self, pairs: Iterable[PreferencePair]) -> Iterator[tuple[TokenPair, bool]]:
        """Yields what `encode` gives for each pair, many at a time: a fast tokenizer works on them with all cores."""
        remaining = iter(pairs)
        while batch := list(islice(remaining, _BATCH_ROWS)):
            texts = [self.texts(pair) for pair in batch]
            ids = iter(self._ids([text for row in texts for text in row]))
            for pair, row in zip(batch, texts, strict=True):
                yield _split(pair, list(islice(ids, len(row))))

    def texts(self, pair: PreferencePair) -> list[str]:
        """What is tokenised for a pair: the prompt as it is served, then the whole with each answer."""
        answers = [pair.chosen] if pair.rejected is None else [pair.chosen, pair.rejected]
        if not self.apply_chat_template:
            eos = self.tokenizer.eos_token
            wholes = [pair.prompt + answer + ("" if answer.endswith(eos) else eos) for answer in answers]
            return [pair.prompt, *wholes]
        turns = self.messages(pair.prompt)
        conversations = [[*turns, {"role": "assistant", "content": answer}] for answer in answers]
        return [
            self._rendered(turns, add_generation_prompt=True),
            *(self._rendered(conversation) for conversation in conversations),
        ]

    def _rendered(self, turns: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
            )
        except TemplateError as error:
            remedy = " Try system_prompt='': some templates have no system turn." if self.system_prompt.strip() else ""
            raise TrainerError(f"The model's chat template refuses the conversation: {error}.{remedy}") from error

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # A template writes its special tokens itself; apply_chat_template(tokenize=True) adds none either.
        encoded = self.tokenizer(
            text=texts, add_special_tokens=not self.apply_chat_template, return_attention_mask=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids


def encode_pairs(
    pairs: Iterable[PreferencePair], renderer: Renderer, *, name: str
) -> tuple[list[TokenPair], LengthReport]:
    """Token ids of all pairs, cut to `seq_length`, without those that the cut makes useless.

    Args:
        pairs: From `read_preferences`.
        renderer: How rows become tokens.
        name: What the file is called in messages.

    Raises:
        DataError: Not one pair is left.
    """
    report = LengthReport()
    kept = []
    for whole, merged in renderer.encode_all(pairs):
        room = renderer.seq_length - len(whole.prompt_ids)
        report.rows += 1
        report.longest = max(report.longest, whole.length)
        if merged:
            report.merged_boundary.append(whole.row)
        if room <= 0:
            report.no_room.append(whole.row)
            continue
        cut = TokenPair(whole.row, whole.prompt_ids, whole.chosen_ids[:room], whole.rejected_ids[:room])
        if cut.chosen_ids == cut.rejected_ids:
            report.same_after_cut.append(whole.row)
            continue
        if cut != whole:
            report.cut.append(whole.row)
        kept.append(cut)
    if not kept:
        raise DataError(f"No row of {name} is left to train on.\n" + "\n".join(report.notes(name, renderer.seq_length)))
    return kept, report


def _split(pair: PreferencePair, ids: list[list[int]]) -> tuple[TokenPair, bool]:
    """Cuts the answers off the whole renderings: `ids` are those of `Renderer.texts`."""
    prompt, *wholes = ids
    shared = min(_common_prefix(prompt, whole) for whole in wholes)
    completions = [whole[shared:] for whole in wholes]
    rejected = completions[1] if len(completions) == 2 else []
    return TokenPair(pair.row, prompt[:shared], completions[0], rejected), shared < len(prompt)


def _common_prefix(ids: list[int], others: list[int]) -> int:
    if others[: len(ids)] == ids:  # as good as always, and a hundred times faster than counting
        return len(ids)
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(ids, others, strict=False)))


def _numbers(rows: list[int]) -> str:
    shown = ", ".join(str(row) for row in rows[:ROWS_NAMED])
    more = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"
