"""Experiments: files of trainings by id, sweeps over them, and their execution."""

from palate.experiments.experiment_file import Experiment, ExperimentFile

__all__ = ["Experiment", "ExperimentFile"]
