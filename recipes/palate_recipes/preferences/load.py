"""A data file to rows, or every reason to refuse it. Knows containers and formats, no tokenizer and no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from palate_recipes.errors import DataError
from palate_recipes.preferences.files import Container, open_container
from palate_recipes.preferences.formats import Format, detect, learned_turns, read_row, unpaired
from palate_recipes.preferences.row import BadRows, Fault, Row, RowFaults, Strategy

ROWS_SHOWN = 5
"""Wrong rows that one error spells out; the rest is counted."""

UNREADABLE = ("broken-json", "not-utf8", "broken-table")
"""Faults of the file, not of a row: nobody knows what else it has lost."""

_REMEDIES = {
    "dpo": "A row needs text in `prompt`, `chosen` and `rejected`, the last two different, or has the fields of another format that"
    " docs/data.md lists. Correct or remove the rows, or leave them out with bad_rows=skip; for data without `rejected` set"
    " training_strategy=sft.",
    "sft": "A row needs text in `prompt` and `chosen`, in `instruction` and `output`, or `messages` that end with an answer."
    " Correct or remove the rows, or leave them out with bad_rows=skip.",
    "kto": "A row needs `prompt`, `completion` and `label` (true or false), or `messages` and `label`, or is a pair as for dpo, which"
    " counts as a good and a bad answer. Correct or remove the rows, or leave them out with bad_rows=skip.",
}


def read_rows(
    path: str | Path,
    *,
    strategy: Strategy = "dpo",
    bad_rows: BadRows = "refuse",
    on_skip: Callable[[int, str], None] = lambda number, problem: None,
    format: Format | None = None,
) -> list[Row]:
    """Reads a data file, or refuses it with one error that covers all of its wrong rows.

    Args:
        path: JSON array, JSON lines, CSV, Parquet or Arrow, plain, .gz or .zst; text in UTF-8.
        strategy: `dpo` needs two answers a row; `sft` one, a `rejected` is ignored, and of `messages` every assistant turn
            becomes a row of its own, all with the number of the row they come from; `kto` one answer and its label, a pair
            becomes two rows.
        bad_rows: `refuse` ends with an error when a row is wrong, `skip` leaves wrong rows out. A file that is broken (JSON,
            encoding, cells) is refused either way: nobody knows what else it has lost.
        on_skip: Called with number and fault of each row that is left out: 3, "row 3: `rejected` is missing".
        format: Of the rows; each row's own fields decide when None.

    Returns:
        The rows in file order, at least one.

    Raises:
        DataError: The file cannot be read, or rows in it are wrong (with `skip`: all of them); names file, row, field and
            remedy.
    """
    if strategy not in get_args(Strategy):
        raise DataError(f"Unknown training strategy {strategy!r}: use one of {', '.join(get_args(Strategy))}.")
    container = open_container(path)
    rows: list[Row] = []
    problems: dict[int, str] = {}
    wrong = total = 0
    for number, value in container.raw_rows():
        total += 1
        try:
            row = read_row(value, number, strategy=strategy, format=format)
        except RowFaults as error:
            first = error.faults[0]
            if first.code in UNREADABLE:
                raise DataError(unreadable(container, number, first)) from None
            wrong += 1
            if bad_rows == "skip" or wrong <= ROWS_SHOWN:  # a file of wrong rows alone must not fill the memory
                problems[number] = f"{container.unit} {number}: {error}"
            continue
        if strategy == "kto":
            rows += unpaired(row)
        elif strategy == "sft" and (format or detect(value, strategy)).every_turn:
            rows += learned_turns(row)
        else:
            rows.append(row)
    if problems and (bad_rows == "refuse" or not rows):
        raise DataError(refusal(path, list(problems.values()), wrong, total, strategy))
    if not rows:
        raise DataError(nothing_in(path, strategy))
    for number, problem in problems.items():
        on_skip(number, problem)
    return rows


def refusal(path: str | Path, first: Sequence[str], wrong: int, total: int, strategy: Strategy) -> str:
    """Returns what to say of wrong rows.

    Args:
        path: Of the file.
        first: The first of them, such as "row 3: `rejected` is missing".
        wrong: How many there are.
        total: Rows in the file.
        strategy: What they were read for.
    """
    shown = [f"  {line}" for line in first[:ROWS_SHOWN]]
    if wrong > ROWS_SHOWN:
        shown.append(f"  and {wrong - ROWS_SHOWN} more")
    unit = first[0].split(" ", 1)[0]
    count = f"{wrong} of {total} {unit}s {'is' if wrong == 1 else 'are'} wrong"
    return f"{path}: {count} for training_strategy={strategy}.\n" + "\n".join(shown) + f"\n{_REMEDIES[strategy]}"


def nothing_in(path: str | Path, strategy: Strategy) -> str:
    """Returns what to say of a file without rows."""
    return f"{path}: it is empty, no row is in it. {_REMEDIES[strategy]}"


def unreadable(container: Container, number: int, fault: Fault) -> str:
    """Returns what to say of a file that cannot be read from a certain row on."""
    where = "" if " line " in fault.what else f" {container.unit} {number},"
    remedy = {
        "broken-json": (
            " The file is read as JSON lines since it does not start with '[': each line must be one whole object."
            if container.kind == "jsonl"
            else ""
        ),
        "not-utf8": " Save the file as UTF-8.",
        "broken-table": " Quote cells that hold separators or line breaks.",
    }[fault.code]
    text = fault.what if fault.what.endswith(".") else f"{fault.what}."
    return f"{container.path}:{where} {text}{remedy}"


def describe_skipped(skipped: Mapping[int, str]) -> str:
    """Returns one line for people on rows that were left out, by number and fault."""
    shown = "; ".join(list(skipped.values())[:ROWS_SHOWN])
    more = f"; and {len(skipped) - ROWS_SHOWN} more" if len(skipped) > ROWS_SHOWN else ""
    return (
        f"{len(skipped)} wrong {'row is' if len(skipped) == 1 else 'rows are'} left out (bad_rows=skip): {shown}{more}"
    )
