"""From data files to new ones: another format, a clean copy, a part held out. Knows rows and files, no tokenizer.

Each writes its result whole or not at all, and says what it changed or left out.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palate_recipes.errors import DataError
from palate_recipes.preferences.check import MARKS
from palate_recipes.preferences.files import open_container
from palate_recipes.preferences.formats import FORMATS, Format, read_row, unpaired
from palate_recipes.preferences.load import ROWS_SHOWN
from palate_recipes.preferences.near_duplicates import NearIndex, prompt_words
from palate_recipes.preferences.report import Location
from palate_recipes.preferences.row import Message, Row, RowFaults, Strategy
from palate_recipes.preferences.writing import check_name, write_rows

_MOST_PASSES = 8


@dataclass
class Change:
    """What became of the rows.

    Attributes:
        rows: Read.
        written: Rows in each file that was written, by its path.
        dropped: Rows left out, by the code of their fault.
        cleaned: Rows whose text was changed.
        faults: The first faults, as text.
    """

    rows: int = 0
    written: dict[str, int] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    cleaned: int = 0
    faults: list[str] = field(default_factory=list)

    def drop(self, code: str, place: str) -> None:
        self.dropped[code] += 1
        if len(self.faults) < ROWS_SHOWN:
            self.faults.append(place)


def convert(
    files: Sequence[Path],
    out: Path,
    to: Format,
    *,
    format: Format | None = None,
    bad_rows: str = "refuse",
    unpair: bool = False,
) -> Change:
    """Writes the rows of some files in another format; the container is what the name of `out` says.

    Args:
        files: Data files.
        out: The file to write.
        to: The format to write.
        format: Of the rows; each row's own fields decide when None.
        bad_rows: `refuse` ends with an error when a row is wrong or `to` cannot hold it, `skip` leaves it out.
        unpair: Make two unpaired rows of each pair.

    Raises:
        DataError: A file cannot be read, rows are wrong, or `to` is not written; nothing is written then.
    """
    write = to.write
    if write is None:
        written = ", ".join(name for name, one in FORMATS.items() if one.write)
        raise DataError(f"the format {to.name!r} is read, not written: choose one of {written}")
    check_name(out)
    change = Change()

    def converted() -> Iterator[dict[str, Any]]:
        for path in files:
            container = open_container(path)
            for number, value in container.raw_rows():
                change.rows += 1
                try:
                    row = read_row(value, number, strategy=None, format=format)
                    raws = [write(one) for one in (unpaired(row) if unpair else [row])]
                except RowFaults as error:
                    change.drop(error.faults[0].code, f"{path}, {container.unit} {number}: {error}")
                    continue
                yield from raws
        _refuse(change, bad_rows, f"cannot be written as {to.name}")

    change.written[str(out)] = write_rows(out, converted(), columns=columns_of(to))
    return change


def _refuse(change: Change, bad_rows: str, what: str) -> None:
    count = change.dropped.total()
    if count and (bad_rows == "refuse" or count == change.rows):
        more = [f"  and {count - len(change.faults)} more"] if count > len(change.faults) else []
        verb = "is wrong or" if count == 1 else "are wrong or"
        raise DataError(
            "\n".join(
                [f"{count} of {change.rows} rows {verb} {what}:", *(f"  {line}" for line in change.faults), *more]
            )
            + "\nCorrect them, choose another format, or leave them out with bad_rows=skip."
        )


def columns_of(format: Format) -> list[str]:
    """Returns every field that a format may write, for tables; empty when it writes none."""
    turns = (Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    names: dict[str, None] = {}
    for prompt in (turns, turns[1:], (turns[0], turns[3]), turns[3:]):
        for chosen, rejected in (("d", "e"), ("d", None)):
            try:
                names.update(dict.fromkeys(format.write(Row(1, prompt, chosen, rejected)) if format.write else ()))
            except RowFaults:
                continue
    return list(names)


def clean(
    files: Sequence[Path], out: Path, *, strategy: Strategy | None = "dpo", format: Format | None = None
) -> Change:
    """Writes the rows that can be trained on, each in the format it has, without repeats and without a chat template's marks.

    Args:
        files: Data files.
        out: The file to write.
        strategy: What the rows are for.
        format: Of the rows; each row's own fields decide when None.

    Raises:
        DataError: A file cannot be read at all, or no row is left.
    """
    check_name(out)
    change = Change()
    seen: set[int] = set()

    def cleaned() -> Iterator[dict[str, Any]]:
        for path in files:
            container = open_container(path)
            for number, value in container.raw_rows():
                change.rows += 1
                place = f"{path}, {container.unit} {number}"
                try:
                    row = read_row(value, number, strategy=strategy, format=format)
                    if _has_marks(row):
                        value = _without_marks(value)
                        row = read_row(value, number, strategy=strategy, format=format)
                        change.cleaned += 1
                except RowFaults as error:
                    change.drop(error.faults[0].code, f"{place}: {error}")
                    continue
                key = hash(row[1:])
                if key in seen:
                    change.drop("duplicate", f"{place}: a pair that is there already")
                    continue
                seen.add(key)
                yield value
        if not seen:
            raise DataError(f"{out}: no row is left to write.\n" + "\n".join(f"  {line}" for line in change.faults))

    change.written[str(out)] = write_rows(out, cleaned())
    return change


def _has_marks(row: Row) -> bool:
    return any(
        MARKS.search(text) for text in (*(turn.content for turn in row.prompt), row.chosen or "", row.rejected or "")
    )


def _without_marks(value: Any) -> Any:
    if isinstance(value, str):
        return MARKS.sub("", value).strip() if MARKS.search(value) else value
    if isinstance(value, dict):
        return {key: _without_marks(item) for key, item in value.items()}
    return [_without_marks(item) for item in value] if isinstance(value, list) else value


def split(
    files: Sequence[Path],
    train_out: Path,
    validation_out: Path,
    *,
    share: float = 0.1,
    seed: int = 0,
    format: Format | None = None,
) -> Change:
    """Parts rows into training and validation so that no prompt is on both sides, word for word or nearly.

    Prompts that are the same but for case, spaces and punctuation form a group; groups are drawn by a hash of their words and the
    seed until validation has its share. Then each group with a prompt near one of validation's moves there, until none is left.
    Rows are written as they are.

    Args:
        files: Data files.
        train_out: Receives most.
        validation_out: Receives the others.
        share: Of the rows, between 0 and 1.
        seed: Draws others.
        format: Of the rows; each row's own fields decide when None.

    Raises:
        DataError: A row is wrong, the share cannot be had, or a file cannot be read; nothing is written then.
    """
    if not 0 < share < 1:
        raise DataError(f"the share of validation is {share}: give a number between 0 and 1, such as 0.1")
    for out in (train_out, validation_out):
        check_name(out)
    change = Change()
    sizes: Counter[bytes] = Counter()
    for row, _ in _rows(files, format, change):
        sizes[_group(row, seed)] += 1
    _refuse(change, "refuse", "cannot be split")
    total = sizes.total()
    held: set[bytes] = set()
    count = 0
    for group in sorted(sizes):
        if count + sizes[group] / 2 > share * total:
            break
        held.add(group)
        count += sizes[group]
    if not held or len(held) == len(sizes):
        raise DataError(
            f"{total} rows with {len(sizes)} different prompts cannot be split at {share}: give another share, or more data"
        )
    _gather_near(files, format, seed, held)
    if len(held) == len(sizes):
        raise DataError("all prompts are nearly the same: no part of them can be held out")
    for out, wanted in ((train_out, False), (validation_out, True)):
        chosen = (value for row, value in _rows(files, format, Change()) if (_group(row, seed) in held) is wanted)
        change.written[str(out)] = write_rows(out, chosen)
    return change


def _gather_near(files: Sequence[Path], format: Format | None, seed: int, held: set[bytes]) -> None:
    new = set(held)
    for _ in range(_MOST_PASSES):
        index = NearIndex()
        for row, _ in _rows(files, format, Change()):
            if _group(row, seed) in new:
                index.add(row, Location("", row.number, "row", "", ""))
        new = {
            group
            for row, _ in _rows(files, format, Change())
            if (group := _group(row, seed)) not in held and index.find(row) is not None
        }
        if not new:
            return
        held |= new


def _rows(files: Sequence[Path], format: Format | None, change: Change) -> Iterator[tuple[Row, dict[str, Any]]]:
    for path in files:
        container = open_container(path)
        for number, value in container.raw_rows():
            change.rows += 1
            try:
                yield read_row(value, number, strategy=None, format=format), value
            except RowFaults as error:
                change.drop(error.faults[0].code, f"{path}, {container.unit} {number}: {error}")


def _group(row: Row, seed: int) -> bytes:
    """The same on every machine and in every run."""
    words = " ".join(prompt_words(row)) or "\n".join(turn.content for turn in row.prompt)
    return hashlib.blake2b(words.encode(), digest_size=12, key=str(seed).encode()).digest()
