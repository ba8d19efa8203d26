"""Rows to raw rows of each format, one function a format; what a format cannot hold is refused, not dropped. Knows no file."""

from __future__ import annotations

from typing import Any

from palate_recipes.data.rows import Message, Row, fault
from palate_recipes.data.turns import read_prompt, without_system

Raw = dict[str, Any]
Turns = tuple[Message, ...]


def turns_as_json(prompt: Turns) -> list[Raw]:
    return [{"role": turn.role, "content": turn.content} for turn in prompt]


def _answer(text: str | None) -> Raw:
    return {"role": "assistant", "content": text}


def _both(row: Row) -> tuple[str, str]:
    if row.chosen is None or row.rejected is None:
        raise fault("wrong-kind", "", "has one answer, and this format holds two")
    return row.chosen, row.rejected


def _one_question(row: Row) -> tuple[str, Raw]:
    turns = without_system(row.prompt)
    if len(turns) != 1:
        raise fault("wrong-kind", "", f"is a conversation of {len(turns)} turns, and this format holds one question")
    return turns[0].content, {"system": row.prompt[0].content} if turns != row.prompt else {}


def write_pai(row: Row) -> Raw:
    prompt, system = _one_question(row)
    if read_prompt(prompt, "prompt") != (Message("user", prompt),):
        raise fault("wrong-kind", "", "has a question that would read as a transcript of several turns")
    answers = {"chosen": row.chosen, "rejected": row.rejected}
    if row.chosen is None:
        _both(row)
    return {**system, "prompt": prompt, **{name: text for name, text in answers.items() if text is not None}}


def write_trl(row: Row) -> Raw:
    chosen, rejected = _both(row)
    return {"prompt": turns_as_json(row.prompt), "chosen": [_answer(chosen)], "rejected": [_answer(rejected)]}


def write_openai(row: Row) -> Raw:
    chosen, rejected = _both(row)
    return {
        "input": {"messages": turns_as_json(row.prompt)},
        "preferred_output": [_answer(chosen)],
        "non_preferred_output": [_answer(rejected)],
    }


def write_messages(row: Row) -> Raw:
    chosen, rejected = _both(row)
    return {"messages": [*turns_as_json(row.prompt), _answer(chosen)], "rejected_response": rejected}


def _typed(turn: Message) -> Raw:
    return {"role": turn.role, "content": [{"type": "text", "value": turn.content}]}


def write_typed_messages(row: Row) -> Raw:
    before = [_typed(turn) for turn in row.prompt]
    chosen, rejected = (_typed(Message("assistant", text)) for text in _both(row))
    return {"chosen_messages": [*before, chosen], "rejected_messages": [*before, rejected]}


_SHAREGPT_ROLES = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


def _from_value(turn: Message) -> Raw:
    return {"from": _SHAREGPT_ROLES[turn.role], "value": turn.content}


def write_sharegpt(row: Row) -> Raw:
    chosen, rejected = (_from_value(Message("assistant", text)) for text in _both(row))
    return {"conversations": [_from_value(turn) for turn in row.prompt], "chosen": chosen, "rejected": rejected}


def _question(row: Row) -> Raw:
    prompt = without_system(row.prompt)
    if any(turn.role == "tool" for turn in prompt):
        raise fault("wrong-kind", "", "has a tool's turn, which this format does not hold")
    said = [turn.content for turn in prompt]
    raw: Raw = {"instruction": said[-1]}
    if prompt != row.prompt:
        raw["system"] = row.prompt[0].content
    if said[:-1]:
        raw["history"] = [list(turn) for turn in zip(said[:-1:2], said[1:-1:2], strict=True)]
    return raw


def write_alpaca_pair(row: Row) -> Raw:
    chosen, rejected = _both(row)
    return {**_question(row), "chosen": chosen, "rejected": rejected}


def write_instructions(row: Row) -> Raw:
    return {**_question(row), "output": _good(row)}


def write_hh(row: Row) -> Raw:
    turns = without_system(row.prompt)
    names = {"user": "Human", "assistant": "Assistant"}
    texts = [*(turn.content for turn in turns), *_both(row)]
    if turns != row.prompt or any(turn.role not in names for turn in turns):
        raise fault("wrong-kind", "", "has a system or tool turn, which a transcript does not hold")
    if any("\n\nHuman:" in text or "\n\nAssistant:" in text or text != text.lstrip(" \t") for text in texts):
        raise fault("wrong-kind", "", "has text that would read as the beginning of a turn in a transcript")
    before = "".join(f"\n\n{names[turn.role]}: {turn.content}" for turn in turns)
    chosen, rejected = _both(row)
    return {"chosen": f"{before}\n\nAssistant: {chosen}", "rejected": f"{before}\n\nAssistant: {rejected}"}


def write_nova(row: Row) -> Raw:
    chosen, rejected = _both(row)

    def parts(text: str) -> list[Raw]:
        return [{"text": text}]

    turns = without_system(row.prompt)
    if any(turn.role == "tool" for turn in turns):
        raise fault("wrong-kind", "", "has a tool's turn, which this format does not hold")
    candidates = [
        {"content": parts(chosen), "preferenceLabel": "preferred"},
        {"content": parts(rejected), "preferenceLabel": "non-preferred"},
    ]
    return {
        "schemaVersion": "bedrock-conversation-2024",
        **({"system": parts(row.prompt[0].content)} if turns != row.prompt else {}),
        "messages": [
            *({"role": turn.role, "content": parts(turn.content)} for turn in turns),
            {"role": "assistant", "candidates": candidates},
        ],
    }


def write_unpaired(row: Row) -> Raw:
    if row.chosen is not None and row.rejected is not None:
        raise fault("wrong-kind", "", "has two answers, and this format holds one; `unpair` makes two rows of it")
    label = row.chosen is not None
    return {
        "prompt": turns_as_json(row.prompt),
        "completion": [_answer(row.chosen if label else row.rejected)],
        "label": label,
    }


def _good(row: Row) -> str:
    if row.chosen is None:
        raise fault("wrong-kind", "", "is labelled as a bad answer, and this format holds good ones")
    return row.chosen


def write_chat(row: Row) -> Raw:
    return {"messages": [*turns_as_json(row.prompt), _answer(_good(row))]}


def write_sharegpt_sft(row: Row) -> Raw:
    return {"conversations": [_from_value(turn) for turn in (*row.prompt, Message("assistant", _good(row)))]}


def write_completions(row: Row) -> Raw:
    return {"prompt": turns_as_json(row.prompt), "completion": [_answer(_good(row))]}
