"""Every format of rows gives the trainer the same tokens, and the check with a tokenizer says what a training would do."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from palate.web.votes import Shown, VotesFile
from palate_recipes.preferences.check import check
from palate_recipes.preferences.formats import FORMATS
from palate_recipes.preferences.load import read_rows
from palate_recipes.preferences.row import Message, Row
from palate_recipes.preferences.transform import convert
from tests.support.rows import preference_rows
from tests.trainer.support import losses, spec, train

pytestmark = pytest.mark.slow

PAIRED = [
    name
    for name, one in FORMATS.items()
    if one.write and name not in ("unpaired", "chat", "sharegpt-sft", "instructions", "completions")
]
TURNS = [
    Row(1, (Message("user", "Is it?"),), "Yes.", "No."),
    Row(
        2,
        (Message("system", "Be brief."), Message("user", "Ünïcode 中文 🙂\n\nwhat?")),
        " Leading space, kept.",
        "No.\n",
    ),
    Row(3, (Message("user", "a"), Message("assistant", "b"), Message("user", "c")), "d", "e"),
    Row(4, (Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c")), "d", "e"),
]


@pytest.fixture(scope="module")
def renderer(base_model: Path) -> Any:
    from transformers import AutoTokenizer

    from palate_trainer.tokenize import Renderer

    return Renderer(AutoTokenizer.from_pretrained(base_model), True, "You are a helpful assistant", 256)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("ending", [".json", ".csv", ".parquet"])
def test_all_formats_and_containers_give_identical_tokens(
    renderer: Any, tmp_path: Path, name: str, ending: str
) -> None:
    from palate_recipes.preferences.row import RowFaults

    write = FORMATS[name].write
    assert write is not None
    rows, raws = [], []
    for row in TURNS:
        try:
            raws.append(write(row))
            rows.append(row)
        except RowFaults:
            continue  # what a format cannot hold it refuses
    assert rows[0] is TURNS[0]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(raw) + "\n" for raw in raws))
    out = tmp_path / f"out{ending}"
    convert([tmp_path / "given.jsonl"], out, FORMATS[name])
    expected = [renderer.encode(row._replace(number=number))[0] for number, row in enumerate(rows, 1)]
    assert [renderer.encode(row)[0] for row in read_rows(out)] == expected


def test_a_rows_own_system_turn_is_the_only_one(renderer: Any) -> None:
    tokenizer = renderer.tokenizer
    for row, said in ((TURNS[0], "You are a helpful assistant"), (TURNS[1], "Be brief.")):
        text = tokenizer.decode(renderer.encode(row)[0].prompt_ids)
        assert text.count("<|im_start|>system") == 1
        assert f"<|im_start|>system\n{said}<|im_end|>" in text


def test_plain_text_takes_no_conversation(renderer: Any) -> None:
    from dataclasses import replace

    from palate_recipes.errors import TrainerError

    with pytest.raises(TrainerError, match="Row 3 is a conversation of 3 turns"):
        replace(renderer, apply_chat_template=False).encode(TURNS[2])


def test_sft_learns_every_assistant_turn_of_a_conversation(renderer: Any, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    path.write_text(json.dumps([{"messages": turns}]))
    found = [renderer.encode(row)[0] for row in read_rows(path, strategy="sft")]
    assert [renderer.tokenizer.decode(one.chosen_ids) for one in found] == ["b<|im_end|>\n", "d<|im_end|>\n"]
    assert found[1].prompt_ids[: len(found[0].prompt_ids)] == found[0].prompt_ids
    assert [one.row for one in found] == [1, 1]


def test_the_check_with_a_tokenizer_says_what_a_training_does(renderer: Any, base_model: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from palate.sources.token_stats import measure
    from palate_recipes.preferences.check import check
    from palate_trainer.tokenize import encode_pairs

    rows = preference_rows(6)
    rows[1]["chosen"] += " and more" * 40
    rows[2]["prompt"] += " really" * 70
    rows[3]["chosen"], rows[3]["rejected"] = "same " * 60 + "a", "same " * 60 + "b"
    path = tmp_path / "prefs.json"
    path.write_text(json.dumps(rows))
    kept, expected = encode_pairs(read_rows(path), replace(renderer, seq_length=64), name="train")
    report = check([(path, "prefs.json")])
    counted = measure(
        report,
        [(path, "prefs.json")],
        tokenizer=str(base_model),
        strategy="dpo",
        settings={},
        seq_length=64,
        system_prompt=None,
    )
    found = {
        code: [place.row for place in report.findings[code].places] for code in ("cut", "no-room", "same-after-cut")
    }
    assert found == {"cut": expected.cut, "no-room": expected.no_room, "same-after-cut": expected.same_after_cut}
    assert found == {"cut": [2], "no-room": [3], "same-after-cut": [4]}
    assert report.lengths["tokens"]["max"] == expected.longest
    tokens = [len(one.prompt_ids) + len(one.chosen_ids) + len(one.rejected_ids) for one in kept]
    assert (counted["kept"], counted["tokens"], counted["largest"]) == (len(tokens), sum(tokens), max(tokens))
    assert counted["deviation"] == pytest.approx(statistics.pstdev(tokens))
    assert f"seq_length={expected.longest} keeps all" in "\n".join(report.lines())


def test_votes_of_the_page_pass_the_check_and_train(tiny: Path, tmp_path: Path) -> None:
    votes = VotesFile(tmp_path / "votes.jsonl")
    for number in range(4):
        left, right = (Shown(name, f"{name} says {number}", "stop") for name in ("default", "base"))
        prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Question {number}?"}]
        facts = {"voter": "Ann", "sampling": {"temperature": 0.7, "max_tokens": 512}}
        votes.add(prompt, left, right, ("left", "right", "tie", "both_bad")[number], facts)
    assert check([(votes.path, "votes.jsonl")]).of("error") == []
    wanted = spec(tiny, tmp_path / "run", max_steps=1)
    (loss,) = losses(train(replace(wanted, files=replace(wanted.files, train_file=str(votes.path)))))
    assert loss == pytest.approx(math.log(2), abs=1e-3)  # of DPO, before the first step
