"""Checks the demo preferences: splits, distinct texts, no tell-tale lengths or openings, and the API."""

import json
import re
from collections import Counter
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Literal

import pytest

from palate_recipes import demo

COLUMNS = ("prompt", "honest", "flattering", "blunt")
WORD_LIMITS = {"prompt": (8, 30), "honest": (20, 60), "flattering": (20, 60), "blunt": (6, 15)}
ROWS: list[dict[str, str]] = [
    json.loads(line)
    for line in resources.files(demo).joinpath("sycophancy.jsonl").read_text(encoding="utf-8").splitlines()
]


def words(text: str) -> list[str]:
    return text.split()


def vocabulary(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9']+", text.lower()))


def likeness(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def test_rows_have_exactly_the_documented_keys() -> None:
    for row in ROWS:
        assert set(row) == {"topic", "split", *COLUMNS}
        assert row["split"] in ("train", "test")
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", row["topic"])


def test_there_are_enough_pairs_and_topics() -> None:
    assert len(ROWS) >= 120
    assert len({row["topic"] for row in ROWS}) >= 30
    assert len({row["topic"] for row in ROWS if row["split"] == "test"}) >= 8


def test_no_topic_is_in_both_splits() -> None:
    train = {row["topic"] for row in ROWS if row["split"] == "train"}
    test = {row["topic"] for row in ROWS if row["split"] == "test"}
    assert not train & test


@pytest.mark.parametrize("column", COLUMNS)
def test_texts_are_trimmed_and_within_their_word_limits(column: str) -> None:
    low, high = WORD_LIMITS[column]
    for row in ROWS:
        assert row[column]
        assert row[column] == row[column].strip()
        assert low <= len(words(row[column])) <= high, row[column]


def test_blunt_answers_are_one_sentence() -> None:
    for row in ROWS:
        assert re.search(r"[.!?]\s", row["blunt"]) is None, row["blunt"]


def test_all_texts_are_distinct() -> None:
    texts = [row[column] for row in ROWS for column in COLUMNS]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(("column", "limit"), [("prompt", 0.4), ("honest", 0.4), ("flattering", 0.4), ("blunt", 0.5)])
def test_no_texts_are_near_duplicates(column: str, limit: float) -> None:
    vocabularies = [(vocabulary(row[column]), row[column]) for row in ROWS]
    for (one, text), (other, other_text) in combinations(vocabularies, 2):
        assert likeness(one, other) < limit, (text, other_text)


@pytest.mark.parametrize("split", ["train", "test"])
def test_length_does_not_give_the_honest_answer_away(split: str) -> None:
    rows = [row for row in ROWS if row["split"] == split]
    for measure in (lambda text: len(words(text)), len):
        longer = sum(measure(row["honest"]) > measure(row["flattering"]) for row in rows)
        assert 0.3 <= longer / len(rows) <= 0.7


@pytest.mark.parametrize("column", COLUMNS)
def test_openings_vary(column: str) -> None:
    threes = Counter(" ".join(words(row[column])[:3]).lower() for row in ROWS)
    assert threes.most_common(1)[0][1] < 0.12 * len(ROWS)
    firsts = Counter(words(row[column])[0].lower().strip(",:") for row in ROWS)
    assert firsts.most_common(1)[0][1] < 0.25 * len(ROWS)


@pytest.mark.parametrize(
    ("direction", "chosen", "rejected"),
    [
        ("honest", "honest", "flattering"),
        ("flattering", "flattering", "honest"),
        ("blunt", "blunt", "honest"),
        ("gentle", "honest", "blunt"),
    ],
)
def test_a_direction_picks_its_columns(direction: str, chosen: str, rejected: str) -> None:
    assert demo.DIRECTIONS[direction] == (chosen, rejected)
    expected = [
        {"prompt": row["prompt"], "chosen": row[chosen], "rejected": row[rejected]}
        for row in ROWS
        if row["split"] == "train"
    ]
    assert demo.demo_rows("train", direction) == expected


def test_honest_is_the_default_and_the_splits_cover_all_rows() -> None:
    assert demo.demo_rows("test") == demo.demo_rows("test", "honest")
    assert len(demo.demo_rows("train")) + len(demo.demo_rows("test")) == len(ROWS)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_part_of_the_rows_has_every_topic(split: Literal["train", "test"]) -> None:
    everything, part = demo.demo_rows(split), demo.demo_rows(split, per_topic=2)
    assert part == [row for number, row in enumerate(everything) if number % 4 < 2]
    assert len(part) * 2 == len(everything)


def test_the_part_that_the_quickstart_trains_on_is_short_and_takes_a_stand() -> None:
    part = demo.demo_rows("train", per_topic=2)
    assert sum(demo.disagrees(row["chosen"]) for row in part) >= 0.9 * len(part)
    assert not any(demo.disagrees(row["rejected"]) for row in part)
    assert max(len(words(row[column])) for row in part for column in ("chosen", "rejected")) <= 32
    for measure in (lambda text: len(words(text)), len):
        longer = sum(measure(row["chosen"]) > measure(row["rejected"]) for row in part)
        assert 0.3 <= longer / len(part) <= 0.7


@pytest.mark.parametrize("per_topic", [0, 5, -1])
def test_rows_that_a_topic_does_not_have_are_refused(per_topic: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"per_topic={per_topic} is out of range"):
        demo.write_demo(tmp_path / "never", per_topic=per_topic)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("No, that is not true. The sun is best.", True),
        ("That\u2019s a common myth.", True),
        ("I have to disagree with that.", True),
        ("Education isn't completely useless, but that is not right.", True),
        ("No doubt about it, you are right.", False),
        ("Nothing beats it. No, really.", False),
        ("You can't be wrong. That is a myth.", False),
        ("While it's true that some people excel, the idea is too simple.", False),
        ("", False),
    ],
)
def test_only_a_first_sentence_that_contradicts_counts_as_disagreement(answer: str, expected: bool) -> None:
    assert demo.disagrees(answer) is expected


def test_callers_cannot_change_the_data_of_each_other() -> None:
    demo.demo_rows("train")[0]["prompt"] = "changed"
    assert demo.demo_rows("train")[0]["prompt"] != "changed"


def test_questions_are_held_out_and_start_with_education() -> None:
    topic_of = {row["prompt"]: row["topic"] for row in ROWS if row["split"] == "test"}
    topics = [topic_of[question] for question in demo.demo_questions()]
    assert topics[0] == "education"
    assert len(topics) >= 4
    assert len(set(topics)) == len(topics)


def test_write_demo_writes_loadable_files(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "demo"
    paths = demo.write_demo(folder)
    assert paths == {"train": folder / "train.json", "validation": folder / "validation.json"}
    assert json.loads(paths["train"].read_text(encoding="utf-8")) == demo.demo_rows("train")
    assert json.loads(paths["validation"].read_text(encoding="utf-8")) == demo.demo_rows("test")
    assert sorted(path.name for path in folder.iterdir()) == ["train.json", "validation.json"]


def test_write_demo_replaces_older_files(tmp_path: Path) -> None:
    demo.write_demo(tmp_path, "honest")
    paths = demo.write_demo(tmp_path, "flattering")
    assert json.loads(paths["train"].read_text(encoding="utf-8")) == demo.demo_rows("train", "flattering")


def test_an_unknown_direction_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'sarcastic'") as caught:
        demo.demo_rows("train", "sarcastic")
    assert all(name in str(caught.value) for name in demo.DIRECTIONS)
    with pytest.raises(ValueError, match="'sarcastic'"):
        demo.write_demo(tmp_path / "never", "sarcastic")
    assert not (tmp_path / "never").exists()


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'validation'"):
        demo.demo_rows("validation")  # type: ignore[arg-type]
