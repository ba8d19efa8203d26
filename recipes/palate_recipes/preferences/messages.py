"""Parses values of a row to messages and texts, in all common forms, and finds unused fields. Knows no format."""

from __future__ import annotations

import re
from typing import Any

from palate_recipes.preferences.row import Message, fault

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Role names of all formats -> Palate's roles."""

_KINDS = {bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
_SHOWN = 40

_ENCODED = re.compile(r"""\[\s*\{\s*['"](?:role|from|content|value)['"]\s*:""")
_TRANSCRIPT = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ \t]*")


MEDIA = frozenset(
    (
        "image",
        "images",
        "image_url",
        "rejected_images",
        "audio",
        "audios",
        "input_audio",
        "video",
        "videos",
        "video_url",
    )
)
"""Fields and parts that are not text: those of TRL, LLaMA-Factory, ms-swift, OpenAI and Ollama."""


def refuse_media(value: dict[str, Any], where: str = "") -> None:
    """Raises RowFaults if a row, a turn or a part has an image, audio or video. Null and empty ones do not count.

    Args:
        value: The object.
        where: Its field; empty for a row.
    """
    if MEDIA.isdisjoint(value):
        return
    for name in value:
        if name in MEDIA and value[name] not in (None, "", [], {}):
            field = f"{where}.{name}" if where else name
            raise fault("not-text-content", field, f"`{field}` is {_a_medium(name)}; Palate trains on text alone")


def _a_medium(name: str) -> str:
    return "an image" if "image" in name else "audio" if "audio" in name else "a video"


def kind(value: Any) -> str:
    """Describes the type of a value."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """Returns a value, shortened for a message."""
    try:
        text = repr(value[:_SHOWN] if isinstance(value, str | bytes) else value)
    except RecursionError:
        return f"{kind(value)}, nested too deeply"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def quoted(name: Any) -> str:
    """Returns a field's name for a message: shortened, and without characters that cannot be printed."""
    text = str(name)
    if not text.isprintable():
        text = text.encode("unicode_escape").decode()
    return f"`{text if len(text) <= _SHOWN else text[: _SHOWN - 1] + '…'}`"


def are_encoded_turns(text: str) -> bool:
    """Whether a text is a list of messages that was converted to text with `json.dumps` or `str`."""
    return text.startswith("[") and _ENCODED.match(text) is not None


def read_text(value: Any, field: str) -> str:
    """Returns a field's text.

    Raises:
        RowFaults: It is not text, is empty, or contains a lone surrogate.
    """
    if type(value) is not str:
        raise fault("not-text", field, f"`{field}` is {kind(value)}, not text")
    if not value or value.isspace():
        raise fault("empty-field", field, f"`{field}` is empty")
    check_characters(value, field)
    return value


def check_characters(text: str, field: str) -> None:
    """Raises RowFaults if `text` contains a lone surrogate, which tokenizers cannot encode."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = f"\\u{ord(text[error.start]):04x}"
            raise fault("bad-text", field, f"`{field}` contains {code}, a lone surrogate") from None


def read_content(value: Any, field: str) -> str:
    """Returns the text of a message: a string, or parts with text (`{"type": "text", "text": …}`, `{"text": …}`)."""
    if isinstance(value, dict) and ("text" in value or "type" in value):
        value = [value]
    if not isinstance(value, list):
        return read_text(value, field)
    texts = []
    for index, part in enumerate(value):
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise fault("not-text", field, f"`{field}[{index}]` is {kind(part)}, not a part with text")
        sort = part.get("type") or "text"  # in Parquet and Arrow each part has all fields, and missing ones are null
        text = next((part[name] for name in ("text", "value", "content") if isinstance(part.get(name), str)), None)
        if sort not in ("text", "input_text", "output_text") or text is None:
            what = (
                f"`{field}[{index}]` is of type {shown(sort)}" if sort != "text" else f"`{field}[{index}]` has no text"
            )
            raise fault("not-text-content", field, f"{what}; Palate trains on text alone")
        if not MEDIA.isdisjoint(part):
            refuse_media(part, f"{field}[{index}]")
        texts.append(text)
    return read_text("".join(texts), field)


def read_message(value: Any, field: str) -> Message:
    """Returns one turn: `{role, content}` or `{from, value}`.

    Raises:
        RowFaults: It is not such an object, its role is unknown, or its content is not text.
    """
    if not isinstance(value, dict):
        raise fault("not-text", field, f"`{field}` is {kind(value)}, not a message with role and content")
    name = "role" if "role" in value else "from"
    role = value.get(name)
    if role is None:
        what = f"`{field}.{name}` is null" if name in value else f"`{field}` has no role; it has {_names(value)}"
        raise fault("bad-role", field, what)
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None and role != "function_call":  # ShareGPT's name for a tool call
        raise fault("bad-role", field, f"`{field}` has the role {shown(role)}; use system, user, assistant or tool")
    where = "content" if "content" in value else "value"
    if (
        len(value) == 2 and known is not None and type(value.get(where)) is str
    ):  # for speed: a role and a text, as in most
        return Message(known, read_text(value[where], f"{field}.{where}"))
    refuse_media(value, field)
    content = value.get("content", value.get("value", value.get("text")))
    if known is None or value.get("tool_calls") or value.get("function_call"):
        raise fault("not-text-content", field, f"`{field}` is a tool call; Palate trains on text alone")
    if where not in value and "text" not in value:
        raise fault("missing-field", field, f"`{field}` has no content; it has {_names(value)}")
    return Message(known, read_content(content, f"{field}.{where if where in value else 'text'}"))


def read_messages(value: Any, field: str) -> tuple[Message, ...]:
    """Returns the turns of a list, at least one, without an empty system turn at the beginning.

    Raises:
        RowFaults: It is not a list of messages.
    """
    if not isinstance(value, list):
        raise fault("not-text", field, f"`{field}` is {kind(value)}, not a list of messages")
    if not value:
        raise fault("empty-field", field, f"`{field}` is an empty list")
    turns = enumerate(value)
    if len(value) > 1 and _is_empty_system(value[0]):
        next(turns)
    return tuple([read_message(item, f"{field}[{index}]") for index, item in turns])


def _is_empty_system(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and (value.get("role") or value.get("from")) == "system"
        and value.get("content", value.get("value")) == ""
    )


def check_prompt(prompt: tuple[Message, ...], field: str) -> tuple[Message, ...]:
    """Returns a valid conversation before an answer.

    Raises:
        RowFaults: A system turn is not the first, turns do not alternate, or the last turn is not the user's.
    """
    turns = prompt[1:] if prompt and prompt[0].role == "system" else prompt
    if not turns:
        raise fault("turn-order", field, f"`{field}` has no user turn")
    before = "assistant"
    for index, turn in enumerate(turns, start=len(prompt) - len(turns)):
        role = turn.role
        if role == "system":
            raise fault("turn-order", field, f"`{field}` has a system turn at position {index + 1}, not as the first")
        if role != "user" and index == len(prompt) - len(turns):
            who = "an assistant" if role == "assistant" else "a tool's"
            raise fault("turn-order", field, f"`{field}` begins with {who} turn, not with a user turn")
        if (role == before and role != "tool") or (role == "tool" and before == "user"):
            raise fault(
                "turn-order", field, f"`{field}` has two turns in a row by {_who(before, role)}, position {index + 1}"
            )
        before = role
    if before == "assistant":
        raise fault("turn-order", field, f"`{field}` ends with an assistant turn, so nothing is asked")
    return prompt


def _who(before: str, role: str) -> str:
    return f"the {role}" if before == role else f"{before} and {role}"


def read_prompt(value: Any, field: str) -> tuple[Message, ...]:
    """Returns an unchecked prompt. A text is one user turn, a transcript (`\\n\\nHuman: …`) several turns."""
    if isinstance(value, list):
        return read_messages(value, field)
    text = read_text(value, field)
    if are_encoded_turns(text):
        raise fault("not-text", field, f"`{field}` is a text that holds a list of messages; write the list itself")
    if text.startswith(("\n\nHuman:", "Human:")) and (turns := read_transcript(text, field, open_end=True)):
        return turns
    return (Message("user", text),)


def read_transcript(text: str, field: str, *, open_end: bool = False) -> tuple[Message, ...]:
    """Returns the turns of an HH-RLHF transcript, or an empty result if `text` is not one.

    Args:
        text: `\\n\\nHuman: …\\n\\nAssistant: …` and so on.
        field: Field name for error messages.
        open_end: The last turn may be an empty assistant turn: the answer follows.
    """
    pieces = _TRANSCRIPT.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        return ()
    turns = [
        Message("user" if who == "Human" else "assistant", said)
        for who, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if open_end and turns[-1].role == "assistant" and not turns[-1].content.strip():
        turns.pop()
    for index, turn in enumerate(turns):
        if not turn.content.strip():
            raise fault("empty-field", field, f"`{field}` has an empty turn at position {index + 1}")
        check_characters(turn.content, field)
    return tuple(turns)


def read_answer(value: Any, field: str, prompt: tuple[Message, ...]) -> str:
    """Returns an answer's text from a string, a message, or a list of the prompt's turns and the answer.

    Raises:
        RowFaults: It is none of these.
    """
    if type(value) is str:
        return read_text(value, field)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise fault("not-text", field, f"`{field}` is {kind(value)}, not text or messages")
    turns = read_messages(value, field)
    if turns[-1].role != "assistant":
        raise fault("bad-role", field, f"`{field}` ends with a turn of the {turns[-1].role}, not of the assistant")
    before = turns[:-1]
    if before and before != prompt and before != without_system(prompt) and without_system(before) != prompt:
        raise fault("different-prompts", field, f"`{field}` has other turns before the answer than the prompt")
    return turns[-1].content


def without_system(prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """Returns a conversation without its system turn."""
    return prompt[1:] if prompt and prompt[0].role == "system" else prompt


def _names(value: dict[str, Any]) -> str:
    return ", ".join(quoted(name) for name in list(value)[:4]) or "no fields"


def gives_tools(row: dict[str, Any]) -> bool:
    """Whether a row has tools (not an empty list, as in many exports). OpenAI's preference format has them in `input`."""
    inner = row.get("input")
    return bool(row.get("tools") or row.get("functions") or (type(inner) is dict and inner.get("tools")))


def weights(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns field and description of each turn with a `weight` other than 1.

    Source: OpenAI's fine-tuning files, where an assistant turn with weight 0 is not trained on.
    """
    inner = row.get("input")
    lists = [*row.items(), ("input.messages", inner.get("messages") if type(inner) is dict else None)]
    return [
        (f"{field}[{index}]", f"`{field}[{index}].weight` is {shown(turn['weight'])}")
        for field, turns in lists
        if type(turns) is list
        for index, turn in enumerate(turns)
        if type(turn) is dict and "weight" in turn and turn["weight"] not in (1, None)
    ]
