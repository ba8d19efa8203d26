"""Implements `import pai` in one process: a finder, lazy modules, and attributes that raise with a remedy. Knows no job."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from palate.pai.names import ATTRIBUTES, MISSING, MISSING_MODULES, PROVIDED, REST
from palate_recipes.errors import ConfigurationError, PaiAttributeError, PaiNameError


@cache
def surface() -> dict[str, Any]:
    """Returns all names of PAI's SDK: modules, parameters of functions, members of classes. See docs/tools/pai_surface.py."""
    table: dict[str, Any] = json.loads((Path(__file__).parent / "surface.json").read_text())
    return table


def _has_module(module: str) -> bool:
    # Of the generated clients in pai.libs the table has only the first name.
    return (
        module in PROVIDED
        or module in MISSING_MODULES
        or module in surface()["modules"]
        or module.startswith("pai.libs.")
    )


def _public(module: str) -> str:
    """Returns the package whose names a private module holds, such as `pai.job` for `pai.job._training_job`."""
    return module.partition("._")[0]


def _remedy(module: str, name: str) -> str | None:
    """Returns what to use in place of a name, or None if PAI's SDK does not have it either."""
    home = _public(module)
    if remedy := MISSING.get(home, {}).get(name):
        return remedy
    if name.startswith("_"):  # the import system probes such names
        return None
    if home in PROVIDED and name not in surface()["modules"].get(module, ()):
        return None
    while home not in MISSING_MODULES and "." in home:
        home = home.rpartition(".")[0]
    return MISSING_MODULES.get(home)


class PaiModule(ModuleType):
    """A module of PAI's SDK whose names are imported from Palate on first access."""

    def __getattr__(self, name: str) -> Any:
        module = self.__name__
        if _has_module(f"{module}.{name}") and not module.startswith("pai.libs"):
            return import_module(f"{module}.{name}")
        provided = PROVIDED.get(_public(module), {})
        if name in provided:
            value = getattr(import_module(provided[name]), name)
            setattr(self, name, value)
            return value
        if (remedy := _remedy(module, name)) is not None:
            # Not an AttributeError: `from … import` would replace its message, and the remedy would be lost.
            raise PaiNameError(f"{module}.{name} exists in PAI's SDK but not in Palate: {remedy}", name=module)
        raise AttributeError(f"module {module!r} (provided by Palate) has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *PROVIDED.get(_public(self.__name__), {})})


class _Finder(MetaPathFinder, Loader):
    """Finds `pai` and its submodules before an installed package."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] == "pai" and _has_module(fullname):
            # All are packages with an empty path, so submodules that Palate does not define are never found elsewhere.
            return ModuleSpec(fullname, self, origin="palate.pai", is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return PaiModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__all__"] = sorted(PROVIDED.get(_public(module.__name__), {}))
        if module.__name__ == "pai":
            _add_attributes()  # only now: a script that never imports pai need not load the classes


class _Elsewhere:
    """An attribute of PAI's class that Palate does not have. Reading it raises with a remedy."""

    def __init__(self, owner: str, name: str, remedy: str) -> None:
        self._message = f"{owner}.{name} exists in PAI's SDK but not in Palate: {remedy}"

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise PaiAttributeError(self._message)


_finder: _Finder | None = None


def install() -> None:
    """Makes `import pai` import Palate in this process. An installed `pai` is neither imported nor changed. Idempotent.

    Raises:
        ConfigurationError: PAI's own SDK is already imported in this process.
    """
    global _finder
    if _finder is not None:
        return
    if "pai" in sys.modules:
        place = getattr(sys.modules["pai"], "__file__", None) or "this process"
        raise ConfigurationError(
            f"PAI's own SDK is already imported ({place}): restart the process or kernel and call palate.pai.install() first"
        )
    _finder = _Finder()
    sys.meta_path.insert(0, _finder)


def _add_attributes() -> None:
    """Gives Palate's classes the attributes that only PAI's have. An attribute of an instance takes precedence."""
    for (module, owner), rows in ATTRIBUTES.items():
        kind = getattr(import_module(module), owner)
        for name in {*rows, *surface()["classes"][owner]} - {REST}:
            if not hasattr(kind, name):
                setattr(kind, name, _Elsewhere(owner, name, rows.get(name, rows[REST])))


def uninstall() -> None:
    """Reverts `install`. Names that were imported before stay Palate's."""
    global _finder
    if _finder is None:
        return
    sys.meta_path.remove(_finder)
    _finder = None
    for name in [name for name, module in sys.modules.items() if isinstance(module, PaiModule)]:
        del sys.modules[name]
    for module, owner in ATTRIBUTES:
        if module not in sys.modules:
            continue  # pai was never imported
        kind = getattr(import_module(module), owner)
        for name in [name for name, value in vars(kind).items() if isinstance(value, _Elsewhere)]:
            delattr(kind, name)
