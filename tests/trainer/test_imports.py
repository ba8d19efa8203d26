"""What a run's process imports: nothing heavy that its spec has no use for, and bitsandbytes where weights are quantised."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from palate_recipes.specs.train import TrainTask
from tests.trainer.support import spec

pytestmark = pytest.mark.slow

UNUSED = {
    "bitsandbytes",
    "boto3",
    "botocore",
    "networkx",
    "sklearn",
    "tensorflow",
    "torch._inductor.compile_fx",
    "torch._inductor.lowering",
    "triton",
    "vllm",
}
RUN = """
import json, sys
from palate_trainer.__main__ import main
code = main([sys.argv[1]])
print(json.dumps([name for name, module in sys.modules.items() if module is not None]))
sys.exit(code)
"""
QUANTISED = """
import sys
from importlib.util import find_spec
from pathlib import Path
from palate_trainer.env import lean_imports
from palate_recipes.specs.train import TrainTask
for path in sys.argv[1:]:
    with lean_imports(TrainTask.read(Path(path))):
        print(find_spec("bitsandbytes") is not None)
"""


def test_a_run_on_the_processor_imports_nothing_heavy_that_it_does_not_use(tiny: Path, tmp_path: Path) -> None:
    lines = output(RUN, saved(spec(tiny, tmp_path, max_steps=1, save_steps=1), tmp_path / "spec.json"))
    loaded = set(json.loads(lines[-1]))
    assert (tmp_path / "out" / "model" / "adapter_model.safetensors").exists()
    assert loaded >= {"peft", "torch", "trl"}
    assert loaded & UNUSED == set()


def test_bitsandbytes_is_there_for_weights_that_become_quantised_or_are(tiny: Path, tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    stored.mkdir()
    config = json.loads((tiny / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (stored / "config.json").write_text(json.dumps(config))
    specs = [
        spec(tiny, tmp_path / "4", method="QLoRA_LLM", load_in_4bit=True),
        spec(tiny, tmp_path / "8", method="QLoRA_LLM", load_in_8bit=True),
        spec(stored, tmp_path / "stored-run"),
        spec(tiny, tmp_path / "neither"),  # last: what was left out stays out
    ]
    paths = [saved(one, tmp_path / f"{at}.json") for at, one in enumerate(specs)]
    assert output(QUANTISED, *paths) == ["True", "True", "True", "False"]


def saved(wanted: TrainTask, path: Path) -> str:
    wanted.write(path)
    return str(path)


def output(program: str, *arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()
