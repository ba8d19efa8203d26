"""Generates and validates names. Knows strings, no jobs or services."""

from __future__ import annotations

import os
import re
import string
from datetime import UTC, datetime

from palate.parameters import reject_unknown_keywords
from palate_recipes.errors import ConfigurationError
from palate_recipes.text import show_path

_ALPHABET = string.ascii_lowercase + string.digits
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@reject_unknown_keywords
def random_str(n: int) -> str:
    """Returns `n` random lowercase letters and digits. Same name as in PAI's SDK."""
    return "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in os.urandom(n))


def unique_name(base: str) -> str:
    """Returns `base` with a UTC time and four random characters, such as `qwen2-dpo-20260131-120000-x7k2`."""
    slug = re.sub(r"[^a-z0-9]+", "-", base.lower()).strip("-")[:60] or "job"
    return f"{slug}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{random_str(4)}"


def check_name(kind: str, name: str) -> str:
    """Returns `name` if it is valid in a key, a URL and a model name; raises ConfigurationError otherwise."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise ConfigurationError(
            f"{kind} {show_path(name)} is not valid: expected up to 100 letters, digits, '.', '_' and '-', without '..' and "
            "beginning with a letter or digit"
        )
    return name
