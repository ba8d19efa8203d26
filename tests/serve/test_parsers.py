"""Parsers by catalog and by template, and their names against the installed vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from palate_recipes.catalog import models
from palate_server.parsers import _FORMATS, find_parsers, with_parsers

HERMES = '{% if tools %}<tool_call>{"name": ..., "arguments": ...}</tool_call>{% endif %}'


def tokenizer(folder: Path, template: str, *tokens: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    added = [{"id": 100 + number, "content": token} for number, token in enumerate(tokens)]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.mark.timeout(300)
def test_the_installed_vllm_has_every_parser_that_the_catalog_and_the_templates_name() -> None:
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    # In a process of its own: importing vLLM takes half a minute on a busy machine and changes torch for what runs after it.
    code = (
        "import json; from vllm.reasoning import _REASONING_PARSERS_TO_REGISTER as reasoning;"
        "from vllm.tool_parsers import _TOOL_PARSERS_TO_REGISTER as tools; print(json.dumps([[*tools], [*reasoning]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    known_tools, known_reasoning = map(set, json.loads(done.stdout.splitlines()[-1]))

    tools = {model.tool_parser for model in models()} | {name for name, _, _ in _FORMATS}
    reasoning = {model.reasoning_parser for model in models()}
    assert tools - {""} <= known_tools
    assert reasoning - {""} <= known_reasoning
    assert len(tools) > 4
    assert len(reasoning) > 2


def test_base_models_have_no_parser_and_thinking_models_of_known_families_have_one() -> None:
    for model in models():
        if "base" in model.kinds:
            assert not model.tool_parser + model.reasoning_parser
        if model.family in {"qwen3", "deepseek-r1"}:
            assert bool(model.reasoning_parser) == ("thinking" in model.kinds), model.name
        elif "thinking" not in model.kinds:
            assert not model.reasoning_parser


@pytest.mark.parametrize(
    ("template", "tokens", "found"),
    [
        (HERMES, [], "hermes"),
        ("{{tools}}<tool_call><function=f><parameter=a>1</parameter></function></tool_call>", [], "qwen3_xml"),
        ("{{tools}}<tool_call>f<arg_key>a</arg_key></tool_call>", [], ""),
        ("{{tools}}[AVAILABLE_TOOLS][/AVAILABLE_TOOLS][TOOL_CALLS]", ["[TOOL_CALLS]"], "mistral"),
        ("{{tools}}[AVAILABLE_TOOLS][/AVAILABLE_TOOLS][TOOL_CALLS]", [], ""),
        ('{{tools}}<|start_header_id|>ipython<|eot_id|>{"name": "f", "parameters": {}}', [], "llama3_json"),
        ("<|tool|>{{tools}}<|/tool|>", [], "phi4_mini_json"),
        ("{{messages}}", [], ""),
        ("{{tools}}", [], ""),
        ("", [], ""),
    ],
)
def test_another_models_template_decides(tmp_path: Path, template: str, tokens: list[str], found: str) -> None:
    assert find_parsers("somebody/else", tokenizer(tmp_path, template, *tokens)) == (found, "")


def test_a_template_in_its_own_file_or_with_a_name_for_tools_is_read(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": HERMES}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert find_parsers("", tmp_path)[0] == "hermes"
    (tmp_path / "chat_template.jinja").write_text("plain")
    assert find_parsers("", tmp_path)[0] == ""


@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json", "probe.json", "chat_template.jinja"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"chat_template": [{"name": [], "template": 1}]}', None])
def test_a_damaged_file_of_a_model_is_left_to_the_engine(tmp_path: Path, file: str, content: str | None) -> None:
    folder = tokenizer(tmp_path, HERMES, "<think>")
    (folder / "probe.json").write_text(json.dumps({"rows": []}))
    (folder / file).unlink(missing_ok=True)
    if content is None:
        (folder / file).mkdir()
    else:
        (folder / file).write_text(content)
    with_parsers((), model_name="qwen3-0.6b", tokenizer_dir=folder, model_dir=folder)
    assert set(find_parsers("somebody/else", folder)) <= {"", "hermes"}


def test_the_catalog_decides_for_its_models_if_the_template_has_tools(tmp_path: Path) -> None:
    folder = tokenizer(tmp_path, HERMES, "<think>")
    assert find_parsers("qwen3-0.6b", folder) == ("hermes", "qwen3")
    assert find_parsers("qwen3-4b-instruct-2507", folder) == ("hermes", "")
    assert find_parsers("qwen3-0.6b", tokenizer(tmp_path, "no calls", "<think>")) == ("", "qwen3")


@pytest.mark.parametrize(("completion", "thinks"), [([1, 2], False), ([1, 101, 2], True)])
def test_a_model_tuned_on_answers_without_thoughts_gets_no_reasoning_parser(
    tmp_path: Path, completion: list[int], thinks: bool
) -> None:
    folder = tokenizer(tmp_path, HERMES, "<think>", "</think>")
    (folder / "probe.json").write_text(json.dumps({"rows": [{"completion_ids": completion}]}))
    found = with_parsers((), model_name="qwen3-0.6b", tokenizer_dir=folder, model_dir=folder)
    assert ("--reasoning-parser=qwen3" in found) == thinks
    assert "--tool-call-parser=hermes" in found


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), ("--tool-call-parser=hermes", "--enable-auto-tool-choice", "--reasoning-parser=qwen3")),
        (
            ("--tool_call_parser", "xlam"),
            ("--tool-call-parser=xlam", "--enable-auto-tool-choice", "--reasoning-parser=qwen3"),
        ),
        (
            ("--reasoning-parser=none", "--seed=1"),
            ("--seed=1", "--tool-call-parser=hermes", "--enable-auto-tool-choice"),
        ),
        (("--tool-call-parser=none", "--reasoning-parser=none"), ()),
        (
            ("--no-enable-auto-tool-choice", "--reasoning-parser=none"),
            ("--no-enable-auto-tool-choice", "--tool-call-parser=hermes"),
        ),
    ],
)
def test_what_the_user_gives_wins(tmp_path: Path, given: tuple[str, ...], expected: tuple[str, ...]) -> None:
    folder = tokenizer(tmp_path, HERMES, "<think>")
    assert with_parsers(given, model_name="qwen3-0.6b", tokenizer_dir=folder, model_dir=folder) == expected
