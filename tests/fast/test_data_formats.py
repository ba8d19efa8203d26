"""Every format, as the ones that publish it show it, reads into the row that is meant; real files are read whole."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from palate_recipes.errors import DataError
from palate_recipes.preferences.check import check, read_files
from palate_recipes.preferences.columns import format_for
from palate_recipes.preferences.formats import FORMATS, detect, format_named, read_row
from palate_recipes.preferences.formats.detection import SHAPES
from palate_recipes.preferences.load import read_rows
from palate_recipes.preferences.row import Message, Row, RowFaults, Strategy
from palate_recipes.preferences.writing import WRITTEN, write_rows
from tests.fast.corpus_rows import feedback

REAL = Path(__file__).parents[2].parent / "shared" / "data"

Q, A, B = "Which planet has rings?", "Saturn.", "The Moon."
SYSTEM, USER = Message("system", "Be brief."), Message("user", Q)


def says(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def turn(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}


def parts(text: str) -> list[dict[str, str]]:
    return [{"text": text}]


def typed(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "value": text}]


EARLIER = (Message("user", "Hello"), Message("assistant", "Hi."))
PAIR = (A, B)

OTHERS: list[tuple[str, str, dict[str, Any], tuple[Message, ...]]] = [
    ("ms-swift", "named-pairs", {"query": Q, "response": A, "rejected_response": B}, (USER,)),
    (
        "ms-swift with turns before",
        "named-pairs",
        {"query": Q, "response": A, "rejected_response": B, "history": [["Hello", "Hi."]], "system": "Be brief."},
        (SYSTEM, *EARLIER, USER),
    ),
    ("argilla", "named-pairs", {"instruction": Q, "chosen_response": A, "rejected_response": B}, (USER,)),
    ("distilabel", "named-pairs", {"system": "Be brief.", "input": Q, "chosen": A, "rejected": B}, (SYSTEM, USER)),
    ("axolotl", "named-pairs", {"input": Q, "chosen_response": A, "rejected_response": B}, (USER,)),
    ("SHP", "compared", {"history": Q, "human_ref_A": A, "human_ref_B": B, "labels": 1, "score_A": 9}, (USER,)),
    ("SHP, the second", "compared", {"history": Q, "human_ref_A": B, "human_ref_B": A, "labels": 0}, (USER,)),
    ("HelpSteer2", "compared", {"prompt": Q, "response_1": A, "response_2": B, "preference_strength": -2}, (USER,)),
    (
        "HelpSteer3",
        "compared",
        {"context": [says("user", Q)], "response1": B, "response2": A, "overall_preference": 1},
        (USER,),
    ),
    (
        "PKU-SafeRLHF",
        "compared",
        {"prompt": Q, "response_0": B, "response_1": A, "better_response_id": 1, "safer_response_id": 0},
        (USER,),
    ),
    ("AlpacaFarm", "compared", {"instruction": Q, "input": "", "output_1": A, "output_2": B, "preference": 1}, (USER,)),
    ("an arena", "compared", {"prompt": Q, "response_a": B, "response_b": A, "winner": "model_b"}, (USER,)),
    (
        "an arena's conversations",
        "compared",
        {
            "conversation_a": [says("user", Q), says("assistant", A)],
            "conversation_b": [says("user", Q), says("assistant", B)],
            "winner": "model_a",
        },
        (USER,),
    ),
    (
        "nectar",
        "ranked",
        {
            "prompt": f"\n\nHuman: {Q}\n\nAssistant: ",
            "answers": [{"answer": B, "rank": 7.0}, {"answer": "Mars.", "rank": 2.0}, {"answer": A, "rank": 1.0}],
        },
        (USER,),
    ),
    (
        "NeMo RL",
        "ranked",
        {
            "context": [says("user", Q)],
            "completions": [
                {"rank": 1, "completion": [says("assistant", B)]},
                {"rank": 0, "completion": [says("assistant", A)]},
            ],
        },
        (USER,),
    ),
    (
        "UltraFeedback with scores",
        "ranked",
        {
            "instruction": Q,
            "completions": [{"response": B, "overall_score": 2.0}, {"response": A, "overall_score": 8.5}],
        },
        (USER,),
    ),
    ("lists of texts and scores", "ranked", {"prompt": Q, "completions": [A, B], "scores": [0.9, 0.1]}, (USER,)),
]

PAIRS: list[tuple[str, str, dict[str, Any], tuple[Message, ...]]] = [
    ("PAI", "pai", {"prompt": Q, "chosen": A, "rejected": B}, (USER,)),
    ("PAI with a system text", "pai", {"system": "Be brief.", "prompt": Q, "chosen": A, "rejected": B}, (SYSTEM, USER)),
    ("TRL, texts", "pai", {"prompt": Q, "chosen": A, "rejected": B, "images": None}, (USER,)),
    (
        "TRL, messages",
        "trl",
        {"prompt": [says("user", Q)], "chosen": [says("assistant", A)], "rejected": [says("assistant", B)]},
        (USER,),
    ),
    (
        "TRL, the prompt in the answers",
        "trl",
        {
            "chosen": [says("system", "Be brief."), says("user", Q), says("assistant", A)],
            "rejected": [says("system", "Be brief."), says("user", Q), says("assistant", B)],
        },
        (SYSTEM, USER),
    ),
    (
        "an empty system turn",
        "trl",
        {
            "prompt": [says("system", ""), says("user", Q)],
            "chosen": [says("assistant", A)],
            "rejected": [says("assistant", B)],
        },
        (USER,),
    ),
    (
        "UltraFeedback, binarized",
        "trl",
        {
            "prompt": Q,
            "prompt_id": "6f1c",
            "chosen": [says("user", Q), says("assistant", A)],
            "rejected": [says("user", Q), says("assistant", B)],
            "messages": [says("user", Q), says("assistant", A)],
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
        (USER,),
    ),
    ("Orca pairs", "trl", {"system": "Be brief.", "question": Q, "chosen": A, "rejected": B}, (SYSTEM, USER)),
    ("Orca pairs without a system text", "trl", {"system": "", "question": Q, "chosen": A, "rejected": B}, (USER,)),
    (
        "SWIFT",
        "messages",
        {"messages": [says("system", "Be brief."), says("user", Q), says("assistant", A)], "rejected_response": B},
        (SYSTEM, USER),
    ),
    (
        "SWIFT, rejected messages",
        "messages",
        {
            "messages": [says("user", Q), says("assistant", A)],
            "rejected_messages": [says("user", Q), says("assistant", B)],
        },
        (USER,),
    ),
    (
        "OpenAI and Azure",
        "openai",
        {
            "input": {
                "messages": [says("developer", "Be brief."), says("user", Q)],
                "tools": [],
                "parallel_tool_calls": True,
            },
            "preferred_output": [says("assistant", A)],
            "non_preferred_output": [says("assistant", B)],
        },
        (SYSTEM, USER),
    ),
    (
        "Fireworks and Together, several turns",
        "openai",
        {
            "input": {"messages": [says("user", "Hello"), says("assistant", "Hi."), says("user", Q)]},
            "preferred_output": [says("assistant", A)],
            "non_preferred_output": [says("assistant", B)],
        },
        (*EARLIER, USER),
    ),
    (
        "OpenAI, content in parts",
        "openai",
        {
            "input": {"messages": [says("user", [{"type": "text", "text": Q}])]},
            "preferred_output": [says("assistant", [{"type": "text", "text": A}])],
            "non_preferred_output": [says("assistant", [{"type": "text", "text": B}])],
        },
        (USER,),
    ),
    (
        "ShareGPT, LLaMA-Factory's ranking",
        "sharegpt",
        {
            "conversations": [turn("human", "Hello"), turn("gpt", "Hi."), turn("human", Q)],
            "chosen": turn("gpt", A),
            "rejected": turn("gpt", B),
            "system": "Be brief.",
        },
        (SYSTEM, *EARLIER, USER),
    ),
    (
        "ShareGPT with an observation",
        "sharegpt",
        {
            "conversations": [turn("human", Q), turn("gpt", "I look it up."), turn("observation", "{}")],
            "chosen": turn("gpt", A),
            "rejected": turn("gpt", B),
        },
        (USER, Message("assistant", "I look it up."), Message("tool", "{}")),
    ),
    (
        "Alpaca, LLaMA-Factory's ranking",
        "alpaca",
        {
            "instruction": "Which planet",
            "input": "has rings?",
            "chosen": A,
            "rejected": B,
            "history": [["Hello", "Hi."]],
        },
        (*EARLIER, Message("user", "Which planet\nhas rings?")),
    ),
    ("Alpaca, ranked outputs", "alpaca-ranking", {"instruction": Q, "input": "", "output": [A, B]}, (USER,)),
    (
        "HH-RLHF",
        "hh",
        {
            "chosen": f"\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: {Q}\n\nAssistant: {A}",
            "rejected": f"\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: {Q}\n\nAssistant: {B}",
        },
        (*EARLIER, USER),
    ),
    (
        "HH's prompt apart",
        "pai",
        {"prompt": f"\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: {Q}\n\nAssistant:", "chosen": A, "rejected": B},
        (*EARLIER, USER),
    ),
    (
        "typed parts, LLaMA-Factory v1",
        "typed-messages",
        {
            "chosen_messages": [
                {**says("user", typed(Q)), "loss_weight": 0.0},
                {**says("assistant", typed(A)), "loss_weight": 1.0},
            ],
            "rejected_messages": [says("user", typed(Q)), says("assistant", typed(B))],
        },
        (USER,),
    ),
    (
        "Amazon Nova",
        "nova",
        {
            "schemaVersion": "bedrock-conversation-2024",
            "system": parts("Be brief."),
            "messages": [
                says("user", parts("Hello")),
                says("assistant", parts("Hi.")),
                says("user", parts(Q)),
                {
                    "role": "assistant",
                    "candidates": [
                        {"content": parts(B), "preferenceLabel": "non-preferred"},
                        {"content": parts(A), "preferenceLabel": "preferred"},
                    ],
                },
            ],
        },
        (SYSTEM, *EARLIER, USER),
    ),
]

OTHERS.append(
    (
        "Open WebUI",
        "open-webui",
        feedback(siblings=(B,), q2={"content": Q}, a2={"content": A}),
        (Message("system", "s"), Message("user", "first"), Message("assistant", "one"), USER),
    )
)
PAIRS += OTHERS

SINGLE: list[tuple[str, str, Strategy, dict[str, Any], tuple[str | None, str | None]]] = [
    ("TRL, unpaired texts", "unpaired", "kto", {"prompt": Q, "completion": A, "label": True}, (A, None)),
    (
        "TRL, unpaired messages",
        "unpaired",
        "kto",
        {"prompt": [says("user", Q)], "completion": [says("assistant", B)], "label": False},
        (None, B),
    ),
    (
        "LLaMA-Factory, messages and label",
        "unpaired",
        "kto",
        {"messages": [says("user", Q), says("assistant", B)], "label": False},
        (None, B),
    ),
    (
        "LLaMA-Factory, conversations and kto_tag",
        "unpaired",
        "kto",
        {"conversations": [turn("human", Q), turn("gpt", A)], "kto_tag": True},
        (A, None),
    ),
    (
        "LLaMA-Factory, instructions and kto_tag",
        "unpaired",
        "kto",
        {"instruction": Q, "input": "", "output": B, "kto_tag": False},
        (None, B),
    ),
    ("a label in a table", "unpaired", "kto", {"prompt": Q, "completion": B, "label": "False"}, (None, B)),
    ("a label of 1", "unpaired", "kto", {"prompt": Q, "response": A, "label": 1}, (A, None)),
    (
        "OpenAI's chat",
        "chat",
        "sft",
        {"messages": [says("user", Q), {**says("assistant", A), "tool_calls": None}]},
        (A, None),
    ),
    ("ShareGPT", "sharegpt-sft", "sft", {"conversations": [turn("human", Q), turn("gpt", A)]}, (A, None)),
    ("Alpaca", "instructions", "sft", {"instruction": Q, "input": "", "output": A}, (A, None)),
    ("a topic beside instructions", "instructions", "sft", {"instruction": Q, "output": A, "label": "sky"}, (A, None)),
    ("prompt and completion", "completions", "sft", {"prompt": Q, "completion": A}, (A, None)),
    ("prompt and response", "completions", "sft", {"prompt": Q, "response": A}, (A, None)),
    ("the chosen one of a pair", "completions", "sft", {"prompt": Q, "chosen": A, "rejected": 5}, (A, None)),
    ("chosen before response", "completions", "sft", {"prompt": Q, "chosen": A, "response": B}, (A, None)),
]


@pytest.mark.parametrize(("name", "raw", "prompt"), [row[1:] for row in PAIRS], ids=[row[0] for row in PAIRS])
def test_a_published_pair_is_read(name: str, raw: dict[str, Any], prompt: tuple[Message, ...]) -> None:
    assert detect(raw).name == name
    assert read_row(raw, 3) == Row(3, prompt, *PAIR)
    assert read_row(raw, 3, format=FORMATS[name]) == Row(3, prompt, *PAIR)
    assert read_row(raw, 3, strategy=None) == read_row(raw, 3, strategy="kto") == Row(3, prompt, *PAIR)
    assert read_row(raw, 3, strategy="sft").chosen == A


@pytest.mark.parametrize(
    ("name", "strategy", "raw", "answers"), [row[1:] for row in SINGLE], ids=[row[0] for row in SINGLE]
)
def test_a_published_answer_is_read(
    name: str, strategy: Strategy, raw: dict[str, Any], answers: tuple[str | None, str | None]
) -> None:
    assert detect(raw, strategy).name == name
    assert read_row(raw, 1, strategy=strategy) == Row(1, (USER,), *answers)
    assert read_row(raw, 1, strategy=strategy, format=FORMATS[name]) == Row(1, (USER,), *answers)


def test_every_format_is_shown() -> None:
    assert {row[1] for row in PAIRS} | {row[1] for row in SINGLE} == set(FORMATS)


def test_a_format_is_named_or_the_nearest_is() -> None:
    assert format_named("sharegpt").name == "sharegpt"
    with pytest.raises(DataError, match="unknown data format 'share-gpt': did you mean 'sharegpt'"):
        format_named("share-gpt")


TURNS = (SYSTEM, Message("user", 'Say "hello",\nplease'), Message("assistant", "Hi; [1]\t"), USER)
ROWS = {
    "pair": Row(1, TURNS, '["Saturn"]', "{B}"),
    "question": Row(1, TURNS[:1] + TURNS[-1:], '{"name": "Saturn"}', "null"),
    "talk": Row(1, TURNS[1:], "Saturn, Jupiter", "Saturn,\n\nand more"),
    "good": Row(1, TURNS, " Saturn.\r\n", None),
    "bad": Row(1, TURNS[1:], None, "The Moon\u2028 é😀"),
}


@pytest.mark.parametrize("suffix", [*WRITTEN, ".jsonl.gz", ".json.zst", ".tsv.zst"])
@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.write])
def test_each_format_passes_through_each_container(name: str, suffix: str, tmp_path: Path) -> None:
    write = FORMATS[name].write
    assert write is not None
    held = 0
    for row in ROWS.values():
        try:
            raw = write(row)
        except RowFaults:
            continue
        path = tmp_path / f"rows{suffix}"
        assert write_rows(path, [raw, raw]) == 2
        one = (
            row.rejected is None
            or row.chosen is None
            or name in ("chat", "sharegpt-sft", "instructions", "completions")
        )
        strategy: Strategy = "kto" if name == "unpaired" else "sft" if one else "dpo"
        read = read_rows(path, strategy=strategy)
        expected = row._replace(rejected=None) if one and row.chosen is not None else row
        if name in ("chat", "sharegpt-sft"):
            read = [found for found in read if len(found.prompt) == len(row.prompt)]
        assert [found[1:] for found in read] == [expected[1:]] * 2, path.read_bytes()
        held += 1
    assert held


@pytest.mark.parametrize(
    ("name", "strategy", "count"),
    [("general_sharegpt_300.json", "dpo", 300), ("kto_en_demo.json", "kto", 300), ("v1_dpo_demo.jsonl", "dpo", 10)],
)
def test_real_files_are_read_whole(name: str, strategy: Strategy, count: int) -> None:
    if not (REAL / name).exists():
        pytest.skip(f"{REAL / name} is not here")
    rows = read_rows(REAL / name, strategy=strategy)
    assert len({row.number for row in rows}) == len(rows) == count
    assert all(row.prompt[-1].role == "user" for row in rows)
    if strategy == "kto":
        assert {row.chosen is None for row in rows} == {True, False}


TIES: list[dict[str, Any]] = [
    {"prompt": Q, "response_1": A, "response_2": B, "preference_strength": 0},
    {"instruction": Q, "output_1": A, "output_2": B, "preference": 1.5},
    {"prompt": Q, "response_a": A, "response_b": B, "winner": "tie (bothbad)"},
    {"prompt": Q, "response_a": A, "response_b": B, "winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1},
    {"prompt": Q, "completions": [{"text": A, "score": 3}, {"text": B, "score": 3}]},
]


def test_ties_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "compared.jsonl"
    write_rows(path, [*TIES, OTHERS[7][2]])
    skipped: dict[int, str] = {}
    assert [row.number for row in read_rows(path, on_skip=skipped.__setitem__)] == [6]
    assert list(skipped) == [1, 2, 3, 4, 5]
    assert all(": is a tie" in reason for reason in skipped.values())
    report = read_files([(path, path.name)]).finish()
    assert (report.usable, report.findings["tie"].count, report.count("error")) == (1, 5, 0)
    write_rows(path, TIES)
    with pytest.raises(DataError, match="5 rows are ties"):
        read_rows(path)


def test_fields_of_several_formats_are_an_error_that_names_them() -> None:
    both = {"prompt": Q, "response_a": A, "response_b": B, "winner": "a", "completions": [A, B], "scores": [2, 1]}
    with pytest.raises(RowFaults, match="compared or ranked: name one with --from") as found:
        read_row(both, 1)
    assert found.value.faults[0].code == "ambiguous-format"
    assert read_row(both, 1, format=FORMATS["compared"]).chosen == A
    for row in ({"prompt": Q, "question": "Why?", "response": A, "rejected_response": B},):
        with pytest.raises(RowFaults, match="`prompt` and `question` may each be the question"):
            read_row(row, 1)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": Q, "chosen": A, "rejected": B, "images": ["cat.png"]},
        {"prompt": Q, "chosen": A, "rejected": B, "image": {"bytes": "…", "path": None}},
        {
            "conversations": [turn("human", Q)],
            "chosen": turn("gpt", A),
            "rejected": turn("gpt", B),
            "videos": ["a.mp4"],
        },
        {"messages": [says("user", Q), says("assistant", A)], "rejected_response": B, "audios": ["a.wav"]},
        {"prompt": [{**says("user", Q), "images": ["a"]}], "chosen": A, "rejected": B},
        {"prompt": [says("user", [{"text": Q, "image": "a.png"}])], "chosen": A, "rejected": B},
        {"prompt": [says("user", [{"type": "image"}, {"type": "text", "text": Q}])], "chosen": A, "rejected": B},
    ],
)
def test_images_audio_and_video_are_refused_by_row(row: dict[str, Any]) -> None:
    with pytest.raises(RowFaults) as found:
        read_row(row, 1)
    assert found.value.faults[0].code == "not-text-content"


def test_an_object_around_the_rows_is_read(tmp_path: Path) -> None:
    rows = [OTHERS[0][2], OTHERS[2][2]]
    path = tmp_path / "wrapped.json"
    for text in (json.dumps({"data": rows}), json.dumps({"data": rows, "version": "1"}, indent=1)):
        path.write_text(text)
        assert [(row.number, row.chosen) for row in read_rows(path)] == [(1, A), (2, A)]


def test_a_list_in_a_row_of_json_lines_is_not_called_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"topic": "a", "turns": [{"x": 1}, {"x": 2}]}] * 2)
    with pytest.raises(DataError) as found:
        read_rows(path)
    assert "alone the file" not in str(found.value)
    assert "it has `topic`, `turns`" in str(found.value)


COMPETITION: dict[str, Any] = {
    "id": 30192,
    "model_a": "x",
    "model_b": "y",
    "prompt": json.dumps([Q]),
    "response_a": json.dumps([B]),
    "response_b": json.dumps([A]),
    "winner_model_a": 0,
    "winner_model_b": 1,
    "winner_tie": 0,
}


@pytest.mark.parametrize(
    ("row", "name", "prompt"),
    [
        (  # the fields of openai/webgpt_comparisons
            {
                "question": {"dataset": "eli5", "id": "1", "full_text": Q},
                "quotes_0": {"title": [], "extract": []},
                "answer_0": B,
                "answer_1": A,
                "score_0": -0.5,
                "score_1": 0.5,
            },
            "compared",
            (USER,),
        ),
        (COMPETITION, "compared", (USER,)),  # LMSYS's competition: JSON lists of turns, written as text
        (
            COMPETITION
            | {
                "prompt": json.dumps(["Hello", Q]),
                "response_a": json.dumps(["Hi.", B]),
                "response_b": json.dumps(["Hi.", A]),
            },
            "compared",
            (*EARLIER, USER),
        ),
        ({"input": Q, "candidates": [B, A], "ranks": [2, 1]}, "ranked", (USER,)),  # distilabel's PairRM
        (
            {"instruction": Q, "generations": [B, A], "ratings": ["1", "5"]},
            "ranked",
            (USER,),
        ),  # distilabel's UltraFeedback
        (  # a Parquet file has all fields in all answers
            {
                "prompt": Q,
                "completions": [{"text": B, "rank": None, "score": 2}, {"text": A, "rank": None, "score": 5}],
            },
            "ranked",
            (USER,),
        ),
        (
            {
                "prompt": Q,
                "chosen": [says("system", ""), says("user", Q), says("assistant", A)],
                "rejected": [says("system", ""), says("user", Q), says("assistant", B)],
            },
            "trl",
            (USER,),
        ),
    ],
)
def test_rows_as_the_public_files_have_them_are_read(
    row: dict[str, Any], name: str, prompt: tuple[Message, ...]
) -> None:
    assert detect(row).name == name
    assert read_row(row, 1) == Row(1, prompt, A, B)


HUGE = "9" * 400


@pytest.mark.parametrize(
    ("row", "code"),
    [
        # HelpSteer2 in NeMo's form: 1 favours the second answer. Elsewhere 1 is the first answer.
        ({"prompt": Q, "response_1": B, "response_2": A, "preference": 1}, "ambiguous-format"),
        ({"prompt": Q, "response_1": B, "response_2": A, "preference": 0}, "ambiguous-format"),
        # 0 and 1 count from 0; AlpacaFarm counts from 1.
        ({"instruction": Q, "output_1": A, "output_2": B, "preference": 0}, "bad-label"),
        ({"instruction": Q, "output_1": A, "output_2": B, "preference": True}, "bad-label"),
        ({"instruction": Q, "output_1": A, "output_2": B, "preference": False}, "bad-label"),
        ({"prompt": Q, "response_0": A, "response_1": B, "better_response_id": True}, "bad-label"),
        ({"history": Q, "human_ref_A": A, "human_ref_B": B, "labels": False}, "bad-label"),
        ({"prompt": Q, "response_1": A, "response_2": B, "preference_strength": -100}, "bad-label"),
        # Infinite scores have no difference.
        ({"question": Q, "answer_0": A, "answer_1": B, "score_0": float("inf"), "score_1": float("inf")}, "bad-label"),
        ({"question": Q, "answer_0": A, "answer_1": B, "score_0": HUGE, "score_1": HUGE}, "bad-label"),
        ({"prompt": Q, "completions": [A, B], "scores": [float("inf"), 1]}, "bad-label"),
        # A rank and a score cannot be compared, and of two lists one may contradict the other.
        ({"prompt": Q, "completions": [{"text": A, "rank": 1}, {"text": B, "score": 9}]}, "bad-label"),
        (
            {"prompt": Q, "answers": [{"answer": A, "rank": 1}, {"answer": B, "rank": 2}], "scores": [0, 1]},
            "ambiguous-format",
        ),
        ({"prompt": Q, "responses": [A, B], "ranks": [2, 1], "scores": [2, 1]}, "ambiguous-format"),
        ({"prompt": Q, "responses": [A, B], "candidates": [B, A], "scores": [2, 1]}, "ambiguous-format"),
        (COMPETITION | {"response_b": json.dumps([A, A])}, "different-prompts"),
        (
            COMPETITION
            | {
                "prompt": json.dumps(["Hello", Q]),
                "response_a": json.dumps(["Hi.", B]),
                "response_b": json.dumps(["Hello.", A]),
            },
            "different-prompts",
        ),
        (COMPETITION | {"response_a": "[null]"}, "not-text"),
    ],
)
def test_a_comparison_that_may_mean_the_other_answer_is_refused(row: dict[str, Any], code: str) -> None:
    with pytest.raises(RowFaults) as found:
        read_row(row, 1)
    assert [fault.code for fault in found.value.faults] == [code]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "Prompt;Chosen;REJECTED\nask;yes;no\n"),
        ("without-suffix", "Prompt , Chosen , REJECTED\nask,yes,no\n"),
        ("a.jsonl", '{"Prompt": "ask", " CHOSEN ": "yes", "rejected\\t": "no"}\n'),
        (
            "a.csv",
            '"Messages","Rejected_Response"\n"[{""role"":""user"",""text"":""ask""},{""role"":""bot"",""text"":""yes""}]",no\n',
        ),
        ("a.csv", 'Instruction,OUTPUT\nask,"[""yes"",""no""]"\n'),
        ("a.csv", "Query,History,Chosen_Response,Rejected_Response\nask,[],yes,no\n"),
    ],
)
def test_names_are_read_in_any_case_and_the_check_says_so(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert read_rows(path) == [Row(1, (Message("user", "ask"),), "yes", "no")]
    report = check([(path, name)])
    assert report.usable == 1
    assert not report.of("error")
    said = report.findings["other-names"].places[0].what
    assert said.count(" as `") == len(re.split("[,;]", content.split("\n")[0])), said
    assert "unread-fields" not in report.findings


def test_columns_of_parquet_are_read_in_any_case(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_rows(path, [{"Prompt": "ask", "Chosen ": "yes", "REJECTED": "no"}])
    assert read_rows(path) == [Row(1, (Message("user", "ask"),), "yes", "no")]


def test_an_exact_name_wins_and_two_other_ones_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"Prompt": "x", "PROMPT": "y", "prompt": "ask", "chosen": "yes", "rejected": "no"}\n')
    assert read_rows(path)[0].text == "ask"
    report = check([(path, "a")])
    assert report.findings["unread-fields"].places[0].what == "not read: `PROMPT`, `Prompt`"
    assert "other-names" not in report.findings
    path.write_text('{"Prompt": "x", "PROMPT": "y", "chosen": "yes", "rejected": "no"}\n')
    with pytest.raises(DataError, match="`Prompt` and `PROMPT` differ only in case or blanks"):
        read_rows(path)


def test_another_case_counts_for_each_strategy_and_each_field() -> None:
    labelled = {"Prompt": "ask", "Completion": "yes", "LABEL": "true", "System": "Be kind."}
    system = Message("system", "Be kind.")
    assert read_row(labelled, 1, strategy="kto") == Row(1, (system, Message("user", "ask")), "yes", None)
    with pytest.raises(RowFaults, match="`Images` is an image"):
        read_row({"prompt": "ask", "chosen": "yes", "rejected": "no", "Images": ["a.png"]}, 1)
    with pytest.raises(RowFaults, match=r"`Chosen\[0\]` has no role"):
        read_row({"Prompt": "ask", "Chosen": [{"content": "yes"}], "rejected": "no"}, 1)


def test_named_columns_are_taken_as_they_are() -> None:
    columns = format_for(input_columns={"prompt": "PROMPT"}, label_columns={"chosen": "Chosen", "rejected": "CHOSEN"})
    row = {"PROMPT": "ask", "Prompt": "x", "Chosen": "yes", "CHOSEN": "no"}
    assert read_row(row, 1, format=columns) == Row(1, (Message("user", "ask"),), "yes", "no")


def test_files_with_other_names_in_every_row_keep_few() -> None:
    row = {"prompt": "ask", "chosen": "yes", "rejected": "no"}
    for number in range(3000):
        assert read_row({**row, f"extra-{number}": 1}, number).chosen == "yes"
    wide = dict.fromkeys(map(str, range(300)), 0)
    assert detect({**wide, **row}) is FORMATS["pai"]
    assert detect({"a" * 10_000: 0, **row}) is FORMATS["pai"]
    assert 0 < len(SHAPES) <= 1024
    assert max(map(len, SHAPES)) <= 256
    assert max(len("".join(names)) for names in SHAPES) <= 4096


# Open WebUI's export of feedback.

BEFORE = (Message("system", "s"), Message("user", "first"), Message("assistant", "one"), Message("user", "q"))
THOUGHT = '<details type="reasoning" done="true" duration="2">\n<summary>Thought</summary>\n> hm\n</details>\n'


@pytest.mark.parametrize(
    ("raw", "chosen", "rejected"),
    [
        (feedback(), "good", "bad"),
        (feedback(rating="1"), "good", "bad"),
        (feedback(rating=-1), "bad", "good"),
        (feedback(rating="-1"), "bad", "good"),
        (feedback(siblings=()), "good", None),
        (feedback(rating=-1, siblings=()), None, "good"),
        (feedback(siblings=("", "second", "third")), "good", "second"),
        (feedback(siblings=(THOUGHT, "second")), "good", "second"),
        (feedback(siblings=("first", "second"), b0={"error": {"content": "e"}}), "good", "second"),
        # Both were found good: that is two labels, and no comparison.
        (feedback(b0={"annotation": {"rating": 1}}), "good", None),
        (feedback(b0={"annotation": {"rating": -1}}), "good", "bad"),
        (feedback(a2={"content": f"{THOUGHT}good"}, a1={"content": f"{THOUGHT}one"}), "good", "bad"),
        # As a browser of today writes it: null where there is nothing.
        (
            feedback(a2={"files": None, "annotation": {"rating": 1}}, b0={"annotation": None, "error": None}),
            "good",
            "bad",
        ),
    ],
)
def test_a_feedback_of_open_webui_is_a_pair_or_a_label(raw: dict[str, Any], chosen: Any, rejected: Any) -> None:
    assert detect(raw, None).name == "open-webui"
    assert read_row(raw, 3, strategy=None) == Row(3, BEFORE, chosen, rejected)
    assert read_row(raw, 3, strategy="kto") == Row(3, BEFORE, chosen, rejected)
    if chosen and rejected:
        assert read_row(raw, 3) == Row(3, BEFORE, chosen, rejected)


OPENER = '<details type="reasoning" done="true">'


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (f"one {THOUGHT} \n two{THOUGHT}", "one two"),
        (f"{OPENER}{OPENER}</details>good</details>", "good</details>"),  # as far as the first closer
        (f"{THOUGHT}good {OPENER} hm", f"good {OPENER} hm"),
        (f"good{OPENER[:-1]}</details", f"good{OPENER[:-1]}</details"),
        ('<details type="note">a</details>good', '<details type="note">a</details>good'),
    ],
)
def test_thoughts_of_an_answer_are_left_out(content: str, answer: str) -> None:
    assert read_row(feedback(a2={"content": content}), 1, strategy="kto").chosen == answer


@pytest.mark.parametrize("opener", [OPENER, OPENER[:-1]])
def test_thoughts_that_never_end_take_linear_time(opener: str) -> None:
    content = f"{opener * 4_000}good"  # 150 kB
    begun = time.process_time()
    assert read_row(feedback(a2={"content": content}, b0={"content": opener * 4_000}), 1).chosen == content
    assert time.process_time() - begun < 2


def test_an_export_of_open_webui_trains_on_pairs_or_on_labels(tmp_path: Path) -> None:
    export = tmp_path / "feedback-history-export.json"
    rows = [
        feedback(),
        feedback(rating=-1, siblings=()),
        feedback(rating=0),
        feedback(siblings=(), q2={"content": "why?"}),
    ]
    export.write_text(json.dumps(rows))
    report = check([(export, export.name)], strategy="kto")
    assert report.of("error") == []
    assert report.formats == {"open-webui": 3}
    assert report.findings["tie"].places[0].row == 3
    assert "unread-fields" not in report.findings
    assert [(row.number, row.chosen, row.rejected) for row in read_rows(export, strategy="kto")] == [
        (1, "good", None),
        (1, None, "bad"),
        (2, None, "good"),
        (4, "good", None),
    ]
    with pytest.raises(DataError, match=r"2 of 4 rows are invalid(?s:.*)row 2: is unpaired(?s:.*)row 4: is unpaired"):
        read_rows(export)
    assert [row.number for row in read_rows(export, bad_rows="skip")] == [1]


def test_columns_that_an_export_also_has_keep_their_names(tmp_path: Path) -> None:
    table = tmp_path / "prefs.csv"
    table.write_text("ID,Type,type ,prompt,chosen,rejected\n1,x,y,q,a,b\n")
    report = check([(table, table.name)])
    assert report.of("error") == []
    assert "other-names" not in report.findings
