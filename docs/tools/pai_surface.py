"""Lists the public names, parameters and attributes of PAI's SDK, which `palate.pai` answers for. Facts only: no code, no text.

Needs only the standard library and the package `alipai`, in an environment of its own: alipai requires numpy < 2.

    python docs/tools/pai_surface.py write    # after a new release of alipai
    python docs/tools/pai_surface.py check    # in CI: whether the table is that of the installed package
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

TABLE = Path(__file__).parents[2] / "client" / "palate" / "pai" / "surface.json"

GENERATED = "pai.libs"
"""Alibaba's generated API clients, thousands of classes: the table has only the package's name."""

CLASSES = {
    "ModelTrainingRecipe": "pai.model",
    "RegisteredModel": "pai.model",
    "TrainingJob": "pai.job",
    "Predictor": "pai.predictor",
    "Session": "pai.session",
}
"""The classes that Palate has too, and whose members the table lists."""

FORWARDED = {
    "Session": [],
    "setup_default_session": ["pai.session.Session.__init__"],
    "ModelTrainingRecipe": ["pai.model.ModelRecipe.__init__"],
    "ModelTrainingRecipe.deploy": ["pai.model.Model.deploy", "pai.model._model.ModelBase._deploy"],
    "RegisteredModel": [],
    "RegisteredModel.deploy": ["pai.model._model.ModelBase._deploy"],
    "Predictor.openai": [],
    "Predictor.raw_predict": ["pai.predictor.Predictor._send_request", "requests.Session.request"],
}
"""The callables of Palate's that take `**kwargs` in PAI's SDK, and the functions that these are passed to, one after the other."""


def surface() -> dict[str, Any]:
    """Returns modules with their names, functions with their parameters, and classes with their members."""
    root = importlib.import_module("pai")
    names = ["pai", *sorted(info.name for info in pkgutil.walk_packages(root.__path__, "pai.", onerror=fail))]
    modules = {
        name: importlib.import_module(name) for name in names if name == GENERATED or not name.startswith(GENERATED)
    }
    functions = {
        f"{name}.{function}": parameters(value)
        for name, module in modules.items()
        for function, value in sorted(vars(module).items())
        if inspect.isfunction(value) and value.__module__ == name and not function.startswith("_")
    }
    return {
        "version": version("alipai"),
        "modules": {name: public_names(module) for name, module in modules.items()},
        "functions": functions,
        "classes": {name: members(getattr(modules[module], name)) for name, module in sorted(CLASSES.items())},
        "keywords": {name: keywords(name, receivers) for name, receivers in sorted(FORWARDED.items())},
    }


def fail(name: str) -> None:
    raise ImportError(f"{name} cannot be imported: the table would lack its names")


def public_names(module: ModuleType) -> list[str]:
    """The names that the module defines, and those that a package takes from its own modules."""
    tree = ast.parse(Path(str(module.__file__)).read_text())  # inspect has no source for an empty file
    found = {*getattr(module, "__all__", ())}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.ImportFrom) and node.level and hasattr(module, "__path__"):
            found |= {name.asname or name.name for name in node.names}
    return sorted(name for name in found if not name.startswith("_") or name == "__version__")


def members(kind: type) -> dict[str, list[list[Any]] | None]:
    """Public members by name: parameters of a method, None for any other. Those of pydantic and object are left out."""
    found: dict[str, list[list[Any]] | None] = {}
    for base in [base for base in reversed(kind.__mro__) if base.__module__.startswith("pai.")]:
        for name in (*vars(base), *vars(base).get("__annotations__", {}), *assigned(base)):
            if not name.startswith("_") and name not in ("model_config", "model_fields", "model_computed_fields"):
                value = inspect.getattr_static(kind, name, None)
                found[name] = parameters(getattr(kind, name)) if is_method(value) else None
    if inspect.isfunction(
        constructor := inspect.getattr_static(kind, "__init__")
    ) and constructor.__module__.startswith("pai."):
        found["__init__"] = parameters(constructor)[1:]
    for name, value in found.items():
        if name != "__init__" and value and value[0][0] == "self":
            found[name] = value[1:]
    return dict(sorted(found.items()))


def is_method(value: object) -> bool:
    return inspect.isfunction(value) or isinstance(value, classmethod | staticmethod)


def assigned(kind: type) -> list[str]:
    """Attributes that the methods of the class set on the instance."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    return [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    ]


def parameters(function: Any) -> list[list[Any]]:
    """Name, kind, and whether there is a default."""
    return [
        [item.name, item.kind.name, item.default is not item.empty]
        for item in inspect.signature(function).parameters.values()
    ]


def keywords(name: str, receivers: list[str]) -> list[str]:
    """Names that a callable takes through `**kwargs`: it removes them, or passes them on to a parameter that it does not set."""
    owner, _, method = name.partition(".")
    path = f"{CLASSES[owner]}.{owner}.{method or '__init__'}" if owner in CLASSES else f"pai.session.{name}"
    found: set[str] = set()
    given: set[str] = set()
    chain = [located(step) for step in (path, *receivers)]
    for function in chain:
        own = {item[0] for item in parameters(function) if not item[1].startswith("VAR_")}
        found |= (own - given) | removed(function)
        given |= own | passed(function)
    return sorted(found - {"self", *(item[0] for item in parameters(chain[0]))})


def located(path: str) -> Any:
    """The function or method with this full name."""
    value: Any = None
    for part in path.split("."):
        value = getattr(value, part, None) or importlib.import_module(f"{value.__name__}.{part}" if value else part)
    return value


def removed(function: Any) -> set[str]:
    """Names that the function takes out of its `kwargs`."""
    return {
        node.args[0].value
        for node in calls(function)
        if isinstance(node.func, ast.Attribute)
        and node.func.attr == "pop"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "kwargs"
        and isinstance(node.args[0], ast.Constant)
    }


def passed(function: Any) -> set[str]:
    """Names that the function sets itself in its calls with `**kwargs`."""
    return {
        word.arg
        for node in calls(function)
        if any(
            word.arg is None and isinstance(word.value, ast.Name) and word.value.id == "kwargs"
            for word in node.keywords
        )
        for word in node.keywords
        if word.arg is not None
    }


def calls(function: Any) -> list[ast.Call]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def as_text(table: dict[str, Any]) -> str:
    """JSON with one module, function or member in a line, so that a new release makes a readable difference."""
    text = json.dumps(table, indent=1, sort_keys=True)
    lines = [f' "version": {json.dumps(table["version"])}']
    for part in ("modules", "functions", "keywords"):
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in table[part].items())
        lines.append(f' "{part}": {{\n{rows}\n }}')
    classes = []
    for name, rows in table["classes"].items():
        body = ",\n".join(f"   {json.dumps(member)}: {json.dumps(value)}" for member, value in rows.items())
        classes.append(f"  {json.dumps(name)}: {{\n{body}\n  }}")
    lines.append(' "classes": {\n' + ",\n".join(classes) + "\n }")
    written = "{\n" + ",\n".join(lines) + "\n}\n"
    assert json.dumps(json.loads(written), indent=1, sort_keys=True) == text
    return written


def main() -> int:
    if sys.argv[1:] not in (["write"], ["check"]):
        print(__doc__, file=sys.stderr)
        return 2
    text = as_text(surface())
    if sys.argv[1] == "write":
        TABLE.write_text(text)
    elif TABLE.read_text() != text:
        print(f"{TABLE.name} is not the surface of alipai {version('alipai')}: write it anew", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
