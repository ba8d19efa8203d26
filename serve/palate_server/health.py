"""`python -m palate_server.health`: checks this container's service, exit code 0 or 1. Knows ready.json, no engine."""

from __future__ import annotations

import os
import sys
import urllib.request
from pathlib import Path

from palate_recipes.specs.serve import READY_FILE, Ready

_TIMEOUT_S = 5.0


def main() -> int:
    """Returns 0 if all services that are ready answer `GET /health`, 1 if none is ready or one does not answer."""
    home = Path(os.environ.get("PALATE_HOME") or Path.home() / ".palate")
    files = sorted((home / "work" / "services").glob(f"*/*/{READY_FILE}"))
    if not files:
        print("not ready: the engine has not answered yet", file=sys.stderr)
        return 1
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for file in files:
        url = f"{Ready.read(file).endpoint}/health"
        try:
            with opener.open(url, timeout=_TIMEOUT_S):
                print(f"{url} answers")
        except OSError as error:
            print(f"{url} does not answer: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
