"""Runs the calls of many prompts: several at a time, to the end or to the first failure. Knows no prompt and no pair."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from palate.generate.chat_client import ChatClient

_DRAIN_S = 10.0
"""Seconds for calls in flight to finish when the run fails: their responses are kept."""

TEMPLATE_TOKENS = 16
"""Estimated maximum tokens that a chat template adds to a message."""

T = TypeVar("T")


async def in_parallel(client: ChatClient, work: Callable[[], Awaitable[None]], *, workers: int) -> None:
    """Runs `work` several times at once, each of which takes prompts until there are none.

    Args:
        client: Sends the calls. It stops with the first failure; calls in flight may finish for a while.
        work: One worker.
        workers: Number of workers.

    Raises:
        Exception: The first failure of a worker.
    """

    async def one() -> None:
        await work()

    tasks = [asyncio.create_task(one()) for _ in range(workers)]
    try:
        ended, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        failure = next((error for task in ended if (error := task.exception())), None)
        if failure is not None:
            client.stop(failure)
            if others:
                await asyncio.wait(others, timeout=_DRAIN_S)
            raise failure
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to completion, also inside a notebook's running loop; KeyboardInterrupt cancels it."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    begun: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = []

    async def known() -> T:
        task = asyncio.create_task(work)
        begun.append((asyncio.get_running_loop(), task))
        return await task

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asyncio.run, known())
        try:
            return future.result()
        except KeyboardInterrupt:
            for loop, task in begun:
                loop.call_soon_threadsafe(task.cancel)
            raise


def most_tokens(messages: Sequence[Mapping[str, str]]) -> int:
    """Returns an upper bound of the tokens: a token has at least one byte."""
    return sum(len(message["content"].encode()) + TEMPLATE_TOKENS for message in messages)
