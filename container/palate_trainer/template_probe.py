"""Probes a chat template: its default system prompt, and whether it renders answers verbatim. Knows templates, no rows.

A template can change an answer in two ways: with a filter on the whole answer (`trim`), or by searching for a text that is
written in the template (`</think>`). Probes detect the first. For the second, answers that contain such a text are rendered
one by one.

Some templates add a default system prompt to conversations without a system turn (SmolLM2, Qwen2). If `system_prompt` is empty,
that text is removed from the template, and the tuned model's folder gets the changed template. So a request without a
system turn renders in serving as its row did in training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

Turns = list[dict[str, str]]

_CONVERSATIONS: tuple[Turns, ...] = (
    [{"role": "user", "content": "Why?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "  And\n\nhow? "},
    ],
)
_ANSWERS = ("Yes.", "  yes, \n\n but\tno \n", "\n\nYes\n", "{{ a }} {% b %} 'c' \"d\" \\n <e>", "…", "A" * 300)

_LITERAL = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")
_ROLES = frozenset(("system", "user", "assistant"))


@dataclass(frozen=True)
class VerbatimTemplate:
    """How a template renders answers.

    Attributes:
        tail: What the template writes after an answer.
        literals: Matches texts that may make the template change an answer; None if it has none.
    """

    tail: str
    literals: re.Pattern[str] | None

    def covers(self, turns: Turns, answer: str) -> bool:
        """Whether the template renders exactly prompt + answer + tail."""
        return (self.literals is None or not self.literals.search(answer)) and all(
            turn["role"] in _ROLES for turn in turns
        )


def find_verbatim(render: Callable[[Turns, str | None], str], template: str) -> VerbatimTemplate | None:
    """Returns how answers are rendered, or None if the template changes them or the prompt depends on them.

    Args:
        render: Renders turns with an answer, or with the generation prompt (None). May raise any exception.
        template: The template's source.
    """
    tails = set()
    try:
        for turns in _CONVERSATIONS:
            before = render(turns, None)
            for answer in _ANSWERS:
                whole = render(turns, answer)
                if not whole.startswith(before + answer):
                    return None
                tails.add(whole[len(before + answer) :])
    except Exception:  # e.g. a template that rejects system turns: then each row is rendered separately
        return None
    if len(tails) != 1:
        return None
    found = {
        text.encode().decode("unicode_escape")
        for match in _LITERAL.finditer(template)
        for text in match.groups()
        if text
    }
    # Words are names of roles and fields, which are compared with roles. Blanks and single letters occur in any answer.
    signs = sorted(
        {text.strip() for text in found if len(text.strip()) > 2 and not text.strip().isalnum()}, key=len, reverse=True
    )
    return VerbatimTemplate(tails.pop(), re.compile("|".join(map(re.escape, signs))) if signs else None)


# Texts that no template contains, so everything around them was written by the template.
_USER, _ANSWER, _SYSTEM = "palate-user-turn", "palate-answer-turn", "palate-system-turn"


@dataclass(frozen=True)
class SystemDefault:
    """A template's default system prompt.

    Attributes:
        text: The prompt's text.
        without: The template without it, or None if it cannot be separated from the following turn.
    """

    text: str
    without: str | None


def take_out_system_default(tokenizer: Any) -> str | None:
    """Removes the default system prompt from the tokenizer's template.

    Returns:
        A note for the log, or None if there is no default.
    """
    default = find_system_default(tokenizer)
    if default is None:
        return None
    if default.without is None:
        return (
            f"the chat template adds a default system prompt that cannot be removed: {default.text[:80]!r}."
            " Training and serving both use it. Set system_prompt to replace it."
        )
    tokenizer.chat_template = default.without
    return (
        f"system_prompt is empty: the chat template's default, {default.text[:80]!r}, is removed, also in the model's folder,"
        " so serving has none either."
    )


def find_system_default(tokenizer: Any) -> SystemDefault | None:
    """Returns the system prompt that the template adds to a conversation without one, or None.

    A header that the template always writes (Llama 3.2's dates) is not a system prompt.

    Args:
        tokenizer: A tokenizer with a chat template.
    """
    template = tokenizer.get_chat_template()
    user = [{"role": "user", "content": _USER}]
    try:
        alone = _render(tokenizer, template, user)
    except TemplateError:
        return None  # a template that requires a system turn has no default
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
    if opening is None or "strftime_now" in template:  # a text with the current date cannot be matched later
        return SystemDefault(text, None)
    bos = tokenizer.bos_token or ""
    # Keep BOS, unless every turn starts with it (ChatML): then it belongs to the turn.
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
    """Returns the text before the first user turn, or None if the turn cannot be located.

    A later user turn shows how a user turn renders on its own.
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
    """Returns a template that renders like `template`, but without `opening` if there is no system turn."""
    body = template[:-1] if template.endswith("\n") else template  # Jinja drops a template's last line break
    then = "\n" if body.startswith("\n") else ""  # Jinja also drops the line break after a block's opening tag
    return (
        f"{{% set rendered %}}{then}{body}{{% endset %}}"
        f"{{% set opening = {_literal(opening)} %}}"
        "{% if messages and messages[0]['role'] != 'system' and rendered.startswith(opening) %}"
        f"{{{{ {_literal(kept)} + rendered[opening | length:] }}}}"
        "{% else %}{{ rendered }}{% endif %}"
    )


def _shared(text: str, other: str) -> int:
    """Returns the length of the common prefix."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(text, other, strict=False)))


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _render(tokenizer: Any, template: str, turns: list[dict[str, str]], *, answer_next: bool = True) -> str:
    return str(
        tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=answer_next)
    )
