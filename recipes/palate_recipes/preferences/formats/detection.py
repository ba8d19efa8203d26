"""Detects the format of a row from its fields. Knows no file.

What the names of the fields decide is decided once per set of names: most rows of a file have the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from palate_recipes.preferences.formats import (
    alpaca,
    compared,
    hh,
    named,
    nova,
    open_webui,
    openai,
    ranked,
    sharegpt,
    trl,
)
from palate_recipes.preferences.formats import unpaired as unpaired_answers
from palate_recipes.preferences.formats.fields import PROMPTS, Format, Raw, listed, missing_fields, nearest, other_names
from palate_recipes.preferences.formats.question import QUESTIONS, given
from palate_recipes.preferences.messages import MEDIA, quoted
from palate_recipes.preferences.row import Fault, RowFaults, Strategy, fault

_FIELDS = ("prompt", "chosen", "rejected", "messages", "instruction", "output", "completion", "label", "conversations")


_READ = """prompt question query messages conversations instruction input history system system_prompt chosen rejected output
 completion response label answer kto_tag chosen_messages rejected_messages rejected_response preferred_output non_preferred_output
 schemaVersion"""


_ORDER = (
    "pai",
    "trl",
    "messages",
    "openai",
    "sharegpt",
    "alpaca",
    "alpaca-ranking",
    "hh",
    "typed-messages",
    "nova",
    "named-pairs",
    "compared",
    "ranked",
    "open-webui",
    "unpaired",
    "chat",
    "sharegpt-sft",
    "instructions",
    "completions",
)
"""In the order of `palate data formats`: pairs first."""

_FAMILIES = (trl, openai, sharegpt, alpaca, hh, nova, named, compared, ranked, open_webui, unpaired_answers)
_ALL = {form.name: form for family in _FAMILIES for form in family.FORMATS}
FORMATS: dict[str, Format] = {name: _ALL[name] for name in _ORDER}
"""All formats by name."""

REJECTED = frozenset(("rejected", "rejected_response", "rejected_messages", "non_preferred_output", "response_k"))
"""Fields with the worse answer of a pair, which SFT does not read."""

KNOWN_FIELDS = frozenset(_READ.split())
"""Fields that at least one format reads."""

_NAMES = KNOWN_FIELDS.union(
    MEDIA, ("tools", "functions"), *(form.reads for form in FORMATS.values() if form.name != "open-webui")
)
"""Names that a field can have in another case: those that are read, and those that are refused or reported.

Not those of a program's export, which nobody has typed: `type`, `data` and `id` are columns of many tables.
"""

_SHAPES_KEPT, _FIELDS_KEPT, _CHARACTERS_KEPT = 1024, 256, 4096
"""Bounds of the memory for shapes: a file can have other names in every row."""


Choice = Format | Callable[[Raw], "Format | None"]
"""A format, or a function that chooses one by the values of a row; None passes to the next choice."""


class Shape(NamedTuple):
    """What the names of a row's fields decide.

    Attributes:
        exact: Whether all fields are read under their own names.
        other_names: Field -> the known name from which it differs only in case or surrounding blanks.
        clash: Fault of two fields that differ only in that.
        media: Whether a field may have an image, audio or video.
        texts: Whether the row is a pair of `prompt`, `chosen` and `rejected` without a system text or media.
        choices: The formats that the row may have, in order of precedence.
        for_sft: The same for SFT.
    """

    exact: bool
    other_names: dict[str, str]
    clash: Fault | None
    media: bool
    texts: bool
    choices: tuple[Choice, ...]
    for_sft: tuple[Choice, ...]

    def renamed(self, row: Raw) -> Raw:
        """Returns a row under the names that are read.

        Raises:
            RowFaults: Two fields may be the same.
        """
        if self.clash is not None:
            raise RowFaults(self.clash)
        return {self.other_names.get(name, name): value for name, value in row.items()} if self.other_names else row

    def format(self, row: Raw, strategy: Strategy | None) -> Format:
        """Returns the format of a row with the names that are read. Raises as `detect`."""
        for choice in self.for_sft if strategy == "sft" else self.choices:
            form = choice if isinstance(choice, Format) else choice(row)
            if form is not None:
                return form
        raise _unknown(row, strategy)

    def as_given(self, one: Fault) -> Fault:
        """Returns the fault of a renamed row with the names that its file has."""
        code, field, what = one
        for name, known in self.other_names.items():
            if field == known or field.startswith((f"{known}[", f"{known}.")):
                field = name + field[len(known) :]
            shown = quoted(name).removesuffix("`")
            for end in "`[.":
                what = what.replace(f"`{known}{end}", shown + end)
        return Fault(code, field, what)


SHAPES: dict[tuple[str, ...], Shape] = {}
"""The latest shapes by names."""


def shape_of(row: Raw) -> Shape:
    """Returns the shape of a row."""
    names = tuple(row)
    found = SHAPES.get(names)
    if found is None:
        found = _shape(names)
        if len(names) <= _FIELDS_KEPT and sum(len(str(name)) for name in names) <= _CHARACTERS_KEPT:
            if len(SHAPES) >= _SHAPES_KEPT:
                SHAPES.clear()
            SHAPES[names] = found
    return found


def _shape(given_names: tuple[str, ...]) -> Shape:
    others = other_names(given_names, _NAMES)
    if isinstance(others, Fault):
        return Shape(False, {}, others, False, False, (), ())
    names = frozenset(others.get(name, name) for name in given_names)
    media = not MEDIA.isdisjoint(names)
    texts = names.issuperset(("prompt", "chosen", "rejected")) and names.isdisjoint(("system", "system_prompt"))
    choices, for_sft = (_until_certain(_choices(names, sft=sft)) for sft in (False, True))
    return Shape(not others, others, None, media, texts and not media, choices, for_sft)


def _until_certain(choices: Iterator[Choice]) -> tuple[Choice, ...]:
    kept: list[Choice] = []
    for choice in choices:
        kept.append(choice)
        if isinstance(choice, Format):
            break
    return tuple(kept)


def detect(row: Raw, strategy: Strategy | None = "dpo") -> Format:
    """Detects the format of a raw row from its fields.

    Args:
        row: The fields.
        strategy: Resolves ambiguous rows, such as a pair that also has an `output`.

    Raises:
        RowFaults: No format has these fields. Suggests similar ones.
    """
    shape = shape_of(row)
    if not shape.exact:
        row = shape.renamed(row)
    return shape.format(row, strategy)


def _choices(names: frozenset[str], *, sft: bool) -> Iterator[Choice]:
    """Yields the formats that a row with these fields may have, in order of precedence."""
    has = names.__contains__
    if names.issuperset(("type", *open_webui.FIELDS)):
        yield FORMATS["open-webui"]
    if sft and has("prompt") and has("chosen"):
        yield FORMATS["completions"]  # SFT ignores `rejected`
    if has("chosen") and has("rejected"):
        if has("prompt"):
            yield _texts_or_messages
        elif has("conversations"):
            yield FORMATS["sharegpt"]
        elif has("instruction"):
            yield FORMATS["alpaca"]
        elif has("messages") or has("question") or has("query"):
            yield FORMATS["trl"]
        else:
            yield _answers_alone
    if has("preferred_output") or has("non_preferred_output"):
        yield FORMATS["openai"]
    if has("chosen_messages") or (has("rejected_messages") and not has("messages")):
        yield FORMATS["typed-messages"]
    if has("messages"):
        yield FORMATS["messages"] if has("rejected_response") or has("rejected_messages") else _with_candidates
    pairs = [*(["named-pairs"] if named.matches(names) else ()), *(["compared"] if compared.kinds_of(names) else ())]
    if pairs or not names.isdisjoint(ranked.LISTS):
        yield partial(_of_other_projects, pairs)
    if not has("chosen") and (has("label") or has("kto_tag")):
        yield _labelled
    if has("instruction") and has("output"):
        yield _instructions
    if not (has("chosen") or has("rejected")):
        if has("messages"):
            yield FORMATS["chat"]
        if has("conversations"):
            yield FORMATS["sharegpt-sft"]
        if has("prompt") and (has("completion") or has("response")):
            yield FORMATS["completions"]
        if not names.isdisjoint(QUESTIONS) and not names.isdisjoint(trl.ANSWERS):
            yield _question_and_answer


def _texts_or_messages(row: Raw) -> Format:
    text = type(row["prompt"]) is str and type(row["chosen"]) not in (list, dict)
    return FORMATS["pai"] if text else FORMATS["trl"]


def _answers_alone(row: Raw) -> Format | None:
    if type(row.get("input")) is str and _is_answer_alone(row["chosen"]):
        return FORMATS["named-pairs"]
    if type(row["chosen"]) is str:
        return FORMATS["hh"]
    return FORMATS["trl"] if type(row["chosen"]) is list else None


def _is_answer_alone(answer: Any) -> bool:
    """Whether an answer does not begin with its question, as a transcript and a whole conversation do."""
    if isinstance(answer, str):
        return not answer.startswith(("\n\nHuman:", "Human:"))
    return not isinstance(answer, list) or len(answer) == 1


def _with_candidates(row: Raw) -> Format | None:
    turns = row["messages"]
    there = isinstance(turns, list) and any(isinstance(turn, dict) and "candidates" in turn for turn in turns)
    return FORMATS["nova"] if there else None


def _of_other_projects(pairs: list[str], row: Raw) -> Format | None:
    """Chooses among the formats with two or more answers whose fields a row has, besides those with `chosen` and `rejected`."""
    found = [*pairs, "ranked"] if ranked.list_of(row) else pairs
    if len(found) > 1:
        what = f"may be read as {' or '.join(found)}: name one with --from or PreferenceData(format=…)"
        raise fault("ambiguous-format", "", what)
    return FORMATS[found[0]] if found else None


def _labelled(row: Raw) -> Format | None:
    return FORMATS["unpaired"] if is_unpaired(row) else None


def _instructions(row: Raw) -> Format:
    return FORMATS["alpaca-ranking"] if type(row["output"]) is list else FORMATS["instructions"]


def _question_and_answer(row: Raw) -> Format | None:
    return FORMATS["completions"] if given(row) else None


def is_unpaired(row: Raw) -> bool:
    """Whether a row has one answer and its label."""
    if "snapshot" in row and "data" in row:  # a feedback without another answer
        return True
    if "chosen" in row or not ("label" in row or "kto_tag" in row):
        return False
    if "instruction" in row and "output" in row:  # with instructions, `label` can also be a topic
        return "kto_tag" in row or type(row["label"]) is bool
    if "completion" in row or "messages" in row or "conversations" in row or "response" in row:
        return True
    return "answer" in row and ("kto_tag" in row or type(row["label"]) is bool)


def _unknown(row: Raw, strategy: Strategy | None) -> Exception:
    wanted: tuple[str, ...]
    if strategy == "sft":
        wanted = ("instruction", "output") if "instruction" in row else ("prompt", "chosen")
    elif type(row.get("input")) is dict:
        wanted = ("input", "preferred_output", "non_preferred_output")
    else:
        asked = next((name for name in ("instruction", *PROMPTS) if name in row), "prompt")
        wanted = (asked, "chosen", "rejected")
    missing = [name for name in wanted if name not in row]
    there = [name for name in row if name not in wanted]
    if not any(nearest(name, there) for name in missing) and not any(name in row for name in (*_FIELDS, *wanted)):
        what = f"has none of the fields of a known format; it has {listed(there) or 'no fields'}"
        return fault("unknown-format", "", what)
    return missing_fields(missing, there)
