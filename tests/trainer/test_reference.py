"""The reference cache in the training program: what hits, what misses, what is not believed, and that no loss moves by it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from palate_recipes.specs.reference_table import Table, read_table, reference_key, table_name, write_table
from palate_recipes.specs.train import TrainTask
from tests.support.rows import preference_rows
from tests.trainer.support import NEAR, PRECISIONS, losses, spec, train

pytestmark = pytest.mark.slow


def cached(wanted: TrainTask, cache: Path) -> TrainTask:
    return wanted.changed(cache_dir=str(cache))


def counts(metrics: list[dict[str, Any]]) -> tuple[int, int]:
    """Rows from the cache, rows scored."""
    return metrics[0]["reference_cached_rows"], metrics[0]["reference_scored_rows"]


def table_of(wanted: TrainTask) -> tuple[Path, Table]:
    key = reference_key(wanted)
    path = Path(str(wanted.files.cache_dir)) / table_name(key)
    return path, read_table(path, key)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sweep_pays_for_the_reference_once_and_no_loss_changes(small: Path, tmp_path: Path, precision: str) -> None:
    """The reference was scored in batches of another size, so its sums are in another order."""
    cache = tmp_path / "cache"
    first = train(cached(spec(small, tmp_path / "first", precision=precision), cache))
    assert counts(first) == (0, 12)
    changed = {
        "precision": precision,
        "learning_rate": 1e-3,
        "dpo_beta": 0.3,
        "lora_dim": 8,
        "per_device_train_batch_size": 3,
    }
    with_cache = train(cached(spec(small, tmp_path / "with", **changed), cache))
    assert counts(with_cache) == (12, 0)
    without = train(spec(small, tmp_path / "without", **changed))
    assert counts(without) == (0, 12)
    assert losses(with_cache) == pytest.approx(losses(without), abs=NEAR[precision])
    again = train(cached(spec(small, tmp_path / "again", precision=precision), cache))
    assert losses(again) == losses(first)


def test_added_rows_alone_are_scored_and_repeated_ones_once(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], precision: str
) -> None:
    cache = tmp_path / "cache"
    train(cached(spec(small, tmp_path / "first", rows=12), cache))
    grown = cached(spec(small, tmp_path / "grown", data=[*preference_rows(15), *preference_rows(15)[-1:]]), cache)
    metrics = train(grown)
    assert counts(metrics) == (12, 4)
    assert "reference train: 12 of 16 pairs from the cache, 4 scored in" in capfd.readouterr().out
    assert len(table_of(grown)[1].rows) == 15
    assert losses(metrics) == pytest.approx(
        losses(train(grown.changed(cache_dir=None, output_dir=str(tmp_path / "plain")))), abs=NEAR[precision]
    )


@pytest.mark.parametrize(
    "changed", [{"seq_length": 36}, {"system_prompt": "You are terse"}, {"apply_chat_template": False}]
)
def test_other_token_ids_are_other_rows(small: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    cache = tmp_path / "cache"
    train(cached(spec(small, tmp_path / "first", max_steps=2), cache))
    metrics = train(cached(spec(small, tmp_path / "changed", max_steps=2, **changed), cache))
    assert counts(metrics) == (0, 12)
    assert losses(metrics)[0] == pytest.approx(0.6931, abs=1e-3)


def test_a_truncation_that_changes_some_rows_keeps_the_others(small: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    data = [*preference_rows(6), {"prompt": "Count", "chosen": "one " * 80, "rejected": "two " * 80}]
    train(cached(spec(small, tmp_path / "long", data=data), cache))
    assert counts(train(cached(spec(small, tmp_path / "cut", data=data, seq_length=64), cache))) == (6, 1)


def test_another_base_has_another_table(small: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cache = tmp_path / "cache"
    train(cached(spec(small, tmp_path / "first", max_steps=3), cache))
    model = AutoModelForCausalLM.from_pretrained(small)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.01)  # as a merged adapter would
    model.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(small).save_pretrained(tmp_path / "merged")
    assert counts(train(cached(spec(tmp_path / "merged", tmp_path / "other", max_steps=3), cache))) == (0, 12)


@pytest.mark.usefixtures("precision")
def test_values_that_are_off_are_dropped_with_a_note(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = cached(spec(small, tmp_path / "run"), tmp_path / "cache")
    path, _ = table_of(wanted)
    first = train(wanted)
    _, right = table_of(wanted)
    write_table(path, Table(right.key, {digest: (c - 10.0, r) for digest, (c, r) in right.rows.items()}))
    capfd.readouterr()
    again = train(wanted.changed(output_dir=str(tmp_path / "again")))
    assert "the cache is dropped and all pairs are scored" in capfd.readouterr().out
    assert counts(again) == (0, 12)
    assert losses(again) == losses(first)
    _, renewed = table_of(wanted)
    assert (renewed.rows, renewed.generation) == (right.rows, 1)


def test_damage_and_a_cache_that_cannot_be_written_cost_no_run(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = cached(spec(small, tmp_path / "run", max_steps=3), tmp_path / "cache")
    path, _ = table_of(wanted)
    train(wanted)
    path.write_bytes(path.read_bytes()[:-400])  # cut off in the middle of a line
    kept = len(table_of(wanted)[1].rows)
    assert 0 < kept < 12
    assert counts(train(wanted.changed(output_dir=str(tmp_path / "cut")))) == (kept, 12 - kept)
    (tmp_path / "taken").write_text("a file where the cache folder should be")
    blocked = wanted.changed(cache_dir=str(tmp_path / "taken"), output_dir=str(tmp_path / "blocked"))
    assert counts(train(blocked)) == (0, 12)
    assert "reference: this run does not use the cache" in capfd.readouterr().out


def test_a_short_run_scores_as_it_goes_unless_the_cache_has_all_rows(
    small: Path, tmp_path: Path, precision: str
) -> None:
    cache = tmp_path / "cache"
    short = {"max_steps": 1, "per_device_train_batch_size": 2}
    scored_on_the_way = train(cached(spec(small, tmp_path / "short", **short), cache))
    assert counts(scored_on_the_way) == (0, 0)
    train(cached(spec(small, tmp_path / "whole"), cache))
    looked_up = train(cached(spec(small, tmp_path / "known", **short), cache))
    assert counts(looked_up) == (12, 0)
    assert losses(looked_up) == pytest.approx(losses(scored_on_the_way), abs=NEAR[precision])


@pytest.mark.usefixtures("precision")
def test_full_fine_tuning_and_validation_rows_use_the_cache(small: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    settings = {"method": "Standard_LLM", "validate": True}
    first = train(cached(spec(small, tmp_path / "first", **settings), cache))
    assert counts(first) == (0, 24)  # the same file twice, scored once
    second = train(cached(spec(small, tmp_path / "second", **settings), cache))
    assert counts(second) == (24, 0)
    assert losses(second) == losses(first)
    assert second[-2]["kind"] == "eval"
    assert second[-2]["eval_loss"] == first[-2]["eval_loss"]


def test_a_pass_that_is_stopped_keeps_what_it_scored(small: Path, tmp_path: Path) -> None:
    from palate_trainer.reference_scores import ReferenceScores

    wanted = cached(spec(small, tmp_path / "run"), tmp_path / "cache")
    batches = 0

    def score(rows: list[int]) -> list[tuple[float, float]]:
        nonlocal batches
        batches += 1
        if batches == 3:
            raise KeyboardInterrupt
        return [(-1.0 * row, -2.0) for row in rows]

    digests, lengths = [f"{row:032x}" for row in range(10)], list(range(10))
    with pytest.raises(KeyboardInterrupt):
        ReferenceScores(wanted, print).logps(digests, lengths, score, name="train", batch_size=2)
    assert table_of(wanted)[1].rows == {f"{row:032x}": (-1.0 * row, -2.0) for row in (9, 8, 7, 6)}  # longest first


def test_the_start_event_says_where_the_seconds_went_and_no_weight_is_hashed(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from trl.trainer import dpo_trainer

    monkeypatch.setattr(dpo_trainer, "hash_module", lambda module: pytest.fail("TRL hashed the weights"))
    began = time.monotonic()
    start = train(spec(small, tmp_path, max_steps=2))[0]
    stages = ("read", "imports", "data", "model", "reference", "build")
    seconds = [start[f"{stage}_seconds"] for stage in stages]
    assert min(seconds) >= 0
    assert sum(seconds) <= start["seconds_to_first_step"] + 0.1 <= time.monotonic() - began
    assert "ready after" in capfd.readouterr().out
