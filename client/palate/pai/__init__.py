"""Runs unmodified scripts and notebooks for PAI's SDK. Knows PAI's names, no training and no store.

`palate run script.py` does it for a script. In a notebook: `%load_ext palate.pai`, or `import palate.pai;
palate.pai.install()`, before the first import of `pai`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from palate.pai.finder import install, uninstall
from palate_recipes.errors import ConfigurationError, PaiAttributeError, PaiNameError

STARTUP = Path(__file__).parent / "startup"
"""Folder with the `sitecustomize` for the script's process."""


def run_script(script: str, arguments: Sequence[str]) -> NoReturn:
    """Replaces this process with Python running `script`, where `import pai` imports Palate.

    The interpreter itself starts the script, so `sys.argv`, `__main__`, stdin, tracebacks, signals and the exit code are those
    of `python script.py`. Processes that the script starts are not affected.

    Args:
        script: A file, a folder or zip file with `__main__.py`, or `-` for stdin.
        arguments: Arguments of the script, passed unchanged.

    Raises:
        ConfigurationError: The script does not exist, or is a notebook.
    """
    if script.endswith(".ipynb"):
        raise ConfigurationError(
            f"{script} is a notebook: add `%load_ext palate.pai` to its first cell and run it as usual"
        )
    if script != "-" and not os.path.exists(script):
        raise ConfigurationError(f"script {script!r} does not exist in {os.getcwd()}: check the path")
    before = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": f"{STARTUP}{os.pathsep}{before}" if before else str(STARTUP)}
    # Python would parse a name such as `-x.py` as an option.
    program = f"./{script}" if script.startswith("-") and script != "-" else script
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, program, *arguments], environment)


__all__ = ["PaiAttributeError", "PaiNameError", "install", "uninstall"]


def load_ipython_extension(ipython: object) -> None:
    """`%load_ext palate.pai`. See `install`."""
    install()


def unload_ipython_extension(ipython: object) -> None:
    """`%unload_ext palate.pai`. See `uninstall`."""
    uninstall()
