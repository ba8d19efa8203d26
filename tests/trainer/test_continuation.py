"""Training that goes on from an adapter: SFT before DPO, with the SFT adapter as the reference."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.support import NEAR, losses, refusal, spec, train

pytestmark = pytest.mark.slow

LEARN = {"learning_rate": 1e-2, "num_train_epochs": 3}


@pytest.fixture(scope="module")
def sft(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of an SFT run with rank 8 whose adapter has moved far from its start."""
    folder = tmp_path_factory.mktemp("sft")
    metrics = train(spec(tiny, folder, training_strategy="sft", lora_dim=8, **LEARN))
    assert losses(metrics)[-1] < losses(metrics)[0] - 0.5
    return folder / "out" / "model"


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "adapter_model.safetensors"))


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("reference", ["scored once", "scored a batch at a time"])
def test_dpo_after_sft_starts_undecided_from_the_sft_adapter(
    tiny: Path, sft: Path, tmp_path: Path, reference: str
) -> None:
    """The step-0 margin is 0 only if the reference is the SFT adapter, not the base."""
    few = {"max_steps": 2} if reference == "scored once" else {"max_steps": 1, "rows": 12}
    wanted = spec(tiny, tmp_path, adapter_dir=str(sft), lora_dim=8, learning_rate=1e-3, **few)
    before = weights(sft)
    metrics = train(wanted)
    first = metrics[1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-3)
    plain = train(spec(tiny, tmp_path / "plain", max_steps=1))[1]
    assert first["logps/chosen"] > plain["logps/chosen"] + 5  # the policy is the SFT adapter's, not the base's
    model = tmp_path / "out" / "model"
    assert not (model / "ref").exists()
    after = weights(model)
    assert set(after) == set(before)
    assert any((after[name] - before[name]).abs().max() > 1e-5 for name in after)
    config = json.loads((model / "adapter_config.json").read_text())
    assert (config["r"], config["inference_mode"]) == (8, True)
    assert weights(sft).keys() == before.keys()
    assert all((weights(sft)[name] == before[name]).all() for name in before)


@pytest.mark.usefixtures("precision")
def test_the_probe_has_the_plain_base_beside_the_trained_adapter(tiny: Path, sft: Path, tmp_path: Path) -> None:
    train(spec(tiny, tmp_path / "sft-dpo", adapter_dir=str(sft), lora_dim=8, max_steps=2, learning_rate=1e-3))
    train(spec(tiny, tmp_path / "plain", max_steps=2, learning_rate=1e-3))
    ours, plain = (
        json.loads((tmp_path / name / "out/model/probe.json").read_text())["rows"] for name in ("sft-dpo", "plain")
    )
    assert ours[0]["base_logps"] == pytest.approx(plain[0]["base_logps"], abs=1e-4)
    assert sum(ours[0]["logps"]) > sum(plain[0]["logps"]) + 5


@pytest.mark.usefixtures("precision")
def test_a_resumed_continuation_equals_the_uninterrupted_one(tiny: Path, sft: Path, tmp_path: Path) -> None:
    settings = {"adapter_dir": str(sft), "lora_dim": 8, "num_train_epochs": 2, "learning_rate": 1e-3, "save_steps": 3}
    whole = train(spec(tiny, tmp_path / "whole", validate=True, **settings))
    checkpoint = tmp_path / "whole" / "out" / "checkpoints" / "checkpoint-3"
    assert not (checkpoint / "ref").exists()
    resumed = train(spec(tiny, tmp_path / "resumed", validate=True, resume_from=str(checkpoint), **settings))
    assert losses(resumed) == pytest.approx(losses(whole)[3:], abs=1e-5)
    assert resumed[-1]["eval"]["eval_rewards/margins"] == pytest.approx(
        whole[-1]["eval"]["eval_rewards/margins"], abs=1e-5
    )


def test_the_users_dropout_is_that_of_the_further_training(
    tiny: Path, sft: Path, tmp_path: Path, precision: str
) -> None:
    settings = {"adapter_dir": str(sft), "lora_dim": 8, "learning_rate": 1e-3, "max_steps": 2}
    plain = train(spec(tiny, tmp_path / "plain", **settings))
    dropped = train(spec(tiny, tmp_path / "dropped", lora_dropout=0.5, **settings))
    assert losses(plain)[0] == pytest.approx(0.693147, abs=NEAR[precision])
    assert losses(dropped)[0] != pytest.approx(losses(plain)[0], abs=1e-4)


def test_quantised_weights_do_not_round_the_adapter(tiny: Path, tmp_path: Path, precision: str) -> None:
    """TRL casts the policy's adapter to bfloat16 on 4-bit weights, and not the reference's."""
    four_bit = {"method": "QLoRA_LLM", "rows": 2, "max_steps": 1, "per_device_train_batch_size": 1, "lora_dim": 8}
    four_bit |= {"target_modules": ["q_proj"], "seq_length": 64, "data": SHORT}
    train(spec(tiny, tmp_path / "sft", training_strategy="sft", learning_rate=1e-2, **four_bit))
    model = tmp_path / "sft/out/model"
    metrics = train(spec(tiny, tmp_path / "dpo", adapter_dir=str(model), learning_rate=1e-9, **four_bit))
    assert metrics[1]["rewards/margins"] == pytest.approx(0, abs=1e-4 if precision == "float32" else 1e-3)
    before, after = weights(model), weights(tmp_path / "dpo/out/model")
    assert all((after[name] - before[name]).abs().max() < 1e-6 for name in before)


SHORT = [{"prompt": f"{n}?", "chosen": f"{n}!", "rejected": "No."} for n in range(2)]


def test_what_contradicts_the_adapter_is_refused_before_weights_load(tiny: Path, sft: Path, tmp_path: Path) -> None:
    contrary = {"lora_dim": 16, "lora_alpha": 8, "target_modules": ["q_proj"]}
    message = refusal(spec(tiny, tmp_path / "shape", adapter_dir=str(sft), **contrary))
    for words in (
        "lora_dim = 16, but the adapter has 8",
        "lora_alpha = 8, but the adapter has 32",
        "target_modules = ['q_proj']",
    ):
        assert words in message
    full = spec(tiny, tmp_path / "full", method="Standard_LLM", adapter_dir=str(sft))
    assert "cannot continue from the adapter" in refusal(full)
    bare = tmp_path / "bare"
    bare.mkdir()
    assert "has no adapter_config.json" in refusal(spec(tiny, tmp_path / "empty", adapter_dir=str(bare)))


def test_an_adapter_of_another_model_is_refused(tiny: Path, sft: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def altered(name: str, change: Any) -> str:
        folder = tmp_path / name
        shutil.copytree(sft, folder)
        save_file(change(weights(sft)), folder / "adapter_model.safetensors")
        return str(folder)

    for name, change in {
        "wider": lambda tensors: {key: value.repeat(2, 2) for key, value in tensors.items()},
        "deeper": lambda tensors: {
            **tensors,
            **{k.replace("layers.0", "layers.7"): v.clone() for k, v in tensors.items()},
        },
        "shallower": lambda tensors: {key: value for key, value in tensors.items() if "layers.0" in key},
    }.items():
        wanted = spec(tiny, tmp_path / f"run-{name}", adapter_dir=altered(name, change), lora_dim=8)
        assert "does not fit tiny" in refusal(wanted)
