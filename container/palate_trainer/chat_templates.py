"""A model's chat template without the system prompt that it puts in by itself. Knows templates and how they render, no rows.

Some templates open a conversation without a system turn with a default of their own (SmolLM2, Qwen2). With an empty
`system_prompt` that text is taken out of the template itself: the tuned model's folder carries the changed template, so that
a request without a system turn renders in serving as its row did in training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

# Words that no template holds, so that what stands around them is the template's own.
_USER, _ANSWER, _SYSTEM = "palate-user-turn", "palate-answer-turn", "palate-system-turn"


@dataclass(frozen=True)
class SystemDefault:
    """A system prompt that a template puts in by itself.

    Attributes:
        text: The prompt's text.
        without: The same template without it, or None where it cannot be told apart from the turn that follows.
    """

    text: str
    without: str | None


def take_out_system_default(tokenizer: Any) -> str | None:
    """Changes the tokenizer's template so that it puts in no system prompt of its own.

    Returns:
        A note for people, or None when there was nothing to change.
    """
    default = find_system_default(tokenizer)
    if default is None:
        return None
    if default.without is None:
        return (
            f"the chat template puts in a system prompt of its own that cannot be taken out: {default.text[:80]!r};"
            " training and serving both have it. Give a system_prompt to replace it."
        )
    tokenizer.chat_template = default.without
    return (
        f"system_prompt is empty: the chat template's own, {default.text[:80]!r}, is taken out, in the model's folder too,"
        " so that serving has none either."
    )


def find_system_default(tokenizer: Any) -> SystemDefault | None:
    """Returns what the template puts before a conversation without a system turn, or None when it puts nothing there.

    A header that the template writes with and without a system turn (Llama 3.2's dates) is none.

    Args:
        tokenizer: With a chat template.
    """
    template = tokenizer.get_chat_template()
    user = [{"role": "user", "content": _USER}]
    try:
        alone = _render(tokenizer, template, user)
    except TemplateError:
        return None  # a template that wants a system turn has no default for it
    try:
        given = _render(tokenizer, template, [{"role": "system", "content": _SYSTEM}, *user])
    except TemplateError:
        given = ""  # a template without system turns
    head = _shared(alone, given)
    tail = _shared(alone[::-1], given[::-1])
    # Without a default, `alone` is `given` with one piece cut out.
    if not given or head + tail >= len(alone):
        return None
    text = alone[head : len(alone) - tail]
    opening = _opening(tokenizer, template, user, alone)
    if opening is None or "strftime_now" in template:  # a text that changes by the day cannot be looked for
        return SystemDefault(text, None)
    bos = tokenizer.bos_token or ""
    # A first token that every turn begins with (ChatML's) belongs to the turn.
    kept = bos if bos and opening.startswith(bos) and not alone[len(opening) :].startswith(bos) else ""
    without = _cut(template, opening, kept)
    conversation = [*user, {"role": "assistant", "content": _ANSWER}, *user]
    with_system = [{"role": "system", "content": _SYSTEM}, *conversation]
    proven = (
        _render(tokenizer, without, user) == kept + alone[len(opening) :]
        and _render(tokenizer, without, conversation)
        == kept + _render(tokenizer, template, conversation)[len(opening) :]
        and _render(tokenizer, without, with_system) == _render(tokenizer, template, with_system)
    )
    return SystemDefault(text, without if proven else None)


def _opening(tokenizer: Any, template: str, user: list[dict[str, str]], alone: str) -> str | None:
    """Returns what stands before the first user turn, or None when that turn cannot be told apart.

    A later user turn shows how one renders by itself.
    """
    before = [*user, {"role": "assistant", "content": _ANSWER}]
    try:
        until_then = _render(tokenizer, template, before, answer_next=False)
        whole = _render(tokenizer, template, [*before, *user])
    except TemplateError:
        return None
    turn = whole[len(until_then) :]
    if not whole.startswith(until_then) or not alone.endswith(turn) or _USER not in turn:
        return None
    return alone[: len(alone) - len(turn)]


def _cut(template: str, opening: str, kept: str) -> str:
    """Returns a template that renders like `template`, but without `opening` where no system turn is given."""
    body = template[:-1] if template.endswith("\n") else template  # Jinja drops a template's last line break, too
    then = "\n" if body.startswith("\n") else ""  # and the one after a block's opening
    return (
        f"{{% set rendered %}}{then}{body}{{% endset %}}"
        f"{{% set opening = {_literal(opening)} %}}"
        "{% if messages and messages[0]['role'] != 'system' and rendered.startswith(opening) %}"
        f"{{{{ {_literal(kept)} + rendered[opening | length:] }}}}"
        "{% else %}{{ rendered }}{% endif %}"
    )


def _shared(text: str, other: str) -> int:
    """Returns how many characters both begin with."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(text, other, strict=False)))


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _render(tokenizer: Any, template: str, turns: list[dict[str, str]], *, answer_next: bool = True) -> str:
    return str(
        tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=answer_next)
    )
