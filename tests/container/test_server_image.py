"""The server image serves: vLLM without a compiler, as a user without rights, healthy when it answers, gone after a stop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from palate_recipes.specs.serve import READY_FILE, TOKEN_VARIABLE, Ready, ServeSpec
from tests.slow.conftest import until
from tests.support.engine import Engine
from tests.support.images import Image

pytestmark = [pytest.mark.slow, pytest.mark.container, pytest.mark.timeout(3600)]


def test_a_model_is_served_and_stopped(
    engine: Engine, server: Image, base_model: Path, tmp_path: Path, container: Callable[..., str]
) -> None:
    work = tmp_path / "home/work/services/one/1"
    work.mkdir(parents=True)
    inside = Path("/work/work/services/one/1")
    ServeSpec(service_name="one", model_dir="/model", work_dir=str(inside), max_model_len=512).write(work / "spec.json")
    shutil.copytree(base_model, tmp_path / "model")
    for path in tmp_path.rglob("*"):  # safetensors keeps weights for their owner alone
        path.chmod(0o777 if path.is_dir() else 0o666)
    secrets = tmp_path / "secrets"
    secrets.write_text(f"{TOKEN_VARIABLE}=told-to-nobody\n")
    secrets.chmod(0o600)
    id = container(
        "--shm-size=1g",  # vLLM's processes talk through shared memory, and an engine's default is 64 MB
        *("--env-file", str(secrets), "--env=VLLM_CPU_KVCACHE_SPACE=1", "--env=PALATE_HOME=/work"),
        *("--volume", f"{tmp_path}/home:/work", "--volume", f"{tmp_path}/model:/model:ro"),
        *("--entrypoint=tini", server.name, "--", "python", "-m", "palate_server", str(inside / "spec.json")),
    )

    def running() -> bool:
        return bool(json.loads(engine.run("inspect", id).stdout)[0]["State"]["Running"])

    unready = engine.run("exec", id, "python", "-m", "palate_server.health", check=False)
    assert unready.returncode == 1
    until(lambda: (work / READY_FILE).exists() or not running(), timeout_s=1200)
    assert running(), engine.run("logs", id).stdout[-4000:]
    ready = Ready.read(work / READY_FILE)
    print(f"\n{server.name}: ready after {ready.seconds:.0f} s, {ready.engine}")
    assert engine.run("exec", id, "python", "-m", "palate_server.health").stdout.startswith(ready.endpoint)
    answer = httpx.post(
        f"{ready.endpoint}/v1/chat/completions",
        headers={"Authorization": "Bearer told-to-nobody"},
        json={"model": "default", "messages": [{"role": "user", "content": "Capital of France?"}], "max_tokens": 8},
        timeout=120,
        trust_env=False,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"]
    told = engine.run("logs", id).stdout + engine.run("top", id).stdout
    assert "told-to-nobody" not in told
    engine.run("stop", "--time", "60", id)
    assert json.loads(engine.run("inspect", id).stdout)[0]["State"]["ExitCode"] == 0
    assert not (work / READY_FILE).exists()
