"""Preference files: what is read, and how each fault is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from palate_recipes.errors import DataError
from palate_recipes.preferences.load import read_rows

GOOD = '{"prompt": "p", "chosen": "c", "rejected": "r"}'


def file(folder: Path, content: str | bytes, name: str = "prefs.json") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        f"[{GOOD}, {GOOD}]",
        f"{GOOD}\n{GOOD}\n",
        f"{GOOD}\n\n{GOOD}",
        f"\ufeff[{GOOD},{GOOD}]",
        f"  \n[{GOOD},\n{GOOD}]\n\n",
    ],
)
def test_arrays_and_lines_are_read(tmp_path: Path, content: str) -> None:
    pairs = read_rows(file(tmp_path, content))
    assert [(pair.text, pair.chosen, pair.rejected) for pair in pairs] == [("p", "c", "r")] * 2


def test_rows_are_numbered_as_an_editor_or_an_array_counts(tmp_path: Path) -> None:
    assert [pair.number for pair in read_rows(file(tmp_path, f"{GOOD}\n\n{GOOD}"))] == [1, 3]
    assert [pair.number for pair in read_rows(file(tmp_path, f"[\n\n{GOOD},\n{GOOD}]"))] == [1, 2]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["is empty"]),
        ("  \n", ["is empty"]),
        ("[]", ["empty"]),
        ("[1]", ["row 1"]),
        ('"text"', []),
        (f"[{GOOD}, {{]", ["line 1", "column"]),
        (f'{GOOD}\n{{"prompt": }}', ["line 2"]),
        (b"\xff\xfe[", ["UTF-8", "UTF-16"]),
        ('[{"prompt": "p", "chosen": "c"}]', ["row 1", "rejected"]),
        ('[{"prompt": "", "chosen": "c", "rejected": "r"}]', ["row 1", "prompt"]),
        ('[{"prompt": "p", "chosen": "  ", "rejected": "r"}]', ["row 1", "chosen"]),
        ('[{"prompt": "p", "chosen": 3, "rejected": "r"}]', ["row 1", "chosen"]),
        ('[{"prompt": "p", "chosen": null, "rejected": "r"}]', ["row 1", "chosen"]),
        ('[{"prompt": "p", "chosen": "same", "rejected": "same"}]', ["row 1"]),
        (f'[{GOOD}, {{"prompt": "p"}}, {GOOD}]', ["row 2", "1 of 3"]),
    ],
)
def test_each_fault_is_named_with_file_and_row(tmp_path: Path, content: str | bytes, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(file(tmp_path, content))
    for word in ["prefs.json", *words]:
        assert word in str(caught.value)


def test_many_wrong_rows_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(file(tmp_path, "[" + ", ".join(['{"prompt": "p"}'] * 9) + "]"))
    message = str(caught.value)
    assert "9 of 9" in message
    assert "row 5" in message
    assert "row 6" not in message
    assert "4 more" in message


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_rows(tmp_path / "absent.json")
    with pytest.raises(DataError, match="folder"):
        read_rows(tmp_path)


def test_sft_takes_chosen_or_instruction_and_output(tmp_path: Path) -> None:
    (pair,) = read_rows(file(tmp_path, '[{"instruction": "p", "output": "c"}]'), strategy="sft")
    assert (pair.text, pair.chosen, pair.rejected) == ("p", "c", None)
    (pair,) = read_rows(file(tmp_path, f"[{GOOD}]"), strategy="sft")
    assert (pair.text, pair.chosen, pair.rejected) == ("p", "c", None)


def test_skipping_leaves_out_wrong_rows_by_number_and_nothing_else(tmp_path: Path) -> None:
    same = '{"prompt": "p", "chosen": "c", "rejected": "c"}'
    skipped: dict[int, str] = {}
    path = file(tmp_path, f'{GOOD}\n\n{same}\n"text"\n{GOOD}')
    pairs = read_rows(path, bad_rows="skip", on_skip=skipped.__setitem__)
    assert [pair.number for pair in pairs] == [1, 5]
    assert list(skipped) == [3, 4]
    assert "same text" in skipped[3]
    for content, words in ((f"[{same}]", "1 of 1 rows is invalid"), (f"{GOOD}\n{{", "broken JSON at line 2")):
        with pytest.raises(DataError, match=words):
            read_rows(file(tmp_path, content), bad_rows="skip")
