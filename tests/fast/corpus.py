"""Malformed data files, one row each: what the file is, and what must be said of it. Containers here, rows in `corpus_rows`."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
from typing import Any, NamedTuple

from palate_recipes.preferences.row import Strategy


class Case(NamedTuple):
    """One malformed file.

    Attributes:
        id: What is wrong with it.
        content: Its bytes, or what makes them (where that needs pyarrow).
        code: The finding's rule; empty when the file cannot be read at all.
        row: Number that the finding names, 0 when it is of the whole file.
        field: Field that it names.
        words: Words of the message, apart by ` … `.
        name: Of the file.
        strategy: What it is read for.
        against: Validation data, for rules about both.
    """

    id: str
    content: bytes | Callable[[], bytes]
    code: str
    row: int = 0
    field: str = ""
    words: str = ""
    name: str = "prefs.json"
    strategy: Strategy = "dpo"
    against: bytes | None = None


GOOD: dict[str, Any] = {"prompt": "What is up there?", "chosen": "The blue sky.", "rejected": "A floor of stone."}
TEXT = json.dumps(GOOD)


def array(*rows: Any) -> bytes:
    return json.dumps(rows).encode()


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def many(count: int, **fields: Callable[[int], str]) -> list[dict[str, str]]:
    """Good rows that differ from each other, two words a row."""
    texts = {
        "prompt": lambda n: f"Ask {n:x}",
        "chosen": lambda n: f"Yes {n:x}" + "." * (n % 2),
        "rejected": lambda n: f"No {n:x} at",
    }
    return [{name: make(n) for name, make in (texts | fields).items()} for n in range(count)]


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def _arrow(rows: list[dict[str, Any]], *, stream: bool = False) -> bytes:
    import pyarrow

    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _zstd(content: bytes) -> bytes:
    import pyarrow

    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


def _not_utf8_parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column, "chosen": ["a"], "rejected": ["b"]}), sink)
    return sink.getvalue()


_SHORT = {**GOOD, "rejected": None}
_CSV = "prompt,chosen,rejected\n"
_LATIN = TEXT.replace("blue", "bleu café").encode("latin-1")
_ZIPPED = gzip.compress(array(GOOD), mtime=0)
_BROKEN = "broken-json"
_DEEP = "[" * 100_000


def _json(id: str, text: str | bytes, words: str, row: int = 1, code: str = _BROKEN, name: str = "prefs.json") -> Case:
    return Case(id, text.encode() if isinstance(text, str) else text, code, row, "", words, name)


# fmt: off
FILES = [
    # Nothing to read.
    Case("zero bytes", b"", "", words="is empty … JSON array"),
    Case("space alone", b" \n\t\n", "", words="is empty"),
    Case("byte-order mark alone", b"\xef\xbb\xbf", "", words="is empty"),
    Case("no rows in an array", b"[]", "no-rows", words="no row"),
    Case("no rows in a table", _CSV.encode(), "no-rows", words="no row", name="prefs.csv"),
    Case("head of Parquet alone", b"PAR1", "", words="damaged … Export it again", name="prefs.parquet"),
    Case("nothing in gzip", gzip.compress(b""), "", words="is empty", name="prefs.json.gz"),
    # Not what its name says.
    Case("zip archive", b"PK\x03\x04\x14\x00\x06\x00", "", words="ZIP archive or an Excel … CSV", name="prefs.xlsx"),
    Case("pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "", words="git lfs pull"),
    Case("web page", b"<!DOCTYPE html><html><title>Sign in</title></html>", "", words="HTML … Download the file"),
    Case("bzip2", bz2.compress(array(GOOD)), "", words="bzip2 … gzip", name="prefs.json.bz2"),
    Case("xz", lzma.compress(array(GOOD)), "", words="xz … gzip", name="prefs.json.xz"),
    Case("PDF", b"%PDF-1.7\n", "", words="a PDF … Export"),
    Case("UTF-16 with its mark", TEXT.encode("utf-16"), "", words="UTF-16 … Save the file as UTF-8"),
    Case("UTF-16 big end first", b"\xfe\xff" + TEXT.encode("utf-16-be"), "", words="UTF-16"),
    Case("UTF-16 without its mark", array(GOOD).decode().encode("utf-16-le"), "", words="UTF-16"),
    Case("UTF-32", TEXT.encode("utf-32-be"), "", words="binary"),
    Case("UTF-16 table", (_CSV + "a,b,c\n").encode("utf-16"), "", words="UTF-16", name="prefs.csv"),
    Case("UTF-16 in gzip", gzip.compress(TEXT.encode("utf-16")), "", words="UTF-16", name="prefs.json.gz"),
    # Packed, and damaged.
    Case("cut gzip", _ZIPPED[:-12], "", words="cannot be read … gzip data is damaged or truncated", name="a.json.gz"),
    Case("cut gzip of lines", gzip.compress(lines(GOOD))[:-9], "", words="gzip data is", name="prefs.jsonl.gz"),
    Case("gzip, wrong sum", _ZIPPED[:-8] + bytes(8), "", words="CRC … copy the file again", name="prefs.json.gz"),
    Case("gzip, wrong bits", _ZIPPED[:14] + b"\xff" * 9 + _ZIPPED[23:], "", words="gzip data is", name="prefs.gz"),
    Case("gzip head alone", b"\x1f\x8b", "", words="gzip data is damaged", name="prefs.json.gz"),
    Case("cut zstd", lambda: _zstd(array(GOOD))[:-9], "", words="zstd data is damaged", name="prefs.json.zst"),
    Case("zstd, wrong bits", b"\x28\xb5\x2f\xfd" + b"\xff" * 30, "", words="zstd data is", name="prefs.json.zst"),
    Case("fault in gzip", gzip.compress(array(GOOD, _SHORT)), "not-text", 2, "rejected", "row 2", "prefs.json.gz"),
    Case("fault in gzip lines", gzip.compress(lines(GOOD, 4)), "not-an-object", 2, "", "line 2", "prefs.jsonl.gz"),
    Case("fault in zstd", lambda: _zstd(array(GOOD, _SHORT)), "not-text", 2, "rejected", "null", "prefs.json.zst"),
    Case("fault in zstd lines", lambda: _zstd(lines(GOOD, _SHORT)), "not-text", 2, "rejected", "null", "a.jsonl.zst"),
    Case("fault in zstd table", lambda: _zstd(b"prompt,chosen,rejected\na,b\n"),
         "broken-table", 1, "", "2 cells", "a.csv.zst"),
    # A JSON array that is none.
    _json("comma after the last row", f"[{TEXT},\n]", "line 2, column 1 … trailing comma … Remove the comma", 2),
    _json("comma after the last field", f"[{TEXT[:-1]},}}]", "column … Remove the comma before the closing '}'"),
    _json("no comma between rows", f"[{TEXT}\n{TEXT}]", "line 2, column 1: Expecting ',' … missing comma", 2),
    _json("no comma between fields", '[{"prompt": "a" "chosen": "b"}]', "line 1, column 17 … missing comma or quote"),
    _json("no closing bracket", f"[{TEXT}", "The closing ']' is missing … truncated", 2),
    _json("cut in a text", f'[{TEXT},\n{{"prompt": "a, b', "line 2 … closing ']' is missing", 2),
    _json("cut behind a comma", f"[{TEXT},", "closing ']' is missing", 2),
    _json("opening bracket alone", "[", "closing ']' is missing"),
    _json("bracket too many", f"[{TEXT}]]", "Extra data … Nothing may follow", 2),
    _json("two arrays", f"[{TEXT}]\n[{TEXT}]", "line 2, column 1: Extra data … merge the arrays", 2),
    _json("lines behind an array", f"[{TEXT}]\n{TEXT}\n", "Extra data", 2),
    _json("single quotes", str([GOOD]), "column 3 … double quotes … json.dumps"),
    _json("single quotes around a value", "[{\"prompt\": 'a'}]", "double quotes … json.dumps"),
    _json("None", '[{"prompt": None}]', "Use null"),
    _json("True", '[{"prompt": "a", "completion": "b", "label": True}]', "Use null, true and false"),
    _json("undefined", '[{"prompt": undefined}]', "line 1, column 13"),
    _json("comment above the rows", f"[\n// mine\n{TEXT}]", "line 2, column 1 … JSON has no comments"),
    _json("comment behind a row", f"[{TEXT}, # mine\n{TEXT}]", "JSON has no comments", 2),
    _json("field without quotes", '[{prompt: "a"}]', "property name enclosed in double quotes"),
    _json("curly quotes", "[{“prompt”: “a”}]", "straight double quotes"),
    _json("line break in a text", '[{"prompt": "a\nb"}]', "Invalid control character … a line break"),
    _json("backslash of a path", r'[{"prompt": "C:\my\x"}]', "Invalid \\escape … a backslash"),
    _json("cut escape", r'[{"prompt": "\u12"}]', "Invalid \\uXXXX"),
    _json("colon missing", '[{"prompt" "a"}]', "Expecting ':'"),
    _json("brackets without end", _DEEP, "nested too deeply"),
    _json("number of many digits", f"[{'9' * 5000}]", "too many digits … Write the number as a string"),
    _json("byte-order mark in the middle", f"[{TEXT},\ufeff{TEXT}]", "byte-order mark … concatenated", 2),
    _json("Latin-1", b"[" + _LATIN + b"]", "not UTF-8, byte 0xe9 at line 1", 1, "not-utf8"),
    _json("Latin-1 in a later row", b"[" + TEXT.encode() + b",\n" + _LATIN + b"]", "at line 2", 2, "not-utf8"),
    _json("cut in a character", f'[{TEXT}, {{"prompt": "é'.encode()[:-1], "byte 0xc3 at line 1", 2, "not-utf8"),
    _json("Latin-1 behind the array", b"[" + TEXT.encode() + b"]\n\xe9", "byte 0xe9 at line 2", 2, "not-utf8"),
    _json("array of numbers", "[1, 2.5e3]", "row 1: is a number, not an object", 1, "not-an-object"),
    _json("array of texts", '["a"]', "row 1: is text, not an object", 1, "not-an-object"),
    _json("array of arrays", '[["a", "b", "c"]]', "row 1: is a list, not an object", 1, "not-an-object"),
    _json("null among the rows", f"[{TEXT}, null]", "row 2: is null", 2, "not-an-object"),
    _json("NaN among the rows", f"[{TEXT}, NaN]", "row 2: is a number", 2, "not-an-object"),
    # JSON lines that are none.
    _json("array that is named lines", f"[{TEXT},\n]", "trailing comma", 2, name="prefs.jsonl"),
    _json("lines that are named array", f"{TEXT}\n{TEXT},\n", "line 2, column 92: Extra data. Remove the comma", 2),
    _json("object over several lines", json.dumps(GOOD, indent=1) * 2, "line 1, column 2 … Write each object on one line"),
    _json("two objects on a line", f"{TEXT}\n{TEXT} {TEXT}\n", "line 2 … Extra data", 2, name="prefs.jsonl"),
    _json("cut last line", f"{TEXT}\n{TEXT[:20]}", "line 2 … Unterminated string", 2, name="prefs.jsonl"),
    _json("Python's lines", f"{TEXT}\n{GOOD}\n", "line 2, column 2 … json.dumps", 2, name="prefs.jsonl"),
    _json("comment between lines", f"{TEXT}\n// next\n", "line 2 … JSON has no comments", 2, name="prefs.jsonl"),
    _json("joined files", f"{TEXT}\n\ufeff{TEXT}\n", "line 2 … byte-order mark", 2, name="prefs.jsonl"),
    _json("Latin-1 line", TEXT.encode() + b"\n\n" + _LATIN, "line 3 … byte 0xe9", 3, "not-utf8", "prefs.jsonl"),
    _json("NUL in a line", f"{TEXT}\n\0{TEXT}\n", "line 2, column 1", 2, name="prefs.jsonl"),
    _json("deep line", f"{TEXT}\n{_DEEP}\n", "line 2: nested too deeply", 2, name="prefs.jsonl"),
    _json("long number in a line", f'{TEXT}\n{{"n": {"9" * 5000}}}\n', "line 2: a number with", 2, name="a.jsonl"),
    _json("text line", f'{TEXT}\n"text"\n', "line 2: is text", 2, "not-an-object", "prefs.jsonl"),
    _json("list line", f"{TEXT}\n[{TEXT}]\n", "line 2: is a list", 2, "not-an-object", "prefs.jsonl"),
    Case("a text file", b"prompt one\nprompt two\n", "", words="its first line is 'prompt one', which is not JSON", name="prefs.txt"),
    Case("one object over lines", json.dumps({"topic": [GOOD]}, indent=1).encode(),
         "", words="one JSON object, not a list"),
    Case("two lists in one object", lines({"data": [{"x": 1}], "rows": [{"x": 2}]}),
         "unknown-format", 1, "", "it has `data`, `rows`"),
    Case("tie", lines(GOOD, {"prompt": "a", "response_a": "b", "response_b": "c", "winner": "tie"}),
         "tie", 2, "winner", "is a tie: `winner` is 'tie'"),
    Case("fields of two formats", lines({"prompt": "a", "response_a": "b", "response_b": "c", "winner": "a", "completions": ["b", "c"],
                               "scores": [1, 2]}), "ambiguous-format", 1, "", "compared or ranked"),
    Case("pairs for SFT", lines(GOOD), "unread-rejected", 0, "", "`rejected` in 1 rows", strategy="sft"),
    Case("byte-order mark", b"\xef\xbb\xbf" + array(GOOD), "byte-order-mark", words="begins with a byte-order mark"),
    Case("byte-order mark of a table", b"\xef\xbb\xbf" + _CSV.encode() + b"a,b,c\n", "byte-order-mark", name="a.csv"),
    # Tables.
    Case("too few cells", f"{_CSV}a,b,c\na,b\n".encode(), "broken-table", 2, "", "2 cells at line 3 … 3", "a.csv"),
    Case("too many cells", f"{_CSV}a,b,c,d\n".encode(), "broken-table", 1, "", "4 cells at line 2", "a.csv"),
    Case("quote in a quoted cell", f'{_CSV}"say "a" b",b,c\n'.encode(), "broken-table", 1, "", "broken CSV", "a.csv"),
    Case("quote without end", f'{_CSV}"a,b,c\nd,e,f\n'.encode(), "broken-table", 1, "", "closing quote is missing", "a.csv"),
    Case("two columns of a name", b"prompt,chosen,chosen\na,b,c\n", "", words="two columns … 'chosen'", name="a.csv"),
    Case("column without name", b",prompt,chosen,rejected\n0,a,b,c\n", "", words="column 1 has no name", name="a.csv"),
    Case("empty cell", f"{_CSV}a,b,\n".encode(), "empty-field", 1, "rejected", "`rejected` is empty", "a.csv"),
    Case("no header", b"a,b,c\nd,e,f\n", "unknown-format", 1, "", "has none of the fields", "a.csv"),
    Case("other header", b"Question,Good,Bad\na,b,c\n", "unmapped-columns", 0, "", "`Good`", "a.csv"),
    Case("capital header", b"Prompt, Chosen,REJECTED\na,b,c\n",
         "other-names", 0, "", "`Prompt` as `prompt`, `Chosen` as `chosen`, `REJECTED` as `rejected`", "a.csv"),
    Case("one name in two cases", b"Prompt,PROMPT,chosen,rejected\na,a,b,c\n",
         "ambiguous-name", 1, "Prompt", "`Prompt` and `PROMPT` differ only in case", "a.csv"),
    Case("empty cell under a capital name", b"Prompt,Chosen,Rejected\na,,c\n",
         "empty-field", 1, "Chosen", "`Chosen` is empty", "a.csv"),
    Case("same answers in a table", f"{_CSV}a,b,b\n".encode(), "same-answers", 1, "rejected", "same", "a.csv"),
    Case("Latin-1 table", f"{_CSV}a,b,c\ncafé,b,c\n".encode("latin-1"), "not-utf8", 1, "", "0xe9 at line 3", "a.csv"),
    Case("tab table, short row", b"prompt\tchosen\trejected\na\tb\n", "broken-table", 1, "", "2 cells", "prefs.tsv"),
    Case("semicolons, short row", b"prompt;chosen;rejected\na;b\n", "broken-table", 1, "", "2 cells", "prefs.csv"),
    Case("table without a suffix", b"prompt,chosen,rejected\na,b\n", "broken-table", 1, "", "2 cells", "prefs.txt"),
    Case("Python list in a cell", _CSV.encode() + b"\"[{'role': 'user'}]\",b,c\n",
         "not-text", 1, "prompt", "json.dumps", "a.csv"),
    Case("table in gzip", gzip.compress(f"{_CSV}a,b\n".encode()), "broken-table", 1, "", "2 cells", "prefs.csv.gz"),
    # Parquet and Arrow.
    Case("null in Parquet", lambda: _parquet([GOOD, _SHORT]), "not-text", 2, "rejected", "null", "prefs.parquet"),
    Case("null in Arrow", lambda: _arrow([GOOD, _SHORT]), "not-text", 2, "rejected", "null", "prefs.arrow"),
    Case("null in a stream", lambda: _arrow([GOOD, _SHORT], stream=True), "not-text", 2, "rejected", "null", "a.arrow"),
    Case("cut Parquet", lambda: _parquet([GOOD])[:-20], "", words="parquet data is damaged", name="prefs.parquet"),
    Case("cut Arrow", lambda: _arrow([GOOD])[:-20], "", words="arrow data is damaged", name="prefs.arrow"),
    Case("cut stream", lambda: _arrow([GOOD], stream=True)[:300],
         "", words="arrow data is damaged", name="prefs.arrow"),
    Case("Parquet in gzip", lambda: gzip.compress(_parquet([_SHORT, _SHORT])),
         "not-text", 1, "rejected", "null", "a.gz"),
    Case("stream in zstd", lambda: _zstd(_arrow([GOOD, _SHORT], stream=True)),
         "not-text", 2, "rejected", "null", "a.zst"),
    Case("bytes in Parquet", lambda: _parquet([{**GOOD, "chosen": b"a"}]),
         "not-text", 1, "chosen", "bytes", "a.parquet"),
    Case("Latin-1 in Parquet", _not_utf8_parquet, "", words="parquet data is damaged: … UTF8", name="prefs.parquet"),
    Case("Parquet of other fields", lambda: _parquet([{"text": "a"}]), "unknown-format", 1, "", "`text`", "a.parquet"),
]
# fmt: on
"""Files that are broken as files."""
