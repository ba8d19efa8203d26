"""How fast a bucket is filled and read, against boto3 as it comes and a copy on this machine: `make bench-store`.

Two loads, each up and down: one large file (1 GB by default), and a folder of small ones (2,000 of 100 KB). Each
measurement is a process of its own, so that its peak memory is its own, and the contenders take turns in each round: a busy
moment hits all alike. The server is a SeaweedFS on this machine, which shares its cores with the client.

`palate` is `upload_tree` and `download_tree`, checksums compared. `boto3` is `upload_file` and `download_file` with boto3's
defaults, one call after the other; `boto3x8`, for the small files, the same calls from eight threads. `s3transfer` is boto3's transfer
as the store could use it: Palate's client, one manager for all files with 32 requests at a time, and the CRC-32 of each file stored and
compared as Palate does. `copy` is `shutil.copytree`.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

BUCKET = "bench"
CONTENDERS = {
    "large": ("palate", "s3transfer", "boto3", "copy"),
    "small": ("palate", "s3transfer", "boto3", "boto3x8", "copy"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large-mb", type=int, default=1000, help="size of the large file in MB; 0 leaves it out")
    parser.add_argument("--small-files", type=int, default=2000, help="number of small files; 0 leaves them out")
    parser.add_argument("--small-kb", type=int, default=100, help="size of each in KB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(json.loads(options.child))
        return
    from palate.store.server import REGION, running_server

    with tempfile.TemporaryDirectory(prefix="palate-bench-") as name:
        folder = Path(name)
        loads = _make_loads(folder, options)
        with running_server(folder / "server", port=_free_port(), bucket=BUCKET) as server:
            environment = {
                **os.environ,
                "AWS_ENDPOINT_URL_S3": server.endpoint,
                "AWS_DEFAULT_REGION": REGION,
                "AWS_ACCESS_KEY_ID": server.access_key_id,
                "AWS_SECRET_ACCESS_KEY": server.secret_access_key,
            }
            for load, size in loads.items():
                _compare(load, size, folder, environment, options.rounds)


def _make_loads(folder: Path, options: argparse.Namespace) -> dict[str, int]:
    """Writes the files; returns the bytes of each load."""
    source = random.Random(0)
    loads = {}
    if options.large_mb:
        (folder / "large").mkdir()
        with (folder / "large" / "weights.bin").open("wb") as file:
            for _ in range(options.large_mb):
                file.write(source.randbytes(1_000_000))
        loads["large"] = options.large_mb * 1_000_000
    if options.small_files:
        (folder / "small").mkdir()
        for number in range(options.small_files):
            (folder / "small" / f"{number:06d}.bin").write_bytes(source.randbytes(options.small_kb * 1000))
        loads["small"] = options.small_files * options.small_kb * 1000
    return loads


def _compare(load: str, size: int, folder: Path, environment: dict[str, str], rounds: int) -> None:
    contenders = CONTENDERS[load]
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for number in range(rounds):
        for who in contenders if number % 2 == 0 else contenders[::-1]:
            for way in ("up", "down"):
                task = {"who": who, "way": way, "load": load, "folder": str(folder), "round": number}
                argv = [sys.executable, __file__, "--child", json.dumps(task)]
                done = subprocess.run(argv, env=environment, check=True, capture_output=True, text=True)
                found.setdefault((who, way), []).append(json.loads(done.stdout.splitlines()[-1]))
            _remove(folder, load, who, number, environment)
    files = len(list((folder / load).iterdir()))
    print(f"{load}: {files:,} file{'s' * (files > 1)}, {size / 1e6:,.0f} MB; median of {rounds} rounds")
    for way in ("up", "down"):
        base = statistics.median(entry["seconds"] for entry in found["boto3", way])
        for who in contenders:
            seconds = sorted(entry["seconds"] for entry in found[who, way])
            middle = statistics.median(seconds)
            peak = max(entry["peak_mb"] for entry in found[who, way])
            processor = statistics.median(entry["cpu_seconds"] for entry in found[who, way])
            print(
                f"  {way:4} {who:7} {middle:7.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f}) {size / middle / 1e6:7,.0f} MB/s"
                f"  {base / middle:6.2f} x boto3   processor {processor:6.2f} s   peak {peak:5,.0f} MB",
                flush=True,
            )


def _remove(folder: Path, load: str, who: str, number: int, environment: dict[str, str]) -> None:
    task = {"who": who, "way": "remove", "load": load, "folder": str(folder), "round": number}
    subprocess.run([sys.executable, __file__, "--child", json.dumps(task)], env=environment, check=True)
    shutil.rmtree(folder / f"{who}-{load}-down")
    shutil.rmtree(folder / f"{who}-{load}-{number}", ignore_errors=True)


def _child(task: dict[str, Any]) -> None:
    folder, load, who, way = Path(task["folder"]), task["load"], task["who"], task["way"]
    prefix, target = f"{who}-{load}-{task['round']}", folder / f"{who}-{load}-down"
    if way == "remove":
        from palate.store import open_store

        open_store(f"s3://{BUCKET}").delete_tree(prefix)
        return
    names = sorted(path.name for path in (folder / load).iterdir())
    work = _work(who, way, folder / load, prefix, target, names)
    begun, processor = time.perf_counter(), time.process_time()
    work()
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - processor
    # Not getrusage: its peak begins with that of the parent.
    peak_kib = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    if way == "down":
        for name in names:
            assert filecmp.cmp(target / name, folder / load / name, shallow=False), f"{name} differs"
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": int(peak_kib) * 1.024e-3}))


def _work(who: str, way: str, source: Path, prefix: str, target: Path, names: list[str]) -> Callable[[], object]:
    """Returns what is timed; what it imports and the client are there before."""
    if who == "copy":
        beside = source.parent / prefix
        return lambda: shutil.copytree(*((source, beside) if way == "up" else (beside, target)))
    if who == "palate":
        from palate.store import open_store

        store = open_store(f"s3://{BUCKET}")
        if way == "up":
            return lambda: store.upload_tree(source, prefix)
        return lambda: store.download_tree(prefix, target)
    target.mkdir(exist_ok=True)
    if who == "s3transfer":
        return _managed(way, source, prefix, target, names)
    import boto3

    client = boto3.client("s3")

    def move(name: str) -> None:
        if way == "up":
            client.upload_file(str(source / name), BUCKET, f"{prefix}/{name}")
        else:
            client.download_file(BUCKET, f"{prefix}/{name}", str(target / name))

    def in_turn() -> None:
        for name in names:
            move(name)

    def by_eight() -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(move, names))

    return by_eight if who == "boto3x8" else in_turn


def _managed(way: str, source: Path, prefix: str, target: Path, names: list[str]) -> Callable[[], object]:
    from s3transfer.manager import TransferConfig, TransferManager
    from s3transfer.subscribers import BaseSubscriber

    from palate.store.local import crc32_of, in_parallel
    from palate.store.options import StoreOptions
    from palate.store.s3_client import connect
    from palate.store.s3_transfer import CRC

    client = connect(StoreOptions(), is_oss=False)
    # As many requests at a time as the store makes: eight files, four parts of each.
    manager = TransferManager(client, TransferConfig(max_request_concurrency=32, max_submission_concurrency=8))

    class Known(BaseSubscriber):  # type: ignore[misc]
        """Spares s3transfer's own HEAD: the recorded CRC-32 needs one anyway."""

        def __init__(self, head: Any) -> None:
            self.head = head

        def on_queued(self, future: Any, **_: object) -> None:
            future.meta.provide_transfer_size(self.head["ContentLength"])
            future.meta.provide_object_etag(self.head["ETag"])

    def send(name: str) -> None:
        extra = {"Metadata": {CRC: crc32_of(source / name)}}
        manager.upload(str(source / name), BUCKET, f"{prefix}/{name}", extra).result()

    def fetch(name: str) -> None:
        head = client.head_object(Bucket=BUCKET, Key=f"{prefix}/{name}")
        manager.download(BUCKET, f"{prefix}/{name}", str(target / name), subscribers=[Known(head)]).result()
        assert crc32_of(target / name) == head["Metadata"][CRC], f"{name} arrived damaged"

    return lambda: in_parallel(send if way == "up" else fetch, names)


def _free_port() -> int:
    """Returns the first of five ports in a row that are free, and whose twins 10000 above are."""
    for first in range(11_000 + os.getpid() % 5_000, 20_000, 5):
        with contextlib.ExitStack() as held:
            try:
                for port in (number + twin for number in range(first, first + 5) for twin in (0, 10_000)):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first
    raise SystemExit("no five ports in a row are free")


if __name__ == "__main__":
    main()
