"""Row formats: detection by fields, reading to `Row`, and writing. Knows no file.

The format is detected per row, so files can be read without naming it. A file with several formats is reported.
"""

from __future__ import annotations

from typing import Any

from palate_recipes.errors import DataError
from palate_recipes.preferences.formats import trl
from palate_recipes.preferences.formats import unpaired as unpaired_answers
from palate_recipes.preferences.formats.detection import FORMATS as FORMATS
from palate_recipes.preferences.formats.detection import KNOWN_FIELDS as KNOWN_FIELDS
from palate_recipes.preferences.formats.detection import REJECTED as REJECTED
from palate_recipes.preferences.formats.detection import SHAPES, is_unpaired
from palate_recipes.preferences.formats.detection import detect as detect
from palate_recipes.preferences.formats.detection import shape_of as shape_of
from palate_recipes.preferences.formats.fields import Format as Format
from palate_recipes.preferences.formats.fields import Raw
from palate_recipes.preferences.messages import kind, refuse_media
from palate_recipes.preferences.row import Fault, Row, RowFaults, Strategy, fault
from palate_recipes.text import did_you_mean

_PAI = (None, FORMATS["pai"])


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
    # For speed: most rows are pairs of three texts.
    parts = trl.plain_texts(value) if len(value) == 3 and "prompt" in value and format in _PAI else None
    if parts is None and format is not None and format.name == "columns":  # says itself which fields are read
        parts = format.read(value)
    elif parts is None:
        shape = SHAPES.get(tuple(value)) or shape_of(value)  # for speed: a call costs as much again
        if not shape.exact:
            return _read_renamed(value, number, strategy, format)
        if shape.texts and len(value) > 3 and format in _PAI:
            parts = trl.plain_texts(value)
        if parts is None:
            form = format or shape.format(value, strategy)
            if shape.media:
                refuse_media(value)
            parts = form.read(value)
    prompt, chosen, rejected = parts
    if strategy == "dpo" and (chosen is None or rejected is None):
        what = "is unpaired: it has a label, not two answers" if is_unpaired(value) else "has one answer, not two"
        raise fault("wrong-kind", "", f"{what}; training_strategy=dpo needs two")
    if strategy == "kto" and rejected is None and not is_unpaired(value):
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


def _read_renamed(value: Raw, number: int, strategy: Strategy | None, format: Format | None) -> Row:
    shape = shape_of(value)
    try:
        return read_row(shape.renamed(value), number, strategy=strategy, format=format)
    except RowFaults as error:
        raise RowFaults(*map(shape.as_given, error.faults)) from None


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


def format_named(name: str) -> Format:
    """Returns a format by its name.

    Raises:
        DataError: The name is unknown. Lists all formats and suggests the most similar one.
    """
    if name in FORMATS:
        return FORMATS[name]
    hint = did_you_mean(name, FORMATS)
    raise DataError(f"unknown data format {name!r}: {hint}valid formats: {', '.join(FORMATS)}")
