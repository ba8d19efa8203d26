"""The program with its real engines: what a client sees, and that nothing stays when it ends, however it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from palate_recipes import __version__
from palate_recipes.specs.serve import IDLE_FILE, READY_FILE, STOP_GRACE_S, EngineInfo, describe_engines

from .conftest import TOKEN, Server, running, start

pytestmark = pytest.mark.slow

INSTALLED: dict[str, EngineInfo] = {engine.name: engine for engine in describe_engines()}
MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]


def require(engine: str) -> None:
    info = INSTALLED[engine]
    if info.distribution is None:
        pytest.skip(f"{engine} is not installed: {info.remedy}")


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def server(
    request: pytest.FixtureRequest, base_model: str, adapter: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One running server per engine; the tests of each engine share it, and the last one ends it."""
    require(request.param)
    work = tmp_path_factory.mktemp(request.param)
    fields = {"model_dir": adapter, "base_model_dir": base_model, "engine": request.param, "max_model_len": 256}
    with running(work, **fields) as started:
        yield started


def say(server: Server, model: str) -> openai.types.chat.ChatCompletion:
    return server.client().chat.completions.create(model=model, messages=MESSAGES, max_tokens=8, temperature=0)


def test_tuned_and_base_answer_and_differ(server: Server) -> None:
    tuned, named, base = (say(server, model) for model in ("default", "smol_example", "base"))
    assert tuned.choices[0].message.content != base.choices[0].message.content
    assert named.choices[0].message.content == tuned.choices[0].message.content
    assert (tuned.model, named.model, base.model) == ("default", "default", "base")
    assert tuned.usage is not None
    assert base.usage is not None
    assert tuned.usage.prompt_tokens == base.usage.prompt_tokens
    assert "France" in (base.choices[0].message.content or "")


def test_vllm_on_a_cpu_computes_lora_with_palates_plugin(server: Server) -> None:
    if "vllm" not in server.ready.engine or not INSTALLED["vllm"].cpu_build:  # type: ignore[union-attr]
        pytest.skip("only vLLM's CPU build needs it")
    assert "LoRA is computed with one matrix product per adapter" in server.log.read_text()


def test_tuned_and_base_differ_in_one_batch_too(server: Server) -> None:
    names = ["base", "default"] * 4
    with ThreadPoolExecutor(len(names)) as pool:
        answers = [
            answer.choices[0].message.content or "" for answer in pool.map(lambda name: say(server, name), names)
        ]
    assert all("France" in answer for answer in answers[::2])
    assert not any("France" in answer for answer in answers[1::2])


def test_the_first_model_listed_is_the_tuned_one(server: Server) -> None:
    names = [model.id for model in server.client().models.list().data]
    assert names == ["default", "smol_example", "base"]
    assert server.ready is not None
    assert server.ready.models == names
    assert server.client().models.retrieve("smol_example").id == "smol_example"


def test_a_wrong_token_is_refused_and_health_is_open(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError, match="no valid token"):
        server.client(token="wrong").models.list()
    for path in ("/v1/models", "/metrics", "/ping", "/docs", "/openapi.json", "/version"):
        assert httpx.get(f"{server.url}{path}").status_code == 401, path
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_an_unknown_model_is_not_found(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="This service has: default, smol_example, base"):
        say(server, "nope")


def test_a_stream_carries_the_same_answer(server: Server) -> None:
    whole = say(server, "smol_example").choices[0]
    stream = server.client().chat.completions.create(
        model="smol_example", messages=MESSAGES, stream=True, max_completion_tokens=8, temperature=0
    )
    chunks = [chunk for chunk in stream if chunk.choices]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    assert len(chunks) > 3


def test_a_raw_stream_ends_with_done(server: Server) -> None:
    body = {"messages": MESSAGES, "stream": True, "max_tokens": 2}  # no model named: the tuned one answers
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert '"model":"default"' in lines[0]
    assert lines[-1] == "data: [DONE]"


def test_prompt_and_answer_stay_within_the_context(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="256"):
        server.client().completions.create(model="base", prompt="one two " * 300, max_tokens=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        pytest.param("logprobs", True, marks=pytest.mark.thorough),  # vLLM compiles for it, a quarter of a minute
        ("response_format", {"type": "json_object"}),
        ("stop", ["."]),
        ("presence_penalty", 1),
    ],
)
def test_a_parameter_of_openai_is_done_or_rejected_by_name(server: Server, name: str, value: Any) -> None:
    ask: Any = server.client().chat.completions.create
    whole = {"model": "base", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    assert ask(**whole, user="u", stream_options=None, **{name: None}).choices[0].message.content
    if "transformers" in server.ready.engine:  # type: ignore[union-attr]
        with pytest.raises(openai.BadRequestError, match=f"{name}=.* is not supported") as caught:
            ask(**whole, **{name: value})
        assert caught.value.param == name
        return
    answer = ask(**{**whole, "temperature": 0.7}, **{name: value})
    assert len(answer.choices) == (2 if name == "n" else 1)
    assert (answer.choices[0].logprobs is not None) == (name == "logprobs")
    if name == "response_format":
        assert (answer.choices[0].message.content or "").lstrip().startswith("{")
    if name == "stop":
        assert "." not in (answer.choices[0].message.content or "")


def test_a_stream_can_have_its_usage(server: Server) -> None:
    stream = server.client().chat.completions.create(
        model="base", messages=MESSAGES, stream=True, max_tokens=2, stream_options={"include_usage": True}
    )
    assert any(chunk.usage and chunk.usage.completion_tokens == 2 for chunk in stream)


def test_the_token_alone_is_accepted_as_pai_eas_does(server: Server) -> None:
    assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": TOKEN}).status_code == 200
    assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Basic {TOKEN}"}).status_code == 401


def test_every_error_has_the_form_that_clients_read(server: Server) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    asked = [
        ("DELETE", "/v1/models", None, 405),
        ("PUT", "/v1/models/default", None, 405),
        ("GET", "/v1/chat/completions", None, 405),
        ("POST", "/v1/absent", {}, 404),
        ("GET", "/absent", None, 404),
        ("POST", "/v1/chat/completions", {"messages": 7}, None),
        ("POST", "/v1/chat/completions", [1], None),
    ]
    for method, path, body, status in asked:
        answer = httpx.request(method, f"{server.url}{path}", headers=headers, json=body, timeout=60)
        assert answer.status_code == status or (status is None and answer.status_code >= 400), (method, path)
        error = answer.json()["error"]
        assert set(error) >= {"message", "type", "param", "code"}, (method, path, error)
        assert error["message"], (method, path)


def test_tools_without_a_parser_are_rejected_with_what_to_do(server: Server) -> None:
    if "vllm" not in server.ready.engine:  # type: ignore[union-attr]
        pytest.skip("transformers reads tool calls by the model's own response template")
    with pytest.raises(openai.BadRequestError, match="--engine-arg tool-call-parser=NAME") as caught:
        server.client().chat.completions.create(model="base", messages=MESSAGES, tools=TOOLS)
    assert caught.value.param == "tools"


REQUEST_ID = "order-17"


def test_metrics_count_what_was_asked_beside_the_engines_own(server: Server) -> None:
    def page() -> dict[str, float]:
        answer = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
        families = list(text_string_to_metric_families(answer.text))
        assert len({family.name for family in families}) == len(families)
        return {f"{s.name}{sorted(s.labels.values())}": s.value for family in families for s in family.samples}

    before = page()
    whole = server.client().chat.completions.with_raw_response.create(
        model="base", messages=MESSAGES, max_tokens=3, extra_headers={"x-request-id": REQUEST_ID}
    )
    assert whole.headers["x-request-id"] == REQUEST_ID
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    assert list(server.client().chat.completions.create(model="base", messages=MESSAGES, max_tokens=2, **usage))
    after = page()

    def added(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert added("palate_requests_total['/v1/chat/completions', '200', 'base']") == 2
    assert added("palate_completion_tokens_total['base']") == 5
    assert added("palate_time_to_first_byte_seconds_count['/v1/chat/completions']") == 2
    assert after["palate_open_requests[]"] == 0
    assert server.ready is not None
    engine, version = server.ready.engine.split()
    assert f"palate_service_info{sorted([engine, version, __version__, 'smol_example'])}" in after
    assert any(name.startswith("vllm:generation_tokens_total") for name in after) == ("vllm" in engine)


def test_the_token_is_in_no_argv_and_no_file(server: Server) -> None:
    assert not any(TOKEN in " ".join(process.cmdline()) for process in server.family())
    texts = [f for f in Path(server.spec.work_dir).iterdir() if f.is_file()]
    assert not any(TOKEN in f.read_text() for f in texts)


def test_the_end_leaves_nothing(server: Server) -> None:
    """The last test of each engine: ends the shared server, vLLM by SIGTERM, the other by SIGKILL."""
    family = server.family()
    assert len(family) >= 3
    assert server.ready is not None
    if "vllm" not in server.ready.engine:
        kill_9(server, family)
        return
    sockets = Path(family[1].environ()["VLLM_RPC_BASE_PATH"])
    assert sockets.is_dir()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=STOP_GRACE_S + 5) == 0
    assert_nothing_left(server, family)
    assert not sockets.exists()
    log = server.log.read_text()
    [line] = [json.loads(line) for line in log.splitlines() if line.startswith("{") and f'"{REQUEST_ID}"' in line]
    assert (line["path"], line["model"], line["status"]) == ("/v1/chat/completions", "base", 200)
    assert (line["completion_tokens"], line["client_disconnected"]) == (3, False)
    assert line["prompt_tokens"] > 0
    assert "capital of France" not in log
    assert TOKEN not in log
    assert '"GET /' not in log  # uvicorn's access log is off


def kill_9(server: Server, family: list[psutil.Process]) -> None:
    server.process.kill()
    assert psutil.wait_procs(family, timeout=STOP_GRACE_S + 5)[1] == []
    assert port_is_free(server.url)


@pytest.mark.thorough
def test_kill_9_leaves_nothing_of_vllm(base_model: str, tmp_path: Path) -> None:
    require("vllm")
    with running(tmp_path, model_dir=base_model, engine="vllm", max_model_len=256) as server:
        kill_9(server, server.family())


TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}}
]
TOOLS_TEMPLATE = "{% if tools %}<tool_call>{{ tools | tojson }}</tool_call>{% endif %}"
"""Begins a chat template in the format of Hermes and Qwen, as far as a parser is chosen by it."""


# A further start of vLLM. By default test_parity serves full weights, test_parsers chooses parsers, and test_causes names an
# engine that was killed.
of_full_weights = pytest.mark.thorough


@pytest.fixture(scope="module")
def whole(base_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Full weights on the engine that is chosen: a model that is in no catalog, whose template has tools."""
    if not any(engine.distribution for engine in INSTALLED.values()):
        pytest.skip("no engine is installed")
    folder = tmp_path_factory.mktemp("whole")
    (folder / "model").mkdir()
    for file in Path(base_model).iterdir():
        if file.name != "chat_template.jinja":
            (folder / "model" / file.name).symlink_to(file)
    template = (Path(base_model) / "chat_template.jinja").read_text()
    (folder / "model" / "chat_template.jinja").write_text(TOOLS_TEMPLATE + template)
    fields = {"model_dir": str(folder / "model"), "engine": "auto", "max_model_len": 512, "restarts": 0}
    with running(folder / "work", **fields) as started:
        yield started


@of_full_weights
def test_full_weights_answer_as_default(whole: Server) -> None:
    assert whole.ready is not None
    assert whole.ready.models == ["default", "smol_example"]
    assert "France" in (say(whole, "smol_example").choices[0].message.content or "")
    with pytest.raises(openai.NotFoundError):
        say(whole, "base")


@pytest.fixture
def caller(whole: Server) -> Server:
    """The same, where that is vLLM."""
    require("vllm")
    return whole


@of_full_weights
def test_tools_work_where_the_template_has_them(caller: Server) -> None:
    ask: Any = caller.client().chat.completions.create
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}):
        answer = ask(model="default", messages=MESSAGES, tools=TOOLS, max_tokens=4, **choice)
        assert answer.choices[0].finish_reason == "length"


@of_full_weights
def test_an_engine_killed_for_memory_is_reported_with_the_cause_first(caller: Server) -> None:
    """The last test with this server: kills its engine core, as the kernel does when memory is short."""
    family = caller.family()
    core = next(process for process in family if "EngineCore" in process.name() or "EngineCore" in process.cmdline()[0])
    core.kill()
    assert caller.process.wait(timeout=60) == 1
    print(caller.error())
    first, *rest = caller.error().splitlines()
    assert (
        "ended unexpectedly: its engine process vanished without an error, as one killed by signal 9 (SIGKILL)" in first
    )
    assert "GiB were free after the start" in first
    assert len(rest) <= 10
    assert rest[-1] == "The whole log: palate logs smol_example"
    assert_nothing_left(caller, family)


def test_an_engine_that_cannot_start_tells_its_own_cause(base_model: str, tmp_path: Path) -> None:
    require("vllm")
    server = start(tmp_path, model_dir=base_model, engine="vllm", engine_args=("--stream-interval=0",))
    assert server.process.wait(timeout=60) == 1
    assert "ended unexpectedly" in server.error()
    assert "(exit code 1)" in server.error().splitlines()[0]
    assert (
        "SchedulerConfig: stream_interval: Input should be greater than or equal to 1" in server.error().splitlines()[0]
    )
    assert "  | " in server.error()


@pytest.mark.thorough
def test_an_engine_that_cannot_compute_the_model_tells_the_cause_below_its_wrappers(
    tiny_llama: str, tmp_path: Path
) -> None:
    require("vllm")
    server = start(tmp_path, model_dir=tiny_llama, engine="vllm", max_model_len=256)
    if server.ready is not None:  # this processor has a kernel for the model's small heads
        server.process.terminate()
        server.process.wait(timeout=30)
        pytest.skip("the engine computes heads of 16 here")
    assert server.process.wait(timeout=60) == 1
    first, *rest = server.error().splitlines()
    assert "answered its first request with 500: Unsupported CPU attention configuration: head_dim=16" in first
    assert len(rest) <= 10


def test_weights_that_cannot_be_read_fail_with_the_engines_lines(tiny_model: Path, tmp_path: Path) -> None:
    require("transformers")
    server = start(tmp_path / "work", model_dir=str(tiny_model), engine="transformers")
    assert server.process.wait(timeout=60) == 1
    assert "answered its first request with 500" in server.error()
    assert "Last lines of the engine:" in server.error()
    assert processes_about(tmp_path) == []


def test_a_start_that_takes_too_long_leaves_nothing(base_model: str, tmp_path: Path) -> None:
    server = start(tmp_path, model_dir=base_model, start_timeout_s=1)
    assert server.process.wait(timeout=60) == 1
    assert "did not answer within start_timeout_s=1" in server.error()
    assert not (tmp_path / READY_FILE).exists()
    assert processes_about(tmp_path) == []


def test_an_engine_that_dies_later_ends_the_program(base_model: str, tmp_path: Path) -> None:
    require("transformers")
    with running(tmp_path, model_dir=base_model, engine="transformers", restarts=0) as server:
        family = server.family()
        engine = next(p for p in family if "palate_server.transformers" in p.cmdline()[2:4])
        os.kill(engine.pid, signal.SIGKILL)
        assert server.process.wait(timeout=20) == 1
        assert "ended unexpectedly: it was killed by signal 9 (SIGKILL)" in server.error().splitlines()[0]
        assert_nothing_left(server, family)


def test_an_engine_that_is_frozen_is_noticed_and_ended(tiny_llama: str, tmp_path: Path) -> None:
    require("transformers")
    with running(tmp_path, model_dir=tiny_llama, engine="transformers", hang_after_s=3, restarts=0) as server:
        family = server.family()
        engine = next(p for p in family if "palate_server.transformers" in p.cmdline()[2:4])
        engine.suspend()
        assert server.process.wait(timeout=60) == 1
        assert "hangs: it has not answered for 3 s" in server.error()
        assert_nothing_left(server, family)


def test_a_service_that_nobody_asks_ends_and_says_so(tiny_llama: str, tmp_path: Path) -> None:
    require("transformers")
    with running(tmp_path, model_dir=tiny_llama, engine="transformers", idle_after_s=2) as server:
        family = server.family()
        assert server.process.wait(timeout=60) == 0
        assert "no request for 2 s" in (tmp_path / IDLE_FILE).read_text()
        assert_nothing_left(server, family)


def assert_nothing_left(server: Server, family: list[psutil.Process]) -> None:
    assert psutil.wait_procs(family, timeout=1)[1] == []
    assert port_is_free(server.url)
    assert not (Path(server.spec.work_dir) / READY_FILE).exists()


def port_is_free(url: str) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", int(url.rpartition(":")[2])))
    return True


def processes_about(path: Path) -> list[list[str]]:
    """Returns the command lines of living processes that name something below the path."""
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [command for command in commands if any(str(path) in argument for argument in command)]
