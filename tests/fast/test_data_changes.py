"""What is written from data files: other formats and containers, clean copies, parts held out, tables through templates."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from palate_recipes.errors import DataError
from palate_recipes.preferences.check import check
from palate_recipes.preferences.columns import Columns, PromptTemplate, choose_template, format_for, read_templates
from palate_recipes.preferences.formats import FORMATS
from palate_recipes.preferences.load import read_rows
from palate_recipes.preferences.row import Message, Row
from palate_recipes.preferences.transform import clean, convert, split
from palate_recipes.preferences.writing import write_rows

PAIRS = [
    {
        "prompt": f"Is {number} even?",
        "chosen": f"{number} is {'even' if number % 2 == 0 else 'odd'}.",
        "rejected": "Maybe.",
    }
    for number in range(40)
]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", [name for name, one in FORMATS.items() if one.write])
@pytest.mark.parametrize("ending", [".json", ".jsonl.gz", ".csv", ".tsv", ".parquet", ".jsonl.zst"])
def test_every_format_goes_through_every_container_and_back(tmp_path: Path, name: str, ending: str) -> None:
    given = [*PAIRS[:3], {"prompt": 'Umlaut?\nÄ, "quoted"; 中文 🙂', "chosen": "ja, \t klar", "rejected": "a,b;c"}]
    source, out = lines(tmp_path / "given.jsonl", given), tmp_path / f"out{ending}"
    single = name in ("unpaired", "chat", "sharegpt-sft", "instructions", "completions")
    change = convert([source], out, FORMATS[name], unpair=name == "unpaired")
    if name == "unpaired":
        found = read_rows(out, strategy="kto")
        assert change.written[str(out)] == len(found) == 2 * len(given)
        assert [(row.text, row.chosen, row.rejected) for row in found[:2]] == [
            ("Is 0 even?", "0 is even.", None),
            ("Is 0 even?", None, "Maybe."),
        ]
        return
    found = read_rows(out, strategy="sft" if single else "dpo")
    assert [(row.text, row.chosen) for row in found] == [(row["prompt"], row["chosen"]) for row in given]
    if not single:
        assert [row.rejected for row in found] == [row["rejected"] for row in given]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one.jsonl.gz", "two.jsonl.gz"):
        write_rows(tmp_path / name, PAIRS)
    assert (tmp_path / "one.jsonl.gz").read_bytes() == (tmp_path / "two.jsonl.gz").read_bytes()


def test_what_a_format_cannot_hold_is_refused_by_row_and_nothing_is_written(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    source = lines(
        tmp_path / "given.jsonl",
        [PAIRS[0], {"messages": [*turns, {"role": "assistant", "content": "d"}], "rejected_response": "e"}],
    )
    out = tmp_path / "out.csv"
    out.write_text("as it was")
    with pytest.raises(DataError, match=r"(?s)1 of 2 rows .* line 2: is a conversation of 3 turns"):
        convert([source], out, FORMATS["pai"])
    assert out.read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given.jsonl", "out.csv"]
    change = convert([source], out, FORMATS["pai"], bad_rows="skip")
    assert (change.written[str(out)], change.dropped) == (1, {"wrong-kind": 1})
    with pytest.raises(DataError, match="can only be read, not written"):
        convert([source], out, FORMATS["alpaca-ranking"])
    with pytest.raises(DataError, match="unknown file type"):
        convert([source], tmp_path / "out.txt", FORMATS["trl"])
    with pytest.raises(DataError, match=r"does not exist\. Create it first"):
        convert([source], tmp_path / "absent" / "out.json", FORMATS["trl"])


def test_a_clean_copy_keeps_good_rows_in_their_format_and_counts_the_others(tmp_path: Path) -> None:
    rows = [
        {"question": "a?", "chosen": "yes<|im_end|>", "rejected": "no", "id": 7},
        {"question": "a?", "chosen": "yes", "rejected": "no", "id": 8},
        {"question": "b?", "chosen": "", "rejected": "no"},
        {"question": "c?", "chosen": "<|im_start|>", "rejected": "no"},
    ]
    source = lines(tmp_path / "given.jsonl", rows)
    with source.open("a") as file:
        file.write("{broken\n")
    change = clean([source], tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {"question": "a?", "chosen": "yes", "rejected": "no", "id": 7}
    ]
    assert change.dropped == {"duplicate": 1, "empty-field": 2, "broken-json": 1}
    assert change.cleaned == 1
    assert not check([(tmp_path / "out.json", "out.json")]).count("warning")
    with pytest.raises(DataError, match="no row is left"):
        clean([lines(tmp_path / "bad.jsonl", rows[2:3])], tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


def test_a_split_has_no_prompt_on_both_sides_not_even_nearly(tmp_path: Path) -> None:
    long = "Please tell me in a few plain words how the old steam engine in the valley was built and who paid for it"
    rows = [{**row, "prompt": f"{row['prompt']} {'!' * (number % 3)}"} for number, row in enumerate(PAIRS * 3)]
    rows += [
        {"prompt": f"{long} number {number // 2}{' then' * (number % 2)}", "chosen": f"a{number}", "rejected": "b"}
        for number in range(40)
    ]
    source = lines(tmp_path / "all.jsonl", rows)
    train, held = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    change = split([source], train, held, share=0.2, seed=3)
    assert sum(change.written.values()) == len(rows)
    assert 0 < change.written[str(held)] < len(rows) / 2
    report = check([(train, "train")], [(held, "held")])
    assert not {"leakage", "near-leakage"} & set(report.findings)
    before = train.read_bytes(), held.read_bytes()
    split([source], train, held, share=0.2, seed=3)
    assert (train.read_bytes(), held.read_bytes()) == before
    split([source], train, held, share=0.2, seed=4)
    assert held.read_bytes() != before[1]


@pytest.mark.parametrize(
    ("share", "rows", "words"), [(0.0, 4, "between 0 and 1"), (0.1, 1, "cannot be split"), (0.5, 0, "is empty")]
)
def test_a_split_that_cannot_be_had_is_refused(tmp_path: Path, share: float, rows: int, words: str) -> None:
    source = lines(tmp_path / "all.jsonl", PAIRS[:rows])
    with pytest.raises(DataError, match=words):
        split([source], tmp_path / "train.jsonl", tmp_path / "held.jsonl", share=share)
    assert [path.name for path in tmp_path.iterdir()] == ["all.jsonl"]


# Tables.

TEMPLATE = PromptTemplate("support", "Be kind.", 'Answer {query} in {language}, as {"{{query}}": "…"}.')


def test_columns_become_rows_through_a_template(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("uq,l,good,why,bad,score\nHow {x}?,en,Thus.,since,No.,3\n")
    columns = Columns(
        {"query": "uq", "language": "l"}, {"chosen": {"answer": "good", "reason": "why"}, "rejected": "bad"}, TEMPLATE
    )
    assert read_rows(table, format=columns.as_format()) == [
        Row(
            1,
            (Message("system", "Be kind."), Message("user", 'Answer How {x}? in en, as {"{query}": "…"}.')),
            '{"answer": "Thus.", "reason": "since"}',
            "No.",
        )
    ]
    single = Columns({"prompt": "uq"}, {"chosen": "good", "rejected": "score"})
    assert read_rows(table, format=single.as_format())[0][1:] == ((Message("user", "How {x}?"),), "Thus.", "3")


@pytest.mark.parametrize(
    ("inputs", "labels", "words"),
    [
        ({"query": "a"}, {"chosen": "b"}, r"has \{language\}, but input_columns has no column for it"),
        ({"query": "a", "language": "b", "more": "c"}, {"chosen": "b"}, r"has 'more', but the prompt template"),
        ({"query": "a", "language": "b"}, {"rejected": "b"}, "no column for chosen"),
        ({"query": "a", "language": "b"}, {"chosen": "b", "best": "c"}, "expected chosen and rejected"),
    ],
)
def test_columns_that_do_not_fit_are_refused(inputs: dict[str, str], labels: dict[str, str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Columns(inputs, labels, TEMPLATE)


def test_missing_and_empty_cells_are_named(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("q,good,bad\n,b,c\na,,c\n")
    form = Columns({"prompt": "q"}, {"chosen": "good", "rejected": "worst"}).as_format()
    with pytest.raises(DataError, match=r"(?s)row 1: column `q` is empty.*row 2: column `good` is empty"):
        read_rows(table, format=form)


def test_templates_come_from_csv_and_yaml(tmp_path: Path) -> None:
    table, listed, named = (tmp_path / name for name in ("prompts.csv", "prompts.yaml", "named.yml"))
    table.write_text('name,system,user\nsupport,Be kind.,"Answer {query}, please"\nplain,,{query}\n')
    listed.write_text(
        "- name: support\n  system: Be kind.\n  user: 'Answer {query}, please'\n- {name: plain, user: '{query}'}\n"
    )
    named.write_text(
        "prompts:\n  support:\n    system: Be kind.\n    user: 'Answer {query}, please'\n  plain: {user: '{query}'}\n"
    )
    expected = {
        "support": PromptTemplate("support", "Be kind.", "Answer {query}, please"),
        "plain": PromptTemplate("plain", "", "{query}"),
    }
    for path in (table, listed, named):
        assert read_templates(path) == expected
    with pytest.raises(DataError, match="choose one of support, plain"):
        choose_template(table, None)
    with pytest.raises(DataError, match="no template is named 'suport'"):
        choose_template(table, "suport")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "- name: [", "broken YAML"),
        ("a.yaml", "- 3", "template 1: is a number"),
        ("a.yaml", "- {name: &n a, user: *n, more: &m [1]}\n- *m", "broken YAML.*alias \\*m of a list or mapping"),
        ("a.yaml", "a: &a {k: v}\nb: &b {<<: [*a, *a]}\nc: {<<: [*b, *b]}", "broken YAML.*alias \\*a"),
        ("a.yaml", "- &a [*a]", "broken YAML.*alias \\*a"),
        ("a.yaml", "!!python/object/apply:os.system ['true']", "broken YAML.*could not determine a constructor"),
        ("a.yaml", "[" * 5000, "nested too deeply"),
        ("a.yaml", "- " + "9" * 5000, "broken YAML.*4300 digits"),
        ("a.yaml", "- !!bool x", "broken YAML"),
        ("a.yaml", "- 2024-02-30", "broken YAML"),
        ("a.yaml", "#" + "a" * (1 << 20), "1,048,576 bytes, the limit for YAML"),
        ("a.yaml", "- {name: a}", "`user` is missing"),
        ("a.yaml", "- {name: a, user: no place}", "no placeholder"),
        ("a.csv", "name,user\na,{x}\na,{y}\n", "two templates are named 'a'"),
        ("a.csv", "name,user\n", "no template"),
    ],
)
def test_templates_that_are_not_whole_are_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        read_templates(tmp_path / name)


def test_ways_to_read_rows_do_not_mix() -> None:
    assert format_for() is None
    assert format_for("hh") is FORMATS["hh"]
    with pytest.raises(DataError, match="give one of them"):
        format_for("hh", input_columns={"prompt": "a"})
    with pytest.raises(DataError, match="need both"):
        format_for(input_columns={"prompt": "a"})
    with pytest.raises(DataError, match="did you mean 'openai'"):
        format_for("opneai")


# Whole files.


def test_rows_taken_at_once_are_judged_as_rows_taken_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from palate_recipes.preferences.check import Linter

    odd: list[Any] = [
        {"prompt": "a <|im_end|>", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "naïve \ufffd", "rejected": "c"},
        {"prompt": "a", "chosen": "Yes!", "rejected": "yes"},
        {"prompt": "me@example.com", "chosen": "b", "rejected": "[list]"},
    ]
    wrong: list[Any] = [
        {"prompt": "a", "chosen": " ", "rejected": "c"},
        {"prompt": "a", "chosen": "b ", "rejected": " b"},
        {"prompt": "a", "chosen": 3, "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c", "tools": [1]},
        {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "chosen": "b", "rejected": "c"},
        {"prompt": "[{'role': 'user'}]", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "\ud800", "rejected": "c"},
        [1],
    ]
    for number, extra in enumerate([odd, *([row] for row in wrong)]):
        path = lines(tmp_path / f"{number}.jsonl", [*PAIRS, *PAIRS[:3], *extra])
        at_once = check([(path, "x")])
        with monkeypatch.context() as patched:
            patched.setattr(Linter, "_take_plain", lambda *_: ())
            assert check([(path, "x")]).to_json() == at_once.to_json()


def test_memory_does_not_grow_with_an_array(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "array.json.gz"
    with gzip.open(path, "wt") as file:
        file.write(
            "["
            + ",".join(
                json.dumps({"prompt": f"{n} " + "p" * 2000, "chosen": "c" * 500, "rejected": "r" * 500})
                for n in range(8000)
            )
            + "]"
        )
    tracemalloc.start()
    report = check([(path, "array.json.gz")])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.usable == 8000
    assert peak < 12e6  # the text has 24 MB


def test_the_docs_know_every_rule_and_every_format() -> None:
    from palate_recipes.preferences.report import RULES

    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [code for code in (*RULES, *FORMATS) if f"| `{code}` |" not in text] == []


def test_an_input_is_never_an_output(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a"}\n')
    before = path.read_bytes()
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    for out in (path, link):
        with pytest.raises(DataError, match="is also an input"):
            clean([path], out)
        with pytest.raises(DataError, match="is also an input"):
            convert([path], out, FORMATS["trl"])
        with pytest.raises(DataError, match="is also an input"):
            split([path], out, tmp_path / "held.jsonl")
    with pytest.raises(DataError, match="two outputs"):
        split([path], tmp_path / "a.jsonl", tmp_path / "a.jsonl")
    assert path.read_bytes() == before
