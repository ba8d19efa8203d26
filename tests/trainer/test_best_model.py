"""Early stopping, and the best checkpoint as the model: over real trainings that over-fit, also after a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.rows import preference_rows
from tests.trainer.support import losses, refusal, spec, train

pytestmark = pytest.mark.slow

OVERFITS: dict[str, Any] = {
    "learning_rate": 2e-2,
    "rows": 8,
    "held_out": [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in preference_rows(8)],
    "eval_steps": 1,
    "max_steps": 12,
}
"""What it learns on the training rows makes it worse on the others, so that the first evaluations are the best."""


def evaluations(events: list[dict[str, Any]], name: str = "eval_loss") -> dict[int, float]:
    return {event["step"]: event[name] for event in events if event["kind"] == "eval"}


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "adapter_model.safetensors"))


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in (folder / "out/checkpoints").iterdir())


def test_the_model_is_the_best_checkpoint_and_the_training_stops_early(
    tiny: Path, tmp_path: Path, precision: str
) -> None:
    settings = {"load_best_model_at_end": True, "early_stopping_patience": 3, "precision": precision, **OVERFITS}
    events = train(spec(tiny, tmp_path / "whole", **settings))
    seen, end = evaluations(events), events[-1]
    best = min(seen, key=lambda step: (seen[step], step))
    assert list(seen) == [*range(1, best + 4)]  # three evaluations after the best one, of twelve planned
    assert (end["step"], end["best_step"], end["best_metric"]) == (best + 3, best, seen[best])
    assert end["stopped_early"]
    assert end["eval"]["eval_loss"] == seen[best]
    kept = tmp_path / "whole/out/checkpoints"
    assert checkpoints(tmp_path / "whole")[-1] == best  # only improvements are written
    model = weights(tmp_path / "whole/out/model")
    assert same(model, weights(kept / f"checkpoint-{best}"))

    # From the best step, in a folder of another machine's: the counts begin again where they were.
    elsewhere = tmp_path / "elsewhere" / f"checkpoint-{best}"
    shutil.copytree(kept / f"checkpoint-{best}", elsewhere)
    moved = tmp_path / "resumed/out/checkpoints" / f"checkpoint-{best}"
    moved.parent.mkdir(parents=True)
    shutil.copytree(elsewhere, moved)
    shutil.rmtree(kept)
    resumed = train(spec(tiny, tmp_path / "resumed", resume_from=str(moved), **settings))
    assert evaluations(resumed) == {step: seen[step] for step in seen if step > best}
    assert (resumed[-1]["step"], resumed[-1]["best_step"]) == (end["step"], best)
    assert resumed[-1]["eval"]["eval_loss"] == seen[best]
    assert same(model, weights(tmp_path / "resumed/out/model"))


@pytest.mark.thorough
def test_a_run_that_ended_between_its_early_stop_and_its_model_makes_no_further_step(
    tiny: Path, tmp_path: Path, precision: str
) -> None:
    settings = {"early_stopping_patience": 2, "save_steps": 1, "precision": precision, **OVERFITS}
    whole = train(spec(tiny, tmp_path / "whole", **settings))
    last = whole[-1]["step"]
    assert last < OVERFITS["max_steps"]
    assert "best_step" not in whole[-1]
    folder = tmp_path / "whole/out/checkpoints" / f"checkpoint-{last}"
    resumed = train(spec(tiny, tmp_path / "resumed", resume_from=str(folder), **settings))
    assert losses(resumed) == []
    assert (resumed[-1]["step"], resumed[-1]["stopped_early"]) == (last, True)
    assert same(weights(tmp_path / "whole/out/model"), weights(tmp_path / "resumed/out/model"))

    # The same checkpoint as it is when a stop left out its evaluation.
    state = folder / "trainer_state.json"
    values = json.loads(state.read_text())
    values["log_history"] = [
        entry for entry in values["log_history"] if "eval_loss" not in entry or entry["step"] < last
    ]
    state.write_text(json.dumps(values))
    owed = train(spec(tiny, tmp_path / "owed", resume_from=str(folder), **settings))
    assert losses(owed) == []
    assert evaluations(owed) == pytest.approx({last: evaluations(whole)[last]}, abs=1e-5)


@pytest.mark.thorough
@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(
    ("strategy", "metric"),
    [
        ("dpo", "eval_rewards/accuracies"),
        ("kto", "eval_rewards/margins"),
        ("sft", "eval_mean_token_accuracy"),
    ],
)
def test_the_best_is_chosen_by_the_metric_at_the_end_of_epochs_too(
    tiny: Path, tmp_path: Path, strategy: str, metric: str
) -> None:
    """With save_steps a checkpoint is written before the evaluation of an epoch's end: it stays as it is."""
    settings = {**OVERFITS, "eval_steps": 0, "save_steps": 2, "max_steps": 0, "num_train_epochs": 3}
    wanted = spec(
        tiny,
        tmp_path,
        **{**settings, "training_strategy": strategy, "load_best_model_at_end": True, "metric_for_best_model": metric},
    )
    events = train(wanted)
    seen = evaluations(events, metric)
    best = max(seen, key=lambda step: (seen[step], -step))
    assert events[-1]["best_step"] == best
    assert same(weights(tmp_path / "out/model"), weights(tmp_path / "out/checkpoints" / f"checkpoint-{best}"))


@pytest.mark.thorough
def test_the_best_of_all_weights_is_loaded(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    settings = {**OVERFITS, "learning_rate": 1e-3, "max_steps": 4, "precision": "float32"}
    events = train(spec(tiny, tmp_path, method="Standard_LLM", load_best_model_at_end=True, **settings))
    best = events[-1]["best_step"]
    assert best < 4
    ours, theirs = (
        load_file(tmp_path / "out" / folder / "model.safetensors")
        for folder in ("model", f"checkpoints/checkpoint-{best}")
    )
    assert same(ours, theirs)


def test_without_validation_data_the_program_refuses(tiny: Path, tmp_path: Path) -> None:
    assert "load_best_model_at_end=true needs validation data" in refusal(
        spec(tiny, tmp_path, load_best_model_at_end=True)
    )
