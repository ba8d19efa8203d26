"""`python -m palate_trainer.token_stats SPEC.json`: token counts of data files, as training would truncate them. No weights."""

from __future__ import annotations

import json
import math
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from palate_recipes.errors import PalateError
from palate_recipes.preferences.columns import format_for
from palate_recipes.preferences.files import open_container
from palate_recipes.preferences.formats import Format, detect, learned_turns, read_row, unpaired
from palate_recipes.preferences.report import PLACES_SHOWN
from palate_recipes.preferences.row import Row, RowFaults, Strategy
from palate_recipes.preferences.statistics import histogram, percentiles
from palate_recipes.specs.train import Measured, MeasureSpec

if TYPE_CHECKING:
    from palate_trainer.tokenize import Renderer, TokenPair


def measured(
    files: Iterable[tuple[Path, str]], renderer: Renderer, *, strategy: Strategy | None, format: Format | None
) -> Measured:
    """Counts tokens. Skips rows that cannot be read: the data check reports them.

    Args:
        files: Path and display name of each file.
        renderer: Renders and tokenizes rows.
        strategy: Training strategy; None accepts rows of any.
        format: Row format; None detects it per row.

    Raises:
        DataError: A file cannot be read at all.
        TrainerError: The chat template rejects a conversation.
    """
    from palate_trainer.tokenize import told_both_ways_in

    found: Measured = {
        "counts": {},
        "places": {},
        "lengths": {},
        "histogram": [],
        "kept": 0,
        "tokens": 0,
        "largest": 0,
        "deviation": 0.0,
        "truncated_rows": 0,
        "dropped_rows": 0,
    }
    lengths = array("I")
    squares = 0

    def count(one: TokenPair) -> None:
        nonlocal squares
        tokens = len(one.prompt_ids) + len(one.chosen_ids) + len(one.rejected_ids)
        found["kept"] += 1
        found["tokens"] += tokens
        found["largest"] = max(found["largest"], tokens)
        squares += tokens * tokens

    for path, name in files:
        container = open_container(path)
        rows = _rows(container.raw_rows(), strategy, format)
        kept: list[TokenPair] = []
        truncated, dropped = set[int](), set[int]()
        for whole, _ in renderer.encode_all(rows):
            lengths.append(whole.length)
            code, what = _judge(whole, renderer.seq_length)
            if code in ("", "cut"):
                room = renderer.seq_length - len(whole.prompt_ids)
                cut = replace(whole, chosen_ids=whole.chosen_ids[:room], rejected_ids=whole.rejected_ids[:room])
                if code:
                    truncated.add(whole.row)
                if strategy == "kto":  # the two answers of a pair are compared below
                    kept.append(cut)
                else:
                    count(cut)
            else:
                dropped.add(whole.row)
            if code:
                found["counts"][code] = found["counts"].get(code, 0) + 1
                places = found["places"].setdefault(code, [])
                if len(places) < PLACES_SHOWN:
                    places.append((name, whole.row, container.unit, what))
        both_ways = set(told_both_ways_in(kept))
        for cut in kept:
            if cut.row not in both_ways:
                count(cut)
        found["truncated_rows"] += len(truncated - both_ways)
        found["dropped_rows"] += len(dropped | both_ways)
    if found["kept"]:
        mean = found["tokens"] / found["kept"]
        found["deviation"] = math.sqrt(max(0.0, squares / found["kept"] - mean * mean))
    if lengths:
        found["lengths"], found["histogram"] = percentiles(_as_numbers(lengths)), histogram(_as_numbers(lengths))
    return found


def _as_numbers(lengths: array[int]) -> object:
    import numpy as np

    return np.frombuffer(lengths, dtype=np.uint32)


def _rows(raw: Iterable[tuple[int, object]], strategy: Strategy | None, format: Format | None) -> Iterator[Row]:
    for number, value in raw:
        try:
            row = read_row(value, number, strategy=strategy, format=format)
            every_turn = (
                strategy == "sft" and isinstance(value, dict) and (format or detect(value, strategy)).every_turn
            )
        except RowFaults:
            continue
        yield from unpaired(row) if strategy == "kto" else learned_turns(row) if every_turn else [row]


def _judge(whole: TokenPair, seq_length: int) -> tuple[str, str]:
    """What training would do with a row: a code of `palate_recipes.preferences.report` (empty if it fits), and the details."""
    room = seq_length - len(whole.prompt_ids)
    if whole.chosen_ids == whole.rejected_ids:
        return "same-tokens", "`chosen` and `rejected` are the same tokens"
    if room <= 0:
        return "no-room", f"the prompt has {len(whole.prompt_ids)} tokens, seq_length is {seq_length}"
    if whole.length <= seq_length:
        return "", ""
    if whole.chosen_ids[:room] == whole.rejected_ids[:room]:
        return (
            "same-after-cut",
            f"the first {room} tokens of both answers are the same, and seq_length={seq_length} cuts the rest",
        )
    return "cut", f"{whole.length} tokens, seq_length is {seq_length}"


def main(argv: list[str] | None = None) -> int:
    """Measures the files of the spec and prints the result as JSON."""
    (path,) = argv or sys.argv[1:]
    spec = MeasureSpec.read(Path(path))
    try:
        from palate_trainer.template_probe import take_out_system_default
        from palate_trainer.tokenize import Renderer, load_tokenizer, stop_token_ids

        tokenizer = load_tokenizer(spec.model_dir)
        renderer = Renderer(
            tokenizer=tokenizer,
            apply_chat_template=spec.apply_chat_template,
            system_prompt=spec.system_prompt,
            seq_length=spec.seq_length,
            stop_ids=stop_token_ids(spec.model_dir),
        )
        renderer.check()
        if spec.apply_chat_template and not spec.system_prompt.strip():
            take_out_system_default(tokenizer)
        files = [(Path(path), name) for path, name in spec.files]
        found = measured(files, renderer, strategy=spec.strategy, format=format_for(**spec.settings))
    except PalateError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
