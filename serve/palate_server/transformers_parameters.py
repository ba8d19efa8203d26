"""What `transformers serve` does with each parameter of OpenAI's API. Knows names and values, imports no engine.

transformers logs a warning for a parameter that it does not support and answers as if it were absent. A caller would take one
answer for `n=4`, or free text for `response_format`. So everything that would change the answer and is not applied is rejected.
A value that asks for what the engine does anyway, such as `n=1`, is removed from the request. The engine reads values without checking
them, and a wrong one ends in a 500, so they are checked here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from palate_server.gateway import Refused

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"

_EVERY = frozenset({"model", "stream", "temperature", "top_p", "seed", "generation_config"})

APPLIED: Mapping[str, frozenset[str]] = {
    CHAT: _EVERY
    | {"messages", "tools", "chat_template_kwargs", "max_tokens", "max_completion_tokens"}
    | {"frequency_penalty", "logit_bias"},
    COMPLETIONS: _EVERY | {"prompt", "max_tokens", "frequency_penalty"},
    RESPONSES: _EVERY | {"input", "instructions", "tools", "max_output_tokens"},
}
"""Parameters that the engine applies, by path."""

NO_EFFECT = frozenset({
    "user", "metadata", "safety_identifier", "service_tier",
    "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
})  # fmt: skip
"""Parameters that describe the caller or its bill. They change no answer on any server, so any value is accepted."""

_TEXT: tuple[Any, ...] = ({"type": "text"},)
NEUTRAL: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    CHAT: {
        "n": (1,),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "presence_penalty": (0,),
        "stop": ([],),
        "response_format": _TEXT,
        "modalities": (["text"],),
        "parallel_tool_calls": (True,),
        "tool_choice": ("auto", "none"),
        "function_call": ("none",),
        "functions": ([],),
        "store": (False,),
        "reasoning_effort": ("medium",),
        "verbosity": ("medium",),
        # The last chunk always has the usage.
        "stream_options": ({}, {"include_usage": True}, {"include_usage": False}),
        "audio": (),
        "moderation": (),
        "prediction": (),
        "web_search_options": (),
    },
    COMPLETIONS: {
        "n": (1,),
        "best_of": (1,),
        "echo": (False,),
        "logprobs": (),
        "logit_bias": ({},),
        "presence_penalty": (0,),
        "stop": ([],),
        "stream_options": ({}, {"include_usage": True}, {"include_usage": False}),
        "suffix": ("",),
    },
    RESPONSES: {
        "background": (False,),
        "include": ([],),
        "parallel_tool_calls": (True,),
        "store": (True, False),  # nothing is kept; previous_response_id, which would need it, is rejected
        "stream_options": ({},),
        "text": ({}, {"format": {"type": "text"}}),
        "tool_choice": ("auto", "none"),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
        "access_programs": (),
        "context_management": (),
        "conversation": (),
        "image": (),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "reasoning": ({},),
    },
}
"""Parameters that the engine ignores, by path, with the values that ask for nothing else. null is always one of them."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_content(value: object) -> bool:
    """Whether it is text: the engine leaves out images and audio without an error."""
    if not isinstance(value, list):
        return value is None or isinstance(value, str)
    return all(
        isinstance(part, dict)
        and part.get("type") in {"text", "input_text", "output_text"}
        and isinstance(part.get("text"), str)
        for part in value
    )


def _are_messages(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and _is_content(one.get("content")) for one in value
    )


def _is_input(value: object) -> bool:
    """Whether it is text, parts of text, or items; those with a role are messages."""
    if not isinstance(value, list):
        return isinstance(value, str)
    if not value or not all(isinstance(item, dict) for item in value):
        return False
    return _is_content(value) if "role" not in value[0] else _are_messages([item for item in value if "role" in item])


_COUNT: tuple[Callable[[Any], bool], str] = (lambda v: _is_integer(v) and v >= 1, "an integer of at least 1")
_MESSAGES = "a list of at least one message, each with a role and with content that is text or parts of text"

FORMS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "messages": (lambda v: bool(v) and _are_messages(v), _MESSAGES),
    "input": (_is_input, "text, parts of text, or messages with such content"),
    "prompt": (lambda v: isinstance(v, str) and v != "", "one text that is not empty"),
    "instructions": (lambda v: isinstance(v, str), "text"),
    "stream": (lambda v: isinstance(v, bool), "true or false"),
    "temperature": (lambda v: _is_number(v) and 0 <= v <= 2, "a number from 0 to 2"),
    "top_p": (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    # The engine makes a repetition penalty of 1 plus the value out of it, which must be positive.
    "frequency_penalty": (lambda v: _is_number(v) and -1 < v <= 2, "a number over -1 and up to 2"),
    "seed": (lambda v: _is_integer(v) and -(2**63) <= v < 2**63, "an integer of 64 bits"),
    "max_tokens": _COUNT,
    "max_completion_tokens": _COUNT,
    "max_output_tokens": _COUNT,
    "tools": (lambda v: isinstance(v, list) and all(isinstance(one, dict) for one in v), "a list of objects"),
    "logit_bias": (
        lambda v: isinstance(v, dict) and all(k.isdecimal() and _is_number(bias) for k, bias in v.items()),
        "an object of token ids and numbers",
    ),
    "chat_template_kwargs": (lambda v: isinstance(v, dict), "an object"),
    "generation_config": (lambda v: isinstance(v, str), "a text with JSON"),
}
"""What a value of each applied parameter must be, as a check and in words."""

_REQUIRED = {CHAT: "messages", COMPLETIONS: "prompt", RESPONSES: "input"}


def prepared(path: str, request: dict[str, Any]) -> dict[str, Any]:
    """Returns the request as the engine should get it: only parameters that it applies, with values that it can read.

    Raises:
        Refused: 400 with the parameter's name.
    """
    kept = supported(path, request)
    if path not in APPLIED:
        return kept
    kept = {name: value for name, value in kept.items() if value is not None}
    if _REQUIRED[path] not in kept:
        name = _REQUIRED[path]
        raise Refused(400, f"{name} is missing: expected {FORMS[name][1]}.", param=name)
    for name, value in kept.items():
        holds, words = FORMS.get(name, (lambda _: True, ""))
        if not holds(value):
            raise Refused(400, f"{name}={json.dumps(value)[:100]} is invalid: expected {words}.", param=name)
    if path == RESPONSES:
        kept.setdefault("stream", False)  # the engine's own default is to stream
    return kept


def supported(path: str, request: dict[str, Any]) -> dict[str, Any]:
    """Returns the request as the engine should get it: only parameters that it applies.

    Raises:
        Refused: 400 with the parameter's name, for one that the engine would ignore or does not know.
    """
    applied = APPLIED.get(path)
    if applied is None:
        return request
    kept = {}
    for name, value in request.items():
        if name in applied:
            kept[name] = value
        elif value is not None and name not in NO_EFFECT and not _neutral(value, NEUTRAL[path].get(name, ())):
            raise Refused(400, _message(name, value, NEUTRAL[path].get(name, ())), param=name)
    if request.get("tool_choice") == "none":
        kept.pop("tools", None)  # the engine has no such choice, but without tools there is no call
    return kept


def _neutral(value: object, allowed: tuple[Any, ...]) -> bool:
    # 1 == True in Python: without the check of bool, n=true would be n=1
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def _message(name: str, value: object, allowed: tuple[Any, ...]) -> str:
    instead = f"omit it, or set it to {' or '.join(json.dumps(one) for one in allowed)}" if allowed else "omit it"
    return (
        f"{name}={json.dumps(value)[:100]} is not supported by this service's engine (transformers): {instead}. "
        "An engine with all of OpenAI's parameters is vLLM."
    )
