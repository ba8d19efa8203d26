"""Checks an example's Python against the real names and signatures without running it: imports, attributes, arguments, values."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import palate
from palate_recipes.catalog import find_model
from palate_recipes.errors import PalateError
from palate_recipes.hyperparameters import validate

OURS = ("palate", "palate_recipes", "palate_trainer", "palate_server")


@dataclass(frozen=True)
class Instance:
    """A value of which only the class is known."""

    kind: type


@dataclass(frozen=True)
class Method:
    """A method that is bound to a value."""

    function: Any
    bound: bool


CLASSES: dict[str, type] = {
    name: getattr(palate, name) for name in palate.__all__ if inspect.isclass(getattr(palate, name))
}
USUAL_NAMES = {"recipe": "ModelTrainingRecipe", "job": "TrainingJob", "predictor": "Predictor", "session": "Session"}
"""What a page may use without having made it."""


class Example:
    """The names that a page's blocks have defined so far, and what is wrong with them."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {name: Instance(CLASSES[kind]) for name, kind in USUAL_NAMES.items()}
        self.problems: list[str] = []
        self._seen: dict[ast.AST, Any] = {}

    def read(self, text: str) -> None:
        """Follows the statements of one block; what cannot be decided is passed over."""
        self._body(ast.parse(text).body)

    def _body(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Import):
            for name in node.names:
                module = self._module(name.name, node)
                if module is not None:
                    first = name.name.partition(".")[0]
                    self.known[name.asname or first] = module if name.asname else importlib.import_module(first)
        elif isinstance(node, ast.ImportFrom):
            module = self._module(node.module or "", node)
            for name in node.names if module is not None else ():
                value = self._member(module, name.name, node)
                if value is not None:
                    self.known[name.asname or name.name] = value
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            self._body(node.body)
        elif isinstance(node, ast.With | ast.AsyncWith):
            for item in node.items:
                self._bind(item.optional_vars, self._value(item.context_expr))
            self._body(node.body)
        elif isinstance(node, ast.Assign):
            value = self._value(node.value)
            for target in node.targets:
                self._bind(target, value)
        else:
            if isinstance(node, ast.For):
                self._bind(node.target, None)
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt):
                    self._statement(child)
                elif isinstance(child, ast.ExceptHandler):
                    self._body(child.body)
                elif isinstance(child, ast.expr):
                    self._value(child)

    def _bind(self, target: ast.expr | None, value: Any) -> None:
        for name in ast.walk(target) if target is not None else ():
            if isinstance(name, ast.Name):
                self.known.pop(name.id, None)  # a name that is bound anew is what it is bound to, or not known
        if isinstance(target, ast.Name) and value is not None:
            self.known[target.id] = value

    def _value(self, node: ast.expr) -> Any:
        """What an expression is: an object, an `Instance`, a `Method`, or None when that cannot be told."""
        if node in self._seen:
            return self._seen[node]
        value = None
        if isinstance(node, ast.Name):
            value = self.known.get(node.id)
        elif isinstance(node, ast.Await):
            value = self._value(node.value)
        elif isinstance(node, ast.Attribute):
            value = self._member(self._value(node.value), node.attr, node)
        elif isinstance(node, ast.Call):
            value = self._call(node)
        else:
            # Targets of comprehensions hide names of the page.
            targets = [part.target for part in getattr(node, "generators", ())]
            hidden = {one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)}
            kept = {name: self.known.pop(name) for name in hidden & self.known.keys()}
            for child in ast.walk(node):
                if child is not node and isinstance(child, ast.expr):
                    self._value(child)
            self.known.update(kept)
        self._seen[node] = value
        return value

    def _call(self, node: ast.Call) -> Any:
        function = self._value(node.func)
        for argument in (*node.args, *(word.value for word in node.keywords)):
            self._value(argument)
        if function is None or isinstance(function, Instance):
            return None
        called = function.function if isinstance(function, Method) else function
        if not getattr(called, "__module__", "").startswith(OURS):
            return None
        self._arguments(node, called, bound=isinstance(function, Method) and function.bound)
        if called is CLASSES["ModelTrainingRecipe"]:
            self._recipe(node)
        if inspect.isclass(called):
            return Instance(called)
        returned = str(getattr(called, "__annotations__", {}).get("return", ""))
        return Instance(CLASSES[returned]) if returned in CLASSES else None

    def _arguments(self, node: ast.Call, called: Any, *, bound: bool) -> None:
        signature = inspect.signature(called)
        elided = any(isinstance(one, ast.Constant) and one.value is ... for one in node.args)
        open_ended = elided or any(isinstance(one, ast.Starred) for one in node.args) or any(
            word.arg is None for word in node.keywords
        )  # fmt: skip
        positional = [None] * (bound + (0 if elided else sum(not isinstance(one, ast.Starred) for one in node.args)))
        words = {word.arg: None for word in node.keywords if word.arg is not None}
        try:
            (signature.bind_partial if open_ended else signature.bind)(*positional, **words)
        except TypeError as error:
            self._problem(node, f"{getattr(called, '__qualname__', called)}: {error}")

    def _recipe(self, node: ast.Call) -> None:
        given = {word.arg: word.value for word in node.keywords if word.arg is not None}
        try:
            name = given.get("model_name")
            if isinstance(name, ast.Constant) and "OWNER/NAME" not in str(name.value):  # for the reader to fill in
                find_model(str(name.value))
            if isinstance(values := given.get("hyperparameters"), ast.Dict) and not _holds_names(values):
                method = given.get("method")
                validate(
                    ast.literal_eval(values), method=method.value if isinstance(method, ast.Constant) else "LoRA_LLM"
                )
        except PalateError as error:
            self._problem(node, str(error))

    def _module(self, name: str, node: ast.stmt) -> ModuleType | None:
        if name.partition(".")[0] not in OURS:
            return None
        try:
            return importlib.import_module(name)
        except ImportError as error:
            self._problem(node, f"import {name}: {error}")
            return None

    def _member(self, owner: Any, name: str, node: ast.AST) -> Any:
        if isinstance(owner, ModuleType) and owner.__name__.startswith(OURS):
            try:
                return getattr(owner, name)
            except AttributeError:
                try:
                    return importlib.import_module(f"{owner.__name__}.{name}")
                except ImportError:
                    self._problem(node, f"{owner.__name__} has no {name!r}")
                    return None
        kind = owner.kind if isinstance(owner, Instance) else owner
        if not inspect.isclass(kind) or not kind.__module__.startswith(OURS):
            return None
        try:
            member = inspect.getattr_static(kind, name)
        except AttributeError:
            if not _sets(kind, name):
                self._problem(node, f"{kind.__name__} has no attribute {name!r}")
            return None
        if isinstance(member, classmethod):
            return Method(member.__func__, bound=True)
        if isinstance(member, staticmethod):
            return Method(member.__func__, bound=False)
        if isinstance(member, property):
            returned = str(getattr(member.fget, "__annotations__", {}).get("return", ""))
            return Instance(CLASSES[returned]) if returned in CLASSES else None
        return Method(member, bound=isinstance(owner, Instance)) if inspect.isfunction(member) else None

    def _problem(self, node: Any, words: str) -> None:
        self.problems.append(f"line {node.lineno} of the block: {words}")


def _sets(kind: type, name: str) -> bool:
    """Whether objects of a class have an attribute that its source sets or declares."""
    return any(
        re.search(rf"\bself\.{name}\b.*=|^    {name}:", inspect.getsource(one), re.MULTILINE)
        for one in kind.__mro__
        if one.__module__.startswith(OURS)
    )


def _holds_names(node: ast.AST) -> bool:
    return any(isinstance(one, ast.Name | ast.Call | ast.JoinedStr) for one in ast.walk(node))
