"""A hook of the docs site: links that leave docs/, such as to a recipe or a benchmark, lead to the repository's page on GitHub.

In the repository such links are relative, so that they work on GitHub and in a checkout. The site has no page for them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_OUTWARD = re.compile(r"\]\((?P<path>(?:\.\./)+[^()\s#]+)(?P<anchor>#[^()\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Returns the page with its outward links rewritten; one without a target stays, and the strict build names it."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def rewrite(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link["path"]))
        if path.startswith("docs/") or not (_ROOT / path).exists():
            return link.group()
        kind = "tree" if (_ROOT / path).is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{path}{link['anchor'] or ''})"

    return _OUTWARD.sub(rewrite, markdown)
