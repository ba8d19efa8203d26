"""Environment of a run: in a file, for engines that expose variables to other users, and without credentials. Knows no engine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

FILE_VARIABLE = "PALATE_VARIABLES_FILE"
"""Environment variable of a runner with the path of the file, a JSON object of names and values."""

_PROVIDERS = ("AWS_", "OSS_", "S3_", "ALIBABA_CLOUD_", "AZURE_", "GOOGLE_", "GCP_", "OPENAI_", "ANTHROPIC_")
_CREDENTIAL = re.compile(
    r"SECRET|PASSWORD|PASSWD|PASSPHRASE|(^|_)(TOKEN|CREDENTIALS?|AUTH|PASS|PAT|JWT|COOKIE|DSN)(_|$)|_PWD$"
    r"|(API|ACCESS|PRIVATE|ACCOUNT|SIGNING)_?KEY(_|$)",
    re.IGNORECASE,
)
_PASSWORD_IN_URL = re.compile(r"://[^/\s@]*:[^/\s@]+@")
"""As in URLs of databases, package indexes and proxies."""


def without_credentials(environment: Mapping[str, str], *, kept: Collection[str] = ()) -> dict[str, str]:
    """Returns `environment` without credentials, for a program that needs none.

    Args:
        environment: Environment of the parent process.
        kept: Names that are always kept.
    """
    return {
        name: value
        for name, value in environment.items()
        if name in kept
        or not (name.upper().startswith(_PROVIDERS) or _CREDENTIAL.search(name) or _PASSWORD_IN_URL.search(value))
    }


def take_variables() -> None:
    """Loads the file into this process's environment and deletes it, because it may contain credentials.

    Without such a file, all variables are already in the environment.
    """
    name = os.environ.pop(FILE_VARIABLE, "")
    if not name or not (path := Path(name)).is_file():
        return
    os.environ.update(json.loads(path.read_text(encoding="utf-8")))
    try:
        path.unlink()
    except OSError:
        pass  # mounted read-only: its writer deletes it


def is_credential(name: str) -> bool:
    """Whether a name, of a variable or of a setting, is that of a credential."""
    return _CREDENTIAL.search(name) is not None
