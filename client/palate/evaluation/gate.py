"""Refuses to serve a model whose evaluation does not show the required win-rate. Reads records, evaluates nothing."""

from __future__ import annotations

from palate.evaluation.record import BASE, Comparison, EvaluationRecord, read_all
from palate.evaluation.result import describe
from palate.job import TrainingJob
from palate.predictor import HasModel, ServedModel
from palate.service_adapters import same_weights
from palate_recipes.errors import ConfigurationError, WinRateError
from palate_recipes.specs.run import ServeManifest


def check_win_rate(
    job: HasModel, served: ServedModel, required: float, *, instead_of: ServeManifest | None = None
) -> None:
    """Checks the last evaluation of a model against its base, or against the model of a service.

    Models are compared by the digests of their files, so an evaluation counts for exactly the model that would be served. Passes
    if the service serves this model already.

    Args:
        job: The job.
        served: The model that would be served.
        required: Least lower end of the win-rate's 95% interval.
        instead_of: The service's manifest, for an update.

    Raises:
        ConfigurationError: `required` is out of range.
        WinRateError: There is no such evaluation, or the interval begins lower.
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
    for evaluation in read_all(record):
        found = _comparison(evaluation, served.tuned_digest or "", other)
        if found is None:
            continue
        if found.win_rate.low >= required:
            return
        raise WinRateError(
            f"{name} is not shown to be better by require_win_rate={required:g}: the 95% interval of its win-rate against {shown} "
            f"begins at {found.win_rate.low:.3f}. {describe(found)} (evaluation {evaluation.key}, judge {evaluation.judge}). More "
            f"prompts narrow the interval: {command}"
        )
    raise WinRateError(
        f"require_win_rate={required:g}: there is no evaluation of exactly this model of {name} against {shown}. {command} makes one"
    )


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
