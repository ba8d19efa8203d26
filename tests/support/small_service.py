"""The server program in a thread, with small engines in place of vLLM. Everything else is the program's own."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from palate_recipes.errors import BadSpec
from palate_recipes.specs.fleet import FLEET_FILE, FLEET_STATE_FILE, Fleet, FleetAdapter, FleetState, FleetVersion
from palate_recipes.specs.serve import ERROR_FILE, READY_FILE, TOKEN_VARIABLE, EngineInfo, Ready, ServeSpec
from palate_server import engine, pools, server, service
from palate_server.plan import EnginePlan
from tests.support import small_engine

TOKEN = "a-token-for-tests"
WAIT_S = 30.0
ADAPTER = {"peft_type": "LORA", "r": 8}


def small_plan(spec: ServeSpec) -> EnginePlan:
    """Returns the plan for a small engine, which passes for vLLM."""
    if not Path(spec.model_dir).is_dir():
        raise BadSpec(f"model_dir {spec.model_dir} is not a folder")
    return EnginePlan(
        engine=EngineInfo(name="vllm", distribution="small", version="1", missing=(), remedy="", chosen=True),
        why="",
        on_cpu=False,
        dtype="float32",
        computes_in="float32",
        prompt_scores=True,
        lora_rank=16 if spec.base_model_dir else None,
        tokenizer_dir=Path(spec.model_dir),
        kv_cache_gib=1,
        is_eager=True,
    )


def small_command(
    spec: ServeSpec, plan: EnginePlan, *, spec_file: Path, socket: str, adapters: Mapping[str, str]
) -> list[str]:
    command = [sys.executable, "-P", small_engine.__file__, str(spec_file), "--uds", socket]
    return [*command, "--adapters", json.dumps(dict(adapters))]


def with_small_engines(replace: Callable[[Any, str, Any], None]) -> None:
    """Lets this process start small engines, and decide fast.

    Args:
        replace: Sets an attribute, such as `monkeypatch.setattr`.
    """
    replace(service, "check", small_plan)
    replace(engine, "engine_command", small_command)
    replace(service, "TICK_S", 0.05)
    replace(pools, "UNROUTED_S", 0.2)
    replace(service, "_FIRST_PAUSE_S", 0.05)
    replace(engine, "_PROBE_EVERY_S", 0.02)
    replace(engine, "_LOOK_EVERY_S", 0.1)
    replace(engine, "_STILL_TIMES", 2)


class SmallService:
    """A service that runs in this process."""

    def __init__(
        self, work: Path, *, base: bool = False, engine: Mapping[str, Any] | None = None, **fields: Any
    ) -> None:
        """Prepares it.

        Args:
            work: Its work folder.
            base: Whether it serves an adapter with its base model.
            engine: How its first engines start, see `small_engine`.
            **fields: Further fields of the spec.
        """
        self.work = work
        self.go = work / "go"
        """A file that prompts and engines wait for, with `until`."""
        self.base = self.folder("base") if base else None
        self.spec = ServeSpec(
            **{
                "service_name": "svc",
                "model_dir": self.folder("one", **(engine or {})),
                "base_model_dir": self.base,
                "work_dir": str(work),
                "verify": "off",
                "restarts": 3,
                "start_timeout_s": 30.0,
                **fields,
            }
        )
        self.generation = 0
        self.result: int | None = None
        self.stop: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run)

    def folder(self, name: str, **behaviour: Any) -> str:
        """Makes a folder with a model or an adapter, and with how an engine loads it."""
        folder = self.work / "models" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
        (folder / "adapter_model.safetensors").write_bytes(b"")
        (folder / "engine.json").write_text(json.dumps(behaviour))
        return str(folder)

    # ── its life ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        self.result = server.main([str(self.work / "spec.json")])

    def start(self, *, until: str = READY_FILE) -> None:
        self.spec.write(self.work / "spec.json")
        self._thread.start()
        self.wait(lambda: (self.work / until).exists())

    def end(self) -> int | None:
        self.stop()
        return self.ended()

    def ended(self) -> int | None:
        """Waits until it has ended, and returns its exit code."""
        self._thread.join(timeout=WAIT_S)
        assert not self._thread.is_alive()
        return self.result

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def wait(self, reached: Callable[[], Any]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not reached():
            ended = self._thread.ident is not None and not self._thread.is_alive()
            assert not ended or reached(), (self.work / ERROR_FILE).read_text()
            assert time.monotonic() < deadline, self.state() if (self.work / FLEET_STATE_FILE).exists() else "no state"
            threading.Event().wait(0.01)

    def error(self) -> str:
        return (self.work / ERROR_FILE).read_text()

    # ── desired and observed state ──────────────────────────────────────────────────────────────────────────────────

    def version(self, name: str, folder: str | None = None, **fields: Any) -> FleetVersion:
        """Returns a version; a field that FleetVersion does not have is one of the spec."""
        own = {key: fields.pop(key) for key in ("instances", "share", "autoscaling") if key in fields}
        values = {name: getattr(self.spec, name) for name in self.spec.__struct_fields__}
        spec = ServeSpec(**{**values, "model_dir": folder or self.spec.model_dir, **fields})
        return FleetVersion(name=name, spec=spec, **own)

    def adapter(self, name: str, folder: str, digest: str = "a") -> FleetAdapter:
        return FleetAdapter(name=name, digest=digest * 64, path=folder)

    def want(
        self, *versions: FleetVersion, adapters: tuple[FleetAdapter, ...] = (), settles: bool = True
    ) -> FleetState:
        """Writes the next desired state, and returns the state once it is reached (without `settles`: once it is seen)."""
        self.generation += 1
        Fleet(generation=self.generation, versions=versions, adapters=adapters).write(self.work / FLEET_FILE)
        if self._thread.is_alive():
            self.wait(lambda: self.state().generation == self.generation and (not settles or self.is_settled()))
            return self.state()
        return FleetState(generation=self.generation, versions=())

    def is_settled(self) -> bool:
        state = self.state()
        names = {version.name for version in state.versions}
        return (
            all(version.state in ("ready", "failed") for version in state.versions)
            and all(adapter.state != "loading" for adapter in state.adapters)
            and len(names) == len(state.versions)
        )

    def state(self) -> FleetState:
        return FleetState.read(self.work / FLEET_STATE_FILE)

    def states(self) -> dict[str, str]:
        return {version.name: version.state for version in self.state().versions}

    def wait_for(self, **states: str) -> None:
        """Waits until the versions are exactly these, in these states."""
        self.wait(lambda: self.states() == states)

    def engines(self) -> list[psutil.Process]:
        """Returns the engine processes that run."""
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                command = process.cmdline()
                if command[2:3] == [small_engine.__file__] and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, IndexError):
                pass
        return found

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def url(self) -> str:
        return Ready.read(self.work / READY_FILE).endpoint

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=TOKEN, max_retries=0, timeout=WAIT_S)

    def http(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {TOKEN}", **options.pop("headers", {})}
        return httpx.request(method, f"{self.url}{path}", headers=headers, timeout=WAIT_S, trust_env=False, **options)

    def ask(self, prompt: str = "", *, model: str = "default") -> Answer:
        """Returns who has answered. Raises what OpenAI's client raises."""
        return Answer(self.client().completions.create(model=model, prompt=prompt).choices[0].text)

    def stream(self, prompt: str, *, model: str = "default") -> TextStream:
        return TextStream(self.client().completions.create(model=model, prompt=prompt, stream=True))

    def open(self, count: int) -> None:
        """Waits until so many requests are open."""
        self.wait(lambda: f"palate_open_requests {count}.0" in self.metrics())

    def metrics(self) -> str:
        return self.http("GET", "/metrics").text


class TextStream:
    """The texts of a streamed answer."""

    def __init__(self, chunks: Any) -> None:
        self._chunks = chunks

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return str(next(self._chunks).choices[0].text)

    def close(self) -> None:
        self._chunks.close()


class Answer:
    """What a small engine says: its name of the model, the model's folder, its process id."""

    def __init__(self, text: str) -> None:
        self.model, folder, pid, *_ = text.split()
        self.folder = Path(folder).name
        self.pid = int(pid)


class Load:
    """Requests without a pause from several threads, while a block runs."""

    def __init__(
        self, service: SmallService, *, prompt: str = "tokens:2 delay:0.01", model: str = "default", threads: int = 3
    ) -> None:
        self._ask = lambda client: client.completions.create(model=model, prompt=prompt).choices[0].text
        self._clients = [service.client() for _ in range(threads)]
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(client,)) for client in self._clients]
        self.answers: list[Answer] = []
        self.failures: list[str] = []

    def _run(self, client: openai.OpenAI) -> None:
        while not self._is_over.is_set():
            try:
                self.answers.append(Answer(self._ask(client)))
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def folders(self) -> set[str]:
        return {answer.folder for answer in self.answers}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SmallService]]:
    """Makes services. At the end each has been stopped, and nothing is left of it: no process, no thread, no file."""
    with_small_engines(monkeypatch.setattr)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    # Short, because a socket's path has a limit.
    sockets = Path(tempfile.mkdtemp(prefix="s-"))
    monkeypatch.setattr(tempfile, "tempdir", str(sockets))
    threads = set(threading.enumerate())
    made: list[SmallService] = []

    def make(**fields: Any) -> SmallService:
        work = tmp_path / f"w{len(made)}"
        work.mkdir()
        made.append(SmallService(work, **fields))
        running = made[-1]

        @contextmanager
        def no_signals(stop: Callable[[], None]) -> Iterator[None]:
            running.stop = stop
            yield

        monkeypatch.setattr(server, "_signals_to", no_signals)
        return running

    yield make
    for running in made:
        if running.is_alive:
            running.end()
    deadline = time.monotonic() + 10
    while (left := set(threading.enumerate()) - threads) and time.monotonic() < deadline:
        for thread in left:
            thread.join(timeout=0.1)
    assert left == set()
    assert [one for running in made for one in running.engines()] == []
    assert os.listdir(sockets) == []
    sockets.rmdir()
    for running in made:
        files = {file.name for file in running.work.iterdir()}
        assert files <= {"spec.json", "models", "fleet.json", "fleet-state.json", "error.txt", "idle.txt", "go"}, files
