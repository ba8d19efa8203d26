"""Speed of a tuned model against its base on a CPU, with Palate's LoRA products and with vLLM's own code.

    python benchmarks/lora_speed.py                              SmolLM2-135M-Instruct, rank 32, three rounds
    python benchmarks/lora_speed.py --dtype float32 --rounds 5
    python benchmarks/lora_speed.py --model FOLDER --rank 64

Two services run side by side: `palate`, and `vllm` with PALATE_CPU_LORA=0. One of them works at a time: each round asks both for each
load, the base and the tuned model in turn, so that a busy moment hits all alike; the next round asks them in reverse. The adapter is
random, on all linear layers.

    prefill   one prompt of --prompt tokens and one token of answer; tokens of the prompt per second
    decode-N  N streams of 64 tokens; tokens per second of all streams, from the first token to the last
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import openai

from palate_recipes.specs.serve import READY_FILE, TOKEN_VARIABLE, Ready, ServeSpec
from palate_server.cpu_lora import SWITCH

ENGINES = {"palate": "1", "vllm": "0"}
LOADS = ("prefill", "decode-1", "decode-8")
ANSWER_TOKENS = 64
TOKEN = "a-token-for-a-benchmark"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder; default SmolLM2-135M-Instruct from its package")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=630, help="tokens of the long prompt")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", default=",".join(LOADS), help="comma-separated, of " + ", ".join(LOADS))
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated, of " + ", ".join(ENGINES))
    options = parser.parse_args()
    rates: dict[tuple[str, str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="palate-bench-") as name, ExitStack() as services:
        folder = Path(name)
        model = Path(options.model) if options.model else small_model(folder)
        _adapter(model, options.rank, folder / "adapter")
        endpoints = {}
        for engine in options.engines.split(","):
            spec = ServeSpec(
                service_name="bench",
                model_dir=str(folder / "adapter"),
                base_model_dir=str(model),
                work_dir=str(folder / engine),
                engine="vllm",
                dtype=options.dtype,
                max_model_len=options.prompt + 2 * ANSWER_TOKENS,
            )
            endpoints[engine] = services.enter_context(service(spec, ENGINES[engine]))
        draw = random.Random(0)
        for number in range(options.rounds + 1):  # the first round warms up
            for load in options.loads.split(","):
                for engine, endpoint in endpoints.items():
                    for who in ("base", "default")[:: 1 if number % 2 else -1]:
                        asyncio.run(_rate(endpoint, who, "prefill", 16, draw))  # wakes its threads up
                        rate = asyncio.run(_rate(endpoint, who, load, options.prompt, draw))
                        if number:
                            rates.setdefault((load, engine, who), []).append(rate)
                            print(f"round {number} {load} {engine} {who}: {rate:.1f} tokens/s", file=sys.stderr)
    print(f"\n{model.name}, rank {options.rank}, dtype {options.dtype}, tokens/s, median of {options.rounds}\n")
    print("| load | LoRA by | base | tuned | tuned / base |\n| --- | --- | --- | --- | --- |")
    for load in options.loads.split(","):
        for engine in endpoints:
            base, tuned = (statistics.median(rates[load, engine, who]) for who in ("base", "default"))
            print(f"| {load} | {engine} | {base:.1f} | {tuned:.1f} | {tuned / base:.2f} |")


def small_model(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.support.models import smollm2

    return smollm2(folder / "smollm2-135m-instruct")


def _adapter(model: Path, rank: int, folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


@contextmanager
def service(spec: ServeSpec, switch: str = "1") -> Iterator[str]:
    """Runs the server program until the block ends; yields its endpoint."""
    work = Path(spec.work_dir)
    work.mkdir()
    spec.write(work / "spec.json")
    environment = {**os.environ, TOKEN_VARIABLE: TOKEN, SWITCH: switch}
    with (work / "log").open("wb") as log:
        command = [sys.executable, "-m", "palate_server", str(work / "spec.json")]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        while not (work / READY_FILE).exists():
            if process.poll() is not None:
                raise SystemExit((work / "log").read_text()[-4000:])
            time.sleep(0.2)
        yield Ready.read(work / READY_FILE).endpoint
    finally:
        process.terminate()
        process.wait()


async def _rate(endpoint: str, model: str, load: str, prompt: int, draw: random.Random) -> float:
    """Returns the tokens per second of one load."""
    async with openai.AsyncOpenAI(base_url=f"{endpoint}/v1", api_key=TOKEN, max_retries=0, timeout=600) as client:
        if load == "prefill":
            began = time.monotonic()
            await timed_answer(client, model, [draw.randrange(1000, 30000) for _ in range(prompt)], 1)
            return prompt / (time.monotonic() - began)
        streams = int(load.removeprefix("decode-"))
        prompts = [[draw.randrange(1000, 30000) for _ in range(8)] for _ in range(streams)]
        times = await asyncio.gather(*(timed_answer(client, model, tokens, ANSWER_TOKENS) for tokens in prompts))
        return streams * (ANSWER_TOKENS - 1) / (max(t[-1] for t in times) - min(t[0] for t in times))


async def timed_answer(client: openai.AsyncOpenAI, model: str, prompt: list[int], tokens: int) -> list[float]:
    """Asks for exactly that many tokens. Returns when the first and the last part of the answer came."""
    stream = await client.completions.create(
        model=model,
        prompt=prompt,  # of random tokens: no cached prefix helps
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    times = [time.monotonic() async for _ in stream]
    return [times[0], times[-1]]


if __name__ == "__main__":
    main()
