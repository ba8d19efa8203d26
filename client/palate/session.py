"""The session: a store, its credentials, and a backend. Knows no job.

Each setting comes from the argument, else the environment, else `~/.palate/config.json` (written by `save_config`), else
the default: the process backend with a store in `~/.palate/store`.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from palate.backends import Backend, get_backend
from palate.parameters import refuse, reject_unknown_keywords
from palate.paths import palate_home
from palate.store import Store, StoreOptions, open_store
from palate_recipes.errors import ConfigurationError, UnsupportedParameterError

DEFAULT_REGION = "cn-hangzhou"
"""PAI's public tutorial data is in one bucket per region. Scripts build its name from `session.region_id`."""

_REGION_VARIABLES = ("PALATE_REGION", "OSS_REGION", "ALIBABA_CLOUD_REGION_ID", "AWS_REGION", "AWS_DEFAULT_REGION")


@reject_unknown_keywords
class Session:
    """A store, its credentials, and a backend.

    Args:
        region_id: Region of the object store. Part of `oss://` endpoints.
        workspace_id: Stored, but without effect: Palate has no workspaces.
        credential_config: Not supported. Give access keys to `setup_default_session`, or use the environment.
        oss_bucket_name: Bucket for jobs and services. Equals `store="oss://<bucket>/palate"`.
        oss_endpoint: Endpoint of the object store.
        store: URI of the folder or bucket for jobs and services: `file://`, `s3://`, `oss://` or a path.
            Default: PALATE_STORE, else `~/.palate/store`.
        backend: The backend that runs jobs and services, or its name. Default: PALATE_BACKEND, else `process`.
        options: Endpoint and credentials of the object store. Default: from the environment and AWS files.

    Raises:
        ConfigurationError: The backend is unknown, or both `store` and `oss_bucket_name` are given.
    """

    def __init__(
        self,
        region_id: str | None = None,
        workspace_id: str | None = None,
        credential_config: object = None,
        oss_bucket_name: str | None = None,
        oss_endpoint: str | None = None,
        *,
        store: str | Path | None = None,
        backend: str | Backend | None = None,
        options: StoreOptions | None = None,
    ) -> None:
        if credential_config is not None:
            raise UnsupportedParameterError(
                "credential_config is not supported (an object of Alibaba's SDK): give access_key_id and access_key_secret to "
                "setup_default_session, or set OSS_ACCESS_KEY_ID and OSS_ACCESS_KEY_SECRET (AWS_* for S3)"
            )
        if store is not None and oss_bucket_name is not None:
            raise ConfigurationError(
                f"store={str(store)!r} and oss_bucket_name={oss_bucket_name!r} both set the store: give only one of them"
            )
        saved = _saved_config()
        self.region_id: str = (
            region_id or _from_environment(*_REGION_VARIABLES) or saved.get("region_id") or DEFAULT_REGION
        )
        self.workspace_id = workspace_id or saved.get("workspace_id")
        if oss_bucket_name is not None:
            store = f"oss://{oss_bucket_name}/palate"
        self.store_uri = str(store or os.environ.get("PALATE_STORE") or saved.get("store") or palate_home() / "store")
        options = options or StoreOptions()
        saved_endpoint = None if os.environ.get("AWS_ENDPOINT_URL_S3") else saved.get("endpoint_url")
        saved_region = os.environ.get("PALATE_REGION") or saved.get("region_id")
        self.options = replace(
            options,
            endpoint_url=options.endpoint_url or oss_endpoint or saved_endpoint,
            region=options.region or region_id or saved_region,
        )
        chosen = backend or os.environ.get("PALATE_BACKEND") or saved.get("backend") or "process"
        self.backend: Backend = get_backend(chosen) if isinstance(chosen, str) else chosen
        self._store: Store | None = None

    @property
    def store(self) -> Store:
        """The store. The first access opens it and may raise StoreError."""
        if self._store is None:
            self._store = open_store(self.store_uri, options=self.options_for(self.store_uri))
        return self._store

    @property
    def workspace_name(self) -> str:
        """The workspace's id, or `default`. PAI's scripts print it; Palate has no workspaces."""
        return str(self.workspace_id or "default")

    @property
    def oss_bucket_name(self) -> str | None:
        """The bucket of an `oss://` or `s3://` store; None if the store is a folder."""
        scheme, separator, rest = self.store_uri.partition("://")
        return rest.partition("/")[0] if separator and scheme in ("oss", "s3") else None

    @property
    def oss_endpoint(self) -> str | None:
        """The endpoint that was given, saved or is in AWS_ENDPOINT_URL_S3; None: that of the region."""
        return self.options.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3")

    def options_for(self, uri: str) -> StoreOptions:
        """Returns the options to open `uri` with. OSS endpoints are built from the region."""
        if uri.startswith("oss://") and self.options.region is None:
            return replace(self.options, region=self.region_id)
        return self.options

    def environment(self) -> dict[str, str]:
        """Returns the environment variables for another process to reach the same stores. Contains credentials."""
        return self.options.environment()

    def save_config(self, config_path: str | Path | None = None) -> Path:
        """Saves region, workspace, store, endpoint and backend, without credentials. Returns the path."""
        target = Path(config_path) if config_path else _config_file()
        values = {
            "region_id": self.region_id,
            "workspace_id": self.workspace_id,
            "store": self.store_uri,
            "endpoint_url": self.options.endpoint_url,
            "backend": self.backend.name,
        }
        draft = target.with_suffix(".tmp")
        draft.write_text(json.dumps(values, indent=1) + "\n")
        draft.replace(target)
        return target

    def get_storage_path_by_category(self, category: str, dir_name: str | None = None) -> str:
        """Returns a URI in the store for a category (PAI's helper), such as `…/training_data/<dir_name>/`."""
        parts = [self.store_uri.rstrip("/"), category, *([dir_name] if dir_name else [])]
        return "/".join(parts) + "/"

    def __repr__(self) -> str:
        return f"Session(store={self.store_uri!r}, backend={self.backend.name!r}, region_id={self.region_id!r})"


_default: Session | None = None


@reject_unknown_keywords
def setup_default_session(
    access_key_id: str | None = None,
    access_key_secret: str | None = None,
    security_token: str | None = None,
    region_id: str | None = None,
    credential_config: object = None,
    oss_bucket_name: str | None = None,
    oss_endpoint: str | None = None,
    workspace_id: str | None = None,
    network: str | None = None,
    *,
    store: str | Path | None = None,
    backend: str | Backend | None = None,
) -> Session:
    """Creates the default session and returns it. Arguments as in PAI's SDK and `Session`.

    Raises:
        UnsupportedParameterError: `network` is given. Palate uses endpoints, not Alibaba's networks.
    """
    global _default
    refuse(network=network)
    options = StoreOptions(
        access_key_id=access_key_id, secret_access_key=access_key_secret, session_token=security_token
    )
    _default = Session(
        region_id,
        workspace_id,
        credential_config,
        oss_bucket_name,
        oss_endpoint,
        store=store,
        backend=backend,
        options=options,
    )
    return _default


@reject_unknown_keywords
def get_default_session() -> Session:
    """Returns the default session. Creates it from the environment and saved configuration if needed."""
    global _default
    if _default is None:
        _default = Session()
    return _default


def _config_file() -> Path:
    return palate_home() / "config.json"


def _saved_config() -> dict[str, Any]:
    path = _config_file()
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not valid JSON ({error}): fix or delete it") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path} must contain a JSON object: fix or delete it")
    return values


def _from_environment(*names: str) -> str | None:
    return next((value for name in names if (value := os.environ.get(name))), None)
