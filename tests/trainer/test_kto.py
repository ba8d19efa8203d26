"""KTO on a tiny real model: numbers against stock TRL, labels, files, resumes, several processes, stops, refusals."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from palate_recipes.specs.train import COMPLETE_MARK, EXIT_STOPPED
from tests.slow.conftest import until
from tests.support.rows import preference_rows
from tests.trainer.support import NEAR, NORM_NEAR, losses, refusal, spec, train
from tests.trainer.test_parallel import log_of, start, together, training

pytestmark = pytest.mark.slow

KTO = {"training_strategy": "kto", "learning_rate": 1e-3}
NAMES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
NAMES += ("logits/chosen", "logits/rejected", "kl", "entropy")


def answers(count: int = 16) -> list[dict[str, Any]]:
    """Rows with one answer each, two good ones for a bad one, and of several lengths."""
    return [
        {
            "prompt": row["prompt"],
            "completion": row["rejected" if index % 3 == 2 else "chosen"] + " Really." * (index % 4),
            "label": index % 3 != 2,
        }
        for index, row in enumerate(preference_rows(count))
    ]


def steps(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in metrics if entry["kind"] == "train"]


def stock(
    tiny: Path, folder: Path, rows: list[dict[str, Any]], *, accumulation: int, adapter: bool, precision: str
) -> list[dict[str, Any]]:
    """What `KTOTrainer` as TRL ships it logs over the rows in their order; it renders, tokenises and pairs up by itself."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import KTOConfig, KTOTrainer

    system = {"role": "system", "content": "You are a helpful assistant"}
    messages = [
        {
            "prompt": [system, {"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
            "label": row["label"],
        }
        for row in rows
    ]
    arguments = KTOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=accumulation, num_train_epochs=1,
        learning_rate=1e-3, logging_steps=1, max_length=128, beta=0.3, desirable_weight=0.8, undesirable_weight=1.2,
        bf16=precision == "bfloat16", use_cpu=True, gradient_checkpointing=False, report_to=[], save_strategy="no", seed=42,
        disable_tqdm=True, weight_decay=0.0, max_grad_norm=1.0, lr_scheduler_type="linear",
    )  # fmt: skip
    set_seed(42)
    trainer = KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny, dtype=precision if adapter else "float32"),
        args=arguments,
        train_dataset=Dataset.from_list(messages),
        processing_class=AutoTokenizer.from_pretrained(tiny),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=32, target_modules="all-linear")
        if adapter
        else None,
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("method", "accumulation"),
    [("LoRA_LLM", 2), pytest.param("LoRA_LLM", 1, marks=pytest.mark.thorough), ("Standard_LLM", 1)],
)
def test_every_step_is_that_of_stock_trl(
    tiny: Path, tmp_path: Path, method: str, accumulation: int, precision: str
) -> None:
    """Same rows, same order, same precision, weights and beta that show: Palate's trainer against `KTOTrainer` over 3 epochs."""
    settings = {"num_train_epochs": 3, "dpo_beta": 0.3, "desirable_weight": 0.8, "undesirable_weight": 1.2}
    settings["gradient_accumulation_steps"] = accumulation
    rows = answers()
    ours = steps(train(spec(tiny, tmp_path / "ours", data=rows, method=method, **KTO, **settings)))

    from palate_trainer.samplers import RowSampler

    order, in_order = RowSampler(len(rows), 42), []
    for epoch in range(3):
        order.set_epoch(epoch)
        in_order += [rows[index] for index in order]
    how: dict[str, Any] = {"accumulation": accumulation, "adapter": method == "LoRA_LLM", "precision": precision}
    expected = stock(tiny, tmp_path / "stock", in_order, **how)
    assert len(ours) == len(expected) == 12 // accumulation
    near = NEAR[precision]
    for one, other in zip(ours, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=near)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=NORM_NEAR[precision])
        assert one["kl"] == pytest.approx(other["kl"], abs=near, rel=near)
        for name in NAMES if accumulation == 1 else ():  # over several batches TRL takes a mean of means
            assert (name in one) == (name in other), name
            if name in other:
                assert one[name] == pytest.approx(other[name], abs=near, rel=near), name
    assert ours[-1]["loss"] < ours[0]["loss"] - 1e-2  # a curve that moves
    assert max(entry["kl"] for entry in ours) > 0.01  # and a divergence that is not clamped to 0


@pytest.mark.usefixtures("precision")
def test_step_0_is_undecided_and_the_model_folder_is_whole(small: Path, tmp_path: Path) -> None:
    metrics = train(spec(small, tmp_path, data=answers(), validate=True, max_steps=2, **KTO))
    assert [entry["kind"] for entry in metrics] == ["start", "train", "train", "eval", "end"]
    begin, first, evaluation = metrics[0], metrics[1], metrics[3]
    assert (begin["strategy"], begin["train_rows"]) == ("kto", 16)
    assert first["loss"] == pytest.approx(0.5, abs=1e-5)  # 1 - sigmoid(0)
    assert first["kl"] == first["rewards/chosen"] == 0
    assert first["tokens"] > 0
    assert {f"eval_{name}" for name in NAMES} <= set(evaluation)
    assert evaluation["eval_rewards/margins"] == pytest.approx(
        evaluation["eval_rewards/chosen"] - evaluation["eval_rewards/rejected"]
    )
    assert metrics[-1]["reading"]["verdict"] == "too early to tell"
    model = tmp_path / "out" / "model"
    assert (model / "adapter_model.safetensors").exists()
    probe = json.loads((model / "probe.json").read_text())["rows"]
    assert len(probe) == 8
    assert all(len(row["logps"]) == len(row["completion_ids"]) > 0 for row in probe)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("flipped", [False, True])
def test_the_margin_follows_the_labels(small: Path, tmp_path: Path, flipped: bool) -> None:
    """Trained on labels as they are, or all turned round; scored by the labels as they are, which pairs hold."""
    rows = [{**row, "label": row["label"] != flipped} for row in answers()]
    wanted = spec(small, tmp_path, data=rows, held_out=preference_rows(6), num_train_epochs=4, **KTO)
    metrics = train(wanted)
    begin, end = metrics[0], metrics[-1]
    assert (begin["train_rows"], begin["validation_rows"]) == (16, 12)
    margin = end["eval"]["eval_rewards/margins"]
    assert margin < -0.1 if flipped else margin > 0.1
    assert end["train"]["rewards/margins"] > 0.1  # by its own labels every run learns


def test_a_file_of_messages_with_labels_trains(small: Path, tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Answer in one word."},
                {"role": "user", "content": "Hello."},
                {"role": "assistant", "content": "Hi."},
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ],
            "label": row["label"],
        }
        for row in answers(8)
    ]
    metrics = train(spec(small, tmp_path, data=rows, num_train_epochs=2, **KTO))
    assert metrics[0]["train_rows"] == 8
    assert losses(metrics)[0] == pytest.approx(0.5, abs=1e-5)
    assert losses(metrics)[-1] < 0.5
    from transformers import AutoTokenizer

    probe = json.loads((tmp_path / "out/model/probe.json").read_text())["rows"]
    shown = AutoTokenizer.from_pretrained(small).decode(probe[2]["prompt_ids"] + probe[2]["completion_ids"])
    for text in ("Answer in one word.", "Hi.", rows[2]["messages"][3]["content"], rows[2]["messages"][4]["content"]):
        assert text in shown


@pytest.mark.usefixtures("precision")
def test_a_resumed_run_equals_the_uninterrupted_one(small: Path, tmp_path: Path) -> None:
    settings = {"data": answers(14), "num_train_epochs": 3, "save_steps": 5, "lora_dropout": 0.1, **KTO}
    whole = steps(train(spec(small, tmp_path / "whole", **settings)))
    checkpoint = tmp_path / "whole/out/checkpoints/checkpoint-5"
    assert (checkpoint / COMPLETE_MARK).exists()
    resumed = steps(train(spec(small, tmp_path / "resumed", resume_from=str(checkpoint), **settings)))
    assert len(whole) == 12
    for name in ("loss", "kl"):
        assert [entry[name] for entry in resumed] == pytest.approx([entry[name] for entry in whole[5:]], abs=1e-5)


@pytest.mark.parametrize("method", ["LoRA_LLM", "Standard_LLM"])
def test_16_bit_arithmetic_gives_the_gradients_of_32(small: Path, tmp_path: Path, method: str) -> None:
    """The KL pass has no gradients and comes first: what it leaves in autocast's cache must not enter the one that has."""
    settings = {"data": answers(4), "max_steps": 1, "method": method, "lora_dropout": 0.1, **KTO}
    rounded = steps(train(spec(small, tmp_path / "16", precision="bfloat16", **settings)))[0]
    exact = steps(train(spec(small, tmp_path / "32", precision="float32", **settings)))[0]
    assert rounded["loss"] == pytest.approx(exact["loss"], abs=1e-2)
    assert rounded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)


@pytest.mark.usefixtures("precision")
def test_an_adapter_to_go_on_from_is_the_reference(small: Path, tmp_path: Path) -> None:
    train(spec(small, tmp_path / "sft", training_strategy="sft", learning_rate=1e-2, lora_dim=8, num_train_epochs=2))
    adapter = tmp_path / "sft/out/model"
    ours = train(
        spec(small, tmp_path / "kto", adapter_dir=str(adapter), data=answers(8), lora_dim=8, max_steps=2, **KTO)
    )
    plain = train(spec(small, tmp_path / "plain", data=answers(8), lora_dim=8, max_steps=1, **KTO))
    first = ours[1]
    assert first["loss"] == pytest.approx(0.5, abs=1e-4)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-3)
    assert first["logps/chosen"] > plain[1]["logps/chosen"] + 5  # the policy is the SFT adapter's, not the base's
    assert not (tmp_path / "kto/out/model/ref").exists()


def test_two_processes_are_one_with_twice_the_accumulation(small: Path, tmp_path: Path, precision: str) -> None:
    """13 answers are 7 batches of 2: the last round lacks one, and the last batch has one answer."""
    settings = {"data": answers(13), "num_train_epochs": 2, "per_device_train_batch_size": 2, "validate": True, **KTO}
    alone = train(spec(small, tmp_path / "alone", gradient_accumulation_steps=2, **settings))
    both = together(spec(small, tmp_path / "both", gradient_accumulation_steps=1, **settings))
    assert [entry["kind"] for entry in both] == [entry["kind"] for entry in alone]
    near = max(1e-4, NEAR[precision])
    for one, two in zip(alone, both, strict=True):
        for prefix in ("", "eval_"):
            for name in ("loss", "kl", *NAMES[:5]):
                if prefix + name in one:
                    assert two[prefix + name] == pytest.approx(one[prefix + name], abs=near, rel=near), name
        assert two.get("tokens") == one.get("tokens")


@pytest.mark.usefixtures("precision")
def test_sigterm_leaves_a_checkpoint_from_which_the_run_goes_on(small: Path, tmp_path: Path) -> None:
    wanted = spec(small, tmp_path, data=answers(), num_train_epochs=1000, **KTO).changed(processes=1)
    program = start(wanted)
    until(lambda: training(wanted) or program.poll() is not None, timeout_s=240)
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=60) == EXIT_STOPPED, log_of(wanted)[-3000:]
    (mark,) = (tmp_path / "out" / "checkpoints").glob(f"checkpoint-*/{COMPLETE_MARK}")
    done = int(mark.parent.name.removeprefix("checkpoint-"))
    rest = {"resume_from": str(mark.parent), "max_steps": done + 1}
    assert len(steps(train(spec(small, tmp_path / "rest", data=answers(), **rest, **KTO)))) == 1


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("kind", ["good", "bad"])
def test_answers_of_one_kind_train_with_a_note(small: Path, tmp_path: Path, kind: str) -> None:
    rows = [{**row, "label": kind == "good"} for row in answers(8)]
    metrics = train(spec(small, tmp_path, data=rows, validate=True, num_train_epochs=2, **KTO))
    assert any(f"all 8 answers are {kind}" in note for note in metrics[0]["notes"])
    assert losses(metrics)[0] == pytest.approx(0.5, abs=1e-5)
    there, missing = ("chosen", "rejected") if kind == "good" else ("rejected", "chosen")
    moved = metrics[-1]["eval"][f"eval_rewards/{there}"]
    assert moved > 0.01 if kind == "good" else moved < -0.01
    assert not {f"rewards/{missing}", "rewards/margins", "eval_rewards/margins"} & (set(metrics[1]) | set(metrics[-2]))


def test_unequal_numbers_are_noted_with_weights_that_make_up_for_them(small: Path, tmp_path: Path) -> None:
    from palate_trainer.tokenize import TokenPair
    from palate_trainer.trainers.kto import balance_note

    rows = [TokenPair(row, [1], [2], []) for row in range(9)] + [TokenPair(row, [1], [], [2]) for row in range(3)]
    note = balance_note(rows, desirable_weight=1.0, undesirable_weight=1.0)
    assert note is not None
    assert "desirable_weight=0.333 to 0.444 or undesirable_weight=2.25 to 3" in note
    for up, down in ((0.333, 1.0), (0.444, 1.0), (1.0, 2.25), (1.0, 3.0)):
        assert balance_note(rows, desirable_weight=up, undesirable_weight=down) is None
    assert balance_note(rows, desirable_weight=0.5, undesirable_weight=1.0) is not None
    assert balance_note(rows, desirable_weight=0.0, undesirable_weight=1.0) is not None


def test_what_concerns_good_answers_is_a_mean_over_those() -> None:
    """Three batches: 2 good and 0 bad, 1 and 1, 0 and 1; the last is a stand-in that an evaluation does not count."""
    from palate_trainer.trainers.kto import PalateKTOTrainer

    def averaged(sizes: list[int]) -> dict[str, list[float]]:
        metrics: dict[str, Any] = {"rows/chosen": [2, 1, 0], "rows/rejected": [0, 1, 1], "rewards/margins": [9.0]}
        metrics |= {"rewards/chosen": [1.0, 4.0, 0.0], "rewards/rejected": [0.0, -1.0, -3.0], "kl": [1.0, 2.0, 6.0]}
        trainer: Any = object.__new__(PalateKTOTrainer)
        trainer.average(metrics, sizes)
        return metrics

    assert averaged([]) == {
        "rewards/chosen": [2.0], "rewards/rejected": [-2.0], "rewards/margins": [4.0], "kl": [1.0, 2.0, 6.0],
    }  # fmt: skip
    assert averaged([2, 2]) == {
        "rewards/chosen": [2.0], "rewards/rejected": [-1.0], "rewards/margins": [3.0], "kl": [1.5],
    }  # fmt: skip


def test_an_answer_that_is_cut_keeps_its_label_and_is_reported(small: Path) -> None:
    """A pair whose answers differ only beyond the cut would say of one text that it is good and that it is bad."""
    from transformers import AutoTokenizer

    from palate_recipes.preferences.formats import unpaired
    from palate_recipes.preferences.row import plain_row
    from palate_trainer.tokenize import Renderer, encode_pairs

    long = "one two three four five six seven eight nine ten " * 4
    rows = [
        *unpaired(plain_row("Count.", long + "eleven", long + "twelve", 1)),
        *unpaired(plain_row("Count.", long, "No.", 2)),
        plain_row("Count.", None, long + "thirteen", 3),
    ]
    renderer = Renderer(AutoTokenizer.from_pretrained(small), True, "", 40)
    kept, report = encode_pairs(rows, renderer, name="train")
    assert [(one.row, bool(one.chosen_ids), bool(one.rejected_ids)) for one in kept] == [
        (2, True, False),
        (2, False, True),
        (3, False, True),
    ]
    assert [one.length for one in kept] == [40, kept[1].length, 40]
    assert (report.rows, report.same_after_cut, report.dropped, report.cut) == (5, [1], [1], [2, 3])
    assert kept[0].answer_ids == kept[0].chosen_ids != kept[1].answer_ids


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([{"prompt": "Hi?", "completion": "Hello."}], ["row 1", "no label"]),
        ([{"prompt": "Hi?", "completion": "Hello.", "label": "perhaps"}], ["row 1", "`label`", "perhaps"]),
        ([{"prompt": "Hi?", "completion": " ", "label": True}], ["row 1", "`completion` is empty"]),
    ],
)
def test_rows_that_kto_cannot_use_are_refused(
    small: Path, tmp_path: Path, rows: list[dict[str, Any]], parts: list[str]
) -> None:
    message = refusal(spec(small, tmp_path, data=rows, **KTO))
    for part in [*parts, "training_strategy=kto"]:
        assert part in message
