"""The rules for preference data, and reports of a check: counts, places, text and JSON. Knows no file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from palate_recipes.text import html_block, html_table, html_text

Level = Literal["error", "warning", "info"]


class Rule(NamedTuple):
    """One rule.

    Attributes:
        level: `error` stops training, `warning` is printed, `info` is informational.
        meaning: Description.
        remedy: How to fix it.
        fix: What `--fix` does with such a row: `drop` it, `clean` its text, or nothing.
    """

    level: Level
    meaning: str
    remedy: str
    fix: Literal["", "drop", "clean"] = ""


_CORRECT = "Correct or remove the row"

RULES: dict[str, Rule] = {
    # The file.
    "broken-json": Rule("error", "broken JSON", "Repair it at the given place", "drop"),
    "not-utf8": Rule("error", "bytes that are not UTF-8", "Save the file as UTF-8", "drop"),
    "broken-table": Rule(
        "error", "a row whose cells do not match the header", "Quote cells that contain separators", "drop"
    ),
    "byte-order-mark": Rule("info", "the file begins with a byte-order mark", "Nothing: it is ignored", "clean"),
    "no-rows": Rule("error", "a file without rows", "Write a JSON array of objects, or one JSON object per line"),
    "mixed-formats": Rule("warning", "rows of several formats in one file", "Convert them with `palate data convert`"),
    # The shape of a row.
    "not-an-object": Rule(
        "error", "a row that is not an object", f"{_CORRECT}: it must be an object with fields", "drop"
    ),
    "unknown-format": Rule("error", "fields that no known format has", "Rename the fields, or map columns", "drop"),
    "unmapped-columns": Rule("error", "columns with names that no format has", "Or rename the columns"),
    "missing-field": Rule("error", "a field is missing", f"{_CORRECT}, or rename the field", "drop"),
    "empty-field": Rule("error", "a field is empty", _CORRECT, "drop"),
    "not-text": Rule("error", "a field that should be text", _CORRECT, "drop"),
    "bad-text": Rule("error", "text that tokenizers cannot encode", "Remove the lone surrogate", "drop"),
    "not-text-content": Rule(
        "error", "an image, audio, video or a tool call", f"{_CORRECT}: Palate trains on text", "drop"
    ),
    "bad-role": Rule("error", "an unknown role", "Use system, user, assistant or tool", "drop"),
    "turn-order": Rule(
        "error",
        "turns in the wrong order",
        "At most one system turn, then alternating user and assistant turns",
        "drop",
    ),
    "different-prompts": Rule(
        "error", "answers to different conversations", "Use the same turns before both answers", "drop"
    ),
    "bad-label": Rule("error", "an invalid label", "Use true or false", "drop"),
    "wrong-kind": Rule(
        "error", "a row that the training strategy cannot use", "Use another training_strategy, or another file", "drop"
    ),
    "ambiguous-format": Rule(
        "error", "fields of several formats", "Name the format with --from, or remove the fields of the others", "drop"
    ),
    "ambiguous-name": Rule(
        "error", "fields whose names differ only in case or blanks", "Rename or remove one of them", "drop"
    ),
    "tie": Rule(
        "warning", "a comparison without a winner, which is left out", "Nothing: it says no preference", "drop"
    ),
    "same-answers": Rule("error", "chosen and rejected are the same", f"{_CORRECT}: it teaches nothing", "drop"),
    # The text of a row.
    "nearly-same-answers": Rule(
        "warning",
        "chosen and rejected differ only in case, spaces or punctuation",
        "Check that the model should learn this difference",
    ),
    "template-residue": Rule(
        "warning", "special tokens of a chat template in the text", "Remove them: the template adds its own", "clean"
    ),
    "damaged-text": Rule(
        "warning", "the replacement character U+FFFD: text was decoded with the wrong encoding", "Export it again"
    ),
    "unread-tools": Rule("warning", "tools, which training ignores", "Remove them, or accept that they are ignored"),
    "unread-weight": Rule(
        "warning",
        "a turn with a weight, which is ignored: all answers have the same weight",
        "Remove turns that should not be trained on",
    ),
    "unread-rejected": Rule(
        "info",
        "worse answers, which training_strategy=sft does not read",
        'To learn from the preference set training_strategy=dpo (hyperparameters={"training_strategy": "dpo"}, `--strategy dpo`)',
    ),
    "other-names": Rule("info", "fields that are read under a name that differs in case or blanks", "Nothing"),
    "unread-fields": Rule("info", "fields that are ignored", "Nothing"),
    # The file as a whole.
    "duplicate": Rule("warning", "a duplicate pair", "Remove it, unless the repetition is meant as a weight", "drop"),
    "swapped": Rule(
        "warning",
        "the same prompt with swapped answers, or an answer with both labels",
        "Decide which is better: the two rows cancel out",
    ),
    "leakage": Rule("warning", "a validation prompt that is in the training data", "Split with `palate data split`"),
    "near-leakage": Rule(
        "warning", "a validation prompt that is similar to one in the training data", "Split with `palate data split`"
    ),
    "length-bias": Rule(
        "warning",
        "length alone predicts which answer is chosen",
        "Balance the lengths, or set ld_alpha, or add sft to loss_type",
    ),
    "outlier": Rule("info", "a row far longer than the others", "Check that it is intended"),
    "few-rows": Rule("info", "fewer rows than DPO usually needs", "100 to 100,000 pairs are the usual range"),
    "many-rows": Rule(
        "info", "more rows than DPO usually needs", "100 to 100,000 pairs are the usual range: a subset may suffice"
    ),
    "personal-data": Rule("info", "possible personal data", "Check that training on it is permitted"),
    "language": Rule("info", "the likely languages of the text", "Check that the base model supports them"),
    # With a tokenizer.
    "no-room": Rule(
        "warning", "the prompt alone fills seq_length", "Raise seq_length, or shorten the prompt: the row is dropped"
    ),
    "same-after-cut": Rule(
        "warning", "chosen and rejected are the same when truncated", "Raise seq_length: the row is dropped"
    ),
    "same-tokens": Rule("warning", "chosen and rejected have the same tokens", "The row is dropped"),
    "cut": Rule("warning", "the end of an answer is truncated", "Raise seq_length"),
}
"""All rules by code."""


PLACES_SHOWN = 5
"""Places listed per finding; the rest is counted."""

_FILES_SHOWN = 5
"""Files named in a notebook; the rest is counted."""

_LENGTHS = {"mean": "mean", "p50": "median", "p95": "95%", "p99": "99%", "max": "longest"}
"""Titles of the statistics in `Report.lengths`."""

_MARKS: dict[Level, str] = {"error": "error", "warning": "warning", "info": "note"}


class Location(NamedTuple):
    """Place of a finding.

    Attributes:
        file: Name of the file as given.
        row: Number of the row; 0 for the whole file.
        unit: Unit of the number: `line` or `row`.
        field: Field in the row; may be empty.
        what: Description.
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
    """The findings of one rule.

    Attributes:
        code: Rule, a key of RULES.
        count: Number of findings.
        places: The first places.
    """

    code: str
    count: int = 0
    places: list[Location] = field(default_factory=list)

    def add(self, place: Location) -> None:
        self.count += 1
        if len(self.places) < PLACES_SHOWN:
            self.places.append(place)

    def lines(self) -> list[str]:
        """Text: description, count, remedy, then the first places."""
        rule = RULES[self.code]
        if not self._has_rows():
            return [f"{self.title}: {place}. {rule.remedy}." for place in self.places]
        times = f", {self.count} times" if self.count > 1 else ""
        return [
            f"{self.title}: {rule.meaning}{times}. {rule.remedy}.",
            *(f"  {line}" for line in self.place_lines()),
        ]

    @property
    def title(self) -> str:
        """Level and rule, such as `warning[duplicate]`."""
        return f"{_MARKS[RULES[self.code].level]}[{self.code}]"

    def place_lines(self) -> list[str]:
        """Text: the first places; if they are rows, then how many more there are."""
        lines = [str(place) for place in self.places]
        if self._has_rows() and self.count > len(self.places):
            lines.append(f"and {self.count - len(self.places)} more")
        return lines

    def _has_rows(self) -> bool:
        return any(place.row for place in self.places)


@dataclass
class Report:
    """The result of checking one or more files.

    Attributes:
        files: Names of the files.
        strategy: Training strategy.
        rows: Number of rows read.
        usable: Number of rows that training can use.
        formats: Number of rows by format.
        findings: Findings by code.
        lengths: Percentiles by part: `prompt`, `chosen`, `rejected` in characters; with a tokenizer `tokens` in tokens.
        histograms: Rows by length, in equal steps from 0 to the 99th percentile, by part.
        longer_wins: Share of pairs whose chosen answer is the longer one, among pairs of unequal length; None without pairs.
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
        """Adds a finding. Keeps only the first places."""
        found = self.findings.get(code)
        if found is None:
            found = self.findings[code] = Finding(code)
        found.add(place)

    def take(self, part: Report) -> None:
        """Adds the report of another part of the same data, without statistics."""
        for code, found in part.findings.items():
            for place in found.places:
                self.add(code, place)
            self.findings[code].count += found.count - len(found.places)
        for name, count in part.formats.items():
            self.formats[name] = self.formats.get(name, 0) + count
        self.rows += part.rows
        self.usable += part.usable

    def join(self, validation: Report) -> None:
        """Adds the report of validation data, except findings about files as a whole."""
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
        """Number of findings of a level."""
        return sum(found.count for code, found in self.findings.items() if RULES[code].level == level)

    def of(self, *levels: Level) -> list[Finding]:
        """Findings of the given levels, in order of level and rule."""
        order = list(RULES)
        found = [one for code, one in self.findings.items() if RULES[code].level in levels]
        return sorted(found, key=lambda one: (levels.index(RULES[one.code].level), order.index(one.code)))

    def lines(self, levels: Iterable[Level] = ("error", "warning", "info")) -> list[str]:
        """The report as text, ending with a summary."""
        lines = [line for found in self.of(*levels) for line in found.lines()]
        if tokens := self.lengths.get("tokens"):
            lines.append(
                "tokens: median {p50:,}, 95% {p95:,}, maximum {max:,}: seq_length={max} keeps all".format(**tokens)
            )
        lines.append(self.summary())
        return lines

    def summary(self) -> str:
        """Usable rows, format, and numbers of errors and warnings, on one line."""
        shapes = ", ".join(
            f"{name}" if len(self.formats) == 1 else f"{name} {count:,}" for name, count in self.formats.items()
        )
        return (
            f"{self.usable:,} of {self.rows:,} rows are usable ({self.strategy}{f', format {shapes}' if shapes else ''}):"
            f" {_many(self.count('error'), 'error')}, {_many(self.count('warning'), 'warning')}"
        )

    def _repr_html_(self) -> str:
        """The report in a notebook: summary, files, findings with their first places, and lengths."""
        more = len(self.files) - _FILES_SHOWN
        files = ", ".join(self.files[:_FILES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
        findings = [
            (
                found.title,
                f"{found.count:,}",
                RULES[found.code].meaning,
                RULES[found.code].remedy,
                "\n".join(found.place_lines()),
            )
            for found in self.of("error", "warning", "info")
        ]
        lengths = [
            (name, "tokens" if name == "tokens" else "characters", *(f"{found[key]:,}" for key in _LENGTHS))
            for name, found in self.lengths.items()
        ]
        return html_block(
            f"<b>{html_text(self.summary())}</b>",
            f"<div>{html_text(files)}</div>",
            html_table(findings, ("finding", "count", "meaning", "remedy", "places")),
            html_table(lengths, ("length of", "unit", *_LENGTHS.values())),
        )

    def to_json(self) -> dict[str, Any]:
        """The report as JSON."""
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
