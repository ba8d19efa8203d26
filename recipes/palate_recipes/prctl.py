"""Linux process control: end with the parent, adopt orphans. Does nothing on other systems."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None)  # opened here: between fork and exec as little as possible may happen


def die_with_parent() -> None:
    """Has the kernel kill this process when the thread that started it ends. Can be used as `preexec_fn`."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def adopt_orphans() -> None:
    """Makes this process the parent of any process below it whose own parent ends."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
