"""A folder, pushed to a model repository of the Hugging Face hub in one commit. Knows no job and no other store."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from palate.digests import file_facts
from palate.errors import ConfigurationError, MissingDependencyError
from palate.store.errors import StoreDeniedError, StoreError, StoreUnreachableError
from palate.store.local import walk

_URI = re.compile(r"hf://(?:models/)?(?P<repo>[\w][\w.-]*/[\w][\w.-]*)/?")
_OTHER_KINDS = ("datasets/", "spaces/", "kernels/", "buckets/", "models/")


def push(folder: Path, uri: str, *, message: str) -> str:
    """Pushes every file below `folder`, and checks what the hub then says of each.

    The repository is made when it is missing, private; one that is there keeps its history and its visibility.
    The endpoint is HF_ENDPOINT, the token HF_TOKEN or that of `hf auth login`.

    Args:
        folder: On this machine.
        uri: `hf://OWNER/NAME`.
        message: Of the commit.

    Returns:
        `hf://OWNER/NAME@<commit>`.

    Raises:
        ConfigurationError: `uri` names no model, or there is no token.
        MissingDependencyError: huggingface_hub is not installed.
        StoreError: The hub refuses, does not answer, or holds something else than what was sent.
    """
    found = _URI.fullmatch(uri)
    if found is None or f"{found['repo']}/".startswith(_OTHER_KINDS):
        raise ConfigurationError(f"{uri!r} names no model of the hub: write hf://OWNER/NAME")
    repo = found["repo"]
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants
    except ImportError:
        raise MissingDependencyError(
            f"{uri} needs huggingface_hub, not installed here: pip install 'palate[data]'"
        ) from None
    token = hub.get_token()
    if not token:
        raise ConfigurationError(
            f"{uri} cannot be written without a token of the hub: set HF_TOKEN to one with write access, or run `hf auth login`"
        )
    # Read now: huggingface_hub reads its variables once, when it is imported.
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
            f"{uri} at {endpoint} does not hold what was sent: {', '.join(sorted(damaged))} missing or changed. Save again"
        )
    return f"hf://{repo}@{commit}"


@contextmanager
def _explained(uri: str, endpoint: str) -> Iterator[None]:
    """Turns what the hub's client raises into errors with URI, endpoint, cause and remedy; none of them holds the token."""
    import httpx2
    from huggingface_hub import errors

    where = f"{uri} at {endpoint}"
    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise ConfigurationError(f"{where} cannot be written: HF_HUB_OFFLINE is set; unset it") from error
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
                f"{where}: {said} (HTTP {status}). Check that HF_TOKEN may write there and that the owner is right"
            ) from error
        if status == 429 or status >= 500:
            raise StoreUnreachableError(f"{where}: {said} (HTTP {status}). Try again later") from error
        raise StoreError(f"{where}: {said} (HTTP {status}). Check HF_ENDPOINT and the URI") from error
    except errors.HFValidationError as error:
        raise ConfigurationError(f"{uri!r} names no model of the hub ({error}): write hf://OWNER/NAME") from None


def _git_blob_id(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
