"""Preference files to checked pairs, and every reason to refuse them. Knows files and text, no tokenizer and no model.

Two stages, so that formats can be added to either: a *container* turns a file into numbered rows (JSON array, JSON lines),
and a *row shape* turns one row into a `PreferencePair` (PAI's `prompt`/`chosen`/`rejected`; `instruction`/`output` for SFT).
The client runs this before it submits, the trainer when it loads: both see the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from palate_recipes.errors import DataError

Strategy = Literal["dpo", "sft"]
BadRows = Literal["refuse", "skip"]

ROWS_SHOWN = 5
"""Wrong rows that one error spells out; the rest is counted."""


@dataclass(frozen=True)
class PreferencePair:
    """One row of training data.

    Attributes:
        prompt: What the user says.
        chosen: The answer to learn.
        rejected: The answer to move away from; None when the file is read for SFT.
        row: Its 1-based number: the position in a JSON array, the line of a JSONL file.
    """

    prompt: str
    chosen: str
    rejected: str | None
    row: int


class _RowProblem(Exception):
    """Why one row is refused; collected, never shown alone."""


def read_preferences(
    path: str | Path,
    *,
    strategy: Strategy = "dpo",
    bad_rows: BadRows = "refuse",
    on_skip: Callable[[int, str], None] = lambda row, problem: None,
) -> list[PreferencePair]:
    """Reads a preference file, or refuses it with one error that covers all of its wrong rows.

    Args:
        path: A JSON array of objects (PAI's format) or JSON lines, in UTF-8, with or without a byte-order mark.
        strategy: `dpo` needs `prompt`, `chosen` and `rejected`; `sft` needs `prompt` and `chosen` (a `rejected` is
            ignored) or `instruction` and `output`.
        bad_rows: `refuse` ends with an error when a row is wrong, `skip` leaves wrong rows out. A file whose JSON is broken
            is refused either way: nobody knows what else it has lost.
        on_skip: Called with number and fault of each row that is left out: 3, "row 3: `rejected` is missing".

    Returns:
        The rows in file order, at least one.

    Raises:
        DataError: The file cannot be read, or rows in it are wrong (with `skip`: all of them); names file, row, field and
            remedy.
    """
    path = Path(path)
    if strategy not in get_args(Strategy):
        raise DataError(f"Unknown training strategy {strategy!r}: use one of {', '.join(get_args(Strategy))}.")
    shape = _ROW_SHAPES[strategy]
    pairs: list[PreferencePair] = []
    problems: dict[int, str] = {}
    total = 0
    unit = "row"
    for unit, number, row in _rows(path, _text(path)):
        total += 1
        try:
            pairs.append(shape.read(_as_object(row), number))
        except _RowProblem as problem:
            problems[number] = f"{unit} {number}: {problem}"
    if problems and (bad_rows == "refuse" or not pairs):
        shown = [f"  {line}" for line in list(problems.values())[:ROWS_SHOWN]]
        if len(problems) > ROWS_SHOWN:
            shown.append(f"  and {len(problems) - ROWS_SHOWN} more")
        count = f"{len(problems)} of {total} {unit}s {'is' if len(problems) == 1 else 'are'} wrong"
        raise DataError(f"{path}: {count} for training_strategy={strategy}.\n" + "\n".join(shown) + f"\n{shape.remedy}")
    if not pairs:
        raise DataError(f"{path}: the array is empty. {shape.remedy}")
    for number, fault in problems.items():
        on_skip(number, fault)
    return pairs


def describe_skipped(skipped: Mapping[int, str]) -> str:
    """Returns one line for people on rows that were left out, by number and fault."""
    shown = "; ".join(list(skipped.values())[:ROWS_SHOWN])
    more = f"; and {len(skipped) - ROWS_SHOWN} more" if len(skipped) > ROWS_SHOWN else ""
    return (
        f"{len(skipped)} wrong {'row is' if len(skipped) == 1 else 'rows are'} left out (bad_rows=skip): {shown}{more}"
    )


# Containers: a file's text to (unit, number, row).


def _text(path: Path) -> str:
    if path.is_dir():
        raise DataError(f"{path} is a folder, not a preference file. Name the .json or .jsonl file inside it.")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Check the path of the preference file.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Check the file and its permissions.") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: not UTF-8, byte 0x{raw[error.start]:02x} at offset {error.start}, line {line}. Save the file as UTF-8."
        ) from None
    if not text.strip():
        raise DataError(f"{path} is empty. Give it a JSON array of objects, or one JSON object a line.")
    return text


def _rows(path: Path, text: str) -> Iterable[tuple[str, int, Any]]:
    if text.lstrip()[0] == "[":
        return _array_rows(path, text)
    return _line_rows(path, text)


def _array_rows(path: Path, text: str) -> Iterator[tuple[str, int, Any]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}."
            f" {_json_remedy(text, error)}"
        ) from None
    except RecursionError:
        raise DataError(
            f"{path}: brackets are nested too deeply. Rows are flat objects with text in their fields."
        ) from None
    for number, row in enumerate(rows, start=1):
        yield "row", number, row


def _line_rows(path: Path, text: str) -> Iterator[tuple[str, int, Any]]:
    # Lines end at \n alone: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            if _is_one_object(text):
                raise DataError(
                    f"{path} holds one JSON object, not a list of rows. Put the rows into a JSON array: [{{...}}, {{...}}]."
                ) from None
            column = (
                f", column {error.colno}: {error.msg}"
                if isinstance(error, json.JSONDecodeError)
                else ": nested too deeply"
            )
            raise DataError(
                f"{path}: broken JSON at line {number}{column}."
                " The file is read as JSON lines since it does not start with '[': each line must be one whole object."
            ) from None
        yield "line", number, row


def _is_one_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (json.JSONDecodeError, RecursionError):
        return False


def _json_remedy(text: str, error: json.JSONDecodeError) -> str:
    if error.msg.startswith("Invalid control character"):
        return "A line break inside a text is written \\n."
    if error.msg.startswith("Extra data"):
        return "Nothing may follow the closing ']': join the arrays into one."
    if not text.rstrip().endswith("]"):
        return "The closing ']' is missing: the file may have been cut off."
    return "Look for a missing comma or quote, or a comma too many, just before that place."


# Row shapes: one object to a pair.


@dataclass(frozen=True)
class _RowShape:
    read: Callable[[dict[str, Any], int], PreferencePair]
    remedy: str


def _as_object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise _RowProblem(f"is {_kind(row)}, not an object with fields")
    return row


def _dpo_row(row: dict[str, Any], number: int) -> PreferencePair:
    prompt, chosen, rejected = _texts(row, "prompt", "chosen", "rejected")
    if chosen.strip() == rejected.strip():
        raise _RowProblem("`chosen` and `rejected` are the same text, which teaches nothing")
    return PreferencePair(prompt, chosen, rejected, number)


def _sft_row(row: dict[str, Any], number: int) -> PreferencePair:
    fields = ("instruction", "output") if "prompt" not in row and "instruction" in row else ("prompt", "chosen")
    prompt, answer = _texts(row, *fields)
    return PreferencePair(prompt, answer, None, number)


def _texts(row: dict[str, Any], *fields: str) -> list[str]:
    problems = []
    for field in fields:
        value = row.get(field)
        if field not in row:
            problems.append(f"`{field}` is missing")
        elif not isinstance(value, str):
            problems.append(f"`{field}` is {_kind(value)}, not text")
        elif not value.strip():
            problems.append(f"`{field}` is empty")
    if problems:
        unread = sorted(set(row) - set(fields))
        if any(field not in row for field in fields) and unread:
            problems.append(f"the row has {', '.join(f'`{name}`' for name in unread[:4])}")
        raise _RowProblem("; ".join(problems))
    return [row[field] for field in fields]


def _kind(value: Any) -> str:
    names = {bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return "null" if value is None else names[type(value)]


_ROW_SHAPES: dict[str, _RowShape] = {
    "dpo": _RowShape(
        _dpo_row,
        "A row needs text in `prompt`, `chosen` and `rejected`, the last two different. Correct or remove the rows, or leave"
        " them out with bad_rows=skip; for data without `rejected` set training_strategy=sft.",
    ),
    "sft": _RowShape(
        _sft_row,
        "A row needs text in `prompt` and `chosen`, or in `instruction` and `output`. Correct or remove the rows, or leave them"
        " out with bad_rows=skip.",
    ),
}
