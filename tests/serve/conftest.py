"""A real base model, a real adapter, and servers started as the runner starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

import palate_server
from palate_recipes.specs.serve import ERROR_FILE, READY_FILE, TOKEN_VARIABLE, Ready, ServeSpec
from tests.support import models

TOKEN = "a-token-for-tests"


@dataclass
class Server:
    """A running server program and what is needed to talk to it."""

    process: subprocess.Popen[bytes]
    spec: ServeSpec
    log: Path
    ready: Ready | None = None

    @property
    def url(self) -> str:
        assert self.ready is not None
        return self.ready.endpoint

    def client(self, token: str = TOKEN) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0, timeout=120)

    def family(self) -> list[psutil.Process]:
        """Returns the program and everything below it."""
        program = psutil.Process(self.process.pid)
        return [program, *program.children(recursive=True)]

    def error(self) -> str:
        return (Path(self.spec.work_dir) / ERROR_FILE).read_text()


def start(work: Path, **fields: Any) -> Server:
    """Starts the program and waits for ready.json or its end, whichever comes first."""
    work.mkdir(parents=True, exist_ok=True)
    spec = ServeSpec(service_name="smol_example", work_dir=str(work), **fields)
    spec.write(work / "spec.json")
    search = [str(Path(palate_server.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, TOKEN_VARIABLE: TOKEN, "PYTHONPATH": os.pathsep.join(filter(None, search))}
    log = work / "program.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "palate_server", str(work / "spec.json")]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    server = Server(process, spec, log)
    while not (work / READY_FILE).exists():
        try:
            process.wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            continue
        return server
    server.ready = Ready.read(work / READY_FILE)
    return server


@contextmanager
def running(work: Path, **fields: Any) -> Iterator[Server]:
    """Runs a server until the block ends; it must have become ready."""
    server = start(work, **fields)
    try:
        assert server.ready is not None, server.log.read_text()[-4000:]
        print(f"{server.ready.engine} was ready after {server.ready.seconds} s")
        yield server
    finally:
        server.process.terminate()
        server.process.wait(timeout=30)


def installed(*distributions: str) -> bool:
    """Whether any of the distributions is installed."""
    names = {(d.metadata["Name"] or "").lower() for d in metadata.distributions()}
    return bool(names & set(distributions))


@pytest.fixture(scope="session")
def base_model(base_model: Path) -> str:
    """The shared base model, as a spec names it."""
    return str(base_model)


@pytest.fixture(scope="session")
def adapter(base_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LoRA adapter of rank 8 whose random weights change what the base says, saved with its tokenizer as a trainer does."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(tmp_path_factory.mktemp("adapter"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.bfloat16)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=1.0)
    tuned.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(base_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random two-layer model, whose engine is up as soon as its libraries are imported."""
    return str(models.tiny_model(tmp_path_factory.mktemp("tiny"), Path(base_model)))


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A folder with all the names of a model and nothing that computes: enough for what preflight reads."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def tiny_adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 20}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder
