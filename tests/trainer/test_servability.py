"""What the trainer makes can be served, and the server decides on it as the client did before the training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from palate_recipes.errors import BadSpec
from palate_recipes.servability import choose, planned_adapter, servings, trained_config
from palate_recipes.specs.serve import ServeSpec, describe_engines
from palate_server import plan
from tests.support.architectures import CATALOG, OTHERS, small_config, small_tokenizer
from tests.trainer.support import spec

INSTALLED = [engine.name for engine in describe_engines() if engine.distribution is not None]

PEFT_ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all linear layers": {"target_modules": "all-linear"},
    "on the head": {"target_modules": ["lm_head", "q_proj"]},
    "rank 512": {"r": 512},
    "rank 513": {"r": 513},
    "ranks by layer": {"rank_pattern": {"q_proj": 64}, "alpha_pattern": {"q_proj": 8}},
    "a rank by layer beyond": {"rank_pattern": {"q_proj": 1024}},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "bias": {"bias": "all"},
    "LoRA bias": {"lora_bias": True},
    "whole modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "new tokens": {"trainable_token_indices": [1, 2]},
    "more layers": {"layer_replication": [(0, 2), (1, 2)]},
    "some layers": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "Gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "random from the start": {"init_lora_weights": False},
    "activated": {"alora_invocation_tokens": [5, 6]},
    "QALoRA": {"use_qalora": True},
}
MOVED_EXPERTS = ("qwen3_moe", "glm4_moe", "mixtral")
"""PEFT adapts their experts in the tensor that transformers keeps them in, and vLLM wants a tensor per expert."""
_UNNOTICED = {"new tokens"}
"""vLLM reads their config, and fails on their weights."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer()


def base_folder(kind: str, tokenizer: Any, folder: Path) -> Any:
    """Writes what a check of a model folder reads; returns the model without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small_config(kind, tokenizer))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    return model


def adapter_folder(config: Any, folder: Path) -> dict[str, Any]:
    """Writes an adapter's config, as PEFT does, and returns it."""
    config.save_pretrained(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return dict(json.loads((folder / "adapter_config.json").read_text()))


def decided(engine: str, base: Path, adapter: Path, work: Path) -> str:
    """The engine that the server would start; "" if it refuses."""
    wanted = ServeSpec(
        service_name="s", model_dir=str(adapter), base_model_dir=str(base), work_dir=str(work), engine=engine  # type: ignore[arg-type]
    )  # fmt: skip
    try:
        return plan.check(wanted).engine.name
    except BadSpec:
        return ""


@pytest.mark.parametrize("kind", [*CATALOG, *OTHERS])
def test_what_the_trainer_makes_can_be_served(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    from peft import get_peft_model

    from palate_trainer.model import lora_config

    base = tmp_path / "base"
    model = base_folder(kind, tokenizer, base)
    config = json.loads((base / "config.json").read_text())
    task = spec(base, tmp_path, lora_dim=4)
    on_cpu = any(engine.cpu_build for engine in describe_engines())
    before = servings(config, planned_adapter(task.spec.hyperparameters, config), vllm_on_cpu=on_cpu)
    tuned = get_peft_model(model, lora_config(task))
    after = servings(config, adapter_folder(tuned.peft_config["default"], tmp_path / "adapter"), vllm_on_cpu=on_cpu)
    assert after == before
    assert after[1].reasons == ()
    mixture = kind in ("qwen3_moe", "glm4_moe", "mixtral", "gpt_oss")
    assert after[0].reasons == () or mixture
    by_experts = [f"serves no adapter on the experts of {config['architectures'][0]}"] if kind in MOVED_EXPERTS else []
    without_gpu = ["serves no adapters on a mixture of experts without a GPU"] if mixture and on_cpu else []
    assert [reason.partition("vLLM 0.32 ")[2] for reason in after[0].reasons] == by_experts + without_gpu
    for engine in INSTALLED:
        chosen, _ = choose(after, [engine])
        assert decided(engine, base, tmp_path / "adapter", tmp_path) == (chosen.engine if chosen else "")
    assert trained_config(config) == config
    assert [serving.reasons for serving in servings(config, None)] == [(), ()]


@pytest.mark.parametrize("name", PEFT_ADAPTERS)
@pytest.mark.parametrize("kind", ["llama", "mistral"])  # vLLM takes an adapter on the head of the first only
def test_the_server_decides_as_the_client(name: str, kind: str, tokenizer: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    base = tmp_path / "base"
    base_folder(kind, tokenizer, base)
    fields = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **PEFT_ADAPTERS[name]}
    adapter = adapter_folder(LoraConfig(**fields), tmp_path / "adapter")
    found = servings(json.loads((base / "config.json").read_text()), adapter)
    for engine in ("auto", *INSTALLED):
        chosen, _ = choose(found, INSTALLED if engine == "auto" else [engine])
        assert decided(engine, base, tmp_path / "adapter", tmp_path) == (chosen.engine if chosen else "")


_ASK_VLLM = """
import json, sys
from types import SimpleNamespace
from vllm.lora.peft_helper import PEFTHelper
refused = {}
for folder in sys.argv[1:]:
    try:
        PEFTHelper.from_local_dir(folder, 512).validate_legal(SimpleNamespace(max_lora_rank=512))
    except ValueError as error:
        refused[folder] = str(error)
print(json.dumps(refused))
"""


@pytest.mark.slow
@pytest.mark.thorough
def test_vllm_refuses_the_adapters_that_are_said_to_be_beyond_it(tmp_path: Path) -> None:
    from peft import LoraConfig

    if "vllm" not in INSTALLED:
        pytest.skip("vLLM is not installed")
    expected, folders = set(), []
    for number, (name, changes) in enumerate(PEFT_ADAPTERS.items()):
        fields = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes}
        folders.append(str(tmp_path / str(number)))
        if (
            servings(None, adapter_folder(LoraConfig(**fields), Path(folders[-1])))[0].reasons
            and name not in _UNNOTICED
        ):
            expected.add(folders[-1])
    done = subprocess.run([sys.executable, "-c", _ASK_VLLM, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(json.loads(done.stdout.splitlines()[-1])) == expected
