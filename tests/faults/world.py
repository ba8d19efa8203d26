"""What all runs of a campaign share: a store behind a gate, a disk of its own size, a model, and data. Knows no job."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from palate.store import Store, StoreOptions, open_store
from palate.store.server import StoreServer, running_server
from tests.support.gate import Gate, gate_to
from tests.support.seaweed import five_free_ports
from tests.support.trainings import SETTINGS as INTERRUPTED

DISK_MB = 256
STEPS = 200
SETTINGS = {**INTERRUPTED, "max_steps": STEPS}
LEASE_S = 12


class World:
    """The shared parts; made by `a_world`.

    Attributes:
        tmp: Folder for everything.
        disk: Where the homes of the runs lie: a small file system of its own where this may be mounted.
        has_own_disk: Whether it is one, so that it can be filled.
        gate: The way to the store; the auditor goes round it.
        prefs: Preference data.
        store_lock: Held while the store is away, so that two faults do not fight over it.
    """

    def __init__(self, tmp: Path, disk: Path, model: Path, *, has_own_disk: bool) -> None:
        self.tmp = tmp
        self.disk = disk
        self.has_own_disk = has_own_disk
        self.model = model
        self.prefs = tmp / "prefs.json"
        rows = [
            {"prompt": f"Is {n} even?", "chosen": f"It depends on {n % 10}.", "rejected": "Yes, as you say."}
            for n in range(16)
        ]
        self.prefs.write_text(json.dumps(rows))
        self.store_lock = threading.Lock()
        self._port = five_free_ports()
        self._running = ExitStack()
        self.server: StoreServer = self.start_store()
        self.gate: Gate

    def start_store(self) -> StoreServer:
        self.server = self._running.enter_context(running_server(self.tmp / "server", port=self._port, bucket="palate"))
        return self.server

    def stop_store(self, *, kill: bool) -> None:
        if kill:
            self.server.process.kill()
            self.server.process.wait()
        self._running.close()

    def auditors_store(self) -> Store:
        """The store as it is, whatever the weather at the gate."""
        return open_store("s3://palate/palate", options=self._options(self.server.endpoint))

    def _options(self, endpoint: str) -> StoreOptions:
        return StoreOptions(
            endpoint_url=endpoint,
            region="us-east-1",
            access_key_id=self.server.access_key_id,
            secret_access_key=self.server.secret_access_key,
        )

    def environment(self, home: Path) -> dict[str, str]:
        """Variables of a client whose home is `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "OSS_", "PALATE_"))}
        return {
            **kept,
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self.gate.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": self.server.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.server.secret_access_key,
            "AWS_EC2_METADATA_DISABLED": "true",
            "PALATE_STORE": "s3://palate/palate",
            "PALATE_HOME": str(home),
            "PALATE_LEASE_S": str(LEASE_S),
            "OMP_NUM_THREADS": "1",  # several trainings side by side, each with the same arithmetic
        }

    def recipe(self, max_attempts: int) -> dict[str, object]:
        return {
            "model_name": "tiny",
            "model_uri": str(self.model),
            "hyperparameters": SETTINGS,
            "max_attempts": max_attempts,
        }

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """Leaves no byte free where the homes lie, for as long as the block lasts."""
        ballast = self.disk / "ballast"
        try:
            with ballast.open("wb", buffering=0) as file:  # nothing is left to write when it is closed on a full disk
                try:
                    while True:
                        file.write(b"\1" * (1 << 16))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
            yield
        finally:
            ballast.unlink(missing_ok=True)


@contextmanager
def a_world(tmp: Path, model: Path) -> Iterator[World]:
    """Makes the shared parts, and takes them down: server, gate, and the small disk."""
    disk = tmp / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(disk)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        world = World(tmp, disk, model, has_own_disk=mounted)
        try:
            with gate_to(int(world.server.endpoint.rpartition(":")[2])) as gate:
                world.gate = gate
                yield world
        finally:
            world.stop_store(kill=False)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=True)
