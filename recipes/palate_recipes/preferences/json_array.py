"""Streams the values of a JSON array of any size. Knows text, no rows."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from palate_recipes.preferences.limits import Meter, RowTooLarge
from palate_recipes.preferences.row import Fault

_BLOCK = 1 << 20
_LARGEST_VALUE = 1 << 24
_SPACE = re.compile(r"[ \t\r\n]*")

_ADVICE = (
    ("Invalid control character", "", "Write a line break inside a string as \\n."),
    ("Invalid \\escape", "", "Write a backslash inside a string as \\\\."),
    ("Expecting", "'", "Strings need double quotes: write JSON with json.dumps, not with Python's str() or print()."),
    ("Expecting", ("None", "True", "False"), "Use null, true and false in JSON."),
    ("Expecting", ("//", "/*", "#"), "JSON has no comments: remove it."),
    ("Expecting", ("“", "”", "„"), "Strings need straight double quotes."),
    ("Expecting property name", "}", "Remove the comma before the closing '}'."),
    ("Extra data", ",", "Remove the comma after it."),
    ("", "\ufeff", "This is a byte-order mark from a concatenated file: remove it."),
)


def plain(message: str) -> str:
    """Returns a message of the JSON decoder without the trailing preposition."""
    return message.removesuffix(" at").removesuffix(" starting")


def advice(message: str, found: str) -> str:
    """Returns a remedy for an error of the JSON decoder, by its message and the characters there, or ""."""
    for start, characters, remedy in _ADVICE:
        if message.startswith(start) and found.startswith(characters):
            return remedy
    return ""


class JsonArray:
    """A part of an array's text that slides over the file, and the values in it.

    The standard decoder reads one value from a place in a text and says where it ends: so a file of any size takes the memory of
    its largest value.

    Args:
        stream: The array's bytes, from its bracket or the space before it.
        block: Bytes that are read at a time, at least.
        limit: Characters of one value; a broken file must not be read to its end in search of a quote.
        meter: Counts the characters of the values.
    """

    def __init__(
        self, stream: IO[bytes], block: int = _BLOCK, limit: int = _LARGEST_VALUE, meter: Meter | None = None
    ) -> None:
        self._stream = stream
        self._block = block
        self._limit = limit
        self._meter = meter or Meter()
        self._bad: Fault | None = None
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._lines_before = 0
        self._column_before = 0
        self._ended = False
        self.text = ""
        self.at = 0
        self.count = 0

    def values(self) -> Iterator[tuple[int, Any]]:
        """Yields position and value of each; a `Fault` is the last one.

        Raises:
            RowTooLarge: A value has more characters than the limit.
        """
        decoder = json.JSONDecoder()
        self._skip_space()
        self.at += 1  # the opening bracket
        if self._skip_space() == "]":
            yield from self._end()
            return
        while True:
            if self._skip_space() == "]":
                yield self.count + 1, self._broken("Illegal trailing comma before end of array", self.at)
                return
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                if end + 2 >= len(self.text) and self._more():
                    continue  # a number may go on: `1`, `1.`, `1e+`
            except json.JSONDecodeError as error:
                if self._may_be_cut(error.msg, error.pos):
                    self._check_length(len(self.text))
                    if self._more():
                        continue
                yield self.count + 1, self._broken(error.msg, error.pos)
                return
            except RecursionError:
                yield self.count + 1, self._broken("brackets are nested too deeply", self.at)
                return
            except ValueError:  # Python reads no whole number of more than 4300 digits
                yield self.count + 1, self._broken("a number with too many digits", self.at)
                return
            self._check_length(end)
            self.count += 1
            self._meter.held += end - self.at
            yield self.count, value
            self.at = end
            following = self._skip_space()
            if following == "]":
                yield from self._end()
                return
            if following != ",":
                yield self.count + 1, self._broken("Expecting ',' delimiter", self.at)
                return
            self.at += 1

    def line_of(self, position: int) -> int:
        return self._lines_before + self.text.count("\n", 0, position) + 1

    def _end(self) -> Iterator[tuple[int, Any]]:
        self.at += 1
        if self._skip_space() or self._bad is not None:
            yield self.count + 1, self._broken("Extra data", self.at)

    def _may_be_cut(self, message: str, position: int) -> bool:
        return position > len(self.text) - 16 or message.startswith(("Unterminated string", "Invalid \\u"))

    def _check_length(self, end: int) -> None:
        if end - self.at > self._limit:
            hint = "If it should be shorter, a closing quote or bracket is missing. "
            raise RowTooLarge(f"row {self.count + 1}, which begins at line {self.line_of(self.at)}", hint)

    def _more(self) -> bool:
        """Reads more text and drops what is parsed. At the end of the file it drops nothing and returns False."""
        if self._ended:
            return False
        # Read sizes double, so that a long value is parsed again only a few times.
        held = len(self.text) - self.at
        block = self._stream.read(max(self._block, min(held, self._limit - held + 1)))
        bad = b""
        try:
            text = self._decode(block, final=not block)
        except UnicodeDecodeError as error:  # parse the text before it first
            text, bad = error.object[: error.start].decode(), error.object[error.start : error.start + 1]
        self._ended = not block or bool(bad)
        if text or not self._ended:
            self._slide(text)
        if bad:
            what = f"not UTF-8, byte 0x{bad.hex()} at line {self.line_of(len(self.text))}"
            self._bad = Fault("not-utf8", "", what)
        return bool(text) or not self._ended

    def _slide(self, text: str) -> None:
        done = self.text[: self.at]
        self._lines_before += done.count("\n")
        last = done.rfind("\n")
        self._column_before = len(done) - last - 1 if last >= 0 else self._column_before + len(done)
        self.text = self.text[self.at :] + text
        self.at = 0

    def _skip_space(self) -> str:
        """Skips white space. Returns the next character, or "" at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches anywhere
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def _broken(self, message: str, position: int) -> Fault:
        if self._bad is not None and self._may_be_cut(message, position):
            return self._bad
        before = self.text.rfind("\n", 0, position)
        column = position - before if before >= 0 else position + self._column_before + 1
        where = f"line {self.line_of(position)}, column {column}"
        remedy = advice(message, self.text[position : position + 8]) or self._remedy(message)
        return Fault("broken-json", "", f"broken JSON at {where}: {plain(message)}. {remedy}")

    def _remedy(self, message: str) -> str:
        if message.startswith("Extra data"):
            return "Nothing may follow the closing ']': merge the arrays into one."
        if message.startswith("Illegal trailing comma"):
            return "Remove the comma before the closing ']'."
        if message.startswith("a number"):
            return "Write the number as a string, or remove it."
        while self._more():
            self.at = max(0, len(self.text) - _BLOCK)  # only the file's last characters matter
        if not self.text.rstrip().endswith("]"):
            return "The closing ']' is missing: the file may be truncated."
        return "Look for a missing comma or quote, or an extra comma, just before that place."
