"""Jobs that publish reference log-probabilities to one store: every row stays, and no fault of the cache ends a job."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from palate.runner.reference_cache import CACHE_PREFIX, ReferenceCache, publish
from palate.store import Store, open_store
from palate_recipes.errors import StoreDeniedError
from palate_recipes.specs.reference_table import LogProbs, Table, read_table, reference_key, table_name, write_table
from palate_recipes.specs.train import LocalFiles, TrainTask
from tests.support.manifests import train_spec

KEY = "k" * 40
NAME = f"{CACHE_PREFIX}/{table_name(KEY)}"


def rows(writer: int, count: int = 5) -> dict[str, LogProbs]:
    return {f"{writer:04x}{number:028x}": (-1.0 * writer, -0.5 * number) for number in range(count)}


def stored(store: Store, name: str = NAME, key: str = KEY) -> Table:
    return Table.decode(store.get(name), key)


def task(folder: Path, strategy: str = "dpo") -> TrainTask:
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text("{}")
    values = {"training_strategy": strategy, "lora_dim": 8, "load_in_4bit": False, "load_in_8bit": False}
    files = LocalFiles(model_dir=str(model), train_file="t", output_dir="o", cache_dir=str(folder / "cache"))
    return TrainTask(spec=train_spec(hyperparameters=values), files=files)


def test_tables_published_at_the_same_time_all_survive(store: Store) -> None:
    publish(store, Table(KEY, rows(0)))
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda writer: publish(store, Table(KEY, rows(writer))), range(1, 7)))
    if store.atomic_replace:
        assert stored(store).rows == {digest: values for writer in range(7) for digest, values in rows(writer).items()}
    else:  # a simultaneous writer may lose; nobody's rows are damaged
        assert set(rows(0)) <= set(stored(store).rows)


def test_processes_that_publish_at_the_same_time_keep_all_rows(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from palate.runner.reference_cache import publish\n"
        "from palate.store import open_store\n"
        "from palate_recipes.specs.reference_table import Table\n"
        "for number in range(20):\n"
        "    row = {f'{sys.argv[2]}-{number}': (-1.0, -2.0)}\n"
        f"    publish(open_store(sys.argv[1]), Table({KEY!r}, row))\n"
    )
    root = str(tmp_path / "store")
    writers = [subprocess.Popen([sys.executable, "-c", code, root, str(writer)]) for writer in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert set(stored(open_store(root)).rows) == {f"{writer}-{number}" for writer in range(3) for number in range(20)}


def test_a_table_without_news_is_not_written_again(store: Store) -> None:
    publish(store, Table(KEY, rows(1)))
    before = store.stat(NAME)
    publish(store, Table(KEY, dict(list(rows(1).items())[:2])))
    assert store.stat(NAME) == before


@pytest.mark.parametrize("content", [b"\x00\xff\x00", b'{"format": 1}\n', b""])
def test_a_damaged_table_in_the_store_is_replaced(store: Store, content: bytes) -> None:
    store.put(NAME, content)
    publish(store, Table(KEY, rows(1)))
    assert stored(store).rows == rows(1)


def test_a_job_works_on_a_copy_and_publishes_what_it_adds(store: Store, tmp_path: Path) -> None:
    said: list[str] = []
    run = task(tmp_path)
    key = reference_key(run)
    publish(store, Table(key, rows(1)))
    copy = tmp_path / "cache" / table_name(key)
    with ReferenceCache(store, run, said.append) as cache:
        assert read_table(copy, key).rows == rows(1)
        cache.look()
        publish(store, Table(key, rows(2)))  # another job
        write_table(copy, Table(key, rows(1) | rows(3)))  # the trainer
        cache.look()
    assert stored(store, f"{CACHE_PREFIX}/{table_name(key)}", key).rows == rows(1) | rows(2) | rows(3)
    assert said == []


def test_sft_needs_no_cache(tmp_path: Path) -> None:
    with ReferenceCache(open_store(tmp_path / "store"), task(tmp_path, "sft"), pytest.fail) as cache:
        cache.look()
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("method", ["download", "stat"])
def test_a_store_that_refuses_costs_one_note(tmp_path: Path, method: str) -> None:
    store = open_store(tmp_path / "store")

    def refuse(*arguments: object, **options: object) -> None:
        raise StoreDeniedError("no rights on the cache")

    setattr(store, method, refuse)
    said: list[str] = []
    run = task(tmp_path)
    with ReferenceCache(store, run, said.append) as cache:
        key = reference_key(run)
        write_table(tmp_path / "cache" / table_name(key), Table(key, rows(1)))
        cache.look()
        cache.look()
    assert len(said) == 1
    assert "no rights on the cache" in said[0]


def test_a_model_folder_that_cannot_be_read_costs_one_note(tmp_path: Path) -> None:
    said: list[str] = []
    run = task(tmp_path).changed(model_dir=str(tmp_path / "gone"))
    with ReferenceCache(open_store(tmp_path / "store"), run, said.append) as cache:
        cache.look()
    assert len(said) == 1
    assert os.fspath(tmp_path / "gone") in said[0]
