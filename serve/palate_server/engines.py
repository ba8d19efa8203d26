"""How each engine is started: its command line and its environment. Imports no engine and starts nothing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from palate_server.front import SPEC_VARIABLE, Front
from palate_server.preflight import KV_CACHE_VARIABLE, Plan
from palate_server.spec import BASE_MODEL, LISTENER_VARIABLE, TUNED_MODEL, ServeSpec


def engine_command(spec: ServeSpec, plan: Plan, *, spec_file: Path, port: int, ipc_dir: str) -> list[str]:
    """Returns the command that serves the spec at the socket that it is handed, which has the port."""
    if plan.engine.name == "transformers":
        settings = [f"--dtype={plan.dtype}", f"--tokenizer={plan.tokenizer_dir}"]
        return [sys.executable, "-P", "-m", "palate_server.transformers_engine", str(spec_file), *settings]
    command = [
        *(sys.executable, "-P", "-m", "palate_server.vllm_engine"),
        # vLLM binds what it is told to, and must not bind the port, at which it is made to answer.
        *("--uds", f"{ipc_dir}/unused.sock", "--host", spec.host, "--port", str(port)),
        *("--dtype", plan.dtype),
        *("--middleware", f"{Front.__module__}.{Front.__qualname__}"),
    ]
    if spec.base_model_dir is not None:
        command += ["--model", spec.base_model_dir, "--served-model-name", BASE_MODEL, "--enable-lora"]
        # As JSON: the form NAME=PATH stumbles over "=" and "," in the path.
        adapter = json.dumps({"name": TUNED_MODEL, "path": spec.model_dir, "base_model_name": BASE_MODEL})
        command += ["--lora-modules", adapter, "--max-lora-rank", str(plan.lora_rank)]
        command += ["--tokenizer", str(plan.tokenizer_dir)]
        if plan.on_cpu:
            # vLLM's CPU kernels index the adapters with -1 for a request without one: the last slot. With one slot that is
            # the tuned adapter, and `base` would answer as `default` whenever two requests share a batch. A second, empty
            # slot makes -1 mean no adapter, as it does on a GPU. A test asks both at once.
            command += ["--max-loras", "2"]
    else:
        command += ["--model", spec.model_dir, "--served-model-name", TUNED_MODEL]
    if spec.max_model_len is not None:
        command += ["--max-model-len", str(spec.max_model_len)]
    if plan.on_cpu:
        # Compiling takes a minute on a processor and gains little there.
        command += ["--enforce-eager"]
    return [*command, *spec.engine_args]


def engine_environment(plan: Plan, *, spec_file: Path, ipc_dir: str, listener: int) -> dict[str, str]:
    """Returns the engine's whole environment: this process's, without a way to the network, and with the way to the front.

    Args:
        plan: Of the engine.
        spec_file: What the front is to serve.
        ipc_dir: Folder of this user alone, for the engine's own sockets; its path is short.
        listener: Number of the listening socket that the engine is handed.
    """
    environment = {
        **os.environ,
        SPEC_VARIABLE: str(spec_file),
        LISTENER_VARIABLE: str(listener),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_RPC_BASE_PATH": ipc_dir,
        "TMPDIR": ipc_dir,  # what an engine forgets goes with this folder
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # for the processes that the engine starts, too
    }
    if plan.engine.name == "vllm" and plan.on_cpu:
        environment[KV_CACHE_VARIABLE] = str(plan.kv_cache_gib)
    package_root = Path(__file__).resolve().parents[1]
    if package_root.name not in {"site-packages", "dist-packages"}:
        # The engine's own processes import the front as well.
        search = [str(package_root), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(search)
    return environment
