"""Formats of messages with roles: OpenAI's preference format, `messages` with a rejected answer, and chats."""

from __future__ import annotations

from palate_recipes.preferences.formats.fields import (
    Format,
    Parts,
    Raw,
    assistant_turn,
    both_answers,
    good_answer,
    last_answer,
    need,
    shared_turns,
    turns_as_json,
    with_system,
)
from palate_recipes.preferences.messages import (
    check_prompt,
    read_answer,
    read_messages,
)
from palate_recipes.preferences.row import Message, Row, fault


def read_openai(row: Raw) -> Parts:
    need(row, "input", "preferred_output", "non_preferred_output")
    given = row["input"]
    messages = given.get("messages") if isinstance(given, dict) else given
    if isinstance(given, dict) and "messages" not in given:
        raise fault("missing-field", "input.messages", "`input.messages` is missing")
    prompt = check_prompt(read_messages(messages, "input.messages"), "input.messages")
    answers = (read_answer(row[name], name, prompt) for name in ("preferred_output", "non_preferred_output"))
    return (prompt, *answers)  # type: ignore[return-value]


def write_openai(row: Row) -> Raw:
    chosen, rejected = both_answers(row)
    return {
        "input": {"messages": turns_as_json(row.prompt)},
        "preferred_output": [assistant_turn(chosen)],
        "non_preferred_output": [assistant_turn(rejected)],
    }


def read_messages_rejected(row: Raw) -> Parts:
    name = "rejected_messages" if "rejected_messages" in row else "rejected_response"
    need(row, "messages", name)
    turns = with_system(row, read_messages(row["messages"], "messages"))
    if turns[-1].role != "assistant":
        raise fault(
            "turn-order",
            "messages",
            f"`messages` ends with a turn of the {turns[-1].role}: the chosen answer is missing",
        )
    prompt = check_prompt(turns[:-1], "messages")
    return prompt, turns[-1].content, read_answer(row[name], name, prompt)


def write_messages(row: Row) -> Raw:
    chosen, rejected = both_answers(row)
    return {"messages": [*turns_as_json(row.prompt), assistant_turn(chosen)], "rejected_response": rejected}


def read_typed_messages(row: Raw) -> Parts:
    need(row, "chosen_messages", "rejected_messages")
    chosen, rejected = (read_messages(row[name], name) for name in ("chosen_messages", "rejected_messages"))
    prompt = check_prompt(shared_turns(chosen, rejected, "chosen_messages", "rejected_messages"), "chosen_messages")
    for name, turns in (("chosen_messages", chosen), ("rejected_messages", rejected)):
        if turns[-1].role != "assistant":
            raise fault("bad-role", name, f"`{name}` ends with a turn of the {turns[-1].role}, not of the assistant")
    return prompt, chosen[-1].content, rejected[-1].content


def _typed(turn: Message) -> Raw:
    return {"role": turn.role, "content": [{"type": "text", "value": turn.content}]}


def write_typed_messages(row: Row) -> Raw:
    before = [_typed(turn) for turn in row.prompt]
    chosen, rejected = (_typed(Message("assistant", text)) for text in both_answers(row))
    return {"chosen_messages": [*before, chosen], "rejected_messages": [*before, rejected]}


def read_chat(row: Raw) -> Parts:
    return (*last_answer(row, "messages"), None)


def write_chat(row: Row) -> Raw:
    return {"messages": [*turns_as_json(row.prompt), assistant_turn(good_answer(row))]}


FORMATS = (
    Format("messages", "`messages`, `rejected_response`", read_messages_rejected, write_messages),
    Format(
        "openai",
        "`input.messages`, `preferred_output`, `non_preferred_output`",
        read_openai,
        write_openai,
    ),
    Format(
        "typed-messages",
        "`chosen_messages`, `rejected_messages`",
        read_typed_messages,
        write_typed_messages,
    ),
    Format("chat", "`messages`, an assistant turn last", read_chat, write_chat, every_turn=True),
)
