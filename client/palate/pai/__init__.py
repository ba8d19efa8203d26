"""Runs scripts and notebooks written for PAI's SDK without an edit. Knows PAI's names, no training and no store.

`palate run script.py` does it for a script. In a notebook: `%load_ext palate.pai`, or `import palate.pai;
palate.pai.install()`, before the first import of `pai`.
"""

from __future__ import annotations

from palate.pai.finder import install, uninstall
from palate.pai.names import PaiAttributeError, PaiNameError

__all__ = ["PaiAttributeError", "PaiNameError", "install", "uninstall"]


def load_ipython_extension(ipython: object) -> None:
    """`%load_ext palate.pai`; see `install`."""
    install()


def unload_ipython_extension(ipython: object) -> None:
    """`%unload_ext palate.pai`; see `uninstall`."""
    uninstall()
