"""Every architecture of the catalog, strategy, method and precision: a step of ours against a step of TRL as it ships."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from palate_recipes.catalog import models
from palate_recipes.specs.train import TrainTask
from tests.support.architectures import CATALOG, FAMILIES, OTHERS, random_model
from tests.trainer.support import NEAR, NORM_NEAR, PRECISIONS, spec, train

pytestmark = pytest.mark.slow

DOCUMENTED = Path(__file__).parents[2] / "docs/speed.md"

_kept: dict[str, Path] = {}


@pytest.fixture
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives the folder of an architecture's model, made once."""

    def find(model_type: str) -> Path:
        if model_type not in _kept:
            _kept[model_type] = random_model(model_type, tmp_path_factory.mktemp(model_type) / "model")
        return _kept[model_type]

    return find


def test_the_matrix_has_every_family_of_the_catalog() -> None:
    assert {model.family for model in models()} == set(FAMILIES)


def cases() -> list[Any]:
    """All of them; in the short run each architecture once with each strategy, method and precision."""
    found = []
    for number, kind in enumerate((*CATALOG, *OTHERS)):
        for strategy in ("dpo", "sft", "kto"):
            for method in ("LoRA_LLM", "Standard_LLM"):
                for precision in PRECISIONS:
                    # DPO with an adapter in both precisions, all weights in one of them, and one case of sft and kto.
                    turn = PRECISIONS[number % 2]
                    short = kind in CATALOG and (
                        (strategy == "dpo" and (method == "LoRA_LLM" or precision == turn))
                        or (strategy != "dpo" and precision != turn and (method == "LoRA_LLM") == (strategy == "kto"))
                    )
                    marks = () if short else (pytest.mark.thorough,)
                    found.append(pytest.param(kind, strategy, method, precision, marks=marks))
    return found


@pytest.mark.parametrize(("kind", "strategy", "method", "precision"), cases())
def test_a_step_is_that_of_stock_trl(
    folder_of: Any, tmp_path: Path, kind: str, strategy: str, method: str, precision: str
) -> None:
    wanted = spec(
        folder_of(kind), tmp_path, method=method, precision=precision, training_strategy=strategy, rows=4,
        num_train_epochs=2, learning_rate=1e-3, lora_dim=4, lora_alpha=4, per_device_train_batch_size=8,
    )  # fmt: skip
    metrics = train(wanted)
    start, steps = metrics[0], [entry for entry in metrics if entry["kind"] == "train"]
    print(f"{kind}: batches packed: {start['packed']}, layers fused: {start['fused']}")
    assert not [note for note in start["notes"] if "WARNING" in note]
    expected = stock(wanted)
    assert len(steps) == len(expected) == 2
    for ours, theirs in zip(steps, expected, strict=True):
        assert math.isfinite(ours["loss"])
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=NEAR[precision])
        if "aux_loss" in theirs:
            assert ours["aux_loss"] == pytest.approx(theirs["aux_loss"], abs=NEAR[precision])
    assert steps[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=NORM_NEAR[precision])
    loads(wanted)
    if strategy != "kto":
        assert (start["packed"], start["fused"]) == documented()[kind]


@pytest.mark.parametrize(
    "kind", [*(pytest.param(k, marks=pytest.mark.thorough) for k in CATALOG if k != "qwen2"), "qwen2"]
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantised_weights_train_too(folder_of: Any, tmp_path: Path, kind: str, precision: str) -> None:
    settings = {"rows": 4, "num_train_epochs": 2, "learning_rate": 1e-3, "lora_dim": 4, "precision": precision}
    fast = spec(folder_of(kind), tmp_path / "fast", method="QLoRA_LLM", **settings)
    plain = spec(folder_of(kind), tmp_path / "plain", method="QLoRA_LLM", **settings).changed(fast=False)
    curves = [[entry["loss"] for entry in train(wanted) if entry["kind"] == "train"] for wanted in (fast, plain)]
    assert curves[0] == pytest.approx(curves[1], abs=NEAR[precision])
    loads(fast)


def documented() -> dict[str, tuple[bool, bool]]:
    """What docs/speed.md says of each `model_type`: whether its batches are packed, and its layers fused."""
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| (yes|no)[^|]*\| (yes|no)[^|]*\|", DOCUMENTED.read_text(), re.M)
    return {kind: (packed == "yes", fused == "yes") for kind, packed, fused in rows}


def loads(wanted: TrainTask) -> None:
    """Loads what was saved into the libraries that others would use, and scores a text with it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tuned = Path(wanted.files.output_dir) / "model"
    if wanted.spec.trains_adapter:
        assert not (tuned / "model.safetensors").exists()
        model = AutoModelForCausalLM.from_pretrained(wanted.files.model_dir, dtype="float32")
        before = model(torch.tensor([[1, 5, 6, 7]])).logits
        model = PeftModel.from_pretrained(model, tuned)
    else:
        before = None
        model = AutoModelForCausalLM.from_pretrained(tuned, dtype="float32")
    after = model(torch.tensor([[1, 5, 6, 7]])).logits
    assert torch.isfinite(after).all()
    assert before is None or not torch.equal(before, after)


def stock(wanted: TrainTask) -> list[dict[str, Any]]:
    """What TRL's own trainer logs over the same token ids, in one batch a step."""
    import torch
    import trl
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, set_seed
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from palate_recipes.preferences.load import read_rows
    from palate_trainer.samplers import RowSampler
    from palate_trainer.tokenize import Renderer, encode_pairs, load_tokenizer, stop_token_ids
    from palate_trainer.trainers import _dataset
    from palate_trainer.trainers.kto import MismatchedAnswers

    values, strategy = wanted.spec.hyperparameters, wanted.spec.hyperparameters.training_strategy
    tokenizer = load_tokenizer(wanted.files.model_dir)
    renderer = Renderer(
        tokenizer=tokenizer,
        apply_chat_template=True,
        system_prompt=values.system_prompt,
        seq_length=values.seq_length,
        stop_ids=stop_token_ids(wanted.files.model_dir),
    )
    rows, _ = encode_pairs(read_rows(wanted.files.train_file, strategy=strategy), renderer, name="train")
    order = RowSampler(len(rows), values.seed)
    in_order = []
    for epoch in range(2):
        order.set_epoch(epoch)
        in_order += [rows[number] for number in order]
    kind = {"dpo": "DPO", "sft": "SFT", "kto": "KTO"}[strategy]
    trainer_class = getattr(trl, f"{kind}Trainer")

    class Stock(trainer_class):  # type: ignore[valid-type,misc]
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

    pad = tokenizer.pad_token_id
    collator: Any = {
        "dpo": lambda: DataCollatorForPreference(pad_token_id=pad),
        "sft": lambda: DataCollatorForLanguageModeling(pad_token_id=pad),
        "kto": lambda: MismatchedAnswers(pad_token_id=pad, seq_length=values.seq_length),
    }[strategy]()
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=f"{wanted.files.output_dir}-stock", per_device_train_batch_size=len(rows), num_train_epochs=1, learning_rate=1e-3,
        logging_steps=1, bf16=wanted.spec.precision == "bfloat16", use_cpu=True, gradient_checkpointing=False, report_to=[],
        save_strategy="no", seed=42, disable_tqdm=True, weight_decay=0.0, max_grad_norm=1.0, lr_scheduler_type="linear",
        remove_unused_columns=False, max_length=None,
        **({"dataset_kwargs": {"skip_prepare_dataset": True}} if strategy == "sft" else {"beta": 0.1}),
    )  # fmt: skip
    set_seed(42)
    dtype = getattr(torch, wanted.spec.precision) if wanted.spec.trains_adapter else torch.float32
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules="all-linear")
    trainer = Stock(
        model=AutoModelForCausalLM.from_pretrained(wanted.files.model_dir, dtype=dtype),
        args=arguments,
        train_dataset=_dataset(wanted, in_order),
        processing_class=tokenizer,
        data_collator=collator,
        peft_config=config if wanted.spec.trains_adapter else None,
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]
