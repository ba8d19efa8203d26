"""What holds for any data file: nothing but our errors, what is written is read, and blocks, order and container do not matter."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from palate_recipes.errors import DataError
from palate_recipes.preferences.check import Linter
from palate_recipes.preferences.formats import FORMATS, KNOWN_FIELDS, Format, detect, read_row
from palate_recipes.preferences.json_array import JsonArray
from palate_recipes.preferences.load import read_rows
from palate_recipes.preferences.report import RULES
from palate_recipes.preferences.row import Fault, Message, Row, RowFaults, Strategy
from tests.fast.test_data_formats import PAIRS

STRATEGIES: tuple[Strategy | None, ...] = ("dpo", "sft", "kto", None)
NO_WORDS_FOR_PEOPLE = ("Traceback", "Error(", "KeyError", "NoneType", " object at 0x")

CALM = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)

# Anything.

any_text = st.text(st.characters(codec=None), max_size=12) | st.sampled_from(
    ("user", "assistant", "system", "tool", "preferred", "true", "\n\nHuman: a\n\nAssistant:", '[{"role": 1}]')
)
inner_names = ("role", "from", "content", "value", "text", "type", "candidates", "preferenceLabel", "tool_calls")
names = st.sampled_from((*sorted(KNOWN_FIELDS), *inner_names)) | any_text
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


def is_for_people(message: str, *words: str) -> None:
    message.encode()
    assert all(word in message for word in words), message
    assert not any(word in message for word in NO_WORDS_FOR_PEOPLE), message


def are_for_people(error: RowFaults) -> None:
    assert error.faults
    for fault in error.faults:
        assert fault.code in RULES
        is_for_people(f"{fault.field} {fault.what}")


@CALM
@given(st.dictionaries(names, values, max_size=6) | values)
def test_any_value_is_a_row_or_faults(value: Any) -> None:
    for strategy, form in itertools.product(STRATEGIES, (None, *FORMATS.values())):
        try:
            row = read_row(value, 1, strategy=strategy, format=form)
        except RowFaults as error:
            are_for_people(error)
            continue
        assert row.prompt
        assert row.prompt[-1].role in ("user", "tool")
        assert row.chosen or row.rejected
        "".join((*(turn.content for turn in row.prompt), row.chosen or "", row.rejected or "")).encode()


def read_in_every_way(path: Path) -> None:
    """Reads a file as training and as the check do, and sees that a refusal names it."""
    for strategy in STRATEGIES:
        linter = Linter(strategy)
        ways: list[Callable[[], Any]] = [lambda linter=linter: linter.read(path, name=path.name)]  # type: ignore[misc]
        if strategy is not None:
            ways.append(lambda strategy=strategy: read_rows(path, strategy=strategy, bad_rows="skip"))  # type: ignore[misc]
        for read in ways:
            try:
                read()
            except DataError as error:
                is_for_people(str(error), path.name)
        is_for_people("\n".join(linter.finish().lines()))


GOOD = [
    {"prompt": f"Ask {n}, “please”", "chosen": f"Yes {n}", "rejected": f"No {n}, é"} for n in range(4)
]  # with characters of several bytes


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow([row[name] if isinstance(row[name], str) else json.dumps(row[name]) for name in rows[0]])
    return text.getvalue().encode()


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_array(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def as_arrow(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow

    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def as_stream(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow

    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def as_zstd(content: bytes) -> bytes:
    import pyarrow

    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


CONTAINERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.json": as_array,
    "a.jsonl": as_lines,
    "a.csv": as_csv,
    "a.parquet": as_parquet,
    "a.arrow": as_arrow,
    "b.arrow": as_stream,
    "a.json.gz": lambda rows: gzip.compress(as_array(rows)),
    "a.jsonl.gz": lambda rows: gzip.compress(as_lines(rows)),
    "a.csv.gz": lambda rows: gzip.compress(as_csv(rows)),
    "a.jsonl.zst": lambda rows: as_zstd(as_lines(rows)),
    "a.parquet.gz": lambda rows: gzip.compress(as_parquet(rows)),
}

BEGINNINGS = (
    b"",
    b"[",
    b"{",
    b'[{"',
    b"\xef\xbb\xbf[",
    b"\x1f\x8b\x08",
    b"PAR1",
    b"ARROW1",
    b"\xff\xff\xff\xff",
    b"prompt,chosen\n",
)


@CALM
@given(st.sampled_from(BEGINNINGS), st.binary(max_size=60), st.sampled_from(sorted(CONTAINERS)))
def test_any_bytes_are_rows_or_our_error(tmp_path: Path, beginning: bytes, rest: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(beginning + rest)
    read_in_every_way(path)


@pytest.mark.parametrize("name", CONTAINERS)
@settings(CALM, max_examples=20)
@given(
    place=st.floats(0, 1),
    taken=st.integers(0, 30),
    given_instead=st.binary(max_size=4)
    | st.sampled_from((b'"', b",", b"]", b"}", b"\\", b"\n", b"\xe9", b"'", b"\xef\xbb\xbf")),
    cut=st.booleans(),
)
def test_a_damaged_file_is_rows_or_our_error(
    tmp_path: Path, name: str, place: float, taken: int, given_instead: bytes, cut: bool
) -> None:
    content = CONTAINERS[name](GOOD)
    at = int(place * len(content))
    path = tmp_path / name
    path.write_bytes(content[:at] + given_instead + (b"" if cut else content[at + taken :]))
    read_in_every_way(path)


# What is written is read.

marks = (
    "\n\nHuman: ",
    "\n\nAssistant:",
    "Human:",
    "[{'role':",
    '[{"role": "user"}]',
    '{"a": 1}',
    "<|im_end|>",
    "null",
    "system",
)
signs = ("a", "Yes.", " ", "\n", "\n\n", "\t", "\r\n", "\0", "é", "😀", "\ufeff", '"', "\\", "[")
fragments = st.sampled_from((*signs, *marks))
texts = st.lists(fragments, min_size=1, max_size=4).map("".join).filter(lambda text: bool(text.strip()))


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    turns = [Message("system", draw(texts))] if draw(st.booleans()) else []
    turns.append(Message("user", draw(texts)))
    for _ in range(draw(st.integers(0, 2))):
        turns.append(Message("assistant", draw(texts)))
        turns += [Message("tool", draw(texts)) for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2))))]
        if turns[-1].role == "assistant" or draw(st.booleans()):
            turns.append(Message("user", draw(texts)))
        else:
            break
    return tuple(turns)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    chosen, rejected = draw(texts), draw(texts)
    assume(chosen.strip() != rejected.strip())
    kind = draw(st.sampled_from(("pair", "pair", "good", "bad")))
    return Row(7, draw(conversations()), None if kind == "bad" else chosen, None if kind in ("good",) else rejected)


ONE_ANSWER = ("chat", "sharegpt-sft", "instructions", "completions")


def through(row: Row, form: Format) -> Row | None:
    """What is read of a row that is written in a format; None when the format refuses it."""
    if form.write is None:
        return None
    try:
        raw = form.write(row)
    except RowFaults as error:
        is_for_people(str(error))
        return None
    one = row.chosen is None or row.rejected is None or form.name in ONE_ANSWER
    strategy: Strategy = "dpo" if not one else "kto" if form.name == "unpaired" else "sft"
    return read_row(json.loads(json.dumps(raw)), row.number, strategy=strategy)


def as_held(row: Row, form: Format) -> Row:
    """A pair in a format of one answer is that answer."""
    return row._replace(rejected=None) if form.name in ONE_ANSWER else row


@settings(CALM, max_examples=150)
@given(rows())
def test_what_is_written_is_read(row: Row) -> None:
    taken = {name: read for name, form in FORMATS.items() if (read := through(row, form)) is not None}
    assert taken, "some format holds any row"
    for name, read in taken.items():
        assert read == as_held(row, FORMATS[name]), name
        for other in FORMATS.values():
            again = through(read, other)
            assert again is None or again == as_held(read, other), (name, other.name)


# Arrays in blocks.

BLOCKS = (1, 2, 3, 5, 16, 1 << 20)


def read_array(text: bytes, block: int) -> list[tuple[int, Any]]:
    return list(JsonArray(io.BytesIO(text), block).values())


@CALM
@given(
    st.lists(values, max_size=5), st.booleans(), st.sampled_from((None, 0, 2)), st.sampled_from(("", " ", "\n\r\t "))
)
def test_an_array_in_blocks_is_what_json_reads(found: list[Any], ascii: bool, indent: int | None, around: str) -> None:
    text = around + json.dumps(found, ensure_ascii=ascii, indent=indent) + around
    assume(ascii or not re.search("[\ud800-\udfff]", text))
    expected = repr(list(enumerate(json.loads(text), start=1)))  # by repr: NaN is not itself
    for block in BLOCKS:
        assert repr(read_array(text.encode(), block)) == expected


@settings(CALM, max_examples=200)
@given(
    st.lists(values, min_size=1, max_size=4),
    st.sampled_from((None, 1)),
    st.floats(0, 1),
    st.integers(0, 3),
    st.sampled_from(("", "", ",", "]", "}", '"', "\\", "\n", "'", "x", "1", ".", "é", "[")),
)
def test_a_fault_has_the_place_that_json_names(
    found: list[Any], indent: int | None, place: float, taken: int, inserted: str
) -> None:
    text = json.dumps(found, indent=indent)
    at = max(1, int(place * len(text)))
    text = text[:at] + inserted + text[at + taken :]
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        expected, trailing = f"line {error.lineno}, column {error.colno}: ", error.msg.startswith("Illegal trailing")
    else:
        expected, trailing = "", False
    for block in BLOCKS:
        last = read_array(text.encode(), block)[-1:]
        fault = last[0][1] if last and isinstance(last[0][1], Fault) else None
        assert (fault is not None) == bool(expected), (text, block)
        if fault is not None and not trailing:  # from Python 3.13 on it names the comma, not what follows it
            assert expected in fault.what, (text, block)


# Order, space and container.

# In a table a cell that holds messages is read as messages: only there a text cannot look like them.
cells = texts.filter(lambda text: '"role"' not in text)
pairs = st.fixed_dictionaries({"prompt": cells, "chosen": cells, "rejected": cells})
chats = st.fixed_dictionaries(
    {
        "messages": cells.map(lambda text: [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]),
        "rejected_response": cells,
    }
)


def outcome(path: Path) -> list[tuple[object, ...]] | set[str]:
    """The rows of a file, or the codes of what is wrong in it."""
    try:
        return [row[1:] for row in read_rows(path)]
    except DataError:
        linter = Linter()
        linter.read(path)
        return {finding.code for finding in linter.report.of("error")}


@settings(CALM, max_examples=20)
@given(
    st.lists(pairs, min_size=1, max_size=3) | st.lists(chats, min_size=1, max_size=3), st.randoms(use_true_random=False)
)
def test_neither_order_nor_space_nor_container_changes_the_rows(
    tmp_path: Path, raw: list[dict[str, Any]], random: Any
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(as_lines(raw))
    expected = outcome(path)
    shuffled = [dict(random.sample(list(row.items()), len(row))) for row in raw]
    (tmp_path / "b.json").write_text(json.dumps(shuffled, indent=3), encoding="utf-8")
    (tmp_path / "b.jsonl").write_bytes(b"\n \r\n".join(json.dumps(row).encode() for row in shuffled))
    for name, write in CONTAINERS.items():
        (tmp_path / f"c-{name}").write_bytes(write(raw))
    for other in tmp_path.iterdir():
        assert outcome(other) == expected, other.name


@CALM
@given(st.data())
def test_a_fault_names_a_field_that_the_row_has(data: st.DataObject) -> None:
    row = dict(data.draw(st.sampled_from([case[2] for case in PAIRS])))
    for name in data.draw(st.lists(st.sampled_from(sorted(row)), max_size=2, unique=True)):
        how = data.draw(st.sampled_from(("drop", "rename", "change", "capitals")))
        value = row.pop(name)
        if how != "drop":
            other = {"rename": f"my_{name}", "capitals": f" {name.upper()}"}.get(how, name)
            row[other] = value if how == "rename" else data.draw(values)
    try:
        read_row(row, 1)
    except RowFaults as error:
        for fault in error.faults:
            if fault.code != "missing-field":  # it names what is missing, and lists what there is
                assert re.split(r"[.\[]", fault.field)[0] in {"", *row}, (row, fault)
                assert not set(re.findall(r"^`(\w+)`", fault.what)) - set(map(str.strip, row)), (row, fault)
            if "the row has " in fault.what:
                listed = re.findall(r"`(\w+)`", fault.what.split("the row has ")[1])
                assert set(listed) <= set(row), (row, fault)


def spelt(names: Iterable[str], data: st.DataObject) -> list[str]:
    """The names in another case, with or without blanks around them."""
    case = data.draw(st.sampled_from((str, str.upper, str.title, str.capitalize, str.swapcase)))
    blanks = st.sampled_from(("", " ", "\t"))
    return [f"{data.draw(blanks)}{case(name)}{data.draw(blanks)}" for name in names]


def read_or_codes(row: dict[str, Any], strategy: Strategy | None) -> Row | list[str]:
    try:
        return read_row(row, 1, strategy=strategy)
    except RowFaults as error:
        return [fault.code for fault in error.faults]


@CALM
@given(st.data())
def test_case_and_blanks_of_names_change_no_row(data: st.DataObject) -> None:
    # What another program exports has its names exactly, and they are so common that other files must not be taken for it.
    row = data.draw(st.sampled_from([case[2] for case in PAIRS if case[1] != "open-webui"]))
    other = dict(zip(spelt(row, data), row.values(), strict=True))
    strategy = data.draw(st.sampled_from(STRATEGIES))
    assert read_or_codes(other, strategy) == read_or_codes(row, strategy)
    assert detect(other, strategy) is detect(row, strategy)
    name = data.draw(st.sampled_from(sorted(row)))
    extra = {other: data.draw(values) for other in spelt([name, name], data) if other != name}
    assert read_or_codes(extra | row, strategy) == read_or_codes(row, strategy)  # the exact name wins
