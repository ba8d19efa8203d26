"""Converts, cleans and splits data files. Knows rows and files, no tokenizer.

Each function writes its result atomically, and reports what it changed or dropped.
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
    """What happened to the rows.

    Attributes:
        rows: Number of rows read.
        written: Number of rows written, by path.
        dropped: Number of rows dropped, by the code of the fault.
        cleaned: Number of rows whose text was changed.
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
    """Writes the rows of files in another format. The suffix of `out` decides the file type.

    Args:
        files: Data files.
        out: Output file.
        to: Output format.
        format: Format of the input rows; None detects it per row.
        bad_rows: `refuse` raises if a row is invalid or `to` cannot represent it, `skip` drops it.
        unpair: Write each pair as two unpaired rows.

    Raises:
        DataError: A file cannot be read, rows are invalid, or `to` is read-only. Then nothing is written.
    """
    write = to.write
    if write is None:
        written = ", ".join(name for name, one in FORMATS.items() if one.write)
        raise DataError(f"the format {to.name!r} can only be read, not written: choose one of {written}")
    check_outputs(files, out)
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


def check_outputs(files: Sequence[Path], *outs: Path) -> None:
    """Raises DataError if an output cannot be written, or is an input or another output.

    An input is never replaced: the rows that are left out would be lost, and `split` reads its files several times.
    """
    for index, out in enumerate(outs):
        check_name(out)
        if any(Path(path).exists() and out.exists() and Path(path).samefile(out) for path in files):
            raise DataError(f"{out} is also an input: write to another file, so that no row is lost.")
        if any(out.absolute() == other.absolute() for other in outs[:index]):
            raise DataError(f"{out} is given for two outputs. Choose another name for one of them.")


def _refuse(change: Change, bad_rows: str, what: str) -> None:
    count = change.dropped.total() - change.dropped["tie"]  # a tie is valid and has nothing to write
    if change.rows and change.dropped["tie"] == change.rows:
        raise DataError(f"all {change.rows} rows are ties, which say no preference. Use data with a winner.")
    if count and (bad_rows == "refuse" or count == change.rows):
        more = [f"  and {count - len(change.faults)} more"] if count > len(change.faults) else []
        verb = "is invalid or" if count == 1 else "are invalid or"
        raise DataError(
            "\n".join(
                [f"{count} of {change.rows} rows {verb} {what}:", *(f"  {line}" for line in change.faults), *more]
            )
            + "\nCorrect them, choose another format, or skip them with bad_rows=skip."
        )


def columns_of(format: Format) -> list[str]:
    """Returns all fields that a format can write, as columns of a table; empty if it cannot be written."""
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
    """Writes the usable rows in their own format, without duplicates and without tokens of chat templates.

    Args:
        files: Data files.
        out: Output file.
        strategy: Training strategy.
        format: Row format; None detects it per row.

    Raises:
        DataError: A file cannot be read at all, or no row is left.
    """
    check_outputs(files, out)
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
                    change.drop("duplicate", f"{place}: a duplicate pair")
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
    """Splits rows into training and validation so that both have no identical or similar prompts.

    Prompts that differ only in case, spaces and punctuation form a group. Groups are drawn by a hash of their words and the seed
    until validation has its share. Then groups with a prompt similar to one in validation move there, until there are none.
    Rows are written unchanged.

    Args:
        files: Data files.
        train_out: Output file for training.
        validation_out: Output file for validation.
        share: Share of rows for validation, between 0 and 1.
        seed: Random seed.
        format: Row format; None detects it per row.

    Raises:
        DataError: A row is invalid, the share is not possible, or a file cannot be read. Then nothing is written.
    """
    if not 0 < share < 1:
        raise DataError(f"share={share} is out of range: expected a number between 0 and 1, such as 0.1")
    check_outputs(files, train_out, validation_out)
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
            f"{total} rows with {len(sizes)} different prompts cannot be split with share={share}: use another share, or more data"
        )
    _gather_near(files, format, seed, held)
    if len(held) == len(sizes):
        raise DataError("all prompts are nearly identical, so they cannot be split: use more varied data")
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
    """A hash that is the same on every machine and in every run, unlike hash()."""
    words = " ".join(prompt_words(row)) or "\n".join(turn.content for turn in row.prompt)
    return hashlib.blake2b(words.encode(), digest_size=12, key=str(seed).encode()).digest()
