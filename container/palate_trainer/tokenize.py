"""Turns rows into token ids: prompts as serving renders them, answers truncated to length. Knows no weights, no torch.

A prompt's ids come from rendering it alone with the generation prompt, which is what an engine receives. An answer's ids are
the rest of the rendering with the answer. If no token merges across the boundary, this equals TRL 1.16's preparation (a test
compares them). If one does, TRL drops the end of the prompt; here the answer starts with its own token. All rows are tokenized
before weights are loaded, so that every row that truncation makes useless is reported by number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from palate_recipes.errors import DataError, TrainerError
from palate_recipes.preferences.row import Message, Row
from palate_recipes.schema import Hyperparameters
from palate_trainer.template_probe import VerbatimTemplate, find_verbatim, take_out_system_default

ROWS_NAMED = 8
_BATCH_ROWS = 500
_DATE_FUNCTION = "strftime_now"
"""What a template calls to write the date."""
_OTHER_DAYS = (datetime(1888, 3, 3, 5, 4, 3), datetime(2999, 12, 27, 16, 57, 48))
"""Each part of them begins and ends differently, so a date that begins or ends as one of them does not as the other."""
_Batch = tuple[list[Row], list[list[str]], "Future[list[list[int]]]"]


@dataclass(frozen=True)
class TokenPair:
    """One tokenized row: `prompt + chosen` and `prompt + rejected` have at most `seq_length` tokens.

    Attributes:
        row: The row number in the preference file.
        prompt_ids: Tokens before both answers.
        chosen_ids: Tokens of the chosen answer, scored; empty for a bad answer in KTO.
        rejected_ids: Tokens of the rejected answer, scored; empty in SFT, and for a good answer in KTO.
    """

    row: int
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def length(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def answer_ids(self) -> list[int]:
        """Tokens of the chosen answer, or of the only answer."""
        return self.chosen_ids or self.rejected_ids


@dataclass
class LengthReport:
    """The effect of `seq_length` on one file's rows. All lists hold row numbers.

    Attributes:
        rows: Number of rows.
        longest: Tokens of the longest row.
        cut: Truncated: the end of an answer is lost.
        no_room: Dropped: the prompt alone fills `seq_length`.
        same_after_cut: Dropped: truncation makes both answers equal.
        same_tokens: Dropped: both answers have the same tokens.
        own_boundary: The answer's first token would merge with the end of the prompt.
    """

    rows: int = 0
    longest: int = 0
    cut: list[int] = field(default_factory=list)
    no_room: list[int] = field(default_factory=list)
    same_after_cut: list[int] = field(default_factory=list)
    same_tokens: list[int] = field(default_factory=list)
    own_boundary: list[int] = field(default_factory=list)

    @property
    def dropped(self) -> list[int]:
        """Rows that are not trained on."""
        return sorted({*self.no_room, *self.same_after_cut, *self.same_tokens})

    def notes(self, name: str, seq_length: int) -> list[str]:
        """One log line per finding; none if every row fits."""
        lines = []
        fits = f"the longest of {self.rows} rows has {self.longest} tokens: seq_length={self.longest} keeps all"
        if self.cut:
            lines.append(
                f"{name}: {len(self.cut)} rows lose their end at seq_length={seq_length} ({_numbers(self.cut)}); {fits}"
            )
        if self.no_room:
            lines.append(
                f"{name}: dropped, the prompt alone fills seq_length={seq_length} ({_numbers(self.no_room)}); {fits}"
            )
        if self.same_after_cut:
            lines.append(
                f"{name}: dropped, chosen and rejected are the same when truncated to seq_length={seq_length}"
                f" ({_numbers(self.same_after_cut)}); {fits}"
            )
        if self.same_tokens:
            lines.append(f"{name}: dropped, chosen and rejected have the same tokens ({_numbers(self.same_tokens)})")
        if self.own_boundary:
            lines.append(
                f"{name}: the prompt renders differently when an answer follows ({_numbers(self.own_boundary)});"
                " the prompt is used as serving renders it, and the answer starts with its own token"
            )
        return lines


@dataclass(frozen=True)
class Renderer:
    """Renders and tokenizes rows.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
        apply_chat_template: Render with the model's chat template; otherwise plain text.
        system_prompt: System turn for rows without one; empty adds none.
        seq_length: Maximum tokens of prompt and answer together.
        stop_ids: Tokens at which an engine ends an answer, besides the tokenizer's EOS. An answer that ends with none of
            them gets EOS.
    """

    tokenizer: Any
    apply_chat_template: bool
    system_prompt: str
    seq_length: int
    stop_ids: frozenset[int] = frozenset()

    def check(self) -> None:
        """Raises TrainerError if the tokenizer cannot render rows with these settings."""
        if self.tokenizer.eos_token is None:
            raise TrainerError("The tokenizer has no EOS token, so answers cannot end. Use another base model.")
        if not self.apply_chat_template:
            return
        if not self.tokenizer.chat_template:
            raise TrainerError(
                "apply_chat_template=true, but the base model has no chat template, so it is not a chat model. Use the instruct"
                " version of the model, add a chat_template.jinja to its folder, or set apply_chat_template=false."
            )
        self._text((Message("user", "Hello"),), answer=None)

    def messages(self, prompt: tuple[Message, ...]) -> list[dict[str, str]]:
        """The conversation up to the answer. Its system turn is the row's own, else `system_prompt`."""
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
        if prompt[0].role == "system" or not self.system_prompt.strip():
            return turns
        return [{"role": "system", "content": self.system_prompt}, *turns]

    def prompt_ids(self, turns: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to the answer, as an engine renders them."""
        return self._ids([self._rendered(turns, None)])[0]

    def date_span(self, turns: list[dict[str, str]]) -> tuple[int, int]:
        """Start and end of the `prompt_ids` that may differ on another day; (0, 0) if the template writes no date."""
        if not self.apply_chat_template or _DATE_FUNCTION not in self.tokenizer.get_chat_template():
            return 0, 0
        today = self.prompt_ids(turns)
        texts = [self._rendered(turns, None, strftime_now=moment.strftime) for moment in _OTHER_DAYS]
        others = [other for other in self._ids(texts) if other != today]
        if not others:
            return 0, 0
        before = min(_shared(today, other) for other in others)
        after = min(_shared(today[::-1], other[::-1]) for other in others)
        # One token more at each end, because a tokenizer may join the date with its neighbours on some days.
        return max(0, before - 1), len(today) - max(0, min(after, len(today) - before) - 1)

    def encode(self, row: Row) -> tuple[TokenPair, bool]:
        """Token ids of one row, not truncated, and whether an answer had to be separated from the end of its prompt.

        Raises:
            TrainerError: The chat template rejects the conversation or drops the answer.
        """
        return next(self.encode_all([row]))

    def encode_all(self, rows: Iterable[Row]) -> Iterator[tuple[TokenPair, bool]]:
        """Yields the result of `encode` for each row. Works in batches, because a fast tokenizer uses all cores on a batch.

        The next batch is rendered at the same time: templates hold the GIL, and the tokenizer releases it.
        """
        remaining = iter(rows)
        with ThreadPoolExecutor(1) as pool:
            before: _Batch | None = None
            while batch := list(islice(remaining, _BATCH_ROWS)):
                rendered = [self._texts(row) for row in batch]
                ids = pool.submit(self._ids, [text for texts in rendered for text in texts])
                if before is not None:
                    yield from self._splits(before)
                before = batch, rendered, ids
            if before is not None:
                yield from self._splits(before)

    def _splits(self, batch: _Batch) -> Iterator[tuple[TokenPair, bool]]:
        rows, rendered, encoded = batch
        ids = iter(encoded.result())
        for row, texts in zip(rows, rendered, strict=True):
            yield self._split(row, texts, list(islice(ids, len(texts))))

    def _texts(self, row: Row) -> list[str]:
        """The texts to tokenize for a row: the prompt as served, then the full text with each answer."""
        if not self.apply_chat_template and row.text is None:
            raise TrainerError(
                f"Row {row.number} is a conversation of {len(row.prompt)} turns, but apply_chat_template=false needs prompts"
                " of plain text. Set apply_chat_template=true, or write the conversation as one text."
            )
        turns = self.messages(row.prompt)
        before = self._rendered(turns, None)
        texts = [before]
        for answer in map(self._unended, _answers(row)):
            if self._verbatim is not None and self._verbatim.covers(turns, answer):
                texts.append(before + answer + self._verbatim.tail)
            else:
                texts.append(self._rendered(turns, answer))
        return texts

    def _split(self, row: Row, texts: list[str], ids: list[list[int]]) -> tuple[TokenPair, bool]:
        """Splits the tokens of the full texts into prompt and answers."""
        prompt = ids[0]
        completions, parted = [], False
        for answer, text, whole in zip(_answers(row), texts[1:], ids[1:], strict=True):
            if whole[: len(prompt)] == prompt:
                completion = whole[len(prompt) :]
            else:
                parted = True
                completion = self._continuation(prompt, texts[0], _after(texts[0], text, answer, row.number))
            completions.append(self._ended(completion))
        chosen = completions[0] if row.chosen is not None else []
        rejected = completions[-1] if row.rejected is not None else []
        return TokenPair(row.number, prompt, chosen, rejected), parted

    def _text(self, prompt: tuple[Message, ...], *, answer: str | None) -> str:
        return self._rendered(self.messages(prompt), None if answer is None else self._unended(answer))

    def _unended(self, answer: str) -> str:
        """The answer without a trailing EOS, because `_ended` adds exactly one."""
        eos = self.tokenizer.eos_token
        return answer.rstrip().removesuffix(eos) if answer.rstrip().endswith(eos) else answer

    def _rendered(self, turns: list[dict[str, str]], answer: str | None, **variables: Any) -> str:
        if not self.apply_chat_template:
            return turns[-1]["content"] + (answer or "")
        if answer is not None:
            turns = [*turns, {"role": "assistant", "content": answer}]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=answer is None, **variables
                )
            )
        except TemplateError as error:
            remedy = " Try system_prompt='': some templates have no system turn." if self.system_prompt.strip() else ""
            raise TrainerError(f"The model's chat template rejects the conversation: {error}.{remedy}") from error
        except Exception as error:
            # The template's own code runs in Jinja's sandbox and can raise anything: a division by zero, a missing key.
            raise TrainerError(
                f"The model's chat template fails on the conversation: {type(error).__name__}: {error}. "
                "Correct chat_template in the model's folder, or set apply_chat_template=false."
            ) from error

    @cached_property
    def _verbatim(self) -> VerbatimTemplate | None:
        return find_verbatim(self._rendered, self.tokenizer.get_chat_template()) if self.apply_chat_template else None

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # A template writes BOS itself. For plain text the tokenizer adds it, unless the text starts with it.
        encoded = self._bare_ids(texts)
        if self.apply_chat_template:
            return encoded
        bos = self.tokenizer.bos_token
        return [
            ids if bos and text.startswith(bos) else [*self._front, *ids]
            for text, ids in zip(texts, encoded, strict=True)
        ]

    @cached_property
    def _front(self) -> list[int]:
        """Ids that the tokenizer adds before plain text. Those that it adds after it are ignored: `_ended` adds EOS."""
        bare, dressed = self._bare("a"), list(self.tokenizer(text="a")["input_ids"])
        return next((dressed[:at] for at in range(len(dressed)) if dressed[at : at + len(bare)] == bare), [])

    def _bare_ids(self, texts: list[str]) -> list[list[int]]:
        """Ids without special tokens. Skipping offsets and masks saves a fifth of the time."""
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        if core is None or core.truncation is not None or core.padding is not None:
            encoded = self.tokenizer(text=texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
            return [list(ids) for ids in encoded]
        return [one.ids for one in core.encode_batch_fast(texts, add_special_tokens=False)]

    def _bare(self, text: str) -> list[int]:
        return list(self.tokenizer(text=text, add_special_tokens=False)["input_ids"])

    def _continuation(self, prompt: list[int], text: str, rest: str) -> list[int]:
        """Ids of `rest` as a continuation of `prompt`. Some tokenizers add a space before a text that stands alone."""
        wanted = self._decode(self._ids([text + rest])[0])
        for lead in ("", "\n"):
            before, ids = self._bare(lead), self._bare(lead + rest)
            if ids[: len(before)] == before and self._decode(prompt + ids[len(before) :]) == wanted:
                return ids[len(before) :]
        return self._bare(rest)

    def _ended(self, completion: list[int]) -> list[int]:
        """The completion with EOS, unless it ends with a stop token. Blank tokens after that come from the template."""
        last = next((token for token in reversed(completion) if not self._is_blank(token)), None)
        eos: int = self.tokenizer.eos_token_id
        return completion if last == eos or last in self.stop_ids else [*completion, eos]

    def _is_blank(self, token: int) -> bool:
        found = self._blanks.get(token)
        if found is None:
            found = self._blanks[token] = not self._decode([token]).strip()
        return found

    @cached_property
    def _blanks(self) -> dict[int, bool]:
        return {}

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _shared(ids: list[int], others: list[int]) -> int:
    """Number of tokens with which both begin."""
    return next(
        (at for at, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1]), min(len(ids), len(others))
    )


def _answers(row: Row) -> list[str]:
    return [answer for answer in (row.chosen, row.rejected) if answer is not None]


def _after(prompt: str, whole: str, answer: str, row: int) -> str:
    """The text after the prompt. If the full text does not start with the prompt, the text from the answer on."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    at = whole.rfind(answer.strip())
    if at < 0:
        raise TrainerError(
            f"row {row}: the model's chat template drops or rewrites the answer {answer[:40]!r}. Use a model folder with"
            " another chat_template.jinja, or set apply_chat_template=false."
        )
    return whole[at:]


def encode_pairs(rows: Iterable[Row], renderer: Renderer, *, name: str) -> tuple[list[TokenPair], LengthReport]:
    """Tokenizes all rows, truncates them to `seq_length`, and drops those that truncation makes useless.

    Args:
        rows: From `read_rows`.
        renderer: Renders and tokenizes rows.
        name: Name of the file in messages.

    Raises:
        DataError: No row is left.
    """
    report = LengthReport()
    kept = []
    for whole, parted in renderer.encode_all(rows):
        room = renderer.seq_length - len(whole.prompt_ids)
        report.rows += 1
        report.longest = max(report.longest, whole.length)
        if parted:
            report.own_boundary.append(whole.row)
        if whole.chosen_ids == whole.rejected_ids:
            report.same_tokens.append(whole.row)
            continue
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
    told_both_ways = told_both_ways_in(kept)
    kept = [one for one in kept if one.row not in told_both_ways]
    for row in told_both_ways:
        (report.same_after_cut if row in report.cut else report.same_tokens).append(row)
    report.cut = [row for row in report.cut if row not in told_both_ways]
    for rows_named in (report.cut, report.no_room, report.own_boundary):
        rows_named[:] = dict.fromkeys(rows_named)  # a row with several answers appears several times
    if not kept:
        raise DataError(f"{name} has no row left to train on.\n" + "\n".join(report.notes(name, renderer.seq_length)))
    return kept, report


def told_both_ways_in(kept: list[TokenPair]) -> list[int]:
    """Rows that were split into a good and a bad answer with the same tokens."""
    labels: dict[tuple[int, tuple[int, ...]], set[bool]] = {}
    for one in kept:
        if not (one.chosen_ids and one.rejected_ids):
            labels.setdefault((one.row, tuple(one.answer_ids)), set()).add(bool(one.chosen_ids))
    return [row for (row, _), found in labels.items() if len(found) == 2]


def _numbers(rows: list[int]) -> str:
    shown = ", ".join(str(row) for row in rows[:ROWS_NAMED])
    more = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"


def load_renderer(model_dir: str, hyperparameters: Hyperparameters) -> tuple[Renderer, list[str]]:
    """Loads the tokenizer of a base model for a training.

    Args:
        model_dir: Folder of the base model.
        hyperparameters: Of the training.

    Returns:
        The renderer, and notes for the user.

    Raises:
        TrainerError: There is no usable tokenizer, or it cannot render rows with these settings.
    """
    tokenizer = load_tokenizer(model_dir)
    renderer = Renderer(
        tokenizer=tokenizer,
        apply_chat_template=hyperparameters.apply_chat_template,
        system_prompt=hyperparameters.system_prompt,
        seq_length=hyperparameters.seq_length,
        stop_ids=stop_token_ids(model_dir),
    )
    renderer.check()
    if renderer.apply_chat_template and not renderer.system_prompt.strip():
        return renderer, [*filter(None, [take_out_system_default(tokenizer)])]
    return renderer, []


def load_tokenizer(model_dir: str) -> Any:
    """Loads the tokenizer. If it has no padding token, EOS is used: padding is masked, so any token works."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
    except (OSError, ValueError, KeyError) as error:
        raise TrainerError(f"{model_dir} has no usable tokenizer: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_token_ids(model_dir: str) -> frozenset[int]:
    """EOS tokens of the model's generation_config.json, at which engines end an answer. Empty if the file is missing."""
    path = Path(model_dir) / "generation_config.json"
    if not path.is_file():
        return frozenset()
    given = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return frozenset(given if isinstance(given, list) else [] if given is None else [given])
