"""What `transformers serve` does with each parameter of OpenAI's API. Knows names and values, imports no engine.

transformers logs a warning for a parameter that it does not support and answers as if it were absent. A caller would take one
answer for `n=4`, or free text for `response_format`. So everything that would change the answer and is not applied is rejected.
A value that asks for what the engine does anyway, such as `n=1`, is removed from the request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
