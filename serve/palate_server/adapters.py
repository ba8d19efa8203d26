"""Adapters beside the service's versions: which engines should have which, and their loading into running engines.

Called by the service's thread alone. Loads have threads of their own, which put their ends into the service's queue.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from palate_recipes.specs.fleet import AdapterState, FleetAdapter
from palate_recipes.specs.serve import BASE_MODEL
from palate_server.engine import Engine, EngineError
from palate_server.plan import beyond_engine
from palate_server.pools import Pool, ServedAdapter, is_drained

logger = logging.getLogger(__name__)

END_LIMIT_S = 1.0
"""Time for an engine that broke off an answer to be seen to have ended."""
_LOAD_LIMIT_S = 300.0
_AGAIN_S = 30.0
"""An adapter that other engines have is loaded again after this time by one that failed to."""

_Key = tuple[str, str]


class Adapters:
    """The further adapters of a service.

    An adapter has a place in every pool. Two with one name and different files are two adapters; the old one answers until the new
    one is ready.
    """

    def __init__(self, put: Callable[[str, Engine, Any], None]) -> None:
        """Starts with none.

        Args:
            put: Reports `loaded` with the model and why it failed (""), or `unloaded`.
        """
        self._put = put
        self._placed: dict[_Key, list[ServedAdapter]] = {}
        self._busy: dict[Engine, str] = {}  # what an engine loads or unloads now
        self._failed_at: dict[tuple[Engine, str], float] = {}

    def __iter__(self) -> Iterator[ServedAdapter]:
        return (adapter for placed in self._placed.values() for adapter in placed)

    # ── which there are ─────────────────────────────────────────────────────────────────────────────────────────────

    def want(self, desired: Sequence[FleetAdapter], pools: Sequence[Pool], *, taken: Collection[str]) -> None:
        """Adds the desired adapters to every pool, and drops others once nothing uses them.

        Args:
            desired: The adapters that should be served.
            pools: The pools that there are.
            taken: Names of other models of the service.
        """
        now = time.monotonic()
        wanted = {_key(adapter): adapter for adapter in desired}
        for key, asked in wanted.items():
            placed = self._placed.setdefault(key, [])
            for pool in pools:
                known = next((one for one in placed if one.pool is pool), None)
                if known is None and pool.is_proved:
                    placed.append(_place(asked, pool, taken))
                elif known is not None and known.state == "draining":  # it was wanted no more, and is again
                    known.state, known.unrouted_at = "ready" if known.is_proved else "starting", 0.0
        for key, placed in list(self._placed.items()):
            for adapter in list(placed):
                if adapter.pool not in pools or (adapter.state == "failed" and key not in wanted):
                    placed.remove(adapter)
                elif key not in wanted and not self._is_needed(adapter, wanted):
                    adapter.unrouted_at = adapter.unrouted_at or now
                    adapter.state = "draining"
                    if is_drained([adapter.lane], unrouted_at=adapter.unrouted_at, now=now):
                        adapter.pool.hot.pop(adapter.lane.model, None)
                        placed.remove(adapter)
            if not placed and key not in wanted:
                del self._placed[key]

    def _is_needed(self, adapter: ServedAdapter, wanted: Mapping[_Key, FleetAdapter]) -> bool:
        """Whether an adapter that is no longer desired answers until the one that has its name now is ready."""
        is_named = any(name == adapter.name for name, _ in wanted)
        return is_named and not any(
            other.state == "ready" and other.pool is adapter.pool and key in wanted and key[0] == adapter.name
            for key, placed in self._placed.items()
            for other in placed
        )

    def answering(self, pool: Pool) -> Iterable[ServedAdapter]:
        """Yields the adapters of a pool that answer. Of two with one name, the later one comes last."""
        return (adapter for adapter in self if adapter.pool is pool and adapter.state == "ready")

    def is_complete(self, pool: Pool, desired: Sequence[FleetAdapter]) -> bool:
        """Whether a pool has loaded each of these adapters, or failed to."""
        placed = {_key(one.asked): one for one in self if one.pool is pool}
        found = [placed.get(_key(asked)) for asked in desired]
        return all(one is not None and one.state != "starting" for one in found)

    def state(self, asked: FleetAdapter) -> AdapterState:
        """Returns the state of a desired adapter, which may not have been added yet."""
        placed = self._placed.get(_key(asked), [])
        if why := next((one.reason for one in placed if one.state == "failed"), ""):
            return AdapterState(name=asked.name, digest=asked.digest, state="failed", reason=why)
        is_ready = bool(placed) and all(one.state == "ready" for one in placed)
        return AdapterState(name=asked.name, digest=asked.digest, state="ready" if is_ready else "loading")

    # ── into the engines ────────────────────────────────────────────────────────────────────────────────────────────

    def load(self, pool: Pool, *, own: Collection[str], ready: Collection[str]) -> None:
        """Lets each engine load what it lacks, and unload what nothing uses: one adapter at a time.

        Args:
            pool: The pool.
            own: Its engines' names of the versions on it.
            ready: Those of the versions that answer.
        """
        if not pool.loads_adapters or not pool.is_proved:
            return
        now = time.monotonic()
        answer = {*ready, *(one.lane.model for one in self if one.state == "ready")}
        for engine in pool.up():
            engine.failed = {
                model: why
                for model, why in engine.failed.items()
                if model in pool.hot
                and (model not in answer or now < self._failed_at.get((engine, model), 0.0) + _AGAIN_S)
            }
            if engine in self._busy:
                continue
            lacking = [model for model in pool.hot if model not in engine.models and model not in engine.failed]
            unused = engine.models - {BASE_MODEL, *own, *pool.hot}
            if unused:
                model = self._busy[engine] = unused.pop()
                engine.models = engine.models - {model}
                threading.Thread(target=self._unload_from, args=(engine, model), daemon=True).start()
            elif lacking:
                model = self._busy[engine] = lacking[0]
                threading.Thread(target=self._load_into, args=(engine, model, pool.hot[model]), daemon=True).start()

    def _load_into(self, engine: Engine, model: str, folder: str) -> None:
        why = ""
        try:
            asked = {"lora_name": model, "lora_path": folder}
            engine.ask("/v1/load_lora_adapter", asked, timeout_s=_LOAD_LIMIT_S)
            engine.token_of(model, timeout_s=_LOAD_LIMIT_S)
        except (EngineError, OSError) as error:
            why = f"engine {engine.name} did not load it: {error}"
            if isinstance(error, OSError):
                engine.has_ended(within_s=END_LIMIT_S)  # then that is the cause, and is reported first
        self._put("loaded", engine, (model, why))

    def _unload_from(self, engine: Engine, model: str) -> None:
        try:
            engine.ask("/v1/unload_lora_adapter", {"lora_name": model}, timeout_s=_LOAD_LIMIT_S)
        except (EngineError, OSError) as error:
            logger.warning("engine %s did not unload %s: %s", engine.name, model, error)
        self._put("unloaded", engine, None)

    def loaded(self, engine: Engine, model: str, why: str) -> None:
        """Notes the end of a load; `why` is empty if it was loaded."""
        if self._busy.pop(engine, None) != model:
            return  # it has ended
        if not why:
            engine.models = {*engine.models, model}
        else:
            engine.failed[model], self._failed_at[engine, model] = why, time.monotonic()
            logger.error("%s", why)

    def interrupted(self, engine: Engine) -> str | None:
        """Notes that an engine has unloaded what it should, or has ended. Returns what it loaded or unloaded."""
        if engine.returncode is not None:
            self._failed_at = {key: at for key, at in self._failed_at.items() if key[0] is not engine}
        return self._busy.pop(engine, None)


def _key(adapter: FleetAdapter) -> _Key:
    return adapter.name, adapter.digest


def _place(asked: FleetAdapter, pool: Pool, taken: Collection[str]) -> ServedAdapter:
    """Adds an adapter to a pool; one that it cannot load has failed from the start."""
    model = f"{asked.name}-{asked.digest[:12]}"
    lane = pool.lane(model=model, label=asked.name)
    adapter = ServedAdapter(name=asked.name, asked=asked, pool=pool, lane=lane, folder=asked.path)
    if why := _beyond(asked, pool, taken):
        fail(adapter, why)
    else:
        pool.hot[model] = asked.path
    return adapter


def fail(adapter: ServedAdapter, why: str) -> None:
    """Gives up an adapter in its pool."""
    adapter.state, adapter.reason = "failed", why
    adapter.pool.hot.pop(adapter.lane.model, None)
    logger.error("adapter %s failed: %s", adapter.name, why)


def _beyond(asked: FleetAdapter, pool: Pool, taken: Collection[str]) -> str:
    """Returns why a pool cannot serve an adapter; "" if it can."""
    if asked.name in taken:
        return f"the service has another model named {asked.name!r}: choose another name"
    if not pool.loads_adapters:
        return (
            "the service has no base model that vLLM serves with adapters; on a processor it needs Palate's plugin, too, which "
            "PALATE_CPU_LORA=0 turns off"
        )
    try:
        return beyond_engine(Path(asked.path), pool.plan, pool.spec.base_model_dir)
    except Exception as error:  # whatever is wrong with its files must not end the service
        logger.exception("adapter %s", asked.name)
        return f"its files cannot be read ({type(error).__name__}: {error})"
