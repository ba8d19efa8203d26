"""Open WebUI's export of feedback: ratings of answers, each with a copy of its chat. Knows no other format.

Source: Open WebUI 0.12, `GET /api/v1/evaluations/feedbacks/all/export`, and its page that makes a feedback of a rating.
"""

from __future__ import annotations

import re
from typing import Any

from palate_recipes.preferences.formats.fields import Format, Parts, Raw, need
from palate_recipes.preferences.messages import check_prompt, kind, quoted, read_text, shown
from palate_recipes.preferences.row import Message, fault

FIELDS = ("data", "meta", "snapshot")
"""Fields that a feedback is known by, besides `type`."""

_CHAT = "snapshot.chat.chat"
_MESSAGES = f"{_CHAT}.history.messages"

_THOUGHT = re.compile(r'<details\s+type="(?:reasoning|code_interpreter)"')
_THOUGHT_END = "</details>"
_SPACES = re.compile(r"\s*")
_TOOLS = re.compile(r'<details\s+type="tool_calls"')


def read_feedback(row: Raw) -> Parts:
    """Returns the rated answer, and the other one if the chat has one to the same question.

    A rating of an answer with siblings compares it with them, as on Open WebUI's leaderboard. Of several siblings the first one that
    has text, and not the same rating itself, is the other answer. Without one the row is one answer and its label.
    """
    need(row, "type", *FIELDS)
    if row["type"] != "rating":
        raise fault("bad-label", "type", f"`type` is {shown(row['type'])}, not 'rating'")
    is_good = _rating(_object(row, "data").get("rating"))
    messages = _messages(row)
    name = _object(row, "meta").get("message_id")
    rated = messages.get(name) if isinstance(name, str) else None
    if not isinstance(name, str) or not isinstance(rated, dict):
        raise fault(
            "missing-field", "meta.message_id", f"`meta.message_id` is {shown(name)}, which no message of the chat has"
        )
    if rated.get("role") != "assistant":
        raise fault(
            "bad-role", "meta.message_id", f"`meta.message_id` is a message of the role {shown(rated.get('role'))}"
        )
    answer = _text(rated, f"{_MESSAGES}.{name}")
    prompt = check_prompt((*_system(row), *_turns_before(messages, rated)), _MESSAGES)
    other = _other(messages, rated, name, is_good)
    return (prompt, answer, other) if is_good else (prompt, other, answer)


_RATINGS = {1: 1, 0: 0, -1: -1, "1": 1, "0": 0, "-1": -1}


def _known(rating: Any) -> int | None:
    """Returns a rating as a number; None if it is none."""
    is_one = isinstance(rating, str | int) and not isinstance(rating, bool)
    return _RATINGS.get(rating) if is_one else None


def _rating(value: Any) -> bool:
    known = _known(value)
    if known is None:
        raise fault("bad-label", "data.rating", f"`data.rating` is {shown(value)}, not 1, 0 or -1")
    if known == 0:
        raise fault("tie", "data.rating", f"is a tie: `data.rating` is {shown(value)}")
    return known > 0


def _object(row: Any, field: str) -> dict[str, Any]:
    """Returns an object by the path of its field."""
    found = row
    for name in field.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        what = f"is {kind(found)}, not an object"
        raise fault("missing-field" if found is None else "not-text", field, f"`{field}` {what}")
    return found


def _messages(row: Raw) -> dict[str, Any]:
    if row["snapshot"] is None:
        raise fault(
            "missing-field",
            "snapshot",
            "`snapshot` is null: the feedback has no copy of its chat, so no question and no answer",
        )
    return _object(row, _MESSAGES)


def _system(row: Raw) -> tuple[Message, ...]:
    chat = _object(row, _CHAT)
    params = chat.get("params")
    text = (params.get("system") if isinstance(params, dict) else None) or chat.get("system")
    if not text or (isinstance(text, str) and text.isspace()):
        return ()
    return (Message("system", read_text(text, f"{_CHAT}.params.system")),)


def _turns_before(messages: dict[str, Any], rated: dict[str, Any]) -> tuple[Message, ...]:
    """Returns the turns from the first one to the question of an answer. A chat is a tree: each message names its parent."""
    turns: list[Message] = []
    name, seen = rated.get("parentId"), set()
    while name is not None:
        turn = messages.get(name) if isinstance(name, str) else None
        if not isinstance(turn, dict) or name in seen:
            what = "which no message of the chat has" if turn is None else "which leads to no first message"
            raise fault("missing-field", _MESSAGES, f"a message of the chat has the parent {shown(name)}, {what}")
        seen.add(name)
        field = f"{_MESSAGES}.{name}"
        if turn.get("role") not in ("user", "assistant", "system"):
            raise fault("bad-role", field, f"a message of the chat has the role {shown(turn.get('role'))}")
        turns.append(Message(turn["role"], _text(turn, field)))
        name = turn.get("parentId")
    return tuple(reversed(turns))


def _text(message: dict[str, Any], field: str) -> str:
    content = message.get("content")
    if message.get("files"):
        what = (
            f"{quoted(field)} has a file or an image, which its text alone does not tell; Palate trains on text alone"
        )
        raise fault("not-text-content", field, what)
    if isinstance(content, str):
        if _TOOLS.search(content):
            raise fault("not-text-content", field, f"{quoted(field)} has a tool call; Palate trains on text alone")
        content = _without_thoughts(content)
    return read_text(content, f"{field}.content")


def _without_thoughts(content: str) -> str:
    """Returns an answer without its thoughts, which Open WebUI does not send back to a model either."""
    # One pass: a single regular expression from opener to closer takes quadratic time over openers that are never closed.
    kept: list[str] = []
    start = 0
    while (opener := _THOUGHT.search(content, start)) is not None:
        inner = content.find(">", opener.end())
        end = content.find(_THOUGHT_END, inner) if inner >= 0 else -1
        if end < 0:  # no later opener has a closer either
            break
        kept.append(content[start : opener.start()])
        after = _SPACES.match(content, end + len(_THOUGHT_END))
        assert after is not None  # the pattern also matches the empty text
        start = after.end()
    return "".join((*kept, content[start:]))


def _other(messages: dict[str, Any], rated: dict[str, Any], name: str, is_good: bool) -> str | None:
    parent = messages.get(rated["parentId"])  # there: the turns before were read
    children = parent.get("childrenIds") if isinstance(parent, dict) else None
    names = [child for child in children if isinstance(child, str)] if isinstance(children, list) else []
    for sibling in dict.fromkeys(names):  # a hostile row may name one many times
        found = messages.get(sibling) if sibling != name else None
        if not isinstance(found, dict) or found.get("role") != "assistant" or found.get("error"):
            continue
        if not isinstance(found.get("content"), str) or not _without_thoughts(found["content"]).strip():
            continue
        annotation = found.get("annotation")
        own = annotation.get("rating") if isinstance(annotation, dict) else None
        if _known(own) == (1 if is_good else -1):  # both are good, or both are bad
            continue
        return _text(found, f"{_MESSAGES}.{sibling}")
    return None


FORMATS = (
    Format(
        "open-webui",
        "Open WebUI's exported feedback: `data.rating` and `snapshot`; a pair if the answer has siblings, else an answer and its label",
        read_feedback,
        reads=frozenset(
            ("type", *FIELDS, "id", "user_id", "version", "created_at", "updated_at")  # the last five say who and when
        ),
    ),
)
