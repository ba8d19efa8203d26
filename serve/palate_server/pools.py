"""What the service knows of its engines and of the tuned models on them. Decides nothing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from palate_recipes.specs.fleet import FleetAdapter, FleetVersion
from palate_recipes.specs.serve import BASE_MODEL, Parity, ServeSpec
from palate_server import cpu_lora
from palate_server.engine import Engine
from palate_server.gateway import calls_need_a_parser
from palate_server.plan import EnginePlan
from palate_server.routes import Lane, Parameters
from palate_server.scaling import Scaler
from palate_server.transformers_parameters import prepared

UNROUTED_S = 1.0
"""A request that has chosen its lane may not be counted yet. After this time it is."""
DRAIN_LIMIT_S = 600.0
"""What is replaced is ended after this time even if it still answers requests: no client waits longer."""

State = Literal["starting", "ready", "draining", "failed"]


@dataclass(eq=False, kw_only=True)
class Pool:
    """Engines with the same weights and settings.

    Attributes:
        name: Of the version that it was started for.
        spec: What its engines serve.
        plan: How.
        wanted: Engines that it should have, once the first has been compared.
        most: Engines that it may have at once.
        scaler: Follows the requests with the number of engines, where a version asks for that.
        engines: Those that are starting or answer. Lanes share this list.
        leaving: Those that answer their open requests and then end.
        is_proved: Whether a version on it was compared with its trained model, or needs no comparison.
        hot: Folders of the adapters that every engine should have beside those it was started with, by the engine's names.
        wakes: Whether it was put to sleep, and no engine of it is up since.
        started: Engines that were started so far.
        crashes: Monotonic times of the last ends that nobody asked for.
        restart_at: Monotonic time before which no engine is started.
        further_at: Monotonic time before which no engine is started beside those that run.
        failed_starts: Starts of additional engines that failed since one has come up.
    """

    name: str
    spec: ServeSpec
    plan: EnginePlan
    wanted: int = 1
    most: int = 1
    scaler: Scaler | None = None
    engines: list[Engine] = field(default_factory=list)
    leaving: list[Engine] = field(default_factory=list)
    is_proved: bool = False
    hot: dict[str, str] = field(default_factory=dict)
    started: int = 0
    crashes: deque[float] = field(default_factory=deque)
    restarts: int = 0
    last_crash: str = ""
    restart_at: float = 0.0
    further_at: float = 0.0
    failed_starts: int = 0
    wakes: bool = False
    base: Lane = field(init=False)

    def __post_init__(self) -> None:
        self.base = self.lane(model=BASE_MODEL, label=BASE_MODEL)

    @property
    def title(self) -> str:
        return f"{self.plan.engine.distribution} {self.plan.engine.version}"

    @property
    def loads_adapters(self) -> bool:
        # Without the plugin, vLLM's CPU kernels take a request for the base as one for the adapter in the last slot (see `plan`).
        keeps_base_apart = not self.plan.on_cpu or cpu_lora.is_active()
        return self.plan.engine.name == "vllm" and self.spec.base_model_dir is not None and keeps_base_apart

    def lane(self, *, model: str, label: str, version: str = "") -> Lane:
        """Returns a lane to its engines. See `Lane`."""
        parameters: Parameters = prepared if self.plan.engine.name == "transformers" else calls_need_a_parser(self.spec)
        return Lane(model=model, label=label, version=version, engines=self.engines, parameters=parameters)

    def up(self) -> list[Engine]:
        return [engine for engine in self.engines if engine.is_up]


@dataclass(eq=False, kw_only=True)
class Tuned:
    """A tuned model: a version of the service's own, or a further adapter.

    Attributes:
        name: `v1`, or the adapter's name in requests.
        lane: Its lane.
        folder: Its folder.
        on_trial: Whether its comparison runs.
    """

    name: str
    pool: Pool
    lane: Lane
    folder: str
    state: State = "starting"
    reason: str = ""
    parity: Parity | None = None
    on_trial: bool = False
    is_proved: bool = False
    began_at: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    unrouted_at: float = 0.0


@dataclass(eq=False, kw_only=True)
class ServedVersion(Tuned):
    asked: FleetVersion
    needs: int = 0
    """Engines that must be up before it gets requests, beside those that it asks for: as many as the version before has."""


@dataclass(eq=False, kw_only=True)
class ServedAdapter(Tuned):
    asked: FleetAdapter


class _Counted(Protocol):
    open: int


def is_drained(users: Iterable[_Counted], *, unrouted_at: float, now: float) -> bool:
    """Whether what gets no requests since a time has answered those that it had, or had long enough for it."""
    waited_s = now - unrouted_at
    return waited_s >= UNROUTED_S and (waited_s >= DRAIN_LIMIT_S or not any(one.open for one in users))
