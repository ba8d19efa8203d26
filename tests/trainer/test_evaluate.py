"""Scores of held-out pairs against plain forward passes of transformers and PEFT, for every way to train."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from palate_recipes.specs.evaluation import SCORES_FILE, EvaluateTask, PairScores
from palate_recipes.specs.train import ERROR_FILE, TrainTask
from tests.support.rows import preference_rows
from tests.trainer.support import NEAR, spec, train

pytestmark = pytest.mark.slow

HELD_OUT = [
    {"prompt": f"Is {number} prime?", "chosen": f"Divide {number} first.", "rejected": "Yes, it is, as you say."}
    for number in range(20, 25)
]
LEARNS = {"learning_rate": 1e-2, "max_steps": 6, "dpo_beta": 0.5}
SUM_NEAR = {"float32": 1e-5, "bfloat16": 0.3}
"""How far two sums of an answer's log-probabilities may be apart, in nats: in 16 bits each token is off by a hundredth."""
REL_NEAR = 1e-6
"""The same as a share of the sum: float32 has seven digits."""


def task_for(trained: TrainTask, folder: Path, rows: list[dict[str, str]], **changes: Any) -> EvaluateTask:
    """The evaluation of what a training wrote."""
    data = folder / "rows.json"
    data.write_text(json.dumps(rows))
    known = {
        "training": trained.spec,
        "model_dir": trained.files.model_dir,
        "tuned_dir": str(Path(trained.files.output_dir) / "model"),
        "data_file": str(data),
        "output_dir": str(folder / "scores"),
        "adapter_dir": trained.files.adapter_dir,
    }
    return EvaluateTask(**{**known, **changes})


def scores_of(task: EvaluateTask) -> PairScores:
    from palate_trainer.evaluate import run

    code = run(task)
    error = Path(task.output_dir) / ERROR_FILE
    assert code == 0, error.read_text() if error.exists() else code
    return PairScores.decode((Path(task.output_dir) / SCORES_FILE).read_bytes())


def plain_logps(model: Any, folder: Path, rows: list[dict[str, str]], system: str) -> list[tuple[float, float]]:
    """Sums of log-probabilities of both answers by one forward pass each, from the tokenizer's own chat template."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def logps(prompt: str, answer: str) -> float:
        turns = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        start = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
        prompt_ids, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (start, whole))
        assert tokenizer.eos_token_id in ids[len(prompt_ids) :]  # the template ends an answer itself
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].float()
        each = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
        return float(each[len(prompt_ids) - 1 :].double().sum())

    return [(logps(row["prompt"], row["chosen"]), logps(row["prompt"], row["rejected"])) for row in rows]


def close(found: Any, expected: list[tuple[float, float]], near: float) -> None:
    assert [*zip(found.chosen, found.rejected, strict=True)] == [
        pytest.approx(pair, abs=near, rel=REL_NEAR) for pair in expected
    ]


def test_adapters_score_as_plain_transformers_and_peft_do(small: Path, tmp_path: Path, precision: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trained = spec(small, tmp_path / "run", **LEARNS)
    train(trained)
    found = scores_of(task_for(trained, tmp_path, HELD_OUT))
    base = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).eval()
    system = trained.spec.hyperparameters.system_prompt
    reference = plain_logps(base, small, HELD_OUT, system)
    tuned = plain_logps(
        PeftModel.from_pretrained(base, trained.files.output_dir + "/model").eval(), small, HELD_OUT, system
    )
    close(found.base, reference, SUM_NEAR[precision])
    close(found.tuned, tuned, SUM_NEAR[precision])
    margins = [0.5 * ((c - rc) - (r - rr)) for (c, r), (rc, rr) in zip(tuned, reference, strict=True)]
    assert max(map(abs, margins)) > 0.1  # it has learned something
    losses = [math.log1p(math.exp(-margin)) for margin in margins]
    assert found.losses == pytest.approx(losses, abs=5 * SUM_NEAR[precision])
    assert found.loss == pytest.approx(sum(found.losses or ()) / len(HELD_OUT))
    assert found.base_loss == pytest.approx(math.log(2))
    assert (found.rows, found.file_rows, found.truncated, found.dropped) == ([1, 2, 3, 4, 5], 5, [], [])
    assert found.packed
    assert scores_of(task_for(trained, tmp_path, HELD_OUT, fast=False)).tuned.chosen == pytest.approx(
        found.tuned.chosen, abs=SUM_NEAR[precision], rel=REL_NEAR
    )


@pytest.mark.usefixtures("precision")
def test_it_agrees_with_the_validation_of_the_training(small: Path, tmp_path: Path, precision: str) -> None:
    trained = spec(small, tmp_path / "run", held_out=HELD_OUT, loss_type="sigmoid,ipo", **LEARNS)
    metrics = train(trained)
    last = next(event for event in reversed(metrics) if event["kind"] == "eval")
    found = scores_of(task_for(trained, tmp_path, HELD_OUT))
    near = 1e-4 if precision == "float32" else 0.1
    assert found.loss == pytest.approx(last["eval_loss"], abs=near)
    margins = [
        0.5 * ((c - rc) - (r - rr))
        for c, r, rc, rr in zip(
            found.tuned.chosen, found.tuned.rejected, found.base.chosen, found.base.rejected, strict=True
        )
    ]
    assert sum(margins) / 5 == pytest.approx(last["eval_rewards/margins"], abs=near)
    assert sum(margin > 0 for margin in margins) / 5 == pytest.approx(last["eval_rewards/accuracies"])


@pytest.mark.parametrize("strategy", ["sft", pytest.param("kto", marks=pytest.mark.thorough)])
def test_full_weights_of_sft_and_kto_have_scores_and_no_dpo_loss(small: Path, tmp_path: Path, strategy: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    settings = {**LEARNS, "training_strategy": strategy, "learning_rate": 1e-3, "precision": "float32"}
    trained = spec(small, tmp_path / "run", method="Standard_LLM", **settings)
    train(trained)
    found = scores_of(task_for(trained, tmp_path, HELD_OUT))
    system = trained.spec.hyperparameters.system_prompt
    for folder, scores in ((small, found.base), (Path(trained.files.output_dir) / "model", found.tuned)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        close(scores, plain_logps(model, small, HELD_OUT, system), SUM_NEAR["float32"])
    assert found.tuned.chosen != pytest.approx(found.base.chosen, abs=0.1)
    assert (found.losses, found.loss, found.base_loss) == (None, None, None)


def test_the_adapter_that_a_job_began_with_is_its_reference(small: Path, tmp_path: Path) -> None:
    settings = {**LEARNS, "precision": "float32", "lora_dropout": 0.3}
    first = spec(small, tmp_path / "first", **settings)
    train(first)
    begun_with = str(Path(first.files.output_dir) / "model")
    second = spec(small, tmp_path / "second", adapter_dir=begun_with, **settings)
    train(second)
    found = scores_of(task_for(second, tmp_path, HELD_OUT))
    assert found.base == scores_of(task_for(first, tmp_path, HELD_OUT)).tuned
    assert found.tuned.chosen != pytest.approx(found.base.chosen, abs=0.1)


def test_rows_that_cannot_be_used_are_counted_and_a_cache_saves_both_passes(small: Path, tmp_path: Path) -> None:
    trained = spec(small, tmp_path / "run", precision="float32", seq_length=40, bad_rows="skip", **LEARNS)
    train(trained)
    rows = [
        *preference_rows(2),
        {"prompt": "Is it?", "chosen": "", "rejected": "Yes."},
        {"prompt": "why " * 60, "chosen": "So.", "rejected": "Because."},
        {"prompt": "Count", "chosen": "one " * 60, "rejected": "two"},
    ]
    task = task_for(trained, tmp_path, rows, cache_dir=str(tmp_path / "cache"))
    found = scores_of(task)
    assert (found.rows, found.file_rows, found.dropped, found.cached) == ([1, 2, 5], 4, [4], 0)
    assert 5 in found.truncated
    assert any("row 3" in note for note in found.notes)
    again = scores_of(task)
    assert again.cached == 2 * 3
    assert (again.tuned, again.base, again.losses) == (found.tuned, found.base, found.losses)


@pytest.mark.parametrize(
    ("loss_type", "by_row"),
    [
        ("sigmoid,sft", False),
        pytest.param("aot", False, marks=pytest.mark.thorough),
        pytest.param("bco_pair", True, marks=pytest.mark.thorough),
    ],
)
def test_a_loss_that_compares_rows_has_no_value_for_one(
    small: Path, tmp_path: Path, loss_type: str, by_row: bool
) -> None:
    trained = spec(small, tmp_path / "run", precision="float32", held_out=HELD_OUT, loss_type=loss_type, **LEARNS)
    last = next(event for event in reversed(train(trained)) if event["kind"] == "eval")
    found = scores_of(task_for(trained, tmp_path, HELD_OUT))
    assert (found.losses is not None) is by_row
    assert found.loss == pytest.approx(last["eval_loss"], abs=NEAR["float32"] * 10)


def test_what_cannot_be_scored_is_a_reason(small: Path, tmp_path: Path) -> None:
    from palate_trainer.evaluate import run

    trained = spec(small, tmp_path / "run", precision="float32", **LEARNS)
    task = task_for(trained, tmp_path, HELD_OUT)
    one_answer = task_for(trained, tmp_path / "run", [{"prompt": "Is it?", "chosen": "Yes."}])
    for wanted, reason in (
        (one_answer, "`rejected` is missing"),
        (replace(task, tuned_dir=str(tmp_path / "no")), "has no adapter_config.json"),
        (replace(task, model_dir=str(tmp_path / "no")), "does not exist"),
    ):
        assert run(wanted) == 1
        assert reason in (Path(wanted.output_dir) / ERROR_FILE).read_text()
        assert not (Path(wanted.output_dir) / SCORES_FILE).exists()
