"""A folder's tokenizer, and rows to token ids: prompts as serving renders them, answers cut to length. Knows no weights, no torch.

A prompt's ids are those of its rendering alone, with the generation prompt: what an engine is given. An answer's ids are the
rest of the rendering with it. Where no token merges across the boundary that is what TRL 1.16's own preparation gives (a test
compares them); where one does, TRL drops the end of the prompt, and here the answer begins with a token of its own. All is
made before a weight is loaded, so that every row that truncation would spoil is known by its number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from palate_recipes.errors import DataError, TrainerError
from palate_recipes.preferences.row import Message, Row
from palate_trainer.template_probe import VerbatimTemplate, find_verbatim

ROWS_NAMED = 8
_BATCH_ROWS = 500
_Batch = tuple[list[Row], list[list[str]], "Future[list[list[int]]]"]


@dataclass(frozen=True)
class TokenPair:
    """One row as the trainer sees it: `prompt + chosen` and `prompt + rejected` are at most `seq_length` tokens.

    Attributes:
        row: The row number in the preference file.
        prompt_ids: Tokens both answers follow.
        chosen_ids: Tokens of the chosen answer, scored; empty where KTO has a bad answer.
        rejected_ids: Tokens of the rejected answer, scored; empty for SFT, and where KTO has a good answer.
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
        """Tokens of the chosen answer, or of the only one."""
        return self.chosen_ids or self.rejected_ids


@dataclass
class LengthReport:
    """What became of one file's rows: those cut, those left out and why, the longest in tokens.

    Attributes:
        rows: How many there were.
        longest: Tokens of the longest.
        cut: Rows that lost the end of an answer.
        no_room: Left out: the prompt alone fills `seq_length`.
        same_after_cut: Left out: both answers are the same once cut.
        same_tokens: Left out: both answers are the same once rendered, uncut.
        own_boundary: Rows whose answer would otherwise merge into the end of the prompt.
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
        if self.same_tokens:
            lines.append(
                f"{name}: left out, chosen and rejected are the same tokens once rendered ({_numbers(self.same_tokens)})"
            )
        if self.own_boundary:
            lines.append(
                f"{name}: the prompt renders differently with an answer behind it ({_numbers(self.own_boundary)});"
                " trained on as serving renders it, and the answer begins with a token of its own"
            )
        return lines


@dataclass(frozen=True)
class Renderer:
    """How a row becomes tokens, the same for prompt and answers.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
        apply_chat_template: Render through the model's chat template; else plain text.
        system_prompt: The system turn of rows that bring none; empty leaves it out.
        seq_length: Most tokens of prompt and answer together.
        stop_ids: Tokens at which an engine ends an answer, beside the tokenizer's EOS. An answer that ends with none of them
            gets EOS.
    """

    tokenizer: Any
    apply_chat_template: bool
    system_prompt: str
    seq_length: int
    stop_ids: frozenset[int] = frozenset()

    def check(self) -> None:
        """Raises TrainerError when the tokenizer cannot render rows this way."""
        if self.tokenizer.eos_token is None:
            raise TrainerError("The tokenizer has no end-of-text token, so answers cannot end. Use another base model.")
        if not self.apply_chat_template:
            return
        if not self.tokenizer.chat_template:
            raise TrainerError(
                "apply_chat_template=true, but this base model has no chat template: it is not a chat model. Use the instruct"
                " version of the model, add a chat_template.jinja to its folder, or set apply_chat_template=false."
            )
        self._text((Message("user", "Hello"),), answer=None)

    def messages(self, prompt: tuple[Message, ...]) -> list[dict[str, str]]:
        """The conversation up to the answer: at most one system turn, the row's own or `system_prompt`, then the others."""
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
        if prompt[0].role == "system" or not self.system_prompt.strip():
            return turns
        return [{"role": "system", "content": self.system_prompt}, *turns]

    def encode(self, row: Row) -> tuple[TokenPair, bool]:
        """Token ids of one row, uncut, and whether an answer had to be parted from the end of its prompt.

        Raises:
            TrainerError: The chat template refuses the conversation, or leaves the answer out of it.
        """
        return next(self.encode_all([row]))

    def encode_all(self, rows: Iterable[Row]) -> Iterator[tuple[TokenPair, bool]]:
        """Yields what `encode` gives for each row, many at a time: a fast tokenizer works on them with all cores.

        While it does, the next ones are rendered: a template is Python's work, the tokenizer's needs no Python.
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
        """What is tokenised for a row: the prompt as it is served, then the whole with each answer."""
        if not self.apply_chat_template and row.text is None:
            raise TrainerError(
                f"row {row.number} is a conversation of {len(row.prompt)} turns, and with apply_chat_template=false a prompt is"
                " one text. Set apply_chat_template=true, or write the conversation as one text."
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
        """Cuts the answers off the whole renderings."""
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
        """The answer without an end of its own: there is one, and it is put there in one place."""
        eos = self.tokenizer.eos_token
        return answer.rstrip().removesuffix(eos) if answer.rstrip().endswith(eos) else answer

    def _rendered(self, turns: list[dict[str, str]], answer: str | None) -> str:
        if not self.apply_chat_template:
            return turns[-1]["content"] + (answer or "")
        if answer is not None:
            turns = [*turns, {"role": "assistant", "content": answer}]
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None))
        except TemplateError as error:
            remedy = " Try system_prompt='': some templates have no system turn." if self.system_prompt.strip() else ""
            raise TrainerError(f"The model's chat template refuses the conversation: {error}.{remedy}") from error
        except (
            Exception
        ) as error:  # of the template's own code, which runs in Jinja's sandbox: a division by zero, a missing key
            raise TrainerError(
                f"The model's chat template fails on the conversation: {type(error).__name__}: {error}. "
                "Correct chat_template in the model's folder, or set apply_chat_template=false."
            ) from error

    @cached_property
    def _verbatim(self) -> VerbatimTemplate | None:
        return find_verbatim(self._rendered, self.tokenizer.get_chat_template()) if self.apply_chat_template else None

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # A template writes its own first token; before plain text the tokenizer puts it, unless the text brings it.
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
        """Ids that the tokenizer itself puts before plain text (what it puts behind is left out: EOS has its own place)."""
        bare, dressed = self._bare("a"), list(self.tokenizer(text="a")["input_ids"])
        return next((dressed[:at] for at in range(len(dressed)) if dressed[at : at + len(bare)] == bare), [])

    def _bare_ids(self, texts: list[str]) -> list[list[int]]:
        """Ids without any that the tokenizer puts around; without offsets and masks it has a fifth less to do."""
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        if core is None or core.truncation is not None or core.padding is not None:
            encoded = self.tokenizer(text=texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
            return [list(ids) for ids in encoded]
        return [one.ids for one in core.encode_batch_fast(texts, add_special_tokens=False)]

    def _bare(self, text: str) -> list[int]:
        return list(self.tokenizer(text=text, add_special_tokens=False)["input_ids"])

    def _continuation(self, prompt: list[int], text: str, rest: str) -> list[int]:
        """Ids of `rest` that read on after `prompt`: some tokenizers put a space before what stands alone."""
        wanted = self._decode(self._ids([text + rest])[0])
        for lead in ("", "\n"):
            before, ids = self._bare(lead), self._bare(lead + rest)
            if ids[: len(before)] == before and self._decode(prompt + ids[len(before) :]) == wanted:
                return ids[len(before) :]
        return self._bare(rest)

    def _ended(self, completion: list[int]) -> list[int]:
        """The completion with EOS behind it, unless it ends with a stop token (a line break after it is the template's)."""
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


def _answers(row: Row) -> list[str]:
    return [answer for answer in (row.chosen, row.rejected) if answer is not None]


def _after(prompt: str, whole: str, answer: str, row: int) -> str:
    """What follows the prompt in the rendering with the answer, or from the answer on where a template renders both anew."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    at = whole.rfind(answer.strip())
    if at < 0:
        raise TrainerError(
            f"row {row}: the model's chat template leaves out or rewrites the answer {answer[:40]!r}. Give a model folder with"
            " another chat_template.jinja, or set apply_chat_template=false."
        )
    return whole[at:]


def encode_pairs(rows: Iterable[Row], renderer: Renderer, *, name: str) -> tuple[list[TokenPair], LengthReport]:
    """Token ids of all rows, cut to `seq_length`, without those that the cut makes useless.

    Args:
        rows: From `read_rows`.
        renderer: How rows become tokens.
        name: What the file is called in messages.

    Raises:
        DataError: Not one row is left.
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
    told_both_ways = _told_both_ways(kept)
    kept = [one for one in kept if one.row not in told_both_ways]
    for row in told_both_ways:
        (report.same_after_cut if row in report.cut else report.same_tokens).append(row)
    report.cut = [row for row in report.cut if row not in told_both_ways]
    for rows_named in (report.cut, report.no_room, report.own_boundary):
        rows_named[:] = dict.fromkeys(rows_named)  # a row with several answers is one row of the file
    if not kept:
        raise DataError(f"No row of {name} is left to train on.\n" + "\n".join(report.notes(name, renderer.seq_length)))
    return kept, report


def _told_both_ways(kept: list[TokenPair]) -> list[int]:
    """Rows that came apart into a good and a bad answer, and whose answers are the same tokens."""
    labels: dict[tuple[int, tuple[int, ...]], set[bool]] = {}
    for one in kept:
        if not (one.chosen_ids and one.rejected_ids):
            labels.setdefault((one.row, tuple(one.answer_ids)), set()).add(bool(one.chosen_ids))
    return [row for (row, _), found in labels.items() if len(found) == 2]


def _numbers(rows: list[int]) -> str:
    shown = ", ".join(str(row) for row in rows[:ROWS_NAMED])
    more = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"


def load_tokenizer(model_dir: str) -> Any:
    """The tokenizer, with a padding token (batches are masked, so the end-of-text token may stand in)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
    except (OSError, ValueError, KeyError) as error:
        raise TrainerError(f"{model_dir} has no usable tokenizer: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_token_ids(model_dir: str) -> frozenset[int]:
    """Tokens at which engines end an answer by the model's generation_config.json, which may be missing."""
    path = Path(model_dir) / "generation_config.json"
    if not path.is_file():
        return frozenset()
    given = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return frozenset(given if isinstance(given, list) else [] if given is None else [given])
