"""Reads a data file to rows, or reports all its errors. Knows containers and formats, no tokenizer and no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from palate_recipes.errors import DataError
from palate_recipes.preferences.files import Container, open_container
from palate_recipes.preferences.formats import Format, detect, learned_turns, read_row, unpaired
from palate_recipes.preferences.row import BadRows, Fault, Row, RowFaults, Strategy

ROWS_SHOWN = 5
"""Invalid rows that an error lists; the rest is counted."""

UNREADABLE = ("broken-json", "not-utf8", "broken-table")
"""Errors of the file, not of a row: other rows may be lost too."""

_REMEDIES = {
    "dpo": "A row needs text in `prompt`, `chosen` and `rejected`, the last two different, or the fields of another format in"
    " docs/data.md. Correct or remove the rows, or skip them with bad_rows=skip. For data without `rejected` set"
    " training_strategy=sft.",
    "sft": "A row needs text in `prompt` and `chosen`, in `instruction` and `output`, or `messages` that end with an answer."
    " Correct or remove the rows, or skip them with bad_rows=skip.",
    "kto": "A row needs `prompt`, `completion` and `label` (true or false), or `messages` and `label`, or is a pair as for dpo, which"
    " counts as a good and a bad answer. Correct or remove the rows, or skip them with bad_rows=skip.",
}


def read_rows(
    path: str | Path,
    *,
    strategy: Strategy = "dpo",
    bad_rows: BadRows = "refuse",
    on_skip: Callable[[int, str], None] = lambda number, problem: None,
    format: Format | None = None,
) -> list[Row]:
    """Reads a data file. Raises one error for all invalid rows.

    Args:
        path: JSON array, JSON lines, CSV, Parquet or Arrow, plain, .gz or .zst; text in UTF-8.
        strategy: `dpo` needs two answers per row. `sft` needs one and ignores `rejected`; each assistant turn of `messages`
            becomes a row with the same number. `kto` needs one answer and its label; a pair becomes two rows.
        bad_rows: `refuse` raises if a row is invalid, `skip` skips invalid rows. Ties are always skipped.
            A damaged file (JSON, encoding, cells) always
            raises, because other rows may be lost.
        on_skip: Called with number and error of each skipped row: 3, "row 3: `rejected` is missing".
        format: Row format; None detects it per row.

    Returns:
        The rows in file order, at least one.

    Raises:
        DataError: The file cannot be read, or has invalid rows (with `skip`: only invalid rows). Has file, row, field and
            remedy.
    """
    if strategy not in get_args(Strategy):
        raise DataError(f"Unknown training strategy {strategy!r}: expected one of {', '.join(get_args(Strategy))}.")
    container = open_container(path)
    rows: list[Row] = []
    problems: dict[int, str] = {}
    ties: dict[int, str] = {}
    wrong = total = 0
    for number, value in container.raw_rows():
        total += 1
        try:
            row = read_row(value, number, strategy=strategy, format=format)
        except RowFaults as error:
            first = error.faults[0]
            if error.is_tie:
                ties[number] = f"{container.unit} {number}: {error}"
                continue
            if first.code in UNREADABLE:
                raise DataError(unreadable(container, number, first)) from None
            wrong += 1
            if bad_rows == "skip" or wrong <= ROWS_SHOWN:  # bounds memory for a file with only invalid rows
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
        raise DataError(only_ties(path, len(ties)) if ties else nothing_in(path, strategy))
    for number, problem in sorted((problems | ties).items()):
        on_skip(number, problem)
    return rows


def refusal(path: str | Path, first: Sequence[str], wrong: int, total: int, strategy: Strategy) -> str:
    """Returns the error message for invalid rows.

    Args:
        path: The file.
        first: The first errors, such as "row 3: `rejected` is missing".
        wrong: Number of invalid rows.
        total: Rows in the file.
        strategy: Training strategy.
    """
    shown = [f"  {line}" for line in first[:ROWS_SHOWN]]
    if wrong > ROWS_SHOWN:
        shown.append(f"  and {wrong - ROWS_SHOWN} more")
    unit = first[0].split(" ", 1)[0]
    count = f"{wrong} of {total} {unit}s {'is' if wrong == 1 else 'are'} invalid"
    return f"{path}: {count} for training_strategy={strategy}.\n" + "\n".join(shown) + f"\n{_REMEDIES[strategy]}"


def nothing_in(path: str | Path, strategy: Strategy) -> str:
    """Returns the error message for a file without rows."""
    return f"{path} is empty: it has no rows. {_REMEDIES[strategy]}"


def only_ties(path: str | Path, count: int) -> str:
    """Returns the error message for a file whose valid rows are all ties."""
    return f"{path}: no row is left: {count} rows are ties, which say no preference. Use data with a winner."


def unreadable(container: Container, number: int, fault: Fault) -> str:
    """Returns the error message for a file that cannot be read beyond a row."""
    where = "" if " line " in fault.what else f" {container.unit} {number},"
    remedy = {
        "broken-json": (
            " The file is read as JSON lines because it does not start with '[': each line must be one complete object."
            if container.kind == "jsonl"
            else ""
        ),
        "not-utf8": " Save the file as UTF-8.",
        "broken-table": " Quote cells that contain separators or line breaks.",
    }[fault.code]
    text = fault.what if fault.what.endswith(".") else f"{fault.what}."
    return f"{container.path}:{where} {text}{remedy}"


def describe_skipped(skipped: Mapping[int, str]) -> str:
    """Returns a log line about skipped rows: invalid ones, and ties."""
    ties = {number: problem for number, problem in skipped.items() if ": is a tie" in problem}
    wrong = {number: problem for number, problem in skipped.items() if number not in ties}
    return "; ".join(
        _describe(rows, one, many)
        for rows, one, many in (
            (wrong, "invalid row is skipped (bad_rows=skip)", "invalid rows are skipped (bad_rows=skip)"),
            (ties, "tie is left out", "ties are left out"),
        )
        if rows
    )


def _describe(skipped: Mapping[int, str], one: str, many: str) -> str:
    shown = "; ".join(list(skipped.values())[:ROWS_SHOWN])
    more = f"; and {len(skipped) - ROWS_SHOWN} more" if len(skipped) > ROWS_SHOWN else ""
    return f"{len(skipped)} {one if len(skipped) == 1 else many}: {shown}{more}"
