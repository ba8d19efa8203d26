"""What a reference log-probability depends on, and what of a table's file is trusted."""

from __future__ import annotations

import json
import math
import random
import struct
from pathlib import Path

import pytest

import palate_recipes.specs.reference_table as reference
from palate_recipes.specs.reference_table import (
    Table,
    model_fingerprint,
    read_table,
    reference_key,
    row_digest,
    table_name,
    write_table,
)
from palate_recipes.specs.train import LocalFiles, TrainTask
from tests.support.manifests import train_spec

KEY = "k" * 40
TENSORS = {"embed": 50_000, "norm": 12, **{f"layers.{number}.weight": 4_000 for number in range(20)}}


def write_model(folder: Path, *, change: str = "", config: str = "{}") -> Path:
    """Writes a safetensors file of random 16-bit numbers; `change` names the tensor that every element is moved in."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config)
    numbers, header, data = random.Random(0), {}, b""
    for name, elements in TENSORS.items():
        tensor = bytearray(numbers.randbytes(2 * elements))
        if name == change:
            tensor = bytearray(byte ^ 1 if index % 2 == 0 else byte for index, byte in enumerate(tensor))
        header[name] = {"dtype": "BF16", "shape": [elements], "data_offsets": [len(data), len(data) + len(tensor)]}
        data += tensor
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def task(model: Path, *, precision: str = "float32", method: str = "LoRA_LLM", **hyperparameters: object) -> TrainTask:
    values = {"lora_dim": 32, "load_in_4bit": False, "load_in_8bit": False, "learning_rate": 1e-4, **hyperparameters}
    spec = train_spec(method=method, precision=precision, hyperparameters=values)
    return TrainTask(spec=spec, files=LocalFiles(model_dir=str(model), train_file="t", output_dir="o"))


@pytest.mark.parametrize("tensor", TENSORS)
def test_an_update_of_any_one_tensor_changes_the_fingerprint(tmp_path: Path, tensor: str) -> None:
    before = model_fingerprint(write_model(tmp_path / "a"))
    assert before == model_fingerprint(write_model(tmp_path / "elsewhere"))
    assert before != model_fingerprint(write_model(tmp_path / "b", change=tensor))


def test_the_config_and_pickled_weights_enter_the_fingerprint(tmp_path: Path) -> None:
    before = model_fingerprint(write_model(tmp_path / "a"))
    assert before != model_fingerprint(write_model(tmp_path / "a", config='{"rope_theta": 1}'))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    content = bytearray(random.Random(0).randbytes(3_000_000))
    (pickled / "pytorch_model.bin").write_bytes(content)
    first = model_fingerprint(pickled)
    content[-70_000] ^= 1  # in the archive's directory, where torch keeps a checksum of each tensor
    (pickled / "pytorch_model.bin").write_bytes(content)
    assert model_fingerprint(pickled) != first


@pytest.mark.parametrize("content", [b"", b"not weights at all", struct.pack("<Q", 4) + b"{{{{"])
def test_broken_weights_have_a_fingerprint_too(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert len(model_fingerprint(tmp_path)) == 64


def test_the_key_covers_the_reference_and_no_training_option(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    base = task(model)
    same = [
        task(model, learning_rate=1.0, dpo_beta=0.5),
        task(model, lora_dim=8),
        base.changed(output_dir="elsewhere", train_file="other"),
    ]
    other = [
        task(model, precision="bfloat16"),
        task(model, method="Standard_LLM", precision="bfloat16"),
        task(model, load_in_4bit=True),
        task(model, load_in_8bit=True),
        task(write_model(tmp_path / "merged", change="embed")),
    ]
    assert {reference_key(item) for item in same} == {reference_key(base)}
    adapter = write_model(tmp_path / "adapter")
    keys = [reference_key(item) for item in [base, *other]] + [reference_key(base.changed(adapter_dir=str(adapter)))]
    assert len(set(keys)) == len(keys)
    assert reference_key(task(model, method="Standard_LLM")) == reference_key(base)  # float32 in both


def test_a_digest_tells_rows_apart_by_every_token_and_boundary() -> None:
    rows = [([1, 2], [3], [4]), ([1], [2, 3], [4]), ([1, 2], [4], [3]), ([1, 2], [3], []), ([1, 2], [3], [4, 0])]
    assert len({row_digest(*row) for row in rows}) == len(rows)
    assert row_digest([1], [2], [3], ld_alpha=0.5) != row_digest([1], [2], [3])


def test_a_table_reads_back_exactly(tmp_path: Path) -> None:
    values = {f"{number:032x}": (-random.Random(number).expovariate(0.01), -1e-300 * number) for number in range(200)}
    table = Table(KEY, generation=3)
    table.add([*values.items(), ("not finite", (math.nan, 0.0)), ("nor this", (-1.0, -math.inf))])
    path = tmp_path / table_name(KEY)
    write_table(path, table)
    assert read_table(path, KEY) == Table(KEY, values, 3)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert read_table(tmp_path / "none", KEY) == Table(KEY)


def test_damaged_lines_are_left_out_and_the_others_kept() -> None:
    table = Table(KEY, {f"{number:032x}": (-1.5 * number, -2.0) for number in range(1, 9)})
    lines = table.encode().splitlines()
    lines[2] = lines[2].replace(b"-3.0", b"-3.5")  # another value
    lines[3] = lines[3][:-20]  # cut off
    lines[4] = b"\xff\x00 garbage"
    lines[5] = b'["' + b"f" * 32 + lines[5][34:]  # another row's digest
    lines[6] = b"[1, 2]"
    assert Table.decode(b"\n".join(lines), KEY).rows == {f"{n:032x}": (-1.5 * n, -2.0) for n in (1, 7, 8)}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\xff",
        b"[]",
        b'{"format": 1}',
        Table("of another model", {"a": (-1.0, -2.0)}).encode(),
        Table(KEY, {"a": (-1.0, -2.0)}).encode().replace(b'"format": 1', b'"format": 2'),
    ],
)
def test_a_file_without_this_tables_header_holds_nothing(data: bytes) -> None:
    assert Table.decode(data, KEY) == Table(KEY)


def test_rows_moved_from_another_table_are_not_trusted() -> None:
    other = Table("o" * 40, {"a": (-1.0, -2.0)}).encode().splitlines()[1]
    assert Table.decode(Table(KEY).encode() + other + b"\n", KEY) == Table(KEY)


def test_a_merge_keeps_all_rows_and_a_later_generation_replaces_an_earlier_one() -> None:
    ours, theirs = (
        Table(KEY, {"a": (-1.0, -1.0), "b": (-2.0, -2.0)}),
        Table(KEY, {"a": (-3.0, -3.0), "c": (-4.0, -4.0)}),
    )
    assert ours.merge(theirs).rows == {"b": (-2.0, -2.0), "a": (-3.0, -3.0), "c": (-4.0, -4.0)}
    renewed = Table(KEY, {"c": (-5.0, -5.0)}, generation=1)
    assert ours.merge(renewed) == renewed.merge(ours) == renewed
    with pytest.raises(ValueError, match="different references"):
        ours.merge(Table("o" * 40))


def test_a_full_table_drops_the_rows_used_longest_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_ROWS", 3)
    table = Table(KEY, dict.fromkeys("abcd", (-1.0, -2.0)))
    table.add([("b", (-1.0, -2.0))])
    assert list(Table.decode(table.encode(), KEY).rows) == ["c", "d", "b"]
