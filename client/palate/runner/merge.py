"""Merges a service's adapter into its base before the server starts (`merge=True`). Runs `palate_server.merge`, knows no model code."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate.runner.child_process import Child, log_tail, watch
from palate.runner.context import Ending, RunContext
from palate_recipes.device import available_memory
from palate_recipes.servability import DTYPE_BYTES, GIB, stored_dtype
from palate_recipes.specs.merge import MERGED_FILE, Merged
from palate_recipes.specs.serve import ERROR_FILE

_PROCESS_GIB = 0.7
"""Memory of Python, torch and the libraries without weights."""
_GRACE_S = 2.0
"""The program has nothing to save when it is stopped."""


@dataclass(frozen=True, kw_only=True)
class MergedModel:
    """Full weights in `folder`, and what the rounding has cost."""

    folder: Path
    merged: Merged

    def explain(self, reason: str) -> str:
        """Returns a failed service's reason, with what merging may have to do with it."""
        if "what is served is not what was trained" not in reason:
            return reason
        return (
            f"{reason}\nThe adapter was merged (merge=True): {self.merged.text}. If that is the cause, omit merge or set "
            "dtype='float32'."
        )


def merge_adapter(
    context: RunContext,
    *,
    base_dir: Path,
    adapter_dir: Path,
    out: Path,
    options: Mapping[str, Any],
    withdrawn: Callable[[], bool],
) -> MergedModel | Ending:
    """Writes the merged model to `out` and returns it, or how the run ended if that was stopped or failed.

    Args:
        context: The run.
        base_dir: The base's weights.
        adapter_dir: The adapter.
        out: Folder to write.
        options: Options of the deployment: `dtype` and `verify` are used.
        withdrawn: Returns True once nobody wants the model any more: the program ends, and so its memory is free.
    """
    out.parent.mkdir(exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    dtype = str(options.get("dtype", "auto"))
    if lack := _lack_of_room(base_dir, dtype, context.work):
        return Ending(state="Failed", reason=lack, again=False)
    context.say("merging the adapter into its base, in float32")
    command = [sys.executable, "-P", "-m", "palate_server.merge", str(base_dir), str(adapter_dir), str(out)]
    child = Child(
        [*command, f"--dtype={dtype}", f"--verify={options.get('verify', 'error')}"],
        log=context.log,
        env={"HF_HUB_OFFLINE": "1"},
        cwd=context.work,
    )
    with child:
        outcome = watch(
            child,
            context.heartbeat,
            terminated=context.terminated,
            on_tick=lambda: None,
            deadline=lambda: 0.0 if withdrawn() else None,
            grace_s=_GRACE_S,
        )
    code = child.process.returncode
    if outcome != "ended":
        return Ending(state="Stopped", reason="stopped on request", exit_code=code)
    error = out / ERROR_FILE
    if code != 0:
        reason = error.read_text(encoding="utf-8").strip() if error.exists() else ""
        tail = log_tail(context.log)
        return Ending(state="Failed", reason=child.cause(reason), exit_code=code, log_tail=tail, again=not reason)
    found = MergedModel(folder=out, merged=Merged.read(out / MERGED_FILE))
    context.say(f"{found.merged.text}; it took {found.merged.seconds:.0f} s")
    return found


def _lack_of_room(base_dir: Path, dtype: str, work: Path) -> str:
    """Returns what is missing if memory or disk are certain not to suffice, else ""."""
    config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    stored = stored_dtype(config)
    size = sum(file.stat().st_size for file in base_dir.glob("*.safetensors"))
    values = size / DTYPE_BYTES.get(stored, 2)  # a quantised base has more
    memory, free = values * 4 + _PROCESS_GIB * GIB, available_memory()
    if memory > free:
        return (
            f"merge=True needs at least {memory / GIB:.1f} GiB of memory to add the adapter in float32, and {free / GIB:.1f} GiB are "
            "free: omit merge, stop other programs, or use a machine with more memory"
        )
    disk, room = values * DTYPE_BYTES.get(stored if dtype == "auto" else dtype, 2), shutil.disk_usage(work).free
    if disk > room:
        return (
            f"merge=True needs {disk / GIB:.1f} GiB of disk in {work} for the merged model, and {room / GIB:.1f} GiB are free: omit "
            "merge, or make room (PALATE_HOME is where work folders are)"
        )
    return ""
