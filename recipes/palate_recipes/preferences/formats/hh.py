"""Anthropic's HH format: whole transcripts as `chosen` and `rejected`."""

from __future__ import annotations

from palate_recipes.preferences.formats.fields import (
    Format,
    Parts,
    Raw,
    both_answers,
    missing_fields,
    need,
    shared_turns,
    with_system,
)
from palate_recipes.preferences.messages import (
    check_prompt,
    read_text,
    read_transcript,
    without_system,
)
from palate_recipes.preferences.row import Row, fault


def read_hh(row: Raw) -> Parts:
    need(row, "chosen", "rejected")
    chosen, rejected = read_text(row["chosen"], "chosen"), read_text(row["rejected"], "rejected")
    one, other = read_transcript(chosen, "chosen"), read_transcript(rejected, "rejected")
    if one and other:
        for name, turns in (("chosen", one), ("rejected", other)):
            if turns[-1].role != "assistant":
                raise fault("turn-order", name, f"`{name}` ends with a turn of the human: the answer is missing")
        prompt = check_prompt(shared_turns(one, other), "chosen")
        return with_system(row, prompt), one[-1].content, other[-1].content
    others = [name for name in row if name not in ("chosen", "rejected")]
    raise missing_fields(["prompt"], others, ", and the answers are not transcripts that contain it")


def write_hh(row: Row) -> Raw:
    turns = without_system(row.prompt)
    names = {"user": "Human", "assistant": "Assistant"}
    texts = [*(turn.content for turn in turns), *both_answers(row)]
    if turns != row.prompt or any(turn.role not in names for turn in turns):
        raise fault("wrong-kind", "", "has a system or tool turn, which a transcript does not support")
    if any("\n\nHuman:" in text or "\n\nAssistant:" in text or text != text.lstrip(" \t") for text in texts):
        raise fault("wrong-kind", "", "has text that would read as the beginning of a turn in a transcript")
    before = "".join(f"\n\n{names[turn.role]}: {turn.content}" for turn in turns)
    chosen, rejected = both_answers(row)
    return {"chosen": f"{before}\n\nAssistant: {chosen}", "rejected": f"{before}\n\nAssistant: {rejected}"}


FORMATS = (Format("hh", "`chosen`, `rejected`: transcripts `\\n\\nHuman: …\\n\\nAssistant: …`", read_hh, write_hh),)
