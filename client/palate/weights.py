"""Finds the weights of a base model, downloads them to this machine's cache, and replaces large models by small ones for tests.

The client finds and checks a source, the manifest records it, and the runner downloads it, once per machine: two processes that
need the same weights wait for one download, and a failed download leaves nothing behind.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate.backends import Backend
from palate.env_file import without_credentials
from palate.paths import palate_home
from palate.session import Session
from palate.sources.hub import connect
from palate.sources.hub_model import HubModel, find_on_hub, hub_model
from palate.store import open_store
from palate.ui import note
from palate_recipes.catalog import Model, check_provider, find_model
from palate_recipes.errors import ConfigurationError, PalateError, UnknownModelError, WeightsError
from palate_recipes.specs.weights import BaseModel, WeightsSource
from palate_recipes.text import expand_path, show_path

_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_IGNORED_ON_HUB = ["*.pt", "*.pth", "*.gguf", "*.onnx", "original/*", "onnx/*", "*.msgpack", "*.h5", "*.tflite"]


def find_weights(
    session: Session, *, model_name: str | None, model_uri: str | None, model_version: str | None = None
) -> tuple[WeightsSource, Model | None]:
    """Finds the source of the weights. Fails early if they cannot be there.

    Args:
        session: For URIs of object stores.
        model_name: A name of the catalog, or a hub id (`OWNER/NAME`, `hf://OWNER/NAME[@revision]`).
        model_uri: A folder, object-store URI or `hf://` URI. Overrides the catalog's source.
        model_version: Hub revision (branch, tag or commit).

    Returns:
        The source, and the catalog row if `model_name` has one. A hub model that is not in the catalog, or given as URI, is
        pinned to its commit.

    Raises:
        UnknownModelError: The name is neither in the catalog nor on the hub, and no URI is given.
        StoreError: The hub refuses access to a model that is not in the catalog, or does not respond.
        ConfigurationError: Neither is given, or the folder has no usable model.
    """
    if model_uri and model_uri.startswith("hf://"):
        row = find_row(model_name) if model_name else None
        return _from_hub_id(model_uri, model_version), row
    if model_uri and model_version:
        raise ConfigurationError(
            f"model_version={model_version!r} is a revision on the Hub, and model_uri={model_uri!r} another source: give one of them"
        )
    if model_uri:
        row = find_model(model_name) if model_name else None
        return _from_uri(session, model_uri), row
    if not model_name:
        raise ConfigurationError(
            "no model given: set model_name= (`palate models` lists them) or model_uri= (any folder)"
        )
    model = find_row(model_name)
    if model is None:
        return _from_hub_id(model_name, model_version), None
    model_version = one_revision(model_name, model_version)
    if model.package and not model_version:
        from importlib.metadata import PackageNotFoundError, version

        try:
            return WeightsSource(kind="package", location=model.package, revision=version(model.package)), model
        except PackageNotFoundError:
            pass
    return WeightsSource(kind="hub", location=model.hub_id, revision=model_version or ""), model


def find_row(name: str, *, provider: str | None = None) -> Model | None:
    """Returns the catalog row of a model, or None for the id of another hub model, which is not looked up.

    Raises:
        UnknownModelError: The name is neither in the catalog nor a hub id, or its publisher is not `provider`.
    """
    found = hub_model(name)
    if found is None:
        return find_model(name, provider=provider)
    try:
        find_model(found.repo)
    except UnknownModelError:
        check_provider(found.repo, found.repo.partition("/")[0], provider)
        return None
    return find_model(found.repo, provider=provider)


def one_revision(name: str, version: str | None) -> str | None:
    """Returns the revision of a model from `name@revision` or `version`. Raises ConfigurationError if they differ."""
    found = hub_model(name)
    given = found.revision if found else None
    if version and given and version != given:
        raise ConfigurationError(f"{name!r} has a revision, and model_version={version!r} is another: give one of them")
    return version or given


def base_model(name: str, source: WeightsSource, row: Model | None) -> BaseModel:
    """Returns the model of a run. What comes from the hub has the id that it comes from."""
    return BaseModel(
        name=name, source=source, hub_id=source.location if source.kind == "hub" else row.hub_id if row else None
    )


def _from_hub_id(text: str, version: str | None) -> WeightsSource:
    found = hub_model(text)
    assert found is not None, "the callers ask for hub ids only"
    if os.path.isdir(text):
        raise ConfigurationError(f"model_name={text!r} is a folder: set model_uri={text!r} instead")
    source, names = find_on_hub(HubModel(found.repo, one_revision(text, version)))
    check_model_files(str(found), names)
    return source


def _from_uri(session: Session, uri: str) -> WeightsSource:
    if "://" in uri and not uri.startswith("file://"):
        store = open_store(uri, options=session.options_for(uri))
        sizes = {info.key.lstrip("/"): info.size for info in store.list("")}
        check_model_files(uri, set(sizes))
        weights = sum(size for key, size in sizes.items() if key.endswith(_WEIGHT_SUFFIXES))
        return WeightsSource(kind="store", location=uri, size_bytes=weights)
    try:
        folder = Path(expand_path(uri.removeprefix("file://"))).absolute()
    except ValueError as error:
        raise ConfigurationError(f"model_uri={show_path(uri)} {error}") from None
    if not os.path.isdir(folder):  # Path.is_dir() raises for a name that is too long
        raise ConfigurationError(
            f"model_uri={uri!r} is not a folder on this machine: give a folder with config, weights and tokenizer"
        )
    check_model_files(str(folder), {entry.name for entry in folder.iterdir()})
    size = sum(entry.stat().st_size for entry in folder.iterdir() if entry.suffix in _WEIGHT_SUFFIXES)
    return WeightsSource(kind="folder", location=str(folder), size_bytes=size)


def check_model_files(where: str, names: set[str]) -> None:
    """Raises ConfigurationError unless `names` include config, weights and tokenizer of a model."""
    missing = []
    if "config.json" not in names:
        missing.append("config.json")
    if not any(name.endswith(_WEIGHT_SUFFIXES) and not name.startswith("adapter_") for name in names):
        missing.append("weights (*.safetensors)")
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model"}:
        missing.append("tokenizer (tokenizer.json)")
    if missing:
        adapter = (
            " It looks like a LoRA adapter: give its base model instead." if "adapter_config.json" in names else ""
        )
        raise ConfigurationError(
            f"{where} is not a complete model folder: {', '.join(missing)} missing.{adapter} "
            "save_pretrained() of model and tokenizer writes all of these"
        )


def config_at_hand(source: WeightsSource, session: Session) -> dict[str, Any] | None:
    """Returns the config.json of weights, or None if it is not on this machine, in a store, or cannot be read. Downloads no weights."""
    with suppress(PalateError, OSError, ValueError):
        text: bytes | None = None
        if source.kind == "folder":
            text = (Path(source.location) / "config.json").read_bytes()
        elif source.kind == "store":
            text = open_store(source.location, options=session.options_for(source.location)).get("config.json")
        elif source.kind == "package":
            text = (palate_home() / "cache" / "models" / _cache_key(source) / "config.json").read_bytes()
        else:
            _, hub, _, kept, _ = connect(source.location, repo_type="model")
            path = hub.try_to_load_from_cache(
                source.location, "config.json", cache_dir=kept["cache_dir"], revision=source.revision or None
            )
            text = Path(path).read_bytes() if isinstance(path, str) else None
        found = json.loads(text) if text is not None else None
        return found if isinstance(found, dict) else None
    return None


def _cache_key(source: WeightsSource) -> str:
    return f"{source.kind}-{_slug(source.location)}-{_slug(source.revision) or 'latest'}"


def fetch_weights(source: WeightsSource, session: Session, *, say: Callable[[str], None]) -> tuple[Path, str]:
    """Downloads the weights if needed and returns (model folder, exact revision).

    Args:
        source: The result of `find_weights`.
        session: For URIs of object stores.
        say: Receives progress lines.

    Raises:
        WeightsError: The download failed. Has the source, the cause and the remedy.
    """
    if source.kind == "folder":
        folder = Path(source.location)
        if not (folder / "config.json").is_file():
            raise WeightsError(
                f"the model folder {folder} is not on this machine: set model_uri= to a location that every machine can reach"
            )
        return folder, _folder_revision(folder)
    if source.kind == "hub":
        return _from_hub(source, say)
    cache = palate_home() / "cache" / "models"
    key = _cache_key(source)
    if source.kind == "store":
        store = open_store(source.location, options=session.options_for(source.location))
        listing = "\n".join(f"{info.key} {info.etag}" for info in store.list(""))
        revision = hashlib.sha256(listing.encode()).hexdigest()[:16]
        key = f"store-{_slug(source.location)}-{revision}"

        def fill(folder: Path) -> None:  # creates the folder
            say(f"downloading {source.location}")
            store.download_tree("", folder)
    else:
        revision = source.revision

        def fill(folder: Path) -> None:
            say(f"unpacking the weights of the package {source.location} {source.revision}")
            _from_package(source.location, folder)

    target = cache / key
    with _lock(cache / f"{key}.lock"):
        if not target.is_dir():
            draft = cache / f"{key}.draft"
            shutil.rmtree(draft, ignore_errors=True)
            try:
                fill(draft)
                check_model_files(source.location, {entry.name for entry in draft.iterdir()})
                draft.rename(target)  # atomic: complete or not there
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return target, revision


def reachable_weights(source: WeightsSource, session: Session, backend: Backend) -> WeightsSource:
    """Returns a source that a run of the backend can reach: a container does not have this environment's packages."""
    if source.kind != "package" or backend.uses_this_python:
        return source
    folder, _ = fetch_weights(source, session, say=note)
    return WeightsSource(kind="folder", location=str(folder))


def _from_package(name: str, folder: Path) -> None:
    from importlib.metadata import distribution

    files = [Path(str(file.locate())) for file in distribution(name).files or [] if file.name.endswith(".gguf")]
    if len(files) != 1:
        raise WeightsError(f"the package {name} has {len(files)} GGUF files, expected 1: reinstall it")
    command = [sys.executable, "-P", "-m", "palate_trainer.convert_gguf"]
    command += [str(files[0].absolute()), str(folder.absolute())]
    environment = {**without_credentials(os.environ), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    if done.returncode != 0:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise WeightsError(f"the weights of the package {name} cannot be converted:\n{tail}")


def _from_hub(source: WeightsSource, say: Callable[[str], None]) -> tuple[Path, str]:
    api, _, _, kept, offline = connect(source.location, repo_type="model")
    say(f"downloading {source.location} from the Hugging Face Hub (or its cache)")
    try:
        path = api.snapshot_download(
            source.location,
            revision=source.revision or None,
            ignore_patterns=_IGNORED_ON_HUB,
            local_files_only=offline,
            **kept,
        )
    except Exception as error:  # the Hub client raises a dozen unrelated types
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"{source.location} cannot be downloaded from the Hugging Face Hub: {cause}. Check the network, the name, and "
            "HF_TOKEN for gated models, or set model_uri= to a local folder or object-store URI with the weights"
        ) from error
    return Path(path), Path(path).name


def _folder_revision(folder: Path) -> str:
    """Returns a fingerprint of a folder from names, sizes and times. Cheap, and any rewrite changes it."""
    entries = sorted(
        (entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in folder.iterdir() if entry.is_file()
    )
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:16]


def _slug(text: str) -> str:
    readable = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in text)[-60:].strip("-")
    return f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:8]}" if readable != text else readable


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


SETTING = "PALATE_MODEL_STAND_IN"
LABEL = "stand_in_for"
"""Label of a job or service whose model was replaced, so that its results are not mistaken for those of the other model."""


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """The replacement for a requested model.

    Attributes:
        for_name: Name of the requested model.
        name: Name of the replacement.
        uri: Its folder or object-store URI, or None for a model of the catalog.
    """

    for_name: str
    name: str
    uri: str | None


def stand_in_for(model_name: str) -> StandIn | None:
    """Returns the replacement that PALATE_MODEL_STAND_IN sets for a model, or None. Prints a note to stderr each time.

    The setting is `NAME=OTHER`, several separated by commas. OTHER is a catalog name, a folder, or a URI.

    Raises:
        ConfigurationError: The setting is invalid.
        UnknownModelError: OTHER is neither in the catalog nor a path.
    """
    other = _setting_for(model_name)
    if other is None:
        return None
    found = _resolve(model_name, other)
    note(
        f"STAND-IN: {found.uri or found.name} replaces {model_name}, because {SETTING} is set. "
        f"The result is not {model_name}"
    )
    return found


def has_stand_in(model_name: str) -> bool:
    """Returns whether PALATE_MODEL_STAND_IN replaces a model, and prints nothing."""
    return _setting_for(model_name) is not None


def _setting_for(model_name: str) -> str | None:
    setting = os.environ.get(SETTING, "")
    for entry in filter(None, (part.strip() for part in setting.split(","))):
        name, separator, other = (part.strip() for part in entry.partition("="))
        if not (separator and name and other):
            raise ConfigurationError(f"{SETTING}={setting!r}: {entry!r} is not NAME=OTHER: give both, or unset it")
        if _canonical(name) == _canonical(model_name):
            return other
    return None


def _resolve(model_name: str, other: str) -> StandIn:
    try:
        return StandIn(for_name=model_name, name=find_model(other).name, uri=None)
    except UnknownModelError:
        if "/" not in other:
            raise
    return StandIn(for_name=model_name, name=other.rstrip("/").rpartition("/")[2], uri=other)


def _canonical(name: str) -> str:
    try:
        return find_model(name).name
    except UnknownModelError:
        return name.casefold()
