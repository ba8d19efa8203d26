"""Experiments: files of trainings by id, sweeps over them, and their execution. Loads each part when it is first asked for."""

from palate.experiments.experiment_file import Experiment, ExperimentFile

__all__ = ["Experiment", "ExperimentFile"]
