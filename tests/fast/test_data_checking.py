"""Training data against held-out data: what is read how often, and in which format."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from palate import Session, get_default_session
from palate.sources.inputs import PreferenceData, checked_inputs
from palate_recipes.errors import DataError, PalateError
from palate_recipes.preferences.check import read_files
from palate_recipes.preferences.load import read_rows

COUNTED = """
import json, sys
from collections import Counter

opened = Counter()
sys.addaudithook(lambda event, found: opened.update([str(found[0])]) if event == "open" else None)

from palate import get_default_session
from palate.sources.inputs import checked_inputs

inputs = json.loads(sys.argv[1])
with checked_inputs(inputs, get_default_session(), strategy="dpo", bad_rows="refuse") as checked:
    leaks = [item.report.findings["leakage"].count for item in checked.values() if "leakage" in item.report.findings]
print(json.dumps({"opened": {name: opened[path] for name, path in inputs.items()}, "leaks": leaks}))
"""


def pairs(path: Path, count: int, start: int = 0) -> Path:
    rows = (
        {"prompt": f"Is it {n} now?", "chosen": f"Yes {n}.", "rejected": "No."} for n in range(start, start + count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def counted(home: Path, **inputs: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, json.dumps({name: str(path) for name, path in inputs.items()})],
        capture_output=True,
        text=True,
        env={**os.environ, "PALATE_HOME": str(home)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_validation_data_is_read_once(home: Path, tmp_path: Path) -> None:
    train, held_out = pairs(tmp_path / "train.jsonl", 20), pairs(tmp_path / "held.jsonl", 5, 18)
    alone = counted(home, validation=held_out)
    both = counted(home, train=train, validation=held_out)
    assert both["opened"]["validation"] == alone["opened"]["validation"] > 0
    assert both["leaks"] == [2]


def test_validation_data_is_read_in_its_own_format(session: Session, tmp_path: Path) -> None:
    table = tmp_path / "held.csv"
    table.write_text("q,good,bad\nIs it 3 now?,Yes.,No.\n")
    held_out = PreferenceData(
        uri=table, input_columns={"prompt": "q"}, label_columns={"chosen": "good", "rejected": "bad"}
    )
    inputs = {"train": pairs(tmp_path / "train.jsonl", 20), "validation": held_out}
    with checked_inputs(inputs, session, strategy="dpo", bad_rows="refuse") as checked:
        (place,) = checked["train"].report.findings["leakage"].places
    assert (place.row, place.what.endswith("held.csv, row 1")) == (4, True)


def test_rows_in_memory_are_checked_and_written_as_a_file() -> None:
    import datasets
    import pandas

    rows = [{"prompt": f"Ask {n}", "chosen": f"Yes {n}", "rejected": f"No {n} é"} for n in range(3)]
    contents = set()
    for given in (rows, datasets.Dataset.from_list(rows), pandas.DataFrame(rows), PreferenceData(uri=rows)):
        with checked_inputs({"train": given}, get_default_session(), strategy="dpo", bad_rows="refuse") as checked:
            assert checked["train"].rows == 3
            contents.add(checked["train"].fetched.files[0].read_bytes())
    assert len(contents) == 1


def test_what_is_no_table_is_refused_with_what_to_give_instead() -> None:
    import datasets
    import pandas

    table = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    for given, words in (
        (table.to_iterable_dataset(), r"list\(dataset.take\(N\)\)"),
        (datasets.DatasetDict(train=table), r"dataset\['train'\]"),
        ((row for row in [{}]), "expected a path"),
        (pandas.Series(["a"]), "is Series: expected a path"),
        (pandas.DataFrame([["a", "b"]], columns=["prompt", "prompt"]), "two columns are named 'prompt'"),
        ([], "has no rows"),
        ([{"prompt": "a", "chosen": "b"}], r"inputs\['train'\].*line 1: `rejected` is missing"),
        ([{"prompt": object()}], "row 1: `prompt` is object"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c", "image": object()}], "`image` is an image"),
    ):
        with (
            pytest.raises(PalateError, match=re.compile(words, re.S)),
            checked_inputs({"train": given}, get_default_session(), strategy="dpo", bad_rows="refuse"),
        ):
            pass


def test_a_table_that_would_lose_a_column_or_is_only_one_is_refused() -> None:
    import datasets
    import pandas
    import pyarrow

    names, cells = ["prompt", "chosen", "rejected", "chosen"], ["a", "b", "c", "d"]
    nested = pyarrow.StructArray.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["x", "x"])
    late = pyarrow.array([2**62], pyarrow.timestamp("us"))
    for given, words in (
        (pandas.DataFrame([cells], columns=names), "two columns are named 'chosen'"),
        (pyarrow.table([[cell] for cell in cells], names=names), "two columns are named 'chosen'"),
        (pyarrow.table([nested], names=["prompt"]), "Table cannot be converted to rows"),
        (pyarrow.table([late], names=["prompt"]), "Table cannot be converted to rows"),
        ([{"1": "a", 1: "b"}], "row 1: two fields are named '1'"),
        (pandas.Series(["a"]), "is Series: expected a path"),
        (pandas.Index(["a"]), "is Index: expected a path"),
        (datasets.Dataset.from_list([{"prompt": "a"}])["prompt"], "is Column: expected a path"),
    ):
        with (
            pytest.raises(PalateError, match=re.compile(words, re.S)),
            checked_inputs({"train": given}, get_default_session(), strategy="dpo", bad_rows="refuse"),
        ):
            pass


def test_rows_of_different_unknown_fields_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({f"field {number}": "x" * 1000}) + "\n" for number in range(1000)))
    linter = read_files([(path, path.name)])
    assert (linter.wrong_rows, linter.columns(), linter.fields()) == (1000, None, ["field 0"])
    assert len(linter._foreign) < 3


def test_a_row_with_a_list_of_examples_is_not_a_wrapper_around_them(tmp_path: Path) -> None:
    path, row = tmp_path / "one.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"}
    path.write_text(json.dumps({"examples": [{"prompt": "d", "chosen": "e", "rejected": "f"}], **row}) + "\n")
    assert [one.chosen for one in read_rows(path)] == ["b"]
    path.write_text(json.dumps({"data": [row], "version": "1"}))
    assert [one.chosen for one in read_rows(path)] == ["b"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_file_with_two_columns_of_one_name_is_refused(tmp_path: Path, kind: str) -> None:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    names = ["prompt", "chosen", "rejected", "chosen"]
    table, path = pyarrow.table([["a"], ["b"], ["c"], ["d"]], names=names), tmp_path / f"p.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match=r"two columns are named 'chosen'\. Rename one"):
        read_rows(path)


@pytest.mark.parametrize("end", ["cut", "damaged"])
def test_a_damaged_compressed_wrapper_is_refused_in_words(tmp_path: Path, end: str) -> None:
    whole = json.dumps({"data": [{"prompt": str(random.random())} for _ in range(60_000)]}).encode()
    packed, path = gzip.compress(whole), tmp_path / "p.json.gz"
    half = len(packed) * 3 // 4  # after the block that the type is detected from
    path.write_bytes(packed[:half] if end == "cut" else packed[:half] + b"\xff" * 1000 + packed[half + 1000 :])
    with pytest.raises(DataError, match="damaged or truncated: copy the file again"):
        read_rows(path)
