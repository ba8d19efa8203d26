"""Every malformed file is refused or remarked upon for its own reason, with file, row, field and value, and with no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from palate_recipes.errors import DataError
from palate_recipes.preferences.check import check
from palate_recipes.preferences.formats import FORMATS
from palate_recipes.preferences.load import UNREADABLE, read_rows
from palate_recipes.preferences.report import RULES
from tests.fast.corpus import FILES, GOOD, Case, array
from tests.fast.corpus_rows import ROWS, WHOLE

CASES = [*FILES, *ROWS, *WHOLE]
NEED_TOKENIZER = {"no-room", "same-after-cut", "same-tokens", "cut"}


def written(case: Case, folder: Path) -> Path:
    path = folder / case.name
    path.write_bytes(case.content if isinstance(case.content, bytes) else case.content())
    return path


def holds(message: str, words: str) -> None:
    """Each of the words in their order, and nothing that belongs into a traceback."""
    at = 0
    for word in words.split(" … "):
        found = message.find(word, at)
        assert found >= 0, f"{word!r} is not in {message!r}"
        at = found
    for word in ("Traceback", "KeyError", "object at 0x", "NoneType", "JSONDecodeError"):
        assert word not in message
    message.encode()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_each_file_is_told_by_its_own_reason(case: Case, tmp_path: Path) -> None:
    path = written(case, tmp_path)
    held_out = tmp_path / "held-out.json"
    held_out.write_bytes(case.against or b"")
    against = [(held_out, held_out.name)] if case.against else []
    if not case.code:
        for read in (lambda: check([(path, case.name)], strategy=case.strategy), lambda: read_rows(path)):
            with pytest.raises(DataError) as caught:
                read()
            holds(str(caught.value), case.name)
            holds(str(caught.value), case.words)
        return
    report = check([(path, case.name)], against, strategy=case.strategy)
    errors = {finding.code for finding in report.of("error")}
    assert errors == ({case.code} if RULES[case.code].level == "error" else set()), report.lines()
    (place, *_) = report.findings[case.code].places
    assert (place.row, place.field) == (case.row, case.field), report.lines()
    assert case.name in place.file
    holds(str(place), case.words)
    holds("\n".join(report.lines()), RULES[case.code].remedy)


@pytest.mark.parametrize("case", [case for case in CASES if case.code], ids=lambda case: case.id)
def test_training_reads_what_is_no_error_and_refuses_what_is(case: Case, tmp_path: Path) -> None:
    path = written(case, tmp_path)
    if RULES[case.code].level != "error":
        assert read_rows(path, strategy=case.strategy)
        return
    with pytest.raises(DataError) as caught:
        read_rows(path, strategy=case.strategy)
    message = str(caught.value)
    holds(message, case.name)
    holds(message, case.words.removeprefix("no row"))
    if case.code not in (*UNREADABLE, "no-rows", "unmapped-columns"):
        holds(message, f" {case.row}: ")
        skipped: list[int] = []
        if case.row > 1:
            assert read_rows(path, strategy=case.strategy, bad_rows="skip", on_skip=lambda n, _: skipped.append(n))
            assert skipped == [case.row]


def test_prompts_without_a_word_are_told_apart(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("train.json", "held-out.json")]
    for path, prompts in zip(files, (["?!", "..."], ["!?", "..."]), strict=True):
        path.write_bytes(array(*(GOOD | {"prompt": prompt} for prompt in prompts)))
    report = check([(files[0], "train.json")], [(files[1], "held-out.json")])
    assert [place.row for place in report.findings["leakage"].places] == [2]


def test_the_corpus_covers_every_rule_and_every_format() -> None:
    assert len(CASES) >= 160
    assert len({case.id for case in CASES}) == len(CASES)
    assert {case.code for case in CASES} - {""} == set(RULES) - NEED_TOKENIZER
    assert {case.id.partition(":")[0] for case in ROWS} == set(FORMATS)
