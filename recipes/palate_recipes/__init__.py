"""What Palate knows as data: models, hyperparameters, demo preferences. Imports nothing else of Palate's."""

__version__ = "0.1.0"
