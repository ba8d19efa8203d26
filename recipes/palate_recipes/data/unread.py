"""What rows of other programs carry and no training reads: tools, and weights of turns. Knows fields, no rule."""

from __future__ import annotations

from typing import Any

from palate_recipes.data.turns import shown


def gives_tools(row: dict[str, Any]) -> bool:
    """Whether a row has tools, which many exports write as an empty list; OpenAI's preference format has them in `input`."""
    inner = row.get("input")
    return bool(row.get("tools") or row.get("functions") or (type(inner) is dict and inner.get("tools")))


def weights(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns field and value, for people, of each turn whose `weight` would change something: any but 1.

    Source: OpenAI's fine-tuning files, in which an assistant's turn of weight 0 is not learned.
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
