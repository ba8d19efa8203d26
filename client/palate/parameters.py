"""Rejects parameters that a function does not have, or that have no meaning here. Knows names and reasons, no job and no session."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import PurePath
from types import FunctionType
from typing import Any, TypeVar, cast

from palate_recipes.errors import UnsupportedParameterError
from palate_recipes.text import did_you_mean, nearest

T = TypeVar("T")

_NO_MEANING = {
    "source_dir": "the training program is Palate's own; its behaviour is set by hyperparameters",
    "command": "the training program is Palate's own; its behaviour is set by hyperparameters",
    "requirements": "the training program runs in a pinned environment: add packages to the environment or the image",
    "job_type": "every training is one job of one program",
    "spot_spec": "the backend decides where a run is placed, and has no spot market",
    "resource_id": "the backend decides where a run is placed: choose backend=",
    "resource_type": "the backend decides where a run is placed: choose backend=",
    "user_vpc_config": "Palate uses endpoints, not Alibaba's networks",
    "network": "Palate uses endpoints, not Alibaba's networks: give oss_endpoint instead",
    "experiment_config": "metrics and TensorBoard files are stored with the job: see job.metrics() and job.output_path('tensorboard')",
    "input_channels": "the channels are fixed: recipe.input_channels lists them",
    "output_channels": "outputs are fixed: recipe.output_channels lists them; see job.output_path()",
    "outputs": "outputs are stored in the job's folder: see job.output_path(), and Session(store=…) to choose the store",
    "service_type": "every service answers requests as they come",
    "serializer": "predict() and raw_predict() use JSON",
    "inference_method": "a model is served in one way; options= sets engine, port and limits",
    "inference_spec": "the job determines what a service runs; options= sets engine, port and limits",
}
"""Parameters in PAI's signatures."""

_NO_API = "it is for requests to Alibaba's API, which Palate does not call"
_CATALOG = "the facts of a model come from the catalog: see RegisteredModel.row"
_OTHER_REQUESTS = "send such requests with an HTTP client of your own to predictor.endpoint, see predictor.access_token"
_SESSION = {"header": _NO_API, "runtime": _NO_API}
_DEPLOY = {
    "labels": "Palate sets a service's labels, see predictor.labels; labels= of a recipe are recorded with its jobs"
}
_OPENAI = {
    "base_url": "the client is one for this service; url_suffix= is the path below its endpoint",
    "api_key": "the client sends the service's own token",
}

_KEYWORDS: dict[str, dict[str, str]] = {
    "Session": _SESSION,
    "setup_default_session": _SESSION,
    "ModelTrainingRecipe": {
        "settings": "it is for PAI's training service; a training is set by hyperparameters",
        "supported_instance_type": "the backend decides where a run is placed: choose backend=",
    },
    "ModelTrainingRecipe.deploy": _DEPLOY,
    "RegisteredModel": {"model_info": _CATALOG, "model_version_info": _CATALOG},
    "RegisteredModel.deploy": _DEPLOY,
    "TrainingJob.deploy": _DEPLOY,
    "Predictor.openai": _OPENAI,
    "Predictor.async_openai": _OPENAI,
    "Predictor.raw_predict": {
        "params": "append the query to path=, such as '/v1/models?limit=1'",
        "stream": "openai() reads streams: client.chat.completions.create(..., stream=True)",
        "cookies": "set them by headers=",
        "files": "a request has one body, data=",
        **dict.fromkeys(("allow_redirects", "auth", "cert", "hooks", "proxies", "verify"), _OTHER_REQUESTS),
    },
}
"""Keywords that PAI's functions take through `**kwargs`, and that are not in `_NO_MEANING`. Others are misspelt."""

_WORDS = "key|token|secret|passw|credential|auth|cookie|cert|bearer"
_SECRET = re.compile(_WORDS, re.IGNORECASE)
_SECRET_IN_TEXT = re.compile(rf"((?:{_WORDS})[\w-]*[=:\s]+).*", re.IGNORECASE | re.DOTALL)  # `--token=abc` in a command
_USER_IN_URL = re.compile(r"//[^/\s]*@")
_HAS_KEYWORDS = 0x08  # inspect.CO_VARKEYWORDS: the function has **kwargs


def refuse(**parameters: object) -> None:
    """Rejects the parameters that were given.

    Args:
        parameters: Values by name, from the names in `_NO_MEANING`; None if not given.

    Raises:
        UnsupportedParameterError: Has the parameter, its value, and why Palate does not support it.
    """
    for name, value in parameters.items():
        if value is not None:
            raise UnsupportedParameterError(_unsupported(name, value, _NO_MEANING[name]))


def reject_unknown_keywords(target: T) -> T:
    """Decorates a function, or the constructor and all public methods of a class: they reject keywords that they do not have.

    Python's own error does not say what to use instead. Signatures stay as written, for `help()`, `inspect` and type checkers.

    Raises:
        UnsupportedParameterError: On a call. Has the keyword, its value, and the remedy.
    """
    if not isinstance(target, type):
        function = cast(FunctionType, target)
        return cast(T, _checked(function, function.__name__))
    for name, value in list(vars(target).items()):
        if name.startswith("_") and name != "__init__":
            continue
        what = target.__name__ if name == "__init__" else f"{target.__name__}.{name}"
        if isinstance(value, FunctionType):
            setattr(target, name, _checked(value, what))
        elif isinstance(value, classmethod):
            setattr(target, name, classmethod(_checked(cast(FunctionType, value.__func__), what)))
    return target


def _checked(function: FunctionType, what: str) -> Callable[..., Any]:
    code = function.__code__
    accepted = frozenset(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    refused = frozenset(_KEYWORDS.get(what, ()))
    takes_any = bool(code.co_flags & _HAS_KEYWORDS)

    @wraps(function)
    def checked(*arguments: Any, **keywords: Any) -> Any:
        if keywords and (refused & keywords.keys() if takes_any else not accepted.issuperset(keywords)):
            check_keywords(what, keywords, accepted | keywords.keys() - refused if takes_any else accepted)
        return function(*arguments, **keywords)

    return checked


def check_keywords(what: str, given: Mapping[str, object], accepted: Iterable[str]) -> None:
    """Rejects the keywords of a call that its function does not accept.

    Args:
        what: The function, as in `Predictor.deploy`; a class for its constructor.
        given: The call's keywords.
        accepted: Names of all parameters.

    Raises:
        UnsupportedParameterError: Has each such keyword, its value, and the remedy.
    """
    accepted = set(accepted)
    reasons = {**_NO_MEANING, **_KEYWORDS.get(what, {})}
    known = sorted(name for name in accepted if name not in ("self", "cls") and name[0] != "_")
    problems = []
    for name, value in given.items():
        if name in accepted:
            continue
        if name in reasons:
            problems.append(_unsupported(name, value, reasons[name]))
            continue
        meant = nearest(name, known) or ""
        valid = ", ".join(one for one in known if one not in _NO_MEANING)
        remedy = did_you_mean(name, known).strip() or (f"valid parameters: {valid}" if valid else "it has none")
        problems.append(f"{what}() has no parameter {name[:60]}={_shown(value, name, meant)}: {remedy}")
    if problems:
        raise UnsupportedParameterError("\n".join(problems))


def _unsupported(name: str, value: object, reason: str) -> str:
    return f"{name}={_shown(value, name)} is not supported by Palate: {reason}. Omit it"


def _shown(value: object, *names: str) -> str:
    """Returns a value for a message: short, and without what may be a secret.

    Args:
        value: The value.
        names: Its name, and what that may be a misspelling of.
    """
    if any(_SECRET.search(name) for name in names):
        return "..."
    if isinstance(value, Mapping):  # such as headers or environment variables
        keys = [f"{str(key)[:20]!r}: ..." for key in list(value)[:3]]
        return "{" + ", ".join([*keys, *(["..."] if len(value) > 3 else [])]) + "}"
    if isinstance(value, list | tuple):
        items = ["[...]" if isinstance(item, list | tuple) else _shown(item) for item in value[:3]]  # no cycles
        return "[" + ", ".join([*items, *(["..."] if len(value) > 3 else [])]) + "]"
    if isinstance(value, str | PurePath):
        text = _SECRET_IN_TEXT.sub(r"\1...", _USER_IN_URL.sub("//...@", str(value)[:1000]))
        return repr(text if len(text) <= 60 else f"{text[:57]}...")
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 10**20):
        return repr(value)
    return f"<{type(value).__name__}>"
