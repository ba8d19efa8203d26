"""LoRA on a CPU: the values of the products against vLLM's own, and when vLLM uses them."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from palate_recipes.specs.serve import describe_engines
from palate_server.cpu_lora import KNOWN_VLLM

ROOT = Path(__file__).parents[2]
vllm = next(engine for engine in describe_engines() if engine.name == "vllm")
needs_cpu_build = pytest.mark.skipif(
    vllm.distribution is None or not vllm.cpu_build, reason="vLLM's CPU build is not installed"
)


def run(*arguments: str) -> list[str]:
    """Runs Python in a process of its own, since importing vLLM changes torch for what runs after it. Returns its lines."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
@needs_cpu_build
def test_the_products_have_the_values_of_vllms_own_code_and_leave_other_rows_alone() -> None:
    cases: list[dict[str, Any]] = [json.loads(line) for line in run("-m", "tests.support.lora_values")]
    for case in cases:
        assert case["difference"] < (1e-5 if case["dtype"] == "float32" else 2e-2), case
        assert case["untouched"], case
        assert case["changed"] == (case["tuned"] > 0), case
    kinds = {(case["kind"], case["dtype"], case["layout"]) for case in cases if case["tuned"]}
    assert len(kinds) == 4 * 2 * 3, "a kind of layer, type or layout was not compared"


def test_the_plugin_is_installed_and_costs_nothing_to_load() -> None:
    (entry,) = (entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "palate_cpu_lora")
    assert entry.value == "palate_server.cpu_lora:register"
    code = "import sys, palate_server.cpu_lora; print({'torch', 'vllm'} & {*sys.modules})"
    assert run("-c", code) == ["set()"]


def test_the_vllm_that_it_fits_is_the_one_of_the_extras() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in ("serve", "serve-cpu"):
        assert any(f">={KNOWN_VLLM}," in requirement for requirement in extras[name]), name


CHOICE = """
import logging, os, sys
from unittest.mock import patch  # of vLLM's own facts: no other vLLM is installed here
import vllm, vllm.lora.punica_wrapper.punica_cpu as own
from palate_server.cpu_lora import SWITCH, register
from vllm.platforms import current_platform

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
logging.getLogger("vllm").propagate = True

def show():
    register()
    register()
    print("used:", current_platform.get_punica_wrapper().rpartition(".")[2])

with patch.dict(os.environ, {SWITCH: "0"}):
    show()
with patch.object(type(current_platform), "is_cpu", lambda self: False):
    show()
with patch.object(vllm, "__version__", "9.9.0"):
    show()
with patch.object(own.PunicaWrapperCPU, "add_shrink", lambda self, y: None):
    show()
show()
"""


@pytest.mark.slow
@needs_cpu_build
def test_vllm_uses_the_products_only_where_they_fit() -> None:
    slow = "LoRA is computed by vLLM's own code, which is slow for long prompts: "
    assert [line for line in run("-c", CHOICE) if line.startswith(("used:", "LoRA"))] == [
        "used: PunicaWrapperCPU",
        "used: PunicaWrapperCPU",
        f"{slow}vLLM 9.9.0 is not {KNOWN_VLLM}",
        "used: PunicaWrapperCPU",
        f"{slow}its add_shrink has the parameters self y",
        "used: PunicaWrapperCPU",
        "LoRA is computed with one matrix product per adapter (PALATE_CPU_LORA=0 switches it off)",
        "used: PunicaWrapperProducts",
    ]


COMPILED = """
import torch
from torch import _dynamo
from vllm.lora.layers import LoRAMapping
from palate_server.punica import PunicaWrapperProducts

wrapper = PunicaWrapperProducts(64, 64, "cpu")
a, b = (torch.randn(3, 1, 8, 16),), (torch.randn(3, 1, 24, 8),)
a[0][2] = b[0][2] = 0  # no adapter, for vLLM's code

def layer(y, x):
    wrapper.add_lora_linear(y, x, a, b, 1.0, (24,))
    return y

# As vLLM compiles: without guards, so what Python decides is decided once.
compiled = _dynamo.optimize("eager", guard_filter_fn=lambda guards: [False for _ in guards])(layer)
x = torch.randn(4, 16)
with torch.inference_mode():
    for ids in ([1] * 4, [2] * 4, [0] * 4, [1, 0, 2, 1]):
        wrapper.update_metadata(LoRAMapping(tuple(ids), tuple(ids), is_prefill=False), [1, 2, None], 3, 100)
        expected, found = layer(torch.zeros(4, 24), x), compiled(torch.zeros(4, 24), x)
        print("difference:", float((expected - found).abs().max()))
"""


@pytest.mark.slow
@needs_cpu_build
def test_a_compiled_model_does_not_keep_the_adapters_of_its_first_batch() -> None:
    differences = [float(line.split()[1]) for line in run("-c", COMPILED) if line.startswith("difference:")]
    assert len(differences) == 4
    assert max(differences) < 1e-4
