"""What a training must never get wrong in silence: labels, dropout, what is saved, what is merged, what can be served."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.architectures import random_model
from tests.support.rows import preference_rows
from tests.trainer.support import refusal, spec, train

pytestmark = pytest.mark.slow


def flipped(row: dict[str, str]) -> dict[str, str]:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


# Labels


@pytest.mark.usefixtures("precision")
def test_flipped_labels_turn_the_margin_and_shuffled_ones_teach_nothing(small: Path, tmp_path: Path) -> None:
    """32 rows to learn from, 32 held out. Accuracy on labels drawn by lot is binomial: 0.5 within 3 standard deviations."""
    rows = preference_rows(64)
    learn, held_out = rows[:32], rows[32:]
    draw = random.Random(0)

    def by_lot(some: list[dict[str, str]]) -> list[dict[str, str]]:
        return [flipped(row) if draw.random() < 0.5 else row for row in some]

    def held_out_after(name: str, data: list[dict[str, str]], truth: list[dict[str, str]]) -> dict[str, Any]:
        settings = {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 100, "system_prompt": ""}
        return dict(train(spec(small, tmp_path / name, data=data, held_out=truth, **settings))[-1]["eval"])

    true = held_out_after("true", learn, held_out)
    assert true["eval_rewards/margins"] > 0.1
    assert true["eval_rewards/accuracies"] == 1
    turned = held_out_after("flipped", [flipped(row) for row in learn], held_out)
    assert turned["eval_rewards/margins"] < -0.1
    assert turned["eval_rewards/accuracies"] == 0
    shuffled = held_out_after("shuffled", by_lot(learn), by_lot(held_out))
    assert shuffled["eval_rewards/accuracies"] == pytest.approx(0.5, abs=3 * (0.25 / 32) ** 0.5)


# Dropout


def test_lora_dropout_is_in_every_adapter_and_sleeps_in_evaluation(small: Path, tmp_path: Path) -> None:
    import torch
    from peft import get_peft_model

    from palate_trainer.model import load_model, lora_config

    wanted = spec(small, tmp_path, lora_dropout=0.3)
    model = get_peft_model(load_model(wanted), lora_config(wanted))
    dropouts = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    adapters = {name for name in dropouts if "lora_dropout" in name}
    assert len(adapters) == 2 * 7  # two layers of seven linear ones
    assert {dropouts[name] for name in adapters} == {0.3}
    assert {p for name, p in dropouts.items() if name not in adapters} <= {0.0}


@pytest.mark.usefixtures("precision")
def test_lora_dropout_leaves_evaluation_alone(small: Path, tmp_path: Path) -> None:
    still = {"learning_rate": 1e-9, "max_steps": 2, "validate": True}
    plain = train(spec(small, tmp_path / "plain", lora_dropout=0.0, **still))[-1]["eval"]
    dropped = train(spec(small, tmp_path / "dropped", lora_dropout=0.5, **still))[-1]["eval"]
    assert dropped["eval_logps/chosen"] == pytest.approx(plain["eval_logps/chosen"], abs=1e-4)


# What is saved


@pytest.mark.parametrize("method", ["LoRA_LLM", "Standard_LLM"])
@pytest.mark.parametrize("strategy", ["sft", "dpo"])
def test_the_probe_is_what_a_fresh_load_computes(
    small: Path, tmp_path: Path, method: str, strategy: str, precision: str
) -> None:
    train(spec(small, tmp_path, method=method, training_strategy=strategy, learning_rate=1e-2, max_steps=2))
    model = tmp_path / "out" / "model"
    near = 1e-3 if precision == "float32" else 0.1  # of one token; the load computes in the base's own type
    probe = json.loads((model / "probe.json").read_text())
    assert len(probe["rows"]) == 8
    for row in probe["rows"]:
        assert row["logps"] == pytest.approx(logps(load(small, model), row), abs=near)
        assert ("base_logps" in row) == (method == "LoRA_LLM")
    if method == "LoRA_LLM":
        row = probe["rows"][0]
        assert row["base_logps"] == pytest.approx(logps(load(small), row), abs=near)
        assert row["logps"] != pytest.approx(row["base_logps"], abs=1e-2)


def load(base: Path, tuned: Path | None = None) -> Any:
    """A model as a reader of the folders would load it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if tuned is None or (tuned / "config.json").exists():
        return AutoModelForCausalLM.from_pretrained(tuned or base, dtype="auto").eval()
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), tuned).eval()


def logps(model: Any, row: dict[str, Any]) -> list[float]:
    """Log-probabilities of the row's completion, in the model's own type."""
    import torch

    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    with torch.no_grad():
        scores = model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1].float().log_softmax(-1)
    picked = scores.gather(1, torch.tensor(row["completion_ids"]).unsqueeze(1))
    return [float(value) for value in picked.squeeze(1)]


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("stored", ["bfloat16", "4 bit"])
def test_merged_weights_answer_as_the_adapter_does_and_are_never_4_bit(tiny: Path, tmp_path: Path, stored: str) -> None:
    """The transformers engine merges in float32. Its log-probs are the adapter's within 2e-2, a mean over tokens: in 16 bits
    the adapter itself is off by that much."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from palate_server.transformers import merge

    train(spec(tiny, tmp_path, training_strategy="sft", learning_rate=1e-2, num_train_epochs=2))
    adapter, base, merged = tmp_path / "out" / "model", tmp_path / "base", tmp_path / "merged"
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    options = {"quantization_config": four_bit, "device_map": "cpu"} if stored == "4 bit" else {}
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16, **options).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(base)
    merge(str(base), str(adapter), str(merged))
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config
    answers = load(merged)
    assert {parameter.dtype for parameter in answers.parameters()} == {torch.float32}
    rows = json.loads((adapter / "probe.json").read_text())["rows"]
    with_adapter = load(base, adapter)
    apart = [abs(a - b) for row in rows for a, b in zip(logps(answers, row), logps(with_adapter, row), strict=True)]
    assert sum(apart) / len(apart) < 2e-2
    moved = [abs(a - b) for row in rows for a, b in zip(logps(answers, row), row["base_logps"], strict=True)]
    assert sum(moved) / len(moved) > 0.1  # the adapter is in there


# What can be trained and served


def test_float16_trains_in_float32(small: Path, tmp_path: Path) -> None:
    """The float16 scaler takes no 16-bit gradients, and TRL makes an adapter on quantised weights bfloat16."""
    import torch
    from peft import get_peft_model

    from palate_trainer.model import load_model, lora_config
    from palate_trainer.trainers import PalateDPOTrainer

    wanted = spec(small, tmp_path, precision="float16")
    model = get_peft_model(load_model(wanted), lora_config(wanted))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    PalateDPOTrainer.use_float32_updates(SimpleNamespace(model=model))  # type: ignore[arg-type]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.float16}


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (["q_porj"], "q_porj matches no layer of this model; did you mean q_proj"),
        (["q_proj", "c_attn"], "c_attn matches no layer of this model"),
        (["self_attn"], "self_attn matches no layer"),
        (["act_fn"], "act_fn is a SiLU"),
    ],
)
def test_modules_that_do_not_fit_are_refused_before_weights_load(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], modules: list[str], words: str
) -> None:
    message = refusal(spec(small, tmp_path, target_modules=modules))
    assert words in message
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in message
    assert "loading tiny" not in capfd.readouterr().out


def test_layers_that_peft_refuses_are_named_and_others_train(tmp_path: Path) -> None:
    """PEFT takes no adapter on the `out_proj` of a Mamba layer, which `all-linear` includes."""
    model = random_model("nemotron_h", tmp_path / "model")
    message = refusal(spec(model, tmp_path / "all", rows=4))
    assert message.startswith("target_modules='all-linear' does not fit this model: ")
    assert "'out_proj'" in message
    train(spec(model, tmp_path / "some", rows=4, max_steps=1, target_modules=["q_proj", "v_proj"]))


def test_modules_may_be_named_by_a_path(small: Path, tmp_path: Path) -> None:
    train(spec(small, tmp_path, max_steps=1, target_modules=["layers.1.self_attn.q_proj", "v_proj"]))
    config = json.loads((tmp_path / "out/model/adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["layers.1.self_attn.q_proj", "v_proj"]


def test_the_ranks_are_vllms() -> None:
    """Read from vLLM's source where it is installed: importing it takes too long."""
    import re
    from importlib.util import find_spec

    from palate_recipes.schema import HYPERPARAMETERS
    from palate_recipes.servability import LORA_RANKS

    assert HYPERPARAMETERS["lora_dim"].maximum == LORA_RANKS[-1]
    vllm = find_spec("vllm")
    if vllm is None or vllm.origin is None:
        pytest.skip("vLLM is not installed")
    source = (Path(vllm.origin).parent / "config/lora.py").read_text()
    (ranks,) = re.findall(r"MaxLoRARanks = Literal\[([\d, ]+)\]", source)
    assert tuple(int(rank) for rank in ranks.split(",")) == LORA_RANKS
