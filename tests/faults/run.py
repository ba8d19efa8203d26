"""One job of a campaign: its client, the processes of its home, and what its records say. Knows no fault."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from tests.faults.world import World

Role = Literal["client", "runner", "trainer"]
_ROLES: dict[Role, str] = {"client": "tests.faults.client", "runner": "palate.runner", "trainer": "palate_trainer"}


@dataclass
class Run:
    """A job that is to have its model in the end.

    Attributes:
        world: Where it lives.
        name: The job's.
        max_attempts: How often its runner tries again by itself.
        machines: Homes that it had: each is a machine that was lost, but for the last.
    """

    world: World
    name: str
    max_attempts: int
    machines: int = 1
    clients: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def home(self) -> Path:
        return self.world.disk / f"{self.name}-{self.machines}"

    @property
    def said(self) -> Path:
        return self.world.tmp / f"{self.name}.jsonl"

    @property
    def complaints(self) -> Path:
        return self.world.tmp / f"{self.name}.stderr"

    def start_client(self) -> None:
        self.home.mkdir(exist_ok=True)
        settings = json.dumps(self.world.recipe(self.max_attempts))
        argv = [sys.executable, "-m", _ROLES["client"], self.name, str(self.world.prefs), settings]
        with self.said.open("ab") as output, self.complaints.open("ab") as errors:
            client = subprocess.Popen(
                argv, stdout=output, stderr=errors, env=self.world.environment(self.home), cwd=_ROOT
            )
        self.clients.append(client)

    @property
    def client(self) -> subprocess.Popen[bytes]:
        return self.clients[-1]

    def events(self) -> list[dict[str, Any]]:
        """What its clients have said; a line that a kill cut is left out."""
        lines = self.said.read_text().splitlines() if self.said.exists() else []
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def processes(self, *roles: Role) -> list[psutil.Process]:
        """Living processes of its homes, in these roles; in any role when none is given."""
        found = []
        for process in psutil.process_iter():
            try:
                home = process.environ().get("PALATE_HOME", "")
                if not home.startswith(f"{self.world.disk}/{self.name}-") or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                command = " ".join(process.cmdline())
                if not roles or any(f"-m {_ROLES[role]} " in command for role in roles):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def kill(self, *roles: Role) -> bool:
        """Ends them with SIGKILL; returns whether there were any."""
        found = self.processes(*roles)
        for process in found:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        if not roles or "client" in roles:
            for client in self.clients:
                if client.returncode is None and client.pid in {process.pid for process in found}:
                    client.wait()
        return bool(found)

    def lose_machine(self) -> None:
        """Everything of it on this machine is gone at once, and its folder with it."""
        self.kill()
        shutil.rmtree(self.home, ignore_errors=True)
        self.machines += 1


_ROOT = Path(__file__).parents[2]
