"""Whether a chat template puts an answer down as it is, so that one rendering serves both answers. Knows templates, no data.

A template can change an answer only by a filter on all of it (`trim`), or by looking for a text that stands in the template itself
(`</think>`). The first shows on probes; of the second, answers that hold such a text are rendered one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

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
class Verbatim:
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


def find_verbatim(render: Callable[[Turns, str | None], str], template: str) -> Verbatim | None:
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
    return Verbatim(tails.pop(), re.compile("|".join(map(re.escape, signs))) if signs else None)
