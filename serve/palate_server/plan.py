"""Checks folders, memory and CPU, and builds an engine's command line and environment. Starts no engine.

It reports problems within milliseconds in one sentence. An engine would report them after half a minute in a traceback.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from palate_recipes.device import available_memory, cpu_has_bf16, free_gpu_memory, gpu_ids
from palate_recipes.engine_options import argument, known_table, known_version, problem
from palate_recipes.errors import BadSpec, EngineMissing, OutOfMemory
from palate_recipes.servability import (
    GIB,
    Fit,
    adapter_rank,
    changes_head,
    choose,
    fit,
    servings,
    too_long,
    vllm_lora_rank,
)
from palate_recipes.specs.serve import (
    BASE_MODEL,
    TOKEN_VARIABLE,
    TUNED_MODEL,
    EngineInfo,
    ServeSpec,
    describe_engines,
    vllm_knows_more,
)
from palate_server import cpu_lora, vllm_options

logger = logging.getLogger(__name__)

KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
GPUS_VARIABLE = "CUDA_VISIBLE_DEVICES"

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".tiktoken")
_GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")
"""Tags that transformers adds to Jinja."""
_TABLE_TIMEOUT_S = 120.0
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_HEADER_LIMIT_BYTES = 100_000_000
"""Of a safetensors file, as its format sets it."""


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """Engine settings that are not in the spec.

    Attributes:
        engine: The engine to start.
        why: Why it is not vLLM, which is installed; else "".
        on_cpu: Whether it runs on the CPU.
        dtype: Value for `--dtype`.
        computes_in: The dtype that this is for these weights: float32, bfloat16 or float16.
        prompt_scores: Whether the engine's log-probs of a prompt are those of the whole model. They omit an adapter on the output
            head, and vLLM's own LoRA code for CPUs cannot compute them.
        lora_rank: Value for `--max-lora-rank`; None without an adapter.
        is_eager: Whether vLLM must compile nothing.
        tokenizer_dir: Folder of the tokenizer and chat template used in training.
        kv_cache_gib: Size of vLLM's KV cache on a CPU.
    """

    engine: EngineInfo
    why: str
    on_cpu: bool
    dtype: str
    computes_in: str
    prompt_scores: bool
    lora_rank: int | None
    tokenizer_dir: Path
    kv_cache_gib: int
    is_eager: bool


def check(spec: ServeSpec) -> EnginePlan:
    """Returns the plan for a spec.

    Raises:
        BadSpec: A folder is missing or incomplete, or the engine cannot serve it.
        EngineMissing: The engine is not installed.
        OutOfMemory: The weights do not fit into free memory.
    """
    installed = _installed(spec)
    if all(engine.name == "transformers" for engine in installed):
        _no_engine_args(spec)
    tuned = Path(spec.model_dir)
    weights_dir = Path(spec.base_model_dir) if spec.base_model_dir else tuned
    adapter = _adapter(spec)
    config = _model_config(weights_dir, "base_model_dir" if adapter else "model_dir")
    if adapter and (problem := _other_base(tuned, spec.base_model_dir)):
        raise BadSpec(f"model_dir {tuned}: {problem}")
    engine, why = _choose(spec, installed, config, adapter)
    if engine.name == "transformers":
        _no_engine_args(spec, why)
    if problem := too_long(config, spec.max_model_len):
        raise BadSpec(problem)
    tokenizer_dir = next((d for d in (tuned, weights_dir) if _has_any(d, _TOKENIZER_FILES)), None)
    if tokenizer_dir is None:
        raise BadSpec(
            f"{tuned} has no tokenizer (no {' or '.join(_TOKENIZER_FILES[:2])}): save the tokenizer in the same folder"
        )
    if spec.chat_template:
        tokenizer_dir = _with_template(spec, tokenizer_dir)
    if engine.name == "vllm":
        _check_options(spec, engine, adapter)
    fitting = _fit(spec, engine, weights_dir, config, adapter_dir=tuned if adapter else None)
    return EnginePlan(
        engine=engine,
        why=why,
        on_cpu=engine.on_cpu,
        dtype=fitting.dtype,
        computes_in=_computed_dtype(engine, fitting),
        prompt_scores=adapter is None
        or engine.name != "vllm"
        or not (changes_head(adapter) or (engine.on_cpu and not cpu_lora.is_active())),
        lora_rank=None if adapter is None else _lora_rank(spec, adapter),
        tokenizer_dir=tokenizer_dir,
        kv_cache_gib=fitting.kv_cache_gib,
        # On a CPU, compilation takes a minute and gains little.
        is_eager=engine.on_cpu
        and not any(re.match("--no-enforce[-_]eager|-O|--optimi[sz]ation", arg) for arg in spec.engine_args),
    )


def _installed(spec: ServeSpec) -> list[EngineInfo]:
    """Returns the engines that the spec allows and that are installed, preferred first. Raises EngineMissing if there is none."""
    engines = describe_engines()
    allowed = engines if spec.engine == "auto" else [e for e in engines if e.name == spec.engine]
    found = [engine for engine in allowed if engine.distribution is not None]
    if found:
        return found
    if spec.engine == "auto":
        ways = "; or ".join(e.remedy for e in engines)
        raise EngineMissing(f"engine='auto', but no engine is installed: {ways}")
    raise EngineMissing(
        f"engine='{spec.engine}' needs {', '.join(allowed[0].missing)}, which is missing: {allowed[0].remedy}"
    )


def _choose(
    spec: ServeSpec, installed: list[EngineInfo], config: dict[str, Any], adapter: dict[str, Any] | None
) -> tuple[EngineInfo, str]:
    """Returns the first engine that can serve the model, and why those before it cannot. Raises BadSpec if none can."""
    found = servings(
        config,
        adapter,
        versions={engine.name: engine.version for engine in installed},
        vllm_knows_more=vllm_knows_more(spec.engine_args),
        vllm_on_cpu=any(engine.cpu_build for engine in installed),
    )
    chosen, why = choose(found, [engine.name for engine in installed])
    if chosen is not None:
        return next(engine for engine in installed if engine.name == chosen.engine), why
    remedy = "serve another model"
    other = next(engine for engine in describe_engines() if engine.name == "transformers")
    if not any(one.reasons for one in found if one.engine == "transformers"):
        remedy = f"set engine='transformers', which serves it{f' ({other.remedy})' if other.remedy else ''}"
    names = " and ".join(one.name for one in found if one.engine in [engine.name for engine in installed])
    what = "model" if adapter is None else "adapter"
    raise BadSpec(f"{names} cannot serve the {what} in {spec.model_dir}: {why}. Remedy: {remedy}")


def _no_engine_args(spec: ServeSpec, why: str = "") -> None:
    if spec.engine_args:
        raise BadSpec(
            f"engine_args={' '.join(spec.engine_args)!r}, but the transformers engine accepts none: omit engine_args "
            "(--engine-arg) and the deploy options that only vLLM has, "
            + (f"since vLLM cannot serve it: {why}" if why else "or install vLLM")
        )


def _check_options(spec: ServeSpec, engine: EngineInfo, adapter: dict[str, Any] | None) -> None:
    """Raises BadSpec for an option that this vLLM rejects, or that its adapter cannot be served with."""
    if not spec.engine_args:
        return
    table = known_table() if engine.version == known_version() else _table_of_installed()
    if text := problem(spec.engine_args, table, names_are_complete=not vllm_knows_more(spec.engine_args)):
        raise BadSpec(f"engine_args: {text}")
    rank, slots = argument(spec.engine_args, "max-lora-rank"), argument(spec.engine_args, "max-loras")
    if adapter is not None and rank and int(rank) < adapter_rank(adapter):
        raise BadSpec(
            f"max_lora_rank={rank} is less than the adapter's rank: expected at least {vllm_lora_rank(adapter)}, or omit it"
        )
    if adapter is not None and engine.on_cpu and slots and int(slots) < 2:
        raise BadSpec(f"max_loras={slots}: on a CPU, vLLM needs a second, empty place for 'base': expected at least 2")


@cache  # an update does not wait for it again
def _table_of_installed() -> dict[str, Any]:
    """Returns the options of a vLLM that Palate does not know, from its own parser, which takes some seconds."""
    command = [sys.executable, "-P", "-m", vllm_options.__name__]
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TABLE_TIMEOUT_S, check=True, env=environment
        )
        table: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        last = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1:]
        raise BadSpec(
            f"the options of the installed vLLM cannot be read ({''.join(last)}), and so not checked: omit engine options, or "
            f"install vLLM {known_version()}"
        ) from error
    return table


def _with_template(spec: ServeSpec, tokenizer_dir: Path) -> Path:
    """Returns a folder with the tokenizer and the spec's chat template, which replaces all of the tokenizer's own."""
    from jinja2 import Environment, TemplateError

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", spec.chat_template))
    except TemplateError as error:
        raise BadSpec(f"chat_template is not a Jinja template ({error}): correct it, or omit it") from error
    # By its content: an update must not change what the engines of the running version read when they start again.
    digest = hashlib.sha256(f"{tokenizer_dir}\0{spec.chat_template}".encode()).hexdigest()[:12]
    folder = Path(spec.work_dir) / f"tokenizer-{digest}"
    if folder.exists():
        return folder
    draft = folder.with_suffix(".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for file in tokenizer_dir.iterdir():
        if file.is_file() and file.suffix in _TOKENIZER_SUFFIXES:
            shutil.copyfile(file, draft / file.name)
    settings = draft / "tokenizer_config.json"
    if settings.is_file():
        settings.write_text(json.dumps({**_read_json(settings), "chat_template": None}), encoding="utf-8")
    (draft / "chat_template.jinja").write_text(spec.chat_template, encoding="utf-8")
    draft.rename(folder)  # last: its existence means that it is complete
    return folder


def _adapter(spec: ServeSpec) -> dict[str, Any] | None:
    """Returns the content of adapter_config.json, or None if the spec has full weights."""
    tuned = _folder(spec.model_dir, "model_dir")
    config_file = tuned / "adapter_config.json"
    if spec.base_model_dir is None:
        if config_file.exists() and not (tuned / "config.json").exists():
            raise BadSpec(
                f"model_dir {tuned} is an adapter, but base_model_dir is None: set it to the base model's folder"
            )
        return None
    if not config_file.exists():
        raise BadSpec(
            f"model_dir {tuned} is not an adapter (no adapter_config.json), but base_model_dir is set: "
            "omit base_model_dir to serve full weights"
        )
    return _adapter_in(tuned)


def _adapter_in(folder: Path) -> dict[str, Any]:
    if not _has_any(folder, _ADAPTER_WEIGHTS):
        raise BadSpec(f"model_dir {folder} has neither {' nor '.join(_ADAPTER_WEIGHTS)}: copy one of them there")
    return _read_json(folder / "adapter_config.json")


def _model_config(folder: Path, field: str) -> dict[str, Any]:
    _folder(str(folder), field)
    if not (folder / "config.json").exists():
        raise BadSpec(f"{field} {folder} has no config.json: set it to a model folder written by save_pretrained")
    if not any(_weight_files(folder)):
        raise BadSpec(f"{field} {folder} has no weights ({' or '.join(_WEIGHTS)}): copy them there")
    return _read_json(folder / "config.json")


def _lora_rank(spec: ServeSpec, adapter: dict[str, Any]) -> int:
    if given := argument(spec.engine_args, "max-lora-rank"):
        return int(given)
    return max(vllm_lora_rank(adapter), vllm_lora_rank({"r": spec.adapters_rank}) if spec.adapters_rank else 0)


def beyond_engine(adapter_dir: Path, plan: EnginePlan, base_model_dir: str | None) -> str:
    """Returns why a running vLLM with this plan and base model cannot load an adapter; "" if it can."""
    try:
        adapter = _adapter_in(adapter_dir)
    except (BadSpec, OSError) as error:
        return str(error)
    if not (adapter_dir / _ADAPTER_WEIGHTS[0]).exists():
        return f"{adapter_dir} has no {_ADAPTER_WEIGHTS[0]}"
    rank = vllm_lora_rank(adapter)
    if plan.lora_rank is None or rank > plan.lora_rank:
        return f"its rank is {rank}, and the engines have room for {plan.lora_rank}: deploy with max_lora_rank={rank}"
    reasons = next(one.reasons for one in servings(None, adapter, vllm_on_cpu=plan.on_cpu) if one.engine == "vllm")
    return "; ".join(reasons) or _other_base(adapter_dir, base_model_dir)


def _other_base(adapter_dir: Path, base_model_dir: str | None) -> str:
    """Returns where an adapter's shapes do not fit the base, else "".

    vLLM loads a smaller adapter into a part of the base's matrices, without an error. Weights that the base has under another name
    or packed are not judged.
    """
    if base_model_dir is None or "quantization_config" in _read_json(Path(base_model_dir) / "config.json"):
        return ""
    base = {name: shape for file in _weight_files(Path(base_model_dir)) for name, shape in _shapes(file).items()}
    for name, shape in _shapes(adapter_dir / _ADAPTER_WEIGHTS[0]).items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if found is None:
            continue
        module, matrix = found.groups()
        of_base = base.get(f"{module}.weight", ())
        if not of_base and f"{re.sub(r'[.][0-9]+[.]', '.0.', module, count=1)}.weight" in base:
            return f"it was made for another base model: this one has no {module}"
        if len(of_base) == len(shape) == 2:
            # A: (rank, in), B: (out, rank), the base's: (out, in).
            has, needs = (shape[1], of_base[1]) if matrix == "A" else (shape[0], of_base[0])
            if has != needs:
                return f"it was made for another base model: {module} has {needs} features here, and {has} there"
    return ""


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes in a safetensors file, from its header; nothing if it cannot be read, because vLLM says why."""
    try:
        with file.open("rb") as content:
            size = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(size)) if size <= _HEADER_LIMIT_BYTES else {}
        return {name: tuple(map(int, facts["shape"])) for name, facts in header.items() if name != "__metadata__"}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def same_rendering(one: Path, other: Path) -> bool:
    """Whether two model folders turn a conversation into the same tokens: their tokenizers and chat templates are equal."""
    names = (*_TOKENIZER_FILES, "chat_template.jinja", "special_tokens_map.json")
    return all(_content(one / name) == _content(other / name) for name in names)


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def gpus_for(spec: ServeSpec, *, used: Sequence[str]) -> tuple[str, ...]:
    """Returns the ids of the GPUs that the next engine of a service should have; nothing where there are fewer than two.

    Args:
        spec: What it serves.
        used: Ids of the GPUs of the engines that run, each as often as it is used.
    """
    listed = os.environ.get(GPUS_VARIABLE)  # set to nothing: none
    visible = gpu_ids() if listed is None else [one.strip() for one in listed.split(",") if one.strip()]
    if len(visible) < 2:
        return ()
    options = " ".join(spec.engine_args)
    given = re.findall(r"(?:--(?:tensor|pipeline|data)[-_]parallel[-_]size|-[tpd]p)[ =](\d+)", options)
    size = max(1, math.prod(int(number) for number in given))
    return tuple(sorted(visible, key=used.count)[:size])


def _fit(spec: ServeSpec, engine: EngineInfo, folder: Path, config: dict[str, Any], *, adapter_dir: Path | None) -> Fit:
    """Returns how the model fits into the memory that is free now. Raises OutOfMemory if it does not."""
    files = [adapter_dir / name for name in _ADAPTER_WEIGHTS] if adapter_dir else []
    found = fit(
        config,
        weights_bytes=sum(file.stat().st_size for file in _weight_files(folder)),
        adapter_bytes=sum(file.stat().st_size for file in files if file.exists()) if adapter_dir else None,
        engine=engine.name,
        on_cpu=engine.on_cpu,
        free_bytes=available_memory() if engine.on_cpu else free_gpu_memory(),
        dtype=spec.dtype,
        max_model_len=spec.max_model_len,
        cpu_has_bf16=cpu_has_bf16(),
        kv_cache_gib=int(os.environ.get(KV_CACHE_VARIABLE) or 0) or None,
    )
    if not found.fits:
        assert found.free_bytes is not None  # else it fits
        raise OutOfMemory(
            f"the model in {folder} needs at least {found.needed_bytes / GIB:.1f} GiB of "
            f"{'memory' if engine.on_cpu else 'GPU memory'}, but only {found.free_bytes / GIB:.1f} GiB are free: "
            "stop other programs, set a smaller max_model_len, or use a smaller model or a larger machine"
        )
    return found


def _computed_dtype(engine: EngineInfo, fitting: Fit) -> str:
    # vLLM's `auto` rounds float32 weights to bfloat16, or to float16 where it prefers that. The coarser one is assumed.
    rounds = engine.name == "vllm" and fitting.dtype == "auto" and fitting.computes_in == "float32"
    return "bfloat16" if rounds else fitting.computes_in


def _folder(path: str, field: str) -> Path:
    if not Path(path).is_dir():
        raise BadSpec(f"{field} {path} is not a folder: set it to the model's folder")
    return Path(path)


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).exists() for name in names)


def _weight_files(folder: Path) -> list[Path]:
    """Returns the weight files in the preferred format that exists."""
    forms = (sorted(f for f in folder.glob(form) if f.name not in _ADAPTER_WEIGHTS) for form in _WEIGHTS)
    return next((files for files in forms if files), [])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadSpec(f"{path} is not valid JSON ({error}): copy the file again from the original model") from error
    if not isinstance(values, dict):
        raise BadSpec(f"{path} is not a JSON object: copy the file again from the original model")
    return values


def engine_command(
    spec: ServeSpec, plan: EnginePlan, *, spec_file: Path, socket: str, adapters: Mapping[str, str]
) -> list[str]:
    """Returns the command of an engine that serves the spec on a Unix socket.

    Args:
        spec: The spec.
        plan: Its plan.
        spec_file: File with the spec.
        socket: Path of the socket.
        adapters: Folders of the adapters to serve beside the base model, by the engine's names for them.
    """
    if plan.engine.name == "transformers":
        settings = [f"--uds={socket}", f"--dtype={plan.dtype}", f"--tokenizer={plan.tokenizer_dir}"]
        if spec.base_model_dir is not None and plan.computes_in == "float32":
            settings.append("--merge")
        return [sys.executable, "-P", "-m", "palate_server.transformers", str(spec_file), *settings]
    command = [
        *(sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"),
        *("--uds", socket, "--dtype", plan.dtype),
        "--disable-uvicorn-access-log",  # the front logs requests
    ]
    if spec.base_model_dir is not None:
        command += ["--model", spec.base_model_dir, "--served-model-name", BASE_MODEL, "--enable-lora"]
        # JSON, because the form NAME=PATH does not support "=" and "," in the path.
        named = [
            json.dumps({"name": name, "path": path, "base_model_name": BASE_MODEL}) for name, path in adapters.items()
        ]
        command += [*(["--lora-modules", *named] if named else []), "--max-lora-rank", str(plan.lora_rank)]
        command += ["--tokenizer", str(plan.tokenizer_dir)]
        if plan.on_cpu:
            # vLLM's CPU kernels index adapters with -1 for a request without one, which is the last slot. With a single slot
            # that is the tuned adapter, and `base` would answer as `default` whenever both share a batch. A second, empty
            # slot makes -1 mean no adapter, as on a GPU. A test queries both at once. Palate's plugin skips -1 by itself, but does
            # not run with every vLLM.
            command += ["--max-loras", "2"]
    else:
        command += ["--model", spec.model_dir, "--served-model-name", TUNED_MODEL]
        if spec.chat_template:  # with the model's own, the model's folder is the tokenizer's
            command += ["--tokenizer", str(plan.tokenizer_dir)]
    if spec.max_model_len is not None:
        command += ["--max-model-len", str(spec.max_model_len)]
    if plan.is_eager:
        command += ["--enforce-eager"]
    return [*command, *spec.engine_args]


def engine_environment(plan: EnginePlan, *, ipc_dir: str, sharing: int = 0) -> dict[str, str]:
    """Returns an engine's full environment: this process's, offline, without the service's tokens.

    Args:
        plan: The engine's plan.
        ipc_dir: Private folder with a short path, for the engine's own sockets and temporary files.
        sharing: Engines that divide the cores, this one included; 0: no other runs.
    """
    environment = {
        **{name: value for name, value in os.environ.items() if name not in (TOKEN_VARIABLE, "VLLM_API_KEY")},
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_RPC_BASE_PATH": ipc_dir,
        "TMPDIR": ipc_dir,  # files that an engine leaves behind are removed with this folder
        "DO_NOT_TRACK": "1",
        "VLLM_SERVER_DEV_MODE": "0",  # it would give every user vLLM's administration
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # the engine's child processes inherit it
    }
    if plan.engine.name == "vllm" and plan.lora_rank is not None:
        # The front alone can reach the engine, and it keeps these paths to itself.
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if plan.engine.name == "vllm" and plan.on_cpu:
        environment[KV_CACHE_VARIABLE] = str(plan.kv_cache_gib)
    if plan.engine.name == "vllm" and plan.is_eager:
        # --enforce-eager leaves out the model's compilation, but not that of a function that counts ranks: the first request for
        # log-probs would wait for a C++ compiler (13 s instead of 1 s on two cores).
        environment.setdefault("TORCHDYNAMO_DISABLE", "1")
    if plan.engine.name == "vllm" and not plan.is_eager and (folder := _compile_cache(plan.engine.version)):
        # The first one also has vLLM's own artefacts of torch.compile, the others what is compiled outside of the model.
        environment.setdefault("VLLM_CACHE_ROOT", str(folder / "vllm"))
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        environment.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    if plan.engine.name == "vllm" and plan.on_cpu and sharing:
        # vLLM binds its threads to all cores but the last, and each engine to the same ones: on two cores, an engine that starts
        # would wait minutes for the one that answers.
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // sharing if sharing > 1 else cores - 1)))
    package_root = Path(__file__).resolve().parents[1]
    if package_root.name not in {"site-packages", "dist-packages"}:
        # The engine and its child processes import this package too.
        search = [str(package_root), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(search)
    return environment


def _compile_cache(version: str | None) -> Path | None:
    """Returns the folder for compiled code that outlives a deploy, made if it is missing; None if it is not safe or not writable.

    It is below PALATE_HOME/cache, which is the user's own folder in a container, too.
    """
    home = Path(os.environ.get("PALATE_HOME") or Path.home() / ".palate").expanduser().absolute()
    folder = home / "cache" / "engine" / f"vllm-{version}-{_built_for()}"
    try:
        folders = (home / "cache", home / "cache" / "engine", folder)
        for one in folders:
            one.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = next(filter(None, map(_open_to_others, folders)), "") or _replaceable(home)
    except OSError as error:
        problem = f"{folder} cannot be made ({error.strerror or error})"
    if problem:
        logger.warning("the engine's compiled code is not kept for the next deploy: %s", problem)
        return None
    return folder


def _open_to_others(folder: Path) -> str:
    """Returns why another user could put code into a folder that the engine runs, or ""."""
    found = folder.stat()
    if found.st_uid != os.getuid():
        return f"{folder} belongs to another user (uid {found.st_uid}): remove it"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{folder} can be written by others: remove it, or set its mode to 0700"
    return ""


def _replaceable(home: Path) -> str:
    # The image's own home belongs to the image's user and is writable for its group, which only the container's user is in.
    mode = home.stat().st_mode
    return f"{home} can be written by everyone" if mode & stat.S_IWOTH and not mode & stat.S_ISVTX else ""


@cache
def _built_for() -> str:
    """Returns a mark of what compiled code depends on, since machines with one home, or a machine and its containers, share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    facts = (platform.machine(), features, sys.version, sys.prefix, *platform.libc_ver())
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:12]
