"""Rows to token ids with real tokenizers and real chat templates: the prompt as served, one system turn, one end, no silent loss."""

from __future__ import annotations

import copy
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from palate_recipes.errors import DataError, TrainerError
from palate_recipes.preferences.row import plain_row
from tests.trainer.support import spec, train

pytestmark = pytest.mark.slow

PAIR = plain_row("The sky is bl", "ue, as ever.", "ack at night.", 1)


def template(name: str) -> str:
    """A model's own chat template, as TRL ships it."""
    return (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text()


@pytest.fixture(scope="module")
def smollm2(base_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_model)


@pytest.fixture
def tokenizer(smollm2: Any) -> Any:
    """SmolLM2's tokenizer, the test's own: ChatML, with a default system prompt."""
    return copy.deepcopy(smollm2)


@pytest.fixture
def llama3(tokenizer: Any) -> Any:
    """A tokenizer like Llama 3's: it puts BOS before plain text, and its template writes BOS and <|eot_id|>."""
    from tokenizers.processors import TemplateProcessing

    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.bos_token, tokenizer.eos_token = names[0], names[3]
    bos = (names[0], tokenizer.convert_tokens_to_ids(names[0]))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{names[0]} $A", special_tokens=[bos])
    tokenizer.chat_template = template("llama3")
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


@pytest.fixture
def spaced() -> Any:
    """A tokenizer like Llama 2's: it writes spaces into tokens, and one before whatever stands at a text's beginning."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    bytes_and_names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=bytes_and_names)
    backend.train_from_iterator(["The sky is blue, as ever. The sky is black at night."] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def renderer(tokenizer: Any, system_prompt: str = "", *, chat: bool = True, seq_length: int = 512) -> Any:
    from palate_trainer.tokenize import Renderer

    made = Renderer(tokenizer, chat, system_prompt, seq_length)
    made.check()
    return made


def served(tokenizer: Any, turns: list[dict[str, str]]) -> list[int]:
    """The ids that an engine computes from for a request with these turns."""
    return list(
        tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"]
    )


def text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


# The boundary between prompt and answer


def test_prompt_and_completion_come_from_one_rendering_and_are_trls(tokenizer: Any) -> None:
    made = renderer(tokenizer, "You are terse")
    encoded, parted = made.encode(PAIR)
    turns = made.messages(PAIR.prompt)
    assert not parted
    assert encoded.prompt_ids == served(tokenizer, turns)
    for ids, answer in ((encoded.chosen_ids, PAIR.chosen), (encoded.rejected_ids, PAIR.rejected)):
        whole = [*turns, {"role": "assistant", "content": answer}]
        assert (
            encoded.prompt_ids + ids
            == tokenizer.apply_chat_template(whole, tokenize=True, return_dict=True)["input_ids"]
        )


def test_a_merge_across_the_boundary_loses_and_shifts_no_token(tokenizer: Any) -> None:
    """Plain text: "bl" + "ue" is one token. TRL would drop the prompt's last token and train on "blue" instead."""
    bare = tokenizer(PAIR.text)["input_ids"]
    assert tokenizer(PAIR.text + PAIR.chosen)["input_ids"][: len(bare)] != bare
    encoded, parted = renderer(tokenizer, chat=False).encode(PAIR)
    assert parted
    assert encoded.prompt_ids == bare
    assert text(tokenizer, encoded.prompt_ids + encoded.chosen_ids) == f"{PAIR.text}{PAIR.chosen}<|im_end|>"
    assert text(tokenizer, encoded.chosen_ids) == f"{PAIR.chosen}<|im_end|>"


def test_a_merge_in_a_chat_template_keeps_the_served_prompt(tokenizer: Any) -> None:
    tokenizer.chat_template = """{% for m in messages -%}
        {% if m['role'] == 'user' %}Q: {{ m['content'] }} A: bl{% else %}{{ m['content'] }}{% endif %}
    {%- endfor %}"""
    made = renderer(tokenizer)
    encoded, parted = made.encode(PAIR)
    assert parted
    assert encoded.prompt_ids == served(tokenizer, made.messages(PAIR.prompt))
    assert text(tokenizer, encoded.prompt_ids + encoded.chosen_ids) == "Q: The sky is bl A: blue, as ever.<|im_end|>"


def test_a_tokenizer_that_puts_a_space_before_a_beginning_puts_none_before_the_answer(spaced: Any) -> None:
    encoded, parted = renderer(spaced, chat=False).encode(PAIR)
    assert parted
    assert encoded.prompt_ids == spaced(PAIR.text)["input_ids"]
    assert text(spaced, encoded.prompt_ids + encoded.chosen_ids) == "The sky is blue, as ever.</s>"


@pytest.mark.parametrize(
    "rendering",
    [
        # the generation prompt opens a thought that the rendering of an answer does not have (DeepSeek R1)
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}",
        # the system turn stands at the last message only (Mistral)
        "{% for m in messages if m['role'] != 'system' %}[{{ m['role'] }}]"
        "{% if loop.last and messages[0]['role'] == 'system' and m['role'] == 'user' %}{{ messages[0]['content'] }} {% endif %}"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    ],
)
def test_a_template_that_renders_both_anew_trains_the_answer_on_the_served_prompt(
    tokenizer: Any, rendering: str
) -> None:
    tokenizer.chat_template = rendering
    made = renderer(tokenizer, "Be brief.")
    encoded, parted = made.encode(PAIR)
    assert parted
    assert encoded.prompt_ids == served(tokenizer, made.messages(PAIR.prompt))
    assert text(tokenizer, encoded.chosen_ids) == f"{PAIR.chosen}<|im_end|>"
    assert text(tokenizer, encoded.rejected_ids) == f"{PAIR.rejected}<|im_end|>"


def test_a_template_that_drops_the_answer_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}{{ messages | length }}"
    )
    with pytest.raises(TrainerError, match=r"row 1: .* drops or rewrites the answer"):
        renderer(tokenizer).encode(PAIR)


@pytest.mark.parametrize("code", ["{{ 1 // 0 }}", "{{ messages[99]['content'] + 1 }}", "{{ ''.__class__.__mro__ }}"])
def test_a_template_that_fails_of_its_own_is_named(tokenizer: Any, code: str) -> None:
    tokenizer.chat_template = code
    with pytest.raises(TrainerError, match=r"chat template (fails on|rejects) the conversation"):
        renderer(tokenizer).encode(PAIR)


# System prompts


@pytest.mark.parametrize("name", ["smollm2", "qwen2_5", "llama3", "qwen3"])
def test_a_given_system_prompt_is_the_only_one(tokenizer: Any, name: str) -> None:
    if name != "smollm2":
        tokenizer.chat_template = template(name)
    encoded, _ = renderer(tokenizer, "You are terse.").encode(PAIR)
    rendered = text(tokenizer, encoded.prompt_ids)
    assert rendered.count("You are") == 1
    assert rendered.count("system") == 1


@pytest.mark.parametrize("name", ["smollm2", "qwen2_5", "qwen2_5_vl"])
def test_an_empty_system_prompt_is_none_and_so_is_it_in_the_saved_template(
    tokenizer: Any, tmp_path: Path, name: str
) -> None:
    from transformers import AutoTokenizer

    from palate_trainer.template_probe import take_out_system_default

    if name != "smollm2":
        tokenizer.chat_template = template(name)
    user = [{"role": "user", "content": "Hello"}]
    talk = [*user, {"role": "assistant", "content": "Hi"}, *user]
    given = [{"role": "system", "content": "You are terse."}, *talk]
    before = {"talk": served(tokenizer, talk), "given": served(tokenizer, given)}
    note = take_out_system_default(tokenizer)
    assert note is not None
    assert "helpful" in note
    encoded, parted = renderer(tokenizer).encode(PAIR)
    assert not parted
    assert "system" not in text(tokenizer, encoded.prompt_ids)
    assert text(tokenizer, encoded.prompt_ids) == f"<|im_start|>user\n{PAIR.text}<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert served(saved, [{"role": "user", "content": PAIR.text}]) == encoded.prompt_ids
    assert text(saved, before["talk"]).endswith(text(saved, served(saved, talk)))  # later turns are untouched
    assert served(saved, given) == before["given"]
    assert take_out_system_default(saved) is None  # nothing is left to take out


@pytest.mark.parametrize("name", ["llama3", "llama3_2", "qwen3", "gemma", "phi3"])
def test_templates_without_a_default_stay_as_they_are(tokenizer: Any, name: str) -> None:
    from palate_trainer.template_probe import take_out_system_default

    tokenizer.chat_template = template(name)
    assert take_out_system_default(tokenizer) is None
    assert tokenizer.chat_template == template(name)


def test_a_default_that_cannot_be_told_apart_is_named(tokenizer: Any) -> None:
    from palate_trainer.template_probe import take_out_system_default

    tokenizer.chat_template = (
        "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else 'Be nice.' %}"
        "{% for m in messages if m['role'] != 'system' %}[{{ m['role'] }}]{% if loop.first %}<<{{ system }}>>{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    assert "cannot be removed: 'Be nice.'" in str(take_out_system_default(tokenizer))


DATED = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nToday is {{ strftime_now('%A, %d %B %Y, %H:%M') }}.<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("today", ["Sunday, 03 March 2026, 05:04", "Friday, 27 December 1999, 16:57", None])
def test_a_prompt_with_the_date_is_recognized_on_another_day_and_no_other_prompt_is(
    tokenizer: Any, today: str | None
) -> None:
    from palate_recipes.specs.probe import ProbeRow

    if today:  # a template may read like this, too: the day of the training must not matter
        tokenizer.chat_template = "{% set now = strftime_now('%Y') %}" + DATED.replace(
            "{{ strftime_now('%A, %d %B %Y, %H:%M') }}",
            f"{{{{ strftime_now('%A, %d %B %Y, %H:%M') if now in ('1888', '2999') else '{today}' }}}}",
        )
    else:
        tokenizer.chat_template = DATED
    made, turns = renderer(tokenizer), [{"role": "user", "content": "Which day is it on 7 May 2031?"}]
    start, end = made.date_span(turns)
    row = ProbeRow(
        row=1,
        prompt_ids=tuple(made.prompt_ids(turns)),
        completion_ids=(1,),
        logps=(-1.0,),
        date_start=start,
        date_end=end,
    )

    def on(day: str, asked: list[dict[str, str]] = turns) -> list[int]:
        text = tokenizer.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=True, strftime_now=lambda form: day
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    tokenizer.chat_template = DATED
    for day in ("Saturday, 08 July 2024, 23:59", "Wednesday, 11 May 1031, 00:00", "Monday, 28 February 2127, 11:08"):
        assert row.renders_as(on(day))
        assert not row.renders_as(on(day, [{"role": "user", "content": "Which day is it on 8 May 2031?"}]))
        assert not row.renders_as(on(day)[:-1])
        assert not row.renders_as(on(day)[5:])
    assert 0 < start < end < len(row.prompt_ids)
    assert made.date_span([{"role": "system", "content": "Be brief."}, *turns]) == (0, 0)


def test_training_without_a_system_prompt_serves_without_one(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    start = train(spec(tiny, tmp_path, max_steps=1, system_prompt=""))[0]
    assert any("is removed" in note for note in start["notes"])
    model = tmp_path / "out" / "model"
    prompt_ids = json.loads((model / "probe.json").read_text())["rows"][0]["prompt_ids"]
    turns = [{"role": "user", "content": "Is 0 an even number?"}]
    assert served(AutoTokenizer.from_pretrained(model), turns) == prompt_ids


# Beginnings and ends


def test_one_end_with_chatml(tokenizer: Any) -> None:
    for answer in ("Yes.", "Yes.<|im_end|>", "Yes.<|im_end|>\n"):
        encoded, _ = renderer(tokenizer).encode(plain_row("So?", answer, None, 1))
        assert text(tokenizer, encoded.chosen_ids) == "Yes.<|im_end|>\n"  # the line break is the template's, and TRL's


def test_one_beginning_and_one_end_with_llama_3(llama3: Any) -> None:
    encoded, _ = renderer(llama3, "Be brief.").encode(PAIR)
    ids = encoded.prompt_ids + encoded.chosen_ids
    assert ids[0] == llama3.bos_token_id
    assert ids.count(llama3.bos_token_id) == 1
    assert encoded.chosen_ids[-1] == llama3.eos_token_id
    assert encoded.chosen_ids.count(llama3.eos_token_id) == 1


def test_one_beginning_and_one_end_with_plain_text(llama3: Any) -> None:
    for prompt in ("So?\n", "<|begin_of_text|>So?\n"):
        for answer in ("Yes.", "Yes.<|eot_id|>", "Yes.<|eot_id|>\n"):
            encoded, _ = renderer(llama3, chat=False).encode(plain_row(prompt, answer, None, 1))
            ids = encoded.prompt_ids + encoded.chosen_ids
            assert text(llama3, ids) == "<|begin_of_text|>So?\nYes.<|eot_id|>"
            assert encoded.prompt_ids == llama3("So?\n")["input_ids"]  # as /v1/completions would have it


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    end = ("<|im_end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|im_end|>", special_tokens=[end])
    encoded, _ = renderer(tokenizer, chat=False).encode(plain_row("So?\n", "Yes.", None, 1))
    assert text(tokenizer, encoded.prompt_ids + encoded.chosen_ids) == "So?\nYes.<|im_end|>"


def test_a_template_without_an_end_gets_one(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    encoded, _ = renderer(tokenizer).encode(PAIR)
    assert encoded.chosen_ids[-1] == tokenizer.eos_token_id
    assert encoded.chosen_ids.count(tokenizer.eos_token_id) == 1
    assert encoded.rejected_ids[-1] == tokenizer.eos_token_id


def test_the_end_is_one_at_which_the_engine_stops(tokenizer: Any, base_model: Path, tmp_path: Path) -> None:
    """A base model with a chat template of its own: EOS is <|endoftext|>, the turn ends with <|im_end|>."""
    from palate_trainer.tokenize import Renderer, stop_token_ids

    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|endoftext|>"
    unknown, _ = Renderer(tokenizer, True, "", 512).encode(PAIR)
    assert text(tokenizer, unknown.chosen_ids).endswith("<|im_end|>\n<|endoftext|>")
    wanted = spec(base_model, tmp_path)
    assert turn_end in stop_token_ids(wanted.files.model_dir)
    known, _ = Renderer(tokenizer, True, "", 512, stop_token_ids(wanted.files.model_dir)).encode(PAIR)
    assert text(tokenizer, known.chosen_ids).endswith("<|im_end|>\n")


# Length


def test_rows_that_truncation_would_spoil_are_left_out_and_counted_by_reason(tiny: Path, tmp_path: Path) -> None:
    long = "word " * 200
    data = [
        {"prompt": "short", "chosen": "yes", "rejected": "no"},
        {"prompt": long, "chosen": "yes", "rejected": "no"},
        {"prompt": "short", "chosen": long + "a", "rejected": long + "b"},
        {"prompt": "short", "chosen": long, "rejected": "no"},
        {"prompt": "short", "chosen": "yes", "rejected": "yes<|im_end|>"},
    ]
    metrics = train(spec(tiny, tmp_path, data=data, max_steps=1, seq_length=64))
    start = metrics[0]
    assert start["dropped_rows"] == [2, 3, 5]
    assert (start["prompt_too_long_rows"], start["same_after_cut_rows"], start["truncated_rows"]) == (1, 1, 1)
    assert start["train_rows"] == 2
    for said in (
        "the prompt alone fills seq_length=64 (row 2)",
        "when truncated to seq_length=64 (row 3)",
        "lose their end",
        "(row 5)",
    ):
        assert any(said in note for note in start["notes"])
    assert metrics[1]["grad_norm"] > 0


def test_truncation_keeps_the_prompt_and_is_the_same_for_both_answers(tokenizer: Any) -> None:
    from palate_trainer.tokenize import encode_pairs

    made = renderer(tokenizer, "Be brief.", seq_length=40)
    pair = plain_row("Say a number.", "one " * 60, "two " * 60, 7)
    (cut,), report = encode_pairs([pair], made, name="train")
    assert report.cut == [7]
    assert cut.prompt_ids == served(tokenizer, made.messages(pair.prompt))
    assert len(cut.prompt_ids + cut.chosen_ids) == len(cut.prompt_ids + cut.rejected_ids) == 40


def test_a_file_of_spoilt_rows_is_refused(tokenizer: Any) -> None:
    from palate_trainer.tokenize import encode_pairs

    pairs = [plain_row("word " * 99, "yes", "no", row) for row in (1, 2)]
    with pytest.raises(DataError, match=r"train has no row left.*\n.*rows 1, 2"):
        encode_pairs(pairs, renderer(tokenizer, seq_length=32), name="train")


# Wrong rows


def test_wrong_rows_are_refused_unless_they_may_be_skipped(tiny: Path, tmp_path: Path) -> None:
    from tests.trainer.support import refusal

    good = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}
    data = [good, {**good, "rejected": "Yes. "}, {**good, "chosen": ""}, good]
    message = refusal(spec(tiny, tmp_path / "refuse", data=data, max_steps=1))
    assert "2 of 4 rows are invalid" in message
    assert "bad_rows=skip" in message
    start = train(spec(tiny, tmp_path / "skip", data=data, max_steps=1, bad_rows="skip"))[0]
    assert start["skipped_rows"] == [2, 3]
    assert start["train_rows"] == 2
    assert any("row 2: `chosen` and `rejected` are the same text" in note for note in start["notes"])
