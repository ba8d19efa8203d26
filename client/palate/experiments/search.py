"""Chooses the values of a search's trials with Optuna. Knows the space and results, no job.

Each trial is drawn with a seed of its own, from the search's seed and the trial's number. So a search that is interrupted and run again
draws the same values: all of a random search, and with TPE those that see the same results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from palate.experiments.sweep import Axes, Range
from palate_recipes.errors import ConfigurationError, MissingDependencyError


class Searcher:
    """A search over ranges, lists and groups.

    Args:
        axes: What is varied.
        tpe: Whether to use the tree-structured Parzen estimator (Bergstra et al., 2011), else uniform draws.
        seed: Seed of the search.
        maximize: Whether higher results are better.

    Raises:
        MissingDependencyError: Optuna is not installed.
    """

    def __init__(self, axes: Axes, *, tpe: bool, seed: int, maximize: bool) -> None:
        try:
            import optuna
        except ImportError:
            raise MissingDependencyError(
                "search: random and tpe need Optuna, which is not installed: pip install 'palate[sweep]'"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._axes = axes
        self._tpe = tpe
        self._seed = seed
        self._study = optuna.create_study(direction="maximize" if maximize else "minimize", sampler=self._sampler(0))
        self._asked: dict[int, Any] = {}
        self._space: dict[str, Any] = {}
        for name, found in axes.ranges.items():
            if found.is_int:
                self._space[name] = optuna.distributions.IntDistribution(
                    int(found.low), int(found.high), log=found.is_log, step=int(found.step or 1)
                )
            else:
                self._space[name] = optuna.distributions.FloatDistribution(
                    found.low, found.high, log=found.is_log, step=found.step
                )
        # By position: Optuna's choices are numbers and texts, and a hyperparameter may be a list.
        self._choices = {
            **{name: [{name: value} for value in values] for name, values in axes.lists.items()},
            **axes.groups,
        }
        for name, values in self._choices.items():
            self._space[name] = optuna.distributions.CategoricalDistribution(range(len(values)))

    def ask(self, number: int) -> dict[str, Any]:
        """Returns the values of a trial."""
        self._study.sampler = self._sampler(number)
        trial = self._study.ask(self._space)
        self._asked[number] = trial
        values: dict[str, Any] = {}
        for name, chosen in trial.params.items():
            values |= self._choices[name][chosen] if name in self._choices else {name: chosen}
        return values

    def tell(self, number: int, values: Mapping[str, Any], result: float | None) -> None:
        """Records the result of a trial; None if it failed."""
        state = self._optuna.trial.TrialState
        params, ended = self._params(values), state.COMPLETE if result is not None else state.FAIL
        assert params is not None
        if number in self._asked:
            asked = self._asked.pop(number)
            if asked.params == params:
                self._study.tell(asked, result, state=ended)
                return
            self._study.tell(asked, state=state.FAIL)  # another client started this trial with values of its own
        self._study.add_trial(
            self._optuna.trial.create_trial(params=params, distributions=self._space, value=result, state=ended)
        )

    @staticmethod
    def record(values: Mapping[str, Any]) -> str:
        """Returns the values of a trial as text, as the file has them: a recipe changes some, such as the names of models."""
        return json.dumps(values)

    def values_in(self, recorded: str) -> dict[str, Any]:
        """Returns the values of a trial that was started before.

        Args:
            recorded: What `record` returned for it.

        Raises:
            ConfigurationError: They are not values of this search.
        """
        try:
            values = json.loads(recorded)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict) or values.keys() != self._names or self._params(values) is None:
            raise ConfigurationError(
                f"a trial in the store has {recorded[:200]!r}, which are not values of this search: give the experiment another id"
            )
        return values

    @property
    def _names(self) -> set[str]:
        return {*self._axes.ranges, *(name for choices in self._choices.values() for name in choices[0])}

    def _params(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns Optuna's parameters for values, or None if the space does not have them."""
        params: dict[str, Any] = {}
        for name, found in self._axes.ranges.items():
            if not _is_in(found, values[name]):  # whoever writes to the store must not choose what is trained
                return None
            params[name] = values[name]
        for name, choices in self._choices.items():
            at = next((at for at, one in enumerate(choices) if all(values[key] == one[key] for key in one)), None)
            if at is None:
                return None
            params[name] = at
        return params

    def _sampler(self, number: int) -> Any:
        seed = (self._seed * 1_000_003 + number) % 2**32
        samplers = self._optuna.samplers
        return samplers.TPESampler(seed=seed, n_startup_trials=5) if self._tpe else samplers.RandomSampler(seed=seed)


def _is_in(found: Range, value: Any) -> bool:
    """Whether a range has a value, by Optuna's rules."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not found.low <= value <= found.high:
        return False
    # A whole number may be the value of a hyperparameter that is no whole number, and comes back from the store as 2.0.
    steps = (value - found.low) / (found.step or (1 if found.is_int else math.inf))
    return abs(steps - round(steps)) < 1e-8
