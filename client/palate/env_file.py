"""Variables of a run: in a file, for engines that would show them to anyone, and without credentials. Knows no engine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

FILE_VARIABLE = "PALATE_VARIABLES_FILE"
"""Names the file, a JSON object of names and values, in the environment of a runner."""


_PROVIDERS = ("AWS_", "OSS_", "S3_", "ALIBABA_CLOUD_", "AZURE_", "GOOGLE_", "GCP_", "OPENAI_", "ANTHROPIC_")
_CREDENTIAL = re.compile(
    r"SECRET|PASSWORD|PASSWD|PASSPHRASE|(^|_)(TOKEN|CREDENTIALS?|AUTH|PASS|PAT|JWT|COOKIE|DSN)(_|$)|_PWD$"
    r"|(API|ACCESS|PRIVATE|ACCOUNT|SIGNING)_?KEY(_|$)",
    re.IGNORECASE,
)
_PASSWORD_IN_URL = re.compile(r"://[^/\s@]*:[^/\s@]+@")
"""As addresses of databases, package indexes and proxies have it."""


def without_credentials(environment: Mapping[str, str], *, kept: Collection[str] = ()) -> dict[str, str]:
    """Returns an environment for a program that needs no credentials: everything else stays.

    Args:
        environment: Of the process that starts it.
        kept: Names that stay in any case.
    """
    return {
        name: value
        for name, value in environment.items()
        if name in kept
        or not (name.upper().startswith(_PROVIDERS) or _CREDENTIAL.search(name) or _PASSWORD_IN_URL.search(value))
    }


def take_variables() -> None:
    """Puts what the file holds into this process's environment, and removes it: it may hold credentials.

    A run without such a file has all that it needs in its environment.
    """
    name = os.environ.pop(FILE_VARIABLE, "")
    if not name or not (path := Path(name)).is_file():
        return
    os.environ.update(json.loads(path.read_text(encoding="utf-8")))
    try:
        path.unlink()
    except OSError:
        pass  # mounted read-only; who wrote it removes it
