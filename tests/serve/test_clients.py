"""Programs that speak to OpenAI's API, as their users install and call them, against one running service."""

from __future__ import annotations

import os
import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from palate_recipes.specs.serve import describe_engines

from .conftest import TOKEN, running

pytestmark = [pytest.mark.slow, pytest.mark.thorough]

CLIENTS = ("openai", "litellm", "langchain-openai", "instructor", "llm")

OPENAI = """
import os, openai
client = openai.OpenAI(base_url=os.environ["URL"], api_key=os.environ["TOKEN"], max_retries=0)
ask = dict(model="default", messages=[{"role": "user", "content": "What is the capital of France?"}], max_tokens=8, temperature=0)
print(client.chat.completions.create(**ask).choices[0].message.content)
print("".join(chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ask, stream=True) if chunk.choices))
"""
LITELLM = """
import os, litellm
litellm.telemetry = False
ask = dict(
    model="openai/default", api_base=os.environ["URL"], api_key=os.environ["TOKEN"], num_retries=0, max_tokens=8, temperature=0,
    messages=[{"role": "user", "content": "What is the capital of France?"}],
)
print(litellm.completion(**ask).choices[0].message.content)
stream = litellm.completion(**ask, stream=True, stream_options={"include_usage": True})
print("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))
"""
LANGCHAIN = """
import os
from langchain_openai import ChatOpenAI
model = ChatOpenAI(model="default", base_url=os.environ["URL"], api_key=os.environ["TOKEN"], max_tokens=8, temperature=0, max_retries=0)
print(model.invoke("What is the capital of France?").content)
print("".join(chunk.content for chunk in model.stream("What is the capital of France?")))
"""
INSTRUCTOR = """
import os, instructor, openai
from typing import Literal
from pydantic import BaseModel

class Answer(BaseModel):
    city: Literal["Paris", "Rome"]

raw = openai.OpenAI(base_url=os.environ["URL"], api_key=os.environ["TOKEN"], max_retries=0)
client = instructor.from_openai(raw, mode=instructor.Mode.JSON_SCHEMA)
answer = client.chat.completions.create(
    model="default", response_model=Answer, max_retries=0, max_tokens=64, temperature=0,
    messages=[{"role": "user", "content": "What is the capital of France? Answer with JSON."}],
)
assert answer.city in ("Paris", "Rome")
print(answer)
"""


class Service(NamedTuple):
    """A running service, and the environment with all clients."""

    python: Path
    url: str
    engine: str


@pytest.fixture(scope="module")
def service(base_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The clients are installed from the package index while the engine starts."""
    if not any(engine.chosen for engine in describe_engines()):
        pytest.skip("no engine is installed")
    folder = tmp_path_factory.mktemp("clients")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    log = folder / "pip.log"
    command = [str(python), "-m", "pip", "install", "--quiet", "--retries=1", "--timeout=20", *CLIENTS]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as installing:
        try:
            with running(folder / "work", model_dir=base_model, engine="auto", max_model_len=512) as server:
                assert server.ready is not None
                if installing.wait(timeout=100) != 0:
                    reason = log.read_text().strip().splitlines()
                    pytest.skip(f"the clients cannot be installed from the index: {reason[-1] if reason else '?'}")
                yield Service(python, f"{server.url}/v1", server.ready.engine)
        finally:
            installing.kill()


def run(service: Service, home: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "PYTHON"))}
    done = subprocess.run(
        [str(service.python), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=home,
        env={
            **environment,
            "URL": service.url,
            "TOKEN": TOKEN,
            "HOME": str(home),
            "LLM_USER_PATH": str(home),
            "NO_PROXY": "127.0.0.1",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("script", [OPENAI, LITELLM, LANGCHAIN], ids=["openai", "litellm", "langchain-openai"])
def test_a_client_library_gets_the_answer_whole_and_streamed(service: Service, tmp_path: Path, script: str) -> None:
    whole, streamed = run(service, tmp_path, "-c", script).strip().splitlines()
    assert "Paris" in whole
    assert streamed == whole


def test_instructor_gets_a_typed_answer(service: Service, tmp_path: Path) -> None:
    if "vllm" not in service.engine:
        pytest.skip("the transformers engine rejects response_format")
    assert "city=" in run(service, tmp_path, "-c", INSTRUCTOR)


def test_the_llm_command_answers(service: Service, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: mine\n  model_name: default\n  api_base: {service.url}\n  api_key_name: mine\n"
    )
    options = ["-m", "mine", "--key", TOKEN, "-o", "max_tokens", "8", "-o", "temperature", "0"]
    assert "Paris" in run(service, tmp_path, "-m", "llm", *options, "What is the capital of France?")
