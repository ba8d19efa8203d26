"""Refuses to serve a model whose evaluation does not show the required win-rate. Reads records, evaluates nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from palate.evaluation.record import BASE, Comparison, EvaluationRecord, newest_first
from palate.evaluation.result import describe
from palate.evaluation.serving import answer_settings
from palate.job import TrainingJob
from palate.predictor import HasModel, ServedModel
from palate.service_adapters import same_weights
from palate.ui import note
from palate_recipes.errors import ConfigurationError, PalateError, WinRateError
from palate_recipes.specs.run import ServeManifest

LEAST_PROMPTS = 20
"""A few prompts can be hand-picked or near-duplicates, which no interval accounts for."""

MOST_FAILED = 0.05
"""Share of the prompts. Calls do not fail by chance: long answers run into the time limit, so the prompts that are left differ."""


def check_win_rate(
    job: HasModel,
    served: ServedModel,
    required: float,
    *,
    instead_of: ServeManifest | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Checks the last evaluation of a model against its base, or against the model of a service.

    Models are compared by the digests of their files, so an evaluation counts for exactly the model that would be served. Passes
    if the service serves this model already. Notes the evaluation that lets the model pass, and settings that would be served and
    differ from those of the evaluation.

    Args:
        job: The job.
        served: The model that would be served.
        required: Least lower end of the win-rate's 95% interval.
        instead_of: The service's manifest, for an update.
        options: Options of the deploy; those of an update are in the manifest.

    Raises:
        ConfigurationError: `required` is out of range.
        DamagedFilesError: An evaluation cannot be read, and may be the last one.
        WinRateError: There is no such evaluation, the interval begins lower, or it has too few prompts or too many failed ones.
    """
    if isinstance(required, bool) or not isinstance(required, int | float) or not 0 <= required <= 1:
        raise ConfigurationError(
            f"require_win_rate={required!r} is out of range: expected 0 <= require_win_rate <= 1, such as 0.55"
        )
    other, shown, argument = "", f"its base {served.model.name}", ""
    if instead_of is not None and instead_of.body.tuned_uri is not None:
        body = instead_of.body
        if body.tuned_digest == served.tuned_digest and body.tuned_digest is not None:
            return
        own = instead_of.labels.get("job", "")
        other = body.tuned_digest or "unknown"
        argument = f" {own}{f'@{body.checkpoint}' if body.checkpoint else ''}" if own else " JOB"
        shown = f"{argument.strip()}, which service {instead_of.name} serves"
    elif instead_of is not None and not same_weights(instead_of.body.model, served.model):
        other = "unknown"
        shown = f"{instead_of.body.model.name}, another base, which service {instead_of.name} serves"
    name = f"{job.id}{f'@{served.checkpoint}' if served.checkpoint else ''}"
    option = f" --checkpoint {served.checkpoint}" if served.checkpoint else ""
    command = f"`palate eval {job.id}{argument}{option} --prompts PROMPTS --judge URL/MODEL`"
    record = TrainingJob.get(job.id)._run.record if not isinstance(job, TrainingJob) else job._run.record
    for _, evaluation in newest_first(record):
        if isinstance(evaluation, PalateError):
            raise evaluation  # it may be the one that counts
        found = _comparison(evaluation, served.tuned_digest or "", other)
        if found is None:
            continue
        which = f"{describe(found)} (evaluation {evaluation.key}, judge {evaluation.judge})"
        given = found.prompts + found.failed
        if found.prompts < LEAST_PROMPTS:
            raise WinRateError(
                f"{name} is not shown to be better by require_win_rate={required:g}: its last evaluation against {shown} has only "
                f"{found.prompts} prompts, and at least {LEAST_PROMPTS} are needed. {which}. {command} with more prompts makes another"
            )
        if found.failed > MOST_FAILED * given:
            raise WinRateError(
                f"{name} is not shown to be better by require_win_rate={required:g}: in its last evaluation against {shown} "
                f"{found.failed} of {given} prompts failed, more than {MOST_FAILED:.0%}, and those that are left may be the easy ones. "
                f"{which}. The same `palate eval` again asks only what failed"
            )
        if found.win_rate.low >= required:
            if instead_of is not None:
                options = served.options_instead_of(instead_of)
            note(
                f"{name} may be served: win-rate {found.win_rate} against {shown} on {found.prompts} prompts, by evaluation "
                f"{evaluation.key} with judge {evaluation.judge}"
            )
            _note_differences(evaluation, served, options or {})
            return
        raise WinRateError(
            f"{name} is not shown to be better by require_win_rate={required:g}: the 95% interval of its win-rate against {shown} "
            f"begins at {found.win_rate.low:.3f}. {which}. More prompts narrow the interval: {command}"
        )
    raise WinRateError(
        f"require_win_rate={required:g}: this model of {name} was never evaluated against {shown}. {command} evaluates it"
    )


def _note_differences(evaluation: EvaluationRecord, served: ServedModel, options: Mapping[str, Any]) -> None:
    """Notes what the answers were made with, where it is not what would be served."""
    made = evaluation.settings.get("service")
    if not isinstance(made, dict):  # of an earlier version, which did not keep it
        return
    before = {**made, "system_prompt": evaluation.settings.get("system_prompt", "")}
    now = {**answer_settings(served, options), "system_prompt": served.system_prompt}
    differ = [name for name in sorted({*before, *now}) if (before.get(name) or "") != (now.get(name) or "")]
    if differ:
        shown = ", ".join(f"{name} {_shown(before.get(name))} instead of {_shown(now.get(name))}" for name in differ)
        note(
            f"WARNING: the win-rate is that of other settings: evaluation {evaluation.key} was made with {shown}. `palate eval` with "
            "the settings of the deploy makes one for them"
        )


def _shown(value: Any) -> str:
    return repr(str(value))[:60] if value else "the default"


def _comparison(evaluation: EvaluationRecord, digest: str, other: str) -> Comparison | None:
    """Returns the comparison of two models by their digests, "" for the base, as the first one sees it."""
    if not digest:
        return None  # a model of an early version, which has no list of files
    names = {one.digest if one.name != BASE else "": one.name for one in evaluation.models}
    first, second = names.get(digest), names.get(other)
    for one in evaluation.comparisons:
        if first is not None and second is not None and {one.first, one.second} == {first, second}:
            return one.seen_from(first)
    return None
