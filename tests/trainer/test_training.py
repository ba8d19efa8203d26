"""The training program on tiny real models: numbers against stock TRL, stops, resumes, failures."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from palate_recipes.specs.train import COMPLETE_MARK, ERROR_FILE, EXIT_STOPPED, TrainTask
from tests.support.rows import preference_rows
from tests.trainer.support import NEAR, losses, spec, train

pytestmark = pytest.mark.slow


def test_the_loss_curve_is_that_of_stock_trl(tiny: Path, tmp_path: Path, precision: str) -> None:
    """Same rows, same order, same precision: palate's trainer against `DPOTrainer` as TRL ships it, over 12 steps."""
    ours = train(spec(tiny, tmp_path / "ours", num_train_epochs=4, learning_rate=1e-3, seq_length=128))

    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from palate_trainer.samplers import RowSampler

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    system = {"role": "system", "content": "You are a helpful assistant"}
    rows = [
        {
            "prompt": [system, {"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in preference_rows()
    ]
    order = _order_of_ours(tiny, RowSampler)

    class Stock(DPOTrainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    arguments = DPOConfig(
        output_dir=str(tmp_path / "stock"), per_device_train_batch_size=4, gradient_accumulation_steps=1, num_train_epochs=1,
        learning_rate=1e-3, logging_steps=1, max_length=128, beta=0.1, bf16=precision == "bfloat16",
        use_cpu=True, gradient_checkpointing=False, report_to=[], save_strategy="no", seed=42, disable_tqdm=True, weight_decay=0.0,
        max_grad_norm=1.0, lr_scheduler_type="linear", disable_dropout=True,
    )  # fmt: skip
    from transformers import set_seed

    set_seed(42)
    stock = Stock(
        model=AutoModelForCausalLM.from_pretrained(tiny, dtype=precision),
        args=arguments,
        train_dataset=Dataset.from_list([rows[index] for epoch in order for index in epoch]),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=32, target_modules="all-linear"),
    )
    stock.train()
    expected = [entry["loss"] for entry in stock.state.log_history if "loss" in entry]
    assert len(expected) == len(losses(ours)) == 12
    assert losses(ours) == pytest.approx(expected, abs=NEAR[precision])
    assert expected[-1] < expected[0] - 1e-3  # a curve that moves


def _order_of_ours(tiny: Path, sampler: Any) -> list[list[int]]:
    from transformers import AutoTokenizer

    from palate_recipes.preferences.row import plain_row
    from palate_trainer.tokenize import Renderer, encode_pairs

    pairs = [
        plain_row(row["prompt"], row["chosen"], row["rejected"], index)
        for index, row in enumerate(preference_rows(), 1)
    ]
    renderer = Renderer(AutoTokenizer.from_pretrained(tiny), True, "You are a helpful assistant", 128)
    encoded, _ = encode_pairs(pairs, renderer, name="train")
    order = sampler(len(encoded), 42)
    epochs = []
    for epoch in range(4):
        order.set_epoch(epoch)
        epochs.append(list(order))
    return epochs


@pytest.mark.usefixtures("precision")
def test_step_0_is_undecided_and_metrics_have_trls_names(small: Path, tmp_path: Path) -> None:
    metrics = train(spec(small, tmp_path, validate=True, max_steps=2))
    assert [entry["kind"] for entry in metrics] == ["start", "train", "train", "eval", "end"]
    first = metrics[1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert {
        "step",
        "epoch",
        "learning_rate",
        "grad_norm",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
    } <= set(first)
    assert {"logps/chosen", "logps/rejected"} <= set(first)
    assert {"eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"} <= set(metrics[3])
    assert metrics[-1]["final_loss"] > 0
    probe = json.loads((tmp_path / "out" / "model" / "probe.json").read_text())
    assert len(probe["rows"]) == 8
    assert all(len(row["logps"]) == len(row["completion_ids"]) for row in probe["rows"])


@pytest.mark.usefixtures("precision")
def test_a_resumed_run_equals_the_uninterrupted_one(small: Path, tmp_path: Path) -> None:
    settings = {"num_train_epochs": 4, "learning_rate": 1e-3, "save_steps": 5, "lora_dropout": 0.1}
    whole = losses(train(spec(small, tmp_path / "whole", **settings)))
    checkpoint = tmp_path / "whole" / "out" / "checkpoints" / "checkpoint-5"
    assert (checkpoint / COMPLETE_MARK).exists()
    resumed = losses(train(spec(small, tmp_path / "resumed", resume_from=str(checkpoint), **settings)))
    assert resumed == pytest.approx(whole[5:], abs=1e-5)


@pytest.mark.usefixtures("precision")
def test_resuming_a_finished_run_takes_no_further_step(small: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 2, "save_steps": 2, "learning_rate": 1e-3}
    train(spec(small, tmp_path / "whole", **settings))
    checkpoint = tmp_path / "whole" / "out" / "checkpoints" / "checkpoint-2"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):  # served, both render as trained
        assert (checkpoint / name).read_bytes() == (tmp_path / "whole/out/model" / name).read_bytes()
    metrics = train(spec(small, tmp_path / "again", resume_from=str(checkpoint), **settings))
    assert [entry["kind"] for entry in metrics] == ["start", "end"]
    weights = "model/adapter_model.safetensors"
    assert (tmp_path / "again/out" / weights).read_bytes() == (tmp_path / "whole/out" / weights).read_bytes()


def test_accumulation_equals_a_larger_batch(small: Path, tmp_path: Path, precision: str) -> None:
    settings = {"rows": 8, "num_train_epochs": 3, "learning_rate": 1e-3}
    wide = train(spec(small, tmp_path / "wide", per_device_train_batch_size=8, **settings))
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    deep = train(spec(small, tmp_path / "deep", **split, **settings))
    assert losses(deep) == pytest.approx(losses(wide), abs=NEAR[precision])


@pytest.mark.parametrize("rows", [13, pytest.param(16, marks=pytest.mark.thorough)])
def test_steps_are_the_same_however_their_rows_are_cut_into_batches(
    small: Path, tmp_path: Path, rows: int, precision: str
) -> None:
    """13 rows: the epoch's last step has 5, in a short batch or in several; small batches are joined by the program."""
    settings = {"rows": rows, "num_train_epochs": 2, "learning_rate": 1e-3}
    shapes = [(8, 1), (4, 2), (1, 8)]
    curves = []
    for size, accumulation in shapes:
        shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        curves.append(losses(train(spec(small, tmp_path / str(size), **shape, **settings))))
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=NEAR[precision])


@pytest.mark.usefixtures("precision")
def test_lora_dropout_is_what_was_set(small: Path, tmp_path: Path) -> None:
    plain = losses(train(spec(small, tmp_path / "plain", num_train_epochs=2, learning_rate=1e-3)))
    dropped = losses(train(spec(small, tmp_path / "dropped", num_train_epochs=2, learning_rate=1e-3, lora_dropout=0.5)))
    assert dropped != pytest.approx(plain, abs=1e-6)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("loss_type", ["ipo", "hinge", "apo_zero", "sppo_hard"])
def test_other_losses_train(small: Path, tmp_path: Path, loss_type: str) -> None:
    assert all(math.isfinite(loss) for loss in losses(train(spec(small, tmp_path, max_steps=2, loss_type=loss_type))))


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantised_training_on_this_processor_works_or_says_why_not(small: Path, tmp_path: Path, bits: str) -> None:
    from palate_trainer.train import run

    wanted = spec(
        small, tmp_path, method="QLoRA_LLM", rows=2, max_steps=1, per_device_train_batch_size=1, **{bits: True}
    )
    code = run(wanted)
    error = Path(wanted.files.output_dir) / ERROR_FILE
    if code == 0:
        assert (Path(wanted.files.output_dir) / "model" / "adapter_model.safetensors").exists()
    else:
        assert f"{bits}=false" in error.read_text()


def program(wanted: TrainTask, folder: Path) -> subprocess.Popen[str]:
    path = folder / "spec.json"
    wanted.write(path)
    return subprocess.Popen(
        [sys.executable, "-m", "palate_trainer", str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(process: subprocess.Popen[str], out: Path, text: str) -> None:
    """Waits until a running program has written a text to its metrics."""
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and text in metrics.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.usefixtures("precision")
def test_sigterm_leaves_a_whole_checkpoint_and_says_so_in_the_exit_code(small: Path, tmp_path: Path) -> None:
    process = program(spec(small, tmp_path, num_train_epochs=1000), tmp_path)
    wait_for(process, tmp_path / "out", '"kind": "train"')
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, output[-2000:]
    (mark,) = (tmp_path / "out" / "checkpoints").glob(f"checkpoint-*/{COMPLETE_MARK}")
    names = {path.name for path in mark.parent.iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= names
    assert not (tmp_path / "out" / "model").exists()


def test_sigterm_before_the_first_step_has_the_same_exit_code(small: Path, tmp_path: Path) -> None:
    process = program(spec(small, tmp_path), tmp_path)
    deadline = time.monotonic() + 30
    while not (tmp_path / "out").exists():  # made before the imports, which take seconds
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, output[-2000:]
    assert not (tmp_path / "out" / ERROR_FILE).exists()
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.usefixtures("precision")
def test_a_loss_that_is_no_number_ends_the_run_with_a_remedy(small: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from palate_trainer.train import run

    broken = tmp_path / "broken"
    shutil.copytree(small, broken)
    model = AutoModelForCausalLM.from_pretrained(small)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    model.save_pretrained(broken)
    wanted = spec(broken, tmp_path / "run", max_steps=3)
    assert run(wanted) == 1
    message = (Path(wanted.files.output_dir) / ERROR_FILE).read_text()
    assert "nan at step 1" in message
    assert "learning_rate" in message
    assert not (Path(wanted.files.output_dir) / "model").exists()


def test_a_base_without_a_chat_template_is_refused_with_the_remedy(small: Path, tmp_path: Path) -> None:
    from palate_trainer.train import run

    bare = tmp_path / "bare"
    bare.mkdir()
    for path in small.iterdir():
        if path.name != "chat_template.jinja":
            (bare / path.name).write_bytes(path.read_bytes())
    wanted = spec(bare, tmp_path / "run", max_steps=1)
    assert run(wanted) == 1
    assert "apply_chat_template=false" in (Path(wanted.files.output_dir) / ERROR_FILE).read_text()
    train(spec(bare, tmp_path / "plain", max_steps=1, apply_chat_template=False))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_through_4_bit_weights_are_those_of_the_same_weights_in_float32(
    small: Path, tmp_path: Path, precision: str
) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from palate_trainer.model import load_model, lora_config

    wanted = spec(small, tmp_path, method="QLoRA_LLM", precision=precision, lora_dim=4, lora_alpha=4)
    quantised, whole = load_model(wanted), AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    layers = {name: layer for name, layer in quantised.named_modules() if isinstance(layer, Linear4bit)}
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers.values())
    for name, layer in layers.items():
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        whole.get_submodule(name).weight.data.copy_(weight.float())
    ids = torch.arange(3, 43)[None]
    gradients = []
    for model in (quantised, whole):
        torch.manual_seed(0)
        adapted = get_peft_model(model, lora_config(wanted))
        generator = torch.Generator().manual_seed(1)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        with torch.no_grad():
            adapted.eval()(input_ids=ids)  # as the reference is scored
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16" and model is quantised):
            loss = adapted.train()(input_ids=ids, labels=ids).loss
        loss.float().backward()
        gradients.append(torch.cat([p.grad.float().flatten() for p in adapted.parameters() if p.grad is not None]))
    found, expected = gradients
    assert (found - expected).norm() <= (1e-4 if precision == "float32" else 0.05) * expected.norm()


def test_quantised_training_on_a_cpu_prints_no_warning_of_torch(small: Path, tmp_path: Path) -> None:
    wanted = spec(small, tmp_path, method="QLoRA_LLM", rows=2, max_steps=1, per_device_train_batch_size=1)
    process = program(wanted, tmp_path)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-2000:]
    assert "Warning" not in output
