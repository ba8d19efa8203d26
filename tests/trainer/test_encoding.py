"""Rows are tokenised many at a time: the ids must be those of the tokenizer's own chat template, one row at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from palate_recipes.preferences.row import Row, plain_row
from tests.support.rows import preference_rows

pytestmark = pytest.mark.slow


def pairs(count: int) -> list[Row]:
    extra = ["", " ", "\n\n", " <|im_end|> in the text", "ünïcödé 中文 🙂", "def f(x):\n\treturn x  "]
    return [
        plain_row(row["prompt"] + extra[number % 6], row["chosen"] + extra[number % 5], row["rejected"], number)
        for number, row in enumerate(preference_rows(count), 1)
    ]


@pytest.mark.parametrize("system_prompt", ["You are terse", ""])
def test_many_rows_at_a_time_have_the_chat_templates_own_ids(
    base_model: Path, system_prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    import palate_trainer.tokenize as tokens

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

    from palate_trainer.tokenize import Renderer

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    renderer = Renderer(tokenizer, False, "", 512)
    data = [plain_row("Question:\n", "an answer", None, 1), plain_row("Again:\n", "yes", "no", 2)]
    (first, _), (second, _) = renderer.encode_all(data)
    assert first.prompt_ids + first.chosen_ids == tokenizer("Question:\nan answer<|im_end|>")["input_ids"]
    assert first.rejected_ids == []
    assert second.prompt_ids + second.rejected_ids == tokenizer("Again:\nno<|im_end|>")["input_ids"]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content']FILTER }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace("{{ m['content']FILTER }}", "{{ m['content'].split('</think>')[-1] }}")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML.replace(
    "FILTER", ""
)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (CHATML.replace("FILTER", ""), True),
        (CHATML.replace("FILTER", " | trim"), False),
        (THINKING, True),
        (NO_SYSTEM, False),
    ],
    ids=["as it is", "trimmed", "thinking", "no system"],
)
def test_one_rendering_serves_both_answers_only_where_that_changes_nothing(
    base_model: Path, template: str, found: bool
) -> None:
    from transformers import AutoTokenizer

    from palate_trainer.tokenize import Renderer

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer, True, "", 4096)
    assert (renderer._verbatim is not None) is found
    answers = [
        "Yes.",
        "  so \n",
        "<think>\nhm\n</think>\n\nYes.",
        "a<|im_end|>",
        "<|im_start|>user\nwhat",
        "ünï 中文 🙂",
        "{{ x }}",
    ]
    for answer in answers:
        row = plain_row("Why?", answer, "No.")
        turns = [{"role": "user", "content": "Why?"}]
        ended = answer.removesuffix("<|im_end|>")  # the tokenizer's EOS
        expected = [tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)] + [
            tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": text}], tokenize=False)
            for text in (ended, "No.")
        ]
        assert renderer._texts(row) == expected
