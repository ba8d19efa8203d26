"""Copies a finished job's model with a model card to another store or the Hugging Face Hub. Knows no training and no serving.

Every file is checked against the SHA-256 that the training recorded. `digests.json` is written last, so if it exists the copy
is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from msgspec.structs import asdict

from palate.checksums import DIGESTS_FILE, Checksums, file_facts
from palate.paths import palate_home
from palate.sources.hub_model import hub_model
from palate.store import Store, open_parent
from palate.store.local import walk
from palate.store.uri import normal_uri
from palate_recipes.errors import (
    ConfigurationError,
    MissingDependencyError,
    NameTakenError,
    StoreDeniedError,
    StoreError,
    StoreUnreachableError,
)
from palate_recipes.model_card import CARD_FILE, base_name, card_head, card_summary, card_usage, inline

if TYPE_CHECKING:
    from palate.runs.record import Record
    from palate.session import Session
    from palate_recipes.specs.run import Status, TrainManifest
    from palate_recipes.specs.train import InputFile


def model_card(manifest: TrainManifest, status: Status, files: Collection[str], *, place: str = ".") -> str:
    """Returns the model card in Markdown, with the Hub's metadata block.

    Has the names and digests of the data, never their folder or bucket.

    Args:
        manifest, status: Of the succeeded job.
        files: Names of the model's files.
        place: The model's id on the Hub, or "." for a card whose code runs in the model's folder.
    """
    body = manifest.body
    facts = {
        "base model": base_name(body.model),
        "base revision": status.details.get("model_revision", "unknown"),
        "method": body.method,
        "strategy": body.hyperparameters.training_strategy,
        "precision": body.precision,
        "job": manifest.name,
        **{f"label {name}": value for name, value in manifest.labels.items()},
    }
    libraries = status.details.get("versions")
    versions = {**manifest.versions, **(libraries if isinstance(libraries, dict) else {})}
    return "\n".join(
        [
            *card_head(body, files),
            "",
            f"# {inline(manifest.name)}",
            "",
            card_summary(body, files),
            "",
            *card_usage(body, files, place=place),
            "",
            "## Training",
            "",
            *_table(("fact", "value"), facts),
            "",
            "## Data",
            "",
            "| channel | name | rows | SHA-256 |",
            "| --- | --- | --- | --- |",
            *(_data_row(channel, entry) for channel, entry in body.inputs.items()),
            "",
            "## Hyperparameters",
            "",
            *_table(
                ("name", "value"),
                {name: json.dumps(value, ensure_ascii=False) for name, value in asdict(body.hyperparameters).items()},
            ),
            "",
            "## Versions",
            "",
            *_table(("library", "version"), versions),
            "",
            f"{len(files)} files; `digests.json` has the size and SHA-256 of each.",
            "",
        ]
    )


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "| --- | --- |", *(f"| {inline(k)} | {inline(v)} |" for k, v in rows.items())]


def _data_row(channel: str, entry: InputFile) -> str:
    name = PurePosixPath(entry.uri).name
    rows = "" if entry.rows is None else entry.rows
    return f"| {inline(channel)} | {inline(name)} | {rows} | `{entry.sha256 or ''}` |"


def _repository(uri: str) -> str:
    """Returns OWNER/NAME of an `hf://` URI. Raises ConfigurationError if it is not a model on the Hub, or has a revision."""
    found = hub_model(uri)
    if found is None or found.revision:
        raise ConfigurationError(f"{uri!r} is not a model repository to write to: expected hf://OWNER/NAME")
    return found.repo


def push(folder: Path, uri: str, *, message: str) -> str:
    """Uploads all files in `folder`, and compares their digests with those that the Hub reports.

    A missing repository is created as private. An existing one keeps its history and visibility. The endpoint is HF_ENDPOINT,
    the token is HF_TOKEN or that of `hf auth login`.

    Args:
        folder: Local folder.
        uri: `hf://OWNER/NAME`.
        message: Commit message.

    Returns:
        `hf://OWNER/NAME@<commit>`.

    Raises:
        ConfigurationError: `uri` is not a model on the Hub, or there is no token.
        MissingDependencyError: huggingface_hub is not installed.
        StoreError: The Hub rejects the upload, does not answer, or has different files.
    """
    repo = _repository(uri)
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants
    except ImportError:
        raise MissingDependencyError(
            f"{uri} needs huggingface_hub, which is not installed: pip install 'palate[data]'"
        ) from None
    token = hub.get_token()
    if not token:
        raise ConfigurationError(
            f"{uri} cannot be written without a Hub token: set HF_TOKEN to one with write access, or run `hf auth login`"
        )
    # Read here, because huggingface_hub reads its variables only once, when it is imported.
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    api = hub.HfApi(endpoint=endpoint, token=token, library_name="palate")
    with _explained(uri, endpoint):
        api.create_repo(repo, private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message).oid
        names = list(walk(folder))
        there = {entry.path: entry for entry in api.get_paths_info(repo, names, revision=commit)}
    damaged = []
    for name in names:
        entry = there.get(name)
        lfs = getattr(entry, "lfs", None)
        same = entry is not None and (
            lfs.sha256 == file_facts(folder / name)["sha256"] if lfs else entry.blob_id == _git_blob_id(folder / name)
        )
        if not same:
            damaged.append(name)
    if damaged:
        raise StoreError(
            f"{uri} at {endpoint} differs from what was sent: {', '.join(sorted(damaged))} missing or changed. Save again"
        )
    return f"hf://{repo}@{commit}"


@contextmanager
def _explained(uri: str, endpoint: str) -> Iterator[None]:
    """Translates errors of the Hub's client to errors with URI, endpoint, cause and remedy. None has the token."""
    import httpx2
    from huggingface_hub import errors

    where = f"{uri} at {endpoint}"
    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise ConfigurationError(f"{where} cannot be written because HF_HUB_OFFLINE is set: unset it") from error
    except httpx2.TransportError as error:
        cause = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise StoreUnreachableError(
            f"{where} cannot be reached: {cause}. Check the network, proxy settings and HF_ENDPOINT"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        said = error.server_message or f"HTTP {status}"
        if status in (401, 403, 404):
            raise StoreDeniedError(
                f"{where}: {said} (HTTP {status}). Check that HF_TOKEN has write access there and that the owner is correct"
            ) from error
        if status == 429 or status >= 500:
            raise StoreUnreachableError(f"{where}: {said} (HTTP {status}). Try again later") from error
        raise StoreError(f"{where}: {said} (HTTP {status}). Check HF_ENDPOINT and the URI") from error
    except errors.HFValidationError as error:
        raise ConfigurationError(f"{uri!r} is not a model on the Hub ({error}): expected hf://OWNER/NAME") from None


def _git_blob_id(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def save(record: Record, manifest: TrainManifest, status: Status, target: str | Path, session: Session) -> str:
    """Copies the model of a succeeded job. See `TrainingJob.save_model`."""
    where = str(target)
    if where.startswith("hf://"):
        place = _repository(where)  # before the model is fetched
    else:
        place = "."
        where = normal_uri(target)
        if where == normal_uri(record.store.uri(record.key("model"))):
            raise ConfigurationError(f"uri={where} is the model's current location: give another one")
    work = palate_home() / "work"
    work.mkdir(exist_ok=True, mode=0o700)
    with TemporaryDirectory(prefix="save-", dir=work) as scratch:
        folder = Path(scratch) / "model"
        _fetch(record, folder)
        names = [name for name in walk(folder) if name not in (DIGESTS_FILE, CARD_FILE)]
        card = model_card(manifest, status, names, place=place)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        digests = Checksums.of(folder)
        (folder / DIGESTS_FILE).write_bytes(digests.encode())
        if where.startswith("hf://"):
            return push(folder, where, message=f"Model of job {record.name}, trained with Palate")
        store, name = open_parent(where, options=session.options_for(where))
        _push(folder, digests, store, name, Path(scratch) / "back")
    return where


def _fetch(record: Record, folder: Path) -> None:
    """Downloads the job's model and checks it against its digests.json, if there is one."""
    prefix = record.key("model")
    record.store.download_tree(prefix, folder)
    listed = folder / DIGESTS_FILE
    if listed.is_file():
        what = record.store.uri(prefix)
        expected = Checksums.parse(
            listed.read_bytes(), where=f"{what}/{DIGESTS_FILE}", remedy="restore it, or train again"
        )
        expected.check_folder(folder, what=what)


def _push(folder: Path, digests: Checksums, store: Store, name: str, back: Path) -> None:
    """Uploads a folder, reads it back, and writes digests.json only if the copy is correct."""
    present = {info.key.removeprefix(f"{name}/") for info in store.list(name)}
    # A subset of the same files without digests.json is an interrupted save, which may be completed.
    if DIGESTS_FILE in present or not present <= set(digests.files):
        raise NameTakenError(f"{store.uri(name)} is not empty: choose an empty location, or delete the files there")
    store.upload_tree(folder, name, skip=lambda path: path == DIGESTS_FILE)
    arrived = store.local_path(name)
    if arrived is None:
        store.download_tree(name, back)
        arrived = back
    digests.check_folder(
        arrived,
        what=store.uri(name),
        wrong="differs from what was sent",
        remedy="Another program writes there, or the store is damaged: save to another location",
    )
    store.upload(folder / DIGESTS_FILE, f"{name}/{DIGESTS_FILE}")
