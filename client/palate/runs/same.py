"""Tells whether a run that a store has is the one that would be started now. Knows manifests, no store and no recipe.

Some runs have a name made from digests, so that the same question finds the run that answers it. Anybody who can write to the store
can compute such a name and write another manifest under it. So the manifest counts, not the name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from msgspec.structs import replace

from palate_recipes.specs.codec import encode
from palate_recipes.specs.evaluation import EvaluationSpec
from palate_recipes.specs.train import InputFile, TrainSpec
from palate_recipes.trackers import variables

_SHOWN = 5
_ABSENT = object()


def same_training(found: TrainSpec, own: TrainSpec, *, backends: tuple[str, str]) -> str:
    """Returns how a stored training differs from the caller's own, in words; "" if both train the same in the same way.

    Compared is all that a result depends on, and what a program is started with: model and source, method, hyperparameters, precision,
    the data's digests, placement, names of environment variables. Limits of time and attempts may differ.

    Args:
        found: The body of the manifest in the store.
        own: The body that the caller would write. The URIs of its inputs do not matter.
        backends: Names of the backend in the store and of the caller's.
    """
    return _differences(
        {"backend": backends[0], **_builtins(_essence(found))}, {"backend": backends[1], **_builtins(_essence(own))}
    )


def same_evaluation(found: EvaluationSpec, own: EvaluationSpec, *, backends: tuple[str, str]) -> str:
    """Returns how a stored evaluation differs from the caller's own, apart from its data; "" if it does not.

    Args:
        found, own, backends: As in `same_training`.
    """
    blank = InputFile(uri="")
    return _differences(
        {"backend": backends[0], **_builtins(replace(found, data=blank))},
        {"backend": backends[1], **_builtins(replace(own, data=blank))},
    )


def _essence(body: TrainSpec) -> TrainSpec:
    inputs = {
        channel: InputFile(
            uri="", sha256=one.sha256, bytes=one.bytes, rows=one.rows, skipped_rows=one.skipped_rows or None
        )
        for channel, one in body.inputs.items()
    }
    # Notes depend on the free memory, and what was given is in the hyperparameters too.
    # Variables of trackers are taken from whatever shell it is, and change no result.
    report_to = body.hyperparameters.report_to
    trackers = variables(report_to, dict.fromkeys(body.environment_names, ""))
    names = tuple(name for name in body.environment_names if name not in trackers)
    return replace(
        body, notes=(), given={}, inputs=inputs, environment_names=names, max_run_time_s=None, max_attempts=1
    )


def _builtins(body: TrainSpec | EvaluationSpec) -> dict[str, Any]:
    """Returns a body as plain values, as if it had been read from a store: there a tuple is a list."""
    found: dict[str, Any] = json.loads(encode(body))
    return found


def _differences(found: dict[str, Any], own: dict[str, Any]) -> str:
    every = list(_differing("", found, own))
    more = f", and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more


def _differing(path: str, found: Any, own: Any) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(own, dict):
        for name in {**own, **found}:
            yield from _differing(f"{path}.{name}" if path else name, found.get(name, _ABSENT), own.get(name, _ABSENT))
    elif found != own:
        yield f"{_cut(path)} is {_shown(found)} instead of {_shown(own)}"


def _shown(value: Any) -> str:
    return (
        "absent" if value is _ABSENT else _cut(repr(value))
    )  # repr: it comes from a store and may have escape sequences


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
