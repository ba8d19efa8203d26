"""The service over engines that start at once: versions, instances, adapters, restarts and sleep, as a client sees them."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import openai
import psutil
import pytest

from palate_recipes.errors import ParityFailed
from palate_recipes.specs.fleet import FLEET_FILE, Fleet
from palate_recipes.specs.run import Autoscaling
from palate_recipes.specs.serve import IDLE_FILE
from palate_server import adapters, listener, metrics, pools, proxy, service
from tests.support.small_service import TOKEN, Answer, Load, SmallService, small

__all__ = ["small"]  # a fixture

Small = Callable[..., SmallService]


def kill(pid: int, signum: int = signal.SIGKILL) -> None:
    os.kill(pid, signum)


def test_it_answers_by_all_its_names_and_tells_its_state(small: Small) -> None:
    running = small(base=True)
    running.start()
    answers = {name: running.ask(model=name) for name in ("default", "svc", "base")}
    assert {name: (one.model, one.folder) for name, one in answers.items()} == {
        "default": ("default", "one"),
        "svc": ("default", "one"),
        "base": ("base", "base"),
    }
    [version] = running.state().versions
    assert (version.name, version.state, version.instances, version.engine) == ("v1", "ready", 1, "small 1")
    assert version.seconds > 0
    with pytest.raises(openai.NotFoundError, match="This service has: default, svc, base"):
        running.ask(model="v1")  # while there is one version, it needs no name
    assert running.client().models.list().data[0].model_dump()["max_model_len"] == 512
    assert running.end() == 0


def test_two_instances_share_the_requests(small: Small) -> None:
    running = small()
    running.want(running.version("v1", instances=2))
    running.start()
    assert running.state().versions[0].instances == 2
    with ThreadPoolExecutor(6) as pool:
        whole = [pool.submit(running.ask, f"until:{running.go}") for _ in range(6)]
        running.open(6)
        running.go.touch()
        pids = Counter(one.result().pid for one in whole)
    assert sorted(pids.values()) == [3, 3]  # the least busy one gets each
    assert set(pids) == {process.pid for process in running.engines()}


def test_requests_survive_the_end_of_one_of_two_engines_and_streams_tell_of_it(small: Small) -> None:
    running = small()
    running.want(running.version("v1", instances=2))
    running.start()
    streams = [running.stream("tokens:1000 delay:0.05") for _ in range(2)]
    begun = [Answer(next(stream)).pid for stream in streams]
    assert len(set(begun)) == 2
    with ThreadPoolExecutor(4) as pool:
        whole = [pool.submit(running.ask, f"until:{running.go}") for _ in range(4)]
        running.open(6)
        kill(begun[0])
        running.go.touch()
        assert {one.result().pid for one in whole} == {begun[1]}
    with pytest.raises(openai.APIError, match="The engine ended within this answer"):
        list(streams[0])
    assert next(streams[1])  # the other goes on
    streams[1].close()
    running.wait(lambda: running.state().versions[0].restarts == 1 and running.state().versions[0].instances == 2)
    assert "killed by signal 9" in running.state().versions[0].last_crash


def test_requests_wait_for_the_only_engine_to_be_started_again(small: Small) -> None:
    running = small(restarts=2)
    running.start()
    first = running.ask().pid
    kill(first)
    assert running.ask().pid != first
    with pytest.raises(openai.APIError):
        running.ask("die:0")  # each engine that gets it ends, so it is not tried forever
    assert running.ended() == 1
    assert "ended unexpectedly: it was killed by signal 9 (SIGKILL)" in running.error().splitlines()[0]
    [version] = running.state().versions
    assert (version.state, version.restarts) == ("failed", 2)
    assert "killed by signal 9" in version.reason


def test_a_frozen_engine_is_replaced_and_its_requests_are_answered(small: Small) -> None:
    running = small(hang_after_s=1)
    running.start()
    first = running.ask().pid
    kill(first, signal.SIGSTOP)
    assert running.ask().pid != first
    assert "hangs: it has not answered for 1 s" in running.state().versions[0].last_crash


def test_an_engine_that_generates_nothing_is_replaced_and_a_busy_one_is_not(small: Small) -> None:
    running = small(hang_after_s=1)
    running.start()
    first = running.ask().pid
    # Longer than the limit: one makes tokens, the other is silent, and the engine answers others meanwhile.
    with ThreadPoolExecutor(1) as pool:
        silent = pool.submit(running.ask, "delay:3")
        assert len(list(running.stream("tokens:20 delay:0.1"))) == 20
        assert silent.result().pid == first
    assert running.state().versions[0].restarts == 0
    assert running.ask(f"stick:{running.go}").pid != first
    assert "generated no token within 2 s" in running.state().versions[0].last_crash


def test_an_engine_that_hangs_is_replaced_though_its_clients_leave_and_come(small: Small) -> None:
    """Each new request counted as progress, so clients with a short timeout kept an engine that answered none of them."""
    running = small(hang_after_s=1)
    running.start()
    first = running.ask().pid
    [engine] = running.engines()
    asked = {"model": "default", "prompt": f"stick:{running.go}"}
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=running.url, headers=headers, timeout=0.3, trust_env=False) as client:
        deadline = time.monotonic() + 20
        while engine.is_running() and time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                client.post("/v1/completions", json=asked)
            assert client.post("/v1/completions", json={"model": 7}).status_code == 400
    assert running.ask().pid != first
    assert "generated no token within 2 s" in running.state().versions[0].last_crash


@pytest.mark.parametrize("base", [False, True], ids=["own-engines", "same-engines"])
def test_an_update_fails_no_request_and_lets_streams_end(small: Small, base: bool) -> None:
    running = small(base=base)
    running.start()
    stream = running.stream("tokens:1000 delay:0.05")
    old = Answer(next(stream))
    with Load(running) as load:
        running.want(running.version("v2", running.folder("two")), settles=False)
        running.wait(lambda: running.states() == {"v1": "draining", "v2": "ready"})
        new = running.ask()
        assert (new.folder, new.pid == old.pid) == ("two", base)
        assert [next(stream) for _ in range(5)]
        assert {process.pid for process in running.engines()} == {old.pid, new.pid}
        stream.close()
        running.wait_for(v2="ready")
        running.wait(lambda: {process.pid for process in running.engines()} == {new.pid})
    assert load.failures == []
    assert load.folders() == {"one", "two"}
    assert running.ask().folder == "two"
    if base:  # a new engine has what the old one had been given while it ran
        kill(new.pid)
        assert running.ask().folder == "two"


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"dies": True, "says": "ValueError: no such kernel"}, "killed by signal 9"),
        ({"refuses": "no kernel"}, "answered its first request with 500"),
        (None, "is not a folder"),
    ],
)
def test_an_update_that_cannot_start_leaves_the_old_version(
    small: Small, how: dict[str, object] | None, says: str
) -> None:
    running = small()
    running.start()
    pid = running.ask().pid
    with Load(running) as load:
        folder = running.folder("two", **how) if how else "/nowhere"
        state = running.want(running.version("v2", folder))
    assert load.failures == []
    assert {answer.pid for answer in load.answers} == {pid}
    failed = next(version for version in state.versions if version.name == "v2")
    assert (failed.state, failed.instances) == ("failed", 0)
    assert says in failed.reason
    assert running.states()["v1"] == "ready"
    # The next one is not affected by it.
    running.want(running.version("v3", running.folder("three")), settles=False)
    running.wait_for(v3="ready")
    assert running.ask().folder == "three"


@pytest.mark.parametrize("base", [False, True], ids=["own-engines", "same-engines"])
def test_an_update_that_differs_from_its_training_leaves_the_old_version(
    small: Small, base: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(asking: object, spec: object, plan: object, *, version: str) -> None:
        if version == "v2":
            assert (
                Answer(
                    asking.json("/v1/completions", {"prompt": ""}, version="v2", timeout_s=9)["choices"][0]["text"]
                ).folder
                == "two"
            )  # type: ignore[attr-defined]
            raise ParityFailed("it does not answer as the trained model")

    monkeypatch.setattr(service, "compared", differs)
    running = small(base=base)
    running.start()
    with Load(running) as load:
        state = running.want(running.version("v1", share=0.5), running.version("v2", running.folder("two"), share=0.5))
    assert load.failures == []
    assert load.folders() == {"one"}
    assert [(version.name, version.state) for version in state.versions] == [("v1", "ready"), ("v2", "failed")]
    assert state.versions[1].reason == "it does not answer as the trained model"
    running.wait(lambda: len(running.engines()) == 1)
    running.want(running.version("v1"))
    assert running.states() == {"v1": "ready"}


def test_an_adapter_that_ends_the_engine_fails_alone(small: Small) -> None:
    running = small(base=True, restarts=1)
    running.start()
    state = running.want(running.version("v2", running.folder("two", dies=True)))
    assert {version.name: version.state for version in state.versions} == {"v1": "ready", "v2": "failed"}
    assert "ended when it got this adapter" in state.versions[1].reason
    assert running.ask().folder == "one"
    assert running.state().versions[0].restarts == 1


def test_versions_share_the_requests_and_have_names(small: Small) -> None:
    running = small()
    running.start()
    running.want(running.version("v1", share=0.7), running.version("v2", running.folder("two"), share=0.3))
    assert {running.ask(model=name).folder for name in ("v1",)} == {"one"}
    assert {running.ask(model=name).folder for name in ("v2",)} == {"two"}
    body = {"prompt": ""}
    counts: Counter[str] = Counter()
    with httpx.Client(headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False, timeout=30) as client:
        for _ in range(1000):
            counts[
                Answer(client.post(f"{running.url}/v1/completions", json=body).json()["choices"][0]["text"]).folder
            ] += 1
    assert 240 < counts["two"] < 360  # four standard deviations
    page = running.metrics()
    assert 'palate_version_requests_total{status="200",version="v2"}' in page
    assert 'palate_instances{state="ready",version="v1"} 1.0' in page


def test_scaling_fails_no_request(small: Small) -> None:
    running = small()
    running.start()
    with Load(running) as load:
        for count in (3, 1):
            running.want(running.version("v1", instances=count), settles=False)
            running.wait(lambda count=count: running.state().versions[0].instances == count)  # type: ignore[misc]
            running.wait(lambda count=count: len(running.engines()) == count)  # type: ignore[misc]
            running.wait(lambda: len({answer.pid for answer in load.answers}) == 3)
    assert load.failures == []


SCALING = Autoscaling(max_instances=3, target_requests=2, upscale_delay_s=0.2, downscale_delay_s=0.5)


def test_the_number_of_engines_follows_the_requests(small: Small) -> None:
    running = small()
    running.want(running.version("v1", autoscaling=SCALING))
    running.start()
    assert len(running.engines()) == 1
    with ThreadPoolExecutor(12) as pool:
        whole = [pool.submit(running.ask, f"until:{running.go}") for _ in range(3)]
        running.wait(lambda: running.state().versions[0].instances == 2)  # 3 requests, 2 for each
        whole += [pool.submit(running.ask, f"until:{running.go}") for _ in range(9)]
        running.wait(lambda: running.state().versions[0].instances == 3)  # 6 would be needed
        running.go.touch()
        for one in whole:
            one.result()
    running.wait(lambda: len(running.engines()) == 1)
    with Load(running, prompt="tokens:2 delay:0.2") as load:
        running.wait(lambda: running.state().versions[0].instances == 2)
        running.want(running.version("v1", instances=1))  # a fixed number
        running.wait(lambda: len(running.engines()) == 1)
    assert load.failures == []


def test_an_update_starts_as_many_engines_as_the_requests_have_now(small: Small) -> None:
    running = small()
    running.want(running.version("v1", autoscaling=SCALING))
    running.start()
    with Load(running, prompt="tokens:2 delay:0.2", threads=6) as load:
        running.wait(lambda: running.state().versions[0].instances == 3)
        new = running.version("v2", running.folder("two"), autoscaling=SCALING)
        running.want(new, settles=False)
        running.wait(lambda: running.states().get("v2") == "ready")
        assert next(one.instances for one in running.state().versions if one.name == "v2") == 3
        running.wait_for(v2="ready")
    assert load.failures == []
    assert load.folders() == {"one", "two"}


def test_engines_that_follow_the_requests_sleep_and_wake(small: Small) -> None:
    running = small(sleep_after_s=0.3)
    running.want(running.version("v1", autoscaling=SCALING))
    running.start()
    running.ask()
    running.wait(lambda: running.engines() == [])
    assert running.ask().folder == "one"
    assert len(running.engines()) == 1


def test_an_engine_that_cannot_be_added_uses_up_no_restart_of_the_others(
    small: Small, caplog: pytest.LogCaptureFixture
) -> None:
    running = small(restarts=1)
    running.want(running.version("v1", autoscaling=SCALING))
    running.start()
    first = running.ask().pid
    running.folder("one", dies=True)
    with ThreadPoolExecutor(6) as pool:
        whole = [pool.submit(running.ask, f"until:{running.go}") for _ in range(6)]
        running.wait(lambda: caplog.text.count("did not start; the next attempt") >= 3)
        running.go.touch()
        assert {one.result().pid for one in whole} == {first}
    [version] = running.state().versions
    assert (version.state, version.restarts) == ("ready", 0)
    assert "ended unexpectedly" in version.last_crash
    running.folder("one")
    kill(first)
    assert running.ask().folder == "one"


def test_a_service_that_sleeps_forgets_the_pause_of_an_engine_that_could_not_be_added(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = small(sleep_after_s=1.0)
    running.start()
    running.folder("one", dies=True)
    monkeypatch.setattr(service, "_FIRST_PAUSE_S", 300.0)
    running.want(running.version("v1", instances=2), settles=False)
    running.wait(lambda: "ended unexpectedly" in running.state().versions[0].last_crash)
    running.folder("one")
    running.wait(lambda: running.engines() == [])
    assert running.ask().folder == "one"


def test_an_adapter_that_a_further_engine_did_not_load_is_loaded_later(
    small: Small, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(adapters, "_AGAIN_S", 0.3)
    running = small(base=True)
    running.start()
    extra = running.adapter("extra", running.folder("extra"))
    running.want(running.version("v1"), adapters=(extra,))
    running.folder("extra", refuses="no memory")
    running.want(running.version("v1", instances=2), adapters=(extra,), settles=False)
    running.wait(lambda: "v1-1 did not load it" in caplog.text)
    running.folder("extra")
    with Load(running, model="extra") as load:
        running.wait(lambda: len({answer.pid for answer in load.answers}) == 2)
    assert load.failures == []


def test_adapters_come_change_and_go_while_requests_run(small: Small) -> None:
    running = small(base=True)
    running.start()
    old, new = (running.adapter("extra", running.folder(name), digest) for name, digest in (("old", "a"), ("new", "b")))
    version = running.version("v1")
    state = running.want(version, adapters=(old,))
    assert [(one.name, one.state) for one in state.adapters] == [("extra", "ready")]
    assert running.ask(model="extra").folder == "old"
    with Load(running, model="extra") as load:
        running.want(version, adapters=(new,))
        running.wait(lambda: running.ask(model="extra").folder == "new")
        running.want(version, adapters=(old,))  # back, perhaps before the old one has gone
        running.wait(lambda: running.ask(model="extra").folder == "old")
        running.want(version, adapters=(new,))
        running.wait(lambda: running.ask(model="extra").folder == "new")
        # A new instance and a restarted engine have it too, before they answer for it.
        running.want(running.version("v1", instances=2), adapters=(new,))
        running.wait(lambda: running.state().versions[0].instances == 2)
        running.wait(lambda: len({running.ask(model="extra").pid for _ in range(6)}) == 2)
        kill(running.engines()[0].pid)
        running.wait(lambda: len({running.ask(model="extra").pid for _ in range(6)}) == 2)
    assert load.failures == []
    assert load.folders() == {"old", "new"}
    stream = running.stream("tokens:1000 delay:0.02", model="extra")
    next(stream)
    running.want(version)
    with pytest.raises(openai.NotFoundError):
        running.wait(lambda: not running.ask(model="extra"))
    assert [next(stream) for _ in range(20)]
    stream.close()


def test_an_adapter_that_cannot_be_served_has_a_reason_and_the_former_one_answers(small: Small) -> None:
    running = small(base=True)
    running.start()
    large = Path(running.folder("large"))
    (large / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 64}')
    damaged = Path(running.folder("damaged"))
    (damaged / "adapter_config.json").write_text('{"peft_type": ')
    good = running.adapter("good", running.folder("good"))
    running.want(running.version("v1"), adapters=(good,))
    state = running.want(
        running.version("v1"),
        adapters=(
            running.adapter("large", str(large)),
            running.adapter("damaged", str(damaged)),
            running.adapter("base", running.folder("good")),
            running.adapter("good", running.folder("refused", refuses="weights of another model"), "b"),
        ),
    )
    reasons = {adapter.name: adapter.reason for adapter in state.adapters}
    assert {adapter.state for adapter in state.adapters} == {"failed"}
    assert "its rank is 64, and the engines have room for 16" in reasons["large"]
    assert "is not valid JSON" in reasons["damaged"]
    assert "another model named 'base'" in reasons["base"]
    assert "weights of another model" in reasons["good"]
    assert running.ask(model="good").folder == "good"
    # Mended, under the same digest, once it was not desired for a moment.
    running.want(running.version("v1"), adapters=(good,))
    mended = running.adapter("good", running.folder("refused"), "b")
    assert [one.state for one in running.want(running.version("v1"), adapters=(mended,)).adapters] == ["ready"]


def test_an_update_with_own_engines_takes_the_adapters_along_and_waits_for_their_streams(small: Small) -> None:
    running = small(base=True)
    running.start()
    extra = running.adapter("extra", running.folder("extra"))
    running.want(running.version("v1"), adapters=(extra,))
    stream = running.stream("tokens:1000 delay:0.05", model="extra")
    old = Answer(next(stream)).pid
    with Load(running, model="extra") as load:
        v2 = running.version("v2", running.folder("two"), max_model_len=256)
        running.want(v2, adapters=(extra,), settles=False)
        running.wait(lambda: running.states() == {"v1": "draining", "v2": "ready"})
        assert running.ask(model="extra").pid != old
        assert [next(stream) for _ in range(20)]
        stream.close()
        running.wait_for(v2="ready")
    assert load.failures == []


def test_engines_sleep_until_a_request_comes(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    running = small(base=True, sleep_after_s=0.3)
    running.start()
    running.ask()
    running.wait(lambda: running.engines() == [])
    assert httpx.get(f"{running.url}/health", trust_env=False).status_code == 200
    assert running.client().models.list().data
    assert running.engines() == []
    assert running.ask().folder == "one"
    # A change wakes it as long as it takes.
    caplog.set_level("INFO", logger="palate_server.service")
    running.wait(lambda: running.engines() == [])
    running.want(running.version("v2", running.folder("two")), settles=False)
    running.wait_for(v2="ready")
    assert "v2: loading its adapter" in caplog.text  # into the engine that it wakes: no second one
    running.wait(lambda: running.engines() == [])
    assert running.ask().folder == "two"


def test_a_request_waits_as_long_as_the_engine_needs_to_wake(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "WAIT_FOR_ENGINE_S", 0.1)
    running = small(sleep_after_s=0.3)
    running.start()
    running.ask()
    running.wait(lambda: running.engines() == [])
    running.folder("one", slow_s=0.5)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(running.ask)
        running.wait(lambda: running.engines() != [])
        assert httpx.get(f"{running.url}/health", trust_env=False).status_code == 200
        assert answer.result().folder == "one"


def test_it_ends_when_nobody_asks(small: Small) -> None:
    running = small(idle_after_s=0.3)
    running.start(until=IDLE_FILE)
    assert running.ended() == 0
    assert "no request for 0.3 s" in (running.work / IDLE_FILE).read_text()


def test_a_desired_state_that_cannot_be_read_changes_nothing(small: Small, caplog: pytest.LogCaptureFixture) -> None:
    running = small()
    running.want(running.version("v1"))
    running.want(running.version("v1"))
    running.start()
    good = (running.work / FLEET_FILE).read_bytes()
    pid = running.ask().pid
    older = Fleet(generation=1, versions=(running.version("v9", running.folder("two")),))
    older.write(running.work / "older.json")
    for damaged in (
        b"",
        b"{",
        good[: len(good) // 2],
        b'{"generation": 3, "versions": []}',
        (running.work / "older.json").read_bytes(),
    ):
        before = len(caplog.records)
        (running.work / "draft").write_bytes(damaged)
        (running.work / "draft").replace(running.work / FLEET_FILE)
        running.wait(lambda before=before: any("stays as it is" in one.message for one in caplog.records[before:]))  # type: ignore[misc]
    (running.work / "older.json").unlink()
    assert running.states() == {"v1": "ready"}
    assert running.ask().pid == pid
    running.want(running.version("v1", instances=2), settles=False)
    running.wait(lambda: running.state().versions[0].instances == 2)


def test_a_stream_is_broken_off_after_the_draining_limit(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "DRAIN_LIMIT_S", 0.5)
    running = small()
    running.start()
    stream = running.stream("tokens:1000 delay:0.05")
    next(stream)
    running.want(running.version("v2", running.folder("two")), settles=False)
    running.wait_for(v2="ready")
    with pytest.raises(openai.APIError, match="The engine ended within this answer"):
        list(stream)


def test_an_engine_that_dies_while_it_drains_is_replaced_for_the_requests_that_wait(small: Small) -> None:
    running = small()
    running.start()
    with ThreadPoolExecutor(1) as pool:
        old = running.ask().pid
        whole = pool.submit(running.ask, f"until:{running.go}")
        running.open(1)
        running.want(running.version("v2", running.folder("two")), settles=False)
        running.wait_for(v1="draining", v2="ready")
        kill(old)
        running.go.touch()
        assert whole.result().folder == "one"
    running.wait_for(v2="ready")


def test_a_stop_lets_open_answers_end(small: Small) -> None:
    running = small()
    running.start()
    stream = running.stream("tokens:20 delay:0.05")
    next(stream)
    running.stop()
    assert len(list(stream)) == 19
    assert running.ended() == 0


def test_a_stop_while_it_starts_leaves_nothing(small: Small) -> None:
    running = small(engine={"until": "/nowhere"})
    running.start(until="fleet-state.json")
    assert running.end() == 0


def test_a_start_that_takes_too_long_fails(small: Small) -> None:
    running = small(engine={"until": "/nowhere", "says": "loading"}, start_timeout_s=0.5)
    running.start(until="error.txt")
    assert running.ended() == 1
    assert "did not answer within start_timeout_s=0.5" in running.error().splitlines()[0]
    assert "  | loading" in running.error()


def test_instances_that_cannot_all_start_fail_the_start(small: Small) -> None:
    running = small(restarts=1)
    running.want(running.version("v1", running.folder("one", once=str(running.go)), instances=2))
    running.start(until="error.txt")  # the first engine answers, and each further one ends
    assert running.ended() == 1
    assert "killed by signal 9" in running.error().splitlines()[0]


def test_a_version_that_nothing_can_plan_ends_the_start(small: Small) -> None:
    running = small()
    running.want(running.version("v1", "/nowhere", share=0.5), running.version("v2", "/nowhere", share=0.5))
    running.start(until="error.txt")
    assert running.ended() == 1
    assert "model_dir /nowhere is not a folder" in running.error()


def test_a_bug_ends_the_service_with_an_error_and_no_engine(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    running = small()
    running.start()

    def broken(self: object, pool: object, now: float) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr(service.Service, "_size", broken)
    assert running.ended() == 1
    assert "the server program failed (LookupError: a bug)" in running.error()


def test_requests_that_nothing_can_answer_are_told_when_to_try_again(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "WAIT_FOR_ENGINE_S", 0.2)
    monkeypatch.setattr(service, "_FIRST_PAUSE_S", 30.0)
    running = small()
    running.start()
    kill(running.ask().pid)
    running.wait(lambda: running.state().versions[0].instances == 0)
    answer = running.http("POST", "/v1/completions", json={"prompt": ""})
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert "being started again" in answer.json()["error"]["message"]
    assert httpx.get(f"{running.url}/health", trust_env=False).status_code == 503


def test_a_client_that_leaves_cancels_its_request(small: Small) -> None:
    running = small()
    running.start()
    with httpx.stream(
        "POST",
        f"{running.url}/v1/completions",
        json={"prompt": "tokens:1000 delay:0.02", "stream": True},
        headers={"Authorization": f"Bearer {TOKEN}"},
        trust_env=False,
    ) as stream:
        next(stream.iter_bytes())
    running.wait(lambda: "small_cancelled 1.0" in running.metrics())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{running.url}/v1/completions",
            json={"prompt": "tokens:1000 delay:0.02"},
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=0.3,
            trust_env=False,
        )
    running.wait(lambda: "small_cancelled 2.0" in running.metrics())
    assert 'vllm:num_requests_running{model_name="default"} 0.0' in running.metrics()


def test_headers_and_bytes_pass_unchanged(small: Small) -> None:
    running = small()
    running.start()
    query = "a=%2F%20+&b=%E4%BD%A0&c=%zz&d=[1]"
    for method in ("GET", "POST", "PUT", "OPTIONS", "DELETE"):
        for ending in ("", "&chunked=1", "&status=418"):
            body = b"\x00\xff text" if method in ("POST", "PUT") else b""
            headers = {"content-type": "application/octet-stream", "x-odd": "a  b", "te": "trailers"}
            answer = running.http(method, f"/echo?{query}{ending}", content=body, headers=headers)
            if "418" not in ending:  # an error gets OpenAI's form
                assert answer.status_code == 200
                assert answer.headers["content-type"] == "application/x-echo"
                assert (
                    answer.headers["x-mine"].encode("latin-1") == "café".encode() or answer.headers["x-mine"] == "café"
                )
                assert answer.headers.get_list("set-cookie") == ["a=1", "b=2"]
                assert ("content-length" in answer.headers) != ("chunked" in ending)
                said = answer.json()
                assert said["query"] == f"{query}{ending}"
                assert said["body"].encode("latin-1") == body
                names = [name for name, _ in said["headers"]]
                assert len(names) == len(set(names))
                got = dict(said["headers"])
                assert got["x-odd"] == "a  b"
                assert got["host"] == running.url.removeprefix("http://")
                assert got["accept-encoding"] == answer.request.headers["accept-encoding"]
                assert not {"authorization", "te"} & set(got)
            else:
                assert answer.status_code == 418
    whole = running.http("GET", "/echo?x=1")
    head = running.http("HEAD", "/echo?x=1")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == "application/x-echo"
    assert abs(int(head.headers["content-length"]) - len(whole.content)) <= 2  # the method's name
    for status in (204, 304):
        empty = running.http("GET", f"/echo?status={status}")
        assert (empty.status_code, empty.content) == (status, b"")
        assert "transfer-encoding" not in empty.headers


def test_the_page_of_several_engines_has_each_with_its_name(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "KEPT_S", 0.0)
    running = small()
    running.start()
    running.ask()
    one = running.metrics()
    assert 'vllm:request_success_total{model_name="default"} ' in one
    running.want(running.version("v1", instances=2), settles=False)
    running.wait(lambda: 'palate_instances{state="ready",version="v1"} 2.0' in running.metrics())
    page = running.metrics()
    for name in ("v1-0", "v1-1"):
        assert f'vllm:num_requests_running{{model_name="default",palate_engine="{name}"}} 0.0' in page
    assert page.count("# TYPE vllm:num_requests_running gauge") == 1
    monkeypatch.setattr(metrics, "PAGE_LIMIT_S", 1.0)
    frozen = running.ask().pid
    kill(frozen, signal.SIGSTOP)
    assert running.metrics().count("# TYPE vllm:num_requests_running gauge") == 1  # of the other
    assert running.metrics().count("vllm:num_requests_running{") == 1
    kill(frozen)
    running.wait(lambda: 'palate_restarts{version="v1"} 1.0' in running.metrics())
    assert "palate_waiting_requests 0.0" in running.metrics()


def test_a_client_that_reads_nothing_frees_its_engine(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request was open until its connection ended, so no version was drained and no service idle before that."""
    monkeypatch.setattr(listener, "WRITE_TIMEOUT_S", 0.5)
    running = small()
    running.start()
    body = json.dumps({"model": "default", "prompt": "tokens:100000 delay:0.001 pad:100000", "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: {TOKEN}\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", httpx.URL(running.url).port))
        connection.sendall(head.encode() + body)
        running.open(1)
        running.open(0)
        running.wait(lambda: "small_cancelled 1.0" in running.metrics())


def test_requests_that_follow_each_other_share_a_connection_to_the_engine(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new connection per request delayed each first token. One whose client leaves, or is slow, is not used again."""
    opened: list[str] = []
    connect = aiohttp.UnixConnector._create_connection

    async def counted(self: aiohttp.UnixConnector, *args: Any, **options: Any) -> Any:
        opened.append(self.path)
        return await connect(self, *args, **options)

    monkeypatch.setattr(aiohttp.UnixConnector, "_create_connection", counted)
    running = small()
    running.start()
    opened.clear()
    pids = {running.ask("tokens:3").pid for _ in range(5)}
    assert (len(pids), len(opened)) == (1, 1)
    stream = running.stream("tokens:1000 delay:0.05")
    next(stream)
    stream.close()
    running.wait(lambda: "small_cancelled 1.0" in running.metrics())
    monkeypatch.setattr(proxy, "_LATE_S", -1.0)
    opened.clear()
    for _ in range(4):
        assert len(list(running.stream("tokens:2 delay:0.05"))) == 2
    assert len(opened) >= 3  # the first may use a connection that is left
    monkeypatch.setattr(proxy, "_LATE_S", 1.0)
    running.ask()
    kill(pids.pop())
    assert len({running.ask().pid for _ in range(2)}) == 1, "no connection to the engine that has ended is used"


def test_a_service_that_starts_says_so(small: Small) -> None:
    running = small(engine={"until": str(Path("/nowhere"))})
    running.start(until="fleet-state.json")
    [port] = {one.laddr.port for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    answer = httpx.post(
        f"http://127.0.0.1:{port}/v1/completions",
        json={"model": "default", "prompt": ""},
        headers={"Authorization": f"Bearer {TOKEN}"},
        trust_env=False,
    )
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert threading.active_count() > 1
