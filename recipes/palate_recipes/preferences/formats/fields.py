"""Helpers for all formats: missing and misspelled fields, and turns. Knows no format."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from operator import eq
from typing import Any

from palate_recipes.preferences.messages import (
    check_characters,
    check_prompt,
    kind,
    quoted,
    read_content,
    read_messages,
)
from palate_recipes.preferences.row import Fault, Message, Row, RowFaults, fault
from palate_recipes.text import nearest as nearest_name

Raw = dict[str, Any]


Turns = tuple[Message, ...]


Parts = tuple[Turns, "str | None", "str | None"]
"""Prompt, chosen answer, rejected answer."""


PROMPTS = ("prompt", "question", "query", "messages", "conversations")
"""Fields with the prompt, in order of precedence."""


OTHER_PROMPTS = ("\n\nHuman:", "Human:", "[")
"""First characters of texts that may be a transcript, or messages converted to text."""


@dataclass(frozen=True)
class Format:
    """A row format.

    Attributes:
        name: Name for `--from` and `--to`.
        fields: Description of the fields.
        read: Converts a raw row to its parts.
        write: Converts a row to a raw row; None if the format is read-only.
        every_turn: Whether SFT trains on all assistant turns, not only the last.
        reads: Fields that it reads; empty: those of `KNOWN_FIELDS`.
    """

    name: str
    fields: str
    read: Callable[[Raw], Parts]
    write: Callable[[Row], Raw] | None = None
    every_turn: bool = False
    reads: frozenset[str] = frozenset()


def listed(names: list[Any], most: int = 4) -> str:
    """Returns field names for a message, shortened."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(quoted(name) for name in sorted(map(str, names))[:most]) + more


def need(row: Raw, *names: str) -> None:
    missing = [name for name in names if name not in row]
    if missing:
        raise missing_fields(missing, [name for name in row if name not in names])


def missing_fields(missing: list[str], there: list[str], why: str = "") -> RowFaults:
    """Returns a fault with the missing fields, similar names, and the existing fields."""
    said = []
    for name in missing:
        near = nearest(name, there)
        said.append(f"`{name}` is missing" + (f" (is it {quoted(near)}?)" if near is not None else ""))
    what = "; ".join(said) + why + (f"; the row has {listed(there)}" if there else "")
    return fault("missing-field", missing[0], what)


def nearest(name: str, there: list[str]) -> str | None:
    """Returns the field that is probably a misspelling of `name`."""
    plain = {str(field)[:40].strip("\ufeff _").lower(): field for field in reversed(there[:40])}
    found = nearest_name(name, plain, cutoff=0.7)
    return None if found is None else plain[found]


def other_names(names: Iterable[Any], known: frozenset[str]) -> dict[str, str] | Fault:
    """Returns the fields that differ from a known name only in case or surrounding blanks, with that name.

    A field with the exact name wins: then the others are not read. Two fields that differ only in that, without the exact one,
    are a fault, since either could be meant.
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        if isinstance(name, str):
            alike.setdefault(_plain(name), []).append(name)
    found: dict[str, str] = {}
    for plain, fields in alike.items():
        meant = [name for name in known if _plain(name) == plain] if plain in _plain_names(known) else []
        if not meant or not known.isdisjoint(fields):
            continue
        if len(fields) > 1:
            what = f"{quoted(fields[0])} and {quoted(fields[1])} differ only in case or blanks, and either could be `{meant[0]}`"
            return Fault("ambiguous-name", fields[0], f"{what}: rename or remove one")
        # `Response_A` is nearer to `response_A` than to `response_a`
        found[fields[0]] = max(sorted(meant), key=lambda name: sum(map(eq, name, fields[0].strip())))
    return found


def _plain(name: str) -> str:
    return name.strip().lower()


@cache
def _plain_names(known: frozenset[str]) -> frozenset[str]:
    return frozenset(map(_plain, known))


def with_system(row: Raw, prompt: Turns, *names: str) -> Turns:
    """Prepends the row's own system text to the prompt, if it has one outside the turns."""
    for name in names or ("system", "system_prompt"):
        text = row.get(name)
        if isinstance(text, list):
            text = read_content(text, name)
        if isinstance(text, str) and text.strip():
            check_characters(text, name)
            if prompt and prompt[0].role == "system":
                raise fault("turn-order", name, f"`{name}` is given, but the conversation also has a system turn")
            return (Message("system", text), *prompt)
        if text is not None and not isinstance(text, str):
            raise fault("not-text", name, f"`{name}` is {kind(text)}, not text")
    return prompt


def shared_turns(chosen: Turns, rejected: Turns, one: str = "chosen", other: str = "rejected") -> Turns:
    """Returns the turns before both answers; `one` and `other` are the names of their fields."""
    if chosen[:-1] != rejected[:-1]:
        at = next(
            (n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
            min(len(chosen), len(rejected)),
        )
        what = f"`{one}` and `{other}` differ at turn {at + 1}, before the last: they answer different conversations"
        raise fault("different-prompts", other, what)
    if len(chosen) == 1:
        raise fault("missing-field", "prompt", "`prompt` is missing, and there are no turns before the answers")
    return chosen[:-1]


def last_answer(row: Raw, field: str) -> tuple[Turns, str]:
    need(row, field)
    turns = with_system(row, read_messages(row[field], field))
    if turns[-1].role != "assistant":
        raise fault("turn-order", field, f"`{field}` ends with a turn of the {turns[-1].role}, not with an answer")
    return check_prompt(turns[:-1], field), turns[-1].content


def turns_as_json(prompt: Turns) -> list[Raw]:
    return [{"role": turn.role, "content": turn.content} for turn in prompt]


def assistant_turn(text: str | None) -> Raw:
    return {"role": "assistant", "content": text}


def both_answers(row: Row) -> tuple[str, str]:
    if row.chosen is None or row.rejected is None:
        raise fault("wrong-kind", "", "has one answer, but this format needs two")
    return row.chosen, row.rejected


def good_answer(row: Row) -> str:
    if row.chosen is None:
        raise fault("wrong-kind", "", "is labelled as a bad answer, but this format is for good answers")
    return row.chosen
