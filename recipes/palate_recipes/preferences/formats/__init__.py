"""Row formats: detection by fields, reading to `Row`, and writing. Knows no file.

The format is detected per row, so files can be read without naming it. A file with several formats is reported.
"""

from __future__ import annotations

from typing import Any

from palate_recipes.errors import DataError
from palate_recipes.preferences.formats import alpaca, compared, hh, named, nova, openai, ranked, sharegpt, trl
from palate_recipes.preferences.formats import unpaired as unpaired_answers
from palate_recipes.preferences.formats.fields import PROMPTS, Raw, listed, missing_fields, nearest
from palate_recipes.preferences.formats.fields import Format as Format
from palate_recipes.preferences.formats.question import given
from palate_recipes.preferences.messages import MEDIA, kind, refuse_media
from palate_recipes.preferences.row import Fault, Row, RowFaults, Strategy, fault
from palate_recipes.text import did_you_mean

_FIELDS = ("prompt", "chosen", "rejected", "messages", "instruction", "output", "completion", "label", "conversations")


_READ = """prompt question query messages conversations instruction input history system system_prompt chosen rejected output
 completion response label answer kto_tag chosen_messages rejected_messages rejected_response preferred_output non_preferred_output
 schemaVersion"""


def read_row(value: Any, number: int, *, strategy: Strategy | None = "dpo", format: Format | None = None) -> Row:
    """Reads one raw row.

    Args:
        value: The raw row from the container.
        number: Its number.
        strategy: Training strategy; None accepts pairs, unpaired rows and answers.
        format: Row format; None detects it from the fields.

    Raises:
        RowFaults: The row is invalid. Has all faults.
    """
    if type(value) is not dict:
        if isinstance(value, Fault):  # the container could not read it
            raise RowFaults(value)
        raise fault("not-an-object", "", f"is {kind(value)}, not an object with fields")
    form = format or detect(value, strategy)
    plain = len(value) == 3 and form is _PAI  # for speed: most rows have just its fields
    if not plain and not MEDIA.isdisjoint(value) and form.name != "columns":  # named columns say what is read
        refuse_media(value)
    prompt, chosen, rejected = form.read(value)
    if strategy == "dpo" and (chosen is None or rejected is None):
        what = "is unpaired: it has a label, not two answers" if _is_unpaired(value) else "has one answer, not two"
        raise fault("wrong-kind", "", f"{what}; training_strategy=dpo needs two")
    if strategy == "kto" and rejected is None and not _is_unpaired(value):
        raise fault(
            "wrong-kind", "", "has one answer and no label; training_strategy=kto needs to know whether it is good"
        )
    if strategy == "sft":
        if chosen is None:
            raise fault(
                "wrong-kind", "", "is labelled as a bad answer: there is nothing to learn for training_strategy=sft"
            )
        rejected = None
    if chosen is not None and rejected is not None and chosen.strip() == rejected.strip():
        usual = "chosen" in value and "rejected" in value
        what = f"{'`chosen` and `rejected`' if usual else 'the two answers'} are the same text, which teaches nothing"
        raise fault("same-answers", "rejected" if usual else "", what)
    return Row(number, prompt, chosen, rejected)


def plain_raw(row: Row) -> Raw:
    """Returns a row as messages in its canonical format: a pair, or an answer with its label.

    A good answer can be read both for SFT (`completion`) and for KTO (`label`).
    """
    if row.chosen is not None and row.rejected is not None:
        return trl.write_trl(row)
    return unpaired_answers.write_unpaired(row)


def unpaired(row: Row) -> list[Row]:
    """Returns one row per answer: of a pair, the chosen answer is good and the rejected one is bad."""
    if row.chosen is None or row.rejected is None:
        return [row]
    return [row._replace(rejected=None), row._replace(chosen=None)]


def learned_turns(row: Row) -> list[Row]:
    """Returns one row per assistant turn of a conversation, in order. SFT trains on these."""
    turns = [
        Row(row.number, row.prompt[:index], turn.content, None)
        for index, turn in enumerate(row.prompt)
        if turn.role == "assistant"
    ]
    return [*turns, row]


# Detection.


def detect(row: Raw, strategy: Strategy | None = "dpo") -> Format:
    """Detects the format of a raw row from its fields.

    Args:
        row: The fields.
        strategy: Resolves ambiguous rows, such as a pair that also has an `output`.

    Raises:
        RowFaults: No format has these fields. Suggests similar ones.
    """
    has = row.__contains__
    if strategy == "sft" and has("prompt") and has("chosen"):
        return FORMATS["completions"]  # SFT ignores `rejected`
    if has("chosen") and has("rejected"):
        if has("prompt"):
            text = type(row["prompt"]) is str and type(row["chosen"]) not in (list, dict)
            return FORMATS["pai"] if text else FORMATS["trl"]
        if has("conversations"):
            return FORMATS["sharegpt"]
        if has("instruction"):
            return FORMATS["alpaca"]
        if has("messages") or has("question") or has("query"):
            return FORMATS["trl"]
        if type(row.get("input")) is str and _is_answer_alone(row["chosen"]):
            return FORMATS["named-pairs"]
        if type(row["chosen"]) is str:
            return FORMATS["hh"]
        if type(row["chosen"]) is list:
            return FORMATS["trl"]
    if has("preferred_output") or has("non_preferred_output"):
        return FORMATS["openai"]
    if has("chosen_messages") or (has("rejected_messages") and not has("messages")):
        return FORMATS["typed-messages"]
    if has("messages"):
        if has("rejected_response") or has("rejected_messages"):
            return FORMATS["messages"]
        if _has_candidates(row["messages"]):
            return FORMATS["nova"]
    if len(found := _of_other_projects(row)) == 1:
        return FORMATS[found[0]]
    if found:
        what = f"may be read as {' or '.join(found)}: name one with --from or PreferenceData(format=…)"
        raise fault("ambiguous-format", "", what)
    if _is_unpaired(row):
        return FORMATS["unpaired"]
    if has("instruction") and has("output"):
        return FORMATS["alpaca-ranking"] if type(row["output"]) is list else FORMATS["instructions"]
    if not (has("chosen") or has("rejected")):
        if has("messages"):
            return FORMATS["chat"]
        if has("conversations"):
            return FORMATS["sharegpt-sft"]
        if has("prompt") and (has("completion") or has("response")):
            return FORMATS["completions"]
        if given(row) and any(has(name) for name in trl.ANSWERS):
            return FORMATS["completions"]
    raise _unknown(row, strategy)


def _of_other_projects(row: Raw) -> list[str]:
    """Returns the formats with two or more answers whose fields a row has, besides those with `chosen` and `rejected`."""
    return [
        name
        for name, there in (
            ("named-pairs", named.matches(row)),
            ("compared", compared.kinds_of(row)),
            ("ranked", ranked.list_of(row)),
        )
        if there
    ]


def _is_answer_alone(answer: Any) -> bool:
    """Whether an answer does not begin with its question, as a transcript and a whole conversation do."""
    if isinstance(answer, str):
        return not answer.startswith(("\n\nHuman:", "Human:"))
    return not isinstance(answer, list) or len(answer) == 1


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


def _is_unpaired(row: Raw) -> bool:
    if "chosen" in row or not ("label" in row or "kto_tag" in row):
        return False
    if "instruction" in row and "output" in row:  # with instructions, `label` can also be a topic
        return "kto_tag" in row or type(row["label"]) is bool
    if any(name in row for name in ("completion", "messages", "conversations", "response")):
        return True
    return "answer" in row and ("kto_tag" in row or type(row["label"]) is bool)


def _has_candidates(messages: Any) -> bool:
    return isinstance(messages, list) and any(isinstance(turn, dict) and "candidates" in turn for turn in messages)


def format_named(name: str) -> Format:
    """Returns a format by its name.

    Raises:
        DataError: The name is unknown. Lists all formats and suggests the most similar one.
    """
    if name in FORMATS:
        return FORMATS[name]
    hint = did_you_mean(name, FORMATS)
    raise DataError(f"unknown data format {name!r}: {hint}valid formats: {', '.join(FORMATS)}")


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
    "unpaired",
    "chat",
    "sharegpt-sft",
    "instructions",
    "completions",
)
"""In the order of `palate data formats`: pairs first."""

_FAMILIES = (trl, openai, sharegpt, alpaca, hh, nova, named, compared, ranked, unpaired_answers)
_ALL = {form.name: form for family in _FAMILIES for form in family.FORMATS}
FORMATS: dict[str, Format] = {name: _ALL[name] for name in _ORDER}
"""All formats by name."""
_PAI = FORMATS["pai"]

REJECTED = frozenset(("rejected", "rejected_response", "rejected_messages", "non_preferred_output", "response_k"))
"""Fields with the worse answer of a pair, which SFT does not read."""

KNOWN_FIELDS = frozenset(_READ.split())
"""Fields that at least one format reads."""
