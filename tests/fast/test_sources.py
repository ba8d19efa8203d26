"""Wherever data lies it becomes local files, in order and whole; what cannot be read says where, why and what to do."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from palate import Session
from palate.errors import ConfigurationError, DataError, MissingDependencyError, PalateError
from palate.sources.resolve import fetch_files
from palate.sources.select import Fetched, matches, split_of
from palate.store.uri import normal_uri
from palate_recipes.errors import StoreDeniedError, StoreError, StoreUnreachableError, StoreUsageError
from tests.support.hub import Hub, used_hub
from tests.support.sheets import Sheets, Spreadsheet, as_pem, make_key, running_sheets

ROW = '{"prompt": "p", "chosen": "c", "rejected": "r"}\n'
HUB_TOKEN = "hf_hush-hush"
SHEET = "1AbCdEfGhIjKlMnOpQrStUvWxYz0123456789_-abcd"


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(ROW)


def fetch(uri: str | Path, session: Session) -> Fetched:
    with fetch_files(uri, session) as fetched:
        assert all(file.is_file() for file in fetched.files)
        return fetched


def names_of(fetched: Fetched, folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in fetched.files]


def refusal(uri: str | Path, session: Session, kind: type[PalateError] = DataError) -> str:
    with pytest.raises(PalateError) as caught, fetch_files(uri, session):
        pass
    assert type(caught.value) is kind, caught.value
    return str(caught.value)


# ── this machine ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_is_used_in_place_whatever_its_name(tmp_path: Path, session: Session) -> None:
    fill(tmp_path, "prefs.json", "no-ending", "a [1].jsonl")
    for name in ("prefs.json", "no-ending", "a [1].jsonl"):
        path = tmp_path / name
        for uri in (path, str(path), f"file://{path}"):
            assert fetch(uri, session) == Fetched((path,), f"file://{path}", None)


def test_a_relative_path_and_the_home(tmp_path: Path, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "prefs.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for uri in ("prefs.json", "~/prefs.json"):
        assert fetch(uri, session).files == (tmp_path / "prefs.json",)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("~nosuchuser/prefs.json", "no such user"),
        ("a\0b.json", "NUL character"),
        ("a\ud83d.json", "U+D83D"),
        ("a" * 300, "cannot be read"),
        ("a/" * 5000, "10,000 characters"),
        ("gsheet://x/" + "y" * 5000, "5,011 characters"),
        (
            "https://docs.google.com/spreadsheets/d/1AbC_xyz-0123/edit#gid=" + "9" * 4000,
            "needs a Google service account",
        ),
        ("gsheet://１２３/x", "is not a Google Sheet"),
    ],
)
def test_a_text_that_can_name_no_file_is_refused_with_its_reason(path: str, words: str, session: Session) -> None:
    said = refusal(path, session, DataError if "cannot be read" in words else ConfigurationError)
    assert words in said
    assert len(said) < 5000
    said.encode()


@pytest.mark.parametrize("uri", ["~nosuchuser/store", "a\0b", "file:///a\0b", "~\ud83d/store", "a" * 5000])
def test_a_store_at_a_path_that_can_not_be_is_refused(uri: str) -> None:
    with pytest.raises(StoreUsageError, match="the store '"):
        normal_uri(uri)


def test_a_folder_of_shards_sorted_and_without_what_is_no_data(tmp_path: Path, session: Session) -> None:
    fill(tmp_path, "part-00001.jsonl.gz", "part-00000.jsonl.gz", "more/a.parquet", "more/b.csv.zst", "z.feather")
    fill(tmp_path, "_SUCCESS", "README.md", "README", "LICENSE.txt", "notes.md", ".gitattributes", ".git/x.json")
    fill(tmp_path, "dataset_infos.json", "dataset_info.json", "state.json", "make.py", "more/log.txt")
    fetched = fetch(tmp_path, session)
    expected = ["more/a.parquet", "more/b.csv.zst", "part-00000.jsonl.gz", "part-00001.jsonl.gz", "z.feather"]
    assert names_of(fetched, tmp_path) == expected
    assert fetched.passed_over == ("make.py", "more/log.txt"), "what might have been meant is named"
    assert fetch(f"{tmp_path}/", session) == fetched


def test_a_glob_takes_what_it_matches(tmp_path: Path, session: Session) -> None:
    fill(
        tmp_path,
        "d/part-1.jsonl",
        "d/part-2.jsonl",
        "d/other.jsonl",
        "d/deep/part-3.jsonl",
        "d/test.jsonl",
        "d/part-x/y",
    )
    uri = f"{tmp_path}/d/part-*"
    assert names_of(fetch(uri, session), tmp_path) == ["d/part-1.jsonl", "d/part-2.jsonl"], "folders are no files"
    assert fetch(f"file://{uri}", session).origin == f"file://{uri}"
    deep = fetch(f"{tmp_path}/**/part-?.jsonl", session)
    assert names_of(deep, tmp_path) == ["d/deep/part-3.jsonl", "d/part-1.jsonl", "d/part-2.jsonl"]
    assert len(fetch(f"{tmp_path}/d/*.jsonl", session).files) == 4, "who writes a glob may mix splits"


def test_a_folder_of_several_splits_is_refused_with_what_to_write_instead(tmp_path: Path, session: Session) -> None:
    fill(tmp_path, "train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation.jsonl", "prefs_test.csv")
    fill(tmp_path, "extra-a.json", "extra-b.json")
    message = refusal(tmp_path, session)
    assert message.splitlines() == [
        f"{tmp_path} contains files of several splits, which must not be mixed. Use one of:",
        f"  test (1 file): {tmp_path}/prefs_test.csv",
        f"  train (2 files): {tmp_path}/train*",
        f"  validation (1 file): {tmp_path}/validation.jsonl",
        f"  no split (2 files): {tmp_path}/extra-*",
    ]
    for line in message.splitlines()[1:]:
        count, uri = line.partition("(")[2][0], line.partition(": ")[2]
        assert len(fetch(uri, session).files) == int(count)


def test_splits_as_subfolders(tmp_path: Path, session: Session) -> None:
    fill(tmp_path, "train/0.jsonl", "train/deep/1.jsonl", "dev/0.jsonl", "dev/1.jsonl")
    message = refusal(tmp_path, session)
    assert f"train (2 files): {tmp_path}/train\n" in message
    assert message.endswith(f"validation (2 files): {tmp_path}/dev")
    assert names_of(fetch(tmp_path / "train", session), tmp_path) == ["train/0.jsonl", "train/deep/1.jsonl"]


def test_one_split_alone_is_no_mixture(tmp_path: Path, session: Session) -> None:
    fill(tmp_path, "train-a.jsonl", "training_b.jsonl")
    assert len(fetch(tmp_path, session).files) == 2


def test_the_same_rows_in_two_formats_are_refused(tmp_path: Path, session: Session) -> None:
    fill(tmp_path, "prefs.jsonl", "prefs.jsonl.gz")
    assert "prefs.jsonl and prefs.jsonl.gz, which look like the same rows" in refusal(tmp_path, session)
    assert len(fetch(f"{tmp_path}/*.gz", session).files) == 1


def test_nothing_there(tmp_path: Path, session: Session) -> None:
    fill(tmp_path, "a.txt", "b.txt", "c.txt", "d.txt", "e.txt", "f.txt", ".hidden")
    message = refusal(tmp_path / "prefs.json", session)
    assert f"{tmp_path}/prefs.json: no such file or folder" in message
    assert "a.txt, b.txt, c.txt, d.txt, e.txt and" in message
    assert "no such file or folder" in refusal(tmp_path / "x" / "y" / "prefs.json", session)
    for uri in (tmp_path, f"{tmp_path}/*.jsonl", f"{tmp_path}/*"):
        message = refusal(uri, session)
        assert f"{uri}: no data files found" in message
        assert ".jsonl" in message
        assert "a.txt" in message
    (tmp_path / "empty").mkdir()
    assert "found nothing" in refusal(tmp_path / "empty", session)
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refusal(tmp_path / "pipe", session)


@pytest.mark.parametrize("uri", ["ftp://me:hush@host/x.json", "gs://bucket/x", "https://example.com/prefs.json", ""])
def test_an_unknown_place_is_refused_with_the_known_ones(uri: str, session: Session) -> None:
    message = refusal(uri, session, ConfigurationError)
    for known in ("s3://", "oss://", "hf://", "gsheet://", "file://"):
        assert known in message
    assert "hush" not in message


def test_a_page_of_the_hub_says_how_it_is_written(session: Session) -> None:
    message = refusal("https://huggingface.co/datasets/me/prefs", session, ConfigurationError)
    assert message.endswith("hf://datasets/OWNER/NAME")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("data/train-00000-of-00001.parquet", "train"),
        ("train_prefs-00000-of-00001.parquet", "train_prefs"),
        ("my_prefs.TEST.json.gz", "test"),
        ("valid_1.csv", "validation"),
        ("dev/0000.parquet", "validation"),
        ("default/train_sft/0000.parquet", "train_sft"),
        ("default/partial-train/0000.parquet", "partial-train"),
        ("part-00000-of-00002.jsonl", None),
        ("trained.jsonl", None),
        ("developers.json", None),
    ],
)
def test_what_a_name_says_about_the_split(name: str, split: str | None) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("name", "pattern", "does"),
    [
        ("a/b.json", "*.json", False),
        ("b.json", "*.json", True),
        ("a/x/b.json", "a/**/b.json", True),
        ("a/b.json", "a/**/b.json", True),
        ("a/x/b.json", "a/**", True),
        ("a/b.json", "**/*.json", True),
        ("part-3", "part-[0-2]", False),
    ],
)
def test_globs_of_stores_and_of_the_hub(name: str, pattern: str, does: bool) -> None:
    assert matches(name, pattern) is does


# ── the hub ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    with used_hub(HUB_TOKEN, tmp_path / "hub-cache", monkeypatch) as server:
        yield server


def hub_names(fetched: Fetched) -> list[str]:
    return [file.as_posix().partition(f"/{fetched.revision}/")[2] for file in fetched.files]


def test_a_glob_of_many_stars_ends() -> None:
    name = "/".join("a" * 60)
    assert not matches(name, "/".join(["**", "a"] * 30) + "/b")
    assert matches(name, "/".join(["**", "a"] * 30))


def test_the_split_of_a_dataset_by_its_names(hub: Hub, session: Session) -> None:
    shards = [f"data/train-0000{index}-of-00004.parquet" for index in range(4)]
    dataset = hub.add("me/prefs", dict.fromkeys((*shards, "data/test-00000-of-00001.parquet", "README.md"), ROW))
    fetched = fetch("hf://datasets/me/prefs", session)
    assert hub_names(fetched) == shards, "all pages of the listing, in order"
    assert fetched.revision == dataset.commit
    assert fetched.origin == "hf://datasets/me/prefs"
    assert fetched.files[0].read_text() == ROW
    assert fetch("hf://me/prefs?split=train", session).files == fetched.files
    assert hub_names(fetch("hf://me/prefs?split=test", session)) == ["data/test-00000-of-00001.parquet"]
    message = refusal("hf://me/prefs?split=dev", session)
    assert "no split 'dev'" in message
    assert "hf://datasets/me/prefs?split=train" in message


def test_what_was_fetched_is_not_fetched_again(hub: Hub, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = hub.add("me/prefs", {"train.jsonl": ROW, "test.jsonl": ROW})
    first = fetch("hf://me/prefs", session)
    hub.asked.clear()
    pinned = fetch(f"hf://me/prefs@{dataset.commit}", session)
    assert pinned.files == first.files
    assert hub.asked == [], "a commit never changes"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch("hf://me/prefs", session).files == first.files
    assert hub.asked == []
    message = refusal("hf://me/prefs?split=test", session)
    assert "not complete in the hub's cache, and HF_HUB_OFFLINE is set" in message
    assert "HF_HUB_OFFLINE" in refusal("hf://me/other", session)


def test_paths_and_globs_in_a_dataset(hub: Hub, session: Session) -> None:
    hub.add("me/prefs", dict.fromkeys(("a/train.jsonl", "a/test.jsonl", "b/x.jsonl", "b/y.jsonl", "b/z [1].csv"), ROW))
    assert hub_names(fetch("hf://datasets/me/prefs/b/x.jsonl", session)) == ["b/x.jsonl"]
    assert hub_names(fetch("hf://datasets/me/prefs/b/z [1].csv", session)) == ["b/z [1].csv"]
    assert hub_names(fetch("hf://datasets/me/prefs/b/?.jsonl", session)) == ["b/x.jsonl", "b/y.jsonl"]
    assert hub_names(fetch("hf://datasets/me/prefs/**/*.jsonl", session)) == [
        *("a/test.jsonl", "a/train.jsonl", "b/x.jsonl", "b/y.jsonl")
    ]
    assert hub_names(fetch("hf://datasets/me/prefs/a", session)) == ["a/train.jsonl"], "the default split of a folder"
    assert hub_names(fetch("hf://datasets/me/prefs/a/?split=test", session)) == ["a/test.jsonl"]
    assert "c does not exist: hf://datasets/me/prefs contains a/test.jsonl" in refusal(
        "hf://datasets/me/prefs/c", session
    )
    assert "leave out" in refusal("hf://datasets/me/prefs/*.jsonl?split=train", session, ConfigurationError)


def test_several_configs_are_listed(hub: Hub, session: Session) -> None:
    hub.add(
        "me/prefs",
        dict.fromkeys(("helpful/train.jsonl.gz", "helpful/test.jsonl.gz", "harmless/train.jsonl.gz"), ROW),
    )
    message = refusal("hf://me/prefs", session)
    assert "has several configs" in message
    assert "hf://datasets/me/prefs?config=harmless\n" in message
    assert hub_names(fetch("hf://me/prefs?config=helpful", session)) == ["helpful/train.jsonl.gz"]
    assert hub_names(fetch("hf://me/prefs?config=helpful&split=test", session)) == ["helpful/test.jsonl.gz"]
    assert "Use one of: harmless, helpful" in refusal("hf://me/prefs?config=other", session)


README = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: rows/part-*
  - split: gold
    path: [checked.jsonl, "more/**"]
---
# Data
"""


def test_what_the_readme_declares_comes_first(hub: Hub, session: Session) -> None:
    files = dict.fromkeys(("rows/part-1.jsonl", "rows/part-2.jsonl", "checked.jsonl", "more/deep/x.jsonl"), ROW)
    hub.add("me/prefs", files | {"README.md": README, "rows/test.jsonl": ROW})
    assert hub_names(fetch("hf://me/prefs", session)) == ["rows/part-1.jsonl", "rows/part-2.jsonl"]
    assert hub_names(fetch("hf://me/prefs?split=gold", session)) == ["checked.jsonl", "more/deep/x.jsonl"]
    card = "---\nconfigs:\n- odd\n- data_files: '**'\n---\n"
    hub.add("me/all", {"x.jsonl": ROW, "deep/y.jsonl": ROW, "README.md": card, ".gitattributes": ""})
    assert hub_names(fetch("hf://me/all", session)) == ["deep/y.jsonl", "x.jsonl"]
    for name, block in {
        "broken": "configs: [",
        "deep": "configs: " + "[" * 5000,
        "bomb": "a: &a {k: v}\nb: &b {<<: [*a, *a]}\nconfigs: *b",
        "tagged": "configs: !!python/object/apply:os.system ['true']",
        "number": "configs: 5",
        "paths": "configs:\n- data_files: [{path: [5]}]",
        "bool": "configs: !!bool x",
    }.items():
        hub.add(f"me/{name}", {"train.jsonl": ROW, "README.md": f"---\n{block}\n---\n"})
        assert "README.md is broken" in refusal(f"hf://me/{name}", session)
    assert len(fetch("hf://me/broken/train.jsonl".replace("hf://", "hf://datasets/"), session).files) == 1


def test_a_dataset_without_splits_and_one_without_data(hub: Hub, session: Session) -> None:
    hub.add("me/some", {"train.jsonl": ROW, "extra.jsonl": ROW, "load.py": ""})
    fetched = fetch("hf://me/some", session)
    assert hub_names(fetched) == ["train.jsonl"]
    assert fetched.passed_over == ("extra.jsonl", "load.py")
    hub.add("me/flat", {"b.jsonl": ROW, "a.jsonl": ROW, "load.py": ""})
    fetched = fetch("hf://me/flat", session)
    assert hub_names(fetched) == ["a.jsonl", "b.jsonl"]
    assert fetched.passed_over == ("load.py",)
    hub.add("me/script", {"load.py": "", "README.md": "# no block"}, revisions=("main", "refs/convert/parquet"))
    assert "hf://datasets/me/script@refs/convert/parquet" in refusal("hf://me/script", session)
    hub.add("me/script", {"default/train/0000.parquet": ROW}, revisions=("refs/convert/parquet",))
    uri = "hf://datasets/me/script@refs/convert/parquet"
    assert hub_names(fetch(uri, session)) == ["default/train/0000.parquet"]
    hub.add("me/twins", {"train.csv": ROW, "train.parquet": ROW})
    assert "look like the same rows" in refusal("hf://me/twins", session)


def test_gated_private_and_missing_datasets(hub: Hub, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("me/gated", {"train.jsonl": ROW}, gated=True)
    hub.add("me/private", {"train.jsonl": ROW}, private=True)
    message = refusal("hf://me/gated", session, StoreDeniedError)
    assert f"accept its terms at {hub.endpoint}/datasets/me/gated, then set HF_TOKEN" in message
    message = refusal("hf://me/private", session)
    assert message == refusal("hf://me/missing", session).replace("missing", "private"), (
        "the hub does not tell them apart"
    )
    assert "set HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "hf_wrong-and-hush")
    for uri in ("hf://me/gated", "hf://me/private"):
        with pytest.raises(PalateError) as caught, fetch_files(uri, session):
            pass
        assert "HF_TOKEN" in str(caught.value)
        assert "hush" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    for uri in ("hf://me/gated", "hf://me/private"):
        assert len(fetch(uri, session).files) == 1
    assert "no revision 'v9'" in refusal("hf://me/private@v9", session)


def test_a_hub_that_fails_or_is_not_there(hub: Hub, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("me/prefs", {"train.jsonl": ROW})
    fetch("hf://me/prefs", session)
    hub.failing = 500
    assert "HTTP 500" in refusal("hf://me/prefs", session, StoreUnreachableError)
    hub.failing = 404
    assert "Check HF_ENDPOINT" in refusal("hf://me/prefs", session, StoreError)
    hub.failing = 200
    assert "does not respond like a Hugging Face hub" in refusal("hf://me/prefs", session, StoreError)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # discard: nothing listens there
    message = refusal("hf://me/prefs", session, StoreUnreachableError)
    assert "http://127.0.0.1:9" in message
    assert "HF_HUB_OFFLINE=1" in message, "the cache is not used without a word"


@pytest.mark.parametrize(
    "uri", ["hf://prefs", "hf://models/me/x", "hf://", "hf://me/prefs?splits=train", "hf://datasets/me"]
)
def test_uris_that_name_no_dataset(uri: str, session: Session) -> None:
    assert "hf://datasets/OWNER/NAME" in refusal(uri, session, ConfigurationError)


# ── Google Sheets ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sheets]:
    pytest.importorskip("gspread")
    with running_sheets() as server:
        monkeypatch.setenv("GOOGLE_SHEETS_CLIENT_EMAIL", server.email)
        monkeypatch.setenv("GOOGLE_SHEETS_PRIVATE_KEY", as_pem(make_key()))
        monkeypatch.setenv("GOOGLE_SHEETS_ENDPOINT", f"{server.url}/")
        monkeypatch.setenv("GOOGLE_SHEETS_TOKEN_URI", server.token_uri)
        prefs = [
            ["prompt", "chosen", "rejected", ""],
            ['Was, sagt "er"?\nZwei Zeilen', "Ähm, ja.", "nein"],
            ["p", "c"],
        ]
        server.spreadsheets[SHEET] = Spreadsheet(
            "Ratings", {"Prefs 2026": prefs, "it's/odd": [["prompt"], ["x"]], "Empty": []}
        )
        yield server


def rows_of(uri: str, session: Session) -> list[list[str]]:
    with fetch_files(uri, session) as fetched:
        (path,) = fetched.files
        rows = list(csv.reader(path.open(encoding="utf-8", newline="")))
    assert not path.exists(), "a temporary file vanishes"
    return rows


def test_a_worksheet_becomes_a_csv_file(sheets: Sheets, session: Session) -> None:
    expected = [
        ["prompt", "chosen", "rejected"],
        ['Was, sagt "er"?\nZwei Zeilen', "Ähm, ja.", "nein"],
        ["p", "c", ""],
    ]
    address = f"https://docs.google.com/spreadsheets/d/{SHEET}/edit"
    for uri in (f"gsheet://{SHEET}/Prefs 2026", f"gsheet://{SHEET}/Prefs%202026", f"{address}?gid=0#gid=0"):
        assert rows_of(uri, session) == expected
    assert rows_of(f"{address}#gid=100", session) == [["prompt"], ["x"]]
    assert rows_of(f"gsheet://{SHEET}/it's/odd", session) == [["prompt"], ["x"]]
    assert sheets.claims["scope"] == "https://www.googleapis.com/auth/spreadsheets.readonly"
    with fetch_files(f"{address}#gid=0", session) as fetched:
        assert fetched.origin == f"gsheet://{SHEET}/Prefs 2026"
        assert fetched.files[0].name == "Prefs 2026.csv"
        assert fetched.revision is None


@pytest.mark.parametrize("form", ["escaped", "quoted"])
def test_the_key_as_env_files_write_it(
    sheets: Sheets, session: Session, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    escaped = as_pem(make_key()).replace("\n", "\\n")
    monkeypatch.setenv("GOOGLE_SHEETS_PRIVATE_KEY", f'"{escaped}"' if form == "quoted" else escaped)
    assert rows_of(f"gsheet://{SHEET}/it's/odd", session) == [["prompt"], ["x"]]


def test_a_worksheet_must_be_chosen_when_there_are_several(sheets: Sheets, session: Session) -> None:
    for uri in (
        f"gsheet://{SHEET}",
        f"gsheet://{SHEET}/prefs",
        f"https://docs.google.com/spreadsheets/d/{SHEET}/edit#gid=7",
    ):
        assert f"\n  gsheet://{SHEET}/Prefs 2026\n" in refusal(uri, session)
    sheets.spreadsheets[SHEET].sheets = {"only": [["prompt"], ["x"]]}
    assert rows_of(f"https://docs.google.com/spreadsheets/d/{SHEET}", session) == [["prompt"], ["x"]]


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([], "has no header"),
        ([["", ""], ["a", "b"]], "has no header"),
        ([["prompt", " ", "rejected"], ["a", "b", "c"]], "empty header cell B1"),
        ([["prompt", "chosen"], ["a", "b", "c"]], "empty header cell C1"),
        ([["prompt", "chosen", "prompt "], ["a", "b", "c"]], "the header 'prompt' is in both A1 and C1"),
        ([["prompt", "chosen"]], "has a header (prompt, chosen) but no rows"),
    ],
)
def test_tables_that_cannot_be_read(sheets: Sheets, session: Session, cells: list[list[str]], said: str) -> None:
    sheets.spreadsheets[SHEET].sheets["Bad"] = cells
    assert said in refusal(f"gsheet://{SHEET}/Bad", session)


def test_a_sheet_that_is_not_shared_and_one_that_is_not_there(sheets: Sheets, session: Session) -> None:
    sheets.spreadsheets["closed-sheet"] = Spreadsheet("x", {"y": []}, shared=False)
    message = refusal("gsheet://closed-sheet/y", session, StoreDeniedError)
    assert f"share the sheet with {sheets.email}" in message
    message = refusal("gsheet://no-such-sheet/y", session)
    assert "gsheet://no-such-sheet/y does not exist" in message
    assert f"share the sheet with {sheets.email}" in message


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (
            (403, "Google Sheets API has not been used in project 7 before or it is disabled."),
            StoreDeniedError,
            "Enable the",
        ),
        ((429, "Quota exceeded"), StoreUnreachableError, "Quota exceeded. Wait a minute"),
        ((503, "down"), StoreUnreachableError, "returned status 503"),
        ((400, "This operation is not supported for this document"), DataError, "uploaded Excel file"),
    ],
)
def test_what_google_may_answer(
    sheets: Sheets, session: Session, answer: tuple[int, str], kind: type[PalateError], said: str
) -> None:
    sheets.failing = answer
    assert said in refusal(f"gsheet://{SHEET}/y", session, kind)


def test_no_error_holds_anything_of_the_key(sheets: Sheets, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"gsheet://{SHEET}/Prefs 2026"
    wrong = as_pem(make_key(1))
    keys = {
        wrong: StoreDeniedError,  # not the account's
        wrong.replace("\n", " "): StoreDeniedError,
        wrong[:300]: ConfigurationError,
        wrong.splitlines()[3]: ConfigurationError,
        "{}": ConfigurationError,
    }
    for key, kind in keys.items():
        monkeypatch.setenv("GOOGLE_SHEETS_PRIVATE_KEY", key)
        message = refusal(uri, session, kind)
        assert "GOOGLE_SHEETS_PRIVATE_KEY" in message
        assert not any(line in message for line in wrong.splitlines()[1:-1])
    monkeypatch.setenv("GOOGLE_SHEETS_PRIVATE_KEY", wrong)
    monkeypatch.setenv("GOOGLE_SHEETS_TOKEN_URI", "http://127.0.0.1:9/token")  # discard: nothing listens there
    message = refusal(uri, session, StoreUnreachableError)
    assert "127.0.0.1" in message
    assert not any(line in message for line in wrong.splitlines()[1:-1])


def test_settings_and_packages_that_are_missing(
    sheets: Sheets, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"gsheet://{SHEET}/y"
    for bad in ("gsheet://", "gsheet://a b/c", "https://docs.google.com/spreadsheets/d/e/2PACX-1/pubhtml"):
        assert "gsheet://ID/Worksheet name" in refusal(bad, session, ConfigurationError)
    monkeypatch.delenv("GOOGLE_SHEETS_CLIENT_EMAIL")
    assert "set GOOGLE_SHEETS_CLIENT_EMAIL" in refusal(uri, session, ConfigurationError)
    monkeypatch.setitem(sys.modules, "gspread", None)
    assert "pip install 'palate[data]'" in refusal(uri, session, MissingDependencyError)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'palate[data]'" in refusal("hf://me/prefs", session, MissingDependencyError)
