"""Every loss against its formula: log-probabilities summed over an answer, or averaged where the loss says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from palate_recipes.schema import LOSS_TYPES
from tests.trainer.support import losses, spec, train

pytestmark = pytest.mark.slow

NEAR = {"float32": 1e-4, "bfloat16": 5e-2}
BETA, SMOOTHING, TAU = 0.5, 0.1, 0.05
ROWS = [
    {"prompt": "One?", "chosen": "It is one, and not two.", "rejected": "No."},
    {"prompt": "Is two a number?", "chosen": "Yes.", "rejected": "It never was one, whatever they say."},
]


class Scores:
    """Log-probabilities of the rows' answers by plain forward passes, one answer at a time; tensors over (pairs,)."""

    def __init__(self, model: Any, rows: list[Any], autocast: Callable[[], Any], ld_alpha: float = 1.0) -> None:
        import torch

        def logps(row: Any, completion: list[int], other: list[int]) -> Any:
            ids = torch.tensor([row.prompt_ids + completion])
            with torch.no_grad(), autocast():
                logits = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
            each = (
                logits.float().log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
            )  # (tokens,)
            both = min(len(completion), len(other))
            return each[:both].sum() + ld_alpha * each[both:].sum()

        def scored() -> Any:
            chosen = [logps(row, row.chosen_ids, row.rejected_ids) for row in rows]
            return torch.stack([*chosen, *(logps(row, row.rejected_ids, row.chosen_ids) for row in rows)]).chunk(2)

        chosen, rejected = scored()
        with model.disable_adapter():
            ref_chosen, ref_rejected = scored()
        self.c, self.r = chosen - ref_chosen, rejected - ref_rejected
        self.own, self.ref = chosen - rejected, ref_chosen - ref_rejected
        self.c_tokens = torch.tensor([len(row.chosen_ids) for row in rows])
        self.r_tokens = torch.tensor([len(row.rejected_ids) for row in rows])
        self.token_mean = chosen.sum() / self.c_tokens.sum()


def formula(name: str, s: Scores) -> Any:
    """The loss of each pair, or one for all, as the papers have it."""
    import torch
    from torch.nn.functional import logsigmoid

    d, c, r = BETA * (s.c - s.r), BETA * s.c, BETA * s.r
    per_token = s.c / s.c_tokens - s.r / s.r_tokens
    aot = {
        "aot": lambda: s.own.sort().values - s.ref.sort().values,
        "aot_unpaired": lambda: s.c.sort().values - s.r.sort().values,
    }

    def smoothed(delta: Any) -> Any:
        return -(1 - SMOOTHING) * logsigmoid(BETA * delta) - SMOOTHING * logsigmoid(-BETA * delta)

    def exo() -> Any:
        won, lost = torch.sigmoid(d), torch.sigmoid(-d)
        return won * (won / (1 - SMOOTHING)).log() + lost * (lost / SMOOTHING).log()

    def discopop() -> Any:
        share = torch.sigmoid(d / TAU)
        return -logsigmoid(d) * (1 - share) + torch.exp(-d) * share

    formulas: dict[str, Callable[[], Any]] = {
        "sigmoid": lambda: -logsigmoid(d),
        "hinge": lambda: torch.relu(1 - d),
        "ipo": lambda: (per_token - 1 / (2 * BETA)) ** 2,
        "exo_pair": exo,
        "robust": lambda: (-(1 - SMOOTHING) * logsigmoid(d) + SMOOTHING * logsigmoid(-d)) / (1 - 2 * SMOOTHING),
        "nca_pair": lambda: -logsigmoid(c) - 0.5 * logsigmoid(-c) - 0.5 * logsigmoid(-r),
        "bco_pair": lambda: -logsigmoid(c) - logsigmoid(-r),
        "sppo_hard": lambda: (s.c - 0.5 / BETA) ** 2 + (s.r + 0.5 / BETA) ** 2,
        "aot": lambda: smoothed(aot["aot"]()),
        "aot_unpaired": lambda: smoothed(aot["aot_unpaired"]()),
        "apo_zero": lambda: 1 - torch.sigmoid(c) + torch.sigmoid(r),
        "apo_down": lambda: torch.sigmoid(c) + 1 - torch.sigmoid(d),
        "discopop": discopop,
        "sft": lambda: -s.token_mean,
        "sigmoid_norm": lambda: -logsigmoid(BETA * per_token),
    }
    assert set(formulas) == set(LOSS_TYPES)
    return formulas[name]()


def computed(small: Path, folder: Path, **hyperparameters: Any) -> tuple[float, Scores]:
    """The trainer's loss over ROWS with an adapter that is not new, and the scores it must come from."""
    import torch

    from palate_recipes.preferences.load import read_rows
    from palate_trainer.fast.forward import completion_tokens_only
    from palate_trainer.model import load_model
    from palate_trainer.reference_scores import ReferenceScores
    from palate_trainer.tokenize import Renderer, encode_pairs, load_tokenizer
    from palate_trainer.trainers import build_trainer

    given = {"dpo_beta": BETA, "label_smoothing": SMOOTHING, "discopop_tau": TAU, "per_device_train_batch_size": 2}
    wanted = spec(small, folder, data=ROWS, **given, **hyperparameters)
    tokenizer = load_tokenizer(wanted.files.model_dir)
    renderer = Renderer(tokenizer, True, "Be brief.", 128)
    rows, _ = encode_pairs(read_rows(wanted.files.train_file), renderer, name="train")
    with completion_tokens_only():
        trainer = build_trainer(
            wanted,
            model=load_model(wanted),
            tokenizer=tokenizer,
            train=rows,
            validation=[],
            callbacks=[],
            reference=ReferenceScores(wanted, print),
            note=print,
        )
        torch.manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        (batch,) = trainer.get_train_dataloader()
        loss = trainer.compute_loss(trainer.model.train(), batch)
        loss.backward()
    grads = [p.grad for p in trainer.model.parameters() if p.requires_grad]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    ld_alpha = wanted.spec.hyperparameters.ld_alpha
    scores = Scores(trainer.model.eval(), rows, trainer.accelerator.autocast, ld_alpha=ld_alpha)
    assert scores.c.abs().min() > 0.01  # the policy has left the reference
    return float(loss), scores


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_the_loss_is_its_formula(small: Path, tmp_path: Path, name: str, precision: str) -> None:
    loss, scores = computed(small, tmp_path, loss_type=name)
    assert loss == pytest.approx(float(formula(name, scores).mean()), rel=NEAR[precision], abs=NEAR[precision])


def test_several_losses_are_added_with_their_weights(small: Path, tmp_path: Path, precision: str) -> None:
    loss, scores = computed(small, tmp_path, loss_type=["sigmoid", "bco_pair", "sft"], loss_weights="0.8,0.2,1.5")
    weighted = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.5}
    expected = sum(weight * float(formula(name, scores).mean()) for name, weight in weighted.items())
    assert loss == pytest.approx(expected, rel=NEAR[precision])


def test_ld_alpha_weighs_what_the_longer_answer_has_more(small: Path, tmp_path: Path, precision: str) -> None:
    loss, scores = computed(small, tmp_path / "ld", ld_alpha=0.25)
    assert loss == pytest.approx(float(formula("sigmoid", scores).mean()), rel=NEAR[precision])
    plain, _ = computed(small, tmp_path / "plain")
    assert loss != pytest.approx(plain, abs=1e-3)


@pytest.mark.usefixtures("precision")
def test_a_mix_with_an_uncached_reference_trains(small: Path, tmp_path: Path) -> None:
    mix = {"loss_type": "sigmoid,sft", "loss_weights": [1, 0.5], "ld_alpha": 0.5}
    metrics = train(spec(small, tmp_path, max_steps=1, **mix))
    assert losses(metrics)[0] > 0.6931 + 0.5 * 5  # ln 2 and half the loss of an untrained model
