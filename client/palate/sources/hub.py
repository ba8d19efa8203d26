"""Preference data from the Hugging Face hub: which files belong to a config and a split. Knows file names, not their content.

The files are in the hub's own cache (HF_HUB_CACHE), pinned to one commit; cached files are not downloaded again.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote

from palate.sources.select import Fetched, few, matches, nothing_there, refuse_twins, sift, split_of
from palate_recipes.errors import (
    ConfigurationError,
    DataError,
    MissingDependencyError,
    PalateError,
    StoreDeniedError,
    StoreError,
    StoreUnreachableError,
)
from palate_recipes.text import load_yaml

_GRAMMAR = "hf://datasets/OWNER/NAME[@revision][/path or glob][?split=train&config=name]"
_URI = re.compile(
    r"hf://(?:datasets/)?(?P<repo>[^/@?]+/[^/@?]+)"
    r"(?:@(?P<revision>refs/(?:convert/[\w.-]+|pr/\d+)|[^/?]+))?"
    r"(?:/(?P<path>.*?))?/?(?:\?(?P<query>[^/?]*=[^/?]*))?"
)
_OTHER_KINDS = ("models/", "spaces/", "kernels/", "buckets/")
_YAML_BLOCK = re.compile(r"\s*---(?:\r\n|\r|\n)([\s\S]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r|\n|$)")  # as huggingface_hub's
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD_IN_DATA = re.compile(r"data/(.+)-\d{5}-of-\d{5}[^/]*")
_TIMEOUT_S = 30.0
_TRUE = ("1", "ON", "YES", "TRUE")
_DEFAULT_CONFIG = "default"

Splits = dict[str | None, list[str]]


@dataclass(frozen=True)
class _DatasetRef:
    repo: str
    revision: str | None
    path: str
    split: str | None
    config: str | None
    grammar = _GRAMMAR

    @property
    def page(self) -> str:
        return f"datasets/{self.repo}"

    def uri(self, *, path: str = "", **query: str | None) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        asked = "&".join(f"{name}={value}" for name, value in query.items() if value)
        return f"hf://datasets/{self.repo}{revision}{f'/{path}' if path else ''}{f'?{asked}' if asked else ''}"

    def __str__(self) -> str:
        return self.uri(path=self.path, split=self.split, config=self.config)


def fetch_dataset(uri: str) -> Fetched:
    """Downloads the files of one split of a hub dataset, or the files that match a path or glob.

    Configs and splits are resolved as in `datasets`: from the `configs` in the dataset's README, else from file and folder
    names. The endpoint is HF_ENDPOINT, the token HF_TOKEN or that of `hf auth login`. With HF_HUB_OFFLINE=1 only the cache
    is used.

    Args:
        uri: `hf://datasets/OWNER/NAME[@revision][/path or glob][?split=train&config=name]`; `datasets/` is optional.

    Raises:
        ConfigurationError: The URI is invalid.
        DataError: No such dataset, revision, config, split or file; lists the existing ones.
        MissingDependencyError: huggingface_hub is not installed.
        StoreError: The hub refuses access or does not respond.
    """
    place = _parse(uri)
    api, hub, endpoint, kept, offline = connect(str(place), repo_type="dataset")
    with explained(place, endpoint, offline, absent=DataError):
        commit, names = _listing(hub, api, place, kept, offline)
        kept |= {"revision": commit, "local_files_only": offline}
        declared: dict[str, Splits] = {}
        if "README.md" in names and not place.path:
            readme = api.hf_hub_download(place.repo, "README.md", **kept)
            declared = _settings(readme, names, place)
        files, passed_over = _choose(place, names, declared)
        folder = api.snapshot_download(place.repo, allow_patterns=[glob.escape(name) for name in files], **kept)
    return Fetched(tuple(Path(folder) / name for name in files), str(place), commit, passed_over)


def connect(what: str, *, repo_type: str) -> tuple[Any, Any, str, dict[str, Any], bool]:
    """Returns the hub's client, its module, the endpoint, arguments for reading one repository, and whether it is offline.

    Raises:
        MissingDependencyError: huggingface_hub is not installed; names `what`, which needs it.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants
    except ImportError:
        raise MissingDependencyError(
            f"{what} needs huggingface_hub, which is not installed: pip install 'palate[data]'"
        ) from None
    # Read at each call: huggingface_hub reads its variables only once, when it is imported.
    offline = constants.is_offline_mode() or os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    home = os.environ.get("HF_HOME")
    cache = os.environ.get("HF_HUB_CACHE") or (os.path.join(home, "hub") if home else None)
    api = hub.HfApi(endpoint=endpoint, library_name="palate")
    return api, hub, endpoint, {"repo_type": repo_type, "cache_dir": cache}, offline


def _parse(uri: str) -> _DatasetRef:
    found = _URI.fullmatch(uri)
    if found is None or f"{found['repo']}/".startswith(("datasets/", *_OTHER_KINDS)):
        raise ConfigurationError(f"{uri!r} is not the URI of a hub dataset: expected {_GRAMMAR}")
    query = dict(parse_qsl(found["query"] or "", keep_blank_values=True))
    if unknown := sorted(set(query) - {"split", "config"}):
        raise ConfigurationError(f"{uri!r}: unknown parameter {', '.join(unknown)}: expected {_GRAMMAR}")
    revision, path = found["revision"], found["path"] or ""
    place = _DatasetRef(
        found["repo"], unquote(revision) if revision else None, path, query.get("split"), query.get("config")
    )
    if glob.has_magic(path) and query:
        raise ConfigurationError(f"{uri!r}: a glob already selects the files: leave out {'?' + found['query']}")
    return place


def _listing(hub: Any, api: Any, place: _DatasetRef, kept: Mapping[str, Any], offline: bool) -> tuple[str, list[str]]:
    """Returns the commit and the names of all files in it."""
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    asked = place.revision
    if not offline and _COMMIT.fullmatch(asked or ""):
        try:  # a commit never changes
            return str(asked), [file.path for file in hub.get_cached_repo_tree(place.repo, revision=asked, **kept)]
        except CachedRepoTreeNotFoundError:
            pass
    if not offline:
        # First, because the calls below have no timeout and silently fall back to the cache.
        api.dataset_info(place.repo, revision=asked, timeout=_TIMEOUT_S)
    commit = str(api.resolve_revision(place.repo, revision=asked, local_files_only=offline, **kept).resolved)
    if offline:
        return commit, [file.path for file in hub.get_cached_repo_tree(place.repo, revision=commit, **kept)]
    return commit, list(api.list_repo_files(place.repo, repo_type="dataset", revision=commit))


# ── which files ────────────────────────────────────────────────────────────────────────────────────────────────


def _choose(place: _DatasetRef, names: list[str], declared: dict[str, Splits]) -> tuple[list[str], tuple[str, ...]]:
    below = ""
    if place.path:
        if place.path in names:
            if place.split or place.config:
                raise ConfigurationError(f"{place} is a single file: leave out the part after '?'")
            return [place.path], ()
        if glob.has_magic(place.path):
            data, other = sift([name for name in names if matches(name, place.path)])
            if not data:
                raise nothing_there(str(place), names)
            return data, tuple(other)
        below = f"{place.path}/"
        if not any(name.startswith(below) for name in names):
            raise DataError(f"{place} does not exist: {place.uri()} contains {few(sorted(names))}. Check the path")
    data, other = sift([name.removeprefix(below) for name in names if name.startswith(below)])
    if not data and not declared:
        convert = f", or try the hub's own conversion: hf://datasets/{place.repo}@refs/convert/parquet"
        raise DataError(f"{nothing_there(str(place), names)}{convert}")
    files, left = _of_split(place, declared or _guessed(data))
    refuse_twins(files, str(place))
    return [below + name for name in files], tuple(below + name for name in sorted(other + left))


def _of_split(place: _DatasetRef, configs: dict[str, Splits]) -> tuple[list[str], list[str]]:
    """Returns the files of the requested split, and the files of its config that belong to no split."""
    if place.config is None and len(configs) > 1:
        ways = [place.uri(path=place.path, split=place.split, config=name) for name in sorted(configs)]
        raise DataError(f"{place} has several configs. Use one of:\n  " + "\n  ".join(ways))
    config = place.config or next(iter(configs))
    if config not in configs:
        raise DataError(f"{place}: no config {config!r}. Use one of: {', '.join(sorted(configs))}")
    splits = configs[config]
    wanted = place.split or "train"
    labelled = {name: files for name, files in splits.items() if name is not None and files}
    if wanted not in labelled:  # `dev` means validation, as in file names
        wanted = split_of(f"{wanted}/any") or wanted
    if wanted in labelled:
        return labelled[wanted], splits.get(None, [])
    if not labelled and splits.get(None) and place.split in (None, "train"):
        return splits[None], []
    ways = [place.uri(path=place.path, split=name, config=place.config) for name in sorted(labelled)]
    there = "Use one of:\n  " + "\n  ".join(ways) if ways else "Its files belong to no split: leave out split="
    raise DataError(f"{place}: no split {place.split or wanted!r}. {there}")


def _guessed(data: list[str]) -> dict[str, Splits]:
    """Groups files into configs and splits by name only."""
    configs: dict[str, Splits] = {}
    for name in data:
        inner = name.removeprefix("data/")
        top, slash, _ = inner.partition("/")
        config = top if slash and split_of(f"{top}/any") is None else _DEFAULT_CONFIG
        shard = _SHARD_IN_DATA.fullmatch(name)
        configs.setdefault(config, {}).setdefault(shard[1] if shard else split_of(name), []).append(name)
    return configs


def _declared(card: Mapping[str, Any], names: list[str]) -> dict[str, Splits]:
    """Returns the `configs` of the README; empty if it declares no data files.

    Source: https://huggingface.co/docs/hub/datasets-manual-configuration
    """
    configs: dict[str, Splits] = {}
    for entry in card.get("configs") or []:
        if not isinstance(entry, dict):
            continue
        given, folder = entry.get("data_files"), str(entry.get("data_dir") or "").strip("./")
        below = f"{folder}/" if folder else ""
        if isinstance(given, str):
            given = [given]
        if isinstance(given, dict):
            given = [{"split": split, "path": path} for split, path in given.items()]
        if not given and not folder:
            continue
        splits: Splits = {}
        if not given:
            data, _ = sift([name for name in names if name.startswith(below)])
            for name in data:
                splits.setdefault(split_of(name.removeprefix(below)), []).append(name)
        for part in given or []:
            split, paths = (part.get("split"), part.get("path")) if isinstance(part, dict) else ("train", part)
            patterns = [
                below + path.removeprefix("./") for path in ([paths] if isinstance(paths, str) else paths or [])
            ]
            found = [name for name in names if name in patterns or any(matches(name, pattern) for pattern in patterns)]
            splits.setdefault(str(split), []).extend(sift(found)[0])
        configs[str(entry.get("config_name") or _DEFAULT_CONFIG)] = splits
    return configs


def _settings(readme: str, names: list[str], place: _DatasetRef) -> dict[str, Splits]:
    """Returns the configs declared in the YAML block at the top of a README, see `_declared`."""
    try:
        block = _YAML_BLOCK.match(Path(readme).read_text(encoding="utf-8-sig"))
        card = load_yaml(block[1]) if block else {}
        if not isinstance(card, dict | type(None)):
            raise ValueError("it is not a mapping")
        return _declared(card or {}, names)
    except (
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # the last two come from entries of the wrong type
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{place}: the YAML block at the top of its README.md is broken ({cause}), so its splits are unknown: "
            f"select the files, as in {place.uri(path='data/train-*')}"
        ) from None


# ── errors ────────────────────────────────────────────────────────────────────────────────────────────────────


class _Place(Protocol):
    """A repository: `page` is its path on the hub's site, `grammar` the form of its URI."""

    @property
    def repo(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def page(self) -> str: ...
    @property
    def grammar(self) -> str: ...


@contextmanager
def explained(place: _Place, endpoint: str, offline: bool, *, absent: type[PalateError]) -> Iterator[None]:
    """Turns exceptions of the hub's client into errors with URI, endpoint, cause and remedy, without the token.

    `absent` is raised for what does not exist there, or not in the cache while offline.
    """
    import httpx2
    from huggingface_hub import errors, get_token

    where = f"{place} at {endpoint}"
    missing = (
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
        errors.RevisionResolutionError,
        errors.CachedRepoTreeNotFoundError,
    )
    try:
        yield
    except PalateError:
        raise
    except errors.GatedRepoError as error:
        raise StoreDeniedError(
            f"{where} is gated: accept its terms at {endpoint}/{place.page}, then set HF_TOKEN to a token of "
            "that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        hint = "check that HF_TOKEN belongs to an account with access" if get_token() else "set HF_TOKEN"
        raise absent(f"{where} does not exist or is private: check owner and name; if it is private, {hint}") from error
    except errors.RevisionNotFoundError as error:
        raise absent(f"{where}: no revision {place.revision!r}. Use a branch, a tag or a commit") from error
    except missing as error:
        if offline:
            raise absent(
                f"{place} is not complete in the hub's cache, and HF_HUB_OFFLINE is set: unset it once while the hub is "
                "reachable, or pass the path of a local copy"
            ) from error
        raise StoreUnreachableError(_unreachable(where, error)) from error
    except httpx2.TransportError as error:
        raise StoreUnreachableError(_unreachable(where, error)) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        said = error.server_message or f"HTTP {status}"
        if status in (401, 403):
            raise StoreDeniedError(f"{where}: {said}. Check HF_TOKEN and that its account has access") from error
        if status == 429 or status >= 500:
            raise StoreUnreachableError(f"{where}: {said} (HTTP {status}). Try again later, or set HF_TOKEN") from error
        raise StoreError(f"{where}: {said} (HTTP {status}). Check HF_ENDPOINT and the URI") from error
    except errors.HFValidationError as error:
        raise ConfigurationError(f"{place} is not a valid hub id ({error}): expected {place.grammar}") from None
    except (errors.FileMetadataError, ValueError) as error:
        raise StoreError(f"{where} does not respond like a Hugging Face hub ({error}): check HF_ENDPOINT") from error
    except OSError as error:
        raise StoreError(
            f"{place} cannot be written to the hub's cache: {error}. Free space there, or set HF_HUB_CACHE to another folder"
        ) from error


def _unreachable(where: str, error: Exception) -> str:
    cause = (str(error).splitlines() or [""])[0].removeprefix("Got: ") or type(error).__name__
    return (
        f"{where} cannot be reached: {cause}. Check the network, proxy settings and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses "
        "only the cache"
    )
