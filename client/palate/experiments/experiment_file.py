"""Reads files of experiments. Knows their keys and the arguments of a recipe, not how runs are started.

An experiment is a mapping by id with the arguments of `ModelTrainingRecipe`; `defaults` is merged into each. Files in the form of GDP
Labs' gllm-training (`spreadsheet_id`, `dpo_column_mapping_config`) are read too: `palate.experiments.gllm_form` translates them.
All problems of a file are reported at once, each with its line.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from palate.common.utils import check_name
from palate.comparison import EVALUATION_METRICS, METRICS
from palate.env_file import is_credential
from palate.experiments.gllm_form import is_gllm_form, translate
from palate.experiments.sweep import MOST_RUNS, Axes, SweepError, add_axis, clashes
from palate.experiments.yaml_tree import Node, read_tree
from palate.parameters import reject_unknown_keywords
from palate_recipes.errors import ConfigurationError, HyperparameterError
from palate_recipes.hyperparameters import HYPERPARAMETERS, known_name, shorten, validate
from palate_recipes.recipe_file import CHANNELS, beside
from palate_recipes.schema import METHODS
from palate_recipes.text import did_you_mean

if TYPE_CHECKING:
    from palate.experiments.execute import ExperimentResult
    from palate.session import Session

Search = Literal["grid", "random", "tpe"]

_TEXTS = ("model_name", "model_version", "model_provider", "model_uri", "method", "instance_type", "store", "metric")
_COUNTS = ("max_run_time", "max_attempts", "instance_count", "trials", "search_seed", "jobs")
_MAPPINGS = ("hyperparameters", "inputs", "labels")
KEYS = (*_TEXTS, *_COUNTS, *_MAPPINGS, "environments", "search")
_SWEPT = ("model_name", "model_version", "model_uri", "method")
_DATA_KEYS = ("uri", "format", "input_columns", "label_columns", "prompt_template", "prompt_name")
_MOST_TRIALS = 500
_MOST_JOBS = 64

_SECRET_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{12,}|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|://[^/\s@:]*:[^/\s@]+@"
)
_COLUMN_KEYS = ("input_columns", "label_columns", "column_mapping_config", "dpo_column_mapping_config")
"""Mappings whose keys are the user's own names."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of an experiment.

    Attributes:
        arguments: Arguments of `ModelTrainingRecipe`, without hyperparameters and labels.
        hyperparameters: As given, validated together.
        varied: What this run has of its own in a sweep.
    """

    arguments: dict[str, Any]
    hyperparameters: dict[str, Any]
    varied: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment of a file, checked; its data is checked when it runs.

    Attributes:
        id: Its key in the file.
        file: The file.
        arguments: Arguments of `ModelTrainingRecipe` that all runs share, without hyperparameters and labels.
        inputs: Data by channel: a path or URI, or arguments of `PreferenceData`. Paths are absolute.
        labels: Recorded with each job.
        environments: Names of environment variables of the training program; their values come from this process.
        axes: The hyperparameters and what a sweep varies.
        search: `grid` runs all combinations, `random` and `tpe` choose from ranges and lists.
        trials: Number of runs of a search.
        search_seed: Seed of a search.
        metric: What ranks the runs, see `palate.comparison.METRICS`; "" for the default.
        jobs: Number of jobs at a time.
        store: The session's store, or None.
        upload: Folder that the best model is copied to, with the job's id appended; "" for none.
        warnings: What has no meaning or no effect in Palate, one line each.
    """

    id: str
    file: Path
    arguments: dict[str, Any]
    inputs: dict[str, Any]
    labels: dict[str, str]
    environments: tuple[str, ...]
    axes: Axes
    search: Search = "grid"
    trials: int = 0
    search_seed: int = 0
    metric: str = ""
    jobs: int = 1
    store: str | None = None
    upload: str = ""
    warnings: tuple[str, ...] = ()

    def runs(self) -> list[Run]:
        """Returns the runs of a grid, or the one run of an experiment without a sweep, in the file's order."""
        return [self.with_values(varied) for varied in self.axes.combinations()]

    def with_values(self, varied: Mapping[str, Any]) -> Run:
        """Returns the run with these values of its own.

        Raises:
            HyperparameterError: They contradict each other or the rest.
        """
        own = {name: value for name, value in varied.items() if name in _SWEPT}
        arguments = {**self.arguments, **own}
        given = {**self.axes.fixed, **{name: value for name, value in varied.items() if name not in _SWEPT}}
        validated = validate(given, method=arguments.get("method", "LoRA_LLM"))
        return Run(arguments=arguments, hyperparameters=validated, varied=dict(varied))

    @property
    def search_digest(self) -> str:
        """Identifies the space of a search and its seed, not its number of trials."""
        space = {
            "fixed": self.axes.fixed,
            "lists": self.axes.lists,
            "groups": self.axes.groups,
            "ranges": {name: repr(found) for name, found in self.axes.ranges.items()},
            "search": self.search,
            "seed": self.search_seed,
            # Limits of time and attempts, and the place, may change in the course of a search.
            "arguments": {name: value for name, value in self.arguments.items() if name in _SWEPT},
        }
        return hashlib.sha256(json.dumps(space, sort_keys=True, default=str).encode()).hexdigest()

    def run(
        self, *, session: Session | None = None, jobs: int | None = None, metric: str = "", show: bool = True
    ) -> ExperimentResult:
        """Trains every run that the store does not have yet, and compares all.

        A run with the same settings and data under this id is not trained again; a failed or stopped one is resumed. Ctrl-C leaves the
        started jobs running: the same call follows them.

        Args:
            session: Store and backend; default: the file's store, else the default session.
            jobs: Number of jobs at a time; default: the file's, else 1.
            metric: What ranks the runs; default: the file's.
            show: Whether to print progress to stderr.

        Returns:
            The runs and their comparison. A failed run does not end the others; `result.failed` lists it.

        Raises:
            PalateError: The first run cannot be submitted; nothing was started.
        """
        from palate.experiments.execute import run_experiment

        return run_experiment(self, session=session, jobs=jobs, metric=metric, show=show)


@reject_unknown_keywords
class ExperimentFile:
    """A file of experiments.

    Created by `ExperimentFile.load`.

    Attributes:
        path: The file.
        experiments: The experiments by id, in the file's order.
    """

    def __init__(self, path: Path, experiments: Mapping[str, Experiment]) -> None:
        self.path = path
        self.experiments = dict(experiments)

    @overload
    @classmethod
    def load(cls, path: str | Path) -> ExperimentFile: ...
    @overload
    @classmethod
    def load(cls, path: str | Path, experiment_id: str) -> Experiment: ...

    @classmethod
    def load(cls, path: str | Path, experiment_id: str | None = None) -> ExperimentFile | Experiment:
        """Reads a file and checks its experiments, or only one of them.

        Args:
            path: YAML file, see docs/experiments.md.
            experiment_id: Only this experiment.

        Raises:
            ConfigurationError: The file is missing or not valid, or no experiment has this id. Lists every problem with its line.
            MissingDependencyError: PyYAML is not installed.
        """
        root = read_tree(path)
        file = Path(path).absolute()
        reader = _Reader(file, str(path))
        reader.check_secrets(root)
        reader.finish()  # now: a message about another value around a credential would show it
        defaults = root.value.get("defaults", Node({}, 1))
        if not isinstance(defaults.value, dict):
            reader.problem(defaults, "defaults: expected a mapping with the settings that all experiments share")
            reader.finish()
        found = {key: node for key, node in root.value.items() if key != "defaults" and _is_experiment(node)}
        if experiment_id is not None and experiment_id not in found:
            raise ConfigurationError(
                f"experiment_id={experiment_id!r} is not in {path}: {did_you_mean(experiment_id, found)}it has "
                f"{', '.join(list(found)[:20]) or 'no experiment'}"
            )
        wanted = found if experiment_id is None else {experiment_id: found[experiment_id]}
        if not found:
            reader.problem(root, "has no experiment: write `my_experiment:` and its settings, indented, below it")
        for key, node in root.value.items():
            if key not in found and key != "defaults" and not node.is_used:
                reader.problem(node, f"{key}: is neither an experiment nor used by one: add model_name, or remove it")
        read = {key: reader.experiment(key, node, defaults) for key, node in wanted.items()}
        if experiment_id is not None:  # the data of an experiment that nobody runs may come later
            reader.check_files()
        reader.finish()
        experiments = {key: one for key, one in read.items() if one is not None}
        return cls(file, experiments) if experiment_id is None else experiments[experiment_id]

    def __getitem__(self, experiment_id: str) -> Experiment:
        if experiment_id not in self.experiments:
            raise ConfigurationError(
                f"experiment_id={experiment_id!r} is not in {self.path}: {did_you_mean(experiment_id, self.experiments)}it has "
                f"{', '.join(list(self.experiments)[:20])}"
            )
        return self.experiments[experiment_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self.experiments)

    def __len__(self) -> int:
        return len(self.experiments)

    def __repr__(self) -> str:
        return f"ExperimentFile({str(self.path)!r}, {', '.join(self.experiments)})"


def _is_experiment(node: Node) -> bool:
    """Whether a top-level value is an experiment, not a block that others refer to."""
    return not node.is_shared or (
        isinstance(node.value, dict) and not {"model_name", "model_uri"}.isdisjoint(node.value)
    )


class _Reader:
    """Reads the experiments of one file and collects their problems."""

    def __init__(self, file: Path, shown: str) -> None:
        self.file = file
        self.folder = file.parent
        self._shown = shown
        self._data_uris: list[tuple[Node, str, str]] = []
        self._problems: dict[str, int] = {}  # a problem in `defaults` would be reported by each experiment

    def problem(self, node: Node | int, what: str) -> None:
        line = node if isinstance(node, int) else node.line
        self._problems[f"{self._shown}:{line}: {what}"] = line

    def check_files(self) -> None:
        """Notes local data files that are missing."""
        for node, name, uri in self._data_uris:
            if "://" not in uri and not glob.has_magic(uri) and not os.path.exists(os.path.expanduser(uri)):
                self.problem(node, f"{name} = {shorten(node.plain)}: {uri} does not exist; check the path")

    def finish(self) -> None:
        if self._problems:
            lines = sorted(self._problems, key=lambda text: self._problems[text])
            count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
            raise ConfigurationError(f"{count} in the experiment file:\n  " + "\n  ".join(lines))

    def check_secrets(self, node: Node, key: str = "", *, are_columns: bool = False) -> None:
        """Rejects credentials anywhere in the file. No message has their value."""
        if isinstance(node.value, dict):
            columns = are_columns or key in _COLUMN_KEYS
            for name, item in node.value.items():
                self.check_secrets(item, name, are_columns=columns)
        elif isinstance(node.value, list):
            for item in node.value:
                self.check_secrets(item, key, are_columns=True)
        elif node.value not in (None, "", True, False) and (
            (not are_columns and is_credential(key))
            or (isinstance(node.value, str) and _SECRET_VALUE.search(node.value))
        ):
            self.problem(
                node,
                f"{key}: a file must not contain credentials. Remove the value and set it in the environment; `environments: "
                "[NAME]` passes a variable to the training program",
            )

    def experiment(self, key: str, node: Node, defaults: Node) -> Experiment | None:
        if not isinstance(node.value, dict):
            self.problem(
                node, f"{key}: is {_kind(node.value)}, not a mapping with model_name, hyperparameters and inputs"
            )
            return None
        try:
            check_name("the experiment's id", key)
        except ConfigurationError as error:
            self.problem(node, str(error))
        entries = _merged(defaults.value, node.value)
        warnings: list[tuple[int, str]] = []
        upload = ""
        if is_gllm_form(entries):
            translated = translate(entries, self.problem, lambda line, what: warnings.append((line, what)))
            entries, upload = translated.entries, translated.upload
        for name, item in entries.items():
            if name not in KEYS:
                self.problem(item, self._unknown(name, item))
        values = {name: self._checked(name, entries[name]) for name in KEYS if name in entries}
        search = values.get("search", "grid")
        axes, arguments = self._axes(entries, warnings, is_grid=search == "grid"), {}
        for name in ("model_name", "model_version", "model_provider", "model_uri", "method", "instance_type"):
            if name in values and name not in axes.lists:
                arguments[name] = values[name]
        for name in ("max_run_time", "max_attempts", "instance_count"):
            if values.get(name) is not None:
                arguments[name] = values[name]
        if not any(name in arguments or name in axes.lists for name in ("model_name", "model_uri")):
            self.problem(node, f"{key}: no model: add model_name (`palate models` lists them) or model_uri")
        if "model_uri" in arguments:
            arguments["model_uri"] = beside(self.folder, arguments["model_uri"])
        if "model_uri" in axes.lists:
            axes.lists["model_uri"] = [beside(self.folder, uri) for uri in axes.lists["model_uri"]]
        inputs = self._inputs(key, node, entries.get("inputs"))
        self._check_search(
            key,
            entries,
            axes,
            search,
            metric=values.get("metric") or "",
            validates="validation" in inputs,
        )
        experiment = Experiment(
            id=key,
            file=self.file,
            arguments=arguments,
            inputs=inputs,
            labels=self._labels(entries.get("labels")),
            environments=self._environments(entries.get("environments")),
            axes=axes,
            search=search,
            trials=values.get("trials") or 0,
            search_seed=values.get("search_seed") or 0,
            metric=values.get("metric") or "",
            jobs=values.get("jobs") or 1,
            store=beside(self.folder, values["store"]) if values.get("store") else None,
            upload=upload,
            warnings=tuple(f"{self._shown}:{line}: {what}" for line, what in sorted(warnings)),
        )
        self._check_runs(experiment, entries.get("hyperparameters", node))
        return experiment

    def _unknown(self, name: str, node: Node) -> str:
        if name in CHANNELS:
            return f"{name} = {shorten(node.plain)}: belongs under inputs: `inputs: {{{name}: …}}`"
        if name in HYPERPARAMETERS or known_name(name):
            return f"{name} = {shorten(node.plain)}: belongs under hyperparameters: `hyperparameters: {{{known_name(name)}: …}}`"
        return (
            f"{name[:60]} = {shorten(node.plain)}: unknown key; {did_you_mean(name, KEYS)}valid keys: {', '.join(KEYS)}"
        )

    def _checked(self, name: str, node: Node) -> Any:
        value = node.value
        if name in _SWEPT and isinstance(value, list):
            return None  # an axis
        if name in _TEXTS and not (isinstance(value, str) and value):
            self.problem(node, f"{name} = {shorten(node.plain)}: expected a text")
            return None
        if name in _COUNTS:
            least = 0 if name == "search_seed" else 1
            most = {"trials": _MOST_TRIALS, "jobs": _MOST_JOBS}.get(name, 2**31 - 1)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                self.problem(node, f"{name} = {shorten(node.plain)}: expected a whole number from {least} to {most}")
                return None
        if name == "method" and value not in (*METHODS, "Standard"):
            hint = did_you_mean(value, METHODS)
            self.problem(node, f"method = {shorten(value)}: unknown; {hint}use one of {', '.join(METHODS)}")
        if name == "metric" and value not in METRICS:
            hint = did_you_mean(value, METRICS)
            self.problem(node, f"metric = {shorten(value)}: unknown; {hint}use one of {', '.join(METRICS)}")
        if name == "search" and value not in ("grid", "random", "tpe"):
            self.problem(node, f"search = {shorten(node.plain)}: expected grid, random or tpe")
            return "grid"
        if name in _MAPPINGS and not isinstance(value, dict):
            self.problem(node, f"{name} = {shorten(node.plain)}: expected a mapping")
        return value

    def _axes(self, entries: Mapping[str, Node], warnings: list[tuple[int, str]], *, is_grid: bool) -> Axes:
        axes = Axes()
        for name in _SWEPT:
            node = entries.get(name)
            if node is None or not isinstance(node.value, list):
                continue
            if not node.value or not all(isinstance(item, str) and item for item in node.plain):
                self.problem(node, f"{name} = {shorten(node.plain)}: expected a text, or a list of texts to try each")
                continue
            axes.lists[name], axes.lines[name] = node.plain, node.line
            for item in node.value:
                self._checked(name, item)
        given = entries.get("hyperparameters")
        for name, node in (given.value if given and isinstance(given.value, dict) else {}).items():
            try:
                warning = add_axis(axes, name, node)
            except SweepError as error:
                self.problem(error.line, str(error))
                continue
            if warning:
                warnings.append((node.line, warning))
            for one, value in self._single_values(axes, name):
                self._check_value(one, value, node)
        for line, what in clashes(axes):
            self.problem(line, what)
        if is_grid and axes.size > MOST_RUNS:
            self.problem(
                given or 1,
                f"the sweep has {axes.size:,} combinations: at most {MOST_RUNS:,} are run; use search: random",
            )
        return axes

    def _single_values(self, axes: Axes, name: str) -> list[tuple[str, Any]]:
        if name in axes.groups:
            return [(one, value) for mapping in axes.groups[name] for one, value in mapping.items()]
        if name in axes.lists:
            return [(name, value) for value in axes.lists[name]]
        return [(name, axes.fixed[name])] if name in axes.fixed else []

    def _check_value(self, name: str, value: Any, node: Node) -> None:
        row = HYPERPARAMETERS.get(name)
        try:
            if row is None:
                validate({name: value}, method="LoRA_LLM")
            else:
                row.parse(value)
        except HyperparameterError as error:  # an unknown name, with a suggestion
            self.problem(node, str(error).partition("\n  ")[2])
        except ValueError as error:
            self.problem(node, f"{name} = {shorten(value)}: {error}")

    def _inputs(self, key: str, node: Node, given: Node | None) -> dict[str, Any]:
        if given is None:
            self.problem(node, f"{key}: no training data: add `inputs: {{train: <path or URI>}}`")
            return {}
        if not isinstance(given.value, dict):
            return {}  # reported already
        found: dict[str, Any] = {}
        for channel, item in given.value.items():
            if channel not in CHANNELS:
                hint = did_you_mean(channel, CHANNELS)
                self.problem(item, f"inputs.{channel[:60]}: unknown channel; {hint}known are {', '.join(CHANNELS)}")
            elif isinstance(item.value, str) and item.value:
                found[channel] = beside(self.folder, item.value)
                if channel != "adapter":
                    self._data_uris.append((item, f"inputs.{channel}", found[channel]))
            elif isinstance(item.value, dict) and channel != "adapter":
                found[channel] = self._data(channel, item)
            else:
                self.problem(
                    item,
                    f"inputs.{channel} = {shorten(item.plain)}: expected a path or URI, or a mapping with uri, input_columns and "
                    "label_columns",
                )
        if "train" not in given.value:
            self.problem(given, "inputs: no training data: add `train: <path or URI>`")
        return found

    def _data(self, channel: str, node: Node) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, item in node.value.items():
            if name not in _DATA_KEYS:
                hint = did_you_mean(name, _DATA_KEYS)
                self.problem(
                    item, f"inputs.{channel}.{name[:60]}: unknown key; {hint}valid keys: {', '.join(_DATA_KEYS)}"
                )
            elif name in ("input_columns", "label_columns"):
                if not isinstance(item.value, dict) or not all(_is_column(one) for one in item.plain.values()):
                    self.problem(item, f"inputs.{channel}.{name} = {shorten(item.plain)}: expected names and columns")
                values[name] = item.plain
            elif not (isinstance(item.value, str) and item.value):
                self.problem(item, f"inputs.{channel}.{name} = {shorten(item.plain)}: expected a text")
            else:
                values[name] = beside(self.folder, item.value) if name in ("uri", "prompt_template") else item.value
                if name == "uri":
                    self._data_uris.append((item, f"inputs.{channel}.uri", values[name]))
        if "uri" not in node.value:
            self.problem(node, f"inputs.{channel}: has no uri: add the path or URI of the data")
        return values

    def _labels(self, node: Node | None) -> dict[str, str]:
        if node is None or not isinstance(node.value, dict):
            return {}
        for name, item in node.value.items():
            if not isinstance(item.value, str):
                self.problem(item, f"labels.{name[:60]} = {shorten(item.plain)}: expected a text in quotes")
        return {name: str(item.plain) for name, item in node.value.items()}

    def _environments(self, node: Node | None) -> tuple[str, ...]:
        if node is None:
            return ()
        if not isinstance(node.value, list) or not all(isinstance(name, str) and name for name in node.plain):
            self.problem(
                node,
                "environments: expected a list of names, such as [HF_TOKEN]; the values come from this process's environment",
            )
            return ()
        return tuple(node.plain)

    def _check_search(
        self,
        key: str,
        entries: Mapping[str, Node],
        axes: Axes,
        search: str,
        *,
        metric: str,
        validates: bool,
    ) -> None:
        if search == "grid":
            for name in axes.ranges:
                self.problem(
                    axes.lines[name],
                    f"{name}: has a range, which a grid cannot have; add search: random or tpe, or list values",
                )
            for name in ("trials", "search_seed"):
                if name in entries:
                    self.problem(entries[name], f"{name}: belongs to search: random or tpe; remove it, or add search")
            return
        if not axes.is_sweep:
            self.problem(
                entries["search"], f"{key}: search has nothing to vary: give lists or ranges as hyperparameters"
            )
        if "trials" not in entries:
            self.problem(entries["search"], f"{key}: search needs the number of runs: add `trials: 20`")
        if metric in METRICS and (problem := search_metric_problem(metric, validates=validates)):
            self.problem(entries["metric"], problem)

    def _check_runs(self, experiment: Experiment, node: Node) -> None:
        """Checks values that depend on each other, in every run of a grid, or at both ends of a search's ranges.

        Of a search with more combinations than a grid may have, a sample is checked.
        """
        if self._problems:
            return  # their messages would repeat these
        ends = [
            {name: getattr(found, end) for name, found in experiment.axes.ranges.items()} for end in ("low", "high")
        ]
        axes = experiment.axes
        for values in axes.combinations() if axes.size <= MOST_RUNS else axes.sample(MOST_RUNS):
            for end in ends if experiment.axes.ranges else [{}]:
                try:
                    experiment.with_values({**values, **end})
                except HyperparameterError as error:
                    for line in str(error).partition("\n  ")[2].split("\n  "):
                        self.problem(node, line)


def search_metric_problem(metric: str, *, validates: bool) -> str:
    """Returns why no trial of a search would have this metric, or "".

    Args:
        metric: One of `palate.comparison.METRICS`.
        validates: Whether the trials have validation data.
    """
    if metric == "win_rate":
        return (
            "metric = 'win_rate': a search needs the metric when a trial ends, and win rates come from a later `palate eval`; "
            "use eval_loss or final_loss, and compare the jobs by win_rate afterwards"
        )
    if metric in EVALUATION_METRICS and not validates:
        return f"metric = {metric!r}: needs validation data; add `validation` to inputs, or use final_loss"
    return ""


def _merged(defaults: Mapping[str, Node], own: Mapping[str, Node]) -> dict[str, Node]:
    """Returns an experiment's entries over the defaults; the mappings among them are merged name by name."""
    entries = {**defaults, **own}
    for name in _MAPPINGS:
        there = [found[name] for found in (defaults, own) if name in found and isinstance(found[name].value, dict)]
        if len(there) == 2 and name in own:
            entries[name] = Node({**there[0].value, **there[1].value}, own[name].line)
    return entries


def _is_column(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(isinstance(one, str) for one in value.values())
    return isinstance(value, str) and bool(value)


def _kind(value: Any) -> str:
    return {list: "a list", type(None): "empty"}.get(type(value), "a single value")
