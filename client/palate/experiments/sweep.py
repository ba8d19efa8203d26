"""Expands sweeps: which values of a file's hyperparameters are alternatives, and the runs that follow. Knows the schema, no file.

    learning_rate: [1e-5, 1e-4]                     a grid: one run for each, and for each combination with other lists
    _: [{lora_dim: 8, lora_alpha: 16}, {…}]         pairs: one run for each mapping (axolotl's form); `_NAME` is a further group
    learning_rate: {min: 1e-6, max: 1e-3, log: true}    a range of a search

A list is one value where the schema's type is a list (`target_modules`, `loss_type`, `loss_weights`): a list of lists sweeps over it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from palate.experiments.yaml_tree import Node
from palate_recipes.hyperparameters import HYPERPARAMETERS

MOST_RUNS = 1000
_LISTS = ("modules", "names", "numbers")
_RANGE_KEYS = ("min", "max", "log", "step")


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers that a search chooses from.

    Attributes:
        low, high: Bounds, inclusive.
        is_log: Whether it searches evenly in the logarithm.
        step: Distance of the values; None for any.
        is_int: Whether they are whole numbers.
    """

    low: float
    high: float
    is_log: bool = False
    step: float | None = None
    is_int: bool = False


@dataclass(kw_only=True)
class Axes:
    """What a sweep varies.

    Attributes:
        fixed: Values that all runs have.
        lists: Alternatives by name.
        groups: Groups of alternatives that are varied together: by key, mappings of names to values.
        ranges: Ranges by name.
        lines: Line of each name, for messages.
    """

    fixed: dict[str, Any] = field(default_factory=dict)
    lists: dict[str, list[Any]] = field(default_factory=dict)
    groups: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    ranges: dict[str, Range] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    @property
    def is_sweep(self) -> bool:
        return bool(self.lists or self.groups or self.ranges)

    def combinations(self) -> Iterator[dict[str, Any]]:
        """Yields what each run of the grid has of its own, in the file's order."""
        alternatives = [[{name: value} for value in values] for name, values in self.lists.items()]
        alternatives += self.groups.values()
        for chosen in product(*alternatives):
            yield {name: value for part in chosen for name, value in part.items()}

    def sample(self, count: int) -> Iterator[dict[str, Any]]:
        """Yields combinations drawn at random, always the same ones."""
        draw = random.Random(0)
        alternatives = [[{name: value} for value in values] for name, values in self.lists.items()]
        alternatives += self.groups.values()
        for _ in range(count):
            yield {name: value for values in alternatives for name, value in draw.choice(values).items()}

    @property
    def size(self) -> int:
        size = 1
        for values in (*self.lists.values(), *self.groups.values()):
            size *= len(values)
        return size


class SweepError(ValueError):
    """A hyperparameter cannot be read: its line and what is wrong."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line = line


def add_axis(axes: Axes, name: str, node: Node) -> str:
    """Adds a hyperparameter to the axes.

    Args:
        axes: Changed in place.
        name: A name of the schema, or `_…` for a group.
        node: Its value.

    Returns:
        A warning, or "".

    Raises:
        SweepError: The value is no valid sweep.
    """
    if name.startswith("_"):
        axes.groups[name] = _group(name, node)
        axes.lines[name] = node.line
        return ""
    axes.lines[name] = node.line
    row = HYPERPARAMETERS.get(name)
    kind = row.type if row else ""
    if isinstance(node.value, dict):
        axes.ranges[name] = _range(name, node, kind)
        return ""
    if not isinstance(node.value, list):
        axes.fixed[name] = node.plain
        return ""
    is_one_value = kind in _LISTS and not any(isinstance(item.value, list) for item in node.value)
    if is_one_value:
        axes.fixed[name] = node.plain
        if kind == "names" and len(node.value) > 1:
            shown = ", ".join(f"[{item.plain}]" for item in node.value[:4])
            return f"{name} is one value: its losses are summed. To sweep over them write a list of lists: [{shown}]"
        return ""
    if not node.value:
        raise SweepError(node.line, f"{name} = []: an empty list has no value to try; omit the line")
    values = node.plain
    if repeated := [value for at, value in enumerate(values) if value in values[:at]]:
        raise SweepError(node.line, f"{name}: {repeated[0]!r} is in the list twice; remove one of them")
    axes.lists[name] = values
    return ""


def _group(name: str, node: Node) -> list[dict[str, Any]]:
    form = f"{name}: expected a list of mappings, such as `- {{lora_dim: 8, lora_alpha: 16}}`"
    if not isinstance(node.value, list) or not node.value:
        raise SweepError(node.line, form)
    for item in node.value:
        if not isinstance(item.value, dict) or not item.value:
            raise SweepError(item.line, form)
        if item.value.keys() != node.value[0].value.keys():
            raise SweepError(
                item.line,
                f"{name}: has {', '.join(item.value)}, but the first mapping has {', '.join(node.value[0].value)}; give each "
                "mapping the same names",
            )
    return [item.plain for item in node.value]


def _range(name: str, node: Node, kind: str) -> Range:
    form = f"{name}: expected a number or {{min: …, max: …}} with log: true or step: …"
    if kind not in ("int", "float"):
        raise SweepError(node.line, f"{name} = {node.plain!r}: only numbers have ranges; give a list of values")
    values = node.plain
    if unknown := [key for key in values if key not in _RANGE_KEYS]:
        raise SweepError(node.line, f"{form}; {unknown[0]!r} is not one of {', '.join(_RANGE_KEYS)}")
    row = HYPERPARAMETERS[name]
    bounds = {}
    for key in ("min", "max"):
        try:
            bounds[key] = row.parse(values.get(key))
        except ValueError as error:
            raise SweepError(node.line, f"{name}: {key} = {values.get(key)!r} {error}") from None
    log, step = values.get("log", False), values.get("step")
    if not isinstance(log, bool):
        raise SweepError(node.line, f"{name}: log = {log!r}: expected true or false")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int | float) or not step > 0):
        raise SweepError(node.line, f"{name}: step = {step!r}: expected a number above 0")
    if kind == "int" and step is not None and not float(step).is_integer():
        raise SweepError(node.line, f"{name}: step = {step!r}: expected a whole number, as {name} is one")
    if not bounds["min"] < bounds["max"]:
        raise SweepError(node.line, f"{name}: min = {bounds['min']!r} must be below max = {bounds['max']!r}")
    if log and (bounds["min"] <= 0 or step is not None):
        raise SweepError(node.line, f"{name}: log: true needs min above 0 and no step")
    return Range(low=bounds["min"], high=bounds["max"], is_log=log, step=step, is_int=kind == "int")


def clashes(axes: Axes) -> list[tuple[int, str]]:
    """Returns line and message for each name that is set in two places of the sweep."""
    found = []
    places = dict.fromkeys((*axes.fixed, *axes.lists, *axes.ranges), "hyperparameters")
    for key, group in axes.groups.items():
        for name in group[0]:
            if name in places:
                found.append((axes.lines[key], f"{name} is in {key} and in {places[name]}: set it in one of them"))
            places[name] = key
    return found


def describe(varied: Mapping[str, Any]) -> str:
    """Returns what a run has of its own, for a line: `learning_rate=1e-05 lora_dim=8`."""
    return " ".join(f"{name}={value}" for name, value in varied.items())
