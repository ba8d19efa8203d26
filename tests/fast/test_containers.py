"""What the container backend says to an engine, and what a runner learns there, as far as no engine is needed."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from palate.backends.limits import Limits
from palate.env_file import FILE_VARIABLE, take_variables
from palate.errors import ConfigurationError
from palate.model import ResourceConfig
from palate.runner.child_process import MemoryGuard


@pytest.mark.parametrize(
    ("given", "cpu", "size"),
    [
        (None, None, None),
        ({"cpu": 4, "memory": 16}, 4.0, 16 << 30),
        ({"memory": "512m"}, None, 512 << 20),
        ({"memory": "1.5 GiB"}, None, 3 << 29),
        ({"memory": str(1 << 30)}, None, 1 << 30),
        (SimpleNamespace(cpu=2, gpu=0, memory=8), 2.0, 8 << 30),
    ],
)
def test_limits_in_the_words_of_pai_and_of_engines(given: object, cpu: float | None, size: int | None) -> None:
    limits = Limits.parse("instance_spec", given)
    assert limits == Limits(cpu, size) == Limits.from_json(limits.to_json())
    assert ("--memory" in limits.options()) == (size is not None)


def test_a_service_is_limited_in_megabytes_as_with_pai() -> None:
    given = ResourceConfig(cpu=4, memory=16000)
    assert Limits.parse("resource_config", given) == Limits(4.0, 16000 << 20)
    assert Limits.parse("resource_config", {"memory": "2g", "shared_memory": 512}) == Limits(None, 2 << 30, 512 << 20)
    with pytest.raises(ConfigurationError, match=r"resource_config gpu=1 is not supported.*all GPUs"):
        Limits.parse("resource_config", ResourceConfig(cpu=4, memory=16000, gpu=1))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"memory": "lots"}, r"memory='lots' is not a size"),
        ({"memory": True}, r"memory=True is not a size"),
        ({"memory": "1k"}, r"below 64 MiB"),
        ({"cpu": 0}, r"cpu=0 is not a number above 0"),
        ({"cpus": 4}, r"unknown key 'cpus': did you mean 'cpu'\?"),
        (object(), r"has no limit: expected instance_spec="),
    ],
)
def test_limits_that_are_none(given: object, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Limits.parse("instance_spec", given)


@pytest.mark.parametrize(
    ("line", "folder", "events", "limit"),
    [
        ("0::/box", "box", "memory.events", "memory.max"),
        ("0::/of/the/host", "", "memory.events", "memory.max"),
        ("4:memory:/box", "memory/box", "memory.oom_control", "memory.limit_in_bytes"),
    ],
)
def test_a_kill_for_memory_is_seen_in_both_kinds_of_cgroup(
    tmp_path: Path, line: str, folder: str, events: str, limit: str
) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    own = tmp_path / "cgroup"
    own.write_text(f"7:cpu:/box\n{line}\n")
    (tmp_path / folder / events).write_text("oom 3\noom_kill 2\n")
    (tmp_path / folder / limit).write_text(f"{512 << 20}\n")
    guard = MemoryGuard(tmp_path, own)
    assert guard.cause() == ""
    (tmp_path / folder / events).write_text("oom 4\noom_kill 3\n")
    assert "its memory limit of 0.5 GiB" in guard.cause()
    (tmp_path / folder / limit).write_text("max\n")
    assert "the memory of its machine" in guard.cause()


def test_where_nothing_can_be_read_nothing_is_claimed(tmp_path: Path) -> None:
    assert MemoryGuard(tmp_path, tmp_path / "no-such-file").cause() == ""


def test_variables_come_from_a_file_and_the_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "variables.json"
    path.write_text('{"MY_KEY": "secret", "OTHER": "x"}')
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    for name in ("MY_KEY", "OTHER"):
        monkeypatch.setenv(name, "before")
    take_variables()
    assert (os.environ["MY_KEY"], os.environ["OTHER"]) == ("secret", "x")
    assert not path.exists()
    assert FILE_VARIABLE not in os.environ
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    take_variables()  # a second start finds it taken
