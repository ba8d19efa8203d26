"""`import pai` in a process that asked for it: which names it gives, and what it says for those that it does not."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import palate.pai
from palate.errors import ConfigurationError, PalateError
from palate.pai.names import ATTRIBUTES, MISSING, MISSING_MODULES, PROVIDED, REST
from palate_recipes.errors import PaiAttributeError, PaiNameError


@pytest.fixture
def installed() -> Iterator[None]:
    palate.pai.load_ipython_extension(None)
    importlib.import_module("pai")
    yield
    palate.pai.unload_ipython_extension(None)


def test_every_name_is_palates_own(installed: None) -> None:
    for module, names in PROVIDED.items():
        provided = importlib.import_module(module)
        assert provided.__all__ == sorted(names)
        for name, home in names.items():
            assert getattr(provided, name) is getattr(importlib.import_module(home), name)
            assert name in dir(provided)


@pytest.mark.parametrize("module", sorted({*MISSING, *MISSING_MODULES}))
def test_a_name_that_only_pai_has_says_what_to_use(installed: None, module: str) -> None:
    rows = MISSING.get(module, {})
    if module not in PROVIDED:
        rows = {**rows, "Anything": MISSING_MODULES[module]}
    for name, remedy in rows.items():
        scope: dict[str, object] = {}
        with pytest.raises(PaiNameError, match="not in Palate") as caught:
            exec(f"from {module} import {name}", scope)
        assert str(caught.value) == f"{module}.{name} exists in PAI's SDK but not in Palate: {remedy}"
        with pytest.raises(ImportError):  # what a script may catch
            exec(f"import {module}; {module}.{name}", scope)
        assert name not in PROVIDED.get(module, {})


def test_an_attribute_that_only_pais_classes_have_says_what_to_use(installed: None) -> None:
    for (module, owner), rows in ATTRIBUTES.items():
        kind = getattr(importlib.import_module(module), owner)
        for name, remedy in rows.items():
            if name == REST:
                continue
            assert not hasattr(kind, name)
            with pytest.raises(PaiAttributeError) as caught:
                getattr(kind, name)
            assert str(caught.value) == f"{owner}.{name} exists in PAI's SDK but not in Palate: {remedy}"
            assert isinstance(caught.value, PalateError)


def test_a_name_that_nobody_has_fails_as_python_says_it(installed: None) -> None:
    scope: dict[str, object] = {}
    with pytest.raises(ImportError, match=r"cannot import name 'Modle' from 'pai\.model'"):
        exec("from pai.model import Modle", scope)
    with pytest.raises(ModuleNotFoundError, match=r"pai\.nothing"):
        exec("import pai.nothing", scope)


def test_submodules_are_reached_from_the_root(installed: None) -> None:
    scope: dict[str, object] = {}
    exec("import pai\nlength = len(pai.common.utils.random_str(6))\nfrom pai.model import *", scope)
    assert scope["length"] == 6
    assert scope["ModelTrainingRecipe"] is importlib.import_module("palate.model").ModelTrainingRecipe


def test_installing_twice_is_once_and_uninstalling_leaves_nothing() -> None:
    finders = list(sys.meta_path)
    palate.pai.install()
    palate.pai.install()
    assert len(sys.meta_path) == len(finders) + 1
    importlib.import_module("pai.session")
    palate.pai.uninstall()
    palate.pai.uninstall()
    assert sys.meta_path == finders
    assert [name for name in sys.modules if name.partition(".")[0] == "pai"] == []
    for (module, owner), rows in ATTRIBUTES.items():
        assert rows.keys().isdisjoint(vars(getattr(importlib.import_module(module), owner)))


def test_pais_own_sdk_imported_before_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pai").mkdir()
    (tmp_path / "pai" / "__init__.py").write_text("OWN = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    theirs = importlib.import_module("pai")
    try:
        with pytest.raises(ConfigurationError, match=r"already imported.*restart"):
            palate.pai.install()
        assert sys.modules["pai"] is theirs
    finally:
        del sys.modules["pai"]
