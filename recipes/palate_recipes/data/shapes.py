"""Raw rows of each format to prompt and answers, one function a format. Knows fields, no file."""

from __future__ import annotations

from typing import Any

from palate_recipes.data.rows import Fault, Message, RowFaults, fault
from palate_recipes.data.turns import (
    check_characters,
    check_prompt,
    kind,
    quoted,
    read_answer,
    read_content,
    read_message,
    read_messages,
    read_prompt,
    read_text,
    read_transcript,
    shown,
)
from palate_recipes.nearest import nearest as nearest_name

Raw = dict[str, Any]
Turns = tuple[Message, ...]
Parts = tuple[Turns, "str | None", "str | None"]
"""The prompt, the answer to learn, the answer to move away from."""

PROMPTS = ("prompt", "question", "query", "messages", "conversations")
"""Fields that hold the question, the first that is there."""


OTHER_PROMPTS = ("\n\nHuman:", "Human:", "[")
"""Beginnings of texts that may be a transcript, or messages that were written as text."""


def listed(names: list[Any], most: int = 4) -> str:
    """Returns some field names, for people."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(quoted(name) for name in sorted(map(str, names))[:most]) + more


def _need(row: Raw, *names: str) -> None:
    missing = [name for name in names if name not in row]
    if missing:
        raise missing_fields(missing, [name for name in row if name not in names])


def missing_fields(missing: list[str], there: list[str], why: str = "") -> RowFaults:
    """Returns a fault that names the fields that are missing, those that may be meant, and those that are there."""
    said = []
    for name in missing:
        near = nearest(name, there)
        said.append(f"`{name}` is missing" + (f" (is it {quoted(near)}?)" if near is not None else ""))
    what = "; ".join(said) + why + (f"; the row has {listed(there)}" if there else "")
    return fault("missing-field", missing[0], what)


def nearest(name: str, there: list[str]) -> str | None:
    """Returns the field that may be a misspelling of `name`."""
    plain = {str(field)[:40].strip("\ufeff _").lower(): field for field in reversed(there[:40])}
    found = nearest_name(name, plain, cutoff=0.7)
    return None if found is None else plain[found]


def _with_system(row: Raw, prompt: Turns, *names: str) -> Turns:
    """The prompt behind the row's own system text, where it has one beside the turns."""
    for name in names or ("system", "system_prompt"):
        text = row.get(name)
        if isinstance(text, list):
            text = read_content(text, name)
        if isinstance(text, str) and text.strip():
            check_characters(text, name)
            if prompt and prompt[0].role == "system":
                raise fault("turn-order", name, f"`{name}` is given, and the conversation has a system turn as well")
            return (Message("system", text), *prompt)
        if text is not None and not isinstance(text, str):
            raise fault("not-text", name, f"`{name}` is {kind(text)}, not text")
    return prompt


def read_texts(row: Raw) -> Parts:
    """`prompt`, `chosen` and `rejected` as texts: the format that most files have, hence the shortest way."""
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if (  # what `read_prompt` and `read_text` would say of most rows, in a tenth of the time
        type(prompt) is type(chosen) is type(rejected) is str
        and prompt.isascii()
        and chosen.isascii()
        and rejected.isascii()
        and not (prompt.isspace() or chosen.isspace() or rejected.isspace())
        and prompt
        and chosen
        and rejected
        and not prompt.startswith(OTHER_PROMPTS)
        and "system" not in row
        and "system_prompt" not in row
    ):
        return (Message("user", prompt),), chosen, rejected
    _need(row, "prompt", "chosen")
    faults: list[Fault] = []
    found: list[Any] = []
    for name in ("prompt", "chosen", "rejected"):
        try:
            found.append(read_text(row[name], name) if name in row else None)
        except RowFaults as error:
            faults += error.faults
    if faults:
        raise RowFaults(*faults)
    prompt, chosen, rejected = found
    turns = check_prompt(read_prompt(prompt, "prompt"), "prompt")
    return _with_system(row, turns) if "system" in row or "system_prompt" in row else turns, chosen, rejected


def read_trl(row: Raw) -> Parts:
    _need(row, "chosen", "rejected")
    name = next((name for name in PROMPTS if name in row), None)
    chosen, rejected = row["chosen"], row["rejected"]
    if name is not None:
        prompt = read_prompt(row[name], name)
        prompt = check_prompt(_with_system(row, prompt), name)
    else:
        prompt = _with_system(row, _shared_turns(read_messages(chosen, "chosen"), read_messages(rejected, "rejected")))
        prompt = check_prompt(prompt, "chosen")
    if type(chosen) is list and len(chosen) > 1 and prompt[0].role != "system":
        first = read_message(chosen[0], "chosen[0]")
        if first.role == "system":  # UltraFeedback's `prompt` is the last question; the whole is in the answers
            prompt = (first, *prompt)
    return prompt, read_answer(chosen, "chosen", prompt), read_answer(rejected, "rejected", prompt)


def _shared_turns(chosen: Turns, rejected: Turns) -> Turns:
    if chosen[:-1] != rejected[:-1]:
        at = next(
            (n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
            min(len(chosen), len(rejected)),
        )
        what = f"`chosen` and `rejected` part at turn {at + 1}, before the last: they answer different conversations"
        raise fault("different-prompts", "rejected", what)
    if len(chosen) == 1:
        raise fault("missing-field", "prompt", "`prompt` is missing, and the answers have no turns before them")
    return chosen[:-1]


def read_openai(row: Raw) -> Parts:
    _need(row, "input", "preferred_output", "non_preferred_output")
    given = row["input"]
    messages = given.get("messages") if isinstance(given, dict) else given
    if isinstance(given, dict) and "messages" not in given:
        raise fault("missing-field", "input.messages", "`input.messages` is missing")
    prompt = check_prompt(read_messages(messages, "input.messages"), "input.messages")
    answers = (read_answer(row[name], name, prompt) for name in ("preferred_output", "non_preferred_output"))
    return (prompt, *answers)  # type: ignore[return-value]


def read_messages_rejected(row: Raw) -> Parts:
    name = "rejected_messages" if "rejected_messages" in row else "rejected_response"
    _need(row, "messages", name)
    turns = _with_system(row, read_messages(row["messages"], "messages"))
    if turns[-1].role != "assistant":
        raise fault(
            "turn-order",
            "messages",
            f"`messages` ends with a turn of the {turns[-1].role}: the chosen answer is missing",
        )
    prompt = check_prompt(turns[:-1], "messages")
    return prompt, turns[-1].content, read_answer(row[name], name, prompt)


def read_typed_messages(row: Raw) -> Parts:
    _need(row, "chosen_messages", "rejected_messages")
    chosen, rejected = (read_messages(row[name], name) for name in ("chosen_messages", "rejected_messages"))
    prompt = check_prompt(_shared_turns(chosen, rejected), "chosen_messages")
    for name, turns in (("chosen_messages", chosen), ("rejected_messages", rejected)):
        if turns[-1].role != "assistant":
            raise fault("bad-role", name, f"`{name}` ends with a turn of the {turns[-1].role}, not of the assistant")
    return prompt, chosen[-1].content, rejected[-1].content


def read_sharegpt(row: Raw) -> Parts:
    _need(row, "conversations", "chosen", "rejected")
    prompt = check_prompt(_with_system(row, read_messages(row["conversations"], "conversations")), "conversations")
    return prompt, read_answer(row["chosen"], "chosen", prompt), read_answer(row["rejected"], "rejected", prompt)


def _instruction(row: Raw) -> Turns:
    """Alpaca's question: `instruction`, `input` below it, `history` before it."""
    _need(row, "instruction")
    asked = read_text(row["instruction"], "instruction")
    more = row.get("input")
    if more is not None and type(more) is not str:
        raise fault("not-text", "input", f"`input` is {kind(more)}, not text")
    check_characters(more or "", "input")
    turns: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise fault("not-text", "history", f"`history` is {kind(history)}, not a list of [question, answer]")
    for index, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise fault(
                "turn-order", f"history[{index}]", f"`history[{index}]` is {shown(turn)}, not [question, answer]"
            )
        turns += [Message("user", read_text(turn[0], f"history[{index}][0]"))]
        turns += [Message("assistant", read_text(turn[1], f"history[{index}][1]"))]
    turns.append(Message("user", f"{asked}\n{more}" if more and more.strip() else asked))
    return _with_system(row, tuple(turns))


def read_alpaca(row: Raw) -> Parts:
    _need(row, "chosen", "rejected")
    prompt = _instruction(row)
    return prompt, read_answer(row["chosen"], "chosen", prompt), read_answer(row["rejected"], "rejected", prompt)


def read_alpaca_ranking(row: Raw) -> Parts:
    _need(row, "output")
    output = row["output"]
    if not isinstance(output, list):
        raise fault("not-text", "output", f"`output` is {kind(output)}, not a list of two answers")
    if len(output) != 2:
        raise fault("wrong-kind", "output", f"`output` has {len(output)} answers; it takes two, the better one first")
    return _instruction(row), read_text(output[0], "output[0]"), read_text(output[1], "output[1]")


def read_hh(row: Raw) -> Parts:
    _need(row, "chosen", "rejected")
    chosen, rejected = read_text(row["chosen"], "chosen"), read_text(row["rejected"], "rejected")
    one, other = read_transcript(chosen, "chosen"), read_transcript(rejected, "rejected")
    if one and other:
        for name, turns in (("chosen", one), ("rejected", other)):
            if turns[-1].role != "assistant":
                raise fault("turn-order", name, f"`{name}` ends with a turn of the human: the answer is missing")
        prompt = check_prompt(_shared_turns(one, other), "chosen")
        return _with_system(row, prompt), one[-1].content, other[-1].content
    others = [name for name in row if name not in ("chosen", "rejected")]
    raise missing_fields(["prompt"], others, ", and the answers are no transcripts that hold it")


def read_nova(row: Raw) -> Parts:
    _need(row, "messages")
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
    return check_prompt(_with_system(row, prompt), "messages"), answers["preferred"], answers["non-preferred"]


def read_unpaired(row: Raw) -> Parts:
    name = "kto_tag" if "kto_tag" in row and "label" not in row else "label"
    _need(row, name)
    label = _label(row[name], name)
    answer = next((field for field in ("completion", "response") if field in row), None)
    if answer is not None:
        asked = next((field for field in PROMPTS if field in row), None)
        if asked is None:
            raise fault("missing-field", "prompt", f"`prompt` is missing; the row has {listed(list(row))}")
        prompt = check_prompt(_with_system(row, read_prompt(row[asked], asked)), asked)
        text = read_answer(row[answer], answer, prompt)
    elif "instruction" in row and "output" in row:
        prompt, text = _instruction(row), read_text(row["output"], "output")
    else:
        prompt, text = _last_answer(row, "messages" if "messages" in row else "conversations")
    return (prompt, text, None) if label else (prompt, None, text)


def _label(value: Any, name: str) -> bool:
    known = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
    found = (
        known.get(value.strip().lower() if isinstance(value, str) else value) if isinstance(value, str | int) else None
    )
    if found is None:
        raise fault("bad-label", name, f"`{name}` is {shown(value)}, not true or false")
    return found


def _last_answer(row: Raw, field: str) -> tuple[Turns, str]:
    _need(row, field)
    turns = _with_system(row, read_messages(row[field], field))
    if turns[-1].role != "assistant":
        raise fault("turn-order", field, f"`{field}` ends with a turn of the {turns[-1].role}, not with an answer")
    return check_prompt(turns[:-1], field), turns[-1].content


def read_chat(row: Raw) -> Parts:
    return (*_last_answer(row, "messages"), None)


def read_sharegpt_sft(row: Raw) -> Parts:
    return (*_last_answer(row, "conversations"), None)


def read_instructions(row: Raw) -> Parts:
    _need(row, "instruction", "output")
    return _instruction(row), read_text(row["output"], "output"), None


def read_completions(row: Raw) -> Parts:
    _need(row, "prompt")
    prompt = check_prompt(_with_system(row, read_prompt(row["prompt"], "prompt")), "prompt")
    name = next((name for name in ("chosen", "completion", "response") if name in row), "completion")
    _need(row, name)
    return prompt, read_answer(row[name], name, prompt), None
