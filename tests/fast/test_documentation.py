"""What README, CONTRIBUTING and docs/ show works: code, command lines, data and links are checked against the real thing."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import palate
import palate.errors
from palate_recipes.demo import write_demo
from palate_recipes.recipe_file import read_recipe_file
from tests.support.command_lines import parse
from tests.support.documents import LINKING_PAGES, PAGES, ROOT, Block, anchors, blocks, commands, links, name_of, prose
from tests.support.example_code import Example

LANGUAGES = {"bash", "python", "ipython", "toml", "json", "yaml", "text"}
BLOCKS = [block for page in PAGES for block in blocks(page)]
RUNNABLE_PAGES = [page for page in PAGES if any(block.runs for block in blocks(page))]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def shell_commands() -> list[tuple[Block, list[str]]]:
    return [(block, words) for block in of("bash") for words in commands(block.text)]


pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


def test_the_pages_show_enough_to_be_worth_a_test() -> None:
    assert len(of("python")) >= 25
    assert sum(words[0] == "palate" for _, words in shell_commands()) >= 60
    assert len(RUNNABLE_PAGES) >= 4


def test_every_block_says_what_it_is_and_no_command_hides_in_text() -> None:
    assert [block.place for block in BLOCKS if block.language not in LANGUAGES] == []
    hidden = [
        block.place for block in of("text") if re.search(r"^\$? ?(palate|make|pip) [a-z-]", block.text, re.MULTILINE)
    ]
    assert hidden == []


@pages
def test_python_uses_names_arguments_and_values_that_exist(page: Path) -> None:
    example, wrong = Example(), []
    for block in blocks(page):
        if block.language == "python":
            example.problems.clear()
            example.read(block.text)
            wrong += [f"{block.place}: {problem}" for problem in example.problems]
    assert wrong == []


def test_a_magic_line_names_a_module_with_an_extension() -> None:
    for block in of("ipython"):
        for line in block.text.splitlines():
            if line.startswith("%load_ext "):
                assert callable(importlib.import_module(line.split()[1]).load_ipython_extension)
            else:
                ast.parse(line)


@pytest.mark.parametrize("block", of("bash"), ids=lambda block: block.place)
def test_shell_is_shell(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert done.returncode == 0, f"{block.place}: {done.stderr}"


def test_every_palate_command_line_is_one_that_the_parser_takes() -> None:
    wrong = []
    for block, words in shell_commands():
        if words[0] == "palate":
            try:
                parse(words[1:])
            except ValueError as error:
                wrong.append(f"{block.place}: {error}")
    assert wrong == []


def test_the_parser_of_these_tests_refuses_what_the_command_line_refuses() -> None:
    for line in ("resume", "train x --modl y", "jobs --limit 0", "train x --set lr=1", "fly", "data fly"):
        with pytest.raises(ValueError, match=r"."):
            parse(line.split())
    for line in ("data check x.csv --input-column question", "data convert x --to y -o z", "jobs --since yesterday"):
        with pytest.raises(ValueError, match=r"."):
            parse(line.split())
    assert parse(["train", "x", "--model", "smollm2-135m-instruct", "--set", "num_train_epochs=2"])["data"] == "x"


def test_every_make_target_and_variable_exists() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.MULTILINE))
    in_prose = {
        (name_of(page), target)
        for page in PAGES
        for _, line in prose(page)
        for target in re.findall(r"`make ([a-z-]+)", line)
    }
    in_blocks = {(block.place, words[1]) for block, words in shell_commands() if words[0] == "make"}
    assert [(place, target) for place, target in sorted(in_prose | in_blocks) if target not in targets] == []
    variables = {word.partition("=")[0] for _, words in shell_commands() if words[0] == "make" for word in words[2:]}
    assert [name for name in variables if f"$({name})" not in MAKEFILE] == []


def test_what_pip_installs_of_palate_has_these_extras() -> None:
    extras = PROJECT["optional-dependencies"].keys()
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = {extra for found in re.findall(r"(?:palate|'\.)\[([\w,-]+)\]", text) for extra in found.split(",")}
    assert named >= {"train", "data", "s3"}
    assert named - extras == set()


def test_the_first_installation_is_from_a_clone_and_leads_to_palate_on_path() -> None:
    """Palate is on no index: `palate[…]` adds an extra to what is installed."""
    for page in (ROOT / "README.md", ROOT / "docs/tutorial.md"):
        shell = "".join(block.text for block in blocks(page) if block.language == "bash")
        setup, activate, first = (shell.find(one) for one in ("make setup", "source .venv/bin/activate", "\npalate "))
        assert 0 <= setup < activate < first, page
        assert "pip install '.[" in shell
    pages = [*PAGES, *(ROOT / "recipes" / "examples").glob("*.ipynb")]
    wrong = [
        page
        for page in pages
        if re.search(r"install [^`\n]*'palate\[(?:[^]]*,)?(train|serve|serve-\w+)[],]", page.read_text())
    ]
    assert wrong == []


def test_python_m_names_what_can_be_run() -> None:
    for block, words in shell_commands():
        if words[0] == "python" and words[1] == "-m":
            assert importlib.util.find_spec(words[2]), f"{block.place}: {words[2]}"
            assert [word for word in words[3:] if word.startswith("tests/") and not (ROOT / word).exists()] == []
        if words[0] == "python" and words[1] == "-c":
            example = Example()
            example.read(words[2])
            assert example.problems == [], block.place


@pytest.mark.parametrize("block", of("toml", "json", "yaml"), ids=lambda block: block.place)
def test_data_blocks_can_be_read(block: Block, tmp_path: Path) -> None:
    if block.language == "toml":
        if "model_name" in tomllib.loads(block.text):
            (tmp_path / "recipe.toml").write_text(block.text)
            assert read_recipe_file(tmp_path / "recipe.toml").arguments["model_name"]
    elif block.language == "yaml":
        assert yaml.safe_load(block.text)
    else:
        try:
            json.loads(block.text)
        except json.JSONDecodeError:
            assert [json.loads(line) for line in block.text.splitlines()]


@pytest.mark.parametrize("page", RUNNABLE_PAGES, ids=name_of)
def test_the_blocks_that_are_marked_run(page: Path, home: Path, tmp_path: Path) -> None:
    """One folder for a page, with prefs.json and held-out.json; its blocks run in order."""
    folder = tmp_path / "reader"
    demo = write_demo(folder, per_topic=2)
    demo["train"].rename(folder / "prefs.json")
    demo["validation"].rename(folder / "held-out.json")
    environment = {
        **os.environ,
        "PALATE_HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for block in blocks(page):
        if block.runs:
            command = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[block.language]
            done = subprocess.run(
                [*command, block.text], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, f"{block.place}:\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", LINKING_PAGES, ids=name_of)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for number, target in links(page):
        if re.match(r"(https?|mailto):", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or ROOT not in found.parents:
            broken.append(f"{name_of(page)}:{number}: {target}: no such file")
        elif anchor and anchor not in anchors(found):
            broken.append(f"{name_of(page)}:{number}: {target}: no such heading")
    assert broken == []


def test_what_the_python_reference_names_exists_and_every_error_is_there() -> None:
    for page in PAGES:
        for name in re.findall(r"^::: ([\w.]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name
    text = (ROOT / "docs/reference/errors.md").read_text(encoding="utf-8")
    assert [name for name in palate.errors.__all__ if f"::: palate_recipes.errors.{name}\n" not in text] == []
    text = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    public = set(palate.__all__) - {"PalateError", "__version__"}
    assert [name for name in public if not re.search(rf"^::: palate\.[\w.]*\b{name}$", text, re.MULTILINE)] == []


def test_the_command_line_page_is_what_its_generator_writes() -> None:
    spec = importlib.util.spec_from_file_location("cli_page", ROOT / "docs/tools/cli_page.py")
    assert spec
    assert spec.loader
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert generator.PAGE.read_text(encoding="utf-8") == generator.render(), "run python docs/tools/cli_page.py"


def test_pages_that_messages_and_docstrings_name_exist() -> None:
    missing = set()
    for folder in ("client", "recipes", "container", "serve"):
        for file in (ROOT / folder).rglob("*.py"):
            for page in re.findall(r"\bdocs/[\w/-]+\.md\b", file.read_text(encoding="utf-8")):
                if not (ROOT / page).is_file():
                    missing.add((file.name, page))
    assert missing == set()


@pages
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = {
        path
        for _, line in prose(page)
        for path in re.findall(r"`((?:tests|recipes|client|container|serve|benchmarks|docs)/[\w./-]+)`", line)
    }
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
