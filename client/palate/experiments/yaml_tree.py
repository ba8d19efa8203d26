"""Reads a YAML text as a tree that knows its lines. Knows YAML, no setting.

Scalars are those of YAML 1.2: `no` and `off` are texts, and `5e-6` is a number, unlike in PyYAML. Aliases and merge keys work, within a
limit of nodes: a kilobyte of aliases could expand to gigabytes. Tags, duplicate keys and deep nesting are rejected.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate_recipes.errors import ConfigurationError, MissingDependencyError
from palate_recipes.text import expand_path, show_path

LARGEST = 256 << 10
"""Size limit in bytes: PyYAML reads 100 kB per second."""
_DEEPEST = 24
_MOST_NODES = 20_000
"""Nodes after aliases are expanded."""

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]{1,30}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,4})?")


@dataclass(frozen=True)
class Node:
    """A value and its place.

    Attributes:
        value: A dict of nodes by key, a list of nodes, or a str, int, float, bool or None.
        line: Line in the file, from 1.
        is_shared: It has an anchor, so that other places can refer to it.
        is_used: An alias or a merge key refers to it.
    """

    value: Any
    line: int
    is_shared: bool = False
    is_used: bool = False

    @property
    def plain(self) -> Any:
        """The value without lines."""
        if isinstance(self.value, dict):
            return {key: node.plain for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain for node in self.value]
        return self.value


def read_tree(path: str | Path) -> Node:
    """Reads a YAML file whose top level is a mapping.

    Raises:
        ConfigurationError: The file is missing, too large or not valid; the message has the line.
        MissingDependencyError: PyYAML is not installed.
    """
    try:
        with Path(expand_path(path)).open("rb") as file:
            data = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise ConfigurationError(f"experiment file {show_path(path)} does not exist: check the path") from None
    except ValueError as error:
        raise ConfigurationError(f"experiment file {show_path(path)} {error}") from None
    except OSError as error:
        raise ConfigurationError(f"experiment file {path} cannot be read: {error.strerror or error}") from None
    if len(data) > LARGEST:
        raise ConfigurationError(
            f"experiment file {path} is larger than the limit of {LARGEST:,} bytes: keep data in files of its own"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"experiment file {path} is not UTF-8: {error}. Save it as UTF-8") from None
    return parse_tree(text, str(path))


def parse_tree(text: str, name: str) -> Node:
    """Parses a YAML text. `name` is the file's name in messages. Raises as `read_tree`."""
    try:
        import yaml
    except ImportError:
        raise MissingDependencyError(
            "experiment files need PyYAML, which is not installed: pip install 'palate[data]'"
        ) from None

    def refuse(line: int, what: str) -> ConfigurationError:
        return ConfigurationError(f"{name}:{line}: {what}")

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def __init__(self, stream: str) -> None:
            super().__init__(stream)
            self.depth = 0
            self.shared: set[int] = set()
            self.used: set[int] = set()

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            line = event.start_mark.line + 1
            if self.check_event(yaml.AliasEvent):
                if event.anchor not in self.anchors:
                    raise refuse(
                        line, f"alias *{event.anchor} has no anchor above it: add &{event.anchor} to its target"
                    )
                node = super().compose_node(parent, index)
                self.used.add(id(node))
                return node
            if getattr(event, "tag", None) not in (None, "!"):
                raise refuse(line, f"tag {str(event.tag)[:60]!r} is not supported: write a plain value")
            if self.depth >= _DEEPEST:
                raise refuse(line, f"nested more than {_DEEPEST} levels deep: flatten it")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            if getattr(event, "anchor", None):
                self.shared.add(id(node))
            return node

    count = 0
    loader = Loader("")

    def build(node: Any, within: tuple[int, ...] = ()) -> Node:
        nonlocal count
        count += 1
        line = node.start_mark.line + 1
        if count > _MOST_NODES:
            raise refuse(line, f"has more than {_MOST_NODES:,} values with its aliases expanded: split the file")
        if id(node) in within:
            raise refuse(line, "contains itself through an alias: write the value out")
        value: Any
        if isinstance(node, yaml.ScalarNode):
            value = _scalar(node.value) if node.style is None else node.value
        elif isinstance(node, yaml.SequenceNode):
            value = [build(item, (*within, id(node))) for item in node.value]
        else:
            value = mapping(node, (*within, id(node)))
        return Node(value, line, id(node) in loader.shared, id(node) in loader.used)

    def mapping(node: Any, within: tuple[int, ...]) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key, item in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise refuse(line, "a key is a list or a mapping: use a text as key")
            if key.value == "<<" and key.style is None:
                sources = item.value if isinstance(item, yaml.SequenceNode) else [item]
                for source in sources:
                    if not isinstance(source, yaml.MappingNode):
                        raise refuse(line, "<< merges mappings only: give an alias of a mapping")
                    merged = {**build(source, within).value, **merged}
                    loader.used.add(id(source))
                continue
            if key.value in own:
                raise refuse(line, f"key {key.value[:60]!r} is also in line {own[key.value].line}: remove one of them")
            own[key.value] = build(item, within)
        return {**merged, **own}

    try:
        loader = Loader(text)
        root = loader.get_single_node()
        if root is None or not isinstance(root, yaml.MappingNode):
            raise refuse(1, "expected experiments by id: `my_experiment:` and its settings, indented, below it")
        return build(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        raise refuse(mark.line + 1 if mark else 1, f"is not valid YAML: {said[:300]}") from None
    except RecursionError:
        raise refuse(1, "nested too deeply: flatten its lists and mappings") from None
    except yaml.YAMLError as error:
        raise refuse(1, f"is not valid YAML: {' '.join(str(error).split())[:300]}") from None


def _scalar(text: str) -> Any:
    """Returns the value of an unquoted scalar, by the core schema of YAML 1.2."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text
