"""Rows are tokenised many at a time: the ids must be those of the tokenizer's own chat template, one row at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from palate_trainer.spec.preferences import PreferencePair
from tests.slow.conftest import preference_rows

pytestmark = pytest.mark.slow


def pairs(count: int) -> list[PreferencePair]:
    extra = ["", " ", "\n\n", " <|im_end|> in the text", "ünïcödé 中文 🙂", "def f(x):\n\treturn x  "]
    return [
        PreferencePair(row["prompt"] + extra[number % 6], row["chosen"] + extra[number % 5], row["rejected"], number)
        for number, row in enumerate(preference_rows(count), 1)
    ]


@pytest.mark.parametrize("system_prompt", ["You are terse", ""])
def test_many_rows_at_a_time_have_the_chat_templates_own_ids(
    base_model: Path, system_prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    import palate_trainer.tokens as tokens

    monkeypatch.setattr(tokens, "_BATCH_ROWS", 7)  # the last batch is a short one
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    renderer = tokens.Renderer(tokenizer, True, system_prompt, 512)
    data = pairs(30)
    encoded = list(renderer.encode_all(data))
    assert [row.row for row, _ in encoded] == list(range(1, 31))
    for pair, (row, _) in zip(data, encoded, strict=True):
        turns = renderer.messages(pair.prompt)
        for ids, answer in ((row.chosen_ids, pair.chosen), (row.rejected_ids, pair.rejected)):
            whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=True)
            assert row.prompt_ids + ids == whole["input_ids"]
        assert renderer.encode(pair) == (row, False)


def test_plain_text_and_rows_without_a_rejected_answer(base_model: Path) -> None:
    from transformers import AutoTokenizer

    from palate_trainer.tokens import Renderer

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    renderer = Renderer(tokenizer, False, "", 512)
    data = [PreferencePair("Question:\n", "an answer", None, 1), PreferencePair("Again:\n", "yes", "no", 2)]
    (first, _), (second, _) = renderer.encode_all(data)
    assert first.prompt_ids + first.chosen_ids == tokenizer("Question:\nan answer<|im_end|>")["input_ids"]
    assert first.rejected_ids == []
    assert second.prompt_ids + second.rejected_ids == tokenizer("Again:\nno<|im_end|>")["input_ids"]
