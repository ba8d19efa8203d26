"""A row, and what a packed file unpacks to, have limits that can be raised: memory stays bounded, errors name limit and remedy."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from palate_recipes.errors import DataError
from palate_recipes.preferences.check import check
from palate_recipes.preferences.files import open_container
from palate_recipes.preferences.limits import ROW_VARIABLE, UNPACKED_VARIABLE
from palate_recipes.preferences.load import read_rows

MIB = 1 << 20
LONG = "a" * (3 * MIB)
ROW = {"prompt": LONG, "chosen": "b", "rejected": "c"}
COLUMNS = {name: [text] for name, text in ROW.items()}
SMALL = {"prompt": "p", "chosen": "b", "rejected": "c"}


def parquet(columns: dict[str, object], **options: object) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, compression="zstd", **options)
    return sink.getvalue()


def arrow(columns: dict[str, object], *, compression: str = "zstd") -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(pyarrow.table(columns), sink, compression=compression)
    return sink.getvalue()


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


def repeated(text: str, rows: int) -> dict[str, object]:
    """A column that holds one text once, and shows it in each row."""
    prompts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array([text]))
    return {"prompt": prompts, "chosen": ["b"] * rows, "rejected": ["c"] * rows}


def nulls(count: int) -> dict[str, object]:
    """A list that takes no byte a value."""
    lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, count], pyarrow.int32()), pyarrow.nulls(count))
    return COLUMNS | {"prompt": lists}


TEXT = json.dumps(ROW).encode()
BIG_ROWS: list[tuple[str, str, Callable[[], bytes], str]] = [
    ("lines", "a.jsonl", lambda: b"{}\n" + TEXT + b"\n", "line 2"),
    ("spaces behind a row", "a.jsonl", lambda: json.dumps(SMALL).encode() + b" " * (2 * MIB), "line 1"),
    ("lines in gzip", "a.jsonl.gz", lambda: gzip.compress(TEXT), "line 1"),
    ("lines in zstd", "a.jsonl.zst", lambda: zstd(TEXT), "line 1"),
    ("array", "a.json", lambda: b"[\n" + TEXT + b"]", "row 1, which begins at line 2"),
    ("array without its end", "a.json", lambda: b"[" + TEXT[: 2 * MIB], "closing quote"),
    ("cell", "a.csv", lambda: b"prompt,chosen,rejected\n" + LONG.encode() + b",b,c\n", "line 2"),
    ("header", "a.csv", lambda: LONG.encode() + b",b,c\n", "line 1"),
    ("cells without an end", "a.csv", lambda: b"prompt,chosen,rejected\n" + b"a," * MIB, "line 2"),
    ("a quote without an end", "a.csv", lambda: b'prompt,chosen,rejected\n"' + b"a\n" * MIB, "closing quote"),
    ("many lines in cells", "a.csv", lambda: b"prompt,chosen,rejected\n" + b'"a\nb",' * MIB, "closing quote"),
    ("Parquet", "a.parquet", lambda: parquet(COLUMNS), "row 1"),
    ("Arrow", "a.arrow", lambda: arrow(COLUMNS), "row 1"),
    ("list of nulls", "a.arrow", lambda: arrow(nulls(MIB)), "row 1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "words"), [case[1:] for case in BIG_ROWS], ids=[case[0] for case in BIG_ROWS])
def test_a_row_has_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[], bytes], words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(make())
    monkeypatch.setenv(ROW_VARIABLE, "1")
    for read in (lambda: check([(path, name)]), lambda: read_rows(path, bad_rows="skip")):
        with pytest.raises(DataError) as caught:
            read()
        for word in (name, words, "larger than the limit of 1 MiB", f"{ROW_VARIABLE}=4"):
            assert word in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.parquet", "a.feather"])
def test_a_limit_can_be_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    content = {"a.jsonl": TEXT, "a.json": b"[" + TEXT + b"]", "a.jsonl.gz": gzip.compress(TEXT)}
    content |= {"a.csv": b"prompt,chosen,rejected\n" + LONG.encode() + b",b,c\n"}
    content |= {"a.parquet": parquet(COLUMNS), "a.feather": arrow(COLUMNS)}
    path = tmp_path / name
    path.write_bytes(content[name])
    monkeypatch.setenv(ROW_VARIABLE, "4")
    (row,) = read_rows(path)
    assert row.text == LONG


def test_rows_that_repeat_one_large_text_are_each_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ROW_VARIABLE, "1")
    text = "a" * (MIB // 2)
    for name, content in (("a.parquet", parquet(repeated(text, 40))), ("a.arrow", arrow(repeated(text, 40)))):
        path = tmp_path / name
        path.write_bytes(content)
        assert len(content) < 100_000
        report = check([(path, name)])
        assert (report.rows, report.usable) == (40, 40)
        path.write_bytes(parquet(repeated(LONG, 40)) if name == "a.parquet" else arrow(repeated(LONG, 40)))
        with pytest.raises(DataError, match=r"row 1: the row is larger than the limit of 1 MiB"):
            check([(path, name)])


PACKED: list[tuple[str, Callable[[], bytes]]] = [
    ("a.jsonl.gz", lambda: gzip.compress(json.dumps(SMALL).encode() + (b" " * MIB + b"\n") * 4)),
    ("a.json.gz", lambda: gzip.compress(b"[" + b" " * 4 * MIB + b"]")),
    ("a.csv.zst", lambda: zstd(b"prompt,chosen,rejected\n" + (b"a" * 9999 + b",b,c\n") * 400)),
    ("a.parquet.gz", lambda: gzip.compress(b"PAR1" + bytes(4 * MIB))),
    ("a.parquet", lambda: parquet({name: [name * 1000] * 2000 for name in SMALL}, use_dictionary=False)),
    ("a.feather", lambda: arrow({name: [name * 1000] * 2000 for name in SMALL})),
    ("a.feather", lambda: arrow({name: [name * 1000] * 2000 for name in SMALL}, compression="lz4")),
]


@pytest.mark.parametrize(("name", "make"), PACKED)
def test_what_a_file_unpacks_to_has_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[], bytes]
) -> None:
    path = tmp_path / name
    path.write_bytes(make())
    monkeypatch.setenv(UNPACKED_VARIABLE, "2")
    with pytest.raises(DataError) as caught:
        check([(path, name)])
    for word in (name, f"{path.stat().st_size:,} bytes", "The limit is 2 MiB", f"{UNPACKED_VARIABLE}="):
        assert word in str(caught.value)


@pytest.mark.parametrize("value", ["0", "-1", "lots", "1.5", "9" * 5000, "１"])
def test_a_limit_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(TEXT)
    monkeypatch.setenv(ROW_VARIABLE, value)
    with pytest.raises(DataError, match=rf"{ROW_VARIABLE}=.*expected a whole number of MiB from 1"):
        read_rows(path)


_CHILD = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))  # the machine that runs the tests is not to suffer
from palate_recipes.preferences.check import check
from palate_recipes.preferences.load import read_rows
from palate_recipes.errors import DataError
for read in (lambda: check([(sys.argv[1], "a")]), lambda: read_rows(sys.argv[1])):
    try:
        read()
    except DataError as error:
        print(error)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))  # not that of its parent
"""


@pytest.mark.parametrize("content", [b"a" * (64 * MIB), b"[]," * (16 * MIB)], ids=["a text", "lists"])
def test_two_megabytes_of_gzip_do_not_fill_the_memory(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": [') + gzip.compress(content, 1) * 32)  # members follow each other
    done = subprocess.run([sys.executable, "-c", _CHILD, str(path)], capture_output=True, text=True)
    *said, peak = done.stdout.splitlines()
    assert len(said) == 2, done.stderr
    assert all("larger than the limit of 8 MiB" in line for line in said)
    assert int(peak) * 1024 < 1 << 30


def test_a_file_of_wrong_rows_keeps_but_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("4\n" * 300_000)
    done = subprocess.run([sys.executable, "-c", _CHILD, str(path)], capture_output=True, text=True)
    assert "300000 of 300000 lines are invalid" in done.stdout, done.stderr
    assert "and 299995 more" in done.stdout
    assert int(done.stdout.splitlines()[-1]) < 150_000  # KiB; 300,000 kept faults take 60,000


ONE_ROW = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


def test_a_small_file_of_millions_of_rows_is_refused_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, row, line in (
        ("rows.csv.gz", b"prompt,chosen,rejected\na,b,c\n", b"\n"),
        ("rows.jsonl.gz", ONE_ROW, b"{}\n"),
        ("rows.jsonl.gz", ONE_ROW, b"\n"),
    ):
        path = tmp_path / name
        path.write_bytes(gzip.compress(row + line * 1_200_000))
        with pytest.raises(DataError, match=r"more than 1,000,000 rows.*PALATE_MAX_PACKED_ROWS=4000000"):
            for _ in open_container(path).raw_rows():
                pass
    monkeypatch.setenv("PALATE_MAX_PACKED_ROWS", "2000000")
    assert sum(1 for _ in open_container(path).raw_rows()) == 1


@pytest.mark.parametrize("write", [parquet, arrow])
def test_rows_of_a_table_that_compresses_itself_have_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[dict[str, object]], bytes]
) -> None:
    path = tmp_path / "rows"
    path.write_bytes(write({name: [text] * 2000 for name, text in SMALL.items()}))
    assert sum(1 for _ in open_container(path).raw_rows()) == 2000
    monkeypatch.setenv("PALATE_MAX_PACKED_ROWS", "1000")
    with pytest.raises(DataError, match=r"more than 1,000 rows.*PALATE_MAX_PACKED_ROWS=4000") as caught:
        read_rows(path)
    assert str(path) in str(caught.value)
