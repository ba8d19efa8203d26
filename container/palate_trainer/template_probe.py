"""What a chat template does: its own system prompt, and whether it renders an answer verbatim. Knows templates, no rows.

A template can change an answer only by a filter on all of it (`trim`), or by looking for a text that stands in the template itself
(`</think>`). The first shows on probes; of the second, answers that hold such a text are rendered one by one.

Some templates open a conversation without a system turn with a default of their own (SmolLM2, Qwen2). With an empty
`system_prompt` that text is taken out of the template itself: the tuned model's folder carries the changed template, so that
a request without a system turn renders in serving as its row did in training.
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
    """What surrounds an answer.

    Attributes:
        tail: What the template writes behind an answer.
        literals: Finds texts by which the template may treat an answer in its own way; None when it has none.
    """

    tail: str
    literals: re.Pattern[str] | None

    def covers(self, turns: Turns, answer: str) -> bool:
        """Whether prompt, answer and tail, one behind the other, are what the template renders."""
        return (self.literals is None or not self.literals.search(answer)) and all(
            turn["role"] in _ROLES for turn in turns
        )


def find_verbatim(render: Callable[[Turns, str | None], str], template: str) -> VerbatimTemplate | None:
    """Returns what surrounds answers, or None where they are changed, or where the prompt changes with them.

    Args:
        render: Renders turns with an answer, or (None) with the beginning of one; may refuse with any exception.
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
    except Exception:  # a template that refuses system turns, say: then each row is rendered as it comes
        return None
    if len(tails) != 1:
        return None
    found = {
        text.encode().decode("unicode_escape")
        for match in _LITERAL.finditer(template)
        for text in match.groups()
        if text
    }
    # Names of roles and fields are compared with roles, and a blank or a letter is no sign of anything.
    signs = sorted(
        {text.strip() for text in found if len(text.strip()) > 2 and not text.strip().isalnum()}, key=len, reverse=True
    )
    return VerbatimTemplate(tails.pop(), re.compile("|".join(map(re.escape, signs))) if signs else None)


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
