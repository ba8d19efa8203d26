"""What is fuzzed: for each target how an input is made, and what is called with it. Knows Palate's readers, not how they are driven."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tests.fuzz import mutate

World = dict[str, Any]
"""What the inputs of one target share: `folder`, and what `start` put there."""


class Target(NamedTuple):
    """One way into Palate.

    Attributes:
        make: An input from a random generator; the same for the same generator.
        call: Reads it; returns, or raises a PalateError. An answer that it returns is counted by name.
        share: Of a run's inputs.
        start: Puts into the world what takes time to make.
        short: Whether `make test` runs it.
    """

    make: Callable[[Random, World], Any]
    call: Callable[[Any, World], str | None]
    share: float
    start: Callable[[World, ExitStack], None] = lambda world, stack: None
    short: bool = True


# ── data files ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _rows(rng: Random, count: int) -> list[Any]:
    from tests.fast.test_data_formats import PAIRS, SINGLE

    rows = [case[2] for case in PAIRS] + [case[3] for case in SINGLE]
    return [mutate.value(rng, row) if rng.random() < 0.6 else row for row in rng.choices(rows, k=count)]


def _cases(world: World, stack: ExitStack) -> None:
    from tests.fast.corpus import FILES
    from tests.fast.corpus_rows import ROWS, WHOLE

    made = [(case.content if isinstance(case.content, bytes) else case.content(), case.name) for case in FILES]
    made += [(case.content, case.name) for case in (*ROWS, *WHOLE) if isinstance(case.content, bytes)]
    world["cases"] = [case for case in made if len(case[0]) < 50_000]


def _text_file(rng: Random, world: World) -> tuple[bytes, str]:
    if rng.random() < 0.3:
        content, name = rng.choice(world["cases"])
        return mutate.data(rng, content), name
    rows = _rows(rng, rng.randint(1, 4))
    if rng.random() < 0.3:
        return mutate.dump(rng, rows), "prefs.json"
    if rng.random() < 0.3:
        names = ("prompt", "chosen", "rejected")
        cells = [[mutate.dump(rng, row.get(name, "")) for name in names] for row in rows if isinstance(row, dict)]
        table = b"\n".join([b"prompt,chosen,rejected", *(b",".join(line) for line in cells)])
        return mutate.data(rng, table), rng.choice(("prefs.csv", "prefs.tsv"))
    return b"\n".join(mutate.dump(rng, row) for row in rows), "prefs.jsonl"


def _packed_file(rng: Random, world: World) -> tuple[bytes, str]:
    content, name = _text_file(rng, world)
    if rng.random() < 0.5:
        packed, ending = gzip.compress(content, 1), ".gz"
    else:
        import pyarrow

        packed, ending = bytes(pyarrow.compress(content, codec="zstd", asbytes=True)), ".zst"
    return mutate.data(rng, packed) if rng.random() < 0.5 else packed, name + ending


def _tables(world: World, stack: ExitStack) -> None:
    import io

    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    made = world["tables"] = list[tuple[bytes, str]]()
    pairs = {"prompt": ["a", "b" * 40], "chosen": ["c", "d"], "rejected": [None, "e"]}
    turns = {"messages": [[{"role": "user", "content": "a"}], []], "label": [True, None], "n": [1, 2]}
    for columns in (pairs, turns):
        table = pyarrow.table(columns)
        for packing in ("zstd", "NONE", "snappy"):
            sink = io.BytesIO()
            pyarrow.parquet.write_table(table, sink, compression=packing, use_dictionary=packing != "NONE")
            made.append((sink.getvalue(), "prefs.parquet"))
        for packing in ("zstd", "lz4", "uncompressed"):
            sink = io.BytesIO()
            pyarrow.feather.write_feather(table, sink, compression=packing)
            made.append((sink.getvalue(), "prefs.arrow"))
        sink = io.BytesIO()
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        made.append((sink.getvalue(), "prefs.arrow"))


def _table_file(rng: Random, world: World) -> tuple[bytes, str]:
    content, name = rng.choice(world["tables"])
    return mutate.data(rng, content), name


def _read_file(given: tuple[bytes, str], world: World) -> None:
    from palate_recipes.preferences.check import check
    from palate_recipes.preferences.load import read_rows

    content, name = given
    path = world["folder"] / name
    path.write_bytes(content)
    strategy = ("dpo", "sft", "kto")[len(content) % 3]
    report = check([(path, name)], strategy=strategy)  # type: ignore[arg-type]
    "\n".join(report.lines()).encode()
    json.dumps(report.to_json())
    read_rows(path, strategy=strategy, bad_rows="skip")  # type: ignore[arg-type]


# ── texts that users give ──────────────────────────────────────────────────────────────────────────────────────────

_URIS = [
    "prefs.json", "~/data/prefs.parquet", "file:///data/prefs.csv", "data/part-*.jsonl.gz", "data/**/*.parquet",
    "hf://datasets/OWNER/NAME@v1.0/data/train-*.parquet", "hf://datasets/OWNER/NAME?split=test&config=helpful", "s3://bucket/data/*",
    "https://docs.google.com/spreadsheets/d/1AbC_xyz-0123/edit#gid=123", "gsheet://1AbC_x/Sheet 1", "s3://bucket/services/x",
]  # fmt: skip


def _own_home(world: World, stack: ExitStack) -> None:
    os.environ["HOME"] = str(world["folder"])
    below = world["folder"] / "a" / "b" / "c"  # so that `..` leads to a folder of few files, too
    below.mkdir(parents=True)
    os.chdir(below)


def _read_uri(uri: str, world: World) -> None:
    from palate.runs.record import locate
    from palate.sources import hub, resolve, select, sheets
    from palate.store.uri import normal_uri, split_uri
    from palate_recipes.text import LONGEST

    if len(uri) >= LONGEST:  # refused where it comes in
        with resolve.fetch_files(uri, None):  # type: ignore[arg-type]
            raise AssertionError("a URI without end was taken")
    refused = None
    for read in (normal_uri, split_uri, locate, hub._parse, sheets._parse):
        refused = _refusal(read, uri) or refused
    select.matches("data/train/part-1.jsonl", uri)
    select.split_of(uri)
    walks_all = "**" in uri and (
        uri.startswith(("file://", "/")) or ".." in uri
    )  # of this machine's folders: slow, and right
    if not walks_all and (uri.startswith("file://") or "://" not in uri):
        resolve._local(uri)
    if refused:
        raise refused


def _refusal(read: Callable[[str], Any], given: str) -> Exception | None:
    from palate.errors import PalateError

    try:
        read(given)
    except PalateError as error:
        return error
    return None


def _hyperparameters(rng: Random, world: World) -> tuple[Any, Any]:
    from palate_recipes.schema import HYPERPARAMETERS, METHODS

    names = rng.choices(list(HYPERPARAMETERS), k=rng.randint(1, 4))
    given: dict[Any, Any] = {name: HYPERPARAMETERS[name].default for name in names}
    return mutate.value(rng, given), rng.choice((*METHODS, rng.choice([*mutate.VALUES, *mutate.TEXTS])))


def _read_hyperparameters(given: tuple[Any, Any], world: World) -> None:
    from palate_recipes.hyperparameters import DeviceFacts, resolve

    resolve(given[0], method=given[1], device=DeviceFacts(cuda=False, bf16=True, fp16=False))


_RECIPE = """model_name = "qwen2-0.5b-instruct"\nmethod = "LoRA_LLM"\nmax_run_time = 3600
train = "p.json"\n[inputs]\nvalidation = "v/*"
[labels]\nteam = "a"\n[hyperparameters]\nlearning_rate = 5e-5\nseq_length = 512\ntarget_modules = ["q_proj"]\nsystem_prompt = ""
"""
_TEMPLATES = """- name: support\n  system: &s You answer for a shop.\n  user: "A customer asks in {language}: {query}"
- {name: b, system: *s, user: "{query}", n: 5, d: 2024-01-01, t: 12:30:45, x: 0x1F, b: yes, !!str k: [1, 2.5]}\n"""


def _write(world: World, name: str, content: str) -> Path:
    path: Path = world["folder"] / name
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    return path


def _read_recipe(content: str, world: World) -> None:
    from palate_recipes.recipe_file import read_recipe

    read_recipe(_write(world, "recipe.toml", content))


def _read_templates(content: str, world: World) -> None:
    from palate_recipes.preferences.columns import read_templates

    read_templates(_write(world, f"templates.{'csv' if content.startswith('name,') else 'yaml'}", content))


def _prompts(rng: Random, world: World) -> tuple[bytes, str]:
    content, name = _text_file(rng, world)
    return content, rng.choice((name, "prompts.txt"))


def _read_prompts(given: tuple[bytes, str], world: World) -> None:
    from palate.generate.prompts import read_prompts

    path = world["folder"] / given[1]
    path.write_bytes(given[0])
    read_prompts(path)


# ── records in a store ─────────────────────────────────────────────────────────────────────────────────────────────


def _store(world: World, stack: ExitStack) -> None:
    from palate.runs.lease import lease_here
    from palate.runs.record import Record
    from palate.store import open_store
    from palate_recipes.specs.codec import encode
    from palate_recipes.specs.run import Attempt, Status
    from tests.support.manifests import train_manifest

    digests = {"schema": 1, "files": {"a.safetensors": {"bytes": 3, "sha256": "0" * 64}}}
    world["record"] = Record(open_store(world["folder"] / "store"), "jobs", "a-1")
    world["records"] = {
        "manifest.json": json.loads(train_manifest("a-1").encode()),
        "status.json": json.loads(
            Status(state="Failed", reason="r", log_tail=("x",), attempts=(Attempt(attempt=1),)).encode()
        ),
        "lease.json": json.loads(encode(lease_here(holder="h", start_id="s", attempt=1))),
        "model/digests.json": digests,
    }


def _records(rng: Random, world: World) -> tuple[str, bytes]:
    name = rng.choice(list(world["records"]))
    return name, mutate.dump(rng, mutate.value(rng, world["records"][name]))


def _read_record(given: tuple[str, bytes], world: World) -> None:
    from palate.checksums import Checksums
    from palate.runs.lease import is_dead_here, read_lease

    name, content = given
    record = world["record"]
    record.store.put(record.key(name), content)
    if name == "manifest.json":
        _ = record.manifest().model_name
    elif name == "status.json":
        status = record.status()
        _ = (
            status.is_terminal,
            status.attempt + 1,
            status.engine_id.partition(":"),
            [attempt.attempt + 1 for attempt in status.attempts],
        )
    elif name == "lease.json":
        lease = read_lease(record)
        _ = lease is not None and is_dead_here(lease), lease and lease.attempt < 2 and lease.lost_after_s > 1
    else:
        Checksums.parse(content, where=name)


def _table(entries: dict[str, Target]) -> dict[str, Target]:
    from tests.fuzz.front import ask, requests, serve

    return entries | {"front": Target(requests, ask, 0.1, serve)}


TARGETS = _table(
    {
        "data-text": Target(_text_file, _read_file, 0.2, _cases),
        "data-packed": Target(_packed_file, _read_file, 0.1, _cases),
        "data-tables": Target(_table_file, _read_file, 0.1, _tables),
        "prompts": Target(_prompts, _read_prompts, 0.1, _cases),
        "templates": Target(lambda rng, world: mutate.text(rng, _TEMPLATES), _read_templates, 0.05),
        "uris": Target(lambda rng, world: mutate.text(rng, rng.choice(_URIS)), _read_uri, 0.1, _own_home),
        "hyperparameters": Target(_hyperparameters, _read_hyperparameters, 0.1),
        "recipes": Target(lambda rng, world: mutate.text(rng, _RECIPE), _read_recipe, 0.1),
        "records": Target(_records, _read_record, 0.05, _store),
    }
)
