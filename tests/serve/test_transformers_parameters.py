"""The table of OpenAI's parameters against the installed transformers: complete, and true of its handlers' code."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from palate_server.gateway import Refused
from palate_server.transformers_parameters import APPLIED, CHAT, COMPLETIONS, NEUTRAL, NO_EFFECT, RESPONSES, supported

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
