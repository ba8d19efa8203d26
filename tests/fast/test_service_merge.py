"""The runner's part of `merge=True`: room for it, its end, and what a failure says. The merge itself: tests/serve/test_merge.py."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import psutil

from palate import Session
from palate.runner.context import Ending, RunContext
from palate.runner.fleet import NotStaged, Staged, _Staging
from palate.runner.heartbeat import Heartbeat
from palate.runner.merge import MergedModel, _lack_of_room, merge_adapter
from palate.runner.retry import StoreRetry
from palate.runs.lease import acquire
from palate.runs.record import Record
from palate_recipes.specs.merge import Merged
from palate_recipes.specs.run import Deployment
from tests.slow.conftest import until
from tests.support.manifests import serve_manifest


def test_a_base_beyond_this_machine_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    weights = tmp_path / "model.safetensors"
    weights.touch()
    assert _lack_of_room(tmp_path, "auto", tmp_path) == ""
    with weights.open("wb") as file:
        file.truncate(4 << 40)  # sparse: no disk is used
    lack = _lack_of_room(tmp_path, "auto", tmp_path)
    assert lack.startswith("merge=True needs at least 8192.7 GiB of memory to add the adapter in float32, and ")
    assert "omit merge" in lack


def test_a_failed_comparison_says_what_merging_has_cost(tmp_path: Path) -> None:
    found = MergedModel(folder=tmp_path, merged=Merged(dtype="bfloat16", kept=0.84, seconds=3.0))
    said = found.explain("what is served is not what was trained: log-probs differ")
    assert "rounded to bfloat16, the merged weights keep 84% of the adapter's change" in said
    assert said.endswith("omit merge or set dtype='float32'.")
    assert found.explain("the engine died") == "the engine died"


def merging(work: Path) -> list[psutil.Process]:
    """The programs that merge below a folder."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            line = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if "palate_server.merge" in line and any(str(work) in argument for argument in line):
            found.append(process)
    return found


def test_a_merge_whose_update_is_withdrawn_ends_and_leaves_nothing(session: Session, tmp_path: Path) -> None:
    record = Record(session.store, "services", "svc")
    record.create(serve_manifest())
    held = acquire(record, attempt=1, start_id="", give_up=lambda: True)
    assert held is not None
    base, adapter, work = (tmp_path / name for name in ("base", "adapter", "work"))
    for folder in (base, adapter, work):
        folder.mkdir()
    (base / "model.safetensors").touch()
    # A pipe has its content once, for the runner. The program would wait for it forever.
    os.mkfifo(base / "config.json")
    threading.Thread(target=(base / "config.json").write_text, args=("{}",), daemon=True).start()
    terminated = threading.Event()
    context = RunContext(
        record=record,
        direct=record,
        manifest=record.manifest(),
        session=session,
        work=work,
        heartbeat=Heartbeat(record, held, print),
        retry=StoreRetry(print, terminated.is_set),
        terminated=terminated,
    )

    def stage(body: Deployment, folder: Path, retry: StoreRetry) -> Staged:
        done = merge_adapter(
            context,
            base_dir=base,
            adapter_dir=adapter,
            out=folder / "merged",
            options={},
            withdrawn=retry.give_up,
        )
        assert isinstance(done, Ending)
        raise NotStaged(done)

    staging = _Staging(stage, record.serve_manifest().body, work / "model-v2", print)
    until(lambda: merging(work) != [])
    assert not staging.ended
    staging.abandon()
    until(lambda: staging.ended, timeout_s=20)
    assert merging(work) == []
    assert not (work / "model-v2").exists()
