"""The table of OpenAI's parameters against the installed transformers: complete, and true of its handlers' code."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from palate_server.gateway import Refused
from palate_server.transformers_parameters import (
    APPLIED,
    CHAT,
    COMPLETIONS,
    FORMS,
    NEUTRAL,
    NO_EFFECT,
    RESPONSES,
    prepared,
    supported,
)

PATHS = [CHAT, COMPLETIONS, RESPONSES]
BY_PALATE = {"max_completion_tokens"}
"""Applied by palate_server.transformers, on top of the engine."""


def handler(path: str) -> Any:
    pytest.importorskip("transformers.cli.serving")
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler

    return {CHAT: ChatCompletionHandler, COMPLETIONS: CompletionHandler, RESPONSES: ResponseHandler}[path]


@pytest.mark.parametrize("path", PATHS)
def test_the_table_has_every_parameter_that_the_engine_takes_and_says_what_becomes_of_it(path: str) -> None:
    engine = handler(path)
    known, ignored = set(engine._valid_params_class.__mutable_keys__), set(engine._unused_fields)
    ours = APPLIED[path] | set(NEUTRAL[path]) | NO_EFFECT
    assert known - ours == set()
    assert (APPLIED[path] & ignored) - BY_PALATE == set()
    assert APPLIED[path] <= known, "the engine would reject these with 422"
    assert APPLIED[path] & set(NEUTRAL[path]) == set()


@pytest.mark.parametrize("path", PATHS)
def test_the_engine_reads_what_the_table_calls_applied_and_nothing_that_it_calls_ignored(path: str) -> None:
    code = "".join(inspect.getsource(one) for one in inspect.getmro(handler(path))[:-1])
    read = {
        name for name in APPLIED[path] | set(NEUTRAL[path]) if f'body.get("{name}"' in code or f'body["{name}"]' in code
    }
    assert APPLIED[path] - read - BY_PALATE == set()
    # stop needs a tokenizer that the engine does not pass; a suffix is only appended to the answer; the third is echoed
    assert read - APPLIED[path] <= {"stop", "suffix", "parallel_tool_calls"}


@pytest.mark.parametrize("path", PATHS)
def test_what_the_engine_ignores_is_rejected_by_name(path: str) -> None:
    for name in [*NEUTRAL[path], "top_k", "guided_json"]:
        with pytest.raises(Refused, match=f"^{name}=") as caught:
            supported(path, {"model": "default", name: {"something": 7}})
        assert (caught.value.status, caught.value.param) == (400, name)


@pytest.mark.parametrize("path", PATHS)
def test_defaults_pass_and_do_not_reach_the_engine(path: str) -> None:
    asked = {"model": "default", "temperature": 0, "user": "u", "metadata": {"a": "b"}, "top_k": None}
    for name, values in NEUTRAL[path].items():
        for value in (None, *values):
            assert supported(path, {**asked, name: value}) == {"model": "default", "temperature": 0}


def test_values_that_python_calls_equal_are_not_the_default() -> None:
    for name, value in (("n", True), ("logprobs", 0), ("n", 2), ("logprobs", True), ("stop", ["\n"]), ("stop", "x")):
        with pytest.raises(Refused, match=name):
            supported(CHAT, {name: value})


def test_no_tool_choice_leaves_no_tools() -> None:
    tools = [{"type": "function"}]
    assert supported(CHAT, {"tools": tools, "tool_choice": "none"}) == {}
    assert supported(CHAT, {"tools": tools, "tool_choice": "auto"}) == {"tools": tools}
    with pytest.raises(Refused, match="tool_choice"):
        supported(CHAT, {"tools": tools, "tool_choice": "required"})


def test_other_paths_pass() -> None:
    assert supported("/load_model", {"n": 7}) == {"n": 7}


WHOLE: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Why?"}]},
    COMPLETIONS: {"prompt": "Why"},
    RESPONSES: {"input": "Why?", "stream": False},
}


@pytest.mark.parametrize("path", PATHS)
def test_every_applied_parameter_has_its_form_and_a_wrong_value_is_rejected_by_name(path: str) -> None:
    assert APPLIED[path] - set(FORMS) == {"model"}
    for name in APPLIED[path] - {"model"}:
        for wrong in ([7], {"a": [7]}, float("nan")):
            if name == "chat_template_kwargs" and isinstance(wrong, dict):
                continue
            with pytest.raises(Refused, match=f"^{name}=.* is invalid: expected ") as caught:
                prepared(path, {**WHOLE[path], name: wrong})
            assert (caught.value.status, caught.value.param) == (400, name)


@pytest.mark.parametrize("path", PATHS)
def test_what_the_engine_can_read_passes(path: str) -> None:
    values = {"temperature": 0, "top_p": 1.0, "seed": -1, "stream": True, "frequency_penalty": 0.5, "max_tokens": 1}
    asked = {**WHOLE[path], **{name: value for name, value in values.items() if name in APPLIED[path]}}
    assert prepared(path, {**asked, "generation_config": None}) == asked


@pytest.mark.parametrize("path", PATHS)
def test_a_request_without_its_subject_is_rejected(path: str) -> None:
    name = next(iter(WHOLE[path]))
    for request in ({}, {name: None}):
        with pytest.raises(Refused, match=f"^{name} is missing: expected ") as caught:
            prepared(path, request)
        assert caught.value.param == name


def test_what_the_engine_would_leave_out_without_a_word_is_rejected() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    text = {"type": "text", "text": "Why?"}
    with pytest.raises(Refused, match="parts of text"):
        prepared(CHAT, {"messages": [{"role": "user", "content": [text, image]}]})
    with pytest.raises(Refused, match="parts of text"):
        prepared(RESPONSES, {"input": [{"type": "input_image", "image_url": "data:"}]})
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    turns = [{"role": "user", "content": [{"type": "input_text", "text": "Why?"}]}, call]
    assert prepared(RESPONSES, {"input": turns})["input"] == turns
    assert prepared(CHAT, {"messages": [{"role": "user", "content": [text]}, {"role": "assistant"}]})


def test_a_response_is_streamed_only_if_asked() -> None:
    assert prepared(RESPONSES, {"input": "Why?"})["stream"] is False
    assert prepared(RESPONSES, {"input": "Why?", "stream": True})["stream"] is True


def test_the_requests_of_lm_eval_are_rejected_by_name() -> None:
    common = {"model": "default", "prompt": [[3, 5, 8]], "max_tokens": 1, "temperature": 0, "seed": 1234}
    for name, request in {
        "logprobs": {**common, "logprobs": 1, "echo": True},  # a task by log-probabilities
        "stop": {**common, "stop": ["\n"]},  # a task that generates
        "prompt": {**common, "stop": []},
    }.items():
        with pytest.raises(Refused, match=f"^{name}=") as caught:
            prepared(COMPLETIONS, request)
        assert (caught.value.status, caught.value.param) == (400, name)
