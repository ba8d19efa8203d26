"""Python as another machine, or another user, would run it, by the kernel's namespaces. Knows nothing of Palate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_AS_ANOTHER_USER = """
import os, sys
sys.argv = sys.argv[1:]
{imports}
os.setgroups([]); os.setgid(65534); os.setuid(65534)
{code}
"""


def on_another_machine(tmp_path: Path, code: str, *arguments: str) -> str:
    """Returns what the code prints on a machine with this one's hostname and files: its boot, installation and pids differ."""
    other = tmp_path / "other-machine"
    other.write_text("0" * 32 + "\n")
    script = (
        f"mount --bind '{other}' /proc/sys/kernel/random/boot_id && "
        f"{{ [ ! -e /etc/machine-id ] || mount --bind '{other}' /etc/machine-id; }} && exec \"$@\""
    )
    return _unshared("--mount", "--pid", "--fork", "--mount-proc", script=script, argv=["-c", code, *arguments])


def as_another_user(imports: str, code: str, *arguments: str) -> str:
    """Returns what the code prints for a user from whom this machine hides the processes of others (`hidepid=2`)."""
    whole = _AS_ANOTHER_USER.format(imports=imports, code=code)
    script = 'mount -t proc -o hidepid=2 proc /proc && exec "$@"'
    return _unshared("--mount", script=script, argv=["-c", whole, "", *arguments])


def _unshared(*options: str, script: str, argv: list[str]) -> str:
    command = ["unshare", *options, "sh", "-c", script, "sh"]
    if os.geteuid() != 0 or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("NO OTHER MACHINE: namespaces need root and unshare")
    done = subprocess.run([*command, sys.executable, *argv], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
