"""Checks preference data: row by row while reading, then as a whole. Knows rows and rules, no tokenizer.

Memory is bounded: only the `Facts` of a row are kept.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from itertools import repeat
from operator import eq
from pathlib import Path
from typing import Any

from palate_recipes.preferences import heuristics
from palate_recipes.preferences.files import Container, open_container
from palate_recipes.preferences.formats import FORMATS, KNOWN_FIELDS, REJECTED, Format, detect, read_row, shape_of
from palate_recipes.preferences.formats.fields import OTHER_PROMPTS, Raw, listed
from palate_recipes.preferences.messages import gives_tools, quoted, weights
from palate_recipes.preferences.near_duplicates import NearIndex
from palate_recipes.preferences.report import PLACES_SHOWN, Location, Report
from palate_recipes.preferences.row import Row, RowFaults, Strategy
from palate_recipes.preferences.statistics import Facts, histogram, percentiles

FEW_ROWS, MANY_ROWS = 100, 100_000
"""Usual number of rows for DPO, from the published guidance of several platforms."""

WRONG_KEPT = 10_000
_COLUMNS_KEPT = 40
_NAMES_SHOWN = 12

_LENGTH_BIAS, _BIAS_ROWS = 0.7, 50
_OUTLIER, _OUTLIER_CHARACTERS = 20, 4000

_NEARLY = 8
"""Maximum difference in length of answers that can differ only in punctuation."""

_SAMPLE_ALL, _SAMPLE_EVERY = 500, 1000
"""Heuristics run on the first rows, then on every n-th."""

MARKS = re.compile(
    r"<\|(?:im_start|im_end|im_sep|eot_id|start_header_id|end_header_id|begin_of_text|end_of_text|endoftext|user|assistant|system"
    r"|end|eom_id|END_OF_TURN_TOKEN|START_OF_TURN_TOKEN)\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</s>\Z"
)
"""Special tokens of chat templates (ChatML, Llama 2 and 3, Mistral, Gemma, Phi, Zephyr, Command R)."""


class Linter:
    """Checks files one after the other and collects findings.

    Args:
        strategy: Training strategy; None accepts pairs, unpaired rows and answers.
        format: Row format; None detects it per row.
        against: Prompts of the validation data, to find training rows that repeat them.

    Attributes:
        report: Findings so far.
        prompts: Prompts of the files that were read with `index_prompts`.
        wrong: File, number and error of the first WRONG_KEPT invalid rows.
        wrong_rows: Total number of invalid rows.
        left_out: File, number and reason of the first WRONG_KEPT valid rows that say no preference.
    """

    def __init__(
        self, strategy: Strategy | None = "dpo", *, format: Format | None = None, against: NearIndex | None = None
    ) -> None:
        self.report = Report([], strategy or "any")
        self.prompts = NearIndex()
        self.wrong: list[tuple[str, int, str]] = []
        self.wrong_rows = 0
        self.left_out: list[tuple[str, int, str]] = []
        self._strategy, self._format, self._against = strategy, format, against
        self._starts: list[tuple[int, str, str]] = []  # first index of each file, its name, its unit
        self._facts = Facts()
        self._count = 0
        self._unread: Counter[str] = Counter()
        self._tools = 0
        self._languages: Counter[str] = Counter()
        self._passed_over: Counter[str] = Counter()  # the worse answers that SFT does not read, by field
        self._read_as: Counter[tuple[str, str]] = (
            Counter()
        )  # fields whose names differ from known ones in case or blanks
        self._foreign: Counter[tuple[str, ...]] = Counter()  # fields of rows of no known format

    def read(self, file: str | Path | Container, *, name: str | None = None, index_prompts: bool = False) -> None:
        """Checks every row of a file.

        Args:
            file: Path, or an opened container.
            name: Name of the file in findings; default: its path.
            index_prompts: Add its prompts to `prompts`, to check other files against them.

        Raises:
            DataError: The file cannot be read at all.
        """
        container = file if isinstance(file, Container) else open_container(file)
        name = name or str(container.path)
        report, unit = self.report, container.unit
        self._begin(name, unit)
        if container.byte_order_mark:
            report.add("byte-order-mark", Location(name, 0, unit, "", "begins with a byte-order mark"))
        total = 0
        # For speed: most rows have the same fields as the previous row, so runs of equal rows are counted.
        shapes: Counter[tuple[str, ...]] = Counter()
        shape: tuple[str, ...] = ("",)
        run = 0
        renamed = False
        plain = self._against is None and not index_prompts and self._format is None and self._strategy in ("dpo", None)
        for block in container.raw_blocks():
            if plain and (fields := self._take_plain(block, name, unit)):
                total += len(block)
                shapes[fields] += len(block)
                continue
            for number, value in block:
                total += 1
                try:
                    form = self._format or detect(value, self._strategy) if type(value) is dict else None
                    row = read_row(value, number, strategy=self._strategy, format=form)
                except RowFaults as error:
                    self._note_wrong(error, number, name, unit)
                    if error.faults[0].code in ("unknown-format", "missing-field") and type(value) is dict:
                        self._note_foreign(tuple(value)[:_COLUMNS_KEPT])
                    continue
                fields = (form.name, *value)  # type: ignore[union-attr]
                if fields != shape:
                    shapes[shape] += run
                    shape, run = fields, 0
                    renamed = form.name != "columns" and not shape_of(value).exact  # type: ignore[union-attr]
                run += 1
                read = shape_of(value).renamed(value) if renamed else value
                if "input" in read or "tools" in read or "functions" in read:
                    self._tools += gives_tools(read)
                if form.name != "pai":  # type: ignore[union-attr]
                    for field, what in weights(read):
                        report.add("unread-weight", Location(name, number, unit, field, what))
                self._look(row, name, unit, value)
                if index_prompts:
                    self.prompts.add(row, Location(name, number, unit, "", ""))
        if not total:
            report.add("no-rows", Location(name, 0, unit, "", "has no rows"))
        shapes[shape] += run
        report.rows += total
        report.usable += shapes.total()
        for (form_name, *names), count in shapes.items():
            if count:
                report.formats[form_name] = report.formats.get(form_name, 0) + count
                self._judge_names(form_name, names, count)

    def _judge_names(self, form_name: str, names: Sequence[str], count: int) -> None:
        """Counts the fields of rows of one shape that are not read, or under another name."""
        reads = form_reads(form_name, self._format)
        others = shape_of(dict.fromkeys(names)).other_names if form_name != "columns" else {}
        for name in names:
            known = others.get(name, name)
            if known not in reads:
                self._unread[known if known in ("tools", "functions") else name] = count
            elif known != name:
                self._read_as[name, known] += count
            if self._strategy == "sft" and known in REJECTED:
                self._passed_over[name] += count

    def _begin(self, name: str, unit: str) -> None:
        self.report.files.append(name)
        self._starts.append((self._count, name, unit))

    def _note_wrong(self, error: RowFaults, number: int, name: str, unit: str) -> None:
        if error.is_tie:
            if len(self.left_out) < WRONG_KEPT:
                self.left_out.append((name, number, f"{unit} {number}: {error}"))
            self.report.add("tie", Location(name, number, unit, error.faults[0].field, error.faults[0].what))
            return
        self.wrong_rows += 1
        if len(self.wrong) < WRONG_KEPT:
            self.wrong.append((name, number, f"{unit} {number}: {error}"))
        for fault in error.faults:
            self.report.add(fault.code, Location(name, number, unit, fault.field, fault.what))

    def _note_foreign(self, fields: tuple[str, ...]) -> None:
        if (
            fields in self._foreign or len(self._foreign) < 2
        ):  # two different rows are not a table, and bound the memory
            self._foreign[fields] += 1

    def _take_plain(self, block: list[tuple[int, Any]], name: str, unit: str) -> tuple[str, ...]:
        """Adds a block of valid rows with three texts at once, in a third of the time. Returns their fields.

        If any row is different or invalid, adds nothing and returns an empty result. The caller then checks each row on its own,
        with the same result.
        """
        try:
            prompts, chosen, rejected = (
                [value[field] for _, value in block] for field in ("prompt", "chosen", "rejected")
            )
        except (KeyError, TypeError):
            return ()
        texts = [*prompts, *chosen, *rejected]
        if (
            set(map(type, texts)) != {str}
            or {len(value) for _, value in block} != {3}
            or not all(stripped := list(map(str.strip, texts)))
        ):
            return ()
        count = len(block)
        if any(map(eq, stripped[count : 2 * count], stripped[2 * count :])):
            return ()
        if any(map(str.startswith, prompts, repeat(OTHER_PROMPTS))):
            return ()
        whole = "".join(texts)
        try:
            whole.encode()
        except UnicodeEncodeError:
            return ()
        marked = "<" in whole or "[" in whole or not whole.isascii()
        numbers = [number for number, _ in block]
        self._facts.keep_all(numbers, prompts, chosen, rejected)
        rows = zip(numbers, prompts, chosen, rejected, strict=True)
        for index, (number, asked, good, bad) in enumerate(rows, start=self._count + 1):
            if marked or abs(len(good) - len(bad)) < _NEARLY:
                self._remark(number, asked, good, bad, name, unit)
            if index <= _SAMPLE_ALL or not index % _SAMPLE_EVERY:
                self._guess(number, asked, good, bad, name, unit)
        self._count += count
        return ("pai", *block[0][1])

    def _look(self, row: Row, name: str, unit: str, value: Raw) -> None:
        number, prompt, chosen, rejected = row
        chosen, rejected = chosen or "", rejected or ""
        asked = prompt[0].content if len(prompt) == 1 else "\n".join([turn.content for turn in prompt])
        self._remark(number, asked, chosen, rejected, name, unit, value)
        self._facts.keep(number, asked, chosen, rejected)
        self._count += 1
        if self._count <= _SAMPLE_ALL or not self._count % _SAMPLE_EVERY:
            self._guess(number, asked, chosen, rejected, name, unit, value)
        if self._against is not None:
            self._compare(row, name, unit)

    def _remark(
        self, number: int, asked: str, chosen: str, rejected: str, name: str, unit: str, value: Raw | None = None
    ) -> None:
        whole = asked + chosen + rejected
        if "<" in whole or "[" in whole or not whole.isascii():
            texts = (("prompt", asked), ("chosen", chosen), ("rejected", rejected))
            self._look_closely(number, texts, name, unit, value)
        if abs(len(chosen) - len(rejected)) < _NEARLY and chosen and rejected and same_words(chosen, rejected):
            (_, good), (field, bad) = part("chosen", value), part("rejected", value)
            what = f"{good} and {bad} differ only in case, spaces or punctuation"
            self.report.add("nearly-same-answers", Location(name, number, unit, field, what))

    def _look_closely(
        self, number: int, texts: tuple[tuple[str, str], ...], name: str, unit: str, value: Raw | None
    ) -> None:
        for field, text in texts:
            if ("<" in text or "[" in text) and (found := MARKS.search(text)):
                there, called = part(field, value)
                what = f"{called} holds {found.group()!r}"
                self.report.add("template-residue", Location(name, number, unit, there, what))
            if "\ufffd" in text:
                there, called = part(field, value)
                self.report.add("damaged-text", Location(name, number, unit, there, f"{called} holds U+FFFD"))

    def _guess(
        self, number: int, asked: str, chosen: str, rejected: str, name: str, unit: str, value: Raw | None = None
    ) -> None:
        self._languages[heuristics.language(f"{asked} {chosen or rejected}")] += 1
        for field, text in (("prompt", asked), ("chosen", chosen), ("rejected", rejected)):
            if text and (found := heuristics.personal_data(text)):
                there, called = part(field, value)
                place = Location(name, number, unit, there, f"{called} seems to hold {found}")
                self.report.add("personal-data", place)

    def _compare(self, row: Row, name: str, unit: str) -> None:
        found = self._against.find(row) if self._against else None
        if found is not None:
            same, place = found
            what = f"the prompt is {'also' if same else 'nearly that'} in {place.file}, {place.unit} {place.row}"
            self.report.add("leakage" if same else "near-leakage", Location(name, row.number, unit, "prompt", what))

    # The whole.

    def finish(self) -> Report:
        """Adds the findings about all rows together, and returns the report."""
        report = self.report
        self._judge_fields()
        self._suggest_columns()
        if len(report.formats) > 1:
            shapes = ", ".join(f"{count} {name}" for name, count in report.formats.items())
            report.add(
                "mixed-formats", Location(", ".join(report.files), 0, "row", "", f"rows of several formats: {shapes}")
            )
        if not self._count:
            return report
        self._find_repeats()
        self._judge_lengths()
        self._judge_count()
        total = self._languages.total()
        known = {name: count for name, count in self._languages.most_common(5) if name and count * 100 >= total}
        if known:
            shares = ", ".join(f"{name} {count / total:.0%}" for name, count in known.items())
            report.add(
                "language", Location(report.files[0], 0, "row", "", f"seems to be in {shares} (of {total:,} rows)")
            )
        return report

    def _judge_fields(self) -> None:
        unread = [field for field in self._unread if field not in ("tools", "functions")]
        tools = self._tools
        for code, what in (
            ("unread-tools", f"`tools` in {tools:,} rows" if tools else ""),
            ("unread-fields", f"not read: {listed(unread, most=_NAMES_SHOWN)}" if unread else ""),
            ("other-names", self._other_names()),
            ("unread-rejected", self._worse_answers()),
        ):
            if what:
                self.report.add(code, Location(self.report.files[0], 0, "row", "", what))

    def _other_names(self) -> str:
        said = [f"{quoted(name)} as `{known}`" for name, known in self._read_as]
        more = f" and {len(said) - _NAMES_SHOWN} more" if len(said) > _NAMES_SHOWN else ""
        return f"read: {', '.join(said[:_NAMES_SHOWN])}{more}" if said else ""

    def _worse_answers(self) -> str:
        return ", ".join(f"`{field}` in {count:,} rows" for field, count in self._passed_over.most_common(2))

    def fields(self) -> list[str]:
        """Returns the fields of the first rows that have no known format."""
        return list(next(iter(self._foreign), ()))

    def columns(self) -> dict[str, str] | None:
        """Returns the columns that most likely have `prompt`, `chosen` and `rejected`, if no row has a known format.

        Only a table qualifies: all its rows have the same fields.
        """
        if self.report.usable or self._format or len(self._foreign) != 1 or self._strategy not in ("dpo", None):
            return None
        (names, count), *_ = self._foreign.items()
        return guess_columns(names) if count == self.wrong_rows else None

    def _suggest_columns(self) -> None:
        found = self.columns()
        if found is None:
            return
        count = 0
        for code in ("unknown-format", "missing-field"):
            if code in self.report.findings:
                count += self.report.findings.pop(code).count
        names = ", ".join(quoted(name) for name in self.fields())
        what = (
            f"the fields are {names}. Read them by name: {shlex.join(['palate', 'data', 'check', *self.report.files])}"
        )
        what += f" {column_flags(found)}"
        self.report.add("unmapped-columns", Location(", ".join(self.report.files), 0, "row", "", what))
        self.report.findings["unmapped-columns"].count = count

    def _find_repeats(self) -> None:
        self._add("duplicate", *self._facts.repeats(), "the same pair as {}")
        later, first = self._facts.mirrored()
        labels = len(later) and not self._facts.sizes()[later[0], 1:].all()  # one answer with both labels
        self._add(
            "swapped",
            later,
            first,
            "the answer of {}, the other label" if labels else "the same as {}, the answers swapped",
        )

    def _add(self, code: str, rows: Any, others: Any, what: str) -> None:
        for index, other in zip(rows[:PLACES_SHOWN].tolist(), others[:PLACES_SHOWN].tolist(), strict=True):
            self._add_at(code, index, what.format(self._where(other)))
        if len(rows) > PLACES_SHOWN:
            self.report.findings[code].count += len(rows) - PLACES_SHOWN

    def _add_at(self, code: str, index: int, what: str) -> None:
        name, unit = self._file(index)
        self.report.add(code, Location(name, self._facts.number(index), unit, "", what))

    def _file(self, index: int) -> tuple[str, str]:
        return next((name, unit) for start, name, unit in reversed(self._starts) if start <= index)

    def _where(self, index: int) -> str:
        name, unit = self._file(index)
        return f"{unit} {self._facts.number(index)}" + (f" of {name}" if len(self._starts) > 1 else "")

    def _judge_lengths(self) -> None:
        import numpy as np

        prompt, chosen, rejected = self._facts.sizes().T
        for name, lengths in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
            if lengths.any():
                self.report.lengths[name] = percentiles(lengths)
                self.report.histograms[name] = histogram(lengths)
        paired = (chosen > 0) & (rejected > 0) & (chosen != rejected)
        count = int(paired.sum())
        if count:
            share = float((chosen > rejected)[paired].mean())
            self.report.longer_wins = round(share, 4)
            if count >= _BIAS_ROWS and not 1 - _LENGTH_BIAS < share < _LENGTH_BIAS:
                side = "longer" if share > 0.5 else "shorter"
                what = f"the {side} answer is the chosen one in {max(share, 1 - share):.0%} of {count:,} pairs"
                self.report.add("length-bias", Location(self.report.files[0], 0, "row", "", what))
        total = prompt.astype(np.int64) + np.maximum(chosen, rejected)
        middle = float(np.median(total))
        far = np.flatnonzero(total > max(_OUTLIER * middle, _OUTLIER_CHARACTERS))
        for index in far.tolist():
            self._add_at("outlier", index, f"{total[index]:,} characters, the median is {middle:,.0f}")

    def _judge_count(self) -> None:
        rows, files = self.report.usable, ", ".join(self.report.files)
        for code, odd in (("few-rows", rows < FEW_ROWS), ("many-rows", rows > MANY_ROWS)):
            if odd:
                self.report.add(code, Location(files, 0, "row", "", f"{rows:,} {'row' if rows == 1 else 'rows'}"))


def part(name: str, value: Raw | None) -> tuple[str, str]:
    """Returns field and description of a part of a row: a finding names no field that the row does not have."""
    return (name, f"`{name}`") if value is None or name in value else ("", _PARTS[name])


_PARTS = {"prompt": "the prompt", "chosen": "the chosen answer", "rejected": "the rejected answer"}


def form_reads(name: str, given: Format | None) -> frozenset[str]:
    """Returns the fields that a format reads."""
    return (given or FORMATS[name]).reads or KNOWN_FIELDS


_COLUMN_WORDS = {
    "prompt": "prompt question query instruction input text ask user request problem context",
    "chosen": "chosen good better best preferred accepted accept winner win positive pos up like",
    "rejected": "rejected reject bad worse worst other dispreferred lose loser negative neg down dislike",
}


def guess_columns(names: Sequence[str]) -> dict[str, str] | None:
    """Returns the columns of `prompt`, `chosen` and `rejected` by words in their names, or None if that is not clear."""
    found: dict[str, str] = {}
    for part_name, known in _COLUMN_WORDS.items():
        words = known.split()
        split = {
            str(name): re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", str(name)).lower()) for name in names
        }
        fitting = [name for name, parts in split.items() if name not in found.values() and set(parts) & set(words)]
        exact = [name for name in fitting if split[name] == [part_name]]
        if len(exact or fitting) != 1:
            return None
        found[part_name] = (exact or fitting)[0]
    return found


def column_flags(columns: dict[str, str]) -> str:
    """Returns the options of `palate data` that read these columns, quoted for a shell."""
    flags = ["--input-column", f"prompt={columns['prompt']}"]
    for name in ("chosen", "rejected"):
        flags += ["--label-column", f"{name}={columns[name]}"]
    return shlex.join(flags)


_WORD = re.compile(r"\w+")


def same_words(one: str, other: str) -> bool:
    """Whether two texts differ only in case, spaces or punctuation."""
    first, second = (_WORD.search(text.casefold()) for text in (one, other))
    if (first and first.group()) != (second and second.group()):  # for speed: most texts differ at once
        return False
    return normal(one) == normal(other)


def normal(text: str) -> str:
    """Returns the lowercase words of a text, separated by one space, without punctuation."""
    return " ".join(_WORD.findall(text.casefold()))


def check(
    train: Sequence[tuple[Path, str]],
    validation: Sequence[tuple[Path, str]] = (),
    *,
    strategy: Strategy | None = "dpo",
    format: Format | None = None,
) -> Report:
    """Checks training files, and compares them with validation files if given.

    Args:
        train: Path and name of each file.
        validation: The same for validation data. Its rows are checked too; the report has the findings of both.
        strategy: Training strategy; None accepts any.
        format: Row format; None detects it per row.

    Raises:
        DataError: A file cannot be read at all.
    """
    if not validation:
        return read_files(train, strategy=strategy, format=format).finish()
    held_out = read_files(validation, strategy=strategy, format=format, index_prompts=True)
    report = read_files(train, strategy=strategy, format=format, against=held_out.prompts).finish()
    report.join(held_out.finish())
    return report


def read_files(
    files: Sequence[tuple[Path, str]],
    *,
    strategy: Strategy | None = "dpo",
    format: Format | None = None,
    against: NearIndex | None = None,
    index_prompts: bool = False,
) -> Linter:
    """Checks files with one linter.

    Args:
        files: Path and name of each file.
        strategy, format, against: See `Linter`.
        index_prompts: See `Linter.read`.

    Raises:
        DataError: A file cannot be read at all.
    """
    linter = Linter(strategy, format=format, against=against or None)
    for path, name in files:
        linter.read(path, name=name, index_prompts=index_prompts)
    return linter
