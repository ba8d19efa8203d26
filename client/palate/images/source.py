"""What an image is built from: the checkout that runs, or the installed package packed as a wheel again. Knows no engine.

Either way it is the very code that asks for the image, not what an index has under its name.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from palate.errors import ConfigurationError

_HERE = Path(__file__).parent
_NOT_IN_WHEEL = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
"""Written by the installer, about this machine."""


@dataclass(frozen=True)
class Source:
    """A build context.

    Attributes:
        folder: What the engine is given.
        revision: Commit of a checkout, with `-dirty` when files differ from it; "" for an installed package.
    """

    folder: Path
    revision: str

    def dockerfile(self, folder: str) -> Path:
        """Returns the Dockerfile of `container` or `serve`."""
        return self.folder / folder / "Dockerfile"


@contextmanager
def build_source() -> Iterator[Source]:
    """Yields the build context of this Palate, which is gone after the block unless it is a checkout.

    Raises:
        ConfigurationError: Neither a checkout nor a whole installed package.
    """
    checkout = Path(__file__).resolve().parents[3]
    if (checkout / "pyproject.toml").is_file() and (checkout / "container" / "Dockerfile").is_file():
        yield Source(checkout, _revision(checkout))
        return
    with tempfile.TemporaryDirectory(prefix="palate-image-") as scratch:
        folder = Path(scratch)
        for name in ("container", "serve"):
            if not (_HERE / name / "Dockerfile").is_file():
                raise ConfigurationError(
                    f"{_HERE / name} holds no Dockerfile: this Palate is neither a checkout nor a whole wheel; install it again"
                )
            shutil.copytree(_HERE / name, folder / name)
        pack_wheel(folder)
        yield Source(folder, "")


def pack_wheel(folder: Path) -> Path:
    """Packs the installed package into a wheel below `folder`, as it is on the disk now.

    Raises:
        ConfigurationError: It is not installed as a package.
    """
    try:
        package = distribution("palate")
    except PackageNotFoundError:
        raise ConfigurationError(
            "palate is not installed as a package: `pip install` it, or work in a checkout"
        ) from None
    wheel = folder / f"palate-{package.version}-py3-none-any.whl"
    record, listed = "", []
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(package.files or [], key=str):
            name = file.as_posix()
            outside = name.startswith("..")  # scripts: the wheel's entry points make them again
            if file.name == "RECORD":
                record = name
            if outside or file.suffix == ".pyc" or (file.name in _NOT_IN_WHEEL and ".dist-info/" in name):
                continue
            data = Path(os.fspath(file.locate())).read_bytes()
            archive.writestr(zipfile.ZipInfo(name), data)  # no times: the same code is the same wheel
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            listed.append(f"{name},sha256={digest},{len(data)}\n")
        if not record:
            raise ConfigurationError(
                f"the installed package {package.version} has no list of its files: install it again"
            )
        archive.writestr(zipfile.ZipInfo(record), "".join([*listed, f"{record},,\n"]))
    return wheel


def _revision(checkout: Path) -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return ""
    commit = git("rev-parse", "HEAD")
    return f"{commit}-dirty" if commit and git("status", "--porcelain") else commit
