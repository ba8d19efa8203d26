"""What preference data is checked for, as rows, and what a check found: counts, first places, text and JSON. Knows no file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Level = Literal["error", "warning", "info"]


class Rule(NamedTuple):
    """One kind of finding.

    Attributes:
        level: `error` stops a training, `warning` is printed, `info` is worth knowing.
        meaning: What it is, for people.
        remedy: What to do about it.
        fix: What `--fix` does with such a row: `drop` it, `clean` its text, or nothing.
    """

    level: Level
    meaning: str
    remedy: str
    fix: Literal["", "drop", "clean"] = ""


_CORRECT = "Correct or remove the row"

RULES: dict[str, Rule] = {
    # The file.
    "broken-json": Rule("error", "broken JSON", "Repair the place that is named", "drop"),
    "not-utf8": Rule("error", "bytes that are not UTF-8", "Save the file as UTF-8", "drop"),
    "broken-table": Rule(
        "error", "a row whose cells do not fit the header", "Quote cells that hold separators", "drop"
    ),
    "byte-order-mark": Rule("info", "the file begins with a byte-order mark", "Nothing: it is read over", "clean"),
    "no-rows": Rule("error", "a file without rows", "Give it a JSON array of objects, or one JSON object a line"),
    "mixed-formats": Rule("warning", "rows of several formats in one file", "Make them alike: `palate data convert`"),
    # The shape of a row.
    "not-an-object": Rule("error", "a row that is no object", f"{_CORRECT}: each is an object with fields", "drop"),
    "unknown-format": Rule("error", "fields that no known format has", "Rename the fields, or map columns", "drop"),
    "missing-field": Rule("error", "a field is missing", f"{_CORRECT}, or rename the field", "drop"),
    "empty-field": Rule("error", "a field is empty", _CORRECT, "drop"),
    "not-text": Rule("error", "a field that should hold text", _CORRECT, "drop"),
    "bad-text": Rule(
        "error", "text that no tokenizer takes", "Remove the lone surrogate (half of a character)", "drop"
    ),
    "not-text-content": Rule(
        "error", "a turn with an image, audio or a tool call", f"{_CORRECT}: turns hold text", "drop"
    ),
    "bad-role": Rule("error", "a role that is not known", "Use system, user, assistant or tool", "drop"),
    "turn-order": Rule(
        "error", "turns in a wrong order", "At most one system turn, then user and assistant in turn", "drop"
    ),
    "different-prompts": Rule(
        "error", "answers to different conversations", "Give both answers the same turns before them", "drop"
    ),
    "bad-label": Rule("error", "a label that says neither good nor bad", "Use true or false", "drop"),
    "wrong-kind": Rule(
        "error", "a row that the training strategy cannot use", "Use another training_strategy, or another file", "drop"
    ),
    "same-answers": Rule("error", "chosen and rejected are the same", f"{_CORRECT}: it teaches nothing", "drop"),
    # The text of a row.
    "nearly-same-answers": Rule(
        "warning",
        "chosen and rejected differ in case, spaces or punctuation alone",
        "Check that this is what they shall teach",
    ),
    "template-residue": Rule(
        "warning", "a chat template's own marks in the text", "Remove them: the template puts its own", "clean"
    ),
    "damaged-text": Rule(
        "warning", "the replacement character U+FFFD: text was read in a wrong encoding", "Export it anew"
    ),
    "unread-tools": Rule(
        "warning", "tools are given, and not trained on", "Remove them, or keep in mind that they are left out"
    ),
    "unread-weight": Rule(
        "warning",
        "a turn with a weight, which is not read: every answer counts alike",
        "Leave out what shall not be learned",
    ),
    "unread-fields": Rule("info", "fields that are not read", "Nothing"),
    # The file as a whole.
    "duplicate": Rule(
        "warning", "a pair that is there already", "Remove it, or set its weight on purpose by repeating it", "drop"
    ),
    "swapped": Rule(
        "warning",
        "the same prompt with the answers swapped, or an answer called good and bad",
        "Decide which is better: the two rows cancel out",
    ),
    "leakage": Rule(
        "warning", "a validation prompt that is in the training data", "`palate data split` keeps them apart"
    ),
    "near-leakage": Rule(
        "warning", "a validation prompt that is nearly in the training data", "`palate data split` keeps them apart"
    ),
    "length-bias": Rule(
        "warning",
        "length alone tells which answer is chosen",
        "Balance the lengths, or use loss_type with ld_alpha or sft mixed in",
    ),
    "outlier": Rule("info", "a row far longer than the others", "Check that it is no accident"),
    "few-rows": Rule("info", "fewer rows than DPO usually needs", "100 to 100,000 pairs are the usual range"),
    "many-rows": Rule(
        "info", "more rows than DPO usually needs", "100 to 100,000 pairs are the usual range: a good part may do"
    ),
    "personal-data": Rule("info", "what looks like personal data", "Check that it may be trained on"),
    "language": Rule("info", "the languages that the text seems to be in", "Check that the base model speaks them"),
    # With a tokenizer.
    "no-room": Rule(
        "warning", "the prompt alone fills seq_length", "Raise seq_length, or shorten the prompt: the row is left out"
    ),
    "same-after-cut": Rule(
        "warning", "chosen and rejected are the same once cut", "Raise seq_length: the row is left out"
    ),
    "same-tokens": Rule("warning", "chosen and rejected are the same tokens once rendered", "The row is left out"),
    "cut": Rule("warning", "the end of an answer is cut off", "Raise seq_length"),
}
"""Every rule by its code."""


PLACES_SHOWN = 5
"""Places that a finding names; the rest is counted."""

_MARKS: dict[Level, str] = {"error": "error", "warning": "warning", "info": "note"}


class Location(NamedTuple):
    """Where something was found.

    Attributes:
        file: Name of the file, as it was given.
        row: Number of the row, or 0 when it is the file as a whole.
        unit: What the number counts: `line` or `row`.
        field: Field in the row; may be empty.
        what: What is there.
    """

    file: str
    row: int
    unit: str
    field: str
    what: str

    def __str__(self) -> str:
        if not self.row:
            return f"{self.file}: {self.what}"
        return f"{self.file}, {self.unit} {self.row}: {self.what}"


@dataclass
class Finding:
    """One rule's findings.

    Attributes:
        code: The rule, a key of RULES.
        count: How often.
        places: The first of them.
    """

    code: str
    count: int = 0
    places: list[Location] = field(default_factory=list)

    def add(self, place: Location) -> None:
        self.count += 1
        if len(self.places) < PLACES_SHOWN:
            self.places.append(place)

    def lines(self) -> list[str]:
        """For people: what, how often, what to do, then the first places."""
        rule = RULES[self.code]
        if not any(place.row for place in self.places):
            return [f"{_MARKS[rule.level]}[{self.code}]: {place}. {rule.remedy}." for place in self.places]
        times = f", {self.count} times" if self.count > 1 else ""
        lines = [f"{_MARKS[rule.level]}[{self.code}]: {rule.meaning}{times}. {rule.remedy}."]
        lines += [f"  {place}" for place in self.places]
        if self.count > len(self.places):
            lines.append(f"  and {self.count - len(self.places)} more")
        return lines


@dataclass
class Report:
    """What a check found in one or more files.

    Attributes:
        files: Their names.
        strategy: What they were read for.
        rows: Rows read.
        usable: Rows that can be trained on.
        formats: Rows by the name of their format.
        findings: By code, in the order in which the rules stand.
        lengths: Percentiles by part: `prompt`, `chosen`, `rejected` in characters; with a tokenizer `tokens` in tokens.
        histograms: Rows by length, in equal steps from 0 to the 99th percentile, by part.
        longer_wins: Share of pairs whose longer answer is the chosen one, among pairs of unequal length; None without pairs.
    """

    files: list[str]
    strategy: str
    rows: int = 0
    usable: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    histograms: dict[str, list[int]] = field(default_factory=dict)
    longer_wins: float | None = None

    def add(self, code: str, place: Location) -> None:
        """Counts one place; keeps the first few."""
        found = self.findings.get(code)
        if found is None:
            found = self.findings[code] = Finding(code)
        found.add(place)

    def take(self, part: Report) -> None:
        """Adds what was found in a further part of the same data; the statistics of the whole are made afterwards."""
        for code, found in part.findings.items():
            for place in found.places:
                self.add(code, place)
            self.findings[code].count += found.count - len(found.places)
        for name, count in part.formats.items():
            self.formats[name] = self.formats.get(name, 0) + count
        self.rows += part.rows
        self.usable += part.usable

    def join(self, validation: Report) -> None:
        """Adds what was found in held-out data; what is said of a file as a whole is said of the training data alone."""
        for code, found in validation.findings.items():
            for place in found.places:
                if place.row:
                    self.add(code, place)
            if code in self.findings:
                self.findings[code].count += found.count - len(found.places)
        self.files += validation.files
        self.rows += validation.rows
        self.usable += validation.usable

    def count(self, level: Level) -> int:
        """How many places there are of a level."""
        return sum(found.count for code, found in self.findings.items() if RULES[code].level == level)

    def of(self, *levels: Level) -> list[Finding]:
        """Findings of some levels, errors first."""
        order = list(RULES)
        found = [one for code, one in self.findings.items() if RULES[code].level in levels]
        return sorted(found, key=lambda one: (levels.index(RULES[one.code].level), order.index(one.code)))

    def lines(self, levels: Iterable[Level] = ("error", "warning", "info")) -> list[str]:
        """The report for people, a summary last."""
        lines = [line for found in self.of(*levels) for line in found.lines()]
        if tokens := self.lengths.get("tokens"):
            lines.append(
                "tokens: {p50:,} in the middle, {p95:,} at 95%, {max:,} at most: seq_length={max} keeps all".format(
                    **tokens
                )
            )
        shapes = ", ".join(
            f"{name}" if len(self.formats) == 1 else f"{name} {count:,}" for name, count in self.formats.items()
        )
        lines.append(
            f"{self.usable:,} of {self.rows:,} rows can be trained on ({self.strategy}{f', format {shapes}' if shapes else ''}):"
            f" {_many(self.count('error'), 'error')}, {_many(self.count('warning'), 'warning')}"
        )
        return lines

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "files": self.files,
            "strategy": self.strategy,
            "rows": self.rows,
            "usable_rows": self.usable,
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "formats": self.formats,
            "lengths": self.lengths,
            "histograms": self.histograms,
            "longer_wins": self.longer_wins,
            "findings": [
                {
                    "code": found.code,
                    "level": RULES[found.code].level,
                    "meaning": RULES[found.code].meaning,
                    "remedy": RULES[found.code].remedy,
                    "count": found.count,
                    "places": [place._asdict() for place in found.places],
                }
                for found in self.of("error", "warning", "info")
            ],
        }


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
