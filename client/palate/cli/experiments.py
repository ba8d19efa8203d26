"""Commands for experiments: run-experiment, compare. Know arguments and output, not how runs are planned."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palate.cli.format import Wide, say_next
from palate_recipes.errors import ConfigurationError
from palate_recipes.text import visible

if TYPE_CHECKING:
    from palate.comparison import Comparison
    from palate.experiments.execute import Planned

_Metric = Annotated[
    str | None,
    typer.Option(
        help="Rank the jobs by this: eval_loss, best_eval_loss, eval_rewards/accuracies, eval_rewards/margins, "
        "eval_mean_token_accuracy, final_loss, win_rate, tokens_per_s or seconds. Default: eval_loss if a job has it."
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Csv = Annotated[bool, typer.Option("--csv", help="Print CSV, with unrounded figures.")]


def run_experiment(
    file: Annotated[str, typer.Argument(help="YAML file of experiments; see docs/experiments.md.")],
    experiment_id: Annotated[str | None, typer.Argument(metavar="ID", help="Id of the experiment in it.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, list the runs and estimate the first; start nothing.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of jobs at a time. Default: the file's, else 1.")
    ] = None,
    metric: _Metric = None,
    store: Annotated[
        str | None, typer.Option(help="Folder or bucket for the jobs. Default: the file's, else PALATE_STORE.")
    ] = None,
    as_json: _Json = False,
    as_csv: _Csv = False,
    wide: Wide = False,
) -> None:
    """Run an experiment of a file: one training or a sweep.

    Runs that the store has are not trained again; failed ones are resumed. Ctrl-C leaves the started jobs running.
    """
    from palate.experiments import ExperimentFile
    from palate.session import Session

    if experiment_id is None:
        ids = list(ExperimentFile.load(file).experiments)
        raise ConfigurationError(f"which experiment? {file} has {', '.join(ids)}: `palate run-experiment FILE ID`")
    experiment = ExperimentFile.load(file, experiment_id)
    session = Session(store=store) if store else None
    if dry_run:
        from palate.comparison import check_metric

        check_metric(metric or "")
        _print_plan(experiment, session, as_json=as_json, wide=wide)
        return
    result = experiment.run(session=session, jobs=jobs, metric=metric or "")
    _print(result.comparison, as_json=as_json, as_csv=as_csv, wide=wide)
    if result.model_copy:
        print(visible(f"copied to {result.model_copy}"), file=sys.stderr)
    if result.failed:
        for run in result.failed:
            name = run.job.id if run.job else "a run"
            print(visible(f"error: {name} is {run.state}: {run.reason}"), file=sys.stderr)
        print(f"{len(result.failed)} of {len(result.runs)} runs have no model", file=sys.stderr)
        given = [("--jobs", jobs), ("--metric", metric), ("--store", store)]
        options = [str(part) for name, value in given if value is not None for part in (name, value)]
        say_next("run-experiment", file, experiment_id, *options)
        raise typer.Exit(1)
    where = store or experiment.store
    if not result.has_best:
        why = result.comparison.note or f"none has {result.comparison.metric}"
        print(f"no run is the best: {why}", file=sys.stderr)
        say_next("compare", *(run.job.id for run in result.runs if run.job), store=where)
        return
    say_next("deploy" if result.comparison.is_ranked else "show", result.best.id, store=where)


def compare(
    names: Annotated[list[str], typer.Argument(metavar="JOB...", help="Ids or URIs of jobs.")],
    metric: _Metric = None,
    as_json: _Json = False,
    as_csv: _Csv = False,
    wide: Wide = False,
) -> None:
    """Compare jobs: the settings that differ, and what came out.

    Best job first. Data is compared by its digest.
    """
    from palate.comparison import compare

    comparison = compare(names, metric=metric or "")
    _print(comparison, as_json=as_json, as_csv=as_csv, wide=wide)
    best = comparison.jobs[0]
    say_next("deploy" if best.state == "Succeeded" and comparison.is_ranked else "show", best.id)


def _print(comparison: Comparison, *, as_json: bool, as_csv: bool, wide: bool) -> None:
    if as_json and as_csv:
        raise ConfigurationError("as_json and as_csv: give only one of them")
    if as_json:
        print(json.dumps(comparison.as_dict(), indent=1))
    elif as_csv:
        print(comparison.to_csv(), end="")
    else:
        from palate.ui.terminal import Column, print_table

        kept = ("job", "state", comparison.metric, *comparison.varied)
        # Versions and digests are left out first where there is little room, then the figures that rank nothing.
        columns = [
            Column(name, 0 if name in kept else 3 if " " in name else 2 if name in comparison.differing else 1)
            for name in comparison.columns
        ]
        print_table(columns, comparison.cells(), wide=wide)
    if comparison.note:
        print(visible(f"note: {comparison.note}"), file=sys.stderr)


def _print_plan(experiment: Any, session: Any, *, as_json: bool, wide: bool) -> None:
    """Lists the runs of an experiment and prints an estimate of the first that is not trained yet."""
    from palate.cli.train import print_estimate
    from palate.experiments.execute import planned_runs, prepared
    from palate.ui.terminal import print_table

    with prepared(experiment, session) as plans:
        for warning in experiment.warnings:
            print(visible(f"warning: {warning}"), file=sys.stderr)
        found: list[Planned] = planned_runs(plans)
        if as_json:
            rows = [{"job": plan.name, "state": plan.state, "settings": plan.run.varied} for plan in found]
            print(json.dumps(rows, indent=1))
        else:
            names = list(dict.fromkeys(name for plan in found for name in plan.run.varied))
            print_table(
                ["job", "state", *names],
                [[plan.name, plan.state, *(plan.run.varied.get(name, "") for name in names)] for plan in found],
                wide=wide,
            )
        if experiment.search != "grid":
            print(f"{experiment.trials} runs; the values of the others depend on results", file=sys.stderr)
        new = next((plan for plan in found if plan.state == "new"), None)
        if new is None:
            what = "all runs are" if experiment.search == "grid" else "the first run is"
            print(f"{what} in the store", file=sys.stderr)
        elif not as_json:
            print_estimate(new.recipe.estimate(new.inputs, job_name=new.name))


def register(app: typer.Typer) -> None:
    """Adds these commands to the command line: `compare` also as `runs compare`."""
    app.command("run-experiment")(run_experiment)
    app.command()(compare)
    runs = typer.Typer(help="Compare runs.", no_args_is_help=True, rich_markup_mode=None)
    runs.callback()(_group)
    runs.command()(compare)
    app.add_typer(runs, name="runs")


def _group() -> None:
    """Commands for several runs at once."""
