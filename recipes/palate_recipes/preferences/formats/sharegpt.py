"""ShareGPT's formats: `conversations` of `from` and `value`."""

from __future__ import annotations

from palate_recipes.preferences.formats.fields import (
    Format,
    Parts,
    Raw,
    both_answers,
    good_answer,
    last_answer,
    need,
    with_system,
)
from palate_recipes.preferences.messages import (
    check_prompt,
    read_answer,
    read_messages,
)
from palate_recipes.preferences.row import Message, Row


def read_sharegpt(row: Raw) -> Parts:
    need(row, "conversations", "chosen", "rejected")
    prompt = check_prompt(with_system(row, read_messages(row["conversations"], "conversations")), "conversations")
    return prompt, read_answer(row["chosen"], "chosen", prompt), read_answer(row["rejected"], "rejected", prompt)


_SHAREGPT_ROLES = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


def _from_value(turn: Message) -> Raw:
    return {"from": _SHAREGPT_ROLES[turn.role], "value": turn.content}


def write_sharegpt(row: Row) -> Raw:
    chosen, rejected = (_from_value(Message("assistant", text)) for text in both_answers(row))
    return {"conversations": [_from_value(turn) for turn in row.prompt], "chosen": chosen, "rejected": rejected}


def read_sharegpt_sft(row: Raw) -> Parts:
    return (*last_answer(row, "conversations"), None)


def write_sharegpt_sft(row: Row) -> Raw:
    return {"conversations": [_from_value(turn) for turn in (*row.prompt, Message("assistant", good_answer(row)))]}


FORMATS = (
    Format(
        "sharegpt",
        "`conversations` of `from` and `value`, `chosen`, `rejected`",
        read_sharegpt,
        write_sharegpt,
    ),
    Format(
        "sharegpt-sft",
        "`conversations`, a `gpt` turn last",
        read_sharegpt_sft,
        write_sharegpt_sft,
        every_turn=True,
    ),
)
