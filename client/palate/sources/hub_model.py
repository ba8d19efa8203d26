"""Models on the Hugging Face hub: what an id means, its commit and its size. Downloads config.json and no weights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import UNSET

from palate.env_file import without_credentials
from palate.sources.hub import connect, explained
from palate_recipes.catalog import nearest_names
from palate_recipes.errors import ConfigurationError, MissingDependencyError, UnknownModelError
from palate_recipes.specs.weights import WeightsSource

_GRAMMAR = "OWNER/NAME or hf://OWNER/NAME[@revision]"
_NAME = r"[A-Za-z0-9_][\w.-]*"
_ID = re.compile(rf"(?P<scheme>hf://(?:models/)?)?(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[^@?]+?))?/?", re.ASCII)
_OTHER_KINDS = ("datasets/", "spaces/", "kernels/", "buckets/", "models/")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class HubModel:
    """A model's id on the hub, and a branch, tag or commit."""

    repo: str
    revision: str | None = None
    grammar = _GRAMMAR

    @property
    def page(self) -> str:
        return self.repo

    def __str__(self) -> str:
        return f"hf://{self.repo}{f'@{self.revision}' if self.revision else ''}"


def hub_model(text: str) -> HubModel | None:
    """Returns the hub model that a text names, or None if it has another form, such as a name of the catalog.

    Raises:
        ConfigurationError: An `hf://` URI that is not a model.
    """
    text = str(text)  # find_model() rejects what is not a text, in words
    found = _ID.fullmatch(text.strip())
    if found is not None and not (found["scheme"] and f"{found['repo']}/".startswith(_OTHER_KINDS)):
        return HubModel(found["repo"], found["revision"])
    if text.strip().startswith("hf://"):
        raise ConfigurationError(f"{text!r} is not a model on the hub: expected {_GRAMMAR}")
    return None


def find_on_hub(model: HubModel) -> tuple[WeightsSource, set[str]]:
    """Returns the source of a hub model, pinned to a commit, and the names of its files.

    Reads config.json, so an id without access fails here. With HF_HUB_OFFLINE=1 only the cache is used.

    Raises:
        UnknownModelError: No such model or revision, or the cache does not have it; names the nearest models of the catalog.
        MissingDependencyError: huggingface_hub is not installed.
        StoreError: The hub refuses access, as for gated models, or does not respond.
    """
    api, hub, endpoint, kept, offline = connect(str(model), repo_type="model")
    try:
        with explained(model, endpoint, offline, absent=UnknownModelError):
            sizes: dict[str, int] = {}
            total = 0
            if offline:
                answer = api.resolve_revision(model.repo, revision=model.revision, local_files_only=True, **kept)
                commit = str(answer.resolved)
                sizes = {file.path: 0 for file in hub.get_cached_repo_tree(model.repo, revision=commit, **kept)}
            else:
                info = api.model_info(model.repo, revision=model.revision, files_metadata=True, timeout=_TIMEOUT_S)
                commit = str(info.sha)
                sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
                total = info.safetensors.total if info.safetensors else 0
            if not _COMMIT.fullmatch(commit):  # the manifest pins it, and the client makes file names of it
                raise ValueError(f"it has the commit {commit[:100]!r}")
            config = {}
            if "config.json" in sizes:
                config = _read(
                    api.hf_hub_download(model.repo, "config.json", revision=commit, local_files_only=offline, **kept)
                )
    except UnknownModelError as error:
        near = ", ".join(nearest_names(model.repo))
        raise UnknownModelError(
            f"{error}. The most similar names in the catalog are {near} (`palate models` lists all)"
        ) from error
    suffix = ".safetensors" if any(name.endswith(".safetensors") for name in sizes) else ".bin"
    size = sum(number for name, number in sizes.items() if name.endswith(suffix) and "/" not in name)
    # 4 bytes a weight in float32, else 2, for a hub that does not count them.
    wide = "float32" in (config.get("dtype"), config.get("torch_dtype"))
    return (
        WeightsSource(
            kind="hub",
            location=model.repo,
            revision=commit,
            size_bytes=size,
            parameters=total or size // (4 if wide else 2) or UNSET,
        ),
        set(sizes),
    )


def check_architecture(source: WeightsSource) -> None:
    """Asks the installed transformers whether it knows a hub model's architecture. Takes about 4 s.

    Raises:
        ConfigurationError: It does not.
    """
    model = HubModel(source.location, source.revision)
    api, _, endpoint, kept, offline = connect(str(model), repo_type="model")
    with explained(model, endpoint, offline, absent=UnknownModelError):
        path = api.hf_hub_download(
            model.repo, "config.json", revision=source.revision, local_files_only=offline, **kept
        )
        config = _read(path)
    kind, listed = str(config.get("model_type") or ""), config.get("architectures")
    names = ", ".join(map(str, listed)) if isinstance(listed, list) and listed else "unknown"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "palate_trainer.architectures"],
        capture_output=True,
        text=True,
        env={**without_credentials(os.environ), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"},
        cwd="/",
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise MissingDependencyError(
            f"transformers cannot be imported: {said}. Reinstall it: pip install 'palate[train]'"
        )
    known = json.loads(done.stdout.splitlines()[-1])
    if kind in known["model_types"]:
        return
    own = " It comes with its own code, which Palate never runs." if "auto_map" in config else ""
    raise ConfigurationError(
        f"{model.repo} has the architecture {names} (model_type {kind or 'missing'}), which transformers "
        f"{known['version']} does not know as a text generation model.{own} Choose another model, or update transformers"
    )


def _read(path: str) -> dict[str, Any]:
    """Returns a model's config; ConfigurationError if it is not a JSON object."""
    try:
        found = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigurationError("config.json of the model is not a JSON object: choose another revision")
    return found
