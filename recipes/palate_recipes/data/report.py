"""What a check found: counts, first places, and both as text and as JSON. Knows no file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from palate_recipes.data.rules import RULES, Level

PLACES_SHOWN = 5
"""Places that a finding names; the rest is counted."""

_MARKS: dict[Level, str] = {"error": "error", "warning": "warning", "info": "note"}


class Place(NamedTuple):
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
        code: The rule, see `palate_recipes.data.rules`.
        count: How often.
        places: The first of them.
    """

    code: str
    count: int = 0
    places: list[Place] = field(default_factory=list)

    def add(self, place: Place) -> None:
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

    def add(self, code: str, place: Place) -> None:
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
