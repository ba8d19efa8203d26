"""OpenAI's API, as its own client speaks it, on each engine, and vLLM with and without Palate before it.

`CHECKS` says what OpenAI's service does. Where an engine does something else, docs/deployment.md has a row with what it does; a row
without a difference fails like a difference without a row. The second half sends the same bytes to vLLM as Palate starts it and to
vLLM started by hand with the same options. What differs between these answers has its row too.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import httpx
import openai
import pytest
from openai import OpenAI

from palate_recipes.specs.serve import BODY_LIMIT_BYTES, describe_engines
from tests.serve.conftest import TOKEN, Server, running
from tests.support.models import tiny_model

DOCS = Path(__file__).parents[2] / "docs" / "deployment.md"
ENGINES = ("vllm", "transformers")

Check = Callable[[OpenAI], object]
CHECKS: dict[str, Check] = {}

CHAT: dict[str, Any] = {
    "model": "default",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 6,
    "temperature": 0,
}
COMPLETION: dict[str, Any] = {"model": "default", "prompt": "The capital of France", "max_tokens": 6, "temperature": 0}
RESPONSE: dict[str, Any] = {"model": "default", "input": "Say it.", "max_output_tokens": 6, "temperature": 0}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {"name": "weather", "parameters": SCHEMA, "strict": True}
TOOLS: Any = [{"type": "function", "function": TOOL}]
CONSTRAINED: dict[str, Any] = {"max_tokens": 150, "temperature": 1}
INSTRUCTION = "Be short. " * 20  # longer than the system prompt that the template has instead
TEMPLATE = "{% if tools %}<tool_call>{{ tools | tojson }}</tool_call>{% endif %}"
"""Begins a chat template in the format of Hermes, so that a parser of tool calls is chosen."""


class Differs(Exception):
    """The answer is not OpenAI's; the text says what it is instead, in the words of the table."""


def expect(holds: object, instead: str) -> None:
    if not holds:
        raise Differs(instead)


def check(name: str) -> Callable[[Check], Check]:
    def add(function: Check) -> Check:
        assert name not in CHECKS
        CHECKS[name] = function
        return function

    return add


def chat(client: OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{**CHAT, **fields})


def complete(client: OpenAI, **fields: Any) -> Any:
    return client.completions.create(**{**COMPLETION, **fields})


def respond(client: OpenAI, **fields: Any) -> Any:
    return client.responses.create(**{**RESPONSE, **fields})


def said(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def whole(ask: Callable[[int], Any]) -> Any:
    """Returns the first answer that ends by itself: the model knows nothing, and may write spaces until it is cut off."""
    answers = (ask(seed) for seed in range(8))
    return next(answer for answer in answers if answer.choices[0].finish_reason != "length")


def rejected(status: int, ask: Callable[[], object], *, instead: str = "accepted") -> openai.APIStatusError:
    """Returns the error that OpenAI's service would answer with; another status passes through as it is."""
    try:
        ask()
    except openai.APIStatusError as error:
        if error.status_code != status:
            raise
        found = error
    else:
        raise Differs(instead)
    assert isinstance(found.body, dict)
    assert set(found.body) >= {"message", "type", "param", "code"}
    assert found.body["message"]
    return found


# ── chat ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@check("chat")
def _(client: OpenAI) -> None:
    answer = chat(client)
    assert (answer.object, answer.model) == ("chat.completion", "default")
    assert answer.id.startswith("chatcmpl-")
    assert abs(answer.created - time.time()) < 600
    choice = answer.choices[0]
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")
    assert choice.message.content
    usage = answer.usage
    assert (usage.completion_tokens, usage.prompt_tokens + 6) == (6, usage.total_tokens)


@check("chat: `stream`")
def _(client: OpenAI) -> None:
    chunks = list(chat(client, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    told = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in told) == said(chat(client))
    assert [choice.finish_reason for choice in told if choice.finish_reason] == ["length"]
    expect(not any(chunk.usage for chunk in chunks), "the last chunk has the usage, asked for or not")


@check("chat: `stream_options.include_usage`")
def _(client: OpenAI) -> None:
    last = list(chat(client, stream=True, stream_options={"include_usage": True}))[-1]
    assert last.usage.completion_tokens == 6
    expect(last.choices == [], "the usage is in the chunk with `finish_reason`")


@check("chat: `max_completion_tokens`")
def _(client: OpenAI) -> None:
    assert chat(client, max_tokens=openai.omit, max_completion_tokens=3).usage.completion_tokens == 3


@check("chat: `stop`")
def _(client: OpenAI) -> None:
    whole = said(chat(client, max_tokens=12))
    stop = whole[len(whole) // 2 :][:3]
    cut = chat(client, max_tokens=12, stop=[stop])
    assert said(cut) == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


@check("chat: `n`")
def _(client: OpenAI) -> None:
    answer = chat(client, n=3, temperature=1, seed=1)
    assert sorted(choice.index for choice in answer.choices) == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens == 18


@check("chat: `seed`")
def _(client: OpenAI) -> None:
    first, again, other = (said(chat(client, temperature=1, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


@check("chat: `temperature` and `top_p`")
def _(client: OpenAI) -> None:
    assert len({said(chat(client, temperature=1, seed=seed)) for seed in range(4)}) == 4
    assert said(chat(client, temperature=1, top_p=1e-6)) == said(chat(client))


@check("chat: `logprobs`, `top_logprobs`")
def _(client: OpenAI) -> None:
    tokens = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(tokens) == 6
    for token in tokens:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)


@check("chat: `logit_bias`")
def _(client: OpenAI) -> None:
    words = said(chat(client, logit_bias={"260": 100}))  # 260 is one word of the vocabulary
    assert words == words[: len(words) // 6] * 6


@check("chat: `presence_penalty`")
def _(client: OpenAI) -> None:
    assert chat(client, presence_penalty=1).choices


@check("chat: `frequency_penalty`")
def _(client: OpenAI) -> None:
    assert chat(client, frequency_penalty=1).choices


@check("chat: `response_format` `json_object`")
def _(client: OpenAI) -> None:
    assert said(chat(client, response_format={"type": "json_object"})).lstrip().startswith("{")


@check("chat: `response_format` `json_schema`")
def _(client: OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": SCHEMA}}
    answer = whole(lambda seed: chat(client, response_format=form, seed=seed, **CONSTRAINED))
    assert json.loads(said(answer))["city"] in ("Paris", "Rome")


@check("chat: `tools`")
def _(client: OpenAI) -> None:
    assert chat(client, tools=TOOLS).choices[0].message.role == "assistant"
    assert chat(client, tools=TOOLS).usage.prompt_tokens > chat(client).usage.prompt_tokens


@check("chat: `tool_choice` `none`")
def _(client: OpenAI) -> None:
    assert chat(client, tools=TOOLS, tool_choice="none").choices[0].message.content


@check("chat: `tool_choice` `required`")
def _(client: OpenAI) -> None:
    asked = {**CONSTRAINED, "tools": TOOLS, "tool_choice": "required"}
    one_call = {"parallel_tool_calls": False}  # last in the request, so that an engine without both names tool_choice
    answer = whole(lambda seed: chat(client, seed=seed, extra_body=one_call, **asked))
    assert answer.choices[0].finish_reason == "tool_calls"
    assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments)["city"] in ("Paris", "Rome")


@check("chat: `tool_choice` with a function's name")
def _(client: OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = whole(lambda seed: chat(client, tools=TOOLS, tool_choice=choice, seed=seed, **CONSTRAINED))
    call = answer.choices[0].message.tool_calls[0]
    assert (call.type, call.function.name) == ("function", "weather")
    assert call.id
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


@check("chat: a tool's result as a message")
def _(client: OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turns = [
        *CHAT["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    assert chat(client, messages=turns, tools=TOOLS).choices


@check("chat: role `developer`")
def _(client: OpenAI) -> None:
    turns = [{"role": "developer", "content": INSTRUCTION}, *CHAT["messages"]]
    assert chat(client, messages=turns).usage.prompt_tokens > chat(client).usage.prompt_tokens


@check("chat: content in parts of text")
def _(client: OpenAI) -> None:
    parts = [{"type": "text", "text": CHAT["messages"][0]["content"]}]
    assert said(chat(client, messages=[{"role": "user", "content": parts}])) == said(chat(client))


@check("chat: an image for a model of text")
def _(client: OpenAI) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]
    rejected(400, lambda: chat(client, messages=[{"role": "user", "content": parts}]), instead="the image is left out")


@check("chat: `user`, `metadata`, `service_tier`, `prompt_cache_key`, `safety_identifier`")
def _(client: OpenAI) -> None:
    told = {"user": "u", "metadata": {"a": "b"}, "prompt_cache_key": "k", "safety_identifier": "s"}
    assert said(chat(client, **told, service_tier="auto")) == said(chat(client))


@check("chat: `store`")
def _(client: OpenAI) -> None:
    kept = chat(client, store=True)
    try:
        client.chat.completions.retrieve(kept.id)
    except openai.NotFoundError:
        raise Differs("ignored: nothing is kept") from None


@check("chat: a parameter that does not exist")
def _(client: OpenAI) -> None:
    rejected(400, lambda: chat(client, extra_body={"no_such": 1}), instead="ignored")


# ── completions ─────────────────────────────────────────────────────────────────────────────────────────────────────


@check("completions")
def _(client: OpenAI) -> None:
    answer = complete(client)
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("text_completion", "default", "length")
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].text
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6


@check("completions: `stream`")
def _(client: OpenAI) -> None:
    told = [choice for chunk in complete(client, stream=True) for choice in chunk.choices]
    assert "".join(choice.text for choice in told) == complete(client).choices[0].text
    assert [choice.finish_reason for choice in told if choice.finish_reason] == ["length"]


@check("completions: several prompts")
def _(client: OpenAI) -> None:
    answer = complete(client, prompt=["One", "Two"])
    alone = [complete(client, prompt=prompt).choices[0].text for prompt in ("One", "Two")]
    assert [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)] == alone


@check("completions: a prompt of tokens")
def _(client: OpenAI) -> None:
    assert complete(client, prompt=[504, 3575, 282, 4649]).usage.prompt_tokens == 4


@check("completions: `stop`")
def _(client: OpenAI) -> None:
    whole = complete(client, max_tokens=12).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    assert complete(client, max_tokens=12, stop=stop).choices[0].text == whole[: whole.index(stop)]


@check("completions: `n`, `best_of`")
def _(client: OpenAI) -> None:
    assert len(complete(client, n=2, best_of=3, temperature=1).choices) == 2


@check("completions: `n`")
def _(client: OpenAI) -> None:
    assert len(complete(client, n=2, temperature=1).choices) == 2


@check("completions: `seed`")
def _(client: OpenAI) -> None:
    first, again, other = (complete(client, temperature=1, seed=seed).choices[0].text for seed in (1, 1, 2))
    assert first == again != other


@check("completions: `logprobs`")
def _(client: OpenAI) -> None:
    told = complete(client, logprobs=2).choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 6


@check("completions: `echo`")
def _(client: OpenAI) -> None:
    text = complete(client, echo=True).choices[0].text
    assert text == COMPLETION["prompt"] + complete(client).choices[0].text


@check("completions: `echo` with `logprobs`")
def _(client: OpenAI) -> None:
    answer = complete(client, echo=True, logprobs=1, max_tokens=1)
    logprobs = answer.choices[0].logprobs.token_logprobs
    assert len(logprobs) == answer.usage.total_tokens
    assert logprobs[0] is None
    assert all(value <= 0 for value in logprobs[1:])


@check("completions: `suffix`")
def _(client: OpenAI) -> None:
    assert complete(client, suffix=" and so on.").choices


@check("completions: `logit_bias`")
def _(client: OpenAI) -> None:
    words = complete(client, logit_bias={"260": 100}).choices[0].text
    assert words == words[: len(words) // 6] * 6


@check("completions: `presence_penalty`")
def _(client: OpenAI) -> None:
    assert complete(client, presence_penalty=1).choices


# ── responses ───────────────────────────────────────────────────────────────────────────────────────────────────────


@check("responses")
def _(client: OpenAI) -> None:
    answer = respond(client)
    assert (answer.object, answer.model) == ("response", "default")
    assert answer.id.startswith("resp_")
    assert answer.output_text
    assert answer.usage.output_tokens == 6
    expect(answer.status == "incomplete", "`status` is `completed` at `max_output_tokens`")
    assert answer.incomplete_details.reason == "max_output_tokens"


@check("responses: `stream`")
def _(client: OpenAI) -> None:
    events = list(respond(client, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == respond(client).output_text
    expect(kinds[-1] == "response.incomplete", "ends with `response.completed` at `max_output_tokens`")


@check("responses: `instructions`")
def _(client: OpenAI) -> None:
    assert respond(client, instructions=INSTRUCTION).usage.input_tokens > respond(client).usage.input_tokens


@check("responses: `temperature`")
def _(client: OpenAI) -> None:
    assert len({respond(client, temperature=1).output_text for _ in range(4)}) == 4


@check("responses: input as messages")
def _(client: OpenAI) -> None:
    turns = [{"role": "user", "content": [{"type": "input_text", "text": RESPONSE["input"]}]}]
    assert respond(client, input=turns).output_text == respond(client).output_text


@check("responses: `text.format` `json_schema`")
def _(client: OpenAI) -> None:
    form = {"format": {"type": "json_schema", "name": "place", "strict": True, "schema": SCHEMA}}
    texts = (respond(client, text=form, temperature=1, max_output_tokens=150).output_text for _ in range(8))
    text = next(text for text in texts if text.endswith("}"))
    assert json.loads(text)["city"] in ("Paris", "Rome")


@check("responses: `tools`")
def _(client: OpenAI) -> None:
    assert respond(client, tools=[{"type": "function", **TOOL}]).usage.input_tokens > 20


@check("responses: `top_logprobs`")
def _(client: OpenAI) -> None:
    answer = respond(client, top_logprobs=2, include=["message.output_text.logprobs"])
    assert len(answer.output[0].content[0].logprobs) == 6


@check("responses: `previous_response_id`")
def _(client: OpenAI) -> None:
    first = respond(client)
    assert respond(client, previous_response_id=first.id).usage.input_tokens > first.usage.input_tokens


@check("responses: retrieve")
def _(client: OpenAI) -> None:
    first = respond(client)
    assert client.responses.retrieve(first.id).output_text == first.output_text


@check("responses: input longer than the context")
def _(client: OpenAI) -> None:
    rejected(400, lambda: respond(client, input="one two " * 300))


# ── models, and what a model of text has not ────────────────────────────────────────────────────────────────────────


@check("models: list")
def _(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["default", "smol_example"]


@check("models: retrieve")
def _(client: OpenAI) -> None:
    model = client.models.retrieve("smol_example")
    assert (model.id, model.object) == ("smol_example", "model")
    assert rejected(404, lambda: client.models.retrieve("nope")).param == "model"


@check("embeddings")
def _(client: OpenAI) -> None:
    assert client.embeddings.create(model="default", input="text").data


@check("audio: transcriptions")
def _(client: OpenAI) -> None:
    assert client.audio.transcriptions.create(model="default", file=("a.wav", b"RIFF")).text


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def post(client: OpenAI, content: bytes, path: str = "/chat/completions") -> object:
    headers = {"Content-Type": "application/json"}
    return client.post(path, cast_to=object, content=content, options={"headers": headers})


@check("401: a wrong token")
def _(client: OpenAI) -> None:
    assert rejected(401, lambda: chat(client.with_options(api_key="wrong"))).code == "invalid_api_key"


@check("404: an unknown model")
def _(client: OpenAI) -> None:
    error = rejected(404, lambda: chat(client, model="nope"))
    expect(error.code == "model_not_found", "`code` is the number 404")


@check("404: an unknown path")
def _(client: OpenAI) -> None:
    rejected(404, lambda: post(client, b"{}", "/no/such"))


@check("413: a body over 32 MiB")
def _(client: OpenAI) -> None:
    rejected(413, lambda: post(client, b" " * (BODY_LIMIT_BYTES + 1)))


@check("400: a prompt longer than the context")
def _(client: OpenAI) -> None:
    rejected(400, lambda: chat(client, messages=[{"role": "user", "content": "one two " * 300}]))
    rejected(400, lambda: complete(client, prompt="one two " * 300))


@check("400: JSON that cannot be read")
def _(client: OpenAI) -> None:
    rejected(400, lambda: post(client, b'{"model": "default", "messages": ['))


@check("400: a body that is no object")
def _(client: OpenAI) -> None:
    rejected(400, lambda: post(client, b"[1]"))


@check("400: `messages` is missing, empty, or of another type")
def _(client: OpenAI) -> None:
    for wrong in ({}, {"messages": None}, {"messages": 7}, {"messages": ["text"]}, {"messages": [{"content": "text"}]}):
        rejected(400, lambda wrong=wrong: post(client, json.dumps({"model": "default", **wrong}).encode()))  # type: ignore[misc]


@check("400: `messages` is an empty list")
def _(client: OpenAI) -> None:
    rejected(400, lambda: chat(client, messages=[]))


INVALID: dict[str, tuple[Any, ...]] = {
    "temperature": ("hot", -1),
    "top_p": ("much", 2),
    "max_tokens": ("many", -1, 1.5),
    "seed": ("s", 1.5),
    "stream": ("perhaps",),
    "frequency_penalty": ("x", 9),
    "tools": (7, ["x"]),
    "logit_bias": ([], {"x": 1}),
    "n": ("x", -1),
    "logprobs": ("x",),
    "stop": (7,),
    "response_format": ("json",),
}


def _invalid(name: str) -> Check:
    def ask(client: OpenAI) -> None:
        for value in INVALID[name]:
            error = rejected(
                400, lambda value=value: chat(client, **{name: value}), instead=f"`{json.dumps(value)}` accepted"
            )  # type: ignore[misc]
            assert name in str(error.param or error.message), (value, error.body)

    return ask


for _name in INVALID:
    CHECKS[f"400: an invalid `{_name}`"] = _invalid(_name)


@check("400: `temperature` over 2")
def _(client: OpenAI) -> None:
    rejected(400, lambda: chat(client, temperature=3))


@check("400: `max_tokens` is 0")
def _(client: OpenAI) -> None:
    rejected(400, lambda: chat(client, max_tokens=0))


@check("400: `model` of another type")
def _(client: OpenAI) -> None:
    rejected(400, lambda: chat(client, model=7))


def outcome(do: Check, client: OpenAI) -> str:
    """Returns what the table says of a check: nothing if the service does as OpenAI's, else what it does."""
    try:
        do(client)
    except Differs as difference:
        return str(difference)
    except openai.APIStatusError as error:
        return f"{error.status_code}, names `{error.param}`" if error.param else str(error.status_code)
    return ""


# ── the engines, and what the docs say of them ──────────────────────────────────────────────────────────────────────


def rows(heading: str) -> dict[str, tuple[str, str]]:
    """Returns the first table below a heading of the docs: two cells by the first one."""
    section = DOCS.read_text(encoding="utf-8").split(f"\n{heading}\n", 1)[1]
    lines = section[section.index("\n| ") :].lstrip().split("\n\n", 1)[0].splitlines()[2:]
    table = {}
    for line in lines:
        name, one, other = (cell.strip() for cell in line.strip().strip("|").split("|"))
        assert name not in table, f"two rows for {name}"
        table[name] = (one, other)
    return table


OPENAI_HEADING = "### Differences from OpenAI's API"
VLLM_HEADING = "### Differences from vLLM alone"


def test_each_row_of_the_docs_is_about_a_check() -> None:
    assert set(rows(OPENAI_HEADING)) - set(CHECKS) == set()
    assert all(any(cells) for cells in rows(OPENAI_HEADING).values()), "a row without a difference"
    assert set(rows(VLLM_HEADING)) - set(REQUESTS) == set()


@pytest.fixture(scope="module")
def model(base_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full weights: vLLM on a CPU cannot give the log-probs of a prompt to an adapter."""
    folder = tiny_model(tmp_path_factory.mktemp("conformance") / "model", Path(base_model), head_dim=32)
    template = folder / "chat_template.jinja"
    template.write_text(TEMPLATE + template.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def serving(model: Path, engine: str, work: Path) -> AbstractContextManager[Server]:
    info = next(one for one in describe_engines() if one.name == engine)
    if info.distribution is None:
        pytest.skip(f"{engine} is not installed: {info.remedy}")
    return running(work, model_dir=str(model), engine=engine, max_model_len=256)


@pytest.fixture(scope="module")
def vllm(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(model, "vllm", tmp_path_factory.mktemp("vllm")) as server:
        yield server


@pytest.fixture(scope="module")
def transformers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(model, "transformers", tmp_path_factory.mktemp("transformers")) as server:
        yield server


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_does_as_openai_or_as_the_docs_say(request: pytest.FixtureRequest, engine: str, name: str) -> None:
    server = request.getfixturevalue(engine)
    told = rows(OPENAI_HEADING).get(name, ("", ""))[ENGINES.index(engine)]
    assert outcome(CHECKS[name], server.client()) == told


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("engine", ENGINES)
def test_the_openapi_page_needs_the_token_and_names_the_paths(request: pytest.FixtureRequest, engine: str) -> None:
    server = request.getfixturevalue(engine)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    for path in ("/docs", "/openapi.json"):
        assert httpx.get(f"{server.url}{path}").status_code == 401
        assert httpx.get(f"{server.url}{path}", headers=headers).status_code == 200
    paths = httpx.get(f"{server.url}/openapi.json", headers=headers).json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health"} <= set(paths)
    # Palate's own answers are in no engine's schema; docs/deployment.md says so.
    assert not {"/v1/models/{model}", "/palate/activity"} & set(paths)


# ── vLLM with and without Palate before it ──────────────────────────────────────────────────────────────────────────


class Asked(NamedTuple):
    """A request, as bytes."""

    method: str
    path: str
    content: bytes = b""
    token: bool = True


def asks(path: str, plain: dict[str, Any], **fields: Any) -> Asked:
    return Asked("POST", path, json.dumps({**plain, **fields}).encode())


_CHAT, _TEXT, _RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
_LONG = "one two " * 300
REQUESTS: dict[str, Asked] = {
    "chat": asks(_CHAT, CHAT),
    "chat without a model": asks(_CHAT, {k: v for k, v in CHAT.items() if k != "model"}),
    "chat, sampled": asks(_CHAT, CHAT, temperature=1, seed=5, n=2, top_p=0.9),
    "chat, streamed": asks(_CHAT, CHAT, stream=True, stream_options={"include_usage": True}),
    "chat with log-probs": asks(_CHAT, CHAT, logprobs=True, top_logprobs=3),
    "chat with a schema": asks(
        _CHAT, CHAT, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    ),
    "chat with tools": asks(_CHAT, CHAT, tools=TOOLS, tool_choice="required", max_tokens=50),
    "chat with vLLM's own parameters": asks(_CHAT, CHAT, top_k=3, min_tokens=2, repetition_penalty=1.1, seed=1),
    "chat with an unknown parameter": asks(_CHAT, CHAT, no_such={"a": [1, 2.5, None, "é"]}),
    "chat, too long": asks(_CHAT, CHAT, messages=[{"role": "user", "content": _LONG}]),
    "chat, `messages` of another type": asks(_CHAT, CHAT, messages=7),
    "chat, `temperature` of another type": asks(_CHAT, CHAT, temperature="hot"),
    "chat, `n` out of range": asks(_CHAT, CHAT, n=-1),
    "chat, unknown role": asks(_CHAT, CHAT, messages=[{"role": "nobody", "content": "x"}]),
    "chat, broken JSON": Asked("POST", _CHAT, b'{"model": "default", "messages": ['),
    "chat, no JSON": Asked("POST", _CHAT, b"hello"),
    "chat, a list": Asked("POST", _CHAT, b"[1]"),
    "chat, nothing": Asked("POST", _CHAT, b""),
    "chat, text that is not UTF-8": Asked("POST", _CHAT, b'{"model": "default", "messages": "\xff"}'),
    "completions": asks(_TEXT, COMPLETION),
    "completions, streamed": asks(_TEXT, COMPLETION, stream=True),
    "completions with log-probs of the prompt": asks(_TEXT, COMPLETION, echo=True, logprobs=2),
    "completions, prompts of tokens": asks(_TEXT, COMPLETION, prompt=[[1, 2, 3], [4, 5]]),
    "completions, too long": asks(_TEXT, COMPLETION, prompt=_LONG),
    "responses": asks(_RESPONSES, RESPONSE),
    "responses, streamed": asks(_RESPONSES, RESPONSE, stream=True),
    "responses, `input` of another type": asks(_RESPONSES, RESPONSE, input=7),
    "tokenize": asks("/tokenize", {"model": "default", "prompt": "The capital"}),
    "embeddings": asks("/v1/embeddings", {"model": "default", "input": "text"}),
    "`GET /version`": Asked("GET", "/version"),
    "`GET /health`": Asked("GET", "/health"),
    "`GET /openapi.json`": Asked("GET", "/openapi.json"),
    # Different on purpose: these have rows in the docs.
    "no token": asks(_CHAT, CHAT)._replace(token=False),
    "`GET /v1/models`": Asked("GET", "/v1/models"),
    "`GET /v1/models/default`": Asked("GET", "/v1/models/default"),
    "`DELETE /v1/models`": Asked("DELETE", "/v1/models"),
    "an unknown model": asks(_CHAT, CHAT, model="nope"),
    "`model` of another type": asks(_CHAT, CHAT, model=7),
    "an unknown path": Asked("POST", "/v1/no/such", b"{}"),
    "a method that is not allowed": Asked("GET", _CHAT),
    "a body over 32 MiB": Asked("POST", _CHAT, b" " * (BODY_LIMIT_BYTES + 1)),
}

_OF_ITS_TIME = re.compile(rb'"(id|item_id|call_id|created|created_at|completed_at)": ?("[^"]*"|[0-9.]+)')
_OF_ITS_CONNECTION = {"date", "server", "connection", "keep-alive", "x-request-id"}


class Answer(NamedTuple):
    """An answer without what differs between any two answers: ids, times and the connection's headers.

    vLLM alone sends no `x-request-id`; the documentation says that a service does.
    """

    status: int
    headers: dict[str, str]
    body: bytes


def answer_of(client: httpx.Client, asked: Asked) -> Answer:
    headers = {"Authorization": f"Bearer {TOKEN}"} if asked.token else {}
    if asked.method == "POST":
        headers["Content-Type"] = "application/json"
    reply = client.request(asked.method, asked.path, content=asked.content, headers=headers)
    body = _OF_ITS_TIME.sub(rb'"\1": *', reply.content)
    kept = {name: value for name, value in reply.headers.items() if name not in _OF_ITS_CONNECTION}
    return Answer(reply.status_code, kept, body)


@pytest.fixture(scope="module")
def bare(vllm: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """vLLM's own server with the same options, on a socket of its own: no gateway."""
    running_engine = next(
        process for process in vllm.family() if "vllm.entrypoints.openai.api_server" in process.cmdline()[:5]
    )
    command = running_engine.cmdline()
    place = command.index("--uds")
    del command[place : place + 2]
    log = tmp_path_factory.mktemp("bare") / "log"
    with (
        TemporaryDirectory(prefix="palate-") as short,
        httpx.Client(transport=httpx.HTTPTransport(uds=f"{short}/s"), base_url="http://vllm", timeout=120) as client,
        log.open("wb") as output,
    ):
        # The engine's environment, but for what leads to Palate's socket and token.
        inherited = {k: v for k, v in running_engine.environ().items() if not k.startswith("PALATE_")}
        environment = {**inherited, "TMPDIR": short, "VLLM_RPC_BASE_PATH": short}
        process = subprocess.Popen([*command, f"--uds={short}/s"], stdout=output, stderr=output, env=environment)
        try:
            until = time.monotonic() + 300
            while not answers(client):
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < until, log.read_text()[-4000:]
                time.sleep(0.1)
            yield client
        finally:
            process.terminate()
            process.wait(timeout=60)


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def palate(vllm: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=vllm.url, timeout=120) as client:
        yield client


def same(bare: httpx.Client, palate: httpx.Client, plain: Asked, ours: Asked) -> tuple[Answer, Answer]:
    """Returns the two answers; asked again where only the cut into chunks differs: vLLM joins tokens while it is busy."""
    for _ in range(5):
        pair = answer_of(bare, plain), answer_of(palate, ours)
        if pair[0] == pair[1] or b'"stream": true' not in plain.content:
            break
    return pair


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", REQUESTS)
def test_vllm_answers_the_same_bytes_behind_palate_but_for_what_the_docs_say(
    bare: httpx.Client, palate: httpx.Client, name: str
) -> None:
    alone, behind = same(bare, palate, REQUESTS[name], REQUESTS[name])
    told = rows(VLLM_HEADING).get(name)
    if told is None:
        assert alone == behind
        return
    assert alone != behind, f"the docs have a row for {name!r}, but the answers are the same"
    assert [cell[:3] for cell in told] == [str(alone.status), str(behind.status)]
    if behind.status >= 400:
        assert set(json.loads(behind.body)["error"]) == {"message", "type", "param", "code"}


def names_the_model(asked: Asked) -> bool:
    """Whether Palate reads the request's JSON and finds the name in it."""
    try:
        request = json.loads(asked.content)
    except ValueError:
        return False
    known = asked.token and asked.path in {_CHAT, _TEXT, _RESPONSES, "/tokenize"}
    return known and isinstance(request, dict) and request.get("model") == "default"


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name, asked in REQUESTS.items() if names_the_model(asked)])
def test_an_alias_changes_no_byte_of_the_answer(bare: httpx.Client, palate: httpx.Client, name: str) -> None:
    plain = REQUESTS[name]
    named = plain._replace(content=plain.content.replace(b'"model": "default"', b'"model": "smol_example"'))
    assert named != plain
    alone, behind = same(bare, palate, plain, named)
    assert alone == behind
