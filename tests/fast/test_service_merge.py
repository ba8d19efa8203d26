"""The runner's part of `merge=True`: room for it, and what a failure says. The merge itself: tests/serve/test_merge.py."""

from __future__ import annotations

from pathlib import Path

from palate.runner.merge import MergedModel, _lack_of_room
from palate_recipes.specs.merge import Merged


def test_a_base_beyond_this_machine_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    weights = tmp_path / "model.safetensors"
    weights.touch()
    assert _lack_of_room(tmp_path, "auto", tmp_path) == ""
    with weights.open("wb") as file:
        file.truncate(4 << 40)  # sparse: no disk is used
    lack = _lack_of_room(tmp_path, "auto", tmp_path)
    assert lack.startswith("merge=True needs at least 8192.7 GiB of memory to add the adapter in float32, and ")
    assert "omit merge" in lack


def test_a_failed_comparison_says_what_merging_has_cost(tmp_path: Path) -> None:
    found = MergedModel(folder=tmp_path, merged=Merged(dtype="bfloat16", kept=0.84, seconds=3.0))
    said = found.explain("what is served is not what was trained: log-probs differ")
    assert "rounded to bfloat16, the merged weights keep 84% of the adapter's change" in said
    assert said.endswith("omit merge or set dtype='float32'.")
    assert found.explain("the engine died") == "the engine died"
