"""Makes the running engines equal to the desired state: versions, instances, adapters. Knows engines and routes, no HTTP.

One thread decides. Engines, comparisons and loads have threads of their own, which put events into its queue; twice a second it also
looks at the desired state and at the clock. What it decides becomes visible at once, as a new table of routes, and is told in
fleet-state.json. A version takes requests only after it has answered and was compared with its trained model. One that is no longer
desired answers until a desired one is ready, and then answers its open requests before it ends; so a change that fails changes
nothing. An engine that ends by itself is started again, after a pause that doubles.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal

from msgspec.structs import replace

from palate_recipes.errors import EngineFailed, EngineHung, ServerError, StartTimeout
from palate_recipes.specs.fleet import (
    FLEET_FILE,
    FLEET_STATE_FILE,
    Fleet,
    FleetState,
    FleetVersion,
    VersionState,
)
from palate_recipes.specs.serve import BASE_MODEL, TUNED_MODEL, Parity, ServeSpec
from palate_server.adapters import END_LIMIT_S, Adapters, fail
from palate_server.engine import Engine
from palate_server.gateway import Activity
from palate_server.parsers import with_parsers
from palate_server.plan import EnginePlan, beyond_engine, check, gpus_for, same_rendering
from palate_server.pools import Pool, ServedAdapter, ServedVersion, Tuned, is_drained
from palate_server.routes import Lane, Routes, Table
from palate_server.scaling import TARGET_REQUESTS, Scaler
from palate_server.trial import Asking, compared

logger = logging.getLogger(__name__)

TICK_S = 0.5
_CRASHES_WITHIN_S = 600.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0

Event = tuple[str, Any, Any]


class Service:
    """The service while it runs. `run` is called once, `end` in any case."""

    def __init__(
        self,
        spec: ServeSpec,
        *,
        routes: Routes,
        activity: Activity,
        asking: Asking,
        on_ready: Callable[[str, Parity | None], None],
        on_engine_end: Callable[[str], None],
    ) -> None:
        """Prepares the service.

        Args:
            spec: The service, and its version if there is no desired state.
            routes: The table that the front reads.
            activity: What the front counts.
            asking: Asks the service as a client does.
            on_ready: Called once, when the first version answers, with its engine and comparison.
            on_engine_end: Called with the socket of each engine that has ended.
        """
        self._spec = spec
        self._work_dir = Path(spec.work_dir)
        self._routes = routes
        self._activity = activity
        self._asking = asking
        self._on_ready = on_ready
        self._on_engine_end = on_engine_end
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._seen: tuple[int, int, int] | None = None
        self._desired = Fleet(generation=0, versions=(FleetVersion(name="v1", spec=spec),))
        self._pools: list[Pool] = []
        self._versions: dict[str, ServedVersion] = {}
        self._adapters = Adapters(lambda kind, engine, detail: self._events.put((kind, engine, detail)))
        self._refused: dict[str, ServerError] = {}  # versions that could not even be started, by name
        self._is_ready = self._is_asleep = False
        self._told: FleetState | None = None
        self._ending: list[threading.Thread] = []

    def stop(self) -> None:
        """Asks `run` to return. Safe in a signal handler, because put() of a SimpleQueue is."""
        self._events.put(("stop", None, None))

    def front_ended(self, why: str) -> None:
        """Says that the HTTP server has ended by itself: `run` raises."""
        self._events.put(("front ended", None, why))

    def run(self) -> Literal["stop", "idle"]:
        """Runs the service until it is asked to stop, or is idle.

        Raises:
            ServerError: No version of it can run.
        """
        self._look_at_desired()
        if not self._versions:  # there is none, or it is damaged
            self._converge(self._desired)
        while True:
            try:
                kind, subject, detail = self._events.get(timeout=TICK_S)
                if kind == "stop":
                    return "stop"
                if kind == "front ended":
                    raise ServerError(f"its HTTP server ended by itself: {detail}. Start the service again")
                self._handle(kind, subject, detail)
            except Empty:
                pass
            self._look_at_desired()
            self._tick()
            self._publish()
            if self._is_idle():
                return "idle"

    def end(self, *, quiet: bool) -> None:
        """Ends all engines, and waits for them."""
        engines = [engine for pool in self._pools for engine in (*pool.engines, *pool.leaving)]
        threads = [threading.Thread(target=engine.end, kwargs={"quiet": quiet}) for engine in engines]
        for thread in threads:
            thread.start()
        for thread in (*threads, *self._ending):
            thread.join()

    # ── the desired state ───────────────────────────────────────────────────────────────────────────────────────────

    def _look_at_desired(self) -> None:
        path = self._work_dir / FLEET_FILE
        try:
            found = path.stat()
            mark = (found.st_mtime_ns, found.st_ino, found.st_size)
            if mark == self._seen:
                return
            desired = Fleet.read(path)
            self._seen = mark
        except OSError:
            return  # it is not there, or cannot be read now
        except ValueError as error:
            self._seen = mark  # a damaged file is reported once
            logger.error("the service stays as it is: %s is not a desired state: %s", path, error)
            return
        if self._versions and desired == self._desired:
            return
        if self._versions and desired.generation <= self._desired.generation:
            logger.error(
                "the service stays as it is: %s has generation %d, and generation %d was read before",
                path,
                desired.generation,
                self._desired.generation,
            )
            return
        self._converge(desired)

    def _converge(self, desired: Fleet) -> None:
        """Makes a desired state this service's. Raises ServerError if no version can even be started."""
        self._desired = desired
        wanted = {version.name for version in desired.versions}
        self._refused = {name: why for name, why in self._refused.items() if name in wanted}
        for asked in desired.versions:
            known = self._versions.get(asked.name)
            if known is None:
                if asked.name not in self._refused:
                    try:
                        self._begin(asked)
                    except ServerError as error:
                        if asked.name in self._versions:
                            raise  # its engine cannot even be started, and no other version answers
                        self._refused[asked.name] = error
                        logger.error("%s cannot be started: %s", asked.name, error)
            elif known.state == "draining":  # it was wanted no more, and is again
                known.asked, known.state, known.unrouted_at = asked, "ready" if known.is_proved else "starting", 0.0
            elif known.state != "failed":
                known.asked = asked
        # A version that failed is not started again while another that is wanted answers or starts.
        if not any(
            version.name in wanted and version.state in ("ready", "starting") for version in self._versions.values()
        ):
            for asked in desired.versions:
                if (known := self._versions.get(asked.name)) is not None and known.state == "failed":
                    del self._versions[asked.name]
                    try:
                        self._begin(asked)
                    except ServerError as error:
                        self._refused[asked.name] = error
                        logger.error("%s cannot be started again: %s", asked.name, error)
        self._versions = {n: v for n, v in self._versions.items() if n in wanted or v.state != "failed"}
        if not self._versions:
            raise next(iter(self._refused.values()))
        self._publish()

    def _begin(self, asked: FleetVersion) -> None:
        """Starts a version: on the engines that run, if only its adapter differs, else on engines of its own. Raises ServerError."""
        spec = _within(self._spec, asked.spec)
        try:
            pool = next((pool for pool in self._pools if self._can_load(pool, spec)), None)
            if pool is None:
                spec, plan = _planned(spec)
        except ServerError:
            raise
        except Exception as error:  # whatever is wrong with its files must not end the versions that answer
            logger.exception("%s", asked.name)
            raise ServerError(f"its files cannot be read ({type(error).__name__}: {error})") from error
        model, needs = TUNED_MODEL, 0
        if pool is None:
            pool = Pool(name=asked.name, spec=spec, plan=plan)
            self._count(pool, (asked,))
            needs = pool.wanted
            self._pools.append(pool)
        else:
            # A name that was never used: vLLM's prefix cache knows an adapter by its name (vLLM issue 42125).
            model = f"{TUNED_MODEL}-{asked.name}"
            pool.hot[model] = spec.model_dir
            logger.info("%s: loading its adapter into the running engines", asked.name)
        lane = pool.lane(model=model, label=TUNED_MODEL, version=asked.name)
        self._versions[asked.name] = ServedVersion(
            name=asked.name, asked=asked, needs=needs, pool=pool, lane=lane, folder=spec.model_dir
        )
        if not pool.started:
            self._start_engine(pool)

    def _leave_unwanted(self) -> None:
        """Lets the versions that are no longer desired end, once a desired one answers."""
        wanted = {version.name for version in self._desired.versions}
        if any(version.name in wanted and version.state == "ready" for version in self._versions.values()):
            for version in self._versions.values():
                if version.name not in wanted and version.state not in ("draining", "failed"):
                    version.state = "draining"
                    version.unrouted_at = time.monotonic()

    def _can_load(self, pool: Pool, spec: ServeSpec) -> bool:
        """Whether a version's adapter can be loaded into running engines: nothing else differs, and they have room for its rank."""
        if not (pool.loads_adapters and pool.is_proved):
            return False  # one that sleeps, or is being restarted, loads it when it is up
        asked = with_parsers_of(spec, pool.plan)
        own = pool.spec
        same = replace(asked, model_dir=own.model_dir, verify=own.verify, adapters_rank=own.adapters_rank) == own
        return (
            same
            and asked.adapters_rank <= (pool.plan.lora_rank or 0)
            and Path(spec.model_dir).is_dir()
            and same_rendering(Path(spec.model_dir), Path(pool.spec.model_dir))
            and not beyond_engine(Path(spec.model_dir), pool.plan, pool.spec.base_model_dir)
        )

    # ── engines ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _start_engine(self, pool: Pool) -> None:
        # A version that was not compared yet is loaded later: if its adapter ends the engine, the others must be able to start.
        tuned = {
            v.lane.model: v.folder
            for v in self._on(pool)
            if v.state != "failed" and (v.is_proved or not pool.is_proved)
        }
        adapters = tuned if pool.spec.base_model_dir is not None else {}
        name = f"{pool.name}-{pool.started}"
        logger.info("starting %s as engine %s, dtype %s", pool.title, name, pool.plan.dtype)
        if pool.plan.why and not pool.started:
            logger.info("the engine is not vLLM: %s", pool.plan.why)
        pool.started += 1
        used = [gpu for other in self._pools for engine in (*other.engines, *other.leaving) for gpu in engine.gpus]
        # transformers spreads a model over all GPUs that it sees.
        may_have_all = pool.plan.engine.name == "transformers" and len(self._pools) == 1 and pool.most <= 1
        try:
            engine = Engine(
                name,
                spec=pool.spec,
                plan=pool.plan,
                adapters=adapters,
                put=lambda kind, engine, detail: self._events.put((kind, engine, detail)),
                gpus=() if may_have_all or pool.plan.on_cpu else gpus_for(pool.spec, used=used),
                # The engines of a pool divide the cores; those of the version that an update replaces end soon.
                sharing=pool.most if len(self._pools) > 1 or pool.most > 1 else 0,
            )
        except OSError as error:  # no more processes, files or disk
            self._crashed(pool, name, EngineFailed(f"{pool.title} cannot be started: {error}"), was_up=False)
        else:
            pool.engines.append(engine)

    def _on(self, pool: Pool) -> list[ServedVersion]:
        return [version for version in self._versions.values() if version.pool is pool]

    def _pool_of(self, engine: Engine) -> Pool | None:
        return next((pool for pool in self._pools if engine in pool.engines or engine in pool.leaving), None)

    def _retire(self, engine: Engine, *, at_once: bool = False) -> None:
        """Ends an engine in a thread: it takes seconds, unless it is killed at once."""

        def end() -> None:
            engine.end(quiet=True, at_once=at_once)
            self._on_engine_end(engine.socket)

        thread = threading.Thread(target=end)
        thread.start()
        self._ending = [one for one in self._ending if one.is_alive()] + [thread]

    def _handle(self, kind: str, subject: Any, detail: Any) -> None:
        if kind == "proved":
            self._proved(subject, detail)
        elif kind == "loaded":
            self._adapters.loaded(subject, *detail)
        elif kind == "unloaded":
            self._adapters.interrupted(subject)
        elif (pool := self._pool_of(subject)) is not None:
            if kind == "up" and subject in pool.engines:
                self._came_up(pool, subject)
            elif kind == "refused":
                self._lost(
                    pool, subject, EngineFailed, f"{pool.title} started, but {detail}: {{story}}", by_itself=False
                )
            elif kind == "ended":
                self._lost(pool, subject, EngineFailed, f"{pool.title} ended unexpectedly: {{story}}")
            elif kind == "hung":
                what = f"{pool.title} hangs: {detail}. It was stopped. {{story}}"
                self._lost(pool, subject, EngineHung, what, by_itself=False)

    def _came_up(self, pool: Pool, engine: Engine) -> None:
        loaded = {v.lane.model for v in self._on(pool)} if pool.spec.base_model_dir is None else set()
        engine.models = {*engine.started_with, *loaded, *([BASE_MODEL] if pool.spec.base_model_dir else [])}
        for lane in (pool.base, *(version.lane for version in self._on(pool))):
            lane.max_model_len = engine.max_model_len
        engine.is_up = engine.takes = True
        pool.failed_starts = 0
        logger.info("engine %s answers after %.1f s", engine.name, time.monotonic() - engine.began_at)

    def _lost(
        self, pool: Pool, engine: Engine, kind: type[ServerError], message: str, *, by_itself: bool = True
    ) -> None:
        """Handles the end of an engine that nobody asked for."""
        error = kind(message.replace("{story}", engine.story(by_itself=by_itself)))
        self._retire(engine, at_once=kind is EngineHung)  # its requests wait until it has ended
        suspect = self._adapters.interrupted(engine)
        if engine in pool.leaving:  # it was to end in any case, and what it answered is lost
            pool.leaving.remove(engine)
            logger.error("engine %s ended while it answered its last requests: %s", engine.name, error)
            return
        pool.engines.remove(engine)
        hot = [one for one in self._all_tuned() if one.pool is pool and one.lane.model in pool.hot]
        for tuned in hot:
            was_tried = tuned.on_trial and tuned.lane.model in engine.models
            if tuned.state == "starting" and (was_tried or tuned.lane.model == suspect):
                self._fail_tuned(tuned, EngineFailed(f"engine {engine.name} ended when it got this adapter: {error}"))
        if pool in self._pools:  # it was given up if that was its last version
            self._crashed(pool, engine.name, error, was_up=engine.is_up)

    def _crashed(self, pool: Pool, name: str, error: ServerError, *, was_up: bool) -> None:
        """Decides whether a pool gets a new engine for one that ended or did not start."""
        if not pool.is_proved:
            self._fail(pool, error)
            return
        now = time.monotonic()
        if not was_up and pool.up() and all(version.state != "starting" for version in self._on(pool)):
            # One more than the machine can hold, perhaps. It must not use up the restarts of those that answer.
            pool.failed_starts += 1
            pause_s = min(_FIRST_PAUSE_S * 2 ** min(pool.failed_starts, 20), _CRASHES_WITHIN_S)
            pool.further_at, pool.last_crash = now + pause_s, str(error).splitlines()[0]
            logger.error("engine %s did not start; the next attempt is in %.0f s: %s", name, pause_s, error)
            return
        pool.crashes.append(now)
        while pool.crashes[0] < now - _CRASHES_WITHIN_S:
            pool.crashes.popleft()
        pool.last_crash = str(error).splitlines()[0]
        limit, count = pool.spec.restarts, len(pool.crashes)
        logger.error(
            "engine %s ended; %d of %d restarts within %.0f s are used: %s",
            name,
            min(count, limit),
            limit,
            _CRASHES_WITHIN_S,
            error,
        )
        if count <= limit:
            pool.restarts += 1
            pool.restart_at = now + min(_FIRST_PAUSE_S * 2 ** (count - 1), _LONGEST_PAUSE_S)
            return
        pool.restart_at = pool.crashes[0] + _CRASHES_WITHIN_S
        versions = [version for version in self._on(pool) if version.state != "failed"]
        starting = [version for version in versions if version.state == "starting"]
        if not pool.engines or starting == versions:
            self._fail(pool, error)
        for version in starting:  # the engines that are left are not as many as it needs
            if version.state == "starting":
                self._fail_version(version, error)

    def _fail(self, pool: Pool, error: ServerError) -> None:
        """Gives up a pool, with the versions on it. Raises the error if no other version answers."""
        for version in self._on(pool):
            self._fail_version(version, error)
        self._remove(pool)
        for engine in (*pool.engines, *pool.leaving):
            self._retire(engine)
        pool.engines.clear()
        if not any(version.state in ("ready", "starting") for version in self._versions.values()):
            self._publish()
            raise error  # none that answers, or will

    def _remove(self, pool: Pool) -> None:
        """Takes a pool out. A request that waits for one of its engines waits no longer."""
        self._pools.remove(pool)
        pool.wakes = False
        for lane in self._lanes_of(pool):
            lane.wakes = False

    def _fail_version(self, version: ServedVersion, error: ServerError) -> None:
        version.state, version.reason = "failed", str(error)
        version.pool.hot.pop(version.lane.model, None)
        logger.error("%s failed: %s", version.name, error)

    # ── twice a second ──────────────────────────────────────────────────────────────────────────────────────────────

    def _tick(self) -> None:
        now = time.monotonic()
        self._sleep_or_wake()
        self._leave_unwanted()
        for version in list(self._versions.values()):
            if version.state == "draining":
                self._drain(version, now)
        taken = {*self._spec.models, *(version.name for version in self._desired.versions)}
        self._adapters.want(self._desired.adapters, self._pools, taken=taken)
        for pool in list(self._pools):
            self._size(pool, now)
            self._late(pool, now)
            own = {version.lane.model for version in self._on(pool) if version.state != "failed"}
            ready = {version.lane.model for version in self._on(pool) if version.state == "ready"}
            self._adapters.load(pool, own=own, ready=ready)
        for tuned in self._all_tuned():
            if tuned.state == "starting":
                self._advance(tuned)

    def _is_idle(self) -> bool:
        limit_s = self._spec.idle_after_s
        return limit_s is not None and self._is_ready and self._activity.idle_s >= limit_s

    def _sleep_or_wake(self) -> None:
        limit_s = self._spec.sleep_after_s
        if limit_s is None or not self._is_ready:
            return
        is_settled = all(tuned.state in ("ready", "failed") for tuned in self._all_tuned())
        if self._is_asleep and (self._routes.waiting or self._activity.open or not is_settled):
            self._is_asleep = False
            logger.info("%s: the engines start again", "a request came" if is_settled else "the service changes")
        elif not self._is_asleep and is_settled and self._activity.idle_s >= limit_s:
            self._is_asleep = True
            logger.info("no request for %g s: the engines end until one comes", limit_s)
            for pool in self._pools:  # the request that wakes it must not wait for a pause of before
                pool.restart_at = pool.further_at = 0.0
        for pool in self._pools:
            pool.wakes = self._is_asleep or (pool.wakes and pool.wanted > 0 and not pool.up())
        self._routes.is_asleep = any(pool.wakes for pool in self._pools)

    def _drain(self, version: ServedVersion, now: float) -> None:
        pool = version.pool
        others = [one for one in self._on(pool) if one is not version and one.state != "failed"]
        lanes = [version.lane] if others else self._lanes_of(pool)
        if not is_drained(lanes, unrouted_at=version.unrouted_at, now=now):
            return
        del self._versions[version.name]
        pool.hot.pop(version.lane.model, None)
        if others:
            # What a restarted engine reads must not be in the folder of the version that is gone.
            last = next((one for one in reversed(others) if one.is_proved), others[-1])
            if pool.plan.tokenizer_dir == Path(version.folder):
                pool.plan = dataclasses.replace(pool.plan, tokenizer_dir=Path(last.folder))
            pool.spec = replace(pool.spec, model_dir=last.folder)
        else:
            self._remove(pool)
            for engine in (*pool.engines, *pool.leaving):
                self._retire(engine)
            pool.engines.clear()
        logger.info("%s has answered its last request", version.name)

    def _size(self, pool: Pool, now: float) -> None:
        """Starts and ends engines until the pool has as many as its versions need."""
        versions = [version for version in self._on(pool) if version.state != "failed"]
        self._count(pool, [version.asked for version in versions if version.state != "draining"])
        wanted = 0 if self._is_asleep else pool.wanted
        if not pool.is_proved:
            return  # one engine, until it was compared
        if all(version.state == "draining" for version in versions):
            # Its engines stay as they are. One that ended is replaced if requests wait for it.
            has_requests = any(lane.open for lane in self._lanes_of(pool))
            wanted = max(len(pool.engines), int(has_requests))
        for _ in range(wanted - len(pool.engines)):
            is_time = now >= pool.restart_at and (not pool.engines or now >= pool.further_at)
            if pool in self._pools and is_time:  # as the last one may not have been able to start
                self._start_engine(pool)
        for engine in sorted(pool.engines, key=lambda one: (one.is_up, one.open))[: max(0, len(pool.engines) - wanted)]:
            engine.takes = False
            engine.leaving_at = now
            pool.engines.remove(engine)
            pool.leaving.append(engine)
        for engine in list(pool.leaving):
            if is_drained([engine], unrouted_at=engine.leaving_at, now=now):
                pool.leaving.remove(engine)
                self._retire(engine)

    def _count(self, pool: Pool, asked: Sequence[FleetVersion]) -> None:
        """Sets how many engines a pool should have: as many as its versions ask for, or as its requests need."""
        pool.wanted = pool.most = least = max((version.instances for version in asked), default=0)
        settings = next((version.autoscaling for version in asked if version.autoscaling is not None), None)
        if settings is None or least == 0:
            pool.scaler = None
            return
        pool.most = max(least, settings.max_instances)
        if pool.scaler is None:
            # A version that replaces another one gets its requests all at once.
            level = max((other.wanted for other in self._pools), default=least)
            pool.scaler = Scaler(min(max(level, least), pool.most))
        if not any(version.state == "ready" for version in self._on(pool)):
            pool.wanted = min(max(pool.scaler.level, least), pool.most)  # it has no requests yet
            return
        target = settings.target_requests or TARGET_REQUESTS[pool.plan.on_cpu]
        requests = sum(lane.open for lane in self._lanes_of(pool))
        before = pool.scaler.level
        pool.wanted = pool.scaler.follow(requests, least=least, settings=settings, target=target, now=time.monotonic())
        if pool.wanted != before:
            logger.info("%s: %d open requests: %d engines instead of %d", pool.name, requests, pool.wanted, before)

    def _late(self, pool: Pool, now: float) -> None:
        limit_s = pool.spec.start_timeout_s
        for engine in list(pool.engines):
            if engine in pool.engines and not engine.is_up and now - engine.began_at > limit_s:
                what = (
                    f"{pool.title} did not answer within start_timeout_s={limit_s:g}: set a higher value, or look for the "
                    "cause: {story}"
                )
                self._lost(pool, engine, StartTimeout, what, by_itself=False)

    def _lanes_of(self, pool: Pool) -> list[Lane]:
        return [pool.base, *(one.lane for one in self._all_tuned() if one.pool is pool)]

    def _all_tuned(self) -> list[Tuned]:
        return [*self._versions.values(), *self._adapters]

    # ── trials ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _advance(self, tuned: Tuned) -> None:
        """Compares a model once its engines have it, then lets it answer."""
        up = tuned.pool.up()
        if why := next((e.failed[tuned.lane.model] for e in up if tuned.lane.model in e.failed), ""):
            self._fail_tuned(tuned, EngineFailed(why))
            return
        having = [engine for engine in up if tuned.lane.model in engine.models]
        if not having or len(having) < len(up):
            return
        if not tuned.is_proved:
            if not tuned.on_trial:
                tuned.on_trial = True
                self._publish()
                threading.Thread(target=self._try, args=(tuned,), daemon=True).start()
            return
        if isinstance(tuned, ServedVersion):
            needs = min(tuned.pool.wanted, max(tuned.asked.instances, tuned.needs))
            if len(up) < needs or not self._adapters.is_complete(tuned.pool, self._desired.adapters):
                return
            tuned.seconds = round(time.monotonic() - tuned.began_at, 1)
        tuned.state = "ready"
        self._activity.restart()  # what was just asked for is not unused, and a long start is no time without requests
        logger.info("%s is ready", tuned.name)
        if isinstance(tuned, ServedVersion) and not self._is_ready:
            self._is_ready = True
            self._publish()
            self._on_ready(tuned.pool.title, tuned.parity)

    def _try(self, tuned: Tuned) -> None:
        """Compares a model with its training, in a thread."""
        result: Parity | ServerError | None
        spec = replace(tuned.pool.spec, model_dir=tuned.folder)
        if isinstance(tuned, ServedVersion):
            spec = replace(spec, verify=tuned.asked.spec.verify)
        try:
            result = compared(self._asking, spec, tuned.pool.plan, version=_trial(tuned))
        except ServerError as error:
            result = error
            if type(error) is ServerError:  # it was not answered
                for engine in tuned.pool.up():
                    engine.has_ended(within_s=END_LIMIT_S)  # then that is the cause, and is reported first
        except Exception as error:
            logger.exception("the comparison of %s", tuned.name)
            result = ServerError(
                f"its comparison with the trained model failed ({type(error).__name__}: {error}); verify=False omits it"
            )
        self._events.put(("proved", tuned, result))

    def _proved(self, tuned: Tuned, result: Parity | ServerError | None) -> None:
        tuned.on_trial = False
        if tuned.state != "starting" or tuned.pool not in self._pools:
            return
        if isinstance(result, ServerError):
            engine = next(iter(tuned.pool.engines), None)
            plain = type(result) is ServerError and engine is not None
            story = engine.story(by_itself=False) if plain and engine is not None else ""
            self._fail_tuned(
                tuned, EngineFailed(f"{tuned.pool.title} started, but {result}: {story}") if plain else result
            )
            return
        tuned.is_proved = tuned.pool.is_proved = True
        tuned.parity = result

    def _fail_tuned(self, tuned: Tuned, error: ServerError) -> None:
        if isinstance(tuned, ServedVersion):
            if any(other is not tuned and other.state != "failed" for other in self._on(tuned.pool)):
                self._fail_version(tuned, error)  # the engines serve another version too
            else:
                self._fail(tuned.pool, error)
        elif isinstance(tuned, ServedAdapter):
            fail(tuned, str(error))

    # ── what others see ─────────────────────────────────────────────────────────────────────────────────────────────

    def _publish(self) -> None:
        self._routes.table = self._table()
        state = self._state()
        if state != self._told:
            try:
                state.write(self._work_dir / FLEET_STATE_FILE)
                self._told = state
            except OSError as error:  # a full disk does not end the service
                logger.error("the state cannot be written: %s", error)

    def _table(self) -> Table:
        # The first version answers as soon as it is proved, also while its other instances start.
        answering = [
            v for v in self._versions.values() if v.state == "ready" or (v.state == "starting" and v.is_proved)
        ]
        ready = [v for v in answering if v.state == "ready"] or answering
        for tuned in self._all_tuned():
            pool, model = tuned.pool, tuned.lane.model
            # An engine that has just started may have to load it first.
            is_awaited = tuned.state == "ready" and not any(model in e.models or model in e.failed for e in pool.up())
            pool.base.wakes = pool.wakes
            tuned.lane.wakes = pool.wakes or (is_awaited and bool(pool.up()))
        shares = [(version.asked.share, version.lane) for version in ready]
        if shares and not any(share for share, _ in shares):
            shares = [(1.0, lane) for _, lane in shares]
        lanes: dict[str, list[tuple[float, Lane]]] = {}
        if ready:
            lanes[TUNED_MODEL] = lanes[self._spec.service_name] = shares
            if len(ready) > 1:
                for version in ready:
                    lanes.setdefault(version.name, [(1.0, version.lane)])  # the service itself may be named v2
            main = max(ready, key=lambda version: version.asked.share).pool
            if main.spec.base_model_dir is not None:
                lanes[BASE_MODEL] = [(1.0, main.base)]
            for adapter in self._adapters.answering(main):
                adapter.lane.max_model_len = main.base.max_model_len
                lanes[adapter.name] = [(1.0, adapter.lane)]
        trials = {_trial(one): self._trial_lanes(one) for one in self._all_tuned() if one.on_trial}
        instances: Counter[tuple[str, str]] = Counter()
        for version in self._versions.values():
            if version.state != "failed":
                instances[version.name, "ready"] = len(version.pool.up())
                instances[version.name, "starting"] = len(version.pool.engines) - len(version.pool.up())
                instances[version.name, "draining"] = len(version.pool.leaving)
        restarts = {version.name: version.pool.restarts for version in self._versions.values()}
        return Table(lanes=lanes, trials=trials, instances=instances, restarts=restarts)

    def _trial_lanes(self, tuned: Tuned) -> Mapping[str, Lane]:
        return {TUNED_MODEL: tuned.lane, self._spec.service_name: tuned.lane, BASE_MODEL: tuned.pool.base}

    def _state(self) -> FleetState:
        versions = tuple(
            VersionState(
                name=version.name,
                state=version.state,
                instances=0 if version.state == "failed" else len(version.pool.up()),
                engine=version.pool.title,
                reason=version.reason,
                parity=version.parity,
                seconds=version.seconds,
                restarts=version.pool.restarts,
                last_crash=version.pool.last_crash,
                max_lora_rank=version.pool.plan.lora_rank if version.pool.loads_adapters else None,
            )
            for version in self._versions.values()
        )
        refused = (VersionState(name=name, state="failed", reason=str(why)) for name, why in self._refused.items())
        return FleetState(
            generation=self._desired.generation,
            versions=(*versions, *refused),
            adapters=tuple(self._adapters.state(asked) for asked in self._desired.adapters),
        )


def _within(service: ServeSpec, version: ServeSpec) -> ServeSpec:
    """Returns a version's spec with what is the service's own: its name, address, folder and time limits."""
    own = (
        *("service_name", "host", "port", "work_dir"),
        *("start_timeout_s", "hang_after_s", "idle_after_s", "sleep_after_s"),
    )
    return replace(version, **{name: getattr(service, name) for name in own})


def _planned(spec: ServeSpec) -> tuple[ServeSpec, EnginePlan]:
    plan = check(spec)
    return with_parsers_of(spec, plan), plan


def with_parsers_of(spec: ServeSpec, plan: EnginePlan) -> ServeSpec:
    """Returns the spec with the model's parsers among the engine's options."""
    if plan.engine.name != "vllm":
        return spec
    found = with_parsers(
        spec.engine_args, model_name=spec.model_name, tokenizer_dir=plan.tokenizer_dir, model_dir=Path(spec.model_dir)
    )
    return replace(spec, engine_args=found)


def _trial(tuned: Tuned) -> str:
    """Returns the name under which a model on trial is asked."""
    return tuned.name if isinstance(tuned, ServedVersion) else f"adapter {tuned.lane.model}"
