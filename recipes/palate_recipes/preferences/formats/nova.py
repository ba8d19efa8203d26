"""Amazon Nova's format: `messages` that end with labelled candidates."""

from __future__ import annotations

from palate_recipes.preferences.formats.fields import (
    Format,
    Parts,
    Raw,
    both_answers,
    need,
    with_system,
)
from palate_recipes.preferences.messages import (
    check_prompt,
    kind,
    read_content,
    read_messages,
    shown,
    without_system,
)
from palate_recipes.preferences.row import Row, fault


def read_nova(row: Raw) -> Parts:
    need(row, "messages")
    messages = row["messages"]
    if not isinstance(messages, list):
        raise fault("not-text", "messages", f"`messages` is {kind(messages)}, not a list of messages")
    last = messages[-1] if messages else None
    if not (isinstance(last, dict) and isinstance(last.get("candidates"), list)):
        raise fault("turn-order", "messages", "`messages` does not end with a turn of `candidates`")
    answers: dict[str, str] = {}
    for index, candidate in enumerate(last["candidates"]):
        field = f"messages[{len(messages) - 1}].candidates[{index}]"
        if not isinstance(candidate, dict):
            raise fault("not-text", field, f"`{field}` is {kind(candidate)}, not a candidate")
        label = candidate.get("preferenceLabel")
        if label not in ("preferred", "non-preferred"):
            raise fault(
                "bad-label", field, f"`{field}.preferenceLabel` is {shown(label)}, not 'preferred' or 'non-preferred'"
            )
        if label in answers:
            raise fault("bad-label", field, f"two candidates are {label}: a pair has one of each")
        answers[label] = read_content(candidate.get("content"), f"{field}.content")
    if len(answers) != 2:
        raise fault("bad-label", "messages", "the candidates are not one preferred and one non-preferred")
    prompt = read_messages(messages[:-1], "messages") if len(messages) > 1 else ()
    return check_prompt(with_system(row, prompt), "messages"), answers["preferred"], answers["non-preferred"]


def write_nova(row: Row) -> Raw:
    chosen, rejected = both_answers(row)

    def parts(text: str) -> list[Raw]:
        return [{"text": text}]

    turns = without_system(row.prompt)
    if any(turn.role == "tool" for turn in turns):
        raise fault("wrong-kind", "", "has a tool turn, which this format does not support")
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


FORMATS = (
    Format(
        "nova",
        "`messages` that end with `candidates` and their `preferenceLabel`",
        read_nova,
        write_nova,
    ),
)
