"""What an operator does to a run behind Palate's back, by the tools of its backend. Knows engines, not Palate."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Protocol

import psutil

from tests.slow.conftest import processes_of
from tests.support.engine import Engine


class Hands(Protocol):
    """Of a backend; an engine id is what it calls a run.

    Attributes:
        backend: Its name.
    """

    backend: str

    def kill(self, engine_id: str) -> None:
        """Kills the runner, which hears nothing of it."""
        ...

    def end(self, engine_id: str) -> None:
        """Asks it to end, as one asks any program of this engine."""
        ...

    def shown(self, engine_id: str) -> str:
        """Returns all that other users of the machine may learn of a run that is alive."""
        ...

    def left(self) -> list[str]:
        """Returns what is there of any run of the test's, alive or not."""
        ...


class ProcessHands:
    """Of the process backend: signals."""

    backend = "process"

    def __init__(self, home: Path) -> None:
        self._homes = [home, home.with_name("elsewhere")]

    def kill(self, engine_id: str) -> None:
        os.kill(_pid(engine_id), signal.SIGKILL)

    def end(self, engine_id: str) -> None:
        os.kill(_pid(engine_id), signal.SIGTERM)

    def shown(self, engine_id: str) -> str:
        runner = psutil.Process(_pid(engine_id))
        return "\n".join(" ".join(each.cmdline()) for each in (runner, *runner.children(recursive=True)))

    def left(self) -> list[str]:
        return [command for home in self._homes for command in processes_of(home)]


class ContainerHands:
    """Of the container backend: the engine's command line.

    Args:
        engine: The one that Palate is told to use.
        home: Of the test; containers of others are none of its business.
    """

    backend = "container"

    def __init__(self, engine: Engine, home: Path) -> None:
        self._engine = engine
        self._homes = [home, home.with_name("elsewhere")]

    def kill(self, engine_id: str) -> None:
        self._engine.run("kill", _container(engine_id))

    def end(self, engine_id: str) -> None:
        self._engine.run("stop", "--time", "120", _container(engine_id))

    def shown(self, engine_id: str) -> str:
        container = _container(engine_id)
        seen = self._engine.run("inspect", container).stdout
        image = json.loads(seen)[0]["Image"]
        history = self._engine.run("history", "--no-trunc", image).stdout
        return "\n".join(
            [seen, history, self._engine.run("logs", container).stdout, self._engine.run("top", container).stdout]
        )

    def left(self) -> list[str]:
        found: list[str] = []
        for home in self._homes:
            label = f"label=ai.palate.home={home}"
            found += self._engine.run(
                "ps", "--all", "--filter", label, "--format", "{{.Names}} {{.Status}}"
            ).stdout.splitlines()
            found += [str(path) for path in (home / "run").glob("*/variables.json")]
            found += processes_of(home)
        return found


def _pid(engine_id: str) -> int:
    return int(engine_id.split(":")[1])


def _container(engine_id: str) -> str:
    return engine_id.split(":")[2]
