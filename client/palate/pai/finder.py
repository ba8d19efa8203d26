"""Implements `import pai` in one process: a finder, lazy modules, and attributes that raise with a remedy. Knows no job."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from palate.pai.names import ATTRIBUTES, MISSING, MISSING_MODULES, PROVIDED
from palate_recipes.errors import ConfigurationError, PaiAttributeError, PaiNameError


class PaiModule(ModuleType):
    """A module of PAI's SDK whose names are imported from Palate on first access."""

    def __getattr__(self, name: str) -> Any:
        module = self.__name__
        if f"{module}.{name}" in PROVIDED or f"{module}.{name}" in MISSING_MODULES:
            return import_module(f"{module}.{name}")
        if name in PROVIDED.get(module, {}):
            value = getattr(import_module(PROVIDED[module][name]), name)
            setattr(self, name, value)
            return value
        remedy = MISSING.get(module, {}).get(name)
        if remedy is None and not name.startswith("_"):  # the import system probes names with underscores
            remedy = MISSING_MODULES.get(module)
        if remedy is not None:
            # Not an AttributeError: `from … import` would replace its message, and the remedy would be lost.
            raise PaiNameError(f"{module}.{name} exists in PAI's SDK but not in Palate: {remedy}", name=module)
        raise AttributeError(f"module {module!r} (provided by Palate) has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *PROVIDED.get(self.__name__, {})})


class _Finder(MetaPathFinder, Loader):
    """Finds `pai` and its submodules before an installed package."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in PROVIDED or fullname in MISSING_MODULES:
            # All are packages with an empty path, so submodules that Palate does not define are never found elsewhere.
            return ModuleSpec(fullname, self, origin="palate.pai", is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return PaiModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__all__"] = sorted(PROVIDED.get(module.__name__, {}))


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
    for (module, owner), rows in ATTRIBUTES.items():
        kind = getattr(import_module(module), owner)
        for name, remedy in rows.items():
            if not hasattr(kind, name):
                setattr(kind, name, _Elsewhere(owner, name, remedy))


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
        kind = getattr(import_module(module), owner)
        for name in [name for name, value in vars(kind).items() if isinstance(value, _Elsewhere)]:
            delattr(kind, name)
