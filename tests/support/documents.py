"""Reads the Markdown pages of this repository: fenced blocks, links and headings. Knows no Palate."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES.append(ROOT / "recipes" / "examples" / "README.md")
LINKING_PAGES = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "benchmarks").glob("*.md"))]

RUN_MARK = "<!-- run -->"
"""On the line before a block: a test runs it. A comment, so that neither GitHub nor the site shows it."""

_FENCE = re.compile(r"^ *```(?P<language>[\w+-]*)(?P<rest>.*)$")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\((?P<target>[^()\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: The file that holds it.
        line: Number of its first line of content, from 1.
        language: First word behind the fence, or "".
        text: Its content.
        runs: Whether `RUN_MARK` stands before it.
    """

    page: Path
    line: int
    language: str
    text: str
    runs: bool

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def name_of(page: Path) -> str:
    """Returns a page's path from the root, for test ids."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Returns the fenced blocks of a page, in order."""
    found: list[Block] = []
    held: list[str] | None = None
    language, start, previous, runs = "", 0, "", False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if fence and held is None:
            held, language, start, runs = [], fence["language"], number + 1, previous.strip() == RUN_MARK
        elif fence and held is not None:
            found.append(Block(page, start, language, "".join(f"{one}\n" for one in held), runs))
            held = None
        elif held is not None:
            held.append(line)
        previous = line
    if held is not None:
        raise ValueError(f"{name_of(page)}:{start}: the block is never closed")
    return found


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Yields the numbered lines of a page that are in no block."""
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if _FENCE.match(line):
            inside = not inside
        elif not inside:
            yield number, line


def links(page: Path) -> list[tuple[int, str]]:
    """Returns the targets of a page's links, with their lines."""
    return [(number, link["target"]) for number, line in prose(page) for link in _LINK.finditer(_without_code(line))]


def anchors(page: Path) -> set[str]:
    """Returns what a link into a page may name behind its `#`, by GitHub's rule for headings."""
    found: set[str] = set()
    for _, line in prose(page):
        heading = re.match(r"#{1,6} +(.*?)(?: *\{ *#(?P<own>[\w.-]+) *\})?$", line)
        if heading:
            slug = heading["own"] or re.sub(r"[^\w\- ]", "", heading[1].lower()).replace(" ", "-")
            repeated = slug
            number = 0
            while repeated in found:
                number += 1
                repeated = f"{slug}-{number}"
            found.add(repeated)
    return found


def commands(text: str) -> list[list[str]]:
    """Returns the simple commands of shell text as words: comments dropped, lists, pipes and substitutions taken apart."""
    found: list[list[str]] = []
    held = ""
    for line in text.replace("\\\n", " ").splitlines():
        held += line
        try:
            words = _words(held)
        except ValueError:  # a quotation that goes on in the next line
            held += "\n"
            continue
        held = ""
        found.append([])
        for word in words:
            if set(word) <= set("();|&"):
                found.append([])
            else:
                found[-1].append(word)
    # Assignments before a command are not part of it.
    stripped = [_without_assignments(words) for words in found]
    return [words for words in stripped if words]


def _words(text: str) -> list[str]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def _without_assignments(words: list[str]) -> list[str]:
    while words and re.match(r"[A-Z_][A-Z0-9_]*=", words[0]):
        words = words[1:]
    return words


def _without_code(line: str) -> str:
    return re.sub(r"(`+)(?!`).*?\1", "``", line)
