"""A service against the same vLLM started by hand with the same flags: `make bench-serve`.

    start          seconds from the command to the first token
    first-token    milliseconds from a request to its first token, one request at a time
    streams-N      tokens per second of N streams of 64 tokens

Each round measures both for each load, in turn, so that a busy moment hits both alike. `start` runs one at a time. The other loads
ask one engine process through the service's endpoint and on the engine's own socket, where plain vLLM answers. Two engines side by
side would be no fair comparison: vLLM binds both to the same processor cores, and an idle one does not leave them. The model is
served with full weights, so that vLLM needs nothing of Palate.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import httpx2
import openai
import psutil
from lora_speed import ANSWER_TOKENS, TOKEN, service, small_model, timed_answer

from palate_recipes.specs.serve import ServeSpec
from palate_server.plan import check, engine_command, engine_environment

LOADS = ("start", "first-token", "streams-1", "streams-8", "streams-32")
CONTEXT = 512
Connect = Callable[[], openai.AsyncOpenAI]
FIRST_TOKENS = 30
"""Requests per round of which the median time to the first token is taken."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder; default SmolLM2-135M-Instruct from its package")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", default=",".join(LOADS), help="comma-separated, of " + ", ".join(LOADS))
    options = parser.parse_args()
    found: dict[tuple[str, str], list[float]] = {}
    loads = options.loads.split(",")
    with tempfile.TemporaryDirectory(prefix="palate-bench-") as name:
        folder = Path(name)
        model = Path(options.model) if options.model else small_model(folder)
        starts: dict[str, Callable[[Path], object]] = {
            "bare": lambda work: bare(model, work),
            "palate": lambda work: service(spec_of(model, work)),
        }
        for number in range(options.rounds if "start" in loads else 0):
            for who in _turn(starts, number):
                began = time.monotonic()
                with starts[who](folder / f"{who}-{number}") as endpoint:  # type: ignore[attr-defined]
                    asyncio.run(_first_token(partial(_client, endpoint), random.Random(number)))
                    found.setdefault(("start", who), []).append(time.monotonic() - began)
        rounds = options.rounds + 1 if loads != ["start"] else 0
        with ExitStack() as stack:
            if rounds:
                endpoint = stack.enter_context(service(spec_of(model, folder / "service")))
                clients = {
                    "bare": lambda: _client("http://engine", uds=_engine_socket()),
                    "palate": lambda: _client(endpoint),
                }
            draw = random.Random(0)
            for number in range(rounds):  # the first round warms up
                for load in loads:
                    for who in _turn(clients, number):
                        if load == "start":
                            continue
                        value = asyncio.run(_measure(clients[who], load, draw))
                        if number:
                            found.setdefault((load, who), []).append(value)
                            print(f"round {number} {load} {who}: {value:.2f}", file=sys.stderr)
    print(f"\n{model.name}, median of {options.rounds} rounds\n")
    print("| load | bare vLLM | Palate | |\n| --- | --- | --- | --- |")
    for load in loads:
        theirs, ours = (statistics.median(found[load, who]) for who in ("bare", "palate"))
        unit = {"start": "s", "first-token": "ms"}.get(load, "tokens/s")
        compared = f"{ours / theirs:.3f}x" if unit == "tokens/s" else f"{ours - theirs:+.2f} {unit}"
        print(f"| {load} | {theirs:.2f} {unit} | {ours:.2f} {unit} | {compared} |")


def spec_of(model: Path, work: Path) -> ServeSpec:
    return ServeSpec(
        service_name="bench", model_dir=str(model), work_dir=str(work), engine="vllm", max_model_len=CONTEXT
    )


def _turn(names: dict[str, object], number: int) -> list[str]:
    return sorted(names, reverse=bool(number % 2))


@contextmanager
def bare(model: Path, work: Path) -> Iterator[str]:
    """Runs vLLM's own server with the flags of the service until the block ends; yields its endpoint once it is healthy."""
    work.mkdir()
    spec = spec_of(model, work)
    plan = check(spec)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = engine_command(
        spec,
        plan,
        spec_file=work / "unused",
        socket="",
        adapters={"default": spec.model_dir} if spec.base_model_dir else {},
    )
    at = command.index("--uds")
    command[at : at + 2] = ["--host", "127.0.0.1", "--port", str(port)]
    environment = engine_environment(plan, ipc_dir=str(work))
    with (work / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--api-key", TOKEN], stdout=log, stderr=log, env={**environment, "PYTHONUNBUFFERED": "1"}
        )
    endpoint = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit((work / "log").read_text()[-4000:])
            try:
                urllib.request.urlopen(f"{endpoint}/health", timeout=5).close()
                break
            except (OSError, urllib.error.URLError):
                time.sleep(0.1)
        yield endpoint
    finally:
        process.terminate()
        process.wait()


async def _measure(connect: Connect, load: str, draw: random.Random) -> float:
    if load == "first-token":
        return statistics.median([await _first_token(connect, draw) for _ in range(FIRST_TOKENS)])
    streams = int(load.removeprefix("streams-"))
    async with connect() as client:
        prompts = [[draw.randrange(1000, 30000) for _ in range(8)] for _ in range(streams)]
        began = time.monotonic()
        await asyncio.gather(*(timed_answer(client, "default", tokens, ANSWER_TOKENS) for tokens in prompts))
        return streams * ANSWER_TOKENS / (time.monotonic() - began)


async def _first_token(connect: Connect, draw: random.Random) -> float:
    """Returns the milliseconds to the first token of a short prompt."""
    async with connect() as client:
        began = time.monotonic()
        first, _ = await timed_answer(client, "default", [draw.randrange(1000, 30000) for _ in range(16)], 2)
        return 1000 * (first - began)


def _client(endpoint: str, uds: str | None = None) -> openai.AsyncOpenAI:
    http = openai.DefaultAsyncHttpxClient(transport=httpx2.AsyncHTTPTransport(uds=uds), timeout=600)
    return openai.AsyncOpenAI(base_url=f"{endpoint}/v1", api_key=TOKEN, max_retries=0, http_client=http)


def _engine_socket() -> str:
    """Returns the socket of the engine that this program's service has started."""
    for process in psutil.Process().children(recursive=True):
        line = process.cmdline()
        if "--uds" in line:
            return line[line.index("--uds") + 1]
    raise SystemExit("the service has no engine")


if __name__ == "__main__":
    main()
