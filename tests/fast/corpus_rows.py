"""Malformed rows of every format, one row each, and files whose rows are well formed and teach the wrong thing."""

from __future__ import annotations

import json
from typing import Any

from palate_recipes.preferences.row import Strategy
from tests.fast.corpus import GOOD, Case, array, lines, many

ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}
BAD, SYSTEM = {"role": "assistant", "content": "bad"}, {"role": "system", "content": "s"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}
TOOL = {"role": "tool", "content": "42"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
IMAGE = {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image_url", "image_url": {"url": "u"}}]}
AUDIO = {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}]}
HALF = "half \ud83d"


def feedback(*, rating: Any = 1, siblings: tuple[str, ...] = ("bad",), **changed: Any) -> dict[str, Any]:
    """A feedback as Open WebUI exports it: a second question, an answer `good` that was rated, and its siblings.

    Args:
        rating: Its rating.
        siblings: Other answers to the same question.
        **changed: Fields of the messages `q1`, `a1`, `q2`, `a2` that are replaced.
    """
    others = [f"b{number}" for number in range(len(siblings))]
    turns: dict[str, dict[str, Any]] = {
        "q1": {"role": "user", "content": "first", "parentId": None, "childrenIds": ["a1"]},
        "a1": {"role": "assistant", "content": "one", "parentId": "q1", "childrenIds": ["q2"], "model": "m"},
        "q2": {"role": "user", "content": "q", "parentId": "a1", "childrenIds": [*others, "a2"], "models": ["m", "n"]},
        "a2": {"role": "assistant", "content": "good", "parentId": "q2", "childrenIds": [], "model": "m", "done": True},
        **{
            name: {"role": "assistant", "content": text, "parentId": "q2", "childrenIds": [], "model": "n"}
            for name, text in zip(others, siblings, strict=True)
        },
    }
    for name, fields in changed.items():
        turns[name] = {"id": name, **turns[name], **fields}
    chat = {
        "title": "t",
        "models": ["m", "n"],
        "history": {"messages": turns, "currentId": "a2"},
        "params": {"system": "s"},
    }
    return {
        "id": "f",
        "user_id": "u",
        "version": 0,
        "type": "rating",
        "data": {
            "rating": rating,
            "model_id": "m",
            "sibling_model_ids": ["n"],
            "reason": None,
            "comment": "",
            "tags": [],
        },
        "meta": {
            "arena": False,
            "model_id": "m",
            "message_id": "a2",
            "message_index": 4,
            "chat_id": "c",
            "base_models": {},
        },
        "snapshot": {"chat": {"id": "c", "user_id": "u", "title": "t", "chat": chat}},
        "created_at": 1764400000,
        "updated_at": 1764400001,
    }


_GOOD: dict[Strategy, Any] = {
    "dpo": GOOD,
    "sft": {"prompt": "What is up there?", "completion": "The blue sky."},
    "kto": {"prompt": "What is up there?", "completion": "The blue sky.", "label": True},
}
_BASES: dict[str, dict[str, Any]] = {
    "pai": GOOD,
    "trl": {"prompt": [ASK], "chosen": [SAY], "rejected": [BAD]},
    "messages": {"messages": [ASK, SAY], "rejected_response": "bad"},
    "openai": {"input": {"messages": [ASK]}, "preferred_output": [SAY], "non_preferred_output": [BAD]},
    "sharegpt": {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "bad"}},
    "alpaca": {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    "alpaca-ranking": {"instruction": "q", "output": ["good", "bad"]},
    "hh": {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
    "typed-messages": {"chosen_messages": [ASK, SAY], "rejected_messages": [ASK, BAD]},
    "nova": {
        "messages": [
            {"role": "user", "content": [{"text": "q"}]},
            {
                "role": "assistant",
                "candidates": [
                    {"content": [{"text": "good"}], "preferenceLabel": "preferred"},
                    {"content": [{"text": "bad"}], "preferenceLabel": "non-preferred"},
                ],
            },
        ]
    },
    "unpaired": {"prompt": "q", "completion": "good", "label": True},
    "chat": {"messages": [ASK, SAY]},
    "sharegpt-sft": {"conversations": [HUMAN, GPT]},
    "instructions": {"instruction": "q", "output": "good"},
    "completions": {"prompt": "q", "completion": "good"},
    "named-pairs": {"query": "q", "response": "a", "rejected_response": "b"},
    "compared": {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "a"},
    "ranked": {"prompt": "q", "completions": ["a", "b"], "scores": [2, 1]},
    "open-webui": feedback(),
}
_STRATEGIES: dict[str, Strategy] = {
    "unpaired": "kto",
    "chat": "sft",
    "sharegpt-sft": "sft",
    "instructions": "sft",
    "completions": "sft",
}


def _row(
    id: str, format: str, change: Any, code: str, field: str = "", words: str = "", strategy: Strategy | None = None
) -> Case:
    """A file whose second row is a good one of a format with some fields changed; `...` takes a field away."""
    row = {name: value for name, value in (_BASES[format] | change).items() if value is not ...}
    used = strategy or _STRATEGIES.get(format, "dpo")
    return Case(f"{format}: {id}", array(_GOOD[used], row), code, 2, field, words, strategy=used)


def _candidates(*candidates: Any) -> dict[str, Any]:
    return {"messages": [ASK, {"role": "assistant", "candidates": list(candidates)}]}


def _labelled(label: Any, text: Any = "good") -> dict[str, Any]:
    return {"content": [{"text": text}], "preferenceLabel": label}


# fmt: off
ROWS = [
    # A feedback of Open WebUI.
    _row("no snapshot", "open-webui", {"snapshot": None}, "missing-field", "snapshot", "no copy of its chat"),
    _row("no chat", "open-webui", {"snapshot": {"chat": {}}},
         "missing-field", "snapshot.chat.chat.history.messages", "is null, not an object"),
    _row("chat that is text", "open-webui", {"snapshot": {"chat": {"chat": {"history": {"messages": "q"}}}}},
         "not-text", "snapshot.chat.chat.history.messages", "is text, not an object"),
    _row("no data", "open-webui", {"data": None}, "missing-field", "data", "is null"),
    _row("no rating", "open-webui", {"data": {"reason": "r"}}, "bad-label", "data.rating", "is None, not 1, 0 or -1"),
    _row("rating of ten", "open-webui", feedback(rating=7), "bad-label", "data.rating", "is 7, not 1, 0 or -1"),
    _row("rating that is true", "open-webui", feedback(rating=True), "bad-label", "data.rating", "is True"),
    _row("a draw", "open-webui", feedback(rating=0), "tie", "data.rating", "is a tie"),
    _row("another type", "open-webui", {"type": "comment"}, "bad-label", "type", "'comment', not 'rating'"),
    _row("no such message", "open-webui", {"meta": {"message_id": "x"}}, "missing-field", "meta.message_id", "'x', which no"),
    _row("a question that is rated", "open-webui", {"meta": {"message_id": "q2"}},
         "bad-role", "meta.message_id", "the role 'user'"),
    _row("no parent", "open-webui", feedback(a2={"parentId": None}),
         "turn-order", "snapshot.chat.chat.history.messages", "no user turn"),
    _row("a parent that is not there", "open-webui", feedback(q2={"parentId": "x"}),
         "missing-field", "snapshot.chat.chat.history.messages", "the parent 'x', which no message"),
    _row("a circle", "open-webui", feedback(q1={"parentId": "q2"}),
         "missing-field", "snapshot.chat.chat.history.messages", "the parent 'q2', which leads to no first"),
    _row("an answer with no text", "open-webui", feedback(a2={"content": ""}),
         "empty-field", "snapshot.chat.chat.history.messages.a2.content", "is empty"),
    _row("thoughts alone", "open-webui", feedback(a2={"content": '<details type="reasoning" done="true">\nhm\n</details>\n'}),
         "empty-field", "snapshot.chat.chat.history.messages.a2.content", "is empty"),
    _row("a tool call", "open-webui", feedback(a1={"content": '<details type="tool_calls" name="f"></details>'}),
         "not-text-content", "snapshot.chat.chat.history.messages.a1", "a tool call"),
    _row("an image", "open-webui", feedback(q2={"files": [{"type": "image", "url": "u"}]}),
         "not-text-content", "snapshot.chat.chat.history.messages.q2", "a file or an image"),
    _row("half a character", "open-webui", feedback(q1={"content": HALF}),
         "bad-text", "snapshot.chat.chat.history.messages.q1.content", "\\ud83d"),
    _row("another role", "open-webui", feedback(a1={"role": "tool"}),
         "bad-role", "snapshot.chat.chat.history.messages.a1", "the role 'tool'"),
    _row("one answer", "open-webui", feedback(siblings=()), "wrong-kind", "", "it has a label, not two answers"),
    _row("the same answer again", "open-webui", feedback(siblings=("good",)), "same-answers", "", "the same text"),
    _row("a bad answer for SFT", "open-webui", feedback(rating=-1, siblings=()), "wrong-kind", "", "a bad answer", "sft"),
    # Texts in `prompt`, `chosen`, `rejected`.
    _row("no prompt", "pai", {"prompt": ...}, "missing-field", "prompt", "`prompt` is missing"),
    _row("no chosen", "pai", {"chosen": ...}, "missing-field", "chosen", "`chosen` is missing"),
    _row("no rejected", "pai", {"rejected": ...}, "missing-field", "rejected", "`rejected` is missing"),
    _row("no answer", "pai", {"chosen": ..., "rejected": ...}, "missing-field", "chosen", "`chosen` … `rejected`"),
    _row("promt", "pai", {"prompt": ..., "promt": "q"}, "missing-field", "prompt", "is it `promt`?"),
    _row("Promt", "pai", {"prompt": ..., "Promt": "q"}, "missing-field", "prompt", "is it `Promt`?"),
    _row("choosen", "pai", {"chosen": ..., "choosen": "q"}, "missing-field", "chosen", "is it `choosen`?"),
    _row("reject", "pai", {"rejected": ..., "reject": "q"}, "missing-field", "rejected", "is it `reject`?"),
    _row("space in a name", "pai", {"rejected": ..., "reject ed": "q"},
         "missing-field", "rejected", "is it `reject ed`?"),
    _row("null prompt", "pai", {"prompt": None}, "not-text", "prompt", "`prompt` is null, not text"),
    _row("null chosen", "pai", {"chosen": None}, "not-text", "chosen", "`chosen` is null"),
    _row("null rejected", "pai", {"rejected": None}, "not-text", "rejected", "`rejected` is null"),
    _row("number", "pai", {"chosen": 3}, "not-text", "chosen", "a number, not"),
    _row("huge number", "pai", {"chosen": 10**400}, "not-text", "chosen", "a number, not"),
    _row("true", "pai", {"rejected": True}, "not-text", "rejected", "true/false, not"),
    _row("NaN", "pai", {"rejected": float("nan")}, "not-text", "rejected", "a number, not"),
    _row("infinity", "pai", {"rejected": float("-inf")}, "not-text", "rejected", "a number, not"),
    _row("object", "pai", {"chosen": {"text": "a"}}, "bad-role", "chosen[0]", "no role; it has `text`"),
    _row("list of texts", "pai", {"chosen": ["a", "b"]}, "not-text", "chosen[0]", "is text, not a message"),
    _row("empty list", "pai", {"chosen": []}, "empty-field", "chosen", "an empty list"),
    _row("empty prompt", "pai", {"prompt": ""}, "empty-field", "prompt", "`prompt` is empty"),
    _row("empty chosen", "pai", {"chosen": ""}, "empty-field", "chosen", "`chosen` is empty"),
    _row("spaces", "pai", {"rejected": " \n\t"}, "empty-field", "rejected", "`rejected` is empty"),
    _row("spaces of Unicode", "pai", {"rejected": "\u3000\u00a0"}, "empty-field", "rejected", "is empty"),
    _row("half a character", "pai", {"chosen": HALF}, "bad-text", "chosen", "\\ud83d, a lone surrogate"),
    _row("half in the prompt", "pai", {"prompt": HALF}, "bad-text", "prompt", "\\ud83d"),
    _row("half in the system text", "pai", {"system": HALF}, "bad-text", "system", "\\ud83d"),
    _row("system that is a number", "pai", {"system": 3}, "not-text", "system", "`system` is a number"),
    _row("same answers", "pai", {"rejected": GOOD["chosen"]}, "same-answers", "rejected", "the same text"),
    _row("same but for spaces", "pai", {"rejected": f" {GOOD['chosen']}\n"},
         "same-answers", "rejected", "the same text"),
    _row("messages as text", "pai", {"prompt": json.dumps([ASK])}, "not-text", "prompt", "write the list itself"),
    _row("messages printed by Python", "pai", {"prompt": str([ASK])}, "not-text", "prompt", "write the list itself"),
    _row("transcript that ends early", "pai", {"prompt": "\n\nHuman: q\n\nAssistant: a"},
         "turn-order", "prompt", "nothing is asked"),
    # Fields of no format.
    _row("text alone", "pai", {"prompt": ..., "chosen": ..., "rejected": ..., "text": "t"},
         "unknown-format", "", "it has `text`"),
    _row("no field", "pai", {"prompt": ..., "chosen": ..., "rejected": ...}, "unknown-format", "", "no fields"),
    _row("half in a name", "pai", {"prompt": ..., "chosen": ..., "rejected": ..., HALF: 1},
         "unknown-format", "", "\\ud83d"),
    _row("nested rows", "pai", {"prompt": ..., "chosen": ..., "rejected": ..., "rows": [GOOD]},
         "unknown-format", "", "it has `rows`"),
    # TRL.
    _row("role misspelled", "trl", {"prompt": [{"role": "usr", "content": "q"}]},
         "bad-role", "prompt[0]", "the role 'usr'"),
    _row("role that is a number", "trl", {"prompt": [{"role": 1, "content": "q"}]},
         "bad-role", "prompt[0]", "the role 1"),
    _row("null role", "trl", {"prompt": [{"role": None, "content": "q"}]}, "bad-role", "prompt[0]", "`prompt[0].role` is null"),
    _row("no role", "trl", {"prompt": [{"content": "q"}]}, "bad-role", "prompt[0]", "no role; it has `content`"),
    _row("no content", "trl", {"prompt": [{"role": "user"}]},
         "missing-field", "prompt[0]", "no content; it has `role`"),
    _row("null content", "trl", {"prompt": [{"role": "user", "content": None}]},
         "not-text", "prompt[0].content", "null"),
    _row("empty content", "trl", {"chosen": [{"role": "assistant", "content": ""}]},
         "empty-field", "chosen[0].content", "empty"),
    _row("empty prompt", "trl", {"prompt": []}, "empty-field", "prompt", "an empty list"),
    _row("system turn alone", "trl", {"prompt": [SYSTEM]}, "turn-order", "prompt", "no user turn"),
    _row("system turn later", "trl", {"prompt": [ASK, SAY, SYSTEM, ASK]},
         "turn-order", "prompt", "position 3, not as the first"),
    _row("two system turns", "trl", {"prompt": [SYSTEM, SYSTEM, ASK]}, "turn-order", "prompt", "position 2"),
    _row("two user turns", "trl", {"prompt": [ASK, ASK]},
         "turn-order", "prompt", "two turns in a row by the user, position 2"),
    _row("assistant first", "trl", {"prompt": [SAY, ASK]}, "turn-order", "prompt", "begins with an assistant turn"),
    _row("answer in the prompt", "trl", {"prompt": [ASK, SAY]}, "turn-order", "prompt", "nothing is asked"),
    _row("tool after the user", "trl", {"prompt": [ASK, TOOL]}, "turn-order", "prompt", "user and tool"),
    _row("answer of the user", "trl", {"chosen": [ASK]}, "bad-role", "chosen", "ends with a turn of the user"),
    _row("image", "trl", {"prompt": [IMAGE]},
         "not-text-content", "prompt[0].content", "'image_url'; Palate trains on text"),
    _row("audio", "trl", {"prompt": [AUDIO]}, "not-text-content", "prompt[0].content", "'input_audio'"),
    _row("tool call", "trl", {"prompt": [ASK, CALL, TOOL]}, "not-text-content", "prompt[1]", "a tool call"),
    _row("tool call with text", "trl", {"chosen": [{**CALL, "content": "x"}]},
         "not-text-content", "chosen[0]", "a tool call"),
    _row("function call", "trl", {"chosen": [{**SAY, "function_call": {"name": "f"}}]},
         "not-text-content", "chosen[0]", "tool call"),
    _row("part without text", "trl", {"prompt": [{"role": "user", "content": [{"type": "text"}]}]},
         "not-text-content", "prompt[0].content", "no text"),
    _row("part that is a number", "trl", {"prompt": [{"role": "user", "content": [7]}]},
         "not-text", "prompt[0].content", "a number, not a part"),
    _row("no parts", "trl", {"prompt": [{"role": "user", "content": []}]},
         "empty-field", "prompt[0].content", "is empty"),
    _row("half in a part", "trl", {"prompt": [{"role": "user", "content": [HALF]}]},
         "bad-text", "prompt[0].content", "\\ud83d"),
    _row("other turns before an answer", "trl", {"chosen": [{**ASK, "content": "x"}, SAY]},
         "different-prompts", "chosen", "other turns before"),
    _row("answers part early", "trl", {"prompt": ..., "chosen": [ASK, SAY], "rejected": [{**ASK, "content": "x"}, BAD]},
         "different-prompts", "rejected", "differ at turn 1"),
    _row("nothing before the answers", "trl", {"prompt": ...}, "missing-field", "prompt", "no turns before the answers"),
    _row("system twice", "trl", {"system": "s", "prompt": [SYSTEM, ASK]},
         "turn-order", "system", "also has a system turn"),
    _row("prompt that is a number", "trl", {"prompt": 5}, "not-text", "prompt", "a number, not text"),
    _row("same answers", "trl", {"rejected": [SAY]}, "same-answers", "rejected", "same text"),
    # Messages and a rejected response; Together, Fireworks, OpenAI, Azure.
    _row("no chosen answer", "messages", {"messages": [ASK]}, "turn-order", "messages", "the chosen answer is missing"),
    _row("answer alone", "messages", {"messages": [SAY]}, "turn-order", "messages", "no user turn"),
    _row("null rejected", "messages", {"rejected_response": None}, "not-text", "rejected_response", "null"),
    _row("text for messages", "messages", {"messages": "q"}, "not-text", "messages", "text, not a list of messages"),
    _row("no answers", "openai", {"preferred_output": ..., "non_preferred_output": ...},
         "missing-field", "preferred_output", "`preferred_output` is missing"),
    _row("no rejected", "openai", {"non_preferred_output": ...}, "missing-field", "non_preferred_output", "is missing"),
    _row("no input", "openai", {"input": ...}, "missing-field", "input", "`input` is missing"),
    _row("no messages", "openai", {"input": {"tools": []}},
         "missing-field", "input.messages", "`input.messages` is missing"),
    _row("null messages", "openai", {"input": {"messages": None}}, "not-text", "input.messages", "null, not a list"),
    _row("text input", "openai", {"input": "q"}, "not-text", "input.messages", "text, not a list"),
    _row("no output", "openai", {"preferred_output": []}, "empty-field", "preferred_output", "an empty list"),
    _row("output of the user", "openai", {"preferred_output": [ASK]}, "bad-role", "preferred_output", "of the user"),
    _row("image", "openai", {"input": {"messages": [IMAGE]}},
         "not-text-content", "input.messages[0].content", "'image_url'"),
    _row("same outputs", "openai", {"non_preferred_output": [SAY]}, "same-answers", "", "same text"),
    # ShareGPT.
    _row("role misspelled", "sharegpt", {"conversations": [{"from": "humann", "value": "q"}]},
         "bad-role", "conversations[0]", "'humann'"),
    _row("no value", "sharegpt", {"conversations": [{"from": "human"}]},
         "missing-field", "conversations[0]", "no content"),
    _row("number for a value", "sharegpt", {"conversations": [{"from": "human", "value": 7}]},
         "not-text", "conversations[0].value", "a number"),
    _row("answer by the human", "sharegpt", {"chosen": HUMAN}, "bad-role", "chosen", "of the user"),
    _row("ends with gpt", "sharegpt", {"conversations": [HUMAN, GPT]},
         "turn-order", "conversations", "nothing is asked"),
    _row("function call", "sharegpt", {"conversations": [HUMAN, {"from": "function_call", "value": "{}"}]},
         "not-text-content", "conversations[1]", "a tool call"),
    _row("no rejected", "sharegpt", {"rejected": ...}, "missing-field", "rejected", "`rejected` is missing"),
    _row("text for turns", "sharegpt", {"conversations": "q"}, "not-text", "conversations", "text, not a list"),
    # Alpaca.
    _row("empty instruction", "alpaca", {"instruction": ""}, "empty-field", "instruction", "empty"),
    _row("number for input", "alpaca", {"input": 4}, "not-text", "input", "a number"),
    _row("half in the input", "alpaca", {"input": HALF}, "bad-text", "input", "\\ud83d"),
    _row("history of one", "alpaca", {"history": [["q"]]}, "turn-order", "history[0]", "not [question, answer]"),
    _row("history that is text", "alpaca", {"history": "q"}, "not-text", "history", "text, not a list"),
    _row("no chosen", "alpaca", {"chosen": ...}, "missing-field", "chosen", "`chosen` is missing"),
    _row("one answer", "alpaca-ranking", {"output": ["a"]}, "wrong-kind", "output", "has 1 answers; expected two"),
    _row("three answers", "alpaca-ranking", {"output": ["a", "b", "c"]}, "wrong-kind", "output", "has 3 answers"),
    _row("null answer", "alpaca-ranking", {"output": ["a", None]}, "not-text", "output[1]", "null"),
    _row("same answers", "alpaca-ranking", {"output": ["a", "a"]}, "same-answers", "", "same text"),
    # HH.
    _row("no transcripts", "hh", {"chosen": "a", "rejected": "b"},
         "missing-field", "prompt", "not transcripts that contain it"),
    _row("ends with the human", "hh", {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: b"},
         "turn-order", "chosen", "the answer is missing"),
    _row("other question", "hh", {"rejected": "\n\nHuman: other\n\nAssistant: b"},
         "different-prompts", "rejected", "differ at turn 1"),
    _row("empty turn", "hh", {"chosen": "\n\nHuman: q\n\nAssistant:"},
         "empty-field", "chosen", "empty turn at position 2"),
    _row("two of the human", "hh",
         {name: f"\n\nHuman: q\n\nHuman: r\n\nAssistant: {name}" for name in ("chosen", "rejected")},
         "turn-order", "chosen", "in a row by the user"),
    # Typed messages and Nova.
    _row("no rejected", "typed-messages", {"rejected_messages": ...},
         "missing-field", "rejected_messages", "is missing"),
    _row("rejected by the user", "typed-messages", {"rejected_messages": [ASK, {**ASK, "content": "x"}]},
         "bad-role", "rejected_messages", "of the user"),
    _row("answers alone", "typed-messages", {"chosen_messages": [SAY], "rejected_messages": [BAD]},
         "missing-field", "prompt", "no turns before"),
    _row("other lengths", "typed-messages", {"rejected_messages": [ASK, SAY, ASK, BAD]},
         "different-prompts", "rejected_messages", "differ at turn"),
    _row("image", "typed-messages", {"chosen_messages": [IMAGE, SAY]},
         "not-text-content", "chosen_messages[0].content", "'image_url'"),
    _row("other label", "nova", _candidates(_labelled("best"), _labelled("non-preferred")),
         "bad-label", "messages[1].candidates[0]", "'best', not 'preferred'"),
    _row("no label", "nova", _candidates({"content": "a"}), "bad-label", "messages[1].candidates[0]", "None"),
    _row("one candidate", "nova", _candidates(_labelled("preferred")),
         "bad-label", "messages", "not one preferred and one"),
    _row("two of a label", "nova", _candidates(_labelled("preferred"), _labelled("preferred", "b")),
         "bad-label", "messages[1].candidates[1]", "two candidates"),
    _row("candidates early", "nova", {"messages": [{"role": "assistant", "candidates": []}, ASK]},
         "turn-order", "messages", "does not end with"),
    _row("candidate that is text", "nova", _candidates("a"),
         "not-text", "messages[1].candidates[0]", "text, not a candidate"),
    _row("image", "nova", _candidates({"content": [{"image": {}}], "preferenceLabel": "preferred"}),
         "not-text-content", "messages[1].candidates[0].content", "no text"),
    _row("number for text", "nova", _candidates(_labelled("preferred", 3)),
         "not-text-content", "messages[1].candidates[0].content", "no text"),
    _row("nothing asked", "nova", {"messages": [_BASES["nova"]["messages"][1]]},
         "turn-order", "messages", "no user turn"),
    # Other projects.
    _row("number for an answer", "named-pairs", {"rejected_response": 3}, "not-text", "rejected_response", "a number"),
    _row("unknown winner", "compared", {"winner": "c"}, "bad-label", "winner", "'c', not 'a', 'b' or 'tie'"),
    _row("no score", "ranked", {"scores": [1, None]}, "bad-label", "scores[1]", "None, not a number"),
    # Unpaired.
    _row("label in words", "unpaired", {"label": "good"}, "bad-label", "label", "'good', not true or false"),
    _row("score", "unpaired", {"label": 0.7}, "bad-label", "label", "0.7"),
    _row("label of three", "unpaired", {"label": 2}, "bad-label", "label", "2, not true"),
    _row("null label", "unpaired", {"label": None}, "bad-label", "label", "None"),
    _row("kto_tag in words", "unpaired", {"label": ..., "kto_tag": "yes"}, "bad-label", "kto_tag", "'yes'"),
    _row("no prompt", "unpaired", {"prompt": ...}, "missing-field", "prompt", "`prompt` is missing"),
    _row("null completion", "unpaired", {"completion": None}, "not-text", "completion", "null"),
    _row("no answer in messages", "unpaired", {"completion": ..., "prompt": ..., "messages": [ASK]},
         "turn-order", "messages", "not with an answer"),
    _row("no label", "unpaired", {"label": ...}, "wrong-kind", "", "no label; training_strategy=kto"),
    _row("for dpo", "unpaired", {}, "wrong-kind", "", "unpaired: it has a label … training_strategy=dpo", "dpo"),
    _row("bad one for sft", "unpaired", {"label": False}, "wrong-kind", "", "nothing to learn … sft", "sft"),
    # One answer.
    _row("ends with the user", "chat", {"messages": [ASK, SAY, ASK]}, "turn-order", "messages", "not with an answer"),
    _row("no messages", "chat", {"messages": []}, "empty-field", "messages", "empty list"),
    _row("null messages", "chat", {"messages": None}, "not-text", "messages", "null, not a list"),
    _row("for dpo", "chat", {}, "wrong-kind", "", "one answer, not two; training_strategy=dpo", "dpo"),
    _row("ends with the human", "sharegpt-sft", {"conversations": [HUMAN]}, "turn-order", "conversations", "the user"),
    _row("for dpo", "sharegpt-sft", {}, "wrong-kind", "", "one answer, not two", "dpo"),
    _row("for kto", "sharegpt-sft", {}, "wrong-kind", "", "no label", "kto"),
    _row("no output", "instructions", {"output": ...}, "missing-field", "output", "`output` is missing"),
    _row("null output", "instructions", {"output": None}, "not-text", "output", "null"),
    _row("for dpo", "instructions", {}, "wrong-kind", "", "one answer, not two", "dpo"),
    _row("empty completion", "completions", {"completion": " "}, "empty-field", "completion", "empty"),
    _row("no completion", "completions", {"completion": ...}, "missing-field", "chosen", "is missing"),
    _row("ends with an answer", "completions", {"prompt": [ASK, SAY]}, "turn-order", "prompt", "nothing is asked"),
    _row("for dpo", "completions", {}, "wrong-kind", "", "one answer, not two", "dpo"),
]
"""Rows that cannot be used."""


def _text(id: str, change: dict[str, str], code: str, field: str, words: str) -> Case:
    return Case(id, array(GOOD, GOOD | {"prompt": "And below?"} | change), code, 2, field, words)


_SWAPPED = {"prompt": GOOD["prompt"], "chosen": GOOD["rejected"], "rejected": GOOD["chosen"]}
_LONG_PROMPT = "Tell me in one or two short words what it is that a cat and a dog see from up there in the old tree"

WHOLE = [
    _text("case alone", {"rejected": "THE blue sky!"},
         "nearly-same-answers", "rejected", "case, spaces or punctuation"),
    _text("spaces inside", {"rejected": "The  blue  sky."}, "nearly-same-answers", "rejected", "spaces"),
    _text("ChatML's marks", {"chosen": "Yes.<|im_end|>"}, "template-residue", "chosen", "'<|im_end|>'"),
    _text("Llama 2's marks", {"prompt": "[INST] q [/INST]"}, "template-residue", "prompt", "'[INST]'"),
    _text("Llama 3's marks", {"chosen": "a<|eot_id|>"}, "template-residue", "chosen", "'<|eot_id|>'"),
    _text("Gemma's marks", {"rejected": "<start_of_turn>model b"}, "template-residue", "rejected", "start_of_turn"),
    _text("end of text", {"chosen": "a</s>"}, "template-residue", "chosen", "'</s>'"),
    _text("replacement characters", {"chosen": "caf\ufffd"}, "damaged-text", "chosen", "U+FFFD"),
    _text("e-mail address", {"chosen": "Ask jo.doe@example.com."}, "personal-data", "chosen", "e-mail"),
    _text("phone number", {"rejected": "Call +49 30 1234 5678"}, "personal-data", "rejected", "phone"),
    _text("card number", {"prompt": "Is 4111 1111 1111 1111 mine?"}, "personal-data", "prompt", "card"),
    _text("bank account", {"chosen": "DE89 3704 0044 0532 0130 00"}, "personal-data", "chosen", "IBAN"),
    Case("repeated row", array(GOOD, _SWAPPED | {"prompt": "Other"}, GOOD),
         "duplicate", 3, "", "the same pair as row 1"),
    Case("repeated line", lines(GOOD, GOOD), "duplicate", 2, "", "the same pair as line 1", "prefs.jsonl"),
    Case("swapped row", array(GOOD, _SWAPPED), "swapped", 2, "", "the same as row 1, the answers swapped"),
    Case("held-out row", array(GOOD), "leakage", 1, "prompt", "also in held-out.json, row 1", against=array(GOOD)),
    Case(
        "nearly held-out row", array(GOOD | {"prompt": f"{_LONG_PROMPT} now"}), "near-leakage", 1, "prompt",
        "nearly that in held-out.json", against=array(GOOD | {"prompt": _LONG_PROMPT}),
    ),
    Case("tools", array(GOOD | {"tools": [{"type": "function"}]}), "unread-tools", words="`tools` in 1 row"),
    Case(
        "tools of an input",
        array(_BASES["openai"] | {"input": {"messages": [ASK], "tools": [{"type": "function"}]}}),
        "unread-tools", words="`tools` in 1 row",
    ),
    Case("weight of a turn", array({"messages": [ASK, SAY | {"weight": 0}, ASK, SAY | {"weight": 1}]}),
         "unread-weight", 1, "messages[1]", "`messages[1].weight` is 0", strategy="sft"),
    Case("weight of an input's turn", array(_BASES["openai"] | {"input": {"messages": [ASK | {"weight": 0.5}]}}),
         "unread-weight", 1, "input.messages[0]", "weight` is 0.5"),
    Case("other fields", array(GOOD | {"id": 1, "score\n": 2}), "unread-fields", words="`id`, `score\\n`"),
    Case("two formats", array(GOOD, _BASES["messages"]), "mixed-formats", words="1 pai, 1 messages"),
    Case("longer is chosen", array(*many(60, chosen=lambda n: f"Yes, indeed, it is {n:x}")),
         "length-bias", words="longer … 100%"),
    Case("shorter is chosen", array(*many(60, chosen=lambda n: f"{n:x}")), "length-bias", words="shorter … 100%"),
    Case("one long row", array(*many(9), GOOD | {"chosen": "long " * 2000}),
         "outlier", 10, "", "characters, the median"),
    Case("few rows", array(GOOD), "few-rows", words="1 row"),
    Case("many rows", lambda: lines(*many(100_001)), "many-rows", words="100,001 rows", name="prefs.jsonl"),
    Case("languages", array(GOOD), "language", words="seems to be in English"),
]
"""Rows that can be used, and that something is said about."""
# fmt: on
